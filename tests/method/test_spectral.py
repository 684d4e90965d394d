"""Users clustered by what they did: against scipy, small cases by hand, and whole jobs."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from sklearn.metrics import adjusted_rand_score

import gpu_init
from gpu_init import tasks
from gpu_init.artifact import read
from gpu_init.backend.cpu import CpuBackend
from gpu_init.cli import main
from gpu_init.errors import InputError, ResourceError
from gpu_init.method import clusters as method_clusters
from gpu_init.method import kmeans, spectral, weighting
from gpu_init.method import points as method_points
from gpu_init.method.matrix import from_matrix
from gpu_init.method.modality import from_array
from gpu_init.settings import Settings
from tests.conftest import with_threads

DEVICE = CpuBackend("test")


def log(users=600, items=300, degree=8, groups=6, seed=0, weighted=False):
    """Interactions of users who keep to a group of items, and of every fifth one with any items; their groups."""
    rng = np.random.default_rng(seed)
    taste, group = rng.integers(groups, size=users), rng.integers(groups, size=items)
    rows = np.repeat(np.arange(users), degree)
    own = [np.flatnonzero(group == one) for one in range(groups)]
    columns = np.concatenate([rng.choice(own[one], degree) for one in taste])
    columns = np.where(rng.random(len(columns)) < 0.05, rng.integers(items, size=len(columns)), columns)
    values = rng.uniform(0.2, 5, len(rows)) if weighted else np.ones(len(rows))
    return scipy.sparse.csr_matrix((values, (rows, columns)), shape=(users, items)), taste


def with_strays(R, strays=40):
    """The same, and pairs of a user and an item that nobody else has."""
    return scipy.sparse.block_diag([R, scipy.sparse.eye(strays)], format="csr")


def normalized(R):
    """S, of all that is there."""
    users, items = (np.asarray(R.sum(axis=axis)).ravel() for axis in (1, 0))
    roots = [np.divide(1, np.sqrt(one), out=np.zeros(len(one)), where=one > 0) for one in (users, items)]
    return scipy.sparse.diags(roots[0]) @ R @ scipy.sparse.diags(roots[1])


def embedded(R, rank=10, seed=0):
    return spectral.fit(DEVICE, spectral.Whole(DEVICE, from_matrix(DEVICE, R, "test")), rank, seed)


# V.


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("items", [40, 300])  # all at once, and by Lanczos
def test_directions_are_the_singular_vectors(items, weighted):
    R, _ = log(items=items, weighted=weighted)
    found = embedded(R)
    _, values, expected = scipy.sparse.linalg.svds(normalized(R.astype(np.float32).astype(float)), k=10, rng=0)
    assert found.settled
    np.testing.assert_allclose(found.singular_values, values[::-1], rtol=1e-6)
    assert np.linalg.svd(found.items.T.astype(float) @ expected.T)[1].min() > 1 - 1e-5  # they span the same space
    largest = np.abs(found.items).argmax(axis=0)
    assert (found.items[largest, np.arange(10)] > 0).all()


def test_a_flat_spectrum_settles():
    """Nothing but noise: the wanted values lie close to the others."""
    rng = np.random.default_rng(3)
    R = scipy.sparse.random(3000, 500, 0.02, random_state=rng, data_rvs=np.ones, format="csr")
    found = embedded(R, rank=32)
    values = scipy.sparse.linalg.svds(normalized(R), k=32, rng=0, return_singular_vectors=False)
    assert found.settled
    np.testing.assert_allclose(found.singular_values, values[::-1], rtol=1e-6)


def test_other_seeds_find_the_same():
    R, _ = log()
    one, other = embedded(R, seed=0), embedded(R, seed=1)
    np.testing.assert_allclose(one.items, other.items, atol=1e-4)


def test_the_number_of_threads_does_not_change_a_byte():
    R, _ = log(users=5000, items=400)
    found = []
    for count in (1, 3):
        with with_threads(count):
            found.append(embedded(R).items)
    np.testing.assert_array_equal(*found)


def test_a_product_that_ends_early_is_no_trouble():
    """R of rank 3: Lanczos runs out of space, and goes on with vectors that come to nothing."""
    rng = np.random.default_rng(0)
    R = scipy.sparse.csr_matrix(np.repeat(rng.integers(1, 4, (3, 200)), 30, axis=0).astype(float))
    found = embedded(R, rank=8)
    np.testing.assert_allclose(found.singular_values[3:], 0, atol=1e-7)
    inner = found.items.T.astype(float) @ found.items
    np.testing.assert_allclose(inner, np.eye(8), atol=1e-5)


def test_many_directions_of_many_pairs(monkeypatch):
    """There are as many products as it takes to have so many, whatever the work."""
    monkeypatch.setattr(spectral, "WORK", 0)
    monkeypatch.setattr(spectral, "LEAST_PRODUCTS", 1)
    R, _ = log(users=2000, items=400)
    assert embedded(R, rank=100).items.shape == (400, 100)


def test_rank_is_bounded_by_what_is_there():
    R, _ = log(users=7, items=40)
    assert embedded(R, rank=64).items.shape == (40, 7)


# Components.


def test_large_components_by_hand():
    """Users 0 to 2 share items 0 to 2; user 3 is alone with item 3; nobody has item 4."""
    R = np.zeros((5, 5))
    R[[0, 0, 1, 1, 2], [0, 1, 1, 2, 2]] = 1
    R[3, 3] = 1
    made = from_matrix(DEVICE, scipy.sparse.csr_matrix(R), "test")
    assert spectral.Whole(DEVICE, made).large(3).tolist() == [True, True, True, False, False]  # 6 of 8, 2 of 8
    assert spectral.Whole(DEVICE, made).large(4).tolist() == [True, True, True, True, False]


@pytest.mark.parametrize("step", [1, 7, 1 << 16])
def test_components_are_those_of_the_graph(monkeypatch, step):
    monkeypatch.setattr(spectral, "_GRAPH_USERS", step)
    rng = np.random.default_rng(step)
    for _ in range(20):
        R = scipy.sparse.random(60, 50, 0.02, random_state=rng, format="csr")
        made = from_matrix(DEVICE, R, "test")
        nodes = scipy.sparse.bmat([[None, R], [R.T, None]]).tocsr()
        _, labels = scipy.sparse.csgraph.connected_components(nodes, directed=False)
        active = np.diff(nodes.indptr) > 0
        sizes = np.bincount(labels[active], minlength=labels.max() + 1)
        large = (sizes * 6 >= sizes.sum()) | (sizes == sizes.max())
        expected = (large[labels] & active)[60:]
        np.testing.assert_array_equal(spectral.Whole(DEVICE, made).large(6), expected)


def test_strays_leave_the_directions_as_they_are():
    R, _ = log()
    plain, stray = embedded(R), embedded(with_strays(R))
    np.testing.assert_allclose(stray.items[: R.shape[1]], plain.items, atol=1e-5)
    assert (stray.items[R.shape[1] :] == 0).all()
    assert (stray.item_factors[R.shape[1] :] == 0).all()
    np.testing.assert_allclose(stray.singular_values, plain.singular_values, rtol=1e-6)


# Clusters.


def test_rows_have_length_1_and_no_offset():
    R, _ = log()
    made, found = from_matrix(DEVICE, with_strays(R), "test"), embedded(with_strays(R))
    points = spectral.points(DEVICE, made, found.items, found.item_factors)
    assert len(points) == R.shape[0]
    expected = R @ (found.item_factors[: R.shape[1], None] * found.items[: R.shape[1]].astype(float))
    expected /= np.linalg.norm(expected, axis=1)[:, None]
    np.testing.assert_allclose(points.rows(np.arange(len(points))), expected, atol=1e-6)
    assert not points.offset.any()
    np.testing.assert_array_equal(points.squared_norms, np.ones(len(with_strays(R).indptr) - 1))


def features(items, seed=1):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal((items, width)).astype(np.float32) for name, width in (("a", 12), ("b", 7))}


@pytest.mark.parametrize("form", ["dense", "tiled", "factored"])
def test_groups_that_only_interactions_show(monkeypatch, form):
    monkeypatch.setattr(method_points, "kmeans_form", lambda *_: form)
    R, taste = log(users=3000)
    F = features(R.shape[1])
    made = gpu_init.initialize(R, F, clusters=6, cluster_on="interactions", cluster_rank=6, backend="cpu", restarts=4)
    assert adjusted_rand_score(taste, made["a"].labels) > 0.9
    assert (made["a"].labels == made["b"].labels).all()


def test_centroids_are_means_of_the_members():
    R, _ = log(weighted=True)
    R = with_strays(R).tolil()
    R[5] = 0  # somebody without interactions
    R = R.tocsr()
    R.eliminate_zeros()
    F = features(R.shape[1])
    F["b"][100:] = np.nan
    made = gpu_init.initialize(R, F, clusters=5, cluster_on="interactions", lam=0.3, backend="cpu")
    for name, one in made.items():
        present = ~np.isnan(F[name][:, 0])
        kept = R @ scipy.sparse.diags(present.astype(float))
        degrees = np.asarray(kept.sum(axis=1)).ravel()
        warm = degrees > 0
        M = (kept @ np.nan_to_num(F[name]))[warm] / degrees[warm, None]
        np.testing.assert_array_equal(one.labels >= 0, warm)
        for label in range(5):
            own = one.labels[warm] == label
            expected = M[own].mean(axis=0) if own.any() else M.mean(axis=0)
            np.testing.assert_allclose(one.centroids[label], expected, atol=1e-5)
        expected = 0.3 * M + 0.7 * one.centroids[one.labels[warm]]
        np.testing.assert_allclose(one.users[warm], expected, atol=1e-5)
    both = (made["a"].labels >= 0) & (made["b"].labels >= 0)
    np.testing.assert_array_equal(made["a"].labels[both], made["b"].labels[both])


def test_a_cluster_without_a_member_takes_the_mean_of_all():
    R, _ = log()
    made = from_matrix(DEVICE, R, "test")
    modality = from_array(DEVICE, "a", features(R.shape[1])["a"])
    operator = weighting.weighting(DEVICE, made, modality.present, "mean")
    labels = np.zeros(R.shape[0], np.int32)
    labels[:50] = 2
    points = method_points.Tiled(DEVICE, made.csr, modality.values, operator.mean_rows, operator.present)
    sums, counts = method_clusters.behaviour_sums(DEVICE, points, labels, 3)
    centroids = method_clusters.behaviour_means(sums, counts, points.offset)
    M = method_points.Tiled(DEVICE, made.csr, modality.values, operator.mean_rows, operator.present, np.zeros(12))
    M = M.rows(np.arange(R.shape[0]))
    for label, expected in ((0, M[50:]), (1, M), (2, M[:50])):
        np.testing.assert_allclose(centroids[label], expected.mean(axis=0), atol=1e-5)


def test_users_outside_take_the_label_of_the_shortest_centroid():
    R, _ = log()
    made, found = from_matrix(DEVICE, with_strays(R), "test"), embedded(with_strays(R))
    points = spectral.points(DEVICE, made, found.items, found.item_factors)
    centroids = kmeans.fit(DEVICE, points, 4, seed=0).centroids
    labels = method_clusters.behaviour_labels(DEVICE, made, points, centroids)
    assert (labels[R.shape[0] :] == np.linalg.norm(centroids, axis=1).argmin()).all()
    assert (labels >= 0).all()


def test_more_clusters_than_users_that_hang_together():
    R = with_strays(log(users=9)[0])
    given = {"clusters": 20, "cluster_on": "interactions", "backend": "cpu"}
    with pytest.raises(InputError, match="20 clusters, but 9 users whose interactions hang together"):
        gpu_init.initialize(R, features(R.shape[1]), **given)


def test_rank_is_of_interactions():
    with pytest.raises(InputError, match="cluster_rank is of cluster_on interactions"):
        Settings(cluster_rank=8)


# Jobs.


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    R, _ = log(weighted=True)
    entries = with_strays(R).tocoo()
    items = [f"i{item}" for item in entries.col]
    pd.DataFrame({"user_id": entries.row + 5, "item_id": items, "w": entries.data}).to_parquet("log.parquet")
    for name, values in features(entries.shape[1]).items():
        values[::9] = np.nan
        columns = {f"v{at}": column for at, column in enumerate(values.T)}
        pd.DataFrame({"item_id": [f"i{item}" for item in range(len(values))], **columns}).to_parquet(f"{name}.parquet")
    flags = ["--interactions=log.parquet", "--weight-column=w", "--cluster-on=interactions", "--cluster-rank=12"]
    flags += ["--features=a=a.parquet", "--features=b=b.parquet", "--clusters=4"]

    def run(out, *more):
        assert main(["run", *flags, f"--out={out}", *more]) == 0
        return read.load(out)

    return run


def test_the_artifact_holds_what_places_users(job):
    made = job("out")
    assert read.verify("out") == []
    placed = made.interactions
    assert placed.items.shape == (len(made.item_ids), 12)
    assert placed.centroids.shape == (4, 12)
    facts = made.manifest["interactions"]["embedding"]
    assert facts["rank"] == 12
    np.testing.assert_allclose(facts["singular_values"], placed.singular_values)
    for one in made.values():
        warm = one.labels >= 0
        np.testing.assert_array_equal(one.labels[warm], placed.labels[warm])


@pytest.mark.parametrize("policy", ["0.4", "shrink", "attention"])
@pytest.mark.parametrize("more", [[], ["--dim=5", "--whiten", "--scale=items", "--weighting=sym"]])
def test_same_users_are_assigned_the_same_bytes(job, policy, more):
    whole = job("out", f"--lambda={policy}", *more)
    some = pd.read_parquet("log.parquet")
    some = some[some["user_id"] % 3 == 0]
    some.to_parquet("some.parquet")
    assert main(["assign", "out", "--interactions=some.parquet", "--out=new"]) == 0
    assert main(["assign", "new", "--interactions=some.parquet", "--out=newer"]) == 0
    rows = {user: row for row, user in enumerate(whole.user_ids)}
    for out in ("new", "newer"):
        made = read.load(out)
        assert read.verify(out) == []
        of = [rows[user] for user in made.user_ids]
        np.testing.assert_array_equal(made.interactions.labels, whole.interactions.labels[of])
        for name in whole:
            np.testing.assert_array_equal(made[name].labels, whole[name].labels[of])
            np.testing.assert_array_equal(made[name].users, whole[name].users[of])


def test_automatic_k(job):
    made = job("out", "--clusters=auto")
    assert len(made.interactions.centroids) == len(made["a"].centroids) == len(made["b"].centroids)
    assert made.manifest["modalities"]["a"]["choice"]["clusters"] == len(made["a"].centroids)


def test_a_missing_array_is_a_problem(job):
    job("out")
    import json
    import pathlib

    manifest = json.loads(pathlib.Path("out/manifest.json").read_text())
    del manifest["files"]["interactions/centroids.npy"]
    problems = list(read.problems(str(pathlib.Path("out").resolve()), manifest))
    assert any("interactions/centroids.npy: missing" in problem for problem in problems)


def test_inspect_and_the_report_show_it(job, capsys):
    job("out")
    assert main(["inspect", "out"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "cluster_on interactions, cluster_rank 12" in said
    assert "12 dimensions, singular values down to 0." in said
    assert main(["report", "out"]) == 0
    with open("out/report.html", encoding="utf-8") as page:
        assert "Users by what they did" in page.read()


def test_a_stopped_run_goes_on_from_what_it_has(job, monkeypatch):
    """Stopped where a modality's clusters come; what was found of the interactions is not sought again."""
    whole = job("whole")
    sums_of_labels = tasks.sums_of_labels

    def full(*_):
        raise ResourceError("no space is left")

    monkeypatch.setattr(tasks, "sums_of_labels", full)
    flags = ["--interactions=log.parquet", "--weight-column=w", "--cluster-on=interactions", "--cluster-rank=12"]
    flags += ["--features=a=a.parquet", "--features=b=b.parquet", "--clusters=4", "--out=out"]
    assert main(["run", *flags]) == 3
    monkeypatch.setattr(tasks, "sums_of_labels", sums_of_labels)
    monkeypatch.setattr(spectral, "fit", full)
    made = job("out", "--resume")
    assert read.verify("out") == []
    assert {name: one["sha256"] for name, one in made.manifest["files"].items()} == {
        name: one["sha256"] for name, one in whole.manifest["files"].items()
    }
