"""Spoilt files and settings, by the thousand: each must end as a result or as one of the project's own errors.

`python -m tests.support.fuzz --cases 100000 --command 1000 --seed 0` prints what became of them. Case n of a seed is
always the same; `--first` starts at another than 0. What went wrong is printed with the number of its case.

Cases in the process go through every reader, the settings and `--where`; those by command through `gpu-init run`
and `inspect --verify`, each a process of its own, whose exit code, messages, files and memory are looked at.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import itertools
import json
import mmap
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd

from gpu_init import config, where
from gpu_init.artifact import read as artifact_read
from gpu_init.backend.cpu import CpuBackend
from gpu_init.errors import InputError, ResourceError
from gpu_init.inputs import features, interactions, tables
from gpu_init.method import modality
from gpu_init.settings import FLAG
from tests.support.spoilt import (
    CASE_SECONDS,
    CHUNK,
    COMMAND_BYTES,
    ITEMS,
    PROCESS_BYTES,
    ROOT,
    USERS,
    _log,
    condition,
    corpus,
    edits,
    settings,
    spoilt,
    toml,
)

# Cases in this process.


class Bench:
    """Good files, and a folder to read spoilt ones from."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.files = corpus()
        self.names = {
            kind: [name for name in self.files if name.startswith(f"{kind}/")]
            for kind in ("interactions", "users", "features", "config", "artifact")
        }
        self.cpu = CpuBackend("fuzz")
        self.frame = pd.DataFrame(
            {
                **{name: column for name, column in _log().items() if name != "user_id"},
                "user_id": _log()["user_id"].astype(str),
                "time": pd.date_range("2024-01-01", periods=42),
                "flag": [True, False] * 21,
                "a b": [None, "x"] * 21,
                "missing": [None] * 42,
                "x": pd.array([1, None] * 21, "int64[pyarrow]"),
            }
        )
        for name in self.names["artifact"]:
            self.put(name, self.files[name])

    def put(self, name, data):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return str(path)

    def read(self, name, data, option=0):
        """Have the reader of a name read other content."""
        kind = name.split("/")[0]
        path = self.put(name, data)
        if kind == "interactions":
            known = pd.Series([f"i{item}" for item in range(ITEMS)])
            axis = interactions.ItemAxis(
                *[(ITEMS,), (ITEMS,), (None, [pd.Series(range(ITEMS))]), (None, [known])][option % 4]
            )
            keep = None if name.endswith(".npz") else where.parse("split == 'train' or rating > 1")
            weight = "rating" if option % 3 and not name.endswith(".npz") else None
            users = {5: USERS, 6: pd.Series(range(USERS))}.get(option % 8)
            self.read_both_ways(path, interactions.Columns(weight=weight, where=keep), axis, users)
        elif kind == "users":
            assert len(tables.read_user_ids(self.cpu, path, None)) > 0
        elif kind == "features":
            table = features.read("image", path)
            present = modality.check(table.values, path)
            assert np.isfinite(np.asarray(table.values)[present]).all()
        elif kind == "config":
            config.load(path, {}, {})
        else:
            try:
                problems = artifact_read.verify(self.folder / "artifact")
                if not problems:
                    opened = artifact_read.load(self.folder / "artifact")
                    assert len(opened["image"].users) == USERS == len(opened.user_ids)
                assert problems or data == self.files[name], "a change that verify does not see"
            finally:
                self.put(name, self.files[name])
            if problems:
                raise InputError(problems[0])

    def read_both_ways(self, *given):
        """Interactions as large jobs read them, and as small ones do: the same, or refused by both."""
        csrs, errors = [], []
        for kernels in ("numba", "numpy"):
            with mock.patch.dict(os.environ, GPU_INIT_KERNELS=kernels):
                try:
                    found = interactions.read(self.cpu, *given).interactions
                except InputError as error:
                    errors.append(error)
                else:
                    csrs.append(found.csr)
                    assert found.csr.indptr[0] == 0
                    assert found.csr.indptr[-1] == len(found.csr.indices)
                    if len(found.csr.indices):
                        assert 0 <= found.csr.indices.min() <= found.csr.indices.max() < found.items
        assert len(csrs) != 1, f"one way of reading gives a result, the other {errors}"
        if errors:
            raise errors[0]
        for one, other in zip(*csrs, strict=True):
            np.testing.assert_array_equal(one, other)

    def rows(self, text):
        """Rows that a condition takes, where there are the columns that it names."""
        found = where.parse(text)
        if set(found.columns) <= set(self.frame):
            assert len(found.mask(self.frame, "a.csv")) == len(self.frame)

    def case(self, seed, number):
        """One case: its kind, and what is done with it."""
        rng = np.random.default_rng([seed, number])
        kind = ("interactions", "features", "features", "users", "config", "where", "artifact", "settings")[number % 8]
        if kind == "where":
            return kind, lambda: self.rows(condition(rng))
        if kind == "settings":
            source = int(rng.integers(3))
            if source == 2:
                return kind, lambda: config.load(self.put("config/job.toml", toml(rng).encode()), {}, {})
            base = {"interactions": "a.csv", "out": "b", "features": "image=f4.npy"} | settings(rng)
            if source == 1:
                return kind, lambda: config.load(None, {f"GPU_INIT_{k.upper()}": v for k, v in base.items()}, {})
            return kind, lambda: config.load(None, {}, base)
        name = self.names[kind][rng.integers(len(self.names[kind]))]
        data = spoilt(self.files[name], edits(rng))
        return name, lambda: self.read(name, data, int(rng.integers(16)))


def outcome(act):
    """What an act ends as: result, InputError, ResourceError; anything else is raised."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            act()
    except InputError as error:
        assert str(error).strip(), "an error without words"
        return "InputError"
    except (ResourceError, MemoryError):
        return "ResourceError"
    return "result"


def work(seed, first, last, place):
    """Cases of one process; a line of JSON for each that went wrong, and one for all at the end."""
    with tempfile.TemporaryDirectory() as folder, open(place, "r+b") as file, mmap.mmap(file.fileno(), 8) as at:
        bench, counts = Bench(folder), collections.Counter()
        for name in ("interactions/log.csv", "interactions/log.parquet", "interactions/csr.npz"):
            bench.read(name, bench.files[name])  # compiles what is still to be compiled
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        faulthandler.register(signal.SIGPROF, chain=True)
        with open("/proc/self/statm", encoding="ascii") as sizes:
            taken = int(sizes.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (taken + PROCESS_BYTES,) * 2)
        for number in range(first, last):
            at[:] = number.to_bytes(8, "little")
            signal.setitimer(signal.ITIMER_PROF, CASE_SECONDS)
            kind, act = bench.case(seed, number)
            try:
                found = outcome(act)
            except BaseException as error:  # whatever it is, the next case is run
                found = "wrong"
                print(json.dumps({"case": number, "kind": kind, "error": f"{type(error).__name__}: {error}"[:500]}))
            counts[f"{kind.split('/')[0]}: {found}"] += 1
            if number % 100 == 99:
                print(json.dumps({"counts": counts}), flush=True)
                counts.clear()
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps({"counts": counts, "peak": own_peak()}), flush=True)


def own_peak():
    """Most MiB that were resident. Not `ru_maxrss`: that includes the process that started this one."""
    [peak] = re.findall(r"VmHWM:\s*([0-9]+) kB", Path("/proc/self/status").read_text())
    return int(peak) >> 10


def in_processes(cases, seed, first=0):
    """Run cases in processes of `CHUNK` each, two at a time; give counts, peak memory in MiB, and what went wrong."""
    counts, wrong, most = collections.Counter(), [], 0
    starts = range(first, first + cases, CHUNK)
    with ThreadPoolExecutor(2) as pool:
        for found, peak, problems in pool.map(lambda at: _chunk(seed, at, min(at + CHUNK, first + cases)), starts):
            counts.update(found)
            most = max(most, peak)
            wrong += problems
    return counts, most, wrong


def _chunk(seed, start, stop):
    """As `in_processes`, of the cases from ``start`` up to ``stop``: a process, and another after each crash."""
    counts, wrong, peak = collections.Counter(), [], 0
    with tempfile.NamedTemporaryFile() as place:
        place.write(bytes(8))
        place.flush()
        while start < stop:
            command = [
                sys.executable,
                "-m",
                "tests.support.fuzz",
                "--worker",
                str(seed),
                str(start),
                str(stop),
                place.name,
            ]
            ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            lines = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
            wrong += [line for line in lines if "case" in line]
            for line in lines:
                counts.update(line.get("counts", {}))
                peak = max(peak, line.get("peak", 0))
            if ended.returncode == 0:
                break
            case = int.from_bytes(Path(place.name).read_bytes()[:8], "little")
            wrong.append({"case": case, "error": f"exit {ended.returncode}: {ended.stderr[-1500:]}"})
            counts["crash"] += 1
            start = case + 1
    return counts, peak, wrong


# Cases by command.


def prepare(folder, rng, files, names):
    """A job in a folder with one thing wrong with it, as arguments and environment."""
    for name in ("interactions/log.parquet", "features/f4.npy"):
        (folder / name.split("/")[1]).write_bytes(files[name])
    given = {"interactions": "log.parquet", "features": "image=f4.npy", "out": "out", "clusters": "3"}
    given["where"] = "split == 'train'"
    kind = ("interactions", "features", "users", "config", "flags", "environment", "where", "artifact")[rng.integers(8)]
    if kind == "artifact":
        for name in names["artifact"]:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(files[name])
        spoiled = folder / names["artifact"][rng.integers(len(names["artifact"]))]
        spoiled.write_bytes(spoilt(spoiled.read_bytes(), edits(rng)))
        return kind, ["inspect", "artifact", "--verify"], {}
    if kind in ("interactions", "features", "users", "config"):
        name = names[kind][rng.integers(len(names[kind]))]
        (folder / name.split("/")[1]).write_bytes(spoilt(files[name], edits(rng)))
        if kind == "config":
            return kind, ["run", "job.toml"], {}
        given[kind] = ("image=" if kind == "features" else "") + name.split("/")[1]
        if name.endswith(".npz") and kind == "interactions":
            del given["where"]
    environ = {}
    if kind == "where":
        given["where"] = condition(rng)
    elif kind == "flags":
        given |= settings(rng)
    elif kind == "environment":
        environ = {f"GPU_INIT_{key.upper()}": value for key, value in settings(rng).items()}
    boolean = {key.name for key in config.KEYS if key.kind is FLAG}
    arguments = [
        f"--{key.replace('_', '-')}" if key in boolean else f"--{key.replace('_', '-')}={value}"
        for key, value in given.items()
    ]
    environ["GPU_INIT_KERNELS"] = ("numpy", "numba")[rng.integers(2)]
    return (
        kind,
        ["run", *(one.replace("\0", "") for one in arguments)],
        {k: v.replace("\0", "") for k, v in environ.items()},
    )


def tree(folder):
    return {str(path.relative_to(folder)): path.is_file() and path.read_bytes() for path in Path(folder).rglob("*")}


def command(seed, number, files, names):
    """One case by command: its kind, its exit code, memory in MiB, and what is wrong with it."""
    rng = np.random.default_rng([seed, number, 1])
    with tempfile.TemporaryDirectory() as outer:
        folder = Path(outer) / "job"
        folder.mkdir()
        kind, arguments, environ = prepare(folder, rng, files, names)
        before = tree(outer)
        with open(Path(outer) / "stderr", "wb") as stderr:
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "gpu_init",
                    *(one.encode("utf-8", "surrogatepass") for one in arguments),
                ],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": str(ROOT), **environ},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
            )
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        said = (Path(outer) / "stderr").read_text(errors="replace")
        (Path(outer) / "stderr").unlink()
        after, code, peak = tree(outer), process.returncode, used.ru_maxrss >> 10
        made = {name for name in after if name not in before or after[name] != before[name]}
        wrong = []
        if code not in (0, 2, 3):
            wrong.append(f"exit {code}")
        if "Traceback" in said:
            wrong.append("traceback")
        places = {"/".join(name.split("/")[:2]) for name in made}
        if any(name not in after for name in before) or len(places) > 1 or places & set(before):
            wrong.append(f"files {sorted(made)[:5]}")  # only the output's folder is new
        if code == 2 and made:
            wrong.append(f"left behind {sorted(made)[:5]}")
        message = said[said.rfind("gpu-init: ") :] if "gpu-init: " in said else ""
        if code in (2, 3) and not (
            '"event": "error"' in said or (0 < len(message.splitlines()) <= 3 and len(message) < 900)
        ):
            wrong.append(f"message {said[-900:]!r}")
        if peak > COMMAND_BYTES >> 20:
            wrong.append(f"{peak} MiB")
        shown = " ".join(map(ascii, arguments)) + " " + ascii(environ)
        return kind, code, peak, [f"{problem}: {shown} | {said[-600:]!r}" for problem in wrong]


def by_command(cases, seed, first=0):
    """Run cases by command; give the counts, the peak memory in MiB, and what went wrong.

    Linux counts the memory of this process as theirs, so it must be a small one.
    """
    files = corpus()
    names = {kind: [name for name in files if name.startswith(f"{kind}/")] for kind in {n.split("/")[0] for n in files}}
    counts, wrong, most = collections.Counter(), [], 0
    numbers = range(first, first + cases)
    with ThreadPoolExecutor(2) as pool:
        ended = pool.map(lambda number: command(seed, number, files, names), numbers)
        for number, (kind, code, peak, problems) in zip(numbers, ended, strict=True):
            counts[f"{kind}: exit {code}"] += 1
            most = max(most, peak)
            wrong += [{"case": number, "kind": kind, "error": problem} for problem in problems]
    return counts, most, wrong


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000, help="in this process's children")
    parser.add_argument("--command", type=int, default=1000, help="by command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.worker:
        seed, first, last, place = given.worker
        work(int(seed), int(first), int(last), place)
        return 0
    failures = 0
    for title, run, cases in (("in process", in_processes, given.cases), ("by command", by_command, given.command)):
        if cases:
            counts, peak, wrong = run(cases, given.seed, given.first)
            failures += len(wrong)
            print(f"{title}: {sum(counts.values()):,} cases, at most {peak} MiB, {len(wrong)} wrong")
            for name, count in sorted(counts.items()):
                print(f"  {name:<32}{count:>8,}")
            for one in itertools.islice(wrong, 50):
                print(f"  WRONG {json.dumps(one)}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
