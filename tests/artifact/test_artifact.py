"""The output folder under kills, faults, rivals and hostile files.

Run as a program (`python -m tests.artifact.test_artifact FOLDER MODE STEP`), this file is the kill harness: it forks
a small run again and again, each killed just before another one of its system calls, and resumes each.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from gpu_init.artifact import format, publish, read
from gpu_init.artifact import rows as artifact_rows
from gpu_init.artifact import staging as artifact_staging
from gpu_init.artifact.objects import open_staging
from gpu_init.errors import InputError, ResourceError
from gpu_init.files import storage

USERS, ITEMS, WIDTH, CLUSTERS = 37, 11, 4, 3
IDENTITY = {
    "settings": {"lambda": 0.9, "clusters": CLUSTERS},
    "inputs": {"image": {"bytes": 3, "hash": "sha256:aa"}, "text": {"bytes": 4, "hash": "sha256:bb"}},
}


# A small run, as job.py does one.


def vectors(seed=0, users=USERS):
    return np.random.default_rng(seed).normal(size=(users, WIDTH)).astype(np.float32)


def manifest(users=USERS):
    return {
        "gpu_init_version": "1",
        "users": {"rows": users, "ids": "users.parquet"},
        "items": {"rows": ITEMS, "ids": "row numbers"},
        "modalities": {"image": {"width": WIDTH}},
    }


def work(staging, seed=0, step=5, each=None):
    """Everything between open and the end; `each` is called after every block."""
    if staging.complete:
        return staging._place.out
    if staging.finished("image/fit") is None:
        rng = np.random.default_rng(seed)
        staging.save("scratch/means.npy", rng.normal(size=(5, 2)))
        staging.save("image/centroids.npy", rng.normal(size=(CLUSTERS, WIDTH)).astype(np.float32))
        staging.save("image/labels.npy", rng.integers(-1, CLUSTERS, USERS).astype(np.int32))
        staging.finish("image/fit", {"scale": 1.5, "inertia": [3.0, 2.0]})
    assert staging.finished("image/fit") == {"scale": 1.5, "inertia": [3.0, 2.0]}
    write_rows(staging, vectors(seed), step, each)
    staging.save_table("users.parquet", pd.DataFrame({"row": np.arange(USERS), "user_id": names()}))
    return staging.commit(manifest())


def write_rows(staging, table, step=5, each=None):
    """Write the array of users in blocks of rows, going on after those that an earlier run noted."""
    staging.allocate("image/users.npy", table.shape, np.float32, "image/written")
    first = (staging.finished("image/written") or {"rows": 0})["rows"]
    with staging.adopting("image/users.npy") as written:
        for start in range(first, len(table), step):
            block = table[start : start + step]
            with artifact_rows.row_writer(os.path.join(staging.path, "image/users.npy"), start) as write:
                write(block)
            staging.finish("image/written", {"rows": start + len(block)})
            written(start + len(block))
            if each:
                each(start)


def names():
    return [f"u{number}" for number in range(USERS)]


def run(out, seed=0, resume=False, overwrite=False, identity=None, **how):
    identity = {**IDENTITY, "seed": seed} if identity is None else identity
    with open_staging(out, resume=resume, overwrite=overwrite, identity=identity) as staging:
        return work(staging, seed, **how)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture
def out(tmp_path):
    return tmp_path / "place" / "out"


@pytest.fixture
def made(out):
    run(out)
    return out


class StopError(Exception):
    pass


def stop_after(rows):
    def each(start):
        if start >= rows:
            raise StopError

    return each


# The whole way.


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


# Resume.


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


# What stands at the output's place.


def test_an_artifact_is_not_replaced_unasked(made):
    before = contents(made)
    with pytest.raises(InputError, match="already holds an artifact; --overwrite"):
        run(made, seed=1)
    with pytest.raises(InputError, match=r"settings\.clusters: 3 -> 9.*--overwrite"):
        run(made, resume=True, identity={**IDENTITY, "seed": 0, "settings": {"lambda": 0.9, "clusters": 9}})
    assert contents(made) == before
    assert os.listdir(made.parent) == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_resume_accepts_the_same_artifact(made, overwrite):
    before = made.stat().st_ino
    identity = {**IDENTITY, "seed": 0}
    with open_staging(made, resume=True, overwrite=overwrite, identity=identity) as staging:
        assert staging.complete
    assert made.stat().st_ino == before
    assert os.listdir(made.parent) == ["out"]


def test_resume_does_not_accept_a_damaged_artifact(made):
    (made / "image" / "labels.npy").write_bytes(b"")
    with pytest.raises(InputError, match="--overwrite"):
        run(made, resume=True)
    run(made, resume=True, overwrite=True)
    assert read.verify(made) == []


@pytest.mark.parametrize("can_exchange", [True, False])
def test_overwrite_replaces_at_the_end(made, tmp_path, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(storage, "exchange", lambda a, b: False)
    run(tmp_path / "other", seed=1)
    before = contents(made)
    run(made, seed=1, overwrite=True, each=lambda start: contents(made) == before or pytest.fail("changed too early"))
    assert contents(made) == contents(tmp_path / "other")
    assert os.listdir(made.parent) == ["out"]


@pytest.mark.parametrize("name", ["notes.txt", "manifest.json"])
@pytest.mark.parametrize("flags", [{}, {"overwrite": True}, {"resume": True, "overwrite": True}])
def test_what_is_not_an_artifact_is_never_touched(out, name, flags):
    out.mkdir(parents=True)
    (out / name).write_text('{"name": "a web page", "manifest_version": 3}')
    with pytest.raises(InputError, match=r"not an artifact|not a manifest"):
        run(out, **flags)
    assert os.listdir(out) == [name]
    assert os.listdir(out.parent) == ["out"]


def test_files_added_to_an_artifact_are_not_removed_with_it(made):
    (made / "mine").mkdir()
    (made / "mine" / "notes.txt").write_text("x")
    with pytest.raises(InputError, match=r"mine/notes\.txt"):
        run(made, seed=1, overwrite=True)
    assert (made / "mine" / "notes.txt").exists()


@pytest.mark.parametrize("beside", ["out.partial", ".out.replaced"])
def test_folders_beside_that_are_not_ours_are_not_removed(out, beside):
    folder = out.parent / beside
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="not left by gpu-init"):
        run(out, overwrite=True)
    assert os.listdir(out.parent) == [beside]
    assert os.listdir(folder) == ["thesis.tex"]


def test_an_output_that_is_no_place(tmp_path):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("n" * 300), tmp_path / "a\0b"):
        with pytest.raises(InputError):
            run(out)
    assert os.listdir(tmp_path) == ["file"]


def test_links_to_folders_are_followed(tmp_path):
    (tmp_path / "disk" / "vectors").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "vectors")
    assert run(tmp_path / "link") == str(tmp_path / "disk" / "vectors")
    assert (tmp_path / "link").is_symlink()
    assert read.verify(tmp_path / "link") == []
    assert os.listdir(tmp_path / "disk") == ["vectors"]


def test_a_folder_that_appears_meanwhile_is_not_touched_and_the_work_is_kept(out):
    def appear(start):
        out.mkdir(exist_ok=True)
        (out / "thesis.tex").write_text("x")

    with pytest.raises(InputError, match="not empty"):
        run(out, each=appear)
    assert os.listdir(out) == ["thesis.tex"]
    (out / "thesis.tex").unlink()
    with open_staging(out, resume=True, overwrite=False, identity={**IDENTITY, "seed": 0}) as staging:
        assert staging.complete
    assert read.verify(out) == []


def test_a_second_run_is_refused(out):
    with open_staging(out, resume=False, overwrite=False, identity=IDENTITY) as staging:
        before = contents(out.parent)
        for flags in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(InputError, match=rf"another run writes to {out} \(process {os.getpid()}\)"):
                run(out, **flags)
        assert contents(out.parent) == before
        work(staging)
    run(out, seed=1, overwrite=True)


# Where the output cannot be renamed.


@pytest.fixture
def inside(monkeypatch):
    monkeypatch.setattr(publish, "stays_in_place", os.path.isdir)


def test_a_mount_point_is_filled_from_inside(out, inside):
    (out / "lost+found").mkdir(parents=True)
    number = out.stat().st_ino
    run(out)
    assert read.verify(out) == []
    old = contents(out)
    with pytest.raises(StopError):
        run(out, seed=1, overwrite=True, each=stop_after(20))
    assert {name: data for name, data in contents(out).items() if not name.startswith(".partial")} == old
    assert read.verify(out) == []
    run(out, seed=1, overwrite=True, resume=True)
    np.testing.assert_array_equal(read.load(out)["image"].users, vectors(1))
    assert read.verify(out) == []
    assert sorted(os.listdir(out)) == ["image", "lost+found", "manifest.json", "users.parquet"]
    assert os.listdir(out.parent) == ["out"]
    assert out.stat().st_ino == number


def test_files_of_an_old_artifact_do_not_stay_inside(out, inside):
    out.mkdir(parents=True)
    with open_staging(out, resume=False, overwrite=False, identity={}) as staging:
        staging.save("old/centroids.npy", np.zeros((1, 1), np.float32))
        staging.commit({"modalities": {}, "users": {"rows": 0}, "items": {"rows": 0}})
    run(out, overwrite=True)
    assert sorted(os.listdir(out)) == ["image", "manifest.json", "users.parquet"]


def test_a_second_run_inside_is_refused(out, inside):
    out.mkdir(parents=True)
    with (
        open_staging(out, resume=False, overwrite=False, identity=IDENTITY),
        pytest.raises(InputError),
    ):
        run(out)
    (out / "mine.txt").write_text("x")
    with pytest.raises(InputError, match=r"mine\.txt"):
        run(out)


def test_mounts_are_seen():
    assert publish.stays_in_place("/proc")
    assert "/proc" in publish.mount_points()


def test_a_parent_that_takes_no_files(out, monkeypatch):
    out.mkdir(parents=True)
    real = os.access
    monkeypatch.setattr(publish.os, "access", lambda path, mode: path != str(out.parent) and real(path, mode))
    run(out)
    assert read.verify(out) == []
    if os.getuid() != 0:
        monkeypatch.undo()
        out.parent.chmod(0o555)
        try:
            run(out, seed=1, overwrite=True)
            with pytest.raises(InputError, match="cannot be written"):
                run(out.parent / "new")
        finally:
            out.parent.chmod(0o755)
        assert read.verify(out) == []


# A full disk, and other faults.


def fail_after(monkeypatch, calls, code=errno.ENOSPC, name="write"):
    """Let a system call fail for good after so many calls, as on a disk that has filled up."""
    real, left = getattr(os, name), [calls]

    def call(*given):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(code, os.strerror(code))
        return real(*given)

    monkeypatch.setattr(storage.os, name, call)


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


# Kills.


CALLS = (
    "write",
    "pwrite",
    "fsync",
    "fdatasync",
    "replace",
    "rename",
    "unlink",
    "mkdir",
    "rmdir",
    "truncate",
    "ftruncate",
)


def kill_before(number):
    """SIGKILL this process just before its so-manieth call that changes the disk."""
    left = [number]

    def counted(real):
        def call(*given, **named):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*given, **named)

        return call

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    storage.exchange = counted(storage.exchange)


def in_child(job):
    """Run in a fork; give the exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            job()
            code = 0
        except BaseException as error:  # to the parent's stderr, and never into the parent's code
            print(repr(error), file=sys.stderr)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def settle(root, mode):
    """What stood at the output's place before the run, as a mode has it."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    out = root / "out"
    if mode == "inside":
        publish.stays_in_place = os.path.isdir
        out.mkdir()
    if mode == "two renames":
        storage.exchange = lambda a, b: False
    if mode != "new":
        run(out, seed=7)
    return out


def whole(out, old, new):
    """Assert that what stands at the output's place is nothing, the old artifact or the new one."""
    if (out / "manifest.json").exists():
        assert read.verify(out) == []
        held = {name: data for name, data in contents(out).items() if not name.startswith(".partial")}
        assert held in (old, new)


def check_kill(root, mode, number, new):
    """Kill a run before one of its calls, look, resume it; tell whether the kill came before the run's end."""
    out = settle(root, mode)
    old, flags = contents(out), {"overwrite": mode != "new", "resume": True}

    def killed():
        kill_before(number)
        run(out, **flags)

    status = in_child(killed)
    assert status in (0, -signal.SIGKILL), status
    whole(out, old, new)
    if number % 3 == 1:  # killed again, while it resumes
        in_child(lambda: (kill_before(number // 2), run(out, **flags)))
        whole(out, old, new)
    if number % 5 == 2:  # another run came between, discarded this one, and found its own input wrong
        with (
            contextlib.suppress(InputError),
            open_staging(out, resume=False, overwrite=True, identity={}),
        ):
            raise InputError("bad")
        assert not (root / "out.partial").exists()
        whole(out, old, new)
    run(out, **flags)
    assert contents(out) == new
    assert os.listdir(root) == ["out"]
    return status != 0


def main(folder, mode, step):
    artifact_rows.SYNC_BYTES = 50
    root = Path(folder)
    run(root / "new" / "out")
    new, number, kills = contents(root / "new" / "out"), 0, 0
    while check_kill(root / "run", mode, number, new):
        kills += 1
        number += int(step)
    print(kills)


@pytest.mark.parametrize("step", [13, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", ["new", "exchange", "two renames", "inside"])
def test_killed_before_any_call_and_resumed_gives_the_same_bytes(tmp_path, mode, step):
    command = [sys.executable, "-m", "tests.artifact.test_artifact", str(tmp_path), mode, str(step)]
    root = Path(__file__).parents[2]
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) >= 100 // step


# Hostile and damaged artifacts.


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


if __name__ == "__main__":
    main(*sys.argv[1:])
