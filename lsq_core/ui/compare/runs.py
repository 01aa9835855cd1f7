"""The Compare page's first view: all runs by size, and the one that is open."""

from __future__ import annotations

import math

import pandas as pd

from lsq_core import charts
from lsq_core.errors import InputError
from lsq_core.evaluation.bootstrap import compare_windows
from lsq_core.jobs import arguments
from lsq_core.results import export, report
from lsq_core.results.compare import (
    against_base,
    figure_6,
    plan_modules,
    settings_of,
    uniform_bases,
)
from lsq_core.ui import cached, words
from lsq_core.ui.compare.export import chart, offer, offer_table, stem
from lsq_core.ui.compare.selection import Choice, pair_of, written
from lsq_core.ui.page import Here
from lsq_core.ui.safe import st

#: What a run can be judged by, where it was measured.
QUALITIES = {"perplexity": charts.PERPLEXITY, "kl": charts.KL, "top1": charts.TOP1}
_QUALITY_NAMES = {"perplexity": "Perplexity", "kl": "KL", "top1": "Top-1 agreement"}


def show(here: Here, choice: Choice) -> None:
    """All runs by size beside the one that is open, and a pair of them below."""
    begin_open(choice)
    left, right = st.columns([2.1, 1], gap="medium")
    with left:
        show_chart(here, choice)
        show_pair(here, choice)
    with right:
        show_card(here, choice)


# --- the chart ------------------------------------------------------------------------------


def show_chart(here: Here, choice: Choice) -> None:
    """Quality against size; a click opens a run."""
    said, save = st.columns([4, 1.2], vertical_alignment="center")
    quality = choose_quality(choice, said)
    frame = choice.runs.dropna(subset=[quality.column])
    overlay = choice.overlay
    if overlay is not None:
        overlay = overlay.dropna(subset=[quality.column])
    figure = charts.perplexity_by_size(frame, pair_of(choice), choice.size, overlay, quality)
    name = f"{choice.measurement} {quality.column} by size"
    chart(figure, "runs", name, _alt(choice, quality), open_picked)
    with save:
        offer(figure, "runs", name, lambda: comparison(here, choice))
    say_what_is_drawn(choice, quality)


def choose_quality(choice: Choice, place: object) -> charts.Quality:
    """What is drawn upwards: perplexity, or what else these runs were measured by."""
    there = [name for name, q in QUALITIES.items() if choice.runs[q.column].notna().any()]
    if len(there) < 2:
        place.caption("Click a point to open its run.")
        return charts.PERPLEXITY
    chosen = place.segmented_control(
        "Judged by",
        there,
        default=there[0],
        format_func=_QUALITY_NAMES.get,
        key="quality",
        required=True,
        label_visibility="collapsed",
        persist_state="session",
    )
    return QUALITIES[chosen]


def _alt(choice: Choice, quality: charts.Quality) -> str:
    best = choice.best
    return (
        f"{words.plural(len(choice.runs), 'run')}: {quality.title} against {choice.size.title}. "
        f"Lowest perplexity within the limit: {best['label']}, {best['perplexity']:.4f} at "
        f"{written(best[choice.size.column], choice.size)}."
    )


def open_picked() -> None:
    """Open the run whose point was clicked; a click beside the points keeps what is open."""
    points = st.session_state["runs"]["selection"]["points"]
    if points and "customdata" in points[0]:
        picked = points[0]["customdata"]  # label and evaluation; Streamlit may name them by number
        st.session_state["opened"] = list(picked.values() if isinstance(picked, dict) else picked)[
            1
        ]


def say_what_is_drawn(choice: Choice, quality: charts.Quality) -> None:
    """What the chart leaves for the person to know."""
    said = []
    missing = int(choice.runs[quality.column].isna().sum())
    if missing:
        said.append(f"{words.plural(missing, 'run')} without this figure.")
    if choice.overlay is not None:
        row = choice.overlay.iloc[0]
        said.append(
            f"Hollow: {words.plural(len(choice.overlay), 'run')} of {words.literal(row['model'])}, "
            f"{'measured here' if choice.published else 'published'}, by the bits that both have. "
            "The hash of the published text isn't told, so the two texts may differ."
        )
    said += _said_of_published(choice) if choice.published else []
    if said:
        st.caption(" ".join(said))


def _said_of_published(choice: Choice) -> list[str]:
    frame, said = choice.runs, []
    limit = charts.view_limit(frame["perplexity"])
    above = int((frame["perplexity"] > limit).sum())
    if above:
        said.append(
            f"{words.plural(above, 'run')} above a perplexity of {limit:.2f} out of view: "
            "double-click the chart to see all."
        )
    labels = int(frame["planned_bytes"].isna().sum())
    if labels and choice.size != charts.STORED:
        said.append(
            f"{words.plural(labels, 'run')} without a published plan are placed by the bits of "
            "their label."
        )
    return said


def comparison(here: Here, choice: Choice) -> str:
    """The comparison as one page: the figures that these runs allow, and their table."""
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
        gains = against_base(frame, base)
        figures["Gain for bits"] = charts.gain_for_bits(gains, f"uniform {name}")
    counts = figure_6(choice.of_model)
    for equal, part in counts[counts["enough"]].groupby("equal"):
        heading = f"Win, tie, loss at {'equal bytes' if equal else 'the same label'}"
        figures[heading] = charts.win_tie_loss_bars(part)
    tokens = "" if pd.isna(first["tokens"]) else f", {first['tokens']:,} tokens"
    under = (
        f"{first['model']} ({first['fingerprint']}) on {first['corpus']} "
        f"(SHA-256 {first['corpus_sha256']}), {first['protocol']}{tokens}: "
        f"{words.plural(len(frame), 'run')}, "
        + ("published by the methods' authors." if choice.published else "measured.")
    )
    columns = ["run", "label", "method", "bits_per_param", "measured_bytes", "model_bytes"]
    columns += ["perplexity", "increase", "kl", "top1", "quantizer", "device", "starred", "note"]
    title = f"Best: {best['label']}, perplexity {best['perplexity']:.4f}"
    table = frame.sort_values("perplexity")[columns].dropna(axis=1, how="all")
    return report.comparison_report(title, under, figures, table)


# --- the run that is open -------------------------------------------------------------------


def begin_open(choice: Choice) -> None:
    """The best run is open until another is picked, and when the picked one is not here."""
    if st.session_state.get("opened") not in set(choice.runs["evaluation"]):
        st.session_state["opened"] = choice.best["evaluation"]


def show_card(here: Here, choice: Choice) -> None:
    """One run: its figures, what a person says of it, how it was made."""
    names = choice.names
    opened = st.selectbox(
        "Open run", list(names), format_func=names.get, key="opened", persist_state="session"
    )
    record = cached.record(here.store, opened)
    run = record["run"]
    with st.container(horizontal=True):
        _actions(here, choice, record)
    facts = report.figures_of(record)
    short = [value.partition(" (")[0] for value in facts.values()]  # the card is narrow
    st.dataframe(
        pd.DataFrame({"": list(facts), "value": short}),
        hide_index=True,
        height="content" if len(facts) <= 6 else 250,
        key="card-figures",
        alt=", ".join(f"{name} {value}" for name, value in facts.items()),
    )
    _note(here, record)
    with st.expander("Settings and provenance"):
        settings = settings_of(record)
        st.table(pd.Series(settings, name="").rename_axis("setting"))
    modules = plan_modules(record["plan"].get("content") or {})
    if modules.empty:
        st.caption("Its plan was not published.")
        return
    counts = modules["config"].value_counts()
    plan = ", ".join(f"{number} × {name}" for name, number in sorted(counts.items()))
    with st.expander(f"Plan: {plan}"):
        st.dataframe(modules, hide_index=True, key="card-plan")
        offer_table(modules, f"plan of run {run['id']}")


def _actions(here: Here, choice: Choice, record: dict) -> None:
    """Star, export and delete, in a row."""
    run = record["run"]
    starred = bool(run["starred"])
    if st.button(
        "★" if starred else "☆",
        key="star",
        help="Take the star away" if starred else "Star this run",
    ):
        here.store.star(run["id"], not starred)
        st.rerun()
    offer_run(here, choice, record)
    if run["origin"] != "published" and st.button(
        "Delete",
        key="delete",
        help="With all its evaluations; Undo, below the table, brings it back.",
    ):
        here.store.delete_runs([run["id"]])
        st.rerun()


def _note(here: Here, record: dict) -> None:
    run = record["run"]
    key = f"note-{run['id']}"
    typed = st.text_input(
        "Note", value=run["note"], key=key, placeholder="Why it is worth remembering"
    )
    if typed.strip() != run["note"]:
        here.store.annotate(run["id"], typed)
        st.rerun()


def offer_run(here: Here, choice: Choice, record: dict) -> None:
    """What a run can be taken along as."""
    run = record["run"]
    command = arguments.reproducing(record)
    name = stem(f"run-{run['id']}")

    def whole_report() -> str:
        beside = charts.perplexity_by_size(
            choice.runs, [record["evaluation"]["id"]], choice.size, choice.overlay
        )
        info = cached.kept_model(here.store, run["fingerprint"])
        return report.run_report(record, info.matrices, command, beside)

    with st.popover("Export", icon=":material/download:"):
        st.download_button(
            "Report (HTML)", whole_report, f"{name}.html", key="save-report", on_click="ignore"
        )
        st.download_button(
            "BibTeX",
            lambda: export.bibtex(record),
            f"{name}.bib",
            key="save-bibtex",
            on_click="ignore",
        )
        st.caption("The command line that does it again")
        st.code(command, language="shell", wrap_lines=True)


# --- two runs -------------------------------------------------------------------------------


def show_pair(here: Here, choice: Choice) -> None:
    """The difference of two runs, with its paired bootstrap interval where windows are kept."""
    if len(choice.runs) < 2:
        st.caption("With a second run of this measurement, the two can be compared in pairs here.")
        return
    names = choice.names
    left, right, word = st.columns([1.2, 1.2, 1.6], vertical_alignment="bottom")
    with left:
        a = _pick("Run", "run_a", names)
    with right:
        b = _pick("against", "run_b", names)
    with word:
        if choice.published:
            rows = choice.runs.set_index("evaluation")
            st.markdown(published_difference(rows.loc[a], rows.loc[b]))
        else:
            st.markdown(difference(here, a, b))


def _pick(label: str, key: str, labels: dict[str, str]) -> str:
    return st.selectbox(
        label, list(labels), format_func=labels.get, key=key, persist_state="session"
    )


def published_difference(a: pd.Series, b: pd.Series) -> str:
    """How two published runs differ, in perplexity and in bits; there are no windows to pair."""
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


def difference(here: Here, a: str, b: str) -> str:
    """How two evaluations differ, in a sentence."""
    if a == b:
        return "Choose two different runs."
    try:
        nll, counts = here.store.windows(a)
        other, other_counts = here.store.windows(b)
    except InputError as error:
        return words.literal(str(error))
    if counts.shape != other_counts.shape or (counts != other_counts).any():
        return "The two runs scored different windows, so they are not compared."
    found = compare_windows(nll, other, counts)
    if math.isnan(found.low):
        return (
            f"Perplexity {words.signed_percent(found.relative, 2)}; too few windows for an "
            "interval, so neither is called better."
        )
    spread = words.interval(found.low, found.high)
    verdict = "**tie**" if found.tie else "**lower**" if found.relative < 0 else "**higher**"
    return f"Perplexity {words.signed_percent(found.relative, 2)} (95 %: {spread}): {verdict}."
