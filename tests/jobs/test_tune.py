"""tune: scores are those of the vectors that a run would write; intervals and ranks worked by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse

import gpu_init
from gpu_init import config, demo, kernels, tune
from gpu_init.backend.select import select
from gpu_init.cli import main
from gpu_init.errors import InputError
from gpu_init.inputs import interactions as inputs_interactions
from gpu_init.inputs.read import item_axis_of, read_features
from gpu_init.kernels import costs
from gpu_init.settings import CLUSTER_ON, Settings
from gpu_init.show.progress import Progress
from gpu_init.site import Data, LocalSite

USERS, ITEMS = 200, 90


def log(seed):
    rng = np.random.default_rng(seed)
    users, items = rng.integers(2, USERS, 900), (ITEMS * rng.random(900) ** 2).astype(int)
    return pd.DataFrame({"user_id": users, "item_id": items, "w": rng.integers(1, 4, 900)}).drop_duplicates(
        ["user_id", "item_id"]
    )


@pytest.fixture
def place(tmp_path):
    """Training and held-out rows; users 0 and 1 have held-out rows alone, so that they are cold."""
    rng = np.random.default_rng(5)
    log(1).to_parquet(tmp_path / "log.parquet")
    more = pd.DataFrame({"user_id": [0, 1, 1], "item_id": [3, 4, 5], "w": 1})
    pd.concat([log(2).head(200), more]).to_parquet(tmp_path / "valid.parquet")
    image, text = rng.standard_normal((ITEMS, 12)) + 0.5, rng.standard_normal((ITEMS, 9))
    image[7] = text[[1, 30]] = np.nan
    np.save(tmp_path / "image.npy", image.astype(np.float32))
    np.save(tmp_path / "text.npy", text.astype(np.float32))
    return tmp_path


def loaded(place, **more):
    features = {name: str(place / f"{name}.npy") for name in ("image", "text")}
    base = {"interactions": str(place / "log.parquet"), "features": features, "out": str(place / "out")}
    return config.load(None, {}, {**base, "users": USERS, "valid": str(place / "valid.parquet"), **more})


CANDIDATES = [
    Settings(lam=0.7, clusters=4),
    Settings(lam=0.7, clusters=4, weighting="sym"),
    Settings(lam=0.3, clusters=5, cluster_on="items"),
    Settings(lam=1.0, clusters=2, dim=6),
    Settings(lam="shrink", clusters=4, dim=6, whiten=True),
    Settings(lam="attention", clusters=4, weighting="sym", dim=6, whiten=True),
    Settings(lam="attention", temperature=0.5, clusters=5, cluster_on="items"),
    Settings(lam="shrink", tau=3.0, clusters=4),
]


def test_scores_are_those_of_the_vectors(place):
    asked = loaded(place, weight_column="w")
    backend, progress = select("cpu"), Progress(None)
    data, held_out = tune.read(asked, backend, progress)
    found = tune.rank(data, held_out, CANDIDATES, 0, progress)
    train, valid = pd.read_parquet(place / "log.parquet"), pd.read_parquet(place / "valid.parquet")
    R = scipy.sparse.csr_array((train["w"], (train["user_id"], train["item_id"])), shape=(USERS, ITEMS))
    F = {name: np.load(place / f"{name}.npy") for name in ("image", "text")}
    seen = R.toarray() > 0
    wanted = np.zeros((USERS, ITEMS), bool)
    wanted[valid["user_id"], valid["item_id"]] = True
    wanted &= ~seen
    np.testing.assert_array_equal(found.users, np.flatnonzero(wanted.any(axis=1)))
    assert {0, 1} <= set(found.users.tolist())
    made = {one: gpu_init.initialize(R, F, **vars(one)) for one in CANDIDATES}
    for at, one in enumerate(found.candidates):
        scores = np.zeros((USERS, ITEMS))
        for name in one.modalities:
            vectors = made[one.settings][name]
            items = F[name] if vectors.items is None else vectors.items
            scores += vectors.users.astype(float) @ np.nan_to_num(items).astype(float).T
        scores[seen] = -np.inf
        for k in (10, 20):
            top = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            hits = np.take_along_axis(wanted, top, axis=1)[found.users]
            counts = wanted[found.users].sum(axis=1)
            gains = 1 / np.log2(np.arange(2, k + 2))
            ideal = np.array([gains[: min(count, k)].sum() for count in counts])
            # float32 and ties may exchange neighbours: of a few users, not of more
            assert np.mean(np.abs(found.scores[f"recall@{k}"][at] - hits.sum(axis=1) / counts) > 1e-9) < 0.02
            assert np.mean(np.abs(found.scores[f"ndcg@{k}"][at] - hits @ gains / ideal) > 1e-9) < 0.05
    assert {one.modalities for one in found.candidates} == {("image",), ("text",), ("image", "text")}


def site_data(place):
    asked, progress = loaded(place), Progress(None)
    found = read_features(asked, progress)
    return LocalSite(select("cpu")).read(asked, found, item_axis_of(found.tables), progress, None)


def test_all_candidates_count_where_kernels_are_chosen(place, monkeypatch):
    one = site_data(place).backend
    assert one.kernels.name == "numpy"
    of_one = costs.fitting_seconds(USERS, ITEMS, len(log(1)), [12, 9], 8)
    monkeypatch.setattr(kernels, "NUMPY_SECONDS", 1.01 * of_one)
    monkeypatch.setattr(inputs_interactions, "reading_seconds", lambda *_: 0.0)
    assert site_data(place).backend.kernels.name == "numpy"
    data, _ = tune.read(loaded(place), select("cpu"), Progress(None))
    assert data.backend.kernels.name == "numba"


def test_metrics_by_hand():
    ranks = np.array([[1.0, 12, 21, 3]])  # user 0 has three held-out items, user 1 one
    found = tune._metrics(ranks, np.array([0, 0, 0, 1]), 2)
    np.testing.assert_allclose(found["recall@10"], [[1 / 3, 1]])
    np.testing.assert_allclose(found["recall@20"], [[2 / 3, 1]])
    best = 1 + 1 / np.log2(3) + 1 / 2
    np.testing.assert_allclose(found["ndcg@20"], [[(1 + 1 / np.log2(13)) / best, 1 / 2]])


def test_standing_is_paired():
    rng = np.random.default_rng(0)
    noise = rng.random(400)
    scores = np.stack([noise, noise + 0.01, rng.random(400) + 0.01, noise + 0.01])
    found = tune.standing(scores)
    assert found.order[0] in (1, 2, 3)
    np.testing.assert_allclose(found.mean, scores.mean(axis=1))
    best = scores[:2]
    pair = tune.standing(best)
    assert list(pair.order) == [1, 0]
    np.testing.assert_allclose([pair.behind_low[0], pair.behind[0], pair.behind_high[0]], 0.01)  # whoever is drawn
    error = noise.std() / 20
    assert pair.high[0] - pair.low[0] == pytest.approx(2 * 1.96 * error, rel=0.15)
    same = tune.standing(scores[[1, 3]])
    assert list(same.order) == [0, 1]  # of equals, the first
    assert same.behind_high[1] == 0


def test_grid():
    own = Settings(lam=0.42, clusters=6, seed=3, restarts=2)
    found = tune.grid(own, {"image": 128, "text": 40}, 50)
    assert found[0] == own
    assert len(found) == len(set(found))
    assert {one.dim for one in found} == {None, 40}
    assert {one.clusters for one in found} == {6, 8, 32}
    assert {one.cluster_on for one in found} == set(CLUSTER_ON)
    assert {one.lam for one in found} == {0.42, *tune.LAMBDAS}
    assert all((one.seed, one.restarts) == (3, 2) for one in found)
    assert sum(one.lam == 1.0 for one in found) == 6
    assert {one.clusters for one in tune.grid(own, {"image": 8}, 3)[1:]} == {3}
    shrunk = tune.grid(Settings(lam="shrink", tau=2), {"image": 8}, 9)
    assert sum(one.tau is not None for one in shrunk) == 1


def test_the_command_on_the_demo(tmp_path, capsys, monkeypatch):
    made = demo.make(tmp_path / "demo", users=600, items=150, seed=0)
    monkeypatch.setattr(tune, "CLUSTERS", (4, 12))
    monkeypatch.setattr(tune, "LAMBDAS", (1.0, 0.5, "shrink"))
    flags = [f"--valid={made.held_out}", f"--folder={tmp_path}/tuned", "--metric=ndcg@10"]
    assert main(["tune", str(made.job), *flags]) == 0
    printed = capsys.readouterr().out
    assert "95%" in printed
    assert "best.toml" in printed
    frame = pd.read_csv(tmp_path / "tuned" / "scores.csv")
    assert frame["ndcg@10"].is_monotonic_decreasing
    assert (frame["low"] <= frame["ndcg@10"]).all()
    assert (frame["ndcg@10"] <= frame["high"]).all()
    assert frame["behind"].iloc[0] == frame["behind_high"].iloc[0] == 0
    monkeypatch.chdir(tmp_path)
    assert main(["run", "tuned/best.toml"]) == 0
    manifest = gpu_init.load(made.job.parent / "vectors").manifest
    best = frame.iloc[0]
    assert manifest["settings"]["weighting"] == best["weighting"]
    assert str(manifest["settings"]["lambda"]) == str(best["lambda"])
    assert manifest["settings"]["dim"] == (None if pd.isna(best["dim"]) else best["dim"])
    assert " + ".join(manifest["modalities"]) == best["modalities"]


def test_ids_of_text_and_rows_that_the_job_does_not_know(place, capsys):
    for name in ("log", "valid"):
        frame = pd.read_parquet(place / f"{name}.parquet")
        frame.assign(user_id="u" + frame["user_id"].astype(str)).to_parquet(place / f"{name}.parquet")
    backend = select("cpu")
    asked = config.load(
        None,
        {"GPU_INIT_VALID": str(place / "valid.parquet")},
        {
            "interactions": str(place / "log.parquet"),
            "features": {"image": str(place / "image.npy")},
            "out": str(place / "out"),
        },
    )
    data, held_out = tune.read(asked, backend, Progress(None))
    train, valid = (pd.read_parquet(place / f"{name}.parquet") for name in ("log", "valid"))
    seen = set(zip(train["user_id"], train["item_id"], strict=True))
    expected = {
        pair
        for pair in zip(valid["user_id"], valid["item_id"], strict=True)
        if pair not in seen and pair[0] in set(train["user_id"])
    }
    users = data.counts.user_ids.to_numpy()[held_out.users]
    assert set(zip(users, held_out.items, strict=True)) == expected


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--valid PATH, or --valid-where"),
        (["--valid-where=user_id < 0"], "none of which --valid-where keeps"),
        (["--valid-where=w > 0"], "no held-out interaction is left"),
        (["--valid-where=w == 1", "--metric=auc"], "--metric"),
        (["--valid=nowhere.csv"], "nowhere.csv"),
    ],
)
def test_wrong_input(place, capsys, flags, words):
    inputs = [f"--interactions={place}/log.parquet", f"--features=image={place}/image.npy", f"--out={place}/out"]
    assert main(["tune", *inputs, f"--folder={place}/tuned", *flags]) == 2
    assert words in capsys.readouterr().err
    assert not (place / "tuned").exists()


def test_a_split_column_wants_valid_where(place):
    frame = pd.read_parquet(place / "log.parquet").assign(x_label=lambda one: one["w"] % 2)
    frame.to_parquet(place / "split.parquet")
    asked = loaded(place, interactions=str(place / "split.parquet"), where="x_label == 0")
    with pytest.raises(InputError, match="--valid-where"):
        tune.read(
            config.load(None, {}, {**inputs_of(asked), "valid": str(place / "split.parquet")}),
            select("cpu"),
            Progress(None),
        )


def inputs_of(asked):
    return {name: getattr(asked, name) for name in ("interactions", "features", "out", "where", "users")}


def test_many_users_are_sampled(place, monkeypatch):
    monkeypatch.setattr(tune, "MOST_USERS", 20)
    backend, progress = select("cpu"), Progress(None)
    data, held_out = tune.read(loaded(place), backend, progress)
    assert isinstance(data, Data)
    found = tune.rank(data, held_out, CANDIDATES[:1], 0, progress)
    assert len(found.users) == found.scores["recall@20"].shape[1] == 20


@pytest.mark.slow
def test_what_is_picked_on_validation_rows_is_not_worse_on_test_rows(tmp_path):
    script = Path(__file__).parents[2] / "benchmarks" / "tune.py"
    command = [sys.executable, str(script), "--quick", "--parts", "pick", "--results", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    [row] = pd.read_csv(tmp_path / "tune.csv").to_dict("records")
    assert row["behind_low"] <= 0 <= row["behind"]
    assert row["picked_test"] > row["median_test"]
