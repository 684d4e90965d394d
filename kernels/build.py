"""R from batches of interactions, on the CPU: a counting sort that works in the memory of R itself.

`gpu_init.interactions.build` is the plain reference. What is written does not depend on the number of threads:
each row is sorted and summed by one of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from gpu_init.errors import ResourceError

from .compiled import compiled, compiled_serial, inner, inner_allocating, inner_large
from .csr import Csr
from .texts import NumbaTexts

_PARTS = 256  # of the rows, to spread uneven rows over the threads
_STEP = 1 << 16  # numbers coded at a time: the table has room for so many new ones
_HELD = 1 << 21  # interactions put into R at a time
_GROUP_BITS = 9  # of the groups of neighbouring rows that they are sorted into first
_SHORT = 16  # rows up to this length are sorted by insertion
_DIGIT_BITS = 6
_DIGIT = (1 << _DIGIT_BITS) - 1
_MOST_CODES = 2**31 - 1
_NO_WEIGHTS = np.empty(0, np.float32)
_NO_SLOTS = np.empty(0, np.int32)


@compiled_serial
def _count(rows, degrees):  # type: ignore[no-untyped-def]
    for k in range(rows.size):
        degrees[rows[k]] += 1


# A hash table of numbers: open addressing, at most half full; slots hold codes, -1 where empty.


@inner
def _slot(number, slots):  # type: ignore[no-untyped-def]
    mixed = np.uint64(number) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(32)
    return np.int64(mixed & np.uint64(slots.size - 1))


@compiled_serial
def _encode(numbers, known, counts, slots, used, codes):  # type: ignore[no-untyped-def]
    for k in range(numbers.size):
        number = numbers[k]
        slot = _slot(number, slots)
        while slots[slot] >= 0 and known[slots[slot]] != number:
            slot = (slot + 1) & (slots.size - 1)
        if slots[slot] < 0:
            slots[slot] = used
            known[used] = number
            used += 1
        codes[k] = slots[slot]
        counts[slots[slot]] += 1
    return used


@compiled_serial
def _enter(known, used, slots):  # type: ignore[no-untyped-def]
    for code in range(used):
        slot = _slot(known[code], slots)
        while slots[slot] >= 0:
            slot = (slot + 1) & (slots.size - 1)
        slots[slot] = code


@compiled
def _find(numbers, known, slots, codes):  # type: ignore[no-untyped-def]
    for k in prange(numbers.size):
        slot = _slot(numbers[k], slots)
        while slots[slot] >= 0 and known[slots[slot]] != numbers[k]:
            slot = (slot + 1) & (slots.size - 1)
        codes[k] = slots[slot]


class NumbaNumbers:
    """See `gpu_init.kernels.Numbers`."""

    def __init__(self) -> None:
        self._used = 0
        self._known = np.empty(_STEP, np.int64)
        self._counts = np.zeros(_STEP, np.int64)
        self._slots = np.full(2 * _STEP, -1, np.int32)

    def encode(self, numbers: Any) -> Any:
        """See `Numbers.encode`."""
        codes = np.empty(len(numbers), np.int32)
        for first in range(0, len(numbers), _STEP):
            part = slice(first, first + _STEP)
            self._make_room()
            self._used = _encode(numbers[part], self._known, self._counts, self._slots, self._used, codes[part])
        return codes

    def find(self, numbers: Any) -> Any:
        """See `Numbers.find`."""
        codes = np.empty(len(numbers), np.int32)
        _find(numbers, self._known, self._slots, codes)
        return codes

    def known(self) -> tuple[Any, Any]:
        """See `Numbers.known`."""
        return self._known[: self._used], self._counts[: self._used]

    def _make_room(self) -> None:
        wanted = self._used + _STEP
        if wanted > _MOST_CODES:
            raise ResourceError(f"more than {_MOST_CODES - _STEP} distinct ids; only row numbers may be more.")
        if wanted > len(self._known):
            more = max(wanted, self._used + self._used // 2) - self._used
            self._known = np.concatenate([self._known[: self._used], np.empty(more, np.int64)])
            self._counts = np.concatenate([self._counts[: self._used], np.zeros(more, np.int64)])
        if 2 * wanted > len(self._slots):
            size = 2 * len(self._slots)
            self._slots = _NO_SLOTS  # before the larger one is made
            self._slots = np.full(size, -1, np.int32)
            _enter(self._known, self._used, self._slots)


# Rows.


@compiled_serial
def _fill(rows, columns, values, cursor, indices, weights):  # type: ignore[no-untyped-def]
    """Write each interaction at its row's cursor: threads would wait for the same memory."""
    for k in range(rows.size):
        at = cursor[rows[k]]
        if at < indices.size:
            indices[at] = columns[k]
            if weights.size > 0:
                weights[at] = values[k]
            cursor[rows[k]] = at + 1


@compiled_serial
def _gather(rows, columns, values, shift, places, rows_to, columns_to, values_to):  # type: ignore[no-untyped-def]
    """Copy interactions so that those of neighbouring rows, equal but for the last ``shift`` bits, lie together."""
    for group in range(places.size):
        places[group] = 0
    for k in range(rows.size):
        places[rows[k] >> shift] += 1
    place = 0
    for group in range(places.size):
        place, places[group] = place + places[group], place
    for k in range(rows.size):
        place = places[rows[k] >> shift]
        rows_to[place] = rows[k]
        columns_to[place] = columns[k]
        if values.size > 0:
            values_to[place] = values[k]
        places[rows[k] >> shift] = place + 1


@inner_large
def _sort_short(indices, weights, first, last):  # type: ignore[no-untyped-def]
    """Sort interactions by item in place, by insertion."""
    for k in range(first + 1, last):
        item = indices[k]
        weight = np.float32(1)
        if weights is not None:
            weight = weights[k]
        at = k
        while at > first and indices[at - 1] > item:
            indices[at] = indices[at - 1]
            if weights is not None:
                weights[at] = weights[at - 1]
            at -= 1
        indices[at] = item
        if weights is not None:
            weights[at] = weight


@inner_large
def _move_by_digit(  # type: ignore[no-untyped-def]
    shift, items, weights, first, last, items_to, weights_to, first_to, places
):
    """Copy interactions in order of a digit of their item, those of one digit in the order they have."""
    for digit in range(places.size):
        places[digit] = 0
    for k in range(first, last):
        places[(items[k] >> shift) & _DIGIT] += 1
    place = first_to
    for digit in range(places.size):
        place, places[digit] = place + places[digit], place
    for k in range(first, last):
        digit = (items[k] >> shift) & _DIGIT
        items_to[places[digit]] = items[k]
        if weights is not None:
            weights_to[places[digit]] = weights[k]
        places[digit] += 1


@inner_allocating
def _sort(indices, weights, first, last, spare_items, spare_weights):  # type: ignore[no-untyped-def]
    """Sort one row by item, then by weight: by insertion, or by the items' digits, the least first."""
    if last - first <= _SHORT:
        _sort_short(indices, weights, first, last)
    else:
        bits = 0
        for k in range(first, last):
            bits |= indices[k]
        places = np.empty(_DIGIT + 1, np.int64)
        zero = shift = np.int64(0)  # a constant would be compiled for, too
        while bits >> shift:  # there and back: two digits
            _move_by_digit(shift, indices, weights, first, last, spare_items, spare_weights, zero, places)
            shift += _DIGIT_BITS
            _move_by_digit(shift, spare_items, spare_weights, zero, last - first, indices, weights, first, places)
            shift += _DIGIT_BITS
    if weights is not None:
        start = first
        for k in range(first + 1, last + 1):
            if k == last or indices[k] != indices[start]:
                if k - start > 1:
                    weights[start:k].sort()
                start = k


@inner_large
def _longest(indptr, first, last):  # type: ignore[no-untyped-def]
    longest = 0
    for row in range(first, last):
        longest = max(longest, indptr[row + 1] - indptr[row])
    return longest


@inner_large
def _is_sorted(indices, weights, first, last):  # type: ignore[no-untyped-def]
    for k in range(first + 1, last):
        if indices[k] <= indices[k - 1]:
            if indices[k] < indices[k - 1]:
                return False
            if weights is not None and weights[k] < weights[k - 1]:
                return False
    return True


@compiled
def _sort_rows(bounds, indptr, indices):  # type: ignore[no-untyped-def]
    """Sort the rows of interactions that weigh 1; returns how many repeat the one before."""
    repeats = 0
    for part in prange(bounds.size - 1):
        spare = np.empty(_longest(indptr, bounds[part], bounds[part + 1]), np.int32)
        for row in range(bounds[part], bounds[part + 1]):
            first, last = indptr[row], indptr[row + 1]
            if not _is_sorted(indices, None, first, last):
                _sort(indices, None, first, last, spare, None)
            for k in range(first + 1, last):
                repeats += indices[k] == indices[k - 1]
    return repeats


@compiled
def _sum_rows(bounds, indptr, indices, weights):  # type: ignore[no-untyped-def]
    """Sort the rows and sum duplicates; what is left over at a row's end is marked -1.

    Returns the number of those left over and the number of weights that are not 1.
    """
    left_over = 0
    uneven = 0
    for part in prange(bounds.size - 1):
        longest = _longest(indptr, bounds[part], bounds[part + 1])
        spare_items, spare_weights = np.empty(longest, np.int32), np.empty(longest, np.float32)
        for row in range(bounds[part], bounds[part + 1]):
            first, last = indptr[row], indptr[row + 1]
            if not _is_sorted(indices, weights, first, last):
                _sort(indices, weights, first, last, spare_items, spare_weights)
            write = first
            read = first
            while read < last:
                item = indices[read]
                total = 0.0
                while read < last and indices[read] == item:
                    total += weights[read]
                    read += 1
                if total > 0.0:
                    indices[write] = item
                    weights[write] = total
                    uneven += weights[write] != 1
                    write += 1
            left_over += last - write
            for at in range(write, last):
                indices[at] = -1
    return left_over, uneven


@compiled_serial
def _drop_marked(indptr, indices, weights):  # type: ignore[no-untyped-def]
    """Close the gaps at the rows' ends, in place."""
    write = 0
    first = indptr[0]
    for row in range(indptr.size - 1):
        last = indptr[row + 1]
        for read in range(first, last):
            if indices[read] < 0:
                break
            indices[write] = indices[read]
            weights[write] = weights[read]
            write += 1
        indptr[row + 1] = write
        first = last


@compiled_serial
def _count_repeats(indptr, indices, weights):  # type: ignore[no-untyped-def]
    """Leave one of each item in sorted rows, in place, and how many there were in ``weights``."""
    write = 0
    first = indptr[0]
    for row in range(indptr.size - 1):
        last = indptr[row + 1]
        read = first
        while read < last:
            item = indices[read]
            run = read
            while read < last and indices[read] == item:
                read += 1
            indices[write] = item
            weights[write] = read - run
            write += 1
        indptr[row + 1] = write
        first = last


class NumbaRows:
    """See `gpu_init.kernels.Rows`."""

    def __init__(self, starts: Any, weighted: bool) -> None:
        size = int(starts[-1])
        try:
            self._indices = np.empty(size, np.int32)
            self._weights = np.empty(size, np.float32) if weighted else _NO_WEIGHTS
        except MemoryError:
            need = (8 if weighted else 4) * size + starts.nbytes
            raise ResourceError(
                f"{size} interactions need {need / 1e9:.1f} GB of memory, more than there is."
            ) from None
        self._weighted = weighted
        self._cursor = starts  # where each row goes on, until all is filled
        self._shift = max(0, (len(starts) - 1).bit_length() - _GROUP_BITS)
        held = max(1, min(size, _HELD))
        self._held, self._spare = _room(held, weighted), _room(held, weighted)
        self._count = 0

    def add(self, rows: Any, columns: Any, weights: Any) -> None:
        """See `Rows.add`."""
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
        """Put what is held where it belongs: neighbouring rows together, since memory far apart is slow."""
        held = [array[: self._count] for array in self._held]
        places = np.empty(((len(self._cursor) - 1) >> self._shift) + 1, np.int64)
        _gather(*held, self._shift, places, *self._spare)
        _fill(*(array[: self._count] for array in self._spare), self._cursor, self._indices, self._weights)
        self._count = 0

    def finish(self) -> Csr:
        """See `Rows.finish`."""
        self._fill()
        del self._held, self._spare
        indptr, indices, weights = self._cursor, self._indices, self._weights
        indptr[1:] = indptr[:-1]  # each cursor stands where the next row starts
        indptr[0] = 0
        bounds = _bounds(indptr, _PARTS)
        if self._weighted:
            left_over, uneven = _sum_rows(bounds, indptr, indices, weights)
            if left_over:
                _drop_marked(indptr, indices, weights)
        else:
            left_over = uneven = _sort_rows(bounds, indptr, indices)
            if left_over:
                weights = np.empty(len(indices) - left_over, np.float32)
                _count_repeats(indptr, indices, weights)
        indices.resize(int(indptr[-1]), refcheck=False)
        weights.resize(len(indices) if uneven else 0, refcheck=False)
        return Csr(indptr, indices, weights if uneven else None)


def _room(size: int, weighted: bool) -> tuple[Any, Any, Any]:
    """For so many interactions: rows, columns, weights."""
    return np.empty(size, np.int64), np.empty(size, np.int32), np.empty(size if weighted else 0, np.float32)


class NumbaBuilder:
    """See `gpu_init.kernels.Builder`."""

    def count(self, rows: Any, degrees: Any) -> None:
        """See `Builder.count`."""
        _count(rows, degrees)

    def numbers(self) -> NumbaNumbers:
        """See `Builder.numbers`."""
        return NumbaNumbers()

    def texts(self) -> NumbaTexts:
        """See `Builder.texts`."""
        return NumbaTexts()

    def rows(self, starts: Any, weighted: bool) -> NumbaRows:
        """See `Builder.rows`."""
        return NumbaRows(starts, weighted)


def _bounds(starts: Any, parts: int) -> Any:
    """Split the rows into ranges of about as many interactions."""
    bounds = np.searchsorted(starts, np.linspace(0, int(starts[-1]), parts + 1).astype(np.int64))
    bounds[0], bounds[-1] = 0, len(starts) - 1
    return bounds
