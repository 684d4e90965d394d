"""The page: read, cluster, blend, write.

`run` is a job from files to files in this process; `gpu_init.cluster` runs the same page over a Dask cluster, and
`gpu_init.api` on arrays. The page needs a `Site`, which reads the inputs and opens the users in parts, and a `Store`,
which keeps what is made. `vectors` is the method, sentence by sentence; what it does to each part of the users are the
functions of `gpu_init.tasks`. A step that is finished is noted in the store, and a resumed run skips it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Protocol

import numpy as np

from gpu_init import tasks
from gpu_init.artifact.format import INTERACTIONS
from gpu_init.artifact.objects import open_staging
from gpu_init.artifact.staging import Staging
from gpu_init.backend.select import select
from gpu_init.budget import kmeans_bytes
from gpu_init.config import JobConfig
from gpu_init.inputs.read import (
    check_inputs,
    check_places,
    inputs_of,
    item_axis_of,
    read_features,
)
from gpu_init.kernels.csr import Csr
from gpu_init.manifest import (
    cluster_sizes,
    embedding_facts,
    identity_of,
    kmeans_facts,
    manifest_of,
    modality_facts,
    save_ids,
    timings_of,
)
from gpu_init.method import clusters, kmeans, lambdas, projection, spectral
from gpu_init.method.blend import Blend
from gpu_init.method.choose import Choice
from gpu_init.method.describe import describe
from gpu_init.method.matrix import Interactions, power
from gpu_init.method.modality import Modality
from gpu_init.method.norms import NormSums, item_norms, norm_statistics
from gpu_init.method.points import kmeans_form, mean_item
from gpu_init.method.weighting import Weighting
from gpu_init.parts import Parts
from gpu_init.settings import POLICIES, Settings
from gpu_init.show.progress import Progress
from gpu_init.site import Data, LocalSite, Site
from gpu_init.tasks import LABELS, SHARED, Fitted, PartedGraph, PartedPoints, Rows


class Store(Protocol):
    """Where a run keeps its arrays, and notes what is finished: a staging folder, or memory."""

    def finished(self, key: str) -> dict[str, Any] | None:
        """Return the facts of a step that is finished, else None."""

    def finish(self, key: str, facts: dict[str, Any]) -> None:
        """Note that a step is finished."""

    def save(self, relpath: str, array: Any) -> None:
        """Keep an array that lies on the host."""

    def load(self, relpath: str) -> Any:
        """Return an array that was saved or filled."""

    def allocate(self, relpath: str, shape: tuple[int, ...], dtype: Any, key: str | None = None) -> bool:
        """Make room for an array that the tasks fill; True where an earlier run has begun to fill it.

        Where it is made anew, what is noted under ``key`` is forgotten.
        """

    def adopting(self, relpath: str) -> AbstractContextManager[Callable[[int], object]]:
        """Note such an array as finished in the end; the function is told how many of its first rows are there."""


@dataclass(frozen=True)
class Job:
    """What the page works on.

    Attributes
    ----------
    settings : Settings
    parts : Parts
        The users, in parts.
    store : Store
    progress : Progress
    masks : dict of str to array, shape (I,), bool
        Which items have each modality, on the host.
    memory : int or None
        Bytes that K-means may take; None: no limit was given.
    adopted : ExitStack
        Leaving it waits for the arrays that are still being hashed.
    described : bool, default=True
        Whether the manifest's statistics and the report's samples are wanted.
    """

    settings: Settings
    parts: Parts
    store: Store
    progress: Progress
    masks: Mapping[str, Any]
    source_widths: Mapping[str, int]
    memory: int | None
    adopted: ExitStack
    described: bool = True


# The method.


def vectors(job: Job, given: Mapping[str, tuple[Fitted, dict[str, Any]]] | None = None) -> dict[str, dict[str, Any]]:
    """Make the initial vectors of all users in all modalities; returns each modality's part of the manifest.

    ``given``: clusters that were found before, by modality, with what the manifest says of them.

    Raises
    ------
    InputError
        There are too few users or items for the clusters; or a value does not fit float16.
    """
    weigh(job)
    warm = {name: job.parts.map(tasks.warm, name) for name in job.masks}
    if given is None:
        for name, counts in warm.items():
            clusters.check_warm(name, int(job.masks[name].sum()), sum(counts), job.settings)
        if job.settings.cluster_on == "interactions":
            cluster_interactions(job)
    made = {name: _modality(job, name, warm[name], (given or {}).get(name)) for name in job.masks}
    with job.progress.step("hash vectors"):
        job.adopted.close()
    return made


def weigh(job: Job) -> None:
    """Symmetric weighting divides by the roots of the items' degrees, which are sums over all users."""
    paths = {name: f"{name}/item_factors.npy" for name in job.masks}
    if job.settings.weighting == "sym" and not all(job.store.finished(path) is not None for path in paths.values()):
        factors = power(np, job.parts.total(tasks.item_sums), -0.5)
        for name, mask in job.masks.items():
            job.store.save(paths[name], mask * factors)
            job.store.finish(paths[name], {})


def _modality(job: Job, name: str, warm: list[int], given: tuple[Fitted, dict[str, Any]] | None) -> dict[str, Any]:
    """Cluster, blend and write one modality; ``warm``: warm users of each part."""
    modality = job.parts.modality(name)
    fitted, facts = given or cluster(job, modality, warm)
    facts = {"source_width": job.source_widths[name], **facts}
    fitted, sizes = label(job, fitted, sum(warm))
    fitted, lam = weigh_local_part(job, modality, fitted)
    fitted = fitted if given else rescale(job, modality, fitted)
    user_norms = write(job, fitted)
    if not job.described:
        return {"scale": fitted.scale}
    sample(job, modality, fitted, warm)
    backend = job.parts.backend
    return modality_facts(backend, modality, fitted, job.parts.plan.users, sizes, facts, user_norms, lam)


def cluster(job: Job, modality: Modality, warm: list[int]) -> tuple[Fitted, dict[str, Any]]:
    """Find the centroids, and the labels of the items where these are clustered."""
    name, settings, store, backend = modality.name, job.settings, job.store, job.parts.backend
    facts = store.finished(f"{name}/clusters")
    if facts is None:
        item_labels = None
        if settings.cluster_on == "interactions":
            facts = store.finished(INTERACTIONS) or {}
            centroids = _shared_centroids(job, modality, sum(warm))
        else:
            with job.progress.step(f"cluster {name}") as step:
                if settings.cluster_on == "users":
                    found, choice, sizes = _kmeans(job, _means_of(job, modality), warm)
                else:
                    found, choice, item_labels = clusters.cluster_items(backend, modality, settings)
                    item_labels = backend.to_host(item_labels)
                    sizes = cluster_sizes(item_labels, len(found.centroids))
                step.note(clusters=len(found.centroids), passes=len(found.inertia))
            facts = kmeans_facts(found, choice, sizes, f"modality {name}", settings.tolerance, job.progress)
            centroids = backend.to_host(found.centroids)
        store.save(f"{name}/centroids.npy", centroids)
        if item_labels is not None:
            store.save(f"{name}/item_labels.npy", item_labels)
        store.finish(f"{name}/clusters", facts)
    item_labels = np.array(store.load(f"{name}/item_labels.npy")) if settings.cluster_on == "items" else None
    form = {"users": facts["kmeans"]["form"], "items": "factored"}.get(settings.cluster_on, SHARED)
    return Fitted(name, form, np.array(store.load(f"{name}/centroids.npy")), item_labels), facts


def _kmeans(job: Job, rows: Rows, counts: list[int]) -> tuple[kmeans.Clusters, Choice | None, list[int]]:
    """K-means on rows of which the parts have so many; how K was chosen; how many rows have each label."""
    settings, backend, total = job.settings, job.parts.backend, sum(counts)
    tiled = PartedPoints(job.parts, rows, counts)
    count, choice = clusters.number_of_clusters(backend, tiled, settings)
    if rows.name == INTERACTIONS:
        clusters.check_placed(total, count)
    library = backend.takes_matrix(total, len(rows.offset), count, settings.kmeans)
    form = "dense" if library else _form(job, rows, total, count)
    start = None
    if library:  # All parts are in this process then, and their rows stay on the device.
        whole, done = backend.empty((total, len(rows.offset)), backend.kmeans_dtype), 0
        for (_, own), size in zip(job.parts.each(tasks.dense_rows, set(), rows), counts, strict=True):
            whole[done : done + size] = own
            done += size
        start = backend.kmeans(whole, count, settings.seed, settings.restarts)
        del whole
    points = PartedPoints(job.parts, replace(rows, form=form), counts)
    found = kmeans.fit(backend, points, count, settings.seed, settings.restarts, settings.tolerance, start)
    return found, choice, [int(size) for size in points.counts]


def _means_of(job: Job, modality: Modality) -> Rows:
    """The users' means in a modality, about the mean of the items."""
    backend = job.parts.backend
    offset = backend.to_host(mean_item(backend, modality.values, modality.present))
    return Rows(modality.name, "tiled", offset)


def _form(job: Job, rows: Rows, total: int, count: int) -> str:
    plan = job.parts.plan
    return kmeans_form(total, plan.items, plan.pairs, count, len(rows.offset), job.memory)


def embed_interactions(job: Job) -> None:
    """Find the directions that place users by what they did; they are an output."""
    settings, store, backend = job.settings, job.store, job.parts.backend
    paths = [f"{INTERACTIONS}/{name}.npy" for name in ("items", "item_factors", "singular_values")]
    if store.finished(paths[0]) is None:
        with job.progress.step("embed interactions") as step:
            rank = settings.cluster_rank or spectral.RANK
            found = spectral.fit(backend, PartedGraph(job.parts), rank, settings.seed)
            facts = {"products": found.products, "settled": found.settled}
            step.note(rank=len(found.singular_values), **facts)
        for path, array in zip(paths, (found.items, found.item_factors, found.singular_values), strict=True):
            store.save(path, backend.to_host(array))
        store.finish(paths[0], facts)


def cluster_interactions(job: Job) -> None:
    """Cluster the users on what they did, for all modalities; centroids and labels are outputs."""
    settings, store, parts = job.settings, job.store, job.parts
    embed_interactions(job)
    if store.finished(INTERACTIONS) is None:
        counts = parts.map(tasks.placed)
        with job.progress.step("cluster interactions") as step:
            offset = np.zeros(store.load(f"{INTERACTIONS}/items.npy").shape[1])
            clustered, choice, sizes = _kmeans(job, Rows(INTERACTIONS, "tiled", offset), counts)
            step.note(clusters=len(clustered.centroids), passes=len(clustered.inertia))
        centroids = parts.backend.to_host(clustered.centroids)
        store.save(f"{INTERACTIONS}/centroids.npy", centroids)
        label_interactions(job, centroids)
        facts = kmeans_facts(clustered, choice, sizes, "interactions", settings.tolerance, job.progress)
        store.finish(INTERACTIONS, facts)


def label_interactions(job: Job, centroids: Any) -> None:
    """Give each user the nearest of the centroids that were found on the interactions."""
    job.store.allocate(LABELS, (job.parts.plan.users,), np.int32)
    with job.store.adopting(LABELS):
        job.parts.map(tasks.label_interactions, centroids)


def _shared_centroids(job: Job, modality: Modality, warm: int) -> Any:
    """Centroids in one modality, of the clusters that all modalities have."""
    count, rows = len(job.store.load(f"{INTERACTIONS}/centroids.npy")), _means_of(job, modality)
    rows = replace(rows, form=_form(job, rows, warm, count))
    sums, counts = job.parts.total(tasks.sums_of_labels, rows, count)
    return clusters.behaviour_means(sums, counts, rows.offset)


def label(job: Job, fitted: Fitted, warm: int) -> tuple[Fitted, list[int]]:
    """Label each user by the nearest centroid; cold users get the mean of the cluster-level part over the warm ones.

    Returns
    -------
    fitted : Fitted
        With the vector of cold users, unless it was given.
    sizes : list of int
        Users of each label.
    """
    name, store = fitted.name, job.store
    facts = store.finished(f"{name}/labels")
    if facts is None:
        with job.progress.step(f"label {name}"):
            store.allocate(f"{name}/labels.npy", (job.parts.plan.users,), np.int32)
            with store.adopting(f"{name}/labels.npy"):
                counts, shares = job.parts.total(tasks.label, fitted)
        facts = {"sizes": counts.tolist(), "shares": shares.tolist()}
        store.finish(f"{name}/labels", facts)
    if fitted.cold is None:
        cold = clusters.mean_global(job.parts.backend, np.array(facts["shares"]), warm, fitted.centroids)
        fitted = replace(fitted, cold=cold)
    store.save(f"{name}/cold.npy", fitted.cold)
    return fitted, facts["sizes"]


def weigh_local_part(job: Job, modality: Modality, fitted: Fitted) -> tuple[Fitted, Any]:
    """Choose lambda: a number, or of each user by a policy.

    Returns
    -------
    fitted : Fitted
        With the policy's tau.
    lam : float or dict
        What the manifest says of lambda.
    """
    settings, store, key = job.settings, job.store, f"{modality.name}/lambda"
    if settings.lam not in POLICIES:
        return fitted, settings.lam
    facts = store.finished(key)
    if facts is None:
        with job.progress.step(f"weigh {modality.name}"):
            facts = {"temperature": lambdas.TEMPERATURE if settings.temperature is None else settings.temperature}
            if settings.lam == "shrink":
                tau = settings.tau if fitted.tau is None else fitted.tau
                facts = {"tau": tau} if tau is not None else find_tau(job, modality)
            found = job.parts.map(tasks.policy, replace(fitted, tau=facts.get("tau")))
            values, counts = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        facts = {"policy": settings.lam, **facts, **lambdas.lambda_statistics(values, counts)}
        store.finish(key, facts)
    return replace(fitted, tau=facts.get("tau")), facts


def find_tau(job: Job, modality: Modality) -> dict[str, Any]:
    """Tau of the policy "shrink", and what it was found from; see `lambdas.tau_of`."""
    parts, name = job.parts, modality.name
    volumes = lambdas.Volumes(*parts.total(tasks.volumes, name))
    centre = lambdas.tau_centre(parts.backend, modality, volumes)
    centre = lambdas.Centre(*map(parts.backend.to_host, centre))
    sums = parts.total(tasks.variances, name, centre)
    return lambdas.tau_of(volumes, centre, sums, lambda: np.concatenate(parts.map(tasks.warm_counts, name)))


def rescale(job: Job, modality: Modality, fitted: Fitted) -> Fitted:
    """With ``scale = "items"``, make the mean norm of the users' vectors that of the items.

    Cold users count, items without the modality do not. The factor is 1 where either norm is 0.
    """
    if job.settings.scale != "items":
        return fitted
    facts = job.store.finished(f"{modality.name}/scale")
    if facts is None:
        with job.progress.step(f"measure {modality.name}"):
            users = norm_statistics(job.parts.map(tasks.measure, fitted))["mean"]
        items = item_norms(job.parts.backend, modality)["mean"]
        facts = {"scale": items / users if items > 0 and users > 0 else 1.0}
        job.store.finish(f"{modality.name}/scale", facts)
    return replace(fitted, scale=float(facts["scale"]))


def write(job: Job, fitted: Fitted) -> dict[str, float]:
    """Write the vectors of all users, part by part, but for the parts that an earlier run wrote; gives their norms."""
    plan, store, path = job.parts.plan, job.store, f"{fitted.name}/users.npy"
    key, bounds, width = f"{fitted.name}/written", plan.bounds, fitted.centroids.shape[1]
    store.allocate(path, (plan.users, width), np.dtype(job.settings.dtype), key)
    done = {int(number): NormSums(*sums) for number, sums in (store.finished(key) or {}).items()}
    job.adopted.close()  # The vectors of the modality before are hashed by now, or soon.
    hashed = job.adopted.enter_context(store.adopting(path))
    with job.progress.step(f"write {fitted.name}", total=plan.users, unit="user") as step:
        step.advance(sum(bounds[number + 1] - bounds[number] for number in done))
        for number, sums in job.parts.each(tasks.write, set(done), fitted, job.described):
            done[number] = sums
            store.finish(key, {str(one): list(found) for one, found in done.items()})
            step.advance(bounds[number + 1] - bounds[number])
            hashed(next((bounds[one] for one in range(plan.parts) if one not in done), plan.users))
    return norm_statistics([done[number] for number in range(plan.parts)])


def sample(job: Job, modality: Modality, fitted: Fitted, warm: list[int]) -> None:
    """Save what `gpu-init report` draws: some users and items, and the items that the centroids stand for."""
    backend, parts, name = job.parts.backend, job.parts, fitted.name

    def some(numbers: Any) -> tuple[Interactions, Blend]:
        return _some_users(job, modality, fitted, warm, backend.to_host(numbers))

    with job.progress.step(f"sample {name}"):
        centroids = parts.backend.asarray(fitted.centroids)
        arrays = describe(backend, modality, centroids, sum(warm), some, job.settings.seed)
        for part, array in arrays.items():
            job.store.save(f"{name}/{part}.npy", array)


def _some_users(
    job: Job, modality: Modality, fitted: Fitted, warm: list[int], numbers: Any
) -> tuple[Interactions, Blend]:
    """Interactions and blend of some warm users, by their numbers (n,) ascending, with just the items they have."""
    backend = job.parts.backend
    own = {part: (index,) for part, index in tasks.by_part(warm, numbers)}
    found = job.parts.some(tasks.drawn, own, fitted)

    def joined(key: str) -> Any:
        arrays = [part[key] for part in found]
        return None if arrays[0] is None else backend.asarray(np.concatenate(arrays))

    weights: Any = None
    if any(part["weights"] is not None for part in found):
        parts = [
            np.ones(len(part["indices"]), np.float32) if part["weights"] is None else part["weights"] for part in found
        ]
        weights = backend.asarray(np.concatenate(parts))
    items, columns = np.unique(np.concatenate([part["indices"] for part in found]), return_inverse=True)
    indptr = np.cumsum([0, *np.concatenate([np.diff(part["indptr"]) for part in found])])
    csr = Csr(backend.asarray(indptr), backend.asarray(columns.astype(np.int32)), weights)
    mask = job.masks[fitted.name][items]
    present = backend.asarray(mask.astype(np.float64))
    factors = present
    if job.settings.weighting == "sym":
        factors = backend.asarray(job.store.load(f"{fitted.name}/item_factors.npy")[items])
    values = backend.asarray(modality.values[backend.asarray(items)])
    return Interactions(csr, len(items)), Blend(
        Modality(fitted.name, values, backend.asarray(mask), int(mask.sum())),
        Weighting(joined("local_rows"), factors, joined("mean_rows"), present),
        joined("lam") if job.settings.lam in POLICIES else job.settings.lam,
        backend.asarray(fitted.centroids),
        joined("labels"),
        None if fitted.item_labels is None else backend.asarray(fitted.item_labels[items]),
        backend.asarray(fitted.cold),
        fitted.scale,
    )


# From files to files.


def run(config: JobConfig, progress: Progress) -> str:
    """Run a job in this process and return the path of its artifact.

    Raises
    ------
    InputError
        The input or the settings are wrong; nothing is left behind.
    ResourceError
        Not enough memory or disk, or the device failed; what was done can be resumed.
    """
    check_places(config)
    backend = select(config.backend, progress.say)
    with backend.explained():
        progress.say(f"backend {backend.name}: {backend.why}")
        return run_at(LocalSite(backend), config, progress)


def run_at(site: Site, config: JobConfig, progress: Progress) -> str:
    """Run a job at a site; arguments, result and errors as of `run`."""
    started = datetime.now(UTC)
    with progress.step("fingerprint inputs"):
        inputs = inputs_of(config)
    check_inputs(config, inputs.files)
    identity = identity_of(config, inputs.files, site.backend_name)
    with open_staging(config.out, resume=config.resume, overwrite=config.overwrite, identity=identity) as staging:
        if not has_work(config, staging, progress):
            return config.out
        site.check([staging.path, *(one["path"] for one in inputs.files)])
        found = read_features(config, progress)
        data = site.read(config, found, item_axis_of(found.tables), progress, staging)
        project(config.settings, data, staging, progress)
        with ExitStack() as adopted:
            job = open_job(site, config, data, staging, progress, adopted)
            statistics = vectors(job)
        inputs.require_unchanged()
        site_facts = site.facts(data, job.parts)
        manifest = manifest_of(config, inputs.files, site_facts, data.counts, statistics)
        if config.settings.cluster_on == "interactions":
            manifest["interactions"]["embedding"] = embedding_facts(staging)
        return finish(staging, data, {**manifest, "timings": timings_of(started, progress, data.backend)})


def has_work(config: JobConfig, staging: Staging, progress: Progress) -> bool:
    """Say how a run begins; False where what it would make is there."""
    if staging.complete:
        progress.say(f"{config.out} is already there, made from the same inputs and settings")
    elif staging.resumed:
        progress.say(f"going on with the unfinished run in {staging.path}")
    if staging.discarded:
        progress.say("an unfinished run was discarded; --resume would have gone on with it")
    return not staging.complete


def open_job(
    site: Site, config: JobConfig, data: Data, staging: Staging, progress: Progress, adopted: ExitStack
) -> Job:
    """Open the users in parts, for the page."""
    memory = kmeans_bytes(config, data.counts.users)
    parts = site.parts(config, data, staging)
    widths = {name: source.table.values.shape[1] for name, source in data.sources.items()}
    return Job(config.settings, parts, staging, progress, data.masks, widths, memory, adopted)


def finish(staging: Staging, data: Data, manifest: dict[str, Any]) -> str:
    """Save the ids, and publish the artifact."""
    save_ids(staging, data.counts.user_ids, data.counts.item_ids)
    return staging.commit(manifest)


def project(settings: Settings, data: Data, staging: Staging, progress: Progress) -> None:
    """Project the items of all modalities, which are outputs too; one that cannot be projected ends the job here."""
    for name, source in data.sources.items() if settings.dim is not None else ():
        assert settings.dim is not None
        items = f"{name}/items.npy"
        if staging.finished(items) is None:
            with progress.step(f"project {name}") as step:
                modality = source.aligned(data.backend, exact=True)
                found = projection.fit_projection(data.backend, modality, settings.dim, settings.whiten)
                values = data.backend.to_host(projection.project(data.backend, modality, found).values)
                step.note(width=settings.dim)
            save_items(staging, name, values, source.mask)


def save_items(staging: Staging, name: str, values: Any, mask: Any) -> None:
    """Save a modality's projected items, and which items have it."""
    staging.save(f"{name}/items.npy", values)
    staging.save(f"{name}/items_mask.npy", mask)
    staging.finish(f"{name}/items.npy", {})
