"""Heatmap of scores by layer and module."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from lsq_core.charts.layers import Panel
from lsq_core.charts.style import apply_layout, layer_axis

#: Ratio of the largest to the smallest positive score from which colours are logarithmic.
_LOG_RATIO = 10
#: Number of decades from which the colour bar labels only powers of ten.
_WIDE_DECADES = 2
#: Heights in pixels: one row, everything around the cells, the title, and the axis below.
_ROW_HEIGHT, _FRAME_HEIGHT, _TITLE_HEIGHT, _BELOW_AXIS = 34, 140, 30, 46
#: Heatmaps with fewer rows are as tall as one with this many.
_MIN_ROWS = 4
#: Marker and name of flagged cells, by whether the score rises. Markers are white with a dark edge,
#: to stand out on every colour.
_MARKS = {True: ("triangle-up", "jump"), False: ("triangle-down", "fall")}


def layer_heatmap(panel: Panel) -> go.Figure:
    """Plot one metric by layer (columns) and module (rows, in order of computation).

    Colours are logarithmic if the scores span a decade or more and none is negative. Cells flagged
    by Algorithm 1 are marked with an upward triangle if the score rises from the previous layer,
    else a downward one. ``customdata`` holds the untransformed scores.
    """
    frame = panel.frame.assign(row=panel.frame["label"].map(short_names))
    rows = list(dict.fromkeys(frame["row"]))
    layers = range(int(frame["layer"].min()), int(frame["layer"].max()) + 1)
    values = frame.pivot(index="row", columns="layer", values="value")
    values = values.reindex(index=rows, columns=layers).to_numpy(float)
    log = spans_decades(values)
    with np.errstate(divide="ignore", invalid="ignore"):
        shown = np.where(values > 0, np.log10(values), np.nan) if log else values
    figure = go.Figure(
        go.Heatmap(
            x=list(layers),
            y=rows,
            z=shown,
            customdata=values,
            colorscale="Viridis",
            xgap=1,
            ygap=1,
            hoverongaps=False,
            hovertemplate="%{y}, layer %{x}<br>%{customdata:.4g}<extra></extra>",
            colorbar=_color_bar(panel.axis, shown, log),
        )
    )
    for rises, part in _flagged(frame):
        figure.add_trace(_marks(part, rises))
    figure.update_xaxes(
        title_text="layer", title_standoff=10, **layer_axis(len(layers), min(layers))
    )
    figure.update_yaxes(autorange="reversed", type="category", automargin=True)
    height = _ROW_HEIGHT * max(len(rows), _MIN_ROWS)
    apply_layout(figure, height + _FRAME_HEIGHT)
    figure.update_xaxes(showgrid=False)
    figure.update_yaxes(showgrid=False)
    figure.add_annotation(
        text=panel.title,
        font_size=13,
        showarrow=False,
        xref="paper",
        yref="paper",
        x=0,
        y=1,
        xanchor="left",
        yanchor="bottom",
    )
    below = -_BELOW_AXIS / height
    figure.update_traces(colorbar={"y": below, "yanchor": "top"}, selector={"type": "heatmap"})
    return figure.update_layout(
        legend={"x": 0, "xanchor": "left", "y": below, "yanchor": "top"},
        margin={"l": 70, "t": _TITLE_HEIGHT, "b": _FRAME_HEIGHT - _TITLE_HEIGHT},
    )


def short_names(label: str) -> str:
    """Shorten ``q_proj, k_proj, v_proj`` to ``q, k, v``."""
    return label.replace("_proj", "")


def spans_decades(values: np.ndarray) -> bool:
    """Return whether the positive scores span a decade or more and none is negative."""
    known = values[np.isfinite(values)]
    positive = known[known > 0]
    if not len(positive) or (known < 0).any():
        return False
    return bool(positive.max() / positive.min() >= _LOG_RATIO)


def _color_bar(title: str, shown: np.ndarray, log: bool) -> dict:
    """Return colour bar settings, with scores rather than their logarithms as labels."""
    bar = {
        "title": {"text": title, "side": "bottom", "font": {"size": 12}},
        "orientation": "h",
        "x": 1,
        "xanchor": "right",
        "len": 0.6,
        "thickness": 12,
        "outlinewidth": 0,
        "ticks": "outside",
    }
    if log:
        ticks = _log_ticks(float(np.nanmin(shown)), float(np.nanmax(shown)))
        bar |= {"tickmode": "array", "tickvals": ticks, "ticktext": [_power(t) for t in ticks]}
    return bar


def _log_ticks(low: float, high: float) -> list[float]:
    """Return the logarithms to label: powers of ten, and over a narrow range 2 and 5 times them."""
    if high - low < _WIDE_DECADES:
        fractions = np.log10([1, 2, 5])
        ticks = [
            e + f for e in range(int(np.floor(low)), int(np.floor(high)) + 1) for f in fractions
        ]
        return [float(t) for t in ticks if low <= t <= high]
    step = 1 if high - low < 7 else 2
    return [float(e) for e in range(int(np.ceil(low)), int(np.floor(high)) + 1, step)]


def _power(exponent: float) -> str:
    """Format ten to the given power: as a plain number if near one, else as a power of ten."""
    if exponent == int(exponent) and abs(exponent) > 2:
        return f"10<sup>{int(exponent)}</sup>".replace("-", "−")
    return f"{10**exponent:.3g}"


def _flagged(frame: pd.DataFrame) -> list[tuple[bool, pd.DataFrame]]:
    known = frame.dropna(subset=["z"])
    return [(rises, part) for rises in _MARKS if len(part := known[known["rises"] == rises])]


def _marks(part: pd.DataFrame, rises: bool) -> go.Scatter:
    symbol, name = _MARKS[rises]
    return go.Scatter(
        x=part["layer"],
        y=part["row"],
        mode="markers",
        name=name,
        showlegend=True,
        marker={
            "symbol": symbol,
            "size": 10,
            "color": "#ffffff",
            "line": {"width": 1.5, "color": "#1c2530"},
        },
        customdata=part[["value", "z"]],
        hovertemplate="%{y}, layer %{x}<br>%{customdata[0]:.4g}"
        f"<br>{name} from the previous layer, z = %{{customdata[1]:.2f}}<extra></extra>",
    )
