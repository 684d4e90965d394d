"""The whole job, from Parquet to artifact, against two others, each run in a process of its own.

The baseline is the same job written with pandas, scipy, scikit-learn and numpy, which syncs and hashes nothing. The
floor is to read the input with pyarrow, and to write, hash and sync as many bytes as the artifact has.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import baselines
import numpy as np
from common import Cost, arguments, features, plot, process_cost, row, show, write_interactions

OURS, BASELINE, FLOOR = "gpu-init", "pandas + scipy + scikit-learn + numpy", "read and write alone"


class Size(NamedTuple):
    """Sizes of the data, and the number of timed repeats."""

    users: int
    items: int
    interactions: int
    width: int
    repeats: int


SIZES = {
    "quick": Size(5_000, 500, 40_000, 16, 1),
    "default": Size(1_000_000, 50_000, 10_000_000, 256, 1),
    "large": Size(5_000_000, 200_000, 50_000_000, 384, 3),
}


def main() -> None:
    given = arguments(__doc__, variants=True)
    size = SIZES[given.size]
    lines = []
    seconds: dict[str, list[float]] = {}
    for variant in given.features:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_interactions(folder / "interactions.parquet", size.users, size.items, size.interactions)
            np.save(folder / "features.npy", features(variant, size.items, size.width))
            rounds = [measure(folder, size.users) for _ in range(size.repeats)]
        costs = {
            way: Cost(statistics.median(one[way][0].seconds for one in rounds), max(one[way][0].peak for one in rounds))
            for way in rounds[0]
        }
        inertia = {way: facts["inertia"] for way, (_, facts) in rounds[0].items() if "inertia" in facts}
        facts = {
            "seconds": costs[OURS].seconds,
            "baseline_s": costs[BASELINE].seconds,
            "floor_s": costs[FLOOR].seconds,
            "speedup": costs[BASELINE].seconds / costs[OURS].seconds,
            "times_floor": costs[OURS].seconds / costs[FLOOR].seconds,
            "inertia_ratio": inertia[OURS] / inertia[BASELINE],
            "peak_mib": costs[OURS].peak >> 20,
            "baseline_peak_mib": costs[BASELINE].peak >> 20,
        }
        counts = {"users": size.users, "items": size.items, "interactions": size.interactions}
        row(given.results / "job.csv", **counts, D=size.width, K=baselines.CLUSTERS, features=variant, **facts)
        lines.append([variant, *facts.values()])
        for way, cost in costs.items():
            seconds.setdefault(way, []).append(cost.seconds)
    written = 4 * size.users * size.width / 1e9
    title = (
        f"the job, {size.users:,} users, {size.interactions:,} interactions, D {size.width}: {written:.3g} GB written"
    )
    heads = ["seconds", "baseline", "floor", "times faster", "times the floor", "inertia ratio"]
    heads += ["peak MiB", "baseline peak MiB"]
    show(title, ["features", *heads], lines)
    plot(given.results / "job.png", title, "seconds", given.features, seconds)


def measure(folder: Path, users: int) -> dict[str, tuple[Cost, dict[str, Any]]]:
    """Run each job once; give its cost, and the inertia where it has K-means."""
    paths = [str(folder / "interactions.parquet"), str(folder / "features.npy")]
    out = folder / "out"
    results = {}
    script = [sys.executable, str(Path(baselines.__file__))]
    for way, command in {
        OURS: job_command(paths[0], paths[1], users, out, baselines.CLUSTERS),
        BASELINE: [*script, "job", *paths, str(users), str(out)],
        FLOOR: [*script, "floor", *paths, str(users), str(out)],
    }.items():
        cost = process_cost(command, warm_up=way == OURS)
        if way == OURS:
            manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
            facts = {"inertia": manifest["modalities"]["features"]["kmeans"]["inertia"][-1]}
        else:
            facts = json.loads((out / "facts.json").read_text(encoding="utf-8"))
        results[way] = (cost, facts)
        shutil.rmtree(out)
    return results


def job_command(interactions: str, features_path: str, users: int, out: Path, clusters: int) -> list[str]:
    """Give the command that runs our job."""
    command = [sys.executable, "-m", "gpu_init", "run", "--backend", "cpu", "--interactions", interactions]
    command += ["--user-column", baselines.COLUMNS[0], "--item-column", baselines.COLUMNS[1]]
    command += ["--features", f"features={features_path}", "--users", str(users), "--out", str(out), "--overwrite"]
    return [*command, "--lambda", str(baselines.LAMBDA), "--clusters", str(clusters)]


if __name__ == "__main__":
    main()
