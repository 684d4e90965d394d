"""Features in slices of columns, where they do not fit into memory at once, and kernels that take them so."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from gpu_init.kernels.csr import Csr

ROW_BYTES = 8192  # that a row is worth which is read at random: two pages
FEW_SHARE = 1 / 16  # of the features that so many rows are worth at most
_T = TypeVar("_T")


class Columns:
    """Items' features (I, D) float32, of which one slice of columns is open at a time.

    Parameters
    ----------
    paths : sequence of str
        Of the slices, in order.
    bounds : sequence of int
        First column of each slice, and D.
    items : int
        I.
    take : callable
        Opens a path: gives an array (I, d) of the device.
    pick : callable
        Gives the rows (n, D) of some items (n,) by themselves.
    """

    dtype = np.dtype(np.float32)

    def __init__(
        self,
        paths: Sequence[str],
        bounds: Sequence[int],
        items: int,
        take: Callable[[str], Any],
        pick: Callable[[Any], Any],
    ) -> None:
        self.shape = (items, bounds[-1])
        self.pick = pick
        self._paths, self._bounds, self._take = paths, bounds, take
        self._open: tuple[int, Any] | None = None

    def __len__(self) -> int:
        return self.shape[0]

    def few(self, interactions: int) -> bool:
        """Whether the items of so many interactions are better picked than looked up in all slices."""
        return interactions * ROW_BYTES <= FEW_SHARE * self.dtype.itemsize * self.shape[0] * self.shape[1]

    def map(self, function: Callable[[slice, Any], _T]) -> list[_T]:
        """What a function gives of each slice: which columns it has, and the array."""
        bounds = self._bounds
        return [
            function(slice(bounds[number], bounds[number + 1]), self._opened(number))
            for number in range(len(self._paths))
        ]

    def _opened(self, number: int) -> Any:
        if self._open is None or self._open[0] != number:
            self._open = None  # before there are two
            self._open = (number, self._take(self._paths[number]))
        return self._open[1]


def of_columns(features: Any, function: Callable[[slice, Any], _T]) -> list[_T]:
    """As `Columns.map`; an array is a single slice."""
    return features.map(function) if isinstance(features, Columns) else [function(slice(None), features)]


class ColumnKernels:
    """Kernels of a device, of which those that factored K-means and the policies call take `Columns` for features too.

    What they sum over the columns is summed slice after slice.
    """

    def __init__(self, kernels: Any, xp: Any) -> None:
        self._kernels, self._xp = kernels, xp

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernels, name)

    def lengths(self, rows: Any) -> Any:
        """See `Kernels.lengths`."""
        return _sum(of_columns(rows, lambda _, values: self._kernels.lengths(values)))

    def aggregate(self, csr: Any, features: Any, row_scale: Any, item_scale: Any, offset: Any) -> Any:
        """See `Kernels.aggregate`."""
        if isinstance(features, Columns) and features.few(int(csr.indptr[-1] - csr.indptr[0])):
            return self._of_picked(csr, features, row_scale, item_scale, offset)

        def rows(columns: slice, values: Any) -> Any:
            return self._kernels.aggregate(csr, values, row_scale, item_scale, offset[columns])

        found = of_columns(features, rows)
        return found[0] if len(found) == 1 else self._xp.concatenate(found, axis=1)

    def _of_picked(self, csr: Any, features: Columns, row_scale: Any, item_scale: Any, offset: Any) -> Any:
        """See `Kernels.aggregate`, from the rows of the items that come up alone."""
        entries = slice(int(csr.indptr[0]), int(csr.indptr[-1]))
        items, own = self._xp.unique(csr.indices[entries], return_inverse=True)
        weights = None if csr.weights is None else csr.weights[entries]
        chosen = Csr(csr.indptr - entries.start, own.astype(np.int32), weights)
        return self._kernels.aggregate(chosen, features.pick(items), row_scale, item_scale[items], offset)

    def squared_norms(self, csr: Any, features: Any, row_scale: Any, item_scale: Any, offset: Any) -> Any:
        """See `Kernels.squared_norms`."""

        def norms(columns: slice, values: Any) -> Any:
            return self._kernels.squared_norms(csr, values, row_scale, item_scale, offset[columns])

        return _sum(of_columns(features, norms))

    def products(self, features: Any, offset: Any, points: Any) -> Any:
        """See `Kernels.products`."""

        def products(columns: slice, values: Any) -> Any:
            own = self._xp.ascontiguousarray(points[:, columns])
            return self._kernels.products(values, offset[columns], own)

        return _sum(of_columns(features, products))


def _sum(parts: list[Any]) -> Any:
    return functools.reduce(operator.add, parts)
