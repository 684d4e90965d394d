"""Memory that is free: of the machine, of nested containers of both versions, of the process."""

import os
import resource
import subprocess
import sys

import numpy as np
import pytest

from gpu_init import memory
from gpu_init.errors import ResourceError

GB = 10**9


class Machine:
    """A root folder with the files that Linux shows."""

    def __init__(self, root):
        self.root = root
        self.put("proc/meminfo", "MemTotal: 16000000 kB\nMemFree: 1 kB\nMemAvailable: 8000000 kB\n")
        self.put("proc/self/statm", "100 50 20 1 0 60 0\n")
        self.put("proc/self/cgroup", "")
        self.put("proc/self/mountinfo", "24 1 0:1 / / rw - ext4 /dev/sda rw\n")

    def put(self, name, text):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def version2(self, path, mounted="/", at="/sys/fs/cgroup"):
        self.put("proc/self/cgroup", f"0::{path}\n")
        line = f"31 24 0:28 {mounted} {at} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
        self.put("proc/self/mountinfo", line)

    def version1(self, path, mounted="/"):
        self.put("proc/self/cgroup", f"9:name=systemd:/x\n5:cpu,cpuacct:/y\n4:memory:{path}\n0::/\n")
        lines = [
            "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct",
            f"35 31 0:32 {mounted} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory",
        ]
        self.put("proc/self/mountinfo", "\n".join(lines) + "\n")

    def group2(self, path, limit="max", high="max", used=0, stat=""):
        folder = f"sys/fs/cgroup/{path}"
        facts = {"memory.max": limit, "memory.high": high, "memory.current": used, "memory.stat": stat}
        for name, value in facts.items():
            self.put(f"{folder}/{name}", f"{value}\n")

    def group1(self, path, limit=9223372036854771712, used=0, stat=""):
        folder = f"sys/fs/cgroup/memory/{path}"
        facts = {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used, "memory.stat": stat}
        for name, value in facts.items():
            self.put(f"{folder}/{name}", f"{value}\n")

    @property
    def free(self):
        return memory.available(str(self.root))


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_without_containers_it_is_what_the_machine_has(machine):
    assert machine.free == (8_192_000_000, "on this machine")
    machine.version2("/user.slice/job")  # limits nothing
    machine.group2("user.slice/job", used=15 * GB)
    assert machine.free.bytes == 8_192_000_000
    machine.put("proc/meminfo", "")
    assert machine.free.bytes > 0


def test_version_2_takes_the_least_of_max_and_high_less_what_is_in_use(machine):
    machine.version2("/job")
    machine.group2("job", limit=4 * GB, used=GB)
    assert machine.free == (3 * GB, "by the container's limit")
    machine.group2("job", limit=4 * GB, high=2 * GB, used=GB)
    assert machine.free.bytes == GB
    machine.group2("job", limit=GB, used=2 * GB)
    assert machine.free.bytes == 0


def test_pages_of_files_are_not_in_use_but_shared_memory_is(machine):
    machine.version2("/job")
    stat = "anon 100000000\nfile 900000000\nshmem 300000000\ninactive_file 400000000\nactive_file 200000000\n"
    machine.group2("job", limit=GB, used=GB, stat=stat + "slab_reclaimable 50000000\nslab 60000000\n")
    assert machine.free.bytes == 650_000_000


def test_the_limit_of_a_parent_counts(machine):
    machine.version2("/pod/box/job")
    machine.group2("pod/box/job", limit=3 * GB)
    machine.group2("pod/box")
    machine.group2("pod", limit=2 * GB, used=GB)
    assert machine.free.bytes == GB


@pytest.mark.parametrize(
    ("path", "mounted"),
    [("/", "/"), ("/docker/ab", "/docker/ab"), ("/docker/ab", "/docker/other"), ("/../../elsewhere", "/")],
)
def test_what_is_mounted_is_the_containers_own(machine, path, mounted):
    machine.version2(path, mounted)
    machine.group2("", limit=GB)
    assert machine.free.bytes == GB


def test_a_mount_point_with_a_space(machine):
    machine.version2("/job", at="/sys/fs/c\\040group")
    machine.put("sys/fs/c group/job/memory.max", "1000\n")
    machine.put("sys/fs/c group/job/memory.current", "200\n")
    assert machine.free.bytes == 800


def test_version_1_and_its_parents(machine):
    machine.version1("/docker/ab")
    machine.group1("docker/ab")
    assert machine.free.why == "on this machine"
    machine.group1("docker/ab", 3 * GB, 2 * GB, "inactive_file 1\ntotal_inactive_file 700000000\ntotal_active_file 9\n")
    assert machine.free.bytes == GB + 700_000_009
    machine.group1("docker", GB, GB // 2)
    assert machine.free.bytes == GB // 2
    machine.version1("/docker/ab", mounted="/docker/ab")
    machine.group1("", GB)
    assert machine.free.bytes == GB


def test_a_limit_of_the_process_counts():
    program = "from gpu_init import memory; print(*memory.available(), sep='|')"
    limits = (2 * GB, 2 * GB)
    found = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, limits),
    )
    free, why = found.stdout.strip().split("|")
    assert why == "by ulimit -v"
    assert 0 < int(free) < 2 * GB


def test_the_message_has_both_figures(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: memory.Free(1000, "by the container's limit"))
    memory.require("f.npy", 1000)
    with pytest.raises(ResourceError, match=r"f\.npy: 1,001 bytes of memory are needed, 1,000 are free \(by the cont"):
        memory.require("f.npy", 1001)


def test_this_machine():
    free = memory.available()
    assert 0 < free.bytes <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_within_bounds_an_allocation_beyond_what_is_free_fails(monkeypatch):
    before = resource.getrlimit(resource.RLIMIT_DATA)
    monkeypatch.setattr(memory, "available", lambda: memory.Free(50_000_000, "here"))
    with memory.bounded():
        kept = np.empty(30_000_000, np.uint8)
        with pytest.raises(MemoryError):  # so much that what other tests leave to be freed does not make room for it
            np.empty(4_000_000_000, np.uint8)
    assert len(kept) == 30_000_000
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    assert len(np.empty(60_000_000, np.uint8)) == 60_000_000
