"""Peak memory of the whole job with ``--memory 500MB``, against the promised amount.

The promise is the sum of the interactions as CSR, one modality's features, the 500 MB, and 400 MB for Python and its
libraries.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from common import arguments, features, plot, process_cost, row, show, write_interactions
from job import job_command
from scale import Size

MEMORY = 500_000_000  # bytes, for --memory
LIBRARIES = 400_000_000  # bytes of Python and its libraries
MODALITIES = ("image", "text")


SIZES = {
    "quick": Size(20_000, 2_000, 200_000, 16, 8),
    "default": Size(1_500_000, 100_000, 15_000_000, 256, 8),
    "large": Size(10_000_000, 1_000_000, 100_000_000, 256, 8),
}


def main() -> None:
    given = arguments(__doc__)
    size = SIZES[given.size]
    csr = 8 * (size.users + 1) + 4 * size.interactions
    promised = csr + 4 * size.items * size.width + MEMORY + LIBRARIES
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "interactions.parquet"
        write_interactions(path, size.users, size.items, size.interactions)
        for seed, modality in enumerate(MODALITIES):
            np.save(folder / f"{modality}.npy", features("groups", size.items, size.width, seed))
        first, *others = [(modality, str(folder / f"{modality}.npy")) for modality in MODALITIES]
        command = job_command(str(path), first[1], size.users, folder / "out", size.clusters)
        for modality, values in others:
            command += ["--features", f"{modality}={values}"]
        cost = process_cost([*command, "--memory", f"{MEMORY // 10**6}MB"], warm_up=True)
    written = 4 * size.users * size.width * len(MODALITIES)
    facts = {"seconds": cost.seconds, "peak_mib": cost.peak >> 20, "promised_mib": promised >> 20}
    counts = {"users": size.users, "items": size.items, "interactions": size.interactions}
    more = {"D": size.width, "K": size.clusters, "modalities": len(MODALITIES), "written_mib": written >> 20}
    row(given.results / "memory.csv", **counts, **more, **facts)
    title = f"memory, {size.users:,} users, {size.interactions:,} interactions, two modalities of {size.width}"
    show(title, ["written MiB", "seconds", "peak MiB", "promised MiB"], [[written >> 20, *facts.values()]])
    bars = {"peak": [cost.peak / 2**20], "promised": [promised / 2**20]}
    plot(given.results / "memory.png", title, "MiB", ["--memory 500MB"], bars)


if __name__ == "__main__":
    main()
