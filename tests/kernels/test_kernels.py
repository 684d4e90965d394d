"""Every implementation of a kernel against its definition, and numba's against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_init.kernels import BlendTerms, Csr
from tests.conftest import random_csr
from tests.support import oracle
from tests.support.kernel_problems import (
    IMPLEMENTATIONS,
    aggregate_with,
    blend_with,
    by_loops,
    dense_operator,
    dense_rows,
    every_one,
    many_ranges,
    problem,
    some_users,
)

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
