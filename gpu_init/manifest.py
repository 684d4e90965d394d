"""What a run's manifest says: settings, inputs, sizes, statistics and timings."""

from __future__ import annotations

import os
import resource
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pandas as pd

from gpu_init.artifact.format import INTERACTIONS
from gpu_init.artifact.staging import Staging
from gpu_init.backend.interface import Backend
from gpu_init.config import JobConfig
from gpu_init.inputs.read import Counts
from gpu_init.kernels import forced_kernels
from gpu_init.method.choose import Choice
from gpu_init.method.kmeans import Clusters
from gpu_init.method.modality import Modality
from gpu_init.method.norms import item_norms, norms
from gpu_init.method.points import sample_sizes
from gpu_init.settings import settings_to_dict
from gpu_init.show.progress import Progress
from gpu_init.tasks import Fitted
from gpu_init.version import __version__


def embedding_facts(store: Staging) -> dict[str, Any]:
    """Return what the manifest says of the embedding of the interactions."""
    path = f"{INTERACTIONS}/items.npy"
    items, values = store.load(path), store.load(f"{INTERACTIONS}/singular_values.npy")
    outside = int((store.load(f"{INTERACTIONS}/item_factors.npy") == 0).sum())
    facts = store.finished(path) or {}
    return {"rank": items.shape[1], "singular_values": values.tolist(), "items_outside": outside, **facts}


def timings_of(started: datetime, progress: Progress, backend: Backend) -> dict[str, Any]:
    """Return what the manifest says of a run's time and memory."""
    ended = datetime.now(UTC)
    return {
        "started": started.isoformat(timespec="seconds"),
        "finished": ended.isoformat(timespec="seconds"),
        "seconds": round((ended - started).total_seconds(), 3),
        "steps": progress.timings,
        "peak_memory_bytes": _peak_memory(),
        **backend.peak_memory(),
    }


def modality_facts(
    backend: Backend,
    modality: Modality,
    fitted: Fitted,
    users: int,
    sizes: list[int],
    facts: dict[str, Any],
    user_norms: dict[str, float],
    lam: Any,
) -> dict[str, Any]:
    """Return a modality's part of the manifest.

    Parameters
    ----------
    users : int
        U.
    sizes : list of int
        Users of each label.
    facts : dict
        What is said of the clustering: ``kmeans`` and ``choice`` as of `kmeans_facts`, and ``source_width``.
    user_norms : dict
        Of the vectors, as of `norm_statistics`.
    lam : float or dict
        Lambda, or what its policy found.
    """
    items, warm = len(modality.present), sum(sizes)
    item_sizes = {}
    if fitted.item_labels is not None:
        item_sizes = {"item_cluster_sizes": cluster_sizes(fitted.item_labels, len(fitted.centroids))}
    return {
        "width": modality.values.shape[1],
        "source_width": facts["source_width"],
        "items": modality.n_present,
        "missing_items": items - modality.n_present,
        "warm_users": warm,
        "cold_users": users - warm,
        "clusters": len(fitted.centroids),
        "cluster_sizes": sizes,
        **item_sizes,
        **({"choice": facts["choice"]} if "choice" in facts else {}),
        "kmeans": facts["kmeans"],
        "norms": {
            "users": user_norms,
            "items": item_norms(backend, modality),
            "centroids": norms(backend, iter([backend.asarray(fitted.centroids)])),
        },
        "scale": fitted.scale,
        "lambda": lam,
    }


def kmeans_facts(
    found: Clusters, choice: Choice | None, sizes: list[int], what: str, tolerance: float, progress: Progress
) -> dict[str, Any]:
    """Return what the manifest says of a clustering, and warn of empty clusters; ``sizes``: rows of each cluster."""
    clusters = len(found.centroids)
    empty = clusters - np.count_nonzero(sizes)
    if empty:
        progress.warn(f"{what}: {empty} of {clusters} clusters are empty; fewer rows differ")
    facts = {
        "form": found.form,
        "library": found.library,
        "samples": sample_sizes(sum(sizes), clusters, found.centroids.shape[1]),
        "tolerance": tolerance,
        "passes": len(found.inertia),
        "stopped": found.stopped,
        "inertia": found.inertia,
    }
    return {"kmeans": facts, **({} if choice is None else {"choice": asdict(choice)})}


def _peak_memory() -> int:
    """Return the most bytes that were resident.

    Where Linux has its own figure, `ru_maxrss` is not used: it includes the process that started this one.
    """
    with suppress(OSError), open("/proc/self/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def cluster_sizes(labels: Any, clusters: int) -> list[int]:
    """Count the rows of each label, on the host; rows with a negative label are in no cluster."""
    return [int(size) for size in np.bincount(labels[labels >= 0], minlength=clusters)]


def save_ids(staging: Staging, user_ids: Any, item_ids: Any) -> None:
    """Save users.parquet and items.parquet, where row numbers are not the ids."""
    for path, kind, column in (("users.parquet", "user_id", user_ids), ("items.parquet", "item_id", item_ids)):
        if column is not None:
            rows = np.arange(len(column), dtype=np.int64)
            staging.save_table(path, pd.DataFrame({"row": rows, kind: column.to_numpy()}))


def identity_of(config: JobConfig, inputs: list[dict[str, Any]], backend: str) -> dict[str, Any]:
    """Return what must be the same for a run to be resumed: settings, columns, contents of the inputs, the program."""
    files = {
        f"{one['for']}/{number}:{os.path.basename(one['path'])}": {"bytes": one["bytes"], "hash": one["hash"]}
        for number, one in enumerate(inputs)
    }
    program = {"gpu_init": __version__, "backend": backend, "kernels": forced_kernels()}
    users = config.users if isinstance(config.users, int) else None
    return {
        "settings": settings_to_dict(config.settings),
        "columns": {**_columns(config), "users": users},
        "inputs": files,
        "program": program,
    }


def _columns(config: JobConfig) -> dict[str, Any]:
    """Return the settings that say which column holds what, by the names of their keys."""
    names = ("user_column", "item_column", "weight_column", "time_column", "half_life", "session_column", "where")
    return {name: getattr(config, name) for name in names}


def backend_facts(backend: Backend, reading_kernels: str) -> dict[str, Any]:
    """Return what the manifest says of the backend; other kernels may have read than cluster and write."""
    return {
        "name": backend.name,
        "kernels": backend.kernels.name,
        "reading_kernels": reading_kernels,
        "kmeans": backend.kmeans_name,
        "versions": backend.versions(),
    }


def manifest_of(
    config: JobConfig,
    inputs: list[dict[str, Any]],
    site: dict[str, Any],
    counts: Counts,
    statistics: dict[str, Any],
) -> dict[str, Any]:
    """Return all but the timings; ``site``: as of `Site.facts`; ``statistics``: each modality's part."""
    return {
        "gpu_init_version": __version__,
        "settings": settings_to_dict(config.settings),
        "job": {
            "interactions": config.interactions,
            "features": config.features,
            **_columns(config),
            "users": config.users,
            "folder": os.getcwd(),  # The paths above are relative to it.
        },
        **site,
        "inputs": inputs,
        "users": {
            "rows": counts.users,
            "ids": "row numbers" if counts.user_ids is None else "users.parquet",
            **({} if config.session_column is None else {"are": "sessions"}),
        },
        "items": {"rows": counts.items, "ids": "row numbers" if counts.item_ids is None else "items.parquet"},
        "interactions": {
            "read": counts.read,
            "kept": counts.kept,
            "pairs": counts.pairs,
            "weight": counts.weight,
        },
        "modalities": statistics,
    }
