"""The fused kernels and their launcher: the reference first, its twins beside it, one interface over all."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import Any, Protocol

from gpu_init.errors import InputError

from .csr import Csr

__all__ = ["PARTS", "PARTS_BYTES", "Builder", "Csr", "Kernels", "Numbers", "Rows", "Texts", "cpu_kernels"]


PARTS = 8  # of some rows, summed side by side on a CPU into tables of their own, in a fixed order
PARTS_BYTES = 128 << 20  # that these tables take together: fewer parts where one is larger than an eighth


class Kernels(Protocol):
    """What every implementation gives; arrays are those of one device.

    In all three, ``csr`` holds the rows of a range of users, and ``row_scale`` (n,) and ``item_scale`` (I,),
    both float64, make the operator ``A = diag(row_scale) R diag(item_scale)``. An item whose scale is 0 is
    not read, so that rows of missing items may hold NaN. Sums run in the type of the result, a busy
    user's in float64.
    """

    name: str

    def leaving_a_core(self) -> AbstractContextManager[Any]:
        """Inside, kernels leave a core to another thread, such as one that writes what they give."""

    def lengths(self, rows: Any) -> Any:
        """Squared Euclidean length of each row of a matrix (n, D) of floats; returns (n,) float64."""

    def row_sums(self, csr: Csr, item_values: Any) -> Any:
        """``R v`` for one column ``v`` (I,) float64; returns (n,) float64."""

    def aggregate(self, csr: Csr, features: Any, row_scale: Any, item_scale: Any, middle: Any, dtype: Any) -> Any:
        """``A F - middle`` for features (I, D) and a point (D,) float64; returns (n, D) of the dtype, C order."""

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
        """``scale * (lam_u (A F)_u + (1 - lam_u) G_u)`` in one pass, into ``out`` (n, D) float32, C order.

        With ``user_labels`` (n,), ``G_u`` is the centroid (K, D) of the user's label. With ``item_labels``
        (I,) instead, it is the mean of the centroids of the user's items, weighted by the interactions:
        ``mean_scale_u * sum_i w_ui C[label_i]`` over items whose label is not negative. A user whose
        ``row_scale`` is 0 has no usable interaction and gets ``scale * cold``.
        """

    # For K-means on the rows of A F that are never made (see gpu_init.kmeans).

    def squared_norms(self, csr: Csr, features: Any, row_scale: Any, item_scale: Any, middle: Any) -> Any:
        """``|(A F)_u - middle|^2`` for each row; returns (n,) float64."""

    def products(self, features: Any, middle: Any, points: Any, dtype: Any) -> Any:
        """``(F - middle) P^T`` for features (I, D), middle (D,) float64 and points (K, D); returns (I, K) of the dtype.

        Taken in the dtype. Rows of missing items may hold NaN, and their products are then NaN.
        """

    def assign(
        self, csr: Csr, rows: Any, table: Any, row_scale: Any, item_scale: Any, lengths: Any
    ) -> tuple[Any, Any, Any]:
        """Nearest centroid of the given rows (m,) by ``lengths_k - 2 (A table)_uk``.

        ``table`` (I, K) holds the products of items and centroids, ``lengths`` (K,) the centroids' squared
        lengths. Returns the labels (m,) int32, the first of equals, and the least and second least score
        (m,) float64, the latter infinite for a single centroid.
        """

    def nearest_two(self, products: Any, lengths: Any) -> tuple[Any, Any, Any]:
        """As `assign`, for rows whose products with the centroids (m, K) are there."""

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
        """Write down what `assign` found of the given rows (m,), each once, in arrays (n,) over all rows.

        ``labels`` takes ``found``; ``upper`` and ``lower`` take the distances, the roots of ``least + norms`` and
        ``second + norms``, less ``reach`` (K,) of the label and more ``fall``. Returns the labels before (m,) int32.
        """

    def in_doubt(self, labels: Any, upper: Any, lower: Any, reach: Any, fall: float) -> Any:
        """Rows (m,) int64, ascending, where ``upper + reach[labels] > lower - fall``: others keep their label."""

    def count(self, labels: Any, sign: int, counts: Any) -> None:
        """Add ``sign`` to ``counts`` (K,) int64 for each of the labels (m,) int32 that is not negative."""

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
        """Take the given rows (m,) of ``A F - middle`` from ``sums[before]`` and add them to ``sums[after]``.

        ``sums`` (K, D) float64; ``before`` and ``after`` (m,) int32, negative for none. Rows are made in float64.
        """

    def label_sums(self, csr: Csr, rows: Any, labels: Any, row_scale: Any, item_scale: Any, sums: Any) -> None:
        """Add ``A^T Z`` of the given rows (m,), Z their labels (m,) one-hot, to ``sums`` (I, K) float64."""

    def table_sums(self, table: Any, features: Any) -> Any:
        """``T^T F``, (K, D) float64, for T (I, K) float64 and features (I, D); rows whose factors are 0 may be NaN.

        None: nothing here is faster than products of the library, block by block.
        """

    def gram(self, csr: Csr, table: Any, row_factors: Any, sums: Any) -> None:
        """Add ``R^T diag(row_factors) R T`` to ``sums`` (I, b) float64, for a table T (I, b) float64, C order."""

    def builder(self) -> Builder | None:
        """What makes R from batches of interactions, or None: then the caller holds them all and sorts."""


class Builder(Protocol):
    """Makes R from batches of interactions in little more memory than R takes: counts first, then fills."""

    def count(self, rows: Any, degrees: Any) -> None:
        """Add 1 to ``degrees`` (U,) int64 for each of ``rows`` (n,) int64, all within [0, U)."""

    def numbers(self) -> Numbers:
        """Start with no number known."""

    def texts(self) -> Texts:
        """Start with no text known."""

    def rows(self, starts: Any, weighted: bool) -> Rows:
        """Start R from ``starts`` (U + 1,) int64, where each row starts and the last ends; it becomes `indptr`.

        Raises
        ------
        ResourceError
            R does not fit in memory.
        """


class Numbers(Protocol):
    """Distinct whole numbers, coded 0, 1, ... in order of appearance, and how often each came."""

    def encode(self, numbers: Any) -> Any:
        """Codes (n,) int32 of ``numbers`` (n,) int64, new ones for those not seen before; counts them."""

    def find(self, numbers: Any) -> Any:
        """Codes (n,) int32 of ``numbers`` (n,) int64, -1 for those not seen before."""

    def known(self) -> tuple[Any, Any]:
        """The numbers (m,) int64 in order of their codes, and how often each came (m,) int64."""


class Texts(Protocol):
    """Distinct texts, coded 0, 1, ... in order of appearance, and how often each came.

    Texts (n,) are the bytes of all, uint8, and ``starts`` (n + 1,) int64, where each starts among them and the last
    ends.
    """

    def encode(self, starts: Any, data: Any) -> Any:
        """Codes (n,) int32 of texts, new ones for those not seen before; counts them."""

    def find(self, starts: Any, data: Any) -> Any:
        """Codes (n,) int32 of texts, -1 for those not seen before."""

    def known(self) -> tuple[Any, Any, Any]:
        """``starts`` and bytes of the texts (m,) in order of their codes, and how often each came (m,) int64."""


class Rows(Protocol):
    """Interactions on their way into R."""

    def add(self, rows: Any, columns: Any, weights: Any) -> None:
        """Put rows and columns (n,) int64 and weights (n,) float32 or None where they belong.

        Over all calls each row must come as often as ``starts`` says; what does not fit is left out,
        and so is a call with rows outside R.
        """

    def finish(self) -> Csr:
        """Canonical rows: sorted by item; duplicates summed in float64, in order of weight; no zeros."""


def cpu_kernels() -> Kernels:
    """Give the CPU kernels: numba, or the plain reference with ``GPU_INIT_KERNELS=numpy``.

    Raises
    ------
    InputError
        ``GPU_INIT_KERNELS`` is neither ``numba`` nor ``numpy``.
    """
    wanted = os.environ.get("GPU_INIT_KERNELS", "numba")
    if wanted == "numpy":
        import numpy as np
        import scipy.sparse

        from .reference import ReferenceKernels

        return ReferenceKernels(np, scipy.sparse)
    if wanted == "numba":
        from .cpu import NumbaKernels

        return NumbaKernels()
    raise InputError(f"GPU_INIT_KERNELS={wanted}: numba or numpy are the kernels there are.")
