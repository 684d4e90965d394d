"""From ids to rows: which row of R belongs to the id of a user, and which column to the id of an item."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_init import ids
from gpu_init.errors import InputError

if TYPE_CHECKING:
    from gpu_init.kernels.ids import Numbers, Texts

Resolve = Callable[[Any], tuple[Any, int, Any]]  # It takes distinct ids and returns what `user_axis` returns.


@dataclass(frozen=True)
class ItemAxis:
    """How item ids are mapped to columns of R.

    Attributes
    ----------
    rows : int or None
        Number of rows of the features, if item ids are their row numbers.
    known : sequence of pandas Series
        If ``rows`` is None: the item ids of each modality's features. The columns of R are then these ids and the ids
        of the interactions, sorted.
    """

    rows: int | None
    known: Sequence[Any] = ()


def check_range(column: Any, count: int, place: str, row: Callable[[int], str], what: str, kind: str) -> None:
    """Refuse ids that are not row numbers, which are whole numbers in [0, count).

    Raises
    ------
    InputError
        The message names the first such row and its id.
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
    """Return the rows of users, given their distinct ids.

    Parameters
    ----------
    found : pandas Series, shape (m,)
        Distinct user ids of the interactions, int64 or text.
    place : str
        Name of the interactions in an error.
    users : pandas Series, shape (U,), or None
        Ids of the rows, in order, if they are given.

    Returns
    -------
    rows : numpy array, shape (m,), int64
        Row of each of ``found``.
    size : int
        U.
    ids : pandas Series, shape (U,), or None
        Ids of the rows, sorted unless they are given; None if the row numbers are the ids.

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
    """Return the columns of items, given their distinct ids. Arguments and results are as in `user_axis`.

    Raises
    ------
    InputError
        None of the items has features.
    """
    import pandas as pd

    every = ids.same_kind([found, *axis.known])
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
    """Return the row of each id of ``found`` in ``axis_ids``; both are pandas Series.

    Returns
    -------
    numpy array, shape (n,), int64

    Raises
    ------
    InputError
        An id is not in ``axis_ids``.
    """
    rows, outside = _positions(found, axis_ids)
    if outside is not None:
        raise InputError(f"item {ids.shown(outside)} of the features is not a row of the items.")
    return rows


def _positions(found: Any, axis_ids: Any) -> tuple[Any, Any]:
    """Return the row of each id, -1 for an id without a row, and the first such id or None."""
    import pandas as pd

    found, axis_ids = ids.same_kind([found, axis_ids])
    rows = pd.Index(axis_ids).get_indexer(pd.Index(found)).astype(np.int64)
    absent = np.flatnonzero(rows < 0)
    return rows, found.iloc[absent[:1]].tolist()[0] if len(absent) else None


# The two classes below are axes whose rows are counted, by compiled kernels, while ids are read. `count` or `encode`
# takes each batch; when all ids are known, `settle` numbers the rows; then the other methods can be called.


class RowNumbers:
    """An axis of which the row numbers are the ids.

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
        """Count the interactions of each id in a batch (n,)."""
        from gpu_init.kernels.ids import count

        count(column.to_numpy(), self._starts[1:])

    def encode(self, column: Any) -> Any:
        """Count a batch of ids (n,), and return codes of them (n,) for `rows_of_codes`."""
        self.count(column)
        numbers = column.to_numpy()
        return numbers if self.size > 2**31 else numbers.astype(np.int32)

    def settle(self, _: Resolve) -> None:
        """Number the rows. Set ``size``, and ``ids`` unless the row numbers are the ids."""

    def starts(self) -> Any:
        """Return the index pointer of R, (size + 1,) int64: the running sum of the counts, from 0."""
        return np.cumsum(self._starts, out=self._starts)

    def rows(self, column: Any) -> Any:
        """Return the rows (n,) int64 of ids (n,) that were counted."""
        return column.to_numpy()

    def rows_of_codes(self, codes: Any) -> Any:
        """Return the rows (n,) int64 of codes (n,) from `encode`."""
        return codes.astype(np.int64)


class Codes:
    """An axis with ids of any kind.

    Codes follow the order in which ids appear first: 0, 1, ... for whole numbers, and -1, -2, ... for texts.

    Parameters
    ----------
    dense : int
        While all ids are whole numbers in [0, dense) and `encode` is not called, ids are counted in an array with one
        element per id, which is faster than to give them codes.
    """

    def __init__(self, dense: int) -> None:
        self.size = 0
        self.ids: Any = None
        # The count of id n is element n + 1. The system allots memory only for the pages that ids touch.
        self._table: Any = np.zeros(dense + 1, np.int64)
        self._numbers: Numbers | None = None  # It replaces the table when codes are needed.
        self._texts: Texts | None = None
        self._rows: Any = None  # The row of each id of the table, or of each code; None if ids are row numbers.
        self._starts: Any = None  # The index pointer of R before the counts are added up.

    def count(self, column: Any) -> None:
        if self._numbers is None and not ids.is_text(str(column.dtype)):
            numbers = column.to_numpy()
            if numbers.min() >= 0 and numbers.max() < len(self._table) - 1:
                from gpu_init.kernels.ids import count

                count(numbers, self._table[1:])
                self.size = max(self.size, int(numbers.max()) + 1)
                return
        self.encode(column)

    def encode(self, column: Any) -> Any:
        numbers = self._number_codes()
        if not ids.is_text(str(column.dtype)):
            return numbers.encode(column.to_numpy())
        if self._texts is None:
            from gpu_init.kernels.ids import Texts

            self._texts = Texts()
        return -1 - self._texts.encode(*_bytes(column))

    def settle(self, resolve: Resolve) -> None:
        import pandas as pd

        if self._numbers is None:
            counts = self._table[1 : self.size + 1]
            if counts.all():
                self._starts = self._table[: self.size + 1]
                return
            found = np.flatnonzero(counts)
            rows, self.size, self.ids = resolve(pd.Series(found))
            self._set_counts(rows, counts[found])
            counts[found] = rows
            self._rows = counts
            return
        known, counts = self._numbers.known()
        if self._texts is None:
            self._rows, self.size, self.ids = resolve(pd.Series(known))
        else:
            offsets, data, text_counts = self._texts.known()
            every = _texts(offsets, data)
            places: Any = slice(None)
            if len(known):  # An id that is a number in one batch may be a text in another.
                places, every = pd.concat([pd.Series(known).astype("str"), every]).factorize()
            rows, self.size, self.ids = resolve(pd.Series(every))
            rows = rows[places]
            self._rows = np.concatenate([rows[: len(known)], rows[len(known) :][::-1]])
            counts = np.concatenate([counts, text_counts[::-1]])
        self._set_counts(self._rows, counts)

    def _set_counts(self, rows: Any, counts: Any) -> None:
        self._starts = np.zeros(self.size + 1, np.int64)
        np.add.at(self._starts[1:], rows, counts)

    def starts(self) -> Any:
        starts, self._starts = self._starts, None
        return np.cumsum(starts, out=starts)

    def rows(self, column: Any) -> Any:
        """Return the rows (n,) int64 of ids (n,) that were counted.

        An id that was not counted gets an arbitrary row: then the file has changed, which its reader notices later.
        """
        if ids.is_text(str(column.dtype)):
            assert self._texts is not None
            return self._rows[-1 - self._texts.find(*_bytes(column))]
        numbers = column.to_numpy()
        if self._rows is None:
            return numbers
        codes = numbers if self._numbers is None else self._numbers.find(numbers)
        return self._rows.take(codes, mode="clip")

    def rows_of_codes(self, codes: Any) -> Any:
        return self._rows[codes]

    def _number_codes(self) -> Numbers:
        """Return the codes of whole numbers. The first call replaces the table, whose ids get the first codes."""
        if self._numbers is None:
            from gpu_init.kernels.ids import Numbers

            self._numbers = Numbers()
            found = np.flatnonzero(self._table[1 : self.size + 1])
            self._numbers.encode(found)
            self._numbers.known()[1][:] = self._table[1:][found]
            self._table = None
        return self._numbers


def _bytes(column: Any) -> tuple[Any, Any]:
    """Return the offsets (n + 1,) int64 of n texts among their bytes, and these bytes, (m,) uint8 of UTF-8."""
    import pyarrow as pa

    texts = pa.array(column, pa.large_string())
    texts = texts.combine_chunks() if isinstance(texts, pa.ChunkedArray) else texts
    _, starts, data = texts.buffers()
    starts = np.frombuffer(starts, np.int64, len(texts) + 1, 8 * texts.offset)
    return starts, np.frombuffer(data or b"", np.uint8)


def _texts(starts: Any, data: Any) -> Any:
    """Return texts as a pandas Series (n,), given what `_bytes` returns for them."""
    import pyarrow as pa

    buffers = [None, pa.py_buffer(starts), pa.py_buffer(data)]
    return pa.Array.from_buffers(pa.large_string(), len(starts) - 1, buffers).to_pandas()
