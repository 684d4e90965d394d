"""Presets for the models of MMRec-style libraries, and runs inside those libraries.

MMRec (enoche/MMRec) and MRLib (Jinfeng-Xu/Multimodal-Recommendation-Library) share their layout: a folder ``src`` with
``configs``, ``common``, ``models`` and ``utils``; data sets as folders of ``NAME.inter`` and ``*_feat.npy``. In code of
one's own, after the model is built and before its optimizer is::

    gpu_init.mmrec.attach(model, gpu_init.load("vectors"))

and without touching code, the library's own training with and without the initialisation::

    python -m gpu_init.mmrec --library MMRec --model FREEDOM --dataset tiktok --make

No file of a library or of a data folder is written to or changed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import math
import os
import sys
import tempfile
import time
import tomllib
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NoReturn

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from gpu_init import config as job_config
from gpu_init.artifact.read import load
from gpu_init.errors import GpuInitError, InputError
from gpu_init.inputs import features as inputs_features
from gpu_init.show.progress import Progress

try:
    import torch

    from gpu_init.torch import Table, init_model_, parse_modalities
except ImportError:
    if __name__ != "__main__":
        raise
    print("gpu-init: torch is not installed.\npip install 'gpu-init[torch]' brings it.", file=sys.stderr)
    sys.exit(2)


# Presets: data, to be changed by measurement.

Vectors = Sequence[Table]


@dataclass(frozen=True)
class Preset:
    """What a model's tables get, and the settings of the job that makes it.

    Attributes
    ----------
    tables : mapping of str to sequence of Table
        Dotted path to what goes there. Modalities are called by what they are to the model: ``v`` for the visual
        one, ``t`` for the textual one.
    width : "embedding", "raw" or int
        Of the vectors. ``embedding``: the model's embedding size, shared out where modalities go side by side;
        ``raw``: the features are not projected; or a number.
    settings : mapping
        Other keys of the job: ``lambda``, ``clusters``, ``whiten`` and so on.
    """

    tables: Mapping[str, Vectors]
    width: str | int = "embedding"
    settings: Mapping[str, Any] = field(
        default_factory=lambda: {"lambda": 0.5, "clusters": 8, "cluster_on": "interactions", "whiten": True}
    )


_USUAL = {"mode": "add", "gain": "match", "centre": True, "cold": "keep"}


def _filled(modalities: str, **changes: Any) -> Vectors:
    """Give vectors as nearly all presets do, but for changes: added at the table's norm, less what all rows share."""
    options: dict[str, Any] = {**_USUAL, **changes}
    return (Table(modalities, **options),)


_USERS_ADDED = Preset({"user_embedding.weight": _filled("v+t")})

PRESETS: dict[str, Preset] = {
    # Model-wide user tables beside item tables of ids: users in the whitened space of the model's width.
    "FREEDOM": _USERS_ADDED,
    "LATTICE": _USERS_ADDED,
    "MGCN": _USERS_ADDED,
    "BM3": _USERS_ADDED,
    "LGMRec": _USERS_ADDED,
    # The table of ids, users and then items, is added in each layer, and never trained.
    "MMGCN": Preset(
        {
            "id_embedding": (
                *_filled("v+t", mode="replace", gain=4.0, offset=0),
                *_filled("items:v+t", mode="replace", gain=4.0, offset="users"),
            )
        }
    ),
    # Preferences are brought to length 1, so that the shorter they start, the faster they turn.
    "DRAGON": Preset(
        {f"{role}_gcn.preference": _filled("v+t", mode="replace", gain=0.1) for role in ("v", "t")},
        width=64,  # whatever the embedding size
        settings={**_USERS_ADDED.settings, "lambda": 0.1, "clusters": 64},
    ),
    # Users are twice as wide as items: one half meets the items' ids, the other their features through item_linear.
    "VBPR": Preset(
        {"u_embedding": _filled("t,v", via="item_linear", columns="last")}, "raw", {"lambda": 0.9, "clusters": 8}
    ),
}

_ROLES = {"v": ("image", "visual", "vision", "v", "img"), "t": ("text", "textual", "t", "txt")}
_TABLE_FIELDS = {one.name for one in fields(Table)} - {"modalities", "rows"}


def preset_of(model: str) -> Preset:
    """Give a model's preset.

    Raises
    ------
    InputError
        There is none.
    """
    if model not in PRESETS:
        raise InputError(
            f"no preset for {model}; there are {', '.join(PRESETS)}. gpu_init.torch.init_model_ fills tables by name."
        )
    return PRESETS[model]


def adjusted(preset: Preset, changes: Mapping[str, Any]) -> Preset:
    """Give a preset with some of it changed.

    Parameters
    ----------
    preset : Preset
    changes : mapping
        Fields of `Table` (``mode``, ``gain``, ``centre``, ``cold``, ``via``, ``offset``, ``columns``), for every
        table; ``tables``, path to modalities or to a mapping of fields, instead of the preset's tables, with the
        fields that nearly all presets have; ``width``; or a key of the job's settings.

    Raises
    ------
    InputError
        A key that is none of those, or a wrong value.
    """
    settings = {key.name for key in job_config.KEYS if key.field in {f.name for f in fields(job_config.Settings)}}
    known = _TABLE_FIELDS | {"tables", "width"} | (settings - {"dim"})
    unknown = set(changes) - known
    if unknown:
        raise InputError(f"preset: unknown key {min(unknown)}; the keys are {', '.join(sorted(known))}.")
    width = changes.get("width", preset.width)
    if width not in ("embedding", "raw") and (isinstance(width, bool) or not isinstance(width, int) or width < 1):
        raise InputError(f"preset: width: found {width!r}; wanted is embedding, raw or a number.")
    tables: Mapping[str, Vectors] = preset.tables
    if "tables" in changes:
        tables = {path: tuple(map(_table, _listed(given))) for path, given in changes["tables"].items()}
    of_tables = {name: value for name, value in changes.items() if name in _TABLE_FIELDS}
    kept = {name: value for name, value in preset.settings.items() if name != "whiten" or width != "raw"}
    return Preset(
        {path: tuple(replace(one, **of_tables) for one in vectors) for path, vectors in tables.items()},
        width,
        {**kept, **{name: value for name, value in changes.items() if name in settings}},
    )


def _listed(given: Any) -> list[Any]:
    return given if isinstance(given, list) else [given]


def _table(given: Any) -> Table:
    options: dict[str, Any] = {**_USUAL, **({"modalities": given} if isinstance(given, str) else given)}
    if set(options) - _TABLE_FIELDS != {"modalities"}:
        raise InputError(f"preset: tables: found {given!r}; wanted are modalities, and fields of a table.")
    return Table(**options)


def attach(
    model: Any,
    artifact: Mapping[str, Any],
    preset: Preset | None = None,
    roles: Mapping[str, str] | None = None,
) -> dict[str, Vectors]:
    """Fill a model's tables from an artifact, as its preset says.

    Parameters
    ----------
    model : nn.Module
        Built, and not yet given to an optimizer.
    artifact : Artifact or Result
        Made with settings that suit the preset: `job_settings`.
    preset : Preset, optional
        By default that of the model's class.
    roles : mapping, optional
        Modality of each role, ``{"v": "image", "t": "audio"}``. By default ``v`` is image (or visual), ``t`` text
        (or any other modality where there is no text).

    Returns
    -------
    dict of str to sequence of Table
        What was filled, and with what.

    Raises
    ------
    InputError
        No preset, no modality for any of its tables, or what does not fit (`torch.init_model_`).
    """
    chosen = preset if preset is not None else preset_of(type(model).__name__)
    named = roles_of(artifact) if roles is None else roles
    tables = {
        path: kept
        for path, vectors in chosen.tables.items()
        if (kept := [resolved for one in vectors if (resolved := _resolved(one, named)) is not None])
    }
    if not tables:
        raise InputError(f"{type(model).__name__}: none of {', '.join(artifact)} is a modality that its preset names.")
    init_model_(model, artifact, tables)
    return dict(tables)


def roles_of(names: Iterable[str]) -> dict[str, str]:
    """Tell which modality is the visual one and which the textual one; another stands in for the one not there."""
    left = list(names)
    roles: dict[str, str] = {}
    for role, known in _ROLES.items():
        found = next((name for name in left if name.lower() in known), None)
        if found is not None:
            roles[role] = found
            left.remove(found)
    for role in _ROLES:
        if role not in roles and left:
            roles[role] = left.pop(0)
    return roles


def _resolved(table: Table, roles: Mapping[str, str]) -> Table | None:
    """Table with the modalities' own names; roles that nobody has are left out, None where nothing remains."""
    side, terms, beside = parse_modalities(table.modalities)
    kept = [(weight, roles.get(name, name)) for weight, name in terms if name in roles or name not in _ROLES]
    plain = {weight for weight, _ in kept} == {1.0} or (not beside and len({weight for weight, _ in kept}) == 1)
    parts = [name if plain else f"{weight:.6f}*{name}" for weight, name in kept]
    prefix = "items:" if side == "items" else ""
    return replace(table, modalities=prefix + ("," if beside else "+").join(parts)) if parts else None


def job_settings(preset: Preset, embedding_size: int) -> dict[str, Any]:
    """Give the job's settings for a preset and a model: its `settings`, and ``dim``.

    Raises
    ------
    InputError
        Modalities side by side cannot share the embedding size evenly.
    """
    if preset.width == "raw":
        return dict(preset.settings)
    dim = preset.width
    if not isinstance(dim, int):
        shares = {
            len(terms) if beside else 1
            for vectors in preset.tables.values()
            for _, terms, beside in (parse_modalities(one.modalities) for one in vectors)
        }
        if len(shares) != 1 or embedding_size % min(shares):
            raise InputError(f"preset: an embedding of {embedding_size} is not shared out evenly; give width.")
        dim = embedding_size // min(shares)
    return {**preset.settings, "dim": dim}


def fitted(preset: Preset, embedding_size: int, data: Data) -> tuple[Preset, dict[str, Any]]:
    """Give `job_settings` for a data set, and the preset for them.

    Where features are narrower than the vectors that the model asks for, they keep their width, and fill the first
    columns of its tables.

    Raises
    ------
    InputError
        As `job_settings`; or a file of features that cannot be read.
    """
    settings = job_settings(preset, embedding_size)
    used = roles_of(data.features).values()
    narrowest = min(inputs_features.read(name, data.features[name]).values.shape[1] for name in used)
    if settings.get("dim", 0) <= narrowest:
        return preset, settings
    return adjusted(preset, {"columns": "first"}), {**settings, "dim": narrowest}


# Data folders.


@dataclass(frozen=True)
class Data:
    """A data folder in MMRec's layout.

    Attributes
    ----------
    folder, name, inter : str
        Absolute path; name of the data set; path of its interactions.
    user_column, item_column : str
        As the header of the interactions has them.
    features : dict of str to str
        Modality to file, of every ``*_feat.npy``; the visual one and the textual one first.
    users, items : int
        Largest ids plus 1, those of validation and test included: the libraries' sizes of tables.
    """

    folder: str
    name: str
    inter: str
    user_column: str
    item_column: str
    features: dict[str, str]
    users: int
    items: int


_COLUMNS = {
    "user": ("userID", "user_id:token", "user_id", "uid"),
    "item": ("itemID", "item_id:token", "item_id", "iid"),
}
_SPLIT = "x_label"
_ENDING = "_feat.npy"


def read_data(folder: str | os.PathLike[str]) -> Data:
    """Find out what a data folder holds.

    Raises
    ------
    InputError
        Not one ``.inter`` file, columns that are not there, or no features.
    """
    root = os.path.abspath(folder)
    if not os.path.isdir(root):
        raise InputError(f"{root}: there is no such folder; name the data set's folder with --data.")
    inters = sorted(name for name in os.listdir(root) if name.endswith(".inter"))
    if len(inters) != 1:
        raise InputError(f"{root}: wanted is one .inter file; found are {', '.join(inters) or 'none'}.")
    inter = os.path.join(root, inters[0])
    header = list(pd.read_csv(inter, sep="\t", nrows=0).columns)
    columns = {side: next((one for one in known if one in header), None) for side, known in _COLUMNS.items()}
    user, item = columns["user"], columns["item"]
    if user is None or item is None or _SPLIT not in header:
        raise InputError(
            f"{inter}: its columns are {', '.join(header)}; wanted are users (userID), items (itemID) and {_SPLIT}"
            " (0 train, 1 validation, 2 test), separated by tabs."
        )
    files = {name.removesuffix(_ENDING): name for name in sorted(os.listdir(root)) if name.endswith(_ENDING)}
    if not files:
        raise InputError(f"{root}: there are no features, files such as image{_ENDING}.")
    roles = roles_of(files)
    ordered = [*roles.values(), *(name for name in files if name not in roles.values())]
    ids = pd.read_csv(inter, sep="\t", usecols=[user, item]).max() + 1
    return Data(
        root,
        inters[0].removesuffix(".inter"),
        inter,
        user,
        item,
        {name: os.path.join(root, files[name]) for name in ordered},
        int(ids[user]),
        int(ids[item]),
    )


def make(data: Data, settings: Mapping[str, Any], out: str, *, overwrite: bool = False) -> str:
    """Run the job on a data folder's training rows; an artifact made from the same is taken as it is.

    Parameters
    ----------
    data : Data
    settings : mapping
        Keys of the job, such as `job_settings` gives.
    out : str
        Folder of the artifact.
    overwrite : bool
        Replace an artifact made from something else.

    Returns
    -------
    str
        Its path.
    """
    from gpu_init.run import run

    flags: dict[str, Any] = {
        "interactions": data.inter,
        "user_column": data.user_column,
        "item_column": data.item_column,
        "where": f"{_SPLIT} == 0",
        "users": data.users,
        "features": {name: data.features[name] for name in roles_of(data.features).values()},
        "out": out,
        "overwrite": overwrite,
        "resume": not overwrite,
        **settings,
    }
    with Progress(None) as progress:
        return run(job_config.load(None, {}, flags), progress)


# A library in this process: its modules are called models, common and utils, so there is room for one.


@dataclass(frozen=True)
class Outcome:
    """What a run gave.

    Attributes
    ----------
    curve : list of float
        Validation score (the library's valid_metric, rounded as it does) after each epoch.
    best_epoch : int
        Epoch of the best score, from 1; 0 where there was none.
    valid, test : dict of str to float
        The library's metrics at that epoch.
    seconds : float
        Of training and evaluation.
    diverged : bool
        The loss was not a number, and training ended there.
    """

    curve: list[float]
    best_epoch: int
    valid: dict[str, float]
    test: dict[str, float]
    seconds: float
    diverged: bool

    def epochs_to(self, share: float) -> int:
        """First epoch, from 1, whose score is at least a share of the best one; 0 where there was none."""
        best = max(self.curve, default=0.0)
        return next((epoch for epoch, score in enumerate(self.curve, 1) if score >= share * best), 0)


# Called after each evaluation: "valid" or "test", users (n,), and their best items (n, k), best first.
Observer = Callable[[str, NDArray[np.int64], NDArray[np.int64]], None]

_OPTIONS: dict[str, Any] = {
    "metrics": ["Recall", "NDCG"],
    "topk": [10, 20],
    "valid_metric": "Recall@20",
    "eval_step": 1,
    "save_recommended_topk": False,
    "enable_visualization": False,
}
_USER_GRAPH = "user_graph_dict.npy"
_USER_GRAPH_MODELS = ("DRAGON", "DualGNN")
_NEIGHBOURS = 200


class Library:
    """A checkout of MMRec or of a library with its layout.

    Parameters
    ----------
    path : path-like
        The checkout, or its ``src``.

    Raises
    ------
    InputError
        It is not such a checkout, something that it needs is not installed, or another one is in this process.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        root = os.path.abspath(path)
        self.source = next(
            (one for one in (os.path.join(root, "src"), root) if os.path.isfile(f"{one}/utils/configurator.py")), ""
        )
        if not self.source:
            raise InputError(f"{root}: not a checkout of MMRec or MRLib: it has no src/utils/configurator.py.")
        self.name = os.path.basename(os.path.dirname(self.source))
        for name in ("common", "models", "utils"):
            self._claim(name)
        _adapt()
        if self.source not in sys.path:
            sys.path.insert(0, self.source)
        try:
            with _no_bytecode():
                names = ("utils.configurator", "utils.dataset", "utils.dataloader", "utils.utils", "common.trainer")
                self._configurator, self._dataset, self._loaders, self._utils, _ = map(importlib.import_module, names)
        except ImportError as error:
            raise _not_installed(self.name, error) from None

    def _claim(self, name: str) -> None:
        """See that a package of the library is found under its name, which is nobody's in particular."""
        folder = os.path.join(self.source, name)
        if name in sys.modules:
            there = sys.modules[name]
            places = list(getattr(there, "__path__", [])) or [getattr(there, "__file__", None) or "what was imported"]
            if folder not in places:
                raise InputError(
                    f"{self.source}: {places[0]} is module {name} of this process already; one library at a time."
                )
        elif not os.path.isfile(os.path.join(folder, "__init__.py")):
            # Without that file, any common.py or utils.py on the way would be found before it.
            package = types.ModuleType(name)
            package.__path__ = [folder]
            sys.modules[name] = package

    def data_folder(self, dataset: str) -> str:
        """Folder of a data set in the library's own place for data."""
        places = [os.path.join(base, "data", dataset) for base in (os.path.dirname(self.source), self.source)]
        found = next((place for place in places if os.path.isdir(place)), None)
        if found is None:
            raise InputError(f"{places[0]}: there is no such folder; name the data set's folder with --data.")
        return found

    def config(self, model: str, data: Data, options: Mapping[str, Any], folder: str = "") -> Any:
        """The library's configuration, with one value for each hyper-parameter: the first of those listed.

        Raises
        ------
        InputError
            The library has no such model.
        """
        if not os.path.isfile(os.path.join(self.source, "models", f"{model.lower()}.py")):
            names = sorted(name[:-5] for name in os.listdir(f"{self.source}/configs/model") if name.endswith(".yaml"))
            raise InputError(f"{self.name} has no model {model}; it has {', '.join(names)}.")
        given = {
            "USER_ID_FIELD": data.user_column,
            "ITEM_ID_FIELD": data.item_column,
            "inter_file_name": os.path.basename(data.inter),
            "inter_splitting_label": _SPLIT,
            "field_separator": "\t",
            "filter_out_cod_start_users": True,
            "vision_feature_file": f"image{_ENDING}",
            "text_feature_file": f"text{_ENDING}",
            "user_graph_dict_file": _USER_GRAPH,
            "data_path": os.path.join(folder, ""),
            **_OPTIONS,
            **options,
        }
        with contextlib.chdir(self.source):  # where MMRec looks for its configs
            made = self._configurator.Config(model, data.name, given)
        for name in made["hyper_parameters"]:
            if isinstance(made[name], list):
                made[name] = made[name][0]
        return made

    def train(
        self,
        model: str,
        data: Data,
        *,
        seed: int = 0,
        options: Mapping[str, Any] | None = None,
        prepare: Callable[[Any], object] | None = None,
        observe: Observer | None = None,
    ) -> Outcome:
        """Build a model and let the library train it, early stopping included.

        Parameters
        ----------
        model : str
            Class of the model, such as ``"FREEDOM"``.
        data : Data
        seed : int
            Of the library's random states. Runs of one seed differ in what `prepare` does, and in nothing else.
        options : mapping, optional
            Values over those of the library's configuration files.
        prepare : callable, optional
            Called with the model, before the optimizer is made: `attach`.
        observe : callable, optional
            Called after each evaluation.
        """
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr), _no_bytecode():
            _stage(data, os.path.join(folder, data.name))
            config = self.config(model, data, {**(options or {}), "seed": seed}, folder)
            if model in _USER_GRAPH_MODELS:
                _write_user_graph(data, os.path.join(folder, data.name, _USER_GRAPH))
            if config["device"].type == "cpu":  # LATTICE and MGCN call it unasked
                _replace(torch.Tensor, "cuda", lambda tensor, *_, **__: tensor)
            train, valid, test = self._loaded(config)
            self._utils.init_seed(seed)
            train.pretrain_setup()
            try:
                built = self._utils.get_model(model)(config, train).to(config["device"])
            except ImportError as error:
                raise _not_installed(self.name, error) from None
            # A parameter to which the model assigns a tensor later, which torch refuses: DRAGON's.
            for name in [one for one in ("result_embed",) if one in built._parameters]:
                value = built._parameters.pop(name).detach()
                setattr(built, name, value)
            if prepare is not None:
                prepare(built)
            return self._fit(config, built, (train, valid, test), observe)

    def _loaded(self, config: Any) -> tuple[Any, Any, Any]:
        parts = self._dataset.RecDataset(config)
        str(parts)  # counts what the loaders ask for
        train, valid, test = parts.split()
        for part in (train, valid, test):
            str(part)
        size = config["eval_batch_size"]
        return (
            self._loaders.TrainDataLoader(config, train, batch_size=config["train_batch_size"], shuffle=True),
            self._loaders.EvalDataLoader(config, valid, additional_dataset=train, batch_size=size),
            self._loaders.EvalDataLoader(config, test, additional_dataset=train, batch_size=size),
        )

    def _fit(self, config: Any, model: Any, loaders: tuple[Any, Any, Any], observe: Observer | None) -> Outcome:
        """Train, listening to what the library's evaluator is given and gives."""
        train, valid, test = loaders
        trainer = self._utils.get_trainer()(config, model)
        score, curve = config["valid_metric"].lower(), []
        evaluate = trainer.evaluator.evaluate

        def listen(batches: list[Any], loader: Any, **more: Any) -> Any:
            result = evaluate(batches, loader, **more)
            if loader is valid:
                curve.append(float(result[score]))
                print(f"{config['model']} epoch {len(curve)}: validation {score} {curve[-1]:.4f}", file=sys.stderr)
            if observe is not None:
                top = torch.cat(batches).cpu().numpy()
                observe("valid" if loader is valid else "test", loader.get_eval_users().cpu().numpy(), top)
            return result

        trainer.evaluator.evaluate = listen
        start = time.perf_counter()
        trainer.fit(train, valid_data=valid, test_data=test, saved=False, verbose=False)
        seconds = time.perf_counter() - start
        best = int(np.argmax(curve)) + 1 if curve else 0
        ended = len(curve) >= config["epochs"] or trainer.cur_step > config["stopping_step"]
        return Outcome(curve, best, trainer.best_valid_result, trainer.best_test_upon_valid, seconds, not ended)


@contextlib.contextmanager
def _no_bytecode() -> Iterator[None]:
    """Import without leaving compiled code behind: a checkout stays as it is."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


def _not_installed(library: str, error: ImportError) -> InputError:
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return InputError(f"{library} does not go with what is installed: {error}")
    package = error.name.partition(".")[0]
    name = {"yaml": "pyyaml"}.get(package, package)
    return InputError(f"{library} needs {package}, which is not installed: pip install {name}")


def _stage(data: Data, folder: str) -> None:
    """Links to the data set's files in a folder of its own, to which the libraries may write what they cache.

    Both libraries ask for an image and a text; a modality of another name stands in where there is none.
    """
    os.makedirs(folder)
    for name in os.listdir(data.folder):
        if os.path.isfile(os.path.join(data.folder, name)) and not name.endswith(".pt"):  # caches of earlier features
            os.symlink(os.path.join(data.folder, name), os.path.join(folder, name))
    for role, name in roles_of(data.features).items():
        link = os.path.join(folder, ("image" if role == "v" else "text") + _ENDING)
        if not os.path.lexists(link):
            os.symlink(data.features[name], link)


def _write_user_graph(data: Data, path: str) -> None:
    """The file that MMRec's DRAGON reads: of each user, those with most items in common, and how many these are."""
    if os.path.lexists(path):
        return
    from scipy import sparse

    table = pd.read_csv(data.inter, sep="\t")
    table = table[table[_SPLIT] == 0].drop_duplicates([data.user_column, data.item_column])
    pairs = (table[data.user_column].to_numpy(), table[data.item_column].to_numpy())
    R = sparse.csr_matrix((np.ones(len(table), np.float32), pairs), shape=(data.users, data.items))
    common = (R @ R.T).tocsr()
    common.setdiag(0)
    common.eliminate_zeros()
    graph: dict[int, list[list[Any]]] = {}
    for user in range(data.users):
        row = slice(common.indptr[user], common.indptr[user + 1])
        order = np.lexsort((common.indices[row], -common.data[row]))[:_NEIGHBOURS]
        graph[user] = [common.indices[row][order].tolist(), common.data[row][order].tolist()]
    np.save(path, np.array(graph, dtype=object), allow_pickle=True)


# What the libraries ask of older packages, and what they import and never use.


_NEVER_USED = {
    "lmdb": ("lmdb",),
    "torchvision": ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"),
}


def _adapt() -> None:
    """Let the libraries run on today's packages, without a change to their files; may be called again."""
    from scipy import sparse

    if not hasattr(sparse.dok_matrix, "_update"):  # gone from scipy 1.13 on
        _replace(sparse.dok_matrix, "_update", lambda matrix, entries: matrix._dict.update(entries))
    if not hasattr(np, "float"):  # gone from numpy 1.24 on
        _replace(np, "float", float)
    for package, modules in _NEVER_USED.items():
        if _is_missing(package):
            sys.modules.update({name: _Unused(name) for name in modules})
    if _is_missing("torch_scatter"):  # compiled for one version of torch each; MGCN sums by it
        stand_in: Any = types.ModuleType("torch_scatter")
        stand_in.scatter_add = _scatter_add
        sys.modules["torch_scatter"] = stand_in


def _is_missing(package: str) -> bool:
    return package not in sys.modules and importlib.util.find_spec(package) is None


class _Unused(types.ModuleType):
    """A module that is imported and never used: whatever is asked of it is there."""

    __path__: list[str] = []  # noqa: RUF012  as packages have it

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return object()


def _replace(owner: Any, name: str, value: Any) -> None:
    setattr(owner, name, value)


def _scatter_add(values: Any, index: Any, dim: int = -1, dim_size: int | None = None) -> Any:
    """torch_scatter's function, for values and index of one dimension."""
    size = int(index.max()) + 1 if dim_size is None else dim_size
    return values.new_zeros(size).index_add_(dim, index, values)


# The command.


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}\n{self.prog} --help lists what there is.")


def values_of(pairs: Iterable[str]) -> dict[str, Any]:
    """Read ``KEY=VALUE`` texts: values are TOML, or text where they are not.

    Raises
    ------
    InputError
        A text without ``=``.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.strip():
            raise InputError(f"found {pair!r}; wanted is KEY=VALUE.")
        try:
            found[key.strip()] = tomllib.loads(f"x = {text}")["x"]
        except tomllib.TOMLDecodeError:
            found[key.strip()] = text.strip()
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and give its exit code: 0 done, 2 wrong input, 3 too little memory or disk."""
    try:
        _run(_arguments(arguments))
    except GpuInitError as error:
        print("gpu-init:", error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m gpu_init.mmrec",
        description="Train a model of MMRec or MRLib from random and from initialised tables, and print both.",
        allow_abbrev=False,
    )
    parser.add_argument("--library", required=True, metavar="PATH", help="checkout of MMRec or MRLib")
    parser.add_argument("--model", required=True, help=f"one of {', '.join(PRESETS)}, as the library writes it")
    parser.add_argument("--dataset", required=True, metavar="NAME", help="name of the data set")
    parser.add_argument("--data", metavar="DIR", help="its folder (default: NAME in the library's data folder)")
    parser.add_argument("--artifact", metavar="DIR", help="vectors to start from (default with --make: a new folder)")
    parser.add_argument("--make", action="store_true", help="make the vectors first, with the preset's settings")
    parser.add_argument("--overwrite", action="store_true", help="with --make: replace an artifact that is there")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], metavar="N", help="one pair of runs each")
    parser.add_argument("--epochs", type=int, metavar="N", help="at most so many (default: the library's)")
    parser.add_argument("--config", nargs="+", default=[], metavar="KEY=VALUE", help="the library's own settings")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="changes to the preset")
    given = parser.parse_args(arguments)
    if not given.make and not given.artifact:
        raise InputError("give --artifact DIR, vectors that were made before, or --make.")
    if given.epochs is not None and given.epochs < 1:
        raise InputError(f"--epochs: found {given.epochs}; wanted is a number, 1 or more.")
    return given


def _run(given: argparse.Namespace) -> None:
    preset = adjusted(preset_of(given.model), values_of(given.set))
    options = values_of(given.config) | ({} if given.epochs is None else {"epochs": given.epochs})
    library = Library(given.library)
    data = read_data(given.data or library.data_folder(given.dataset))
    config = library.config(given.model, data, options)
    artifact = None if given.make else load(given.artifact)
    tried = {name: config[name] for name in config["hyper_parameters"] if name != "seed"}
    print(f"{library.name} {given.model} on {given.dataset}:", *(f"{name}={value}" for name, value in tried.items()))
    roles = roles_of(data.features)
    if roles.get("t") not in (None, *_ROLES["t"]):
        print(f"there is no text: {roles['t']} stands in for it")
    if artifact is None:
        preset, settings = fitted(preset, int(config["embedding_size"]), data)
        place = os.path.abspath(given.artifact or f"{given.dataset}-{given.model}-vectors")
        artifact = load(make(data, settings, place, overwrite=given.overwrite))
        print(f"vectors in {artifact.path}:", *(f"{name}={value}" for name, value in settings.items()))
    filled: dict[str, Vectors] = {}

    def initialise(model: Any) -> None:
        filled.update(attach(model, artifact, preset))

    rows = []
    for seed in given.seeds:
        for arm, prepare in (("random", None), ("initialised", initialise)):
            outcome = library.train(given.model, data, seed=seed, options=options, prepare=prepare)
            rows.append((arm, seed, outcome))
            print(f"{arm}, seed {seed}: {len(outcome.curve)} epochs, {outcome.seconds:.0f} s", file=sys.stderr)
    for path, vectors in filled.items():
        print(f"{path}:", "; ".join(_described(one) for one in vectors))
    _show(rows)


def _described(table: Table) -> str:
    said = [table.modalities, table.mode, f"gain {table.gain}" if table.gain is not None else "as they are"]
    return ", ".join([*said, *(["centred"] if table.centre else [])])


def _show(rows: Sequence[tuple[str, int, Outcome]]) -> None:
    from rich.console import Console
    from rich.table import Table as Printed

    names = [f"{metric}@{k}" for metric in ("recall", "ndcg") for k in _OPTIONS["topk"]]
    printed = Printed(title="test, at the epoch of the best validation score", title_justify="left")
    for column in ("tables", "seed", "epochs", "best", "valid recall@20", *names):
        printed.add_column(column, justify="left" if column == "tables" else "right")
    for arm, seed, one in rows:
        figures = [one.valid.get("recall@20", math.nan), *(one.test.get(name, math.nan) for name in names)]
        ended = " (loss not a number)" if one.diverged else ""
        printed.add_row(arm, str(seed), f"{len(one.curve)}{ended}", str(one.best_epoch), *map("{:.4f}".format, figures))
    Console(width=None if sys.stdout.isatty() else 120).print(printed)


if __name__ == "__main__":
    sys.exit(main())
