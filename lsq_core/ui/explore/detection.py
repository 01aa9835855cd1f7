"""Algorithm 1 made visible: scores, differences, the trimmed band, z-scores, what is flagged."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.stats import mstats

from lsq_core import charts
from lsq_core.bits import DETECTION_CONFIG
from lsq_core.charts import Steps
from lsq_core.planning.detection import THRESHOLD, TRIM, detect_outliers, shallowness
from lsq_core.planning.methods.boost import layer_series
from lsq_core.profiling.metrics import TITLES
from lsq_core.ui import words
from lsq_core.ui.explore.layers import keep_to, labels
from lsq_core.ui.explore.profile import Seen
from lsq_core.ui.safe import st

_METRICS = {
    "sensitivity": "Sensitivity by part",
    "sensitivity_module": "by module",
    "kurtosis": "Kurtosis",
}


def show(seen: Seen) -> None:
    """One module type's series and its steps; threshold and m are controls, all else follows."""
    offered = [metric for metric in _METRICS if metric in seen.problem.scores]
    if not offered:
        seen.say(
            "There is nothing for Algorithm 1 to read.",
            f"Neither kurtosis nor sensitivity at {DETECTION_CONFIG.name} is here.",
        )
        return
    keep_to("detect", offered)
    with seen.row:
        metric = st.segmented_control(
            "Metric",
            offered,
            format_func=_METRICS.get,
            required=True,
            key="detect",
            label_visibility="collapsed",
            persist_state="session",
        )
    left, right = st.columns([1.15, 3.2], gap="medium")
    with left:
        threshold, top_m = _controls()
    found = {
        kind: steps_of(layers, scores, metric != "kurtosis", top_m, threshold)
        for kind, (layers, scores) in layer_series(seen.problem, metric).items()
    }
    names = {kind: name for kind, name in labels(seen.found, metric).items() if kind in found}
    with left:
        kind = _module_type(names, found)
        _table(names, found)
    _say(seen, metric, names[kind], found[kind], found)
    with right:
        _chart(metric, kind, names[kind], found[kind])


def steps_of(
    layers: list[int], scores: np.ndarray, ratios: bool, top_m: int, threshold: float
) -> Steps:
    """Algorithm 1 on one series, and which of its differences the trimming leaves out."""
    found = detect_outliers(scores, ratios=ratios, top_m=top_m, threshold=threshold)
    trimmed = np.zeros(len(found.differences), dtype=bool)
    if len(trimmed):
        kept = mstats.trimr(found.differences, limits=(TRIM, TRIM))
        trimmed = np.ma.getmaskarray(kept)
    return Steps(
        layers=np.array(layers),
        values=scores,
        differences=found.differences,
        trimmed=trimmed,
        z=found.z,
        mean=found.mean,
        deviation=found.deviation,
        threshold=threshold,
        flagged=found.flagged,
        ratios=ratios,
    )


def _controls() -> tuple[float, int]:
    threshold = st.slider(
        "Threshold (z)",
        0.5,
        6.0,
        THRESHOLD,
        0.1,
        key="detect_threshold",
        help="A step is an outlier when its z-score is greater. Plans use 3.",
        persist_state="session",
    )
    top_m = st.number_input(
        "Top m",
        0,
        key="detect_m",
        help="Flagged layers kept of a module type, the strongest; 0 keeps all.",
        persist_state="session",
    )
    return threshold, top_m


def _module_type(names: dict[str, str], found: dict[str, Steps]) -> str:
    """The module type to look at; at first the one whose strongest step stands out most."""

    def strongest(kind: str) -> float:
        return max(found[kind].z, default=0.0)

    keep_to("detect_type", list(names), max(names, key=strongest))
    return st.selectbox(
        "Module type",
        list(names),
        format_func=names.get,
        key="detect_type",
        persist_state="session",
    )


def _table(names: dict[str, str], found: dict[str, Steps]) -> None:
    """What is flagged of every module type at this threshold and m."""
    rows = {
        "module": [name.replace("_proj", "") for name in names.values()],
        "flagged (z)": [_in_words(found[kind]) or "–" for kind in names],
    }
    st.dataframe(pd.DataFrame(rows), hide_index=True)


def _in_words(steps: Steps) -> str:
    """``1 (12.3), 14 (4.1)``: layers and z-scores, the strongest first."""
    return ", ".join(f"{steps.layers[i]} ({_digits(steps.z[i - 1])})" for i in steps.flagged)


def _digits(z: float) -> str:
    """Three digits or so: ``4.13``, ``533``, ``15,400``."""
    return f"{float(f'{z:.3g}'):,.0f}" if z >= 100 else f"{z:.3g}"


def _say(seen: Seen, metric: str, name: str, steps: Steps, found: dict[str, Steps]) -> None:
    layers = sorted(int(steps.layers[i]) for i in steps.flagged)
    every = sorted({int(s.layers[i]) for s in found.values() for i in s.flagged})
    at = f"at a threshold of {steps.threshold:g}"
    if layers:
        are = "is" if len(layers) == 1 else "are"
        text = f"{words.a_layer(layers)} {are} flagged for {name} {at}."
    else:
        text = f"No layer is flagged for {name} {at}."
    whole = f"Over all module types: {words.a_layer(every).lower()}." if every else ""
    seen.say(text, " ".join(filter(None, [whole, _how(steps), shallowness(len(steps.layers))])))


def _how(steps: Steps) -> str:
    """What the algorithm did, with its figures."""
    if not len(steps.z):
        return "Too few layers, or one of them without a score, so there is nothing to compare."
    cut = int(steps.trimmed.sum()) // 2
    verb = "divided by" if steps.ratios else "less"
    trimmed = f"{cut} cut at each end" if cut else "too few for any to be cut"
    return (
        f"Each score is {verb} the one of the layer before; of these {len(steps.z)} steps "
        f"({trimmed}) the mean is {steps.mean:.4g} and the deviation {steps.deviation:.4g}."
    )


def _chart(metric: str, kind: str, name: str, steps: Steps) -> None:
    if not len(steps.z):
        return
    title = TITLES[metric]
    at = f" at {DETECTION_CONFIG.name}" if metric != "kurtosis" else ""
    st.plotly_chart(
        charts.algorithm_steps(
            steps,
            f"{title.title}{at}, {name}",
            title.axis,
            charts.module_color(kind),
            log=metric != "kurtosis",
        ),
        config=charts.CONFIG,
        key="algorithm",
        alt=f"{title.title} of {name} over the layers, the steps between neighbours with their "
        f"trimmed band, and their z-scores; flagged: {_in_words(steps) or 'none'}.",
    )
