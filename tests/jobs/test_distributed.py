"""The job over a Dask cluster makes what one process makes, whatever becomes of its workers."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import scipy.sparse

import gpu_init
from gpu_init import cli, tasks
from gpu_init.artifact import read
from gpu_init.artifact.rows import Folder
from gpu_init.backend.select import select
from gpu_init.cluster import shuffle, worker
from gpu_init.cluster import workers as cluster_workers
from gpu_init.errors import ResourceError
from gpu_init.kernels import Csr
from gpu_init.parts import Plan, Process, joined
from gpu_init.settings import Settings

pytestmark = pytest.mark.skipif(importlib.util.find_spec("distributed") is None, reason="needs Dask")

USERS, ITEMS = 30_000, 400


@pytest.fixture(scope="module")
def cluster():
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0", env={"NUMBA_NUM_THREADS": "1"}
    ) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Users in groups, some of them cold in a modality; ids of several kinds; weights and times."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    users = np.concatenate([np.arange(USERS), rng.integers(0, USERS, 4 * USERS)])
    items = (8 * rng.integers(0, ITEMS // 8, len(users)) + (users + (rng.random(len(users)) < 0.2)) % 8) % ITEMS
    log = pd.DataFrame({"user_id": users, "item_id": items, "rating": rng.integers(1, 6, len(users))})
    log["timestamp"] = rng.integers(0, 100, len(users)) * 86_400
    log["x_label"] = (rng.random(len(users)) < 0.1).astype(int)
    (folder / "log").mkdir()
    half = len(log) // 2
    log[:half].to_parquet(folder / "log" / "a.parquet", row_group_size=20_000)
    log[half:].to_parquet(folder / "log" / "b.parquet", row_group_size=30_000)
    log.assign(user_id=3 * log["user_id"] - 7).to_parquet(folder / "gaps.parquet", row_group_size=50_000)
    log.assign(user_id="u" + log["user_id"].astype("str")).to_csv(folder / "text.csv", index=False)
    pairs = (log["user_id"].to_numpy(), log["item_id"].to_numpy())
    scipy.sparse.save_npz(folder / "matrix.npz", scipy.sparse.coo_array((log["rating"].astype(np.float64), pairs)))
    image = rng.normal(size=(ITEMS, 24)).astype(np.float32) + 4 * np.eye(8, 24, dtype=np.float32)[np.arange(ITEMS) % 8]
    np.save(folder / "image.npy", image)
    text = rng.normal(size=(ITEMS, 12)).astype(np.float16)
    text[rng.random(ITEMS) < 0.3] = np.nan
    np.save(folder / "text.npy", text)
    table = pd.DataFrame(text[: ITEMS // 2].astype(np.float32), columns=[f"f{n}" for n in range(12)])
    table.insert(0, "item_id", np.arange(ITEMS // 2))
    table.dropna().to_parquet(folder / "text.parquet")
    return folder


def arguments(data, out, *flags, log="log", features=("image.npy", "text.npy")):
    named = [f"--features={path.split('.')[0]}={data}/{path}" for path in features]
    rows = [] if log.endswith(".npz") else ["--where=x_label == 0"]
    return ["run", f"--interactions={data}/{log}", *rows, *named, f"--out={out}", *flags]


def assert_same(one, other):
    """The same bytes in all files."""
    ours, theirs = gpu_init.load(one).manifest, gpu_init.load(other).manifest
    assert read.verify(other) == []
    assert {name: file["sha256"] for name, file in ours["files"].items()} == {
        name: file["sha256"] for name, file in theirs["files"].items()
    }
    assert ours["modalities"] == theirs["modalities"]
    return ours, theirs


JOBS = {
    "plain": ((), {}),
    "users": ((f"--users={USERS + 9000}", "--weight-column=rating", "--dtype=float16"), {}),
    "sym": (("--weighting=sym", "--scale=items", "--weight-column=rating"), {}),
    "items": (("--cluster-on=items", "--weighting=sym"), {}),
    "projected": (("--dim=6", "--whiten", "--scale=items"), {"log": "gaps.parquet"}),
    "recency": (("--half-life=5d", "--weight-column=rating"), {"log": "text.csv"}),
    "joined": ((), {"features": ("text.parquet",), "log": "gaps.parquet"}),
    "auto": (("--clusters=auto",), {"features": ("image.npy",)}),
    "shrink": (("--lambda=shrink", "--scale=items"), {}),
    "attention": (("--lambda=attention", "--weight-column=rating"), {}),
    "interactions": (("--cluster-on=interactions", "--cluster-rank=8", "--lambda=shrink"), {}),
    "matrix": (("--lambda=shrink", f"--users={USERS + 9}"), {"log": "matrix.npz"}),
    "many": (("--clusters=300", "--restarts=2"), {"features": ("image.npy",)}),
}


OFTEN = ("recency", "interactions", "matrix")  # the others are among the long proofs
NUMBA = ("recency", "many", "sym", "items")  # the others are small enough for numpy's kernels


@pytest.mark.parametrize(
    "job", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in JOBS]
)
def test_a_job_over_workers_makes_what_one_process_makes(job, cluster, data, tmp_path, monkeypatch):
    flags, options = JOBS[job]
    if job in NUMBA:
        monkeypatch.setenv("GPU_INIT_KERNELS", "numba")  # here alone: workers are told
    assert cli.main(arguments(data, tmp_path / "one", *flags, **options)) == 0
    address = f"--scheduler={cluster.scheduler_address}"
    assert cli.main(arguments(data, tmp_path / "many", *flags, address, **options)) == 0
    ours, theirs = assert_same(tmp_path / "one", tmp_path / "many")
    for key in ("kernels", "reading_kernels"):
        assert ours["backend"][key] == theirs["backend"][key] == ("numba" if job in NUMBA else "numpy")
    carried = {step["step"]: step["carried_bytes"] for step in theirs["timings"]["steps"] if "carried_bytes" in step}
    assert (carried["read interactions"] > 0) == (job != "matrix")  # which this process reads
    for name in theirs["modalities"]:
        assert 0 < carried[f"write {name}"] < 100_000  # workers write: the rows themselves are not carried
    weights = [one["interactions"].pop("weight") for one in (ours, theirs)]  # summed part by part, or at once
    assert weights[0] == pytest.approx(weights[1], rel=1e-9)
    for key in ("users", "items", "interactions"):
        assert ours[key] == theirs[key]


def test_assign_over_workers_makes_the_bytes_of_one_process(cluster, data, tmp_path):
    flags = ("--weighting=sym", "--lambda=shrink", "--scale=items", "--clusters=5", f"--users={USERS}")
    assert cli.main(arguments(data, tmp_path / "job", *flags)) == 0
    job = ["assign", str(tmp_path / "job"), f"--interactions={data}/log", "--where=x_label == 1", f"--users={USERS}"]
    assert cli.main([*job, f"--out={tmp_path / 'one'}"]) == 0
    here = ("--memory=500MB", f"--scheduler={cluster.scheduler_address}")
    assert cli.main([*job, f"--out={tmp_path / 'many'}", *here]) == 0
    ours, theirs = assert_same(tmp_path / "one", tmp_path / "many")
    assert ours["files"] == theirs["files"]
    assert theirs["cluster"]["workers"] == 2


def test_parts_join_to_the_same_in_runs_of_any_length():
    def join(one, other):
        return f"({one}{other})"

    for count in range(1, 30):
        whole = joined(join, map(str, range(count)))
        for workers in range(1, 9):
            length = cluster_workers.run_length(count, workers)
            runs = [range(first, min(first + length, count)) for first in range(0, count, length)]
            most = length * -(-len(runs) // workers)
            assert min(most, count) <= max(cluster_workers.EVEN * count / workers, -(-count // workers))
            each = [joined(join, map(str, run)) for run in runs]
            groups = [
                each[first : first + cluster_workers.FAN_IN] for first in range(0, len(each), cluster_workers.FAN_IN)
            ]
            assert joined(join, [joined(join, group) for group in groups]) == whole
    assert [cluster_workers.run_length(8, workers) for workers in (1, 2, 3, 4, 8, 9)] == [16, 4, 1, 2, 1, 1]


def test_runs_of_parts_are_dealt_in_turn_and_stay_where_they_are():
    there = {"a": 1, "b": 1}
    workers = cluster_workers.Workers(None, SimpleNamespace(nthreads=lambda: there), "run")
    parts = 12

    def places():
        workers._arrange(parts)
        return "".join(workers._places[number] for number in range(12))

    assert places() == "aabbaabbaabb"
    there["c"] = there.pop("a")
    assert places() == "ccbbccbbccbb"
    there["d"] = 1
    assert places() == "ccccbbbbdddd"
    there, parts = dict.fromkeys("abcdefg", 1), 100
    workers._places.clear()
    assert places() == "aaaabbbbcccc"
    assert max(Counter(workers._places.values()).values()) == 15


def test_batches_of_any_size_come_to_the_same_bytes(cluster, data, tmp_path, monkeypatch):
    """Pairs that come more than once have weights whose sum hangs on their order; a run is resumed between batches."""
    log = pd.read_parquet(data / "log")
    log["rating"] = np.random.default_rng(1).lognormal(size=len(log))
    log.to_parquet(tmp_path / "log.parquet", row_group_size=10_000)
    flags = (f"--interactions={tmp_path}/log.parquet", "--weight-column=rating", "--half-life=30d")
    flags += (f"--scheduler={cluster.scheduler_address}", "--clusters=2", f"--users={USERS}")
    one, other, resumed = (
        arguments(data, tmp_path / name, *flags, features=("image.npy",)) for name in ("one", "other", "resumed")
    )
    monkeypatch.setattr(shuffle, "PIECE_ROWS", 10_000)
    begin, batches = cluster_workers.Workers.shuffle, []

    def noted(self, reading, calls, batch):
        batches.append(batch)
        return begin(self, reading, calls, batch)

    def enough():
        raise ResourceError("this is enough")

    monkeypatch.setattr(cluster_workers.Workers, "shuffle", noted)
    monkeypatch.setattr(shuffle, "BATCH_PIECES", 100)
    assert cli.main(one) == 0
    assert batches == [(0, 15)]
    monkeypatch.setattr(shuffle, "BATCH_PIECES", 3)
    monkeypatch.setattr(shuffle, "BATCHES", 100)
    assert cli.main(other) == 0
    assert batches[1:] == [(0, 6), (6, 12), (12, 15)]
    resumed.append("--resume")
    batches.clear()
    monkeypatch.setattr(
        cluster_workers.Workers, "shuffle", lambda self, *given: enough if batches else noted(self, *given)
    )
    assert cli.main(resumed) == 3
    monkeypatch.setattr(cluster_workers.Workers, "shuffle", noted)
    monkeypatch.setattr(shuffle, "BATCH_PIECES", 4)
    batches.clear()
    assert cli.main(resumed) == 0
    assert batches == [(6, 14), (14, 15)]
    made = [(tmp_path / name / "image" / "users.npy").read_bytes() for name in ("one", "other", "resumed")]
    assert made[0] == made[1] == made[2]


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="needs Linux")
def test_what_a_task_looked_at_of_a_part_is_left_to_the_system(tmp_path):
    items = np.random.default_rng(0).integers(0, ITEMS, 40 * USERS, np.int32)
    work = worker.Work("run", "cpu", "numpy", str(tmp_path), Plan(Settings(), (0, USERS), ITEMS, len(items), 0))
    (tmp_path / worker.SCRATCH).mkdir()
    shuffle.put_part(work, 0, Csr(40 * np.arange(USERS + 1), items, None))
    source = worker.FolderSource(select("cpu"), work)
    process = Process(select("cpu"), work.plan, Folder(str(tmp_path)), source)
    for _ in range(2):
        assert (tasks.item_sums(process.part(0)) == np.bincount(items, minlength=ITEMS)).all()
        source.let_go(0)
        with open("/proc/self/smaps", encoding="utf-8") as file:
            mapped = file.read().split(f"{tmp_path}/{worker.SCRATCH}/0.indices.npy\n")[1]
        assert int(mapped.split("Size:")[1].split()[0]) >= items.nbytes >> 10
        assert int(mapped.split("Rss:")[1].split()[0]) == 0


@pytest.mark.slow
def test_a_task_that_kills_every_worker_ends_the_job_to_be_resumed(cluster, data, tmp_path, monkeypatch, capsys):
    job = arguments(data, tmp_path / "many", f"--scheduler={cluster.scheduler_address}", "--resume")
    with monkeypatch.context() as patch:
        patch.setattr(tasks, "label", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        assert "workers died of a task" in refused(capsys, job, code=3)
    cluster.wait_for_workers(2)
    assert cli.main(job) == 0
    said = capsys.readouterr().err
    assert "going on with the unfinished run" in said
    assert "cluster image" not in said
    assert cli.main(arguments(data, tmp_path / "one")) == 0
    assert_same(tmp_path / "one", tmp_path / "many")


@pytest.mark.parametrize("kills", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 11))])
def test_a_worker_killed_at_any_moment_costs_its_work_alone(kills, cluster, data, tmp_path):
    assert cli.main(arguments(data, tmp_path / "one", "--weighting=sym", "--scale=items")) == 0
    job = arguments(
        data, tmp_path / "many", "--weighting=sym", "--scale=items", f"--scheduler={cluster.scheduler_address}"
    )
    begun = time.monotonic()
    assert cli.main([*job[:-2], f"--out={tmp_path}/before", job[-1]]) == 0
    whole = time.monotonic() - begun
    dice = random.Random(kills)

    def kill():
        worker = dice.choice(list(cluster.workers.values()))
        os.kill(worker.pid, signal.SIGKILL)

    timer = threading.Timer(whole * dice.uniform(0.05, 0.95), kill)
    timer.start()
    assert cli.main(job) == 0
    timer.join()
    assert_same(tmp_path / "one", tmp_path / "many")
    cluster.scale(2)


def refused(capsys, job, code=2):
    capsys.readouterr()
    assert cli.main(job) == code
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("gpu-init: ")][-1]


def test_what_cannot_be_is_refused(cluster, data, tmp_path, capsys):
    here = f"--scheduler={cluster.scheduler_address}"
    out = tmp_path / "out"
    assert "no scheduler answers" in refused(capsys, arguments(data, out, "--scheduler=tcp://127.0.0.1:9"))
    assert "no scheduler answers" in refused(capsys, arguments(data, out, "--scheduler=nonsense"))
    assert "a folder they all see" in refused(capsys, arguments(data, "s3://bucket/out", here))
    assert "--backend cuda" in refused(capsys, arguments(data, out, here, "--backend=cuda"))
    assert "kmeans cuml runs in one process" in refused(capsys, arguments(data, out, here, "--kmeans=cuml"))
    assert "99999999 clusters" in refused(capsys, arguments(data, out, here, "--clusters=99999999"))
    assert "no column none" in refused(capsys, arguments(data, out, here, "--weight-column=none"))
    assert "beyond --users 5" in refused(capsys, arguments(data, out, here, "--users=5"))
    wrong = pd.read_parquet(data / "log" / "a.parquet").assign(item_id=ITEMS + 7)
    wrong.to_parquet(tmp_path / "wrong.parquet", row_group_size=7000)
    job = arguments(data, out, here, f"--interactions={tmp_path}/wrong.parquet", f"--users={USERS}")
    assert f"has item {ITEMS + 7}, beyond" in refused(capsys, job)  # by a look before all are brought together
    job.remove("--where=x_label == 0")
    wrong.drop(columns="x_label").to_parquet(tmp_path / "wrong.parquet", row_group_size=7000)
    assert f"has item {ITEMS + 7}, beyond" in refused(capsys, job)  # which there is not
    assert sorted(path.name for path in tmp_path.iterdir()) == ["wrong.parquet"]


def test_rows_are_named_by_their_place_in_the_file(cluster, data, tmp_path, capsys):
    log = pd.read_parquet(data / "log" / "a.parquet")
    log.loc[50_001, "rating"] = -1
    log["x_label"] = 0
    log.to_parquet(tmp_path / "log.parquet", row_group_size=7000)
    job = [f"--interactions={tmp_path}/log.parquet", "--weight-column=rating"]
    said = [
        refused(capsys, arguments(data, tmp_path / "out", *job, *scheduler))
        for scheduler in ([], [f"--scheduler={cluster.scheduler_address}"])
    ]
    assert said[0] == said[1]
    assert "row 50001 has weight -1" in said[0]


@pytest.mark.slow
def test_a_run_is_resumed_where_the_scheduler_was_lost(data, tmp_path, capsys):
    from distributed import LocalCluster

    flags = ("--weighting=sym", "--scale=items", "--lambda=shrink")
    assert cli.main(arguments(data, tmp_path / "one", *flags)) == 0
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": "127.0.0.1:0"}
    program = "from distributed import LocalCluster; import time\n"
    program += f"with LocalCluster(**{options!r}) as c: print(c.scheduler_address, flush=True); time.sleep(600)"
    for step in ("cluster image", "write text"):
        process = subprocess.Popen(
            [sys.executable, "-c", f"if __name__ == '__main__':\n exec({program!r})"], stdout=subprocess.PIPE, text=True
        )
        address = process.stdout.readline().strip()
        job = arguments(data, tmp_path / "many", *flags, f"--scheduler={address}", "--resume", "--log-format=json")
        running = subprocess.Popen([sys.executable, "-m", "gpu_init", *job], stderr=subprocess.PIPE, text=True)
        said = []
        for line in running.stderr:
            said.append(json.loads(line))
            if (said[-1]["event"], said[-1].get("step")) == ("step_started", step):
                process.kill()
        assert running.wait() == 3
        assert "--resume" in said[-1]["message"]
    with LocalCluster(**options) as cluster:
        job = arguments(data, tmp_path / "many", *flags, f"--scheduler={cluster.scheduler_address}", "--resume")
        capsys.readouterr()
        assert cli.main(job) == 0
        said = capsys.readouterr().err
    assert "going on with the unfinished run" in said
    assert "cluster image" not in said
    assert_same(tmp_path / "one", tmp_path / "many")


@pytest.mark.slow
@pytest.mark.parametrize("step", ["read interactions", "cluster image", "write image", "label text"])
def test_a_run_is_resumed_where_its_own_process_was_killed(step, cluster, data, tmp_path, capsys):
    flags = ("--weighting=sym", "--scale=items", f"--scheduler={cluster.scheduler_address}")
    job = arguments(data, tmp_path / "many", *flags)
    running = subprocess.Popen([sys.executable, "-m", "gpu_init", *job, "--log-format=json"], stderr=subprocess.PIPE)
    for line in running.stderr:
        said = json.loads(line)
        if (said["event"], said.get("step")) == ("step_started", step):
            time.sleep(random.Random(step).uniform(0, 0.3))
            running.kill()
    running.wait()
    assert not (tmp_path / "many").exists()
    capsys.readouterr()
    assert cli.main([*job, "--resume"]) == 0
    assert "going on with the unfinished run" in capsys.readouterr().err
    assert cli.main(arguments(data, tmp_path / "one", *flags[:-1])) == 0
    assert_same(tmp_path / "one", tmp_path / "many")
