"""The interface that the backends for a CPU and for CUDA share."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import numpy as np

from gpu_init.kernels import Kernels

LIBRARIES = ("cupy", "cudf", "cuml")


class Backend(Protocol):
    """A device and its libraries; the docstring of `gpu_init.backend` lists them."""

    name: str  # "cpu" or "cuda"
    why: str  # the reason for the choice, which a run reports
    say: Callable[[str], None]  # tells the user one line
    kernels: Kernels
    xp: Any  # numpy or cupy
    sparse: Any  # the module with sparse matrices of these arrays
    tables: Any  # pandas or cudf
    kmeans_name: str  # the manifest's name for `kmeans`
    kmeans_dtype: str  # dtype of the rows that `kmeans` takes

    def with_kernels(self, name: str) -> Backend:  # noqa: ARG002
        """Give the same backend with the kernels of this name, ``numpy`` or ``numba``; CUDA has only its own."""
        return self

    def prepare(self, reading: bool, fitting: bool, on_interactions: bool) -> None:
        """Compile, in the background, the kernels that a large job needs for reading or for fitting."""

    def asarray(self, array: Any) -> Any:
        """Give the array on this device, in C order, without a copy where none is needed."""

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Make an array on this device, in C order, aligned as suits the kernels best."""

    def to_host(self, array: Any) -> np.ndarray[Any, Any]:
        """Give the array as one of numpy."""

    def deterministic(self) -> contextlib.AbstractContextManager[Any]:
        """Inside, dense products give the same bytes whatever the number of threads."""
        return contextlib.nullcontext()

    def local_cluster(self, **options: Any) -> Any:
        """Start Dask workers on this machine, one for each core or for each CUDA device.

        Raises
        ------
        InputError
            A library for it is missing.
        """

    def in_order(self, function: Callable[[slice], Any], parts: Iterable[slice]) -> Iterator[Any]:
        """Give ``function`` of each part, in order. A CPU runs parts side by side, each inside `deterministic`."""
        return map(function, parts)

    def kmeans(self, matrix: Any, clusters: int, seed: int, restarts: int) -> Any:
        """Centroids (K, D) that a library's K-means finds for the rows of a matrix (n, D)."""

    def takes_matrix(self, rows: int, width: int, clusters: int, wanted: str) -> bool:
        """Whether `kmeans` should run, on a matrix (n, D) that is made for it.

        ``wanted`` is "own", "cuml", or "auto", which takes the cheaper of the two. Where only the lack of memory
        decides for our own, the user is told.

        Raises
        ------
        InputError
            "cuml" is wanted, and this backend has none.
        ResourceError
            "cuml" is wanted, and memory does not suffice, or cuML crashes at this shape.
        """

    def free_memory(self) -> int:
        """Bytes that arrays may still take."""

    def outbox(self, rows: int, width: int, dtype: str, write: Callable[[Any], None]) -> Outbox:
        """Make an outbox for blocks of at most ``rows`` rows; it calls ``write`` with each as a numpy array."""

    def out_of_memory(self, error: BaseException) -> bool:
        """Whether the error means that memory ran out, so that smaller blocks may succeed."""

    def explained(self) -> contextlib.AbstractContextManager[Any]:
        """Inside, failures of the device become a `ResourceError` that says what failed."""
        return contextlib.nullcontext()

    def peak_memory(self) -> dict[str, int]:
        """Peak of the device memory in use so far, in bytes, under its name in the manifest; empty on a CPU."""
        return {}

    def batches(
        self, path: str, separator: str | None, columns: list[str], groups: range | None = None
    ) -> Iterator[Any]:
        """Read columns of a file as data frames, in file order.

        Parquet (``separator`` None) keeps its types and may be limited to some row groups; text files give text.

        Raises
        ------
        InputError
            The file cannot be read.
        """

    def host_column(self, column: Any) -> Any:
        """Give a column of a table, or an index, as a pandas Series."""

    def versions(self) -> dict[str, str]:
        """Versions of the libraries that shape the result."""


class Outbox(Protocol):
    """Carries blocks of rows to a writer, which works on one block while the next is computed.

    It is a context manager: when it ends without an exception, every block has been handed over.
    """

    def __enter__(self) -> Outbox:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        return None

    def space(self, rows: int) -> Any:
        """Memory for the next block, (rows, D) on the device; it is used again for the block after the next."""

    def send(self, block: Any) -> None:
        """Hand over a block, which consists of rows of the last space."""


def in_blocks(
    backend: Backend, count: int, rows: int, least: int, make: Callable[[slice], Any]
) -> Iterator[tuple[slice, Any]]:
    """Give each slice of ``rows`` rows and what ``make`` makes of it; slices are halved where memory runs out.

    Parameters
    ----------
    backend : Backend
        Recognises that memory ran out, and tells the user.
    count : int
        Number of rows in all.
    rows, least : int
        Rows of a slice at first, a multiple of ``least``, and at least. All slices start at multiples of ``least``.
    make : callable
        Makes the result for a slice. It may be called again for a part of a slice at which it failed.
    """
    start = 0
    while start < count:
        part = slice(start, min(start + rows, count))
        try:
            made = make(part)
        except Exception as error:
            if rows <= least or not backend.out_of_memory(error):
                raise
            rows = least * max(1, rows // (2 * least))
            backend.say(f"memory ran out: from row {start} on, {rows} rows at a time ({one_line(error)})")
            continue
        start = part.stop
        yield part, made


def silent(line: str) -> None:
    """Tell nobody."""


def ranges(count: int, step: int) -> Iterator[slice]:
    """Cut 0 to ``count`` into slices of ``step``."""
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def one_line(error: BaseException) -> str:
    """First line of an error's message, or the name of its class where there is none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def distributions(library: str) -> list[str]:
    """Installed distributions of a library: ``cupy-cuda12x`` and ``cupy-cuda13x`` both bring ``cupy``."""
    names = {str(found.metadata["Name"]) for found in importlib.metadata.distributions()}
    return sorted(name for name in names if name.lower() == library or name.lower().startswith(f"{library}-cu"))


def versions(*distributions: str) -> dict[str, str]:
    """Versions of those distributions that are installed."""
    found: dict[str, str] = {}
    for name in distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
