"""The Compare page's table: filter, star, delete and restore runs."""

from __future__ import annotations

import pandas as pd

from lsq_core import charts
from lsq_core.results.compare import pareto
from lsq_core.ui import cached_results, words
from lsq_core.ui.compare.export import table_downloads
from lsq_core.ui.compare.selection import Choice
from lsq_core.ui.page import PageContext
from lsq_core.ui.safe import st
from lsq_core.units import GIB, MIB

#: Number formats by column; the values still sort as numbers.
_FORMATS = {
    "bits": "%.4f",
    "MiB": "%.2f",
    "model MiB": "%.2f",
    "nominal GiB": "%.2f",
    "on disk GiB": "%.2f",
    "perplexity": "%.4f",
    "vs. full %": "%.2f",
    "KL": "%.4f",
    "top-1 %": "%.1f",
    "tokens/s": "%.0f",
    "quantize s": "%.1f",
}
#: Columns hidden by default.
_OPTIONAL_COLUMNS = (
    "method",
    "quantizer",
    "corpus",
    "protocol",
    "tokens",
    "device",
    "dtype",
    "run id",
)


def show(ctx: PageContext, choice: Choice) -> None:
    """Show the runs of the measurement or of the model; downloads hold the filtered rows."""
    st.subheader("Runs", anchor=False)
    frame = filter_runs(choice)
    table = build_table(frame, choice)
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
    if table.empty:
        st.caption("No results.")
    rows = [row for row in picked["selection"]["rows"] if row < len(table)]
    _actions(ctx, frame.loc[table.index[rows]], choice)
    with st.container(horizontal=True):
        table_downloads(shown, f"{choice.measurement} runs")
    render_undo(ctx)


def filter_runs(choice: Choice) -> pd.DataFrame:
    """Return the runs that match the user's filters."""
    all_measurements = st.session_state.get("all_measurements", False)
    frame = choice.model_runs if all_measurements else choice.runs
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
        "All corpora",
        key="all_measurements",
        help="Runs of this model on every corpus and protocol, which are not comparable.",
    )
    if text.strip():
        searchable = (
            frame[["label", "note", "device", "run", "saved_to"]].fillna("").agg(" ".join, axis=1)
        )
        frame = frame[searchable.str.contains(text.strip(), case=False, regex=False)]
    return frame


def _method_title(method: str) -> str:
    return charts.method_style(method).title


def build_table(frame: pd.DataFrame, choice: Choice) -> pd.DataFrame:
    """Return runs with columns for display, lowest perplexity first."""
    published = choice.published
    columns = {
        "★": frame["starred"].map({True: "★", False: ""}),
        "run": frame["label"],
        "bits": frame["bits_per_param"],
    }
    if published:
        bytes_per_bit = nominal_bytes_per_bit(choice)
        columns["nominal GiB"] = frame["bits_per_param"] * bytes_per_bit / GIB
        columns["on disk GiB"] = frame["model_bytes"] / GIB
    else:
        columns["MiB"] = frame["measured_bytes"] / MIB
        columns["model MiB"] = frame["model_bytes"] / MIB
    columns |= {
        "perplexity": frame["perplexity"],
        "vs. full %": (100 * frame["increase"]).round(2) + 0.0,  # + 0.0 removes the sign of -0.0
        "Pareto front": _pareto_mask(frame, choice),
    }
    if published:
        columns |= {
            "bits are": frame["planned_bytes"].isna().map({True: "the label", False: "exact"}),
            # 0 in the file means not timed
            "quantize s": frame["quantize_seconds"].replace(0, None),
        }
    else:
        columns |= {
            "KL": frame["kl"],
            "top-1 %": 100 * frame["top1"],
            "tokens/s": frame["tokens_per_second"],
            "quantize s": frame["quantize_seconds"],
            "when": frame["created"],
        }
    columns |= {"note": frame["note"], "method": frame["method"].map(_method_title)}
    columns |= {name: frame[name] for name in _OPTIONAL_COLUMNS[1:-1]}
    columns |= {"run id": frame["run"], "evaluation": frame["evaluation"]}
    return pd.DataFrame(columns).sort_values("perplexity")


def nominal_bytes_per_bit(choice: Choice) -> float:
    """Return the nominal bytes of this model's linear weights per bit per parameter."""
    row = choice.runs.iloc[0]
    return row["nominal_bytes"] / row["bits_per_param"]


def _pareto_mask(frame: pd.DataFrame, choice: Choice) -> pd.Series:
    """Return which runs are Pareto-optimal by the chart's size, within each measurement."""
    size = choice.size.column if choice.size.column in frame else "bits_per_param"
    groups = frame.groupby(["corpus_sha256", "protocol", "tokens"], dropna=False)
    parts = [pareto(part[size], part["perplexity"]) for _, part in groups]
    return pd.concat(parts).reindex(frame.index) if parts else pd.Series(dtype=bool)


def chosen_columns(table: pd.DataFrame, choice: Choice) -> list[str]:
    """Return the columns that the user chose."""
    default_columns = [name for name in table.columns if name not in _OPTIONAL_COLUMNS]
    if st.session_state.get("all_measurements"):
        default_columns += ["corpus", "protocol", "tokens"]
    with st.popover("Columns", icon=":material/view_column:"):
        chosen = st.multiselect(
            "Shown",
            list(table.columns),
            default=default_columns,
            key=f"columns-{choice.published}-{len(default_columns)}",
        )
    return [name for name in table.columns if name in chosen]


def _actions(ctx: PageContext, picked: pd.DataFrame, choice: Choice) -> None:
    """Render the actions for the selected rows."""
    if picked.empty:
        return
    runs = list(picked["run"].unique())
    with st.container(horizontal=True, vertical_alignment="center"):
        st.markdown(f"{words.plural(len(runs), 'run')} selected")
        starred = bool(picked["starred"].all())
        if st.button("Remove the star" if starred else "Star", key="star_selected"):
            for run in runs:
                ctx.store.star(run, not starred)
            st.rerun()
        if not choice.published and st.button("Delete", key="delete_selected"):
            ctx.store.delete_runs(runs)
            st.rerun()


def render_undo(ctx: PageContext) -> None:
    """Render a button that restores the runs deleted last; repeated clicks go further back."""
    deleted = cached_results.deleted_runs(ctx.store)
    if deleted.empty:
        return
    last = deleted[deleted["deleted"] == deleted["deleted"].iloc[0]]
    more = f", and {len(deleted) - len(last)} earlier" if len(deleted) > len(last) else ""
    models = words.listed(sorted({str(name) for name in last["model"]}))
    with st.container(horizontal=True, vertical_alignment="center"):
        st.markdown(f"{words.plural(len(last), 'run')} of {words.escape(models)} deleted{more}.")
        if st.button("Undo", key="undo", icon=":material/undo:"):
            ctx.store.restore_runs(list(last["run"]))
            st.rerun()
