"""Recall and NDCG of a full ranking: of all users, by degree, and of cold items."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from gpu_init import demo

KS = (10, 20)


class Split(NamedTuple):
    """Matrices of ones (U, I): interactions for training, for validation and for test."""

    train: csr_matrix
    valid: csr_matrix
    test: csr_matrix


def metrics(users: NDArray[np.int64], top: NDArray[np.int64], split: Split, held_out: csr_matrix) -> dict[str, float]:
    """Give Recall and NDCG, the mean over users with held-out items: of all users, by training degree, of cold items.

    ``top`` (n, 20) are the best items of ``users`` (n,), best first, without training items. For ``_cold_items``, only
    held-out items without a training interaction count as hits in the ranking of all items. Means over nobody are nan.
    """
    degree = np.diff(split.train.indptr)[users]
    cold = np.diff(split.train.tocsc().indptr) == 0
    wanted = held_out[users]
    hits = np.concatenate([_hits(wanted, top, first) for first in range(0, len(users), 1024)])
    cold_hits, cold_wanted = hits & cold[top], np.diff(wanted[:, cold].indptr)
    counts = np.diff(wanted.indptr)
    return {
        **means(hits, counts, ""),
        **means(hits[degree <= 2], counts[degree <= 2], "_degree_to_2"),
        **means(hits[(degree > 2) & (degree <= 5)], counts[(degree > 2) & (degree <= 5)], "_degree_3_to_5"),
        **means(hits[degree > 5], counts[degree > 5], "_degree_above_5"),
        **means(cold_hits, cold_wanted, "_cold_items"),
    }


def _hits(wanted: csr_matrix, top: NDArray[np.int64], first: int) -> NDArray[np.bool_]:
    part = slice(first, first + 1024)
    return np.take_along_axis(wanted[part].toarray() > 0, top[part], axis=1)


def means(hits: NDArray[np.bool_], counts: NDArray[Any], suffix: str = "") -> dict[str, float]:
    """Give Recall and NDCG, the mean over users with held-out items; nan where there are no such users.

    ``hits`` (n, 20) tells which of a user's best items, best first, are held out; ``counts`` (n,) is the number of the
    user's held-out items. NDCG is the sum of 1 / log2(rank + 1) over the hits, divided by its largest possible value
    for that number of held-out items.
    """
    hits, counts = hits[counts > 0], counts[counts > 0]
    discounts = 1 / np.log2(np.arange(2, max(KS) + 2))
    found: dict[str, float] = {}
    for k in KS:
        ideal = np.cumsum(discounts)[np.minimum(counts, k) - 1]
        found[f"recall_{k}{suffix}"] = float((hits[:, :k].sum(axis=1) / counts).mean()) if len(counts) else np.nan
        found[f"ndcg_{k}{suffix}"] = float((hits[:, :k] @ discounts[:k] / ideal).mean()) if len(counts) else np.nan
    return found


def ranked(
    score: Callable[[NDArray[np.int64]], NDArray[np.float32]], train: csr_matrix, held_out: csr_matrix
) -> tuple[NDArray[np.bool_], NDArray[Any]]:
    """Rank all items but the training items for each user with held-out items; give `means`' ``hits`` and ``counts``.

    ``score`` takes users (n,) and gives an array of their scores (n, I), which is overwritten.
    """
    active = np.flatnonzero(np.diff(held_out.indptr))
    hits = []
    for first in range(0, len(active), 1024):
        users = active[first : first + 1024]
        scores = score(users)
        scores[train[users].nonzero()] = -np.inf
        hits.append(np.take_along_axis(held_out[users].toarray(), _top(scores), axis=1) > 0)
    return np.concatenate(hits), np.diff(held_out.indptr)[active]


def _top(scores: NDArray[np.float32]) -> NDArray[np.int64]:
    """Give the columns of the highest scores of each row, best first."""
    unordered = np.argpartition(-scores, max(KS), axis=1)[:, : max(KS)]
    order = np.argsort(-np.take_along_axis(scores, unordered, axis=1), axis=1)
    return np.take_along_axis(unordered, order, axis=1)


def ones(rows: pd.DataFrame, shape: tuple[int, int]) -> csr_matrix:
    """Give rows of a table with columns ``userID`` and ``itemID`` as ones (U, I); duplicates are summed."""
    return csr_matrix((np.ones(len(rows), np.float32), (rows["userID"], rows["itemID"])), shape=shape)


def demo_split(folder: str, users: int = 8000, items: int = 2000) -> tuple[Split, dict[str, NDArray[np.float32]]]:
    """Make the demo's data; held-out rows of even users are for validation, those of odd users for test."""
    data = demo.make(folder, users=users, items=items, seed=0)
    text, table = np.full((items, demo.WIDTHS["text"]), np.nan, np.float32), pq.read_table(data.text)
    text[table["item_id"].to_numpy()] = np.vstack(table["embedding"].to_numpy())

    def matrix(rows: NDArray[np.int64], columns: NDArray[np.int64]) -> csr_matrix:
        return csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), shape=(users, items))

    who, what = data.unseen
    even = who % 2 == 0
    split = Split(matrix(*data.seen), matrix(who[even], what[even]), matrix(who[~even], what[~even]))
    return split, {"image": np.load(data.image).astype(np.float32), "text": text}
