"""How much memory and disk a job needs, checked before the work begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gpu_init.artifact.staging import Staging
from gpu_init.config import JobConfig
from gpu_init.errors import ResourceError
from gpu_init.inputs.features import FeatureTable
from gpu_init.memory import require as require_memory
from gpu_init.method import spectral
from gpu_init.method.blend import block_rows
from gpu_init.method.clusters import most_clusters
from gpu_init.method.matrix import ROW_BYTES
from gpu_init.method.points import kmeans_form, needed_bytes

BLOCK_BYTES = 32 << 20  # Memory for the blocks of vectors on their way out, unless --memory asks for less; fits caches.
OPERATOR_BYTES = {"mean": 8, "sym": 16}  # Memory for the row factors of each user and modality, by weighting.


@dataclass(frozen=True)
class Sizes:
    """Rows of R, its columns and its entries; 0 where that is not known yet."""

    users: int
    items: int
    pairs: int


def require_room(
    config: JobConfig,
    tables: Mapping[str, FeatureTable],
    sizes: Sizes,
    staging: Staging | None,
    *,
    reading: bool = False,
    workers: Sequence[int] = (),
) -> None:
    """Refuse a run that has too little memory or disk before it.

    Parameters
    ----------
    reading : bool, default=False
        R is still to be read.
    workers : sequence of int
        Over a cluster: the bytes of memory that each worker may take, 0 for no limit. The users are shared by them, and
        ``--memory`` is per worker.

    Raises
    ------
    ResourceError
        What is needed at least, and what is free.
    """
    if staging is not None:
        outputs = sum(_output_bytes(config, table, sizes) for table in tables.values())
        staging.require_room(outputs + _embedding_bytes(config, sizes))
    beside = max(_beside_bytes(config, table, sizes, len(workers) or 1) for table in tables.values())
    what = f"{sizes.users:,} users, {sizes.items:,} items, {sizes.pairs:,} interactions"
    each = " on each worker" if workers else ""
    if config.memory is not None and beside > config.memory:
        raise ResourceError(
            f"{what}: {beside:,} bytes of memory are needed{each} beside interactions and features, --memory gives"
            f" {config.memory:,}; give it that, or leave it out."
        )
    least = min((limit for limit in workers if limit), default=0)
    if least and beside > least:
        raise ResourceError(
            f"{what}: {beside:,} bytes of memory are needed{each} beside interactions and features, and a worker has"
            f" {least:,}; give the workers more, or take more of them."
        )
    if not workers:
        needed = beside + max(_copied_bytes(config, table, sizes) for table in tables.values())
        if reading:
            needed += sizes.users * ROW_BYTES + sizes.pairs * (4 if config.weight_column is None else 8)
        require_memory(what, needed)


def kmeans_bytes(config: JobConfig, users: int) -> int | None:
    """Bytes of ``--memory`` that are left for K-means, then for blocks: all but the row factors of all modalities."""
    if config.memory is None:
        return None
    return config.memory - OPERATOR_BYTES[config.settings.weighting] * users * len(config.features)


def block_bytes(config: JobConfig, users: int) -> int:
    """Bytes of memory for the blocks of vectors on their way out."""
    left = kmeans_bytes(config, users)
    return BLOCK_BYTES if left is None else min(left, BLOCK_BYTES)


def _output_bytes(config: JobConfig, table: FeatureTable, sizes: Sizes) -> int:
    """Bytes of a modality's arrays in the artifact."""
    settings = config.settings
    width = settings.dim or table.values.shape[1]
    by_user = 4 + width * np.dtype(settings.dtype).itemsize
    by_item = (4 if settings.cluster_on == "items" else 0) + (4 * width + 1 if settings.dim else 0)
    return sizes.users * by_user + sizes.items * by_item + _most_clusters(config, sizes) * width * 4


def _embedding_bytes(config: JobConfig, sizes: Sizes) -> int:
    """Bytes of the embedding of the interactions, where users are clustered on it; it is kept, and is an output."""
    if config.settings.cluster_on != "interactions":
        return 0
    rank = config.settings.cluster_rank or spectral.RANK
    return sizes.items * (4 * rank + 8) + 4 * sizes.users + 4 * _most_clusters(config, sizes) * rank


def _most_clusters(config: JobConfig, sizes: Sizes) -> int:
    """K, but no more than there are users: more are refused once these are known."""
    return min(most_clusters(config.settings), max(sizes.users, 1))


def _copied_bytes(config: JobConfig, table: FeatureTable, sizes: Sizes) -> int:
    """Bytes of a modality's features in memory; 0 where the file is mapped as it is."""
    settings, values = config.settings, table.values
    mapped = settings.dim is None and table.ids is None and values.dtype == np.float32 and values.flags.c_contiguous
    return 0 if mapped else 4 * sizes.items * (settings.dim or values.shape[1])


def _beside_bytes(config: JobConfig, table: FeatureTable, sizes: Sizes, workers: int) -> int:
    """Most that a modality takes beside R and the features: row factors of all modalities, then K-means or blocks.

    The form of K-means goes by all users, however many workers share them, so that it is the same for any number.
    """
    settings = config.settings
    width, clusters = settings.dim or table.values.shape[1], _most_clusters(config, sizes)
    users, items, memory = -(-sizes.users // workers), sizes.items, kmeans_bytes(config, sizes.users)
    blocks = 16 * width * min(users, block_rows(width, block_bytes(config, sizes.users)))
    if settings.cluster_on == "users":
        form = kmeans_form(sizes.users, items, sizes.pairs, clusters, width, memory)
        fitting = needed_bytes(form, users, items, clusters, width)
    elif settings.cluster_on == "interactions":
        rank = settings.cluster_rank or spectral.RANK
        kept = _embedding_bytes(config, sizes)
        fitting = spectral.needed_bytes(items, rank)
        for columns in (rank, width):
            form = kmeans_form(sizes.users, items, sizes.pairs, clusters, columns, memory)
            fitting = max(fitting, kept + needed_bytes(form, users, items, clusters, columns))
        blocks += kept
    else:
        fitting = max(needed_bytes("tiled", items, items, clusters, width), 16 * users + 8 * items * clusters)
    return OPERATOR_BYTES[settings.weighting] * users * len(config.features) + max(fitting, blocks)
