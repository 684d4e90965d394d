"""Artifacts, opened and checked without trust in what the files hold.

A folder is an artifact when `manifest.json` is there, says so, and is, byte for byte, what its own checksum and the
module `format`'s JSON (indented by 2, UTF-8) make of its content. No file is opened before its path, size, shape and
dtype are found to be what the manifest says; pickles are never loaded.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from gpu_init.artifact.format import (
    INTERACTIONS,
    LOCK,
    MANIFEST,
    PARTIAL,
    REPORT,
    TABLES,
    Json,
    check_modality,
    file_problem,
    hash,
    is_count,
    is_inside,
    lookup,
    map_array,
    not_an_artifact,
    parse_manifest,
    read_manifest,
    shown,
)
from gpu_init.backend.interface import one_line
from gpu_init.errors import InputError
from gpu_init.files import remote, storage
from gpu_init.method.describe import SAMPLE_COLUMNS

# The arrays of a modality: the lengths of their axes, by name or as numbers, then their dtypes.
_MODALITY = {
    "users": "users width float32|float16",
    "centroids": "clusters width float32",
    "labels": "users int32",
    "items": "items width float32",
    "items_mask": "items bool",
    "item_labels": "items int32",
    "item_factors": "items float64",
    "cold": "width float64",
    "sample": f"any {len(SAMPLE_COLUMNS)} float32",
    "sample_items": "any 3 float32",
    "typical": "clusters any int32",
}
# The arrays that place users by what they did, likewise.
_INTERACTIONS = {
    "items": "items width float32",
    "item_factors": "items float64",
    "singular_values": "width float64",
    "centroids": "clusters width float32",
    "labels": "users int32",
}


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
        What `gpu-init report` draws; `gpu_init.method.describe` says what they hold.
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
        self._root = root or path  # This folder is on this machine.
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
                frame = file.read(columns=["row", TABLES[table]]).to_pandas()
            in_order = np.array_equal(frame["row"], np.arange(len(frame)))
        except Exception as error:  # The library has many ways to fail on a damaged file.
            raise InputError(f"{path}: not a table of ids ({one_line(error)[:200]}).") from None
        if not in_order:
            raise InputError(f"{path}: its column row is not 0, 1, 2, ...; the file is not what the run wrote.")
        ids: pd.Series[Any] = frame[TABLES[table]]
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
    manifest = read_manifest(root)
    problem = next(problems(root, manifest), None)
    if problem:
        raise InputError(f"{place}: {problem}.")
    files = manifest["files"]

    def arrays(folder: str, kind: type[Any]) -> Any:
        paths = {part: f"{folder}/{part}.npy" for part in kind.__dataclass_fields__}
        found = {part: map_array(os.path.join(root, path)) for part, path in paths.items() if path in files}
        return kind(**found)

    modalities = {name: arrays(name, ModalityArrays) for name in manifest["modalities"]}
    clustered = f"{INTERACTIONS}/items.npy" in files
    placed = arrays(INTERACTIONS, InteractionArrays) if clustered else None
    return Artifact(place, manifest, modalities, placed, root)


def manifest_of(path: str | os.PathLike[str]) -> Json:
    """Return the manifest of an artifact whose files are all there; in object storage, none of these is read.

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
        raise InputError(f"{url}: {shown(name)}: missing, or not as long as it was written.")
    return manifest


def not_stored(url: str, files: Json) -> list[str]:
    """Return the files that object storage does not have, or not as long as they were written."""
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
        raise not_an_artifact(root)
    try:
        manifest = read_manifest(root)
    except InputError as error:
        return [str(error)]
    found = list(problems(root, manifest))
    files = manifest["files"] if isinstance(manifest.get("files"), dict) else {}
    for name, entry in files.items():
        if file_problem(root, name, entry) is None and hash(os.path.join(root, name)) != entry["sha256"]:
            found.append(f"{shown(name)}: its content is not what was written (sha256)")
    return found + [f"{shown(name)}: not in the manifest" for name in unlisted(root, files)]


def _root(path: str | os.PathLike[str]) -> str:
    """Return the folder of an artifact on this machine, without links; of one in object storage, a copy's."""
    if "\0" in os.fspath(path):
        raise InputError(f"{os.fspath(path)!r} is not a path.")
    path = storage.real_path(os.fspath(path))
    return _copied(path, _stored_manifest(path)) if remote.is_url(path) else path


def _stored_manifest(url: str) -> bytes:
    data = remote.read_if_there(f"{url}/{MANIFEST}")
    if data is None:
        raise not_an_artifact(url)
    return data


@functools.cache
def _copied(url: str, manifest: bytes) -> str:  # noqa: ARG001
    """Copy an artifact to this machine, once for each manifest, and return the folder."""
    names = [name for name in remote.sizes(url) if is_inside(name) and not name.startswith(f"{PARTIAL}/")]
    folder = os.path.realpath(remote.new_folder())
    for name in names:
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        remote.download(f"{url}/{name}", path)
    return folder


def problems(root: str, manifest: Json) -> Iterator[str]:
    """Yield what is wrong in a manifest, and in the sizes and headers of its files; nothing is hashed."""
    files, modalities = manifest.get("files"), manifest.get("modalities")
    if not isinstance(files, dict) or not isinstance(modalities, dict):
        yield f"{MANIFEST} lists no files or no modalities"
        return
    for name, entry in files.items():
        problem = file_problem(root, name, entry)
        if problem:
            yield f"{shown(name)}: {problem}"
    users, items = (lookup(manifest, axis, "rows") for axis in ("users", "items"))
    if not is_count(users) or not is_count(items):
        yield f"{MANIFEST} does not say how many users and items there are"
        return
    for table, count in zip(TABLES, (users, items), strict=True):
        if table in files and lookup(files, table, "rows") != count:
            yield f"{table}: has not {count:,} rows"
    lengths = {"users": users, "items": items}
    for name in modalities:
        try:
            check_modality(name)
        except InputError as error:
            yield str(error).rstrip(".")
        else:
            yield from _array_problems(name, files, _MODALITY, ("users", "centroids", "labels"), lengths)
    if f"{INTERACTIONS}/items.npy" in files:
        yield from _array_problems(INTERACTIONS, files, _INTERACTIONS, _INTERACTIONS, lengths)


def _array_problems(
    folder: str, files: Json, arrays: dict[str, str], needed: Collection[str], lengths: dict[str, int]
) -> Iterator[str]:
    """Yield the arrays that are needed and not there, or of a shape or dtype that does not go with the others."""
    centroids = lookup(files, f"{folder}/centroids.npy", "shape")
    if isinstance(centroids, list) and len(centroids) == 2:
        lengths = {**lengths, "clusters": centroids[0], "width": centroids[1]}
    for part, kind in arrays.items():
        path, (*axes, dtypes) = f"{folder}/{part}.npy", kind.split()
        if path not in files:
            if part in needed:
                yield f"{path}: missing from the manifest"
            continue
        shape = lookup(files, path, "shape")
        fits = isinstance(shape, list) and len(shape) == len(axes)
        for axis, length in zip(axes, shape if fits else [], strict=False):
            fits &= length == (int(axis) if axis.isdigit() else lengths.get(axis, length))
        if not fits or lookup(files, path, "dtype") not in dtypes.split("|"):
            yield f"{path}: its shape or dtype does not go with the other arrays"


def unlisted(root: str, files: Json) -> Iterator[str]:
    """Yield the files of a folder that a manifest does not list, and that no run, report or file system made there."""
    ours = {MANIFEST, REPORT, LOCK, "lost+found"}
    for folder, folders, names in os.walk(root):
        prefix = "" if folder == root else os.path.relpath(folder, root) + "/"
        if not prefix:
            folders[:] = [name for name in folders if name not in (PARTIAL, "lost+found")]
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in sorted(names + links):
            if prefix + name not in files and not (not prefix and name in ours):
                yield prefix + name
