"""An artifact in other libraries' formats: safetensors, torch's .pt, Parquet.

Arrays are taken from the memory-mapped artifact and written block by block; a format's file, or for Parquet its
folder, appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpu_init.artifact.read import Artifact, load
from gpu_init.errors import InputError
from gpu_init.files import storage

BLOCK_BYTES = 64 << 20  # of an array in memory at a time

_DTYPES = {"float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32", "bool": "BOOL"}
_PARTS = ("users", "centroids", "labels", "items", "items_mask", "item_labels")  # the rest is for assign and report


def export(
    path: str | os.PathLike[str], kind: str, out: str | os.PathLike[str] | None = None, *, overwrite: bool = False
) -> str:
    """Write an artifact in another format.

    Parameters
    ----------
    path : path-like
        Folder of the artifact.
    kind : {"safetensors", "pt", "parquet"}
        ``safetensors``: a file of tensors ``image.users``, ``image.labels`` and so on, with ``user_ids`` and
        ``item_ids`` where the ids are numbers. ``pt``: a file of ``{"image": {"users": Tensor, ...}, "user_ids": ...}``
        that ``torch.load`` reads with ``weights_only=True``; ids that are text are a list. ``parquet``: a folder of
        ``users.parquet`` (``user_id``, and per modality a list column and ``NAME_label``), ``items.parquet`` likewise
        (``NAME`` where items were projected, null without the modality) and ``centroids.parquet``.
    out : path-like, optional
        Where; by default the artifact's path and the format's ending.
    overwrite : bool
        Replace what stands there.

    Returns
    -------
    str
        Where it was written.

    Raises
    ------
    InputError
        Not an artifact, another format, a place that is taken or inside the artifact, or torch is not installed.
    ResourceError
        The disk is full.
    """
    if kind not in FORMATS:
        raise InputError(f"format: found {kind!r}; wanted is {', '.join(FORMATS)}.")
    artifact = load(path)
    place = os.fspath(out if out is not None else f"{artifact.path}.{kind}")
    storage.require_local(place)
    place = os.path.abspath(place)
    _check_place(artifact, place, overwrite, folder=kind == "parquet")
    with storage.writing(os.path.dirname(place)):
        FORMATS[kind](artifact, place)
    return place


def _check_place(artifact: Artifact, place: str, overwrite: bool, *, folder: bool) -> None:
    real = os.path.join(os.path.realpath(os.path.dirname(place)), os.path.basename(place))
    if real == artifact.path or real.startswith(f"{artifact.path}{os.sep}"):
        raise InputError(f"{place} is inside the artifact, which would no longer be what its manifest says.")
    if not os.path.isdir(os.path.dirname(place)):
        raise InputError(f"{os.path.dirname(place)}: there is no such folder.")
    if not os.path.lexists(place):
        return
    if not overwrite:
        raise InputError(f"{place} is already there; choose another place with --out, or give --overwrite.")
    ours = os.path.isdir(place) and set(os.listdir(place)) <= {f"{name}.parquet" for name in TABLES}
    if os.path.islink(place) or (not ours if folder else not os.path.isfile(place)):
        raise InputError(f"{place} is not what an earlier export has written; move it away.")


def _ids(artifact: Artifact) -> Iterator[tuple[str, Any]]:
    """Yield names and ids, where rows are not the ids."""
    for name, ids in (("user_ids", artifact.user_ids), ("item_ids", artifact.item_ids)):
        if ids is not None:
            yield name, ids


def _arrays(artifact: Artifact) -> Iterator[tuple[str, str, NDArray[Any]]]:
    """Yield modality, part and array of all that there are."""
    for name, modality in artifact.items():
        for part in _PARTS:
            array = getattr(modality, part)
            if array is not None:
                yield name, part, array


# safetensors: 8 bytes with the header's length, the header as JSON, then the arrays' bytes in C order. The library's
# own writer wants each array as bytes in memory, hence this one.


def _write_safetensors(artifact: Artifact, place: str) -> None:
    arrays = {f"{name}.{part}": array for name, part, array in _arrays(artifact)}
    arrays |= {name: ids.to_numpy() for name, ids in _ids(artifact) if ids.dtype == np.int64}
    ordered = sorted(arrays.items(), key=lambda entry: (-entry[1].itemsize, entry[0]))  # wide ones first: all aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "made_by": "gpu-init"}}
    end = 0
    for name, array in ordered:
        start, end = end, end + array.nbytes
        header[name] = {"dtype": _DTYPES[array.dtype.name], "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    storage.require_free(os.path.dirname(place), 8 + len(text) + end)
    with storage.create(place, 8 + len(text) + end) as sink:
        sink.write(len(text).to_bytes(8, "little") + text)
        for _, array in ordered:
            for block in _blocks(array):
                sink.write(np.ascontiguousarray(block).data)


def _blocks(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    for part in _ranges(len(array), array.nbytes):
        yield array[part]


def _ranges(rows: int, n_bytes: int) -> Iterator[slice]:
    """Yield ranges of rows of about `BLOCK_BYTES`, one at least."""
    step = max(1, BLOCK_BYTES * rows // max(n_bytes, 1))
    yield from (slice(start, min(start + step, rows)) for start in range(0, max(rows, 1), step))


# torch


def _write_pt(artifact: Artifact, place: str) -> None:
    try:
        import torch
    except ImportError:
        raise InputError("torch is not installed, and writes .pt: pip install 'gpu-init[torch]'.") from None

    whole: dict[str, Any] = {name: {} for name in artifact}
    with warnings.catch_warnings():
        # Tensors share the read-only map, so that the arrays are not read into memory; nothing is written to them.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        for name, part, array in _arrays(artifact):
            whole[name][part] = torch.from_numpy(array)
        for name, ids in _ids(artifact):
            numbers = ids.dtype == np.int64
            whole[name] = torch.from_numpy(ids.to_numpy()) if numbers else [str(one) for one in ids]
    size = sum(array.nbytes for _, _, array in _arrays(artifact))
    storage.require_free(os.path.dirname(place), size)
    with storage.create(place, size) as sink:
        file: Any = sink
        torch.save(whole, file)


# Parquet


def _write_parquet(artifact: Artifact, place: str) -> None:
    size = sum(array.nbytes for _, _, array in _arrays(artifact))
    storage.require_free(os.path.dirname(place), size)
    with _folder(place) as folder:
        for name, columns in TABLES.items():
            _write_table(os.path.join(folder, f"{name}.parquet"), columns(artifact))


@contextmanager
def _folder(place: str) -> Iterator[str]:
    """Make a folder that appears at its place whole, or not at all."""
    parent, name = os.path.split(place)
    temporary = tempfile.mkdtemp(prefix=f".{name}.", dir=parent)
    try:
        os.chmod(temporary, 0o777 & ~_umask())
        yield temporary
        storage.sync_dir(temporary)
        if os.path.isdir(place) and storage.exchange(temporary, place):
            shutil.rmtree(temporary)
        else:
            shutil.rmtree(place, ignore_errors=True)  # its own earlier export, on a system that cannot exchange
            os.rename(temporary, place)
        storage.sync_dir(parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


Columns = dict[str, tuple[NDArray[Any], NDArray[np.bool_] | None]]  # name to array, and which rows are not null


def _id_array(ids: Any) -> NDArray[Any]:
    array: NDArray[Any] = ids.to_numpy() if ids.dtype == np.int64 else ids.to_numpy(object)
    return array


def _user_columns(artifact: Artifact) -> Columns:
    ids = artifact.user_ids
    first = next(iter(artifact.values()))
    columns: Columns = {"user_id": (np.arange(len(first.labels)) if ids is None else _id_array(ids), None)}
    for name, modality in artifact.items():
        columns[name] = (modality.users, None)
        columns[f"{name}_label"] = (modality.labels, None)
    return columns


def _item_columns(artifact: Artifact) -> Columns:
    ids = artifact.item_ids
    count = artifact.manifest["items"]["rows"]
    columns: Columns = {"item_id": (np.arange(count) if ids is None else _id_array(ids), None)}
    for name, modality in artifact.items():
        if modality.items is not None:
            columns[name] = (modality.items, modality.items_mask)
        if modality.item_labels is not None:
            columns[f"{name}_label"] = (modality.item_labels, None)
    return columns


def _centroid_columns(artifact: Artifact) -> Columns:
    clusters = max(len(modality.centroids) for modality in artifact.values())
    columns: Columns = {"cluster": (np.arange(clusters), None)}
    for name, modality in artifact.items():
        columns[name] = (modality.centroids, None)
    return columns


TABLES: dict[str, Callable[[Artifact], Columns]] = {
    "users": _user_columns,
    "items": _item_columns,
    "centroids": _centroid_columns,
}


def _write_table(path: str, columns: Columns) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = len(next(iter(columns.values()))[0])
    n_bytes = sum(array.nbytes for array, _ in columns.values())
    schema = pa.schema([(name, _arrow(array[:0], None).type) for name, (array, _) in columns.items()])
    with pq.ParquetWriter(path, schema) as writer:
        for part in _ranges(rows, n_bytes):
            blocks = [_arrow(array[part], None if mask is None else mask[part]) for array, mask in columns.values()]
            writer.write_table(pa.table(blocks, schema=schema))
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _arrow(array: NDArray[Any], mask: NDArray[np.bool_] | None) -> Any:
    """Rows as a column: fixed-size lists for those of two dimensions, null where the mask is not set."""
    import pyarrow as pa

    if array.ndim == 1:
        return pa.array(array, pa.string() if array.dtype == object else None)
    flat = pa.array(np.ascontiguousarray(array).reshape(-1))
    missing = None if mask is None else pa.array(~np.asarray(mask))
    return pa.FixedSizeListArray.from_arrays(flat, array.shape[1], mask=missing)


FORMATS: dict[str, Callable[[Artifact, str], None]] = {
    "safetensors": _write_safetensors,
    "pt": _write_pt,
    "parquet": _write_parquet,
}
