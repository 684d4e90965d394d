"""A Dask cluster as the site of a job: `run` and `assign` over its workers."""

from __future__ import annotations

import itertools
import os
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from gpu_init.artifact.read import Artifact
from gpu_init.artifact.staging import Staging
from gpu_init.assign import assign_at
from gpu_init.backend.interface import Backend
from gpu_init.backend.select import select
from gpu_init.budget import Sizes, block_bytes, require_room
from gpu_init.cluster import shuffle
from gpu_init.cluster.connection import connected
from gpu_init.cluster.shuffle import Batch, Reading
from gpu_init.cluster.worker import SCRATCH, Work
from gpu_init.cluster.workers import ClusterParts, Workers
from gpu_init.config import JobConfig
from gpu_init.errors import InputError
from gpu_init.files.remote import is_url
from gpu_init.files.storage import expand, make_folder
from gpu_init.inputs import features
from gpu_init.inputs.axes import ItemAxis, item_axis, user_axis
from gpu_init.inputs.interactions import read as read_interactions
from gpu_init.inputs.interactions import require_kept, require_unchanged
from gpu_init.inputs.read import Counts, Features, Source, check_places, columns_of, job_seconds, tell_gaps, users_of
from gpu_init.inputs.tables import EXTENSIONS, Table, open_table, pieces, stated_rows, text_bytes
from gpu_init.kernels import kernels_for
from gpu_init.kernels.costs import reading_seconds
from gpu_init.method.matrix import Interactions
from gpu_init.parts import Parts, Plan, part_bounds
from gpu_init.run import run_at
from gpu_init.show.progress import Progress, Step
from gpu_init.site import Data


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
        As in `gpu_init.run.run`; or workers lack something; or the scheduler is lost: what was done can be resumed.
    """
    if config.settings.kmeans == "cuml":
        raise InputError("kmeans cuml runs in one process, and this run is over Dask; leave it out, or take own.")
    return _over_cluster(config, progress, lambda site, told: run_at(site, config, told))


def assign(source: Artifact, config: JobConfig, given: Collection[str], progress: Progress) -> str:
    """Make vectors with an artifact's clusters over a cluster; see `gpu_init.assign.assign`, and `run` for the rest."""
    return _over_cluster(config, progress, lambda site, told: assign_at(site, source, config, given, told))


def _over_cluster(config: JobConfig, progress: Progress, work: Callable[[ClusterSite, Progress], str]) -> str:
    check_places(config)
    if is_url(config.out):
        raise InputError(
            f"{config.out}: over a cluster, workers write the output together; name a folder they all see."
        )
    with connected(config, progress) as (dask, client):
        workers = Workers(dask, client, uuid.uuid4().hex)
        try:
            workers.begin()
            site = ClusterSite(config, workers)
            progress.say(f"{len(workers.present())} workers, backend {site.backend_name}")
            return work(site, _Carrying(progress, workers))
        finally:
            workers.end()


class _Carrying(Progress):
    """A run's progress, whose steps also tell how many bytes travelled."""

    def __init__(self, progress: Progress, workers: Workers) -> None:
        super().__init__(None)
        self.timings = progress.timings
        self.say, self.warn, self.error = progress.say, progress.warn, progress.error  # type: ignore[method-assign]
        self._progress, self._workers = progress, workers

    @contextmanager
    def step(self, name: str, total: int | None = None, unit: str = "") -> Iterator[Step]:
        before = self._workers.traffic()
        with self._progress.step(name, total, unit) as step:
            yield step
            step.cost(carried_bytes=max(0, self._workers.traffic() - before))


class ClusterSite:
    """A cluster's workers as a `Site`."""

    def __init__(self, config: JobConfig, workers: Workers) -> None:
        self._workers, self._backend = workers, config.backend
        self.backend_name = str(workers.facts(config.backend)["name"])

    def check(self, paths: Iterable[str]) -> None:
        self._workers.require_sight([os.path.abspath(path) for path in paths if not is_url(path)])

    def read(self, config: JobConfig, found: Features, axis: ItemAxis, progress: Progress, staging: Staging) -> Data:
        with progress.step("read interactions", unit="row") as step:
            reader = _Reader(self._workers, self.backend_name, config, axis, progress, staging)
            counts = reader.read(step)
            step.note(users=counts.users, items=counts.items, pairs=counts.pairs)
        kernels = kernels_for(job_seconds(config.settings, found, (counts.users, counts.items, counts.pairs)))
        progress.say(f"kernels: {counts.kernels} to read, {kernels} to fit")
        sizes = Sizes(counts.users, counts.items, counts.pairs)
        require_room(config, found.tables, sizes, staging, workers=self._workers.memory())
        sources = found.placed(axis, counts.item_ids, counts.items)
        return Data(counts, sources, select("cpu").with_kernels(kernels))

    def parts(self, config: JobConfig, data: Data, staging: Staging) -> Parts:
        counts = data.counts
        bounds = part_bounds(counts.users, counts.kept)
        plan = Plan(config.settings, bounds, counts.items, counts.pairs, block_bytes(config, counts.users))
        places = {
            name: _place_features(config, data.backend, staging, name, source) for name, source in data.sources.items()
        }
        kernels = data.backend.kernels.name
        work = Work(self._workers.run, self.backend_name, kernels, staging.path, plan, places)
        return ClusterParts(self._workers, work, data.backend, data.masks, staging)

    def facts(self, data: Data, parts: Parts) -> dict[str, Any]:
        backend = self._workers.facts(self._backend, data.backend.kernels.name, data.counts.kernels)
        return {"backend": backend, "cluster": {"workers": len(self._workers.present()), "parts": parts.plan.parts}}


def _place_features(config: JobConfig, backend: Backend, staging: Staging, name: str, source: Source) -> str:
    """Put a modality where workers map it, and return the path: the file itself where it is as they need it."""
    staging.save(f"{SCRATCH}/{name}.present.npy", source.mask)
    if config.settings.dim is not None:
        return os.path.join(staging.path, f"{name}/items.npy")
    table = source.table
    path = os.path.realpath(expand(table.path, features.EXTENSIONS)[0])
    as_it_is = table.values.dtype == np.float32 and table.values.flags.c_contiguous and path.endswith(".npy")
    if table.ids is None and as_it_is and not is_url(table.path):
        return path
    kept = f"{SCRATCH}/{name}.npy"
    if staging.finished(kept) is None:
        staging.save(kept, source.aligned(backend).values)
        staging.finish(kept, {})
    return os.path.join(staging.path, kept)


class _Reader:
    """Reads the interactions by the workers, into parts of R in the staging folder."""

    def __init__(
        self,
        workers: Workers,
        backend: str,
        config: JobConfig,
        axis: ItemAxis,
        progress: Progress,
        staging: Staging,
    ) -> None:
        self._workers, self._config, self._axis = workers, config, axis
        self._progress, self._staging = progress, staging
        self._own = select("cpu")  # what this process reads itself: listed users, and a matrix
        seconds = reading_seconds(stated_rows(config.interactions), text_bytes(config.interactions))
        self._work = Work(workers.run, backend, kernels_for(seconds), staging.path, self._plan((0, 0), 0))
        make_folder(self._work.scratch(""))

    def _plan(self, bounds: tuple[int, ...], items: int) -> Plan:
        return Plan(self._config.settings, bounds, items, 0, 0)

    def read(self, step: Step) -> Counts:
        """Have the parts of R stored, unless an earlier run has; returns what was read."""
        config, axis, staging = self._config, self._axis, self._staging
        paths = expand(config.interactions, EXTENSIONS)
        if any(path.endswith(".npz") for path in paths):
            return self._read_matrix(step)
        columns, warnings = columns_of(config), list[str]()
        tables = [open_table(path if is_url(path) else os.path.abspath(path), columns, warnings) for path in paths]
        for line in warnings:
            self._progress.warn(line)
        calls = pieces(tables, shuffle.PIECE_ROWS, shuffle.MOST_PIECES)
        found, read, kept = self._find(tables, calls)
        step.advance(read)
        require_kept(config.interactions, read, kept)
        users, user_ids = self._users([one.users for one in found])
        items, item_ids = axis.rows, None
        if items is None:
            distinct = shuffle.distinct(*(one.items for one in found))
            _, items, item_ids = item_axis(distinct, config.interactions, axis)
        for name, ids in (("users", user_ids), ("items", item_ids)):
            if ids is not None:
                staging.save_table(f"{SCRATCH}/{name}.parquet", pd.DataFrame({"id": ids}))
        work = replace(self._work, plan=self._plan(part_bounds(users, kept), items))
        reading = Reading(work, config, axis.rows)
        parts = (staging.finished("parts") or {}).get("parts")
        if parts is None:
            done = self._shuffled(reading, calls)
            parts = self._workers.map(shuffle.assemble_part, work, (reading, calls[0][0], done))
            require_unchanged(tables)
            staging.finish("parts", {"parts": parts})
        pairs, weight = sum(one["pairs"] for one in parts), sum(one["weight"] for one in parts)
        return Counts(users, user_ids, items, item_ids, read, kept, pairs, weight, work.kernels)

    def _find(
        self, tables: list[Table], calls: list[tuple[Table, range | None]]
    ) -> tuple[list[shuffle.Found], int, int]:
        """What each piece holds, and rows before and after ``where``; pieces are not read where the files tell."""
        known = [table.whole for table in tables if table.whole is not None]
        numbered = isinstance(self._config.users, int) and self._axis.rows is not None
        if len(known) == len(tables) and numbered and self._config.where is None:
            return [], sum(known), sum(known)
        found = self._workers.find(Reading(self._work, self._config, self._axis.rows), calls)
        return found, sum(one.read for one in found), sum(one.kept for one in found)

    def _read_matrix(self, step: Step) -> Counts:
        """The same of scipy's .npz, which this process reads whole."""
        config, staging = self._config, self._staging
        users, columns = users_of(config, self._own), columns_of(config)
        table = read_interactions(self._own, config.interactions, columns, self._axis, users, step.advance)
        step.advance(table.read)
        counts = Counts.of(table)
        work = replace(self._work, plan=self._plan(part_bounds(counts.users, counts.kept), counts.items))
        if staging.finished("parts") is None:
            bounds = work.plan.bounds
            for number in range(work.plan.parts):
                users_of_part = np.arange(bounds[number], bounds[number + 1])
                part: Interactions = table.interactions.some(self._own, users_of_part)
                shuffle.put_part(work, number, part.csr)
            staging.finish("parts", {})
        return counts

    def _shuffled(self, reading: Reading, calls: list[tuple[Table, range | None]]) -> list[Batch]:
        """Bring the interactions together by part, batch by batch, but for batches that an earlier run has finished."""
        staging, workers = self._staging, self._workers
        done = [(first, last) for first, last in (staging.finished("batches") or {}).get("batches", [])]
        before: tuple[Batch, Callable[[], None]] | None = None
        for batch in itertools.chain(shuffle.batches(done[-1][1] if done else 0, len(calls), workers.memory), [None]):
            begun = None if batch is None else (batch, workers.shuffle(reading, calls, batch))
            if before is not None:
                before[1]()
                done.append(before[0])
                staging.finish("batches", {"batches": done})
            before = begun
        return done

    def _users(self, found: list[Any]) -> tuple[int, Any]:
        """U, and the ids of the rows where these are found by them."""
        if isinstance(self._config.users, int):
            return self._config.users, None
        listed = users_of(self._config, self._own)
        _, count, ids = user_axis(shuffle.distinct(*found), self._config.interactions, listed)
        tell_gaps(self._config, ids, self._progress)
        return count, ids
