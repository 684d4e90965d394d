"""What is done to one part of the users: the method's functions on a `Part`, with results that travel well.

Results lie on the host. Rows of users stay where the part is, or are written to their place in the run's arrays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu_init.artifact.format import INTERACTIONS
from gpu_init.method import clusters, lambdas, spectral
from gpu_init.method.blend import Blend, block_rows, blocks
from gpu_init.method.norms import NormSums, norm_sums
from gpu_init.method.points import Dense, Factored, Points, Step, Tiled, matrix
from gpu_init.parts import Part, Parts, received

LABELS = f"{INTERACTIONS}/labels.npy"
SHARED = "shared"  # The form of clusters that were found on the interactions, for all modalities.


def item_sums(part: Part) -> Any:
    """Degrees of the items among these users, (I,) float64."""
    return part.backend.to_host(part.interactions.item_sums(part.backend))


def warm(part: Part, name: str) -> int:
    """Count the users who are warm in a modality."""
    return int(part.operator(name).warm.sum())


# K-means.


@dataclass(frozen=True)
class Rows:
    """Which rows K-means clusters.

    Attributes
    ----------
    name : str
        A modality, whose users' means are meant, or `INTERACTIONS`, the rows of E.
    form : str
        A form of `Points`.
    offset : array, shape (D,), float64
        A point amid the rows, on the host.
    """

    name: str
    form: str
    offset: Any


class _FactoredPart(Factored):
    """Users of one part; the products of the items are made once for all parts of a process."""

    def __init__(self, part: Part, name: str, *arrays: Any) -> None:
        super().__init__(part.backend, *arrays)
        self._part, self._name = part, name

    def item_products(self, table: Any) -> Any:
        return self._part.process.item_products(self._name, self.offset, table)


def points(part: Part, rows: Rows) -> Points:
    """Rows of these users for K-means; kept until others are asked for."""

    def make() -> Points:
        of = (rows.name, rows.form)
        part.process.drop(lambda key: key[0] in ("points", "step") and key[1:3] != of)
        backend = part.backend
        made = _placed(part, rows.form) if rows.name == INTERACTIONS else _means(part, rows)
        return Dense(backend, matrix(backend, made), made.offset) if rows.form == "dense" else made

    return part.keep(("points", rows.name, rows.form), make)


def _means(part: Part, rows: Rows) -> Tiled:
    """The users' means in a modality, less the offset."""
    weighting, backend = part.operator(rows.name), part.backend
    features, offset = part.process.modality(rows.name).values, backend.asarray(rows.offset)
    arrays = (part.interactions.csr, features, weighting.mean_rows, weighting.present, offset)
    return _FactoredPart(part, rows.name, *arrays) if rows.form == "factored" else Tiled(backend, *arrays)


def _placed(part: Part, form: str = "tiled") -> Tiled:
    """Rows of E."""
    backend, load = part.backend, part.process.arrays.load
    items, factors = (
        part.process.keep((INTERACTIONS, name), lambda name=name: backend.asarray(load(f"{INTERACTIONS}/{name}.npy")))  # type: ignore[misc]
        for name in ("items", "item_factors")
    )
    kind = Factored if form == "factored" else Tiled
    return spectral.points(backend, part.interactions, items, factors, kind)


def dense_rows(part: Part, rows: Rows) -> Any:
    """All rows of these users, (n, D), on the device: this result does not travel."""
    return matrix(part.backend, _placed(part) if rows.name == INTERACTIONS else _means(part, rows))


def some_rows(part: Part, rows: Rows, index: Any) -> Any:
    """Some rows less the offset, by their numbers among those of the part."""
    with part.backend.deterministic():
        return part.backend.to_host(points(part, rows).rows(part.backend.asarray(index)))


def step(part: Part, rows: Rows, centroids: Any) -> tuple[float, Any]:
    """Assign these users to the nearest centroids: the inertia, and the number of users of each label (K,)."""
    found = _step(part, rows, centroids)
    return found.inertia, part.backend.to_host(found.counts)


def sums(part: Part, rows: Rows, centroids: Any) -> Any:
    """Sums of the rows, less the offset, of each label (K, D) float64."""
    found = _step(part, rows, centroids)
    with part.backend.deterministic():
        return part.backend.to_host(found.sums())


def _step(part: Part, rows: Rows, centroids: Any) -> Step:
    """What these centroids give is kept; it is made again where another process has it."""
    key, of = ("step", rows.name, rows.form, part.number), points(part, rows)
    before = part.process.take(key)
    if before is None or not np.array_equal(before[0], centroids):
        with part.backend.deterministic():
            before = (centroids, of.step(centroids))
    found: Step = part.process.keep(key, lambda: before)[1]
    return found


def far(part: Part, rows: Rows, centroids: Any, count: int) -> tuple[Any, Any]:
    """Rows farthest from their centroids, by their numbers in the part, and their squared distances."""
    with part.backend.deterministic():
        found = points(part, rows).far(centroids, count)
    return part.backend.to_host(found[0]), part.backend.to_host(found[1])


class PartedPoints:
    """Rows of all parts, as `kmeans.fit` takes them; labels stay with the parts.

    Attributes
    ----------
    counts : array, shape (K,), or None
        Rows of each label in the last step.
    """

    def __init__(self, parts: Parts, rows: Rows, counts: Sequence[int]) -> None:
        self.form = rows.form
        self.counts: Any = None
        self._parts, self._rows, self._counts = parts, rows, counts

    def __len__(self) -> int:
        return sum(self._counts)

    @property
    def offset(self) -> Any:
        return self._parts.backend.asarray(self._rows.offset)

    def rows(self, index: Any) -> Any:
        backend = self._parts.backend
        index = backend.to_host(index)
        order = np.argsort(index, kind="stable")
        own = {part: (numbers,) for part, numbers in by_part(self._counts, index[order])}
        out = np.empty((len(index), len(self._rows.offset)))
        if own:
            out[order] = np.concatenate(self._parts.some(some_rows, own, self._rows))
        return backend.asarray(out)

    def step(self, centroids: Any) -> Step:
        inertia, self.counts = self._parts.total(step, self._rows, centroids)
        return Step(inertia, self.counts, None, lambda: self._parts.total(sums, self._rows, centroids))

    def far(self, centroids: Any, count: int) -> tuple[Any, Any]:
        found = self._parts.map(far, self._rows, centroids, count)
        firsts = np.cumsum([0, *self._counts])
        rows = np.concatenate([rows + first for (rows, _), first in zip(found, firsts[:-1], strict=True)])
        distances = np.concatenate([distances for _, distances in found])
        order = np.argsort(-distances, kind="stable")[:count]
        return rows[order], distances[order]


def by_part(counts: Sequence[int], numbers: Any) -> Iterator[tuple[int, Any]]:
    """Numbers (n,) ascending among the rows of all parts: for each part that has some, its own, from 0 on."""
    ends = np.cumsum(counts)
    start = 0
    for part, stop in enumerate(np.searchsorted(numbers, ends)):
        if stop > start:
            yield part, numbers[start:stop] - (ends[part] - counts[part])
        start = stop


# Users clustered on the interactions.


class PartedGraph:
    """The interactions of all parts, as `spectral.fit` asks about them."""

    def __init__(self, parts: Parts) -> None:
        self.items, self.pairs = parts.plan.items, parts.plan.pairs
        self._parts = parts
        self._kept: Any = None

    def item_sums(self) -> Any:
        return self._parts.backend.asarray(self._parts.total(item_sums))

    def large(self, most: int) -> Any:
        labels = self._parts.total(_components, join=spectral.joined_labels)
        return spectral.large_labels(labels, self._parts.total(_component_sizes, labels), most)

    def keep(self, kept: Any) -> int:
        self._kept = self._parts.broadcast("kept", kept)
        return int(self._parts.total(_active, self._kept))

    def product(self, table: Any) -> Any:
        sums = self._parts.total(_product, self._kept, self._parts.broadcast("table", table))
        return self._parts.backend.asarray(sums)


def _components(part: Part) -> Any:
    return spectral.component_labels(part.backend, part.interactions)


def _component_sizes(part: Part, labels: Any) -> tuple[Any, Any]:
    return spectral.component_sizes(part.backend, part.interactions, labels)


def _graph(part: Part, kept: Any) -> tuple[spectral.Whole, int]:
    def make() -> tuple[spectral.Whole, int]:
        graph = spectral.Whole(part.backend, part.interactions)
        return graph, graph.keep(received(part, kept))

    return part.keep(("graph",), make)


def _active(part: Part, kept: Any) -> int:
    return _graph(part, kept)[1]


def _product(part: Part, kept: Any, table: Any) -> Any:
    with part.backend.deterministic():
        return part.backend.to_host(_graph(part, kept)[0].product(received(part, table)))


def placed(part: Part) -> int:
    """Count the users who have a row of E."""
    part.process.take(("graph", part.number))
    return len(_placed(part))


def label_interactions(part: Part, centroids: Any) -> None:
    """Write the labels that these users have in all modalities."""
    found = _placed(part)
    labels = clusters.behaviour_labels(part.backend, part.interactions, found, part.backend.asarray(centroids))
    part.write_rows(LABELS, part.backend.to_host(labels))


def sums_of_labels(part: Part, rows: Rows, count: int) -> tuple[Any, Any]:
    """Sums of the users' means in a modality by the labels of the interactions, and how many users each has."""
    found = clusters.behaviour_sums(part.backend, _means(part, rows), part.own_rows(LABELS), count)
    return part.backend.to_host(found[0]), part.backend.to_host(found[1])


# Labels and vectors.


@dataclass(frozen=True)
class Fitted:
    """Clusters of a modality, and what else the vectors are blended by; arrays lie on the host.

    Attributes
    ----------
    name : str
        The modality.
    form : str
        The form of points that users are labelled in; `SHARED` where labels are those of all modalities.
    centroids : array, shape (K, D), float32
    item_labels : array, shape (I,), int32, or None
        Labels of the items, where these were clustered.
    cold : array, shape (D,), float64, or None
        The vector of cold users, once it is known.
    scale : float
        The factor of all vectors.
    tau : float or None
        Of the policy "shrink".
    """

    name: str
    form: str
    centroids: Any
    item_labels: Any = None
    cold: Any = None
    scale: float = 1.0
    tau: float | None = None


def label(part: Part, fitted: Fitted) -> tuple[Any, Any]:
    """Write the labels of these users.

    Returns
    -------
    counts : array, shape (K,)
        Users of each label.
    shares : array, shape (K,), float64
        How often each centroid stands in the sum of G.
    """
    backend, weighting = part.backend, part.operator(fitted.name)
    item_labels = None if fitted.item_labels is None else backend.asarray(fitted.item_labels)
    labels = _labels(part, fitted)
    part.process.drop(lambda key: key[0] in ("points", "step") and key[-1] == part.number)
    count = len(fitted.centroids)
    shares = clusters.cluster_shares(backend, part.interactions, weighting, count, labels, item_labels)
    host = backend.to_host(labels)
    part.write_rows(f"{fitted.name}/labels.npy", host)
    return np.bincount(host[host >= 0], minlength=count), backend.to_host(shares)


def _labels(part: Part, fitted: Fitted) -> Any:
    """Labels of these users, -1 for cold ones: those of the last pass of K-means, where this process made it."""
    backend, weighting = part.backend, part.operator(fitted.name)
    if fitted.form == SHARED:
        return backend.xp.where(weighting.warm, part.own_rows(LABELS), -1).astype("int32")
    before = part.process.take(("step", fitted.name, fitted.form, part.number))
    if before is not None and fitted.form != "dense" and np.array_equal(before[0], fitted.centroids):
        return before[1].labels
    modality, centroids = part.process.modality(fitted.name), backend.asarray(fitted.centroids)
    return clusters.nearest(backend, part.interactions, modality, weighting, centroids, fitted.form)


def _counts(part: Part, name: str) -> tuple[Any, Any]:
    """Sums of squared shares, and effective counts, (n,) each."""
    return part.keep(
        ("counts", name), lambda: lambdas.effective_counts(part.backend, part.interactions, part.operator(name))
    )


def volumes(part: Part, name: str) -> lambdas.Volumes:
    """First sums for tau."""
    found = lambdas.tau_volumes(part.backend, part.interactions, part.operator(name), _counts(part, name)[1])
    return found._replace(by_item=part.backend.to_host(found.by_item))


def variances(part: Part, name: str, centre: lambdas.Centre) -> tuple[float, float]:
    """Second sums for tau."""
    here = lambdas.Centre(*map(part.backend.asarray, centre))
    arrays = (part.interactions, part.process.modality(name), part.operator(name), _counts(part, name)[1])
    return lambdas.tau_sums(part.backend, *arrays, here)


def warm_counts(part: Part, name: str) -> Any:
    """Effective counts of the warm users' items."""
    return part.backend.to_host(_counts(part, name)[1][part.operator(name).warm])


def policy(part: Part, fitted: Fitted) -> tuple[Any, Any]:
    """Lambdas and effective counts of the warm users, by the policy; the lambdas are kept for what follows."""
    weighting = part.operator(fitted.name)
    values, counts = _lambdas(part, fitted)[weighting.warm], warm_counts(part, fitted.name)
    part.process.take(("counts", fitted.name, part.number))
    return part.backend.to_host(values), counts


def _lambdas(part: Part, fitted: Fitted) -> Any:
    """Lambda of each of these users (n,) float64, by the policy."""

    def make() -> Any:
        backend, settings, weighting = part.backend, part.settings, part.operator(fitted.name)
        squares, counts = _counts(part, fitted.name)
        if settings.lam == "shrink":
            assert fitted.tau is not None
            return lambdas.shrink(backend, weighting.warm, counts, fitted.tau)
        temperature = lambdas.TEMPERATURE if settings.temperature is None else settings.temperature
        fit, step_rows = _blend(part, fitted, 0.0), _block_rows(part, fitted)
        return lambdas.attention(backend, part.interactions, fit, squares, temperature, step_rows)

    return part.keep(("lambda", fitted.name), make)


def _blend(part: Part, fitted: Fitted, lam: Any) -> Blend:
    """All that the fused pass over these users needs."""
    backend, by_user = part.backend, fitted.item_labels is None
    return Blend(
        part.process.modality(fitted.name),
        part.operator(fitted.name),
        lam,
        backend.asarray(fitted.centroids),
        part.own_rows(f"{fitted.name}/labels.npy") if by_user else None,
        None if by_user else backend.asarray(fitted.item_labels),
        backend.asarray(fitted.cold),
        fitted.scale,
    )


def blend(part: Part, fitted: Fitted) -> Blend:
    """All that the fused pass over these users needs, with each user's lambda."""
    lam = part.settings.lam
    return _blend(part, fitted, _lambdas(part, fitted) if isinstance(lam, str) else lam)


def _block_rows(part: Part, fitted: Fitted) -> int:
    return block_rows(fitted.centroids.shape[1], part.plan.block_bytes)


def measure(part: Part, fitted: Fitted) -> NormSums:
    """Norms of the users' vectors, which are not kept."""
    backend, rows = part.backend, min(_block_rows(part, fitted), part.interactions.users)
    space = backend.empty((rows, fitted.centroids.shape[1]), "float32")
    made = blocks(
        backend,
        part.interactions,
        blend(part, fitted),
        _block_rows(part, fitted),
        "float32",
        lambda users: space[: users.stop - users.start],
    )
    return norm_sums(backend, (block for _, block in made))


def write(part: Part, fitted: Fitted, measured: bool) -> NormSums:
    """Write the users' vectors, each block while the next one is made; gives their norms where these are wanted."""
    backend, dtype, width = part.backend, part.settings.dtype, fitted.centroids.shape[1]
    rows, fit = _block_rows(part, fitted), blend(part, fitted)
    most = min(rows, part.interactions.users)
    place = f"{fitted.name}/users.npy"
    with part.process.arrays.outbox(backend, place, part.users.start, most, width, dtype) as outbox:

        def made() -> Iterator[Any]:
            space = lambda users: outbox.space(users.stop - users.start)  # noqa: E731
            for _, block in blocks(backend, part.interactions, fit, rows, dtype, space):
                yield block  # for its norms
                outbox.send(block)

        if measured:
            return norm_sums(backend, made())
        for _ in made():
            pass
        return norm_sums(backend, iter(()))


def drawn(part: Part, fitted: Fitted, index: Any) -> dict[str, Any]:
    """Interactions, row factors, labels and lambdas of some of the warm users, by their numbers among these."""
    backend, fit = part.backend, blend(part, fitted)
    users = backend.xp.flatnonzero(fit.weighting.warm)[backend.asarray(index)]
    own = part.interactions.some(backend, users)
    found = {**own.csr._asdict(), "local_rows": fit.weighting.local_rows, "mean_rows": fit.weighting.mean_rows}
    found |= {"labels": fit.user_labels, "lam": None if isinstance(fit.lam, float) else fit.lam}
    of_users = ("local_rows", "mean_rows", "labels", "lam")
    return {
        name: None if array is None else backend.to_host(array[users] if name in of_users else array)
        for name, array in found.items()
    }
