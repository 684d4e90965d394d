"""Item features from Parquet files."""

from __future__ import annotations

import reprlib
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gpu_init import ids, memory
from gpu_init.backend.interface import one_line
from gpu_init.errors import GpuInitError, InputError, ResourceError
from gpu_init.files.storage import local, reading
from gpu_init.kernels.arrays import empty
from gpu_init.memory import require as require_memory

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq


ITEM_NAMES = ("item_id", "itemid", "item", "id", "iid", "product_id", "asin")
_PARQUET_ROWS = 4096  # So many rows are decoded at a time.
_PARQUET_COLUMNS = 16  # So many columns are read at a time, since each takes a page and a dictionary of up to 1 MiB.


@contextmanager
def decoding(path: str, kind: str) -> Iterator[None]:
    """Turn any error that a library raises in the block into one line about the file.

    For a broken file, the libraries raise errors of many types.

    Raises
    ------
    InputError
        The file is broken, or not of this kind.
    ResourceError
        It does not fit into memory.
    """
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
        if "allocate memory" in str(error):  # PyTorch raises a RuntimeError.
            raise ResourceError(f"{path}: {why}; not enough memory to read it.") from None
        raise InputError(f"{path}: broken, or not {kind} ({why}).") from None


@dataclass(frozen=True)
class _Layout:
    """Which columns of a Parquet file hold what.

    ``item`` is the column of ids. ``values`` are the columns of features: one column of lists, or one column of numbers
    per dimension.
    """

    item: str | None
    values: tuple[str, ...]
    is_list: bool


def read_parquet(place: str, paths: Sequence[str], item_column: str | None) -> tuple[NDArray[Any], Any]:
    """Read the values (n, D) and the ids of all rows, file after file; ids are None if no column holds them."""
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
    """Return the layout of one file, the dtype of its values and its number of rows.

    Counts of rows that do not add up are refused. The metadata of columns are not looked at: for some damaged files,
    pyarrow ends the process when they are.
    """
    with _parquet(path) as parquet:
        metadata = parquet.metadata
        counts = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        if min(counts, default=0) < 0 or sum(counts) != metadata.num_rows:
            raise ValueError(f"{metadata.num_rows} rows, in groups of {reprlib.repr(counts)}")
        return *_layout(path, parquet.schema_arrow, item_column), metadata.num_rows


def _layout(path: str, schema: pa.Schema, item_column: str | None) -> tuple[_Layout, np.dtype[Any]]:
    import pyarrow as pa
    from pyarrow.types import is_floating, is_integer

    names = schema.names
    if len(set(names)) != len(names):
        raise InputError(f"{path}: two columns have the same name; rename one.")
    item = _item_column(path, schema, item_column)
    rest = [name for name in names if name != item]
    list_kinds = (pa.ListType, pa.LargeListType, pa.FixedSizeListType)
    lists = [name for name in rest if isinstance(schema.field(name).type, list_kinds)]
    others = [name for name in rest if name not in lists]
    kinds = {name: schema.field(name).type for name in others}
    strange = [f"{n} ({kind})" for n, kind in kinds.items() if not (is_floating(kind) or is_integer(kind))]
    if strange:
        raise InputError(
            f"{path}: columns {reprlib.repr(strange)} hold no numbers; besides the item ids, keep features only."
        )
    if not rest or len(lists) > 1 or (lists and others):
        raise InputError(
            f"{path}: columns {reprlib.repr(names)}; an id column and either one list column or one number column"
            " per dimension are wanted."
        )
    types = [schema.field(name).type for name in rest]
    if lists:
        types = [types[0].value_type]
        if not is_floating(types[0]):
            raise InputError(f"{path}: lists of {types[0]} in column {lists[0]}; lists of floats are wanted.")
    dtypes = [kind.to_pandas_dtype() if is_floating(kind) else np.float64 for kind in types]
    return _Layout(item, tuple(rest), bool(lists)), np.result_type(*dtypes)


def _item_column(path: str, schema: pa.Schema, item_column: str | None) -> str | None:
    """Find the column of the item ids: by its name, or else the only one that holds whole numbers or text."""
    from pyarrow.types import is_dictionary, is_integer, is_large_string, is_string

    names: list[str] = schema.names
    if item_column in names:
        return item_column
    by_name = {name.lower().removesuffix(":token"): name for name in reversed(names)}
    for known in ITEM_NAMES:
        if known in by_name:
            return by_name[known]
    kinds = {name: schema.field(name).type for name in names}
    kinds = {name: kind.value_type if is_dictionary(kind) else kind for name, kind in kinds.items()}
    candidates = [n for n, kind in kinds.items() if is_integer(kind) or is_string(kind) or is_large_string(kind)]
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise InputError(
            f"{path}: any of columns {reprlib.repr(candidates)} may be the item ids; name it item_id"
            " (and store features as floats)."
        )
    return None


@contextmanager
def _parquet(path: str) -> Iterator[pq.ParquetFile]:
    """Open a file as a memory map, because even one compressed row group may be as large as memory."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with (
        reading(path),
        decoding(path, "Parquet"),
        pa.memory_map(local(path)) as file,
        pq.ParquetFile(file, page_checksum_verification=True) as parquet,
    ):
        yield parquet


def _list_width(place: str, paths: Sequence[str], column: str) -> int:
    """Return the length of the first list that is not null."""
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
    """Read one file into ``values``, and return its ids after `ids.normalize`, or None."""
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
        column.validate(full=True)  # It refuses text that is not UTF-8.
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        return ids.normalize(column.to_pandas(types_mapper=pd.ArrowDtype), f"{path}, column {layout.item}")


def _require_rows(path: str, found: int, announced: int) -> None:
    if found != announced:
        raise InputError(f"{path}: {found} rows, but it announces {announced}; write it again.")


def _fill_lists(path: str, name: str, column: pa.Array, block: NDArray[Any], before: int) -> None:
    """Fill rows from lists of equal length. A null list is a missing item, and a null in a list becomes NaN."""
    import pyarrow.compute as pc

    width = block.shape[1]
    lengths = pc.fill_null(pc.list_value_length(column), width).to_numpy(zero_copy_only=False)
    ragged = np.flatnonzero(lengths != width)
    if len(ragged):
        raise InputError(
            f"{path}, column {name}: row {before + ragged[0]} has {lengths[ragged[0]]} values, but the rows before it"
            f" have {width}; all rows need the same number of values."
        )
    valid = column.is_valid().to_numpy(zero_copy_only=False)
    block[~valid] = np.nan
    block[valid] = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)


def _joined_ids(columns: list[Any], paths: Sequence[str], counts: Sequence[int]) -> Any:
    """Concatenate the ids of all files, and refuse an id that is there twice."""
    import pandas as pd

    found = pd.concat(ids.same_kind(columns), ignore_index=True)
    twice = found.duplicated()
    if twice.any():
        second = ids.first_true(twice)
        first = ids.first_true(found == found.iloc[second])
        starts = np.cumsum([0, *counts])

        def row(at: int) -> str:
            file = int(np.searchsorted(starts, at, side="right")) - 1
            return f"row {at - starts[file]} of {paths[file]}"

        [item] = found.iloc[[second]].tolist()
        raise InputError(f"item {ids.shown(item)} is there twice, in {row(first)} and {row(second)}; keep one.")
    return found
