"""Interactions and lists of users that a job refuses: what spoils a good job, and what the message must name."""

from __future__ import annotations

import datetime
import decimal
import gzip
import os
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse

from tests.support.jobs import ITEMS

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
