"""Object storage, through fsspec: `s3://`, `gs://`, `az://` and the other schemes that it knows.

Credentials, endpoints and regions come from the environment alone, as the libraries behind fsspec read them. Those
libraries retry by themselves. What fails all the same is retried here a few times, and then raises `ResourceError`,
because the store may work again when the job is resumed.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import io
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from gpu_init.errors import GpuInitError, InputError, ResourceError

if TYPE_CHECKING:
    from typing_extensions import Buffer

WHOLE_BYTES = 1 << 20  # objects up to this size are hashed whole; of larger ones, this many pieces of this size
PIECES = 16
PIECE_BYTES = 1 << 16
STREAM_BYTES = 16 << 20  # bytes of each request where an object is read from start to end
ATTEMPTS = 4
FIRST_PAUSE = 0.5  # seconds before the second attempt; each further pause is four times as long

_T = TypeVar("_T")
_URL = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "az": "az", "abfs": "az", "abfss": "az"}
_FINAL = ("NoCredentialsError", "PartialCredentialsError", "ParamValidationError", "InvalidRegionError")
_TAGS = ("md5Hash", "crc32c", "ETag", "etag")  # the stores' names for a checksum or tag of the content


def is_url(path: str) -> bool:
    """Whether a path is in object storage."""
    return _URL.match(path) is not None


def is_glob(pattern: str) -> bool:
    """Whether a path has wildcards."""
    return not {"*", "?", "["}.isdisjoint(pattern)


def left_out(name: str) -> bool:
    """Whether the search of a folder leaves out this name, as engines that write tables expect (`_SUCCESS`)."""
    return name.startswith((".", "_"))


def state(url: str) -> tuple[int, int]:
    """Size of an object in bytes, and a number that changes with its content."""
    size, tag = _facts(url)
    return size, int.from_bytes(hashlib.sha256(tag.encode()).digest()[:8], "little")


def fingerprint(url: str) -> dict[str, int | str]:
    """Identify the content of an object, as `storage.fingerprint` does for a file, without reading all of it.

    An object of up to 1 MiB is hashed whole with SHA-256. For a larger one, the hash is of its size (8 bytes, little
    endian), of the checksum or tag that the store gives it, and of 16 pieces of 64 KiB, spread evenly, the first and
    the last included.
    """
    size, tag = _facts(url)
    if size <= WHOLE_BYTES:
        return {"bytes": size, "hash": f"sha256:{hashlib.sha256(read(url)).hexdigest()}"}
    digest = hashlib.sha256(size.to_bytes(8, "little") + tag.encode())
    for piece in range(PIECES):
        start = piece * (size - PIECE_BYTES) // (PIECES - 1)
        digest.update(read(url, start, start + PIECE_BYTES))
    return {"bytes": size, "hash": f"sampled-sha256:{digest.hexdigest()}"}


def find(pattern: str, extensions: tuple[str, ...]) -> list[str]:
    """Find the objects that a URL stands for, by the rules of `storage.expand`."""
    bucket = _URL.sub("", pattern).split("/", 1)[0]
    if not bucket or "@" in bucket:
        raise InputError(f"{pattern}: wanted is a bucket after ://, and no credentials: the environment has those.")
    if _kind(pattern) == "file":
        return [pattern]
    wild = is_glob(pattern)
    roots = _call(pattern, lambda store, path: sorted(store.glob(path))) if wild else [_split(pattern)[1]]
    found: set[str] = set()
    for root in roots:
        one = _split(pattern)[0].unstrip_protocol(root)
        if wild and _kind(one) == "file":
            found.update([one] if root.endswith(extensions) else [])
            continue
        for name in sizes(one):
            if name.endswith(extensions) and not any(map(left_out, name.split("/"))):
                found.add(f"{one.rstrip('/')}/{name}")
    if found:
        return sorted(found)
    where = "no objects there that end in " + ", ".join(extensions)
    raise InputError(f"{pattern}: {where if wild or sizes(pattern) else 'there is no such object'}.")


def sizes(url: str) -> dict[str, int]:
    """Sizes in bytes of all objects below a URL, to any depth, by their names relative to it."""

    def listed(store: Any, path: str) -> dict[str, int]:
        prefix = path.rstrip("/") + "/"
        infos = store.find(prefix, detail=True)
        found = {name.removeprefix(prefix): info for name, info in infos.items() if name.startswith(prefix)}
        return {name: int(info["size"]) for name, info in found.items() if name and not name.endswith("/")}

    return _if_there(url, listed) or {}


def read(url: str, start: int | None = None, stop: int | None = None) -> bytes:
    """Content of a small object, or the bytes from ``start`` to ``stop`` of any object."""
    content: bytes = _call(url, lambda store, path: store.cat_file(path, start=start, end=stop))
    return content


def read_if_there(url: str) -> bytes | None:
    """Content of a small object, or None where there is none."""
    return _if_there(url, lambda store, path: store.cat_file(path))


def write(url: str, data: bytes) -> None:
    """Write a small object, whole or not at all."""
    _call(url, lambda store, path: store.pipe_file(path, data))


def upload(path: str, url: str) -> None:
    """Copy a file to an object, in several parts where it is large; the object appears whole or not at all."""
    _call(url, lambda store, to: store.put_file(path, to))


def copy(url: str, to: str) -> None:
    """Copy an object within a store, without moving its bytes through this machine."""
    _call(url, lambda store, path: store.cp_file(path, _split(to)[1]))


def remove(url: str) -> None:
    """Remove an object, if it is there."""
    _if_there(url, lambda store, path: store.rm_file(path))


def download(url: str, to: str) -> None:
    """Copy an object to a file."""
    size, _ = _facts(url)

    def get(store: Any, path: str) -> None:
        store.get_file(path, to)
        if os.path.getsize(to) != size:
            raise OSError("it ended too soon")

    _call(url, get)


def local(url: str) -> str:
    """Copy an object into a file in `TMPDIR` that stays until the process ends, for readers that map files."""
    return _copy(url, state(url))


@functools.cache
def _copy(url: str, state: tuple[int, int]) -> str:  # noqa: ARG001  # a changed object is copied again
    to = os.path.join(new_folder(), os.path.basename(url))
    download(url, to)
    return to


def new_folder() -> str:
    """Make a folder in `TMPDIR` that is removed when the process ends."""
    return tempfile.mkdtemp(dir=_copies())


@functools.cache
def _copies() -> str:
    folder = tempfile.mkdtemp(prefix="gpu-init-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


class Object(io.RawIOBase):
    """An object as a file that is read at any place; each read is a request."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._size, _ = _facts(url)
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer: Buffer, /) -> int:
        view = memoryview(buffer).cast("B")
        stop = min(self._at + len(view), self._size)
        if stop <= self._at:
            return 0
        data = read(self._url, self._at, stop)
        if len(data) != stop - self._at:
            raise InputError(f"{self._url}: changed while it was read; run again when it is complete.")
        view[: len(data)] = data
        self._at = stop
        return len(data)


def stream(url: str) -> io.BufferedReader:
    """Open an object that is read from start to end."""
    return io.BufferedReader(Object(url), STREAM_BYTES)


def _facts(url: str) -> tuple[int, str]:
    """Size of an object, and the tag of its content."""
    info = _call(url, lambda store, path: store.info(path))
    if info["type"] != "file":
        raise InputError(f"{url}: is no object, but a folder of them.")
    return int(info["size"]), str(next((info[name] for name in _TAGS if info.get(name)), ""))


def _kind(url: str) -> str | None:
    """Give ``file`` or ``directory``, or None where there is nothing."""
    return _if_there(url, lambda store, path: str(store.info(path)["type"]))


def _split(url: str) -> tuple[Any, str]:
    """File system of fsspec, which does not cache listings, and the path in it."""
    scheme = url.split("://", 1)[0].lower()
    extra = _EXTRAS.get(scheme)
    try:
        import fsspec

        store, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        fix = f"pip install 'gpu-init[{extra}]'" if extra else _one_line(error)
        raise InputError(f"{url}: what reads {scheme}:// is not installed: {fix}") from None
    except ValueError as error:
        raise InputError(f"{url}: {_one_line(error)}.") from None
    return store, str(path)


def _if_there(url: str, function: Callable[[Any, str], _T]) -> _T | None:
    """As `_call`, but None where there is no such object."""

    def guarded(store: Any, path: str) -> _T | None:
        try:
            return function(store, path)
        except FileNotFoundError:
            return None

    return _call(url, guarded)


def _call(url: str, function: Callable[[Any, str], _T]) -> _T:
    """Call a function with an object's file system and path, again where that may help.

    Raises
    ------
    InputError
        There is no such object, or no permission.
    ResourceError
        The store could not be reached, or failed, in every attempt.
    """
    store, path = _split(url)
    pause = FIRST_PAUSE
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return function(store, path)
        except GpuInitError:
            raise
        except FileNotFoundError:
            raise InputError(f"{url}: there is no such object or bucket.") from None
        except PermissionError as error:
            raise InputError(f"{url}: no permission ({_one_line(error)}).") from None
        except Exception as error:  # the library of each store has its own errors
            if type(error).__name__ in _FINAL:
                raise InputError(f"{url}: {_one_line(error)}.") from None
            if attempt == ATTEMPTS:
                why = f"object storage failed ({_one_line(error)})"
                raise ResourceError(f"{url}: {why}; run again, with --resume if the job had begun.") from None
        time.sleep(pause)
        pause *= 4
    raise AssertionError


def _one_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")[:200]
