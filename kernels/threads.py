"""Threads that work on ranges of rows in parallel, each with one BLAS thread."""

from __future__ import annotations

import contextlib
import functools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

_T = TypeVar("_T")

PARTS = 8  # Sums over users are taken for at most so many ranges of users side by side, each into a table of its own.
PARTS_BYTES = 128 << 20  # These tables take no more memory together: there are fewer ranges where a table is large.


def cores() -> int:
    """Number of threads to use: ``NUMBA_NUM_THREADS``, or the number of cores that this process may run on."""
    given = os.environ.get("NUMBA_NUM_THREADS", "")
    return int(given) if given.isdigit() and int(given) > 0 else len(os.sched_getaffinity(0))


def cache_folder() -> Path:
    """gpu-init's folder in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")) / "gpu-init"


def one_blas_thread() -> contextlib.AbstractContextManager[Any]:
    """Limit BLAS, LAPACK and OpenMP to one thread: they split sums by threads, which would change the bytes."""
    return _libraries().limit(limits=1)  # type: ignore[no-any-return]


def in_order(function: Callable[[slice], _T], parts: Iterable[slice]) -> Iterator[_T]:
    """The results of ``function`` for the parts, in order; a thread per core computes a few of them ahead."""
    ahead: deque[Future[_T]] = deque()
    for part in parts:
        ahead.append(_pool().submit(function, part))
        if len(ahead) > 2 * cores():
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()


_left_out: list[None] = []  # has one element for each core that `run` leaves free


@contextlib.contextmanager
def leaving_a_core() -> Iterator[None]:
    """While the context is open, `run` leaves a core to another thread, such as one that writes results."""
    _left_out.append(None)
    try:
        yield
    finally:
        _left_out.pop()


def run(function: Callable[[slice], object], parts: Iterable[slice]) -> None:
    """Call ``function`` for each part, in any order, in the caller's thread and one thread per other free core."""
    left = iter(list(parts))  # an iterator of a list, from which several threads may take at once

    def work() -> None:
        for part in left:
            function(part)

    others = [_pool().submit(work) for _ in range(cores() - 1 - len(_left_out))]
    try:
        work()
    finally:
        for other in others:
            other.result()


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(cores(), thread_name_prefix="gpu-init")


@functools.cache
def _libraries() -> Any:
    """The thread pools of the loaded libraries, numpy's BLAS and scipy's among them."""
    import scipy.linalg  # noqa: F401  # scipy has a BLAS of its own
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()
