"""R from batches of interactions, on the CPU: a counting sort that works in the memory of R itself.

One thread sorts each row, so the result does not depend on the number of threads.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from gpu_init.errors import ResourceError
from gpu_init.kernels.compiled import float32, int32, int64, kernel, read_only, reads, writes
from gpu_init.kernels.csr import Csr
from gpu_init.kernels.threads import in_order

_PARTS = 64  # The rows are split into so many parts, to spread long rows over the threads.
_HELD = 1 << 21  # So many interactions are collected before they are written to R.
_GROUP_BITS = 9  # Before that they are sorted into 2^9 groups of neighbouring rows.
_NO_BITS, _NO_WEIGHTS = np.empty(0, np.int32), np.empty(0, np.float32)

_INTERACTIONS = (reads(int64), reads(int32), reads(float32))
_HELD_ARRAYS = (writes(int64), writes(int32), writes(float32))


@kernel(*_INTERACTIONS, int64, writes(int64), *_HELD_ARRAYS, writes(int64), writes(int32), writes(float32))
def _fill(  # type: ignore[no-untyped-def]
    rows, columns, values, shift, places, own_rows, own_columns, own_values, cursor, indices, weights
):
    """Write each interaction at its row's cursor.

    Before that they are sorted into groups of neighbouring rows, whose numbers differ in the last ``shift`` bits only,
    because writes to distant places in memory are slow.
    """
    places[:] = 0
    for k in range(rows.size):
        places[rows[k] >> shift] += 1
    place = 0
    for group in range(places.size):
        place, places[group] = place + places[group], place
    for k in range(rows.size):
        place = places[rows[k] >> shift]
        own_rows[place], own_columns[place] = rows[k], columns[k]
        if values.size > 0:
            own_values[place] = values[k]
        places[rows[k] >> shift] = place + 1
    for k in range(rows.size):
        at = cursor[own_rows[k]]
        if at < indices.size:  # otherwise the file has changed since its rows were counted; the caller notices later
            indices[at] = own_columns[k]
            if values.size > 0:
                weights[at] = own_values[k]
            cursor[own_rows[k]] = at + 1


@kernel(reads(int64), writes(int32), writes(int32))
def _sort_rows(indptr, indices, bits):  # type: ignore[no-untyped-def]
    """Sort rows by item, then by weight; returns how many interactions repeat an item or have a weight of 0.

    ``bits`` holds the bit patterns of the weights as whole numbers, which have the same order since no weight is
    negative; it is empty if all weights are 1.
    """
    extra = 0
    keys = np.empty(0, np.int64)
    for row in range(indptr.size - 1):
        first, count = indptr[row], indptr[row + 1] - indptr[row]
        if keys.size < count:
            keys = np.empty(2 * count, np.int64)
        is_sorted = True
        for k in range(count):
            keys[k] = np.int64(indices[first + k]) << 32
            if bits.size > 0:
                keys[k] |= np.int64(bits[first + k]) & 0x7FFFFFFF  # without the sign of -0.0
            is_sorted &= k == 0 or keys[k - 1] <= keys[k]
        if not is_sorted:
            gap = 1  # Shell's sort is an insertion sort for short rows, and never slow for long ones
            while gap < count // 3:
                gap = 3 * gap + 1
            while gap > 0:
                for k in range(gap, count):
                    key, at = keys[k], k
                    while at >= gap and keys[at - gap] > key:
                        keys[at] = keys[at - gap]
                        at -= gap
                    keys[at] = key
                gap //= 3
            for k in range(count):
                indices[first + k] = np.int32(keys[k] >> 32)
                if bits.size > 0:
                    bits[first + k] = np.int32(keys[k] & 0x7FFFFFFF)
        for k in range(count):
            if (k > 0 and indices[first + k] == indices[first + k - 1]) or (bits.size > 0 and bits[first + k] == 0):
                extra += 1
    return extra


@kernel(writes(int64), writes(int32), reads(float32), writes(float32))
def _merge_rows(indptr, indices, weights, merged):  # type: ignore[no-untyped-def]
    """Merge the interactions of an item in each sorted row, in place; ``merged`` gets their weights, summed in float64.

    Without ``weights`` each interaction weighs 1. Items whose sum is 0 are dropped.
    """
    write, first = 0, indptr[0]
    for row in range(indptr.size - 1):
        read, last = first, indptr[row + 1]
        while read < last:
            item, total = indices[read], np.float64(0.0)
            while read < last and indices[read] == item:
                total += weights[read] if weights.size > 0 else np.float32(1.0)
                read += 1
            if total > 0.0:
                indices[write], merged[write] = item, total
                write += 1
        indptr[row + 1], first = write, last


READING = (_fill, _sort_rows)
"""The kernels that most jobs use while they read, in this order."""

MERGING = _merge_rows
"""The kernel for interactions that are repeated."""


class Rows:
    """Builds R from batches of interactions, in little more memory than R takes.

    Parameters
    ----------
    starts : array, shape (U + 1,), int64
        Where each row starts, and where the last one ends. It becomes `indptr`.
    weighted : bool
        Whether interactions have weights.

    Raises
    ------
    ResourceError
        R does not fit in memory.
    """

    def __init__(self, starts: Any, weighted: bool) -> None:
        size = int(starts[-1])
        try:
            self._indices = np.empty(size, np.int32)
            self._weights = np.empty(size if weighted else 0, np.float32)
        except MemoryError:
            need = (8 if weighted else 4) * size + starts.nbytes
            raise ResourceError(
                f"{size} interactions need {need / 1e9:.1f} GB of memory, more than there is."
            ) from None
        self._weighted = weighted
        self._cursor = starts  # the next free place of each row
        self._shift = max(0, (len(starts) - 1).bit_length() - _GROUP_BITS)
        held = max(1, min(size, _HELD))
        self._held, self._spare = _room(held, weighted), _room(held, weighted)
        self._count = 0

    def add(self, rows: Any, columns: Any, weights: Any) -> None:
        """Add interactions: rows (n,) int64, columns (n,), and weights (n,) or None.

        Over all calls each row must come as often as ``starts`` says. Interactions beyond that are left out, and so is
        a call with rows outside R.
        """
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self._cursor) - 1):
            return
        done = 0
        while done < len(rows):
            take = min(len(rows) - done, len(self._held[0]) - self._count)
            here = slice(self._count, self._count + take)
            for held, given in zip(self._held, (rows, columns, weights), strict=True):
                if len(held):
                    held[here] = given[done : done + take]
            self._count += take
            done += take
            if self._count == len(self._held[0]):
                self._fill()

    def _fill(self) -> None:
        """Write the collected interactions to their rows."""
        held = [read_only(array[: self._count], array.dtype) for array in self._held]
        places = np.empty(((len(self._cursor) - 1) >> self._shift) + 1, np.int64)
        _fill(*held, self._shift, places, *self._spare, self._cursor, self._indices, self._weights)
        self._count = 0

    def finish(self) -> Csr:
        """R with rows sorted by item, duplicates summed in float64 in order of weight, and no zeros."""
        self._fill()
        del self._held, self._spare
        indptr, indices, weights = self._cursor, self._indices, self._weights
        indptr[1:] = indptr[:-1]  # each cursor has reached the start of the next row
        indptr[0] = 0
        bits = weights.view(np.int32) if self._weighted else _NO_BITS

        def sort(part: slice) -> Any:
            return _sort_rows(read_only(indptr[part.start : part.stop + 1], np.int64), indices, bits)

        extra = sum(in_order(sort, _parts(indptr)))
        if extra and self._weighted:
            _merge_rows(indptr, indices, read_only(weights, np.float32), weights)
        elif extra:
            weights = np.empty(len(indices) - extra, np.float32)
            _merge_rows(indptr, indices, read_only(_NO_WEIGHTS, np.float32), weights)
        indices.resize(int(indptr[-1]), refcheck=False)
        if (weights[: len(indices)] == 1).all() if self._weighted else not extra:
            return Csr(indptr, indices, None)
        weights.resize(len(indices), refcheck=False)
        return Csr(indptr, indices, weights)


def _room(size: int, weighted: bool) -> tuple[Any, Any, Any]:
    """Empty arrays for the rows, columns and weights of so many interactions."""
    return np.empty(size, np.int64), np.empty(size, np.int32), np.empty(size if weighted else 0, np.float32)


def _parts(starts: Any) -> Any:
    """Split the rows into ranges with about equal numbers of interactions."""
    bounds = np.searchsorted(starts, np.linspace(0, int(starts[-1]), _PARTS + 1).astype(np.int64))
    bounds[0], bounds[-1] = 0, len(starts) - 1
    return (slice(int(start), int(stop)) for start, stop in itertools.pairwise(bounds) if start < stop)
