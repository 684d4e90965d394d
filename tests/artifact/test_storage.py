import ctypes
import errno
import hashlib
import multiprocessing
import os
import threading

import pytest

from gpu_init.errors import InputError, ResourceError
from gpu_init.files import storage


def put(path, data=b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)


def test_fingerprint_is_sha256_of_small_files_and_ignores_time(tmp_path):
    path = put(tmp_path / "a", b"abc")
    first = storage.fingerprint(path)
    os.utime(path, (1, 1))
    assert first == storage.fingerprint(path) == {"bytes": 3, "hash": "sha256:" + hashlib.sha256(b"abc").hexdigest()}


def test_fingerprint_samples_large_files(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(storage, "_PIECE", 16)
    monkeypatch.setattr(storage, "_PIECES", 5)
    data = bytearray(os.urandom(1001))
    pieces = b"".join(data[at : at + 16] for at in (0, 246, 492, 738, 985))
    expected = hashlib.sha256((1001).to_bytes(8, "little") + pieces).hexdigest()
    path = put(tmp_path / "a", bytes(data))
    assert storage.fingerprint(path) == {"bytes": 1001, "hash": f"sampled-sha256:{expected}"}
    for at in (0, 1000):  # the first and the last byte count
        changed = data.copy()
        changed[at] ^= 1
        assert storage.fingerprint(put(tmp_path / "b", bytes(changed)))["hash"] != f"sampled-sha256:{expected}"


def test_fingerprint_refuses_what_is_not_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "missing", tmp_path, tmp_path / "pipe", "a\0b"):
        with pytest.raises(InputError):
            storage.fingerprint(str(path))


def test_expand_file_folder_glob(tmp_path):
    names = ["b.csv", "a.csv", "deep/c.csv", "deep/d.parquet", "_SUCCESS.csv", ".hidden/x.csv", "_tmp/y.csv", "e.txt"]
    for name in names:
        put(tmp_path / name)
    under = lambda *found: [str(tmp_path / name) for name in found]  # noqa: E731
    assert storage.expand(str(tmp_path / "e.txt"), (".csv",)) == under("e.txt")
    everything = under("a.csv", "b.csv", "deep/c.csv", "deep/d.parquet")
    assert storage.expand(str(tmp_path), (".csv", ".parquet")) == everything
    assert storage.expand(str(tmp_path / "*"), (".csv",)) == under("a.csv", "b.csv", "deep/c.csv")
    assert storage.expand(str(tmp_path / "**" / "*.csv"), (".csv",)) == under("a.csv", "b.csv", "deep/c.csv")
    assert storage.expand(str(tmp_path / "_tmp" / "*.csv"), (".csv",)) == under("_tmp/y.csv")
    odd = put(tmp_path / "odd[1]" / "z.csv")
    assert storage.expand(odd, (".csv",)) == storage.expand(str(tmp_path / "odd[1]"), (".csv",)) == [odd]


@pytest.mark.parametrize("pattern", ["missing.csv", "missing/*.csv", "empty", "", "no://bucket/x.csv", "a\0b", "e/*\0"])
def test_expand_finds_nothing(tmp_path, monkeypatch, pattern):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="not known|fsspec" if "://" in pattern else "no "):
        storage.expand(pattern, (".csv",))


def test_expand_does_not_run_in_circles(tmp_path):
    put(tmp_path / "a.csv")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert storage.expand(str(tmp_path), (".csv",)) == [str(tmp_path / "a.csv")]


def test_write_file_replaces_whole(tmp_path):
    path = put(tmp_path / "a", b"old")
    storage.write_file(path, b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (errno.ENOSPC, ResourceError),
        (errno.EDQUOT, ResourceError),
        (errno.EIO, ResourceError),
        (errno.EROFS, InputError),
        (errno.EACCES, InputError),
    ],
)
def test_write_file_that_fails_keeps_the_old_one(tmp_path, monkeypatch, code, error):
    path = put(tmp_path / "a", b"old")

    def fail(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(storage.os, "fsync", fail)
    with pytest.raises(error, match=str(tmp_path)) as caught:
        storage.write_file(path, b"n" * 1234)
    if code in (errno.ENOSPC, errno.EDQUOT):
        assert "1,234 bytes are needed" in str(caught.value)
        assert "are free" in str(caught.value)
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_short_writes_are_continued(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(storage.os, "write", lambda descriptor, data: real(descriptor, data[:3]))
    with storage.create(str(tmp_path / "a")) as sink:
        sink.write(b"0123456789")
        sink.write(b"")
    monkeypatch.undo()
    assert (tmp_path / "a").read_bytes() == b"0123456789"
    assert (sink.size, sink.digest.digest()) == (10, hashlib.sha256(b"0123456789").digest())


def test_too_little_disk_is_said_with_figures(tmp_path):
    storage.require_free(str(tmp_path), 1)
    with pytest.raises(ResourceError, match=r"1,000,000,000,000,000,000 bytes are needed, [\d,]+ are free"):
        storage.require_free(str(tmp_path / "not" / "there" / "yet"), 10**18)


def test_exchange(tmp_path):
    put(tmp_path / "a" / "old")
    put(tmp_path / "b" / "new")
    assert storage.exchange(str(tmp_path / "a"), str(tmp_path / "b"))
    assert os.listdir(tmp_path / "a") == ["new"]
    assert os.listdir(tmp_path / "b") == ["old"]
    with pytest.raises(FileNotFoundError):
        storage.exchange(str(tmp_path / "a"), str(tmp_path / "missing"))


def test_exchange_says_where_the_system_cannot(tmp_path, monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda *given, **named: object())
    assert not storage.exchange(str(tmp_path), str(tmp_path))


def test_lock_has_one_holder_and_leaves_nothing(tmp_path):
    path = str(tmp_path / ".out.lock")
    lock = storage.Lock(path, "out")
    with pytest.raises(InputError, match=rf"another run writes to out \(process {os.getpid()}\)"):
        storage.Lock(path, "out")
    lock.release()
    assert os.listdir(tmp_path) == []
    storage.Lock(path, "out").release()


def hold(path, ready):
    storage.Lock(path, "out")
    ready.set()
    threading.Event().wait()


def test_lock_of_a_killed_process_is_free(tmp_path):
    context = multiprocessing.get_context("spawn")
    path, ready = str(tmp_path / "lock"), context.Event()
    process = context.Process(target=hold, args=(path, ready), daemon=True)
    process.start()
    assert ready.wait(30)
    with pytest.raises(InputError, match=f"process {process.pid}"):
        storage.Lock(path, "out")
    process.kill()
    process.join()
    assert os.path.exists(path)
    storage.Lock(path, "out").release()
    assert os.listdir(tmp_path) == []


def test_lock_is_never_held_twice_while_others_come_and_go(tmp_path):
    path, inside, clashes, taken = str(tmp_path / "lock"), [], [], []

    def run():
        for _ in range(300):
            try:
                lock = storage.Lock(path, "out")
            except InputError:
                continue
            inside.append(1)
            clashes.extend([1] if len(inside) > 1 else [])
            taken.append(1)
            inside.pop()
            lock.release()

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert taken
    assert not clashes
