"""What the kernels compute, in the plainest way: a sparse product, then the blend, in float64.

Written against the interface that numpy and cupy share. The tests hold every other implementation to this one.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from .csr import Csr


class ReferenceKernels:
    """The kernels of section 2 of the design as array expressions."""

    def __init__(self, xp: Any, sparse: Any) -> None:
        self.name: str = xp.__name__
        self._xp = xp
        self._sparse = sparse

    def builder(self) -> None:
        """See `Kernels.builder`: `gpu_init.interactions.build` is the plain way."""

    def leaving_a_core(self) -> AbstractContextManager[Any]:
        """See `Kernels.leaving_a_core`: these take one core, or none."""
        return nullcontext()

    def lengths(self, rows: Any) -> Any:
        """See `Kernels.lengths`."""
        rows = rows.astype(self._xp.float64)
        return (rows * rows).sum(axis=1)

    def row_sums(self, csr: Csr, item_values: Any) -> Any:
        """See `Kernels.row_sums`."""
        rows, items, weights = self._triplets(csr)
        return self._xp.bincount(rows, weights=weights * item_values[items], minlength=len(csr.indptr) - 1)

    def aggregate(self, csr: Csr, features: Any, row_scale: Any, item_scale: Any, middle: Any, dtype: Any) -> Any:
        """See `Kernels.aggregate`."""
        return (self._product(csr, features, row_scale, item_scale) - middle).astype(dtype)

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
        if item_labels is None:
            cluster_level = centroids.astype(xp.float64)[user_labels]  # label -1 takes a row that is replaced below
        else:
            labelled = (item_labels >= 0).astype(xp.float64)
            cluster_level = self._product(csr, centroids[item_labels], mean_scale, labelled)
        share = lam[:, None]
        blended = share * self._product(csr, features, row_scale, item_scale) + (1.0 - share) * cluster_level
        blended[row_scale == 0] = cold
        out[...] = scale * blended

    def squared_norms(self, csr: Csr, features: Any, row_scale: Any, item_scale: Any, middle: Any) -> Any:
        """See `Kernels.squared_norms`."""
        rows = self._product(csr, features, row_scale, item_scale) - middle
        return (rows * rows).sum(axis=1)

    def products(self, features: Any, middle: Any, points: Any, dtype: Any) -> Any:
        """See `Kernels.products`."""
        return (features.astype(dtype) - middle.astype(dtype)) @ points.T.astype(dtype)

    def assign(
        self, csr: Csr, rows: Any, table: Any, row_scale: Any, item_scale: Any, lengths: Any
    ) -> tuple[Any, Any, Any]:
        """See `Kernels.assign`."""
        return self.nearest_two(self._product(csr, table, row_scale, item_scale)[rows], lengths)

    def nearest_two(self, products: Any, lengths: Any) -> tuple[Any, Any, Any]:
        """See `Kernels.nearest_two`."""
        xp = self._xp
        scores = lengths - 2.0 * products
        labels = scores.argmin(axis=1)
        least = xp.take_along_axis(scores, labels[:, None], axis=1)[:, 0]
        xp.put_along_axis(scores, labels[:, None], xp.inf, axis=1)
        return labels.astype(xp.int32), least, scores.min(axis=1)

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
        xp = self._xp
        upper[rows] = xp.sqrt(xp.maximum(least + norms[rows], 0.0)) - reach[found]
        lower[rows] = xp.sqrt(xp.maximum(second + norms[rows], 0.0)) + fall
        before = labels[rows]
        labels[rows] = found
        return before

    def in_doubt(self, labels: Any, upper: Any, lower: Any, reach: Any, fall: float) -> Any:
        """See `Kernels.in_doubt`."""
        return self._xp.flatnonzero(upper + reach[labels] > lower - fall)

    def count(self, labels: Any, sign: int, counts: Any) -> None:
        """See `Kernels.count`."""
        counts += sign * self._xp.bincount(labels[labels >= 0], minlength=len(counts))

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
        """See `Kernels.move_rows`."""
        made = self._product(csr, features, row_scale, item_scale)[rows] - middle
        one_hot = self._xp.eye(len(sums))
        signs = (after >= 0)[:, None] * one_hot[after] - (before >= 0)[:, None] * one_hot[before]
        sums += signs.T @ made

    def label_sums(self, csr: Csr, rows: Any, labels: Any, row_scale: Any, item_scale: Any, sums: Any) -> None:
        """See `Kernels.label_sums`."""
        one_hot = self._xp.eye(sums.shape[1])[labels]
        sums += self._operator(csr, row_scale, item_scale)[rows].T.tocsr() @ one_hot

    def table_sums(self, table: Any, features: Any) -> Any:  # noqa: ARG002
        """See `Kernels.table_sums`."""
        return None

    def gram(self, csr: Csr, table: Any, row_factors: Any, sums: Any) -> None:
        """See `Kernels.gram`."""
        ones = self._xp.ones
        operator = self._operator(csr, ones(len(row_factors)), ones(len(table)))
        sums += operator.T.tocsr() @ (row_factors[:, None] * (operator @ table))

    def _product(self, csr: Csr, table: Any, row_scale: Any, item_scale: Any) -> Any:
        operator = self._operator(csr, row_scale, item_scale)
        return self._xp.ascontiguousarray(operator @ table.astype(self._xp.float64))

    def _operator(self, csr: Csr, row_scale: Any, item_scale: Any) -> Any:
        rows, items, weights = self._triplets(csr)
        values = row_scale[rows] * weights * item_scale[items]
        used = values != 0  # a missing item's row may be NaN, and NaN times 0 is NaN
        shape = (len(csr.indptr) - 1, len(item_scale))
        return self._sparse.csr_matrix((values[used], (rows[used], items[used])), shape=shape)

    def _triplets(self, csr: Csr) -> tuple[Any, Any, Any]:
        """Row within the range, item, and weight in float64 of each interaction."""
        xp = self._xp
        first, last = int(csr.indptr[0]), int(csr.indptr[-1])
        rows = xp.searchsorted(csr.indptr, xp.arange(first, last), side="right") - 1
        weights = xp.ones(last - first) if csr.weights is None else csr.weights[first:last].astype(xp.float64)
        return rows, csr.indices[first:last], weights
