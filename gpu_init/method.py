"""The method on arrays: section 2 of the design, sentence by sentence.

SG-URInit (SIGIR 2026, arXiv 2604.14839), built from public readings of the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from . import features as feature_arrays
from . import kmeans, spectral
from .backend import Backend, for_work, in_blocks, ranges, select
from .blend import NORM_ROWS, Blend, Weighting, blend, lambdas, scale_to_items
from .choose import CANDIDATES, Choice, choose
from .config import AUTO, POLICIES, Settings
from .errors import InputError
from .features import Modality
from .interactions import Interactions, from_matrix, power
from .kernels.costs import fitting_seconds

RANK = 64  # dimensions that users are placed in by what they did
KMEANS_BYTES = 1 << 30  # that K-means may take beside the interactions, the features and what it keeps of each user
ARRAY_BLOCK_BYTES = 64 << 20  # of the result, per kernel call, where nobody says how much memory there is
MATRIX_ROWS = 16 * kmeans.TILE_ROWS  # of the users' means made at a time, where they are made


def weighting(
    backend: Backend, interactions: Interactions, present: Any, kind: str, item_factors: Any = None
) -> Weighting:
    """Sections 2.1, 2.3 and 2.8: degrees over the items that have the modality, and A from them.

    Parameters
    ----------
    present : array, shape (I,), bool
        Which items have the modality.
    kind : {"mean", "sym"}
        ``mean``: A = D_U^-1 R; ``sym``: A = D_U^-1/2 R D_I^-1/2.
    item_factors : array, shape (I,), float64, optional
        D_I^-1/2 of other interactions than these, 0 for items without the modality.
    """
    xp = backend.xp
    present = present.astype(xp.float64)
    degrees = interactions.user_degrees(backend, present)
    mean_rows = power(xp, degrees, -1.0)
    if kind == "mean":
        return Weighting(mean_rows, present, mean_rows, present)
    if item_factors is None:
        item_factors = present * power(xp, interactions.item_sums(backend), -0.5)
    return Weighting(power(xp, degrees, -0.5), item_factors, mean_rows, present)


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
    found: kmeans.Clusters
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
    found: kmeans.Clusters
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
    found = _kmeans(backend, interactions, points, lambda: spectral.points(*arrays, kmeans.Factored), settings, memory)
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


def behaviour_labels(backend: Backend, interactions: Interactions, points: kmeans.Tiled, centroids: Any) -> Any:
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
            means = kmeans.Tiled(backend, interactions.csr, modality.values, operator.mean_rows, operator.present)
            choice = choose(backend, means, settings.seed)
            settings = replace(settings, clusters=choice.clusters)
        arrays = (backend, interactions.csr, modality.values, operator.mean_rows, operator.present)
        tiled = kmeans.Tiled(*arrays)
        found = _kmeans(backend, interactions, tiled, lambda: kmeans.Factored(*arrays), settings, memory)
        user_labels = found.labels
        if found.form == "dense":  # as they come out where these users are assigned among others
            user_labels = nearest(backend, interactions, modality, operator, found.centroids, found.form)
        return Clustering(found.centroids, user_labels, None, found, choice)
    found, choice, item_labels = cluster_items(backend, modality, settings)
    user_labels = nearest(backend, interactions, modality, operator, found.centroids, "factored")
    return Clustering(found.centroids, user_labels, item_labels, found, choice)


def cluster_items(
    backend: Backend, modality: Modality, settings: Settings
) -> tuple[kmeans.Clusters, Choice | None, Any]:
    """Section 2.4: K-means on the items' rows; their labels (I,) int32 too, -1 for items without the modality."""
    xp = backend.xp
    kept = xp.flatnonzero(modality.present)
    rows = modality.values if len(kept) == len(modality.values) else modality.values[kept]
    points = kmeans.Dense(backend, rows)
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
    points = kmeans.Tiled(*arrays)
    sizes = (len(points), interactions.items, interactions.pairs, clusters, modality.values.shape[1])
    if kmeans_form(*sizes, memory) == "factored":
        points = kmeans.Factored(*arrays)
    sums, counts = behaviour_sums(backend, points, labels, clusters)
    return behaviour_means(backend, sums, counts, points.offset), xp.where(operator.warm, labels, -1).astype(xp.int32)


def behaviour_sums(backend: Backend, points: kmeans.Tiled, labels: Any, clusters: int) -> tuple[Any, Any]:
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
    kind = kmeans.Factored if form == "factored" else kmeans.Tiled
    users = kind(backend, interactions.csr, modality.values, operator.mean_rows, operator.present)
    with backend.deterministic():
        return users.nearest(centroids)


def _kmeans(
    backend: Backend,
    interactions: Interactions,
    tiled: kmeans.Tiled,
    factored: Callable[[], kmeans.Tiled],
    settings: Settings,
    memory: int | None,
) -> kmeans.Clusters:
    """K-means on rows: on their matrix where a library takes that, else in the form that `kmeans_form` says.

    The matrix is made by the kernel and not as a sparse product of the library: cupyx copies R's weights to float32
    values of each interaction, counts interactions in 32 bits, and gives columns one after another, which cuML copies.
    """
    assert isinstance(settings.clusters, int)
    sizes = (len(tiled), interactions.items, interactions.pairs, settings.clusters, len(tiled.offset))
    library = _takes_library(backend, tiled, settings)
    form = "dense" if library else kmeans_form(*sizes, memory)
    points: kmeans.Points = tiled
    start = None
    if form == "factored":
        points = factored()
    elif form == "dense":
        rows = matrix(backend, tiled)
        points = kmeans.Dense(backend, rows, tiled.offset)
        start = _library_start(backend, rows, settings) if library else None
    return _fit(backend, points, settings, start)


def _takes_library(backend: Backend, points: kmeans.Points, settings: Settings) -> bool:
    assert isinstance(settings.clusters, int)
    return backend.takes_matrix(len(points), len(points.offset), settings.clusters, settings.kmeans)


def _library_start(backend: Backend, rows: Any, settings: Settings) -> Any:
    """Centroids (K, D) that the backend's library finds."""
    assert isinstance(settings.clusters, int)
    return backend.kmeans(rows, settings.clusters, settings.seed, settings.restarts)


def _fit(backend: Backend, points: kmeans.Points, settings: Settings, start: Any) -> kmeans.Clusters:
    assert isinstance(settings.clusters, int)
    return kmeans.fit(backend, points, settings.clusters, settings.seed, settings.restarts, settings.tolerance, start)


def matrix(backend: Backend, points: kmeans.Points) -> Any:
    """All rows of some points, (n, D), in the type that the library takes."""
    xp = backend.xp
    matrix = xp.empty((len(points), len(points.offset)), backend.kmeans_dtype)
    for part in ranges(len(points), MATRIX_ROWS):
        matrix[part] = points.rows(xp.arange(part.start, part.stop)) + points.offset
    return matrix


def kmeans_form(users: int, items: int, pairs: int, clusters: int, width: int, memory: int | None = None) -> str:
    """Form of our K-means on users' means that costs least, of those that take ``memory`` bytes at most.

    A pass of the factored form costs the mean degree times K per user, one of the tiled form D times K, in what a
    processor does best, and the rows: measured, the factored form is ahead until the mean degree times K is some 64 D
    (``benchmarks/kmeans.py`` sweeps them). Few users are all in the sample that is clustered first, so their matrix is
    made anyway. ``memory`` None: what is kept of each user, and `KMEANS_BYTES` more.
    """
    if memory is None:
        memory = KMEANS_BYTES + kmeans.needed_bytes("tiled", users, items, clusters, width)
    if users <= kmeans.sample_size(clusters):
        return "dense" if kmeans.needed_bytes("dense", users, items, clusters, width) <= memory else "tiled"
    fits = kmeans.needed_bytes("factored", users, items, clusters, width) <= memory
    return "factored" if fits and pairs * clusters <= 64 * width * users else "tiled"


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


def rows(backend: Backend, interactions: Interactions, plan: Blend, part: slice, dtype: str, out: Any = None) -> Any:
    """Section 2.6: rows of X in the type they are stored in, (n, d); into ``out`` where one is given.

    Raises
    ------
    InputError
        A value that float16 cannot hold, with the modality named.
    """
    if dtype == "float32":
        return blend(backend, interactions, plan, part, out)
    block = blend(backend, interactions, plan, part)
    largest = float(abs(block).max()) if block.size else 0.0
    if largest >= 65520.0:  # rounds beyond float16's largest number, 65504
        raise InputError(
            f"modality {plan.modality.name}: a value of {largest:.6g} does not fit float16; use --dtype float32."
        )
    if out is None:
        return block.astype(dtype)
    out[...] = block
    return out


def blocks(
    backend: Backend,
    interactions: Interactions,
    plan: Blend,
    step: int,
    dtype: str,
    space: Callable[[slice], Any],
) -> Iterator[tuple[slice, Any]]:
    """Section 2.6: all of X, block by block, each in the space given for its users, (n, d).

    ``step`` users at a time, a multiple of `NORM_ROWS`; half as many where memory runs out.
    """

    def make(part: slice) -> Any:
        return rows(backend, interactions, plan, part, dtype, space(part))

    return in_blocks(backend, interactions.users, step, NORM_ROWS, make)


def block_rows(width: int, memory: int) -> int:
    """Rows of X per block so that a block, its copy on the way out and the next one stay within ``memory`` bytes."""
    return max(1, memory // (4 * width * 4 * NORM_ROWS)) * NORM_ROWS


# The Python call.


@dataclass(frozen=True)
class ModalityResult:
    """Initial vectors of one modality.

    Attributes
    ----------
    users : array, shape (U, d), float32 or float16
        X, the initial vector of every user.
    centroids : array, shape (K, d), float32
        Unscaled.
    labels : array, shape (U,), int32
        Nearest centroid of each user's means; -1 for cold users.
    item_labels : array, shape (I,), int32, or None
        Cluster of each item, where items were clustered; -1 for items without the modality.
    items : array, shape (I, d), float32, or None
        Projected items, when a projection was asked for; zero rows for items without the modality.
    items_mask : array, shape (I,), bool, or None
        Which items have the modality, when projected.
    scale : float
        Factor that ``users`` were multiplied with.
    """

    users: Any
    centroids: Any
    labels: Any
    item_labels: Any
    items: Any
    items_mask: Any
    scale: float


class Result(Mapping[str, ModalityResult]):
    """What `initialize` returns: modality name to `ModalityResult`."""

    def __init__(self, modalities: dict[str, ModalityResult]) -> None:
        self._modalities = modalities

    def __getitem__(self, name: str) -> ModalityResult:
        return self._modalities[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._modalities)

    def __len__(self) -> int:
        return len(self._modalities)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}: {one.users.shape[0]} x {one.users.shape[1]}" for name, one in self.items())
        return f"Result({shapes})"


def initialize(
    interactions: Any,
    features: Mapping[str, Any],
    *,
    lam: float | str = 0.9,
    tau: float | None = None,
    temperature: float | None = None,
    clusters: int | str = 8,
    cluster_on: str = "users",
    weighting: str = "mean",
    dim: int | None = None,
    whiten: bool = False,
    scale: str = "none",
    dtype: str = "float32",
    backend: str = "auto",
    seed: int = 0,
    restarts: int = 1,
    tolerance: float = 1e-3,
    kmeans: str = "auto",
    cluster_rank: int | None = None,
) -> Result:
    """Initial user vectors from interactions and item features (SG-URInit, arXiv 2604.14839).

    Parameters
    ----------
    interactions : scipy or cupyx sparse matrix, shape (U, I)
        Interaction weights, not negative; duplicates are summed.
    features : mapping of str to array, shape (I, D)
        One modality's item features each: numpy, cupy or torch; float16, bfloat16, float32 or float64. A row
        of NaN is an item without the modality.
    lam : float, "shrink" or "attention", default=0.9
        Weight of the local part, in [0, 1]. ``shrink``: ``n_u / (n_u + tau)``, ``n_u`` the effective count of the
        user's items. ``attention``: ``1 / (1 + exp(-(s_L - s_G) / temperature))``, ``s_L`` the mean cosine of the
        user's items among themselves, ``s_G`` that to the cluster's part.
    tau : float, optional
        Of ``shrink``; None: within-user over between-user variance of the features.
    temperature : float, optional
        Of ``attention``, in cosines; None: 0.1.
    clusters : int or "auto", default=8
        K, per modality; ``auto``: chosen for each, see `choose.choose`.
    cluster_on : {"users", "items", "interactions"}, default="users"
        Rows that are clustered: the users' interaction-weighted means, the items' features, or users by what they did,
        one clustering for all modalities.
    weighting : {"mean", "sym"}, default="mean"
        Local part: ``D_U^-1 R F`` or ``D_U^-1/2 R D_I^-1/2 F``.
    dim : int, optional
        Width that the features are projected to (PCA), at most D.
    whiten : bool, default=False
        Unit variance per projected component.
    scale : {"none", "items"}, default="none"
        ``items``: the mean row norm of the users is made that of the items.
    dtype : {"float32", "float16"}, default="float32"
        Of the user vectors.
    backend : {"auto", "cpu", "cuda"}, default="auto"
        ``auto``: CUDA where a device and its libraries are.
    seed : int, default=0
        Of the k-means++ seeding.
    restarts : int, default=1
        Starts of K-means on its sample, of which the best goes on.
    tolerance : float, default=1e-3
        A pass of K-means over all rows that lowers the inertia by less than this share of it is the last; 0: passes go
        on until no label changes.
    kmeans : {"auto", "own", "cuml"}, default="auto"
        Whose K-means finds the centroids that those passes start from; ``cuml`` needs CUDA, ``auto`` takes the cheaper.
    cluster_rank : int, optional
        Of ``cluster_on="interactions"``: dimensions that users are placed in; None: 64.

    Returns
    -------
    Result
        Modality name to `ModalityResult`; arrays lie on the backend's device.

    Raises
    ------
    InputError
        A ValueError that says which array or setting is wrong and what is wanted.
    ResourceError
        Not enough memory on the device, or it failed.
    """
    settings = Settings(
        lam=lam,
        tau=tau,
        temperature=temperature,
        clusters=clusters,
        cluster_on=cluster_on,
        weighting=weighting,
        dim=dim,
        whiten=whiten,
        scale=scale,
        dtype=dtype,
        seed=seed,
        restarts=restarts,
        tolerance=tolerance,
        kmeans=kmeans,
        cluster_rank=cluster_rank,
    )
    if not isinstance(features, Mapping) or not features:
        raise InputError("features: a mapping of modality names to arrays is wanted, with one modality or more.")
    device = select(backend)
    with device.explained():
        return _initialize(device, interactions, features, settings)


def _initialize(device: Backend, interactions: Any, features: Mapping[str, Any], settings: Settings) -> Result:
    matrix = from_matrix(device, interactions, "interactions")
    exact = settings.dim is not None
    sources = {name: feature_arrays.from_array(device, name, array, exact=exact) for name, array in features.items()}
    widths = [settings.dim or modality.values.shape[1] for modality in sources.values()]
    sizes = (matrix.users, matrix.items, matrix.pairs)
    device = for_work(device, fitting_seconds(*sizes, widths, settings.clusters, settings.cluster_on == "interactions"))
    for name, modality in sources.items():
        if len(modality.values) != matrix.items:
            raise InputError(
                f"modality {name}: {len(modality.values)} rows, but the interactions have {matrix.items} items."
            )
    operators = {}
    for name, modality in sources.items():
        operators[name] = weighting(device, matrix, modality.present, settings.weighting)
        check_clusters(name, modality.n_present, operators[name], settings)
    shared = None
    if settings.cluster_on == "interactions":
        shared = behaviour(device, matrix, embed(device, matrix, settings), settings)
    return Result(
        {
            name: _initialize_one(device, matrix, modality, operators[name], settings, shared)
            for name, modality in sources.items()
        }
    )


def _initialize_one(
    backend: Backend,
    interactions: Interactions,
    modality: Modality,
    operator: Weighting,
    settings: Settings,
    shared: Behaviour | None,
) -> ModalityResult:
    if settings.dim is not None:
        projection = feature_arrays.fit_projection(backend, modality, settings.dim, settings.whiten)
        modality = feature_arrays.project(backend, modality, projection)
    width = modality.values.shape[1]
    step = block_rows(width, 4 * ARRAY_BLOCK_BYTES)
    labels = cluster_arrays(backend, interactions, modality, operator, settings, shared)
    plan = fit(backend, interactions, modality, operator, settings, labels, None, step)
    users = backend.empty((interactions.users, width), settings.dtype)
    for _ in blocks(backend, interactions, plan, step, settings.dtype, users.__getitem__):
        pass
    projected = settings.dim is not None
    return ModalityResult(
        users,
        *labels,
        modality.values if projected else None,
        modality.present if projected else None,
        plan.scale,
    )
