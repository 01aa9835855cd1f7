"""The Compare page's other views: gain for bits, win/tie/loss, two runs, predictions."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from lsq_core import charts
from lsq_core.errors import InputError
from lsq_core.evaluation.noise import is_below_noise
from lsq_core.evaluation.prediction import CONFIDENCE, Predictor
from lsq_core.planning.frame import plan_to_frame
from lsq_core.results.compare import (
    MAX_INTERPOLATION_GAP,
    MIN_COMPARISONS,
    add_labels,
    byte_shares,
    figure_6,
    plan_difference,
    relative_to_base,
    run_settings,
    settings_difference,
    uniform_bases,
)
from lsq_core.results.gains import is_ablation
from lsq_core.results.story import boost_gain
from lsq_core.ui import cached, cached_results, words
from lsq_core.ui.compare.export import render_chart, render_save_menu, table_downloads
from lsq_core.ui.compare.runs import ALL_RUNS_NOTE, ablation_note, show_pair
from lsq_core.ui.compare.selection import Choice, selected_pair
from lsq_core.ui.page import PageContext
from lsq_core.ui.safe import st

# --- gain for bits --------------------------------------------------------------------------

#: Share of bits above the base's up to which a run is drawn.
_MAX_EXTRA_BITS = 0.30
#: With more runs, intervals are omitted: each takes some milliseconds.
_MAX_INTERVALS = 200


def show_gain(ctx: PageContext, choice: Choice) -> None:
    """Show the drop of perplexity for extra bits, relative to a uniform base ([A] Fig. 9)."""
    bases = uniform_bases(choice.runs)
    if not bases:
        st.info("There is no uniform HQQ run of this measurement to compare the others with.")
        return
    left, middle, right = st.columns([1, 1.6, 0.6], vertical_alignment="bottom")
    name = left.selectbox(
        "Uniform base",
        list(bases),
        index=list(bases).index(_usual_base(choice.runs, bases)),
        key=f"base-{choice.fingerprint}",
    )
    runs = relative_to_base(add_labels(choice.runs.rename(columns={"label": "name"})), bases[name])
    same_base = runs["label"] == name
    is_boost = same_base & runs["method"].isin(["sensiboost", "kurtboost"])
    only = middle.toggle("Only runs of this base", value=bool(is_boost.any()), key="raised")
    is_near = same_base if only else runs["extra"].between(-0.001, _MAX_EXTRA_BITS)
    is_near &= runs["method"].ne("uniform") | runs["evaluation"].eq(bases[name]["evaluation"])
    runs = runs[is_near].drop(columns="label").rename(columns={"name": "label"})
    runs = add_intervals(ctx, runs, bases[name]["evaluation"])
    best = _largest_gain(runs)
    figure = charts.gain_for_bits(runs, f"uniform {name}")
    title = f"{choice.measurement} gain over {name}"
    alt = (
        f"{words.plural(len(runs), 'run')}: percentage of perplexity below uniform {name} against "
        f"percentage of bits above it. Best: {best['label']}."
    )
    render_chart(figure, "gain", title, alt)
    st.markdown(_describe_best(best, bases[name], name))
    notes = [ALL_RUNS_NOTE if charts.gain_view(runs).outside else "", ablation_note(runs)]
    if "low" in runs and runs["low"].notna().any():
        notes.append("Error bars are 95 % intervals of a paired bootstrap over windows.")
    if any(notes):
        st.caption(" ".join(filter(None, notes)))
    with right:
        render_save_menu(figure, "gain", title)


def _usual_base(runs: pd.DataFrame, bases: Mapping[str, pd.Series]) -> str:
    """Return the base of the best boosted run; else the paper's example, or the first base."""
    gain = boost_gain(runs)
    if gain is not None:
        for name, base in bases.items():
            if base["evaluation"] == gain.uniform["evaluation"]:
                return name
    return "3.13" if "3.13" in bases else next(iter(bases))


def _describe_best(best: pd.Series, base: pd.Series, name: str) -> str:
    """Describe the largest gain over a uniform base, or state that there is none."""
    against = f"uniform {name} ({base['perplexity']:.4f} at {base['bits_per_param']:.4f} bits)"
    change = f"perplexity **{words.signed_percent(-best['drop'])}** for"
    change += f" **{words.signed_percent(best['extra'])}** bits"
    if best["drop"] <= 0:
        return f"No run here is better than {against}; the best, **{best['label']}**: {change}."
    is_noise = is_below_noise(best["drop"], best["noise"])
    return f"Largest gain: **{best['label']}**, {change} against {against}" + (
        ", within numerical noise." if is_noise else "."
    )


def _largest_gain(runs: pd.DataFrame) -> pd.Series:
    """Return the run furthest below the base; ablations and uniform runs are a last resort."""
    methods = runs["method"]
    planned = runs[~methods.map(is_ablation) & methods.ne("uniform")]
    runs = runs if planned.empty else planned
    return runs.loc[runs["drop"].idxmax()]


def add_intervals(ctx: PageContext, runs: pd.DataFrame, base: str) -> pd.DataFrame:
    """Return runs with ``low, high, windows``: the interval of ``drop``, NaN if unavailable.

    The columns are omitted if there are too many runs to resample interactively.
    """
    if len(runs) > _MAX_INTERVALS:
        return runs
    rows = [_interval_of_drop(ctx, run, base) for run in runs["evaluation"]]
    return runs.assign(
        **dict(zip(("low", "high", "windows"), zip(*rows, strict=True), strict=True))
    )


def _interval_of_drop(ctx: PageContext, run: str, base: str) -> tuple[float, float, float]:
    """Return the interval of the relative drop of perplexity below the base, and its n."""
    try:
        found = cached_results.run_difference(ctx.store, run, base)
    except InputError:  # no windows are stored
        return np.nan, np.nan, np.nan
    if run == base:
        return np.nan, np.nan, found.windows
    return -found.difference.high, -found.difference.low, found.windows


# --- win, tie, loss -------------------------------------------------------------------------

_BUDGET_ACCOUNTS = {False: "same label, as in the paper", True: "equal bytes"}


def show_win_tie_loss(ctx: PageContext, choice: Choice) -> None:
    """Show how often a method beats another, at the same label (as in [A]) and at equal bytes."""
    comparisons = figure_6(choice.model_runs)
    if comparisons.empty:
        st.info(
            "Wins need runs of both a boosted plan and its baseline: add runs of SensiBoost or "
            "KurtBoost and of uniform plans at the same base."
        )
        return
    for place, (equal, account) in zip(st.columns(2), _BUDGET_ACCOUNTS.items(), strict=True):
        part = comparisons[comparisons["equal"] == equal]
        with place:
            head, save = st.columns([2.4, 1], vertical_alignment="center")
            head.subheader(account[0].upper() + account[1:], anchor=False)
            few = describe_too_few(part)
            part = part[part["enough"]]
            if few:
                st.caption(few)
            if part.empty:
                if not few:
                    st.caption("No results.")
                continue
            figure = charts.win_tie_loss_bars(part)
            name = f"{choice.model_runs['model'].iloc[0]} win tie loss {account.split(',')[0]}"
            alt = "; ".join(
                f"{row.method} against {row.against}: {row.wins} wins, {row.ties} ties, "
                f"{row.losses} losses (n = {row.total})"
                for row in part.itertuples()
            )
            render_chart(figure, f"wins-{equal}", name, alt)
            with save:
                render_save_menu(figure, f"wins-{equal}", name)
    st.caption(
        "Perplexities are rounded to two decimals, over all corpora. At the same label, a boost "
        "spends up to 7 % more bits than its baseline. At equal bytes, each run is compared with "
        "the other method's best run of the same size, or an interpolation of its neighbours (in "
        f"the logarithm of perplexity) where they are at most {100 * MAX_INTERPOLATION_GAP:.0f} % "
        "of their size "
        f"apart. Pairs with fewer than {MIN_COMPARISONS} comparisons (n) are not drawn."
    )
    with st.expander("Numbers"):
        st.dataframe(_percentages(comparisons), key="wins-numbers")
        table_downloads(comparisons, f"{choice.model_runs['model'].iloc[0]} win tie loss")


def describe_too_few(part: pd.DataFrame) -> str:
    """Return a sentence naming pairs of methods with too few comparisons, or ''."""
    pairs = [f"{_pair_title(row)} (n = {row.total})" for row in part[~part["enough"]].itertuples()]
    return f"Too few comparisons: {'; '.join(pairs)}." if pairs else ""


def _pair_title(row: tuple) -> str:
    return " against ".join(charts.method_style(m).title for m in (row.method, row.against))


def _percentages(comparisons: pd.DataFrame) -> pd.DataFrame:
    """Return percentages and number of comparisons by pair of methods, for both definitions.

    Percentages are omitted if there are too few comparisons.
    """
    rows: dict[str, dict] = {}
    for row in comparisons.itertuples():
        pair = _pair_title(row)
        shares = [
            round(100 * n / row.total) if row.enough else None
            for n in (row.wins, row.ties, row.losses)
        ]
        names = ("wins %", "ties %", "losses %", "n")
        cells = zip(names, [*shares, row.total], strict=True)
        rows.setdefault(pair, {}).update(
            {(_BUDGET_ACCOUNTS[row.equal], name): n for name, n in cells}
        )
    return pd.DataFrame(rows).T.astype("Int64")


# --- two runs -------------------------------------------------------------------------------


def show_two(ctx: PageContext, choice: Choice) -> None:
    """Show how two runs differ in figures, settings and plan ([A] Fig. 8)."""
    show_pair(ctx, choice)
    pair = selected_pair(choice)
    if len(set(pair)) < 2:
        return
    records = [cached_results.record(ctx.store, evaluation) for evaluation in pair]
    plans = [plan_to_frame(record["plan"].get("content") or {}) for record in records]
    labels = choice.runs.set_index("evaluation")["label"]
    info = cached_results.stored_model(ctx.store, choice.fingerprint)
    weights = {m.name: m.numel for m in info.matrices}
    places = st.columns(2, gap="medium")
    for number, (place, plan) in enumerate(zip(places, plans, strict=True)):
        with place:
            _show_plan(plan, f"{'ab'[number]}", labels[pair[number]], weights)
    settings = settings_difference(*map(run_settings, records))
    modules = plan_difference(*plans)
    left, right = st.columns(2, gap="medium")
    with left:
        st.subheader(_count_differing(len(settings), "setting"), anchor=False)
        if len(settings):
            st.dataframe(settings, hide_index=True, key="different-settings")
    with right:
        if plans[0].empty or plans[1].empty:
            st.caption("Plans can be compared only where both were published.")
            return
        st.subheader(f"{_count_differing(len(modules), 'module')} of {len(plans[0])}", anchor=False)
        if len(modules):
            shown = modules.rename(columns={"config": "run", "config_other": "against"})
            st.dataframe(shown, hide_index=True, key="different-modules", height=320)
            table_downloads(
                modules, f"plans of {records[0]['run']['id']} {records[1]['run']['id']}"
            )


def _count_differing(number: int, what: str) -> str:
    return f"{words.plural(number, what)} differ{'s' if number == 1 else ''}"


def _show_plan(plan: pd.DataFrame, indices: str, label: str, weights: dict[str, int]) -> None:
    st.markdown(f"**{words.escape(label)}**")
    if plan.empty:
        st.caption("The plan of this run was not published.")
        return
    shares = byte_shares(plan, weights)
    shares_text = ", ".join(f"{name} {words.percent(share)}" for name, share in shares.items())
    alt = f"Configurations of {label} by layer and module; by bytes: {shares_text}."
    render_chart(charts.plan_heatmap(plan, narrow=True), f"plan-{indices}", f"plan {label}", alt)
    alt = f"Share of the bytes of {label} by configuration: {shares_text}."
    render_chart(charts.plan_ring(shares, "bytes"), f"ring-{indices}", f"ring {label}", alt)


# --- predictions ----------------------------------------------------------------------------


def show_predicted(ctx: PageContext, choice: Choice) -> None:
    """Show leave-one-out predictions against measured perplexity."""
    corpus = choice.runs["corpus"].iloc[0]
    predictor = _predictor(ctx, choice, corpus)
    if isinstance(predictor, str):
        st.info(words.escape(predictor))
        return
    frame = predict_left_out(choice, predictor)
    if frame.empty:
        points = predictor.points
        st.info(
            f"Predictions are based on the {words.plural(len(points.perplexity), 'run')} by "
            f"{points.protocol}, none of which is of this measurement."
        )
        return
    inside = frame["perplexity"].between(frame["low"], frame["high"]).mean()
    error = (frame["predicted"] / frame["perplexity"] - 1).abs().median()
    figure = charts.predicted_against_measured(frame, predictor.full_precision)
    name = f"{choice.measurement} predicted against measured"
    first, save = st.columns([4, 1], vertical_alignment="center")
    first.markdown(
        f"Each of {words.plural(len(frame), 'run')} predicted from the others: half of them within "
        f"**{words.percent(error, 2)}**, **{words.percent(inside, 0)}** inside the "
        f"{words.percent(CONFIDENCE, 0)} band."
    )
    with save:
        render_save_menu(figure, "predicted", name)
    alt = (
        f"Predicted against measured perplexity of {words.plural(len(frame), 'run')}: median error "
        f"{words.percent(error, 2)}, {words.percent(inside, 0)} inside the band."
    )
    render_chart(figure, "predicted", name, alt)
    notes = []
    if charts.predicted_view(frame, predictor.full_precision).outside:
        notes.append(ALL_RUNS_NOTE)
    skipped = len(choice.runs) - len(frame)
    if skipped:
        notes.append(
            f"{words.plural(skipped, 'run')} not predicted: another quantizer, axis or "
            "metadata format than the profile's, 8 bits everywhere, or no known plan."
        )
    st.caption(" ".join(notes))


def _predictor(ctx: PageContext, choice: Choice, corpus: str) -> Predictor | str:
    info = cached_results.stored_model(ctx.store, choice.fingerprint)
    settings = cached.newest_settings(ctx.store, info)
    if settings is None:
        return (
            "Predicting perplexity needs a profile of this model; measure one on the Explore page."
        )
    profile = cached.profile(ctx.store, info, settings, ctx.device)
    return cached_results.predictor(ctx.store, info, profile, settings, corpus)


def predict_left_out(choice: Choice, predictor: Predictor) -> pd.DataFrame:
    """Return the runs that have leave-one-out predictions, with ``predicted, low, high``."""
    indices, predicted = predictor.leave_one_out()
    predictions = pd.DataFrame(
        {
            "evaluation": np.array(predictor.points.evaluations, dtype=object)[indices],
            "predicted": predicted.perplexity,
            "low": predicted.low,
            "high": predicted.high,
        }
    )
    return choice.runs.merge(predictions, on="evaluation")
