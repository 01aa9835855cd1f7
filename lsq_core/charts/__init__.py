"""Plotly figures out of data frames. Knows neither Streamlit nor torch.

A bit width, a module type and a method each have one colour in every figure. Backgrounds are
clear and neutral lines are mid-grey, so that a figure reads on light and on dark paper.
"""

from lsq_core.charts.layers import Panel, over_layers
from lsq_core.charts.plans import FrontierLine, frontiers, plan_heatmap
from lsq_core.charts.runs import (
    BITS,
    MEASURED,
    NOMINAL,
    STORED,
    Size,
    perplexity_by_size,
    size_bars,
    view_limit,
)
from lsq_core.charts.style import (
    BIT_COLORS,
    CONFIG,
    METHOD_STYLES,
    MODULE_COLORS,
    NEUTRAL,
    MethodStyle,
    config_color,
    method_style,
    module_color,
    short_type,
)

__all__ = [
    "BITS",
    "BIT_COLORS",
    "CONFIG",
    "MEASURED",
    "METHOD_STYLES",
    "MODULE_COLORS",
    "NEUTRAL",
    "NOMINAL",
    "STORED",
    "FrontierLine",
    "MethodStyle",
    "Panel",
    "Size",
    "config_color",
    "frontiers",
    "method_style",
    "module_color",
    "over_layers",
    "perplexity_by_size",
    "plan_heatmap",
    "short_type",
    "size_bars",
    "view_limit",
]
