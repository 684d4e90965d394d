"""Memory that this process may still take: of the machine, and of the containers (cgroups) that it runs in.

Nothing is reserved, and what is free may be gone a moment later. Callers ask before work that needs much memory, so
that the user reads a figure, where otherwise the kernel would kill the process.
"""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from gpu_init.errors import ResourceError

LIBRARY_BYTES = 128 << 20  # memory that the libraries take, without the pages that several processes share
ADDRESSES = 2 << 30  # bytes of addresses that the libraries and their threads reserve; most are never used


class Free(NamedTuple):
    """Number of bytes that may still be taken, and what limits them, such as "by the container's limit"."""

    bytes: int
    why: str


def require(place: str, needed: int) -> None:
    """Refuse work that needs more bytes of memory than are free.

    Raises
    ------
    ResourceError
        The message begins with ``place``, such as a file, and has both figures, and what limits the memory.
    """
    _require(place, needed, available())


def require_libraries() -> None:
    """Refuse to start where the libraries and their threads do not fit: they would fail in unforeseen ways.

    Raises
    ------
    ResourceError
        The message has both figures, and what limits the memory.
    """
    _require("the libraries", LIBRARY_BYTES, min([_machine("/"), *_groups("/")]))
    for addresses in _process("/"):
        _require("the libraries", ADDRESSES, addresses)


def _require(place: str, needed: int, free: Free) -> None:
    if needed > free.bytes:
        raise ResourceError(f"{place}: {needed:,} bytes of memory are needed, {free.bytes:,} are free ({free.why}).")


def available(root: str = "/") -> Free:
    """Memory that this process may still take: the least of what the machine and every limit on the process leave.

    Parameters
    ----------
    root : str
        Folder that holds `proc`, and the cgroups that `proc` names.

    Returns
    -------
    Free
        The least of: `MemAvailable` of the machine; `ulimit -v` less the addresses in use; and, for each cgroup of
        the process and each parent of one, the limit (`memory.max` and `memory.high`; in version 1
        `memory.limit_in_bytes`) less the memory in use, without what the kernel gives back under pressure, such as
        cached pages of files.
    """
    return min([_machine(root), *_groups(root), *_process(root)])


@contextmanager
def bounded() -> Iterator[None]:
    """Inside, an allocation of more than is free fails at once; otherwise the process might be killed for it later.

    It is for libraries that read files of unknown origin: a file of a few bytes may unpack to gigabytes.
    """
    before = resource.getrlimit(resource.RLIMIT_DATA)
    pages = _pages("/")
    if pages:
        wanted = pages[5] * os.sysconf("SC_PAGE_SIZE") + available().bytes
        limit = min([wanted, *(one for one in before if one != resource.RLIM_INFINITY)])
        resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _machine(root: str) -> Free:
    for line in _lines(root, "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return Free(int(line.split()[1]) * 1024, "on this machine")
    return Free(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "on this machine")


def _process(root: str) -> Iterator[Free]:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    pages = _pages(root)
    if limit != resource.RLIM_INFINITY and pages:
        yield Free(max(limit - pages[0] * os.sysconf("SC_PAGE_SIZE"), 0), "by ulimit -v")


def _pages(root: str) -> list[int]:
    """Counts of pages of this process, the first of its addresses, the sixth of its data; empty where not known."""
    return [int(count) for line in _lines(root, "proc/self/statm") for count in line.split()]


# The files of a version of cgroups: its limits, the memory in use, and the entries of memory.stat that count memory
# which the kernel gives back under pressure.
_Version = tuple[tuple[str, ...], str, tuple[str, ...]]
_VERSION_2: _Version = (
    ("memory.max", "memory.high"),
    "memory.current",
    ("inactive_file", "active_file", "slab_reclaimable"),
)
_VERSION_1: _Version = (
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)


def _groups(root: str) -> Iterator[Free]:
    """Memory that each cgroup of this process leaves, from its own up to the topmost one that is mounted."""
    for own, top, (limits, usage, given_back) in _folders(root):
        folder = own
        while folder.startswith(top):
            found = [limit for name in limits if (limit := _number(folder, name)) is not None]
            used = _number(folder, usage)
            if found and used is not None:
                facts = dict(line.split(maxsplit=1) for line in _lines(folder, "memory.stat") if " " in line)
                kept = max(used - sum(int(facts.get(name, 0)) for name in given_back), 0)
                yield Free(max(min(found) - kept, 0), "by the container's limit")
            folder = os.path.dirname(folder)


def _folders(root: str) -> Iterator[tuple[str, str, _Version]]:
    """For each version that is mounted: the folder of this process's own cgroup, and the topmost folder."""
    paths: dict[str, str] = {}  # of version 1 by controller; that of version 2 by ""
    for line in _lines(root, "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        paths |= dict.fromkeys(controllers.split(","), path)
    for line in _lines(root, "proc/self/mountinfo"):
        mount, _, kind = line.partition(" - ")
        shown, place = (_unescaped(part) for part in mount.split()[3:5])
        system, *_, options = kind.split()
        if system == "cgroup2" and "" in paths:
            path, version = paths[""], _VERSION_2
        elif system == "cgroup" and "memory" in paths and "memory" in options.split(","):
            path, version = paths["memory"], _VERSION_1
        else:
            continue
        top = os.path.normpath(os.path.join(root, place.lstrip("/")))
        inside = os.path.relpath(path, shown)
        # A path outside the mount is written in another namespace's terms; then the mount itself is our cgroup.
        yield top if inside.startswith("..") else os.path.normpath(os.path.join(top, inside)), top, version


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), field)


def _number(folder: str, name: str) -> int | None:
    """Number in a file; None where there is no such file, or no limit ("max")."""
    text = next(iter(_lines(folder, name)), "").strip()
    return int(text) if text.isdigit() else None


def _lines(folder: str, name: str) -> list[str]:
    with suppress(OSError), open(os.path.join(folder, name), encoding="utf-8", errors="surrogateescape") as file:
        return file.read().splitlines()
    return []
