"""Charts of plans: the configuration of each matrix, and the frontiers of methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from lsq_core.bits import EXTENDED_LADDER, LADDER, Config, is_mixed, parse_config
from lsq_core.charts.style import (
    LEGEND_ABOVE,
    LOG_TICKS,
    NEUTRAL,
    MethodStyle,
    apply_layout,
    config_color,
    method_style,
    short_type,
)


def plan_heatmap(frame: pd.DataFrame, narrow: bool = False) -> go.Figure:
    """Plot a plan by layer (left to right) and module type (in order of computation).

    ``frame`` has one row per matrix, with the columns ``type, layer, config, z``; ``z`` is the
    score that ranked a promoted matrix, NaN for the others. Experts of a layer share a cell, which
    shows their most common configuration. A ``narrow`` figure is half a page wide and labels its
    cells only up to half as many layers.
    """
    cells = _cells(frame)
    options = _used_configs(frame["config"])
    names = [c.name for c in options]
    kinds = list(dict.fromkeys(frame["type"]))
    layers = sorted(frame["layer"].unique())
    grid = cells.pivot(index="type", columns="layer").reindex(kinds)
    codes = grid["config"].map(lambda name: names.index(name), na_action="ignore")
    figure = go.Figure(
        go.Heatmap(
            x=layers,
            y=[short_type(kind) for kind in kinds],
            z=codes.astype(float).to_numpy(),
            zmin=-0.5,
            zmax=len(options) - 0.5,
            colorscale=_steps(options),
            showscale=False,
            xgap=1.5,
            ygap=1.5,
            text=_cell_text(grid["config"], len(layers) * (2 if narrow else 1)),
            texttemplate="%{text}",
            customdata=grid["hover"].fillna("").to_numpy(),
            hovertemplate="%{y}, layer %{x}<br>%{customdata}<extra></extra>",
        )
    )
    _config_legend(figure, frame["config"], narrow)
    figure.update_xaxes(
        title_text="layer", showgrid=False, zeroline=False, range=_axis_range(layers)
    )
    figure.update_yaxes(autorange="reversed", showgrid=False, zeroline=False)
    if len(layers) <= 48:
        few = len(layers) <= (24 if narrow else 32)
        figure.update_xaxes(dtick=(2 if few else 4) if narrow else (1 if few else 2))
    legend = LEGEND_ABOVE | {"maxheight": 1}  # else it scrolls if taller than half the figure
    if narrow:
        legend |= {"title": {"text": "bits × matrices", "side": "top"}, "entrywidth": 50}
    figure.update_layout(legend=legend, showlegend=True)  # even for a single configuration
    return apply_layout(figure, 96 + max((22 if narrow else 30) * len(kinds), 60))


def _axis_range(layers: list[int]) -> list[float]:
    return [min(layers) - 0.5, max(layers) + 0.5]


def _cells(frame: pd.DataFrame) -> pd.DataFrame:
    """Return one row per cell: the most common configuration and the hover text."""
    rows = []
    for (kind, layer), part in frame.groupby(["type", "layer"], sort=False):
        counts = part["config"].value_counts()
        hover = (
            counts.index[0]
            if len(part) == 1
            else f"{len(part)} experts: " + ", ".join(f"{n} × {c}" for c, n in counts.items())
        )
        rank_value = part["z"].max()
        hover += f"<br>flagged, ranked by {rank_value:.2f}" if pd.notna(rank_value) else ""
        rows.append({"type": kind, "layer": layer, "config": counts.index[0], "hover": hover})
    return pd.DataFrame(rows)


def _used_configs(configs: pd.Series) -> list[Config]:
    """Return the ladder, or for mixed rows the configurations in use, sorted by bits.

    The ladder is the paper's if it contains all configurations in use, else the extended one.
    """
    names = {name for name in configs.unique() if isinstance(name, str)}
    mixed = [name for name in names if is_mixed(name)]
    if not mixed:
        return list(LADDER if names <= {c.name for c in LADDER} else EXTENDED_LADDER)
    plain = [c for c in EXTENDED_LADDER if c.name in names]
    return sorted([*plain, *map(parse_config, mixed)], key=lambda c: c.nominal_bits)


def _cell_text(configs: pd.DataFrame, layers: int) -> list[list[str]]:
    """Return cell labels: full names if there is room for them, else short ones or none."""
    stops = {c.name: c.stop_name for c in _used_configs(configs.stack())}

    def words(name: object) -> str:
        if not isinstance(name, str) or layers > 32:
            return ""
        return name if layers <= 14 else stops[name]

    return [[words(name) for name in row] for row in configs.to_numpy()]


def _steps(options: Sequence[Config]) -> list[list[float | str]]:
    """Return a colour scale with one flat step per option."""
    steps: list[list[float | str]] = []
    for index, config in enumerate(options):
        color = config_color(config)
        steps += [[index / len(options), color], [(index + 1) / len(options), color]]
    return steps


def _config_legend(figure: go.Figure, configs: pd.Series, narrow: bool) -> None:
    """Add a legend entry for each configuration in use, with its number of matrices.

    Entries of a ``narrow`` figure are short enough to fit side by side on a phone.
    """
    counts = configs.value_counts()
    for config in _used_configs(configs):
        if config.name in counts:
            figure.add_trace(
                go.Scatter(
                    x=[None],
                    y=[None],
                    mode="markers",
                    name=f"{config.stop_name} × {counts[config.name]}"
                    if narrow
                    else f"{config.name} ({config.stop_name}) × {counts[config.name]}",
                    marker={"symbol": "square", "size": 11, "color": config_color(config)},
                )
            )


# --- frontiers ------------------------------------------------------------------------------


#: Predicted perplexities up to this multiple of the smallest are in the initial view.
_VISIBLE_VALUE_RATIO = 6
#: Ratio of the largest to the smallest visible value above which the axis is logarithmic.
_LOG_RATIO = 2
#: Ratio to the smallest value up to which a plan counts as lossless, and the additional bits shown
#: beyond the smallest lossless plan.
_LOSSLESS_RATIO, _BITS_BEYOND = 1.005, 0.5


@dataclass(frozen=True, eq=False)
class FrontierLine:
    """A method's plans by budget: ``bits`` (k,) per parameter and the ``value`` (k,) of each plan.

    ``low`` and ``high`` (k,) are the ends of the value's band if it is a prediction.
    """

    method: str
    bits: np.ndarray
    value: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None


def frontiers(lines: Sequence[FrontierLine], runs: pd.DataFrame, axis: str) -> go.Figure:
    """Plot the frontiers of methods, with measured runs as markers.

    ``runs`` has the columns ``method, label, bits_per_param, value``.
    """
    figure = go.Figure()
    for line in lines:
        style = method_style(line.method)
        if line.low is not None:
            figure.add_trace(_band(line, style))
        figure.add_trace(
            go.Scatter(
                x=line.bits,
                y=line.value,
                mode="lines",
                name=f"{style.title}, {axis.split(' (')[0]}",
                legendgroup=line.method,
                line={"color": style.color, "width": 2, "shape": "hv"},
                hovertemplate=f"{style.title} at %{{x:.3f}} bits: %{{y:.4g}}<extra></extra>",
            )
        )
    for method, part in runs.groupby("method", sort=False):
        figure.add_trace(_measured_on_frontier(str(method), part))
    bits = np.concatenate([*(line.bits for line in lines), runs["bits_per_param"]])
    values = np.concatenate([*(line.value for line in lines), runs["value"]]).astype(float)
    predicted = any(line.low is not None for line in lines)
    known = np.isfinite(values)  # an NF4 profile has errors only at some configurations
    if known.any():
        ratio = _VISIBLE_VALUE_RATIO if predicted else np.inf
        _limit_view(figure, bits.astype(float)[known], values[known], ratio)
    figure.update_layout(legend=LEGEND_ABOVE)
    figure.update_xaxes(title_text="bits per linear weight, metadata included")
    figure.update_yaxes(title_text=axis)
    return apply_layout(figure, 360)


def _limit_view(figure: go.Figure, bits: np.ndarray, values: np.ndarray, max_ratio: float) -> None:
    """Limit the initial view to budgets that matter; resetting the axes shows the rest.

    Otherwise a model broken at 2 bits would flatten all other values into a line, and budgets
    beyond which nothing improves would take up most of the width.
    """
    least, most = values.min(), values.max()
    limit = min(max_ratio * least, most)
    is_log = limit > _LOG_RATIO * least
    if is_log:
        figure.update_yaxes(type="log", **(LOG_TICKS if limit < 100 * least else {"dtick": 1}))
    if limit == most:
        return
    visible = bits[values <= limit]
    lossless = bits[values <= _LOSSLESS_RATIO * least]
    right = min(visible.max(), lossless.min() + _BITS_BEYOND)
    low, high = 0.98 * least, 1.02 * limit
    figure.update_yaxes(range=[np.log10(low), np.log10(high)] if is_log else [low, high])
    figure.update_xaxes(range=[visible.min() - 0.1, right + 0.1])


def _band(line: FrontierLine, style: MethodStyle) -> go.Scatter:
    red, green, blue = (int(style.color[i : i + 2], 16) for i in (1, 3, 5))
    return go.Scatter(
        x=np.concatenate([line.bits, line.bits[::-1]]),
        y=np.concatenate([line.high, line.low[::-1]]),
        fill="toself",
        fillcolor=f"rgba({red}, {green}, {blue}, 0.16)",
        line={"width": 0},
        legendgroup=line.method,
        showlegend=False,
        hoverinfo="skip",
    )


def _measured_on_frontier(method: str, part: pd.DataFrame) -> go.Scatter:
    style = method_style(method)
    return go.Scatter(
        x=part["bits_per_param"],
        y=part["value"],
        mode="markers",
        name=f"{style.title}, measured",
        marker={
            "symbol": style.symbol,
            "color": style.color,
            "size": 9,
            "line": {"width": 2 if style.symbol.endswith("open") else 0, "color": style.color},
        },
        customdata=part[["label"]],
        hovertemplate="%{customdata[0]}<br>%{x:.4f} bits, measured %{y:.4f}<extra></extra>",
    )


# --- shares of a plan ----------------------------------------------------------------


def plan_ring(shares: pd.Series, title: str) -> go.Figure:
    """Plot each configuration's share of a plan's bytes as a ring ([A] Fig. 8).

    ``shares`` is from :func:`lsq_core.results.compare.byte_shares`; ``title``, shown in the middle,
    should be short.
    """
    configs = [parse_config(name) for name in shares.index]
    figure = go.Figure(
        go.Pie(
            labels=[f"{c.name} ({c.stop_name})" for c in configs],
            values=shares.to_numpy(),
            marker={
                "colors": [config_color(c) for c in configs],
                "line": {"width": 1, "color": NEUTRAL},
            },
            hole=0.62,
            sort=False,
            direction="clockwise",
            # Outside the ring, labels have the theme's background.
            textposition="outside",
            text=[f"{100 * share:.1f} %" for share in shares],
            texttemplate="%{label}<br>%{text}",
            hovertemplate="%{label}: %{text} of the bytes<extra></extra>",
        )
    )
    figure.add_annotation(text=title, x=0.5, y=0.5, showarrow=False, font_size=15)
    figure.update_layout(showlegend=False)
    apply_layout(figure, 270)
    return figure.update_layout(margin={"l": 20, "r": 20, "t": 64, "b": 64})
