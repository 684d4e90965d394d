"""The baselines of the benchmarks: the method as people write it with scipy, scikit-learn, numpy and torch.

As a script, it runs one of two whole jobs: ``baselines.py job|floor INTERACTIONS FEATURES USERS OUT``.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

LAMBDA = 0.9
CLUSTERS = 8
COLUMNS = ["user_id", "item_id"]

_WRITE_ROWS = 1 << 14
_INERTIA_ROWS = 1 << 13


def operator(interactions: Any) -> Any:
    """Give ``A = D_U^-1 R``, (U, I) float32; every user must have an interaction."""
    import scipy.sparse

    degrees = np.asarray(interactions.sum(axis=1), np.float32).ravel()
    return (scipy.sparse.diags(1 / degrees) @ interactions).tocsr()


def blend(local: Any, centroids: Any, labels: Any) -> Any:
    """Give ``lambda L + (1 - lambda) C[label]``, (U, D) float32, which overwrites ``local``."""
    local *= np.float32(LAMBDA)
    local += (np.float32(1 - LAMBDA) * centroids)[labels]
    return local


def cluster(means: Any, clusters: int, seed: int) -> Any:
    """Fit scikit-learn's K-means with k-means++, one start and its other settings as they are by default."""
    from sklearn.cluster import KMeans

    return KMeans(clusters, n_init=1, random_state=seed).fit(means)


def initialize(interactions: Any, features: Any, clusters: int, seed: int) -> tuple[Any, Any]:
    """Run the method on arrays (sparse product, K-means, blend); give vectors (U, D) and the fitted K-means."""
    local = operator(interactions) @ features
    fitted = cluster(local, clusters, seed)
    return blend(local, fitted.cluster_centers_, fitted.labels_), fitted


def inertia(rows: Any, centroids: Any) -> float:
    """Sum the squared distances of the rows to their nearest centroids, in float64."""
    offset = rows.mean(axis=0, dtype=np.float64)
    table = centroids.astype(np.float64) - offset
    lengths = (table * table).sum(axis=1)
    total = 0.0
    for first in range(0, len(rows), _INERTIA_ROWS):
        block = rows[first : first + _INERTIA_ROWS].astype(np.float64) - offset
        total += float((block * block).sum() + (lengths - 2.0 * (block @ table.T)).min(axis=1).sum())
    return total


def torch_passes(means: Any, features: Any, centroids: Any, labels: Any) -> dict[str, Callable[[], Any]]:
    """Give two functions that do the fused pass in torch: with MKL's sparse product, and with a scatter-add.

    The scatter-add makes the E x D gathered rows first. ``means`` is A, a scipy matrix (U, I); the functions return
    tensors (U, D) float32.
    """
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns that sparse CSR is in beta
        starts, columns = (torch.from_numpy(index.astype(np.int32)) for index in (means.indptr, means.indices))
        csr = torch.sparse_csr_tensor(starts, columns, torch.from_numpy(means.data), size=means.shape)
    values, centres, groups = map(torch.from_numpy, (features, centroids, labels.astype(np.int64)))
    users = torch.from_numpy(np.repeat(np.arange(means.shape[0]), np.diff(means.indptr)))
    items, weights = torch.from_numpy(means.indices.astype(np.int64)), torch.from_numpy(means.data)

    def blended(local: Any) -> Any:
        return local.mul_(LAMBDA).add_(((1 - LAMBDA) * centres)[groups])

    def scattered() -> Any:
        rows = values[items].mul_(weights[:, None])
        return blended(torch.zeros(means.shape[0], features.shape[1]).index_add_(0, users, rows))

    return {"torch MKL + blend": lambda: blended(csr @ values), "torch scatter-add + blend": scattered}


def job(interactions: Path, features: Path, users: int, out: Path) -> None:
    """Run the whole job with pandas, scipy, scikit-learn and numpy; nothing is synced or hashed."""
    import pandas as pd
    import scipy.sparse

    table = pd.read_parquet(interactions, columns=COLUMNS)
    values = np.load(features)
    pairs = (table["user_id"].to_numpy(), table["item_id"].to_numpy())
    shape = (users, len(values))
    matrix = scipy.sparse.coo_matrix((np.ones(len(table), np.float32), pairs), shape=shape).tocsr()
    vectors, fitted = initialize(matrix, values, CLUSTERS, 0)
    out.mkdir()
    np.save(out / "users.npy", vectors)
    np.save(out / "centroids.npy", fitted.cluster_centers_)
    np.save(out / "labels.npy", fitted.labels_)
    (out / "facts.json").write_text(json.dumps({"inertia": float(fitted.inertia_)}))


def floor(interactions: Path, features: Path, users: int, out: Path) -> None:
    """Read the input with pyarrow, then write, hash and sync as many bytes as the vectors have, and no more."""
    import pyarrow.parquet as pq

    pq.read_table(interactions, columns=COLUMNS)
    values = np.load(features)
    block = values[np.arange(_WRITE_ROWS) % len(values)]
    digest = hashlib.sha256()
    out.mkdir()
    with (out / "users.npy").open("wb") as file:
        for first in range(0, users, _WRITE_ROWS):
            rows = block[: min(_WRITE_ROWS, users - first)]
            file.write(rows)
            digest.update(rows)
        file.flush()
        os.fsync(file.fileno())
    (out / "facts.json").write_text(json.dumps({"sha256": digest.hexdigest()}))


if __name__ == "__main__":
    what, interactions_path, features_path, rows_wanted, out_path = sys.argv[1:]
    run = {"job": job, "floor": floor}[what]
    run(Path(interactions_path), Path(features_path), int(rows_wanted), Path(out_path))
