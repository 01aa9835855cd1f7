"""Chart of the steps of Algorithm 1."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lsq_core.charts.style import NEUTRAL, apply_layout, ring_markers

#: Colour of flagged layers and of the threshold.
FLAGGED = "#CC3311"
_BAND = "rgba(138, 146, 156, 0.18)"
#: Ratio of the largest to the typical value above which an axis is logarithmic.
_LOG_AXIS_RATIO = 12


@dataclass(frozen=True, eq=False)
class DetectionSteps:
    """Algorithm 1 applied to one module type.

    ``values`` are the scores at ``layers``, both (n,). For each layer but the first,
    ``differences`` holds the difference from the previous layer (the ratio to it if ``ratios``),
    ``z`` its z-score and ``trimmed`` whether it was trimmed, all (n − 1,). ``flagged`` holds
    indices into ``layers``.
    """

    layers: np.ndarray
    values: np.ndarray
    differences: np.ndarray
    trimmed: np.ndarray
    z: np.ndarray
    mean: float
    deviation: float
    threshold: float
    flagged: tuple[int, ...]
    ratios: bool


def algorithm_steps(
    steps: DetectionSteps, title: str, axis: str, color: str, log: bool, height: int = 560
) -> go.Figure:
    """Plot scores, their differences with the trimmed band, and z-scores with the threshold.

    ``title`` and ``axis`` are those of the metric, ``color`` is that of the module type.
    """
    step = "ratio to the previous layer" if steps.ratios else "difference from the previous layer"
    figure = make_subplots(
        rows=3,
        shared_xaxes=True,
        vertical_spacing=0.085,
        subplot_titles=[
            title,
            step[0].upper() + step[1:],
            f"z-score of each change; dashed: threshold {steps.threshold:g}",
        ],
    )
    line = {"color": color, "width": 1.6}
    figure.add_trace(_points(steps.layers, steps.values, line, title, "%{y:.4g}"), 1, 1)
    _add_band(figure, steps)
    at = steps.layers[1:]
    for chosen, symbol, name in (
        (~steps.trimmed, "circle", "kept in the trimmed sample"),
        (steps.trimmed, "x-thin", "trimmed (excluded from mean and standard deviation)"),
    ):
        figure.add_trace(_differences(at[chosen], steps.differences[chosen], symbol, name, color))
    figure.add_trace(_bars(steps, color), 3, 1)
    _add_threshold(figure, steps)
    _add_rings(figure, steps)
    for row, text in enumerate((axis, "ratio" if steps.ratios else "difference", "z"), start=1):
        figure.update_yaxes(title_text=text, row=row, col=1)
    if log:
        figure.update_yaxes(type="log", exponentformat="power", dtick=1, row=1, col=1)
    if steps.ratios and _is_far(steps.differences, steps.mean):
        low = steps.differences[steps.differences > 0].min()
        limits = [np.log10(low) - 0.3, np.log10(_largest(steps.differences)) + 0.6]
        figure.update_yaxes(type="log", range=limits, row=2, col=1)
    if _is_far(steps.z, steps.threshold):
        limits = [-1, np.log10(_largest(steps.z)) + 0.3]
        figure.update_yaxes(type="log", range=limits, dtick=1, row=3, col=1)
    figure.update_xaxes(title_text="layer", title_standoff=4, row=3, col=1)
    for note in figure.layout.annotations[:3]:
        note.update(x=0, xanchor="left", font_size=13)
    apply_layout(figure, height)
    legend = {"orientation": "h", "x": 0, "xanchor": "left", "y": -0.1, "yanchor": "top"}
    return figure.update_layout(
        legend=legend, margin={"t": 46, "b": 90}, modebar_orientation="h", bargap=0.45
    )


def _largest(values: np.ndarray) -> float:
    """Return the largest finite value; the ratio to a score of 0 is infinite."""
    return float(values[np.isfinite(values)].max())


def _is_far(values: np.ndarray, typical: float) -> bool:
    """Return whether the largest value would make the others indistinguishable."""
    finite = values[np.isfinite(values)]
    return bool(finite.size and finite.max() > _LOG_AXIS_RATIO * typical)


def _points(x: np.ndarray, y: np.ndarray, line: dict, name: str, form: str) -> go.Scatter:
    return go.Scatter(
        x=x,
        y=y,
        mode="lines+markers",
        line=line,
        marker={"size": 5},
        name=name,
        showlegend=False,
        hovertemplate=f"layer %{{x}}: {form}<extra></extra>",
    )


def _differences(x: np.ndarray, y: np.ndarray, symbol: str, name: str, color: str) -> go.Scatter:
    return go.Scatter(
        x=x,
        y=y,
        mode="markers",
        marker={"symbol": symbol, "size": 7, "color": color, "line": {"width": 2, "color": color}},
        name=name,
        xaxis="x2",
        yaxis="y2",
        hovertemplate="change to layer %{x}: %{y:.4g}<extra></extra>",
    )


def _add_band(figure: go.Figure, steps: DetectionSteps) -> None:
    """Draw the trimmed mean and the band of changes within the threshold of it."""
    half_width = steps.threshold * steps.deviation
    low, high = steps.mean - half_width, steps.mean + half_width
    if steps.ratios:  # ratios are not negative, and a logarithmic axis has no zero
        low = max(low, 1e-9)
    ends = [steps.layers[0], steps.layers[-1]]
    figure.add_trace(
        go.Scatter(
            x=[*ends, *ends[::-1]],
            y=[low, low, high, high],
            fill="toself",
            fillcolor=_BAND,
            line={"width": 0},
            mode="lines",
            name=f"z ≤ {steps.threshold:g}",
            hoverinfo="skip",
        ),
        2,
        1,
    )
    figure.add_trace(
        go.Scatter(
            x=ends,
            y=[steps.mean] * 2,
            mode="lines",
            line={"color": NEUTRAL, "width": 1.4, "dash": "dash"},
            name="trimmed mean",
            hoverinfo="skip",
        ),
        2,
        1,
    )


def _bars(steps: DetectionSteps, color: str) -> go.Bar:
    flagged = set(steps.flagged)
    return go.Bar(
        x=steps.layers[1:],
        y=steps.z,
        marker_color=[FLAGGED if i + 1 in flagged else color for i in range(len(steps.z))],
        name="z",
        showlegend=False,
        hovertemplate="layer %{x}: z = %{y:.3f}<extra></extra>",
    )


def _add_threshold(figure: go.Figure, steps: DetectionSteps) -> None:
    figure.add_hline(
        y=steps.threshold,
        line={"color": FLAGGED, "width": 1.4, "dash": "dash"},
        row=3,
        col=1,
    )


def _add_rings(figure: go.Figure, steps: DetectionSteps) -> None:
    """Ring the flagged layers among the scores and the differences."""
    flagged_indices = list(steps.flagged)
    places = (
        (steps.layers[flagged_indices], steps.values[flagged_indices], 1),
        (steps.layers[flagged_indices], steps.differences[[i - 1 for i in flagged_indices]], 2),
    )
    for x, y, row in places:
        if flagged_indices:
            ring = ring_markers(x, y, "flagged", size=14, color=FLAGGED)
            figure.add_trace(ring.update(showlegend=row == 2), row, 1)
