"""How the CPU's kernels are compiled, and where the machine code is kept."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numba
from numba import njit


def _cache_folder() -> str | None:
    """A folder of the user's own for compiled code, or None: then every process compiles anew.

    numba's own choice fails on a read-only installation, and a shared folder would be a way in: its index
    is unpickled.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(base) / "gpu-init" / "numba"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return None
    return str(folder) if os.access(folder, os.W_OK | os.X_OK) and folder.stat().st_uid == os.getuid() else None


_REORDERING = {"reassoc", "nsz", "contract"}  # sums in vectors, products fused with them

# What kernels call: compiled apart, which takes much less time than numba's own inlining; LLVM inlines them anyway.
# Nobody else calls them, so they go without the code that would take them there. Their arrays live as long as the
# kernel runs, so nobody counts who refers to them (nrt): that would be done atomically, row after row, in all threads
# at one place, and a processor waits for all its reads before it.
_INNER: dict[str, Any] = {
    "_nrt": False,
    "nogil": True,
    "error_model": "numpy",
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}
inner: Any = njit(**_INNER, forceinline=True)
inner_large: Any = njit(**_INNER)
inner_allocating: Any = njit(**{**_INNER, "_nrt": True})
inner_reordering: Any = njit(**_INNER, forceinline=True, fastmath=_REORDERING)


def _load_threads() -> None:
    """Load numba's OpenMP threads so that they sleep when they have nothing to do.

    By default they spin on the cores that the threads of BLAS and of `gpu_init.backend` need meanwhile. OpenMP
    reads the variable once, when it is loaded; it is left as it was found.
    """
    with _environment("OMP_WAIT_POLICY", "passive"), suppress(ImportError):
        importlib.import_module("numba.np.ufunc.omppool")


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Set an environment variable for a while, where it is not set."""
    if name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]


def _compile(function: Any, parallel: bool, fastmath: Any = False) -> Any:
    config: Any = numba.config
    before = config.CACHE_DIR
    folder = before or _cache_folder()
    try:
        config.CACHE_DIR = folder or ""  # read when the decorator runs, so it need not stay set for others
        options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True}
        found = njit(parallel=parallel, fastmath=fastmath, cache=folder is not None, **options)(function)
    finally:
        config.CACHE_DIR = before
    if folder is not None:
        found._cache.save_overload = _where_there_is_room(found._cache.save_overload)
    return found


def _where_there_is_room(save: Callable[..., None]) -> Callable[..., None]:
    """Keep machine code as numba does, but let nothing fail for it, such as a full disk."""

    def attempt(*arguments: Any) -> None:
        with suppress(OSError):
            save(*arguments)

    return attempt


def compiled(function: Any) -> Any:
    """Compile in parallel, keeping the machine code where `_cache_folder` says, or where NUMBA_CACHE_DIR does."""
    return _compile(function, parallel=True)


def compiled_reordering(function: Any) -> Any:
    """As `compiled`; sums may be taken in vectors and fused with products, one way on one kind of processor."""
    return _compile(function, parallel=True, fastmath=_REORDERING)


def compiled_serial(function: Any) -> Any:
    """Compile for one thread, keeping the machine code likewise."""
    return _compile(function, parallel=False)


_load_threads()
