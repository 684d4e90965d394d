"""Artifacts in other libraries' formats."""

import json
import os
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import gpu_init
from gpu_init import cli
from gpu_init.artifact import export
from gpu_init.artifact.objects import open_staging
from gpu_init.errors import InputError

USERS, ITEMS, WIDTH = 90, 40, 12


def run_job(folder, *flags, text_ids=False):
    """Two modalities, the second one with ids and two items missing; some users have no interaction."""
    rng = np.random.default_rng(5)
    users, items = rng.integers(0, USERS - 5, 400), rng.integers(0, ITEMS, 400)
    items[:ITEMS] = np.arange(ITEMS)
    table = {"user_id": pa.array([f"u{one}" for one in users]) if text_ids else pa.array(users), "item_id": items}
    pq.write_table(pa.table(table), folder / "clicks.parquet")
    np.save(folder / "image.npy", rng.standard_normal((ITEMS, WIDTH)).astype(np.float32))
    audio = rng.standard_normal((ITEMS, WIDTH)).astype(np.float32)
    audio[[3, 7]] = np.nan
    np.save(folder / "audio.npy", audio)
    command = ["run", "--interactions", str(folder / "clicks.parquet"), "--out", str(folder / "out"), "--clusters=3"]
    command += [f"--features={name}={folder / name}.npy" for name in ("image", "audio")]
    assert cli.main([*command, *([] if text_ids else [f"--users={USERS}"]), *flags]) == 0
    return gpu_init.load(folder / "out")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return run_job(tmp_path_factory.mktemp("plain"), "--dim=5", "--cluster-on=items")


@pytest.fixture(scope="module")
def with_text_ids(tmp_path_factory):
    return run_job(tmp_path_factory.mktemp("text"), "--dtype=float16", text_ids=True)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(export, "BLOCK_BYTES", 1000)


def parts(artifact):
    return {
        f"{name}.{part}": getattr(artifact[name], part)
        for name in artifact
        for part in ("users", "centroids", "labels", "items", "items_mask", "item_labels")
        if getattr(artifact[name], part) is not None
    }


@pytest.mark.parametrize("which", ["made", "with_text_ids"])
def test_safetensors_hold_the_same_arrays(which, request, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    artifact = request.getfixturevalue(which)
    path = export.export(artifact.path, "safetensors", tmp_path / "x.safetensors")
    read = safetensors.load_file(path)
    expected = parts(artifact)
    assert set(read) == set(expected)  # rows are the ids in the one, ids are text in the other
    assert len(expected) == (12 if which == "made" else 6)
    for name, array in expected.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)


def test_safetensors_are_aligned_and_hold_ids_that_are_numbers(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    (tmp_path / "ids").mkdir()
    table = pa.table({"user_id": [7, 7, 900, 31], "item_id": [0, 1, 1, 2]})
    pq.write_table(table, tmp_path / "clicks.parquet")
    np.save(tmp_path / "image.npy", np.eye(3, 5, dtype=np.float32))
    flags = [f"--interactions={tmp_path}/clicks.parquet", f"--features=image={tmp_path}/image.npy", "--clusters=2"]
    assert cli.main(["run", *flags, f"--out={tmp_path}/out"]) == 0
    path = export.export(tmp_path / "out", "safetensors")
    assert path == str(tmp_path / "out.safetensors")
    np.testing.assert_array_equal(safetensors.load_file(path)["user_ids"], [7, 31, 900])
    data = (tmp_path / "out.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    sizes = {"F32": 4, "I64": 8, "I32": 4}
    for name, entry in header.items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % sizes[entry["dtype"]] == 0


@pytest.mark.parametrize("which", ["made", "with_text_ids"])
def test_pt_holds_the_same_arrays_and_ids(which, request, tmp_path, recwarn):
    torch = pytest.importorskip("torch")
    artifact = request.getfixturevalue(which)
    read = torch.load(export.export(artifact.path, "pt", tmp_path / "x.pt"), weights_only=True)
    assert not [one for one in recwarn if "writable" in str(one.message)]
    for name, array in parts(artifact).items():
        modality, part = name.split(".")
        np.testing.assert_array_equal(read[modality][part].numpy(), array)
    assert read.get("user_ids") == (None if which == "made" else list(artifact.user_ids))


@pytest.mark.parametrize("which", ["made", "with_text_ids"])
def test_parquet_holds_the_same_arrays_and_ids(which, request, tmp_path):
    artifact = request.getfixturevalue(which)
    folder = export.export(artifact.path, "parquet", tmp_path / "x")
    users, items, centroids = (pq.read_table(f"{folder}/{name}.parquet") for name in ("users", "items", "centroids"))
    ids = np.arange(USERS) if which == "made" else artifact.user_ids
    assert users["user_id"].to_pylist() == list(ids)
    assert items["item_id"].to_pylist() == list(range(ITEMS))
    assert pq.read_metadata(f"{folder}/users.parquet").num_row_groups > 1
    for name, modality in artifact.items():
        np.testing.assert_array_equal(np.stack(users[name].to_pandas()), modality.users)
        np.testing.assert_array_equal(users[f"{name}_label"], modality.labels)
        np.testing.assert_array_equal(np.stack(centroids[name].to_pandas()), modality.centroids)
        assert (name in items.column_names) == (which == "made")
        if which == "made":
            vectors = items[name].to_pandas()
            np.testing.assert_array_equal(vectors.notna(), modality.items_mask)
            np.testing.assert_array_equal(np.stack(vectors.dropna()), modality.items[modality.items_mask])
            np.testing.assert_array_equal(items[f"{name}_label"], modality.item_labels)


def test_modalities_may_have_different_numbers_of_clusters(tmp_path):
    with open_staging(tmp_path / "out", resume=False, overwrite=False, identity={}) as staging:
        for name, clusters in (("image", 2), ("text", 3)):
            staging.save(f"{name}/users.npy", np.zeros((4, 2), np.float32))
            staging.save(f"{name}/labels.npy", np.zeros(4, np.int32))
            staging.save(f"{name}/centroids.npy", np.full((clusters, 2), clusters, np.float32))
        staging.commit({"users": {"rows": 4}, "items": {"rows": 5}, "modalities": {"image": {}, "text": {}}})
    table = pq.read_table(f"{export.export(tmp_path / 'out', 'parquet')}/centroids.parquet")
    assert table["cluster"].to_pylist() == [0, 1, 2]
    assert table["image"].to_pylist() == [[2, 2], [2, 2], None]
    assert table["text"].to_pylist() == [[3, 3]] * 3


def test_parquet_is_read_back_as_features(made, tmp_path):
    """The exported items are features again, those without the modality left out."""
    folder = export.export(made.path, "parquet", tmp_path / "x")
    table = pq.read_table(f"{folder}/items.parquet", columns=["item_id", "audio"])
    frame = table.to_pandas().dropna()
    assert len(frame) == ITEMS - 2
    assert isinstance(frame, pd.DataFrame)
    users = pq.read_schema(f"{folder}/users.parquet").field("image").type
    assert (users.list_size, users.value_type) == (5, pa.float32())


def left(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", list(export.FORMATS))
def test_overwrite_is_asked_for_and_replaces_whole(made, with_text_ids, tmp_path, kind):
    if kind == "pt":
        pytest.importorskip("torch")
    place = tmp_path / "x"
    export.export(made.path, kind, place)
    with pytest.raises(InputError, match="already there.*--overwrite"):
        export.export(made.path, kind, place)
    export.export(with_text_ids.path, kind, place, overwrite=True)
    export.export(with_text_ids.path, kind, tmp_path / "y")
    assert left(tmp_path) == ["x", "y"]
    if kind != "parquet":
        assert place.stat().st_size == (tmp_path / "y").stat().st_size
    else:
        assert left(place) == ["centroids.parquet", "items.parquet", "users.parquet"]
        assert "image_label" not in pq.read_schema(place / "items.parquet").names


@pytest.mark.parametrize("kind", list(export.FORMATS))
def test_nothing_is_left_of_an_export_that_fails(made, tmp_path, kind, monkeypatch):
    if kind == "pt":
        pytest.importorskip("torch")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export.storage, "sync_dir", fail)
    monkeypatch.setattr(export.storage.os, "fsync", fail)
    with pytest.raises(gpu_init.ResourceError, match="No space left"):
        export.export(made.path, kind, tmp_path / "x")
    assert left(tmp_path) == []


def test_places_that_are_refused(made, tmp_path):
    with pytest.raises(InputError, match="inside the artifact"):
        export.export(made.path, "parquet", f"{made.path}/x")
    with pytest.raises(InputError, match="no such folder"):
        export.export(made.path, "parquet", tmp_path / "no" / "x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("x")
    os.symlink(tmp_path / "mine", tmp_path / "link")
    for name, kind in (("mine", "parquet"), ("mine", "safetensors"), ("link", "parquet"), ("link", "safetensors")):
        with pytest.raises(InputError, match="move it away"):
            export.export(made.path, kind, tmp_path / name, overwrite=True)
    assert left(tmp_path / "mine") == ["diary.txt"]
    with pytest.raises(InputError, match="not an artifact"):
        export.export(tmp_path, "parquet")


def test_the_command(made, tmp_path, capsys, monkeypatch):
    assert cli.main(["export", made.path, "--format=parquet", f"--out={tmp_path}/x"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/x\n"
    assert cli.main(["export", made.path, "--format=csv"]) == 2
    assert "wanted is safetensors, pt, parquet" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "torch", None)
    assert cli.main(["export", made.path, "--format=pt", f"--out={tmp_path}/y"]) == 2
    assert "pip install 'gpu-init[torch]'" in capsys.readouterr().err
    assert left(tmp_path) == ["x"]
