"""`gpu_init.initialize()` against scipy's product, scikit-learn's K-means (one start) and a blend in numpy."""

from __future__ import annotations

from typing import Any, NamedTuple

import baselines
from common import alternate, arguments, features, matrix, plot, row, show

import gpu_init

OURS, BASELINE = "gpu-init", "scipy + scikit-learn + numpy"


class Size(NamedTuple):
    """Sizes of the data, and the number of timed repeats."""

    users: int
    items: int
    interactions: int
    width: int
    clusters: int
    repeats: int


SIZES = {
    "quick": Size(5_000, 500, 40_000, 32, 8, 1),
    "default": Size(300_000, 40_000, 4_000_000, 384, 8, 2),
    "large": Size(2_000_000, 200_000, 30_000_000, 384, 8, 3),
}


def main() -> None:
    given = arguments(__doc__, variants=True)
    size = SIZES[given.size]
    interactions = matrix(size.users, size.items, size.interactions)
    lines = []
    seconds: dict[str, list[float]] = {OURS: [], BASELINE: []}
    for variant in given.features:
        values = features(variant, size.items, size.width)
        centroids: dict[str, Any] = {}

        def ours(values: Any = values, found: dict[str, Any] = centroids) -> Any:
            settings = {"lam": baselines.LAMBDA, "clusters": size.clusters, "seed": 0, "backend": "cpu"}
            result = gpu_init.initialize(interactions, {"features": values}, **settings)["features"]  # type: ignore[arg-type]
            found[OURS] = result.centroids
            return result.users

        def baseline(values: Any = values, found: dict[str, Any] = centroids) -> Any:
            vectors, fitted = baselines.initialize(interactions, values, size.clusters, 0)
            found[BASELINE] = fitted.cluster_centers_
            return vectors

        taken = alternate({OURS: ours, BASELINE: baseline}, size.repeats)
        means = baselines.operator(interactions) @ values
        inertia = {name: baselines.inertia(means, found) for name, found in centroids.items()}
        facts = {
            "seconds": taken[OURS].median,
            "baseline_s": taken[BASELINE].median,
            "speedup": taken[BASELINE].median / taken[OURS].median,
            "inertia_ratio": inertia[OURS] / inertia[BASELINE],
        }
        counts = {"users": size.users, "items": size.items, "pairs": interactions.nnz}
        row(given.results / "initialize.csv", **counts, D=size.width, K=size.clusters, features=variant, **facts)
        lines.append([variant, *facts.values()])
        for name, values_taken in seconds.items():
            values_taken.append(taken[name].median)
    title = f"initialize(), {size.users:,} users, {interactions.nnz:,} pairs, D {size.width}, K {size.clusters}"
    show(title, ["features", "seconds", "baseline", "times faster", "inertia ratio"], lines)
    plot(given.results / "initialize.png", title, "seconds", given.features, seconds)


if __name__ == "__main__":
    main()
