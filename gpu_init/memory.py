"""Memory that this process may still take: of the machine, and of the containers (cgroups) that it runs in.

Nothing is reserved: what is free may be gone a moment later. It is asked before work that would need more, so that
the answer is a figure and not the kernel's killer.
"""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from gpu_init.errors import ResourceError

LIBRARY_BYTES = 128 << 20  # of memory that the libraries take, less what several processes share
ADDRESSES = 2 << 30  # that the libraries and their threads reserve, most of them never touched


class Free(NamedTuple):
    """Bytes that may still be taken, and what says so, such as "the container's limit"."""

    bytes: int
    why: str


def require(place: str, needed: int) -> None:
    """Refuse work for which less memory is free than it needs.

    Parameters
    ----------
    place : str
        What the memory is for, such as a file; begins the message.
    needed : int
        Bytes.

    Raises
    ------
    ResourceError
        With both figures, and what limits the memory.
    """
    free = available()
    if needed > free.bytes:
        raise _too_little(place, needed, free)


def require_libraries() -> None:
    """Refuse to begin where the libraries and their threads do not fit, which would fail in any way they like.

    Raises
    ------
    ResourceError
        With both figures, and what limits the memory.
    """
    resident = min([_machine("/"), *_groups("/")])
    for free, needed in [(resident, LIBRARY_BYTES), *((reserved, ADDRESSES) for reserved in _process("/"))]:
        if free.bytes < needed:
            raise _too_little("the libraries", needed, free)


def available(root: str = "/") -> Free:
    """Memory that this process may still take: the least of what the machine has and of every limit on the process.

    Parameters
    ----------
    root : str
        Where `proc`, and the cgroups that it names, are found.

    Returns
    -------
    Free
        Of the machine, `MemAvailable`. Of each cgroup that the process is in, of its parents too: the limit
        (`memory.max`, `memory.high`; in version 1 `memory.limit_in_bytes`) less what is in use there, where pages
        of files and what else the kernel gives back under pressure do not count. Of the process, `ulimit -v`.
    """
    return min([_machine(root), *_groups(root), *_process(root)])


@contextmanager
def bounded() -> Iterator[None]:
    """Inside, an allocation beyond what is free fails at once, where later the process might be killed for it.

    For libraries that read what strangers wrote: a file of a few bytes may unpack to gigabytes.
    """
    before = resource.getrlimit(resource.RLIMIT_DATA)
    taken = next(iter(_lines("/", "proc/self/statm")), "").split()
    if taken:
        wanted = int(taken[5]) * os.sysconf("SC_PAGE_SIZE") + available().bytes
        limit = min([wanted, *(one for one in before if one != resource.RLIM_INFINITY)])
        resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _too_little(place: str, needed: int, free: Free) -> ResourceError:
    return ResourceError(f"{place}: {needed:,} bytes of memory are needed, {free.bytes:,} are free ({free.why}).")


def _machine(root: str) -> Free:
    for line in _lines(root, "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return Free(int(line.split()[1]) * 1024, "on this machine")
    return Free(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "on this machine")


def _process(root: str) -> Iterator[Free]:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    taken = next(iter(_lines(root, "proc/self/statm")), "").split()
    if limit != resource.RLIM_INFINITY and taken:
        yield Free(max(limit - int(taken[0]) * os.sysconf("SC_PAGE_SIZE"), 0), "by ulimit -v")


# A version of cgroups: its limits, what is in use, and what of that is given back under pressure.
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
    """What every memory cgroup leaves that this process is in, from its own up to the topmost that can be seen."""
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
    """Folder of this process's own group and the topmost one, for each version that is mounted."""
    paths: dict[str, str] = {}  # by controller; "" is version 2
    for line in _lines(root, "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        paths |= dict.fromkeys(controllers.split(","), path)
    for line in _lines(root, "proc/self/mountinfo"):
        mount, _, kind = line.partition(" - ")
        shown, place = (_plain(part) for part in mount.split()[3:5])
        system, *_, options = kind.split()
        if system == "cgroup2" and "" in paths:
            controller, version = "", _VERSION_2
        elif system == "cgroup" and "memory" in paths and "memory" in options.split(","):
            controller, version = "memory", _VERSION_1
        else:
            continue
        top = os.path.normpath(os.path.join(root, place.lstrip("/")))
        path = os.path.relpath(paths[controller], shown)
        # a path that leads out of what is mounted is another namespace's word for it: what is mounted is ours
        yield top if path.startswith("..") else os.path.normpath(os.path.join(top, path)), top, version


def _plain(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), field)


def _number(folder: str, name: str) -> int | None:
    """Number in a file; None where there is no file, or no limit ("max")."""
    text = next(iter(_lines(folder, name)), "").strip()
    return int(text) if text.isdigit() else None


def _lines(folder: str, name: str) -> list[str]:
    with suppress(OSError), open(os.path.join(folder, name), encoding="utf-8", errors="surrogateescape") as file:
        return file.read().splitlines()
    return []
