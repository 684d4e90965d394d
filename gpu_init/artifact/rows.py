"""Arrays of a run as tasks use them: rows are written into files where `Staging.allocate` made room for them."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpu_init.artifact.format import map_array, misread, read_header
from gpu_init.backend.interface import Backend, Outbox
from gpu_init.files import storage
from gpu_init.kernels.threads import leaving_a_core

SYNC_BYTES = 64 << 20  # Written rows are made durable, and later hashed, in pieces of this size.
_CHUNK = 8 << 20


@contextmanager
def row_writer(
    path: str, row: int, written: Callable[[int, memoryview], None] | None = None
) -> Iterator[Callable[[NDArray[Any]], None]]:
    """Write rows of an array, one block after another, beginning at one row.

    The rows are durable when the context is left. Others may write other rows of the array meanwhile.

    Parameters
    ----------
    path : str
        The file for which `Staging.allocate` made room.
    row : int
        Where the first block begins.
    written : callable, optional
        Told of the bytes of each block, and their place in the file, once they are written.

    Yields
    ------
    callable
        It takes the next block of shape (n, ...), of the array's dtype, in any layout in memory, and returns when
        the system has it.

    Raises
    ------
    ResourceError
        The disk is full, or the blocks do not go with the array.
    """
    header, folder = read_header(path), os.path.dirname(path)
    if header is None:
        raise misread(path)
    row_bytes = (header.end - header.offset) // max(header.shape[0], 1)
    place, unsynced = header.offset + row * row_bytes, 0

    def write(rows: NDArray[Any]) -> None:
        nonlocal place, unsynced
        rows = np.ascontiguousarray(rows)
        if place + rows.nbytes > header.end or header.dtype != rows.dtype or header.shape[1:] != rows.shape[1:]:
            raise misread(path)
        data = rows.data.cast("B") if rows.nbytes else memoryview(b"")
        with storage.writing(folder, rows.nbytes):
            while data:
                size = os.pwrite(descriptor, data[:_CHUNK], place)
                if written is not None:
                    written(place, data[:size])
                data, place, unsynced = data[size:], place + size, unsynced + size
            if unsynced >= SYNC_BYTES:
                os.fdatasync(descriptor)
                if written is not None:  # Nobody reads these pages soon; the next rows take their place in memory.
                    os.posix_fadvise(descriptor, place - unsynced, unsynced, os.POSIX_FADV_DONTNEED)
                unsynced = 0

    with storage.writing(folder):
        descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield write
        with storage.writing(folder):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Folder:
    """The arrays in a run's staging folder, by their paths in the artifact."""

    def __init__(self, path: str, written: Callable[[str, int, memoryview], None] | None = None) -> None:
        self.path = path
        self._written = written  # is told of all bytes that are written: path of the array, place in the file, bytes

    def load(self, path: str) -> NDArray[Any]:
        """Map an array; read-only."""
        return map_array(os.path.join(self.path, path))

    def write_rows(self, path: str, first: int) -> AbstractContextManager[Callable[[NDArray[Any]], None]]:
        """Write rows of an array from row ``first`` on, as `row_writer` does."""
        written = None if self._written is None else functools.partial(self._written, path)
        return row_writer(os.path.join(self.path, path), first, written)

    @contextmanager
    def outbox(self, backend: Backend, path: str, first: int, rows: int, width: int, dtype: str) -> Iterator[Outbox]:
        """Give the way of blocks from the device to the file, whose rows are written from row ``first`` on.

        A thread writes a block while the next one is computed.
        """
        before: Future[None] | None = None

        def send(block: Any) -> None:
            nonlocal before
            if before is not None:
                before.result()  # Its memory may be used again from here on.
            before = writer.submit(write, block)

        with self.write_rows(path, first) as write, ThreadPoolExecutor(1) as writer, leaving_a_core():
            with backend.outbox(rows, width, dtype, send) as outbox:
                yield outbox
            if before is not None:
                before.result()
