"""A page on an artifact that a person would rather look at than read its manifest; see `charts` for what it needs.

An artifact may come from a stranger: what is missing in its manifest is left out, and names are shown as they stand.
Charts are of bins and samples, so that a page is as large for ten million users as for ten thousand.
"""

from __future__ import annotations

import html
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from gpu_init.artifact.format import REPORT
from gpu_init.artifact.read import Artifact, InteractionArrays, ModalityArrays
from gpu_init.errors import InputError
from gpu_init.files import storage
from gpu_init.method.describe import SAMPLE_COLUMNS
from gpu_init.show import charts
from gpu_init.show.charts import Section

SHOWN = 700  # points of a kind in a plane
MOST_BARS = 64  # clusters with a bar each
MOST_ROWS = 32  # clusters with a row of typical items
NAME_COLUMNS = ("name", "title", "item_name")
_NORM_ROWS = 100_000  # users whose norms are looked at
_BINS = 60


def report(artifact: Artifact, out: str | None = None, item_names: str | None = None) -> str:
    """Write the page and give its path.

    Parameters
    ----------
    artifact : Artifact
    out : str, optional
        Where; by default ``report.html`` in the artifact, which is no part of it.
    item_names : str, optional
        Table (Parquet, CSV or TSV) of item ids, in its first column, and names, in one called name or title or in
        its second.

    Raises
    ------
    InputError
        plotly is not installed, the names cannot be read, or the page cannot be written.
    """
    if not charts.available():
        raise InputError(f"no report: {charts.REMEDY}")
    names = None if item_names is None else read_names(item_names)
    place = os.path.join(artifact.path, REPORT) if out is None else out
    sections = [
        *_facts(artifact),
        *(one for name in artifact for one in _modality(artifact, name, names)),
        *_cost(artifact),
    ]
    rows = artifact.manifest["users"]["rows"]
    text = charts.page("gpu-init report", f"{len(artifact)} modalities, {rows:,} users: {artifact.path}", sections)
    with storage.writing(os.path.dirname(os.path.abspath(place))):
        storage.write_file(place, text.encode("utf-8", "replace"))
    return place


def read_names(path: str) -> dict[str, str]:
    """Names of items by their ids, both as text."""
    try:
        if path.endswith((".parquet", ".pq")):
            frame = pd.read_parquet(path).astype("str")
        else:
            frame = pd.read_csv(path, sep=None, engine="python", dtype="str", keep_default_na=False)
        if frame.shape[1] < 2:
            raise ValueError("fewer than two columns")
    except Exception as error:  # whatever a broken file makes of the libraries
        why = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise InputError(f"{path}: not a table of item ids and names ({why}).") from None
    column = next((name for name in frame if str(name).lower() in NAME_COLUMNS), frame.columns[1])
    return dict(zip(frame.iloc[:, 0], frame[column], strict=True))


def _facts(artifact: Artifact) -> Iterator[Section]:
    manifest = artifact.manifest
    settings = _mapping(manifest.get("settings"))
    counts = _mapping(manifest.get("interactions"))
    cells: list[list[Any]] = [[key, str(value)] for key, value in settings.items() if value is not None]
    cells += [["interactions kept", counts.get("kept", "-")], ["pairs of user and item", counts.get("pairs", "-")]]
    yield "The job", "Settings, and what they were applied to.", charts.rows(cells, ["", ""])

    if isinstance(counts.get("embedding"), dict) and artifact.interactions is not None:
        yield "Users by what they did", *_embedding(artifact.interactions, counts["embedding"])


def _embedding(arrays: InteractionArrays, facts: dict[str, Any]) -> tuple[str, Any]:
    drawn = charts.figure(height=300)
    values = arrays.singular_values
    drawn.add_scatter(x=list(range(1, len(values) + 1)), y=values.tolist(), mode="markers+lines")
    drawn.update_xaxes(title="direction")
    drawn.update_yaxes(title="singular value")
    return (
        "Users are clustered, for all modalities alike, by where their interactions lie in the leading directions of"
        " all interactions, normalized by both degrees. Values near 1 part users who share hardly an item;"
        f" {_count(facts.get('items_outside'))} items lie outside the large components and have no part in them.",
        drawn,
    )


def _modality(artifact: Artifact, name: str, names: dict[str, str] | None) -> Iterator[Section]:
    arrays, facts = artifact[name], _mapping(artifact.manifest["modalities"].get(name))
    sample = None if arrays.sample is None else dict(zip(SAMPLE_COLUMNS, arrays.sample.T, strict=True))
    yield f"{name}: clusters", *_sizes(arrays, facts)
    if isinstance(facts.get("choice"), dict):
        yield f"{name}: how many clusters", *_choice(facts)
    if sample is not None and arrays.sample_items is not None:
        yield f"{name}: the semantic gap", *_gap(sample, arrays.sample_items)
        yield f"{name}: own items", *_cosines(sample)
        yield f"{name}: norms", *_norms(arrays)
        yield f"{name}: lambda", *_lambdas(sample, facts)
    if arrays.typical is not None:
        yield f"{name}: typical items", *_typical(artifact, arrays.typical, names)


def _sizes(arrays: ModalityArrays, facts: dict[str, Any]) -> tuple[str, Any]:
    sizes = np.bincount(arrays.labels[arrays.labels >= 0], minlength=len(arrays.centroids))
    drawn = charts.figure(height=300)
    cold = _count(facts.get("cold_users"))
    if len(sizes) <= MOST_BARS:
        drawn.add_bar(x=[str(number) for number in range(len(sizes))], y=sizes.tolist())
        drawn.update_xaxes(title="cluster", type="category")
        drawn.update_yaxes(title="users")
    else:
        drawn.add_histogram(x=sizes.tolist(), nbinsx=_BINS)
        drawn.update_xaxes(title="users in a cluster")
        drawn.update_yaxes(title="clusters")
    return f"{len(sizes)} clusters of users; {cold} users have no usable interaction and are in none.", drawn


def _choice(facts: dict[str, Any]) -> tuple[str, Any]:
    choice = facts["choice"]
    scores = [_mapping(one) for one in choice.get("candidates") or []]
    ks = [one.get("clusters") for one in scores]
    drawn = charts.figure()
    error = {"type": "data", "array": [one.get("standard_error") for one in scores]}
    drawn.add_scatter(x=ks, y=[one.get("silhouette") for one in scores], error_y=error, name="silhouette")
    second = {
        "x": ks,
        "y": [one.get("calinski_harabasz") for one in scores],
        "name": "Calinski-Harabasz",
        "yaxis": "y2",
    }
    drawn.add_scatter(**second, line={"dash": "dot"})
    drawn.update_xaxes(title="K", type="log", tickvals=[2, 4, 8, 16, 32, 64])
    drawn.update_layout(
        yaxis={"title": "silhouette"},
        yaxis2={"overlaying": "y", "side": "right", "automargin": True, "showgrid": False},
    )
    return (
        f"{facts.get('clusters')} were taken, by scores on {_count(choice.get('rows'))} rows; one blob of the same"
        f" spread reaches a silhouette of {_number(choice.get('blob_silhouette'))} at the best K.",
        drawn,
    )


def _gap(sample: dict[str, NDArray[Any]], items: NDArray[Any]) -> tuple[str, Any]:
    drawn = charts.figure(height=420)
    few, some = _few(len(items)), _few(len(sample["lambda"]))
    panels = {"random": "random", "local": "local only", "blended": "blended"}
    for number, (kind, label) in enumerate(panels.items()):
        axes = {"xaxis": f"x{number + 1}", "yaxis": f"y{number + 1}"}
        places = {"mode": "markers", "hoverinfo": "skip"}
        grey = {"size": 4, "opacity": 0.35, "color": "#9aa4ae"}
        first = {"name": "items", "legendgroup": "items", "showlegend": number == 0, **places, "marker": grey}
        drawn.add_scatter(x=_list(items[few, 0]), y=_list(items[few, 1]), **first, **axes)
        x, y = sample[f"{kind}_x"][some], sample[f"{kind}_y"][some]
        own = {"size": 4, "opacity": 0.6, "color": charts.COLOURS[(1, 3, 0)[number]]}
        drawn.add_scatter(x=_list(x), y=_list(y), name=f"users, {label}", marker=own, **places, **axes)
        bare = {"showgrid": False, "zeroline": False}
        across = {"domain": [number / 3 + 0.02, (number + 1) / 3 - 0.02], "title": label, **bare}
        upward = {"anchor": f"x{number + 1}", "showticklabels": False, **bare}
        if number:  # all to the scale of the first
            across, upward = {**across, "matches": "x"}, {**upward, "matches": "y"}
        drawn.update_layout({f"xaxis{number + 1}": across, f"yaxis{number + 1}": upward})
    words = (
        "A sample of users and items in the plane of the items' two principal directions: users at random know"
        " nothing of where items lie; as means of their items, and blended with their clusters, they lie among them."
    )
    return words, drawn


def _cosines(sample: dict[str, NDArray[Any]]) -> tuple[str, Any]:
    own, others = sample["cosine_own"], sample["cosine_others"]
    closer = float((own > others).mean())
    words = (
        f"Mean cosine of a user's vector to the user's own items and to random ones; {closer:.1%} are closer to theirs."
    )
    return words, _bins({"own items": own, "random items": others}, "cosine")


def _norms(arrays: ModalityArrays) -> tuple[str, Any]:
    assert arrays.sample_items is not None
    rows = np.unique(np.linspace(0, len(arrays.users) - 1, min(len(arrays.users), _NORM_ROWS)).astype(int))
    users = np.concatenate(
        [
            np.linalg.norm(arrays.users[part].astype(np.float64), axis=1)
            for part in np.array_split(rows, len(rows) // 4096 + 1)
        ]
    )
    items = arrays.sample_items[:, 2]
    words = f"Lengths of vectors: users' mean {users.mean():.4g}, items' {items.mean():.4g}."
    return words, _bins({"users": users, "items": items}, "norm")


def _lambdas(sample: dict[str, NDArray[Any]], facts: dict[str, Any]) -> tuple[str, Any]:
    drawn = charts.figure()
    some = _few(len(sample["lambda"]))
    jitter = np.random.default_rng(0).uniform(0.95, 1.05, len(some))
    x, y = sample["count"][some] * jitter, sample["lambda"][some]
    drawn.add_scatter(x=_list(x), y=_list(y), mode="markers", marker={"size": 4, "opacity": 0.5}, name="users")
    policy = facts.get("lambda")
    words = f"Weight of a user's own items is {_number(policy)} for all."
    if isinstance(policy, dict):
        means = [_mapping(one) for one in policy.get("by_count") or []]
        at = [_mapping(one).get("from") for one in means]
        drawn.add_scatter(
            x=at, y=[one.get("mean") for one in means], mode="lines+markers", name="mean by effective count"
        )
        by = next((f"{name} {_number(policy[name])}" for name in ("tau", "temperature") if name in policy), "")
        words = (
            f"Weight of a user's own items by policy {policy.get('policy')}, {by}: mean {_number(policy.get('mean'))}."
        )
    drawn.update_xaxes(title="effective count of a user's items", type="log")
    drawn.update_yaxes(title="lambda", range=[-0.03, 1.03])
    return words, drawn


def _typical(artifact: Artifact, typical: NDArray[Any], names: dict[str, str] | None) -> tuple[str, Any]:
    ids = artifact.item_ids

    def name(row: int) -> str:
        item = str(row if ids is None else ids.iloc[row])
        return item if names is None else names.get(item, item)

    rows = artifact.manifest["items"]["rows"]
    cells = [
        [number, " · ".join(name(int(row)) for row in line if 0 <= row < rows)]
        for number, line in enumerate(typical[:MOST_ROWS])
    ]
    said = "names" if names is not None else "ids; --item-names PATH gives names"
    more = f" The first {MOST_ROWS} of {len(typical)} clusters." if len(typical) > MOST_ROWS else ""
    return f"Items nearest to each centroid ({said}).{more}", charts.rows(cells, ["cluster", "items"])


def _cost(artifact: Artifact) -> Iterator[Section]:
    timings = _mapping(artifact.manifest.get("timings"))
    steps = [_mapping(one) for one in timings.get("steps") or []]
    names = [html.escape(str(one.get("step"))[:60]) for one in steps]
    drawn = charts.figure(height=100 + 28 * len(steps))
    drawn.add_bar(y=names, x=[one.get("seconds") for one in steps], orientation="h", name="seconds")
    memory = [(_bytes(one.get("memory_bytes"))) for one in steps]
    drawn.add_scatter(
        y=names, x=memory, mode="markers", name="MiB in memory at its end", xaxis="x2", marker={"size": 9}
    )
    drawn.update_yaxes(autorange="reversed")
    drawn.update_layout(
        xaxis={"title": "seconds"}, xaxis2={"overlaying": "x", "side": "top", "showgrid": False, "rangemode": "tozero"}
    )
    peak = _bytes(timings.get("peak_memory_bytes"))
    words = (
        f"{_number(timings.get('seconds'))} s in all, at most {'-' if peak is None else f'{peak:,.0f}'} MiB in memory."
    )
    yield "Time and memory", words, drawn


def _bins(parts: dict[str, NDArray[Any]], title: str) -> Any:
    """Shares of the values of each part in common bins, as steps."""
    every = np.concatenate([values[np.isfinite(values)] for values in parts.values()])
    low, high = np.quantile(every, [0.001, 0.999]) if len(every) else (0.0, 1.0)
    edges = np.linspace(low, high if high > low else low + 1, _BINS + 1)
    drawn = charts.figure(height=320)
    for name, values in parts.items():
        shares = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0] / max(len(values), 1)
        line = {"line": {"shape": "hvh", "width": 1.5}, "fill": "tozeroy", "mode": "lines"}
        drawn.add_scatter(x=_list((edges[1:] + edges[:-1]) / 2), y=_list(shares), name=name, **line)
    drawn.update_xaxes(title=title)
    drawn.update_yaxes(title="share")
    return drawn


def _few(count: int) -> NDArray[Any]:
    return np.unique(np.linspace(0, count - 1, min(count, SHOWN)).astype(int))


def _list(values: NDArray[Any]) -> list[float]:
    """Numbers for a page, of five digits."""
    return [float(f"{value:.5g}") for value in values]


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "-"


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "-"


def _bytes(value: Any) -> float | None:
    return value / 2**20 if isinstance(value, int) else None
