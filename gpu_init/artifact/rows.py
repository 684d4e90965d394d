"""Rows of an array on their way to a file."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from gpu_init.artifact.format import Header, header_bytes, misread, read_header
from gpu_init.files import storage

if TYPE_CHECKING:
    from gpu_init.artifact.staging import Staging

SYNC_BYTES = 64 << 20  # rows are made durable after this many bytes
SYNC_SECONDS = 2.0  # or this many seconds
_CHUNK = 8 << 20
_ABORT_SECONDS = 5.0


@contextmanager
def row_writer(path: str, row: int) -> Iterator[Callable[[NDArray[Any]], None]]:
    """Give what writes rows of an array that `Staging.allocate` made room for, from ``row`` on, one after another.

    They are durable when this is left. Others may write other rows meanwhile.

    Raises
    ------
    ResourceError
        The disk is full, or the array is not as the rows are.
    """
    header, folder = read_header(path), os.path.dirname(path)
    if header is None:
        raise misread(path)
    place = header.offset + row * (header.data_bytes // max(header.shape[0], 1))
    unsynced = 0

    def write(rows: NDArray[Any]) -> None:
        nonlocal place, unsynced
        rows = np.ascontiguousarray(rows)
        if header.dtype != rows.dtype or header.shape[1:] != rows.shape[1:]:
            raise misread(path)
        data = rows.data.cast("B") if rows.nbytes else memoryview(b"")
        with storage.writing(folder, rows.nbytes):
            while data:
                written = os.pwrite(descriptor, data[:_CHUNK], place)
                data, place, unsynced = data[written:], place + written, unsynced + written
            if unsynced >= SYNC_BYTES:
                os.fdatasync(descriptor)
                unsynced = 0

    with storage.writing(folder):
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        yield write
        with storage.writing(folder):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _AbortedError(Exception):
    """The writer was told to stop."""


class RowWriter:
    """An array on its way to disk, block by block, in a thread, so that the next block is computed meanwhile.

    A context manager: leaving it closes the file, or, by an exception, aborts. At most every 64 MB or 2 s the
    rows so far are made durable and noted in the journal; a part of a row, or a row that may not be on the disk,
    is never counted.

    Attributes
    ----------
    done : int
        Rows that an earlier run made durable: `write` goes on after these.
    """

    def __init__(self, staging: Staging, relpath: str, path: str, header: Header) -> None:
        self._staging, self._relpath, self._header = staging, relpath, header
        self._row_bytes = header.data_bytes // max(header.shape[0], 1)
        self.done, whole = staging._durable_rows(relpath, header)
        self._open = not whole
        if whole:
            return
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        self._sink = storage.Sink(self._descriptor)
        try:
            self._go_to_end(path)
        except BaseException:
            os.close(self._descriptor)
            raise
        self._rows = self.done
        self._synced_size, self._synced_at = self._sink.size, time.monotonic()
        self._error: BaseException | None = None
        self._queue: queue.Queue[NDArray[Any] | None] = queue.Queue(1)
        self._thread = threading.Thread(target=self._work, name=f"write {relpath}", daemon=True)
        self._thread.start()

    def _go_to_end(self, path: str) -> None:
        """Cut off what is not durable, hash what is, and see that the rest has room."""
        prefix = header_bytes(self._header.shape, self._header.dtype)
        end = len(prefix) + self.done * self._row_bytes
        if os.pread(self._descriptor, len(prefix), 0) != prefix or os.fstat(self._descriptor).st_size < end:
            self.done, end = 0, 0
            self._staging._note_rows(self._relpath, self._header, 0)
        os.ftruncate(self._descriptor, end)
        self._sink.skip()
        storage.require_free(os.path.dirname(path), self._header.data_bytes - self.done * self._row_bytes)
        if not end:
            self._sink.write(prefix)
            storage.sync_dir(os.path.dirname(path))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abort()

    def write(self, block: NDArray[Any]) -> None:
        """Hand over the next rows.

        Returns once all blocks before this one are written; this one belongs to the writer until the next call
        returns. Two buffers used in turn are therefore enough.

        Parameters
        ----------
        block : ndarray of shape (n, d)
            Of the array's dtype and width; any layout in memory.

        Raises
        ------
        ResourceError
            The disk is full, seen while this or an earlier block was written.
        """
        if not self._open:
            raise ValueError(f"{self._relpath}: is closed")
        if block.dtype != self._header.dtype or block.shape[1:] != self._header.shape[1:]:
            raise ValueError(f"{self._relpath}: a block of {block.dtype} {block.shape}, the array is {self._header}")
        block = np.ascontiguousarray(block)
        self._queue.join()
        self._raise()
        self._queue.put(block)

    def close(self) -> None:
        """Wait for the thread, make everything durable, and note the array as finished.

        Raises
        ------
        ResourceError
            The disk is full.
        ValueError
            Fewer or more rows were written than the array has.
        """
        if not self._open:
            return
        try:
            self._queue.join()
            self._raise()
            if self._rows != self._header.shape[0]:
                raise ValueError(f"{self._relpath}: {self._rows} rows were written, the array has {self._header.shape}")
            with storage.writing(self._staging.path):
                os.fsync(self._descriptor)
        finally:
            self.abort()
        self._staging._note_array(self._relpath, self._sink)

    def abort(self) -> None:
        """Stop the thread; rows that are durable stay, the rest is not counted."""
        if not self._open:
            return
        self._open = False
        self._error = self._error or _AbortedError()  # what still waits in the queue is dropped
        with suppress(queue.Full):
            self._queue.put(None, timeout=_ABORT_SECONDS)
        self._thread.join(_ABORT_SECONDS)
        if not self._thread.is_alive():  # a disk that hangs must not hang the job: the thread ends with the process
            os.close(self._descriptor)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (block := self._queue.get()) is not None:
            try:
                if self._error is None:
                    self._append(block)
            except BaseException as error:  # raised again by write and close, in the job's own thread
                self._error = error
            finally:
                del block  # or it would be kept until the next one comes
                self._queue.task_done()

    def _append(self, block: NDArray[Any]) -> None:
        left = (self._header.shape[0] - self._rows) * self._row_bytes
        with storage.writing(self._staging.path, left):
            self._sink.write(block.data)
            self._rows += len(block)
            waited = time.monotonic() - self._synced_at
            if self._sink.size - self._synced_size >= SYNC_BYTES or waited >= SYNC_SECONDS:
                os.fdatasync(self._descriptor)
                # nobody reads these pages soon; the next rows take their place in memory, not that of others
                os.posix_fadvise(self._descriptor, 0, self._sink.size, os.POSIX_FADV_DONTNEED)
                self._staging._note_rows(self._relpath, self._header, self._rows)
                self._synced_size, self._synced_at = self._sink.size, time.monotonic()
