"""The CUDA kernels on a device: what `test_cuda_kernels` does on the host, and what only a device can show."""

from __future__ import annotations

import numpy as np
import pytest

from gpu_init.kernels import BlendTerms, Csr, ahead, cuda
from tests.support import cuda_checks as checks


@pytest.fixture(scope="module")
def where():
    cuda.choose_cache_folder()
    import cupy
    import cupyx.scipy.sparse

    def put(array):
        return cupy.asarray(array) if isinstance(array, np.ndarray) else array

    return checks.Where(cuda.CudaKernels(cupy, cupyx.scipy.sparse), put, lambda array: array.get())


def some(width, features="float32", weighted=True, wide=True, seed=0):
    """A problem with empty rows, rows that are just not split, just split, and split in many parts."""
    degrees = checks.random_degrees(np.random.default_rng(seed), 2000, 13.0, longest=(64, 65, 700, 600_000))
    return checks.problem(seed, degrees, 500, width, 8, weighted, features, wide, offset=3)


@pytest.mark.parametrize("width", [1, 3, 64, 100, 128, 384, 1024])
@pytest.mark.parametrize("features", checks.FEATURE_TYPES)
@pytest.mark.parametrize("by_item", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_blend_is_the_definition(where, width, features, by_item, dtype):
    degrees = checks.random_degrees(np.random.default_rng(width), 3000, 13.0, longest=(64, 65, 5000))
    p = checks.problem(width, degrees, 500, width, 8, width % 2 == 0, features, width % 3 == 0, offset=5)
    checks.check_blend(where, p, by_item, dtype)


@pytest.mark.parametrize("by_item", [False, True])
def test_blend_of_a_user_with_600_000_interactions(where, by_item):
    checks.check_blend(where, some(64), by_item)


def test_the_same_bytes_in_every_run(where):
    p = some(128)
    first = checks.blend(where, p, False)
    for _ in range(5):
        np.testing.assert_array_equal(checks.blend(where, p, False), first)
    on = where.put_all(p)
    labels = where.put(np.arange(2000, dtype=np.int32) % 8)
    found = []
    for _ in range(3):
        sums = where.put(np.zeros((500, 8)))
        where.kernels.label_sums(on["csr"], labels, on["row_scale"], on["item_scale"], sums)
        found.append(where.get(sums))
    np.testing.assert_array_equal(found[1], found[0])
    np.testing.assert_array_equal(found[2], found[0])


def test_kernels_compiled_ahead_of_time_give_the_same_bytes(where, tmp_path, monkeypatch):
    import cupy
    import cupyx.scipy.sparse

    monkeypatch.setenv("GPU_INIT_MACHINE_CODE", str(tmp_path))
    ahead.compile_cuda(cuda.ahead_folder(), [int(cupy.cuda.Device().compute_capability)])
    monkeypatch.setattr(cuda.Programs, "_compile", None)
    ready = where._replace(kernels=cuda.CudaKernels(cupy, cupyx.scipy.sparse))
    for by_item in (False, True):
        np.testing.assert_array_equal(checks.blend(ready, some(128), by_item), checks.blend(where, some(128), by_item))
    checks.check_assign(ready, some(2), 8)
    checks.check_label_sums(ready, some(2), 8)


@pytest.mark.parametrize("by_item", [False, True])
def test_a_range_of_users_gives_the_same_bytes_as_all(where, by_item):
    checks.check_bytes_of_a_range(where, some(100), by_item, slice(1, 1500))


def test_values_beyond_float16_are_infinite(where):
    checks.check_overflow(where)


def test_nobody_there(where):
    checks.check_no_users(where)


def test_a_very_busy_user_loses_no_digits(where):
    checks.check_busy_user(where, 600_000, 40)


@pytest.mark.parametrize("width", [1, 21, 128])
def test_aggregate(where, width):
    checks.check_aggregate(where, some(width))


@pytest.mark.parametrize("width", [1, 21, 128])
def test_squared_norms(where, width):
    checks.check_squared_norms(where, some(width))


@pytest.mark.parametrize("weighted", [False, True])
def test_row_sums(where, weighted):
    checks.check_row_sums(where, some(1, weighted=weighted))


@pytest.mark.parametrize("clusters", [1, 8, 33, 256])
def test_assign(where, clusters):
    checks.check_assign(where, some(2), clusters)


@pytest.mark.parametrize("clusters", [1, 6, 40])
def test_the_first_of_equal_scores_wins(where, clusters):
    checks.check_equal_scores(where, clusters)


@pytest.mark.parametrize("clusters", [1, 8])
def test_label_sums(where, clusters):
    checks.check_label_sums(where, some(2), clusters)


def test_gram(where):
    checks.check_gram(where, some(1))


@pytest.mark.parametrize("features", [*checks.FEATURE_TYPES, "float64"])
@pytest.mark.parametrize(("width", "points"), [(3, 8), (1024, 8), (128, 40)])
def test_products_and_sums_of_features(where, features, width, points):
    checks.check_products(where, width, points, features)
    checks.check_table_sums(where, 20_000, width, points, features)
    checks.check_lengths(where, features, width)


def test_products_and_sums_block_by_block(where, monkeypatch):
    monkeypatch.setattr(where.kernels, "block_values", 1000)
    checks.check_products(where)
    checks.check_table_sums(where, 210, 130, 9, "float32")
    checks.check_lengths(where, "float32", 130)
    checks.check_squared_norms(where, some(128))


@pytest.mark.parametrize("clusters", [3, 8, 64])
def test_sums_of_features_have_the_same_bytes_in_every_run(where, clusters):
    rng = np.random.default_rng(8)
    table, features = rng.random((200_000, clusters)), rng.standard_normal((200_000, 128)).astype(np.float32)
    arrays = where.put(table), where.put(features)
    first = where.get(where.kernels.table_sums(*arrays))
    for _ in range(5):
        np.testing.assert_array_equal(where.get(where.kernels.table_sums(*arrays)), first)


def device_memory(needed):
    import cupy

    cupy.get_default_memory_pool().free_all_blocks()
    free, _ = cupy.cuda.runtime.memGetInfo()
    if free < needed:
        pytest.skip(f"{needed / 1e9:.0f} GB of device memory are needed, {free / 1e9:.0f} GB are free")


def test_interactions_past_2_31(where):
    import cupy

    device_memory(12 << 30)
    p = checks.problem(1, [3, 64, 0, 300], 50, 128, weighted=False)
    start = 2**31 + 5
    indices = cupy.zeros(start + len(p["csr"].indices), cupy.int32)
    indices[start:] = cupy.asarray(p["csr"].indices)
    on = where.put_all({name: value for name, value in p.items() if name != "plain"})
    far = Csr(cupy.asarray(p["csr"].indptr + start), indices, None)
    out = cupy.full((4, 128), cupy.nan, cupy.float32)
    checks.call_blend(where.kernels, {**on, "csr": far, "item_labels": None, "mean_scale": None}, out)
    np.testing.assert_array_equal(out.get(), checks.blend(where, p, False))


def test_values_past_2_31(where):
    """User u has item n - 1 - u alone, whose features all are a number of its own."""
    import cupy

    device_memory(12 << 30)
    width = 256
    n = 2**31 // width + 9
    numbers = cupy.arange(n) % 1009
    features = cupy.empty((n, width), cupy.float16)
    features[...] = numbers[:, None]
    csr = Csr(cupy.arange(n + 1), cupy.arange(n - 1, -1, -1, dtype=cupy.int32), None)
    one = cupy.ones(n)
    out = cupy.empty((n, width), cupy.float16)
    nothing = (cupy.zeros((1, width), cupy.float32), cupy.zeros(n, cupy.int32), None, None, cupy.zeros(width))
    where.kernels.aggregate_blend(csr, features, one, one, BlendTerms(one, *nothing, 1.0), out)
    assert bool((out == numbers[::-1, None].astype(cupy.float16)).all())
