"""How hard each layer is to quantize, and which ones Algorithm 1 flags."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import streamlit as st

from lsq_core import charts, disk, jobs
from lsq_core.config import DETECTION_CONFIG, LADDER, METADATA_FORMATS, QuantConfig
from lsq_core.corpus import BUILT_IN
from lsq_core.model import ModelInfo
from lsq_core.plan import Problem
from lsq_core.plan.boost import flagged_layers
from lsq_core.plan.outliers import shallowness
from lsq_core.profile import TITLES, Profile, ProfileSettings
from lsq_core.quantize import QUANTIZERS
from lsq_core.ui import arguments, jobs_panel, known, state, words
from lsq_core.ui.page import Here, headline, next_step, page

_VIEWS = {"sensitivity": "Sensitivity by part", "sensitivity_module": "by module"}


def explore(here: Here) -> None:
    """The profile under the chosen settings, or the way to it."""
    info = here.info
    state.begin_settings(info.fingerprint, known.newest_settings(here.store, info))
    first = st.container()
    settings = settings_bar()
    found = known.profile(here.store, info, settings)
    if found is None:
        offer(here, info, settings, first)
        return
    problem = known.problem(info, found)
    with first:
        say_what_is_hard(info, problem)
    show_charts(found, problem)
    left, right = st.columns([3, 2], gap="large")
    with left:
        show_flagged(problem)
    with right:
        show_metadata_cost(here, info, found)


def settings_bar() -> ProfileSettings:
    """The settings of a profile, in one row."""
    columns = st.columns([2, 1.2, 1.2, 1.2, 0.8], vertical_alignment="bottom")
    with columns[0]:
        text = st.session_state["calibration"]
        st.selectbox(
            "Calibration text",
            list(dict.fromkeys([*BUILT_IN, text])),
            key="calibration",
            accept_new_options=True,
            persist_state="session",
            help="\n".join(f"- **{name}**: {about}" for name, about in BUILT_IN.items())
            + "\n- or **hf:org/name**, or a text file's path",
        )
    chosen = [
        ("Quantizer", "profile_quantizer", list(QUANTIZERS)),
        ("Grouping axis", "axis", [1, 0]),
        ("Metadata", "metadata", list(METADATA_FORMATS)),
    ]
    for column, (label, key, options) in zip(columns[1:], chosen, strict=False):
        column.selectbox(label, options, key=key, persist_state="session")
    with columns[4], st.popover("More", width="stretch"):
        st.number_input("Calibration texts", 1, 4096, key="samples", persist_state="session")
        st.number_input("Tokens of a block", 16, 8192, key="block_tokens", persist_state="session")
    return state.settings()


# --- without a profile ----------------------------------------------------------------------


def offer(here: Here, info: ModelInfo, settings: ProfileSettings, first: object) -> None:
    """Say that nothing was measured yet, and measure on demand."""
    words_of = ["profile", *arguments.model_arguments(here.source, here.device)]
    words_of += [*arguments.profile_arguments(settings), "--db", str(here.store.path)]
    job = jobs_panel.find(disk.jobs_folder(here.store), words_of)
    if job is not None and job.active:
        with first:
            jobs_panel.follow(job, jobs_panel.say)
        return
    with first:
        headline(
            f"{here.source.name} has not been profiled with these settings.",
            f"One pass over {info.layers} layers measures kurtosis, weight error and activation "
            f"sensitivity of {len(info.matrices)} weight matrices at {len(LADDER)} stops.",
        )
    if st.button("Profile", type="primary", icon=":material/play_arrow:", key="profile"):
        jobs.start(disk.jobs_folder(here.store), words_of)
        st.rerun()
    if job is not None and job.state != "done":
        jobs_panel.follow(job)


# --- with one -------------------------------------------------------------------------------


def say_what_is_hard(info: ModelInfo, problem: Problem) -> None:
    """The first line: the layers that stand out."""
    sensitive = flagged_set(problem, "sensitivity")
    heavy = flagged_set(problem, "kurtosis")
    under = (
        f"By kurtosis: {words.a_layer(heavy).lower()}." if heavy else "By kurtosis: none."
    ) + " Algorithm 1 flags a layer whose step from the layer before is more than 3 deviations out."
    if sensitive:
        one = len(sensitive) == 1
        headline(
            f"{words.a_layer(sensitive)} {'is the hard one' if one else 'are the hard ones'}.",
            "Flagged by activation sensitivity. " + under,
        )
    else:
        headline("No layer stands out by activation sensitivity.", under)
    if shallowness(info.layers):
        st.warning(shallowness(info.layers), icon=":material/layers:")


def flagged_set(problem: Problem, metric: str) -> list[int]:
    """Layers that are flagged for any module type, in order."""
    return sorted(set().union(*flagged_layers(problem, metric, 0).values()))


def show_charts(found: Profile, problem: Problem) -> None:
    """Sensitivity, kurtosis and weight error above one another."""
    with st.container(horizontal=True):
        view = st.segmented_control(
            "Sensitivity",
            list(_VIEWS),
            format_func=_VIEWS.get,
            default="sensitivity",
            required=True,
            key="view",
            label_visibility="collapsed",
            persist_state="session",
        )
        stop = st.selectbox(
            "Configuration shown",
            [c.name for c in LADDER],
            index=LADDER.index(DETECTION_CONFIG),
            format_func=lambda name: f"at {name}",
            key="shown",
            label_visibility="collapsed",
            persist_state="session",
            width=130,
        )
    config = QuantConfig.parse(stop)
    panels = [
        panel(found, problem, view, config),
        panel(found, problem, "kurtosis", None),
        panel(found, problem, "weight_error", config),
    ]
    st.plotly_chart(charts.over_layers(panels), config=charts.CONFIG, key="layers")
    facts = found.provenance
    st.caption(
        f"Profile {found.id}: {facts['tokens']:,} tokens of {facts['corpus_source']}; "
        f"{facts['device']}, {facts['dtype']}, {words.seconds(facts['seconds'])}. Rings mark "
        "layers flagged at b4g64, whatever configuration is shown; experts of a layer are averaged."
    )


def panel(
    found: Profile, problem: Problem, metric: str, config: QuantConfig | None
) -> charts.Panel:
    """One metric over the layers, the points that Algorithm 1 flags marked."""
    rows = found.values
    rows = rows[(rows["metric"] == metric) & (rows["config"] == (config.name if config else ""))]
    flags = flagged_layers(problem, metric, 0) if metric in problem.scores else {}
    frame = rows.groupby(["type", "layer"], sort=False)["value"].mean().reset_index()
    frame["label"] = frame["type"].map(_labels(found, metric))
    frame = frame.dropna(subset=["label"])
    frame["z"] = [
        flags.get(kind, {}).get(layer, np.nan)
        for kind, layer in zip(frame["type"], frame["layer"], strict=True)
    ]
    title = TITLES[metric]
    at = f" at {config.name}" if config else ""
    log = metric.startswith("sensitivity")
    return charts.Panel(frame, f"{title.title}{at}", title.axis, log)


def _labels(found: Profile, metric: str) -> dict[str, str]:
    """Module type to its name in the legend; of types that share a part only the first is drawn."""
    kinds = list(dict.fromkeys(m.type for m in found.matrices))
    if metric != "sensitivity":
        return {kind: charts.short_type(kind) for kind in kinds}
    rows = found.values[found.values["metric"] == metric]
    parts = rows.drop_duplicates("type").set_index("type")["part"]
    members: dict[str, list[str]] = {}
    for kind in kinds:
        if kind in parts:
            members.setdefault(parts[kind], []).append(kind)
    return {m[0]: ", ".join(charts.short_type(kind) for kind in m) for m in members.values()}


def show_flagged(problem: Problem) -> None:
    """Which layers each metric flags, by module type, with their z-scores."""
    st.subheader("Flagged layers (z)", anchor=False)
    columns = {"sensitivity": "by part", "sensitivity_module": "by module", "kurtosis": "kurtosis"}
    found = {name: flagged_layers(problem, metric, 0) for metric, name in columns.items()}
    kinds = list(dict.fromkeys(m.type for m in problem.matrices))
    table = {"module": [charts.short_type(kind) for kind in kinds]}
    for name, flags in found.items():
        table[name] = [
            ", ".join(f"{layer} ({z:.3g})" for layer, z in flags[kind].items()) or "–"
            for kind in kinds
        ]
    st.dataframe(pd.DataFrame(table), hide_index=True)
    next_step("pages/2_Plan.py", "Plan where the bits go")


def show_metadata_cost(here: Here, info: ModelInfo, found: Profile) -> None:
    """What storing scale and zero in 8 bits adds to the weight error, stop by stop."""
    st.subheader("What 8-bit metadata cost", anchor=False)
    other = "fp16" if found.settings.metadata == "8bit" else "8bit"
    twin = known.profile(here.store, info, replace(found.settings, metadata=other))
    if twin is None:
        st.write(
            f"Profile once more with **{other}** metadata (above), and this table shows what "
            "8-bit scales and zeros add to the weight error at each stop."
        )
        return
    by_format = {p.settings.metadata: p.by_config("weight_error") for p in (found, twin)}
    total = {name: np.sqrt(np.nansum(errors**2, axis=0)) for name, errors in by_format.items()}
    st.dataframe(
        pd.DataFrame(
            {
                "stop": [f"{c.stop_name} ({c.name})" for c in LADDER],
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
    st.caption("Weight error is the Frobenius norm over all planned matrices together.")


page("Explore", explore)
