"""The CUDA kernels, built for the host."""

from __future__ import annotations

import shutil

import pytest
import scipy.sparse

from gpu_init.kernels import cuda
from tests.kernels.test_cuda_kernels import NAMES
from tests.support import cuda_checks as checks
from tests.support import shim


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    return shim.Shim(shim.build(tmp_path_factory.mktemp("shim"), NAMES), NAMES)


@pytest.fixture(scope="module")
def where(programs):
    return checks.Where(
        cuda.CudaKernels(shim.Poisoned(), scipy.sparse, programs), lambda array: array, lambda array: array
    )
