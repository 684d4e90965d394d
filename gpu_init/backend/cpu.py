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
from gpu_init.backend.interface import Backend, Outbox, one_line, silent, versions
from gpu_init.errors import InputError
from gpu_init.files.lines import trouble
from gpu_init.files.remote import is_url
from gpu_init.files.storage import source, stream
from gpu_init.kernels import arrays, cpu_kernels, prepare
from gpu_init.kernels.threads import cores, in_order, one_blas_thread

PARQUET_BATCH_ROWS = 1 << 18
# Bytes of a Parquet column that are read at a time, whatever the size of its row groups. A request to object storage
# takes long, so fewer and larger ones are made there.
PARQUET_BUFFER_BYTES = 1 << 20
REMOTE_BUFFER_BYTES = 8 << 20


class CpuBackend(Backend):
    """Implements `Backend` with numpy, scipy, pandas over pyarrow, and numba for large jobs."""

    name = "cpu"
    kmeans_name = "gpu_init.method.kmeans"
    kmeans_dtype = "float64"

    def __init__(self, why: str, kernels: str = "numpy", say: Callable[[str], None] = silent) -> None:
        import pandas as pd
        import scipy.sparse

        self.why = why
        self.say = say
        self.xp: Any = np
        self.sparse: Any = scipy.sparse
        self.tables: Any = pd
        self.kernels = cpu_kernels(kernels)

    def with_kernels(self, name: str) -> CpuBackend:
        return CpuBackend(self.why, name, self.say)

    def prepare(self, reading: bool, fitting: bool, on_interactions: bool) -> None:
        prepare(reading, fitting, on_interactions)

    def asarray(self, array: Any) -> Any:
        return np.ascontiguousarray(array)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return arrays.empty(shape, dtype)

    def to_host(self, array: Any) -> np.ndarray[Any, Any]:
        return np.asarray(array)

    def deterministic(self) -> contextlib.AbstractContextManager[Any]:
        return one_blas_thread()

    def local_cluster(self, **options: Any) -> Any:
        import distributed

        kind: Any = distributed.LocalCluster  # the class has no types
        return kind(n_workers=cores(), threads_per_worker=1, env={"NUMBA_NUM_THREADS": "1"}, **options)

    def in_order(self, function: Callable[[slice], Any], parts: Iterable[slice]) -> Iterator[Any]:
        with one_blas_thread():
            yield from in_order(function, parts)

    def kmeans(self, matrix: Any, clusters: int, seed: int, restarts: int) -> Any:  # noqa: ARG002
        raise TypeError("no library's K-means runs on a CPU")

    def takes_matrix(self, rows: int, width: int, clusters: int, wanted: str) -> bool:  # noqa: ARG002
        """Never: gpu-init's own K-means is faster than scikit-learn's."""
        if wanted == "cuml":
            raise InputError("kmeans cuml needs the CUDA backend, and this run is on a CPU; leave it out, or take own.")
        return False

    def free_memory(self) -> int:
        return memory.available().bytes

    def outbox(self, rows: int, width: int, dtype: str, write: Callable[[Any], None]) -> Outbox:
        return _HostOutbox(rows, width, dtype, write)

    def out_of_memory(self, error: BaseException) -> bool:
        return isinstance(error, MemoryError)

    def batches(
        self, path: str, separator: str | None, columns: list[str], groups: range | None = None
    ) -> Iterator[Any]:
        """Read the next batch while the caller works on this one."""
        frames = _parquet(path, columns, groups) if separator is None else _text(path, separator, columns)
        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(next, frames, None)
            try:
                while (frame := ahead.result()) is not None:
                    ahead = reader.submit(next, frames, None)
                    yield frame
            finally:
                reader.submit(frames.close)  # closes the file where the caller stops early

    def host_column(self, column: Any) -> Any:
        return self.tables.Series(column)

    def versions(self) -> dict[str, str]:
        return versions("numpy", "scipy", "numba", "pandas", "pyarrow")


def _parquet(path: str, columns: list[str], groups: range | None) -> Generator[Any, None, None]:
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    options = {"pre_buffer": False, "buffer_size": REMOTE_BUFFER_BYTES if is_url(path) else PARQUET_BUFFER_BYTES}
    chosen = None if groups is None else list(groups)
    try:
        texts = long_texts(path, columns, options)
        with pq.ParquetFile(source(path), read_dictionary=texts, **options) as file:
            for batch in file.iter_batches(PARQUET_BATCH_ROWS, chosen, columns):
                for part in decoded(batch.select(columns)):
                    _require_valid(path, part)
                    yield part.to_pandas(types_mapper=pd.ArrowDtype)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {one_line(error)}") from None


def _require_valid(path: str, batch: Any) -> None:
    """Refuse text that is not UTF-8: pyarrow reads it from Parquet without a check, and fails when it is used."""
    import pyarrow as pa

    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            raise InputError(f"{path}, column {name}: {one_line(error)}; write the file again.") from None


def _text(path: str, separator: str, columns: list[str]) -> Generator[Any, None, None]:
    import pandas as pd
    import pyarrow as pa
    import pyarrow.csv as pc

    convert = pc.ConvertOptions(
        include_columns=columns,
        column_types=dict.fromkeys(columns, pa.string()),
        null_values=[""],
        strings_can_be_null=True,
    )
    parse = pc.ParseOptions(delimiter=separator, newlines_in_values=True)
    try:
        with stream(path) as file:
            for batch in pc.open_csv(file, pc.ReadOptions(block_size=TEXT_BLOCK_BYTES), parse, convert):
                yield batch.to_pandas(types_mapper=pd.ArrowDtype)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        said = one_line(error)
        if "Empty CSV" not in said:  # this is how pyarrow reports a header that is not even followed by a line end
            raise InputError(trouble(path, separator, said, TEXT_BLOCK_BYTES)) from None


class _HostOutbox(Outbox):
    """Uses two arrays in turn, one for the writer and one to be filled: a new array costs the system new pages."""

    def __init__(self, rows: int, width: int, dtype: str, write: Callable[[Any], None]) -> None:
        self._spaces = itertools.cycle([arrays.empty((rows, width), dtype) for _ in range(2)])
        self._write = write

    def space(self, rows: int) -> Any:
        return next(self._spaces)[:rows]

    def send(self, block: Any) -> None:
        self._write(block)
