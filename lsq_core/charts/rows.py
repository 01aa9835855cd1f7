"""Charts of high-impact rows: ratios by layer, interactions in a block, predicted vs. measured."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from lsq_core.charts.style import (
    LEGEND_ABOVE,
    NEUTRAL,
    apply_layout,
    method_style,
    module_color,
    short_type,
)


def ratio_lines(frame: pd.DataFrame) -> go.Figure:
    """Plot the ratio of high-impact rows over layers, one line per module type ([C] Fig. A.2).

    ``frame`` has the columns ``type, layer, ratio``.
    """
    figure = go.Figure()
    for kind, part in frame.groupby("type", sort=False):
        lines = part.groupby("layer")["ratio"].mean()
        attention = "attn" in kind or "attention" in kind
        figure.add_scatter(
            x=lines.index,
            y=lines,
            name=short_type(kind),
            mode="lines+markers",
            line={
                "color": module_color(kind),
                "dash": "solid" if attention else "dash",
                "shape": "hvh",
            },
            marker={"size": 5},
            customdata=100 * lines,
            hovertemplate=f"{short_type(kind)}, layer %{{x}}: %{{customdata:.0f}} %<extra></extra>",
        )
    mean = frame.groupby("layer")["ratio"].mean()
    figure.add_scatter(
        x=mean.index,
        y=mean,
        name="mean",
        mode="lines",
        line={"color": NEUTRAL, "width": 4},
        opacity=0.5,
        customdata=100 * mean,
        hovertemplate="layer %{x} mean: %{customdata:.1f} %<extra></extra>",
    )
    figure.update_xaxes(title_text="layer")
    figure.update_yaxes(
        title_text="share of high-impact rows", tickformat=".0%", rangemode="tozero"
    )
    figure.update_layout(legend=LEGEND_ABOVE)
    return apply_layout(figure, 340)


def interaction_heatmap(
    matrix: np.ndarray, units: Sequence[str], ratios: Sequence[float]
) -> go.Figure:
    """Plot a block's M (u·r, u·r), normalized by its diagonal: ``M_ij / √(|M_ii·M_jj|)``.

    Red pairs are worse together than apart, blue pairs better. Diagonal tiles are blank, since only
    one ratio of a unit applies at a time.
    """
    scale = np.sqrt(np.abs(np.diag(matrix)))
    scale = np.where(scale > 0, scale, 1.0)
    shown = matrix / np.outer(scale, scale)
    names = [f"{short_type(unit)} {100 * ratio:.0f} %" for unit in units for ratio in ratios]
    same_unit = np.kron(np.eye(len(units), dtype=bool), np.ones((len(ratios),) * 2, dtype=bool))
    hover = [
        [
            f"{a} with {b}<br>{shown[i, j]:+.3f} of the geometric mean of their own effects, "
            f"M = {matrix[i, j]:.3g}"
            for j, b in enumerate(names)
        ]
        for i, a in enumerate(names)
    ]
    largest = float(np.abs(shown[~same_unit]).max()) if (~same_unit).any() else 1.0
    figure = go.Figure(
        go.Heatmap(
            z=np.where(same_unit, np.nan, shown),
            zmid=0,
            zmin=-largest or -1.0,
            zmax=largest or 1.0,
            colorscale="RdBu_r",
            colorbar={"thickness": 12, "title": {"text": "relative interaction", "side": "right"}},
            customdata=hover,
            hovertemplate="%{customdata}<extra></extra>",
        )
    )
    middle = [u * len(ratios) + (len(ratios) - 1) / 2 for u in range(len(units))]
    ticks = {"tickvals": middle, "ticktext": [short_type(unit) for unit in units]}
    figure.update_xaxes(**ticks, showgrid=False, constrain="domain")
    figure.update_yaxes(
        **ticks, showgrid=False, autorange="reversed", scaleanchor="x", constrain="domain"
    )
    for u in range(1, len(units)):
        edge = u * len(ratios) - 0.5
        figure.add_hline(edge, line={"color": NEUTRAL, "width": 1})
        figure.add_vline(edge, line={"color": NEUTRAL, "width": 1})
    return apply_layout(figure, 420)


def predicted_loss_scatter(frame: pd.DataFrame, measured: str) -> go.Figure:
    """Plot the measured loss of runs against the predicted loss, on logarithmic axes.

    ``frame`` has the columns ``predicted, measured, ratios, quantizer, label``. Ratios and
    quantizer determine the marker; ``label`` is the hover text. ``measured`` is the y-axis title.
    """
    figure = go.Figure()
    symbols = {"full": "circle", "diagonal": "diamond", "uniform": "square"}
    for (ratios, quantizer), part in frame.groupby(["ratios", "quantizer"], sort=False):
        symbol = symbols.get(ratios, "x") + ("" if quantizer.startswith("hybrid") else "-open")
        figure.add_scatter(
            x=part["predicted"],
            y=part["measured"],
            mode="markers",
            name=f"{ratios}, {quantizer}",
            marker={
                "symbol": symbol,
                "size": 10,
                "color": method_style("high-impact").color,
                "line": {"width": 2},
            },
            customdata=part[["label"]],
            hovertemplate="%{customdata[0]}<br>predicted %{x:.4g}, measured %{y:.4g}"
            "<extra></extra>",
        )
    figure.update_xaxes(title_text="predicted loss ½·δᵀMδ", type="log")
    figure.update_yaxes(title_text=measured, type="log")
    figure.update_layout(legend=LEGEND_ABOVE, showlegend=True)
    return apply_layout(figure, 420)
