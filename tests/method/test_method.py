"""`initialize` and the steps of the method against the float64 oracle."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

import gpu_init
from gpu_init.errors import InputError
from tests.support import oracle


def catalogue(seed=0, users=400, items=80, width=12, weighted=True):
    """A small R with empty users and duplicates, and features of two modalities with missing items."""
    rng = np.random.default_rng(seed)
    count = users * 4
    u, i = rng.integers(0, users, count), rng.integers(0, items, count)
    u[u % 17 == 0] = 1
    w = rng.integers(1, 6, count) if weighted else np.ones(count)
    R = scipy.sparse.coo_array((w.astype(float), (u, i)), shape=(users, items))
    F = {"image": rng.standard_normal((items, width)) + 3, "text": rng.standard_normal((items, 2 * width))}
    F["image"][rng.random(items) < 0.2] = np.nan
    return R, {name: values.astype(np.float32) for name, values in F.items()}


def check(R, F, one, *, lam, cluster_on, weighting, dim, whiten, scale):
    """Hold one modality's result to the oracle."""
    F = F.astype(np.float64)
    present = ~np.isnan(F[:, 0])
    if dim is not None:
        oracle.assert_close(one.items, oracle.projected(F, dim, whiten))
        np.testing.assert_array_equal(one.items_mask, present)
        F = one.items
    expected = oracle.Expected(R, F, present)
    if cluster_on == "users":
        points, labels = expected.M[expected.warm], one.labels[expected.warm]
        assert one.item_labels is None
    else:
        points, labels = expected.F[present], one.item_labels[present]
        np.testing.assert_array_equal(one.item_labels < 0, ~present)
        oracle.assert_nearest(expected.M[expected.warm], one.centroids, one.labels[expected.warm])
    oracle.assert_nearest(points, one.centroids, labels)
    oracle.assert_means(points, one.centroids, labels)
    np.testing.assert_array_equal(one.labels < 0, ~expected.warm)
    X, factor = expected.users(one.centroids, one.labels, one.item_labels, lam, weighting, scale)
    assert one.scale == pytest.approx(factor, rel=1e-6)
    oracle.assert_close(one.users, X)


@pytest.mark.parametrize(
    ("weighting", "cluster_on", "projection", "scale"),
    list(
        itertools.product(
            ["mean", "sym"], ["users", "items"], [(None, False), (5, False), (5, True)], ["none", "items"]
        )
    ),
)
def test_every_form_is_the_method(weighting, cluster_on, projection, scale):
    R, F = catalogue()
    form = {
        "cluster_on": cluster_on,
        "weighting": weighting,
        "dim": projection[0],
        "whiten": projection[1],
        "scale": scale,
    }
    result = gpu_init.initialize(R, F, lam=0.7, clusters=5, **form)
    assert list(result) == ["image", "text"]
    for name, one in result.items():
        check(R, F[name], one, lam=0.7, **form)


@given(
    seed=st.integers(0, 2**32),
    users=st.integers(3, 60),
    items=st.integers(3, 30),
    lam=st.floats(0, 1),
    weighted=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_any_catalogue(seed, users, items, lam, weighted):
    R, F = catalogue(seed, users, items, 6, weighted)
    try:
        result = gpu_init.initialize(R, F, lam=lam, clusters=2)
    except InputError as error:
        assert "image" in str(error)  # nobody warm, or one, or no item at all
        return
    for name, one in result.items():
        check(R, F[name], one, lam=lam, cluster_on="users", weighting="mean", dim=None, whiten=False, scale="none")


def test_defaults_are_those_of_the_design():
    R, F = catalogue()
    given_all = gpu_init.initialize(
        R, F, lam=0.9, clusters=8, weighting="mean", cluster_on="users", dim=None, scale="none", dtype="float32", seed=0
    )
    default = gpu_init.initialize(R, F)
    for name in F:
        np.testing.assert_array_equal(default[name].users, given_all[name].users)


def test_sparse_formats_and_order_do_not_matter():
    R, F = catalogue()
    coo = R.tocoo()
    order = np.random.default_rng(1).permutation(coo.nnz)
    shuffled = scipy.sparse.coo_array((coo.data[order], (coo.row[order], coo.col[order])), shape=R.shape)
    expected = gpu_init.initialize(R.tocsr(), F)
    for other in (shuffled, R.tocsc(), scipy.sparse.csr_matrix(R), R.tolil(), R.todok()):
        found = gpu_init.initialize(other, F)
        for name in F:
            np.testing.assert_array_equal(found[name].users, expected[name].users)


def test_one_seed_one_result_another_seed_another():
    R, F = catalogue(users=3000)
    first, again, other = (gpu_init.initialize(R, F, clusters=20, seed=seed)["text"] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.users, again.users)
    assert (first.labels != other.labels).any()


def test_both_kinds_of_kernels_give_the_same(monkeypatch):
    R, F = catalogue()
    monkeypatch.setenv("GPU_INIT_KERNELS", "numba")
    fast = gpu_init.initialize(R, F)
    monkeypatch.setenv("GPU_INIT_KERNELS", "numpy")
    plain = gpu_init.initialize(R, F)
    for name in F:
        oracle.assert_close(fast[name].users, plain[name].users, 1e-6)


@pytest.mark.parametrize("kernels", ["numpy", "numba"])
def test_the_number_of_threads_does_not_change_a_byte(tmp_path, kernels):
    code = (
        "import hashlib, sys; sys.path.insert(0, sys.argv[1])\n"
        "import gpu_init\n"
        "from tests.method.test_method import catalogue\n"
        "R, F = catalogue(users=30000, items=3000, width=40)\n"
        "made = gpu_init.initialize(R, F, clusters=12, dim=20, whiten=True, scale='items', weighting='sym')\n"
        "digest = hashlib.sha256()\n"
        "for one in made.values():\n"
        "    for array in (one.users, one.centroids, one.labels, one.items): digest.update(array.tobytes())\n"
        "print(digest.hexdigest())\n"
    )
    import os
    from pathlib import Path

    root = str(Path(__file__).parents[2])
    digests = set()
    for threads in ("1", "3"):
        limits = dict.fromkeys(("NUMBA_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)
        limits["GPU_INIT_KERNELS"] = kernels
        done = subprocess.run(
            [sys.executable, "-c", code, root], env={**os.environ, **limits}, capture_output=True, text=True, check=True
        )
        digests.add(done.stdout)
    assert len(digests) == 1


def test_duplicates_are_summed_and_zeros_are_no_interaction():
    F = {"image": np.eye(3, dtype=np.float32)}
    R = scipy.sparse.coo_array(([1.0, 1, 2, 0], ([0, 0, 0, 1], [0, 0, 1, 2])), shape=(2, 3))
    one = gpu_init.initialize(R, F, lam=1.0, clusters=1)["image"]
    np.testing.assert_allclose(one.users, [[0.5, 0.5, 0], [0.5, 0.5, 0]], rtol=1e-6)  # user 1 is cold
    np.testing.assert_array_equal(one.labels, [0, -1])


def test_fewer_distinct_users_than_clusters():
    R = scipy.sparse.csr_array(np.ones((6, 2)))
    one = gpu_init.initialize(R, {"image": np.eye(2, dtype=np.float32)}, clusters=3)["image"]
    np.testing.assert_allclose(one.users, np.full((6, 2), 0.5), rtol=1e-6)


def test_an_item_missing_in_one_modality_counts_in_the_other():
    R = scipy.sparse.csr_array(np.array([[1.0, 1.0]]))
    F = {"image": np.array([[1.0, 0], [np.nan, np.nan]], np.float32), "text": np.array([[2.0], [4.0]], np.float32)}
    result = gpu_init.initialize(R, F, clusters=1)
    np.testing.assert_allclose(result["image"].users, [[1, 0]])
    np.testing.assert_allclose(result["text"].users, [[3]])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_dtype_of_the_users(dtype):
    R, F = catalogue()
    one = gpu_init.initialize(R, F, dtype=dtype)["text"]
    assert one.users.dtype == dtype
    np.testing.assert_array_equal(one.users, gpu_init.initialize(R, F)["text"].users.astype(dtype))


def test_float16_that_would_overflow_is_refused():
    R, F = catalogue()
    with pytest.raises(InputError, match=r"text.*float16"):
        gpu_init.initialize(R, {"image": F["image"], "text": F["text"] * 1e5}, dtype="float16")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lam": 1.5}, "lambda"),
        ({"lam": float("nan")}, "lambda"),
        ({"clusters": 0}, "clusters"),
        ({"clusters": 10_000}, "clusters"),
        ({"cluster_on": "items", "clusters": 75}, "items"),
        ({"cluster_on": "moods"}, "cluster_on|cluster-on"),
        ({"weighting": "max"}, "weighting"),
        ({"dim": 13}, "dim"),
        ({"dim": 0}, "dim"),
        ({"whiten": True}, "whiten"),
        ({"scale": "users"}, "scale"),
        ({"dtype": "float8"}, "dtype"),
        ({"seed": -1}, "seed"),
        ({"backend": "tpu"}, "backend"),
    ],
)
def test_wrong_settings(change, words):
    R, F = catalogue()
    with pytest.raises(InputError, match=words):
        gpu_init.initialize(R, F, **change)


@pytest.mark.parametrize(
    ("interactions", "features", "words"),
    [
        (np.ones((3, 4)), {"a": np.ones((4, 2))}, "sparse"),
        (scipy.sparse.csr_array(-np.eye(4)), {"a": np.ones((4, 2))}, "-1.0"),
        (scipy.sparse.csr_array(np.eye(4) * np.nan), {"a": np.ones((4, 2))}, "nan"),
        (scipy.sparse.csr_array(np.eye(4)), {"a": np.ones((5, 2))}, "5 rows"),
        (scipy.sparse.csr_array(np.eye(4)), {}, "features"),
        (scipy.sparse.csr_array(np.eye(4)), {"a": np.ones(4)}, "a"),
        (scipy.sparse.csr_array(np.eye(4)), {"a": np.full((4, 2), np.inf)}, "a"),
        (scipy.sparse.csr_array((4, 4)), {"a": np.ones((4, 2))}, "no user"),
    ],
)
def test_wrong_arrays(interactions, features, words):
    with pytest.raises(InputError, match=words):
        gpu_init.initialize(interactions, features, clusters=1)


def test_torch_features_are_taken():
    torch = pytest.importorskip("torch")
    R, F = catalogue()
    expected = gpu_init.initialize(R, {"text": F["text"]})["text"].users
    tensor = torch.from_numpy(F["text"].copy())
    np.testing.assert_array_equal(gpu_init.initialize(R, {"text": tensor})["text"].users, expected)
    parameter = torch.nn.Parameter(tensor)
    np.testing.assert_array_equal(gpu_init.initialize(R, {"text": parameter})["text"].users, expected)
    half = gpu_init.initialize(R, {"text": tensor.to(torch.bfloat16)})["text"].users
    rounded = gpu_init.initialize(R, {"text": tensor.to(torch.bfloat16).float()})["text"].users
    np.testing.assert_array_equal(half, rounded)


def test_arrays_given_are_not_changed():
    R, F = catalogue()
    R = R.tocsr()
    before = R.copy(), {name: values.copy() for name, values in F.items()}
    gpu_init.initialize(R, F, dim=4)
    assert (before[0] != R).nnz == 0
    for name, values in F.items():
        np.testing.assert_array_equal(values, before[1][name])
