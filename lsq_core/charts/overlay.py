"""Charts of several patterns over layers, their correlations, and ranks by two metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lsq_core.charts.style import NEUTRAL, apply_layout, module_color, ring_markers, short_type

#: Colours of lines that do not represent bits, modules or methods (after Tol's bright and vibrant
#: schemes); repeated colours are distinguished by dashes.
LINE_COLORS = (
    "#4477AA",
    "#EE6677",
    "#228833",
    "#CCA000",
    "#AA3377",
    "#33BBEE",
    "#EE7733",
    "#8a929c",
)
_DASHES = ("solid", "dash", "dot")
#: Red below zero, blue above; high correlations, which are common, get most of the blue range.
_DIVERGING = [
    [0.0, "#B2182B"],
    [0.5, "#F7F7F7"],
    [0.8, "#D1E5F0"],
    [0.95, "#67A9CF"],
    [1.0, "#2166AC"],
]


@dataclass(frozen=True)
class LineStyle:
    """The style of a line, the same in every facet."""

    color: str
    dash: str = "solid"


def line_style(number: int) -> LineStyle:
    """Return the style of the n-th line."""
    cycle, index = divmod(number, len(LINE_COLORS))
    return LineStyle(LINE_COLORS[index], _DASHES[cycle % len(_DASHES)])


def overlay_lines(
    frame: pd.DataFrame,
    styles: Mapping[str, LineStyle],
    axis: str,
    log: bool,
    height: int = 520,
) -> go.Figure:
    """Plot lines over layers, with one facet per part.

    ``frame`` has the columns ``line, part, layer, value``; ``styles`` maps each line to its style.
    """
    parts = list(dict.fromkeys(frame["part"]))
    columns = 1 if len(parts) == 1 else 2
    rows = -(-len(parts) // columns)
    figure = make_subplots(
        rows=rows,
        cols=columns,
        shared_xaxes=True,
        subplot_titles=parts,
        vertical_spacing=0.12 if rows < 4 else 0.06,
        horizontal_spacing=0.13,
    )
    for number, part in enumerate(parts):
        row, column = number // columns + 1, number % columns + 1
        rows_of = frame[frame["part"] == part]
        for line, points in rows_of.groupby("line", sort=False):
            figure.add_trace(_line(points, line, styles[line], number == 0), row, column)
        if column == 1:
            figure.update_yaxes(title_text=axis, row=row, col=1)
        if row == rows or number + columns >= len(parts):
            figure.update_xaxes(title_text="layer", showticklabels=True, row=row, col=column)
    if log:
        values = frame["value"][frame["value"] > 0]
        decades = np.log10(values.max() / values.min()) if len(values) else 0
        figure.update_yaxes(type="log", exponentformat="power", dtick=1 if decades < 6 else 2)
    for note in figure.layout.annotations:
        note.update(font_size=13)
    apply_layout(figure, max(height, 190 * rows + 90))
    legend = {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.06, "yanchor": "bottom"}
    return figure.update_layout(legend=legend, margin={"t": 70, "b": 44, "r": 40})


def _line(points: pd.DataFrame, name: str, style: LineStyle, in_legend: bool) -> go.Scatter:
    return go.Scatter(
        x=points["layer"],
        y=points["value"],
        name=name,
        legendgroup=name,
        showlegend=in_legend,
        mode="lines+markers",
        line={"color": style.color, "width": 1.6, "dash": style.dash},
        marker={"size": 3.5},
        hovertemplate=f"{name}<br>layer %{{x}}: %{{y:.4g}}<extra></extra>",
    )


def correlation_heatmap(correlations: pd.DataFrame, height: int = 520) -> go.Figure:
    """Plot Spearman's ρ of all pairs of lines; cells of NaN are blank."""
    names = list(correlations.index)
    values = correlations.to_numpy()
    figure = go.Figure(
        go.Heatmap(
            x=list(range(len(names))),
            y=list(range(len(names))),
            z=values,
            zmin=-1,
            zmax=1,
            colorscale=_DIVERGING,
            xgap=2,
            ygap=2,
            text=[["" if np.isnan(v) else f"{v:.2f}" for v in row] for row in values],
            texttemplate="%{text}",
            textfont={"size": 12 if len(names) <= 8 else 9},
            customdata=[[f"{a} and {b}" for b in names] for a in names],
            hovertemplate="%{customdata}<br>ρ = %{z:.4f}<extra></extra>",
            hoverongaps=False,
            showscale=False,
        )
    )
    ticks = {"tickmode": "array", "tickvals": list(range(len(names))), "ticktext": names}
    figure.update_xaxes(**ticks, tickangle=-40 if len(names) > 2 else 0, automargin=True)
    figure.update_yaxes(**ticks, autorange="reversed", automargin=True)
    apply_layout(figure, height)
    figure.update_xaxes(showgrid=False)
    figure.update_yaxes(showgrid=False)
    return figure.update_layout(
        margin={"l": 10, "r": 10, "t": 34, "b": 10}, modebar_orientation="h"
    )


def rank_scatter(
    frame: pd.DataFrame, x_title: str, y_title: str, picked: str | None = None, height: int = 520
) -> go.Figure:
    """Plot the ranks of matrices by two metrics.

    ``frame`` has the columns ``module, type, layer, x, y, x_rank, y_rank``. Rank 1, the largest
    value, is at the right and top; ranks are equal on the dotted line. ``customdata[0]`` of each
    point is its module; the module ``picked`` is ringed.
    """
    figure = go.Figure()
    last = len(frame)
    figure.add_trace(
        go.Scatter(
            x=[1, last],
            y=[1, last],
            mode="lines",
            line={"color": NEUTRAL, "width": 1.2, "dash": "dot"},
            name="equal rank",
            hoverinfo="skip",
        )
    )
    for kind, points in frame.groupby("type", sort=False):
        figure.add_trace(_rank_points(str(kind), points, x_title, y_title))
    ring = frame[frame["module"] == picked]
    if not ring.empty:
        figure.add_trace(ring_markers(ring["x_rank"], ring["y_rank"], "selected", size=18))
    for update, title in ((figure.update_xaxes, x_title), (figure.update_yaxes, y_title)):
        update(title_text=f"rank by {title} (1 = largest)", range=[1.03 * last + 1, -0.03 * last])
    apply_layout(figure, height)
    return figure.update_layout(
        margin={"t": 40},
        modebar_orientation="h",
        legend={"x": 1.01, "xanchor": "left", "y": 1, "yanchor": "top"},
    )


def _rank_points(kind: str, points: pd.DataFrame, x_title: str, y_title: str) -> go.Scatter:
    name = short_type(kind)
    return go.Scatter(
        x=points["x_rank"],
        y=points["y_rank"],
        mode="markers",
        name=name,
        marker={
            "color": module_color(kind),
            "size": 8,
            "symbol": "circle" if "attn" in kind or "attention" in kind else "diamond",
        },
        # Unselected points keep their style; a ring marks the selected one.
        unselected={"marker": {"opacity": 1}},
        customdata=points[["module", "layer", "x", "y"]],
        hovertemplate=f"{name}, layer %{{customdata[1]}}<br>{x_title}: rank %{{x:.0f}} "
        f"(%{{customdata[2]:.4g}})<br>{y_title}: rank %{{y:.0f}} (%{{customdata[3]:.4g}})"
        "<extra></extra>",
    )
