"""Users by what they did: the spectral embedding of the interactions, for ``cluster_on = "interactions"``.

A user's row is that of ``E = S V``, divided by its length: ``S = D_U^-1/2 R D_I^-1/2`` and V its leading right singular
vectors (Dhillon, KDD 2001: bipartite spectral graph partitioning; rows of length 1: Ng, Jordan and Weiss, NIPS 2001).
V comes from ``S^T S``, I x I, by block Lanczos, so that users are only ever gone through: nothing of U x r is kept.

Each connected component of the interactions brings a singular value of 1, and a vector that says no more than who is in
it: hundreds of components of a few nodes would leave no room for what is wanted. What lies outside the large components
is therefore left out of S.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gpu_init.backend.interface import Backend, ranges
from gpu_init.method import points as method_points
from gpu_init.method.matrix import Interactions, power

RANK = 64  # The default number of dimensions that users are placed in by what they did.
TOLERANCE = 1e-6  # A direction is found when its residual is below this; singular values are at most 1.
LEAST_PRODUCTS = 12  # So many products of S^T S with a block of vectors are always allowed.
MOST_PRODUCTS = 200  # `WORK` allows at most so many products.
WORK = 1 << 31  # Beyond `LEAST_PRODUCTS`, all products together take at most so many multiplications.
_BLOCK = 16  # Lanczos multiplies so many vectors at a time.
_RANGE_USERS = 1 << 20  # A product goes through so many users at a time.
_GRAPH_USERS = 1 << 16  # The search for components goes through so many users at a time.
_ROWS = 1 << 11  # Dense products take so many rows at a time.
_LITTLE = 1e-5  # A unit vector that is shorter than this after orthogonalization contains much rounding error.
_NOTHING = 1e-10  # A unit vector that is shorter than this after orthogonalization is only rounding error.

Product = Callable[[Any], Any]
"""From a table (I, b) float64 to ``S^T S`` times it."""


@dataclass(frozen=True)
class Embedding:
    """The directions that place users by their interactions.

    Attributes
    ----------
    items : array, shape (I, r), float32
        V: leading right singular vectors of S, each with its largest value positive; 0 for items outside the large
        components.
    item_factors : array, shape (I,), float64
        D_I^-1/2; 0 for items outside.
    singular_values : array, shape (r,), float64
        Descending, on the host.
    products : int
        By S^T S.
    settled : bool
        Whether all residuals fell below `TOLERANCE`; else it ended at `most_products`.
    """

    items: Any
    item_factors: Any
    singular_values: NDArray[np.float64]
    products: int
    settled: bool


class Graph(Protocol):
    """Interactions as `fit` asks about them."""

    items: int
    pairs: int

    def item_sums(self) -> Any:
        """Degrees of the items, (I,) float64."""

    def large(self, most: int) -> NDArray[np.bool_]:
        """Find the items (I,) in large components: the largest, and any with ``1 / most`` of all users and items."""

    def keep(self, kept: Any) -> int:
        """Restrict S to these items (I,) bool from here on; return the number of users who have one of them."""

    def product(self, table: Any) -> Any:
        """``R^T D_U^-1 R`` times a table (I, b) float64."""


class Whole:
    """A `Graph` of all interactions, or of those of a part of the users."""

    def __init__(self, backend: Backend, interactions: Interactions) -> None:
        self.items, self.pairs = interactions.items, interactions.pairs
        self._backend, self._interactions = backend, interactions
        self._user_factors: Any = None

    def item_sums(self) -> Any:
        return self._interactions.item_sums(self._backend)

    def large(self, most: int) -> NDArray[np.bool_]:
        labels = component_labels(self._backend, self._interactions)
        return large_labels(labels, component_sizes(self._backend, self._interactions, labels), most)

    def keep(self, kept: Any) -> int:
        xp = self._backend.xp
        degrees = self._interactions.user_degrees(self._backend, kept.astype(xp.float64))
        self._user_factors = power(xp, degrees, -1.0)
        return int((degrees > 0).sum())

    def product(self, table: Any) -> Any:
        csr, sums = self._interactions.csr, self._backend.xp.zeros(table.shape)
        for part in ranges(self._interactions.users, _RANGE_USERS):
            self._backend.kernels.gram(csr.rows(part.start, part.stop), table, self._user_factors[part], sums)
        return sums


def fit(backend: Backend, graph: Graph, rank: int, seed: int) -> Embedding:
    """Directions of some interactions.

    Parameters
    ----------
    backend : Backend
    graph : Graph
        Of one interaction or more, of items with and without features alike.
    rank : int
        r; fewer where S is smaller.
    seed : int
        Of the vectors that Lanczos starts from.

    Returns
    -------
    Embedding
    """
    xp = backend.xp
    kept = backend.asarray(graph.large(rank))
    item_factors = power(xp, xp.where(kept, graph.item_sums(), 0.0), -0.5)
    inside = xp.flatnonzero(item_factors)
    rank = min(rank, len(inside), graph.keep(kept))

    def product(table: Any) -> Any:
        return item_factors[:, None] * graph.product(item_factors[:, None] * table)

    rng = np.random.default_rng(seed)
    with backend.deterministic():
        if len(inside) <= _most_vectors(rank):
            vectors, squares, products, settled = *_whole(backend, product, graph.items, inside, rank), 1, True
        else:
            most = most_products(graph.pairs, rank)
            vectors, squares, products, settled = _lanczos(backend, product, item_factors > 0, rank, most, rng)
        largest = vectors[abs(vectors).argmax(axis=0), xp.arange(rank)]
        vectors = (vectors * xp.where(largest < 0, -1.0, 1.0)).astype(xp.float32)
    values = np.sqrt(np.maximum(backend.to_host(squares), 0.0))
    return Embedding(vectors, item_factors, values, products, settled)


def most_products(pairs: int, rank: int) -> int:
    """Products by S^T S that interactions of so many pairs are worth: where the spectrum is flat, more add little."""
    return max(LEAST_PRODUCTS, 2 * -(-rank // _BLOCK), min(MOST_PRODUCTS, WORK // (2 * _BLOCK * pairs)))


def needed_bytes(items: int, rank: int) -> int:
    """Most bytes that `fit` takes at a time beside the interactions and what is kept of each user."""
    columns = _most_vectors(rank) + 4 * _BLOCK + rank
    return 8 * items * columns + method_points.parts_bytes(8 * items * _BLOCK)


def points(
    backend: Backend,
    interactions: Interactions,
    items: Any,
    item_factors: Any,
    kind: type[method_points.Tiled] = method_points.Tiled,
) -> method_points.Tiled:
    """Rows of E, each of length 1, of the users who have one, for directions (I, r) and their D_I^-1/2 (I,).

    D_U^-1/2 is left out of S, because it changes only the length of a row.
    """
    xp = backend.xp
    offset = xp.zeros(items.shape[1])
    ones = xp.ones(interactions.users)
    squares = backend.kernels.squared_norms(interactions.csr, items, ones, item_factors, offset)
    return kind(backend, interactions.csr, items, power(xp, squares, -0.5), item_factors, offset, ones)


def component_labels(backend: Backend, interactions: Interactions) -> NDArray[np.int64]:
    """Connected component of each item (I,), numbered from 0, as far as these users connect them."""
    labels = np.arange(interactions.items)
    for _, firsts, items in _host_rows(backend, interactions):
        one, other = labels[firsts], labels[items]
        apart = one != other
        if apart.any():
            labels = _joined(one[apart], other[apart], int(labels.max()) + 1)[labels]
    return labels


def joined_labels(one: NDArray[np.int64], other: NDArray[np.int64]) -> NDArray[np.int64]:
    """Components of the items (I,) where either of two labellings connects them."""
    first = np.zeros(int(other.max(initial=-1)) + 1, np.int64)
    first[other[::-1]] = one[::-1]  # For each component of ``other``, this is the label in ``one`` of its first item.
    return _joined(one, first[other], int(one.max(initial=-1)) + 1)[one]


def _joined(one: NDArray[np.int64], other: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Join ``count`` labels where ``one`` and ``other`` pair them; return the component of each label."""
    from scipy.sparse import coo_array  # Imported here, because most jobs do not need it and start sooner.
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(one), bool), (one, other)), shape=(count, count))
    return connected_components(graph, directed=False)[1].astype(np.int64)  # type: ignore[no-any-return]


def component_sizes(
    backend: Backend, interactions: Interactions, labels: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How many of the users are in each component, and how many interactions each item (I,) has with them."""
    sizes = np.zeros(int(labels.max(initial=-1)) + 1, np.int64)
    used = np.zeros(len(labels), np.int64)
    for starts, _, items in _host_rows(backend, interactions):
        sizes += np.bincount(labels[items[starts]], minlength=len(sizes))
        used += np.bincount(items, minlength=len(used))
    return sizes, used


def large_labels(
    labels: NDArray[np.int64], found: tuple[NDArray[np.int64], NDArray[np.int64]], most: int
) -> NDArray[np.bool_]:
    """Which items (I,) lie in large components, from the labels and the `component_sizes` of all users.

    Large are the largest component, and any that holds ``1 / most`` of all users and items with interactions.
    """
    sizes, used = found[0].copy(), found[1] > 0
    sizes += np.bincount(labels[used], minlength=len(sizes))
    large: NDArray[np.bool_] = (sizes * most >= sizes.sum()) | (sizes == sizes.max(initial=0))
    return large[labels] & used


def _host_rows(backend: Backend, interactions: Interactions) -> Any:
    """Ranges of interactions: where each user's start, the first item of the user of each, and its own item."""
    csr = interactions.csr
    for part in ranges(interactions.users, _GRAPH_USERS):
        bounds = backend.to_host(csr.indptr[part.start : part.stop + 1])
        items = backend.to_host(csr.indices[int(bounds[0]) : int(bounds[-1])])
        lengths = np.diff(bounds)
        starts = (bounds[:-1] - bounds[0])[lengths > 0]
        yield starts, np.repeat(items[starts], lengths[lengths > 0]), items


def _most_vectors(rank: int) -> int:
    """Vectors that Lanczos keeps before it starts again from the best of them."""
    return 2 * rank + 3 * _BLOCK


def _whole(backend: Backend, product: Product, items: int, inside: Any, rank: int) -> tuple[Any, Any]:
    """All of a small S^T S at once: its leading eigenvectors (I, r) and values (r,)."""
    xp = backend.xp
    table = xp.zeros((items, len(inside)))
    table[inside, xp.arange(len(inside))] = 1.0
    values, found = xp.linalg.eigh(product(table)[inside])
    vectors = xp.zeros((items, rank))
    vectors[inside] = found[:, ::-1][:, :rank]
    return vectors, values[::-1][:rank]


def _lanczos(
    backend: Backend, product: Product, inside: Any, rank: int, limit: int, rng: np.random.Generator
) -> tuple[Any, Any, int, bool]:
    """Leading eigenvectors (I, r) and values (r,) of a symmetric operator, how many products it took, whether settled.

    Block Lanczos with full orthogonalization (Golub and Underwood, 1977), started again from the best Ritz vectors
    where the basis is full (thick restart; Wu and Simon, 2000). ``inside`` (I,): rows that are not 0.
    """
    xp = backend.xp
    most, kept = _most_vectors(rank), rank + _BLOCK
    basis = xp.zeros((len(inside), most + _BLOCK))
    projected = xp.zeros((most, most))  # basis^T S^T S basis, its upper triangle
    noise = backend.asarray(rng.standard_normal((len(inside), _BLOCK)))
    fresh, _ = xp.linalg.qr(xp.where(inside[:, None], noise, 0.0))
    size = products = begun = 0  # ``begun`` is the column at which the blocks since the last restart begin.
    while True:
        block = slice(size, size + _BLOCK)
        basis[:, block] = fresh
        size += _BLOCK
        rest = product(fresh)
        products += 1
        first = size - 2 * _BLOCK if size > begun + _BLOCK else 0  # Earlier columns are orthogonal up to rounding.
        projected[first:size, block] = orthogonalize(backend, basis[:, first:size], rest)
        projected[:size, block] += orthogonalize(backend, basis[:, :size], rest)
        fresh, coupling = xp.linalg.qr(rest)
        values, vectors = xp.linalg.eigh(projected[:size, :size], UPLO="U")
        values, vectors = values[::-1], vectors[:, ::-1]
        wanted = vectors[:, : min(rank, size)]
        residuals = xp.sqrt(((coupling @ wanted[-_BLOCK:]) ** 2).sum(axis=0))
        settled = size >= rank and bool((residuals <= TOLERANCE).all())
        if settled or products == limit:
            return _times(backend, basis[:, :size], wanted), values[:rank], products, settled
        left = abs(xp.diagonal(coupling))
        if bool((left <= _LITTLE).any()):
            noise = backend.asarray(rng.standard_normal(fresh.shape))
            noise = xp.where(inside[:, None], noise, 0.0)
            fresh = xp.where(left <= _NOTHING, noise, fresh)  # Random vectors replace mere rounding error.
            for _ in range(2):
                orthogonalize(backend, basis[:, :size], fresh)
            fresh, _ = xp.linalg.qr(fresh)
        if size + _BLOCK > most:
            basis[:, :kept] = _times(backend, basis[:, :size], vectors[:, :kept])
            projected[:] = xp.diag(xp.concatenate([values[:kept], xp.zeros(most - kept)]))
            size = begun = kept


def orthogonalize(backend: Backend, basis: Any, block: Any) -> Any:
    """Subtract from a block (I, b), in place, its projection on a basis (I, n); return the coefficients (n, b)."""
    inner = _inner(backend, basis, block)
    block -= _times(backend, basis, inner)
    return inner


def _inner(backend: Backend, basis: Any, block: Any) -> Any:
    """``basis.T @ block``, (n, b)."""
    return sum(backend.in_order(lambda part: basis[part].T @ block[part], ranges(len(basis), _ROWS)))


def _times(backend: Backend, basis: Any, table: Any) -> Any:
    """``basis @ table``, (I, n) by (n, m)."""
    out = backend.xp.empty((len(basis), table.shape[1]))

    def work(part: slice) -> None:
        out[part] = basis[part] @ table

    for _ in backend.in_order(work, ranges(len(basis), _ROWS)):
        pass
    return out
