"""How many clusters: candidates are scored on a sample of the rows, where ``clusters = "auto"``.

The rule. K-means runs on a sample for each candidate K. The K of the highest mean silhouette is taken, or, of those
within its standard error, the one of the highest Calinski-Harabasz index; but the smallest candidate, where the best
silhouette is not `GAIN` above what its K reaches on a single normal blob of the sample's own covariance. The blob
tells groups from the halves that K-means makes of anything, which in few dimensions score high as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu_init.backend.interface import Backend, ranges
from gpu_init.method import kmeans
from gpu_init.method import points as method_points

CANDIDATES = (*range(2, 17), 18, 20, 24, 28, 32, 40, 48, 64)
SAMPLE_ROWS = 2048  # Candidates are scored on at most so many rows.
GAIN = 0.1  # The best silhouette must be this much above that of the blob.
_RESTARTS = 4  # K-means is started so many times for each candidate.
_BLOCK_ROWS = 512  # Distances are computed for so many rows at a time.


@dataclass(frozen=True)
class Choice:
    """The K that was chosen, and the scores it was chosen by.

    Attributes
    ----------
    clusters : int
        K.
    rows : int
        Of the sample.
    candidates : list of dict
        ``clusters``, ``silhouette``, its ``standard_error`` and ``calinski_harabasz`` of each.
    blob_silhouette : float or None
        Of the blob, at the K of the best silhouette.
    """

    clusters: int
    rows: int
    candidates: list[dict[str, Any]]
    blob_silhouette: float | None = None


def choose(backend: Backend, points: kmeans.Clusterable, seed: int) -> Choice:
    """Choose K for some points, by the rule above.

    Parameters
    ----------
    backend : Backend
    points : Clusterable
        n rows.
    seed : int
        Of the sample, the blob and K-means.

    Returns
    -------
    Choice
        K is 1 where there are not two distinct rows; candidates of n or more clusters are left out.
    """
    xp = backend.xp
    rng = np.random.default_rng(seed)
    size = min(len(points), SAMPLE_ROWS)
    with backend.deterministic():
        rows = points.rows(kmeans.drawn(backend, rng, len(points), size)).astype(xp.float64)
        rows = rows - rows.mean(axis=0)
        total_variance = float((rows * rows).sum())
        candidates = [k for k in CANDIDATES if k < size]
        if not candidates or total_variance <= 1e-20 * float((points.offset * points.offset).sum()):
            return Choice(1, size, [])
        scored = _scored(backend, rows, candidates, seed)
        best = max(scored, key=lambda one: one["silhouette"])
        blob = (
            backend.asarray(rng.standard_normal((size, size))) @ rows / np.sqrt(size)
        )  # It has the covariance of the rows.
        [of_blob] = _scored(backend, blob, [int(best["clusters"])], seed)
    chosen = scored[0]
    if best["silhouette"] >= of_blob["silhouette"] + GAIN:
        near = (one for one in scored if one["silhouette"] >= best["silhouette"] - best["standard_error"])
        chosen = max(near, key=lambda one: one["calinski_harabasz"])
    return Choice(int(chosen["clusters"]), size, scored, of_blob["silhouette"])


def _scored(backend: Backend, rows: Any, candidates: list[int], seed: int) -> list[dict[str, Any]]:
    """Scores of each K on rows (n, D) about 0; seeds of a smaller K are the first of a larger one's."""
    distances = _distances(backend, rows)
    points = method_points.Sample(backend, rows.astype(backend.xp.float32))
    rng = np.random.default_rng(seed)
    starts = [kmeans.seeds(backend, points, candidates[-1], rng) for _ in range(_RESTARTS)]
    scored = []
    for k in candidates:
        found = (kmeans.lloyd(backend, points, start[:k]) for start in starts)
        _, labels, *_ = min(found, key=lambda one: one[2][-1])
        scored.append({"clusters": k, **_scores(backend, rows, distances, labels, k)})
    return scored


def _distances(backend: Backend, rows: Any) -> Any:
    """Euclidean distances between all rows, (n, n) float32."""
    xp = backend.xp
    lengths = (rows * rows).sum(axis=1)
    out = xp.empty((len(rows), len(rows)), xp.float32)
    for part in ranges(len(rows), _BLOCK_ROWS):
        squares = lengths[part][:, None] + lengths - 2.0 * (rows[part] @ rows.T)
        out[part] = xp.sqrt(xp.maximum(squares, 0.0))
    return out


def _scores(backend: Backend, rows: Any, distances: Any, labels: Any, clusters: int) -> dict[str, float]:
    """Scores of labels (n,) of rows (n, D) about 0, from the distances (n, n) between them.

    Silhouette: Rousseeuw, 1987; a row that is alone in its cluster counts 0. Calinski and Harabasz, 1974: variance
    between over variance within, each by its degrees of freedom.
    """
    xp = backend.xp
    one_hot = (labels[:, None] == xp.arange(clusters)).astype(xp.float32)
    counts = one_hot.sum(axis=0, dtype=xp.float64)
    sums = xp.concatenate([distances[part] @ one_hot for part in ranges(len(rows), _BLOCK_ROWS)]).astype(xp.float64)
    everyone = xp.arange(len(rows))
    own = counts[labels]
    inside = sums[everyone, labels] / xp.maximum(own - 1, 1)
    means = xp.where(counts > 0, sums / xp.maximum(counts, 1), xp.inf)
    means[everyone, labels] = xp.inf
    outside = means.min(axis=1)
    larger = xp.maximum(inside, outside)
    usable = (own > 1) & (larger > 0) & xp.isfinite(outside)
    values = xp.where(usable, (outside - inside) / xp.where(usable, larger, 1.0), 0.0)
    totals = one_hot.T.astype(xp.float64) @ rows
    between = float(((totals * totals).sum(axis=1) / xp.maximum(counts, 1)).sum())
    within = max(float((rows * rows).sum()) - between, 1e-12 * between)
    return {
        "silhouette": float(values.mean()),
        "standard_error": float(values.std() / np.sqrt(len(rows))),
        "calinski_harabasz": between * (len(rows) - clusters) / (within * (clusters - 1)),
    }
