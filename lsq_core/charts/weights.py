"""Charts of the weights of one matrix, and of one module type over layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go

from lsq_core.charts.style import GRID, NEUTRAL, apply_layout

_NORMAL_COLOR = "#CC6699"
#: Smallest count of a bin that is visible on a logarithmic axis.
_MIN_COUNT = 0.5


@dataclass(frozen=True, eq=False)
class GridLines:
    """A quantization grid: the value (2^bits,) or range (2^bits, 2) of each code."""

    values: np.ndarray
    color: str
    name: str


def weight_histogram(
    edges: np.ndarray,
    counts: np.ndarray,
    expected: np.ndarray,
    color: str,
    grid: GridLines | None = None,
    log: bool = True,
    height: int = 400,
) -> go.Figure:
    """Plot a histogram of weights with a normal fit and a quantization grid.

    ``edges`` is (bins + 1,). ``counts`` and ``expected``, the counts under the normal fit, are
    (bins,).
    """
    middles = (edges[:-1] + edges[1:]) / 2
    figure = go.Figure(
        go.Bar(
            x=middles,
            y=counts,
            width=np.diff(edges),
            marker={"color": color, "opacity": 0.65, "line": {"width": 0}},
            name="weights",
            hovertemplate="%{y:,} weights near %{x:.4g}<extra></extra>",
        )
    )
    shown = np.where(expected >= _MIN_COUNT, expected, np.nan) if log else expected
    figure.add_trace(
        go.Scatter(
            x=middles,
            y=shown,
            mode="lines",
            line={"color": _NORMAL_COLOR, "width": 2},
            name="normal with the same mean and standard deviation",
            hovertemplate="normal distribution: %{y:,.1f} near %{x:.4g}<extra></extra>",
        )
    )
    top = float(counts.max())
    if grid is not None:
        figure.add_trace(_grid_lines(grid, top, _MIN_COUNT if log else 0.0))
    if log:
        limits = [np.log10(_MIN_COUNT), np.log10(top * 1.6)]
        figure.update_yaxes(type="log", range=limits, dtick=1)
    figure.update_xaxes(title_text="weight")
    figure.update_yaxes(title_text="weights per bin", tickformat=",d" if not log else None)
    apply_layout(figure, height)
    legend = {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"}
    return figure.update_layout(legend=legend, bargap=0, margin={"t": 50})


def _grid_lines(grid: GridLines, top: float, bottom: float) -> go.Scatter:
    """Return a vertical line or filled range per code, in one trace so that one click hides all."""
    values = np.asarray(grid.values, dtype=float)
    if values.ndim == 1:
        x = np.column_stack([values, values, np.full(len(values), np.nan)]).ravel()
        y = np.tile([bottom, top, np.nan], len(values))
        style = {"line": {"color": grid.color, "width": 1.4}, "mode": "lines"}
    else:
        low, high = values.T
        gap = np.full(len(values), np.nan)
        x = np.column_stack([low, low, high, high, low, gap]).ravel()
        y = np.tile([bottom, top, top, bottom, bottom, np.nan], len(values))
        style = {"line": {"width": 0.6, "color": grid.color}, "fill": "toself", "mode": "lines"}
        style["fillcolor"] = _translucent(grid.color)
    return go.Scatter(x=x, y=y, name=grid.name, hoverinfo="skip", **style)


def _translucent(color: str) -> str:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, 0.25)"


def weight_bands(
    layers: Sequence[int],
    percentiles: Sequence[float],
    values: np.ndarray,
    color: str,
    height: int = 400,
) -> go.Figure:
    """Plot percentiles of one module type's weights over layers as nested bands.

    ``percentiles`` (k,) are symmetric about 50, such as 1, 25, 50, 75, 99; ``values`` is
    (layers, k).
    """
    figure, count = go.Figure(), len(percentiles)
    for i in range(count // 2):
        low, high = values[:, i], values[:, count - 1 - i]
        figure.add_trace(
            go.Scatter(
                x=[*layers, *layers[::-1]],
                y=[*high, *low[::-1]],
                fill="toself",
                fillcolor=_translucent(color),
                line={"width": 0.8, "color": color},
                mode="lines",
                name=f"{percentiles[i]:g} to {percentiles[count - 1 - i]:g} %",
                hoverinfo="skip",
            )
        )
    for i, share in enumerate(percentiles):
        middle = i == count // 2
        figure.add_trace(
            go.Scatter(
                x=list(layers),
                y=values[:, i],
                mode="lines+markers" if middle else "markers",
                line={"color": color, "width": 1.8},
                marker={"size": 4, "color": color},
                name="median" if middle else f"{share:g} %",
                showlegend=middle,
                hovertemplate=f"layer %{{x}}: {share:g} % of the weights are below %{{y:.4g}}"
                "<extra></extra>",
            )
        )
    figure.update_xaxes(title_text="layer")
    figure.update_yaxes(title_text="weight")
    apply_layout(figure, height)
    legend = {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"}
    return figure.update_layout(legend=legend, margin={"t": 50})


@dataclass(frozen=True, eq=False)
class Region:
    """Absolute weights of a region of a matrix; each cell is the largest of a tile of weights.

    The region starts at ``row`` and ``column``; each of its ``cells`` (rows, columns) covers
    ``down`` rows and ``across`` columns of weights.
    """

    cells: np.ndarray
    row: int
    column: int
    down: int
    across: int

    @property
    def rows(self) -> np.ndarray:
        """The first row of weights in each row of cells."""
        return self.row + self.down * np.arange(self.cells.shape[0])

    @property
    def columns(self) -> np.ndarray:
        """The first column of weights in each column of cells."""
        return self.column + self.across * np.arange(self.cells.shape[1])


def weight_surface(region: Region, height: int = 560) -> go.Figure:
    """Plot the absolute weights of a region of a matrix as a surface ([A] Fig. 1)."""
    figure = go.Figure(
        go.Surface(
            x=region.columns,
            y=region.rows,
            z=region.cells,
            colorscale="Cividis",
            colorbar={"title": "|w|", "thickness": 12, "len": 0.6, "y": 0.4, "outlinewidth": 0},
            hovertemplate="from row %{y}, column %{x}<br>|w| up to %{z:.4g}<extra></extra>",
        )
    )
    axis = {"gridcolor": GRID, "backgroundcolor": "rgba(0,0,0,0)", "color": NEUTRAL}
    figure.update_layout(
        scene={
            "xaxis": axis | {"title": {"text": "input column"}},
            "yaxis": axis | {"title": {"text": "output row"}},
            "zaxis": axis | {"title": {"text": "|w|"}, "rangemode": "tozero"},
            "aspectmode": "manual",
            "aspectratio": {"x": 1.35, "y": 1.35, "z": 0.7},
            "camera": {
                "eye": {"x": 1.5, "y": -1.6, "z": 1.0},
                "center": {"x": 0, "y": 0, "z": -0.2},
            },
        }
    )
    apply_layout(figure, height)
    return figure.update_layout(margin={"l": 0, "r": 0, "t": 30, "b": 0}, modebar_orientation="h")


def weight_map(region: Region, height: int = 560) -> go.Figure:
    """Plot the absolute weights of a region of a matrix as a heatmap.

    Unlike :func:`weight_surface`, it needs no 3-D graphics, and rows and columns can be read off.
    """
    figure = go.Figure(
        go.Heatmap(
            x=region.columns,
            y=region.rows,
            z=region.cells,
            colorscale="Cividis",
            colorbar={"title": "|w|", "thickness": 12, "outlinewidth": 0},
            hovertemplate="from row %{y}, column %{x}<br>|w| up to %{z:.4g}<extra></extra>",
        )
    )
    figure.update_xaxes(title_text="input column")
    figure.update_yaxes(title_text="output row", autorange="reversed")
    return apply_layout(figure, height).update_layout(modebar_orientation="h")
