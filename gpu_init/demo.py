"""The data set of ``gpu-init demo``: invented, but with the structure of real ones, and its held-out check.

Twelve groups of taste; an item's features are its group's place plus what is its own, turned differently in
each modality; a user mostly takes items of one group, popular ones first, and among those the ones close to
a taste of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from gpu_init.errors import InputError

GROUPS = 12
WIDTHS = {"image": 128, "text": 96}

_TASTE_WIDTH = 16  # dimensions of the space that tastes and items share
_DEGREE_EXPONENT = 1.6  # Pareto tail of user activity
_POPULARITY_EXPONENT = 0.8  # Zipf exponent of an item's popularity, by rank
_MIN_DEGREE_TO_HOLD_OUT = 5
_FIRST_SECOND = 1_700_000_000
_YEAR = 365 * 86_400

Pairs = tuple[NDArray[np.int64], NDArray[np.int64]]


@dataclass(frozen=True)
class DemoData:
    """Where the files lie, and what they were made from.

    Attributes
    ----------
    job, interactions, held_out, image, text : Path
        The job file, the tables and the features.
    seen, unseen : tuple of int64 arrays
        (users, items) of the interactions in `interactions` and in `held_out`, sorted by user.
    user_groups : int64 array, shape (U,)
        Main group of taste of each user.
    item_groups : int64 array, shape (I,)
        Group of each item.
    """

    job: Path
    interactions: Path
    held_out: Path
    image: Path
    text: Path
    seen: Pairs
    unseen: Pairs
    user_groups: NDArray[np.int64]
    item_groups: NDArray[np.int64]


def make(folder: str | Path, *, users: int = 20_000, items: int = 4_000, seed: int = 0, least: int = 2) -> DemoData:
    """Write the demo's interactions, features and job file; the same arguments give the same bytes.

    Parameters
    ----------
    folder : path
        Made if it is not there; files of the same names are replaced.
    users, items : int
        At least 100 users and 12 items. One user in a hundred has no interaction, 3% of the items have no
        image (rows of NaN) and 5% no text (no row).
    seed : int
        Seeds everything.
    least : int
        Interactions drawn for a user who has any, before one is held out and repeated ones count once.

    Raises
    ------
    InputError
        Too few users or items, or files that cannot be written.
    """
    if users < 100 or items < GROUPS:
        raise InputError(f"a demo needs at least 100 users and {GROUPS} items, not {users} and {items}.")
    rng = np.random.default_rng(seed)
    item_groups = rng.permutation(items) % GROUPS
    user_groups = rng.choice(GROUPS, users, p=_falling(GROUPS, 0.5))
    places = _unit_rows(rng.standard_normal((GROUPS, _TASTE_WIDTH)))
    nature = places[item_groups] + 0.25 * rng.standard_normal((items, _TASTE_WIDTH))
    pairs = _interactions(rng, user_groups, item_groups, nature, least)
    times = _FIRST_SECOND + rng.integers(0, _YEAR, len(pairs[0]))
    match = user_groups[pairs[0]] == item_groups[pairs[1]]
    ratings = np.clip(rng.binomial(4, 0.6, len(match)) + match + 1, 1, 5)
    kept = ~_newest_of_active(pairs[0], times)

    features = {name: _features(rng, nature, width) for name, width in WIDTHS.items()}
    features["image"][rng.random(items) < 0.03] = np.nan
    text_rows = rng.permutation(np.flatnonzero(rng.random(items) >= 0.05))

    root = Path(folder)
    data = DemoData(
        job=root / "job.toml",
        interactions=root / "interactions.parquet",
        held_out=root / "heldout.parquet",
        image=root / "image.npy",
        text=root / "text.parquet",
        seen=(pairs[0][kept], pairs[1][kept]),
        unseen=(pairs[0][~kept], pairs[1][~kept]),
        user_groups=user_groups,
        item_groups=item_groups,
    )
    table = pa.table({"user_id": pairs[0], "item_id": pairs[1], "rating": ratings.astype(np.int8), "timestamp": times})
    try:
        root.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.filter(pa.array(kept)), data.interactions)
        pq.write_table(table.filter(pa.array(~kept)), data.held_out)
        np.save(data.image, features["image"].astype(np.float16))
        pq.write_table(_text_table(text_rows, features["text"]), data.text)
        data.job.write_text(_job(users), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{root}: the demo's files cannot be written there ({error.strerror or error}).") from error
    return data


def evaluate(
    vectors: Mapping[str, tuple[NDArray[Any], NDArray[Any]]],
    seen: Pairs,
    unseen: Pairs,
    *,
    k: int = 20,
    seed: int = 0,
) -> dict[str, float]:
    """Recall@k of held-out interactions, ranked without training by ``X F^T`` summed over the modalities.

    Both sides are taken from the mean of the items, which says nothing about a user; items that a user has
    seen are left out of their ranking.

    Parameters
    ----------
    vectors : mapping of str to (array (U, d), array (I, d))
        Per modality the initial user vectors, and the items' features in the same space and scale; an item
        without the modality is a row of NaN.
    seen, unseen : tuple of int64 arrays
        (users, items) of the interactions that the vectors were made from, sorted by user, and of those to
        be found again.
    k : int
        Length of the ranking.
    seed : int
        Seeds the random vectors.

    Returns
    -------
    dict of str to float
        Shares of ``unseen`` found among the first ``k``: for the vectors ("gpu-init"), for the plain mean of a
        user's items ("local means alone") and for random vectors ("random").
    """
    centred = [_centred(users, items) for users, items in vectors.values()]
    n_users = len(centred[0][0])
    rng = np.random.default_rng(seed)
    noise = [rng.standard_normal(users.shape, dtype=np.float32) for users, _, _ in centred]
    starts = np.searchsorted(seen[0], np.arange(n_users + 1))
    hits = {"gpu-init": 0, "local means alone": 0, "random": 0}
    for first in range(0, len(unseen[0]), 1024):
        users, targets = unseen[0][first : first + 1024], unseen[1][first : first + 1024]
        row, entry = _ranges(starts[users], starts[users + 1])
        own = seen[1][entry]
        for name, blocks in {
            "gpu-init": [x[users] for x, _, _ in centred],
            "local means alone": [_means(items, present, row, own, len(users)) for _, items, present in centred],
            "random": [x[users] for x in noise],
        }.items():
            scores = np.add.reduce([x @ items.T for x, (_, items, _) in zip(blocks, centred, strict=True)])
            target = scores[np.arange(len(users)), targets][:, None]
            scores[row, own] = -np.inf
            hits[name] += int(((scores >= target).sum(axis=1) <= k).sum())  # the target is one; a tie counts against it
    return {name: count / max(len(unseen[0]), 1) for name, count in hits.items()}


def _interactions(
    rng: np.random.Generator,
    user_groups: NDArray[np.int64],
    item_groups: NDArray[np.int64],
    nature: NDArray[Any],
    least: int,
) -> Pairs:
    """Draw (users, items), each pair once, sorted by user."""
    n_users, n_items = len(user_groups), len(item_groups)
    degrees = np.minimum(least + (4 * rng.pareto(_DEGREE_EXPONENT, n_users)).astype(np.int64), max(n_items // 8, 2))
    degrees[rng.permutation(n_users)[: n_users // 100]] = 0
    users = np.repeat(np.arange(n_users), degrees)
    groups = np.where(rng.random(len(users)) < 0.75, user_groups[users], rng.integers(0, GROUPS, len(users)))

    # Items by group; a uniform number in a group's stretch of the running popularity is an item drawn from it.
    by_group = np.argsort(item_groups, kind="stable")
    popularity = _falling(n_items, _POPULARITY_EXPONENT)[rng.permutation(n_items)]
    running = np.concatenate([[0.0], np.cumsum(popularity[by_group])])
    edges = np.searchsorted(item_groups[by_group], np.arange(GROUPS + 1))
    low, high = running[edges[groups]], running[edges[groups + 1]]

    # Of four items drawn for each interaction, the one closest to the user's own taste is taken.
    drawn = np.searchsorted(running, low[:, None] + rng.random((len(users), 4)) * (high - low)[:, None], side="right")
    candidates = by_group[np.clip(drawn - 1, edges[groups][:, None], edges[groups + 1][:, None] - 1)]
    taste = rng.standard_normal((n_users, _TASTE_WIDTH))
    affinity = np.stack([np.einsum("nd,nd->n", nature[column], taste[users]) for column in candidates.T], axis=1)
    chosen = candidates[np.arange(len(users)), affinity.argmax(axis=1)]
    once = np.unique(users * n_items + chosen)
    return once // n_items, once % n_items


def _features(rng: np.random.Generator, nature: NDArray[Any], width: int) -> NDArray[np.float32]:
    """Turn the items' nature into one modality: rotated, noise of its own, and a mean that all items share."""
    rotation = np.linalg.qr(rng.standard_normal((width, _TASTE_WIDTH)))[0].T
    noise = 0.15 * rng.standard_normal((len(nature), width))
    shift = 0.2 * rng.standard_normal(width)
    features: NDArray[np.float32] = (nature @ rotation + noise + shift).astype(np.float32)
    return features


def _text_table(rows: NDArray[np.int64], values: NDArray[np.float32]) -> pa.Table:
    width = values.shape[1]
    offsets = np.arange(len(rows) + 1, dtype=np.int32) * width
    embedding = pa.ListArray.from_arrays(pa.array(offsets), pa.array(values[rows].ravel()))
    return pa.table({"item_id": rows, "embedding": embedding})


def _job(users: int) -> str:
    return f"""\
# gpu-init run job.toml; paths are relative to this file.
interactions = "interactions.parquet"
user_column = "user_id"
item_column = "item_id"
users = {users}  # rows of the result; ids without an interaction are cold users
out = "vectors"

lambda = 0.9
clusters = {GROUPS}
seed = 0

[features]
image = "image.npy"  # row i is item i; items without an image are rows of NaN
text = "text.parquet"  # item_id and embedding; items without a text have no row
"""


def _newest_of_active(users: NDArray[np.int64], times: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Mark the newest interaction of each user who has enough of them."""
    order = np.lexsort((times, users))
    by_user = users[order]
    last = np.append(by_user[1:] != by_user[:-1], True)
    active = np.bincount(users)[by_user] >= _MIN_DEGREE_TO_HOLD_OUT
    marked = np.zeros(len(users), bool)
    marked[order] = last & active
    return marked


def _centred(
    users: NDArray[Any], items: NDArray[Any]
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]:
    """Both sides less the items' mean, and which items have the modality; the others become zero."""
    present = ~np.isnan(items[:, 0])
    mean = items[present].mean(axis=0, dtype=np.float64).astype(np.float32)
    centred = np.where(present[:, None], items.astype(np.float32) - mean, np.float32(0))
    return users.astype(np.float32) - mean, centred, present


def _means(
    items: NDArray[np.float32], present: NDArray[np.bool_], row: NDArray[np.int64], own: NDArray[np.int64], rows: int
) -> NDArray[np.float32]:
    """Mean of each user's items that have the modality, zero where there is none; ``row`` is sorted."""
    gathered = np.concatenate([np.zeros((1, items.shape[1])), np.cumsum(items[own], axis=0, dtype=np.float64)])
    edges = np.searchsorted(row, np.arange(rows + 1))
    counts = np.bincount(row, weights=present[own], minlength=rows)
    means: NDArray[np.float32] = (np.diff(gathered[edges], axis=0) / np.maximum(counts, 1)[:, None]).astype(np.float32)
    return means


def _ranges(starts: NDArray[np.int64], stops: NDArray[np.int64]) -> Pairs:
    """Positions ``starts[i]`` to ``stops[i]`` of all i, one after another, and the i of each."""
    lengths = stops - starts
    row = np.repeat(np.arange(len(starts)), lengths)
    return row, np.arange(len(row)) + np.repeat(starts - np.cumsum(lengths) + lengths, lengths)


def _falling(n: int, exponent: float) -> NDArray[np.float64]:
    """Probabilities that fall as a power of the rank."""
    weights = np.arange(1.0, n + 1) ** -exponent
    shares: NDArray[np.float64] = weights / weights.sum()
    return shares


def _unit_rows(x: NDArray[np.float64]) -> NDArray[np.float64]:
    unit: NDArray[np.float64] = x / np.linalg.norm(x, axis=1, keepdims=True)
    return unit
