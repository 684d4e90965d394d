"""NVRTC, the compiler that CuPy calls, through ctypes: it needs no device and no driver."""

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
    """One libnvrtc."""

    def __init__(self, library):
        self._library = ctypes.CDLL(library)

    def version(self):
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        return major.value, minor.value

    def compile(self, source, names, *options):
        """Machine code of some kernels, or the compiler's log as a ValueError."""
        program = ctypes.c_void_p()
        self._call("CreateProgram", ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None)
        try:
            for name in names:
                self._call("AddNameExpression", program, name.encode())
            given = (ctypes.c_char_p * len(options))(*map(str.encode, options))
            if self._library.nvrtcCompileProgram(program, len(options), given) != 0:
                raise ValueError(self._bytes(program, "ProgramLog").decode())
            for name in names:
                lowered = ctypes.c_char_p()
                self._call("GetLoweredName", program, name.encode(), ctypes.byref(lowered))
            return self._bytes(program, "CUBIN")
        finally:
            self._call("DestroyProgram", ctypes.byref(program))

    def _bytes(self, program, what):
        size = ctypes.c_size_t()
        self._call(f"Get{what}Size", program, ctypes.byref(size))
        held = ctypes.create_string_buffer(size.value)
        self._call(f"Get{what}", program, held)
        return held.raw.rstrip(b"\0") if what == "ProgramLog" else held.raw

    def _call(self, name, *arguments):
        code = getattr(self._library, f"nvrtc{name}")(*arguments)
        if code != 0:
            raise OSError(f"nvrtc{name} failed with {code}")
