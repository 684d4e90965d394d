"""The backend for a CPU: numpy, scipy, pandas over pyarrow, and numba for large jobs."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from gpu_init import memory
from gpu_init.backend.batches import TEXT_BLOCK_BYTES, decoded, long_texts
from gpu_init.backend.interface import Outbox, one_line, silent, versions
from gpu_init.errors import InputError
from gpu_init.files.lines import trouble
from gpu_init.files.storage import source, stream
from gpu_init.kernels import arrays, cpu_kernels, prepare
from gpu_init.kernels.threads import cores, in_order, one_blas_thread

PARQUET_BATCH_ROWS = 1 << 18
PARQUET_BUFFER_BYTES = 1 << 20  # of a column read at a time, however large its row groups are
REMOTE_BUFFER_BYTES = 8 << 20  # the same from object storage, where each time takes a while


class CpuBackend:
    """numpy, scipy, pandas over pyarrow; numba for large jobs."""

    name = "cpu"
    kmeans_name = "gpu_init.method.kmeans"
    kmeans_dtype = "float64"

    def __init__(self, why: str, kernels: str = "numpy") -> None:
        import pandas as pd
        import scipy.sparse

        self.why = why
        self.say: Callable[[str], None] = silent
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
                texts = long_texts(path, columns, options)
                with pq.ParquetFile(source(path), read_dictionary=texts, **options) as file:
                    chosen = None if groups is None else list(groups)
                    for batch in file.iter_batches(PARQUET_BATCH_ROWS, chosen, columns):
                        for part in decoded(batch.select(columns)):
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
        return versions("numpy", "scipy", "numba", "pandas", "pyarrow")


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
