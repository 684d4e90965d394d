"""Users in parts: what one process holds of a run, and how work is given out to every part.

The users are cut into parts by the data alone, so the bytes of a result do not depend on who takes which part. A task
is a function of a `Part`; they are in `gpu_init.tasks`. `LocalParts` runs them in this process, one after another, and
`gpu_init.cluster` on the workers of a Dask cluster. Both are `Parts`, and `gpu_init.run` uses nothing else of them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from threading import RLock
from typing import Any, Protocol, TypeVar

from gpu_init.backend.interface import Backend
from gpu_init.method.matrix import Interactions
from gpu_init.method.modality import Modality
from gpu_init.method.norms import NORM_ROWS
from gpu_init.method.weighting import Weighting, weighting
from gpu_init.settings import Settings

PART_ROWS = 1 << 23  # A part has at most about this many interactions,
MOST_PARTS = 1 << 10  # but there are no more parts than this.

_T = TypeVar("_T")


def part_bounds(users: int, interactions: int) -> tuple[int, ...]:
    """First user of each part, and U at the end; all but the last are multiples of `NORM_ROWS`.

    There is an even number of parts, so that two workers have the same share, where there are users enough.
    """
    parts = min(2 * max(1, -(-interactions // (2 * PART_ROWS))), MOST_PARTS)
    step = max(1, -(-users // (parts * NORM_ROWS))) * NORM_ROWS
    return (*range(0, max(users, 1), step), users)


@dataclass(frozen=True)
class Plan:
    """What all tasks of a run have in common; small, since it travels to every worker.

    Attributes
    ----------
    settings : Settings
    bounds : tuple of int
        First user of each part, and U.
    items, pairs : int
        I, and the number of entries of R.
    block_bytes : int
        Memory in bytes for the blocks of vectors on their way to the output.
    """

    settings: Settings
    bounds: tuple[int, ...]
    items: int
    pairs: int
    block_bytes: int

    @property
    def parts(self) -> int:
        """Number of parts."""
        return len(self.bounds) - 1

    @property
    def users(self) -> int:
        """U."""
        return self.bounds[-1]


class Arrays(Protocol):
    """Arrays of a run by their paths in the artifact, as tasks use them: in a folder, or in memory."""

    def load(self, path: str) -> Any:
        """Return the whole array; in a folder it is memory-mapped."""

    def write_rows(self, path: str, first: int) -> AbstractContextManager[Callable[[Any], None]]:
        """Give a function that writes blocks of rows, one after another, from row ``first`` on."""

    def outbox(
        self, backend: Backend, path: str, first: int, rows: int, width: int, dtype: str
    ) -> AbstractContextManager[Any]:
        """Give an `Outbox` for blocks of at most ``rows`` rows, which are written from row ``first`` on."""


class Source(Protocol):
    """Where a process gets the data of a run from."""

    def part(self, number: int) -> Interactions:
        """Return the rows of R of one part."""

    def modality(self, name: str) -> Modality:
        """Return the features of a modality on the device."""

    def present(self, name: str) -> Any:
        """Return which items (I,) bool have a modality, on the device."""


class Process:
    """What one process holds of a run: its parts of R, one modality, and what tasks worked out and may need again."""

    def __init__(self, backend: Backend, plan: Plan, arrays: Arrays, source: Source) -> None:
        self.backend, self.plan, self.arrays, self.source = backend, plan, arrays, source
        self._kept: dict[Any, Any] = {}
        self._lock = RLock()

    def part(self, number: int) -> Part:
        """Return a part for a task."""
        return Part(self, number)

    def keep(self, key: tuple[Any, ...], make: Callable[[], _T]) -> _T:
        """Return what is kept under a key; where there is nothing, make it first."""
        with self._lock:
            if key not in self._kept:
                self._kept[key] = make()
            found: _T = self._kept[key]
            return found

    def take(self, key: tuple[Any, ...]) -> Any:
        """Return what is kept under a key, which is then no longer kept; None where there is nothing."""
        with self._lock:
            return self._kept.pop(key, None)

    def drop(self, which: Callable[[tuple[Any, ...]], bool]) -> None:
        """Forget what is kept under some of the keys."""
        with self._lock:
            for key in filter(which, list(self._kept)):
                del self._kept[key]

    def modality(self, name: str) -> Modality:
        """Return a modality's features; those of another modality are freed, since only one fits in memory."""
        self.drop(lambda key: key[0] in ("modality", "products", "lambda") and key[1] != name)
        return self.keep(("modality", name), lambda: self.source.modality(name))

    def item_products(self, name: str, offset: Any, points: Any) -> Any:
        """Products of all items less an offset with points (K, D), (I, K); the same for all parts, so they are kept."""
        backend = self.backend
        of = (backend.to_host(points).tobytes(), backend.to_host(offset).tobytes())
        known, products = self.take(("products", name)) or (None, None)
        if known != of:
            del products
            products = backend.kernels.products(self.modality(name).values, offset, points)
        self.keep(("products", name), lambda: (of, products))
        return products


class Part:
    """A range of users, in the process that does something about it."""

    def __init__(self, process: Process, number: int) -> None:
        self.process, self.number = process, number
        self.plan, self.backend = process.plan, process.backend
        self.settings = process.plan.settings
        self.users = slice(*process.plan.bounds[number : number + 2])

    def keep(self, key: tuple[Any, ...], make: Callable[[], _T]) -> _T:
        """As `Process.keep`, for this part."""
        return self.process.keep((*key, self.number), make)

    @property
    def interactions(self) -> Interactions:
        """Rows of R of these users."""
        return self.keep(("part",), lambda: self.process.source.part(self.number))

    def operator(self, name: str) -> Weighting:
        """Row and item factors of a modality, for these users."""

        def make() -> Weighting:
            present = self.process.keep(("present", name), lambda: self.process.source.present(name))
            path, factors = f"{name}/item_factors.npy", None
            if self.settings.weighting == "sym":
                load = self.process.arrays.load
                factors = self.process.keep(("factors", name), lambda: self.backend.asarray(load(path)))
            return weighting(self.backend, self.interactions, present, self.settings.weighting, factors)

        return self.keep(("operator", name), make)

    def own_rows(self, path: str) -> Any:
        """Rows of an array (U, ...) that are these users', on the device."""
        return self.backend.asarray(self.process.arrays.load(path)[self.users])

    def write_rows(self, path: str, rows: Any) -> None:
        """Write the rows of an array (U, ...) that are these users'."""
        with self.process.arrays.write_rows(path, self.users.start) as write:
            write(rows)


Task = Callable[..., _T]
"""A function of a part, and of what else it is given; its result is small and lies on the host."""


class Parts(Protocol):
    """All parts of a run, wherever they are."""

    plan: Plan
    backend: Backend  # of this process

    def modality(self, name: str) -> Modality:
        """Return the features of a modality in this process."""

    def map(self, task: Task[_T], *shared: Any) -> list[_T]:
        """Return the results of a task on each part, in order; all are given the ``shared`` arguments."""

    def total(self, task: Task[Any], *shared: Any, join: Callable[[Any, Any], Any] = ...) -> Any:
        """Return the sum of a task's results over all parts, or another join of them, in the order of `joined`."""

    def each(self, task: Task[_T], done: set[int], *shared: Any) -> Iterator[tuple[int, _T]]:
        """Yield the number and result of each part that is not in ``done``, as they come."""

    def some(self, task: Task[_T], own: dict[int, tuple[Any, ...]], *shared: Any) -> list[_T]:
        """Return the results of a task on some parts, each with arguments of its own after the ``shared`` ones."""

    def broadcast(self, name: str, array: Any) -> Any:
        """Bring an array to where the tasks run; what this returns is given to them, and `received` opens it there."""


class LocalParts:
    """All parts in this process, which takes them one after another."""

    def __init__(self, process: Process) -> None:
        self.plan, self.backend = process.plan, process.backend
        self._process = process

    def modality(self, name: str) -> Modality:
        return self._process.modality(name)

    def map(self, task: Task[_T], *shared: Any) -> list[_T]:
        return [task(part, *shared) for part in self._parts()]

    def total(self, task: Task[Any], *shared: Any, join: Callable[[Any, Any], Any] | None = None) -> Any:
        return joined(join or add, (task(part, *shared) for part in self._parts()))

    def each(self, task: Task[_T], done: set[int], *shared: Any) -> Iterator[tuple[int, _T]]:
        return ((part.number, task(part, *shared)) for part in self._parts() if part.number not in done)

    def some(self, task: Task[_T], own: dict[int, tuple[Any, ...]], *shared: Any) -> list[_T]:
        return [task(self._process.part(number), *shared, *arguments) for number, arguments in own.items()]

    def broadcast(self, name: str, array: Any) -> Any:  # noqa: ARG002
        return array

    def _parts(self) -> Iterator[Part]:
        return map(self._process.part, range(self.plan.parts))


def received(part: Part, array: Any) -> Any:
    """Return an array that `Parts.broadcast` sent, on the device; a path names one that lies with the run's arrays."""
    return part.backend.asarray(part.process.arrays.load(array) if isinstance(array, str) else array)


def joined(join: Callable[[_T, _T], _T], values: Iterable[_T]) -> _T:
    """Join neighbours, then neighbours among what comes of that, and so on.

    Values that were joined in runs of 2, 4, 8, ... first therefore come to the same bytes.
    """
    found: list[tuple[int, _T]] = []  # results so far, each with the number of times it was joined
    for value in values:
        found.append((0, value))
        while len(found) > 1 and found[-1][0] == found[-2][0]:
            (level, one), (_, other) = found[-2:]
            found[-2:] = [(level + 1, join(one, other))]
    whole = found.pop()[1]
    while found:
        whole = join(found.pop()[1], whole)
    return whole


def add(one: Any, other: Any) -> Any:
    """Sum of two results; of tuples, value by value."""
    return tuple(map(operator.add, one, other)) if isinstance(one, tuple) else one + other
