"""The Compare page's table: every run, filtered, starred, deleted and brought back."""

from __future__ import annotations

import pandas as pd

from lsq_core import charts
from lsq_core.results.compare import pareto
from lsq_core.ui import cached, words
from lsq_core.ui.compare.export import offer_table
from lsq_core.ui.compare.selection import Choice
from lsq_core.ui.page import Here
from lsq_core.ui.safe import st
from lsq_core.units import GIB, MIB

#: How the numbers of columns are written; they sort as numbers.
_FORMATS = {
    "bits": "%.4f",
    "MiB": "%.2f",
    "model MiB": "%.2f",
    "nominal GiB": "%.2f",
    "on disk GiB": "%.2f",
    "perplexity": "%.4f",
    "over full %": "%.2f",
    "KL": "%.4f",
    "top-1 %": "%.1f",
    "tokens/s": "%.0f",
    "quantized in s": "%.1f",
}
#: Columns that there are on demand.
_MORE = ("method", "quantizer", "corpus", "protocol", "tokens", "device", "dtype", "run id")


def show(here: Here, choice: Choice) -> None:
    """Every run of the measurement, or of the model; what is filtered is what is taken along."""
    st.subheader("Runs", anchor=False)
    frame = filtered(choice)
    table = as_table(frame, choice)
    shown = table.drop(columns="evaluation")
    picked = st.dataframe(
        shown,
        hide_index=True,
        column_order=chosen_columns(shown, choice),
        column_config={
            name: st.column_config.NumberColumn(format=form)
            for name, form in _FORMATS.items()
            if name in table
        }
        | {"when": st.column_config.DatetimeColumn(format="YYYY-MM-DD HH:mm")},
        key="table",
        on_select="rerun",
        selection_mode="multi-row",
        placeholder="",
        alt=f"{words.plural(len(table), 'run')} with bits, sizes and perplexity.",
    )
    rows = [row for row in picked["selection"]["rows"] if row < len(table)]
    _actions(here, frame.loc[table.index[rows]], choice)
    with st.container(horizontal=True):
        offer_table(shown, f"{choice.measurement} runs")
    offer_undo(here)


def filtered(choice: Choice) -> pd.DataFrame:
    """The runs that the person's filters leave."""
    wide = st.session_state.get("all_measurements", False)
    frame = choice.of_model if wide else choice.runs
    cells = st.columns([1.3, 1.3, 1, 1, 1, 0.8, 1], vertical_alignment="bottom")
    text = cells[0].text_input("Search", key="table_text", placeholder="name, note, device")
    for cell, column in zip(cells[1:5], ("method", "quantizer", "corpus", "protocol"), strict=True):
        options = list(dict.fromkeys(frame[column].dropna()))
        chosen = cell.multiselect(
            column.capitalize(),
            options,
            format_func=_method_title if column == "method" else str,
            key=f"table_{column}",
            placeholder="all",
        )
        if chosen:
            frame = frame[frame[column].isin(chosen)]
    if cells[5].toggle("Starred", key="table_starred"):
        frame = frame[frame["starred"]]
    cells[6].toggle(
        "All texts",
        key="all_measurements",
        help="Runs of this model on every text and by every protocol, which are not comparable.",
    )
    if text.strip():
        said = (
            frame[["label", "note", "device", "run", "saved_to"]].fillna("").agg(" ".join, axis=1)
        )
        frame = frame[said.str.contains(text.strip(), case=False, regex=False)]
    return frame


def _method_title(method: str) -> str:
    return charts.method_style(method).title


def as_table(frame: pd.DataFrame, choice: Choice) -> pd.DataFrame:
    """Runs with the columns that a person reads, lowest perplexity first."""
    published = choice.published
    columns = {
        "★": frame["starred"].map({True: "★", False: ""}),
        "run": frame["label"],
        "bits": frame["bits_per_param"],
    }
    if published:
        whole = known_nominal(choice)
        columns["nominal GiB"] = frame["bits_per_param"] * whole / GIB
        columns["on disk GiB"] = frame["model_bytes"] / GIB
    else:
        columns["MiB"] = frame["measured_bytes"] / MIB
        columns["model MiB"] = frame["model_bytes"] / MIB
    columns |= {
        "perplexity": frame["perplexity"],
        "over full %": (100 * frame["increase"]).round(2) + 0.0,  # -0.0 has a sign
        "best for its size": _best(frame, choice),
    }
    if published:
        columns |= {
            "bits are": frame["planned_bytes"].isna().map({True: "the label", False: "exact"}),
            # where nothing was timed the file has 0
            "quantized in s": frame["quantize_seconds"].replace(0, None),
        }
    else:
        columns |= {
            "KL": frame["kl"],
            "top-1 %": 100 * frame["top1"],
            "tokens/s": frame["tokens_per_second"],
            "quantized in s": frame["quantize_seconds"],
            "when": frame["created"],
        }
    columns |= {"note": frame["note"], "method": frame["method"].map(_method_title)}
    columns |= {name: frame[name] for name in _MORE[1:-1]}
    columns |= {"run id": frame["run"], "evaluation": frame["evaluation"]}
    return pd.DataFrame(columns).sort_values("perplexity")


def known_nominal(choice: Choice) -> float:
    """Bytes that one bit per parameter takes in this model's linear weights, nominally."""
    row = choice.runs.iloc[0]
    return row["nominal_bytes"] / row["bits_per_param"]


def _best(frame: pd.DataFrame, choice: Choice) -> pd.Series:
    """Which runs no other beats, by the account of the chart, within each measurement."""
    size = choice.size.column if choice.size.column in frame else "bits_per_param"
    groups = frame.groupby(["corpus_sha256", "protocol", "tokens"], dropna=False)
    parts = [pareto(part[size], part["perplexity"]) for _, part in groups]
    return pd.concat(parts).reindex(frame.index) if parts else pd.Series(dtype=bool)


def chosen_columns(table: pd.DataFrame, choice: Choice) -> list[str]:
    """The columns that the person wants to see."""
    usual = [name for name in table.columns if name not in _MORE]
    if st.session_state.get("all_measurements"):
        usual += ["corpus", "protocol", "tokens"]
    with st.popover("Columns", icon=":material/view_column:"):
        chosen = st.multiselect(
            "Shown",
            list(table.columns),
            default=usual,
            key=f"columns-{choice.published}-{len(usual)}",
        )
    return [name for name in table.columns if name in chosen]


def _actions(here: Here, picked: pd.DataFrame, choice: Choice) -> None:
    """What can be done with the rows that are ticked."""
    if picked.empty:
        return
    runs = list(picked["run"].unique())
    with st.container(horizontal=True, vertical_alignment="center"):
        st.markdown(f"{words.plural(len(runs), 'run')} ticked")
        starred = bool(picked["starred"].all())
        if st.button("Take the star away" if starred else "Star", key="star_ticked"):
            for run in runs:
                here.store.star(run, not starred)
            st.rerun()
        if not choice.published and st.button("Delete", key="delete_ticked"):
            here.store.delete_runs(runs)
            st.rerun()


def offer_undo(here: Here) -> None:
    """Bring back what was deleted last; again, what was deleted before that."""
    gone = cached.deleted_runs(here.store)
    if gone.empty:
        return
    last = gone[gone["deleted"] == gone["deleted"].iloc[0]]
    more = f", and {len(gone) - len(last)} before" if len(gone) > len(last) else ""
    models = words.listed(sorted({str(name) for name in last["model"]}))
    with st.container(horizontal=True, vertical_alignment="center"):
        st.markdown(f"{words.plural(len(last), 'run')} of {words.literal(models)} deleted{more}.")
        if st.button("Undo", key="undo", icon=":material/undo:"):
            here.store.restore_runs(list(last["run"]))
            st.rerun()
