"""`gpu-init assign`: the same users with the same interactions get the same bytes, whoever else there is.

Where it runs other kernels than the job did, they get the same labels, and their vectors to rounding.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import gpu_init
from gpu_init.artifact import read
from gpu_init.cli import main
from gpu_init.show.progress import Progress
from tests.support import oracle

USERS, ITEMS, WIDTH = 300, 60, 8


def log(seed=0):
    """Weighted interactions with times; every user from 1 on has some."""
    rng = np.random.default_rng(seed)
    users = np.concatenate([np.arange(1, USERS), rng.integers(1, USERS, 1200)])
    frame = pd.DataFrame({"user_id": users, "item_id": rng.integers(0, ITEMS, len(users))})
    return frame.assign(w=rng.integers(1, 9, len(users)) / 4, timestamp=rng.integers(0, 10**7, len(users)))


@pytest.fixture
def place(tmp_path):
    rng = np.random.default_rng(1)
    log().to_parquet(tmp_path / "log.parquet")
    values = rng.standard_normal((ITEMS, WIDTH)).astype(np.float32) + 1
    values[5] = np.nan
    np.save(tmp_path / "image.npy", values)
    return tmp_path


def job(place, out, *flags, log="log.parquet", users=f"--users={USERS}"):
    inputs = [f"--interactions={place}/{log}", f"--features=image={place}/image.npy", f"--out={place}/{out}"]
    assert main(["run", *inputs, *filter(None, [users]), *flags]) == 0
    return gpu_init.load(place / out)


def assign(place, source, out, log, *flags):
    return main(["assign", str(place / source), f"--interactions={place}/{log}", f"--out={place}/{out}", *flags])


def half(place):
    """Half the users' interactions, with users that the job has not seen beside them."""
    frame = log()
    new = log(9).query("user_id < 40").assign(user_id=lambda one: one["user_id"] + 1000)
    kept = pd.concat([frame[frame["user_id"] % 2 == 0], new]).sample(frac=1, random_state=0)
    kept.to_parquet(place / "new.parquet")
    return np.unique(kept["user_id"])


FORMS = {
    "mean": (),
    "sym": ("--weighting=sym",),
    "items": ("--cluster-on=items", "--weighting=sym"),
    "projected": ("--dim=4", "--whiten", "--scale=items", "--weighting=sym"),
    "projected items": ("--dim=4", "--cluster-on=items"),
    "shrink": ("--lambda=shrink", "--scale=items"),
    "attention": ("--lambda=attention", "--temperature=0.3", "--cluster-on=items"),
    "auto": ("--clusters=auto",),
    "aged": ("--half-life=20d", "--weight-column=w", "--dtype=float16"),
}


@pytest.mark.parametrize("form", FORMS)
def test_same_users_same_bytes(place, form):
    full = job(place, "full", "--clusters=5", *FORMS[form])
    users = half(place)
    assert assign(place, "full", "new", "new.parquet") == 0
    made = gpu_init.load(place / "new")
    assert read.verify(made.path) == []
    np.testing.assert_array_equal(made.user_ids, users)
    seen = users < USERS
    np.testing.assert_array_equal(made["image"].users[seen], full["image"].users[users[seen]])
    np.testing.assert_array_equal(made["image"].labels[seen], full["image"].labels[users[seen]])
    assert not (made["image"].labels[~seen] == -1).any()
    for part in ("centroids", "items", "item_labels", "item_factors", "cold"):
        np.testing.assert_array_equal(getattr(made["image"], part), getattr(full["image"], part))
    again = assign(place, "new", "again", "log.parquet", f"--users={USERS}")  # by what was assigned, all of them
    assert again == 0
    np.testing.assert_array_equal(gpu_init.load(place / "again")["image"].users, full["image"].users)
    assert gpu_init.load(place / "again")["image"].labels[0] == -1  # who is cold as in the job


@pytest.mark.parametrize(("of_job", "of_assign"), [("numba", "numpy"), ("numpy", "numba")])
@pytest.mark.parametrize("form", FORMS)
def test_other_kernels_same_labels(place, monkeypatch, form, of_job, of_assign):
    monkeypatch.setenv("GPU_INIT_KERNELS", of_job)
    full = job(place, "full", "--clusters=5", *FORMS[form])
    monkeypatch.setenv("GPU_INIT_KERNELS", of_assign)
    assert assign(place, "full", "new", "log.parquet", f"--users={USERS}") == 0
    made = gpu_init.load(place / "new")
    assert [one.manifest["backend"]["kernels"] for one in (full, made)] == [of_job, of_assign]
    np.testing.assert_array_equal(made["image"].labels, full["image"].labels)
    rounding = 1e-6 if full["image"].users.dtype == np.float32 else 1e-3
    oracle.assert_close(made["image"].users, full["image"].users.astype(np.float64), rounding)


def test_ids_of_text_and_items_that_the_job_did_not_have(place):
    frame = log().assign(user_id=lambda one: "u" + one["user_id"].astype(str))
    frame = frame.assign(item_id="i" + frame["item_id"].astype(str))
    frame.to_parquet(place / "text.parquet")
    values = np.load(place / "image.npy")
    table = pd.DataFrame({"item_id": [f"i{i}" for i in range(ITEMS)], "v": list(values)}).iloc[10:]
    table.to_parquet(place / "image.parquet")
    (place / "image.npy").unlink()
    inputs = [f"--interactions={place}/text.parquet", f"--features=image={place}/image.parquet"]
    for form in (("--weighting=sym", "--cluster-on=items"), ("--dim=3",)):
        base = [f"--out={place}/full", "--clusters=4", "--overwrite"]
        assert main(["run", *inputs, *base, *form]) == 0
        full = gpu_init.load(place / "full")
        some = frame[frame["user_id"].isin(["u3", "u7", "u20"])]
        new = pd.DataFrame({"user_id": ["u900", "u900", "u901"], "item_id": ["i20", "a new one", "j"]})
        pd.concat([some[["user_id", "item_id"]], new]).to_parquet(place / "new.parquet")
        assert assign(place, "full", "new", "new.parquet", "--overwrite") == 0
        made = gpu_init.load(place / "new")
        assert made.user_ids.tolist() == ["u20", "u3", "u7", "u900", "u901"]
        rows = [full.user_ids.tolist().index(user) for user in ("u20", "u3", "u7")]
        np.testing.assert_array_equal(made["image"].users[:3], full["image"].users[rows])
        assert made["image"].labels[4] == -1  # nothing of this user's has features
        assert "a new one" in made.item_ids.tolist()


def test_features_are_known_by_their_content(place, capsys):
    job(place, "full", "--clusters=3")
    values = np.load(place / "image.npy")
    (place / "moved").mkdir()
    (place / "image.npy").rename(place / "moved" / "image.npy")
    assert assign(place, "full", "new", "log.parquet") == 2
    assert "image.npy" in capsys.readouterr().err
    given = f"--features=image={place}/moved/image.npy"
    assert assign(place, "full", "new", "log.parquet", given) == 0
    assert "not, byte for byte" not in capsys.readouterr().err
    np.save(place / "image.npy", values + 1)
    assert assign(place, "full", "other", "log.parquet") == 2
    said = capsys.readouterr().err
    assert "image.npy has changed" in said
    assert "--features image=PATH" in said
    assert assign(place, "full", "other", "log.parquet", f"--features=image={place}/image.npy") == 0
    assert "not, byte for byte" in capsys.readouterr().err
    np.save(place / "image.npy", values[:, :4])
    assert assign(place, "full", "third", "log.parquet", f"--features=image={place}/image.npy") == 2
    assert "4 dimensions, but the job's had 8" in capsys.readouterr().err
    assert not (place / "third").exists()


def test_a_projected_artifact_needs_no_features(place, capsys):
    job(place, "full", "--clusters=3", "--dim=2")
    (place / "image.npy").unlink()
    assert assign(place, "full", "new", "log.parquet") == 0
    assert assign(place, "full", "other", "log.parquet", f"--features=image={place}/x.npy") == 2
    assert "leave --features out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--features=text=x.npy"], "no modality text"),
        (["--lambda=0.5"], "unrecognized arguments: --lambda"),
        (["--weight-column=weight"], "no column weight"),
        (["--users=7"], "beyond"),
    ],
)
def test_wrong_flags(place, capsys, flags, words):
    job(place, "full", "--clusters=3")
    capsys.readouterr()
    assert assign(place, "full", "new", "log.parquet", *flags) == 2
    assert words in capsys.readouterr().err
    assert not (place / "new").exists()


def test_wrong_artifacts(place, capsys):
    job(place, "full", "--clusters=3")
    assert assign(place, "full", "full", "log.parquet", "--overwrite") == 2
    assert "is the artifact itself" in capsys.readouterr().err
    assert assign(place, "nowhere", "new", "log.parquet") == 2


def test_the_environment_says_inputs_and_nothing_of_the_settings(place, monkeypatch):
    job(place, "full", "--clusters=3")
    monkeypatch.setenv("GPU_INIT_CLUSTERS", "7")
    monkeypatch.setenv("GPU_INIT_OUT", str(place / "there"))
    assert main(["assign", str(place / "full"), f"--interactions={place}/log.parquet"]) == 0
    assert gpu_init.load(place / "there").manifest["settings"]["clusters"] == 3


def test_a_stopped_one_goes_on(place, monkeypatch):
    job(place, "full", "--clusters=3")
    assert assign(place, "full", "whole", "log.parquet") == 0
    step = Progress.step

    def end(progress, name, *more, **options):
        if name == "write image":
            raise KeyboardInterrupt
        return step(progress, name, *more, **options)

    monkeypatch.setattr(Progress, "step", end)
    assert assign(place, "full", "new", "log.parquet") == 130
    monkeypatch.setattr(Progress, "step", step)
    assert assign(place, "full", "new", "log.parquet", "--resume") == 0
    whole, new = (gpu_init.load(place / name).manifest["files"] for name in ("whole", "new"))
    assert whole == new
    job(place, "full", "--clusters=4", "--overwrite")
    assert assign(place, "full", "new", "log.parquet", "--resume") == 2
