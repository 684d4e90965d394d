"""The interactions as a sparse matrix R of users by items."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu_init.backend.interface import Backend, ranges
from gpu_init.errors import InputError
from gpu_init.kernels import Csr

_SUM_USERS = 1 << 16  # Sums over users are taken in ranges of so many, in order.
_ENTRIES = 1 << 20  # So many entries of a matrix are put into R at a time.
ROW_BYTES = 48  # Each row of R takes so many bytes: its start, degrees, scales and label.


@dataclass(frozen=True)
class Interactions:
    """R (U x I): canonical rows, that is sorted by item, without duplicates or zeros.

    Attributes
    ----------
    csr : Csr
        ``indptr`` (U + 1,) int64, ``indices`` (nnz,) int32, ``weights`` (nnz,) float32 or None where all are 1.
    items : int
        I, the number of columns.
    """

    csr: Csr
    items: int

    @property
    def users(self) -> int:
        """U, the number of rows."""
        return len(self.csr.indptr) - 1

    @property
    def pairs(self) -> int:
        """Number of user-item pairs that interacted."""
        return int(self.csr.indptr[-1] - self.csr.indptr[0])

    def rows(self, start: int, stop: int) -> Interactions:
        """R of users ``start`` to ``stop``, sharing memory."""
        return Interactions(self.csr.rows(start, stop), self.items)

    def user_degrees(self, backend: Backend, item_values: Any) -> Any:
        """``R v`` for ``v`` (I,) float64: with 1 for the items of a modality, the users' degrees in it (U,)."""
        if self.csr.weights is None and bool((item_values == 1).all()):
            return backend.xp.diff(self.csr.indptr).astype(backend.xp.float64)
        return backend.kernels.row_sums(self.csr, item_values)

    def some(self, backend: Backend, users: Any) -> Interactions:
        """R of some users (n,), one after another."""
        return Interactions(some_rows(backend, self.csr, users), self.items)

    def square_sums(self, backend: Backend, user_values: Any, item_values: Any) -> Any:
        """``sum_i (s_u w_ui)^2 v_i`` for ``s`` (U,) and ``v`` (I,), both float64; returns (U,) float64.

        Shares ``s w`` are at most 1 where ``v`` is not 0. The kernel takes float32, so each square goes in two parts.
        """
        xp = backend.xp
        sums = xp.empty(self.users, xp.float64)
        for part in ranges(self.users, _SUM_USERS):
            csr = self.csr.rows(part.start, part.stop)
            entries, rows = _entries(backend, csr)
            shares = user_values[part][rows] * (1.0 if csr.weights is None else csr.weights[entries])
            squares = xp.minimum(shares, 1.0) ** 2
            high = squares.astype(xp.float32)
            low = (squares - high).astype(xp.float32)
            starts, items = csr.indptr - entries.start, csr.indices[entries]
            sums[part] = sum(backend.kernels.row_sums(Csr(starts, items, each), item_values) for each in (high, low))
        return sums

    def item_sums(self, backend: Backend, user_values: Any = None) -> Any:
        """``R^T v`` for ``v`` (U,) float64, ones if None, then the items' degrees; (I,) float64.

        Over fixed ranges of users, in order.
        """
        xp = backend.xp
        sums = xp.zeros(self.items, xp.float64)
        for part in ranges(self.users, _SUM_USERS):
            entries, rows = _entries(backend, self.csr.rows(part.start, part.stop))
            weights = None if self.csr.weights is None else self.csr.weights[entries].astype(xp.float64)
            if user_values is not None:
                values = user_values[part][rows]
                weights = values if weights is None else weights * values
            sums += xp.bincount(self.csr.indices[entries], weights=weights, minlength=self.items)
        return sums


def _entries(backend: Backend, csr: Csr) -> tuple[slice, Any]:
    """Where the entries of these rows lie in the arrays of R, and the row (n,) of each, from 0 on."""
    entries = slice(int(csr.indptr[0]), int(csr.indptr[-1]))
    numbers = backend.xp.arange(entries.start, entries.stop)
    return entries, backend.xp.searchsorted(csr.indptr, numbers, side="right") - 1


def some_rows(backend: Backend, csr: Csr, users: Any) -> Csr:
    """Copy the rows of some users (n,), one after another."""
    xp = backend.xp
    starts = csr.indptr[users]
    indptr = xp.concatenate([xp.zeros(1, xp.int64), xp.cumsum(csr.indptr[users + 1] - starts)])
    entries = xp.arange(int(indptr[-1]))
    entries += (starts - indptr[:-1])[xp.searchsorted(indptr, entries, side="right") - 1]
    return Csr(indptr, csr.indices[entries], None if csr.weights is None else csr.weights[entries])


def power(xp: Any, degrees: Any, exponent: float) -> Any:
    """Degrees to a negative power; 0 stays 0."""
    used = degrees > 0
    return xp.where(used, xp.where(used, degrees, 1.0) ** exponent, 0.0)


def build(backend: Backend, users: Any, items: Any, weights: Any, shape: tuple[int, int]) -> Interactions:
    """R from one row, column and weight per interaction, in any order; duplicates are summed, zeros dropped.

    Parameters
    ----------
    backend : Backend
        Where the arrays lie.
    users, items : array, shape (n,), int32 or int64
        Row and column of each interaction, within ``shape``.
    weights : array, shape (n,), float, or None
        Taken as float32 and summed in float64; None: 1 per interaction.
    shape : tuple of int
        U and I; their product must be below 2^63.

    Returns
    -------
    Interactions
    """
    xp = backend.xp
    if shape[0] * shape[1] >= 2**63:
        raise InputError(f"{shape[0]} users x {shape[1]} items: the product must stay below 2^63.")
    key = users.astype(xp.int64, copy=False) * shape[1] + items
    if weights is None:
        if not bool((key[1:] >= key[:-1]).all()):
            key = xp.sort(key)
    else:
        weights = weights.astype(xp.float32).astype(xp.float64)
        order = xp.argsort(key, kind="stable")
        if bool((key[order][1:] == key[order][:-1]).any()):  # Sums must not depend on the order of the rows.
            by_weight = xp.argsort(weights, kind="stable")
            order = by_weight[xp.argsort(key[by_weight], kind="stable")]
        key, weights = key[order], weights[order]
    starts = xp.flatnonzero(xp.concatenate([xp.ones(min(1, len(key)), bool), key[1:] != key[:-1]]))
    if weights is None:
        summed = xp.diff(starts, append=xp.asarray([len(key)])).astype(xp.float64)
    else:
        summed = xp.add.reduceat(weights, starts) if len(starts) else weights
    key = key[starts]
    if not bool((summed > 0).all()):
        key, summed = key[summed > 0], summed[summed > 0]
    indptr = xp.searchsorted(key, xp.arange(shape[0] + 1, dtype=xp.int64) * shape[1]).astype(xp.int64)
    indices = (key % shape[1]).astype(xp.int32)
    summed = summed.astype(xp.float32)
    return Interactions(Csr(indptr, indices, None if bool((summed == 1).all()) else summed), shape[1])


def check_weights(backend: Backend, weights: Any, place: str, row: Callable[[int], str]) -> None:
    """Refuse weights that are negative, not a number, or so large or small that float32 sums lose them.

    Raises
    ------
    InputError
        Names the first such row and what stands there.
    """
    xp = backend.xp
    bad = ~((weights == 0) | ((weights >= 1e-30) & (weights <= 1e30)))
    if bool(bad.any()):
        at = int(xp.argmax(bad))
        raise InputError(f"{place}: {row(at)} has weight {float(weights[at])}; weights are 0, or from 1e-30 to 1e30.")


def from_matrix(backend: Backend, matrix: Any, place: str) -> Interactions:
    """R from a scipy or cupyx sparse matrix of any format; its values are the weights.

    Raises
    ------
    InputError
        Not a sparse matrix of numbers, or a weight is negative or not finite.
    """
    if not hasattr(matrix, "tocoo") or len(matrix.shape) != 2:
        raise InputError(f"{place}: found {type(matrix).__name__}; a sparse matrix, users x items, is wanted.")
    if matrix.dtype.kind not in "biuf":
        raise InputError(f"{place}: values of type {matrix.dtype}; weights are numbers.")
    if matrix.shape[1] >= 2**31:
        raise InputError(f"{place}: {matrix.shape[1]} items; at most 2^31 - 1.")
    if matrix.format == "csr" and matrix.has_canonical_format and matrix.nnz and bool((matrix.data > 0).all()):
        weights = backend.asarray(matrix.data)
        check_weights(backend, weights, place, lambda k: f"entry {k}")
        weights = weights.astype("float32")
        if bool((weights > 0).all()):
            one = bool((weights == 1).all())
            indptr, indices = backend.asarray(matrix.indptr), backend.asarray(matrix.indices)
            csr = Csr(indptr.astype("int64"), indices.astype("int32"), None if one else weights)
            return Interactions(csr, matrix.shape[1])
    entries = matrix.tocoo()
    weights = backend.asarray(entries.data.astype("float64"))
    check_weights(backend, weights, place, lambda k: f"entry ({int(entries.row[k])}, {int(entries.col[k])})")
    rows, columns = backend.asarray(entries.row), backend.asarray(entries.col)
    return built(backend, rows, columns, weights, matrix.shape)


def built(backend: Backend, rows: Any, columns: Any, weights: Any, shape: tuple[int, int]) -> Interactions:
    """R as `build` makes it, by the kernels that build it in place where there are such."""
    in_place = backend.kernels.rows_in_place()
    if in_place is None:
        return build(backend, rows.astype("int64"), columns.astype("int64"), weights, shape)
    starts = np.zeros(shape[0] + 1, np.int64)
    parts = list(ranges(len(rows), _ENTRIES))
    for part in parts:
        np.add.at(starts[1:], rows[part], 1)
    filling = in_place(np.cumsum(starts, out=starts), weighted=weights is not None)
    for part in parts:
        own = None if weights is None else weights[part].astype("float32")
        filling.add(rows[part].astype("int64"), columns[part].astype("int64"), own)
    return Interactions(filling.finish(), shape[1])
