"""Every implementation of the kernels against plain loops in float64, and against each other."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import tracemalloc
from contextlib import contextmanager

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import types

from gpu_init.errors import InputError
from gpu_init.kernels import NUMPY_SECONDS, BlendTerms, Csr, compiled, costs, cpu, cpu_kernels, kernels_for, threads
from gpu_init.kernels.cpu import NumbaKernels
from gpu_init.kernels.reference import ReferenceKernels
from tests.conftest import random_csr, with_threads
from tests.support import oracle


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


# Each against its definition.


@every_one
@given(
    seed=st.integers(0, 2**32),
    users=st.integers(1, 60),
    items=st.integers(1, 30),
    width=st.sampled_from([1, 3, 8, 64, 100]),
    clusters=st.integers(1, 9),
    weighted=st.booleans(),
    by_item=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_blend_is_the_definition(kernels, seed, users, items, width, clusters, weighted, by_item):
    p = problem(seed, users, items, width, clusters, weighted)
    expected = by_loops(p, by_item)
    # sums run in float32: what is lost is a share of what was added, which may have cancelled
    np.testing.assert_allclose(
        blend_with(kernels, p, by_item), expected, rtol=1e-6, atol=1e-6 * max(1, np.ptp(expected))
    )


@every_one
@pytest.mark.parametrize("weighted", [False, True])
def test_aggregate(kernels, weighted):
    p = problem(3, 200, 50, 33, 4, weighted)
    offset = np.linspace(-1, 1, 33)
    found = aggregate_with(kernels, p, offset)
    assert found.dtype == np.float64
    assert found.flags.c_contiguous
    np.testing.assert_allclose(found, dense_rows(p) - offset, rtol=1e-12, atol=1e-12)
    assert not aggregate_with(kernels, p)[p["row_scale"] == 0].any()


@every_one
@pytest.mark.parametrize("weighted", [False, True])
def test_row_sums(kernels, rng, weighted):
    csr = random_csr(rng, 300, 40, weighted=weighted)
    values = rng.random(40)
    data = np.ones(len(csr.indices)) if csr.weights is None else csr.weights.astype(np.float64)
    expected = scipy.sparse.csr_matrix((data, csr.indices, csr.indptr), shape=(300, 40)) @ values
    np.testing.assert_allclose(kernels.row_sums(csr, values), expected, rtol=1e-12)


@every_one
@pytest.mark.parametrize("by_item", [False, True])
def test_a_range_of_users_gives_the_same_bytes_as_all(kernels, by_item):
    p = problem(5, 500, 60, 20, 5, weighted=True)
    part = some_users(p, 123, 387)
    np.testing.assert_array_equal(blend_with(kernels, part, by_item), blend_with(kernels, p, by_item)[123:387])
    np.testing.assert_array_equal(aggregate_with(kernels, part), aggregate_with(kernels, p)[123:387])


@every_one
def test_no_users_is_no_rows(kernels):
    csr = Csr(np.zeros(1, np.int64), np.empty(0, np.int32), None)
    given = (csr, np.ones((3, 2), np.float32), np.empty(0), np.ones(3))
    assert kernels.aggregate(*given, np.zeros(2)).shape == (0, 2)
    assert kernels.squared_norms(*given, np.zeros(2)).shape == (0,)
    assert [len(one) for one in kernels.assign(csr, np.ones((3, 2)), *given[2:], np.zeros(2))] == [0, 0]
    assert kernels.row_sums(csr, np.ones(3)).shape == (0,)
    sums = np.ones((3, 2))
    kernels.label_sums(csr, np.empty(0, np.int32), np.empty(0), np.ones(3), sums)
    kernels.gram(csr, np.ones((3, 2)), np.empty(0), sums)
    np.testing.assert_array_equal(sums, 1)


@every_one
def test_a_very_busy_user_loses_no_digits(kernels):
    count = 600_000
    csr = Csr(np.array([0, count], np.int64), np.arange(count, dtype=np.int32) % 1000, None)
    features = np.random.default_rng(0).standard_normal((1000, 4)).astype(np.float32) + 100
    given = (csr, features, np.array([1 / count]), np.ones(1000))
    expected = features.mean(axis=0, dtype=np.float64)
    np.testing.assert_allclose(kernels.aggregate(*given, np.zeros(4))[0], expected, rtol=1e-12)
    out, labels = np.empty((1, 4), np.float32), np.zeros(1, np.int32)
    terms = BlendTerms(np.ones(1), np.zeros((1, 4), np.float32), labels, None, None, np.zeros(4), 1.0)
    kernels.aggregate_blend(*given, terms, out)
    np.testing.assert_allclose(out[0], expected, rtol=1e-7)


@every_one
@pytest.mark.parametrize("weighted", [False, True])
def test_squared_norms(kernels, weighted):
    p = problem(11, 150, 40, 21, 3, weighted)
    offset = np.linspace(-1, 1, 21)
    found = kernels.squared_norms(p["csr"], p["features"], p["row_scale"], p["item_scale"], offset)
    assert found.dtype == np.float64
    expected = ((dense_rows(p) - offset) ** 2).sum(axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-5 if kernels.name == "numba" else 1e-12)


@every_one
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_lengths(kernels, rng, dtype):
    rows = rng.standard_normal((50, 21)).astype(dtype)
    found = kernels.lengths(rows)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, (rows.astype(np.float64) ** 2).sum(axis=1), rtol=1e-12)


@every_one
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("clusters", [1, 2, 7])
def test_assign(kernels, rng, weighted, clusters):
    p = problem(12, 150, 40, 5, 3, weighted)
    table, lengths = rng.standard_normal((40, clusters)), rng.random(clusters)
    table[p["item_scale"] == 0] = np.nan
    labels, least = kernels.assign(p["csr"], table, p["row_scale"], p["item_scale"], lengths)
    scores = lengths - 2 * dense_operator(p) @ np.nan_to_num(table)
    cold = p["row_scale"] == 0
    assert cold.any()
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels, np.where(cold, -1, scores.argmin(axis=1)))
    np.testing.assert_allclose(least, np.where(cold, 0, scores.min(axis=1)), rtol=1e-12, atol=1e-12)


@every_one
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("clusters", [3, 8, 64, 75])
def test_assign_of_busy_users(kernels, rng, weighted, clusters):
    count, items = 700, 90
    csr = Csr(
        np.array([0, 1, 1 + count, 4 + count], np.int64),
        rng.integers(0, items, 4 + count).astype(np.int32),
        rng.uniform(0.5, 2, 4 + count).astype(np.float32) if weighted else None,
    )
    p = {"csr": csr, "row_scale": np.array([1.0, 1 / count, 0.5]), "item_scale": np.ones(items)}
    table, lengths = rng.standard_normal((items, clusters)), rng.random(clusters)
    labels, least = kernels.assign(csr, table, p["row_scale"], p["item_scale"], lengths)
    scores = lengths - 2 * dense_operator(p) @ table
    np.testing.assert_array_equal(labels, scores.argmin(axis=1))
    np.testing.assert_allclose(least, scores.min(axis=1), rtol=1e-10)


@every_one
def test_the_first_of_equals_is_nearest(kernels, rng):
    products, lengths = rng.integers(0, 4, (500, 6)).astype(np.float64), np.zeros(6)
    labels, least = kernels.nearest(products, lengths)
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels, (-products).argmin(axis=1))
    np.testing.assert_array_equal(least, -2.0 * products.max(axis=1))
    csr = Csr(np.arange(501), np.arange(500, dtype=np.int32), None)
    found = kernels.assign(csr, products, np.ones(500), np.ones(500), lengths)
    np.testing.assert_array_equal(found, (labels, least))


@every_one
@pytest.mark.parametrize("items", [1, 2, 63, 129])
@pytest.mark.parametrize("clusters", [1, 4, 7])
def test_products(kernels, rng, items, clusters):
    features = rng.standard_normal((items, 37)).astype(np.float32) + 5
    features[items // 2] = np.nan
    points, offset = rng.standard_normal((clusters, 37)), np.full(37, 5.0)
    found = kernels.products(features, offset, points)
    assert found.dtype == np.float64
    expected = (features.astype(np.float64) - offset) @ points.T
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@every_one
def test_label_sums(kernels, rng):
    p = problem(13, 2000, 30, 2, 3, weighted=True)
    labels = rng.integers(-1, 4, 2000).astype(np.int32)
    sums = np.ones((30, 4))
    kernels.label_sums(p["csr"], labels, p["row_scale"], p["item_scale"], sums)
    expected = dense_operator(p)[labels >= 0].T @ np.eye(4)[labels[labels >= 0]]
    np.testing.assert_allclose(sums - 1, expected, rtol=1e-9, atol=1e-12)


@every_one
def test_table_sums(kernels, rng):
    table, features = rng.standard_normal((50, 4)), rng.standard_normal((50, 9)).astype(np.float32)
    table[7], features[7] = 0, np.nan  # a missing item
    table[8], features[8, 3] = 0, np.inf
    expected = np.delete(table, [7, 8], axis=0).T @ np.delete(features, [7, 8], axis=0).astype(np.float64)
    found = kernels.table_sums(table, features)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@every_one
@pytest.mark.parametrize("weighted", [False, True])
def test_gram(kernels, rng, weighted):
    p = problem(13, 2000, 30, 2, 70, weighted)
    table = rng.standard_normal((30, 5))
    sums = np.ones((30, 5))
    kernels.gram(p["csr"], table, p["row_scale"], sums)
    matrix = dense_operator({**p, "row_scale": np.ones(2000), "item_scale": np.ones(30)})
    expected = matrix.T @ (p["row_scale"][:, None] * (matrix @ table))
    np.testing.assert_allclose(sums - 1, expected, rtol=1e-9, atol=1e-12)


# Numba's against the reference.


def magnitudes(p):
    """The same with all values as large, and none of them negative: no sum of its is smaller than its terms."""
    return {**p, **{name: np.abs(p[name]) for name in ("features", "centroids", "cold")}}


def twin_blend(kernels, p, _, by_item=False):
    return blend_with(kernels, p, by_item), 5e-7 * blend_with(IMPLEMENTATIONS["reference"], magnitudes(p), by_item)


def twin_squared_norms(kernels, p, rng):
    offset = rng.standard_normal(p["features"].shape[1])
    lengths = (aggregate_with(IMPLEMENTATIONS["reference"], magnitudes(p), -np.abs(offset)) ** 2).sum(axis=1)
    given = (p["csr"], p["features"], p["row_scale"], p["item_scale"], offset)
    return kernels.squared_norms(*given), 1e-6 * lengths


def twin_assign(kernels, p, rng):
    table = rng.standard_normal((len(p["item_scale"]), len(p["centroids"])))
    table[p["item_scale"] == 0] = np.nan
    given = (p["csr"], table, p["row_scale"], p["item_scale"], rng.random(len(p["centroids"])))
    return np.stack(kernels.assign(*given)), 1e-11


def twin_label_sums(kernels, p, rng):
    sums = rng.random((len(p["item_scale"]), len(p["centroids"])))
    kernels.label_sums(p["csr"], p["user_labels"], p["row_scale"], p["item_scale"], sums)
    return sums, 1e-11


def twin_table_sums(kernels, p, rng):
    table = rng.standard_normal((len(p["item_scale"]), 4)) * (p["item_scale"] > 0)[:, None]
    return kernels.table_sums(table, p["features"]), 1e-11


def twin_gram(kernels, p, rng):
    sums, table = rng.random((len(p["item_scale"]), 6)), rng.standard_normal((len(p["item_scale"]), 6))
    kernels.gram(p["csr"], table, p["row_scale"], sums)
    return sums, 1e-10 * max(1, np.abs(sums).max())


TWINS = {
    "lengths": lambda kernels, p, _: (kernels.lengths(p["features"]), 1e-11),
    "row_sums": lambda kernels, p, rng: (kernels.row_sums(p["csr"], rng.random(len(p["item_scale"]))), 1e-11),
    "aggregate": lambda kernels, p, rng: (aggregate_with(kernels, p, rng.standard_normal()), 1e-11),
    "aggregate_blend by user": twin_blend,
    "aggregate_blend by item": lambda kernels, p, rng: twin_blend(kernels, p, rng, by_item=True),
    "squared_norms": twin_squared_norms,
    "products": lambda kernels, p, rng: (
        kernels.products(p["features"], p["cold"], rng.standard_normal((5, p["features"].shape[1]))),
        1e-11,
    ),
    "assign": twin_assign,
    "label_sums": twin_label_sums,
    "table_sums": twin_table_sums,
    "gram": twin_gram,
}


@pytest.mark.parametrize("name", TWINS)
@given(
    seed=st.integers(0, 2**32),
    users=st.integers(0, 40),
    items=st.sampled_from([1, 2, 30, 300]),  # somebody has all of them
    width=st.sampled_from([1, 7, 8, 33]),
    clusters=st.integers(1, 9),
    weighted=st.booleans(),
    missing=st.sampled_from([0.0, 0.2, 1.0]),
    mean=st.booleans(),
    cuts=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
@settings(max_examples=60, deadline=None)
def test_numba_agrees_with_the_reference(name, seed, users, items, width, clusters, weighted, missing, mean, cuts):
    p = problem(seed, users, items, width, clusters, weighted, missing, mean)
    p = some_users(p, *sorted(round(cut * users) for cut in cuts))
    expected, tolerance = TWINS[name](IMPLEMENTATIONS["reference"], p, np.random.default_rng(seed))
    blocked, _ = TWINS[name](IMPLEMENTATIONS["reference in blocks"], p, np.random.default_rng(seed))
    with many_ranges():
        found, _ = TWINS[name](IMPLEMENTATIONS["numba"], p, np.random.default_rng(seed))
    assert found.dtype == blocked.dtype == expected.dtype
    for one in (found, blocked):
        np.testing.assert_array_equal(np.isnan(one), np.isnan(expected))
        assert (np.nan_to_num(np.abs(one - expected)) <= tolerance + 1e-11 * np.nan_to_num(np.abs(expected))).all()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("by_item", [False, True])
@pytest.mark.parametrize("shift", [0.0, 30.0])
def test_vectors_from_the_same_centroids_agree(weighted, by_item, shift):
    p = problem(21, 3000, 400, 64, 9, weighted, mean=True)
    p["features"] += np.float32(shift)
    p["centroids"] += np.float32(shift)
    plain = blend_with(IMPLEMENTATIONS["reference"], p, by_item)
    oracle.assert_close(blend_with(IMPLEMENTATIONS["numba"], p, by_item), plain, 1e-6)


# Threads, and memory.


def test_the_number_of_threads_does_not_change_a_byte():
    p, kernels, found = problem(22, 4000, 300, 33, 7, weighted=True), IMPLEMENTATIONS["numba"], []
    for count in (1, 3):
        with with_threads(count), many_ranges():
            found.append([call(kernels, p, np.random.default_rng(0))[0] for call in TWINS.values()])
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_core_is_left_to_another_thread():
    def threads_that_run():
        seen = set()
        threads.run(lambda _: (seen.add(threading.get_ident()), time.sleep(0.002)), [slice(0, 1)] * 60)
        return len(seen)

    for count in (1, 3):
        with with_threads(count):
            assert 1 <= threads_that_run() <= count
            with threads.leaving_a_core():
                assert 1 <= threads_that_run() <= max(1, count - 1)


@pytest.mark.parametrize(("given", "count"), [("1", "1"), ("3", "3"), ("no", None), ("0", None)])
def test_the_environment_says_how_many_threads(monkeypatch, given, count):
    monkeypatch.setenv("NUMBA_NUM_THREADS", given)
    assert threads.cores() == int(count or len(os.sched_getaffinity(0)))


def peak_beside_the_result(call):
    """Most bytes that a call takes at a time, beside what it gives."""
    tracemalloc.start()
    kept = call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak - sum(one.nbytes for one in (kept if isinstance(kept, tuple) else [kept]) if one is not None)


def test_the_reference_keeps_to_its_blocks():
    """Rows (U, D) in float64 would be 61 MB, where the values of a block are 0.5 MB."""
    users, items, width, clusters = 120_000, 500, 64, 60
    rng = np.random.default_rng(0)
    indices = rng.integers(0, items, 2 * users).astype(np.int32)
    csr = Csr(np.arange(0, 2 * users + 1, 2), indices, rng.random(2 * users, "f4"))
    kernels = ReferenceKernels(np, scipy.sparse)
    kernels.block_values, kernels.block_entries = 1 << 16, 1 << 14
    features, ones, of_items = rng.random((items, width), "f4"), np.ones(users), np.ones(items)
    labels, table, sums = np.zeros(users, np.int32), rng.random((items, clusters)), np.zeros((items, clusters))
    out, rows = np.empty((users, width), "f4"), np.ones((users, width), "f4")
    centroids, item_labels = rng.random((clusters, width), "f4"), np.zeros(items, np.int32)
    local, nowhere = (csr, features, ones, of_items), np.zeros(width)
    by_user = BlendTerms(ones, centroids, labels, None, None, nowhere, 1.0)
    by_item = BlendTerms(ones, centroids, None, item_labels, ones, nowhere, 1.0)
    calls = {
        "lengths": lambda: kernels.lengths(rows),
        "row_sums": lambda: kernels.row_sums(csr, of_items),
        "squared_norms": lambda: kernels.squared_norms(csr, features, ones, of_items, np.zeros(width)),
        "products": lambda: kernels.products(rows, np.zeros(width), np.ones((2, width))),
        "assign": lambda: kernels.assign(csr, table, ones, of_items, np.zeros(clusters)),
        "label_sums": lambda: kernels.label_sums(csr, labels, ones, of_items, sums),
        "gram": lambda: kernels.gram(csr, table, ones, sums),
        "table_sums": lambda: kernels.table_sums(np.ones((users, 2)), rows),
        "by user": lambda: kernels.aggregate_blend(*local, by_user, out),
        "by item": lambda: kernels.aggregate_blend(*local, by_item, out),
    }
    for name, call in calls.items():
        peak = peak_beside_the_result(call)
        assert peak < 6 << 20, f"{name}: {peak} bytes"


@pytest.mark.parametrize(
    "name",
    [
        "squared_norms",
        "assign",
        "by user",
        "by item",
        "gram",
    ],
)
def test_blocks_of_the_reference_take_no_table_of_all_items(name):
    """That would be 20 MB in float64, and as many values to go through for each of a hundred blocks."""
    users, items, width, degree = 2000, 40_000, 64, 100
    rng = np.random.default_rng(0)
    indices = rng.integers(0, items, degree * users).astype(np.int32)
    csr = Csr(np.arange(0, degree * users + 1, degree), indices, None)
    kernels = ReferenceKernels(np, scipy.sparse)
    kernels.block_values, kernels.block_entries = 1 << 16, 1 << 15
    features, table, sums = rng.random((items, width), "f4"), rng.random((items, width)), np.zeros((items, width))
    ones, of_items, nowhere, out = np.ones(users), np.ones(items), np.zeros(width), np.empty((users, width), "f4")
    labels, item_labels = np.zeros(users, np.int32), np.zeros(items, np.int32)
    local = (csr, features, ones, of_items)
    by_user = BlendTerms(ones, features[:3], labels, None, None, nowhere, 1.0)
    by_item = BlendTerms(ones, features[:3], None, item_labels, ones, nowhere, 1.0)
    calls = {
        "squared_norms": lambda: kernels.squared_norms(csr, features, ones, of_items, nowhere),
        "assign": lambda: kernels.assign(csr, table, ones, of_items, nowhere),
        "gram": lambda: kernels.gram(csr, table, ones, sums),
        "by user": lambda: kernels.aggregate_blend(*local, by_user, out),
        "by item": lambda: kernels.aggregate_blend(*local, by_item, out),
    }
    assert peak_beside_the_result(calls[name]) < 6 << 20


@pytest.mark.parametrize("kind", [NumbaKernels, lambda: ReferenceKernels(np, scipy.sparse)])
def test_table_sums_are_added_up_as_they_come(kind):
    """A block's is 30 kB, and there are 1,250."""
    kernels = kind()
    kernels.block_values = 1 << 10
    table, features = np.ones((20_000, 60)), np.ones((20_000, 64), np.float32)
    assert peak_beside_the_result(lambda: kernels.table_sums(table, features)) < 6 << 20


# Which of them run.


def test_work_of_seconds_goes_to_numba(monkeypatch):
    monkeypatch.delenv("GPU_INIT_KERNELS", raising=False)
    assert kernels_for(0) == kernels_for(NUMPY_SECONDS) == "numpy"
    assert kernels_for(NUMPY_SECONDS + 1e-6) == "numba"
    for name in ("numpy", "numba"):
        monkeypatch.setenv("GPU_INIT_KERNELS", name)
        assert kernels_for(0) == kernels_for(1e9) == name
        assert cpu_kernels(kernels_for(0)).name == name
    monkeypatch.setenv("GPU_INIT_KERNELS", "cobol")
    with pytest.raises(InputError, match="cobol"):
        kernels_for(0)


def test_seconds_grow_with_every_size():
    sizes = {"users": 10**6, "items": 10**5, "pairs": 10**7, "widths": [64, 128], "clusters": 8}
    seconds = costs.fitting_seconds(**sizes)
    for name, more in {"users": 2 * 10**6, "items": 2 * 10**5, "pairs": 2 * 10**7, "clusters": 9}.items():
        assert costs.fitting_seconds(**{**sizes, name: more}) > seconds
    assert costs.fitting_seconds(**{**sizes, "widths": [64, 129]}) > seconds
    assert costs.fitting_seconds(**{**sizes, "widths": [64, 128, 1]}) > seconds
    assert costs.fitting_seconds(**sizes, on_interactions=True) > seconds
    assert costs.fitting_seconds(**sizes, candidates=3) == 3 * seconds
    sizes["clusters"] = "auto"
    assert costs.fitting_seconds(**sizes) == costs.fitting_seconds(**{**sizes, "clusters": 64})
    assert costs.reading_seconds(0, 10**8) > costs.reading_seconds(0, 10**7) > costs.reading_seconds(0, 0) == 0
    assert costs.reading_seconds(10**7, 0) > costs.reading_seconds(10**6, 0)


# How numba's are compiled.


def test_arrays_are_copied_only_where_they_must_be(tmp_path):
    whole = np.arange(6.0).reshape(2, 3)
    view = compiled.read_only(whole, np.float64)
    assert np.shares_memory(view, whole)
    assert not view.flags.writeable
    assert whole.flags.writeable
    np.save(tmp_path / "mapped.npy", whole)
    mapped = np.load(tmp_path / "mapped.npy", mmap_mode="r")
    assert np.shares_memory(compiled.read_only(mapped, np.float64), mapped)
    assert type(compiled.read_only(mapped, np.float64)) is np.ndarray
    for other in (compiled.read_only(whole, np.float32), compiled.read_only(whole.T, np.float64)):
        assert not np.shares_memory(other, whole)
        assert other.flags.c_contiguous


ALONE = """
import numpy as np
from gpu_init.kernels import Csr
from gpu_init.kernels.cpu import NumbaKernels
csr = Csr(np.array([0, 2]), np.array([0, 1], np.int32), None)
print(NumbaKernels().row_sums(csr, np.array([1.0, 2.0]))[0])
"""


def alone(**environment):
    """What one kernel says in a process of its own."""
    given = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"} | environment
    done = subprocess.run([sys.executable, "-c", ALONE], env=given, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_kernels_run_where_no_cache_can_be_kept(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    assert alone(XDG_CACHE_HOME=str(blocked)) == "3.0"
    assert not list(tmp_path.glob("*/"))


def _twice(number):
    return 2 * number


def test_threads_that_need_the_same_kernel_compile_it_once():
    from concurrent.futures import ThreadPoolExecutor

    one = compiled.kernel(types.int64)(_twice)
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: one.prepare(), range(4)))
    assert len({id(function) for function in made}) == 1
    assert one(4) == 8
