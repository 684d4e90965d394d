"""LightGCN or, without layers, BPR-MF in plain torch, from random and from initialised tables.

As a script it trains BPR-MF with five seeds on the demo's data. `quality.py` runs this model too; unlike the models of
the libraries it needs no checkout.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from mmrec_runs import Observer, Outcome
from ranking import KS, Split, demo_split, metrics
from scipy.sparse import coo_matrix, csr_matrix

import gpu_init
from gpu_init.torch import Table, init_model_

# Users and items get the mean of their modalities, in one whitened space.
TABLES = {
    "user": Table("image+text", gain="match", centre=True, cold="keep"),
    "item": Table("items:image+text", gain="match", cold="keep"),
}


def train(
    split: Split,
    *,
    seed: int,
    prepare: Callable[[Any], object] | None = None,
    observe: Observer | None = None,
    options: Mapping[str, Any] | None = None,
) -> Outcome:
    """Train the model; the scores are those of the epoch of the best validation Recall@20.

    ``options`` and their defaults: dim 64, layers 2, learning_rate 0.001, reg_weight 1e-4, batch 2048, epochs 200, and
    patience 20, the epochs without a better validation score after which training ends.
    """
    given: dict[str, Any] = {"dim": 64, "layers": 2, "learning_rate": 1e-3, "reg_weight": 1e-4, "batch": 2048}
    given |= {"epochs": 200, "patience": 20, **(options or {})}
    rng, start = np.random.default_rng(seed), time.perf_counter()
    torch.manual_seed(seed)
    sizes = dict(zip(("user", "item"), split.train.shape, strict=True))
    model = torch.nn.ParameterDict(
        {side: torch.nn.init.xavier_uniform_(torch.empty(n, given["dim"])) for side, n in sizes.items()}
    )
    if prepare is not None:
        prepare(model)
    optimizer = torch.optim.Adam(model.parameters(), given["learning_rate"])
    adjacency, pairs = _adjacency(split.train), split.train.tocoo()
    curve: list[float] = []
    best: tuple[dict[str, float], dict[str, float]] = ({}, {})
    while len(curve) < given["epochs"] and len(curve) - int(np.argmax([*curve, -1])) <= given["patience"]:
        for batch in np.array_split(rng.permutation(pairs.nnz), max(1, pairs.nnz // given["batch"])):
            negatives = torch.from_numpy(rng.integers(0, sizes["item"], len(batch)))
            rows = [torch.from_numpy(side[batch].astype(np.int64)) for side in (pairs.row, pairs.col)]
            users, items = _propagated(model, adjacency, given["layers"])
            u, i, j = users[rows[0]], items[rows[1]], items[negatives]
            own = [model["user"][rows[0]], model["item"][rows[1]], model["item"][negatives]]
            loss = -torch.nn.functional.logsigmoid((u * i).sum(1) - (u * j).sum(1)).mean()
            loss = loss + given["reg_weight"] * sum(one.pow(2).sum() for one in own) / len(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found = [_evaluate(model, adjacency, given["layers"], split, kind, observe) for kind in ("valid", "test")]
        if found[0]["recall_20"] > max(curve, default=-1.0):
            best = (found[0], found[1])
        curve.append(found[0]["recall_20"])
    return Outcome(curve, int(np.argmax(curve)) + 1, *best, time.perf_counter() - start, False)


def _adjacency(R: csr_matrix) -> torch.Tensor:
    """Give D^-1/2 A D^-1/2 of the graph of users and items, as a sparse tensor."""
    coo, (users, items) = R.tocoo(), R.shape
    rows, columns = (np.concatenate(pair) for pair in ((coo.row, coo.col + users), (coo.col + users, coo.row)))
    degrees = np.maximum(np.bincount(rows, minlength=users + items), 1)
    values = (1 / np.sqrt(degrees[rows] * degrees[columns])).astype(np.float32)
    A = coo_matrix((values, (rows, columns)), shape=(users + items,) * 2).tocsr()
    starts, places = (torch.from_numpy(part.astype(np.int64)) for part in (A.indptr, A.indices))
    return torch.sparse_csr_tensor(starts, places, torch.from_numpy(A.data), A.shape, check_invariants=False)


def _propagated(model: Any, adjacency: torch.Tensor, layers: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the mean of the tables and of each layer's result (LightGCN, He et al. 2020, equations 7 and 8)."""
    each = [torch.cat([model["user"], model["item"]])]
    for _ in range(layers):
        each.append(adjacency @ each[-1])
    whole = torch.stack(each).mean(dim=0)
    return whole[: len(model["user"])], whole[len(model["user"]) :]


def _evaluate(
    model: Any, adjacency: torch.Tensor, layers: int, split: Split, kind: str, observe: Observer | None
) -> dict[str, float]:
    held_out = getattr(split, kind)
    active = np.flatnonzero(np.diff(held_out.indptr))
    with torch.no_grad():
        users, items = _propagated(model, adjacency, layers)
        tops = []
        for block in np.array_split(active, len(active) // 1024 + 1):
            scores = users[torch.from_numpy(block)] @ items.T
            scores[split.train[block].nonzero()] = -torch.inf
            tops.append(scores.topk(max(KS)).indices.numpy())
    top = np.concatenate(tops)
    if observe is not None:
        observe(kind, active, top)
    return metrics(active, top, split, held_out)


def compare(seeds: range, folder: str, **options: Any) -> list[tuple[Outcome, Outcome]]:
    """Train BPR-MF on the demo's data from random and from initialised tables; give a pair of outcomes per seed."""
    split, features = demo_split(folder)
    given = {"layers": 0, "dim": 32, "learning_rate": 0.005, "epochs": 60, "patience": 5, **options}
    pairs = []
    for seed in seeds:
        made = gpu_init.initialize(split.train, features, dim=given["dim"], whiten=True, seed=seed, backend="cpu")
        runs = [train(split, seed=seed, options=given, prepare=prepare) for prepare in (None, filler(made, TABLES))]
        pairs.append((runs[0], runs[1]))
    return pairs


def filler(made: Mapping[str, Any], tables: Mapping[str, Any]) -> Callable[[Any], object]:
    """Give a function that fills a model's tables."""
    return lambda model: init_model_(model, made, tables)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        found = compare(range(5), scratch)
    for arm, outcomes in zip(("random", "initialised"), zip(*found, strict=True), strict=True):
        scores = [one.test["recall_20"] for one in outcomes]
        epochs = [one.best_epoch for one in outcomes]
        print(f"{arm:<12} Recall@20 {statistics.mean(scores):.4f}, best after {statistics.mean(epochs):.0f} epochs")
