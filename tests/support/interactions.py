"""Interaction files for tests, and both ways to read them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from gpu_init.backend.cpu import CpuBackend
from gpu_init.errors import InputError
from gpu_init.inputs.axes import ItemAxis
from gpu_init.inputs.interactions import read
from gpu_init.inputs.tables import Columns
from gpu_init.where import parse

CPU = CpuBackend("test")


def matrix(table):
    """R as a dense float64 array."""
    csr = table.interactions.csr
    weights = np.ones(len(csr.indices)) if csr.weights is None else csr.weights
    shape = (table.interactions.users, table.interactions.items)
    return scipy.sparse.csr_array((weights.astype(np.float64), csr.indices, csr.indptr), shape=shape).toarray()


def write(path, frame, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".parquet", ".pq"):
        frame.to_parquet(path, **options)
    else:
        separator = "," if ".csv" in path.name else "\t"
        frame.to_csv(path, sep=separator, index=False)
    return str(path)


def frame(users, items, **more):
    return pd.DataFrame({"user_id": users, "item_id": items, **more})


def holding(*given):
    """Read as small jobs do, and as the CUDA backend does: all rows held, then sorted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPU_INIT_KERNELS", "numpy")
        return read(CPU, *given)


def streaming(*given):
    """Read as large jobs do: rows are counted, then put into R in place."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPU_INIT_KERNELS", "numba")
        return read(CPU, *given)


def take(path, axis=4, users=None, **columns):
    """What both ways of reading give, or why they do not."""
    axis = ItemAxis(axis) if isinstance(axis, int) else axis
    where = columns.pop("where", None)
    given = (str(path), Columns(**columns, where=parse(where) if where else None), axis, users)
    try:
        held = holding(*given)
    except InputError as error:
        with pytest.raises(InputError) as caught:
            streaming(*given)
        assert str(caught.value) == str(error)
        raise
    found = streaming(*given)
    assert (held.kernels, found.kernels) == ("numpy", "numba")
    assert_same_tables(found, held)
    return found


def assert_same_tables(found, expected):
    assert_same(found.interactions.csr, expected.interactions.csr)
    for name in ("read", "kept", "warnings"):
        assert getattr(found, name) == getattr(expected, name)
    assert found.interactions.items == expected.interactions.items
    for ours, theirs in ((found.user_ids, expected.user_ids), (found.item_ids, expected.item_ids)):
        assert (ours is None) == (theirs is None)
        assert ours is None or ours.tolist() == theirs.tolist()


def assert_same(found, expected):
    np.testing.assert_array_equal(found.indptr, expected.indptr)
    np.testing.assert_array_equal(found.indices, expected.indices)
    assert (found.weights is None) == (expected.weights is None)
    if found.weights is not None:
        np.testing.assert_array_equal(found.weights, expected.weights)
        assert found.weights.dtype == np.float32
    assert (found.indptr.dtype, found.indices.dtype) == (np.int64, np.int32)
