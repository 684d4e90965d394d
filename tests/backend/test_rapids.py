"""What gpu-init uses of cupy, cudf, cuml and rmm is there, in the release that pyproject.toml names; no device needed.

The names and keywords are read from the source, so that the list cannot fall behind it.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIBRARIES = ("cupy", "cudf", "cuml", "rmm")
INPUTS = ("axes", "features", "interactions", "tables")
ON_DEVICE = ("backend/*.py", "method/*.py", *(f"inputs/{name}.py" for name in INPUTS), "ids.py", "where.py")
XP = {"xp", "_xp", "backend.xp", "self.xp", "self._xp", "self.backend.xp", "cupy"}
TABLES = {"self.tables", "backend.tables"}
# Keywords of methods of pyarrow, of RowNumbers and Codes, and of the labels in method/spectral.py, whose arrays and
# columns lie on the host with either backend.
HOST_ONLY = {"zero_copy_only", "types_mapper", "mode", "tzinfo", "initial"}


@pytest.fixture(scope="module")
def rapids():
    """The libraries by their names."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.import_module(name)
        except ImportError as error:
            pytest.skip(f"{name} cannot be imported ({error}): pip install 'gpu-init[cuda12]'")
    return found


def nodes(kind):
    for path in (path for pattern in ON_DEVICE for path in (ROOT / "gpu_init").glob(pattern)):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, kind):
                yield f"{path.name}:{node.lineno}", node


def dotted(node):
    """``a.b.c`` as a text, or nothing for what is no such chain."""
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return before and f"{before}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def owned(name):
    """Library and attributes that a dotted name of the source stands for, or nothing."""
    for prefixes, library in ((XP, "cupy"), (TABLES, "cudf"), ({"rmm"}, "rmm")):
        for prefix in prefixes:
            if name.startswith(f"{prefix}."):
                return library, name.removeprefix(f"{prefix}.")
    return None


def reach(module, chain):
    """What a chain of attributes leads to; submodules that nothing has imported yet are."""
    found = module
    for name in chain.split("."):
        if not hasattr(found, name) and inspect.ismodule(found):
            importlib.import_module(f"{found.__name__}.{name}")
        found = getattr(found, name)
    return found


def takes(function, keyword):
    """Whether a function has a parameter of this name; of compiled ones the first line of the docstring tells."""
    try:
        parameters = inspect.signature(function).parameters
    except (ValueError, TypeError):
        return keyword in (function.__doc__ or "").strip().partition("\n\n")[0] or keyword in (function.__doc__ or "")
    return keyword in parameters


def test_it_is_the_release_that_is_named(rapids):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    release = next(need for need in extras["cuda12"] if need.startswith("cudf")).partition("==")[2].rstrip(".*")
    for name in ("cudf", "cuml"):
        assert rapids[name].__version__.startswith(release)
    assert rapids["cupy"].__version__.startswith("14.")
    for extra, ending in (("cuda12", "12"), ("cuda13", "13")):
        names = [re.match(r"[\w-]+", need)[0] for need in extras[extra]]
        assert names == [f"cupy-cuda{ending}x", f"cudf-cu{ending}", f"cuml-cu{ending}"]
        assert "[ctk]" in extras[extra][0]


def test_every_attribute_is_there(rapids):
    used = {owned(dotted(node)) for _, node in nodes(ast.Attribute)} - {None}
    assert {
        ("cupy", "asnumpy"),
        ("cupy", "cuda.Stream"),
        ("cudf", "read_csv"),
        ("rmm", "mr.CudaMemoryResource"),
    } <= used
    absent = []
    for library, chain in used:
        try:
            reach(rapids[library], chain)
        except (AttributeError, ImportError):
            absent.append(f"{library}.{chain}")
    assert not absent


def test_every_import_is_there(rapids):
    imports = [*nodes(ast.ImportFrom), *nodes(ast.Import)]
    names = [
        (f"{node.module}.{one.name}" if isinstance(node, ast.ImportFrom) else one.name)
        for _, node in imports
        for one in node.names
        if isinstance(node, ast.Import) or not node.level
    ]
    ours = [name for name in names if name.partition(".")[0] in (*LIBRARIES, "cupyx")]
    assert {"cuml.cluster.KMeans", "cupyx.scipy.sparse", "rmm.allocators.cupy.rmm_cupy_allocator"} <= set(ours)
    for name in ours:
        reach(importlib.import_module(name.partition(".")[0]), name.partition(".")[2] or "__name__")


def test_every_keyword_is_there(rapids):
    """Of functions by their names; of methods by those of cupy's arrays and cudf's columns that share the name."""
    cupy, cudf = rapids["cupy"], rapids["cudf"]
    kmeans = importlib.import_module("cuml.cluster").KMeans
    looked, wrong = set(), []
    for place, call in nodes(ast.Call):
        if not call.keywords:
            continue
        name = dotted(call.func)
        if owned(name):
            candidates = [reach(rapids[owned(name)[0]], owned(name)[1])]
        elif name == "KMeans":
            candidates = [kmeans]
        elif isinstance(call.func, ast.Attribute):
            owners = (cupy.ndarray, cudf.Series, cudf.DataFrame)
            candidates = [getattr(owner, call.func.attr) for owner in owners if hasattr(owner, call.func.attr)]
        else:
            continue
        for keyword in call.keywords:
            looked.add((name, keyword.arg))
            known = keyword.arg in HOST_ONLY or any(takes(one, keyword.arg) for one in candidates)
            if candidates and not known:
                wrong.append(f"{place}: {ast.unparse(call)[:80]}: {keyword.arg}")
    assert {("KMeans", "random_state"), ("self.tables.read_parquet", "row_groups")} <= looked
    assert not wrong


def test_settings_of_the_library_are_all_given(rapids):
    """Every setting of cuML's K-means that shapes what it finds; its defaults have changed from release to release."""
    kmeans = importlib.import_module("cuml.cluster").KMeans
    [call] = [node for _, node in nodes(ast.Call) if dotted(node.func) == "KMeans"]
    given = {keyword.arg for keyword in call.keywords}
    others = {"self", "verbose", "oversampling_factor", "max_samples_per_batch", "device_buffer_samples", "init_size"}
    assert set(inspect.signature(kmeans.__init__).parameters) - others == given
    defaults = inspect.signature(kmeans.__init__).parameters
    assert (defaults["random_state"].default, defaults["init"].default) == (None, "scalable-k-means++")


def test_kmeans_names_its_start(rapids):
    source = Path(importlib.import_module("cuml.cluster").__file__).with_name("kmeans.pyx")
    if not source.exists():
        pytest.skip("this build of cuML brings no source")
    assert "'scalable-k-means++'" in source.read_text(encoding="utf-8")


def test_errors_for_want_of_memory_are_known(rapids):
    cupy = rapids["cupy"]
    assert issubclass(cupy.cuda.memory.OutOfMemoryError, MemoryError)
    assert issubclass(cupy.cuda.runtime.CUDARuntimeError, RuntimeError)
    from gpu_init.backend.cuda import _of_cuda

    assert _of_cuda(cupy.cuda.compiler.CompileException("x", "", "a.cu", ()))


def test_strings_have_a_name_that_ids_know(rapids):
    from cudf.utils.dtypes import DEFAULT_STRING_DTYPE

    from gpu_init.ids import is_text

    assert is_text(str(DEFAULT_STRING_DTYPE))


def test_without_a_device_one_is_told_what_is_missing(rapids):
    from gpu_init.backend.doctor import _driver_version, missing_for_cuda

    if _driver_version() is not None:
        pytest.skip("there is a driver")
    assert "no NVIDIA driver" in missing_for_cuda().what
    with pytest.raises(rapids["cupy"].cuda.runtime.CUDARuntimeError):
        rapids["cupy"].cuda.runtime.getDeviceCount()


def test_the_pool_counts(rapids):
    import rmm.mr

    counts = rmm.mr.StatisticsResourceAdaptor(rmm.mr.CudaMemoryResource()).allocation_counts
    assert (counts.current_bytes, counts.peak_bytes) == (0, 0)


def test_the_compiler_is_there(rapids):
    """The extra's ctk brings NVRTC."""
    major, _ = rapids["cupy"].cuda.nvrtc.getVersion()
    assert major in (12, 13)


def test_a_cluster_of_devices_takes_what_it_is_given():
    """`CudaBackend.local_cluster`: what it does not know itself goes to Dask's own."""
    dask_cuda = pytest.importorskip("dask_cuda", reason="pip install 'gpu-init[dask-cuda]'")
    distributed = importlib.import_module("distributed")
    options = inspect.signature(dask_cuda.LocalCUDACluster).parameters
    assert issubclass(dask_cuda.LocalCUDACluster, distributed.LocalCluster)
    assert options["kwargs"].kind is inspect.Parameter.VAR_KEYWORD
    assert {"dashboard_address", "silence_logs"} <= set(inspect.signature(distributed.LocalCluster).parameters)
