"""Where machine code is kept, what an image brings, and what is compiled ahead of time."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import numba
import numpy as np
import pytest

from gpu_init.kernels import compiled

EVENTS = """
import sys
from numba.core import event
with event.install_recorder("numba:compile") as events:
    {work}
print(len(events.buffer))
"""
SUMS = """
    from gpu_init.kernels import Csr, cpu
    import numpy as np
    csr = Csr(np.array([0, 1]), np.zeros(1, np.int32), None)
    print(cpu.NumbaKernels().aggregate(csr, np.ones((1, 2), np.float32), np.ones(1), np.ones(1), np.zeros(2)))
"""


def run(code, folder, **environment):
    """Lines that a process prints whose cache is in a folder."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder), **environment}
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    return done.stdout.splitlines()


@pytest.fixture
def no_choice(monkeypatch):
    """No variable says where machine code lies, and no folder is remembered."""
    for name in ("NUMBA_CACHE_DIR", "GPU_INIT_MACHINE_CODE"):
        monkeypatch.delenv(name, raising=False)
    compiled.folder.cache_clear()
    yield
    compiled.folder.cache_clear()


def test_kernels_are_compiled_ahead_of_time(tmp_path):
    doctor = "from gpu_init.cli import main; assert main(['doctor', '--compile']) == 0"
    lines = run(doctor, tmp_path / "cache", GPU_INIT_MACHINE_CODE=str(tmp_path / "brought"))
    assert any(line.startswith("CPU kernels") and str(tmp_path / "brought" / "numba") in line for line in lines)
    again = run(EVENTS.format(work=SUMS.strip()), tmp_path, GPU_INIT_MACHINE_CODE=str(tmp_path / "brought"))
    assert again == ["[[1. 1.]]", "0"]


def test_what_an_image_brings_is_copied_where_it_cannot_be_written(tmp_path, monkeypatch, no_choice):
    brought = tmp_path / "brought" / "numba" / "kernels_1"
    brought.mkdir(parents=True)
    (brought / "a.nbi").write_bytes(b"index")
    monkeypatch.setenv("GPU_INIT_MACHINE_CODE", str(tmp_path / "brought"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    ours = compiled._is_ours
    monkeypatch.setattr(compiled, "_is_ours", lambda folder: "brought" not in folder and ours(folder))
    assert compiled.folder() == str(tmp_path / "cache" / "gpu-init" / "numba")
    assert (tmp_path / "cache" / "gpu-init" / "numba" / "kernels_1" / "a.nbi").read_bytes() == b"index"


def test_without_a_folder_of_ones_own_there_is_one_for_the_process(tmp_path, monkeypatch, no_choice):
    monkeypatch.setattr(compiled, "_is_ours", lambda folder: False)
    found = compiled.folder()
    assert found is not None
    assert os.stat(found).st_mode & 0o777 == 0o700
    shutil.rmtree(found)
    compiled.folder.cache_clear()

    def nowhere(**_):
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(compiled.tempfile, "mkdtemp", nowhere)
    assert compiled.folder() is None


def test_a_kernel_takes_its_own_types_alone_and_leaves_numbas_settings():
    @compiled.kernel(compiled.reads(compiled.float64), compiled.writes(compiled.float64))
    def doubled(values, out):
        for k in range(values.size):
            out[k] = 2 * values[k]

    before = numba.config.CACHE_DIR
    out = np.empty(2)
    doubled(compiled.read_only([1, 2], np.float64), out)
    assert out.tolist() == [2, 4]
    assert before == numba.config.CACHE_DIR
    with pytest.raises(TypeError):
        doubled(np.ones(2, np.float32), out)


def test_a_full_disk_does_not_stop_a_kernel(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(numba.core.caching.FunctionCache, "save_overload", full)

    @compiled.kernel(compiled.writes(compiled.int64))
    def counted(out):
        out[0] += 1

    out = np.zeros(1, np.int64)
    counted(out)
    assert out[0] == 1
