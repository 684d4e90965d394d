"""Random problems for kernels, and their plain solutions."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import scipy.sparse

from gpu_init.kernels import BlendTerms, cpu
from gpu_init.kernels.cpu import NumbaKernels
from gpu_init.kernels.reference import ReferenceKernels
from tests.conftest import random_csr


def in_blocks():
    """The reference, which makes its rows a few at a time."""
    kernels = ReferenceKernels(np, scipy.sparse)
    kernels.block_values, kernels.block_entries = 60, 40
    return kernels


IMPLEMENTATIONS = {
    "numba": NumbaKernels(),
    "reference": ReferenceKernels(np, scipy.sparse),
    "reference in blocks": in_blocks(),
}
every_one = pytest.mark.parametrize("kernels", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)


@contextmanager
def many_ranges():
    """Inside, numba's kernels split even a few users over their threads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_RANGE_VALUES", 50)
        patch.setattr(cpu, "_TILE_VALUES", 70)
        patch.setattr(NumbaKernels, "block_values", 70)
        yield


def problem(seed, users, items, width, clusters, weighted, missing=0.2, mean=False):
    """Arguments of aggregate_blend; a share of the items is missing, their rows NaN.

    ``mean``: rows of A sum to 1, and items have no scale; else scales are any.
    """
    rng = np.random.default_rng(seed)
    csr = random_csr(rng, users, items, weighted=weighted)
    features = rng.standard_normal((items, width)).astype(np.float32) + 1
    absent = rng.random(items) < missing
    features[absent] = np.nan
    item_scale = np.where(absent, 0.0, 1.0 if mean else rng.uniform(0.2, 1, items))
    weights = np.ones(len(csr.indices)) if csr.weights is None else csr.weights
    rows = np.repeat(np.arange(users), np.diff(csr.indptr))
    degrees = np.bincount(rows, weights=weights * ~absent[csr.indices], minlength=users)
    inverse = np.divide(1, degrees, out=np.zeros(users), where=degrees > 0)
    usable = degrees > 0
    row_scale = inverse if mean else np.where(usable, rng.uniform(0.2, 1, users), 0.0)
    mean_scale = inverse if mean else np.where(usable, rng.uniform(0.2, 1, users), 0.0)
    return {
        "csr": csr,
        "features": features,
        "row_scale": row_scale,
        "item_scale": item_scale,
        "lam": rng.random(users),
        "centroids": rng.standard_normal((clusters, width)).astype(np.float32),
        "user_labels": np.where(usable, rng.integers(0, clusters, users), -1).astype(np.int32),
        "item_labels": np.where(absent, -1, rng.integers(0, clusters, items)).astype(np.int32),
        "mean_scale": mean_scale,
        "cold": rng.standard_normal(width),
        "scale": 2.5,
    }


def some_users(p, start, stop):
    """The same for a range of users."""
    return {
        **p,
        "csr": p["csr"].rows(start, stop),
        **{name: p[name][start:stop] for name in ("row_scale", "lam", "user_labels", "mean_scale")},
    }


def by_loops(p, by_item):
    """The definition, one interaction after another."""
    csr, users, width = p["csr"], len(p["row_scale"]), p["features"].shape[1]
    out = np.zeros((users, width))
    for u in range(users):
        if p["row_scale"][u] == 0:
            out[u] = p["scale"] * p["cold"]
            continue
        local, mean = np.zeros(width), np.zeros(width)
        for e in range(csr.indptr[u], csr.indptr[u + 1]):
            i, w = csr.indices[e], 1.0 if csr.weights is None else float(csr.weights[e])
            if p["item_scale"][i] != 0:
                local += p["row_scale"][u] * w * p["item_scale"][i] * p["features"][i].astype(np.float64)
            if p["item_labels"][i] >= 0:
                mean += p["mean_scale"][u] * w * p["centroids"][p["item_labels"][i]].astype(np.float64)
        cluster_level = mean if by_item else p["centroids"][p["user_labels"][u]].astype(np.float64)
        out[u] = p["scale"] * (p["lam"][u] * local + (1 - p["lam"][u]) * cluster_level)
    return out


def blend_with(kernels, p, by_item):
    one_form = {"user_labels": None} if by_item else {"item_labels": None, "mean_scale": None}
    out = np.full((len(p["csr"].indptr) - 1, p["features"].shape[1]), np.nan, np.float32)
    given = {**p, **one_form}
    terms = BlendTerms(**{name: given[name] for name in BlendTerms._fields})
    kernels.aggregate_blend(p["csr"], p["features"], p["row_scale"], p["item_scale"], terms, out)
    return out


def aggregate_with(kernels, p, offset=0.0):
    offset = np.broadcast_to(np.asarray(offset, np.float64), p["features"].shape[1]).copy()
    return kernels.aggregate(p["csr"], p["features"], p["row_scale"], p["item_scale"], offset)


def dense_rows(p):
    """A F in float64, the operator's rows written out."""
    features = np.where(np.isnan(p["features"]), 0, p["features"]).astype(np.float64)
    return dense_operator(p) @ features


def dense_operator(p):
    csr = p["csr"]
    data = np.ones(len(csr.indices)) if csr.weights is None else csr.weights.astype(np.float64)
    R = scipy.sparse.csr_array((data, csr.indices, csr.indptr), shape=(len(p["row_scale"]), len(p["item_scale"])))
    return p["row_scale"][:, None] * R.toarray() * p["item_scale"]
