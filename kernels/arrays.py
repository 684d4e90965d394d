"""Arrays that start on a cache line, so that rows of whole lines do too."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

LINE_BYTES = 64  # A cache line has so many bytes.


def empty(shape: tuple[int, ...], dtype: Any) -> Any:
    """As `numpy.empty` in C order, but on a cache line: a row of 512 bytes then touches 8 lines instead of 9."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    space = np.empty(size + LINE_BYTES, np.uint8)
    start = -space.ctypes.data % LINE_BYTES
    return space[start : start + size].view(dtype).reshape(shape)
