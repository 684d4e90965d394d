"""The command line as a hostile user and a careful one meet it: bad input, equal inputs, signals, terminals."""

from __future__ import annotations

import datetime
import decimal
import gzip
import hashlib
import json
import os
import pty
import re
import resource
import select
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse
from safetensors.numpy import save_file

from gpu_init import cli

USERS, ITEMS, WIDTH = 40, 25, 6
ROOT = Path(__file__).resolve().parents[2]


def interactions(seed=1):
    """Every user and every item at least once, weights in thirds that text keeps exactly, a few duplicates."""
    rng = np.random.default_rng(seed)
    users = np.concatenate([np.arange(USERS), rng.integers(0, USERS, 160)])
    items = np.concatenate([np.arange(USERS) % ITEMS, rng.integers(0, ITEMS, 160)])
    return pd.DataFrame({"user_id": users, "item_id": items, "rating": rng.integers(1, 9, len(users)) / 4})


def image(seed=2):
    values = np.random.default_rng(seed).normal(size=(ITEMS, WIDTH)).astype(np.float32)
    values[3] = np.nan  # an item without the modality
    return values


class Job:
    """A folder with good data, and the flags of a job on it, for a case to spoil."""

    def __init__(self, folder):
        self.folder = folder
        self.frame = interactions()
        self.values = image()
        self.environ = {}
        self.command = "run"
        self.rest = []  # arguments as they stand
        self.flags = {
            "interactions": self.path("log.parquet"),
            "features": [f"image={self.path('image.npy')}"],
            "out": self.path("out"),
            "clusters": "3",
        }
        self.frame.to_parquet(self.flags["interactions"])
        np.save(self.path("image.npy"), self.values)

    def path(self, name):
        return str(self.folder / name)

    def write(self, name, data):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return str(path)

    def log(self, frame, name="bad.parquet"):
        """Take other interactions: a frame, or an Arrow table."""
        self.flags["interactions"] = self.path(name)
        if name.endswith(".parquet"):
            table = frame if isinstance(frame, pa.Table) else pa.Table.from_pandas(frame, preserve_index=False)
            pq.write_table(table, self.path(name))
        else:
            frame.to_csv(self.path(name), index=False, sep="," if ".csv" in name else "\t")

    def text(self, data, name="bad.csv"):
        self.flags["interactions"] = self.write(name, data)

    def features(self, path):
        self.flags["features"] = [f"image={path}"]

    def array(self, values, name="bad.npy"):
        np.save(self.path(name), values)
        self.features(self.path(name))

    def table(self, columns, name="bad_features.parquet"):
        pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), self.path(name))
        self.features(self.path(name))

    def toml(self, text):
        """Settings from a file and from nowhere else."""
        self.flags = {}
        self.rest = [self.write("job.toml", text)]

    @property
    def arguments(self):
        given = [self.command, *self.rest]
        for flag, value in self.flags.items():
            for one in value if isinstance(value, list) else [value]:
                name = "--" + flag.replace("_", "-")
                given += [name] if one is True else [f"{name}={one}"]
        return given


def contents(folder):
    """Every path below a folder, with what it holds."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def job(tmp_path, monkeypatch):
    for name in list(os.environ):
        if name.startswith("GPU_INIT_") and name != "GPU_INIT_KERNELS":
            monkeypatch.delenv(name)
    return Job(tmp_path)


def run(job, monkeypatch, capfd):
    for name, value in job.environ.items():
        monkeypatch.setenv(name, value)
    code = cli.main(job.arguments)
    printed = capfd.readouterr()
    return code, printed.out, printed.err


# Bad input. Each case spoils a good job and says what the message must name.

BASE = '[features]\nimage = "image.npy"\n'


def replaced(frame, column, at, value):
    """Frame with one value replaced in a column of Python objects."""
    column_values = frame[column].tolist()
    column_values[at] = value
    return frame.assign(**{column: column_values})


def csv(frame, at=None, line=None):
    lines = frame.to_csv(index=False).splitlines()
    if at is not None:
        lines[at] = line
    return "\n".join(lines) + "\n"


def npz(job, matrix):
    scipy.sparse.save_npz(job.path("bad.npz"), matrix)
    job.flags["interactions"] = job.path("bad.npz")


def coordinates(job, users=5, row=(0,)):
    """A matrix as scipy would have written it, had somebody else not."""
    arrays = {"row": np.array(row), "col": np.array([0]), "data": np.ones(1), "shape": np.array([users, ITEMS])}
    np.savez(job.path("bad.npz"), **arrays, format=np.array(b"coo"))
    job.flags["interactions"] = job.path("bad.npz")


def arrow(job, **columns):
    base = {name: pa.array(job.frame[name].to_numpy()) for name in job.frame}
    job.log(pa.table({**base, **columns}))


def cut(source, target, share=0.6):
    data = Path(source).read_bytes()
    Path(target).write_bytes(data[: int(len(data) * share)])


def with_users(job, data, name="users.csv"):
    job.flags["users"] = job.write(name, data)


def ids_file(job, ids):
    pq.write_table(pa.table({"item_id": ids, "v": [[1.0, 2.0]] * len(ids)}), job.path("by_id.parquet"))
    job.features(job.path("by_id.parquet"))


HUGE = b"\x93NUMPY\x01\x00\x60\x00" + b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 4)}".ljust(95)
HUGE += b"\n" + bytes(100)


def archive(job, *names, packing=zipfile.ZIP_DEFLATED, content=b""):
    with zipfile.ZipFile(job.path("bad.npz"), "w", packing) as file:
        for name in names:
            file.writestr(name, content)
    job.features(job.path("bad.npz"))


def expanded(job):
    torch = pytest.importorskip("torch")
    torch.save(torch.zeros(1).expand(10**6, 10**6), job.path("bad.pt"))
    job.features(job.path("bad.pt"))


def two(job, other, name="text"):
    np.save(job.path("text.npy"), other)
    job.flags["features"].append(f"{name}={job.path('text.npy')}")


def nothing_readable(job):
    path = Path(job.flags["interactions"])
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user reads everything")


def flag(name, value):
    return lambda job: job.flags.update({name: value})


def env(name, value):
    def spoil(job):
        job.flags.pop(name.removeprefix("GPU_INIT_").lower(), None)
        job.environ[name] = value

    return spoil


INTERACTIONS = {
    "no such file": (lambda j: j.flags.update(interactions=j.path("none.parquet")), "none.parquet", "no such file"),
    "empty path": (flag("interactions", ""), "--interactions", "a path"),
    "empty folder": (
        lambda j: (j.folder.joinpath("hollow").mkdir(), j.flags.update(interactions=j.path("hollow"))),
        "hollow",
        "no files",
    ),
    "glob without match": (lambda j: j.flags.update(interactions=j.path("x*.parquet")), "x*.parquet", "no files"),
    "url": (flag("interactions", "no://bucket/log.parquet"), "no://bucket/log.parquet"),
    "nul": (flag("interactions", "a\0b"), "--interactions"),
    "unreadable": (nothing_readable, "log.parquet", "cannot be read"),
    "name not UTF-8": (
        lambda j: (j.text("", "\udcff.csv"), j.flags.update(interactions=j.path("*.csv"))),
        ".csv",
        "UTF-8",
    ),
    "out not UTF-8": (lambda j: j.flags.update(out=j.path("out\udcff")), "out", "UTF-8"),
    "name with an escape": (lambda j: j.text("user_id,item_id\n", "a\x1b[31m.csv"), "a?[31m.csv", "no rows"),
    "header with an escape": (lambda j: j.text("a\x1b[31m,b\n0,0\n"), "bad.csv", "--user-column"),
    "strange extension": (lambda j: j.text("user_id,item_id\n0,0\n", "log.xlsx"), "log.xlsx", ".parquet"),
    "zero bytes csv": (lambda j: j.text("", "empty.csv"), "empty.csv", "header"),
    "zero bytes parquet": (lambda j: j.text("", "empty.parquet"), "empty.parquet"),
    "zero bytes npz": (lambda j: j.text("", "empty.npz"), "empty.npz"),
    "zero bytes gz": (lambda j: j.text("", "empty.csv.gz"), "empty.csv.gz"),
    "truncated parquet": (
        lambda j: (
            cut(j.path("log.parquet"), j.path("cut.parquet")),
            j.flags.update(interactions=j.path("cut.parquet")),
        ),
        "cut.parquet",
    ),
    "truncated gz": (lambda j: j.text(gzip.compress(csv(j.frame).encode())[:200], "cut.csv.gz"), "cut.csv.gz"),
    "not gz": (lambda j: j.text(csv(j.frame), "plain.csv.gz"), "plain.csv.gz"),
    "truncated npz": (
        lambda j: (
            npz(j, scipy.sparse.eye(5, format="csr")),
            cut(j.path("bad.npz"), j.path("cut.npz")),
            j.flags.update(interactions=j.path("cut.npz")),
        ),
        "cut.npz",
    ),
    "parquet of noise": (lambda j: j.text(bytes(range(256)) * 9, "noise.parquet"), "noise.parquet"),
    "csv named parquet": (lambda j: j.text(csv(j.frame), "text.parquet"), "text.parquet"),
    "parquet named csv": (lambda j: j.text(Path(j.path("log.parquet")).read_bytes(), "binary.csv"), "binary.csv"),
    "header only": (lambda j: j.text("user_id,item_id\n"), "bad.csv", "no rows"),
    "header of parquet only": (lambda j: j.log(j.frame.iloc[:0]), "bad.parquet", "no rows"),
    "no user column": (
        lambda j: j.log(j.frame.rename(columns={"user_id": "who"})),
        "bad.parquet",
        "who",
        "--user-column",
    ),
    "no item column": (
        lambda j: j.log(j.frame.rename(columns={"item_id": "what"})),
        "bad.parquet",
        "what",
        "--item-column",
    ),
    "user column unknown": (flag("user_column", "buyer"), "log.parquet", "buyer", "item_id"),
    "item column unknown": (flag("item_column", "thing"), "log.parquet", "thing", "user_id"),
    "weight column unknown": (flag("weight_column", "stars"), "log.parquet", "stars", "rating"),
    "user column empty": (flag("user_column", " "), "--user-column", "column"),
    "one column twice": (lambda j: j.text("user_id,item_id,item_id\n0,0,0\n"), "bad.csv", "item_id"),
    "user is item": (flag("item_column", "user_id"), "user_id"),
    "no header": (lambda j: j.text("0,1\n1,2\n"), "bad.csv", "--user-column"),
    "null user": (
        lambda j: j.log(replaced(j.frame, "user_id", 7, None).astype({"user_id": "Int64"})),
        "bad.parquet",
        "user_id",
        "row 7",
        "no id",
    ),
    "null item": (
        lambda j: j.log(replaced(j.frame, "item_id", 7, None).astype({"item_id": "Int64"})),
        "bad.parquet",
        "item_id",
        "row 7",
        "no id",
    ),
    "null user in csv": (lambda j: j.text(csv(j.frame, 8, ",3,1")), "bad.csv", "user_id", "line 9", "no id"),
    "null item in tsv": (lambda j: j.text("user_id\titem_id\n0\t0\n1\t\n", "bad.tsv"), "bad.tsv", "item_id", "line 3"),
    "nan user": (
        lambda j: j.log(replaced(j.frame, "user_id", 7, None).astype({"user_id": "float64"})),
        "bad.parquet",
        "user_id",
        "row 7",
    ),
    "float ids": (lambda j: j.log(j.frame.astype({"user_id": "float64"})), "bad.parquet", "user_id"),
    "float ids in csv": (lambda j: j.text(csv(j.frame.astype({"item_id": "float64"}))), "bad.csv", "item_id", "0.0"),
    "item out of range": (
        lambda j: j.log(replaced(j.frame, "item_id", 9, ITEMS)),
        "bad.parquet",
        "item_id",
        "row 9",
        str(ITEMS),
    ),
    "item out of range in csv": (
        lambda j: j.text(csv(j.frame, 9, f"1,{ITEMS},1")),
        "bad.csv",
        "item_id",
        "line 10",
        str(ITEMS),
    ),
    "negative item": (lambda j: j.log(replaced(j.frame, "item_id", 9, -1)), "bad.parquet", "row 9", "-1"),
    "text item": (lambda j: j.text(csv(j.frame, 9, "1,apple,1")), "bad.csv", "line 10", "apple"),
    "item beyond int64": (
        lambda j: j.text(csv(j.frame, 9, "1,99999999999999999999,1")),
        "bad.csv",
        "line 10",
        "99999999999999999999",
    ),
    "uint64 user": (
        lambda j: arrow(j, user_id=pa.array([2**63 + 5] * len(j.frame), pa.uint64())),
        "bad.parquet",
        "user_id",
        "2^63",
    ),
    "timestamp ids": (
        lambda j: arrow(j, user_id=pa.array([datetime.datetime(2026, 1, 1)] * len(j.frame))),
        "bad.parquet",
        "user_id",
        "timestamp",
    ),
    "decimal ids": (
        lambda j: arrow(j, user_id=pa.array([decimal.Decimal("1.5")] * len(j.frame))),
        "bad.parquet",
        "user_id",
        "decimal",
    ),
    "boolean ids": (lambda j: arrow(j, user_id=pa.array([True] * len(j.frame))), "bad.parquet", "user_id", "bool"),
    "binary ids": (lambda j: arrow(j, user_id=pa.array([b"\xff"] * len(j.frame))), "bad.parquet", "user_id", "binary"),
    "list ids": (lambda j: arrow(j, item_id=pa.array([[1]] * len(j.frame))), "bad.parquet", "item_id", "list"),
    "struct ids": (lambda j: arrow(j, item_id=pa.array([{"a": 1}] * len(j.frame))), "bad.parquet", "item_id", "struct"),
    "null typed ids": (lambda j: arrow(j, item_id=pa.nulls(len(j.frame))), "bad.parquet", "item_id", "row 0"),
    "null weight": (
        lambda j: (
            j.log(replaced(j.frame, "rating", 7, None).astype({"rating": "Float64"})),
            j.flags.update(weight_column="rating"),
        ),
        "bad.parquet",
        "rating",
        "row 7",
    ),
    "nan weight": (
        lambda j: (arrow(j, rating=pa.array([float("nan")] * len(j.frame))), j.flags.update(weight_column="rating")),
        "bad.parquet",
        "rating",
        "row 0",
        "nan",
    ),
    "negative weight": (
        lambda j: (j.log(replaced(j.frame, "rating", 7, -1.0)), j.flags.update(weight_column="rating")),
        "bad.parquet",
        "rating",
        "row 7",
        "-1",
    ),
    "infinite weight": (
        lambda j: (j.text(csv(j.frame, 8, "1,1,inf")), j.flags.update(weight_column="rating")),
        "bad.csv",
        "rating",
        "line 9",
        "inf",
    ),
    "huge weight": (
        lambda j: (j.text(csv(j.frame, 8, "1,1,1e300")), j.flags.update(weight_column="rating")),
        "bad.csv",
        "rating",
        "line 9",
        "1e+300",
    ),
    "text weight": (
        lambda j: (j.text(csv(j.frame, 8, "1,1,good")), j.flags.update(weight_column="rating")),
        "bad.csv",
        "rating",
        "line 9",
        "good",
    ),
    "empty weight": (
        lambda j: (j.text(csv(j.frame, 8, "1,1,")), j.flags.update(weight_column="rating")),
        "bad.csv",
        "rating",
        "line 9",
    ),
    "boolean weight": (
        lambda j: (arrow(j, rating=pa.array([True] * len(j.frame))), j.flags.update(weight_column="rating")),
        "bad.parquet",
        "rating",
        "bool",
    ),
    "timestamp weight": (
        lambda j: (
            arrow(j, rating=pa.array([datetime.datetime(2026, 1, 1)] * len(j.frame))),
            j.flags.update(weight_column="rating"),
        ),
        "bad.parquet",
        "rating",
        "timestamp",
    ),
    "list weight": (
        lambda j: (arrow(j, rating=pa.array([[1.0]] * len(j.frame))), j.flags.update(weight_column="rating")),
        "bad.parquet",
        "rating",
        "list",
    ),
    "all weights zero": (
        lambda j: (j.log(j.frame.assign(rating=0.0)), j.flags.update(weight_column="rating")),
        "image",
        "no user",
    ),
    "too few fields": (lambda j: j.text(csv(j.frame, 8, "1")), "bad.csv"),
    "too many fields": (lambda j: j.text(csv(j.frame, 8, "1,1,1,1")), "bad.csv"),
    "open quote": (lambda j: j.text(csv(j.frame, 8, '1,"1,1')), "bad.csv"),
    "not utf-8": (lambda j: j.text(csv(j.frame).encode().replace(b"1,1,", b"\xff\xfe,1,", 1)), "bad.csv", "UTF"),
    "utf-16": (lambda j: j.text(csv(j.frame).encode("utf-16")), "bad.csv", "UTF-8"),
    "header not utf-8": (lambda j: j.text(b"user_id,item_id,\xff\n0,0,0\n"), "bad.csv", "UTF-8"),
    "split column": (lambda j: j.log(j.frame.assign(x_label=0)), "bad.parquet", "x_label", "--where"),
    "split column in inter": (
        lambda j: j.log(j.frame.assign(x_label=0), "bad.inter"),
        "bad.inter",
        "x_label",
        "--where",
    ),
    "mixed folder": (
        lambda j: (
            j.write("mix/a.csv", csv(j.frame)),
            scipy.sparse.save_npz(j.path("mix/b.npz"), scipy.sparse.eye(5, format="csr")),
            j.flags.update(interactions=j.path("mix")),
        ),
        "mix",
        ".npz",
    ),
    "second file without column": (
        lambda j: (
            j.write("mix/a.csv", csv(j.frame)),
            j.write("mix/b.csv", "user_id,thing\n0,0\n"),
            j.flags.update(interactions=j.path("mix")),
        ),
        "b.csv",
        "thing",
    ),
    "second file bad row": (
        lambda j: (
            j.write("mix/a.csv", csv(j.frame)),
            j.write("mix/b.csv", "user_id,item_id\n0,0\n0,77\n"),
            j.flags.update(interactions=j.path("mix")),
        ),
        "b.csv",
        "line 3",
        "77",
    ),
    "npz is features": (
        lambda j: (np.savez(j.path("dense.npz"), j.values), j.flags.update(interactions=j.path("dense.npz"))),
        "dense.npz",
        "sparse",
    ),
    "npz too wide": (
        lambda j: npz(j, scipy.sparse.csr_matrix(([1.0], ([2], [ITEMS])), (4, ITEMS + 1))),
        "bad.npz",
        "user 2",
        str(ITEMS),
    ),
    "npz negative": (
        lambda j: npz(j, scipy.sparse.csr_matrix(([-1.0], ([2], [1])), (4, ITEMS))),
        "bad.npz",
        "(2, 1)",
        "-1",
    ),
    "npz nan": (
        lambda j: npz(j, scipy.sparse.coo_matrix(([np.nan], ([2], [1])), (4, ITEMS))),
        "bad.npz",
        "(2, 1)",
        "nan",
    ),
    "npz complex": (lambda j: npz(j, scipy.sparse.csr_matrix(np.eye(4, ITEMS) * 1j)), "bad.npz", "complex"),
    "npz empty": (lambda j: npz(j, scipy.sparse.csr_matrix((4, ITEMS))), "no user"),
    "npz without users": (lambda j: npz(j, scipy.sparse.csr_matrix((0, ITEMS))), "no"),
    "npz and columns": (
        lambda j: (npz(j, scipy.sparse.eye(5, format="csr")), j.flags.update(user_column="u")),
        "bad.npz",
        "--user-column",
    ),
    "npz and where": (
        lambda j: (npz(j, scipy.sparse.eye(5, format="csr")), j.flags.update(where="x == 1")),
        "bad.npz",
        "--where",
    ),
    "npz and fewer users": (
        lambda j: (npz(j, scipy.sparse.eye(5, ITEMS, format="csr")), j.flags.update(users="4")),
        "bad.npz",
        "--users 4",
    ),
    "npz pickled": (
        lambda j: (
            np.savez(j.path("bad.npz"), data=np.array([{}], object)),
            j.flags.update(interactions=j.path("bad.npz")),
        ),
        "bad.npz",
    ),
    "npz indices outside": (
        lambda j: (
            np.savez(
                j.path("bad.npz"),
                indices=np.array([0, 99]),
                indptr=np.array([0, 1, 2]),
                data=np.ones(2),
                shape=np.array([2, 5]),
                format=np.array(b"csr"),
            ),
            j.flags.update(interactions=j.path("bad.npz")),
        ),
        "bad.npz",
    ),
    "null item after blank lines": (
        lambda j: j.text('user_id,item_id\r\n\r\n"0",0\r\n\r\n"a\r\nb",1\r\n2,\r\n'),
        "bad.csv",
        "line 7",
        "no id",
    ),
    "header without a line end": (lambda j: j.text("user_id,item_id"), "bad.csv", "no rows"),
    "uneven lines": (lambda j: j.text("user_id,item_id\n0,0\n\n1,1,1\n"), "bad.csv", "line 4", "fields"),
    "one line not utf-8": (lambda j: j.text(b"user_id,item_id\n0,0\n\xfcmit,1\n"), "bad.csv", "line 3", "UTF-8"),
    "an enormous line": (lambda j: j.text("user_id,item_id\n0," + "1" * (40 << 20)), "bad.csv", "bytes"),
    "an enormous id": (lambda j: j.text("user_id,item_id\n0," + "1" * 100_000), "bad.csv", "line 2", "111...'"),
    "an enormous header": (lambda j: j.text("user_id,item_id" + ",x" * (1 << 20) + "\n"), "bad.csv", "first line"),
    "a bomb of one line": (
        lambda j: j.text(gzip.compress(b"user_id,item_id\n" + bytes(100_000_000)), "bad.csv.gz"),
        "bad.csv.gz",
        "bytes",
    ),
    "gz with a wrong sum": (
        lambda j: j.text(gzip.compress(csv(j.frame).encode())[:-8] + bytes(8), "bad.csv.gz"),
        "bad.csv.gz",
    ),
    "pipe": (
        lambda j: (os.mkfifo(j.path("pipe.csv")), j.flags.update(interactions=j.path("pipe.csv"))),
        "pipe.csv",
        "neither a file nor a folder",
    ),
    "npz of more users than memory": (lambda j: coordinates(j, users=10**12), "bad.npz", "memory"),
    "npz of fractions": (lambda j: coordinates(j, row=[0.5]), "bad.npz", "row.npy", "whole numbers"),
    "npz of texts": (lambda j: coordinates(j, row=["a"]), "bad.npz", "row.npy", "whole numbers"),
    "npz by ids": (lambda j: (npz(j, scipy.sparse.eye(5, format="csr")), ids_file(j, [0, 1, 2])), "bad.npz", "ids"),
}

USER_LISTS = {
    "too few users": (flag("users", "5"), "log.parquet", "--users 5", "row"),
    "zero users": (flag("users", "0"), "--users", "0"),
    "negative users": (flag("users", "-3"), "--users", "-3", "1 or more"),
    "huge users": (flag("users", "9" * 30), "--users"),
    "more users than memory": (flag("users", str(2**39)), "memory"),
    "text ids and a number": (
        lambda j: (j.log(j.frame.assign(user_id="u" + j.frame["user_id"].astype(str))), j.flags.update(users="99")),
        "bad.parquet",
        "row 0",
        "u0",
    ),
    "no such list": (lambda j: j.flags.update(users=j.path("none.txt")), "none.txt", "no such file"),
    "empty list": (lambda j: with_users(j, "", "users.txt"), "users.txt", "no user ids"),
    "list header only": (lambda j: with_users(j, "user_id\n"), "users.csv", "no user ids"),
    "list with a gap": (lambda j: with_users(j, "1\n\n2\n", "users.txt"), "users.txt", "line 2"),
    "list with one twice": (lambda j: with_users(j, "user_id\n5\n6\n5\n"), "users.csv", "5", "twice"),
    "list without column": (lambda j: with_users(j, "a,b\n5,6\n"), "users.csv", "--user-column"),
    "list misses one": (lambda j: with_users(j, "user_id\n5\n6\n"), "log.parquet", "user", "--users"),
    "list not utf-8": (lambda j: with_users(j, b"\xff\xfe\n", "users.txt"), "users.txt", "UTF"),
    "list is a broken parquet": (lambda j: with_users(j, b"PAR1", "users.parquet"), "users.parquet"),
    "list is noise": (lambda j: with_users(j, b"\x00\x01", "users.npy"), "users.npy", ".txt"),
    "list is a folder": (
        lambda j: (j.folder.joinpath("hollow").mkdir(), j.flags.update(users=j.path("hollow"))),
        "hollow",
    ),
}

FEATURES = {
    "no such features": (lambda j: j.features(j.path("none.npy")), "none.npy", "no such file"),
    "no name": (lambda j: j.flags.update(features=[j.path("image.npy")]), "--features", "NAME=PATH"),
    "empty name": (lambda j: j.flags.update(features=["=" + j.path("image.npy")]), "--features", "modality"),
    "empty features path": (flag("features", ["image="]), "--features"),
    "name with slash": (lambda j: j.flags.update(features=["a/b=" + j.path("image.npy")]), "a/b"),
    "name with dots": (lambda j: j.flags.update(features=["..=" + j.path("image.npy")]), ".."),
    "name twice": (lambda j: j.flags.update(features=j.flags["features"] * 2), "image", "twice"),
    "name twice but for case": (lambda j: j.flags["features"].append("IMAGE=" + j.path("image.npy")), "twice"),
    "modality interactions": (
        lambda j: j.flags.update(features=["interactions=" + j.path("image.npy")]),
        "interactions",
    ),
    **{
        f"modality {name}": (
            lambda j, name=name: j.flags.update(features=[f"{name}=" + j.path("image.npy")]),
            name,
            "choose another",
        )
        for name in (
            "manifest.json",
            "scratch",
            "users.parquet",
            "items.parquet",
            "journal.json",
            "report.html",
            "Manifest.json",
        )
    },
    "strange features": (lambda j: (j.write("image.tar", b"x"), j.features(j.path("image.tar"))), "image.tar", ".npy"),
    "csv features": (
        lambda j: (j.write("image.csv", "a,b\n1,2\n"), j.features(j.path("image.csv"))),
        "image.csv",
        ".npy",
    ),
    "folder without features": (
        lambda j: (j.folder.joinpath("hollow").mkdir(), j.features(j.path("hollow"))),
        "hollow",
    ),
    "folder of two arrays": (
        lambda j: (
            j.folder.joinpath("pair").mkdir(),
            np.save(j.path("pair/a.npy"), j.values),
            np.save(j.path("pair/b.npy"), j.values),
            j.features(j.path("pair")),
        ),
        "pair",
        "2 files",
    ),
    **{
        f"zero bytes {kind}": (
            lambda j, kind=kind: (j.write("empty" + kind, b""), j.features(j.path("empty" + kind))),
            "empty" + kind,
        )
        for kind in (".npy", ".npz", ".parquet", ".safetensors", ".pt")
    },
    **{
        f"noise {kind}": (
            lambda j, kind=kind: (j.write("noise" + kind, bytes(range(256)) * 3), j.features(j.path("noise" + kind))),
            "noise" + kind,
        )
        for kind in (".npy", ".npz", ".parquet", ".safetensors", ".pt")
    },
    "truncated npy": (
        lambda j: (cut(j.path("image.npy"), j.path("cut.npy")), j.features(j.path("cut.npy"))),
        "cut.npy",
        "cut off",
    ),
    "truncated safetensors": (
        lambda j: (
            save_file({"a": j.values}, j.path("a.safetensors")),
            cut(j.path("a.safetensors"), j.path("cut.safetensors")),
            j.features(j.path("cut.safetensors")),
        ),
        "cut.safetensors",
    ),
    "1-d": (lambda j: j.array(j.values[:, 0]), "bad.npy", f"({ITEMS},)"),
    "3-d": (lambda j: j.array(j.values[:, :, None]), "bad.npy", "(25, 6, 1)"),
    "no columns": (lambda j: j.array(j.values[:, :0]), "bad.npy", "(25, 0)"),
    "no items": (lambda j: j.array(j.values[:0]), "bad.npy", "(0, 6)"),
    "integers": (lambda j: j.array(np.ones((ITEMS, 2), int)), "bad.npy", "int64"),
    "texts": (lambda j: j.array(np.full((ITEMS, 2), "x")), "bad.npy", "float32"),
    "objects": (lambda j: j.array(np.full((ITEMS, 2), None)), "bad.npy"),
    "complex": (lambda j: j.array(j.values * 1j), "bad.npy", "complex"),
    "partly nan": (lambda j: (j.values.__setitem__((4, 2), np.nan), j.array(j.values)), "bad.npy", "row 4", "NaN"),
    "all nan": (lambda j: j.array(j.values * np.nan), "bad.npy", "NaN"),
    "infinite": (
        lambda j: (j.values.__setitem__((4, 2), -np.inf), j.array(j.values)),
        "bad.npy",
        "row 4",
        "column 2",
        "inf",
    ),
    "far too large": (
        lambda j: (j.values.__setitem__((4, 2), 1e20), j.array(j.values)),
        "bad.npy",
        "row 4",
        "column 2",
        "1e+20",
    ),
    "float64 beyond float32": (lambda j: j.array(j.values.astype(float) * 1e100), "bad.npy", "row 0"),
    "rows that differ": (lambda j: two(j, image()[:-1]), "image", "text", "25", "24"),
    "several arrays": (
        lambda j: (np.savez(j.path("two.npz"), a=j.values, b=j.values), j.features(j.path("two.npz"))),
        "two.npz",
        "2 arrays",
    ),
    "several tensors": (
        lambda j: (
            save_file({"a": j.values, "b": j.values}, j.path("two.safetensors")),
            j.features(j.path("two.safetensors")),
        ),
        "two.safetensors",
        "2-D",
    ),
    "integer tensor": (
        lambda j: (
            save_file({"a": np.ones((ITEMS, 2), int)}, j.path("int.safetensors")),
            j.features(j.path("int.safetensors")),
        ),
        "int.safetensors",
        "I64",
    ),
    "npz packed otherwise": (lambda j: archive(j, "a.npy", packing=zipfile.ZIP_BZIP2), "bad.npz", "packed"),
    "npz of too many members": (lambda j: archive(j, *map(str, range(30_000))), "bad.npz", "members"),
    "npz of 10^12 rows": (lambda j: archive(j, "a.npy", content=HUGE), "bad.npz", "1000000000000"),
    "10^12 rows": (lambda j: (j.write("huge.npy", HUGE), j.features(j.path("huge.npy"))), "huge.npy", "1000000000000"),
    "expanded tensor": (expanded, "bad.pt", "contiguous"),
    "sparse features": (
        lambda j: (
            scipy.sparse.save_npz(j.path("sparse.npz"), scipy.sparse.eye(5, format="csr")),
            j.features(j.path("sparse.npz")),
        ),
        "sparse.npz",
        "sparse",
    ),
    "ragged lists": (lambda j: j.table({"item_id": [0, 1], "v": [[1.0, 2.0], [1.0]]}), "bad_features.parquet", "row 1"),
    "empty lists": (
        lambda j: j.table({"item_id": [0, 1], "v": pa.array([[], []], pa.list_(pa.float32()))}),
        "bad_features.parquet",
        "empty list",
    ),
    "null in a list": (
        lambda j: j.table({"item_id": [0, 1], "v": [[1.0, None], [1.0, 2.0]]}),
        "bad_features.parquet",
        "row 0",
    ),
    "text column": (
        lambda j: j.table({"item_id": [0, 1], "a": [1.0, 2.0], "title": ["x", "y"]}),
        "bad_features.parquet",
        "title",
    ),
    "lists of text": (lambda j: j.table({"item_id": [0, 1], "v": [["a"], ["b"]]}), "bad_features.parquet", "v"),
    "two list columns": (
        lambda j: j.table({"item_id": [0, 1], "v": [[1.0], [2.0]], "w": [[1.0], [2.0]]}),
        "bad_features.parquet",
        "w",
    ),
    "ids only": (lambda j: j.table({"item_id": [0, 1]}), "bad_features.parquet", "item_id"),
    "item twice": (lambda j: j.table({"item_id": [4, 1, 4], "v": [[1.0]] * 3}), "bad_features.parquet", "4", "twice"),
    "null item id": (
        lambda j: j.table({"item_id": [4, None, 5], "v": [[1.0]] * 3}),
        "bad_features.parquet",
        "item_id",
        "row 1",
    ),
    "decimal features": (
        lambda j: j.table({"item_id": [0, 1], "a": [decimal.Decimal("1.5")] * 2}),
        "bad_features.parquet",
        "decimal",
    ),
    "nested lists": (lambda j: j.table({"item_id": [0, 1], "v": [[[1.0]], [[2.0]]]}), "bad_features.parquet", "list"),
    "no rows of features": (
        lambda j: j.table(pa.table({"item_id": pa.array([], pa.int64()), "v": pa.array([], pa.list_(pa.float32()))})),
        "bad_features.parquet",
        "no rows",
    ),
    "no items in common": (lambda j: ids_file(j, [100, 101]), "log.parquet", "100", "features"),
    "text ids in common with none": (lambda j: ids_file(j, ["a", "b"]), "log.parquet", "features", "'a'"),
    "ids beyond the other's rows": (
        lambda j: (ids_file(j, [0, ITEMS]), j.flags["features"].append("text=" + j.path("image.npy"))),
        "by_id.parquet",
        "row 1",
        str(ITEMS),
    ),
    "text ids beside rows": (
        lambda j: (ids_file(j, ["a", "b"]), j.flags["features"].append("text=" + j.path("image.npy"))),
        "by_id.parquet",
        "text",
    ),
    "no user has it": (
        lambda j: (
            ids_file(j, [0, 1]),
            j.log(j.frame.assign(item_id=1)),
            j.table({"item_id": [0, 1], "v": [[1.0], [float("nan")]]}),
        ),
        "image",
        "no user",
    ),
    "too large for float16": (
        lambda j: (j.array(j.values * 1e6), j.flags.update(dtype="float16")),
        "image",
        "float16",
        "--dtype float32",
    ),
}

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


def check_refusal(code, err, expected, wanted=2):
    found = re.search("^gpu-init: .*", err, re.MULTILINE | re.DOTALL)
    message = found[0] if found else ""
    assert code == wanted, (code, err)
    assert message, err
    assert 1 <= len(message.strip().splitlines()) <= 2, message
    assert len(message) < 700, message
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 11, err
    assert "\x1b" not in message
    for fragment in expected:
        assert fragment in message, (fragment, message)


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_a_line_or_two_and_leaves_nothing_behind(name, job, monkeypatch, capfd):
    spoil, *expected = BAD[name]
    spoil(job)
    before = contents(job.folder)
    code, _, err = run(job, monkeypatch, capfd)
    check_refusal(code, err, expected, 3 if name in RESOURCES else 2)
    assert contents(job.folder) == before


# Good input: what is the same gives the same bytes.


def artifact(job, monkeypatch, capfd, **flags):
    """Run a job; every file of the artifact but the manifest."""
    job.flags.update(flags)
    code, _, err = run(job, monkeypatch, capfd)
    assert code == 0, err
    assert not (job.folder / "out.partial").exists()
    assert not list(job.folder.glob(".*"))
    return {name: digest for name, digest in contents(job.folder / "out").items() if name != "manifest.json"}


def manifest(job):
    return json.loads((job.folder / "out" / "manifest.json").read_text())


def again(job):
    """Forget the artifact."""
    for path in sorted((job.folder / "out").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (job.folder / "out").rmdir()


def shuffled(frame):
    return frame.sample(frac=1, random_state=5)


def split_over_files(job, frame):
    """A folder of three files, in two formats, with pairs that stand in several of them."""
    (job.folder / "logs").mkdir()
    frame.iloc[:50].to_parquet(job.path("logs/a.parquet"))
    frame.iloc[50:120].to_csv(job.path("logs/b.tsv"), sep="\t", index=False)
    (job.folder / "logs" / "deep").mkdir()
    frame.iloc[120:].to_csv(job.path("logs/deep/c.csv.gz"), index=False)
    job.write("logs/_SUCCESS", "")
    job.write("logs/README.md", "not data")
    job.flags["interactions"] = job.path("logs")


def typed(frame):
    return frame.rename(columns={"user_id": "user_id:token", "item_id": "item_id:token", "rating": "rating:float"})


def as_matrix(job, frame):
    npz(job, scipy.sparse.coo_matrix((frame["rating"], (frame["user_id"], frame["item_id"])), (USERS, ITEMS)))
    del job.flags["weight_column"]


def glob_of_parts(job, frame):
    for part in range(4):
        frame.iloc[part::4].to_parquet(job.path(f"part-{part}.parquet"))
    job.flags["interactions"] = job.path("part-*.parquet")


SAME_INTERACTIONS = {
    "shuffled": lambda j, frame: j.log(shuffled(frame)),
    "int32": lambda j, frame: j.log(frame.astype({"user_id": "int32", "item_id": "uint8", "rating": "float32"})),
    "ids as text": lambda j, frame: j.log(frame.astype({"user_id": str, "item_id": str})),
    "ids as categories": lambda j, frame: j.log(frame.astype({"user_id": str}).astype({"user_id": "category"})),
    "columns in another order": lambda j, frame: j.log(frame[["rating", "item_id", "user_id"]].assign(more="x")),
    "csv": lambda j, frame: j.log(shuffled(frame), "log.csv"),
    "csv with BOM and CRLF": lambda j, frame: j.text(b"\xef\xbb\xbf" + csv(frame).replace("\n", "\r\n").encode()),
    "csv with quotes": lambda j, frame: j.text(re.sub(r"(?m)^(\d+),", r'"\1",', csv(frame))),
    "csv without last newline": lambda j, frame: j.text(csv(frame).rstrip("\n")),
    "tsv": lambda j, frame: j.log(frame, "log.tsv"),
    "csv.gz": lambda j, frame: j.log(frame, "log.csv.gz"),
    "inter": lambda j, frame: j.log(frame, "log.inter"),
    "inter with types": lambda j, frame: j.log(typed(shuffled(frame)), "log.inter"),
    "npz": as_matrix,
    "folder": split_over_files,
    "glob": glob_of_parts,
    "where": lambda j, frame: (
        j.log(pd.concat([frame.assign(x_label=0), frame.assign(x_label=1, item_id=1)]), "log.inter"),
        j.flags.update(where="x_label == 0"),
    ),
    "named columns": lambda j, frame: (
        j.log(frame.rename(columns={"user_id": "who", "item_id": "what"})),
        j.flags.update(user_column="who", item_column="what"),
    ),
    "summed before": lambda j, frame: j.log(frame.groupby(["user_id", "item_id"], as_index=False)["rating"].sum()),
}


@pytest.mark.parametrize("form", SAME_INTERACTIONS)
def test_the_same_interactions_in_any_form_give_the_same_bytes(form, job, monkeypatch, capfd):
    wanted = artifact(job, monkeypatch, capfd, weight_column="rating", weighting="sym", scale="items", users=str(USERS))
    again(job)
    SAME_INTERACTIONS[form](job, job.frame)
    assert artifact(job, monkeypatch, capfd) == wanted


def features_of(job, form):
    """The same features in another file; returns flags that must be left out."""
    values, order = job.values, np.random.default_rng(3).permutation(ITEMS)
    kept = order[~np.isnan(values[order, 0])]
    path = job.path("same" + form[form.rindex(".") :])
    match form:
        case ".npz":
            np.savez_compressed(path, values)
        case "f64.npy":
            np.save(path, values.astype(np.float64))
        case "fortran.npy":
            np.save(path, np.asfortranarray(values))
        case "big-endian.npy":
            np.save(path, values.astype(">f4"))
        case ".safetensors":
            save_file({"image": values}, path)
        case ".pt":
            torch = pytest.importorskip("torch")
            torch.save({"image": torch.from_numpy(values)}, path)
        case "lists.parquet":
            pq.write_table(pa.table({"item_id": order, "v": list(values[order])}), path)
        case "columns.parquet":
            columns = {f"v{column}": values[order, column] for column in range(WIDTH)}
            pq.write_table(pa.table({"item_id": order.astype(np.int32), **columns}), path)
        case "null lists.parquet":
            lists = [None if np.isnan(row[0]) else row for row in values[order]]
            pq.write_table(pa.table({"item_id": order, "v": pa.array(lists, pa.list_(pa.float32()))}), path)
        case "no ids.parquet":
            pq.write_table(pa.table({"v": list(values)}), path)
        case "folder.parquet":
            os.mkdir(path)
            for part in range(3):
                rows = kept[part::3]
                pq.write_table(pa.table({"item_id": rows, "v": list(values[rows])}), f"{path}/{part}.parquet")
    job.features(path)


@pytest.mark.parametrize(
    "form",
    [
        ".npz",
        "f64.npy",
        "fortran.npy",
        "big-endian.npy",
        ".safetensors",
        ".pt",
        "no ids.parquet",
        "lists.parquet",
        "columns.parquet",
        "null lists.parquet",
        "folder.parquet",
    ],
)
def test_the_same_features_in_any_file_give_the_same_bytes(form, job, monkeypatch, capfd):
    wanted = artifact(job, monkeypatch, capfd, dim="4", whiten=True)
    again(job)
    features_of(job, form)
    found = artifact(job, monkeypatch, capfd)
    if manifest(job)["items"]["ids"] == "items.parquet":
        ids = pd.read_parquet(job.folder / "out" / "items.parquet")
        assert ids["item_id"].tolist() == ids["row"].tolist() == list(range(ITEMS))
        found.pop("items.parquet")
    assert found == wanted


def test_text_ids_give_the_rows_of_users_parquet(job, monkeypatch, capfd):
    rows = artifact(job, monkeypatch, capfd)
    again(job)
    job.log(shuffled(job.frame.assign(user_id=job.frame["user_id"].map("u{:03}".format))))
    named = artifact(job, monkeypatch, capfd)
    assert named.pop("users.parquet")
    assert named == rows
    table = pd.read_parquet(job.folder / "out" / "users.parquet")
    assert table["user_id"].tolist() == [f"u{user:03}" for user in range(USERS)]
    assert manifest(job)["users"] == {"rows": USERS, "ids": "users.parquet"}


def test_ids_with_gaps_are_sorted_unless_their_number_is_given(job, monkeypatch, capfd):
    job.log(job.frame.assign(user_id=job.frame["user_id"] * 3))
    artifact(job, monkeypatch, capfd)
    table = pd.read_parquet(job.folder / "out" / "users.parquet")
    assert table["user_id"].tolist() == [3 * user for user in range(USERS)]
    packed = np.load(job.folder / "out" / "image" / "users.npy")
    again(job)
    artifact(job, monkeypatch, capfd, users=str(3 * USERS))
    assert not (job.folder / "out" / "users.parquet").exists()
    spread = np.load(job.folder / "out" / "image" / "users.npy")
    np.testing.assert_array_equal(spread[::3], packed)
    labels = np.load(job.folder / "out" / "image" / "labels.npy")
    assert (labels[1::3] == -1).all()
    assert (labels[::3] >= 0).all()
    assert (spread[1::3] == spread[1]).all()


@pytest.mark.parametrize("name", ["users.txt", "users.csv", "users.parquet"])
def test_a_list_of_users_gives_the_rows_and_their_order(name, job, monkeypatch, capfd):
    job.flags["lambda"] = "1"  # the clusters that K-means finds depend on the order of the rows
    artifact(job, monkeypatch, capfd)
    plain = np.load(job.folder / "out" / "image" / "users.npy")
    again(job)
    order = np.random.default_rng(4).permutation(USERS + 5)  # five of them without interactions
    if name == "users.parquet":
        pq.write_table(pa.table({"user_id": order}), job.path(name))
    else:
        job.write(name, ("user_id\n" if name == "users.csv" else "") + "".join(f"{user}\n" for user in order))
    artifact(job, monkeypatch, capfd, users=job.path(name))
    assert pd.read_parquet(job.folder / "out" / "users.parquet")["user_id"].tolist() == order.tolist()
    ordered = np.load(job.folder / "out" / "image" / "users.npy")
    labels = np.load(job.folder / "out" / "image" / "labels.npy")
    assert (labels == -1).sum() == 5
    np.testing.assert_array_equal(ordered[labels >= 0], plain[order[order < USERS]])


def test_flags_environment_and_file_say_the_same(job, monkeypatch, capfd):
    settings = {"lambda": 0.25, "clusters": 4, "weighting": "sym", "dim": 3, "whiten": True, "seed": 9}
    given = {key: value for key, value in job.flags.items() if key != "clusters"}
    job.flags |= {key: value if value is True else str(value) for key, value in settings.items()}
    wanted = artifact(job, monkeypatch, capfd)
    facts = manifest(job)
    again(job)

    job.flags = {}
    job.environ = {f"GPU_INIT_{key.upper()}": str(value) for key, value in settings.items()}
    job.environ |= {f"GPU_INIT_{key.upper()}": value for key, value in given.items() if key != "features"}
    job.environ["GPU_INIT_FEATURES"] = given["features"][0]
    assert artifact(job, monkeypatch, capfd) == wanted
    assert manifest(job)["settings"] == facts["settings"]
    again(job)

    for name in job.environ:
        monkeypatch.delenv(name)
    job.environ = {}
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    job.toml("\n".join(["interactions = 'log.parquet'", "out = 'out'", *lines, "[features]", "image = 'image.npy'"]))
    assert artifact(job, monkeypatch, capfd) == wanted
    assert manifest(job)["settings"] == facts["settings"]


def test_flags_win_over_the_environment_and_that_over_the_file(job, monkeypatch, capfd):
    flags = job.flags
    job.toml("seed = 1\nclusters = 2\nlambda = 0.1\n[features]\nother = 'none.npy'\n")
    job.flags = flags
    job.environ = {"GPU_INIT_SEED": "2", "GPU_INIT_CLUSTERS": "4", "GPU_INIT_DIM": ""}
    artifact(job, monkeypatch, capfd)
    settings = manifest(job)["settings"]
    assert (settings["clusters"], settings["seed"], settings["lambda"], settings["dim"]) == (3, 2, 0.1, None)
    assert list(manifest(job)["modalities"]) == ["image"]


def untimed(job):
    return {key: value for key, value in manifest(job).items() if key not in ("timings", "checksum")}


@pytest.mark.parametrize("cluster_on", ["users", "items", "interactions"])
def test_two_runs_differ_in_their_timings_only(cluster_on, job, monkeypatch, capfd):
    two(job, image(8)[:, :4])
    first = artifact(job, monkeypatch, capfd, cluster_on=cluster_on, dtype="float16", scale="items"), untimed(job)
    again(job)
    assert (artifact(job, monkeypatch, capfd), untimed(job)) == first


def test_an_artifact_is_replaced_only_when_asked(job, monkeypatch, capfd):
    first = artifact(job, monkeypatch, capfd)
    before = contents(job.folder)
    code, _, err = run(job, monkeypatch, capfd)
    check_refusal(code, err, ["out", "--overwrite"])
    job.flags.update(resume=True, seed="5")
    code, _, err = run(job, monkeypatch, capfd)
    check_refusal(code, err, ["out", "seed", "--overwrite"])
    assert contents(job.folder) == before
    job.flags.update(seed="0")
    assert artifact(job, monkeypatch, capfd) == first  # --resume, and nothing to do
    assert contents(job.folder) == before
    del job.flags["resume"]
    assert artifact(job, monkeypatch, capfd, overwrite=True, **{"lambda": "0.5"}) != first
    broken = dict(job.flags, user_column="nobody")
    before = contents(job.folder)
    job.flags = broken
    assert run(job, monkeypatch, capfd)[0] == 2
    assert contents(job.folder) == before  # bad input, and the old artifact stands


def inspect(job, monkeypatch, capfd, *arguments):
    job.command, job.flags, job.rest = "inspect", {}, [job.path("out"), *arguments]
    return run(job, monkeypatch, capfd)


def test_inspect_shows_what_a_run_wrote(job, monkeypatch, capfd):
    artifact(job, monkeypatch, capfd)
    code, out, err = inspect(job, monkeypatch, capfd)
    assert (code, err) == (0, "")
    for fragment in ("40, ids: row numbers", "25, ids: row numbers", "24 with features, 1 without", "image/users.npy"):
        assert fragment in out
    code, out, _ = inspect(job, monkeypatch, capfd, "--json")
    assert code == 0
    assert json.loads(out) == manifest(job)
    code, out, _ = inspect(job, monkeypatch, capfd, "--verify")
    assert code == 0
    assert "every file matches its hash" in out


@pytest.mark.parametrize("name", ["image/users.npy", "image/labels.npy", "image/centroids.npy", "manifest.json"])
def test_a_bit_that_flips_is_found(name, job, monkeypatch, capfd):
    artifact(job, monkeypatch, capfd)
    path = job.folder / "out" / name
    data = bytearray(path.read_bytes())
    data[-10] ^= 1
    path.write_bytes(data)
    code, _, err = inspect(job, monkeypatch, capfd, "--verify")
    check_refusal(code, err, [os.path.basename(name)])


def test_json_lines_parse_also_when_the_job_fails(job, monkeypatch, capfd):
    job.flags["log_format"] = "json"
    code, _, err = run(job, monkeypatch, capfd)
    assert code == 0
    events = [json.loads(line) for line in err.splitlines()]
    assert len(events) >= 8
    job.flags.update(overwrite=True, clusters="41")
    code, _, err = run(job, monkeypatch, capfd)
    assert code == 2
    events = [json.loads(line) for line in err.splitlines()]
    assert events[-1]["event"] == "error"
    assert "41 clusters" in events[-1]["message"]


@pytest.mark.parametrize("arguments", [["doctor"], ["doctor", "--json"], ["--version"], ["--help"], ["run", "--help"]])
def test_commands_that_only_tell(arguments, capfd):
    try:
        code = cli.main(arguments)
    except SystemExit as end:
        code = end.code
    printed = capfd.readouterr()
    assert code in (0, None)
    assert printed.out
    assert printed.err == ""
    if "--json" in arguments:
        assert {"python", "numpy"} <= {line["name"] for line in json.loads(printed.out)}


# The process: signals, streams, terminals.


def spawn(job, **options):
    environ = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    return subprocess.Popen(
        [sys.executable, "-m", "gpu_init", *job.arguments],
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=options.pop("stdout", subprocess.PIPE),
        stderr=options.pop("stderr", subprocess.PIPE),
        **options,
    )


def finish(job, **options):
    process = spawn(job, **options)
    out, err = process.communicate(timeout=120)
    return process.returncode, (out or b"").decode(), (err or b"").decode()


def test_bad_input_of_a_process(job):
    job.flags["clusters"] = "99"
    before = contents(job.folder)
    code, out, err = finish(job)
    check_refusal(code, err, ["image", "99 clusters"])
    assert out == ""
    assert contents(job.folder) == before


def test_threads_do_not_change_a_byte(job):
    found = []
    for threads in ("1", "2"):
        job.flags["out"] = job.path(f"out{threads}")
        code, _, err = finish(job, env={"NUMBA_NUM_THREADS": threads, "OMP_NUM_THREADS": threads})
        assert code == 0, err
        found.append({k: v for k, v in contents(Path(job.flags["out"])).items() if k != "manifest.json"})
    assert found[0] == found[1]


def test_streams_that_are_closed(job):
    code, _, _ = finish(job, preexec_fn=lambda: [os.close(stream) for stream in (0, 1, 2)], stdout=None, stderr=None)
    assert code == 0
    job.command, job.flags, job.rest = "inspect", {}, [job.path("out"), "--verify"]
    code, _, err = finish(job)
    assert code == 0, err
    for arguments in (["inspect", job.path("out")], ["inspect", job.path("out"), "--json"], ["doctor"]):
        reader, writer = os.pipe()
        os.close(reader)
        job.command, *job.rest = arguments
        code, _, err = finish(job, stdout=writer)
        os.close(writer)
        assert code == 128 + signal.SIGPIPE
        assert err == ""


def test_a_full_disk_is_a_matter_of_resources(job):
    job.array(np.random.default_rng(0).normal(size=(ITEMS, 2000)))
    limit = (100_000, 100_000)
    code, _, err = finish(job, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    check_refusal(code, err, ["out.partial", "320,000 bytes are needed"], 3)
    assert not (job.folder / "out").exists()
    job.flags["resume"] = True
    assert finish(job)[0] == 0
    job.command, job.flags, job.rest = "inspect", {}, [job.path("out"), "--json"]
    with open("/dev/full", "wb") as full:
        code, _, err = finish(job, stdout=full)
    check_refusal(code, err, ["standard output", "No space left"], 3)


def test_a_terminal_sees_a_bar_and_is_left_clean(job):
    terminal, inside = pty.openpty()
    process = spawn(job, stdout=inside, stderr=inside, env={"TERM": "xterm", "COLUMNS": "80"})
    os.close(inside)
    seen = bytearray()
    while process.poll() is None or select.select([terminal], [], [], 0.2)[0]:
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                seen += os.read(terminal, 65536)
            except OSError:  # the other end is closed
                break
    os.close(terminal)
    assert process.wait(60) == 0
    text = seen.decode()
    assert "write image" in text
    assert "\x1b[2K" in text or "\r" in text
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l") or "\x1b[?25l" not in text  # the cursor is back
    assert "Traceback" not in text


def ask_for_json(job, place):
    if place == "flag":
        job.rest += ["--log-format=json"]
    elif place == "variable":
        job.environ["GPU_INIT_LOG_FORMAT"] = "json"
    else:
        job.rest += [job.write("json.toml", 'log-format = "json"')]


@pytest.mark.parametrize(
    ("spoil", "places"),
    [
        (lambda job: job.flags.update(clusters="0"), ("flag", "variable", "file")),
        (lambda job: job.flags.pop("interactions"), ("flag", "variable", "file")),
        (lambda job: job.flags.update(nonsense="1"), ("variable",)),  # no flag has been understood
        (lambda job: vars(job).update(command="inspect", rest=["missing"], flags={}), ("variable",)),
    ],
)
def test_what_is_wrong_with_the_settings_is_json_where_they_ask_for_it(spoil, places, tmp_path, monkeypatch, capfd):
    for place in places:
        (tmp_path / place).mkdir()
        job = Job(tmp_path / place)
        spoil(job)
        ask_for_json(job, place)
        with monkeypatch.context() as patch:
            code, _, err = run(job, patch, capfd)
        said = json.loads(err)
        assert (code, said["event"], said["level"]) == (2, "error", "error")
        assert said["message"]


@pytest.mark.parametrize("place", ["--log-format=bar", "GPU_INIT_LOG_FORMAT", "file"])
def test_a_wrong_log_format_is_told_as_text(place, job, monkeypatch, capfd):
    if place == "file":
        job.rest.append(job.write("job.toml", 'log_format = "bar"'))
    elif place.startswith("--"):
        job.rest.append(place)
    else:
        job.environ[place] = "bar"
    code, _, err = run(job, monkeypatch, capfd)
    check_refusal(code, err, ["found 'bar'"])


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A job long enough to be stopped, in two groups that K-means finds at once, and its undisturbed artifact."""
    job = Job(tmp_path_factory.mktemp("work"))
    rng = np.random.default_rng(6)
    users, items, degree = 150_000, 400, 4
    values = rng.normal(size=(items, 384)).astype(np.float32)
    values[::2] += 3
    ids = np.repeat(np.arange(users), degree)
    chosen = 2 * rng.integers(0, items // 2, len(ids)) + ids % 2
    job.log(pd.DataFrame({"user_id": ids, "item_id": chosen}), "work.parquet")
    job.array(values, "work.npy")
    job.flags.update(clusters="2", memory="160MiB", log_format="json", out=job.path("undisturbed"))
    code, _, err = finish(job)
    assert code == 0, err
    return job, {name: value for name, value in contents(job.folder / "undisturbed").items() if name != "manifest.json"}


def stopped_in(job, step, delay, signum):
    """Run until some seconds into a step, send a signal; exit code, seconds it took, and what the log says."""
    process = spawn(job, stdout=subprocess.DEVNULL)
    log = []
    for line in process.stderr:
        log.append(json.loads(line))
        if log[-1]["event"] == "step_started" and log[-1]["step"] == step:
            break
    time.sleep(delay)
    start = time.monotonic()
    process.send_signal(signum)
    _, rest = process.communicate(timeout=60)
    log += [json.loads(line) for line in rest.splitlines()]
    return process.returncode, time.monotonic() - start, log


IN_NATIVE_CODE = """
import hashlib
from gpu_init import cli

def run(job, progress):
    progress.say("in")
    hashlib.pbkdf2_hmac("sha256", b"", b"", 1 << 30)

cli._run_job = run
cli.program()
"""


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_signal_ends_a_long_native_call(log_format, job):
    job.flags["log_format"] = log_format
    command = [sys.executable, "-c", IN_NATIVE_CODE, *job.arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}) as process:
        process.stderr.readline()
        start = time.monotonic()
        process.terminate()
        err = process.stderr.read().decode()
        assert process.wait(30) == 128 + signal.SIGTERM
        assert time.monotonic() - start < 5
    assert "stopped by signal 15; --resume" in (json.loads(err)["message"] if log_format == "json" else err)
    assert err.count("\n") == 1


IN_A_DESTRUCTOR = """
import time
from gpu_init import cli

class Slow:
    def __del__(self):
        time.sleep(0.5)

def run(job, progress):
    with progress.step("build"):
        progress.say("in")
        one = Slow()
        del one
        time.sleep(60)

cli._run_job = run
cli.program()
"""


def test_a_signal_that_a_destructor_swallows_is_raised_after_it(job):
    job.flags["log_format"] = "json"
    command = [sys.executable, "-c", IN_A_DESTRUCTOR, *job.arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}) as process:
        assert [json.loads(process.stderr.readline())["event"] for _ in range(2)] == ["step_started", "message"]
        time.sleep(0.1)
        process.terminate()
        left = [json.loads(line) for line in process.stderr.read().splitlines()]
        assert process.wait(30) == 128 + signal.SIGTERM
    assert [line["event"] for line in left] == ["step_stopped", "error"]
    assert "stopped by signal 15; --resume" in left[1]["message"]


def test_a_broken_off_import_does_not_keep_the_process():
    waiting = "import threading; from gpu_init import cli; cli.main = lambda: 143;"
    waiting += "threading.Thread(target=threading.Event().wait).start(); cli.program()"
    found = subprocess.run(
        [sys.executable, "-c", waiting], check=False, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=30
    )
    assert found.returncode == 143


@pytest.mark.parametrize(
    ("signum", "step", "delay"),
    [
        (signal.SIGINT, "write image", 0.05),
        pytest.param(signal.SIGTERM, "write image", 0.05, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, "write image", 0.02, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, "write image", 0.1, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, "cluster image", 0.05, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, "read interactions", 0.01, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_is_resumed_to_the_same_bytes(signum, step, delay, work):
    job, wanted = work
    out = f"stopped-{signum}-{step[:4]}-{delay}"
    job.flags.update(out=job.path(out))
    job.flags.pop("resume", None)
    code, seconds, log = stopped_in(job, step, delay, signum)
    assert not (job.folder / out).exists()
    if signum == signal.SIGKILL:
        assert code == -signum
    else:
        assert code == 128 + signum
        assert seconds < 5
        assert "--resume" in log[-1]["message"]
        assert [line["step"] for line in log if line["event"] == "step_stopped"] == [step]
        assert not (job.folder / f".{out}.lock").exists()
    assert (job.folder / f"{out}.partial").exists() == (step == "write image")
    job.flags["resume"] = True
    code, _, err = finish(job)
    assert code == 0, err
    steps = [json.loads(line).get("step") for line in err.splitlines()]
    assert ("cluster image" in steps) == (step != "write image")
    found = contents(job.folder / out)
    assert {name: value for name, value in found.items() if name != "manifest.json"} == wanted
    assert not (job.folder / f"{out}.partial").exists()
    assert not (job.folder / f".{out}.lock").exists()
