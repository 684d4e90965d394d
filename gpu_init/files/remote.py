"""Object storage, through fsspec: `s3://`, `gs://`, `az://` and what else it knows.

Credentials, endpoints and regions come from the environment alone, as the libraries behind fsspec read them. These try
again by themselves; what fails all the same is tried a few times more, and then is a `ResourceError`: it may be gone
when the job is resumed.
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
from typing import TYPE_CHECKING, Any

from gpu_init.errors import GpuInitError, InputError, ResourceError

if TYPE_CHECKING:
    from typing_extensions import Buffer

WHOLE_BYTES = 1 << 20  # objects up to this size are hashed whole
PIECES = 16
PIECE_BYTES = 1 << 16
STREAM_BYTES = 16 << 20  # asked for at a time where an object is read from start to end
ATTEMPTS = 4
FIRST_PAUSE = 0.5  # seconds; each further one is four times as long

_URL = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "az": "az", "abfs": "az", "abfss": "az"}
_GLOB = frozenset("*?[")
_FINAL = ("NoCredentialsError", "PartialCredentialsError", "ParamValidationError", "InvalidRegionError")
_TAGS = ("md5Hash", "crc32c", "ETag", "etag")  # of the content, as the stores call them


def is_url(path: str) -> bool:
    """Whether a path is in object storage."""
    return _URL.match(path) is not None


def state(url: str) -> tuple[int, int]:
    """Size of an object, and a number that another content would have changed."""
    size, tag = _facts(url)
    return size, int.from_bytes(hashlib.sha256(tag.encode()).digest()[:8], "little")


def fingerprint(url: str) -> dict[str, int | str]:
    """Recognise an object again, as `storage.fingerprint` does a file, without reading all of it.

    Up to 1 MiB, the SHA-256 of its content; above, of its size (8 bytes, little endian), the checksum or tag that the
    store gives it, and 16 pieces of 64 KiB, spread evenly, the first and the last included.
    """
    size, tag = _facts(url)
    if size <= WHOLE_BYTES:
        return {"bytes": size, "hash": f"sha256:{hashlib.sha256(read(url)).hexdigest()}"}
    digest = hashlib.sha256(size.to_bytes(8, "little") + tag.encode())
    for piece in range(PIECES):
        start = piece * (size - PIECE_BYTES) // (PIECES - 1)
        digest.update(_cat(url, start, start + PIECE_BYTES))
    return {"bytes": size, "hash": f"sampled-sha256:{digest.hexdigest()}"}


def find(pattern: str, extensions: tuple[str, ...]) -> list[str]:
    """Objects that a URL stands for, as `storage.expand` finds files."""
    bucket = _URL.sub("", pattern).split("/", 1)[0]
    if not bucket or "@" in bucket:
        raise InputError(f"{pattern}: wanted is a bucket after ://, and no credentials: the environment has those.")
    if _kind(pattern) == "file":
        return [pattern]
    is_glob = not _GLOB.isdisjoint(pattern)
    roots = _call(pattern, lambda store, path: sorted(store.glob(path))) if is_glob else [_split(pattern)[1]]
    found: set[str] = set()
    for root in roots:
        one = _split(pattern)[0].unstrip_protocol(root)
        if is_glob and _kind(one) == "file":
            found.update([one] if root.endswith(extensions) else [])
            continue
        below = sizes(one)
        found.update(f"{one.rstrip('/')}/{name}" for name in below if name.endswith(extensions) and not _left_out(name))
    if found:
        return sorted(found)
    where = "no objects there that end in " + ", ".join(extensions)
    raise InputError(f"{pattern}: {where if is_glob or sizes(pattern) else 'there is no such object'}.")


def _left_out(name: str) -> bool:
    return any(part.startswith((".", "_")) for part in name.split("/"))


def sizes(url: str) -> dict[str, int]:
    """Size of each object below a URL, to any depth, by its name from there."""

    def listed(store: Any, path: str) -> dict[str, int]:
        prefix = path.rstrip("/") + "/"
        try:
            infos = store.find(prefix, detail=True)
        except FileNotFoundError:
            return {}
        return {name.removeprefix(prefix): int(info["size"]) for name, info in infos.items() if name.startswith(prefix)}

    found: dict[str, int] = _call(url, listed)
    return {name: size for name, size in found.items() if name and not name.endswith("/")}


def read(url: str) -> bytes:
    """Content of a small object."""
    return _cat(url, None, None)


def read_if_there(url: str) -> bytes | None:
    """Content of a small object, None where there is none."""

    def fetch(store: Any, path: str) -> bytes | None:
        try:
            content: bytes = store.cat_file(path)
        except FileNotFoundError:
            return None
        return content

    found: bytes | None = _call(url, fetch)
    return found


def write(url: str, data: bytes) -> None:
    """Write a small object, whole or not at all."""
    _call(url, lambda store, path: store.pipe_file(path, data))


def upload(path: str, url: str) -> None:
    """Copy a file to an object, in several parts where it is large; the object appears whole or not at all."""
    _call(url, lambda store, to: store.put_file(path, to))


def copy(url: str, to: str) -> None:
    """Copy an object within a store, which does it by itself."""
    _call(url, lambda store, path: store.cp_file(path, _split(to)[1]))


def remove(url: str) -> None:
    """Remove an object, if it is there."""

    def unlink(store: Any, path: str) -> None:
        try:
            store.rm_file(path)
        except FileNotFoundError:
            return

    _call(url, unlink)


def download(url: str, to: str) -> None:
    """Copy an object to a file."""
    size, _ = _facts(url)

    def get(store: Any, path: str) -> None:
        store.get_file(path, to)
        if os.path.getsize(to) != size:
            raise OSError("it ended too soon")

    _call(url, get)


def local(url: str) -> str:
    """Copy of an object on this machine, in `TMPDIR`, until the process ends: what must be mapped needs a file."""
    return _copy(url, state(url))


@functools.cache
def _copy(url: str, of: tuple[int, int]) -> str:  # noqa: ARG001
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
    """An object to read from, any part of it, each asked for when it is read."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._size, _ = _facts(url)
        self._at = 0

    def readable(self) -> bool:
        """Tell that it can be read."""
        return True

    def seekable(self) -> bool:
        """Tell that any part can be read."""
        return True

    def tell(self) -> int:
        """Give the place of the next byte."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Go to a place, from the start, from here or from the end."""
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer: Buffer, /) -> int:
        """Read as many bytes as the buffer holds, fewer only at the end."""
        view = memoryview(buffer).cast("B")
        stop = min(self._at + len(view), self._size)
        if stop <= self._at:
            return 0
        data = _cat(self._url, self._at, stop)
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
    """Give ``file`` or ``directory``; None where there is nothing."""

    def look(store: Any, path: str) -> str | None:
        try:
            return str(store.info(path)["type"])
        except FileNotFoundError:
            return None

    found: str | None = _call(url, look)
    return found


def _cat(url: str, start: int | None, stop: int | None) -> bytes:
    content: bytes = _call(url, lambda store, path: store.cat_file(path, start=start, end=stop))
    return content


def _split(url: str) -> tuple[Any, str]:
    """File system of fsspec, which keeps no listings, and the path in it."""
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


def _call(url: str, function: Callable[[Any, str], Any]) -> Any:
    """Do something with an object's file system and path, again where that may help.

    Raises
    ------
    InputError
        Nothing there, or no permission.
    ResourceError
        The store could not be reached, or failed, each time.
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
        except Exception as error:  # each store's library has its own
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
