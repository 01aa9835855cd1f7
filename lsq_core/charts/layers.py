"""Line charts of scores over layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lsq_core.charts.style import apply_layout, in_two_lines, layer_axis, module_color, ring_markers


@dataclass(frozen=True, eq=False)
class Panel:
    """One metric over layers.

    ``frame`` has the columns ``type, label, layer, value, z, rises``. ``z`` is the z-score of
    points flagged by Algorithm 1 and NaN for the others; ``rises`` is whether the score increases
    from the previous layer to a flagged one.
    """

    frame: pd.DataFrame
    title: str
    axis: str
    log: bool = False


#: Height of one panel, and total height above and below the panels, in pixels.
_PANEL_HEIGHT, _FRAME_HEIGHT = 170, 129


def over_layers(panels: Sequence[Panel]) -> go.Figure:
    """Stack panels over a shared layer axis and ring the flagged points.

    Panels with the same lines share a legend. The first panel's legend is above it, any others are
    below all panels. Legends wrap on narrow screens.
    """
    figure = make_subplots(
        rows=len(panels),
        shared_xaxes=True,
        vertical_spacing=0.085,
        subplot_titles=[p.title for p in panels],
    )
    legends: dict[tuple[str, ...], str] = {}
    ringed: set[str] = set()
    for row, panel in enumerate(panels, start=1):
        lines = tuple(panel.frame["label"].unique())
        first = lines not in legends
        legend = legends.setdefault(lines, f"legend{len(legends) + 1 if legends else ''}")
        for (_, label), part in panel.frame.groupby(["type", "label"], sort=False):
            figure.add_trace(_line(part, label, legend, first), row, 1)
        flagged = panel.frame.dropna(subset=["z"])
        if not flagged.empty:
            figure.add_trace(_rings(flagged, legend, legend not in ringed), row, 1)
            ringed.add(legend)
        figure.update_yaxes(title_text=in_two_lines(panel.axis), row=row, col=1)
        if panel.log:
            figure.update_yaxes(type="log", exponentformat="power", dtick=1, row=row, col=1)
    layers = max(int(panel.frame["layer"].max()) for panel in panels) + 1
    figure.update_xaxes(**layer_axis(layers))
    figure.update_xaxes(title_text="layer", row=len(panels), col=1)
    for note in figure.layout.annotations:  # left-align the panel titles
        note.update(x=0, xanchor="left", font_size=13)
    height = _PANEL_HEIGHT * len(panels)
    for number, legend in enumerate(legends.values()):
        _place_legend(figure, legend, number, height)
    apply_layout(figure, height + _FRAME_HEIGHT)
    return figure.update_layout(margin={"l": 70, "t": 54, "b": 75})


def _place_legend(figure: go.Figure, legend: str, number: int, height: float) -> None:
    """Place the first legend above its panel's title and any others below the layer axis."""
    if number == 0:
        place = {"y": 1 + 22 / height, "yanchor": "bottom"}
    else:
        place = {"y": -(24 + 24 * number) / height, "yanchor": "top"}
    row = {"orientation": "h", "x": 0, "xanchor": "left", "tracegroupgap": 0}
    figure.update_layout({legend: row | place})


def _line(part: pd.DataFrame, label: str, legend: str, in_legend: bool) -> go.Scatter:
    kind = part["type"].iloc[0]
    return go.Scatter(
        x=part["layer"],
        y=part["value"],
        name=label,
        legend=legend,
        legendgroup=f"{legend} {label}",
        showlegend=in_legend,
        mode="lines+markers",
        line={"color": module_color(kind), "width": 1.6, "dash": _dash(kind)},
        marker={"size": 4.5},
        hovertemplate=f"{label}, layer %{{x}}<br>%{{y:.4g}}<extra></extra>",
    )


def _dash(kind: str) -> str:
    return "solid" if "attn" in kind or "attention" in kind else "dot"


def _rings(flagged: pd.DataFrame, legend: str, in_legend: bool) -> go.Scatter:
    markers = ring_markers(flagged["layer"], flagged["value"], "flagged", size=13)
    return markers.update(
        legend=legend,
        legendgroup=f"{legend} flagged",
        showlegend=in_legend,
        cliponaxis=False,
        customdata=flagged[["label", "z"]],
        hoverinfo=None,
        hovertemplate="%{customdata[0]}, layer %{x}<br>%{y:.4g}"
        "<br>flagged, z = %{customdata[1]:.2f}<extra></extra>",
    )
