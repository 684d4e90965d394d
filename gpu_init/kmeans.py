"""K-means on rows that are there, that are made tile by tile, or that never are.

Section 2.4 of the design (k-means++ seeding, Lloyd) and its "two facts that make it scale". The three forms of
`Points` differ in how they assign rows and sum clusters; what drives them is one: K-means on a sample, Lloyd's
steps on all rows from there (`descend`), and the last steps in float64 until no label changes (`settle`), so that
each label is the nearest centroid and each centroid the mean of its members.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np

from .backend import Backend, ranges
from .kernels import PARTS, PARTS_BYTES, Csr
from .kernels.columns import of_columns

BLOCK_ROWS = 4096  # fixed, so that sums run in one order whatever the memory or the number of threads
TILE_ROWS = 4 * BLOCK_ROWS  # rows made at a time by the tiled form, fewer where they are long
TILE_BYTES = 64 << 20  # of these rows in float64, where so few hold a block
LOOK_ROWS = 64 * TILE_ROWS  # looked at in one go: what is found of them is kept no longer
SAMPLE_ROWS = 8192  # that are clustered first, 256 per cluster at least
SAMPLE_BYTES = 64 << 20  # of the rows of a second sample, float32
STEPS = 300  # of Lloyd until the tolerance is met, as scikit-learn's default
TOLERANCE = 1e-4  # of the mean variance that centroids may move in all, likewise
SETTLING_WORK = 1 << 32  # multiplications that may go into steps after that, until no label changes
MOMENTUM = 0.8  # at most: share of the way that the means went in a step which they go on in the next
ROW_BYTES = 64  # kept of each row on the way: its number twice, length, bounds, label
LOOK_BYTES = 64  # found of each row that is looked at
_MARGIN = 1e-4  # of the mean distance: how far float32 may be off, many times over
_CLOSE = 1e-5  # of a row's squared length: so near to each other, float32 does not tell centroids apart


@dataclass(frozen=True)
class Clusters:
    """What K-means found.

    Attributes
    ----------
    centroids : array, shape (K, D), float32
        Each the mean of its members, summed in float64.
    labels : array, shape (n,), int32
        Nearest centroid of each row.
    inertia : list of float
        Sum of squared distances to the centroid of each row's label after each step on all rows; the last is final.
    iterations : int
        Lloyd iterations on all rows.
    settled : bool
        Whether no label changed any more; else centroids moved less than the tolerance, or steps ran out.
    form : str
        ``dense``, ``tiled`` or ``factored``.
    library : bool
        Whether the backend's library found the centroids that these steps started from.
    """

    centroids: Any
    labels: Any
    inertia: list[float]
    iterations: int
    settled: bool
    form: str
    library: bool


def fit(
    backend: Backend, points: Clusterable, clusters: int, seed: int, restarts: int = 1, inertia_tolerance: float = 0.0
) -> Clusters:
    """K-means on some points.

    A sample is clustered first; few of all rows disagree with what is found there, and the steps on all rows are few.
    Where a library is faster on a matrix, it takes the place of the sample.

    Parameters
    ----------
    backend : Backend
        Where the points lie.
    points : Clusterable
        n rows, n >= K.
    clusters : int
        K.
    seed : int
        Of the sample and of the k-means++ seeding.
    restarts : int, default=1
        Starts on the sample, of which the best is taken.
    inertia_tolerance : float, default=0
        As `descend` has it.

    Returns
    -------
    Clusters
    """
    more = SETTLING_WORK // (len(points) * clusters * len(points.middle))
    with backend.deterministic():
        found = points.by_library(clusters, seed, restarts)
        library = found is not None
        if library:
            centroids = backend.to_host(found)
        else:
            centroids = _from_sample(backend, points, clusters, seed, restarts, inertia_tolerance)
        centroids, history, settled = descend(backend, points, centroids, more, inertia_tolerance)
        centroids, labels, inertia, settled = settle(backend, points, centroids, STEPS if settled else 1)
    arrays = (backend.asarray(centroids), labels)
    return Clusters(*arrays, history + inertia, len(history) + len(inertia), settled, points.form, library)


def _from_sample(
    backend: Backend, points: Clusterable, clusters: int, seed: int, restarts: int, inertia_tolerance: float
) -> Any:
    """Centroids to start from, (K, D) float32: the best found on a sample, taken further on a larger one."""
    xp = backend.xp
    rng = np.random.default_rng(seed)
    sizes = sample_sizes(len(points), clusters, len(points.middle))
    rows = points.rows(_drawn(backend, rng, len(points), sizes[-1]), xp.float32)
    sample = Dense(backend, rows[_drawn(backend, rng, len(rows), sizes[0])])
    starts = (seeds(backend, sample, clusters, rng) for _ in range(restarts))
    found = (descend(backend, sample, start, 0, inertia_tolerance) for start in starts)
    centroids, _, _ = min(found, key=lambda one: one[1][-1])
    if len(sizes) > 1:
        centroids, _, _ = descend(backend, Dense(backend, rows), centroids, 0, inertia_tolerance)
    return (centroids.astype(np.float64) + backend.to_host(points.middle)).astype(np.float32)


def _drawn(backend: Backend, rng: np.random.Generator, count: int, size: int) -> Any:
    """Some of ``count`` rows, (size,) int64, ascending."""
    return backend.asarray(np.sort(rng.choice(count, size, replace=False)))


def seeds(backend: Backend, points: Points, clusters: int, rng: np.random.Generator) -> Any:
    """Rows to start from, (K, D) float32 on the host, by greedy k-means++ (Arthur and Vassilvitskii, SODA 2007).

    The first is drawn from all rows alike. Each further one is the best of 2 + ln K rows, drawn in proportion to
    the squared distance to the seeds so far, as scikit-learn has it.
    """
    xp = backend.xp
    everyone = xp.arange(len(points))
    chosen = [int(rng.integers(len(points)))]
    closest = points.squared_distances(everyone, backend.asarray(np.array(chosen)))[:, 0]
    while len(chosen) < clusters:
        reached = xp.cumsum(closest)
        drawn = backend.asarray(rng.random(2 + int(np.log(clusters)))) * reached[-1]
        candidates = xp.minimum(xp.searchsorted(reached, drawn, side="right"), len(points) - 1)
        distances = xp.minimum(closest[:, None], points.squared_distances(everyone, candidates))
        best = int(distances.sum(axis=0).argmin())
        chosen.append(int(candidates[best]))
        closest = distances[:, best]
    rows = backend.to_host(points.rows(backend.asarray(np.array(chosen)), xp.float64))
    return (rows + backend.to_host(points.middle)).astype(np.float32)


def sample_size(clusters: int) -> int:
    """Rows of the sample that is clustered first."""
    return max(SAMPLE_ROWS, 256 * clusters)


def sample_sizes(count: int, clusters: int, width: int) -> list[int]:
    """Rows of the samples of ``count`` rows: the second one costs little beside all rows, and saves steps on them."""
    first = min(sample_size(clusters), count)
    second = min(count // 4, SAMPLE_BYTES // (4 * width))
    return [first, second] if second >= 2 * first else [first]


def settle(
    backend: Backend, points: Clusterable, centroids: Any, steps: int = STEPS
) -> tuple[Any, Any, list[float], bool]:
    """Lloyd's steps in float64 until no label changes, at most so many.

    Returns
    -------
    centroids (K, D) float32, labels (n,) int32, the nearest of them, inertia per step, whether labels settled
    """
    inertia: list[float] = []
    labels, middle = points.unlabelled(), backend.to_host(points.middle)
    for step in range(steps + 1):
        found, changed, sums, counts = points.step(centroids, labels)
        inertia.append(found)
        if changed == 0 or step == steps:
            break
        means = _means(middle, centroids, sums, counts)
        if not counts.all():
            _refill(backend, points, means, centroids, counts)
        centroids = means
    return centroids, labels, inertia, changed == 0


def descend(
    backend: Backend,
    points: Clusterable,
    centroids: Any,
    more: int = STEPS,
    inertia_tolerance: float = 0.0,
    momentum: float = MOMENTUM,
) -> tuple[Any, list[float], bool]:
    """Lloyd's steps in float32, looking only at rows whose label may change, until none does.

    Where float32 cannot tell which of two centroids is nearer, float64 does, and sums are in float64: so rows taken
    part by part, or in another form, go the same way.

    A row keeps its label while its distance to its centroid, bounded above by how far centroids moved since it
    was last looked at, stays below the bound to the others (Hamerly, SDM 2010). Few rows in doubt are made and
    looked at one by one; many go the way of the form. Centroids go beyond the means of their rows, by a share of the
    way that the means have gone since the step before (Nesterov, 1983): a half, two thirds and so on while steps lower
    the inertia, up to ``momentum``; none after a step that does not (O'Donoghue and Candes, 2015), and 0 gives plain
    steps. Once Lloyd's step moves centroids less than `TOLERANCE`, or changes the inertia by less than a share of
    ``inertia_tolerance``, or after `STEPS`, at most ``more`` plain steps follow.

    Returns
    -------
    centroids (K, D) float32, means of what was nearest; inertia after each step; whether labels settled
    """
    clusters, middle = len(centroids), backend.to_host(points.middle)
    means = centroids
    reach, fall = np.zeros(clusters), 0.0  # how far centroids have gone in all; the farthest of each step in all
    walk = points.walk(clusters)
    spread = points.spread()
    history: list[float] = []
    margin = 0.0
    limit, lowering, share = STEPS + more, 0, 0.0

    while len(history) < limit:
        found = walk.step(centroids, reach, fall, margin)
        if found.moved == 0 and share == 0.0:
            return means, history, True
        sums, counts = found.sums, found.counts
        if not history:
            margin = _MARGIN * found.reached / len(points)
        history.append(spread - float(((sums * sums).sum(axis=1) / np.maximum(counts, 1)).sum()))
        before, means = means, _means(middle, centroids, sums, counts)
        filled = bool(counts.all())
        if not filled:
            _refill(backend, points, means, centroids, counts)
        step = means.astype(np.float64) - centroids
        mean = sums.sum(axis=0) / len(points)
        variance = (spread / len(points) - float(mean @ mean)) / len(middle)
        near = float((step * step).sum()) <= TOLERANCE * variance
        if len(history) > 1:
            near |= abs(history[-1] - history[-2]) < inertia_tolerance * history[-1]
        if limit > len(history) + more and near:
            limit = len(history) + more
        lowered = len(history) == 1 or history[-1] < history[-2]
        lowering = lowering + 1 if lowered and filled and limit == STEPS + more else 0
        share = min(momentum, 1.0 - 1.0 / max(lowering, 1))
        further = (means + share * (means.astype(np.float64) - before)).astype(np.float32)
        shifts = np.sqrt(((further.astype(np.float64) - centroids) ** 2).sum(axis=1))
        centroids = further
        reach += shifts
        fall += float(shifts.max())
    return means, history, False


class Clusterable(Protocol):
    """What K-means asks of some rows, wherever they are; `Points` are those of this process, and say what is meant.

    Centroids, and what is summed, are numpy's: they are small, and each look at a device's memory takes its time.
    """

    form: str

    def __len__(self) -> int: ...

    @property
    def middle(self) -> Any:
        """See `Points.middle`."""

    def spread(self) -> float:
        """See `Points.spread`."""

    def rows(self, index: Any, dtype: Any) -> Any:
        """See `Points.rows`."""

    def by_library(self, clusters: int, seed: int, restarts: int) -> Any:
        """See `Points.by_library`."""

    def walk(self, clusters: int) -> Walking:
        """See `Points.walk`."""

    def unlabelled(self) -> Any:
        """See `Points.unlabelled`."""

    def step(self, centroids: Any, labels: Any) -> tuple[float, int, Any, Any]:
        """See `Points.step`."""

    def farthest(self, centroids: Any, count: int) -> Any:
        """See `Points.farthest`."""


class Walking(Protocol):
    """Rows between the steps of `descend`: see `Walk`."""

    def step(self, centroids: Any, reach: Any, fall: float, margin: float) -> Step:
        """See `Walk.step`."""


class Step(NamedTuple):
    """What a step of a `Walk` found."""

    moved: int  # rows whose label changed
    sums: Any  # of the rows less the middle of each label, (K, D) float64
    counts: Any  # of each label, (K,)
    reached: float  # of the first step: sum of the bounds on the distances to the centroids


class Walk:
    """Where some points stand between the steps of `descend`: labels, and bounds on the distances they follow from."""

    def __init__(self, points: Points, clusters: int) -> None:
        xp = points.backend.xp
        self._points = points
        self._spread = points.spread()
        self._labels = xp.full(len(points), -1, xp.int32)
        self._upper, self._lower = xp.empty(len(points)), xp.empty(len(points))  # less reach and fall when taken
        self._sums = xp.zeros((clusters, len(points.middle)), xp.float64)
        self._counts = xp.zeros(clusters, xp.int64)
        self._begun = False

    def step(self, centroids: Any, reach: Any, fall: float, margin: float) -> Step:
        """Look at the rows whose label may change.

        ``reach`` (K,): how far each centroid has gone in all; ``fall``: the farthest of each step in all; ``margin``:
        how far bounds may be off.
        """
        points, clusters, backend = self._points, len(centroids), self._points.backend
        xp, kernels, reach = backend.xp, backend.kernels, backend.asarray(reach)
        begins, self._begun = not self._begun, True
        if begins:
            doubtful = xp.arange(len(points))
        else:
            doubtful = kernels.in_doubt(self._labels, self._upper, self._lower, reach, fall + margin)
        look = self._looking(centroids, points.few(len(doubtful)))
        changes, moved = [], 0
        for part in ranges(len(doubtful), LOOK_ROWS):
            found, least, second = look(doubtful[part])
            noted = (found, least, second, points.squared_norms, reach, fall, self._labels, self._upper, self._lower)
            before = kernels.note(doubtful[part], *noted)
            changed = xp.flatnonzero(found != before)
            before, after = before[changed], found[changed]
            kernels.count(after, 1, self._counts)
            kernels.count(before, -1, self._counts)
            moved += len(changed)
            if points.few(moved // 8):  # else the form's own way, which reads all items and all interactions
                changes.append((doubtful[part][changed], before, after))
            else:
                changes.clear()
        del look, doubtful  # and the memory that they take
        if not points.keeps_sums:
            sums = points.sums(self._labels, clusters, xp.float64)
        else:
            if moved and not points.few(moved // 8):
                self._sums = points.sums(self._labels, clusters, xp.float64)
            for rows, before, after in changes:
                self._sums += points.moves(rows, before, after, clusters)
            sums = self._sums
        reached = float(self._upper.sum()) if begins else 0.0
        return Step(moved, backend.to_host(sums), backend.to_host(self._counts), reached)

    def _looking(self, centroids: Any, few: bool) -> _Look:
        """Look at rows in float32, at those in float64 for which that is too coarse; or in float64 at all."""
        points, xp = self._points, self._points.backend.xp
        way = points.looking_at if few else points.assigning
        if points.backend.looks_dtype == "float64":
            return way(centroids, xp.float64)
        look, closely = way(centroids, xp.float32), points.tile_by_tile(points.looking_at(centroids, xp.float64))
        mean = self._spread / max(len(points), 1)

        def both(index: Any) -> tuple[Any, Any, Any]:
            found, least, second = look(index)
            close = xp.flatnonzero(second - least <= _CLOSE * (points.squared_norms[index] + mean))
            if len(close):
                found[close], least[close], second[close] = closely(index[close])
            return found, least, second

        return both


def _means(middle: Any, centroids: Any, sums: Any, counts: Any) -> Any:
    """New centroids, (K, D) float32, from sums of rows less the middle; an empty cluster's stays where it is."""
    filled = (counts > 0)[:, None]
    return np.where(filled, sums / np.maximum(counts, 1)[:, None] + middle, centroids).astype(np.float32)


def _refill(backend: Backend, points: Clusterable, means: Any, centroids: Any, counts: Any) -> None:
    """Let clusters left empty take the rows farthest from the centroids, as scikit-learn has it."""
    empty = np.flatnonzero(counts == 0)
    farthest = points.farthest(centroids, len(empty))  # fewer where distinct rows are fewer than clusters
    rows = backend.to_host(points.rows(farthest, backend.xp.float64))
    means[empty[: len(farthest)]] = rows + backend.to_host(points.middle)


_Look = Callable[[Any], tuple[Any, Any, Any]]
"""From some rows (m,) int64, ascending, to their nearest centroid.

That is: labels (m,) int32, the first of equals; the least and second least squared distance, both less the row's
squared norm, (m,) float64.
"""


def needed_bytes(form: str, count: int, items: int, clusters: int, width: int) -> int:
    """Most bytes that a form takes at a time, beside the interactions and features that its rows are made of.

    The factored form keeps a table of items by clusters while it assigns rows, and two or more while it sums them.
    """
    table = 8 * items * clusters
    beside = {
        "factored": table + parts_bytes(table),
        "dense": 8 * count * width,
        "tiled": 16 * width * min(count, tile_rows(width)),
    }
    steps = ROW_BYTES * count + LOOK_BYTES * min(count, LOOK_ROWS) + beside[form]
    samples = sum(sample_sizes(count, clusters, width))
    return max(steps, 16 * count + (4 * width + ROW_BYTES + LOOK_BYTES) * samples)


def parts_bytes(table: int) -> int:
    """Of the tables, so large, that kernels sum into side by side."""
    return max(table, min(PARTS * table, PARTS_BYTES))


def tile_rows(width: int) -> int:
    """Rows (D wide) made at a time by the tiled form: a multiple of `BLOCK_ROWS`."""
    return BLOCK_ROWS * max(1, min(TILE_ROWS, TILE_BYTES // (8 * width)) // BLOCK_ROWS)


class Points(ABC):
    """Rows to cluster, (n, D): what all forms share, going through the rows tile by tile.

    A form gives `rows`, `moves`, `middle` and `squared_norms`, and may assign and sum in a way of its own.
    """

    form: str
    keeps_sums = True  # between steps, so that only moves are added

    def __init__(self, backend: Backend, count: int) -> None:
        self.backend = backend
        self._count = count

    def __len__(self) -> int:
        return self._count

    @property
    @abstractmethod
    def middle(self) -> Any:
        """A point amid the rows, (D,) float64: distances taken from there keep their digits."""

    @property
    @abstractmethod
    def squared_norms(self) -> Any:
        """Squared length of each row less the middle, (n,) float64."""

    @abstractmethod
    def rows(self, index: Any, dtype: Any) -> Any:
        """Some of the rows less the middle, (len(index), D) float32 or float64."""

    def spread(self) -> float:
        """Sum of the squared lengths of the rows less the middle."""
        return float(self.squared_norms.sum())

    def walk(self, clusters: int) -> Walk:
        """Begin the steps of `descend`."""
        return Walk(self, clusters)

    def unlabelled(self) -> Any:
        """Labels of no cluster, for `step`."""
        return self.backend.xp.full(len(self), -1, self.backend.xp.int32)

    def by_library(self, clusters: int, seed: int, restarts: int) -> Any:  # noqa: ARG002
        """Centroids (K, D) that a library finds, None where there is no matrix, or ours is as fast."""
        return None

    def squared_distances(self, index: Any, others: Any) -> Any:
        """Between some rows (m,) and others (p,), (m, p) float64, to float32's rounding."""
        xp = self.backend.xp
        table = self.rows(others, xp.float64)
        products = self._products(index, table, xp.float32)
        lengths = self.squared_norms[index][:, None] + (table * table).sum(axis=1)
        return xp.maximum(lengths - 2.0 * products, 0.0)

    @property
    def tile_rows(self) -> int:
        """Rows made at a time."""
        return min(tile_rows(len(self.middle)), TILE_ROWS)

    def few(self, count: int) -> bool:
        """Whether so many rows are better made than sent the way of the form."""
        return count <= self.tile_rows

    def centred(self, centroids: Any) -> Any:
        """Centroids less the middle, (K, D) float64, where the rows are."""
        return self.backend.asarray(centroids).astype(self.backend.xp.float64) - self.middle

    def looking_at(self, centroids: Any, dtype: Any) -> _Look:
        """Look at rows that are made all at once; products are taken in ``dtype``."""
        table = self.centred(centroids)
        lengths = (table * table).sum(axis=1)
        return lambda index: self.backend.kernels.nearest_two(self._products(index, table, dtype), lengths)

    def assigning(self, centroids: Any, dtype: Any) -> _Look:
        """Look at any number of rows, the form's own way."""
        return self.tile_by_tile(self.looking_at(centroids, dtype))

    def tile_by_tile(self, look: _Look) -> _Look:
        """Look at any number of rows, some at a time."""

        def assign(index: Any) -> tuple[Any, Any, Any]:
            tiles = [look(index[part]) for part in ranges(len(index), self.tile_rows)]
            return tuple(map(self.backend.xp.concatenate, zip(*tiles, strict=True)))

        return assign

    def _products(self, index: Any, table: Any, dtype: Any) -> Any:
        """Products of some rows less the middle with ``table`` (K, D), (m, K)."""
        xp = self.backend.xp
        nowhere = xp.zeros(len(self.middle))
        return self.backend.kernels.products(self.rows(index, dtype), nowhere, table, dtype)

    def sums(self, labels: Any, clusters: int, dtype: Any) -> Any:
        """Sums of the rows less the middle of each label, (K, D) float64; products are taken in ``dtype``."""
        xp = self.backend.xp
        total = xp.zeros((clusters, len(self.middle)), xp.float64)
        for tile in ranges(len(self), self.tile_rows):
            self._sum(self.rows(xp.arange(tile.start, tile.stop), dtype), labels[tile], total)
        return total

    @abstractmethod
    def moves(self, index: Any, before: Any, after: Any, clusters: int) -> Any:
        """What `sums` changes by where labels of some rows change; a label before may be -1, for none."""

    def _sum(self, rows: Any, labels: Any, total: Any) -> None:
        """Add rows to the sums of their labels, in one order whatever the rows at a time."""

        def work(part: slice) -> Any:
            return self._one_hot(labels[part], len(total)).astype(rows.dtype) @ rows[part]

        for partial in self.backend.in_order(work, ranges(len(rows), BLOCK_ROWS)):
            total += partial

    def step(self, centroids: Any, labels: Any) -> tuple[float, int, Any, Any]:
        """One Lloyd step in float64; ``labels`` (n,) int32 become those of the nearest centroids, the first of equals.

        Returns
        -------
        sum of squared distances; how many labels changed; the sums of the rows less the middle of each label
        (K, D) float64; their counts (K,)
        """
        xp = self.backend.xp
        inertia, changed = 0.0, 0
        counts = xp.zeros(len(centroids), xp.int64)
        for part, found, distances in self._distances(centroids):
            inertia += float(distances.sum())
            changed += int((found != labels[part]).sum())
            self.backend.kernels.count(found, 1, counts)
            labels[part] = found
        sums = self.backend.to_host(self.sums(labels, len(centroids), xp.float64))
        return inertia, changed, sums, self.backend.to_host(counts)

    def nearest(self, centroids: Any) -> Any:
        """Labels (n,) int32 of the nearest centroids, the first of equals, in float64."""
        labels = self.backend.xp.empty(len(self), self.backend.xp.int32)
        for part, found, _ in self._looked(centroids):
            labels[part] = found
        return labels

    def farthest(self, centroids: Any, count: int) -> Any:
        """Rows (m,) int64 farthest from their nearest centroids, the farthest first, that are not on them."""
        rows, reached = self.far(centroids, count)
        return rows[reached > 0]

    def far(self, centroids: Any, count: int) -> tuple[Any, Any]:
        """Rows (m,) int64 farthest from their nearest centroids, the farthest first, and how far (m,) they are."""
        xp = self.backend.xp
        rows, reached = xp.empty(0, xp.int64), xp.empty(0, xp.float64)
        for part, _, distances in self._distances(centroids):
            rows = xp.concatenate([rows, xp.arange(part.start, part.stop)])
            reached = xp.concatenate([reached, distances])
            order = xp.argsort(-reached, kind="stable")[:count]
            rows, reached = rows[order], reached[order]
        return rows, reached

    def _distances(self, centroids: Any) -> Iterator[tuple[slice, Any, Any]]:
        """Range by range: labels of the nearest centroids, and squared distances to them, in float64."""
        for part, found, least in self._looked(centroids):
            yield part, found, self.backend.xp.maximum(least + self.squared_norms[part], 0.0)

    def _looked(self, centroids: Any) -> Iterator[tuple[slice, Any, Any]]:
        """Range by range, in float64: nearest centroids, and squared distances to them less the rows' squared norms."""
        xp = self.backend.xp
        look = self.assigning(centroids, xp.float64)
        for part in ranges(len(self), LOOK_ROWS):
            found, least, _ = look(xp.arange(part.start, part.stop))
            yield part, found, least

    def _one_hot(self, labels: Any, clusters: int) -> Any:
        """Labels as a sparse K x n matrix, made by rows: a transposed product varies between runs on CUDA."""
        xp = self.backend.xp
        members = xp.argsort(labels, kind="stable")
        indptr = xp.searchsorted(labels[members], xp.arange(clusters + 1))
        values = (xp.ones(len(members)), members.astype(xp.int32), indptr.astype(xp.int32))
        return self.backend.sparse.csr_matrix(values, shape=(clusters, len(members)))


class Dense(Points):
    """Rows of a matrix (n, D), float32 or float64; ``middle`` (D,) float64, None: their mean."""

    form = "dense"

    def __init__(self, backend: Backend, matrix: Any, middle: Any = None) -> None:
        super().__init__(backend, len(matrix))
        self._matrix = matrix
        self._ones = backend.xp.ones(len(matrix))
        self._given_middle = middle

    @cached_property
    def middle(self) -> Any:
        """See `Points.middle`."""
        if self._given_middle is not None:
            return self._given_middle
        xp = self.backend.xp
        sums = self.backend.in_order(
            lambda part: self._matrix[part].sum(axis=0, dtype=xp.float64), ranges(len(self), BLOCK_ROWS)
        )
        return sum(sums) / len(self)

    @cached_property
    def squared_norms(self) -> Any:
        """See `Points.squared_norms`."""
        xp = self.backend.xp

        def work(part: slice) -> Any:
            block = self._matrix[part] - self.middle
            return (block * block).sum(axis=1)

        return xp.concatenate(list(self.backend.in_order(work, ranges(len(self), BLOCK_ROWS))))

    def by_library(self, clusters: int, seed: int, restarts: int) -> Any:
        """See `Points.by_library`."""
        return self.backend.kmeans(self._matrix, clusters, seed, restarts)

    def rows(self, index: Any, dtype: Any) -> Any:
        """See `Points.rows`."""
        return (self._matrix[index] - self.middle).astype(dtype, copy=False)

    def assigning(self, centroids: Any, dtype: Any) -> _Look:
        """See `Points.assigning`: where many are asked for, all between are looked at, and none is copied."""
        some, look = super().assigning(centroids, dtype), self.looking_at(centroids, dtype)

        def assign(index: Any) -> tuple[Any, Any, Any]:
            first, last = (int(index[0]), int(index[-1])) if len(index) else (0, -1)
            if 4 * len(index) <= last - first:
                return some(index)
            found = look(slice(first, last + 1))
            return found if len(index) == last + 1 - first else tuple(values[index - first] for values in found)

        return assign

    def moves(self, index: Any, before: Any, after: Any, clusters: int) -> Any:
        """See `Points.moves`: rows of a matrix are those of the identity's product with it."""
        xp = self.backend.xp
        total = xp.zeros((clusters, len(self.middle)))
        starts = xp.arange(len(index) + 1)
        identity = Csr(starts, index.astype(xp.int32), None)
        arrays = (starts[:-1], self._matrix, xp.ones(len(index)), self._ones, self.middle, before, after)
        self.backend.kernels.move_rows(identity, *arrays, total)
        return total

    def _products(self, index: Any, table: Any, dtype: Any) -> Any:
        return self.backend.kernels.products(self._matrix[index], self.middle, table, dtype)


class Tiled(Points):
    """Rows of ``M = A F``, ``A = diag(row_scale) R diag(item_scale)``, made when they are looked at.

    Parameters
    ----------
    backend : Backend
    csr : Csr
        All users' interactions.
    features : array, shape (I, D), float32
        Rows of missing items may be NaN.
    row_scale, item_scale : arrays, shapes (U,) and (I,), float64
        0 for cold users, who are not among the rows, and for missing items.
    middle : array, shape (D,), float64, optional
        A point amid the rows; None: the mean of the items, where rows of A sum to 1.
    """

    form = "tiled"

    def __init__(
        self, backend: Backend, csr: Csr, features: Any, row_scale: Any, item_scale: Any, middle: Any = None
    ) -> None:
        self.users = backend.xp.flatnonzero(row_scale)
        super().__init__(backend, len(self.users))
        self._csr = csr
        self._features = features
        self._row_scale = row_scale
        self._item_scale = item_scale
        self._missing = item_scale == 0
        self._any_missing = bool(self._missing.any())
        self._given_middle = middle

    @cached_property
    def middle(self) -> Any:
        """See `Points.middle`."""
        if self._given_middle is not None:
            return self._given_middle
        return mean_item(self.backend, self._features, ~self._missing)

    @cached_property
    def squared_norms(self) -> Any:
        """See `Points.squared_norms`: one gather pass."""
        kernels = self.backend.kernels
        norms = kernels.squared_norms(self._csr, self._features, self._row_scale, self._item_scale, self.middle)
        return norms if len(self) == len(norms) else norms[self.users]

    def rows(self, index: Any, dtype: Any) -> Any:
        """See `Points.rows`."""
        xp = self.backend.xp
        users = self.users[index]
        starts = self._csr.indptr[users]
        indptr = xp.concatenate([xp.zeros(1, xp.int64), xp.cumsum(self._csr.indptr[users + 1] - starts)])
        entries = xp.arange(int(indptr[-1]))
        own = xp.searchsorted(indptr, entries, side="right") - 1
        entries += (starts - indptr[:-1])[own]
        weights = None if self._csr.weights is None else self._csr.weights[entries]
        chosen = Csr(indptr, self._csr.indices[entries], weights)
        kernels = self.backend.kernels
        scales = (self._row_scale[users], self._item_scale)
        return kernels.aggregate(chosen, self._features, *scales, self.middle, dtype)

    def moves(self, index: Any, before: Any, after: Any, clusters: int) -> Any:
        """See `Points.moves`: no row is kept."""
        total = self.backend.xp.zeros((clusters, len(self.middle)))
        arrays = (self.users[index], self._features, self._row_scale, self._item_scale, self.middle, before, after)
        self.backend.kernels.move_rows(self._csr, *arrays, total)
        return total


def _present(features: Any, part: slice, missing: Any, dtype: Any) -> Any:
    """Rows of F; those of missing items are zero."""
    block = features[part].astype(dtype, copy=missing is not None)
    if missing is not None:
        block[missing[part]] = 0
    return block


def mean_item(backend: Backend, features: Any, present: Any) -> Any:
    """Mean (D,) float64 of the rows of F (I, D) that are present (I,) bool."""
    xp = backend.xp
    missing = None if bool(present.all()) else ~present

    def total(_: slice, values: Any) -> Any:
        parts = ranges(len(values), BLOCK_ROWS)
        return sum(backend.in_order(lambda part: _present(values, part, missing, xp.float64).sum(axis=0), parts))

    return xp.concatenate(of_columns(features, total)) / max(int(present.sum()), 1)


class Factored(Tiled):
    """The same rows, never made but for a few.

    Assignment needs only ``A (F C^T)``, K columns and not D, and the update ``(Z^T A) F``, Z the one-hot
    labels: sums by item and label, then a small dense product.
    """

    form = "factored"

    def few(self, count: int) -> bool:
        """See `Points.few`: making the rows reads less than all items' features."""
        return super().few(count) and count * len(self._csr.indices) < len(self._features) * len(self)

    def assigning(self, centroids: Any, dtype: Any) -> _Look:
        """See `Points.assigning`: the products of all items are taken once."""
        table = self.centred(centroids)
        kernels = self.backend.kernels
        arrays = (self.item_products(table, dtype), self._row_scale, self._item_scale, (table * table).sum(axis=1))
        return lambda index: kernels.assign(self._csr, self.users[index], *arrays)

    def item_products(self, table: Any, dtype: Any) -> Any:
        """Products of all items less the middle with ``table`` (K, D), (I, K)."""
        return self.backend.kernels.products(self._features, self.middle, table, dtype)

    def sums(self, labels: Any, clusters: int, dtype: Any) -> Any:
        """See `Points.sums`."""
        return self.summed(self.by_item(labels, clusters), dtype)

    def by_item(self, labels: Any, clusters: int) -> Any:
        """``A^T Z``, Z the one-hot labels (n, K) of the rows: (I, K) float64."""
        table = self.backend.xp.zeros((len(self._features), clusters))
        arrays = (self.users, labels, self._row_scale, self._item_scale, table)
        self.backend.kernels.label_sums(self._csr, *arrays)
        return table

    def summed(self, by_item: Any, dtype: Any) -> Any:
        """See `Points.sums`, from the table (I, K) of the rows; features are gone through once."""
        xp = self.backend.xp
        total = xp.zeros((by_item.shape[1], self._features.shape[1]))
        missing = self._missing if self._any_missing else None

        def add(columns: slice, features: Any) -> None:
            def work(part: slice) -> Any:
                return by_item[part].T.astype(dtype) @ _present(features, part, missing, dtype)

            whole = self.backend.kernels.table_sums(by_item, features)
            parts = self.backend.in_order(work, ranges(len(features), BLOCK_ROWS)) if whole is None else [whole]
            for partial in parts:
                total[:, columns] += partial

        of_columns(self._features, add)
        return total - by_item.sum(axis=0)[:, None] * self.middle


class ByItem(Factored):
    """The same rows again, of features in `Columns`: sums stay by item and label, (I, K) float64, until `summed`.

    So the tables of several points are added up first, and features are gone through once for all of them.
    """

    keeps_sums = False

    def few(self, count: int) -> bool:
        """See `Points.few`."""
        return bool(self._features.few(count * len(self._csr.indices) // max(1, len(self))))

    def sums(self, labels: Any, clusters: int, dtype: Any) -> Any:  # noqa: ARG002
        """See `Points.sums`."""
        return self.by_item(labels, clusters)
