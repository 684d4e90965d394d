"""K-means on users' means or on items: dense, by the library; factored, without the U x D matrix.

Section 2.4 of the design (k-means++ seeding, Lloyd) and its "two facts that make it scale". Either form ends
with `settle`: Lloyd's steps in float64 until no label changes, so that each label is the nearest centroid and
each centroid the mean of its members.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from .backend import Backend
from .kernels import Csr

BLOCK_ROWS = 4096  # fixed, so that sums run in one order whatever the memory or the number of threads
SAMPLE_ROWS = 8192  # that the factored form starts on, and 256 per cluster at least
SETTLING_STEPS = 1000
_MARGIN = 1e-4  # of the mean distance: how far float32 may be off, many times over


@dataclass(frozen=True)
class Clusters:
    """What K-means found.

    Attributes
    ----------
    centroids : array, shape (K, D), float32
        Each the mean of its members, summed in float64.
    labels : array, shape (n,), int32
        Nearest centroid of each row.
    inertia : list of float
        Sum of squared distances to the nearest centroid at each of our own steps; the last is final.
    iterations : int
        Lloyd iterations, the library's included.
    settled : bool
        Whether labels stopped changing within the limit.
    form : str
        ``dense`` or ``factored``.
    """

    centroids: Any
    labels: Any
    inertia: list[float]
    iterations: int
    settled: bool
    form: str


class Points(Protocol):
    """Rows to cluster, in whatever form they are held."""

    def __len__(self) -> int: ...

    def rows(self, index: Any) -> Any:
        """Some of the rows, (len(index), D) float32."""

    def step(self, centroids: Any) -> tuple[Any, Any, Any, Any]:
        """One Lloyd step in float64.

        Returns
        -------
        labels (n,) int32, the first of equals; squared distances (n,) float64; the sums of the rows of each
        label (K, D) float64; their counts (K,)
        """


def dense(backend: Backend, matrix: Any, clusters: int, seed: int) -> Clusters:
    """K-means on the rows of a matrix that exists.

    The library stops at its tolerance, where centroids are not quite the means of their members, and sums in
    float32 in an order of its own; `settle` takes the last steps.

    Parameters
    ----------
    backend : Backend
        Where ``matrix`` lies.
    matrix : array, shape (n, D), float32, C order
        Rows to cluster, n >= K.
    clusters : int
        K.
    seed : int
        Of the k-means++ seeding.

    Returns
    -------
    Clusters
    """
    start, iterations = backend.kmeans(matrix, clusters, seed)
    centroids, labels, inertia, settled = settle(backend, Dense(backend, matrix), start.astype(backend.xp.float32))
    return Clusters(centroids, labels, inertia, iterations + len(inertia), settled, "dense")


def factored(backend: Backend, points: Factored, clusters: int, seed: int) -> Clusters:
    """K-means on rows of ``M = A F`` that are never made, but for a sample that seeds it.

    The library's K-means on the sample gives centroids that few of all rows disagree with; `descend` goes on
    from there on all rows, and `settle` ends it.

    Parameters
    ----------
    backend, clusters, seed
        As in `dense`.
    points : Factored
        The rows, n >= K.

    Returns
    -------
    Clusters
    """
    size = min(len(points), max(SAMPLE_ROWS, 256 * clusters))
    chosen = np.sort(np.random.default_rng(seed).choice(len(points), size, replace=False))
    start, iterations = backend.kmeans(points.rows(backend.asarray(chosen)), clusters, seed)
    centroids, history = descend(backend, points, start.astype(backend.xp.float32))
    centroids, labels, inertia, settled = settle(backend, points, centroids)
    steps = iterations + len(history) + len(inertia)
    return Clusters(centroids, labels, history + inertia, steps, settled, "factored")


def settle(backend: Backend, points: Points, centroids: Any) -> tuple[Any, Any, list[float], bool]:
    """Lloyd's steps until no label changes.

    Returns
    -------
    centroids (K, D) float32, labels (n,) int32, inertia per step, whether labels settled
    """
    inertia: list[float] = []
    before = None
    for _ in range(SETTLING_STEPS):
        labels, distances, sums, counts = points.step(centroids)
        inertia.append(float(distances.sum()))
        if before is not None and bool((labels == before).all()):
            return centroids, labels, inertia, True
        centroids = _means(backend, points, centroids, distances, sums, counts)
        before = labels
    labels, distances, _, _ = points.step(centroids)
    return centroids, labels, [*inertia, float(distances.sum())], False


def _means(backend: Backend, points: Points, centroids: Any, distances: Any, sums: Any, counts: Any) -> Any:
    """New centroids, (K, D) float32; clusters left empty take the farthest rows, as scikit-learn has it."""
    xp = backend.xp
    filled = counts > 0
    means = xp.where(filled[:, None], sums / xp.maximum(counts, 1)[:, None], centroids)
    empty = xp.flatnonzero(~filled)
    if len(empty):
        farthest = xp.argsort(-distances, kind="stable")[: len(empty)]
        farthest = farthest[distances[farthest] > 0]  # none where distinct rows are fewer than clusters
        means[empty[: len(farthest)]] = points.rows(farthest)
    return means.astype(xp.float32)


class Dense:
    """Rows of a matrix (n, D) float32."""

    def __init__(self, backend: Backend, matrix: Any) -> None:
        self._backend = backend
        self._matrix = matrix

    def __len__(self) -> int:
        return len(self._matrix)

    def rows(self, index: Any) -> Any:
        """See `Points.rows`."""
        return self._matrix[index]

    def step(self, centroids: Any) -> tuple[Any, Any, Any, Any]:
        """See `Points.step`."""
        xp = self._backend.xp
        labels, distances = xp.empty(len(self), xp.int32), xp.empty(len(self), xp.float64)
        middle, table = _centred(xp, centroids)
        lengths = (table * table).sum(axis=1)

        def work(part: slice) -> Any:
            block = self._matrix[part].astype(xp.float64) - middle
            scores = lengths - 2.0 * (block @ table.T)
            found = scores.argmin(axis=1)
            labels[part] = found
            least = xp.take_along_axis(scores, found[:, None], axis=1)[:, 0]
            distances[part] = xp.maximum(least + (block * block).sum(axis=1), 0.0)
            return self._one_hot(found, len(centroids)) @ block

        sums = xp.zeros(centroids.shape, xp.float64)
        for partial in self._backend.in_order(work, _parts(len(self))):
            sums += partial
        counts = xp.bincount(labels, minlength=len(centroids))
        return labels, distances, sums + counts[:, None] * middle, counts

    def _one_hot(self, labels: Any, clusters: int) -> Any:
        """Labels as a sparse K x n matrix, made by rows: a transposed product varies between runs on CUDA."""
        xp = self._backend.xp
        members = xp.argsort(labels, kind="stable")
        indptr = xp.searchsorted(labels[members], xp.arange(clusters + 1))
        values = (xp.ones(len(members)), members.astype(xp.int32), indptr.astype(xp.int32))
        return self._backend.sparse.csr_matrix(values, shape=(clusters, len(members)))


class Factored:
    """Rows of ``M = A F``, ``A = diag(row_scale) R diag(item_scale)``, of the users whose ``row_scale`` is not 0.

    Assignment needs only ``A (F C^T)``, K columns and not D, and the update ``(Z^T A) F``, Z the one-hot
    labels: sums by item and label, then a small dense product.

    Parameters
    ----------
    backend : Backend
    csr : Csr
        All users' interactions.
    features : array, shape (I, D), float32
        Rows of missing items may be NaN.
    row_scale, item_scale : arrays, shapes (U,) and (I,), float64
        0 for cold users and for missing items; rows of A must sum to 1, so that ``A (F - m) = M - m``.
    """

    def __init__(self, backend: Backend, csr: Csr, features: Any, row_scale: Any, item_scale: Any) -> None:
        xp = backend.xp
        self.backend = backend
        self.users = xp.flatnonzero(row_scale)
        self._csr = csr
        self._features = features
        self._row_scale = row_scale
        self._item_scale = item_scale
        self._missing = item_scale == 0
        self._any_missing = bool(self._missing.any())
        parts = _parts(len(features))
        total = sum(backend.in_order(lambda part: self._items(part, xp.float64).sum(axis=0), parts))
        self.middle = total / max(len(features) - int(self._missing.sum()), 1)

    @cached_property
    def squared_norms(self) -> Any:
        """Squared length of each row less the middle, (n,) float64: one gather pass."""
        kernels = self.backend.kernels
        norms = kernels.squared_norms(self._csr, self._features, self._row_scale, self._item_scale, self.middle)
        return norms[self.users]

    def __len__(self) -> int:
        return len(self.users)

    def rows(self, index: Any) -> Any:
        """See `Points.rows`."""
        xp = self.backend.xp
        users = self.users[index]
        lengths = self._csr.indptr[users + 1] - self._csr.indptr[users]
        indptr = xp.concatenate([xp.zeros(1, xp.int64), xp.cumsum(lengths)])
        own = xp.searchsorted(indptr, xp.arange(int(indptr[-1])), side="right") - 1
        entries = self._csr.indptr[users][own] + xp.arange(int(indptr[-1])) - indptr[own]
        weights = None if self._csr.weights is None else self._csr.weights[entries]
        chosen = Csr(indptr, self._csr.indices[entries], weights)
        return self.backend.kernels.aggregate(chosen, self._features, self._row_scale[users], self._item_scale)

    def cheap(self, count: int) -> bool:
        """Whether making so many rows reads less than all items' features twice."""
        return count * len(self._csr.indices) < len(self._features) * len(self)

    def step(self, centroids: Any) -> tuple[Any, Any, Any, Any]:
        """See `Points.step`."""
        xp = self.backend.xp
        labels, least, _ = self.assign(xp.arange(len(self)), centroids, xp.float64)
        sums = self.sums(labels, len(centroids), xp.float64)
        return labels, xp.maximum(least + self.squared_norms, 0.0), sums, xp.bincount(labels, minlength=len(centroids))

    def assign(self, index: Any, centroids: Any, dtype: Any) -> tuple[Any, Any, Any]:
        """Label, least and second least squared distance, both less the row's squared norm, of some rows.

        ``dtype`` is that of the products of items and centroids; in float64 they are taken from the middle.
        """
        xp = self.backend.xp
        table = centroids.astype(xp.float64) - self.middle
        columns = xp.ascontiguousarray(table.T.astype(dtype))
        products = xp.empty((len(self._features), len(centroids)), dtype)
        exact = dtype == xp.float64

        def work(part: slice) -> None:
            block = self._features[part]
            products[part] = (block.astype(dtype) - self.middle if exact else block) @ columns

        for _ in self.backend.in_order(work, _parts(len(self._features))):
            pass
        lengths = (table * table).sum(axis=1) + (0.0 if exact else 2.0 * (table @ self.middle))
        kernels = self.backend.kernels
        return kernels.assign(self._csr, self.users[index], products, self._row_scale, self._item_scale, lengths)

    def sums(self, labels: Any, clusters: int, dtype: Any) -> Any:
        """Sums of the rows of each label, (K, D) float64; products are taken in ``dtype``."""
        xp = self.backend.xp
        by_item = xp.zeros((len(self._features), clusters), xp.float64)
        kernels = self.backend.kernels
        kernels.label_sums(self._csr, self.users, labels, self._row_scale, self._item_scale, by_item)
        total = xp.zeros((clusters, self._features.shape[1]), xp.float64)

        def work(part: slice) -> Any:
            return by_item[part].T.astype(dtype) @ self._items(part, dtype)

        for partial in self.backend.in_order(work, _parts(len(self._features))):
            total += partial
        return total

    def _items(self, part: slice, dtype: Any) -> Any:
        """Rows of F; those of missing items are zero."""
        block = self._features[part].astype(dtype, copy=self._any_missing)
        if self._any_missing:
            block[self._missing[part]] = 0
        return block


def descend(backend: Backend, points: Factored, centroids: Any) -> tuple[Any, list[float]]:
    """Lloyd's steps in float32, looking only at rows whose label may change, until none does.

    A row keeps its label while its distance to its centroid, bounded above by how far centroids moved since it
    was last looked at, stays below the bound to the others (Hamerly, SDM 2010). Few rows in doubt are made and
    looked at one by one; many go through the products of all items with the centroids.

    Returns
    -------
    centroids (K, D) float32, inertia at the first step
    """
    xp = backend.xp
    clusters = len(centroids)
    labels = xp.full(len(points), -1, xp.int32)
    upper, lower = xp.full(len(points), xp.inf), xp.zeros(len(points))
    sums = xp.zeros(centroids.shape, xp.float64)
    history: list[float] = []
    doubtful = xp.arange(len(points))
    for _ in range(SETTLING_STEPS):
        if points.cheap(len(doubtful)):
            table = centroids.astype(xp.float64) - points.middle
            found, least, second = _nearest_two(xp, points.rows(doubtful) - points.middle, table)
        else:
            found, least, second = points.assign(doubtful, centroids, xp.float32)
        norms = points.squared_norms[doubtful]
        upper[doubtful] = xp.sqrt(xp.maximum(least + norms, 0.0))
        lower[doubtful] = xp.sqrt(xp.maximum(second + norms, 0.0))
        if not history:
            history.append(float((upper * upper).sum()))
            margin = _MARGIN * float(upper.mean())
        changed = found != labels[doubtful]
        moved, after = doubtful[changed], found[changed]
        if len(moved) == 0:
            break
        before, labels[moved] = labels[moved], after
        if points.cheap(len(moved)):
            one_hot = xp.eye(clusters)
            gone = xp.where((before >= 0)[:, None], one_hot[before], 0.0)
            sums += (one_hot[after] - gone).T @ points.rows(moved)
        else:
            sums = points.sums(labels, clusters, xp.float32)
        last = centroids
        centroids = _means(backend, points, last, upper * upper, sums, xp.bincount(labels, minlength=clusters))
        shifts = xp.sqrt(((centroids.astype(xp.float64) - last) ** 2).sum(axis=1))
        upper += shifts[labels]
        lower -= shifts.max()
        doubtful = xp.flatnonzero(upper + margin > lower)
    return centroids, history


def _nearest_two(xp: Any, rows: Any, table: Any) -> tuple[Any, Any, Any]:
    """As `Factored.assign`, for rows and centroids that are there, both less the middle."""
    scores = (table * table).sum(axis=1) - 2.0 * (rows @ table.T)
    found = scores.argmin(axis=1)
    least = xp.take_along_axis(scores, found[:, None], axis=1)[:, 0]
    xp.put_along_axis(scores, found[:, None], xp.inf, axis=1)
    return found.astype(xp.int32), least, scores.min(axis=1)


def _centred(xp: Any, centroids: Any) -> tuple[Any, Any]:
    """Mean of the centroids, and the centroids less it, float64: a large common mean would take the digits."""
    table = centroids.astype(xp.float64)
    middle = table.mean(axis=0)
    return middle, table - middle


def _parts(count: int) -> Iterator[slice]:
    return (slice(start, min(start + BLOCK_ROWS, count)) for start in range(0, count, BLOCK_ROWS))
