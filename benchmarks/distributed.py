"""The job on a Dask cluster of this machine against one process: time, memory, artifact, and network traffic.

One, two and four workers share the machine's cores. Every run is a process of its own; runs take turns.
Each number of workers runs the job twice: when the workers have just started, and again. The bytes that a step of
K-means carries are counted twice, by the job and by the loopback device, and compared with a formula. Memory beyond
libraries is the memory beyond that of the same processes in a job of 100,000 interactions.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

# Dask has a package with the name of this script, so this folder comes last on the path, and processes that are started
# here do not have it on their path.
sys.path.append(sys.path.pop(0))
os.environ["PYTHONSAFEPATH"] = "1"

import baselines
import numpy as np
from common import arguments, cores, features, plot, process_cost, row, show, write_interactions
from job import Size, job_command

import gpu_init
from gpu_init import tasks
from gpu_init.artifact import read
from gpu_init.cluster import site as cluster_site
from gpu_init.config import load
from gpu_init.show.progress import Progress

PLAIN = "one process"
COMPARED_ROWS = 1 << 18  # rows of two artifacts that are compared at a time
_PATIENCE = 60  # seconds in which a cluster has to start


SIZES = {
    "quick": Size(20_000, 500, 100_000, 16, 1),
    "default": Size(2_000_000, 50_000, 20_000_000, 128, 3),
    "large": Size(10_000_000, 200_000, 100_000_000, 128, 1),
}
WORKERS = {"quick": (1, 2), "default": (1, 2, 4), "large": (2,)}
BILLION = Size(10**9, 10**8, 5 * 10**10, 384, 0)


def main() -> None:
    given = arguments(__doc__)
    size = SIZES[given.size]
    counts = {"users": size.users, "items": size.items, "interactions": size.interactions}
    ways: list[int | None] = [None, *WORKERS[given.size]]
    lines, seconds = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        libraries = None if given.size == "quick" else of_libraries(folder / "small", ways[1])
        write_inputs(folder, size)
        rounds = [{way: run(folder, size.users, way, keep=turn == 0) for way in ways} for turn in range(size.repeats)]
        carried = shuffled_bytes(folder / "2", size)
        needs = project(folder / "one", size, carried)
        for way in ways:
            seconds.append(statistics.median(one[way].seconds for one in rounds))
            facts: dict[str, Any] = {
                "seconds": seconds[-1],
                "ratio": statistics.median(one[way].seconds / one[None].seconds for one in rounds),
                "ratio_at_first": statistics.median(one[way].first / one[None].seconds for one in rounds),
                "process_peak_mib": max(one[way].driver for one in rounds) >> 20,
            }
            if way is not None:
                peak_bytes = max(one[way].worker for one in rounds)
                facts["worker_peak_mib"], facts["worker_beside_libraries"] = peak_bytes >> 20, ""
                if libraries:
                    alone = max(one[None].driver for one in rounds) - libraries.driver
                    facts["worker_beside_libraries"] = (peak_bytes - libraries.worker) / alone
                facts |= difference(folder / "one", folder / str(way))
                facts |= traffic(folder, size, way)
            path, clusters = given.results / "distributed.csv", baselines.CLUSTERS
            row(path, **counts, D=size.width, K=clusters, workers=way or 0, **facts)
            lines.append([PLAIN if way is None else str(way), *facts.values()])
    title = f"the job over Dask: {size.users:,} users, {size.interactions:,} interactions, D {size.width}"
    heads = ["seconds", "times one process", "times at first", "driver MiB", "worker MiB", "times beyond libraries"]
    heads += ["share of other labels", "largest difference", "bytes per step", "loopback bytes", "formula"]
    show(title, ["workers", *heads], [[*line, *[""] * (1 + len(heads) - len(line))] for line in lines])
    show(
        f"resources that {BILLION.users:.0e} users, {BILLION.items:.0e} items, {BILLION.interactions:.0e} interactions,"
        f" D {BILLION.width} would need with K {baselines.CLUSTERS}, by arithmetic",
        ["resource", "amount"],
        needs,
    )
    names = [PLAIN if way is None else f"{way} workers" for way in ways]
    plot(given.results / "distributed.png", title, "seconds", names, {"job": seconds})


class Run(NamedTuple):
    """Seconds of a run, of the first run with new workers, and the most bytes that the process and a worker had."""

    seconds: float
    first: float
    driver: int
    worker: int


def write_inputs(folder: Path, size: Size) -> None:
    """Write interactions and features to a folder."""
    folder.mkdir(exist_ok=True)
    write_interactions(folder / "interactions.parquet", size.users, size.items, size.interactions)
    np.save(folder / "features.npy", features("groups", size.items, size.width))


def of_libraries(folder: Path, workers: int | None) -> Run:
    """Measure the memory of one process, and of a worker, in a job of next to no data."""
    size = SIZES["quick"]
    write_inputs(folder, size)
    process, worker = (run(folder, size.users, way, keep=False) for way in (None, workers))
    return Run(0.0, 0.0, process.driver, worker.worker)


def run(folder: Path, users: int, workers: int | None, *, keep: bool) -> Run:
    """Run one job in one process, or two on a cluster; with ``keep`` the artifact stays, to be compared."""
    out = folder / ("one" if workers is None else str(workers)) if keep else folder / "out"
    paths = (str(folder / "interactions.parquet"), str(folder / "features.npy"))
    command = job_command(*paths, users, out, baselines.CLUSTERS)
    if workers is None:
        cost = process_cost(command, warm_up=True)
        return Run(cost.seconds, cost.seconds, cost.peak, 0)
    with cluster(workers) as (address, processes):
        first, cost = (process_cost([*command, "--scheduler", address]) for _ in range(2))
        return Run(cost.seconds, first.seconds, cost.peak, max(map(peak, processes)))


@contextlib.contextmanager
def cluster(workers: int) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """Start a scheduler and workers that share the cores; give the address and the workers' processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    threads = str(max(1, cores() // workers))
    environment = {**os.environ, "NUMBA_NUM_THREADS": threads, "OMP_NUM_THREADS": threads}

    def start(kind: str, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", f"distributed.cli.dask_{kind}", *arguments, "--no-dashboard"]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    processes = [start("scheduler", "--host", address)]
    try:
        flags = ["--nthreads", threads, "--no-nanny", "--memory-limit", "0", "--local-directory", tempfile.gettempdir()]
        processes += [start("worker", address, *flags) for _ in range(workers)]
        wait_for(address, workers)
        yield address, processes[1:]
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def wait_for(address: str, workers: int) -> None:
    """Return when all workers have joined."""
    dask = importlib.import_module("distributed")  # a type checker would take this script for it
    with dask.Client(address, timeout=_PATIENCE, set_as_default=False) as client:
        client.wait_for_workers(workers, timeout=_PATIENCE)


def peak(process: subprocess.Popen[bytes]) -> int:
    """Give the most bytes that a process has had in memory so far."""
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) << 10


def difference(one: Path, other: Path) -> dict[str, float]:
    """Compare two artifacts."""
    if problems := read.verify(other):
        raise SystemExit(f"{other}: {problems[0]}")
    ours, theirs = gpu_init.load(one)["features"], gpu_init.load(other)["features"]
    starts = range(0, len(ours.users), COMPARED_ROWS)
    parts = [slice(at, at + COMPARED_ROWS) for at in starts]
    largest = max(float(np.abs(ours.users[part] - theirs.users[part]).max()) for part in parts)
    return {"labels_other": float((ours.labels != theirs.labels).mean()), "largest_difference": largest}


def traffic(folder: Path, size: Size, workers: int) -> dict[str, float]:
    """Give the median bytes of a K-means pass: by the job's count, by the loopback device, and by the formula."""
    counted: list[int] = []
    wire: list[int] = []
    plain = tasks.PartedPoints.step

    def step(self: Any, centroids: Any) -> Any:
        workers = self._parts._workers
        before, sent = workers.traffic(), loopback()
        found = plain(self, centroids)
        sums = found.sums()
        wire.append(loopback() - sent)
        counted.append(workers.traffic() - before)
        return found._replace(sums=lambda: sums)

    config = {
        "interactions": str(folder / "interactions.parquet"),
        "features": {"features": str(folder / "features.npy")},
        "users": size.users,
        "backend": "cpu",
        "clusters": baselines.CLUSTERS,
        "out": str(folder / "traffic"),
        "overwrite": True,
    }
    tasks.PartedPoints.step = step  # type: ignore[method-assign]
    try:
        with cluster(workers) as (address, _), Progress(None) as progress:
            cluster_site.run(load(None, {}, {}, {**config, "scheduler": address}), progress)
    finally:
        tasks.PartedPoints.step = plain  # type: ignore[method-assign]
    return {
        "step_bytes": statistics.median(counted),
        "step_wire_bytes": statistics.median(wire),
        "formula_bytes": workers * step_bytes(size.width),
    }


def step_bytes(width: int) -> int:
    """Give the bytes of a K-means step for one worker: centroids to it; sums and counts of its users back."""
    return baselines.CLUSTERS * (2 * 8 * width + 8)


def shuffled_bytes(two: Path, measured: Size) -> float:
    """Give the bytes carried for an interaction that goes to another worker; of two workers, half of them do."""
    manifest = json.loads((two / "manifest.json").read_text(encoding="utf-8"))
    steps = {step["step"]: step for step in manifest["timings"]["steps"]}
    return float(2 * steps["read interactions"]["carried_bytes"] / measured.interactions)


def project(one: Path, measured: Size, carried: float) -> list[tuple[str, str]]:
    """Scale what each step took in one process to a job of `BILLION`; this is arithmetic, and no measurement."""
    manifest = json.loads((one / "manifest.json").read_text(encoding="utf-8"))
    spent = {step["step"]: cores() * step["seconds"] / measured.interactions for step in manifest["timings"]["steps"]}
    users, items, interactions, width, _ = BILLION
    wider = width / measured.width
    hours = {
        "reading": spent["read interactions"] * interactions / 3600,
        "K-means": spent["cluster features"] * interactions / 3600,
        "writing": spent["write features"] * interactions * wider / 3600,
    }
    gigabytes = {
        "features, for every machine to read": 4 * items * width,
        "interactions, over all workers": 4 * interactions + 8 * users,
        "artifact": users * (4 * width + 4),
        "carried when interactions are shuffled": carried * interactions,
        "carried by a step of K-means, each worker": step_bytes(width),
    }
    return [(f"{name}, core hours", f"{value:.3g}") for name, value in hours.items()] + [
        (f"{name}, GB", f"{value / 1e9:.3g}") for name, value in gigabytes.items()
    ]


def loopback() -> int:
    """Give the bytes that the loopback device has carried so far."""
    lines = Path("/proc/net/dev").read_text(encoding="ascii").splitlines()
    return next(int(line.split(":")[1].split()[0]) for line in lines if line.strip().startswith("lo:"))


if __name__ == "__main__":
    main()
