"""NVRTC, the compiler that CuPy calls, through ctypes: it needs no device, no driver and no CuPy."""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.metadata
from pathlib import Path

_PACKAGES = ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12", "nvidia-cuda-nvrtc-cu13")


def libraries():
    """Every libnvrtc of this environment: of installed packages, then the system's."""
    found = []
    for package in _PACKAGES:
        try:
            files = importlib.metadata.files(package) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found += [str(Path(file.locate())) for file in files if Path(file).name.startswith("libnvrtc.so")]
    system = ctypes.util.find_library("nvrtc")
    return found or ([system] if system else [])


class Nvrtc:
    """One libnvrtc, with as much of the interface of ``cupy.cuda.nvrtc`` as `gpu_init.kernels.ahead` uses."""

    class NVRTCError(RuntimeError):
        pass

    def __init__(self, library):
        self._library = ctypes.CDLL(library)

    def getSupportedArchs(self):
        count = ctypes.c_int()
        self._call("GetNumSupportedArchs", ctypes.byref(count))
        found = (ctypes.c_int * count.value)()
        self._call("GetSupportedArchs", found)
        return tuple(found)

    def createProgram(self, source, name, headers, include_names):
        assert len(headers) == len(include_names) == 0
        program = ctypes.c_void_p()
        self._call("CreateProgram", ctypes.byref(program), source.encode(), name.encode(), 0, None, None)
        return program

    def destroyProgram(self, program):
        self._call("DestroyProgram", ctypes.byref(program))

    def addNameExpression(self, program, name):
        self._call("AddNameExpression", program, name.encode())

    def compileProgram(self, program, options):
        given = (ctypes.c_char_p * len(options))(*map(str.encode, options))
        self._call("CompileProgram", program, len(options), given)

    def getLoweredName(self, program, name):
        lowered = ctypes.c_char_p()
        self._call("GetLoweredName", program, name.encode(), ctypes.byref(lowered))
        return lowered.value.decode()

    def getCUBIN(self, program):
        return self._bytes("CUBIN", program)

    def getProgramLog(self, program):
        return self._bytes("ProgramLog", program).rstrip(b"\0").decode()

    def _bytes(self, what, program):
        size = ctypes.c_size_t()
        self._call(f"Get{what}Size", program, ctypes.byref(size))
        held = ctypes.create_string_buffer(size.value)
        self._call(f"Get{what}", program, held)
        return held.raw

    def _call(self, name, *arguments):
        code = getattr(self._library, f"nvrtc{name}")(*arguments)
        if code != 0:
            raise self.NVRTCError(f"nvrtc{name} failed with {code}")
