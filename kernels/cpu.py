"""The kernels for the CPU: numba compiles plain loops, and threads run them on ranges of users in parallel.

One thread sums a user's row, in the order of its items, so the bytes do not depend on the number of threads. Sums over
users are made for fixed ranges, and then added in the order of the ranges.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import scipy.sparse

from gpu_init.kernels.build import Rows
from gpu_init.kernels.compiled import float32, float64, int32, int64, kernel, read_only, reads, writes
from gpu_init.kernels.csr import BlendTerms, Csr
from gpu_init.kernels.reference import ReferenceKernels
from gpu_init.kernels.threads import PARTS, PARTS_BYTES, in_order, one_blas_thread, run

_RANGES = 64  # The users are split into at most so many ranges, to spread busy users over the threads.
_RANGE_VALUES = 1 << 21  # There are fewer ranges if a range would have fewer values than this to sum.
_TILE_VALUES = 1 << 17  # A thread makes so many values of rows at a time: 1 MiB in float64 stays in a core's cache.
_AT_ONCE = 8  # `_weighted_sums` adds so many rows in one pass: a core can wait for as many memory reads at once.
_BUSY = 256  # A float32 row with more interactions than this is summed in float64.
_NO_WEIGHTS, _NO_SCALE = np.empty(0, np.float32), np.empty(0, np.float64)

_INTERACTIONS = (reads(int64), reads(int32), reads(float32))
"""Types of the row pointers of a range of users, all items, and all weights (an empty array if all are 1)."""


def _weighted_sums(  # type: ignore[no-untyped-def]
    indptr, indices, weights, table, row_scale, item_scale, origins, labels, shares, most, out
):
    """``out[u] = shares[u] * origins[labels[u]] + (A T)_u``, summed in the type of ``out``.

    Users with more than ``most`` interactions are left out. An empty ``item_scale`` means that all scales are 1.
    Indices are unsigned, because numba checks whether a signed index is negative and counts from the end.
    """
    one, two, three, four = np.uint64(1), np.uint64(2), np.uint64(3), np.uint64(4)
    five, six, seven, step = np.uint64(5), np.uint64(6), np.uint64(7), np.uint64(_AT_ONCE)
    width = np.uint64(table.shape[1])
    items, factors = np.empty(_AT_ONCE, np.uint64), np.empty(_AT_ONCE, out.dtype)
    for row in range(np.uint64(labels.size)):
        entry, last = np.uint64(indptr[row]), np.uint64(indptr[row + one])
        if last - entry > np.uint64(most):
            continue
        label, share, begun = np.uint64(labels[row]), out.dtype.type(shares[row]), False
        while entry < last or not begun:
            count = np.uint64(0)
            while entry < last and count < step:
                item, factor = np.uint64(indices[entry]), row_scale[row]
                if item_scale.size > 0:
                    factor *= item_scale[item]
                if weights.size > 0:
                    factor *= weights[entry]
                items[count], factors[count] = item, factor
                count += np.uint64(factor != 0.0)  # a missing item's row may be NaN, and is not read
                entry += one
            if count == np.uint64(0):
                if not begun:
                    for k in range(width):
                        out[row, k] = share * origins[label, k]
                begun = True
                continue
            while count < step:
                items[count], factors[count] = items[0], 0.0
                count += one
            i0, i1, i2, i3 = items[0], items[one], items[two], items[three]
            i4, i5, i6, i7 = items[four], items[five], items[six], items[seven]
            f0, f1, f2, f3 = factors[0], factors[one], factors[two], factors[three]
            f4, f5, f6, f7 = factors[four], factors[five], factors[six], factors[seven]
            if begun:
                for k in range(width):
                    first = f0 * table[i0, k] + f1 * table[i1, k] + f2 * table[i2, k] + f3 * table[i3, k]
                    second = f4 * table[i4, k] + f5 * table[i5, k] + f6 * table[i6, k] + f7 * table[i7, k]
                    out[row, k] += first + second
            else:  # the origin is added here, which saves a pass over the row
                for k in range(width):
                    first = f0 * table[i0, k] + f1 * table[i1, k] + f2 * table[i2, k] + f3 * table[i3, k]
                    second = f4 * table[i4, k] + f5 * table[i5, k] + f6 * table[i6, k] + f7 * table[i7, k]
                    out[row, k] = share * origins[label, k] + (first + second)
            begun = True


_SUMMED = (*_INTERACTIONS, reads(float32, 2), reads(float64), reads(float64))
_PER_USER = (reads(int32), reads(float64), int64)
_sums32 = kernel(*_SUMMED, reads(float32, 2), *_PER_USER, writes(float32, 2), fused=True)(_weighted_sums)
_sums64 = kernel(*_SUMMED, reads(float64, 2), *_PER_USER, writes(float64, 2), fused=True)(_weighted_sums)


@kernel(
    *_INTERACTIONS, reads(float64, 2), reads(float64), reads(float64), reads(float64), writes(int32), writes(float64)
)
def _assign(  # type: ignore[no-untyped-def]
    indptr, indices, weights, table, row_scale, item_scale, lengths, labels, least
):
    clusters = np.uint64(lengths.size)
    products = np.empty(lengths.size, np.float64)
    for row in range(labels.size):
        labels[row], least[row] = -1, 0.0
        if row_scale[row] == 0.0:
            continue
        for k in range(clusters):
            products[k] = 0.0
        for entry in range(indptr[row], indptr[row + 1]):
            item = np.uint64(indices[entry])
            factor = item_scale[item] if item_scale.size > 0 else 1.0
            if weights.size > 0:
                factor *= weights[entry]
            if factor != 0.0:
                for k in range(clusters):
                    products[k] += factor * table[item, k]
        factor = 2.0 * row_scale[row]
        best, label = np.inf, 0
        for k in range(clusters):  # selections, because a processor predicts such branches badly
            score = lengths[k] - factor * products[k]
            label = k if score < best else label
            best = score if score < best else best
        labels[row], least[row] = label, best


@kernel(*_INTERACTIONS, reads(int32), reads(float64), reads(float64), writes(float64, 2))
def _label_sums(indptr, indices, weights, labels, row_scale, item_scale, sums):  # type: ignore[no-untyped-def]
    for row in range(labels.size):
        if labels[row] >= 0:
            for entry in range(indptr[row], indptr[row + 1]):
                value = row_scale[row]
                if item_scale.size > 0:
                    value *= item_scale[indices[entry]]
                if weights.size > 0:
                    value *= weights[entry]
                sums[indices[entry], labels[row]] += value


@kernel(*_INTERACTIONS, reads(float64, 2), reads(float64), writes(float64, 2))
def _gram(indptr, indices, weights, table, row_factors, sums):  # type: ignore[no-untyped-def]
    width = np.uint64(table.shape[1])
    products = np.empty(table.shape[1], np.float64)
    for row in range(row_factors.size):
        for k in range(width):
            products[k] = 0.0
        for entry in range(indptr[row], indptr[row + 1]):
            item, factor = np.uint64(indices[entry]), weights[entry] if weights.size > 0 else np.float32(1.0)
            for k in range(width):
                products[k] += factor * table[item, k]
        for entry in range(indptr[row], indptr[row + 1]):
            item, factor = np.uint64(indices[entry]), weights[entry] if weights.size > 0 else np.float32(1.0)
            for k in range(width):
                sums[item, k] += factor * (row_factors[row] * products[k])


FITTING = (_sums64, _assign, _label_sums, _sums32)
"""The kernels that most jobs use after reading, in this order."""

INTERACTIONS_ONLY = (_gram,)
"""The kernels that only `cluster_on = "interactions"` uses."""


class NumbaKernels(ReferenceKernels):
    """The kernels on numpy arrays, compiled for this machine at first use.

    Methods that are not compiled are those of the reference, whose blocks run in threads.
    """

    block_values = _TILE_VALUES

    def __init__(self) -> None:
        super().__init__(np, scipy.sparse)
        self.name = "numba"

    def rows_in_place(self) -> type[Rows]:  # type: ignore[override]
        return Rows

    def _map(self, work: Callable[[slice], Any], parts: Iterable[slice]) -> Iterator[Any]:
        with one_blas_thread():
            yield from in_order(work, parts)

    def lengths(self, rows: Any) -> Any:
        out = np.empty(len(rows), np.float64)

        def work(part: slice) -> None:
            tile = rows[part].astype(np.float64)
            np.einsum("ij,ij->i", tile, tile, out=out[part])

        run(work, _tiles(slice(0, len(rows)), rows.shape[1]))
        return out

    def aggregate(self, csr: Csr, features: Any, row_scale: Any, item_scale: Any, offset: Any) -> Any:
        out = np.empty((len(csr.indptr) - 1, features.shape[1]), np.float64)
        make = _aggregating(csr, features, row_scale, item_scale, offset)
        run(lambda part: make(part, out[part]), _ranges(csr, features.shape[1]))
        return out

    def squared_norms(self, csr: Csr, features: Any, row_scale: Any, item_scale: Any, offset: Any) -> Any:
        out = np.empty(len(csr.indptr) - 1, np.float64)
        make = _aggregating(csr, features, row_scale, item_scale, offset)

        def work(part: slice) -> None:
            for tile in _tiles(part, features.shape[1]):
                rows = np.empty((tile.stop - tile.start, features.shape[1]), np.float64)
                make(tile, rows)
                np.einsum("ij,ij->i", rows, rows, out=out[tile])

        run(work, _ranges(csr, features.shape[1]))
        return out

    def aggregate_blend(
        self, csr: Csr, features: Any, row_scale: Any, item_scale: Any, blend: BlendTerms, out: Any
    ) -> None:
        lam, centroids, user_labels, item_labels, mean_scale, cold, scale = blend
        summed, clusters = _summing(csr, features, item_scale), len(centroids)
        means: Any = None
        if item_labels is not None:
            means = _mean_centroids(csr, item_labels, mean_scale, centroids)
        all_origins = np.vstack([centroids, cold])  # a cold user's origin is the last row

        def work(whole: slice) -> None:
            for part in [whole] if means is None else _tiles(whole, out.shape[1]):
                if means is None:
                    origins, labels, last = all_origins, user_labels[part], clusters
                else:
                    last = part.stop - part.start
                    origins, labels = np.vstack([means(part), cold]), np.arange(last)
                is_cold, local = row_scale[part] == 0, scale * lam[part]
                shares = np.where(is_cold, scale, scale - local)
                summed(part, local * row_scale[part], origins, np.where(is_cold, last, labels), shares, out[part])

        run(work, _ranges(csr, out.shape[1]))

    def assign(self, csr: Csr, table: Any, row_scale: Any, item_scale: Any, lengths: Any) -> tuple[Any, Any]:
        labels, least = np.empty(len(row_scale), np.int32), np.empty(len(row_scale), np.float64)
        table, lengths, scales = read_only(table, np.float64), read_only(lengths, np.float64), _scales(item_scale)
        rows, own = read_only(row_scale, np.float64), _of_ranges(csr)

        def work(part: slice) -> None:
            _assign(*own(part), table, rows[part], scales, lengths, labels[part], least[part])

        run(work, _ranges(csr, table.shape[1]))
        return labels, least

    def label_sums(self, csr: Csr, labels: Any, row_scale: Any, item_scale: Any, sums: Any) -> None:
        labels, rows, scales = read_only(labels, np.int32), read_only(row_scale, np.float64), _scales(item_scale)
        own = _of_ranges(csr)

        def add(part: slice, partial: Any) -> None:
            _label_sums(*own(part), labels[part], rows[part], scales, partial)

        _add_parts(csr, add, sums, 1)

    def gram(self, csr: Csr, table: Any, row_factors: Any, sums: Any) -> None:
        table, factors, own = read_only(table, np.float64), read_only(row_factors, np.float64), _of_ranges(csr)
        _add_parts(csr, lambda part, partial: _gram(*own(part), table, factors[part], partial), sums, table.shape[1])


def _summing(csr: Csr, table: Any, item_scale: Any) -> Callable[..., None]:
    """A function that runs `_weighted_sums` of a table on a range of users; busy users are summed in float64."""
    table, scales, every = read_only(table, np.float32), _scales(item_scale), len(csr.indices)
    of_range = _of_ranges(csr)

    def summed(part: slice, row_scale: Any, origins: Any, labels: Any, shares: Any, out: Any) -> None:
        starts, *entries = of_range(part)
        factors, shares = read_only(row_scale, np.float64), read_only(shares, np.float64)
        labels = read_only(labels, np.int32)

        def whole(rows: slice, out: Any) -> None:
            own = (starts[rows.start : rows.stop + 1], *entries, table, factors[rows], scales)
            _sums64(*own, read_only(origins, np.float64), labels[rows], shares[rows], every, out)

        if out.dtype == np.float64:
            whole(slice(0, len(out)), out)
            return
        of_users = (read_only(origins, np.float32), labels, shares)
        _sums32(starts, *entries, table, factors, scales, *of_users, _BUSY, out)
        for user in np.flatnonzero(np.diff(starts) > _BUSY):
            row = np.empty((1, out.shape[1]))
            whole(slice(user, user + 1), row)
            out[user] = row[0]

    return summed


def _aggregating(csr: Csr, features: Any, row_scale: Any, item_scale: Any, offset: Any) -> Callable[[slice, Any], None]:
    """A function that writes ``A F - offset`` for a range of users."""
    summed, origin = _summing(csr, features, item_scale), read_only(offset, np.float64)[None]

    def make(part: slice, out: Any) -> None:
        count = part.stop - part.start
        summed(part, row_scale[part], origin, np.zeros(count, np.int32), np.full(count, -1.0), out)

    return make


def _mean_centroids(csr: Csr, item_labels: Any, mean_scale: Any, centroids: Any) -> Callable[[slice], Any]:
    """A function that returns the mean of the centroids of each user's items, for a range of users."""
    clusters, width = centroids.shape
    entries = slice(int(csr.indptr[0]), int(csr.indptr[-1]))
    labels = np.where(item_labels < 0, clusters, item_labels).astype(np.int32)[csr.indices[entries]]
    by_label = Csr(csr.indptr - entries.start, labels, None if csr.weights is None else csr.weights[entries])
    table = np.vstack([centroids, np.zeros((1, width), centroids.dtype)])  # the last row is for items without a label
    make = _aggregating(by_label, table, mean_scale, np.ones(clusters + 1), np.zeros(width))

    def means(part: slice) -> Any:
        out = np.empty((part.stop - part.start, width))
        make(part, out)
        return out

    return means


def _of_ranges(csr: Csr) -> Callable[[slice], tuple[Any, Any, Any]]:
    """A function that returns the interactions of a range of users as the kernels take them."""
    indptr, indices = read_only(csr.indptr, np.int64), read_only(csr.indices, np.int32)
    weights = read_only(_NO_WEIGHTS if csr.weights is None else csr.weights, np.float32)
    return lambda part: (indptr[part.start : part.stop + 1], indices, weights)


def _scales(item_scale: Any) -> Any:
    """The items' scales, or an empty array if all are 1, which saves a random memory access per interaction."""
    return read_only(_NO_SCALE if (item_scale == 1.0).all() else item_scale, np.float64)


def _add_parts(csr: Csr, add: Callable[[slice, Any], None], sums: Any, per_entry: int) -> None:
    """Let ``add`` fill a table for each fixed range of users, and add the tables to ``sums`` in order.

    An interaction adds ``per_entry`` values. There are fewer ranges where a table has more values than all interactions
    add: clearing the tables would take longer.
    """
    count, entries = len(csr.indptr) - 1, int(csr.indptr[-1] - csr.indptr[0])
    parts = max(1, min(PARTS, PARTS_BYTES // max(1, sums.nbytes), entries * per_entry // max(1, sums.size)))

    def work(part: slice) -> Any:
        partial = np.zeros(sums.shape)
        add(part, partial)
        return partial

    for partial in in_order(work, _steps(0, count, max(1, -(-count // parts)))):
        sums += partial


def _ranges(csr: Csr, width: int) -> Iterator[slice]:
    """Split the users into ranges that have about equal numbers of users and of interactions."""
    indptr, users = csr.indptr, len(csr.indptr) - 1
    values = (int(indptr[-1] - indptr[0]) + users) * width
    half = max(1, min(_RANGES, values // _RANGE_VALUES) // 2)
    by_entries = np.searchsorted(indptr, np.linspace(indptr[0], indptr[-1], half + 1).astype(np.int64))
    cuts = np.unique(np.concatenate([by_entries, np.linspace(0, users, half + 1).astype(np.int64)]))
    return (slice(int(start), int(stop)) for start, stop in itertools.pairwise(cuts))


def _tiles(part: slice, width: int) -> Iterator[slice]:
    return _steps(part.start, part.stop, max(1, _TILE_VALUES // max(1, width)))


def _steps(start: int, stop: int, step: int) -> Iterator[slice]:
    return (slice(first, min(first + step, stop)) for first in range(start, stop, step))
