"""Layer patterns of several corpora, quantizers, configurations and models in one chart."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from lsq_core import charts
from lsq_core.bits import DETECTION_CONFIG, EXTENDED_LADDER, QuantConfig
from lsq_core.profiling.agreement import lowest_correlation, pattern_correlations
from lsq_core.profiling.metrics import METRICS, default_metrics, in_display_order
from lsq_core.ui import cached, words
from lsq_core.ui.explore.profile import ExploreView
from lsq_core.ui.safe import st
from lsq_core.ui.state import ensure_valid_choice

#: Columns of the profile contents that are selected by, and the labels of their boxes.
_BOXES = {
    "model": "Models",
    "calibration": "Calibration corpora",
    "quantizer": "Quantizers",
    "config": "Configurations",
}
#: Widths of the boxes in pixels: choices stay readable, and the row wraps if needed.
_WIDTHS = {"model": 260, "calibration": 280, "quantizer": 200, "config": 200, "part": 118}
#: Fields of a line's name, in this order; those that all lines share are omitted.
_NAME_FIELDS = (*_BOXES, "axis", "metadata", "samples", "block_tokens", "seed")
#: What one click can compare across; all else is as in the chosen profile.
_PRESETS = {
    "calibration": "Corpora",
    "quantizer": "Quantizers",
    "config": "Bits",
    "model": "Models of this size",
}
#: More lines could not be told apart.
_MAX_LINES = 16
_ALL = "all parts"


def show(view: ExploreView) -> None:
    """Show the selection boxes, the lines, and their correlations."""
    available = cached.profile_contents(view.ctx.store)
    metric = _select_metric(view, available)
    available = available[available["metric"] == metric]
    _init_choice(view, available)
    with view.row:
        st.segmented_control(
            "Compare across",
            list(_PRESETS),
            format_func=lambda column: _PRESETS[column],
            key="overlay_preset",
            label_visibility="collapsed",
            on_change=_apply_preset,
            args=(view, available),
        )
    boxes = st.container(horizontal=True, gap="small")
    with boxes:
        selected = _select_values(available)
    lines = select_lines(available, selected)
    frame = load_lines(view, metric, lines)
    if frame.empty:
        view.render_headline("Nothing selected to compare.", "Choose at least one of each above.")
        return
    with boxes:
        frame = _select_part(frame)
    correlations = pattern_correlations(frame)
    _render_headline(view, metric, correlations, len(lines))
    _show_charts(metric, frame, lines, correlations)
    _show_notes(lines)


def _select_metric(view: ExploreView, available: pd.DataFrame) -> str:
    measured = set(available.loc[available["id"] == view.profile.id, "metric"])
    metrics = in_display_order(metric for metric in default_metrics() if metric in measured)
    ensure_valid_choice("overlay_metric", metrics)
    with view.row:
        return st.selectbox(
            "Metric",
            metrics,
            format_func=words.metric_label,
            key="overlay_metric",
            label_visibility="collapsed",
            width=210,
            persist_state="session",
        )


# --- choosing -------------------------------------------------------------------------------


def profile_choice(view: ExploreView, available: pd.DataFrame) -> dict[str, list[str]]:
    """Return the choice of the chosen profile alone, at b4g64 if available."""
    own_rows = available[available["id"] == view.profile.id]
    configs = own_rows["config"].tolist()
    config = DETECTION_CONFIG.name if DETECTION_CONFIG.name in configs else configs[0]
    row = own_rows.iloc[0]
    return {
        "model": [row["model"]],
        "calibration": [row["calibration"]],
        "quantizer": [row["quantizer"]],
        "config": [config],
    }


def preset_choice(view: ExploreView, available: pd.DataFrame, across: str) -> dict[str, list[str]]:
    """Return the choice of the chosen profile with every available value of ``across``.

    Files that disagree with the main ones, and models of another size or origin, are omitted; the
    user can add them.
    """
    selected = profile_choice(view, available)
    rows = available
    for column, values in selected.items():
        if column != across:
            rows = rows[rows[column].isin(values)]
    if across == "calibration":
        rows = rows[~rows["calibration"].str.contains("@")]
    if across == "model":
        own = available[available["id"] == view.profile.id].iloc[0]
        rows = rows[rows["linear_parameters"] == own["linear_parameters"]]
        rows = rows[rows["origin"] == own["origin"]]
    values = _order_values(across, rows[across])
    own_first = [] if across == "config" else selected[across]
    return selected | {across: list(dict.fromkeys([*own_first, *values]))}


def _init_choice(view: ExploreView, available: pd.DataFrame) -> None:
    """Apply a preset when the profile or metric changes; drop choices no longer available."""
    choice_key = f"{view.profile.id}/{st.session_state['overlay_metric']}"
    if st.session_state.get("overlay_of") != choice_key:
        st.session_state["overlay_of"] = choice_key
        st.session_state["overlay_preset"] = next(
            (p for p in _PRESETS if len(preset_choice(view, available, p)[p]) > 1), "calibration"
        )
        _apply_preset(view, available)
    for column in _BOXES:
        key = f"overlay_{column}"
        options = set(available[column])
        kept = [value for value in st.session_state.get(key, []) if value in options]
        st.session_state[key] = kept


def _apply_preset(view: ExploreView, available: pd.DataFrame) -> None:
    across = st.session_state["overlay_preset"]
    if across:
        for column, values in preset_choice(view, available, across).items():
            st.session_state[f"overlay_{column}"] = values


def _select_values(available: pd.DataFrame) -> dict[str, list[str]]:
    """Return the selected values of each column."""
    selected = {}
    for column, label in _BOXES.items():
        options = _order_values(column, available[column])
        if options == [""]:
            selected[column] = [""]  # a metric that has no configuration
            continue
        selected[column] = st.multiselect(
            label,
            options,
            key=f"overlay_{column}",
            persist_state="session",
            width=_WIDTHS[column],
        )
    return selected


def _order_values(column: str, values: pd.Series) -> list[str]:
    available = set(values)
    if column == "config":
        return [c.name for c in EXTENDED_LADDER if c.name in available] or sorted(available)
    return list(dict.fromkeys(values)) if column == "quantizer" else sorted(available)


# --- the lines ------------------------------------------------------------------------------


def select_lines(available: pd.DataFrame, selected: dict[str, list[str]]) -> pd.DataFrame:
    """Return a row per selected line that exists, in order of selection; ``line`` is its name."""
    rows = available
    for column, values in selected.items():
        rows = rows[rows[column].isin(values)]
    rows = rows.sort_values(
        list(selected), key=lambda values: values.map(selected[values.name].index), kind="stable"
    )
    varying = [field for field in _NAME_FIELDS if rows[field].nunique() > 1] or ["calibration"]
    names = [
        ", ".join(_format_field(name, value) for name, value in zip(varying, row, strict=True))
        for row in rows[varying].itertuples(index=False)
    ]
    return rows.assign(line=names).head(_MAX_LINES)


def _format_field(name: str, value: object) -> str:
    """Format a field of a line's name: the value alone, or with the field's name."""
    if name in _BOXES or name == "metadata":
        return str(value).removeprefix("published:") if name == "model" else str(value)
    return f"{name.replace('_', ' ')} {value}"


def load_lines(view: ExploreView, metric: str, lines: pd.DataFrame) -> pd.DataFrame:
    """Return ``line, part, layer, value`` of the lines, parts in order of computation."""
    ids = tuple(dict.fromkeys(lines["id"]))
    values = cached.over_layers(view.ctx.store, ids, metric)
    frame = lines[["line", "id", "config"]].merge(values, on=["id", "config"], how="inner")
    order = {kind: i for i, kind in enumerate(dict.fromkeys(m.type for m in view.info.matrices))}
    rank = {line: i for i, line in enumerate(lines["line"])}
    frame["at"] = frame["type"].map(order).fillna(len(order))
    frame["of"] = frame["line"].map(rank)
    frame = frame.sort_values(["at", "of", "layer"], kind="stable")
    if METRICS[metric].shared_by_part:
        frame = _merge_part_types(frame)
    else:
        frame["part"] = frame["type"].map(charts.short_type)
    return frame[["line", "part", "layer", "value"]].reset_index(drop=True)


def _merge_part_types(frame: pd.DataFrame) -> pd.DataFrame:
    """Keep one row per part and layer for the module types that share its score."""
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


def _select_part(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of all parts, or of the chosen one."""
    parts = [_ALL, *dict.fromkeys(frame["part"])]
    ensure_valid_choice("overlay_part", parts)
    chosen = st.selectbox(
        "Part", parts, key="overlay_part", persist_state="session", width=_WIDTHS["part"]
    )
    return frame if chosen == _ALL else frame[frame["part"] == chosen]


def line_styles(lines: pd.DataFrame) -> dict[str, charts.LineStyle]:
    """Style lines by configuration if all configurations differ, else by number."""
    by_bits = lines["config"].nunique() == len(lines) > 1
    style: Callable[[int, str], charts.LineStyle] = (
        (lambda _, config: charts.LineStyle(charts.config_color(QuantConfig.parse(config))))
        if by_bits
        else (lambda number, _: charts.line_style(number))
    )
    pairs = zip(lines["line"], lines["config"], strict=True)
    return {line: style(number, config) for number, (line, config) in enumerate(pairs)}


# --- what is shown --------------------------------------------------------------------------


def _render_headline(
    view: ExploreView, metric: str, correlations: pd.DataFrame, lines: int
) -> None:
    """Render the headline: whether the patterns agree, judged by the two that agree least."""
    title = METRICS[metric].title.lower()
    if lines == 1:
        view.render_headline(
            "One pattern selected.", "Choose more corpora, quantizers, configurations or models."
        )
        return
    least = lowest_correlation(correlations)
    if least is None:
        view.render_headline(
            "These patterns cannot be compared layer by layer.",
            "A rank correlation needs the same layers in both, at least four.",
        )
        return
    verdict = "agree" if least.value >= 0.9 else "agree partly" if least.value >= 0.7 else "differ"
    view.render_headline(
        f"The patterns {verdict}: lowest rank correlation {least.value:.2f}.",
        words.escape(
            f"Between {least.first} and {least.second}. Spearman's ρ of {title} over the layers, "
            "within each part, averaged over the parts shown; 1 is the same order of layers."
        ),
    )


def _show_charts(
    metric: str, frame: pd.DataFrame, lines: pd.DataFrame, correlations: pd.DataFrame
) -> None:
    left, right = st.columns([3, 2], gap="medium")
    names = words.listed(list(correlations.index))
    with left:
        st.plotly_chart(
            charts.overlay_lines(
                frame,
                line_styles(lines),
                METRICS[metric].axis,
                METRICS[metric].log_scale,
                500,
            ),
            config=charts.CONFIG,
            key="overlay",
            alt=f"{METRICS[metric].title} over the layers of {names}, by part.",
        )
    with right:
        st.plotly_chart(
            charts.correlation_heatmap(correlations, 500),
            config=charts.CONFIG,
            key="correlations",
            alt=f"Rank correlation of every two of {names}.",
        )


def _show_notes(lines: pd.DataFrame) -> None:
    notes = []
    if len(lines) == _MAX_LINES:
        notes.append(f"Only the first {_MAX_LINES} lines are drawn.")
    if lines["origin"].nunique() > 1:
        notes.append("Published and measured values are shown together because you selected both.")
    if notes:
        st.caption(" ".join(notes))
