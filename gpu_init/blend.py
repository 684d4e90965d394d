"""The blend of local and global part, and its scale (section 2.6 and 2.7 of the design)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .backend import Backend, in_blocks, ranges
from .features import Modality
from .interactions import Interactions

NORM_ROWS = 4096  # norms are summed over ranges of so many rows, in order, whatever the size of a block


@dataclass(frozen=True)
class Weighting:
    """Row and item factors of the sparse operators of one modality, all float64.

    ``local = diag(local_rows) R diag(local_items)`` is A of section 2.3, ``means = diag(mean_rows) R
    diag(present)`` the interaction-weighted means D_U^-1 R. A row factor of 0 marks a cold user.
    """

    local_rows: Any
    local_items: Any
    mean_rows: Any
    present: Any

    @property
    def warm(self) -> Any:
        """Users with a usable interaction in this modality, (U,) bool."""
        return self.mean_rows > 0


@dataclass(frozen=True)
class Blend:
    """All that the fused pass needs to write the rows of one modality.

    ``X_u = scale * (lam_u L_u + (1 - lam_u) G_u)``, and ``scale * cold`` for cold users. Exactly one of
    ``user_labels`` (U,) and ``item_labels`` (I,), int32, is given: where ``G_u`` comes from.
    """

    modality: Modality
    weighting: Weighting
    lam: float
    centroids: Any
    user_labels: Any
    item_labels: Any
    cold: Any
    scale: float = 1.0


def blend(backend: Backend, interactions: Interactions, fit: Blend, rows: slice, out: Any = None) -> Any:
    """Rows of X, (n, d) float32: one kernel call, into ``out`` where one is given."""
    by_item = fit.item_labels is not None
    if out is None:
        out = backend.empty((rows.stop - rows.start, fit.modality.values.shape[1]), backend.xp.float32)
    backend.kernels.aggregate_blend(
        interactions.csr.rows(rows.start, rows.stop),
        fit.modality.values,
        fit.weighting.local_rows[rows],
        fit.weighting.local_items,
        backend.xp.full(rows.stop - rows.start, fit.lam),
        fit.centroids,
        None if by_item else fit.user_labels[rows],
        fit.item_labels,
        fit.weighting.mean_rows[rows] if by_item else None,
        fit.cold,
        fit.scale,
        out,
    )
    return out


def scale_to_items(backend: Backend, interactions: Interactions, fit: Blend, block_rows: int) -> float:
    """Give the factor that makes the mean row norm of X that of the items (section 2.7).

    Cold rows count, items without the modality do not. 1 where either norm is 0.
    """
    items = item_norms(backend, fit.modality)
    parts = in_blocks(
        backend, interactions.users, block_rows, NORM_ROWS, lambda part: blend(backend, interactions, fit, part)
    )
    users = norms(backend, (block for _, block in parts))
    return items["mean"] / users["mean"] if items["mean"] > 0 and users["mean"] > 0 else 1.0


def item_norms(backend: Backend, modality: Modality) -> dict[str, float]:
    """`norms` of the items that have a modality."""
    kept = modality.present
    return norms(backend, (modality.values[part][kept[part]] for part in ranges(len(kept), NORM_ROWS)))


def norms(backend: Backend, blocks: Iterator[Any]) -> dict[str, float]:
    """Mean, least and largest Euclidean norm of the rows of some blocks, in float64.

    Blocks must be cut at multiples of `NORM_ROWS` for the mean to come out the same whatever their size; an
    empty sequence gives zeros.
    """
    total, count, least, most = 0.0, 0, float("inf"), 0.0
    for block in blocks:
        lengths = backend.xp.sqrt(backend.kernels.lengths(block))
        for start in range(0, len(block), NORM_ROWS):
            part = lengths[start : start + NORM_ROWS]
            total += float(part.sum())
            count += len(part)
            least, most = min(least, float(part.min())), max(most, float(part.max()))
    return {"mean": total / count, "min": least, "max": most} if count else {"mean": 0.0, "min": 0.0, "max": 0.0}
