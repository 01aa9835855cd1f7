"""Patterns of several texts, quantizers, bit widths and models over one another."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from lsq_core import charts
from lsq_core.bits import DETECTION_CONFIG, LADDER, QuantConfig
from lsq_core.profiling.agreement import lowest, pattern_correlations
from lsq_core.profiling.metrics import TITLES
from lsq_core.ui import cached, words
from lsq_core.ui.explore.layers import keep_to
from lsq_core.ui.explore.profile import Seen
from lsq_core.ui.safe import st

_METRICS = {
    "sensitivity": "Sensitivity by part",
    "sensitivity_module": "Sensitivity by module",
    "kurtosis": "Kurtosis",
    "weight_error": "Weight error",
}
#: What a person picks several of: the column of the held profiles, and how the box is called.
_BOXES = {
    "model": "Models",
    "calibration": "Calibration texts",
    "quantizer": "Quantizers",
    "config": "Configurations",
}
#: How wide the boxes are, in pixels: what is picked can be read, and a row breaks where it must.
_WIDTHS = {"model": 260, "calibration": 280, "quantizer": 200, "config": 200, "part": 118}
#: What a line's name can be made of, in this order; what all lines share is left out.
_FACTS = (*_BOXES, "axis", "metadata", "samples", "block_tokens", "seed")
#: What can be laid over one another in one click; all else is as in the chosen profile.
_PRESETS = {
    "calibration": "Texts",
    "quantizer": "Quantizers",
    "config": "Bits",
    "model": "Models of this size",
}
#: More lines than these can't be told apart.
_MOST = 16
_ALL = "all parts"


def show(seen: Seen) -> None:
    """Boxes to choose by, the lines, and how alike they are."""
    there = cached.held(seen.here.store)
    metric = _metric(seen, there)
    there = there[there["metric"] == metric]
    _begin(seen, there)
    with seen.row:
        st.segmented_control(
            "Compare across",
            list(_PRESETS),
            format_func=lambda column: _PRESETS[column],
            key="overlay_preset",
            label_visibility="collapsed",
            on_change=_apply_preset,
            args=(seen, there),
        )
    boxes = st.container(horizontal=True, gap="small")
    with boxes:
        picked = _boxes(there)
    lines = lines_of(there, picked)
    frame = frame_of(seen, metric, lines)
    if frame.empty:
        seen.say("Nothing is chosen to compare.", "Pick at least one of each above.")
        return
    with boxes:
        frame = _one_part(frame)
    correlations = pattern_correlations(frame)
    _say(seen, metric, correlations, len(lines))
    _charts(metric, frame, lines, correlations)
    _notes(lines)


def _metric(seen: Seen, there: pd.DataFrame) -> str:
    own = set(there.loc[there["id"] == seen.found.id, "metric"])
    offered = [metric for metric in _METRICS if metric in own]
    keep_to("overlay_metric", offered)
    with seen.row:
        return st.selectbox(
            "Metric",
            offered,
            format_func=_METRICS.get,
            key="overlay_metric",
            label_visibility="collapsed",
            width=210,
            persist_state="session",
        )


# --- choosing -------------------------------------------------------------------------------


def own_choice(seen: Seen, there: pd.DataFrame) -> dict[str, list[str]]:
    """The chosen profile alone, at b4g64 where it has that."""
    own = there[there["id"] == seen.found.id]
    configs = own["config"].tolist()
    config = DETECTION_CONFIG.name if DETECTION_CONFIG.name in configs else configs[0]
    row = own.iloc[0]
    return {
        "model": [row["model"]],
        "calibration": [row["calibration"]],
        "quantizer": [row["quantizer"]],
        "config": [config],
    }


def preset(seen: Seen, there: pd.DataFrame, across: str) -> dict[str, list[str]]:
    """The chosen profile, with all that there is of ``across`` beside it.

    Files that disagree with the main ones are left out, and of models those of another size or
    origin: a person can add them.
    """
    picked = own_choice(seen, there)
    rows = there
    for column, values in picked.items():
        if column != across:
            rows = rows[rows[column].isin(values)]
    if across == "calibration":
        rows = rows[~rows["calibration"].str.contains("@")]
    if across == "model":
        own = there[there["id"] == seen.found.id].iloc[0]
        rows = rows[rows["linear_parameters"] == own["linear_parameters"]]
        rows = rows[rows["origin"] == own["origin"]]
    values = _ordered(across, rows[across])
    own_first = [] if across == "config" else picked[across]
    return picked | {across: list(dict.fromkeys([*own_first, *values]))}


def _begin(seen: Seen, there: pd.DataFrame) -> None:
    """Begin with the texts of the chosen profile; keep what was chosen while it is there."""
    mark = f"{seen.found.id}/{st.session_state['overlay_metric']}"
    if st.session_state.get("overlay_of") != mark:
        st.session_state["overlay_of"] = mark
        st.session_state["overlay_preset"] = next(
            (p for p in _PRESETS if len(preset(seen, there, p)[p]) > 1), "calibration"
        )
        _apply_preset(seen, there)
    for column in _BOXES:
        key = f"overlay_{column}"
        options = set(there[column])
        kept = [value for value in st.session_state.get(key, []) if value in options]
        st.session_state[key] = kept


def _apply_preset(seen: Seen, there: pd.DataFrame) -> None:
    across = st.session_state["overlay_preset"]
    if across:
        for column, values in preset(seen, there, across).items():
            st.session_state[f"overlay_{column}"] = values


def _boxes(there: pd.DataFrame) -> dict[str, list[str]]:
    """What is chosen of each kind."""
    picked = {}
    for column, label in _BOXES.items():
        options = _ordered(column, there[column])
        if options == [""]:
            picked[column] = [""]  # a metric that has no configuration
            continue
        picked[column] = st.multiselect(
            label,
            options,
            key=f"overlay_{column}",
            persist_state="session",
            width=_WIDTHS[column],
        )
    return picked


def _ordered(column: str, values: pd.Series) -> list[str]:
    there = set(values)
    if column == "config":
        return [c.name for c in LADDER if c.name in there] or sorted(there)
    return list(dict.fromkeys(values)) if column == "quantizer" else sorted(there)


# --- the lines ------------------------------------------------------------------------------


def lines_of(there: pd.DataFrame, picked: dict[str, list[str]]) -> pd.DataFrame:
    """A row a line that was picked and exists, in the order of the picks; ``line`` is its name."""
    rows = there
    for column, values in picked.items():
        rows = rows[rows[column].isin(values)]
    rows = rows.sort_values(
        list(picked), key=lambda values: values.map(picked[values.name].index), kind="stable"
    )
    varying = [fact for fact in _FACTS if rows[fact].nunique() > 1] or ["calibration"]
    names = [
        ", ".join(_fact(name, value) for name, value in zip(varying, row, strict=True))
        for row in rows[varying].itertuples(index=False)
    ]
    return rows.assign(line=names).head(_MOST)


def _fact(name: str, value: object) -> str:
    """A fact of a line as its name has it: plain, or with what it is about."""
    if name in _BOXES or name == "metadata":
        return str(value).removeprefix("published:") if name == "model" else str(value)
    return f"{name.replace('_', ' ')} {value}"


def frame_of(seen: Seen, metric: str, lines: pd.DataFrame) -> pd.DataFrame:
    """``line, part, layer, value`` of the lines, parts in the order of the computation."""
    ids = tuple(dict.fromkeys(lines["id"]))
    values = cached.over_layers(seen.here.store, ids, metric)
    frame = lines[["line", "id", "config"]].merge(values, on=["id", "config"], how="inner")
    order = {kind: i for i, kind in enumerate(dict.fromkeys(m.type for m in seen.info.matrices))}
    rank = {line: i for i, line in enumerate(lines["line"])}
    frame["at"] = frame["type"].map(order).fillna(len(order))
    frame["of"] = frame["line"].map(rank)
    frame = frame.sort_values(["at", "of", "layer"], kind="stable")
    if metric == "sensitivity":
        frame = _by_part(frame)
    else:
        frame["part"] = frame["type"].map(charts.short_type)
    return frame[["line", "part", "layer", "value"]].reset_index(drop=True)


def _by_part(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a part and layer, for all module types that share its score."""
    names = (
        {
            part: ", ".join(dict.fromkeys(charts.short_type(kind) for kind in rows["type"]))
            for part, rows in frame[frame["line"] == frame["line"].iloc[0]].groupby("part")
        }
        if len(frame)
        else {}
    )
    frame = frame.drop_duplicates(["line", "part", "layer"])
    return frame.assign(part=frame["part"].map(lambda part: names.get(part, part)))


def _one_part(frame: pd.DataFrame) -> pd.DataFrame:
    """All parts side by side, or the one that is chosen."""
    parts = [_ALL, *dict.fromkeys(frame["part"])]
    keep_to("overlay_part", parts)
    chosen = st.selectbox(
        "Part", parts, key="overlay_part", persist_state="session", width=_WIDTHS["part"]
    )
    return frame if chosen == _ALL else frame[frame["part"] == chosen]


def styles_of(lines: pd.DataFrame) -> dict[str, charts.LineStyle]:
    """Bits have their own colours, where nothing but the configuration differs; else by number."""
    by_bits = lines["config"].nunique() == len(lines) > 1
    style: Callable[[int, str], charts.LineStyle] = (
        (lambda _, config: charts.LineStyle(charts.config_color(QuantConfig.parse(config))))
        if by_bits
        else (lambda number, _: charts.line_style(number))
    )
    pairs = zip(lines["line"], lines["config"], strict=True)
    return {line: style(number, config) for number, (line, config) in enumerate(pairs)}


# --- what is shown --------------------------------------------------------------------------


def _say(seen: Seen, metric: str, correlations: pd.DataFrame, lines: int) -> None:
    """Whether the patterns agree, by the two that do so least."""
    title = TITLES[metric].title.lower()
    if lines == 1:
        seen.say("One pattern so far.", "Pick more texts, quantizers, configurations or models.")
        return
    worst = lowest(correlations)
    if worst is None:
        seen.say(
            "These patterns cannot be compared layer by layer.",
            "A rank correlation needs the same layers in both, and four of them at least.",
        )
        return
    verdict = "agree" if worst.value >= 0.9 else "agree in part" if worst.value >= 0.7 else "differ"
    seen.say(
        f"The patterns {verdict}: lowest rank correlation {worst.value:.2f}.",
        words.literal(
            f"Between {worst.first} and {worst.second}. Spearman's ρ of {title} over the layers, "
            "within each part, averaged over the parts shown; 1 is the same order of layers."
        ),
    )


def _charts(
    metric: str, frame: pd.DataFrame, lines: pd.DataFrame, correlations: pd.DataFrame
) -> None:
    left, right = st.columns([3, 2], gap="medium")
    names = words.listed(list(correlations.index))
    with left:
        st.plotly_chart(
            charts.overlaid(
                frame, styles_of(lines), TITLES[metric].axis, metric.startswith("sensitivity"), 500
            ),
            config=charts.CONFIG,
            key="overlay",
            alt=f"{TITLES[metric].title} over the layers of {names}, by part.",
        )
    with right:
        st.plotly_chart(
            charts.correlation_heatmap(correlations, 500),
            config=charts.CONFIG,
            key="correlations",
            alt=f"Rank correlation of every two of {names}.",
        )


def _notes(lines: pd.DataFrame) -> None:
    notes = []
    if len(lines) == _MOST:
        notes.append(f"No more than {_MOST} lines are drawn.")
    if lines["origin"].nunique() > 1:
        notes.append("Published and measured figures are together, as you picked both.")
    if notes:
        st.caption(" ".join(notes))
