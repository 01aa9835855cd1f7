"""The initial view of a chart of runs, and the runs outside it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from lsq_core.charts.style import NEUTRAL

#: Bits per parameter initially in view in charts over size: 3 to 4.5, up to the stop named 4.51.
BITS_IN_VIEW = (3.0, 4.55)
#: Number of runs below which none is considered an outlier.
_MIN_RUNS = 5
#: An outlier is more than this many times as far from the best run as the 90th percentile.
_OUTLIER_RATIO = 3.0
#: Ratio of the largest to the smallest value shown above which the axis is logarithmic.
_LOG_RATIO = 5.0


#: Space for a note below the runs, as a fraction of the y range.
_NOTE_SHARE = 0.1


@dataclass(frozen=True)
class View:
    """The ranges of both axes, None for an axis shown in full, and the runs outside them.

    ``outside`` of ``total`` runs are outside the view; ``low`` and ``high`` are the range of their
    quality, for :meth:`note`. ``log`` is whether the y axis is logarithmic. Axis ranges are in axis
    units: decimal logarithms on a logarithmic axis.
    """

    x: tuple[float, float] | None
    y: tuple[float, float] | None
    log: bool
    outside: int
    total: int
    low: float = math.nan
    high: float = math.nan

    def note(self, name: str, unit: str = "") -> str:
        """Return a note with the number of runs outside the view and their range; '' if none."""
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
    """Return the smallest and largest value, ignoring outliers.

    Otherwise a few broken runs would flatten the others, which differ by little, into a line. An
    outlier is more than three times as far from the best value as the 90th percentile; among fewer
    than five runs there are none.

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
    """Return the initial view of a chart of runs.

    Parameters
    ----------
    x, y
        Coordinates of the runs, without missing values.
    bits
        Bits per parameter of the runs. The view is limited to :data:`BITS_IN_VIEW` if that
        contains runs of at least two different sizes. None for all sizes.
    higher_is_better
        Whether larger ``y`` is better, so that outliers are small values.
    level
        A ``y`` to keep in view for a horizontal line, such as full precision's perplexity.
    include
        An ``x`` to keep in view, with all runs up to it that are not below :data:`BITS_IN_VIEW`.
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
    """Set a figure's initial view and add a note in its top or bottom right corner.

    Resetting the axes shows everything.
    """
    if view.x is not None:
        figure.update_xaxes(range=view.x)
    if view.y is not None:
        low, high = view.y
        room = 0 if top else _NOTE_SHARE * (high - low)  # so that the note covers no runs
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
    """Label a line at its right end, or at its last point in view, with a leader line.

    Labels with a higher ``rank`` are further from their lines, so that labels of lines ending near
    each other do not overlap.
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
