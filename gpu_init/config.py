"""A job: its inputs, its settings and how it runs, read from flags, the environment and a TOML file.

`KEYS` is the table of all keys; the readers and the command line's flags are made from it. Flags win over the
environment (``GPU_INIT_CLUSTERS=8``), the environment over the file, each key as a whole.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from gpu_init import where
from gpu_init.errors import InputError
from gpu_init.files.storage import reading
from gpu_init.settings import AUTO, FLAG, SETTING_KEYS, Key, Kind, Settings, WrongValueError, choice, number, shown
from gpu_init.settings import half_life as read_half_life

RESERVED_NAME = "interactions"  # No modality may have this name, which is a folder of the artifact.
MAX_FILE_BYTES = 1 << 18
# tomllib takes minutes over keys of thousands of parts, so keys of more than 16 are refused before it sees them.
_DEEP_KEY = re.compile(r"(?m)^(?![ \t]*#)[^=\n.]*(?:\.[^=\n.]*){16}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)


@dataclass(frozen=True)
class JobConfig:
    """One job: its inputs, its settings, and how it runs.

    Parameters
    ----------
    interactions, out : str
        Path, folder or glob of the interactions; folder of the artifact.
    features : dict of str to str
        Modality name to path, in the order given.
    settings : Settings
        What decides the artifact's bytes.
    user_column, item_column, weight_column : str, optional
        Columns of the interactions; None: known names, no weights.
    time_column : str, optional
        Column of times, for ``half_life``; None: known names.
    half_life : str or float, optional
        Time in which an interaction loses half its weight against the user's newest: text with a unit, or a number in
        the unit of the time column.
    session_column : str, optional
        Column of session ids, whose sessions are the rows, in place of users.
    where : str, optional
        Which interactions to take; `where.parse` reads it.
    users : int or str, optional
        U, when user ids are row numbers; or the path of the ids of the rows; None: from the interactions.
    valid, valid_where : str, optional
        Held-out interactions for `tune`: their path, if they are not among ``interactions``; which rows to take.
    backend : {"auto", "cpu", "cuda"}
        Where it runs.
    memory : int, optional
        Bytes that the run may take beside the interactions, one modality's features and the libraries; a run that
        needs more is refused before its work. None: what is kept of each user, and 1 GiB more.
    scheduler : str, optional
        ``local``, or the address of a Dask scheduler: the run is spread over its workers. None: this process alone.
    resume, overwrite : bool
        Go on with an unfinished run, if there is one; replace an artifact that is there.
    log_format : {"auto", "text", "json"}
        How `progress.Progress` tells what happens.

    Raises
    ------
    InputError
        Two of the columns, or a column and the half-life, do not go together.
    """

    interactions: str
    features: dict[str, str]
    out: str
    settings: Settings
    user_column: str | None = None
    item_column: str | None = None
    weight_column: str | None = None
    time_column: str | None = None
    half_life: str | float | None = None
    session_column: str | None = None
    where: str | None = None
    users: int | str | None = None
    valid: str | None = None
    valid_where: str | None = None
    backend: str = "auto"
    memory: int | None = None
    scheduler: str | None = None
    resume: bool = False
    overwrite: bool = False
    log_format: str = "auto"

    def __post_init__(self) -> None:
        if self.time_column is not None and self.half_life is None:
            raise InputError("time_column is for half_life; set that too, such as half_life 30d.")
        if self.session_column is not None and self.user_column is not None:
            raise InputError("rows are users or sessions: give user_column or session_column, not both.")


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise ValueError
    return str(value)


def _features(value: Any) -> dict[str, str]:
    if isinstance(value, str):
        value = value.split(",")
    if isinstance(value, Sequence):
        parts, value = value, {}
        for part in parts:
            name, _, path = (side.strip() for side in _text(part).partition("="))
            if not path:
                raise WrongValueError(f"found {shown(part)}; wanted is {_FEATURES.wanted}.")
            if name in value:
                raise WrongValueError(f"{shown(name)} is given twice.")
            value[name] = path
    if not isinstance(value, Mapping) or not value:
        raise ValueError
    lowered: set[str] = set()
    for name, path in value.items():
        good = isinstance(name, str) and _NAME.fullmatch(name) and ".." not in name and not name.endswith(".")
        if not good or name.lower() == RESERVED_NAME:
            raise WrongValueError(
                f"{shown(name)} cannot be the name of a modality: at most 64 letters, digits, '_', '-' and single '.',"
                f" a letter or digit first, no '.' last, and not {RESERVED_NAME!r}."
            )
        if name.lower() in lowered:
            raise WrongValueError(f"{name} is there twice; names must differ in more than case.")
        lowered.add(name.lower())
        if not isinstance(path, str) or not path.strip() or "\0" in path:
            raise WrongValueError(f"found {shown(path)} for {name}; wanted is {_FEATURES.wanted}.")
    return {str(name): str(path) for name, path in value.items()}


def _half_life(value: Any) -> str | float:
    if isinstance(value, str):
        amount, unit = read_half_life(value)
        if unit is not None:
            return value.strip()
        value = amount
    return float(number(1e-9, 1e18).convert(value))


def _where(value: Any) -> str:
    try:
        return where.parse(_text(value)).text
    except InputError as error:  # The message begins with the flag; the place of this key is put before it instead.
        raise WrongValueError(str(error).removeprefix("--where: ")) from None


def _users(value: Any) -> int | str:
    count = number(1, 2**40, whole=True)
    if isinstance(value, str):
        if not re.fullmatch("-?[0-9]+", value):
            return _text(value)
        value = count.read(value)
    return int(count.convert(value))


def _memory(value: Any) -> int:
    if isinstance(value, str):
        size = _SIZE.fullmatch(value.strip())
        if size is None or (size[3] and not size[2]):
            raise ValueError
        power = " kmgt".index(size[2].lower() or " ")
        value = int(Decimal(size[1]) * (1024 if size[3] else 1000) ** power)
    return int(number(16 << 20, 2**63 - 1, whole=True).convert(value))


_PATH = Kind("a path", _text, metavar="PATH")
_COLUMN = Kind("the name of a column", _text, metavar="NAME")
_FEATURES = Kind('one NAME=PATH or more, or in TOML a table [features] of name = "path"', _features)
_SCHEDULER = Kind("local or the address of a Dask scheduler, such as tcp://HOST:8786", _text)
_TIME = Kind("a time such as 12h, 30d or 8w, or a number above 0 in the unit of the time column", _half_life)
_ROWS = Kind("a number of users, 1 or more, or the path of a file of user ids", _users)
_BYTES = Kind("a size of 16MiB or more, such as 4GB, 500MB, 1.5GiB or a number of bytes", _memory)

KEYS: tuple[Key, ...] = (
    Key("interactions", _PATH, "who did what: Parquet, CSV, TSV, .inter or .npz; a file, folder or glob"),
    Key(
        "features",
        _FEATURES,
        "item features of one modality: .npy, .npz, .parquet, .safetensors or .pt; repeat it for more modalities",
        "NAME=PATH",
    ),
    Key("out", _PATH, "folder of the result, the artifact", "DIR"),
    Key("user_column", _COLUMN, "column of user ids (default: a known name)"),
    Key("item_column", _COLUMN, "column of item ids (default: a known name)"),
    Key("weight_column", _COLUMN, "column of weights, 0 or more (default: 1 per interaction)"),
    Key("time_column", _COLUMN, "column of times, for --half-life (default: a known name)"),
    Key(
        "half_life",
        _TIME,
        "an interaction so much older than the user's newest has half the weight: 30d, also s, m, h, w; columns of"
        " numbers are seconds then. A number alone is in the unit of the column",
        "TIME",
    ),
    Key("session_column", _COLUMN, "column of session ids: rows are sessions, not users"),
    Key("where", Kind('a comparison such as "x_label == 0"', _where), 'rows to take, such as "x_label == 0"', "EXPR"),
    Key(
        "users",
        _ROWS,
        "number of users, whose ids are then row numbers; or a file with the users' ids in the order of the rows",
        "N|PATH",
    ),
    *SETTING_KEYS,
    Key("backend", choice("auto", "cpu", "cuda"), "where it runs; auto takes a GPU where there is one (default: auto)"),
    Key("memory", _BYTES, "memory beside the interactions and one modality's features", "SIZE"),
    Key(
        "scheduler",
        _SCHEDULER,
        "spread the run over a Dask cluster; local: one started here, with a worker per core or GPU",
        "ADDRESS|local",
    ),
    Key("valid", _PATH, "held-out interactions, for tune to rank settings by"),
    Key(
        "valid_where",
        Kind('a comparison such as "x_label == 1"', _where),
        'held-out rows to take, of --valid or of the interactions, such as "x_label == 1"',
        "EXPR",
    ),
    Key("resume", FLAG, "go on with an unfinished run, if there is one"),
    Key("overwrite", FLAG, "replace an artifact that is there"),
    Key(
        "log_format",
        choice("auto", "text", "json"),
        "auto: a bar on a terminal, else one line per step (default: auto)",
    ),
)
_BY_NAME = {key.name: key for key in KEYS}
NAMES = frozenset(_BY_NAME)
# Paths in a job file are relative to its folder.
_PATHS = ("interactions", "features", "out", "users", "valid")
# `gpu-init run` has no flags for these keys; a job file may have them.
TUNED = frozenset({"valid", "valid_where"})
# `gpu-init assign` takes these keys; the artifact has the others.
COLUMNS = ("user_column", "item_column", "weight_column", "time_column", "session_column")
ASSIGNED = (
    *("interactions", "features", "out", *COLUMNS, "where", "users"),
    *("backend", "memory", "scheduler", "resume", "overwrite", "log_format"),
)


def add_flags(parser: argparse.ArgumentParser, names: Collection[str] = NAMES) -> None:
    """Add a flag for every key, or those named; one that is not given leaves no attribute behind."""
    for key in KEYS:
        if key.name in names:
            form: dict[str, Any] = {"metavar": key.metavar or key.kind.metavar}
            if key.kind is FLAG:
                form = {"action": argparse.BooleanOptionalAction}
            elif key.kind is _FEATURES:
                form["action"] = "append"
            parser.add_argument(key.flag, dest=key.name, default=argparse.SUPPRESS, help=key.help, **form)


def load(
    path: str | None, environ: Mapping[str, str], flags: Mapping[str, Any], base: Mapping[str, Any] | None = None
) -> JobConfig:
    """Read a job: flags win over environment variables, these over the TOML file, and that over a base.

    Parameters
    ----------
    path : str, optional
        TOML file; its paths are relative to its folder.
    environ : mapping
        Environment variables; others than those of `KEYS`, and empty ones, are ignored.
    flags : mapping
        Key name to the text of its flag, or to a value as in TOML; those not given are not in it.
    base : mapping, optional
        Key name to a value as in TOML.

    Returns
    -------
    JobConfig

    Raises
    ------
    InputError
        An unknown key, a wrong value, something missing; the file, flag or variable is named.
    """
    values = {key.name: key.checked(value, key.name) for key, value in _keyed(base or {}, "base").items()}
    if path is not None:
        for key, value in _keyed(_toml(path), path).items():
            checked = key.checked(value, f"{path}, key {key.name}")
            values[key.name] = _relative_to(os.path.dirname(path), checked) if key.name in _PATHS else checked
    values |= _asked(environ, flags)
    missing = [key for name in ("interactions", "features", "out") if (key := _BY_NAME[name]).name not in values]
    if missing:
        raise InputError(
            f"missing: {', '.join(key.name for key in missing)}.\nGive them in JOB.toml, as"
            f" {' '.join(f'{key.flag} {key.metavar or key.kind.metavar}' for key in missing)},"
            f" or as environment variables: {', '.join(key.variable for key in missing)}."
        )
    settings = {key.field: values.pop(key.name) for key in SETTING_KEYS if key.name in values}
    return JobConfig(settings=Settings(**settings), **values)


def assigned(
    manifest: Mapping[str, Any], environ: Mapping[str, str], flags: Mapping[str, Any]
) -> tuple[JobConfig, set[str]]:
    """Give the job of `gpu-init assign`: what flags and variables say, over the columns and settings of an artifact.

    Parameters
    ----------
    manifest : dict
        Of the artifact.
    environ, flags : mapping
        As in `load`; keys of `ASSIGNED`.

    Returns
    -------
    config : JobConfig
        Features are the artifact's, where it found them, but for those given.
    given : set of str
        Modalities whose features are given.

    Raises
    ------
    InputError
        As in `load`, or the artifact does not say what it was made from.
    """
    try:
        job, settings = dict(manifest["job"]), dict(manifest["settings"])
        features = {str(name): _relative_to(str(job["folder"]), path) for name, path in job["features"].items()}
        columns = {name: job[name] for name in (*COLUMNS, "half_life")}
    except (KeyError, TypeError, AttributeError):
        raise InputError(
            "the artifact does not say what it was made from, as older ones do; run its job again."
        ) from None
    asked = _asked(environ, flags)
    for one, other in (("user_column", "session_column"), ("session_column", "user_column")):
        if one in asked:
            columns[other] = None
    base = {key: value for key, value in {**columns, **settings}.items() if value is not None}
    given = asked.get("features", {})
    return load(None, {}, {**asked, "features": {**features, **given}}, base), set(given)


def log_format(path: str | None, environ: Mapping[str, str], flags: Mapping[str, Any]) -> str:
    """Give ``log_format`` alone, to tell what is wrong with other settings; ``auto`` where it is wrong itself."""
    key = _BY_NAME["log_format"]
    with suppress(InputError):
        if key.name in flags:
            return str(key.checked(flags[key.name], key.flag))
        if environ.get(key.variable, "").strip():
            return str(key.checked(environ[key.variable].strip(), key.variable))
        if path is not None and os.path.isfile(path):  # A pipe can be read only once, so it is left to `load`.
            in_file = {name.replace("-", "_"): value for name, value in _toml(path).items()}
            return str(key.checked(in_file.get(key.name, AUTO), path))
    return AUTO


def variable(name: str) -> str:
    """Name of the environment variable of a key."""
    return _BY_NAME[name].variable


def _asked(environ: Mapping[str, str], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that variables and flags give, by the names of the keys."""
    texts = {key: environ.get(key.variable, "").strip() for key in KEYS}
    return {
        **{key.name: key.checked(text, key.variable, written=True) for key, text in texts.items() if text},
        **{key.name: key.checked(value, key.flag, written=True) for key, value in _keyed(flags, "flags").items()},
    }


def _keyed(given: Mapping[str, Any], place: str) -> dict[Key, Any]:
    """Return the values by the keys that a mapping names, with - or with _."""
    found: dict[Key, Any] = {}
    for name, value in given.items():
        key = _BY_NAME.get(name.replace("-", "_"))
        if key is None:
            near = difflib.get_close_matches(name.replace("-", "_")[:100], _BY_NAME, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(_BY_NAME)}."
            raise InputError(f"{place}: unknown key {shown(name)}; {remedy}")
        if key in found:
            raise InputError(f"{place}: {key.name} is given twice, with - and with _.")
        found[key] = value
    return found


def _relative_to(folder: str, value: Any) -> Any:
    """Put a folder before a path or the paths of a table, but not before URLs, absolute paths and numbers of users."""
    if isinstance(value, dict):
        return {name: _relative_to(folder, path) for name, path in value.items()}
    if not isinstance(value, str) or "://" in value:
        return value
    return os.path.join(folder, value)


def _toml(path: str) -> dict[str, Any]:
    with reading(path) as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise InputError(f"{path}: more than {MAX_FILE_BYTES >> 10} KiB; this is no job file.")
    try:
        text = content.decode("utf-8-sig")
        deep = _DEEP_KEY.search(text)
        if deep is None:
            return tomllib.loads(text)
        line = text.count("\n", 0, deep.start()) + 1
        wrong = f"line {line} has a key of more than 16 parts; keys of a job have two at most."
    except UnicodeDecodeError as error:
        wrong = f"byte {error.start} is not UTF-8 text, as TOML must be."
    except RecursionError:
        wrong = "lists or tables nested too deep."
    except ValueError as error:  # Either tomllib's, with line and column, or int's, for a number of too many digits.
        wrong = f"not TOML: {' '.join(str(error).split())}."
    raise InputError(f"{path}: {wrong}")
