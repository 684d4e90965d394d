"""What the job must do on CUDA, wherever it runs: on a device (tests/gpu) or on stand-ins (test_backend).

Each check runs the same on the CPU beside. ``backend="cuda"`` is asked for, and never a device.
"""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json

import numpy as np
import pandas as pd
import scipy.sparse

import gpu_init
from gpu_init import run as run_page
from gpu_init import tasks, where
from gpu_init.api import Memory, job_on_arrays
from gpu_init.artifact import read as artifact_read
from gpu_init.backend.select import select
from gpu_init.cli import main
from gpu_init.errors import InputError
from gpu_init.inputs import interactions, tables
from gpu_init.method import kmeans
from gpu_init.method import matrix as method_matrix
from gpu_init.method import modality as feature_arrays
from gpu_init.settings import Settings

TOLERANCE = {"float32": 1e-5, "float16": 1e-3}


def problem(users=900, items=120, width=24, groups=5, seed=3, weighted=True):
    """Interactions of users who keep to a group of items each, and those items' features; nobody sees the last item."""
    rng = np.random.default_rng(seed)
    group_of = rng.integers(groups, size=items)
    centres = 6 * rng.standard_normal((groups, width))
    features = (centres[group_of] + rng.standard_normal((items, width))).astype(np.float32)
    features[:: max(items // 9, 2)] = np.nan
    own = [np.flatnonzero(group_of == group) for group in range(groups)]
    taste = rng.integers(groups, size=users)
    degrees = np.where(rng.random(users) < 0.05, 0, rng.poisson(6, users))
    who = np.repeat(np.arange(users), degrees)
    what = np.concatenate([rng.choice(own[one], degree) for one, degree in zip(taste, degrees, strict=True)])
    weights = rng.uniform(0.5, 4, len(who)) if weighted else np.ones(len(who))
    return scipy.sparse.coo_array((weights.astype(np.float32), (who, what)), shape=(users, items)).tocsr(), features


def same_start(monkeypatch):
    """K-means starts from the same rows everywhere, whatever a library or a sample would give."""

    def start(device, points, clusters):
        rows = device.xp.arange(clusters) * (len(points) // clusters)
        return (points.rows(rows) + points.offset).astype("float32")

    starting(monkeypatch, start)


def starting(monkeypatch, start):
    """Passes over all rows start from ``start(device, points, clusters)``, an array on the device."""
    fit = kmeans.fit

    def fit_from_there(device, points, clusters, *given, **named):
        found = fit(device, points, clusters, *given[:-1], start(device, points, clusters))
        return dataclasses.replace(found, library=given[-1] is not None)

    monkeypatch.setattr(kmeans, "fit", fit_from_there)


def host(array):
    return array.get() if hasattr(array, "get") else np.asarray(array)


def assert_close(found, expected, dtype):
    """Within the tolerance of what values of this size are."""
    found, expected = host(found).astype(np.float64), host(expected).astype(np.float64)
    assert np.abs(found - expected).max() <= TOLERANCE[dtype] * np.abs(expected).max()


ARRAYS = (
    {},
    {"dtype": "float16", "lam": 0.3},
    {"cluster_on": "items", "weighting": "sym"},
    {"dim": 6, "whiten": True, "scale": "items"},
    {"dtype": "float16", "cluster_on": "items", "scale": "items"},
    {"cluster_on": "interactions", "cluster_rank": 5, "lam": 0.3},  # as many as groups: others are at rounding's mercy
)


def check_arrays(monkeypatch, **settings):
    same_start(monkeypatch)
    matrix, features = problem()
    dtype = settings.get("dtype", "float32")
    made = {
        name: gpu_init.initialize(matrix, {"text": features}, clusters=5, backend=name, **settings)["text"]
        for name in ("cpu", "cuda")
    }
    for field in ("labels", "item_labels", "items_mask"):
        one, other = getattr(made["cuda"], field), getattr(made["cpu"], field)
        assert (one is None) == (other is None)
        if one is not None:
            np.testing.assert_array_equal(host(one), other)
    for field in ("users", "centroids"):
        one, other = getattr(made["cuda"], field), getattr(made["cpu"], field)
        assert str(one.dtype) == (dtype if field == "users" else "float32")
        assert_close(one, other, dtype)
    if made["cpu"].items is not None:
        assert_close(made["cuda"].items, made["cpu"].items, "float32")


def run(out, data, *flags):
    """A job over the files of a folder; its artifact."""
    given = [f"--features={path.stem}={path}" for path in sorted(data.glob("*.npy"))]
    place = [f"--interactions={data / 'clicks.parquet'}", f"--out={out}", "--log-format=json"]
    assert main(["run", *place, *given, *flags]) == 0
    return artifact_read.load(out)


def write_job(folder, users=9000):
    """Interactions with users that have gaps in their ids, and two modalities."""
    matrix, features = problem(users=users, items=400)
    entries = matrix.tocoo()
    frame = pd.DataFrame({"user_id": 3 * entries.row + 1, "item_id": entries.col, "rating": entries.data})
    frame.sample(frac=1, random_state=1).to_parquet(folder / "clicks.parquet", row_group_size=3000)
    np.save(folder / "text.npy", features)
    np.save(folder / "image.npy", np.nan_to_num(features[:, :8], nan=0.5).astype(np.float16))


def assert_artifacts_agree(found, expected, dtype):
    assert artifact_read.verify(found.path) == []
    assert set(found) == set(expected)
    for name in found:
        np.testing.assert_array_equal(found[name].labels, expected[name].labels)
        assert_close(found[name].centroids, expected[name].centroids, "float32")
        assert_close(found[name].users, expected[name].users, dtype)
    if expected.manifest["users"]["ids"] == "users.parquet":
        rows = [pd.read_parquet(f"{one.path}/users.parquet") for one in (found, expected)]
        pd.testing.assert_frame_equal(*rows)


JOBS = (
    ("float32", ()),
    ("float16", ()),
    ("float32", ("--dim=4", "--whiten", "--scale=items", "--weighting=sym")),
    ("float16", ("--cluster-on=items", "--users=30000")),
)


def check_job(monkeypatch, tmp_path, *flags, dtype="float32"):
    """The same job on both; gives the artifact made on CUDA."""
    same_start(monkeypatch)
    write_job(tmp_path, users=5000)
    flags = ("--weight-column=rating", f"--dtype={dtype}", "--clusters=5", *flags)
    expected = run(tmp_path / "cpu", tmp_path, "--backend=cpu", *flags)
    found = run(tmp_path / "cuda", tmp_path, "--backend=cuda", *flags)
    assert_artifacts_agree(found, expected, dtype)
    assert found.manifest["backend"]["name"] == "cuda"
    assert found.manifest["backend"]["kernels"] == "cuda"
    assert found.manifest["timings"]["peak_device_memory_bytes"] > 0
    return found


def check_tiktok(monkeypatch, tmp_path, data, *flags, dtype):
    """The TikTok job on both, each from the centroids that a run on the CPU has found before.

    From any rows a start would take dozens of steps, and users midway between centroids, who fall to one or the other
    by float32's rounding, would lead to ends that differ in some labels.
    """
    given = [f"--interactions={data}/tiktok.inter", "--users=9308", "--where=x_label == 0", f"--dtype={dtype}", *flags]
    given += [f"--features={name}={data}/{name}_feat.npy" for name in ("image", "audio")]
    given += ["--tolerance=0"]

    def made(name, out):
        assert main(["run", *given, f"--backend={name}", f"--out={tmp_path / out}"]) == 0
        return artifact_read.load(tmp_path / out)

    before = made("cpu", "before")
    starts = itertools.cycle([one.centroids for one in before.values()])  # modalities come in the same order
    starting(monkeypatch, lambda device, *_: device.asarray(next(starts)))
    assert_artifacts_agree(made("cuda", "cuda"), made("cpu", "cpu"), dtype)


# Readers.


def _typed(frame):
    return frame.rename(columns={"user_id": "user_id:token", "item_id": "item_id:token", "w": "w:float"})


WRITERS = {
    "parquet": lambda frame, path: frame.to_parquet(path, row_group_size=7, index=False),
    "csv": lambda frame, path: frame.to_csv(path, index=False),
    "tsv": lambda frame, path: frame.to_csv(path, index=False, sep="\t", lineterminator="\r\n"),
    "inter": lambda frame, path: _typed(frame).to_csv(path, index=False, sep="\t"),
    "csv.gz": lambda frame, path: path.write_bytes(gzip.compress(frame.to_csv(index=False).encode())),
}
USERS = {
    "rows": list(range(20)),
    "gaps": [7 * n - 30 for n in range(20)],
    "large": [2**62 + n for n in range(20)],
    "text": [f"u{n % 7}é {n}" for n in range(20)],
    "zeros": [f"{n:03}" for n in range(20)],
    "quotes": [f'a "{n}", or\tso' for n in range(20)],
}


def table(kind):
    rng = np.random.default_rng(5)
    users = np.concatenate([np.arange(20), rng.integers(20, size=60)])
    weights = np.round(rng.uniform(0.1, 5, 80), 3)
    return pd.DataFrame({"user_id": [USERS[kind][u] for u in users], "item_id": rng.integers(9, size=80), "w": weights})


def read(name, path, columns, items=9):
    device = select(name)
    return device, interactions.read(device, str(path), columns, interactions.ItemAxis(items), None)


def assert_read_alike(path, columns):
    _, expected = read("cpu", path, columns)
    device, found = read("cuda", path, columns)
    assert (found.read, found.kept, found.warnings) == (expected.read, expected.kept, expected.warnings)
    for one, other in zip(found.interactions.csr, expected.interactions.csr, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(device.to_host(one), other)
    assert (found.user_ids is None) == (expected.user_ids is None)
    if expected.user_ids is not None:
        assert list(found.user_ids) == list(expected.user_ids)


def check_reader(tmp_path, ending, kind, weighted):
    path = tmp_path / f"clicks.{ending}"
    WRITERS[ending](table(kind), path)
    assert_read_alike(path, interactions.Columns(weight="w" if weighted else None))


CONDITIONS = (
    "split == 0",
    "split in [0, 2] and not w < 1.5",
    "flag == true or day >= '2024-02-01'",
    "tag != 'b' and tag in ('a', 'c', 'b c')",
    "w = 2 or small > 1.5",
    "number > 9",
)


def check_where(tmp_path, ending, condition):
    rng = np.random.default_rng(6)
    frame = table("gaps")
    frame["split"] = rng.integers(3, size=80)
    frame["flag"] = rng.random(80) < 0.3
    frame["tag"] = rng.choice(["a", "b", "b c", "d"], 80)
    frame["tag"] = frame["tag"].where(rng.random(80) < 0.9, None)
    frame["small"] = rng.choice([1.5, 1.6, np.nan], 80).astype(np.float32)
    frame["number"] = [str(n) for n in rng.integers(20, size=80)]
    frame["day"] = pd.Timestamp("2024-01-01") + pd.to_timedelta(rng.integers(60, size=80), "D")
    if ending != "parquet":
        condition = condition.replace("flag == true or day", "flag == true or tag")  # times in text are text
    path = tmp_path / f"clicks.{ending}"
    WRITERS[ending](frame, path)
    assert_read_alike(path, interactions.Columns(where=where.parse(condition)))


WRONG = {
    "no user": pd.DataFrame({"user_id": pd.array([1, None, 3], "Int64"), "item_id": [0, 1, 2], "w": 1.0}),
    "floats": pd.DataFrame({"user_id": [1.0, 2.0, 3.0], "item_id": [0, 1, 2], "w": 1.0}),
    "item beyond": pd.DataFrame({"user_id": [1, 2, 3], "item_id": [0, 1, 9], "w": 1.0}),
    "no weight": pd.DataFrame({"user_id": [1, 2, 3], "item_id": [0, 1, 2], "w": [1.0, None, 2.0]}),
    "negative": pd.DataFrame({"user_id": [1, 2, 3], "item_id": [0, 1, 2], "w": [1.0, 2.0, -1.0]}),
    "words": pd.DataFrame({"user_id": [1, 2, 3], "item_id": [0, 1, 2], "w": ["1", "many", "2"]}),
}


def check_refused(tmp_path, ending, kind):
    """The same words on both, but for how a type is called."""
    path = tmp_path / f"clicks.{ending}"
    WRITERS[ending](WRONG[kind], path)
    said = []
    for name in ("cpu", "cuda"):
        try:
            read(name, path, interactions.Columns(weight="w"))
        except InputError as error:
            said.append(str(error).replace("double[pyarrow]", "float64"))
    assert len(said) == 2
    assert said[0] == said[1]


def check_npz(tmp_path):
    path = tmp_path / "clicks.npz"
    scipy.sparse.save_npz(path, problem(items=9, groups=2)[0])
    assert_read_alike(path, interactions.Columns())


def check_given_users(tmp_path):
    """Ids of the rows from a file, and one that stands there twice."""
    path, listed = tmp_path / "clicks.parquet", tmp_path / "users.csv"
    for kind in ("gaps", "text"):
        WRITERS["parquet"](table(kind), path)
        pd.DataFrame({"user_id": USERS[kind][::-1]}).to_csv(listed, index=False)
        found = []
        for name in ("cpu", "cuda"):
            device = select(name)
            users = tables.read_user_ids(device, str(listed), None)
            axis = interactions.ItemAxis(9)
            made = interactions.read(device, str(path), interactions.Columns(), axis, users)
            assert list(made.user_ids) == list(users)
            found.append([device.to_host(array) for array in made.interactions.csr[:2]])
        for one, other in zip(*found, strict=True):
            np.testing.assert_array_equal(one, other)
        pd.DataFrame({"user_id": [*USERS[kind], USERS[kind][3]]}).to_csv(listed, index=False)
        said = []
        for name in ("cpu", "cuda"):
            try:
                tables.read_user_ids(select(name), str(listed), None)
            except InputError as error:
                said.append(str(error))
        assert len(said) == 2
        assert said[0] == said[1]


# K-means.


def check_inertia(monkeypatch):
    """The library's K-means and the factored one end within 2% of each other, each the best of five starts."""
    matrix, features = problem(users=9000, items=900, width=32, groups=6)
    device = select("cuda")
    made = method_matrix.from_matrix(device, matrix, "test")
    modality = feature_arrays.from_array(device, "text", features)
    found = {}
    for form in ("dense", "factored"):
        monkeypatch.setattr(type(device), "takes_matrix", lambda *_, form=form: form == "dense")
        job = job_on_arrays(device, made, {"text": modality}, Settings(clusters=6, restarts=5), Memory(device))
        _, facts = run_page.cluster(job, modality, job.parts.map(tasks.warm, "text"))
        found[form] = facts["kmeans"]
        assert found[form]["form"] == form
        assert found[form]["library"] == (form == "dense")
    assert abs(found["dense"]["inertia"][-1] / found["factored"]["inertia"][-1] - 1) <= 0.02


def check_same_bytes(monkeypatch, tmp_path, users=9000):
    """The factored form gives the same bytes in every run on a device."""
    monkeypatch.setattr(type(select("cuda")), "takes_matrix", lambda *_: False)
    write_job(tmp_path, users)
    made = [run(tmp_path / name, tmp_path, "--backend=cuda", "--clusters=3") for name in ("one", "two")]
    for name in made[0]:
        facts = made[0].manifest["modalities"][name]["kmeans"]
        assert (facts["form"], facts["library"]) == ("factored", False)
        for field in ("users", "centroids", "labels"):
            np.testing.assert_array_equal(getattr(made[0][name], field), getattr(made[1][name], field))


def messages(text):
    """Lines that a job's log says to the user."""
    events = [json.loads(line) for line in text.splitlines()]
    return [event["message"] for event in events if event["event"] == "message"]
