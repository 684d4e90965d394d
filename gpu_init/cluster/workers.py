"""The whole run again, over the processes of a Dask cluster (`job` has it for one machine).

Dask reads the interactions piece by piece and shuffles them by user; each part of R then lies in the staging folder, on
storage that all workers see, and is mapped, or on its device, where the worker is that its tasks go to. K-means is
`kmeans.fit`, with `Partitioned` points: of a step only each part's sums and counts travel, K x D numbers and K. Each
worker writes its users' rows into their range of the artifact's arrays.

Parts are the same for any number of workers, so the bytes are too. A worker that is lost costs what it was at: its
tasks go to others, which open its parts again.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pandas as pd

from gpu_init.artifact.format import INTERACTIONS
from gpu_init.artifact.objects import open_staging
from gpu_init.artifact.staging import Staging
from gpu_init.backend.interface import Backend, one_line, ranges
from gpu_init.backend.select import select
from gpu_init.cluster import partitions
from gpu_init.cluster.partitions import SCRATCH, SHARED, Batch, Fitted, Rows, Work
from gpu_init.config import AUTO, POLICIES, JobConfig
from gpu_init.errors import InputError, ResourceError
from gpu_init.files.npy import read_rows
from gpu_init.files.remote import is_url
from gpu_init.files.storage import expand, make_folder
from gpu_init.inputs import features
from gpu_init.inputs.axes import ItemAxis, item_axis, user_axis
from gpu_init.inputs.features import FeatureTable
from gpu_init.inputs.interactions import read as read_interactions
from gpu_init.inputs.interactions import require_kept, require_unchanged
from gpu_init.inputs.read import (
    check_inputs,
    check_places,
    columns_of,
    feature_rows,
    inputs_of,
    item_axis_of,
    job_seconds,
    read_features,
    tell_gaps,
    users_of,
)
from gpu_init.inputs.tables import EXTENSIONS, Table, open_table, pieces, stated_rows, text_bytes
from gpu_init.kernels import Csr, kernels_for
from gpu_init.kernels.costs import reading_seconds
from gpu_init.manifest import (
    Counts,
    cluster_sizes,
    embedding_facts,
    identity_of,
    kmeans_facts,
    manifest_of,
    modality_facts,
    save_ids,
    timings_of,
)
from gpu_init.method import clusters as method_clusters
from gpu_init.method import kmeans, spectral
from gpu_init.method import points as method_points
from gpu_init.method import projection as method_projection
from gpu_init.method.blend import Blend
from gpu_init.method.choose import Choice, choose
from gpu_init.method.describe import described
from gpu_init.method.lambdas import TEMPERATURE, Volumes, lambda_statistics, tau_centre, tau_of
from gpu_init.method.matrix import Interactions, power
from gpu_init.method.modality import Modality
from gpu_init.method.norms import NORM_ROWS, NormSums, item_norms, norm_statistics
from gpu_init.method.weighting import Weighting
from gpu_init.run import has_work
from gpu_init.show.progress import Progress, Step

PIECE_ROWS, MOST_PIECES = 1 << 21, 1 << 14  # of interactions that one task reads, at least; tasks, about
BATCH_PIECES = 2  # of each worker in a batch, which is brought together by user, while another one is begun;
BATCHES, BATCH_SHARE = 16, 1 / 16  # more where batches would be more than these, if this share of the memory holds one
SHUFFLE_BYTES = 64  # that an interaction takes meanwhile, about
PART_ROWS = 1 << 23  # of interactions in a part of R, about
LEAST_PARTS, MOST_PARTS = 4, 1 << 10  # where there are users enough; a step of K-means is a task of each
LINE_VALUES = 16  # float32 of a cache line
CUT_BYTES = 64 << 20  # of features that one task cuts into slices of columns
FAN_IN = 4  # results that one task joins: a power of 2, see `partitions.joined`
EVEN = 1.1  # times an even share of the parts that a worker may have
PATIENCE = 60  # seconds for workers to come, or to come back


def run(config: JobConfig, progress: Progress) -> str:
    """Run a job over a cluster and give the path of its artifact.

    Parameters
    ----------
    config : JobConfig
        With ``scheduler``: ``local``, or the address of a scheduler, whose workers see all inputs and the output under
        the same paths.
    progress : Progress

    Raises
    ------
    InputError, ResourceError
        As in `job.run`; or workers lack something; or the scheduler is lost: what was done can be resumed.
    """
    check_places(config)
    if config.settings.kmeans == "cuml":
        raise InputError("kmeans cuml runs in one process, and this run is over Dask; leave it out, or take own.")
    if is_url(config.out):
        raise InputError(
            f"{config.out}: over a cluster, workers write the output together; name a folder they all see."
        )
    with _cluster(config, progress) as workers:
        return _run(config, workers, progress)


class _Dask:
    """What is used of Dask, of which little has types.

    Raises
    ------
    InputError
        It is not installed.
    """

    def __init__(self) -> None:
        with self._needed():
            import dask
            import distributed
            from dask.sizeof import sizeof
            from distributed.comm.core import CommClosedError
            from distributed.scheduler import KilledWorker
        self.options: Any = dask.config.set
        self.sizeof: Callable[[Any], int] = sizeof
        self.as_completed: Any = distributed.as_completed
        self.Client: Any = distributed.Client
        self.CommClosedError: Any = CommClosedError
        self.KilledWorker: Any = KilledWorker

    @functools.cached_property
    def frames(self) -> Any:
        """Dask's data frames, loaded while workers are busy."""
        with self._needed():
            import dask.dataframe
        return dask.dataframe

    @staticmethod
    @contextmanager
    def _needed() -> Iterator[None]:
        try:
            yield
        except ImportError as error:
            raise InputError(f"--scheduler needs Dask ({one_line(error)}): pip install 'gpu-init[dask]'") from None


class Workers:
    """A cluster's workers, each of which keeps the parts that its tasks are about.

    Parameters
    ----------
    dask : _Dask
    client : distributed.Client
    """

    def __init__(self, dask: _Dask, client: Any) -> None:
        self._dask = dask
        self._client = client
        self._places: dict[int, str] = {}  # of the worker that keeps a part
        self._runs: list[range] = []
        self._arranged: tuple[list[str], int] | None = None  # for these workers, and so many parts
        self._work: tuple[Work, Any] | None = None  # the last one that tasks were given, as they were given it
        self._carried = 0  # bytes to and from this process

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
            found = self._client.run(partitions.facts, backend, kernels, reading_kernels)
        except ImportError as error:
            raise InputError(f"workers lack something ({one_line(error)}); install gpu-init there as here.") from None
        first = next(iter(found.values()))
        for worker, facts in found.items():
            if facts != first:
                raise InputError(f"worker {worker} has {facts}, another has {first}; they have to be alike.")
        return dict(first)

    def require_sight(self, paths: list[str]) -> None:
        """Refuse workers that do not see the same files."""
        for worker, missing in self._client.run(partitions.missing, paths).items():
            if missing:
                raise InputError(
                    f"worker {worker} does not see {missing[0]}; workers need the same files at the same paths."
                )

    def forget(self) -> None:
        """Free what workers keep."""
        with suppress(Exception):  # they have gone, or the scheduler has
            self._client.run(partitions.forget)

    def traffic(self) -> int:
        """Bytes so far of what tasks were given, of what they gave to this process, and of what workers sent others.

        What a lost worker had sent is not among them.
        """
        return self._carried + int(sum(self._client.run(partitions.sent, on_error="ignore").values()))

    def submit(
        self, function: Callable[..., Any], work: Work, shared: tuple[Any, ...], own: dict[int, tuple[Any, ...]]
    ) -> dict[int, Any]:
        """Tasks about single parts, on the workers that keep them while there are these.

        All have ``shared`` arguments, and each its ``own``.
        """
        self._arrange(work)
        self._carry(own.values())
        given = self._given(shared, len(own))
        return {
            number: self._ask(number, partitions.about, function, self._known(work), number, given, *arguments)
            for number, arguments in own.items()
        }

    def each(self, function: Callable[..., Any], work: Work, done: set[int], *shared: Any) -> Iterator[tuple[int, Any]]:
        """Number and result of a task about each part but some, as they come."""
        numbers = [number for number in range(len(work.bounds) - 1) if number not in done]
        futures = self.submit(function, work, shared, dict.fromkeys(numbers, ()))
        numbered = {future: number for number, future in futures.items()}
        for future in self._dask.as_completed(numbered, loop=self._client.loop):
            yield numbered[future], self.results([future])[0]

    def map(self, function: Callable[..., Any], work: Work, *shared: Any) -> list[Any]:
        """Results of a task about each part, in order."""
        found = self.results(self._of_runs((partitions.each, function), work, shared))
        return [one for some in found for one in some]

    def total(
        self, function: Callable[..., Any], work: Work, *shared: Any, join: Callable[..., Any] = partitions.add
    ) -> Any:
        """Sum of what a task gives of each part, or another join of it, as in `partitions.joined`."""
        return self._joined((partitions.total, function, join), join, work, shared)

    def total_sums(self, function: Callable[..., Any], at: int, work: Work, rows: Rows, *shared: Any) -> Any:
        """`total` of a task of K-means whose sums of rows are at some place of its result."""
        return self._joined((partitions.total_sums, function, at), partitions.add, work, (rows, *shared))

    def _joined(self, task: tuple[Any, ...], join: Callable[..., Any], work: Work, shared: tuple[Any, ...]) -> Any:
        futures = self._of_runs(task, work, shared)
        while len(futures) > FAN_IN:
            groups = [futures[start : start + FAN_IN] for start in range(0, len(futures), FAN_IN)]
            futures = [self._client.submit(partitions.joined, join, group, pure=False) for group in groups]
        return partitions.joined(join, self.results(futures))

    def _of_runs(self, task: tuple[Any, ...], work: Work, shared: tuple[Any, ...]) -> list[Any]:
        """A task about each run of parts, in order."""
        runs = self._arrange(work)
        given = self._given(shared, len(runs))
        return [self._ask(run[0], *task, self._known(work), run, given) for run in runs]

    def _ask(self, number: int, *task: Any) -> Any:
        places = [self._places[number]]
        return self._client.submit(*task, workers=places, allow_other_workers=True, pure=False)

    def _known(self, work: Work) -> Any:
        if self._work is None or self._work[0] is not work:
            self._carry([work])
            self._work = (work, self._client.submit(partitions.given, work, pure=False))
        return self._work[1]

    def _given(self, shared: tuple[Any, ...], tasks: int) -> Any:
        """What tasks share: for many of them the result of one, which workers take from each other, or make again."""
        if tasks <= FAN_IN:
            self._carry([shared] * tasks)
            return shared
        self._carry([shared])
        return self._client.submit(partitions.given, shared, pure=False)

    def _carry(self, values: Iterable[Any]) -> None:
        """Count what goes to or comes from this process."""
        self._carried += sum(map(self._dask.sizeof, values))

    def results(self, futures: Iterable[Any]) -> list[Any]:
        """Of tasks, in order."""
        found: list[Any] = self._client.gather(list(futures))
        self._carry(found)
        return found

    def gather(self, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Results of calls that are about no part, in order."""
        self._carry(calls)
        return self.results(self._client.submit(function, *call, pure=False) for call in calls)

    def shuffle(
        self, work: Work, calls: Sequence[tuple[Table, range | None]], axis_rows: int | None, batch: Batch
    ) -> Callable[[], None]:
        """Begin to have the interactions of a batch of pieces of tables put on storage by parts.

        What it returns waits for the end. Of two batches, workers take the later one where the earlier has no work.
        """
        options = {"pure": False, "fifo_timeout": "0s"}
        begun = [
            self._client.submit(partitions.rows, work, *call, axis_rows, **options) for call in calls[slice(*batch)]
        ]
        frame = self._dask.frames.from_delayed(begun, meta=partitions.no_rows(), verify_meta=False)
        split = frame.shuffle("part", npartitions=len(work.bounds) - 1, ignore_index=True)
        put = split.map_partitions(partitions.put_all, work, batch, meta=pd.DataFrame({"part": np.empty(0, np.int32)}))
        future = self._client.compute(put, fifo_timeout="0s")

        def wait() -> None:
            future.result()
            self._client.run(partitions.release, on_error="ignore")

        return wait

    def memory(self) -> list[int]:
        """Bytes that each worker may take; 0 where it has no limit."""
        self.present()
        return [one["memory_limit"] or 0 for one in self._client.scheduler_info(n_workers=-1)["workers"].values()]

    def room(self, backend: str) -> int:
        """Bytes that features may take on any worker."""
        found = self._client.run(partitions.room, backend, on_error="ignore")  # of those that are not lost meanwhile
        if not found:
            self.present()
            found = self._client.run(partitions.room, backend)
        return int(min(found.values()))

    def _arrange(self, work: Work) -> list[range]:
        """Runs of neighbouring parts, each of one worker; a lost one's go to others, and new ones get a share.

        In turn, so that parts are written in about their order, in which they are hashed; where there are many, as many
        at a time as are joined first, so that few of their results travel.
        """
        there, count = self.present(), len(work.bounds) - 1
        if self._arranged != (there, count):
            length = run_length(count, len(there))
            runs = [range(first, min(first + length, count)) for first in range(0, count, length)]
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
            self._arranged, self._runs = (there, count), runs
        return self._runs


def run_length(parts: int, workers: int) -> int:
    """Neighbouring parts that one task is about: the highest power of 2 that leaves workers about even shares."""
    even = EVEN * parts / workers
    lengths = [1 << power for power in range(parts.bit_length() + 1)]
    most = {length: min(parts, length * math.ceil(math.ceil(parts / length) / workers)) for length in lengths}
    return max((length for length in lengths if most[length] <= even), default=1)


@contextmanager
def _silence() -> Iterator[None]:
    """Inside, Dask does not log in this process: what matters is told as the job's own errors are."""
    names = [name for name in logging.root.manager.loggerDict if name.split(".")[0] in ("distributed", "tornado")]
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def _cluster(config: JobConfig, progress: Progress) -> Iterator[Workers]:
    """Join the scheduler, or start one here, and let its failures be told."""
    dask = _Dask()
    address, cluster = config.scheduler, None
    options = {
        "distributed.scheduler.work-stealing": False,  # parts stay where they are kept
        "distributed.comm.timeouts.connect": "10s",
        "dataframe.shuffle.method": "tasks",
        "dataframe.convert-string": False,  # what a frame holds as objects are arrays
        # of a cluster that is started here: else all that is freed goes back at once, and is faulted in anew
        "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": None,
    }
    with _silence(), dask.options(options):
        try:
            if address == "local":
                cluster = select(config.backend).local_cluster(dashboard_address="127.0.0.1:0", silence_logs=50)
            client = dask.Client(cluster if address == "local" else address, timeout="10s", set_as_default=False)
        except (OSError, ValueError) as error:
            raise InputError(f"--scheduler {address}: no scheduler answers there ({one_line(error)}).") from None
        there = client.scheduler.address
        try:
            where = "started here" if cluster is not None else "joined"
            progress.say(f"scheduler {there} {where}; dashboard {client.dashboard_link}")
            workers = Workers(dask, client)
            yield workers
            workers.forget()
        except dask.KilledWorker as error:
            raise ResourceError(
                f"workers died of a task, one after another ({one_line(error)}), for want of memory most often:"
                " give them more, or more of them, and run again with --resume."
            ) from None
        except (CancelledError, dask.CommClosedError, TimeoutError) as error:
            raise ResourceError(
                f"the scheduler at {there} is lost ({one_line(error)}); run again with --resume."
            ) from None
        finally:
            client.close(timeout=5)
            if cluster is not None:
                cluster.close(timeout=5)


def _run(config: JobConfig, workers: Workers, progress: Progress) -> str:
    started = datetime.now(UTC)
    with progress.step("fingerprint inputs"):
        inputs = inputs_of(config)
    check_inputs(config, inputs.files)
    theirs = workers.facts(config.backend)
    progress.say(f"{len(workers.present())} workers, backend {theirs['name']}")
    identity = identity_of(config, inputs.files, theirs["name"])
    identity["program"]["distributed"] = True
    with open_staging(config.out, resume=config.resume, overwrite=config.overwrite, identity=identity) as staging:
        if not has_work(config, staging, progress):
            return config.out
        files = [one["path"] for one in inputs.files if not is_url(one["path"])]
        workers.require_sight([os.path.abspath(path) for path in (staging.path, *files)])
        work = Work(config, theirs["name"], "numpy", uuid.uuid4().hex, staging.path)
        with ExitStack() as adopted:
            run = _Run(config, workers, progress, staging, work, adopted)
            counts = run.read()
            embedding = run.behaviour() if config.settings.cluster_on == "interactions" else None
            statistics = {name: run.modality(name) for name in config.features}
            with progress.step("hash vectors"):
                adopted.close()
        save_ids(staging, counts.user_ids, counts.item_ids)
        inputs.require_unchanged()
        theirs = workers.facts(config.backend, run.work.kernels, run.reading_kernels)
        manifest = manifest_of(config, inputs.files, theirs, counts, statistics)
        if embedding is not None:
            manifest["interactions"]["embedding"] = embedding
        slices = {name: len(bounds) - 1 for name, bounds in run.work.columns.items()}
        manifest["cluster"] = {"workers": len(workers.present()), "parts": len(run.work.bounds) - 1, "slices": slices}
        return staging.commit({**manifest, "timings": timings_of(started, progress, run.backend)})


@functools.cache
def _of_this_process(kernels: str) -> Backend:
    return select("cpu").with_kernels(kernels)


class _Run:
    """A run's steps, in the order of `job`.

    What was begun to be hashed is left to the end, as the steps after it need it not.
    """

    def __init__(
        self,
        config: JobConfig,
        workers: Workers,
        progress: Progress,
        staging: Staging,
        work: Work,
        adopted: ExitStack,
    ) -> None:
        self.config, self.workers, self.progress = config, workers, progress
        self.staging, self.work = staging, work
        self._adopted = adopted
        self._tables: dict[str, FeatureTable] = {}
        self._masks: dict[str, Any] = {}
        self._rows: dict[str, Any] = {}
        self._warm: dict[str, list[int]] = {}
        self._pairs = 0
        self.reading_kernels = work.kernels

    @property
    def backend(self) -> Backend:
        """Of this process, which adds up what workers give."""
        return _of_this_process(self.work.kernels)

    @contextmanager
    def _step(self, name: str, **measures: Any) -> Iterator[Step]:
        """See `Progress.step`; what is carried meanwhile is noted."""
        before = self.workers.traffic()
        with self.progress.step(name, **measures) as step:
            yield step
            step.cost(carried_bytes=max(0, self.workers.traffic() - before))

    # Read.

    def read(self) -> Counts:
        """Check the inputs, and have R stored by parts."""
        config, progress = self.config, self.progress
        self._tables, present = read_features(config, progress)
        axis = item_axis_of(self._tables)
        with self._step("read interactions", unit="row") as step:
            counts = self._store(axis, step)
            seconds = job_seconds(config, self._tables, (counts.users, counts.items, counts.pairs))
            self.work = replace(self.work, kernels=kernels_for(seconds))
            step.note(users=counts.users, items=counts.items, pairs=counts.pairs)
        for name, table in self._tables.items():
            self._rows[name] = None if table.ids is None else feature_rows(table, axis, counts.item_ids)
            self._masks[name] = features.align_mask(present[name], self._rows[name], counts.items)
        self._place_features()
        for name in config.features:
            self._warm[name] = self.workers.map(partitions.warm, self.work, name)
            method_clusters.check_warm(name, int(self._masks[name].sum()), sum(self._warm[name]), config.settings)
        return counts

    def _store(self, axis: ItemAxis, step: Any) -> Counts:
        config, workers = self.config, self.workers
        paths = expand(config.interactions, EXTENSIONS)
        if any(path.endswith(".npz") for path in paths):
            return self._store_matrix(axis, step)
        columns, warnings = columns_of(config), list[str]()
        tables = [open_table(path if is_url(path) else os.path.abspath(path), columns, warnings) for path in paths]
        for line in warnings:
            self.progress.warn(line)
        self.reading_kernels = kernels_for(
            reading_seconds(stated_rows(config.interactions), text_bytes(config.interactions))
        )
        self.work = replace(self.work, kernels=self.reading_kernels)
        calls = pieces(tables, PIECE_ROWS, MOST_PIECES)
        known = [table.whole for table in tables if table.whole is not None]
        numbered = len(known) == len(tables) and isinstance(config.users, int) and axis.rows is not None
        if numbered and config.where is None:
            found, read, kept = [], sum(known), sum(known)  # no need to look before all are brought together
        else:
            found = workers.gather(partitions.find, [(self.work, *call, axis.rows) for call in calls])
            read, kept = sum(one.read for one in found), sum(one.kept for one in found)
        step.advance(read)
        require_kept(config.interactions, read, kept)
        users, user_ids = self._users([one.users for one in found])
        items, item_ids = axis.rows, None
        if items is None:
            distinct = partitions.distinct(*(one.items for one in found))
            _, items, item_ids = item_axis(distinct, config.interactions, axis)
        for name, ids in (("users", user_ids), ("items", item_ids)):
            if ids is not None:
                self.staging.save_table(f"{SCRATCH}/{name}.parquet", pd.DataFrame({"id": ids}))
        self.work = replace(self.work, bounds=_bounds(users, kept), items=items)
        parts = (self.staging.finished("parts") or {}).get("parts")
        if parts is None:
            make_folder(self.work.path(SCRATCH))
            parts = self._shuffled(calls, axis.rows)
            require_unchanged(tables)
            self.staging.finish("parts", {"parts": parts})
        self._pairs, weight = sum(one["pairs"] for one in parts), sum(one["weight"] for one in parts)
        return Counts(users, user_ids, items, item_ids, read, kept, self._pairs, weight)

    def _store_matrix(self, axis: ItemAxis, step: Any) -> Counts:
        """The same of scipy's .npz, which this process reads whole."""
        config, staging = self.config, self.staging
        users, columns = users_of(config, self.backend), columns_of(config)
        table = read_interactions(self.backend, config.interactions, columns, axis, users, step.advance)
        step.advance(table.read)
        counts, self.reading_kernels = Counts.of(table), table.kernels
        self.work = replace(self.work, bounds=_bounds(counts.users, counts.kept), items=counts.items)
        self._pairs = counts.pairs
        if staging.finished("parts") is None:
            make_folder(self.work.path(SCRATCH))
            for number, (first, last) in enumerate(itertools.pairwise(self.work.bounds)):
                part = table.interactions.some(self.backend, np.arange(first, last))
                partitions.put_part(self.work, number, part.csr)
            staging.finish("parts", {})
        return counts

    def _shuffled(self, calls: list[tuple[Table, range | None]], axis_rows: int | None) -> list[Any]:
        """What `partitions.store` gives of each part, its interactions brought together batch by batch."""
        staging, workers = self.staging, self.workers
        done = [(first, last) for first, last in (staging.finished("batches") or {}).get("batches", [])]
        before: tuple[Batch, Callable[[], None]] | None = None
        for batch in itertools.chain(self._batches(done[-1][1] if done else 0, len(calls)), [None]):
            begun = None if batch is None else (batch, workers.shuffle(self.work, calls, axis_rows, batch))
            if before is not None:
                _ = self.backend  # loaded while workers are busy
                before[1]()
                done.append(before[0])
                staging.finish("batches", {"batches": done})
            before = begun
        return workers.map(partitions.store, self.work, calls[0][0], done)

    def _batches(self, first: int, count: int) -> Iterator[Batch]:
        """From some piece on, of so many; by the memory of the workers that are there when one begins."""
        while first < count:
            last = min(first + _batch_size(count, self.workers.memory()), count)
            yield first, last
            first = last

    def _users(self, found: list[Any]) -> tuple[int, Any]:
        """U, and the ids of the rows where these are found by them."""
        if isinstance(self.config.users, int):
            return self.config.users, None
        listed = users_of(self.config, self.backend)
        _, count, ids = user_axis(partitions.distinct(*found), self.config.interactions, listed)
        tell_gaps(self.config, ids, self.progress)
        return count, ids

    def _place_features(self) -> None:
        """Put each modality where workers map it: the file itself where it is as they need it."""
        settings, staging = self.config.settings, self.staging
        places = {}
        for name, table in self._tables.items():
            staging.save(f"{SCRATCH}/{name}.present.npy", self._masks[name])
            values, path = table.values, os.path.realpath(expand(table.path, features.EXTENSIONS)[0])
            as_it_is = values.dtype == np.float32 and values.flags.c_contiguous and path.endswith(".npy")
            if settings.dim is None and table.ids is None and as_it_is and not is_url(table.path):
                places[name] = path
                continue
            kept = f"{name}/items.npy" if settings.dim is not None else f"{SCRATCH}/{name}.npy"
            if staging.finished(kept) is None:
                with self._step(f"place {name}" if settings.dim is None else f"project {name}"):
                    modality = features.align(
                        self.backend, table, self._masks[name], self._rows[name], exact=settings.dim is not None
                    )
                    if settings.dim is not None:
                        projection = method_projection.fit_projection(
                            self.backend, modality, settings.dim, settings.whiten
                        )
                        modality = method_projection.project(self.backend, modality, projection)
                        staging.save(f"{name}/items_mask.npy", self._masks[name])
                    staging.save(kept, modality.values)
                staging.finish(kept, {})
            places[name] = os.path.join(staging.path, kept)
        self.work = replace(self.work, features=places)
        self._cut_features()
        if settings.weighting == "sym":
            degrees = self.workers.total(partitions.item_sums, self.work)
            for name, mask in self._masks.items():
                factors = mask.astype(np.float64) * power(np, degrees, -0.5)
                staging.save(f"{name}/item_factors.npy", factors)

    def _cut_features(self) -> None:
        """Have features that do not fit into a worker's memory cut into slices of columns that do."""
        staging, workers = self.staging, self.workers
        room = workers.room(self.work.backend)
        for name, path in self.work.features.items():
            items, width = np.load(path, mmap_mode="r").shape
            bounds = column_bounds(items, width, room)
            if len(bounds) == 2:
                continue
            kept = f"{SCRATCH}/{name}.columns"
            before = (staging.finished(kept) or {}).get("bounds")
            self.work = replace(self.work, columns={**self.work.columns, name: bounds})
            if before == list(bounds):
                continue
            with self._step(f"cut {name}") as step:
                step.note(slices=len(bounds) - 1)
                for first, last in itertools.pairwise(bounds):
                    relpath = os.path.relpath(partitions.slice_path(self.work, name, first), staging.path)
                    staging.allocate(relpath, (items, last - first), np.float32)
                rows = max(1, CUT_BYTES // (4 * width))
                calls = [(self.work, name, part.start, part.stop) for part in ranges(items, rows)]
                workers.gather(partitions.cut, calls)
            staging.finish(kept, {"bounds": list(bounds)})

    # Users by what they did.

    def behaviour(self) -> dict[str, Any]:
        """Cluster users on their interactions, for all modalities; returns what the manifest says of the embedding."""
        backend, settings, staging, work, workers = (
            self.backend,
            self.config.settings,
            self.staging,
            self.work,
            self.workers,
        )
        items, labels = f"{INTERACTIONS}/items.npy", f"{INTERACTIONS}/labels.npy"
        if staging.finished(items) is None:
            with self._step("embed interactions") as step:
                graph = _PartitionedGraph(staging, workers, work, self._pairs)
                embedding = spectral.fit(backend, graph, settings.cluster_rank or method_clusters.RANK, settings.seed)
                facts = {"products": embedding.products, "settled": embedding.settled}
                step.note(rank=len(embedding.singular_values), **facts)
            for name in ("items", "item_factors", "singular_values"):
                staging.save(f"{INTERACTIONS}/{name}.npy", getattr(embedding, name))
            staging.finish(items, facts)
        if staging.finished(INTERACTIONS) is None:
            counts = workers.map(partitions.placed, work)
            with self._step("cluster interactions") as step:
                offset = np.zeros(staging.load(items).shape[1])
                found, choice, sizes = self._fit(Rows(INTERACTIONS, "tiled", offset), counts)
                step.note(clusters=len(found.centroids), passes=len(found.inertia))
            staging.save(f"{INTERACTIONS}/centroids.npy", found.centroids)
            staging.allocate(labels, (work.bounds[-1],), np.int32)
            with staging.adopting(labels):
                workers.map(partitions.label_interactions, work, found.centroids)
            facts = kmeans_facts(found, choice, sizes, "interactions", settings.tolerance, self.progress)
            staging.finish(INTERACTIONS, facts)
        return embedding_facts(staging)

    def _fit(self, rows: Rows, counts: Sequence[int]) -> tuple[kmeans.Clusters, Choice | None, list[int]]:
        """K-means on points of which parts have so many; how K was chosen; how many have each label."""
        backend, settings = self.backend, self.config.settings
        choice, clusters = None, settings.clusters
        if clusters == AUTO:
            choice = choose(backend, Partitioned(backend, self.workers, self.work, rows, counts), settings.seed)
            clusters = choice.clusters
        assert isinstance(clusters, int)
        if rows.name == INTERACTIONS:
            method_clusters.check_placed(sum(counts), clusters)
        form = self._form(rows, sum(counts), clusters)
        points = Partitioned(backend, self.workers, self.work, replace(rows, form=form), counts)
        found = kmeans.fit(backend, points, clusters, settings.seed, settings.restarts, settings.tolerance)
        return found, choice, [int(count) for count in points.counts]

    def _form(self, rows: Rows, count: int, clusters: int) -> str:
        """See `method.kmeans_form`; from features in slices no rows are made but a few."""
        if rows.name in self.work.columns:
            return "factored"
        sizes = (count, self.work.items, self._pairs, clusters, len(rows.offset))
        return method_points.kmeans_form(*sizes, self.config.memory)

    # Fit and write.

    def modality(self, name: str) -> dict[str, Any]:
        """Cluster, and have every user's row written; returns the modality's part of the manifest."""
        settings, staging, workers, work = self.config.settings, self.staging, self.workers, self.work
        values = np.load(work.features[name], mmap_mode="r")
        present = self._masks[name]
        modality = Modality(name, values, present, int(present.sum()))
        facts, fitted = self._cluster(modality)
        users, clusters, width = work.bounds[-1], len(fitted.centroids), values.shape[1]
        labelled = staging.finished(f"{name}/labels")
        if labelled is None:
            with self._step(f"label {name}"):
                staging.allocate(f"{name}/labels.npy", (users,), np.int32)
                with staging.adopting(f"{name}/labels.npy"):
                    sizes, shares = workers.total(partitions.label, work, fitted)
            labelled = {"sizes": sizes.tolist(), "shares": shares.tolist()}
            staging.finish(f"{name}/labels", labelled)
        cold = method_clusters.mean_global(
            self.backend, np.array(labelled["shares"]), sum(self._warm[name]), fitted.centroids
        )
        fitted = replace(fitted, cold=cold)
        staging.save(f"{name}/cold.npy", cold)
        fitted, lam = self._lambda(modality, fitted)
        fitted = replace(fitted, scale=self._scale(modality, fitted))
        staging.allocate(f"{name}/users.npy", (users, width), np.dtype(settings.dtype))
        with self._step(f"write {name}", total=users, unit="user") as step:
            written = self._write(fitted, step)
        with self._step(f"sample {name}"):
            some = functools.partial(self._some, modality, fitted)
            arrays = described(self.backend, modality, fitted.centroids, sum(self._warm[name]), some, settings.seed)
            for part, array in arrays.items():
                staging.save(f"{name}/{part}.npy", array)
        item_labels = fitted.item_labels
        return modality_facts(
            self.backend,
            modality,
            fitted.centroids,
            users,
            labelled["sizes"],
            None if item_labels is None else cluster_sizes(item_labels, clusters),
            {**facts, "source_width": self._tables[name].values.shape[1]},
            norm_statistics(written),
            fitted.scale,
            lam,
        )

    def _cluster(self, modality: Modality) -> tuple[dict[str, Any], Fitted]:
        """Centroids, and labels of items where these are clustered; found or taken from the run that is resumed."""
        name, settings, staging, backend = modality.name, self.config.settings, self.staging, self.backend
        facts = staging.finished(f"{name}/clusters")
        if facts is None:
            offset = method_points.mean_item(backend, modality.values, modality.present)
            rows, item_labels = Rows(name, "tiled", offset), None
            if settings.cluster_on == "interactions":
                facts = staging.finished(INTERACTIONS) or {}
                centroids = self._shared_centroids(rows, sum(self._warm[name]))
            else:
                with self._step(f"cluster {name}") as step:
                    if settings.cluster_on == "users":
                        found, choice, sizes = self._fit(rows, self._warm[name])
                    else:
                        found, choice, item_labels = method_clusters.cluster_items(backend, modality, settings)
                        sizes = cluster_sizes(found.labels, len(found.centroids))
                    step.note(clusters=len(found.centroids), passes=len(found.inertia))
                facts = kmeans_facts(found, choice, sizes, f"modality {name}", settings.tolerance, self.progress)
                centroids = found.centroids
            staging.save(f"{name}/centroids.npy", centroids)
            if item_labels is not None:
                staging.save(f"{name}/item_labels.npy", item_labels)
            staging.finish(f"{name}/clusters", facts)
        on_items = settings.cluster_on == "items"
        item_labels = np.array(staging.load(f"{name}/item_labels.npy")) if on_items else None
        form = {"users": facts["kmeans"]["form"], "items": "factored"}.get(settings.cluster_on, SHARED)
        return facts, Fitted(name, form, np.array(staging.load(f"{name}/centroids.npy")), item_labels)

    def _shared_centroids(self, rows: Rows, warm: int) -> Any:
        """Of the clusters that all modalities have, see `method.of_behaviour`."""
        clusters = len(self.staging.load(f"{INTERACTIONS}/centroids.npy"))
        rows = replace(rows, form=self._form(rows, warm, clusters))
        sums, counts = self.workers.total_sums(partitions.sums_of_labels, 0, self.work, rows, clusters)
        return method_clusters.behaviour_means(self.backend, sums, counts, rows.offset)

    def _lambda(self, modality: Modality, fitted: Fitted) -> tuple[Fitted, Any]:
        """The clusters with the policy's tau, and what the manifest says of lambda."""
        settings, name, key = self.config.settings, modality.name, f"{modality.name}/lambda"
        if settings.lam not in POLICIES:
            return fitted, settings.lam
        facts = self.staging.finished(key)
        if facts is None:
            facts = {"temperature": TEMPERATURE if settings.temperature is None else settings.temperature}
            with self._step(f"weigh {name}"):
                if settings.lam == "shrink":
                    facts = {"tau": settings.tau} if settings.tau is not None else self._tau(modality)
                fitted = replace(fitted, tau=facts.get("tau"))
                parts = self.workers.map(partitions.lambdas, self.work, fitted)
                values, counts = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
            facts = {"policy": settings.lam, **facts, **lambda_statistics(values, counts)}
            self.staging.finish(key, facts)
        return replace(fitted, tau=facts.get("tau")), facts

    def _tau(self, modality: Modality) -> dict[str, Any]:
        """See `blend.shrink_tau`."""
        workers, work, name = self.workers, self.work, modality.name
        found = Volumes(*workers.total(partitions.volumes, work, name))
        centre = tau_centre(self.backend, modality, found)
        sums = workers.total(partitions.variances, work, name, centre)
        return tau_of(found, centre, sums, lambda: np.concatenate(workers.map(partitions.warm_counts, work, name)))

    def _scale(self, modality: Modality, fitted: Fitted) -> float:
        if self.config.settings.scale != "items":
            return 1.0
        facts = self.staging.finished(f"{modality.name}/scale")
        if facts is None:
            with self._step(f"measure {modality.name}"):
                users = norm_statistics(self.workers.map(partitions.measure, self.work, fitted))["mean"]
            items = item_norms(self.backend, modality)["mean"]
            facts = {"scale": items / users if items > 0 and users > 0 else 1.0}
            self.staging.finish(f"{modality.name}/scale", facts)
        return float(facts["scale"])

    def _write(self, fitted: Fitted, step: Any) -> list[NormSums]:
        """Have the parts written that an earlier run did not write; gives the norms of all."""
        key, bounds = f"{fitted.name}/written", self.work.bounds
        done = {int(number): NormSums(*sums) for number, sums in (self.staging.finished(key) or {}).items()}
        there = self._adopted.enter_context(self.staging.adopting(f"{fitted.name}/users.npy"))
        for number, sums in self.workers.each(partitions.write, self.work, set(done), fitted):
            done[number] = sums
            self.staging.finish(key, {str(one): list(found) for one, found in done.items()})
            step.advance(bounds[number + 1] - bounds[number])
            there(next((bounds[one] for one in range(len(bounds) - 1) if one not in done), bounds[-1]))
        return [done[number] for number in range(len(bounds) - 1)]

    def _some(self, modality: Modality, fitted: Fitted, numbers: Any) -> tuple[Interactions, Blend]:
        """See `describe.Some`."""
        own = {part: (index,) for part, index in _by_part(self._warm[modality.name], numbers)}
        parts = self.workers.results(self.workers.submit(partitions.drawn, self.work, (fitted,), own).values())

        def joined(key: str) -> Any:
            arrays = [part[key] for part in parts]
            return None if any(array is None for array in arrays) else np.concatenate(arrays)

        lengths = np.concatenate([np.diff(part["indptr"]) for part in parts])
        weights = [
            np.ones(len(part["indices"]), np.float32) if part["weights"] is None else part["weights"] for part in parts
        ]
        every = None if all(part["weights"] is None for part in parts) else np.concatenate(weights)
        items, columns = np.unique(joined("indices"), return_inverse=True)  # features of other items are not looked at
        csr = Csr(np.concatenate([[0], np.cumsum(lengths)]), columns.astype(np.int32), every)
        values = read_rows(self.work.features[modality.name], items)
        path = os.path.join(self.staging.path, f"{modality.name}/item_factors.npy")
        mask = modality.present[items]
        present = mask.astype(np.float64)
        factors = np.load(path, mmap_mode="r")[items] if os.path.exists(path) else present
        plan = Blend(
            Modality(modality.name, values, mask, int(mask.sum())),
            Weighting(joined("local_rows"), factors, joined("mean_rows"), present),
            self.config.settings.lam if parts[0]["lam"] is None else joined("lam"),
            fitted.centroids,
            joined("labels"),
            None if fitted.item_labels is None else fitted.item_labels[items],
            fitted.cold,
            fitted.scale,
        )
        return Interactions(csr, len(items)), plan


def _bounds(users: int, kept: int) -> tuple[int, ...]:
    """First user of each part, and U, from the number of interactions: multiples of `NORM_ROWS`."""
    parts = min(max(LEAST_PARTS, -(-kept // PART_ROWS)), MOST_PARTS)
    step = max(1, -(-users // (parts * NORM_ROWS))) * NORM_ROWS
    return (*range(0, users, step), users)


def column_bounds(items: int, width: int, room: int) -> tuple[int, ...]:
    """First column of each slice of features (I, D) float32 that ``room`` bytes hold, and D; whole cache lines."""
    most = room // (4 * items)
    step = width if most >= width else max(1, most // LINE_VALUES) * LINE_VALUES
    return (*range(0, width, step), width)


def _batch_size(count: int, memory: Sequence[int]) -> int:
    """Pieces, of so many, that are brought together at a time; ``memory``: bytes of each worker."""
    held = int(sum(memory) * BATCH_SHARE) // (SHUFFLE_BYTES * PIECE_ROWS)
    return max(BATCH_PIECES * len(memory), min(held, count // BATCHES))


def _by_part(counts: Sequence[int], numbers: Any) -> Iterator[tuple[int, Any]]:
    """Numbers (n,) ascending among the rows of all parts, by part and as numbers among the part's own."""
    ends = np.cumsum(counts)
    cuts = np.searchsorted(numbers, ends)
    start = 0
    for part, stop in enumerate(cuts):
        if stop > start:
            yield part, numbers[start:stop] - (ends[part] - counts[part])
        start = stop


class Partitioned:
    """See `kmeans.Clusterable`: rows by parts, of which the workers are asked."""

    def __init__(self, backend: Backend, workers: Workers, work: Work, rows: Rows, warm: Sequence[int]) -> None:
        self.backend = backend
        self.form = rows.form
        self.counts: Any = None  # rows of each label in the last step
        self.workers, self._work, self._rows, self._warm = workers, work, rows, warm

    def __len__(self) -> int:
        return sum(self._warm)

    @property
    def offset(self) -> Any:
        """See `Points.offset`."""
        return self._rows.offset

    def rows(self, index: Any) -> Any:
        """See `Points.rows`."""
        order = np.argsort(index, kind="stable")
        calls = {part: (numbers,) for part, numbers in _by_part(self._warm, np.asarray(index)[order])}
        out = np.empty((len(index), len(self.offset)))
        if calls:
            futures = self.workers.submit(partitions.some_rows, self._work, (self._rows,), calls)
            start = 0
            for future in futures.values():
                (found,) = self.workers.results([future])
                out[order[start : start + len(found)]] = found
                start += len(found)
        return out

    def step(self, centroids: Any) -> method_points.Step:
        """See `Points.step`: labels stay with the rows."""
        inertia, self.counts = self.workers.total(partitions.step, self._work, self._rows, centroids)

        def sums() -> Any:
            return self.workers.total_sums(partitions.sums, 0, self._work, self._rows, centroids)[0]

        return method_points.Step(inertia, self.counts, None, sums)

    def far(self, centroids: Any, count: int) -> tuple[Any, Any]:
        """See `Points.far`."""
        found = self.workers.map(partitions.far, self._work, self._rows, centroids, count)
        firsts = np.concatenate([[0], np.cumsum(self._warm)])
        rows = np.concatenate([rows + first for (rows, _), first in zip(found, firsts[:-1], strict=True)])
        reached = np.concatenate([reached for _, reached in found])
        order = np.argsort(-reached, kind="stable")[:count]
        return rows[order], reached[order]


class _PartitionedGraph:
    """See `spectral.Graph`; what is larger than a part's answer goes by the staging folder."""

    def __init__(self, staging: Staging, workers: Workers, work: Work, pairs: int) -> None:
        self.items, self.pairs = work.items, pairs
        self._staging, self._workers, self._work = staging, workers, work

    def item_sums(self) -> Any:
        """See `Graph.item_sums`."""
        return self._workers.total(partitions.item_sums, self._work)

    def large(self, most: int) -> Any:
        """See `Graph.large`."""
        labels = self._workers.total(partitions.components, self._work, join=spectral.joined_labels)
        found = self._workers.total(partitions.component_sizes, self._work, labels)
        return spectral.large_labels(labels, found, most)

    def keep(self, kept: Any) -> int:
        """See `Graph.keep`."""
        self._staging.save(f"{SCRATCH}/kept.npy", kept)
        return int(self._workers.total(partitions.active, self._work))

    def product(self, table: Any) -> Any:
        """See `Graph.product`."""
        path = f"{SCRATCH}/table.npy"
        self._staging.save(path, table)
        return self._workers.total(partitions.product, self._work, path)
