"""The job on real data: every array of the artifact against the method's float64 arithmetic."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse

import gpu_init
from gpu_init.artifact import read
from gpu_init.cli import main
from tests.support import oracle

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "tiktok"
USERS, COLD = 9308, 10

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the TikTok data set is not beside the checkout")


def run(out, *flags):
    features = [f"--features={name}={DATA}/{name}_feat.npy" for name in ("image", "audio")]
    place = [f"--interactions={DATA}/tiktok.inter", f"--users={USERS}", "--where", "x_label == 0", "--out", str(out)]
    assert main(["run", *place, *features, *flags]) == 0
    return read.load(out)


@pytest.fixture(scope="module")
def train():
    table = pd.read_csv(DATA / "tiktok.inter", sep="\t").query("x_label == 0")
    ones = np.ones(len(table))
    return scipy.sparse.coo_array((ones, (table["userID"], table["itemID"])), shape=(USERS, 6710)).tocsr()


def raw(name):
    return np.load(DATA / f"{name}_feat.npy").astype(np.float64)


PROJECTIONS = {"raw": (), "pca": ("--dim=64",), "whitened": ("--dim=64", "--whiten")}


@pytest.mark.parametrize(
    ("weighting", "cluster_on", "projection", "scale"),
    list(itertools.product(["mean", "sym"], ["users", "items"], PROJECTIONS, ["none", "items"])),
)
def test_artifact_is_the_method(tmp_path, train, weighting, cluster_on, projection, scale):
    flags = [f"--weighting={weighting}", f"--cluster-on={cluster_on}", f"--scale={scale}", *PROJECTIONS[projection]]
    tolerance = 0.0 if scale == "none" else 1e-3
    made = run(tmp_path / "out", *flags, f"--tolerance={tolerance}")
    assert read.verify(made.path) == []
    for name, one in made.items():
        F = raw(name)
        if projection != "raw":
            oracle.assert_close(one.items, oracle.projected(F, 64, projection == "whitened"))
            assert one.items_mask.all()
            F = one.items
        expected = oracle.Expected(train, F, np.ones(len(F), bool))
        warm = expected.warm
        assert (~warm).sum() == COLD
        np.testing.assert_array_equal(one.labels == -1, ~warm)
        points, labels = (
            (expected.M[warm], one.labels[warm]) if cluster_on == "users" else (expected.F, one.item_labels)
        )
        oracle.assert_nearest(points, one.centroids, labels)
        said = made.manifest["modalities"][name]
        found = said["kmeans"]
        assert (found["passes"], found["tolerance"]) == (len(found["inertia"]), tolerance)
        if tolerance == 0:
            assert found["stopped"] == "labels"
            oracle.assert_means(points, one.centroids, labels)
        else:
            assert found["inertia"][-2] - found["inertia"][-1] < tolerance * found["inertia"][-1]
        oracle.assert_nearest(expected.M[warm], one.centroids, one.labels[warm])
        X, factor = expected.users(one.centroids, one.labels, one.item_labels, 0.9, weighting, scale)
        oracle.assert_close(one.users, X)
        assert said["scale"] == pytest.approx(factor, rel=1e-6)
        assert (said["warm_users"], said["cold_users"]) == (USERS - COLD, COLD)
        assert said["cluster_sizes"] == np.bincount(one.labels[warm], minlength=8).tolist()
        assert said["norms"]["users"]["mean"] == pytest.approx(np.linalg.norm(X, axis=1).mean(), rel=1e-5)
        assert found["inertia"][-1] == pytest.approx(
            oracle.squared_distances(points, one.centroids).min(axis=1).sum(), rel=1e-5
        )


def test_the_python_call_gives_the_same_bytes(tmp_path, train):
    made = run(tmp_path / "out", "--dim=32", "--clusters=20", "--lambda=0.3", "--seed=5")
    called = gpu_init.initialize(
        train, {name: raw(name).astype(np.float32) for name in ("image", "audio")}, dim=32, clusters=20, lam=0.3, seed=5
    )
    for name, one in made.items():
        for field in ("users", "centroids", "labels", "items"):
            np.testing.assert_array_equal(getattr(one, field), getattr(called[name], field))


def test_half_precision(tmp_path):
    full, half = run(tmp_path / "full"), run(tmp_path / "half", "--dtype=float16")
    for name in full:
        assert half[name].users.dtype == np.float16
        np.testing.assert_array_equal(half[name].users, full[name].users.astype(np.float16))
