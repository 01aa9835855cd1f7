"""Plotly figures out of data frames. Knows neither Streamlit nor torch.

A bit width, a module type and a method each have one colour in every figure. Backgrounds are
clear and neutral lines are mid-grey, so that a figure reads on light and on dark paper.
"""

from lsq_core.charts.compared import (
    gain_for_bits,
    predicted_against_measured,
    win_tie_loss_bars,
)
from lsq_core.charts.detection import Steps, algorithm_steps
from lsq_core.charts.layers import Panel, over_layers
from lsq_core.charts.overlay import (
    LineStyle,
    correlation_heatmap,
    line_style,
    overlaid,
    rank_scatter,
)
from lsq_core.charts.plans import FrontierLine, frontiers, plan_heatmap, plan_ring
from lsq_core.charts.rows import interaction_heatmap, loss_as_predicted, ratio_lines
from lsq_core.charts.runs import (
    BITS,
    KL,
    MEASURED,
    NOMINAL,
    PERPLEXITY,
    STORED,
    TOP1,
    Quality,
    Size,
    labelled,
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
    drawn_as,
    method_style,
    module_color,
    short_type,
)
from lsq_core.charts.weights import (
    GridLines,
    Region,
    weight_bands,
    weight_histogram,
    weight_map,
    weight_surface,
)

__all__ = [
    "BITS",
    "BIT_COLORS",
    "CONFIG",
    "KL",
    "MEASURED",
    "METHOD_STYLES",
    "MODULE_COLORS",
    "NEUTRAL",
    "NOMINAL",
    "PERPLEXITY",
    "STORED",
    "TOP1",
    "FrontierLine",
    "GridLines",
    "LineStyle",
    "MethodStyle",
    "Panel",
    "Quality",
    "Region",
    "Size",
    "Steps",
    "algorithm_steps",
    "config_color",
    "correlation_heatmap",
    "frontiers",
    "gain_for_bits",
    "interaction_heatmap",
    "labelled",
    "line_style",
    "loss_as_predicted",
    "drawn_as",
    "method_style",
    "module_color",
    "over_layers",
    "overlaid",
    "perplexity_by_size",
    "plan_heatmap",
    "plan_ring",
    "predicted_against_measured",
    "rank_scatter",
    "ratio_lines",
    "short_type",
    "size_bars",
    "view_limit",
    "weight_bands",
    "weight_histogram",
    "weight_map",
    "weight_surface",
    "win_tie_loss_bars",
]
