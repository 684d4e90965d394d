"""The Python call: initial user vectors from arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gpu_init.backend.interface import Backend
from gpu_init.backend.select import for_work, select
from gpu_init.config import Settings
from gpu_init.errors import InputError
from gpu_init.kernels.costs import fitting_seconds
from gpu_init.method import modality as method_modality
from gpu_init.method import projection as method_projection
from gpu_init.method.blend import block_rows, blocks
from gpu_init.method.clusters import Behaviour, behaviour, check_clusters, cluster_arrays, embed, fit
from gpu_init.method.matrix import Interactions, from_matrix
from gpu_init.method.modality import Modality
from gpu_init.method.weighting import Weighting, weighting

ARRAY_BLOCK_BYTES = 64 << 20  # of the result, per kernel call, where nobody says how much memory there is


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
    sources = {name: method_modality.from_array(device, name, array, exact=exact) for name, array in features.items()}
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
        projection = method_projection.fit_projection(backend, modality, settings.dim, settings.whiten)
        modality = method_projection.project(backend, modality, projection)
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
