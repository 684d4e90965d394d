"""Ids to rows: what an id of a user or an item means, and which row of R, or column, it has.

The id rules of section 4 of the design.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_init import ids
from gpu_init.errors import InputError

if TYPE_CHECKING:
    from gpu_init.kernels.ids import Numbers, Texts

Resolve = Callable[[Any], tuple[Any, int, Any]]  # distinct ids to rows, as `user_axis` does


@dataclass(frozen=True)
class ItemAxis:
    """How item ids find their column of R.

    ``rows``: ids are row numbers of the features, below this count. None: ``known`` are the ids (pandas
    Series) of the features of each modality, and the columns are these and the interactions' own, sorted.
    """

    rows: int | None
    known: Sequence[Any] = ()


def check_range(column: Any, count: int, place: str, row: Callable[[int], str], what: str, kind: str) -> None:
    """Refuse ids that are no row numbers: whole numbers in [0, count).

    Raises
    ------
    InputError
        Names the first such row and its id.
    """
    if ids.is_text(str(column.dtype)):
        text = ~column.str.match(ids.WHOLE_NUMBER)
        at = ids.first_true(text)
        remedy = "features with an id column" if kind == "item" else "--users PATH, or no --users"
        raise InputError(
            f"{place}: {row(at)} has {kind} {ids.shown(column.iloc[at])}, but with {what} ids are row numbers;"
            f" for text ids: {remedy}."
        )
    outside = (column < 0) | (column >= count)
    if bool(outside.any()):
        at = ids.first_true(outside)
        raise InputError(
            f"{place}: {row(at)} has {kind} {int(column.iloc[at])}, beyond {what}:"
            f" row numbers run from 0 to {count - 1}."
        )


def user_axis(found: Any, place: str, users: Any | None) -> tuple[Any, int, Any]:
    """Rows of users, from their distinct ids.

    Parameters
    ----------
    found : pandas Series, shape (m,)
        Distinct ids of the interactions, int64 or text.
    place : str
        What to call the interactions in an error.
    users : pandas Series, shape (U,), or None
        Ids of the rows, in order.

    Returns
    -------
    rows : numpy array, shape (m,), int64
        Row of each of ``found``.
    size : int
        U.
    ids : pandas Series, shape (U,), or None
        Ids of the rows, sorted unless given; None where they are the row numbers.

    Raises
    ------
    InputError
        A user is not among ``users``.
    """
    if users is not None:
        rows, outside = _positions(found, users)
        if outside is not None:
            raise InputError(f"{place}: user {ids.shown(outside)} is not among the {len(users)} of --users.")
        return rows, len(users), users
    if not ids.is_text(str(found.dtype)) and int(found.min()) == 0 and int(found.max()) + 1 == len(found):
        return found.to_numpy(), len(found), None
    order = found.argsort().to_numpy()
    rows = np.empty(len(found), np.int64)
    rows[order] = np.arange(len(found))
    return rows, len(found), found.iloc[order].reset_index(drop=True)


def item_axis(found: Any, place: str, axis: ItemAxis) -> tuple[Any, int, Any]:
    """Columns of items, from their distinct ids; arguments and results as in `user_axis`.

    Raises
    ------
    InputError
        No item has features.
    """
    import pandas as pd

    every = [found, *axis.known]
    if any(ids.is_text(str(one.dtype)) for one in every):
        every = [one.astype("str") for one in every]
    axis_ids = pd.Series(pd.concat(every, ignore_index=True).unique()).sort_values(ignore_index=True)
    known = pd.Index(pd.concat(every[1:], ignore_index=True).unique())
    if not every[0].isin(known).any():
        here, there = (ids.shown(one[:1].tolist()[0]) for one in (every[0], known))
        raise InputError(
            f"{place}: none of the {len(found)} items has features: ids such as {here} here, {there} in the features."
        )
    rows, _ = _positions(found, axis_ids)
    return rows, len(axis_ids), axis_ids


def positions(found: Any, axis_ids: Any) -> Any:
    """Row of each id of ``found`` in ``axis_ids``, both pandas Series; every id must be there.

    Returns
    -------
    numpy array, shape (n,), int64
    """
    rows, outside = _positions(found, axis_ids)
    if outside is not None:
        raise InputError(f"item {ids.shown(outside)} of the features is not a row of the items.")
    return rows


def _positions(found: Any, axis_ids: Any) -> tuple[Any, Any]:
    """Row of each id, -1 where there is none, and the first id without one."""
    import pandas as pd

    if ids.is_text(str(found.dtype)) or ids.is_text(str(axis_ids.dtype)):
        found, axis_ids = found.astype("str"), axis_ids.astype("str")
    rows = pd.Index(axis_ids).get_indexer(pd.Index(found)).astype(np.int64)
    absent = np.flatnonzero(rows < 0)
    return rows, found.iloc[absent[:1]].tolist()[0] if len(absent) else None


# Rows counted as the ids are read, for a job large enough for the kernels that do it.


class RowNumbers:
    """An axis whose ids are its row numbers.

    Parameters
    ----------
    size : int
        Number of rows.
    """

    ids = None

    def __init__(self, size: int) -> None:
        self.size = size
        self._starts = np.zeros(size + 1, np.int64)

    def count(self, column: Any) -> None:
        """Count the rows of ids (n,), all whole numbers."""
        from gpu_init.kernels.ids import count

        count(column.to_numpy(), self._starts[1:])

    def encode(self, column: Any) -> Any:
        """Count ids, int64 or text, and give what is to be kept of each (n,)."""
        self.count(column)
        numbers = column.to_numpy()
        return numbers if self.size > 2**31 else numbers.astype(np.int32)

    def settle(self, _: Resolve) -> None:
        """Number the rows, all ids being known: sets ``size``, and ``ids`` where they are not the row numbers."""

    def starts(self) -> Any:
        """Where each row starts and the last ends (size + 1,) int64, once rows are numbered."""
        return np.cumsum(self._starts, out=self._starts)

    def rows(self, column: Any) -> Any:
        """Rows (n,) int64 of ids (n,) that were counted."""
        return column.to_numpy()

    def rows_of_codes(self, codes: Any) -> Any:
        """Rows (n,) int64 of what `encode` gave."""
        return codes.astype(np.int64)


class Codes:
    """An axis of ids of any kind, in codes by order of appearance: numbers from 0 up, texts from -1 down.

    Parameters
    ----------
    dense : int
        As long as all ids are numbers from 0 to below this, and nobody asks for codes, a table counts them.
    """

    def __init__(self, dense: int) -> None:
        self.size = 0
        self.ids: Any = None
        self._table: Any = np.zeros(dense + 1, np.int64)  # memory is taken page by page, as ids fall there
        self._numbers: Numbers | None = None  # instead of the table
        self._texts: Texts | None = None
        self._rows: Any = None  # of each id of the table, or of each code
        self._degrees: Any = None  # of each id or code found: (rows, counts)

    def count(self, column: Any) -> None:
        """See `RowNumbers.count`; texts too."""
        if self._numbers is None and not ids.is_text(str(column.dtype)):
            numbers = column.to_numpy()
            if numbers.min() >= 0 and numbers.max() < len(self._table) - 1:
                from gpu_init.kernels.ids import count

                count(numbers, self._table[1:])
                self.size = max(self.size, int(numbers.max()) + 1)
                return
        self.encode(column)

    def encode(self, column: Any) -> Any:
        """See `RowNumbers.encode`."""
        numbers = self._coded()
        if not ids.is_text(str(column.dtype)):
            return numbers.encode(column.to_numpy())
        if self._texts is None:
            from gpu_init.kernels.ids import Texts

            self._texts = Texts()
        return -1 - self._texts.encode(*_bytes(column))

    def settle(self, resolve: Resolve) -> None:
        """See `RowNumbers.settle`."""
        import pandas as pd

        if self._numbers is None:
            counts = self._table[1 : self.size + 1]
            if counts.all():
                return
            found = np.flatnonzero(counts)
            rows, self.size, self.ids = resolve(pd.Series(found))
            self._degrees = rows, counts[found]
            counts[found] = rows
            self._rows = counts
            return
        known, counts = self._numbers.known()
        if self._texts is None:
            self._rows, self.size, self.ids = resolve(pd.Series(known))
        else:
            starts, data, text_counts = self._texts.known()
            every = _texts(starts, data)
            places: Any = slice(None)
            if len(known):  # what is a number in one batch may be text in another
                places, every = pd.concat([pd.Series(known).astype("str"), every]).factorize()
            rows, self.size, self.ids = resolve(pd.Series(every))
            rows = rows[places]
            self._rows = np.concatenate([rows[: len(known)], rows[len(known) :][::-1]])
            counts = np.concatenate([counts, text_counts[::-1]])
        self._degrees = self._rows, counts

    def starts(self) -> Any:
        """See `RowNumbers.starts`."""
        if self._rows is None:
            starts = self._table[: self.size + 1]
        else:
            starts = np.zeros(self.size + 1, np.int64)
            np.add.at(starts[1:], *self._degrees)
            self._degrees = None
        return np.cumsum(starts, out=starts)

    def rows(self, column: Any) -> Any:
        """See `RowNumbers.rows`. Ids that were not counted get any row: the file changed, which is seen later."""
        if ids.is_text(str(column.dtype)):
            assert self._texts is not None
            return self._rows[-1 - self._texts.find(*_bytes(column))]
        numbers = column.to_numpy()
        if self._rows is None:
            return numbers
        codes = numbers if self._numbers is None else self._numbers.find(numbers)
        return self._rows.take(codes, mode="clip")

    def rows_of_codes(self, codes: Any) -> Any:
        """See `RowNumbers.rows_of_codes`."""
        return self._rows[codes]

    def _coded(self) -> Numbers:
        """Codes instead of the table, whose ids take the first of them."""
        if self._numbers is None:
            from gpu_init.kernels.ids import Numbers

            self._numbers = Numbers()
            found = np.flatnonzero(self._table[1 : self.size + 1])
            self._numbers.encode(found)
            self._numbers.known()[1][:] = self._table[1:][found]
            self._table = None
        return self._numbers


def _bytes(column: Any) -> tuple[Any, Any]:
    """Where each text (n,) starts among the bytes of all, and the last ends (n + 1,) int64; the bytes, UTF-8."""
    import pyarrow as pa

    texts = pa.array(column, pa.large_string())
    texts = texts.combine_chunks() if isinstance(texts, pa.ChunkedArray) else texts
    _, starts, data = texts.buffers()
    starts = np.frombuffer(starts, np.int64, len(texts) + 1, 8 * texts.offset)
    return starts, np.frombuffer(data or b"", np.uint8)


def _texts(starts: Any, data: Any) -> Any:
    """Texts as a pandas Series (n,), from what `_bytes` gives."""
    import pyarrow as pa

    buffers = [None, pa.py_buffer(starts), pa.py_buffer(data)]
    return pa.Array.from_buffers(pa.large_string(), len(starts) - 1, buffers).to_pandas()
