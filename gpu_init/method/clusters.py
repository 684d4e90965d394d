"""The method on arrays: section 2 of the design, sentence by sentence.

SG-URInit (SIGIR 2026, arXiv 2604.14839), built from public readings of the paper.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from gpu_init.backend.interface import Backend
from gpu_init.config import AUTO, POLICIES, Settings
from gpu_init.errors import InputError
from gpu_init.method import kmeans as method_kmeans
from gpu_init.method import points as method_points
from gpu_init.method import spectral
from gpu_init.method.blend import Blend, scale_to_items
from gpu_init.method.choose import CANDIDATES, Choice, choose
from gpu_init.method.lambdas import lambdas
from gpu_init.method.matrix import Interactions
from gpu_init.method.modality import Modality
from gpu_init.method.points import kmeans_form, matrix
from gpu_init.method.weighting import Weighting

RANK = 64  # dimensions that users are placed in by what they did


def check_clusters(name: str, n_present: int, operator: Weighting, settings: Settings) -> None:
    """Section 2.8: K is bounded by the warm users of the modality; none warm is an error.

    Raises
    ------
    InputError
        No warm user, or fewer users (or items, where those are clustered) than clusters; ``auto`` takes fewer then.
    """
    check_warm(name, n_present, int(operator.warm.sum()), settings)


def check_warm(name: str, n_present: int, warm: int, settings: Settings) -> None:
    """As `check_clusters`, from the number of warm users."""
    if warm == 0:
        raise InputError(f"modality {name}: no user has an interaction with an item that has it.")
    if not isinstance(settings.clusters, int) or settings.cluster_on == "interactions":
        return
    if settings.clusters > warm:
        raise InputError(
            f"modality {name}: {settings.clusters} clusters, but {warm} users with interactions; lower --clusters."
        )
    if settings.cluster_on == "items" and settings.clusters > n_present:
        raise InputError(
            f"modality {name}: {settings.clusters} clusters, but {n_present} items that have it; lower --clusters."
        )


@dataclass(frozen=True)
class Clustering:
    """Section 2.4: centroids and who belongs to which.

    ``user_labels`` (U,) int32: the centroid nearest to the user's means, -1 for cold users. ``item_labels``
    (I,) int32 where items were clustered, -1 for items without the modality, else None. ``found``: what K-means says
    of it. ``choice``: how K was chosen, None where it was given.
    """

    centroids: Any
    user_labels: Any
    item_labels: Any
    found: method_kmeans.Clusters
    choice: Choice | None = None


@dataclass(frozen=True)
class Behaviour:
    """Section 2.4, ``cluster_on = "interactions"``: users clustered by what they did, for all modalities alike.

    ``centroids`` (K, r) float32 are those of rows of E; ``labels`` (U,) int32 the nearest of them, -1 for users without
    interactions. ``found`` and ``choice`` as in `Clustering`.
    """

    embedding: spectral.Embedding
    centroids: Any
    labels: Any
    found: method_kmeans.Clusters
    choice: Choice | None = None


def embed(backend: Backend, interactions: Interactions, settings: Settings) -> spectral.Embedding:
    """Section 2.4: V of ``E = S V``."""
    return spectral.fit(backend, spectral.Whole(backend, interactions), settings.cluster_rank or RANK, settings.seed)


def behaviour(
    backend: Backend,
    interactions: Interactions,
    embedding: spectral.Embedding,
    settings: Settings,
    memory: int | None = None,
) -> Behaviour:
    """Section 2.4: K-means on the rows of E, over the users with any interaction in a large component.

    Parameters
    ----------
    embedding : Embedding
        Of these interactions, by `embed`.
    memory : int, optional
        Bytes that it may take beside the interactions; None: as `kmeans_form` says.

    Raises
    ------
    InputError
        More clusters than such users.
    """
    arrays = (backend, interactions, embedding.items, embedding.item_factors)
    points = spectral.points(*arrays)
    choice = None
    if settings.clusters == AUTO:
        choice = choose(backend, points, settings.seed)
        settings = replace(settings, clusters=choice.clusters)
    assert isinstance(settings.clusters, int)
    check_placed(len(points), settings.clusters)
    found = _kmeans(
        backend, interactions, points, lambda: spectral.points(*arrays, method_points.Factored), settings, memory
    )
    labels = behaviour_labels(backend, interactions, points, found.centroids)
    return Behaviour(embedding, found.centroids, labels, found, choice)


def check_placed(users: int, clusters: int) -> None:
    """Refuse more clusters than users who have a row of E.

    Raises
    ------
    InputError
        How many there are.
    """
    if clusters > users:
        raise InputError(f"{clusters} clusters, but {users} users whose interactions hang together; lower --clusters.")


def behaviour_labels(backend: Backend, interactions: Interactions, points: method_points.Tiled, centroids: Any) -> Any:
    """Label of each user (U,) int32: the centroid nearest to the user's row of E, -1 without interactions.

    Users outside the large components have no row: 0 is nearest to the shortest centroid, that of the cluster whose
    members have least in common. ``points``: by `spectral.points`, made tile by tile, so that each user's label comes
    out the same whoever the other users are.
    """
    xp = backend.xp
    lengths = (centroids.astype(xp.float64) ** 2).sum(axis=1)
    active = interactions.csr.indptr[1:] > interactions.csr.indptr[:-1]
    labels = xp.where(active, int(lengths.argmin()), -1).astype(xp.int32)
    if len(points):
        labels[points.users] = points.nearest(centroids)[points.users]
    return labels


def clusters(
    backend: Backend,
    interactions: Interactions,
    modality: Modality,
    operator: Weighting,
    settings: Settings,
    memory: int | None = None,
) -> Clustering:
    """Section 2.4: K-means per modality, on the users' means M or on the items' rows of F.

    ``memory``: bytes that it may take beside the interactions and the features; None: as `kmeans_form` says.
    """
    choice = None
    if settings.cluster_on == "users":
        if settings.clusters == AUTO:
            means = method_points.Tiled(
                backend, interactions.csr, modality.values, operator.mean_rows, operator.present
            )
            choice = choose(backend, means, settings.seed)
            settings = replace(settings, clusters=choice.clusters)
        arrays = (backend, interactions.csr, modality.values, operator.mean_rows, operator.present)
        tiled = method_points.Tiled(*arrays)
        found = _kmeans(backend, interactions, tiled, lambda: method_points.Factored(*arrays), settings, memory)
        user_labels = found.labels
        if found.form == "dense":  # as they come out where these users are assigned among others
            user_labels = nearest(backend, interactions, modality, operator, found.centroids, found.form)
        return Clustering(found.centroids, user_labels, None, found, choice)
    found, choice, item_labels = cluster_items(backend, modality, settings)
    user_labels = nearest(backend, interactions, modality, operator, found.centroids, "factored")
    return Clustering(found.centroids, user_labels, item_labels, found, choice)


def cluster_items(
    backend: Backend, modality: Modality, settings: Settings
) -> tuple[method_kmeans.Clusters, Choice | None, Any]:
    """Section 2.4: K-means on the items' rows; their labels (I,) int32 too, -1 for items without the modality."""
    xp = backend.xp
    kept = xp.flatnonzero(modality.present)
    rows = modality.values if len(kept) == len(modality.values) else modality.values[kept]
    points = method_points.Dense(backend, rows)
    choice = None
    if settings.clusters == AUTO:
        choice = choose(backend, points, settings.seed)
        settings = replace(settings, clusters=choice.clusters)
    assert isinstance(settings.clusters, int)
    start = _library_start(backend, rows, settings) if _takes_library(backend, points, settings) else None
    found = _fit(backend, points, settings, start)
    item_labels = xp.full(len(modality.values), -1, xp.int32)
    item_labels[kept] = found.labels
    return found, choice, item_labels


def of_behaviour(
    backend: Backend,
    interactions: Interactions,
    modality: Modality,
    operator: Weighting,
    labels: Any,
    clusters: int,
    memory: int | None = None,
) -> tuple[Any, Any]:
    """Section 2.4: clusters of all modalities alike, in one of them.

    Parameters
    ----------
    labels : array, shape (U,), int32
        Of `Behaviour`.
    clusters : int
        K.

    Returns
    -------
    centroids : array, shape (K, D), float32
        Mean of the members' M; where no member is warm, that of all warm users.
    user_labels : array, shape (U,), int32
        -1 for users who are cold in this modality.
    """
    xp = backend.xp
    arrays = (backend, interactions.csr, modality.values, operator.mean_rows, operator.present)
    points = method_points.Tiled(*arrays)
    sizes = (len(points), interactions.items, interactions.pairs, clusters, modality.values.shape[1])
    if kmeans_form(*sizes, memory) == "factored":
        points = method_points.Factored(*arrays)
    sums, counts = behaviour_sums(backend, points, labels, clusters)
    return behaviour_means(backend, sums, counts, points.offset), xp.where(operator.warm, labels, -1).astype(xp.int32)


def behaviour_sums(backend: Backend, points: method_points.Tiled, labels: Any, clusters: int) -> tuple[Any, Any]:
    """Sums of the rows of some points, less the offset, of each label (K, D) float64, and their counts (K,)."""
    own = backend.xp.full(len(labels), -1, "int32")
    own[points.users] = labels[points.users]
    with backend.deterministic():
        return points.sums(own, clusters), backend.xp.bincount(own[points.users], minlength=clusters)


def behaviour_means(backend: Backend, sums: Any, counts: Any, offset: Any) -> Any:
    """Centroids (K, D) float32 of `of_behaviour`, from the `behaviour_sums` of all users."""
    xp = backend.xp
    own = sums / xp.maximum(counts, 1)[:, None]
    return (xp.where(counts[:, None] > 0, own, sums.sum(axis=0) / counts.sum()) + offset).astype(xp.float32)


def cluster_arrays(
    backend: Backend,
    interactions: Interactions,
    modality: Modality,
    operator: Weighting,
    settings: Settings,
    shared: Behaviour | None,
) -> tuple[Any, Any, Any]:
    """Section 2.4: centroids, user labels and item labels (or None), by users' behaviour where that is given."""
    if shared is not None:
        k = len(shared.centroids)
        return (*of_behaviour(backend, interactions, modality, operator, shared.labels, k), None)
    found = clusters(backend, interactions, modality, operator, settings)
    return found.centroids, found.user_labels, found.item_labels


def most_clusters(settings: Settings) -> int:
    """K, or the largest that may be chosen."""
    return max(CANDIDATES) if isinstance(settings.clusters, str) else settings.clusters


def nearest(
    backend: Backend, interactions: Interactions, modality: Modality, operator: Weighting, centroids: Any, form: str
) -> Any:
    """Label of each user (U,) int32: the centroid nearest to the user's means, -1 for cold users.

    ``form``: ``factored``, or any other for means made tile by tile. Each user's label comes out the same whoever the
    other users are.
    """
    kind = method_points.Factored if form == "factored" else method_points.Tiled
    users = kind(backend, interactions.csr, modality.values, operator.mean_rows, operator.present)
    with backend.deterministic():
        return users.nearest(centroids)


def _kmeans(
    backend: Backend,
    interactions: Interactions,
    tiled: method_points.Tiled,
    factored: Callable[[], method_points.Tiled],
    settings: Settings,
    memory: int | None,
) -> method_kmeans.Clusters:
    """K-means on rows: on their matrix where a library takes that, else in the form that `kmeans_form` says.

    The matrix is made by the kernel and not as a sparse product of the library: cupyx copies R's weights to float32
    values of each interaction, counts interactions in 32 bits, and gives columns one after another, which cuML copies.
    """
    assert isinstance(settings.clusters, int)
    sizes = (len(tiled), interactions.items, interactions.pairs, settings.clusters, len(tiled.offset))
    library = _takes_library(backend, tiled, settings)
    form = "dense" if library else kmeans_form(*sizes, memory)
    points: method_points.Points = tiled
    start = None
    if form == "factored":
        points = factored()
    elif form == "dense":
        rows = matrix(backend, tiled)
        points = method_points.Dense(backend, rows, tiled.offset)
        start = _library_start(backend, rows, settings) if library else None
    return _fit(backend, points, settings, start)


def _takes_library(backend: Backend, points: method_points.Points, settings: Settings) -> bool:
    assert isinstance(settings.clusters, int)
    return backend.takes_matrix(len(points), len(points.offset), settings.clusters, settings.kmeans)


def _library_start(backend: Backend, rows: Any, settings: Settings) -> Any:
    """Centroids (K, D) that the backend's library finds."""
    assert isinstance(settings.clusters, int)
    return backend.kmeans(rows, settings.clusters, settings.seed, settings.restarts)


def _fit(backend: Backend, points: method_points.Points, settings: Settings, start: Any) -> method_kmeans.Clusters:
    assert isinstance(settings.clusters, int)
    return method_kmeans.fit(
        backend, points, settings.clusters, settings.seed, settings.restarts, settings.tolerance, start
    )


def cold_vector(
    backend: Backend,
    interactions: Interactions,
    operator: Weighting,
    centroids: Any,
    user_labels: Any,
    item_labels: Any,
) -> Any:
    """Section 2.8: the mean of G over the warm users, (D,) float64."""
    shares = cluster_shares(backend, interactions, operator, len(centroids), user_labels, item_labels)
    return mean_global(backend, shares, operator.warm.sum(), centroids)


def cluster_shares(
    backend: Backend, interactions: Interactions, operator: Weighting, clusters: int, user_labels: Any, item_labels: Any
) -> Any:
    """What each cluster has in the sum of G over the warm users, (K,) float64."""
    xp = backend.xp
    if item_labels is None:
        return xp.bincount(user_labels[operator.warm], minlength=clusters).astype(xp.float64)
    used = item_labels >= 0
    by_item = interactions.item_sums(backend, operator.mean_rows)[used]
    return xp.bincount(item_labels[used], weights=by_item, minlength=clusters)


def mean_global(backend: Backend, shares: Any, warm: Any, centroids: Any) -> Any:
    """Mean of G over so many warm users, (D,) float64, from `cluster_shares`."""
    with backend.deterministic():
        return (shares / warm) @ centroids.astype(backend.xp.float64)


def fit(
    backend: Backend,
    interactions: Interactions,
    modality: Modality,
    operator: Weighting,
    settings: Settings,
    labels: tuple[Any, Any, Any],
    scale: float | None,
    block_rows: int,
    cold: Any = None,
) -> Blend:
    """Sections 2.5 to 2.8: all that the fused pass needs, from centroids, user labels and item labels.

    ``scale`` None: work out the factor that the settings ask for; ``cold`` None: the vector of cold users.
    """
    centroids, user_labels, item_labels = labels
    if cold is None:
        cold = cold_vector(backend, interactions, operator, centroids, user_labels, item_labels)
    by_user = user_labels if item_labels is None else None
    plan = Blend(modality, operator, settings.lam, centroids, by_user, item_labels, cold)
    if settings.lam in POLICIES:
        found = lambdas(backend, interactions, plan, settings, block_rows)
        plan = replace(plan, lam=found.values, policy={**found.facts, **found.statistics})
    if scale is None:
        scale = scale_to_items(backend, interactions, plan, block_rows) if settings.scale == "items" else 1.0
    return replace(plan, scale=scale)
