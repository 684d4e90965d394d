"""The output folder: written whole or not at all, read back without trust (design, section 4).

Writing. A run fills a staging folder, `OUT.partial` beside OUT, in which `journal.json` says what is finished and
durable. `manifest.json` is written last; from then on the staging folder is a whole artifact, and what remains is to
put it in its place by renaming. Where OUT cannot be renamed, being a mount point or in a folder that takes no files,
the staging folder is `OUT/.partial`, and the files are moved up one by one, the manifest last. Each step on the way
can be taken again, so a run that is killed at any moment can be resumed or discarded by the next one.

Reading. A folder is an artifact when `manifest.json` is there, says so, and is, byte for byte, what its own
checksum and this module's JSON (indented by 2, UTF-8) make of its content. No file is opened before its path, size,
shape and dtype are found to be what the manifest says; pickles are never loaded.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import queue
import re
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from io import BytesIO
from types import TracebackType
from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.typing import DTypeLike, NDArray

from . import remote, storage
from .errors import InputError, ResourceError

FORMAT = "gpu-init artifact"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MANIFEST_BYTES = 64 << 20
SYNC_BYTES = 64 << 20  # rows are made durable after this many bytes
SYNC_SECONDS = 2.0  # or this many seconds

JOURNAL_FORMAT = "gpu-init journal"
JOURNAL = "journal.json"
REPLACED = "replaced.json"
_SCRATCH = "scratch"
PARTIAL = ".partial"
_LOCK = ".partial.lock"
_CHUNK = 8 << 20
_HEADER = re.compile(rb"\{'descr': '([<|][biuf][1248])', 'fortran_order': False, 'shape': \(([0-9, ]{0,100})\), \} *\n")
_TABLES = {"users.parquet": "user_id", "items.parquet": "item_id"}
REPORT = "report.html"  # made of an artifact later, and not of it
SAMPLE_COLUMNS = (
    *("lambda", "count", "random_x", "random_y", "local_x", "local_y", "blended_x", "blended_y"),
    *("cosine_own", "cosine_others", "norm"),
)
INTERACTIONS = "interactions"  # folder of what users were clustered by, where that is what they did
_RESERVED = {_SCRATCH, MANIFEST, JOURNAL, REPLACED, REPORT, *_TABLES}
_STAGED_ENDINGS = (".npy", ".parquet", ".json", ".tmp")
_ABORT_SECONDS = 5.0

Json = dict[str, Any]
Shape = tuple[int, ...]


# Reading.


@dataclass(frozen=True)
class ModalityArrays:
    """What an artifact holds for one modality; memory-mapped and read-only.

    Attributes
    ----------
    users : ndarray of shape (U, d), float32 or float16
        Initial vector of each user.
    centroids : ndarray of shape (K, d), float32
        Unscaled.
    labels : ndarray of shape (U,), int32
        Cluster nearest to each user; -1 for a cold user.
    items : ndarray of shape (I, d), float32, or None
        Projected items; None without projection.
    items_mask : ndarray of shape (I,), bool, or None
        Which items have this modality.
    item_labels : ndarray of shape (I,), int32, or None
        Cluster of each item, where items were clustered; -1 for an item without the modality.
    item_factors : ndarray of shape (I,), float64, or None
        With symmetric weighting, one over the root of each item's degree; 0 for an item without the modality.
    cold : ndarray of shape (d,), float64, or None
        Vector of a cold user, unscaled; None in an artifact of before there was `gpu-init assign`.
    sample, sample_items, typical : ndarrays, or None
        What `gpu-init report` draws, see `describe.describe`.
    """

    users: NDArray[Any]
    centroids: NDArray[np.float32]
    labels: NDArray[np.int32]
    items: NDArray[np.float32] | None = None
    items_mask: NDArray[np.bool_] | None = None
    item_labels: NDArray[np.int32] | None = None
    item_factors: NDArray[np.float64] | None = None
    cold: NDArray[np.float64] | None = None
    sample: NDArray[np.float32] | None = None
    sample_items: NDArray[np.float32] | None = None
    typical: NDArray[np.int32] | None = None


@dataclass(frozen=True)
class InteractionArrays:
    """What places users by what they did, where these were clustered; memory-mapped and read-only.

    Attributes
    ----------
    items : ndarray of shape (I, r), float32
        Leading right singular vectors of the normalized interactions; 0 for items outside the large components.
    item_factors : ndarray of shape (I,), float64
        One over the root of each item's degree; 0 for items outside.
    singular_values : ndarray of shape (r,), float64
        Descending.
    centroids : ndarray of shape (K, r), float32
        Of the users' rows, each of length 1.
    labels : ndarray of shape (U,), int32
        Cluster of each user in every modality; -1 without interactions.
    """

    items: NDArray[np.float32]
    item_factors: NDArray[np.float64]
    singular_values: NDArray[np.float64]
    centroids: NDArray[np.float32]
    labels: NDArray[np.int32]


class Artifact(Mapping[str, ModalityArrays]):
    """An artifact, opened: a mapping from modality to its arrays.

    Attributes
    ----------
    path : str
        Its folder, or its URL.
    manifest : dict
        Settings, inputs, statistics, files and timings of the run.
    interactions : InteractionArrays or None
        Where users were clustered by what they did.
    """

    def __init__(
        self,
        path: str,
        manifest: Json,
        arrays: dict[str, ModalityArrays],
        interactions: InteractionArrays | None = None,
        root: str | None = None,
    ) -> None:
        self.path = path
        self._root = root or path  # on this machine
        self.manifest = manifest
        self.interactions = interactions
        self._arrays = arrays

    def __getitem__(self, name: str) -> ModalityArrays:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    @cached_property
    def user_ids(self) -> pd.Series[Any] | None:
        """User id of each row, of shape (U,); None where rows are the ids. Read when first asked for."""
        return self._ids("users.parquet")

    @cached_property
    def item_ids(self) -> pd.Series[Any] | None:
        """Item id of each row, of shape (I,); None where rows are the ids. Read when first asked for."""
        return self._ids("items.parquet")

    def _ids(self, table: str) -> pd.Series[Any] | None:
        if table not in self.manifest["files"]:
            return None
        import pyarrow.parquet as pq

        path = os.path.join(self._root, table)
        try:
            with pq.ParquetFile(path) as file:
                frame = file.read(columns=["row", _TABLES[table]]).to_pandas()
            in_order = np.array_equal(frame["row"], np.arange(len(frame)))
        except Exception as error:  # whatever a damaged file makes of the library
            raise InputError(f"{path}: not a table of ids ({_one_line(error)}).") from None
        if not in_order:
            raise InputError(f"{path}: its column row is not 0, 1, 2, ...; the file is not what the run wrote.")
        ids: pd.Series[Any] = frame[_TABLES[table]]
        return ids


def load(path: str | os.PathLike[str]) -> Artifact:
    """Open an artifact; its arrays are mapped, not read.

    Parameters
    ----------
    path : path-like
        Its folder, or a URL, of which all files are copied to `TMPDIR` until the process ends.

    Returns
    -------
    Artifact

    Raises
    ------
    InputError
        Not an artifact, of a format that this version does not read, or files that are not what the manifest says.
        Contents are not hashed: `verify` does that.
    """
    root = _root(path)
    place = storage.real_path(os.fspath(path))
    manifest = _read_manifest(root)
    problem = next(_problems(root, manifest), None)
    if problem:
        raise InputError(f"{place}: {problem}.")
    files = manifest["files"]

    def arrays(folder: str, kind: type[Any]) -> Any:
        paths = {part: f"{folder}/{part}.npy" for part in kind.__dataclass_fields__}
        found = {part: _map_array(os.path.join(root, path)) for part, path in paths.items() if path in files}
        return kind(**found)

    modalities = {name: arrays(name, ModalityArrays) for name in manifest["modalities"]}
    clustered = f"{INTERACTIONS}/items.npy" in files
    placed = arrays(INTERACTIONS, InteractionArrays) if clustered else None
    return Artifact(place, manifest, modalities, placed, root)


def manifest_of(path: str | os.PathLike[str]) -> Json:
    """Manifest of an artifact whose files are all there; of one in object storage, none of these is read.

    Raises
    ------
    InputError
        As `load`.
    """
    if not remote.is_url(os.fspath(path)):
        return load(path).manifest
    url = storage.real_path(os.fspath(path))
    manifest = parse_manifest(f"{url}/{MANIFEST}", _stored_manifest(url))
    for name in not_stored(url, manifest["files"]):
        raise InputError(f"{url}: {_shown(name)}: missing, or not as long as it was written.")
    return manifest


def not_stored(url: str, files: Json) -> list[str]:
    """Files that object storage does not have, or not as long as they were written."""
    sizes = remote.sizes(url)
    return [name for name, entry in files.items() if sizes.get(name) != entry["bytes"]]


def verify(path: str | os.PathLike[str]) -> list[str]:
    """Check every byte of an artifact against its manifest, and the manifest against its checksum.

    Returns
    -------
    list of str
        Every problem found, one line each; empty when all is as it was written.

    Raises
    ------
    InputError
        There is no manifest at all.
    """
    root = _root(path)
    if not os.path.lexists(os.path.join(root, MANIFEST)):
        raise _not_an_artifact(root)
    try:
        manifest = _read_manifest(root)
    except InputError as error:
        return [str(error)]
    found = list(_problems(root, manifest))
    files = manifest["files"] if isinstance(manifest.get("files"), dict) else {}
    for name, entry in files.items():
        if file_problem(root, name, entry) is None and _hash(os.path.join(root, name)) != entry["sha256"]:
            found.append(f"{_shown(name)}: its content is not what was written (sha256)")
    return found + [f"{_shown(name)}: not in the manifest" for name in _unlisted(root, files)]


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
            f"modality {_shown(name)}: choose another name of at most 64 letters, digits, '_', '-' or '.',"
            " with a letter or digit first."
        )


def _read_manifest(root: str) -> Json:
    """Give the manifest, as `parse_manifest` does."""
    path = os.path.join(root, MANIFEST)
    if not os.path.isfile(path) or os.path.islink(path):
        raise _not_an_artifact(root)
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
            f"{path}: format version {_shown(version)}; this gpu-init reads version {FORMAT_VERSION}."
            " Use the gpu-init that wrote it."
        )
    if unseal(data) is None:
        raise InputError(f"{path}: damaged or edited: its checksum does not fit.")
    return body


def _root(path: str | os.PathLike[str]) -> str:
    """Folder of an artifact on this machine, of links free; of one in object storage, a copy."""
    if "\0" in os.fspath(path):
        raise InputError(f"{os.fspath(path)!r} is not a path.")
    path = storage.real_path(os.fspath(path))
    return _copied(path, _stored_manifest(path)) if remote.is_url(path) else path


def _stored_manifest(url: str) -> bytes:
    data = remote.read_if_there(f"{url}/{MANIFEST}")
    if data is None:
        raise _not_an_artifact(url)
    return data


@functools.cache
def _copied(url: str, manifest: bytes) -> str:  # noqa: ARG001
    """Folder with a copy of an artifact, made once for each manifest."""
    names = [name for name in remote.sizes(url) if is_inside(name) and not name.startswith(f"{PARTIAL}/")]
    folder = os.path.realpath(remote.new_folder())
    for name in names:
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        remote.download(f"{url}/{name}", path)
    return folder


def _not_an_artifact(root: str) -> InputError:
    if remote.is_url(root):
        return InputError(f"{root} is not an artifact of gpu-init: there is no {MANIFEST}.")
    if os.path.isdir(root):
        return InputError(f"{root} is not an artifact of gpu-init: it has no {MANIFEST}.")
    if os.path.lexists(root):
        return InputError(f"{root} is not an artifact of gpu-init: it is not a folder.")
    return InputError(f"{root}: there is no such folder.")


def _problems(root: str, manifest: Json) -> Iterator[str]:
    """Whatever in the manifest and in the sizes and headers of its files does not fit, nothing hashed."""
    files, modalities = manifest.get("files"), manifest.get("modalities")
    if not isinstance(files, dict) or not isinstance(modalities, dict):
        yield f"{MANIFEST} lists no files or no modalities"
        return
    for name, entry in files.items():
        problem = file_problem(root, name, entry)
        if problem:
            yield f"{_shown(name)}: {problem}"
    users, items = (_lookup(manifest, axis, "rows") for axis in ("users", "items"))
    if not _is_count(users) or not _is_count(items):
        yield f"{MANIFEST} does not say how many users and items there are"
        return
    for table, count in zip(_TABLES, (users, items), strict=True):
        if table in files and _lookup(files, table, "rows") != count:
            yield f"{table}: has not {count:,} rows"
    for name in modalities:
        yield from _modality_problems(name, files, users, items)
    if f"{INTERACTIONS}/items.npy" in files:
        yield from _interaction_problems(files, users, items)


def _modality_problems(name: str, files: Json, users: int, items: int) -> Iterator[str]:
    """Arrays of a modality that are missing, or do not go together."""
    try:
        check_modality(name)
    except InputError as error:
        yield str(error).rstrip(".")
        return
    centroids = _lookup(files, f"{name}/centroids.npy", "shape")
    clusters, width = centroids if isinstance(centroids, list) and len(centroids) == 2 else (None, None)
    wanted: dict[str, tuple[list[Any], tuple[str, ...]]] = {
        "users": ([users, width], ("float32", "float16")),
        "centroids": ([clusters, width], ("float32",)),
        "labels": ([users], ("int32",)),
        "items": ([items, width], ("float32",)),
        "items_mask": ([items], ("bool",)),
        "item_labels": ([items], ("int32",)),
        "item_factors": ([items], ("float64",)),
        "cold": ([width], ("float64",)),
        "sample": ([None, len(SAMPLE_COLUMNS)], ("float32",)),
        "sample_items": ([None, 3], ("float32",)),
        "typical": ([clusters, None], ("int32",)),
    }
    yield from _array_problems(name, files, wanted, ("users", "centroids", "labels"))


def _interaction_problems(files: Json, users: int, items: int) -> Iterator[str]:
    """The same of the arrays that place users by what they did."""
    centroids = _lookup(files, f"{INTERACTIONS}/centroids.npy", "shape")
    clusters, rank = centroids if isinstance(centroids, list) and len(centroids) == 2 else (None, None)
    wanted: dict[str, tuple[list[Any], tuple[str, ...]]] = {
        "items": ([items, rank], ("float32",)),
        "item_factors": ([items], ("float64",)),
        "singular_values": ([rank], ("float64",)),
        "centroids": ([clusters, rank], ("float32",)),
        "labels": ([users], ("int32",)),
    }
    yield from _array_problems(INTERACTIONS, files, wanted, tuple(wanted))


def _array_problems(
    folder: str, files: Json, wanted: dict[str, tuple[list[Any], tuple[str, ...]]], needed: tuple[str, ...]
) -> Iterator[str]:
    """Arrays that are needed and not there, or not of the shape and type wanted."""
    for part, (shape, dtypes) in wanted.items():
        path = f"{folder}/{part}.npy"
        if path not in files:
            if part in needed:
                yield f"{path}: missing from the manifest"
        elif not _fits(_lookup(files, path, "shape"), shape) or _lookup(files, path, "dtype") not in dtypes:
            yield f"{path}: its shape or dtype does not go with the other arrays"


def _fits(shape: Any, wanted: list[Any]) -> bool:
    """Whether a shape is that wanted, in which None stands for any length."""
    return (
        isinstance(shape, list)
        and len(shape) == len(wanted)
        and all(one is None or one == length for one, length in zip(wanted, shape, strict=True))
    )


@contextmanager
def row_writer(path: str, row: int) -> Iterator[Callable[[NDArray[Any]], None]]:
    """Give what writes rows of an array that `Staging.allocate` made room for, from ``row`` on, one after another.

    They are durable when this is left. Others may write other rows meanwhile.

    Raises
    ------
    ResourceError
        The disk is full, or the array is not as the rows are.
    """
    header, folder = _read_header(path), os.path.dirname(path)
    if header is None:
        raise _misread(path)
    place = header.offset + row * (header.data_bytes // max(header.shape[0], 1))
    unsynced = 0

    def write(rows: NDArray[Any]) -> None:
        nonlocal place, unsynced
        rows = np.ascontiguousarray(rows)
        if header.dtype != rows.dtype or header.shape[1:] != rows.shape[1:]:
            raise _misread(path)
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


def _lookup(table: Json, key: str, fact: str) -> Any:
    entry = table.get(key)
    return entry.get(fact) if isinstance(entry, dict) else None


def file_problem(root: str, name: str, entry: Any) -> str | None:
    """Tell what is wrong with a file's entry, path, size or header; None when nothing is."""
    if not is_inside(name):
        return "leads out of the artifact"
    if not isinstance(entry, dict) or not _is_count(entry.get("bytes")) or not isinstance(entry.get("sha256"), str):
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
        header = _read_header(path)
        if header is None:
            return "not an array as gpu-init writes them"
        if [list(header.shape), header.dtype.name] != [entry.get("shape"), entry.get("dtype")]:
            return f"holds {header.dtype.name} of shape {header.shape}, not what the manifest says"
    elif name.endswith(".parquet"):
        rows = _table_rows(path)
        if rows is None or not _is_count(entry.get("rows")) or rows != entry["rows"]:
            return f"has {rows} rows, not what the manifest says" if rows is not None else "not a Parquet file"
    return None


def is_inside(name: str) -> bool:
    """Whether a name of a file leads nowhere out of its artifact."""
    parts = name.split("/")
    return "\0" not in name and len(name) < 4096 and not any(part in ("", ".", "..") for part in parts)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _unlisted(root: str, files: Json) -> Iterator[str]:
    """Files that a manifest does not list, but for the manifest and what a run inside the folder has beside it."""
    ours = {MANIFEST, REPORT, _LOCK, "lost+found"}
    for folder, folders, names in os.walk(root):
        prefix = "" if folder == root else os.path.relpath(folder, root) + "/"
        if not prefix:
            folders[:] = [name for name in folders if name not in (PARTIAL, "lost+found")]
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in sorted(names + links):
            if prefix + name not in files and not (not prefix and name in ours):
                yield prefix + name


def _table_rows(path: str) -> int | None:
    import pyarrow.parquet as pq

    try:
        return int(pq.read_metadata(path).num_rows)
    except Exception:  # whatever a damaged file makes of the library
        return None


def _one_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def _shown(value: Any) -> str:
    """Make a value of somebody else's short enough and harmless to print."""
    text = ascii(value) if not isinstance(value, str) or not value.isprintable() else value
    return text if len(text) <= 80 else text[:77] + "..."


# Arrays as files.


@dataclass(frozen=True)
class _Header:
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


def _header_bytes(shape: Shape, dtype: np.dtype[Any]) -> bytes:
    buffer = BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, description)
    return buffer.getvalue()


def _read_header(path: str) -> _Header | None:
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
    header = _Header(tuple(int(part) for part in lengths if part), dtype, 10 + length)
    return header if size == header.offset + header.data_bytes else None


def _map_array(path: str) -> NDArray[Any]:
    header = _read_header(path)
    if header is None:
        raise InputError(f"{path}: not an array as gpu-init writes them.")
    if header.data_bytes == 0:
        empty = np.empty(header.shape, header.dtype)
        empty.flags.writeable = False
        return empty
    return np.memmap(path, header.dtype, "r", header.offset, header.shape)


def _hash(path: str) -> str:
    with storage.reading(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# JSON that shows any change.


def _text(body: Any) -> bytes:
    return (json.dumps(body, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "replace")


def _plain(body: Any) -> Any:
    """Give what a reader of the JSON will see: lists for tuples, text for keys."""
    return json.loads(_text(body))


def seal(body: Json) -> bytes:
    """JSON with the SHA-256 of the same JSON without it as its last key."""
    body = _plain({key: value for key, value in body.items() if key != "checksum"})
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


# Writing.


@dataclass(frozen=True)
class Place:
    """Paths of a run: its output, staging folder, lock, and the old output while it is replaced in two steps."""

    out: str
    staging: str
    lock: str
    aside: str
    inside: bool

    @classmethod
    def of(cls, out: str) -> Place:
        """Give the paths that go with an output."""
        parent, name = os.path.split(out)
        aside = os.path.join(parent, f".{name}.replaced")
        if _stays(out):
            return cls(out, os.path.join(out, PARTIAL), os.path.join(out, _LOCK), aside, True)
        return cls(out, f"{out}.partial", os.path.join(parent, f".{name}.lock"), aside, False)


def _stays(out: str) -> bool:
    """Whether a folder cannot be renamed: a mount point, or in a folder that takes no files."""
    if not os.path.isdir(out):
        return False
    if os.path.ismount(out) or out in _mount_points():
        return True
    return not os.access(os.path.dirname(out), os.W_OK | os.X_OK) and os.access(out, os.W_OK | os.X_OK)


def _mount_points() -> set[str]:
    """Linux's own list: folders bound from the same file system do not show otherwise."""
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
            places = {line.split(" ", 5)[4] for line in lines}
    except OSError:
        return set()
    return {re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), place) for place in places}


class Staging:
    """A run's folder before it is an artifact.

    A context manager. Leaving it by an exception keeps what is durable, so that a later run can resume; but an
    InputError, or any before something was finished, leaves no trace in a run that resumed nothing. Only one run at
    a time has the staging folder of an output: the lock is the file `.OUT.lock` beside it (`OUT/.partial.lock` where
    OUT cannot be renamed), removed at the end by its holder.

    Attributes
    ----------
    path : str
        The folder.
    complete : bool
        The artifact is already there, of the same identity: nothing is left to do.
    resumed : bool
        An unfinished run is gone on with.
    discarded : bool
        An unfinished run was removed.
    """

    def __init__(self, place: Place) -> None:
        self.path = place.staging
        self.complete = self.resumed = self.discarded = False
        self._place = place
        self._lock: storage.Lock | None = None
        self._parents: list[str] = []  # that this run made, the deepest first
        self._created = False
        self._replaces = False
        self._journal: Json = {}
        self._mutex = threading.Lock()
        self._writers: list[RowWriter] = []

    @classmethod
    def open(cls, out: str | os.PathLike[str], *, resume: bool, overwrite: bool, identity: Json) -> Staging:
        """Take the output's lock, and begin a run or go on with one.

        Parameters
        ----------
        out : path-like
            Where the artifact will stand. A link to a folder is followed. Missing parents are made.
        resume : bool
            Go on with an unfinished run, or accept an artifact that is there, when their identity is the same.
        overwrite : bool
            Replace an artifact that is there, at the end; the old folder goes with all that its manifest lists.
        identity : dict
            JSON of what must be equal for a resume; each value of its key "inputs" is what an input is known by.

        Raises
        ------
        InputError
            Another run writes to the output; something else stands there; an artifact stands there and `overwrite`
            is not given; the unfinished run had another identity.
        ResourceError
            The disk is full.
        """
        if "\0" in os.fspath(out):
            raise InputError(f"{os.fspath(out)!r} is not a path.")
        place = cls._placed(os.fspath(out))
        staging = cls(place)
        folder = os.path.dirname(place.lock)
        with storage.writing(folder):
            try:
                staging._make_parents(folder)
                staging._lock = storage.Lock(place.lock, place.out)
                staging._begin(resume, overwrite, _plain(identity))
            except BaseException:
                staging._leave(remove=True)
                raise
        return staging

    @classmethod
    def _placed(cls, out: str) -> Place:
        place = Place.of(os.path.realpath(out))
        if os.path.lexists(place.out) and not os.path.isdir(place.out):
            raise InputError(f"{place.out} is not a folder; choose another output.")
        return place

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        done = any(self._journal.get(part) for part in ("finished", "rows", "files"))
        self._leave(remove=isinstance(error, InputError) or (error is not None and not done))

    def _leave(self, remove: bool) -> None:
        """Stop what is being written and let go of the lock; remove the folder too, if this run made it."""
        try:
            for writer in self._writers:
                writer.abort()
            if remove and self._created:
                with suppress(OSError):  # the reason to leave says more
                    remove_folder(self.path)
        finally:
            if self._lock is not None:
                self._lock.release()
                self._lock = None
            for parent in self._parents if remove else ():
                with suppress(OSError):  # not empty: somebody else's by now
                    os.rmdir(parent)

    def _make_parents(self, folder: str) -> None:
        missing = []
        while not os.path.lexists(folder):
            missing.append(folder)
            folder = os.path.dirname(folder)
        for parent in reversed(missing):
            os.mkdir(parent)
            self._parents.insert(0, parent)

    # Beginning.

    def _begin(self, resume: bool, overwrite: bool, identity: Json) -> None:
        self._put_back()
        found = self._unfinished()
        there = self._artifact_there()
        if there is not None and resume and self._accepts(there, identity):
            self._clear()
            self.complete = True
            return
        if there is not None:
            self._check_replaceable(there, overwrite, identity if resume else None)
        self._replaces = there is not None
        if resume and found:
            changed = "; ".join(_changes(found.get("identity"), identity))
            if changed and there is not None and found["format"] == FORMAT:
                found = None  # an old artifact, killed while it was removed after it was replaced
            elif changed:
                raise InputError(
                    f"the unfinished run of {self._place.out} cannot be resumed: {changed}.\n"
                    "Run without --resume to discard it, or with what it was begun with."
                )
        if resume and found:
            self.resumed = True
            if found["format"] == FORMAT:
                self._publish(found)
                self.complete = True
            else:
                self._journal = found
            return
        self.discarded = self._discard()
        os.mkdir(self.path)
        self._created = True
        self._journal = {"format": JOURNAL_FORMAT, "identity": identity, "finished": {}, "rows": {}, "files": {}}
        self._write_journal()
        storage.sync_dir(os.path.dirname(self.path))

    def _clear(self) -> None:
        """Remove the staging folder of a run that has nothing to do."""
        remove_folder(self.path)

    def _put_back(self) -> None:
        """Undo, or end, the replacing of an artifact in two steps that was cut in half."""
        out, aside = self._place.out, self._place.aside
        if self._place.inside or not os.path.lexists(aside):
            return
        _check_ours(aside)
        if os.path.lexists(out):
            remove_folder(aside)
        else:
            os.rename(aside, out)
            storage.sync_dir(os.path.dirname(out))

    def _unfinished(self) -> Json | None:
        """Manifest or journal of the run that the staging folder holds; None when it holds none that can be used."""
        if not os.path.lexists(self.path):
            return None
        _check_ours(self.path)
        with suppress(InputError):
            manifest = _read_manifest(self.path)
            if isinstance(manifest.get("files"), dict) and self._all_there(manifest["files"]):
                return manifest
        journal = self._journal_here()
        with suppress(InputError):
            if journal and is_journal(journal) and self._all_there(journal["files"]):
                return journal
        return None

    def _journal_here(self) -> Json | None:
        """Content of the journal in the staging folder; None where there is none, or it is spoilt."""
        with suppress(InputError), storage.reading(os.path.join(self.path, JOURNAL)) as file:
            return unseal(file.read(MANIFEST_BYTES))
        return None

    def _all_there(self, files: Json) -> bool:
        """Tell whether every file is in the staging folder, or was moved up from it, as it was written."""
        roots = [self.path, self._place.out] if self._place.inside else [self.path]
        return all(any(file_problem(root, name, entry) is None for root in roots) for name, entry in files.items())

    def _artifact_there(self) -> Json | None:
        """Manifest of the artifact at the output's place; None when the place is free.

        Raises
        ------
        InputError
            Something stands there that is not an artifact, and is never removed.
        """
        out = self._place.out
        if not os.path.isdir(out):
            return None
        if not os.path.lexists(os.path.join(out, MANIFEST)):
            held = self._foreign(self._half_published()) if self._place.inside else iter(os.listdir(out))
            foreign = next(held, None)
            if foreign is None:
                return None
            raise InputError(
                f"{out} is not empty and not an artifact (it holds {_shown(foreign)} and no {MANIFEST});"
                " choose another output, or move that away."
            )
        return _read_manifest(out)

    def _accepts(self, there: Json, identity: Json) -> bool:
        """Whether the artifact at the output's place is what this run would make."""
        return there.get("identity") == identity and next(_problems(self._place.out, there), None) is None

    def _check_replaceable(self, there: Json, overwrite: bool, identity: Json | None) -> None:
        """Refuse to replace an artifact unasked, or together with files that its manifest does not list."""
        out, files = self._place.out, there.get("files")
        if not overwrite:
            changed = "; ".join(_changes(there.get("identity"), identity)) if identity is not None else ""
            other = f", made from other settings or inputs ({changed})" if changed else ""
            raise InputError(f"{out} already holds an artifact{other}; --overwrite replaces it.")
        foreign = next(self._foreign(files if isinstance(files, dict) else {}), None)
        if foreign is not None:
            raise InputError(f"{out} holds {_shown(foreign)}, which is not of its artifact; move that away first.")

    def _foreign(self, files: Json) -> Iterator[str]:
        """Files in the output that are none of these, and no run's."""
        return _unlisted(self._place.out, files)

    def _half_published(self) -> Json:
        """Files of a run that was killed while they were moved up into an output that cannot be renamed."""
        listed: Json = {}
        if self._place.inside and not os.path.lexists(os.path.join(self._place.out, MANIFEST)):
            for name in (MANIFEST, REPLACED):
                with suppress(InputError), storage.reading(os.path.join(self.path, name)) as file:
                    files = (unseal(file.read(MANIFEST_BYTES)) or {}).get("files")
                    listed |= files if isinstance(files, dict) else {}
        return listed

    def _discard(self) -> bool:
        """Remove an unfinished run; tell whether there was one."""
        _unlink_listed(self._place.out, self._half_published())
        return remove_folder(self.path)

    # The work in between.

    def require_room(self, needed: int) -> None:
        """Refuse a run whose arrays do not fit on the disk, less what an earlier run has written of them.

        Parameters
        ----------
        needed : int
            Bytes of all of them.

        Raises
        ------
        ResourceError
            Fewer bytes are free.
        """
        found = (os.path.join(folder, name) for folder, _, names in os.walk(self.path) for name in names)
        storage.require_free(self.path, needed - sum(os.path.getsize(path) for path in found))

    def finished(self, key: str) -> Json | None:
        """Facts that a step noted when it was finished, in this run or in the one that is resumed; else None."""
        facts = self._journal["finished"].get(key)
        return None if facts is None else dict(facts)

    def finish(self, key: str, facts: Json) -> None:
        """Note durably that a step is finished, with facts (JSON) that a resumed run will want."""
        with self._mutex:
            self._journal["finished"][key] = _plain(facts)
            self._write_journal()

    def save(self, relpath: str, array: NDArray[Any]) -> None:
        """Write an array, durably, as .npy in C order, and check what stands on the disk.

        Parameters
        ----------
        relpath : str
            Where in the folder, such as "image/labels.npy"; below "scratch/" it never gets into the artifact.
        array : ndarray
            Any shape; bool, integers or floats.

        Raises
        ------
        ResourceError
            The disk is full.
        """
        array = np.ascontiguousarray(array)
        path = self._path_for(relpath)
        header = _header_bytes(array.shape, array.dtype)
        with storage.create(path, len(header) + array.nbytes) as sink:
            sink.write(header)
            sink.write(array.data)
        self._note_array(relpath, sink)

    def save_table(self, relpath: str, table: pd.DataFrame) -> None:
        """Write a table, durably, as Parquet without its index."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self._path_for(relpath)
        rows = pa.Table.from_pandas(table, preserve_index=False).replace_schema_metadata(None)
        with storage.create(path, rows.nbytes) as sink:
            pq.write_table(rows, sink)
        if _table_rows(path) != len(table):
            raise _misread(path)
        self._note_file(relpath, sink, {"rows": len(table)})

    def load(self, relpath: str) -> NDArray[Any]:
        """Map an array that was saved; read-only."""
        return _map_array(os.path.join(self.path, relpath))

    def rows(self, relpath: str, shape: tuple[int, int], dtype: DTypeLike) -> RowWriter:
        """Write an array block by block, going on where an earlier run was stopped.

        Parameters
        ----------
        relpath : str
            Where in the folder.
        shape : (int, int)
            Of the whole array.
        dtype : dtype
            Of the array and of every block.

        Raises
        ------
        ResourceError
            The rest does not fit on the disk.
        """
        path = self._path_for(relpath)
        with storage.writing(os.path.dirname(path)):
            writer = RowWriter(self, relpath, path, _Header(shape, np.dtype(dtype), 0))
        self._writers.append(writer)
        return writer

    def allocate(self, relpath: str, shape: Shape, dtype: DTypeLike) -> None:
        """Make room for an array that others fill by `row_writer`, unless an earlier run did, see `adopting`.

        Raises
        ------
        ResourceError
            It does not fit on the disk.
        """
        path, header = self._path_for(relpath), _Header(shape, np.dtype(dtype), 0)
        prefix = _header_bytes(shape, header.dtype)
        size = len(prefix) + header.data_bytes
        with storage.writing(self.path, size):
            if os.path.exists(path) and _read_header(path) == replace(header, offset=len(prefix)):
                return
            storage.require_free(self.path, header.data_bytes)
            with storage.create(path) as sink:
                sink.write(prefix)
                os.ftruncate(sink.descriptor, size)

    @contextmanager
    def adopting(self, relpath: str) -> Iterator[Callable[[int], None]]:
        """Note an array as finished that others fill by `row_writer`, when this is left.

        Gives what may be told how many of its first rows are there by now: a thread hashes them meanwhile.
        """
        path, sink, left = self._path_for(relpath), storage.Sink(-1), threading.Event()
        header = _read_header(path)
        if header is None:
            raise _misread(path)

        def hash_to(end: int) -> None:
            with storage.reading(path) as file:  # anew, so that storage over a network shows what others wrote
                sink.descriptor = file.fileno()
                os.lseek(sink.descriptor, sink.size, os.SEEK_SET)
                for start in range(sink.size, end, SYNC_BYTES):
                    if left.is_set():
                        return
                    sink.skip(min(start + SYNC_BYTES, end))

        row_bytes = header.data_bytes // max(header.shape[0], 1)
        parts: list[Future[None]] = []
        with ThreadPoolExecutor(1) as thread:
            try:
                yield lambda rows: parts.append(thread.submit(hash_to, header.offset + rows * row_bytes))
                parts.append(thread.submit(hash_to, header.offset + header.data_bytes))
                for part in parts:
                    part.result()
            finally:
                left.set()
        self._note_array(relpath, sink)

    def _path_for(self, relpath: str) -> str:
        """Path of a file to write, its folder made."""
        name, *inner = relpath.split("/")
        if inner and name != _SCRATCH:
            check_modality(name)
        if not is_inside(relpath):
            raise InputError(f"{_shown(relpath)}: leads out of the artifact.")
        path = os.path.join(self.path, relpath)
        with storage.writing(self.path):
            folder = os.path.dirname(path)
            if not os.path.isdir(folder):
                os.makedirs(folder)
                storage.sync_dir(self.path)
        return path

    def _note_array(self, relpath: str, sink: storage.Sink) -> None:
        """Note an array that was written, once its header and size are read back."""
        path = os.path.join(self.path, relpath)
        header = _read_header(path)
        if header is None or header.offset + header.data_bytes != sink.size:
            raise _misread(path)
        self._note_file(relpath, sink, {"shape": list(header.shape), "dtype": header.dtype.name})

    def _note_file(self, relpath: str, sink: storage.Sink, facts: Json) -> None:
        with self._mutex:
            self._journal["rows"].pop(relpath, None)
            self._journal["files"][relpath] = {"bytes": sink.size, "sha256": sink.digest.hexdigest(), **facts}
            self._write_journal()

    def _note_rows(self, relpath: str, header: _Header, rows: int) -> None:
        with self._mutex:
            self._journal["files"].pop(relpath, None)
            self._journal["rows"][relpath] = {"shape": list(header.shape), "dtype": header.dtype.name, "rows": rows}
            self._write_journal()

    def _durable_rows(self, relpath: str, header: _Header) -> tuple[int, bool]:
        """Rows of an array that are durable, and whether the array is finished."""
        for section in ("files", "rows"):
            noted = self._journal[section].get(relpath, {})
            if [noted.get("shape"), noted.get("dtype")] == [list(header.shape), header.dtype.name]:
                return noted.get("rows", header.shape[0]), section == "files"
        return 0, False

    def _write_journal(self) -> None:
        storage.write_file(os.path.join(self.path, JOURNAL), seal(self._journal))

    # The end.

    def commit(self, manifest: Json) -> str:
        """Make the folder an artifact and put it in its place; the run is then over.

        Parameters
        ----------
        manifest : dict
            What to say of the run (JSON, no NaN); format, files, identity and checksum are added.

        Returns
        -------
        str
            Path of the artifact.

        Raises
        ------
        InputError
            Something appeared at the output's place meanwhile.
        ResourceError
            The disk is full.
        """
        files = {name: entry for name, entry in self._journal["files"].items() if not name.startswith(f"{_SCRATCH}/")}
        whole = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            **manifest,
            "files": files,
            "identity": self._journal["identity"],
        }
        sealed = seal(whole)
        self._created = False  # from here on nothing takes the finished work away
        storage.write_file(os.path.join(self.path, MANIFEST), sealed)
        with storage.writing(self._place.out):
            self._publish(json.loads(sealed))
        self._leave(remove=False)
        return self._place.out

    def _publish(self, manifest: Json) -> None:
        """Put a staging folder that has its manifest in the output's place; every step may be taken again."""
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(self.path, JOURNAL))
        _prune(self.path, {MANIFEST, REPLACED, *manifest["files"]})
        for folder, _, _ in os.walk(self.path):
            storage.sync_dir(folder)
        if self._place.inside:
            self._move_up(manifest)
        else:
            self._put_in_place()

    def _put_in_place(self) -> None:
        place, parent = self._place, os.path.dirname(self._place.out)
        if not (self._replaces and os.path.isdir(place.out)):
            os.rename(place.staging, place.out)  # an empty folder gives way, a full one does not
            storage.sync_dir(parent)
            return
        old = place.staging
        if not storage.exchange(place.staging, place.out):
            old = place.aside
            os.rename(place.out, old)
            os.rename(place.staging, place.out)
        storage.sync_dir(parent)
        remove_folder(old)

    def _move_up(self, manifest: Json) -> None:
        """Move the files into an output that cannot be renamed, the manifest last."""
        out = self._place.out
        if os.path.lexists(os.path.join(out, MANIFEST)):
            os.replace(os.path.join(out, MANIFEST), os.path.join(self.path, REPLACED))
            storage.sync_dir(self.path)
            storage.sync_dir(out)
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(out, REPORT))  # of the artifact that was there
        files = manifest["files"]
        _unlink_listed(out, {name: entry for name, entry in self._half_published().items() if name not in files})
        for name in files:
            if os.path.lexists(os.path.join(self.path, name)):
                os.makedirs(os.path.dirname(os.path.join(out, name)), exist_ok=True)
                os.replace(os.path.join(self.path, name), os.path.join(out, name))
        for folder in {os.path.dirname(os.path.join(out, name)) for name in files} | {out}:
            storage.sync_dir(folder)
        os.replace(os.path.join(self.path, MANIFEST), os.path.join(out, MANIFEST))
        storage.sync_dir(out)
        remove_folder(self.path)


def _misread(path: str) -> ResourceError:
    return ResourceError(f"{path}: read back, it is not what was written; check the disk.")


def _changes(old: Any, new: Json) -> list[str]:
    """Name each key of an identity that differs."""
    old = old if isinstance(old, dict) else {}
    before, after = (
        {key: value for section, part in one.items() for key, value in _flat(section, part)} for one in (old, new)
    )
    changes = []
    for key in dict.fromkeys([*before, *after]):
        is_input, name = isinstance(key, tuple), " ".join(key) if isinstance(key, tuple) else key
        if key not in after:
            changes.append(f"{_shown(name)}: no longer given")
        elif key not in before:
            changes.append(f"{_shown(name)}: not given then")
        elif before[key] != after[key]:
            how = "content changed" if is_input else f"{_shown(before[key])} -> {_shown(after[key])}"
            changes.append(f"{_shown(name)}: {how}")
    return changes


def _flat(section: str, part: Any) -> Iterator[tuple[str | tuple[str, str], Any]]:
    """Keys of a part of an identity and their values: dotted names, and ("input", name) for the inputs."""
    if not isinstance(part, dict):
        yield section, part
    elif section == "inputs":
        yield from ((("input", name), value) for name, value in part.items())
    else:
        for name, value in part.items():
            yield from _flat(f"{section}.{name}", value)


def is_journal(journal: Json) -> bool:
    """Whether JSON has the form of a journal."""
    if journal.get("format") != JOURNAL_FORMAT or not isinstance(journal.get("identity"), dict):
        return False
    parts = [journal.get(key) for key in ("finished", "rows", "files")]
    return all(isinstance(part, dict) and all(isinstance(one, dict) for one in part.values()) for part in parts)


def _check_ours(folder: str) -> None:
    """Refuse to use, or remove, what no run left behind.

    A folder is a run's when a journal is in it, or when all its files are such as a run writes.
    """
    if os.path.isdir(folder) and not os.path.islink(folder):
        if os.path.lexists(os.path.join(folder, JOURNAL)):
            return
        if all(name.endswith(_STAGED_ENDINGS) for _, _, names in os.walk(folder) for name in names):
            return
    raise InputError(f"{folder} is in the way and was not left by gpu-init; move it away.")


def remove_folder(folder: str) -> bool:
    """Remove a run's folder; tell whether there was one.

    Before anything else its manifest or journal is spoilt, so that what a kill leaves is never taken for whole, and
    still known as a run's.
    """
    if not os.path.isdir(folder):
        return False
    journal = os.path.join(folder, JOURNAL)
    with suppress(FileNotFoundError):
        os.replace(os.path.join(folder, MANIFEST), journal)
    if os.path.lexists(journal):
        os.truncate(journal, 0)
    _prune(folder, {JOURNAL})
    shutil.rmtree(folder)
    return True


def _prune(folder: str, kept: set[str]) -> None:
    """Remove all files of a folder but some, and the folders that are then empty."""
    for parent, folders, names in os.walk(folder, topdown=False):
        for name in names:
            path = os.path.join(parent, name)
            if os.path.relpath(path, folder) not in kept:
                os.unlink(path)
        for name in folders:
            path = os.path.join(parent, name)
            if os.path.islink(path):
                os.unlink(path)
            elif not os.listdir(path):
                os.rmdir(path)


def _unlink_listed(root: str, files: Json) -> None:
    """Remove those listed files that are in a folder, and their own folders when empty."""
    for name in filter(is_inside, files):
        path = os.path.join(root, name)
        folder = os.path.dirname(path)
        if os.path.lexists(path) and not os.path.isdir(path) and os.path.realpath(folder) == folder:
            os.unlink(path)
            with suppress(OSError):
                os.rmdir(folder)


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

    def __init__(self, staging: Staging, relpath: str, path: str, header: _Header) -> None:
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
        prefix = _header_bytes(self._header.shape, self._header.dtype)
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
