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

from gpu_init.backend.cpu import CpuBackend
from gpu_init.backend.cuda import CudaBackend
from gpu_init.backend.doctor import missing_for_cuda
from gpu_init.backend.interface import Backend
from gpu_init.errors import InputError
from gpu_init.kernels import kernels_for


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
    missing = missing_for_cuda()
    if not missing:
        return CudaBackend("asked for" if name == "cuda" else "a CUDA device and its libraries are there")
    if name == "cuda":
        raise InputError(f"--backend cuda: {missing.what}.\n{missing.fix}")
    return CpuBackend(missing.what)


def for_work(backend: Backend, seconds: float) -> Backend:
    """Give the backend with the kernels that `kernels_for` names."""
    return backend.with_kernels(kernels_for(seconds))
