"""K-means in each form against scikit-learn and against the definition."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.cluster import KMeans

from gpu_init import kmeans, method
from gpu_init.backend import CpuBackend

from . import oracle
from .conftest import random_csr

CPU = CpuBackend("test")


def users(rng, count=3000, items=200, width=10, weighted=True, shift=0.0, missing=0.2, groups=0, form=kmeans.Factored):
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
    if form is kmeans.Dense:
        return kmeans.Dense(CPU, M[degrees > 0].astype(np.float32)), M[degrees > 0]
    return form(CPU, csr, features, row_scale, item_scale), M[degrees > 0]


def lloyd(M, centroids, steps):
    """Plain Lloyd in float64, nothing clever."""
    for _ in range(steps):
        labels = oracle.squared_distances(M, centroids).argmin(axis=1)
        centroids = np.stack(
            [M[labels == k].mean(axis=0) if (labels == k).any() else centroids[k] for k in range(len(centroids))]
        )
    return centroids


FORMS = [kmeans.Dense, kmeans.Tiled, kmeans.Factored]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shift", [0.0, 1000.0])
@pytest.mark.parametrize("missing", [0.0, 0.2])
def test_a_step_is_the_definition(rng, monkeypatch, form, weighted, shift, missing):
    monkeypatch.setattr(kmeans, "TILE_ROWS", 1000)
    monkeypatch.setattr(kmeans, "LOOK_ROWS", 1700)
    points, M = users(rng, weighted=weighted, shift=shift, missing=missing, form=form)
    start = M[:7].astype(np.float32)
    labels = np.full(len(M), -1, np.int32)
    inertia, changed, sums, counts = points.step(start, labels)
    distances = np.concatenate([each for _, _, each in points._distances(start)])
    expected = oracle.squared_distances(M, start)
    tolerance = (
        1e-3 if shift and form is not kmeans.Factored else 1e-6
    )  # float32 rows of length 3000 have lost these digits
    np.testing.assert_allclose(distances, expected.min(axis=1), rtol=tolerance, atol=tolerance * expected.mean())
    assert inertia == pytest.approx(distances.sum())
    assert (changed, points.step(start, labels)[1]) == (len(M), 0)
    oracle.assert_nearest(M, start, labels)
    np.testing.assert_array_equal(points.nearest(start), labels)
    np.testing.assert_array_equal(points.farthest(start, 5), np.argsort(-distances, kind="stable")[:5])
    for k in range(7):
        expected_sum = (M[labels == k] - points.middle).sum(axis=0)
        np.testing.assert_allclose(sums[k], expected_sum, rtol=1e-6, atol=tolerance * counts[k])
    np.testing.assert_array_equal(counts, np.bincount(labels, minlength=7))


def test_rows_are_made_on_demand(rng):
    points, M = users(rng)
    index = np.array([5, 0, 5, 17])
    oracle.assert_close(points.rows(index, np.float64) + points.middle, M[index], 1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("groups", [0, 6])
def test_same_start_and_steps_same_centroids_as_scikit_learn(rng, groups, form):
    points, M = users(rng, groups=groups, form=form)
    start = M[rng.choice(len(M), 6, replace=False)].astype(np.float32)
    for steps in (1, 2, 5):
        centroids = start
        for _ in range(steps):
            _, _, sums, counts = points.step(centroids, np.full(len(M), -1, np.int32))
            centroids = kmeans._means(points.middle, centroids, sums, counts)
        theirs = KMeans(6, init=start, n_init=1, max_iter=steps, tol=0).fit(M.astype(np.float32)).cluster_centers_
        oracle.assert_close(centroids, theirs, 1e-4)
        oracle.assert_close(centroids, lloyd(M, start.astype(np.float64), steps), 1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tile", [500, 1 << 16])
def test_bounds_change_nothing(rng, monkeypatch, form, tile):
    monkeypatch.setattr(kmeans, "TILE_ROWS", tile)
    monkeypatch.setattr(kmeans, "LOOK_ROWS", 6 * tile)
    points, M = users(rng, count=8000, groups=5, form=form)
    start = M[:9].astype(np.float32)
    fast, inertia, settled = kmeans.descend(CPU, points, start, momentum=0.0)
    assert settled
    assert (np.diff(inertia) <= 1e-6 * inertia[0]).all()
    plain, _, expected, settled = kmeans.settle(CPU, points, start)
    assert settled
    assert len(inertia) == len(expected) - 1  # which counts the step that changes nothing
    oracle.assert_close(fast, plain, 1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_momentum_ends_where_labels_settle_in_fewer_steps(rng, form):
    points, M = users(rng, count=20_000, groups=12, width=6, form=form)
    moving, plain = [], []
    for _ in range(4):
        start = M[rng.choice(len(M), 9, replace=False)].astype(np.float32)
        centroids, inertia, settled = kmeans.descend(CPU, points, start)
        assert settled
        labels = np.full(len(M), -1, np.int32)
        exact, _, _, _ = points.step(centroids, labels)
        oracle.assert_means(M, centroids, labels)
        assert exact == pytest.approx(inertia[-1], rel=1e-4)
        moving.append((len(inertia), inertia[-1]))
        _, inertia, _ = kmeans.descend(CPU, points, start, momentum=0.0)
        plain.append((len(inertia), inertia[-1]))
    (steps, ends), (plain_steps, plain_ends) = (np.sum(each, axis=0) for each in (moving, plain))
    assert steps < plain_steps
    assert ends <= 1.01 * plain_ends


def test_the_best_of_several_starts(rng):
    points, M = users(rng, count=4000, groups=10, form=kmeans.Dense)
    single = [kmeans.fit(CPU, points, 10, seed).inertia[-1] for seed in range(6)]
    found = kmeans.fit(CPU, points, 10, seed=0, restarts=10)
    assert found.inertia[-1] <= np.median(single)
    theirs = KMeans(10, n_init=10, random_state=1).fit(M).inertia_
    assert found.inertia[-1] <= 1.01 * theirs


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("groups", [0, 6])
@pytest.mark.parametrize("clusters", [2, 8, 30])
def test_fit_is_settled_and_as_good_as_scikit_learn(rng, monkeypatch, form, groups, clusters):
    monkeypatch.setattr(kmeans, "SAMPLE_ROWS", 250)
    monkeypatch.setattr(kmeans, "TILE_ROWS", 1000)
    points, M = users(rng, count=6000, groups=groups, form=form)
    found = kmeans.fit(CPU, points, clusters, seed=0)
    assert found.settled
    assert found.form == form.form
    oracle.assert_nearest(M, found.centroids, found.labels)
    oracle.assert_means(M, found.centroids, found.labels)
    assert found.inertia[-1] == pytest.approx(oracle.squared_distances(M, found.centroids).min(axis=1).sum(), rel=1e-6)
    theirs = np.mean([KMeans(clusters, n_init=1, random_state=seed).fit(M).inertia_ for seed in range(5)])
    ours = np.mean([kmeans.fit(CPU, points, clusters, seed).inertia[-1] for seed in range(5)])
    assert ours <= theirs * 1.02


@pytest.mark.parametrize(
    ("users_", "items", "pairs", "clusters", "width", "memory", "form"),
    [
        (5_000, 1_000, 50_000, 8, 64, 1 << 30, "dense"),  # the sample would be everyone
        (300_000, 40_000, 4_000_000, 8, 384, 1 << 30, "factored"),
        (100_000, 40_000, 5_000_000, 64, 64, 1 << 30, "factored"),
        (100_000, 40_000, 20_000_000, 256, 64, 1 << 30, "dense"),  # K columns cost more than D; the matrix is small
        (30_000_000, 40_000, 1_500_000_000, 256, 64, 1 << 30, "tiled"),
        (300_000, 4_000_000, 4_000_000, 256, 384, 1 << 30, "dense"),  # the tables of the items would be larger
        (300_000, 4_000_000, 4_000_000, 256, 384, 500_000_000, "tiled"),
    ],
)
def test_the_form_that_costs_least(users_, items, pairs, clusters, width, memory, form):
    assert method.kmeans_form(users_, items, pairs, clusters, width, memory) == form


def test_a_cluster_left_empty_takes_the_farthest_row(rng):
    M = np.concatenate([rng.standard_normal((50, 3)), [[90.0, 0, 0]]]).astype(np.float32)
    start = np.array([[0, 0, 0], [1e4, 1e4, 1e4]], np.float32)  # nobody is nearest to the second
    centroids, labels, _, settled = kmeans.settle(CPU, kmeans.Dense(CPU, M), start)
    assert settled
    np.testing.assert_array_equal(np.bincount(labels), [50, 1])
    np.testing.assert_allclose(centroids[1], M[50], atol=1e-6)


def test_seeds_are_rows_of_different_groups(rng):
    groups = np.repeat(np.arange(6), 500)
    M = (50 * rng.standard_normal((6, 10))[groups] + rng.standard_normal((3000, 10))).astype(np.float32)
    points = kmeans.Dense(CPU, M)
    for seed in range(5):
        found = kmeans.seeds(CPU, points, 6, np.random.default_rng(seed))
        distances = oracle.squared_distances(M, found)
        assert distances.min(axis=0).max() < 1e-6
        assert sorted(groups[distances.argmin(axis=0)]) == list(range(6))
        np.testing.assert_array_equal(found, kmeans.seeds(CPU, points, 6, np.random.default_rng(seed)))


@pytest.mark.parametrize("form", FORMS)
def test_squared_distances(rng, form):
    points, M = users(rng, count=300, shift=5.0, form=form)
    some, others = np.array([7, 3, 11]), np.array([3, 0])
    expected = ((M[some][:, None] - M[others]) ** 2).sum(axis=2)
    np.testing.assert_allclose(points.squared_distances(some, others), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("count", "clusters", "width", "sizes"),
    [
        (100, 8, 64, [100]),
        (60_000, 8, 64, [8192]),
        (66_000, 8, 64, [8192, 16_500]),
        (10**7, 100, 1024, [25_600]),
        (10**7, 8, 256, [8192, 65_536]),
    ],
)
def test_sizes_of_the_samples(count, clusters, width, sizes):
    assert kmeans.sample_sizes(count, clusters, width) == sizes


def test_fewer_distinct_rows_than_clusters_ends():
    M = np.repeat(np.eye(2, dtype=np.float32), 5, axis=0)
    found = kmeans.fit(CPU, kmeans.Dense(CPU, M), 4, seed=0)
    assert found.inertia[-1] == 0
    assert np.bincount(found.labels, minlength=4).sum() == 10


def test_where_labels_do_not_settle_the_tolerance_ends_it(rng, monkeypatch):
    monkeypatch.setattr(kmeans, "SETTLING_WORK", 0)
    monkeypatch.setattr(kmeans, "SAMPLE_ROWS", 500)
    M = rng.standard_normal((20_000, 6)).astype(np.float32)
    found = kmeans.fit(CPU, kmeans.Dense(CPU, M), 20, seed=0)
    assert not found.settled
    oracle.assert_nearest(M, found.centroids, found.labels)
    theirs = KMeans(20, n_init=1, random_state=0).fit(M).inertia_
    assert found.inertia[-1] == pytest.approx(theirs, rel=0.01)
