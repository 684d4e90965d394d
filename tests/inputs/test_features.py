"""Features: every format and dtype, every way to be broken, missing rows, projection."""

from __future__ import annotations

import builtins
import io
import json
import os
import random
import struct
import subprocess
import sys
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.decomposition import PCA

from gpu_init import memory
from gpu_init.backend.cpu import CpuBackend
from gpu_init.errors import GpuInitError, InputError, ResourceError
from gpu_init.inputs import features
from gpu_init.method import modality as method_modality
from gpu_init.method import projection as method_projection
from gpu_init.method.modality import Modality

TIKTOK = Path(__file__).parents[3] / "shared" / "data" / "tiktok"
CPU = CpuBackend("tests")


def bfloat16(values):
    """Give the upper halves of float32, as numpy stores bfloat16."""
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def sample(rng, dtype=np.float32, shape=(7, 5)):
    """Values that float16, bfloat16 and all above hold exactly."""
    return rng.integers(-60, 60, shape).astype(dtype) / dtype(4)


def lists(values, kind=None):
    return pa.array(list(values), kind or pa.list_(pa.from_numpy_dtype(values.dtype)))


def fixed(values):
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])


def parquet(path, **columns):
    pq.write_table(pa.table(columns), path)


def refused(path, words, **options):
    with pytest.raises(InputError, match=words) as caught:
        features.read("m", str(path), **options)
    message = str(caught.value)
    assert str(path) in message
    assert message.count("\n") <= 1
    assert len(message) < 600


def same(table, values, ids=None):
    np.testing.assert_array_equal(table.values, values)
    assert table.values.dtype in (np.float16, np.float32, np.float64)
    assert table.values.dtype.isnative
    if ids is None:
        assert table.ids is None
    else:
        assert list(table.ids) == list(ids)


def memory_mapped(values):
    while isinstance(values, np.ndarray):
        if isinstance(values, np.memmap):
            return True
        values = values.base
    return False


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


# Bad files.


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.ones(4, np.float32), r"shape \(4,\)"),
        (np.ones((2, 3, 4), np.float32), r"shape \(2, 3, 4\)"),
        (np.ones((0, 4), np.float32), r"shape \(0, 4\)"),
        (np.ones((4, 0), np.float32), r"shape \(4, 0\)"),
        (np.ones((4, 2), int), "int64"),
        (np.ones((4, 2), bool), "bool"),
        (np.ones((4, 2), complex), "complex128"),
        (np.ones((4, 2), np.longdouble), "float128"),
        (np.full((4, 2), "x"), "<U1"),
        (np.full((4, 2), None), "Python objects"),
        (np.zeros((4, 2), [("x", "f4")]), "float16, bfloat16, float32"),
    ],
)
@pytest.mark.parametrize("save", [np.save, np.savez])
def test_wrong_arrays_in_files(tmp_path, save, array, words):
    path = tmp_path / ("f.npy" if save is np.save else "f.npz")
    save(path, array, allow_pickle=True)
    refused(path, words)


def npy_header(text, version=b"\x01\x00"):
    text = text.encode()
    length = struct.pack("<H" if version == b"\x01\x00" else "<I", len(text))
    return b"\x93NUMPY" + version + length + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY",
        b"not numpy at all",
        npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 64), }\n"),
        npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 64), }\n") + b"x" * 256,
        npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 2.0), }\n") + b"x" * 16,
        npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 2), }\n") + b"x" * 15,
        npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 2), }\n") + b"x" * 17,
        npy_header("{'descr': '<f4', 'fortran_order': False, }\n") + b"x" * 16,
        npy_header("{'descr': '<q9', 'fortran_order': False, 'shape': (2, 2), }\n") + b"x" * 16,
        npy_header("__import__('os').system('false')\n"),
        npy_header("[" * 5000),
        npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (2L, 2L), }\n") + b"x" * 15,
        npy_header("{}", b"\x09\x00"),
        npy_header("x" * 20_000),
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff{'descr'",
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_broken_npy(tmp_path, content, zipped):
    path = tmp_path / "f.npy"
    if zipped:
        path = tmp_path / "f.npz"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("f.npy", content)
    else:
        path.write_bytes(content)
    refused(path, ".")


def test_zip_bombs(tmp_path, monkeypatch):
    path = tmp_path / "f.npz"
    np.savez_compressed(path, np.zeros((1000, 1000)))
    monkeypatch.setattr(memory, "available", lambda: memory.Free(1_000_000, "here"))
    with pytest.raises(ResourceError, match=r"8,000,\d+ bytes of memory are needed, 1,000,000 are free"):
        features.read("m", str(path))
    torch = pytest.importorskip("torch")
    torch.save(torch.zeros(1000, 1000), tmp_path / "f.pt")
    with pytest.raises(ResourceError, match="4,0"):
        features.read("m", str(tmp_path / "f.pt"))
    parquet(tmp_path / "f.parquet", x=fixed(np.zeros((1000, 1000))))
    with pytest.raises(ResourceError, match="8,000,000"):
        features.read("m", str(tmp_path / "f.parquet"))


def test_a_list_of_a_few_bytes_that_unpacks_to_gigabytes(tmp_path, monkeypatch):
    path, count = tmp_path / "f.parquet", 50_000_000
    bomb = pa.ListArray.from_arrays(pa.array([0, count], pa.int32()), pa.array(np.zeros(count, np.float32)))
    pq.write_table(pa.table({"v": bomb}), path, compression="zstd")
    del bomb
    pa.default_memory_pool().release_unused()
    assert path.stat().st_size < 2000
    monkeypatch.setattr(memory, "available", lambda: memory.Free(100_000_000, "here"))
    with pytest.raises(ResourceError, match=r"f\.parquet: .*memory"):
        features.read("m", str(path))


def test_a_member_that_declares_more_than_it_holds(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((4, 4), np.float32))
    path = tmp_path / "f.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("f.npy", buffer.getvalue()[:-10])
    size = len(buffer.getvalue())
    path.write_bytes(path.read_bytes().replace(struct.pack("<I", size - 10), struct.pack("<I", size)))
    refused(path, ".")


def test_npz_with_too_much_or_the_wrong_thing(tmp_path):
    path = tmp_path / "f.npz"
    np.savez(path, a=np.ones((2, 2)), b=np.ones((2, 2)))
    refused(path, r"2 arrays, \['a.npy', 'b.npy'\]")
    scipy.sparse.save_npz(path, scipy.sparse.eye_array(3, format="csr"))
    refused(path, "scipy sparse")
    with zipfile.ZipFile(path, "w"):
        pass
    refused(path, "0 arrays")


def test_safetensors_with_too_much_or_the_wrong_thing(tmp_path):
    path = tmp_path / "f.safetensors"
    for tensors, words in [
        ({"a": np.ones((2, 2), np.float32), "b": np.ones((2, 3), np.float32)}, r"a \(2, 2\).*b \(2, 3\)"),
        ({"a": np.ones(3, np.float32)}, r"a \(3,\)"),
        ({"a": np.ones((2, 2), np.int64)}, "I64"),
        ({"a": np.ones((0, 2), np.float32)}, r"shape \(0, 2\)"),
    ]:
        safetensors.numpy.save_file(tensors, path)
        refused(path, words)
    for header in (
        b"[]",
        b"{",
        b"[" * 100_000,
        b'{"a": {"dtype": "F32", "shape": [9, 9], "data_offsets": [0, 324]}}',
        b'{"a": 1}',
    ):
        path.write_bytes(struct.pack("<Q", len(header)) + header)
        refused(path, ".")
    path.write_bytes(struct.pack("<Q", 2**63) + b"{}")
    refused(path, "header of 9223372036854775808 bytes")


def test_torch_files_with_too_much_or_the_wrong_thing(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "f.pt"
    for stored, words in [
        ({"a": torch.ones(2, 2), "b": torch.ones(2, 2)}, r"a \(2, 2\)"),
        ({"a": torch.ones(2)}, "exactly one 2-D tensor"),
        (torch.ones(2), r"shape \(2,\)"),
        (torch.ones(2, 2, dtype=torch.int64), "int64"),
        (torch.ones(2, 2).to_sparse(), "torch.sparse_coo"),
        ([torch.ones(2, 2)], "found list"),
        (torch.nn.Linear(2, 2), "state_dict"),
    ]:
        torch.save(stored, path)
        refused(path, words)


def test_torch_absent(tmp_path, monkeypatch):
    (tmp_path / "f.pt").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "torch", None)
    refused(tmp_path / "f.pt", r"pip install 'gpu-init\[torch\]'")


def test_places_that_are_no_files(tmp_path, monkeypatch):
    refused(tmp_path / "absent.npy", "no such file")
    refused(tmp_path / "*.npy", "no files")
    (tmp_path / "folder.npy").mkdir()
    refused(tmp_path / "folder.npy", "no files")
    refused("no://bucket/f.npy", "not known|fsspec")
    (tmp_path / "f.csv").write_text("1,2")
    refused(tmp_path / "f.csv", r"features end in \.npy")
    os.mkfifo(tmp_path / "pipe.npy")
    refused(tmp_path / "pipe.npy", ".")
    for name in ("a.npy", "b.npy"):
        np.save(tmp_path / "folder.npy" / name, np.ones((2, 2)))
    refused(tmp_path / "folder.npy", "2 files")

    def deny(path, *_, **__):
        raise PermissionError(13, "Permission denied", path)

    np.save(tmp_path / "f.npy", np.ones((2, 2)))
    monkeypatch.setattr(os, "open", deny)
    monkeypatch.setattr(builtins, "open", deny)
    refused(tmp_path / "f.npy", "Permission denied")


def every_format(folder, rng):
    values = sample(rng, shape=(40, 6))
    np.save(folder / "f.npy", values)
    np.savez(folder / "stored.npz", values)
    np.savez_compressed(folder / "packed.npz", values)
    safetensors.numpy.save_file({"f": values}, folder / "f.safetensors")
    words = [f"i{k}" for k in range(40)]
    parquet(folder / "list.parquet", item=words, x=lists(values))
    parquet(folder / "wide.parquet", item=range(40), **{f"d{k}": values[:, k] for k in range(6)})
    with suppress(ImportError):
        import torch

        torch.save({"f": torch.from_numpy(values)}, folder / "f.pt")
        torch.save(torch.from_numpy(values), folder / "old.pth", _use_new_zipfile_serialization=False)
    return sorted(path for path in folder.iterdir() if path.is_file())


def test_damaged_files_give_a_table_or_an_error(tmp_path, rng):
    chance = random.Random(3)
    for path in every_format(tmp_path, rng):
        content = path.read_bytes()
        damaged = tmp_path / f"damaged{path.suffix}"
        edge = min(300, len(content))
        offsets = {*range(0, edge, 4), *range(len(content) - edge, len(content), 4)}
        offsets |= {chance.randrange(len(content)) for _ in range(60)}
        for at in sorted(offsets):
            flipped = bytes([content[at] ^ (1 << chance.randrange(8))])
            for broken in (content[:at], content[:at] + flipped + content[at + 1 :]):
                damaged.write_bytes(broken)
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    with suppress(GpuInitError):
                        method_modality.check(features.read("m", str(damaged)).values, "m")
        damaged.unlink()


# Missing rows.


@given(
    values=hnp.arrays(
        st.sampled_from([np.float16, np.float32, np.float64]),
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=8),
        elements=st.sampled_from([0, 1, -2.5, 60000, np.nan]),
    ),
    missing=st.sets(st.integers(0, 7)),
)
@settings(deadline=None)
def test_missing_rows_are_those_all_nan(values, missing):
    values[[row for row in missing if row < len(values)]] = np.nan
    nan = np.isnan(values)
    before = values.copy()
    partly = np.flatnonzero(nan.any(axis=1) & ~nan.all(axis=1))
    if len(partly) or nan.all():
        words = f"row {partly[0]} is NaN" if len(partly) else f"all {len(values)} rows"
        with pytest.raises(InputError, match=f"image: {words}"):
            method_modality.check(values, "image")
    else:
        np.testing.assert_array_equal(method_modality.check(values, "image"), ~nan.any(axis=1))
    np.testing.assert_array_equal(values, before)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize(
    ("value", "words"), [(np.inf, "inf"), (-np.inf, "-inf"), (2e15, r"2e\+15.*rescale"), (-1e30, r"-1e\+30.*rescale")]
)
def test_values_out_of_range(dtype, value, words):
    if dtype is np.float16 and np.isfinite(value):
        return
    values = np.zeros((1000, 3000), dtype)  # several blocks
    values[10] = np.nan
    values[901, 2001] = value
    with pytest.raises(InputError, match=rf"image: row 901, column 2001 is {words}"):
        method_modality.check(values, "image")
    values[901, 2001] = np.nan
    with pytest.raises(InputError, match="image: row 901 is NaN in 1 of 3000 columns"):
        method_modality.check(values, "image")
    values[901] = np.finfo(dtype).max if dtype is np.float16 else 1e15
    assert method_modality.check(values, "image").sum() == 999


# Modalities.


def test_align_by_row_shares_memory_with_a_mapped_file(tmp_path, rng):
    values = sample(rng)
    values[3] = np.nan
    np.save(tmp_path / "f.npy", values)
    table = features.read("m", str(tmp_path / "f.npy"))
    modality = features.align(CPU, table, method_modality.check(table.values, "m"), None)
    assert np.shares_memory(modality.values, table.values)
    assert (modality.name, modality.n_present) == ("m", 6)
    np.testing.assert_array_equal(modality.present, np.arange(7) != 3)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_align_places_rows(rng, dtype):
    values = sample(rng, dtype, (5000, 3))
    values[4] = np.nan
    table = features.FeatureTable("m", "f", values, None)
    rows = rng.permutation(6000)[:5000]
    modality = features.align(CPU, table, features.align_mask(method_modality.check(values, "m"), rows, 6000), rows)
    assert modality.values.dtype == np.float32
    assert modality.values.flags.c_contiguous
    np.testing.assert_array_equal(modality.values[rows], values)
    has = np.isin(np.arange(6000), np.delete(rows, 4))
    np.testing.assert_array_equal(modality.present, has)
    assert modality.n_present == has.sum() == 4999
    assert not modality.values[~np.isin(np.arange(6000), rows)].any()


def test_align_says_how_much_memory_it_needs(monkeypatch):
    table = features.FeatureTable("m", "f.npy", np.ones((10, 4)), None)
    monkeypatch.setattr(memory, "available", lambda: memory.Free(100, "here"))
    for rows in (None, np.arange(10)):
        with pytest.raises(ResourceError, match=r"f\.npy: 160 bytes"):
            features.align(CPU, table, np.ones(10, bool), rows)


def test_read_rows(tmp_path, rng):
    values, path = sample(rng, shape=(3, 2)), tmp_path / "f.parquet"
    parquet(path, item=[4, 0, 2], x=lists(values))
    nan = [np.nan, np.nan]
    np.testing.assert_array_equal(features.read_rows("m", str(path), 5), [values[1], nan, values[2], nan, values[0]])
    with pytest.raises(InputError, match="row numbers"):
        features.read_rows("m", str(path), 4)


def test_from_numpy_without_a_copy(rng):
    values = sample(rng)
    modality = method_modality.from_array(CPU, "m", values)
    assert np.shares_memory(modality.values, values)
    assert modality.n_present == 7
    for other in (
        np.asfortranarray(values),
        values.astype(">f4"),
        values.astype(np.float64),
        values[::-1][::-1],
        bfloat16(values).view("V2"),
    ):
        modality = method_modality.from_array(CPU, "m", other)
        np.testing.assert_array_equal(modality.values, values)
        assert modality.values.flags.c_contiguous
        assert modality.values.dtype == np.float32
    packed = np.zeros(7, [("pad", "u1"), ("x", "f4", 5)])
    packed["x"] = values
    assert method_modality.from_array(CPU, "m", packed["x"]).values.flags.aligned


def test_from_torch(rng):
    torch = pytest.importorskip("torch")
    values = sample(rng)
    values[2] = np.nan
    tensor = torch.from_numpy(values)
    modality = method_modality.from_array(CPU, "m", tensor)
    assert np.shares_memory(modality.values, values)
    assert np.shares_memory(method_modality.from_array(CPU, "m", torch.nn.Parameter(tensor)).values, values)
    for other in (tensor.bfloat16(), tensor.half(), tensor.double(), tensor.T.contiguous().T):
        modality = method_modality.from_array(CPU, "m", other)
        np.testing.assert_array_equal(modality.values, values)
        assert modality.n_present == 6
    for wrong, words in [
        (torch.ones(3), "shape"),
        (torch.ones(2, 2).to_sparse(), "dense"),
        (torch.ones(2, 2).int(), "int32"),
    ]:
        with pytest.raises(InputError, match=rf"modality m: .*{words}"):
            method_modality.from_array(CPU, "m", wrong)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        ([[1.0, 2.0]], "found list"),
        (None, "found NoneType"),
        (pd.DataFrame({"x": [1.0]}), "found DataFrame"),
        (scipy.sparse.eye_array(3), "found dia_array"),
        (np.ma.masked_invalid([[1.0, np.nan]]), "found MaskedArray"),
        (np.ones((2, 2), int), "int64"),
        (np.ones(2), r"shape \(2,\)"),
        (np.full((2, 2), None), "Python objects"),
        (np.full((2, 2), np.inf), "inf"),
        (np.array([[1, np.nan]]), "row 0 is NaN in 1"),
    ],
)
def test_wrong_arrays_in_memory(array, words):
    with pytest.raises(InputError, match=rf"modality m: .*{words}"):
        method_modality.from_array(CPU, "m", array)


# Projection.


def modality_of(values):
    values = np.ascontiguousarray(values, np.float32)
    present = ~np.isnan(values[:, 0])
    return Modality("m", values, present, int(present.sum()))


def correlated(rng, rows=3000, width=20, missing=0.1):
    """Rows over more than one block, directions of very different lengths, a mean far from zero."""
    rotation = np.linalg.qr(rng.standard_normal((width, width)))[0]
    values = rng.standard_normal((rows, width)) * np.logspace(1, -2, width) @ rotation
    values += 5 * rng.standard_normal(width)
    values[rng.random(rows) < missing] = np.nan
    return modality_of(values)


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("dim", [1, 7, 20])
def test_projection_is_the_principal_components(rng, dim, whiten):
    modality = correlated(rng)
    projection = method_projection.fit_projection(CPU, modality, dim, whiten)
    projected = method_projection.project(CPU, modality, projection)
    X = modality.values[modality.present].astype(np.float64)
    _, singular, rotation = np.linalg.svd(X - X.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(projection.mean, X.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(projection.eigenvalues, singular[:dim] ** 2 / (len(X) - 1), rtol=1e-9)
    found = PCA(dim, whiten=whiten, svd_solver="full").fit(X)
    largest = found.components_[np.arange(dim), np.abs(found.components_).argmax(axis=1)]
    np.testing.assert_allclose(np.abs(found.components_), np.abs(rotation[:dim]), atol=1e-9)
    expected = found.transform(X) * np.sign(largest)
    np.testing.assert_allclose(projected.values[modality.present], expected, rtol=1e-6, atol=1e-6)
    assert (projection.components[np.abs(projection.components).argmax(axis=0), np.arange(dim)] > 0).all()
    assert projected.values.dtype == np.float32
    assert projected.values.flags.c_contiguous
    assert projected.n_present == modality.n_present
    assert not projected.values[~modality.present].any()
    np.testing.assert_array_equal(projected.present, modality.present)
    if whiten:
        np.testing.assert_allclose(projected.values[modality.present].astype(float).var(axis=0, ddof=1), 1, rtol=1e-6)


def test_directions_that_do_not_vary_bound_dim(rng):
    values = rng.standard_normal((50, 3)) @ rng.integers(-3, 4, (3, 8))  # rank 3
    modality = modality_of(np.round(values * 64) / 64)
    values = modality.values.copy()
    values[:, 3:] = values[:, :1]
    modality = modality_of(values)
    assert method_projection.fit_projection(CPU, modality, 3, True).components.shape == (8, 3)
    with pytest.raises(InputError, match="dim 4 is above the 3 independent directions of modality m"):
        method_projection.fit_projection(CPU, modality, 4, False)
    with pytest.raises(InputError, match="dim 9 is above the 8 dimensions of modality m"):
        method_projection.fit_projection(CPU, modality, 9, False)
    with pytest.raises(InputError, match="dim 5 is above the 1 independent"):
        method_projection.fit_projection(CPU, modality_of(values[:2]), 5, False)
    with pytest.raises(InputError, match="one item"):
        method_projection.fit_projection(CPU, modality_of(values[:1]), 1, False)
    with pytest.raises(InputError, match="the 0 independent"):
        method_projection.fit_projection(CPU, modality_of(np.full((7001, 4), 0.1)), 1, True)


def test_ties_in_the_largest_loading_take_the_first():
    modality = modality_of([[1, -1], [-1, 1], [2, -2], [-2, 2]])
    projection = method_projection.fit_projection(CPU, modality, 1, False)
    np.testing.assert_allclose(projection.components, [[np.sqrt(0.5)], [-np.sqrt(0.5)]])


def test_projection_gives_the_same_bytes_with_any_number_of_threads(tmp_path):
    code = (
        "import hashlib, sys; sys.path.insert(0, sys.argv[1])\n"
        "import numpy as np\n"
        "from gpu_init.method import projection\n"
        "from gpu_init.backend.cpu import CpuBackend\n"
        "from gpu_init.method.modality import Modality\n"
        "values = np.random.default_rng(0).standard_normal((5000, 200), np.float32)\n"
        "m, b = Modality('m', values, np.arange(5000) % 7 > 0, 4285), CpuBackend('')\n"
        "made = projection.project(b, m, projection.fit_projection(b, m, 100, True))\n"
        "print(hashlib.sha256(made.values).hexdigest())\n"
    )
    found = set()
    for threads in ("1", "2"):
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        command = [sys.executable, "-c", code, str(Path(__file__).parents[2])]
        found.add(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert len(found) == 1


@pytest.mark.skipif(not TIKTOK.exists(), reason="the TikTok data are not there")
@pytest.mark.parametrize("name", ["image", "audio"])
@pytest.mark.parametrize("whiten", [False, True])
def test_tiktok(name, whiten):
    table = features.read(name, str(TIKTOK / f"{name}_feat.npy"))
    modality = features.align(CPU, table, method_modality.check(table.values, name), None)
    found = method_projection.project(CPU, modality, method_projection.fit_projection(CPU, modality, 64, whiten)).values
    X = table.values.astype(np.float64)
    with CPU.deterministic():  # one thread: several can be far slower on a busy machine
        _, singular, rotation = np.linalg.svd(X - X.mean(axis=0), full_matrices=False)
    rotation = rotation[:64] * np.sign(rotation[np.arange(64), np.abs(rotation[:64]).argmax(axis=1)])[:, None]
    expected = (X - X.mean(axis=0)) @ rotation.T
    if whiten:
        expected /= singular[:64] / np.sqrt(len(X) - 1)
    error = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert error.max() < 2e-6
