"""The whole run on one page: read, fit, write.

Inputs are checked before any work; each modality is then fitted and its users written block by block through
one fused kernel call each. What is done is recorded in the staging folder, and a resumed run skips it.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pandas as pd

from . import features, method, spectral
from .artifact import INTERACTIONS, Artifact, Staging, check_modality
from .backend import Backend, for_work, select
from .blend import Blend, Weighting, item_norms, norms
from .choose import Choice
from .config import JobConfig, Settings, settings_to_dict
from .describe import describe
from .errors import InputError, ResourceError
from .features import FeatureTable, Modality
from .ids import is_text
from .interactions import (
    EXTENSIONS,
    ROW_BYTES,
    TEXT_EXTENSIONS,
    Columns,
    InteractionTable,
    ItemAxis,
    positions,
    read,
    read_user_ids,
    stated_rows,
    text_bytes,
)
from .kernels import forced_kernels, kernels_for
from .kernels.costs import fitting_seconds, reading_seconds
from .kernels.threads import leaving_a_core
from .kmeans import Clusters, needed_bytes, sample_sizes
from .memory import require as require_memory
from .objects import open_staging
from .progress import Progress
from .remote import is_url
from .storage import expand, file_state, fingerprint, real_path, require_utf8
from .version import __version__
from .where import parse

BLOCK_BYTES = 32 << 20  # of memory for the blocks on their way out, unless --memory asks for less; fits caches
_LINE_BYTES = 32  # of an interaction in a text file, about
OPERATOR_BYTES = {"mean": 8, "sym": 16}  # of memory for each user of a modality, by weighting: row factors
USER_EXTENSIONS = (".parquet", ".pq", ".txt", *TEXT_EXTENSIONS)


def run(config: JobConfig, progress: Progress) -> str:
    """Run a job and give the path of its artifact.

    Raises
    ------
    InputError
        The input or the settings are wrong; nothing is left behind.
    ResourceError
        Not enough memory or disk, or the device failed; what was done can be resumed.
    """
    check_places(config)
    backend = select(config.backend)
    backend.say = progress.say
    with backend.explained():
        return _run(config, backend, progress)


def _run(config: JobConfig, backend: Backend, progress: Progress) -> str:
    started = datetime.now(UTC)
    progress.say(f"backend {backend.name}: {backend.why}")
    with progress.step("fingerprint inputs"):
        inputs = inputs_of(config)
    check_inputs(config, inputs.files)
    identity = identity_of(config, inputs.files, backend.name)
    with open_staging(config.out, resume=config.resume, overwrite=config.overwrite, identity=identity) as staging:
        if not has_work(config, staging, progress):
            return config.out
        data = read_inputs(config, backend, progress, staging)
        backend = data.backend
        projected = {}
        shared = None
        if config.settings.cluster_on == "interactions":
            shared = _behaviour(config, backend, data, staging, progress)
        if config.settings.dim is not None:  # all of them first: one that cannot be projected ends the job
            projected = {name: _project(config, backend, data, name, staging, progress) for name in data.sources}
        statistics = {
            name: _run_modality(
                config, backend, data, projected.get(name) or data.modality(backend, name), shared, staging, progress
            )
            for name in data.sources
        }
        save_ids(staging, data.table.user_ids, data.table.item_ids)
        inputs.require_unchanged()
        facts = backend_facts(backend, data.table.kernels)
        manifest = manifest_of(config, inputs.files, facts, Counts.of(data.table), statistics)
        if shared is not None:
            manifest["interactions"]["embedding"] = embedding_facts(staging)
        return staging.commit({**manifest, "timings": timings_of(started, progress, backend)})


def has_work(config: JobConfig, staging: Staging, progress: Progress) -> bool:
    """Say how a run begins; False where what it would make is there."""
    if staging.complete:
        progress.say(f"{config.out} is already there, made from the same inputs and settings")
    elif staging.resumed:
        progress.say(f"going on with the unfinished run in {staging.path}")
    if staging.discarded:
        progress.say("an unfinished run was discarded; --resume would have gone on with it")
    return not staging.complete


def embedding_facts(staging: Staging) -> dict[str, Any]:
    """What the manifest says of what places users by what they did."""
    path = f"{INTERACTIONS}/items.npy"
    items, values = staging.load(path), staging.load(f"{INTERACTIONS}/singular_values.npy")
    outside = int((staging.load(f"{INTERACTIONS}/item_factors.npy") == 0).sum())
    facts = staging.finished(path) or {}
    return {"rank": items.shape[1], "singular_values": values.tolist(), "items_outside": outside, **facts}


@dataclass(frozen=True)
class Inputs:
    """Every input file with its size and content hash, and the size and time of the last change of each path."""

    files: list[dict[str, Any]]
    states: dict[str, tuple[int, int]]

    def require_unchanged(self) -> None:
        """Refuse inputs that changed since."""
        for path, state in self.states.items():
            if file_state(path) != state:
                raise InputError(f"{path}: changed while the job ran; run again when it is complete.")


def timings_of(started: datetime, progress: Progress, backend: Backend) -> dict[str, Any]:
    """What the manifest says of a run's time and memory."""
    ended = datetime.now(UTC)
    return {
        "started": started.isoformat(timespec="seconds"),
        "finished": ended.isoformat(timespec="seconds"),
        "seconds": round((ended - started).total_seconds(), 3),
        "steps": progress.timings,
        "peak_memory_bytes": _peak_memory(),
        **backend.peak_memory(),
    }


@dataclass(frozen=True)
class Source:
    """One modality's features as read and checked; which items have it; where its rows stand among them."""

    table: FeatureTable
    mask: Any
    rows: Any


@dataclass(frozen=True)
class Data:
    """All inputs, checked. Features are taken to the device one modality at a time.

    ``backend``: with the kernels that suit what is to be done with them.
    """

    backend: Backend
    table: InteractionTable
    sources: dict[str, Source]
    operators: dict[str, Weighting]

    def modality(self, backend: Backend, name: str, exact: bool = False) -> Modality:
        """Features of a modality, on the device."""
        source = self.sources[name]
        return features.align(backend, source.table, source.mask, source.rows, exact=exact)


def check_places(config: JobConfig) -> None:
    """Refuse names of modalities that the artifact needs itself, and an output inside a folder of inputs."""
    for name in config.features:
        check_modality(name)
    out = real_path(config.out)
    require_utf8(out)
    users = [config.users] if isinstance(config.users, str) else []
    for pattern in (config.interactions, *config.features.values(), *users):
        root = real_path(pattern)
        if out != root and out.startswith(f"{root}/") and (is_url(out) or os.path.isdir(pattern)):
            raise InputError(
                f"{config.out} is inside {pattern}, whose files are input, and would be read as such later;"
                " choose another output."
            )


def check_inputs(config: JobConfig, inputs: list[dict[str, Any]]) -> None:
    """Refuse an output whose files are inputs too."""
    out = real_path(config.out)
    for one in inputs:
        path = real_path(one["path"])
        if path == out or path.startswith(f"{out}/"):
            raise InputError(f"{config.out} is the output, but {one['path']} is an input; choose another output.")


# Read.


def read_inputs(
    config: JobConfig, backend: Backend, progress: Progress, staging: Staging | None = None, candidates: int = 1
) -> Data:
    """Read and check everything, so that bad input ends the job before any work.

    ``candidates``: settings that will be tried.
    """
    tables, present = read_features(config, progress)
    data = _read_interactions(config, backend, tables, present, progress, staging, candidates=candidates)
    for name, source in data.sources.items():
        method.check_clusters(name, int(source.mask.sum()), data.operators[name], config.settings)
    return data


def read_features(config: JobConfig, progress: Progress) -> tuple[dict[str, FeatureTable], dict[str, Any]]:
    """Features as files hold them, and which of their rows are there."""
    tables: dict[str, FeatureTable] = {}
    present: dict[str, Any] = {}
    for name, path in config.features.items():
        with progress.step(f"read features {name}") as step:
            tables[name] = features.read(name, path, config.item_column)
            present[name] = features.check(tables[name].values, f"{path} (modality {name})")
            rows, width = tables[name].values.shape
            if config.settings.dim is not None and config.settings.dim > width:
                raise InputError(
                    f"{path}: dim {config.settings.dim} is above the {width} dimensions of modality {name}."
                )
            step.note(items=rows, width=width, missing=rows - int(present[name].sum()))
    return tables, present


def _read_interactions(
    config: JobConfig,
    backend: Backend,
    tables: Mapping[str, FeatureTable],
    present: Mapping[str, Any],
    progress: Progress,
    staging: Staging | None,
    source: Artifact | None = None,
    candidates: int = 1,
) -> Data:
    """Interactions among the items of the features, or of the artifact that the features are those of."""
    rows, size = stated_rows(config.interactions), text_bytes(config.interactions)
    prepare_kernels(config, backend, tables, rows, size)
    users, columns = users_of(config, backend), columns_of(config)
    if isinstance(users, int):
        require_memory(f"users {users}", users * ROW_BYTES)
    axis = item_axis_of(tables)
    if source is not None and axis.rows is None:
        axis = ItemAxis(None, [source.item_ids])
    known = 0 if users is None else users if isinstance(users, int) else len(users)
    items = axis.rows or max(len(table.values) for table in tables.values())
    pairs = 0 if columns.where else rows
    _require_room(config, tables, _Sizes(known, items, pairs), staging, reading=True)
    with progress.step("read interactions", unit="row") as step:
        table = read(backend, config.interactions, columns, axis, users, step.advance)
        step.note(users=table.interactions.users, items=table.interactions.items, pairs=table.interactions.pairs)
    for line in table.warnings:
        progress.warn(line)
    tell_gaps(config, table.user_ids, progress)
    sizes = (table.interactions.users, table.interactions.items, table.interactions.pairs)
    backend = for_work(backend, job_seconds(config, tables, sizes, candidates))
    progress.say(f"kernels: {table.kernels} to read, {backend.kernels.name} to fit")
    sources, operators = {}, {}
    for name, found in tables.items():
        places = None if found.ids is None else feature_rows(found, axis, table.item_ids)
        mask = features.align_mask(present[name], places, table.interactions.items)
        sources[name] = Source(found, mask, places)
        factors = None
        if source is not None and source[name].item_factors is not None:
            factors = backend.asarray(_on_axis(source, table, source[name].item_factors, 0.0))
        operators[name] = method.weighting(
            backend, table.interactions, backend.asarray(mask), config.settings.weighting, factors
        )
    matrix = table.interactions
    _require_room(config, tables, _Sizes(matrix.users, matrix.items, matrix.pairs), staging)
    return Data(backend, table, sources, operators)


def prepare_kernels(
    config: JobConfig, backend: Backend, tables: Mapping[str, FeatureTable], rows: int, size: int
) -> None:
    """Begin to compile what the job will use, as far as the sizes of its files tell: rows, and bytes of text files."""
    pairs = max(rows, size // _LINE_BYTES)
    items = max(len(table.values) for table in tables.values())
    fitting = job_seconds(config, tables, (0, items, pairs))
    reads, fits = (kernels_for(seconds) == "numba" for seconds in (reading_seconds(rows, size), fitting))
    if reads or fits:
        backend.prepare(reads, fits, config.settings.cluster_on == "interactions")


def job_seconds(
    config: JobConfig, tables: Mapping[str, FeatureTable], sizes: tuple[int, int, int], candidates: int = 1
) -> float:
    """See `costs.fitting_seconds`; ``sizes``: users, items and pairs."""
    settings = config.settings
    widths = [settings.dim or table.values.shape[1] for table in tables.values()]
    return fitting_seconds(*sizes, widths, settings.clusters, settings.cluster_on == "interactions", candidates)


def columns_of(config: JobConfig) -> Columns:
    """Which columns of the interactions hold what."""
    return Columns(
        config.user_column,
        config.item_column,
        config.weight_column,
        parse(config.where) if config.where else None,
        config.session_column,
        config.time_column,
        config.half_life,
    )


def users_of(config: JobConfig, backend: Backend) -> int | Any | None:
    """U, the ids of the rows (pandas Series), or None, as `interactions.read` takes them."""
    if isinstance(config.users, str):
        return read_user_ids(backend, config.users, config.session_column or config.user_column)
    return config.users


def tell_gaps(config: JobConfig, user_ids: Any, progress: Progress) -> None:
    """Say where whole numbers were not taken for row numbers."""
    if user_ids is not None and config.users is None and not is_text(str(user_ids.dtype)):
        progress.say("user ids have gaps: rows follow the sorted ids, in users.parquet; --users N makes ids the rows")


# Room.


@dataclass(frozen=True)
class _Sizes:
    """Rows of R, its columns and its entries; 0 where that is not known yet."""

    users: int
    items: int
    pairs: int


def _require_room(
    config: JobConfig,
    tables: Mapping[str, FeatureTable],
    sizes: _Sizes,
    staging: Staging | None,
    *,
    reading: bool = False,
) -> None:
    """Refuse a run that has too little memory or disk before it; ``reading``: R is still to be read.

    Raises
    ------
    ResourceError
        What is needed at least, and what is free.
    """
    if staging is not None:
        outputs = sum(_output_bytes(config, table, sizes) for table in tables.values())
        staging.require_room(outputs + _embedding_bytes(config, sizes))
    beside = max(_beside_bytes(config, table, sizes) for table in tables.values())
    what = f"{sizes.users:,} users, {sizes.items:,} items, {sizes.pairs:,} interactions"
    if config.memory is not None and beside > config.memory:
        raise ResourceError(
            f"{what}: {beside:,} bytes of memory are needed beside interactions and features, --memory gives"
            f" {config.memory:,}; give it that, or leave it out."
        )
    needed = beside + max(_copied_bytes(config, table, sizes) for table in tables.values())
    if reading:
        needed += sizes.users * ROW_BYTES + sizes.pairs * (4 if config.weight_column is None else 8)
    require_memory(what, needed)


def _output_bytes(config: JobConfig, table: FeatureTable, sizes: _Sizes) -> int:
    """Of a modality's arrays in the artifact."""
    settings = config.settings
    width = settings.dim or table.values.shape[1]
    by_user = 4 + width * np.dtype(settings.dtype).itemsize
    by_item = (4 if settings.cluster_on == "items" else 0) + (4 * width + 1 if settings.dim else 0)
    return sizes.users * by_user + sizes.items * by_item + _most_clusters(config, sizes) * width * 4


def _embedding_bytes(config: JobConfig, sizes: _Sizes) -> int:
    """Of what places users by what they did, where that is clustered; it stays in memory, and is an output."""
    if config.settings.cluster_on != "interactions":
        return 0
    rank = config.settings.cluster_rank or method.RANK
    return sizes.items * (4 * rank + 8) + 4 * sizes.users + 4 * _most_clusters(config, sizes) * rank


def _most_clusters(config: JobConfig, sizes: _Sizes) -> int:
    """No more than users: more are refused once these are known."""
    return min(method.most_clusters(config.settings), max(sizes.users, 1))


def _copied_bytes(config: JobConfig, table: FeatureTable, sizes: _Sizes) -> int:
    """Of a modality's features, where they are not mapped as they are."""
    settings, values = config.settings, table.values
    mapped = settings.dim is None and table.ids is None and values.dtype == np.float32 and values.flags.c_contiguous
    return 0 if mapped else 4 * sizes.items * (settings.dim or values.shape[1])


def _beside_bytes(config: JobConfig, table: FeatureTable, sizes: _Sizes) -> int:
    """Most that a modality takes beside R and the features: operators of all modalities, then K-means or blocks."""
    settings = config.settings
    width, clusters = settings.dim or table.values.shape[1], _most_clusters(config, sizes)
    users, items = sizes.users, sizes.items
    blocks = 16 * width * min(users, _block_rows(config, users, width))
    if settings.cluster_on == "users":
        memory = _left(config, users)
        form = method.kmeans_form(users, items, sizes.pairs, clusters, width, memory)
        fitting = needed_bytes(form, users, items, clusters, width)
    elif settings.cluster_on == "interactions":
        rank = settings.cluster_rank or method.RANK
        memory, kept = _left(config, users), _embedding_bytes(config, sizes)
        fitting = spectral.needed_bytes(items, rank)
        for columns in (rank, width):
            form = method.kmeans_form(users, items, sizes.pairs, clusters, columns, memory)
            fitting = max(fitting, kept + needed_bytes(form, users, items, clusters, columns))
        blocks += kept
    else:
        fitting = max(needed_bytes("tiled", items, items, clusters, width), 16 * users + 8 * items * clusters)
    return OPERATOR_BYTES[settings.weighting] * users * len(config.features) + max(fitting, blocks)


def _left(config: JobConfig, users: int) -> int | None:
    """Bytes of ``--memory`` that are left for K-means, then for blocks: all but the operators of all modalities."""
    if config.memory is None:
        return None
    return config.memory - OPERATOR_BYTES[config.settings.weighting] * users * len(config.features)


def _block_rows(config: JobConfig, users: int, width: int) -> int:
    """Rows of a block."""
    left = _left(config, users)
    return method.block_rows(width, BLOCK_BYTES if left is None else min(left, BLOCK_BYTES))


def item_axis_of(tables: Mapping[str, FeatureTable]) -> ItemAxis:
    """What item ids mean: row numbers where any modality is by row, else ids to join on."""
    by_row = {name: len(table.values) for name, table in tables.items() if table.ids is None}
    if not by_row:
        return ItemAxis(None, [table.ids for table in tables.values()])
    (first, rows), *others = by_row.items()
    for name, count in others:
        if count != rows:
            raise InputError(
                f"modality {first} has {rows} rows and {name} {count}: without item ids, row i is item i in each;"
                " give missing items a row of NaN."
            )
    return ItemAxis(rows)


def feature_rows(source: FeatureTable, axis: ItemAxis, item_ids: Any) -> Any:
    """Item row of each row of a feature table that has ids."""
    if axis.rows is None:
        return positions(source.ids, item_ids)
    if is_text(str(source.ids.dtype)):
        raise InputError(f"{source.path}: ids are text, but another modality has no ids, where row i is item i.")
    rows = source.ids.to_numpy(np.int64)
    outside = np.flatnonzero((rows < 0) | (rows >= axis.rows))
    if len(outside):
        raise InputError(
            f"{source.path}: row {outside[0]} is item {rows[outside[0]]},"
            f" beyond the {axis.rows} rows of the modalities without ids, where row i is item i;"
            " give those ids too, or leave the item out."
        )
    return rows


# Fit and write.


def _run_modality(
    config: JobConfig,
    backend: Backend,
    data: Data,
    modality: Modality,
    shared: Shared | None,
    staging: Staging,
    progress: Progress,
) -> dict[str, Any]:
    """Cluster, and write every user's row; returns the modality's part of the manifest."""
    settings, name = config.settings, modality.name
    operator, matrix = data.operators[name], data.table.interactions
    step_rows = _block_rows(config, matrix.users, modality.values.shape[1])
    facts, labels = _cluster(config, backend, data, modality, shared, staging, progress)
    plan = method.fit(backend, matrix, modality, operator, settings, labels, facts.get("scale"), step_rows)
    staging.finish(f"{name}/fit", {**facts, "scale": plan.scale})
    _save_for_assign(backend, plan, settings, staging)
    width_before = data.sources[name].table.values.shape[1]
    return _write(config, backend, data, plan, labels, {**facts, "source_width": width_before}, staging, progress)


def _save_for_assign(backend: Backend, plan: Blend, settings: Settings, staging: Staging) -> None:
    """What `assign` needs besides centroids, labels and items."""
    staging.save(f"{plan.modality.name}/cold.npy", backend.to_host(plan.cold))
    if settings.weighting == "sym":
        staging.save(f"{plan.modality.name}/item_factors.npy", backend.to_host(plan.weighting.local_items))


def _write(
    config: JobConfig,
    backend: Backend,
    data: Data,
    plan: Blend,
    labels: tuple[Any, Any, Any],
    facts: dict[str, Any],
    staging: Staging,
    progress: Progress,
) -> dict[str, Any]:
    """Write every user's row; returns the modality's part of the manifest."""
    modality, matrix, settings = plan.modality, data.table.interactions, config.settings
    name, width = modality.name, modality.values.shape[1]
    step_rows = _block_rows(config, matrix.users, width)
    users = f"{name}/users.npy"
    with progress.step(f"write {name}", total=matrix.users, unit="user") as step:
        writer = staging.rows(users, (matrix.users, width), np.dtype(settings.dtype))

        def write(block: Any) -> None:
            writer.write(block)
            step.advance(len(block))

        outbox = backend.outbox(min(step_rows, matrix.users), width, settings.dtype, write)
        with writer, outbox, leaving_a_core():
            step.advance(writer.done)

            def blocks() -> Iterator[Any]:
                made = method.blocks(
                    backend, matrix, plan, step_rows, settings.dtype, lambda part: outbox.space(part.stop - part.start)
                )
                for part, block in made:
                    yield block  # for its norms; what an earlier run wrote is made again for them alone
                    left = max(writer.done - part.start, 0)
                    if left < len(block):
                        outbox.send(block[left:])

            user_norms = norms(backend, blocks())
    with progress.step(f"sample {name}"):
        for part, array in describe(backend, matrix, plan, settings.seed).items():
            staging.save(f"{name}/{part}.npy", array)
    clusters = len(labels[0])
    sizes = cluster_sizes(backend.to_host(labels[1]), clusters)
    item_sizes = None if labels[2] is None else cluster_sizes(backend.to_host(labels[2]), clusters)
    lam = settings.lam if plan.policy is None else plan.policy
    return modality_facts(
        backend, modality, labels[0], matrix.users, sizes, item_sizes, facts, user_norms, plan.scale, lam
    )


def modality_facts(
    backend: Backend,
    modality: Modality,
    centroids: Any,
    users: int,
    sizes: list[int],
    item_sizes: list[int] | None,
    facts: dict[str, Any],
    user_norms: dict[str, float],
    scale: float,
    lam: Any,
) -> dict[str, Any]:
    """A modality's part of the manifest."""
    items, warm = len(modality.present), sum(sizes)
    return {
        "width": modality.values.shape[1],
        "source_width": facts["source_width"],
        "items": modality.n_present,
        "missing_items": items - modality.n_present,
        "warm_users": warm,
        "cold_users": users - warm,
        "clusters": len(centroids),
        "cluster_sizes": sizes,
        **({} if item_sizes is None else {"item_cluster_sizes": item_sizes}),
        **({"choice": facts["choice"]} if "choice" in facts else {}),
        "kmeans": facts["kmeans"],
        "norms": {
            "users": user_norms,
            "items": item_norms(backend, modality),
            "centroids": norms(backend, iter([centroids])),
        },
        "scale": scale,
        "lambda": lam,
    }


def _project(
    config: JobConfig, backend: Backend, data: Data, name: str, staging: Staging, progress: Progress
) -> Modality:
    """Projected items, worked out or taken from the run that is resumed; an output too."""
    assert config.settings.dim is not None
    items, mask = f"{name}/items.npy", f"{name}/items_mask.npy"
    if staging.finished(items) is None:
        with progress.step(f"project {name}") as step:
            modality = data.modality(backend, name, exact=True)
            projection = features.fit_projection(backend, modality, config.settings.dim, config.settings.whiten)
            values = backend.to_host(features.project(backend, modality, projection).values)
            step.note(width=config.settings.dim)
        staging.save(items, values)
        staging.save(mask, data.sources[name].mask)
        staging.finish(items, {})
    present = data.sources[name].mask
    return Modality(name, backend.asarray(staging.load(items)), backend.asarray(present), int(present.sum()))


def _cluster(
    config: JobConfig,
    backend: Backend,
    data: Data,
    modality: Modality,
    shared: Shared | None,
    staging: Staging,
    progress: Progress,
) -> tuple[dict[str, Any], tuple[Any, Any, Any]]:
    """Centroids, user labels and item labels, found or taken from the run that is resumed."""
    name, on_items = modality.name, config.settings.cluster_on == "items"
    paths = [f"{name}/centroids.npy", f"{name}/labels.npy", *([f"{name}/item_labels.npy"] if on_items else [])]
    facts = staging.finished(f"{name}/fit") or staging.finished(f"{name}/clusters")
    if facts is not None:
        arrays = [backend.asarray(staging.load(path)) for path in paths]
        return facts, (arrays[0], arrays[1], arrays[2] if on_items else None)
    operator, matrix = data.operators[name], data.table.interactions
    memory = _left(config, matrix.users)
    if shared is not None:
        k, facts = shared.clusters, shared.facts
        labels = (*method.of_behaviour(backend, matrix, modality, operator, shared.labels, k, memory), None)
    else:
        with progress.step(f"cluster {name}") as step:
            found = method.clusters(backend, matrix, modality, operator, config.settings, memory)
            step.note(clusters=len(found.centroids), passes=len(found.found.inertia))
        labels = (found.centroids, found.user_labels, found.item_labels)
        what, tolerance = f"modality {name}", config.settings.tolerance
        sizes = _sizes(backend, found.found)
        facts = kmeans_facts(found.found, found.choice, sizes, what, tolerance, progress)
    for path, array in zip(paths, labels, strict=False):
        staging.save(path, backend.to_host(array))
    staging.finish(f"{name}/clusters", facts)
    return facts, labels


def _sizes(backend: Backend, found: Clusters) -> list[int]:
    return cluster_sizes(backend.to_host(found.labels), len(found.centroids))


def kmeans_facts(
    found: Clusters, choice: Choice | None, sizes: list[int], what: str, tolerance: float, progress: Progress
) -> dict[str, Any]:
    """What the manifest says of a clustering, whose clusters have so many rows; warns of those that are empty."""
    clusters = len(found.centroids)
    empty = clusters - np.count_nonzero(sizes)
    if empty:
        progress.warn(f"{what}: {empty} of {clusters} clusters are empty; fewer rows differ")
    facts = {
        "form": found.form,
        "library": found.library,
        "samples": sample_sizes(sum(sizes), clusters, found.centroids.shape[1]),
        "tolerance": tolerance,
        "passes": len(found.inertia),
        "stopped": found.stopped,
        "inertia": found.inertia,
    }
    return {"kmeans": facts, **({} if choice is None else {"choice": asdict(choice)})}


@dataclass(frozen=True)
class Shared:
    """Clusters of all modalities alike: label of each user (U,), how many clusters, what the manifest says of them."""

    labels: Any
    clusters: int
    facts: dict[str, Any]


def _behaviour(config: JobConfig, backend: Backend, data: Data, staging: Staging, progress: Progress) -> Shared:
    """Users clustered by what they did, found or taken from the run that is resumed; an output too."""
    matrix = data.table.interactions
    labels, centroids = f"{INTERACTIONS}/labels.npy", f"{INTERACTIONS}/centroids.npy"
    facts = staging.finished(INTERACTIONS)
    if facts is None:
        embedding = _embedding(config, backend, data, staging, progress)
        with progress.step("cluster interactions") as step:
            found = method.behaviour(backend, matrix, embedding, config.settings, _left(config, matrix.users))
            step.note(clusters=len(found.centroids), passes=len(found.found.inertia))
        staging.save(centroids, backend.to_host(found.centroids))
        staging.save(labels, backend.to_host(found.labels))
        sizes, tolerance = _sizes(backend, found.found), config.settings.tolerance
        facts = kmeans_facts(found.found, found.choice, sizes, "interactions", tolerance, progress)
        staging.finish(INTERACTIONS, facts)
    return Shared(backend.asarray(staging.load(labels)), len(staging.load(centroids)), facts)


def _embedding(
    config: JobConfig, backend: Backend, data: Data, staging: Staging, progress: Progress
) -> spectral.Embedding:
    """What places users by their interactions, found or taken from the run that is resumed; an output too."""
    paths = [f"{INTERACTIONS}/{part}.npy" for part in ("items", "item_factors", "singular_values")]
    facts = staging.finished(paths[0])
    if facts is None:
        with progress.step("embed interactions") as step:
            found = method.embed(backend, data.table.interactions, config.settings)
            facts = {"products": found.products, "settled": found.settled}
            step.note(rank=len(found.singular_values), **facts)
        for path, array in zip(paths, (found.items, found.item_factors, found.singular_values), strict=True):
            staging.save(path, backend.to_host(array))
        staging.finish(paths[0], facts)
    items, item_factors, values = (staging.load(path) for path in paths)
    return spectral.Embedding(backend.asarray(items), backend.asarray(item_factors), np.asarray(values), **facts)


# New users and new interactions, among an artifact's clusters.


def assign(source: Artifact, config: JobConfig, given: Collection[str], progress: Progress) -> str:
    """Make vectors of users as a job did, with its centroids, degrees of items, tau, scale and cold vector.

    Users with the interactions that they had in the job get the vectors that they got there; nothing is clustered.

    Parameters
    ----------
    source : Artifact
        Of the job.
    config : JobConfig
        The job's settings and columns, the new interactions and the new output; features where the job found them, or
        where ``given`` names them.
    given : collection of str
        Modalities whose features were given and need not be those of the job.
    progress : Progress

    Returns
    -------
    str
        Path of the new artifact, which more can be assigned by.

    Raises
    ------
    InputError
        As in `run`; the features are not those of the job; or the artifact is one that cannot be assigned by.
    ResourceError
        As in `run`.
    """
    check_places(config)
    _check_source(source, config, given)
    backend = select(config.backend)
    backend.say = progress.say
    with backend.explained():
        return _assign(source, config, given, backend, progress)


def _check_source(source: Artifact, config: JobConfig, given: Collection[str]) -> None:
    if real_path(config.out) == source.path:
        raise InputError(f"{config.out} is the artifact itself; choose another output.")
    for name in config.features:
        if name not in source:
            raise InputError(f"{source.path} has no modality {name}; it has {', '.join(source)}.")
        if name in given and source[name].items is not None:
            raise InputError(f"modality {name}: {source.path} holds its projected items; leave --features out.")
        if source[name].cold is None:
            raise InputError(f"{source.path} was made before there was assign, and lacks cold.npy; run its job again.")


def _assign(source: Artifact, config: JobConfig, given: Collection[str], backend: Backend, progress: Progress) -> str:
    started = datetime.now(UTC)
    progress.say(f"backend {backend.name}: {backend.why}")
    projected = config.settings.dim is not None
    with progress.step("fingerprint inputs"):
        read = inputs_of(config, () if projected else None)
    inputs = list(read.files)
    before = [one for one in source.manifest["inputs"] if one["for"].startswith("features.")]
    if projected:
        inputs += before
    else:
        _recognise(source, before, inputs, given, progress)
    check_inputs(config, inputs)
    identity = {
        **identity_of(config, inputs, backend.name),
        "artifact": source.manifest["checksum"],
    }
    with open_staging(config.out, resume=config.resume, overwrite=config.overwrite, identity=identity) as staging:
        if staging.complete:
            progress.say(f"{config.out} is already there, made from the same inputs and artifact")
            return config.out
        tables, present = _projected_features(source) if projected else read_features(config, progress)
        for table in tables.values():
            _check_shape(source, table)
        data = _read_interactions(config, backend, tables, present, progress, staging, source)
        backend = data.backend
        shared = None if source.interactions is None else _assign_behaviour(source, backend, data, staging, progress)
        statistics = {
            name: _assign_modality(source, config, backend, data, name, shared, staging, progress) for name in tables
        }
        save_ids(staging, data.table.user_ids, data.table.item_ids)
        read.require_unchanged()
        facts = backend_facts(backend, data.table.kernels)
        manifest = manifest_of(config, inputs, facts, Counts.of(data.table), statistics)
        if shared is not None:
            manifest["interactions"]["embedding"] = source.manifest["interactions"].get("embedding")
        origin = {"path": source.path, "checksum": source.manifest["checksum"]}
        return staging.commit({**manifest, "assigned_by": origin, "timings": timings_of(started, progress, backend)})


def _recognise(
    source: Artifact,
    before: list[dict[str, Any]],
    inputs: list[dict[str, Any]],
    given: Collection[str],
    progress: Progress,
) -> None:
    """Know the features again by their content."""
    for name in source:
        old, new = ([one for one in files if one["for"] == f"features.{name}"] for files in (before, inputs))
        if [(one["bytes"], one["hash"]) for one in old] == [(one["bytes"], one["hash"]) for one in new]:
            continue
        was, now = (", ".join(one["path"] for one in files) for files in (old, new))
        if name not in given:
            raise InputError(
                f"features of modality {name}: {now} has changed since {source.path} was made from it.\n"
                f"Give the old ones with --features {name}=PATH, or run the job again."
            )
        progress.warn(f"features of modality {name}: {now} is not, byte for byte, {was} that the job read")


def _projected_features(source: Artifact) -> tuple[dict[str, FeatureTable], dict[str, Any]]:
    """The artifact's own projected items, as if they were features with the items' ids."""
    tables = {
        name: FeatureTable(name, f"{source.path}/{name}/items.npy", np.asarray(one.items), source.item_ids)
        for name, one in source.items()
    }
    return tables, {name: np.asarray(one.items_mask) for name, one in source.items()}


def _check_shape(source: Artifact, table: FeatureTable) -> None:
    """Refuse features given that cannot be those of the job."""
    width = source[table.name].centroids.shape[1]
    if table.values.shape[1] != width:
        raise InputError(f"{table.path}: {table.values.shape[1]} dimensions, but the job's had {width}.")
    items = source.manifest["items"]["rows"]
    if (table.ids is None or source.item_ids is None) and len(table.values) > items:
        raise InputError(f"{table.path}: {len(table.values)} rows, but the job had {items} items.")
    if source.item_ids is not None and (table.ids is None or not _known(table.ids, source.item_ids)):
        raise InputError(f"{table.path}: its items are not those of the job; run the job again to take new items in.")


def _known(ids: Any, among: Any) -> bool:
    try:
        positions(ids, among)
    except InputError:
        return False
    return True


def _on_axis(source: Artifact, table: InteractionTable, values: Any, missing: float) -> Any:
    """Values of the artifact's items at the items of a table of interactions, which may have more."""
    if source.item_ids is None:
        return np.asarray(values)
    placed = np.full((table.interactions.items, *values.shape[1:]), missing, values.dtype)
    placed[positions(source.item_ids, table.item_ids)] = values
    return placed


def _assign_behaviour(source: Artifact, backend: Backend, data: Data, staging: Staging, progress: Progress) -> Any:
    """Label of each user (U,), in all modalities, by where the artifact places what they did."""
    old = source.interactions
    assert old is not None
    with progress.step("assign interactions"):
        items, factors = (_on_axis(source, data.table, array, 0.0) for array in (old.items, old.item_factors))
        matrix = data.table.interactions
        points = spectral.points(backend, matrix, backend.asarray(items), backend.asarray(factors))
        labels = method.behaviour_labels(backend, matrix, points, backend.asarray(old.centroids))
    saved = {
        "items": items,
        "item_factors": factors,
        "singular_values": old.singular_values,
        "centroids": old.centroids,
    }
    for part, array in {**saved, "labels": backend.to_host(labels)}.items():
        staging.save(f"{INTERACTIONS}/{part}.npy", np.asarray(array))
    return labels


def _assign_modality(
    source: Artifact,
    config: JobConfig,
    backend: Backend,
    data: Data,
    name: str,
    shared: Any,
    staging: Staging,
    progress: Progress,
) -> dict[str, Any]:
    """Label by the artifact's centroids, and write every user's row; returns the modality's part of the manifest.

    ``shared``: labels of users (U,) in all modalities, where they go by what users did.
    """
    old, facts, settings = source[name], source.manifest["modalities"][name], config.settings
    operator, matrix = data.operators[name], data.table.interactions
    modality = data.modality(backend, name)
    centroids = backend.asarray(old.centroids)
    item_labels = None
    if old.item_labels is not None:
        item_labels = backend.asarray(_on_axis(source, data.table, old.item_labels, -1))
    if shared is not None:
        labels = (centroids, backend.xp.where(operator.warm, shared, -1).astype("int32"), None)
    else:
        with progress.step(f"assign {name}"):
            form = facts["kmeans"]["form"] if item_labels is None else "factored"
            labels = (centroids, method.nearest(backend, matrix, modality, operator, centroids, form), item_labels)
    if settings.lam == "shrink":
        settings = replace(settings, tau=facts["lambda"]["tau"])
    step_rows = _block_rows(config, matrix.users, modality.values.shape[1])
    cold = backend.asarray(old.cold)
    plan = method.fit(backend, matrix, modality, operator, settings, labels, facts["scale"], step_rows, cold)
    for part, array in zip(("centroids", "labels", "item_labels"), labels, strict=True):
        if array is not None:
            staging.save(f"{name}/{part}.npy", backend.to_host(array))
    if old.items is not None:
        staging.save(f"{name}/items.npy", backend.to_host(modality.values))
        staging.save(f"{name}/items_mask.npy", data.sources[name].mask)
    _save_for_assign(backend, plan, settings, staging)
    kept = {key: facts[key] for key in ("kmeans", "source_width", "choice") if key in facts}
    return _write(config, backend, data, plan, labels, kept, staging, progress)


def _peak_memory() -> int:
    """Most bytes that were resident. Not `ru_maxrss` where Linux tells: that includes the process that started this."""
    with suppress(OSError), open("/proc/self/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def cluster_sizes(labels: Any, clusters: int) -> list[int]:
    """Rows of each label, on the host; negative labels are no cluster's."""
    return [int(size) for size in np.bincount(labels[labels >= 0], minlength=clusters)]


def save_ids(staging: Staging, user_ids: Any, item_ids: Any) -> None:
    """users.parquet and items.parquet, where rows are not the ids."""
    for path, kind, column in (("users.parquet", "user_id", user_ids), ("items.parquet", "item_id", item_ids)):
        if column is not None:
            rows = np.arange(len(column), dtype=np.int64)
            staging.save_table(path, pd.DataFrame({"row": rows, kind: column.to_numpy()}))


# What the manifest says.


def inputs_of(config: JobConfig, feature_names: Iterable[str] | None = None) -> Inputs:
    """Every input file; of the features, those named, or all."""
    named = [("interactions", path) for path in _tables(config.interactions, EXTENSIONS)]
    for name in config.features if feature_names is None else feature_names:
        pattern = config.features[name]
        named += [(f"features.{name}", path) for path in expand(pattern, features.EXTENSIONS)]
    if isinstance(config.users, str):
        named += [("users", path) for path in _tables(config.users, USER_EXTENSIONS)]
    states = {path: file_state(path) for _, path in named}  # before they are hashed
    return Inputs([{"for": role, "path": path, **fingerprint(path)} for role, path in named], states)


def _tables(pattern: str, extensions: tuple[str, ...]) -> list[str]:
    """Files of a pattern; one named outright too must end in what says how to read it."""
    paths = expand(pattern, extensions)
    unknown = next((path for path in paths if not path.endswith(extensions)), None)
    if unknown is not None:
        raise InputError(f"{unknown}: cannot tell what it is; such files end in {', '.join(extensions)}.")
    return paths


def identity_of(config: JobConfig, inputs: list[dict[str, Any]], backend: str) -> dict[str, Any]:
    """What must be the same for a run to be resumed: settings, columns, contents of the inputs, the program."""
    files = {
        f"{one['for']}/{number}:{os.path.basename(one['path'])}": {"bytes": one["bytes"], "hash": one["hash"]}
        for number, one in enumerate(inputs)
    }
    program = {"gpu_init": __version__, "backend": backend, "kernels": forced_kernels()}
    users = config.users if isinstance(config.users, int) else None
    return {
        "settings": settings_to_dict(config.settings),
        "columns": {**_columns(config), "users": users},
        "inputs": files,
        "program": program,
    }


def _columns(config: JobConfig) -> dict[str, Any]:
    """What the interactions are taken for, by the names of the keys."""
    names = ("user_column", "item_column", "weight_column", "time_column", "half_life", "session_column", "where")
    return {name: getattr(config, name) for name in names}


@dataclass(frozen=True)
class Counts:
    """Of a job's interactions: rows of R and their ids, columns and theirs, rows read and kept, pairs, their weight."""

    users: int
    user_ids: Any
    items: int
    item_ids: Any
    read: int
    kept: int
    pairs: int
    weight: float

    @classmethod
    def of(cls, table: InteractionTable) -> Counts:
        """Of interactions in memory."""
        matrix, weights = table.interactions, table.interactions.csr.weights
        weight = float(matrix.pairs if weights is None else weights.sum(dtype="float64"))
        axes = (matrix.users, table.user_ids, matrix.items, table.item_ids)
        return cls(*axes, table.read, table.kept, matrix.pairs, weight)


def backend_facts(backend: Backend, reading_kernels: str) -> dict[str, Any]:
    """What the manifest says of the backend, whose kernels fit and write; those that read may be others."""
    return {
        "name": backend.name,
        "kernels": backend.kernels.name,
        "reading_kernels": reading_kernels,
        "kmeans": backend.kmeans_name,
        "versions": backend.versions(),
    }


def manifest_of(
    config: JobConfig,
    inputs: list[dict[str, Any]],
    backend: dict[str, Any],
    counts: Counts,
    statistics: dict[str, Any],
) -> dict[str, Any]:
    """All but timings; ``backend`` as of `backend_facts`, ``statistics`` by modality as of `modality_facts`."""
    return {
        "gpu_init_version": __version__,
        "settings": settings_to_dict(config.settings),
        "job": {
            "interactions": config.interactions,
            "features": config.features,
            **_columns(config),
            "users": config.users,
            "folder": os.getcwd(),  # that paths are relative to
        },
        "backend": backend,
        "inputs": inputs,
        "users": {
            "rows": counts.users,
            "ids": "row numbers" if counts.user_ids is None else "users.parquet",
            **({} if config.session_column is None else {"are": "sessions"}),
        },
        "items": {"rows": counts.items, "ids": "row numbers" if counts.item_ids is None else "items.parquet"},
        "interactions": {
            "read": counts.read,
            "kept": counts.kept,
            "pairs": counts.pairs,
            "weight": counts.weight,
        },
        "modalities": statistics,
    }
