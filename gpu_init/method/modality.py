"""One modality's item features on the device, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpu_init.backend.interface import Backend, one_line
from gpu_init.errors import InputError
from gpu_init.kernels.arrays import empty
from gpu_init.memory import require as require_memory

LARGEST = 1e15  # Squared distances of larger values, summed over many columns, would overflow float32.
SMALLEST = 1e-30  # The squares of smaller values are 0 in float32.
_CHECK_VALUES = 1 << 20  # So many values are checked at a time; they fit in a processor's cache.
_BLOCK_ROWS = 2048  # So many rows are float64 at a time; a fixed number, so that sums do not depend on memory.
_BFLOAT16 = np.dtype("V2")  # numpy has no bfloat16, and stores it as two bytes.
_WANTED = "float16, bfloat16, float32 or float64 are wanted"


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
        wide: NDArray[np.float32] = empty(values.shape, np.float32)  # bfloat16 is the upper half of float32.
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
            block = block[block >= 0]  # What this leaves out are missing items.
        most = max(most, float(block.max()) if block.size else 0.0)
    if 0 < most < SMALLEST:
        raise InputError(f"{place}: no value is larger than {most:g}; below 1e-30 squares underflow; rescale them.")
    present = values[:, 0] == values[:, 0]  # No row is partly NaN, so one column is enough.
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
    if hasattr(array, "detach"):  # torch shares no tensor that needs a gradient, and numpy has no bfloat16.
        array = array.detach()
        array = array.float() if "bfloat16" in str(array.dtype) else array
    try:
        try:
            return backend.xp.from_dlpack(array)
        except Exception:  # The array is on another device; each library raises its own error.
            return np.from_dlpack(array.cpu() if hasattr(array, "cpu") else array)
    except Exception as error:
        found = f"{type(array).__name__} of {getattr(array, 'dtype', 'unknown type')}"
        raise InputError(
            f"{place}: {found} that backend {backend.name} cannot take ({one_line(error)}); pass a dense float array"
            " that lies on its device or on the CPU."
        ) from None
