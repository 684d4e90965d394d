"""Finds, identifies and reads files on disks and in object storage (`remote`); writes files durably on disks.

A file is written to a temporary file beside its place, synced, and then renamed; its folder is synced too. Each folder
may have one writer at a time, which `Lock` ensures for the output.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import hashlib
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from gpu_init.errors import InputError, ResourceError
from gpu_init.files import remote

if TYPE_CHECKING:
    from typing_extensions import Buffer

WHOLE_BYTES = 256 << 20  # files up to this size are hashed whole; of larger ones, this many pieces of this size
_PIECES = 256
_PIECE = 1 << 20
_READ = 1 << 20  # Bytes read at a time into memory that is used again: it stays in a processor's cache.
_CHUNK = 8 << 20  # bytes that are hashed and written at a time


def fingerprint(path: str) -> dict[str, int | str]:
    """Identify the content of a file, whatever its time.

    A file of up to 256 MiB is hashed whole with SHA-256. For a larger one, the hash is of its size (8 bytes, little
    endian), followed by 256 pieces of 1 MiB, spread evenly, the first and the last of the file included.

    Returns
    -------
    dict
        `bytes`, its size, and `hash`, "sha256:..." or "sampled-sha256:...".

    Raises
    ------
    InputError
        It is not a file, or cannot be read.
    """
    if remote.is_url(path):
        return remote.fingerprint(path)
    with reading(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size <= WHOLE_BYTES:
            return {"bytes": size, "hash": f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"}
        digest = hashlib.sha256(size.to_bytes(8, "little"))
        for piece in range(_PIECES):
            file.seek(piece * (size - _PIECE) // (_PIECES - 1))
            digest.update(file.read(_PIECE))
        return {"bytes": size, "hash": f"sampled-sha256:{digest.hexdigest()}"}


@contextmanager
def reading(path: str) -> Iterator[io.BufferedReader]:
    """Open a regular file. Errors of the system while it is read become an `InputError` that names it."""
    if "\0" in path:
        raise InputError(f"{path!r} is not a path.")
    path = local(path)
    try:
        # Without O_NONBLOCK, opening a pipe would wait for its other end for ever.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise InputError(f"{path} is not a regular file.")
            yield file
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({_why(error)}).") from None


def file_state(path: str) -> tuple[int, int]:
    """Size of a file in bytes, and a number that changes with its content: its time of change where it is local.

    Raises
    ------
    InputError
        It cannot be reached.
    """
    if remote.is_url(path):
        return remote.state(path)
    try:
        found = os.stat(path)
    except OSError as error:
        raise InputError(f"{path}: {_why(error)}") from None
    return found.st_size, found.st_mtime_ns


def require_local(path: str) -> None:
    """Refuse a URL where a place on a disk is needed."""
    if remote.is_url(path):
        raise InputError(f"{path}: is in object storage; name a place on a disk.")


def make_folder(path: str) -> None:
    """Make a folder and its parents where they are missing; object storage has none."""
    if not remote.is_url(path):
        with writing(os.path.dirname(os.path.abspath(path))):
            os.makedirs(path, exist_ok=True)


def real_path(path: str) -> str:
    """Path without links, `.` and `..`; a URL without a slash at its end."""
    return path.rstrip("/") if remote.is_url(path) else os.path.realpath(path)


def local(path: str) -> str:
    """Path of a file on this machine; a URL is copied first."""
    return remote.local(path) if remote.is_url(path) else path


def source(path: str) -> Any:
    """Give a library the file that it reads parts of: the path itself, or an open `remote.Object`."""
    return remote.Object(path) if remote.is_url(path) else path


def stream(path: str) -> Any:
    """Open a text file for pyarrow, to be read from start to end, and decompressed as its name tells."""
    import pyarrow as pa

    if remote.is_url(path):
        return pa.input_stream(remote.stream(path), compression="gzip" if path.endswith(".gz") else None)
    return pa.input_stream(path, compression="detect")


def expand(pattern: str, extensions: tuple[str, ...]) -> list[str]:
    """Find the files that a path stands for.

    Parameters
    ----------
    pattern : str
        A file of any name; a folder, searched to any depth; or a glob (`**` too), whose folders are searched too.
        In folders and globs, names that start with a dot or an underscore are left out.
    extensions : tuple of str
        Endings of the names that are taken from folders and globs, such as ".csv".

    Returns
    -------
    list of str
        Sorted, each once.

    Raises
    ------
    InputError
        A folder cannot be read, or nothing is found.
    """
    require_utf8(pattern)
    if remote.is_url(pattern):
        return remote.find(pattern, extensions)
    if os.path.isfile(pattern):
        return [pattern]
    is_glob = not os.path.lexists(pattern) and remote.is_glob(pattern)
    found: set[str] = set()
    for path in _matches(pattern) if is_glob else [pattern]:
        if os.path.isdir(path):
            found.update(_below(path, extensions))
        elif is_glob and path.endswith(extensions) and os.path.isfile(path):
            found.add(path)
    for path in sorted(found):
        require_utf8(path)
    if found:
        return sorted(found)
    if is_glob or os.path.isdir(pattern):
        raise InputError(f"{pattern}: no files there that end in {', '.join(extensions)}.")
    found_what = "neither a file nor a folder" if os.path.exists(pattern) else "there is no such file or folder"
    raise InputError(f"{pattern or 'the empty path'}: {found_what}.")


def require_utf8(path: str) -> None:
    """Refuse a name that is not UTF-8, which the manifest and the libraries that read tables cannot hold."""
    if any("\ud800" <= letter <= "\udfff" for letter in path):
        raise InputError(f"{path!a}: its name is not UTF-8; rename it.")


def _matches(pattern: str) -> Iterator[str]:
    written = set(pattern.split(os.sep))
    for path in glob.iglob(pattern, recursive=True):
        if not any(remote.left_out(name) and name not in written for name in path.split(os.sep)):
            yield path


def _below(folder: str, extensions: tuple[str, ...]) -> Iterator[str]:
    """Files of a folder, to any depth. Links to folders are not followed, as they may form circles."""

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be read ({_why(error)}).")

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not remote.left_out(name)]
        for name in names:
            path = os.path.join(parent, name)
            if name.endswith(extensions) and not remote.left_out(name) and os.path.isfile(path):
                yield path


class Sink(io.RawIOBase):
    """A file that is written from its start to its end, with the SHA-256 digest and the size of what is written.

    The descriptor is open for writing, at the place of the next byte; the caller closes it.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.digest = hashlib.sha256()
        self.size = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.size

    def write(self, data: Buffer, /) -> int:
        """Write all of a C-contiguous buffer, and give its size in bytes."""
        view = memoryview(data)
        if view.nbytes == 0:
            return 0
        view = view.cast("B")
        for start in range(0, len(view), _CHUNK):
            chunk = view[start : start + _CHUNK]
            self.digest.update(chunk)
            while chunk:
                written = os.write(self.descriptor, chunk)
                self.size += written
                chunk = chunk[written:]
        return len(view)

    def skip(self, end: int | None = None) -> None:
        """Read what the file holds already, from here to the byte ``end``, or to its own end, as if just written."""
        buffer = memoryview(bytearray(_READ))
        while read := os.readv(self.descriptor, [buffer if end is None else buffer[: end - self.size]]):
            self.digest.update(buffer[:read])
            self.size += read


@contextmanager
def create(path: str, needed: int = 0) -> Iterator[Sink]:
    """Write a file that appears at its path whole and durable, or not at all; it replaces a file that is there.

    ``needed`` is the number of bytes that will be written, for the message where the disk is full.

    Raises
    ------
    ResourceError
        The disk is full, or fails.
    InputError
        The folder does not take files.
    """
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.tmp")
    with writing(folder or ".", needed):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(temporary, flags, 0o666)
        try:
            try:
                yield Sink(descriptor)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        sync_dir(folder or ".")


def write_file(path: str, data: bytes) -> None:
    """Write a small file as `create` does, or an object."""
    if remote.is_url(path):
        remote.write(path, data)
        return
    with create(path, len(data)) as sink:
        sink.write(data)


@contextmanager
def writing(folder: str, needed: int = 0) -> Iterator[None]:
    """Inside, errors of the system while a folder is written to become `InputError` or `ResourceError`."""
    try:
        yield
    except OSError as error:
        place = error.filename if isinstance(error.filename, str) else folder
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise _too_little(folder, needed, _why(error)) from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise InputError(f"{folder}: cannot be written to ({_why(error)}); choose another place.") from None
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
            raise InputError(f"{place}: cannot be written ({_why(error)}).") from None
        raise ResourceError(f"{place}: writing failed ({_why(error)}).") from None


def require_free(folder: str, needed: int) -> None:
    """Raise a `ResourceError` where fewer than ``needed`` bytes are free on the disk of a folder."""
    if free_bytes(folder) < needed:
        raise _too_little(folder, needed, "not enough disk")


def free_bytes(path: str) -> int:
    """Bytes that this user may still write on the disk of a path, or of its nearest parent that exists."""
    while not os.path.exists(path):
        path = os.path.dirname(os.path.abspath(path))
    state = os.statvfs(path)
    return state.f_bavail * state.f_frsize


def _too_little(folder: str, needed: int, why: str) -> ResourceError:
    free = free_bytes(folder)
    figures = f"{needed:,} bytes are needed, {free:,} are free" if needed else f"{free:,} bytes are free"
    return ResourceError(f"{folder}: {why}: {figures}; make room, or choose another place.")


def _why(error: OSError) -> str:
    return error.strerror or type(error).__name__


def sync_dir(path: str) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot sync a folder, and say so
            raise
    finally:
        os.close(descriptor)


def exchange(a: str, b: str) -> bool:
    """Exchange two paths in one step (Linux, renameat2 with RENAME_EXCHANGE).

    Gives False, and changes nothing, where the system or the file system cannot; raises `OSError` where it can, but
    not with these two paths.
    """
    at_working_folder, rename_exchange = -100, 2
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    if renameat2(at_working_folder, os.fsencode(a), at_working_folder, os.fsencode(b), rename_exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), a)


class Lock:
    """A lock file that at most one run holds; the system frees it when the process ends, in whatever way.

    The holder removes the file before it lets go. So a run that gets a lock checks that its file is still at the path,
    and starts again where it is not: no two runs hold locks on one path, and no file is left behind. Only SIGKILL
    leaves a file, which is free to take, until the next run.

    Parameters
    ----------
    path : str
        The lock file.
    guarded : str
        The name, for the message, of what the lock guards.

    Raises
    ------
    InputError
        Another run holds it.
    OSError
        The file cannot be made.
    """

    def __init__(self, path: str, guarded: str) -> None:
        self.path = path
        while True:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            self._descriptor = os.open(path, flags, 0o666)
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._stands():
                    break
            except BlockingIOError:
                holder = os.pread(self._descriptor, 20, 0).decode("ascii", "replace") or "unknown"
                os.close(self._descriptor)
                raise InputError(f"another run writes to {guarded} (process {holder}); wait for it to end.") from None
            except BaseException:
                os.close(self._descriptor)
                raise
            os.close(self._descriptor)
        os.ftruncate(self._descriptor, 0)
        with suppress(OSError):  # on a full disk the lock holds without the holder's number
            os.pwrite(self._descriptor, str(os.getpid()).encode(), 0)

    def _stands(self) -> bool:
        try:
            there = os.stat(self.path, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(there, os.fstat(self._descriptor))

    def release(self) -> None:
        """Remove the file, then let go."""
        with suppress(OSError):
            os.unlink(self.path)
        os.close(self._descriptor)
