"""The first job on a machine, before anything is compiled, and the same job again, each in a process of its own.

The steps of the job are also timed with numpy's kernels and with numba's, and compared with the seconds that
`gpu_init.kernels.costs` expects of numpy's: jobs for which it expects `NUMPY_SECONDS` or less use numpy's kernels, so
that nothing is compiled. For reading it expects three times the seconds that reading takes, as only two kernels have to
be compiled for it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import arguments, features, process_cost, row, show, write_interactions

from gpu_init.kernels import costs

TIKTOK = Path(__file__).resolve().parents[2] / "shared" / "data" / "tiktok"
CLUSTERS = 8


class Size(NamedTuple):
    """Size of a job on generated data."""

    users: int
    items: int
    interactions: int
    width: int


SIZES = {
    "quick": [Size(2_000, 500, 20_000, 16)],
    "default": [Size(100_000, 20_000, 1_000_000, 128), Size(500_000, 50_000, 5_000_000, 256)],
    "large": [Size(1_000_000, 100_000, 10_000_000, 256)],
}


def main() -> None:
    given = arguments(__doc__)
    lines = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        jobs: list[tuple[str, list[str], Size | None]] = []
        if TIKTOK.is_dir():
            flags = [f"--interactions={TIKTOK / 'tiktok.inter'}", "--where=x_label == 0"]
            flags += [f"--features={part}={TIKTOK / f'{part}_feat.npy'}" for part in ("image", "audio")]
            jobs.append(("TikTok", flags, None))
        for size in SIZES[given.size]:
            place = folder / str(size.users)
            place.mkdir()
            write_interactions(place / "clicks.parquet", size.users, size.items, size.interactions)
            np.save(place / "f.npy", features("groups", size.items, size.width))
            flags = [f"--interactions={place / 'clicks.parquet'}", f"--features=f={place / 'f.npy'}"]
            jobs.append((f"{size.users:,} users, D {size.width}", flags, size))
        for title, flags, made in jobs:
            facts = measure(folder, flags)
            facts |= {"expected_reading_s": "", "expected_fitting_s": ""}
            if made is not None:
                users, items, pairs, width = made
                facts["expected_reading_s"] = costs.reading_seconds(pairs, 0)
                facts["expected_fitting_s"] = costs.fitting_seconds(users, items, pairs, [width], CLUSTERS)
            row(given.results / "first_job.csv", job=title, **facts)
            lines.append([title, *facts.values()])
    columns = ["kernels", "first job s", "second job s", "numpy: reading s", "fitting s"]
    columns += ["numba: reading s", "fitting s", "expected: reading s", "fitting s"]
    show("first jobs, each in a new process", ["job", *columns], lines)


def measure(folder: Path, flags: list[str]) -> dict[str, Any]:
    """Give the seconds of two jobs with the kernels that the rule chooses, and of the steps with either kind."""
    out = folder / "out"
    command = [sys.executable, "-m", "gpu_init", "run", "--backend=cpu", *flags, f"--out={out}", "--overwrite"]
    with tempfile.TemporaryDirectory() as cache:
        first = timed(command, {"XDG_CACHE_HOME": cache})
        kernels = manifest(out)["backend"]
        again = timed(command, {"XDG_CACHE_HOME": cache})
    taken: dict[str, Any] = {
        "kernels": f"{kernels['reading_kernels']}, {kernels['kernels']}",
        "first_s": first,
        "again_s": again,
    }
    for name in ("numpy", "numba"):
        timed(command, {"GPU_INIT_KERNELS": name})
        timed(command, {"GPU_INIT_KERNELS": name})
        steps = {step["step"]: step["seconds"] for step in manifest(out)["timings"]["steps"]}
        taken[f"{name}_reading_s"] = steps["read interactions"]
        taken[f"{name}_fitting_s"] = sum(
            spent for step, spent in steps.items() if step.startswith(("cluster ", "write "))
        )
    return taken


def manifest(out: Path) -> Mapping[str, Any]:
    """Read an artifact's manifest."""
    return json.loads((out / "manifest.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def timed(command: list[str], environment: dict[str, str]) -> float:
    """Give the seconds of a command that runs with some additional environment variables."""
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        return process_cost(command).seconds
    finally:
        os.environ.clear()
        os.environ.update(before)


if __name__ == "__main__":
    main()
