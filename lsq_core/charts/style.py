"""Style shared by all figures: one colour per bit width, module type and method."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np
import plotly.graph_objects as go

from lsq_core.bits import FP16_BITS, RATIOS, Config, MixedRows
from lsq_core.planning.methods import PLANNERS
from lsq_core.quantization.registry import QUANTIZERS

#: Plotly configuration of every chart: no logo and no button that sends data to a server.
CONFIG = {
    "displaylogo": False,
    "showSendToCloud": False,
    "modeBarButtonsToRemove": ["lasso2d", "select2d", "autoScale2d"],
}

#: Ticks of a logarithmic axis, labelled in full: Plotly shortens those between powers of ten to one
#: digit.
LOG_TICKS = {
    "tickmode": "array",
    "tickvals": [digit * 10.0**power for power in range(-6, 12) for digit in (1, 2, 5)],
    "ticktext": [f"{digit * 10.0**power:,.12g}" for power in range(-6, 12) for digit in (1, 2, 5)],
}

NEUTRAL = "#8a929c"
#: Opacity of controls (ablations), as opposed to results.
FADED = 0.35
GRID = "rgba(138, 146, 156, 0.25)"

#: One hue per bit width, distinguishable by colour-blind readers (after Okabe and Ito).
BIT_COLORS = {
    1: "#7A2E0E",
    2: "#D55E00",
    3: "#E69F00",
    4: "#009E73",
    5: "#CC79A7",
    6: "#6B3FA0",
    8: "#0072B2",
    FP16_BITS: NEUTRAL,
}
#: Fraction of white in the colour of a group size: larger groups are lighter.
_WHITENESS = {128: 0.5, 64: 0.25, 32: 0.0}

#: Colour of a module type by the last part of its name (after Tol's bright scheme). Line charts
#: draw attention solid and the rest dotted or dashed, so that hue is not the only difference.
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
    """The legend title, colour and marker symbol of a method in all charts."""

    title: str
    color: str
    symbol: str


#: Styles of baselines in published runs that are not among :data:`QUANTIZERS`.
_PUBLISHED_STYLES = {"bnb": MethodStyle("bitsandbytes", "#B0543C", "star-triangle-up")}


def method_style(name: str) -> MethodStyle:
    """Return the style of a method or baseline quantizer; unknown names get a grey cross."""
    entry = PLANNERS.get(name) or QUANTIZERS.get(name)
    if entry is not None and entry.color:
        return MethodStyle(entry.title, entry.color, entry.symbol)
    return _PUBLISHED_STYLES.get(name) or MethodStyle(name, NEUTRAL, "x")


def style_key(method: str, quantizer: str) -> str:
    """Return the name of a run's style: its method, or its quantizer for a baseline.

    >>> style_key("uniform", "nf4"), style_key("uniform", "hqq"), style_key("mxq", "nf4")
    ('nf4', 'uniform', 'mxq')
    >>> style_key("uniform", "hybrid-500")
    'hybrid'
    """
    name = quantizer if quantizer in QUANTIZERS else re.sub(r"-\d+$", "", quantizer)
    is_baseline = name in _PUBLISHED_STYLES or (name in QUANTIZERS and QUANTIZERS[name].color)
    return name if method == "uniform" and is_baseline else method


def config_color(config: Config) -> str:
    """Return the colour of a configuration: hue by bits, lightness by group size (128 lightest).

    For mixed rows, the hue is that of the high-impact rows' bits and the lightness depends on their
    ratio (the higher, the darker).

    >>> from lsq_core.bits import QuantConfig
    >>> config_color(QuantConfig(4, 32))
    '#009e73'
    """
    if isinstance(config, MixedRows):
        white, bits = 0.75 * (1 - config.ratio / max(RATIOS)), config.high_bits
    else:
        white, bits = _WHITENESS[config.group_size], config.bits
    hue = BIT_COLORS[bits].lstrip("#")
    parts = (int(hue[i : i + 2], 16) for i in (0, 2, 4))
    return "#" + "".join(f"{round(p + (255 - p) * white):02x}" for p in parts)


def module_color(type_name: str) -> str:
    """Return the colour of a module type such as ``self_attn.q_proj``."""
    last = type_name.split(".")[-1]
    return MODULE_COLORS.get(last) or _OTHER_COLORS[crc32(last.encode()) % len(_OTHER_COLORS)]


def short_type(type_name: str) -> str:
    """Shorten ``self_attn.q_proj`` to ``q_proj``; experts keep two parts, to stay distinct."""
    parts = type_name.split(".")
    return ".".join(parts[-2:]) if "expert" in type_name else parts[-1]


def layer_axis(layers: int, first: int = 0) -> dict[str, Any]:
    """Return the range and ticks of a layer axis, with ticks at whole numbers only.

    ``layers`` is how many layers are shown, and ``first`` the index of the first one.

    >>> layer_axis(4)
    {'range': [-0.5, 3.5], 'tickangle': 0, 'dtick': 1}
    """
    ticks = {"dtick": 1} if layers <= _EVERY_LAYER else {}
    return {"range": [first - 0.5, first + layers - 0.5], "tickangle": 0, **ticks}


#: Number of layers up to which each is labelled; automatic ticks would include halves.
_EVERY_LAYER = 10


def in_two_lines(title: str) -> str:
    """Break a long axis title at the space nearest its middle, to fit a short axis.

    >>> in_two_lines("mean squared output change")
    'mean squared<br>output change'
    """
    spaces = [i for i, letter in enumerate(title) if letter == " "]
    if len(title) < 22 or not spaces:
        return title
    middle = min(spaces, key=lambda i: abs(i - len(title) / 2))
    return f"{title[:middle]}<br>{title[middle + 1 :]}"


#: A horizontal legend above the figure, right-aligned. It scrolls on narrow pages, where it would
#: otherwise take up half of the chart.
LEGEND_ABOVE = {
    "orientation": "h",
    "yanchor": "bottom",
    "y": 1.02,
    "xanchor": "right",
    "x": 1,
    "maxheight": 0.25,
}


def ring_markers(
    x: object, y: object, name: str, *, size: float, color: str = NEUTRAL
) -> go.Scatter:
    """Return rings around points, so that they are marked by more than colour."""
    return go.Scatter(
        x=x,
        y=y,
        mode="markers",
        name=name,
        marker={"symbol": "circle-open", "size": size, "color": color, "line": {"width": 2}},
        hoverinfo="skip",
    )


def apply_layout(figure: go.Figure, height: int) -> go.Figure:
    """Apply the layout shared by all figures."""
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
    figure.update_xaxes(gridcolor=GRID, zeroline=False)
    figure.update_yaxes(gridcolor=GRID, zeroline=False)
    return figure


#: The start of any tag that is not allowed. Plotly renders some HTML tags; only line breaks and
#: simple formatting are allowed, and no attributes, since they may contain a URL.
_FOREIGN_TAG = re.compile(r"<(?!/?(?:br|b|i|sub|sup|extra)>)", re.IGNORECASE)


def sanitize_figure(figure: go.Figure) -> go.Figure:
    """Escape disallowed HTML tags in a figure's texts, which may contain arbitrary names."""
    content = figure.to_plotly_json()
    sanitize = _sanitize(content)
    return figure if sanitize is content else type(figure)(sanitize)


def _sanitize(value: Any) -> Any:
    """Escape foreign tags in part of a figure; return the same object if there are none."""
    if isinstance(value, str):
        return _FOREIGN_TAG.sub("&lt;", value) if "<" in value else value
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "OUS":
            return value
        parts = value.tolist()
        changed = _sanitize(parts)
        return value if changed is parts else changed
    if isinstance(value, dict):
        changed = {key: _sanitize(part) for key, part in value.items()}
        same = all(changed[key] is part for key, part in value.items())
        return value if same else changed
    if isinstance(value, list | tuple):
        changed = [_sanitize(part) for part in value]
        return value if all(a is b for a, b in zip(changed, value, strict=True)) else changed
    return value
