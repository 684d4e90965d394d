"""Damaged and hostile artifacts are refused, and verify names what is wrong."""

import hashlib
import json
import os

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from gpu_init.artifact import format, read
from gpu_init.artifact.objects import open_staging
from gpu_init.errors import InputError
from tests.support.small_runs import USERS, contents, names


def test_any_flipped_bit_is_caught(made):
    rng = np.random.default_rng(0)
    for name, data in contents(made).items():
        bits = 8 * len(data)
        for bit in {0, 8 * 6, bits - 1, *rng.integers(0, bits, 150).tolist()}:
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            (made / name).write_bytes(flipped)
            assert read.verify(made), (name, bit)
        (made / name).write_bytes(data)
    assert read.verify(made) == []


def test_what_is_missing_or_added_is_caught(made):
    (made / "image" / "extra.npy").write_bytes(b"x")
    (made / "image" / "labels.npy").unlink()
    assert read.verify(made) == ["image/labels.npy: missing", "image/extra.npy: not in the manifest"]
    (made / "manifest.json").unlink()
    with pytest.raises(InputError, match="no manifest"):
        read.verify(made)
    with pytest.raises(InputError, match="no such folder"):
        read.verify(made / "elsewhere")


@pytest.mark.parametrize("name", ["image/users.npy", "users.parquet", "manifest.json"])
def test_truncated_files_are_refused(made, name):
    data = (made / name).read_bytes()
    for size in (0, 1, 9, 11, len(data) // 2, len(data) - 1):
        (made / name).write_bytes(data[:size])
        with pytest.raises(InputError):
            read.load(made)
        assert read.verify(made)


def reseal(folder, change):
    """Change a manifest as somebody would who knows how it is sealed."""
    path = folder / "manifest.json"
    body = json.loads(path.read_bytes())
    change(body)
    path.write_bytes(format.seal(body))


def entry(body, name="image/users.npy"):
    return body["files"][name]


def move(old, new):
    return lambda body: body["files"].__setitem__(new, body["files"].pop(old))


HOSTILE = {
    "other format": lambda body: body.update(format="x"),
    "no format": lambda body: body.pop("format"),
    "newer version": lambda body: body.update(format_version=2),
    "version true": lambda body: body.update(format_version=True),
    "no files": lambda body: body.pop("files"),
    "files a list": lambda body: body.update(files=["image/users.npy"]),
    "modalities a list": lambda body: body.update(modalities=["image"]),
    "no users": lambda body: body.pop("users"),
    "users text": lambda body: body.update(users="all"),
    "users negative": lambda body: body["users"].update(rows=-1),
    "users many": lambda body: body["users"].update(rows=10**30),
    "items float": lambda body: body["items"].update(rows=11.0),
    "entry a number": lambda body: body["files"].update({"image/users.npy": 3}),
    "bytes text": lambda body: entry(body).update(bytes="720"),
    "bytes many": lambda body: entry(body).update(bytes=10**30),
    "hash a number": lambda body: entry(body).update(sha256=3),
    "shape many": lambda body: entry(body).update(shape=[10**12, 4]),
    "shape text": lambda body: entry(body).update(shape="37x4"),
    "dtype object": lambda body: entry(body).update(dtype="object"),
    "rows missing": lambda body: entry(body, "users.parquet").pop("rows"),
    "rows other": lambda body: entry(body, "users.parquet").update(rows=36),
    "climbs": move("image/users.npy", "../image/users.npy"),
    "climbs back": move("image/users.npy", "image/../image/users.npy"),
    "absolute": move("image/users.npy", "/etc/passwd"),
    "empty path": move("image/users.npy", ""),
    "null": move("image/users.npy", "image/\0"),
    "long path": move("image/users.npy", "x" * 5000),
    "folder as file": lambda body: body["files"].update(image=entry(body)),
    "users not listed": lambda body: body["files"].pop("image/users.npy"),
    "labels as users": lambda body: body["files"].update({"image/users.npy": entry(body, "image/labels.npy")}),
    "modality climbs": lambda body: body["modalities"].update({"../image": {}}),
    "modality empty": lambda body: body["modalities"].update({"": {}}),
    "modality not there": lambda body: body["modalities"].update({"text": {}}),
    "modality escapes": lambda body: body["modalities"].update({"\x1b[2J": {}}),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_manifests_are_refused(made, change):
    reseal(made, change)
    with pytest.raises(InputError) as caught:
        read.load(made)
    assert len(str(caught.value)) < 500
    assert "\x1b" not in str(caught.value)
    assert read.verify(made)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 9,
        b"{",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"9" * 10_000,
        b"NaN",
        b'{"a": 1e999}',
        b'"\xff"',
        b"null",
    ],
    ids=range(10),
)
def test_what_is_not_json_is_refused(made, data):
    (made / "manifest.json").write_bytes(data)
    with pytest.raises(InputError):
        read.load(made)
    assert read.verify(made)


def test_a_huge_manifest_is_not_read(made, monkeypatch):
    with open(made / "manifest.json", "ab") as file:
        file.truncate(format.MANIFEST_BYTES + 1)
    with pytest.raises(InputError, match="larger than"):
        read.load(made)


@pytest.mark.parametrize("name", ["manifest.json", "users.parquet", "image/users.npy", "image"])
def test_links_are_not_followed(made, tmp_path, name):
    os.rename(made / name, tmp_path / "elsewhere")
    (made / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError):
        read.load(made)


def test_pipes_are_not_read(made):
    (made / "image" / "users.npy").unlink()
    os.mkfifo(made / "image" / "users.npy")
    with pytest.raises(InputError, match="not a regular file"):
        read.load(made)


def npy(header, data=b"", version=b"\x01\x00"):
    text = header.encode()
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text + data


@pytest.mark.parametrize(
    "data",
    [
        npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n", b"x" * 8),
        npy("{'descr': '<f4', 'fortran_order': True, 'shape': (1,), }\n", b"x" * 4),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }\n", b"x" * 8),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (9999999999999999999999,), }\n", b"x" * 8),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1 1,), }\n", b"x" * 44),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (,1,), }\n", b"x" * 4),
        npy("{'descr': '<f1', 'fortran_order': False, 'shape': (1,), }\n", b"x"),
        npy("__import__('os').abort()\n"),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }\n", b"x" * 4, b"\x02\x00"),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }\n", b"x" * 3),
        b"\x93NUMPY\x01\x00\xff\xff{",
        b"",
    ],
    ids=range(12),
)
def test_hostile_arrays_are_refused(made, data):
    (made / "image" / "labels.npy").write_bytes(data)
    sha = hashlib.sha256(data).hexdigest()
    reseal(made, lambda body: entry(body, "image/labels.npy").update(bytes=len(data), sha256=sha))
    with pytest.raises(InputError, match="not an array"):
        read.load(made)


def test_hostile_tables_are_refused_when_they_are_read(made):
    for table in (
        pd.DataFrame({"row": np.arange(USERS)[::-1], "user_id": names()}),
        pd.DataFrame({"row": [f"{number}" for number in range(USERS)], "user_id": names()}),
        pd.DataFrame({"user_id": names()}),
    ):
        table.to_parquet(made / "users.parquet")
        data = (made / "users.parquet").read_bytes()
        facts = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        reseal(made, lambda body, facts=facts: entry(body, "users.parquet").update(facts))
        found = read.load(made)
        with pytest.raises(InputError, match=r"users\.parquet"):
            _ = found.user_ids


@pytest.mark.parametrize("name", ["image", "text_2", "bert-base.v1", "画像", "é"])
def test_modality_names(name):
    format.check_modality(name)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", ".partial", "scratch", "manifest.json", "a\n", "x" * 65])
def test_modality_names_that_are_no_folders(name, out):
    with pytest.raises(InputError, match="choose another name"):
        format.check_modality(name)


def test_nothing_is_saved_outside(out):
    with open_staging(out, resume=False, overwrite=False, identity={}) as staging:
        for name in ("../x.npy", "/x.npy", "image/../../x.npy", "scratch/../../x.npy", ""):
            with pytest.raises(InputError):
                staging.save(name, np.zeros(1))
    assert os.listdir(out.parent) == ["out.partial"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(st.dictionaries(st.text(), json_values, max_size=5), st.data())
@hypothesis_settings(max_examples=60, deadline=None)
def test_a_seal_holds_anything_and_shows_any_change(body, data):
    sealed = format.seal(body)
    opened = format.unseal(sealed)
    assert opened is not None
    assert format.seal(opened) == sealed
    bit = data.draw(st.integers(0, 8 * len(sealed) - 1))
    flipped = bytearray(sealed)
    flipped[bit // 8] ^= 1 << bit % 8
    assert format.unseal(bytes(flipped)) is None


@given(
    st.recursive(
        json_values,
        lambda inner: st.dictionaries(
            st.sampled_from(["files", "modalities", "users", "items", "rows", "shape", "image", "image/users.npy"]),
            inner,
        ),
    )
)
@hypothesis_settings(max_examples=60, deadline=None)
def test_any_manifest_is_answered_with_problems_not_with_a_crash(tmp_path_factory, body):
    root = str(tmp_path_factory.getbasetemp())
    found = list(read.problems(root, body if isinstance(body, dict) else {"files": body, "modalities": body}))
    assert all(isinstance(problem, str) and problem.isprintable() for problem in found)
