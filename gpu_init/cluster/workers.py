"""The workers of a Dask cluster, and tasks on the parts that they keep.

Parts of R lie in the staging folder, which all workers see. Tasks go to the worker that keeps their part. Of a step of
K-means only each part's sums and counts travel, K x D and K numbers, and each worker writes its users' rows to their
place in the artifact's arrays. A worker that is lost costs what it was at: its tasks go to others, which open its parts
again.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from gpu_init.artifact.staging import Staging
from gpu_init.backend.interface import Backend, one_line
from gpu_init.cluster import shuffle, worker
from gpu_init.cluster.connection import Dask
from gpu_init.cluster.shuffle import Batch, Reading
from gpu_init.cluster.worker import SCRATCH, Work
from gpu_init.errors import InputError, ResourceError
from gpu_init.inputs.tables import Table
from gpu_init.method.modality import Modality
from gpu_init.parts import Plan, add, joined

FAN_IN = 4  # A task joins so many results: a power of 2, see `joined`.
EVEN = 1.1  # A worker may have this many times an even share of the parts.
PATIENCE = 60  # Seconds to wait for workers to come, or to come back.

_T = TypeVar("_T")


class Workers:
    """A cluster's workers, and which of them keeps which part.

    Parameters
    ----------
    dask : Dask
    client : distributed.Client
    run : str
        A name that no other run has.
    """

    def __init__(self, dask: Dask, client: Any, run: str) -> None:
        self.run = run
        self._dask = dask
        self._client = client
        self._places: dict[int, str] = {}  # address of the worker that keeps each part
        self._runs: list[range] = []
        self._arranged: tuple[list[str], int] | None = None  # the workers and the number of parts when this was done
        self._sent: tuple[Work, Any] | None = None  # the last work that tasks were given, and its future
        self._carried = 0  # bytes to and from this process

    def begin(self) -> None:
        """Let each worker keep what it works out in this run, those that come later too."""
        self._client.register_plugin(worker.Keeper(self.run))

    def end(self) -> None:
        """Free what workers keep."""
        with suppress(Exception):  # they are gone, or the scheduler is
            self._client.unregister_worker_plugin(f"gpu-init-{self.run}")

    def present(self) -> list[str]:
        """Addresses of the workers that are there; where there are none yet, or all are lost, those that come soon."""
        deadline = time.monotonic() + PATIENCE
        while not (there := sorted(self._client.nthreads())):
            if time.monotonic() > deadline:
                raise ResourceError(f"the scheduler at {self._client.scheduler.address} has no workers.")
            time.sleep(0.1)
        return there

    def facts(self, backend: str, kernels: str = "numpy", reading_kernels: str = "numpy") -> dict[str, Any]:
        """What the workers are, with kernels of such names; they have to be alike."""
        self.present()
        try:
            found = self._client.run(worker.facts, backend, kernels, reading_kernels)
        except ImportError as error:
            raise InputError(f"workers lack something ({one_line(error)}); install gpu-init there as here.") from None
        first = next(iter(found.values()))
        for address, facts in found.items():
            if facts != first:
                raise InputError(f"worker {address} has {facts}, another has {first}; they have to be alike.")
        return dict(first)

    def require_sight(self, paths: list[str]) -> None:
        """Refuse workers that do not see the same files."""
        for address, missing in self._client.run(worker.missing, paths).items():
            if missing:
                raise InputError(
                    f"worker {address} does not see {missing[0]}; workers need the same files at the same paths."
                )

    def memory(self) -> list[int]:
        """Bytes that each worker may take; 0 where it has no limit."""
        self.present()
        return [one["memory_limit"] or 0 for one in self._client.scheduler_info(n_workers=-1)["workers"].values()]

    def traffic(self) -> int:
        """Bytes so far of what tasks were given, of what they gave to this process, and of what workers sent others.

        What a lost worker had sent is not among them.
        """
        return self._carried + int(sum(self._client.run(worker.sent, on_error="ignore").values()))

    # Tasks about parts, on the workers that keep them while there are these.

    def map(self, task: Callable[..., _T], work: Work, shared: tuple[Any, ...]) -> list[_T]:
        """Return the results of a task on each part, in order."""
        found = self.results(self._of_runs((worker.map_parts, task), work, shared))
        return [one for some in found for one in some]

    def total(self, task: Callable[..., Any], join: Callable[..., Any], work: Work, shared: tuple[Any, ...]) -> Any:
        """Return the results of a task on all parts, joined as `joined` does it, on the workers first."""
        futures = self._of_runs((worker.total_parts, task, join), work, shared)
        while len(futures) > FAN_IN:
            groups = [futures[start : start + FAN_IN] for start in range(0, len(futures), FAN_IN)]
            futures = [self._client.submit(joined, join, group, pure=False) for group in groups]
        return joined(join, self.results(futures))

    def submit(
        self, task: Callable[..., Any], work: Work, shared: tuple[Any, ...], own: dict[int, tuple[Any, ...]]
    ) -> dict[int, Any]:
        """Begin a task on single parts: all are given ``shared``, and each its ``own`` arguments; returns futures."""
        self._arrange(work.plan.parts)
        self._carry(own.values())
        given = self._given(shared, len(own))
        return {
            number: self._ask(number, worker.run_task, task, self._known(work), number, given, *arguments)
            for number, arguments in own.items()
        }

    def completed(self, futures: dict[int, Any]) -> Iterator[tuple[int, Any]]:
        """Yield the number and result of each future, as they come."""
        numbered = {future: number for number, future in futures.items()}
        for future in self._dask.as_completed(numbered, loop=self._client.loop):
            yield numbered[future], self.results([future])[0]

    def results(self, futures: Iterable[Any]) -> list[Any]:
        """Return the results of tasks, in order."""
        found: list[Any] = self._client.gather(list(futures))
        self._carry(found)
        return found

    def _of_runs(self, task: tuple[Any, ...], work: Work, shared: tuple[Any, ...]) -> list[Any]:
        """Begin a task on each run of parts, in order."""
        runs = self._arrange(work.plan.parts)
        given = self._given(shared, len(runs))
        return [self._ask(run[0], *task, self._known(work), run, given) for run in runs]

    def _ask(self, number: int, *task: Any) -> Any:
        places = [self._places[number]]
        return self._client.submit(*task, workers=places, allow_other_workers=True, pure=False)

    def _known(self, work: Work) -> Any:
        if self._sent is None or self._sent[0] is not work:
            self._carry([work])
            self._sent = (work, self._client.submit(worker.given, work, pure=False))
        return self._sent[1]

    def _given(self, shared: tuple[Any, ...], tasks: int) -> Any:
        """What tasks share: for many of them the result of one, which workers take from each other, or make again."""
        if tasks <= FAN_IN:
            self._carry([shared] * tasks)
            return shared
        self._carry([shared])
        return self._client.submit(worker.given, shared, pure=False)

    def _carry(self, values: Iterable[Any]) -> None:
        """Count what goes to or comes from this process."""
        self._carried += sum(map(self._dask.sizeof, values))

    def _arrange(self, parts: int) -> list[range]:
        """Runs of neighbouring parts, each of one worker; a lost one's go to others, and new ones get a share.

        Runs are dealt in turn, so that parts are written in about their order, in which they are hashed. Where there
        are many runs, as many at a time are dealt as are joined first, so that few of their results travel.
        """
        there = self.present()
        if self._arranged != (there, parts):
            length = run_length(parts, len(there))
            runs = [range(first, min(first + length, parts)) for first in range(0, parts, length)]
            together = FAN_IN if len(runs) >= 2 * FAN_IN * len(there) else 1
            share = -(-len(runs) // len(there))
            places: dict[range, str] = {}
            load = Counter(dict.fromkeys(there, 0))

            def put(run: range, place: str) -> None:
                places[run] = place
                load[place] += 1

            for run in runs:
                kept = self._places.get(run[0])
                if kept in there and load[kept] < share:
                    put(run, kept)
            for at, run in enumerate(runs):
                if run not in places:
                    before = places.get(runs[at - 1]) if at % together else None
                    put(run, before if before and load[before] < share else min(there, key=load.__getitem__))
            self._places = {number: places[run] for run in runs for number in run}
            self._arranged, self._runs = (there, parts), runs
        return self._runs

    # Tasks that read.

    def find(self, reading: Reading, pieces: Sequence[tuple[Table, range | None]]) -> list[shuffle.Found]:
        """Return what each piece holds."""
        calls = [(reading, *piece) for piece in pieces]
        self._carry(calls)
        return self.results(self._client.submit(shuffle.find, *call, pure=False) for call in calls)

    def shuffle(
        self, reading: Reading, pieces: Sequence[tuple[Table, range | None]], batch: Batch
    ) -> Callable[[], None]:
        """Begin to put the interactions of a batch on storage by parts; what is returned waits for the end.

        Of two batches, workers take the later one where the earlier has no work.
        """
        options = {"pure": False, "fifo_timeout": "0s"}
        begun = [self._client.submit(shuffle.rows, reading, *piece, **options) for piece in pieces[slice(*batch)]]
        frame = self._dask.frames.from_delayed(begun, meta=shuffle.no_rows(), verify_meta=False)
        split = frame.shuffle("part", npartitions=reading.work.plan.parts, ignore_index=True)
        meta = pd.DataFrame({"part": np.empty(0, np.int32)})
        future = self._client.compute(
            split.map_partitions(shuffle.put_all, reading.work, batch, meta=meta), fifo_timeout="0s"
        )

        def wait() -> None:
            future.result()
            self._client.run(worker.release, on_error="ignore")

        return wait


def run_length(parts: int, workers: int) -> int:
    """Neighbouring parts that one task is about: the highest power of 2 that leaves workers about even shares."""
    even = EVEN * parts / workers
    lengths = [1 << power for power in range(parts.bit_length() + 1)]
    most = {length: min(parts, length * math.ceil(math.ceil(parts / length) / workers)) for length in lengths}
    return max((length for length in lengths if most[length] <= even), default=1)


class ClusterParts:
    """All parts of a run, on the workers that keep them; this is `Parts` for a cluster."""

    def __init__(self, workers: Workers, work: Work, backend: Backend, masks: dict[str, Any], staging: Staging) -> None:
        self.plan: Plan = work.plan
        self.backend = backend
        self._workers, self._work, self._masks, self._staging = workers, work, masks, staging

    def modality(self, name: str) -> Modality:
        mask = self._masks[name]
        return Modality(name, np.load(self._work.features[name], mmap_mode="r"), mask, int(mask.sum()))

    def map(self, task: Callable[..., _T], *shared: Any) -> list[_T]:
        return self._workers.map(task, self._work, shared)

    def total(self, task: Callable[..., Any], *shared: Any, join: Callable[..., Any] | None = None) -> Any:
        return self._workers.total(task, join or add, self._work, shared)

    def each(self, task: Callable[..., _T], done: set[int], *shared: Any) -> Iterator[tuple[int, _T]]:
        own = {number: () for number in range(self.plan.parts) if number not in done}
        return self._workers.completed(self._workers.submit(task, self._work, shared, own))

    def some(self, task: Callable[..., _T], own: dict[int, tuple[Any, ...]], *shared: Any) -> list[_T]:
        return self._workers.results(self._workers.submit(task, self._work, shared, own).values())

    def broadcast(self, name: str, array: Any) -> Any:
        path = f"{SCRATCH}/{name}.npy"
        self._staging.save(path, array)
        return path
