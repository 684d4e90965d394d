"""Reads files in numpy's formats, .npy and .npz, of unknown origin.

No pickle is ever loaded, and no memory is allocated or mapped for an array before its header is found to agree with
the size of the file.
"""

from __future__ import annotations

import io
import math
import mmap
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from gpu_init.errors import InputError

MAX_LIST_BYTES = 1 << 20  # limit for an archive's list of members, which takes twenty times as much in Python's memory

_HEADER_BYTES = 12 + 10_000  # the magic bytes and the length, and the longest header that numpy takes
_END_BYTES = 76 + 22 + 65_535  # the records at the end of a zip file, and the longest comment after them
_BOUNDED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # other methods may unpack gigabytes at once


@dataclass(frozen=True)
class Header:
    """The header of an .npy file; the values start at byte ``offset``."""

    shape: tuple[int, ...]
    order: Literal["C", "F"]
    dtype: np.dtype[Any]
    offset: int

    @property
    def end(self) -> int:
        """Number of bytes of header and values together."""
        return self.offset + math.prod(self.shape) * self.dtype.itemsize

    def require_size(self, place: str, size: int) -> None:
        """Raise an `InputError` where a file of ``size`` bytes is not as long as its header says."""
        if self.end != size:
            shape = " x ".join(map(str, self.shape)) or "1"
            raise InputError(
                f"{place}: {shape} values of {self.dtype} take {self.end:,} bytes, but it has {size:,};"
                " the file was cut off or is not whole. Write it again."
            )


def read_header(file: Any) -> Header:
    """Read the header at the start of an .npy file, without a comparison to the file's size.

    Raises
    ------
    ValueError
        It is no such header.
    """
    start = io.BytesIO(file.read(_HEADER_BYTES))
    version = np.lib.format.read_magic(start)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"npy format version {version[0]}.{version[1]}")
    parse = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = parse(start)
    if min(shape, default=0) < 0:
        raise ValueError(f"a shape of {shape}")
    return Header(shape, "F" if fortran else "C", dtype, start.tell())


def read_rows(path: str, index: Any) -> Any:
    """Copy the rows ``index`` (n,) of a matrix from an .npy file that gpu-init wrote.

    The system is told that the rows are scattered, so that it does not read ahead of each.
    """
    with open(path, "rb") as file:
        header = read_header(file)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            mapped.madvise(mmap.MADV_RANDOM)
            return _rows(mapped, header, index)


def _rows(mapped: mmap.mmap, header: Header, index: Any) -> Any:
    """Copy rows of a mapping, in a function of its own, so that no array holds the mapping when it is closed."""
    return np.ndarray(header.shape, header.dtype, mapped, header.offset)[index]


@contextmanager
def archive(file: io.BufferedReader, path: str) -> Iterator[zipfile.ZipFile]:
    """Open a zip file whose list of members, and each member, can be read in bounded memory.

    Raises
    ------
    InputError
        The list of members exceeds `MAX_LIST_BYTES`, or a member is packed in a way that numpy does not use.
    zipfile.BadZipFile
        It is no zip file.
    """
    _require_short_list(file, path)
    with zipfile.ZipFile(file) as opened:
        for member in opened.infolist():
            if member.compress_type not in _BOUNDED:
                raise InputError(f"{path}: packed in a way that numpy.savez does not use; write it again.")
        yield opened


def _require_short_list(file: io.BufferedReader, path: str) -> None:
    """Check the size of the list of members at the end of a zip file, before `zipfile` reads all of it."""
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - _END_BYTES))
    tail = file.read()
    file.seek(0)
    at = len(tail) - 22
    if tail[at : at + 4] != b"PK\5\6" or tail[-2:] != b"\0\0":
        at = tail.rfind(b"PK\5\6")
    if at < 0 or at + 22 > len(tail):
        raise zipfile.BadZipFile("not a zip file")
    [listed] = struct.unpack_from("<L", tail, at + 12)
    if at >= 76 and tail[at - 20 : at - 16] == b"PK\6\7" and tail[at - 76 : at - 72] == b"PK\6\6":
        [listed] = struct.unpack_from("<Q", tail, at - 36)  # the record of large archives (ZIP64)
    if listed > MAX_LIST_BYTES:
        raise InputError(f"{path}: a list of members of {listed:,} bytes; this is no archive of numpy or torch.")
