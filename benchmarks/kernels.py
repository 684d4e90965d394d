"""The fused pass (gather, weigh, sum, blend, store) in several libraries, against a copy of the same bytes.

The pass reads the gathered rows and writes the result; a copy of half of these bytes reads and writes as much in all.
As the pass reads far more than it writes, it is also compared with reading all these bytes in order, which lets the
processor load memory ahead. Each result is compared with the reference before it is timed. The features are four times
as large as the last-level cache.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import baselines
import numpy as np
import scipy.sparse
from common import alternate, arguments, cache_bytes, copier, features, matrix, plot, reader, row, show

from gpu_init.backend.select import select
from gpu_init.kernels import BlendTerms
from gpu_init.kernels.arrays import empty
from gpu_init.kernels.reference import ReferenceKernels
from gpu_init.method.matrix import from_matrix

OURS, LIMIT, READ = "gpu-init", "copy of the same bytes", "read of the same bytes"
CLUSTERS = 8


class Size(NamedTuple):
    """Sizes of the data, and the number of timed repeats."""

    users: int
    interactions: int
    feature_bytes: int
    widths: tuple[int, ...]
    repeats: int


_WIDTHS = (64, 128, 256, 384)
SIZES = {
    "quick": Size(2_000, 20_000, 1 << 20, (64,), 1),
    "default": Size(150_000, 2_000_000, max(128 << 20, 4 * cache_bytes()), _WIDTHS, 3),
    "large": Size(500_000, 8_000_000, max(512 << 20, 8 * cache_bytes()), _WIDTHS, 5),
}


def main() -> None:
    given = arguments(__doc__)
    size = SIZES[given.size]
    if importlib.util.find_spec("torch") is None:
        print("torch is not installed: its rows are left out")
    lines = []
    seconds: dict[str, list[float]] = {}
    for width in size.widths:
        items = size.feature_bytes // (4 * width)
        interactions = matrix(size.users, items, size.interactions)
        bytes_moved = 4 * width * (interactions.nnz + size.users)
        functions = competitors(interactions, features("groups", items, width))
        limits = {LIMIT: copier(bytes_moved // 2), READ: reader(bytes_moved)}
        timings = alternate({**functions, **limits}, size.repeats, warm_up=False)
        for name, (median, _) in timings.items():
            seconds.setdefault(name, []).append(median)
            facts = {
                "seconds": median,
                "gb_per_s": bytes_moved / median / 1e9,
                "share_of_copy": timings[LIMIT].median / median,
                "share_of_read": timings[READ].median / median,
                "times_ours": median / timings[OURS].median,
            }
            counts = {"users": size.users, "items": items, "pairs": interactions.nnz, "D": width}
            row(given.results / "kernels.csv", **counts, kernel=name, **facts)
            lines.append([name, width, *facts.values()])
    title = f"fused pass, {size.users:,} users, features of {size.feature_bytes >> 20} MiB"
    show(title, ["function", "D", "seconds", "GB/s", "share of the copy", "share of the read", "times gpu-init"], lines)
    plot(given.results / "kernels.png", title, "seconds", [f"D {width}" for width in size.widths], seconds)


def competitors(interactions: Any, values: Any) -> dict[str, Callable[[], Any]]:
    """Give functions with the same result (U, D) float32, after a comparison of each with the reference."""
    kernels = select("cpu").with_kernels("numba").kernels
    ours = from_matrix(select("cpu"), interactions, "benchmark")
    users, width = ours.users, values.shape[1]
    rng = np.random.default_rng(1)
    centroids = rng.standard_normal((CLUSTERS, width), dtype=np.float32)
    labels = rng.integers(CLUSTERS, size=users).astype(np.int32)
    row_scale, item_scale = 1.0 / np.diff(ours.csr.indptr), np.ones(ours.items)
    lam, cold = np.full(users, baselines.LAMBDA), np.zeros(width)
    means = baselines.operator(interactions)
    out = empty((users, width), np.float32)

    def fused(implementation: Any) -> Any:
        terms = BlendTerms(lam, centroids, labels, None, None, cold, 1.0)
        implementation.aggregate_blend(ours.csr, values, row_scale, item_scale, terms, out)
        return out

    reference = ReferenceKernels(np, scipy.sparse)
    functions: dict[str, Callable[[], Any]] = {
        OURS: lambda: fused(kernels),
        "reference": lambda: fused(reference),
        "scipy + numpy": lambda: baselines.blend(means @ values, centroids, labels),
    }
    if importlib.util.find_spec("torch") is not None:
        functions |= baselines.torch_passes(means, values, centroids, labels)
    expected = fused(reference).copy()
    for name, function in functions.items():
        if not np.allclose(np.asarray(function()), expected, rtol=1e-4, atol=1e-5):
            raise SystemExit(f"{name}: the result differs from the reference.")
    return functions


if __name__ == "__main__":
    main()
