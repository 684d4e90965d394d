"""What one process of a cluster does about one range of users: the method on a part of R (`distributed` asks for it).

Parts of R lie in the run's staging folder, which every process sees. What a process opens or works out it keeps, as its
next task is most often about the same part; whoever lacks it makes it again, so that nothing is lost with a process but
its time.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import mmap
import operator
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from tempfile import TemporaryFile
from threading import Lock, RLock
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa

from gpu_init.artifact.format import INTERACTIONS
from gpu_init.artifact.rows import row_writer
from gpu_init.backend.interface import Backend, ranges
from gpu_init.backend.select import select
from gpu_init.budget import BLOCK_BYTES
from gpu_init.config import JobConfig
from gpu_init.files.npy import read_rows
from gpu_init.files.storage import create, writing
from gpu_init.ids import is_text
from gpu_init.inputs.axes import ItemAxis
from gpu_init.inputs.interactions import Checks, assemble
from gpu_init.inputs.recency import Recency
from gpu_init.inputs.tables import Table
from gpu_init.kernels import Csr
from gpu_init.kernels.columns import ColumnKernels, Columns
from gpu_init.manifest import backend_facts
from gpu_init.method import blend, spectral
from gpu_init.method import clusters as method_clusters
from gpu_init.method import points as method_points
from gpu_init.method import weighting as method_weighting
from gpu_init.method.blend import Blend
from gpu_init.method.lambdas import Centre, Volumes, effective_counts, tau_sums, tau_volumes
from gpu_init.method.matrix import Interactions
from gpu_init.method.modality import Modality
from gpu_init.method.norms import NormSums, norm_sums
from gpu_init.method.weighting import Weighting
from gpu_init.version import __version__
from gpu_init.where import parse

SHARED = "shared"  # form of labels that are those of all modalities
SCRATCH = "scratch"  # what is in the way only, in the staging folder
FEATURES_SHARE = 1 / 2  # of a process's memory that the features it has open may take
CLUSTERING = ("points", "step")  # keys of what is kept for K-means
_T = TypeVar("_T")
_kept: dict[Any, Any] = {}
_turn = Lock()  # of tasks in one process: kernels take all its threads
_keeping = RLock()


@dataclass(frozen=True)
class Work:
    """What all tasks of a run go by; small, as it travels with each.

    Attributes
    ----------
    config : JobConfig
        Of the job.
    backend, kernels : str
        ``cpu`` or ``cuda``, and ``numpy`` or ``numba``.
    run : str
        No other run's.
    staging : str
        Path of the staging folder.
    bounds : tuple of int
        First user of each part, and U.
    items : int
        I.
    features : dict of str to str
        Modality name to the .npy file of its items' rows, (I, D) float32.
    columns : dict of str to tuple of int
        Of a modality whose features do not fit: first column of each slice of them that does, and D.
    """

    config: JobConfig
    backend: str
    kernels: str
    run: str
    staging: str
    bounds: tuple[int, ...] = ()
    items: int = 0
    features: dict[str, str] = field(default_factory=dict)
    columns: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def part_users(self) -> int:
        """Users of each part but the last."""
        return self.bounds[1]

    def path(self, name: str) -> str:
        """Of a file in the staging folder."""
        return os.path.join(self.staging, name)


@dataclass(frozen=True)
class Rows:
    """Which points K-means is about: a modality, a form of `kmeans.Points`, and the point amid them (D,)."""

    name: str
    form: str
    offset: Any


def _reading(function: Callable[..., _T]) -> Callable[..., _T]:
    """A task beside others of its kind, as most of it takes one thread; what another run kept is dropped."""

    @functools.wraps(function)
    def wrapped(work: Work, *arguments: Any, **named: Any) -> _T:
        with _keeping:
            if _kept.get("run") != work.run:
                _kept.clear()
                _kept["run"] = work.run
        with _backend(work).explained():
            return function(work, *arguments, **named)

    return wrapped


def _task(function: Callable[..., _T]) -> Callable[..., _T]:
    """One about a part, at a time in a process, beside those that read."""
    alone = _reading(function)

    @functools.wraps(function)
    def wrapped(work: Work, number: int, *arguments: Any) -> _T:
        with _turn:
            try:
                return alone(work, number, *arguments)
            finally:
                _let_go(number)

    return wrapped


def _keep(key: Any, make: Callable[[], _T]) -> _T:
    with _keeping:
        if key not in _kept:
            _kept[key] = make()
        found: _T = _kept[key]
        return found


def _drop(which: Callable[[tuple[Any, ...]], bool]) -> None:
    """Forget some of what is kept under keys of several parts."""
    with _keeping:
        for key in [key for key in _kept if isinstance(key, tuple) and which(key)]:
            del _kept[key]


@functools.cache
def _select(name: str, kernels: str) -> Backend:
    backend = select(name).with_kernels(kernels)
    backend.kernels = ColumnKernels(backend.kernels, backend.xp)
    return backend


def _backend(work: Work) -> Backend:
    return _select(work.backend, work.kernels)


def facts(backend: str, kernels: str, reading_kernels: str) -> dict[str, Any]:
    """What this process is: the manifest's words on the backend, and the version of the program."""
    device = select(backend)
    names = [device.with_kernels(name).kernels.name for name in (kernels, reading_kernels)]
    return {**backend_facts(device, ""), "kernels": names[0], "reading_kernels": names[1], "gpu_init": __version__}


def room(backend: str, dask_worker: Any) -> int:
    """Bytes that features may take here."""
    limit = dask_worker.memory_manager.memory_limit or math.inf
    return int(min(limit, select(backend).free_memory()) * FEATURES_SHARE)


def missing(paths: list[str]) -> list[str]:
    """Those that are not there for this process."""
    return [path for path in paths if not os.path.exists(path)]


def forget() -> None:
    """Free what this process keeps."""
    with _turn:
        _kept.clear()
    release()


def given(value: _T) -> _T:
    """What tasks have in common, as the result of one."""
    return value


def sent(dask_worker: Any) -> int:
    """Bytes that this worker has sent to others so far."""
    return int(dask_worker.transfer_outgoing_bytes_total)


def about(function: Callable[..., _T], work: Work, number: int, shared: tuple[Any, ...], *own: Any) -> _T:
    """A task about a part, of what it shares with others and what is its own."""
    return function(work, number, *shared, *own)


def each(function: Callable[..., _T], work: Work, numbers: range, shared: tuple[Any, ...]) -> list[_T]:
    """A task about neighbouring parts: what it gives of each."""
    return [function(work, number, *shared) for number in numbers]


def total(
    function: Callable[..., _T], join: Callable[[_T, _T], _T], work: Work, numbers: range, shared: tuple[Any, ...]
) -> _T:
    """A task about neighbouring parts: what it gives of each, joined as in `joined`."""
    return joined(join, (function(work, number, *shared) for number in numbers))


def total_sums(function: Callable[..., _T], at: int, work: Work, numbers: range, shared: tuple[Any, ...]) -> Any:
    """`total` of a task of K-means, whose sums, at a place of the result, may be by item yet."""
    return _summed(work, numbers[0], total(function, add, work, numbers, shared), at, shared[0])


def joined(join: Callable[[_T, _T], _T], values: Iterable[_T]) -> _T:
    """Join neighbours, then neighbours among what comes of that, and so on.

    So what is joined in runs of 2, 4, 8, ... first, and then these, comes to the same.
    """
    found: list[tuple[int, _T]] = []  # and how many times it was joined
    for value in values:
        found.append((0, value))
        while len(found) > 1 and found[-1][0] == found[-2][0]:
            (level, one), (_, other) = found[-2:]
            found[-2:] = [(level + 1, join(one, other))]
    whole = found.pop()[1]
    while found:
        whole = join(found.pop()[1], whole)
    return whole


def release() -> None:
    """Give back to the system what this process's allocators keep for later."""
    pa.default_memory_pool().release_unused()
    with suppress(OSError, AttributeError):  # of GNU's library alone
        ctypes.CDLL(None).malloc_trim(0)


def add(one: Any, other: Any) -> Any:
    """Sum of two results, value by value."""
    return tuple(map(operator.add, one, other)) if isinstance(one, tuple) else one + other


# Reading.


@dataclass(frozen=True)
class Found:
    """What a piece of the interactions holds: rows before and after ``where``, and the distinct ids where asked for."""

    read: int
    kept: int
    users: Any
    items: Any


def _checks(work: Work, axis_rows: int | None) -> Checks:
    config = work.config
    where = parse(config.where) if config.where else None
    users = config.users if isinstance(config.users, int) else None
    recency = None if config.half_life is None else Recency(config.half_life)
    return Checks(_backend(work), where, ItemAxis(axis_rows), users, lambda _: None, recency)


@_reading
def find(work: Work, table: Table, groups: range | None, axis_rows: int | None) -> Found:
    """Count the rows of a piece, and find its ids where they are no row numbers."""
    checks, backend = _checks(work, axis_rows), _backend(work)
    by_user, by_item = not isinstance(checks.listed, int), axis_rows is None
    read = kept = 0
    users: list[Any] = []
    items: list[Any] = []
    for batch in checks.batches(table, table.user, table.item if by_item else None, groups=groups):
        read += batch.read
        kept += len(batch.frame)
        if len(batch.frame) == 0:
            continue
        for wanted, found, ids in ((by_user, users, checks.users), (by_item, items, checks.items)):
            if wanted:
                found.append(backend.host_column(ids(table, batch).drop_duplicates()))
    return Found(read, kept, *(distinct(*parts) if parts else None for parts in (users, items)))


def distinct(*parts: Any) -> Any:
    """Ids of several pieces, pandas Series, each once."""
    series = [part for part in parts if part is not None]
    if not series:
        return None
    if any(is_text(str(part.dtype)) for part in series):
        series = [part.astype("str") for part in series]
    return pd.concat(series, ignore_index=True).drop_duplicates(ignore_index=True)


@_reading
def rows(work: Work, table: Table, groups: range | None, axis_rows: int | None) -> pd.DataFrame:
    """Interactions of a piece: a row for each part that has some, with its key and its `_columns`, a tuple of arrays.

    So a shuffle carries few rows, whatever they hold.
    """
    checks, backend = _checks(work, axis_rows), _backend(work)
    kinds, found_parts = _columns(table), [np.empty(0, np.int32)]
    columns: dict[str, list[Any]] = {name: [np.empty(0, kind)] for name, kind in kinds.items()}
    for batch in checks.batches(table, table.user, table.item, table.weight, table.time, groups=groups):
        if len(batch.frame) == 0:
            continue
        found = {
            "user": _numbers(work, "users", backend.host_column(checks.users(table, batch))),
            "item": _numbers(work, "items", backend.host_column(checks.items(table, batch))),
        }
        if table.weight:
            found["weight"] = backend.to_host(checks.weights(table, batch))
        if table.time:
            found["time"] = backend.to_host(checks.times(table, batch))
        part = found["user"] // work.part_users
        found["user"] = found["user"] - part * work.part_users
        for name, values in found.items():
            columns[name].append(values.astype(kinds[name], copy=False))
        found_parts.append(part)
    count = len(work.bounds) - 1
    parts = np.concatenate(found_parts).astype(np.min_scalar_type(count))  # which numpy sorts in one or two rounds
    order, starts = np.argsort(parts, kind="stable"), np.cumsum(np.bincount(parts, minlength=count))[:-1]
    whole = [np.split(np.concatenate(columns.pop(name))[order], starts) for name in kinds]
    there = [number for number in range(count) if len(whole[0][number])]
    held = pd.Series([tuple(column[number] for column in whole) for number in there], dtype=object)
    return pd.DataFrame({"part": _part_keys(count)[there], "columns": held})


def _columns(table: Table) -> dict[str, str]:
    kinds = {"user": "int32", "item": "int32"}  # of rows within their part
    return {**kinds, **({"weight": "float32"} if table.weight else {}), **({"time": "float64"} if table.time else {})}


def no_rows() -> pd.DataFrame:
    """A frame as `rows` gives, without rows."""
    return pd.DataFrame({"part": np.empty(0, np.int32), "columns": np.empty(0, object)})


@functools.cache
def _part_keys(count: int) -> Any:
    """A number for each part: such that Dask's shuffle, which goes by their hashes, has one in each partition."""
    keys, tried = np.full(count, -1, np.int32), 0
    while (keys < 0).any():
        numbers = np.arange(tried, tried + 16 * count, dtype=np.int32)
        hashes = pd.util.hash_pandas_object(pd.DataFrame({"part": numbers.astype(np.float64)}), index=False)
        places = hashes.to_numpy() % np.uint64(count)
        found, first = np.unique(places, return_index=True)
        keys[found] = np.where(keys[found] < 0, numbers[first], keys[found])
        tried += len(numbers)
    return keys


def _numbers(work: Work, axis: str, column: Any) -> Any:
    """Row of R, or column, of each id."""
    path = work.path(f"{SCRATCH}/{axis}.parquet")

    def index() -> Any:
        return pd.Index(pd.read_parquet(path)["id"]) if os.path.exists(path) else None

    known = _keep(("ids", axis), index)
    if known is None:
        return column.to_numpy()
    if is_text(str(known.dtype)) or is_text(str(column.dtype)):
        column, known = column.astype("str"), known.astype("str")
    return known.get_indexer(pd.Index(column))


Batch = tuple[int, int]
"""Pieces whose interactions are brought together by user at a time: the first, and one after the last."""


def put_all(frame: pd.DataFrame, work: Work, batch: Batch) -> pd.DataFrame:
    """`put` the parts whose interactions are in a frame; gives no rows."""
    keys = _part_keys(len(work.bounds) - 1)
    for key, held in frame.groupby("part")["columns"]:
        put(work, int(np.flatnonzero(keys == key)[0]), list(held), batch)
    return frame[["part"]].iloc[:0]


@_reading
def put(work: Work, number: int, pieces: list[tuple[Any, ...]], batch: Batch) -> None:
    """Put a part's interactions of a batch of pieces on storage, column after column."""
    with create(_batch_path(work, number, batch)) as sink:
        for column in zip(*pieces, strict=True):
            np.lib.format.write_array(sink, np.concatenate(column), allow_pickle=False)


def _batch_path(work: Work, number: int, batch: Batch) -> str:
    return work.path(f"{SCRATCH}/{number}.{batch[0]}-{batch[1]}")


@_task
def store(work: Work, number: int, table: Table, batches: list[Batch]) -> dict[str, float]:
    """Put a part of R on storage, from all interactions of its users; gives its pairs and the sum of its weights."""
    backend = _backend(work)
    first, last = work.bounds[number : number + 2]
    found: dict[str, list[Any]] = {name: [np.empty(0, kind)] for name, kind in _columns(table).items()}
    for batch in batches:
        path = _batch_path(work, number, batch)
        if os.path.exists(path):  # else its users had none
            with open(path, "rb") as file:
                for arrays in found.values():
                    arrays.append(np.lib.format.read_array(file, allow_pickle=False))
    columns = {name: np.concatenate(found.pop(name)) for name in list(found)}
    if len(columns) > 2:  # equal pairs are summed, in an order that does not hang on what came in which batch
        order = np.lexsort([columns[name] for name in columns if name not in ("user", "item")])
        columns = {name: column[order] for name, column in columns.items()}
    columns = {name: backend.asarray(column) for name, column in columns.items()}
    made = assemble(
        _checks(work, work.items),
        columns.pop("user"),
        columns.pop("item"),
        columns.get("weight"),
        columns.get("time"),
        (last - first, work.items),
    )
    put_part(work, number, Csr(*(None if array is None else backend.to_host(array) for array in made.csr)))
    weights = made.csr.weights
    weight = float(made.pairs if weights is None else weights.sum(dtype="float64"))
    return {"pairs": made.pairs, "weight": weight}


def put_part(work: Work, number: int, csr: Csr) -> None:
    """Put a part of R on storage, as it lies in this process's memory."""
    for name, array in csr._asdict().items():
        if array is not None:
            with create(_part_path(work, number, name)) as sink:
                np.lib.format.write_array(sink, array, allow_pickle=False)


def _part_path(work: Work, number: int, name: str) -> str:
    return work.path(f"{SCRATCH}/{number}.{name}.npy")


def _part(work: Work, number: int) -> Interactions:
    """A part of R: mapped, and on a device taken there."""

    def load() -> Interactions:
        backend, paths = _backend(work), [_part_path(work, number, name) for name in Csr._fields]
        files = [np.load(path, mmap_mode="r") if os.path.exists(path) else None for path in paths]
        _kept["mapped", number] = [file.base for file in files if file is not None]
        return Interactions(Csr(*(None if file is None else backend.asarray(file) for file in files)), work.items)

    return _keep(("part", number), load)


def _let_go(number: int) -> None:
    """Leave to the system what was looked at of a part: it has that in memory while there is room."""
    for file in _kept.get(("mapped", number), ()):
        with suppress(AttributeError, OSError):  # a system that takes no such advice
            file.madvise(mmap.MADV_DONTNEED)


# Modalities.


def _modality(work: Work, name: str) -> Modality:
    """Features that the run put, or found, on storage: mapped, and on a device taken there."""

    def load() -> Modality:
        _drop(lambda key: key[0] == "modality")  # one at a time
        backend, bounds = _backend(work), work.columns.get(name)
        present = np.load(work.path(f"{SCRATCH}/{name}.present.npy"))
        values: Any
        if bounds is None:
            values = backend.asarray(np.load(work.features[name], mmap_mode="r"))
        else:
            paths = [slice_path(work, name, first) for first in bounds[:-1]]
            values = Columns(
                paths,
                bounds,
                work.items,
                lambda path: backend.asarray(_ahead(path)),
                lambda items: backend.asarray(read_rows(work.features[name], backend.to_host(items))),
            )
        return Modality(name, values, backend.asarray(present), int(present.sum()))

    return _keep(("modality", name), load)


def slice_path(work: Work, name: str, column: int) -> str:
    """Of the slice of a modality's features from some column on."""
    return work.path(f"{SCRATCH}/{name}.{column}.npy")


def _ahead(path: str) -> Any:
    """An array in a file, mapped, and read ahead in one go: rows are then taken from it in no order."""
    values = np.load(path, mmap_mode="r")
    with open(path, "rb") as file, suppress(OSError, AttributeError):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
    return values


@_reading
def cut(work: Work, name: str, first: int, last: int) -> None:
    """Put some items' features on storage slice by slice of their columns."""
    values, bounds = np.load(work.features[name], mmap_mode="r")[first:last], work.columns[name]
    for start, stop in itertools.pairwise(bounds):
        with row_writer(slice_path(work, name, start), first) as write_rows:
            write_rows(values[:, start:stop])


def _operator(work: Work, name: str, number: int) -> Weighting:
    def make() -> Weighting:
        backend, path = _backend(work), work.path(f"{name}/item_factors.npy")
        factors = backend.asarray(np.load(path)) if os.path.exists(path) else None
        part, present = _part(work, number), _modality(work, name).present
        return method_weighting.weighting(backend, part, present, work.config.settings.weighting, factors)

    return _keep(("operator", name, number), make)


@_task
def item_sums(work: Work, number: int) -> Any:
    """Degrees of the items in a part, (I,) float64."""
    backend = _backend(work)
    return backend.to_host(_part(work, number).item_sums(backend))


@_task
def warm(work: Work, number: int, name: str) -> int:
    """Count the users of a part who are warm in a modality."""
    return int(_operator(work, name, number).warm.sum())


# K-means.


class _Factored(method_points.Factored):
    """Users of one part; the products of the items are worked out once for all parts of a process."""

    def item_products(self, table: Any) -> Any:
        """See `Factored.item_products`."""
        of = (self.backend.to_host(table).tobytes(), self.backend.to_host(self.offset).tobytes())
        features, before, products = _kept.pop("products", (None, None, None))
        if features is not self._features or before != of:
            del products
            products = super().item_products(table)
        _kept["products"] = (self._features, of, products)
        return products


class _ByItem(_Factored, method_points.ByItem):
    """The same of features in slices."""


def _kind(work: Work, of: Rows) -> type[method_points.Tiled]:
    if of.form != "factored":
        return method_points.Tiled
    return _ByItem if of.name in work.columns else _Factored


def _points(work: Work, number: int, of: Rows) -> method_points.Points:
    def make() -> method_points.Points:
        _drop(lambda key: key[0] in CLUSTERING and key[1:3] != (of.name, of.form))
        backend = _backend(work)
        offset = backend.asarray(of.offset)
        kind = _kind(work, of)
        points = _placed(work, number, kind) if of.name == INTERACTIONS else _means(work, number, of.name, kind, offset)
        return (
            method_points.Dense(backend, method_points.matrix(backend, points), offset)
            if of.form == "dense"
            else points
        )

    return _keep(("points", of.name, of.form, number), make)


def _means(work: Work, number: int, name: str, kind: type[method_points.Tiled], offset: Any) -> method_points.Tiled:
    weighting = _operator(work, name, number)
    arrays = (_modality(work, name).values, weighting.mean_rows, weighting.present, offset)
    return kind(_backend(work), _part(work, number).csr, *arrays)


def _placed(work: Work, number: int, kind: type[method_points.Tiled] = method_points.Tiled) -> method_points.Tiled:
    backend = _backend(work)
    items, factors = (
        backend.asarray(np.load(work.path(f"{INTERACTIONS}/{name}.npy"))) for name in ("items", "item_factors")
    )
    return spectral.points(backend, _part(work, number), items, factors, kind)


@_task
def some_rows(work: Work, number: int, of: Rows, index: Any) -> Any:
    """See `Points.rows`."""
    backend = _backend(work)
    with backend.deterministic():
        return backend.to_host(_points(work, number, of).rows(backend.asarray(index)))


@_task
def step(work: Work, number: int, of: Rows, centroids: Any) -> tuple[float, Any]:
    """See `Points.step`: the inertia and the counts, (K,)."""
    found = _step(work, number, of, centroids)
    return found.inertia, _backend(work).to_host(found.counts)


@_task
def sums(work: Work, number: int, of: Rows, centroids: Any) -> tuple[Any]:
    """See `kmeans.Step.sums`."""
    backend = _backend(work)
    found = _step(work, number, of, centroids)
    with backend.deterministic():
        return (backend.to_host(found.sums()),)


def _step(work: Work, number: int, of: Rows, centroids: Any) -> method_points.Step:
    """See `Points.step`; what these centroids gave is kept, and made again where it is not here."""
    backend, key = _backend(work), ("step", of.name, of.form, number)
    points = _points(work, number, of)
    before: tuple[Any, method_points.Step] | None = _kept.pop(key, None)
    if before is None or not np.array_equal(before[0], centroids):
        with backend.deterministic():
            before = (centroids, points.step(centroids))
    _kept[key] = before
    return before[1]


@_task
def far(work: Work, number: int, of: Rows, centroids: Any, count: int) -> tuple[Any, Any]:
    """See `Points.far`."""
    backend = _backend(work)
    with backend.deterministic():
        found = _points(work, number, of).far(centroids, count)
    return backend.to_host(found[0]), backend.to_host(found[1])


@_task
def _summed(work: Work, number: int, found: Any, at: int, of: Rows) -> Any:
    if of.name not in work.columns:
        return found
    points, backend = _points(work, number, of), _backend(work)
    assert isinstance(points, method_points.ByItem)
    with backend.deterministic():
        sums = points.summed(backend.asarray(found[at]))
    return (*found[:at], backend.to_host(sums), *found[at + 1 :])


# Users by what they did.


@_task
def components(work: Work, number: int) -> Any:
    """See `spectral.component_labels`."""
    return spectral.component_labels(_backend(work), _part(work, number))


@_task
def component_sizes(work: Work, number: int, labels: Any) -> tuple[Any, Any]:
    """See `spectral.component_sizes`."""
    return spectral.component_sizes(_backend(work), _part(work, number), labels)


def _graph(work: Work, number: int) -> tuple[spectral.Whole, int]:
    def make() -> tuple[spectral.Whole, int]:
        graph = spectral.Whole(_backend(work), _part(work, number))
        return graph, graph.keep(_backend(work).asarray(np.load(work.path(f"{SCRATCH}/kept.npy"))))

    return _keep(("graph", number), make)


@_task
def active(work: Work, number: int) -> int:
    """See `Graph.keep`; which items are kept lies in the staging folder."""
    return _graph(work, number)[1]


@_task
def product(work: Work, number: int, table: str) -> Any:
    """See `Graph.product`, of the table in a file of the staging folder."""
    backend = _backend(work)
    with backend.deterministic():
        return backend.to_host(_graph(work, number)[0].product(backend.asarray(np.load(work.path(table)))))


@_task
def placed(work: Work, number: int) -> int:
    """Count the users of a part who have a row of E."""
    return len(_placed(work, number))


@_task
def label_interactions(work: Work, number: int, centroids: Any) -> None:
    """Write the labels that the users of a part have in all modalities."""
    backend, points = _backend(work), _placed(work, number)
    labels = method_clusters.behaviour_labels(backend, _part(work, number), points, backend.asarray(centroids))
    _write_labels(work, number, INTERACTIONS, backend.to_host(labels))


@_task
def sums_of_labels(work: Work, number: int, of: Rows, clusters: int) -> tuple[Any, Any]:
    """See `method.behaviour_sums`."""
    backend = _backend(work)
    points = _means(work, number, of.name, _kind(work, of), backend.asarray(of.offset))
    found = method_clusters.behaviour_sums(backend, points, backend.asarray(_shared_labels(work, number)), clusters)
    return backend.to_host(found[0]), backend.to_host(found[1])


def _write_labels(work: Work, number: int, name: str, labels: Any) -> None:
    with row_writer(work.path(f"{name}/labels.npy"), work.bounds[number]) as write_rows:
        write_rows(labels)


def _shared_labels(work: Work, number: int) -> Any:
    users = slice(work.bounds[number], work.bounds[number + 1])
    return np.array(np.load(work.path(f"{INTERACTIONS}/labels.npy"), mmap_mode="r")[users])


# Labels and vectors.


@dataclass(frozen=True)
class Fitted:
    """Clusters of a modality: centroids (K, D), labels of items or None, the vector of cold users (D,) once known.

    ``form``: by which users are labelled, ``shared`` where labels are those of all modalities. ``tau``: of lambda.
    """

    name: str
    form: str
    centroids: Any
    item_labels: Any = None
    cold: Any = None
    scale: float = 1.0
    tau: float | None = None


@_task
def label(work: Work, number: int, fitted: Fitted) -> tuple[Any, Any]:
    """Write the labels of a part; gives how many users have each, and the clusters' shares in the sum of G, (K,)."""
    backend, part, weighting = _backend(work), _part(work, number), _operator(work, fitted.name, number)
    item_labels = None if fitted.item_labels is None else backend.asarray(fitted.item_labels)
    labels = _labels(work, number, fitted)
    _drop(lambda key: key[0] in CLUSTERING and key[-1] == number)
    clusters = len(fitted.centroids)
    shares = method_clusters.cluster_shares(backend, part, weighting, clusters, labels, item_labels)
    host = backend.to_host(labels)
    _write_labels(work, number, fitted.name, host)
    return np.bincount(host[host >= 0], minlength=clusters), backend.to_host(shares)


def _labels(work: Work, number: int, fitted: Fitted) -> Any:
    """Labels of a part's users, -1 for cold ones: those of K-means' last pass, where that was here."""
    backend, weighting = _backend(work), _operator(work, fitted.name, number)
    if fitted.form == SHARED:
        return backend.asarray(np.where(backend.to_host(weighting.warm), _shared_labels(work, number), -1))
    centroids, found = _kept.get(("step", fitted.name, fitted.form, number), (None, None))
    if fitted.form != "dense" and np.array_equal(centroids, fitted.centroids):
        return found.labels
    part, modality = _part(work, number), _modality(work, fitted.name)
    return method_clusters.nearest(backend, part, modality, weighting, backend.asarray(fitted.centroids), fitted.form)


@_task
def volumes(work: Work, number: int, name: str) -> Volumes:
    """See `blend.tau_volumes`."""
    backend, part = _backend(work), _part(work, number)
    found = tau_volumes(backend, part, _operator(work, name, number), _counts(work, number, name))
    return found._replace(by_item=backend.to_host(found.by_item))


@_task
def variances(work: Work, number: int, name: str, centre: Centre) -> tuple[float, float]:
    """See `blend.tau_sums`."""
    backend, part, modality = _backend(work), _part(work, number), _modality(work, name)
    here = Centre(*map(backend.asarray, centre))
    return tau_sums(backend, part, modality, _operator(work, name, number), _counts(work, number, name), here)


@_task
def warm_counts(work: Work, number: int, name: str) -> Any:
    """Effective counts of the warm users' items."""
    return _backend(work).to_host(_counts(work, number, name)[_operator(work, name, number).warm])


def _counts(work: Work, number: int, name: str) -> Any:
    return effective_counts(_backend(work), _part(work, number), _operator(work, name, number))[1]


def _plan(work: Work, number: int, fitted: Fitted) -> Blend:
    backend, settings = _backend(work), replace(work.config.settings, tau=fitted.tau)
    part, modality, weighting = _part(work, number), _modality(work, fitted.name), _operator(work, fitted.name, number)
    users = slice(work.bounds[number], work.bounds[number + 1])
    labels = np.load(work.path(f"{fitted.name}/labels.npy"), mmap_mode="r")[users]
    item_labels = None if fitted.item_labels is None else backend.asarray(fitted.item_labels)
    arrays = (backend.asarray(fitted.centroids), backend.asarray(labels), item_labels)
    cold, width = backend.asarray(fitted.cold), modality.values.shape[1]
    return method_clusters.fit(
        backend, part, modality, weighting, settings, arrays, fitted.scale, _block_rows(width), cold
    )


def _block_rows(width: int) -> int:
    return blend.block_rows(width, BLOCK_BYTES)


@_task
def lambdas(work: Work, number: int, fitted: Fitted) -> tuple[Any, Any]:
    """Lambdas and effective counts of the warm users of a part."""
    backend, plan = _backend(work), _plan(work, number, fitted)
    warm = plan.weighting.warm
    return backend.to_host(plan.lam[warm]), backend.to_host(_counts(work, number, fitted.name)[warm])


@_task
def measure(work: Work, number: int, fitted: Fitted) -> NormSums:
    """Norms of the users' rows of a part, which are not kept."""
    backend, plan = _backend(work), _plan(work, number, fitted)
    width = plan.modality.values.shape[1]
    room = backend.empty((_block_rows(width), width), "float32")
    blocks = _blocks(work, number, plan, len(room), "float32", lambda part: room[: part.stop - part.start])
    return norm_sums(backend, (block for _, block in blocks))


def _blocks(
    work: Work, number: int, plan: Blend, step: int, dtype: str, space: Callable[[slice], Any]
) -> Iterator[tuple[slice, Any]]:
    """See `method.blocks`; where features come in slices, all rows' columns of a slice first, by way of files."""
    backend, part, modality = _backend(work), _part(work, number), plan.modality
    if not isinstance(modality.values, Columns):
        yield from blend.blocks(backend, part, plan, step, dtype, space)
        return
    xp, folder, itemsize = backend.xp, work.path(SCRATCH), np.dtype(dtype).itemsize

    def put(columns: slice, values: Any) -> slice:
        centroids, cold = (xp.ascontiguousarray(array[..., columns]) for array in (plan.centroids, plan.cold))
        own = replace(plan, modality=replace(modality, values=values), centroids=centroids, cold=cold)
        room = backend.empty((step, values.shape[1]), dtype)
        for _, block in blend.blocks(backend, part, own, step, dtype, lambda rows: room[: rows.stop - rows.start]):
            file.write(backend.to_host(block).data)
        return columns

    with writing(folder, part.users * modality.values.shape[1] * itemsize), TemporaryFile(dir=folder) as file:
        slices = modality.values.map(put)
        for rows in ranges(part.users, step):
            block = space(rows)
            for columns in slices:
                shape = (rows.stop - rows.start, columns.stop - columns.start)
                file.seek((part.users * columns.start + rows.start * shape[1]) * itemsize)
                block[:, columns] = backend.asarray(np.fromfile(file, dtype, math.prod(shape)).reshape(shape))
            yield rows, block


@_task
def write(work: Work, number: int, fitted: Fitted) -> NormSums:
    """Write the users' rows of a part, each block while the next one is made; gives their norms."""
    backend, plan = _backend(work), _plan(work, number, fitted)
    dtype, width = work.config.settings.dtype, plan.modality.values.shape[1]
    first, last = work.bounds[number : number + 2]
    most = min(_block_rows(width), last - first)
    before: Future[None] | None = None

    def send(block: Any) -> None:
        nonlocal before
        if before is not None:
            before.result()  # its space may be used again
        before = writer.submit(write_rows, block)

    def blocks() -> Iterator[Any]:
        for _, block in _blocks(work, number, plan, most, dtype, lambda part: outbox.space(part.stop - part.start)):
            yield block  # for its norms
            outbox.send(block)

    with row_writer(work.path(f"{fitted.name}/users.npy"), first) as write_rows, ThreadPoolExecutor(1) as writer:
        with backend.outbox(most, width, dtype, send) as outbox:
            found = norm_sums(backend, blocks())
        if before is not None:
            before.result()
    return found


@_task
def drawn(work: Work, number: int, fitted: Fitted, index: Any) -> dict[str, Any]:
    """What `describe` needs of some of a part's warm users: their interactions, factors and labels."""
    backend, plan = _backend(work), _plan(work, number, fitted)
    users = backend.xp.flatnonzero(plan.weighting.warm)[backend.asarray(index)]
    own, of = _part(work, number).some(backend, users), plan.weighting
    found = {**own.csr._asdict(), "local_rows": of.local_rows[users], "mean_rows": of.mean_rows[users]}
    found["labels"] = None if plan.user_labels is None else plan.user_labels[users]
    found["lam"] = None if isinstance(plan.lam, float) else plan.lam[users]
    return {name: None if array is None else backend.to_host(array) for name, array in found.items()}
