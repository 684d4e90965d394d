"""Interactions from every format: ids, columns and rows."""

from __future__ import annotations

import gzip

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_init.errors import InputError
from gpu_init.inputs.axes import ItemAxis
from gpu_init.inputs.tables import find_column, read_user_ids
from tests.support.interactions import CPU, frame, matrix, take, write

FORMATS = ["a.parquet", "a.pq", "a.csv", "a.tsv", "a.inter", "a.csv.gz"]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("as_text", [False, True])
def test_formats_agree(tmp_path, name, as_text):
    data = frame([2, 0, 1, 0, 2], [3, 1, 0, 1, 2], rating=[1.5, 2, 0.25, 3, 4])
    if as_text:
        data = data.astype({"user_id": "str", "item_id": "str"})
    table = take(write(tmp_path / name, data), weight="rating")
    np.testing.assert_array_equal(matrix(table), [[0, 5, 0, 0], [0.25, 0, 0, 0], [0, 0, 4, 1.5]][0:3])
    assert table.user_ids is None
    assert (table.read, table.kept) == (5, 5)


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(0, 9)), min_size=1, max_size=30),
    st.integers(0, 2**32),
)
@settings(max_examples=40, deadline=None)
def test_any_order_and_any_split_over_files_give_the_same_rows(tmp_path_factory, rows, seed):
    folder = tmp_path_factory.mktemp("split")
    rng = np.random.default_rng(seed)
    expected = np.zeros((6, 4))
    for user, item, weight in rows:
        expected[user, item] += weight / 10
    shuffled = rng.permutation(len(rows))
    cut = rng.integers(0, len(rows) + 1)
    for number, part in enumerate((shuffled[:cut], shuffled[cut:])):
        users, items, weights = ([rows[k][column] for k in part] for column in range(3))
        data = frame(users, items, w=np.array(weights, float) / 10).astype({"user_id": "int64", "item_id": "int64"})
        write(folder / f"{number}.{'parquet' if number else 'csv'}", data)
    table = take(folder, users=6, weight="w")
    np.testing.assert_allclose(matrix(table), expected, rtol=1e-6)
    if cut:
        again = take(folder, users=6, weight="w").interactions.csr
        np.testing.assert_array_equal(again.indices, table.interactions.csr.indices)


def test_duplicates_count_as_often_as_they_stand_there(tmp_path):
    write(tmp_path / "in" / "a.csv", frame([0, 0, 1], [1, 1, 0]))
    write(tmp_path / "in" / "b.parquet", frame([0], [1]))
    np.testing.assert_array_equal(matrix(take(tmp_path / "in")), [[0, 3, 0, 0], [1, 0, 0, 0]])


def test_weight_zero_is_no_interaction(tmp_path):
    table = take(write(tmp_path / "a.csv", frame([0, 1], [1, 1], w=[0, 2])), weight="w")
    np.testing.assert_array_equal(matrix(table), [[0, 0, 0, 0], [0, 2, 0, 0]])


def test_unit_weights_take_no_memory(tmp_path):
    assert take(write(tmp_path / "a.csv", frame([0, 1], [1, 1]))).interactions.csr.weights is None


# Ids.


@pytest.mark.parametrize("name", ["a.parquet", "a.csv"])
def test_gapless_integers_are_rows(tmp_path, name):
    table = take(write(tmp_path / name, frame([1, 0, 2], [0, 1, 2])))
    assert table.user_ids is None
    assert table.interactions.users == 3


@pytest.mark.parametrize("name", ["a.parquet", "a.csv"])
def test_other_integers_are_sorted_as_numbers(tmp_path, name):
    table = take(write(tmp_path / name, frame([100, 9, -5], [0, 1, 2])))
    assert table.user_ids.tolist() == [-5, 9, 100]
    np.testing.assert_array_equal(matrix(table).argmax(axis=1), [2, 1, 0])


@pytest.mark.parametrize("name", ["a.parquet", "a.csv"])
def test_text_is_sorted_as_text(tmp_path, name):
    table = take(write(tmp_path / name, frame(["b", "a", "Z", "é"], [0, 1, 2, 3])))
    assert table.user_ids.tolist() == ["Z", "a", "b", "é"]


@pytest.mark.parametrize("name", ["a.parquet", "a.csv"])
def test_leading_zeros_are_text(tmp_path, name):
    table = take(write(tmp_path / name, frame(["007", "7", "07"], [0, 1, 2])))
    assert table.user_ids.tolist() == ["007", "07", "7"]


def test_numbers_in_one_file_and_text_in_another_are_text(tmp_path):
    write(tmp_path / "in" / "a.csv", frame([10, 9], [0, 1]))
    write(tmp_path / "in" / "b.csv", frame(["x"], [2]))
    assert take(tmp_path / "in").user_ids.tolist() == ["10", "9", "x"]


def test_users_n_leaves_gaps_cold(tmp_path):
    table = take(write(tmp_path / "a.csv", frame([0, 4], [0, 1])), users=6)
    assert table.user_ids is None
    np.testing.assert_array_equal(matrix(table).sum(axis=1), [1, 0, 0, 0, 1, 0])


@pytest.mark.parametrize("name", ["a.parquet", "a.csv"])
@pytest.mark.parametrize("bad", [6, -1])
def test_users_n_refuses_what_is_beyond(tmp_path, name, bad):
    place = "row 2" if name.endswith("parquet") else "line 4"
    with pytest.raises(InputError, match=rf"{name}.*{place}.*user {bad}.*--users 6"):
        take(write(tmp_path / name, frame([0, 1, bad], [0, 0, 0])), users=6)


def test_users_n_refuses_text(tmp_path):
    with pytest.raises(InputError, match="'x'"):
        take(write(tmp_path / "a.csv", frame([0, "x"], [0, 0])), users=6)


@pytest.mark.parametrize("name", ["u.csv", "u.parquet", "u.txt"])
def test_users_path_gives_rows_and_order(tmp_path, name):
    if name == "u.txt":
        (tmp_path / name).write_text("c\na\nb\n")
    else:
        write(tmp_path / name, pd.DataFrame({"user_id": ["c", "a", "b"]}))
    listed = read_user_ids(CPU, str(tmp_path / name), None)
    table = take(write(tmp_path / "i.csv", frame(["a", "c"], [1, 2])), users=listed)
    assert table.user_ids.tolist() == ["c", "a", "b"]
    np.testing.assert_array_equal(matrix(table), [[0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]])


def test_users_path_of_integers_joins_on_numbers_from_text(tmp_path):
    listed = read_user_ids(CPU, write(tmp_path / "u.parquet", pd.DataFrame({"row": [0, 1], "user_id": [30, 20]})), None)
    table = take(write(tmp_path / "i.csv", frame([20, 30, 20], [1, 2, 3])), users=listed)
    np.testing.assert_array_equal(matrix(table), [[0, 0, 1, 0], [0, 1, 0, 1]])


def test_a_user_who_is_not_listed_is_an_error(tmp_path):
    (tmp_path / "u.txt").write_text("a\n")
    listed = read_user_ids(CPU, str(tmp_path / "u.txt"), None)
    with pytest.raises(InputError, match="'b'"):
        take(write(tmp_path / "i.csv", frame(["a", "b"], [1, 2])), users=listed)


@pytest.mark.parametrize(("text", "words"), [("a\na\n", "twice"), ("a\n\nb\n", "line 2"), ("", "no user ids")])
def test_wrong_user_lists(tmp_path, text, words):
    (tmp_path / "u.txt").write_text(text)
    with pytest.raises(InputError, match=words):
        read_user_ids(CPU, str(tmp_path / "u.txt"), None)


@pytest.mark.parametrize("bad", [4, -1, 2**40])
def test_items_beyond_the_features_are_an_error(tmp_path, bad):
    with pytest.raises(InputError, match=rf"line 3.*item {bad}"):
        take(write(tmp_path / "a.csv", frame([0, 1], [0, bad])))


def test_text_items_need_feature_ids(tmp_path):
    with pytest.raises(InputError, match=r"'b12'.*id column"):
        take(write(tmp_path / "a.csv", frame([0, 1], [0, "b12"])))


def test_items_join_on_feature_ids(tmp_path):
    axis = ItemAxis(None, [pd.Series(["c", "a"]), pd.Series(["d"])])
    table = take(write(tmp_path / "a.csv", frame([0, 0, 1], ["a", "b", "c"])), axis)
    assert table.item_ids.tolist() == ["a", "b", "c", "d"]
    np.testing.assert_array_equal(matrix(table), [[1, 1, 0, 0], [0, 0, 1, 0]])


def test_integer_items_join_with_feature_ids_kept_as_text(tmp_path):
    axis = ItemAxis(None, [pd.Series(["10", "9", "x"])])
    table = take(write(tmp_path / "a.csv", frame([0, 0], [9, 10])), axis)
    assert table.item_ids.tolist() == ["10", "9", "x"]
    np.testing.assert_array_equal(matrix(table), [[1, 1, 0]])


def test_no_item_with_features_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"'a'.*'x'"):
        take(write(tmp_path / "a.csv", frame([0], ["a"])), ItemAxis(None, [pd.Series(["x"])]))


# Columns.


def test_recbole_headers(tmp_path):
    path = tmp_path / "ml.inter"
    path.write_text("user_id:token\titem_id:token\trating:float\ttimestamp:float\n0\t1\t4.5\t1\n1\t0\t2\t2\n")
    np.testing.assert_array_equal(
        matrix(take(path, axis=2, weight="rating", where="timestamp >= 1")), [[0, 4.5], [2, 0]]
    )
    np.testing.assert_array_equal(matrix(take(path, axis=2, user="user_id", item="item_id:token")), [[0, 1], [1, 0]])


def test_mmrec_headers_need_a_split(tmp_path):
    path = tmp_path / "t.inter"
    path.write_text("userID\titemID\tx_label\n0\t1\t0\n0\t2\t1\n1\t3\t0\n")
    with pytest.raises(InputError, match="x_label.*leak"):
        take(path)
    np.testing.assert_array_equal(matrix(take(path, where="x_label == 0")), [[0, 1, 0, 0], [0, 0, 0, 1]])
    table = take(path, where="itemID > 0")
    assert "x_label" in table.warnings[0]
    assert (table.read, table.kept) == (3, 3)


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_unknown_columns_are_listed(tmp_path, name):
    path = write(tmp_path / name, pd.DataFrame({"who": [0], "item_id": [0]}))
    with pytest.raises(InputError, match=r"--user-column.*who, item_id"):
        take(path)
    with pytest.raises(InputError, match=r"no column person \(--user-column\)"):
        take(path, user="person")
    with pytest.raises(InputError, match=r"no column stars \(--weight-column\)"):
        take(path, user="who", weight="stars")
    with pytest.raises(InputError, match=r"no column stars \(--where\)"):
        take(path, user="who", where="stars > 3")


def test_a_column_that_stands_there_twice():
    with pytest.raises(InputError, match="2 times"):
        find_column("f", ["user_id", "user_id", "item_id"], None, ("user_id",), "--user-column")


def test_where_that_keeps_nothing(tmp_path):
    with pytest.raises(InputError, match="none of which"):
        take(write(tmp_path / "a.csv", frame([0], [0], x=[1])), where="x == 2")


# Rows.


@pytest.mark.parametrize(
    ("value", "words"), [("-1", "-1.0"), ("x", "'x'"), ("", "no weight"), ("inf", "inf"), ("nan", "nan|number")]
)
def test_wrong_weights_in_text(tmp_path, value, words):
    path = tmp_path / "a.csv"
    path.write_text(f"user_id,item_id,w\n0,0,1\n0,1,{value}\n")
    with pytest.raises(InputError, match=rf"column w: line 3.*({words})"):
        take(path, weight="w")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([1.0, -2], "row 1.*-2"),
        ([1.0, None], "row 1"),
        ([1.0, np.inf], "row 1.*inf"),
        (["1", "two"], "row 1.*'two'"),
        ([True, False], "bool"),
    ],
)
def test_wrong_weights_in_parquet(tmp_path, values, words):
    with pytest.raises(InputError, match=words):
        take(write(tmp_path / "a.parquet", frame([0, 0], [0, 1], w=values)), weight="w")


@pytest.mark.parametrize("column", ["user_id", "item_id"])
@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_a_row_without_id(tmp_path, column, name):
    data = frame([0, 1, 2], [0, 1, 2]).astype("Int64")
    data.loc[1, column] = None
    place = "row 1" if name.endswith("parquet") else "line 3"
    with pytest.raises(InputError, match=rf"column {column}: {place} has no id"):
        take(write(tmp_path / name, data))


def test_ids_turned_into_floats_are_refused(tmp_path):
    data = frame([0.0, 1.0], [0, 1])
    with pytest.raises(InputError, match="double|float"):
        take(write(tmp_path / "a.parquet", data))
    with pytest.raises(InputError, match=r"'0\.0'"):
        take(write(tmp_path / "a.csv", data))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"", "no header"),
        ("a.csv", b"user_id,item_id\n", "no rows"),
        ("a.csv", b"user_id,item_id\n0,1\n2\n", "line 3 has not as many fields"),
        ("a.csv", b"\xff\xfeu\x00s\x00", "UTF-8"),
        ("a.parquet", b"not parquet at all", "a.parquet"),
        ("a.parquet", b"", "a.parquet"),
        ("a.csv.gz", b"not gzip", "a.csv.gz"),
        ("a.npz", b"not zip", "scipy"),
    ],
)
def test_broken_files(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words):
        take(tmp_path / name)


def test_a_truncated_gzip(tmp_path):
    whole = gzip.compress(b"user_id,item_id\n" + b"".join(b"%d,%d\n" % (k, k % 4) for k in range(5000)))
    (tmp_path / "a.csv.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="a.csv.gz"):
        take(tmp_path / "a.csv.gz")


def test_nothing_there(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        take(tmp_path / "nowhere.csv")


def test_byte_order_mark_and_quotes(tmp_path):
    (tmp_path / "a.csv").write_bytes(
        b'\xef\xbb\xbf"user_id","item_id","note"\r\n"0","1","two\nlines, and ""more"""\r\n"1","0",""\r\n'
    )
    np.testing.assert_array_equal(matrix(take(tmp_path / "a.csv", axis=2)), [[0, 1], [1, 0]])


def test_dictionary_encoded_ids(tmp_path):
    table = pa.table({"user_id": pa.array(["b", "a", "b"]).dictionary_encode(), "item_id": [0, 1, 2]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert take(tmp_path / "a.parquet").user_ids.tolist() == ["a", "b"]


def test_many_row_groups_and_batches(tmp_path, rng):
    users, items = rng.integers(0, 50, 5000), rng.integers(0, 4, 5000)
    frame(users, items).to_parquet(tmp_path / "a.parquet", row_group_size=700)
    expected = np.zeros((50, 4))
    np.add.at(expected, (users, items), 1)
    np.testing.assert_array_equal(matrix(take(tmp_path / "a.parquet")), expected)
