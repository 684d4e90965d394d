"""The format of an artifact: names of its files, array headers, and JSON that shows any change."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpu_init.errors import InputError, ResourceError
from gpu_init.files import remote, storage

FORMAT = "gpu-init artifact"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MANIFEST_BYTES = 64 << 20

JOURNAL_FORMAT = "gpu-init journal"
JOURNAL = "journal.json"
REPLACED = "replaced.json"
SCRATCH = "scratch"
PARTIAL = ".partial"
LOCK = ".partial.lock"
_HEADER = re.compile(rb"\{'descr': '([<|][biuf][1248])', 'fortran_order': False, 'shape': \(([0-9, ]{0,100})\), \} *\n")
TABLES = {"users.parquet": "user_id", "items.parquet": "item_id"}
REPORT = "report.html"  # made of an artifact later, and not of it
INTERACTIONS = "interactions"  # folder of what users were clustered by, where that is what they did
_RESERVED = {SCRATCH, MANIFEST, JOURNAL, REPLACED, REPORT, *TABLES}

Json = dict[str, Any]
Shape = tuple[int, ...]


def check_modality(name: str) -> None:
    """Refuse a modality's name that cannot be a folder of an artifact.

    Raises
    ------
    InputError
        Not letters, digits, "_", "-" and "." after a letter or digit, longer than 64, or a name that is taken.
    """
    if name.lower() in _RESERVED:
        raise InputError(f"modality {name}: a file of the artifact has that name; choose another name.")
    if not re.fullmatch(r"[^\W_][\w.-]{0,63}", name):
        raise InputError(
            f"modality {shown(name)}: choose another name of at most 64 letters, digits, '_', '-' or '.',"
            " with a letter or digit first."
        )


def read_manifest(root: str) -> Json:
    """Give the manifest, as `parse_manifest` does."""
    path = os.path.join(root, MANIFEST)
    if not os.path.isfile(path) or os.path.islink(path):
        raise not_an_artifact(root)
    with storage.reading(path) as file:
        return parse_manifest(path, file.read(MANIFEST_BYTES + 1))


def parse_manifest(path: str, data: bytes) -> Json:
    """Content of a manifest, its form and checksum checked, its content not yet.

    Raises
    ------
    InputError
        It is none, is damaged, or is of a version that is not read here.
    """
    if len(data) > MANIFEST_BYTES:
        raise InputError(f"{path}: larger than {MANIFEST_BYTES:,} bytes; not a manifest of gpu-init.")
    body = _parse(data)
    if body is None or body.get("format") != FORMAT:
        raise InputError(f"{path}: not a manifest of gpu-init, or damaged.")
    version = body.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise InputError(
            f"{path}: format version {shown(version)}; this gpu-init reads version {FORMAT_VERSION}."
            " Use the gpu-init that wrote it."
        )
    if unseal(data) is None:
        raise InputError(f"{path}: damaged or edited: its checksum does not fit.")
    return body


def not_an_artifact(root: str) -> InputError:
    if remote.is_url(root):
        return InputError(f"{root} is not an artifact of gpu-init: there is no {MANIFEST}.")
    if os.path.isdir(root):
        return InputError(f"{root} is not an artifact of gpu-init: it has no {MANIFEST}.")
    if os.path.lexists(root):
        return InputError(f"{root} is not an artifact of gpu-init: it is not a folder.")
    return InputError(f"{root}: there is no such folder.")


def lookup(table: Json, key: str, fact: str) -> Any:
    entry = table.get(key)
    return entry.get(fact) if isinstance(entry, dict) else None


def file_problem(root: str, name: str, entry: Any) -> str | None:
    """Tell what is wrong with a file's entry, path, size or header; None when nothing is."""
    if not is_inside(name):
        return "leads out of the artifact"
    if not isinstance(entry, dict) or not is_count(entry.get("bytes")) or not isinstance(entry.get("sha256"), str):
        return f"its entry in {MANIFEST} is not understood"
    path = os.path.join(root, name)
    try:
        state = os.lstat(path)
    except OSError:
        return "missing"
    if os.path.realpath(path) != path:
        return "a link; artifacts have none"
    if not stat.S_ISREG(state.st_mode):
        return "not a regular file"
    if state.st_size != entry["bytes"]:
        return f"has {state.st_size:,} bytes, not the {entry['bytes']:,} that were written"
    if name.endswith(".npy"):
        header = read_header(path)
        if header is None:
            return "not an array as gpu-init writes them"
        if [list(header.shape), header.dtype.name] != [entry.get("shape"), entry.get("dtype")]:
            return f"holds {header.dtype.name} of shape {header.shape}, not what the manifest says"
    elif name.endswith(".parquet"):
        rows = table_rows(path)
        if rows is None or not is_count(entry.get("rows")) or rows != entry["rows"]:
            return f"has {rows} rows, not what the manifest says" if rows is not None else "not a Parquet file"
    return None


def is_inside(name: str) -> bool:
    """Whether a name of a file leads nowhere out of its artifact."""
    parts = name.split("/")
    return "\0" not in name and len(name) < 4096 and not any(part in ("", ".", "..") for part in parts)


def is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def table_rows(path: str) -> int | None:
    import pyarrow.parquet as pq

    try:
        return int(pq.read_metadata(path).num_rows)
    except Exception:  # whatever a damaged file makes of the library
        return None


def one_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def shown(value: Any) -> str:
    """Make a value of somebody else's short enough and harmless to print."""
    text = ascii(value) if not isinstance(value, str) or not value.isprintable() else value
    return text if len(text) <= 80 else text[:77] + "..."


# Arrays as files.


@dataclass(frozen=True)
class Header:
    """What a .npy file says of itself, and where its data starts."""

    shape: Shape
    dtype: np.dtype[Any]
    offset: int

    @property
    def data_bytes(self) -> int:
        size = self.dtype.itemsize
        for length in self.shape:
            size *= length  # Python's integers do not wrap
        return size


def header_bytes(shape: Shape, dtype: np.dtype[Any]) -> bytes:
    buffer = BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, description)
    return buffer.getvalue()


def read_header(path: str) -> Header | None:
    """Header of a .npy file in C order with plain numbers; None for any other, or where the size does not fit it."""
    with storage.reading(path) as file:
        start = file.read(10)
        length = int.from_bytes(start[8:10], "little")
        text = file.read(length)
        size = os.fstat(file.fileno()).st_size
    match = _HEADER.fullmatch(text)
    if len(start) < 10 or start[:8] != b"\x93NUMPY\x01\x00" or len(text) < length or not match:
        return None
    lengths = [part.strip() for part in match[2].decode().split(",")]
    if not all(part.isdigit() for part in lengths[:-1]) or not (lengths[-1] == "" or lengths[-1].isdigit()):
        return None
    try:
        dtype = np.dtype(match[1].decode())
    except TypeError:
        return None
    header = Header(tuple(int(part) for part in lengths if part), dtype, 10 + length)
    return header if size == header.offset + header.data_bytes else None


def map_array(path: str) -> NDArray[Any]:
    header = read_header(path)
    if header is None:
        raise InputError(f"{path}: not an array as gpu-init writes them.")
    if header.data_bytes == 0:
        empty = np.empty(header.shape, header.dtype)
        empty.flags.writeable = False
        return empty
    return np.memmap(path, header.dtype, "r", header.offset, header.shape)


def hash(path: str) -> str:
    with storage.reading(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# JSON that shows any change.


def _text(body: Any) -> bytes:
    return (json.dumps(body, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "replace")


def plain(body: Any) -> Any:
    """Give what a reader of the JSON will see: lists for tuples, text for keys."""
    return json.loads(_text(body))


def seal(body: Json) -> bytes:
    """JSON with the SHA-256 of the same JSON without it as its last key."""
    body = plain({key: value for key, value in body.items() if key != "checksum"})
    return _text({**body, "checksum": f"sha256:{hashlib.sha256(_text(body)).hexdigest()}"})


def unseal(data: bytes) -> Json | None:
    """Content of sealed JSON; None where so much as one bit differs from what `seal` wrote."""
    body = _parse(data)
    try:
        return body if body is not None and seal(body) == data else None
    except (ValueError, RecursionError):
        return None


def _parse(data: bytes) -> Json | None:
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return body if isinstance(body, dict) else None


def misread(path: str) -> ResourceError:
    return ResourceError(f"{path}: read back, it is not what was written; check the disk.")


def is_journal(journal: Json) -> bool:
    """Whether JSON has the form of a journal."""
    if journal.get("format") != JOURNAL_FORMAT or not isinstance(journal.get("identity"), dict):
        return False
    parts = [journal.get(key) for key in ("finished", "files")]
    return all(isinstance(part, dict) and all(isinstance(one, dict) for one in part.values()) for part in parts)
