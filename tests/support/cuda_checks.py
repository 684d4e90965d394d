"""What the CUDA kernels must do, wherever they run: on a device (tests/gpu) or built for the host (test_cuda_kernels).

Needs numpy alone, so that a machine with a GPU needs little else.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from gpu_init.kernels import BlendTerms, Csr

FEATURE_TYPES = ("float32", "float16")


class Where(NamedTuple):
    """The kernels, and how arrays get to them and back."""

    kernels: Any
    put: Any
    get: Any

    def put_all(self, p):
        csr = Csr(*map(self.put, p["csr"]))
        return {**{name: self.put(value) for name, value in p.items() if name != "csr"}, "csr": csr}


def random_rows(rng, degrees, items, weighted, wide=True, offset=0):
    """Interactions of users with so many items each, items in any order and repeated, starting at some offset."""
    ends = np.concatenate([[0], np.cumsum(degrees)]) + offset
    count = int(ends[-1]) + 3
    return Csr(
        ends.astype(np.int64 if wide else np.int32),
        rng.integers(0, items, count).astype(np.int32),
        rng.uniform(0.1, 5, count).astype(np.float32) if weighted else None,
    )


def random_degrees(rng, users, mean=5.0, longest=()):
    """Degrees with empty rows, and some rows of given degrees in between."""
    degrees = rng.poisson(mean, users)
    degrees[rng.random(users) < 0.15] = 0
    for place, degree in enumerate(longest):
        degrees[(2 * place + 1) % users] = degree
    return degrees


def as_type(values, name):
    """Float32 values in a type, and what they are then."""
    typed = values.astype(name)
    return typed, typed.astype(np.float32)


def problem(seed, degrees, items, width, clusters=4, weighted=True, features="float32", wide=True, offset=0):
    """Arguments of aggregate_blend but `out`; a fifth of the items are missing, their rows NaN.

    ``plain``: the features as float32, whatever their type.
    """
    rng = np.random.default_rng(seed)
    users = len(degrees)
    csr = random_rows(rng, degrees, items, weighted, wide, offset)
    plain = rng.standard_normal((items, width)).astype(np.float32) + 1
    missing = rng.random(items) < 0.2
    plain[missing] = np.nan
    typed, plain = as_type(plain, features)
    rows, entries = own(csr)
    usable = np.bincount(rows, weights=~missing[csr.indices[entries]], minlength=users) > 0
    return {
        "csr": csr,
        "features": typed,
        "plain": plain,
        "row_scale": np.where(usable, rng.uniform(0.2, 1, users) / np.maximum(degrees, 1), 0.0),
        "item_scale": np.where(missing, 0.0, rng.uniform(0.2, 1, items)),
        "lam": rng.random(users),
        "centroids": rng.standard_normal((clusters, width)).astype(np.float32),
        "user_labels": np.where(usable, rng.integers(0, clusters, users), -1).astype(np.int32),
        "item_labels": np.where(missing, -1, rng.integers(0, clusters, items)).astype(np.int32),
        "mean_scale": rng.uniform(0.2, 1, users) / np.maximum(degrees, 1),  # of cold users too, who get none of it
        "cold": rng.standard_normal(width),
        "scale": 2.5,
    }


def own(csr):
    """Row within the range, and entry, of each interaction."""
    rows = np.repeat(np.arange(len(csr.indptr) - 1), np.diff(csr.indptr))
    return rows, np.arange(int(csr.indptr[0]), int(csr.indptr[-1]))


def operator_times(csr, row_scale, item_scale, table):
    """``diag(row_scale) R diag(item_scale) table`` in float64, and the sum of what was added, without signs."""
    rows, entries = own(csr)
    items = csr.indices[entries]
    weights = np.ones(len(entries)) if csr.weights is None else csr.weights[entries].astype(np.float64)
    values = row_scale[rows] * weights * item_scale[items]
    used = values != 0
    total = np.zeros((len(row_scale), table.shape[1]))
    added = np.zeros_like(total)
    for start in range(0, len(rows), 4096):
        some = slice(start, start + 4096)
        kept = used[some]
        terms = values[some][kept, None] * table[items[some][kept]].astype(np.float64)
        np.add.at(total, rows[some][kept], terms)
        np.add.at(added, rows[some][kept], np.abs(terms))
    return total, added


def expected_blend(p, by_item):
    """The definition, and the sizes of what is added: sums in float32 are off by a share of these."""
    local, added = operator_times(p["csr"], p["row_scale"], p["item_scale"], p["plain"])
    if by_item:
        labelled = (p["item_labels"] >= 0).astype(np.float64)
        level, more = operator_times(p["csr"], p["mean_scale"], labelled, p["centroids"][p["item_labels"]])
    else:
        level = p["centroids"][p["user_labels"]].astype(np.float64)
        more = np.abs(level)
    lam = p["lam"][:, None]
    result = p["scale"] * (lam * local + (1 - lam) * level)
    sizes = p["scale"] * (lam * added + (1 - lam) * more)
    cold = p["row_scale"] == 0
    result[cold] = p["scale"] * p["cold"]
    sizes[cold] = np.abs(result[cold])
    return result, sizes


def blend(where, p, by_item, dtype=np.float32):
    on = where.put_all({name: value for name, value in p.items() if name != "plain"})
    on |= {"user_labels": None} if by_item else {"item_labels": None, "mean_scale": None}
    out = where.put(np.full((len(p["lam"]), p["plain"].shape[1]), np.nan, dtype))
    call_blend(where.kernels, {**on, "scale": p["scale"]}, out)
    return where.get(out)


def call_blend(kernels, given, out):
    """Hand a kernel the arguments that it takes, out of those of a problem."""
    terms = BlendTerms(**{name: given[name] for name in BlendTerms._fields})
    kernels.aggregate_blend(given["csr"], given["features"], given["row_scale"], given["item_scale"], terms, out)


ERROR = 1.5e-6  # of some 25 additions in float32, where an item comes again and again and all round the same way


def check_blend(where, p, by_item, dtype=np.float32):
    found = blend(where, p, by_item, dtype)
    expected, sizes = expected_blend(p, by_item)
    if dtype == np.float16:
        allowed = np.abs(expected) * 2.0**-11 + 2.0**-25 + ERROR * sizes
    else:
        allowed = ERROR * sizes
    assert (np.abs(found.astype(np.float64) - expected) <= allowed + 1e-30).all()


def check_bytes_of_a_range(where, p, by_item, part):
    whole = blend(where, p, by_item)
    some = dict(p, csr=p["csr"].rows(part.start, part.stop))
    for name in ("row_scale", "lam", "user_labels", "mean_scale"):
        some[name] = p[name][part]
    np.testing.assert_array_equal(blend(where, some, by_item), whole[part])


def check_overflow(where):
    """Values beyond float16 become infinite, as in IEEE rounding; those that just fit stay."""
    csr = Csr(np.arange(5), np.arange(4, dtype=np.int32), None)
    features = np.array([[65504.0], [65519.0], [65520.0], [-1e30]], np.float32)
    one = {"csr": csr, "features": features, "plain": features, "row_scale": np.ones(4), "item_scale": np.ones(4)}
    one |= {"lam": np.ones(4), "centroids": np.zeros((1, 1), np.float32), "user_labels": np.zeros(4, np.int32)}
    one |= {"item_labels": None, "mean_scale": None, "cold": np.zeros(1), "scale": 1.0}
    found = blend(where, one, False, np.float16)[:, 0]
    np.testing.assert_array_equal(found, np.array([65504, 65504, np.inf, -np.inf], np.float16))


def check_aggregate(where, p):
    width = p["plain"].shape[1]
    on = where.put_all(p)
    offset = np.linspace(-1, 1, width)
    arrays = (on["csr"], on["features"], on["row_scale"], on["item_scale"], where.put(offset))
    found = where.get(where.kernels.aggregate(*arrays))
    expected, added = operator_times(p["csr"], p["row_scale"], p["item_scale"], p["plain"])
    assert found.dtype == np.float64
    assert (np.abs(found - (expected - offset)) <= 1e-13 * (added + np.abs(offset))).all()


def check_squared_norms(where, p):
    on = where.put_all(p)
    offset = np.linspace(-1, 1, p["plain"].shape[1])
    arrays = (on["csr"], on["features"], on["row_scale"], on["item_scale"], where.put(offset))
    expected, _ = operator_times(p["csr"], p["row_scale"], p["item_scale"], p["plain"])
    found = where.get(where.kernels.squared_norms(*arrays))
    np.testing.assert_allclose(found, ((expected - offset) ** 2).sum(axis=1), rtol=1e-11)


def check_row_sums(where, p):
    on = where.put_all(p)
    values = np.random.default_rng(1).random(len(p["item_scale"]))
    expected, _ = operator_times(p["csr"], np.ones(len(p["lam"])), np.ones(len(values)), values[:, None])
    found = where.get(where.kernels.row_sums(on["csr"], where.put(values)))
    np.testing.assert_allclose(found, expected[:, 0], rtol=1e-12)


def check_lengths(where, dtype, width):
    rows = np.random.default_rng(2).standard_normal((77, width)).astype(dtype)
    found = where.get(where.kernels.lengths(where.put(rows)))
    np.testing.assert_allclose(found, (rows.astype(np.float64) ** 2).sum(axis=1), rtol=1e-12)


def check_assign(where, p, clusters):
    rng = np.random.default_rng(3)
    on = where.put_all(p)
    table, norms = rng.standard_normal((len(p["item_scale"]), clusters)), rng.random(clusters)
    arrays = (on["csr"], where.put(table), on["row_scale"], on["item_scale"], where.put(norms))
    labels, least = map(where.get, where.kernels.assign(*arrays))
    scores = norms - 2 * operator_times(p["csr"], p["row_scale"], p["item_scale"], table)[0]
    cold = p["row_scale"] == 0
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels, np.where(cold, -1, scores.argmin(axis=1)))
    np.testing.assert_allclose(least, np.where(cold, 0.0, scores.min(axis=1)), rtol=1e-11, atol=1e-12)


def check_equal_scores(where, clusters):
    """Users of one item each, whose products are whole numbers: of equal scores the first centroid's wins."""
    table = np.random.default_rng(4).integers(0, 4, (501, clusters)).astype(np.float64)
    csr = Csr(*map(where.put, (np.arange(502), np.arange(501, dtype=np.int32))), None)
    ones, norms = where.put(np.ones(501)), where.put(np.zeros(clusters))
    for found in (
        where.kernels.assign(csr, where.put(table), ones, ones, norms),
        where.kernels.nearest(where.put(table), norms),
    ):
        labels, least = map(where.get, found)
        assert labels.dtype == np.int32
        np.testing.assert_array_equal(labels, table.argmax(axis=1))
        np.testing.assert_array_equal(least, -2.0 * table.max(axis=1))


def check_label_sums(where, p, clusters):
    rng = np.random.default_rng(6)
    on = where.put_all(p)
    users, items = len(p["lam"]), len(p["item_scale"])
    labels = rng.integers(-1, clusters, users).astype(np.int32)
    labels[p["row_scale"] == 0] = -1
    expected = np.ones((items, clusters))
    own_rows, entries = own(p["csr"])
    kept = labels[own_rows] >= 0
    own_rows, entries = own_rows[kept], entries[kept]
    items_of = p["csr"].indices[entries]
    weights = np.ones(len(entries)) if p["csr"].weights is None else p["csr"].weights[entries].astype(np.float64)
    parts = p["row_scale"][own_rows] * weights * p["item_scale"][items_of]
    np.add.at(expected, (items_of, labels[own_rows]), parts)
    sums = where.put(np.ones((items, clusters)))
    where.kernels.label_sums(on["csr"], where.put(labels), on["row_scale"], on["item_scale"], sums)
    np.testing.assert_allclose(where.get(sums), expected, rtol=1e-12)


def check_products(where, width=37, points=7, features="float32"):
    rng = np.random.default_rng(7)
    plain = rng.standard_normal((129, width)).astype(np.float32) + 5
    plain[60] = np.nan
    typed, plain = as_type(plain, features)
    table, offset = rng.standard_normal((points, width)), np.full(width, 5.0)
    found = where.get(where.kernels.products(*map(where.put, (typed, offset, table))))
    expected = (plain.astype(np.float64) - offset) @ table.T
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def check_table_sums(where, rows, width, points, features):
    rng = np.random.default_rng(10)
    plain = rng.standard_normal((rows, width)).astype(np.float32)
    table = rng.standard_normal((rows, points)) * (rng.random((rows, points)) < 0.7)
    plain[rows // 2], table[rows // 2] = np.nan, 0.0
    typed, plain = as_type(plain, features)
    found = where.get(where.kernels.table_sums(where.put(table), where.put(typed)))
    np.testing.assert_allclose(found, table.T @ np.nan_to_num(plain.astype(np.float64)), rtol=1e-12, atol=1e-12)


def check_gram(where, p):
    rng = np.random.default_rng(11)
    on = where.put_all(p)
    table, factors = rng.standard_normal((len(p["item_scale"]), 3)), rng.random(len(p["lam"]))
    rows, entries = own(p["csr"])
    weights = np.ones(len(entries)) if p["csr"].weights is None else p["csr"].weights[entries].astype(np.float64)
    matrix = np.zeros((len(factors), len(table)))
    np.add.at(matrix, (rows, p["csr"].indices[entries]), weights)
    sums = where.put(np.ones(table.shape))
    where.kernels.gram(on["csr"], where.put(table), where.put(factors), sums)
    expected = 1.0 + matrix.T @ (factors[:, None] * (matrix @ table))
    np.testing.assert_allclose(where.get(sums), expected, rtol=1e-10, atol=1e-10)


def check_no_users(where):
    csr = Csr(*map(where.put, (np.zeros(1, np.int64), np.empty(0, np.int32))), None)
    ones, none = where.put(np.ones(3)), where.put(np.empty(0))
    features, offset = where.put(np.ones((3, 2), np.float32)), where.put(np.zeros(2))
    kernels = where.kernels
    assert kernels.aggregate(csr, features, none, ones, offset).shape == (0, 2)
    assert kernels.squared_norms(csr, features, none, ones, offset).shape == (0,)
    assert kernels.row_sums(csr, ones).shape == (0,)
    table, labels, sums = where.put(np.ones((3, 2))), where.put(np.empty(0, np.int32)), where.put(np.zeros((3, 2)))
    assert [len(found) for found in kernels.assign(csr, table, none, ones, offset)] == [0, 0]
    kernels.label_sums(csr, labels, none, ones, sums)
    assert not where.get(sums).any()
    assert not where.get(kernels.table_sums(table[:0], features[:0])).any()
    out = where.put(np.empty((0, 2), np.float32))
    centroids = where.put(np.zeros((1, 2), np.float32))
    kernels.aggregate_blend(
        csr, features, none, ones, BlendTerms(none, centroids, labels, None, None, offset, 1.0), out
    )


def check_busy_user(where, count, width):
    """A user whose sum in float32, one after another, would lose digits; and two who are read beside."""
    csr = Csr(np.array([0, 1, 1 + count, 3 + count]), (np.arange(3 + count) % 1000).astype(np.int32), None)
    features = np.random.default_rng(0).standard_normal((1000, width)).astype(np.float32) + 100
    row_scale = np.array([1.0, 1 / count, 0.5])
    arrays = [*map(where.put, csr[:2]), None]
    on = (Csr(*arrays), *map(where.put, (features, row_scale, np.ones(1000), np.zeros(width))))
    found = where.get(where.kernels.aggregate(*on))
    expected = np.bincount(csr.indices[1 : 1 + count], minlength=1000) @ features.astype(np.float64) / count
    np.testing.assert_allclose(found[1], expected, rtol=1e-13)
    out = where.put(np.full((3, width), np.nan, np.float32))
    labels, one = where.put(np.zeros(3, np.int32)), where.put(np.zeros((1, width), np.float32))
    lam = where.put(np.ones(3))
    where.kernels.aggregate_blend(*on[:4], BlendTerms(lam, one, labels, None, None, on[4], 1.0), out)
    np.testing.assert_allclose(where.get(out)[1], expected, rtol=2e-7)
