"""Users clustered by their interactions (``cluster_on = "interactions"``): ranking, agreement with groups, cost.

``table`` ranks held-out rows by ``X F^T`` without training. Users are clustered on their means, on interactions as
`gpu_init` does it (in large components only), and on interactions with the mean degree added to each degree, which is
another remedy for small components. The data are TikTok, TikTok with half and a quarter of its training rows, and the
demo's; all modalities, 64 whitened dimensions, four K-means seeds. Intervals are from a bootstrap over users, paired
with the local means alone.

``groups`` gives the demo's data features of pure noise, and shows the adjusted Rand index between the clusters and the
groups of taste from which the data were made. Naive Bayes, which learns from the groups of half of the users and
predicts those of the others, shows how much the interactions can tell.

``cost`` times the whole job on both kinds of clusters, in turn.

``svd`` times the directions by `gpu_init.method.spectral` and by scipy's `svds` (ARPACK), in turn, on TikTok and on
random interactions, whose spectrum is flat, and shows which share of the sum of squared singular values ours reach.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse
from common import RESULTS, VARIANTS, Cost, alternate, features, matrix, process_cost, row, show, write_interactions
from job import job_command
from memory import LIBRARIES
from numpy.typing import NDArray
from ranking import demo_split, ones, ranked
from scipy.sparse import csr_matrix
from scipy.sparse.linalg import svds
from sklearn.metrics import adjusted_rand_score
from sklearn.model_selection import cross_val_predict
from sklearn.naive_bayes import MultinomialNB

import gpu_init
from gpu_init import demo
from gpu_init.backend.select import select
from gpu_init.method import clusters as method_clusters
from gpu_init.method import kmeans, spectral, weighting
from gpu_init.method import points as method_points
from gpu_init.method.matrix import from_matrix

SEEDS = range(4)
LAMBDAS = (0.1, 0.5)
CLUSTERS = (8, 64, 256)
RANK = 64
DIM = 64
BOOTSTRAPS = 1000
REPEATS = 3
MEMORY = 300_000_000  # bytes, for --memory
DRAWN = (2, 6, 10)  # least interactions of a user: those of the demo, and of denser data
TOLD = "told half of the groups"  # the name of naive Bayes in the tables
PARTS = ("table", "groups", "cost", "svd")
Features = Mapping[str, NDArray[np.float32]]


class Data(NamedTuple):
    """Training interactions, held-out interactions, and features of each modality."""

    train: csr_matrix
    held_out: csr_matrix
    features: Features


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data" / "tiktok")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--quick", action="store_true", help="only the demo's data, in a small size")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    given = parser.parse_args()
    if "table" in given.parts:
        lines = [line for name, data in _data(given) for line in table(name, data, given)]
        columns = ["data", "clusters on", "K", "lambda", "Recall@20", "range over seeds"]
        columns += ["gain over local means", "95% interval"]
        show("held-out rows, no training", columns, lines)
    if "groups" in given.parts:
        groups(given)
    if "cost" in given.parts:
        cost(given)
    if "svd" in given.parts:
        svd(given)


def _data(given: argparse.Namespace) -> Iterator[tuple[str, Data]]:
    if not given.quick and (given.data / "tiktok.inter").is_file():
        whole = _tiktok(given.data)
        for name, share in (("tiktok", 1.0), ("tiktok, half", 0.5), ("tiktok, a quarter", 0.25)):
            yield name, whole._replace(train=_thinned(whole.train, share))
    elif not given.quick:
        print(f"TikTok is skipped: {given.data.name}/tiktok.inter is not there; name its folder with --data")
    with tempfile.TemporaryDirectory() as folder:
        split, features = demo_split(folder, *((1000, 300) if given.quick else (8000, 2000)))
        yield "demo", Data(split.train, split.valid + split.test, features)


def _tiktok(data: Path) -> Data:
    table = pd.read_csv(data / "tiktok.inter", sep="\t")
    features = {name: np.load(data / f"{name}_feat.npy").astype(np.float32) for name in ("image", "audio")}
    shape = (9308, len(features["image"]))
    return Data(ones(table[table["x_label"] == 0], shape), ones(table[table["x_label"] > 0], shape), features)


def _thinned(R: csr_matrix, share: float) -> csr_matrix:
    entries = R.tocoo()
    kept = np.random.default_rng(0).random(entries.nnz) < share
    return csr_matrix((entries.data[kept], (entries.row[kept], entries.col[kept])), shape=R.shape)


# Ranking.


def table(name: str, data: Data, given: argparse.Namespace) -> Iterator[list[Any]]:
    """Rank the held-out rows of one data set with each kind of clusters."""
    made = gpu_init.initialize(data.train, data.features, lam=1.0, dim=DIM, whiten=True, backend="cpu")
    items = {modality: one.items for modality, one in made.items()}
    local = {modality: one.users for modality, one in made.items()}
    alone = _recall(data, local, items)
    yield [name, "local means alone", "", 1.0, alone.mean(), "", "", ""]
    row(given.results / "interactions.csv", data=name, clusters_on="none", lam=1.0, recall_at_20=float(alone.mean()))
    for kind in ("users", "interactions", "interactions, mean degree added"):
        for clusters in CLUSTERS[: 1 if given.quick else None]:
            levels = [_global(kind, data, clusters, seed) for seed in SEEDS]
            for lam in LAMBDAS:
                found = [_recall(data, _blended(lam, local, level), items) for level in levels]
                means = [float(one.mean()) for one in found]
                low, high = _interval(np.mean(found, axis=0) - alone)
                scores = {"recall_at_20": float(np.mean(means)), "recall_min": min(means), "recall_max": max(means)}
                more = {"more": scores["recall_at_20"] - float(alone.mean()), "more_low": low, "more_high": high}
                row(
                    given.results / "interactions.csv",
                    data=name,
                    clusters_on=kind,
                    clusters=clusters,
                    lam=lam,
                    seeds=len(SEEDS),
                    **scores,
                    **more,
                )
                spread = f"{min(means):.4f} to {max(means):.4f}"
                gain = f"{more['more']:+.4f}"
                yield [name, kind, clusters, lam, scores["recall_at_20"], spread, gain, f"{low:+.4f} to {high:+.4f}"]


def _global(kind: str, data: Data, clusters: int, seed: int) -> dict[str, NDArray[np.float32]]:
    """Give the cluster-level part G of each modality, (U, d)."""
    given: dict[str, Any] = {"clusters": clusters, "seed": seed, "dim": DIM, "whiten": True, "backend": "cpu"}
    if kind != "interactions, mean degree added":
        made = gpu_init.initialize(data.train, data.features, lam=0.0, cluster_on=kind, **given)
        return {name: one.users for name, one in made.items()}
    device = select("cpu")
    matrix = from_matrix(device, data.train, "interactions")
    rows, active = _regularized(data.train)
    points = method_points.Dense(device, rows[active])
    found = kmeans.fit(device, points, clusters, seed)
    labels = np.full(len(rows), -1, np.int32)
    labels[active] = found.labels
    projected = gpu_init.initialize(data.train, data.features, lam=1.0, dim=DIM, whiten=True, backend="cpu")
    levels = {}
    for name, one in projected.items():
        present = one.items_mask
        operator = weighting.weighting(device, matrix, present, "mean")
        means = method_points.Tiled(device, matrix.csr, one.items, operator.mean_rows, operator.present)
        sums, counts = method_clusters.behaviour_sums(device, means, labels, clusters)
        centroids = method_clusters.behaviour_means(sums, counts, means.offset)
        own = np.where(operator.warm, labels, -1)
        levels[name] = np.where(operator.warm[:, None], centroids[own], centroids[own[operator.warm]].mean(axis=0))
    return levels


def _regularized(R: csr_matrix) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Give the rows of E, of length 1, with the mean degree added to each degree, and the users with interactions."""
    S = _normalized(R, 1.0)
    _, _, V = svds(S, k=RANK, rng=0)
    rows = S @ V.T
    rows /= np.maximum(np.linalg.norm(rows, axis=1), 1e-300)[:, None]
    return rows.astype(np.float32), np.flatnonzero(np.diff(R.indptr))


def _normalized(R: Any, share: float) -> Any:
    """Give S of all interactions, with ``share`` times the mean degree added to each degree."""
    degrees = [np.asarray(R.sum(axis=axis), np.float64).ravel() for axis in (1, 0)]
    added = [one + share * one[one > 0].mean() for one in degrees]
    roots = [np.divide(1, np.sqrt(one), out=np.zeros(len(one)), where=one > 0) for one in added]
    return (scipy.sparse.diags(roots[0]) @ R.astype(np.float64) @ scipy.sparse.diags(roots[1])).tocsr()


def _blended(lam: float, local: Features, level: Features) -> dict[str, NDArray[np.float32]]:
    return {name: np.float32(lam) * local[name] + np.float32(1 - lam) * level[name] for name in local}


def _recall(data: Data, users: Features, items: Features) -> NDArray[np.float64]:
    """Give the Recall@20 of each user with held-out items."""

    def score(some: NDArray[np.int64]) -> NDArray[np.float32]:
        scores: NDArray[np.float32] = np.add.reduce([users[name][some] @ items[name].T for name in users])
        return scores

    hits, counts = ranked(score, data.train, data.held_out)
    found: NDArray[np.float64] = hits.sum(axis=1) / counts
    return found


def _interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """Give the 95% bootstrap interval of a mean over users."""
    rng, n = np.random.default_rng(0), len(values)
    drawn = [rng.choice(values, n).mean() for _ in range(BOOTSTRAPS)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


# Agreement with groups.


def groups(given: argparse.Namespace) -> None:
    """Compare clusters with the groups of taste in the demo's data and in denser data, with features of noise."""
    lines = [line for drawn in DRAWN for line in _agreement(given, drawn)]
    columns = ["least drawn", "clusters on", "K", "least interactions", "users", "adjusted Rand index"]
    show("features of noise, groups of taste", columns, lines)


def _agreement(given: argparse.Namespace, drawn: int) -> list[list[Any]]:
    """Give the rows of the table for data in which each user has at least ``drawn`` interactions."""
    users, items = (2000, 400) if given.quick else (20_000, 4000)
    with tempfile.TemporaryDirectory() as folder:
        made = demo.make(folder, users=users, items=items, seed=0, least=drawn)
        R = csr_matrix((np.ones(len(made.seen[0]), np.float32), made.seen), shape=(users, items))
        taste = made.user_groups
    noise = {"noise": np.random.default_rng(0).standard_normal((items, 64)).astype(np.float32)}
    k = int(taste.max()) + 1
    degrees = np.diff(R.indptr)
    predicted = {
        kind: gpu_init.initialize(R, noise, clusters=k, cluster_on=kind, restarts=4, backend="cpu")["noise"].labels
        for kind in ("users", "interactions")
    }
    predicted[TOLD] = cross_val_predict(MultinomialNB(), R, taste, cv=2)
    lines = []
    for kind, labels in predicted.items():
        for least in (1, 5, 10):
            some = degrees >= least
            found = adjusted_rand_score(taste[some], labels[some])
            facts = {"items": items, "clusters": k, "least_degree": least, "users": int(some.sum()), "ari": found}
            row(given.results / "interactions_groups.csv", clusters_on=kind, drawn=drawn, **facts)
            lines.append([drawn, kind, k, least, int(some.sum()), found])
    return lines


# Cost.


def cost(given: argparse.Namespace) -> None:
    """Run the whole job, from Parquet to artifact, on both kinds of clusters, each run in a process of its own."""
    users, items, pairs, width = (2000, 500, 20_000, 32) if given.quick else (300_000, 40_000, 4_000_000, 384)
    taken: dict[str, list[Cost]] = {"users": [], "interactions": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_interactions(folder / "interactions.parquet", users, items, pairs)
        for variant in VARIANTS:
            np.save(folder / f"{variant}.npy", features(variant, items, width))
            paths = (str(folder / "interactions.parquet"), str(folder / f"{variant}.npy"))
            command = [*job_command(*paths, users, folder / "out", 8), "--memory", f"{MEMORY // 10**6}MB"]
            for turn in range(1 if given.quick else REPEATS):
                for kind, costs in taken.items():
                    costs.append(process_cost([*command, "--cluster-on", kind], warm_up=turn == 0))
    promised = 8 * (users + 1) + 4 * pairs + 4 * items * width + MEMORY + LIBRARIES
    seconds = {kind: statistics.median(one.seconds for one in costs) for kind, costs in taken.items()}
    lines = []
    for kind, costs in taken.items():
        sizes = {"users": users, "items": items, "interactions": pairs, "width": width}
        peak = max(one.peak for one in costs)
        facts = {"seconds": seconds[kind], "times_users": seconds[kind] / seconds["users"]}
        facts |= {"peak_mib": peak >> 20, "promised_mib": promised >> 20}
        row(given.results / "interactions_cost.csv", clusters_on=kind, **sizes, **facts)
        lines.append([kind, *facts.values()])
    title = f"whole job, {users:,} users, {pairs:,} interactions, D {width}, K 8"
    show(title, ["clusters on", "seconds", "times those of users", "peak MiB", "promised MiB"], lines)


def svd(given: argparse.Namespace) -> None:
    """Time `spectral.fit` and `svds`."""
    device = select("cpu")
    sources = {"random": matrix(*((2000, 500, 20_000) if given.quick else (300_000, 40_000, 4_000_000)))}
    if not given.quick and (given.data / "tiktok.inter").is_file():
        sources = {"tiktok": _tiktok(given.data).train, **sources}
    lines = []
    for name, R in sources.items():
        made = from_matrix(device, R, "interactions")
        kept = spectral.Whole(device, made).large(RANK)
        S = _normalized(R @ scipy.sparse.diags(kept.astype(np.float64)), 0.0)
        found: dict[str, Any] = {}

        def ours(made: Any = made, found: dict[str, Any] = found) -> None:
            found["ours"] = spectral.fit(device, spectral.Whole(device, made), RANK, 0)

        def theirs(S: Any = S, found: dict[str, Any] = found) -> None:
            found["svds"] = svds(S, k=RANK, rng=0, return_singular_vectors="vh")[1]

        timings = alternate({"ours": ours, "svds": theirs}, repeats=1, warm_up=name == "tiktok")
        reached = float((found["ours"].singular_values ** 2).sum() / (found["svds"] ** 2).sum())
        facts = {"seconds": timings["ours"].median, "times_faster": timings["svds"].ratio, "share_of_squares": reached}
        facts |= {"products": found["ours"].products, "settled": found["ours"].settled}
        row(given.results / "interactions_svd.csv", data=name, pairs=R.nnz, rank=RANK, **facts)
        lines.append([name, R.nnz, *facts.values()])
    columns = ["data", "pairs", "seconds", "times faster than svds", "share of squares", "products", "converged"]
    show(f"{RANK} directions", columns, lines)


if __name__ == "__main__":
    main()
