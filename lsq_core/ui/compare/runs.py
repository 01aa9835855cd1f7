"""The Compare page's first view: all runs by size, and the open run."""

from __future__ import annotations

import math

import pandas as pd

from lsq_core import charts
from lsq_core.errors import InputError
from lsq_core.evaluation.noise import describe_unknown, format_noise
from lsq_core.jobs import arguments
from lsq_core.planning.frame import plan_to_frame
from lsq_core.results import card, export, report
from lsq_core.results.compare import (
    DETECTION_WORTH,
    figure_6,
    relative_to_base,
    run_settings,
    uniform_bases,
)
from lsq_core.results.gains import is_ablation
from lsq_core.ui import cached_results, words
from lsq_core.ui.compare.export import file_stem, render_chart, render_save_menu, table_downloads
from lsq_core.ui.compare.selection import Choice, selected_pair, size_text
from lsq_core.ui.compare.tasks import show_tasks
from lsq_core.ui.export_plan import render_run_plan_export
from lsq_core.ui.page import PageContext
from lsq_core.ui.safe import st

#: Shown if runs lie outside a chart's initial range.
ALL_RUNS_NOTE = "Double-click the chart to see all runs."
#: Quality measures of runs, available if measured.
QUALITIES = {"perplexity": charts.PERPLEXITY, "kl": charts.KL, "top1": charts.TOP1}
_QUALITY_NAMES = {"perplexity": "Perplexity", "kl": "KL", "top1": "Top-1 agreement"}


def show(ctx: PageContext, choice: Choice) -> None:
    """Show all runs by size, the details of the open run, and a comparison of two runs below."""
    init_open_run(choice)
    left, right = st.columns([2.1, 1], gap="medium")
    with left:
        show_chart(ctx, choice)
        show_pair(ctx, choice)
    with right:
        show_run_details(ctx, choice)


# --- the chart ------------------------------------------------------------------------------


def show_chart(ctx: PageContext, choice: Choice) -> None:
    """Show quality against size; a click opens a run."""
    controls, save = st.columns([4, 1.2], vertical_alignment="center")
    quality = choose_quality(choice, controls)
    frame = choice.runs.dropna(subset=[quality.column])
    overlay = choice.overlay
    if overlay is not None:
        overlay = overlay.dropna(subset=[quality.column])
    files = gguf_files(ctx, choice)
    figure = charts.perplexity_by_size(
        frame, selected_pair(choice), choice.size, overlay, quality, files
    )
    name = f"{choice.measurement} {quality.column} by size"
    render_chart(figure, "runs", name, _alt(choice, quality), open_clicked_run)
    with save:
        render_save_menu(figure, "runs", name, lambda: build_comparison_report(ctx, choice))
    render_chart_notes(choice, quality, files)


def gguf_files(ctx: PageContext, choice: Choice) -> pd.DataFrame:
    """Return GGUF files evaluated in the same way as the runs; none for published runs."""
    if choice.published:
        return pd.DataFrame()
    return cached_results.gguf_baselines(ctx.store, choice.runs["evaluation"].iloc[0])


def choose_quality(choice: Choice, container: object) -> charts.QualityMeasure:
    """Return the quality to draw: perplexity or another one that these runs have."""
    available = [name for name, q in QUALITIES.items() if choice.runs[q.column].notna().any()]
    if len(available) < 2:
        container.caption("Click a point to open its run.")
        return charts.PERPLEXITY
    chosen = container.segmented_control(
        "Judged by",
        available,
        default=available[0],
        format_func=_QUALITY_NAMES.get,
        key="quality",
        required=True,
        label_visibility="collapsed",
        persist_state="session",
    )
    return QUALITIES[chosen]


def _alt(choice: Choice, quality: charts.QualityMeasure) -> str:
    best = choice.best
    return (
        f"{words.plural(len(choice.runs), 'run')}: {quality.title} against {choice.size.title}. "
        f"Lowest perplexity within the limit: {best['label']}, {best['perplexity']:.4f} at "
        f"{size_text(best[choice.size.column], choice.size)}."
    )


def open_clicked_run() -> None:
    """Open the run whose point was clicked; other clicks change nothing."""
    points = st.session_state["runs"]["selection"]["points"]
    if points and "customdata" in points[0]:
        customdata = points[0][
            "customdata"
        ]  # label and evaluation, which Streamlit may key by number
        st.session_state["opened"] = list(
            customdata.values() if isinstance(customdata, dict) else customdata
        )[1]


def render_chart_notes(choice: Choice, quality: charts.QualityMeasure, files: pd.DataFrame) -> None:
    """Render notes on the chart."""
    notes = []
    if len(files) and choice.size == charts.MEASURED and quality == charts.PERPLEXITY:
        notes.append("GGUF files are placed at the size of the same weights, without embeddings.")
    missing = int(choice.runs[quality.column].isna().sum())
    if missing:
        notes.append(f"{words.plural(missing, 'run')} without this figure.")
    if choice.overlay is not None:
        row = choice.overlay.iloc[0]
        notes.append(
            f"Hollow: {words.plural(len(choice.overlay), 'run')} of {words.escape(row['model'])}, "
            f"{'measured here' if choice.published else 'published'}, by nominal bits. "
            "The hash of the published corpus is unknown, so the two corpora may differ."
        )
    notes += _published_notes(choice) if choice.published else []
    known = choice.runs.dropna(subset=[quality.column])
    if charts.size_view(known, choice.size, quality, files).outside:
        notes.append(ALL_RUNS_NOTE)
    notes.append(ablation_note(choice.runs))
    notes.append(noise_note(choice.runs))
    notes = [note for note in notes if note]
    if notes:
        st.caption(" ".join(notes))


def _published_notes(choice: Choice) -> list[str]:
    labels = int(choice.runs["planned_bytes"].isna().sum())
    if not labels or choice.size == charts.STORED:
        return []
    return [
        f"{words.plural(labels, 'run')} without a published plan are placed by the bits of "
        "their label."
    ]


def ablation_note(runs: pd.DataFrame) -> str:
    """Return a note explaining ablations and boosts by rank, or '' if there are none."""
    notes = []
    if runs["method"].map(is_ablation).any():
        notes.append(
            "An ablation (faded) is a control: it boosts as many layers as its method, drawn at "
            "random from those that Algorithm 1 does not flag."
        )
    if runs["method"].isin([rank for _, rank in DETECTION_WORTH]).any():
        notes.append(
            "A boost by rank takes the same number of layers, those with the highest scores; the "
            "difference shows what Algorithm 1's detection is worth."
        )
    return " ".join(notes)


def noise_note(runs: pd.DataFrame) -> str:
    """Return a note on how far arithmetic alone moves these figures, or how to measure it."""
    measured = runs[runs["origin"] != "published"]
    if measured.empty:
        return ""
    known = measured.dropna(subset=["noise"])
    if len(known):
        largest = known.loc[known["noise"].idxmax()]
        return (
            f"Numerical noise changes these perplexities by {format_noise(largest['noise'])} and "
            f"KL divergences by {format_noise(largest['noise_kl'])}."
        )
    first = measured.iloc[0]
    unknown = describe_unknown(first["model"], first["protocol"], first["dtype"])
    return f"The numerical noise of these figures is {words.escape(unknown)}."


def build_comparison_report(ctx: PageContext, choice: Choice) -> str:
    """Return the comparison as an HTML page: the available figures and a table of the runs."""
    frame, best = choice.runs, choice.best
    first = frame.iloc[0]
    figures = {
        f"{_QUALITY_NAMES[name]} by size": charts.perplexity_by_size(
            frame.dropna(subset=[quality.column]), (), choice.size, quality=quality
        )
        for name, quality in QUALITIES.items()
        if frame[quality.column].notna().any()
    }
    bases = uniform_bases(frame)
    if bases:
        name, base = next(iter(bases.items()))
        gains = relative_to_base(frame, base)
        figures["Gain for bits"] = charts.gain_for_bits(gains, f"uniform {name}")
    counts = figure_6(choice.model_runs)
    for equal, part in counts[counts["enough"]].groupby("equal"):
        heading = f"Win, tie, loss at {'equal bytes' if equal else 'the same label'}"
        figures[heading] = charts.win_tie_loss_bars(part)
    tokens = "" if pd.isna(first["tokens"]) else f", {first['tokens']:,} tokens"
    caption = (
        f"{first['model']} ({first['fingerprint']}) on {first['corpus']} "
        f"(SHA-256 {first['corpus_sha256']}), {first['protocol']}{tokens}: "
        f"{words.plural(len(frame), 'run')}, "
        + ("published by the methods' authors." if choice.published else "measured.")
    )
    columns = ["run", "label", "method", "bits_per_param", "measured_bytes", "model_bytes"]
    columns += ["perplexity", "increase", "kl", "top1", "quantizer", "device", "starred", "note"]
    title = f"Best: {best['label']}, perplexity {best['perplexity']:.4f}"
    table = frame.sort_values("perplexity")[columns].dropna(axis=1, how="all")
    return report.comparison_report(title, caption, figures, table)


# --- the open run ---------------------------------------------------------------------------


def init_open_run(choice: Choice) -> None:
    """Open the headline's run, unless the open run is among the runs shown."""
    if st.session_state.get("opened") not in set(choice.runs["evaluation"]):
        st.session_state["opened"] = choice.headline_run


def show_run_details(ctx: PageContext, choice: Choice) -> None:
    """Show a run's figures, note, task results, settings and plan."""
    names = choice.names
    opened = st.selectbox(
        "Open run", list(names), format_func=names.get, key="opened", persist_state="session"
    )
    record = cached_results.record(ctx.store, opened)
    run = record["run"]
    with st.container(horizontal=True):
        _actions(ctx, choice, record)
    facts = report.format_run_figures(record)
    short_values = [value.partition(" (")[0] for value in facts.values()]  # the card is narrow
    st.dataframe(
        pd.DataFrame({"": list(facts), "value": short_values}),
        hide_index=True,
        height="content" if len(facts) <= 6 else 250,
        key="card-figures",
        alt=", ".join(f"{name} {value}" for name, value in facts.items()),
    )
    _note(ctx, record)
    if run["origin"] != "published":
        show_tasks(ctx.store, run["id"], run["fingerprint"])
    with st.expander("Settings and provenance"):
        settings = run_settings(record)
        st.table(pd.Series(settings, name="").rename_axis("setting"))
    modules = plan_to_frame(record["plan"].get("content") or {})
    if modules.empty:
        st.caption("The plan of this run was not published.")
        return
    counts = modules["config"].value_counts()
    plan = ", ".join(f"{number} × {name}" for name, number in sorted(counts.items()))
    with st.expander(f"Plan: {plan}"):
        st.dataframe(modules, hide_index=True, key="card-plan")
        table_downloads(modules, f"plan of run {run['id']}")


def _actions(ctx: PageContext, choice: Choice, record: dict) -> None:
    """Render the star, export and delete buttons."""
    run = record["run"]
    starred = bool(run["starred"])
    if st.button(
        "★" if starred else "☆",
        key="star",
        help="Remove the star" if starred else "Star this run",
    ):
        ctx.store.star(run["id"], not starred)
        st.rerun()
    render_run_export(ctx, choice, record)
    if run["origin"] != "published" and st.button(
        "Delete",
        key="delete",
        help="Deletes the run and its evaluations; Undo, below the table, restores them.",
    ):
        ctx.store.delete_runs([run["id"]])
        st.rerun()


def _note(ctx: PageContext, record: dict) -> None:
    run = record["run"]
    key = f"note-{run['id']}"
    typed = st.text_input("Note", value=run["note"], key=key, placeholder="Add a note")
    if typed.strip() != run["note"]:
        ctx.store.annotate(run["id"], typed)
        st.rerun()


def render_run_export(ctx: PageContext, choice: Choice, record: dict) -> None:
    """Render the export menu of a run."""
    run = record["run"]
    command = arguments.reproduce_command(record)
    name = file_stem(f"run-{run['id']}")

    info = cached_results.stored_model(ctx.store, run["fingerprint"])

    def build_report() -> str:
        beside = charts.perplexity_by_size(
            choice.runs, [record["evaluation"]["id"]], choice.size, choice.overlay
        )
        return report.run_report(record, info.matrices, command, beside)

    evaluation = record["evaluation"]["id"]
    with st.popover("Export", icon=":material/download:"):
        st.download_button(
            "Result card (PNG)",
            lambda: card.card_png(ctx.store, evaluation),
            f"{name}-card.png",
            "image/png",
            key="save-card-png",
            on_click="ignore",
            help="The plan with its size, perplexity and gain as one picture, 1200 × 630.",
        )
        st.download_button(
            "Result card (HTML)",
            lambda: card.card_html(ctx.store, evaluation),
            f"{name}-card.html",
            key="save-card-html",
            on_click="ignore",
        )
        st.download_button(
            "Report (HTML)", build_report, f"{name}.html", key="save-report", on_click="ignore"
        )
        st.download_button(
            "BibTeX",
            lambda: export.bibtex(record),
            f"{name}.bib",
            key="save-bibtex",
            on_click="ignore",
        )
        st.caption("Command line to reproduce this run")
        st.code(command, language="shell", wrap_lines=True)
        render_run_plan_export(record, info)


# --- two runs -------------------------------------------------------------------------------


def show_pair(ctx: PageContext, choice: Choice) -> None:
    """Show the difference of two runs, with its paired bootstrap interval if windows are stored."""
    if len(choice.runs) < 2:
        st.caption("Two runs of this measurement can be compared here once there is a second one.")
        return
    names = choice.names
    left, right, result_column = st.columns([1.2, 1.2, 1.6], vertical_alignment="bottom")
    with left:
        a = _pick("Run", "run_a", names)
    with right:
        b = _pick("against", "run_b", names)
    with result_column:
        if choice.published:
            rows = choice.runs.set_index("evaluation")
            st.markdown(published_difference(rows.loc[a], rows.loc[b]))
        else:
            st.markdown(difference(ctx, a, b))


def _pick(label: str, key: str, labels: dict[str, str]) -> str:
    return st.selectbox(
        label, list(labels), format_func=labels.get, key=key, persist_state="session"
    )


def published_difference(a: pd.Series, b: pd.Series) -> str:
    """Describe how two published runs, which have no windows, differ in perplexity and bits."""
    if a.name == b.name:
        return "Choose two different runs."
    perplexity = words.signed_percent(a["perplexity"] / b["perplexity"] - 1)
    bits = words.signed_percent(a["bits_per_param"] / b["bits_per_param"] - 1)
    labelled = (
        " (as labelled)" if pd.isna(a["planned_bytes"]) or pd.isna(b["planned_bytes"]) else ""
    )
    return (
        f"Perplexity **{perplexity}** ({a['perplexity']:.4f} against {b['perplexity']:.4f}) for "
        f"**{bits}** bits{labelled} ({a['bits_per_param']:.4f} against {b['bits_per_param']:.4f}). "
        "No interval: published without windows."
    )


def difference(ctx: PageContext, a: str, b: str) -> str:
    """Describe the difference between two evaluations in a sentence."""
    if a == b:
        return "Choose two different runs."
    try:
        found = cached_results.run_difference(ctx.store, a, b)
    except InputError as error:
        return words.escape(str(error))
    result, number = found.difference, words.plural(found.windows, "window")
    if math.isnan(result.low):
        return (
            f"Perplexity {words.signed_percent(result.relative, 2)}; too few windows for an "
            f"interval (n = {number}), so neither is significantly better."
        )
    interval_text = words.interval(result.low, result.high)
    verdict = "**tie**" if found.is_tie else "**lower**" if result.relative < 0 else "**higher**"
    if found.is_noise:
        verdict += f", within numerical noise ({format_noise(found.noise)})"
    return (
        f"Perplexity {words.signed_percent(result.relative, 2)} (95 % interval {interval_text}, "
        f"n = {number}): {verdict}."
    )
