"""Runs inside libraries of MMRec's layout: a small one made here, and the real ones where they are.

For the real ones GPU_INIT_LIBRARIES names a folder with fresh checkouts: MMRec (enoche/MMRec) and
Multimodal-Recommendation-Library (Jinfeng-Xu's).
"""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import gpu_init
from gpu_init.errors import InputError
from tests.support import small_library as small

torch = pytest.importorskip("torch")
mmrec = importlib.import_module("gpu_init.mmrec")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
USERS, ITEMS, WIDTH = 60, 45, 20
LIBRARIES = ("MMRec", "Multimodal-Recommendation-Library")
# What the libraries themselves need beyond what gpu-init does.
NEEDED = ("yaml", "matplotlib", "torch_geometric")


@pytest.fixture(scope="module")
def runs():
    """The benchmarks' module, which is in no package."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("mmrec_runs")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data folder in MMRec's layout, without a text; item 44 and user 59 are in no training row."""
    folder = tmp_path_factory.mktemp("data") / "toy"
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = {(user, item): 0 for user in range(USERS - 1) for item in rng.choice(ITEMS - 1, 6, replace=False)}
    rows |= dict.fromkeys([key for key in rows if rng.random() < 0.15], 1)
    rows |= dict.fromkeys([key for key in rows if rng.random() < 0.15], 2)
    for user in range(USERS - 1):  # everybody trains on something
        rows[user, user % (ITEMS - 1)] = 0
    rows[3, ITEMS - 1] = rows[USERS - 1, 5] = 2
    lines = [f"{user}\t{item}\t{label}" for (user, item), label in rows.items()]
    (folder / "toy.inter").write_text("userID\titemID\tx_label\n" + "\n".join(lines) + "\n")
    for name in ("image", "audio"):
        np.save(folder / f"{name}_feat.npy", rng.standard_normal((ITEMS, WIDTH)).astype(np.float16))
    for path in (*folder.iterdir(), folder):
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield folder
    folder.chmod(0o755)


# Data folders.


def test_a_data_folder_is_read_as_it_is(runs, data, tmp_path):
    found = runs.read_data(data)
    assert (found.name, found.users, found.items) == ("toy", USERS, ITEMS)
    assert list(found.features) == ["image", "audio"]
    path = runs.make(found, {"dim": 4, "clusters": 3}, str(tmp_path / "out"))
    made = gpu_init.load(path)
    assert made["image"].users.shape == (USERS, 4)
    assert np.flatnonzero(made["image"].labels < 0).tolist() == [USERS - 1]  # test rows are not used
    stamp = os.stat(f"{path}/manifest.json").st_mtime_ns
    assert runs.make(found, {"dim": 4, "clusters": 3}, path) == path
    assert os.stat(f"{path}/manifest.json").st_mtime_ns == stamp
    runs.make(found, {"dim": 5, "clusters": 3}, path, overwrite=True)
    assert gpu_init.load(path)["audio"].users.shape == (USERS, 5)


def test_features_narrower_than_the_model_keep_their_width(runs, data):
    found = runs.read_data(data)
    preset, settings = runs.fitted(mmrec.PRESETS["DRAGON"], 8, found)
    assert settings["dim"] == WIDTH
    assert preset == mmrec.adjusted(mmrec.PRESETS["DRAGON"], {"columns": "first"})
    assert runs.fitted(mmrec.PRESETS["FREEDOM"], 8, found) == (
        mmrec.PRESETS["FREEDOM"],
        mmrec.job_settings(mmrec.PRESETS["FREEDOM"], 8),
    )


def test_typed_headers_and_what_is_wrong_with_a_folder(runs, tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        runs.read_data(tmp_path / "no")
    with pytest.raises(InputError, match="wanted is one .inter file; found are none"):
        runs.read_data(tmp_path)
    (tmp_path / "x.inter").write_text("user_id:token\titem_id:token\n0\t1\n")
    with pytest.raises(InputError, match="its columns are user_id:token, item_id:token; wanted are"):
        runs.read_data(tmp_path)
    (tmp_path / "x.inter").write_text("user_id:token\titem_id:token\tx_label\n0\t1\t0\n4\t0\t2\n")
    with pytest.raises(InputError, match="no features"):
        runs.read_data(tmp_path)
    np.save(tmp_path / "text_feat.npy", np.zeros((2, 3)))
    found = runs.read_data(tmp_path)
    assert (found.user_column, found.users, found.items) == ("user_id:token", 5, 2)


def test_epochs_to_a_share_of_the_best(runs):
    outcome = runs.Outcome([0.1, 0.5, 0.96, 0.9, 1.0], 5, {}, {}, 0.0, False)
    assert [outcome.epochs_to(share) for share in (0.05, 0.5, 0.95, 1.0)] == [1, 2, 3, 5]
    assert runs.Outcome([], 0, {}, {}, 0.0, True).epochs_to(0.95) == 0


def test_values_are_toml_or_text(runs):
    assert runs.values_of(["a=1e-4", "b=[1, 2]", "c=add", "d=true", 'e="x"']) == {
        "a": 1e-4,
        "b": [1, 2],
        "c": "add",
        "d": True,
        "e": "x",
    }
    with pytest.raises(InputError, match="KEY=VALUE"):
        runs.values_of(["a"])


# Runs.


@pytest.fixture(scope="module")
def small_library(tmp_path_factory):
    return small.write(tmp_path_factory.mktemp("small") / "Small")


def command(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-W", "ignore", str(BENCHMARKS / "mmrec_runs.py"), *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", **environment},
    )


def files_of(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_the_command_trains_both_and_prints_both(small_library, data, tmp_path):
    before = files_of(small_library), files_of(data)
    flags = ["--library", small_library, "--model", "FREEDOM", "--dataset", "toy", "--data", data]
    done = command(*flags, "--make", "--artifact", tmp_path / "out", "--seeds", 1, 2, "--set", "clusters=3")
    assert done.returncode == 0, done.stderr
    assert "Small FREEDOM on toy: learning_rate=0.01\n" in done.stdout
    assert "the model's textual modality is audio" in done.stdout
    assert "lambda=0.5 clusters=3 cluster_on=interactions whiten=True dim=8" in done.stdout
    assert "user_embedding.weight: image+audio, add, gain match, centred" in done.stdout
    assert "noise of the library" not in done.stdout
    rows = [line.split()[1:8:2] for line in done.stdout.splitlines() if line.startswith("│")]
    assert [row[:2] for row in rows] == [["random", "1"], ["initialised", "1"], ["random", "2"], ["initialised", "2"]]
    assert (files_of(small_library), files_of(data)) == before
    again = command(*flags, "--artifact", tmp_path / "out", "--seeds", 1)
    tables = [[line for line in out.splitlines() if line.startswith("│")][:2] for out in (done.stdout, again.stdout)]
    assert tables[0] == tables[1]  # the same seed gives the same runs, whatever ran before


SAY = """
    import json, sys
    sys.path.insert(0, sys.argv[2])
    import gpu_init, mmrec_runs
    for arguments in json.loads(sys.argv[1]):
        try:
            mmrec_runs.main(arguments)
        except gpu_init.InputError as error:
            print(json.dumps(str(error)))
"""


def test_the_command_says_what_is_wrong(small_library, data, tmp_path):
    flags = ["--library", small_library, "--dataset", "toy", "--data", data]
    cases = [
        ([*flags, "--model", "FREEDOM"], "give --artifact DIR"),
        ([*flags, "--model", "LATTICE", "--make"], "Small has no model LATTICE; it has FREEDOM."),
        ([*flags, "--model", "SASRec", "--make"], "no preset for SASRec"),
        ([*flags, "--model", "FREEDOM", "--artifact", tmp_path], "not an artifact"),
        ([*flags, "--model", "FREEDOM", "--make", "--epochs", "0"], "--epochs: found 0"),
        ([*flags, "--model", "FREEDOM", "--make", "--set", "gains=1"], "unknown key gains"),
        (["--library", tmp_path, "--model", "FREEDOM", "--dataset", "toy", "--make"], "not a checkout of MMRec"),
        (["--library", small_library, "--model", "FREEDOM", "--dataset", "toy", "--make"], "with --data"),
    ]
    given = json.dumps([list(map(str, arguments)) for arguments, _ in cases])
    command = [sys.executable, "-c", textwrap.dedent(SAY), given, str(BENCHMARKS)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    for (_, wanted), said in zip(cases, map(json.loads, done.stdout.splitlines()), strict=True):
        assert wanted in said
        assert 1 <= len(said.splitlines()) <= 2
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_no_number_is_told(small_library, data, tmp_path):
    flags = ["--library", small_library, "--model", "FREEDOM", "--dataset", "toy", "--data", data]
    done = command(*flags, "--make", "--artifact", tmp_path / "out", MAKE_NAN="nan")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("loss not") == 2


# The real ones.


def checkout(name):
    folder = Path(os.environ.get("GPU_INIT_LIBRARIES", "no such folder")) / name
    if not folder.is_dir():
        pytest.skip(f"no checkout of {name}: GPU_INIT_LIBRARIES names no folder that has one")
    missing = [one for one in NEEDED if importlib.util.find_spec(one) is None]
    if missing:
        pytest.skip(f"{name} needs {', '.join(missing)}")
    return folder


@pytest.mark.parametrize("model", mmrec.PRESETS)
@pytest.mark.parametrize("name", LIBRARIES)
def test_presets_in_a_fresh_checkout(name, model, data, tmp_path):
    library = checkout(name)
    before = files_of(library)
    flags = ["--library", library, "--model", model, "--dataset", "toy", "--data", data, "--make", "--epochs", 2]
    sizes = ["--config", "embedding_size=16", "feat_embed_dim=16"]
    done = command(*flags, *sizes, "--artifact", tmp_path / "out", "--set", "clusters=3")
    assert done.returncode == 0, done.stderr
    for path in mmrec.PRESETS[model].tables:
        assert f"{path}: " in done.stdout
    rows = [line.split()[1::2] for line in done.stdout.splitlines() if line.startswith("│")]
    assert [row[:3] for row in rows] == [["random", "1", "2"], ["initialised", "1", "2"]]
    assert all(0 <= float(figure) <= 1 for row in rows for figure in row[4:])
    assert files_of(library) == before
