"""Every run beside the others: perplexity against measured bytes, and any two of them in pairs."""

from __future__ import annotations

import json

import pandas as pd
import streamlit as st

from lsq_core import charts
from lsq_core.config import MIB, format_bytes
from lsq_core.evaluate import compare_windows
from lsq_core.ui import known, state, words
from lsq_core.ui.page import Here, headline, next_step, page

#: What has to agree for two figures to be in one chart.
_SAME = ["fingerprint", "corpus_sha256", "protocol", "tokens"]


def compare(here: Here) -> None:
    """The best run under a size, all runs of one measurement, and a pair of them."""
    everything = known.results(here.store)
    if everything.empty:
        headline("There is nothing to compare yet.", "Each run appears here with its size.")
        next_step("pages/2_Plan.py", "Make a plan and run it")
        return
    first = st.container()
    frame = labelled(choose(everything, here))
    with first:
        say_what_is_best(frame)
    begin_pair(frame)
    pair = [st.session_state["run_a"], st.session_state["run_b"]] if len(frame) > 1 else []
    st.plotly_chart(
        charts.perplexity_by_size(frame, pair),
        config=charts.CONFIG,
        key="runs",
    )
    show_pair(here, frame)
    show_table(frame)


def choose(everything: pd.DataFrame, here: Here) -> pd.DataFrame:
    """The runs of one model on one corpus by one protocol, as the person filters them."""
    left, middle, right = st.columns([1, 2.2, 1.4])
    names = everything.drop_duplicates("fingerprint").set_index("fingerprint")["model"]
    ours = everything.loc[everything["model"] == here.source.name, "fingerprint"]
    marks = list(names.index)
    mark = left.selectbox(
        "Model",
        marks,
        index=marks.index(ours.iloc[0]) if len(ours) else 0,
        format_func=lambda mark: names[mark] or mark[:12],
    )
    of_model = everything[everything["fingerprint"] == mark]
    groups = dict(list(of_model.groupby(_SAME, sort=False)))
    key = middle.selectbox("Measured on", list(groups), format_func=lambda k: _measure(groups[k]))
    frame = groups[key]
    largest = float(frame["measured_bytes"].max()) / MIB
    smallest = float(frame["measured_bytes"].min()) / MIB
    with right:
        limit = largest if largest - smallest < 0.01 else _limit(smallest, largest)
    return frame.assign(fits=frame["measured_bytes"] / MIB <= limit + 0.005)


def _limit(smallest: float, largest: float) -> float:
    low, high = round(smallest, 2), round(largest + 0.005, 2)
    return st.slider("Best within (MiB)", low, high, high, step=0.01, format="%.2f")


def _measure(part: pd.DataFrame) -> str:
    row = part.iloc[0]
    cut = ", cut" if row["truncated"] else ""
    number = words.plural(len(part), "run")
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
    parts += [row["quantizer"]]
    parts += ["fp16 metadata"] if row["metadata"] == "fp16" else []
    parts += ["axis 0"] if row["axis"] == 0 else []
    return ", ".join(parts)


def say_what_is_best(frame: pd.DataFrame) -> None:
    """The first line: the lowest perplexity of the runs that fit."""
    fitting = frame[frame["fits"]]
    best = fitting.loc[fitting["perplexity"].idxmin()]
    largest = format_bytes(fitting["measured_bytes"].max())
    name = f"{charts.method_style(best['method']).title} {best['bits_per_param']:.2f}"
    under = [f"{format_bytes(best['measured_bytes'])} measured"]
    if pd.notna(best["perplexity_full"]):
        more = words.signed_percent(best["increase"])
        under.append(f"full precision {best['perplexity_full']:.2f}, so {more}")
    under.append(f"{words.plural(len(frame), 'run')} of this measurement")
    headline(
        f"Best within {largest}: {name}, perplexity {best['perplexity']:.2f}.", " · ".join(under)
    )


def begin_pair(frame: pd.DataFrame) -> None:
    """Start with the two newest runs, and again where the chosen ones aren't of this chart."""
    newest = list(frame["evaluation"][:2])
    for key, run in zip(("run_a", "run_b"), newest, strict=False):
        if st.session_state.get(key) not in set(frame["evaluation"]):
            st.session_state[key] = run


def show_pair(here: Here, frame: pd.DataFrame) -> None:
    """The difference of two runs with its paired bootstrap interval."""
    if len(frame) < 2:
        st.caption("With a second run of this measurement, the two can be compared in pairs here.")
        return
    labels = dict(zip(frame["evaluation"], frame["label"], strict=True))
    times = dict(zip(frame["evaluation"], frame["created"].dt.strftime("%H:%M:%S"), strict=True))
    left, right, word = st.columns([1.2, 1.2, 1.6], vertical_alignment="bottom")
    with left:
        a = _pick("Run", "run_a", labels, times)
    with right:
        b = _pick("against", "run_b", labels, times)
    with word:
        st.markdown(difference(here, a, b))


def _pick(label: str, key: str, labels: dict[str, str], times: dict[str, str]) -> str:
    return st.selectbox(
        label,
        list(labels),
        format_func=lambda e: f"{labels[e]} · {times[e]}",
        key=key,
        persist_state="session",
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


def show_table(frame: pd.DataFrame) -> None:
    """Every run of the measurement; columns sort as numbers."""
    table = pd.DataFrame(
        {
            "run": frame["label"],
            "bits": frame["bits_per_param"],
            "MiB": frame["measured_bytes"] / MIB,
            "model MiB": frame["model_bytes"] / MIB,
            "perplexity": frame["perplexity"],
            "over full %": 100 * frame["increase"],
            "KL": frame["kl"],
            "top-1 %": 100 * frame["top1"],
            "tokens/s": frame["tokens_per_second"],
            "device": frame["device"],
            "when": frame["created"],
        }
    ).sort_values("perplexity")
    formats = {
        "bits": "%.4f",
        "MiB": "%.2f",
        "model MiB": "%.2f",
        "perplexity": "%.4f",
        "over full %": "%.2f",
        "KL": "%.4f",
        "top-1 %": "%.1f",
        "tokens/s": "%.0f",
    }
    columns = {name: st.column_config.NumberColumn(format=form) for name, form in formats.items()}
    st.dataframe(table, hide_index=True, column_config=columns)


page("Compare", compare)
