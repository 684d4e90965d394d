"""Clusters of users: on their means, on the items, or on the interactions; and what follows from the labels."""

from __future__ import annotations

from typing import Any

from gpu_init.backend.interface import Backend
from gpu_init.errors import InputError
from gpu_init.method import kmeans
from gpu_init.method.choose import CANDIDATES, Choice, choose
from gpu_init.method.matrix import Interactions
from gpu_init.method.modality import Modality
from gpu_init.method.points import Dense, Factored, Tiled
from gpu_init.method.weighting import Weighting
from gpu_init.settings import AUTO, Settings


def most_clusters(settings: Settings) -> int:
    """K, or the largest that may be chosen."""
    return max(CANDIDATES) if isinstance(settings.clusters, str) else settings.clusters


def check_warm(name: str, n_present: int, warm: int, settings: Settings) -> None:
    """Refuse a modality that has too few warm users, or too few items where these are clustered.

    Raises
    ------
    InputError
        There is no warm user, or there are fewer users (or items) than clusters; ``auto`` takes fewer clusters then.
    """
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


def check_placed(users: int, clusters: int) -> None:
    """Refuse more clusters than there are users with a row of E.

    Raises
    ------
    InputError
        How many there are.
    """
    if clusters > users:
        raise InputError(f"{clusters} clusters, but {users} users whose interactions hang together; lower --clusters.")


def number_of_clusters(backend: Backend, points: kmeans.Clusterable, settings: Settings) -> tuple[int, Choice | None]:
    """Return K, and how it was chosen where the settings say ``auto``."""
    if settings.clusters != AUTO:
        assert isinstance(settings.clusters, int)
        return settings.clusters, None
    choice = choose(backend, points, settings.seed)
    return choice.clusters, choice


def cluster_items(
    backend: Backend, modality: Modality, settings: Settings
) -> tuple[kmeans.Clusters, Choice | None, Any]:
    """K-means on the items' rows of F.

    Returns
    -------
    clusters : Clusters
    choice : Choice or None
        How K was chosen; None where it was given.
    item_labels : array, shape (I,), int32
        -1 for items without the modality.
    """
    xp = backend.xp
    kept = xp.flatnonzero(modality.present)
    rows = modality.values if len(kept) == len(modality.values) else modality.values[kept]
    points = Dense(backend, rows)
    clusters, choice = number_of_clusters(backend, points, settings)
    start = None
    if backend.takes_matrix(len(rows), rows.shape[1], clusters, settings.kmeans):
        start = backend.kmeans(rows, clusters, settings.seed, settings.restarts)
    found = kmeans.fit(backend, points, clusters, settings.seed, settings.restarts, settings.tolerance, start)
    item_labels = xp.full(len(modality.values), -1, xp.int32)
    item_labels[kept] = found.labels
    return found, choice, item_labels


def nearest(
    backend: Backend, interactions: Interactions, modality: Modality, weighting: Weighting, centroids: Any, form: str
) -> Any:
    """Label of each user (U,) int32: the centroid nearest to the user's means, -1 for cold users.

    ``form`` is ``factored``, or any other for means that are made tile by tile. Each user's label is the same whoever
    the other users are.
    """
    kind = Factored if form == "factored" else Tiled
    users = kind(backend, interactions.csr, modality.values, weighting.mean_rows, weighting.present)
    with backend.deterministic():
        return users.nearest(centroids)


# Users clustered on the interactions, one clustering for all modalities.


def behaviour_labels(backend: Backend, interactions: Interactions, points: Tiled, centroids: Any) -> Any:
    """Label of each user (U,) int32: the centroid nearest to the user's row of E, -1 without interactions.

    Users outside the large components have no row. The vector 0, which stands for it, is nearest to the shortest
    centroid: that of the cluster whose members have least in common. The points, from `spectral.points`, are made tile
    by tile, so that each user's label is the same whoever the other users are.
    """
    xp = backend.xp
    lengths = (centroids.astype(xp.float64) ** 2).sum(axis=1)
    active = interactions.csr.indptr[1:] > interactions.csr.indptr[:-1]
    labels = xp.where(active, int(lengths.argmin()), -1).astype(xp.int32)
    if len(points):
        labels[points.users] = points.nearest(centroids)[points.users]
    return labels


def behaviour_sums(backend: Backend, points: Tiled, labels: Any, clusters: int) -> tuple[Any, Any]:
    """Sums of some users' means, less the offset, for each label (K, D) float64, and their counts (K,)."""
    own = backend.xp.full(len(labels), -1, "int32")
    own[points.users] = labels[points.users]
    with backend.deterministic():
        return points.sums(own, clusters), backend.xp.bincount(own[points.users], minlength=clusters)


def behaviour_means(sums: Any, counts: Any, offset: Any) -> Any:
    """Centroids (K, D) float32 in one modality, from the `behaviour_sums` of all users, on the host.

    The mean of the members' M; where no member is warm, that of all warm users.
    """
    means = sums / counts.clip(1)[:, None]
    empty = counts == 0
    means[empty] = sums.sum(axis=0) / counts.sum()
    return (means + offset).astype("float32")


# The mean of G, which is what cold users get.


def cluster_shares(
    backend: Backend,
    interactions: Interactions,
    weighting: Weighting,
    clusters: int,
    user_labels: Any,
    item_labels: Any,
) -> Any:
    """Weight of each centroid in the sum of G over some warm users, (K,) float64."""
    xp = backend.xp
    if item_labels is None:
        return xp.bincount(user_labels[weighting.warm], minlength=clusters).astype(xp.float64)
    used = item_labels >= 0
    by_item = interactions.item_sums(backend, weighting.mean_rows)[used]
    return xp.bincount(item_labels[used], weights=by_item, minlength=clusters)


def mean_global(backend: Backend, shares: Any, warm: int, centroids: Any) -> Any:
    """Mean of G over all warm users, (D,) float64: the vector of cold users, from the `cluster_shares` of all users."""
    with backend.deterministic():
        return (shares / warm) @ centroids.astype("float64")
