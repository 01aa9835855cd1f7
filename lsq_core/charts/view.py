"""The part of a chart of runs that is shown first, and what lies outside of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from lsq_core.charts.style import NEUTRAL

#: Bits per parameter on which charts over size open: 3 to 4.5, up to the stop named 4.51.
BITS_IN_VIEW = (3.0, 4.55)
#: With fewer runs none is called an outlier.
_MIN_RUNS = 5
#: An outlier lies so many times further from the best run than nine tenths of the runs.
_OUTLIER_RATIO = 3.0
#: Ratio of the largest to the smallest value shown from which the axis is logarithmic.
_LOG_RATIO = 5.0


#: Share of a chart's height that a note below the runs takes.
_NOTE_SHARE = 0.1


@dataclass(frozen=True)
class View:
    """The ranges of both axes, None for all of an axis, and the runs outside of them.

    ``low`` and ``high`` are the range of what the ``outside`` runs are judged by; ``log`` says
    whether the upward axis is logarithmic. Ranges are in the axes' units.
    """

    x: tuple[float, float] | None
    y: tuple[float, float] | None
    log: bool
    outside: int
    total: int
    low: float = math.nan
    high: float = math.nan

    def note(self, name: str, unit: str = "") -> str:
        """Return how many runs are outside of the view, and their range; '' for none."""
        if not self.outside:
            return ""
        span = _number(self.low)
        if self.high > self.low:
            span += f" to {_number(self.high)}"
        unit = f" {unit}" if unit else ""
        return f"{self.outside} of {self.total} runs outside this view:<br>{name} {span}{unit}"


def _number(value: float) -> str:
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return text.replace("-", "−")


def inlier_range(values: pd.Series, higher_is_better: bool = False) -> tuple[float, float]:
    """Return the smallest and largest of the values that are not far worse than nearly all.

    A few broken runs would else press the others, which differ by little, into a line. An outlier
    lies more than three times as far from the best as the ninth tenth does; among fewer than five
    runs there is none.

    >>> inlier_range(pd.Series([5.0, 5.5, 6.0, 6.2, 6.3, 97.0]))
    (5.0, 6.3)
    """
    cost = -values.astype(float) if higher_is_better else values.astype(float)
    behind = cost - cost.min()
    usual = behind.quantile(0.9, interpolation="lower")
    kept = values
    if len(values) >= _MIN_RUNS and usual > 0:
        kept = values[behind <= _OUTLIER_RATIO * usual]
    return float(kept.min()), float(kept.max())


def initial_view(
    x: pd.Series,
    y: pd.Series,
    bits: pd.Series | None = None,
    *,
    higher_is_better: bool = False,
    level: float | None = None,
    include: float | None = None,
) -> View:
    """Return the view on which a chart of runs opens.

    Parameters
    ----------
    x, y
        The runs' places in the chart, without missing values.
    bits
        Their bits per parameter: the view is of :data:`BITS_IN_VIEW` where two runs of different
        sizes or more are in it. None for all sizes.
    higher_is_better
        Whether large ``y`` are good, so that outliers are small ones.
    level
        A horizontal line that stays in view, such as full precision's perplexity.
    include
        A place on the axis of ``x`` that is in view, and all sizes up to it.
    """
    inside = pd.Series(True, index=x.index)
    if bits is not None:
        lowest, highest = BITS_IN_VIEW
        near = bits.astype(float).between(lowest, highest)
        if include is not None:
            near |= (bits.astype(float) >= lowest) & (x <= include)
        inside = near if x[near].nunique() >= 2 else inside
    ends = x[inside] if include is None else [*x[inside], include]
    x_range = None if inside.all() else _padded(min(ends), max(ends), 0.04)
    low, high = inlier_range(y[inside], higher_is_better)
    outside = ~(inside & y.between(low, high))
    shown_low = low if level is None else min(low, level)
    shown_high = high if level is None else max(high, level)
    log = not higher_is_better and shown_low > 0 and shown_high / shown_low > _LOG_RATIO
    y_range = None
    if outside.any():
        ends = (math.log10(shown_low), math.log10(shown_high)) if log else (shown_low, shown_high)
        y_range = _padded(*ends, 0.07)
    beyond = y[outside]
    return View(
        x_range,
        y_range,
        log,
        int(outside.sum()),
        len(y),
        float(beyond.min()) if len(beyond) else math.nan,
        float(beyond.max()) if len(beyond) else math.nan,
    )


def _padded(low: float, high: float, share: float) -> tuple[float, float]:
    padding = share * (high - low) or 0.5 * abs(high) or 1.0
    return float(low - padding), float(high + padding)


def apply_view(figure: go.Figure, view: View, note: str, *, top: bool = True) -> None:
    """Open a figure on a view, and say in its right corner what is outside of it.

    Resetting the axes shows all.
    """
    if view.x is not None:
        figure.update_xaxes(range=view.x)
    if view.y is not None:
        low, high = view.y
        room = 0 if top else _NOTE_SHARE * (high - low)  # below the runs, where it covers none
        figure.update_yaxes(range=(low - room, high))
    if note:
        figure.add_annotation(
            text=note,
            name="outside",
            showarrow=False,
            xref="paper",
            yref="paper",
            x=0.99,
            y=0.98 if top else 0.02,
            xanchor="right",
            yanchor="top" if top else "bottom",
            align="right",
            font_size=12,
        )


def label_line_end(
    figure: go.Figure, line: go.Scatter, view: View, text: str, rank: int, *, above: bool
) -> None:
    """Write a line's name at its right end, or where it leaves the view, with a leader to it.

    ``rank`` tells labels of lines that end near each other apart: each stands further away.
    """
    x, y = np.asarray(line.x, dtype=float), np.asarray(line.y, dtype=float)
    shown = np.ones(len(x), dtype=bool)
    if view.x is not None:
        shown &= (x >= view.x[0]) & (x <= view.x[1])
    if view.y is not None:
        heights = np.log10(y) if view.log else y
        shown &= (heights >= view.y[0]) & (heights <= view.y[1])
    if not shown.any():
        return
    at = np.flatnonzero(shown)[np.argmax(x[shown])]
    figure.add_annotation(
        x=x[at],
        y=math.log10(y[at]) if view.log else y[at],
        text=text,
        name="line",
        showarrow=True,
        arrowhead=0,
        arrowwidth=1,
        arrowcolor=NEUTRAL,
        standoff=3,
        ax=-24,
        ay=(-1 if above else 1) * (26 + 30 * rank),
        xanchor="right",
        font={"size": 12},
    )
