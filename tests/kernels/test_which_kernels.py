"""Which kernels a job runs, what it compiles for them, and that its vectors do not depend on it."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import gpu_init
from gpu_init import config, demo, kernels, manifest, site
from gpu_init.backend.cpu import CpuBackend
from gpu_init.backend.select import for_work, select
from gpu_init.cli import main
from gpu_init.inputs import interactions, tables
from gpu_init.kernels import costs
from gpu_init.show.progress import Progress
from tests.support import oracle

ROOT = Path(__file__).resolve().parents[2]
TIKTOK = ROOT.parent / "shared" / "data" / "tiktok"


@pytest.fixture(autouse=True)
def nothing_forced(monkeypatch):
    monkeypatch.delenv("GPU_INIT_KERNELS", raising=False)


def tiktok(folder):
    if not TIKTOK.is_dir():
        pytest.skip("the TikTok data set is not beside the checkout")
    return [
        f"--interactions={TIKTOK}/tiktok.inter",
        "--where=x_label == 0",
        "--users=9308",
        *(f"--features={name}={TIKTOK}/{name}_feat.npy" for name in ("image", "audio")),
    ]


def demo_data(folder):
    made = demo.make(folder, users=4000, items=700, seed=1)
    return [f"--interactions={made.interactions}", f"--features=image={made.image}", f"--features=text={made.text}"]


def generated(folder, users, items=300, width=20, groups=0, weighted=False):
    """Users who keep to a group of items each, or to none; with weights, some items are missing and some users cold."""
    rng = np.random.default_rng(2)
    group = rng.integers(0, max(groups, 1), items)
    own = [np.flatnonzero(group == one) for one in range(max(groups, 1))]
    taste, degrees = rng.integers(0, len(own), users), rng.poisson(6, users) + 1
    if weighted:
        degrees[rng.random(users) < 0.05] = 0
    who = np.repeat(np.arange(users), degrees)
    what = np.concatenate([rng.choice(own[one], degree) for one, degree in zip(taste, degrees, strict=True)])
    frame = pd.DataFrame({"user_id": who, "item_id": what})
    features = (rng.standard_normal((items, width)) + 3 * rng.standard_normal((len(own), width))[group]).astype("f4")
    if weighted:
        frame["rating"] = rng.uniform(0.5, 5, len(who))
        features[rng.random(items) < 0.2] = np.nan
    frame.to_parquet(folder / "log.parquet")
    np.save(folder / "text.npy", features)
    given = [f"--interactions={folder}/log.parquet", f"--features=text={folder}/text.npy", f"--users={users}"]
    return [*given, "--weight-column=rating"] if weighted else given


JOBS = {
    "tiktok": (tiktok, ()),
    "demo": (demo_data, ("--weight-column=rating",)),
    "demo by interactions": (demo_data, ("--cluster-on=interactions", "--lambda=shrink")),
    "groups": (lambda folder: generated(folder, 12_000, groups=10), ("--clusters=10",)),
    "noise": (lambda folder: generated(folder, 9_000), ("--cluster-on=items", "--weighting=sym")),
    "weighted": (lambda folder: generated(folder, 9_000, weighted=True), ("--lambda=attention", "--scale=items")),
}


def run(out, *arguments):
    assert main(["run", f"--out={out}", *arguments]) == 0
    return gpu_init.load(out)


@pytest.mark.parametrize("name", JOBS)
def test_a_job_gives_the_same_with_numpy_and_with_numba(name, tmp_path, monkeypatch):
    make, flags = JOBS[name]
    arguments, made = [*make(tmp_path), *flags], []
    for kind in ("numpy", "numba"):
        monkeypatch.setenv("GPU_INIT_KERNELS", kind)
        made.append(run(tmp_path / kind, *arguments))
        said = made[-1].manifest["backend"]
        assert (said["kernels"], said["reading_kernels"]) == (kind, kind)
    plain, fast = made
    for modality in plain:
        one, other = plain[modality], fast[modality]
        np.testing.assert_array_equal(one.labels, other.labels)
        oracle.assert_close(other.centroids, one.centroids, 1e-5)
        oracle.assert_close(other.users, one.users, 1e-5)
        said = [each.manifest["modalities"][modality]["kmeans"] for each in made]
        assert said[0]["form"] == said[1]["form"]
        assert said[0]["passes"] == said[1]["passes"]
        np.testing.assert_allclose(said[0]["inertia"], said[1]["inertia"], rtol=1e-5)


# The rule.


@pytest.fixture
def small(tmp_path):
    """A small job's arguments, and the seconds that its reading and its fitting are thought to take."""
    arguments = generated(tmp_path, 400)
    rows = interactions.stated_rows(f"{tmp_path}/log.parquet")
    pairs = len(pd.read_parquet(tmp_path / "log.parquet").drop_duplicates())
    return arguments, costs.reading_seconds(rows, 0), costs.fitting_seconds(400, 300, pairs, [20], 8)


def test_the_sizes_of_a_job_decide(small, tmp_path, monkeypatch):
    arguments, reading, fitting = small
    assert 0 < fitting < reading < kernels.NUMPY_SECONDS
    for number, (most, expected) in enumerate(
        {reading: ("numpy", "numpy"), fitting: ("numba", "numpy"), fitting / 2: ("numba", "numba")}.items()
    ):
        monkeypatch.setattr(kernels, "NUMPY_SECONDS", most)
        said = run(tmp_path / f"out{number}", *arguments).manifest["backend"]
        assert (said["reading_kernels"], said["kernels"]) == expected
        assert said["name"] == "cpu"


@pytest.mark.parametrize("kind", ["numpy", "numba"])
def test_the_environment_wins_over_the_sizes(small, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(kernels, "NUMPY_SECONDS", 0 if kind == "numpy" else 1e9)
    monkeypatch.setenv("GPU_INIT_KERNELS", kind)
    said = run(tmp_path / "out", *small[0]).manifest["backend"]
    assert (said["reading_kernels"], said["kernels"]) == (kind, kind)


def test_neither_cores_nor_what_is_compiled_decide(small, tmp_path, monkeypatch):
    from gpu_init.kernels import cpu, threads

    chosen = []
    for count, is_compiled in ((1, True), (64, True), (2, False)):
        monkeypatch.setattr(threads, "cores", lambda count=count: count)
        threads._pool.cache_clear()
        for one in cpu.FITTING:
            monkeypatch.setattr(one, "_compiled", one.prepare() if is_compiled else None)
        chosen.append([kernels.kernels_for(seconds) for seconds in (0, 4.9, 5.1, 1e6)])
    threads._pool.cache_clear()
    assert chosen == [["numpy", "numpy", "numba", "numba"]] * 3


def test_what_a_large_job_needs_is_compiled_while_it_reads(small, tmp_path, monkeypatch):
    asked, before_reading, reads = [], [], interactions.read
    monkeypatch.setattr(CpuBackend, "prepare", lambda _, *given: asked.append(given))
    monkeypatch.setattr(site, "read_interactions", lambda *given: (before_reading.append(len(asked)), reads(*given))[1])
    run(tmp_path / "small", *small[0])
    monkeypatch.setattr(kernels, "NUMPY_SECONDS", 0)
    run(tmp_path / "large", *small[0])
    run(tmp_path / "placed", *small[0], "--cluster-on=interactions", "--cluster-rank=4")
    monkeypatch.setenv("GPU_INIT_KERNELS", "numpy")
    run(tmp_path / "forced", *small[0])
    assert asked == [(True, True, False), (True, True, True)]
    assert before_reading == [0, 1, 2, 2]


@pytest.mark.parametrize("packed", [False, True])
def test_text_files_count_by_their_bytes(tmp_path, monkeypatch, packed):
    text = pd.DataFrame({"user_id": np.arange(900) % 30, "item_id": np.arange(900) % 7}).to_csv(index=False).encode()
    path = tmp_path / ("log.csv.gz" if packed else "log.csv")
    path.write_bytes(gzip.compress(text) if packed else text)
    size = path.stat().st_size * (tables._PACKED if packed else 1)
    found = []
    for most in (costs.reading_seconds(0, size), costs.reading_seconds(0, size - 1)):
        monkeypatch.setattr(kernels, "NUMPY_SECONDS", most)
        axis = interactions.ItemAxis(7)
        found.append(interactions.read(CpuBackend("test"), str(path), interactions.Columns(), axis, None).kernels)
    assert found == ["numpy", "numba"]


def test_the_call_from_python_follows_the_same_rule(monkeypatch):
    from gpu_init.method import kmeans
    from tests.method.test_method import catalogue

    R, F = catalogue()
    matrix = R.tocsr()
    matrix.sum_duplicates()
    seconds = costs.fitting_seconds(*matrix.shape, matrix.nnz, [one.shape[1] for one in F.values()], 8)
    used, fit = [], kmeans.fit
    monkeypatch.setattr(
        kmeans, "fit", lambda device, *given: (used.append(device.kernels.name), fit(device, *given))[1]
    )
    for most in (seconds, 0.99 * seconds):
        monkeypatch.setattr(kernels, "NUMPY_SECONDS", most)
        gpu_init.initialize(matrix, F, backend="cpu")
    assert used == ["numpy", "numpy", "numba", "numba"]


def test_a_backend_keeps_what_it_says_to_whom():
    said = []
    device = select("cpu", said.append)
    for seconds, name in ((0, "numpy"), (1e9, "numba")):
        other = for_work(device, seconds)
        assert other.kernels.name == name
        other.say(name)
    assert said == ["numpy", "numba"]


# A run that goes on.


def loaded(arguments, out, **more):
    asked = {key: value for key, _, value in (one[2:].partition("=") for one in arguments if "features" not in one)}
    features = dict(one.split("=", 2)[1:] for one in arguments if "features" in one)
    return config.load(None, {}, {**asked, "features": features, "out": str(out), **more})


def test_an_identity_holds_only_what_is_forced(small, tmp_path, monkeypatch):
    asked = loaded(small[0], tmp_path / "out")
    assert manifest.identity_of(asked, [], "cpu")["program"]["kernels"] is None
    for most in (0, 1e9):
        monkeypatch.setattr(kernels, "NUMPY_SECONDS", most)
        assert manifest.identity_of(asked, [], "cpu")["program"]["kernels"] is None
    monkeypatch.setenv("GPU_INIT_KERNELS", "numba")
    assert manifest.identity_of(asked, [], "cpu")["program"]["kernels"] == "numba"


def test_an_unfinished_run_goes_on_whatever_was_compiled_since(small, tmp_path, monkeypatch, capsys):
    from gpu_init.kernels import build, cpu

    whole = run(tmp_path / "whole", *small[0])
    step = Progress.step

    def end(progress, name, *more, **options):
        if name == "write text":
            raise KeyboardInterrupt
        return step(progress, name, *more, **options)

    again = ["run", f"--out={tmp_path}/out", *small[0]]
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "step", end)
        assert main(again) == 130
    for one in (*build.READING, *cpu.FITTING):
        one.prepare()
    monkeypatch.setenv("GPU_INIT_KERNELS", "numba")
    assert main([*again, "--resume"]) == 2
    assert "program.kernels" in capsys.readouterr().err
    monkeypatch.delenv("GPU_INIT_KERNELS")
    assert main([*again, "--resume"]) == 0
    assert gpu_init.load(tmp_path / "out").manifest["files"] == whole.manifest["files"]


# What is compiled.

COMPILED = """
import sys, threading
from collections import Counter
from numba.core import event
from gpu_init.cli import main
from gpu_init.kernels import compiled

started, kernels = [], []
kernel = compiled.Kernel.__init__
def noted(one, function, *given):
    kernels.append(function)
    kernel(one, function, *given)
compiled.Kernel.__init__ = noted

class Listener(event.Listener):
    def on_start(self, one):
        started.append(one.data["dispatcher"].py_func)
    def on_end(self, one):
        pass

event.register("numba:compile", Listener())
for arguments in sys.argv[1:]:
    assert main(["run", *arguments.split()]) == 0
    for thread in threading.enumerate():
        if thread.name == "compile kernels":
            thread.join()
    outside = [function for function in started if function in kernels]
    assert Counter(outside) <= Counter(kernels), "a kernel has more than one signature"
    print("compiled", *(function.__name__ for function in outside))
"""


def test_few_functions_are_compiled(tmp_path):
    """What is called from outside; a large job compiles the same, as nothing about a signature hangs on sizes."""
    plain, other = tmp_path / "plain", tmp_path / "other"
    plain.mkdir(), other.mkdir()
    first = [*generated(plain, 300, groups=3), f"--out={plain}/out"]
    generated(other, 300, weighted=True)
    log = pd.read_parquet(other / "log.parquet")
    log["user_id"] = "u" + log["user_id"].astype(str)
    log.to_parquet(other / "log.parquet")
    second = [f"--interactions={other}/log.parquet", f"--features=text={other}/text.npy", f"--out={other}/out"]
    second += ["--cluster-on=interactions", "--cluster-rank=8", "--weight-column=rating", "--lambda=attention"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "GPU_INIT_KERNELS": "numba"}
    for name in ("NUMBA_CACHE_DIR", "GPU_INIT_MACHINE_CODE"):
        environment.pop(name, None)
    command = [sys.executable, "-c", COMPILED, " ".join(first), " ".join(second)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    one, both = ([*line.split()[1:]] for line in done.stdout.splitlines() if line.startswith("compiled"))
    assert {"_fill", "_weighted_sums"} <= set(one)
    assert len(one) <= 12, one
    assert "_gram" in both
    assert len(both) <= 16, both
    assert list((tmp_path / "cache").rglob("*.nbc"))
