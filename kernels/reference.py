"""The definition of the kernels, in plain array expressions in float64: a sparse product, then the blend.

Written against the interface that numpy and cupy share, in blocks of rows, so that memory stays bounded. The tests hold
every other implementation to this one, and small jobs on a CPU run it, as nothing has to be compiled for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from gpu_init.kernels.csr import BlendTerms, Csr

_FEWEST_ROWS = 128  # A block of a matrix has at least so many rows: its product with few rows is slow.


class ReferenceKernels:
    """The kernels as array expressions.

    Parameters
    ----------
    xp, sparse : modules
        numpy and scipy.sparse, or cupy and cupyx.scipy.sparse.
    """

    block_values = 1 << 20  # A block of rows has at most so many values: 8 MiB in float64.
    block_entries = 1 << 20  # A block has at most so many interactions; a longer row is a block of its own.

    def __init__(self, xp: Any, sparse: Any) -> None:
        self.name: str = xp.__name__
        self._xp = xp
        self._sparse = sparse

    def rows_in_place(self) -> None:
        return None

    def lengths(self, rows: Any) -> Any:
        out = self._xp.empty(len(rows), self._xp.float64)

        def work(part: slice) -> None:
            block = rows[part].astype(self._xp.float64)
            out[part] = (block * block).sum(axis=1)

        deque(self._each_block(work, rows), maxlen=0)
        return out

    def row_sums(self, csr: Csr, item_values: Any) -> Any:
        out = self._xp.empty(len(csr.indptr) - 1, self._xp.float64)
        for part in self._parts(csr, 1):
            rows, items, weights = self._triplets(csr.rows(part.start, part.stop))
            values = item_values[items] if weights is None else weights * item_values[items]
            out[part] = self._xp.bincount(rows, weights=values, minlength=part.stop - part.start)
        return out

    def aggregate(self, csr: Csr, features: Any, row_scale: Any, item_scale: Any, offset: Any) -> Any:
        out = self._xp.empty((len(csr.indptr) - 1, features.shape[1]), self._xp.float64)
        for part, rows in self._products(csr, features, row_scale, item_scale):
            out[part] = rows - offset
        return out

    def aggregate_blend(
        self, csr: Csr, features: Any, row_scale: Any, item_scale: Any, blend: BlendTerms, out: Any
    ) -> None:
        lam, centroids, user_labels, item_labels, mean_scale, cold, scale = blend
        xp, clusters = self._xp, len(centroids)
        known = xp.concatenate([centroids, xp.zeros((1, centroids.shape[1]), centroids.dtype)])  # the last: no label
        for part, rows in self._products(csr, features, row_scale, item_scale):
            if item_labels is None:
                cluster_level = centroids[user_labels[part]]  # label -1 takes a row that is replaced below
            else:
                first, last = int(csr.indptr[part.start]), int(csr.indptr[part.stop])
                labels = item_labels[csr.indices[first:last]]
                labels = xp.where(labels < 0, clusters, labels).astype(xp.int32)
                weights = None if csr.weights is None else csr.weights[first:last]
                own = Csr(csr.indptr[part.start : part.stop + 1] - first, labels, weights)
                cluster_level = self._product(own, known, mean_scale[part], xp.ones(clusters + 1))
            share = lam[part][:, None]
            blended = share * rows + (1.0 - share) * cluster_level
            blended[row_scale[part] == 0] = cold
            out[part] = scale * blended

    def squared_norms(self, csr: Csr, features: Any, row_scale: Any, item_scale: Any, offset: Any) -> Any:
        out = self._xp.empty(len(csr.indptr) - 1, self._xp.float64)
        for part in self._parts(csr, features.shape[1]):
            own = csr.rows(part.start, part.stop)
            out[part] = self.lengths(self.aggregate(own, features, row_scale[part], item_scale, offset))
        return out

    def products(self, features: Any, offset: Any, points: Any) -> Any:
        out = self._xp.empty((len(features), len(points)), self._xp.float64)

        def work(part: slice) -> None:
            out[part] = (features[part].astype(self._xp.float64) - offset) @ points.T

        deque(self._each_block(work, features), maxlen=0)
        return out

    def assign(self, csr: Csr, table: Any, row_scale: Any, item_scale: Any, lengths: Any) -> tuple[Any, Any]:
        xp = self._xp
        labels, least = xp.empty(len(row_scale), xp.int32), xp.empty(len(row_scale), xp.float64)
        for part, rows in self._products(csr, table, row_scale, item_scale):
            labels[part], least[part] = self.nearest(rows, lengths)
        cold = row_scale == 0
        labels[cold], least[cold] = -1, 0.0
        return labels, least

    def nearest(self, products: Any, lengths: Any) -> tuple[Any, Any]:
        xp = self._xp
        scores = lengths - 2.0 * products
        labels = scores.argmin(axis=1)
        return labels.astype(xp.int32), xp.take_along_axis(scores, labels[:, None], axis=1)[:, 0]

    def label_sums(self, csr: Csr, labels: Any, row_scale: Any, item_scale: Any, sums: Any) -> None:
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
        xp = self._xp

        def work(part: slice) -> Any:
            factors, rows = table[part], features[part]
            used = (factors != 0).any(axis=1)
            if not used.all():
                rows = xp.where(used[:, None], rows, 0.0)  # 0 times the NaN of a missing item would be NaN
            return factors.T @ rows.astype(xp.float64)

        sums = xp.zeros((table.shape[1], features.shape[1]))
        for partial in self._each_block(work, features):
            sums += partial
        return sums

    def gram(self, csr: Csr, table: Any, row_factors: Any, sums: Any) -> None:
        ones = self._xp.ones(len(table))
        for part in self._parts(csr, table.shape[1]):
            own = csr.rows(part.start, part.stop)
            chosen, operator = self._operator(own, self._xp.ones(part.stop - part.start), ones)
            sums[chosen] += operator.T.tocsr() @ (row_factors[part][:, None] * (operator @ table[chosen]))

    def _products(self, csr: Csr, table: Any, row_scale: Any, item_scale: Any) -> Iterator[tuple[slice, Any]]:
        """``A T`` in float64, block by block: the range of users, and their rows (m, D)."""
        for part in self._parts(csr, table.shape[1]):
            yield part, self._product(csr.rows(part.start, part.stop), table, row_scale[part], item_scale)

    def _product(self, csr: Csr, table: Any, row_scale: Any, item_scale: Any) -> Any:
        """``A T`` in float64."""
        chosen, operator = self._operator(csr, row_scale, item_scale)
        return self._xp.ascontiguousarray(operator @ table[chosen].astype(self._xp.float64))

    def _operator(self, csr: Csr, row_scale: Any, item_scale: Any) -> tuple[Any, Any]:
        """The items of the interactions (or all items, where these are fewer), and A for them as a sparse matrix.

        Entries of 0 are left out, since 0 times a missing item's NaN would be NaN.
        """
        xp = self._xp
        rows, items, weights = self._triplets(csr)
        values = row_scale[rows] * item_scale[items]
        if weights is not None:
            values *= weights
        used = values != 0
        rows, items, values = rows[used], items[used], values[used]
        chosen, count = slice(None), len(item_scale)
        if len(items) < count:
            chosen, items = xp.unique(items, return_inverse=True)
            count = len(chosen)
        return chosen, self._sparse.csr_matrix((values, (rows, items)), shape=(len(csr.indptr) - 1, count))

    def _triplets(self, csr: Csr) -> tuple[Any, Any, Any]:
        """Row within the range, item, and weight in float64 (or None) of each interaction."""
        xp = self._xp
        first, last = int(csr.indptr[0]), int(csr.indptr[-1])
        rows = xp.searchsorted(csr.indptr, xp.arange(first, last), side="right") - 1
        weights = None if csr.weights is None else csr.weights[first:last].astype(xp.float64)
        return rows, csr.indices[first:last], weights

    def _parts(self, csr: Csr, width: int) -> Iterator[slice]:
        """Blocks of users whose rows, and whose items' rows, have at most `block_values` values; or of one user."""
        count, start = len(csr.indptr) - 1, 0
        while start < count:
            most = csr.indptr[start] + min(self._block_rows(width), self.block_entries)
            stop = int(self._xp.searchsorted(csr.indptr, most, side="right")) - 1
            stop = min(max(stop, start + 1), start + self._block_rows(width), count)
            yield slice(start, stop)
            start = stop

    def _block_rows(self, width: int) -> int:
        return max(1, self.block_values // max(1, width))

    def _each_block(self, work: Callable[[slice], Any], rows: Any) -> Iterator[Any]:
        """The results of ``work`` for the blocks of a matrix's rows, in order."""
        step = max(_FEWEST_ROWS, self._block_rows(rows.shape[1]))
        return self._map(work, (slice(start, start + step) for start in range(0, len(rows), step)))

    def _map(self, work: Callable[[slice], Any], parts: Iterable[slice]) -> Iterator[Any]:
        """The results of ``work`` for the parts, in order; here computed one after another."""
        return map(work, parts)
