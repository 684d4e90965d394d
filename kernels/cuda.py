"""The kernels for CUDA: `aggregate_blend.cu` and `clustering.cu`, compiled at first use for the device at hand.

A warp takes some rows; those with more than `LONGEST` interactions are split into parts, a warp each, which a second
kernel adds up in their order. The split depends on the degrees alone and nothing is added by float atomics, so the
bytes are the same in every run on a device. Nothing here imports CuPy: it is handed in, so that the tests run all of
this on numpy arrays and kernels built for the host.
"""

from __future__ import annotations

import atexit
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpu_init.errors import InputError, ResourceError

from .csr import Csr
from .reference import ReferenceKernels

LONGEST = 64  # interactions of a row that is not split: as many as one sum in float32 takes (gather.cuh: RUN)
PART = 256  # interactions per part of a row, or a multiple where that would be more than `MOST_PARTS`
MOST_PARTS = 2048
WORKSPACE_BYTES = 128 << 20  # of parts at a time; a single row's may be more
MOVED_BYTES = 64 << 20  # of rows made at a time by `CudaKernels.move_rows`
PRODUCT_BYTES = 64 << 20  # of items' rows less the middle at a time in `CudaKernels.products`
WARP = 32
ROWS = 8  # that a warp takes, half as many where it blends by item (gather.cuh: ROWS)
TILE = 256  # interactions per warp in label_sums (clustering.cu: TILE)
ITEMS = 4  # per warp in products (clustering.cu: ITEMS)
SUMMED = 128  # rows per warp in table_sums, more where their sums would take more than `WORKSPACE_BYTES`
COUNTED_PER_THREAD = 16  # labels in count (clustering.cu: PER_THREAD)
MOST_POINTS = 32  # in products and table_sums; with more, which use features more often, the library is faster
THREADS = 128  # per block: a block waits for its slowest warp, so there are few in it
OLDEST = 70  # compute capability, times ten, that has the loads of device.cuh

_SOURCES = {
    "aggregate_blend.cu": ("aggregate_blend", "busy_rows", "add_parts", "combine_parts"),
    "clustering.cu": (
        "aggregate",
        "squared_norms",
        "lengths",
        "assign",
        "nearest_two",
        "products",
        "table_sums",
        "note",
        "in_doubt",
        "count_labels",
        "label_sums",
        "add_fixed",
    ),
}
_OPTIONS = ("--std=c++17",)  # CuPy adds the architecture, from the device's compute capability
_TYPES = {"float16": "Half", "bfloat16": "Bfloat16", "void16": "Bfloat16", "float32": "float", "float64": "double"}
_LOADS = {"Half": (8, 2, 1), "Bfloat16": (8, 2, 1), "float": (4, 1), "double": (2, 1)}  # values a lane may load at once
_WIDEST = 16  # bytes that a lane loads at once
_MOST_VECTORS = 4  # loads per lane and row in aggregate_blend
_MOST_VALUES = 16  # and values: registers set the bound
_COMBINED = (32, 8)  # columns and rows of a block of combine_parts
_ADDING = 256  # threads per block of add_fixed
_MOST_PRODUCT_VALUES = {"float": 8, "double": 4}  # that a lane loads in products: registers set the bound
_NULL = np.uint64(0)  # CuPy hands on None as no argument at all
_NOBODY = np.empty(0, np.int64)
_BITS = 62  # of sums in whole numbers, sign and rounding left out

Launch = Callable[[tuple[int, ...], tuple[int, ...], tuple[Any, ...]], None]


class Part(NamedTuple):
    """Some busy rows, cut into parts; all (.,) int64.

    ``at``: place of each row in the result; ``starts``: its first part, and one more for the end. ``owner``: place of
    each part's row; ``begin`` and ``end``: the part's interactions, counted from the row's first.
    """

    at: NDArray[np.int64]
    starts: NDArray[np.int64]
    owner: NDArray[np.int64]
    begin: NDArray[np.int64]
    end: NDArray[np.int64]


def split(at: NDArray[np.int64], degrees: NDArray[np.int64], most: int) -> Iterator[Part]:
    """Cut busy rows into parts, in batches.

    Parameters
    ----------
    at, degrees : arrays, shape (m,)
        Places of the rows, and their interactions, each at least 1.
    most : int
        Parts per batch; a row that has more is a batch of its own.
    """
    lengths = PART * -(-degrees // (PART * MOST_PARTS))
    counts = -(-degrees // lengths)
    ends = np.cumsum(counts)
    start = 0
    while start < len(at):
        done = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + most, side="right")))
        rows = slice(start, stop)
        starts = np.concatenate([[0], ends[rows] - done])
        own = np.repeat(np.arange(stop - start), counts[rows])
        begin = (np.arange(len(own)) - starts[own]) * lengths[rows][own]
        end = np.minimum(begin + lengths[rows][own], degrees[rows][own])
        yield Part(at[rows], starts, at[rows][own], begin, end)
        start = stop


def load_width(kind: str, width: int, *tables: tuple[int, int, int]) -> int:
    """Values that a lane may load or store at once: rows of all tables must lie on multiples of them.

    Parameters
    ----------
    kind : str
        Type of the values, as the kernels name it.
    width : int
        Values per row.
    tables : tuples of int
        Address, bytes between rows, and bytes per value of each; more than 16 bytes are taken 16 at a time.
    """
    for values in _LOADS[kind]:
        aligned = all(
            address % min(_WIDEST, values * size) == 0 and step % min(_WIDEST, values * size) == 0
            for address, step, size in tables
        )
        if width % values == 0 and aligned:
            return values
    return 1


def vectors_per_lane(width: int, values: int, itemsize: int) -> int:
    """Loads of a lane per row in aggregate_blend: as few as leave the fewest lanes idle in the last pass."""
    loads, most = -(-width // values), min(_MOST_VECTORS, _MOST_VALUES // values)
    if values * itemsize < _WIDEST:
        return 1 if loads <= WARP else most
    passes = -(-loads // (WARP * most))
    return -(-loads // (WARP * passes))


def groups_log2(width: int, values: int) -> int:
    """Logarithm of the number of groups of lanes in a warp, each wide enough for a row: 0 for one of all 32."""
    lanes = -(-width // values)
    return max(0, WARP.bit_length() - 1 - (lanes - 1).bit_length())


def blocks(warps: int) -> int:
    """Blocks of `THREADS` that so many warps take."""
    return -(-warps * WARP // THREADS)


def instances() -> dict[str, list[str]]:
    """Every kernel that `CudaKernels` may ask for, by source file."""
    loads = [(kind, values) for kind, choices in _LOADS.items() for values in choices]
    floats = [(kind, values) for kind, values in loads if kind != "double"]
    blends = [
        f"aggregate_blend<{kind}, {values}, {vectors}>"
        for kind, values in floats
        for vectors in (
            range(1, min(_MOST_VECTORS, _MOST_VALUES // values) + 1)
            if values == _LOADS[kind][0]
            else (1, _MOST_VECTORS)
        )
    ]
    return {
        "aggregate_blend.cu": [
            *blends,
            "busy_rows",
            *(f"add_parts<{kind}, {values}, {total}>" for kind, values in loads for total in ("float", "double")),
            *(f"combine_parts<{kind}>" for kind in ("Half", "float", "double")),
        ],
        "clustering.cu": [
            *(f"aggregate<{kind}, {values}, {total}>" for kind, values in loads for total in ("float", "double")),
            *(f"squared_norms<{kind}, {values}>" for kind, values in loads),
            *(f"lengths<{kind}>" for kind in _LOADS),
            *(f"assign<{kind}, {values}>" for kind, values in loads if kind in ("float", "double")),
            *(f"nearest_two<{kind}>" for kind in ("float", "double")),
            *(
                f"products<{kind}, {values}, {total}>"
                for kind, values in floats
                for total in ("float", "double")
                if values <= _MOST_PRODUCT_VALUES[total]
            ),
            *(f"table_sums<{kind}, {values}>" for kind, values in loads),
            "note",
            "in_doubt",
            "count_labels",
            "label_sums",
            "add_fixed",
        ],
    }


class CudaKernels(ReferenceKernels):
    """The kernels on CuPy's arrays; what has no kernel here is the reference's, whose arrays are short.

    Parameters
    ----------
    xp, sparse : modules
        cupy and cupyx.scipy.sparse.
    programs : callable, optional
        Gives a kernel by its name, to be called with grid, block and arguments; by default `Programs`.
    """

    def __init__(self, xp: Any, sparse: Any, programs: Callable[[str], Launch] | None = None) -> None:
        super().__init__(xp, sparse)
        self.name = "cuda"
        self._programs = programs if programs is not None else Programs(xp)

    def lengths(self, rows: Any) -> Any:
        """See `Kernels.lengths`."""
        out = self._xp.empty(len(rows), self._xp.float64)
        self._lengths(rows, None, out)
        return out

    def row_sums(self, csr: Csr, item_values: Any) -> Any:
        """See `Kernels.row_sums`."""
        values = self._as(item_values, np.float64)[:, None]
        return self._rows(csr, None, values, None, None, None, np.float64)[:, 0]

    def aggregate(self, csr: Csr, features: Any, row_scale: Any, item_scale: Any, middle: Any, dtype: Any) -> Any:
        """See `Kernels.aggregate`."""
        return self._rows(csr, None, features, row_scale, item_scale, middle, dtype)

    def aggregate_blend(
        self,
        csr: Csr,
        features: Any,
        row_scale: Any,
        item_scale: Any,
        lam: Any,
        centroids: Any,
        user_labels: Any,
        item_labels: Any,
        mean_scale: Any,
        cold: Any,
        scale: float,
        out: Any,
    ) -> None:
        """See `Kernels.aggregate_blend`; ``out`` may be float16 as well, with infinity for what does not fit.

        Features are float16, bfloat16 or float32; others are converted first.
        """
        n, width = len(csr.indptr) - 1, features.shape[1]
        if n == 0 or width == 0:
            return
        if not out.flags.c_contiguous or out.dtype.name not in ("float16", "float32"):
            made = self._xp.empty((n, width), self._xp.float32)
            rest = (lam, centroids, user_labels, item_labels, mean_scale, cold, scale, made)
            self.aggregate_blend(csr, features, row_scale, item_scale, *rest)
            out[...] = made
            return
        table = self._table(features.astype(np.float32) if features.dtype.name == "float64" else features)
        scales = (self._as(row_scale, np.float64), self._as(item_scale, np.float64))
        blend = _Blend(
            self._as(lam, np.float64),
            self._aligned(centroids),
            self._as(user_labels, np.int32),
            self._as(item_labels, np.int32),
            self._as(mean_scale, np.float64),
            np.float64(scale),
        )
        result = (_address(out), width * out.itemsize, out.itemsize)
        values = load_width(table.kind, width, table.place, result, (0, 4 * width, 4))
        vectors = vectors_per_lane(width, values, table.array.itemsize)
        levels = (*blend[:-1], self._aligned(scale * cold), blend.scale)
        common = (np.int64(n), *_interactions(self._xp, csr), *table.arguments)
        half = out.itemsize == 2
        busy = self._busy(csr, _NULL, scales[0])
        self._launch(
            f"aggregate_blend<{table.kind}, {values}, {vectors}>",
            blocks(-(-n // (ROWS // 2 if item_labels is not None else ROWS))),
            (*common, *scales, *levels, _groups(width, values), out, np.int32(half)),
        )
        for part, partial in self._parts(busy, csr, _NULL, table, scales, "float", blend):
            self._combine("Half" if half else "float", part, part.at, partial, blend, _NULL, out)

    def squared_norms(self, csr: Csr, features: Any, row_scale: Any, item_scale: Any, middle: Any) -> Any:
        """See `Kernels.squared_norms`."""
        n = len(csr.indptr) - 1
        if features.shape[1] == 0:
            return self._xp.zeros(n, np.float64)
        out = self._xp.empty(n, np.float64)
        table, middle = self._table(features), self._as(middle, np.float64)
        scales = (self._as(row_scale, np.float64), self._as(item_scale, np.float64))
        values = load_width(table.kind, table.width, table.place)
        common = (np.int64(n), *_interactions(self._xp, csr), *table.arguments)
        busy = self._busy(csr, _NULL, scales[0])
        self._launch(
            f"squared_norms<{table.kind}, {values}>",
            blocks(-(-n // ROWS)),
            (*common, *scales, middle, _groups(table.width, values), out),
        )
        for part, made in self._busy_rows(busy, csr, _NULL, table, scales, middle):
            self._lengths(made, self._xp.asarray(part.at), out)
        return out

    def products(self, features: Any, middle: Any, points: Any, dtype: Any) -> Any:
        """See `Kernels.products`: for many points the library's product, so many items at a time."""
        xp, width = self._xp, features.shape[1]
        if features.dtype.name != "float64" and 0 < len(points) <= MOST_POINTS:
            return self._few_products(features, middle, points, np.dtype(dtype))
        middle, transposed = middle.astype(dtype), points.astype(dtype).T
        out = xp.empty((len(features), len(points)), dtype)
        step = max(1, PRODUCT_BYTES // max(1, width * out.itemsize))
        for start in range(0, len(features), step):
            block = _widened(xp, features[start : start + step]).astype(dtype)
            out[start : start + step] = (block - middle) @ transposed
        return out

    def _few_products(self, features: Any, middle: Any, points: Any, dtype: np.dtype[Any]) -> Any:
        table, middle, points = self._table(features), self._aligned(middle, dtype), self._aligned(points, dtype)
        out = self._xp.empty((len(features), len(points)), dtype)
        total = _TYPES[dtype.name]
        values = load_width(table.kind, table.width, table.place, (0, dtype.itemsize * table.width, dtype.itemsize))
        if values > _MOST_PRODUCT_VALUES[total]:
            values = _LOADS[table.kind][1]
        self._launch(
            f"products<{table.kind}, {values}, {total}>",
            blocks(-(-len(features) // ITEMS)),
            (np.int64(len(features)), *table.arguments, middle, points, np.int32(len(points)), out),
        )
        return out

    def table_sums(self, table: Any, features: Any) -> Any:
        """See `Kernels.table_sums`."""
        n, clusters = table.shape
        if n == 0 or features.shape[1] == 0 or clusters > MOST_POINTS:
            return super().table_sums(table, features)
        rows = self._table(features)
        values = load_width(rows.kind, rows.width, rows.place)
        length = max(SUMMED, -(-8 * n * clusters * rows.width // WORKSPACE_BYTES))
        chunks, tiles = -(-n // length), -(-rows.width // (WARP * values))
        partial = self._xp.empty((chunks, clusters, rows.width), np.float64)
        self._launch(
            f"table_sums<{rows.kind}, {values}>",
            blocks(chunks * tiles),
            (
                np.int64(n),
                self._as(table, np.float64),
                np.int32(clusters),
                *rows.arguments,
                np.int64(length),
                np.int64(tiles),
                partial,
            ),
        )
        return partial.sum(axis=0)

    def assign(
        self, csr: Csr, rows: Any, table: Any, row_scale: Any, item_scale: Any, lengths: Any
    ) -> tuple[Any, Any, Any]:
        """See `Kernels.assign`."""
        n, products, found = len(rows), self._table(table), self._nearest(len(rows))
        rows, lengths = self._as(rows, np.int64), self._as(lengths, np.float64)
        scales = (self._as(row_scale, np.float64), self._as(item_scale, np.float64))
        values = load_width(products.kind, products.width, products.place)
        common = (np.int64(n), rows, *_interactions(self._xp, csr), *products.arguments)
        busy = self._busy(csr, rows, scales[0])
        self._launch(
            f"assign<{products.kind}, {values}>",
            blocks(-(-n // ROWS)),
            (*common, *scales, lengths, _groups(products.width, values), *found),
        )
        for part, made in self._busy_rows(busy, csr, rows, products, scales, _NULL):
            self._nearest_two(made, lengths, self._xp.asarray(part.at), found)
        return found

    def nearest_two(self, products: Any, lengths: Any) -> tuple[Any, Any, Any]:
        """See `Kernels.nearest_two`."""
        found = self._nearest(len(products))
        self._nearest_two(products, self._as(lengths, np.float64), _NULL, found)
        return found

    def note(
        self,
        rows: Any,
        found: Any,
        least: Any,
        second: Any,
        norms: Any,
        reach: Any,
        fall: float,
        labels: Any,
        upper: Any,
        lower: Any,
    ) -> Any:
        """See `Kernels.note`."""
        before = self._xp.empty(len(rows), np.int32)
        arrays = (self._as(array, np.float64) for array in (least, second, norms, reach))
        found = (self._as(rows, np.int64), self._as(found, np.int32), *arrays)
        self._launch(
            "note",
            -(-len(rows) // THREADS),
            (np.int64(len(rows)), *found, np.float64(fall), labels, upper, lower, before),
        )
        return before

    def in_doubt(self, labels: Any, upper: Any, lower: Any, reach: Any, fall: float) -> Any:
        """See `Kernels.in_doubt`."""
        doubtful = self._xp.empty(len(labels), np.uint8)
        arrays = (labels, upper, lower, self._as(reach, np.float64), np.float64(fall), doubtful)
        self._launch("in_doubt", -(-len(labels) // THREADS), (np.int64(len(labels)), *arrays))
        return self._xp.flatnonzero(doubtful)

    def count(self, labels: Any, sign: int, counts: Any) -> None:
        """See `Kernels.count`."""
        n = len(labels)
        self._launch(
            "count_labels",
            -(-n // (THREADS * COUNTED_PER_THREAD)),
            (np.int64(n), self._as(labels, np.int32), np.int32(len(counts)), np.int64(sign), counts),
        )

    def move_rows(
        self,
        csr: Csr,
        rows: Any,
        features: Any,
        row_scale: Any,
        item_scale: Any,
        middle: Any,
        before: Any,
        after: Any,
        sums: Any,
    ) -> None:
        """See `Kernels.move_rows`: so many rows at a time, each in the order given."""
        xp = self._xp
        labels = xp.arange(len(sums))
        step = max(1, MOVED_BYTES // (8 * max(1, features.shape[1])))
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            made = self._rows(csr, rows[part], features, row_scale, item_scale, middle, np.float64)
            signs = (after[part, None] == labels).astype(np.float64) - (before[part, None] == labels)
            moved = self.table_sums(signs, made)
            sums += signs.T @ made if moved is None else moved

    def label_sums(self, csr: Csr, rows: Any, labels: Any, row_scale: Any, item_scale: Any, sums: Any) -> None:
        """See `Kernels.label_sums`: sums in whole numbers, whose order does not matter.

        The unit is so small that the sum of all that is added takes 62 bits: each interaction is rounded to 2^-62 of
        that sum, which for 100 million users is some 3e-11 of a user.
        """
        xp, f64 = self._xp, np.float64
        rows, row_scale, item_scale = self._as(rows, np.int64), self._as(row_scale, f64), self._as(item_scale, f64)
        bound = float((row_scale * self.row_sums(csr, item_scale))[rows].sum()) if len(rows) else 0.0
        if bound == 0.0:
            return
        exponent = min(1000, _BITS - math.frexp(bound)[1])
        degrees = (csr.indptr[rows + 1] - csr.indptr[rows]).astype(np.int64)
        starts = xp.concatenate([xp.zeros(1, xp.int64), xp.cumsum(degrees)])
        firsts = xp.arange(0, int(starts[-1]), TILE)
        tiles = self._as(xp.searchsorted(starts, firsts, side="right") - 1, np.int64)
        fixed = xp.zeros(sums.shape, xp.int64)
        common = (np.int64(len(tiles)), tiles, np.int64(len(rows)), self._as(starts, np.int64), rows)
        chosen = (*common, self._as(labels, np.int32), *_interactions(xp, csr), row_scale, item_scale)
        per_unit = np.float64(math.ldexp(1.0, exponent))
        self._launch("label_sums", blocks(len(tiles)), (*chosen, np.int32(sums.shape[1]), per_unit, fixed))
        total = sums if sums.flags.c_contiguous else xp.ascontiguousarray(sums)
        unit = np.float64(math.ldexp(1.0, -exponent))
        self._launch("add_fixed", -(-total.size // _ADDING), (np.int64(total.size), fixed, unit, total), (_ADDING,))
        if total is not sums:
            sums[...] = total

    # What they share.

    def _rows(
        self, csr: Csr, rows: Any, features: Any, row_scale: Any, item_scale: Any, middle: Any, dtype: Any
    ) -> Any:
        """Rows of ``A F - middle``, of all users or of those given (m,); None stands for factors of 1 and no middle."""
        n = len(csr.indptr) - 1 if rows is None else len(rows)
        out = self._xp.empty((n, features.shape[1]), dtype)
        if out.size == 0:
            return out
        table, rows, middle = self._table(features), self._as(rows, np.int64), self._as(middle, np.float64)
        scales = (self._as(row_scale, np.float64), self._as(item_scale, np.float64))
        values = load_width(table.kind, table.width, table.place)
        kind = _TYPES[out.dtype.name]
        common = (np.int64(n), rows, *_interactions(self._xp, csr), *table.arguments)
        busy = self._busy(csr, rows, scales[0])
        self._launch(
            f"aggregate<{table.kind}, {values}, {kind}>",
            blocks(-(-n // ROWS)),
            (*common, *scales, middle, _groups(table.width, values), out),
        )
        for part, partial in self._parts(busy, csr, rows, table, scales, kind):
            self._combine(kind, part, part.at, partial, _Blend(), middle, out)
        return out

    def _busy_rows(
        self, busy: _Busy, csr: Csr, rows: Any, table: _Table, scales: tuple[Any, Any], middle: Any
    ) -> Iterator[tuple[Part, Any]]:
        """Rows of ``A F - middle`` of busy users, in float64, a batch at a time."""
        for part, partial in self._parts(busy, csr, rows, table, scales, "double"):
            made = self._xp.empty((len(part.at), table.width), np.float64)
            self._combine("double", part, None, partial, _Blend(), middle, made)
            yield part, made

    def _parts(
        self,
        busy: _Busy,
        csr: Csr,
        rows: Any,
        table: _Table,
        scales: tuple[Any, Any],
        total: str,
        blend: _Blend | None = None,
    ) -> Iterator[tuple[Part, Any]]:
        """Sums over parts of the busy rows, (parts, D) float64 (in ``total``, run by run), a batch at a time."""
        xp = self._xp
        if len(busy.at) == 0:
            return
        values = load_width(table.kind, table.width, table.place)
        common = (rows, *_interactions(xp, csr), *table.arguments, *scales)
        lam, centroids, _, item_labels, mean_scale, scale = blend or _Blend()
        levels = (lam, centroids, item_labels, mean_scale, scale, _groups(table.width, values))
        for part in split(*busy, WORKSPACE_BYTES // (8 * table.width)):
            count = len(part.owner)
            partial = xp.empty((count, table.width), np.float64)
            places = map(xp.asarray, (part.owner, part.begin, part.end))
            self._launch(
                f"add_parts<{table.kind}, {values}, {total}>",
                blocks(count),
                (np.int64(count), *places, *common, *levels, partial),
            )
            yield part, partial

    def _busy(self, csr: Csr, rows: Any, row_scale: Any) -> _Busy:
        """Rows with more than `LONGEST` interactions, some of them usable."""
        xp = self._xp
        n = len(csr.indptr) - 1 if rows is _NULL else len(rows)
        most = min(n, len(csr.indices) // LONGEST) if rows is _NULL else n  # rows that are given may come twice
        found = xp.empty((most + 1, 2), np.int64)
        found[0] = 0
        indptr, wide, *_ = _interactions(xp, csr)
        self._launch("busy_rows", -(-n // THREADS), (np.int64(n), rows, indptr, wide, row_scale, found))
        count = int(found[0, 0])
        if count == 0:
            return _Busy(_NOBODY, _NOBODY)
        listed = _host(found[1 : count + 1])
        return _Busy(*np.ascontiguousarray(listed[np.argsort(listed[:, 0])].T))

    def _combine(self, kind: str, part: Part, at: Any, partial: Any, blend: _Blend, middle: Any, out: Any) -> None:
        """Rows from their parts, into places ``at`` of ``out``, or side by side."""
        width = partial.shape[1]
        tiles = -(-width // _COMBINED[0])
        places = (self._xp.asarray(part.starts), _NULL if at is None else self._xp.asarray(at))
        level = (blend.lam, blend.centroids, blend.user_labels, blend.scale)
        self._launch(
            f"combine_parts<{kind}>",
            tiles * len(part.at),
            (np.int64(tiles), *places, partial, np.int32(width), *level, middle, out),
            _COMBINED,
        )

    def _lengths(self, matrix: Any, at: Any, out: Any) -> None:
        table = self._table(matrix)
        self._launch(
            f"lengths<{table.kind}>",
            blocks(len(matrix)),
            (np.int64(len(matrix)), *table.arguments, _NULL if at is None else at, out),
        )

    def _nearest(self, n: int) -> tuple[Any, Any, Any]:
        xp = self._xp
        return xp.empty(n, xp.int32), xp.empty(n, xp.float64), xp.empty(n, xp.float64)

    def _nearest_two(self, products: Any, lengths: Any, at: Any, found: tuple[Any, Any, Any]) -> None:
        table = self._table(self._xp.ascontiguousarray(products))
        logarithm = groups_log2(table.width, 1)
        self._launch(
            f"nearest_two<{table.kind}>",
            blocks(-(-len(products) >> logarithm)),
            (np.int64(len(products)), table.array, np.int32(table.width), lengths, np.int32(logarithm), at, *found),
        )

    def _launch(self, name: str, grid: int, arguments: tuple[Any, ...], block: tuple[int, ...] = (THREADS,)) -> None:
        if grid:
            self._programs(name)((grid,), block, arguments)

    def _as(self, array: Any, dtype: Any) -> Any:
        """The array in C order and of a type, no copy where it is so already; None is no array."""
        return _NULL if array is None else self._xp.ascontiguousarray(array, dtype)

    def _aligned(self, array: Any, dtype: Any = np.float32) -> Any:
        """The array in C order and of a type, on a multiple of 16 bytes."""
        array = self._as(array, dtype)
        return array if _address(array) % _WIDEST == 0 else array.copy()

    def _table(self, array: Any) -> _Table:
        """A matrix as kernels read it: rows with any distance between them, values side by side."""
        if array.dtype.name not in _TYPES:
            array = array.astype(np.float32)
        if array.strides[1] != array.itemsize or array.strides[0] % array.itemsize:
            array = self._xp.ascontiguousarray(array)
        return _Table(array, _TYPES[array.dtype.name], array.shape[1], np.int64(array.strides[0] // array.itemsize))


class _Busy(NamedTuple):
    """Places and degrees of busy rows, in order."""

    at: NDArray[np.int64]
    degrees: NDArray[np.int64]


class _Table(NamedTuple):
    array: Any
    kind: str
    width: int
    stride: np.int64

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What kernels take."""
        return self.array, self.stride, np.int32(self.width)

    @property
    def place(self) -> tuple[int, int, int]:
        """What `load_width` asks for."""
        return _address(self.array), self.array.strides[0], self.array.itemsize


class _Blend(NamedTuple):
    """What the blend adds to ``A F``; as it stands, nothing."""

    lam: Any = _NULL
    centroids: Any = _NULL
    user_labels: Any = _NULL
    item_labels: Any = _NULL
    mean_scale: Any = _NULL
    scale: Any = np.float64(1.0)


def _groups(width: int, values: int) -> np.int32:
    """How lanes share a row of a table, as the kernels take it."""
    return np.int32(groups_log2(width, values))


def _address(array: Any) -> int:
    return int(array.data.ptr if hasattr(array.data, "ptr") else array.ctypes.data)


def _host(array: Any) -> NDArray[Any]:
    copied: NDArray[Any] = array.get() if hasattr(array, "get") else np.asarray(array)
    return copied


def _interactions(xp: Any, csr: Csr) -> tuple[Any, ...]:
    """Row pointers and whether they are wide, items, weights."""
    indptr = csr.indptr if csr.indptr.dtype.name in ("int32", "int64") else csr.indptr.astype(np.int64)
    weights = _NULL if csr.weights is None else xp.ascontiguousarray(csr.weights, np.float32)
    indices = xp.ascontiguousarray(csr.indices, np.int32)
    return xp.ascontiguousarray(indptr), np.int32(indptr.itemsize == 8), indices, weights


def _widened(xp: Any, block: Any) -> Any:
    """Bfloat16 as float32, whose upper half it is; others as they are."""
    if _TYPES.get(block.dtype.name) != "Bfloat16":
        return block
    return (xp.ascontiguousarray(block).view(np.uint16).astype(np.uint32) << 16).view(np.float32)


# Compiling.


class Programs:
    """Kernels by their names, compiled by NVRTC at first use and kept, in memory and where CuPy keeps machine code.

    Parameters
    ----------
    xp : module
        cupy.
    """

    def __init__(self, xp: Any) -> None:
        self._xp = xp
        self._kernels: dict[str, Launch] = {}

    def __call__(self, name: str) -> Launch:
        """Give the kernel of a name such as ``aggregate_blend<float, 4, 1>``.

        Raises
        ------
        InputError
            The device is too old, or the library that compiles is missing.
        ResourceError
            It does not compile; the message names file and line.
        """
        if name not in self._kernels:
            self._kernels[name] = self._compile(name)
        return self._kernels[name]

    def _compile(self, name: str) -> Launch:
        cuda = self._xp.cuda
        capability = int(cuda.Device().compute_capability)
        if capability < OLDEST:
            raise InputError(
                f"the CUDA device has compute capability {capability / 10}, but kernels need {OLDEST / 10} (Volta)"
                " or newer; use --backend cpu."
            )
        file = next(file for file, kernels in _SOURCES.items() if name.partition("<")[0] in kernels)
        module = self._xp.RawModule(code=source(file), options=_OPTIONS, name_expressions=(name,))
        try:
            kernel: Launch = module.get_function(name)
        except cuda.compiler.CompileException as error:
            message = f"{compile_error(str(error))}\n(kernel {name}, compute capability {capability})"
            raise ResourceError(message) from None
        except RuntimeError as error:
            if "nvrtc" not in str(error):
                raise
            raise InputError(
                f"CuPy finds no compiler: {compile_error(str(error))}.\n"
                "Install CUDA's with: pip install 'cupy-cuda12x[ctk]', or 'cupy-cuda13x[ctk]', whichever is there."
            ) from None
        return kernel


def source(file: str) -> str:
    """Text of a source file, with what it includes in place, and marks that say where each line comes from.

    NVRTC is given one text: CuPy keeps machine code by it, and would not see that an included file has changed.
    """
    included: set[str] = set()

    def expand(name: str) -> Iterator[str]:
        text = resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
        yield f'#line 1 "{name}"'
        for number, line in enumerate(text.splitlines(), 1):
            other = re.fullmatch(r'#include "([\w.]+)"', line)
            if other is None:
                yield line
            elif other[1] not in included:
                included.add(other[1])
                yield from expand(other[1])
                yield f'#line {number + 1} "{name}"'
            else:
                yield ""

    return "\n".join([*expand(file), ""])


def compile_error(log: str) -> str:
    """The first error of NVRTC's log, which begins with file and line; else the log's first line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if " error" in line]
    return next(iter([*errors, *lines]), "NVRTC failed and did not say why")


def choose_cache_folder() -> None:
    """See to it that CuPy can keep machine code, or that it does not try.

    To be called before CuPy is imported: it makes its folder then, and cannot be imported where it cannot. What
    ``CUPY_CACHE_DIR`` says is taken, then CuPy's own default, then gpu-init's folder, then one of this process alone.
    """
    home = os.path.expanduser("~")
    own = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache"), "gpu-init", "cupy")
    default = os.path.join(home, ".cupy", "kernel_cache")
    wanted = os.environ.get("CUPY_CACHE_DIR")
    for folder in filter(None, (wanted, default, own)):
        if _writable(folder):
            os.environ["CUPY_CACHE_DIR"] = folder
            return
    try:
        folder = tempfile.mkdtemp(prefix="gpu-init-cupy-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    except OSError:
        folder = os.sep  # is there, and is not written to
        os.environ["CUPY_CACHE_IN_MEMORY"] = "1"
    os.environ["CUPY_CACHE_DIR"] = folder


def _writable(folder: str) -> bool:
    try:
        Path(folder).mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)
