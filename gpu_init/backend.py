"""The one place that knows there are devices: numpy and friends on a CPU, CuPy and RAPIDS on CUDA.

| | CPU | CUDA |
|---|---|---|
| arrays | numpy | cupy |
| sparse | scipy.sparse | cupyx.scipy.sparse |
| tables | pandas (pyarrow) | cudf |
| K-means of a matrix | gpu_init.kmeans | cuml.cluster.KMeans |
| fused kernels | numpy for small jobs, numba for large ones | CUDA C++ through cupy.RawModule |

Everything above is written once, against what both columns share.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.metadata
import importlib.util
import io
import itertools
import platform
import re
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from . import memory
from .errors import InputError, ResourceError
from .kernels import Kernels, arrays, compile_all, cpu_kernels, kernels_for, prepare
from .kernels.ahead import compile_cuda
from .kernels.cuda import OLDEST, CudaKernels, ahead_folder, choose_cache_folder
from .kernels.threads import cores, in_order, one_blas_thread
from .lines import trouble
from .storage import source, stream

TEXT_BLOCK_BYTES = 16 << 20  # of a text file read at a time; no line may be longer
PARQUET_BATCH_ROWS = 1 << 18
LONG_TEXT_BYTES = 256  # a batch of longer texts may take much more than its file
PARQUET_BUFFER_BYTES = 1 << 20  # of a column read at a time, however large its row groups are
REMOTE_BUFFER_BYTES = 8 << 20  # the same from object storage, where each time takes a while
KMEANS_ITERATIONS = 300  # as scikit-learn's default
DEVICE_TEXT_BYTES = 256 << 20  # of a text file that a device reads at a time
DEVICE_ROWS = 1 << 24  # of a Parquet file, likewise, or one row group that has more
LIBRARY_VALUES = 2**31  # rows x columns, or rows x clusters, from where cuML's K-means was seen to crash (raft#1258)
LIBRARY_FASTER = 1 << 27  # values up to which cuML's K-means is taken: it was faster at 20,000 users
LIBRARY_ROW_BYTES = 64  # that K-means takes per row beside the rows: labels, distances, bounds
SPARE = 0.9  # of the free memory that a plan may count on

_LIBRARIES = ("cupy", "cudf", "cuml")
_OF_MEMORY = re.compile(r"out[ _]of[ _]memory|bad_alloc|cudaErrorMemoryAllocation|ALLOC_FAILED", re.IGNORECASE)
_OF_CUDA = re.compile(r"cuda|cublas|cusparse|cusolver|cudf|cuml|cuvs|cupy|raft|rmm|nvrtc", re.IGNORECASE)


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


def select(name: str) -> Backend:
    """Choose the backend: ``cpu``, ``cuda``, or ``auto``, which takes CUDA where a device and the libraries are.

    Raises
    ------
    InputError
        ``cuda`` was asked for and something is missing; the message says what, and the command that installs it.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"backend {name!r}: auto, cpu or cuda are the ones there are.")
    if name == "cpu":
        return CpuBackend("asked for")
    missing = _missing_for_cuda()
    if not missing:
        return CudaBackend("asked for" if name == "cuda" else "a CUDA device and its libraries are there")
    if name == "cuda":
        raise InputError(f"--backend cuda: {missing.what}.\n{missing.fix}")
    return CpuBackend(missing.what)


def for_work(backend: Backend, seconds: float) -> Backend:
    """Give the backend with the kernels that `kernels_for` names."""
    return backend.with_kernels(kernels_for(seconds))


class CpuBackend:
    """numpy, scipy, pandas over pyarrow; numba for large jobs."""

    name = "cpu"
    kmeans_name = "gpu_init.kmeans"
    kmeans_dtype = "float64"

    def __init__(self, why: str, kernels: str = "numpy") -> None:
        import pandas as pd
        import scipy.sparse

        self.why = why
        self.say: Callable[[str], None] = _silent
        self.xp: Any = np
        self.sparse: Any = scipy.sparse
        self.tables: Any = pd
        self.kernels = cpu_kernels(kernels)

    def with_kernels(self, name: str) -> CpuBackend:
        """See `Backend.with_kernels`."""
        other = CpuBackend(self.why, name)
        other.say = self.say
        return other

    def prepare(self, reading: bool, fitting: bool, on_interactions: bool) -> None:
        """See `Backend.prepare`."""
        prepare(reading, fitting, on_interactions)

    def asarray(self, array: Any) -> Any:
        """See `Backend.asarray`."""
        return np.ascontiguousarray(array)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """See `Backend.empty`: on a cache line."""
        return arrays.empty(shape, dtype)

    def to_host(self, array: Any) -> np.ndarray[Any, Any]:
        """See `Backend.to_host`."""
        return np.asarray(array)

    def deterministic(self) -> contextlib.AbstractContextManager[Any]:
        """See `Backend.deterministic`: BLAS, LAPACK and OpenMP split sums by thread, so one thread."""
        return one_blas_thread()

    def local_cluster(self, **options: Any) -> Any:
        """See `Backend.local_cluster`: one for each core."""
        import distributed

        kind: Any = distributed.LocalCluster  # which has no types
        return kind(n_workers=cores(), threads_per_worker=1, env={"NUMBA_NUM_THREADS": "1"}, **options)

    def in_order(self, function: Callable[[slice], Any], parts: Iterable[slice]) -> Iterator[Any]:
        """See `Backend.in_order`."""
        with one_blas_thread():
            yield from in_order(function, parts)

    def kmeans(self, matrix: Any, clusters: int, seed: int, restarts: int) -> Any:  # noqa: ARG002
        """See `Backend.kmeans`: there is none, as `takes_matrix` says."""
        raise TypeError("no library's K-means runs on a CPU")

    def takes_matrix(self, rows: int, width: int, clusters: int, wanted: str) -> bool:  # noqa: ARG002
        """See `Backend.takes_matrix`: ours is faster than scikit-learn's."""
        if wanted == "cuml":
            raise InputError("kmeans cuml needs the CUDA backend, and this run is on a CPU; leave it out, or take own.")
        return False

    def free_memory(self) -> int:
        """See `Backend.free_memory`."""
        return memory.available().bytes

    def outbox(self, rows: int, width: int, dtype: str, write: Callable[[Any], None]) -> Outbox:
        """See `Backend.outbox`: blocks lie on the host already."""
        return _HostOutbox(rows, width, dtype, write)

    def out_of_memory(self, error: BaseException) -> bool:
        """See `Backend.out_of_memory`."""
        return isinstance(error, MemoryError)

    def explained(self) -> contextlib.AbstractContextManager[Any]:
        """See `Backend.explained`: there is no device."""
        return contextlib.nullcontext()

    def peak_memory(self) -> dict[str, int]:
        """See `Backend.peak_memory`: there is none."""
        return {}

    def batches(
        self, path: str, separator: str | None, columns: list[str], groups: range | None = None
    ) -> Iterator[Any]:
        """See `Backend.batches`: the next one is read while the caller works on this one."""
        with ThreadPoolExecutor(1) as reader:
            frames = self._frames(path, separator, columns, groups)
            ahead = reader.submit(next, frames, None)
            try:
                while (frame := ahead.result()) is not None:
                    ahead = reader.submit(next, frames, None)
                    yield frame
            finally:
                reader.submit(frames.close)  # whoever stops early leaves no file open

    def _frames(
        self, path: str, separator: str | None, columns: list[str], groups: range | None
    ) -> Generator[Any, None, None]:
        import pandas as pd
        import pyarrow as pa

        def frame(batch: Any) -> Any:
            return batch.to_pandas(types_mapper=pd.ArrowDtype)

        try:
            if separator is None:
                import pyarrow.parquet as pq

                buffer = PARQUET_BUFFER_BYTES if source(path) is path else REMOTE_BUFFER_BYTES
                options = {"pre_buffer": False, "buffer_size": buffer}
                texts = _long_texts(path, columns, options)
                with pq.ParquetFile(source(path), read_dictionary=texts, **options) as file:
                    chosen = None if groups is None else list(groups)
                    for batch in file.iter_batches(PARQUET_BATCH_ROWS, chosen, columns):
                        for part in _decoded(batch.select(columns)):
                            yield frame(part)
                return
            import pyarrow.csv as pc

            with stream(path) as file:
                reader = pc.open_csv(
                    file,
                    read_options=pc.ReadOptions(block_size=TEXT_BLOCK_BYTES),
                    parse_options=pc.ParseOptions(delimiter=separator, newlines_in_values=True),
                    convert_options=pc.ConvertOptions(
                        include_columns=columns,
                        column_types=dict.fromkeys(columns, pa.string()),
                        null_values=[""],
                        strings_can_be_null=True,
                    ),
                )
                for batch in reader:
                    yield frame(batch)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            said = one_line(error)
            if separator is None:
                raise InputError(f"{path}: {said}") from None
            if "Empty CSV" not in said:  # a header without so much as a line end
                raise InputError(trouble(path, separator, said, TEXT_BLOCK_BYTES)) from None

    def host_column(self, column: Any) -> Any:
        """See `Backend.host_column`."""
        return self.tables.Series(column)

    def versions(self) -> dict[str, str]:
        """See `Backend.versions`."""
        return _versions("numpy", "scipy", "numba", "pandas", "pyarrow")


class CudaBackend:
    """cupy, cupyx, cudf, cuml, and one pool of device memory for all of them.

    Raises
    ------
    ImportError
        One of them is not installed; `select` looks before.
    """

    name = "cuda"
    kmeans_name = "cuml.cluster.KMeans"
    kmeans_dtype = "float32"

    def __init__(self, why: str) -> None:
        choose_cache_folder()
        import cudf
        import cupy
        import cupyx
        import cupyx.scipy.sparse

        self.why = why
        self.say: Callable[[str], None] = _silent
        self.xp: Any = cupy
        self.sparse: Any = cupyx.scipy.sparse
        self.tables: Any = cudf
        self.kernels: Kernels = CudaKernels(cupy, cupyx.scipy.sparse)
        self._pinned: Callable[..., Any] = cupyx.empty_pinned
        self._memory, self._limit = _pool(cupy)

    def with_kernels(self, name: str) -> CudaBackend:  # noqa: ARG002
        """See `Backend.with_kernels`: there is no choice."""
        return self

    def prepare(self, reading: bool, fitting: bool, on_interactions: bool) -> None:
        """See `Backend.prepare`: which ones are needed is known only when they are."""

    def asarray(self, array: Any) -> Any:
        """See `Backend.asarray`."""
        return self.xp.ascontiguousarray(self.xp.asarray(array))

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """See `Backend.empty`."""
        return self.xp.empty(shape, dtype)

    def to_host(self, array: Any) -> np.ndarray[Any, Any]:
        """See `Backend.to_host`."""
        return self.xp.asnumpy(array, order="C")  # type: ignore[no-any-return]

    def deterministic(self) -> contextlib.AbstractContextManager[Any]:
        """See `Backend.deterministic`: threads of the host have no part in a device's products."""
        return contextlib.nullcontext()

    def local_cluster(self, **options: Any) -> Any:
        """See `Backend.local_cluster`: one for each device."""
        try:
            from dask_cuda import LocalCUDACluster
        except ImportError as error:
            raise InputError(
                f"--scheduler local on CUDA needs dask-cuda ({one_line(error)}): pip install 'gpu-init[dask-cuda]'"
            ) from None
        return LocalCUDACluster(**options)

    def in_order(self, function: Callable[[slice], Any], parts: Iterable[slice]) -> Iterator[Any]:
        """See `Backend.in_order`: one after another, a device being busy with one."""
        return map(function, parts)

    def kmeans(self, matrix: Any, clusters: int, seed: int, restarts: int) -> Any:
        """See `Backend.kmeans`: every setting given, since cuML's own seed is None and its number of starts varies.

        The passes over all rows that follow go further than its tolerance.
        """
        from cuml.cluster import KMeans

        model = KMeans(
            n_clusters=clusters,
            init="scalable-k-means++",
            n_init=restarts,
            max_iter=KMEANS_ITERATIONS,
            tol=1e-4,
            random_state=seed,
            output_type="cupy",
        ).fit(matrix)
        return self.asarray(model.cluster_centers_)

    def takes_matrix(self, rows: int, width: int, clusters: int, wanted: str) -> bool:
        """See `Backend.takes_matrix`: its peak is about twice its input (cuvs#1773), and what is kept per row."""
        if wanted == "own" or (wanted == "auto" and rows * width > LIBRARY_FASTER):
            return False
        needed, free = rows * (2 * width * 4 + LIBRARY_ROW_BYTES), self.free_memory()
        why = f"takes {needed / 1e9:.2f} GB more, of {free / 1e9:.2f} GB that are free on the device"
        if rows * max(width, clusters) >= LIBRARY_VALUES:
            why = "crashes at such sizes"
        elif needed <= SPARE * free:
            return True
        line = f"cuML's K-means on {rows} x {width} values for {clusters} clusters {why}"
        if wanted == "cuml":
            raise ResourceError(f"{line}; leave kmeans out, or take own.")
        self.say(f"{line}: gpu-init's own K-means runs")
        return False

    def free_memory(self) -> int:
        """See `Backend.free_memory`: of the device, what no array of the pool has."""
        return int(self._limit - self._memory.allocation_counts.current_bytes)

    def outbox(self, rows: int, width: int, dtype: str, write: Callable[[Any], None]) -> Outbox:
        """See `Backend.outbox`: through pinned memory."""
        return _PinnedOutbox(self.xp, self._pinned, (rows, width), dtype, write)

    def out_of_memory(self, error: BaseException) -> bool:
        """See `Backend.out_of_memory`: each library has its own error for that."""
        return isinstance(error, MemoryError) or (
            isinstance(error, RuntimeError) and bool(_OF_MEMORY.search(str(error)))
        )

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """See `Backend.explained`."""
        try:
            yield
        except Exception as error:
            if self.out_of_memory(error):
                counts = self._memory.allocation_counts
                raise ResourceError(
                    f"not enough memory: {one_line(error)}.\nOf {self._limit / 1e9:.2f} GB on the device"
                    f" {counts.current_bytes / 1e9:.2f} GB were in use, {counts.peak_bytes / 1e9:.2f} GB at most."
                ) from error
            if _of_cuda(error):
                raise ResourceError(
                    f"the CUDA device, or a library for it, failed: {one_line(error)}.\n"
                    "What is written so far can be resumed; --backend cpu does without the device."
                ) from error
            raise

    def peak_memory(self) -> dict[str, int]:
        """See `Backend.peak_memory`."""
        return {"peak_device_memory_bytes": int(self._memory.allocation_counts.peak_bytes)}

    def batches(
        self, path: str, separator: str | None, columns: list[str], groups: range | None = None
    ) -> Iterator[Any]:
        """See `Backend.batches`: straight to the device, some row groups or many lines at a time."""
        frames = self._parquet(path, columns, groups) if separator is None else self._text(path, separator, columns)
        while True:
            try:
                frame = next(frames, None)
            except InputError:
                raise
            except Exception as error:  # a broken file: pyarrow, cudf and Python have many kinds of error for it
                if self.out_of_memory(error) or "CUDA error" in str(error):
                    raise
                raise InputError(f"{path}: {one_line(error)}") from None
            if frame is None:
                return
            yield frame[columns]

    def _parquet(self, path: str, columns: list[str], wanted: range | None) -> Iterator[Any]:
        import pyarrow.parquet as pq

        metadata = pq.read_metadata(source(path))
        wanted = range(metadata.num_row_groups) if wanted is None else wanted
        rows = [metadata.row_group(group).num_rows for group in wanted]
        for groups in row_groups(rows, DEVICE_ROWS):
            chosen = [wanted[group] for group in groups]
            # an index that pandas wrote would take its column away
            yield self.tables.read_parquet(path, columns=columns, row_groups=chosen, use_pandas_metadata=False)

    def _text(self, path: str, separator: str, columns: list[str]) -> Iterator[Any]:
        with stream(path) as file:
            for part in text_parts(file, DEVICE_TEXT_BYTES):
                yield self.tables.read_csv(
                    io.BytesIO(part),
                    sep=separator,
                    usecols=columns,
                    dtype=dict.fromkeys(columns, "str"),
                    keep_default_na=False,
                    na_values=[""],
                    compression=None,
                )

    def host_column(self, column: Any) -> Any:
        """See `Backend.host_column`."""
        return self.tables.Series(column).to_pandas()

    def versions(self) -> dict[str, str]:
        """See `Backend.versions`."""
        return _versions("numpy", *itertools.chain(*map(_distributions, (*_LIBRARIES, "rmm"))))


class _HostOutbox:
    """Two spaces used in turn: the writer has one while the other is filled; new ones would cost their pages anew."""

    def __init__(self, rows: int, width: int, dtype: str, write: Callable[[Any], None]) -> None:
        self._spaces = itertools.cycle([arrays.empty((rows, width), dtype) for _ in range(2)])
        self.send = write

    def __enter__(self) -> _HostOutbox:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        pass

    def space(self, rows: int) -> Any:
        """See `Outbox.space`."""
        return next(self._spaces)[:rows]


class _PinnedOutbox:
    """While a block is computed, the one before is copied to pinned memory, and the one before that is written."""

    def __init__(
        self, xp: Any, pinned: Callable[..., Any], shape: tuple[int, int], dtype: str, write: Callable[[Any], None]
    ) -> None:
        self._xp = xp
        self._make = (lambda: xp.empty(shape, dtype), lambda: pinned(shape, dtype))
        self._slots: list[tuple[Any, Any]] = []  # made when they are needed: memory may run out
        self._turn = 0
        self._stream = xp.cuda.Stream(non_blocking=True)
        self._write = write
        self._copied: Any = None

    def __enter__(self) -> _PinnedOutbox:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stream.synchronize()  # nothing may be on its way into memory that is let go
        if kind is None:
            self._flush()

    def space(self, rows: int) -> Any:
        """See `Outbox.space`."""
        self._turn = 1 - self._turn
        while len(self._slots) <= self._turn:
            self._slots.append((self._make[0](), self._make[1]()))
        return self._slots[self._turn][0][:rows]

    def send(self, block: Any) -> None:
        """See `Outbox.send`."""
        self._flush()
        computed = self._xp.cuda.Event(disable_timing=True)
        computed.record()
        self._stream.wait_event(computed)
        self._copied = self._slots[self._turn][1][: len(block)]
        self._xp.asnumpy(block, stream=self._stream, out=self._copied, blocking=False)

    def _flush(self) -> None:
        """Hand over the block before; the writer gives back the one before that, whose memory is the next one's."""
        if self._copied is not None:
            self._stream.synchronize()
            block, self._copied = self._copied, None
            self._write(block)


@functools.cache
def _pool(cupy: Any) -> tuple[Any, int]:
    """One pool for CuPy, cuDF and cuML that counts what is in use, and the bytes that it may grow to.

    Importing cuDF makes CuPy allocate through RMM, which takes each array from the driver unless told otherwise. A
    resource that the program has chosen stays below. What others take later is seen only when it is missing.
    """
    import rmm.mr
    from rmm.allocators.cupy import rmm_cupy_allocator

    memory = rmm.mr.get_current_device_resource()
    if not isinstance(memory, rmm.mr.StatisticsResourceAdaptor):
        plain = type(memory) is rmm.mr.CudaMemoryResource
        memory = rmm.mr.StatisticsResourceAdaptor(rmm.mr.CudaAsyncMemoryResource() if plain else memory)
        rmm.mr.set_current_device_resource(memory)
    cupy.cuda.set_allocator(rmm_cupy_allocator)
    return memory, int(cupy.cuda.runtime.memGetInfo()[0])


def _of_cuda(error: Exception) -> bool:
    library = type(error).__module__.partition(".")[0]
    return bool(_OF_CUDA.match(library)) or (isinstance(error, RuntimeError) and bool(_OF_CUDA.search(str(error))))


def _silent(line: str) -> None:
    """Tell nobody."""


def row_groups(rows: Sequence[int], most: int) -> Iterator[list[int]]:
    """Numbers of row groups, from how many rows each has: as many as have ``most`` rows together, one at least."""
    groups: list[int] = []
    held = 0
    for group, count in enumerate(rows):
        if groups and held + count > most:
            yield groups
            groups, held = [], 0
        groups.append(group)
        held += count
    if groups:
        yield groups


def _long_texts(path: str, columns: Iterable[str], options: dict[str, Any]) -> list[str]:
    """Columns of text of which a row group repeats a long one: a file of a few bytes may hold gigabytes of it."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    schema = pq.read_schema(source(path))
    kinds = {name: schema.field(name).type for name in columns}
    texts = [name for name, kind in kinds.items() if pa.types.is_string(kind) or pa.types.is_large_string(kind)]
    found: set[str] = set()
    with pq.ParquetFile(source(path), read_dictionary=texts, **options) as file:
        for group in range(file.num_row_groups) if texts else ():
            for row in file.iter_batches(1, row_groups=[group], columns=texts):
                lengths = {name: pc.max(pc.binary_length(row.column(name).dictionary)).as_py() for name in texts}
                found.update(name for name, longest in lengths.items() if (longest or 0) > LONG_TEXT_BYTES)
                break
    return sorted(found)


def _decoded(batch: Any) -> Iterator[Any]:
    """A batch of Parquet with its text written out, in parts of at most `TEXT_BLOCK_BYTES`, or of one row."""
    import pyarrow as pa
    import pyarrow.compute as pc

    texts = [column for column in batch.columns if pa.types.is_dictionary(column.type)]
    sizes = np.zeros(batch.num_rows, np.int64)
    for column in texts:
        lengths = pc.fill_null(pc.binary_length(column.dictionary.cast(pa.large_string())), 0)
        sizes += pc.fill_null(lengths.take(column.indices), 0).to_numpy(zero_copy_only=False)
    ends = np.cumsum(sizes)
    start = 0
    while start < batch.num_rows:
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + TEXT_BLOCK_BYTES, side="right")))
        part = batch.slice(start, stop - start)
        columns = [one.dictionary_decode() if pa.types.is_dictionary(one.type) else one for one in part.columns]
        yield pa.RecordBatch.from_arrays(columns, names=batch.schema.names)
        start = stop


def text_parts(stream: Any, size: int) -> Iterator[bytes]:
    """Lines of a text file, some ``size`` bytes at a time, each part with the header before it.

    A part ends with a line, and not within quotes. Where twice as many bytes have no such end, a mark is open that
    quotes nothing, and the last line's end is taken.
    """
    head, _, rest = stream.read(size).partition(b"\n")
    head = head.removeprefix(b"\xef\xbb\xbf")
    windows = head.endswith(b"\r")
    several = False
    while more := stream.read(size):
        rest += more
        end = _end_of_lines(rest)
        if not end and len(rest) > 2 * size:
            end = rest.rfind(b"\n") + 1
        if end:
            yield _lines(head, rest[:end], windows)
            rest, several = rest[end:], True
    if rest or not several:
        yield _lines(head, rest, windows)


def _lines(head: bytes, data: bytes, windows: bool) -> bytes:
    joined = b"".join([head, b"\n", data])
    return joined.replace(b"\r\n", b"\n") if windows else joined


def _end_of_lines(data: bytes) -> int:
    """Where the last line that ends outside quotes does, the next one's start; 0 where there is none."""
    end = data.rfind(b"\n")
    quotes = data.count(b'"', 0, max(end, 0))
    while end >= 0 and quotes % 2:
        before = data.rfind(b"\n", 0, end)
        quotes -= data.count(b'"', max(before, 0), end)
        end = before
    return end + 1


def ranges(count: int, step: int) -> Iterator[slice]:
    """0 to ``count`` in slices of ``step``."""
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def one_line(error: BaseException) -> str:
    """First line of a library's message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


# What doctor says.


@dataclass(frozen=True)
class Fact:
    """One line of ``gpu-init doctor``."""

    name: str
    found: str
    fix: str = ""  # what to do, where something is wrong


def facts() -> list[Fact]:
    """What the job would find on this machine: system, libraries, driver, devices."""
    free = memory.available()
    lines = [
        Fact("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        Fact("cores", str(cores())),
        Fact("memory", f"{free.bytes / 1e9:.1f} GB free {free.why}"),
    ]
    lines += [Fact(name, version) for name, version in CpuBackend("doctor").versions().items()]
    torch = _version("torch")
    lines.append(
        Fact("torch", torch or "not installed", "" if torch else "for .pt features: pip install 'gpu-init[torch]'")
    )
    return lines + _cuda_facts()


def compiled_facts() -> list[Fact]:
    """Compile all kernels ahead of time, for this processor and, where CuPy is, for devices; and say where they are."""
    count, folder = compile_all()
    lines = [Fact("CPU kernels", f"{count} compiled, in {folder}" if folder else f"{count} compiled, and not kept")]
    if _distributions("cupy"):
        try:
            made = compile_cuda(ahead_folder())
            lines.append(Fact("CUDA kernels", f"{len(made)} files compiled, in {ahead_folder()}"))
        except InputError as error:
            lines.append(Fact("CUDA kernels", "not compiled", str(error)))
    return lines


def _cuda_facts() -> list[Fact]:
    driver = _driver_version()
    lines = [Fact("CUDA driver", f"for CUDA {driver[0]}.{driver[1]}" if driver else "none found")]
    for library in (*_LIBRARIES, "rmm"):
        found = _distributions(library)
        shown = ", ".join(f"{name} {_version(name)}" for name in found)
        fix = f"keep one: pip uninstall {' or '.join(found)}, then install the other again" if len(found) > 1 else ""
        lines.append(Fact(library, shown or "not installed", fix))
    missing = _missing_for_cuda()
    if missing:
        lines.append(Fact("CUDA backend", f"no: {missing.what}", missing.fix))
        return lines
    import cupy

    for device in range(cupy.cuda.runtime.getDeviceCount()):
        properties = cupy.cuda.runtime.getDeviceProperties(device)
        with cupy.cuda.Device(device):
            free, total = cupy.cuda.runtime.memGetInfo()
        name = properties["name"].decode()
        capability = f"{properties['major']}.{properties['minor']}"
        lines.append(
            Fact(
                f"device {device}",
                f"{name}, compute capability {capability}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free",
            )
        )
    return [*lines, Fact("CUDA backend", "ready, on device 0")]


@dataclass(frozen=True)
class _Missing:
    what: str
    fix: str


def _missing_for_cuda() -> _Missing | None:
    """The first thing that keeps the CUDA backend from running here, or None."""
    driver = _driver_version()
    if driver is None:
        return _Missing(
            "no NVIDIA driver is loaded on this machine (libcuda.so.1 not found)",
            "Run on a machine with an NVIDIA GPU (containers: --gpus all), or use --backend cpu.",
        )
    if driver[0] < 12:
        return _Missing(
            f"the NVIDIA driver serves CUDA {driver[0]}.{driver[1]}, and 12.0 is the oldest that will do",
            "Install a newer driver, or use --backend cpu.",
        )
    install = f"pip install 'gpu-init[{'cuda13' if driver[0] >= 13 else 'cuda12'}]'"
    twice = _distributions("cupy")
    if len(twice) > 1:
        return _Missing(
            f"{' and '.join(twice)} are installed side by side, and break one another",
            f"Install with: pip uninstall --yes {' '.join(twice)} && {install}",
        )
    choose_cache_folder()
    absent = [library for library in _LIBRARIES if not _importable(library)]
    if absent:
        return _Missing(f"{', '.join(absent)} cannot be imported", f"Install with: {install}")
    import cupy

    try:
        if cupy.cuda.runtime.getDeviceCount() == 0:
            return _Missing("the driver reports no device", "Check nvidia-smi, and CUDA_VISIBLE_DEVICES.")
        properties = cupy.cuda.runtime.getDeviceProperties(0)
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return _Missing(one_line(error), f"Check nvidia-smi and CUDA_VISIBLE_DEVICES; this driver takes: {install}")
    if 10 * properties["major"] + properties["minor"] < OLDEST:
        return _Missing(
            f"device 0 has compute capability {properties['major']}.{properties['minor']}, and kernels need"
            f" {OLDEST / 10} (Volta) or newer",
            "Choose another device with CUDA_VISIBLE_DEVICES, or use --backend cpu.",
        )
    try:
        cupy.cuda.nvrtc.getVersion()
    except Exception:  # what CuPy raises for a library that is not there has changed from version to version
        return _Missing("CuPy finds no NVRTC, the compiler of kernels", f"Install with: {install}")
    return None


def _driver_version() -> tuple[int, int] | None:
    """The CUDA version that the driver serves."""
    try:
        version = ctypes.c_int()
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except OSError:
        return None
    return version.value // 1000, version.value % 1000 // 10


def _importable(library: str) -> bool:
    """Whether a library can be imported; of cuML, which takes seconds and few jobs need, whether it is there."""
    try:
        if library == "cuml" and library not in sys.modules:
            return importlib.util.find_spec(library) is not None
        importlib.import_module(library)
    except Exception:  # a broken installation raises whatever it likes
        return False
    return True


def _distributions(library: str) -> list[str]:
    names = {str(found.metadata["Name"]) for found in importlib.metadata.distributions()}
    return sorted(name for name in names if name.lower() == library or name.lower().startswith(f"{library}-cu"))


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions(*distributions: str) -> dict[str, str]:
    return {name: version for name in distributions if (version := _version(name)) is not None}
