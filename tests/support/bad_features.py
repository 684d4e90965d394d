"""Features that a job refuses: what spoils a good job, and what the message must name."""

from __future__ import annotations

import decimal
import zipfile

import numpy as np
import pyarrow as pa
import scipy.sparse
from safetensors.numpy import save_file

from tests.support.bad_interactions import HUGE, archive, cut, expanded, flag, ids_file, two
from tests.support.jobs import ITEMS, image

FEATURES = {
    "no such features": (lambda j: j.features(j.path("none.npy")), "none.npy", "no such file"),
    "no name": (lambda j: j.flags.update(features=[j.path("image.npy")]), "--features", "NAME=PATH"),
    "empty name": (lambda j: j.flags.update(features=["=" + j.path("image.npy")]), "--features", "modality"),
    "empty features path": (flag("features", ["image="]), "--features"),
    "name with slash": (lambda j: j.flags.update(features=["a/b=" + j.path("image.npy")]), "a/b"),
    "name with dots": (lambda j: j.flags.update(features=["..=" + j.path("image.npy")]), ".."),
    "name twice": (lambda j: j.flags.update(features=j.flags["features"] * 2), "image", "twice"),
    "name twice but for case": (lambda j: j.flags["features"].append("IMAGE=" + j.path("image.npy")), "twice"),
    "modality interactions": (
        lambda j: j.flags.update(features=["interactions=" + j.path("image.npy")]),
        "interactions",
    ),
    **{
        f"modality {name}": (
            lambda j, name=name: j.flags.update(features=[f"{name}=" + j.path("image.npy")]),
            name,
            "choose another",
        )
        for name in (
            "manifest.json",
            "scratch",
            "users.parquet",
            "items.parquet",
            "journal.json",
            "report.html",
            "Manifest.json",
        )
    },
    "strange features": (lambda j: (j.write("image.tar", b"x"), j.features(j.path("image.tar"))), "image.tar", ".npy"),
    "csv features": (
        lambda j: (j.write("image.csv", "a,b\n1,2\n"), j.features(j.path("image.csv"))),
        "image.csv",
        ".npy",
    ),
    "folder without features": (
        lambda j: (j.folder.joinpath("hollow").mkdir(), j.features(j.path("hollow"))),
        "hollow",
    ),
    "folder of two arrays": (
        lambda j: (
            j.folder.joinpath("pair").mkdir(),
            np.save(j.path("pair/a.npy"), j.values),
            np.save(j.path("pair/b.npy"), j.values),
            j.features(j.path("pair")),
        ),
        "pair",
        "2 files",
    ),
    **{
        f"zero bytes {kind}": (
            lambda j, kind=kind: (j.write("empty" + kind, b""), j.features(j.path("empty" + kind))),
            "empty" + kind,
        )
        for kind in (".npy", ".npz", ".parquet", ".safetensors", ".pt")
    },
    **{
        f"noise {kind}": (
            lambda j, kind=kind: (j.write("noise" + kind, bytes(range(256)) * 3), j.features(j.path("noise" + kind))),
            "noise" + kind,
        )
        for kind in (".npy", ".npz", ".parquet", ".safetensors", ".pt")
    },
    "truncated npy": (
        lambda j: (cut(j.path("image.npy"), j.path("cut.npy")), j.features(j.path("cut.npy"))),
        "cut.npy",
        "cut off",
    ),
    "truncated safetensors": (
        lambda j: (
            save_file({"a": j.values}, j.path("a.safetensors")),
            cut(j.path("a.safetensors"), j.path("cut.safetensors")),
            j.features(j.path("cut.safetensors")),
        ),
        "cut.safetensors",
    ),
    "1-d": (lambda j: j.array(j.values[:, 0]), "bad.npy", f"({ITEMS},)"),
    "3-d": (lambda j: j.array(j.values[:, :, None]), "bad.npy", "(25, 6, 1)"),
    "no columns": (lambda j: j.array(j.values[:, :0]), "bad.npy", "(25, 0)"),
    "no items": (lambda j: j.array(j.values[:0]), "bad.npy", "(0, 6)"),
    "integers": (lambda j: j.array(np.ones((ITEMS, 2), int)), "bad.npy", "int64"),
    "texts": (lambda j: j.array(np.full((ITEMS, 2), "x")), "bad.npy", "float32"),
    "objects": (lambda j: j.array(np.full((ITEMS, 2), None)), "bad.npy"),
    "complex": (lambda j: j.array(j.values * 1j), "bad.npy", "complex"),
    "partly nan": (lambda j: (j.values.__setitem__((4, 2), np.nan), j.array(j.values)), "bad.npy", "row 4", "NaN"),
    "all nan": (lambda j: j.array(j.values * np.nan), "bad.npy", "NaN"),
    "infinite": (
        lambda j: (j.values.__setitem__((4, 2), -np.inf), j.array(j.values)),
        "bad.npy",
        "row 4",
        "column 2",
        "inf",
    ),
    "far too large": (
        lambda j: (j.values.__setitem__((4, 2), 1e20), j.array(j.values)),
        "bad.npy",
        "row 4",
        "column 2",
        "1e+20",
    ),
    "float64 beyond float32": (lambda j: j.array(j.values.astype(float) * 1e100), "bad.npy", "row 0"),
    "rows that differ": (lambda j: two(j, image()[:-1]), "image", "text", "25", "24"),
    "several arrays": (
        lambda j: (np.savez(j.path("two.npz"), a=j.values, b=j.values), j.features(j.path("two.npz"))),
        "two.npz",
        "2 arrays",
    ),
    "several tensors": (
        lambda j: (
            save_file({"a": j.values, "b": j.values}, j.path("two.safetensors")),
            j.features(j.path("two.safetensors")),
        ),
        "two.safetensors",
        "2-D",
    ),
    "integer tensor": (
        lambda j: (
            save_file({"a": np.ones((ITEMS, 2), int)}, j.path("int.safetensors")),
            j.features(j.path("int.safetensors")),
        ),
        "int.safetensors",
        "I64",
    ),
    "npz packed otherwise": (lambda j: archive(j, "a.npy", packing=zipfile.ZIP_BZIP2), "bad.npz", "packed"),
    "npz of too many members": (lambda j: archive(j, *map(str, range(30_000))), "bad.npz", "members"),
    "npz of 10^12 rows": (lambda j: archive(j, "a.npy", content=HUGE), "bad.npz", "1000000000000"),
    "10^12 rows": (lambda j: (j.write("huge.npy", HUGE), j.features(j.path("huge.npy"))), "huge.npy", "1000000000000"),
    "expanded tensor": (expanded, "bad.pt", "contiguous"),
    "sparse features": (
        lambda j: (
            scipy.sparse.save_npz(j.path("sparse.npz"), scipy.sparse.eye(5, format="csr")),
            j.features(j.path("sparse.npz")),
        ),
        "sparse.npz",
        "sparse",
    ),
    "ragged lists": (lambda j: j.table({"item_id": [0, 1], "v": [[1.0, 2.0], [1.0]]}), "bad_features.parquet", "row 1"),
    "empty lists": (
        lambda j: j.table({"item_id": [0, 1], "v": pa.array([[], []], pa.list_(pa.float32()))}),
        "bad_features.parquet",
        "empty list",
    ),
    "null in a list": (
        lambda j: j.table({"item_id": [0, 1], "v": [[1.0, None], [1.0, 2.0]]}),
        "bad_features.parquet",
        "row 0",
    ),
    "text column": (
        lambda j: j.table({"item_id": [0, 1], "a": [1.0, 2.0], "title": ["x", "y"]}),
        "bad_features.parquet",
        "title",
    ),
    "lists of text": (lambda j: j.table({"item_id": [0, 1], "v": [["a"], ["b"]]}), "bad_features.parquet", "v"),
    "two list columns": (
        lambda j: j.table({"item_id": [0, 1], "v": [[1.0], [2.0]], "w": [[1.0], [2.0]]}),
        "bad_features.parquet",
        "w",
    ),
    "ids only": (lambda j: j.table({"item_id": [0, 1]}), "bad_features.parquet", "item_id"),
    "item twice": (lambda j: j.table({"item_id": [4, 1, 4], "v": [[1.0]] * 3}), "bad_features.parquet", "4", "twice"),
    "null item id": (
        lambda j: j.table({"item_id": [4, None, 5], "v": [[1.0]] * 3}),
        "bad_features.parquet",
        "item_id",
        "row 1",
    ),
    "decimal features": (
        lambda j: j.table({"item_id": [0, 1], "a": [decimal.Decimal("1.5")] * 2}),
        "bad_features.parquet",
        "decimal",
    ),
    "nested lists": (lambda j: j.table({"item_id": [0, 1], "v": [[[1.0]], [[2.0]]]}), "bad_features.parquet", "list"),
    "no rows of features": (
        lambda j: j.table(pa.table({"item_id": pa.array([], pa.int64()), "v": pa.array([], pa.list_(pa.float32()))})),
        "bad_features.parquet",
        "no rows",
    ),
    "no items in common": (lambda j: ids_file(j, [100, 101]), "log.parquet", "100", "features"),
    "text ids in common with none": (lambda j: ids_file(j, ["a", "b"]), "log.parquet", "features", "'a'"),
    "ids beyond the other's rows": (
        lambda j: (ids_file(j, [0, ITEMS]), j.flags["features"].append("text=" + j.path("image.npy"))),
        "by_id.parquet",
        "row 1",
        str(ITEMS),
    ),
    "text ids beside rows": (
        lambda j: (ids_file(j, ["a", "b"]), j.flags["features"].append("text=" + j.path("image.npy"))),
        "by_id.parquet",
        "text",
    ),
    "no user has it": (
        lambda j: (
            ids_file(j, [0, 1]),
            j.log(j.frame.assign(item_id=1)),
            j.table({"item_id": [0, 1], "v": [[1.0], [float("nan")]]}),
        ),
        "image",
        "no user",
    ),
    "too large for float16": (
        lambda j: (j.array(j.values * 1e6), j.flags.update(dtype="float16")),
        "image",
        "float16",
        "--dtype float32",
    ),
}
