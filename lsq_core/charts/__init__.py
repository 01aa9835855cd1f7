"""Plotly figures from data frames; imports neither Streamlit nor torch.

Each bit width, module type and method has the same colour in all figures. Backgrounds are
transparent and neutral lines mid-grey, so that figures are readable in light and dark themes.
"""

from lsq_core.charts.compared import (
    gain_for_bits,
    gain_view,
    predicted_against_measured,
    predicted_view,
    win_tie_loss_bars,
)
from lsq_core.charts.detection import DetectionSteps, algorithm_steps
from lsq_core.charts.heatmap import layer_heatmap
from lsq_core.charts.layers import Panel, over_layers
from lsq_core.charts.overlay import (
    LineStyle,
    correlation_heatmap,
    line_style,
    overlay_lines,
    rank_scatter,
)
from lsq_core.charts.plans import FrontierLine, frontiers, plan_heatmap, plan_ring
from lsq_core.charts.refinement import refinement_steps
from lsq_core.charts.rows import interaction_heatmap, predicted_loss_scatter, ratio_lines
from lsq_core.charts.runs import (
    BITS,
    KL,
    MEASURED,
    NOMINAL,
    PERPLEXITY,
    STORED,
    TOP1,
    QualityMeasure,
    SizeMeasure,
    add_run_labels,
    perplexity_by_size,
    size_bars,
    size_view,
)
from lsq_core.charts.style import (
    BIT_COLORS,
    CONFIG,
    MODULE_COLORS,
    NEUTRAL,
    MethodStyle,
    config_color,
    method_style,
    module_color,
    short_type,
    style_key,
)
from lsq_core.charts.view import View, inlier_range
from lsq_core.charts.weights import (
    GridLines,
    Region,
    weight_bands,
    weight_histogram,
    weight_map,
    weight_surface,
)

__all__ = [
    "refinement_steps",
    "BITS",
    "BIT_COLORS",
    "CONFIG",
    "KL",
    "MEASURED",
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
    "QualityMeasure",
    "Region",
    "SizeMeasure",
    "View",
    "DetectionSteps",
    "algorithm_steps",
    "config_color",
    "correlation_heatmap",
    "frontiers",
    "gain_for_bits",
    "interaction_heatmap",
    "add_run_labels",
    "layer_heatmap",
    "line_style",
    "predicted_loss_scatter",
    "style_key",
    "method_style",
    "module_color",
    "over_layers",
    "overlay_lines",
    "perplexity_by_size",
    "plan_heatmap",
    "plan_ring",
    "predicted_against_measured",
    "predicted_view",
    "rank_scatter",
    "ratio_lines",
    "short_type",
    "size_bars",
    "size_view",
    "inlier_range",
    "gain_view",
    "weight_bands",
    "weight_histogram",
    "weight_map",
    "weight_surface",
    "win_tie_loss_bars",
]
