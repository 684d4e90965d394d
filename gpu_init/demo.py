"""Make the data set of ``gpu-init demo`` and rank the interactions that it holds out.

The data are random, but have the structure of real ones. There are twelve groups of taste. The features of an item
are the position of its group plus noise of its own; each modality applies its own rotation. A user mostly takes items
of one group, prefers popular items, and among those prefers the items closest to a taste of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy.sparse import csr_array

from gpu_init.errors import InputError

GROUPS = 12
WIDTHS = {"image": 128, "text": 96}

_TASTE_WIDTH = 16  # Tastes and items lie in a space of this many dimensions.
_DEGREE_EXPONENT = 1.6  # The number of a user's interactions has a Pareto tail with this exponent.
_POPULARITY_EXPONENT = 0.8  # The popularity of an item falls with its rank by Zipf's law with this exponent.
_MIN_DEGREE_TO_HOLD_OUT = 5  # A user with fewer interactions has none held out.
_FIRST_SECOND = 1_700_000_000  # The timestamps (Unix time, seconds) start here and cover one year.
_YEAR = 365 * 86_400

Pairs = tuple[NDArray[np.int64], NDArray[np.int64]]


@dataclass(frozen=True)
class DemoData:
    """The paths of the demo's files, and the arrays they were made from.

    Attributes
    ----------
    job, interactions, held_out, image, text : Path
        Paths of the job file, of the two tables and of the features.
    seen, unseen : tuple of int64 arrays
        (users, items) of the interactions in `interactions` and in `held_out`, sorted by user.
    user_groups : int64 array, shape (U,)
        The group of taste that each user mostly takes items of.
    item_groups : int64 array, shape (I,)
        The group of each item.
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
        The folder is created if it does not exist; files of the same names are replaced.
    users, items : int
        At least 100 users and 12 items. 1% of the users have no interaction, 3% of the items have no image (their
        rows are NaN) and 5% have no text (they have no row).
    seed : int
        Seed of all random numbers.
    least : int
        Smallest number of interactions that are drawn for a user who has any. Repeated ones are then counted once,
        and one may be held out.

    Raises
    ------
    InputError
        There are too few users or items, or the files cannot be written.
    """
    if users < 100 or items < GROUPS:
        raise InputError(f"a demo needs at least 100 users and {GROUPS} items, not {users} and {items}.")
    rng = np.random.default_rng(seed)
    item_groups = rng.permutation(items) % GROUPS
    user_groups = rng.choice(GROUPS, users, p=_falling(GROUPS, 0.5))
    positions = rng.standard_normal((GROUPS, _TASTE_WIDTH))
    positions /= np.linalg.norm(positions, axis=1, keepdims=True)
    latent = positions[item_groups] + 0.25 * rng.standard_normal((items, _TASTE_WIDTH))
    table = _interactions(rng, user_groups, item_groups, latent, least)
    held_out = _newest_of_active(table)
    seen, unseen = table[~held_out], table[held_out]

    image, text = (_features(rng, latent, width) for width in WIDTHS.values())
    image[rng.random(items) < 0.03] = np.nan
    text_rows = rng.permutation(np.flatnonzero(rng.random(items) >= 0.05))

    root = Path(folder)
    data = DemoData(
        job=root / "job.toml",
        interactions=root / "interactions.parquet",
        held_out=root / "heldout.parquet",
        image=root / "image.npy",
        text=root / "text.parquet",
        seen=(seen["user_id"].to_numpy(), seen["item_id"].to_numpy()),
        unseen=(unseen["user_id"].to_numpy(), unseen["item_id"].to_numpy()),
        user_groups=user_groups,
        item_groups=item_groups,
    )
    try:
        root.mkdir(parents=True, exist_ok=True)
        for path, part in ((data.interactions, seen), (data.held_out, unseen)):
            pq.write_table(pa.table({name: part[name].to_numpy() for name in part}), path)
        np.save(data.image, image.astype(np.float16))
        pq.write_table(pa.table({"item_id": text_rows, "embedding": list(text[text_rows])}), data.text)
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
    """Compute Recall@k of the held-out interactions, ranked without training by ``X F^T`` summed over the modalities.

    The mean of the items is first subtracted from users and items, because it says nothing about a user. Items that a
    user has seen are left out of that user's ranking.

    Parameters
    ----------
    vectors : mapping of str to (array (U, d), array (I, d))
        For each modality, the initial user vectors and the items' features in the same space and scale. An item
        without the modality is a row of NaN.
    seen, unseen : tuple of int64 arrays
        (users, items) of the interactions that the vectors were made from, and of the held-out ones.
    k : int
        Length of the ranking.
    seed : int
        Seed of the random vectors.

    Returns
    -------
    dict of str to float
        Share of ``unseen`` among the first ``k`` of the rankings by the given vectors ("gpu-init"), by the plain mean
        of a user's items ("local means alone") and by random vectors ("random").
    """
    centred = [_centred(users, items) for users, items in vectors.values()]
    rng = np.random.default_rng(seed)
    noise = [rng.standard_normal(users.shape, dtype=np.float32) for users, _, _ in centred]
    shape = len(centred[0][0]), len(centred[0][1])
    matrix = csr_array((np.ones(len(seen[0])), seen), shape=shape)
    hits = {"gpu-init": 0, "local means alone": 0, "random": 0}
    for first in range(0, len(unseen[0]), 1024):
        users, targets = unseen[0][first : first + 1024], unseen[1][first : first + 1024]
        own = matrix[users]
        for name, blocks in {
            "gpu-init": [x[users] for x, _, _ in centred],
            "local means alone": [own @ f / np.maximum(own @ present, 1)[:, None] for _, f, present in centred],
            "random": [x[users] for x in noise],
        }.items():
            scores = np.add.reduce([x @ f.T for x, (_, f, _) in zip(blocks, centred, strict=True)])
            target = scores[np.arange(len(users)), targets][:, None]
            scores[own.nonzero()] = -np.inf
            hits[name] += int(((scores >= target).sum(axis=1) <= k).sum())  # A tie counts against the target.
    return {name: count / max(len(unseen[0]), 1) for name, count in hits.items()}


def _interactions(
    rng: np.random.Generator,
    user_groups: NDArray[np.int64],
    item_groups: NDArray[np.int64],
    latent: NDArray[Any],
    least: int,
) -> pd.DataFrame:
    """Draw the table of interactions: each pair of user and item once, sorted by user and item."""
    n_users, n_items = len(user_groups), len(item_groups)
    degrees = np.minimum(least + (4 * rng.pareto(_DEGREE_EXPONENT, n_users)).astype(np.int64), max(n_items // 8, 2))
    degrees[rng.permutation(n_users)[: n_users // 100]] = 0
    users = np.repeat(np.arange(n_users), degrees)
    groups = np.where(rng.random(len(users)) < 0.75, user_groups[users], rng.integers(0, GROUPS, len(users)))

    # Items are sorted by group. A uniform number within a group's range of the cumulative popularity selects an item of
    # the group with a probability in proportion to its popularity.
    by_group = np.argsort(item_groups, kind="stable")
    popularity = _falling(n_items, _POPULARITY_EXPONENT)[rng.permutation(n_items)]
    cumulative = np.concatenate([[0.0], np.cumsum(popularity[by_group])])
    edges = np.searchsorted(item_groups[by_group], np.arange(GROUPS + 1))
    low, high = cumulative[edges[groups]], cumulative[edges[groups + 1]]

    # Four items are drawn for each interaction, and the user takes the one closest to their own taste.
    drawn = np.searchsorted(
        cumulative, low[:, None] + rng.random((len(users), 4)) * (high - low)[:, None], side="right"
    )
    candidates = by_group[np.clip(drawn - 1, edges[groups][:, None], edges[groups + 1][:, None] - 1)]
    taste = rng.standard_normal((n_users, _TASTE_WIDTH))
    affinity = np.stack([np.einsum("nd,nd->n", latent[column], taste[users]) for column in candidates.T], axis=1)
    chosen = candidates[np.arange(len(users)), affinity.argmax(axis=1)]
    once = np.unique(users * n_items + chosen)
    users, chosen = once // n_items, once % n_items
    times = _FIRST_SECOND + rng.integers(0, _YEAR, len(users))
    match = user_groups[users] == item_groups[chosen]
    ratings = np.clip(rng.binomial(4, 0.6, len(match)) + match + 1, 1, 5).astype(np.int8)
    return pd.DataFrame({"user_id": users, "item_id": chosen, "rating": ratings, "timestamp": times})


def _newest_of_active(table: pd.DataFrame) -> NDArray[np.bool_]:
    """Mark the newest interaction of each user who has enough of them."""
    newest = table.sort_values("timestamp", kind="stable").groupby("user_id").tail(1).index
    degrees = table.groupby("user_id")["user_id"].transform("size").to_numpy()
    marked: NDArray[np.bool_] = table.index.isin(newest) & (degrees >= _MIN_DEGREE_TO_HOLD_OUT)
    return marked


def _features(rng: np.random.Generator, latent: NDArray[Any], width: int) -> NDArray[np.float32]:
    """Make one modality from the latent vectors: rotate them, then add noise and a mean that all items share."""
    rotation = np.linalg.qr(rng.standard_normal((width, _TASTE_WIDTH)))[0].T
    noise = 0.15 * rng.standard_normal((len(latent), width))
    shift = 0.2 * rng.standard_normal(width)
    features: NDArray[np.float32] = (latent @ rotation + noise + shift).astype(np.float32)
    return features


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


def _centred(
    users: NDArray[Any], items: NDArray[Any]
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]:
    """Subtract the items' mean from both, and tell which items have the modality; the others become zero."""
    present = ~np.isnan(items[:, 0])
    mean = items[present].mean(axis=0, dtype=np.float64).astype(np.float32)
    centred = np.where(present[:, None], items.astype(np.float32) - mean, np.float32(0))
    return users.astype(np.float32) - mean, centred, present


def _falling(n: int, exponent: float) -> NDArray[np.float64]:
    """Probabilities that fall as a power of the rank, from the first of n."""
    weights = np.arange(1.0, n + 1) ** -exponent
    shares: NDArray[np.float64] = weights / weights.sum()
    return shares
