"""The Python call: initial user vectors from arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from gpu_init.backend.interface import Backend
from gpu_init.backend.select import for_work, select
from gpu_init.errors import InputError
from gpu_init.kernels.costs import fitting_seconds
from gpu_init.method.matrix import Interactions, from_matrix
from gpu_init.method.modality import Modality, from_array
from gpu_init.method.projection import fit_projection, project
from gpu_init.parts import LocalParts, Plan, Process, part_bounds
from gpu_init.run import Job, vectors
from gpu_init.settings import Settings
from gpu_init.show.progress import Progress

ARRAY_BLOCK_BYTES = 256 << 20  # Memory for the blocks of vectors, a quarter of which is one block.


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
    modalities = {name: from_array(device, name, array, exact=exact) for name, array in features.items()}
    widths = [settings.dim or modality.values.shape[1] for modality in modalities.values()]
    seconds = fitting_seconds(
        *(matrix.users, matrix.items, matrix.pairs),
        widths,
        settings.clusters,
        settings.cluster_on == "interactions",
    )
    device = for_work(device, seconds)
    for name, modality in modalities.items():
        if len(modality.values) != matrix.items:
            raise InputError(
                f"modality {name}: {len(modality.values)} rows, but the interactions have {matrix.items} items."
            )
    if settings.dim is not None:
        for name, modality in modalities.items():
            found = fit_projection(device, modality, settings.dim, settings.whiten)
            modalities[name] = project(device, modality, found)
    arrays = Memory(device)
    facts = vectors(job_on_arrays(device, matrix, modalities, settings, arrays))
    return Result({name: _result(arrays, name, modalities[name], facts[name], settings) for name in modalities})


def _result(arrays: Memory, name: str, modality: Modality, facts: dict[str, Any], settings: Settings) -> ModalityResult:
    projected = settings.dim is not None
    return ModalityResult(
        arrays.load(f"{name}/users.npy"),
        arrays.load(f"{name}/centroids.npy"),
        arrays.load(f"{name}/labels.npy"),
        arrays.load(f"{name}/item_labels.npy") if settings.cluster_on == "items" else None,
        modality.values if projected else None,
        modality.present if projected else None,
        facts["scale"],
    )


def job_on_arrays(
    backend: Backend, interactions: Interactions, modalities: Mapping[str, Modality], settings: Settings, arrays: Memory
) -> Job:
    """Give the page's job on arrays in this process; ``modalities`` are projected already."""
    bounds = part_bounds(interactions.users, interactions.pairs)
    plan = Plan(settings, bounds, interactions.items, interactions.pairs, ARRAY_BLOCK_BYTES)
    parts = LocalParts(Process(backend, plan, arrays, _Arrays(plan, interactions, modalities)))
    masks = {name: backend.to_host(modality.present) for name, modality in modalities.items()}
    widths = {name: modality.values.shape[1] for name, modality in modalities.items()}
    return Job(settings, parts, arrays, Progress(None), masks, widths, None, ExitStack(), described=False)


@dataclass(frozen=True)
class _Arrays:
    """R and features that lie in memory, as the source of a `Process`."""

    plan: Plan
    interactions: Interactions
    modalities: Mapping[str, Modality]

    def part(self, number: int) -> Interactions:
        return self.interactions.rows(*self.plan.bounds[number : number + 2])

    def modality(self, name: str) -> Modality:
        return self.modalities[name]

    def present(self, name: str) -> Any:
        return self.modalities[name].present


class Memory:
    """The arrays of a run in memory, on the device: a `Store` for the page, and the `Arrays` of its tasks."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._arrays: dict[str, Any] = {}
        self._finished: dict[str, dict[str, Any]] = {}

    def copy(self) -> Memory:
        """Give another one with the same arrays and notes, to which more can be added."""
        other = Memory(self._backend)
        other._arrays, other._finished = dict(self._arrays), dict(self._finished)
        return other

    def finished(self, key: str) -> dict[str, Any] | None:
        return self._finished.get(key)

    def finish(self, key: str, facts: dict[str, Any]) -> None:
        self._finished[key] = facts

    def save(self, relpath: str, array: Any) -> None:
        self._arrays[relpath] = self._backend.asarray(array)

    def load(self, relpath: str) -> Any:
        return self._arrays[relpath]

    def allocate(self, relpath: str, shape: tuple[int, ...], dtype: Any, key: str | None = None) -> bool:  # noqa: ARG002
        self._arrays[relpath] = self._backend.empty(shape, dtype)
        return False

    @contextmanager
    def adopting(self, relpath: str) -> Iterator[Callable[[int], object]]:  # noqa: ARG002
        yield int

    @contextmanager
    def write_rows(self, path: str, first: int) -> Iterator[Callable[[Any], None]]:
        array, place = self._arrays[path], first

        def write(rows: Any) -> None:
            nonlocal place
            array[place : place + len(rows)] = self._backend.asarray(rows)
            place += len(rows)

        yield write

    @contextmanager
    def outbox(
        self,
        backend: Backend,  # noqa: ARG002
        path: str,
        first: int,
        rows: int,  # noqa: ARG002
        width: int,  # noqa: ARG002
        dtype: str,  # noqa: ARG002
    ) -> Iterator[Any]:
        yield _InPlace(self._arrays[path][first:])


class _InPlace:
    """An `Outbox` whose blocks are computed where they belong."""

    def __init__(self, rows: Any) -> None:
        self._rows, self._done = rows, 0

    def space(self, rows: int) -> Any:
        return self._rows[self._done : self._done + rows]

    def send(self, block: Any) -> None:
        self._done += len(block)
