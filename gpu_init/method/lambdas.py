"""Lambda policies: how much of a user's vector is the user's own items."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from gpu_init.backend.interface import Backend, in_blocks, ranges
from gpu_init.config import Settings
from gpu_init.kernels.columns import of_columns
from gpu_init.method.blend import Blend, global_part
from gpu_init.method.matrix import Interactions
from gpu_init.method.modality import Modality
from gpu_init.method.norms import NORM_ROWS
from gpu_init.method.weighting import Weighting

TEMPERATURE = 0.1  # of attention


# Lambda policies.


@dataclass(frozen=True)
class Lambdas:
    """What a policy makes of lambda.

    Attributes
    ----------
    values : array, shape (U,), float64
        Of each user; 0 for cold users, who have no local part.
    facts : dict
        The policy, and what it went by.
    statistics : dict
        Of the warm users' lambdas: mean, quantiles, histogram, and the means by effective count of items.
    """

    values: Any
    facts: dict[str, Any]
    statistics: dict[str, Any]


def lambdas(backend: Backend, interactions: Interactions, fit: Blend, settings: Settings, block_rows: int) -> Lambdas:
    """Section 2.6: lambda of each user by the policy that the settings name; ``fit`` says all but lambda.

    Interactions count by their weight, and items without the modality not at all. The effective count of a user's
    items is ``n_u = (sum w)^2 / sum w^2`` (Kish 1965): the number of items where all weigh the same.
    """
    xp = backend.xp
    warm = fit.weighting.warm
    squares, counts = effective_counts(backend, interactions, fit.weighting)
    if settings.lam == "shrink":
        facts: dict[str, Any] = {"tau": settings.tau}
        if settings.tau is None:
            facts = shrink_tau(backend, interactions, fit, counts)
        values = xp.where(warm, counts / xp.where(warm, counts + facts["tau"], 1.0), 0.0)
    else:
        facts = {"temperature": TEMPERATURE if settings.temperature is None else settings.temperature}
        odds = attention(backend, interactions, fit, squares, block_rows) / facts["temperature"]
        values = xp.where(warm, 1.0 / (1.0 + xp.exp(xp.clip(-odds, -700.0, 700.0))), 0.0)  # exp stays finite
    host = (backend.to_host(part[warm]) for part in (values, counts))
    return Lambdas(values, {"policy": settings.lam, **facts}, lambda_statistics(*host))


def effective_counts(backend: Backend, interactions: Interactions, weighting: Weighting) -> tuple[Any, Any]:
    """Sums of the squared shares ``w / sum w`` of each user's items, and ``n_u`` (U,), 0 for cold users."""
    xp = backend.xp
    squares = interactions.square_sums(backend, weighting.mean_rows, weighting.present)
    warm = weighting.warm
    return squares, xp.where(warm, 1.0 / xp.where(warm, squares, 1.0), 0.0)


def shrink_tau(backend: Backend, interactions: Interactions, fit: Blend, counts: Any) -> dict[str, Any]:
    """Within-user over between-user variance of the features, both summed over the dimensions.

    The estimators of Buehlmann and Straub (1970) for credibility ``n / (n + tau)``, with the effective counts
    ``n_u`` as volumes. With ``M_u`` the user's mean, ``s_u`` the share-weighted mean of ``|F_i - M_u|^2`` over the
    user's items, N the sum of ``n_u`` over the U warm users, and ``m = sum_u n_u M_u / N``::

        within  = sum_u n_u s_u / sum_u (n_u - 1)
        between = (sum_u n_u |M_u - m|^2 - (U - 1) within) / (N - sum_u n_u^2 / N)

    Both are unbiased where users' items are drawn apart from each other. Where tau is not finite, as no user has
    two items or users do not differ by more than chance, it is the median ``n_u``.

    Returns
    -------
    dict
        ``tau``; ``tau_from``, "variances" or "median count"; ``within`` and ``between``, None where there is none.
    """
    volumes = tau_volumes(backend, interactions, fit.weighting, counts)
    centre = tau_centre(backend, fit.modality, volumes)
    sums = tau_sums(backend, interactions, fit.modality, fit.weighting, counts, centre)
    return tau_of(volumes, centre, sums, lambda: backend.to_host(counts[fit.weighting.warm]))


class Volumes(NamedTuple):
    """Sum of ``n_u`` and of its square, how many users are warm, ``sum_u n_u M_u`` by item (I,); may be of a part."""

    total: float
    squares: float
    warm: int
    by_item: Any


class Centre(NamedTuple):
    """``m`` (D,), and the squared distance of each item to it (I,), both float64."""

    middle: Any
    lengths: Any


def tau_volumes(backend: Backend, interactions: Interactions, weighting: Weighting, counts: Any) -> Volumes:
    """First sums of `shrink_tau` over some users."""
    by_item = interactions.item_sums(backend, counts * weighting.mean_rows)
    return Volumes(float(counts.sum()), float((counts * counts).sum()), int(weighting.warm.sum()), by_item)


def tau_centre(backend: Backend, modality: Modality, volumes: Volumes) -> Centre:
    """Of the volumes of all users."""
    xp = backend.xp
    by_item = xp.where(modality.present, volumes.by_item, 0.0) / volumes.total

    def items(part: slice) -> Any:
        return xp.where(modality.present[part][:, None], modality.values[part], 0.0).astype(xp.float64)

    parts = list(ranges(len(by_item), NORM_ROWS))
    middle = sum(backend.in_order(lambda part: by_item[part] @ items(part), parts))
    lengths = xp.concatenate(list(backend.in_order(lambda part: ((items(part) - middle) ** 2).sum(axis=1), parts)))
    return Centre(middle, lengths)


def tau_sums(
    backend: Backend, interactions: Interactions, modality: Modality, weighting: Weighting, counts: Any, centre: Centre
) -> tuple[float, float]:
    """``sum_u n_u s_u`` and ``sum_u n_u |M_u - m|^2`` over some users."""
    xp, rows, present, kernels = backend.xp, weighting.mean_rows, weighting.present, backend.kernels

    def of_slice(columns: slice, features: Any) -> Any:
        """What some columns add to each user's distance (U,): in float64, since small differences of it count."""
        found = xp.empty(interactions.users)
        for part in ranges(interactions.users, NORM_ROWS):
            csr = interactions.csr.rows(part.start, part.stop)
            found[part] = kernels.lengths(kernels.aggregate(csr, features, rows[part], present, centre.middle[columns]))
        return found

    apart = sum(of_columns(modality.values, of_slice))
    apart = xp.where(weighting.warm, apart, 0.0)
    inside = xp.where(weighting.warm, rows * interactions.user_degrees(backend, centre.lengths * present) - apart, 0.0)
    return float((counts * inside).sum()), float((counts * apart).sum())


def tau_of(volumes: Volumes, centre: Centre, sums: tuple[float, float], counts: Callable[[], Any]) -> dict[str, Any]:
    """What `shrink_tau` gives, from the sums over all users; ``counts`` gives the warm users' n_u, on the host."""
    total, warm = volumes.total, volumes.warm
    least = 1e-24 * (float(centre.middle @ centre.middle) + float(centre.lengths.max()))  # below is only rounding
    freedom = total - warm
    within = sums[0] / freedom if freedom > 1e-9 * total else None
    between = None
    spread = total - volumes.squares / total
    if within is not None and spread > 1e-9 * total:
        between = (sums[1] - (warm - 1) * max(within, 0.0)) / spread
    found = {"within": within, "between": between}
    if within is None or between is None or between <= least:
        return {"tau": float(np.median(counts())), "tau_from": "median count", **found}
    return {"tau": max(within, 0.0) / between, "tau_from": "variances", **found}


def attention(backend: Backend, interactions: Interactions, fit: Blend, squares: Any, block_rows: int) -> Any:
    """``s_L - s_G`` of each user (U,): mean cosine of the items among themselves, less that to the user's ``G_u``.

    Pairs are of two items and count by the product of their shares p, so that with the items' unit vectors f the
    first is ``(|sum p f|^2 - sum p^2 |f|^2) / (1 - sum p^2)``; 0 for a single item. The second is
    ``sum p f . G_u / |G_u|``. A cosine to a vector of length 0 is 0.

    ``squares``: the sums of p^2 (U,).
    """
    xp, kernels = backend.xp, backend.kernels
    values, rows = fit.modality.values, fit.weighting.mean_rows
    lengths = xp.where(fit.modality.present, xp.sqrt(kernels.lengths(values)), 0.0)
    directed = lengths > 0
    to_unit = xp.where(directed, 1.0 / xp.where(directed, lengths, 1.0), 0.0)
    with_themselves = interactions.square_sums(backend, rows, directed.astype(xp.float64))
    several = 1.0 - squares > 1e-9

    def of_slice(columns: slice, features: Any) -> Any:
        """What some columns add to each user's (U,), the lengths of single items with the first."""
        nowhere = xp.zeros(features.shape[1])

        def make(part: slice) -> Any:
            csr = interactions.csr.rows(part.start, part.stop)
            own = kernels.aggregate(csr, features, rows[part], to_unit, nowhere)
            pairs = xp.where(several[part], 1.0 - squares[part], 1.0)
            alone = 0.0 if columns.start else with_themselves[part]
            among = xp.where(several[part], (kernels.lengths(own) - alone) / pairs, 0.0)
            level = global_part(backend, interactions, fit, part)
            length = xp.sqrt(kernels.lengths(level))
            return among - (own * level[:, columns]).sum(axis=1) / xp.where(length > 0, length, 1.0)

        parts = in_blocks(backend, interactions.users, block_rows, NORM_ROWS, make)
        return xp.concatenate([made for _, made in parts])

    return sum(of_columns(values, of_slice))


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
