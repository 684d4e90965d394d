"""Where a job runs: what reads its inputs and opens the users in parts. A `LocalSite` is one process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from gpu_init.artifact.staging import Staging
from gpu_init.backend.interface import Backend
from gpu_init.backend.select import for_work
from gpu_init.budget import Sizes, block_bytes, require_room
from gpu_init.config import JobConfig
from gpu_init.inputs.axes import ItemAxis
from gpu_init.inputs.interactions import read as read_interactions
from gpu_init.inputs.read import (
    Counts,
    Features,
    Source,
    columns_of,
    job_seconds,
    prepare_kernels,
    tell_gaps,
    users_of,
)
from gpu_init.inputs.tables import stated_rows, text_bytes
from gpu_init.manifest import backend_facts
from gpu_init.memory import require as require_memory
from gpu_init.method.matrix import ROW_BYTES, Interactions
from gpu_init.method.modality import Modality
from gpu_init.parts import LocalParts, Parts, Plan, Process, part_bounds
from gpu_init.show.progress import Progress


@dataclass(frozen=True)
class Data:
    """All inputs, read and checked.

    Attributes
    ----------
    counts : Counts
        Of the interactions.
    sources : dict of str to Source
        Each modality's features by item.
    backend : Backend
        Of this process, with the kernels that suit the work.
    interactions : Interactions or None
        R, where it lies in this process.
    """

    counts: Counts
    sources: dict[str, Source]
    backend: Backend
    interactions: Interactions | None = None

    @property
    def matrix(self) -> Interactions:
        """R, in this process."""
        assert self.interactions is not None, "a cluster's workers have R"
        return self.interactions

    @property
    def masks(self) -> dict[str, Any]:
        """Which items (I,) have each modality."""
        return {name: source.mask for name, source in self.sources.items()}


class Site(Protocol):
    """Where a job runs: this process, or a cluster."""

    backend_name: str

    def check(self, paths: Iterable[str]) -> None:
        """Refuse a site that does not see the input files and the staging folder."""

    def read(self, config: JobConfig, found: Features, axis: ItemAxis, progress: Progress, staging: Staging) -> Data:
        """Read the interactions."""

    def parts(self, config: JobConfig, data: Data, staging: Staging) -> Parts:
        """Open the users in parts."""

    def facts(self, data: Data, parts: Parts) -> dict[str, Any]:
        """What the manifest says of the site: ``backend``, and ``cluster`` where there is one."""


class LocalSite:
    """A job in one process."""

    def __init__(self, backend: Backend) -> None:
        self.backend_name = backend.name
        self._backend = backend

    def check(self, paths: Iterable[str]) -> None:
        """Every file of this process is here."""

    def read(
        self,
        config: JobConfig,
        found: Features,
        axis: ItemAxis,
        progress: Progress,
        staging: Staging | None,
        candidates: int = 1,
    ) -> Data:
        """Read the interactions into memory; ``candidates``: how many settings will be tried on them."""
        backend = self._backend
        rows, size = stated_rows(config.interactions), text_bytes(config.interactions)
        prepare_kernels(config, backend, found, rows, size)
        users, columns = users_of(config, backend), columns_of(config)
        if isinstance(users, int):
            require_memory(f"users {users}", users * ROW_BYTES)
        known = 0 if users is None else users if isinstance(users, int) else len(users)
        items = axis.rows or max(len(table.values) for table in found.tables.values())
        expected = Sizes(known, items, 0 if columns.where else rows)
        require_room(config, found.tables, expected, staging, reading=True)
        with progress.step("read interactions", unit="row") as step:
            table = read_interactions(backend, config.interactions, columns, axis, users, step.advance)
            sizes = Sizes(table.interactions.users, table.interactions.items, table.interactions.pairs)
            step.note(users=sizes.users, items=sizes.items, pairs=sizes.pairs)
        for line in table.warnings:
            progress.warn(line)
        tell_gaps(config, table.user_ids, progress)
        seconds = job_seconds(config.settings, found, (sizes.users, sizes.items, sizes.pairs), candidates)
        backend = for_work(backend, seconds)
        progress.say(f"kernels: {table.kernels} to read, {backend.kernels.name} to fit")
        require_room(config, found.tables, sizes, staging)
        sources = found.placed(axis, table.item_ids, sizes.items)
        return Data(Counts.of(table), sources, backend, table.interactions)

    def parts(self, config: JobConfig, data: Data, staging: Staging) -> Parts:
        counts = data.counts
        bounds = part_bounds(counts.users, counts.kept)
        plan = Plan(config.settings, bounds, counts.items, counts.pairs, block_bytes(config, counts.users))
        source = LocalSource(data.backend, plan, data.matrix, data.sources, staging)
        return LocalParts(Process(data.backend, plan, staging.arrays(), source))

    def facts(self, data: Data, parts: Parts) -> dict[str, Any]:  # noqa: ARG002
        return {"backend": backend_facts(data.backend, data.counts.kernels)}


class LocalSource:
    """R and the features in the memory of this process; projected items come from the store."""

    def __init__(
        self, backend: Backend, plan: Plan, interactions: Interactions, sources: Mapping[str, Source], staging: Staging
    ) -> None:
        self._backend, self._plan, self._staging = backend, plan, staging
        self._interactions, self._sources = interactions, sources

    def part(self, number: int) -> Interactions:
        return self._interactions.rows(*self._plan.bounds[number : number + 2])

    def modality(self, name: str) -> Modality:
        source = self._sources[name]
        if self._plan.settings.dim is None:
            return source.aligned(self._backend)
        values = self._backend.asarray(self._staging.load(f"{name}/items.npy"))
        return Modality(name, values, self.present(name), int(source.mask.sum()))

    def present(self, name: str) -> Any:
        return self._backend.asarray(self._sources[name].mask)
