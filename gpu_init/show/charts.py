"""Charts by plotly on one page that needs nothing else, no network and no other file; light or dark as is wanted."""

from __future__ import annotations

import html
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

REMEDY = "plotly draws it, and is not there: pip install 'gpu-init[report]'"
COLOURS = ("#3b82d6", "#e08a1e", "#2f9e77", "#c2527a", "#8a6fd1", "#7a8794")
Section = tuple[str, str, Any]  # title, what it says, a figure or HTML

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2733; --soft: #5b6875; --line: #d8dee5; --ground: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6ebf0; --soft: #9aa7b4; --line: #35414d; --ground: #151b22; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 1rem; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0.5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 0.25rem; }
section { border-top: 1px solid var(--line); margin-top: 1.5rem; padding-top: 0.75rem; } section h2 { margin: 0; }
p { color: var(--soft); margin: 0.25rem 0 0.75rem; max-width: 48rem; }
table { border-collapse: collapse; font-size: 0.9rem; } .wide { overflow-x: auto; }
td, th { text-align: left; padding: 0.2rem 0.9rem 0.2rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.js-plotly-plot text { fill: var(--ink) !important; }
.js-plotly-plot .gridlayer path, .js-plotly-plot .zerolinelayer path { stroke: var(--line) !important; }
.js-plotly-plot .bg { fill: transparent !important; }
.js-plotly-plot .hoverlayer text { fill: #fff !important; }
"""


def available() -> bool:
    """Whether plotly is installed."""
    return importlib.util.find_spec("plotly") is not None


def figure(height: int = 360, **layout: Any) -> Any:
    """Empty figure in the page's style."""
    import plotly.graph_objects as go

    return go.Figure(
        layout={
            "template": "none",
            "height": height,
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "colorway": COLOURS,
            "margin": {"l": 8, "r": 8, "t": 24, "b": 8},
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
            "xaxis": {"automargin": True, "gridcolor": "#ccc", "zeroline": False},
            "yaxis": {"automargin": True, "gridcolor": "#ccc", "zeroline": False},
            **layout,
        }
    )


def intervals(names: Sequence[str], middle: Any, low: Any, high: Any, title: str) -> Any:
    """Points with their intervals, one line each, the last on top."""
    drawn = figure(height=80 + 20 * len(names), showlegend=False)
    error = {"type": "data", "symmetric": False, "array": list(high - middle), "arrayminus": list(middle - low)}
    places = list(range(len(names)))
    drawn.add_scatter(x=list(middle), y=places, error_x=error, mode="markers", text=list(names), hoverinfo="text+x")
    drawn.update_xaxes(title=title)
    drawn.update_yaxes(tickvals=places, ticktext=list(names), tickfont={"size": 10})
    return drawn


def boxes(groups: Mapping[str, Sequence[tuple[str, Any]]], title: str) -> Any:
    """Boxes side by side: for each heading, one for each name and its values."""
    drawn = figure(height=420, showlegend=False)
    for colour, (heading, parts) in zip(COLOURS, groups.items(), strict=False):
        for name, values in parts:
            label = f"{heading} {name}"
            drawn.add_box(y=[float(value) for value in values], name=label, marker_color=colour, boxpoints=False)
    drawn.update_yaxes(title=title)
    drawn.update_xaxes(tickangle=-50, tickfont={"size": 10})
    return drawn


def page(title: str, about: str, sections: Sequence[Section]) -> str:
    """Whole page, plotly's own code within it."""
    from plotly.offline import get_plotlyjs

    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<link rel="icon" href="data:,">',
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>",
        f"<script>{get_plotlyjs()}</script></head><body>",
        f"<h1>{html.escape(title)}</h1><p>{html.escape(about)}</p>",
    ]
    for heading, words, body in sections:
        drawn = body if isinstance(body, str) else _drawn(body)
        parts.append(f"<section><h2>{html.escape(heading)}</h2><p>{html.escape(words)}</p>{drawn}</section>")
    return "\n".join([*parts, "</body></html>", ""])


def _drawn(figure_: Any) -> str:
    config = {"displaylogo": False, "responsive": True, "displayModeBar": False}
    return str(figure_.to_html(full_html=False, include_plotlyjs=False, config=config, default_width="100%"))


def rows(cells: Sequence[Sequence[Any]], head: Sequence[str]) -> str:
    """HTML of a table; numbers stand to the right."""

    def cell(value: Any) -> str:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        text = f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if number else str(value)
        return f"<td{' class=number' if number else ''}>{html.escape(text)}</td>"

    top = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(map(cell, line))}</tr>" for line in cells)
    return f"<div class=wide><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
