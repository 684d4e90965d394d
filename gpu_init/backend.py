"""The one place that knows there are devices: numpy and friends on a CPU, CuPy and RAPIDS on CUDA.

| | CPU | CUDA |
|---|---|---|
| arrays | numpy | cupy |
| sparse | scipy.sparse | cupyx.scipy.sparse |
| tables | pandas (pyarrow) | cudf |
| K-means of a matrix | gpu_init.kmeans | cuml.cluster.KMeans |
| fused kernels | numba, numpy as the reference | the reference on cupy arrays |

Everything above is written once, against what both columns share.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import os
import platform
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from .errors import InputError
from .kernels import Kernels, cpu_kernels

TEXT_BLOCK_BYTES = 16 << 20  # of a text file read at a time; no line may be longer
PARQUET_BATCH_ROWS = 1 << 18
PARQUET_BUFFER_BYTES = 1 << 20  # of a column read at a time, however large its row groups are
KMEANS_ITERATIONS = 300  # as scikit-learn's default


class Backend(Protocol):
    """One column of the table above."""

    name: str
    why: str
    xp: Any
    sparse: Any
    tables: Any
    kernels: Kernels
    kmeans_name: str

    def asarray(self, array: Any) -> Any:
        """Array on this device, in C order; no copy where none is needed."""

    def to_host(self, array: Any) -> np.ndarray[Any, Any]:
        """The same array as numpy's."""

    def deterministic(self) -> contextlib.AbstractContextManager[Any]:
        """Inside, dense products give the same bytes for any number of threads."""

    def in_order(self, function: Callable[[slice], Any], parts: Iterable[slice]) -> Iterator[Any]:
        """``function`` of each part, in order; parts run side by side, each as `deterministic` has it."""

    def kmeans(self, matrix: Any, clusters: int, seed: int, restarts: int) -> Any:
        """Centroids (K, D) that a library's K-means finds for rows (n, D); None: `gpu_init.kmeans` is as fast."""

    def batches(self, path: str, separator: str | None, columns: list[str]) -> Iterator[Any]:
        """Data frames of a file's columns, in file order: Parquet as typed, text files (a separator) as text."""

    def host_column(self, column: Any) -> Any:
        """Column of a table, or an index, as a pandas Series."""

    def versions(self) -> dict[str, str]:
        """Versions of the libraries that shape the result."""


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


class CpuBackend:
    """numpy, scipy, pandas over pyarrow, numba."""

    name = "cpu"
    kmeans_name = "gpu_init.kmeans"

    def __init__(self, why: str) -> None:
        import pandas as pd
        import scipy.sparse
        from threadpoolctl import ThreadpoolController

        self.why = why
        self.xp: Any = np
        self.sparse: Any = scipy.sparse
        self.tables: Any = pd
        self.kernels = cpu_kernels()
        self._threads = ThreadpoolController()  # of the libraries loaded by now, numpy's BLAS among them
        self._pool = ThreadPoolExecutor(cores(), thread_name_prefix="gpu-init")

    def asarray(self, array: Any) -> Any:
        """See `Backend.asarray`."""
        return np.ascontiguousarray(array)

    def to_host(self, array: Any) -> np.ndarray[Any, Any]:
        """See `Backend.to_host`."""
        return np.asarray(array)

    def deterministic(self) -> contextlib.AbstractContextManager[Any]:
        """See `Backend.deterministic`: BLAS, LAPACK and OpenMP split sums by thread, so one thread."""
        return self._threads.limit(limits=1)  # type: ignore[no-any-return]

    def in_order(self, function: Callable[[slice], Any], parts: Iterable[slice]) -> Iterator[Any]:
        """See `Backend.in_order`: a thread per core, a few results ahead of their use."""
        ahead: deque[Future[Any]] = deque()
        with self.deterministic():
            for part in parts:
                ahead.append(self._pool.submit(function, part))
                if len(ahead) > 2 * cores():
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def kmeans(self, matrix: Any, clusters: int, seed: int, restarts: int) -> Any:  # noqa: ARG002
        """See `Backend.kmeans`: scikit-learn's takes several times as long, and a second to import."""
        return None

    def batches(self, path: str, separator: str | None, columns: list[str]) -> Iterator[Any]:
        """See `Backend.batches`: the next one is read while the caller works on this one."""
        with ThreadPoolExecutor(1) as reader:
            frames = self._frames(path, separator, columns)
            ahead = reader.submit(next, frames, None)
            try:
                while (frame := ahead.result()) is not None:
                    ahead = reader.submit(next, frames, None)
                    yield frame
            finally:
                reader.submit(frames.close)  # whoever stops early leaves no file open

    def _frames(self, path: str, separator: str | None, columns: list[str]) -> Generator[Any, None, None]:
        import pandas as pd
        import pyarrow as pa

        def frame(batch: Any) -> Any:
            return batch.to_pandas(types_mapper=pd.ArrowDtype)

        try:
            if separator is None:
                import pyarrow.parquet as pq

                with pq.ParquetFile(path, pre_buffer=False, buffer_size=PARQUET_BUFFER_BYTES) as file:
                    for batch in file.iter_batches(PARQUET_BATCH_ROWS, columns=columns):
                        yield frame(batch.select(columns))
                return
            import pyarrow.csv as pc

            with pa.input_stream(path, compression="detect") as stream:
                reader = pc.open_csv(
                    stream,
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
            raise InputError(f"{path}: {one_line(error)}") from None

    def host_column(self, column: Any) -> Any:
        """See `Backend.host_column`."""
        return self.tables.Series(column)

    def versions(self) -> dict[str, str]:
        """See `Backend.versions`."""
        return _versions("numpy", "scipy", "numba", "pandas", "pyarrow")


class CudaBackend:
    """cupy, cupyx, cudf, cuml."""

    name = "cuda"
    kmeans_name = "cuml.cluster.KMeans"

    def __init__(self, why: str) -> None:
        import cudf
        import cupy
        import cupyx.scipy.sparse

        from .kernels.reference import ReferenceKernels

        self.why = why
        self.xp: Any = cupy
        self.sparse: Any = cupyx.scipy.sparse
        self.tables: Any = cudf
        self.kernels: Kernels = ReferenceKernels(cupy, cupyx.scipy.sparse)

    def asarray(self, array: Any) -> Any:
        """See `Backend.asarray`."""
        return self.xp.ascontiguousarray(self.xp.asarray(array))

    def to_host(self, array: Any) -> np.ndarray[Any, Any]:
        """See `Backend.to_host`."""
        return self.xp.asnumpy(array, order="C")  # type: ignore[no-any-return]

    def deterministic(self) -> contextlib.AbstractContextManager[Any]:
        """See `Backend.deterministic`: threads of the host have no part in a device's products."""
        return contextlib.nullcontext()

    def in_order(self, function: Callable[[slice], Any], parts: Iterable[slice]) -> Iterator[Any]:
        """See `Backend.in_order`: one after another, a device being busy with one."""
        return map(function, parts)

    def kmeans(self, matrix: Any, clusters: int, seed: int, restarts: int) -> Any:
        """See `Backend.kmeans`: every setting given, since cuML's own seed is None and its init another."""
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

    def batches(self, path: str, separator: str | None, columns: list[str]) -> Iterator[Any]:
        """See `Backend.batches`."""
        if separator is None:
            import pyarrow.parquet as pq

            with pq.ParquetFile(path) as file:
                groups = file.num_row_groups
            for group in range(groups):
                yield self.tables.read_parquet(path, columns=columns, row_groups=[group])[columns]
            return
        yield self.tables.read_csv(
            path,
            sep=separator,
            usecols=columns,
            dtype=dict.fromkeys(columns, "str"),
            keep_default_na=False,
            na_values=[""],
        )[columns]

    def host_column(self, column: Any) -> Any:
        """See `Backend.host_column`."""
        return self.tables.Series(column).to_pandas()

    def versions(self) -> dict[str, str]:
        """See `Backend.versions`."""
        return _versions("cupy-cuda12x", "cupy-cuda13x", "cudf-cu12", "cudf-cu13", "cuml-cu12", "cuml-cu13", "numpy")


def ranges(count: int, step: int) -> Iterator[slice]:
    """0 to ``count`` in slices of ``step``."""
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def cores() -> int:
    """Number of threads to use: ``NUMBA_NUM_THREADS``, or the cores that this process may run on."""
    given = os.environ.get("NUMBA_NUM_THREADS", "")
    return int(given) if given.isdigit() and int(given) > 0 else len(os.sched_getaffinity(0))


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
    lines = [
        Fact("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        Fact("cores", str(cores())),
        Fact("memory", f"{_free_memory() / 1e9:.1f} GB free"),
    ]
    lines += [Fact(name, version) for name, version in CpuBackend("doctor").versions().items()]
    torch = _version("torch")
    lines.append(
        Fact("torch", torch or "not installed", "" if torch else "for .pt features: pip install 'gpu-init[torch]'")
    )
    return lines + _cuda_facts()


def _cuda_facts() -> list[Fact]:
    driver = _driver_version()
    lines = [Fact("CUDA driver", f"for CUDA {driver[0]}.{driver[1]}" if driver else "none found")]
    for library in ("cupy", "cudf", "cuml"):
        found = [f"{name} {_version(name)}" for name in _distributions(library)]
        twice = library == "cupy" and len(found) > 1
        lines.append(
            Fact(
                library,
                ", ".join(found) or "not installed",
                f"keep one: pip uninstall {' or '.join(_distributions(library))}" if twice else "",
            )
        )
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
    return [*lines, Fact("CUDA backend", "ready")]


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
    extra = "cuda13" if driver[0] >= 13 else "cuda12"
    absent = [library for library in ("cupy", "cudf", "cuml") if not _importable(library)]
    if absent:
        return _Missing(f"{', '.join(absent)} cannot be imported", f"Install with: pip install 'gpu-init[{extra}]'")
    import cupy

    try:
        if cupy.cuda.runtime.getDeviceCount() > 0:
            return None
        what = "the driver reports no device"
    except cupy.cuda.runtime.CUDARuntimeError as error:
        what = one_line(error)
    return _Missing(what, "Check nvidia-smi, and CUDA_VISIBLE_DEVICES, or use --backend cpu.")


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
    try:
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


def _free_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
