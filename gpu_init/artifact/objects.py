"""Artifacts written to object storage: whole or not at all, where nothing can be renamed.

A run fills a staging folder on this machine, in `TMPDIR`, as it does for an output on a disk. Each file that is
finished is copied to `OUT/.partial/` as well, and then the journal that names it, so that a run can be resumed from
the output alone, on any machine; where its folder is still there, half-written arrays are gone on with too. At the end
the store copies the files to their places by itself, the manifest last: without `manifest.json` nothing is an artifact.

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
    is_journal,
    parse_manifest,
    seal,
    unseal,
)
from gpu_init.artifact.publish import Place, remove_folder
from gpu_init.artifact.read import not_stored
from gpu_init.artifact.staging import Staging
from gpu_init.errors import GpuInitError, InputError, ResourceError
from gpu_init.files import remote, storage


def open_staging(out: str, *, resume: bool, overwrite: bool, identity: Json) -> Staging:
    """`Staging.open`, for an output on a disk or in object storage."""
    kind = ObjectStaging if remote.is_url(out) else Staging
    return kind.open(out, resume=resume, overwrite=overwrite, identity=identity)


class ObjectStaging(Staging):
    """A run's folder before it is an artifact in object storage; `Staging` says what it does."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self._mark = uuid.uuid4().hex
        self._stored: dict[str, str] = {}  # SHA-256 of each file that the store has
        self._noted = b""  # the journal in the store, as this run wrote it last
        self._resume = False

    @classmethod
    def _placed(cls, out: str) -> Place:
        url = storage.real_path(out)
        folder = os.path.join(os.path.realpath(tempfile.gettempdir()), f"gpu-init-{os.getuid()}")
        with storage.writing(folder):
            os.makedirs(folder, mode=0o700, exist_ok=True)
            if os.stat(folder).st_uid != os.getuid():
                raise InputError(f"{folder} is another user's; set TMPDIR to a folder of your own.")
        here = os.path.join(folder, hashlib.sha256(url.encode()).hexdigest()[:16])
        return Place(url, f"{here}.partial", f"{here}.lock", f"{here}.replaced", inside=False)

    def _url(self, name: str) -> str:
        return f"{self._place.out}/{name}"

    def _staged(self, name: str) -> str:
        return self._url(f"{PARTIAL}/{name}")

    # Beginning.

    def _begin(self, resume: bool, overwrite: bool, identity: Json) -> None:
        self._resume = resume
        super()._begin(resume, overwrite, identity)
        if self.resumed and not self.complete:
            self._write_journal()  # with this run's mark

    def _put_back(self) -> None:
        """Nothing is renamed, so nothing is ever halfway."""

    def _artifact_there(self) -> Json | None:
        data = remote.read_if_there(self._url(MANIFEST))
        if data is not None:
            return parse_manifest(self._url(MANIFEST), data)
        foreign = next(self._foreign(self._half_published()), None)
        if foreign is not None:
            raise InputError(
                f"{self._place.out} is not empty and not an artifact (it holds {foreign!a} and no {MANIFEST});"
                " choose another output, or move that away."
            )
        return None

    def _accepts(self, there: Json, identity: Json) -> bool:
        return there.get("identity") == identity and not not_stored(self._place.out, there["files"])

    def _foreign(self, files: Json) -> Iterator[str]:
        for name in remote.sizes(self._place.out):
            if name not in files and name not in (MANIFEST, REPORT) and not name.startswith(f"{PARTIAL}/"):
                yield name

    def _half_published(self) -> Json:
        listed: Json = {}
        for name in (JOURNAL, REPLACED):
            files = (self._sealed(name) or {}).get("files")
            listed |= files if isinstance(files, dict) else {}
        return {name: entry for name, entry in listed.items() if is_inside(name)}

    def _sealed(self, name: str) -> Json | None:
        data = remote.read_if_there(self._staged(name))
        return None if data is None else unseal(data)

    def _unfinished(self) -> Json | None:
        """What the folder here holds, if it is the newest run's; else what the store has of that run."""
        there = self._sealed(JOURNAL) if self._resume else None
        if there is None or not is_journal(there):
            return None
        here = self._journal_here()
        if here is None or here.get("mark") != there.get("mark"):
            self._restore(there)
        self._stored = {name: entry["sha256"] for name, entry in there["files"].items()}
        return super()._unfinished()

    def _restore(self, journal: Json) -> None:
        """Copy what a run left in the store to the folder here, the journal last."""
        remove_folder(self.path)
        files = {name: entry for name, entry in journal["files"].items() if is_inside(name)}
        storage.require_free(os.path.dirname(self.path), sum(entry["bytes"] for entry in files.values()))
        os.mkdir(self.path)
        for name in files:
            path = os.path.join(self.path, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            try:
                remote.download(self._staged(name), path)
            except InputError:
                return  # it was about to be discarded
        if all(file_problem(self.path, name, entry) is None for name, entry in files.items()):
            storage.write_file(os.path.join(self.path, JOURNAL), seal(journal))

    def _discard(self) -> bool:
        if remote.read_if_there(self._url(MANIFEST)) is None:
            for name in self._half_published():
                remote.remove(self._url(name))
        found = self._clear_store()
        self._stored = {}
        return remove_folder(self.path) or found

    def _clear(self) -> None:
        super()._clear()
        self._clear_store()

    def _clear_store(self) -> bool:
        """Remove all that runs have below `OUT/.partial/`, the journal last; tell whether there was anything."""
        names = sorted(remote.sizes(self._url(PARTIAL)), key=lambda name: name == JOURNAL)
        for name in names:
            remote.remove(self._staged(name))
        return bool(names)

    # The work in between.

    def _write_journal(self) -> None:
        """Note what is done, here and in the store, where only files that are whole count."""
        self._journal["mark"] = self._mark
        super()._write_journal()
        note = seal(self._journal)
        if note == self._noted:
            return
        if self._noted:
            self._require_newest()
        for name, entry in self._journal["files"].items():
            if self._stored.get(name) != entry["sha256"]:
                remote.upload(os.path.join(self.path, name), self._staged(name))
                self._stored[name] = entry["sha256"]
        remote.write(self._staged(JOURNAL), note)
        self._noted = note

    def _require_newest(self) -> None:
        if (self._sealed(JOURNAL) or {}).get("mark") != self._mark:
            raise InputError(f"{self._place.out}: another run has taken over; this one ends.")

    def _leave(self, remove: bool) -> None:
        if remove and self._created and self._noted:
            with suppress(GpuInitError):  # the reason to leave says more
                self._require_newest()
                self._clear_store()
        super()._leave(remove)

    # The end.

    def _publish(self, manifest: Json) -> None:
        """Have the store put the files in their places, the manifest last; every step may be taken again."""
        if not self._noted:  # a run that was killed here
            self._journal = self._journal_here() or {}
            self._write_journal()
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
        if not_stored(self._place.out, files):
            raise ResourceError(f"{self._place.out}: not all files are there as they were written; run with --resume.")
        with storage.reading(os.path.join(self.path, MANIFEST)) as file:
            remote.write(self._url(MANIFEST), file.read())
        self._clear_store()
        remove_folder(self.path)
