"""How the CPU's kernels are compiled, and where the machine code is kept."""

from __future__ import annotations

import fcntl
import functools
import importlib
import os
import time
import zlib
from collections.abc import Iterator
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


_PATIENCE = 120  # seconds for another process to compile; it takes half a minute at most
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
        _take_turns(found._cache, f"{function.__module__}.{function.__qualname__}", _lock_in(folder))
    return found


class _Lock:
    """A lock file of all processes that keep machine code in a folder, with a place for each thing that is made."""

    def __init__(self, folder: str) -> None:
        self._path = os.path.join(folder, "lock")

    @functools.cached_property
    def _file(self) -> int:
        return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)  # closing it would let go of all

    def take(self, place: int) -> None:
        """Wait for a place, not for ever: whoever has it may be stuck."""
        deadline = time.monotonic() + _PATIENCE
        with suppress(OSError):  # no file can be made there, or locked
            file = self._file
            while time.monotonic() < deadline:
                with suppress(BlockingIOError, PermissionError):
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
                    return
                time.sleep(0.05)

    def leave(self, place: int) -> None:
        """Let the next one have a place."""
        with suppress(OSError):
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, place)


_lock_in = functools.cache(_Lock)


def _take_turns(cache: Any, name: str, lock: _Lock) -> None:
    """Of processes that need the same machine code, let one make it and the others load it.

    It is kept as numba does, but nothing fails for it, such as a full disk.
    """
    load, save = cache.load_overload, cache.save_overload

    def place(signature: Any) -> int:
        return 1 + zlib.crc32(f"{name}{signature}".encode())

    def load_or_begin(signature: Any, context: Any) -> Any:
        found = load(signature, context)
        if found is None:
            lock.take(place(signature))
            found = load(signature, context)
            if found is not None:
                lock.leave(place(signature))
        return found

    def keep(signature: Any, made: Any) -> None:
        lock.take(0)  # of its list, which is read and written anew
        with suppress(OSError):
            save(signature, made)
        lock.leave(0)
        lock.leave(place(signature))

    cache.load_overload, cache.save_overload = load_or_begin, keep


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
