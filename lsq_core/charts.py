"""Plotly figures out of data frames. Knows neither Streamlit nor torch.

A bit width, a module type and a method each have one colour in every figure. Backgrounds are
clear and neutral lines are mid-grey, so that a figure reads on light and on dark paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from zlib import crc32

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lsq_core.compare import pareto
from lsq_core.config import GIB, LADDER, MIB, QuantConfig

#: What every chart is shown with: no logo, nothing that sends data away.
CONFIG = {
    "displaylogo": False,
    "showSendToCloud": False,
    "modeBarButtonsToRemove": ["lasso2d", "select2d", "autoScale2d"],
}

NEUTRAL = "#8a929c"
_GRID = "rgba(138, 146, 156, 0.25)"

#: One hue a bit width, told apart by colour-blind eyes (after Okabe and Ito).
BIT_COLORS = {2: "#D55E00", 3: "#E69F00", 4: "#009E73", 8: "#0072B2"}
#: How much white is in the colour of a group size: coarse groups are light.
_WHITE = {128: 0.5, 64: 0.25, 32: 0.0}

#: Colour of a module type by the last part of its name (after Tol's bright scheme); attention is
#: drawn solid and the rest dashed, so that hue is not the only difference.
MODULE_COLORS = {
    "q_proj": "#4477AA",
    "k_proj": "#44AABB",
    "v_proj": "#AA4499",
    "o_proj": "#228833",
    "gate_proj": "#B8A22E",
    "up_proj": "#EE6677",
    "down_proj": "#8a929c",
}
_OTHER_COLORS = tuple(MODULE_COLORS.values())


@dataclass(frozen=True)
class MethodStyle:
    """How a method is drawn wherever it is drawn."""

    title: str
    color: str
    symbol: str


METHOD_STYLES = {
    "uniform": MethodStyle("Uniform", "#8a929c", "circle"),
    "sensiboost": MethodStyle("SensiBoost", "#CC6699", "diamond"),
    "kurtboost": MethodStyle("KurtBoost", "#3D9BD1", "square"),
    "sensiboost-ablation": MethodStyle("SensiBoost ablation", "#CC6699", "diamond-open"),
    "kurtboost-ablation": MethodStyle("KurtBoost ablation", "#3D9BD1", "square-open"),
    "mxq": MethodStyle("MXQ", "#7A5BB5", "triangle-up"),
    "kurt-scaled": MethodStyle("Kurtosis-scaled MXQ", "#A58BD6", "triangle-down"),
    "sensi-milp": MethodStyle("Sensitivity MILP", "#C0812B", "star"),
    "kurt-milp": MethodStyle("Kurtosis MILP", "#8C6D31", "hexagon"),
    "sensi-knapsack": MethodStyle("Sensitivity knapsack", "#3FA34D", "pentagon"),
    # Others' methods, of which only published runs are here.
    "gptq": MethodStyle("GPTQ", "#B8860B", "cross"),
    "awq": MethodStyle("AWQ", "#2F8F8F", "x"),
    "bnb": MethodStyle("bitsandbytes", "#B0543C", "star-triangle-up"),
    "loss-aware": MethodStyle("Loss-aware", "#D1495B", "hexagram"),
}


def method_style(name: str) -> MethodStyle:
    """A method's style; one not listed is a neutral cross under its own name."""
    return METHOD_STYLES.get(name, MethodStyle(name, NEUTRAL, "x"))


def config_color(config: QuantConfig) -> str:
    """Hue for the bits, lightness for the group: 128 lightest, 32 full.

    >>> config_color(QuantConfig(4, 32))
    '#009e73'
    """
    white = _WHITE[config.group_size]
    hue = BIT_COLORS[config.bits].lstrip("#")
    parts = (int(hue[i : i + 2], 16) for i in (0, 2, 4))
    return "#" + "".join(f"{round(p + (255 - p) * white):02x}" for p in parts)


def module_color(type_name: str) -> str:
    """The colour of a module type such as ``self_attn.q_proj``."""
    last = type_name.split(".")[-1]
    return MODULE_COLORS.get(last) or _OTHER_COLORS[crc32(last.encode()) % len(_OTHER_COLORS)]


def short_type(type_name: str) -> str:
    """``self_attn.q_proj`` as ``q_proj``; experts keep the word that tells them apart."""
    parts = type_name.split(".")
    return ".".join(parts[-2:]) if "expert" in type_name else parts[-1]


# --- scores over layers ---------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Panel:
    """One chart over layers: ``frame`` has ``type, label, layer, value`` and, where Algorithm 1
    flagged a point, its ``z`` (else NaN)."""

    frame: pd.DataFrame
    title: str
    axis: str
    log: bool = False


def over_layers(panels: Sequence[Panel], height: int = 570) -> go.Figure:
    """Panels above one another with the layers in common; flagged points are ringed.

    Panels that draw the same lines share a legend, beside the first of them.
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
        figure.update_yaxes(title_text=panel.axis, row=row, col=1)
        if panel.log:
            figure.update_yaxes(type="log", exponentformat="power", dtick=1, row=row, col=1)
        if first:
            _place_legend(figure, legend, row)
    figure.update_xaxes(title_text="layer", row=len(panels), col=1)
    for note in figure.layout.annotations:  # the panels' titles, to the left
        note.update(x=0, xanchor="left", font_size=13)
    _finish(figure, height)
    return figure.update_layout(margin={"t": 24, "b": 40}, modebar_orientation="h")


def _place_legend(figure: go.Figure, legend: str, row: int) -> None:
    """Put a legend to the right of its panel, level with its top."""
    top = figure.layout[f"yaxis{row if row > 1 else ''}"].domain[1]
    figure.update_layout(
        {legend: {"x": 1.01, "xanchor": "left", "y": top, "yanchor": "top", "tracegroupgap": 0}}
    )


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
    return go.Scatter(
        x=flagged["layer"],
        y=flagged["value"],
        name="flagged",
        legend=legend,
        legendgroup=f"{legend} flagged",
        showlegend=in_legend,
        mode="markers",
        marker={
            "symbol": "circle-open",
            "size": 13,
            "color": NEUTRAL,
            "line": {"width": 2},
        },
        customdata=flagged[["label", "z"]],
        hovertemplate="%{customdata[0]}, layer %{x}<br>%{y:.4g}"
        "<br>flagged, z = %{customdata[1]:.2f}<extra></extra>",
    )


# --- plans ----------------------------------------------------------------------------------


def plan_heatmap(frame: pd.DataFrame) -> go.Figure:
    """A plan as layers (left to right) by module types (in the order of the computation).

    ``frame`` has a row for each matrix: ``type, layer, config, z`` (``z`` what ranked a moved
    matrix, else NaN). Experts of a layer share a cell, which shows the commonest configuration.
    """
    cells = _cells(frame)
    names = [c.name for c in LADDER]
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
            zmax=len(LADDER) - 0.5,
            colorscale=_steps(),
            showscale=False,
            xgap=1.5,
            ygap=1.5,
            text=_cell_text(grid["config"], len(layers)),
            texttemplate="%{text}",
            customdata=grid["hover"].fillna("").to_numpy(),
            hovertemplate="%{y}, layer %{x}<br>%{customdata}<extra></extra>",
        )
    )
    _config_legend(figure, frame["config"])
    figure.update_xaxes(title_text="layer", showgrid=False, zeroline=False, range=_ends(layers))
    figure.update_yaxes(autorange="reversed", showgrid=False, zeroline=False)
    if len(layers) <= 48:
        figure.update_xaxes(dtick=1 if len(layers) <= 32 else 2)
    figure.update_layout(legend=_ABOVE)
    return _finish(figure, 96 + max(30 * len(kinds), 60))


#: A legend in a row above the figure, to the right.
_ABOVE = {"orientation": "h", "yanchor": "bottom", "y": 1.02, "xanchor": "right", "x": 1}


def _ends(layers: list[int]) -> list[float]:
    return [min(layers) - 0.5, max(layers) + 0.5]


def _cells(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a cell: the commonest configuration, and what the pointer is told."""
    rows = []
    for (kind, layer), part in frame.groupby(["type", "layer"], sort=False):
        counts = part["config"].value_counts()
        hover = (
            counts.index[0]
            if len(part) == 1
            else f"{len(part)} experts: " + ", ".join(f"{n} × {c}" for c, n in counts.items())
        )
        worth = part["z"].max()
        hover += f"<br>flagged, ranked by {worth:.2f}" if pd.notna(worth) else ""
        rows.append({"type": kind, "layer": layer, "config": counts.index[0], "hover": hover})
    return pd.DataFrame(rows)


def _cell_text(configs: pd.DataFrame, layers: int) -> list[list[str]]:
    """Full names where there is room, the stop's number where there is less, else nothing."""
    stops = {c.name: c.stop_name for c in LADDER}

    def words(name: object) -> str:
        if not isinstance(name, str) or layers > 32:
            return ""
        return name if layers <= 14 else stops[name]

    return [[words(name) for name in row] for row in configs.to_numpy()]


def _steps() -> list[list[float | str]]:
    """A colour scale of one flat step for each stop of the ladder."""
    steps: list[list[float | str]] = []
    for index, config in enumerate(LADDER):
        color = config_color(config)
        steps += [[index / len(LADDER), color], [(index + 1) / len(LADDER), color]]
    return steps


def _config_legend(figure: go.Figure, configs: pd.Series) -> None:
    """A legend entry for each configuration in use, with how many matrices have it."""
    counts = configs.value_counts()
    for config in LADDER:
        if config.name in counts:
            figure.add_trace(
                go.Scatter(
                    x=[None],
                    y=[None],
                    mode="markers",
                    name=f"{config.name} ({config.stop_name}) × {counts[config.name]}",
                    marker={"symbol": "square", "size": 11, "color": config_color(config)},
                )
            )


# --- frontiers ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class FrontierLine:
    """A method's plans along the budget: ``bits`` (k,) a parameter and a ``value`` (k,) of each.

    ``low`` and ``high`` (k,) are the ends of its band, where the value is a prediction.
    """

    method: str
    bits: np.ndarray
    value: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None


def frontiers(
    lines: Sequence[FrontierLine], runs: pd.DataFrame, axis: str, at: Sequence[float] = ()
) -> go.Figure:
    """Methods' frontiers in one chart, with the runs that were measured on it.

    ``runs`` has ``method, label, bits_per_param, value``; ``at`` are budgets marked by an upright
    line.
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
    for bits in at:
        figure.add_vline(x=bits, line={"color": NEUTRAL, "width": 1.2, "dash": "dot"})
    values = np.concatenate([*(line.value for line in lines), runs["value"].to_numpy(float)])
    spread = np.nanmax(values) / np.nanmin(values) if len(values) else 1
    if spread > 5:
        figure.update_yaxes(type="log", dtick="D2" if spread < 100 else 1)
    figure.update_layout(legend=_ABOVE)
    figure.update_xaxes(title_text="bits per linear weight, metadata included")
    figure.update_yaxes(title_text=axis)
    return _finish(figure, 360)


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


# --- sizes and results ------------------------------------------------------------------------


def size_bars(frame: pd.DataFrame) -> go.Figure:
    """What a model takes at each stop: ``name, config, linear_bytes, other_bytes`` a row.

    The row without a configuration is the model as it is.
    """
    by_name = {c.name: config_color(c) for c in LADDER}
    whole = frame["linear_bytes"] + frame["other_bytes"]
    unit, scale = ("GiB", GIB) if whole.max() >= 4 * GIB else ("MiB", MIB)
    figure = go.Figure()
    figure.add_bar(
        x=frame["name"],
        y=frame["linear_bytes"] / scale,
        name="linear weights",
        marker_color=[by_name.get(name, NEUTRAL) for name in frame["config"]],
        showlegend=False,
        hovertemplate=f"%{{x}}: linear weights %{{y:.2f}} {unit}<extra></extra>",
    )
    figure.add_bar(
        x=frame["name"],
        y=frame["other_bytes"] / scale,
        name="embeddings, norms, head",
        marker={"color": "rgba(138, 146, 156, 0.35)"},
        text=[f"{value:#.3g}" for value in whole / scale],
        textposition="outside",
        cliponaxis=False,
        hovertemplate=f"%{{x}}: the rest %{{y:.2f}} {unit}<extra></extra>",
        showlegend=False,
    )
    figure.update_layout(barmode="stack", bargap=0.25)
    figure.update_xaxes(type="category", title_text="bits per linear weight, metadata included")
    figure.update_yaxes(title_text=unit)
    return _finish(figure, 300)


@dataclass(frozen=True)
class Size:
    """An account of a run's size: the column that holds it, and how it is written on an axis.

    Accounts are never mixed in one chart.
    """

    column: str
    title: str
    unit: str
    scale: float


MEASURED = Size("measured_bytes", "measured size of the linear weights", "MiB", MIB)
NOMINAL = Size("nominal_bytes", "nominal size of the linear weights", "GiB", GIB)
STORED = Size("model_bytes", "whole model on disk, as published", "GiB", GIB)
BITS = Size("bits_per_param", "nominal bits per linear weight, metadata included", "bits", 1)

#: Of how many runs on markers are smaller, so that each can be told from its neighbours.
_MANY = 60


def perplexity_by_size(
    frame: pd.DataFrame,
    selected: Sequence[str] = (),
    size: Size = MEASURED,
    overlay: pd.DataFrame | None = None,
) -> go.Figure:
    """Perplexity against size, a marker and colour for each method.

    ``frame`` has ``evaluation, method, label, perplexity, perplexity_full, quantizer`` and the
    column of ``size``, all of one model, corpus and protocol. Uniform HQQ runs are joined as the
    reference curve; full precision is a level line; ``selected`` evaluations are ringed. Where
    there are many runs those that no other beats are joined too, and the view is that of
    :func:`view_limit`: what lies above is there when the axes are reset. ``overlay`` has runs of
    another origin, with the same columns and ``origin``, drawn hollow.
    """
    figure = go.Figure()
    many = len(frame) > _MANY
    reference = frame[(frame["method"] == "uniform") & (frame["quantizer"] == "hqq")]
    if len(reference) > 1:
        figure.add_trace(_joined(reference, size))
    if many:
        front = frame[pareto(frame[size.column], frame["perplexity"])]
        figure.add_trace(_front(front, size))
    commonest = frame["method"].value_counts().index if many else frame["method"].unique()
    for method in commonest:  # the rest over it
        part = frame[frame["method"] == method]
        figure.add_trace(_runs(method, part, size, 7 if many else 11))
    for (method, origin), part in _groups(overlay, ["method", "origin"]):
        figure.add_trace(_hollow(_runs(method, part, size, 9), origin))
    ringed = frame[frame["evaluation"].isin(list(selected))]
    if not ringed.empty:
        figure.add_trace(_selected(ringed, size))
    full = frame["perplexity_full"].dropna()
    if not full.empty:
        _level(figure, float(full.iloc[0]))
    if frame["perplexity"].max() / min(frame["perplexity"].min(), *full, 1e300) > 5:
        figure.update_yaxes(type="log", dtick="D2")
    if many and frame["perplexity"].max() > view_limit(frame["perplexity"]):
        _view(figure, frame, full, size)
    figure.update_layout(legend=_ABOVE)
    figure.update_xaxes(title_text=f"{size.title} ({size.unit})")
    figure.update_yaxes(title_text="perplexity (lower is better)")
    return _finish(figure, 430 if many else 370)


def view_limit(perplexity: pd.Series) -> float:
    """Up to which perplexity a chart of many runs shows at first: about all but the highest 5 %.

    A few broken runs would else press the others, which differ by little, into a line.
    """
    most = perplexity.quantile(0.95)
    return float(most + 0.1 * (most - perplexity.min()))


def _view(figure: go.Figure, frame: pd.DataFrame, full: pd.Series, size: Size) -> None:
    """Show the runs up to :func:`view_limit` at first, on plain axes."""
    limit = view_limit(frame["perplexity"])
    low = min(frame["perplexity"].min(), *full, 1e300)
    shown = frame.loc[frame["perplexity"] <= limit, size.column] / size.scale
    beside = 0.03 * float(shown.max() - shown.min())
    figure.update_yaxes(type="linear", dtick=None, range=[low - 0.06 * (limit - low), limit])
    figure.update_xaxes(range=[float(shown.min()) - beside, float(shown.max()) + beside])


def _joined(reference: pd.DataFrame, size: Size) -> go.Scatter:
    reference = reference.sort_values(size.column)
    return go.Scatter(
        x=reference[size.column] / size.scale,
        y=reference["perplexity"],
        mode="lines",
        line={"color": method_style("uniform").color, "width": 1.2},
        name="Uniform HQQ, joined",
        hoverinfo="skip",
        showlegend=False,
    )


def _front(front: pd.DataFrame, size: Size) -> go.Scatter:
    front = front.sort_values(size.column)
    return go.Scatter(
        x=front[size.column] / size.scale,
        y=front["perplexity"],
        mode="lines",
        line={"color": NEUTRAL, "width": 1.2, "dash": "dot", "shape": "hv"},
        name="best for its size",
        hoverinfo="skip",
    )


def _runs(method: str, part: pd.DataFrame, size: Size, width: int) -> go.Scatter:
    style = method_style(method)
    hollow = style.symbol.endswith("open")
    return go.Scatter(
        x=part[size.column] / size.scale,
        y=part["perplexity"],
        mode="markers",
        name=style.title,
        marker={
            "symbol": style.symbol,
            "color": style.color,
            "size": width,
            "line": {"width": (2 if width > 8 else 1.2) if hollow else 0, "color": style.color},
        },
        customdata=part[["label", "evaluation"]],
        hovertemplate="%{customdata[0]}<br>%{x:.2f} "
        + f"{size.unit}, perplexity %{{y:.4f}}<extra></extra>",
    )


def _groups(frame: pd.DataFrame | None, columns: list[str]) -> list[tuple]:
    return [] if frame is None else list(frame.groupby(columns, sort=False))


def _hollow(runs: go.Scatter, origin: str) -> go.Scatter:
    """The markers of runs of another origin, told apart by look and by name."""
    symbol = runs.marker.symbol.removesuffix("-open")
    runs.update(name=f"{runs.name} ({origin})")
    runs.update(marker={"symbol": f"{symbol}-open", "line": {"width": 2}})
    return runs


def _selected(ringed: pd.DataFrame, size: Size) -> go.Scatter:
    return go.Scatter(
        x=ringed[size.column] / size.scale,
        y=ringed["perplexity"],
        mode="markers",
        name="compared below",
        marker={"symbol": "circle-open", "size": 20, "color": NEUTRAL, "line": {"width": 1.5}},
        hoverinfo="skip",
    )


def _level(figure: go.Figure, perplexity: float) -> None:
    figure.add_hline(
        y=perplexity,
        line={"color": NEUTRAL, "width": 1.2, "dash": "dash"},
        annotation_text=f"full precision {perplexity:.2f}",
        annotation_position="bottom right",
        annotation_font_size=12,
    )


def _finish(figure: go.Figure, height: int) -> go.Figure:
    """What all figures have in common."""
    figure.update_layout(
        height=height,
        margin={"l": 60, "r": 34, "t": 30, "b": 45},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        hoverlabel={"namelength": -1},
        # Upright in the right margin, where it covers neither legend nor data.
        modebar={
            "orientation": "v",
            "bgcolor": "rgba(0,0,0,0)",
            "color": NEUTRAL,
            "activecolor": NEUTRAL,
        },
    )
    figure.update_xaxes(gridcolor=_GRID, zeroline=False)
    figure.update_yaxes(gridcolor=_GRID, zeroline=False)
    return figure
