"""Item features: files and arrays read and checked, projected, missing items marked.

Sections 2.2 (features), 2.8 (missing features) and 4 (inputs) of the design.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import reprlib
import textwrap
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from . import ids, memory, npy
from .backend import Backend, one_line
from .errors import GpuInitError, InputError, ResourceError
from .kernels.arrays import empty
from .memory import require as require_memory
from .storage import expand, local, reading

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

ITEM_NAMES = ("item_id", "itemid", "item", "id", "iid", "product_id", "asin")
LARGEST = 1e15  # squared distances of larger values, summed over many columns, would overflow float32
SMALLEST = 1e-30  # below, squares are lost in float32

_PARQUET = (".parquet", ".pq")
_PARQUET_ROWS = 4096  # decoded at a time
_PARQUET_COLUMNS = 16  # likewise; each holds a page and a dictionary of up to 1 MiB
_CHECK_VALUES = 1 << 20  # looked at together, about a cache full
_BLOCK_ROWS = 2048  # of float64 at a time; fixed, so that sums do not depend on memory
_BFLOAT16 = np.dtype("V2")  # numpy has no such type and stores its two bytes
_SAFETENSORS_HEADER_BYTES = 8 << 20  # of JSON, which costs Python twenty times as much
_CHUNK = 1 << 20
_WANTED = "float16, bfloat16, float32 or float64 are wanted"


@dataclass(frozen=True)
class FeatureTable:
    """One modality's features as a file holds them.

    Attributes
    ----------
    name : str
        The modality.
    path : str
        File, folder or glob that they were read from.
    values : numpy array, shape (n, D), float16, float32 or float64
        Memory-mapped where the file allows it.
    ids : pandas Series, shape (n,), int64 or text, or None
        Item of each row, each once; None: row i is item i.
    """

    name: str
    path: str
    values: NDArray[Any]
    ids: Any


@dataclass(frozen=True)
class Modality:
    """One modality's features on the device, by item.

    Attributes
    ----------
    name : str
        The modality.
    values : array, shape (I, D), float32 (float64 only on the way to a projection), C order
        Row i is item i. Rows of items without the modality mean nothing and may hold NaN.
    present : array, shape (I,), bool
        Which items have the modality.
    n_present : int
        How many do.
    """

    name: str
    values: Any
    present: Any
    n_present: int


@dataclass(frozen=True)
class Projection:
    """Principal components of a modality.

    Attributes
    ----------
    mean : array, shape (D,), float64
        Of the items that have the modality.
    components : array, shape (D, d), float64
        By falling eigenvalue; divided by the eigenvalue's square root when whitened.
    eigenvalues : array, shape (d,), float64
        Variance along each component.
    """

    mean: Any
    components: Any
    eigenvalues: Any


# Files.


def read(name: str, path: str, item_column: str | None = None) -> FeatureTable:
    """Read one modality's features from .npy, .npz, .safetensors, .pt, .pth or Parquet.

    Parameters
    ----------
    name : str
        The modality.
    path : str
        A file; Parquet may be a folder or a glob too, taken in the order of the names.
    item_column : str, optional
        Name of the interactions' item column; tried first for the id column of Parquet files.

    Returns
    -------
    FeatureTable

    Raises
    ------
    InputError
        The file cannot be read, is broken, or does not hold one matrix of floats.
    ResourceError
        It does not fit into memory.
    """
    paths = expand(path, EXTENSIONS)
    extensions = {os.path.splitext(one)[1].lower() for one in paths}
    unknown = extensions - set(EXTENSIONS)
    if unknown:
        raise InputError(f"{path}: cannot tell what it is; features end in {', '.join(EXTENSIONS)}.")
    if extensions <= set(_PARQUET):
        return FeatureTable(name, path, *_read_parquet(path, paths, item_column))
    if len(paths) > 1:
        raise InputError(f"{path}: {len(paths)} files; only Parquet features may be several files.")
    [extension] = extensions
    if extension in (".pt", ".pth"):
        _require_torch(path)
    with reading(paths[0]) as file, _decoding(paths[0], extension):
        values = _READERS[extension](file, paths[0])
        _require_matrix(paths[0], values.shape, values.dtype)
        return FeatureTable(name, path, _native(values, paths[0]), None)


def read_rows(name: str, path: str, items: int) -> NDArray[np.float32]:
    """Features by item, for ids that are row numbers; rows of NaN for items without them.

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
        As `read` and `check`, or an id that is not a row number below ``items``.
    """
    table = read(name, path)
    check(table.values, path)
    rows = np.arange(len(table.values)) if table.ids is None else table.ids.to_numpy()
    if rows.dtype != np.int64 or rows.min() < 0 or rows.max() >= items:
        raise InputError(f"{path}: its items are not row numbers from 0 to {items - 1}.")
    values = np.full((items, table.values.shape[1]), np.nan, np.float32)
    values[rows] = table.values
    return values


@contextmanager
def _decoding(path: str, kind: str) -> Iterator[None]:
    """Say in one line what a library found wrong with a file; a broken file can raise anything in any of them."""
    try:
        with warnings.catch_warnings(), memory.bounded():
            warnings.simplefilter("ignore")
            yield
    except GpuInitError:
        raise
    except MemoryError as error:
        raise ResourceError(f"{path}: {one_line(error)}; not enough memory to read it.") from None
    except Exception as error:
        why = textwrap.shorten(one_line(error), 200, placeholder=" ...")
        if "allocate memory" in str(error):  # torch's
            raise ResourceError(f"{path}: {why}; not enough memory to read it.") from None
        raise InputError(f"{path}: broken, or not {kind} ({why}).") from None


def _npy_header(file: Any, place: str, size: int) -> npy.Header:
    """Header of an .npy file that holds a matrix, held to the file's real size."""
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
            while part := stream.read(_CHUNK):
                data[filled : filled + len(part)] = np.frombuffer(part, np.uint8)
                filled += len(part)
        if filled != len(data):
            raise InputError(f"{path}: ends after {filled:,} of {len(data):,} bytes; write it again.")
    values: NDArray[Any] = data.view(header.dtype).reshape(header.shape, order=header.order)
    return values


_SAFETENSORS_TYPES = {"F16": np.dtype("<f2"), "BF16": _BFLOAT16, "F32": np.dtype("<f4"), "F64": np.dtype("<f8")}


def _read_safetensors(file: io.BufferedReader, path: str) -> NDArray[Any]:
    """Map the one matrix: 8 bytes of header length, a JSON header, then the values (the format's own specification)."""
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
EXTENSIONS = (*_READERS, *_PARQUET)


# Parquet.


@dataclass(frozen=True)
class _Layout:
    """Which columns of a Parquet file hold what: one list, or one number per dimension."""

    item: str | None
    values: tuple[str, ...]
    is_list: bool


def _read_parquet(place: str, paths: Sequence[str], item_column: str | None) -> tuple[NDArray[Any], Any]:
    """Values (n, D) and ids of all rows, file after file, batch by batch into one array."""
    headers = [_parquet_header(path, item_column) for path in paths]
    layout, dtype, _ = headers[0]
    for path, (other, _, _) in zip(paths, headers, strict=True):
        if other != layout:
            raise InputError(f"{path}: its columns are not those of {paths[0]}; all files need the same.")
    dtype = np.result_type(*(header[1] for header in headers))
    counts = [header[2] for header in headers]
    if sum(counts) == 0:
        raise InputError(f"{place}: no rows; one per item is wanted.")
    width = _list_width(place, paths, layout.values[0]) if layout.is_list else len(layout.values)
    require_memory(place, sum(counts) * width * dtype.itemsize)
    values = empty((sum(counts), width), dtype)
    columns = []
    filled = 0
    for path, count in zip(paths, counts, strict=True):
        columns.append(_read_parquet_file(path, layout, values[filled : filled + count]))
        filled += count
    if layout.item is None:
        return values, None
    return values, _joined_ids(columns, paths, counts)


def _parquet_header(path: str, item_column: str | None) -> tuple[_Layout, np.dtype[Any], int]:
    """Layout, dtype of the values and number of rows of one file."""
    with _parquet(path) as parquet:
        _check_announced(parquet.metadata)
        return *_layout(path, parquet.schema_arrow, item_column), parquet.metadata.num_rows


def _check_announced(metadata: pq.FileMetaData) -> None:
    """Refuse counts of rows that do not add up. Columns are left alone: pyarrow ends the process over some of them."""
    counts = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    if min(counts, default=0) < 0 or sum(counts) != metadata.num_rows:
        raise ValueError(f"{metadata.num_rows} rows, in groups of {reprlib.repr(counts)}")


def _layout(path: str, schema: pa.Schema, item_column: str | None) -> tuple[_Layout, np.dtype[Any]]:
    import pyarrow as pa

    names = schema.names
    if len(set(names)) != len(names):
        raise InputError(f"{path}: two columns of one name; rename one.")
    item = _item_column(path, schema, item_column)
    rest = [name for name in names if name != item]
    lists = [name for name in rest if _is_list(schema.field(name).type)]
    others = [name for name in rest if name not in lists]
    strange = [name for name in others if not _is_number(schema.field(name).type)]
    if strange:
        kinds = reprlib.repr([f"{name} ({schema.field(name).type})" for name in strange])
        raise InputError(f"{path}: columns {kinds} hold no numbers; besides the item ids, keep features only.")
    if not rest or len(lists) > 1 or (lists and others):
        raise InputError(
            f"{path}: columns {reprlib.repr(names)}; an id column and either one list column or one number column"
            " per dimension are wanted."
        )
    types = [schema.field(name).type for name in rest]
    if lists:
        types = [types[0].value_type]
        if not pa.types.is_floating(types[0]):
            raise InputError(f"{path}: lists of {types[0]} in column {lists[0]}; lists of floats are wanted.")
    dtypes = [kind.to_pandas_dtype() if pa.types.is_floating(kind) else np.float64 for kind in types]
    return _Layout(item, tuple(rest), bool(lists)), np.result_type(*dtypes)


def _item_column(path: str, schema: pa.Schema, item_column: str | None) -> str | None:
    """Column of the item ids: by name, else the only one of whole numbers or text beside floats or lists."""
    names: list[str] = schema.names
    if item_column in names:
        return item_column
    by_name = {name.lower().removesuffix(":token"): name for name in reversed(names)}
    for known in ITEM_NAMES:
        if known in by_name:
            return by_name[known]
    candidates = [name for name in names if _is_id(schema.field(name).type)]
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise InputError(
            f"{path}: any of columns {reprlib.repr(candidates)} may be the item ids; name it item_id"
            " (and store features as floats)."
        )
    return None


def _is_id(kind: pa.DataType) -> bool:
    from pyarrow.types import is_dictionary, is_integer, is_large_string, is_string

    kind = kind.value_type if is_dictionary(kind) else kind
    return bool(is_integer(kind) or is_string(kind) or is_large_string(kind))


def _is_list(kind: pa.DataType) -> bool:
    from pyarrow.types import is_fixed_size_list, is_large_list, is_list

    return bool(is_list(kind) or is_large_list(kind) or is_fixed_size_list(kind))


def _is_number(kind: pa.DataType) -> bool:
    from pyarrow.types import is_floating, is_integer

    return bool(is_floating(kind) or is_integer(kind))


@contextmanager
def _parquet(path: str) -> Iterator[pq.ParquetFile]:
    """Open a file mapped: a row group, compressed, may be as large as memory."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with (
        reading(path),
        _decoding(path, "Parquet"),
        pa.memory_map(local(path)) as file,
        pq.ParquetFile(file, page_checksum_verification=True) as parquet,
    ):
        yield parquet


def _list_width(place: str, paths: Sequence[str], column: str) -> int:
    """Length of the first list there is."""
    import pyarrow.compute as pc

    for path in paths:
        with _parquet(path) as parquet:
            for batch in parquet.iter_batches(_PARQUET_ROWS, columns=[column]):
                lengths = pc.list_value_length(batch.column(column)).drop_null()
                if len(lengths):
                    if lengths[0].as_py() == 0:
                        raise InputError(f"{path}, column {column}: an empty list; a missing item has a null.")
                    return int(lengths[0].as_py())
    raise InputError(f"{place}: all rows are missing (null).")


def _read_parquet_file(path: str, layout: _Layout, values: NDArray[Any]) -> Any:
    """Fill the rows of one file; gives its ids, normalized, or None."""
    import pandas as pd
    import pyarrow as pa

    with _parquet(path) as parquet:
        for first in range(0, len(layout.values), _PARQUET_COLUMNS):
            names = layout.values[first : first + _PARQUET_COLUMNS]
            filled = 0
            for batch in parquet.iter_batches(_PARQUET_ROWS, columns=list(names)):
                block = values[filled : filled + len(batch)]
                if layout.is_list:
                    _fill_lists(path, names[0], batch.column(names[0]), block, filled)
                else:
                    for position, name in enumerate(names, start=first):
                        block[:, position] = batch.column(name).to_numpy(zero_copy_only=False)
                filled += len(batch)
            _require_rows(path, filled, len(values))
        if layout.item is None:
            return None
        column = parquet.read(columns=[layout.item]).column(layout.item)
        _require_rows(path, len(column), len(values))
        column.validate(full=True)  # text that is not UTF-8
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        return ids.normalize(column.to_pandas(types_mapper=pd.ArrowDtype), f"{path}, column {layout.item}")


def _require_rows(path: str, found: int, announced: int) -> None:
    if found != announced:
        raise InputError(f"{path}: {found} rows, but it announces {announced}; write it again.")


def _fill_lists(path: str, name: str, column: pa.Array, block: NDArray[Any], before: int) -> None:
    """Rows from lists of equal length; a null list is a missing item, a null within it NaN."""
    import pyarrow.compute as pc

    width = block.shape[1]
    lengths = pc.fill_null(pc.list_value_length(column), width).to_numpy(zero_copy_only=False)
    ragged = np.flatnonzero(lengths != width)
    if len(ragged):
        raise InputError(
            f"{path}, column {name}: row {before + ragged[0]} has {lengths[ragged[0]]} values, rows before it {width};"
            " all need as many."
        )
    valid = column.is_valid().to_numpy(zero_copy_only=False)
    block[~valid] = np.nan
    block[valid] = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)


def _joined_ids(columns: list[Any], paths: Sequence[str], counts: Sequence[int]) -> Any:
    """Ids of all files; each may stand once."""
    import pandas as pd

    columns = [column for column in columns if column is not None]
    if any(ids.is_text(str(column.dtype)) for column in columns):
        columns = [column.astype("str") for column in columns]
    found = pd.concat(columns, ignore_index=True)
    twice = found.duplicated()
    if twice.any():
        second = ids.first_true(twice)
        first = ids.first_true(found == found.iloc[second])
        starts = np.cumsum([0, *counts])

        def row(at: int) -> str:
            file = int(np.searchsorted(starts, at, side="right")) - 1
            return f"row {at - starts[file]} of {paths[file]}"

        [item] = found.iloc[[second]].tolist()
        raise InputError(f"item {ids.shown(item)} stands twice, in {row(first)} and {row(second)}; keep one.")
    return found


# Checks.


def _require_matrix(place: str, shape: Sequence[int], dtype: Any) -> None:
    if len(shape) != 2 or min(shape) < 1:
        raise InputError(f"{place}: shape {tuple(shape)}; (items, dimensions) is wanted, a row per item.")
    if not _is_bfloat16(dtype) and (dtype.kind != "f" or dtype.itemsize not in (2, 4, 8)):
        kind = "Python objects" if dtype.kind == "O" else f"values of type {dtype}"
        raise InputError(f"{place}: {kind}; {_WANTED}.")


def _is_bfloat16(dtype: Any) -> bool:
    return bool(dtype == _BFLOAT16 or dtype.name == "bfloat16")


def _native(values: NDArray[Any], place: str) -> NDArray[Any]:
    """Values as numpy and numba compute with them; the same memory where they are so already."""
    if _is_bfloat16(values.dtype):
        require_memory(place, 4 * values.size)
        wide: NDArray[np.float32] = empty(values.shape, np.float32)  # bfloat16 is the upper half of float32
        np.left_shift(values.view(np.uint16), 16, out=wide.view(np.uint32), dtype=np.uint32)
        return wide
    if values.dtype.isnative and values.flags.aligned:
        return values
    require_memory(place, values.nbytes)
    return values.astype(values.dtype.newbyteorder("="), order="C")


def check(values: Any, place: str) -> Any:
    """Find the items that are missing, and refuse values that the method cannot use.

    Parameters
    ----------
    values : array, shape (n, D), float16, float32 or float64
        numpy's or the device's. Looked at block by block, so that mapped files stay mapped.
    place : str
        What to call them in an error: file and modality.

    Returns
    -------
    array, shape (n,), bool
        False where a row is all NaN, a missing item.

    Raises
    ------
    InputError
        A row that is NaN in part, a value that is infinite or beyond 1e15, all values below 1e-30, or no row
        that is there.
    """
    step = max(1, _CHECK_VALUES // values.shape[1])
    limit = min(LARGEST, float(np.finfo(values.dtype).max))
    most = 0.0
    for start in range(0, len(values), step):
        block = abs(values[start : start + step])
        if not bool((block <= limit).all()):
            _check_block(values[start : start + step], limit, start, place)
            block = block[block >= 0]  # what is left are missing items
        most = max(most, float(block.max()) if block.size else 0.0)
    if 0 < most < SMALLEST:
        raise InputError(f"{place}: no value is larger than {most:g}; below 1e-30 squares underflow; rescale them.")
    present = values[:, 0] == values[:, 0]  # no row is NaN in part, so one column says it all
    if not bool(present.any()):
        raise InputError(f"{place}: all {len(values)} rows are NaN, so no item has features.")
    return present


def _check_block(block: Any, limit: float, start: int, place: str) -> None:
    """Say what is wrong with a block, if it is more than rows of NaN."""
    nan = ~(abs(block) >= 0)
    partly = nan.any(axis=1) & ~nan.all(axis=1)
    if bool(partly.any()):
        row = int(partly.argmax())
        raise InputError(
            f"{place}: row {start + row} is NaN in {int(nan[row].sum())} of {block.shape[1]} columns; a missing item is"
            " a row all NaN, any other has a number in each."
        )
    beyond = abs(block) > limit
    if bool(beyond.any()):
        row = int(beyond.any(axis=1).argmax())
        column = int(beyond[row].argmax())
        value = float(block[row, column])
        remedy = "values must be finite" if np.isinf(value) else "beyond 1e15 squared distances overflow; rescale them"
        raise InputError(f"{place}: row {start + row}, column {column} is {value:g}; {remedy}.")


# Modalities.


def as_float32(backend: Backend, values: Any, exact: bool = False) -> Any:
    """Values as float32 in C order on the device, or float64 as it is if exact; no copy where they are so already."""
    dtype = _kept_dtype(values, exact)
    if values.dtype == dtype and values.flags.c_contiguous:
        return backend.asarray(values)
    converted = backend.empty(values.shape, dtype)
    converted[...] = backend.asarray(values)
    return converted


def _kept_dtype(values: Any, exact: bool) -> type[np.floating[Any]]:
    return np.float64 if exact and values.dtype == np.float64 else np.float32


def align_mask(present: Any, rows: Any, items: int) -> NDArray[np.bool_]:
    """Which of the items (I,) have a modality, from which rows of its table do; arguments as of `align`."""
    if rows is None:
        return np.asarray(present)
    mask = np.zeros(items, bool)
    mask[rows] = present
    return mask


def align(
    backend: Backend, table: FeatureTable, mask: NDArray[np.bool_], rows: Any, *, exact: bool = False
) -> Modality:
    """Place a table's rows at their items.

    Parameters
    ----------
    backend : Backend
        Where the modality shall lie.
    table : FeatureTable
        As `read` gives it.
    mask : numpy array, shape (I,), bool
        As `align_mask` gives it. An item that no row is placed at is missing.
    rows : numpy array, shape (n,), int64, or None
        Item row of each row of the table, each once; None: row i is item i.
    exact : bool
        Keep float64, for a projection.

    Returns
    -------
    Modality

    Raises
    ------
    ResourceError
        Not enough memory.
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


def from_array(backend: Backend, name: str, array: Any, *, exact: bool = False) -> Modality:
    """Modality from an array in memory, where row i is item i; no copy where none is needed.

    Parameters
    ----------
    backend : Backend
        Where the modality shall lie.
    name : str
        The modality.
    array : numpy or cupy array, torch tensor, or another that speaks DLPack; shape (I, D)
        float16, bfloat16, float32 or float64. A row of NaN is an item without the modality.
    exact : bool
        Keep float64, for a projection.

    Returns
    -------
    Modality

    Raises
    ------
    InputError
        Not such an array, or what `check` refuses.
    """
    place = f"modality {name}"
    if not hasattr(array, "__dlpack__") or isinstance(array, np.ma.MaskedArray):
        raise InputError(f"{place}: found {type(array).__name__}; a numpy, cupy or torch array is wanted.")
    values = _exchanged(backend, place, array)
    _require_matrix(place, values.shape, values.dtype)
    if isinstance(values, np.ndarray):
        values = _native(values, place)
    present = check(values, place)
    return Modality(name, as_float32(backend, values, exact), backend.asarray(present), int(present.sum()))


def _exchanged(backend: Backend, place: str, array: Any) -> Any:
    """Array as the device's, or else as numpy's, over the same memory."""
    if isinstance(array, np.ndarray):
        return np.asarray(array)
    if hasattr(array, "detach"):  # torch: what asks for a gradient is not shared, and numpy knows no bfloat16
        array = array.detach()
        array = array.float() if "bfloat16" in str(array.dtype) else array
    try:
        try:
            return backend.xp.from_dlpack(array)
        except Exception:  # it lies on another device; each library has its own error for that
            return np.from_dlpack(array.cpu() if hasattr(array, "cpu") else array)
    except Exception as error:
        found = f"{type(array).__name__} of {getattr(array, 'dtype', 'unknown type')}"
        raise InputError(
            f"{place}: {found} that backend {backend.name} cannot take ({one_line(error)}); pass a dense float array"
            " that lies on its device or on the CPU."
        ) from None


# Projection.


def fit_projection(backend: Backend, modality: Modality, dim: int, whiten: bool) -> Projection:
    """Principal components of every item that has the modality (section 2.2).

    Eigenvectors of the covariance (float64, ddof 1), by falling eigenvalue, each with its largest loading
    positive (the first such on ties). Eigenvalues below 1e-10 of the largest are dropped, which bounds ``dim``.

    Parameters
    ----------
    backend : Backend
        Where the modality lies.
    modality : Modality
        D columns wide.
    dim : int
        d, the number of components.
    whiten : bool
        Scale the components to unit variance.

    Returns
    -------
    Projection

    Raises
    ------
    InputError
        ``dim`` is above D or above the number of independent directions, or fewer than two items.
    """
    xp = backend.xp
    width = modality.values.shape[1]
    if dim > width:
        raise InputError(f"dim {dim} is above the {width} dimensions of modality {modality.name}.")
    if modality.n_present < 2:
        raise InputError(f"modality {modality.name}: one item has it; a projection (dim) needs two or more.")
    with backend.deterministic():
        total = xp.zeros(width, xp.float64)
        for _, rows in _blocks(xp, modality):
            total += rows.sum(axis=0)
        mean = total / modality.n_present
        covariance = xp.zeros((width, width), xp.float64)
        for _, rows in _blocks(xp, modality):
            centred = rows - mean
            covariance += centred.T @ centred
        eigenvalues, vectors = xp.linalg.eigh(covariance / (modality.n_present - 1))
        eigenvalues, vectors = eigenvalues[::-1], vectors[:, ::-1]
        # Items that are all alike vary by the rounding of their mean: below 1e-12 of its length nothing is real.
        least = max(1e-10 * float(eigenvalues[0]), 1e-24 * float(mean @ mean))
        independent = int((eigenvalues > least).sum())
        if dim > independent:
            raise InputError(
                f"dim {dim} is above the {independent} independent directions of modality {modality.name};"
                " lower --dim, or leave the modality out."
            )
        eigenvalues, vectors = eigenvalues[:dim], vectors[:, :dim]
        largest = vectors[abs(vectors).argmax(axis=0), xp.arange(dim)]
        lengths = xp.where(largest < 0, -1.0, 1.0) / (xp.sqrt(eigenvalues) if whiten else 1.0)
        return Projection(mean, xp.ascontiguousarray(vectors * lengths), xp.ascontiguousarray(eigenvalues))


def project(backend: Backend, modality: Modality, projection: Projection) -> Modality:
    """Items in the space of the components, computed in float64 and rounded once.

    Parameters
    ----------
    backend : Backend
        Where the modality lies.
    modality : Modality
        D columns wide.
    projection : Projection
        D to d.

    Returns
    -------
    Modality
        d columns wide; an item without the modality is a zero row.
    """
    xp = backend.xp
    values = backend.empty((len(modality.values), projection.components.shape[1]), xp.float32)
    values.fill(0)
    with backend.deterministic():
        for part, rows in _blocks(xp, modality):
            values[part][modality.present[part]] = (rows - projection.mean) @ projection.components
    return Modality(modality.name, values, modality.present, modality.n_present)


def _blocks(xp: Any, modality: Modality) -> Iterator[tuple[slice, Any]]:
    """Give fixed ranges of items, with the rows of those that have the modality in float64."""
    for start in range(0, len(modality.values), _BLOCK_ROWS):
        part = slice(start, start + _BLOCK_ROWS)
        yield part, modality.values[part][modality.present[part]].astype(xp.float64)
