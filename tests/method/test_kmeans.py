"""K-means in each form against scikit-learn and against the definition."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

from gpu_init.backend.cpu import CpuBackend
from gpu_init.kernels import Csr
from gpu_init.method import kmeans
from gpu_init.method import points as method_points
from tests.conftest import random_csr
from tests.support import oracle

CPU = CpuBackend("test")


@pytest.fixture(autouse=True)
def one_thread():
    """Without it scikit-learn is slower by far where other tests use the cores."""
    with threadpool_limits(1):
        yield


def users(
    rng, count=3000, items=200, width=10, weighted=True, shift=0.0, missing=0.2, groups=0, form=method_points.Factored
):
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
    if form is method_points.Dense:
        return method_points.Dense(CPU, M[degrees > 0].astype(np.float32)), M[degrees > 0]
    return form(CPU, csr, features, row_scale, item_scale), M[degrees > 0]


def of_rows(points, labels):
    """Labels of the rows alone; those of cold users are -1."""
    if isinstance(points, method_points.Dense):
        return labels
    assert (np.delete(labels, points.users) == -1).all()
    return labels[points.users]


def plain(M, centroids, tolerance=0.0, steps=300):
    """Lloyd's passes from their definition, in float64 but for the centroids, while no cluster is empty."""
    inertia = []
    while True:
        distances = oracle.squared_distances(M, centroids)
        labels = distances.argmin(axis=1)
        inertia.append(distances.min(axis=1).sum())
        if len(inertia) == steps or (len(inertia) > 1 and inertia[-2] - inertia[-1] < tolerance * inertia[-1]):
            return centroids, labels, inertia
        means = np.stack([M[labels == k].mean(axis=0) for k in range(len(centroids))]).astype(np.float32)
        if np.array_equal(means, centroids):
            return centroids, labels, inertia
        centroids = means


FORMS = [method_points.Dense, method_points.Tiled, method_points.Factored]


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(method_points, "BLOCK_ROWS", 500)
    monkeypatch.setattr(method_points, "TILE_ROWS", 1000)
    monkeypatch.setattr(method_points, "LOOK_ROWS", 1700)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shift", [0.0, 1000.0])
@pytest.mark.parametrize("missing", [0.0, 0.2])
def test_a_step_is_the_definition(rng, small_blocks, form, weighted, shift, missing):
    points, M = users(rng, weighted=weighted, shift=shift, missing=missing, form=form)
    start = M[:7].astype(np.float32)
    found = points.step(start)
    labels, sums = of_rows(points, found.labels), found.sums()
    distances = oracle.squared_distances(M, start)
    # a matrix of float32 whose rows have a length of 3000 has lost these digits
    tolerance = 1e-3 if shift and form is method_points.Dense else 1e-6
    assert found.labels.dtype == np.int32
    assert found.inertia == pytest.approx(distances.min(axis=1).sum(), rel=tolerance)
    oracle.assert_nearest(M, start, labels)
    np.testing.assert_array_equal(points.nearest(start), found.labels)
    np.testing.assert_array_equal(found.counts, np.bincount(labels, minlength=7))
    for k in range(7):
        expected = (M[labels == k] - points.offset).sum(axis=0)
        np.testing.assert_allclose(sums[k], expected, rtol=1e-6, atol=tolerance * found.counts[k])


@pytest.mark.parametrize("form", FORMS)
def test_the_farthest_rows(rng, small_blocks, form):
    points, M = users(rng, form=form)
    start = M[:7].astype(np.float32)
    reached = oracle.squared_distances(M, start).min(axis=1)
    rows, how_far = points.far(start, 5)
    assert len(set(rows)) == 5
    np.testing.assert_allclose(how_far, reached[rows], rtol=1e-5)
    np.testing.assert_allclose(how_far, np.sort(reached)[:-6:-1], rtol=1e-5)


def test_rows_are_made_on_demand(rng):
    points, M = users(rng)
    index = np.array([5, 0, 5, 17])
    oracle.assert_close(points.rows(index) + points.offset, M[index], 1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("groups", [0, 6])
def test_same_start_and_steps_same_centroids_as_scikit_learn(rng, groups, form):
    points, M = users(rng, groups=groups, form=form)
    start = M[rng.choice(len(M), 6, replace=False)].astype(np.float32)
    for steps in (1, 2, 5):
        centroids = start
        for _ in range(steps):
            found = points.step(centroids)
            centroids = kmeans._means(points.offset, centroids, found.sums(), found.counts)
        theirs = KMeans(6, init=start, n_init=1, max_iter=steps, tol=0).fit(M.astype(np.float32)).cluster_centers_
        oracle.assert_close(centroids, theirs, 1e-4)
        oracle.assert_close(centroids, plain(M, start, steps=steps + 1)[0], 1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("groups", [0, 6])
@pytest.mark.parametrize("tolerance", [0.0, 1e-3, 1e-1])
def test_the_passes_are_plain_ones(rng, small_blocks, form, groups, tolerance):
    points, M = users(rng, groups=groups, form=form)
    start = M[rng.choice(len(M), 6, replace=False)].astype(np.float32)
    centroids, labels, inertia, stopped = kmeans.lloyd(CPU, points, start, tolerance)
    expected_centroids, expected_labels, expected_inertia = plain(M, start, tolerance)
    oracle.assert_close(centroids, expected_centroids, 1e-5)
    np.testing.assert_array_equal(of_rows(points, labels), expected_labels)
    np.testing.assert_allclose(inertia, expected_inertia, rtol=1e-6)
    oracle.assert_nearest(M, centroids, of_rows(points, labels))
    falls = -np.diff(inertia)
    if tolerance:
        assert stopped == "tolerance"
        assert (falls[:-1] >= tolerance * np.array(inertia[1:-1])).all()
        assert falls[-1] < tolerance * inertia[-1]
    else:
        assert stopped == "labels"
        oracle.assert_means(M, centroids, of_rows(points, labels))
        again = kmeans.lloyd(CPU, points, centroids)
        assert (len(again[2]), again[3]) == (1, "labels")
        np.testing.assert_array_equal(again[0], centroids)


@pytest.mark.parametrize("form", FORMS)
def test_there_are_so_many_passes_at_most(rng, monkeypatch, form):
    monkeypatch.setattr(kmeans, "MOST_PASSES", 3)
    points, M = users(rng, form=form)
    centroids, labels, inertia, stopped = kmeans.lloyd(CPU, points, M[:9].astype(np.float32))
    assert (len(inertia), stopped) == (3, "passes")
    oracle.assert_nearest(M, centroids, of_rows(points, labels))
    assert inertia[-1] == pytest.approx(oracle.squared_distances(M, centroids).min(axis=1).sum())


def test_a_pass_that_leaves_a_cluster_empty_is_not_the_last():
    # Both rows of the second cluster go over to the others, whose centroids have come near; and the inertia is nearly
    # all in the last cluster, so that this pass does not lower it by much.
    M = np.array([[4.9]] * 9 + [[6.0], [14.0]] + [[15.1]] * 9 + [[4000.0], [6000.0]], np.float32)
    start, points = np.array([[0.0], [10.0], [20.0], [5000.0]], np.float32), method_points.Dense(CPU, M)
    first = points.step(start)
    assert first.counts.all()
    assert not points.step(kmeans._means(points.offset, start, first.sums(), first.counts)).counts.all()
    centroids, labels, inertia, stopped = kmeans.lloyd(CPU, points, start, 1e-2)
    assert 0 <= inertia[0] - inertia[1] < 1e-2 * inertia[1]
    assert len(inertia) > 2
    assert stopped != "passes"
    assert np.bincount(labels, minlength=4).all()
    assert inertia[-1] < 1e-3 * inertia[0]
    oracle.assert_nearest(M, centroids, labels)


def test_a_cluster_left_empty_takes_the_farthest_row(rng):
    M = np.concatenate([rng.standard_normal((50, 3)), [[90.0, 0, 0]]]).astype(np.float32)
    start = np.array([[0, 0, 0], [1e4, 1e4, 1e4]], np.float32)  # nobody is nearest to the second
    centroids, labels, _, stopped = kmeans.lloyd(CPU, method_points.Dense(CPU, M), start)
    assert stopped == "labels"
    np.testing.assert_array_equal(np.bincount(labels), [50, 1])
    np.testing.assert_allclose(centroids[1], M[50], atol=1e-6)


def test_fewer_distinct_rows_than_clusters_ends():
    M = np.repeat(np.eye(2, dtype=np.float32), 5, axis=0)
    found = kmeans.fit(CPU, method_points.Dense(CPU, M), 4, seed=0)
    assert found.inertia[-1] == 0
    assert found.stopped == "labels"
    assert np.bincount(found.labels, minlength=4).sum() == 10


@pytest.mark.parametrize("form", [method_points.Tiled, method_points.Factored])
@pytest.mark.parametrize("tolerance", [0.0, 1e-3])
def test_rows_that_only_rounding_tells_apart_end_soon(rng, form, tolerance):
    """Users of the same items, or of items that are the same, in other weights."""
    features = (rng.standard_normal((3, 8)) + 300).astype(np.float32)[np.arange(90) % 3]
    items = (3 * rng.integers(0, 30, (4000, 4)) + rng.integers(0, 3, (4000, 1))).astype(np.int32)
    weights = rng.uniform(0.1, 5, items.shape).astype(np.float32)
    csr = Csr(np.arange(0, items.size + 1, 4), items.ravel(), weights.ravel())
    points = form(CPU, csr, features, 1 / weights.sum(axis=1, dtype=np.float64), np.ones(90))
    found = kmeans.fit(CPU, points, 7, seed=0, tolerance=tolerance)
    assert len(found.inertia) < 10
    assert found.inertia[-1] < 1e-6
    np.testing.assert_array_equal([len(set(found.labels[items[:, 0] % 3 == one])) >= 1 for one in range(3)], True)


def test_a_sample_is_gone_through_in_float32(rng):
    rows = rng.standard_normal((300, 6)).astype(np.float32)
    sample, whole = method_points.Sample(CPU, rows), method_points.Dense(CPU, rows)
    assert sample.rows(np.array([3, 1])).dtype == np.float32
    assert whole.rows(np.array([3, 1])).dtype == np.float64
    assert not sample.offset.any()
    one, other = kmeans.lloyd(CPU, sample, rows[:5]), kmeans.lloyd(CPU, whole, rows[:5])
    np.testing.assert_array_equal(one[1], other[1])
    oracle.assert_close(one[0], other[0], 1e-5)
    np.testing.assert_allclose(one[2], other[2], rtol=1e-5)


@pytest.mark.parametrize(
    ("kernels", "form", "width"),
    [
        ("numba", method_points.Tiled, 128),
        ("numba", method_points.Factored, 1024),
        ("numpy", method_points.Factored, 128),
    ],
)
def test_memory_is_as_planned(rng, kernels, form, width):
    count, items, degree, clusters = 20_000, 3000, 5, 8
    indices = rng.integers(0, items, count * degree).astype(np.int32)
    csr = Csr(np.arange(0, len(indices) + 1, degree), indices, None)
    features = rng.standard_normal((items, width)).astype(np.float32)
    device = CPU.with_kernels(kernels)
    few, points = (
        form(device, csr.rows(0, users), features, np.full(users, 1 / degree), np.ones(items)) for users in (99, count)
    )
    kmeans.fit(device, few, 2, seed=0)  # machine code is loaded
    tracemalloc.start()
    kmeans.fit(device, points, clusters, seed=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    planned = method_points.needed_bytes(form.form, count, items, clusters, width)
    if kernels == "numpy":  # a few of its blocks are there at a time, whatever the sizes of the job
        planned += 4 * 8 * device.kernels.block_values
    assert peak <= planned, f"{peak / planned:.2f} times what is planned"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("groups", [0, 6])
@pytest.mark.parametrize("tolerance", [0.0, 1e-3])
def test_fit_goes_from_samples_to_all_rows(rng, small_blocks, monkeypatch, form, groups, tolerance):
    monkeypatch.setattr(method_points, "sample_size", lambda clusters: 250)
    points, M = users(rng, count=6000, groups=groups, form=form)
    assert len(method_points.sample_sizes(len(M), 8, 10)) == 2
    found = kmeans.fit(CPU, points, 8, seed=0, tolerance=tolerance)
    assert (found.form, found.library) == (form.form, False)
    assert found.stopped == ("tolerance" if tolerance else "labels")
    labels = of_rows(points, found.labels)
    oracle.assert_nearest(M, found.centroids, labels)
    if not tolerance:
        oracle.assert_means(M, found.centroids, labels)
    expected = oracle.squared_distances(M, found.centroids).min(axis=1).sum()
    assert found.inertia[-1] == pytest.approx(expected, rel=1e-6)
    falls = -np.diff(found.inertia)
    assert (falls[:-1] >= tolerance * np.array(found.inertia[1:-1])).all()


@pytest.mark.parametrize("kernels", ["numpy", "numba"])
def test_the_forms_agree(rng, small_blocks, kernels):
    points, M = users(rng, groups=4)
    device = CPU.with_kernels(kernels)
    arrays = (device, points._csr, points._features, points._row_scale, points._item_scale)
    expected = kmeans.fit(CPU, points, 7, seed=0)
    factored = kmeans.fit(device, method_points.Factored(*arrays), 7, seed=0)
    tiled = kmeans.fit(device, method_points.Tiled(*arrays), 7, seed=0)
    dense = kmeans.fit(device, method_points.Dense(device, M, points.offset), 7, seed=0)
    for other in (factored, tiled):
        np.testing.assert_array_equal(expected.labels, other.labels)
    np.testing.assert_array_equal(of_rows(points, expected.labels), dense.labels)
    for other in (factored, tiled, dense):
        oracle.assert_close(other.centroids, expected.centroids, 1e-6)
        np.testing.assert_allclose(other.inertia, expected.inertia, rtol=1e-6)


def test_passes_start_from_the_centroids_of_a_library(rng):
    points, M = users(rng, form=method_points.Dense)
    start = M[:6].astype(np.float32)
    found = kmeans.fit(CPU, points, 6, seed=0, start=start)
    assert found.library
    np.testing.assert_array_equal(found.centroids, kmeans.lloyd(CPU, points, start, kmeans.TOLERANCE)[0])


@pytest.mark.parametrize("groups", [0, 12])
def test_as_good_as_scikit_learn(rng, groups):
    M = rng.standard_normal((20_000, 16))
    if groups:
        M += rng.standard_normal((groups, 16))[rng.integers(0, groups, len(M))]
    points = method_points.Dense(CPU, M.astype(np.float32))
    theirs = np.mean([KMeans(8, n_init=1, random_state=seed).fit(M).inertia_ for seed in range(5)])
    ours = np.mean([kmeans.fit(CPU, points, 8, seed).inertia[-1] for seed in range(5)])
    assert ours <= 1.01 * theirs


def test_the_best_of_several_starts(rng):
    points, M = users(rng, count=4000, groups=10, form=method_points.Dense)
    single = [kmeans.fit(CPU, points, 10, seed).inertia[-1] for seed in range(6)]
    found = kmeans.fit(CPU, points, 10, seed=0, restarts=10)
    assert found.inertia[-1] <= np.median(single)
    theirs = KMeans(10, n_init=10, random_state=1).fit(M).inertia_
    assert found.inertia[-1] <= 1.01 * theirs


@pytest.mark.parametrize(
    ("users_", "items", "pairs", "clusters", "width", "memory", "form"),
    [
        (5_000, 1_000, 50_000, 8, 64, 1 << 30, "dense"),  # the sample is everyone
        (5_000, 1_000, 50_000, 8, 64, 1 << 20, "tiled"),
        (300_000, 40_000, 4_000_000, 8, 384, 1 << 30, "factored"),
        (100_000, 40_000, 5_000_000, 64, 64, 1 << 30, "factored"),
        (100_000, 40_000, 20_000_000, 256, 64, 1 << 30, "tiled"),  # K columns cost more than D
        (30_000_000, 40_000, 1_500_000_000, 256, 64, 1 << 30, "tiled"),
        (300_000, 4_000_000, 4_000_000, 256, 384, 1 << 30, "tiled"),  # the tables of the items would be larger
    ],
)
def test_the_form_that_costs_least(users_, items, pairs, clusters, width, memory, form):
    assert method_points.kmeans_form(users_, items, pairs, clusters, width, memory) == form


def test_seeds_are_rows_of_different_groups(rng):
    groups = np.repeat(np.arange(6), 500)
    M = (50 * rng.standard_normal((6, 10))[groups] + rng.standard_normal((3000, 10))).astype(np.float32)
    points = method_points.Dense(CPU, M)
    for seed in range(5):
        found = kmeans.seeds(CPU, points, 6, np.random.default_rng(seed))
        distances = oracle.squared_distances(M, found)
        assert distances.min(axis=0).max() < 1e-6
        assert sorted(groups[distances.argmin(axis=0)]) == list(range(6))
        np.testing.assert_array_equal(found, kmeans.seeds(CPU, points, 6, np.random.default_rng(seed)))


def test_squared_distances(rng):
    points, M = users(rng, count=300, shift=5.0, form=method_points.Dense)
    others = np.array([3, 0])
    expected = ((M[:, None] - M[others]) ** 2).sum(axis=2)
    np.testing.assert_allclose(points.squared_distances(others), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("count", "clusters", "width", "sizes"),
    [
        (100, 8, 64, [100]),
        (60_000, 8, 64, [8192]),
        (66_000, 8, 64, [8192, 16_500]),
        (10**7, 100, 1024, [25_600]),
        (10**7, 8, 64, [8192, 65_536]),
        (10**7, 8, 256, [8192, 16_384]),
    ],
)
def test_sizes_of_the_samples(count, clusters, width, sizes):
    assert method_points.sample_sizes(count, clusters, width) == sizes
