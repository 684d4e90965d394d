"""What the tests of whole jobs share."""

from __future__ import annotations

import os

import pytest

from tests.support.jobs import Job


@pytest.fixture
def job(tmp_path, monkeypatch):
    for name in list(os.environ):
        if name.startswith("GPU_INIT_") and name != "GPU_INIT_KERNELS":
            monkeypatch.delenv(name)
    return Job(tmp_path)
