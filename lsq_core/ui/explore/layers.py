"""The Explore page's first view: a heatmap by layer and module, and metrics over the layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from lsq_core import charts
from lsq_core.bits import DETECTION_CONFIG, QuantConfig, get_ladder
from lsq_core.model.info import ModelInfo
from lsq_core.planning.detection import Detection, shallow_model_note
from lsq_core.planning.methods.boost import detect_by_type
from lsq_core.planning.problem import Problem
from lsq_core.planning.ranking import (
    TOP_LAYERS,
    FlaggedLayers,
    flagged_by_direction,
    flags_by_module,
    rank_layers,
)
from lsq_core.planning.request import SENSITIVITIES
from lsq_core.profiling.metrics import (
    METRICS,
    default_metrics,
    detection_metrics,
    in_display_order,
)
from lsq_core.profiling.profile import Profile
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.quantization.registry import quantizer_spec
from lsq_core.store.shipped import SHIPPED
from lsq_core.ui import cached, cached_plans, words
from lsq_core.ui.explore.profile import ExploreView
from lsq_core.ui.page import next_step
from lsq_core.ui.safe import st
from lsq_core.ui.state import ensure_valid_choice

_DETECTION_RULE = "Algorithm 1 flags a layer whose change from the layer before has z > 3."
#: How the headline names the top-ranked layers; for other metrics it is "Highest".
_TOP_OF = dict.fromkeys(SENSITIVITIES, "Most sensitive")


@dataclass(frozen=True)
class _Chosen:
    """The chosen metric, and the configuration at which scores are shown."""

    metric: str
    config: QuantConfig | None

    def config_of(self, metric: str) -> QuantConfig | None:
        """Return the configuration at which a metric is shown; None if it depends on none."""
        return self.config if METRICS[metric].by_config else None


def show(view: ExploreView) -> None:
    """Show sensitive and flagged layers, charts, and missing metrics or the cost of metadata."""
    problem = view.problem
    chosen = _choose(view)
    if chosen is None:
        view.render_headline(
            "Neither sensitivity nor kurtosis was published at b4g64.", _DETECTION_RULE
        )
    else:
        panels = build_panels(view.profile, problem, chosen)
        render_headline(view, problem, chosen, panels.get(chosen.metric))
        show_charts(view, chosen, panels)
    left, right = st.columns([3, 2], gap="large")
    with left:
        show_flagged(problem)
    with right:
        if view.published:
            show_missing(view.info, view.profile, problem)
        else:
            show_metadata_cost(view)


def _choose(view: ExploreView) -> _Chosen | None:
    """Select the heatmap's metric and configuration from those in the profile."""
    profile = view.profile
    metrics = [metric for metric in in_display_order(METRICS) if metric in profile.metrics]
    configs = measured_configs(profile)
    metrics = [
        metric
        for metric in metrics
        if any(has_scores(profile, metric, QuantConfig.parse(name)) for name in configs)
        or has_scores(profile, metric, None)
    ]
    if not metrics:
        return None
    follow_default("layers_view", metrics)
    with view.row:
        metric = st.segmented_control(
            "Metric",
            metrics,
            format_func=words.metric_label,
            required=True,
            key="layers_view",
            label_visibility="collapsed",
            persist_state="session",
        )
        if not configs:
            return _Chosen(metric, None)
        ensure_valid_choice("shown", configs, DETECTION_CONFIG.name)
        name = st.selectbox(
            "Configuration shown",
            configs,
            format_func=lambda name: f"at {name}",
            key="shown",
            label_visibility="collapsed",
            persist_state="session",
            width=130,
        )
    return _Chosen(metric, QuantConfig.parse(name))


# --- the first line -------------------------------------------------------------------------


def render_headline(
    view: ExploreView, problem: Problem, chosen: _Chosen, panel: charts.Panel | None
) -> None:
    """Render the headline: the top-ranked layers and, separately, those that Algorithm 1 flags."""
    metric = chosen.metric
    top = [] if panel is None else rank_layers(panel.frame)["layer"].tolist()[:TOP_LAYERS]
    label = METRICS[metric].label
    if top:
        name = _TOP_OF.get(metric, f"Highest {label}")
        text = f"{name}: {words.name_layers(top).lower()}."
    else:
        config = chosen.config_of(metric)
        text = f"No {label} at {config.name}." if config else f"No {label} in this profile."
    caption = []
    if panel is not None:
        title = f"{panel.title[0].lower()}{panel.title[1:]}"
        caption.append(f"Ranked by {title}, the largest of a layer's modules.")
    if metric in problem.scores and METRICS[metric].detects_outliers:
        found = detect_by_type(problem, metric, 0)
        text += f" {_describe_jumps(flagged_by_direction(found))}"
        caption += _describe_rule(found, top)
    elif METRICS[metric].detects_outliers:
        caption.append(f"Algorithm 1 needs {label} at {DETECTION_CONFIG.name}.")
    else:
        caption.append("Algorithm 1 applies to sensitivity and kurtosis only.")
    view.render_headline(text, " ".join(caption))
    if shallow_model_note(view.info.layers):
        view.header.warning(shallow_model_note(view.info.layers), icon=":material/layers:")


def _describe_jumps(flagged: FlaggedLayers) -> str:
    if flagged.jumps:
        jump = "a jump" if len(flagged.jumps) == 1 else "jumps"
        return f"Algorithm 1 flags {jump} at {words.name_layers(flagged.jumps).lower()}."
    if flagged.falls:
        return "Algorithm 1 flags no jump."
    return "Algorithm 1 flags no layer."


def _describe_rule(found: dict[str, tuple[list[int], Detection]], top: list[int]) -> list[str]:
    """Return notes: Algorithm 1's rule, layers flagged for a fall, top layers it cannot flag."""
    firsts = {layers[0] for layers, _ in found.values()}
    unflaggable = sorted(firsts.intersection(top))
    notes = [
        _DETECTION_RULE,
        describe_falls(flagged_by_direction(found).falls),
        *map(describe_unflaggable, unflaggable),
    ]
    return [note for note in notes if note]


def describe_falls(layers: Sequence[int]) -> str:
    """Return a note on layers flagged only for a falling score; '' for none."""
    if not layers:
        return ""
    are = "is" if len(layers) == 1 else "are"
    return (
        f"{words.name_layers(layers)} {are} flagged only because the score drops from the "
        "previous layer."
    )


def describe_unflaggable(layer: int) -> str:
    """Return a note on why the first layer is never flagged."""
    return f"Layer {layer} has no layer before it, so Algorithm 1 cannot flag it."


# --- charts ---------------------------------------------------------------------------------


def build_panels(profile: Profile, problem: Problem, chosen: _Chosen) -> dict[str, charts.Panel]:
    """Return panels of the chosen metric and the profile's default metrics, in display order.

    Only one sensitivity is included: the chosen one, else the first.
    """
    usual = [m for m in in_display_order(default_metrics()) if m in profile.metrics]
    if chosen.metric not in usual:
        usual = [chosen.metric, *usual]
    sensitivities = [m for m in usual if m in SENSITIVITIES]
    kept = chosen.metric if chosen.metric in sensitivities else next(iter(sensitivities), None)
    return {
        metric: build_panel(profile, problem, metric, chosen.config_of(metric))
        for metric in usual
        if (metric == kept or metric not in sensitivities)
        and has_scores(profile, metric, chosen.config_of(metric))
    }


def show_charts(view: ExploreView, chosen: _Chosen, panels: dict[str, charts.Panel]) -> None:
    """Show the chosen metric as a heatmap, and below it all panels as lines over the layers."""
    profile, panel = view.profile, panels.get(chosen.metric)
    if panel is not None:
        st.plotly_chart(
            charts.layer_heatmap(panel),
            config=charts.CONFIG,
            key="heatmap",
            alt=f"{panel.title} by layer and module; flagged cells are marked.",
        )
    if panels:
        names = words.listed([p.title for p in panels.values()])
        st.plotly_chart(
            charts.over_layers(list(panels.values())),
            config=charts.CONFIG,
            key="layers",
            alt=f"{names} over {view.info.layers} layers; flagged points are ringed.",
        )
    absent_metrics = [
        m
        for m in in_display_order(default_metrics())
        if m in profile.metrics
        and (m == chosen.metric or m not in SENSITIVITIES)
        and m not in panels
    ]
    absent = _describe_absent(absent_metrics, chosen.config.name if chosen.config else "")
    st.caption(" ".join(filter(None, [absent, describe_origin(profile), _MARKS_NOTE])))


_MARKS_NOTE = (
    "Triangles (up: jump, down: fall) and rings mark what Algorithm 1 flags, at b4g64 whichever "
    "configuration is shown. "
    "Experts of a layer are averaged."
)


def follow_default(key: str, options: list[str]) -> None:
    """Keep the user's choice; a choice left at its default follows the first option.

    The first option can change while a profile is being measured, as metrics become available.
    """
    default_key = f"{key}_default"
    if st.session_state.get(key) == st.session_state.get(default_key):
        st.session_state[key] = options[0]
    ensure_valid_choice(key, options)
    st.session_state[default_key] = options[0]


def measured_configs(profile: Profile) -> list[str]:
    """Return the configurations at which a profile has scores, in the ladder's order."""
    there = set(profile.values["config"])
    return [config.name for config in profile.ladder if config.name in there]


def has_scores(profile: Profile, metric: str, config: QuantConfig | None) -> bool:
    """Return whether a profile has a metric at a configuration."""
    rows = profile.values
    at = config.name if config else ""
    return bool(((rows["metric"] == metric) & (rows["config"] == at)).any())


def _describe_absent(metrics: list[str], config_name: str | None) -> str:
    names = " and ".join(METRICS[metric].title.lower() for metric in metrics)
    return f"There is no {names} at {config_name}." if names else ""


def describe_origin(profile: Profile) -> str:
    """Describe how a profile was measured."""
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
        f"{' It was shipped with LSQ Explorer.' * (facts.get('origin') == SHIPPED)}"
        f"{_describe_configs(profile.settings)}"
    )


def _describe_configs(settings: ProfileSettings) -> str:
    """Return a note if the quantizer supports only some of the ladder's configurations, or ''."""
    if settings.configs == get_ladder(settings.ladder):
        return ""
    title = quantizer_spec(settings.quantizer).title
    return f" {title} supports only {words.listed([c.name for c in settings.configs])}."


def _measuring_seconds(facts: dict) -> float:
    """Return the total measuring time; metrics measured together share their time."""
    return sum({facts["seconds"], *(part["seconds"] for part in facts.get("added", {}).values())})


def build_panel(
    profile: Profile, problem: Problem, metric: str, config: QuantConfig | None
) -> charts.Panel:
    """Return the panel of one metric over the layers, with the points flagged by Algorithm 1."""
    rows = profile.values
    rows = rows[(rows["metric"] == metric) & (rows["config"] == (config.name if config else ""))]
    flags = {}
    if metric in problem.scores and METRICS[metric].detects_outliers:
        flags = flags_by_module(detect_by_type(problem, metric, 0))
    order = list(dict.fromkeys(m.type for m in profile.matrices))
    rows = rows.sort_values("type", key=lambda kinds: kinds.map(order.index), kind="stable")
    frame = rows.groupby(["type", "layer"], sort=False)["value"].mean().reset_index()
    frame["label"] = frame["type"].map(legend_labels(profile, metric))
    frame = frame.dropna(subset=["label"])
    cells = list(zip(frame["type"], frame["layer"], strict=True))
    frame["z"] = [flags.get(cell, (np.nan, False))[0] for cell in cells]
    frame["rises"] = [flags.get(cell, (np.nan, False))[1] for cell in cells]
    spec = METRICS[metric]
    at = f" at {config.name}" if config else ""
    return charts.Panel(frame, f"{spec.title}{at}", spec.axis, spec.log_scale)


def legend_labels(profile: Profile, metric: str) -> dict[str, str]:
    """Map module types to legend names; of types that share a part only the first is drawn."""
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
    """Show which layers Algorithm 1 flags, with z-scores, by metric and module type."""
    st.subheader("Flagged by Algorithm 1 (z)", anchor=False)
    kinds = list(dict.fromkeys(m.type for m in problem.matrices))
    table = {"module": [charts.short_type(kind) for kind in kinds]}
    for metric in detection_metrics():
        if metric in problem.scores:
            flags = flags_by_module(detect_by_type(problem, metric, 0))
            table[METRICS[metric].short] = [_describe_flags(flags, kind) for kind in kinds]
    st.dataframe(pd.DataFrame(table), hide_index=True)
    next_step("pages/2_Plan.py", "Plan the bit allocation")


def _describe_flags(flags: dict[tuple[str, int], tuple[float, bool]], kind: str) -> str:
    """Format a module type's flagged layers and z-scores, as in ``14 (7.6), 15 (7.8, fall)``."""
    return (
        ", ".join(
            f"{layer} ({words.rounded(z)}{'' if rises else ', fall'})"
            for (of_kind, layer), (z, rises) in flags.items()
            if of_kind == kind
        )
        or "–"
    )


def show_missing(info: ModelInfo, profile: Profile, problem: Problem) -> None:
    """Show metrics missing from the published files, and the methods that need them."""
    st.subheader("Not published", anchor=False)
    missing = {METRICS[metric].title: _describe_missing(profile, metric) for metric in METRICS}
    methods = cached_plans.unavailable_methods(info, problem)
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
    """Describe what a profile lacks of a metric, or return '' if it is complete."""
    if metric not in profile.metrics:
        return "none for this corpus and quantizer"
    if has_scores(profile, metric, None):
        return ""
    missing = [c.name for c in profile.ladder if not has_scores(profile, metric, c)]
    return f"none at {words.listed(missing, len(missing))}" if missing else ""


def show_metadata_cost(view: ExploreView) -> None:
    """Show what 8-bit scales and zero points add to the weight error at each configuration."""
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
                "configuration": [f"{c.stop_name} ({c.name})" for c in profile.ladder],
                "fp16": total["fp16"],
                "8-bit": total["8bit"],
                "added %": 100 * (total["8bit"] / total["fp16"] - 1),
                "bits saved": [c.bits_with_fp16_metadata - c.nominal_bits for c in profile.ladder],
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
