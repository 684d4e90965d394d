"""Every implementation of the kernels against plain loops in float64."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import numba
import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from numba.core import caching

from gpu_init.errors import InputError
from gpu_init.kernels import Csr, cpu, cpu_kernels
from gpu_init.kernels import compiled as kernels_compiled
from gpu_init.kernels.compiled import compiled_serial
from gpu_init.kernels.cpu import NumbaKernels
from gpu_init.kernels.reference import ReferenceKernels

from .conftest import random_csr

IMPLEMENTATIONS = {"numba": NumbaKernels(), "reference": ReferenceKernels(np, scipy.sparse)}


def problem(seed, users, items, width, clusters, weighted):
    """Arguments of aggregate_blend; a fifth of the items are missing, their rows NaN."""
    rng = np.random.default_rng(seed)
    csr = random_csr(rng, users, items, weighted=weighted)
    features = rng.standard_normal((items, width)).astype(np.float32) + 1
    missing = rng.random(items) < 0.2
    features[missing] = np.nan
    item_scale = np.where(missing, 0.0, rng.uniform(0.2, 1, items))
    weights = np.ones(len(csr.indices)) if csr.weights is None else csr.weights
    rows = np.repeat(np.arange(users), np.diff(csr.indptr))
    usable = np.bincount(rows, weights=weights * ~missing[csr.indices], minlength=users) > 0
    row_scale = np.where(usable, rng.uniform(0.2, 1, users), 0.0)
    mean_scale = np.where(usable, rng.uniform(0.2, 1, users), 0.0)
    return {
        "csr": csr,
        "features": features,
        "row_scale": row_scale,
        "item_scale": item_scale,
        "lam": rng.random(users),
        "centroids": rng.standard_normal((clusters, width)).astype(np.float32),
        "user_labels": np.where(usable, rng.integers(0, clusters, users), -1).astype(np.int32),
        "item_labels": np.where(missing, -1, rng.integers(0, clusters, items)).astype(np.int32),
        "mean_scale": mean_scale,
        "cold": rng.standard_normal(width),
        "scale": 2.5,
    }


def by_loops(p, by_item):
    """The definition, one interaction after another."""
    csr, users, width = p["csr"], len(p["row_scale"]), p["features"].shape[1]
    out = np.zeros((users, width))
    for u in range(users):
        if p["row_scale"][u] == 0:
            out[u] = p["scale"] * p["cold"]
            continue
        local, mean = np.zeros(width), np.zeros(width)
        for e in range(csr.indptr[u], csr.indptr[u + 1]):
            i, w = csr.indices[e], 1.0 if csr.weights is None else float(csr.weights[e])
            if p["item_scale"][i] != 0:
                local += p["row_scale"][u] * w * p["item_scale"][i] * p["features"][i].astype(np.float64)
            if p["item_labels"][i] >= 0:
                mean += p["mean_scale"][u] * w * p["centroids"][p["item_labels"][i]].astype(np.float64)
        cluster_level = mean if by_item else p["centroids"][p["user_labels"][u]].astype(np.float64)
        out[u] = p["scale"] * (p["lam"][u] * local + (1 - p["lam"][u]) * cluster_level)
    return out


def blend_with(kernels, p, by_item):
    one_form = {"user_labels": None} if by_item else {"item_labels": None, "mean_scale": None}
    out = np.full((len(p["csr"].indptr) - 1, p["features"].shape[1]), np.nan, np.float32)
    kernels.aggregate_blend(**{**p, **one_form, "out": out})
    return out


@pytest.mark.parametrize("kernels", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@given(
    seed=st.integers(0, 2**32),
    users=st.integers(1, 60),
    items=st.integers(1, 30),
    width=st.sampled_from([1, 3, 8, 64, 100]),
    clusters=st.integers(1, 9),
    weighted=st.booleans(),
    by_item=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_blend_is_the_definition(kernels, seed, users, items, width, clusters, weighted, by_item):
    p = problem(seed, users, items, width, clusters, weighted)
    expected = by_loops(p, by_item)
    # sums run in float32: what is lost is a share of what was added, which may have cancelled
    np.testing.assert_allclose(
        blend_with(kernels, p, by_item), expected, rtol=1e-6, atol=1e-6 * max(1, np.ptp(expected))
    )


@pytest.mark.parametrize("kernels", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_aggregate_is_blend_with_lambda_one(kernels, weighted, dtype):
    p = problem(3, 200, 50, 33, 4, weighted)
    middle = np.linspace(-1, 1, 33)
    found = kernels.aggregate(p["csr"], p["features"], p["row_scale"], p["item_scale"], middle, dtype)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, dense_rows(p) - middle, rtol=1e-6, atol=1e-6)
    found = kernels.aggregate(p["csr"], p["features"], p["row_scale"], p["item_scale"], np.zeros(33), dtype)
    warm = p["row_scale"] > 0
    np.testing.assert_allclose(
        found[warm], by_loops({**p, "lam": np.ones(200), "scale": 1.0}, False)[warm], rtol=1e-6, atol=1e-6
    )
    assert not found[~warm].any()


@pytest.mark.parametrize("kernels", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_row_sums(kernels, rng, weighted):
    csr = random_csr(rng, 300, 40, weighted=weighted)
    values = rng.random(40)
    data = np.ones(len(csr.indices)) if csr.weights is None else csr.weights.astype(np.float64)
    expected = scipy.sparse.csr_matrix((data, csr.indices, csr.indptr), shape=(300, 40)) @ values
    np.testing.assert_allclose(kernels.row_sums(csr, values), expected, rtol=1e-12)


@pytest.mark.parametrize("kernels", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize("by_item", [False, True])
def test_a_range_of_users_gives_the_same_bytes_as_all(kernels, by_item):
    p = problem(5, 500, 60, 20, 5, True)
    whole = blend_with(kernels, p, by_item)
    part = dict(p, csr=p["csr"].rows(123, 387))
    for name in ("row_scale", "lam", "user_labels", "mean_scale"):
        part[name] = p[name][123:387]
    np.testing.assert_array_equal(blend_with(kernels, part, by_item), whole[123:387])


def test_no_users_is_no_rows():
    csr = Csr(np.zeros(1, np.int64), np.empty(0, np.int32), None)
    for kernels in IMPLEMENTATIONS.values():
        assert kernels.aggregate(
            csr, np.ones((3, 2), np.float32), np.empty(0), np.ones(3), np.zeros(2), np.float32
        ).shape == (0, 2)


def test_a_very_busy_user_loses_no_digits():
    count = 600_000
    csr = Csr(np.array([0, count], np.int64), np.arange(count, dtype=np.int32) % 1000, None)
    features = np.random.default_rng(0).standard_normal((1000, 4)).astype(np.float32) + 100
    found = IMPLEMENTATIONS["numba"].aggregate(
        csr, features, np.array([1 / count]), np.ones(1000), np.zeros(4), np.float32
    )
    np.testing.assert_allclose(found[0], features.mean(axis=0, dtype=np.float64), rtol=1e-6)


def test_the_environment_chooses(monkeypatch):
    monkeypatch.setenv("GPU_INIT_KERNELS", "numpy")
    assert cpu_kernels().name == "numpy"
    monkeypatch.setenv("GPU_INIT_KERNELS", "numba")
    assert cpu_kernels().name == "numba"
    monkeypatch.setenv("GPU_INIT_KERNELS", "cobol")
    with pytest.raises(InputError, match="cobol"):
        cpu_kernels()


def test_kernels_run_where_no_cache_can_be_kept(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    code = (
        "import numpy as np\n"
        "from gpu_init.kernels import Csr\n"
        "from gpu_init.kernels.cpu import NumbaKernels\n"
        "csr = Csr(np.array([0, 2]), np.array([0, 1], np.int32), None)\n"
        "print(NumbaKernels().row_sums(csr, np.array([1.0, 2.0]))[0])\n"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(blocked)}
    environment.pop("NUMBA_CACHE_DIR", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "3.0"


def dense_rows(p):
    """A F in float64, the operator's rows written out."""
    features = np.where(np.isnan(p["features"]), 0, p["features"]).astype(np.float64)
    return dense_operator(p) @ features


def dense_operator(p):
    csr = p["csr"]
    data = np.ones(len(csr.indices)) if csr.weights is None else csr.weights.astype(np.float64)
    R = scipy.sparse.csr_array((data, csr.indices, csr.indptr), shape=(len(p["row_scale"]), len(p["item_scale"])))
    return p["row_scale"][:, None] * R.toarray() * p["item_scale"]


@pytest.mark.parametrize("kernels", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_squared_norms(kernels, weighted):
    p = problem(11, 150, 40, 21, 3, weighted)
    middle = np.linspace(-1, 1, 21)
    found = kernels.squared_norms(p["csr"], p["features"], p["row_scale"], p["item_scale"], middle)
    np.testing.assert_allclose(found, ((dense_rows(p) - middle) ** 2).sum(axis=1), rtol=1e-10)


@pytest.mark.parametrize("kernels", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("clusters", [1, 2, 7])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_assign(kernels, rng, weighted, clusters, dtype):
    p = problem(12, 150, 40, 5, 3, weighted)
    table, lengths = rng.standard_normal((40, clusters)).astype(dtype), rng.random(clusters)
    rows = np.flatnonzero(rng.random(150) < 0.5)
    labels, least, second = kernels.assign(p["csr"], rows, table, p["row_scale"], p["item_scale"], lengths)
    scores = lengths - 2 * dense_operator(p)[rows] @ table.astype(np.float64)
    np.testing.assert_array_equal(labels, scores.argmin(axis=1))
    ordered = np.sort(np.column_stack([scores, np.full(len(rows), np.inf)]), axis=1)
    tolerance = 1e-5 if dtype == np.float32 else 1e-12
    np.testing.assert_allclose(least, ordered[:, 0], rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(second, ordered[:, 1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kernels", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("clusters", [3, 8, 64, 75])
def test_assign_of_busy_users(kernels, rng, weighted, clusters):
    count, items = 700, 90
    csr = Csr(
        np.array([0, 1, 1 + count, 4 + count], np.int64),
        rng.integers(0, items, 4 + count).astype(np.int32),
        rng.uniform(0.5, 2, 4 + count).astype(np.float32) if weighted else None,
    )
    p = {"csr": csr, "row_scale": np.array([1.0, 1 / count, 0.5]), "item_scale": np.ones(items)}
    table, lengths = rng.standard_normal((items, clusters)), rng.random(clusters)
    scales = (p["row_scale"], p["item_scale"])
    labels, least, _ = kernels.assign(csr, np.arange(3), table, *scales, lengths)
    scores = lengths - 2 * dense_operator(p) @ table
    np.testing.assert_array_equal(labels, scores.argmin(axis=1))
    np.testing.assert_allclose(least, scores.min(axis=1), rtol=1e-10)


@pytest.mark.parametrize("kernels", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize("items", [1, 2, 63, 129])
@pytest.mark.parametrize("clusters", [1, 4, 7])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_products(kernels, rng, items, clusters, dtype):
    features = rng.standard_normal((items, 37)).astype(np.float32) + 5
    features[items // 2] = np.nan
    points, middle = rng.standard_normal((clusters, 37)), np.full(37, 5.0)
    found = kernels.products(features, middle, points, dtype)
    assert found.dtype == dtype
    expected = (features.astype(np.float64) - middle) @ points.T
    tolerance = 1e-4 if dtype == np.float32 else 1e-12
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kernels", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_move_rows(kernels, rng, weighted):
    p = problem(14, 900, 30, 21, 3, weighted)
    middle = np.linspace(-1, 1, 21)
    rows = np.flatnonzero((p["row_scale"] > 0) & (rng.random(900) < 0.7))
    before, after = (rng.integers(-1, 4, len(rows)).astype(np.int32) for _ in range(2))
    sums = rng.standard_normal((4, 21))
    expected = sums.copy()
    for row, old, new in zip(dense_rows(p)[rows] - middle, before, after, strict=True):
        if old >= 0:
            expected[old] -= row
        if new >= 0:
            expected[new] += row
    scales = (p["row_scale"], p["item_scale"])
    kernels.move_rows(p["csr"], rows, p["features"], *scales, middle, before, after, sums)
    np.testing.assert_allclose(sums, expected, atol=2e-4)


def test_rows_are_stored_past_the_caches_only_where_they_may_be(monkeypatch):
    monkeypatch.setattr("gpu_init.kernels.cpu._STREAMED_BYTES", 0)
    p = problem(6, 300, 60, 20, 5, weighted=False)
    whole = blend_with(IMPLEMENTATIONS["numba"], p, by_item=False)
    space = np.full(300 * 20 + 4, np.nan, np.float32)
    start = next(at for at in range(4) if space[at:].ctypes.data % 16)
    out = space[start : start + 300 * 20].reshape(300, 20)
    IMPLEMENTATIONS["numba"].aggregate_blend(**{**p, "item_labels": None, "mean_scale": None, "out": out})
    np.testing.assert_array_equal(out, whole)


def test_loops_over_users_count_no_references():
    """That is done atomically, all threads in one place: it once took a third of the fused pass' time."""
    numba.njit(cpu._aggregate.py_func)(  # compiled here: what is kept on disk brings no code of inner functions
        np.array([0, 1]),
        np.array([0, 1]),
        np.zeros(1, np.int32),
        None,
        np.ones((1, 8), np.float32),
        np.ones(1),
        None,
        np.zeros(8),
        np.empty((1, 8), np.float32),
    )
    code = [text for function in (cpu._sum_items, cpu._add_listed) for text in function.inspect_llvm().values()]
    assert code
    assert not any("NRT_incref" in text for text in code)


@pytest.mark.parametrize("kernels", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_label_sums(kernels, rng):
    p = problem(13, 2000, 30, 2, 3, True)
    rows = np.flatnonzero(rng.random(2000) < 0.7)
    labels = rng.integers(0, 4, len(rows)).astype(np.int32)
    sums = np.ones((30, 4))
    kernels.label_sums(p["csr"], rows, labels, p["row_scale"], p["item_scale"], sums)
    np.testing.assert_allclose(sums - 1, dense_operator(p)[rows].T @ np.eye(4)[labels], rtol=1e-9)


@pytest.mark.parametrize("kernels", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_gram(kernels, rng, weighted):
    p = problem(13, 2000, 30, 2, 70, weighted)
    table = rng.standard_normal((30, 5))
    sums = np.ones((30, 5))
    kernels.gram(p["csr"], table, p["row_scale"], sums)
    matrix = dense_operator({**p, "row_scale": np.ones(2000), "item_scale": np.ones(30)})
    expected = matrix.T @ (p["row_scale"][:, None] * (matrix @ table))
    np.testing.assert_allclose(sums - 1, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kernels", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nearest_two(kernels, rng, dtype):
    products, lengths = rng.integers(0, 4, (500, 6)).astype(dtype), np.zeros(6)  # ties: the first wins
    labels, least, second = kernels.nearest_two(products, lengths)
    scores = -2.0 * products
    np.testing.assert_array_equal(labels, scores.argmin(axis=1))
    np.testing.assert_array_equal(np.column_stack([least, second]), np.sort(scores, axis=1)[:, :2])


@pytest.mark.parametrize("kernels", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_what_is_noted_decides_who_is_in_doubt(kernels, rng):
    count, clusters = 1000, 5
    labels = rng.integers(-1, clusters, count).astype(np.int32)
    upper, lower, norms = rng.random(count), rng.random(count), rng.random(count)
    rows = np.flatnonzero(rng.random(count) < 0.6)
    found = rng.integers(0, clusters, len(rows)).astype(np.int32)
    least, second = rng.uniform(-1, 1, len(rows)), rng.uniform(0, 2, len(rows))
    reach, fall = rng.random(clusters), 0.25
    expected = {"labels": labels.copy(), "upper": upper.copy(), "lower": lower.copy()}
    for at, row in enumerate(rows):
        expected["labels"][row] = found[at]
        expected["upper"][row] = max(least[at] + norms[row], 0) ** 0.5 - reach[found[at]]
        expected["lower"][row] = max(second[at] + norms[row], 0) ** 0.5 + fall
    earlier = labels[rows]
    before = kernels.note(rows, found, least, second, norms, reach, fall, labels, upper, lower)
    np.testing.assert_array_equal(before, earlier)
    for name, array in (("labels", labels), ("upper", upper), ("lower", lower)):
        np.testing.assert_allclose(array, expected[name], rtol=1e-15)
    labels[labels < 0] = 0
    doubtful = kernels.in_doubt(labels, upper, lower, reach, fall)
    wanted = [row for row in range(count) if upper[row] + reach[labels[row]] > lower[row] - fall]
    assert 0 < len(wanted) < count
    np.testing.assert_array_equal(doubtful, wanted)


def _twice(number):
    return 2 * number


def test_a_kernel_runs_where_its_machine_code_cannot_be_kept(monkeypatch, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(caching.FunctionCache, "save_overload", full)
    assert compiled_serial(_twice)(4) == 8


def test_of_processes_that_need_the_same_machine_code_one_makes_it(tmp_path):
    program = """if True:
        import sys, numpy
        from gpu_init.kernels import cpu
        print("ready", flush=True)
        sys.stdin.readline()
        cpu.NumbaKernels().lengths(numpy.ones((3, 4), "float32"))
        print(sum(cpu._lengths.stats.cache_misses.values()), sum(cpu._lengths.stats.cache_hits.values()))
    """
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    environment.pop("NUMBA_CACHE_DIR", None)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    processes = [subprocess.Popen([sys.executable, "-c", program], **pipes) for _ in range(3)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    said = sorted(process.communicate(timeout=120)[0] for process in processes)
    assert said == ["0 1\n", "0 1\n", "1 0\n"]


def test_whoever_is_stuck_is_not_waited_for_for_ever(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernels_compiled, "_PATIENCE", 0.2)
    (tmp_path / "gpu-init" / "numba").mkdir(parents=True)
    program = f"""if True:
        import fcntl, time
        file = open("{tmp_path}/gpu-init/numba/lock", "w")
        fcntl.lockf(file, fcntl.LOCK_EX)
        print("held", flush=True)
        time.sleep(60)
    """
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        assert compiled_serial(_twice)(4) == 8
        assert holder.poll() is None
        holder.kill()
