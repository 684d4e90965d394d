"""Power loss: a small run is recorded call by call, and every prefix of it is replayed as a disk may hold it.

What the disk surely holds of a file is what was written before its last fsync; of a folder, the names that it had
at its last fsync. Of everything since it may hold nothing, all, or a part. After each prefix, and for each of these
disks, what stands at the output's place must be nothing or whole, and a resumed run must end with the same bytes.
"""

import os
import random
import shutil
from pathlib import Path

import pytest

from gpu_init.artifact import publish, rows
from gpu_init.artifact.objects import open_staging
from gpu_init.files import storage
from tests.support.small_runs import IDENTITY, contents, run, whole, work

REAL = {
    name: getattr(os, name) for name in ("open", "write", "pwrite", "fsync", "fdatasync", "replace", "rename", "mkdir")
}
REAL |= {name: getattr(os, name) for name in ("rmdir", "unlink", "truncate", "ftruncate")}
EXCHANGE = storage.exchange


class File:
    def __init__(self, data=b""):
        self.data = self.durable = data


class Recorder:
    """A folder whose changes are recorded: each is an act on names, on content, or a sync of either."""

    def __init__(self, root):
        self.root = str(root)
        self.acts = []
        self.nodes = {}  # path now -> File, or None for a folder
        for path in sorted(Path(root).rglob("*")):
            self.nodes[str(path)] = None if path.is_dir() else File(path.read_bytes())
        self.first = dict(self.nodes)
        self.opened = {}

    def absolute(self, path, dir_fd=None):
        path = os.fspath(path)
        folder = os.readlink(f"/proc/self/fd/{dir_fd}") if dir_fd is not None else os.getcwd()
        return os.path.normpath(os.path.join(folder, path))

    def ours(self, path):
        return path.startswith(self.root + os.sep) or path == self.root

    def names(self, act, *paths):
        """An act on the names of the folders that paths are in."""
        if all(map(self.ours, paths)):
            self.acts.append(("names", act, paths, {os.path.dirname(path) for path in paths}))

    def content(self, path, data):
        if self.ours(path) and self.nodes.get(path) is not None:
            self.acts.append(("content", self.nodes[path], data))
            self.nodes[path].data = data

    def synced(self, path):
        if self.ours(path):
            node = self.nodes.get(path)
            self.acts.append(("synced", node, node.data) if node is not None else ("synced names", path))

    def move(self, old, new):
        """Paths below one now lie below another."""
        moved = {path: node for path, node in self.nodes.items() if path == old or path.startswith(old + os.sep)}
        for path in [path for path in self.nodes if path == new or path.startswith(new + os.sep)]:
            del self.nodes[path]
        for path in moved:
            del self.nodes[path]
        self.nodes |= {new + path[len(old) :]: node for path, node in moved.items()}

    # What is called instead of the system.

    def open(self, path, flags, mode=0o777, *, dir_fd=None):
        descriptor = REAL["open"](path, flags, mode, dir_fd=dir_fd)
        path = self.absolute(path, dir_fd)
        if self.ours(path) and not os.path.isdir(path):
            if path not in self.nodes:
                self.nodes[path] = File()
                self.names(("create", self.nodes[path]), path)
            elif flags & os.O_TRUNC:
                self.content(path, b"")
        self.opened[descriptor] = path
        return descriptor

    def path_of(self, descriptor):
        return os.readlink(f"/proc/self/fd/{descriptor}")

    def write(self, descriptor, data):
        at = os.lseek(descriptor, 0, os.SEEK_CUR)
        written = REAL["write"](descriptor, data)
        self.written(descriptor, data[:written], at)
        return written

    def pwrite(self, descriptor, data, at):
        written = REAL["pwrite"](descriptor, data, at)
        self.written(descriptor, data[:written], at)
        return written

    def written(self, descriptor, data, at):
        path = self.path_of(descriptor)
        node = self.nodes.get(path)
        if node is not None:
            self.content(path, node.data[:at].ljust(at, b"\0") + bytes(data) + node.data[at + len(data) :])

    def fsync(self, descriptor):
        self.synced(self.path_of(descriptor))

    fdatasync = fsync

    def replace(self, old, new):
        REAL["replace"](old, new)
        old, new = self.absolute(old), self.absolute(new)
        self.names(("move",), old, new)
        self.move(old, new)

    rename = replace

    def mkdir(self, path, mode=0o777, *, dir_fd=None):
        REAL["mkdir"](path, mode, dir_fd=dir_fd)
        path = self.absolute(path, dir_fd)
        self.names(("create", None), path)
        self.nodes[path] = None

    def unlink(self, path, *, dir_fd=None):
        full = self.absolute(path, dir_fd)
        REAL["unlink"](path, dir_fd=dir_fd)
        self.names(("remove",), full)
        self.nodes.pop(full, None)

    def rmdir(self, path, *, dir_fd=None):
        full = self.absolute(path, dir_fd)
        REAL["rmdir"](path, dir_fd=dir_fd)
        self.names(("remove",), full)
        self.nodes.pop(full, None)

    def truncate(self, path, length):
        REAL["truncate"](path, length)
        full = self.absolute(path)
        self.content(full, self.nodes[full].data[:length].ljust(length, b"\0"))

    def ftruncate(self, descriptor, length):
        REAL["ftruncate"](descriptor, length)
        path = self.path_of(descriptor)
        if self.nodes.get(path) is not None:
            self.content(path, self.nodes[path].data[:length].ljust(length, b"\0"))

    def exchange(self, a, b):
        if not EXCHANGE(a, b):
            return False
        a, b = self.absolute(a), self.absolute(b)
        self.names(("exchange",), a, b)
        for old, new in ((a, a + "\0"), (b, a), (a + "\0", b)):
            self.move(old, new)
        return True


def disk(first, acts, kept, chance):
    """Paths and content that a disk may hold after some acts.

    Acts on names last when all folders that they touch were synced later; of the others, in order, as many as
    ``kept`` says. Content not synced is lost, or, by ``chance``, a part of it is there.
    """
    lasting = set()
    for number, act in enumerate(acts):
        if act[0] == "names":
            later = {one[1] for one in acts[number:] if one[0] == "synced names"}
            if act[3] <= later:
                lasting.add(number)
    loose = [number for number, act in enumerate(acts) if act[0] == "names" and number not in lasting]
    lasting |= set(loose[: int(kept * len(loose))])
    tree, durable, latest = dict(first), {}, {}
    for number, act in enumerate(acts):
        if act[0] == "content":
            latest[act[1]] = act[2]
        elif act[0] == "synced":
            durable[act[1]] = latest[act[1]] = act[2]
        elif act[0] == "names" and number in lasting:
            change, paths = act[1], act[2]
            below = {p: {q: n for q, n in tree.items() if q == p or q.startswith(p + os.sep)} for p in paths}
            if change[0] == "create":
                tree[paths[0]] = change[1]
            elif change[0] == "remove":
                tree.pop(paths[0], None)
            elif below[paths[0]]:
                for path in [*below[paths[0]], *below[paths[1]]]:
                    tree.pop(path, None)
                tree |= {paths[1] + path[len(paths[0]) :]: node for path, node in below[paths[0]].items()}
                if change[0] == "exchange":
                    tree |= {paths[0] + path[len(paths[1]) :]: node for path, node in below[paths[1]].items()}

    def held(node):
        sure = durable.get(node, node.durable if node in first.values() else b"")
        now = latest.get(node, sure)
        if chance is None or sure == now:
            return sure
        part = now if chance.random() < 0.5 else now[: chance.randint(0, len(now))]
        start, lost = chance.randint(0, len(part)), chance.choice([0, 0.5, 1])  # from where on bytes read as zeros
        return bytes(
            byte if at < start or sure[at : at + 1] == part[at : at + 1] or chance.random() >= lost else 0
            for at, byte in enumerate(part)
        )

    return {path: None if node is None else held(node) for path, node in tree.items()}


def lay_out(root, tree):
    """Make a folder hold such paths; those whose folder is lost are lost."""
    shutil.rmtree(root)
    root.mkdir()
    for path in sorted(tree):
        if os.path.isdir(os.path.dirname(path)):
            if tree[path] is None:
                os.mkdir(path)
            else:
                Path(path).write_bytes(tree[path])


def before(root, mode):
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    if mode == "inside":
        (root / "out").mkdir()
    if mode != "new":
        run(root / "out", seed=7)


def recorded(root, monkeypatch):
    recorder = Recorder(root)
    with monkeypatch.context() as patch:
        for name in REAL:
            patch.setattr(os, name, getattr(recorder, name))
        patch.setattr(storage, "exchange", recorder.exchange)
        run(root / "out", resume=True, overwrite=True)
    return recorder


@pytest.mark.parametrize("step", [9, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", ["new", "exchange", "two renames", "inside"])
def test_whatever_a_power_loss_leaves_is_resumed_to_the_same_bytes(mode, step, tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "SYNC_BYTES", 50)
    monkeypatch.setattr(os, "posix_fadvise", lambda *given: None)
    if mode == "inside":
        monkeypatch.setattr(publish, "stays_in_place", os.path.isdir)
    if mode == "two renames":
        monkeypatch.setattr(storage, "exchange", lambda a, b: False)
        monkeypatch.setitem(globals(), "EXCHANGE", storage.exchange)
    root = tmp_path / "disk"
    run(tmp_path / "new" / "out")
    new = contents(tmp_path / "new" / "out")
    before(root, mode)
    old = contents(root / "out")
    recorder = recorded(root, monkeypatch)
    assert contents(root / "out") == new
    assert {path: node and node.data for path, node in recorder.nodes.items()} == {
        str(path): path.read_bytes() if path.is_file() else None for path in root.rglob("*")
    }, "the record is not what happened"
    for name in ("fsync", "fdatasync"):  # what the resumed runs make durable is not looked at
        monkeypatch.setattr(os, name, lambda descriptor: None)
    chance, tried, resumed = random.Random(0), 0, 0
    for count in range(0, len(recorder.acts) + 1, step):
        acts = recorder.acts[:count]
        for kept, part in ((0, None), (1, None), (1, chance), (chance.random(), chance), (0, chance)):
            lay_out(root, disk(recorder.first, acts, kept, part))
            whole(root / "out", old, new)
            with open_staging(root / "out", resume=True, overwrite=True, identity={**IDENTITY, "seed": 0}) as staging:
                resumed += staging.resumed
                work(staging)
            assert contents(root / "out") == new
            assert os.listdir(root) == ["out"]
            tried += 1
    assert tried >= 5 * (len(recorder.acts) // step)
    assert resumed >= tried // 4
