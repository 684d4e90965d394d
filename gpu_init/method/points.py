"""Rows that K-means clusters: a matrix, rows made tile by tile, or rows that are never made."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, NamedTuple

from gpu_init.backend.interface import Backend, ranges
from gpu_init.kernels import PARTS, PARTS_BYTES, Csr
from gpu_init.method.matrix import some_rows

BLOCK_ROWS = 4096  # A fixed number, so that sums run in one order for any memory and any number of threads.
TILE_ROWS = 4 * BLOCK_ROWS  # The tiled form makes at most so many rows at a time.
TILE_BYTES = 64 << 20  # The rows that it makes at a time take at most so many bytes in float64.
LOOK_ROWS = 64 * TILE_ROWS  # The factored form assigns so many rows at a time.
SAMPLE_ROWS = 8192  # The first sample has so many rows, or 256 for each cluster where that is more.
SAMPLE_BYTES = 16 << 20  # The rows of the second sample take so many bytes in float32.
ROW_BYTES = 32  # K-means keeps so many bytes for each row: its number, squared norm and label.
LOOK_BYTES = 64  # K-means takes so many more bytes for a row while it assigns the row.
KMEANS_BYTES = 1 << 30  # K-means may take so much memory beside the data and what it keeps of each user.
MATRIX_ROWS = 16 * TILE_ROWS  # Where the matrix of the users' means is made, it is made so many rows at a time.


def sample_size(clusters: int) -> int:
    """Rows of the first sample."""
    return max(SAMPLE_ROWS, 256 * clusters)


def sample_sizes(count: int, clusters: int, width: int) -> list[int]:
    """Rows of the samples of ``count`` rows: a second one costs little beside all rows, and saves passes over them."""
    first = min(sample_size(clusters), count)
    second = min(count // 4, SAMPLE_BYTES // (4 * width))
    return [first, second] if second >= 2 * first else [first]


class Step(NamedTuple):
    """Result of assigning some rows to their nearest centroids.

    Attributes
    ----------
    inertia : float
        Sum of the squared distances to the nearest centroids.
    counts : array, shape (K,), int64
        Number of rows with each label.
    labels : array, shape (n,), int32
        Label of each row.
    sums : callable
        Computes the sums of the rows less the offset for each label, (K, D) float64.
    """

    inertia: float
    counts: Any
    labels: Any
    sums: Callable[[], Any]


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
    passes = ROW_BYTES * count + LOOK_BYTES * min(count, LOOK_ROWS) + beside[form]
    samples = sample_sizes(count, clusters, width)
    drawing = (8 * width + 2 * LOOK_BYTES) * min(samples[-1], TILE_ROWS)  # Rows are drawn in float64.
    return max(passes, 16 * count + (4 * width + ROW_BYTES + LOOK_BYTES) * sum(samples) + drawing)


def parts_bytes(table: int) -> int:
    """Return the bytes of all tables that kernels sum into side by side, where one takes ``table`` bytes."""
    return max(table, min(PARTS * table, PARTS_BYTES))


def tile_rows(width: int) -> int:
    """Rows (D wide) made at a time by the tiled form: a multiple of `BLOCK_ROWS`."""
    return BLOCK_ROWS * max(1, min(TILE_ROWS, TILE_BYTES // (8 * width)) // BLOCK_ROWS)


class Points(ABC):
    """Rows to cluster, (n, D): what all forms share.

    A form gives `rows`, `offset`, `squared_norms`, and goes through its rows part by part in `assigned`. Labels may be
    of more than the n rows: then those of others are -1.
    """

    form: str

    def __init__(self, backend: Backend, count: int, labelled: int | None = None) -> None:
        self.backend = backend
        self._count = count
        self._labelled = count if labelled is None else labelled

    def __len__(self) -> int:
        return self._count

    @property
    @abstractmethod
    def offset(self) -> Any:
        """A point near the rows, (D,) float64. Distances are computed relative to it, so that they lose no digits."""

    @property
    @abstractmethod
    def squared_norms(self) -> Any:
        """Squared length of each row less the offset, float64, as many as there are labels."""

    @abstractmethod
    def rows(self, index: Any) -> Any:
        """Some of the rows less the offset, (len(index), D) float64 or float32."""

    @abstractmethod
    def assigned(self, centroids: Any) -> Iterator[tuple[slice, Any, Any, Any]]:
        """Assign the rows part by part.

        Each item has the range of the labels, the labels, the squared distances to the nearest centroids less the
        rows' squared norms, and the rows, or None where the form does not make them.
        """

    @abstractmethod
    def sums(self, labels: Any, clusters: int) -> Any:
        """Sums of the rows less the offset of each label, (K, D) float64."""

    def centred(self, centroids: Any) -> tuple[Any, Any]:
        """Centroids less the offset, (K, D) float64, where the rows are, and their squared lengths (K,)."""
        table = self.backend.asarray(centroids).astype(self.backend.xp.float64) - self.offset
        return table, (table * table).sum(axis=1)

    def step(self, centroids: Any) -> Step:
        """Assign every row to its nearest centroid, the first of equals."""
        xp, clusters = self.backend.xp, len(centroids)
        labels = xp.empty(self._labelled, xp.int32)
        inertia, counts, summed = 0.0, xp.zeros(clusters, xp.int64), None
        for part, found, least, rows in self.assigned(centroids):
            labels[part] = found
            inertia += float(xp.where(found >= 0, self._distances(part, least), 0.0).sum())
            counts += xp.bincount(found[found >= 0], minlength=clusters)
            if rows is not None:
                added = self._sums_of(rows, found, clusters)
                summed = added if summed is None else summed + added
        return Step(inertia, counts, labels, lambda: self.sums(labels, clusters) if summed is None else summed)

    def nearest(self, centroids: Any) -> Any:
        """Labels (n,) int32 of the nearest centroids, the first of equals."""
        labels = self.backend.xp.empty(self._labelled, "int32")
        for part, found, *_ in self.assigned(centroids):
            labels[part] = found
        return labels

    def far(self, centroids: Any, count: int) -> tuple[Any, Any]:
        """Rows (m,) int64 farthest from their nearest centroids, the farthest first; their squared distances (m,)."""
        xp = self.backend.xp
        rows, farthest, before = xp.empty(0, xp.int64), xp.empty(0, xp.float64), 0
        for part, found, least, _ in self.assigned(centroids):
            distances = self._distances(part, least)[found >= 0]
            rows = xp.concatenate([rows, xp.arange(before, before + len(distances))])
            before += len(distances)
            farthest = xp.concatenate([farthest, distances])
            order = xp.argsort(-farthest, kind="stable")[:count]
            rows, farthest = rows[order], farthest[order]
        return rows, farthest

    def _distances(self, part: slice, least: Any) -> Any:
        """Squared distances (m,) of a part's rows to their nearest centroids; rounding makes none negative."""
        return self.backend.xp.maximum(least + self.squared_norms[part], 0.0)

    def _sums_of(self, rows: Any, labels: Any, clusters: int) -> Any:
        """Sums of rows (m, D) of each label, (K, D) float64, in one order whatever the number of threads."""

        def work(part: slice) -> Any:
            return (self._one_hot(labels[part], clusters).astype(rows.dtype) @ rows[part]).astype("float64")

        return sum(self.backend.in_order(work, ranges(len(rows), BLOCK_ROWS)))

    def _one_hot(self, labels: Any, clusters: int) -> Any:
        """Labels as a sparse K x n matrix, made by rows: a transposed product varies between runs on CUDA."""
        xp = self.backend.xp
        members = xp.argsort(labels, kind="stable")
        indptr = xp.searchsorted(labels[members], xp.arange(clusters + 1))
        members = members[int(indptr[0]) :]  # Rows without a label have -1, so they come first.
        values = (xp.ones(len(members)), members.astype(xp.int32), (indptr - indptr[0]).astype(xp.int32))
        return self.backend.sparse.csr_matrix(values, shape=(clusters, len(labels)))


class Dense(Points):
    """Rows of a matrix (n, D), float32 or float64; ``offset`` (D,) float64, None: their mean."""

    form = "dense"

    def __init__(self, backend: Backend, matrix: Any, offset: Any = None) -> None:
        super().__init__(backend, len(matrix))
        self._matrix = matrix
        if offset is not None:
            self.offset = offset

    @cached_property
    def offset(self) -> Any:
        return mean_item(self.backend, self._matrix, self.backend.xp.ones(len(self), bool))

    @cached_property
    def squared_norms(self) -> Any:
        def work(part: slice) -> Any:
            block = self.rows(part)
            return (block * block).sum(axis=1, dtype="float64")

        return self.backend.xp.concatenate(list(self.backend.in_order(work, ranges(len(self), BLOCK_ROWS))))

    def rows(self, index: Any) -> Any:
        return self._matrix[index] - self.offset

    def squared_distances(self, others: Any) -> Any:
        """Between all rows and some of them (p,), (n, p) float64."""
        xp = self.backend.xp
        table = self.rows(others).astype(xp.float64)
        products = self.backend.kernels.products(self._matrix, self.offset, table)
        lengths = self.squared_norms[:, None] + (table * table).sum(axis=1)
        return xp.maximum(lengths - 2.0 * products, 0.0)

    def assigned(self, centroids: Any) -> Iterator[tuple[slice, Any, Any, Any]]:
        """Block by block, each in a thread of its own."""
        table, lengths = self.centred(centroids)
        kernels = self.backend.kernels

        def work(part: slice) -> tuple[slice, Any, Any, Any]:
            rows = self.rows(part)
            return part, *kernels.nearest(rows @ table.T.astype(rows.dtype), lengths), rows

        return self.backend.in_order(work, ranges(len(self), BLOCK_ROWS))

    def sums(self, labels: Any, clusters: int) -> Any:
        parts = ranges(len(self), TILE_ROWS)
        return sum(self._sums_of(self.rows(part), labels[part], clusters) for part in parts)


class Sample(Dense):
    """Rows of a sample (n, D) float32, centred at 0. Float32 is enough, because a sample only gives a start."""

    def __init__(self, backend: Backend, rows: Any) -> None:
        super().__init__(backend, rows, backend.xp.zeros(rows.shape[1]))

    def rows(self, index: Any) -> Any:
        return self._matrix[index]


class Tiled(Points):
    """Rows of ``M = A F``, ``A = diag(row_scale) R diag(item_scale)``, made when they are looked at.

    Parameters
    ----------
    backend : Backend
    csr : Csr
        All users' interactions. Labels are of all users, -1 for cold ones.
    features : array, shape (I, D), float32
        Rows of missing items may be NaN.
    row_scale, item_scale : arrays, shapes (U,) and (I,), float64
        0 for cold users, who are not among the rows, and for missing items.
    offset : array, shape (D,), float64, optional
        A point amid the rows; None: the mean of the items, where rows of A sum to 1.
    squared_norms : array, shape (U,), float64, optional
        Of the rows less the offset, where they are known; None: from one pass over the rows.
    """

    form = "tiled"

    def __init__(
        self,
        backend: Backend,
        csr: Csr,
        features: Any,
        row_scale: Any,
        item_scale: Any,
        offset: Any = None,
        squared_norms: Any = None,
    ) -> None:
        self.users = backend.xp.flatnonzero(row_scale)
        super().__init__(backend, len(self.users), len(row_scale))
        self._csr = csr
        self._features = features
        self._row_scale = row_scale
        self._item_scale = item_scale
        if offset is not None:
            self.offset = offset
        if squared_norms is not None:
            self.squared_norms = squared_norms

    @cached_property
    def offset(self) -> Any:
        return mean_item(self.backend, self._features, self._item_scale != 0)

    @cached_property
    def squared_norms(self) -> Any:
        """One pass over the interactions."""
        scales = (self._row_scale, self._item_scale)
        return self.backend.kernels.squared_norms(self._csr, self._features, *scales, self.offset)

    def rows(self, index: Any) -> Any:
        users = self.users[index]
        chosen, scales = some_rows(self.backend, self._csr, users), (self._row_scale[users], self._item_scale)
        return self.backend.kernels.aggregate(chosen, self._features, *scales, self.offset)

    def assigned(self, centroids: Any) -> Iterator[tuple[slice, Any, Any, Any]]:
        """Rows are made, used, and forgotten."""
        xp, kernels = self.backend.xp, self.backend.kernels
        table, lengths = self.centred(centroids)
        origin = xp.zeros(len(self.offset))
        for part, rows in self._tiles():
            labels, least = kernels.nearest(kernels.products(rows, origin, table), lengths)
            yield part, xp.where(self._row_scale[part] == 0, -1, labels), least, rows

    def sums(self, labels: Any, clusters: int) -> Any:
        return sum(self._sums_of(rows, labels[part], clusters) for part, rows in self._tiles())

    def _tiles(self) -> Iterator[tuple[slice, Any]]:
        for part in ranges(self._labelled, tile_rows(len(self.offset))):
            csr, scales = self._csr.rows(part.start, part.stop), (self._row_scale[part], self._item_scale)
            yield part, self.backend.kernels.aggregate(csr, self._features, *scales, self.offset)


def mean_item(backend: Backend, features: Any, present: Any) -> Any:
    """Mean (D,) float64 of the rows of F (I, D) that are present (I,) bool."""
    xp = backend.xp
    missing = None if bool(present.all()) else ~present

    def work(part: slice) -> Any:
        if missing is None:
            return features[part].sum(axis=0, dtype=xp.float64)
        return xp.where(missing[part][:, None], 0.0, features[part]).sum(axis=0, dtype=xp.float64)

    return sum(backend.in_order(work, ranges(len(features), BLOCK_ROWS))) / max(int(present.sum()), 1)


class Factored(Tiled):
    """The same rows as `Tiled`, of which only a few are ever made.

    Assignment needs only ``A (F C^T)``, K columns and not D, and the update ``(Z^T A) F``, Z the one-hot
    labels: sums by item and label, then a small dense product.
    """

    form = "factored"

    def assigned(self, centroids: Any) -> Iterator[tuple[slice, Any, Any, Any]]:
        """The products of all items with the centroids are taken once."""
        table, lengths = self.centred(centroids)
        products, kernels = self.item_products(table), self.backend.kernels
        for part in ranges(self._labelled, LOOK_ROWS):
            csr, scales = self._csr.rows(part.start, part.stop), (self._row_scale[part], self._item_scale)
            yield part, *kernels.assign(csr, products, *scales, lengths), None

    def item_products(self, table: Any) -> Any:
        """Products of all items less the offset with ``table`` (K, D), (I, K)."""
        return self.backend.kernels.products(self._features, self.offset, table)

    def sums(self, labels: Any, clusters: int) -> Any:
        kernels = self.backend.kernels
        by_item = self.backend.xp.zeros((len(self._features), clusters))
        kernels.label_sums(self._csr, labels, self._row_scale, self._item_scale, by_item)
        return kernels.table_sums(by_item, self._features) - by_item.sum(axis=0)[:, None] * self.offset


def matrix(backend: Backend, points: Points) -> Any:
    """All rows of some points, (n, D), in the type that the library takes."""
    xp = backend.xp
    matrix = xp.empty((len(points), len(points.offset)), backend.kmeans_dtype)
    for part in ranges(len(points), MATRIX_ROWS):
        matrix[part] = points.rows(xp.arange(part.start, part.stop)) + points.offset
    return matrix


def kmeans_form(users: int, items: int, pairs: int, clusters: int, width: int, memory: int | None = None) -> str:
    """Form of our K-means on users' means that costs least, of those that take ``memory`` bytes at most.

    A pass of the factored form takes mean degree x K multiplications per user. A pass of the tiled form takes D x K, as
    a matrix product, which is faster for each, and makes the rows. ``benchmarks/kmeans.py`` measures both: the factored
    form is ahead until mean degree x K is some 64 D. Few users are all in the sample that is clustered first, so their
    matrix is made anyway. ``memory`` None: what is kept of each user, and `KMEANS_BYTES` more.
    """
    if memory is None:
        memory = KMEANS_BYTES + needed_bytes("tiled", users, items, clusters, width)
    if users <= sample_size(clusters):
        return "dense" if needed_bytes("dense", users, items, clusters, width) <= memory else "tiled"
    fits = needed_bytes("factored", users, items, clusters, width) <= memory
    return "factored" if fits and pairs * clusters <= 64 * width * users else "tiled"
