"""The whole run on one page: read, fit, write.

Inputs are checked before any work; each modality is then fitted and its users written block by block through
one fused kernel call each. What is done is recorded in the staging folder, and a resumed run skips it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from gpu_init.artifact.format import INTERACTIONS
from gpu_init.artifact.objects import open_staging
from gpu_init.artifact.staging import Staging
from gpu_init.backend.interface import Backend
from gpu_init.backend.select import select
from gpu_init.budget import _block_rows, _left
from gpu_init.config import JobConfig, Settings
from gpu_init.inputs.read import Data, check_inputs, check_places, inputs_of, read_inputs
from gpu_init.kernels.threads import leaving_a_core
from gpu_init.manifest import (
    Counts,
    _sizes,
    backend_facts,
    cluster_sizes,
    embedding_facts,
    identity_of,
    kmeans_facts,
    manifest_of,
    modality_facts,
    save_ids,
    timings_of,
)
from gpu_init.method import blend, spectral
from gpu_init.method import clusters as method_clusters
from gpu_init.method import projection as method_projection
from gpu_init.method.blend import Blend
from gpu_init.method.describe import describe
from gpu_init.method.modality import Modality
from gpu_init.method.norms import norms
from gpu_init.show.progress import Progress


def run(config: JobConfig, progress: Progress) -> str:
    """Run a job and give the path of its artifact.

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
        return _run(config, backend, progress)


def _run(config: JobConfig, backend: Backend, progress: Progress) -> str:
    started = datetime.now(UTC)
    progress.say(f"backend {backend.name}: {backend.why}")
    with progress.step("fingerprint inputs"):
        inputs = inputs_of(config)
    check_inputs(config, inputs.files)
    identity = identity_of(config, inputs.files, backend.name)
    with open_staging(config.out, resume=config.resume, overwrite=config.overwrite, identity=identity) as staging:
        if not has_work(config, staging, progress):
            return config.out
        data = read_inputs(config, backend, progress, staging)
        backend = data.backend
        projected = {}
        shared = None
        if config.settings.cluster_on == "interactions":
            shared = _behaviour(config, backend, data, staging, progress)
        if config.settings.dim is not None:  # all of them first: one that cannot be projected ends the job
            projected = {name: _project(config, backend, data, name, staging, progress) for name in data.sources}
        statistics = {
            name: _run_modality(
                config, backend, data, projected.get(name) or data.modality(backend, name), shared, staging, progress
            )
            for name in data.sources
        }
        save_ids(staging, data.table.user_ids, data.table.item_ids)
        inputs.require_unchanged()
        facts = backend_facts(backend, data.table.kernels)
        manifest = manifest_of(config, inputs.files, facts, Counts.of(data.table), statistics)
        if shared is not None:
            manifest["interactions"]["embedding"] = embedding_facts(staging)
        return staging.commit({**manifest, "timings": timings_of(started, progress, backend)})


def has_work(config: JobConfig, staging: Staging, progress: Progress) -> bool:
    """Say how a run begins; False where what it would make is there."""
    if staging.complete:
        progress.say(f"{config.out} is already there, made from the same inputs and settings")
    elif staging.resumed:
        progress.say(f"going on with the unfinished run in {staging.path}")
    if staging.discarded:
        progress.say("an unfinished run was discarded; --resume would have gone on with it")
    return not staging.complete


# Fit and write.


def _run_modality(
    config: JobConfig,
    backend: Backend,
    data: Data,
    modality: Modality,
    shared: Shared | None,
    staging: Staging,
    progress: Progress,
) -> dict[str, Any]:
    """Cluster, and write every user's row; returns the modality's part of the manifest."""
    settings, name = config.settings, modality.name
    operator, matrix = data.operators[name], data.table.interactions
    step_rows = _block_rows(config, matrix.users, modality.values.shape[1])
    facts, labels = _cluster(config, backend, data, modality, shared, staging, progress)
    plan = method_clusters.fit(backend, matrix, modality, operator, settings, labels, facts.get("scale"), step_rows)
    staging.finish(f"{name}/fit", {**facts, "scale": plan.scale})
    _save_for_assign(backend, plan, settings, staging)
    width_before = data.sources[name].table.values.shape[1]
    return _write(config, backend, data, plan, labels, {**facts, "source_width": width_before}, staging, progress)


def _save_for_assign(backend: Backend, plan: Blend, settings: Settings, staging: Staging) -> None:
    """What `assign` needs besides centroids, labels and items."""
    staging.save(f"{plan.modality.name}/cold.npy", backend.to_host(plan.cold))
    if settings.weighting == "sym":
        staging.save(f"{plan.modality.name}/item_factors.npy", backend.to_host(plan.weighting.local_items))


def _write(
    config: JobConfig,
    backend: Backend,
    data: Data,
    plan: Blend,
    labels: tuple[Any, Any, Any],
    facts: dict[str, Any],
    staging: Staging,
    progress: Progress,
) -> dict[str, Any]:
    """Write every user's row; returns the modality's part of the manifest."""
    modality, matrix, settings = plan.modality, data.table.interactions, config.settings
    name, width = modality.name, modality.values.shape[1]
    step_rows = _block_rows(config, matrix.users, width)
    users = f"{name}/users.npy"
    with progress.step(f"write {name}", total=matrix.users, unit="user") as step:
        writer = staging.rows(users, (matrix.users, width), np.dtype(settings.dtype))

        def write(block: Any) -> None:
            writer.write(block)
            step.advance(len(block))

        outbox = backend.outbox(min(step_rows, matrix.users), width, settings.dtype, write)
        with writer, outbox, leaving_a_core():
            step.advance(writer.done)

            def blocks() -> Iterator[Any]:
                made = blend.blocks(
                    backend, matrix, plan, step_rows, settings.dtype, lambda part: outbox.space(part.stop - part.start)
                )
                for part, block in made:
                    yield block  # for its norms; what an earlier run wrote is made again for them alone
                    left = max(writer.done - part.start, 0)
                    if left < len(block):
                        outbox.send(block[left:])

            user_norms = norms(backend, blocks())
    with progress.step(f"sample {name}"):
        for part, array in describe(backend, matrix, plan, settings.seed).items():
            staging.save(f"{name}/{part}.npy", array)
    clusters = len(labels[0])
    sizes = cluster_sizes(backend.to_host(labels[1]), clusters)
    item_sizes = None if labels[2] is None else cluster_sizes(backend.to_host(labels[2]), clusters)
    lam = settings.lam if plan.policy is None else plan.policy
    return modality_facts(
        backend, modality, labels[0], matrix.users, sizes, item_sizes, facts, user_norms, plan.scale, lam
    )


def _project(
    config: JobConfig, backend: Backend, data: Data, name: str, staging: Staging, progress: Progress
) -> Modality:
    """Projected items, worked out or taken from the run that is resumed; an output too."""
    assert config.settings.dim is not None
    items, mask = f"{name}/items.npy", f"{name}/items_mask.npy"
    if staging.finished(items) is None:
        with progress.step(f"project {name}") as step:
            modality = data.modality(backend, name, exact=True)
            projection = method_projection.fit_projection(
                backend, modality, config.settings.dim, config.settings.whiten
            )
            values = backend.to_host(method_projection.project(backend, modality, projection).values)
            step.note(width=config.settings.dim)
        staging.save(items, values)
        staging.save(mask, data.sources[name].mask)
        staging.finish(items, {})
    present = data.sources[name].mask
    return Modality(name, backend.asarray(staging.load(items)), backend.asarray(present), int(present.sum()))


def _cluster(
    config: JobConfig,
    backend: Backend,
    data: Data,
    modality: Modality,
    shared: Shared | None,
    staging: Staging,
    progress: Progress,
) -> tuple[dict[str, Any], tuple[Any, Any, Any]]:
    """Centroids, user labels and item labels, found or taken from the run that is resumed."""
    name, on_items = modality.name, config.settings.cluster_on == "items"
    paths = [f"{name}/centroids.npy", f"{name}/labels.npy", *([f"{name}/item_labels.npy"] if on_items else [])]
    facts = staging.finished(f"{name}/fit") or staging.finished(f"{name}/clusters")
    if facts is not None:
        arrays = [backend.asarray(staging.load(path)) for path in paths]
        return facts, (arrays[0], arrays[1], arrays[2] if on_items else None)
    operator, matrix = data.operators[name], data.table.interactions
    memory = _left(config, matrix.users)
    if shared is not None:
        k, facts = shared.clusters, shared.facts
        labels = (*method_clusters.of_behaviour(backend, matrix, modality, operator, shared.labels, k, memory), None)
    else:
        with progress.step(f"cluster {name}") as step:
            found = method_clusters.clusters(backend, matrix, modality, operator, config.settings, memory)
            step.note(clusters=len(found.centroids), passes=len(found.found.inertia))
        labels = (found.centroids, found.user_labels, found.item_labels)
        what, tolerance = f"modality {name}", config.settings.tolerance
        sizes = _sizes(backend, found.found)
        facts = kmeans_facts(found.found, found.choice, sizes, what, tolerance, progress)
    for path, array in zip(paths, labels, strict=False):
        staging.save(path, backend.to_host(array))
    staging.finish(f"{name}/clusters", facts)
    return facts, labels


@dataclass(frozen=True)
class Shared:
    """Clusters of all modalities alike: label of each user (U,), how many clusters, what the manifest says of them."""

    labels: Any
    clusters: int
    facts: dict[str, Any]


def _behaviour(config: JobConfig, backend: Backend, data: Data, staging: Staging, progress: Progress) -> Shared:
    """Users clustered by what they did, found or taken from the run that is resumed; an output too."""
    matrix = data.table.interactions
    labels, centroids = f"{INTERACTIONS}/labels.npy", f"{INTERACTIONS}/centroids.npy"
    facts = staging.finished(INTERACTIONS)
    if facts is None:
        embedding = _embedding(config, backend, data, staging, progress)
        with progress.step("cluster interactions") as step:
            found = method_clusters.behaviour(backend, matrix, embedding, config.settings, _left(config, matrix.users))
            step.note(clusters=len(found.centroids), passes=len(found.found.inertia))
        staging.save(centroids, backend.to_host(found.centroids))
        staging.save(labels, backend.to_host(found.labels))
        sizes, tolerance = _sizes(backend, found.found), config.settings.tolerance
        facts = kmeans_facts(found.found, found.choice, sizes, "interactions", tolerance, progress)
        staging.finish(INTERACTIONS, facts)
    return Shared(backend.asarray(staging.load(labels)), len(staging.load(centroids)), facts)


def _embedding(
    config: JobConfig, backend: Backend, data: Data, staging: Staging, progress: Progress
) -> spectral.Embedding:
    """What places users by their interactions, found or taken from the run that is resumed; an output too."""
    paths = [f"{INTERACTIONS}/{part}.npy" for part in ("items", "item_factors", "singular_values")]
    facts = staging.finished(paths[0])
    if facts is None:
        with progress.step("embed interactions") as step:
            found = method_clusters.embed(backend, data.table.interactions, config.settings)
            facts = {"products": found.products, "settled": found.settled}
            step.note(rank=len(found.singular_values), **facts)
        for path, array in zip(paths, (found.items, found.item_factors, found.singular_values), strict=True):
            staging.save(path, backend.to_host(array))
        staging.finish(paths[0], facts)
    items, item_factors, values = (staging.load(path) for path in paths)
    return spectral.Embedding(backend.asarray(items), backend.asarray(item_factors), np.asarray(values), **facts)
