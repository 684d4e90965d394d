"""A small job in a folder, its data, and how its refusals are checked."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

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


def run(job, monkeypatch, capfd):
    for name, value in job.environ.items():
        monkeypatch.setenv(name, value)
    code = cli.main(job.arguments)
    printed = capfd.readouterr()
    return code, printed.out, printed.err


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
