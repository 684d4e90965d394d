"""Threads and memory of the CPU kernels, and how they are compiled."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import tracemalloc

import numpy as np
import pytest
import scipy.sparse
from numba import types

from gpu_init.errors import InputError
from gpu_init.kernels import NUMPY_SECONDS, BlendTerms, Csr, compiled, costs, cpu_kernels, kernels_for, threads
from gpu_init.kernels.cpu import NumbaKernels
from gpu_init.kernels.reference import ReferenceKernels
from tests.conftest import with_threads
from tests.kernels.test_kernels import TWINS
from tests.support.kernel_problems import IMPLEMENTATIONS, many_ranges, problem

# Threads, and memory.


def test_the_number_of_threads_does_not_change_a_byte():
    p, kernels, found = problem(22, 4000, 300, 33, 7, weighted=True), IMPLEMENTATIONS["numba"], []
    for count in (1, 3):
        with with_threads(count), many_ranges():
            found.append([call(kernels, p, np.random.default_rng(0))[0] for call in TWINS.values()])
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_core_is_left_to_another_thread():
    def threads_that_run():
        seen = set()
        threads.run(lambda _: (seen.add(threading.get_ident()), time.sleep(0.002)), [slice(0, 1)] * 60)
        return len(seen)

    for count in (1, 3):
        with with_threads(count):
            assert 1 <= threads_that_run() <= count
            with threads.leaving_a_core():
                assert 1 <= threads_that_run() <= max(1, count - 1)


@pytest.mark.parametrize(("given", "count"), [("1", "1"), ("3", "3"), ("no", None), ("0", None)])
def test_the_environment_says_how_many_threads(monkeypatch, given, count):
    monkeypatch.setenv("NUMBA_NUM_THREADS", given)
    assert threads.cores() == int(count or len(os.sched_getaffinity(0)))


def peak_beside_the_result(call):
    """Most bytes that a call takes at a time, beside what it gives."""
    tracemalloc.start()
    kept = call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak - sum(one.nbytes for one in (kept if isinstance(kept, tuple) else [kept]) if one is not None)


def test_the_reference_keeps_to_its_blocks():
    """Rows (U, D) in float64 would be 61 MB, where the values of a block are 0.5 MB."""
    users, items, width, clusters = 120_000, 500, 64, 60
    rng = np.random.default_rng(0)
    indices = rng.integers(0, items, 2 * users).astype(np.int32)
    csr = Csr(np.arange(0, 2 * users + 1, 2), indices, rng.random(2 * users, "f4"))
    kernels = ReferenceKernels(np, scipy.sparse)
    kernels.block_values, kernels.block_entries = 1 << 16, 1 << 14
    features, ones, of_items = rng.random((items, width), "f4"), np.ones(users), np.ones(items)
    labels, table, sums = np.zeros(users, np.int32), rng.random((items, clusters)), np.zeros((items, clusters))
    out, rows = np.empty((users, width), "f4"), np.ones((users, width), "f4")
    centroids, item_labels = rng.random((clusters, width), "f4"), np.zeros(items, np.int32)
    local, nowhere = (csr, features, ones, of_items), np.zeros(width)
    by_user = BlendTerms(ones, centroids, labels, None, None, nowhere, 1.0)
    by_item = BlendTerms(ones, centroids, None, item_labels, ones, nowhere, 1.0)
    calls = {
        "lengths": lambda: kernels.lengths(rows),
        "row_sums": lambda: kernels.row_sums(csr, of_items),
        "squared_norms": lambda: kernels.squared_norms(csr, features, ones, of_items, np.zeros(width)),
        "products": lambda: kernels.products(rows, np.zeros(width), np.ones((2, width))),
        "assign": lambda: kernels.assign(csr, table, ones, of_items, np.zeros(clusters)),
        "label_sums": lambda: kernels.label_sums(csr, labels, ones, of_items, sums),
        "gram": lambda: kernels.gram(csr, table, ones, sums),
        "table_sums": lambda: kernels.table_sums(np.ones((users, 2)), rows),
        "by user": lambda: kernels.aggregate_blend(*local, by_user, out),
        "by item": lambda: kernels.aggregate_blend(*local, by_item, out),
    }
    for name, call in calls.items():
        peak = peak_beside_the_result(call)
        assert peak < 6 << 20, f"{name}: {peak} bytes"


@pytest.mark.parametrize(
    "name",
    [
        "squared_norms",
        "assign",
        "by user",
        "by item",
        "gram",
    ],
)
def test_blocks_of_the_reference_take_no_table_of_all_items(name):
    """That would be 20 MB in float64, and as many values to go through for each of a hundred blocks."""
    users, items, width, degree = 2000, 40_000, 64, 100
    rng = np.random.default_rng(0)
    indices = rng.integers(0, items, degree * users).astype(np.int32)
    csr = Csr(np.arange(0, degree * users + 1, degree), indices, None)
    kernels = ReferenceKernels(np, scipy.sparse)
    kernels.block_values, kernels.block_entries = 1 << 16, 1 << 15
    features, table, sums = rng.random((items, width), "f4"), rng.random((items, width)), np.zeros((items, width))
    ones, of_items, nowhere, out = np.ones(users), np.ones(items), np.zeros(width), np.empty((users, width), "f4")
    labels, item_labels = np.zeros(users, np.int32), np.zeros(items, np.int32)
    local = (csr, features, ones, of_items)
    by_user = BlendTerms(ones, features[:3], labels, None, None, nowhere, 1.0)
    by_item = BlendTerms(ones, features[:3], None, item_labels, ones, nowhere, 1.0)
    calls = {
        "squared_norms": lambda: kernels.squared_norms(csr, features, ones, of_items, nowhere),
        "assign": lambda: kernels.assign(csr, table, ones, of_items, nowhere),
        "gram": lambda: kernels.gram(csr, table, ones, sums),
        "by user": lambda: kernels.aggregate_blend(*local, by_user, out),
        "by item": lambda: kernels.aggregate_blend(*local, by_item, out),
    }
    assert peak_beside_the_result(calls[name]) < 6 << 20


@pytest.mark.parametrize("kind", [NumbaKernels, lambda: ReferenceKernels(np, scipy.sparse)])
def test_table_sums_are_added_up_as_they_come(kind):
    """A block's is 30 kB, and there are 1,250."""
    kernels = kind()
    kernels.block_values = 1 << 10
    table, features = np.ones((20_000, 60)), np.ones((20_000, 64), np.float32)
    assert peak_beside_the_result(lambda: kernels.table_sums(table, features)) < 6 << 20


# Which of them run.


def test_work_of_seconds_goes_to_numba(monkeypatch):
    monkeypatch.delenv("GPU_INIT_KERNELS", raising=False)
    assert kernels_for(0) == kernels_for(NUMPY_SECONDS) == "numpy"
    assert kernels_for(NUMPY_SECONDS + 1e-6) == "numba"
    for name in ("numpy", "numba"):
        monkeypatch.setenv("GPU_INIT_KERNELS", name)
        assert kernels_for(0) == kernels_for(1e9) == name
        assert cpu_kernels(kernels_for(0)).name == name
    monkeypatch.setenv("GPU_INIT_KERNELS", "cobol")
    with pytest.raises(InputError, match="cobol"):
        kernels_for(0)


def test_seconds_grow_with_every_size():
    sizes = {"users": 10**6, "items": 10**5, "pairs": 10**7, "widths": [64, 128], "clusters": 8}
    seconds = costs.fitting_seconds(**sizes)
    for name, more in {"users": 2 * 10**6, "items": 2 * 10**5, "pairs": 2 * 10**7, "clusters": 9}.items():
        assert costs.fitting_seconds(**{**sizes, name: more}) > seconds
    assert costs.fitting_seconds(**{**sizes, "widths": [64, 129]}) > seconds
    assert costs.fitting_seconds(**{**sizes, "widths": [64, 128, 1]}) > seconds
    assert costs.fitting_seconds(**sizes, on_interactions=True) > seconds
    assert costs.fitting_seconds(**sizes, candidates=3) == 3 * seconds
    sizes["clusters"] = "auto"
    assert costs.fitting_seconds(**sizes) == costs.fitting_seconds(**{**sizes, "clusters": 64})
    assert costs.reading_seconds(0, 10**8) > costs.reading_seconds(0, 10**7) > costs.reading_seconds(0, 0) == 0
    assert costs.reading_seconds(10**7, 0) > costs.reading_seconds(10**6, 0)


# How numba's are compiled.


def test_arrays_are_copied_only_where_they_must_be(tmp_path):
    whole = np.arange(6.0).reshape(2, 3)
    view = compiled.read_only(whole, np.float64)
    assert np.shares_memory(view, whole)
    assert not view.flags.writeable
    assert whole.flags.writeable
    np.save(tmp_path / "mapped.npy", whole)
    mapped = np.load(tmp_path / "mapped.npy", mmap_mode="r")
    assert np.shares_memory(compiled.read_only(mapped, np.float64), mapped)
    assert type(compiled.read_only(mapped, np.float64)) is np.ndarray
    for other in (compiled.read_only(whole, np.float32), compiled.read_only(whole.T, np.float64)):
        assert not np.shares_memory(other, whole)
        assert other.flags.c_contiguous


ALONE = """
import numpy as np
from gpu_init.kernels import Csr
from gpu_init.kernels.cpu import NumbaKernels
csr = Csr(np.array([0, 2]), np.array([0, 1], np.int32), None)
print(NumbaKernels().row_sums(csr, np.array([1.0, 2.0]))[0])
"""


def alone(**environment):
    """What one kernel says in a process of its own."""
    given = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"} | environment
    done = subprocess.run([sys.executable, "-c", ALONE], env=given, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_kernels_run_where_no_cache_can_be_kept(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    assert alone(XDG_CACHE_HOME=str(blocked)) == "3.0"
    assert not list(tmp_path.glob("*/"))


def _twice(number):
    return 2 * number


def test_threads_that_need_the_same_kernel_compile_it_once():
    from concurrent.futures import ThreadPoolExecutor

    one = compiled.kernel(types.int64)(_twice)
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: one.prepare(), range(4)))
    assert len({id(function) for function in made}) == 1
    assert one(4) == 8
