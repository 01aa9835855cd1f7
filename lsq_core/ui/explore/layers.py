"""The Explore page's first view: the hard layers, and every metric over the layers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd

from lsq_core import charts
from lsq_core.bits import DETECTION_CONFIG, LADDER, QuantConfig
from lsq_core.model.info import ModelInfo
from lsq_core.planning.detection import shallow_model_note
from lsq_core.planning.methods.boost import flagged_layers
from lsq_core.planning.problem import Problem
from lsq_core.planning.request import SENSITIVITIES
from lsq_core.profiling.metrics import (
    METRICS,
    default_metrics,
    detection_metrics,
    in_display_order,
)
from lsq_core.profiling.profile import Profile
from lsq_core.quantization.registry import quantizer_spec
from lsq_core.ui import cached, words
from lsq_core.ui.explore.profile import ExploreView
from lsq_core.ui.page import next_step
from lsq_core.ui.safe import st

_DETECTION_RULE = (
    "Algorithm 1 flags a layer whose change from the previous layer has a z-score above 3."
)
#: How the first line names a metric, the one it speaks of first.
_METRIC_PHRASES = {"sensitivity": "activation sensitivity", "kurtosis": "kurtosis"}


def show(view: ExploreView) -> None:
    """The hard layers, the charts, and what else there is to know of this profile."""
    problem = view.problem
    render_hard_layers(view, problem)
    show_charts(view, problem)
    left, right = st.columns([3, 2], gap="large")
    with left:
        show_flagged(problem)
    with right:
        if view.published:
            show_missing(view.info, view.profile, problem)
        else:
            show_metadata_cost(view)


def render_hard_layers(view: ExploreView, problem: Problem) -> None:
    """The first line: the layers that stand out, by sensitivity where there is any."""
    flagged = {
        metric: flagged_set(problem, metric)
        for metric in _METRIC_PHRASES
        if metric in problem.scores
    }
    if not flagged:
        view.render_headline(
            "Neither sensitivity nor kurtosis was published at b4g64.", _DETECTION_RULE
        )
        return
    first, *others = flagged
    layers = flagged[first]
    rest = [
        f"By {_METRIC_PHRASES[metric]}: "
        + (words.name_layers(flagged[metric]).lower() if flagged[metric] else "none")
        + "."
        for metric in others
    ]
    if view.published:
        rest += [
            f"No {_METRIC_PHRASES[metric]} was published."
            for metric in _METRIC_PHRASES
            if metric not in flagged
        ]
    caption = " ".join([*rest, _DETECTION_RULE])
    if layers:
        are = "is hard to quantize" if len(layers) == 1 else "are hard to quantize"
        view.render_headline(
            f"{words.name_layers(layers)} {are}.", f"Flagged by {_METRIC_PHRASES[first]}. {caption}"
        )
    else:
        view.render_headline(f"No layer stands out by {_METRIC_PHRASES[first]}.", caption)
    if shallow_model_note(view.info.layers):
        view.header.warning(shallow_model_note(view.info.layers), icon=":material/layers:")


def flagged_set(problem: Problem, metric: str) -> list[int]:
    """Layers that are flagged for any module type, in order."""
    return sorted(set().union(*flagged_layers(problem, metric, 0).values()))


def show_charts(view: ExploreView, problem: Problem) -> None:
    """Draw the chosen sensitivity and the other default metrics of the profile over the layers."""
    profile = view.profile
    sensitivity_metrics = [metric for metric in SENSITIVITIES if metric in profile.metrics]
    configs = measured_configs(profile)
    sensitivity_metric = config_name = None
    with view.row:
        if sensitivity_metrics:
            ensure_valid_choice("layers_view", sensitivity_metrics)
            sensitivity_metric = st.segmented_control(
                "Sensitivity",
                sensitivity_metrics,
                format_func=words.metric_label,
                required=True,
                key="layers_view",
                label_visibility="collapsed",
                persist_state="session",
            )
        if configs:
            ensure_valid_choice("shown", configs, DETECTION_CONFIG.name)
            config_name = st.selectbox(
                "Configuration shown",
                configs,
                format_func=lambda name: f"at {name}",
                key="shown",
                label_visibility="collapsed",
                persist_state="session",
                width=130,
            )
    config = QuantConfig.parse(config_name) if config_name else None
    wanted = {
        metric: config if METRICS[metric].by_config else None
        for metric in in_display_order(default_metrics())
        if metric == sensitivity_metric or metric not in SENSITIVITIES
    }
    panels = [
        build_panel(profile, problem, metric, at)
        for metric, at in wanted.items()
        if has_scores(profile, metric, at)
    ]
    if panels:
        names = words.listed([p.title for p in panels])
        st.plotly_chart(
            charts.over_layers(panels, 550),
            config=charts.CONFIG,
            key="layers",
            alt=f"{names} over {view.info.layers} layers; flagged points are ringed.",
        )
    absent_metrics = [
        m for m in wanted if m in profile.metrics and not has_scores(profile, m, wanted[m])
    ]
    st.caption(
        " ".join(
            [_describe_absent(absent_metrics, config_name), describe_origin(profile), _RINGS_NOTE]
        ).strip()
    )


_RINGS_NOTE = (
    "Rings mark outlier layers at b4g64, whichever configuration is shown; experts of a layer are "
    "averaged."
)


def ensure_valid_choice(key: str, options: list[str], default: str = "") -> None:
    """Bring a kept choice back to what this profile has."""
    if st.session_state.get(key) not in options:
        st.session_state[key] = default if default in options else options[0]


def measured_configs(profile: Profile) -> list[str]:
    """The configurations at which a profile has something, in the ladder's order."""
    there = set(profile.values["config"])
    return [config.name for config in LADDER if config.name in there]


def has_scores(profile: Profile, metric: str, config: QuantConfig | None) -> bool:
    """Whether a profile holds a metric at a configuration."""
    rows = profile.values
    at = config.name if config else ""
    return bool(((rows["metric"] == metric) & (rows["config"] == at)).any())


def _describe_absent(metrics: list[str], config_name: str | None) -> str:
    names = " and ".join(METRICS[metric].title.lower() for metric in metrics)
    return f"There is no {names} at {config_name}." if names else ""


def describe_origin(profile: Profile) -> str:
    """A sentence about how a profile was measured."""
    facts = profile.provenance
    if "files" in facts:
        files = words.listed([path.rpartition("/")[2] for path in facts["files"]])
        calibration_note = (
            "its calibration texts and tokens were not published"
            if "sensitivity" in profile.metrics
            else "it does not depend on calibration"
        )
        return f"Published by the authors of SensiBoost and MXQ ({files}); {calibration_note}."
    return (
        f"Profile {profile.id}: {facts['tokens']:,} tokens of {facts['corpus_source']}; "
        f"{facts['device']}, {facts['dtype']}, {words.seconds(_measuring_seconds(facts))}."
        f"{_describe_configs(profile.settings.quantizer)}"
    )


def _describe_configs(quantizer: str) -> str:
    """That a quantizer has some stops alone, where it has."""
    spec = quantizer_spec(quantizer)
    if spec.configs == LADDER:
        return ""
    return f" {spec.title} supports only {words.listed([c.name for c in spec.configs])}."


def _measuring_seconds(facts: dict) -> float:
    """How long measuring took, its parts together; metrics of one part share its time."""
    return sum({facts["seconds"], *(part["seconds"] for part in facts.get("added", {}).values())})


def build_panel(
    profile: Profile, problem: Problem, metric: str, config: QuantConfig | None
) -> charts.Panel:
    """One metric over the layers, the points that Algorithm 1 flags marked."""
    rows = profile.values
    rows = rows[(rows["metric"] == metric) & (rows["config"] == (config.name if config else ""))]
    flags = flagged_layers(problem, metric, 0) if metric in problem.scores else {}
    order = list(dict.fromkeys(m.type for m in profile.matrices))
    rows = rows.sort_values("type", key=lambda kinds: kinds.map(order.index), kind="stable")
    frame = rows.groupby(["type", "layer"], sort=False)["value"].mean().reset_index()
    frame["label"] = frame["type"].map(legend_labels(profile, metric))
    frame = frame.dropna(subset=["label"])
    frame["z"] = [
        flags.get(kind, {}).get(layer, np.nan)
        for kind, layer in zip(frame["type"], frame["layer"], strict=True)
    ]
    spec = METRICS[metric]
    at = f" at {config.name}" if config else ""
    return charts.Panel(frame, f"{spec.title}{at}", spec.axis, spec.log_scale)


def legend_labels(profile: Profile, metric: str) -> dict[str, str]:
    """Module type to its name in the legend; of types that share a part only the first is drawn."""
    kinds = list(dict.fromkeys(m.type for m in profile.matrices))
    if not METRICS[metric].shared_by_part:
        return {kind: charts.short_type(kind) for kind in kinds}
    rows = profile.values[profile.values["metric"] == metric]
    parts = rows.drop_duplicates("type").set_index("type")["part"]
    members: dict[str, list[str]] = {}
    for kind in kinds:
        if kind in parts:
            members.setdefault(parts[kind], []).append(kind)
    return {m[0]: ", ".join(charts.short_type(kind) for kind in m) for m in members.values()}


def show_flagged(problem: Problem) -> None:
    """Which layers each metric flags, by module type, with their z-scores."""
    st.subheader("Outlier layers (z-score)", anchor=False)
    flagged = {
        METRICS[metric].short: flagged_layers(problem, metric, 0)
        for metric in detection_metrics()
        if metric in problem.scores
    }
    kinds = list(dict.fromkeys(m.type for m in problem.matrices))
    table = {"module": [charts.short_type(kind) for kind in kinds]}
    for name, flags in flagged.items():
        table[name] = [
            ", ".join(f"{layer} ({z:.3g})" for layer, z in flags[kind].items()) or "–"
            for kind in kinds
        ]
    st.dataframe(pd.DataFrame(table), hide_index=True)
    next_step("pages/2_Plan.py", "Plan the bit allocation")


def show_missing(info: ModelInfo, profile: Profile, problem: Problem) -> None:
    """What the published files don't give, and the methods that can't plan for want of it."""
    st.subheader("Not published", anchor=False)
    missing = {METRICS[metric].title: _describe_missing(profile, metric) for metric in METRICS}
    methods = cached.unavailable_methods(info, problem)
    if methods:
        missing["Plans that need them"] = "none by " + words.listed(
            [charts.method_style(m).title for m in methods], 99
        )
    missing = {name: text for name, text in missing.items() if text}
    st.dataframe(
        {"metric": list(missing), "published": list(missing.values())},
        hide_index=True,
        column_config={"published": st.column_config.TextColumn(width="large")},
    )


def _describe_missing(profile: Profile, metric: str) -> str:
    """What of a metric a profile hasn't, or '' when it has all."""
    if metric not in profile.metrics:
        return "none for this corpus and quantizer"
    absent_metrics = [c.name for c in LADDER if not has_scores(profile, metric, c)]
    per_stop = not has_scores(profile, metric, None)
    return (
        f"none at {words.listed(absent_metrics, len(absent_metrics))}"
        if per_stop and absent_metrics
        else ""
    )


def show_metadata_cost(view: ExploreView) -> None:
    """What storing scale and zero in 8 bits adds to the weight error, stop by stop."""
    profile = view.profile
    if not quantizer_spec(profile.settings.quantizer).supports_metadata:
        return
    st.subheader("Cost of 8-bit metadata", anchor=False)
    other = "fp16" if profile.settings.metadata == "8bit" else "8bit"
    wanted = replace(profile.settings, metadata=other)
    other_profile = cached.profile(view.ctx.store, view.info, wanted, view.ctx.device)
    if other_profile is None:
        st.write(
            f"Profile again with **{other}** metadata (above) to see here what "
            "8-bit scales and zero points add to the weight error at each configuration."
        )
        return
    by_format = {p.settings.metadata: p.by_config("weight_error") for p in (profile, other_profile)}
    total = {name: np.sqrt(np.nansum(errors**2, axis=0)) for name, errors in by_format.items()}
    st.dataframe(
        pd.DataFrame(
            {
                "configuration": [f"{c.stop_name} ({c.name})" for c in LADDER],
                "fp16": total["fp16"],
                "8-bit": total["8bit"],
                "added %": 100 * (total["8bit"] / total["fp16"] - 1),
                "bits saved": [c.bits_with_fp16_metadata - c.nominal_bits for c in LADDER],
            }
        ),
        hide_index=True,
        column_config={
            name: st.column_config.NumberColumn(format=form)
            for name, form in (
                ("fp16", "%.4g"),
                ("8-bit", "%.4g"),
                ("added %", "%.3f"),
                ("bits saved", "%.3f"),
            )
        },
    )
    st.caption("Weight error is the Frobenius norm over all quantized matrices.")
