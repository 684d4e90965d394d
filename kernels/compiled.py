"""How the CPU's kernels are compiled, and where their machine code is kept."""

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

from gpu_init.kernels import cache_folder

int32, int64, uint8, uint64 = types.int32, types.int64, types.uint8, types.uint64
float32, float64 = types.float32, types.float64

_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}


def reads(dtype: Any, dimensions: int = 1) -> Any:
    """Type of an array that a kernel reads: in C order, and it may be mapped from a file."""
    return types.Array(dtype, dimensions, "C", readonly=True)


def writes(dtype: Any, dimensions: int = 1) -> Any:
    """Type of an array that a kernel writes, in C order."""
    return types.Array(dtype, dimensions, "C")


class Kernel:
    """A function compiled by numba for one signature, at its first call or by `prepare`; it runs without Python's lock.

    Parameters
    ----------
    function : callable
        In the part of Python that numba compiles.
    signature : sequence of numba types
        Of its arguments. Others are refused and never compiled for.
    fused : bool
        Whether a product and the sum that it goes into may be rounded once.
    """

    def __init__(self, function: Callable[..., Any], signature: tuple[Any, ...], fused: bool) -> None:
        self.name = function.__name__
        self._function, self._signature, self._fused = function, signature, fused
        self._lock = threading.Lock()
        self._compiled: Any = None

    def prepare(self) -> Any:
        """Compile it, or load the machine code where that is kept, unless that is done."""
        with self._lock:
            if self._compiled is None:
                made = _wrapped(self._function, {"contract"} if self._fused else False)
                with suppress(OSError):  # such as a full disk: the machine code is there, but is not kept
                    made.compile(self._signature)
                made.disable_compile()
                self._compiled = made
        return self._compiled

    def __call__(self, *arguments: Any) -> Any:
        """Run it on arrays of the signature's types; arrays that it only reads must be marked so, see `read_only`."""
        return (self._compiled or self.prepare())(*arguments)


_wrapping = threading.Lock()


def _wrapped(function: Callable[..., Any], fastmath: Any) -> Any:
    """A function that numba compiles and keeps in our folder: it reads the setting, which is everybody's, just now."""
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
    """An array as kernels read it: in C order, of a type, and not to be written; a copy only where it is not so yet."""
    import numpy as np

    view = np.ascontiguousarray(array, dtype).view(np.ndarray)
    view.flags.writeable = False
    return view


def prepare(kernels: Iterable[Kernel]) -> None:
    """Compile kernels, one after another, in a thread of its own: what is used first should come first."""

    def work() -> None:
        for one in kernels:
            one.prepare()

    threading.Thread(target=work, name="compile kernels", daemon=True).start()


@cache
def folder() -> str | None:
    """Folder that machine code is kept in, or None: then every process compiles anew.

    That is one of the user's own, since numba's list of contents is unpickled, and whoever writes to it may run code;
    where none can be written, a folder of this process alone. The folder ``numba`` in ``GPU_INIT_MACHINE_CODE`` is
    copied there if it cannot be written, since numba reads only where it can write.
    """
    if "NUMBA_CACHE_DIR" in os.environ:
        return os.environ["NUMBA_CACHE_DIR"]
    ahead = os.environ.get("GPU_INIT_MACHINE_CODE")  # what `gpu-init doctor --compile` made, or an image brings
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
                    os.replace(partial, copy)  # whole or not at all, as other processes may look
    return own


def _is_ours(folder: str) -> bool:
    """Whether a folder is the user's own, and can be written; it is made where it is not there yet."""
    try:
        os.makedirs(folder, exist_ok=True, mode=0o755)
        return os.access(folder, os.W_OK | os.X_OK) and os.stat(folder).st_uid == os.getuid()
    except OSError:
        return False


def _own_folder() -> str | None:
    folder = str(cache_folder() / "numba")
    if _is_ours(folder):
        return folder
    for place in ("/dev/shm", None):  # None: where Python looks for such a folder
        with suppress(OSError):
            folder = tempfile.mkdtemp(prefix="gpu-init-", dir=place)
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            return folder
    return None
