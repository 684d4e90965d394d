"""Distinct texts, such as ids, as codes by order of appearance: a hash table over their bytes, on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from gpu_init.errors import ResourceError

from .compiled import compiled, compiled_serial, inner
from .vectors import prefetch

_PARTS = 64  # of the texts, to spread them over the threads
_AHEAD = 8  # texts that a slot is asked for before it is looked at
_FIRST_TEXTS = 1 << 12
_MOST_CODES = 2**31 - 1
_EMPTY = 0  # slot; others hold the code plus 1 in the lower half, the upper half of the hash in the upper


@inner
def _word(data, at):  # type: ignore[no-untyped-def]
    word = np.uint64(0)
    for byte in range(8):  # one load, as it is compiled
        word |= np.uint64(data[at + byte]) << np.uint64(8 * byte)
    return word


@inner
def _hash(data, first, last):  # type: ignore[no-untyped-def]
    """Eight bytes at a time, as FNV-1a takes one, then mixed: the upper half tells texts of one slot apart."""
    value = np.uint64(0xCBF29CE484222325) ^ np.uint64(last - first)
    if last - first < 8:
        for at in range(first, last):
            value = (value ^ np.uint64(data[at])) * np.uint64(0x100000001B3)
    else:
        for at in range(first, last - 8, 8):
            value = (value ^ _word(data, at)) * np.uint64(0x9E3779B97F4A7C15)
            value ^= value >> np.uint64(32)
        value = (value ^ _word(data, last - 8)) * np.uint64(0x9E3779B97F4A7C15)
    value ^= value >> np.uint64(32)
    value *= np.uint64(0x9E3779B97F4A7C15)
    return value ^ (value >> np.uint64(29))


@inner
def _is_text(data, first, last, known, start, stop):  # type: ignore[no-untyped-def]
    if last - first != stop - start:
        return False
    if last - first < 8:
        different = np.uint8(0)
        for at in range(last - first):
            different |= data[first + at] ^ known[start + at]
        return different == 0
    while first + 8 < last:
        if _word(data, first) != _word(known, start):
            return False
        first += 8
        start += 8
    return _word(data, last - 8) == _word(known, stop - 8)  # which the one before may reach into


@inner
def _slot_of(value, data, first, last, slots, ends, known):  # type: ignore[no-untyped-def]
    """Give the slot that holds a text, or the empty one where it belongs."""
    mask = np.uint64(slots.size - 1)
    slot = value & mask
    while slots[slot] != _EMPTY:
        if slots[slot] >> np.uint64(32) == value >> np.uint64(32):
            code = _code(slots[slot])
            if _is_text(data, first, last, known, ends[code], ends[code + 1]):
                break
        slot = (slot + np.uint64(1)) & mask
    return slot


@inner
def _code(slot):  # type: ignore[no-untyped-def]
    return np.int64(slot & np.uint64(0xFFFFFFFF)) - 1


@inner
def _filled(value, code):  # type: ignore[no-untyped-def]
    return (value >> np.uint64(32)) << np.uint64(32) | np.uint64(code + 1)


@compiled
def _find(starts, data, hashes, slots, ends, known, codes):  # type: ignore[no-untyped-def]
    mask = np.uint64(slots.size - 1)
    for part in prange(_PARTS):
        first, last = part * codes.size // _PARTS, (part + 1) * codes.size // _PARTS
        for k in range(first, last):
            hashes[k] = _hash(data, starts[k], starts[k + 1])
        for k in range(first, last):
            if k + 3 * _AHEAD < last:
                prefetch(slots, np.int64(hashes[k + 3 * _AHEAD] & mask))
            if k + 2 * _AHEAD < last:
                prefetch(ends, _code(slots[hashes[k + 2 * _AHEAD] & mask]))
            if k + _AHEAD < last:
                prefetch(known, ends[_code(slots[hashes[k + _AHEAD] & mask])])
            slot = _slot_of(hashes[k], data, starts[k], starts[k + 1], slots, ends, known)
            codes[k] = _code(slots[slot])


@compiled_serial
def _enter(starts, data, hashes, slots, ends, known, used, codes):  # type: ignore[no-untyped-def]
    """Give codes to texts that `_find` did not know."""
    for k in range(codes.size):
        if codes[k] < 0:
            first, last = starts[k], starts[k + 1]
            slot = _slot_of(hashes[k], data, first, last, slots, ends, known)
            if slots[slot] == _EMPTY:
                slots[slot] = _filled(hashes[k], used)
                for at in range(last - first):
                    known[ends[used] + at] = data[first + at]
                ends[used + 1] = ends[used] + last - first
                used += 1
            codes[k] = _code(slots[slot])
    return used


@compiled_serial
def _enter_known(ends, known, used, slots):  # type: ignore[no-untyped-def]
    """Fill empty slots with all texts that are known, each of which is there once."""
    mask = np.uint64(slots.size - 1)
    for code in range(used):
        value = _hash(known, ends[code], ends[code + 1])
        slot = value & mask
        while slots[slot] != _EMPTY:
            slot = (slot + np.uint64(1)) & mask
        slots[slot] = _filled(value, code)


@compiled_serial
def _count(codes, counts):  # type: ignore[no-untyped-def]
    for k in range(codes.size):
        counts[codes[k]] += 1


class NumbaTexts:
    """See `gpu_init.kernels.Texts`."""

    def __init__(self) -> None:
        self._used = 0
        self._ends = np.zeros(_FIRST_TEXTS + 1, np.int64)
        self._counts = np.zeros(_FIRST_TEXTS, np.int64)
        self._known = np.empty(16 * _FIRST_TEXTS, np.uint8)
        self._slots = np.zeros(2 * _FIRST_TEXTS, np.uint64)

    def encode(self, starts: Any, data: Any) -> Any:
        """See `Texts.encode`."""
        codes, hashes = self._look_up(starts, data)
        unknown = codes < 0
        if unknown.any():
            self._make_room(int(unknown.sum()), int(np.diff(starts)[unknown].sum()))
            arrays = (starts, data, hashes, self._slots, self._ends, self._known)
            self._used = _enter(*arrays, self._used, codes)
        _count(codes, self._counts)
        return codes

    def find(self, starts: Any, data: Any) -> Any:
        """See `Texts.find`."""
        return self._look_up(starts, data)[0]

    def known(self) -> tuple[Any, Any, Any]:
        """See `Texts.known`."""
        ends = self._ends[: self._used + 1]
        return ends, self._known[: ends[-1]], self._counts[: self._used]

    def _look_up(self, starts: Any, data: Any) -> tuple[Any, Any]:
        codes, hashes = np.empty(len(starts) - 1, np.int32), np.empty(len(starts) - 1, np.uint64)
        _find(starts, data, hashes, self._slots, self._ends, self._known, codes)
        return codes, hashes

    def _make_room(self, texts: int, size: int) -> None:
        wanted = self._used + texts
        if wanted > _MOST_CODES:
            raise ResourceError(f"more than {_MOST_CODES - texts} distinct ids; only row numbers may be more.")
        self._ends = _grown(self._ends, self._used + 1, wanted + 1)
        self._counts = _grown(self._counts, self._used, wanted)
        self._counts[self._used :] = 0
        self._known = _grown(self._known, self._ends[self._used], self._ends[self._used] + size)
        if 2 * wanted > len(self._slots):
            slots = 2 << (2 * wanted - 1).bit_length()
            self._slots = np.empty(0, np.uint64)  # before the larger one is made
            self._slots = np.zeros(slots, np.uint64)
            _enter_known(self._ends, self._known, self._used, self._slots)


def _grown(array: Any, used: int, wanted: int) -> Any:
    """An array with room for ``wanted``, half as many more than are used at least, so that few copies are made."""
    if wanted <= len(array):
        return array
    grown = np.empty(max(wanted, used + used // 2), array.dtype)
    grown[:used] = array[:used]
    return grown
