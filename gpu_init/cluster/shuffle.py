"""The interactions read by a cluster's workers: piece by piece, then brought together by user into parts of R.

A piece is a file, or some row groups of one. Dask's shuffle carries the interactions of some pieces, a batch, to where
they are put on storage by part; batches keep what travels at a time within the workers' memory. Then each part of R is
assembled from its batches. What is finished is noted in the staging folder, so that a resumed run goes on from there.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from gpu_init.backend.interface import Backend
from gpu_init.cluster.worker import Work, backend_of, keeper, part_path
from gpu_init.config import JobConfig
from gpu_init.files.storage import create
from gpu_init.ids import is_text
from gpu_init.inputs.axes import ItemAxis
from gpu_init.inputs.interactions import Checks, assemble
from gpu_init.inputs.recency import Recency
from gpu_init.inputs.tables import Table
from gpu_init.kernels.csr import Csr
from gpu_init.parts import Part
from gpu_init.where import parse

PIECE_ROWS, MOST_PIECES = 1 << 21, 1 << 14  # A task reads at least so many rows; there are about so many tasks at most.
BATCH_PIECES = 2  # A batch has this many pieces for each worker,
BATCHES, BATCH_SHARE = 16, 1 / 16  # or more, to have about so many batches, each within this share of the memory.
SHUFFLE_BYTES = 64  # An interaction takes about this much memory while it is shuffled.

Batch = tuple[int, int]
"""Number of the first piece of a batch, and one more than that of its last."""


@dataclass(frozen=True)
class Reading:
    """What the tasks that read go by.

    Attributes
    ----------
    work : Work
        With the bounds of the parts, once these are known.
    config : JobConfig
    axis_rows : int or None
        I, where item ids are row numbers.
    """

    work: Work
    config: JobConfig
    axis_rows: int | None

    @property
    def backend(self) -> Backend:
        """The backend that this process reads with."""
        return backend_of(self.work.backend, self.work.kernels)

    def checks(self, items: int | None) -> Checks:
        """What rows are checked by."""
        config = self.config
        where = parse(config.where) if config.where else None
        users = config.users if isinstance(config.users, int) else None
        recency = None if config.half_life is None else Recency(config.half_life)
        return Checks(self.backend, where, ItemAxis(items), users, lambda _: None, recency)


@dataclass(frozen=True)
class Found:
    """Rows of a piece before and after ``where``, and its distinct ids where these are wanted."""

    read: int
    kept: int
    users: Any
    items: Any


def find(reading: Reading, table: Table, groups: range | None) -> Found:
    """Count the rows of a piece, and find its ids where they are no row numbers."""
    backend, by_item = reading.backend, reading.axis_rows is None
    with backend.explained():
        checks = reading.checks(reading.axis_rows)
        by_user = not isinstance(checks.listed, int)
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
    """Ids of several pieces, pandas Series, each once; None where no piece has any."""
    series = [part for part in parts if part is not None]
    if not series:
        return None
    if any(is_text(str(part.dtype)) for part in series):
        series = [part.astype("str") for part in series]
    return pd.concat(series, ignore_index=True).drop_duplicates(ignore_index=True)


def rows(reading: Reading, table: Table, groups: range | None) -> pd.DataFrame:
    """Interactions of a piece: a row for each part that has some, with the part's key and a tuple of arrays.

    So a shuffle carries few rows, however many interactions there are.
    """
    backend, work = reading.backend, reading.work
    users_of_a_part, count = work.plan.bounds[1], work.plan.parts
    kinds, found_parts = _columns(table), [np.empty(0, np.int32)]
    columns: dict[str, list[Any]] = {name: [np.empty(0, kind)] for name, kind in kinds.items()}
    with backend.explained():
        checks = reading.checks(reading.axis_rows)
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
            part = found["user"] // users_of_a_part
            found["user"] = found["user"] - part * users_of_a_part
            for name, values in found.items():
                columns[name].append(values.astype(kinds[name], copy=False))
            found_parts.append(part)
    parts = np.concatenate(found_parts).astype(np.min_scalar_type(count))  # which numpy sorts in one or two rounds
    order, starts = np.argsort(parts, kind="stable"), np.cumsum(np.bincount(parts, minlength=count))[:-1]
    whole = [np.split(np.concatenate(columns.pop(name))[order], starts) for name in kinds]
    there = [number for number in range(count) if len(whole[0][number])]
    held = pd.Series([tuple(column[number] for column in whole) for number in there], dtype=object)
    return pd.DataFrame({"part": _part_keys(count)[there], "columns": held})


def _columns(table: Table) -> dict[str, str]:
    """Names and types of a table's columns on their way; users are numbered within their part."""
    kinds = {"user": "int32", "item": "int32"}
    return {**kinds, **({"weight": "float32"} if table.weight else {}), **({"time": "float64"} if table.time else {})}


def no_rows() -> pd.DataFrame:
    """A frame as `rows` gives, without rows."""
    return pd.DataFrame({"part": np.empty(0, np.int32), "columns": np.empty(0, object)})


@functools.cache
def _part_keys(count: int) -> Any:
    """A number for each part, such that Dask's shuffle, which goes by their hashes, puts one in each partition."""
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
    kept = keeper(work.run).known
    if axis not in kept:
        path = work.scratch(f"{axis}.parquet")
        kept[axis] = pd.Index(pd.read_parquet(path)["id"]) if os.path.exists(path) else None
    known = kept[axis]
    if known is None:
        return column.to_numpy()
    if is_text(str(known.dtype)) or is_text(str(column.dtype)):
        column, known = column.astype("str"), known.astype("str")
    return known.get_indexer(pd.Index(column))


def put_all(frame: pd.DataFrame, work: Work, batch: Batch) -> pd.DataFrame:
    """Put the interactions of a batch in a frame on storage, by part, column after column; returns no rows."""
    keys = _part_keys(work.plan.parts)
    for key, held in frame.groupby("part")["columns"]:
        number = int(np.flatnonzero(keys == key)[0])
        with create(_batch_path(work, number, batch)) as sink:
            for column in zip(*held, strict=True):
                np.lib.format.write_array(sink, np.concatenate(column), allow_pickle=False)
    return frame[["part"]].iloc[:0]


def _batch_path(work: Work, number: int, batch: Batch) -> str:
    return work.scratch(f"{number}.{batch[0]}-{batch[1]}")


def assemble_part(part: Part, reading: Reading, table: Table, batches: list[Batch]) -> dict[str, float]:
    """Put a part of R on storage, from all interactions of its users; returns its pairs and the sum of its weights."""
    backend, items = part.backend, part.plan.items
    found: dict[str, list[Any]] = {name: [np.empty(0, kind)] for name, kind in _columns(table).items()}
    for batch in batches:
        path = _batch_path(reading.work, part.number, batch)
        if os.path.exists(path):  # otherwise these users have no interactions in the batch
            with open(path, "rb") as file:
                for arrays in found.values():
                    arrays.append(np.lib.format.read_array(file, allow_pickle=False))
    columns = {name: np.concatenate(found.pop(name)) for name in list(found)}
    if len(columns) > 2:  # The sum of equal pairs must not depend on which batch an interaction came in.
        order = np.lexsort([columns[name] for name in columns if name not in ("user", "item")])
        columns = {name: column[order] for name, column in columns.items()}
    columns = {name: backend.asarray(column) for name, column in columns.items()}
    users = part.users.stop - part.users.start
    made = assemble(
        reading.checks(items),
        columns.pop("user"),
        columns.pop("item"),
        columns.get("weight"),
        columns.get("time"),
        (users, items),
    )
    put_part(reading.work, part.number, Csr(*(None if array is None else backend.to_host(array) for array in made.csr)))
    weights = made.csr.weights
    weight = float(made.pairs if weights is None else weights.sum(dtype="float64"))
    return {"pairs": made.pairs, "weight": weight}


def put_part(work: Work, number: int, csr: Csr) -> None:
    """Put a part of R on storage."""
    for name, array in csr._asdict().items():
        if array is not None:
            with create(part_path(work, number, name)) as sink:
                np.lib.format.write_array(sink, array, allow_pickle=False)


def batches(first: int, count: int, memory: Callable[[], Sequence[int]]) -> Iterator[Batch]:
    """Batches from some piece on, of so many; ``memory`` returns the bytes that each worker has when one begins."""
    while first < count:
        last = min(first + batch_size(count, memory()), count)
        yield first, last
        first = last


def batch_size(count: int, memory: Sequence[int]) -> int:
    """Pieces of a batch, where there are so many pieces and workers with so many bytes."""
    held = int(sum(memory) * BATCH_SHARE) // (SHUFFLE_BYTES * PIECE_ROWS)
    return max(BATCH_PIECES * len(memory), min(held, count // BATCHES))
