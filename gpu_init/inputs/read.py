"""All inputs of a job, read and checked."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu_init.artifact.format import check_modality
from gpu_init.artifact.read import Artifact
from gpu_init.artifact.staging import Staging
from gpu_init.backend.interface import Backend
from gpu_init.backend.select import for_work
from gpu_init.budget import Sizes, require_room
from gpu_init.config import JobConfig
from gpu_init.errors import InputError
from gpu_init.files.remote import is_url
from gpu_init.files.storage import expand, file_state, fingerprint, real_path, require_utf8
from gpu_init.ids import is_text
from gpu_init.inputs import features
from gpu_init.inputs.axes import ItemAxis, positions
from gpu_init.inputs.features import FeatureTable
from gpu_init.inputs.interactions import InteractionTable, read
from gpu_init.inputs.tables import EXTENSIONS, TEXT_EXTENSIONS, Columns, read_user_ids, stated_rows, text_bytes
from gpu_init.kernels import kernels_for
from gpu_init.kernels.costs import fitting_seconds, reading_seconds
from gpu_init.memory import require as require_memory
from gpu_init.method import clusters as method_clusters
from gpu_init.method import modality as method_modality
from gpu_init.method import weighting
from gpu_init.method.matrix import ROW_BYTES
from gpu_init.method.modality import Modality
from gpu_init.method.weighting import Weighting
from gpu_init.show.progress import Progress
from gpu_init.where import parse

_LINE_BYTES = 32  # of an interaction in a text file, about
USER_EXTENSIONS = (".parquet", ".pq", ".txt", *TEXT_EXTENSIONS)


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
        method_clusters.check_clusters(name, int(source.mask.sum()), data.operators[name], config.settings)
    return data


def read_features(config: JobConfig, progress: Progress) -> tuple[dict[str, FeatureTable], dict[str, Any]]:
    """Features as files hold them, and which of their rows are there."""
    tables: dict[str, FeatureTable] = {}
    present: dict[str, Any] = {}
    for name, path in config.features.items():
        with progress.step(f"read features {name}") as step:
            tables[name] = features.read(name, path, config.item_column)
            present[name] = method_modality.check(tables[name].values, f"{path} (modality {name})")
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
    require_room(config, tables, Sizes(known, items, pairs), staging, reading=True)
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
        operators[name] = weighting.weighting(
            backend, table.interactions, backend.asarray(mask), config.settings.weighting, factors
        )
    matrix = table.interactions
    require_room(config, tables, Sizes(matrix.users, matrix.items, matrix.pairs), staging)
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


def _on_axis(source: Artifact, table: InteractionTable, values: Any, missing: float) -> Any:
    """Values of the artifact's items at the items of a table of interactions, which may have more."""
    if source.item_ids is None:
        return np.asarray(values)
    placed = np.full((table.interactions.items, *values.shape[1:]), missing, values.dtype)
    placed[positions(source.item_ids, table.item_ids)] = values
    return placed


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
