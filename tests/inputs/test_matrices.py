"""Matrix files, R made in batches, and ids as codes."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

import gpu_init.kernels.build
from gpu_init.backend import cpu as backend_cpu
from gpu_init.errors import InputError
from gpu_init.inputs import axes
from gpu_init.inputs import interactions as inputs_interactions
from gpu_init.inputs.axes import ItemAxis
from gpu_init.inputs.tables import Columns
from gpu_init.kernels.build import Rows
from gpu_init.kernels.ids import Numbers, Texts
from gpu_init.method.matrix import build, from_matrix
from gpu_init.where import parse
from tests.conftest import with_threads
from tests.support.interactions import (
    CPU,
    assert_same,
    assert_same_tables,
    frame,
    holding,
    matrix,
    streaming,
    take,
    write,
)

# Matrices.


def test_npz(tmp_path):
    R = scipy.sparse.random_array((5, 4), density=0.5, rng=np.random.default_rng(0), format="csc")
    scipy.sparse.save_npz(tmp_path / "r.npz", R)
    np.testing.assert_allclose(matrix(take(tmp_path / "r.npz")), R.toarray(), rtol=1e-6)
    assert take(tmp_path / "r.npz", users=7).interactions.users == 7
    with pytest.raises(InputError, match="--users 3"):
        take(tmp_path / "r.npz", users=3)
    with pytest.raises(InputError, match="--where"):
        take(tmp_path / "r.npz", where="x == 1")


def test_npz_with_items_beyond_the_features(tmp_path):
    scipy.sparse.save_npz(tmp_path / "r.npz", scipy.sparse.csr_array(np.eye(6)))
    with pytest.raises(InputError, match="item 4"):
        take(tmp_path / "r.npz")


def test_npz_that_holds_a_pickle(tmp_path):
    np.savez(tmp_path / "r.npz", data=np.array([object()], dtype=object), format="csr")
    with pytest.raises(InputError, match="scipy"):
        take(tmp_path / "r.npz")


def test_npz_with_indices_outside_its_shape(tmp_path):
    np.savez(
        tmp_path / "r.npz",
        indices=np.array([9], np.int32),
        indptr=np.array([0, 1], np.int32),
        data=np.ones(1),
        shape=np.array([1, 3]),
        format=b"csr",
    )
    with pytest.raises(InputError, match="r.npz"):
        take(tmp_path / "r.npz")


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 6), st.floats(0, 10, width=32)), max_size=60),
    st.booleans(),
    st.randoms(),
)
@settings(max_examples=60, deadline=None)
def test_build_is_scipy(entries, weighted, random):
    random.shuffle(entries)
    users, items, weights = (np.array([entry[k] for entry in entries]) for k in range(3))
    users, items, weights = users.astype(np.int64), items.astype(np.int64), weights.astype(np.float64)
    built = build(CPU, users, items, weights if weighted else None, (10, 7))
    expected = scipy.sparse.coo_array(
        (weights if weighted else np.ones(len(users)), (users, items)), shape=(10, 7)
    ).toarray()
    csr = built.csr
    data = np.ones(len(csr.indices), np.float32) if csr.weights is None else csr.weights
    found = scipy.sparse.csr_array((data, csr.indices, csr.indptr), shape=(10, 7))
    np.testing.assert_allclose(found.toarray(), expected, rtol=1e-6)
    assert csr.indptr.dtype == np.int64
    assert csr.indices.dtype == np.int32
    assert (data > 0).all()
    assert found.has_canonical_format
    np.testing.assert_allclose(built.item_sums(CPU), expected.sum(axis=0), rtol=1e-6)
    np.testing.assert_allclose(built.item_sums(CPU, np.arange(10.0)), np.arange(10) @ expected, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(built.user_degrees(CPU, np.ones(7)), expected.sum(axis=1), rtol=1e-6)


# R made in batches, in place, against `build`.


def built_in_batches(users, items, weights, count, cuts):
    starts = np.zeros(count + 1, np.int64)
    bounds = [0, *sorted(cuts), len(users)]
    parts = [slice(first, last) for first, last in itertools.pairwise(bounds)]
    for part in parts:
        np.add.at(starts[1:], users[part], 1)
    rows = Rows(np.cumsum(starts), weights is not None)
    for part in parts:
        rows.add(users[part], items[part], None if weights is None else weights[part].astype(np.float32))
    return rows.finish()


@given(
    st.integers(0, 2**32),
    st.integers(1, 12),
    st.sampled_from([1, 5, 70, 300_000]),
    st.integers(0, 400),
    st.sampled_from(["none", "ones", "some", "zeros"]),
    st.sampled_from(["any order", "by user", "by user and item"]),
    st.lists(st.integers(0, 400), max_size=4),
)
@settings(max_examples=150, deadline=None)
def test_batches_give_what_build_gives(seed, count, item_count, rows, weighting, order, cuts):
    rng = np.random.default_rng(seed)
    users = rng.integers(0, count, rows) if seed % 2 else (count * rng.random(rows) ** 4).astype(np.int64)
    items = rng.integers(0, item_count, rows)
    weights = {
        "none": None,
        "ones": np.ones(rows),
        "some": rng.integers(0, 1000, rows) / 7,
        "zeros": rng.integers(0, 2, rows).astype(float),
    }[weighting]
    if order != "any order":
        by = np.lexsort((items, users)) if order == "by user and item" else np.argsort(users, kind="stable")
        users, items, weights = users[by], items[by], None if weights is None else weights[by]
    expected = build(CPU, users, items, weights, (count, item_count)).csr
    assert_same(built_in_batches(users, items, weights, count, [min(cut, rows) for cut in cuts]), expected)


def test_long_rows_of_duplicates_and_any_number_of_threads(rng):
    users = np.concatenate([np.zeros(20_000, np.int64), rng.integers(0, 300, 30_000)])
    items = rng.integers(0, 50, 50_000) * 40_000_000
    weights = rng.uniform(0, 3, 50_000)
    expected = build(CPU, users, items, weights, (301, 2_000_000_000)).csr
    for count in (1, 3):
        with with_threads(count):
            assert_same(built_in_batches(users, items, weights, 301, [7, 40_000]), expected)


def test_interactions_are_held_and_put_into_R_piece_by_piece(rng, monkeypatch):
    monkeypatch.setattr(gpu_init.kernels.build, "_HELD", 64)
    users, items, weights = rng.integers(0, 2000, 5000), rng.integers(0, 50, 5000), rng.uniform(0, 3, 5000)
    for one in (weights, None):
        expected = build(CPU, users, items, one, (2000, 50)).csr
        assert_same(built_in_batches(users, items, one, 2000, [7, 64, 128, 500]), expected)


def test_rows_beyond_what_was_counted_are_left_out():
    rows = Rows(np.array([0, 1, 2]), weighted=False)
    rows.add(np.array([1, 1, 1]), np.array([5, 6, 7]), None)  # a file that changed: no write outside
    rows.add(np.array([10**9]), np.array([5]), None)
    assert rows.finish().indptr[-1] <= 2


NUMBERS = st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 9), min_size=1, max_size=40)
TEXTS = st.lists(st.text("ab\0é", max_size=20) | st.text(max_size=9), min_size=1, max_size=40)


@given(st.lists(st.tuples(NUMBERS | TEXTS, st.booleans()), min_size=1, max_size=6), st.integers(0, 10))
@settings(max_examples=200, deadline=None)
def test_ids_of_any_kind_find_their_rows(batches, dense):
    columns = [pd.Series(batch, dtype="int64" if isinstance(batch[0], int) else "str") for batch, _ in batches]
    axis = axes.Codes(dense)
    codes = [
        axis.encode(column) if coded else axis.count(column)
        for column, (_, coded) in zip(columns, batches, strict=True)
    ]
    axis.settle(lambda found: axes.user_axis(found, "here", None))
    mixed = len({isinstance(batch[0], int) for batch, _ in batches}) > 1
    whole = pd.concat([column.astype("str") if mixed else column for column in columns], ignore_index=True)
    distinct = sorted(set(whole))
    is_dense = not mixed and distinct == list(range(len(distinct)))
    assert axis.size == len(distinct)
    assert (axis.ids is None) == is_dense
    assert is_dense or list(axis.ids) == distinct
    expected = [[distinct.index(one) for one in (column.astype("str") if mixed else column)] for column in columns]
    counts = np.bincount(np.concatenate(expected), minlength=len(distinct))
    np.testing.assert_array_equal(np.diff(axis.starts()), counts)
    for column, given_codes, wanted in zip(columns, codes, expected, strict=True):
        np.testing.assert_array_equal(axis.rows(column), wanted)
        if given_codes is not None:
            np.testing.assert_array_equal(axis.rows_of_codes(given_codes), wanted)


@given(st.lists(st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 3), max_size=40), max_size=5))
@settings(max_examples=60, deadline=None)
def test_numbers_are_coded_in_order_of_appearance(batches):
    numbers = Numbers()
    codes = [numbers.encode(np.array(batch, np.int64)) for batch in batches]
    every = np.array([number for batch in batches for number in batch], np.int64)
    expected, found = pd.factorize(every)
    np.testing.assert_array_equal(np.concatenate([np.empty(0, np.int32), *codes]), expected)
    known, counts = numbers.known()
    np.testing.assert_array_equal(known, found)
    np.testing.assert_array_equal(counts, np.bincount(expected, minlength=len(found)))
    np.testing.assert_array_equal(numbers.find(every), expected)
    assert numbers.find(np.array([12_345]))[0] == -1 or 12_345 in every


def test_many_numbers_are_coded(rng):
    every = rng.integers(0, 2**40, 300_000)
    numbers = Numbers()
    expected, found = pd.factorize(np.concatenate([every, every[::-1]]))
    np.testing.assert_array_equal(np.concatenate([numbers.encode(every), numbers.encode(every[::-1])]), expected)
    np.testing.assert_array_equal(numbers.known()[0], found)


TEXTS = st.lists(st.lists(st.text("ab\0é", max_size=20) | st.text(max_size=9), max_size=40), max_size=5)


@given(TEXTS)
@settings(max_examples=100, deadline=None)
def test_texts_are_coded_in_order_of_appearance(batches):
    texts = Texts()
    codes = [texts.encode(*as_bytes(batch)) for batch in batches]
    every = [text for batch in batches for text in batch]
    found = list(dict.fromkeys(every))
    expected = [found.index(text) for text in every]
    np.testing.assert_array_equal(np.concatenate([np.empty(0, np.int32), *codes]), expected)
    starts, data, counts = texts.known()
    assert [bytes(data[a:b]).decode() for a, b in itertools.pairwise(starts)] == found
    np.testing.assert_array_equal(counts, np.bincount(expected, minlength=len(found)))
    np.testing.assert_array_equal(texts.find(*as_bytes(every)), expected)
    assert texts.find(*as_bytes(["another text"]))[0] == -1


def test_many_texts_are_coded(rng):
    every = [f"user {number}" for number in rng.integers(0, 10**6, 100_000)]
    texts = Texts()
    expected, found = pd.factorize(pd.Series(every + every[::-1]))
    np.testing.assert_array_equal(
        np.concatenate([texts.encode(*as_bytes(every)), texts.encode(*as_bytes(every[::-1]))]), expected
    )
    assert len(texts.known()[2]) == len(found)


def as_bytes(texts):
    parts = [text.encode() for text in texts]
    starts = np.cumsum([0, *map(len, parts)])
    return starts, np.frombuffer(b"".join(parts), np.uint8)


USER_IDS = {
    "gapless": lambda rng, n: np.concatenate([np.arange(6), rng.integers(0, 6, n - 6)]),
    "gaps": lambda rng, n: rng.integers(0, n // 2, n) * 2,
    "large": lambda rng, n: rng.integers(-5, 5, n) * 10**15,
    "late large": lambda rng, n: np.concatenate([rng.integers(0, 9, n - 1), [10**12]]),
    "text": lambda rng, n: np.array(["b", "a", "7", "07", "é"])[rng.integers(0, 5, n)],
}


@pytest.mark.parametrize("kind", USER_IDS)
@pytest.mark.parametrize(
    ("formats", "held"),
    [
        pytest.param(formats, held, marks=[] if held == often else pytest.mark.slow)
        for formats, often in {
            ("parquet",): 20,
            ("csv",): 1000,
            ("parquet", "csv"): 0,
            ("csv", "parquet", "tsv"): 20,
        }.items()
        for held in (0, 20, 1000)
    ],
)
@pytest.mark.parametrize("join", [False, True])
def test_streaming_gives_what_holding_gives(tmp_path, rng, monkeypatch, kind, formats, join, held):
    monkeypatch.setattr(backend_cpu, "PARQUET_BATCH_ROWS", 13)
    monkeypatch.setattr(backend_cpu, "TEXT_BLOCK_BYTES", 200)
    monkeypatch.setattr(inputs_interactions, "_HELD_ROWS", held)
    n = 60
    for number, name in enumerate(formats):
        part = frame(
            USER_IDS[kind](rng, n), rng.integers(0, 5, n), w=rng.integers(0, 9, n) / 7, x=rng.integers(0, 4, n)
        )
        if kind == "late large" and number == 1:
            part = part.astype({"user_id": "str"}).replace({"user_id": {"1": "one"}})
        write(tmp_path / "in" / f"{number}.{name}", part)
    axis = ItemAxis(None, [pd.Series([9, 3, 4])]) if join else ItemAxis(5)
    for columns in (Columns(), Columns(weight="w", where=parse("x > 1"))):
        told = []
        found = streaming(str(tmp_path / "in"), columns, axis, None, told.append)
        assert_same_tables(found, holding(str(tmp_path / "in"), columns, axis, None))
        assert sum(told) == found.read == n * len(formats)


@pytest.mark.parametrize("name", ["a.parquet", "a.csv"])
@pytest.mark.parametrize("listed", [[40, 10, 30, 20], ["x", "40", "10", "30", "20"]])
def test_streaming_onto_given_users_gives_what_holding_gives(tmp_path, name, listed):
    path = write(tmp_path / name, frame([30, 10, 10, 30, 40], [0, 1, 1, 0, 3]))
    for users in (pd.Series(listed), 50):
        take(path, users=users)
    with pytest.raises(InputError, match="user 30 is not"):
        take(path, users=pd.Series([40]))


def test_a_file_that_changes_while_it_is_read(tmp_path):
    path = str(tmp_path / "a.parquet")

    def change(_):
        write(tmp_path / "a.parquet", frame([0, 99, 7], [0, 1, 2]))

    for reads in (holding, streaming):
        write(tmp_path / "a.parquet", frame(np.arange(50) % 5, np.arange(50) % 4))
        with pytest.raises(InputError, match=r"a\.parquet: changed while it was read"):
            reads(path, Columns(), ItemAxis(4), None, change)


def test_matrices_give_what_their_entries_give(rng):
    R = scipy.sparse.coo_array((rng.uniform(0, 2, 200), (rng.integers(0, 9, 200), rng.integers(0, 7, 200))), (9, 7))
    expected = build(CPU, R.row.astype(np.int64), R.col.astype(np.int64), R.data, R.shape).csr
    assert_same(from_matrix(CPU, R, "R").csr, expected)
    canonical = R.tocsr()
    entries = canonical.tocoo()
    expected = build(CPU, entries.row.astype(np.int64), entries.col.astype(np.int64), entries.data, R.shape).csr
    assert_same(from_matrix(CPU, canonical, "R").csr, expected)


MEASURE = """
import resource, sys
from gpu_init.backend.cpu import CpuBackend
from gpu_init.inputs.axes import ItemAxis
from gpu_init.inputs.interactions import read
from gpu_init.inputs.tables import Columns
read(CpuBackend(""), sys.argv[1], Columns(), ItemAxis(1000), None)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
csr = read(CpuBackend(""), sys.argv[2], Columns(), ItemAxis(1000), None).interactions.csr
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
print(csr.indptr.nbytes + csr.indices.nbytes + csr.weights.nbytes)
"""


def test_reading_takes_little_more_memory_than_R(tmp_path, rng):
    count = 4_000_000
    small = write(tmp_path / "small.parquet", frame(np.arange(10**5) % 1000, np.arange(10**5) % 7))
    large = write(tmp_path / "large.parquet", frame(rng.integers(0, 10_000, count), rng.integers(0, 1000, count)))
    environment = {**os.environ, "GPU_INIT_KERNELS": "numba"}
    command = [sys.executable, "-c", MEASURE, small, large]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    grown, size = map(int, done.stdout.split())
    assert grown < size + (48 << 20)  # the table of two int64 columns would take 64 MB more
