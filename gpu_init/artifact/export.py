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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpu_init.artifact.read import Artifact, load
from gpu_init.backend.interface import ranges
from gpu_init.errors import InputError
from gpu_init.files import storage

BLOCK_BYTES = 64 << 20  # About so many bytes of an array are in memory at a time.

_DTYPES = {"float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32", "bool": "BOOL"}
# The other arrays of an artifact serve `gpu-init assign` and `gpu-init report` only.
_PARTS = ("users", "centroids", "labels", "items", "items_mask", "item_labels")
_TABLES = ("users", "items", "centroids")

Columns = dict[str, tuple[NDArray[Any], NDArray[np.bool_] | None]]
"""From the name of a column to its values, and which of them are not null; None where none is null."""


def export(
    path: str | os.PathLike[str], kind: str, out: str | os.PathLike[str] | None = None, *, overwrite: bool = False
) -> str:
    """Write an artifact in another format.

    Parameters
    ----------
    path : path-like
        Folder or URL of the artifact.
    kind : {"safetensors", "pt", "parquet"}
        ``safetensors``: a file of tensors ``image.users``, ``image.labels`` and so on, with ``user_ids`` and
        ``item_ids`` where the ids are numbers. ``pt``: a file of ``{"image": {"users": Tensor, ...}, "user_ids": ...}``
        that ``torch.load`` reads with ``weights_only=True``; ids that are text are a list. ``parquet``: a folder of
        ``users.parquet`` (``user_id``, and per modality a list column and ``NAME_label``), ``items.parquet`` likewise
        (``NAME`` where items were projected, null without the modality) and ``centroids.parquet``.
    out : path-like, optional
        Where the export is written; by default the artifact's path with the format's ending.
    overwrite : bool
        Replace what stands there.

    Returns
    -------
    str
        Where it was written.

    Raises
    ------
    InputError
        This is no artifact, the format is another one, the place is taken or inside the artifact, or torch is not
        installed.
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
    size = sum(array.nbytes for arrays in _arrays(artifact).values() for array in arrays.values())
    with storage.writing(os.path.dirname(place), size):
        storage.require_free(os.path.dirname(place), size)
        FORMATS[kind](artifact, place, size)
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
    ours = os.path.isdir(place) and set(os.listdir(place)) <= {f"{name}.parquet" for name in _TABLES}
    if os.path.islink(place) or (not ours if folder else not os.path.isfile(place)):
        raise InputError(f"{place} is not what an earlier export has written; move it away.")


def _arrays(artifact: Artifact) -> dict[str, dict[str, NDArray[Any]]]:
    """Return the arrays that there are, by modality and by part."""
    parts = {name: {part: getattr(modality, part) for part in _PARTS} for name, modality in artifact.items()}
    return {name: {part: array for part, array in of.items() if array is not None} for name, of in parts.items()}


def _ids(artifact: Artifact) -> dict[str, NDArray[Any]]:
    """Return the ids, of dtype int64 or, where they are texts, object; none where rows are the ids."""
    ids = {"user_ids": artifact.user_ids, "item_ids": artifact.item_ids}
    return {
        name: column.to_numpy(np.int64 if column.dtype == np.int64 else object)
        for name, column in ids.items()
        if column is not None
    }


def _row_blocks(rows: int, n_bytes: int) -> Iterator[slice]:
    """Cut rows, which have so many bytes together, into ranges of about `BLOCK_BYTES`."""
    return ranges(rows, max(1, BLOCK_BYTES * rows // max(n_bytes, 1)))


def _write_safetensors(artifact: Artifact, place: str, size: int) -> None:
    """Write 8 bytes with the header's length, the header as JSON, then the arrays' bytes in C order.

    The library's own writer wants each array as bytes in memory.
    """
    arrays = {f"{name}.{part}": array for name, of in _arrays(artifact).items() for part, array in of.items()}
    arrays |= {name: ids for name, ids in _ids(artifact).items() if ids.dtype == np.int64}
    ordered = sorted(arrays.items(), key=lambda entry: (-entry[1].itemsize, entry[0]))  # Wide ones first: all aligned.
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "made_by": "gpu-init"}}
    end = 0
    for name, array in ordered:
        start, end = end, end + array.nbytes
        header[name] = {"dtype": _DTYPES[array.dtype.name], "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with storage.create(place, size) as sink:
        sink.write(len(text).to_bytes(8, "little") + text)
        for _, array in ordered:
            for block in _row_blocks(len(array), array.nbytes):
                sink.write(np.ascontiguousarray(array[block]).data)


def _write_pt(artifact: Artifact, place: str, size: int) -> None:
    try:
        import torch
    except ImportError:
        raise InputError("torch is not installed, and writes .pt: pip install 'gpu-init[torch]'.") from None

    with warnings.catch_warnings():
        # Tensors share the read-only map, so that the arrays are not read into memory; nothing is written to them.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensors: dict[str, Any] = {
            name: {part: torch.from_numpy(array) for part, array in of.items()}
            for name, of in _arrays(artifact).items()
        }
        for name, ids in _ids(artifact).items():
            tensors[name] = torch.from_numpy(ids) if ids.dtype == np.int64 else [str(one) for one in ids]
    with storage.create(place, size) as sink:
        file: Any = sink
        torch.save(tensors, file)


def _write_parquet(artifact: Artifact, place: str, size: int) -> None:  # noqa: ARG001
    """Write a folder of tables, which takes the place of an earlier one in one step where the system can."""
    parent, name = os.path.split(place)
    with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=parent) as temporary:
        folder = os.path.join(temporary, name)
        os.mkdir(folder)
        for table, columns in _tables(artifact).items():
            _write_table(os.path.join(folder, f"{table}.parquet"), columns)
        storage.sync_dir(folder)
        if not (os.path.isdir(place) and storage.exchange(folder, place)):
            shutil.rmtree(place, ignore_errors=True)  # An earlier export, on a system that cannot exchange.
            os.rename(folder, place)
        storage.sync_dir(parent)


def _tables(artifact: Artifact) -> dict[str, Columns]:
    ids, manifest = _ids(artifact), artifact.manifest
    clusters = max(len(modality.centroids) for modality in artifact.values())
    users: Columns = {"user_id": (ids.get("user_ids", np.arange(manifest["users"]["rows"])), None)}
    items: Columns = {"item_id": (ids.get("item_ids", np.arange(manifest["items"]["rows"])), None)}
    centroids: Columns = {"cluster": (np.arange(clusters), None)}
    for name, modality in artifact.items():
        users |= {name: (modality.users, None), f"{name}_label": (modality.labels, None)}
        if modality.items is not None:
            items[name] = (modality.items, modality.items_mask)
        if modality.item_labels is not None:
            items[f"{name}_label"] = (modality.item_labels, None)
        present = np.arange(clusters) < len(modality.centroids)  # Modalities may have different numbers of clusters.
        centroids[name] = (modality.centroids[np.minimum(np.arange(clusters), len(modality.centroids) - 1)], present)
    return dict(zip(_TABLES, (users, items, centroids), strict=True))


def _write_table(path: str, columns: Columns) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = len(next(iter(columns.values()))[0])
    n_bytes = sum(array.nbytes for array, _ in columns.values())
    schema = pa.schema([(name, _arrow(array[:0], None).type) for name, (array, _) in columns.items()])
    with pq.ParquetWriter(path, schema) as writer:
        for part in _row_blocks(rows, n_bytes):
            blocks = [_arrow(array[part], None if mask is None else mask[part]) for array, mask in columns.values()]
            writer.write_table(pa.table(blocks, schema=schema))
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _arrow(array: NDArray[Any], mask: NDArray[np.bool_] | None) -> Any:
    """Make a column of rows: of fixed-size lists where an array has two axes, null where the mask is not set."""
    import pyarrow as pa

    if array.ndim == 1:
        return pa.array(array, pa.string() if array.dtype == object else None)
    flat = pa.array(np.ascontiguousarray(array).reshape(-1))
    missing = None if mask is None else pa.array(~np.asarray(mask))
    return pa.FixedSizeListArray.from_arrays(flat, array.shape[1], mask=missing)


FORMATS: dict[str, Callable[[Artifact, str, int], None]] = {
    "safetensors": _write_safetensors,
    "pt": _write_pt,
    "parquet": _write_parquet,
}
