"""K-means in each form against scikit-learn and against the definition."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.cluster import KMeans

from gpu_init import kmeans
from gpu_init.backend import CpuBackend

from . import oracle
from .conftest import random_csr

CPU = CpuBackend("test")


def users(rng, count=3000, items=200, width=10, weighted=True, shift=0.0, missing=0.2, groups=0):
    """A factored problem and its rows in float64."""
    csr = random_csr(rng, count, items, weighted=weighted)
    features = (rng.standard_normal((items, width)) + shift).astype(np.float32)
    if groups:
        features += 8 * rng.standard_normal((groups, width))[rng.integers(0, groups, items)].astype(np.float32)
    absent = rng.random(items) < missing
    item_scale = 1.0 - absent
    weights = np.ones(len(csr.indices)) if csr.weights is None else csr.weights.astype(np.float64)
    rows = np.repeat(np.arange(count), np.diff(csr.indptr))
    degrees = np.bincount(rows, weights * item_scale[csr.indices], minlength=count)
    row_scale = np.divide(1, degrees, out=np.zeros(count), where=degrees > 0)
    M = np.zeros((count, width))
    np.add.at(
        M,
        rows,
        (row_scale[rows] * weights * item_scale[csr.indices])[:, None] * features[csr.indices].astype(np.float64),
    )
    features[absent] = np.nan
    return kmeans.Factored(CPU, csr, features, row_scale, item_scale), M[degrees > 0]


def lloyd(M, centroids, steps):
    """Plain Lloyd in float64, nothing clever."""
    for _ in range(steps):
        labels = oracle.squared_distances(M, centroids).argmin(axis=1)
        centroids = np.stack(
            [M[labels == k].mean(axis=0) if (labels == k).any() else centroids[k] for k in range(len(centroids))]
        )
    return centroids


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shift", [0.0, 1000.0])
@pytest.mark.parametrize("missing", [0.0, 0.2])
def test_a_factored_step_is_a_dense_step(rng, weighted, shift, missing):
    points, M = users(rng, weighted=weighted, shift=shift, missing=missing)
    start = M[:7].astype(np.float32)
    labels, distances, sums, counts = points.step(start)
    expected = oracle.squared_distances(M, start)
    np.testing.assert_allclose(distances, expected.min(axis=1), rtol=1e-6, atol=1e-6 * expected.mean())
    oracle.assert_nearest(M, start, labels)
    for k in range(7):
        np.testing.assert_allclose(sums[k], M[labels == k].sum(axis=0), rtol=1e-6, atol=1e-6 * counts[k])
    np.testing.assert_array_equal(counts, np.bincount(labels, minlength=7))
    again = kmeans.Dense(CPU, M.astype(np.float32)).step(start)
    np.testing.assert_array_equal(again[3], counts)
    np.testing.assert_allclose(again[2], sums, rtol=1e-5, atol=1e-6 * abs(sums).max())


def test_rows_are_made_on_demand(rng):
    points, M = users(rng)
    index = np.array([5, 0, 5, 17])
    oracle.assert_close(points.rows(index), M[index], 1e-6)


@pytest.mark.parametrize("groups", [0, 6])
def test_same_start_and_steps_same_centroids_as_scikit_learn(rng, groups):
    points, M = users(rng, groups=groups)
    start = M[rng.choice(len(M), 6, replace=False)].astype(np.float32)
    for steps in (1, 2, 5):
        centroids = start
        for _ in range(steps):
            _, distances, sums, counts = points.step(centroids)
            centroids = kmeans._means(CPU, points, centroids, distances, sums, counts)
        theirs = KMeans(6, init=start, n_init=1, max_iter=steps, tol=0).fit(M.astype(np.float32)).cluster_centers_
        oracle.assert_close(centroids, theirs, 1e-4)
        oracle.assert_close(centroids, lloyd(M, start.astype(np.float64), steps), 1e-4)


def test_bounds_change_nothing(rng):
    points, M = users(rng, count=8000, groups=5)
    start = M[:9].astype(np.float32)
    fast, _ = kmeans.descend(CPU, points, start)
    plain, _, _, settled = kmeans.settle(CPU, points, start)
    assert settled
    oracle.assert_close(fast, plain, 1e-4)


@pytest.mark.parametrize("groups", [0, 6])
@pytest.mark.parametrize("clusters", [2, 8, 30])
def test_factored_is_settled_and_as_good_as_scikit_learn(rng, monkeypatch, groups, clusters):
    monkeypatch.setattr(kmeans, "SAMPLE_ROWS", 1000)
    points, M = users(rng, count=6000, groups=groups)
    found = kmeans.factored(CPU, points, clusters, seed=0)
    assert found.settled
    assert found.form == "factored"
    oracle.assert_nearest(M, found.centroids, found.labels)
    oracle.assert_means(M, found.centroids, found.labels)
    assert found.inertia[-1] == pytest.approx(oracle.squared_distances(M, found.centroids).min(axis=1).sum(), rel=1e-6)
    theirs = np.mean([KMeans(clusters, n_init=1, random_state=seed).fit(M).inertia_ for seed in range(5)])
    ours = np.mean([kmeans.factored(CPU, points, clusters, seed).inertia[-1] for seed in range(5)])
    assert ours <= theirs * 1.02


def test_dense_is_settled(rng):
    _, M = users(rng, groups=4)
    found = kmeans.dense(CPU, M.astype(np.float32), 8, seed=1)
    assert found.settled
    oracle.assert_nearest(M, found.centroids, found.labels)
    oracle.assert_means(M, found.centroids, found.labels)


def test_a_cluster_left_empty_takes_the_farthest_row(rng):
    M = np.concatenate([rng.standard_normal((50, 3)), [[90.0, 0, 0]]]).astype(np.float32)
    start = np.array([[0, 0, 0], [1e4, 1e4, 1e4]], np.float32)  # nobody is nearest to the second
    centroids, labels, _, settled = kmeans.settle(CPU, kmeans.Dense(CPU, M), start)
    assert settled
    np.testing.assert_array_equal(np.bincount(labels), [50, 1])
    np.testing.assert_allclose(centroids[1], M[50])


def test_fewer_distinct_rows_than_clusters_ends():
    M = np.repeat(np.eye(2, dtype=np.float32), 5, axis=0)
    found = kmeans.dense(CPU, M, 4, seed=0)
    assert found.inertia[-1] == 0
    assert np.bincount(found.labels, minlength=4).sum() == 10
