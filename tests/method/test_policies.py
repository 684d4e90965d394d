"""Lambda policies: worked by hand, and against float64 loops over the definition."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse

import gpu_init
from gpu_init import tasks
from gpu_init.api import Memory, job_on_arrays
from gpu_init.backend.select import select
from gpu_init.cli import main
from gpu_init.errors import InputError
from gpu_init.method.lambdas import lambda_statistics
from gpu_init.method.matrix import from_matrix
from gpu_init.method.modality import from_array
from gpu_init.parts import LocalParts
from gpu_init.run import weigh_local_part
from gpu_init.settings import Settings
from tests.method.test_method import catalogue
from tests.support import oracle


def found(R, F, lam, *, centroids=None, labels=None, item_labels=None, block_rows=4096, **settings):
    """Lambdas of a policy on given centroids, and what it went by."""
    backend = select("cpu")
    interactions = from_matrix(backend, scipy.sparse.csr_array(R), "R")
    modality = from_array(backend, "image", np.asarray(F, np.float32))
    item_labels = None if item_labels is None else np.asarray(item_labels, np.int32)
    if centroids is None:
        centroids, labels = np.zeros((1, modality.values.shape[1])), np.zeros(interactions.users)
    arrays = Memory(backend)
    arrays.save("image/labels.npy", np.zeros(1) if labels is None else np.asarray(labels, np.int32))
    job = job_on_arrays(backend, interactions, {"image": modality}, Settings(lam=lam, **settings), arrays)
    job = replace(job, parts=LocalParts(one_part(job.parts, 16 * modality.values.shape[1] * block_rows)))
    fitted = tasks.Fitted("image", "tiled", np.asarray(centroids, np.float32), item_labels, np.zeros(1))
    fitted, facts = weigh_local_part(job, modality, fitted)
    [values] = job.parts.map(tasks._lambdas, fitted)
    return SimpleNamespace(values=values, facts=facts)


def one_part(parts, block_bytes):
    process = parts._process
    process.plan = replace(process.plan, bounds=(0, process.plan.users), block_bytes=block_bytes)
    object.__setattr__(process.source, "plan", process.plan)
    return process


def test_shrink_by_hand():
    # Items at 0, 2 and 10, 12. Users: both of the first, both of the second, a single one, nobody's.
    F = [[0.0], [2.0], [10.0], [12.0]]
    R = [[1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]
    one = found(R, F, "shrink")
    # n = 2, 2, 1; means 1, 11, 0; s = 1, 1, 0; within = (2 + 2 + 0) / (1 + 1 + 0) = 2.
    # N = 5, m = (2 + 22 + 0) / 5 = 4.8; sum n (M - m)^2 = 2 * 14.44 + 2 * 38.44 + 23.04 = 128.8;
    # between = (128.8 - 2 * 2) / (5 - 9 / 5) = 39; tau = 2 / 39.
    assert one.facts["within"] == pytest.approx(2)
    assert one.facts["between"] == pytest.approx(39)
    assert one.facts["tau_from"] == "variances"
    tau = 2 / 39
    np.testing.assert_allclose(one.values, [2 / (2 + tau), 2 / (2 + tau), 1 / (1 + tau), 0], rtol=1e-9)
    np.testing.assert_allclose(found(R, F, "shrink", tau=2).values, [0.5, 0.5, 1 / 3, 0])


def test_counts_are_effective_and_of_items_with_the_modality():
    F = [[1.0], [2.0], [np.nan]]
    R = [[3, 1, 9], [2, 2, 0], [0, 5, 7]]  # n = 16/10, 2, 1
    np.testing.assert_allclose(found(R, F, "shrink", tau=1).values, [1.6 / 2.6, 2 / 3, 1 / 2], rtol=1e-9)
    extreme = found([[1e-20, 1, 1e30]], F, "shrink", tau=1).values  # the first is lost beside the second
    np.testing.assert_allclose(extreme, [0.5], rtol=1e-9)


@pytest.mark.parametrize(
    ("R", "F", "median"),
    [
        ([[1, 0, 0], [0, 1, 0], [0, 0, 1]], [[1.0], [2], [7]], 1),  # nobody has two: no variance within
        ([[1, 1, 0], [1, 1, 0], [1, 1, 1]], [[0.0], [2], [1]], 2),  # all means alike: none between
        ([[2, 1, 0]], [[0.0], [2], [1]], 1.8),  # a single user
        ([[1, 1], [1, 1]], [[5.0], [5]], 2),  # nothing varies
    ],
)
def test_tau_is_the_median_count_where_it_is_not_finite(R, F, median):
    one = found(R, F, "shrink")
    assert one.facts["tau_from"] == "median count"
    assert one.facts["tau"] == pytest.approx(median)


def test_tau_finds_the_variances_that_data_were_made_with():
    rng = np.random.default_rng(0)
    users, each, width = 3000, 5, 3  # items of users' own, so that they are drawn apart from each other
    places = rng.standard_normal((users, width)) * 2
    F = (places[:, None] + rng.standard_normal((users, each, width)) * 3).reshape(-1, width)
    weights = rng.integers(1, 4, users * each)
    R = scipy.sparse.csr_array((weights, np.arange(users * each), np.arange(0, users * each + 1, each)))
    one = found(R, F, "shrink")
    assert one.facts["within"] == pytest.approx(9 * width, rel=0.03)
    assert one.facts["between"] == pytest.approx(4 * width, rel=0.06)


def test_attention_by_hand():
    F = [[1.0, 0], [0, 2], [3, 0], [0, 0]]
    R = [[1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 1], [2, 1, 0, 0]]
    C = [[4.0, 0], [1, 1]]
    one = found(R, F, "attention", centroids=C, labels=[0, 0, 0, -1, 0, 1], temperature=0.5)
    half = 0.5**0.5
    s_local = np.array([0, 1, 0, 0, 0, 0])
    # user 0: items along both axes; 1: both along the centroid; 2: one across it; 4: one without a direction;
    # 5: pairs weigh 2 and 1, both at 45 degrees to the centroid.
    s_global = np.array([0.5, 1, 0, 0, 0.5, half])
    expected = 1 / (1 + np.exp(-(s_local - s_global) / 0.5))
    expected[3] = 0  # cold
    np.testing.assert_allclose(one.values, expected, rtol=1e-9)
    assert found(R, F, "attention", centroids=C, labels=[0, 0, 0, -1, 0, 1]).facts["temperature"] == 0.1


def test_attention_on_items_clusters_by_hand():
    F = [[1.0, 0], [0, 2], [np.nan, np.nan]]
    one = found([[3, 1, 8]], F, "attention", centroids=[[1.0, 0], [0, 1]], item_labels=[0, 1, -1], temperature=1.0)
    # G = (3/4, 1/4); sum p f = (3/4, 1/4) too: s_G = |G|; s_L = 0, the items being at right angles.
    assert one.values[0] == pytest.approx(1 / (1 + np.exp(np.hypot(0.75, 0.25))))


def test_a_cold_temperature_stays_finite():
    one = found([[1, 1]], [[1.0, 0], [0, 2]], "attention", centroids=[[1.0, 1]], labels=[0], temperature=1e-6)
    assert one.values[0] == pytest.approx(0, abs=1e-300)


@pytest.mark.parametrize("kernels", ["numba", "numpy"])
@pytest.mark.parametrize(
    ("policy", "cluster_on", "weighting", "projection"),
    list(itertools.product(["shrink", "attention"], ["users", "items"], ["mean", "sym"], [{}, {"dim": 5}])),
)
def test_policies_are_the_definition(monkeypatch, kernels, policy, cluster_on, weighting, projection):
    monkeypatch.setenv("GPU_INIT_KERNELS", kernels)
    R, F = catalogue()
    form = {"cluster_on": cluster_on, "weighting": weighting, "scale": "items"}
    result = gpu_init.initialize(R, F, lam=policy, clusters=5, **form, **projection)
    for name, one in result.items():
        values = F[name].astype(np.float64)
        present = ~np.isnan(values[:, 0])
        expected = oracle.Expected(R, one.items if projection else values, present)
        G = expected.cluster_level(one.centroids, one.labels, one.item_labels)
        lam = oracle.lambdas(policy, expected, G)
        assert 0.01 < lam[expected.warm].std() < 0.5
        X, factor = expected.users(one.centroids, one.labels, one.item_labels, lam, weighting, "items")
        assert one.scale == pytest.approx(factor, rel=1e-6)
        oracle.assert_close(one.users, X)


@pytest.mark.parametrize("policy", ["shrink", "attention"])
def test_blocks_do_not_change_a_bit(policy):
    R, F = catalogue(users=9000)
    whole, parts = (
        found(R, F["text"], policy, centroids=F["text"][:1], labels=np.zeros(9000), block_rows=rows)
        for rows in (1 << 20, 4096)
    )
    np.testing.assert_array_equal(whole.values, parts.values)


def test_statistics_by_hand():
    facts = lambda_statistics(np.array([0.0, 0.5, 1.0, 0.5]), np.array([1, 2, 3.9, 4]))
    assert facts["mean"] == 0.5
    assert facts["quantiles"]["0"] == 0
    assert facts["quantiles"]["0.5"] == 0.5
    assert facts["quantiles"]["1"] == 1
    assert facts["histogram"]["users"] == [1, *[0] * 9, 2, *[0] * 8, 1]
    assert facts["by_count"] == [
        {"from": 1, "users": 1, "mean": 0},
        {"from": 2, "users": 2, "mean": 0.75},
        {"from": 4, "users": 1, "mean": 0.5},
    ]


def test_a_job_says_what_the_lambdas_were(tmp_path, capsys):
    R, F = catalogue()
    scipy.sparse.save_npz(tmp_path / "r.npz", R.tocsr())
    np.save(tmp_path / "text.npy", F["text"])
    job = ["run", f"--interactions={tmp_path}/r.npz", f"--features=text={tmp_path}/text.npy", f"--out={tmp_path}/out"]
    assert main([*job, "--lambda=shrink"]) == 0
    facts = gpu_init.load(tmp_path / "out").manifest["modalities"]["text"]["lambda"]
    assert facts["policy"] == "shrink"
    assert facts["tau_from"] in ("variances", "median count")
    assert sum(facts["histogram"]["users"]) == sum(one["users"] for one in facts["by_count"])
    assert json.dumps(facts["tau"]) in json.dumps(facts)
    assert "shrink, tau" in capsys.readouterr().out
    called = gpu_init.initialize(R, {"text": F["text"]}, lam="shrink")["text"].users
    np.testing.assert_array_equal(gpu_init.load(tmp_path / "out")["text"].users, called)
    assert main([*job, "--lambda=attention", "--temperature=0.2", "--overwrite"]) == 0
    assert gpu_init.load(tmp_path / "out").manifest["modalities"]["text"]["lambda"]["temperature"] == 0.2
    assert main([*job, "--tau=3", "--overwrite"]) == 2
    assert "tau is of lambda shrink" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [{"lam": "shrinks"}, {"lam": 0.5, "tau": 1}, {"lam": "shrink", "temperature": 1}])
def test_wrong_policies(wrong):
    R, F = catalogue()
    with pytest.raises(InputError, match=r"lambda|tau|temperature"):
        gpu_init.initialize(R, F, **wrong)
