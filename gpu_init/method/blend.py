"""The blend of the local and the global part, in one fused pass over blocks of users."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from gpu_init.backend.interface import Backend, in_blocks
from gpu_init.errors import InputError
from gpu_init.kernels import BlendTerms, Csr
from gpu_init.method.matrix import Interactions
from gpu_init.method.modality import Modality
from gpu_init.method.norms import NORM_ROWS
from gpu_init.method.weighting import Weighting


@dataclass(frozen=True)
class Blend:
    """All that the fused pass needs to write the rows of one modality.

    ``X_u = scale * (lam_u L_u + (1 - lam_u) G_u)``, and ``scale * cold`` for cold users; ``lam`` is a number, or of
    each user (U,) float64. Exactly one of ``user_labels`` (U,) and ``item_labels`` (I,), int32, is given: where
    ``G_u`` comes from.
    """

    modality: Modality
    weighting: Weighting
    lam: Any
    centroids: Any
    user_labels: Any
    item_labels: Any
    cold: Any
    scale: float = 1.0


def of_users(fit: Blend, users: Any) -> Blend:
    """The blend of some users (n,), to use with the interactions that `Interactions.some` gives for them."""
    of = fit.weighting
    weighting = Weighting(of.local_rows[users], of.local_items, of.mean_rows[users], of.present)
    labels = None if fit.user_labels is None else fit.user_labels[users]
    return replace(
        fit, weighting=weighting, user_labels=labels, lam=fit.lam if isinstance(fit.lam, float) else fit.lam[users]
    )


def blend(backend: Backend, interactions: Interactions, fit: Blend, rows: slice, out: Any = None) -> Any:
    """Rows of X, (n, d) float32: one kernel call, into ``out`` where one is given."""
    by_item = fit.item_labels is not None
    if out is None:
        out = backend.empty((rows.stop - rows.start, fit.modality.values.shape[1]), backend.xp.float32)
    backend.kernels.aggregate_blend(
        interactions.csr.rows(rows.start, rows.stop),
        fit.modality.values,
        fit.weighting.local_rows[rows],
        fit.weighting.local_items,
        BlendTerms(
            lam=backend.xp.full(rows.stop - rows.start, fit.lam) if isinstance(fit.lam, float) else fit.lam[rows],
            centroids=fit.centroids,
            user_labels=None if by_item else fit.user_labels[rows],
            item_labels=fit.item_labels,
            mean_scale=fit.weighting.mean_rows[rows] if by_item else None,
            cold=fit.cold,
            scale=fit.scale,
        ),
        out,
    )
    return out


def global_part(backend: Backend, interactions: Interactions, fit: Blend, part: slice) -> Any:
    """Rows of G, (n, d) float64; rows of cold users must not be used."""
    xp = backend.xp
    if fit.item_labels is None:
        return fit.centroids[fit.user_labels[part]].astype(xp.float64)
    csr = interactions.csr.rows(part.start, part.stop)
    entries = slice(int(csr.indptr[0]), int(csr.indptr[-1]))
    labels = fit.item_labels[csr.indices[entries]]
    known = xp.concatenate([xp.ones(len(fit.centroids)), xp.zeros(1)])  # The last is for unlabelled items.
    table = xp.concatenate([fit.centroids, xp.zeros((1, fit.centroids.shape[1]), fit.centroids.dtype)])
    labels = xp.where(labels < 0, len(fit.centroids), labels).astype(xp.int32)
    weights = None if csr.weights is None else csr.weights[entries]
    by_label = Csr(csr.indptr - entries.start, labels, weights)
    offset = xp.zeros(fit.centroids.shape[1])
    return backend.kernels.aggregate(by_label, table, fit.weighting.mean_rows[part], known, offset)


def rows(backend: Backend, interactions: Interactions, plan: Blend, part: slice, dtype: str, out: Any = None) -> Any:
    """Rows of X in the type they are stored in, (n, d); into ``out`` where one is given.

    Raises
    ------
    InputError
        A value that float16 cannot hold, with the modality named.
    """
    if dtype == "float32":
        return blend(backend, interactions, plan, part, out)
    block = blend(backend, interactions, plan, part)
    largest = float(abs(block).max()) if block.size else 0.0
    if largest >= 65520.0:  # Such values round to infinity: the largest float16 is 65504.
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
    """All of X, block by block, each (n, d) in the space that is given for its users.

    ``step`` users at a time, a multiple of `NORM_ROWS`; half as many where memory runs out.
    """

    def make(part: slice) -> Any:
        return rows(backend, interactions, plan, part, dtype, space(part))

    return in_blocks(backend, interactions.users, step, NORM_ROWS, make)


def block_rows(width: int, memory: int) -> int:
    """Rows of X per block so that a block, its copy on the way out and the next one stay within ``memory`` bytes."""
    return max(1, memory // (4 * width * 4 * NORM_ROWS)) * NORM_ROWS
