"""The format of an artifact: the names of its files, the form of its arrays, and JSON that shows any change."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from gpu_init.errors import InputError, ResourceError
from gpu_init.files import npy, remote, storage

FORMAT = "gpu-init artifact"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MANIFEST_BYTES = 64 << 20  # A longer manifest or journal is not read.

JOURNAL_FORMAT = "gpu-init journal"
JOURNAL = "journal.json"
REPLACED = "replaced.json"  # A run keeps the manifest of the artifact that it replaces under this name.
SCRATCH = "scratch"  # Files in this folder of a run do not get into the artifact.
PARTIAL = ".partial"
LOCK = ".partial.lock"
TABLES = {"users.parquet": "user_id", "items.parquet": "item_id"}
REPORT = "report.html"  # `gpu-init report` adds this file later; no manifest lists it.
INTERACTIONS = "interactions"  # This folder holds what users were clustered by, where that is what they did.
_RESERVED = {SCRATCH, MANIFEST, JOURNAL, REPLACED, REPORT, *TABLES}

Json = dict[str, Any]
Shape = tuple[int, ...]


def check_modality(name: str) -> None:
    """Refuse the name of a modality that cannot be a folder of an artifact.

    Raises
    ------
    InputError
        The name is not a letter or digit and then at most 63 letters, digits, "_", "-" or ".", or a file of the
        artifact has it.
    """
    if name.lower() in _RESERVED:
        raise InputError(f"modality {name}: a file of the artifact has that name; choose another name.")
    if not re.fullmatch(r"[^\W_][\w.-]{0,63}", name):
        raise InputError(
            f"modality {shown(name)}: choose another name of at most 64 letters, digits, '_', '-' or '.',"
            " with a letter or digit first."
        )


def read_manifest(root: str) -> Json:
    """Read the manifest in a folder, and check it as `parse_manifest` does."""
    path = os.path.join(root, MANIFEST)
    if not os.path.isfile(path) or os.path.islink(path):
        raise not_an_artifact(root)
    with storage.reading(path) as file:
        return parse_manifest(path, file.read(MANIFEST_BYTES + 1))


def parse_manifest(path: str, data: bytes) -> Json:
    """Parse a manifest; its form and its checksum are checked, its content is not.

    Raises
    ------
    InputError
        This is no manifest, it is damaged, or this version of gpu-init does not read its version.
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
    """Make the error for a folder or URL without a manifest."""
    if remote.is_url(root):
        why = f"there is no {MANIFEST}"
    elif os.path.isdir(root):
        why = f"it has no {MANIFEST}"
    elif os.path.lexists(root):
        why = "it is not a folder"
    else:
        return InputError(f"{root}: there is no such folder.")
    return InputError(f"{root} is not an artifact of gpu-init: {why}.")


def lookup(table: Json, key: str, fact: str) -> Any:
    """Return one fact of one entry; None where the entry, or the fact, is missing."""
    entry = table.get(key)
    return entry.get(fact) if isinstance(entry, dict) else None


def file_problem(root: str, name: str, entry: Any) -> str | None:
    """Tell what is wrong with the entry, path, size or header of a file; None when nothing is."""
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
    """Tell whether the name of a file stays inside its artifact."""
    parts = name.split("/")
    return "\0" not in name and len(name) < 4096 and not any(part in ("", ".", "..") for part in parts)


def is_count(value: Any) -> bool:
    """Tell whether a value from JSON is a number of things."""
    return type(value) is int and value >= 0


def table_rows(path: str) -> int | None:
    """Return the number of rows of a Parquet file; None where it is not one."""
    import pyarrow.parquet as pq

    try:
        return int(pq.read_metadata(path).num_rows)
    except Exception:  # The library has many ways to fail on a damaged file.
        return None


def shown(value: Any) -> str:
    """Make a value from a foreign file short, and harmless to print."""
    text = ascii(value) if not isinstance(value, str) or not value.isprintable() else value
    return text if len(text) <= 80 else text[:77] + "..."


# Arrays as files.


def header_bytes(shape: Shape, dtype: DTypeLike) -> bytes:
    """Make the header of a .npy file in C order."""
    buffer = BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, description)
    return buffer.getvalue()


def read_header(path: str) -> npy.Header | None:
    """Read the header of a .npy file; None unless the file is as long as it says, in C order, of plain numbers."""
    with storage.reading(path) as file:
        try:
            header = npy.read_header(file)
        except Exception:  # Python's parser has many ways to fail on a damaged header.
            return None
        is_plain = header.order == "C" and header.dtype.kind in "biuf" and header.dtype.isnative
        return header if is_plain and header.end == os.fstat(file.fileno()).st_size else None


def map_array(path: str) -> NDArray[Any]:
    """Map an array of an artifact, of which the header is checked; read-only."""
    header = read_header(path)
    if header is None:
        raise InputError(f"{path}: not an array as gpu-init writes them.")
    if header.end == header.offset:
        empty = np.empty(header.shape, header.dtype)
        empty.flags.writeable = False
        return empty
    return np.memmap(path, header.dtype, "r", header.offset, header.shape)


def hash(path: str) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with storage.reading(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# JSON that shows any change.


def _text(body: Any) -> bytes:
    return (json.dumps(body, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "replace")


def plain(body: Any) -> Any:
    """Return what a reader of the JSON will see: lists in place of tuples, texts as keys."""
    return json.loads(_text(body))


def seal(body: Json) -> bytes:
    """Make JSON whose last key is the SHA-256 of the same JSON without that key."""
    body = plain({key: value for key, value in body.items() if key != "checksum"})
    return _text({**body, "checksum": f"sha256:{hashlib.sha256(_text(body)).hexdigest()}"})


def unseal(data: bytes) -> Json | None:
    """Parse sealed JSON; None where so much as one bit differs from what `seal` wrote."""
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
    """Make the error for a file that the disk did not keep as it was written."""
    return ResourceError(f"{path}: read back, it is not what was written; check the disk.")


def parse_journal(data: bytes | None) -> Json:
    """Parse the journal of a run; the result is empty where there is none, or it is damaged."""
    journal = (unseal(data) if data is not None else None) or {}
    if journal.get("format") != JOURNAL_FORMAT or not isinstance(journal.get("identity"), dict):
        return {}
    parts = [journal.get(key) for key in ("finished", "files")]
    whole = all(isinstance(part, dict) and all(isinstance(one, dict) for one in part.values()) for part in parts)
    return journal if whole else {}


def listed_files(*sealed: bytes | None) -> Json:
    """Return the files that manifests and journals list, but for names that lead out of a folder."""
    found: Json = {}
    for data in sealed:
        files = ((unseal(data) if data is not None else None) or {}).get("files")
        found |= files if isinstance(files, dict) else {}
    return {name: entry for name, entry in found.items() if is_inside(name)}
