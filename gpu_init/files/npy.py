"""Files in numpy's formats, .npy and .npz, read without trust: what they declare is held to what they have.

No pickle is ever loaded, and nothing is allocated or mapped for an array before its header is found to fit the
bytes that are there.
"""

from __future__ import annotations

import io
import mmap
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from gpu_init.errors import InputError

MAX_LIST_BYTES = 1 << 20  # of an archive's list of members, which costs Python twenty times as much

_HEADER_BYTES = 12 + 10_000  # magic, length, and the longest header that numpy takes
_END_BYTES = 76 + 22 + 65_535  # of the records that end a zip file, and the comment after them
_BOUNDED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # the others may unpack gigabytes at once


@dataclass(frozen=True)
class Header:
    """What an .npy file says of itself.

    Attributes
    ----------
    shape : tuple of int
    order : {"C", "F"}
    dtype : dtype
    offset : int
        Where the values start.
    """

    shape: tuple[int, ...]
    order: Literal["C", "F"]
    dtype: np.dtype[Any]
    offset: int

    @property
    def end(self) -> int:
        """Bytes of header and values."""
        size = self.dtype.itemsize
        for length in self.shape:
            size *= length  # Python's integers do not wrap
        return self.offset + size

    def require_size(self, place: str, size: int) -> None:
        """Refuse a file that is not as long as its header says.

        Raises
        ------
        InputError
        """
        if self.end != size:
            shape = " x ".join(map(str, self.shape)) or "1"
            raise InputError(
                f"{place}: {shape} values of {self.dtype} take {self.end:,} bytes, but it has {size:,};"
                " the file was cut off or is not whole. Write it again."
            )


def read_header(file: Any) -> Header:
    """Header of an .npy file, from its start; the shape is not yet held to the file's size.

    Raises
    ------
    ValueError
        It is none.
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
    """Some rows (n,) of a matrix in an .npy file of ours, each read by itself: a mapping reads around them."""
    with open(path, "rb") as file:
        header = read_header(file)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            mapped.madvise(mmap.MADV_RANDOM)
            return _rows(mapped, header, index)


def _rows(mapped: mmap.mmap, header: Header, index: Any) -> Any:
    """Copied, so that nothing holds the mapping when this is left."""
    return np.ndarray(header.shape, header.dtype, mapped, header.offset)[index]


@contextmanager
def archive(file: io.BufferedReader, path: str) -> Iterator[zipfile.ZipFile]:
    """Open a zip file whose list of members, and each member, can be read in bounded memory.

    Raises
    ------
    InputError
        A list of members beyond `MAX_LIST_BYTES`, or a member packed in a way that numpy does not use.
    zipfile.BadZipFile
        It is none.
    """
    _require_short_list(file, path)
    with zipfile.ZipFile(file) as opened:
        for member in opened.infolist():
            if member.compress_type not in _BOUNDED:
                raise InputError(f"{path}: packed in a way that numpy.savez does not use; write it again.")
        yield opened


def _require_short_list(file: io.BufferedReader, path: str) -> None:
    """Look at the end of a zip file, where zipfile does, before it reads the list of members whole."""
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
        [listed] = struct.unpack_from("<Q", tail, at - 36)  # a large archive says it here
    if listed > MAX_LIST_BYTES:
        raise InputError(f"{path}: a list of members of {listed:,} bytes; this is no archive of numpy or torch.")
