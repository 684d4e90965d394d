"""Interactions: from tables with ids of any kind to R, the U x I matrix of weights, by rows.

Section 2.1 (weights) and section 4 (inputs) of the design.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpu_init import ids
from gpu_init.backend.interface import Backend, one_line
from gpu_init.backend.select import for_work
from gpu_init.errors import GpuInitError, InputError
from gpu_init.files import npy
from gpu_init.files.storage import expand, file_state, reading
from gpu_init.inputs.axes import Codes, ItemAxis, Resolve, RowNumbers, check_range, item_axis, user_axis
from gpu_init.inputs.recency import Recency, newest
from gpu_init.inputs.tables import (
    EXTENSIONS,
    Batch,
    Columns,
    Table,
    batches,
    joined,
    open_table,
    stated_rows,
    text_bytes,
)
from gpu_init.kernels.costs import reading_seconds
from gpu_init.memory import require as require_memory
from gpu_init.method.matrix import ROW_BYTES, Interactions, built, check_weights, from_matrix
from gpu_init.where import Where

_HELD_ROWS = 1 << 24  # whose codes are kept so that they need not be read again, 8 bytes each, 4 more with weights
_ENTRY_BYTES = 4  # of memory for each row that is kept, at least: its item in R
_INDICES = ("indices.npy", "indptr.npy", "row.npy", "col.npy", "coords.npy", "offsets.npy", "shape.npy")
_MATRIX_COPIES = 3  # of the arrays of a matrix file that are in memory at once: scipy's, by entries, R


# Reading.


@dataclass(frozen=True)
class InteractionTable:
    """Interactions as read: R, the raw ids of its rows and columns, and how many rows there were.

    ``user_ids`` and ``item_ids`` are pandas Series, or None where rows and columns are the ids. ``read`` and
    ``kept`` count rows of the files, before and after ``where``. ``kernels``: name of those that R was made with.
    """

    interactions: Interactions
    user_ids: Any
    item_ids: Any
    read: int
    kept: int
    kernels: str
    warnings: list[str] = field(default_factory=list)


def read(
    backend: Backend,
    pattern: str,
    columns: Columns,
    axis: ItemAxis,
    users: int | Any | None,
    advance: Callable[[int], None] = lambda _: None,
) -> InteractionTable:
    """Read interactions: a file, a folder or a glob of Parquet, CSV, TSV, .inter, or one scipy .npz.

    Parameters
    ----------
    backend : Backend
        Where R shall lie.
    pattern : str
        File, folder or glob.
    columns : Columns
        Names of the columns, and the rows to keep.
    axis : ItemAxis
        What item ids mean.
    users : int, pandas Series or None
        U, when user ids are row numbers; or the ids of the rows, in order; or None: user ids are row numbers
        when they fill 0..max without gaps, else they are sorted.
    advance : callable
        Told the number of rows of each batch read.

    Returns
    -------
    InteractionTable

    Raises
    ------
    InputError
        The files, their columns or their rows are not what is wanted; which file, which row, what to do.
    """
    paths = expand(pattern, EXTENSIONS)
    if any(path.endswith(".npz") for path in paths):
        if len(paths) > 1:
            raise InputError(f"{pattern}: {len(paths)} files, an .npz among them; give the .npz alone.")
        return _read_matrix(backend, paths[0], columns, axis, users)
    warnings: list[str] = []
    tables = [open_table(path, columns, warnings) for path in paths]
    recency = None if columns.half_life is None else Recency(columns.half_life)
    backend = for_work(backend, reading_seconds(stated_rows(pattern), text_bytes(pattern)))
    checks = Checks(backend, columns.where, axis, users, advance, recency)
    in_place = backend.kernels.rows_in_place()
    held = _Hold(checks) if in_place is None else _Stream(checks, in_place, tables)
    for table in tables:
        held.take(table)
    require_kept(pattern, held.read, held.kept)
    matrix, user_ids, item_ids = held.finish(pattern)
    require_unchanged(tables)
    return InteractionTable(matrix, user_ids, item_ids, held.read, held.kept, backend.kernels.name, warnings)


def require_kept(pattern: str, read: int, kept: int) -> None:
    """Refuse interactions of which none is left, of so many rows."""
    if kept == 0:
        found = f"{read} rows, none of which --where keeps" if read else "no rows"
        raise InputError(f"{pattern}: {found}; there is nothing to make vectors from.")


def require_unchanged(tables: Iterable[Table]) -> None:
    """Refuse tables that changed since they were opened."""
    for table in tables:
        if file_state(table.path) != table.state:
            raise InputError(f"{table.path}: changed while it was read; run again when it is complete.")


@dataclass(frozen=True)
class Checks:
    """What every row must satisfy, whatever becomes of it."""

    backend: Backend
    where: Where | None
    axis: ItemAxis
    listed: int | Any | None
    advance: Callable[[int], None]
    recency: Recency | None = None

    def users(self, table: Table, batch: Batch) -> Any:
        """User ids of a batch, int64 or text."""
        place = f"{table.path}, column {table.user}"
        column = ids.normalize(batch.frame[table.user], place, batch.row)
        if isinstance(self.listed, int):
            check_range(column, self.listed, place, batch.row, f"--users {self.listed}", "user")
        return column

    def items(self, table: Table, batch: Batch) -> Any:
        """Item ids of a batch, int64 or text."""
        place = f"{table.path}, column {table.item}"
        column = ids.normalize(batch.frame[table.item], place, batch.row)
        if self.axis.rows is not None:
            check_range(column, self.axis.rows, place, batch.row, f"the features' {self.axis.rows} rows", "item")
        return column

    def weights(self, table: Table, batch: Batch) -> Any:
        """Weights of a batch, (n,) float32, or None."""
        if table.weight is None:
            return None
        place = f"{table.path}, column {table.weight}"
        return _weights(self.backend, batch.frame[table.weight], place, batch.row).astype("float32")

    def times(self, table: Table, batch: Batch) -> Any:
        """Times of a batch, (n,) float64, or None."""
        if self.recency is None:
            return None
        place = f"{table.path}, column {table.time}"
        return self.recency.times(self.backend, batch.frame[table.time], place, batch.row)

    def decayed(self, weights: Any, ages: Any) -> Any:
        """Weights (n,) float32 or None of interactions of such ages (n,), or of any where age does not count."""
        return weights if self.recency is None else self.recency.decayed(self.backend, weights, ages)

    def batches(self, table: Table, *wanted: str | None, groups: range | None = None) -> Iterator[Batch]:
        """Batches with these columns, of some row groups or all."""
        return batches(self.backend, table, self.where, [name for name in wanted if name], groups)


class _Hold:
    """All rows held until the end, two codes of 32 bits each, then sorted: on any device."""

    def __init__(self, checks: Checks) -> None:
        self.read = self.kept = 0
        self._checks = checks
        self._users = _Held(checks.backend, checks.listed if isinstance(checks.listed, int) else None)
        self._items = _Held(checks.backend, checks.axis.rows)
        self._weights: list[Any] = []
        self._times: list[Any] = []

    def take(self, table: Table) -> None:
        """Read a table."""
        checks = self._checks
        for batch in checks.batches(table, table.user, table.item, table.weight, table.time):
            self.read += batch.read
            checks.advance(batch.read)
            if len(batch.frame) == 0:
                continue
            self.kept += len(batch.frame)
            require_memory(f"{table.path}: {self.kept:,} rows so far", self.kept * _ENTRY_BYTES)
            self._users.take(checks.users(table, batch))
            self._items.take(checks.items(table, batch))
            if table.weight:
                self._weights.append(checks.weights(table, batch))
            if table.time:
                self._times.append(checks.times(table, batch))

    def finish(self, place: str) -> tuple[Interactions, Any, Any]:
        """R, and the ids of its rows and columns where they are not the row numbers."""
        checks = self._checks
        users = self._users.rows(lambda found: user_axis(found, place, checks.listed))
        items = self._items.rows(lambda found: item_axis(found, place, checks.axis))
        weights = checks.backend.xp.concatenate(self._weights) if self._weights else None
        shape = (self._users.size, self._items.size)
        times = checks.backend.xp.concatenate(self._times) if self._times else None
        return assemble(checks, users, items, weights, times, shape), self._users.ids, self._items.ids


def assemble(checks: Checks, users: Any, items: Any, weights: Any, times: Any, shape: tuple[int, int]) -> Interactions:
    """R as `build` makes it, from what `Checks` gives of all interactions of the users."""
    backend = checks.backend
    if times is not None:
        counts = slice(None) if weights is None else backend.xp.flatnonzero(weights > 0)
        latest = newest(backend, users[counts], times[counts], shape[0])
        weights = checks.decayed(weights, latest[users] - times)
    return built(backend, users, items, weights, shape)


class _Held:
    """Ids of an axis, each as its row number, or as a code of its batch, whose distinct ids are kept beside.

    Parameters
    ----------
    backend : Backend
    size : int or None
        Ids are row numbers below this; None: `rows` asks what they mean.
    """

    def __init__(self, backend: Backend, size: int | None) -> None:
        self.size = size or 0
        self.ids: Any = None
        self._backend = backend
        self._coded = size is None
        self._codes: list[Any] = []
        self._found: list[Any] = []

    def take(self, column: Any) -> None:
        """Keep the ids of a batch, int64 or text."""
        if self._coded:
            codes, found = column.factorize()
            self._found.append(self._backend.tables.Series(found))
        else:
            codes = column.values
        codes = self._backend.asarray(codes)
        self._codes.append(codes.astype("int32") if self._coded or self.size <= 2**31 else codes)

    def rows(self, resolve: Resolve) -> Any:
        """Row of each id (n,), int32 or int64; sets ``size``, and ``ids`` where they are not the row numbers."""
        backend = self._backend
        if self._coded:
            places, found = joined(backend, self._found).factorize()
            rows, self.size, self.ids = resolve(backend.host_column(found))
            by_batch = backend.asarray(rows)[backend.asarray(places)]
            start = 0
            for batch, distinct in enumerate(map(len, self._found)):
                self._codes[batch] = by_batch[start : start + distinct][self._codes[batch]]
                start += distinct
        rows = backend.xp.concatenate(self._codes)
        self._codes, self._found = [], []
        return rows


class _Stream:
    """Rows counted as they are read, then put into R in place.

    Tables whose ids are whole numbers are read twice, first for the users alone. Of others, `_HELD_ROWS` in all are
    kept as int32 codes, and only what comes after these is read again. Where age counts, times are read in between, for
    each user's newest.
    """

    def __init__(self, checks: Checks, in_place: Callable[..., Any], tables: list[Table]) -> None:
        self.read = self.kept = 0
        self._checks = checks
        self._in_place = in_place
        axis, listed = checks.axis, checks.listed
        self._again: list[tuple[Table, int]] = []  # and how many of its rows are held
        self._coded: deque[tuple[Any, Any, Any, Any]] = deque()
        self._room = _HELD_ROWS
        self._weighted = False
        self._users: RowNumbers | Codes
        self._items: RowNumbers | Codes
        if isinstance(listed, int):
            self._users = RowNumbers(listed)
        else:
            rows = sum(table.whole or 0 for table in tables) if listed is None else 0
            self._users = Codes(rows)
        self._items = RowNumbers(axis.rows) if axis.rows is not None else Codes(0)

    def take(self, table: Table) -> None:
        """Read a table, or the columns of it that say how R is laid out."""
        checks = self._checks
        self._weighted = table.weight is not None
        counts_items = isinstance(self._items, Codes)
        holds = table.whole is None
        more = (table.item, table.weight, table.time) if holds else (table.item if counts_items else None,)
        held = read = 0
        for batch in checks.batches(table, table.user, *more):
            read += batch.read
            if holds and len(batch.frame) <= self._room:
                held = read
                checks.advance(batch.read)
                if len(batch.frame):
                    users = self._users.encode(checks.users(table, batch))
                    items = self._items.encode(checks.items(table, batch))
                    self._coded.append((users, items, checks.weights(table, batch), checks.times(table, batch)))
                    self._room -= len(batch.frame)
            else:
                holds = False
                checks.advance(batch.read // 2)  # the other half when it is read again
                if len(batch.frame):
                    self._users.count(checks.users(table, batch))
                    if counts_items:
                        self._items.count(checks.items(table, batch))
            self.kept += len(batch.frame)
            require_memory(f"{table.path}: {self.kept:,} rows so far", self.kept * _ENTRY_BYTES)
        self.read += read
        if held < read:
            self._again.append((table, held))

    def finish(self, place: str) -> tuple[Interactions, Any, Any]:
        """R, and the ids of its rows and columns where they are not the row numbers."""
        checks = self._checks
        users, items = self._users, self._items
        users.settle(lambda found: user_axis(found, place, checks.listed))
        items.settle(lambda found: item_axis(found, place, checks.axis))
        timed = checks.recency is not None
        latest = self._newest() if timed else None
        filling = self._in_place(users.starts(), self._weighted or timed)

        def add(rows: Any, columns: Any, weights: Any, times: Any) -> None:
            filling.add(rows, columns, weights if latest is None else checks.decayed(weights, latest[rows] - times))

        while self._coded:
            user_codes, item_codes, weights, times = self._coded.popleft()
            add(users.rows_of_codes(user_codes), items.rows_of_codes(item_codes), weights, times)
        for table, batch in self._not_held("item", "weight", "time"):
            if len(batch.frame):
                rows, columns = users.rows(checks.users(table, batch)), items.rows(checks.items(table, batch))
                add(rows, columns, checks.weights(table, batch), checks.times(table, batch))
            checks.advance(batch.read - batch.read // 2)
        return Interactions(filling.finish(), items.size), users.ids, items.ids

    def _not_held(self, *columns: str) -> Iterator[tuple[Table, Batch]]:
        """Batches of what is read again, of users and such columns of a table."""
        for table, held in self._again:
            read = 0
            for batch in self._checks.batches(table, table.user, *(getattr(table, name) for name in columns)):
                read += batch.read
                if read > held:  # batches are cut as they were the first time
                    yield table, batch

    def _newest(self) -> Any:
        """Time of the newest interaction, of weight above 0, of each user (U,); -inf where there is none."""
        checks, users = self._checks, self._users
        latest = np.full(users.size, -np.inf)

        def look_at(rows: Any, weights: Any, times: Any) -> None:
            counts = slice(None) if weights is None else weights > 0
            np.maximum.at(latest, rows[counts], times[counts])

        for user_codes, _, weights, times in self._coded:
            look_at(users.rows_of_codes(user_codes), weights, times)
        for table, batch in self._not_held("weight", "time"):
            if len(batch.frame):
                rows = users.rows(checks.users(table, batch))
                look_at(rows, checks.weights(table, batch), checks.times(table, batch))
        return latest


def _weights(backend: Backend, column: Any, place: str, row: Callable[[int], str]) -> Any:
    kind = str(column.dtype).lower()
    if not (ids.is_text(kind) or kind.startswith(("int", "uint", "float", "double", "half", "decimal"))):
        raise InputError(f"{place}: values of type {kind}; weights are numbers.")
    missing = column.isna()
    if bool(missing.any()):
        raise InputError(f"{place}: {row(ids.first_true(missing))} has no weight; drop such rows or give them one.")
    numbers = backend.tables.to_numeric(column, errors="coerce") if ids.is_text(kind) else column
    weights = backend.asarray(numbers.astype("float64").values)
    if ids.is_text(kind):
        wrong = backend.xp.isnan(weights)
        if bool(wrong.any()):
            at = int(wrong.argmax())
            raise InputError(f"{place}: {row(at)} has weight {ids.shown(column.iloc[at])}, which is not a number.")
    check_weights(backend, weights, place, row)
    return weights


def _require_matrix_file(file: io.BufferedReader, path: str) -> None:
    """Refuse, before scipy reads them, arrays that are not what they declare, or do not fit into memory."""
    with npy.archive(file, path) as archive:
        for member in archive.infolist():
            with archive.open(member) as stream:
                header = npy.read_header(stream)
            if header.dtype.hasobject:
                raise ValueError(f"{member.filename} holds Python objects")  # a pickle
            if member.filename in _INDICES and header.dtype.kind not in "iu":
                raise ValueError(f"{member.filename} holds {header.dtype}, not whole numbers")
            header.require_size(f"{path}, {member.filename}", member.file_size)
        require_memory(path, _MATRIX_COPIES * sum(member.file_size for member in archive.infolist()))
    file.seek(0)


def _read_matrix(
    backend: Backend, path: str, columns: Columns, axis: ItemAxis, users: int | Any | None
) -> InteractionTable:
    """Interactions from scipy's .npz: rows are users, columns items, values weights."""
    import scipy.sparse

    named = {
        "--user-column": columns.user,
        "--item-column": columns.item,
        "--session-column": columns.session,
        "--weight-column": columns.weight,
        "--half-life": columns.half_life,
        "--where": columns.where,
    }
    for flag, given in named.items():
        if given:
            raise InputError(
                f"{path}: {flag} is for tables; an .npz matrix has no columns, its values are the weights."
            )
    if axis.rows is None:
        raise InputError(
            f"{path}: the columns of a matrix are row numbers of the features, but every modality has item ids."
        )
    try:
        with reading(path) as file:
            _require_matrix_file(file, path)
            matrix = scipy.sparse.load_npz(file)
        if hasattr(matrix, "check_format"):
            matrix.check_format(full_check=True)
        read_rows = int(matrix.nnz)
        user_count = matrix.shape[0]
        matrix = matrix.tocoo()
        outside = matrix.col >= axis.rows
        inside = bool(((matrix.col >= 0) & (matrix.row >= 0) & (matrix.row < user_count)).all())
        require_memory(f"{path}: {user_count} rows", user_count * ROW_BYTES)
    except (GpuInitError, MemoryError):
        raise
    except Exception as error:  # zip, numpy and scipy raise many kinds for a broken file
        raise InputError(
            f"{path}: not a scipy sparse matrix ({one_line(error)}); scipy.sparse.save_npz writes one."
        ) from None
    if not inside:
        raise InputError(f"{path}: indices outside the matrix's own shape; the file is damaged.")
    if outside.any():
        at = int(np.argmax(outside))
        raise InputError(
            f"{path}: user {int(matrix.row[at])} has item {int(matrix.col[at])}, beyond the features' {axis.rows} rows:"
            f" row numbers run from 0 to {axis.rows - 1}."
        )
    if isinstance(users, int) and users < user_count:
        raise InputError(f"{path}: {user_count} rows, more than --users {users}.")
    if users is not None and not isinstance(users, int) and len(users) != user_count:
        raise InputError(f"{path}: {user_count} rows, but --users names {len(users)}.")
    user_ids = None if users is None or isinstance(users, int) else users
    count = users if isinstance(users, int) else user_count
    matrix = scipy.sparse.coo_array((matrix.data, (matrix.row, matrix.col)), shape=(count, axis.rows))
    backend = for_work(backend, reading_seconds(read_rows, 0))
    return InteractionTable(
        from_matrix(backend, matrix, path), user_ids, None, read_rows, read_rows, backend.kernels.name
    )
