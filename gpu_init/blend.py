"""The blend of local and global part: lambda policies, scale (section 2.6 and 2.7 of the design)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from .backend import Backend, in_blocks, ranges
from .config import Settings
from .features import Modality
from .interactions import Interactions
from .kernels import Csr
from .kernels.columns import of_columns

TEMPERATURE = 0.1  # of attention
NORM_ROWS = 4096  # norms are summed over ranges of so many rows, in order, whatever the size of a block


@dataclass(frozen=True)
class Weighting:
    """Row and item factors of the sparse operators of one modality, all float64.

    ``local = diag(local_rows) R diag(local_items)`` is A of section 2.3, ``means = diag(mean_rows) R
    diag(present)`` the interaction-weighted means D_U^-1 R. A row factor of 0 marks a cold user.
    """

    local_rows: Any
    local_items: Any
    mean_rows: Any
    present: Any

    @property
    def warm(self) -> Any:
        """Users with a usable interaction in this modality, (U,) bool."""
        return self.mean_rows > 0


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
    policy: dict[str, Any] | None = None  # what the manifest says of lambdas that are of each user


def of_users(fit: Blend, users: Any) -> Blend:
    """What the fused pass needs for some users (n,), one after another, with `Interactions.some` of them."""
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
        backend.xp.full(rows.stop - rows.start, fit.lam) if isinstance(fit.lam, float) else fit.lam[rows],
        fit.centroids,
        None if by_item else fit.user_labels[rows],
        fit.item_labels,
        fit.weighting.mean_rows[rows] if by_item else None,
        fit.cold,
        fit.scale,
        out,
    )
    return out


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


def global_part(backend: Backend, interactions: Interactions, fit: Blend, part: slice) -> Any:
    """Section 2.5: rows of G, (n, d) float64; those of cold users mean nothing."""
    xp = backend.xp
    if fit.item_labels is None:
        return fit.centroids[fit.user_labels[part]].astype(xp.float64)
    csr = interactions.csr.rows(part.start, part.stop)
    entries = slice(int(csr.indptr[0]), int(csr.indptr[-1]))
    labels = fit.item_labels[csr.indices[entries]]
    known = xp.concatenate([xp.ones(len(fit.centroids)), xp.zeros(1)])  # the last stands for items without a label
    table = xp.concatenate([fit.centroids, xp.zeros((1, fit.centroids.shape[1]), fit.centroids.dtype)])
    labels = xp.where(labels < 0, len(fit.centroids), labels).astype(xp.int32)
    weights = None if csr.weights is None else csr.weights[entries]
    by_label = Csr(csr.indptr - entries.start, labels, weights)
    nowhere = xp.zeros(fit.centroids.shape[1])
    return backend.kernels.aggregate(by_label, table, fit.weighting.mean_rows[part], known, nowhere)


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


# Scale.


def scale_to_items(backend: Backend, interactions: Interactions, fit: Blend, block_rows: int) -> float:
    """Give the factor that makes the mean row norm of X that of the items (section 2.7).

    Cold rows count, items without the modality do not. 1 where either norm is 0.
    """
    items = item_norms(backend, fit.modality)
    parts = in_blocks(
        backend, interactions.users, block_rows, NORM_ROWS, lambda part: blend(backend, interactions, fit, part)
    )
    users = norms(backend, (block for _, block in parts))
    return items["mean"] / users["mean"] if items["mean"] > 0 and users["mean"] > 0 else 1.0


def item_norms(backend: Backend, modality: Modality) -> dict[str, float]:
    """`norms` of the items that have a modality."""
    kept = modality.present
    return norms(backend, (modality.values[part][kept[part]] for part in ranges(len(kept), NORM_ROWS)))


def norms(backend: Backend, blocks: Iterator[Any]) -> dict[str, float]:
    """Mean, least and largest Euclidean norm of the rows of some blocks, in float64.

    Blocks must be cut at multiples of `NORM_ROWS` for the mean to come out the same whatever their size; an
    empty sequence gives zeros.
    """
    return norm_statistics([norm_sums(backend, blocks)])


class NormSums(NamedTuple):
    """Sum, count, least and largest of some norms."""

    total: float
    rows: int
    least: float
    most: float


def norm_sums(backend: Backend, blocks: Iterator[Any]) -> NormSums:
    """Norms of the rows of some blocks, which are cut as `norms` has it."""
    total, count, least, most = 0.0, 0, float("inf"), 0.0
    for block in blocks:
        lengths = backend.xp.sqrt(backend.kernels.lengths(block))
        for start in range(0, len(block), NORM_ROWS):
            part = lengths[start : start + NORM_ROWS]
            total += float(part.sum())
            count += len(part)
            least, most = min(least, float(part.min())), max(most, float(part.max()))
    return NormSums(total, count, least, most)


def norm_statistics(parts: Iterable[NormSums]) -> dict[str, float]:
    """What `norms` gives, from the sums over some parts, in order."""
    totals, counts, least, most = zip(*parts, strict=True)
    if not sum(counts):
        return {"mean": 0.0, "min": 0.0, "max": 0.0}
    return {"mean": sum(totals) / sum(counts), "min": min(least), "max": max(most)}
