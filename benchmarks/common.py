"""Functions that the benchmarks share: data, tables and CSV rows, timing, the cost of a process, plots."""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib
import importlib.metadata
import importlib.util
import itertools
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.sparse import csr_matrix

from gpu_init.kernels.arrays import empty
from gpu_init.version import __version__

RESULTS = Path(__file__).parent / "results"

VARIANTS = ("groups", "noise")

_PACKAGES = ("numpy", "scipy", "scikit-learn", "numba", "pandas", "pyarrow", "torch", "dask")
_GROUPS = 20  # groups of items, each with its own centre among the features
_POPULARITY_EXPONENT = 0.8  # Zipf exponent of an item's popularity, by rank
_CHUNK = 1 << 22  # interactions that are drawn at a time
_SETTLE = 5  # seconds after which a virtual machine has taken freed memory back, so that each process pays for its own
_PAUSE = 0.25  # seconds between functions, as threads of the previous one may spin for 0.2
# Linux counts the memory of the parent at the start of a process as its own, so a small process has to start it.
_LAUNCHER = """
import resource, subprocess, sys, time
start = time.perf_counter()
code = subprocess.call(sys.argv[2:])
seconds = time.perf_counter() - start
with open(sys.argv[1], "w") as file:
    print(seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=file)
sys.exit(code)
"""


class Timing(NamedTuple):
    """Median seconds of a function, and its ratio to the median of the first function."""

    median: float
    ratio: float


class Cost(NamedTuple):
    """Seconds that a process took, and the most bytes that it had in memory."""

    seconds: float
    peak: int


def arguments(description: str | None, *, variants: bool = False) -> argparse.Namespace:
    """Read the flags that all benchmarks take: ``size``, ``results`` and, where K-means matters, ``features``."""
    parser = argparse.ArgumentParser(description=description)
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", dest="size", action="store_const", const="quick", help="takes seconds")
    sizes.add_argument("--large", dest="size", action="store_const", const="large", help="needs more than 24 GB")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files and plots")
    if variants:
        words = "kinds of features: 20 groups of items plus noise, or noise alone (default: both)"
        parser.add_argument("--features", nargs="+", choices=VARIANTS, default=VARIANTS, help=words)
    parser.set_defaults(size="default")
    return parser.parse_args()


# Data.


def interactions(
    users: int, items: int, count: int, seed: int = 0
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield the users and items of ``count`` interactions, in random order, a chunk at a time.

    Every user has one interaction and a Poisson number of others; items are drawn with a power law of popularity.
    """
    rng = np.random.default_rng(seed)
    everyone, by_rank = rng.permutation(users), rng.permutation(items)
    popularity = np.cumsum(np.arange(1.0, items + 1) ** -_POPULARITY_EXPONENT)
    popularity /= popularity[-1]
    for first in range(0, count, _CHUNK):
        size = min(_CHUNK, count - first)
        who = rng.integers(users, size=size)
        once = everyone[first : first + size]
        who[: len(once)] = once
        yield who, by_rank[np.searchsorted(popularity, rng.random(size), side="right")]


def matrix(users: int, items: int, count: int, seed: int = 0) -> csr_matrix:
    """Give `interactions` as a matrix (U, I) float32 of ones, duplicates removed."""
    who, what = map(np.concatenate, zip(*interactions(users, items, count, seed), strict=True))
    pairs = np.unique(who * items + what)
    return csr_matrix((np.ones(len(pairs), np.float32), (pairs // items, pairs % items)), shape=(users, items))


def features(variant: str, items: int, width: int, seed: int = 0) -> NDArray[np.float32]:
    """Give features (I, D) of standard normal noise; ``groups`` adds one of 20 standard normal centres to each item.

    The array starts on a cache line, as that of a mapped .npy file does.
    """
    rng = np.random.default_rng(seed)
    values: NDArray[np.float32] = empty((items, width), np.float32)
    rng.standard_normal(dtype=np.float32, out=values)
    if variant == "groups":
        values += rng.standard_normal((_GROUPS, width), dtype=np.float32)[rng.integers(_GROUPS, size=items)]
    return values


def write_interactions(path: Path, users: int, items: int, count: int) -> None:
    """Write `interactions` as Parquet: ``user_id`` and ``item_id``, int64."""
    names = ("user_id", "item_id")
    with pq.ParquetWriter(path, pa.schema([(name, pa.int64()) for name in names])) as writer:
        for columns in interactions(users, items, count):
            writer.write_table(pa.table(dict(zip(names, columns, strict=True))))


# Rows and tables.


def environment() -> dict[str, str]:
    """Give the date, the machine and the versions, without which a figure means nothing."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": _cpu_model(),
        "cores": str(cores()),
        "memory_gib": f"{memory / 2**30:.0f}",
        "python": platform.python_version(),
        **{package: _version(package) for package in _PACKAGES},
        "gpu_init": __version__,
    }


def row(csv_path: str | Path, **fields: Any) -> None:
    """Append a row of `environment` and ``fields`` to a CSV file.

    A file with other columns keeps its rows, and gets the new columns too.
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
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def plot(path: Path, title: str, unit: str, groups: Sequence[str], series: Mapping[str, Sequence[float]]) -> None:
    """Draw bars on a logarithmic axis, those of one of ``groups`` side by side; needs matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        print(f"no plot {path.name}: matplotlib is not installed (pip install 'gpu-init[bench]')")
        return
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(groups))
    share = 0.8 / len(series)
    for position, (name, values) in enumerate(series.items()):
        bars = axes.bar(places + position * share, values, share, label=name)
        axes.bar_label(bars, [f"{value:.3g}" for value in values], fontsize=6, rotation=90, padding=2)
    axes.set_xticks(places + 0.4 - share / 2, groups)
    axes.set_yscale("log")
    axes.margins(y=0.15)
    axes.set_ylabel(unit)
    axes.set_title(title, loc="left")
    figure.legend(fontsize=7, loc="outside right upper")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


# Time and memory.


def alternate(
    functions: Mapping[str, Callable[[], object]], repeats: int, *, warm_up: bool = True
) -> dict[str, Timing]:
    """Time functions in this process, in turn, for ``repeats`` rounds after one that is not counted.

    As they take turns, other work of the machine slows all of them alike. Results are released outside the timed
    section. ``warm_up=False`` leaves the first round out, for functions that have run before.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + warm_up):
        for name, function in functions.items():
            time.sleep(_PAUSE)
            start = time.perf_counter()
            result = function()
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - start)
            del result
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    first = next(iter(medians.values()))
    return {name: Timing(median, median / first) for name, median in medians.items()}


def copier(n_bytes: int) -> Callable[[], None]:
    """Give a function that copies ``n_bytes`` on all cores: it reads and writes that many bytes."""
    source, target = _filled(n_bytes), _filled(n_bytes)
    return _on_all_cores(n_bytes, lambda part: np.copyto(target[part], source[part]))


def reader(n_bytes: int) -> Callable[[], None]:
    """Give a function that reads ``n_bytes`` on all cores, in order, and writes nothing."""
    source = _filled(n_bytes // 4 * 4).view(np.float32)
    return _on_all_cores(len(source), lambda part: np.dot(source[part], source[part]))


def _filled(n_bytes: int) -> NDArray[np.uint8]:
    array: NDArray[np.uint8] = empty((n_bytes,), np.uint8)
    array.fill(1)  # the system maps the pages before the first timed pass
    return array


def _on_all_cores(count: int, function: Callable[[slice], object]) -> Callable[[], None]:
    edges = np.linspace(0, count, cores() + 1).astype(np.int64)
    parts = [slice(start, stop) for start, stop in itertools.pairwise(edges)]

    def run() -> None:
        with ThreadPoolExecutor(cores()) as pool:
            list(pool.map(function, parts))

    return run


def process_cost(command: Sequence[str], *, warm_up: bool = False) -> Cost:
    """Run a command after earlier writes have reached the disk; its output is shown only if it fails.

    With ``warm_up`` it runs twice and the second run counts, as kernels are compiled at first use and then kept.
    """
    for _ in range(1 + warm_up):
        os.sync()
        time.sleep(_SETTLE)
        with tempfile.NamedTemporaryFile("r", encoding="utf-8") as report:
            launched = [sys.executable, "-c", _LAUNCHER, report.name, *command]
            done = subprocess.run(launched, check=False, capture_output=True, text=True)
            if done.returncode != 0:
                raise SystemExit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stdout}{done.stderr}")
            seconds, peak = report.read().split()
    return Cost(float(seconds), int(peak) * 1024)  # Linux counts in KiB


def peak_memory(*, children: bool = False) -> int:
    """Give the most bytes that this process, or the largest of its ended children, had in memory."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN if children else resource.RUSAGE_SELF)
    return usage.ru_maxrss * 1024  # Linux counts in KiB


def cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0))


def cache_bytes() -> int:
    """Give the size of the last-level cache, or 32 MiB where the system does not tell it."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size.rstrip("K")) << 10 for size in sizes if size.endswith("K")), default=32 << 20)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _cpu_model() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        models = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
