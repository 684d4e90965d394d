"""Quality of the choices of `gpu-init tune`: on test rows without training, and for a trained model.

``pick`` compares, on TikTok and on the demo's data, the best candidate on validation rows with the best of the grid on
test rows, by a paired bootstrap over users. ``trained`` starts the small model (matrix factorization by BPR,
`small_model.py`) on TikTok from candidates drawn from the grid, and gives the rank correlation of the model's test
Recall@20 with tune's score.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from common import RESULTS, row, show
from ranking import Split, ones
from scipy.stats import spearmanr

import gpu_init
from gpu_init import config, demo, tune
from gpu_init.backend.select import select
from gpu_init.settings import settings_to_dict
from gpu_init.show.progress import Progress

METRIC = "recall@20"
DRAWN = 24  # settings from which models are trained
OPTIONS = {"layers": 0, "learning_rate": 0.005, "epochs": 10, "patience": 10}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data" / "tiktok")
    parser.add_argument("--parts", nargs="+", choices=("pick", "trained"), default=("pick", "trained"))
    parser.add_argument("--quick", action="store_true", help="only the demo's data, in a small size")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    given = parser.parse_args()
    there = (given.data / "tiktok.inter").is_file() and not given.quick
    if not there and not given.quick:
        print(f"TikTok is skipped: {given.data.name}/tiktok.inter is not there; name its folder with --data")
    with tempfile.TemporaryDirectory() as folder:
        if "pick" in given.parts:
            jobs = {"demo": demo_jobs(folder, *((2000, 400) if given.quick else (20_000, 4000)))}
            jobs |= {"tiktok": tiktok_jobs(given.data, folder)} if there else {}
            lines = [pick(name, *both, given.results / "tune.csv") for name, both in jobs.items()]
            columns = ["data", "candidates", "seconds", "picked settings", "their test score", "best of the grid"]
            columns += ["behind the best", "95% interval"]
            show(f"picked on validation rows, {METRIC} on test rows", columns, lines)
        if "trained" in given.parts and there:
            trained(given.data, folder, given.results / "tune_trained.csv")


def tiktok_jobs(data: Path, folder: str) -> tuple[config.JobConfig, config.JobConfig]:
    """Give TikTok's job, once with validation rows and once with test rows held out."""
    base = {
        "interactions": str(data / "tiktok.inter"),
        "where": "x_label == 0",
        "user_column": "userID",
        "item_column": "itemID",
        "users": 9308,
        "out": folder,
        "features": {name: str(data / f"{name}_feat.npy") for name in ("image", "audio")},
    }
    valid, test = (config.load(None, {}, {**base, "valid_where": f"x_label == {label}"}) for label in (1, 2))
    return valid, test


def demo_jobs(folder: str, users: int, items: int) -> tuple[config.JobConfig, config.JobConfig]:
    """Give the demo's job, once with the held-out rows of even users (validation), once of odd users (test)."""
    made = demo.make(folder, users=users, items=items, seed=0)
    held_out = pd.read_parquet(made.held_out)
    parts = []
    for odd in (0, 1):
        path = f"{folder}/held_out_{odd}.parquet"
        held_out[held_out["user_id"] % 2 == odd].to_parquet(path)
        parts.append(config.load(str(made.job), {}, {"valid": path}))
    return parts[0], parts[1]


def ranked(job: config.JobConfig, drawn: int | None = None) -> tuple[tune.Ranking, float]:
    """Rank candidates, all or ``drawn`` random ones, by a job's held-out rows; give the ranking and its seconds."""
    backend, progress = select("cpu"), Progress(None)
    start = time.perf_counter()
    data, held_out = tune.read(job, backend, progress)
    widths = {name: source.table.values.shape[1] for name, source in data.sources.items()}
    settings = tune.grid(job.settings, widths, 10**6)
    if drawn:
        settings = [one for one in settings if one.dim == tune.DIM]  # the width of the model
        settings = [
            settings[at] for at in np.sort(np.random.default_rng(0).choice(len(settings), drawn, replace=False))
        ]
    found = tune.rank(data, held_out, settings, 0, progress)
    return found, time.perf_counter() - start


def pick(name: str, valid: config.JobConfig, test: config.JobConfig, path: Path) -> list[Any]:
    """Pick settings on validation rows, and compare them with the best of the grid on test rows."""
    (on_valid, seconds), (on_test, _) = ranked(valid), ranked(test)
    picked = int(tune.standing(on_valid.scores[METRIC]).order[0])
    found = tune.standing(on_test.scores[METRIC])
    one = on_test.candidates[picked]
    settings = {"modalities": " + ".join(one.modalities), **settings_to_dict(one.settings)}
    settings = {
        key: settings[key] for key in ("modalities", "lambda", "clusters", "cluster_on", "weighting", "dim", "whiten")
    }
    facts = {
        "candidates": len(on_valid.candidates),
        "settings": len({candidate.settings for candidate in on_valid.candidates}),
        "seconds": seconds,
        "test_users": len(on_test.users),
        "picked_test": float(found.mean[picked]),
        "best_test": float(found.mean.max()),
        "median_test": float(np.median(found.mean)),
        "behind": float(found.behind[picked]),
        "behind_low": float(found.behind_low[picked]),
        "behind_high": float(found.behind_high[picked]),
    }
    row(path, data=name, metric=METRIC, **settings, **facts)
    interval = f"{facts['behind_low']:.4f} to {facts['behind_high']:.4f}"
    said = " ".join(map(str, settings.values()))
    return [
        name,
        facts["candidates"],
        seconds,
        said,
        facts["picked_test"],
        facts["best_test"],
        facts["behind"],
        interval,
    ]


def trained(data: Path, folder: str, path: Path) -> None:
    """Train the small model from some candidates, and correlate its scores with those of tune."""
    import small_model  # this needs torch

    from gpu_init.torch import Table

    valid, _ = tiktok_jobs(data, folder)
    ranking, _ = ranked(valid, DRAWN)
    drawn = [
        (one.settings, float(scores.mean()))
        for one, scores in zip(ranking.candidates, ranking.scores[METRIC], strict=True)
        if len(one.modalities) == 2
    ]
    table = pd.read_csv(data / "tiktok.inter", sep="\t")
    features = {name: np.load(data / f"{name}_feat.npy").astype(np.float32) for name in ("image", "audio")}
    shape = (9308, len(features["image"]))
    split = Split(*(ones(table[table["x_label"] == label], shape) for label in range(3)))
    tables = {
        "user": Table("image+audio", gain="match", centre=True, cold="keep"),
        "item": Table("items:image+audio", gain="match", cold="keep"),
    }
    lines, scores = [], []
    start = small_model.train(split, seed=0, options=OPTIONS).test["recall_20"]
    for settings, score in drawn:
        given = {**vars(settings)}
        made: Mapping[str, Any] = gpu_init.initialize(split.train, features, backend="cpu", **given)
        outcome = small_model.train(split, seed=0, prepare=small_model.filler(made, tables), options=OPTIONS)
        reached = outcome.test["recall_20"]
        named = settings_to_dict(settings)
        kept = {key: named[key] for key in ("lambda", "clusters", "cluster_on", "weighting", "dim", "whiten")}
        row(path, **kept, tune_score=score, trained_recall_20=reached, random_recall_20=start, **OPTIONS)
        lines.append([" ".join(map(str, kept.values())), score, reached])
        scores.append((score, reached))
        print(*lines[-1], file=sys.stderr, flush=True)
    rho, p = spearmanr(*zip(*scores, strict=True))
    show(f"trained from each (random start: {start:.4f})", ["settings", "tune's score", "trained Recall@20"], lines)
    print(f"Spearman correlation {rho:.2f} (p {p:.3f}, {len(scores)} settings)")
    row(path.with_name("tune_correlation.csv"), settings=len(scores), spearman=float(rho), p=float(p))


if __name__ == "__main__":
    main()
