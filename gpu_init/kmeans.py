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
SAMPLE_ROWS = 16_384  # that the factored form seeds on, and 64 per cluster at least
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
    size = min(len(points), max(SAMPLE_ROWS, 64 * clusters))
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
        total = sum(backend.in_order(lambda part: self._items(part, 0.0, xp.float64).sum(axis=0), parts))
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

    def step(self, centroids: Any) -> tuple[Any, Any, Any, Any]:
        """See `Points.step`."""
        xp = self.backend.xp
        everyone = xp.arange(len(self))
        labels, least, _ = self.assign(everyone, centroids, xp.float64)
        item_sums = self.label_sums(len(centroids))
        self.move(item_sums, everyone, xp.full(len(self), -1, xp.int32), labels)
        counts = xp.bincount(labels, minlength=len(centroids))
        sums = self.sums(item_sums, xp.float64) + counts[:, None] * self.middle
        return labels, xp.maximum(least + self.squared_norms, 0.0), sums, counts

    def assign(self, index: Any, centroids: Any, dtype: Any) -> tuple[Any, Any, Any]:
        """Label, least and second least squared distance, both less the row's squared norm, of some rows."""
        xp = self.backend.xp
        table = centroids.astype(xp.float64) - self.middle
        columns = xp.ascontiguousarray(table.T.astype(dtype))
        products = xp.empty((len(self._features), len(centroids)), dtype)

        def work(part: slice) -> None:
            products[part] = self._items(part, self.middle, dtype) @ columns

        for _ in self.backend.in_order(work, _parts(len(self._features))):
            pass
        lengths = (table * table).sum(axis=1)
        kernels = self.backend.kernels
        return kernels.assign(self._csr, self.users[index], products, self._row_scale, self._item_scale, lengths)

    def label_sums(self, clusters: int) -> Any:
        """Sums of the rows of A by label, (I, K) float64, of no row yet."""
        return self.backend.xp.zeros((len(self._features), clusters), self.backend.xp.float64)

    def move(self, item_sums: Any, index: Any, before: Any, after: Any) -> None:
        """Bring label sums up to date with some rows that change their label."""
        kernels = self.backend.kernels
        kernels.move(self._csr, self.users[index], before, after, self._row_scale, self._item_scale, item_sums)

    def sums(self, item_sums: Any, dtype: Any) -> Any:
        """Sums of the rows of each label less the middle, (K, D) float64, from the label sums."""
        xp = self.backend.xp
        total = xp.zeros((item_sums.shape[1], self._features.shape[1]), xp.float64)

        def work(part: slice) -> Any:
            return item_sums[part].T.astype(dtype) @ self._items(part, self.middle, dtype)

        for partial in self.backend.in_order(work, _parts(len(self._features))):
            total += partial
        return total

    def _items(self, part: slice, middle: Any, dtype: Any) -> Any:
        """Rows of F less the middle; missing items are zero."""
        xp = self.backend.xp
        block = self._features[part].astype(dtype) - xp.asarray(middle, dtype)
        if self._any_missing:
            block[self._missing[part]] = 0
        return block


def descend(backend: Backend, points: Factored, centroids: Any) -> tuple[Any, list[float]]:
    """Lloyd's steps in float32 for rows that may change, until none does.

    A row keeps its label while its distance to its centroid, bounded above by how far centroids moved since it
    was last looked at, stays below the bounds to the others (Hamerly, SDM 2010).

    Returns
    -------
    centroids (K, D) float32, inertia at the first step
    """
    xp = backend.xp
    clusters = len(centroids)
    item_sums = points.label_sums(clusters)
    labels = xp.full(len(points), -1, xp.int32)
    upper, lower = xp.full(len(points), xp.inf), xp.zeros(len(points))
    history: list[float] = []
    doubtful = xp.arange(len(points))
    for _ in range(SETTLING_STEPS):
        found, least, second = points.assign(doubtful, centroids, xp.float32)
        norms = points.squared_norms[doubtful]
        upper[doubtful] = xp.sqrt(xp.maximum(least + norms, 0.0))
        lower[doubtful] = xp.sqrt(xp.maximum(second + norms, 0.0))
        if not history:
            history.append(float((upper * upper).sum()))
            margin = _MARGIN * float(upper.mean())
        changed = found != labels[doubtful]
        moved = doubtful[changed]
        if len(moved) == 0:
            break
        points.move(item_sums, moved, labels[moved], found[changed])
        labels[moved] = found[changed]
        counts = xp.bincount(labels, minlength=clusters)
        sums = points.sums(item_sums, xp.float32) + counts[:, None] * points.middle
        before = centroids
        centroids = _means(backend, points, centroids, upper * upper, sums, counts)
        shifts = xp.sqrt(((centroids.astype(xp.float64) - before) ** 2).sum(axis=1))
        upper += shifts[labels]
        lower -= shifts.max()
        doubtful = xp.flatnonzero(upper + margin > lower)
    return centroids, history


def _centred(xp: Any, centroids: Any) -> tuple[Any, Any]:
    """Mean of the centroids, and the centroids less it, float64: a large common mean would take the digits."""
    table = centroids.astype(xp.float64)
    middle = table.mean(axis=0)
    return middle, table - middle


def _parts(count: int) -> Iterator[slice]:
    return (slice(start, min(start + BLOCK_ROWS, count)) for start in range(0, count, BLOCK_ROWS))
