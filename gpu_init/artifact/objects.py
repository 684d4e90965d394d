"""Artifacts written to object storage: whole or not at all, where nothing can be renamed.

A run fills a staging folder on this machine, in `TMPDIR`, as it does for an output on a disk. Each file that is
finished is copied to `OUT/.partial/` as well, and then the journal that names it, so that a run can be resumed from
the output alone, on any machine. Arrays that are half written are not copied: another machine begins them anew. At
the end the store copies the files to their places by itself, the manifest last: without `manifest.json` nothing is
an artifact.

There are no locks. Each run puts a mark of its own into the journal, looks whether that still stands there before it
writes, and gives up where another has taken over: the newest run wins. What an older one still had on the way does no
harm, since runs of one identity make the same bytes, and the store takes a file whole or not at all.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import suppress

from gpu_init.artifact.format import (
    JOURNAL,
    MANIFEST,
    PARTIAL,
    REPLACED,
    REPORT,
    Json,
    file_problem,
    is_inside,
    listed_files,
    parse_journal,
    parse_manifest,
    seal,
)
from gpu_init.artifact.publish import Disk, Place, journal_in, remove_folder, require_none, unfinished_in
from gpu_init.artifact.read import not_stored
from gpu_init.artifact.staging import Staging
from gpu_init.errors import InputError, ResourceError
from gpu_init.files import remote, storage


def open_staging(out: str | os.PathLike[str], *, resume: bool, overwrite: bool, identity: Json) -> Staging:
    """Take the output's lock, and begin a run or go on with one.

    Parameters
    ----------
    out : path-like
        Folder or URL where the artifact will stand. A link to a folder is followed. Missing parents are made.
    resume : bool
        Go on with an unfinished run, or accept an artifact that is there, when their identity is the same.
    overwrite : bool
        Replace an artifact that is there, at the end; the old folder goes with all that its manifest lists.
    identity : dict
        JSON of what must be equal for a resume; each value of its key "inputs" is what an input is known by.

    Raises
    ------
    InputError
        Another run writes to the output; something else stands there; an artifact stands there and `overwrite`
        is not given; the unfinished run had another identity.
    ResourceError
        The disk is full.
    """
    path = os.fspath(out)
    if "\0" in path:
        raise InputError(f"{path!r} is not a path.")
    place: Place = ObjectStorage(path) if remote.is_url(path) else Disk(path)
    return Staging(place, resume=resume, overwrite=overwrite, identity=identity)


class ObjectStorage:
    """An output in object storage, with its staging folder on this machine."""

    def __init__(self, url: str) -> None:
        self.out = storage.real_path(url)
        folder = os.path.join(os.path.realpath(tempfile.gettempdir()), f"gpu-init-{os.getuid()}")
        with storage.writing(folder):
            os.makedirs(folder, mode=0o700, exist_ok=True)
            if os.stat(folder).st_uid != os.getuid():
                raise InputError(f"{folder} is another user's; set TMPDIR to a folder of your own.")
        here = os.path.join(folder, hashlib.sha256(self.out.encode()).hexdigest()[:16])
        self.staging, self.lock = f"{here}{PARTIAL}", f"{here}.lock"
        self._mark = uuid.uuid4().hex
        self._stored: dict[str, str] = {}  # The SHA-256 of each file that the store has below `OUT/.partial/`.
        self._has_noted = False  # The journal in the store has this run's mark, unless another has taken over.

    def unfinished(self, resume: bool) -> Json | None:
        there = parse_journal(self._staged_data(JOURNAL)) if resume else {}
        if not there:
            return None
        if journal_in(self.staging).get("mark") != there.get("mark"):
            self._restore(there)
        self._stored = {name: entry["sha256"] for name, entry in there["files"].items()}
        return unfinished_in(self.staging)

    def _restore(self, journal: Json) -> None:
        """Copy what a run left in the store to the staging folder, the journal last."""
        remove_folder(self.staging)
        files = {name: entry for name, entry in journal["files"].items() if is_inside(name)}
        storage.require_free(os.path.dirname(self.staging), sum(entry["bytes"] for entry in files.values()))
        os.mkdir(self.staging)
        with suppress(InputError):  # A file is missing where the run was about to be discarded.
            for name in files:
                path = os.path.join(self.staging, name)
                os.makedirs(os.path.dirname(path), exist_ok=True)
                remote.download(self._staged(name), path)
        if all(file_problem(self.staging, name, entry) is None for name, entry in files.items()):
            storage.write_file(os.path.join(self.staging, JOURNAL), seal(journal))

    def artifact(self) -> Json | None:
        data = remote.read_if_there(self._url(MANIFEST))
        if data is not None:
            return parse_manifest(self._url(MANIFEST), data)
        require_none(self.out, self.foreign(self._half_published()))
        return None

    def is_whole(self, manifest: Json) -> bool:
        return not not_stored(self.out, manifest["files"])

    def foreign(self, files: Json) -> Iterator[str]:
        for name in remote.sizes(self.out):
            if name not in files and name not in (MANIFEST, REPORT) and not name.startswith(f"{PARTIAL}/"):
                yield name

    def discard(self) -> bool:
        if remote.read_if_there(self._url(MANIFEST)) is None:
            for name in self._half_published():
                remote.remove(self._url(name))
        found = self._clear_store()
        return remove_folder(self.staging) or found

    def abandon(self) -> None:
        try:
            if self._has_noted:
                self._require_newest()
                self._clear_store()
        finally:
            remove_folder(self.staging)

    def note(self, journal: Json) -> None:
        note = seal({**journal, "mark": self._mark})
        storage.write_file(os.path.join(self.staging, JOURNAL), note)
        if self._has_noted:
            self._require_newest()
        for name, entry in journal["files"].items():
            if self._stored.get(name) != entry["sha256"]:
                remote.upload(os.path.join(self.staging, name), self._staged(name))
                self._stored[name] = entry["sha256"]
        remote.write(self._staged(JOURNAL), note)
        self._has_noted = True

    def publish(self, manifest: Json, *, replaces: bool) -> None:  # noqa: ARG002
        """Have the store copy the files to their places; a manifest that is there goes first, whatever it is of."""
        if not self._has_noted:  # An earlier run was killed while it published.
            self.note(journal_in(self.staging))
        self._require_newest()
        files = manifest["files"]
        old = remote.read_if_there(self._url(MANIFEST))
        if old is not None:
            remote.write(self._staged(REPLACED), old)
            remote.remove(self._url(MANIFEST))
        for name in [REPORT, *self._half_published()]:
            if name not in files:
                remote.remove(self._url(name))
        for name in files:
            remote.copy(self._staged(name), self._url(name))
        if not self.is_whole(manifest):
            raise ResourceError(f"{self.out}: not all files are there as they were written; run with --resume.")
        with storage.reading(os.path.join(self.staging, MANIFEST)) as file:
            remote.write(self._url(MANIFEST), file.read())
        self._clear_store()
        remove_folder(self.staging)

    def _url(self, name: str) -> str:
        return f"{self.out}/{name}"

    def _staged(self, name: str) -> str:
        return self._url(f"{PARTIAL}/{name}")

    def _staged_data(self, name: str) -> bytes | None:
        return remote.read_if_there(self._staged(name))

    def _half_published(self) -> Json:
        """Files of a run that was killed while it published them, and of the artifact that it replaced."""
        return listed_files(self._staged_data(JOURNAL), self._staged_data(REPLACED))

    def _require_newest(self) -> None:
        if parse_journal(self._staged_data(JOURNAL)).get("mark") != self._mark:
            raise InputError(f"{self.out}: another run has taken over; this one ends.")

    def _clear_store(self) -> bool:
        """Remove all that runs have below `OUT/.partial/`, the journal last; tell whether there was anything."""
        names = sorted(remote.sizes(self._url(PARTIAL)), key=lambda name: name == JOURNAL)
        for name in names:
            remote.remove(self._staged(name))
        self._stored = {}
        return bool(names)
