"""The kernels: `reference` defines them with array expressions; `cpu` (numba) and `cuda` are the fast versions."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Protocol

from gpu_init.errors import InputError
from gpu_init.kernels.csr import BlendTerms, Csr
from gpu_init.kernels.threads import PARTS, PARTS_BYTES

if TYPE_CHECKING:
    from gpu_init.kernels.build import Rows

__all__ = [
    "NUMPY_SECONDS",
    "PARTS",
    "PARTS_BYTES",
    "BlendTerms",
    "Csr",
    "Kernels",
    "compile_all",
    "cpu_kernels",
    "forced_kernels",
    "kernels_for",
    "prepare",
]


class Kernels(Protocol):
    """The methods of every implementation; their arrays are those of one device.

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
        self, csr: Csr, features: Any, row_scale: Any, item_scale: Any, blend: BlendTerms, out: Any
    ) -> None:
        """``scale * (lam_u (A F)_u + (1 - lam_u) G_u)`` in one pass, into ``out`` (n, D) float32, C order.

        A cold user gets ``scale * cold``. `BlendTerms` defines the other symbols.
        """

    # K-means uses the following methods on the rows of A F, which are never stored.

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
        """Class that builds R from batches in R's own memory; None if the caller must hold and sort them all."""


NUMPY_SECONDS = 5.0
"""The numpy kernels do work that takes them about so long or less, since compiling others may take longer."""


def cpu_kernels(name: str) -> Kernels:
    """The CPU kernels with a name: ``numba``, or ``numpy``, the plain reference."""
    if name == "numpy":
        import numpy as np
        import scipy.sparse

        from gpu_init.kernels.reference import ReferenceKernels

        return ReferenceKernels(np, scipy.sparse)
    from gpu_init.kernels.cpu import NumbaKernels

    return NumbaKernels()


def prepare(reading: bool, fitting: bool, on_interactions: bool) -> None:
    """Start to compile the numba kernels for reading, fitting, or both, in a thread of its own."""
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
    """Compile all numba kernels; returns their number, and the folder that keeps their machine code."""
    from gpu_init.kernels import build, cpu, ids
    from gpu_init.kernels.compiled import folder

    every = (*ids.CODING, *build.READING, build.MERGING, *cpu.INTERACTIONS_ONLY, *cpu.FITTING)
    for one in every:
        one.prepare()
    return len(every), folder()


def kernels_for(seconds: float) -> str:
    """Name of the CPU kernels to use for work that takes the numpy kernels so many seconds on two cores.

    The estimate depends on the sizes of the job alone, and not on what is compiled already or on the number of cores,
    so that the bytes of the result depend on the inputs only.

    Raises
    ------
    InputError
        ``GPU_INIT_KERNELS`` is neither ``numba`` nor ``numpy``.
    """
    return forced_kernels() or ("numpy" if seconds <= NUMPY_SECONDS else "numba")


def forced_kernels() -> str | None:
    """Name of the CPU kernels that ``GPU_INIT_KERNELS`` demands for any work; None if it is not set.

    Raises
    ------
    InputError
        ``GPU_INIT_KERNELS`` is neither ``numba`` nor ``numpy``.
    """
    wanted = os.environ.get("GPU_INIT_KERNELS")
    if wanted not in (None, "numba", "numpy"):
        raise InputError(f"GPU_INIT_KERNELS={wanted}: numba or numpy are the kernels there are.")
    return wanted
