"""Projection of the item features to fewer dimensions by PCA."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gpu_init.backend.interface import Backend, ranges
from gpu_init.errors import InputError
from gpu_init.method.modality import _BLOCK_ROWS, Modality


@dataclass(frozen=True)
class Projection:
    """Principal components of a modality.

    Attributes
    ----------
    mean : array, shape (D,), float64
        Of the items that have the modality.
    components : array, shape (D, d), float64
        By falling eigenvalue; divided by the eigenvalue's square root when whitened.
    eigenvalues : array, shape (d,), float64
        Variance along each component.
    """

    mean: Any
    components: Any
    eigenvalues: Any


def fit_projection(backend: Backend, modality: Modality, dim: int, whiten: bool) -> Projection:
    """Find the principal components of all items that have the modality.

    Eigenvectors of the covariance (float64, ddof 1), by falling eigenvalue, each with its largest loading
    positive (the first such on ties). Eigenvalues below 1e-10 of the largest are dropped, which bounds ``dim``.

    Parameters
    ----------
    backend : Backend
        Where the modality lies.
    modality : Modality
        D columns wide.
    dim : int
        d, the number of components.
    whiten : bool
        Scale the components to unit variance.

    Returns
    -------
    Projection

    Raises
    ------
    InputError
        ``dim`` is above D or above the number of independent directions, or fewer than two items.
    """
    xp = backend.xp
    width = modality.values.shape[1]
    if dim > width:
        raise InputError(f"dim {dim} is above the {width} dimensions of modality {modality.name}.")
    if modality.n_present < 2:
        raise InputError(f"modality {modality.name}: one item has it; a projection (dim) needs two or more.")
    with backend.deterministic():
        total = xp.zeros(width, xp.float64)
        for _, rows in _blocks(xp, modality):
            total += rows.sum(axis=0)
        mean = total / modality.n_present
        covariance = xp.zeros((width, width), xp.float64)
        for _, rows in _blocks(xp, modality):
            centred = rows - mean
            covariance += centred.T @ centred
        eigenvalues, vectors = xp.linalg.eigh(covariance / (modality.n_present - 1))
        eigenvalues, vectors = eigenvalues[::-1], vectors[:, ::-1]
        # Items that are all alike vary by the rounding of their mean: below 1e-12 of its length nothing is real.
        least = max(1e-10 * float(eigenvalues[0]), 1e-24 * float(mean @ mean))
        independent = int((eigenvalues > least).sum())
        if dim > independent:
            raise InputError(
                f"dim {dim} is above the {independent} independent directions of modality {modality.name};"
                " lower --dim, or leave the modality out."
            )
        eigenvalues, vectors = eigenvalues[:dim], vectors[:, :dim]
        largest = vectors[abs(vectors).argmax(axis=0), xp.arange(dim)]
        lengths = xp.where(largest < 0, -1.0, 1.0) / (xp.sqrt(eigenvalues) if whiten else 1.0)
        return Projection(mean, xp.ascontiguousarray(vectors * lengths), xp.ascontiguousarray(eigenvalues))


def project(backend: Backend, modality: Modality, projection: Projection) -> Modality:
    """Items in the space of the components, computed in float64 and rounded once.

    Parameters
    ----------
    backend : Backend
        Where the modality lies.
    modality : Modality
        D columns wide.
    projection : Projection
        D to d.

    Returns
    -------
    Modality
        d columns wide; an item without the modality is a zero row.
    """
    xp = backend.xp
    values = backend.empty((len(modality.values), projection.components.shape[1]), xp.float32)
    values.fill(0)
    with backend.deterministic():
        for part, rows in _blocks(xp, modality):
            values[part][modality.present[part]] = (rows - projection.mean) @ projection.components
    return Modality(modality.name, values, modality.present, modality.n_present)


def _blocks(xp: Any, modality: Modality) -> Iterator[tuple[slice, Any]]:
    """Give fixed ranges of items, with the rows of those that have the modality in float64."""
    for part in ranges(len(modality.values), _BLOCK_ROWS):
        yield part, modality.values[part][modality.present[part]].astype(xp.float64)
