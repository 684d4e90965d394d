"""Feature files for tests, and what is asserted of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpu_init.backend.cpu import CpuBackend
from gpu_init.errors import InputError
from gpu_init.inputs import features

TIKTOK = Path(__file__).parents[3] / "shared" / "data" / "tiktok"
CPU = CpuBackend("tests")


def bfloat16(values):
    """Give the upper halves of float32, as numpy stores bfloat16."""
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def sample(rng, dtype=np.float32, shape=(7, 5)):
    """Values that float16, bfloat16 and all above hold exactly."""
    return rng.integers(-60, 60, shape).astype(dtype) / dtype(4)


def lists(values, kind=None):
    return pa.array(list(values), kind or pa.list_(pa.from_numpy_dtype(values.dtype)))


def fixed(values):
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])


def parquet(path, **columns):
    pq.write_table(pa.table(columns), path)


def refused(path, words, **options):
    with pytest.raises(InputError, match=words) as caught:
        features.read("m", str(path), **options)
    message = str(caught.value)
    assert str(path) in message
    assert message.count("\n") <= 1
    assert len(message) < 600


def same(table, values, ids=None):
    np.testing.assert_array_equal(table.values, values)
    assert table.values.dtype in (np.float16, np.float32, np.float64)
    assert table.values.dtype.isnative
    if ids is None:
        assert table.ids is None
    else:
        assert list(table.ids) == list(ids)


def memory_mapped(values):
    while isinstance(values, np.ndarray):
        if isinstance(values, np.memmap):
            return True
        values = values.base
    return False
