"""The output folder: written whole or not at all, read back without trust (design, section 4).

Writing. A run fills a staging folder, `OUT.partial` beside OUT, in which `journal.json` says what is finished and
durable. `manifest.json` is written last; from then on the staging folder is a whole artifact, and what remains is to
put it in its place by renaming. Where OUT cannot be renamed, being a mount point or in a folder that takes no files,
the staging folder is `OUT/.partial`, and the files are moved up one by one, the manifest last. Each step on the way
can be taken again, so a run that is killed at any moment can be resumed or discarded by the next one.

Reading. A folder is an artifact when `manifest.json` is there, says so, and is, byte for byte, what its own
checksum and this module's JSON (indented by 2, UTF-8) make of its content. No file is opened before its path, size,
shape and dtype are found to be what the manifest says; pickles are never loaded.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.typing import DTypeLike, NDArray

from gpu_init.artifact.format import (
    FORMAT,
    FORMAT_VERSION,
    JOURNAL,
    JOURNAL_FORMAT,
    MANIFEST,
    MANIFEST_BYTES,
    REPLACED,
    REPORT,
    SCRATCH,
    Header,
    Json,
    Shape,
    check_modality,
    file_problem,
    header_bytes,
    is_inside,
    is_journal,
    map_array,
    misread,
    plain,
    read_header,
    read_manifest,
    seal,
    shown,
    table_rows,
    unseal,
)
from gpu_init.artifact.publish import Place, check_ours, prune, remove_folder, unlink_listed
from gpu_init.artifact.read import problems, unlisted
from gpu_init.artifact.rows import SYNC_BYTES
from gpu_init.errors import InputError
from gpu_init.files import storage


class Staging:
    """A run's folder before it is an artifact.

    A context manager. Leaving it by an exception keeps what is durable, so that a later run can resume; but an
    InputError, or any before something was finished, leaves no trace in a run that resumed nothing. Only one run at
    a time has the staging folder of an output: the lock is the file `.OUT.lock` beside it (`OUT/.partial.lock` where
    OUT cannot be renamed), removed at the end by its holder.

    Attributes
    ----------
    path : str
        The folder.
    complete : bool
        The artifact is already there, of the same identity: nothing is left to do.
    resumed : bool
        An unfinished run is gone on with.
    discarded : bool
        An unfinished run was removed.
    """

    def __init__(self, place: Place) -> None:
        self.path = place.staging
        self.complete = self.resumed = self.discarded = False
        self._place = place
        self._lock: storage.Lock | None = None
        self._parents: list[str] = []  # that this run made, the deepest first
        self._created = False
        self._replaces = False
        self._journal: Json = {}
        self._mutex = threading.Lock()

    @classmethod
    def open(cls, out: str | os.PathLike[str], *, resume: bool, overwrite: bool, identity: Json) -> Staging:
        """Take the output's lock, and begin a run or go on with one.

        Parameters
        ----------
        out : path-like
            Where the artifact will stand. A link to a folder is followed. Missing parents are made.
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
        if "\0" in os.fspath(out):
            raise InputError(f"{os.fspath(out)!r} is not a path.")
        place = cls._placed(os.fspath(out))
        staging = cls(place)
        folder = os.path.dirname(place.lock)
        with storage.writing(folder):
            try:
                staging._make_parents(folder)
                staging._lock = storage.Lock(place.lock, place.out)
                staging._begin(resume, overwrite, plain(identity))
            except BaseException:
                staging._leave(remove=True)
                raise
        return staging

    @classmethod
    def _placed(cls, out: str) -> Place:
        place = Place.of(os.path.realpath(out))
        if os.path.lexists(place.out) and not os.path.isdir(place.out):
            raise InputError(f"{place.out} is not a folder; choose another output.")
        return place

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        done = any(self._journal.get(part) for part in ("finished", "files"))
        self._leave(remove=isinstance(error, InputError) or (error is not None and not done))

    def _leave(self, remove: bool) -> None:
        """Stop what is being written and let go of the lock; remove the folder too, if this run made it."""
        try:
            if remove and self._created:
                with suppress(OSError):  # the reason to leave says more
                    remove_folder(self.path)
        finally:
            if self._lock is not None:
                self._lock.release()
                self._lock = None
            for parent in self._parents if remove else ():
                with suppress(OSError):  # not empty: somebody else's by now
                    os.rmdir(parent)

    def _make_parents(self, folder: str) -> None:
        missing = []
        while not os.path.lexists(folder):
            missing.append(folder)
            folder = os.path.dirname(folder)
        for parent in reversed(missing):
            os.mkdir(parent)
            self._parents.insert(0, parent)

    # Beginning.

    def _begin(self, resume: bool, overwrite: bool, identity: Json) -> None:
        self._put_back()
        found = self._unfinished()
        there = self._artifact_there()
        if there is not None and resume and self._accepts(there, identity):
            self._clear()
            self.complete = True
            return
        if there is not None:
            self._check_replaceable(there, overwrite, identity if resume else None)
        self._replaces = there is not None
        if resume and found:
            changed = "; ".join(_changes(found.get("identity"), identity))
            if changed and there is not None and found["format"] == FORMAT:
                found = None  # an old artifact, killed while it was removed after it was replaced
            elif changed:
                raise InputError(
                    f"the unfinished run of {self._place.out} cannot be resumed: {changed}.\n"
                    "Run without --resume to discard it, or with what it was begun with."
                )
        if resume and found:
            self.resumed = True
            if found["format"] == FORMAT:
                self._publish(found)
                self.complete = True
            else:
                self._journal = found
            return
        self.discarded = self._discard()
        os.mkdir(self.path)
        self._created = True
        self._journal = {"format": JOURNAL_FORMAT, "identity": identity, "finished": {}, "files": {}}
        self._write_journal()
        storage.sync_dir(os.path.dirname(self.path))

    def _clear(self) -> None:
        """Remove the staging folder of a run that has nothing to do."""
        remove_folder(self.path)

    def _put_back(self) -> None:
        """Undo, or end, the replacing of an artifact in two steps that was cut in half."""
        out, aside = self._place.out, self._place.aside
        if self._place.inside or not os.path.lexists(aside):
            return
        check_ours(aside)
        if os.path.lexists(out):
            remove_folder(aside)
        else:
            os.rename(aside, out)
            storage.sync_dir(os.path.dirname(out))

    def _unfinished(self) -> Json | None:
        """Manifest or journal of the run that the staging folder holds; None when it holds none that can be used."""
        if not os.path.lexists(self.path):
            return None
        check_ours(self.path)
        with suppress(InputError):
            manifest = read_manifest(self.path)
            if isinstance(manifest.get("files"), dict) and self._all_there(manifest["files"]):
                return manifest
        journal = self._journal_here()
        with suppress(InputError):
            if journal and is_journal(journal) and self._all_there(journal["files"]):
                return journal
        return None

    def _journal_here(self) -> Json | None:
        """Content of the journal in the staging folder; None where there is none, or it is spoilt."""
        with suppress(InputError), storage.reading(os.path.join(self.path, JOURNAL)) as file:
            return unseal(file.read(MANIFEST_BYTES))
        return None

    def _all_there(self, files: Json) -> bool:
        """Tell whether every file is in the staging folder, or was moved up from it, as it was written."""
        roots = [self.path, self._place.out] if self._place.inside else [self.path]
        return all(any(file_problem(root, name, entry) is None for root in roots) for name, entry in files.items())

    def _artifact_there(self) -> Json | None:
        """Manifest of the artifact at the output's place; None when the place is free.

        Raises
        ------
        InputError
            Something stands there that is not an artifact, and is never removed.
        """
        out = self._place.out
        if not os.path.isdir(out):
            return None
        if not os.path.lexists(os.path.join(out, MANIFEST)):
            held = self._foreign(self._half_published()) if self._place.inside else iter(os.listdir(out))
            foreign = next(held, None)
            if foreign is None:
                return None
            raise InputError(
                f"{out} is not empty and not an artifact (it holds {shown(foreign)} and no {MANIFEST});"
                " choose another output, or move that away."
            )
        return read_manifest(out)

    def _accepts(self, there: Json, identity: Json) -> bool:
        """Whether the artifact at the output's place is what this run would make."""
        return there.get("identity") == identity and next(problems(self._place.out, there), None) is None

    def _check_replaceable(self, there: Json, overwrite: bool, identity: Json | None) -> None:
        """Refuse to replace an artifact unasked, or together with files that its manifest does not list."""
        out, files = self._place.out, there.get("files")
        if not overwrite:
            changed = "; ".join(_changes(there.get("identity"), identity)) if identity is not None else ""
            other = f", made from other settings or inputs ({changed})" if changed else ""
            raise InputError(f"{out} already holds an artifact{other}; --overwrite replaces it.")
        foreign = next(self._foreign(files if isinstance(files, dict) else {}), None)
        if foreign is not None:
            raise InputError(f"{out} holds {shown(foreign)}, which is not of its artifact; move that away first.")

    def _foreign(self, files: Json) -> Iterator[str]:
        """Files in the output that are none of these, and no run's."""
        return unlisted(self._place.out, files)

    def _half_published(self) -> Json:
        """Files of a run that was killed while they were moved up into an output that cannot be renamed."""
        listed: Json = {}
        if self._place.inside and not os.path.lexists(os.path.join(self._place.out, MANIFEST)):
            for name in (MANIFEST, REPLACED):
                with suppress(InputError), storage.reading(os.path.join(self.path, name)) as file:
                    files = (unseal(file.read(MANIFEST_BYTES)) or {}).get("files")
                    listed |= files if isinstance(files, dict) else {}
        return listed

    def _discard(self) -> bool:
        """Remove an unfinished run; tell whether there was one."""
        unlink_listed(self._place.out, self._half_published())
        return remove_folder(self.path)

    # The work in between.

    def require_room(self, needed: int) -> None:
        """Refuse a run whose arrays do not fit on the disk, less what an earlier run has written of them.

        Parameters
        ----------
        needed : int
            Bytes of all of them.

        Raises
        ------
        ResourceError
            Fewer bytes are free.
        """
        found = (os.stat(os.path.join(folder, name)) for folder, _, names in os.walk(self.path) for name in names)
        # An array has its full size before all of its rows are written; the rest of it has no blocks on the disk yet.
        written = sum(min(state.st_size, state.st_blocks * 512) for state in found)
        storage.require_free(self.path, needed - written)

    def finished(self, key: str) -> Json | None:
        """Facts that a step noted when it was finished, in this run or in the one that is resumed; else None."""
        facts = self._journal["finished"].get(key)
        return None if facts is None else dict(facts)

    def finish(self, key: str, facts: Json) -> None:
        """Note durably that a step is finished, with facts (JSON) that a resumed run will want."""
        with self._mutex:
            self._journal["finished"][key] = plain(facts)
            self._write_journal()

    def save(self, relpath: str, array: NDArray[Any]) -> None:
        """Write an array, durably, as .npy in C order, and check what stands on the disk.

        Parameters
        ----------
        relpath : str
            Where in the folder, such as "image/labels.npy"; below "scratch/" it never gets into the artifact.
        array : ndarray
            Any shape; bool, integers or floats.

        Raises
        ------
        ResourceError
            The disk is full.
        """
        array = np.ascontiguousarray(array)
        path = self._path_for(relpath)
        header = header_bytes(array.shape, array.dtype)
        with storage.create(path, len(header) + array.nbytes) as sink:
            sink.write(header)
            sink.write(array.data)
        self._note_array(relpath, sink)

    def save_table(self, relpath: str, table: pd.DataFrame) -> None:
        """Write a table, durably, as Parquet without its index."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self._path_for(relpath)
        rows = pa.Table.from_pandas(table, preserve_index=False).replace_schema_metadata(None)
        with storage.create(path, rows.nbytes) as sink:
            pq.write_table(rows, sink)
        if table_rows(path) != len(table):
            raise misread(path)
        self._note_file(relpath, sink, {"rows": len(table)})

    def load(self, relpath: str) -> NDArray[Any]:
        """Map an array that was saved; read-only."""
        return map_array(os.path.join(self.path, relpath))

    def allocate(self, relpath: str, shape: Shape, dtype: DTypeLike, key: str | None = None) -> bool:
        """Make room for an array that others fill by `row_writer`, unless an earlier run did.

        Parameters
        ----------
        relpath : str
            Where in the folder.
        shape, dtype
            Of the whole array.
        key : str, optional
            Key under which the caller notes, by `finish`, which rows are written. Before the array is made anew,
            that note is removed, durably: `finished` then never tells of rows that are not there.

        Returns
        -------
        bool
            True where the array was already there from an earlier run, of this shape and dtype; False where it was
            made anew, so that none of its rows is written.

        Raises
        ------
        ResourceError
            A new array does not fit on the disk.
        """
        path, header = self._path_for(relpath), Header(shape, np.dtype(dtype), 0)
        prefix = header_bytes(shape, header.dtype)
        size = len(prefix) + header.data_bytes
        with storage.writing(self.path, size):
            if os.path.exists(path) and read_header(path) == replace(header, offset=len(prefix)):
                return True
            storage.require_free(self.path, header.data_bytes)
            with self._mutex:
                if key is not None and self._journal["finished"].pop(key, None) is not None:
                    self._write_journal()
            with storage.create(path, size) as sink:
                sink.write(prefix)
                os.ftruncate(sink.descriptor, size)
        return False

    @contextmanager
    def adopting(self, relpath: str) -> Iterator[Callable[[int], None]]:
        """Note an array as finished, when this is left, that others fill by `row_writer` in the meantime.

        Yields
        ------
        callable
            It takes the number of first rows of the array that are written and durable by now: a thread then hashes
            them, so that little is left to hash at the end.
        """
        path, sink, left = self._path_for(relpath), storage.Sink(-1), threading.Event()
        header = read_header(path)
        if header is None:
            raise misread(path)

        def hash_to(end: int) -> None:
            with storage.reading(path) as file:  # anew, so that storage over a network shows what others wrote
                sink.descriptor = file.fileno()
                os.lseek(sink.descriptor, sink.size, os.SEEK_SET)
                for start in range(sink.size, end, SYNC_BYTES):
                    if left.is_set():
                        return
                    sink.skip(min(start + SYNC_BYTES, end))
                    # Nobody reads these pages soon: the next rows take their place in memory, not that of others.
                    os.posix_fadvise(sink.descriptor, start, sink.size - start, os.POSIX_FADV_DONTNEED)

        row_bytes = header.data_bytes // max(header.shape[0], 1)
        parts: list[Future[None]] = []
        with ThreadPoolExecutor(1) as thread:
            try:
                yield lambda rows: parts.append(thread.submit(hash_to, header.offset + rows * row_bytes))
                parts.append(thread.submit(hash_to, header.offset + header.data_bytes))
                for part in parts:
                    part.result()
            finally:
                left.set()
        self._note_array(relpath, sink)

    def _path_for(self, relpath: str) -> str:
        """Path of a file to write, its folder made."""
        name, *inner = relpath.split("/")
        if inner and name != SCRATCH:
            check_modality(name)
        if not is_inside(relpath):
            raise InputError(f"{shown(relpath)}: leads out of the artifact.")
        path = os.path.join(self.path, relpath)
        with storage.writing(self.path):
            folder = os.path.dirname(path)
            if not os.path.isdir(folder):
                os.makedirs(folder)
                storage.sync_dir(self.path)
        return path

    def _note_array(self, relpath: str, sink: storage.Sink) -> None:
        """Note an array that was written, once its header and size are read back."""
        path = os.path.join(self.path, relpath)
        header = read_header(path)
        if header is None or header.offset + header.data_bytes != sink.size:
            raise misread(path)
        self._note_file(relpath, sink, {"shape": list(header.shape), "dtype": header.dtype.name})

    def _note_file(self, relpath: str, sink: storage.Sink, facts: Json) -> None:
        with self._mutex:
            self._journal["files"][relpath] = {"bytes": sink.size, "sha256": sink.digest.hexdigest(), **facts}
            self._write_journal()

    def _write_journal(self) -> None:
        storage.write_file(os.path.join(self.path, JOURNAL), seal(self._journal))

    # The end.

    def commit(self, manifest: Json) -> str:
        """Make the folder an artifact and put it in its place; the run is then over.

        Parameters
        ----------
        manifest : dict
            What to say of the run (JSON, no NaN); format, files, identity and checksum are added.

        Returns
        -------
        str
            Path of the artifact.

        Raises
        ------
        InputError
            Something appeared at the output's place meanwhile.
        ResourceError
            The disk is full.
        """
        files = {name: entry for name, entry in self._journal["files"].items() if not name.startswith(f"{SCRATCH}/")}
        whole = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            **manifest,
            "files": files,
            "identity": self._journal["identity"],
        }
        sealed = seal(whole)
        self._created = False  # from here on nothing takes the finished work away
        storage.write_file(os.path.join(self.path, MANIFEST), sealed)
        with storage.writing(self._place.out):
            self._publish(json.loads(sealed))
        self._leave(remove=False)
        return self._place.out

    def _publish(self, manifest: Json) -> None:
        """Put a staging folder that has its manifest in the output's place; every step may be taken again."""
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(self.path, JOURNAL))
        prune(self.path, {MANIFEST, REPLACED, *manifest["files"]})
        for folder, _, _ in os.walk(self.path):
            storage.sync_dir(folder)
        if self._place.inside:
            self._move_up(manifest)
        else:
            self._put_in_place()

    def _put_in_place(self) -> None:
        place, parent = self._place, os.path.dirname(self._place.out)
        if not (self._replaces and os.path.isdir(place.out)):
            os.rename(place.staging, place.out)  # an empty folder gives way, a full one does not
            storage.sync_dir(parent)
            return
        old = place.staging
        if not storage.exchange(place.staging, place.out):
            old = place.aside
            os.rename(place.out, old)
            os.rename(place.staging, place.out)
        storage.sync_dir(parent)
        remove_folder(old)

    def _move_up(self, manifest: Json) -> None:
        """Move the files into an output that cannot be renamed, the manifest last."""
        out = self._place.out
        if os.path.lexists(os.path.join(out, MANIFEST)):
            os.replace(os.path.join(out, MANIFEST), os.path.join(self.path, REPLACED))
            storage.sync_dir(self.path)
            storage.sync_dir(out)
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(out, REPORT))  # of the artifact that was there
        files = manifest["files"]
        unlink_listed(out, {name: entry for name, entry in self._half_published().items() if name not in files})
        for name in files:
            if os.path.lexists(os.path.join(self.path, name)):
                os.makedirs(os.path.dirname(os.path.join(out, name)), exist_ok=True)
                os.replace(os.path.join(self.path, name), os.path.join(out, name))
        for folder in {os.path.dirname(os.path.join(out, name)) for name in files} | {out}:
            storage.sync_dir(folder)
        os.replace(os.path.join(self.path, MANIFEST), os.path.join(out, MANIFEST))
        storage.sync_dir(out)
        remove_folder(self.path)


def _changes(old: Any, new: Json) -> list[str]:
    """Name each key of an identity that differs."""
    old = old if isinstance(old, dict) else {}
    before, after = (
        {key: value for section, part in one.items() for key, value in _flat(section, part)} for one in (old, new)
    )
    changes = []
    for key in dict.fromkeys([*before, *after]):
        is_input, name = isinstance(key, tuple), " ".join(key) if isinstance(key, tuple) else key
        if key not in after:
            changes.append(f"{shown(name)}: no longer given")
        elif key not in before:
            changes.append(f"{shown(name)}: not given then")
        elif before[key] != after[key]:
            how = "content changed" if is_input else f"{shown(before[key])} -> {shown(after[key])}"
            changes.append(f"{shown(name)}: {how}")
    return changes


def _flat(section: str, part: Any) -> Iterator[tuple[str | tuple[str, str], Any]]:
    """Keys of a part of an identity and their values: dotted names, and ("input", name) for the inputs."""
    if not isinstance(part, dict):
        yield section, part
    elif section == "inputs":
        yield from ((("input", name), value) for name, value in part.items())
    else:
        for name, value in part.items():
            yield from _flat(f"{section}.{name}", value)
