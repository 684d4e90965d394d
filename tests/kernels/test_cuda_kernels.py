"""CUDA kernels on the host, against their references."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

import gpu_init
from gpu_init.backend import cpu as backend_cpu
from gpu_init.backend.select import select
from gpu_init.kernels import Csr, cuda
from gpu_init.kernels.reference import ReferenceKernels
from gpu_init.method import kmeans, points
from tests.support import cuda_checks as checks
from tests.support import shim

NAMES = [name for names in cuda.instances().values() for name in names]
ARCHITECTURES = (80, 90)


@given(
    seed=st.integers(0, 2**32),
    users=st.integers(1, 12),
    items=st.integers(1, 30),
    width=st.sampled_from([1, 2, 3, 8, 12, 64, 100, 130, 384]),
    clusters=st.integers(1, 9),
    features=st.sampled_from(checks.FEATURE_TYPES),
    dtype=st.sampled_from([np.float32, np.float16]),
    longest=st.sampled_from([(), (64,), (65, 64), (257, 256), (700,)]),
    offset=st.sampled_from([0, 7]),
    weighted=st.booleans(),
    wide=st.booleans(),
    by_item=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_blend_is_the_definition(
    where, seed, users, items, width, clusters, features, dtype, longest, offset, weighted, wide, by_item
):
    degrees = checks.random_degrees(np.random.default_rng(seed), users, longest=longest)
    p = checks.problem(seed, degrees, items, width, clusters, weighted, features, wide, offset)
    checks.check_blend(where, p, by_item, dtype)


@pytest.mark.parametrize("features", checks.FEATURE_TYPES)
@pytest.mark.parametrize("width", [33, 128, 136, 256, 384, 512, 516, 768, 1024, 4096, 4099])
@pytest.mark.parametrize("by_item", [False, True])
def test_blend_of_wide_rows(where, width, features, by_item):
    degrees = checks.random_degrees(np.random.default_rng(width), 4, longest=(150,))
    checks.check_blend(where, checks.problem(1, degrees, 9, width, features=features), by_item)


@pytest.mark.parametrize("features", checks.FEATURE_TYPES)
@pytest.mark.parametrize("width", [8, 64, 100])
@pytest.mark.parametrize("shift", [1, 2])
def test_features_may_lie_anywhere(where, width, features, shift):
    p = checks.problem(
        2, checks.random_degrees(np.random.default_rng(2), 20, longest=(200,)), 30, width, features=features
    )
    for apart in (0, 3):  # the latter is a slice of a wider table
        held = np.empty(30 * (width + apart) + shift, p["features"].dtype)
        placed = held[shift:].reshape(30, width + apart)[:, :width]
        placed[...] = p["features"]
        checks.check_blend(where, {**p, "features": placed}, True)
        checks.check_aggregate(where, {**p, "features": placed})
    transposed = np.asfortranarray(p["features"])
    checks.check_blend(where, {**p, "features": transposed}, False)


def test_features_in_other_types_are_converted(where):
    p = checks.problem(3, [3, 0, 5], 8, 12)
    checks.check_blend(where, {**p, "features": p["plain"].astype(np.float64)}, False)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_result_may_lie_anywhere(where, dtype):
    p = checks.problem(4, [3, 0, 5, 200], 8, 12)
    held = np.full(4 * 12 + 1, np.nan, dtype)[1:].reshape(4, 12)
    checks.call_blend(where.kernels, {**p, "item_labels": None, "mean_scale": None}, held)
    np.testing.assert_allclose(held, checks.blend(where, p, False, dtype), rtol=1e-3 if dtype == np.float16 else 1e-6)


@pytest.mark.parametrize("by_item", [False, True])
def test_a_range_of_users_gives_the_same_bytes_as_all(where, by_item):
    p = checks.problem(5, checks.random_degrees(np.random.default_rng(5), 60, longest=(65, 300)), 40, 20)
    checks.check_bytes_of_a_range(where, p, by_item, slice(1, 33))


def test_values_beyond_float16_are_infinite(where):
    checks.check_overflow(where)


def test_nobody_there(where):
    checks.check_no_users(where)
    p = checks.problem(6, [0, 0, 0], 4, 8)
    checks.check_blend(where, p, False)
    checks.check_blend(where, p, True)
    checks.check_squared_norms(where, p)
    checks.check_assign(where, p, 3)
    checks.check_label_sums(where, p, 3)


@pytest.mark.parametrize("width", [1, 4, 40])
def test_a_very_busy_user_loses_no_digits(where, width):
    checks.check_busy_user(where, 60_000, width)


PROBLEMS = {
    "light": ([3, 0, 64, 1, 7, 2], True, True),
    "busy": ([3, 65, 0, 600, 1], False, True),
    "narrow pointers": ([257, 5, 0, 64], True, False),
}


@pytest.fixture(params=PROBLEMS)
def some(request):
    degrees, weighted, wide = PROBLEMS[request.param]

    def make(width, features="float32"):
        return checks.problem(11, np.array(degrees * 3), 20, width, 4, weighted, features, wide, offset=3)

    return make


@pytest.mark.parametrize("width", [1, 12, 21, 130])
@pytest.mark.parametrize("features", [*checks.FEATURE_TYPES, "float64"])
def test_aggregate(where, some, width, features):
    checks.check_aggregate(where, some(width, features))


@pytest.mark.parametrize("width", [1, 12, 21, 260])
@pytest.mark.parametrize("features", checks.FEATURE_TYPES)
def test_squared_norms(where, some, width, features):
    checks.check_squared_norms(where, some(width, features))


def test_row_sums(where, some):
    checks.check_row_sums(where, some(1))


@pytest.mark.parametrize("clusters", [1, 2, 8, 33, 75, 256])
def test_assign(where, some, clusters):
    checks.check_assign(where, some(2), clusters)


@pytest.mark.parametrize("clusters", [1, 6, 40])
def test_the_first_of_equal_scores_wins(where, clusters):
    checks.check_equal_scores(where, clusters)


def test_a_label_names_a_centroid_even_where_no_score_is_a_number(where):
    csr, one = Csr(np.arange(4), np.arange(3, dtype=np.int32), None), np.ones(3)
    table = np.array([[np.nan, np.nan, np.nan], [-np.inf, -np.inf, -np.inf], [np.nan, 1.0, np.nan]])
    labels, least = where.kernels.assign(csr, table, one, one, np.zeros(3))
    np.testing.assert_array_equal(labels, [0, 0, 1])
    np.testing.assert_array_equal(least, [np.inf, np.inf, -2.0])


@pytest.mark.parametrize("clusters", [1, 4, 9])
def test_label_sums(where, some, clusters):
    checks.check_label_sums(where, some(2), clusters)


def test_label_sums_whatever_the_tiles(where):
    p = checks.problem(12, checks.random_degrees(np.random.default_rng(12), 300, longest=(2000, 256)), 50, 1)
    checks.check_label_sums(where, p, 5)


def test_gram(where, some):
    checks.check_gram(where, some(1))


@pytest.mark.parametrize("features", [*checks.FEATURE_TYPES, "float64"])
@pytest.mark.parametrize("width", [1, 130])
def test_products_and_sums_of_features_block_by_block(where, features, width, monkeypatch):
    for values in (where.kernels.block_values, 50 * width):
        monkeypatch.setattr(where.kernels, "block_values", values)
        checks.check_products(where, width, 9, features)
        checks.check_table_sums(where, 210, width, 9, features)
        checks.check_lengths(where, features, width)


def test_batches_of_busy_users_change_nothing(where, monkeypatch):
    p = checks.problem(13, checks.random_degrees(np.random.default_rng(13), 40, longest=(65, 400, 257, 900)), 40, 20)
    whole = checks.blend(where, p, False)
    monkeypatch.setattr(cuda, "WORKSPACE_BYTES", 8 * 20 * 4)
    monkeypatch.setattr(where.kernels, "block_values", 20 * 7)
    np.testing.assert_array_equal(checks.blend(where, p, False), whole)
    checks.check_aggregate(where, p)
    checks.check_squared_norms(where, p)
    checks.check_assign(where, p, 20)


def test_pointers_past_32_bits(where):
    """Entries before the first of the range do not exist here, only their numbers do."""
    p = checks.problem(14, [3, 130, 0, 5], 10, 8)
    start = 2**31 + 5
    shifted = p["csr"].indptr.astype(np.int64) + start
    base = {name: _before(array, start) for name, array in p["csr"]._asdict().items() if name != "indptr"}
    far = Csr(shifted, base["indices"], base["weights"])
    out = np.full((4, 8), np.nan, np.float32)
    checks.call_blend(where.kernels, {**p, "csr": far, "item_labels": None, "mean_scale": None}, out)
    np.testing.assert_array_equal(out, checks.blend(where, p, False))


def _before(array, count):
    """An array whose entry ``count`` is the first of the one given; what comes before is never read."""
    start = array.ctypes.data - count * array.itemsize
    return np.ctypeslib.as_array((np.ctypeslib.as_ctypes_type(array.dtype) * (count + len(array))).from_address(start))


@pytest.mark.parametrize("cluster_on", ["users", "items"])
def test_the_whole_method_runs_on_them(where, monkeypatch, cluster_on):
    csr = checks.random_rows(
        np.random.default_rng(15), checks.random_degrees(np.random.default_rng(15), 400, longest=(90,)), 60, True
    )
    matrix = scipy.sparse.csr_matrix((csr.weights[:-3], csr.indices[:-3], csr.indptr), shape=(400, 60))
    features = np.random.default_rng(16).standard_normal((60, 12)).astype(np.float32)
    features[::7] = np.nan
    settings = {"clusters": 3, "cluster_on": cluster_on, "scale": "items", "weighting": "sym", "backend": "cpu"}
    expected = gpu_init.initialize(matrix, {"text": features}, **settings)["text"]
    monkeypatch.setattr(backend_cpu, "cpu_kernels", lambda *_: where.kernels)
    found = gpu_init.initialize(matrix, {"text": features}, **settings)["text"]
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_allclose(found.centroids, expected.centroids, rtol=1e-6)
    np.testing.assert_allclose(found.users, expected.users, rtol=1e-5, atol=1e-6)


def test_iterations_of_lloyd_agree_with_the_reference(where):
    p = checks.problem(18, checks.random_degrees(np.random.default_rng(18), 400, longest=(90, 300)), 60, 12)
    arrays = (p["csr"], p["row_scale"], p["item_scale"])
    found = {}
    for kernels in (where.kernels, ReferenceKernels(np, scipy.sparse)):
        centroids = p["centroids"].astype(np.float64)
        for _ in range(3):
            table = kernels.products(p["features"], np.zeros(12), centroids)
            lengths = kernels.lengths(centroids)
            labels, least = kernels.assign(arrays[0], table, *arrays[1:], lengths)
            sums = np.zeros(table.shape)
            kernels.label_sums(arrays[0], labels, *arrays[1:], sums)
            sizes = np.bincount(labels[labels >= 0], minlength=len(centroids))
            centroids = kernels.table_sums(sums, p["features"]) / np.maximum(sizes, 1)[:, None]
        found[kernels.name] = labels, least, centroids
    np.testing.assert_array_equal(found["cuda"][0], found["numpy"][0])
    np.testing.assert_allclose(found["cuda"][1], found["numpy"][1], rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(found["cuda"][2], found["numpy"][2], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", ["Tiled", "Factored"])
def test_kmeans_runs_on_them(where, form):
    rng = np.random.default_rng(17)
    csr = checks.random_rows(rng, rng.poisson(6, 900) + 1, 80, weighted=False)
    features = rng.standard_normal((80, 12)).astype(np.float32)
    arrays = (csr, features, 1.0 / np.diff(csr.indptr), np.ones(80))
    found = {}
    for name in ("numba", "cuda"):
        cpu = select("cpu")
        if name == "cuda":
            cpu.kernels = where.kernels
        found[name] = kmeans.fit(cpu, getattr(points, form)(cpu, *arrays), 4, seed=0)
    np.testing.assert_array_equal(found["cuda"].labels, found["numba"].labels)
    np.testing.assert_allclose(found["cuda"].centroids, found["numba"].centroids, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_nothing_is_read_or_written_out_of_bounds(tmp_path):
    sanitize = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
    library = shim.build(tmp_path, NAMES, *sanitize)
    command = ["g++", "-print-file-name=libasan.so"]
    preloaded = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.shim.bounds", str(library)],
        check=False,
        cwd=shim.HERE.parents[2],
        env={**os.environ, "LD_PRELOAD": preloaded, "ASAN_OPTIONS": "detect_leaks=0"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "clean\n", done.stderr
    assert "heap-buffer-overflow" in done.stderr
    assert "load_words" in done.stderr
