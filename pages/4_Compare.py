"""Every run beside the others: perplexity against size, and any two of them in pairs."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pandas as pd
import streamlit as st

from lsq_core import charts
from lsq_core.compare import (
    WinTieLoss,
    largest_gain,
    pareto,
    win_tie_loss,
    win_tie_loss_at_equal_bytes,
)
from lsq_core.config import GIB, MIB, format_bytes
from lsq_core.evaluate import compare_windows
from lsq_core.store import PUBLISHED
from lsq_core.ui import known, state, words
from lsq_core.ui.page import Here, headline, next_step, page

#: What has to agree for two figures to be in one chart.
_SAME = ["fingerprint", "corpus_sha256", "protocol", "tokens"]
#: The accounts of size that published runs have; measured ones have their measured bytes.
_PUBLISHED_SIZES = {
    size.unit + size.column: size for size in (charts.NOMINAL, charts.BITS, charts.STORED)
}
#: Of how many runs on there is a choice among their methods.
_MANY = 40


@dataclass(frozen=True, eq=False)
class Choice:
    """What is compared: the runs of one measurement, the account of their size, and the limit."""

    #: Every run of the model; those of ``runs`` are of one corpus and protocol.
    of_model: pd.DataFrame
    runs: pd.DataFrame
    size: charts.Size
    published: bool
    #: Runs of the other origin, drawn over these in the chart and nowhere else.
    overlay: pd.DataFrame | None = None


def compare(here: Here) -> None:
    """The best run under a size, all runs of one measurement, and a pair of them."""
    marks = models_with_runs(here)
    if marks.empty:
        headline("There is nothing to compare yet.", "Each run appears here with its size.")
        next_step("pages/2_Plan.py", "Make a plan and run it")
        return
    first = st.container()
    left, middle, right = st.columns([1.2, 2, 1.4])
    with left:
        mark = choose_model(here, marks)
    if mark is None:
        with first:
            headline(
                f"There are no runs of {words.literal(here.source.name)} to compare.",
                "Models that have some can be chosen below.",
            )
        return
    choice = choose(here, mark, middle, right)
    frame = choice.runs
    with first:
        say_what_is_best(choice)
    begin_pair(choice)
    pair = [st.session_state["run_a"], st.session_state["run_b"]] if len(frame) > 1 else []
    st.plotly_chart(
        charts.perplexity_by_size(frame, pair, choice.size, choice.overlay),
        config=charts.CONFIG,
        key="runs",
    )
    say_what_is_drawn(choice)
    show_pair(here, choice)
    if choice.published:
        show_win_tie_loss(choice.of_model)
    show_table(choice)


# --- choosing -------------------------------------------------------------------------------


def models_with_runs(here: Here) -> pd.Series:
    """The models that have runs, measured ones first: fingerprint to the name shown."""
    both = [known.results(here.store, origin) for origin in ("measured", "published")]
    models = pd.concat(
        [frame[["fingerprint", "model"]] for frame in both if not frame.empty]
        or [both[0][["fingerprint", "model"]]]
    )
    return models.drop_duplicates("fingerprint").set_index("fingerprint")["model"]


def choose_model(here: Here, names: pd.Series) -> str | None:
    """The model that is compared: the page's own where it has runs, or what the person takes.

    Published runs are never shown in the place of a model that has none.
    """
    published = known.published(here.store, here.source)
    ours = names.index == published.fingerprint if published else names == here.source.name
    if ours.any():
        index = int(ours.argmax())
    else:
        index = None if published or names.index[0].startswith(PUBLISHED) else 0
    return st.selectbox(
        "Model",
        list(names.index),
        index=index,
        format_func=lambda mark: names[mark] or mark[:12],
        placeholder="Choose one with runs",
    )


def choose(here: Here, mark: str, middle: object, right: object) -> Choice:
    """The model's runs on one corpus by one protocol, as the person filters them."""
    published = mark.startswith(PUBLISHED)
    everything = known.results(here.store, "published" if published else "measured")
    of_model = everything[everything["fingerprint"] == mark]
    keys = ["|".join(map(str, row)) for row in of_model[_SAME].itertuples(index=False)]
    groups = dict(list(of_model.groupby(keys, sort=False)))
    key = middle.selectbox("Measured on", list(groups), format_func=lambda k: _measure(groups[k]))
    frame, size = groups[key], charts.MEASURED
    if published:
        frame, size = published_view(here, mark, frame)
    overlay = choose_overlay(here, frame, published)
    if overlay is not None:
        size = charts.BITS  # the one account that both have
    frame = frame.dropna(subset=[size.column])
    with right:
        frame = frame.assign(fits=frame[size.column] <= _limit(frame, size))
    return Choice(of_model, labelled(frame), size, published, overlay)


def published_view(here: Here, mark: str, frame: pd.DataFrame) -> tuple[pd.DataFrame, charts.Size]:
    """Published runs of the methods chosen, with their nominal bytes, and the account to draw."""
    linear = known.models(here.store, "published").set_index("fingerprint")["linear_parameters"]
    frame = frame.assign(nominal_bytes=frame["bits_per_param"] * linear[mark] / 8)
    left, right = st.columns([3.2, 1.4])
    methods = list(frame["method"].value_counts().index)
    chosen = methods
    if len(frame) > _MANY:
        chosen = left.pills(
            "Methods",
            methods,
            selection_mode="multi",
            default=methods,
            format_func=lambda method: charts.method_style(method).title,
            key=f"methods-{mark}",
        )
    account = right.selectbox(
        "Size",
        list(_PUBLISHED_SIZES),
        format_func=lambda name: f"{_PUBLISHED_SIZES[name].title} ({_PUBLISHED_SIZES[name].unit})",
        key="account",
        persist_state="session",
        help="Nominal sizes are the papers' formula, metadata included. Runs whose plan was not "
        "published are placed by the bits they are labelled with.",
    )
    frame = frame[frame["method"].isin(chosen or methods)]
    return frame, _PUBLISHED_SIZES[account]


def choose_overlay(here: Here, frame: pd.DataFrame, published: bool) -> pd.DataFrame | None:
    """Runs of the other origin on the corpus and by the protocol of the same names, if wanted."""
    others = known.results(here.store, "measured" if published else "published")
    first = frame.iloc[0]
    same = (others["corpus"] == first["corpus"]) & (others["protocol"] == first["protocol"])
    names = others[same].drop_duplicates("fingerprint").set_index("fingerprint")["model"]
    if names.empty:
        return None
    mark = st.selectbox(
        f"Overlay {'your own' if published else 'published'} runs",
        [None, *names.index],
        format_func=lambda mark: "none" if mark is None else names[mark],
        key=f"overlay-{'measured' if published else 'published'}",
    )
    return labelled(others[same & (others["fingerprint"] == mark)]) if mark else None


def _limit(frame: pd.DataFrame, size: charts.Size) -> float:
    """The largest size, or a smaller one that the person sets; in the column's own unit."""
    values = frame[size.column].astype(float) / size.scale
    low, high = round(values.min(), 2), round(values.max() + 0.005, 2)
    if values.max() - values.min() < 0.01:
        return float(values.max() * size.scale)
    chosen = st.slider(f"Best within ({size.unit})", low, high, high, step=0.01, format="%.2f")
    return (chosen + 0.005) * size.scale


def _measure(part: pd.DataFrame) -> str:
    row = part.iloc[0]
    number = words.plural(len(part), "run")
    if pd.isna(row["tokens"]):
        return f"{row['corpus']}, {row['protocol']}, as published ({number})"
    cut = ", cut" if row["truncated"] else ""
    return f"{row['corpus']}, {row['protocol']}, {row['tokens']:,} tokens{cut} ({number})"


def labelled(frame: pd.DataFrame) -> pd.DataFrame:
    """With a name for each run that a person can tell from the others."""
    return frame.assign(label=[_label(row) for row in frame.to_dict("records")])


def _label(row: dict) -> str:
    title = charts.method_style(row["method"]).title
    asked = json.loads(row["request"]) if isinstance(row["request"], str) else {}
    parts = [f"{title} {row['bits_per_param']:.2f}"]
    if state.boosts(row["method"]):
        parts.append(f"base {row['base']}")
        parts.append(f"+{asked.get('boost_stop', 0)}")
        parts += [f"top {asked['top_m']}"] if asked.get("top_m") else []
        parts += [f"seed {asked['seed']}"] if state.is_ablation(row["method"]) else []
    if row["origin"] != "published":  # those are all by one quantizer, grid and metadata
        parts += [row["quantizer"]]
        parts += ["fp16 metadata"] if row["metadata"] == "fp16" else []
        parts += ["axis 0"] if row["axis"] == 0 else []
    return ", ".join(parts)


def say_what_is_best(choice: Choice) -> None:
    """The first line: the lowest perplexity of the runs that fit."""
    frame, size = choice.runs, choice.size
    fitting = frame[frame["fits"]]
    best = fitting.loc[fitting["perplexity"].idxmin()]
    name = f"{charts.method_style(best['method']).title} {best['bits_per_param']:.2f}"
    under = [f"{_written(best[size.column], size)} {'measured' if size == charts.MEASURED else ''}"]
    if pd.notna(best["perplexity_full"]):
        more = words.signed_percent(best["increase"])
        under.append(f"full precision {best['perplexity_full']:.2f}, so {more}")
    under.append(f"{words.plural(len(frame), 'run')} of this measurement")
    if choice.published:
        under.append("published by the methods' authors, not measured here")
    headline(
        f"Best within {_written(fitting[size.column].max(), size)}: {name}, "
        f"perplexity {best['perplexity']:.2f}.",
        " · ".join(part.strip() for part in under),
    )


def _written(value: float, size: charts.Size) -> str:
    return f"{value:.2f} bits" if size.scale == 1 else format_bytes(value)


def say_what_is_drawn(choice: Choice) -> None:
    """What the chart leaves for the person to know."""
    said = []
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


def begin_pair(choice: Choice) -> None:
    """Start with the two newest runs, and again where the chosen ones aren't of this chart.

    Published ones are all of one day: there it is the run that gains most over uniform.
    """
    frame = choice.runs
    pair = (largest_gain(frame) if choice.published else None) or list(frame["evaluation"][:2])
    chosen = {st.session_state.get(key) for key in ("run_a", "run_b")}
    if len(frame) > 1 and not chosen <= set(frame["evaluation"]):
        st.session_state["run_a"], st.session_state["run_b"] = pair


def show_pair(here: Here, choice: Choice) -> None:
    """The difference of two runs, with its paired bootstrap interval where windows are kept."""
    frame = choice.runs
    if len(frame) < 2:
        st.caption("With a second run of this measurement, the two can be compared in pairs here.")
        return
    frame = frame.sort_values(["method", "bits_per_param"]) if choice.published else frame
    labels = dict(zip(frame["evaluation"], frame["label"], strict=True))
    if not choice.published:
        times = frame["created"].dt.strftime("%H:%M:%S")
        labels = {e: f"{labels[e]} · {t}" for e, t in zip(frame["evaluation"], times, strict=True)}
    left, right, word = st.columns([1.2, 1.2, 1.6], vertical_alignment="bottom")
    with left:
        a = _pick("Run", "run_a", labels)
    with right:
        b = _pick("against", "run_b", labels)
    with word:
        if choice.published:
            rows = frame.set_index("evaluation")
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
    nll, counts = here.store.windows(a)
    other, other_counts = here.store.windows(b)
    if counts.shape != other_counts.shape or (counts != other_counts).any():
        return "The two runs scored different windows, so they are not compared."
    found = compare_windows(nll, other, counts)
    spread = words.interval(found.low, found.high)
    verdict = "**tie**" if found.tie else "**lower**" if found.relative < 0 else "**higher**"
    return f"Perplexity {words.signed_percent(found.relative, 2)} (95 %: {spread}): {verdict}."


# --- win, tie, loss -------------------------------------------------------------------------

#: The comparisons of [A] Fig. 6.
_FIGURE_6 = [
    ("sensiboost", "uniform"),
    ("sensiboost", "mxq"),
    ("sensiboost", "sensiboost-ablation"),
    ("kurtboost", "uniform"),
    ("kurtboost", "mxq"),
    ("kurtboost", "kurtboost-ablation"),
    ("sensiboost", "kurtboost"),
]


def show_win_tie_loss(runs: pd.DataFrame) -> None:
    """How often a method beats another: at the same label as [A] has it, and at equal bytes."""
    there = set(runs["method"])
    pairs = [pair for pair in _FIGURE_6 if there.issuperset(pair)]
    if not pairs:
        return
    st.subheader("Win, tie, loss", anchor=False)
    rows = {}
    for pair in pairs:
        name = " against ".join(charts.method_style(method).title for method in pair)
        rows[name] = [
            *_shares(win_tie_loss(runs, *pair)),
            *_shares(win_tie_loss_at_equal_bytes(runs, *pair)),
        ]
    columns = [(how, what) for how in _HOW for what in ("wins %", "ties %", "losses %", "runs")]
    st.dataframe(pd.DataFrame(rows, index=pd.MultiIndex.from_tuples(columns)).T)
    st.caption(
        "Perplexities rounded to two decimals, on all corpora together. At the same label a boost "
        "spends up to 7 % more bits than what it is held against. At equal bytes each run meets "
        "the other method's best run, with any settings, that spends no more bits."
    )


_HOW = ("same label, as the paper has it", "equal bytes")


def _shares(found: WinTieLoss) -> tuple[int, ...]:
    return (*found.percentages, found.total)


# --- the table ------------------------------------------------------------------------------

#: Columns of the table, and how their numbers are written.
_FORMATS = {
    "bits": "%.4f",
    "MiB": "%.2f",
    "model MiB": "%.2f",
    "perplexity": "%.4f",
    "over full %": "%.2f",
    "KL": "%.4f",
    "top-1 %": "%.1f",
    "tokens/s": "%.0f",
    "quantized in s": "%.1f",
}


def show_table(choice: Choice) -> None:
    """Every run of the measurement; columns sort as numbers."""
    frame, published = choice.runs, choice.published
    size, model = ("nominal GiB", "on disk GiB") if published else ("MiB", "model MiB")
    scale = GIB if published else MIB
    columns = {
        "run": frame["label"],
        "bits": frame["bits_per_param"],
        size: frame[("nominal" if published else "measured") + "_bytes"] / scale,
        model: frame["model_bytes"] / scale,
        "perplexity": frame["perplexity"],
        "over full %": (100 * frame["increase"]).round(2) + 0.0,  # -0.0 has a sign
        "best for its size": pareto(frame[choice.size.column], frame["perplexity"]),
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
            "device": frame["device"],
            "when": frame["created"],
        }
    table = pd.DataFrame(columns).sort_values("perplexity")
    formats = _FORMATS | {size: "%.2f", model: "%.2f"}
    st.dataframe(
        table,
        hide_index=True,
        column_config={
            name: st.column_config.NumberColumn(format=form)
            for name, form in formats.items()
            if name in table
        },
    )


page("Compare", compare)
