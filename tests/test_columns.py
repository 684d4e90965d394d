"""Kernels take features in slices of columns as they take them whole."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.sparse as sp

from gpu_init.backend.select import select
from gpu_init.kernels import Csr, columns
from gpu_init.kernels.columns import ColumnKernels, Columns
from gpu_init.method.blend import Blend
from gpu_init.method.lambdas import lambdas
from gpu_init.method.matrix import from_matrix
from gpu_init.method.modality import Modality
from gpu_init.method.norms import NORM_ROWS
from gpu_init.method.weighting import weighting
from gpu_init.settings import Settings

USERS, ITEMS, WIDTH = 60, 30, 40


@pytest.fixture
def whole():
    rng = np.random.default_rng(0)
    return rng.normal(size=(ITEMS, WIDTH)).astype(np.float32)


@pytest.fixture
def sliced(whole, tmp_path):
    bounds = (0, 16, 32, WIDTH)
    paths = []
    for first, last in itertools.pairwise(bounds):
        paths.append(str(tmp_path / f"{first}.npy"))
        np.save(paths[-1], whole[:, first:last])
    opened.clear()

    def take(path):
        opened.append(path)
        return np.load(path, mmap_mode="r")

    return Columns(paths, bounds, ITEMS, take, whole.__getitem__)


opened: list[str] = []


def calls(kernels, features):
    rng = np.random.default_rng(1)
    degrees = rng.integers(0, 6, USERS)
    indptr = np.concatenate([[0], np.cumsum(degrees)])
    csr = Csr(indptr, rng.integers(0, ITEMS, indptr[-1]).astype(np.int32), rng.random(indptr[-1], np.float32))
    scales = (1 / np.maximum(degrees, 1), (rng.random(ITEMS) < 0.9).astype(float))
    offset, points = rng.normal(size=WIDTH), rng.normal(size=(5, WIDTH))
    yield kernels.lengths(features)
    yield kernels.aggregate(csr, features, *scales, offset)
    yield kernels.squared_norms(csr, features, *scales, offset)
    yield kernels.products(features, offset, points)


@pytest.mark.parametrize("share", [0, 1e9])
def test_kernels_give_the_same(share, whole, sliced, monkeypatch):
    monkeypatch.setattr(columns, "FEW_SHARE", share)
    kernels = ColumnKernels(select("cpu").kernels, np)
    assert sliced.shape == whole.shape
    assert len(sliced) == len(whole)
    for expected, found, plain in zip(
        calls(kernels, whole), calls(kernels, sliced), calls(select("cpu").kernels, whole), strict=True
    ):
        assert np.array_equal(expected, plain)
        assert found.dtype == expected.dtype == np.float64
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_a_slice_stays_open_until_another_is_asked_for(sliced):
    found = sliced.map(lambda columns, values: (columns.start, values.shape))
    assert found == [(0, (ITEMS, 16)), (16, (ITEMS, 16)), (32, (ITEMS, 8))]
    assert len(opened) == 3
    assert sliced._open[0] == 2


@pytest.mark.parametrize("by_item", [False, True])
def test_attention_goes_through_the_slices_twice(by_item, whole, sliced):
    """Once for the items' lengths, once for what their users make of them, however many blocks these are."""
    rng = np.random.default_rng(1)
    users = 3 * NORM_ROWS
    backend = select("cpu")
    backend.kernels = ColumnKernels(backend.kernels, np)
    matrix = sp.random_array((users, ITEMS), density=0.1, format="csr", rng=rng)
    interactions = from_matrix(backend, matrix, "matrix")
    present = np.ones(ITEMS, bool)
    operator = weighting(backend, interactions, present, "mean")
    labels = rng.integers(0, 5, ITEMS if by_item else users).astype(np.int32)
    centroids, of = whole[:5], (None, labels) if by_item else (labels, None)
    plans = [
        Blend(Modality("image", values, present, ITEMS), operator, 0.0, centroids, *of, None)
        for values in (whole, sliced)
    ]
    one, other = (lambdas(backend, interactions, plan, Settings(lam="attention"), NORM_ROWS).values for plan in plans)
    np.testing.assert_allclose(other, one, rtol=1e-9)
    assert one.std() > 0.1
    assert len(opened) == 2 * 3
