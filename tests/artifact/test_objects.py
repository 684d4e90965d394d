"""Inputs and outputs in object storage, on a real server that speaks HTTP, and fails."""

from __future__ import annotations

import importlib.util
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import gpu_init
from gpu_init import cli
from gpu_init.artifact import format, objects, read, staging
from gpu_init.errors import InputError, ResourceError
from gpu_init.files import remote
from tests.support import store

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("s3fs") is None or importlib.util.find_spec("moto") is None, reason="needs s3fs and moto"
)

USERS, ITEMS, WIDTH = 400, 50, 12
ROOT = f"s3://{store.BUCKET}"


@pytest.fixture(scope="module")
def proxy():
    with store.serving() as proxy:
        yield proxy


@pytest.fixture
def bucket(proxy, tmp_path, monkeypatch):
    """Point clients to an empty bucket; give its file system."""
    import s3fs

    for name, value in store.environment(proxy).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    for cached in (remote._copy, remote._copies, read._copied):
        cached.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()
    proxy.fault = lambda number, method, path: None
    files = s3fs.S3FileSystem(use_listings_cache=False)
    if files.exists(store.BUCKET):
        files.rm(store.BUCKET, recursive=True)
    files.mkdir(store.BUCKET)
    yield files
    proxy.fault = lambda number, method, path: None


@pytest.fixture
def data(tmp_path, bucket):
    """Put a job's inputs on a disk and in the store; give the folder on the disk."""
    rng = np.random.default_rng(0)
    users = np.concatenate([np.arange(USERS), rng.integers(0, USERS, 1600)])
    log = pd.DataFrame({"user_id": users, "item_id": rng.integers(0, ITEMS, len(users))})
    log["weight"] = rng.integers(1, 5, len(log))
    folder = tmp_path / "data"
    (folder / "log").mkdir(parents=True)
    log[:900].to_parquet(folder / "log" / "a.parquet", row_group_size=500)
    log[900:].to_parquet(folder / "log" / "b.parquet", row_group_size=600)
    log.to_csv(folder / "log.csv", index=False)
    log.to_csv(folder / "log.tsv.gz", index=False, sep="\t")
    for name in ("image", "text"):
        values = rng.normal(size=(ITEMS, WIDTH)).astype(np.float32)
        np.save(folder / f"{name}.npy", values)
        pd.DataFrame(values, columns=[f"f{n}" for n in range(WIDTH)]).to_parquet(folder / f"{name}.parquet")
    bucket.put(str(folder), f"{store.BUCKET}/data", recursive=True)
    return folder


def arguments(root, out, *flags, log="log", suffix="npy"):
    inputs = [
        f"--interactions={root}/{log}",
        *(f"--features={name}={root}/{name}.{suffix}" for name in ("image", "text")),
    ]
    return ["run", *inputs, f"--users={USERS}", "--weight-column=weight", "--clusters=4", f"--out={out}", *flags]


def contents(folder):
    """Every file of an artifact on a disk but the manifest."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file() and path.name != format.MANIFEST]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def stored(bucket, name="out"):
    """The same of one in the store, where it has to be whole, and nothing beside it."""
    root = f"{store.BUCKET}/{name}/"
    found = {path.removeprefix(root): bucket.cat_file(path) for path in bucket.find(root)}
    manifest = format.parse_manifest(name, found.pop(format.MANIFEST))
    assert set(manifest["files"]) == set(found)
    return found


@pytest.mark.parametrize(
    ("log", "suffix"),
    [
        ("log", "npy"),
        ("log.tsv.gz", "parquet"),
        pytest.param("log.csv", "npy", marks=pytest.mark.slow),
        pytest.param("log/*.parquet", "npy", marks=pytest.mark.slow),
    ],
)
def test_a_job_in_the_store_makes_what_one_on_a_disk_makes(log, suffix, data, bucket, tmp_path):
    assert cli.main(arguments(data, tmp_path / "here", log=log, suffix=suffix)) == 0
    assert cli.main(arguments(f"{ROOT}/data", f"{ROOT}/out/", log=log, suffix=suffix)) == 0
    assert stored(bucket) == contents(tmp_path / "here")
    assert not os.listdir(tmp_path / "tmp" / f"gpu-init-{os.getuid()}")


def test_a_job_file_in_the_store_names_its_inputs_from_where_it_is(data, bucket, tmp_path):
    text = f'interactions = "log"\nusers = {USERS}\nout = "../out"\nclusters = 4\n[features]\nimage = "image.npy"\n'
    bucket.pipe_file(f"{store.BUCKET}/data/job.toml", text.replace("../", "").encode())
    assert cli.main(["run", f"{ROOT}/data/job.toml"]) == 0
    assert "image/users.npy" in stored(bucket, "data/out")


def test_the_artifact_is_opened_inspected_reported_and_assigned_by_from_the_store(
    data, bucket, proxy, tmp_path, capsys
):
    assert cli.main(arguments(f"{ROOT}/data", f"{ROOT}/out")) == 0
    before = proxy.sent
    assert cli.main(["inspect", f"{ROOT}/out"]) == 0
    assert proxy.sent - before < 2 * bucket.size(f"{store.BUCKET}/out/{format.MANIFEST}")
    made = gpu_init.load(f"{ROOT}/out")
    assert made.path == f"{ROOT}/out"
    assert made["image"].users.shape == (USERS, WIDTH)
    assert cli.main(["inspect", f"{ROOT}/out", "--verify"]) == 0
    assert "every file matches its hash" in capsys.readouterr().out
    assert cli.main(["report", f"{ROOT}/out"]) == 0
    assert capsys.readouterr().out == f"{ROOT}/out/report.html\n"
    assert bucket.cat_file(f"{store.BUCKET}/out/report.html").startswith(b"<!doctype html>")
    assert cli.main(["assign", f"{ROOT}/out", f"--interactions={ROOT}/data/log", f"--out={ROOT}/new"]) == 0
    again, before = stored(bucket, "new"), stored_but_report(bucket)
    assert {name: again[name] for name in before if "users" in name} == {
        name: content for name, content in before.items() if "users" in name
    }
    assert "name a place on a disk" in refused(capsys, "export", f"{ROOT}/out", "--format=parquet")
    assert cli.main(["export", f"{ROOT}/out", "--format=parquet", f"--out={tmp_path}/tables"]) == 0
    assert len(pd.read_parquet(tmp_path / "tables" / "users.parquet")) == USERS
    content = bucket.cat_file(f"{store.BUCKET}/out/image/users.npy")
    bucket.pipe_file(f"{store.BUCKET}/out/image/users.npy", content[:-1] + bytes([content[-1] ^ 1]))
    read._copied.cache_clear()
    assert "sha256" in read.verify(f"{ROOT}/out")[0]


def stored_but_report(bucket):
    bucket.rm_file(f"{store.BUCKET}/out/report.html")
    return stored(bucket)


def test_parquet_is_read_by_column_and_row_group(bucket, proxy, tmp_path):
    rng = np.random.default_rng(0)
    log = pd.DataFrame({"user_id": np.arange(200_000) % USERS, "item_id": rng.integers(0, ITEMS, 200_000)})
    wide = log.assign(**{f"extra{n}": rng.random(len(log)) for n in range(40)})
    wide.to_parquet(tmp_path / "wide.parquet", row_group_size=50_000)
    np.save(tmp_path / "image.npy", rng.normal(size=(ITEMS, WIDTH)).astype(np.float32))
    bucket.put(str(tmp_path / "wide.parquet"), f"{store.BUCKET}/data/wide.parquet")
    before = proxy.sent
    features = f"--features=image={tmp_path}/image.npy"
    inputs = [f"--interactions={ROOT}/data/wide.parquet", features, f"--users={USERS}", f"--out={tmp_path}/out"]
    assert cli.main(["run", *inputs]) == 0
    assert proxy.sent - before < (tmp_path / "wide.parquet").stat().st_size // 10


@pytest.mark.parametrize(
    "kind", ["cut", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("error", "refused", "slow"))]
)
def test_a_store_that_fails_now_and_then_changes_nothing(kind, data, bucket, proxy, tmp_path):
    assert cli.main(arguments(data, tmp_path / "here")) == 0
    dice = random.Random(kind)
    proxy.fault = lambda number, method, path: kind if dice.random() < (0.03 if kind == "slow" else 0.15) else None
    assert cli.main(arguments(f"{ROOT}/data", f"{ROOT}/out")) == 0
    proxy.fault = lambda number, method, path: None
    assert stored(bucket) == contents(tmp_path / "here")


def test_a_store_that_is_gone_ends_the_job_to_be_resumed(data, bucket, proxy, tmp_path, capsys, monkeypatch):
    import s3fs

    assert cli.main(arguments(data, tmp_path / "here")) == 0
    monkeypatch.setattr(remote, "ATTEMPTS", 1)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    gone = []

    def fault(number, method, path):
        gone.extend([path] if method == "PUT" and "text/users.npy" in path else [])
        return "refused" if gone else None

    proxy.fault = fault
    capsys.readouterr()
    assert cli.main(arguments(f"{ROOT}/data", f"{ROOT}/out")) == 3
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"gpu-init: {ROOT}/out/")
    assert "--resume" in said
    proxy.fault = lambda number, method, path: None
    names = [path.removeprefix(f"{store.BUCKET}/out/") for path in bucket.find(f"{store.BUCKET}/out")]
    assert all(name.startswith(".partial/") for name in names)
    assert ".partial/image/users.npy" in names
    assert cli.main(arguments(f"{ROOT}/data", f"{ROOT}/out", "--resume")) == 0
    assert stored(bucket) == contents(tmp_path / "here")


def test_a_run_is_resumed_on_another_machine(data, bucket, proxy, tmp_path, monkeypatch, capsys):
    assert cli.main(arguments(data, tmp_path / "here")) == 0
    interrupted(bucket, monkeypatch, "text/labels.npy")
    elsewhere(tmp_path, monkeypatch)
    capsys.readouterr()
    assert cli.main(arguments(f"{ROOT}/data", f"{ROOT}/out", "--resume")) == 0
    said = capsys.readouterr().err
    assert "going on with the unfinished run" in said
    assert "cluster image" not in said
    assert stored(bucket) == contents(tmp_path / "here")


def interrupted(bucket, monkeypatch, at):
    """Run the job until it would copy a file to the store."""
    upload = remote.upload

    class KilledError(BaseException):
        pass

    def killed(path, url):
        if url.endswith(at):
            raise KilledError
        upload(path, url)

    with monkeypatch.context() as patched:
        patched.setattr(remote, "upload", killed)
        with pytest.raises(KilledError):
            cli.main(arguments(f"{ROOT}/data", f"{ROOT}/out"))


def elsewhere(tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "other"))


def test_an_unfinished_run_is_discarded_unless_it_is_resumed(data, bucket, tmp_path, monkeypatch, capsys):
    interrupted(bucket, monkeypatch, "text/labels.npy")
    elsewhere(tmp_path, monkeypatch)
    capsys.readouterr()
    assert cli.main(arguments(f"{ROOT}/data", f"{ROOT}/out")) == 0
    assert "an unfinished run was discarded" in capsys.readouterr().err
    assert cli.main(arguments(data, tmp_path / "here")) == 0
    assert stored(bucket) == contents(tmp_path / "here")


def test_an_older_run_gives_way_to_a_newer_one(data, bucket, tmp_path, monkeypatch, capsys):
    write, done = remote.write, []

    def overtaken(url, data):
        write(url, data)
        if url.endswith(format.JOURNAL) and not done:
            done.append(url)
            elsewhere(tmp_path, monkeypatch)
            assert cli.main(arguments(f"{ROOT}/data", f"{ROOT}/out")) == 0

    monkeypatch.setattr(remote, "write", overtaken)
    assert cli.main(arguments(f"{ROOT}/data", f"{ROOT}/out")) == 2
    assert "another run has taken over" in capsys.readouterr().err.splitlines()[-1]
    assert cli.main(arguments(data, tmp_path / "here")) == 0
    assert stored(bucket) == contents(tmp_path / "here")


def test_what_stands_there_is_replaced_only_when_asked(data, bucket, tmp_path, capsys):
    job = arguments(f"{ROOT}/data", f"{ROOT}/out")
    assert cli.main(job) == 0
    before = stored(bucket)
    assert cli.main([*job, "--resume"]) == 0
    capsys.readouterr()
    assert cli.main(job) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"gpu-init: {ROOT}/out already holds an artifact; --overwrite replaces it."
    )
    assert stored(bucket) == before
    assert cli.main([*job, "--overwrite", "--lambda=0.5", "--dim=3"]) == 0
    assert stored(bucket).keys() - before.keys() == {
        f"{name}/items{part}.npy" for name in ("image", "text") for part in ("", "_mask")
    }
    assert cli.main([*job, "--overwrite"]) == 0
    assert stored(bucket) == before
    bucket.pipe_file(f"{store.BUCKET}/out/mine", b"")
    assert cli.main([*job, "--overwrite"]) == 2
    bucket.rm_file(f"{store.BUCKET}/out/{format.MANIFEST}")
    capsys.readouterr()
    assert cli.main(job) == 2
    assert "not empty and not an artifact" in capsys.readouterr().err


@pytest.mark.parametrize(
    "at", [9, *(pytest.param(at, marks=pytest.mark.slow) for at in (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11))]
)
def test_a_run_killed_while_it_replaces_another_is_ended_by_the_next(at, data, bucket, tmp_path, monkeypatch):
    """Whatever request of the end was its last: what stands there is no artifact, or a whole one."""
    assert cli.main(arguments(f"{ROOT}/data", f"{ROOT}/out", "--dim=3")) == 0
    job = arguments(f"{ROOT}/data", f"{ROOT}/out", "--overwrite")
    calls = []

    class KilledError(BaseException):
        pass

    call, publish = remote._call, objects.ObjectStorage.publish

    def counted(url, function):
        calls.append(url)
        if len(calls) > 3 * at:
            raise KilledError
        return call(url, function)

    def watched(place, manifest, **how):
        monkeypatch.setattr(remote, "_call", counted)
        publish(place, manifest, **how)

    with monkeypatch.context() as patched:
        patched.setattr(objects.ObjectStorage, "publish", watched)
        with pytest.raises(KilledError):
            cli.main(job)
    monkeypatch.setattr(remote, "_call", call)
    if bucket.exists(f"{store.BUCKET}/out/{format.MANIFEST}"):
        assert read.verify(f"{ROOT}/out") == []
    if at % 2:
        elsewhere(tmp_path, monkeypatch)
    read._copied.cache_clear()
    assert cli.main([*job, "--resume"] if at % 3 else job) == 0
    assert cli.main(arguments(data, tmp_path / "here")) == 0
    assert stored(bucket) == contents(tmp_path / "here")


PROGRAM = "from gpu_init import cli; cli.program()"


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_processes_are_resumed_to_the_same_bytes(kills, data, bucket, tmp_path):
    assert cli.main(arguments(data, tmp_path / "here")) == 0
    dice = random.Random(kills)
    job = [*arguments(f"{ROOT}/data", f"{ROOT}/out"), "--resume", "--overwrite"]
    begun = time.monotonic()
    subprocess.run([sys.executable, "-c", PROGRAM, *job], check=True, capture_output=True)
    whole = time.monotonic() - begun
    assert stored(bucket) == contents(tmp_path / "here")
    bucket.rm(f"{store.BUCKET}/out", recursive=True)
    for number in range(kills):
        folder = tmp_path / f"tmp{number}"
        folder.mkdir()
        environ = {**os.environ, "TMPDIR": str(folder if number % 2 else tmp_path / "tmp")}
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *job], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environ
        )
        time.sleep(whole * dice.uniform(0.3, 1.0))
        process.send_signal(signal.SIGKILL if number % 2 else signal.SIGTERM)
        assert process.wait() in (0, -signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM)
        if bucket.exists(f"{store.BUCKET}/out/{format.MANIFEST}"):
            read._copied.cache_clear()
            assert read.verify(f"{ROOT}/out") == []
            if number % 3 == 0:  # what the run had yet to remove is the next one's to remove
                continue
            bucket.rm(f"{store.BUCKET}/out", recursive=True)
    subprocess.run([sys.executable, "-c", PROGRAM, *job], check=True, capture_output=True)
    assert stored(bucket) == contents(tmp_path / "here")


def refused(capsys, *job):
    capsys.readouterr()
    assert cli.main(list(job)) == 2
    said = capsys.readouterr().err.splitlines()
    return [line for line in said if line.startswith("gpu-init: ")][-1]


def test_wrong_places_are_refused(data, bucket, capsys, tmp_path, monkeypatch):
    import s3fs

    here = arguments(data, tmp_path / "out")
    missing = [*here, f"--interactions={ROOT}/nothing.parquet"]
    assert refused(capsys, *missing) == f"gpu-init: {ROOT}/nothing.parquet: there is no such object."
    assert "no objects there that end in .parquet" in refused(capsys, *here, f"--interactions={ROOT}/data/log/*.none")
    assert "no such object" in refused(capsys, *here, "--interactions=s3://no-such-bucket/log.parquet")
    assert "no such object or bucket" in refused(capsys, *arguments(data, "s3://no-such-bucket/out"))
    assert "Protocol not known: nowhere" in refused(capsys, *here, "--interactions=nowhere://bucket/log.parquet")
    assert "wanted is a bucket" in refused(capsys, *here, "--interactions=s3://key:secret@bucket/log.parquet")
    assert "wanted is a bucket" in refused(capsys, *here, "--interactions=s3:///log.parquet")
    assert "is inside" in refused(capsys, *arguments(f"{ROOT}/data", f"{ROOT}/data/log/out"))
    assert "not an artifact" in refused(capsys, "inspect", f"{ROOT}/data")
    assert "name a place on a disk" in refused(capsys, "demo", f"--folder={ROOT}/demo")
    assert not bucket.exists(f"{store.BUCKET}/out")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert "credentials" in refused(capsys, *here, "--interactions=s3://another/log.parquet")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    assert "pip install 'gpu-init[gs]'" in refused(capsys, *here, "--interactions=gs://bucket/log.parquet")


def test_what_changes_while_it_is_read_ends_the_job(data, bucket, capsys, monkeypatch, tmp_path):
    save = staging.Staging.save

    def saved(run, name, array):
        bucket.pipe_file(f"{store.BUCKET}/data/log/a.parquet", (data / "log" / "b.parquet").read_bytes())
        save(run, name, array)

    monkeypatch.setattr(staging.Staging, "save", saved)
    said = refused(capsys, *arguments(f"{ROOT}/data", f"{ROOT}/out"))
    assert "a.parquet: changed while the job ran" in said
    assert not bucket.exists(f"{store.BUCKET}/out")


def test_an_object_is_read_in_parts(bucket):
    content = bytes(range(256)) * 20
    bucket.pipe_file(f"{store.BUCKET}/one", content)
    with remote.Object(f"{ROOT}/one") as file:
        assert file.seek(-10, os.SEEK_END) == len(content) - 10
        assert file.read() == content[-10:]
        assert file.read(5) == b""
        assert file.seek(7) == 7
        assert file.read(3) == content[7:10]
        assert file.tell() == 10
    assert remote.stream(f"{ROOT}/one").read() == content


def test_a_fingerprint_is_of_the_content(bucket, monkeypatch):
    content = np.random.default_rng(0).bytes(remote.WHOLE_BYTES + 5)
    bucket.pipe_file(f"{store.BUCKET}/one", content)
    one = remote.fingerprint(f"{ROOT}/one")
    assert one["bytes"] == len(content)
    assert str(one["hash"]).startswith("sampled-sha256:")
    bucket.pipe_file(f"{store.BUCKET}/two", content)
    assert remote.fingerprint(f"{ROOT}/two") == one
    bucket.pipe_file(f"{store.BUCKET}/two", content[:100_000] + b"x" + content[100_001:])
    assert remote.fingerprint(f"{ROOT}/two") != one
    bucket.pipe_file(f"{store.BUCKET}/folder/one", b"")
    with pytest.raises(InputError, match="is no object"):
        remote.fingerprint(f"{ROOT}/folder")


def test_what_no_retry_helps_is_not_retried(bucket, proxy, monkeypatch):
    pauses = []
    monkeypatch.setattr(remote.time, "sleep", pauses.append)

    def broken(url, path):
        raise OSError("broken")

    with pytest.raises(ResourceError, match="object storage failed .broken."):
        remote._call(f"{ROOT}/one", broken)
    assert len(pauses) == remote.ATTEMPTS - 1

    def denied(url, path):
        raise PermissionError("Access Denied")

    with pytest.raises(InputError, match="no permission .Access Denied."):
        remote._call(f"{ROOT}/one", denied)
    assert len(pauses) == remote.ATTEMPTS - 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", [None, *store.FAULTS])
def test_large_files_go_in_parts(kind, bucket, proxy, tmp_path):
    content = np.random.default_rng(0).bytes(110_000_000)
    (tmp_path / "one").write_bytes(content)
    dice = random.Random(0)
    proxy.fault = lambda number, method, path: kind if dice.random() < 0.3 else None
    before = len(proxy.requests)
    remote.upload(str(tmp_path / "one"), f"{ROOT}/one")
    assert sum("partNumber" in path for method, path in proxy.requests[before:] if method == "PUT") >= 3
    remote.copy(f"{ROOT}/one", f"{ROOT}/two")
    remote.download(f"{ROOT}/two", str(tmp_path / "two"))
    assert (tmp_path / "two").read_bytes() == content
