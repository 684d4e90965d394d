"""K-means on a matrix, on rows that are made tile by tile, or on rows that are never made.

The forms of `Points` differ in how they assign rows to centroids and sum clusters. The algorithm is one for all:
k-means++ seeding and Lloyd's passes on a sample, then passes over all rows until one of them lowers the inertia by
little. Initial vectors need no more than that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from gpu_init.backend.interface import Backend, ranges
from gpu_init.method.points import TILE_ROWS, Dense, Sample, Step, sample_sizes

MOST_PASSES = 300  # There are no more passes over a sample, or over all rows; scikit-learn's default.

TOLERANCE = 1e-3  # A pass over all rows that lowers the inertia by less than this share of it is the last.


@dataclass(frozen=True)
class Clusters:
    """Result of K-means.

    Attributes
    ----------
    centroids : array, shape (K, D), float32
        Each the mean of the rows that were nearest to the centroid before it, summed in float64.
    labels : array, shape (n,), int32
        Nearest of these centroids of each row; -1 for users who have no row.
    inertia : list of float
        Sum of squared distances of the rows to their nearest centroids, at each pass over all rows; the last is that
        of these centroids.
    stopped : {"tolerance", "labels", "passes"}
        Why there are no more passes: the last one lowered the inertia by less than the tolerance; no label would have
        changed any more; or there were `MOST_PASSES`.
    form : {"dense", "tiled", "factored"}
        The form of points that the passes used.
    library : bool
        Whether a library found the centroids that the passes started from.
    """

    centroids: Any
    labels: Any
    inertia: list[float]
    stopped: str
    form: str
    library: bool


def fit(
    backend: Backend,
    points: Clusterable,
    clusters: int,
    seed: int,
    restarts: int = 1,
    tolerance: float = TOLERANCE,
    start: Any = None,
) -> Clusters:
    """K-means on some points: on a sample first, then passes over all rows.

    Parameters
    ----------
    backend : Backend
        Where the points lie.
    points : Clusterable
        n rows, n >= K.
    clusters : int
        K.
    seed : int
        Of the sample and of the k-means++ seeding.
    restarts : int, default=1
        Starts on the first sample, of which the best goes on.
    tolerance : float, default=1e-3
        Share of the inertia; see `lloyd`.
    start : array, shape (K, D), optional
        Centroids that the passes over all rows start from, found by a library; None: those of the sample.

    Returns
    -------
    Clusters
    """
    with backend.deterministic():
        if start is None:
            centroids = _from_sample(backend, points, clusters, seed, restarts, tolerance)
        else:
            centroids = backend.to_host(start)
        centroids, labels, inertia, stopped = lloyd(backend, points, centroids, tolerance)
    return Clusters(backend.asarray(centroids), labels, inertia, stopped, points.form, start is not None)


def _from_sample(
    backend: Backend, points: Clusterable, clusters: int, seed: int, restarts: int, tolerance: float
) -> Any:
    """Centroids to start from, (K, D) float32: the best found on a sample, taken further on a larger one."""
    rng = np.random.default_rng(seed)
    sizes = sample_sizes(len(points), clusters, len(points.offset))
    chosen = drawn(backend, rng, len(points), sizes[-1])
    rows = backend.empty((len(chosen), len(points.offset)), "float32")
    for part in ranges(len(chosen), TILE_ROWS):
        rows[part] = points.rows(chosen[part])
    sample = Sample(backend, rows[drawn(backend, rng, len(rows), sizes[0])])
    starts = (seeds(backend, sample, clusters, rng) for _ in range(restarts))
    found = (lloyd(backend, sample, start) for start in starts)
    centroids, *_ = min(found, key=lambda one: one[2][-1])
    if len(sizes) > 1:
        centroids, *_ = lloyd(backend, Sample(backend, rows), centroids, tolerance)
    return (centroids.astype(np.float64) + backend.to_host(points.offset)).astype(np.float32)


def drawn(backend: Backend, rng: np.random.Generator, count: int, size: int) -> Any:
    """Some of ``count`` rows, (size,) int64, ascending."""
    return backend.asarray(np.sort(rng.choice(count, size, replace=False)))


def seeds(backend: Backend, points: Dense, clusters: int, rng: np.random.Generator) -> Any:
    """Rows to start from, (K, D) float32 on the host, by greedy k-means++ (Arthur and Vassilvitskii, SODA 2007).

    The first is drawn from all rows alike. Each further one is the best of 2 + ln K rows, drawn in proportion to
    the squared distance to the seeds so far, as scikit-learn has it.
    """
    xp = backend.xp
    chosen = [int(rng.integers(len(points)))]
    closest = points.squared_distances(backend.asarray(np.array(chosen)))[:, 0]
    while len(chosen) < clusters:
        reached = xp.cumsum(closest)
        drawn = backend.asarray(rng.random(2 + int(np.log(clusters)))) * reached[-1]
        candidates = xp.minimum(xp.searchsorted(reached, drawn, side="right"), len(points) - 1)
        distances = xp.minimum(closest[:, None], points.squared_distances(candidates))
        best = int(distances.sum(axis=0).argmin())
        chosen.append(int(candidates[best]))
        closest = distances[:, best]
    rows = backend.to_host(points.rows(backend.asarray(np.array(chosen))))
    return (rows + backend.to_host(points.offset)).astype(np.float32)


def lloyd(
    backend: Backend, points: Clusterable, centroids: Any, tolerance: float = 0.0
) -> tuple[Any, Any, list[float], str]:
    """Lloyd's passes: each assigns every row to its nearest centroid, and moves the centroids to the means.

    The last pass moves no centroid, so that its labels are the nearest of the centroids. It is the one that lowers the
    inertia by less than ``tolerance`` of it, unless it leaves a cluster empty; or the one whose means are the centroids
    already, so that no label would change any more, which is what ends a run of tolerance 0; or pass `MOST_PASSES`.

    Returns
    -------
    centroids (K, D) float32 on the host; labels (n,) int32; inertia at each pass; why it stopped, see `Clusters`
    """
    offset = backend.to_host(points.offset)
    inertia: list[float] = []
    while True:
        found = points.step(centroids)
        inertia.append(found.inertia)
        counts = backend.to_host(found.counts)
        filled = bool(counts.all())
        if len(inertia) == MOST_PASSES:
            return centroids, found.labels, inertia, "passes"
        lowered = inertia[-2] - inertia[-1] if len(inertia) > 1 else np.inf
        if filled and tolerance > 0 and lowered < tolerance * inertia[-1]:
            return centroids, found.labels, inertia, "tolerance"
        means = _means(offset, centroids, backend.to_host(found.sums()), counts)
        if not filled:
            _refill(backend, points, means, centroids, counts)
        if np.array_equal(means, centroids):
            return centroids, found.labels, inertia, "labels"
        centroids = means


class Clusterable(Protocol):
    """Rows that K-means clusters, wherever they are; `Points` is its form in one process, and says more.

    Centroids are numpy arrays, since they are small.
    """

    form: str

    def __len__(self) -> int: ...

    @property
    def offset(self) -> Any:
        """A point amid the rows, (D,) float64."""

    def rows(self, index: Any) -> Any:
        """Return some of the rows less the offset, (len(index), D)."""

    def step(self, centroids: Any) -> Step:
        """Assign every row to its nearest centroid, the first of equals."""

    def far(self, centroids: Any, count: int) -> tuple[Any, Any]:
        """Return the rows farthest from their centroids, the farthest first, and their squared distances."""


def _means(offset: Any, centroids: Any, sums: Any, counts: Any) -> Any:
    """New centroids, (K, D) float32, from sums of rows less the offset; an empty cluster's stays where it is."""
    filled = (counts > 0)[:, None]
    return np.where(filled, sums / np.maximum(counts, 1)[:, None] + offset, centroids).astype(np.float32)


def _refill(backend: Backend, points: Clusterable, means: Any, centroids: Any, counts: Any) -> None:
    """Let clusters left empty take the rows farthest from the centroids, as scikit-learn has it.

    Rows that are centroids already do not count: where fewer rows differ than there are clusters, some stay empty.
    """
    empty = np.flatnonzero(counts == 0)
    farthest, _ = points.far(centroids, len(empty))
    rows = (backend.to_host(points.rows(farthest)) + backend.to_host(points.offset)).astype(np.float32)
    taken = {mean.tobytes() for mean in means[counts > 0]}
    new = [row for row in dict.fromkeys(map(bytes, rows)) if row not in taken]
    for cluster, row in zip(empty, new, strict=False):
        means[cluster] = np.frombuffer(row, np.float32)
