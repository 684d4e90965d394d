"""How CUDA kernels are launched and compiled."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_init.errors import InputError, ResourceError
from gpu_init.kernels import ahead, cuda
from tests.gpu.conftest import missing as no_device_because
from tests.kernels.test_cuda_kernels import ARCHITECTURES
from tests.support import shim
from tests.support.nvrtc import Nvrtc, libraries

# What launches them.


@given(
    degrees=st.lists(st.one_of(st.integers(65, 5000), st.integers(65, 10**7)), min_size=1, max_size=20),
    most=st.integers(1, 5000),
)
@settings(max_examples=50, deadline=None)
def test_parts_hold_every_interaction_once(degrees, most):
    rows = np.arange(len(degrees)) * 3
    seen = []
    for at, starts, owner in cuda.split(rows, np.array(degrees), most):
        assert len(at) == 1 or len(owner) <= most
        assert starts[0] == 0
        assert starts[-1] == len(owner)
        of_rows = np.array(degrees)[at // 3]
        np.testing.assert_array_equal(np.bincount(owner), np.diff(starts))
        assert (np.diff(owner) >= 0).all()
        assert (np.diff(starts) * cuda.PART >= of_rows).all()
        assert ((np.diff(starts) - 1) * cuda.PART < of_rows).all()
        seen += at.tolist()
    assert seen == rows.tolist()


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
    assert f" PART = {cuda.PART};" in text
    assert f"WARP = {cuda.WARP};" in text
    assert f"WARPS = {cuda.THREADS // cuda.WARP};" in text
    assert text.count("__launch_bounds__(WARPS * WARP") == text.count("__global__") - 1
    columns, rows = cuda._COMBINED
    assert f"COMBINED_COLUMNS = {columns}, COMBINED_ROWS = {rows};" in text
    assert text.count("__launch_bounds__(256)") == 1
    assert columns * rows == 256


def test_every_kernel_is_among_those_that_are_compiled():
    """The shim has no others, so that a kernel which the launcher asks for and nobody compiles is an error above."""
    for file, names in cuda.instances().items():
        own = (shim.KERNELS / file).read_text(encoding="utf-8")
        kernels = set(re.findall(r"__global__ void __launch_bounds__\(.*\) (\w+)\(", own))
        assert kernels == {name.partition("<")[0] for name in names}


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
def test_nvrtc_compiles_every_kernel(tmp_path, architecture):
    if not libraries():
        pytest.skip("no NVRTC: pip install nvidia-cuda-nvrtc-cu12")
    for library in libraries():
        written = ahead.compile_cuda(tmp_path, [architecture], Nvrtc(library))
        assert [path.relative_to(tmp_path) for path in written] == [
            Path(f"sm_{architecture}", file).with_suffix(".cubin") for file in cuda.instances()
        ]
        for path, (file, names) in zip(written, cuda.instances().items(), strict=True):
            code, facts = path.read_bytes(), json.loads(path.with_suffix(".json").read_text())
            assert code.startswith(b"\x7fELF")
            assert facts["source"] == cuda.fingerprint(file)
            assert [*facts["names"]] == names
            assert all(f"\0.text.{lowered}\0".encode() in code for lowered in facts["names"].values())


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
    with pytest.raises(ResourceError, match=rf"^gather.cuh\({line}\): error.*nothing"):
        ahead.compile_text(Nvrtc(libraries()[0]), broken, [], ARCHITECTURES[0])


def test_cupy_has_what_the_launcher_uses():
    cupy = pytest.importorskip("cupy", reason="cupy is not installed: pip install cupy-cuda12x")
    text = (shim.KERNELS / "cuda.py").read_text(encoding="utf-8")
    used = set(re.findall(r"\b_?xp\.(\w+)", text))
    assert {"empty", "multiply", "searchsorted", "RawModule"} <= used
    assert not [name for name in used if not hasattr(cupy, name)]
    text = (shim.KERNELS / "ahead.py").read_text(encoding="utf-8")
    used = set(re.findall(r"\bnvrtc\.(\w+)\(", text)) | {"NVRTCError"}
    assert {"getSupportedArchs", "compileProgram", "getCUBIN"} <= used
    assert not [name for name in used if not hasattr(cupy.cuda.nvrtc, name)]
    assert issubclass(cupy.cuda.driver.CUDADriverError, RuntimeError)
    for parameter in ("code", "path", "options", "name_expressions"):
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

    def __init__(self, error=None, capability="90", refused=None):
        self.error = error
        self.refused = refused
        self.made = []
        self.cuda = types.SimpleNamespace(
            Device=lambda: types.SimpleNamespace(compute_capability=capability),
            compiler=types.SimpleNamespace(CompileException=self.CompileException),
        )

    def RawModule(self, *, code=None, path=None, options=(), name_expressions=None):
        self.made.append(path or (code, options, name_expressions))
        error = self.error if path is None else self.refused

        def get_function(name):
            if error is not None:
                raise error
            return name

        return types.SimpleNamespace(get_function=get_function)


class FakeNvrtc:
    """As much of ``cupy.cuda.nvrtc`` as `compile_cuda` uses; what it compiles is the options and the names."""

    class NVRTCError(RuntimeError):
        pass

    def __init__(self, known=(80, 90), broken=False):
        self.known = known
        self.broken = broken
        self.programs = []

    def getSupportedArchs(self):
        return self.known

    def createProgram(self, source, name, headers, include_names):
        assert "__global__" in source
        self.programs.append({"names": []})
        return self.programs[-1]

    def addNameExpression(self, program, name):
        program["names"].append(name)

    def compileProgram(self, program, options):
        program["options"] = options
        if self.broken:
            raise self.NVRTCError

    def getCUBIN(self, program):
        return repr(program).encode()

    def getLoweredName(self, program, name):
        return f"lowered {name}"

    def getProgramLog(self, program):
        return "gather.cuh(12): error: x"

    def destroyProgram(self, program):
        self.programs.remove(program)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where kernels compiled ahead of time are looked for; there are none."""
    monkeypatch.setenv("GPU_INIT_MACHINE_CODE", str(tmp_path))
    return tmp_path / "cuda"


def test_a_kernel_is_compiled_once():
    cupy = FakeCupy()
    programs = cuda.Programs(cupy)
    assert programs("assign<double, 2>") == programs("assign<double, 2>") == "assign<double, 2>"
    [(code, options, names)] = cupy.made
    assert "assign(" in code
    assert names == ("assign<double, 2>",)
    assert options == ("--std=c++17",)


def test_kernels_are_compiled_ahead_of_time(folder):
    nvrtc = FakeNvrtc()
    written = ahead.compile_cuda(folder, nvrtc=nvrtc)
    assert written == [
        folder / f"sm_{one}" / f"{file}.cubin" for one in (80, 90) for file in ("aggregate_blend", "clustering")
    ]
    assert sorted(folder.rglob("*.*")) == sorted([*written, *(path.with_suffix(".json") for path in written)])
    assert "-arch=sm_90" in written[-1].read_text()
    assert nvrtc.programs == []
    ahead.compile_cuda(folder, nvrtc=nvrtc)
    for capability in (80, 90):
        cupy = FakeCupy(capability=str(capability))
        assert cuda.Programs(cupy)("assign<double, 2>") == "lowered assign<double, 2>"
        assert cuda.Programs(cupy)("busy_rows") == "lowered busy_rows"
        assert cupy.made == [
            str(folder / f"sm_{capability}" / f"{file}.cubin") for file in ("clustering", "aggregate_blend")
        ]


def _without_a_name(facts):
    facts = json.loads(facts)
    del facts["names"]["assign<double, 2>"]
    return json.dumps(facts).encode()


@pytest.mark.parametrize(
    "change",
    [
        {"sm_90/clustering.json": lambda facts: facts[:-9]},
        {"sm_90/clustering.json": lambda _: b"[]"},
        {"sm_90/clustering.json": lambda _: b"{}"},
        {"sm_90/clustering.json": lambda _: b"\xff"},
        {"sm_90/clustering.json": _without_a_name},
        {"sm_90/clustering.json": lambda facts: facts.replace(cuda.fingerprint("clustering.cu").encode(), b"another")},
        {"sm_90/clustering.cubin": lambda code: code[:-1]},
        {"sm_90/clustering.cubin": None},
        {"sm_90/clustering.json": None},
    ],
)
def test_machine_code_that_cannot_be_used_is_compiled_anew(folder, change):
    ahead.compile_cuda(folder, nvrtc=FakeNvrtc())
    [(path, make)] = change.items()
    if make is None:
        (folder / path).unlink()
    else:
        (folder / path).write_bytes(make((folder / path).read_bytes()))
    assert cuda.Programs(FakeCupy())("assign<double, 2>") == "assign<double, 2>"
    assert cuda.Programs(FakeCupy())("busy_rows") == "lowered busy_rows"


def test_machine_code_is_used_where_it_fits_alone(folder, monkeypatch):
    ahead.compile_cuda(folder, nvrtc=FakeNvrtc())
    assert cuda.Programs(FakeCupy(capability="86"))("busy_rows") == "busy_rows"
    assert cuda.Programs(FakeCupy(refused=RuntimeError("CUDA_ERROR_INVALID_IMAGE")))("busy_rows") == "busy_rows"
    monkeypatch.setattr(cuda, "OPTIONS", ("--std=c++20",))
    assert cuda.Programs(FakeCupy())("busy_rows") == "busy_rows"


def test_what_keeps_kernels_from_being_compiled_ahead_of_time(folder):
    with pytest.raises(InputError, match=r"none of the architectures.*\[50, 52\]"):
        ahead.compile_cuda(folder, nvrtc=FakeNvrtc(known=(52, 50)))
    with pytest.raises(ResourceError, match=r"^gather.cuh\(12\): error: x\n.*sm_80"):
        ahead.compile_cuda(folder, [80], FakeNvrtc(broken=True))
    nvrtc = FakeNvrtc()
    nvrtc.getSupportedArchs = lambda: _raise(RuntimeError("CuPy failed to load libnvrtc.so.12"))
    with pytest.raises(InputError, match=r"libnvrtc.so.12.*\n.*pip install"):
        ahead.compile_cuda(folder, nvrtc=nvrtc)
    folder.write_text("not a folder")
    with pytest.raises(ResourceError, match=re.escape(str(folder))):
        ahead.compile_cuda(folder, nvrtc=FakeNvrtc())


def test_the_folder_of_machine_code(folder, monkeypatch):
    assert cuda.ahead_folder() == folder
    monkeypatch.setenv("GPU_INIT_MACHINE_CODE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cuda.ahead_folder() == Path("/cache/gpu-init/cuda")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cuda.ahead_folder() == Path("/home/someone/.cache/gpu-init/cuda")


def test_an_error_of_the_compiler_names_file_and_line():
    log = 'warning: x\ngather.cuh(12): error: identifier "x" is undefined\n    x;\n1 error detected.\n'
    with pytest.raises(
        ResourceError, match=r'^gather.cuh\(12\): error: identifier "x" is undefined\n.*assign<double, 2>'
    ):
        cuda.Programs(FakeCupy(FakeCupy.CompileException(log)))("assign<double, 2>")
    assert cuda.compile_error("") == "NVRTC failed and did not say why"


def test_a_missing_compiler_is_named_with_what_installs_it():
    cupy = FakeCupy(RuntimeError('Failure finding "libnvrtc.so.13"'))
    with pytest.raises(InputError, match=r"libnvrtc.so.13.*\n.*pip install 'cupy-cuda12x\[ctk\]'"):
        cuda.Programs(cupy)("assign<double, 2>")
    with pytest.raises(RuntimeError, match="another"):
        cuda.Programs(FakeCupy(RuntimeError("another")))("assign<double, 2>")


def _raise(error):
    raise error


def test_an_old_device_is_refused():
    with pytest.raises(InputError, match=r"6\.1.*7\.0"):
        cuda.Programs(FakeCupy(capability="61"))("assign<double, 2>")


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
    assert environment["CUPY_CACHE_IN_MEMORY"] == "1"
    assert Path(environment["CUPY_CACHE_DIR"]).is_dir()


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
        str(shim.HERE.parents[2] / "benchmarks" / "gpu.py"),
        "--quick",
        "--results",
        str(tmp_path),
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "nothing is measured: " in done.stdout
    assert len(done.stdout.splitlines()) == 1
    assert not [*tmp_path.iterdir()]
