"""The CUDA kernels built for the host: `kernels/*.cu` as they are, with `cuda.h` for what CUDA supplies.

`Shim` stands in for `gpu_init.kernels.cuda.Programs`, and `Poisoned` for cupy, so that the launcher runs too.
"""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import numpy as np

from gpu_init.kernels import cuda

HERE = Path(__file__).parent
KERNELS = HERE.parents[2] / "kernels"
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-U_FORTIFY_SOURCE", "-ffp-contract=off")

_DRIVER = """
extern "C" const char* launch_{number}(
    unsigned grid, unsigned x, unsigned y, void** arguments, const char** kinds, int count)
{{
    return shim::launch(&{name}, grid, x, y, arguments, kinds, count);
}}
"""


def driver(names):
    """C++ that holds the kernels of these names, each behind a function that Python can call."""
    includes = [f'#include "{KERNELS / file}"\n' for file in cuda.instances()]
    calls = [_DRIVER.format(number=number, name=name) for number, name in enumerate(names)]
    return "".join(['#include "cuda.h"\n', *includes, *calls])


def build(folder, names, *flags):
    """Build the kernels of these names; give the library's path."""
    source, library = folder / "driver.cpp", folder / "kernels.so"
    source.write_text(driver(names))
    command = ["g++", *FLAGS, *flags, f"-I{HERE}", str(source), "-o", str(library)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library


class Shim:
    """Kernels by their names, to be called with grid, block and arguments, as CuPy's are."""

    def __init__(self, library, names):
        self._library = ctypes.CDLL(str(library))
        self._numbers = {name: number for number, name in enumerate(names)}
        self.called = []

    def __call__(self, name):
        function = getattr(self._library, f"launch_{self._numbers[name]}")
        function.restype = ctypes.c_char_p

        def launch(grid, block, arguments):
            self.called.append(name)
            x, y = (*block, 1)[:2]
            assert len(grid) == 1
            assert 0 < grid[0] < 2**31
            assert x * y % 32 == 0
            assert x * y <= 1024
            held = [value(argument) for argument in arguments]
            pointers = (ctypes.c_void_p * len(held))(*(one.ctypes.data for one in held))
            kinds = (ctypes.c_char_p * len(held))(*(kind(argument).encode() for argument in arguments))
            problem = function(grid[0], x, y, pointers, kinds, len(held))
            assert not problem, f"{name}: {problem.decode()}"

        return launch


def value(argument):
    """What the kernel gets, in memory: a number, or an address."""
    if isinstance(argument, np.ndarray):
        return np.array(argument.ctypes.data, np.uint64)
    assert isinstance(argument, np.generic), f"CuPy guesses the size of {argument!r}"
    return np.array(argument)


def kind(argument):
    """What the kernel gets, in words that `cuda.h` compares with what it takes."""
    if isinstance(argument, np.ndarray):
        letter = "h" if argument.itemsize == 2 else argument.dtype.kind.replace("u", "i")
        return f"{letter}{argument.itemsize}"
    if argument.dtype == np.uint64:
        assert argument == 0
        return "0"
    return f"#{argument.dtype.kind}{argument.itemsize}"


class Poisoned:
    """numpy, but what is allocated and not written holds NaN, or a number that is no label and no index."""

    __name__ = "poisoned"

    def __getattr__(self, name):
        return getattr(np, name)

    @staticmethod
    def empty(shape, dtype=np.float64):
        made = np.empty(shape, dtype)
        made.fill({"f": np.nan, "u": 99}.get(made.dtype.kind, -(2**31) + 1))
        return made
