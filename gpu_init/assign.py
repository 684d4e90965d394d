"""Vectors for new users or new interactions, with the clusters of an artifact: the same page, nothing is clustered."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Any

import numpy as np

from gpu_init.artifact.format import INTERACTIONS
from gpu_init.artifact.objects import open_staging
from gpu_init.artifact.read import Artifact
from gpu_init.artifact.staging import Staging
from gpu_init.backend.select import select
from gpu_init.config import JobConfig
from gpu_init.errors import InputError
from gpu_init.files.storage import real_path
from gpu_init.inputs.axes import ItemAxis, positions
from gpu_init.inputs.features import FeatureTable
from gpu_init.inputs.read import Features, check_inputs, check_places, inputs_of, item_axis_of, read_features
from gpu_init.manifest import identity_of, manifest_of, timings_of
from gpu_init.run import Job, finish, label_interactions, open_job, save_items, vectors
from gpu_init.show.progress import Progress
from gpu_init.site import Data, LocalSite, Site
from gpu_init.tasks import SHARED, Fitted


def assign(source: Artifact, config: JobConfig, given: Collection[str], progress: Progress) -> str:
    """Make vectors of users as a job did, with its centroids, degrees of items, tau, scale and cold vector.

    Users with the interactions that they had in the job get the vectors that they got there; nothing is clustered.

    Parameters
    ----------
    source : Artifact
        Of the job.
    config : JobConfig
        The job's settings and columns, the new interactions and the new output; features where the job found them, or
        where ``given`` names them.
    given : collection of str
        Modalities whose features were given and need not be those of the job.
    progress : Progress

    Returns
    -------
    str
        Path of the new artifact, which more can be assigned by.

    Raises
    ------
    InputError
        As in `run`; the features are not those of the job; or the artifact is one that cannot be assigned by.
    ResourceError
        As in `run`.
    """
    check_places(config)
    backend = select(config.backend, progress.say)
    with backend.explained():
        progress.say(f"backend {backend.name}: {backend.why}")
        return assign_at(LocalSite(backend), source, config, given, progress)


def assign_at(site: Site, source: Artifact, config: JobConfig, given: Collection[str], progress: Progress) -> str:
    """Make vectors at a site; the other arguments, result and errors as of `assign`."""
    started = datetime.now(UTC)
    _check_source(source, config, given)
    projected = config.settings.dim is not None
    with progress.step("fingerprint inputs"):
        read = inputs_of(config, () if projected else None)
    inputs = list(read.files)
    before = [one for one in source.manifest["inputs"] if one["for"].startswith("features.")]
    if projected:
        inputs += before
    else:
        _recognise(source, before, inputs, given, progress)
    check_inputs(config, inputs)
    identity = {**identity_of(config, inputs, site.backend_name), "artifact": source.manifest["checksum"]}
    with open_staging(config.out, resume=config.resume, overwrite=config.overwrite, identity=identity) as staging:
        if staging.complete:
            progress.say(f"{config.out} is already there, made from the same inputs and artifact")
            return config.out
        site.check([staging.path, *(one["path"] for one in read.files)])
        found = _projected_features(source) if projected else read_features(config, progress)
        for table in found.tables.values():
            _check_shape(source, table)
        axis = item_axis_of(found.tables)
        if axis.rows is None:
            axis = ItemAxis(None, [source.item_ids])
        data = site.read(config, found, axis, progress, staging)
        _save_known(source, config, data, staging)
        with ExitStack() as adopted:
            job = open_job(site, config, data, staging, progress, adopted)
            if source.interactions is not None:
                _label_interactions(job, source)
            statistics = vectors(job, {name: _fitted(source, name, data) for name in data.sources})
        read.require_unchanged()
        manifest = manifest_of(config, inputs, site.facts(data, job.parts), data.counts, statistics)
        if source.interactions is not None:
            manifest["interactions"]["embedding"] = source.manifest["interactions"].get("embedding")
        origin = {"path": source.path, "checksum": source.manifest["checksum"]}
        timings = timings_of(started, progress, data.backend)
        return finish(staging, data, {**manifest, "assigned_by": origin, "timings": timings})


def _check_source(source: Artifact, config: JobConfig, given: Collection[str]) -> None:
    if real_path(config.out) == source.path:
        raise InputError(f"{config.out} is the artifact itself; choose another output.")
    for name in config.features:
        if name not in source:
            raise InputError(f"{source.path} has no modality {name}; it has {', '.join(source)}.")
        if name in given and source[name].items is not None:
            raise InputError(f"modality {name}: {source.path} holds its projected items; leave --features out.")
        if source[name].cold is None:
            raise InputError(f"{source.path} was made before there was assign, and lacks cold.npy; run its job again.")


def _recognise(
    source: Artifact,
    before: list[dict[str, Any]],
    inputs: list[dict[str, Any]],
    given: Collection[str],
    progress: Progress,
) -> None:
    """Compare the features with those of the artifact's job by their content.

    Raises
    ------
    InputError
        They differ, and were not given on purpose.
    """
    for name in source:
        old, new = ([one for one in files if one["for"] == f"features.{name}"] for files in (before, inputs))
        if [(one["bytes"], one["hash"]) for one in old] == [(one["bytes"], one["hash"]) for one in new]:
            continue
        was, now = (", ".join(one["path"] for one in files) for files in (old, new))
        if name not in given:
            raise InputError(
                f"features of modality {name}: {now} has changed since {source.path} was made from it.\n"
                f"Give the old ones with --features {name}=PATH, or run the job again."
            )
        progress.warn(f"features of modality {name}: {now} is not, byte for byte, {was} that the job read")


def _projected_features(source: Artifact) -> Features:
    """Return the artifact's own projected items as features, with the ids of the items."""
    tables = {
        name: FeatureTable(name, f"{source.path}/{name}/items.npy", np.asarray(one.items), source.item_ids)
        for name, one in source.items()
    }
    return Features(tables, {name: np.asarray(one.items_mask) for name, one in source.items()})


def _check_shape(source: Artifact, table: FeatureTable) -> None:
    """Refuse features that cannot be those of the artifact's job."""
    width = source[table.name].centroids.shape[1]
    if table.values.shape[1] != width:
        raise InputError(f"{table.path}: {table.values.shape[1]} dimensions, but the job's had {width}.")
    items = source.manifest["items"]["rows"]
    if (table.ids is None or source.item_ids is None) and len(table.values) > items:
        raise InputError(f"{table.path}: {len(table.values)} rows, but the job had {items} items.")
    if source.item_ids is not None and (table.ids is None or not _known(table.ids, source.item_ids)):
        raise InputError(f"{table.path}: its items are not those of the job; run the job again to take new items in.")


def _known(ids: Any, among: Any) -> bool:
    try:
        positions(ids, among)
    except InputError:
        return False
    return True


def _on_axis(source: Artifact, data: Data, values: Any, missing: float) -> Any:
    """Values (I, ...) of the artifact's items at the items of the new interactions, of which there may be more."""
    if source.item_ids is None:
        return np.asarray(values)
    placed = np.full((data.counts.items, *values.shape[1:]), missing, values.dtype)
    placed[positions(source.item_ids, data.counts.item_ids)] = values
    return placed


def _save_known(source: Artifact, config: JobConfig, data: Data, staging: Staging) -> None:
    """Save what the artifact knows of the items: projected features, degrees, and the embedding of the interactions."""
    for name, one in data.sources.items():
        old = source[name]
        if config.settings.dim is not None:
            values = data.backend.to_host(one.aligned(data.backend).values)
            save_items(staging, name, values, one.mask)
        if old.item_factors is not None:
            path = f"{name}/item_factors.npy"
            staging.save(path, _on_axis(source, data, old.item_factors, 0.0))
            staging.finish(path, {})
        staging.save(f"{name}/centroids.npy", np.asarray(old.centroids))
        if old.item_labels is not None:
            staging.save(f"{name}/item_labels.npy", _on_axis(source, data, old.item_labels, -1))
    if source.interactions is not None:
        old_embedding = source.interactions
        for part in ("items", "item_factors"):
            array = _on_axis(source, data, getattr(old_embedding, part), 0.0)
            staging.save(f"{INTERACTIONS}/{part}.npy", array)
        for part in ("singular_values", "centroids"):
            staging.save(f"{INTERACTIONS}/{part}.npy", np.asarray(getattr(old_embedding, part)))


def _label_interactions(job: Job, source: Artifact) -> None:
    """Label the users, in all modalities, by the artifact's embedding of the interactions."""
    assert source.interactions is not None
    if job.store.finished(INTERACTIONS) is None:
        with job.progress.step("assign interactions"):
            label_interactions(job, np.asarray(source.interactions.centroids))
        job.store.finish(INTERACTIONS, {})


def _fitted(source: Artifact, name: str, data: Data) -> tuple[Fitted, dict[str, Any]]:
    """Return a modality's clusters, and what the artifact's manifest says of them."""
    old, facts = source[name], source.manifest["modalities"][name]
    item_labels = None if old.item_labels is None else _on_axis(source, data, old.item_labels, -1)
    form = SHARED if source.interactions is not None else facts["kmeans"]["form"] if item_labels is None else "factored"
    tau = facts["lambda"].get("tau") if isinstance(facts["lambda"], dict) else None
    arrays = (np.asarray(old.centroids), item_labels, np.asarray(old.cold))
    kept = {key: facts[key] for key in ("kmeans", "source_width", "choice") if key in facts}
    return Fitted(name, form, *arrays, scale=facts["scale"], tau=tau), kept
