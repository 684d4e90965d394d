"""Places where a run makes and publishes an artifact: what every kind of place can do, and how a disk does it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from typing import Protocol

from gpu_init.artifact.format import (
    JOURNAL,
    LOCK,
    MANIFEST,
    MANIFEST_BYTES,
    PARTIAL,
    REPLACED,
    REPORT,
    Json,
    file_problem,
    listed_files,
    parse_journal,
    read_manifest,
    seal,
    shown,
)
from gpu_init.artifact.read import problems, unlisted
from gpu_init.errors import InputError
from gpu_init.files import storage

_STAGED_ENDINGS = (".npy", ".parquet", ".json", ".tmp")  # The names of all files that a run writes end like this.


class Place(Protocol):
    """An output, and the staging folder in which a run makes it; there is one class for disks, one for object storage.

    Attributes
    ----------
    out : str
        Path or URL where the artifact will stand.
    staging : str
        Path of the staging folder, which is always on this machine.
    lock : str
        Path of the file that only one run at a time can lock.
    """

    out: str
    staging: str
    lock: str

    def unfinished(self, resume: bool) -> Json | None:
        """Return the manifest or journal of a run that can be resumed, its files in the staging folder; else None.

        Without ``resume`` it is None. Before that, what a killed run left half replaced is put right. An InputError
        says that the staging folder is not a run's.
        """

    def artifact(self) -> Json | None:
        """Return the manifest at the output, None where nothing is there; an InputError says what else is there."""

    def is_whole(self, manifest: Json) -> bool:
        """Tell whether the files of the artifact at the output are there."""

    def foreign(self, files: Json) -> Iterator[str]:
        """Yield the names of files at the output that are not among these, and no run's."""

    def discard(self) -> bool:
        """Remove all that unfinished runs left; tell whether there was anything."""

    def abandon(self) -> None:
        """Remove what this run has made, before it began to publish."""

    def note(self, journal: Json) -> None:
        """Write the journal durably, once all files that it lists are as safe."""

    def publish(self, manifest: Json, *, replaces: bool) -> None:
        """Put the staging folder, which has its manifest, at the output; every step may be taken again.

        ``manifest`` is its content; ``replaces`` says that an artifact stood at the output when the run began.
        """


class Disk:
    """An output on a disk, with its staging folder beside it, or inside it where it cannot be renamed."""

    def __init__(self, out: str) -> None:
        self.out = os.path.realpath(out)
        if os.path.lexists(self.out) and not os.path.isdir(self.out):
            raise InputError(f"{self.out} is not a folder; choose another output.")
        parent, name = os.path.split(self.out)
        self._inside = stays_in_place(self.out)
        self.staging = os.path.join(self.out, PARTIAL) if self._inside else f"{self.out}{PARTIAL}"
        self.lock = os.path.join(self.out, LOCK) if self._inside else os.path.join(parent, f".{name}.lock")
        self._aside = os.path.join(parent, f".{name}.replaced")  # The old output, while it is replaced in two steps.

    def unfinished(self, resume: bool) -> Json | None:
        if not self._inside and os.path.lexists(self._aside):
            check_ours(self._aside)
            if os.path.lexists(self.out):
                remove_folder(self._aside)
            else:
                os.rename(self._aside, self.out)
                storage.sync_dir(os.path.dirname(self.out))
        if os.path.lexists(self.staging):
            check_ours(self.staging)
        return unfinished_in(self.staging, *([self.out] if self._inside else [])) if resume else None

    def artifact(self) -> Json | None:
        if not os.path.isdir(self.out):
            return None
        if os.path.lexists(os.path.join(self.out, MANIFEST)):
            return read_manifest(self.out)
        require_none(self.out, self.foreign(self._half_published()) if self._inside else iter(os.listdir(self.out)))
        return None

    def is_whole(self, manifest: Json) -> bool:
        return next(problems(self.out, manifest), None) is None

    def foreign(self, files: Json) -> Iterator[str]:
        return unlisted(self.out, files)

    def discard(self) -> bool:
        self._unlink(self._half_published())
        return remove_folder(self.staging)

    def abandon(self) -> None:
        remove_folder(self.staging)

    def note(self, journal: Json) -> None:
        storage.write_file(os.path.join(self.staging, JOURNAL), seal(journal))

    def publish(self, manifest: Json, *, replaces: bool) -> None:
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(self.staging, JOURNAL))
        _prune(self.staging, {MANIFEST, REPLACED, *manifest["files"]})
        for folder, _, _ in os.walk(self.staging):
            storage.sync_dir(folder)
        if self._inside:
            self._move_up(manifest["files"])
            return
        old, parent = self.staging, os.path.dirname(self.out)
        replaces = replaces and os.path.isdir(self.out)
        if not replaces:
            os.rename(self.staging, self.out)  # Only an empty folder gives way.
        elif not storage.exchange(self.staging, self.out):
            old = self._aside
            os.rename(self.out, old)
            os.rename(self.staging, self.out)
        storage.sync_dir(parent)
        if replaces:
            remove_folder(old)

    def _move_up(self, files: Json) -> None:
        """Move the files from the staging folder into the output around it, the manifest last."""
        here, there = os.path.join(self.staging, MANIFEST), os.path.join(self.out, MANIFEST)
        if os.path.lexists(there):
            os.replace(there, os.path.join(self.staging, REPLACED))
            storage.sync_dir(self.staging)
            storage.sync_dir(self.out)
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(self.out, REPORT))  # It is of the artifact that was there.
        self._unlink({name: entry for name, entry in self._half_published().items() if name not in files})
        folders = {self.out}
        for name in files:
            path, to = os.path.join(self.staging, name), os.path.join(self.out, name)
            folders.add(os.path.dirname(to))
            if os.path.lexists(path):
                os.makedirs(os.path.dirname(to), exist_ok=True)
                os.replace(path, to)
        for folder in folders:
            storage.sync_dir(folder)
        os.replace(here, there)
        storage.sync_dir(self.out)
        remove_folder(self.staging)

    def _half_published(self) -> Json:
        """Files of a run that was killed while it moved them up into the output, and of the artifact it replaced."""
        if not self._inside or os.path.lexists(os.path.join(self.out, MANIFEST)):
            return {}
        return listed_files(*(_read_if_there(os.path.join(self.staging, name)) for name in (MANIFEST, REPLACED)))

    def _unlink(self, files: Json) -> None:
        """Remove files from the output, and their own folders when these are empty then."""
        for name in files:
            path = os.path.join(self.out, name)
            folder = os.path.dirname(path)
            if os.path.lexists(path) and not os.path.isdir(path) and os.path.realpath(folder) == folder:
                os.unlink(path)
                with suppress(OSError):
                    os.rmdir(folder)


def stays_in_place(out: str) -> bool:
    """Tell whether a folder cannot be renamed, being a mount point or in a folder that takes no files."""
    if not os.path.isdir(out):
        return False
    if os.path.ismount(out) or out in mount_points():
        return True
    return not os.access(os.path.dirname(out), os.W_OK | os.X_OK) and os.access(out, os.W_OK | os.X_OK)


def mount_points() -> set[str]:
    """Read Linux's own list: folders that are bound from the same file system do not show otherwise."""
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
            places = {line.split(" ", 5)[4] for line in lines}
    except OSError:
        return set()
    return {re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), place) for place in places}


def require_none(out: str, foreign: Iterator[str]) -> None:
    """Refuse an output without a manifest in which there are files that no run left.

    Raises
    ------
    InputError
        It names the first of them.
    """
    name = next(foreign, None)
    if name is not None:
        raise InputError(
            f"{out} is not empty and not an artifact (it holds {shown(name)} and no {MANIFEST});"
            " choose another output, or move that away."
        )


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


def unfinished_in(staging: str, *others: str) -> Json | None:
    """Return the manifest or the journal in a staging folder, if all files that it lists are there or in ``others``."""
    for read in (read_manifest, journal_in):
        with suppress(InputError):
            found = read(staging)
            files, roots = found.get("files"), (staging, *others)
            if isinstance(files, dict) and all(
                any(file_problem(root, name, entry) is None for root in roots) for name, entry in files.items()
            ):
                return found
    return None


def journal_in(folder: str) -> Json:
    """Read the journal in a staging folder; the result is empty where there is none, or it is damaged."""
    return parse_journal(_read_if_there(os.path.join(folder, JOURNAL)))


def _read_if_there(path: str) -> bytes | None:
    with suppress(InputError), storage.reading(path) as file:
        return file.read(MANIFEST_BYTES)
    return None


def remove_folder(folder: str) -> bool:
    """Remove a run's folder; tell whether there was one.

    Its manifest or journal is spoilt first, so that nothing takes what a kill leaves for whole, and removed last, so
    that what a kill leaves is still known as a run's.
    """
    if not os.path.isdir(folder):
        return False
    journal = os.path.join(folder, JOURNAL)
    with suppress(FileNotFoundError):
        os.replace(os.path.join(folder, MANIFEST), journal)
    if os.path.lexists(journal):
        os.truncate(journal, 0)
    _prune(folder, {JOURNAL})
    shutil.rmtree(folder)
    return True


def _prune(folder: str, kept: set[str]) -> None:
    """Remove all files of a folder but some, and the folders that are then empty."""
    for parent, folders, names in os.walk(folder, topdown=False):
        for name in names:
            path = os.path.join(parent, name)
            if os.path.relpath(path, folder) not in kept:
                os.unlink(path)
        for name in folders:
            with suppress(OSError):  # It is not empty.
                os.rmdir(os.path.join(parent, name))
