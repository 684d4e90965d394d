"""The command line as a careful user meets it: equal inputs give equal bytes."""

from __future__ import annotations

import json
import os
import re

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse
from safetensors.numpy import save_file

from gpu_init import cli
from tests.support.bad_interactions import csv, npz, two
from tests.support.jobs import ITEMS, USERS, WIDTH, check_refusal, contents, image, run

# Good input: what is the same gives the same bytes.


def artifact(job, monkeypatch, capfd, **flags):
    """Run a job; every file of the artifact but the manifest."""
    job.flags.update(flags)
    code, _, err = run(job, monkeypatch, capfd)
    assert code == 0, err
    assert not (job.folder / "out.partial").exists()
    assert not list(job.folder.glob(".*"))
    return {name: digest for name, digest in contents(job.folder / "out").items() if name != "manifest.json"}


def manifest(job):
    return json.loads((job.folder / "out" / "manifest.json").read_text())


def again(job):
    """Forget the artifact."""
    for path in sorted((job.folder / "out").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (job.folder / "out").rmdir()


def shuffled(frame):
    return frame.sample(frac=1, random_state=5)


def split_over_files(job, frame):
    """A folder of three files, in two formats, with pairs that stand in several of them."""
    (job.folder / "logs").mkdir()
    frame.iloc[:50].to_parquet(job.path("logs/a.parquet"))
    frame.iloc[50:120].to_csv(job.path("logs/b.tsv"), sep="\t", index=False)
    (job.folder / "logs" / "deep").mkdir()
    frame.iloc[120:].to_csv(job.path("logs/deep/c.csv.gz"), index=False)
    job.write("logs/_SUCCESS", "")
    job.write("logs/README.md", "not data")
    job.flags["interactions"] = job.path("logs")


def typed(frame):
    return frame.rename(columns={"user_id": "user_id:token", "item_id": "item_id:token", "rating": "rating:float"})


def as_matrix(job, frame):
    npz(job, scipy.sparse.coo_matrix((frame["rating"], (frame["user_id"], frame["item_id"])), (USERS, ITEMS)))
    del job.flags["weight_column"]


def glob_of_parts(job, frame):
    for part in range(4):
        frame.iloc[part::4].to_parquet(job.path(f"part-{part}.parquet"))
    job.flags["interactions"] = job.path("part-*.parquet")


SAME_INTERACTIONS = {
    "shuffled": lambda j, frame: j.log(shuffled(frame)),
    "int32": lambda j, frame: j.log(frame.astype({"user_id": "int32", "item_id": "uint8", "rating": "float32"})),
    "ids as text": lambda j, frame: j.log(frame.astype({"user_id": str, "item_id": str})),
    "ids as categories": lambda j, frame: j.log(frame.astype({"user_id": str}).astype({"user_id": "category"})),
    "columns in another order": lambda j, frame: j.log(frame[["rating", "item_id", "user_id"]].assign(more="x")),
    "csv": lambda j, frame: j.log(shuffled(frame), "log.csv"),
    "csv with BOM and CRLF": lambda j, frame: j.text(b"\xef\xbb\xbf" + csv(frame).replace("\n", "\r\n").encode()),
    "csv with quotes": lambda j, frame: j.text(re.sub(r"(?m)^(\d+),", r'"\1",', csv(frame))),
    "csv without last newline": lambda j, frame: j.text(csv(frame).rstrip("\n")),
    "tsv": lambda j, frame: j.log(frame, "log.tsv"),
    "csv.gz": lambda j, frame: j.log(frame, "log.csv.gz"),
    "inter": lambda j, frame: j.log(frame, "log.inter"),
    "inter with types": lambda j, frame: j.log(typed(shuffled(frame)), "log.inter"),
    "npz": as_matrix,
    "folder": split_over_files,
    "glob": glob_of_parts,
    "where": lambda j, frame: (
        j.log(pd.concat([frame.assign(x_label=0), frame.assign(x_label=1, item_id=1)]), "log.inter"),
        j.flags.update(where="x_label == 0"),
    ),
    "named columns": lambda j, frame: (
        j.log(frame.rename(columns={"user_id": "who", "item_id": "what"})),
        j.flags.update(user_column="who", item_column="what"),
    ),
    "summed before": lambda j, frame: j.log(frame.groupby(["user_id", "item_id"], as_index=False)["rating"].sum()),
}


@pytest.mark.parametrize("form", SAME_INTERACTIONS)
def test_the_same_interactions_in_any_form_give_the_same_bytes(form, job, monkeypatch, capfd):
    wanted = artifact(job, monkeypatch, capfd, weight_column="rating", weighting="sym", scale="items", users=str(USERS))
    again(job)
    SAME_INTERACTIONS[form](job, job.frame)
    assert artifact(job, monkeypatch, capfd) == wanted


def features_of(job, form):
    """The same features in another file; returns flags that must be left out."""
    values, order = job.values, np.random.default_rng(3).permutation(ITEMS)
    kept = order[~np.isnan(values[order, 0])]
    path = job.path("same" + form[form.rindex(".") :])
    match form:
        case ".npz":
            np.savez_compressed(path, values)
        case "f64.npy":
            np.save(path, values.astype(np.float64))
        case "fortran.npy":
            np.save(path, np.asfortranarray(values))
        case "big-endian.npy":
            np.save(path, values.astype(">f4"))
        case ".safetensors":
            save_file({"image": values}, path)
        case ".pt":
            torch = pytest.importorskip("torch")
            torch.save({"image": torch.from_numpy(values)}, path)
        case "lists.parquet":
            pq.write_table(pa.table({"item_id": order, "v": list(values[order])}), path)
        case "columns.parquet":
            columns = {f"v{column}": values[order, column] for column in range(WIDTH)}
            pq.write_table(pa.table({"item_id": order.astype(np.int32), **columns}), path)
        case "null lists.parquet":
            lists = [None if np.isnan(row[0]) else row for row in values[order]]
            pq.write_table(pa.table({"item_id": order, "v": pa.array(lists, pa.list_(pa.float32()))}), path)
        case "no ids.parquet":
            pq.write_table(pa.table({"v": list(values)}), path)
        case "folder.parquet":
            os.mkdir(path)
            for part in range(3):
                rows = kept[part::3]
                pq.write_table(pa.table({"item_id": rows, "v": list(values[rows])}), f"{path}/{part}.parquet")
    job.features(path)


@pytest.mark.parametrize(
    "form",
    [
        ".npz",
        "f64.npy",
        "fortran.npy",
        "big-endian.npy",
        ".safetensors",
        ".pt",
        "no ids.parquet",
        "lists.parquet",
        "columns.parquet",
        "null lists.parquet",
        "folder.parquet",
    ],
)
def test_the_same_features_in_any_file_give_the_same_bytes(form, job, monkeypatch, capfd):
    wanted = artifact(job, monkeypatch, capfd, dim="4", whiten=True)
    again(job)
    features_of(job, form)
    found = artifact(job, monkeypatch, capfd)
    if manifest(job)["items"]["ids"] == "items.parquet":
        ids = pd.read_parquet(job.folder / "out" / "items.parquet")
        assert ids["item_id"].tolist() == ids["row"].tolist() == list(range(ITEMS))
        found.pop("items.parquet")
    assert found == wanted


def test_text_ids_give_the_rows_of_users_parquet(job, monkeypatch, capfd):
    rows = artifact(job, monkeypatch, capfd)
    again(job)
    job.log(shuffled(job.frame.assign(user_id=job.frame["user_id"].map("u{:03}".format))))
    named = artifact(job, monkeypatch, capfd)
    assert named.pop("users.parquet")
    assert named == rows
    table = pd.read_parquet(job.folder / "out" / "users.parquet")
    assert table["user_id"].tolist() == [f"u{user:03}" for user in range(USERS)]
    assert manifest(job)["users"] == {"rows": USERS, "ids": "users.parquet"}


def test_ids_with_gaps_are_sorted_unless_their_number_is_given(job, monkeypatch, capfd):
    job.log(job.frame.assign(user_id=job.frame["user_id"] * 3))
    artifact(job, monkeypatch, capfd)
    table = pd.read_parquet(job.folder / "out" / "users.parquet")
    assert table["user_id"].tolist() == [3 * user for user in range(USERS)]
    packed = np.load(job.folder / "out" / "image" / "users.npy")
    again(job)
    artifact(job, monkeypatch, capfd, users=str(3 * USERS))
    assert not (job.folder / "out" / "users.parquet").exists()
    spread = np.load(job.folder / "out" / "image" / "users.npy")
    np.testing.assert_array_equal(spread[::3], packed)
    labels = np.load(job.folder / "out" / "image" / "labels.npy")
    assert (labels[1::3] == -1).all()
    assert (labels[::3] >= 0).all()
    assert (spread[1::3] == spread[1]).all()


@pytest.mark.parametrize("name", ["users.txt", "users.csv", "users.parquet"])
def test_a_list_of_users_gives_the_rows_and_their_order(name, job, monkeypatch, capfd):
    job.flags["lambda"] = "1"  # the clusters that K-means finds depend on the order of the rows
    artifact(job, monkeypatch, capfd)
    plain = np.load(job.folder / "out" / "image" / "users.npy")
    again(job)
    order = np.random.default_rng(4).permutation(USERS + 5)  # five of them without interactions
    if name == "users.parquet":
        pq.write_table(pa.table({"user_id": order}), job.path(name))
    else:
        job.write(name, ("user_id\n" if name == "users.csv" else "") + "".join(f"{user}\n" for user in order))
    artifact(job, monkeypatch, capfd, users=job.path(name))
    assert pd.read_parquet(job.folder / "out" / "users.parquet")["user_id"].tolist() == order.tolist()
    ordered = np.load(job.folder / "out" / "image" / "users.npy")
    labels = np.load(job.folder / "out" / "image" / "labels.npy")
    assert (labels == -1).sum() == 5
    np.testing.assert_array_equal(ordered[labels >= 0], plain[order[order < USERS]])


def test_flags_environment_and_file_say_the_same(job, monkeypatch, capfd):
    settings = {"lambda": 0.25, "clusters": 4, "weighting": "sym", "dim": 3, "whiten": True, "seed": 9}
    given = {key: value for key, value in job.flags.items() if key != "clusters"}
    job.flags |= {key: value if value is True else str(value) for key, value in settings.items()}
    wanted = artifact(job, monkeypatch, capfd)
    facts = manifest(job)
    again(job)

    job.flags = {}
    job.environ = {f"GPU_INIT_{key.upper()}": str(value) for key, value in settings.items()}
    job.environ |= {f"GPU_INIT_{key.upper()}": value for key, value in given.items() if key != "features"}
    job.environ["GPU_INIT_FEATURES"] = given["features"][0]
    assert artifact(job, monkeypatch, capfd) == wanted
    assert manifest(job)["settings"] == facts["settings"]
    again(job)

    for name in job.environ:
        monkeypatch.delenv(name)
    job.environ = {}
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    job.toml("\n".join(["interactions = 'log.parquet'", "out = 'out'", *lines, "[features]", "image = 'image.npy'"]))
    assert artifact(job, monkeypatch, capfd) == wanted
    assert manifest(job)["settings"] == facts["settings"]


def test_flags_win_over_the_environment_and_that_over_the_file(job, monkeypatch, capfd):
    flags = job.flags
    job.toml("seed = 1\nclusters = 2\nlambda = 0.1\n[features]\nother = 'none.npy'\n")
    job.flags = flags
    job.environ = {"GPU_INIT_SEED": "2", "GPU_INIT_CLUSTERS": "4", "GPU_INIT_DIM": ""}
    artifact(job, monkeypatch, capfd)
    settings = manifest(job)["settings"]
    assert (settings["clusters"], settings["seed"], settings["lambda"], settings["dim"]) == (3, 2, 0.1, None)
    assert list(manifest(job)["modalities"]) == ["image"]


def untimed(job):
    return {key: value for key, value in manifest(job).items() if key not in ("timings", "checksum")}


@pytest.mark.parametrize("cluster_on", ["users", "items", "interactions"])
def test_two_runs_differ_in_their_timings_only(cluster_on, job, monkeypatch, capfd):
    two(job, image(8)[:, :4])
    first = artifact(job, monkeypatch, capfd, cluster_on=cluster_on, dtype="float16", scale="items"), untimed(job)
    again(job)
    assert (artifact(job, monkeypatch, capfd), untimed(job)) == first


def test_an_artifact_is_replaced_only_when_asked(job, monkeypatch, capfd):
    first = artifact(job, monkeypatch, capfd)
    before = contents(job.folder)
    code, _, err = run(job, monkeypatch, capfd)
    check_refusal(code, err, ["out", "--overwrite"])
    job.flags.update(resume=True, seed="5")
    code, _, err = run(job, monkeypatch, capfd)
    check_refusal(code, err, ["out", "seed", "--overwrite"])
    assert contents(job.folder) == before
    job.flags.update(seed="0")
    assert artifact(job, monkeypatch, capfd) == first  # --resume, and nothing to do
    assert contents(job.folder) == before
    del job.flags["resume"]
    assert artifact(job, monkeypatch, capfd, overwrite=True, **{"lambda": "0.5"}) != first
    broken = dict(job.flags, user_column="nobody")
    before = contents(job.folder)
    job.flags = broken
    assert run(job, monkeypatch, capfd)[0] == 2
    assert contents(job.folder) == before  # bad input, and the old artifact stands


def inspect(job, monkeypatch, capfd, *arguments):
    job.command, job.flags, job.rest = "inspect", {}, [job.path("out"), *arguments]
    return run(job, monkeypatch, capfd)


def test_inspect_shows_what_a_run_wrote(job, monkeypatch, capfd):
    artifact(job, monkeypatch, capfd)
    code, out, err = inspect(job, monkeypatch, capfd)
    assert (code, err) == (0, "")
    for fragment in ("40, ids: row numbers", "25, ids: row numbers", "24 with features, 1 without", "image/users.npy"):
        assert fragment in out
    code, out, _ = inspect(job, monkeypatch, capfd, "--json")
    assert code == 0
    assert json.loads(out) == manifest(job)
    code, out, _ = inspect(job, monkeypatch, capfd, "--verify")
    assert code == 0
    assert "every file matches its hash" in out


@pytest.mark.parametrize("name", ["image/users.npy", "image/labels.npy", "image/centroids.npy", "manifest.json"])
def test_a_bit_that_flips_is_found(name, job, monkeypatch, capfd):
    artifact(job, monkeypatch, capfd)
    path = job.folder / "out" / name
    data = bytearray(path.read_bytes())
    data[-10] ^= 1
    path.write_bytes(data)
    code, _, err = inspect(job, monkeypatch, capfd, "--verify")
    check_refusal(code, err, [os.path.basename(name)])


def test_json_lines_parse_also_when_the_job_fails(job, monkeypatch, capfd):
    job.flags["log_format"] = "json"
    code, _, err = run(job, monkeypatch, capfd)
    assert code == 0
    events = [json.loads(line) for line in err.splitlines()]
    assert len(events) >= 8
    job.flags.update(overwrite=True, clusters="41")
    code, _, err = run(job, monkeypatch, capfd)
    assert code == 2
    events = [json.loads(line) for line in err.splitlines()]
    assert events[-1]["event"] == "error"
    assert "41 clusters" in events[-1]["message"]


@pytest.mark.parametrize("arguments", [["doctor"], ["doctor", "--json"], ["--version"], ["--help"], ["run", "--help"]])
def test_commands_that_only_tell(arguments, capfd):
    try:
        code = cli.main(arguments)
    except SystemExit as end:
        code = end.code
    printed = capfd.readouterr()
    assert code in (0, None)
    assert printed.out
    assert printed.err == ""
    if "--json" in arguments:
        assert {"python", "numpy"} <= {line["name"] for line in json.loads(printed.out)}
