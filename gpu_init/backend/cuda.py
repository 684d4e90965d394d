"""The backend for CUDA: CuPy, cuDF and cuML, which share one pool of device memory."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from gpu_init.backend.batches import row_groups, text_parts
from gpu_init.backend.interface import LIBRARIES, Backend, Outbox, distributions, one_line, silent, versions
from gpu_init.errors import InputError, ResourceError
from gpu_init.files.storage import source, stream
from gpu_init.kernels import Kernels
from gpu_init.kernels.cuda import CudaKernels, choose_cache_folder

KMEANS_ITERATIONS = 300  # limit of cuML's iterations, which is scikit-learn's default
DEVICE_TEXT_BYTES = 256 << 20  # bytes of a text file that a device reads at a time
DEVICE_ROWS = 1 << 24  # rows of a Parquet file that a device reads at a time, or one row group that has more
LIBRARY_VALUES = 2**31  # rows x columns, or rows x clusters, from which cuML's K-means was seen to crash (raft#1258)
LIBRARY_FASTER = 1 << 27  # number of values up to which cuML's K-means is taken: it was faster at 20,000 users
LIBRARY_ROW_BYTES = 64  # bytes that cuML's K-means takes for each row's label, distance and bounds
SPARE = 0.9  # share of the free memory that a plan may count on
_OF_MEMORY = re.compile(r"out[ _]of[ _]memory|bad_alloc|cudaErrorMemoryAllocation|ALLOC_FAILED", re.IGNORECASE)
_OF_CUDA = re.compile(r"cuda|cublas|cusparse|cusolver|cudf|cuml|cuvs|cupy|raft|rmm|nvrtc", re.IGNORECASE)


class CudaBackend(Backend):
    """Implements `Backend` with cupy, cupyx, cudf and cuml, and one pool of device memory for all of them.

    Raises
    ------
    ImportError
        One of them is not installed; `select` checks this first.
    """

    name = "cuda"
    kmeans_name = "cuml.cluster.KMeans"
    kmeans_dtype = "float32"

    def __init__(self, why: str, say: Callable[[str], None] = silent) -> None:
        choose_cache_folder()
        import cudf
        import cupy
        import cupyx
        import cupyx.scipy.sparse

        self.why = why
        self.say = say
        self.xp: Any = cupy
        self.sparse: Any = cupyx.scipy.sparse
        self.tables: Any = cudf
        self.kernels: Kernels = CudaKernels(cupy, cupyx.scipy.sparse)
        self._pinned: Callable[..., Any] = cupyx.empty_pinned
        self._memory, self._limit = _pool(cupy)

    def prepare(self, reading: bool, fitting: bool, on_interactions: bool) -> None:
        """Do nothing: CuPy compiles each kernel when it is first used, and it is not known before which ones are."""

    def asarray(self, array: Any) -> Any:
        return self.xp.ascontiguousarray(self.xp.asarray(array))

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return self.xp.empty(shape, dtype)

    def to_host(self, array: Any) -> np.ndarray[Any, Any]:
        return self.xp.asnumpy(array, order="C")  # type: ignore[no-any-return]

    def local_cluster(self, **options: Any) -> Any:
        try:
            from dask_cuda import LocalCUDACluster
        except ImportError as error:
            raise InputError(
                f"--scheduler local on CUDA needs dask-cuda ({one_line(error)}): pip install 'gpu-init[dask-cuda]'"
            ) from None
        return LocalCUDACluster(**options)

    def kmeans(self, matrix: Any, clusters: int, seed: int, restarts: int) -> Any:
        """Run cuML with every setting given: its default seed is None, and its default number of starts varies.

        gpu-init's own passes over all rows follow, and go on beyond cuML's tolerance.
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
        """Expect a peak of about twice the matrix (cuvs#1773), and `LIBRARY_ROW_BYTES` for each row."""
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
        """Bytes that the pool may grow to, less those in use by its arrays."""
        return int(self._limit - self._memory.allocation_counts.current_bytes)

    def outbox(self, rows: int, width: int, dtype: str, write: Callable[[Any], None]) -> Outbox:
        return _PinnedOutbox(self.xp, self._pinned, (rows, width), dtype, write)

    def out_of_memory(self, error: BaseException) -> bool:
        """Recognise the errors of CuPy, RMM, cuDF and cuML, each of which has its own."""
        return isinstance(error, MemoryError) or (
            isinstance(error, RuntimeError) and bool(_OF_MEMORY.search(str(error)))
        )

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
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
        return {"peak_device_memory_bytes": int(self._memory.allocation_counts.peak_bytes)}

    def batches(
        self, path: str, separator: str | None, columns: list[str], groups: range | None = None
    ) -> Iterator[Any]:
        """Read to the device, several row groups or many lines at a time."""
        frames = self._parquet(path, columns, groups) if separator is None else self._text(path, separator, columns)
        try:
            for frame in frames:
                yield frame[columns]
        except Exception as error:  # pyarrow, cudf and Python raise many kinds of error for a broken file
            if isinstance(error, InputError) or self.out_of_memory(error) or "CUDA error" in str(error):
                raise
            raise InputError(f"{path}: {one_line(error)}") from None

    def _parquet(self, path: str, columns: list[str], wanted: range | None) -> Iterator[Any]:
        import pyarrow.parquet as pq

        metadata = pq.read_metadata(source(path))
        wanted = range(metadata.num_row_groups) if wanted is None else wanted
        rows = [metadata.row_group(group).num_rows for group in wanted]
        for groups in row_groups(rows, DEVICE_ROWS):
            chosen = [wanted[group] for group in groups]
            # use_pandas_metadata would take away a column that pandas wrote as its index
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
        return self.tables.Series(column).to_pandas()

    def versions(self) -> dict[str, str]:
        return versions("numpy", *itertools.chain(*map(distributions, (*LIBRARIES, "rmm"))))


class _PinnedOutbox(Outbox):
    """Copies a block to pinned memory while the next one is computed and the one before is written."""

    def __init__(
        self, xp: Any, pinned: Callable[..., Any], shape: tuple[int, int], dtype: str, write: Callable[[Any], None]
    ) -> None:
        self._xp = xp
        self._make: Callable[[], tuple[Any, Any]] = lambda: (xp.empty(shape, dtype), pinned(shape, dtype))
        self._slots: list[tuple[Any, Any]] = []  # made when first needed, inside `in_blocks`: memory may run out
        self._turn = 0
        self._stream = xp.cuda.Stream(non_blocking=True)
        self._write = write
        self._copied: Any = None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stream.synchronize()  # no copy may go on into memory that is freed
        if kind is None:
            self._flush()

    def space(self, rows: int) -> Any:
        self._turn = 1 - self._turn
        while len(self._slots) <= self._turn:
            self._slots.append(self._make())
        return self._slots[self._turn][0][:rows]

    def send(self, block: Any) -> None:
        self._flush()
        computed = self._xp.cuda.Event(disable_timing=True)
        computed.record()
        self._stream.wait_event(computed)
        self._copied = self._slots[self._turn][1][: len(block)]
        self._xp.asnumpy(block, stream=self._stream, out=self._copied, blocking=False)

    def _flush(self) -> None:
        """Hand over the last block. The writer is then done with the block before, whose memory is used next."""
        if self._copied is not None:
            self._stream.synchronize()
            block, self._copied = self._copied, None
            self._write(block)


@functools.cache
def _pool(cupy: Any) -> tuple[Any, int]:
    """Make one pool for CuPy, cuDF and cuML that counts the bytes in use; give it, and the bytes it may grow to.

    Once cuDF is imported, CuPy allocates through RMM, whose default takes each array from the driver. A resource that
    the caller's program has chosen is kept, below the counter. Memory that other programs take later is not seen.
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
