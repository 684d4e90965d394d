"""Automatic K: twelve groups are twelve, one blob is the smallest candidate; scores against scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
from sklearn.metrics import calinski_harabasz_score, silhouette_score

import gpu_init
from gpu_init.artifact import read
from gpu_init.backend.select import select
from gpu_init.cli import main
from gpu_init.method import choose, points
from gpu_init.show.progress import Progress

BACKEND = select("cpu")
GROUPS = 12


def parted(rng, count, width, apart, shares=None):
    """Rows around twelve centres that are ``apart`` at least, noise of deviation 1 per dimension; and the groups."""
    centres = np.zeros((0, width))
    while len(centres) < GROUPS:
        one = rng.uniform(-1, 1, width) * (2 * apart)
        if (np.linalg.norm(centres - one, axis=1) >= apart).all():
            centres = np.vstack([centres, one])
    groups = rng.choice(GROUPS, count, p=shares)
    return centres[groups] + rng.standard_normal((count, width)), groups


def chosen(rows, seed=0):
    return choose.choose(BACKEND, points.Dense(BACKEND, rows.astype(np.float32)), seed)


UNEVEN = 1 / np.arange(1.0, GROUPS + 1)
UNEVEN /= UNEVEN.sum()


@pytest.mark.parametrize(
    ("seed", "width", "apart", "shares", "count"),
    [(0, 2, 12, None, 3000), (1, 8, 12, None, 3000), (2, 64, 16, UNEVEN, 9000), (3, 200, 20, None, 600)],
)
def test_twelve_groups_are_twelve(seed, width, apart, shares, count):
    rows, _ = parted(np.random.default_rng(seed), count, width, apart, shares)
    found = chosen(rows, seed)
    assert found.clusters == GROUPS
    assert found.rows == min(count, choose.SAMPLE_ROWS)
    assert [one["clusters"] for one in found.candidates] == list(choose.CANDIDATES)


@pytest.mark.parametrize(
    "blob",
    [
        lambda rng: rng.standard_normal((3000, 1)),
        lambda rng: rng.standard_normal((3000, 2)),
        lambda rng: rng.uniform(size=(3000, 2)),
        lambda rng: rng.standard_normal((3000, 40)) / np.arange(1, 41) + 7,
    ],
    ids=["line", "plane", "square", "long"],
)
def test_one_blob_is_the_smallest(blob):
    assert chosen(blob(np.random.default_rng(5))).clusters == choose.CANDIDATES[0]


@pytest.mark.parametrize("rows", [np.ones((50, 3)), np.zeros((50, 3)), np.ones((2, 3)), np.ones((1, 3))])
def test_rows_that_are_all_alike_are_one(rows):
    assert chosen(rows).clusters == 1


def test_few_rows_have_few_candidates():
    found = chosen(np.random.default_rng(0).standard_normal((6, 2)))
    assert [one["clusters"] for one in found.candidates] == [2, 3, 4, 5]


def test_scores_are_those_of_scikit_learn():
    rows = np.random.default_rng(0).standard_normal((300, 5))
    rows -= rows.mean(axis=0)
    labels = np.array([0, 1, 1, *np.random.default_rng(1).integers(2, 6, 297)])  # one row is alone
    found = choose._scores(BACKEND, rows, choose._distances(BACKEND, rows), labels, 6)
    assert found["silhouette"] == pytest.approx(silhouette_score(rows, labels), rel=1e-4)
    assert found["calinski_harabasz"] == pytest.approx(calinski_harabasz_score(rows, labels), rel=1e-6)


def catalogue(users=600, items=300, width=16):
    """Users who take several items of one group each, and features in which the groups are parted, or one blob."""
    rng = np.random.default_rng(3)
    values, groups = parted(rng, items, width, 14)
    own = [rng.choice(np.flatnonzero(groups == rng.integers(GROUPS)), rng.integers(2, 6)) for _ in range(users)]
    rows = np.repeat(np.arange(users), [len(one) for one in own])
    R = scipy.sparse.csr_array((np.ones(len(rows)), (rows, np.concatenate(own))), shape=(users, items))
    return R, {"parted": values.astype(np.float32), "blob": rng.standard_normal((items, width)).astype(np.float32)}


@pytest.mark.parametrize("cluster_on", ["users", "items"])
def test_each_modality_has_its_own(cluster_on):
    R, F = catalogue()
    made = gpu_init.initialize(R, F, clusters="auto", cluster_on=cluster_on)
    assert {name: len(one.centroids) for name, one in made.items()} == {"parted": GROUPS, "blob": 2}
    given = gpu_init.initialize(R, {"parted": F["parted"]}, clusters=GROUPS, cluster_on=cluster_on)
    np.testing.assert_array_equal(made["parted"].users, given["parted"].users)


def test_a_job_says_what_was_asked_and_what_came(tmp_path, capsys, monkeypatch):
    R, F = catalogue()
    scipy.sparse.save_npz(tmp_path / "r.npz", R)
    for name, values in F.items():
        np.save(tmp_path / f"{name}.npy", values)
    features = [f"--features={name}={tmp_path}/{name}.npy" for name in F]
    job = ["run", f"--interactions={tmp_path}/r.npz", *features, "--clusters=auto"]
    assert main([*job, f"--out={tmp_path}/out"]) == 0
    assert "silhouette" in capsys.readouterr().out
    manifest = gpu_init.load(tmp_path / "out").manifest
    assert manifest["settings"]["clusters"] == "auto"
    assert manifest["modalities"]["parted"]["clusters"] == GROUPS
    scores = manifest["modalities"]["parted"]["choice"]["candidates"]
    assert max(scores, key=lambda one: one["silhouette"])["clusters"] == GROUPS

    class Killed(Exception):
        pass

    def end(progress, name, *more, **options):  # once both are clustered, and the first is written
        if name == "write blob":
            raise Killed
        return step(progress, name, *more, **options)

    step = Progress.step
    monkeypatch.setattr(Progress, "step", end)
    with pytest.raises(Killed):
        main([*job, f"--out={tmp_path}/again"])
    monkeypatch.setattr(Progress, "step", step)
    assert main([*job, f"--out={tmp_path}/again", "--resume"]) == 0
    assert read.verify(tmp_path / "again") == []
    again = gpu_init.load(tmp_path / "again").manifest
    assert again["files"] == manifest["files"]
    assert again["modalities"] == manifest["modalities"]
