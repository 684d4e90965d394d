"""Growth of the whole job's time and memory, as users, interactions, D and K grow tenfold, one at a time.

In the last row users and interactions grow together, as they do in practice; with --large tenfold and a hundredfold, up
to 100 million interactions.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from common import Cost, arguments, features, plot, process_cost, row, show, write_interactions
from job import job_command


class Size(NamedTuple):
    """Size of one job."""

    users: int
    items: int
    interactions: int
    width: int
    clusters: int


BASES = {
    "quick": Size(2_000, 300, 20_000, 4, 4),
    "default": Size(100_000, 20_000, 1_000_000, 64, 8),
    "large": Size(100_000, 20_000, 1_000_000, 64, 8),
}


def main() -> None:
    given = arguments(__doc__)
    base = BASES[given.size]
    runs = {"base": base, **(grown(base, 10) if given.size != "quick" else {})}
    if given.size == "large":
        runs["users and interactions x100"] = grown(base, 100)["users and interactions x100"]
    lines = []
    costs = []
    for what, size in runs.items():
        cost = measure(size)
        facts = {
            "seconds": cost.seconds,
            "us_per_interaction": 1e6 * cost.seconds / size.interactions,
            "peak_mib": cost.peak >> 20,
        }
        counts = {"users": size.users, "items": size.items, "interactions": size.interactions}
        row(given.results / "scale.csv", grown=what, **counts, D=size.width, K=size.clusters, **facts)
        lines.append([what, *size, *facts.values()])
        costs.append(cost)
    columns = ["what grew", "users", "items", "interactions", "D", "K", "seconds", "us/interaction", "peak MiB"]
    title = "growth of the whole job"
    show(title, columns, lines)
    series = {"seconds": [cost.seconds for cost in costs], "peak GiB": [cost.peak / 2**30 for cost in costs]}
    plot(given.results / "scale.png", title, "seconds, GiB", [what.replace(" ", "\n") for what in runs], series)


def grown(base: Size, factor: int) -> dict[str, Size]:
    """Give sizes in which one dimension of the base, or users and interactions, are ``factor`` times larger."""
    users, interactions = factor * base.users, factor * base.interactions
    return {
        f"users x{factor}": base._replace(users=users),
        f"interactions x{factor}": base._replace(interactions=interactions),
        f"D x{factor}": base._replace(width=factor * base.width),
        f"K x{factor}": base._replace(clusters=factor * base.clusters),
        f"users and interactions x{factor}": base._replace(users=users, interactions=interactions),
    }


def measure(size: Size) -> Cost:
    """Write the input, and run the job on it in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = (folder / "interactions.parquet", folder / "features.npy")
        write_interactions(paths[0], size.users, size.items, size.interactions)
        np.save(paths[1], features("groups", size.items, size.width))
        command = job_command(str(paths[0]), str(paths[1]), size.users, folder / "out", size.clusters)
        return process_cost(command, warm_up=True)


if __name__ == "__main__":
    main()
