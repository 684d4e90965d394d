"""Compiles the CPU kernels with numba, and keeps their machine code on disk."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba import types

from gpu_init.kernels.threads import cache_folder

int32, int64, uint8, uint64 = types.int32, types.int64, types.uint8, types.uint64
float32, float64 = types.float32, types.float64

_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}


def reads(dtype: Any, dimensions: int = 1) -> Any:
    """Type of an array that a kernel reads: in C order, possibly mapped from a file."""
    return types.Array(dtype, dimensions, "C", readonly=True)


def writes(dtype: Any, dimensions: int = 1) -> Any:
    """Type of an array that a kernel writes, in C order."""
    return types.Array(dtype, dimensions, "C")


class Kernel:
    """A function compiled by numba for one signature, at its first call or by `prepare`; it runs without Python's lock.

    Parameters
    ----------
    function : callable
        Plain Python of the kind that numba compiles.
    signature : sequence of numba types
        The types of its arguments; a call with other types is an error.
    fused : bool
        Whether a product and the sum that it is added to may be rounded once.
    """

    def __init__(self, function: Callable[..., Any], signature: tuple[Any, ...], fused: bool) -> None:
        self.name = function.__name__
        self._function, self._signature, self._fused = function, signature, fused
        self._lock = threading.Lock()
        self._compiled: Any = None

    def prepare(self) -> Any:
        """Compile the function, or load its machine code from disk; does nothing the second time."""
        with self._lock:
            if self._compiled is None:
                made = _wrapped(self._function, {"contract"} if self._fused else False)
                with suppress(OSError):  # such as a full disk: the machine code is in memory, but not kept
                    made.compile(self._signature)
                made.disable_compile()
                self._compiled = made
        return self._compiled

    def __call__(self, *arguments: Any) -> Any:
        """Run the kernel on arrays of its types; arrays that it only reads come from `read_only`."""
        return (self._compiled or self.prepare())(*arguments)


_wrapping = threading.Lock()


def _wrapped(function: Callable[..., Any], fastmath: Any) -> Any:
    """A function that numba compiles and keeps in our folder, which numba reads from a global setting here only."""
    where = folder()
    config: Any = numba.config
    with _wrapping:
        before = config.CACHE_DIR
        try:
            config.CACHE_DIR = where or ""
            return numba.njit(**_OPTIONS, fastmath=fastmath, cache=where is not None)(function)
        finally:
            config.CACHE_DIR = before


def kernel(*signature: Any, fused: bool = False) -> Callable[[Callable[..., Any]], Kernel]:
    """Make a `Kernel` of a function."""
    return lambda function: Kernel(function, signature, fused)


def read_only(array: Any, dtype: Any) -> Any:
    """A read-only view of an array in C order and of a type; a copy only if it has another type or order."""
    import numpy as np

    view = np.ascontiguousarray(array, dtype).view(np.ndarray)
    view.flags.writeable = False
    return view


def prepare(kernels: Iterable[Kernel]) -> None:
    """Compile kernels one after another in a new thread; the kernels that are used first should come first."""

    def work() -> None:
        for one in kernels:
            one.prepare()

    threading.Thread(target=work, name="compile kernels", daemon=True).start()


@cache
def folder() -> str | None:
    """Folder that keeps the machine code, or None if there is none: then every process compiles again.

    Only the user may be able to write to the folder: numba unpickles its index, and whoever writes to it can run code.
    If the user's cache cannot be written, this is a temporary folder of this process. numba reads only from a folder
    that it can write to, so the folder ``numba`` in ``GPU_INIT_MACHINE_CODE`` is copied if it cannot be written.
    """
    if "NUMBA_CACHE_DIR" in os.environ:
        return os.environ["NUMBA_CACHE_DIR"]
    ahead = os.environ.get("GPU_INIT_MACHINE_CODE")  # made by `gpu-init doctor --compile`, or part of an image
    brought = ahead and os.path.join(ahead, "numba")
    if brought and _is_ours(brought):
        return brought
    own = _own_folder()
    if own and brought:
        with suppress(OSError):
            for path in Path(brought).rglob("*.nb?"):
                copy = Path(own, path.relative_to(brought))
                if not copy.exists():
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    partial = f"{copy}.{os.getpid()}"
                    shutil.copyfile(path, partial)
                    os.replace(partial, copy)  # atomic, because other processes may read it now
    return own


def _is_ours(folder: str) -> bool:
    """Whether the user owns the folder and can write to it; creates it if it does not exist."""
    try:
        os.makedirs(folder, exist_ok=True, mode=0o755)
        return os.access(folder, os.W_OK | os.X_OK) and os.stat(folder).st_uid == os.getuid()
    except OSError:
        return False


def _own_folder() -> str | None:
    folder = str(cache_folder() / "numba")
    if _is_ours(folder):
        return folder
    for place in ("/dev/shm", None):  # None: the default of tempfile
        with suppress(OSError):
            folder = tempfile.mkdtemp(prefix="gpu-init-", dir=place)
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            return folder
    return None
