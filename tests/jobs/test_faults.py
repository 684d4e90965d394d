"""Whole jobs under faults: killed, stopped, out of disk, out of memory, on disks that fail or take nothing."""

import contextlib
import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gpu_init import cli, memory
from gpu_init.artifact import read, rows, staging
from gpu_init.errors import InputError, ResourceError
from gpu_init.files import storage
from tests.support import faults
from tests.support.jobs import Job, check_refusal
from tests.support.small_runs import contents, fail_after
from tests.support.small_runs import run as write

ROOT = Path(__file__).parents[2]


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


def run(job, capfd):
    code = cli.main(job.arguments)
    return code, capfd.readouterr().err


@pytest.mark.parametrize(("kills", "stops"), [pytest.param(40, 20, marks=pytest.mark.slow)])
def test_killed_and_stopped_jobs_are_resumed_to_the_same_bytes(kills, stops, tmp_path):
    reached = faults.run(tmp_path, kills, stops, say=lambda line: None)
    assert reached["SIGKILL"] >= kills // 2


# A file system that is full, read-only, or breaks.


@pytest.fixture
def mount(tmp_path):
    """Mount a file system in memory, of some size; where that is not allowed, the injected faults have to do."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mounted(options):
        kind = ["-o", f"remount,{options}"] if os.path.ismount(folder) else ["-t", "tmpfs", "-o", options, "none"]
        done = subprocess.run(["mount", *kind, str(folder)], capture_output=True, check=False)
        if done.returncode:
            pytest.skip("mounting is not allowed")
        return folder

    yield mounted
    subprocess.run(["umount", str(folder)], capture_output=True, check=False)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("old", [False, True])
def test_a_disk_that_is_full_at_any_write_is_said_and_the_run_resumed(mount, tmp_path, monkeypatch, inside, old):
    monkeypatch.setattr(rows, "SYNC_BYTES", 50)
    write(tmp_path / "new")
    write(tmp_path / "old", seed=7)
    new, before = contents(tmp_path / "new"), contents(tmp_path / "old")
    disk = mount("size=1m")
    out = disk if inside else disk / "out"
    if old:
        write(out, seed=7)
    page, failures = os.sysconf("SC_PAGE_SIZE"), 0
    used = sum(1 for _ in disk.rglob("*")) + 1
    for pages in range(used, used + 60):
        mount(f"size={pages * page}")
        try:
            write(out, resume=True, overwrite=old)
        except ResourceError as error:
            failures += 1
            assert "are free" in str(error)
            assert (out / "manifest.json").exists() == old
            if old:
                held = {name: data for name, data in contents(out).items() if not name.startswith(".partial")}
                assert held == before
                assert read.verify(out) == []
        else:
            break
    assert failures >= 3
    mount("size=1m")
    write(out, resume=True, overwrite=old)
    assert contents(out) == new


def test_a_job_that_does_not_fit_on_the_disk_ends_before_its_work(mount, job, capfd):
    disk = mount("size=64k")
    job.array(np.random.default_rng(0).normal(size=(25, 200)).astype(np.float32))
    two = np.random.default_rng(1).normal(size=(25, 250)).astype(np.float32)
    np.save(job.path("two.npy"), two)
    job.flags["features"].append(f"two={job.path('two.npy')}")
    job.flags["out"] = str(disk / "out")
    code, err = run(job, capfd)
    check_refusal(code, err, ["out.partial", "bytes are needed", "are free"], 3)
    wanted = 40 * (200 + 250 + 2) * 4 + 3 * (200 + 250) * 4
    assert wanted - 4096 < int(re.search("([0-9,]+) bytes are needed", err)[1].replace(",", "")) <= wanted
    assert "cluster" not in err
    assert list(disk.iterdir()) == []
    mount("size=1m")
    assert run(job, capfd)[0] == 0
    mount("ro")
    job.flags["overwrite"] = True
    code, err = run(job, capfd)
    check_refusal(code, err, [str(disk), "Read-only"])


@pytest.mark.parametrize("name", ["write", "fsync", "fdatasync", "replace"])
def test_a_disk_that_breaks_is_said_and_the_run_resumed(name, tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "SYNC_BYTES", 50)
    write(tmp_path / "new")
    for calls in (0, 5):
        with monkeypatch.context() as patch:
            fail_after(patch, calls, errno.EIO, name)
            with pytest.raises(ResourceError, match=r"failed \(Input/output error\)"):
                write(tmp_path / "out", resume=True)
    write(tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "new")


def test_an_input_that_cannot_be_read_to_its_end(tmp_path, monkeypatch):
    (tmp_path / "f").write_bytes(b"x" * 100)

    def fail(*given):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(storage.hashlib, "file_digest", fail)
    with pytest.raises(InputError, match=r"f: cannot be read \(Input/output error\)"):
        storage.fingerprint(str(tmp_path / "f"))


# Memory.


def only_free(monkeypatch, size):
    """Have the job believe that so many bytes are free; what the libraries themselves take is not held to it."""
    monkeypatch.setattr(memory, "available", lambda: memory.Free(size(), "by the container's limit"))
    monkeypatch.setattr(memory, "bounded", contextlib.nullcontext)


def test_a_plan_beyond_the_memory_that_is_free_ends_before_the_work(job, monkeypatch, capfd):
    values = np.random.default_rng(0).normal(size=(25, 2000))  # float64, so that it is copied
    job.array(values)
    only_free(monkeypatch, lambda: 100_000)
    code, err = run(job, capfd)
    check_refusal(code, err, ["bytes of memory are needed, 100,000 are free (by the container's limit)"], 3)
    assert "read interactions" not in err
    assert not (job.folder / "out.partial").exists()


def test_rows_beyond_the_memory_that_is_free_are_not_held(job, monkeypatch, capfd):
    job.text("user_id,item_id\n" + "0,0\n" * 100_000)
    left = iter([10**9])
    only_free(monkeypatch, lambda: next(left, 1000))
    code, err = run(job, capfd)
    check_refusal(code, err, ["bad.csv", "rows so far", "1,000 are free"], 3)


def test_an_allocation_that_fails_ends_the_job_with_its_code(job, monkeypatch, capfd):
    job.flags.update(dim="3", scale="items", resume=True, out=job.path("first"))
    assert run(job, capfd)[0] == 0  # kernels are compiled, for which numpy must be as it is
    job.flags["out"] = job.path("out")
    names = ("empty", "zeros", "full", "concatenate", "arange", "flatnonzero", "cumsum", "ascontiguousarray")
    real, failures = {name: getattr(np, name) for name in names}, 0
    for number in [*range(1, 60, 4), *range(60, 2000, 60)]:
        left = [number]

        def fail(name, left=left):
            def call(*given, **named):
                left[0] -= 1
                if left[0] == 0:
                    raise MemoryError("Unable to allocate 9.31 GiB")
                return real[name](*given, **named)

            return call

        with monkeypatch.context() as patch:
            for name in names:
                patch.setattr(np, name, fail(name))
            code, err = run(job, capfd)
        if left[0] > 0:
            break
        failures += code == 3
        if code == 0:  # it did without
            shutil.rmtree(job.path("out"))
        assert code in (0, 2, 3), err
        assert "Traceback" not in err
        if code:
            assert "memory" in err or "Unable to allocate" in err
    assert failures >= 5
    assert run(job, capfd)[0] == 0
    assert read.verify(job.path("out")) == []


@pytest.mark.parametrize("limit", [300, 1000])
def test_a_process_that_may_take_too_little_memory_says_so(limit, job):
    ended = subprocess.run(
        [sys.executable, "-m", "gpu_init", *job.arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit << 20,) * 2),
    )
    check_refusal(ended.returncode, ended.stderr, ["bytes of memory are needed", "ulimit -v"], 3)


def test_a_resumed_run_says_so(job, monkeypatch, capfd):
    def fail(*given):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(staging.Staging, "commit", fail)
        assert run(job, capfd)[0] == 3
    job.flags.update(resume=True, log_format="json")
    code, err = run(job, capfd)
    assert code == 0
    said = [json.loads(line).get("message", "") for line in err.splitlines()]
    assert f"going on with the unfinished run in {job.path('out')}.partial" in said


# Inputs that change while a job reads them.


SLOWLY = """
import time
from gpu_init import cli
from gpu_init import run
real = run.cluster

def cluster(*given, **named):
    open("clustering", "x").close()
    while not __import__("os").path.exists("changed"):
        time.sleep(0.01)
    return real(*given, **named)

run.cluster = cluster
cli.program()
"""


@pytest.mark.parametrize("change", ["cut short", "touched", "other log"])
def test_an_input_that_changes_while_the_job_runs_ends_it(change, job):
    job.array(np.random.default_rng(0).normal(size=(25, 2000)).astype(np.float32))
    process = subprocess.Popen(
        [sys.executable, "-c", SLOWLY, *job.arguments],
        cwd=job.folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not (job.folder / "clustering").exists():
        time.sleep(0.01)
    if change == "cut short":
        os.truncate(job.path("bad.npy"), 0)
    else:
        path = job.path("bad.npy" if change == "touched" else "log.parquet")
        Path(path).write_bytes(Path(path).read_bytes())
    (job.folder / "changed").touch()
    _, err = process.communicate(timeout=120)
    wanted = ["became shorter"] if change == "cut short" else [job.path(""), "changed while the job ran"]
    check_refusal(process.returncode, err, [*wanted, "run again when it is complete"])
    assert not (job.folder / "out").exists()
