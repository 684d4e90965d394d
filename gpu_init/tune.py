"""Settings ranked without training: held-out interactions ranked by the initial vectors themselves.

For each candidate, ``X F^T`` ranks all items for each user with held-out items, the user's training items left out;
Recall and NDCG at 10 and 20 are the means over these users. Modalities are ranked one by one and together, by the sum
of their products. A score is ``lambda_u (L F^T)_ui + (1 - lambda_u) (G F^T)_ui``, so what candidates share is made
once: projections, users' local parts per weighting, clusterings with their products, and for each block of users the
products of the local part. Candidates are then sums of two matrices that are there.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from gpu_init import run, tasks
from gpu_init.api import Memory, job_on_arrays
from gpu_init.backend.interface import Backend, ranges
from gpu_init.backend.select import select
from gpu_init.config import COLUMNS, JobConfig
from gpu_init.errors import InputError
from gpu_init.files import storage
from gpu_init.inputs.axes import ItemAxis
from gpu_init.inputs.interactions import read as read_interactions
from gpu_init.inputs.read import item_axis_of, read_features
from gpu_init.inputs.tables import Columns
from gpu_init.method import lambdas
from gpu_init.method.blend import Blend, global_part, of_users
from gpu_init.method.clusters import check_warm
from gpu_init.method.matrix import Interactions
from gpu_init.method.modality import Modality
from gpu_init.method.projection import fit_projection, project
from gpu_init.method.weighting import weighting
from gpu_init.settings import CLUSTER_ON, POLICIES, Settings, settings_to_dict
from gpu_init.show import charts
from gpu_init.show.progress import Progress
from gpu_init.site import Data, LocalSite
from gpu_init.where import parse

METRICS = ("recall@10", "recall@20", "ndcg@10", "ndcg@20")
LAMBDAS: tuple[float | str, ...] = (1.0, 0.9, 0.7, 0.5, 0.3, 0.1, *POLICIES)
CLUSTERS = (8, 32, 128)
WEIGHTINGS = ("mean", "sym")
DIM = 64  # Features are also tried projected to this width, plain and whitened.
MOST_USERS = 10_000  # Users with held-out items that are ranked; of more, a sample is.
BOOTSTRAPS = 1000
CONFIDENCE = 0.95
_BLOCK_VALUES = 1 << 18  # Scores that are computed at a time; they fit in a processor's cache.
_LAMBDA_ROWS = 1 << 16
_PLACES = (10, 20)

Score = NDArray[np.float64]


@dataclass(frozen=True)
class Candidate:
    """Settings to try, and the modalities whose scores are summed."""

    settings: Settings
    modalities: tuple[str, ...]


class HeldOut(NamedTuple):
    """Held-out interactions: rows and columns of R (m,) int64, sorted by user, each pair once."""

    users: NDArray[np.int64]
    items: NDArray[np.int64]


@dataclass(frozen=True)
class Ranking:
    """What was ranked, and how well.

    Attributes
    ----------
    candidates : list of Candidate
        C of them.
    scores : dict of str to array, shape (C, n), float64
        By metric: each candidate's score of each user.
    users : array, shape (n,), int64
        Rows of the users with held-out items.
    """

    candidates: list[Candidate]
    scores: dict[str, Score]
    users: NDArray[np.int64]


def grid(settings: Settings, widths: Mapping[str, int], most_clusters: int) -> list[Settings]:
    """List all candidates around some settings, these first.

    Lambda, policies, K, weighting, what is clustered, and features as they are, projected and whitened; what is not
    varied (seed, restarts, scale, dtype) is taken from the settings. Lambda 1 knows no clusters and stands once.

    Parameters
    ----------
    settings : Settings
        Of the job.
    widths : mapping of str to int
        Dimensions of each modality; projections are as wide as the narrowest allows.
    most_clusters : int
        K beyond are left out.
    """
    dim = min(settings.dim or DIM, *widths.values())
    free = replace(settings, lam=1.0, tau=None, temperature=None, cluster_on=CLUSTER_ON[0], cluster_rank=None)
    found = [settings]
    ks = [k for k in CLUSTERS if k <= most_clusters] or [most_clusters]
    spaces = ((None, False), (dim, False), (dim, True))
    for (width, whiten), kind, on, k, lam in itertools.product(spaces, WEIGHTINGS, CLUSTER_ON, ks, LAMBDAS):
        if lam != 1.0 or (k == ks[0] and on == CLUSTER_ON[0]):
            given: dict[str, Any] = {
                "lam": lam,
                "clusters": k,
                "cluster_on": on,
                "weighting": kind,
                "dim": width,
                "whiten": whiten,
                "cluster_rank": settings.cluster_rank if on == "interactions" else None,
            }
            found.append(replace(free, **given))
    return list(dict.fromkeys(found))


def read(config: JobConfig, backend: Backend, progress: Progress) -> tuple[Data, HeldOut]:
    """Read a job's inputs, and held-out interactions of its users and items.

    Interactions that the job has as well, and those of other users or items, are left out.

    Raises
    ------
    InputError
        As `job.run`, or nothing is held out.
    """
    if config.valid is None and config.valid_where is None:
        raise InputError("tune ranks settings by held-out interactions: give --valid PATH, or --valid-where EXPR.")
    tried = grid(config.settings, dict.fromkeys(config.features, DIM), max(CLUSTERS))
    clusterings = {_keys(one, "")[1] + (one.dim, one.whiten) for one in tried}
    found = read_features(config, progress)
    data = LocalSite(backend).read(config, found, item_axis_of(found.tables), progress, None, len(clusterings))
    for name, warm in _warm(data).items():
        check_warm(name, int(data.masks[name].sum()), warm, config.settings)
    path, train = config.valid or config.interactions, data.counts
    where = parse(config.valid_where) if config.valid_where else None
    columns = Columns(config.user_column, config.item_column, None, where, config.session_column)
    axis = ItemAxis(train.items) if train.item_ids is None else ItemAxis(None, [train.item_ids])
    with progress.step("read held-out", unit="row") as step:
        try:
            numbered = config.users if isinstance(config.users, int) else None
            held = read_interactions(backend, path, columns, axis, numbered, step.advance)
        except InputError as error:
            raise InputError(str(error).replace("--where", "--valid-where")) from None
        codes = _pairs(backend, held.interactions)
        users = _rows(codes[0], held.user_ids, train.user_ids, train.users)
        items = _rows(codes[1], held.item_ids, train.item_ids, train.items)
        known = (users >= 0) & (items >= 0)
        keys = np.unique(users[known] * train.items + items[known])
        own = _pairs(backend, data.matrix)
        keys = np.setdiff1d(keys, own[0] * train.items + own[1])
        step.note(held_out=len(keys), of_unknown_users_or_items=int((~known).sum()))
    if len(keys) == 0:
        raise InputError(f"{path}: no held-out interaction is left of users and items that the job has.")
    return data, HeldOut(*np.divmod(keys, train.items))


def _warm(data: Data) -> dict[str, int]:
    """Count the warm users in each modality."""
    backend = data.backend
    operators = {
        name: weighting(backend, data.matrix, backend.asarray(mask), "mean") for name, mask in data.masks.items()
    }
    return {name: int(operator.warm.sum()) for name, operator in operators.items()}


def _pairs(backend: Backend, found: Interactions) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the row and column of each interaction."""
    starts, items = backend.to_host(found.csr.indptr), backend.to_host(found.csr.indices)
    return np.repeat(np.arange(found.users), np.diff(starts)), items.astype(np.int64)


def _rows(codes: NDArray[np.int64], ids: Any, axis_ids: Any, size: int) -> NDArray[np.int64]:
    """Find the row of R of each code; -1 where there is none.

    A code is a place in ``ids``, and ``axis_ids`` are the ids of the rows; None: row numbers are the ids.
    """
    if ids is None and axis_ids is None:
        return np.where(codes < size, codes, -1)
    own = pd.Series(np.arange(codes.max(initial=-1) + 1)) if ids is None else ids
    axis = pd.Series(np.arange(size)) if axis_ids is None else axis_ids
    if str(own.dtype) != str(axis.dtype):
        own, axis = own.astype("str"), axis.astype("str")
    found: NDArray[np.int64] = pd.Index(axis).get_indexer(pd.Index(own)).astype(np.int64)[codes]
    return found


# Ranking.


def rank(data: Data, held_out: HeldOut, candidates: Sequence[Settings], seed: int, progress: Progress) -> Ranking:
    """Rank held-out interactions by each candidate, for each modality and for all together.

    Parameters
    ----------
    data : Data
        Inputs of the job.
    held_out : HeldOut
    candidates : sequence of Settings
    seed : int
        Of the sample of users, where more than `MOST_USERS` have held-out interactions.
    progress : Progress

    Returns
    -------
    Ranking
    """
    users = np.unique(held_out.users)
    if len(users) > MOST_USERS:
        users = np.sort(np.random.default_rng(seed).choice(users, MOST_USERS, replace=False))
        held_out = HeldOut(*(part[np.isin(held_out.users, users)] for part in held_out))
    backend = data.backend
    task = _Ranker(backend, data.matrix, users, held_out, tuple(data.sources))
    found: dict[Candidate, NDArray[np.float32]] = {}
    by_space: dict[tuple[int | None, bool], list[Settings]] = {}
    for one in candidates:
        by_space.setdefault((one.dim, one.whiten), []).append(one)
    for (dim, whiten), group in by_space.items():
        space = "as they are" if dim is None else f"{dim}, whitened" if whiten else f"{dim}"
        with progress.step(f"rank, features {space}", total=len(group), unit="candidate") as step:
            spaces = {name: _space(backend, data, name, dim, whiten) for name in data.sources}
            found |= task.ranked(spaces, group)
            step.advance(len(group))
    rows = [Candidate(settings, modalities) for settings in candidates for modalities in task.combinations]
    per_pair = np.stack([found[row] for row in rows])
    return Ranking(rows, _metrics(per_pair, np.searchsorted(users, held_out.users), len(users)), users)


def _space(backend: Backend, data: Data, name: str, dim: int | None, whiten: bool) -> Modality:
    modality = data.sources[name].aligned(backend, exact=dim is not None)
    if dim is None:
        return modality
    return project(backend, modality, fit_projection(backend, modality, dim, whiten))


def _metrics(ranks: NDArray[np.float32], rows: NDArray[np.int64], users: int) -> dict[str, Score]:
    """Recall and NDCG (C, n) of each user from the ranks (C, pairs), from 1 on, of the user's held-out items.

    NDCG: gain 1 per item found, divided by log2(rank + 1), over the best that the number of held-out items allows.
    """
    counts = np.bincount(rows, minlength=users)
    starts = np.searchsorted(rows, np.arange(users))
    ideal = np.cumsum(1 / np.log2(np.arange(2, max(_PLACES) + 2)))
    found: dict[str, Score] = {}
    for k in _PLACES:
        hits = ranks <= k
        found[f"recall@{k}"] = np.add.reduceat(hits, starts, axis=1, dtype=np.float64) / counts
        gains = np.where(hits, 1 / np.log2(ranks.astype(np.float64) + 1), 0.0)
        found[f"ndcg@{k}"] = np.add.reduceat(gains, starts, axis=1) / ideal[np.minimum(counts, k) - 1]
    return found


class _Ranker:
    """Ranks candidates; holds what they share: users with held-out items, their training items, clusterings."""

    def __init__(
        self,
        backend: Backend,
        train: Interactions,
        users: NDArray[np.int64],
        held_out: HeldOut,
        names: tuple[str, ...],
    ) -> None:
        self.backend, self.train, self.names = backend, train, names
        self.combinations = [(name,) for name in names] + ([names] if len(names) > 1 else [])
        self.users = backend.asarray(users)
        self.part = train.some(backend, self.users)
        self.pairs = np.searchsorted(users, held_out.users), held_out.items
        self.embeddings: dict[Any, Memory] = {}
        self.behaviours: dict[Any, Memory] = {}

    def ranked(
        self, spaces: Mapping[str, Modality], candidates: Sequence[Settings]
    ) -> dict[Candidate, NDArray[np.float32]]:
        """Rank all held-out pairs by candidates that have the same features, projected or not."""
        local: dict[Any, Any] = {}
        level: dict[Any, Any] = {}
        shares: dict[Any, Any] = {}
        for name, modality in spaces.items():
            plans: dict[Any, Blend] = {}
            for one in candidates:
                by_weighting, by_clusters, by_policy = _keys(one, name)
                if by_clusters not in plans:
                    plans[by_clusters] = self._plan(modality, one)
                    level[by_clusters] = self._global(plans[by_clusters])
                if by_weighting not in local:
                    local[by_weighting] = self._local(modality, one)
                if by_policy not in shares:
                    shares[by_policy] = self._lambda(plans[by_clusters], one)
        xp = self.backend.xp
        items = {name: xp.where(one.present[:, None], one.values, 0).T for name, one in spaces.items()}

        def work(part: slice) -> dict[Candidate, Any]:
            of_local = {key: vectors[part] @ items[key[-1]] for key, vectors in local.items()}
            of_level = {key: vectors[part] @ items[key[-1]] for key, vectors in level.items()}
            rank_of = self._rank_by(part)
            found = {}
            for one in candidates:
                scores = []
                for name in self.names:
                    by_weighting, by_clusters, by_policy = _keys(one, name)
                    lam = shares[by_policy][part]
                    scores.append(of_local[by_weighting] * lam)
                    scores[-1] += of_level[by_clusters] * (1 - lam)
                    found[Candidate(one, (name,))] = rank_of(scores[-1])
                if len(scores) > 1:
                    found[Candidate(one, self.names)] = rank_of(sum(scores))
            return found

        parts = ranges(len(self.users), max(16, _BLOCK_VALUES // self.train.items))
        blocks = list(self.backend.in_order(work, parts))
        return {key: np.concatenate([block[key] for block in blocks]) for key in blocks[0]}

    def _plan(self, modality: Modality, settings: Settings) -> Blend:
        """Cluster and label all users; returns all that a blend needs but lambda."""
        backend, name = self.backend, modality.name
        settings = replace(settings, lam=0.0, tau=None, temperature=None, weighting="mean")
        arrays = self._behaviour(modality, settings) if settings.cluster_on == "interactions" else Memory(backend)
        job = job_on_arrays(backend, self.train, {name: modality}, settings, arrays)
        warm = job.parts.map(tasks.warm, name)
        fitted, _ = run.cluster(job, modality, warm)
        fitted, _ = run.label(job, fitted, sum(warm))
        by_user = fitted.item_labels is None
        return Blend(
            modality,
            weighting(backend, self.train, modality.present, "mean"),
            0.0,
            backend.asarray(fitted.centroids),
            arrays.load(f"{name}/labels.npy") if by_user else None,
            None if by_user else backend.asarray(fitted.item_labels),
            backend.asarray(fitted.cold),
        )

    def _behaviour(self, modality: Modality, settings: Settings) -> Memory:
        """Cluster the users on the interactions, which gives the same for all features."""
        embed = (settings.cluster_rank, settings.seed)
        key = (*embed, settings.clusters, settings.restarts, settings.tolerance, settings.kmeans)
        if key not in self.behaviours:
            arrays = self.embeddings.get(embed, Memory(self.backend)).copy()
            job = job_on_arrays(self.backend, self.train, {modality.name: modality}, settings, arrays)
            run.embed_interactions(job)
            self.embeddings[embed] = arrays.copy()
            run.cluster_interactions(job)
            self.behaviours[key] = arrays
        return self.behaviours[key].copy()

    def _global(self, plan: Blend) -> Any:
        """Return G of the users with held-out items, (n, d) float32; cold users get the vector of cold users."""
        own = of_users(plan, self.users)
        level = global_part(self.backend, self.part, own, slice(0, len(self.users)))
        return self.backend.xp.where(own.weighting.warm[:, None], level, plan.cold).astype(self.backend.xp.float32)

    def _local(self, modality: Modality, settings: Settings) -> Any:
        """Return L of the users with held-out items, (n, d) float32."""
        xp = self.backend.xp
        operator = weighting(self.backend, self.train, modality.present, settings.weighting)
        rows, offset = operator.local_rows[self.users], xp.zeros(modality.values.shape[1])
        made = self.backend.kernels.aggregate(self.part.csr, modality.values, rows, operator.local_items, offset)
        return made.astype(xp.float32)

    def _lambda(self, plan: Blend, settings: Settings) -> Any:
        """Return lambda of the users with held-out items, (n, 1) float32; 0 for cold users."""
        backend, xp = self.backend, self.backend.xp
        own = of_users(plan, self.users)
        if settings.lam not in POLICIES:
            return xp.where(own.weighting.warm, settings.lam, 0.0).astype(xp.float32)[:, None]
        squares, counts = lambdas.effective_counts(backend, self.part, own.weighting)
        if settings.lam == "shrink":
            tau = settings.tau
            if tau is None:  # It is found from all users, not just these.
                modalities = {plan.modality.name: plan.modality}
                job = job_on_arrays(backend, self.train, modalities, settings, Memory(backend))
                tau = run.find_tau(job, plan.modality)["tau"]
            values = lambdas.shrink(backend, own.weighting.warm, counts, tau)
        else:
            temperature = lambdas.TEMPERATURE if settings.temperature is None else settings.temperature
            values = lambdas.attention(backend, self.part, own, squares, temperature, _LAMBDA_ROWS)
        return values.astype(xp.float32)[:, None]

    def _rank_by(self, part: slice) -> Callable[[Any], NDArray[np.float32]]:
        """Give a function that ranks a block's held-out pairs by scores (n, I), which it changes.

        Items with the same score as the held-out one count as ranked before it.
        """
        backend, xp = self.backend, self.backend.xp
        csr = self.part.csr.rows(part.start, part.stop)
        seen = slice(int(csr.indptr[0]), int(csr.indptr[-1]))
        mine = xp.searchsorted(csr.indptr, xp.arange(seen.start, seen.stop), side="right") - 1, csr.indices[seen]
        wanted = slice(*np.searchsorted(self.pairs[0], [part.start, part.stop]))
        rows, targets = (backend.asarray(side[wanted]) for side in (self.pairs[0] - part.start, self.pairs[1]))

        def rank_of(scores: Any) -> NDArray[np.float32]:
            scores[mine] = -xp.inf
            reached = scores[rows] >= scores[rows, targets][:, None]
            return backend.to_host(xp.count_nonzero(reached, axis=1)).astype(np.float32)

        return rank_of


def _keys(settings: Settings, name: str) -> tuple[Any, Any, Any]:
    """Return the settings that decide the local part, the global part, and lambda of a modality, as three keys."""
    clusters = (settings.cluster_on, settings.cluster_rank, settings.clusters, name)
    policy = (settings.lam, settings.tau, settings.temperature)
    return (settings.weighting, name), clusters, (policy, *(clusters if settings.lam == "attention" else (name,)))


# Results.


@dataclass(frozen=True)
class Standing:
    """Candidates by their mean score, with intervals of a paired bootstrap over users.

    Attributes
    ----------
    order : array, shape (C,), int64
        Candidates from the best on; of equals, the first.
    mean, low, high : arrays, shape (C,), float64
        Mean score of each candidate, and its interval.
    behind, behind_low, behind_high : arrays, shape (C,), float64
        How far each is behind the best, and the interval of that: above 0, it is significantly worse.
    """

    order: NDArray[np.int64]
    mean: Score
    low: Score
    high: Score
    behind: Score
    behind_low: Score
    behind_high: Score


def standing(scores: Score, seed: int = 0) -> Standing:
    """Order candidates by their scores (C, n) of n users; users are drawn anew `BOOTSTRAPS` times (Efron, 1979)."""
    rng = np.random.default_rng(seed)
    n = scores.shape[1]
    mean = scores.mean(axis=1)
    order = np.argsort(-mean, kind="stable")
    drawn = np.concatenate([rng.multinomial(n, np.full(n, 1 / n), 50) @ scores.T for _ in range(BOOTSTRAPS // 50)]) / n
    tails = [100 * (1 - CONFIDENCE) / 2, 100 * (1 + CONFIDENCE) / 2]
    low, high = np.percentile(drawn, tails, axis=0)
    behind_low, behind_high = np.percentile(drawn[:, order[:1]] - drawn, tails, axis=0)
    return Standing(order, mean, low, high, mean[order[0]] - mean, behind_low, behind_high)


def table(ranking: Ranking, by: str, seed: int = 0) -> pd.DataFrame:
    """All candidates, the best first: scores, intervals, settings.

    Columns are ``modalities``, the settings under their names in TOML, the metrics, and of the metric ``by`` the
    interval ``low`` to ``high``, how far ``behind`` the best, and the interval ``behind_low`` to ``behind_high``.
    """
    found = standing(ranking.scores[by], seed)
    rows = [{"modalities": " + ".join(one.modalities), **settings_to_dict(one.settings)} for one in ranking.candidates]
    frame = pd.DataFrame(rows).assign(**{name: scores.mean(axis=1) for name, scores in ranking.scores.items()})
    names = ("low", "high", "behind", "behind_low", "behind_high")
    frame = frame.assign(**{name: getattr(found, name) for name in names})
    return frame.iloc[found.order]


def tune(config: JobConfig, by: str, folder: str, progress: Progress) -> tuple[pd.DataFrame, list[str]]:
    """Rank settings for a job, and write what comes of it.

    Parameters
    ----------
    config : JobConfig
        The job, and what is held out.
    by : {"recall@10", "recall@20", "ndcg@10", "ndcg@20"}
        What candidates are ordered by.
    folder : str
        Made if it is not there; files of the same names are replaced.
    progress : Progress

    Returns
    -------
    frame : DataFrame
        As `table` gives it.
    paths : list of str
        ``best.toml``, a job with the best settings; ``scores.csv``, the whole table; ``tune.html``, a plot, where
        plotly is installed.

    Raises
    ------
    InputError, ResourceError
        As `job.run`, or nothing is held out.
    """
    storage.require_utf8(folder)
    backend = select(config.backend, progress.say)
    with backend.explained():
        data, held_out = read(config, backend, progress)
        widths = {name: source.table.values.shape[1] for name, source in data.sources.items()}
        least = min(*_warm(data).values(), *(int(mask.sum()) for mask in data.masks.values()))
        candidates = grid(config.settings, widths, least)
        ranking = rank(data, held_out, candidates, config.settings.seed, progress)
    with progress.step("bootstrap") as step:
        frame = table(ranking, by, config.settings.seed)
        step.note(candidates=len(frame), users=len(ranking.users))
    storage.make_folder(folder)
    best = ranking.candidates[int(frame.index[0])]
    texts = {"best.toml": job_file(config, best, frame.iloc[0], by), "scores.csv": frame.to_csv(index=False)}
    if charts.available():
        texts["tune.html"] = page(frame, by, len(ranking.users))
    else:
        progress.say(f"no plot: {charts.REMEDY}")
    for name, text in texts.items():
        storage.write_file(os.path.join(folder, name), text.encode())
    return frame, [os.path.join(folder, name) for name in texts]


def job_file(config: JobConfig, best: Candidate, row: pd.Series[Any], by: str) -> str:
    """Return a job with a candidate's settings, as TOML that `gpu-init run` takes; paths are absolute."""

    def path(value: Any) -> Any:
        return os.path.abspath(value) if isinstance(value, str) and "://" not in value else value

    out = [f"# Made by gpu-init tune: {by} {row[by]:.4f} ({row['low']:.4f} to {row['high']:.4f}) on held-out rows."]
    given = {"interactions": path(config.interactions), "users": path(config.users), "out": path(config.out)}
    given |= {name: getattr(config, name) for name in (*COLUMNS, "half_life", "where", "backend", "memory")}
    for name, value in {**given, **settings_to_dict(best.settings)}.items():
        if value is not None:
            out.append(f"{name} = {json.dumps(value, ensure_ascii=False)}")
    out += ["", "[features]"]
    for name, source in config.features.items():
        line = f"{json.dumps(name)} = {json.dumps(path(source), ensure_ascii=False)}"
        out.append(line if name in best.modalities else f"# {line}  # ranks better without")
    return "\n".join(out) + "\n"


def page(frame: pd.DataFrame, by: str, users: int) -> str:
    """Return an HTML page with the best candidates and the effect of each setting."""
    top = frame.head(40).iloc[::-1]
    names = [
        f"{row['modalities']}: lambda {row['lambda']}, K {row['clusters']} on {row['cluster_on']},"
        f" {row['weighting']}, {_space_of(row)}"
        for _, row in top.iterrows()
    ]
    best = charts.intervals(names, top[by], top["low"], top["high"], by)
    spread = frame.assign(features=[_space_of(row) for _, row in frame.iterrows()])
    settings = {
        name.replace("_", " "): [(str(value), part[by]) for value, part in spread.groupby(name, sort=False)]
        for name in ("modalities", "lambda", "clusters", "cluster_on", "weighting", "features")
    }
    return charts.page(
        "gpu-init tune",
        f"{len(frame)} candidates, ranked without training by held-out interactions of {users:,} users.",
        [
            ("The best", f"{by} and its 95% interval, bootstrapped over users.", best),
            ("What each setting does", f"{by} of all candidates with it.", charts.boxes(settings, by)),
        ],
    )


def _space_of(row: Any) -> str:
    dim = row["dim"]
    return "features as they are" if pd.isna(dim) else f"{int(dim)} dimensions{', whitened' if row['whiten'] else ''}"
