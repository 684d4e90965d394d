"""Ids to rows: what an id of a user or an item means, and which row of R, or column, it has.

The id rules of section 4 of the design.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import ids
from .errors import InputError, ResourceError

_MERGED = 1 << 20  # ids of batches that are brought together at a time, at least
_HASHED = 1 << 16  # texts that are hashed at a time: as Python's objects they take more memory
_MOST_CODES = 2**31 - 1

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


# Rows counted as the ids are read.


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
        np.add.at(self._starts[1:], column.to_numpy(), 1)

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
    """An axis of ids of any kind, in codes by order of appearance in each batch: numbers from 0 up, texts from -1 down.

    Parameters
    ----------
    dense : int
        As long as all ids are numbers from 0 to below this, and nobody asks for codes, a table counts them.
    """

    def __init__(self, dense: int) -> None:
        self.size = 0
        self.ids: Any = None
        self._table: Any = np.zeros(dense + 1, np.int64)  # memory is taken page by page, as ids fall there
        self._numbers, self._texts = _Distinct("int64"), _Distinct("large_string")
        self._rows: Any = None  # of each number of the table, or of each code
        self._starts: Any = None

    def fits_table(self, column: Any) -> bool:
        """Whether the table counts these ids."""
        if self._table is None or ids.is_text(str(column.dtype)):
            return False
        numbers = column.to_numpy()
        return bool(numbers.min() >= 0 and numbers.max() < len(self._table) - 1)

    def count(self, column: Any) -> None:
        """See `RowNumbers.count`; texts too."""
        if self.fits_table(column):
            numbers = column.to_numpy()
            np.add.at(self._table[1:], numbers, 1)
            self.size = max(self.size, int(numbers.max()) + 1)
        else:
            self._without_table(column).add(column)

    def encode(self, column: Any) -> Any:
        """See `RowNumbers.encode`."""
        codes = self._without_table(column).encode(column)
        return -1 - codes if ids.is_text(str(column.dtype)) else codes

    def settle(self, resolve: Resolve) -> None:
        """See `RowNumbers.settle`."""
        import pandas as pd

        if self._table is not None:
            counts = self._table[1 : self.size + 1]
            self._starts = self._table[: self.size + 1]
            if not counts.all():
                found = np.flatnonzero(counts)
                rows, self.size, self.ids = resolve(pd.Series(found))
                self._starts = np.zeros(self.size + 1, np.int64)
                self._starts[1:][rows] = counts[found]
                counts[found] = rows
                self._rows = counts
            return
        numbers, texts = self._numbers.settle(), self._texts.settle()
        every: list[Any] = [pd.Series(numbers.to_numpy())] if len(numbers) else []
        if len(texts):  # then what is a number in one batch may be text in another
            every = [*(one.astype("str") for one in every), texts.to_pandas()]
        places, distinct = pd.concat(every, ignore_index=True).factorize()
        rows, self.size, self.ids = resolve(pd.Series(distinct))
        rows = rows[places]
        degrees = np.concatenate([self._numbers.degrees, self._texts.degrees])
        self._starts = np.zeros(self.size + 1, np.int64)
        np.add.at(self._starts[1:], rows, degrees)
        of_texts = self._texts.place(rows[len(numbers) :])
        self._rows = np.concatenate([self._numbers.place(rows[: len(numbers)]), of_texts[::-1]])

    def starts(self) -> Any:
        """See `RowNumbers.starts`."""
        return np.cumsum(self._starts, out=self._starts)

    def rows(self, column: Any) -> Any:
        """See `RowNumbers.rows`. Ids that were not counted get any row: the file changed, which is seen later."""
        if self._table is None:
            return (self._texts if ids.is_text(str(column.dtype)) else self._numbers).rows(column)
        numbers = column.to_numpy()
        return numbers if self._rows is None else self._rows.take(numbers, mode="clip")

    def rows_of_codes(self, codes: Any) -> Any:
        """See `RowNumbers.rows_of_codes`."""
        return self._rows[codes]

    def _without_table(self, column: Any) -> _Distinct:
        """Where these ids are kept once the table is given up, whose ids go there as well."""
        if self._table is not None:
            found = np.flatnonzero(self._table[1 : self.size + 1])
            if len(found):
                self._numbers.know(found, self._table[1:][found])
            self._table = None
        return self._texts if ids.is_text(str(column.dtype)) else self._numbers


class _Distinct:
    """Distinct ids of one type, how often each came, and which of them a code stands for.

    pyarrow encodes each batch; what it finds is brought together when there is much of it.
    """

    def __init__(self, kind: str) -> None:
        import pyarrow as pa

        self._kind = pa.type_for_alias(kind)
        self._known = pa.array([], self._kind)
        self.degrees = np.empty(0, np.int64)  # of the known ids
        self._found: list[tuple[Any, Any, bool]] = []  # of batches: ids, how often each came, whether they have codes
        self._waiting = self._codes = 0  # ids that were found, and codes that were given
        self._places: list[Any] = []  # number of the known id that each code stands for
        self._rows: Any = None
        self._index: Any = None
        self._salt = 0

    def encode(self, column: Any) -> Any:
        """Count ids and give codes (n,) int32: each batch has some of its own."""
        first = self._codes
        codes = self.add(column, coded=True)
        if self._codes > _MOST_CODES:
            raise ResourceError(f"more than {_MOST_CODES} ids to keep in memory; only row numbers may be more.")
        return codes + np.int32(first)

    def add(self, column: Any, coded: bool = False) -> Any:
        """Count ids; gives the place of each among the batch's own (n,) int32."""
        import pyarrow as pa

        batch = pa.array(column, self._kind)
        batch = batch.combine_chunks() if isinstance(batch, pa.ChunkedArray) else batch
        encoded = batch.dictionary_encode()
        places = encoded.indices.to_numpy()
        counts = np.bincount(places, minlength=len(encoded.dictionary)).astype(np.int32)
        self._keep(encoded.dictionary, counts, coded)
        return places

    def know(self, numbers: Any, counts: Any) -> None:
        """Take ids that were counted elsewhere, and how often each came."""
        import pyarrow as pa

        self._keep(pa.array(numbers, self._kind), counts, coded=False)

    def _keep(self, distinct: Any, counts: Any, coded: bool) -> None:
        self._found.append((distinct, counts, coded))
        self._waiting += len(distinct)
        self._codes += len(distinct) if coded else 0
        if self._waiting > max(_MERGED, len(self._known)):
            self.settle()

    def settle(self) -> Any:
        """Bring together what was found so far, and give the distinct ids (m,), a pyarrow array."""
        import pyarrow as pa

        before = len(self._known)
        merged = pa.chunked_array([self._known, *(one for one, _, _ in self._found)], self._kind)
        encoded = merged.combine_chunks().dictionary_encode()
        self._known, places = encoded.dictionary, encoded.indices.to_numpy()[before:]
        degrees = np.zeros(len(self._known), np.int64)
        degrees[:before] = self.degrees
        for distinct, counts, coded in self._found:
            own, places = places[: len(distinct)], places[len(distinct) :]
            degrees[own] += counts
            if coded:
                self._places.append(own)
        self.degrees, self._found, self._waiting = degrees, [], 0
        pa.default_memory_pool().release_unused()
        return self._known

    def place(self, rows: Any) -> Any:
        """Row (c,) of each code, from the rows (m,) of the distinct ids."""
        self._rows = rows.astype(np.int32) if len(rows) and rows.max() <= _MOST_CODES else rows
        places, self._places = self._places, []
        return np.concatenate([self._rows[own] for own in places] or [self._rows[:0]])

    def rows(self, column: Any) -> Any:
        """Rows (n,) int64 of ids that are looked up once more; any where they are not known."""
        import pandas as pd
        import pyarrow as pa

        while self._index is None:
            index = pd.Index(self._keys(self._known))
            if index.is_unique:
                self._index = index
            else:  # two texts have the same hash: they do not with another salt
                self._salt += 1
        found = self._index.get_indexer(pd.Index(self._keys(pa.array(column, self._kind))))
        return self._rows.take(found, mode="clip")

    def _keys(self, found: Any) -> Any:
        """Numbers (n,) that tell ids of a pyarrow array apart: they themselves, or hashes of texts."""
        import pandas as pd

        if found.type == "int64":
            return found.to_numpy(zero_copy_only=False)
        parts = (found.slice(first, _HASHED).to_numpy(zero_copy_only=False) for first in range(0, len(found), _HASHED))
        hashes = [pd.util.hash_array(part, hash_key=f"{self._salt:016d}", categorize=False) for part in parts]
        return np.concatenate([*hashes, np.empty(0, np.uint64)])
