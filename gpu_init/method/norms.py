"""Norms of rows: their mean, least and largest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from gpu_init.backend.interface import Backend, ranges
from gpu_init.method.modality import Modality

NORM_ROWS = 4096  # Norms are summed over ranges of so many rows, in order, whatever the size of a block.


def item_norms(backend: Backend, modality: Modality) -> dict[str, float]:
    """`norms` of the items that have a modality."""
    kept = modality.present
    return norms(backend, (modality.values[part][kept[part]] for part in ranges(len(kept), NORM_ROWS)))


def unit_scales(backend: Backend, modality: Modality) -> Any:
    """Factors (I,) float64 that make the items' rows unit vectors; 0 for missing items and for rows of 0."""
    xp = backend.xp
    lengths = xp.where(modality.present, xp.sqrt(backend.kernels.lengths(modality.values)), 0.0)
    return xp.where(lengths > 0, 1.0 / xp.where(lengths > 0, lengths, 1.0), 0.0)


def norms(backend: Backend, blocks: Iterator[Any]) -> dict[str, float]:
    """Mean, least and largest Euclidean norm of the rows of some blocks, in float64.

    Blocks must be cut at multiples of `NORM_ROWS` for the mean to come out the same whatever their size; an
    empty sequence gives zeros.
    """
    return norm_statistics([norm_sums(backend, blocks)])


class NormSums(NamedTuple):
    """Sum, count, least and largest of some norms."""

    total: float
    rows: int
    least: float
    most: float


def norm_sums(backend: Backend, blocks: Iterator[Any]) -> NormSums:
    """Norms of the rows of some blocks, which are cut as `norms` has it."""
    total, count, least, most = 0.0, 0, float("inf"), 0.0
    for block in blocks:
        lengths = backend.xp.sqrt(backend.kernels.lengths(block))
        for start in range(0, len(block), NORM_ROWS):
            part = lengths[start : start + NORM_ROWS]
            total += float(part.sum())
            count += len(part)
            least, most = min(least, float(part.min())), max(most, float(part.max()))
    return NormSums(total, count, least, most)


def norm_statistics(parts: Iterable[NormSums]) -> dict[str, float]:
    """Mean, least and largest norm, from the sums of all parts, in order."""
    totals, counts, least, most = zip(*parts, strict=True)
    if not sum(counts):
        return {"mean": 0.0, "min": 0.0, "max": 0.0}
    return {"mean": sum(totals) / sum(counts), "min": min(least), "max": max(most)}
