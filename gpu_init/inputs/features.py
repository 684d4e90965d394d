"""Item features: reads them from files, and places their rows at the items of the job."""

from __future__ import annotations

import io
import json
import os
import pickle
import reprlib
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gpu_init.backend.interface import Backend
from gpu_init.errors import InputError
from gpu_init.files import npy
from gpu_init.files.storage import expand, reading
from gpu_init.inputs.parquet import decoding, read_parquet
from gpu_init.inputs.tables import PARQUET_EXTENSIONS
from gpu_init.kernels.arrays import empty
from gpu_init.memory import require as require_memory
from gpu_init.method.modality import (
    _BFLOAT16,
    _BLOCK_ROWS,
    _WANTED,
    Modality,
    _kept_dtype,
    _native,
    _require_matrix,
    as_float32,
    check,
)

_SAFETENSORS_HEADER_BYTES = 8 << 20  # A longer JSON header is refused: parsed, it takes twenty times its bytes.
_CHUNK_BYTES = 1 << 20  # A compressed array is decompressed in pieces of this size.


@dataclass(frozen=True)
class FeatureTable:
    """One modality's features, as its files hold them.

    Attributes
    ----------
    name : str
        Name of the modality.
    path : str
        The file, folder or glob.
    values : numpy array, shape (n, D), float16, float32 or float64
        Memory-mapped if the file allows it.
    ids : pandas Series, shape (n,), int64 or text, or None
        The item id of each row, without duplicates. None: row i is item i.
    """

    name: str
    path: str
    values: NDArray[Any]
    ids: Any


def read(name: str, path: str, item_column: str | None = None) -> FeatureTable:
    """Read one modality's features from .npy, .npz, .safetensors, .pt, .pth or Parquet.

    Parameters
    ----------
    name : str
        Name of the modality.
    path : str
        A file. For Parquet also a folder or a glob, whose files are read in the order of their names.
    item_column : str, optional
        Name of the interactions' item column. In Parquet files, it is the first name to try for the id column.

    Returns
    -------
    FeatureTable

    Raises
    ------
    InputError
        The file cannot be read, is broken, or does not hold exactly one matrix of floats.
    ResourceError
        The features do not fit into memory.
    """
    paths = expand(path, EXTENSIONS)
    extensions = {os.path.splitext(one)[1].lower() for one in paths}
    unknown = extensions - set(EXTENSIONS)
    if unknown:
        raise InputError(f"{path}: cannot tell what it is; features end in {', '.join(EXTENSIONS)}.")
    if extensions <= set(PARQUET_EXTENSIONS):
        return FeatureTable(name, path, *read_parquet(path, paths, item_column))
    if len(paths) > 1:
        raise InputError(f"{path}: {len(paths)} files; only Parquet features may be several files.")
    [extension] = extensions
    if extension in (".pt", ".pth"):
        _require_torch(path)
    with reading(paths[0]) as file, decoding(paths[0], extension):
        values = _READERS[extension](file, paths[0])
        _require_matrix(paths[0], values.shape, values.dtype)
        return FeatureTable(name, path, _native(values, paths[0]), None)


def read_rows(name: str, path: str, items: int) -> NDArray[np.float32]:
    """Read features by item, for item ids that are row numbers. An item without features gets a row of NaN.

    Parameters
    ----------
    name, path
        As in `read`.
    items : int
        I, the number of items.

    Returns
    -------
    numpy array, shape (I, D), float32

    Raises
    ------
    InputError
        As in `read` and `check`; or an id is not a row number below ``items``.
    """
    table = read(name, path)
    check(table.values, path)
    rows = np.arange(len(table.values)) if table.ids is None else table.ids.to_numpy()
    if rows.dtype != np.int64 or rows.min() < 0 or rows.max() >= items:
        raise InputError(f"{path}: its items are not row numbers from 0 to {items - 1}.")
    values = np.full((items, table.values.shape[1]), np.nan, np.float32)
    values[rows] = table.values
    return values


def _npy_header(file: Any, place: str, size: int) -> npy.Header:
    """Read the header of an .npy file, and refuse it if the file is no matrix or has another size."""
    header = npy.read_header(file)
    _require_matrix(place, header.shape, header.dtype)
    header.require_size(place, size)
    return header


def _read_npy(file: io.BufferedReader, path: str) -> NDArray[Any]:
    header = _npy_header(file, path, os.fstat(file.fileno()).st_size)
    return _map(file, header.dtype, header.shape, header.offset, header.order)


def _map(file: Any, dtype: Any, shape: tuple[int, ...], offset: int, order: Literal["C", "F"] = "C") -> NDArray[Any]:
    values: NDArray[Any] = np.asarray(np.memmap(file, dtype, "r", offset, shape, order))
    return values


def _read_npz(file: io.BufferedReader, path: str) -> NDArray[Any]:
    with npy.archive(file, path) as archive:
        names = archive.namelist()
        if {"format.npy", "data.npy"} <= set(names):
            raise InputError(f"{path}: a scipy sparse matrix; features are dense arrays, saved with numpy.save.")
        if len(names) != 1:
            raise InputError(f"{path}: {len(names)} arrays, {reprlib.repr(names)}; one 2-D array is wanted, alone.")
        [member] = archive.infolist()
        with archive.open(member) as stream:
            header = _npy_header(stream, f"{path}, {member.filename}", member.file_size)
        require_memory(path, member.file_size)
        data = empty((header.end - header.offset,), np.uint8)
        with archive.open(member) as stream:
            stream.read(header.offset)
            filled = 0
            while part := stream.read(_CHUNK_BYTES):
                data[filled : filled + len(part)] = np.frombuffer(part, np.uint8)
                filled += len(part)
        if filled != len(data):
            raise InputError(f"{path}: ends after {filled:,} of {len(data):,} bytes; write it again.")
    values: NDArray[Any] = data.view(header.dtype).reshape(header.shape, order=header.order)
    return values


_SAFETENSORS_TYPES = {"F16": np.dtype("<f2"), "BF16": _BFLOAT16, "F32": np.dtype("<f4"), "F64": np.dtype("<f8")}


def _read_safetensors(file: io.BufferedReader, path: str) -> NDArray[Any]:
    """Map the only matrix of a file.

    By the format's specification, the file is 8 bytes of header length, the header as JSON, and the values.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    first = 8 + length
    if length > _SAFETENSORS_HEADER_BYTES or first > size:
        raise ValueError(f"a header of {length} bytes")
    header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    matrix = _only_matrix(path, {key: tuple(entry["shape"]) for key, entry in header.items()})
    kind, shape = header[matrix]["dtype"], tuple(header[matrix]["shape"])
    if kind not in _SAFETENSORS_TYPES:
        raise InputError(f"{path}, {matrix}: values of type {kind}; {_WANTED}.")
    dtype = _SAFETENSORS_TYPES[kind]
    _require_matrix(path, shape, dtype)
    start, stop = header[matrix]["data_offsets"]
    needed = shape[0] * shape[1] * dtype.itemsize
    if not (0 <= start <= stop <= size - first and stop - start == needed):
        raise InputError(
            f"{path}: {shape[0]} x {shape[1]} values of {kind} take {needed:,} bytes, but bytes {start} to {stop}"
            f" of {size - first:,} are named; the file was cut off or is not whole. Write it again."
        )
    return _map(file, dtype, shape, first + start)


def _only_matrix(path: str, shapes: dict[str, tuple[int, ...]]) -> str:
    matrices = [key for key, shape in shapes.items() if len(shape) == 2]
    if len(matrices) != 1:
        found = reprlib.repr([f"{key} {shape}" for key, shape in shapes.items()])
        raise InputError(f"{path}: tensors {found}; exactly one 2-D tensor is wanted.")
    return matrices[0]


def _require_torch(path: str) -> None:
    try:
        import torch  # noqa: F401
    except ImportError:
        raise InputError(f"{path}: PyTorch reads such files, and is not there: pip install 'gpu-init[torch]'") from None


def _read_torch(file: io.BufferedReader, path: str) -> NDArray[Any]:
    import torch

    if zipfile.is_zipfile(file):
        with npy.archive(file, path) as archive:
            require_memory(path, sum(member.file_size for member in archive.infolist()))
    file.seek(0)
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(f"{path}: broken, or more than tensors in it; save one tensor, or a state_dict.") from None
    if isinstance(loaded, dict):
        tensors = {str(key): value for key, value in loaded.items() if isinstance(value, torch.Tensor)}
        loaded = tensors[_only_matrix(path, {key: tuple(value.shape) for key, value in tensors.items()})]
    if not isinstance(loaded, torch.Tensor) or loaded.layout != torch.strided:
        found = str(loaded.layout) if isinstance(loaded, torch.Tensor) else type(loaded).__name__
        raise InputError(f"{path}: found {found}; one dense 2-D tensor is wanted, alone or in a dict.")
    loaded = loaded.detach()
    stored = 0 if loaded.is_meta else loaded.untyped_storage().nbytes()
    if loaded.numel() * loaded.element_size() > stored:
        raise InputError(
            f"{path}: {tuple(loaded.shape)} values, but {stored:,} bytes of them are stored; save tensor.contiguous()."
        )
    values: NDArray[Any] = (loaded.float() if loaded.dtype == torch.bfloat16 else loaded).numpy()
    return values


_READERS: dict[str, Callable[[io.BufferedReader, str], NDArray[Any]]] = {
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".safetensors": _read_safetensors,
    ".pt": _read_torch,
    ".pth": _read_torch,
}
EXTENSIONS = (*_READERS, *PARQUET_EXTENSIONS)


def align_mask(present: Any, rows: Any, items: int) -> NDArray[np.bool_]:
    """Return which items have the modality, (I,) bool, given which rows of its table do, (n,) bool.

    ``rows`` is as in `align`.
    """
    if rows is None:
        return np.asarray(present)
    mask = np.zeros(items, bool)
    mask[rows] = present
    return mask


def align(
    backend: Backend, table: FeatureTable, mask: NDArray[np.bool_], rows: Any, *, exact: bool = False
) -> Modality:
    """Place a table's rows at their items, on the device.

    Parameters
    ----------
    backend : Backend
        The modality is made on its device.
    table : FeatureTable
        What `read` returns.
    mask : numpy array, shape (I,), bool
        What `align_mask` returns. An item without a row in the table is missing.
    rows : numpy array, shape (n,), int64, or None
        The item of each row of the table, without duplicates. None: row i is item i.
    exact : bool
        Whether float64 values stay float64, which a projection needs.

    Returns
    -------
    Modality

    Raises
    ------
    ResourceError
        The modality does not fit into memory.
    """
    values = table.values
    dtype = np.dtype(_kept_dtype(values, exact))
    if rows is None:
        if values.dtype != dtype or not values.flags.c_contiguous:
            require_memory(table.path, dtype.itemsize * values.size)
        aligned = as_float32(backend, values, exact)
    else:
        require_memory(table.path, dtype.itemsize * len(mask) * values.shape[1])
        placed = empty((len(mask), values.shape[1]), dtype)
        placed.fill(0)
        for start in range(0, len(values), _BLOCK_ROWS):
            placed[rows[start : start + _BLOCK_ROWS]] = values[start : start + _BLOCK_ROWS]
        aligned = backend.asarray(placed)
    return Modality(table.name, aligned, backend.asarray(mask), int(mask.sum()))
