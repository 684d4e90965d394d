"""A small run is killed before every one of its system calls and resumed.

Run as a program (`python -m tests.artifact.test_kills FOLDER MODE STEP`), this file is the kill harness: it forks a
small run again and again, each killed just before another one of its system calls, and resumes each.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gpu_init.artifact import publish
from gpu_init.artifact import rows as artifact_rows
from gpu_init.artifact.objects import open_staging
from gpu_init.errors import InputError
from gpu_init.files import storage
from tests.support.small_runs import contents, run, whole

CALLS = (
    "write",
    "pwrite",
    "fsync",
    "fdatasync",
    "replace",
    "rename",
    "unlink",
    "mkdir",
    "rmdir",
    "truncate",
    "ftruncate",
)


def kill_before(number):
    """Kill this process just before one of its calls that change the disk, counted from 1."""
    left = [number]

    def counted(real):
        def call(*given, **named):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*given, **named)

        return call

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    storage.exchange = counted(storage.exchange)


def in_child(job):
    """Run in a fork; give the exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            job()
            code = 0
        except BaseException as error:  # to the parent's stderr, and never into the parent's code
            print(repr(error), file=sys.stderr)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def settle(root, mode):
    """What stood at the output's place before the run, as a mode has it."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    out = root / "out"
    if mode == "inside":
        publish.stays_in_place = os.path.isdir
        out.mkdir()
    if mode == "two renames":
        storage.exchange = lambda a, b: False
    if mode != "new":
        run(out, seed=7)
    return out


def check_kill(root, mode, number, new):
    """Kill a run before one of its calls, look, resume it; tell whether the kill came before the run's end."""
    out = settle(root, mode)
    old, flags = contents(out), {"overwrite": mode != "new", "resume": True}

    def killed():
        kill_before(number)
        run(out, **flags)

    status = in_child(killed)
    assert status in (0, -signal.SIGKILL), status
    whole(out, old, new)
    if number % 3 == 1:  # killed again, while it resumes
        in_child(lambda: (kill_before(number // 2), run(out, **flags)))
        whole(out, old, new)
    if number % 5 == 2:  # another run came between, discarded this one, and found its own input wrong
        with (
            contextlib.suppress(InputError),
            open_staging(out, resume=False, overwrite=True, identity={}),
        ):
            raise InputError("bad")
        assert not (root / "out.partial").exists()
        whole(out, old, new)
    run(out, **flags)
    assert contents(out) == new
    assert os.listdir(root) == ["out"]
    return status != 0


def main(folder, mode, step):
    artifact_rows.SYNC_BYTES = 50
    root = Path(folder)
    run(root / "new" / "out")
    new, number, kills = contents(root / "new" / "out"), 0, 0
    while check_kill(root / "run", mode, number, new):
        kills += 1
        number += int(step)
    print(kills)


@pytest.mark.parametrize("step", [13, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", ["new", "exchange", "two renames", "inside"])
def test_killed_before_any_call_and_resumed_gives_the_same_bytes(tmp_path, mode, step):
    command = [sys.executable, "-m", "tests.artifact.test_kills", str(tmp_path), mode, str(step)]
    root = Path(__file__).parents[2]
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) >= 100 // step


if __name__ == "__main__":
    main(*sys.argv[1:])
