"""Jobs killed and stopped, at every step's start and end and in between, then resumed: always the same bytes.

`python -m tests.support.faults --kills 40 --stops 20 --seed 0` prints what it did. Jobs, two at a time, are processes
of their own, killed by SIGKILL, or stopped by SIGTERM and SIGINT. After each, what stands at the output's place is
nothing, or an artifact whose every byte is checked; some are killed again while they resume; in the end the artifact
is that of a run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd

from gpu_init.artifact import read

USERS, ITEMS, WIDTH = 60_000, 500, 96
STOP_SECONDS = 5.0
ROOT = Path(__file__).resolve().parents[2]
# as `gpu-init`, but that rows are made durable more often, so that small jobs resume in their middle
PROGRAM = "from gpu_init import cli; from gpu_init.artifact import rows; rows.SYNC_BYTES = 1 << 20; cli.program()"


class Jobs:
    """Jobs on the same data, and what an undisturbed one makes of it.

    Attributes
    ----------
    wanted, old : dict
        Content of the artifact by file name, without the manifest; of the one that is replaced.
    events : int
        Lines of its log that say that a step starts or ends.
    seconds : float
        That it takes, from the first of them.
    """

    def __init__(self, folder, seed=0):
        self.folder = Path(folder)
        self.rng = np.random.default_rng(seed)
        users = np.repeat(np.arange(USERS), 4)
        items = 2 * self.rng.integers(0, ITEMS // 2, len(users)) + users % 2
        named = pd.DataFrame({"user_id": "u" + pd.Series(users).astype(str), "item_id": items})
        named.to_parquet(self.folder / "log.parquet")
        for name in ("image", "text"):
            values = self.rng.normal(size=(ITEMS, WIDTH)).astype(np.float32)
            values[::2] += 3
            np.save(self.folder / f"{name}.npy", values)
        self.old = self.finished(self.start("old", "--seed=9", "--clusters=3"))
        start = time.monotonic()
        process = self.start("new")
        log = self.log(process)
        first = next(log)
        start = time.monotonic()
        self.events = sum("step" in line for line in [first, *log])
        self.seconds = time.monotonic() - start
        self.wanted = self.finished(process)

    def start(self, out, *more):
        arguments = ["run", "--interactions=log.parquet", "--features=image=image.npy", "--features=text=text.npy"]
        arguments += [f"--out={out}", "--clusters=2", "--dim=64", "--memory=20MiB", "--log-format=json", *more]
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *arguments],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
            text=True,
        )
        process.out = self.folder / out
        return process

    @staticmethod
    def log(process):
        return map(json.loads, process.stderr)

    def finished(self, process):
        """Wait for a job that must succeed; the artifact's files but the manifest."""
        said = process.stderr.read()
        assert process.wait() == 0, said
        assert read.verify(process.out) == []
        beside = {path.name for path in self.folder.iterdir() if process.out.name in path.name}
        assert beside == {process.out.name}, beside
        return contents(process.out)

    def stopped(self, process, signum, event, seconds=0.0):
        """Send a signal some seconds after a line of the log; exit code, seconds until it came, the line."""
        log = self.log(process)
        line = next(itertools.islice((line for line in log if "step" in line), event, None), None)
        rest = threading.Thread(target=lambda: collections.deque(log, 0))
        rest.start()
        time.sleep(seconds)
        start = time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signum)
        code = process.wait(60)
        took = time.monotonic() - start
        rest.join()
        assert not in_session(process.pid), "a child process is left"
        return code, took, line and (line["event"], line["step"])

    def check(self, process, *allowed):
        """What stands at the output's place is one of these, whole, or nothing where None is among them."""
        if not os.path.lexists(process.out):
            assert None in allowed, "the artifact has gone"
            return
        assert read.verify(process.out) == []
        assert list(read.load(process.out)) == ["image", "text"]
        assert contents(process.out) in allowed


def contents(folder):
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    found.pop("manifest.json", None)
    return found


def in_session(session):
    """Processes of a session that are still there."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(stat.parent.name))
    return found


def disturbed(jobs, number, signum, event, seconds, again):
    """Disturb a job, look, resume it, look; where in its log it was, or None where it had ended before.

    ``again``: the line of the log at which it is killed while it resumes, or None.
    """
    out = f"run{number:04}"
    more = ["--resume", "--overwrite"]
    allowed = (None, jobs.wanted)
    if number % 2:  # an artifact stands there already
        shutil.copytree(jobs.folder / "old", jobs.folder / out)
        allowed = (jobs.old, jobs.wanted)
    process = jobs.start(out, *more)
    code, took, where = jobs.stopped(process, signum, event, seconds)
    jobs.check(process, *allowed)
    if signum == signal.SIGKILL:
        assert code in (0, -signal.SIGKILL), code
    else:
        assert code in (0, 128 + signum), code
        assert took < STOP_SECONDS, took
        assert not (jobs.folder / f".{out}.lock").exists()
    if again is not None:
        process = jobs.start(out, *more)
        jobs.stopped(process, signal.SIGKILL, again)
        jobs.check(process, *allowed)
    process = jobs.start(out, *more)
    assert jobs.finished(process) == jobs.wanted
    return where if code else None


def run(folder, kills, stops, seed=0, say=print):
    """Kill and stop so many jobs, two at a time; how many of each were still running."""
    jobs = Jobs(folder, seed)
    say(f"undisturbed: {jobs.events} starts and ends of steps in {jobs.seconds:.2f} s")
    plans = []
    for number in range(kills + stops):
        signum = signal.SIGKILL if number < kills else (signal.SIGTERM, signal.SIGINT)[number % 2]
        # every start and end of a step in turn, then any time
        at_once = number < min(kills // 2, jobs.events)
        event = number if at_once else int(jobs.rng.integers(jobs.events))
        seconds = 0.0 if at_once else jobs.rng.uniform(0, 2 * jobs.seconds / jobs.events)
        again = int(jobs.rng.integers(jobs.events)) if number % 3 == 2 else None
        plans.append((number, signum, event, seconds, again))
    reached = collections.Counter()
    with ThreadPoolExecutor(2) as pool:
        for plan, where in zip(plans, pool.map(lambda plan: disturbed(jobs, *plan), plans), strict=True):
            number, signum, _, seconds, _ = plan
            reached[signum.name] += where is not None
            say(f"{number} {signum.name} {seconds:.2f} s after {' of '.join(where) if where else 'the end'}")
    return reached


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--stops", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        reached = run(folder, given.kills, given.stops, given.seed)
    print(f"{given.kills} kills and {given.stops} stops, {dict(reached)} before the end; all resumed to the same bytes")


if __name__ == "__main__":
    main()
