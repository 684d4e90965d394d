"""Hash tables on the CPU that give codes to distinct ids, numbers or texts, in order of appearance.

The tables are our own because no public function of pandas or pyarrow adds to a table batch by batch. When pyarrow
coded each batch and the codes were merged at the end, `benchmarks/reader.py` took 2.0 to 2.3 times as long.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu_init.errors import ResourceError
from gpu_init.kernels.compiled import int32, int64, kernel, read_only, reads, uint8, uint64, writes
from gpu_init.kernels.threads import cores, run

_STEP = 1 << 16  # Ids are coded so many at a time; a table of numbers has room for so many new ones.
_MOST_CODES = 2**31 - 1
_TOGETHER = 32  # The memory of so many texts is read at once.
_EMPTY = 0  # An empty slot of texts. Others hold the upper half of the hash, and in their lower half the code plus 1.


@kernel(reads(int64), writes(int64))
def _count(places, counts):  # type: ignore[no-untyped-def]
    for k in range(places.size):
        counts[places[k]] += 1


def count(places: Any, counts: Any) -> None:
    """Add 1 to ``counts`` (m,) int64 at each of ``places`` (n,), all within [0, m)."""
    _count(read_only(places, np.int64), counts)


# The next two kernels give codes to ids. With `adding`, unknown ids get new codes, from `used` on; without it their
# code is negative, and the table is only read. Both return the number of codes in use.


@kernel(reads(int64), writes(int64), writes(int32), int64, int64, writes(int32))
def _encode_numbers(numbers, known, slots, used, adding, codes):  # type: ignore[no-untyped-def]
    """Open addressing in a table that is at most half full; slots hold codes, -1 where empty."""
    mask = np.uint64(slots.size - 1)
    for k in range(numbers.size):
        number = numbers[k]
        mixed = np.uint64(number) * np.uint64(0x9E3779B97F4A7C15)
        slot = (mixed ^ (mixed >> np.uint64(32))) & mask
        while slots[slot] >= 0 and known[slots[slot]] != number:
            slot = (slot + np.uint64(1)) & mask
        if slots[slot] < 0 and adding:
            slots[slot] = used
            known[used] = number
            used += 1
        codes[k] = slots[slot]
    return used


@kernel(reads(int64), reads(uint8), writes(uint64), writes(int64), writes(uint8), int64, int64, writes(int32))
def _encode_texts(starts, data, slots, ends, known, used, adding, codes):  # type: ignore[no-untyped-def]
    """Encode texts whose code is negative. Text k is the bytes ``starts[k]`` to ``starts[k + 1]`` of ``data``.

    ``ends`` gives the bytes of the known texts in the same way. The hash takes eight bytes at a time, as FNV-1a takes
    one; its upper half tells apart most texts that share a slot.
    """
    mask, multiplier, half = np.uint64(slots.size - 1), np.uint64(0x9E3779B97F4A7C15), np.uint64(32)
    hashes, places = np.empty(_TOGETHER, np.uint64), np.empty(_TOGETHER, np.int64)
    touched = np.uint8(0)
    for begin in range(0, codes.size, _TOGETHER):
        end = min(begin + _TOGETHER, codes.size)
        for k in range(begin, end):
            first, last = starts[k], starts[k + 1]
            value, at = np.uint64(0xCBF29CE484222325) ^ np.uint64(last - first), first
            while at + 8 <= last:
                word = np.uint64(0)
                for byte in range(8):  # compiled to one load
                    word |= np.uint64(data[at + byte]) << np.uint64(8 * byte)
                value = (value ^ word) * multiplier
                value ^= value >> half
                at += 8
            while at < last:
                value = (value ^ np.uint64(data[at])) * np.uint64(0x100000001B3)
                at += 1
            value = (value ^ (value >> half)) * multiplier
            hashes[k - begin] = value ^ (value >> np.uint64(29))
        # These loops read what the search below needs, so that the memory reads of several texts overlap.
        for k in range(end - begin):
            places[k] = np.int64(slots[hashes[k] & mask] & np.uint64(0xFFFFFFFF))
        for k in range(end - begin):
            places[k] = ends[places[k]]
        for k in range(end - begin):
            touched |= known[max(places[k] - 1, 0)] if known.size > 0 else np.uint8(0)
        for k in range(begin, end):
            if codes[k] >= 0:
                continue
            first, last, value = starts[k], starts[k + 1], hashes[k - begin]
            slot, code = value & mask, np.int64(-1)
            while slots[slot] != _EMPTY:
                if slots[slot] >> half == value >> half:
                    found = np.int64(slots[slot] & np.uint64(0xFFFFFFFF)) - 1
                    start = ends[found]
                    same, at = ends[found + 1] - start == last - first, first
                    while same and at < last:
                        same = data[at] == known[start + at - first]
                        at += 1
                    if same:
                        code = found
                        break
                slot = (slot + np.uint64(1)) & mask
            if code < 0 and adding:
                code = used
                slots[slot] = ((value >> half) << half) | np.uint64(code + 1)
                for at in range(first, last):
                    known[ends[code] + at - first] = data[at]
                ends[code + 1] = ends[code] + last - first
                used += 1
            codes[k] = code
    hashes[0] = touched  # without this use the compiler would remove the reads
    return used


class Numbers:
    """Codes 0, 1, ... for distinct whole numbers in order of appearance, and the number of times each appeared."""

    def __init__(self) -> None:
        self._used = 0
        self._known = np.empty(_STEP, np.int64)
        self._counts = np.zeros(_STEP, np.int64)
        self._slots = np.full(2 * _STEP, -1, np.int32)

    def encode(self, numbers: Any) -> Any:
        """Codes (n,) int32 of ``numbers`` (n,) int64, which are counted; new numbers get new codes."""
        codes = np.empty(len(numbers), np.int32)
        for first in range(0, len(numbers), _STEP):
            part = slice(first, first + _STEP)
            self._make_room()
            own = read_only(numbers[part], np.int64)
            self._used = _encode_numbers(own, self._known, self._slots, self._used, 1, codes[part])
        count(codes, self._counts)
        return codes

    def find(self, numbers: Any) -> Any:
        """Codes (n,) int32 of ``numbers`` (n,) int64; -1 for unknown numbers."""
        numbers, codes = read_only(numbers, np.int64), np.empty(len(numbers), np.int32)

        def work(part: slice) -> None:
            _encode_numbers(numbers[part], self._known, self._slots, self._used, 0, codes[part])

        run(work, _shares(len(codes)))
        return codes

    def known(self) -> tuple[Any, Any]:
        """The numbers (m,) int64 in order of their codes, and their counts (m,) int64."""
        return self._known[: self._used], self._counts[: self._used]

    def _make_room(self) -> None:
        wanted = _require(self._used, _STEP)
        self._known = _grown(self._known, self._used, wanted)
        self._counts = _grown(self._counts, self._used, wanted)
        if 2 * wanted > len(self._slots):
            size = 2 * len(self._slots)
            self._slots = np.empty(0, np.int32)  # frees the memory before the larger table is made
            self._slots = np.full(size, -1, np.int32)
            known = read_only(
                self._known[: self._used].copy(), np.int64
            )  # a copy, because the kernel writes to the original
            _encode_numbers(known, self._known, self._slots, 0, 1, np.empty(self._used, np.int32))


class Texts:
    """Codes 0, 1, ... for distinct texts in order of appearance, and the number of times each appeared.

    n texts are given as the uint8 array of all their bytes, and ``starts`` (n + 1,) int64: text k is the bytes
    ``starts[k]`` to ``starts[k + 1]``.
    """

    def __init__(self) -> None:
        self._used = 0
        self._ends = np.zeros(1, np.int64)
        self._counts = np.zeros(0, np.int64)
        self._known = np.empty(0, np.uint8)
        self._slots = np.zeros(2 * _STEP, np.uint64)

    def encode(self, starts: Any, data: Any) -> Any:
        """Codes (n,) int32 of texts, which are counted; new texts get new codes."""
        codes = self.find(starts, data)
        unknown = codes < 0
        if unknown.any():
            self._make_room(int(unknown.sum()), int(np.diff(starts)[unknown].sum()))
            given = (read_only(starts, np.int64), read_only(data, np.uint8))
            self._used = _encode_texts(*given, self._slots, self._ends, self._known, self._used, 1, codes)
        count(codes, self._counts)
        return codes

    def find(self, starts: Any, data: Any) -> Any:
        """Codes (n,) int32 of texts, -1 for unknown texts; threads look them up in parallel."""
        starts, data = read_only(starts, np.int64), read_only(data, np.uint8)
        codes = np.full(len(starts) - 1, -1, np.int32)

        def work(part: slice) -> None:
            own = starts[part.start : part.stop + 1]
            _encode_texts(own, data, self._slots, self._ends, self._known, self._used, 0, codes[part])

        run(work, _shares(len(codes)))
        return codes

    def known(self) -> tuple[Any, Any, Any]:
        """``starts`` and bytes of the m texts in order of their codes, and their counts (m,) int64."""
        ends = self._ends[: self._used + 1]
        return ends, self._known[: ends[-1]], self._counts[: self._used]

    def _make_room(self, texts: int, size: int) -> None:
        wanted = _require(self._used, texts)
        self._ends = _grown(self._ends, self._used + 1, wanted + 1)
        self._counts = _grown(self._counts, self._used, wanted)
        self._known = _grown(self._known, int(self._ends[self._used]), int(self._ends[self._used]) + size)
        if 2 * wanted > len(self._slots):
            self._slots = np.empty(0, np.uint64)  # frees the memory before the larger table is made
            self._slots = np.zeros(2 << (2 * wanted - 1).bit_length(), np.uint64)
            ends, known = self._ends[: self._used + 1].copy(), self._known[: self._ends[self._used]].copy()
            given = (read_only(ends, np.int64), read_only(known, np.uint8))
            codes = np.full(self._used, -1, np.int32)
            _encode_texts(*given, self._slots, self._ends, self._known, 0, 1, codes)


CODING = (_count, _encode_numbers, _encode_texts)
"""The kernels for ids; row numbers need the first one only."""


def _require(used: int, more: int) -> int:
    """The number of codes after ``more`` new ones; an error where int32 cannot hold them."""
    if used + more > _MOST_CODES:
        raise ResourceError(f"more than {_MOST_CODES - more} distinct ids; only row numbers may be more.")
    return used + more


def _shares(size: int) -> Any:
    """Split a number of ids into about four ranges per thread."""
    step = max(1 << 12, -(-size // (4 * cores())))
    return (slice(first, min(first + step, size)) for first in range(0, size, step))


def _grown(array: Any, used: int, wanted: int) -> Any:
    """The array, or a copy with room for ``wanted`` and at least 1.5 times ``used``, so that copies are few."""
    if wanted <= len(array):
        return array
    grown = np.zeros(max(wanted, used + used // 2), array.dtype)
    grown[:used] = array[:used]
    return grown
