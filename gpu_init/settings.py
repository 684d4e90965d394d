"""The method's settings, and the keys by which a job names them: one table, `SETTING_KEYS`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from gpu_init.errors import InputError

PREFIX = "GPU_INIT_"  # of the environment variables
POLICIES = ("shrink", "attention")  # values of lambda that give each user a lambda of its own
CLUSTER_ON = ("users", "items", "interactions")
AUTO = "auto"  # the value of clusters that lets the data decide K
BELONGING = (  # (setting, other, value): the setting has a meaning only where the other one has the value
    ("tau", "lambda", "shrink"),
    ("temperature", "lambda", "attention"),
    ("cluster_rank", "cluster_on", "interactions"),
)
MAX_INT = 2**31 - 1
_HALF_LIFE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
_BOOLEANS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


class WrongValueError(ValueError):
    """A value is wrong in a way that the message says in a sentence of its own."""


@dataclass(frozen=True)
class Kind:
    """The values that a key may have.

    Attributes
    ----------
    wanted : str
        Says in an error what a right value is.
    convert : callable
        Takes a value as TOML and Python give it and returns it as it is kept; raises ValueError where it is wrong.
    read : callable
        Takes the text of a flag or a variable and returns what `convert` takes: the text itself where it is no other.
    metavar : str
        Stands for the value in the help of a flag whose key has no metavar of its own.
    """

    wanted: str
    convert: Callable[[Any], Any]
    read: Callable[[str], Any] = str
    metavar: str = ""


def number(low: float, high: float, *words: str, whole: bool = False, wanted: str = "") -> Kind:
    """Give the kind of the numbers from low to high, which are 0 or more, and of a few words."""
    numeric: Any = Integral if whole else Real

    def convert(value: Any) -> float | str:
        if isinstance(value, str) and value in words:
            return str(value)
        if isinstance(value, bool) or not isinstance(value, numeric):
            raise ValueError
        found: float = int(value) if whole else float(value)
        if not low <= found <= high:
            raise ValueError
        return abs(found)  # -0.0 becomes 0.0

    if whole and high == MAX_INT:
        wanted = wanted or f"a whole number, {low} or more, below 2^31"
    return Kind(wanted or f"a {'whole ' * whole}number from {low} to {high}", convert, _read_number)


def _read_number(text: str) -> float | str:
    if re.fullmatch(r"-?[0-9]{1,30}", text):
        return int(text)
    try:
        return float(text)
    except ValueError:
        return text


def choice(*words: str) -> Kind:
    """Give the kind of a few words, of which the first is the default."""

    def convert(value: Any) -> str:
        if not isinstance(value, str) or value not in words:
            raise ValueError
        return str(value)

    return Kind(f"{', '.join(words[:-1])} or {words[-1]}", convert, metavar=f"{{{','.join(words)}}}")


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


FLAG = Kind("true or false", _boolean, lambda text: _BOOLEANS.get(text.lower(), text))


@dataclass(frozen=True)
class Key:
    """A key of a job's TOML file, which is a flag and an environment variable too.

    Attributes
    ----------
    name : str
        The name in TOML, such as ``user_column``.
    kind : Kind
        The values that the key may have.
    help, metavar : str
        What the help of the flag says.
    """

    name: str
    kind: Kind
    help: str
    metavar: str = ""

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
        """Return the value as it is kept; one that is a text and ``written`` is read as a flag's or a variable's.

        Raises
        ------
        InputError
            The value is wrong; the message names the place where it stands, what was found and what is wanted.
        """
        try:
            return self.kind.convert(self.kind.read(value) if written and isinstance(value, str) else value)
        except WrongValueError as wrong:
            raise InputError(f"{place}: {wrong}") from None
        except (ValueError, OverflowError):  # the latter comes of an integer too large for a float
            raise InputError(f"{place}: found {shown(value)}; wanted is {self.kind.wanted}.") from None


def shown(value: Any) -> str:
    """Return a value as errors show it, which is short whatever the value is."""
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


# The order of this table is that of the settings in a manifest.
SETTING_KEYS = (
    Key(
        "lambda",
        number(0, 1, *POLICIES, wanted="a number from 0 to 1, shrink or attention"),
        "weight of the user's own items against those of the cluster (default: 0.9); shrink: by how many items a user"
        " has; attention: by how alike they are",
        "0..1|shrink|attention",
    ),
    Key(
        "tau",
        number(0, 1e9, wanted="a number from 0 to 1e9"),
        "of shrink: items at which lambda is a half (default: from the data)",
        "N",
    ),
    Key(
        "temperature",
        number(1e-6, 1e6, wanted="a number from 1e-6 to 1e6"),
        "of attention: how much more alike counts, in cosines (default: 0.1)",
        "T",
    ),
    Key(
        "clusters",
        number(1, MAX_INT, AUTO, whole=True, wanted="a whole number, 1 or more, or auto"),
        "clusters per modality (default: 8); auto: by what the data hold",
        "K|auto",
    ),
    Key("cluster_on", choice(*CLUSTER_ON), "what is clustered; interactions: users, by what they did (default: users)"),
    Key(
        "cluster_rank",
        number(1, 1024, whole=True),
        "of interactions: dimensions that users are placed in (default: 64)",
        "R",
    ),
    Key(
        "weighting",
        choice("mean", "sym"),
        "mean of the user's items, or normalized by both degrees (default: mean)",
    ),
    Key("dim", number(1, MAX_INT, whole=True), "project features to this width (default: no)", "D"),
    Key("whiten", FLAG, "unit variance per projected component; needs --dim"),
    Key("scale", choice("none", "items"), "items: users get the mean row norm of the items (default: none)"),
    Key(
        "dtype",
        choice("float32", "float16"),
        "type of the user vectors; centroids and projected items are float32 (default: float32)",
    ),
    Key("seed", number(0, 2**32 - 1, whole=True), "seed of the clustering (default: 0)", "N"),
    Key(
        "restarts",
        number(1, 1000, whole=True),
        "starts of the clustering, of which the best is taken (default: 1)",
        "N",
    ),
    Key(
        "tolerance",
        number(0, 1),
        "clustering ends with a pass over all rows that lowers the inertia by less than this share (default: 1e-3);"
        " 0: when no label changes",
        "0..1",
    ),
    Key(
        "kmeans",
        choice("auto", "own", "cuml"),
        "K-means of gpu-init, or of cuML on CUDA; auto: the cheaper (default: auto)",
    ),
)


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
        Type of the user vectors that are written.
    seed : int, default=0
        Seed of the clustering, in [0, 2^32).
    restarts : int, default=1
        Starts of K-means on its sample, 1 or more; the best goes on.
    tolerance : float, default=1e-3
        In [0, 1]: a pass of K-means over all rows that lowers the inertia by less than this share is the last; 0:
        passes go on until no label changes.
    kmeans : {"auto", "own", "cuml"}, default="auto"
        Whose K-means finds the centroids that the passes over all rows start from; ``cuml`` needs CUDA.
    tau : float, optional
        Belongs to lambda ``shrink``, 0 or more; None: from the data.
    temperature : float, optional
        Belongs to lambda ``attention``, above 0; None: 0.1.
    cluster_rank : int, optional
        Belongs to cluster_on ``interactions``, 1 or more: dimensions that users are placed in; None: 64.

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
        for key in SETTING_KEYS:
            value, default = getattr(self, key.field), getattr(Settings, key.field)
            if value is not None or default is not None:
                object.__setattr__(self, key.field, key.checked(value, key.name))
        if self.whiten and self.dim is None:
            raise InputError("whiten needs dim, the width that features are projected to; set it too, such as dim 64.")
        for name, other, value in BELONGING:
            found = self.lam if other == "lambda" else self.cluster_on
            if getattr(self, name) is not None and found != value:
                raise InputError(f"{name} is of {other} {value}; set {other} to {value} too, or leave {name} out.")


def settings_to_dict(settings: Settings) -> dict[str, Any]:
    """Give the settings under their names in TOML, as plain JSON values."""
    return {key.name: getattr(settings, key.field) for key in SETTING_KEYS}


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
