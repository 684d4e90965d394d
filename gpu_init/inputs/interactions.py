"""Interactions: from tables with ids of any kind to R, the U x I matrix of weights in CSR form."""

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

# So many rows of tables are held in memory as codes, and not read again. A row takes 8 bytes, 12 with its weight.
_HELD_ROWS = 1 << 24
_ENTRY_BYTES = 4  # Each interaction takes at least so much memory, for its item in R.
_INDICES = ("indices.npy", "indptr.npy", "row.npy", "col.npy", "coords.npy", "offsets.npy", "shape.npy")
# So many copies of a matrix file's arrays are in memory at the same time: as scipy reads them, as entries, and R.
_MATRIX_COPIES = 3


def require_kept(pattern: str, read: int, kept: int) -> None:
    """Refuse interactions if none is kept of the ``read`` rows."""
    if kept == 0:
        found = f"{read} rows, none of which --where keeps" if read else "no rows"
        raise InputError(f"{pattern}: {found}; there is nothing to make vectors from.")


def require_unchanged(tables: Iterable[Table]) -> None:
    """Refuse tables that have changed since they were opened."""
    for table in tables:
        if file_state(table.path) != table.state:
            raise InputError(f"{table.path}: changed while it was read; run again when it is complete.")


@dataclass(frozen=True)
class InteractionTable:
    """Interactions as they were read.

    Attributes
    ----------
    interactions : Interactions
        R.
    user_ids, item_ids : pandas Series, shape (U,) and (I,), or None
        Raw ids of the rows and of the columns of R; None where the row and column numbers are the ids.
    read, kept : int
        Number of rows of the files, before and after ``where``.
    kernels : str
        Name of the kernels that made R.
    warnings : list of str
        What the user should know about the files.
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
    """Read interactions from Parquet, CSV, TSV or .inter files, or from one .npz file of scipy.

    Parameters
    ----------
    backend : Backend
        R is made on its device.
    pattern : str
        File, folder or glob.
    columns : Columns
        Names of the columns, and the rows to keep.
    axis : ItemAxis
        What item ids mean.
    users : int, pandas Series of shape (U,), or None
        An int is U, and user ids are row numbers. A Series has the ids of the rows, in order. With None, user ids are
        row numbers if they fill 0..max without gaps; otherwise rows follow the sorted ids.
    advance : callable
        It is called with the number of rows of each batch that was read.

    Returns
    -------
    InteractionTable

    Raises
    ------
    InputError
        A file, a column or a row is wrong. The message says which one and what to do.
    ResourceError
        The interactions do not fit into memory.
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
    reader = _Holding(checks) if in_place is None else _Streaming(checks, in_place, tables)
    for table in tables:
        reader.take(table)
    require_kept(pattern, reader.read, reader.kept)
    matrix, user_ids, item_ids = reader.finish(pattern)
    require_unchanged(tables)
    return InteractionTable(matrix, user_ids, item_ids, reader.read, reader.kept, backend.kernels.name, warnings)


@dataclass(frozen=True)
class Checks:
    """Reads the columns of tables and checks every value, for all ways of making R.

    Attributes
    ----------
    backend : Backend
    where : Where or None
        The rows to keep.
    axis : ItemAxis
        What item ids mean.
    listed : int, pandas Series or None
        The argument ``users`` of `read`.
    advance : callable
        It is called with the number of rows of each batch that was read.
    recency : Recency or None
        How weights decay with age.
    """

    backend: Backend
    where: Where | None
    axis: ItemAxis
    listed: int | Any | None
    advance: Callable[[int], None]
    recency: Recency | None = None

    def users(self, table: Table, batch: Batch) -> Any:
        """Return the user ids of a batch (n,), int64 or text."""
        count = self.listed if isinstance(self.listed, int) else None
        return self._ids(table, batch, table.user, count, f"--users {count}", "user")

    def items(self, table: Table, batch: Batch) -> Any:
        """Return the item ids of a batch (n,), int64 or text."""
        count = self.axis.rows
        return self._ids(table, batch, table.item, count, f"the features' {count} rows", "item")

    def _ids(self, table: Table, batch: Batch, name: str, count: int | None, limit: str, kind: str) -> Any:
        place = f"{table.path}, column {name}"
        column = ids.normalize(batch.frame[name], place, batch.row)
        if count is not None:
            check_range(column, count, place, batch.row, limit, kind)
        return column

    def weights(self, table: Table, batch: Batch) -> Any:
        """Return the weights of a batch, (n,) float32 on the device, or None."""
        if table.weight is None:
            return None
        place = f"{table.path}, column {table.weight}"
        return _weights(self.backend, batch.frame[table.weight], place, batch.row).astype("float32")

    def times(self, table: Table, batch: Batch) -> Any:
        """Return the times of a batch, (n,) float64 on the device, or None."""
        if self.recency is None:
            return None
        place = f"{table.path}, column {table.time}"
        return self.recency.times(self.backend, batch.frame[table.time], place, batch.row)

    def decayed(self, weights: Any, ages: Any) -> Any:
        """Return the weights (n,), float32 or None, of interactions with these ages (n,), after any decay."""
        return weights if self.recency is None else self.recency.decayed(self.backend, weights, ages)

    def batches(self, table: Table, *wanted: str | None, groups: range | None = None) -> Iterator[Batch]:
        """Read these columns of a table, or of some of its row groups, batch by batch."""
        return batches(self.backend, table, self.where, [name for name in wanted if name], groups)


class _Holding:
    """Holds all rows in memory until the end, as two codes of 32 bits each, and then sorts them, on any device."""

    def __init__(self, checks: Checks) -> None:
        self.read = self.kept = 0
        self._checks = checks
        self._users = _HeldIds(checks.backend, checks.listed if isinstance(checks.listed, int) else None)
        self._items = _HeldIds(checks.backend, checks.axis.rows)
        self._weights: list[Any] = []
        self._times: list[Any] = []

    def take(self, table: Table) -> None:
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
        """Return R, and the ids of its rows and columns, or None where these are the row numbers."""
        checks, concatenate = self._checks, self._checks.backend.xp.concatenate
        users = self._users.rows(lambda found: user_axis(found, place, checks.listed))
        items = self._items.rows(lambda found: item_axis(found, place, checks.axis))
        weights = concatenate(self._weights) if self._weights else None
        times = concatenate(self._times) if self._times else None
        shape = (self._users.size, self._items.size)
        return assemble(checks, users, items, weights, times, shape), self._users.ids, self._items.ids


def assemble(checks: Checks, users: Any, items: Any, weights: Any, times: Any, shape: tuple[int, int]) -> Interactions:
    """Make R from the rows, columns, weights and times, each (n,) or None, of all interactions of the users.

    Weights and times are what `Checks` returns.
    """
    backend = checks.backend
    if times is not None:
        counts = slice(None) if weights is None else backend.xp.flatnonzero(weights > 0)
        latest = newest(backend, users[counts], times[counts], shape[0])
        weights = checks.decayed(weights, latest[users] - times)
    return built(backend, users, items, weights, shape)


class _HeldIds:
    """The ids of an axis.

    If ids are row numbers, these are kept. Otherwise each batch has codes of its own, and its distinct ids are kept
    with them until `rows` numbers them.

    Parameters
    ----------
    backend : Backend
    size : int or None
        Ids are row numbers below this count; None if they are not.
    """

    def __init__(self, backend: Backend, size: int | None) -> None:
        self.size = size or 0
        self.ids: Any = None
        self._backend = backend
        self._coded = size is None
        self._codes: list[Any] = []
        self._found: list[Any] = []

    def take(self, column: Any) -> None:
        """Keep the ids of a batch (n,), int64 or text."""
        if self._coded:
            codes, found = column.factorize()
            self._found.append(self._backend.tables.Series(found))
        else:
            codes = column.values
        codes = self._backend.asarray(codes)
        self._codes.append(codes.astype("int32") if self._coded or self.size <= 2**31 else codes)

    def rows(self, resolve: Resolve) -> Any:
        """Return the rows of the ids (n,), int32 or int64. Set ``size``, and ``ids`` unless ids are row numbers."""
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


class _Streaming:
    """Counts each user's rows while it reads, and then puts the rows into R in place, which takes the least memory.

    Tables that store both ids as integers are read twice, the first time only to count. Of the other tables, up to
    `_HELD_ROWS` rows are held as int32 codes, and only the rows after these are read again. With a recency, the times
    are read in a pass between these two, to find each user's newest interaction.
    """

    def __init__(self, checks: Checks, in_place: Callable[..., Any], tables: list[Table]) -> None:
        self.read = self.kept = 0
        self._checks = checks
        self._in_place = in_place
        axis, listed = checks.axis, checks.listed
        # Tables to read again, each with the number of its rows that are held.
        self._again: list[tuple[Table, int]] = []
        # By batch: codes of users and items, weights, times.
        self._coded: deque[tuple[Any, Any, Any, Any]] = deque()
        self._room = _HELD_ROWS
        self._weighted = False
        dense = sum(table.whole or 0 for table in tables) if listed is None else 0
        self._users = RowNumbers(listed) if isinstance(listed, int) else Codes(dense)
        self._items = RowNumbers(axis.rows) if axis.rows is not None else Codes(0)

    def take(self, table: Table) -> None:
        """Read a table: all its columns while rows are held, otherwise only those to count."""
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
                checks.advance(batch.read // 2)  # The other half is told when the batch is read again.
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
        """Return R, and the ids of its rows and columns, or None where these are the row numbers."""
        checks, users, items = self._checks, self._users, self._items
        users.settle(lambda found: user_axis(found, place, checks.listed))
        items.settle(lambda found: item_axis(found, place, checks.axis))
        latest = None  # The time of each user's newest interaction with a weight above 0.
        if checks.recency is not None:
            latest = np.full(users.size, -np.inf)
            for rows, _, weights, times in self._interactions(last=False):
                counts = slice(None) if weights is None else weights > 0
                np.maximum.at(latest, rows[counts], times[counts])
        filling = self._in_place(users.starts(), self._weighted or latest is not None)
        for rows, columns, weights, times in self._interactions(last=True):
            filling.add(rows, columns, weights if latest is None else checks.decayed(weights, latest[rows] - times))
        return Interactions(filling.finish(), items.size), users.ids, items.ids

    def _interactions(self, last: bool) -> Iterator[tuple[Any, Any, Any, Any]]:
        """Yield the rows, columns, weights and times of all interactions, batch by batch, first of those that are held.

        Only the last pass reads the columns, which are None in others, and it frees what is held.
        """
        checks, users, items = self._checks, self._users, self._items
        coded = (self._coded.popleft() for _ in range(len(self._coded))) if last else iter(self._coded)
        for user_codes, item_codes, weights, times in coded:
            columns = items.rows_of_codes(item_codes) if last else None
            yield users.rows_of_codes(user_codes), columns, weights, times
        for table, held in self._again:
            read = 0
            for batch in checks.batches(table, table.user, table.item if last else None, table.weight, table.time):
                read += batch.read
                if read <= held:  # A table is cut into the same batches each time.
                    continue
                if len(batch.frame):
                    rows = users.rows(checks.users(table, batch))
                    columns = items.rows(checks.items(table, batch)) if last else None
                    yield rows, columns, checks.weights(table, batch), checks.times(table, batch)
                if last:
                    checks.advance(batch.read - batch.read // 2)


def _weights(backend: Backend, column: Any, place: str, row: Callable[[int], str]) -> Any:
    kind = str(column.dtype).lower()
    if not (ids.is_text(kind) or kind.startswith(("int", "uint", "float", "double", "half", "decimal"))):
        raise InputError(f"{place}: values of type {kind}; weights are numbers.")
    ids.refuse_missing(column.isna(), place, row, "weight")
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
    """Refuse, before scipy reads them, arrays that are not as their headers say, or that do not fit into memory."""
    with npy.archive(file, path) as archive:
        for member in archive.infolist():
            with archive.open(member) as stream:
                header = npy.read_header(stream)
            if header.dtype.hasobject:  # numpy stores such an array as a pickle.
                raise ValueError(f"{member.filename} holds Python objects")
            if member.filename in _INDICES and header.dtype.kind not in "iu":
                raise ValueError(f"{member.filename} holds {header.dtype}, not whole numbers")
            header.require_size(f"{path}, {member.filename}", member.file_size)
        require_memory(path, _MATRIX_COPIES * sum(member.file_size for member in archive.infolist()))
    file.seek(0)


def _read_matrix(
    backend: Backend, path: str, columns: Columns, axis: ItemAxis, users: int | Any | None
) -> InteractionTable:
    """Read a sparse matrix of scipy from .npz. Its rows are users, its columns items, and its values weights."""
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
    except Exception as error:  # For a broken file, zipfile, numpy and scipy raise errors of many types.
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
    count, user_ids = (users, None) if isinstance(users, int) else (user_count, users)
    if count < user_count:
        raise InputError(f"{path}: {user_count} rows, more than --users {count}.")
    if user_ids is not None and len(user_ids) != user_count:
        raise InputError(f"{path}: {user_count} rows, but --users names {len(user_ids)}.")
    matrix = scipy.sparse.coo_array((matrix.data, (matrix.row, matrix.col)), shape=(count, axis.rows))
    backend = for_work(backend, reading_seconds(read_rows, 0))
    return InteractionTable(
        from_matrix(backend, matrix, path), user_ids, None, read_rows, read_rows, backend.kernels.name
    )
