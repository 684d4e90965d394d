"""Choice of the backend, and of the kernels that suit the size of the work."""

from __future__ import annotations

from collections.abc import Callable

from gpu_init.backend.cpu import CpuBackend
from gpu_init.backend.cuda import CudaBackend
from gpu_init.backend.doctor import missing_for_cuda
from gpu_init.backend.interface import Backend, silent
from gpu_init.errors import InputError
from gpu_init.kernels import kernels_for


def select(name: str, say: Callable[[str], None] = silent) -> Backend:
    """Give the backend ``cpu`` or ``cuda``; ``auto`` takes CUDA where a device and the libraries are there.

    Parameters
    ----------
    name : {"auto", "cpu", "cuda"}
    say : callable, optional
        Tells the user one line; the default tells nobody.

    Raises
    ------
    InputError
        The name is another one, or ``cuda`` was asked for and something is missing; the message names it, and the
        command that installs it.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"backend {name!r}: choose auto, cpu or cuda.")
    if name == "cpu":
        return CpuBackend("asked for", say=say)
    missing = missing_for_cuda()
    if not missing:
        return CudaBackend("asked for" if name == "cuda" else "a CUDA device and its libraries are there", say)
    if name == "cuda":
        raise InputError(f"--backend cuda: {missing.what}.\n{missing.fix}")
    return CpuBackend(missing.what, say=say)


def for_work(backend: Backend, seconds: float) -> Backend:
    """Give the backend with the kernels for work that would take so many seconds with numpy (`kernels_for`)."""
    return backend.with_kernels(kernels_for(seconds))
