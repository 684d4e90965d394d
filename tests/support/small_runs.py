"""A small run that writes an artifact as a job does, without the method's work."""

import errno
import os
from pathlib import Path

import numpy as np
import pandas as pd

from gpu_init.artifact import read
from gpu_init.artifact import rows as artifact_rows
from gpu_init.artifact.objects import open_staging
from gpu_init.files import storage

USERS, ITEMS, WIDTH, CLUSTERS = 37, 11, 4, 3

IDENTITY = {
    "settings": {"lambda": 0.9, "clusters": CLUSTERS},
    "inputs": {"image": {"bytes": 3, "hash": "sha256:aa"}, "text": {"bytes": 4, "hash": "sha256:bb"}},
}


# A small run, as a job does one.


def vectors(seed=0, users=USERS):
    return np.random.default_rng(seed).normal(size=(users, WIDTH)).astype(np.float32)


def manifest(users=USERS):
    return {
        "gpu_init_version": "1",
        "users": {"rows": users, "ids": "users.parquet"},
        "items": {"rows": ITEMS, "ids": "row numbers"},
        "modalities": {"image": {"width": WIDTH}},
    }


def work(staging, seed=0, step=5, each=None):
    """Everything between open and the end; `each` is called after every block."""
    if staging.complete:
        return staging._place.out
    if staging.finished("image/fit") is None:
        rng = np.random.default_rng(seed)
        staging.save("scratch/means.npy", rng.normal(size=(5, 2)))
        staging.save("image/centroids.npy", rng.normal(size=(CLUSTERS, WIDTH)).astype(np.float32))
        staging.save("image/labels.npy", rng.integers(-1, CLUSTERS, USERS).astype(np.int32))
        staging.finish("image/fit", {"scale": 1.5, "inertia": [3.0, 2.0]})
    assert staging.finished("image/fit") == {"scale": 1.5, "inertia": [3.0, 2.0]}
    write_rows(staging, vectors(seed), step, each)
    staging.save_table("users.parquet", pd.DataFrame({"row": np.arange(USERS), "user_id": names()}))
    return staging.commit(manifest())


def write_rows(staging, table, step=5, each=None):
    """Write the array of users in blocks of rows, going on after those that an earlier run noted."""
    staging.allocate("image/users.npy", table.shape, np.float32, "image/written")
    first = (staging.finished("image/written") or {"rows": 0})["rows"]
    with staging.adopting("image/users.npy") as written:
        for start in range(first, len(table), step):
            block = table[start : start + step]
            with artifact_rows.row_writer(os.path.join(staging.path, "image/users.npy"), start) as write:
                write(block)
            staging.finish("image/written", {"rows": start + len(block)})
            written(start + len(block))
            if each:
                each(start)


def names():
    return [f"u{number}" for number in range(USERS)]


def run(out, seed=0, resume=False, overwrite=False, identity=None, **how):
    identity = {**IDENTITY, "seed": seed} if identity is None else identity
    with open_staging(out, resume=resume, overwrite=overwrite, identity=identity) as staging:
        return work(staging, seed, **how)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


class StopError(Exception):
    pass


def stop_after(rows):
    def each(start):
        if start >= rows:
            raise StopError

    return each


# A full disk, and other faults.


def fail_after(monkeypatch, calls, code=errno.ENOSPC, name="write"):
    """Let a system call fail for good after so many calls, as on a disk that has filled up."""
    real, left = getattr(os, name), [calls]

    def call(*given):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(code, os.strerror(code))
        return real(*given)

    monkeypatch.setattr(storage.os, name, call)


def whole(out, old, new):
    """Assert that what stands at the output's place is nothing, the old artifact or the new one."""
    if (out / "manifest.json").exists():
        assert read.verify(out) == []
        held = {name: data for name, data in contents(out).items() if not name.startswith(".partial")}
        assert held in (old, new)
