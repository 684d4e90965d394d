"""An unfinished run is resumed or discarded, also after a full disk and other faults."""

import errno
import os

import numpy as np
import pytest

from gpu_init.artifact import read
from gpu_init.artifact import rows as artifact_rows
from gpu_init.artifact.objects import open_staging
from gpu_init.errors import InputError, ResourceError
from gpu_init.files import storage
from tests.support.small_runs import (
    IDENTITY,
    USERS,
    WIDTH,
    StopError,
    contents,
    fail_after,
    run,
    stop_after,
    vectors,
    work,
    write_rows,
)


def test_resume_goes_on_from_durable_rows(out, made, tmp_path):
    other, begun = tmp_path / "other", []
    with pytest.raises(StopError):
        run(other, each=stop_after(20))
    assert not other.exists()
    assert sorted(os.listdir(tmp_path)) == ["other.partial", "place"]
    with open(tmp_path / "other.partial" / "image" / "users.npy", "r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"???")  # what a kill leaves beyond the durable rows
    run(other, resume=True, each=begun.append)
    assert begun[0] == 25
    assert contents(other) == contents(made)
    assert sorted(os.listdir(tmp_path)) == ["other", "place"]


@pytest.mark.parametrize("damage", ["gone", "shorter"])
def test_rows_that_are_gone_are_not_counted(out, made, tmp_path, damage):
    """Nor are they later, when the run is stopped again just after it made the array anew."""
    other, begun = tmp_path / "other", []
    with pytest.raises(StopError):
        run(other, each=stop_after(20))
    path = tmp_path / "other.partial" / "image" / "users.npy"
    os.truncate(path, 150)
    if damage == "gone":
        path.unlink()
    identity = {**IDENTITY, "seed": 0}
    for there in (False, True):
        with open_staging(other, resume=True, overwrite=False, identity=identity) as staging:
            assert staging.resumed
            assert staging.allocate("image/users.npy", (USERS, WIDTH), np.float32, "image/written") == there
            assert staging.finished("image/written") is None
    run(other, resume=True, each=begun.append)
    assert begun[0] == 0
    assert contents(other) == contents(made)


def test_resume_skips_what_is_finished(out):
    with open_staging(out, resume=False, overwrite=False, identity=IDENTITY) as staging:
        write_rows(staging, vectors())
        staging.finish("step", {"n": 1})
        assert staging.finished("other") is None
    with open_staging(out, resume=True, overwrite=False, identity=IDENTITY) as staging:
        assert staging.resumed
        assert not staging.discarded
        assert staging.finished("step") == {"n": 1}
        write_rows(staging, vectors(), each=lambda start: pytest.fail("written again"))
    assert contents(f"{out}.partial")["image/users.npy"].endswith(vectors().tobytes())


def test_resume_names_what_changed(out):
    with pytest.raises(StopError):
        run(out, each=stop_after(0))
    changed = {
        "settings": {"lambda": 0.9, "clusters": 16, "dim": 64},
        "inputs": {"image": {"bytes": 3, "hash": "sha256:cc"}, "users": {}},
        "seed": 0,
    }
    with pytest.raises(InputError) as caught:
        run(out, resume=True, identity=changed)
    message = str(caught.value)
    for part in (
        "settings.clusters: 3 -> 16",
        "settings.dim: not given then",
        "input image: content changed",
        "input text: no longer given",
        "input users: not given then",
    ):
        assert part in message
    assert "lambda" not in message
    assert os.listdir(out.parent) == ["out.partial"]
    run(out, resume=True)
    assert read.verify(out) == []


def test_without_resume_an_unfinished_run_is_discarded(out, made, tmp_path):
    other = tmp_path / "other"
    with pytest.raises(StopError):
        run(other, each=stop_after(20))
    (tmp_path / "other.partial" / "litter.npy").write_bytes(b"x")
    with open_staging(other, resume=False, overwrite=False, identity={**IDENTITY, "seed": 0}) as staging:
        assert staging.discarded
        assert not staging.resumed
        work(staging)
    assert contents(other) == contents(made)


@pytest.mark.parametrize("damage", ["missing", "empty", "torn", "flipped", "other json", "data missing"])
def test_a_journal_that_cannot_be_used_means_nothing_to_resume(out, made, tmp_path, damage):
    other = tmp_path / "other"
    with pytest.raises(StopError):
        run(other, each=stop_after(20))
    journal = tmp_path / "other.partial" / "journal.json"
    data = journal.read_bytes()
    if damage == "missing":
        journal.unlink()
    elif damage == "data missing":
        (tmp_path / "other.partial" / "image" / "labels.npy").unlink()
    else:
        flipped = data.replace(b"1.5", b"1.4")
        journal.write_bytes({"empty": b"", "torn": data[:-9], "flipped": flipped, "other json": b"[[]]"}[damage])
    with open_staging(other, resume=True, overwrite=False, identity={**IDENTITY, "seed": 0}) as staging:
        assert not staging.resumed
        assert staging.discarded
        work(staging)
    assert contents(other) == contents(made)


def test_an_input_error_leaves_nothing(tmp_path):
    def refuse(start):
        raise InputError("bad")

    with pytest.raises(InputError, match="bad"):
        run(tmp_path / "new" / "parents" / "out", each=refuse)
    assert os.listdir(tmp_path) == []


def test_an_input_error_keeps_the_run_that_it_resumed(out):
    with pytest.raises(StopError):
        run(out, each=stop_after(20))
    with (
        pytest.raises(InputError),
        open_staging(out, resume=True, overwrite=False, identity={**IDENTITY, "seed": 0}),
    ):
        raise InputError("bad")
    assert os.listdir(out.parent) == ["out.partial"]


@pytest.mark.parametrize("name", ["write", "pwrite", "fsync", "fdatasync", "replace"])
def test_a_full_disk_is_said_and_the_run_can_be_resumed(made, tmp_path, monkeypatch, name):
    monkeypatch.setattr(artifact_rows, "SYNC_BYTES", 50)
    other, failures = tmp_path / "other", 0
    for calls in range(0, 200, 3):
        message = None
        with monkeypatch.context() as patch:
            fail_after(patch, calls, name=name)
            try:
                run(other, resume=True)
            except ResourceError as error:
                message = str(error)
        if message is None:
            break
        failures += 1
        assert "are free" in message
        assert not other.exists() or read.verify(other) == []
    assert failures >= 2
    run(other, resume=True)
    assert contents(other) == contents(made)
    assert sorted(os.listdir(tmp_path)) == ["other", "place"]


def test_too_little_disk_is_seen_before_the_rows(out, monkeypatch):
    monkeypatch.setattr(storage, "free_bytes", lambda path: 1000)
    staging = open_staging(out, resume=False, overwrite=False, identity={})
    with staging, pytest.raises(ResourceError, match="4,000 bytes are needed, 1,000 are free"):
        staging.allocate("image/users.npy", (1000, 1), np.float32)


def test_rows_that_are_written_need_no_room(out, monkeypatch):
    with open_staging(out, resume=False, overwrite=False, identity={}) as staging:
        staging.allocate("image/users.npy", (1 << 20, 1), np.float32)
        with artifact_rows.row_writer(os.path.join(staging.path, "image/users.npy"), 0) as write:
            write(np.ones((1 << 19, 1), np.float32))
        monkeypatch.setattr(storage, "free_bytes", lambda path: 9 << 18)
        staging.require_room(4 << 20)
        with pytest.raises(ResourceError, match="bytes are needed"):
            staging.require_room(5 << 20)


def test_a_folder_that_became_read_only(out, monkeypatch):
    with open_staging(out, resume=False, overwrite=False, identity={}) as staging:
        fail_after(monkeypatch, 0, errno.EROFS)
        with pytest.raises(InputError, match="Read-only"):
            staging.save("image/labels.npy", np.zeros(3, np.int32))
