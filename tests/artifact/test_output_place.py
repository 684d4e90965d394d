"""What stands at the output's place is replaced, filled from inside, or never touched."""

import os

import numpy as np
import pytest

from gpu_init.artifact import publish, read
from gpu_init.artifact.objects import open_staging
from gpu_init.errors import InputError
from gpu_init.files import storage
from tests.support.small_runs import IDENTITY, StopError, contents, run, stop_after, vectors, work


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
