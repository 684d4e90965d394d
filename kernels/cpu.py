"""The kernels for the CPU: numba, one pass over the interactions, users split over the cores.

A user's row is always summed by one thread, in the order of its items, so the bytes do not depend on the
number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numba
import numpy as np
from numba import prange

from . import PARTS, PARTS_BYTES
from .arrays import empty
from .build import NumbaBuilder
from .compiled import compiled, compiled_reordering, inner, inner_reordering
from .csr import Csr
from .vectors import STREAM_BYTES, add_rows, finish_streams, prefetch, prefetch_row

_PARTS_PER_THREAD = 16
_AHEAD = 16  # interactions that a row of a table is asked for before it is used
_NEXT = 8  # the same of the features' rows
_EVEN_PARTS = 64
_FLOAT_BYTES = 4
_NEAR_BYTES = 4 << 20  # a table up to this size is in the caches, and its rows need not be asked for ahead
_STREAMED_BYTES = 32 << 20  # less is left in the caches, for whoever reads it next
_LOOKED_AT = 4096  # rows whose interactions are counted to split many rows
_LISTED = 64  # items of a user whose columns are summed in registers, in one go


@compiled
def _row_sums(bounds, indptr, indices, weights, item_values, out):  # type: ignore[no-untyped-def]
    for part in prange(bounds.size - 1):
        for row in range(bounds[part], bounds[part + 1]):
            total = 0.0
            for entry in range(indptr[row], indptr[row + 1]):
                total += _factor(np.float64, item_values[indices[entry]], weights, entry, None, 0)
            out[row] = total


@inner
def _factor(kind, share, weights, entry, item_scale, item):  # type: ignore[no-untyped-def]
    factor = share
    if item_scale is not None:
        factor *= item_scale[item]
    if weights is not None:
        factor *= weights[entry]
    return kind(factor)


# As loops, since numba takes seconds to compile the same of whole arrays.


@inner
def _fill(values, value):  # type: ignore[no-untyped-def]
    for at in range(values.size):
        values[at] = value


@inner
def _copy(values, to):  # type: ignore[no-untyped-def]
    for at in range(values.size):
        to[at] = values[at]


@inner
def _add_row(total, factor, features, item):  # type: ignore[no-untyped-def]
    if factor != 0.0:  # a missing item's row may be NaN and is not read
        for column in range(total.size):
            total[column] += factor * features[item, column]


@inner
def _add_columns(  # type: ignore[no-untyped-def]
    out, row, start, share, table, items, factors, weights, item_scale, count, streamed, soon
):
    """``out[row] = start + share * sum_n factors[n] * table[items[n]]``: see `add_rows`.

    As many columns at a time as registers hold.
    """
    column, width = 0, start.size
    while factors.itemsize > _FLOAT_BYTES and column + 32 <= width:
        add_rows(out, row, start, share, table, items, factors, weights, item_scale, count, column, 32, streamed, soon)
        column += 32
    while column + 128 <= width:
        add_rows(out, row, start, share, table, items, factors, weights, item_scale, count, column, 128, streamed, soon)
        column += 128
    while column + 64 <= width:
        add_rows(out, row, start, share, table, items, factors, weights, item_scale, count, column, 64, streamed, soon)
        column += 64
    while column + 8 <= width:
        add_rows(out, row, start, share, table, items, factors, weights, item_scale, count, column, 8, streamed, soon)
        column += 8
    while column < width:
        add_rows(out, row, start, share, table, items, factors, weights, item_scale, count, column, 1, False, soon)
        column += 1


@inner
def _add_listed(  # type: ignore[no-untyped-def]
    out, row, start, share, first, last, soon, indices, weights, item_scale, table, items, factors, streamed
):
    """``out[row] = start + share * sum_i w_i s_i F_i``, `_LISTED` interactions at most, in the type of ``factors``.

    ``soon``: items that follow, whose rows are asked for; or None.
    """
    if weights is None and item_scale is None:
        chosen = indices[first:last]
        _add_columns(out, row, start, share, table, chosen, factors, weights, item_scale, last - first, streamed, soon)
        return
    count = 0
    for entry in range(first, last):
        items[count] = indices[entry]
        factors[count] = _factor(factors.dtype.type, share, weights, entry, item_scale, indices[entry])
        count += factors[count] != 0.0  # a missing item's row may be NaN and is not read
    _add_columns(out, row, start, 1.0, table, items, factors, weights, item_scale, count, streamed, soon)


@inner
def _sum_items(  # type: ignore[no-untyped-def]
    out, row, start, share, first, last, stop, indices, weights, item_scale, features, space, streamed
):
    """``out[row] = start + share * sum_i w_i s_i F_i``, the rows fetched ahead, up to ``stop``.

    ``space`` is where it works: (D,) float64, and `_LISTED` items and factors, in whose type up to `_LISTED` items are
    summed. A busy user's are gathered in the float64 ones, and ``start`` is overwritten.
    """
    whole, items, factors = space
    own = (indices, weights, item_scale, features, items, factors)
    if last - first <= _LISTED:
        _add_listed(out, row, start, share, first, last, indices[first + _NEXT : stop], *own, streamed)
        return
    _copy(start, whole)
    for begin in range(first, last, _LISTED):
        soon = indices[begin + _NEXT : stop]
        _add_listed(whole, 0, whole, share, begin, min(begin + _LISTED, last), soon, *own, False)
    _copy(whole, start)
    _add_listed(out, row, start, share, first, first, indices[first:first], *own, streamed)


@compiled
def _aggregate(  # type: ignore[no-untyped-def]
    bounds, indptr, indices, weights, features, row_scale, item_scale, middle, out
):
    width = features.shape[1]
    for part in prange(bounds.size - 1):
        total = np.empty(width, out.dtype)
        space = np.empty(width, np.float64), np.empty(_LISTED, indices.dtype), np.empty(_LISTED, out.dtype)
        stop = indptr[bounds[part + 1]]
        for row in range(bounds[part], bounds[part + 1]):
            for column in range(width):
                total[column] = -middle[column]
            first, last = indptr[row], indptr[row + 1]
            share = row_scale[row]
            _sum_items(out, row, total, share, first, last, stop, indices, weights, item_scale, features, space, False)


@compiled
def _aggregate_blend(  # type: ignore[no-untyped-def]
    bounds,
    indptr,
    indices,
    weights,
    features,
    row_scale,
    item_scale,
    lam,
    centroids,
    user_labels,
    item_labels,
    mean_scale,
    cold,
    scale,
    streamed,
    out,
):
    width = features.shape[1]
    for part in prange(bounds.size - 1):
        total, whole = np.empty(width, np.float32), np.empty(width, np.float64)
        space = whole, np.empty(_LISTED, indices.dtype), np.empty(_LISTED, np.float32)
        stop = indptr[bounds[part + 1]]
        for row in range(bounds[part], bounds[part + 1]):
            if row_scale[row] == 0.0:
                for column in range(width):
                    out[row, column] = scale * cold[column]
                continue
            first, last = indptr[row], indptr[row + 1]
            cluster_share = scale * (1.0 - lam[row])
            if item_labels is not None:
                _fill(whole, 0.0)
                for entry in range(first, last):
                    label = item_labels[indices[entry]]
                    if label >= 0:
                        share = cluster_share * mean_scale[row]
                        _add_row(whole, _factor(np.float64, share, weights, entry, None, 0), centroids, label)
                _copy(whole, total)
            if user_labels is not None:
                factor = np.float32(cluster_share)
                for column in range(width):
                    total[column] = factor * centroids[user_labels[row], column]
            share = scale * lam[row] * row_scale[row]
            _sum_items(
                out, row, total, share, first, last, stop, indices, weights, item_scale, features, space, streamed
            )
        finish_streams()


@inner
def _squared_length(values, space):  # type: ignore[no-untyped-def]
    """Sum of the squares in float64, with ``space`` to work in: by halves, one order and yet in vectors."""
    for column in range(values.size):
        space[column] = np.float64(values[column]) * np.float64(values[column])
    left = values.size
    while left > 1:
        half = left // 2
        for column in range(half):
            space[column] += space[left - half + column]
        left -= half
    return space[0]


@compiled
def _lengths(rows, out):  # type: ignore[no-untyped-def]
    for part in prange(_EVEN_PARTS):
        space = np.empty(rows.shape[1], np.float64)
        for row in range(part * out.size // _EVEN_PARTS, (part + 1) * out.size // _EVEN_PARTS):
            out[row] = _squared_length(rows[row], space)


@compiled
def _squared_norms(  # type: ignore[no-untyped-def]
    bounds, indptr, indices, weights, features, row_scale, item_scale, middle, out
):
    width = features.shape[1]
    for part in prange(bounds.size - 1):
        total = np.empty(width, np.float64)
        space = total, np.empty(_LISTED, indices.dtype), np.empty(_LISTED, np.float64)
        stop = indptr[bounds[part + 1]]
        for row in range(bounds[part], bounds[part + 1]):
            for column in range(width):
                total[column] = -middle[column]
            first, last = indptr[row], indptr[row + 1]
            share = row_scale[row]
            _sum_items(total, 0, total, share, first, last, stop, indices, weights, item_scale, features, space, False)
            out[row] = _squared_length(total, total)


@inner
def _two_least(products, factor, lengths):  # type: ignore[no-untyped-def]
    """Where ``lengths - factor * products`` is least, first of equals, the value there, and the second least."""
    label = 0
    best = np.inf
    runner_up = np.inf
    for cluster in range(lengths.size):  # in selections: a processor guesses branches wrong here
        score = lengths[cluster] - factor * products[cluster]
        loser = best if score < best else score
        runner_up = loser if loser < runner_up else runner_up
        label = cluster if score < best else label
        best = score if score < best else best
    return label, best, runner_up


@compiled
def _assign(  # type: ignore[no-untyped-def]
    bounds, indptr, indices, weights, rows, table, row_scale, item_scale, lengths, far, labels, least, second
):
    for part in prange(bounds.size - 1):
        products = np.empty(table.shape[1], np.float64)
        items, factors = np.empty(_LISTED, indices.dtype), np.empty(_LISTED, table.dtype)
        for at in range(bounds[part], bounds[part + 1]):
            row = rows[at]
            if at + 2 * _AHEAD < bounds[part + 1]:
                prefetch(indices, indptr[rows[at + 2 * _AHEAD]])
            if far and at + _AHEAD < bounds[part + 1]:
                soon = rows[at + _AHEAD]
                for entry in range(indptr[soon], min(indptr[soon + 1], indptr[soon] + _LISTED)):
                    prefetch_row(table, indices[entry])
            _fill(products, 0.0)
            for first in range(indptr[row], indptr[row + 1], _LISTED):
                last = min(first + _LISTED, indptr[row + 1])
                own = (indices, weights, item_scale, table, items, factors)
                _add_listed(products, 0, products, 1.0, first, last, None, *own, False)
            labels[at], least[at], second[at] = _two_least(products, 2.0 * row_scale[row], lengths)


@inner_reordering
def _product(features, middle, points, item, point, out):  # type: ignore[no-untyped-def]
    total = out.dtype.type(0)
    for column in range(features.shape[1]):
        total += (features[item, column] - middle[column]) * points[point, column]
    out[item, point] = total


@compiled_reordering
def _products(features, middle, points, out):  # type: ignore[no-untyped-def]
    zero = out.dtype.type(0)
    width = features.shape[1]
    for part in prange(_EVEN_PARTS):
        item, last = part * out.shape[0] // _EVEN_PARTS, (part + 1) * out.shape[0] // _EVEN_PARTS
        while item + 2 <= last:  # two items by four points: what is read serves several times
            point = 0
            while point + 4 <= out.shape[1]:
                sum00, sum01, sum02, sum03 = zero, zero, zero, zero
                sum10, sum11, sum12, sum13 = zero, zero, zero, zero
                for column in range(width):
                    value0 = features[item, column] - middle[column]
                    value1 = features[item + 1, column] - middle[column]
                    point0, point1 = points[point, column], points[point + 1, column]
                    point2, point3 = points[point + 2, column], points[point + 3, column]
                    sum00 += value0 * point0
                    sum01 += value0 * point1
                    sum02 += value0 * point2
                    sum03 += value0 * point3
                    sum10 += value1 * point0
                    sum11 += value1 * point1
                    sum12 += value1 * point2
                    sum13 += value1 * point3
                out[item, point], out[item, point + 1] = sum00, sum01
                out[item, point + 2], out[item, point + 3] = sum02, sum03
                out[item + 1, point], out[item + 1, point + 1] = sum10, sum11
                out[item + 1, point + 2], out[item + 1, point + 3] = sum12, sum13
                point += 4
            while point < out.shape[1]:
                _product(features, middle, points, item, point, out)
                _product(features, middle, points, item + 1, point, out)
                point += 1
            item += 2
        if item < last:
            for point in range(out.shape[1]):
                _product(features, middle, points, item, point, out)


@compiled
def _nearest_two(products, lengths, labels, least, second):  # type: ignore[no-untyped-def]
    for at in prange(products.shape[0]):
        labels[at], least[at], second[at] = _two_least(products[at], 2.0, lengths)


@compiled
def _note(  # type: ignore[no-untyped-def]
    rows, found, least, second, norms, reach, fall, labels, upper, lower, before
):
    for part in prange(_EVEN_PARTS):
        for at in range(part * rows.size // _EVEN_PARTS, (part + 1) * rows.size // _EVEN_PARTS):
            row = rows[at]
            upper[row] = np.sqrt(max(least[at] + norms[row], 0.0)) - reach[found[at]]
            lower[row] = np.sqrt(max(second[at] + norms[row], 0.0)) + fall
            before[at] = labels[row]
            labels[row] = found[at]


@compiled
def _in_doubt(labels, upper, lower, reach, fall, rows, counts):  # type: ignore[no-untyped-def]
    for part in prange(_EVEN_PARTS):
        first, last = part * labels.size // _EVEN_PARTS, (part + 1) * labels.size // _EVEN_PARTS
        count = 0
        for row in range(first, last):
            rows[first + count] = row  # taken back by the next one unless it counts
            count += upper[row] + reach[labels[row]] > lower[row] - fall
        counts[part] = count


@compiled
def _move_rows(  # type: ignore[no-untyped-def]
    indptr, indices, weights, rows, features, row_scale, item_scale, middle, before, after, partial
):
    width = features.shape[1]
    parts = partial.shape[0]
    for part in prange(parts):
        total = np.empty(width, np.float64)
        space = total, np.empty(_LISTED, indices.dtype), np.empty(_LISTED, np.float64)
        for at in range(part * rows.size // parts, (part + 1) * rows.size // parts):
            row = rows[at]
            first, last = indptr[row], indptr[row + 1]
            for entry in range(first, last):  # the next row may be anywhere: this one's items alone are asked for
                prefetch_row(features, indices[entry])
            for column in range(width):
                total[column] = -middle[column]
            share = row_scale[row]
            _sum_items(total, 0, total, share, first, last, first, indices, weights, item_scale, features, space, False)
            if before[at] >= 0:
                for column in range(width):
                    partial[part, before[at], column] -= total[column]
            if after[at] >= 0:
                for column in range(width):
                    partial[part, after[at], column] += total[column]


@compiled
def _label_sums(  # type: ignore[no-untyped-def]
    indptr, indices, weights, rows, labels, row_scale, item_scale, far, partial
):
    parts = partial.shape[0]
    for part in prange(parts):
        last = (part + 1) * rows.size // parts
        sums = partial[part]
        places = sums.reshape(sums.size)
        for at in range(part * rows.size // parts, last):
            row = rows[at]
            label = labels[at]
            if far and at + _AHEAD < last:
                soon = rows[at + _AHEAD]
                for entry in range(indptr[soon], min(indptr[soon + 1], indptr[soon] + _LISTED)):
                    prefetch(places, indices[entry] * sums.shape[1] + labels[at + _AHEAD])
            for entry in range(indptr[row], indptr[row + 1]):
                item = indices[entry]
                sums[item, label] += _factor(np.float64, row_scale[row], weights, entry, item_scale, item)


@compiled
def _gram(indptr, indices, weights, table, row_factors, far, partial):  # type: ignore[no-untyped-def]
    width, parts = table.shape[1], partial.shape[0]
    work = indptr[-1] - indptr[0]
    for part in prange(parts):
        products, sums = np.empty(width, np.float64), partial[part]
        items, factors = np.empty(_LISTED, indices.dtype), np.empty(_LISTED, np.float64)
        first = np.searchsorted(indptr, indptr[0] + part * work // parts) if part > 0 else 0
        last = np.searchsorted(indptr, indptr[0] + (part + 1) * work // parts) if part + 1 < parts else indptr.size - 1
        stop = indptr[last]
        for row in range(first, last):
            _fill(products, 0.0)
            if far:
                for entry in range(indptr[row] + _AHEAD, min(indptr[row + 1] + _AHEAD, stop)):
                    prefetch_row(table, indices[entry])
                    prefetch_row(sums, indices[entry])
            for start in range(indptr[row], indptr[row + 1], _LISTED):
                end = min(start + _LISTED, indptr[row + 1])
                own = (indices, weights, None, table, items, factors)
                _add_listed(products, 0, products, 1.0, start, end, None, *own, False)
            row_factor = row_factors[row]
            for column in range(width):
                products[column] *= row_factor
            for entry in range(indptr[row], indptr[row + 1]):
                item, factor = indices[entry], _factor(np.float64, 1.0, weights, entry, None, 0)
                for column in range(width):
                    sums[item, column] += factor * products[column]


class NumbaKernels:
    """The kernels on numpy arrays, compiled for this machine at first use."""

    name = "numba"

    def builder(self) -> NumbaBuilder:
        """See `Kernels.builder`."""
        return NumbaBuilder()

    @contextmanager
    def leaving_a_core(self) -> Iterator[None]:
        """See `Kernels.leaving_a_core`: threads that had to share one would hold back the others."""
        threads = numba.get_num_threads()
        numba.set_num_threads(max(1, threads - 1))
        try:
            yield
        finally:
            numba.set_num_threads(threads)

    def lengths(self, rows: Any) -> Any:
        """See `Kernels.lengths`."""
        out = np.empty(len(rows), np.float64)
        values = rows if rows.dtype.itemsize >= _FLOAT_BYTES else rows.astype(np.float32)  # numba knows no float16
        _lengths(*_inputs(values), out)
        return out

    def row_sums(self, csr: Csr, item_values: Any) -> Any:
        """See `Kernels.row_sums`."""
        out = np.empty(len(csr.indptr) - 1, np.float64)
        _row_sums(_bounds(csr.indptr), *_inputs(*csr, item_values), out)
        return out

    def aggregate(self, csr: Csr, features: Any, row_scale: Any, item_scale: Any, middle: Any, dtype: Any) -> Any:
        """See `Kernels.aggregate`."""
        out = np.empty((len(csr.indptr) - 1, features.shape[1]), dtype)
        _aggregate(_bounds(csr.indptr), *_inputs(*csr, features, row_scale, _scale(item_scale), middle), out)
        return out

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
        """See `Kernels.aggregate_blend`."""
        labels = (user_labels, item_labels, mean_scale)
        arrays = _inputs(*csr, features, row_scale, _scale(item_scale), lam, centroids, *labels, cold)
        aligned = out.strides[0] % STREAM_BYTES == 0 and out.ctypes.data % STREAM_BYTES == 0
        streamed = aligned and out.nbytes >= _STREAMED_BYTES
        _aggregate_blend(_bounds(csr.indptr), *arrays, float(scale), streamed, out)

    def squared_norms(self, csr: Csr, features: Any, row_scale: Any, item_scale: Any, middle: Any) -> Any:
        """See `Kernels.squared_norms`."""
        out = np.empty(len(csr.indptr) - 1, np.float64)
        _squared_norms(_bounds(csr.indptr), *_inputs(*csr, features, row_scale, _scale(item_scale), middle), out)
        return out

    def products(self, features: Any, middle: Any, points: Any, dtype: Any) -> Any:
        """See `Kernels.products`."""
        out = empty((len(features), len(points)), dtype)
        _products(*_inputs(features, middle.astype(dtype), points.astype(dtype)), out)
        return out

    def assign(
        self, csr: Csr, rows: Any, table: Any, row_scale: Any, item_scale: Any, lengths: Any
    ) -> tuple[Any, Any, Any]:
        """See `Kernels.assign`."""
        labels, least, second = np.empty(len(rows), np.int32), np.empty(len(rows)), np.empty(len(rows))
        arrays = _inputs(*csr, rows, table, row_scale, _scale(item_scale), lengths)
        far = table.nbytes > _NEAR_BYTES
        _assign(_bounds_of(rows, csr.indptr), *arrays, far, labels, least, second)
        return labels, least, second

    def nearest_two(self, products: Any, lengths: Any) -> tuple[Any, Any, Any]:
        """See `Kernels.nearest_two`."""
        labels, least, second = np.empty(len(products), np.int32), np.empty(len(products)), np.empty(len(products))
        _nearest_two(products, lengths, labels, least, second)
        return labels, least, second

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
        before = np.empty(len(rows), np.int32)
        _note(*_inputs(rows, found, least, second, norms, reach), float(fall), labels, upper, lower, before)
        return before

    def in_doubt(self, labels: Any, upper: Any, lower: Any, reach: Any, fall: float) -> Any:
        """See `Kernels.in_doubt`."""
        rows, counts = np.empty(len(labels), np.int64), np.empty(_EVEN_PARTS, np.int64)
        _in_doubt(*_inputs(labels, upper, lower, reach), float(fall), rows, counts)
        total = 0
        for start, count in zip(np.arange(_EVEN_PARTS) * len(labels) // _EVEN_PARTS, counts, strict=True):
            rows[total : total + count] = rows[start : start + count]
            total += int(count)
        return rows[:total] if 2 * total > len(labels) else rows[:total].copy()

    def count(self, labels: Any, sign: int, counts: Any) -> None:
        """See `Kernels.count`."""
        counts += sign * np.bincount(labels[labels >= 0], minlength=len(counts))

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
        """See `Kernels.move_rows`: fixed ranges of the rows, added up in order."""
        arrays = _inputs(*csr, rows, features, row_scale, _scale(item_scale), middle, before, after)
        _add_ranges(_move_rows, arrays, sums)

    def label_sums(self, csr: Csr, rows: Any, labels: Any, row_scale: Any, item_scale: Any, sums: Any) -> None:
        """See `Kernels.label_sums`: fixed ranges of the rows, added up in order."""
        arrays = _inputs(*csr, rows, labels, row_scale, _scale(item_scale))
        _add_ranges(_label_sums, [*arrays, sums.nbytes > _NEAR_BYTES], sums)

    def table_sums(self, table: Any, features: Any) -> Any:  # noqa: ARG002
        """See `Kernels.table_sums`."""
        return None

    def gram(self, csr: Csr, table: Any, row_factors: Any, sums: Any) -> None:
        """See `Kernels.gram`: fixed ranges of the rows, added up in order."""
        arrays = _inputs(*csr, table, row_factors)
        _add_ranges(_gram, [*arrays, sums.nbytes > _NEAR_BYTES], sums)


def _inputs(*arrays: Any) -> list[Any]:
    """Read-only views, so that mapped and owned arrays share one compilation; None compiles to code without it."""
    views = [None if array is None else array.view(np.ndarray) for array in arrays]
    for view in views:
        if view is not None:
            view.flags.writeable = False
    return views


def _add_ranges(kernel: Any, arrays: list[Any], sums: Any) -> None:
    """Add to ``sums`` what a kernel sums of fixed ranges, each into an array of its own, in their order."""
    partial = np.zeros((max(1, min(PARTS, PARTS_BYTES // sums.nbytes)), *sums.shape))
    kernel(*arrays, partial)
    for part in partial:
        sums += part


def _scale(item_scale: Any) -> Any:
    """No scale where all are 1: one access at random less for each interaction."""
    return None if (item_scale == 1.0).all() else item_scale


def _bounds_of(rows: Any, indptr: Any) -> Any:
    """Split some rows (m,) into ranges of about equal work, by the interactions of one in so many."""
    step = max(1, len(rows) // _LOOKED_AT)
    some = rows[::step]
    bounds = step * _bounds(np.concatenate([[0], np.cumsum(indptr[some + 1] - indptr[some])]))
    bounds[-1] = len(rows)
    return np.minimum(bounds, len(rows))


def _bounds(indptr: Any) -> Any:
    """Split the rows into ranges of about equal work, a user costing one plus its interactions."""
    users = len(indptr) - 1
    work = np.arange(users + 1) + (indptr - indptr[0])
    shares = np.linspace(0, work[-1], _PARTS_PER_THREAD * numba.get_num_threads() + 1)
    bounds = np.searchsorted(work, shares)
    bounds[0], bounds[-1] = 0, users
    return bounds
