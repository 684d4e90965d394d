"""The CUDA kernels and what launches them, without a device: compiled for two, and run on the CPU through `shim`."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

import gpu_init.backend
from gpu_init import kmeans
from gpu_init.errors import InputError, ResourceError
from gpu_init.kernels import Csr, cuda

from . import cuda_checks as checks
from . import shim
from .gpu.conftest import missing as no_device_because
from .nvrtc import Nvrtc, libraries

NAMES = [name for names in cuda.instances().values() for name in names]
ARCHITECTURES = (80, 90)


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    return shim.Shim(shim.build(tmp_path_factory.mktemp("shim"), NAMES), NAMES)


@pytest.fixture(scope="module")
def where(programs):
    return checks.Where(cuda.CudaKernels(shim.Poisoned(), None, programs), lambda array: array, lambda array: array)


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
        checks.check_aggregate(where, {**p, "features": placed}, np.float64)
    transposed = np.asfortranarray(p["features"])
    checks.check_blend(where, {**p, "features": transposed}, False)


def test_features_in_other_types_are_converted(where):
    p = checks.problem(3, [3, 0, 5], 8, 12)
    checks.check_blend(where, {**p, "features": p["plain"].astype(np.float64)}, False)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_the_result_may_lie_anywhere(where, dtype):
    p = checks.problem(4, [3, 0, 5, 200], 8, 12)
    expected = checks.blend(where, p, False, np.float16 if dtype == np.float16 else np.float32)
    for held in (np.empty(4 * 12 + 1, dtype)[1:].reshape(4, 12), np.empty((4, 12), dtype, order="F")):
        held[...] = np.nan
        one = {**{name: value for name, value in p.items() if name != "plain"}, "item_labels": None, "mean_scale": None}
        where.kernels.aggregate_blend(**one, out=held)
        np.testing.assert_allclose(held, expected, rtol=1e-3 if dtype == np.float16 else 1e-6)


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
    nothing = where.kernels.aggregate(
        p["csr"], np.empty((4, 0), np.float32), p["row_scale"], p["item_scale"], np.empty(0), np.float32
    )
    assert nothing.shape == (3, 0)


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
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("features", checks.FEATURE_TYPES)
def test_aggregate(where, some, width, dtype, features):
    checks.check_aggregate(where, some(width, features), dtype)


@pytest.mark.parametrize("width", [1, 12, 21, 260])
@pytest.mark.parametrize("features", checks.FEATURE_TYPES)
def test_squared_norms(where, some, width, features):
    checks.check_squared_norms(where, some(width, features))


def test_row_sums(where, some):
    checks.check_row_sums(where, some(1))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("width", [1, 31, 100])
def test_lengths(where, dtype, width):
    checks.check_lengths(where, dtype, width)


@pytest.mark.parametrize("clusters", [1, 2, 8, 33, 75, 256])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_assign(where, some, clusters, dtype):
    checks.check_assign(where, some(2), clusters, dtype)


@pytest.mark.parametrize("clusters", [1, 6, 40])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nearest_two(where, clusters, dtype):
    checks.check_nearest_two(where, dtype, clusters)


def test_nearest_where_nothing_is_near(where):
    products = np.array([[np.nan, np.nan, np.nan], [-np.inf, -np.inf, -np.inf], [np.nan, 1.0, np.nan]])
    labels, least, second = where.kernels.nearest_two(products, np.zeros(3))
    np.testing.assert_array_equal(labels, [0, 0, 1])
    np.testing.assert_array_equal(least, [np.inf, np.inf, -2.0])
    np.testing.assert_array_equal(second, [np.inf, np.inf, np.inf])


def test_what_is_noted_of_rows(where):
    checks.check_note(where)


def test_move_rows(where, some, monkeypatch):
    monkeypatch.setattr(cuda, "MOVED_BYTES", 8 * 21 * 5)
    checks.check_move_rows(where, some(21))


@pytest.mark.parametrize("clusters", [1, 4, 9])
def test_label_sums(where, some, clusters):
    checks.check_label_sums(where, some(2), clusters)


def test_label_sums_whatever_the_tiles(where):
    p = checks.problem(12, checks.random_degrees(np.random.default_rng(12), 300, longest=(2000, 256)), 50, 1)
    checks.check_label_sums(where, p, 5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_products(where, dtype, monkeypatch):
    checks.check_products(where, dtype)
    checks.check_products(where, dtype, points=cuda.MOST_POINTS + 1)
    monkeypatch.setattr(cuda, "PRODUCT_BYTES", 2000)
    checks.check_products(where, dtype)


@pytest.mark.parametrize("features", checks.FEATURE_TYPES)
@pytest.mark.parametrize(("width", "points"), [(1, 1), (128, 8), (130, 9), (1024, 20)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_products_with_few_points(where, features, width, points, dtype):
    checks.check_products(where, dtype, width, points, features)


@pytest.mark.parametrize("features", checks.FEATURE_TYPES)
@pytest.mark.parametrize(("rows", "width", "points"), [(7, 1, 1), (513, 128, 8), (1030, 130, 9), (600, 300, 20)])
def test_table_sums(where, features, rows, width, points, monkeypatch):
    checks.check_table_sums(where, rows, width, points, features)
    monkeypatch.setattr(cuda, "WORKSPACE_BYTES", 8 * rows * width)
    checks.check_table_sums(where, rows, width, points, features)
    assert where.kernels.table_sums(np.zeros((3, cuda.MOST_POINTS + 1)), np.zeros((3, 2), np.float32)) is None


@pytest.mark.parametrize("clusters", [1, 8, 1500])
def test_count(where, clusters):
    checks.check_count(where, clusters)


def test_products_of_bfloat16(where):
    typed, plain = checks.as_type(np.linspace(-3, 3, 12, dtype=np.float32).reshape(4, 3), "bfloat16")
    points = np.eye(3)
    np.testing.assert_array_equal(where.kernels.products(typed, np.zeros(3), points, np.float64), plain)


def test_batches_of_busy_users_change_nothing(where, monkeypatch):
    p = checks.problem(13, checks.random_degrees(np.random.default_rng(13), 40, longest=(65, 400, 257, 900)), 40, 20)
    whole = checks.blend(where, p, False)
    monkeypatch.setattr(cuda, "WORKSPACE_BYTES", 8 * 20 * 4)
    np.testing.assert_array_equal(checks.blend(where, p, False), whole)


def test_pointers_past_32_bits(where):
    """Entries before the first of the range do not exist here, only their numbers do."""
    p = checks.problem(14, [3, 130, 0, 5], 10, 8)
    start = 2**31 + 5
    shifted = p["csr"].indptr.astype(np.int64) + start
    base = {name: _before(array, start) for name, array in p["csr"]._asdict().items() if name != "indptr"}
    far = Csr(shifted, base["indices"], base["weights"])
    on = {name: value for name, value in p.items() if name not in ("plain", "item_labels", "mean_scale")}
    out = np.full((4, 8), np.nan, np.float32)
    where.kernels.aggregate_blend(**{**on, "csr": far}, item_labels=None, mean_scale=None, out=out)
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
    monkeypatch.setattr(gpu_init.backend, "cpu_kernels", lambda: where.kernels)
    found = gpu_init.initialize(matrix, {"text": features}, **settings)["text"]
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_allclose(found.centroids, expected.centroids, rtol=1e-6)
    np.testing.assert_allclose(found.users, expected.users, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["Tiled", "Factored"])
def test_kmeans_runs_on_them(where, form):
    rng = np.random.default_rng(17)
    csr = checks.random_rows(rng, rng.poisson(6, 900) + 1, 80, weighted=False)
    features = rng.standard_normal((80, 12)).astype(np.float32)
    arrays = (csr, features, 1.0 / np.diff(csr.indptr), np.ones(80))
    found = {}
    for name in ("numba", "cuda"):
        cpu = gpu_init.backend.select("cpu")
        if name == "cuda":
            cpu.kernels = where.kernels
        found[name] = kmeans.fit(cpu, getattr(kmeans, form)(cpu, *arrays), 4, seed=0)
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
        [sys.executable, "-m", "tests.shim.bounds", str(library)],
        check=False,
        cwd=shim.HERE.parents[1],
        env={**os.environ, "LD_PRELOAD": preloaded, "ASAN_OPTIONS": "detect_leaks=0"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "clean\n", done.stderr
    assert "heap-buffer-overflow" in done.stderr
    assert "load_words" in done.stderr


# What launches them.


@given(
    degrees=st.lists(st.one_of(st.integers(65, 5000), st.integers(65, 10**10)), min_size=1, max_size=20),
    most=st.integers(1, 5000),
)
@settings(max_examples=50, deadline=None)
def test_parts_hold_every_interaction_once(degrees, most):
    at = np.arange(len(degrees)) * 3
    seen = []
    for part in cuda.split(at, np.array(degrees), most):
        assert len(part.at) == 1 or len(part.owner) <= most
        for row, (first, last) in enumerate(zip(part.starts[:-1], part.starts[1:], strict=True)):
            degree = degrees[int(part.at[row]) // 3]
            assert 0 < last - first <= cuda.MOST_PARTS
            assert (part.owner[first:last] == part.at[row]).all()
            assert part.begin[first] == 0
            assert part.end[last - 1] == degree
            np.testing.assert_array_equal(part.begin[first + 1 : last], part.end[first : last - 1])
            assert (part.end[first:last] > part.begin[first:last]).all()
        seen += part.at.tolist()
    assert seen == at.tolist()


def test_the_split_of_a_user_depends_on_its_degree_alone():
    alone = next(cuda.split(np.array([0]), np.array([100_000]), 1000))
    [_, other] = [*cuda.split(np.array([0, 1]), np.array([200, 100_000]), 3)]
    np.testing.assert_array_equal(alone.begin, other.begin)
    np.testing.assert_array_equal(alone.end, other.end)


@pytest.mark.parametrize(
    ("kind", "width", "address", "step", "values"),
    [
        ("float", 128, 0, 512, 4),
        ("float", 128, 4, 512, 1),
        ("float", 128, 0, 516, 1),
        ("float", 126, 0, 504, 1),
        ("Half", 128, 0, 256, 8),
        ("Half", 100, 0, 200, 2),
        ("Half", 128, 2, 256, 1),
        ("Half", 99, 0, 198, 1),
        ("double", 8, 0, 64, 2),
        ("double", 8, 8, 64, 1),
    ],
)
def test_loads_are_as_wide_as_they_may_be(kind, width, address, step, values):
    assert cuda.load_width(kind, width, (address, step, {"float": 4, "Half": 2, "double": 8}[kind])) == values


@pytest.mark.parametrize(
    ("width", "values", "itemsize", "vectors", "groups"),
    [
        (128, 4, 4, 1, 1),
        (384, 4, 4, 3, 1),
        (768, 4, 4, 3, 1),
        (1024, 4, 4, 4, 1),
        (64, 4, 4, 1, 2),
        (8, 4, 4, 1, 16),
        (4, 4, 4, 1, 32),
        (100, 4, 4, 1, 1),
        (128, 8, 2, 1, 2),
        (384, 8, 2, 2, 1),
        (33, 1, 4, 4, 1),
        (1, 1, 4, 1, 32),
    ],
)
def test_lanes_share_rows(width, values, itemsize, vectors, groups):
    assert cuda.vectors_per_lane(width, values, itemsize) == vectors
    assert 2 ** cuda.groups_log2(width, values) == groups


def test_blocks():
    assert [cuda.blocks(warps) for warps in (0, 1, 4, 5, 2**33)] == [0, 1, 1, 2, 2**31]


def test_constants_are_those_of_the_sources():
    text = "".join(cuda.source(file) for file in cuda.instances())
    assert f"RUN = {cuda.LONGEST};" in text
    assert f"ROWS = {cuda.ROWS};" in text
    assert f"TILE = {cuda.TILE};" in text
    assert f"ITEMS = {cuda.ITEMS}," in text
    assert f"PER_THREAD = {cuda.COUNTED_PER_THREAD};" in text
    assert f"WARP = {cuda.WARP};" in text
    assert f"WARPS = {cuda.THREADS // cuda.WARP};" in text
    assert text.count("__launch_bounds__(WARPS * WARP") == text.count("__global__") - 2
    columns, rows = cuda._COMBINED
    assert f"COMBINED_COLUMNS = {columns}, COMBINED_ROWS = {rows};" in text
    assert text.count("__launch_bounds__(256)") == 2
    assert cuda._ADDING == columns * rows == 256


def test_every_kernel_is_among_those_that_are_compiled():
    """The shim has no others, so that a kernel which the launcher asks for and nobody compiles is an error above."""
    for file, names in cuda.instances().items():
        own = (shim.KERNELS / file).read_text(encoding="utf-8")
        kernels = set(re.findall(r"__global__ void __launch_bounds__\(.*\) (\w+)\(", own))
        assert kernels == {name.partition("<")[0] for name in names} == set(cuda._SOURCES[file])


def test_sources_are_one_text_with_their_lines_marked():
    text = cuda.source("clustering.cu")
    assert "#include" not in text
    lines = text.splitlines()
    [at] = [number for number, line in enumerate(lines) if line.startswith("constexpr int TILE")]
    mark = max(number for number, line in enumerate(lines[:at]) if line.startswith("#line"))
    number = int(lines[mark].split()[1]) + at - mark - 1
    own = (Path(cuda.__file__).parent / "clustering.cu").read_text(encoding="utf-8").splitlines()
    assert lines[mark].endswith('"clustering.cu"')
    assert own[number - 1] == lines[at]


# Compiling.


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("file", cuda.instances())
def test_nvrtc_compiles_every_kernel(file, architecture):
    if not libraries():
        pytest.skip("no NVRTC: pip install nvidia-cuda-nvrtc-cu12")
    options = (f"--gpu-architecture=sm_{architecture}", "--device-as-default-execution-space", "-ftz=true")
    for library in libraries():
        code = Nvrtc(library).compile(cuda.source(file), cuda.instances()[file], "--std=c++17", *options)
        assert code.startswith(b"\x7fELF")


@pytest.mark.parametrize("architecture", [pytest.param(ARCHITECTURES[0], marks=pytest.mark.slow), *ARCHITECTURES[1:]])
@pytest.mark.parametrize("file", cuda.instances())
def test_nvcc_compiles_every_kernel_into_registers(tmp_path, file, architecture):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    kernels = ", ".join(f"(void*)&{name}" for name in cuda.instances()[file])
    source = tmp_path / "kernels.cu"
    source.write_text(f'#include "{shim.KERNELS / file}"\nvoid* kernels[] = {{{kernels}}};\n')
    command = ["nvcc", "-std=c++17", "-ftz=true", "-cubin", "-Xptxas", "-v", f"-arch=sm_{architecture}"]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "kernels.cubin"), str(source)], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    frames = re.findall(r"(\d+) bytes stack frame", done.stderr)
    assert len(frames) == len(cuda.instances()[file])
    assert set(frames) == {"0"}, done.stderr


@pytest.mark.skipif(not libraries(), reason="no NVRTC: pip install nvidia-cuda-nvrtc-cu12")
def test_nvrtc_names_the_file_and_the_line_of_an_error():
    own = (shim.KERNELS / "gather.cuh").read_text(encoding="utf-8").splitlines()
    line = next(number for number, text in enumerate(own, 1) if "constexpr int RUN" in text)
    broken = re.sub(r"constexpr int RUN = \d+", "constexpr int RUN = nothing", cuda.source("clustering.cu"))
    with pytest.raises(ValueError, match="nothing") as caught:
        Nvrtc(libraries()[0]).compile(broken, [], "--std=c++17")
    assert cuda.compile_error(str(caught.value)).startswith(f"gather.cuh({line}): error")


def test_cupy_has_what_the_launcher_uses():
    cupy = pytest.importorskip("cupy", reason="cupy is not installed: pip install cupy-cuda12x")
    text = (shim.KERNELS / "cuda.py").read_text(encoding="utf-8")
    used = set(re.findall(r"\b_?xp\.([\w.]+)", text))
    assert {"empty", "flatnonzero", "searchsorted", "RawModule"} <= used
    assert not [name for name in used if not hasattr(cupy, name)]
    for parameter in ("code", "options", "name_expressions"):
        assert parameter in cupy.RawModule.__init__.__doc__ or parameter in cupy.RawModule.__doc__
    assert "side" in inspect.signature(cupy.searchsorted).parameters
    assert [*inspect.signature(cupy.ascontiguousarray).parameters][:2] == ["a", "dtype"]
    assert issubclass(cupy.cuda.compiler.CompileException, Exception)
    assert hasattr(cupy.cuda.Device, "compute_capability")
    assert hasattr(cupy.cuda.MemoryPointer, "ptr")
    assert all(
        hasattr(cupy.ndarray, name) for name in ("get", "data", "flags", "strides", "itemsize", "view", "astype")
    )
    assert hasattr(cupy.cuda.compiler, "_DiskKernelCacheBackend")  # makes its folder while cupy is imported
    error = cupy.cuda.compiler.CompileException("a.cu(1): error: x", "", "a.cu", ())
    assert cuda.compile_error(str(error)) == "a.cu(1): error: x"


class FakeCupy:
    """As much of cupy as `Programs` uses."""

    class CompileException(Exception):
        pass

    def __init__(self, error=None, capability="90"):
        self.error = error
        self.made = []
        self.cuda = types.SimpleNamespace(
            Device=lambda: types.SimpleNamespace(compute_capability=capability),
            compiler=types.SimpleNamespace(CompileException=self.CompileException),
        )

    def RawModule(self, *, code, options, name_expressions):
        self.made.append((code, options, name_expressions))

        def get_function(name):
            if self.error is not None:
                raise self.error
            return name

        return types.SimpleNamespace(get_function=get_function)


def test_a_kernel_is_compiled_once():
    cupy = FakeCupy()
    programs = cuda.Programs(cupy)
    assert programs("assign<float, 4>") == programs("assign<float, 4>") == "assign<float, 4>"
    [(code, options, names)] = cupy.made
    assert "assign(" in code
    assert names == ("assign<float, 4>",)
    assert options == ("--std=c++17",)


def test_an_error_of_the_compiler_names_file_and_line():
    log = 'warning: x\ngather.cuh(12): error: identifier "x" is undefined\n    x;\n1 error detected.\n'
    with pytest.raises(
        ResourceError, match=r'^gather.cuh\(12\): error: identifier "x" is undefined\n.*assign<float, 4>'
    ):
        cuda.Programs(FakeCupy(FakeCupy.CompileException(log)))("assign<float, 4>")
    assert cuda.compile_error("") == "NVRTC failed and did not say why"


def test_a_missing_compiler_is_named_with_what_installs_it():
    cupy = FakeCupy(RuntimeError('Failure finding "libnvrtc.so.13"'))
    with pytest.raises(InputError, match=r"libnvrtc.so.13.*\n.*pip install 'cupy-cuda12x\[ctk\]'"):
        cuda.Programs(cupy)("assign<float, 4>")
    with pytest.raises(RuntimeError, match="another"):
        cuda.Programs(FakeCupy(RuntimeError("another")))("assign<float, 4>")


def test_an_old_device_is_refused():
    with pytest.raises(InputError, match=r"6\.1.*7\.0"):
        cuda.Programs(FakeCupy(capability="61"))("assign<float, 4>")


def test_the_cache_is_where_it_can_be_written(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    for name in ("CUPY_CACHE_DIR", "CUPY_CACHE_IN_MEMORY", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")  # so that what is set below is taken back
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    environment = cuda.os.environ
    cuda.choose_cache_folder()
    assert environment["CUPY_CACHE_DIR"] == str(tmp_path / "home/.cupy/kernel_cache")
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "mine"))
    cuda.choose_cache_folder()
    assert environment["CUPY_CACHE_DIR"] == str(tmp_path / "mine")
    monkeypatch.setenv("CUPY_CACHE_DIR", str(blocked))
    monkeypatch.setenv("HOME", str(blocked))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cuda.choose_cache_folder()
    assert environment["CUPY_CACHE_DIR"] == str(tmp_path / "cache/gpu-init/cupy")
    monkeypatch.setenv("CUPY_CACHE_DIR", str(blocked))
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    cuda.choose_cache_folder()
    assert Path(environment["CUPY_CACHE_DIR"]).is_dir()
    assert "CUPY_CACHE_IN_MEMORY" not in environment
    monkeypatch.setenv("CUPY_CACHE_DIR", str(blocked))
    monkeypatch.setattr(cuda.tempfile, "mkdtemp", _nowhere)
    cuda.choose_cache_folder()
    assert environment["CUPY_CACHE_IN_MEMORY"] == "1"
    assert Path(environment["CUPY_CACHE_DIR"]).is_dir()


def _nowhere(**_):
    raise OSError("read-only")


def test_the_launcher_needs_no_library_but_numpy():
    code = (
        "import sys\nimport gpu_init.kernels.cuda\n"
        "print(sorted({'numba', 'scipy', 'pandas', 'cupy', 'pyarrow', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_benchmark_says_why_it_measures_nothing(tmp_path):
    if no_device_because() is None:
        pytest.skip("there is a device")
    command = [
        sys.executable,
        str(shim.HERE.parents[1] / "benchmarks" / "gpu.py"),
        "--quick",
        "--results",
        str(tmp_path),
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "nothing is measured: " in done.stdout
    assert len(done.stdout.splitlines()) == 1
    assert not [*tmp_path.iterdir()]
