"""What every benchmark shares: rows with machine and versions, runs in turn, the machine's copy bandwidth."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import itertools
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from gpu_init.version import __version__

RESULTS = Path(__file__).parent / "results"

_PACKAGES = ("numpy", "scipy", "scikit-learn", "numba")


class Timing(NamedTuple):
    """Median seconds of a function, and how many times the first function's median that is."""

    median: float
    ratio: float


def environment() -> dict[str, str]:
    """Date, machine and versions: what a figure means nothing without."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": _cpu_model(),
        "cores": str(cores()),
        "memory_gib": f"{memory / 2**30:.0f}",
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in _PACKAGES},
        "gpu_init": __version__,
    }


def row(csv_path: str | Path, **fields: Any) -> None:
    """Append ``fields``, after date, machine and versions, to a CSV file.

    A file with other columns keeps its rows: the columns become those of both.
    """
    path = Path(csv_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = {**environment(), **{name: _text(value) for name, value in fields.items()}}
    rows: list[dict[str, str]] = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    rows.append(new)
    columns = list(dict.fromkeys(name for each in rows for name in each))
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table."""
    table = Table(title=title, title_justify="left")
    for position, column in enumerate(columns):
        table.add_column(column, justify="left" if position == 0 else "right", overflow="fold")
    for each in rows:
        table.add_row(*map(_text, each))
    Console().print(table)


def alternate(functions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Timing]:
    """Run the functions in turn, ``repeats`` rounds after one that is not counted, all in this process.

    Taking turns spreads what else the machine does evenly over all of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    first = next(iter(medians.values()))
    return {name: Timing(median, median / first) for name, median in medians.items()}


def copy_bandwidth(n_bytes: int, repeats: int = 5) -> float:
    """Bytes per second, read plus written, of the best copy of ``n_bytes`` on all the cores."""
    source = np.ones(n_bytes, np.uint8)
    target = np.zeros(n_bytes, np.uint8)  # touched by the round that is not counted
    edges = np.linspace(0, n_bytes, cores() + 1).astype(np.int64)
    parts = [slice(start, stop) for start, stop in itertools.pairwise(edges)]
    best = float("inf")
    with ThreadPoolExecutor(cores()) as pool:
        for turn in range(repeats + 1):
            start = time.perf_counter()
            list(pool.map(lambda part: np.copyto(target[part], source[part]), parts))
            if turn:
                best = min(best, time.perf_counter() - start)
    return 2 * n_bytes / best


def peak_memory(*, children: bool = False) -> int:
    """Most bytes that this process, or the largest of its ended children, ever had in memory."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN if children else resource.RUSAGE_SELF)
    return usage.ru_maxrss * 1024  # Linux counts in KiB


def cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _cpu_model() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        models = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
