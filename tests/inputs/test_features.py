"""Item features from every format are read as they were written."""

from __future__ import annotations

import json
import struct
import warnings

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy

from gpu_init.errors import InputError
from gpu_init.inputs import features
from gpu_init.method import modality as method_modality
from tests.support.features import CPU, bfloat16, fixed, lists, memory_mapped, parquet, refused, same, sample

# Formats.


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize(
    "extension", ["npy", "npz", "safetensors", "pt", "pth", "list.parquet", "fixed.pq", "wide.parquet"]
)
def test_every_format_and_dtype(tmp_path, rng, extension, dtype):
    values, path = sample(rng, dtype), tmp_path / f"f.{extension}"
    ids = None
    if extension == "npy":
        np.save(path, values)
    elif extension == "npz":
        np.savez_compressed(path, features=values)
    elif extension == "safetensors":
        safetensors.numpy.save_file({"f": values}, path)
    elif extension in ("pt", "pth"):
        torch = pytest.importorskip("torch")
        torch.save(torch.from_numpy(values), path)
    else:
        ids = [f"item {k}" for k in range(7)]
        columns = {"list.parquet": {"x": lists(values)}, "fixed.pq": {"x": fixed(values)}}
        parquet(path, item_id=ids, **columns.get(extension, {f"d{k}": values[:, k] for k in range(5)}))
    table = features.read("m", str(path))
    same(table, values, ids)
    assert table.values.dtype == dtype
    assert (table.name, table.path) == ("m", str(path))
    assert memory_mapped(table.values) == (extension in ("npy", "safetensors"))


@pytest.mark.parametrize("extension", ["npy", "npz", "safetensors", "pt"])
def test_bfloat16_is_read_as_float32(tmp_path, rng, extension):
    values, path = sample(rng), tmp_path / f"f.{extension}"
    stored = bfloat16(values)
    if extension == "npy":
        np.save(path, stored.view("V2"))
    elif extension == "npz":
        np.savez(path, stored.view("V2"))
    elif extension == "safetensors":
        header = json.dumps({"f": {"dtype": "BF16", "shape": [7, 5], "data_offsets": [0, 70]}}).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + stored.tobytes())
    else:
        torch = pytest.importorskip("torch")
        torch.save(torch.from_numpy(values).bfloat16(), path)
    table = features.read("m", str(path))
    same(table, values)
    assert table.values.dtype == np.float32


@pytest.mark.parametrize("save", [np.save, np.savez])
def test_fortran_order_and_big_endian(tmp_path, rng, save):
    values = sample(rng)
    path = tmp_path / ("f.npy" if save is np.save else "f.npz")
    for stored in (
        np.asfortranarray(values),
        values.astype(">f4"),
        values.astype(">f8"),
        np.asfortranarray(values.astype(">f2")),
    ):
        save(path, stored)
        table = features.read("m", str(path))
        same(table, values)
        modality = features.align(CPU, table, method_modality.check(table.values, "f"), None)
        assert modality.values.flags.c_contiguous
        np.testing.assert_array_equal(modality.values, values)


def test_npy_of_format_two(tmp_path, rng):
    values, path = sample(rng), tmp_path / "f.npy"
    with path.open("wb") as file:
        np.lib.format.write_array(file, values, version=(2, 0))
    same(features.read("m", str(path)), values)


def test_safetensors_off_alignment_and_with_metadata(tmp_path, rng):
    values, path = sample(rng, np.float64), tmp_path / "f.safetensors"
    entries = {"__metadata__": {"format": "np"}, "f": {"dtype": "F64", "shape": [7, 5], "data_offsets": [3, 283]}}
    header = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"xyz" + values.tobytes())
    table = features.read("m", str(path))
    same(table, values)
    assert table.values.flags.aligned


def test_state_dicts_and_parameters(tmp_path, rng):
    torch = pytest.importorskip("torch")
    values, path = sample(rng), tmp_path / "f.pt"
    embedding = torch.nn.Embedding.from_pretrained(torch.from_numpy(values), freeze=False)
    transposed = torch.from_numpy(values.T.copy()).T
    for stored in (
        embedding.state_dict(),
        embedding.weight,
        {"x": transposed, "bias": torch.ones(5), "epoch": 3},
        transposed,
    ):
        torch.save(stored, path)
        same(features.read("m", str(path)), values)


def test_old_torch_files(tmp_path, rng):
    torch = pytest.importorskip("torch")
    values, path = sample(rng), tmp_path / "f.pt"
    torch.save(torch.from_numpy(values), path, _use_new_zipfile_serialization=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(features.read("m", str(path)), values)


# Parquet.


def test_several_parquet_files_in_the_order_of_their_names(tmp_path, rng):
    values = sample(rng, shape=(9, 3))
    parquet(tmp_path / "b.parquet", item=[5, 3, 4, 9], x=lists(values[4:8]))
    parquet(tmp_path / "a.parquet", item=[8, 7, 2, 1], x=lists(values[:4].astype(np.float64)))
    parquet(tmp_path / "c.parquet", item=["x"], x=lists(values[8:]))
    (tmp_path / "_SUCCESS").write_text("")
    for place in (tmp_path, tmp_path / "*.parquet"):
        table = features.read("m", str(place))
        same(table, values, ["8", "7", "2", "1", "5", "3", "4", "9", "x"])
        assert table.values.dtype == np.float64
    same(features.read("m", str(tmp_path / "[ab].parquet")), values[:8], [8, 7, 2, 1, 5, 3, 4, 9])


@pytest.mark.parametrize(
    ("column", "option"),
    [
        ("item_id", None),
        ("itemID", None),
        ("ITEM:token", None),
        ("asin", None),
        ("sku", "sku"),
        ("sku", None),
        ("sku", "item_id"),
    ],
)
def test_the_id_column(tmp_path, rng, column, option):
    values, path = sample(rng), tmp_path / "f.parquet"
    for ids in (range(10, 17), [f"00{k}" for k in range(7)]):
        parquet(path, x=lists(values), **{column: pa.array(ids)})
        same(features.read("m", str(path), option), values, ids)


def test_ids_of_every_arrow_type(tmp_path, rng):
    values, path = sample(rng), tmp_path / "f.parquet"
    words = [f"w{k}" for k in (3, 1, 2, 0, 6, 5, 4)]
    for ids in (pa.array(words), pa.array(words, pa.large_string()), pa.array(words).dictionary_encode()):
        parquet(path, item=ids, x=lists(values))
        same(features.read("m", str(path)), values, words)
    for kind in (pa.int8(), pa.uint16(), pa.uint64(), pa.string()):
        parquet(path, item=pa.array(range(7)).cast(kind), x=lists(values))
        table = features.read("m", str(path))
        same(table, values, range(7))
        assert table.ids.dtype == np.int64


def test_parquet_without_ids_is_by_row(tmp_path, rng):
    values, path = sample(rng), tmp_path / "f.parquet"
    parquet(path, **{str(k): values[:, k] for k in range(5)})
    same(features.read("m", str(path)), values)
    parquet(path, x=lists(values))
    same(features.read("m", str(path), "item"), values)


def test_pandas_index_is_the_id(tmp_path, rng):
    values, path = sample(rng), tmp_path / "f.parquet"
    pd.DataFrame(values, index=[f"i{k}" for k in range(7)], columns=[str(k) for k in range(5)]).to_parquet(path)
    same(features.read("m", str(path)), values, [f"i{k}" for k in range(7)])


def test_more_columns_than_are_read_at_a_time(tmp_path, rng):
    values, path = sample(rng, shape=(5000, 50)), tmp_path / "f.parquet"
    names = ["a", "a.b", "a.b.c", "x y", *map(str, range(46))]
    ids = [str(k % 10) + "x" * (k // 10) for k in range(5000)]
    parquet(path, **dict(zip(names, values.T, strict=True)), item=ids)
    same(features.read("m", str(path)), values, ids)


def test_whole_numbers_are_dimensions_beside_a_named_id(tmp_path, rng):
    values, path = sample(rng, shape=(4, 2)), tmp_path / "f.parquet"
    parquet(path, item_id=[1, 2, 3, 4], year=[1990, None, 2000, 2010], x=values[:, 0])
    same(features.read("m", str(path)), np.stack([[1990, np.nan, 2000, 2010], values[:, 0]], axis=1), [1, 2, 3, 4])


@pytest.mark.parametrize("kind", [pa.list_, pa.large_list, lambda kind: pa.list_(kind, 2)])
@pytest.mark.parametrize("number", [pa.float16(), pa.float32(), pa.float64()])
def test_nulls_are_nan(tmp_path, kind, number):
    path = tmp_path / "f.parquet"
    rows = [None, [np.float16(1), np.float16(2)], None, [None, np.float16(3)], [np.float16(4), np.float16(5)]]
    parquet(path, item=range(5), x=pa.array(rows, kind(number)))
    expected = [[np.nan] * 2, [1, 2], [np.nan] * 2, [np.nan, 3], [4, 5]]
    same(features.read("m", str(path)), expected, range(5))
    a, b = ([row and row[k] for row in rows] for k in (0, 1))
    parquet(path, item=range(5), a=pa.array(a, number), b=pa.array(b, number))
    same(features.read("m", str(path)), expected, range(5))


def test_many_batches_and_a_late_first_list(tmp_path, rng):
    values, path = sample(rng, shape=(10_000, 3)), tmp_path / "f.parquet"
    values[:5000] = np.nan
    rows = [None if np.isnan(row[0]) else list(row) for row in values]
    table = pa.table({"item": range(10_000), "x": pa.array(rows, pa.list_(pa.float32()))})
    pq.write_table(table, path, row_group_size=3000)
    same(features.read("m", str(path)), values, range(10_000))


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"item": [1, 2], "x": [[1.0, 2.0], [1.0]]}, "row 1 has 1 values"),
        ({"item": [1, 2], "x": pa.array([[], []], pa.list_(pa.float32()))}, "empty list"),
        ({"item": [1, 2], "x": pa.array([None, None], pa.list_(pa.float32()))}, "missing"),
        ({"item": [7, 7], "x": [[1.0], [2.0]]}, r"item 7 is there twice, in row 0 of .* and row 1 of"),
        ({"item": ["a", "a"], "x": [[1.0], [2.0]]}, "'a' is there twice"),
        ({"item": [1, None], "x": [[1.0], [2.0]]}, "row 1 has no id"),
        ({"item": [1.5, 2.5], "x": [[1.0], [2.0]]}, "ids of type"),
        ({"item": [1, 2], "title": ["a", "b"], "x": [[1.0], [2.0]]}, "title"),
        ({"item": [1, 2], "new": [True, False], "x": [1.0, 2.0]}, r"new \(bool\)"),
        ({"item": [1, 2], "x": [[1], [2]]}, "lists of int64"),
        ({"item": [1, 2], "x": [["a"], ["b"]]}, "lists of string"),
        ({"item": [1, 2], "x": [[1.0], [2.0]], "y": [[1.0], [2.0]]}, "one list column"),
        ({"item": [1, 2], "x": [[1.0], [2.0]], "y": [1.0, 2.0]}, "one list column"),
        ({"item": [1, 2]}, "wanted"),
        ({"a": [1, 2], "b": [3, 4], "x": [1.0, 2.0]}, "'a', 'b'"),
        ({"item": pa.array([], pa.int64()), "x": pa.array([], pa.list_(pa.float32()))}, "no rows"),
    ],
)
def test_wrong_parquet(tmp_path, columns, words):
    parquet(tmp_path / "f.parquet", **columns)
    refused(tmp_path / "f.parquet", words)


def test_ids_that_are_not_utf8(tmp_path):
    ids = pa.array([b"a", b"\xff"]).view(pa.string())
    parquet(tmp_path / "f.parquet", item=ids, x=[[1.0], [2.0]])
    refused(tmp_path / "f.parquet", "UTF8")


def test_two_columns_of_one_name(tmp_path):
    path = tmp_path / "f.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array([1.0]), pa.array([2.0])], names=["x", "x"]), path)
    refused(path, "same name")


def test_parquet_files_that_do_not_fit_together(tmp_path):
    parquet(tmp_path / "a.parquet", item=[1], x=[[1.0]])
    parquet(tmp_path / "b.parquet", item=[2], y=[[1.0]])
    with pytest.raises(InputError, match=r"b\.parquet: its columns are not those of .*a\.parquet"):
        features.read("m", str(tmp_path))
    parquet(tmp_path / "b.parquet", item=[3, 1], x=[[1.0], [2.0]])
    with pytest.raises(InputError, match=r"row 0 of .*a\.parquet and row 1 of .*b\.parquet"):
        features.read("m", str(tmp_path))
    parquet(tmp_path / "b.parquet", item=[2], x=[[1.0, 2.0]])
    with pytest.raises(InputError, match=r"b\.parquet.*row 0 has 2"):
        features.read("m", str(tmp_path))
