"""An artifact while a run makes it: it is written whole or not at all, and a stopped run can be resumed.

A run fills a staging folder, in which `journal.json` says what is finished and durable. `manifest.json` is written
last; from then on the staging folder is a whole artifact, and what remains is to put it in its place. Where an output
is on a disk, the staging folder is `OUT.partial` beside it, and is renamed. Where OUT cannot be renamed, being a mount
point or in a folder that takes no files, the staging folder is `OUT/.partial`, and the files are moved up one by one,
the manifest last. Each step on the way can be taken again, so a run that is killed at any moment can be resumed or
discarded by the next one.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.typing import DTypeLike, NDArray

from gpu_init.artifact.format import (
    FORMAT,
    FORMAT_VERSION,
    JOURNAL_FORMAT,
    MANIFEST,
    SCRATCH,
    Json,
    Shape,
    check_modality,
    header_bytes,
    is_inside,
    map_array,
    misread,
    plain,
    read_header,
    seal,
    shown,
    table_rows,
)
from gpu_init.artifact.publish import Place
from gpu_init.artifact.rows import SYNC_BYTES, Folder
from gpu_init.errors import GpuInitError, InputError
from gpu_init.files import npy, storage

_INPUT = "input "  # A name of an input begins with this where a message names what changed.


class Staging:
    """The folder of a run before it is an artifact; `open_staging` makes it, with these parameters.

    This is a context manager. When an exception leaves it, what is durable stays, so that a later run can resume. But
    a run that resumed nothing leaves no trace after an InputError, or after any exception before it finished
    something. Only one run at a time has the staging folder of an output: the lock is the file `.OUT.lock` beside it
    (`OUT/.partial.lock` where OUT cannot be renamed), which its holder removes at the end.

    Attributes
    ----------
    path : str
        Path of the folder.
    complete : bool
        An artifact of the same identity is already there, so nothing is left to do.
    resumed : bool
        This run goes on with an unfinished one.
    discarded : bool
        An earlier unfinished run was removed.
    """

    def __init__(self, place: Place, *, resume: bool, overwrite: bool, identity: Json) -> None:
        self.path = place.staging
        self.complete = self.resumed = self.discarded = False
        self._place = place
        self._lock: storage.Lock | None = None
        self._made_parents: list[str] = []  # Folders that this run made, the deepest one first.
        self._created = self._replaces = False
        self._journal: Json = {}
        self._mutex, self._hashing = threading.Lock(), threading.Lock()
        self._sinks: dict[str, storage.Sink] = {}  # What is hashed of the arrays that are being filled.
        folder = os.path.dirname(place.lock)
        with storage.writing(folder):
            try:
                self._make_parents(folder)
                self._lock = storage.Lock(place.lock, place.out)
                self._begin(resume, overwrite, plain(identity))
            except BaseException:
                self._leave(remove=True)
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        done = any(self._journal.get(part) for part in ("finished", "files"))
        self._leave(remove=isinstance(error, InputError) or (error is not None and not done))

    def _leave(self, remove: bool) -> None:
        """Let go of the lock; first remove the folder, if this run made it."""
        try:
            if remove and self._created:
                with suppress(OSError, GpuInitError):  # The reason to leave says more.
                    self._place.abandon()
        finally:
            if self._lock is not None:
                self._lock.release()
                self._lock = None
            for parent in self._made_parents if remove else ():
                with suppress(OSError):  # It is not empty, so somebody else uses it by now.
                    os.rmdir(parent)

    def _make_parents(self, folder: str) -> None:
        if not os.path.lexists(folder):
            self._make_parents(os.path.dirname(folder))
            os.mkdir(folder)
            self._made_parents.insert(0, folder)

    # Beginning.

    def _begin(self, resume: bool, overwrite: bool, identity: Json) -> None:
        found = self._place.unfinished(resume)
        there = self._place.artifact()
        if there is not None:
            if resume and there.get("identity") == identity and self._place.is_whole(there):
                self._place.discard()
                self.complete = True
                return
            self._check_replaceable(there, overwrite, identity if resume else None)
            self._replaces = True
        changed = "; ".join(_changes(found.get("identity"), identity)) if found else ""
        if changed and found and found["format"] == FORMAT and there is not None:
            found = None  # This is an old artifact; the run that replaced it was killed while it removed it.
        elif changed:
            raise InputError(
                f"the unfinished run of {self._place.out} cannot be resumed: {changed}.\n"
                "Run without --resume to discard it, or with what it was begun with."
            )
        if found:
            self.resumed = True
            if found["format"] == FORMAT:
                self._place.publish(found, replaces=self._replaces)
                self.complete = True
            else:
                self._journal = found
                self._place.note(found)
            return
        self.discarded = self._place.discard()
        os.mkdir(self.path)
        self._created = True
        self._journal = {"format": JOURNAL_FORMAT, "identity": identity, "finished": {}, "files": {}}
        self._place.note(self._journal)
        storage.sync_dir(os.path.dirname(self.path))

    def _check_replaceable(self, there: Json, overwrite: bool, identity: Json | None) -> None:
        """Refuse to replace an artifact unasked, or together with files that its manifest does not list."""
        out, files = self._place.out, there.get("files")
        if not overwrite:
            changed = "; ".join(_changes(there.get("identity"), identity)) if identity is not None else ""
            other = f", made from other settings or inputs ({changed})" if changed else ""
            raise InputError(f"{out} already holds an artifact{other}; --overwrite replaces it.")
        foreign = next(self._place.foreign(files if isinstance(files, dict) else {}), None)
        if foreign is not None:
            raise InputError(f"{out} holds {shown(foreign)}, which is not of its artifact; move that away first.")

    # The work in between.

    def require_room(self, needed: int) -> None:
        """Refuse a run whose arrays do not fit on the disk; what an earlier run has written of them needs no room.

        Parameters
        ----------
        needed : int
            Bytes of all arrays together.

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
        """Return the facts that a step noted under a key, in this run or in the one that is resumed; else None."""
        facts = self._journal["finished"].get(key)
        return None if facts is None else dict(facts)

    def finish(self, key: str, facts: Json) -> None:
        """Note durably, under a key, that a step is finished, with facts (JSON) that a resumed run will want."""
        with self._mutex:
            self._journal["finished"][key] = plain(facts)
            self._place.note(self._journal)

    def save(self, relpath: str, array: NDArray[Any]) -> None:
        """Write an array, durably, as .npy in C order, and check what stands on the disk.

        Parameters
        ----------
        relpath : str
            Path in the folder, such as "image/labels.npy"; what is below "scratch/" never gets into the artifact.
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
        """Map an array that was saved, read-only."""
        return map_array(os.path.join(self.path, relpath))

    def allocate(self, relpath: str, shape: Shape, dtype: DTypeLike, key: str | None = None) -> bool:
        """Make room for an array that others fill by `row_writer`, unless an earlier run did.

        Parameters
        ----------
        relpath : str
            Path in the folder.
        shape : tuple of int
            Shape of the whole array.
        dtype : dtype
            Bool, integers or floats.
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
        path, prefix = self._path_for(relpath), header_bytes(shape, dtype)
        header = npy.Header(shape, "C", np.dtype(dtype), len(prefix))
        with storage.writing(self.path, header.end - header.offset):
            if os.path.exists(path) and read_header(path) == header:
                return True
            storage.require_free(self.path, header.end - header.offset)
            with self._mutex:
                if key is not None and self._journal["finished"].pop(key, None) is not None:
                    self._place.note(self._journal)
            with storage.create(path, header.end - header.offset) as sink:
                sink.write(prefix)
                os.ftruncate(sink.descriptor, header.end)
        return False

    @contextmanager
    def adopting(self, relpath: str) -> Iterator[Callable[[int], object]]:
        """Hash an array while others fill it by `row_writer`; when the context is left, the array is noted as finished.

        What this process writes in the order of the file is hashed as it is written, see `arrays`.

        Yields
        ------
        callable
            It takes the number of first rows of the array that are written and durable by now: a thread then hashes
            those that are not hashed yet, so that little is left to hash at the end.
        """
        path, sink = self._path_for(relpath), storage.Sink(-1)
        header = read_header(path)
        if header is None:
            raise misread(path)

        def hash_to(end: int) -> None:
            with storage.reading(path) as file:  # Opened anew, storage over a network shows what others wrote.
                while sink.size < end:
                    with self._hashing:
                        start, sink.descriptor = sink.size, file.fileno()
                        os.lseek(sink.descriptor, start, os.SEEK_SET)
                        sink.skip(min(start + SYNC_BYTES, end))
                        # Nobody reads these pages soon: the next rows take their place in memory, not that of others.
                        os.posix_fadvise(sink.descriptor, start, sink.size - start, os.POSIX_FADV_DONTNEED)

        hash_to(header.offset)
        self._sinks[relpath] = sink
        row_bytes = (header.end - header.offset) // max(header.shape[0], 1)
        thread = ThreadPoolExecutor(1)
        try:
            yield lambda rows: thread.submit(hash_to, header.offset + rows * row_bytes)
        finally:
            thread.shutdown(cancel_futures=True)
            del self._sinks[relpath]
        hash_to(header.end)  # This goes on where the thread ended, and raises again what it met there.
        self._note_array(relpath, sink)

    def arrays(self) -> Folder:
        """Give the arrays of this run for tasks in this process."""
        return Folder(self.path, self._written)

    def _written(self, relpath: str, place: int, data: memoryview) -> None:
        """Hash bytes that were written just now, where they follow those that are hashed already."""
        sink = self._sinks.get(relpath)
        if sink is not None:
            with self._hashing:
                if sink.size == place:
                    sink.digest.update(data)
                    sink.size += len(data)

    def _path_for(self, relpath: str) -> str:
        """Return the path of a file to write, once its folder is made."""
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
        if header is None or header.end != sink.size:
            raise misread(path)
        self._note_file(relpath, sink, {"shape": list(header.shape), "dtype": header.dtype.name})

    def _note_file(self, relpath: str, sink: storage.Sink, facts: Json) -> None:
        with self._mutex:
            self._journal["files"][relpath] = {"bytes": sink.size, "sha256": sink.digest.hexdigest(), **facts}
            self._place.note(self._journal)

    # The end.

    def commit(self, manifest: Json) -> str:
        """Make the folder an artifact and put it in its place; the run is then over.

        Parameters
        ----------
        manifest : dict
            What the manifest says of the run (JSON, no NaN); format, files, identity and checksum are added.

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
        self._created = False  # From here on nothing takes the finished work away.
        storage.write_file(os.path.join(self.path, MANIFEST), sealed)
        with storage.writing(self._place.out):
            self._place.publish(json.loads(sealed), replaces=self._replaces)
        self._leave(remove=False)
        return self._place.out


def _changes(old: Any, new: Json) -> list[str]:
    """Name each key of an identity that differs."""
    before, after = (dict(_flat(one)) for one in (old if isinstance(old, dict) else {}, new))
    changes = []
    for name in dict.fromkeys([*before, *after]):
        if name not in after:
            changes.append(f"{shown(name)}: no longer given")
        elif name not in before:
            changes.append(f"{shown(name)}: not given then")
        elif before[name] != after[name]:
            is_input = name.startswith(_INPUT)
            how = "content changed" if is_input else f"{shown(before[name])} -> {shown(after[name])}"
            changes.append(f"{shown(name)}: {how}")
    return changes


def _flat(identity: Json) -> Iterator[tuple[str, Any]]:
    """Yield the values of an identity by dotted names, the inputs by theirs."""
    for section, part in identity.items():
        if not isinstance(part, dict):
            yield section, part
            continue
        prefix = _INPUT if section == "inputs" else f"{section}."
        yield from ((prefix + name, value) for name, value in part.items())
