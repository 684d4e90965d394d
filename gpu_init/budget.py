"""How much memory and disk a job needs, checked before the work begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from gpu_init.artifact.staging import Staging
from gpu_init.config import JobConfig
from gpu_init.errors import ResourceError
from gpu_init.inputs.features import FeatureTable
from gpu_init.memory import require as require_memory
from gpu_init.method import blend, spectral
from gpu_init.method import clusters as method_clusters
from gpu_init.method import points as method_points
from gpu_init.method.matrix import ROW_BYTES
from gpu_init.method.points import needed_bytes

BLOCK_BYTES = 32 << 20  # of memory for the blocks on their way out, unless --memory asks for less; fits caches
OPERATOR_BYTES = {"mean": 8, "sym": 16}  # of memory for each user of a modality, by weighting: row factors


# Room.


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
) -> None:
    """Refuse a run that has too little memory or disk before it; ``reading``: R is still to be read.

    Raises
    ------
    ResourceError
        What is needed at least, and what is free.
    """
    if staging is not None:
        outputs = sum(_output_bytes(config, table, sizes) for table in tables.values())
        staging.require_room(outputs + _embedding_bytes(config, sizes))
    beside = max(_beside_bytes(config, table, sizes) for table in tables.values())
    what = f"{sizes.users:,} users, {sizes.items:,} items, {sizes.pairs:,} interactions"
    if config.memory is not None and beside > config.memory:
        raise ResourceError(
            f"{what}: {beside:,} bytes of memory are needed beside interactions and features, --memory gives"
            f" {config.memory:,}; give it that, or leave it out."
        )
    needed = beside + max(_copied_bytes(config, table, sizes) for table in tables.values())
    if reading:
        needed += sizes.users * ROW_BYTES + sizes.pairs * (4 if config.weight_column is None else 8)
    require_memory(what, needed)


def _output_bytes(config: JobConfig, table: FeatureTable, sizes: Sizes) -> int:
    """Of a modality's arrays in the artifact."""
    settings = config.settings
    width = settings.dim or table.values.shape[1]
    by_user = 4 + width * np.dtype(settings.dtype).itemsize
    by_item = (4 if settings.cluster_on == "items" else 0) + (4 * width + 1 if settings.dim else 0)
    return sizes.users * by_user + sizes.items * by_item + _most_clusters(config, sizes) * width * 4


def _embedding_bytes(config: JobConfig, sizes: Sizes) -> int:
    """Of what places users by what they did, where that is clustered; it stays in memory, and is an output."""
    if config.settings.cluster_on != "interactions":
        return 0
    rank = config.settings.cluster_rank or method_clusters.RANK
    return sizes.items * (4 * rank + 8) + 4 * sizes.users + 4 * _most_clusters(config, sizes) * rank


def _most_clusters(config: JobConfig, sizes: Sizes) -> int:
    """No more than users: more are refused once these are known."""
    return min(method_clusters.most_clusters(config.settings), max(sizes.users, 1))


def _copied_bytes(config: JobConfig, table: FeatureTable, sizes: Sizes) -> int:
    """Of a modality's features, where they are not mapped as they are."""
    settings, values = config.settings, table.values
    mapped = settings.dim is None and table.ids is None and values.dtype == np.float32 and values.flags.c_contiguous
    return 0 if mapped else 4 * sizes.items * (settings.dim or values.shape[1])


def _beside_bytes(config: JobConfig, table: FeatureTable, sizes: Sizes) -> int:
    """Most that a modality takes beside R and the features: operators of all modalities, then K-means or blocks."""
    settings = config.settings
    width, clusters = settings.dim or table.values.shape[1], _most_clusters(config, sizes)
    users, items = sizes.users, sizes.items
    blocks = 16 * width * min(users, _block_rows(config, users, width))
    if settings.cluster_on == "users":
        memory = _left(config, users)
        form = method_points.kmeans_form(users, items, sizes.pairs, clusters, width, memory)
        fitting = needed_bytes(form, users, items, clusters, width)
    elif settings.cluster_on == "interactions":
        rank = settings.cluster_rank or method_clusters.RANK
        memory, kept = _left(config, users), _embedding_bytes(config, sizes)
        fitting = spectral.needed_bytes(items, rank)
        for columns in (rank, width):
            form = method_points.kmeans_form(users, items, sizes.pairs, clusters, columns, memory)
            fitting = max(fitting, kept + needed_bytes(form, users, items, clusters, columns))
        blocks += kept
    else:
        fitting = max(needed_bytes("tiled", items, items, clusters, width), 16 * users + 8 * items * clusters)
    return OPERATOR_BYTES[settings.weighting] * users * len(config.features) + max(fitting, blocks)


def _left(config: JobConfig, users: int) -> int | None:
    """Bytes of ``--memory`` that are left for K-means, then for blocks: all but the operators of all modalities."""
    if config.memory is None:
        return None
    return config.memory - OPERATOR_BYTES[config.settings.weighting] * users * len(config.features)


def _block_rows(config: JobConfig, users: int, width: int) -> int:
    """Rows of a block."""
    left = _left(config, users)
    return blend.block_rows(width, BLOCK_BYTES if left is None else min(left, BLOCK_BYTES))
