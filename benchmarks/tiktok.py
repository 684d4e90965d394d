"""The README's result on TikTok: the job's time and counts, and a ranking of held-out rows without training.

Held-out rows (validation and test together) are ranked by the users' vectors times the items' whitened features, summed
over both modalities, with training items left out. K-means has the seeds 0 to 3; lambda goes down from 1, which takes
local means alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from common import RESULTS, peak_memory, row, show
from numpy.typing import NDArray
from ranking import means, ones, ranked
from scipy.sparse import csr_matrix

import gpu_init

MODALITIES = ("image", "audio")
LAMBDAS = (1.0, 0.9, 0.5, 0.1)
SEEDS = range(4)
DIM = 64
USERS = 9308


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data" / "tiktok")
    data = parser.parse_args().data
    if not (data / "tiktok.inter").is_file():
        print(f"skipped: {data.name}/tiktok.inter is not there; name the folder that holds it with --data")
        return
    job(data)
    ranking(data)


def job(data: Path) -> None:
    """Run the job from the command line, and show the counts in its manifest."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "vectors"
        features = [f"--features={name}={data / name}_feat.npy" for name in MODALITIES]
        command = [sys.executable, "-m", "gpu_init", "run", *features]
        command += ["--interactions", str(data / "tiktok.inter"), "--where", "x_label == 0"]
        command += ["--user-column", "userID", "--item-column", "itemID", "--users", str(USERS), "--out", str(out)]
        subprocess.run(command, check=True)
        manifest = json.loads((out / "manifest.json").read_text())
    lines = []
    for name in MODALITIES:
        facts = manifest["modalities"][name]
        counts = {
            "users": manifest["users"]["rows"],
            "items": facts["items"],
            "pairs": manifest["interactions"]["pairs"],
            "cold_users": facts["cold_users"],
            "cluster_sizes": " ".join(map(str, facts["cluster_sizes"])),
        }
        cost = {"job_seconds": float(manifest["timings"]["seconds"]), "peak_mib": peak_memory(children=True) >> 20}
        row(RESULTS / "tiktok_job.csv", modality=name, backend=manifest["backend"]["name"], **counts, **cost)
        lines.append([name, *counts.values()])
    show("the job, training rows", ["modality", *(column.replace("_", " ") for column in counts)], lines)
    print(f"both modalities: {cost['job_seconds']:.1f} s, at most {cost['peak_mib']} MiB\n")


def ranking(data: Path) -> None:
    """Rank held-out rows for each lambda and each K-means seed."""
    table = pd.read_csv(data / "tiktok.inter", sep="\t")
    features = {name: np.load(data / f"{name}_feat.npy").astype(np.float32) for name in MODALITIES}
    shape = (USERS, len(features["image"]))
    train, held_out = (ones(table[mask], shape) for mask in (table["x_label"] == 0, table["x_label"] > 0))
    lines = []
    for lam in LAMBDAS:
        seeds = SEEDS[:1] if lam == 1.0 else SEEDS  # without the cluster-level part, the seed changes nothing
        scores = []
        for seed in seeds:
            result = gpu_init.initialize(train, features, lam=lam, dim=DIM, whiten=True, seed=seed, backend="cpu")
            scores.append(metrics(result, train, held_out))
        recalls, gains = np.array(scores).T
        row(
            RESULTS / "tiktok.csv",
            lam=lam,
            clusters=8,
            weighting="mean",
            dim=DIM,
            seeds=len(seeds),
            recall_at_20=float(recalls.mean()),
            recall_min=float(recalls.min()),
            recall_max=float(recalls.max()),
            ndcg_at_20=float(gains.mean()),
        )
        name = "1 (local means alone)" if lam == 1.0 else str(lam)
        spread = f"{recalls.min():.4f} to {recalls.max():.4f}"
        lines.append([name, str(len(seeds)), f"{recalls.mean():.4f}", spread, f"{gains.mean():.4f}"])
    show("held-out rows, no training", ["lambda", "seeds", "Recall@20", "range over seeds", "NDCG@20"], lines)


def metrics(result: Mapping[str, Any], train: csr_matrix, held_out: csr_matrix) -> tuple[float, float]:
    """Give Recall@20 and NDCG@20, the mean over the users who have held-out rows."""

    def score(users: NDArray[np.int64]) -> NDArray[np.float32]:
        scores: NDArray[np.float32] = sum(result[name].users[users] @ result[name].items.T for name in MODALITIES)
        return scores

    found = means(*ranked(score, train, held_out))
    return found["recall_20"], found["ndcg_20"]


if __name__ == "__main__":
    main()
