"""Settings of a job: one table of keys, read from flags, the environment and a TOML file.

`KEYS` says what there is; the three readers and the command line's flags are made from it. Flags win over the
environment (``GPU_INIT_CLUSTERS=8``), the environment over the file, each key as a whole.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from decimal import Decimal
from numbers import Integral, Real
from typing import Any

from gpu_init import where
from gpu_init.errors import InputError
from gpu_init.files.storage import reading

PREFIX = "GPU_INIT_"
RESERVED_NAME = "interactions"  # not the name of a modality
MAX_FILE_BYTES = 1 << 18
_DEEP_KEY = re.compile(
    r"(?m)^(?![ \t]*#)[^=\n.]*(?:\.[^=\n.]*){16}"
)  # tomllib takes minutes over keys of thousands of parts
_MAX_INT = 2**31 - 1
_MAX_USERS = 2**40
_MIN_MEMORY = 16 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
POLICIES = ("shrink", "attention")  # of lambda, by user
CLUSTER_ON = ("users", "items", "interactions")
AUTO = "auto"  # clusters by what the data hold
BELONGING = (  # settings that go with a value of another
    ("tau", "lambda", "shrink"),
    ("temperature", "lambda", "attention"),
    ("cluster_rank", "cluster_on", "interactions"),
)
_HALF_LIFE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}


@dataclass(frozen=True)
class Settings:
    """What, with the inputs, decides the artifact's bytes.

    Parameters
    ----------
    lam : float, "shrink" or "attention", default=0.9
        Weight of the local part, in [0, 1], or the policy that gives each user one; ``lambda`` outside Python.
    clusters : int or "auto", default=8
        K, 1 or more; ``auto``: chosen for each modality.
    cluster_on : {"users", "items", "interactions"}, default="users"
        What K-means groups: users by their means, items, or users by what they did, whatever the features.
    weighting : {"mean", "sym"}, default="mean"
        Interaction-weighted mean, or normalized by both degrees.
    dim : int, optional
        Width that features are projected to, 1 or more; None: not projected.
    whiten : bool, default=False
        Unit variance per projected component; needs `dim`.
    scale : {"none", "items"}, default="none"
        ``items``: mean row norm of the users as that of the items.
    dtype : {"float32", "float16"}, default="float32"
        Of the vectors that are written.
    seed : int, default=0
        In [0, 2^32).
    restarts : int, default=1
        Starts of K-means on its sample, 1 or more; the best goes on.
    tolerance : float, default=1e-3
        In [0, 1]: a pass of K-means over all rows that lowers the inertia by less than this share is the last; 0:
        passes go on until no label changes.
    kmeans : {"auto", "own", "cuml"}, default="auto"
        Whose K-means finds the centroids that the passes over all rows start from; ``cuml`` needs CUDA.
    tau : float, optional
        Of lambda ``shrink``, 0 or more; None: from the data.
    temperature : float, optional
        Of lambda ``attention``, above 0; None: 0.1.
    cluster_rank : int, optional
        Of cluster_on ``interactions``, 1 or more: dimensions that users are placed in; None: 64.

    Raises
    ------
    InputError
        A value of the wrong type or out of range.
    """

    lam: float | str = 0.9
    clusters: int | str = 8
    cluster_on: str = "users"
    weighting: str = "mean"
    dim: int | None = None
    whiten: bool = False
    scale: str = "none"
    dtype: str = "float32"
    seed: int = 0
    restarts: int = 1
    tolerance: float = 1e-3
    kmeans: str = "auto"
    tau: float | None = None
    temperature: float | None = None
    cluster_rank: int | None = None

    def __post_init__(self) -> None:
        for key in KEYS:
            if key.field in _SETTINGS:
                value = getattr(self, key.field)
                if value is not None or key.field not in _OPTIONAL:
                    object.__setattr__(self, key.field, key.checked(value, key.name))
        if self.whiten and self.dim is None:
            raise InputError("whiten needs dim, the width that features are projected to; set it too, such as dim 64.")
        for name, other, value in BELONGING:
            of = self.lam if other == "lambda" else self.cluster_on
            if getattr(self, name) is not None and of != value:
                raise InputError(f"{name} is of {other} {value}; set {other} to {value} too, or leave {name} out.")


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
    resume, overwrite : bool
        Go on with an unfinished run, if there is one; replace an artifact that is there.
    scheduler : str, optional
        ``local``, or the address of a Dask scheduler: the run is spread over its workers. None: this process alone.
    log_format : {"auto", "text", "json"}
        How `progress.Progress` tells what happens.
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


_SETTINGS = frozenset(field.name for field in fields(Settings))
_OPTIONAL = {field.name for field in fields(Settings) if field.default is None}
_REQUIRED = ("interactions", "features", "out")
_FEATURES_WANTED = 'one NAME=PATH or more, or in TOML a table [features] of name = "path"'


class _WrongValueError(ValueError):
    """A value that is wrong in a way worth a sentence of its own."""


# Values: `check` takes what TOML and Python give, `read` what is written in a flag or a variable; ValueError if wrong.


def _whole(low: int, high: int) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, Integral) or not low <= int(value) <= high:
            raise ValueError
        return int(value)

    return check


def _read_whole(text: str) -> int:
    if not re.fullmatch(r"-?[0-9]{1,30}", text):
        raise ValueError
    return int(text)


def _number(value: Any, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError
    try:
        number = float(value)
    except OverflowError:
        raise ValueError from None
    if not low <= number <= high:
        raise ValueError
    return abs(number)  # no -0.0


def _check_lambda(value: Any) -> float | str:
    return str(value) if isinstance(value, str) and value in POLICIES else _number(value, 0, 1)


def _read_lambda(text: str) -> float | str:
    return text if text in POLICIES else float(text)


def _check_clusters(value: Any) -> int | str:
    return AUTO if value == AUTO else _whole(1, _MAX_INT)(value)


def _read_clusters(text: str) -> int | str:
    return text if text == AUTO else _read_whole(text)


def _check_half_life(value: Any) -> str | float:
    if isinstance(value, str):
        amount, unit = half_life(value)
        if unit is not None:
            return value.strip()
        value = amount
    return _number(value, 1e-9, 1e18)


def half_life(value: str | float) -> tuple[float, str | None]:
    """Give a half-life in seconds and its unit, or, where it has none, as it stands and None.

    Raises
    ------
    ValueError
        Not a number above 0, alone or with a unit.
    """
    if not isinstance(value, str):
        return value, None
    found = _HALF_LIFE.fullmatch(value.strip())
    if found is None:
        return float(value), None
    if float(found[1]) == 0:
        raise ValueError
    return float(found[1]) * _SECONDS[found[2]], found[2]


def _check_flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _read_flag(text: str) -> bool:
    values = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if text.lower() not in values:
        raise ValueError
    return values[text.lower()]


def _check_text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise ValueError
    return str(value)


def _check_where(value: Any) -> str:
    try:
        return where.parse(_check_text(value)).text
    except InputError as error:  # named after the flag; the key's own place is put before it
        raise _WrongValueError(str(error).removeprefix("--where: ")) from None


def _check_users(value: Any) -> int | str:
    if isinstance(value, str):
        if not re.fullmatch("-?[0-9]+", value):
            return _check_text(value)
        value = _read_whole(value)
    return _whole(1, _MAX_USERS)(value)


def _check_memory(value: Any) -> int:
    if isinstance(value, str):
        size = _SIZE.fullmatch(value.strip())
        if size is None or (size[3] and not size[2]):
            raise ValueError
        power = " kmgt".index(size[2].lower() or " ")
        value = int(Decimal(size[1]) * (1024 if size[3] else 1000) ** power)
    return _whole(_MIN_MEMORY, 2**63 - 1)(value)


def _check_features(value: Any) -> dict[str, str]:
    if isinstance(value, str):
        value = value.split(",")
    if isinstance(value, Sequence):
        value = _named_paths(value)
    if not isinstance(value, Mapping) or not value:
        raise ValueError
    lowered: set[str] = set()
    for name in value:
        _check_name(name)
        if name.lower() in lowered:
            raise _WrongValueError(f"{name} is there twice; names must differ in more than case.")
        lowered.add(name.lower())
        if not isinstance(value[name], str) or not value[name].strip() or "\0" in value[name]:
            raise _WrongValueError(f"found {_shown(value[name])} for {name}; wanted is {_FEATURES_WANTED}.")
    return {str(name): str(path) for name, path in value.items()}


def _named_paths(parts: Sequence[Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in parts:
        name, equals, path = (side.strip() for side in _check_text(part).partition("="))
        if not equals or not path:
            raise _WrongValueError(f"found {_shown(part)}; wanted is {_FEATURES_WANTED}.")
        if name in found:
            raise _WrongValueError(f"{_shown(name)} is given twice.")
        found[name] = path
    return found


def _check_name(name: Any) -> None:
    good = isinstance(name, str) and _NAME.fullmatch(name) and ".." not in name and not name.endswith(".")
    if not good or name.lower() == RESERVED_NAME:
        raise _WrongValueError(
            f"{_shown(name)} cannot be the name of a modality: at most 64 letters, digits, '_', '-' and single '.',"
            f" a letter or digit first, no '.' last, and not {RESERVED_NAME!r}."
        )


# Keys.


@dataclass(frozen=True)
class Key:
    """One key of the TOML file, which is a flag and an environment variable too.

    Attributes
    ----------
    name : str
        As in TOML, such as ``user_column``.
    check : callable
        A value as TOML and Python give it to the value as it is kept; ValueError where it is wrong.
    wanted : str
        What a right value is, for the error.
    help, metavar : str
        For the flag.
    read : callable, optional
        Text of a flag or a variable to what `check` takes; None: it takes the text.
    is_path, is_flag, many : bool
        Relative to the folder of the TOML file; a flag without a value; a flag that can be repeated.
    """

    name: str
    check: Callable[[Any], Any]
    wanted: str
    help: str
    metavar: str = ""
    read: Callable[[str], Any] | None = None
    is_path: bool = False
    is_flag: bool = False
    many: bool = False

    @property
    def field(self) -> str:
        """Name of the attribute of `Settings` or `JobConfig`."""
        return "lam" if self.name == "lambda" else self.name

    @property
    def flag(self) -> str:
        """Name of the flag."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """Name of the environment variable."""
        return PREFIX + self.name.upper()

    def checked(self, value: Any, place: str, *, written: bool = False) -> Any:
        """Give a right value, or raise an InputError that says what was found at the place.

        ``written``: the value, if it is text, is that of a flag or a variable.
        """
        try:
            return self.check(self.read(value) if written and self.read and isinstance(value, str) else value)
        except InputError:
            raise
        except _WrongValueError as wrong:
            raise InputError(f"{place}: {wrong}") from None
        except ValueError:
            raise InputError(f"{place}: found {_shown(value)}; wanted is {self.wanted}.") from None


def _shown(value: Any) -> str:
    """Value for an error, short whatever it is."""
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:60] + "...")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Integral) and abs(int(value)) >= 2**64:
        return "a number beyond 64 bits"
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, Sequence):
        return "a list"
    return str(value) if isinstance(value, Real) else f"a value of type {type(value).__name__}"


def _text_key(name: str, wanted: str, explanation: str, metavar: str, *, is_path: bool = False) -> Key:
    return Key(name, _check_text, wanted, explanation, metavar, is_path=is_path)


def _flag_key(name: str, explanation: str) -> Key:
    return Key(name, _check_flag, "true or false", explanation, read=_read_flag, is_flag=True)


def _number_key(name: str, limits: tuple[int, int], explanation: str, metavar: str) -> Key:
    low, high = limits
    wanted = (
        f"a whole number, {low} or more, below 2^31" if high == _MAX_INT else f"a whole number from {low} to {high}"
    )
    return Key(name, _whole(low, high), wanted, explanation, metavar, read=_read_whole)


def _choice_key(name: str, choices: tuple[str, ...], explanation: str) -> Key:
    def check(value: Any) -> str:
        if not isinstance(value, str) or value not in choices:
            raise ValueError
        return str(value)

    wanted = ", ".join(choices[:-1]) + " or " + choices[-1]
    return Key(name, check, wanted, f"{explanation} (default: {choices[0]})", "{" + ",".join(choices) + "}")


_COLUMN = "the name of a column"

KEYS: tuple[Key, ...] = (
    _text_key(
        "interactions",
        "a path",
        "who did what: Parquet, CSV, TSV, .inter or .npz; a file, folder or glob",
        "PATH",
        is_path=True,
    ),
    Key(
        "features",
        _check_features,
        _FEATURES_WANTED,
        "item features of one modality: .npy, .npz, .parquet, .safetensors or .pt; repeat it for more modalities",
        "NAME=PATH",
        is_path=True,
        many=True,
    ),
    _text_key("out", "a path", "folder of the result, the artifact", "DIR", is_path=True),
    _text_key("user_column", _COLUMN, "column of user ids (default: a known name)", "NAME"),
    _text_key("item_column", _COLUMN, "column of item ids (default: a known name)", "NAME"),
    _text_key("weight_column", _COLUMN, "column of weights, 0 or more (default: 1 per interaction)", "NAME"),
    _text_key("time_column", _COLUMN, "column of times, for --half-life (default: a known name)", "NAME"),
    Key(
        "half_life",
        _check_half_life,
        "a time such as 12h, 30d or 8w, or a number above 0 in the unit of the time column",
        "an interaction so much older than the user's newest has half the weight: 30d, also s, m, h, w; columns of"
        " numbers are seconds then. A number alone is in the unit of the column",
        "TIME",
    ),
    _text_key("session_column", _COLUMN, "column of session ids: rows are sessions, not users", "NAME"),
    Key("where", _check_where, 'a comparison such as "x_label == 0"', 'rows to take, such as "x_label == 0"', "EXPR"),
    Key(
        "users",
        _check_users,
        "a number of users, 1 or more, or the path of a file of user ids",
        "number of users, whose ids are then row numbers; or a file with the users' ids in the order of the rows",
        "N|PATH",
        is_path=True,
    ),
    Key(
        "lambda",
        _check_lambda,
        "a number from 0 to 1, shrink or attention",
        "weight of the user's own items against those of the cluster (default: 0.9); shrink: by how many items a user"
        " has; attention: by how alike they are",
        "0..1|shrink|attention",
        read=_read_lambda,
    ),
    Key(
        "tau",
        lambda value: _number(value, 0, 1e9),
        "a number from 0 to 1e9",
        "of shrink: items at which lambda is a half (default: from the data)",
        "N",
        read=float,
    ),
    Key(
        "temperature",
        lambda value: _number(value, 1e-6, 1e6),
        "a number from 1e-6 to 1e6",
        "of attention: how much more alike counts, in cosines (default: 0.1)",
        "T",
        read=float,
    ),
    Key(
        "clusters",
        _check_clusters,
        "a whole number, 1 or more, or auto",
        "clusters per modality (default: 8); auto: by what the data hold",
        "K|auto",
        read=_read_clusters,
    ),
    _choice_key("cluster_on", CLUSTER_ON, "what is clustered; interactions: users, by what they did"),
    _number_key("cluster_rank", (1, 1024), "of interactions: dimensions that users are placed in (default: 64)", "R"),
    _choice_key("weighting", ("mean", "sym"), "mean of the user's items, or normalized by both degrees"),
    _number_key("dim", (1, _MAX_INT), "project features to this width (default: no)", "D"),
    _flag_key("whiten", "unit variance per projected component; needs --dim"),
    _choice_key("scale", ("none", "items"), "items: users get the mean row norm of the items"),
    _choice_key("dtype", ("float32", "float16"), "type of the user vectors; centroids and projected items are float32"),
    _number_key("seed", (0, 2**32 - 1), "seed of the clustering (default: 0)", "N"),
    _number_key("restarts", (1, 1000), "starts of the clustering, of which the best is taken (default: 1)", "N"),
    Key(
        "tolerance",
        lambda value: _number(value, 0, 1),
        "a number from 0 to 1",
        "clustering ends with a pass over all rows that lowers the inertia by less than this share (default: 1e-3);"
        " 0: when no label changes",
        "0..1",
        read=float,
    ),
    _choice_key("kmeans", ("auto", "own", "cuml"), "K-means of gpu-init, or of cuML on CUDA; auto: the cheaper"),
    _choice_key("backend", ("auto", "cpu", "cuda"), "where it runs; auto takes a GPU where there is one"),
    Key(
        "memory",
        _check_memory,
        "a size of 16MiB or more, such as 4GB, 500MB, 1.5GiB or a number of bytes",
        "memory beside the interactions and one modality's features",
        "SIZE",
    ),
    _text_key(
        "scheduler",
        "local or the address of a Dask scheduler, such as tcp://HOST:8786",
        "spread the run over a Dask cluster; local: one started here, with a worker per core or GPU",
        "ADDRESS|local",
    ),
    _text_key("valid", "a path", "held-out interactions, for tune to rank settings by", "PATH", is_path=True),
    Key(
        "valid_where",
        _check_where,
        'a comparison such as "x_label == 1"',
        'held-out rows to take, of --valid or of the interactions, such as "x_label == 1"',
        "EXPR",
    ),
    _flag_key("resume", "go on with an unfinished run, if there is one"),
    _flag_key("overwrite", "replace an artifact that is there"),
    _choice_key("log_format", ("auto", "text", "json"), "auto: a bar on a terminal, else one line per step"),
)
_BY_NAME = {key.name: key for key in KEYS}


NAMES = frozenset(_BY_NAME)

# Keys that `gpu-init run` has no flag for; a job file may have them.
TUNED = frozenset({"valid", "valid_where"})

# Keys of `gpu-init assign`; the others are the artifact's.
COLUMNS = ("user_column", "item_column", "weight_column", "time_column", "session_column")
ASSIGNED = (
    *("interactions", "features", "out", *COLUMNS, "where", "users"),
    *("backend", "memory", "resume", "overwrite", "log_format"),
)


def add_flags(parser: argparse.ArgumentParser, names: Collection[str] = tuple(_BY_NAME)) -> None:
    """Add a flag for every key, or those named; one that is not given leaves no attribute behind."""
    for key in (_BY_NAME[name] for name in _BY_NAME if name in names):
        common: dict[str, Any] = {"dest": key.name, "default": argparse.SUPPRESS, "help": key.help.replace("%", "%%")}
        if key.is_flag:
            parser.add_argument(key.flag, action=argparse.BooleanOptionalAction, **common)
        else:
            parser.add_argument(key.flag, action="append" if key.many else "store", metavar=key.metavar, **common)


# Loading.


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
    values = {
        **{key.name: key.checked(value, key.name) for key, value in _keyed(base or {}, "base").items()},
        **(_from_file(path) if path is not None else {}),
        **_from_environment(environ),
        **{key.name: key.checked(value, key.flag, written=True) for key, value in _keyed(flags, "flags").items()},
    }
    _check_complete(values)
    by_field = {_BY_NAME[name].field: value for name, value in values.items()}
    settings = Settings(**{name: value for name, value in by_field.items() if name in _SETTINGS})
    return JobConfig(settings=settings, **{name: value for name, value in by_field.items() if name not in _SETTINGS})


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
    asked = {
        **_from_environment(environ),
        **{key.name: key.checked(value, key.flag, written=True) for key, value in _keyed(flags, "flags").items()},
    }
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
        if path is not None and os.path.isfile(path):  # a pipe is read once
            in_file = {name.replace("-", "_"): value for name, value in _toml(path).items()}
            return str(key.checked(in_file.get(key.name, AUTO), path))
    return AUTO


def variable(name: str) -> str:
    """Name of the environment variable of a key."""
    return _BY_NAME[name].variable


def settings_to_dict(settings: Settings) -> dict[str, Any]:
    """Give the settings under their names in TOML, as plain JSON values."""
    return {key.name: getattr(settings, key.field) for key in KEYS if key.field in _SETTINGS}


def _keyed(given: Mapping[str, Any], place: str) -> dict[Key, Any]:
    """Keys of a mapping's names, written with - or _."""
    found: dict[Key, Any] = {}
    for name, value in given.items():
        key = _BY_NAME.get(name.replace("-", "_"))
        if key is None:
            near = difflib.get_close_matches(name.replace("-", "_")[:100], _BY_NAME, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(_BY_NAME)}."
            raise InputError(f"{place}: unknown key {_shown(name)}; {remedy}")
        if key in found:
            raise InputError(f"{place}: {key.name} is given twice, with - and with _.")
        found[key] = value
    return found


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    given = {key: environ.get(key.variable, "").strip() for key in KEYS}
    return {key.name: key.checked(value, key.variable, written=True) for key, value in given.items() if value}


def _from_file(path: str) -> dict[str, Any]:
    folder = os.path.dirname(path)
    values = {}
    for key, value in _keyed(_toml(path), path).items():
        checked = key.checked(value, f"{path}, key {key.name}")
        values[key.name] = _relative_to(folder, checked) if key.is_path else checked
    return values


def _relative_to(folder: str, value: Any) -> Any:
    """Paths relative to a folder, unless they are absolute or URLs; a number of users is none."""
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
        if deep:
            line = text.count("\n", 0, deep.start()) + 1
            raise InputError(f"{path}: line {line} has a key of more than 16 parts; keys of a job have two at most.")
        return tomllib.loads(text)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8 text, as TOML must be.") from None
    except InputError:
        raise
    except RecursionError:
        raise InputError(f"{path}: lists or tables nested too deep.") from None
    except ValueError as error:  # of tomllib, with line and column; or of int, for a number of thousands of digits
        raise InputError(f"{path}: not TOML: {' '.join(str(error).split())}.") from None


def _check_complete(values: Mapping[str, Any]) -> None:
    missing = [_BY_NAME[name] for name in _REQUIRED if name not in values]
    if missing:
        names = ", ".join(key.name for key in missing)
        flags = " ".join(f"{key.flag} {key.metavar}" for key in missing)
        variables = ", ".join(key.variable for key in missing)
        raise InputError(
            f"missing: {names}.\nGive them in JOB.toml, as {flags}, or as environment variables: {variables}."
        )
