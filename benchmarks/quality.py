"""Gain of trained models: random against initialised tables, by a full ranking, paired over seeds.

A row of `results/quality.csv` is one run. The model stops early by validation Recall@20; the row has the metrics at the
epoch of the best validation score: of all users, of users by degree, and of items without training interactions. A run
that has a row, under the name of any arm, is not repeated, so further calls add more seeds, models or recipes::

    python benchmarks/quality.py --library MRLib --models FREEDOM DRAGON --seeds 1 2 3 4 5
    python benchmarks/quality.py --library MRLib --models FREEDOM --recipes tries.toml    # [name] gain = 0.5 ...
    python benchmarks/quality.py --table                # shows all rows, or those of --models and --arms

The arms are `random`, `preset` (that of gpu_init.mmrec), and one for each table of the recipes' TOML files. A recipe
has changes to the preset, as `gpu_init.mmrec.adjusted` takes them, and `permuted`: with it each user and item gets the
vector of another, which separates the effect of the vectors' norm from that of their content. Settings must be chosen
by validation scores alone, which `--table valid` shows. Without `--library`, the model is that of `small_model.py`.
Several processes may write to one CSV file.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import importlib
import importlib.util
import json
import math
import operator
import os
import statistics
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mmrec_runs
import numpy as np
import small_model
import torch
from common import RESULTS, row, show
from graph_sums import keep_memory, replace_sums
from numpy.typing import NDArray
from ranking import Split, metrics
from scipy.stats import t as student

import gpu_init
from gpu_init import mmrec
from gpu_init.torch import Table

MODELS = ("MMGCN", "FREEDOM", "DRAGON", "LGMRec")
SMALL = "LightGCN"
KEY = ("dataset", "library", "model", "seed", "recipe", "config")
SUFFIXES = ("", "_degree_to_2", "_degree_3_to_5", "_degree_above_5", "_cold_items")

# Values of hyper-parameters; of those that are not here, the first value of the library's grid is taken.
CONFIG: dict[str, dict[str, Any]] = {
    "MMGCN": {"n_layers": 2, "learning_rate": 0.001},
    "DRAGON": {"reg_weight": 0.001, "learning_rate": 0.0001},
    "LGMRec": {"hyper_num": 4, "keep_rate": 0.4, "alpha": 0.3, "cl_weight": 0.1, "learning_rate": 0.01},
    SMALL: {"layers": 2, "learning_rate": 0.001},
}
SMALL_PRESET = mmrec.Preset(
    {
        "user": (Table("v+t", gain="match", centre=True, cold="keep"),),
        "item": (Table("items:v+t", gain="match", cold="keep"),),
    }
)


class Recorder:
    """An observer of a run, which keeps the metrics of each validation and the test metrics of the best epoch.

    Attributes
    ----------
    valid : list of dict
        Metrics of each validation.
    best_test : dict
        Metrics of the test that followed the best validation.
    """

    def __init__(self, split: Split) -> None:
        self.split = split
        self.valid: list[dict[str, float]] = []
        self.best = -1
        self.best_test: dict[str, float] = {}

    def __call__(self, kind: str, users: NDArray[np.int64], top: NDArray[np.int64]) -> None:
        found = metrics(users, top, self.split, getattr(self.split, kind))
        if kind == "valid":
            self.valid.append(found)
            # The libraries round scores, and take the first of equal ones.
            scores = [round(one["recall_20"], 4) for one in self.valid]
            self.best = int(np.argmax(scores))
        elif self.best == len(self.valid) - 1:
            self.best_test = found


def main() -> None:
    given = _arguments()
    keep_memory()
    path = given.results / "quality.csv"
    if given.table is None:
        if not (given.data / f"{given.dataset}.inter").is_file():
            print(f"skipped: {given.dataset}.inter is not there; name the folder that holds it with --data")
            return
        _run_all(given, path)
    rows = [one for one in named(read_rows(path)) if one["dataset"] == given.dataset]
    if given.table is not None:
        rows = [
            one
            for one in rows
            if (not given.models or one["model"] in given.models) and (not given.arms or one["arm"] in given.arms)
        ]
    show_table(rows, "valid" if given.table == "valid" else "test")
    plot_curves(rows, given.results / "quality.png")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, help="checkout of MMRec or MRLib (default: the small model)")
    parser.add_argument(
        "--models", nargs="+", help=f"models to train (default: {' '.join(MODELS)}, or {SMALL} without a library)"
    )
    parser.add_argument("--dataset", default="tiktok", help="name of the data set (default: tiktok)")
    shared = Path(__file__).parents[2] / "shared" / "data" / "tiktok"
    parser.add_argument("--data", type=Path, default=shared, help="folder of the data set")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--arms", nargs="+", help="arms to run (default: random, preset and every recipe)")
    parser.add_argument("--recipes", type=Path, nargs="+", default=[], help="TOML files with a table for each recipe")
    parser.add_argument("--config", nargs="+", default=[], metavar="KEY=VALUE", help="changes to the model's settings")
    parser.add_argument("--epochs", type=int, help="most epochs of a run")
    parser.add_argument("--quick", action="store_true", help="run one seed for two epochs")
    parser.add_argument(
        "--table", nargs="?", const="test", choices=("test", "valid"), help="show the rows and run nothing"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV file and the plot")
    given = parser.parse_args()
    if given.table is None:
        given.models = given.models or (MODELS if given.library else (SMALL,))
    if given.quick:
        given.seeds, given.epochs = given.seeds[:1], given.epochs or 2
    return given


# Runs.


def _run_all(given: argparse.Namespace, path: Path) -> None:
    data = mmrec_runs.read_data(given.data)
    split = mmrec_runs.split_of(data)
    library = mmrec_runs.Library(given.library) if given.library else None
    recipes = _recipes(given.recipes)
    arms = given.arms or ["random", "preset", *recipes]
    for seed in given.seeds:  # the outermost loop, so that all arms have the same seeds when somebody stops this script
        for model in given.models:
            preset = SMALL_PRESET if library is None else mmrec.preset_of(model)
            config = {**CONFIG.get(model, {}), **mmrec_runs.values_of(given.config)}
            if given.epochs:
                config["epochs"] = given.epochs
            for arm in arms:
                changes = dict(recipes.get(arm, {}))
                permuted = bool(changes.pop("permuted", False))
                chosen = None if arm == "random" else mmrec.adjusted(preset, changes)
                if arm not in ("random", "preset", *recipes):
                    raise SystemExit(
                        f"no recipe {arm}; there are random, preset and {', '.join(recipes) or 'no others'}"
                    )
                key = {
                    "dataset": given.dataset,
                    "library": library.name if library else "own",
                    "model": model,
                    "arm": arm,
                    "seed": str(seed),
                    "recipe": "" if chosen is None else described(chosen, permuted),
                    "config": json.dumps(config, sort_keys=True),
                }
                if any(all(one[name] == key[name] for name in KEY) for one in read_rows(path)):
                    continue
                _run_one(path, key, library, data, split, seed, config, chosen, permuted)


def _run_one(
    path: Path,
    key: Mapping[str, str],
    library: mmrec_runs.Library | None,
    data: mmrec_runs.Data,
    split: Split,
    seed: int,
    config: Mapping[str, Any],
    preset: mmrec.Preset | None,
    permuted: bool,
) -> None:
    """Run one arm with one seed and append its row; K-means has the same seed unless the recipe has another."""
    with tempfile.TemporaryDirectory() as folder:
        artifact = None
        if preset is not None:
            width = int(
                library.config(key["model"], data, config)["embedding_size"] if library else config.get("dim", 64)
            )
            preset, settings = mmrec_runs.fitted(preset, width, data)
            artifact = gpu_init.load(mmrec_runs.make(data, {"seed": seed, **settings}, f"{folder}/vectors"))

        def prepare(model: Any) -> None:
            if artifact is not None:
                filled = mmrec.attach(model, artifact, preset)
                if permuted:
                    permute_rows(model, filled, data.users, seed)
            if library is not None and not torch.cuda.is_available():
                replace_sums(model)

        recorder = Recorder(split)
        if library is None:
            outcome = small_model.train(split, seed=seed, options=config, prepare=prepare, observe=recorder)
        else:
            outcome = library.train(key["model"], data, seed=seed, options=config, prepare=prepare, observe=recorder)
    best = recorder.valid[recorder.best] if recorder.valid else {}
    row_fields = {
        **key,
        "epochs": len(outcome.curve),
        "best_epoch": recorder.best + 1,
        "epochs_to_95": outcome.epochs_to(0.95),
        "diverged": outcome.diverged,
        "seconds": round(outcome.seconds, 1),
        **{f"valid_{name}": round(value, 6) for name, value in best.items()},
        **{f"test_{name}": round(value, 6) for name, value in recorder.best_test.items()},
        "curve": " ".join(f"{one['recall_20']:.4f}" for one in recorder.valid),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(path.parent, os.O_RDONLY)  # the folder is locked, so that no lock file is left beside the rows
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        row(path, **row_fields)
    finally:
        os.close(lock)
    score = recorder.best_test.get("recall_20", math.nan)
    print(
        f"{key['model']} {key['arm']}, seed {seed}: test Recall@20 {score:.4f}, {len(outcome.curve)} epochs", flush=True
    )


def permute_rows(model: torch.nn.Module, paths: Iterable[str], users: int, seed: int) -> None:
    """Shuffle the rows of tables: those of users among themselves, and those of items after them likewise."""
    generator = torch.Generator().manual_seed(seed)
    for path in paths:
        table = operator.attrgetter(path)(model).detach()
        parts = (table[:users], table[users:]) if len(table) > users else (table,)
        for part in parts:
            part.copy_(part[torch.randperm(len(part), generator=generator)])


def described(preset: mmrec.Preset, permuted: bool = False) -> str:
    """Give a preset as JSON."""
    tables = {
        path: [{name: _plain(value) for name, value in vars(one).items() if name != "rows"} for one in vectors]
        for path, vectors in preset.tables.items()
    }
    control = {"permuted": True} if permuted else {}
    return json.dumps({"tables": tables, "width": preset.width, **preset.settings, **control}, sort_keys=True)


def _plain(value: Any) -> Any:
    if callable(value):
        return value.__name__
    return [_plain(one) for one in value] if isinstance(value, tuple) else value


def _recipes(paths: Sequence[Path]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for path in paths:
        with path.open("rb") as file:
            found.update(tomllib.load(file))
    return found


# Tables and plots.


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read the rows of earlier runs."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def show_table(rows: Sequence[Mapping[str, str]], part: str) -> None:
    """Print the mean scores of each arm and its gain over random with the same seeds; then scores by group."""
    lines, split = [], []
    for (library, model), arms in _grouped(rows).items():
        random = arms.get("random", {})
        for arm, runs in arms.items():
            seeds = sorted(runs) if arm == "random" else sorted(set(runs) & set(random))
            if not seeds:
                continue
            names = [f"{part}_{metric}" for metric in ("recall_10", "recall_20", "ndcg_10", "ndcg_20")]
            means = [_mean(runs, seeds, name) for name in (*names, "best_epoch", "epochs_to_95")]
            gain, reached = "", ""
            if arm != "random":
                pair = [[float(side[seed][f"{part}_recall_20"]) for seed in seeds] for side in (random, runs)]
                gain, reached = gain_text(*pair), _reached(runs, random, seeds)
                groups = [f"{part}_recall_20{suffix}" for suffix in SUFFIXES[1:]]
                sides = [[f"{_mean(side, seeds, name):.4f}" for name in groups] for side in (random, runs)]
                split.append([library, model, arm, *map(" -> ".join, zip(*sides, strict=True))])
            epochs = [f"{mean:.0f}" for mean in means[4:]]
            figures = [f"{mean:.4f}" for mean in means[:4]]
            lines.append([library, model, arm, len(seeds), *figures, gain, *epochs, reached])
    columns = ["library", "model", "tables", "seeds", "R@10", "R@20", "N@10", "N@20", "gain in R@20 (95% interval)"]
    columns += ["best epoch", "epochs to 95% of the best", "epochs to random's best"]
    show(f"{part}, mean over seeds; gains paired by seed", columns, lines)
    columns = ["library", "model", "tables", "degree 0 to 2", "degree 3 to 5", "degree above 5", "cold items"]
    show(f"{part} Recall@20, random -> initialised", columns, split)


def _mean(runs: Mapping[str, Mapping[str, str]], seeds: Sequence[str], column: str) -> float:
    return statistics.mean(float(runs[seed][column]) for seed in seeds)


def named(rows: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Rename arms by their recipes: a preset that is not that of today is a former preset."""
    recipes: dict[str, list[str]] = {}
    renamed = []
    for one in rows:
        preset = SMALL_PRESET if one["library"] == "own" else mmrec.PRESETS.get(one["model"])
        arm = "former preset" if one["arm"] == "preset" else one["arm"]
        if preset is not None and one["recipe"] == described(preset):
            arm = "preset"
        same = recipes.setdefault(f"{one['model']} {arm}", [])  # two recipes with one name are two arms
        if one["recipe"] not in same:
            same.append(one["recipe"])
        number = same.index(one["recipe"]) + 1
        renamed.append({**one, "arm": arm if number == 1 else f"{arm} {number}"})
    return renamed


def _grouped(rows: Sequence[Mapping[str, str]]) -> dict[Any, dict[str, dict[str, Mapping[str, str]]]]:
    """Group runs by library and model, by arm and by seed; settings that not all runs of a model share name it."""
    shared: dict[Any, set[str]] = {}
    for one in rows:
        shared.setdefault((one["library"], one["model"]), _settings(one)).intersection_update(_settings(one))
    groups: dict[Any, dict[str, dict[str, Mapping[str, str]]]] = {}
    for one in rows:
        if one["test_recall_20"]:
            own = sorted(_settings(one) - shared[one["library"], one["model"]])
            arms = groups.setdefault((one["library"], " ".join([one["model"], *own])), {})
            arms.setdefault(one["arm"], {})[one["seed"]] = one
    return groups


def _settings(one: Mapping[str, str]) -> set[str]:
    return {f"{name}={value}" for name, value in json.loads(one["config"]).items()}


def gain_text(random: Sequence[float], other: Sequence[float]) -> str:
    """Give the mean gain over random in percent, with the 95% interval of Student's t over the differences by seed."""
    base = statistics.mean(random)
    if not base > 0:
        return "-"
    differences = [(b - a) / base * 100 for a, b in zip(random, other, strict=True)]
    mean = statistics.mean(differences)
    if len(differences) < 2:
        return f"{mean:+.1f}%"
    half = float(student.ppf(0.975, len(differences) - 1)) * statistics.stdev(differences) / math.sqrt(len(differences))
    return f"{mean:+.1f}% ({mean - half:+.1f} to {mean + half:+.1f})"


def _reached(
    runs: Mapping[str, Mapping[str, str]], random: Mapping[str, Mapping[str, str]], seeds: Sequence[str]
) -> str:
    """Give the mean epochs to the best validation score of random, and how many seeds reach it."""
    epochs = []
    for seed in seeds:
        goal = max(map(float, random[seed]["curve"].split()))
        curve = map(float, runs[seed]["curve"].split())
        epochs.append(next((epoch for epoch, score in enumerate(curve, 1) if score >= goal), None))
    there = [epoch for epoch in epochs if epoch is not None]
    if not there:
        return f"0 of {len(seeds)}"
    return f"{statistics.mean(there):.0f}" + ("" if len(there) == len(seeds) else f" ({len(there)} of {len(seeds)})")


def plot_curves(rows: Sequence[Mapping[str, str]], path: Path) -> None:
    """Draw validation Recall@20 by epoch, with a panel for each model and a line for each run; needs matplotlib."""
    groups = _grouped(rows)
    if not groups:
        return
    if importlib.util.find_spec("matplotlib") is None:
        print(f"no plot {path.name}: matplotlib is not installed (pip install 'gpu-init[bench]')")
        return
    columns = min(len(groups), 3)
    lines = math.ceil(len(groups) / columns)
    figure = importlib.import_module("matplotlib.figure").Figure(
        figsize=(5 * columns, 3.5 * lines), layout="constrained"
    )
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for panel, ((library, model), arms) in zip(panels, groups.items(), strict=False):
        for number, (arm, runs) in enumerate(arms.items()):
            for position, one in enumerate(runs.values()):
                curve = [float(score) for score in one["curve"].split()]
                label = arm if position == 0 else None
                panel.plot(range(1, len(curve) + 1), curve, color=f"C{number}", linewidth=0.8, label=label)
        panel.set_title(f"{model} ({library})", loc="left", fontsize=9)
        panel.set_xlabel("epoch")
        panel.set_ylabel("validation Recall@20")
        panel.legend(fontsize=7)
    for panel in panels[len(groups) :]:
        panel.set_axis_off()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    try:
        main()
    except gpu_init.GpuInitError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
