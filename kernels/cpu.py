"""The kernels for the CPU: numba, one pass over the interactions, users split over the cores.

A user's row is always summed by one thread, in the order of its items, so the bytes do not depend on the
number of threads.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba import njit, prange

from .csr import Csr

_PARTS_PER_THREAD = 16
_PARTIAL_BYTES = 256 << 20
_MOST_PARTS = 8
_NO_WEIGHTS = np.empty(0, np.float32)
_NO_LABELS = np.empty(0, np.int32)
_NO_SCALE = np.empty(0, np.float64)


def _cache_folder() -> str | None:
    """A folder of the user's own for compiled code, or None: then every process compiles anew.

    numba's own choice fails on a read-only installation, and a shared folder would be a way in: its index
    is unpickled.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(base) / "gpu-init" / "numba"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return None
    return str(folder) if os.access(folder, os.W_OK | os.X_OK) and folder.stat().st_uid == os.getuid() else None


def _compiled(function: Any) -> Any:
    """Compile in parallel, keeping the machine code where `_cache_folder` says, or where NUMBA_CACHE_DIR does."""
    config: Any = numba.config
    before = config.CACHE_DIR
    folder = before or _cache_folder()
    try:
        config.CACHE_DIR = folder or ""  # read when the decorator runs, so it need not stay set for others
        return njit(parallel=True, cache=folder is not None, nogil=True, error_model="numpy")(function)
    finally:
        config.CACHE_DIR = before


@_compiled
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


@_compiled
def _aggregate(bounds, indptr, indices, weights, features, row_scale, item_scale, out):  # type: ignore[no-untyped-def]
    width = features.shape[1]
    for part in prange(bounds.size - 1):
        total = np.empty(width, np.float64)
        for row in range(bounds[part], bounds[part + 1]):
            total[:] = 0.0
            _add_items(total, row_scale[row], indptr[row], indptr[row + 1], indices, weights, item_scale, features)
            for column in range(width):
                out[row, column] = total[column]


@_compiled
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


@_compiled
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


@_compiled
def _assign(  # type: ignore[no-untyped-def]
    bounds, rows, indptr, indices, weights, table, row_scale, item_scale, lengths, labels, least, second
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
            label = 0
            best = np.inf
            runner_up = np.inf
            for cluster in range(clusters):
                score = lengths[cluster] - 2.0 * row_scale[row] * products[cluster]
                if score < best:
                    runner_up = best
                    best = score
                    label = cluster
                elif score < runner_up:
                    runner_up = score
            labels[at] = label
            least[at] = best
            second[at] = runner_up


@_compiled
def _label_sums(  # type: ignore[no-untyped-def]
    rows, indptr, indices, weights, labels, row_scale, item_scale, partial
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

    def row_sums(self, csr: Csr, item_values: Any) -> Any:
        """See `Kernels.row_sums`."""
        out = np.empty(len(csr.indptr) - 1, np.float64)
        _row_sums(_bounds(csr.indptr), csr.indptr, csr.indices, _or(csr.weights, _NO_WEIGHTS), item_values, out)
        return out

    def aggregate(self, csr: Csr, features: Any, row_scale: Any, item_scale: Any) -> Any:
        """See `Kernels.aggregate`."""
        out = np.empty((len(csr.indptr) - 1, features.shape[1]), np.float32)
        weights = _or(csr.weights, _NO_WEIGHTS)
        _aggregate(_bounds(csr.indptr), csr.indptr, csr.indices, weights, features, row_scale, item_scale, out)
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
        _aggregate_blend(
            _bounds(csr.indptr),
            csr.indptr,
            csr.indices,
            _or(csr.weights, _NO_WEIGHTS),
            features,
            row_scale,
            item_scale,
            lam,
            centroids,
            _or(user_labels, _NO_LABELS),
            _or(item_labels, _NO_LABELS),
            _or(mean_scale, _NO_SCALE),
            cold,
            float(scale),
            out,
        )

    def squared_norms(self, csr: Csr, features: Any, row_scale: Any, item_scale: Any, middle: Any) -> Any:
        """See `Kernels.squared_norms`."""
        out = np.empty(len(csr.indptr) - 1, np.float64)
        weights = _or(csr.weights, _NO_WEIGHTS)
        _squared_norms(
            _bounds(csr.indptr), csr.indptr, csr.indices, weights, features, row_scale, item_scale, middle, out
        )
        return out

    def assign(
        self, csr: Csr, rows: Any, table: Any, row_scale: Any, item_scale: Any, lengths: Any
    ) -> tuple[Any, Any, Any]:
        """See `Kernels.assign`."""
        labels, least, second = np.empty(len(rows), np.int32), np.empty(len(rows)), np.empty(len(rows))
        work = np.concatenate([[0], np.cumsum(csr.indptr[rows + 1] - csr.indptr[rows])])
        weights = _or(csr.weights, _NO_WEIGHTS)
        _assign(
            _bounds(work),
            rows,
            csr.indptr,
            csr.indices,
            weights,
            table,
            row_scale,
            item_scale,
            lengths,
            labels,
            least,
            second,
        )
        return labels, least, second

    def label_sums(self, csr: Csr, rows: Any, labels: Any, row_scale: Any, item_scale: Any, sums: Any) -> None:
        """See `Kernels.label_sums`: fixed ranges of the rows, added up in order."""
        weights = _or(csr.weights, _NO_WEIGHTS)
        parts = max(1, min(_MOST_PARTS, _PARTIAL_BYTES // sums.nbytes))
        partial = np.zeros((parts, *sums.shape))
        _label_sums(rows, csr.indptr, csr.indices, weights, labels, row_scale, item_scale, partial)
        for part in partial:
            sums += part


def _or(array: Any, empty: Any) -> Any:
    """``array``, or a stand-in of no length where there is none: compiled code takes no None."""
    return empty if array is None else array


def _bounds(indptr: Any) -> Any:
    """Split the rows into ranges of about equal work, a user costing one plus its interactions."""
    users = len(indptr) - 1
    work = np.arange(users + 1) + (indptr - indptr[0])
    shares = np.linspace(0, work[-1], _PARTS_PER_THREAD * numba.get_num_threads() + 1)
    bounds = np.searchsorted(work, shares)
    bounds[0], bounds[-1] = 0, users
    return bounds
