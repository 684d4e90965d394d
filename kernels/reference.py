"""What the kernels compute, in the plainest way, in float64: a sparse product, then the blend.

Written against the interface that numpy and cupy share, in blocks of rows, so that memory stays bounded. The tests hold
every other implementation to this one, and small jobs on a CPU run it, as nothing has to be compiled for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .csr import Csr

BLOCK_VALUES = 1 << 21  # float64 values of a block of rows: 16 MiB
BLOCK_ENTRIES = 1 << 20  # interactions of a block of rows, at most: a longer row is a block of its own


class ReferenceKernels:
    """The kernels as array expressions.

    Parameters
    ----------
    xp, sparse : modules
        numpy and scipy.sparse, or cupy and cupyx.scipy.sparse.
    """

    def __init__(self, xp: Any, sparse: Any) -> None:
        self.name: str = xp.__name__
        self._xp = xp
        self._sparse = sparse

    def rows_in_place(self) -> None:
        """See `Kernels.rows_in_place`: `gpu_init.interactions.build` is the plain way."""

    def lengths(self, rows: Any) -> Any:
        """See `Kernels.lengths`."""
        out = self._xp.empty(len(rows), self._xp.float64)
        for part in _ranges(len(rows), _block_rows(rows.shape[1])):
            block = rows[part].astype(self._xp.float64)
            out[part] = (block * block).sum(axis=1)
        return out

    def row_sums(self, csr: Csr, item_values: Any) -> Any:
        """See `Kernels.row_sums`."""
        out = self._xp.empty(len(csr.indptr) - 1, self._xp.float64)
        for part in self._parts(csr, 1):
            rows, items, weights = self._triplets(csr.rows(part.start, part.stop))
            values = item_values[items] if weights is None else weights * item_values[items]
            out[part] = self._xp.bincount(rows, weights=values, minlength=part.stop - part.start)
        return out

    def aggregate(self, csr: Csr, features: Any, row_scale: Any, item_scale: Any, offset: Any) -> Any:
        """See `Kernels.aggregate`."""
        out = self._xp.empty((len(csr.indptr) - 1, features.shape[1]), self._xp.float64)
        for part, rows in self._products(csr, features, row_scale, item_scale):
            out[part] = rows - offset
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
        xp = self._xp
        labelled = None if item_labels is None else (item_labels >= 0).astype(xp.float64)
        for part, rows in self._products(csr, features, row_scale, item_scale):
            if labelled is None:
                cluster_level = centroids[user_labels[part]]  # label -1 takes a row that is replaced below
            else:
                own = csr.rows(part.start, part.stop)
                cluster_level = self._product(own, centroids, mean_scale[part], labelled, item_labels)
            share = lam[part][:, None]
            blended = share * rows + (1.0 - share) * cluster_level
            blended[row_scale[part] == 0] = cold
            out[part] = scale * blended

    def squared_norms(self, csr: Csr, features: Any, row_scale: Any, item_scale: Any, offset: Any) -> Any:
        """See `Kernels.squared_norms`."""
        out = self._xp.empty(len(csr.indptr) - 1, self._xp.float64)
        for part, rows in self._products(csr, features, row_scale, item_scale):
            apart = rows - offset
            out[part] = (apart * apart).sum(axis=1)
        return out

    def products(self, features: Any, offset: Any, points: Any) -> Any:
        """See `Kernels.products`: every row is summed alike, whatever the number of rows or threads."""
        out = self._xp.empty((len(features), len(points)), self._xp.float64)
        for part in _ranges(len(features), _block_rows(features.shape[1])):
            out[part] = (features[part].astype(self._xp.float64) - offset) @ points.T
        return out

    def assign(self, csr: Csr, table: Any, row_scale: Any, item_scale: Any, lengths: Any) -> tuple[Any, Any]:
        """See `Kernels.assign`."""
        xp = self._xp
        labels, least = xp.empty(len(row_scale), xp.int32), xp.empty(len(row_scale), xp.float64)
        for part, rows in self._products(csr, table, row_scale, item_scale):
            labels[part], least[part] = self.nearest(rows, lengths)
        cold = row_scale == 0
        labels[cold], least[cold] = -1, 0.0
        return labels, least

    def nearest(self, products: Any, lengths: Any) -> tuple[Any, Any]:
        """See `Kernels.nearest`."""
        xp = self._xp
        scores = lengths - 2.0 * products
        labels = scores.argmin(axis=1)
        return labels.astype(xp.int32), xp.take_along_axis(scores, labels[:, None], axis=1)[:, 0]

    def label_sums(self, csr: Csr, labels: Any, row_scale: Any, item_scale: Any, sums: Any) -> None:
        """See `Kernels.label_sums`."""
        items, clusters = sums.shape
        for part in self._parts(csr, 1):
            rows, columns, weights = self._triplets(csr.rows(part.start, part.stop))
            values = row_scale[part][rows] * item_scale[columns]
            if weights is not None:
                values *= weights
            own = labels[part][rows]
            used = own >= 0
            places = columns[used].astype(self._xp.int64) * clusters + own[used]
            added = self._xp.bincount(places, weights=values[used], minlength=items * clusters)
            sums += added.reshape(items, clusters)

    def table_sums(self, table: Any, features: Any) -> Any:
        """See `Kernels.table_sums`."""
        xp = self._xp
        sums = xp.zeros((table.shape[1], features.shape[1]))
        for part in _ranges(len(features), _block_rows(features.shape[1])):
            used = (table[part] != 0).any(axis=1)
            sums += table[part][used].T @ features[part][used].astype(xp.float64)
        return sums

    def gram(self, csr: Csr, table: Any, row_factors: Any, sums: Any) -> None:
        """See `Kernels.gram`."""
        ones = self._xp.ones(len(table))
        for part in self._parts(csr, table.shape[1]):
            own = csr.rows(part.start, part.stop)
            operator = self._operator(own, self._xp.ones(part.stop - part.start), ones)
            sums += operator.T.tocsr() @ (row_factors[part][:, None] * (operator @ table))

    def _products(self, csr: Csr, table: Any, row_scale: Any, item_scale: Any) -> Iterator[tuple[slice, Any]]:
        """``A T`` in float64, block by block: the range of users, and their rows (m, D)."""
        for part in self._parts(csr, table.shape[1]):
            yield part, self._product(csr.rows(part.start, part.stop), table, row_scale[part], item_scale)

    def _product(self, csr: Csr, table: Any, row_scale: Any, item_scale: Any, rows_of: Any = None) -> Any:
        """``A T`` in float64; with ``rows_of`` (I,), item i has row ``rows_of[i]`` of the table."""
        xp = self._xp
        operator = self._operator(csr, row_scale, item_scale)
        chosen = None
        if rows_of is not None:
            chosen = rows_of
        elif operator.nnz < len(table):  # a few users of many items: the other items are not even read
            chosen, own = xp.unique(operator.indices, return_inverse=True)
            shape = (operator.shape[0], len(chosen))
            operator = self._sparse.csr_matrix((operator.data, own.astype(xp.int32), operator.indptr), shape=shape)
        dense = (table if chosen is None else table[chosen]).astype(xp.float64)
        return xp.ascontiguousarray(operator @ dense)

    def _operator(self, csr: Csr, row_scale: Any, item_scale: Any) -> Any:
        """A as a sparse matrix; entries of 0 are left out, since 0 times a missing item's NaN would be NaN."""
        rows, items, weights = self._triplets(csr)
        values = row_scale[rows] * item_scale[items]
        if weights is not None:
            values *= weights
        used = values != 0
        shape = (len(csr.indptr) - 1, len(item_scale))
        return self._sparse.csr_matrix((values[used], (rows[used], items[used])), shape=shape)

    def _triplets(self, csr: Csr) -> tuple[Any, Any, Any]:
        """Row within the range, item, and weight in float64 (or None) of each interaction."""
        xp = self._xp
        first, last = int(csr.indptr[0]), int(csr.indptr[-1])
        rows = xp.searchsorted(csr.indptr, xp.arange(first, last), side="right") - 1
        weights = None if csr.weights is None else csr.weights[first:last].astype(xp.float64)
        return rows, csr.indices[first:last], weights

    def _parts(self, csr: Csr, width: int) -> Iterator[slice]:
        """Ranges of users with about `BLOCK_VALUES` values of rows, and as many interactions, at a time."""
        count, start = len(csr.indptr) - 1, 0
        while start < count:
            most = csr.indptr[start] + BLOCK_ENTRIES
            stop = int(self._xp.searchsorted(csr.indptr, most, side="right")) - 1
            stop = min(max(stop, start + 1), start + _block_rows(width), count)
            yield slice(start, stop)
            start = stop


def _block_rows(width: int) -> int:
    return max(1, BLOCK_VALUES // max(1, width))


def _ranges(count: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, count)) for start in range(0, count, step))
