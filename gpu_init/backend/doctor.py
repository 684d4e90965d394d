"""The report of `gpu-init doctor`, and the reason why the CUDA backend cannot run here."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import platform
import sys
from dataclasses import dataclass
from typing import NamedTuple

from gpu_init import memory
from gpu_init.backend.cpu import CpuBackend
from gpu_init.backend.interface import LIBRARIES, distributions, one_line, versions
from gpu_init.errors import InputError
from gpu_init.kernels import compile_all
from gpu_init.kernels.ahead import compile_cuda
from gpu_init.kernels.cuda import OLDEST, ahead_folder, choose_cache_folder
from gpu_init.kernels.threads import cores


@dataclass(frozen=True)
class Fact:
    """One line of ``gpu-init doctor``; ``fix`` says what to do where something is wrong."""

    name: str
    found: str
    fix: str = ""


def facts() -> list[Fact]:
    """Look at what a job would find on this machine: system, libraries, driver, devices."""
    free = memory.available()
    lines = [
        Fact("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        Fact("cores", str(cores())),
        Fact("memory", f"{free.bytes / 1e9:.1f} GB free {free.why}"),
    ]
    lines += [Fact(name, version) for name, version in CpuBackend("doctor").versions().items()]
    torch = versions("torch").get("torch")
    fix = "" if torch else "for .pt features: pip install 'gpu-init[torch]'"
    return [*lines, Fact("torch", torch or "not installed", fix), *_cuda_facts()]


def compiled_facts() -> list[Fact]:
    """Compile all kernels ahead of time, for this processor and, with CuPy, for devices; say where they are kept."""
    count, folder = compile_all()
    lines = [Fact("CPU kernels", f"{count} compiled, in {folder}" if folder else f"{count} compiled, and not kept")]
    if distributions("cupy"):
        try:
            made = compile_cuda(ahead_folder())
            lines.append(Fact("CUDA kernels", f"{len(made)} files compiled, in {ahead_folder()}"))
        except InputError as error:
            lines.append(Fact("CUDA kernels", "not compiled", str(error)))
    return lines


def _cuda_facts() -> list[Fact]:
    driver = _driver_version()
    lines = [Fact("CUDA driver", f"for CUDA {driver[0]}.{driver[1]}" if driver else "none found")]
    for library in (*LIBRARIES, "rmm"):
        found = distributions(library)
        shown = ", ".join(f"{name} {version}" for name, version in versions(*found).items())
        fix = f"keep one: pip uninstall {' or '.join(found)}, then install the other again" if len(found) > 1 else ""
        lines.append(Fact(library, shown or "not installed", fix))
    missing = missing_for_cuda()
    if missing:
        lines.append(Fact("CUDA backend", f"no: {missing.what}", missing.fix))
        return lines
    import cupy

    for device in range(cupy.cuda.runtime.getDeviceCount()):
        properties = cupy.cuda.runtime.getDeviceProperties(device)
        with cupy.cuda.Device(device):
            free, total = cupy.cuda.runtime.memGetInfo()
        shown = f"{properties['name'].decode()}, compute capability {properties['major']}.{properties['minor']}"
        lines.append(Fact(f"device {device}", f"{shown}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"))
    return [*lines, Fact("CUDA backend", "ready, on device 0")]


class Missing(NamedTuple):
    """What the CUDA backend lacks on this machine, and what to do about it."""

    what: str
    fix: str


def missing_for_cuda() -> Missing | None:
    """Give the first thing that keeps the CUDA backend from running here, or None."""
    driver = _driver_version()
    if driver is None:
        return Missing(
            "no NVIDIA driver is loaded on this machine (libcuda.so.1 not found)",
            "Run on a machine with an NVIDIA GPU (containers: --gpus all), or use --backend cpu.",
        )
    if driver[0] < 12:
        return Missing(
            f"the NVIDIA driver serves CUDA {driver[0]}.{driver[1]}, and 12.0 is the oldest that works",
            "Install a newer driver, or use --backend cpu.",
        )
    install = f"pip install 'gpu-init[{'cuda13' if driver[0] >= 13 else 'cuda12'}]'"
    twice = distributions("cupy")
    if len(twice) > 1:
        return Missing(
            f"{' and '.join(twice)} are installed side by side, and break each other",
            f"Install with: pip uninstall --yes {' '.join(twice)} && {install}",
        )
    choose_cache_folder()
    absent = [library for library in LIBRARIES if not _importable(library)]
    if absent:
        return Missing(f"{', '.join(absent)} cannot be imported", f"Install with: {install}")
    import cupy

    try:
        if cupy.cuda.runtime.getDeviceCount() == 0:
            return Missing("the driver reports no device", "Check nvidia-smi, and CUDA_VISIBLE_DEVICES.")
        properties = cupy.cuda.runtime.getDeviceProperties(0)
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return Missing(one_line(error), f"Check nvidia-smi and CUDA_VISIBLE_DEVICES; this driver takes: {install}")
    if 10 * properties["major"] + properties["minor"] < OLDEST:
        return Missing(
            f"device 0 has compute capability {properties['major']}.{properties['minor']}, and kernels need"
            f" {OLDEST / 10} (Volta) or newer",
            "Choose another device with CUDA_VISIBLE_DEVICES, or use --backend cpu.",
        )
    try:
        cupy.cuda.nvrtc.getVersion()
    except Exception:  # CuPy's error for a library that is missing has changed from version to version
        return Missing("CuPy finds no NVRTC, the compiler of kernels", f"Install with: {install}")
    return None


def _driver_version() -> tuple[int, int] | None:
    """Major and minor version of CUDA that the driver serves, or None without a driver."""
    try:
        version = ctypes.c_int()
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except OSError:
        return None
    return version.value // 1000, version.value % 1000 // 10


def _importable(library: str) -> bool:
    """Whether a library can be imported. cuML is only looked for: its import takes seconds, and few jobs need it."""
    try:
        if library == "cuml" and library not in sys.modules:
            return importlib.util.find_spec(library) is not None
        importlib.import_module(library)
    except Exception:  # a broken installation may raise anything
        return False
    return True
