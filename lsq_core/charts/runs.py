"""Charts of a model's sizes, and of runs by size and perplexity."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go

from lsq_core.bits import EXTENDED_LADDER
from lsq_core.charts.style import (
    FADED,
    LEGEND_ABOVE,
    LOG_TICKS,
    NEUTRAL,
    apply_layout,
    config_color,
    method_style,
    ring_markers,
    style_key,
)
from lsq_core.charts.view import View, apply_view, initial_view, label_line_end
from lsq_core.planning.methods import mixes_rows, reads_field
from lsq_core.results.compare import pareto
from lsq_core.results.gains import is_ablation
from lsq_core.units import GIB, MIB


def size_bars(frame: pd.DataFrame) -> go.Figure:
    """Plot a model's size by configuration.

    ``frame`` has the columns ``name, config, linear_bytes, other_bytes``. The row without a
    configuration is the model as stored.
    """
    by_name = {c.name: config_color(c) for c in EXTENDED_LADDER}
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
        text=[f"{value:#.3g}".rstrip(".") for value in whole / scale],
        textposition="outside",
        cliponaxis=False,
        hovertemplate=f"%{{x}}: other parameters %{{y:.2f}} {unit}<extra></extra>",
        showlegend=False,
    )
    figure.update_layout(barmode="stack", bargap=0.25)
    figure.update_xaxes(type="category", title_text="bits per linear weight, metadata included")
    figure.update_yaxes(title_text=unit)
    return apply_layout(figure, 300)


@dataclass(frozen=True)
class SizeMeasure:
    """A measure of a run's size: its column, axis title, unit, and column values per unit.

    Size measures are never mixed in one chart.
    """

    column: str
    title: str
    unit: str
    scale: float


MEASURED = SizeMeasure("measured_bytes", "measured size of the linear weights", "MiB", MIB)
NOMINAL = SizeMeasure("nominal_bytes", "nominal size of the linear weights", "GiB", GIB)
STORED = SizeMeasure("model_bytes", "full model on disk, as published", "GiB", GIB)
BITS = SizeMeasure("bits_per_param", "nominal bits per linear weight, metadata included", "bits", 1)


@dataclass(frozen=True)
class QualityMeasure:
    """A quality measure of a run: its column, axis title, unit, and whether higher is better."""

    column: str
    title: str
    unit: str = ""
    scale: float = 1
    higher_is_better: bool = False

    @property
    def axis(self) -> str:
        """The axis title."""
        unit = f"{self.unit}, " if self.unit else ""
        return f"{self.title} ({unit}{'higher' if self.higher_is_better else 'lower'} is better)"

    def cost(self, frame: pd.DataFrame) -> pd.Series:
        """Return the column, negated if higher is better, so that lower is always better."""
        values = frame[self.column].astype(float)
        return -values if self.higher_is_better else values


PERPLEXITY = QualityMeasure("perplexity", "perplexity")
KL = QualityMeasure("kl", "KL divergence from full precision", "nats")
TOP1 = QualityMeasure(
    "top1", "top-token agreement with full precision", "%", 0.01, higher_is_better=True
)

#: Number of runs above which markers are smaller, so that they overlap less.
_SMALL_MARKER_RUNS = 60


def perplexity_by_size(
    frame: pd.DataFrame,
    selected: Sequence[str] = (),
    size: SizeMeasure = MEASURED,
    overlay: pd.DataFrame | None = None,
    quality: QualityMeasure = PERPLEXITY,
    files: pd.DataFrame | None = None,
) -> go.Figure:
    """Plot perplexity, or another quality measure, against size.

    Each method has its own marker and colour. Uniform plans with quantizers other than HQQ are
    baselines with markers of their own. Uniform HQQ runs are joined to a reference curve and
    Pareto-optimal runs to a front, both labelled at their ends. Full precision's perplexity is a
    horizontal line. Ablations are faded. The chart opens on :func:`size_view`; resetting the axes
    shows everything.

    Parameters
    ----------
    frame
        Runs of one model, corpus and protocol, with the columns ``evaluation, method, label,
        bits_per_param, perplexity, perplexity_full, quantizer`` and those of ``size`` and
        ``quality``.
    selected
        Evaluations to ring.
    overlay
        Runs of another origin, drawn hollow, with the same columns and ``origin``.
    files
        GGUF files (:meth:`lsq_core.store.store.Store.gguf_baselines`), placed by the bytes of the
        same weights in the file. They are drawn only for measured size and perplexity.
    """
    figure = go.Figure()
    files = _drawn_files(files, size, quality)
    view = size_view(frame, size, quality, files)
    many = len(frame) > _SMALL_MARKER_RUNS
    for rank, line in enumerate(_lines(frame, size, quality)):
        figure.add_trace(line)
        label_line_end(figure, line, view, line.name, rank, above=not quality.higher_is_better)
    for style, part in _styles(frame, many):
        figure.add_trace(_runs(style, part, size, quality, 7 if many else 11))
    for (method, origin), part in _groups(overlay, ["method", "origin"]):
        figure.add_trace(_hollow(_runs(method, part, size, quality, 9), origin))
    if files is not None:
        figure.add_trace(_files(files, size))
    ringed = frame[frame["evaluation"].isin(list(selected))]
    if not ringed.empty:
        x, y = ringed[size.column] / size.scale, ringed[quality.column] / quality.scale
        figure.add_trace(ring_markers(x, y, "selected", size=20))
    full = _full_precision(frame, quality)
    if full is not None:
        _add_full_precision_line(figure, full)
    if view.log:
        figure.update_yaxes(type="log", **(LOG_TICKS if quality == PERPLEXITY else {"dtick": 1}))
    note = view.note(quality.title, quality.unit)
    apply_view(figure, view, note, top=not quality.higher_is_better)
    figure.update_layout(legend=LEGEND_ABOVE)
    figure.update_xaxes(title_text=f"{size.title} ({size.unit})")
    figure.update_yaxes(title_text=quality.axis)
    return apply_layout(figure, _HEIGHT)


#: Height for any number of runs, so that the layout is stable when the measure changes.
_HEIGHT = 430


def _drawn_files(
    files: pd.DataFrame | None, size: SizeMeasure, quality: QualityMeasure
) -> pd.DataFrame | None:
    """Return the files if the measures apply to them (measured bytes, perplexity), else None."""
    comparable = size == MEASURED and quality == PERPLEXITY
    return files if comparable and files is not None and len(files) else None


def _files(files: pd.DataFrame, size: SizeMeasure) -> go.Scatter:
    return go.Scatter(
        x=files["block_bytes"] / size.scale,
        y=files["perplexity"],
        mode="markers+text",
        name="GGUF file",
        text=[f"GGUF {name}" for name in files["type"]],
        textposition="top left",
        textfont={"size": 12},
        marker={"symbol": "hourglass", "size": 12, "color": "#1f7a8c"},
        customdata=files[["model", "file_bytes"]].assign(file_bytes=files["file_bytes"] / MIB),
        hovertemplate="%{text}, %{customdata[0]}<br>%{x:.2f} MiB for these weights in a file of "
        "%{customdata[1]:.2f} MiB, perplexity %{y:.4f}<extra></extra>",
    )


def size_view(
    frame: pd.DataFrame,
    size: SizeMeasure,
    quality: QualityMeasure = PERPLEXITY,
    files: pd.DataFrame | None = None,
) -> View:
    """Return the initial view of :func:`perplexity_by_size`."""
    files = _drawn_files(files, size, quality)
    return initial_view(
        frame[size.column].astype(float) / size.scale,
        frame[quality.column].astype(float) / quality.scale,
        frame["bits_per_param"],
        higher_is_better=quality.higher_is_better,
        level=_full_precision(frame, quality),
        include=None if files is None else float(files["block_bytes"].max()) / size.scale,
    )


def _full_precision(frame: pd.DataFrame, quality: QualityMeasure) -> float | None:
    full = frame["perplexity_full"].dropna()
    return float(full.iloc[0]) if quality == PERPLEXITY and not full.empty else None


def _lines(frame: pd.DataFrame, size: SizeMeasure, quality: QualityMeasure) -> list[go.Scatter]:
    """Return the uniform and the Pareto line, omitting those with fewer than two runs."""
    lines = []
    reference = frame[(frame["method"] == "uniform") & (frame["quantizer"] == "hqq")]
    if len(reference) > 1:
        lines.append(_uniform_line(reference, size, quality))
    front = frame[pareto(frame[size.column], quality.cost(frame))]
    if len(front) > 1:
        lines.append(_pareto_line(front, size, quality))
    return lines


def _styles(frame: pd.DataFrame, many: bool) -> list[tuple[str, pd.DataFrame]]:
    """Return the runs by style, ablations first so that the others are drawn over them."""
    pairs = zip(frame["method"], frame["quantizer"], strict=True)
    drawn = frame.assign(style_key=[style_key(*pair) for pair in pairs])
    styles = drawn["style_key"].value_counts().index if many else drawn["style_key"].unique()
    ordered = sorted(styles, key=lambda style: not is_ablation(style))
    return [(style, drawn[drawn["style_key"] == style]) for style in ordered]


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
        showlegend=False,
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
        showlegend=False,
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
        opacity=FADED if is_ablation(method) else 1,
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
        # The other markers are paler, but still readable, when one is selected.
        unselected={"marker": {"opacity": 0.4}},
    )


def _groups(frame: pd.DataFrame | None, columns: list[str]) -> list[tuple]:
    return [] if frame is None else list(frame.groupby(columns, sort=False))


def _hollow(runs: go.Scatter, origin: str) -> go.Scatter:
    """Make markers hollow and append the origin to their name."""
    symbol = runs.marker.symbol.removesuffix("-open")
    runs.update(name=f"{runs.name} ({origin})")
    runs.update(marker={"symbol": f"{symbol}-open", "line": {"width": 2}})
    return runs


def _add_full_precision_line(figure: go.Figure, perplexity: float) -> None:
    figure.add_hline(
        y=perplexity,
        line={"color": NEUTRAL, "width": 1.2, "dash": "dash"},
        annotation_text=f"full precision {perplexity:.2f}",
        annotation_position="bottom left",
        annotation_font_size=12,
    )


def add_run_labels(frame: pd.DataFrame) -> pd.DataFrame:
    """Add the column ``label`` with a descriptive name for each run.

    ``frame`` has the columns of :meth:`lsq_core.store.store.Store.results`.
    """
    return frame.assign(label=[_label(row) for row in frame.to_dict("records")])


def _label(row: dict) -> str:
    request = json.loads(row["request"]) if isinstance(row["request"], str) else {}
    parts = [f"{method_style(row['method']).title} {row['bits_per_param']:.2f}"]
    if reads_field(row["method"], "boost_stop"):
        parts.append(f"base {row['base']}")
        parts.append(f"+{request.get('boost_stop', 0)}")
        parts += [f"top {request['top_m']}"] if request.get("top_m") else []
        parts += [f"seed {request['seed']}"] if reads_field(row["method"], "seed") else []
    if mixes_rows(row["method"]):
        parts.append(f"{request['low_bits']}+{request['high_bits']} g{request['group_size']}")
        parts.append(f"{request['ratios']} ratios")
        parts += [f"by the {request['loss']} loss"] if request["loss"] != "block" else []
    parts += [f"for {request['serve']}"] if request.get("serve") else []
    parts += ["tied"] if request.get("ties") else []
    if row["origin"] != "published":  # published runs share one quantizer, axis and metadata
        parts += [row["quantizer"]]
        parts += ["fp16 metadata"] if row["metadata"] == "fp16" else []
        parts += ["axis 0"] if row["axis"] == 0 else []
    return ", ".join(parts)
