"""Methods against each other: what more bits buy, wins and losses, predicted against measured."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from lsq_core.charts.runs import view_limit
from lsq_core.charts.style import LEGEND_ABOVE, NEUTRAL, MethodStyle, apply_layout, method_style

#: Wins, ties and losses, told apart by colour-blind eyes and by lightness.
OUTCOMES = {"wins": "#0072B2", "ties": "#b9bfc6", "losses": "#D55E00"}


def gain_for_bits(frame: pd.DataFrame, base: str) -> go.Figure:
    """How far perplexity falls for how many more bits than a uniform base ([A] Fig. 9).

    ``frame`` has ``evaluation, method, label, extra, drop`` of
    :func:`lsq_core.results.compare.relative_to_base`; ``base`` names the run at the origin.
    """
    figure = go.Figure()
    for method in frame["method"].value_counts().index:
        part = frame[frame["method"] == method]
        figure.add_trace(_points(method, part, 100 * part["extra"], 100 * part["drop"]))
        figure.data[
            -1
        ].hovertemplate = (
            "%{customdata[0]}<br>%{x:+.2f} % bits, perplexity %{y:.2f} % lower<extra></extra>"
        )
    figure.add_hline(y=0, line={"color": NEUTRAL, "width": 1.2})
    figure.add_vline(x=0, line={"color": NEUTRAL, "width": 1.2})
    figure.update_layout(legend=LEGEND_ABOVE)
    figure.update_xaxes(title_text=f"additional bits over {base} (%)", ticksuffix=" %")
    figure.update_yaxes(title_text="perplexity reduction (%)", ticksuffix=" %")
    return apply_layout(figure, 430)


def _points(method: str, part: pd.DataFrame, x: pd.Series, y: pd.Series) -> go.Scatter:
    style = method_style(method)
    return go.Scatter(
        x=x,
        y=y,
        mode="markers",
        name=style.title,
        marker=_marker(style, 9 if len(part) <= 60 else 7),
        customdata=part[["label", "evaluation"]],
        unselected={"marker": {"opacity": 0.4}},
    )


def _marker(style: MethodStyle, size: int) -> dict:
    hollow = style.symbol.endswith("open")
    line = {"width": 1.4 if hollow else 0, "color": style.color}
    return {"symbol": style.symbol, "color": style.color, "size": size, "line": line}


def win_tie_loss_bars(frame: pd.DataFrame) -> go.Figure:
    """How often a method beats another, as bars of 100 % ([A] Fig. 6).

    ``frame`` is of :func:`lsq_core.results.compare.figure_6`, for one account of the budget.
    Bars are in whole percents of all comparisons, their lengths exact.
    """
    names = [
        f"{method_style(row.method).title}<br>against {method_style(row.against).title}"
        f"<br>n = {row.total}"
        for row in frame.itertuples()
    ]
    figure = go.Figure()
    for outcome, color in OUTCOMES.items():
        shares = 100 * frame[outcome] / frame["total"]
        figure.add_bar(
            y=names,
            x=shares,
            orientation="h",
            name=outcome,
            marker_color=color,
            text=[f"{round(share)} %" if share >= 7 else "" for share in shares],
            textposition="inside",
            textangle=0,
            insidetextanchor="middle",
            textfont_color="#1c2530" if outcome == "ties" else "#ffffff",
            customdata=frame[[outcome, "total"]],
            hovertemplate="%{y}<br>%{customdata[0]} of %{customdata[1]} "
            + f"{outcome} (%{{x:.1f}} %)<extra></extra>",
        )
    figure.update_layout(uniformtext={"minsize": 10, "mode": "hide"})
    figure.update_layout(
        barmode="stack", bargap=0.3, legend=LEGEND_ABOVE | {"traceorder": "normal"}
    )
    figure.update_xaxes(range=[0, 100], ticksuffix=" %", title_text="share of comparisons")
    figure.update_yaxes(autorange="reversed", automargin=True)
    return apply_layout(figure, 110 + 56 * len(frame))


def predicted_against_measured(frame: pd.DataFrame) -> go.Figure:
    """Predicted perplexity with its band against what was measured, about the line of equality.

    ``frame`` has ``evaluation, method, label, perplexity, predicted, low, high``. Runs above
    :func:`lsq_core.charts.view_limit` are there when the axes are reset.
    """
    figure = go.Figure()
    ends = [frame["perplexity"].min(), frame["perplexity"].max()]
    figure.add_trace(
        go.Scatter(
            x=ends,
            y=ends,
            mode="lines",
            name="predicted = measured",
            line={"color": NEUTRAL, "width": 1.2, "dash": "dash"},
            hoverinfo="skip",
        )
    )
    for method in frame["method"].value_counts().index:
        part = frame[frame["method"] == method]
        trace = _points(method, part, part["perplexity"], part["predicted"])
        trace.error_y = {
            "type": "data",
            "symmetric": False,
            "array": part["high"] - part["predicted"],
            "arrayminus": part["predicted"] - part["low"],
            "thickness": 1,
            "width": 0,
        }
        trace.hovertemplate = (
            "%{customdata[0]}<br>measured %{x:.4f}, predicted %{y:.4f}<extra></extra>"
        )
        figure.add_trace(trace)
    limit = view_limit(frame["perplexity"])
    if ends[1] > limit:
        padding = 0.04 * (limit - ends[0])
        figure.update_xaxes(range=[ends[0] - padding, limit])
        figure.update_yaxes(range=[ends[0] - padding, limit])
    figure.update_layout(legend=LEGEND_ABOVE)
    figure.update_xaxes(title_text="measured perplexity")
    figure.update_yaxes(title_text="predicted perplexity (90 % band)")
    return apply_layout(figure, 430)
