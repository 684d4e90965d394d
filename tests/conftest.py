"""What several tests share."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest

from gpu_init.kernels import Csr, threads


def random_csr(rng, users, items, mean_degree=4.0, weighted=False):
    """Canonical rows with empty users, and one user who has every item."""
    degrees = np.minimum(rng.poisson(mean_degree, users), items)
    degrees[rng.random(users) < 0.1] = 0
    if users > 2:
        degrees[1] = items
    rows = [np.sort(rng.choice(items, degree, replace=False)) for degree in degrees]
    indptr = np.concatenate([[0], np.cumsum(degrees)]).astype(np.int64)
    indices = np.concatenate(rows).astype(np.int32) if rows else np.empty(0, np.int32)
    weights = rng.uniform(0.1, 5, len(indices)).astype(np.float32) if weighted else None
    return Csr(indptr, indices, weights)


@contextmanager
def with_threads(count):
    """Inside, ranges of rows are taken by so many threads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threads, "cores", lambda: count)
        threads._pool.cache_clear()
        yield
    threads._pool.cache_clear()


@pytest.fixture
def rng():
    return np.random.default_rng(7)
