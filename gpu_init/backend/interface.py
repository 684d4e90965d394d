"""What a backend offers, on a CPU and on CUDA alike."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import numpy as np

from gpu_init.kernels import Kernels

LIBRARIES = ("cupy", "cudf", "cuml")


class Backend(Protocol):
    """One column of the table above."""

    name: str
    why: str
    xp: Any
    sparse: Any
    tables: Any
    kernels: Kernels
    kmeans_name: str
    kmeans_dtype: str  # of the rows that `kmeans` is given
    say: Callable[[str], None]  # tells the user one line; whoever has a log sets it

    def with_kernels(self, name: str) -> Backend:
        """Give the same backend with the kernels of a name, where there is a choice; see `for_work`."""

    def prepare(self, reading: bool, fitting: bool, on_interactions: bool) -> None:
        """Begin to compile the kernels that a large job needs for reading or fitting, while it does something else."""

    def asarray(self, array: Any) -> Any:
        """Array on this device, in C order; no copy where none is needed."""

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Array on this device, in C order, where the kernels read and write rows best."""

    def to_host(self, array: Any) -> np.ndarray[Any, Any]:
        """The same array as numpy's."""

    def deterministic(self) -> contextlib.AbstractContextManager[Any]:
        """Inside, dense products give the same bytes for any number of threads."""

    def local_cluster(self, **options: Any) -> Any:
        """Dask's cluster of processes that take all of this machine.

        Raises
        ------
        InputError
            A library for it is missing.
        """

    def in_order(self, function: Callable[[slice], Any], parts: Iterable[slice]) -> Iterator[Any]:
        """``function`` of each part, in order; parts run side by side, each as `deterministic` has it."""

    def kmeans(self, matrix: Any, clusters: int, seed: int, restarts: int) -> Any:
        """Centroids (K, D) that a library's K-means finds for rows (n, D)."""

    def takes_matrix(self, rows: int, width: int, clusters: int, wanted: str) -> bool:
        """Whether `kmeans` should run, on a matrix (n, D) that is made for it.

        ``wanted``: "own" and "cuml" say so; "auto": where it is cheaper than ours. Where only memory speaks against
        it, one line says so.

        Raises
        ------
        InputError
            "cuml" is wanted, and there is none here.
        ResourceError
            "cuml" is wanted, and it has not enough memory, or crashes at this shape.
        """

    def free_memory(self) -> int:
        """Bytes that arrays may still take."""

    def outbox(self, rows: int, width: int, dtype: str, write: Callable[[Any], None]) -> Outbox:
        """Way of blocks of at most so many rows to ``write``, which is called with each as numpy's, in order."""

    def out_of_memory(self, error: BaseException) -> bool:
        """Whether it says that memory ran out, so that less at a time may do."""

    def explained(self) -> contextlib.AbstractContextManager[Any]:
        """Inside, failures of the device come as a `ResourceError` that says what failed."""

    def peak_memory(self) -> dict[str, int]:
        """Most bytes of the device's own memory that were in use so far, by what the manifest calls it."""

    def batches(
        self, path: str, separator: str | None, columns: list[str], groups: range | None = None
    ) -> Iterator[Any]:
        """Data frames of a file's columns, in file order: Parquet as typed, text files (a separator) as text.

        ``groups``: of which row groups of a Parquet file; None: of all.
        """

    def host_column(self, column: Any) -> Any:
        """Column of a table, or an index, as a pandas Series."""

    def versions(self) -> dict[str, str]:
        """Versions of the libraries that shape the result."""


class Outbox(Protocol):
    """Blocks of rows on their way to a writer, which has one while the next is computed.

    A context manager: at its end all blocks are handed over, unless an exception ends it.
    """

    def __enter__(self) -> Outbox: ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None: ...

    def space(self, rows: int) -> Any:
        """Where to compute the next block, (rows, D) on the device; it may be used again two blocks later."""

    def send(self, block: Any) -> None:
        """Hand over a block, rows of the last space."""


def in_blocks(
    backend: Backend, count: int, rows: int, least: int, make: Callable[[slice], Any]
) -> Iterator[tuple[slice, Any]]:
    """``make`` of slices of ``rows``; where memory runs out, of half as many from there on, but not below ``least``.

    Parameters
    ----------
    backend : Backend
        Says on one line that there are fewer rows from now on.
    count : int
        Rows in all.
    rows, least : int
        Slices are cut at multiples of ``least``, of which ``rows`` is one.
    make : callable
        Makes what belongs to a slice, and may be called for it again.
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
    """0 to ``count`` in slices of ``step``."""
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def one_line(error: BaseException) -> str:
    """First line of a library's message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def distributions(library: str) -> list[str]:
    names = {str(found.metadata["Name"]) for found in importlib.metadata.distributions()}
    return sorted(name for name in names if name.lower() == library or name.lower().startswith(f"{library}-cu"))


def version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions(*distributions: str) -> dict[str, str]:
    return {name: found for name in distributions if (found := version(name)) is not None}
