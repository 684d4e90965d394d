"""K-means of the users' means: ours against scikit-learn's, with and without the time to make its matrix.

Each of our forms starts from the interactions. All of them are timed at every size, which checks the rule that chooses
one of them: `picked` is the choice of `gpu_init.method.points.kmeans_form`. Inertia is relative to scikit-learn's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import baselines
import numpy as np
from common import alternate, arguments, features, matrix, plot, row, show

from gpu_init.backend.select import select
from gpu_init.method import kmeans
from gpu_init.method import points as method_points
from gpu_init.method.matrix import from_matrix
from gpu_init.method.points import kmeans_form
from gpu_init.method.points import matrix as matrix_of

MAKING, SKLEARN = "making the matrix", "scikit-learn"
OURS = ("dense", "tiled", "factored")


class Size(NamedTuple):
    """Sizes of the data, and the numbers of clusters."""

    users: int
    items: int
    interactions: int
    widths: tuple[int, ...]
    clusters: tuple[int, ...]


SIZES = {
    "quick": Size(10_000, 500, 40_000, (16,), (8,)),
    "default": Size(50_000, 20_000, 500_000, (64, 384), (8, 64)),
    "large": Size(100_000, 20_000, 1_000_000, (64, 384), (8, 64, 256)),
}


def main() -> None:
    given = arguments(__doc__, variants=True)
    size = SIZES[given.size]
    interactions = matrix(size.users, size.items, size.interactions)
    few = matrix(20_000, 100, 60_000)  # compiles the kernels before anything is timed
    for function in forms(few, features("noise", 100, 4), 4).values():
        function()
    lines = []
    groups: list[str] = []
    seconds: dict[str, list[float]] = {}
    for variant in given.features:
        for width in size.widths:
            values = features(variant, size.items, width)
            for clusters in size.clusters:
                taken, inertia = measure(interactions, values, clusters)
                facts: dict[str, Any] = {
                    "sklearn_s": taken[SKLEARN],
                    "sklearn_with_making_s": taken[SKLEARN] + taken[MAKING],
                    **{f"{form}_s": taken[form] for form in OURS},
                    **{f"{form}_inertia": inertia[form] / inertia[SKLEARN] for form in OURS},
                    "picked": kmeans_form(size.users, size.items, interactions.nnz, clusters, width),
                }
                counts = {"users": size.users, "items": size.items, "pairs": interactions.nnz, "D": width}
                row(given.results / "kmeans.csv", **counts, K=clusters, features=variant, **facts)
                lines.append([variant, width, clusters, *facts.values()])
                groups.append(f"{variant}\nD {width}\nK {clusters}")
                for name in (SKLEARN, MAKING, *OURS):
                    seconds.setdefault(name, []).append(taken[name])
    title = f"K-means on {size.users:,} users' means, {interactions.nnz:,} pairs, {size.items:,} items"
    columns = ["scikit-learn s", "+ making s", *(f"{form} s" for form in OURS), *(f"{form} inertia" for form in OURS)]
    show(title, ["features", "D", "K", *columns, "picked"], lines)
    plot(given.results / "kmeans.png", title, "seconds", groups, seconds)


def measure(interactions: Any, values: Any, clusters: int) -> tuple[dict[str, float], dict[str, float]]:
    """Give the seconds and the final inertia of each K-means, run in turn."""
    operator = baselines.operator(interactions)
    means = operator @ values
    centroids: dict[str, Any] = {}

    def keeping(name: str, function: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            centroids[name] = function()

        return run

    functions: dict[str, Callable[[], Any]] = {
        SKLEARN: keeping(SKLEARN, lambda: baselines.cluster(means, clusters, 0).cluster_centers_),
        MAKING: lambda: operator @ values,
        **{name: keeping(name, function) for name, function in forms(interactions, values, clusters).items()},
    }
    timings = alternate(functions, 1, warm_up=False)
    inertia = {name: baselines.inertia(means, found) for name, found in centroids.items()}
    return {name: timing.median for name, timing in timings.items()}, inertia


def forms(interactions: Any, values: Any, clusters: int) -> dict[str, Callable[[], Any]]:
    """Give our K-means in each of its forms, from the interactions to the centroids."""
    backend = select("cpu").with_kernels("numba")
    ours = from_matrix(backend, interactions, "benchmark")
    arguments = (backend, ours.csr, values, 1.0 / np.diff(ours.csr.indptr), np.ones(ours.items))

    def dense() -> method_points.Points:
        tiled = method_points.Tiled(*arguments)
        return method_points.Dense(backend, matrix_of(backend, tiled), tiled.offset)

    made: dict[str, Callable[[], method_points.Points]] = {
        "dense": dense,
        "tiled": lambda: method_points.Tiled(*arguments),
        "factored": lambda: method_points.Factored(*arguments),
    }

    def fitted(points: Callable[[], method_points.Points]) -> Callable[[], Any]:
        return lambda: kmeans.fit(backend, points(), clusters, 0).centroids

    return {name: fitted(points) for name, points in made.items()}


if __name__ == "__main__":
    main()
