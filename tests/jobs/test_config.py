"""Keys of a job from the file, the environment and flags; wrong ones named with their place."""

import argparse
import io
import json
from dataclasses import fields
from decimal import Decimal

import numpy as np
import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_init import cli, tune
from gpu_init.config import KEYS, MAX_FILE_BYTES, JobConfig, add_flags, load
from gpu_init.errors import InputError
from gpu_init.settings import Settings, settings_to_dict

LEAST = {"interactions": "r.csv", "features": {"image": "i.npy"}, "out": "o"}


def flags(*arguments):
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return vars(parser.parse_args(arguments))


def in_file(folder, text):
    path = folder / "job.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def message(path=None, environ=None, **given):
    with pytest.raises(InputError) as caught:
        load(path, environ or {}, {**({} if path else LEAST), **given})
    assert len(str(caught.value).splitlines()) <= 2
    return str(caught.value)


# Readers.


def test_defaults_are_those_of_the_design():
    config = load(None, {}, LEAST)
    assert config == JobConfig("r.csv", {"image": "i.npy"}, "o", Settings())
    assert settings_to_dict(config.settings) == {
        "lambda": 0.9,
        "tau": None,
        "temperature": None,
        "clusters": 8,
        "cluster_on": "users",
        "cluster_rank": None,
        "weighting": "mean",
        "dim": None,
        "whiten": False,
        "scale": "none",
        "dtype": "float32",
        "seed": 0,
        "restarts": 1,
        "tolerance": 1e-3,
        "kmeans": "auto",
    }


EVERYTHING = {
    "interactions": "r.csv",
    "features": "image=i.npy,audio=a.npy",
    "out": "o",
    "user_column": "user_id:token",
    "item_column": "item",
    "weight_column": "w",
    "time_column": "t",
    "half_life": "30d",
    "where": "x_label == 0",
    "users": "9308",
    "lambda": "shrink",
    "tau": "2.5",
    "clusters": "3",
    "cluster_on": "interactions",
    "cluster_rank": "16",
    "weighting": "sym",
    "dim": "64",
    "whiten": "true",
    "scale": "items",
    "dtype": "float16",
    "seed": "4294967295",
    "restarts": "3",
    "tolerance": "0.25",
    "kmeans": "own",
    "backend": "cpu",
    "valid": "v.csv",
    "valid_where": "x_label == 1",
    "memory": "1.5GiB",
    "scheduler": "tcp://host:8786",
    "resume": "1",
    "overwrite": "yes",
    "log_format": "json",
}
AS_CONFIG = JobConfig(
    interactions="r.csv",
    features={"image": "i.npy", "audio": "a.npy"},
    out="o",
    user_column="user_id:token",
    item_column="item",
    weight_column="w",
    time_column="t",
    half_life="30d",
    where="x_label == 0",
    users=9308,
    settings=Settings(
        "shrink",
        3,
        "interactions",
        "sym",
        64,
        True,
        "items",
        "float16",
        2**32 - 1,
        3,
        0.25,
        "own",
        2.5,
        cluster_rank=16,
    ),
    backend="cpu",
    valid="v.csv",
    valid_where="x_label == 1",
    memory=3 << 29,
    scheduler="tcp://host:8786",
    resume=True,
    overwrite=True,
    log_format="json",
)


APART = {"temperature", "session_column"}  # do not go with tau and user_column


def test_every_key_can_come_from_the_environment():
    assert set(EVERYTHING) | APART == {key.name for key in KEYS}
    config = load(None, {f"GPU_INIT_{name.upper()}": value for name, value in EVERYTHING.items()}, {})
    assert config == AS_CONFIG
    assert list(config.features) == ["image", "audio"]


def test_every_key_can_be_a_flag():
    arguments = ["--features", "image=i.npy", "--features", "audio=a.npy", "--whiten", "--resume", "--overwrite"]
    for name, value in EVERYTHING.items():
        if f"--{name}" not in arguments:
            arguments += ["--" + name.replace("_", "-"), value]
    assert load(None, {}, flags(*arguments)) == AS_CONFIG


def test_every_key_can_stand_in_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    typed = {
        **EVERYTHING,
        "features": AS_CONFIG.features,
        "users": 9308,
        "tau": 2.5,
        "tolerance": 0.25,
        **dict.fromkeys(("whiten", "resume", "overwrite"), True),
        **{name: int(EVERYTHING[name]) for name in ("clusters", "cluster_rank", "dim", "seed", "restarts")},
    }
    for dash in ("_", "-"):
        text = tomli_w.dumps({name.replace("_", dash): value for name, value in typed.items()})
        in_file(tmp_path, text)
        assert load("job.toml", {}, {}) == AS_CONFIG


def test_every_key_lands_in_a_field():
    names = {field.name for kind in (Settings, JobConfig) for field in fields(kind)} - {"settings"}
    assert {key.field for key in KEYS} == names


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path):
    path = in_file(
        tmp_path, 'interactions = "r"\nout = "o"\nclusters = 2\nseed = 2\ndim = 2\nwhiten = true\n[features]\na = "x"'
    )
    config = load(
        path, {"GPU_INIT_SEED": "3", "GPU_INIT_DIM": "3"}, flags("--dim", "4", "--no-whiten", "--features", "b=y")
    )
    assert (config.settings.clusters, config.settings.seed, config.settings.dim, config.settings.whiten) == (
        2,
        3,
        4,
        False,
    )
    assert config.features == {"b": "y"}


def test_flags_not_given_leave_nothing_behind():
    assert flags() == {}
    assert flags("--whiten") == {"whiten": True}


def test_help_names_every_flag():
    parser = argparse.ArgumentParser()
    add_flags(parser)
    out = io.StringIO()
    parser.print_help(out)
    for key in KEYS:
        assert key.flag in out.getvalue()


def test_paths_in_the_file_are_relative_to_its_folder(tmp_path):
    text = (
        'interactions = "sub/*.csv"\nout = "/abs/o"\nusers = "u.txt"\n[features]\na = "a.npy"\nb = "s3://bucket/b.npy"'
    )
    config = load(in_file(tmp_path, text), {}, {})
    assert config.interactions == f"{tmp_path}/sub/*.csv"
    assert config.out == "/abs/o"
    assert config.users == f"{tmp_path}/u.txt"
    assert config.features == {"a": f"{tmp_path}/a.npy", "b": "s3://bucket/b.npy"}
    config = load(in_file(tmp_path, text), {"GPU_INIT_OUT": "there"}, {"users": "7"})
    assert (config.out, config.users) == ("there", 7)


def test_strange_variables_and_empty_ones_are_ignored():
    environ = {"GPU_INIT_KERNELS": "numpy", "GPU_INIT_POD": "7", "GPU_INIT_SEED": "", "CLUSTERS": "0"}
    assert load(None, environ, LEAST) == load(None, {}, LEAST)


# What is wrong.


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("clusters", "0"),
        ("clusters", "8.0"),
        ("clusters", "1_0"),
        ("clusters", ""),
        ("clusters", 8.0),
        ("clusters", True),
        ("clusters", 2**31),
        ("lambda", "1.5"),
        ("lambda", "-0.1"),
        ("lambda", "nan"),
        ("lambda", "shrinks"),
        ("tau", -1),
        ("tau", "shrink"),
        ("temperature", 0),
        ("clusters", "many"),
        ("half_life", "30x"),
        ("half_life", "0d"),
        ("half_life", 0),
        ("half_life", "-1"),
        ("lambda", 10**400),
        ("lambda", True),
        ("dim", "0"),
        ("seed", "-1"),
        ("seed", str(2**32)),
        ("restarts", "0"),
        ("tolerance", "1.5"),
        ("tolerance", -1e-3),
        ("tolerance", "nan"),
        ("kmeans", "sklearn"),
        ("weighting", "Mean"),
        ("weighting", ["mean"]),
        ("cluster_on", "moods"),
        ("whiten", "maybe"),
        ("whiten", 1),
        ("dtype", "float64"),
        ("backend", "gpu"),
        ("log_format", "bar"),
        ("users", "0"),
        ("users", 0),
        ("users", " "),
        ("users", "9" * 40),
        ("memory", "15MiB"),
        ("memory", "4XB"),
        ("memory", "4ib"),
        ("memory", "-4GB"),
        ("memory", 4e9),
        ("out", ""),
        ("out", "a\0b"),
        ("user_column", 3),
    ],
)
def test_a_wrong_value_is_named_with_its_flag(key, value):
    text = message(**{key: value})
    assert text.startswith(f"--{key.replace('_', '-')}: found ")
    assert "wanted is" in text


def test_a_wrong_value_is_named_with_its_place(tmp_path):
    assert message(environ={"GPU_INIT_SEED": "x"}).startswith("GPU_INIT_SEED: found 'x'; wanted is a whole number")
    path = in_file(tmp_path, 'clusters = "8"')
    assert message(path) == f"{path}, key clusters: found '8'; wanted is a whole number, 1 or more, or auto."
    assert message(in_file(tmp_path, "clusters = 0x" + "f" * 5000)).endswith("1 or more, or auto.")
    assert "found a table" in message(in_file(tmp_path, "[lambda]\na = 1"))
    assert "found a value of type date" in message(in_file(tmp_path, "out = 2024-01-31"))


def test_unknown_keys_are_named_with_the_nearest(tmp_path):
    path = in_file(tmp_path, "cluster = 8")
    assert message(path) == f"{path}: unknown key 'cluster'; did you mean clusters?"
    assert "the keys are interactions, features, " in message(in_file(tmp_path, "zzz = 8"))
    assert "user_column is given twice" in message(in_file(tmp_path, 'user-column = "a"\nuser_column = "a"'))


def test_what_is_missing_is_said_at_once():
    with pytest.raises(InputError) as caught:
        load(None, {"GPU_INIT_OUT": "o"}, {})
    assert str(caught.value).startswith("missing: interactions, features.\n")
    assert "--interactions PATH --features NAME=PATH" in str(caught.value)


def test_whitening_needs_a_width():
    assert message(whiten=True).startswith("whiten needs dim")
    with pytest.raises(InputError, match="whiten needs dim"):
        Settings(whiten=True)


def test_a_wrong_condition_is_found_first():
    assert message(where="x ==").startswith("--where: found the end at character 5")


@pytest.mark.parametrize(
    "name", ["", ".a", "a..b", "a.", "interactions", "Interactions", "a/b", "a b", "ä", "x" * 65, "-a", "../a", "a\n"]
)
def test_names_of_modalities_are_safe_names_of_folders(name):
    assert "cannot be the name of a modality" in message(features={name: "x"})


@pytest.mark.parametrize(
    ("features", "says"),
    [
        ({}, "wanted is one NAME=PATH"),
        ([], "wanted is one NAME=PATH"),
        ("a.npy", "wanted is one NAME=PATH"),
        (["a=x", "b"], "wanted is one NAME=PATH"),
        ({"a": ""}, "wanted is one NAME=PATH"),
        ({"a": {"b": "c"}}, "wanted is one NAME=PATH"),
        (["a=x", "a=y"], "'a' is given twice"),
        ({"Image": "x", "image": "y"}, "image is there twice"),
    ],
)
def test_wrong_features(features, says):
    assert says in message(features=features)


def test_features_keep_equals_signs_in_paths():
    assert load(None, {}, {**LEAST, "features": ["a=k=1/x,y.npy"]}).features == {"a": "k=1/x,y.npy"}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"clusters = ", "not TOML: Invalid value (at end of document)."),
        (b"seed = 1\nseed = 2\n", "at line 2"),
        (b"a = " + b"[" * 100_000, "nested too deep"),
        (b"a = " + b"9" * 5000, "not TOML"),
        (b"a = '\xff'", "byte 5 is not UTF-8 text"),
        (b"#" * (MAX_FILE_BYTES + 1), "more than 256 KiB"),
    ],
    ids=range(6),
)
def test_broken_files(tmp_path, content, says):
    path = tmp_path / "job.toml"
    path.write_bytes(content)
    text = message(str(path))
    assert text.startswith(f"{path}: ")
    assert says in text


def test_no_such_file(tmp_path):
    assert str(tmp_path) in message(str(tmp_path / "none.toml"))
    assert str(tmp_path) in message(str(tmp_path))


def test_a_byte_order_mark_is_no_error(tmp_path):
    path = tmp_path / "job.toml"
    path.write_bytes(b"\xef\xbb\xbfseed = 5")
    assert load(str(path), {}, LEAST).settings.seed == 5


@pytest.mark.parametrize(
    ("flags", "environ", "place"),
    [
        (["--scheduler=local"], {}, "--scheduler"),
        ([], {"GPU_INIT_SCHEDULER": "tcp://host:8786"}, "GPU_INIT_SCHEDULER"),
    ],
)
def test_tune_refuses_a_scheduler(tmp_path, monkeypatch, capsys, flags, environ, place):
    monkeypatch.chdir(tmp_path)
    path = in_file(tmp_path, tomli_w.dumps(LEAST))
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["tune", path, *flags]) == 2
    assert capsys.readouterr().err == f"gpu-init: tune runs on one machine; leave {place} out.\n"


def test_tune_ignores_the_scheduler_of_a_job_file(tmp_path, monkeypatch, capsys):
    def tuned(job, *_):
        raise InputError(f"tuned {job.out}")

    monkeypatch.setattr(tune, "tune", tuned)
    path = in_file(tmp_path, tomli_w.dumps({**LEAST, "scheduler": "local"}))
    assert cli.main(["tune", path]) == 2
    said = capsys.readouterr().err
    assert said.count("scheduler") == 1
    assert f"tune runs on one machine; the scheduler in {path} is for run" in said
    assert f"tuned {tmp_path}/o" in said


# Values.


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("800000000", 800_000_000),
        ("4GB", 4 * 10**9),
        ("500 mb", 5 * 10**8),
        ("1.5GiB", 3 << 29),
        ("16MiB", 16 << 20),
        ("2T", 2 * 10**12),
        ("20000 kB", 2 * 10**7),
    ],
)
def test_sizes(text, size):
    assert load(None, {}, {**LEAST, "memory": text}).memory == size


@settings(deadline=None)
@given(
    st.integers(17, 10**6),
    st.sampled_from([("MB", 10**6), ("GB", 10**9), ("MiB", 2**20), ("GiB", 2**30), ("TiB", 2**40)]),
)
def test_sizes_in_every_unit(amount, unit):
    assert load(None, {}, {**LEAST, "memory": f"{Decimal(amount)}{unit[0]}"}).memory == amount * unit[1]


def test_settings_take_numbers_of_numpy_and_keep_plain_ones():
    settings = Settings(lam=np.float32(0.5), clusters=np.int64(4), seed=np.uint32(7), dim=np.int8(3))
    assert settings == Settings(lam=0.5, clusters=4, seed=7, dim=3)
    assert json.loads(json.dumps(settings_to_dict(settings)))["lambda"] == 0.5
    assert str(Settings(lam=-0.0).lam) == "0.0"
    assert type(Settings(lam=1).lam) is float


@pytest.mark.parametrize(
    "wrong", [{"clusters": "8"}, {"clusters": None}, {"lam": None}, {"lam": "0.9"}, {"seed": 1.0}, {"dim": 0}]
)
def test_settings_from_python_are_checked(wrong):
    with pytest.raises(InputError, match=r"^(clusters|lambda|seed|dim): found "):
        Settings(**wrong)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
names = st.sampled_from([key.name for key in KEYS]) | st.text(max_size=8)


@settings(deadline=None)
@given(st.dictionaries(names, anything, max_size=5), st.booleans())
def test_any_mapping_gives_a_job_or_an_input_error(given_values, complete):
    try:
        config = load(None, {}, {**(LEAST if complete else {}), **given_values})
    except InputError as error:
        assert 1 <= len(str(error).splitlines()) <= 2
    else:
        json.dumps(settings_to_dict(config.settings), allow_nan=False)


@settings(deadline=None)
@given(content=st.binary(max_size=60) | st.text(st.sampled_from('ab"=[].{}\n01\\lambda'), max_size=40).map(str.encode))
def test_any_file_gives_a_job_or_an_input_error(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("any") / "job.toml"
    path.write_bytes(content)
    try:
        load(str(path), {}, LEAST)
    except InputError as error:
        assert str(path) in str(error)
