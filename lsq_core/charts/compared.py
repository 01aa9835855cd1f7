"""Charts comparing methods: gain for extra bits, wins and losses, predicted vs. measured."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from lsq_core.charts.style import (
    FADED,
    LEGEND_ABOVE,
    NEUTRAL,
    MethodStyle,
    apply_layout,
    method_style,
)
from lsq_core.charts.view import View, apply_view, initial_view
from lsq_core.evaluation.result import UNUSABLE_RATIO
from lsq_core.results.gains import is_ablation

#: Colours of wins, ties and losses, distinguishable by lightness and by colour-blind readers.
OUTCOMES = {"wins": "#0072B2", "ties": "#b9bfc6", "losses": "#D55E00"}


def gain_for_bits(frame: pd.DataFrame, base: str) -> go.Figure:
    """Plot the drop in perplexity against the extra bits over a uniform base ([A] Fig. 9).

    ``frame`` has the columns ``evaluation, method, label, extra, drop``, see
    :func:`lsq_core.results.compare.relative_to_base`, and optionally ``low, high, windows``: the
    95 % interval of ``drop``, also a fraction, and its number of windows (NaN if unknown). ``base``
    is the name of the run at the origin. The chart opens on :func:`gain_view`; ablations are faded.
    """
    figure = go.Figure()
    methods = sorted(frame["method"].value_counts().index, key=lambda m: not is_ablation(m))
    for method in methods:
        part = frame[frame["method"] == method]
        trace = _points(method, part, 100 * part["extra"], 100 * part["drop"])
        trace.hovertemplate = (
            "%{customdata[0]}<br>%{x:+.2f} % bits, perplexity %{y:.2f} % lower%{text}"
            "<extra></extra>"
        )
        _add_intervals(trace, part)
        figure.add_trace(trace)
    figure.add_hline(y=0, line={"color": NEUTRAL, "width": 1.2})
    figure.add_vline(x=0, line={"color": NEUTRAL, "width": 1.2})
    view = gain_view(frame)
    apply_view(figure, view, view.note("perplexity reduction", "%"), top=False)
    figure.update_layout(legend=LEGEND_ABOVE)
    figure.update_xaxes(title_text=f"additional bits relative to {base} (%)", ticksuffix=" %")
    figure.update_yaxes(title_text="perplexity reduction (%)", ticksuffix=" %")
    return apply_layout(figure, 430)


def gain_view(frame: pd.DataFrame) -> View:
    """Return the initial view of :func:`gain_for_bits`, in percent."""
    return initial_view(100 * frame["extra"], 100 * frame["drop"], higher_is_better=True)


def _add_intervals(trace: go.Scatter, part: pd.DataFrame) -> None:
    """Draw known intervals as error bars and add them, with their n, to the hover text."""
    if "low" not in part:
        trace.text = [""] * len(part)
        return
    trace.error_y = {
        "type": "data",
        "symmetric": False,
        "array": 100 * (part["high"] - part["drop"]),
        "arrayminus": 100 * (part["drop"] - part["low"]),
        "thickness": 1,
        "width": 3,
    }
    trace.text = [
        f"<br>95 % interval {100 * low:.2f} % to {100 * high:.2f} %, n = {windows:.0f} windows"
        if low == low
        else ""
        for low, high, windows in zip(part["low"], part["high"], part["windows"], strict=True)
    ]


def _points(method: str, part: pd.DataFrame, x: pd.Series, y: pd.Series) -> go.Scatter:
    style = method_style(method)
    return go.Scatter(
        x=x,
        y=y,
        mode="markers",
        name=style.title,
        opacity=FADED if is_ablation(method) else 1,
        marker=_marker(style, 9 if len(part) <= 60 else 7),
        customdata=part[["label", "evaluation"]],
        unselected={"marker": {"opacity": 0.4}},
    )


def _marker(style: MethodStyle, size: int) -> dict:
    hollow = style.symbol.endswith("open")
    line = {"width": 1.4 if hollow else 0, "color": style.color}
    return {"symbol": style.symbol, "color": style.color, "size": size, "line": line}


def win_tie_loss_bars(frame: pd.DataFrame) -> go.Figure:
    """Plot how often a method wins, ties and loses, as bars adding up to 100 % ([A] Fig. 6).

    ``frame`` holds rows of :func:`lsq_core.results.compare.figure_6` for one way of matching
    budgets. Labels are rounded to whole percent; bar lengths are exact.
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


#: Smallest relative excess over full precision that is drawn; smaller ones are clipped to it.
LEAST_EXCESS = 0.001
#: Labelled perplexities, as relative excesses over full precision.
_EXCESS_TICKS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0, 1000.0)


def predicted_against_measured(frame: pd.DataFrame, full_precision: float) -> go.Figure:
    """Plot predicted perplexity with its band against measured perplexity, with the identity line.

    Both axes show the logarithm of the excess over full precision, on which runs at 3 and at 8
    bits are equally readable. ``frame`` has the columns ``evaluation, method, label, perplexity,
    predicted, low, high``; each run is predicted from the others. Resetting the axes shows the runs
    outside :func:`predicted_view`.
    """
    figure = go.Figure()
    drawn = {name: _excess(frame[name], full_precision) for name in _PERPLEXITIES}
    ends = [drawn["perplexity"].min(), drawn["perplexity"].max()]
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
        own = {name: values[part.index] for name, values in drawn.items()}
        trace = _points(method, part, own["perplexity"], own["predicted"])
        trace.error_y = {
            "type": "data",
            "symmetric": False,
            "array": own["high"] - own["predicted"],
            "arrayminus": own["predicted"] - own["low"],
            "thickness": 1,
            "width": 0,
        }
        trace.text = [
            f"measured {row.perplexity:.4f}, predicted {row.predicted:.4f}<br>90 % band "
            f"{row.low:.4f} to {row.high:.4f}, n = {len(frame) - 1} other runs"
            for row in part.itertuples()
        ]
        trace.hovertemplate = "%{customdata[0]}<br>%{text}<extra></extra>"
        figure.add_trace(trace)
    view = predicted_view(frame, full_precision)
    apply_view(figure, view, view.note("measured perplexity"), top=False)
    figure.update_layout(legend=LEGEND_ABOVE)
    where = "logarithm of the excess over full precision"
    figure.update_xaxes(type="log", title_text=f"measured perplexity ({where})")
    figure.update_yaxes(type="log", title_text="predicted perplexity (90 % band)")
    ticks = {
        "tickvals": list(_EXCESS_TICKS),
        "ticktext": [f"{full_precision * (1 + excess):.4g}" for excess in _EXCESS_TICKS],
    }
    figure.update_xaxes(**ticks)
    figure.update_yaxes(**ticks)
    return apply_layout(figure, 430)


_PERPLEXITIES = ("perplexity", "predicted", "low", "high")


def _excess(perplexity: pd.Series, full_precision: float) -> pd.Series:
    """Return the relative excess over full precision, at least :data:`LEAST_EXCESS`."""
    return (perplexity / full_precision - 1).clip(lower=LEAST_EXCESS)


def predicted_view(frame: pd.DataFrame, full_precision: float) -> View:
    """Return the initial view of :func:`predicted_against_measured`, the same for both axes.

    It shows the usable runs (:data:`lsq_core.evaluation.result.UNUSABLE_RATIO`), or all runs if
    none is usable. Its ranges are decimal logarithms of the excess over full precision.
    """
    measured = frame["perplexity"].astype(float)
    usable = measured <= UNUSABLE_RATIO * full_precision
    inside = frame[usable] if usable.any() else frame
    beyond = measured[~measured.index.isin(inside.index)]
    both = pd.concat([inside["perplexity"], inside["predicted"]])
    ends = np.log10(_excess(both, full_precision))
    padding = 0.06 * (ends.max() - ends.min()) or 0.1
    y = (float(ends.min() - padding), float(ends.max() + padding))
    return View(y, y, True, len(beyond), len(frame), beyond.min(), beyond.max())
