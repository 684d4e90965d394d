"""What runs in a worker of a Dask cluster: the tasks of a run, on the parts that the worker keeps.

Parts of R lie in the run's staging folder, which every worker sees. What a worker opens or works out it keeps, since
its next task is most often about the same part. A worker that lacks something makes it again, so that nothing is lost
with a worker but its time.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from gpu_init.artifact.rows import Folder
from gpu_init.backend.interface import Backend
from gpu_init.backend.select import select
from gpu_init.cluster.connection import needed
from gpu_init.kernels.csr import Csr
from gpu_init.manifest import backend_facts
from gpu_init.method.matrix import Interactions
from gpu_init.method.modality import Modality
from gpu_init.parts import Plan, Process, joined
from gpu_init.version import __version__

with needed():
    from distributed import get_worker
    from distributed.diagnostics.plugin import WorkerPlugin

SCRATCH = "scratch"  # The part of the staging folder that does not get into the artifact.

_T = TypeVar("_T")


@dataclass(frozen=True)
class Work:
    """What all tasks of a run go by; small, since it travels to every worker.

    Attributes
    ----------
    run : str
        A name that no other run has.
    backend, kernels : str
        ``cpu`` or ``cuda``, and ``numpy`` or ``numba``.
    staging : str
        Path of the staging folder.
    plan : Plan
    features : dict of str to str
        The .npy file of each modality's features by item, (I, D) float32.
    """

    run: str
    backend: str
    kernels: str
    staging: str
    plan: Plan
    features: dict[str, str] = field(default_factory=dict)

    def scratch(self, name: str) -> str:
        """Path of a file in the scratch folder."""
        return os.path.join(self.staging, SCRATCH, name)


class Keeper(WorkerPlugin):
    """What a worker keeps of a run; Dask sends one to each worker, also to those that come later."""

    def __init__(self, run: str) -> None:
        self.name = f"gpu-init-{run}"

    def setup(self, worker: Any) -> None:  # noqa: ARG002
        self.turn = Lock()  # Tasks run one at a time in a worker, since kernels take all of its threads.
        self.known: dict[str, Any] = {}  # ids of users and items, while interactions are read
        self._process: tuple[Work, Process] | None = None

    def teardown(self, worker: Any) -> None:  # noqa: ARG002
        self.known.clear()
        self._process = None
        release()

    def process(self, work: Work) -> Process:
        """What the worker holds of a run."""
        if self._process is None or self._process[0] != work:
            self.known.clear()
            backend = backend_of(work.backend, work.kernels)
            self.source = FolderSource(backend, work)
            self._process = (work, Process(backend, work.plan, Folder(work.staging), self.source))
        return self._process[1]


@functools.cache
def backend_of(name: str, kernels: str) -> Backend:
    """The backend of a name, with kernels of a name; made once in a process, since kernels are compiled for it."""
    return select(name).with_kernels(kernels)


def keeper(run: str) -> Keeper:
    """Return what this worker keeps of a run."""
    found = get_worker().plugins[f"gpu-init-{run}"]
    assert isinstance(found, Keeper)
    return found


class FolderSource:
    """Parts of R and features, mapped from files; on a device they are taken there."""

    def __init__(self, backend: Backend, work: Work) -> None:
        self._backend, self._work = backend, work
        self._mapped: dict[int, list[mmap.mmap]] = {}

    def part(self, number: int) -> Interactions:
        paths = [part_path(self._work, number, name) for name in Csr._fields]
        files = [np.load(path, mmap_mode="r") if os.path.exists(path) else None for path in paths]
        self._mapped[number] = [file.base for file in files if file is not None and isinstance(file.base, mmap.mmap)]
        arrays = (None if file is None else self._backend.asarray(file) for file in files)
        return Interactions(Csr(*arrays), self._work.plan.items)

    def modality(self, name: str) -> Modality:
        present = self.present(name)
        values = self._backend.asarray(np.load(self._work.features[name], mmap_mode="r"))
        return Modality(name, values, present, int(present.sum()))

    def present(self, name: str) -> Any:
        return self._backend.asarray(np.load(self._work.scratch(f"{name}.present.npy")))

    def let_go(self, number: int) -> None:
        """Let the system take back the pages of a part that were read; it keeps them while there is room."""
        for file in self._mapped.get(number, ()):
            with suppress(AttributeError, OSError):  # a system that takes no such advice
                file.madvise(mmap.MADV_DONTNEED)


def part_path(work: Work, number: int, name: str) -> str:
    """File of one array of a part of R."""
    return work.scratch(f"{number}.{name}.npy")


def run_task(task: Callable[..., _T], work: Work, number: int, shared: tuple[Any, ...], *own: Any) -> _T:
    """Run a task on one part."""
    kept = keeper(work.run)
    with kept.turn:
        process = kept.process(work)
        try:
            with process.backend.explained():
                return task(process.part(number), *shared, *own)
        finally:
            kept.source.let_go(number)


def map_parts(task: Callable[..., _T], work: Work, numbers: range, shared: tuple[Any, ...]) -> list[_T]:
    """Run a task on neighbouring parts, and return the results."""
    return [run_task(task, work, number, shared) for number in numbers]


def total_parts(
    task: Callable[..., _T], join: Callable[[_T, _T], _T], work: Work, numbers: range, shared: tuple[Any, ...]
) -> _T:
    """Run a task on neighbouring parts, and return the results joined."""
    return joined(join, (run_task(task, work, number, shared) for number in numbers))


def given(value: _T) -> _T:
    """Return what tasks share as the result of a task, so that workers can take it from each other."""
    return value


def facts(backend: str, kernels: str, reading_kernels: str) -> dict[str, Any]:
    """What this worker is: the manifest's words on the backend, and the version of the program."""
    device = select(backend)
    names = [device.with_kernels(name).kernels.name for name in (kernels, reading_kernels)]
    return {**backend_facts(device, ""), "kernels": names[0], "reading_kernels": names[1], "gpu_init": __version__}


def missing(paths: list[str]) -> list[str]:
    """Those of the paths that this worker does not see."""
    return [path for path in paths if not os.path.exists(path)]


def sent(dask_worker: Any) -> int:
    """Bytes that this worker has sent to others so far."""
    return int(dask_worker.transfer_outgoing_bytes_total)


def release() -> None:
    """Give back to the system what this process's allocators keep for later."""
    pa.default_memory_pool().release_unused()
    with suppress(OSError, AttributeError):  # only GNU's library has it
        ctypes.CDLL(None).malloc_trim(0)
