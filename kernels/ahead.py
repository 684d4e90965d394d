"""Compiles CUDA kernels ahead of time, so that the first job on a device does not wait for the compiler.

The build of an image and `gpu-init doctor --compile` do this. They need NVRTC and CuPy, but no device and no driver.
`gpu_init.kernels.cuda.Programs` finds the files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gpu_init.errors import InputError, ResourceError
from gpu_init.kernels.cuda import (
    CUPY_OPTIONS,
    OPTIONS,
    choose_cache_folder,
    compile_error,
    fingerprint,
    instances,
    machine_code,
    no_compiler,
    source,
)

ARCHITECTURES = (80, 86, 89, 90, 100, 120)  # A100, RTX 30, RTX 40 and L4, H100 and H200, B200, RTX 50


def compile_cuda(folder: Path, architectures: Iterable[int] = ARCHITECTURES, nvrtc: Any = None) -> list[Path]:
    """Compile every kernel for several kinds of devices, on all cores.

    Parameters
    ----------
    folder : path
        Gets the machine code, such as ``sm_90/clustering.cubin``. Beside each is a JSON file with the names of its
        kernels and the hashes of the source and of the machine code. The folder is created if it does not exist.
    architectures : int, default=`ARCHITECTURES`
        Compute capabilities, times ten. Those that this NVRTC does not know are left out.
    nvrtc : module, optional
        The compiler; by default ``cupy.cuda.nvrtc``.

    Returns
    -------
    list of paths
        The files of machine code, in order of architecture and source.

    Raises
    ------
    InputError
        CuPy or NVRTC is not installed, or knows none of the architectures.
    ResourceError
        A kernel does not compile, or the folder cannot be written.
    """
    nvrtc = nvrtc or _nvrtc()
    try:
        known = set(nvrtc.getSupportedArchs())
    except RuntimeError as error:
        raise no_compiler(error) from None
    wanted = [(architecture, file) for architecture in architectures for file in instances() if architecture in known]
    if not wanted:
        raise InputError(f"this NVRTC knows none of the architectures asked for, but {sorted(known)}.")
    try:
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            return [*threads.map(lambda one: _write(nvrtc, folder, *one), wanted)]
    except OSError as error:
        raise ResourceError(f"{error.filename or folder} cannot be written ({error.strerror}).") from error


def compile_text(nvrtc: Any, text: str, names: Iterable[str], architecture: int) -> tuple[bytes, dict[str, str]]:
    """Machine code of some kernels of a source text, and each kernel's name in the machine code.

    Raises
    ------
    ResourceError
        A kernel does not compile; the message names file and line.
    """
    program = nvrtc.createProgram(text, "kernels.cu", (), ())
    try:
        for name in names:
            nvrtc.addNameExpression(program, name)
        nvrtc.compileProgram(program, (*OPTIONS, *CUPY_OPTIONS, f"-arch=sm_{architecture}"))
        return nvrtc.getCUBIN(program), {name: nvrtc.getLoweredName(program, name) for name in names}
    except nvrtc.NVRTCError:
        log = nvrtc.getProgramLog(program)
        raise ResourceError(f"{compile_error(log)}\n(compiled for sm_{architecture})") from None
    finally:
        nvrtc.destroyProgram(program)


def _write(nvrtc: Any, folder: Path, architecture: int, file: str) -> Path:
    code, names = compile_text(nvrtc, source(file), instances()[file], architecture)
    facts = {"source": fingerprint(file), "code": hashlib.sha256(code).hexdigest(), "names": names}
    places = machine_code(folder, file, architecture)
    places[0].parent.mkdir(parents=True, exist_ok=True)
    for place, content in zip(places, (code, json.dumps(facts, indent=1).encode()), strict=True):
        partial = place.with_name(f"{place.name}.{os.getpid()}")
        partial.write_bytes(content)
        partial.replace(place)  # atomic: a job that runs now finds the old file or the new one
    return places[0]


def _nvrtc() -> Any:
    choose_cache_folder()
    try:
        import cupy
    except ImportError:
        raise InputError("CuPy is not installed: pip install 'gpu-init[cuda12]', or 'gpu-init[cuda13]'.") from None
    return cupy.cuda.nvrtc
