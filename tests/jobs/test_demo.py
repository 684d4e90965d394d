import hashlib
import tomllib

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_init import demo
from gpu_init.errors import InputError

USERS, ITEMS = 3_000, 600


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return demo.make(tmp_path_factory.mktemp("demo"), users=USERS, items=ITEMS, seed=3)


@pytest.fixture(scope="module")
def features(data):
    text = np.full((ITEMS, 96), np.nan, np.float32)
    table = pq.read_table(data.text)
    text[table["item_id"].to_numpy()] = np.vstack(table["embedding"].to_numpy())
    return {"image": np.load(data.image).astype(np.float32), "text": text}


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path):
    for name, seed in [("a", 5), ("b", 5), ("c", 6)]:
        demo.make(tmp_path / name, users=500, items=100, seed=seed)
    first, again, other = (hashes(tmp_path / name) for name in "abc")
    assert first == again
    assert sorted(first) == ["heldout.parquet", "image.npy", "interactions.parquet", "job.toml", "text.parquet"]
    assert all(first[name] != other[name] for name in first if name != "job.toml")


def test_files_hold_what_is_returned(data):
    table = pq.read_table(data.interactions)
    assert table.column_names == ["user_id", "item_id", "rating", "timestamp"]
    assert np.array_equal(table["user_id"], data.seen[0])
    assert np.array_equal(table["item_id"], data.seen[1])
    assert set(np.unique(table["rating"])) == {1, 2, 3, 4, 5}
    held_out = pq.read_table(data.held_out)
    assert np.array_equal(held_out["item_id"], data.unseen[1])
    assert np.all(np.diff(data.seen[0]) >= 0)


def test_held_out_is_the_newest_of_each_active_user_and_nowhere_else(data):
    pairs = data.seen[0] * ITEMS + data.seen[1]
    assert not np.isin(data.unseen[0] * ITEMS + data.unseen[1], pairs).any()
    assert len(np.unique(pairs)) == len(pairs)
    degrees = np.bincount(data.seen[0], minlength=USERS)
    held = np.bincount(data.unseen[0], minlength=USERS)
    assert np.array_equal(held, (degrees >= 4) & (degrees + held >= 5))
    seen, held_out = (pq.read_table(path).to_pandas() for path in (data.interactions, data.held_out))
    newest = seen.groupby("user_id")["timestamp"].max()
    assert (held_out["timestamp"].to_numpy() >= newest[held_out["user_id"]].to_numpy()).all()


def test_cold_users_and_missing_items(data, features):
    cold = USERS - len(np.unique(data.seen[0]))
    assert cold == USERS // 100
    assert features["image"].shape == (ITEMS, 128)
    assert np.load(data.image).dtype == np.float16
    for values in features.values():
        missing = np.isnan(values)
        assert np.array_equal(missing.any(axis=1), missing.all(axis=1))
        assert 0 < missing[:, 0].sum() < ITEMS // 8
    ids = pq.read_table(data.text)["item_id"].to_numpy()
    assert len(np.unique(ids)) == len(ids) < ITEMS
    assert not np.array_equal(ids, np.sort(ids))


def test_popularity_and_activity_have_heavy_tails(data):
    for column, n in zip(data.seen, (USERS, ITEMS), strict=True):
        counts = np.sort(np.bincount(column, minlength=n))[::-1]
        assert counts[: n // 10].sum() > 0.35 * counts.sum()
        assert counts[0] > 10 * np.median(counts)


def test_users_take_items_of_their_group_and_features_show_it(data, features):
    own = data.user_groups[data.seen[0]] == data.item_groups[data.seen[1]]
    assert 0.6 < own.mean() < 0.9
    for values in features.values():
        present = ~np.isnan(values[:, 0])
        x, groups = values[present], data.item_groups[present]
        centres = np.stack([x[groups == group].mean(axis=0) for group in range(demo.GROUPS)])
        nearest = ((x[:, None] - centres) ** 2).sum(axis=2).argmin(axis=1)
        assert (nearest == groups).mean() > 0.6
        assert np.linalg.norm(x.mean(axis=0)) > 0.5 * np.linalg.norm(x - x.mean(axis=0), axis=1).mean()


def test_job_names_the_files(data):
    job = tomllib.loads(data.job.read_text())
    folder = data.job.parent
    assert job["users"] == USERS
    for name in [job["interactions"], *job["features"].values()]:
        assert (folder / name).is_file()
    assert not (folder / job["out"]).exists()
    assert {job["user_column"], job["item_column"]} <= set(pq.read_schema(data.interactions).names)


def test_true_groups_rank_above_random(data, features):
    # Vectors made here, from the groups the data were made from: the check must find them far better than chance.
    vectors = {}
    for name, values in features.items():
        means = np.stack([np.nanmean(values[data.item_groups == group], axis=0) for group in range(demo.GROUPS)])
        vectors[name] = (means[data.user_groups], values)
    recall = demo.evaluate(vectors, data.seen, data.unseen)
    assert set(recall) == {"gpu-init", "local means alone", "random"}
    assert recall["gpu-init"] > 2 * recall["random"]
    assert recall["local means alone"] > 2 * recall["random"]
    assert recall["random"] < 0.08


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 8))
def test_recall_equals_the_plain_way(seed, k):
    rng = np.random.default_rng(seed)
    users, items = 7, 12
    pairs = np.sort(rng.permutation(users * items)[:30])
    held = np.isin(np.arange(30), rng.permutation(30)[:8])
    seen, unseen = ((part // items, part % items) for part in (pairs[~held], pairs[held]))
    vectors = {
        name: (rng.standard_normal((users, d)), rng.standard_normal((items, d))) for name, d in [("a", 3), ("b", 5)]
    }
    vectors["b"][1][rng.random(items) < 0.2] = np.nan
    local = {
        name: np.stack([_plain_mean(f, seen[1][seen[0] == user]) for user in range(users)])
        for name, (_, f) in vectors.items()
    }
    recall = demo.evaluate(vectors, seen, unseen, k=k)
    assert recall["gpu-init"] == plain({n: (x, f) for n, (x, f) in vectors.items()}, seen, unseen, k)
    assert recall["local means alone"] == plain({n: (local[n], f) for n, (_, f) in vectors.items()}, seen, unseen, k)


def _plain_mean(features, own):
    rows = features[own][~np.isnan(features[own]).any(axis=1)]
    return rows.mean(axis=0) if len(rows) else np.nanmean(features, axis=0)


def plain(vectors, seen, unseen, k):
    scores = sum((x - np.nanmean(f, axis=0)) @ np.nan_to_num(f - np.nanmean(f, axis=0)).T for x, f in vectors.values())
    scores[seen] = -np.inf
    found = [(scores[user] >= scores[user, item]).sum() <= k for user, item in zip(*unseen, strict=True)]
    return float(np.mean(found))


def test_too_small_or_unwritable_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="at least 100 users and 12 items"):
        demo.make(tmp_path / "x", users=10)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        demo.make(tmp_path / "file", users=100, items=20)
