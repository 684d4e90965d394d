"""The process of a job: signals, streams, terminals."""

from __future__ import annotations

import json
import os
import pty
import resource
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.support.jobs import ITEMS, ROOT, Job, check_refusal, contents, run

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
