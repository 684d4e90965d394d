"""Samples of a result for whoever looks at it: a few users and items, flat, and the items that centroids stand for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from gpu_init.backend.interface import Backend, ranges
from gpu_init.method.blend import Blend, blend
from gpu_init.method.kmeans import drawn
from gpu_init.method.matrix import Interactions
from gpu_init.method.modality import Modality
from gpu_init.method.norms import unit_scales

SAMPLE = 2000  # So many warm users, and as many items, are drawn.
TYPICAL = 8  # So many items stand for a cluster.
_RANDOM = 16  # A user's vector is compared with so many random items besides the user's own.
_ITERATIONS = 20  # The subspace iteration for two directions takes so many steps.
_TABLE_VALUES = 1 << 22  # Distances of items to centroids are computed so many at a time.
SAMPLE_COLUMNS = (
    *("lambda", "count", "random_x", "random_y", "local_x", "local_y", "blended_x", "blended_y"),
    *("cosine_own", "cosine_others", "norm"),
)


Some = Callable[[Any], tuple[Interactions, Blend]]
"""Takes the numbers of some warm users (n,) among all warm users, ascending; gives their interactions and blend."""


def describe(backend: Backend, modality: Modality, centroids: Any, warm: int, some: Some, seed: int) -> dict[str, Any]:
    """Arrays of an artifact that a report is drawn from, on the host, by name.

    ``sample`` (n, 11) float32: of `SAMPLE` warm users, the `SAMPLE_COLUMNS`. ``sample_items`` (m, 3)
    float32: of as many items, their place in the same plane and their norm. ``typical`` (K, 8) int32: the items
    nearest to each centroid, -1 where there are not so many.

    The plane is that of the items' two principal directions. "Random" are normal vectors of the users' mean length.
    """
    xp = backend.xp
    rng = np.random.default_rng(seed)
    users = _drawn(backend, rng, xp.arange(warm))
    items = _drawn(backend, rng, xp.flatnonzero(modality.present))
    with backend.deterministic():
        values = modality.values[items].astype(xp.float64)
        mean = values.mean(axis=0)
        plane = _plane(backend, values - mean, rng)
        item_places = xp.concatenate([(values - mean) @ plane, _lengths(xp, values)[:, None]], axis=1)
        found = {"sample_items": item_places, "typical": typical(backend, modality, centroids)}
        if len(users):
            found["sample"] = _of_users(backend, *some(users), rng, values, mean, plane)
    kinds = {"sample": "float32", "sample_items": "float32", "typical": "int32"}
    return {name: backend.to_host(array).astype(kinds[name]) for name, array in found.items()}


def _of_users(
    backend: Backend, own: Interactions, plan: Blend, rng: np.random.Generator, others: Any, mean: Any, plane: Any
) -> Any:
    """Rows of ``sample``, (n, 11), for the interactions and the plan of some users, beside some items' rows (m, D)."""
    xp = backend.xp
    n, width = own.users, plan.modality.values.shape[1]
    blended = blend(backend, own, plan, slice(0, n)).astype(xp.float64)
    local = blend(backend, own, replace(plan, lam=1.0), slice(0, n)).astype(xp.float64)
    noise = backend.asarray(rng.standard_normal((n, width)))
    noise *= float(_lengths(xp, blended).mean()) / np.sqrt(width)
    scales = (plan.weighting.mean_rows, unit_scales(backend, plan.modality))
    mine = backend.kernels.aggregate(own.csr, plan.modality.values, *scales, xp.zeros(width))
    far = _lengths(xp, others)
    directions = others / xp.where(far > 0, far, 1.0)[:, None]
    theirs = directions[backend.asarray(rng.integers(0, len(others), (n, _RANDOM)))].mean(axis=1)
    counts = 1.0 / own.square_sums(backend, plan.weighting.mean_rows, plan.weighting.present)
    lam = xp.full(n, plan.lam) if isinstance(plan.lam, float) else plan.lam
    columns = {"lambda": lam, "count": counts}
    for name, rows in (("random", noise), ("local", local), ("blended", blended)):
        flat = (rows - mean) @ plane
        columns |= {f"{name}_x": flat[:, 0], f"{name}_y": flat[:, 1]}
    columns["norm"] = _lengths(xp, blended)
    length = xp.where(columns["norm"] > 0, columns["norm"], 1.0)
    columns["cosine_own"] = (blended * mine).sum(axis=1) / length
    columns["cosine_others"] = (blended * theirs).sum(axis=1) / length
    return xp.stack([columns[name] for name in SAMPLE_COLUMNS], axis=1)


def typical(backend: Backend, modality: Modality, centroids: Any) -> Any:
    """Items nearest to each centroid, (K, `TYPICAL`) int64, the nearest first; -1 where there are not so many."""
    xp = backend.xp
    clusters, width = centroids.shape
    offset, points = xp.zeros(width), centroids.astype(xp.float64)
    distances = xp.full((clusters, TYPICAL), xp.inf)
    found = xp.full((clusters, TYPICAL), -1, xp.int64)
    for part in ranges(len(modality.values), max(1024, _TABLE_VALUES // clusters)):
        rows = modality.values[part]
        away = backend.kernels.lengths(rows) - 2.0 * backend.kernels.products(rows, offset, points).T
        away = xp.concatenate([distances, xp.where(modality.present[part], away, xp.inf)], axis=1)
        numbers = xp.broadcast_to(xp.arange(part.start, part.stop), (clusters, len(rows)))
        numbers = xp.concatenate([found, numbers], axis=1)
        nearest = xp.argpartition(away, TYPICAL - 1, axis=1)[:, :TYPICAL]
        nearest = xp.take_along_axis(nearest, xp.argsort(xp.take_along_axis(away, nearest, axis=1), axis=1), axis=1)
        distances, found = xp.take_along_axis(away, nearest, axis=1), xp.take_along_axis(numbers, nearest, axis=1)
    return xp.where(xp.isfinite(distances), found, -1)


def _drawn(backend: Backend, rng: np.random.Generator, rows: Any) -> Any:
    """Some of the rows, at most `SAMPLE`, ascending."""
    if len(rows) <= SAMPLE:
        return rows
    return rows[drawn(backend, rng, len(rows), SAMPLE)]


def _lengths(xp: Any, rows: Any) -> Any:
    return xp.sqrt((rows * rows).sum(axis=1))


def _plane(backend: Backend, centred: Any, rng: np.random.Generator) -> Any:
    """Two principal directions, (D, 2), by subspace iteration; each one's largest loading is positive."""
    xp = backend.xp
    width = centred.shape[1]
    basis = backend.asarray(rng.standard_normal((width, min(4, width))))
    for _ in range(_ITERATIONS):
        basis, _ = xp.linalg.qr(centred.T @ (centred @ basis))
    variances, turned = xp.linalg.eigh(basis.T @ (centred.T @ (centred @ basis)))
    basis = (basis @ turned)[:, xp.argsort(-variances)[:2]]
    if basis.shape[1] < 2:
        basis = xp.concatenate([basis, xp.zeros((width, 1))], axis=1)
    largest = basis[abs(basis).argmax(axis=0), xp.arange(2)]
    return basis * xp.where(largest < 0, -1.0, 1.0)
