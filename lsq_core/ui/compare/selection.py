"""The Compare page's choices: model, measurement, size measure and size limit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import pandas as pd

from lsq_core import charts
from lsq_core.errors import InputError
from lsq_core.results.difference import RunDifference
from lsq_core.results.gains import (
    EQUAL_SIZE,
    Gain,
    describe_gain,
    first_pair,
    gain_at_equal_size,
)
from lsq_core.store.models import PUBLISHED
from lsq_core.store.shipped import SHIPPED
from lsq_core.ui import cached, cached_results, state, words
from lsq_core.ui.page import PageContext, headline
from lsq_core.ui.safe import st
from lsq_core.ui.state import ensure_valid_choice
from lsq_core.units import format_bytes

#: Columns that must agree for runs to share a chart.
_SAME_MEASUREMENT = ["fingerprint", "corpus_sha256", "protocol", "tokens"]
#: Size measures of published runs; measured runs use their measured bytes.
_PUBLISHED_SIZES = {
    size.unit + size.column: size for size in (charts.NOMINAL, charts.BITS, charts.STORED)
}
#: With more runs than this, methods can be filtered.
_METHOD_FILTER_MIN_RUNS = 40


@dataclass(frozen=True, eq=False)
class Choice:
    """The runs to compare: those of one measurement, their size measure and size limit."""

    #: Every run of the model; ``runs`` holds those of one corpus and protocol.
    model_runs: pd.DataFrame
    runs: pd.DataFrame
    size: charts.SizeMeasure
    published: bool
    #: Runs of the other origin, drawn only as an overlay in the chart.
    overlay: pd.DataFrame | None = None

    @property
    def fingerprint(self) -> str:
        """The model's fingerprint."""
        return self.model_runs["fingerprint"].iloc[0]

    @property
    def best(self) -> pd.Series:
        """The run with the lowest perplexity within the limit."""
        fitting = self.runs[self.runs["fits"]]
        return fitting.loc[fitting["perplexity"].idxmin()]

    @cached_property
    def gain(self) -> Gain | None:
        """The largest gain over a uniform run of equal size within the limit, or None."""
        gain = gain_at_equal_size(self.runs[self.runs["fits"]], self.size.column)
        return gain if gain is not None and gain.drop > 0 else None

    @property
    def headline_run(self) -> str:
        """The evaluation in the headline: that of the largest gain, else of the best run."""
        return self.best["evaluation"] if self.gain is None else self.gain.evaluation

    @property
    def names(self) -> dict[str, str]:
        """Labels of the runs by evaluation, in display order; those of measured runs have times."""
        frame = self.runs.sort_values(["method", "bits_per_param"]) if self.published else self.runs
        labels = dict(zip(frame["evaluation"], frame["label"], strict=True))
        if self.published:
            return labels
        times = frame["created"].dt.strftime("%H:%M:%S")
        return {e: f"{labels[e]} · {t}" for e, t in zip(frame["evaluation"], times, strict=True)}

    @property
    def measurement(self) -> str:
        """Model, corpus and protocol of the runs, for file names."""
        first = self.runs.iloc[0]
        return f"{first['model']} {first['corpus']} {first['protocol']}"


def models_with_runs(ctx: PageContext) -> pd.Series:
    """Return the names of models with runs by fingerprint, measured models first."""
    both = [cached_results.results(ctx.store, origin) for origin in ("measured", "published")]
    models = pd.concat(
        [frame[["fingerprint", "model"]] for frame in both if not frame.empty]
        or [both[0][["fingerprint", "model"]]]
    )
    return models.drop_duplicates("fingerprint").set_index("fingerprint")["model"]


def find_model(ctx: PageContext, names: pd.Series) -> str | None:
    """Return the fingerprint of the sidebar's model, or None if it has no runs.

    If the name has stood for several models, such as a folder that changed, the user selects one.
    """
    published = cached.published(ctx.store, ctx.source)
    own = names[names.index == published.fingerprint if published else names == ctx.source.name]
    if len(own) < 2:
        return None if own.empty else own.index[0]
    return st.selectbox(
        "Fingerprint",
        list(own.index),
        format_func=lambda fingerprint: fingerprint[:12],
        help=f"{ctx.source.name} has referred to several models; runs are shown for one at a time.",
    )


#: Further models are offered only in the sidebar.
_MOST_OFFERED = 8


def offer_models(names: pd.Series) -> None:
    """Render buttons that choose a model with runs."""
    with st.container(horizontal=True):
        for name in list(dict.fromkeys(names.dropna()))[:_MOST_OFFERED]:
            st.button(
                words.escape(name),
                key=f"compare-{name}",
                icon=":material/scatter_plot:",
                on_click=state.choose_model,
                args=(name,),
            )


def choose(
    ctx: PageContext, fingerprint: str, middle: object, right: object, filters: bool = True
) -> Choice:
    """Return the model's runs on one corpus by one protocol, as filtered by the user.

    Without ``filters``, for views that count all runs, every method is included. The default is
    the newest measurement with at least two runs, since a single run has nothing to compare with.
    """
    published = fingerprint.startswith(PUBLISHED)
    all_runs = cached_results.results(ctx.store, "published" if published else "measured")
    model_runs = all_runs[all_runs["fingerprint"] == fingerprint]
    groups = dict(list(model_runs.groupby(_SAME_MEASUREMENT, sort=False, dropna=False)))
    keys = {"|".join(map(str, key_values)): key_values for key_values in groups}
    key = middle.selectbox(
        "Measurement",
        list(keys),
        index=next((i for i, key in enumerate(keys) if len(groups[keys[key]]) > 1), 0),
        format_func=lambda key: _describe_measurement(groups[keys[key]]),
        key=f"measurement-{fingerprint}",
    )
    frame, size = groups[keys[key]], charts.MEASURED
    others, names = _overlays(ctx, frame, published)
    if published:
        frame, size = select_published_runs(ctx, fingerprint, frame, filters)
    overlay = choose_overlay(others, names, published) if filters else None
    if overlay is not None:
        size = charts.BITS  # the only size measure that both have
    frame = frame.dropna(subset=[size.column])
    with right:
        frame = frame.assign(fits=frame[size.column] <= _limit(frame, size))
    return Choice(model_runs, frame, size, published, overlay)


def select_published_runs(
    ctx: PageContext, fingerprint: str, frame: pd.DataFrame, filters: bool
) -> tuple[pd.DataFrame, charts.SizeMeasure]:
    """Return published runs of the chosen methods, with nominal bytes, and the size measure."""
    linear = cached.models(ctx.store, "published").set_index("fingerprint")["linear_parameters"]
    frame = frame.assign(nominal_bytes=frame["bits_per_param"] * linear[fingerprint] / 8)
    if not filters:
        return frame, charts.NOMINAL
    left, right = st.columns([3.2, 1.4])
    methods = list(frame["method"].value_counts().index)
    chosen = methods
    if len(frame) > _METHOD_FILTER_MIN_RUNS:
        chosen = left.pills(
            "Methods",
            methods,
            selection_mode="multi",
            default=methods,
            format_func=lambda method: charts.method_style(method).title,
            key=f"methods-{fingerprint}",
            persist_state="session",
            wrap=True,
        )
    frame = frame[frame["method"].isin(chosen or methods)]
    sizes = [key for key, size in _PUBLISHED_SIZES.items() if frame[size.column].notna().any()]
    ensure_valid_choice("account", sizes)
    account = right.selectbox(
        "Size",
        sizes,
        format_func=lambda name: f"{_PUBLISHED_SIZES[name].title} ({_PUBLISHED_SIZES[name].unit})",
        key="account",
        persist_state="session",
        help="Nominal sizes follow the papers' formula, metadata included. Runs whose plan was not "
        "published are placed by their labelled bits.",
    )
    return frame, _PUBLISHED_SIZES[account]


def _overlays(
    ctx: PageContext, frame: pd.DataFrame, published: bool
) -> tuple[pd.DataFrame, pd.Series]:
    """Return runs of the other origin on the same corpus and protocol, and their models' names."""
    others = cached_results.results(ctx.store, "measured" if published else "published")
    first = frame.iloc[0]
    others = others[
        (others["corpus"] == first["corpus"]) & (others["protocol"] == first["protocol"])
    ]
    return others, others.drop_duplicates("fingerprint").set_index("fingerprint")["model"]


def choose_overlay(others: pd.DataFrame, names: pd.Series, published: bool) -> pd.DataFrame | None:
    """Return the runs of the other origin to overlay, or None."""
    if names.empty:
        return None
    fingerprint = st.selectbox(
        f"Overlay {'your own' if published else 'published'} runs",
        [None, *names.index],
        format_func=lambda fingerprint: "none" if fingerprint is None else names[fingerprint],
        key=f"overlay-{'measured' if published else 'published'}",
    )
    return others[others["fingerprint"] == fingerprint] if fingerprint else None


def _limit(frame: pd.DataFrame, size: charts.SizeMeasure) -> float:
    """Return the size limit in the column's unit: the largest size unless the user lowers it."""
    values = frame[size.column].astype(float) / size.scale
    low, high = round(values.min(), 2), round(values.max() + 0.005, 2)
    if values.max() - values.min() < 0.01:
        return float(values.max() * size.scale)
    chosen = st.slider(f"Best within ({size.unit})", low, high, high, step=0.01, format="%.2f")
    return (chosen + 0.005) * size.scale


def _describe_measurement(part: pd.DataFrame) -> str:
    row = part.iloc[0]
    number = words.plural(len(part), "run")
    if pd.isna(row["tokens"]):
        return f"{row['corpus']}, {row['protocol']}, as published ({number})"
    cut = ", truncated" if row["truncated"] else ""
    return f"{row['corpus']}, {row['protocol']}, {row['tokens']:,} tokens{cut} ({number})"


def render_headline(ctx: PageContext, choice: Choice) -> None:
    """Render the headline: the largest gain over a uniform run of equal size, or the best run."""
    gain = choice.gain
    if gain is None:
        headline(f"{_describe_best(choice)}.", " · ".join(_describe_runs(choice)))
        return
    interval = _interval(ctx, gain)
    text = _describe_gain(choice, gain)
    if interval is not None and interval.is_tie and not gain.is_noise:
        text += ", a tie"
    caption = [
        f"Largest gain of {words.plural(gain.candidates, 'run')} within "
        f"{words.percent(EQUAL_SIZE, 0)} of a uniform run's size"
    ]
    caption += [_describe_interval(interval)] if interval else []
    caption += [_describe_best(choice), *_describe_runs(choice)]
    info = cached_results.stored_model(ctx.store, choice.fingerprint)
    caption += map(words.escape, info.notes if info else ())
    headline(f"{text}.", " · ".join(caption))


def _describe_gain(choice: Choice, gain: Gain) -> str:
    """Describe a gain: ``KurtBoost: 3.3 % lower perplexity for 2.7 % more memory than …``."""
    rows = choice.runs.set_index("evaluation")
    run, base = rows.loc[gain.evaluation], rows.loc[gain.uniform]
    what = "bits" if choice.size == charts.BITS else "memory"
    sentence = describe_gain(gain, base["bits_per_param"], what)
    return f"{charts.method_style(run['method']).title}: {sentence}"


def _interval(ctx: PageContext, gain: Gain) -> RunDifference | None:
    """Return the interval of a gain; None if windows were not stored, as for published runs."""
    try:
        return cached_results.run_difference(ctx.store, gain.evaluation, gain.uniform)
    except InputError:
        return None


def _describe_interval(found: RunDifference) -> str:
    low, high = found.difference.low, found.difference.high
    number = words.plural(found.windows, "window")
    if math.isnan(low):
        return f"too few windows for an interval (n = {number})"
    return f"95 % interval {words.interval(low, high)}, n = {number}"


def _describe_best(choice: Choice) -> str:
    """Describe the best run: ``Best within 2.61 MiB: MXQ 4.30, perplexity 31.64``."""
    size, best = choice.size, choice.best
    style = charts.method_style(charts.style_key(best["method"], best["quantizer"]))
    within = choice.runs.loc[choice.runs["fits"], size.column].max()
    return (
        f"Best within {size_text(within, size)}: {style.title} {best['bits_per_param']:.2f}, "
        f"perplexity {best['perplexity']:.2f}"
    )


def _describe_runs(choice: Choice) -> list[str]:
    """Compare the best run with full precision, and state where the runs come from."""
    best, facts = choice.best, []
    if pd.notna(best["perplexity_full"]):
        more = words.signed_percent(best["increase"])
        facts.append(f"full precision {best['perplexity_full']:.2f}, so {more}")
    if choice.published:
        facts.append("published, not measured here")
    shipped = int((choice.runs["origin"] == SHIPPED).sum())
    if shipped:
        runs = words.plural(len(choice.runs), "run")
        facts.append(f"{shipped} of {runs} were shipped with LSQ Explorer")
    return facts


def size_text(value: float, size: charts.SizeMeasure) -> str:
    """Format a size in the unit of its measure."""
    return f"{value:.2f} bits" if size.scale == 1 else format_bytes(value)


def init_pair(choice: Choice) -> None:
    """Initialise the compared pair, unless both chosen runs are in this chart.

    The pair is that of :func:`lsq_core.results.gains.first_pair`, or the first two runs.
    """
    frame = choice.runs
    chosen = {st.session_state.get(key) for key in ("run_a", "run_b")}
    if len(frame) < 2 or chosen <= set(frame["evaluation"]):
        return
    pair = first_pair(frame, choice.size.column) or list(frame["evaluation"][:2])
    st.session_state["run_a"], st.session_state["run_b"] = pair


def selected_pair(choice: Choice) -> list[str]:
    """Return the two compared runs, or an empty list if there is only one run."""
    return [st.session_state["run_a"], st.session_state["run_b"]] if len(choice.runs) > 1 else []
