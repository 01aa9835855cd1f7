"""Sizes of a model, and runs by size and perplexity."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go

from lsq_core.bits import LADDER
from lsq_core.charts.style import (
    LEGEND_ABOVE,
    NEUTRAL,
    apply_layout,
    config_color,
    method_style,
    ring_markers,
    style_key,
)
from lsq_core.results.compare import BOOST_METHODS, ROW_METHODS, pareto
from lsq_core.units import GIB, MIB


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
        name="embeddings, norms, LM head",
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
    return apply_layout(figure, 300)


@dataclass(frozen=True)
class SizeMeasure:
    """An account of a run's size: the column that holds it, and how it is written on an axis.

    Accounts are never mixed in one chart.
    """

    column: str
    title: str
    unit: str
    scale: float


MEASURED = SizeMeasure("measured_bytes", "measured size of the linear weights", "MiB", MIB)
NOMINAL = SizeMeasure("nominal_bytes", "nominal size of the linear weights", "GiB", GIB)
STORED = SizeMeasure("model_bytes", "whole model on disk, as published", "GiB", GIB)
BITS = SizeMeasure("bits_per_param", "nominal bits per linear weight, metadata included", "bits", 1)


@dataclass(frozen=True)
class QualityMeasure:
    """What is good or bad about a run: its column, how an axis says it, and which way is better."""

    column: str
    title: str
    unit: str = ""
    scale: float = 1
    higher_is_better: bool = False

    @property
    def axis(self) -> str:
        """What the axis reads."""
        unit = f"{self.unit}, " if self.unit else ""
        return f"{self.title} ({unit}{'higher' if self.higher_is_better else 'lower'} is better)"

    def cost(self, frame: pd.DataFrame) -> pd.Series:
        """The column, or its negative where higher is better: less is better always."""
        values = frame[self.column].astype(float)
        return -values if self.higher_is_better else values


PERPLEXITY = QualityMeasure("perplexity", "perplexity")
KL = QualityMeasure("kl", "KL divergence from full precision", "nats")
TOP1 = QualityMeasure("top1", "same top token as full precision", "%", 0.01, higher_is_better=True)

#: Of how many runs on markers are smaller, so that each can be told from its neighbours.
_SMALL_MARKER_RUNS = 60


def perplexity_by_size(
    frame: pd.DataFrame,
    selected: Sequence[str] = (),
    size: SizeMeasure = MEASURED,
    overlay: pd.DataFrame | None = None,
    quality: QualityMeasure = PERPLEXITY,
) -> go.Figure:
    """Perplexity, or another quality, against size; a marker and colour for each method.

    A uniform plan by another quantizer than HQQ is a baseline, with a marker of its own.

    ``frame`` has ``evaluation, method, label, perplexity, perplexity_full, quantizer`` and the
    columns of ``size`` and ``quality``, all of one model, corpus and protocol. Uniform HQQ runs
    are joined as the reference curve, and so are the runs that no other beats; full precision's
    perplexity is a level line; ``selected`` evaluations are ringed. Where there are many runs the
    view is that of :func:`view_limit`: what lies above is there when the axes are reset.
    ``overlay`` has runs of another origin, with the same columns and ``origin``, drawn hollow.
    """
    figure = go.Figure()
    many = len(frame) > _SMALL_MARKER_RUNS
    reference = frame[(frame["method"] == "uniform") & (frame["quantizer"] == "hqq")]
    if len(reference) > 1:
        figure.add_trace(_uniform_line(reference, size, quality))
    front = frame[pareto(frame[size.column], quality.cost(frame))]
    if len(front) > 1:
        figure.add_trace(_pareto_line(front, size, quality))
    drawn = frame.assign(
        style_key=[
            style_key(*pair) for pair in zip(frame["method"], frame["quantizer"], strict=True)
        ]
    )
    styles = drawn["style_key"].value_counts().index if many else drawn["style_key"].unique()
    for style in styles:  # the rest over it
        part = drawn[drawn["style_key"] == style]
        figure.add_trace(_runs(style, part, size, quality, 7 if many else 11))
    for (method, origin), part in _groups(overlay, ["method", "origin"]):
        figure.add_trace(_hollow(_runs(method, part, size, quality, 9), origin))
    ringed = frame[frame["evaluation"].isin(list(selected))]
    if not ringed.empty:
        x, y = ringed[size.column] / size.scale, ringed[quality.column] / quality.scale
        figure.add_trace(ring_markers(x, y, "selected pair", size=20))
    full = frame["perplexity_full"].dropna() if quality == PERPLEXITY else pd.Series(dtype=float)
    if not full.empty:
        _add_full_precision_line(figure, float(full.iloc[0]))
    values = frame[quality.column].dropna()
    least = min(values.min(), *full, 1e300)
    if not quality.higher_is_better and least > 0 and values.max() / least > 5:
        figure.update_yaxes(type="log", dtick="D2" if quality == PERPLEXITY else 1)
    if many and quality == PERPLEXITY and values.max() > view_limit(values):
        _limit_view(figure, frame, full, size)
    figure.update_layout(legend=LEGEND_ABOVE)
    figure.update_xaxes(title_text=f"{size.title} ({size.unit})")
    figure.update_yaxes(title_text=quality.axis)
    return apply_layout(figure, _HEIGHT)


#: The same for few and many runs, so that nothing jumps when the measurement is changed.
_HEIGHT = 430


def view_limit(perplexity: pd.Series) -> float:
    """Up to which perplexity a chart of many runs shows at first: about all but the highest 5 %.

    A few broken runs would else press the others, which differ by little, into a line.
    """
    high = perplexity.quantile(0.95)
    return float(high + 0.1 * (high - perplexity.min()))


def _limit_view(figure: go.Figure, frame: pd.DataFrame, full: pd.Series, size: SizeMeasure) -> None:
    """Show the runs up to :func:`view_limit` at first, on plain axes."""
    limit = view_limit(frame["perplexity"])
    low = min(frame["perplexity"].min(), *full, 1e300)
    shown = frame.loc[frame["perplexity"] <= limit, size.column] / size.scale
    padding = 0.03 * float(shown.max() - shown.min())
    figure.update_yaxes(type="linear", dtick=None, range=[low - 0.06 * (limit - low), limit])
    figure.update_xaxes(range=[float(shown.min()) - padding, float(shown.max()) + padding])


def _uniform_line(
    reference: pd.DataFrame, size: SizeMeasure, quality: QualityMeasure
) -> go.Scatter:
    reference = reference.sort_values(size.column)
    return go.Scatter(
        x=reference[size.column] / size.scale,
        y=reference[quality.column] / quality.scale,
        mode="lines",
        line={"color": method_style("uniform").color, "width": 1.2},
        name="Uniform HQQ",
        hoverinfo="skip",
    )


def _pareto_line(front: pd.DataFrame, size: SizeMeasure, quality: QualityMeasure) -> go.Scatter:
    front = front.sort_values(size.column)
    return go.Scatter(
        x=front[size.column] / size.scale,
        y=front[quality.column] / quality.scale,
        mode="lines",
        line={"color": NEUTRAL, "width": 1.2, "dash": "dot", "shape": "hv"},
        name="Pareto front",
        hoverinfo="skip",
    )


def _runs(
    method: str, part: pd.DataFrame, size: SizeMeasure, quality: QualityMeasure, width: int
) -> go.Scatter:
    style = method_style(method)
    hollow = style.symbol.endswith("open")
    return go.Scatter(
        x=part[size.column] / size.scale,
        y=part[quality.column] / quality.scale,
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
        + f"{size.unit}, {quality.title} %{{y:.4f}}{quality.unit and ' ' + quality.unit}"
        + "<extra></extra>",
        # The one picked is told by its neighbours' paleness; they stay readable.
        unselected={"marker": {"opacity": 0.4}},
    )


def _groups(frame: pd.DataFrame | None, columns: list[str]) -> list[tuple]:
    return [] if frame is None else list(frame.groupby(columns, sort=False))


def _hollow(runs: go.Scatter, origin: str) -> go.Scatter:
    """The markers of runs of another origin, told apart by look and by name."""
    symbol = runs.marker.symbol.removesuffix("-open")
    runs.update(name=f"{runs.name} ({origin})")
    runs.update(marker={"symbol": f"{symbol}-open", "line": {"width": 2}})
    return runs


def _add_full_precision_line(figure: go.Figure, perplexity: float) -> None:
    figure.add_hline(
        y=perplexity,
        line={"color": NEUTRAL, "width": 1.2, "dash": "dash"},
        annotation_text=f"full precision {perplexity:.2f}",
        annotation_position="bottom right",
        annotation_font_size=12,
    )


def add_run_labels(frame: pd.DataFrame) -> pd.DataFrame:
    """Runs with ``label``, a name for each that a person can tell from the others.

    ``frame`` has the columns of :meth:`lsq_core.store.store.Store.results`.
    """
    return frame.assign(label=[_label(row) for row in frame.to_dict("records")])


def _label(row: dict) -> str:
    request = json.loads(row["request"]) if isinstance(row["request"], str) else {}
    parts = [f"{method_style(row['method']).title} {row['bits_per_param']:.2f}"]
    if row["method"] in BOOST_METHODS:
        parts.append(f"base {row['base']}")
        parts.append(f"+{request.get('boost_stop', 0)}")
        parts += [f"top {request['top_m']}"] if request.get("top_m") else []
        parts += [f"seed {request['seed']}"] if row["method"].endswith("-ablation") else []
    if row["method"] in ROW_METHODS:
        parts.append(f"{request['low_bits']}+{request['high_bits']} g{request['group_size']}")
        parts.append(f"{request['ratios']} ratios")
        parts += [f"by the {request['loss']} loss"] if request["loss"] != "block" else []
    if row["origin"] != "published":  # those are all by one quantizer, grid and metadata
        parts += [row["quantizer"]]
        parts += ["fp16 metadata"] if row["metadata"] == "fp16" else []
        parts += ["axis 0"] if row["axis"] == 0 else []
    return ", ".join(parts)
