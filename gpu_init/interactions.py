"""Interactions: from tables with ids of any kind to R, the U x I matrix of weights, by rows.

Section 2.1 (weights) and section 4 (inputs) of the design.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from . import ids
from .backend import Backend, one_line
from .errors import InputError
from .kernels import Csr
from .storage import expand
from .where import Where

TEXT_EXTENSIONS = (".csv", ".tsv", ".inter", ".csv.gz", ".tsv.gz", ".inter.gz")
EXTENSIONS = (".parquet", ".pq", ".npz", *TEXT_EXTENSIONS)

USER_NAMES = ("user_id", "userid", "user", "uid", "visitor_id", "session_id")
ITEM_NAMES = ("item_id", "itemid", "item", "iid", "product_id", "asin")
SPLIT_NAMES = ("x_label", "split")
_SUM_USERS = 1 << 16
_RECBOLE_TYPES = (":token", ":float", ":token_seq", ":float_seq")


@dataclass(frozen=True)
class Interactions:
    """R (U x I): canonical rows, that is sorted by item, without duplicates or zeros.

    Attributes
    ----------
    csr : Csr
        ``indptr`` (U + 1,) int64, ``indices`` (nnz,) int32, ``weights`` (nnz,) float32 or None where all are 1.
    items : int
        I, the number of columns.
    """

    csr: Csr
    items: int

    @property
    def users(self) -> int:
        """U, the number of rows."""
        return len(self.csr.indptr) - 1

    @property
    def pairs(self) -> int:
        """Number of user-item pairs that interacted."""
        return len(self.csr.indices)

    def user_degrees(self, backend: Backend, item_values: Any) -> Any:
        """``R v`` for ``v`` (I,) float64: with 1 for the items of a modality, the users' degrees in it (U,)."""
        return backend.kernels.row_sums(self.csr, item_values)

    def item_sums(self, backend: Backend, user_values: Any = None) -> Any:
        """``R^T v`` for ``v`` (U,) float64, ones if None, then the items' degrees; (I,) float64.

        Over fixed ranges of users, in order.
        """
        xp = backend.xp
        sums = xp.zeros(self.items, xp.float64)
        for first in range(0, self.users, _SUM_USERS):
            indptr = self.csr.indptr[first : first + _SUM_USERS + 1]
            entries = slice(int(indptr[0]), int(indptr[-1]))
            weights = None if self.csr.weights is None else self.csr.weights[entries].astype(xp.float64)
            if user_values is not None:
                rows = xp.searchsorted(indptr, xp.arange(entries.start, entries.stop), side="right") - 1
                values = user_values[first : first + _SUM_USERS][rows]
                weights = values if weights is None else weights * values
            sums += xp.bincount(self.csr.indices[entries], weights=weights, minlength=self.items)
        return sums


def build(backend: Backend, users: Any, items: Any, weights: Any, shape: tuple[int, int]) -> Interactions:
    """R from one row, column and weight per interaction, in any order; duplicates are summed, zeros dropped.

    Parameters
    ----------
    backend : Backend
        Where the arrays lie.
    users, items : array, shape (n,), int64
        Row and column of each interaction, within ``shape``.
    weights : array, shape (n,), float64, or None
        None: 1 per interaction.
    shape : tuple of int
        U and I; their product must be below 2^63.

    Returns
    -------
    Interactions
    """
    xp = backend.xp
    if shape[0] * shape[1] >= 2**63:
        raise InputError(f"{shape[0]} users x {shape[1]} items: the product must stay below 2^63.")
    key = users * shape[1] + items
    if weights is None:
        if not bool((key[1:] >= key[:-1]).all()):
            key = xp.sort(key)
    else:
        order = xp.argsort(key, kind="stable")
        if bool((key[order][1:] == key[order][:-1]).any()):  # sums must not depend on the order of the rows read
            by_weight = xp.argsort(weights, kind="stable")
            order = by_weight[xp.argsort(key[by_weight], kind="stable")]
        key, weights = key[order], weights[order]
    starts = xp.flatnonzero(xp.concatenate([xp.ones(min(1, len(key)), bool), key[1:] != key[:-1]]))
    if weights is None:
        summed = xp.diff(starts, append=xp.asarray([len(key)])).astype(xp.float64)
    else:
        summed = xp.add.reduceat(weights, starts) if len(starts) else weights
    key = key[starts]
    if not bool((summed > 0).all()):
        key, summed = key[summed > 0], summed[summed > 0]
    indptr = xp.searchsorted(key, xp.arange(shape[0] + 1, dtype=xp.int64) * shape[1]).astype(xp.int64)
    indices = (key % shape[1]).astype(xp.int32)
    return Interactions(
        Csr(indptr, indices, None if bool((summed == 1).all()) else summed.astype(xp.float32)), shape[1]
    )


def check_weights(backend: Backend, weights: Any, place: str, row: Callable[[int], str]) -> None:
    """Refuse weights that are negative, infinite or not a number.

    Raises
    ------
    InputError
        Names the first such row and what stands there.
    """
    xp = backend.xp
    bad = ~(xp.isfinite(weights) & (weights >= 0) & (weights <= np.finfo(np.float32).max))
    if bool(bad.any()):
        at = int(xp.argmax(bad))
        raise InputError(f"{place}: {row(at)} has weight {float(weights[at])}; weights are finite and not negative.")


def from_matrix(backend: Backend, matrix: Any, place: str) -> Interactions:
    """R from a scipy or cupyx sparse matrix of any format; its values are the weights.

    Raises
    ------
    InputError
        Not a sparse matrix of numbers, or a weight is negative or not finite.
    """
    if not hasattr(matrix, "tocoo") or len(matrix.shape) != 2:
        raise InputError(f"{place}: found {type(matrix).__name__}; a sparse matrix, users x items, is wanted.")
    if matrix.dtype.kind not in "biuf":
        raise InputError(f"{place}: values of type {matrix.dtype}; weights are numbers.")
    if matrix.shape[1] >= 2**31:
        raise InputError(f"{place}: {matrix.shape[1]} items; at most 2^31 - 1.")
    if matrix.format == "csr" and matrix.has_canonical_format and matrix.nnz and bool((matrix.data > 0).all()):
        weights = backend.asarray(matrix.data)
        check_weights(backend, weights, place, lambda k: f"entry {k}")
        one = bool((weights == 1).all())
        indptr, indices = backend.asarray(matrix.indptr), backend.asarray(matrix.indices)
        csr = Csr(indptr.astype("int64"), indices.astype("int32"), None if one else weights.astype("float32"))
        return Interactions(csr, matrix.shape[1])
    entries = matrix.tocoo()
    weights = backend.asarray(entries.data.astype("float64"))
    check_weights(backend, weights, place, lambda k: f"entry ({int(entries.row[k])}, {int(entries.col[k])})")
    rows, columns = (backend.asarray(index.astype("int64")) for index in (entries.row, entries.col))
    return build(backend, rows, columns, weights, matrix.shape)


# Reading.


@dataclass(frozen=True)
class Columns:
    """Which columns of a table hold what; None: known names are tried."""

    user: str | None = None
    item: str | None = None
    weight: str | None = None
    where: Where | None = None


@dataclass(frozen=True)
class ItemAxis:
    """How item ids find their column of R.

    ``rows``: ids are row numbers of the features, below this count. None: ``known`` are the ids (pandas
    Series) of the features of each modality, and the columns are these and the interactions' own, sorted.
    """

    rows: int | None
    known: Sequence[Any] = ()


@dataclass(frozen=True)
class InteractionTable:
    """Interactions as read: R, the raw ids of its rows and columns, and how many rows there were.

    ``user_ids`` and ``item_ids`` are pandas Series, or None where rows and columns are the ids. ``read`` and
    ``kept`` count rows of the files, before and after ``where``.
    """

    interactions: Interactions
    user_ids: Any
    item_ids: Any
    read: int
    kept: int
    warnings: list[str] = field(default_factory=list)


@dataclass
class _Rows:
    """Rows read so far, batch by batch."""

    users: list[Any] = field(default_factory=list)
    items: list[Any] = field(default_factory=list)
    weights: list[Any] = field(default_factory=list)
    read: int = 0
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
    rows = _Rows()
    for path in paths:
        _read_file(backend, path, columns, axis, users, rows, advance)
    kept = sum(len(batch) for batch in rows.users)
    if kept == 0:
        found = f"{rows.read} rows, none of which --where keeps" if rows.read else "no rows"
        raise InputError(f"{pattern}: {found}; there is nothing to make vectors from.")
    user_rows, user_count, user_ids = _user_rows(backend, _joined(backend, rows.users), users, pattern)
    item_rows, item_count, item_ids = _item_rows(backend, _joined(backend, rows.items), axis, pattern)
    weights = backend.xp.concatenate(rows.weights) if columns.weight else None
    matrix = build(backend, user_rows, item_rows, weights, (user_count, item_count))
    return InteractionTable(matrix, user_ids, item_ids, rows.read, kept, rows.warnings)


def _read_file(
    backend: Backend,
    path: str,
    columns: Columns,
    axis: ItemAxis,
    users: int | Any | None,
    rows: _Rows,
    advance: Callable[[int], None],
) -> None:
    separator, names = header(path)
    user = find_column(path, names, columns.user, USER_NAMES, "--user-column")
    item = find_column(path, names, columns.item, ITEM_NAMES, "--item-column")
    weight = find_column(path, names, columns.weight, (), "--weight-column") if columns.weight else None
    asked = {
        name: find_column(path, names, name, (), "--where") for name in (columns.where.columns if columns.where else ())
    }
    _check_split(path, names, columns.where, asked, rows.warnings)
    wanted = list(dict.fromkeys([user, item, *([weight] if weight else []), *asked.values()]))
    before = 0
    for frame in backend.batches(path, separator, wanted):
        positions = backend.xp.arange(before, before + len(frame))
        before += len(frame)
        rows.read += len(frame)
        advance(len(frame))

        kept = frame
        if columns.where:
            named = frame.rename(columns={actual: name for name, actual in asked.items()})
            keep = columns.where.mask(named, path, _rows_named(separator, positions))
            kept = frame[keep]
            positions = positions[backend.asarray(keep.to_numpy().astype(bool))]
        if len(kept):
            place = _rows_named(separator, positions)
            _add_batch(backend, kept, (user, item, weight), axis, users, rows, path, place)


def _add_batch(
    backend: Backend,
    frame: Any,
    names: tuple[str, str, str | None],
    axis: ItemAxis,
    users: int | Any | None,
    rows: _Rows,
    path: str,
    row: Callable[[int], str],
) -> None:
    user, item, weight = names
    user_ids = ids.normalize(frame[user].reset_index(drop=True), f"{path}, column {user}", row)
    item_ids = ids.normalize(frame[item].reset_index(drop=True), f"{path}, column {item}", row)
    if isinstance(users, int):
        _check_range(user_ids, users, f"{path}, column {user}", row, f"--users {users}", "user")
    if axis.rows is not None:
        _check_range(item_ids, axis.rows, f"{path}, column {item}", row, f"the features' {axis.rows} rows", "item")
    rows.users.append(user_ids)
    rows.items.append(item_ids)
    if weight:
        rows.weights.append(_weights(backend, frame[weight].reset_index(drop=True), f"{path}, column {weight}", row))


def _check_range(column: Any, count: int, place: str, row: Callable[[int], str], what: str, kind: str) -> None:
    """Ids that are row numbers: whole numbers in [0, count)."""
    if ids.is_text(str(column.dtype)):
        text = ~column.str.match(ids.WHOLE_NUMBER)
        at = ids.first_true(text)
        remedy = "features with an id column" if kind == "item" else "--users PATH, or no --users"
        raise InputError(
            f"{place}: {row(at)} has {kind} {column.iloc[at]!r}, but with {what} ids are row numbers;"
            f" for text ids: {remedy}."
        )
    outside = (column < 0) | (column >= count)
    if bool(outside.any()):
        at = ids.first_true(outside)
        raise InputError(
            f"{place}: {row(at)} has {kind} {int(column.iloc[at])}, beyond {what}:"
            f" row numbers run from 0 to {count - 1}."
        )


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
            raise InputError(f"{place}: {row(at)} has weight {column.iloc[at]!r}, which is not a number.")
    check_weights(backend, weights, place, row)
    return weights


def row_name(separator: str | None, position: int) -> str:
    """Name a row as an editor would show it: the line of a text file, the row of a Parquet file from 0."""
    return f"row {position}" if separator is None else f"line {position + 2}"


def _rows_named(separator: str | None, positions: Any) -> Callable[[int], str]:
    """Names of the rows of a batch, whose places in the file are ``positions``."""
    return lambda at: row_name(separator, int(positions[at]))


def header(path: str) -> tuple[str | None, list[str]]:
    """Separator (None for Parquet) and column names of a table.

    Raises
    ------
    InputError
        The file cannot be read, or is not a table.
    """
    import pyarrow as pa
    import pyarrow.csv as pc
    import pyarrow.parquet as pq

    try:
        if path.endswith((".parquet", ".pq")):
            return None, list(pq.read_schema(path).names)
        with pa.input_stream(path, compression="detect") as stream:
            first = stream.read(1 << 20).split(b"\n", 1)[0].decode("utf-8-sig").rstrip("\r")
        if not first.strip():
            raise InputError(f"{path}: no header line; the first line names the columns.")
        separator = "\t" if "\t" in first else ","
        quoted = pa.BufferReader((first + "\n").encode())
        table = pc.read_csv(quoted, parse_options=pc.ParseOptions(delimiter=separator))
        return separator, list(table.column_names)
    except UnicodeDecodeError:
        raise InputError(f"{path}: the first line is not UTF-8 text.") from None
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: {one_line(error)}") from None


def find_column(path: str, names: list[str], wanted: str | None, known: tuple[str, ...], flag: str) -> str:
    """Give the column that a name means; RecBole's typed headers (``user_id:token``) count as their bare name.

    Raises
    ------
    InputError
        No such column, or several.
    """
    if wanted is not None and names.count(wanted) == 1:
        return wanted
    if wanted is not None:
        found = [name for name in names if wanted in (name, bare(name))]
    else:
        found = next(
            (
                hits
                for one in known
                if (hits := [name for name in names if bare(name).lower() in (one, one.replace("_", ""))])
            ),
            [],
        )
    if len(found) == 1:
        return found[0]
    listed = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    if found:
        raise InputError(f"{path}: column {found[0]} stands there {len(found)} times; the columns are {listed}.")
    if wanted is not None:
        raise InputError(f"{path}: no column {wanted} ({flag}); the columns are {listed}.")
    raise InputError(
        f"{path}: none of the columns is named {', '.join(known)}; name it with {flag}. They are {listed}."
    )


def bare(name: str) -> str:
    """Column name without RecBole's type."""
    ending = next((ending for ending in _RECBOLE_TYPES if name.endswith(ending)), "")
    return name.removesuffix(ending)


def _check_split(path: str, names: list[str], where: Where | None, asked: dict[str, str], warned: list[str]) -> None:
    """Refuse a table that says which rows are for validation and test, unless the caller says which to take."""
    split = next((name for name in names if bare(name).lower() in SPLIT_NAMES), None)
    if split is None or split in asked.values():
        return
    leak = "vectors made from validation or test rows leak them into training"
    if where is None:
        raise InputError(
            f"{path} has a split column, {split}: {leak}.\n"
            f'Say which rows to take, such as --where "{bare(split)} == 0".'
        )
    warned.append(f"{path} has a split column, {split}, which --where does not look at: {leak}")


def _read_matrix(
    backend: Backend, path: str, columns: Columns, axis: ItemAxis, users: int | Any | None
) -> InteractionTable:
    """Interactions from scipy's .npz: rows are users, columns items, values weights."""
    import scipy.sparse

    named = {
        "--user-column": columns.user,
        "--item-column": columns.item,
        "--weight-column": columns.weight,
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
        matrix = scipy.sparse.load_npz(path)
        if hasattr(matrix, "check_format"):
            matrix.check_format(full_check=True)
        read_rows = int(matrix.nnz)
        user_count = matrix.shape[0]
        matrix = matrix.tocoo()
        outside = matrix.col >= axis.rows
        inside = bool(((matrix.col >= 0) & (matrix.row >= 0) & (matrix.row < user_count)).all())
    except InputError:
        raise
    except MemoryError:
        raise InputError(f"{path}: the matrix does not fit in memory.") from None
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
    return InteractionTable(from_matrix(backend, matrix, path), user_ids, None, read_rows, read_rows)


def read_user_ids(backend: Backend, path: str, user_column: str | None) -> Any:
    """Read ``--users PATH``: the ids of the users' rows, in order.

    Parquet, CSV or TSV with a header (the user column, a known name, or the only column there is), or a .txt
    of one id per line.

    Returns
    -------
    pandas Series, shape (U,)

    Raises
    ------
    InputError
        Nothing there, a missing id, or one id twice.
    """
    paths = expand(path, (".parquet", ".pq", ".txt", *TEXT_EXTENSIONS))
    parts = [part for one in paths for part in _user_id_batches(backend, one, user_column)]
    if sum(map(len, parts)) == 0:
        raise InputError(f"{path}: no user ids.")
    column = _joined(backend, parts)
    twice = column.duplicated()
    if bool(twice.any()):
        at = ids.first_true(twice)
        raise InputError(
            f"{path}: user {column.iloc[at]!r} stands there twice (again in row {at}); a user has one row."
        )
    return backend.host_column(column)


def _user_id_batches(backend: Backend, path: str, user_column: str | None) -> Iterator[Any]:
    if path.endswith(".txt"):
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: {one_line(error)}") from None
        column = backend.tables.Series([line if line else None for line in lines], dtype="str")
        yield ids.normalize(column, path, lambda at: f"line {at + 1}")
        return
    separator, names = header(path)
    only = names[0] if len(names) == 1 and user_column is None else None
    name = only or find_column(path, names, user_column, USER_NAMES, "--user-column")
    before = 0
    for frame in backend.batches(path, separator, [name]):

        def row(at: int, before: int = before) -> str:
            return row_name(separator, before + at)

        yield ids.normalize(frame[name].reset_index(drop=True), f"{path}, column {name}", row)
        before += len(frame)


# Ids to rows and columns.


def _joined(backend: Backend, parts: list[Any]) -> Any:
    """One column from those of the batches; whole numbers become text where any batch holds text."""
    if any(ids.is_text(str(part.dtype)) for part in parts):
        parts = [part.astype("str") for part in parts]
    return parts[0] if len(parts) == 1 else backend.tables.concat(parts, ignore_index=True)


def _user_rows(backend: Backend, column: Any, users: int | Any | None, place: str) -> tuple[Any, int, Any]:
    """Row of each interaction, U, and the ids of the rows where they are not the row numbers."""
    if isinstance(users, int):
        return backend.asarray(column.values), users, None
    if users is None:
        if not ids.is_text(str(column.dtype)):
            count = int(column.max()) + 1
            if int(column.min()) == 0 and count <= len(column) and column.nunique() == count:
                return backend.asarray(column.values), count, None
        codes, found = column.factorize(sort=True)
        return backend.asarray(codes.astype("int64")), len(found), backend.host_column(found)
    codes, found = column.factorize()
    rows, outside = _positions(backend.host_column(found), users)
    if outside is not None:
        raise InputError(f"{place}: user {outside!r} is not among the {len(users)} of --users.")
    return backend.asarray(rows)[backend.asarray(codes)], len(users), users


def _item_rows(backend: Backend, column: Any, axis: ItemAxis, place: str) -> tuple[Any, int, Any]:
    """Column of each interaction, I, and the ids of the columns where they are not the row numbers."""
    if axis.rows is not None:
        return backend.asarray(column.values), axis.rows, None
    import pandas as pd

    codes, found = column.factorize()
    found = backend.host_column(found)
    every = [found, *axis.known]
    if any(ids.is_text(str(one.dtype)) for one in every):
        every = [one.astype("str") for one in every]
    axis_ids = pd.Series(pd.concat(every, ignore_index=True).unique()).sort_values(ignore_index=True)
    known = pd.Index(pd.concat(every[1:], ignore_index=True).unique())
    if not every[0].isin(known).any():
        raise InputError(
            f"{place}: none of the {len(found)} items has features: ids such as {every[0].iloc[0]!r} here,"
            f" {known[0]!r} in the features."
        )
    rows, _ = _positions(found, axis_ids)
    return backend.asarray(rows)[backend.asarray(codes)], len(axis_ids), axis_ids


def positions(found: Any, axis_ids: Any) -> Any:
    """Row of each id of ``found`` in ``axis_ids``, both pandas Series; every id must be there.

    Returns
    -------
    numpy array, shape (n,), int64
    """
    rows, outside = _positions(found, axis_ids)
    if outside is not None:
        raise InputError(f"item {outside!r} of the features is not a row of the items.")
    return rows


def _positions(found: Any, axis_ids: Any) -> tuple[Any, Any]:
    """Row of each id, -1 where there is none, and the first id without one."""
    import pandas as pd

    if ids.is_text(str(found.dtype)) or ids.is_text(str(axis_ids.dtype)):
        found, axis_ids = found.astype("str"), axis_ids.astype("str")
    rows = pd.Index(axis_ids).get_indexer(pd.Index(found)).astype(np.int64)
    absent = np.flatnonzero(rows < 0)
    return rows, found.iloc[absent[0]] if len(absent) else None
