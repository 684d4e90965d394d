"""Where a run's files lie before and after they are published, and how folders are removed."""

from __future__ import annotations

import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass

from gpu_init.artifact.format import JOURNAL, LOCK, MANIFEST, PARTIAL, Json, is_inside
from gpu_init.errors import InputError

_STAGED_ENDINGS = (".npy", ".parquet", ".json", ".tmp")


# Writing.


@dataclass(frozen=True)
class Place:
    """Paths of a run: its output, staging folder, lock, and the old output while it is replaced in two steps."""

    out: str
    staging: str
    lock: str
    aside: str
    inside: bool

    @classmethod
    def of(cls, out: str) -> Place:
        """Give the paths that go with an output."""
        parent, name = os.path.split(out)
        aside = os.path.join(parent, f".{name}.replaced")
        if _stays(out):
            return cls(out, os.path.join(out, PARTIAL), os.path.join(out, LOCK), aside, True)
        return cls(out, f"{out}.partial", os.path.join(parent, f".{name}.lock"), aside, False)


def _stays(out: str) -> bool:
    """Whether a folder cannot be renamed: a mount point, or in a folder that takes no files."""
    if not os.path.isdir(out):
        return False
    if os.path.ismount(out) or out in _mount_points():
        return True
    return not os.access(os.path.dirname(out), os.W_OK | os.X_OK) and os.access(out, os.W_OK | os.X_OK)


def _mount_points() -> set[str]:
    """Linux's own list: folders bound from the same file system do not show otherwise."""
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
            places = {line.split(" ", 5)[4] for line in lines}
    except OSError:
        return set()
    return {re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), place) for place in places}


def check_ours(folder: str) -> None:
    """Refuse to use, or remove, what no run left behind.

    A folder is a run's when a journal is in it, or when all its files are such as a run writes.
    """
    if os.path.isdir(folder) and not os.path.islink(folder):
        if os.path.lexists(os.path.join(folder, JOURNAL)):
            return
        if all(name.endswith(_STAGED_ENDINGS) for _, _, names in os.walk(folder) for name in names):
            return
    raise InputError(f"{folder} is in the way and was not left by gpu-init; move it away.")


def remove_folder(folder: str) -> bool:
    """Remove a run's folder; tell whether there was one.

    Before anything else its manifest or journal is spoilt, so that what a kill leaves is never taken for whole, and
    still known as a run's.
    """
    if not os.path.isdir(folder):
        return False
    journal = os.path.join(folder, JOURNAL)
    with suppress(FileNotFoundError):
        os.replace(os.path.join(folder, MANIFEST), journal)
    if os.path.lexists(journal):
        os.truncate(journal, 0)
    prune(folder, {JOURNAL})
    shutil.rmtree(folder)
    return True


def prune(folder: str, kept: set[str]) -> None:
    """Remove all files of a folder but some, and the folders that are then empty."""
    for parent, folders, names in os.walk(folder, topdown=False):
        for name in names:
            path = os.path.join(parent, name)
            if os.path.relpath(path, folder) not in kept:
                os.unlink(path)
        for name in folders:
            path = os.path.join(parent, name)
            if os.path.islink(path):
                os.unlink(path)
            elif not os.listdir(path):
                os.rmdir(path)


def unlink_listed(root: str, files: Json) -> None:
    """Remove those listed files that are in a folder, and their own folders when empty."""
    for name in filter(is_inside, files):
        path = os.path.join(root, name)
        folder = os.path.dirname(path)
        if os.path.lexists(path) and not os.path.isdir(path) and os.path.realpath(folder) == folder:
            os.unlink(path)
            with suppress(OSError):
                os.rmdir(folder)
