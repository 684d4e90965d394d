"""Presets for models of MMRec and MRLib: which of a model's tables get which vectors, and how.

MMRec is the library enoche/MMRec, MRLib the library Jinfeng-Xu/Multimodal-Recommendation-Library; their models have the
same names and tables. Call `attach` after the model is built and before its optimizer is::

    gpu_init.mmrec.attach(model, gpu_init.load("vectors"))

`job_settings` gives the settings of the job that makes vectors which suit a preset.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from gpu_init.errors import InputError
from gpu_init.settings import SETTING_KEYS
from gpu_init.torch import Table, init_model_, parse_modalities


@dataclass(frozen=True)
class Preset:
    """What the tables of a model are filled with, and the settings of the job that makes the vectors.

    Attributes
    ----------
    tables : mapping of str to sequence of Table
        Dotted path of a model's table to what it is filled with. Modalities are named by their role in the model:
        ``v`` is the visual one, ``t`` the textual one.
    width : "embedding", "raw" or int
        Width of the vectors. ``embedding``: the model's embedding size, divided evenly among modalities that go side
        by side; ``raw``: the width of the features, which are not projected; or a number of columns.
    settings : mapping
        Other keys of the job: ``lambda``, ``clusters``, ``whiten`` and so on.
    """

    tables: Mapping[str, Sequence[Table]]
    width: str | int = "embedding"
    settings: Mapping[str, Any] = field(
        default_factory=lambda: {"lambda": 0.5, "clusters": 8, "cluster_on": "interactions", "whiten": True}
    )


# Options of nearly every table: vectors are added at the table's own norm, less the mean that all rows share.
_DEFAULTS = {"mode": "add", "gain": "match", "centre": True, "cold": "keep"}


def _filled(modalities: str, **changes: Any) -> Table:
    options: dict[str, Any] = {**_DEFAULTS, **changes}
    return Table(modalities, **options)


# These models have one table of users beside a table of item ids, so users lie in the whitened space of that width.
_USERS_ADDED = Preset({"user_embedding.weight": (_filled("v+t"),)})

# The presets were chosen by validation scores of trained models (benchmarks/quality.py).
PRESETS: dict[str, Preset] = {
    "FREEDOM": _USERS_ADDED,
    "LATTICE": _USERS_ADDED,
    "MGCN": _USERS_ADDED,
    "BM3": _USERS_ADDED,
    "LGMRec": _USERS_ADDED,
    # MMGCN adds this table, which holds users and then items, in each layer and never trains it.
    "MMGCN": Preset(
        {
            "id_embedding": (
                _filled("v+t", mode="replace", gain=4.0, offset=0),
                _filled("items:v+t", mode="replace", gain=4.0, offset="users"),
            )
        }
    ),
    # DRAGON scales preferences to length 1, so the shorter they are at the start, the faster their direction changes.
    "DRAGON": Preset(
        {f"{role}_gcn.preference": (_filled("v+t", mode="replace", gain=0.1),) for role in ("v", "t")},
        width=64,  # DRAGON's preferences have this width, whatever the embedding size
        settings={**_USERS_ADDED.settings, "lambda": 0.1, "clusters": 64},
    ),
    # VBPR's users are twice as wide as its items: the first half is multiplied by items' ids, the last half by items'
    # features, which go through item_linear.
    "VBPR": Preset(
        {"u_embedding": (_filled("t,v", via="item_linear", columns="last"),)}, "raw", {"lambda": 0.9, "clusters": 8}
    ),
}

# Names that a modality of each role usually has, in lower case.
_ROLES = {"v": ("image", "visual", "vision", "v", "img"), "t": ("text", "textual", "t", "txt")}
# Fields of `Table` that a change to a preset may name.
_TABLE_FIELDS = {one.name for one in fields(Table)} - {"modalities", "rows"}


def preset_of(model: str) -> Preset:
    """Give the preset of a model.

    Parameters
    ----------
    model : str
        Name of the model's class, such as ``"FREEDOM"``.

    Raises
    ------
    InputError
        There is no preset for this model.
    """
    if model not in PRESETS:
        raise InputError(
            f"no preset for {model}; there are {', '.join(PRESETS)}. gpu_init.torch.init_model_ fills tables by name."
        )
    return PRESETS[model]


def adjusted(preset: Preset, changes: Mapping[str, Any]) -> Preset:
    """Give a preset with some of its values changed.

    Parameters
    ----------
    preset : Preset
    changes : mapping
        Each key is one of these: a field of `Table` (``mode``, ``gain``, ``centre``, ``cold``, ``via``, ``offset``,
        ``columns``), which changes every table; ``tables``, which replaces the preset's tables and maps a path to
        modalities, to a mapping of the fields of `Table`, or to a list of those; ``width``; or a key of the job's
        settings.

    Raises
    ------
    InputError
        A key is none of those, or a value is wrong.
    """
    settings = {key.name for key in SETTING_KEYS}
    known = _TABLE_FIELDS | {"tables", "width"} | (settings - {"dim"})
    unknown = set(changes) - known
    if unknown:
        raise InputError(f"preset: unknown key {min(unknown)}; the keys are {', '.join(sorted(known))}.")
    width = changes.get("width", preset.width)
    if width not in ("embedding", "raw") and (isinstance(width, bool) or not isinstance(width, int) or width < 1):
        raise InputError(f"preset: width: found {width!r}; wanted is embedding, raw or a number of columns.")
    tables = preset.tables
    if "tables" in changes:
        tables = {
            path: [_table(one) for one in (given if isinstance(given, list) else [given])]
            for path, given in changes["tables"].items()
        }
    table_changes = {name: value for name, value in changes.items() if name in _TABLE_FIELDS}
    kept = {name: value for name, value in preset.settings.items() if name != "whiten" or width != "raw"}
    return Preset(
        {path: tuple(replace(one, **table_changes) for one in specs) for path, specs in tables.items()},
        width,
        {**kept, **{name: value for name, value in changes.items() if name in settings}},
    )


def _table(given: Any) -> Table:
    options = {"modalities": given} if isinstance(given, str) else dict(given)
    if set(options) - _TABLE_FIELDS != {"modalities"}:
        raise InputError(f"preset: tables: found {given!r}; wanted are modalities, and fields of a table.")
    return _filled(**options)


def attach(
    model: Any,
    artifact: Mapping[str, Any],
    preset: Preset | None = None,
    roles: Mapping[str, str] | None = None,
) -> dict[str, Sequence[Table]]:
    """Fill a model's tables from an artifact, as its preset says.

    Parameters
    ----------
    model : nn.Module
        A model that is built and that no optimizer has been given yet.
    artifact : Artifact or Result
        Vectors made with the settings that the preset needs, which `job_settings` gives.
    preset : Preset, optional
        By default the preset of the model's class.
    roles : mapping, optional
        Modality of each role, such as ``{"v": "image", "t": "audio"}``. By default `roles_of` the artifact.

    Returns
    -------
    dict of str to sequence of Table
        Paths of the tables that were filled, and what each was filled with.

    Raises
    ------
    InputError
        There is no preset, no modality for any of its tables, or the vectors do not fit (`torch.init_model_`).
    """
    chosen = preset if preset is not None else preset_of(type(model).__name__)
    known_roles = roles_of(artifact) if roles is None else roles
    tables: dict[str, Sequence[Table]] = {}
    for path, specs in chosen.tables.items():
        resolved = [one for one in (_resolved(spec, known_roles) for spec in specs) if one is not None]
        if resolved:
            tables[path] = resolved
    if not tables:
        raise InputError(f"{type(model).__name__}: none of {', '.join(artifact)} is a modality that its preset names.")
    init_model_(model, artifact, tables)
    return tables


def roles_of(names: Iterable[str]) -> dict[str, str]:
    """Give the modality of each role: ``v`` for the visual one, ``t`` for the textual one.

    Where no modality has a usual name of a role, the first modality that has no role yet takes it.
    """
    left = list(names)
    roles: dict[str, str] = {}
    for role, usual in _ROLES.items():
        found = next((name for name in left if name.lower() in usual), None)
        if found is not None:
            roles[role] = found
            left.remove(found)
    for role in _ROLES:
        if role not in roles and left:
            roles[role] = left.pop(0)
    return roles


def _resolved(table: Table, roles: Mapping[str, str]) -> Table | None:
    """Replace roles by names of modalities and leave out roles that no modality has; None where none remains."""
    side, terms, side_by_side = parse_modalities(table.modalities)
    kept = [(weight, roles.get(name, name)) for weight, name in terms if name in roles or name not in _ROLES]
    if not kept:
        return None
    weights = {weight for weight, _ in kept}
    unweighted = weights == {1.0} if side_by_side else len(weights) == 1
    parts = [name if unweighted else f"{weight:.6f}*{name}" for weight, name in kept]
    prefix = "items:" if side == "items" else ""
    return replace(table, modalities=prefix + ("," if side_by_side else "+").join(parts))


def job_settings(preset: Preset, embedding_size: int) -> dict[str, Any]:
    """Give the settings of the job that makes the vectors for a preset and a model.

    Parameters
    ----------
    preset : Preset
    embedding_size : int
        Columns of the model's embeddings.

    Returns
    -------
    dict
        The preset's `settings`, and ``dim`` unless its width is ``raw``.

    Raises
    ------
    InputError
        The embedding size cannot be divided evenly among modalities that go side by side.
    """
    if preset.width == "raw":
        return dict(preset.settings)
    if isinstance(preset.width, int):
        return {**preset.settings, "dim": preset.width}
    parsed = [parse_modalities(one.modalities) for specs in preset.tables.values() for one in specs]
    shares = {len(terms) if side_by_side else 1 for _, terms, side_by_side in parsed}
    if len(shares) != 1 or embedding_size % min(shares):
        raise InputError(f"preset: an embedding of {embedding_size} is not shared out evenly; give width.")
    return {**preset.settings, "dim": embedding_size // min(shares)}
