"""Vectors for new users or new interactions, with the clusters of an artifact."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from gpu_init.artifact.format import INTERACTIONS
from gpu_init.artifact.objects import open_staging
from gpu_init.artifact.read import Artifact
from gpu_init.artifact.staging import Staging
from gpu_init.backend.interface import Backend
from gpu_init.backend.select import select
from gpu_init.budget import _block_rows
from gpu_init.config import JobConfig
from gpu_init.errors import InputError
from gpu_init.files.storage import real_path
from gpu_init.inputs.axes import positions
from gpu_init.inputs.features import FeatureTable
from gpu_init.inputs.read import (
    Data,
    _on_axis,
    _read_interactions,
    check_inputs,
    check_places,
    inputs_of,
    read_features,
)
from gpu_init.manifest import Counts, backend_facts, identity_of, manifest_of, save_ids, timings_of
from gpu_init.method import clusters as method_clusters
from gpu_init.method import spectral
from gpu_init.run import _save_for_assign, _write
from gpu_init.show.progress import Progress

# New users and new interactions, among an artifact's clusters.


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
    _check_source(source, config, given)
    backend = select(config.backend, progress.say)
    with backend.explained():
        return _assign(source, config, given, backend, progress)


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


def _assign(source: Artifact, config: JobConfig, given: Collection[str], backend: Backend, progress: Progress) -> str:
    started = datetime.now(UTC)
    progress.say(f"backend {backend.name}: {backend.why}")
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
    identity = {
        **identity_of(config, inputs, backend.name),
        "artifact": source.manifest["checksum"],
    }
    with open_staging(config.out, resume=config.resume, overwrite=config.overwrite, identity=identity) as staging:
        if staging.complete:
            progress.say(f"{config.out} is already there, made from the same inputs and artifact")
            return config.out
        tables, present = _projected_features(source) if projected else read_features(config, progress)
        for table in tables.values():
            _check_shape(source, table)
        data = _read_interactions(config, backend, tables, present, progress, staging, source)
        backend = data.backend
        shared = None if source.interactions is None else _assign_behaviour(source, backend, data, staging, progress)
        statistics = {
            name: _assign_modality(source, config, backend, data, name, shared, staging, progress) for name in tables
        }
        save_ids(staging, data.table.user_ids, data.table.item_ids)
        read.require_unchanged()
        facts = backend_facts(backend, data.table.kernels)
        manifest = manifest_of(config, inputs, facts, Counts.of(data.table), statistics)
        if shared is not None:
            manifest["interactions"]["embedding"] = source.manifest["interactions"].get("embedding")
        origin = {"path": source.path, "checksum": source.manifest["checksum"]}
        return staging.commit({**manifest, "assigned_by": origin, "timings": timings_of(started, progress, backend)})


def _recognise(
    source: Artifact,
    before: list[dict[str, Any]],
    inputs: list[dict[str, Any]],
    given: Collection[str],
    progress: Progress,
) -> None:
    """Know the features again by their content."""
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


def _projected_features(source: Artifact) -> tuple[dict[str, FeatureTable], dict[str, Any]]:
    """The artifact's own projected items, as if they were features with the items' ids."""
    tables = {
        name: FeatureTable(name, f"{source.path}/{name}/items.npy", np.asarray(one.items), source.item_ids)
        for name, one in source.items()
    }
    return tables, {name: np.asarray(one.items_mask) for name, one in source.items()}


def _check_shape(source: Artifact, table: FeatureTable) -> None:
    """Refuse features given that cannot be those of the job."""
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


def _assign_behaviour(source: Artifact, backend: Backend, data: Data, staging: Staging, progress: Progress) -> Any:
    """Label of each user (U,), in all modalities, by where the artifact places what they did."""
    old = source.interactions
    assert old is not None
    with progress.step("assign interactions"):
        items, factors = (_on_axis(source, data.table, array, 0.0) for array in (old.items, old.item_factors))
        matrix = data.table.interactions
        points = spectral.points(backend, matrix, backend.asarray(items), backend.asarray(factors))
        labels = method_clusters.behaviour_labels(backend, matrix, points, backend.asarray(old.centroids))
    saved = {
        "items": items,
        "item_factors": factors,
        "singular_values": old.singular_values,
        "centroids": old.centroids,
    }
    for part, array in {**saved, "labels": backend.to_host(labels)}.items():
        staging.save(f"{INTERACTIONS}/{part}.npy", np.asarray(array))
    return labels


def _assign_modality(
    source: Artifact,
    config: JobConfig,
    backend: Backend,
    data: Data,
    name: str,
    shared: Any,
    staging: Staging,
    progress: Progress,
) -> dict[str, Any]:
    """Label by the artifact's centroids, and write every user's row; returns the modality's part of the manifest.

    ``shared``: labels of users (U,) in all modalities, where they go by what users did.
    """
    old, facts, settings = source[name], source.manifest["modalities"][name], config.settings
    operator, matrix = data.operators[name], data.table.interactions
    modality = data.modality(backend, name)
    centroids = backend.asarray(old.centroids)
    item_labels = None
    if old.item_labels is not None:
        item_labels = backend.asarray(_on_axis(source, data.table, old.item_labels, -1))
    if shared is not None:
        labels = (centroids, backend.xp.where(operator.warm, shared, -1).astype("int32"), None)
    else:
        with progress.step(f"assign {name}"):
            form = facts["kmeans"]["form"] if item_labels is None else "factored"
            labels = (
                centroids,
                method_clusters.nearest(backend, matrix, modality, operator, centroids, form),
                item_labels,
            )
    if settings.lam == "shrink":
        settings = replace(settings, tau=facts["lambda"]["tau"])
    step_rows = _block_rows(config, matrix.users, modality.values.shape[1])
    cold = backend.asarray(old.cold)
    plan = method_clusters.fit(backend, matrix, modality, operator, settings, labels, facts["scale"], step_rows, cold)
    for part, array in zip(("centroids", "labels", "item_labels"), labels, strict=True):
        if array is not None:
            staging.save(f"{name}/{part}.npy", backend.to_host(array))
    if old.items is not None:
        staging.save(f"{name}/items.npy", backend.to_host(modality.values))
        staging.save(f"{name}/items_mask.npy", data.sources[name].mask)
    _save_for_assign(backend, plan, settings, staging)
    kept = {key: facts[key] for key in ("kmeans", "source_width", "choice") if key in facts}
    return _write(config, backend, data, plan, labels, kept, staging, progress)
