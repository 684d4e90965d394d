"""Marks these tests, and skips them where there is no device, saying why."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from gpu_init.kernels.cuda import choose_cache_folder


@cache
def missing():
    """What keeps these tests from running here, or None."""
    choose_cache_folder()
    try:
        import cupy
    except Exception as error:  # a broken installation raises whatever it likes
        return f"cupy cannot be imported ({type(error).__name__})"
    try:
        found = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"no CUDA device ({error})"
    return None if found else "no CUDA device"


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if missing():
                item.add_marker(pytest.mark.skip(reason=missing()))
