"""What a run writes is what is read, and its bytes do not depend on how it was written."""

import hashlib
import os

import numpy as np
import pytest

from gpu_init.artifact import read
from gpu_init.artifact import rows as artifact_rows
from gpu_init.artifact import staging as artifact_staging
from gpu_init.artifact.objects import open_staging
from gpu_init.errors import ResourceError
from tests.support.small_runs import CLUSTERS, IDENTITY, USERS, WIDTH, contents, names, run, vectors


def test_what_is_written_is_read(made):
    assert os.listdir(made.parent) == ["out"]
    found = read.load(made)
    assert list(found) == ["image"]
    assert len(found) == 1
    np.testing.assert_array_equal(found["image"].users, vectors())
    assert found["image"].centroids.shape == (CLUSTERS, WIDTH)
    assert found["image"].labels.dtype == np.int32
    assert found["image"].items is found["image"].items_mask is found["image"].item_labels is found.item_ids is None
    assert list(found.user_ids) == names()
    assert found.path == str(made)
    assert found.manifest["format"] == "gpu-init artifact"
    assert found.manifest["identity"] == {**IDENTITY, "seed": 0}
    entry = found.manifest["files"]["image/users.npy"]
    data = (made / "image" / "users.npy").read_bytes()
    expected = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "shape": [37, 4], "dtype": "float32"}
    assert entry == expected
    assert found.manifest["files"]["users.parquet"]["rows"] == USERS
    assert not any(name.startswith("scratch") for name in contents(made))
    assert read.verify(made) == []
    np.testing.assert_array_equal(np.load(made / "image" / "users.npy", allow_pickle=False), vectors())


def test_arrays_are_read_only(made):
    with pytest.raises(ValueError, match="read-only"):
        read.load(made)["image"].users[0, 0] = 1


def test_every_kind_of_array_survives(out):
    rng = np.random.default_rng(1)
    arrays = {
        "a/users.npy": rng.normal(size=(6, 3)).astype(np.float16),
        "a/centroids.npy": np.asfortranarray(rng.normal(size=(2, 3)).astype(np.float32)),
        "a/labels.npy": np.arange(12, dtype=np.int32)[::2],
        "a/items.npy": np.zeros((0, 3), np.float32),
        "a/items_mask.npy": np.zeros(0, bool),
        "a/item_labels.npy": np.zeros(0, np.int32),
    }
    with open_staging(out, resume=False, overwrite=False, identity={}) as staging:
        for name, array in arrays.items():
            staging.save(name, array)
            np.testing.assert_array_equal(staging.load(name), array)
            assert not staging.load(name).flags.writeable
        facts = {"users": {"rows": 6}, "items": {"rows": 0}, "modalities": {"a": {}}, "odd": "\udcff\u2028\x1b é"}
        staging.commit(facts)
    found = read.load(out)["a"]
    for name, array in arrays.items():
        part = getattr(found, name[2:-4])
        np.testing.assert_array_equal(part, array)
        assert part.dtype == array.dtype
    assert read.verify(out) == []


@pytest.mark.parametrize("step", [1, 7, USERS, 100])
def test_rows_do_not_depend_on_blocks(made, tmp_path, step):
    run(tmp_path / "other", step=step)
    assert contents(made) == contents(tmp_path / "other")


def test_an_array_is_hashed_while_and_after_its_rows_are_written(out, monkeypatch):
    monkeypatch.setattr(artifact_staging, "SYNC_BYTES", 100)
    table = vectors(users=500)
    with open_staging(out, resume=False, overwrite=False, identity={}) as staging:
        assert not staging.allocate("image/users.npy", table.shape, np.float32)
        path = os.path.join(staging.path, "image/users.npy")
        with staging.adopting("image/users.npy") as written:
            for start, stop in ((250, 500), (0, 250)):  # side by side, in any order, in blocks of any layout
                with artifact_rows.row_writer(path, start) as write:
                    write(np.asfortranarray(table[start : start + 100]))
                    write(table[start + 100 : stop])
                    write(table[:0])
                written(stop if start == 0 else 0)
        np.testing.assert_array_equal(staging.load("image/users.npy"), table)
        assert staging.allocate("image/users.npy", table.shape, np.float32)
        assert not staging.allocate("image/users.npy", (500, WIDTH), np.float16)
        with staging.adopting("image/users.npy"):
            pass
        staging.commit({"modalities": {}, "users": {"rows": 500}, "items": {"rows": 0}})
    assert read.verify(out) == []


def test_wrong_blocks_are_refused(out):
    with open_staging(out, resume=False, overwrite=False, identity={}) as staging:
        staging.allocate("image/users.npy", (4, 2), np.float32)
        path = os.path.join(staging.path, "image/users.npy")
        blocks = np.zeros((2, 3), np.float32), np.zeros((2, 2)), np.zeros(2, np.float32), np.zeros((4, 2), np.float32)
        with artifact_rows.row_writer(path, 1) as write:
            for block in blocks:
                with pytest.raises(ResourceError, match="not what was written"):
                    write(block)
            write(np.ones((3, 2), np.float32))
        os.truncate(path, 100)
        with pytest.raises(ResourceError, match="not what was written"), staging.adopting("image/users.npy"):
            pass
