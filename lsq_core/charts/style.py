"""What all figures have in common: one colour for a bit width, a module type and a method each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np
import plotly.graph_objects as go

from lsq_core.bits import FP16_BITS, RATIOS, Config, MixedRows

#: What every chart is shown with: no logo, nothing that sends data away.
CONFIG = {
    "displaylogo": False,
    "showSendToCloud": False,
    "modeBarButtonsToRemove": ["lasso2d", "select2d", "autoScale2d"],
}

NEUTRAL = "#8a929c"
GRID = "rgba(138, 146, 156, 0.25)"

#: One hue a bit width, told apart by colour-blind eyes (after Okabe and Ito).
BIT_COLORS = {2: "#D55E00", 3: "#E69F00", 4: "#009E73", 8: "#0072B2", FP16_BITS: NEUTRAL}
#: How much white is in the colour of a group size: coarse groups are light.
_WHITENESS = {128: 0.5, 64: 0.25, 32: 0.0}

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
    # What others use: published runs, and uniform plans by another quantizer than HQQ.
    "gptq": MethodStyle("GPTQ", "#B8860B", "cross"),
    "awq": MethodStyle("AWQ", "#2F8F8F", "x"),
    "rtn": MethodStyle("RTN", "#6E7B3A", "triangle-left"),
    "nf4": MethodStyle("NF4", "#B0543C", "star-triangle-down"),
    "nf4-dq": MethodStyle("NF4, double-quantized", "#B0543C", "star-triangle-down-open"),
    "hybrid": MethodStyle("Hybrid", "#5B7F2B", "bowtie-open"),
    "bnb": MethodStyle("bitsandbytes", "#B0543C", "star-triangle-up"),
    "loss-aware": MethodStyle("Loss-aware", "#D1495B", "hexagram"),
    "high-impact": MethodStyle("High-impact rows", "#5B7F2B", "bowtie"),
}


def method_style(name: str) -> MethodStyle:
    """A method's style; one not listed is a neutral cross under its own name."""
    return METHOD_STYLES.get(name, MethodStyle(name, NEUTRAL, "x"))


def style_key(method: str, quantizer: str) -> str:
    """The style's name of a run: its method's, or for a baseline that of its quantizer.

    >>> drawn_as("uniform", "nf4"), drawn_as("uniform", "hqq"), drawn_as("mxq", "nf4")
    ('nf4', 'uniform', 'mxq')
    >>> drawn_as("uniform", "hybrid-500")
    'hybrid'
    """
    name = "hybrid" if quantizer.startswith("hybrid-") else quantizer
    return name if method == "uniform" and name in METHOD_STYLES else method


def config_color(config: Config) -> str:
    """Hue for the bits, lightness for the group: 128 lightest, 32 full.

    Of mixed rows, hue for the high-impact ones' bits, lightness for their ratio.

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
    """The colour of a module type such as ``self_attn.q_proj``."""
    last = type_name.split(".")[-1]
    return MODULE_COLORS.get(last) or _OTHER_COLORS[crc32(last.encode()) % len(_OTHER_COLORS)]


def short_type(type_name: str) -> str:
    """``self_attn.q_proj`` as ``q_proj``; experts keep the word that tells them apart."""
    parts = type_name.split(".")
    return ".".join(parts[-2:]) if "expert" in type_name else parts[-1]


#: A legend in a row above the figure, to the right.
LEGEND_ABOVE = {"orientation": "h", "yanchor": "bottom", "y": 1.02, "xanchor": "right", "x": 1}


def ring_markers(
    x: object, y: object, name: str, *, size: float, color: str = NEUTRAL
) -> go.Scatter:
    """Rings around points, so that what stands out does so without colour alone."""
    return go.Scatter(
        x=x,
        y=y,
        mode="markers",
        name=name,
        marker={"symbol": "circle-open", "size": size, "color": color, "line": {"width": 2}},
        hoverinfo="skip",
    )


def apply_layout(figure: go.Figure, height: int) -> go.Figure:
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
    figure.update_xaxes(gridcolor=GRID, zeroline=False)
    figure.update_yaxes(gridcolor=GRID, zeroline=False)
    return figure


#: Plotly draws some HTML: of it, what breaks a line or is bold, and no tag with an attribute,
#: which may hold an address.
_FOREIGN_TAG = re.compile(r"<(?!/?(?:br|b|i|sub|sup|extra)>)", re.IGNORECASE)


def sanitize_figure(figure: go.Figure) -> go.Figure:
    """The figure with no link and no style in any of its texts, which names may have brought."""
    content = figure.to_plotly_json()
    sanitize = _sanitize(content)
    return figure if sanitize is content else type(figure)(sanitize)


def _sanitize(value: Any) -> Any:
    """A part of a figure without foreign tags; the very same where there are none."""
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
