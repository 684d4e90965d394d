"""Lambda policies, which choose for each user the weight of the local part in the blend.

Interactions count by their weight, and items without the modality not at all. The effective count of a user's items is
``n_u = (sum w)^2 / sum w^2`` (Kish, 1965): the number of items where all weigh the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from gpu_init.backend.interface import Backend, in_blocks, ranges
from gpu_init.method.blend import Blend, global_part
from gpu_init.method.matrix import Interactions
from gpu_init.method.modality import Modality
from gpu_init.method.norms import NORM_ROWS, unit_scales
from gpu_init.method.weighting import Weighting

TEMPERATURE = 0.1  # The default temperature of the policy "attention", in cosines.


def effective_counts(backend: Backend, interactions: Interactions, weighting: Weighting) -> tuple[Any, Any]:
    """Sums of the squared shares ``w / sum w`` of each user's items, and ``n_u`` (U,), 0 for cold users."""
    xp = backend.xp
    squares = interactions.square_sums(backend, weighting.mean_rows, weighting.present)
    warm = weighting.warm
    return squares, xp.where(warm, 1.0 / xp.where(warm, squares, 1.0), 0.0)


def shrink(backend: Backend, warm: Any, counts: Any, tau: float) -> Any:
    """Lambda of each user (U,) by the policy "shrink": ``n_u / (n_u + tau)``, 0 for cold users."""
    xp = backend.xp
    return xp.where(warm, counts / xp.where(warm, counts + tau, 1.0), 0.0)


def attention(
    backend: Backend, interactions: Interactions, fit: Blend, squares: Any, temperature: float, block_rows: int
) -> Any:
    """Lambda of each user (U,) by the policy "attention": ``sigmoid((s_L - s_G) / temperature)``, 0 for cold users.

    ``s_L`` is the mean cosine of the user's items among themselves. Pairs are of two items and count by the product
    of their shares p, so with the items' unit vectors f it is ``(|sum p f|^2 - sum p^2 |f|^2) / (1 - sum p^2)``, and
    0 for a single item. ``s_G`` is the mean cosine of the items to ``G_u``: ``sum p f . G_u / |G_u|``. A cosine to
    a vector of length 0 is 0.

    Parameters
    ----------
    fit : Blend
        The blend of these users; its lambda is not used.
    squares : array, shape (U,), float64
        The sums of p^2, from `effective_counts`.
    block_rows : int
        Users per block, a multiple of `NORM_ROWS`.
    """
    xp, kernels = backend.xp, backend.kernels
    features, rows = fit.modality.values, fit.weighting.mean_rows
    to_unit = unit_scales(backend, fit.modality)
    with_themselves = interactions.square_sums(backend, rows, (to_unit > 0).astype(xp.float64))
    several = 1.0 - squares > 1e-9
    offset = xp.zeros(features.shape[1])

    def make(part: slice) -> Any:
        csr = interactions.csr.rows(part.start, part.stop)
        own = kernels.aggregate(csr, features, rows[part], to_unit, offset)
        pairs = xp.where(several[part], 1.0 - squares[part], 1.0)
        among = xp.where(several[part], (kernels.lengths(own) - with_themselves[part]) / pairs, 0.0)
        shared = global_part(backend, interactions, fit, part)
        length = xp.sqrt(kernels.lengths(shared))
        return among - (own * shared).sum(axis=1) / xp.where(length > 0, length, 1.0)

    blocks = in_blocks(backend, interactions.users, block_rows, NORM_ROWS, make)
    odds = xp.concatenate([made for _, made in blocks]) / temperature
    sigmoid = 1.0 / (1.0 + xp.exp(xp.clip(-odds, -700.0, 700.0)))  # The clip keeps exp finite.
    return xp.where(fit.weighting.warm, sigmoid, 0.0)


# Tau of the policy "shrink": sums over some users, which add up over all of them.


class Volumes(NamedTuple):
    """First sums for tau: of ``n_u``, of its square, of the warm users, and ``sum_u n_u M_u`` by item (I,)."""

    total: float
    squares: float
    warm: int
    by_item: Any


class Centre(NamedTuple):
    """The mean ``m`` (D,), and the squared distance of each item to it (I,), both float64."""

    mean: Any
    distances: Any


def tau_volumes(backend: Backend, interactions: Interactions, weighting: Weighting, counts: Any) -> Volumes:
    """Compute the first sums for tau over some users, from their effective counts (U,)."""
    by_item = interactions.item_sums(backend, counts * weighting.mean_rows)
    return Volumes(float(counts.sum()), float((counts * counts).sum()), int(weighting.warm.sum()), by_item)


def tau_centre(backend: Backend, modality: Modality, volumes: Volumes) -> Centre:
    """Return the mean that the first sums of all users give."""
    xp = backend.xp
    by_item = xp.where(modality.present, backend.asarray(volumes.by_item), 0.0) / volumes.total

    def items(part: slice) -> Any:
        return xp.where(modality.present[part][:, None], modality.values[part], 0.0).astype(xp.float64)

    parts = list(ranges(len(by_item), NORM_ROWS))
    mean = sum(backend.in_order(lambda part: by_item[part] @ items(part), parts))
    distances = xp.concatenate(list(backend.in_order(lambda part: ((items(part) - mean) ** 2).sum(axis=1), parts)))
    return Centre(mean, distances)


def tau_sums(
    backend: Backend, interactions: Interactions, modality: Modality, weighting: Weighting, counts: Any, centre: Centre
) -> tuple[float, float]:
    """Return ``sum_u n_u s_u`` and ``sum_u n_u |M_u - m|^2`` over some users."""
    xp, rows, present, kernels = backend.xp, weighting.mean_rows, weighting.present, backend.kernels
    apart = xp.empty(interactions.users)  # Differences of distances are small, so float64 is needed.
    for part in ranges(interactions.users, NORM_ROWS):
        csr = interactions.csr.rows(part.start, part.stop)
        apart[part] = kernels.lengths(kernels.aggregate(csr, modality.values, rows[part], present, centre.mean))
    apart = xp.where(weighting.warm, apart, 0.0)
    inside = rows * interactions.user_degrees(backend, centre.distances * present) - apart
    inside = xp.where(weighting.warm, inside, 0.0)
    return float((counts * inside).sum()), float((counts * apart).sum())


def tau_of(volumes: Volumes, centre: Centre, sums: tuple[float, float], counts: Callable[[], Any]) -> dict[str, Any]:
    """Within-user over between-user variance of the features, both summed over the dimensions.

    The estimators of Buehlmann and Straub (1970) for credibility ``n / (n + tau)``, with the effective counts
    ``n_u`` as volumes. With ``M_u`` the user's mean, ``s_u`` the share-weighted mean of ``|F_i - M_u|^2`` over the
    user's items, N the sum of ``n_u`` over the U warm users, and ``m = sum_u n_u M_u / N``::

        within  = sum_u n_u s_u / sum_u (n_u - 1)
        between = (sum_u n_u |M_u - m|^2 - (U - 1) within) / (N - sum_u n_u^2 / N)

    Both are unbiased where users' items are drawn apart from each other. Where tau is not finite, as no user has
    two items or users do not differ by more than chance, it is the median ``n_u``.

    Parameters
    ----------
    volumes, centre, sums
        Sums over all users, as `tau_volumes`, `tau_centre` and `tau_sums` give them.
    counts : callable
        Returns the warm users' ``n_u``, on the host; called only where their median is needed.

    Returns
    -------
    dict
        ``tau``; ``tau_from``, "variances" or "median count"; ``within`` and ``between``, None where there is none.
    """
    total, warm = volumes.total, volumes.warm
    rounding = 1e-24 * (float(centre.mean @ centre.mean) + float(centre.distances.max()))
    freedom = total - warm
    within = sums[0] / freedom if freedom > 1e-9 * total else None
    between = None
    divisor = total - volumes.squares / total
    if within is not None and divisor > 1e-9 * total:
        between = (sums[1] - (warm - 1) * max(within, 0.0)) / divisor
    found = {"within": within, "between": between}
    if within is None or between is None or between <= rounding:
        return {"tau": float(np.median(counts())), "tau_from": "median count", **found}
    return {"tau": max(within, 0.0) / between, "tau_from": "variances", **found}


def lambda_statistics(values: Any, counts: Any) -> dict[str, Any]:
    """Mean, quantiles and histogram of some lambdas, and their mean by effective count n: ``2^k <= n < 2^(k+1)``."""
    if len(values) == 0:
        return {}
    at = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
    bars, edges = np.histogram(values, 20, (0.0, 1.0))
    powers = np.floor(np.log2(counts) + 1e-9).astype(int)
    by_count = [
        {"from": 2 ** int(k), "users": int((powers == k).sum()), "mean": float(values[powers == k].mean())}
        for k in np.unique(powers)
    ]
    return {
        "mean": float(values.mean()),
        "quantiles": {f"{q:g}": float(value) for q, value in zip(at, np.quantile(values, at), strict=True)},
        "histogram": {"edges": [float(edge) for edge in edges], "users": [int(bar) for bar in bars]},
        "by_count": by_count,
    }
