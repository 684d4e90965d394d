import copy
import io
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from gpu_init.show import summary

MANIFEST = {
    "format": "gpu-init artifact",
    "format_version": 1,
    "gpu_init_version": "0.1.0",
    "settings": {"lambda": 0.9, "clusters": 3, "cluster_on": "users", "weighting": "mean", "dim": None, "seed": 0},
    "backend": {
        "name": "cpu",
        "kernels": "numba",
        "reading_kernels": "numpy",
        "kmeans": "gpu_init.kmeans",
        "versions": {"numpy": "2.0"},
    },
    "users": {"rows": 9308, "ids": "row numbers"},
    "items": {"rows": 6710, "ids": "items.parquet"},
    "interactions": {"read": 68722, "kept": 59541, "pairs": 59500, "weight": 59541.0},
    "modalities": {
        "image": {
            "width": 64,
            "source_width": 128,
            "items": 6700,
            "missing_items": 10,
            "warm_users": 9298,
            "cold_users": 17,
            "clusters": 3,
            "cluster_sizes": [6000, 3000, 298],
            "kmeans": {"form": "dense", "passes": 23, "inertia": [1234.5, 900.25, 812.75]},
            "norms": {part: {"mean": 1.5, "min": 0.125, "max": 9.75} for part in ("users", "items", "centroids")},
            "scale": 5.25,
            "lambda": 0.9,
        }
    },
    "files": {
        "image/users.npy": {"bytes": 2382976, "sha256": "0" * 64, "shape": [9308, 64], "dtype": "float32"},
        "items.parquet": {"bytes": 90210, "sha256": "0" * 64, "rows": 6710},
    },
    "timings": {
        "finished": "2026-01-01T00:00:00+00:00",
        "seconds": 75.4,
        "steps": [{"step": "cluster image", "seconds": 1.25}],
        "peak_memory_bytes": 512_000_000,
    },
}


def printed(manifest, width=80, encoding="utf-8"):
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    summary.table(manifest, Console(file=file, width=width))
    file.flush()
    return raw.getvalue().decode(encoding)


def test_a_person_finds_what_they_ask_for():
    text = printed(MANIFEST)
    for said in (
        "9,308, ids: row numbers",
        "6,710, ids: items.parquet",
        "68,722 read, 59,541 kept, 59,500 pairs, weight 59,541",
        "lambda 0.9, clusters 3, cluster_on users",
        "Modality image",
        "64, projected from 128",
        "6,700 with features, 10 without",
        "9,298 warm, 17 cold",
        "0.9, 5.25",
        "mean 1.5, from 0.125 to 9.75",
        "dense, 23 passes, inertia 1234 -> 812.8",
        "1.25 s",
        "1 min 15 s, peak memory 512.0 MB",
        "9,308 x 64",
        "2.4 MB",
        "6,710 rows",
    ):
        assert said in text, said
    bars = [line.count("\u2588") for line in text.splitlines() if "\u2588" in line]
    assert bars == [24, 12, 1]
    assert max(map(len, text.splitlines())) <= 80


def test_many_clusters_are_summed_up():
    sizes = [0] * 7 + [random.Random(0).randint(1, 5000) for _ in range(993)]
    manifest = copy.deepcopy(MANIFEST)
    manifest["modalities"]["image"] |= {"clusters": 1000, "cluster_sizes": sizes, "item_cluster_sizes": [3, 4]}
    text = printed(manifest)
    assert "K 1,000, users" in text
    assert f"min 0, median {sorted(sizes)[500]:,}, max {max(sizes):,}, 7 empty" in text
    assert len(text.splitlines()) < 60


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_terminal_will_do(width, encoding):
    manifest = copy.deepcopy(MANIFEST)
    manifest["modalities"]["画像"] = manifest["modalities"]["image"]
    text = printed(manifest, width, encoding)
    assert ("#" in text) == (encoding != "utf-8")
    assert max(map(len, text.splitlines())) <= width


def test_a_strangers_words_are_only_words():
    manifest = copy.deepcopy(MANIFEST)
    manifest["modalities"] = {"[bold red]x[/]\x1b[2J\r": {}}
    manifest["files"] = {"a\x1b]0;owned\x07": {}}
    text = printed(manifest)
    assert "[bold red]x[/]?[2J?" in text
    assert not {"\x1b", "\x07", "\r"} & set(text)


def everywhere(value, path=()):
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from everywhere(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from everywhere(inner, (*path, index))


@given(
    st.sampled_from([path for path in everywhere(MANIFEST) if path]),
    st.sampled_from(
        [None, True, -1, 10**4000, 1e308, -0.0, "x" * 5000, [], {}, [[]], [{}], {"": {}}, [True, "a"], [10**400]]
    ),
)
@settings(max_examples=150, deadline=None)
def test_it_never_raises(path, value):
    manifest = copy.deepcopy(MANIFEST)
    place = manifest
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert "Run" in printed(manifest)
    if isinstance(place, dict):
        del place[path[-1]]
        assert "Run" in printed(manifest)
