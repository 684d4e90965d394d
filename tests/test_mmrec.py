"""Presets, and runs inside libraries of MMRec's layout: a small one made here, and the real ones where they are.

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
from gpu_init.artifact.read import ModalityArrays
from gpu_init.errors import InputError
from tests import small_library as small

torch = pytest.importorskip("torch")
mmrec = importlib.import_module("gpu_init.mmrec")
Table = importlib.import_module("gpu_init.torch").Table

USERS, ITEMS, WIDTH = 60, 45, 20
LIBRARIES = ("MMRec", "Multimodal-Recommendation-Library")
# What the libraries themselves need beyond what gpu-init does.
NEEDED = ("yaml", "matplotlib", "torch_geometric")


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


# Presets.


def modalities(**widths):
    rng = np.random.default_rng(1)

    def one(width):
        labels = np.zeros(USERS, np.int32)
        labels[-1] = -1
        mask = np.ones(ITEMS, bool)
        users, items = (rng.standard_normal((n, width)).astype(np.float32) for n in (USERS, ITEMS))
        return ModalityArrays(users, users[:2], labels, items, mask)

    return {name: one(width) for name, width in widths.items()}


def model_named(name, **tables):
    """A model of that class name, its tables at dotted paths."""
    model = type(name, (torch.nn.Module,), {})()
    torch.manual_seed(0)
    for path, value in tables.items():
        *parents, last = path.split("__")
        here = model
        for parent in parents:
            if not hasattr(here, parent):
                setattr(here, parent, torch.nn.Module())
            here = getattr(here, parent)
        setattr(here, last, value)
    return model


def as_the_library_has_it(name):
    """Tables as both libraries build them, embedding size 8."""

    def table(rows, width):
        return torch.randn(rows, width, requires_grad=True)

    if name == "MMGCN":
        tables = {"v_gcn__preference": table(USERS, 16), "t_gcn__preference": table(USERS, WIDTH)}
        return model_named(
            name, v_gcn__MLP=torch.nn.Linear(WIDTH, 16), id_embedding=table(USERS + ITEMS, 8), n_users=USERS, **tables
        )
    if name == "DRAGON":
        return model_named(name, **{f"{role}_gcn__preference": table(USERS, 64) for role in "vt"})
    if name == "VBPR":
        return model_named(
            name, u_embedding=torch.nn.Parameter(torch.randn(USERS, 16)), item_linear=torch.nn.Linear(2 * WIDTH, 8)
        )
    return model_named(name, user_embedding=torch.nn.Embedding(USERS, 8))


@pytest.mark.parametrize("name", mmrec.PRESETS)
def test_every_preset_fits_its_model_and_keeps_to_its_norm(name):
    model = as_the_library_has_it(name)
    settings = mmrec.job_settings(mmrec.PRESETS[name], 8)
    width = settings.get("dim", WIDTH)
    assert width in (8, WIDTH, 64)
    paths = {path: path.removesuffix(".weight") for path in mmrec.PRESETS[name].tables}

    def tables():
        found = {path: model.get_submodule(short.rpartition(".")[0]) for path, short in paths.items()}
        values = {path: getattr(one, paths[path].rpartition(".")[2]) for path, one in found.items()}
        return {path: getattr(one, "weight", one).detach().clone() for path, one in values.items()}

    before = tables()
    filled = mmrec.attach(model, modalities(image=width, audio=width))
    after = tables()
    assert set(filled) == set(before)
    for path, specs in filled.items():
        for spec in specs:
            warm = slice(USERS, None) if "items:" in spec.modalities else slice(USERS - 1)
            half = slice(8, None) if spec.columns == "last" else slice(None)
            written = after[path] - before[path] if spec.mode == "add" else after[path]
            own = before[path][warm, half].norm(dim=1).mean()
            wanted = own * (1 if spec.gain == "match" else spec.gain)
            torch.testing.assert_close(written[warm, half].norm(dim=1).mean(), wanted, rtol=1e-4, atol=0)
            mean = written[warm, half].mean(dim=0)
            torch.testing.assert_close(mean, torch.zeros(len(mean)), rtol=0, atol=1e-5 * float(wanted))
            if spec.columns == "last":
                assert not written[:, :8].any()
        assert torch.equal(after[path][USERS - 1], before[path][USERS - 1])  # the cold user keeps the random row


@pytest.mark.parametrize(
    ("names", "roles"),
    [
        (["image", "text"], {"v": "image", "t": "text"}),
        (["audio", "image"], {"v": "image", "t": "audio"}),
        (["audio", "text", "image"], {"v": "image", "t": "text"}),
        (["Visual", "txt"], {"v": "Visual", "t": "txt"}),
        (["a", "b"], {"v": "a", "t": "b"}),
        (["text"], {"t": "text"}),
        (["sound"], {"v": "sound"}),
        (["image"], {"v": "image"}),
    ],
)
def test_roles(names, roles):
    assert mmrec.roles_of(names) == roles


def test_one_modality_fills_what_it_can():
    tables = {"v_gcn.preference": {"modalities": "v", "via": "v_gcn.MLP"}, "t_gcn.preference": "t"}
    preset = mmrec.adjusted(mmrec.PRESETS["MMGCN"], {"tables": tables, "width": "raw"})
    filled = mmrec.attach(as_the_library_has_it("MMGCN"), modalities(image=WIDTH), preset)
    assert list(filled) == ["v_gcn.preference"]
    filled = mmrec.attach(as_the_library_has_it("FREEDOM"), modalities(text=8))
    assert filled["user_embedding.weight"][0].modalities == "text"
    filled = mmrec.attach(
        as_the_library_has_it("FREEDOM"), modalities(image=8, text=8, audio=8), roles={"v": "image", "t": "audio"}
    )
    assert filled["user_embedding.weight"][0].modalities == "image+audio"
    with pytest.raises(InputError, match="none of sound"):
        mmrec.attach(as_the_library_has_it("FREEDOM"), modalities(sound=8), roles={})


def test_presets_are_changed_by_name():
    preset = mmrec.adjusted(
        mmrec.PRESETS["FREEDOM"],
        {
            "tables": {"user_embedding.weight": "v,t", "both": ["v", {"modalities": "items:v", "offset": "users"}]},
            "gain": 0.5,
            "lambda": 0.3,
            "clusters": 32,
            "width": 16,
        },
    )
    assert [one.gain for vectors in preset.tables.values() for one in vectors] == [0.5] * 3
    assert preset.tables["both"][1].offset == "users"
    assert mmrec.job_settings(preset, 64) == {
        "lambda": 0.3,
        "clusters": 32,
        "cluster_on": "interactions",
        "whiten": True,
        "dim": 16,
    }
    beside = mmrec.adjusted(mmrec.PRESETS["FREEDOM"], {"tables": {"user_embedding.weight": "v,t"}})
    assert mmrec.job_settings(beside, 64)["dim"] == 32
    raw = mmrec.adjusted(mmrec.PRESETS["FREEDOM"], {"width": "raw"})
    assert mmrec.job_settings(raw, 64) == {"lambda": 0.5, "clusters": 8, "cluster_on": "interactions"}
    assert mmrec.adjusted(mmrec.PRESETS["VBPR"], {}) == mmrec.PRESETS["VBPR"]
    for changes, said in [
        ({"gian": 1}, "unknown key gian; the keys are"),
        ({"width": 0}, "width: found 0"),
        ({"gain": -1}, "gain: found -1"),
        ({"tables": {"x": {"of": "v"}}}, "wanted are modalities"),
    ]:
        with pytest.raises(InputError, match=said):
            mmrec.adjusted(mmrec.PRESETS["FREEDOM"], changes)
    mixed = mmrec.adjusted(mmrec.PRESETS["FREEDOM"], {"tables": {"x": "v,t", "y": "v"}})
    with pytest.raises(InputError, match="not shared out evenly"):
        mmrec.job_settings(mixed, 64)
    with pytest.raises(InputError, match="no preset for SASRec; there are FREEDOM"):
        mmrec.preset_of("SASRec")


# Data folders.


def test_a_data_folder_is_read_as_it_is(data, tmp_path):
    found = mmrec.read_data(data)
    assert (found.name, found.users, found.items) == ("toy", USERS, ITEMS)
    assert list(found.features) == ["image", "audio"]
    path = mmrec.make(found, {"dim": 4, "clusters": 3}, str(tmp_path / "out"))
    made = gpu_init.load(path)
    assert made["image"].users.shape == (USERS, 4)
    assert np.flatnonzero(made["image"].labels < 0).tolist() == [USERS - 1]  # test rows are not used
    stamp = os.stat(f"{path}/manifest.json").st_mtime_ns
    assert mmrec.make(found, {"dim": 4, "clusters": 3}, path) == path
    assert os.stat(f"{path}/manifest.json").st_mtime_ns == stamp
    mmrec.make(found, {"dim": 5, "clusters": 3}, path, overwrite=True)
    assert gpu_init.load(path)["audio"].users.shape == (USERS, 5)


def test_features_narrower_than_the_model_fill_its_first_columns(data):
    found = mmrec.read_data(data)
    preset, settings = mmrec.fitted(mmrec.PRESETS["DRAGON"], 8, found)
    assert settings["dim"] == WIDTH
    model = as_the_library_has_it("DRAGON")
    before = model.v_gcn.preference.detach().clone()
    mmrec.attach(model, modalities(image=WIDTH, audio=WIDTH), preset)
    assert torch.equal(model.v_gcn.preference[:, WIDTH:], before[:, WIDTH:])
    assert (model.v_gcn.preference != before)[: USERS - 1, :WIDTH].all()
    assert mmrec.fitted(mmrec.PRESETS["FREEDOM"], 8, found) == (
        mmrec.PRESETS["FREEDOM"],
        mmrec.job_settings(mmrec.PRESETS["FREEDOM"], 8),
    )
    with pytest.raises(InputError, match="the vectors are 20 wide, the table 64"):
        mmrec.attach(model, modalities(image=WIDTH, audio=WIDTH))


def test_typed_headers_and_what_is_wrong_with_a_folder(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        mmrec.read_data(tmp_path / "no")
    with pytest.raises(InputError, match="wanted is one .inter file; found are none"):
        mmrec.read_data(tmp_path)
    (tmp_path / "x.inter").write_text("user_id:token\titem_id:token\n0\t1\n")
    with pytest.raises(InputError, match="its columns are user_id:token, item_id:token; wanted are"):
        mmrec.read_data(tmp_path)
    (tmp_path / "x.inter").write_text("user_id:token\titem_id:token\tx_label\n0\t1\t0\n4\t0\t2\n")
    with pytest.raises(InputError, match="no features"):
        mmrec.read_data(tmp_path)
    np.save(tmp_path / "text_feat.npy", np.zeros((2, 3)))
    found = mmrec.read_data(tmp_path)
    assert (found.user_column, found.users, found.items) == ("user_id:token", 5, 2)


def test_epochs_to_a_share_of_the_best():
    outcome = mmrec.Outcome([0.1, 0.5, 0.96, 0.9, 1.0], 5, {}, {}, 0.0, False)
    assert [outcome.epochs_to(share) for share in (0.05, 0.5, 0.95, 1.0)] == [1, 2, 3, 5]
    assert mmrec.Outcome([], 0, {}, {}, 0.0, True).epochs_to(0.95) == 0


def test_values_are_toml_or_text():
    assert mmrec.values_of(["a=1e-4", "b=[1, 2]", "c=add", "d=true", 'e="x"']) == {
        "a": 1e-4,
        "b": [1, 2],
        "c": "add",
        "d": True,
        "e": "x",
    }
    with pytest.raises(InputError, match="KEY=VALUE"):
        mmrec.values_of(["a"])


# Runs.


@pytest.fixture(scope="module")
def small_library(tmp_path_factory):
    return small.write(tmp_path_factory.mktemp("small") / "Small")


def command(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "gpu_init.mmrec", *map(str, arguments)],
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
    assert "audio stands in for it" in done.stdout
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
    import contextlib, io, json, sys
    from gpu_init import mmrec
    for arguments in json.loads(sys.argv[1]):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = mmrec.main(arguments)
        print(json.dumps([code, out.getvalue(), err.getvalue()]))
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
        ([*flags, "--modle", "FREEDOM"], "--help lists what there is"),
        (["--library", tmp_path, "--model", "FREEDOM", "--dataset", "toy", "--make"], "not a checkout of MMRec"),
        (["--library", small_library, "--model", "FREEDOM", "--dataset", "toy", "--make"], "with --data"),
    ]
    given = json.dumps([list(map(str, arguments)) for arguments, _ in cases])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SAY), given], check=True, capture_output=True, text=True
    )
    answers = list(map(json.loads, done.stdout.splitlines()))
    for (_, wanted), (code, out, said) in zip(cases, answers, strict=True):
        assert (code, out) == (2, "")
        assert wanted in said
        assert 1 <= len(said.splitlines()) <= 2
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_no_number_is_told(small_library, data, tmp_path):
    flags = ["--library", small_library, "--model", "FREEDOM", "--dataset", "toy", "--data", data]
    done = command(*flags, "--make", "--artifact", tmp_path / "out", MAKE_NAN="nan")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("loss not") == 2


def test_without_torch_it_says_so():
    code = "import sys, runpy; sys.modules['torch'] = None; "
    for run, status, said in [
        ("runpy.run_module('gpu_init.mmrec', run_name='__main__')", 2, "gpu-init: torch is not installed."),
        ("import gpu_init.torch", 1, "ImportError: torch is not installed, and gpu_init.torch needs it: pip install"),
    ]:
        done = subprocess.run([sys.executable, "-c", code + run], check=False, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (status, "")
        assert said in done.stderr
        assert (len(done.stderr.splitlines()) == 2) == (status == 2)


def test_one_library_at_a_time(small_library, data, tmp_path):
    other = tmp_path / "Other"
    (other / "src" / "utils").mkdir(parents=True)
    (other / "src" / "utils" / "configurator.py").write_text("class Config: ...\n")
    code = f"""
        from gpu_init import mmrec
        mmrec.Library({str(small_library)!r})
        mmrec.Library({str(small_library / "src")!r})
        try:
            mmrec.Library({str(other)!r})
        except mmrec.InputError as error:
            assert "one library at a time" in str(error), error
        else:
            raise SystemExit("taken")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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
