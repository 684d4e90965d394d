"""Missing rows, features by item, and the projection."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.decomposition import PCA

from gpu_init import memory
from gpu_init.errors import InputError, ResourceError
from gpu_init.inputs import features
from gpu_init.method import modality as method_modality
from gpu_init.method import projection as method_projection
from gpu_init.method.modality import Modality
from tests.support.features import CPU, TIKTOK, bfloat16, lists, parquet, sample

# Missing rows.


@given(
    values=hnp.arrays(
        st.sampled_from([np.float16, np.float32, np.float64]),
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=8),
        elements=st.sampled_from([0, 1, -2.5, 60000, np.nan]),
    ),
    missing=st.sets(st.integers(0, 7)),
)
@settings(deadline=None)
def test_missing_rows_are_those_all_nan(values, missing):
    values[[row for row in missing if row < len(values)]] = np.nan
    nan = np.isnan(values)
    before = values.copy()
    partly = np.flatnonzero(nan.any(axis=1) & ~nan.all(axis=1))
    if len(partly) or nan.all():
        words = f"row {partly[0]} is NaN" if len(partly) else f"all {len(values)} rows"
        with pytest.raises(InputError, match=f"image: {words}"):
            method_modality.check(values, "image")
    else:
        np.testing.assert_array_equal(method_modality.check(values, "image"), ~nan.any(axis=1))
    np.testing.assert_array_equal(values, before)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize(
    ("value", "words"), [(np.inf, "inf"), (-np.inf, "-inf"), (2e15, r"2e\+15.*rescale"), (-1e30, r"-1e\+30.*rescale")]
)
def test_values_out_of_range(dtype, value, words):
    if dtype is np.float16 and np.isfinite(value):
        return
    values = np.zeros((1000, 3000), dtype)  # several blocks
    values[10] = np.nan
    values[901, 2001] = value
    with pytest.raises(InputError, match=rf"image: row 901, column 2001 is {words}"):
        method_modality.check(values, "image")
    values[901, 2001] = np.nan
    with pytest.raises(InputError, match="image: row 901 is NaN in 1 of 3000 columns"):
        method_modality.check(values, "image")
    values[901] = np.finfo(dtype).max if dtype is np.float16 else 1e15
    assert method_modality.check(values, "image").sum() == 999


# Modalities.


def test_align_by_row_shares_memory_with_a_mapped_file(tmp_path, rng):
    values = sample(rng)
    values[3] = np.nan
    np.save(tmp_path / "f.npy", values)
    table = features.read("m", str(tmp_path / "f.npy"))
    modality = features.align(CPU, table, method_modality.check(table.values, "m"), None)
    assert np.shares_memory(modality.values, table.values)
    assert (modality.name, modality.n_present) == ("m", 6)
    np.testing.assert_array_equal(modality.present, np.arange(7) != 3)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_align_places_rows(rng, dtype):
    values = sample(rng, dtype, (5000, 3))
    values[4] = np.nan
    table = features.FeatureTable("m", "f", values, None)
    rows = rng.permutation(6000)[:5000]
    modality = features.align(CPU, table, features.align_mask(method_modality.check(values, "m"), rows, 6000), rows)
    assert modality.values.dtype == np.float32
    assert modality.values.flags.c_contiguous
    np.testing.assert_array_equal(modality.values[rows], values)
    has = np.isin(np.arange(6000), np.delete(rows, 4))
    np.testing.assert_array_equal(modality.present, has)
    assert modality.n_present == has.sum() == 4999
    assert not modality.values[~np.isin(np.arange(6000), rows)].any()


def test_align_says_how_much_memory_it_needs(monkeypatch):
    table = features.FeatureTable("m", "f.npy", np.ones((10, 4)), None)
    monkeypatch.setattr(memory, "available", lambda: memory.Free(100, "here"))
    for rows in (None, np.arange(10)):
        with pytest.raises(ResourceError, match=r"f\.npy: 160 bytes"):
            features.align(CPU, table, np.ones(10, bool), rows)


def test_read_rows(tmp_path, rng):
    values, path = sample(rng, shape=(3, 2)), tmp_path / "f.parquet"
    parquet(path, item=[4, 0, 2], x=lists(values))
    nan = [np.nan, np.nan]
    np.testing.assert_array_equal(features.read_rows("m", str(path), 5), [values[1], nan, values[2], nan, values[0]])
    with pytest.raises(InputError, match="row numbers"):
        features.read_rows("m", str(path), 4)


def test_from_numpy_without_a_copy(rng):
    values = sample(rng)
    modality = method_modality.from_array(CPU, "m", values)
    assert np.shares_memory(modality.values, values)
    assert modality.n_present == 7
    for other in (
        np.asfortranarray(values),
        values.astype(">f4"),
        values.astype(np.float64),
        values[::-1][::-1],
        bfloat16(values).view("V2"),
    ):
        modality = method_modality.from_array(CPU, "m", other)
        np.testing.assert_array_equal(modality.values, values)
        assert modality.values.flags.c_contiguous
        assert modality.values.dtype == np.float32
    packed = np.zeros(7, [("pad", "u1"), ("x", "f4", 5)])
    packed["x"] = values
    assert method_modality.from_array(CPU, "m", packed["x"]).values.flags.aligned


def test_from_torch(rng):
    torch = pytest.importorskip("torch")
    values = sample(rng)
    values[2] = np.nan
    tensor = torch.from_numpy(values)
    modality = method_modality.from_array(CPU, "m", tensor)
    assert np.shares_memory(modality.values, values)
    assert np.shares_memory(method_modality.from_array(CPU, "m", torch.nn.Parameter(tensor)).values, values)
    for other in (tensor.bfloat16(), tensor.half(), tensor.double(), tensor.T.contiguous().T):
        modality = method_modality.from_array(CPU, "m", other)
        np.testing.assert_array_equal(modality.values, values)
        assert modality.n_present == 6
    for wrong, words in [
        (torch.ones(3), "shape"),
        (torch.ones(2, 2).to_sparse(), "dense"),
        (torch.ones(2, 2).int(), "int32"),
    ]:
        with pytest.raises(InputError, match=rf"modality m: .*{words}"):
            method_modality.from_array(CPU, "m", wrong)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        ([[1.0, 2.0]], "found list"),
        (None, "found NoneType"),
        (pd.DataFrame({"x": [1.0]}), "found DataFrame"),
        (scipy.sparse.eye_array(3), "found dia_array"),
        (np.ma.masked_invalid([[1.0, np.nan]]), "found MaskedArray"),
        (np.ones((2, 2), int), "int64"),
        (np.ones(2), r"shape \(2,\)"),
        (np.full((2, 2), None), "Python objects"),
        (np.full((2, 2), np.inf), "inf"),
        (np.array([[1, np.nan]]), "row 0 is NaN in 1"),
    ],
)
def test_wrong_arrays_in_memory(array, words):
    with pytest.raises(InputError, match=rf"modality m: .*{words}"):
        method_modality.from_array(CPU, "m", array)


# Projection.


def modality_of(values):
    values = np.ascontiguousarray(values, np.float32)
    present = ~np.isnan(values[:, 0])
    return Modality("m", values, present, int(present.sum()))


def correlated(rng, rows=3000, width=20, missing=0.1):
    """Rows over more than one block, directions of very different lengths, a mean far from zero."""
    rotation = np.linalg.qr(rng.standard_normal((width, width)))[0]
    values = rng.standard_normal((rows, width)) * np.logspace(1, -2, width) @ rotation
    values += 5 * rng.standard_normal(width)
    values[rng.random(rows) < missing] = np.nan
    return modality_of(values)


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("dim", [1, 7, 20])
def test_projection_is_the_principal_components(rng, dim, whiten):
    modality = correlated(rng)
    projection = method_projection.fit_projection(CPU, modality, dim, whiten)
    projected = method_projection.project(CPU, modality, projection)
    X = modality.values[modality.present].astype(np.float64)
    _, singular, rotation = np.linalg.svd(X - X.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(projection.mean, X.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(projection.eigenvalues, singular[:dim] ** 2 / (len(X) - 1), rtol=1e-9)
    found = PCA(dim, whiten=whiten, svd_solver="full").fit(X)
    largest = found.components_[np.arange(dim), np.abs(found.components_).argmax(axis=1)]
    np.testing.assert_allclose(np.abs(found.components_), np.abs(rotation[:dim]), atol=1e-9)
    expected = found.transform(X) * np.sign(largest)
    np.testing.assert_allclose(projected.values[modality.present], expected, rtol=1e-6, atol=1e-6)
    assert (projection.components[np.abs(projection.components).argmax(axis=0), np.arange(dim)] > 0).all()
    assert projected.values.dtype == np.float32
    assert projected.values.flags.c_contiguous
    assert projected.n_present == modality.n_present
    assert not projected.values[~modality.present].any()
    np.testing.assert_array_equal(projected.present, modality.present)
    if whiten:
        np.testing.assert_allclose(projected.values[modality.present].astype(float).var(axis=0, ddof=1), 1, rtol=1e-6)


def test_directions_that_do_not_vary_bound_dim(rng):
    values = rng.standard_normal((50, 3)) @ rng.integers(-3, 4, (3, 8))  # rank 3
    modality = modality_of(np.round(values * 64) / 64)
    values = modality.values.copy()
    values[:, 3:] = values[:, :1]
    modality = modality_of(values)
    assert method_projection.fit_projection(CPU, modality, 3, True).components.shape == (8, 3)
    with pytest.raises(InputError, match="dim 4 is above the 3 independent directions of modality m"):
        method_projection.fit_projection(CPU, modality, 4, False)
    with pytest.raises(InputError, match="dim 9 is above the 8 dimensions of modality m"):
        method_projection.fit_projection(CPU, modality, 9, False)
    with pytest.raises(InputError, match="dim 5 is above the 1 independent"):
        method_projection.fit_projection(CPU, modality_of(values[:2]), 5, False)
    with pytest.raises(InputError, match="one item"):
        method_projection.fit_projection(CPU, modality_of(values[:1]), 1, False)
    with pytest.raises(InputError, match="the 0 independent"):
        method_projection.fit_projection(CPU, modality_of(np.full((7001, 4), 0.1)), 1, True)


def test_ties_in_the_largest_loading_take_the_first():
    modality = modality_of([[1, -1], [-1, 1], [2, -2], [-2, 2]])
    projection = method_projection.fit_projection(CPU, modality, 1, False)
    np.testing.assert_allclose(projection.components, [[np.sqrt(0.5)], [-np.sqrt(0.5)]])


def test_projection_gives_the_same_bytes_with_any_number_of_threads(tmp_path):
    code = (
        "import hashlib, sys; sys.path.insert(0, sys.argv[1])\n"
        "import numpy as np\n"
        "from gpu_init.method import projection\n"
        "from gpu_init.backend.cpu import CpuBackend\n"
        "from gpu_init.method.modality import Modality\n"
        "values = np.random.default_rng(0).standard_normal((5000, 200), np.float32)\n"
        "m, b = Modality('m', values, np.arange(5000) % 7 > 0, 4285), CpuBackend('')\n"
        "made = projection.project(b, m, projection.fit_projection(b, m, 100, True))\n"
        "print(hashlib.sha256(made.values).hexdigest())\n"
    )
    found = set()
    for threads in ("1", "2"):
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        command = [sys.executable, "-c", code, str(Path(__file__).parents[2])]
        found.add(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert len(found) == 1


@pytest.mark.skipif(not TIKTOK.exists(), reason="the TikTok data are not there")
@pytest.mark.parametrize("name", ["image", "audio"])
@pytest.mark.parametrize("whiten", [False, True])
def test_tiktok(name, whiten):
    table = features.read(name, str(TIKTOK / f"{name}_feat.npy"))
    modality = features.align(CPU, table, method_modality.check(table.values, name), None)
    found = method_projection.project(CPU, modality, method_projection.fit_projection(CPU, modality, 64, whiten)).values
    X = table.values.astype(np.float64)
    with CPU.deterministic():  # one thread: several can be far slower on a busy machine
        _, singular, rotation = np.linalg.svd(X - X.mean(axis=0), full_matrices=False)
    rotation = rotation[:64] * np.sign(rotation[np.arange(64), np.abs(rotation[:64]).argmax(axis=1)])[:, None]
    expected = (X - X.mean(axis=0)) @ rotation.T
    if whiten:
        expected /= singular[:64] / np.sqrt(len(X) - 1)
    error = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert error.max() < 2e-6
