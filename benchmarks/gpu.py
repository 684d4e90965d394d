"""On a CUDA device: the fused pass, K-means, the method on arrays, the job from files, and a small job.

The fused pass is compared with the libraries and with a copy of the same bytes: those of each interaction's row of
features, of its item number, and of the result. A copy of half of them reads and writes as much in all. The features
are four times as large as the second-level cache, and 200 MB at least. Items are drawn with equal probabilities
(``alike``), so that none stays in the caches, and by popularity (``popular``), as in practice. Each result is compared
with the reference before it is timed, by the device's own clock.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import baselines
import numpy as np
from common import arguments, row, show, write_interactions
from common import features as features_on_host

from gpu_init.kernels import BlendTerms, Csr, cuda
from gpu_init.method import kmeans
from gpu_init.method import points as method_points

OURS, LIMIT = "gpu-init", "copy of the same bytes"
CLUSTERS = 8
DEGREE = 13
POPULARITY_EXPONENT = 0.8  # Zipf exponent of an item's popularity, by rank
LEAST_FEATURE_BYTES = 200_000_000
CACHES = 4
JOB_WIDTH = 1024


class Size(NamedTuple):
    """Sizes of the data, and the number of timed repeats.

    ``users`` is their number in the fused pass and in the job from files, which is reduced for more than 128 columns;
    ``clustered`` is the number of users in K-means and in the method on arrays.
    """

    users: int
    clustered: int
    least_bytes: int
    widths: tuple[int, ...]
    repeats: int


_WIDTHS = (128, 256, 384, 1024)
SIZES = {
    "quick": Size(20_000, 20_000, 1 << 22, (64,), 3),
    "default": Size(2_000_000, 4_000_000, LEAST_FEATURE_BYTES, _WIDTHS, 20),
    "large": Size(8_000_000, 8_000_000, 4 * LEAST_FEATURE_BYTES, _WIDTHS, 20),
}


def main() -> None:
    given = arguments(__doc__)
    size = SIZES[given.size]
    cuda.choose_cache_folder()
    missing = no_device()
    if missing:
        print(f"benchmarks/gpu.py: nothing is measured: {missing}")
        return
    cupy = importlib.import_module("cupy")
    properties = cupy.cuda.runtime.getDeviceProperties(0)
    device = {"gpu": properties["name"].decode(), "cupy": cupy.__version__}
    lines = []
    for width in size.widths:
        n_bytes = max(size.least_bytes, CACHES * properties["l2CacheSize"] if given.size != "quick" else 0)
        items, users = -(-n_bytes // (2 * width)), of_width(size, width)
        values = features(cupy, items, width)
        for draw, exponent in (("alike", 0.0), ("popular", POPULARITY_EXPONENT)):
            interactions = drawn(cupy, users, items, exponent)
            for kind, facts in fused(cupy, interactions, values, size.repeats):
                counts = {"users": users, "items": items, "pairs": interactions.pairs, "D": width, "drawn": draw}
                row(given.results / "gpu.csv", **device, **counts, **kind, **facts)
                lines.append([*kind.values(), width, draw, *facts.values()])
    columns = ["function", "features", "D", "drawn", "ms", "GB/s", "share of the copy", "times gpu-init"]
    show(f"fused pass on {device['gpu']}, mean degree {DEGREE}", columns, lines)
    absent = [name for name in ("cuml", "cudf") if importlib.util.find_spec(name) is None]
    if absent:
        print(f"{' and '.join(absent)} not installed: K-means and the whole job are left out")
        return
    whole_jobs(cupy, given.results, size, device)
    from_files(given.results, size, device, ("cuda", "cpu"))
    small_job(given.results, device)


def of_width(size: Size, width: int) -> int:
    """Give the number of users whose rows of ``width`` columns take as many bytes as those of 128 columns."""
    return size.users * 128 // max(width, 128)


def no_device() -> str:
    """Give the reason why nothing can be measured on this machine, or an empty text."""
    try:
        cupy = importlib.import_module("cupy")
        return "" if cupy.cuda.runtime.getDeviceCount() else "no CUDA device"
    except ImportError as error:
        return f"cupy cannot be imported ({error})"
    except RuntimeError as error:
        return f"no CUDA device ({error})"


class Drawn(NamedTuple):
    """Interactions on the device, without duplicates, at least one of each user.

    ``indptr`` are row pointers, int64; ``indices`` are items, int32; ``shape`` is (U, I).
    """

    indptr: Any
    indices: Any
    shape: tuple[int, int]

    @property
    def pairs(self) -> int:
        return len(self.indices)

    @property
    def csr(self) -> Csr:
        return Csr(self.indptr, self.indices, None)

    def matrix(self, cupy: Any, means: bool) -> Any:
        """Give cupyx's matrix (U, I) float32, of ones or of the weights that make users' means."""
        from cupyx.scipy.sparse import csr_matrix

        values = cupy.ones(self.pairs)
        if means:
            owners = cupy.searchsorted(self.indptr, cupy.arange(self.pairs), side="right") - 1
            values /= cupy.diff(self.indptr)[owners]
        arrays = (values.astype(np.float32), self.indices, self.indptr.astype(np.int32))
        return csr_matrix(arrays, shape=self.shape)


def drawn(cupy: Any, users: int, items: int, exponent: float) -> Drawn:
    """Draw interactions of mean degree `DEGREE`; an item's probability is its rank to the power of ``-exponent``."""
    rng = cupy.random.RandomState(0)
    count = (DEGREE - 1) * users
    who = cupy.concatenate([cupy.arange(users), rng.randint(0, users, count, dtype=np.int64)])
    popularity = cupy.cumsum(cupy.arange(1.0, items + 1) ** -exponent)
    what = cupy.searchsorted(popularity, rng.random_sample(len(who)) * popularity[-1], side="right")
    pairs = cupy.unique(who * items + rng.permutation(items)[cupy.minimum(what, items - 1)])
    del who, what
    indptr = cupy.searchsorted(pairs, cupy.arange(users + 1) * items)
    return Drawn(indptr.astype(np.int64), (pairs % items).astype(np.int32), (users, items))


def features(cupy: Any, items: int, width: int) -> Any:
    """Give features (I, D) float32 such as those of the other benchmarks: noise about 20 centres."""
    rng = cupy.random.RandomState(0)
    values = rng.standard_normal((items, width), dtype=np.float32)
    values += rng.standard_normal((20, width), dtype=np.float32)[rng.randint(0, 20, items)]
    return values


# The fused pass.


def fused(
    cupy: Any, interactions: Drawn, values: Any, repeats: int
) -> Iterator[tuple[dict[str, str], dict[str, float]]]:
    """Time each function with float32 and float16 features; yield what it was and what it took."""
    users, width = interactions.shape[0], values.shape[1]
    for kind in ("float32", "float16"):
        table = values.astype(kind)
        n_bytes = interactions.pairs * (table.itemsize * width + 4) + users * width * table.itemsize
        taken = {}
        for name, function in ways(cupy, interactions, table).items():
            with leaving_out(f"{name}, D {width}, {kind}"):
                taken[name] = seconds(cupy, function, repeats)
            cupy.get_default_memory_pool().free_all_blocks()
        half = cupy.ones(n_bytes // 8, cupy.float32)
        other = cupy.zeros_like(half)
        taken[LIMIT] = seconds(cupy, partial(cupy.copyto, other, half), repeats)
        del half, other
        for name, each in sorted(taken.items(), key=lambda one: one[1]):
            facts = {"ms": 1e3 * each, "gb_per_s": n_bytes / each / 1e9}
            facts |= {"share_of_copy": taken[LIMIT] / each, "times_ours": each / taken[OURS]}
            yield {"kernel": name, "features": kind}, facts


def ways(cupy: Any, interactions: Drawn, table: Any) -> dict[str, Callable[[], Any]]:
    """Give functions with the same result (U, D), of the features' dtype, after a comparison with the reference."""
    import cupyx.scipy.sparse

    users, width = interactions.shape[0], table.shape[1]
    rng = cupy.random.RandomState(1)
    centroids = rng.standard_normal((CLUSTERS, width), dtype=np.float32)
    labels = rng.randint(0, CLUSTERS, users).astype(np.int32)
    row_scale, item_scale = 1.0 / cupy.diff(interactions.indptr), cupy.ones(len(table))
    lam, cold = cupy.full(users, baselines.LAMBDA), cupy.zeros(width)
    kernels = cuda.CudaKernels(cupy, cupyx.scipy.sparse)
    out = cupy.empty((users, width), table.dtype)
    means = interactions.matrix(cupy, means=True)

    def ours() -> Any:
        terms = BlendTerms(lam, centroids, labels, None, None, cold, 1.0)
        kernels.aggregate_blend(interactions.csr, table, row_scale, item_scale, terms, out)
        return out

    functions: dict[str, Callable[[], Any]] = {OURS: ours}
    if table.dtype == np.float32:  # cupyx has no sparse product in float16
        functions["cupyx product + blend"] = lambda: baselines.blend(means @ table, centroids, labels)
    if importlib.util.find_spec("torch") is not None:
        functions |= torch_ways(means, table, centroids, labels)
    else:
        print("torch is not installed: its rows are left out")
    sample = cupy.arange(0, users, max(1, users // 1000))
    expected = baselines.blend((means[sample] @ table.astype(np.float32)), centroids, labels[sample])
    tolerance = 1e-4 if table.dtype == np.float32 else 1e-2
    for name, function in functions.items():
        with leaving_out(f"{name}, D {width}, {table.dtype}, compared with the reference"):
            found = cupy.asarray(function())[sample].astype(np.float32)
            if not cupy.allclose(found, expected, rtol=tolerance, atol=tolerance):
                raise SystemExit(f"{name}: the result differs from the reference.")
            del found
    return functions


@contextmanager
def leaving_out(name: str) -> Iterator[None]:
    """Print a message and go on where another library fails, most likely for lack of memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if name.startswith(OURS):
            raise
        print(f"{name}: left out: {next(iter(str(error).splitlines()), type(error).__name__)}")


def torch_ways(means: Any, table: Any, centroids: Any, labels: Any) -> dict[str, Callable[[], Any]]:
    """Give the pass in torch: by cuSPARSE's product with a row-major matrix, and by a scatter-add of E x D rows."""
    torch = importlib.import_module("torch")
    values, centres, groups = (torch.from_dlpack(array) for array in (table, centroids, labels.astype(np.int64)))
    starts, columns, weights = (torch.from_dlpack(array) for array in (means.indptr, means.indices, means.data))
    centres, weights = centres.to(values.dtype), weights.to(values.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns that sparse CSR is in beta
        csr = torch.sparse_csr_tensor(starts, columns, weights, size=means.shape)
    everyone = torch.arange(means.shape[0], device=values.device)
    users, items = torch.repeat_interleave(everyone, starts.diff().long()), columns.long()

    def blended(local: Any) -> Any:
        return local.mul_(baselines.LAMBDA).add_(((1 - baselines.LAMBDA) * centres)[groups])

    def scattered() -> Any:
        rows = values[items].mul_(weights[:, None])
        return blended(
            torch.zeros(means.shape[0], values.shape[1], dtype=values.dtype, device=values.device).index_add_(
                0, users, rows
            )
        )

    return {"cuSPARSE by rows + blend": lambda: blended(csr @ values), "torch scatter-add + blend": scattered}


def seconds(cupy: Any, function: Callable[[], Any], repeats: int, warm_ups: int = 3) -> float:
    """Give the median seconds by the device's clock, after some runs that are not counted."""
    taken = []
    for turn in range(repeats + warm_ups):
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        cupy.cuda.Device().synchronize()
        begin.record()
        result = function()
        end.record()
        end.synchronize()
        del result
        if turn >= warm_ups:
            taken.append(float(cupy.cuda.get_elapsed_time(begin, end)) / 1e3)
    return statistics.median(taken)


# K-means and the method on arrays, which need RAPIDS.


class Problem(NamedTuple):
    """Interactions, features, and the weights that make users' means, on the device."""

    backend: Any
    interactions: Drawn
    table: Any
    means: Any

    def user_means(self) -> Any:
        """Make the users' means, (U, D) float32."""
        return self.backend.asarray(self.means @ self.table)


def problem(cupy: Any, users: int, width: int) -> Problem:
    """Draw interactions of ``users`` users with a tenth as many items."""
    from gpu_init.backend.select import select

    cupy.get_default_memory_pool().free_all_blocks()  # so that the backend's own pool can take this memory
    backend, items = select("cuda"), max(1000, users // 10)
    interactions = drawn(cupy, users, items, POPULARITY_EXPONENT)
    return Problem(backend, interactions, features(cupy, items, width), interactions.matrix(cupy, means=True))


def library(matrix: Any) -> Any:
    """Fit cuML's K-means."""
    return (
        importlib.import_module("cuml.cluster")
        .KMeans(n_clusters=CLUSTERS, init="scalable-k-means++", n_init=1, random_state=0, output_type="cupy")
        .fit(matrix)
    )


def clusterings(cupy: Any, p: Problem) -> Iterator[tuple[str, dict[str, float]]]:
    """Time K-means of the users' means: ours, cuML's and flash-kmeans's, whose memory torch holds and nobody counts."""
    dense = p.user_means()

    def factored() -> Any:
        row_scale = 1.0 / cupy.diff(p.interactions.indptr)
        points = method_points.Factored(p.backend, p.interactions.csr, p.table, row_scale, cupy.ones(len(p.table)))
        return kmeans.fit(p.backend, points, CLUSTERS, 0).centroids

    functions: dict[str, Callable[[], Any]] = {
        f"{OURS}, factored": factored,
        "cuML, matrix made": lambda: library(dense).cluster_centers_,
        "cuML, with making": lambda: library(p.user_means()).cluster_centers_,
    }
    if importlib.util.find_spec("flash_kmeans") is not None and importlib.util.find_spec("torch") is not None:
        flash = importlib.import_module("flash_kmeans").batch_kmeans_Euclid
        torch = importlib.import_module("torch")
        functions["flash-kmeans, matrix made"] = lambda: cupy.from_dlpack(
            flash(torch.from_dlpack(dense)[None], n_clusters=CLUSTERS, tol=1e-4)[1][0]
        )
    else:
        print("flash-kmeans is not installed: its row is left out")
    points = method_points.Dense(p.backend, dense)
    for name, function in functions.items():
        with leaving_out(name):
            inertia = points.step(cupy.asnumpy(function())).inertia
            facts = cost(cupy, function)
            if name.startswith("flash"):
                del facts["gb_beside"]
            yield f"K-means, {name}", {**facts, "inertia": inertia}


def jobs(cupy: Any, p: Problem) -> Iterator[tuple[str, dict[str, float]]]:
    """Time the whole method on arrays: `initialize()`, and the libraries."""
    import gpu_init

    settings: dict[str, Any] = {"lam": baselines.LAMBDA, "clusters": CLUSTERS, "seed": 0, "backend": "cuda"}
    ones = p.interactions.matrix(cupy, means=False)

    def ours() -> Any:
        return gpu_init.initialize(ones, {"text": p.table}, **settings)["text"].users

    def by_libraries() -> Any:
        local = p.user_means()
        fitted = library(local)
        return baselines.blend(local, fitted.cluster_centers_, fitted.labels_)

    for name, function in {OURS: ours, "cuSPARSE + cuML + cupy": by_libraries}.items():
        with leaving_out(name):
            yield f"job, {name}", cost(cupy, function)


def whole_jobs(cupy: Any, results: Path, size: Size, device: dict[str, str]) -> None:
    """Time K-means and the whole method on arrays, and show both tables."""
    width = min(size.widths, key=lambda width: abs(width - JOB_WIDTH))
    p = problem(cupy, size.clustered, width)
    users, items = p.interactions.shape
    counts = {"users": users, "items": items, "pairs": p.interactions.pairs, "D": width, "K": CLUSTERS}
    for title, ways in (("K-means", clusterings), ("job", jobs)):
        lines: list[list[Any]] = []
        own: dict[str, float] = {}
        for name, facts in ways(cupy, p):
            row(results / "gpu.csv", **device, **counts, kernel=name, **facts)
            own = own or facts
            ratios = (facts[fact] / own[fact] if fact in facts else "" for fact in own)
            lines.append([name, *(facts.get(fact, "") for fact in own), *ratios])
        columns = ["function", *own, *(f"{fact} / {OURS}" for fact in own)]
        show(f"{title} on {device['gpu']}, {users:,} users, D {width}, K {CLUSTERS}", columns, lines)


def cost(cupy: Any, function: Callable[[], Any]) -> dict[str, float]:
    """Give the median milliseconds of three runs, and the GB of device memory that a run takes at most."""
    memory = importlib.import_module("rmm.mr").get_current_device_resource()
    taken = seconds(cupy, function, 3, warm_ups=1)
    memory.push_counters()
    function()
    return {"ms": 1e3 * taken, "gb_beside": memory.pop_counters().peak_bytes / 1e9}


# From files to an artifact.


def from_files(results: Path, size: Size, device: dict[str, str], backends: tuple[str, ...]) -> None:
    """Run the command twice on each backend, and show the steps of the second run, as the first one compiles."""
    from gpu_init import load
    from gpu_init.cli import main as run

    width = min(size.widths, key=lambda width: abs(width - JOB_WIDTH))
    users = of_width(size, width)
    items = max(1000, users // 10)
    counts = {"users": users, "items": items, "pairs": DEGREE * users, "D": width, "K": CLUSTERS}
    lines = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_interactions(folder / "clicks.parquet", users, items, DEGREE * users)
        np.save(folder / "text.npy", features_on_host("groups", items, width))
        given = [f"--interactions={folder}/clicks.parquet", f"--features=text={folder}/text.npy", "--overwrite"]
        for backend in backends:
            for _ in range(2):
                with redirect_stdout(io.StringIO()):
                    code = run(["run", *given, f"--backend={backend}", f"--clusters={CLUSTERS}", f"--out={folder}/out"])
                if code != 0:
                    raise SystemExit(f"the job on {backend} failed.")
            timings = load(folder / "out").manifest["timings"]
            steps = [*timings["steps"], {"step": "in all", "seconds": timings["seconds"]}]
            for step in steps:
                facts = {"kernel": f"files, {backend}: {step['step']}", "ms": 1e3 * step["seconds"]}
                row(results / "gpu.csv", **device, **counts, **facts)
                lines.append(list(facts.values()))
    show(f"from files, {users:,} users, D {width}, K {CLUSTERS}", ["step", "ms"], lines)


# A small job in a new process.

_SMALL = """
import json, sys, time
start, taken = time.perf_counter(), {}

def step(name):
    global start
    now = time.perf_counter()
    taken[name], start = now - start, time.perf_counter()

import numpy as np, scipy.sparse
step("import numpy and scipy")
import gpu_init
from gpu_init.backend.select import select
step("import gpu_init")
device = select("cuda")
step("import CuPy and cuDF, and make the pool")
device.xp.zeros(1).sum().get()
step("make the context, and launch a first kernel of CuPy's")
rng = np.random.default_rng(0)
ones = scipy.sparse.random(9308, 6710, 0.001, format="csr", dtype=np.float32, rng=rng)
ones.data[:] = 1
features = rng.standard_normal((6710, 128), dtype=np.float32)
for name in ("first job", "second job"):
    result = gpu_init.initialize(ones, {"f": features}, backend="cuda", kmeans=sys.argv[1])
    result["f"].users.get()
    step(name)
print(json.dumps(taken))
"""


def small_job(results: Path, device: dict[str, str]) -> None:
    """Time the steps of a job of TikTok's size in a new process, for each K-means; compiled code is kept."""
    lines = []
    for kmeans_of in ("own", "cuml"):
        command = [sys.executable, "-c", _SMALL, kmeans_of]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        for name, spent in json.loads(done.stdout.splitlines()[-1]).items():
            facts = {"kernel": f"small job, K-means {kmeans_of}: {name}", "ms": 1e3 * spent}
            row(results / "gpu.csv", **device, **facts)
            lines.append(list(facts.values()))
    show("a small job in a new process", ["step", "ms"], lines)


if __name__ == "__main__":
    main()
