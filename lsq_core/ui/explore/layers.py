"""The Explore page's first view: the hard layers, and every metric over the layers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd

from lsq_core import charts
from lsq_core.bits import DETECTION_CONFIG, LADDER, QuantConfig
from lsq_core.model.info import ModelInfo
from lsq_core.planning.detection import shallowness
from lsq_core.planning.methods.boost import flagged_layers
from lsq_core.planning.problem import Problem
from lsq_core.profiling.metrics import TITLES
from lsq_core.profiling.profile import Profile
from lsq_core.quantization.registry import about
from lsq_core.ui import cached as known
from lsq_core.ui import words
from lsq_core.ui.explore.profile import Seen
from lsq_core.ui.page import next_step
from lsq_core.ui.safe import st

_VIEWS = {"sensitivity": "Sensitivity by part", "sensitivity_module": "by module"}
_RULE = "Algorithm 1 flags a layer whose step from the layer before is more than 3 deviations out."
#: How the first line names a metric, the one it speaks of first.
_BY = {"sensitivity": "activation sensitivity", "kurtosis": "kurtosis"}


def show(seen: Seen) -> None:
    """The hard layers, the charts, and what else there is to know of this profile."""
    problem = seen.problem
    say_what_is_hard(seen, problem)
    show_charts(seen, problem)
    left, right = st.columns([3, 2], gap="large")
    with left:
        show_flagged(problem)
    with right:
        if seen.published:
            show_lacks(seen.info, seen.found, problem)
        else:
            show_metadata_cost(seen)


def say_what_is_hard(seen: Seen, problem: Problem) -> None:
    """The first line: the layers that stand out, by sensitivity where there is any."""
    flagged = {metric: flagged_set(problem, metric) for metric in _BY if metric in problem.scores}
    if not flagged:
        seen.say("Neither sensitivity nor kurtosis was published at b4g64.", _RULE)
        return
    first, *others = flagged
    layers = flagged[first]
    rest = [
        f"By {_BY[metric]}: "
        + (words.a_layer(flagged[metric]).lower() if flagged[metric] else "none")
        + "."
        for metric in others
    ]
    if seen.published:
        rest += [f"No {_BY[metric]} was published." for metric in _BY if metric not in flagged]
    under = " ".join([*rest, _RULE])
    if layers:
        are = "is the hard one" if len(layers) == 1 else "are the hard ones"
        seen.say(f"{words.a_layer(layers)} {are}.", f"Flagged by {_BY[first]}. {under}")
    else:
        seen.say(f"No layer stands out by {_BY[first]}.", under)
    if shallowness(seen.info.layers):
        seen.first.warning(shallowness(seen.info.layers), icon=":material/layers:")


def flagged_set(problem: Problem, metric: str) -> list[int]:
    """Layers that are flagged for any module type, in order."""
    return sorted(set().union(*flagged_layers(problem, metric, 0).values()))


def show_charts(seen: Seen, problem: Problem) -> None:
    """Sensitivity, kurtosis and weight error above one another, those of them that there are."""
    found = seen.found
    views = [metric for metric in _VIEWS if metric in found.metrics]
    stops = at_stops(found)
    view = stop = None
    with seen.row:
        if views:
            keep_to("layers_view", views)
            view = st.segmented_control(
                "Sensitivity",
                views,
                format_func=_VIEWS.get,
                required=True,
                key="layers_view",
                label_visibility="collapsed",
                persist_state="session",
            )
        if stops:
            keep_to("shown", stops, DETECTION_CONFIG.name)
            stop = st.selectbox(
                "Configuration shown",
                stops,
                format_func=lambda name: f"at {name}",
                key="shown",
                label_visibility="collapsed",
                persist_state="session",
                width=130,
            )
    config = QuantConfig.parse(stop) if stop else None
    wanted = {view: config, "kurtosis": None, "weight_error": config}
    panels = [
        panel(found, problem, metric, at)
        for metric, at in wanted.items()
        if metric and has(found, metric, at)
    ]
    if panels:
        names = words.listed([panel.title for panel in panels])
        st.plotly_chart(
            charts.over_layers(panels, 550),
            config=charts.CONFIG,
            key="layers",
            alt=f"{names} over {seen.info.layers} layers; flagged points are ringed.",
        )
    absent = [m for m in wanted if m in found.metrics and not has(found, m, wanted[m])]
    st.caption(" ".join([_absent(absent, stop), origin(found), _RINGS]).strip())


_RINGS = (
    "Rings mark layers flagged at b4g64, whatever configuration is shown; experts of a layer are "
    "averaged."
)


def keep_to(key: str, options: list[str], default: str = "") -> None:
    """Bring a kept choice back to what this profile has."""
    if st.session_state.get(key) not in options:
        st.session_state[key] = default if default in options else options[0]


def at_stops(found: Profile) -> list[str]:
    """The configurations at which a profile has something, in the ladder's order."""
    there = set(found.values["config"])
    return [config.name for config in LADDER if config.name in there]


def has(found: Profile, metric: str, config: QuantConfig | None) -> bool:
    """Whether a profile holds a metric at a configuration."""
    rows = found.values
    at = config.name if config else ""
    return bool(((rows["metric"] == metric) & (rows["config"] == at)).any())


def _absent(metrics: list[str], stop: str | None) -> str:
    names = " and ".join(TITLES[metric].title.lower() for metric in metrics)
    return f"There is no {names} at {stop}." if names else ""


def origin(found: Profile) -> str:
    """Where a profile's figures come from, in a sentence."""
    facts = found.provenance
    if "files" in facts:
        files = words.listed([path.rpartition("/")[2] for path in facts["files"]])
        told = (
            "neither its texts nor its tokens are told"
            if "sensitivity" in found.metrics
            else "nothing in it depends on a calibration text"
        )
        return f"Published by the authors of SensiBoost and MXQ ({files}); {told}."
    return (
        f"Profile {found.id}: {facts['tokens']:,} tokens of {facts['corpus_source']}; "
        f"{facts['device']}, {facts['dtype']}, {words.seconds(_seconds(facts))}."
        f"{_limited(found.settings.quantizer)}"
    )


def _limited(quantizer: str) -> str:
    """That a quantizer has some stops alone, where it has."""
    known = about(quantizer)
    if known.configs == LADDER:
        return ""
    return f" {known.title} has {words.listed([c.name for c in known.configs])} alone."


def _seconds(facts: dict) -> float:
    """How long measuring took, its parts together; metrics of one part share its time."""
    return sum({facts["seconds"], *(part["seconds"] for part in facts.get("added", {}).values())})


def panel(
    found: Profile, problem: Problem, metric: str, config: QuantConfig | None
) -> charts.Panel:
    """One metric over the layers, the points that Algorithm 1 flags marked."""
    rows = found.values
    rows = rows[(rows["metric"] == metric) & (rows["config"] == (config.name if config else ""))]
    flags = flagged_layers(problem, metric, 0) if metric in problem.scores else {}
    order = list(dict.fromkeys(m.type for m in found.matrices))
    rows = rows.sort_values("type", key=lambda kinds: kinds.map(order.index), kind="stable")
    frame = rows.groupby(["type", "layer"], sort=False)["value"].mean().reset_index()
    frame["label"] = frame["type"].map(labels(found, metric))
    frame = frame.dropna(subset=["label"])
    frame["z"] = [
        flags.get(kind, {}).get(layer, np.nan)
        for kind, layer in zip(frame["type"], frame["layer"], strict=True)
    ]
    title = TITLES[metric]
    at = f" at {config.name}" if config else ""
    log = metric.startswith("sensitivity")
    return charts.Panel(frame, f"{title.title}{at}", title.axis, log)


def labels(found: Profile, metric: str) -> dict[str, str]:
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
    found = {
        name: flagged_layers(problem, metric, 0)
        for metric, name in columns.items()
        if metric in problem.scores
    }
    kinds = list(dict.fromkeys(m.type for m in problem.matrices))
    table = {"module": [charts.short_type(kind) for kind in kinds]}
    for name, flags in found.items():
        table[name] = [
            ", ".join(f"{layer} ({z:.3g})" for layer, z in flags[kind].items()) or "–"
            for kind in kinds
        ]
    st.dataframe(pd.DataFrame(table), hide_index=True)
    next_step("pages/2_Plan.py", "Plan where the bits go")


def show_lacks(info: ModelInfo, found: Profile, problem: Problem) -> None:
    """What the published files don't give, and the methods that can't plan for want of it."""
    st.subheader("Not published", anchor=False)
    lacks = {TITLES[metric].title: _lack(found, metric) for metric in TITLES}
    methods = known.cannot_plan(info, problem)
    if methods:
        lacks["Plans that need them"] = "none by " + words.listed(
            [charts.method_style(m).title for m in methods], 99
        )
    lacks = {name: said for name, said in lacks.items() if said}
    st.dataframe(
        {"metric": list(lacks), "published": list(lacks.values())},
        hide_index=True,
        column_config={"published": st.column_config.TextColumn(width="large")},
    )


def _lack(found: Profile, metric: str) -> str:
    """What of a metric a profile hasn't, or '' when it has all."""
    if metric not in found.metrics:
        return "none for this text and quantizer"
    absent = [c.name for c in LADDER if not has(found, metric, c)]
    per_stop = not has(found, metric, None)
    return f"none at {words.listed(absent, len(absent))}" if per_stop and absent else ""


def show_metadata_cost(seen: Seen) -> None:
    """What storing scale and zero in 8 bits adds to the weight error, stop by stop."""
    found = seen.found
    if not about(found.settings.quantizer).takes_metadata:
        return
    st.subheader("What 8-bit metadata cost", anchor=False)
    other = "fp16" if found.settings.metadata == "8bit" else "8bit"
    wanted = replace(found.settings, metadata=other)
    twin = known.profile(seen.here.store, seen.info, wanted, seen.here.device)
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
