"""All inputs of a job, read and checked."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu_init.artifact.format import check_modality
from gpu_init.backend.interface import Backend
from gpu_init.config import JobConfig
from gpu_init.errors import InputError
from gpu_init.files.remote import is_url
from gpu_init.files.storage import expand, file_state, fingerprint, real_path, require_utf8
from gpu_init.ids import is_text
from gpu_init.inputs import features
from gpu_init.inputs.axes import ItemAxis, positions
from gpu_init.inputs.features import FeatureTable
from gpu_init.inputs.interactions import InteractionTable
from gpu_init.inputs.tables import EXTENSIONS, TEXT_EXTENSIONS, Columns, read_user_ids
from gpu_init.kernels import kernels_for
from gpu_init.kernels.costs import fitting_seconds, reading_seconds
from gpu_init.method.modality import Modality, check
from gpu_init.settings import Settings
from gpu_init.show.progress import Progress
from gpu_init.where import parse

_LINE_BYTES = 32  # An interaction in a text file takes about so many bytes.
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
class Features:
    """The features of all modalities as files hold them, and which of their rows are there."""

    tables: dict[str, FeatureTable]
    present: dict[str, Any]

    def widths(self, settings: Settings) -> list[int]:
        """Columns of each modality, once it is projected."""
        return [settings.dim or table.values.shape[1] for table in self.tables.values()]

    def placed(self, axis: ItemAxis, item_ids: Any, items: int) -> dict[str, Source]:
        """Place each modality's features at the columns of R, of which there are ``items`` with these ids."""
        sources = {}
        for name, table in self.tables.items():
            rows = None if table.ids is None else feature_rows(table, axis, item_ids)
            sources[name] = Source(table, features.align_mask(self.present[name], rows, items), rows)
        return sources


@dataclass(frozen=True)
class Source:
    """One modality's features by item.

    Attributes
    ----------
    table : FeatureTable
        As the files hold them.
    mask : numpy array, shape (I,), bool
        Which items have the modality.
    rows : numpy array, shape (n,), int64, or None
        The item of each row of the table; None: row i is item i.
    """

    table: FeatureTable
    mask: Any
    rows: Any

    def aligned(self, backend: Backend, *, exact: bool = False) -> Modality:
        """Return the features by item, on the device; ``exact`` keeps float64."""
        return features.align(backend, self.table, self.mask, self.rows, exact=exact)


@dataclass(frozen=True)
class Counts:
    """What was read of the interactions.

    Attributes
    ----------
    users, items : int
        Rows and columns of R.
    user_ids, item_ids : pandas Series or None
        Their ids; None where row numbers are the ids.
    read, kept : int
        Rows of the files, before and after ``where``.
    pairs : int
        Entries of R.
    weight : float
        The sum of all weights.
    kernels : str
        Name of the kernels that made R.
    """

    users: int
    user_ids: Any
    items: int
    item_ids: Any
    read: int
    kept: int
    pairs: int
    weight: float
    kernels: str

    @classmethod
    def of(cls, table: InteractionTable) -> Counts:
        """Count interactions that lie in memory."""
        matrix, weights = table.interactions, table.interactions.csr.weights
        weight = float(matrix.pairs if weights is None else weights.sum(dtype="float64"))
        axes = (matrix.users, table.user_ids, matrix.items, table.item_ids)
        return cls(*axes, table.read, table.kept, matrix.pairs, weight, table.kernels)


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


def read_features(config: JobConfig, progress: Progress) -> Features:
    """Read and check the features of all modalities."""
    tables: dict[str, FeatureTable] = {}
    present: dict[str, Any] = {}
    for name, path in config.features.items():
        with progress.step(f"read features {name}") as step:
            tables[name] = features.read(name, path, config.item_column)
            present[name] = check(tables[name].values, f"{path} (modality {name})")
            rows, width = tables[name].values.shape
            if config.settings.dim is not None and config.settings.dim > width:
                raise InputError(
                    f"{path}: dim {config.settings.dim} is above the {width} dimensions of modality {name}."
                )
            step.note(items=rows, width=width, missing=rows - int(present[name].sum()))
    return Features(tables, present)


def prepare_kernels(config: JobConfig, backend: Backend, found: Features, rows: int, size: int) -> None:
    """Begin to compile what the job will use, as far as the sizes of its files tell: rows, and bytes of text files."""
    pairs = max(rows, size // _LINE_BYTES)
    items = max(len(table.values) for table in found.tables.values())
    fitting = job_seconds(config.settings, found, (0, items, pairs))
    reads, fits = (kernels_for(seconds) == "numba" for seconds in (reading_seconds(rows, size), fitting))
    if reads or fits:
        backend.prepare(reads, fits, config.settings.cluster_on == "interactions")


def job_seconds(settings: Settings, found: Features, sizes: tuple[int, int, int], candidates: int = 1) -> float:
    """Estimate the seconds of the work on R, from its users, items and pairs; see `costs.fitting_seconds`."""
    on_interactions = settings.cluster_on == "interactions"
    return fitting_seconds(*sizes, found.widths(settings), settings.clusters, on_interactions, candidates)


def columns_of(config: JobConfig) -> Columns:
    """Return which columns of the interactions hold what."""
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
    """Return U, or the ids of the rows (pandas Series), or None where they are found in the interactions."""
    if isinstance(config.users, str):
        return read_user_ids(backend, config.users, config.session_column or config.user_column)
    return config.users


def tell_gaps(config: JobConfig, user_ids: Any, progress: Progress) -> None:
    """Say it where user ids are whole numbers but were not taken for row numbers."""
    if user_ids is not None and config.users is None and not is_text(str(user_ids.dtype)):
        progress.say("user ids have gaps: rows follow the sorted ids, in users.parquet; --users N makes ids the rows")


def item_axis_of(tables: Mapping[str, FeatureTable]) -> ItemAxis:
    """Return what item ids mean: row numbers where a modality has no ids, otherwise ids to join on."""
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
    """Return the item of each row of a feature table that has ids."""
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


def inputs_of(config: JobConfig, feature_names: Iterable[str] | None = None) -> Inputs:
    """Return every input file; of the features only those of the modalities that are named, or all."""
    named = [("interactions", path) for path in _tables(config.interactions, EXTENSIONS)]
    for name in config.features if feature_names is None else feature_names:
        pattern = config.features[name]
        named += [(f"features.{name}", path) for path in expand(pattern, features.EXTENSIONS)]
    if isinstance(config.users, str):
        named += [("users", path) for path in _tables(config.users, USER_EXTENSIONS)]
    states = {
        path: file_state(path) for _, path in named
    }  # Taken before the files are hashed, so that a later change shows.
    return Inputs([{"for": role, "path": path, **fingerprint(path)} for role, path in named], states)


def _tables(pattern: str, extensions: tuple[str, ...]) -> list[str]:
    """Return the files of a pattern; each, also one that is named outright, must have a known ending."""
    paths = expand(pattern, extensions)
    unknown = next((path for path in paths if not path.endswith(extensions)), None)
    if unknown is not None:
        raise InputError(f"{unknown}: cannot tell what it is; such files end in {', '.join(extensions)}.")
    return paths
