"""What a person reads of an artifact: at the end of a run, and from `gpu-init inspect`.

A manifest may come from a stranger. Whatever is missing in it, or of another kind than it should be, shows as "-",
and nothing in it reaches the terminal as markup or as a control sequence.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from gpu_init.settings import BELONGING

BARS = 16  # up to this many clusters each has its own bar
_BAR_WIDTH = 24
_SETTINGS = (
    *("lambda", "tau", "temperature", "clusters", "cluster_on", "cluster_rank", "weighting"),
    *("dim", "whiten", "scale", "dtype", "seed", "restarts"),
)

Facts = Iterable[tuple[str, RenderableType]]


def table(manifest: dict[str, Any], console: Console) -> None:
    """Print the summary of an artifact.

    Parameters
    ----------
    manifest : dict
        Of an artifact that `artifact.load` opened.
    console : rich.console.Console
        Where to; 80 columns are enough.
    """
    block = "#" if console.options.ascii_only else "\u2588"
    parts = [
        _two_columns("Run", _run(manifest)),
        *(
            _two_columns(f"Modality {_say(name)}", _modality(_mapping(facts), block))
            for name, facts in _mapping(manifest.get("modalities")).items()
        ),
        _two_columns("Time", _times(_mapping(manifest.get("timings")))),
        _files(_mapping(manifest.get("files"))),
    ]
    with console.capture() as printed:
        for part in parts:
            console.print()
            console.print(part)
    encoding = console.encoding  # a terminal that lacks a letter shows "?", and does not end the job
    console.file.write(printed.get().encode(encoding, "replace").decode(encoding))


def candidates(frame: Any, by: str, console: Console, most: int = 15) -> None:
    """Print the best candidates of `tune.table`, with their intervals."""
    grid = Table(title=f"The best {min(most, len(frame))} of {len(frame)} candidates", title_justify="left", box=None)
    for name in (by, "95% interval", "behind the best", "modalities", "lambda", "K", "on", "weighting", "dim"):
        grid.add_column(name, justify="left", overflow="fold")
    for _, row in frame.head(most).iterrows():
        dim = f"{row['dim']:.0f}{' white' if row['whiten'] else ''}" if row["dim"] > 0 else "-"
        grid.add_row(
            f"{row[by]:.4f}",
            f"{row['low']:.4f} to {row['high']:.4f}",
            f"{row['behind_low']:.4f} to {row['behind_high']:.4f}",
            *map(_say, (row["modalities"], row["lambda"], row["clusters"], row["cluster_on"], row["weighting"], dim)),
        )
    console.print(grid)


def _run(manifest: dict[str, Any]) -> Facts:
    axes = {axis: _mapping(manifest.get(axis)) for axis in ("users", "items")}
    for axis, facts in axes.items():
        ids = facts.get("ids")
        yield (
            "sessions" if facts.get("are") == "sessions" else axis,
            Text(f"{_number(facts.get('rows'))}, ids: {'-' if ids is None else _say(ids)}"),
        )
    counts = _mapping(manifest.get("interactions"))
    yield (
        "interactions",
        Text(
            f"{_number(counts.get('read'))} read, {_number(counts.get('kept'))} kept,"
            f" {_number(counts.get('pairs'))} pairs, weight {_number(counts.get('weight'))}"
        ),
    )
    if "embedding" in counts:
        yield "users by what they did", Text(_embedding(_mapping(counts["embedding"])))
    settings = _mapping(manifest.get("settings"))
    yield (
        "settings",
        Text(", ".join(f"{key} {_say(settings[key])}" for key in _SETTINGS if _said(settings, key)) or "-"),
    )
    backend = _mapping(manifest.get("backend"))
    kernels, kmeans = _say(backend.get("kernels")), _say(backend.get("kmeans"))
    yield "backend", Text(f"{_say(backend.get('name'))}, kernels {kernels}, K-means {kmeans}")
    yield "gpu-init", Text(_say(manifest.get("gpu_init_version")))


def _said(settings: dict[str, Any], key: str) -> bool:
    """Whether a setting is worth a word: what goes with another value than the one taken is None."""
    return key in settings and not (settings[key] is None and any(key == name for name, _, _ in BELONGING))


def _modality(facts: dict[str, Any], block: str) -> Facts:
    width, source = _number(facts.get("width")), _number(facts.get("source_width"))
    yield "width", Text(width if source in (width, "-") else f"{width}, projected from {source}")
    yield "items", Text(f"{_number(facts.get('items'))} with features, {_number(facts.get('missing_items'))} without")
    yield "users", Text(f"{_number(facts.get('warm_users'))} warm, {_number(facts.get('cold_users'))} cold")
    lam = facts.get("lambda")
    yield (
        "lambda, scale",
        Text(f"{_policy(lam) if isinstance(lam, dict) else _say(lam)}, {_number(facts.get('scale'))}"),
    )
    for part, norms in _mapping(facts.get("norms")).items():
        mean, low, high = (_number(_mapping(norms).get(key)) for key in ("mean", "min", "max"))
        yield f"norms, {_say(part)}", Text(f"mean {mean}, from {low} to {high}")
    yield "K-means", Text(_kmeans(_mapping(facts.get("kmeans"))))
    if "choice" in facts:
        yield "K chosen", Text(_choice(_mapping(facts["choice"]), facts.get("clusters")))
    yield f"K {_number(facts.get('clusters'))}, users", _sizes(facts.get("cluster_sizes"), block)
    if "item_cluster_sizes" in facts:
        yield "items", _sizes(facts["item_cluster_sizes"], block)


def _embedding(facts: dict[str, Any]) -> str:
    """Dimensions that users are placed in by their interactions."""
    values = facts.get("singular_values")
    low = _number(values[-1]) if isinstance(values, list) and values else "-"
    settled = "settled" if facts.get("settled") is True else "not settled"
    return (
        f"{_number(facts.get('rank'))} dimensions, singular values down to {low}, {settled} after"
        f" {_number(facts.get('products'))} products; {_number(facts.get('items_outside'))} items outside"
    )


def _policy(facts: dict[str, Any]) -> str:
    """Policy of lambda, what it went by, and where the users' lambdas lie."""
    by = next((f", {name} {_number(facts[name])}" for name in ("tau", "temperature") if name in facts), "")
    quantiles = _mapping(facts.get("quantiles"))
    low, middle, high = (_number(quantiles.get(at)) for at in ("0.05", "0.5", "0.95"))
    mean = _number(facts.get("mean"))
    return f"{_say(facts.get('policy'))}{by} (mean {mean}, median {middle}, 90% from {low} to {high})"


def _choice(facts: dict[str, Any], clusters: Any) -> str:
    """Silhouettes of the K that was taken and of a blob."""
    listed = facts.get("candidates")
    scores = listed if isinstance(listed, list) else []
    mine: Any = next((one for one in scores if _mapping(one).get("clusters") == clusters), {})
    found, blob = _number(_mapping(mine).get("silhouette")), _number(facts.get("blob_silhouette"))
    return f"auto, of {len(scores)} on {_number(facts.get('rows'))} rows: silhouette {found}, a blob's {blob}"


def _kmeans(facts: dict[str, Any]) -> str:
    inertia = facts.get("inertia")
    path = "-"
    if isinstance(inertia, list) and inertia:
        path = " -> ".join(_number(value) for value in (inertia if len(inertia) == 1 else (inertia[0], inertia[-1])))
    return f"{_say(facts.get('form'))}, {_number(facts.get('passes'))} passes, inertia {path}"


def _sizes(sizes: Any, block: str) -> RenderableType:
    """Show a bar for each of a few clusters, the spread of many."""
    if not isinstance(sizes, list) or not sizes or not all(type(size) is int and size >= 0 for size in sizes):
        return Text("-")
    largest = max(sizes)
    if len(sizes) > BARS:
        low, middle = min(sizes), sorted(sizes)[len(sizes) // 2]
        empty = sizes.count(0)
        return Text(f"min {_number(low)}, median {_number(middle)}, max {_number(largest)}, {empty:,} empty")
    grid = _grid(("right", "right", "left"))
    for number, size in enumerate(sizes):
        grid.add_row(Text(str(number)), Text(_number(size)), Text(block * (size * _BAR_WIDTH // max(largest, 1))))
    return grid


def _times(timings: dict[str, Any]) -> Facts:
    steps = timings.get("steps")
    for step in steps if isinstance(steps, list) else ():
        facts = _mapping(step)
        yield _say(facts.get("step")), Text(_seconds(facts.get("seconds")))
    peak = _bytes(timings.get("peak_memory_bytes"))
    yield (
        "whole run",
        Text(f"{_seconds(timings.get('seconds'))}, peak memory {peak}, ended {_say(timings.get('finished'))}"),
    )


def _files(files: dict[str, Any]) -> Table:
    grid = _grid(("left", "left", "left", "right"))
    grid.title = Text("Files")
    for name, entry in files.items():
        facts = _mapping(entry)
        shape = facts.get("shape")
        what = " x ".join(map(_number, shape)) if isinstance(shape, list) else f"{_number(facts.get('rows'))} rows"
        grid.add_row(Text(_say(name)), Text(what), Text(_say(facts.get("dtype", ""))), Text(_bytes(facts.get("bytes"))))
    return grid


def _two_columns(title: str, rows: Facts) -> Table:
    grid = _grid(("left", "left"))
    grid.title = Text(title)
    grid.columns[0].min_width = 20
    for name, value in rows:
        grid.add_row(Text(name, "dim"), value)
    return grid


def _grid(alignments: tuple[str, ...]) -> Table:
    grid = Table(box=None, show_header=False, padding=(0, 2, 0, 0), title_justify="left", title_style="bold")
    for alignment in alignments:
        # Long words fold: cut short, they would end in a sign that not every terminal has.
        grid.add_column(justify="right" if alignment == "right" else "left", overflow="fold")
    return grid


# Words and numbers.


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _say(value: Any) -> str:
    """Give a value that is not a table as short printable text."""
    if value is None or isinstance(value, dict | list):
        return "-"
    return "".join(letter if letter.isprintable() else "?" for letter in str(value)[:120])


def _number(value: Any) -> str:
    if type(value) is int:
        return f"{value:,}" if abs(value) < 10**18 else "-"
    if type(value) is not float:
        return "-"
    return f"{value:,.0f}" if value.is_integer() and abs(value) < 10**15 else f"{value:.4g}"


def _seconds(value: Any) -> str:
    if type(value) not in (int, float) or not 0 <= value < 10**9:
        return "-"
    if value < 60:
        return f"{value:.2f} s"
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {seconds} s"


def _bytes(value: Any) -> str:
    if type(value) is not int or not 0 <= value < 10**18:
        return "-"
    size, units = float(value), ["bytes", "kB", "MB", "GB", "TB", "PB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.0f} {units[0]}" if units[0] == "bytes" else f"{size:.1f} {units[0]}"
