"""The fused kernels and their launcher: the reference first, its twins beside it, one interface over all."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Protocol

from gpu_init.errors import InputError
from gpu_init.kernels.csr import Csr
from gpu_init.kernels.threads import PARTS, PARTS_BYTES

if TYPE_CHECKING:
    from gpu_init.kernels.build import Rows

__all__ = [
    "NUMPY_SECONDS",
    "PARTS",
    "PARTS_BYTES",
    "Csr",
    "Kernels",
    "compile_all",
    "cpu_kernels",
    "forced_kernels",
    "kernels_for",
    "prepare",
]


class Kernels(Protocol):
    """What every implementation gives; arrays are those of one device.

    In all methods, ``csr`` holds the interactions of a range of n users, and ``row_scale`` (n,) and ``item_scale``
    (I,), both float64, make the operator ``A = diag(row_scale) R diag(item_scale)``. An item whose scale is 0 is not
    read, so the rows of missing items may hold NaN. A user whose row scale is 0 is cold: it has no usable interaction.
    ``offset`` (D,) float64 is a point that is subtracted from rows: distances between rows keep more digits then.
    """

    name: str

    def lengths(self, rows: Any) -> Any:
        """Squared Euclidean length of each row of a matrix (n, D) of floats; returns (n,) float64."""

    def row_sums(self, csr: Csr, item_values: Any) -> Any:
        """``R v`` for one column ``v`` (I,) float64; returns (n,) float64."""

    def aggregate(self, csr: Csr, features: Any, row_scale: Any, item_scale: Any, offset: Any) -> Any:
        """``A F - offset`` for features F (I, D); returns (n, D) float64, C order."""

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
        ``mean_scale_u * sum_i w_ui C[label_i]`` over items whose label is not negative. A cold user gets
        ``scale * cold``.
        """

    # For K-means on the rows of A F, which are never stored (see gpu_init.kmeans).

    def squared_norms(self, csr: Csr, features: Any, row_scale: Any, item_scale: Any, offset: Any) -> Any:
        """``|(A F)_u - offset|^2`` for each row; returns (n,) float64."""

    def products(self, features: Any, offset: Any, points: Any) -> Any:
        """``(F - offset) P^T`` for features F (I, D) and points P (K, D) float64; returns (I, K) float64.

        Rows of missing items may hold NaN, and their products are then NaN.
        """

    def assign(self, csr: Csr, table: Any, row_scale: Any, item_scale: Any, lengths: Any) -> tuple[Any, Any]:
        """Nearest centroid of each user, by ``lengths_k - 2 (A table)_uk``.

        ``table`` (I, K) float64 holds the products of items and centroids, ``lengths`` (K,) float64 the centroids'
        squared lengths. Returns the labels (n,) int32, the first of equals, and the least scores (n,) float64; a cold
        user has label -1 and score 0.
        """

    def nearest(self, products: Any, lengths: Any) -> tuple[Any, Any]:
        """As `assign`, for rows whose products with the centroids (n, K) float64 are known already."""

    def label_sums(self, csr: Csr, labels: Any, row_scale: Any, item_scale: Any, sums: Any) -> None:
        """Add ``A^T Z`` to ``sums`` (I, K) float64, where Z is the one-hot form of the labels (n,) int32.

        Users with a negative label are left out.
        """

    def table_sums(self, table: Any, features: Any) -> Any:
        """``T^T F`` for a table T (I, K) float64 and features F (I, D); returns (K, D) float64.

        A row of F is not read where all of its factors are 0.
        """

    def gram(self, csr: Csr, table: Any, row_factors: Any, sums: Any) -> None:
        """Add ``R^T diag(row_factors) R T`` to ``sums`` (I, b) float64, for a table T (I, b) float64, C order."""

    def rows_in_place(self) -> type[Rows] | None:
        """What makes R from batches of interactions in place, or None: then the caller holds them all and sorts."""


NUMPY_SECONDS = 5.0
"""Work that takes numpy's kernels about so long, or less, is theirs: compiling others may take longer than that."""


def cpu_kernels(name: str) -> Kernels:
    """Give the CPU's kernels of a name: ``numba``, or ``numpy``, the plain reference."""
    if name == "numpy":
        import numpy as np
        import scipy.sparse

        from gpu_init.kernels.reference import ReferenceKernels

        return ReferenceKernels(np, scipy.sparse)
    from gpu_init.kernels.cpu import NumbaKernels

    return NumbaKernels()


def prepare(reading: bool, fitting: bool, on_interactions: bool) -> None:
    """Begin to compile numba's kernels for a CPU, in a thread of their own: for reading, fitting, or both."""
    from gpu_init.kernels import build, cpu, ids
    from gpu_init.kernels.compiled import prepare

    prepare(
        [
            *((ids.CODING[0], *build.READING) if reading else ()),
            *(cpu.INTERACTIONS_ONLY if fitting and on_interactions else ()),
            *(cpu.FITTING if fitting else ()),
        ]
    )


def compile_all() -> tuple[int, str | None]:
    """Compile all of numba's kernels; gives how many they are, and the folder where their machine code is kept."""
    from gpu_init.kernels import build, cpu, ids
    from gpu_init.kernels.compiled import folder

    every = (*ids.CODING, *build.READING, build.MERGING, *cpu.INTERACTIONS_ONLY, *cpu.FITTING)
    for one in every:
        one.prepare()
    return len(every), folder()


def kernels_for(seconds: float) -> str:
    """Name of the CPU's kernels that suit work which would take numpy's so many seconds on two cores.

    The work is estimated by the sizes of the job alone. It does not matter what is compiled already, nor how many cores
    there are, so that the bytes of the result depend on the inputs only.

    Raises
    ------
    InputError
        As in `forced_kernels`.
    """
    return forced_kernels() or ("numpy" if seconds <= NUMPY_SECONDS else "numba")


def forced_kernels() -> str | None:
    """Name of the CPU's kernels that ``GPU_INIT_KERNELS`` asks for, whatever the work; None where it does not.

    Raises
    ------
    InputError
        It is neither ``numba`` nor ``numpy``.
    """
    wanted = os.environ.get("GPU_INIT_KERNELS")
    if wanted not in (None, "numba", "numpy"):
        raise InputError(f"GPU_INIT_KERNELS={wanted}: numba or numpy are the kernels there are.")
    return wanted
