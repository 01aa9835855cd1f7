"""Chart of a refinement: the measured divergence after each step."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from lsq_core.charts.style import NEUTRAL, apply_layout, method_style


def refinement_steps(frame: pd.DataFrame) -> go.Figure:
    """Plot the measured and the expected divergence of each step.

    ``frame`` has the columns ``step, kl, expected, changed``. ``expected`` is the divergence
    predicted by the expansion around the previous step, NaN at the start; ``changed`` is the number
    of matrices whose configuration differs from the previous step.
    """
    style = method_style("refined")
    figure = go.Figure()
    figure.add_scatter(
        x=frame["step"],
        y=frame["expected"],
        name="expected",
        mode="markers",
        marker={"symbol": "line-ew-open", "size": 16, "color": NEUTRAL, "line": {"width": 2}},
        hovertemplate="step %{x}: %{y:.4f} expected<extra></extra>",
    )
    figure.add_scatter(
        x=frame["step"],
        y=frame["kl"],
        name="measured",
        mode="lines+markers",
        line={"color": style.color, "width": 2},
        marker={"size": 8},
        customdata=frame[["changed"]],
        hovertemplate="step %{x}: %{y:.4f} measured, %{customdata[0]} matrices changed"
        "<extra></extra>",
    )
    figure.update_xaxes(title_text="step", dtick=1)
    figure.update_yaxes(title_text="KL divergence (nats per token)")
    figure.update_layout(showlegend=True, legend={"orientation": "h", "y": -0.3, "x": 0})
    return apply_layout(figure, 260)
