"""K-means: the library's on rows that exist, then Lloyd's steps until labels settle.

Section 2.4 of the design: k-means++ seeding, Lloyd.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .backend import Backend

BLOCK_ROWS = 8192  # fixed, so that sums run in one order whatever the memory or the number of threads
SETTLING_STEPS = 1000


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
        Sum of squared distances to the nearest centroid, once per settling step, the last being final.
    iterations : int
        Lloyd iterations, the library's and the settling steps.
    settled : bool
        Whether labels stopped changing within the limit.
    form : str
        How it was computed.
    """

    centroids: Any
    labels: Any
    inertia: list[float]
    iterations: int
    settled: bool
    form: str


def dense(backend: Backend, points: Any, clusters: int, seed: int) -> Clusters:
    """K-means on the rows of a matrix that exists.

    The library stops at its tolerance, where centroids are not quite the means of their members, and sums in
    float32 in an order of its own. `settle` takes the last steps.

    Parameters
    ----------
    backend : Backend
        Where ``points`` lie.
    points : array, shape (n, D), float32, C order
        Rows to cluster, n >= K.
    clusters : int
        K.
    seed : int
        Of the k-means++ seeding.

    Returns
    -------
    Clusters
    """
    start, iterations = backend.kmeans(points, clusters, seed)
    centroids, labels, inertia, settled = settle(backend, points, start.astype(backend.xp.float32))
    return Clusters(centroids, labels, inertia, iterations + len(inertia), settled, "dense")


def settle(backend: Backend, points: Any, centroids: Any) -> tuple[Any, Any, list[float], bool]:
    """Lloyd's steps in float64 until no label changes; clusters left empty take the farthest rows.

    Returns
    -------
    centroids (K, D) float32, labels (n,) int32, inertia per step, whether labels settled
    """
    xp = backend.xp
    inertia: list[float] = []
    before = None
    for _ in range(SETTLING_STEPS):
        labels, distances = nearest(backend, points, centroids)
        inertia.append(float(distances.sum()))
        if before is not None and bool((labels == before).all()):
            return centroids, labels, inertia, True
        sums, counts = cluster_sums(backend, points, labels, len(centroids))
        filled = counts > 0
        means = xp.where(filled[:, None], sums / xp.maximum(counts, 1)[:, None], centroids)
        empty = xp.flatnonzero(~filled)
        if len(empty):
            farthest = xp.argsort(-distances, kind="stable")[: len(empty)]
            farthest = farthest[distances[farthest] > 0]  # none where rows are fewer than clusters
            means[empty[: len(farthest)]] = points[farthest]
        centroids, before = means.astype(xp.float32), labels
    labels, distances = nearest(backend, points, centroids)
    return centroids, labels, [*inertia, float(distances.sum())], False


def nearest(backend: Backend, points: Any, centroids: Any) -> tuple[Any, Any]:
    """Nearest centroid of each row and the squared distance to it, in float64; the first of equals.

    Returns
    -------
    labels (n,) int32, squared distances (n,) float64
    """
    xp = backend.xp
    labels = xp.empty(len(points), xp.int32)
    distances = xp.empty(len(points), xp.float64)
    table = centroids.astype(xp.float64)
    middle = table.mean(axis=0)  # distances from the middle keep the digits that a large common mean would take
    table -= middle
    lengths = (table * table).sum(axis=1)
    with backend.deterministic():
        for start in range(0, len(points), BLOCK_ROWS):
            block = points[start : start + BLOCK_ROWS].astype(xp.float64) - middle
            scores = lengths - 2.0 * (block @ table.T)
            found = scores.argmin(axis=1)
            labels[start : start + BLOCK_ROWS] = found
            least = xp.take_along_axis(scores, found[:, None], axis=1)[:, 0] + (block * block).sum(axis=1)
            distances[start : start + BLOCK_ROWS] = xp.maximum(least, 0.0)
    return labels, distances


def cluster_sums(backend: Backend, points: Any, labels: Any, clusters: int) -> tuple[Any, Any]:
    """Sum of the rows of each cluster, and how many they are, block by block in float64.

    Returns
    -------
    sums (K, D) float64, counts (K,) int64
    """
    xp = backend.xp
    sums = xp.zeros((clusters, points.shape[1]), xp.float64)
    for start in range(0, len(points), BLOCK_ROWS):
        block = points[start : start + BLOCK_ROWS].astype(xp.float64)
        found = labels[start : start + BLOCK_ROWS]
        # One-hot labels by cluster, not their transpose: a transposed sparse product varies between runs on CUDA.
        members = xp.argsort(found, kind="stable")
        indptr = xp.searchsorted(found[members], xp.arange(clusters + 1))
        one_hot = backend.sparse.csr_matrix(
            (xp.ones(len(members)), members.astype(xp.int32), indptr.astype(xp.int32)), shape=(clusters, len(members))
        )
        sums += one_hot @ block
    return sums, xp.bincount(labels, minlength=clusters)
