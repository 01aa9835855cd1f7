"""Algorithm 1 step by step: scores, differences, the trimmed band, z-scores, flagged layers."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.stats import mstats

from lsq_core import charts
from lsq_core.bits import DETECTION_CONFIG
from lsq_core.charts import DetectionSteps
from lsq_core.planning.detection import (
    THRESHOLD,
    TRIM_FRACTION,
    detect_outliers,
    shallow_model_note,
)
from lsq_core.planning.methods.boost import compares_by_ratio, layer_series
from lsq_core.profiling.metrics import METRICS, detection_metrics
from lsq_core.ui import words
from lsq_core.ui.explore.layers import (
    describe_falls,
    describe_unflaggable,
    legend_labels,
)
from lsq_core.ui.explore.profile import ExploreView
from lsq_core.ui.safe import st
from lsq_core.ui.state import ensure_valid_choice


def show(view: ExploreView) -> None:
    """Show the algorithm's steps for one module type, with controls for the threshold and m."""
    available = [metric for metric in detection_metrics() if metric in view.problem.scores]
    if not available:
        view.render_headline(
            "No metric for Algorithm 1.",
            f"This profile has neither kurtosis nor sensitivity at {DETECTION_CONFIG.name}.",
        )
        return
    ensure_valid_choice("detect", available)
    with view.row:
        metric = st.segmented_control(
            "Metric",
            available,
            format_func=words.metric_label,
            required=True,
            key="detect",
            label_visibility="collapsed",
            persist_state="session",
        )
    left, right = st.columns([1.15, 3.2], gap="medium")
    with left:
        threshold, top_m = _render_controls()
    found = {
        kind: run_detection(layers, scores, compares_by_ratio(metric), top_m, threshold)
        for kind, (layers, scores) in layer_series(view.problem, metric).items()
    }
    names = {
        kind: name for kind, name in legend_labels(view.profile, metric).items() if kind in found
    }
    with left:
        kind = _select_module_type(names, found)
        _show_table(names, found)
    _render_headline(view, metric, names[kind], found[kind], found)
    with right:
        _show_chart(metric, kind, names[kind], found[kind])


def run_detection(
    layers: list[int], scores: np.ndarray, ratios: bool, top_m: int, threshold: float
) -> DetectionSteps:
    """Run Algorithm 1 on one series, and record which differences are trimmed."""
    detected = detect_outliers(scores, ratios=ratios, top_m=top_m, threshold=threshold)
    trimmed = np.zeros(len(detected.differences), dtype=bool)
    if len(trimmed):
        kept = mstats.trimr(detected.differences, limits=(TRIM_FRACTION, TRIM_FRACTION))
        trimmed = np.ma.getmaskarray(kept)
    return DetectionSteps(
        layers=np.array(layers),
        values=scores,
        differences=detected.differences,
        trimmed=trimmed,
        z=detected.z,
        mean=detected.mean,
        deviation=detected.deviation,
        threshold=threshold,
        flagged=detected.flagged,
        ratios=ratios,
    )


def _render_controls() -> tuple[float, int]:
    threshold = st.slider(
        "Threshold (z)",
        0.5,
        6.0,
        THRESHOLD,
        0.1,
        key="detect_threshold",
        help="A change is an outlier if its z-score is above this. Plans use 3.",
        persist_state="session",
    )
    top_m = st.number_input(
        "Top m",
        0,
        key="detect_m",
        help="Strongest outlier layers kept per module type; 0 keeps all.",
        persist_state="session",
    )
    return threshold, top_m


def _select_module_type(names: dict[str, str], found: dict[str, DetectionSteps]) -> str:
    """Select the module type to show; the default has the largest z-score."""

    def strongest(kind: str) -> float:
        return max(found[kind].z, default=0.0)

    ensure_valid_choice("detect_type", list(names), max(names, key=strongest))
    return st.selectbox(
        "Module type",
        list(names),
        format_func=names.get,
        key="detect_type",
        persist_state="session",
    )


def _show_table(names: dict[str, str], found: dict[str, DetectionSteps]) -> None:
    """Show the flagged layers of every module type."""
    rows = {
        "module": [name.replace("_proj", "") for name in names.values()],
        "flagged (z)": [_describe_flagged(found[kind]) or "–" for kind in names],
    }
    st.dataframe(pd.DataFrame(rows), hide_index=True)


def _describe_flagged(steps: DetectionSteps) -> str:
    """Format flagged layers and z-scores, strongest first: ``1 (12.3), 15 (4.1, fall)``."""
    return ", ".join(
        f"{steps.layers[i]} ({_digits(steps.z[i - 1])}{', fall' if _falls(steps, i) else ''})"
        for i in steps.flagged
    )


def _falls(steps: DetectionSteps, index: int) -> bool:
    """Return whether the score at an index is no higher than the one before."""
    return bool(steps.values[index] <= steps.values[index - 1])


def _digits(z: float) -> str:
    """Format to three significant digits: ``4.13``, ``533``, ``15,400``."""
    return f"{float(f'{z:.3g}'):,.0f}" if z >= 100 else f"{z:.3g}"


def _render_headline(
    view: ExploreView,
    metric: str,
    name: str,
    steps: DetectionSteps,
    found: dict[str, DetectionSteps],
) -> None:
    layers = sorted(int(steps.layers[i]) for i in steps.flagged)
    all_flagged = sorted({int(s.layers[i]) for s in found.values() for i in s.flagged})
    at = f"at a threshold of {steps.threshold:g}"
    if layers:
        are = "is" if len(layers) == 1 else "are"
        text = f"{words.name_layers(layers)} {are} flagged for {name} {at}."
    else:
        text = f"No layer is flagged for {name} {at}."
    summary = (
        f"Over all module types: {words.name_layers(all_flagged).lower()}." if all_flagged else ""
    )
    falls = sorted(int(steps.layers[i]) for i in steps.flagged if _falls(steps, i))
    first_on_top = len(steps.z) and steps.values.argmax() == 0
    notes = [
        summary,
        describe_falls(falls),
        describe_unflaggable(int(steps.layers[0])) if first_on_top else "",
        _describe_steps(steps),
        shallow_model_note(len(steps.layers)),
    ]
    view.render_headline(text, " ".join(filter(None, notes)))


def _describe_steps(steps: DetectionSteps) -> str:
    """Describe the algorithm's steps with their figures."""
    if not len(steps.z):
        return "Too few layers, or a layer without a score, so nothing can be compared."
    cut = int(steps.trimmed.sum()) // 2
    verb = "divided by" if steps.ratios else "minus"
    trimmed = f"{cut} trimmed at each end" if cut else "too few to trim"
    return (
        f"Each score is {verb} that of the previous layer; these {len(steps.z)} changes "
        f"({trimmed}) have mean {steps.mean:.4g} and standard deviation {steps.deviation:.4g}."
    )


def _show_chart(metric: str, kind: str, name: str, steps: DetectionSteps) -> None:
    if not len(steps.z):
        return
    spec = METRICS[metric]
    at = f" at {DETECTION_CONFIG.name}" if spec.by_config else ""
    st.plotly_chart(
        charts.algorithm_steps(
            steps,
            f"{spec.title}{at}, {name}",
            spec.axis,
            charts.module_color(kind),
            log=spec.log_scale,
        ),
        config=charts.CONFIG,
        key="algorithm",
        alt=f"{spec.title} of {name} over the layers, the steps between neighbours with their "
        f"trimmed band, and their z-scores; flagged: {_describe_flagged(steps) or 'none'}.",
    )
