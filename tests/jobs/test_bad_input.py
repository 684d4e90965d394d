"""The command line as a hostile user meets it: bad input is refused in one or two lines."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pytest

from tests.support.bad_features import FEATURES
from tests.support.bad_interactions import BASE, INTERACTIONS, USER_LISTS, arrow, csv, env, flag
from tests.support.jobs import ITEMS, USERS, check_refusal, contents, run

SETTINGS = {
    **{
        f"lambda {value}": (flag("lambda", value), "--lambda", value)
        for value in ("1.5", "-0.1", "nan", "inf", "half", "shrunk")
    },
    **{
        f"clusters {value}": (flag("clusters", value), "--clusters", value)
        for value in ("0", "-1", "2.5", "automatic", "9" * 20)
    },
    "clusters above users": (flag("clusters", str(USERS + 1)), "image", "41", "40", "--clusters"),
    "clusters above warm users": (
        lambda j: (j.flags.update(clusters="6"), j.log(j.frame[j.frame["user_id"] < 5])),
        "image",
        "6 clusters",
        "5",
    ),
    "clusters above items": (lambda j: j.flags.update(clusters=str(ITEMS), cluster_on="items"), "image", "25", "24"),
    "cluster on moods": (flag("cluster_on", "moods"), "--cluster-on", "users, items or interactions"),
    "cluster rank of users": (flag("cluster_rank", "8"), "cluster_rank", "cluster_on interactions"),
    "clusters above users that hang together": (
        lambda j: j.flags.update(clusters="1000", cluster_on="interactions"),
        "1000 clusters",
        "lower --clusters",
    ),
    "weighting": (flag("weighting", "median"), "--weighting", "median", "mean or sym"),
    "scale": (flag("scale", "big"), "--scale", "big"),
    "dtype": (flag("dtype", "float64"), "--dtype", "float64"),
    "backend": (flag("backend", "tpu"), "--backend", "tpu"),
    "dim zero": (flag("dim", "0"), "--dim", "0"),
    "dim above width": (flag("dim", "7"), "dim 7", "6", "image"),
    "dim above rank": (
        lambda j: (j.values.__setitem__((slice(None), 5), j.values[:, 4]), j.array(j.values), j.flags.update(dim="6")),
        "dim 6",
        "5",
        "image",
    ),
    "whiten without dim": (flag("whiten", True), "dim"),
    "seed": (flag("seed", "-1"), "--seed", "-1"),
    "seed too large": (flag("seed", str(2**32)), "--seed"),
    "memory": (flag("memory", "lots"), "--memory", "lots"),
    "memory too small": (flag("memory", "1kB"), "--memory", "16MiB"),
    "log format": (flag("log_format", "xml"), "--log-format", "xml"),
    "flag unknown": (lambda j: j.rest.append("--colour=red"), "--colour=red", "--help"),
    "flag cut short": (lambda j: j.rest.append("--cluster=4"), "unrecognized", "--cluster=4"),
    "flag without value": (lambda j: j.rest.append("--seed"), "--seed"),
    "two job files": (lambda j: j.rest.extend(["a.toml", "b.toml"]), "b.toml"),
    "command unknown": (lambda j: setattr(j, "command", "train"), "train"),
    "nothing given": (lambda j: j.flags.clear(), "interactions", "features", "out", "--out", "GPU_INIT_OUT"),
    "no features given": (lambda j: j.flags.pop("features"), "features", "--features"),
    "where syntax": (flag("where", "rating =="), "--where", "the end"),
    "where open quote": (flag("where", "rating == 'a"), "--where", "character"),
    "where code": (flag("where", "__import__('os').system('true')"), "--where"),
    "where column unknown": (flag("where", "stars > 1"), "log.parquet", "stars", "rating"),
    "where type": (flag("where", "rating == 'a'"), "log.parquet", "rating", "'a'"),
    "where text as number": (
        lambda j: (j.text(csv(j.frame, 8, "1,1,good")), j.flags.update(where="rating > 1")),
        "bad.csv",
        "rating",
        "line 9",
        "good",
    ),
    "where keeps nothing": (flag("where", "rating > 100"), "log.parquet", "--where"),
    "where empty": (flag("where", " "), "--where"),
    "where list column": (
        lambda j: (arrow(j, rating=pa.array([[1.0]] * len(j.frame))), j.flags.update(where="rating > 1")),
        "bad.parquet",
        "rating",
    ),
    "where nested": (flag("where", "(" * 99 + "a == 1" + ")" * 99), "--where", "parenthes"),
    "environment lambda": (env("GPU_INIT_LAMBDA", "2"), "GPU_INIT_LAMBDA", "2"),
    "environment clusters": (env("GPU_INIT_CLUSTERS", "many"), "GPU_INIT_CLUSTERS", "many"),
    "environment features": (env("GPU_INIT_FEATURES", "image.npy"), "GPU_INIT_FEATURES"),
    "environment whiten": (env("GPU_INIT_WHITEN", "maybe"), "GPU_INIT_WHITEN", "maybe"),
    "environment where": (env("GPU_INIT_WHERE", "a b c"), "GPU_INIT_WHERE", "character 3"),
    "environment kernels": (env("GPU_INIT_KERNELS", "fortran"), "GPU_INIT_KERNELS", "fortran"),
    "no job file": (lambda j: j.rest.append(j.path("none.toml")), "none.toml"),
    "job file is a folder": (lambda j: j.rest.append(str(j.folder)), "directory"),
    "toml syntax": (lambda j: j.toml("out = \n"), "job.toml", "line 1"),
    "toml not utf-8": (
        lambda j: (j.write("job.toml", b"out = '\xff'"), j.rest.append(j.path("job.toml"))),
        "job.toml",
        "UTF-8",
    ),
    "toml key unknown": (lambda j: j.toml('clustrs = 3\nout = "out"\n' + BASE), "job.toml", "clustrs", "clusters"),
    "toml key twice": (lambda j: j.toml("seed = 1\nseed = 2\n"), "job.toml", "line 2"),
    "toml lambda text": (lambda j: j.toml('lambda = "0.5"\nout = "out"\n' + BASE), "job.toml", "lambda", "0.5"),
    "toml clusters float": (lambda j: j.toml("clusters = 3.0\n"), "job.toml", "clusters", "3.0"),
    "toml clusters boolean": (lambda j: j.toml("clusters = true\n"), "job.toml", "clusters", "true"),
    "toml whiten number": (lambda j: j.toml("whiten = 1\n"), "job.toml", "whiten"),
    "toml where number": (lambda j: j.toml("where = 1\n"), "job.toml", "where"),
    "toml features empty": (lambda j: j.toml("[features]\n"), "job.toml", "features"),
    "toml features number": (lambda j: j.toml("[features]\nimage = 1\n"), "job.toml", "features"),
    "toml section unknown": (lambda j: j.toml("[settings]\nseed = 1\n"), "job.toml", "settings"),
    "toml of dots": (lambda j: j.toml("a" + ".a" * 50_000 + " = 1\n"), "job.toml", "line 1", "16 parts"),
    "toml of a megabyte": (lambda j: j.toml("#" * (1 << 20)), "job.toml", "KiB"),
    "toml nested": (lambda j: j.toml("a = " + "[" * 9000 + "]" * 9000), "job.toml"),
    "toml where": (lambda j: j.toml('where = "a b"\n'), "job.toml, key where", "character 3"),
    "toml interactions missing": (lambda j: j.toml('interactions = "none.csv"\nout = "out"\n' + BASE), "none.csv"),
}


def other_folder(job):
    job.write("out/notes.txt", "mine")


def stranger(job):
    job.write("out/manifest.json", "{}")
    job.flags["overwrite"] = True


def unwritable(job):
    (job.folder / "locked").mkdir()
    (job.folder / "locked").chmod(0o500)
    job.flags["out"] = job.path("locked/out")
    if os.access(job.path("locked"), os.W_OK):
        pytest.skip("this user writes everywhere")


def link_to_file(job):
    os.symlink(job.path("log.parquet"), job.path("out"))


def in_input_folder(job, out="logs/out"):
    job.write("logs/log.parquet", Path(job.flags["interactions"]).read_bytes())
    job.flags.update(interactions=job.path("logs"), out=job.path(out))


OUTPUTS = {
    "out is a file": (lambda j: j.write("out", "x"), "out", "not a folder"),
    "out is a link to a file": (link_to_file, "is the output, but"),
    "out is another folder": (other_folder, "out", "notes.txt"),
    "out is a stranger": (stranger, "out", "manifest.json"),
    "out is the input's folder": (lambda j: j.flags.update(out=str(j.folder)), "is the output, but", "is an input"),
    "out is the folder of interactions": (lambda j: in_input_folder(j, "logs"), "logs"),
    "out is in the folder of interactions": (in_input_folder, "logs", "inside"),
    "out is an input": (lambda j: j.flags.update(out=j.path("log.parquet")), "log.parquet", "is the output, but"),
    "out is below a file": (lambda j: j.flags.update(out=j.path("log.parquet/out")), "log.parquet"),
    "out is unwritable": (unwritable, "locked", "cannot be written"),
    "out name too long": (lambda j: j.flags.update(out=j.path("x" * 300)), "too long"),
    "out is the root": (flag("out", "/"), "/"),
    "out below nothing that may be made": (flag("out", "/proc/nowhere/out"), "/proc"),
    "partial is somebody else's": (lambda j: j.write("out.partial/notes.txt", "mine"), "out.partial"),
    "partial is a file": (lambda j: j.write("out.partial", "mine"), "out.partial"),
    "demo seed": (
        lambda j: (setattr(j, "command", "demo"), j.flags.clear(), j.rest.append("--seed=-1")),
        "--seed",
        "-1",
    ),
    "demo users": (
        lambda j: (setattr(j, "command", "demo"), j.flags.clear(), j.rest.append("--users=x")),
        "--users",
        "x",
    ),
    "demo folder": (
        lambda j: (setattr(j, "command", "demo"), j.flags.clear(), j.rest.append("--folder=" + j.path("log.parquet"))),
        "log.parquet",
    ),
    "inspect nothing": (
        lambda j: (setattr(j, "command", "inspect"), j.flags.clear(), j.rest.append(j.path("none"))),
        "none",
        "no such folder",
    ),
    "inspect a file": (
        lambda j: (setattr(j, "command", "inspect"), j.flags.clear(), j.rest.append(j.path("log.parquet"))),
        "log.parquet",
    ),
    "inspect a folder": (
        lambda j: (setattr(j, "command", "inspect"), j.flags.clear(), j.rest.append(str(j.folder))),
        "manifest.json",
    ),
    "inspect nul": (lambda j: (setattr(j, "command", "inspect"), j.flags.clear(), j.rest.append("a\0b")), "path"),
    "verify a folder": (
        lambda j: (setattr(j, "command", "inspect"), j.flags.clear(), j.rest.extend([str(j.folder), "--verify"])),
        "manifest.json",
    ),
}

BAD = {**INTERACTIONS, **USER_LISTS, **FEATURES, **SETTINGS, **OUTPUTS}
assert len(BAD) == sum(map(len, (INTERACTIONS, USER_LISTS, FEATURES, SETTINGS, OUTPUTS)))
RESOURCES = {"more users than memory", "npz of more users than memory"}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_a_line_or_two_and_leaves_nothing_behind(name, job, monkeypatch, capfd):
    spoil, *expected = BAD[name]
    spoil(job)
    before = contents(job.folder)
    code, _, err = run(job, monkeypatch, capfd)
    check_refusal(code, err, expected, 3 if name in RESOURCES else 2)
    assert contents(job.folder) == before
