"""Runs of models inside MMRec and MRLib, from random and from initialised tables.

MMRec (enoche/MMRec) and MRLib (Jinfeng-Xu/Multimodal-Recommendation-Library) have the same layout: a folder ``src``
with ``configs``, ``common``, ``models`` and ``utils``; a data set is a folder of ``NAME.inter`` and ``*_feat.npy``.
This script needs a checkout of one of them, and lets it train a model with and without the initialisation::

    python benchmarks/mmrec_runs.py --library MMRec --model FREEDOM --dataset tiktok --make

No file of the library or of the data folder is written to or changed. `quality.py` runs the same models over many seeds
and settings, and keeps the results.
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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import torch
from common import show
from numpy.typing import NDArray
from ranking import KS, Split
from scipy.sparse import csr_matrix, dok_matrix

import gpu_init
from gpu_init import config as job_config
from gpu_init import mmrec
from gpu_init.errors import InputError
from gpu_init.inputs import features as inputs_features
from gpu_init.run import run
from gpu_init.show.progress import Progress
from gpu_init.torch import Table

# Data folders.

# Names of a column in the header of an .inter file; the first that is there is taken.
_USER_COLUMNS = ("userID", "user_id:token", "user_id", "uid")
_ITEM_COLUMNS = ("itemID", "item_id:token", "item_id", "iid")
_SPLIT_COLUMN = "x_label"  # 0 for training rows, 1 for validation rows, 2 for test rows
_FEATURES_ENDING = "_feat.npy"


@dataclass(frozen=True)
class Data:
    """A data folder in MMRec's layout.

    Attributes
    ----------
    folder, name, inter : str
        Absolute path of the folder; name of the data set; path of its interactions.
    user_column, item_column : str
        Names of the columns in the header of the interactions.
    features : dict of str to str
        Path of the features of each modality, one for every ``*_feat.npy``; the visual and the textual modality first.
    users, items : int
        Largest ids plus 1, those of validation and test rows included, as the libraries size their tables.
    """

    folder: str
    name: str
    inter: str
    user_column: str
    item_column: str
    features: dict[str, str]
    users: int
    items: int


def read_data(folder: str | os.PathLike[str]) -> Data:
    """Find out what a data folder holds.

    Raises
    ------
    InputError
        The folder does not hold exactly one ``.inter`` file, a column is missing, or there are no features.
    """
    root = os.path.abspath(folder)
    if not os.path.isdir(root):
        raise InputError(f"{root}: there is no such folder; name the data set's folder with --data.")
    names = sorted(os.listdir(root))
    inters = [name for name in names if name.endswith(".inter")]
    if len(inters) != 1:
        raise InputError(f"{root}: wanted is one .inter file; found are {', '.join(inters) or 'none'}.")
    inter = os.path.join(root, inters[0])
    header = list(pd.read_csv(inter, sep="\t", nrows=0).columns)
    user, item = (next((name for name in usual if name in header), "") for usual in (_USER_COLUMNS, _ITEM_COLUMNS))
    if not user or not item or _SPLIT_COLUMN not in header:
        raise InputError(
            f"{inter}: its columns are {', '.join(header)}; wanted are users (userID), items (itemID) and"
            f" {_SPLIT_COLUMN} (0 train, 1 validation, 2 test), separated by tabs."
        )
    files = {name.removesuffix(_FEATURES_ENDING): name for name in names if name.endswith(_FEATURES_ENDING)}
    if not files:
        raise InputError(f"{root}: there are no features, files such as image{_FEATURES_ENDING}.")
    ordered = dict.fromkeys([*mmrec.roles_of(files).values(), *files])
    ids = pd.read_csv(inter, sep="\t", usecols=[user, item]).max() + 1
    features = {name: os.path.join(root, files[name]) for name in ordered}
    return Data(root, inters[0].removesuffix(".inter"), inter, user, item, features, int(ids[user]), int(ids[item]))


def split_of(data: Data) -> Split:
    """Read a data folder's interactions; users without a training row are left out of the other two parts."""
    table = pd.read_csv(data.inter, sep="\t")
    shape = (data.users, data.items)

    def ones(part: pd.DataFrame) -> csr_matrix:
        pairs = part[[data.user_column, data.item_column]].drop_duplicates().to_numpy()
        return csr_matrix((np.ones(len(pairs), np.float32), (pairs[:, 0], pairs[:, 1])), shape=shape)

    label = table[_SPLIT_COLUMN]
    known = table[data.user_column].isin(table.loc[label == 0, data.user_column])
    return Split(ones(table[label == 0]), ones(table[(label == 1) & known]), ones(table[(label == 2) & known]))


def fitted(preset: mmrec.Preset, embedding_size: int, data: Data) -> tuple[mmrec.Preset, dict[str, Any]]:
    """Give `gpu_init.mmrec.job_settings` for a data set, and the preset that goes with them.

    Features that are narrower than the vectors that the model asks for keep their width; the vectors then fill the
    first columns of the model's tables.
    """
    settings = mmrec.job_settings(preset, embedding_size)
    used = mmrec.roles_of(data.features).values()
    narrowest = min(inputs_features.read(name, data.features[name]).values.shape[1] for name in used)
    if settings.get("dim", 0) <= narrowest:
        return preset, settings
    return mmrec.adjusted(preset, {"columns": "first"}), {**settings, "dim": narrowest}


def make(data: Data, settings: Mapping[str, Any], out: str, *, overwrite: bool = False) -> str:
    """Run the job on a data folder's training rows; an artifact made from the same inputs and settings is kept.

    Parameters
    ----------
    data : Data
    settings : mapping
        Keys of the job, such as `fitted` gives.
    out : str
        Folder of the artifact.
    overwrite : bool
        Whether an artifact that was made from something else is replaced.

    Returns
    -------
    str
        Path of the artifact.
    """
    flags: dict[str, Any] = {
        "interactions": data.inter,
        "user_column": data.user_column,
        "item_column": data.item_column,
        "where": f"{_SPLIT_COLUMN} == 0",
        "users": data.users,
        "features": {name: data.features[name] for name in mmrec.roles_of(data.features).values()},
        "out": out,
        "overwrite": overwrite,
        "resume": not overwrite,
        **settings,
    }
    with Progress(None) as progress:
        return run(job_config.load(None, {}, flags), progress)


# Libraries.


@dataclass(frozen=True)
class Outcome:
    """What the training of one model gave.

    Attributes
    ----------
    curve : list of float
        Validation score (the library's valid_metric, rounded as the library does) after each epoch.
    best_epoch : int
        Epoch of the best score, starting at 1; 0 where there was none.
    valid, test : dict of str to float
        The library's metrics at that epoch.
    seconds : float
        Time of training and evaluation.
    diverged : bool
        Whether training ended early because the loss was not a number.
    """

    curve: list[float]
    best_epoch: int
    valid: dict[str, float]
    test: dict[str, float]
    seconds: float
    diverged: bool

    def epochs_to(self, share: float) -> int:
        """First epoch, starting at 1, whose score is at least ``share`` of the best one; 0 where there was none."""
        best = max(self.curve, default=0.0)
        return next((epoch for epoch, score in enumerate(self.curve, 1) if score >= share * best), 0)


# An observer is called after each evaluation: with "valid" or "test", users (n,), and their best items (n, k) in order.
Observer = Callable[[str, NDArray[np.int64], NDArray[np.int64]], None]

# These settings replace those in the library's configuration files.
_OPTIONS: dict[str, Any] = {
    "metrics": ["Recall", "NDCG"],
    "topk": list(KS),
    "valid_metric": "Recall@20",
    "eval_step": 1,
    "save_recommended_topk": False,
    "enable_visualization": False,
}
_USER_GRAPH = "user_graph_dict.npy"  # a file that MMRec's DRAGON reads
_USER_GRAPH_NEIGHBOURS = 200


class Library:
    """A checkout of MMRec or of a library with its layout.

    Its packages are called models, common and utils, so a process has room for one library, and modules of these names
    cannot be imported from elsewhere afterwards.

    Parameters
    ----------
    path : path-like
        The checkout, or its ``src``.

    Raises
    ------
    InputError
        It is not such a checkout, or something that it needs is not installed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        root = os.path.abspath(path)
        sources = [one for one in (os.path.join(root, "src"), root) if os.path.isfile(f"{one}/utils/configurator.py")]
        if not sources:
            raise InputError(f"{root}: not a checkout of MMRec or MRLib: it has no src/utils/configurator.py.")
        self.source = sources[0]
        self.name = os.path.basename(os.path.dirname(self.source))
        sys.dont_write_bytecode = True  # the checkout stays as it is
        for name in ("common", "models", "utils"):
            package = types.ModuleType(name)
            package.__path__ = [os.path.join(self.source, name)]
            sys.modules[name] = package
        _replace_missing()
        try:
            names = ("utils.configurator", "utils.dataset", "utils.dataloader", "utils.utils", "common.trainer")
            self._configurator, self._dataset, self._loaders, self._utils, _ = map(importlib.import_module, names)
        except ImportError as error:
            raise _not_installed(self.name, error) from None

    def data_folder(self, dataset: str) -> str:
        """Give the folder of a data set in the library's own place for data."""
        places = [os.path.join(base, "data", dataset) for base in (os.path.dirname(self.source), self.source)]
        found = next((place for place in places if os.path.isdir(place)), None)
        if found is None:
            raise InputError(f"{places[0]}: there is no such folder; name the data set's folder with --data.")
        return found

    def config(self, model: str, data: Data, options: Mapping[str, Any], folder: str = "") -> Any:
        """Give the library's configuration; of several values for a hyper-parameter the first one is taken.

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
            "inter_splitting_label": _SPLIT_COLUMN,
            "field_separator": "\t",
            "filter_out_cod_start_users": True,
            "vision_feature_file": f"image{_FEATURES_ENDING}",
            "text_feature_file": f"text{_FEATURES_ENDING}",
            "user_graph_dict_file": _USER_GRAPH,
            "data_path": os.path.join(folder, ""),
            **_OPTIONS,
            **options,
        }
        with contextlib.chdir(self.source):  # MMRec reads its configuration files from the working folder
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
            Seed of the library's random states. Runs of one seed differ in what `prepare` does, and in nothing else.
        options : mapping, optional
            Settings that replace those of the library's configuration files.
        prepare : callable, optional
            Called with the model before the optimizer is made, for `gpu_init.mmrec.attach`.
        observe : callable, optional
            Called after each evaluation.
        """
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            _link_data(data, os.path.join(folder, data.name))
            config = self.config(model, data, {**(options or {}), "seed": seed}, folder)
            if model == "DRAGON":
                _write_user_graph(data, os.path.join(folder, data.name, _USER_GRAPH))
            if config["device"].type == "cpu":  # LATTICE and MGCN call this method whatever the device
                stack.enter_context(mock.patch.object(torch.Tensor, "cuda", lambda tensor, *_, **__: tensor))
            loaders = self._loaded(config)
            self._utils.init_seed(seed)
            loaders[0].pretrain_setup()
            try:
                built = self._utils.get_model(model)(config, loaders[0]).to(config["device"])
            except ImportError as error:
                raise _not_installed(self.name, error) from None
            if "result_embed" in built._parameters:  # DRAGON later assigns a plain tensor, which torch refuses
                built.result_embed = built._parameters.pop("result_embed").detach()
            if prepare is not None:
                prepare(built)
            return self._fit(config, built, loaders, observe)

    def _loaded(self, config: Any) -> tuple[Any, Any, Any]:
        """Give the loaders of the training, validation and test rows."""
        data = self._dataset.RecDataset(config)
        str(data)  # computes the numbers of users and items, for which the loaders ask
        train, valid, test = data.split()
        for part in (train, valid, test):
            str(part)
        size = config["eval_batch_size"]
        return (
            self._loaders.TrainDataLoader(config, train, batch_size=config["train_batch_size"], shuffle=True),
            self._loaders.EvalDataLoader(config, valid, additional_dataset=train, batch_size=size),
            self._loaders.EvalDataLoader(config, test, additional_dataset=train, batch_size=size),
        )

    def _fit(self, config: Any, model: Any, loaders: tuple[Any, Any, Any], observe: Observer | None) -> Outcome:
        """Train a model, and record what the library's evaluator is given and what it returns."""
        train, valid, test = loaders
        trainer = self._utils.get_trainer()(config, model)
        score, curve = config["valid_metric"].lower(), []
        evaluate = trainer.evaluator.evaluate

        def recorded(batches: list[Any], loader: Any, **more: Any) -> Any:
            result = evaluate(batches, loader, **more)
            if loader is valid:
                curve.append(float(result[score]))
                print(f"{config['model']} epoch {len(curve)}: validation {score} {curve[-1]:.4f}", file=sys.stderr)
            if observe is not None:
                top = torch.cat(batches).cpu().numpy()
                observe("valid" if loader is valid else "test", loader.get_eval_users().cpu().numpy(), top)
            return result

        trainer.evaluator.evaluate = recorded
        start = time.perf_counter()
        trainer.fit(train, valid_data=valid, test_data=test, saved=False, verbose=False)
        seconds = time.perf_counter() - start
        best = int(np.argmax(curve)) + 1 if curve else 0
        ended = len(curve) >= config["epochs"] or trainer.cur_step > config["stopping_step"]
        return Outcome(curve, best, trainer.best_valid_result, trainer.best_test_upon_valid, seconds, not ended)


def _not_installed(library: str, error: ImportError) -> InputError:
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return InputError(f"{library} does not go with what is installed: {error}")
    package = error.name.partition(".")[0]
    name = {"yaml": "pyyaml"}.get(package, package)
    return InputError(f"{library} needs {package}, which is not installed: pip install {name}")


def _link_data(data: Data, folder: str) -> None:
    """Link a data set's files into a new folder, to which the libraries may write their caches.

    Both libraries read features of an image and a text; where one is missing, another modality takes its place.
    """
    os.makedirs(folder)
    for name in os.listdir(data.folder):
        source = os.path.join(data.folder, name)
        if os.path.isfile(source) and not name.endswith(".pt"):  # such files are caches of earlier features
            os.symlink(source, os.path.join(folder, name))
    for role, name in mmrec.roles_of(data.features).items():
        link = os.path.join(folder, ("image" if role == "v" else "text") + _FEATURES_ENDING)
        if not os.path.lexists(link):
            os.symlink(data.features[name], link)


def _write_user_graph(data: Data, path: str) -> None:
    """Write, for each user, the users with most items in common and how many these are, as MMRec's DRAGON reads it."""
    if os.path.lexists(path):
        return
    train = split_of(data).train
    common = (train @ train.T).tocsr()
    common.setdiag(0)
    common.eliminate_zeros()
    graph: dict[int, list[list[Any]]] = {}
    for user in range(data.users):
        row = slice(common.indptr[user], common.indptr[user + 1])
        order = np.lexsort((common.indices[row], -common.data[row]))[:_USER_GRAPH_NEIGHBOURS]
        graph[user] = [common.indices[row][order].tolist(), common.data[row][order].tolist()]
    np.save(path, np.array(graph, dtype=object), allow_pickle=True)


def _replace_missing() -> None:
    """Supply what the libraries take from older packages, or import and never use, without a change to their files."""
    removed: tuple[tuple[Any, str, Any], ...] = (
        (dok_matrix, "_update", lambda matrix, entries: matrix._dict.update(entries)),  # scipy 1.13 removed it
        (np, "float", float),  # numpy 1.24 removed it
    )
    for owner, name, value in removed:
        if not hasattr(owner, name):
            setattr(owner, name, value)
    if _is_missing("lmdb"):
        sys.modules["lmdb"] = mock.MagicMock()
    if _is_missing("torchvision"):
        names = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
        sys.modules.update({name: mock.MagicMock() for name in names})
    if _is_missing("torch_scatter"):  # there is a build of it for a few versions of torch only
        package: Any = types.ModuleType("torch_scatter")
        package.scatter_add = _scatter_add
        sys.modules["torch_scatter"] = package


def _is_missing(package: str) -> bool:
    return package not in sys.modules and importlib.util.find_spec(package) is None


def _scatter_add(values: Any, index: Any, dim: int = -1, dim_size: int | None = None) -> Any:
    """torch_scatter's function, for values and index of one dimension."""
    size = int(index.max()) + 1 if dim_size is None else dim_size
    return values.new_zeros(size).index_add_(dim, index, values)


# The command.


def values_of(pairs: Iterable[str]) -> dict[str, Any]:
    """Read ``KEY=VALUE`` texts; a value that is not TOML is text.

    Raises
    ------
    InputError
        A text is not of this form.
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


def main(arguments: Sequence[str] | None = None) -> None:
    given = _arguments(arguments)
    preset = mmrec.adjusted(mmrec.preset_of(given.model), values_of(given.set))
    options = values_of(given.config) | ({} if given.epochs is None else {"epochs": given.epochs})
    library = Library(given.library)
    data = read_data(given.data or library.data_folder(given.dataset))
    config = library.config(given.model, data, options)
    artifact = None if given.make else gpu_init.load(given.artifact)
    chosen = {name: config[name] for name in config["hyper_parameters"] if name != "seed"}
    print(f"{library.name} {given.model} on {given.dataset}:", *(f"{name}={value}" for name, value in chosen.items()))
    roles = mmrec.roles_of(data.features)
    if roles.get("t", "text") != "text":
        print(f"the model's textual modality is {roles['t']}")
    if artifact is None:
        preset, settings = fitted(preset, int(config["embedding_size"]), data)
        place = os.path.abspath(given.artifact or f"{given.dataset}-{given.model}-vectors")
        artifact = gpu_init.load(make(data, settings, place, overwrite=given.overwrite))
        print(f"vectors in {artifact.path}:", *(f"{name}={value}" for name, value in settings.items()))
    filled: dict[str, Sequence[Table]] = {}

    def initialise(model: Any) -> None:
        filled.update(mmrec.attach(model, artifact, preset))

    lines = []
    metrics = [f"{metric}@{k}" for metric in ("recall", "ndcg") for k in KS]
    for seed in given.seeds:
        for start, prepare in (("random", None), ("initialised", initialise)):
            one = library.train(given.model, data, seed=seed, options=options, prepare=prepare)
            print(f"{start}, seed {seed}: {len(one.curve)} epochs, {one.seconds:.0f} s", file=sys.stderr)
            scores = [one.valid.get("recall@20", math.nan), *(one.test.get(name, math.nan) for name in metrics)]
            ended = " (loss not a number)" if one.diverged else ""
            lines.append([start, seed, f"{len(one.curve)}{ended}", one.best_epoch, *map("{:.4f}".format, scores)])
    for path, specs in filled.items():
        print(f"{path}:", "; ".join(_described(spec) for spec in specs))
    columns = ["tables", "seed", "epochs", "best epoch", "valid recall@20", *(f"test {name}" for name in metrics)]
    show("scores at the epoch of the best validation score", columns, lines)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", required=True, metavar="PATH", help="checkout of MMRec or MRLib")
    parser.add_argument("--model", required=True, help=f"one of {', '.join(mmrec.PRESETS)}, as the library writes it")
    parser.add_argument("--dataset", required=True, metavar="NAME", help="name of the data set")
    parser.add_argument("--data", metavar="DIR", help="its folder (default: NAME in the library's data folder)")
    parser.add_argument("--artifact", metavar="DIR", help="vectors to start from (default with --make: a new folder)")
    parser.add_argument("--make", action="store_true", help="make the vectors first, with the preset's settings")
    parser.add_argument("--overwrite", action="store_true", help="with --make: replace an artifact that is there")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], metavar="N", help="seeds; each has a pair of runs")
    parser.add_argument("--epochs", type=int, metavar="N", help="most epochs of a run (default: the library's)")
    parser.add_argument("--config", nargs="+", default=[], metavar="KEY=VALUE", help="settings of the library")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="changes to the preset")
    given = parser.parse_args(arguments)
    if not given.make and not given.artifact:
        raise InputError("give --artifact DIR, vectors that were made before, or --make.")
    if given.epochs is not None and given.epochs < 1:
        raise InputError(f"--epochs: found {given.epochs}; wanted is a number, 1 or more.")
    return given


def _described(table: Table) -> str:
    words = [table.modalities, table.mode, f"gain {table.gain}" if table.gain is not None else "no gain"]
    return ", ".join([*words, *(["centred"] if table.centre else [])])


if __name__ == "__main__":
    try:
        main()
    except gpu_init.GpuInitError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
