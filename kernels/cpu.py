"""The kernels for the CPU: numba, one pass over the interactions, users split over the cores.

A user's row is always summed by one thread, in the order of its items, so the bytes do not depend on the
number of threads.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import njit, prange

from .build import NumbaBuilder
from .compiled import compiled, compiled_serial
from .csr import Csr

_PARTS_PER_THREAD = 16
_PARTIAL_BYTES = 256 << 20
_MOST_PARTS = 8
_NO_WEIGHTS = np.empty(0, np.float32)
_NO_LABELS = np.empty(0, np.int32)
_NO_SCALE = np.empty(0, np.float64)


@compiled
def _row_sums(bounds, indptr, indices, weights, item_values, out):  # type: ignore[no-untyped-def]
    weighted = weights.size > 0
    for part in prange(bounds.size - 1):
        for row in range(bounds[part], bounds[part + 1]):
            total = 0.0
            for entry in range(indptr[row], indptr[row + 1]):
                weight = np.float64(weights[entry]) if weighted else 1.0
                total += weight * item_values[indices[entry]]
            out[row] = total


@njit(inline="always")
def _add_row(total, factor, features, item):  # type: ignore[no-untyped-def]
    for column in range(total.size):
        total[column] += factor * features[item, column]


@njit(inline="always")
def _add_items(  # type: ignore[no-untyped-def]
    total, share, first, last, indices, weights, item_scale, features
):
    """``total += share * sum_i w_i s_i F_i``, four items at a time: their rows are fetched side by side."""
    weighted = weights.size > 0
    entry = first
    while entry + 4 <= last:
        item0, item1, item2, item3 = indices[entry], indices[entry + 1], indices[entry + 2], indices[entry + 3]
        factor0, factor1 = share * item_scale[item0], share * item_scale[item1]
        factor2, factor3 = share * item_scale[item2], share * item_scale[item3]
        if weighted:
            factor0 *= weights[entry]
            factor1 *= weights[entry + 1]
            factor2 *= weights[entry + 2]
            factor3 *= weights[entry + 3]
        if factor0 != 0.0 and factor1 != 0.0 and factor2 != 0.0 and factor3 != 0.0:
            for column in range(total.size):
                total[column] += (
                    factor0 * features[item0, column]
                    + factor1 * features[item1, column]
                    + factor2 * features[item2, column]
                    + factor3 * features[item3, column]
                )
        else:  # a missing item's row may be NaN and is not read
            for item, factor in ((item0, factor0), (item1, factor1), (item2, factor2), (item3, factor3)):
                if factor != 0.0:
                    _add_row(total, factor, features, item)
        entry += 4
    while entry < last:
        item = indices[entry]
        factor = share * item_scale[item]
        if weighted:
            factor *= weights[entry]
        if factor != 0.0:
            _add_row(total, factor, features, item)
        entry += 1


@compiled
def _aggregate(  # type: ignore[no-untyped-def]
    bounds, indptr, indices, weights, features, row_scale, item_scale, middle, out
):
    width = features.shape[1]
    for part in prange(bounds.size - 1):
        total = np.empty(width, np.float64)
        for row in range(bounds[part], bounds[part + 1]):
            for column in range(width):
                total[column] = -middle[column]
            _add_items(total, row_scale[row], indptr[row], indptr[row + 1], indices, weights, item_scale, features)
            for column in range(width):
                out[row, column] = total[column]


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
    out,
):
    weighted = weights.size > 0
    by_item = item_labels.size > 0
    width = features.shape[1]
    for part in prange(bounds.size - 1):
        total = np.empty(width, np.float64)
        for row in range(bounds[part], bounds[part + 1]):
            if row_scale[row] == 0.0:
                for column in range(width):
                    out[row, column] = scale * cold[column]
                continue
            first, last = indptr[row], indptr[row + 1]
            cluster_share = scale * (1.0 - lam[row])
            total[:] = 0.0
            if by_item:
                for entry in range(first, last):
                    label = item_labels[indices[entry]]
                    if label >= 0:
                        weight = np.float64(weights[entry]) if weighted else 1.0
                        _add_row(total, cluster_share * mean_scale[row] * weight, centroids, label)
            else:
                _add_row(total, cluster_share, centroids, user_labels[row])
            share = scale * lam[row] * row_scale[row]
            _add_items(total, share, first, last, indices, weights, item_scale, features)
            for column in range(width):
                out[row, column] = total[column]


@compiled
def _squared_norms(  # type: ignore[no-untyped-def]
    bounds, indptr, indices, weights, features, row_scale, item_scale, middle, out
):
    width = features.shape[1]
    for part in prange(bounds.size - 1):
        total = np.empty(width, np.float64)
        for row in range(bounds[part], bounds[part + 1]):
            for column in range(width):
                total[column] = -middle[column]
            _add_items(total, row_scale[row], indptr[row], indptr[row + 1], indices, weights, item_scale, features)
            squares = 0.0
            for column in range(width):
                squares += total[column] * total[column]
            out[row] = squares


@njit(inline="always")
def _two_least(products, factor, lengths):  # type: ignore[no-untyped-def]
    """Where ``lengths - factor * products`` is least, first of equals, the value there, and the second least."""
    label = 0
    best = np.inf
    runner_up = np.inf
    for cluster in range(lengths.size):
        score = lengths[cluster] - factor * products[cluster]
        if score < best:
            runner_up = best
            best = score
            label = cluster
        elif score < runner_up:
            runner_up = score
    return label, best, runner_up


@compiled
def _assign(  # type: ignore[no-untyped-def]
    bounds, indptr, indices, weights, rows, table, row_scale, item_scale, lengths, labels, least, second
):
    weighted = weights.size > 0
    clusters = table.shape[1]
    for part in prange(bounds.size - 1):
        products = np.empty(clusters, np.float64)
        for at in range(bounds[part], bounds[part + 1]):
            row = rows[at]
            products[:] = 0.0
            for entry in range(indptr[row], indptr[row + 1]):
                item = indices[entry]
                factor = item_scale[item]
                if weighted:
                    factor *= weights[entry]
                if factor != 0.0:
                    _add_row(products, factor, table, item)
            labels[at], least[at], second[at] = _two_least(products, 2.0 * row_scale[row], lengths)


@compiled_serial
def _nearest_two(products, lengths, labels, least, second):  # type: ignore[no-untyped-def]
    for at in range(products.shape[0]):
        labels[at], least[at], second[at] = _two_least(products[at], 2.0, lengths)


@compiled
def _label_sums(  # type: ignore[no-untyped-def]
    indptr, indices, weights, rows, labels, row_scale, item_scale, partial
):
    weighted = weights.size > 0
    parts = partial.shape[0]
    for part in prange(parts):
        for at in range(part * rows.size // parts, (part + 1) * rows.size // parts):
            row = rows[at]
            label = labels[at]
            for entry in range(indptr[row], indptr[row + 1]):
                item = indices[entry]
                factor = row_scale[row] * item_scale[item]
                if weighted:
                    factor *= weights[entry]
                partial[part, item, label] += factor


class NumbaKernels:
    """The kernels on numpy arrays, compiled for this machine at first use."""

    name = "numba"

    def builder(self) -> NumbaBuilder:
        """See `Kernels.builder`."""
        return NumbaBuilder()

    def row_sums(self, csr: Csr, item_values: Any) -> Any:
        """See `Kernels.row_sums`."""
        out = np.empty(len(csr.indptr) - 1, np.float64)
        _row_sums(_bounds(csr.indptr), *_inputs(*csr, item_values), out)
        return out

    def aggregate(self, csr: Csr, features: Any, row_scale: Any, item_scale: Any, middle: Any, dtype: Any) -> Any:
        """See `Kernels.aggregate`."""
        out = np.empty((len(csr.indptr) - 1, features.shape[1]), dtype)
        _aggregate(_bounds(csr.indptr), *_inputs(*csr, features, row_scale, item_scale, middle), out)
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
        labels = (_NO_LABELS if one is None else one for one in (user_labels, item_labels))
        mean_scale = _NO_SCALE if mean_scale is None else mean_scale
        arrays = _inputs(*csr, features, row_scale, item_scale, lam, centroids, *labels, mean_scale, cold)
        _aggregate_blend(_bounds(csr.indptr), *arrays, float(scale), out)

    def squared_norms(self, csr: Csr, features: Any, row_scale: Any, item_scale: Any, middle: Any) -> Any:
        """See `Kernels.squared_norms`."""
        out = np.empty(len(csr.indptr) - 1, np.float64)
        _squared_norms(_bounds(csr.indptr), *_inputs(*csr, features, row_scale, item_scale, middle), out)
        return out

    def assign(
        self, csr: Csr, rows: Any, table: Any, row_scale: Any, item_scale: Any, lengths: Any
    ) -> tuple[Any, Any, Any]:
        """See `Kernels.assign`."""
        labels, least, second = np.empty(len(rows), np.int32), np.empty(len(rows)), np.empty(len(rows))
        work = np.concatenate([[0], np.cumsum(csr.indptr[rows + 1] - csr.indptr[rows])])
        arrays = _inputs(*csr, rows, table, row_scale, item_scale, lengths)
        _assign(_bounds(work), *arrays, labels, least, second)
        return labels, least, second

    def nearest_two(self, products: Any, lengths: Any) -> tuple[Any, Any, Any]:
        """See `Kernels.nearest_two`."""
        labels, least, second = np.empty(len(products), np.int32), np.empty(len(products)), np.empty(len(products))
        _nearest_two(products, lengths, labels, least, second)
        return labels, least, second

    def label_sums(self, csr: Csr, rows: Any, labels: Any, row_scale: Any, item_scale: Any, sums: Any) -> None:
        """See `Kernels.label_sums`: fixed ranges of the rows, added up in order."""
        parts = max(1, min(_MOST_PARTS, _PARTIAL_BYTES // sums.nbytes))
        partial = np.zeros((parts, *sums.shape))
        _label_sums(*_inputs(*csr, rows, labels, row_scale, item_scale), partial)
        for part in partial:
            sums += part


def _inputs(indptr: Any, indices: Any, weights: Any, *others: Any) -> list[Any]:
    """Read-only views, so that mapped and owned arrays share one compilation; no weights are none of length 0."""
    views = [
        array.view(np.ndarray) for array in (indptr, indices, _NO_WEIGHTS if weights is None else weights, *others)
    ]
    for view in views:
        view.flags.writeable = False
    return views


def _bounds(indptr: Any) -> Any:
    """Split the rows into ranges of about equal work, a user costing one plus its interactions."""
    users = len(indptr) - 1
    work = np.arange(users + 1) + (indptr - indptr[0])
    shares = np.linspace(0, work[-1], _PARTS_PER_THREAD * numba.get_num_threads() + 1)
    bounds = np.searchsorted(work, shares)
    bounds[0], bounds[-1] = 0, users
    return bounds
