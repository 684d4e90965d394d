"""Broken feature files are refused, with the place."""

from __future__ import annotations

import builtins
import io
import os
import random
import struct
import sys
import warnings
import zipfile
from contextlib import suppress

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import scipy.sparse

from gpu_init import memory
from gpu_init.errors import GpuInitError, ResourceError
from gpu_init.inputs import features
from gpu_init.method import modality as method_modality
from tests.support.features import fixed, lists, parquet, refused, sample

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
