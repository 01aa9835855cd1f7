"""The Compare page's other views: what bits buy, who wins, two runs in detail, predictions."""

from __future__ import annotations

import numpy as np
import pandas as pd

from lsq_core import charts
from lsq_core.evaluation.prediction import CONFIDENCE, Predictor
from lsq_core.results.compare import (
    FEWEST,
    NEAR,
    against_base,
    figure_6,
    plan_difference,
    plan_modules,
    settings_difference,
    settings_of,
    shares_of_bytes,
    uniform_bases,
    with_labels,
)
from lsq_core.ui import cached, words
from lsq_core.ui.compare.export import chart, offer, offer_table
from lsq_core.ui.compare.runs import show_pair
from lsq_core.ui.compare.selection import Choice, pair_of
from lsq_core.ui.page import Here
from lsq_core.ui.safe import st

# --- what more bits buy ---------------------------------------------------------------------

#: How many more bits than the base's a run may have to be drawn beside it.
_NEAR = 0.30


def show_gain(here: Here, choice: Choice) -> None:
    """The drop of perplexity for the extra budget, relative to a uniform base ([A] Fig. 9)."""
    bases = uniform_bases(choice.runs)
    if not bases:
        st.info("There is no uniform HQQ run of this measurement to hold the others against.")
        return
    left, middle, right = st.columns([1, 1.6, 0.6], vertical_alignment="bottom")
    name = left.selectbox(
        "Uniform base",
        list(bases),
        index=list(bases).index("3.13") if "3.13" in bases else 0,
        key=f"base-{choice.mark}",
    )
    runs = against_base(with_labels(choice.runs.rename(columns={"label": "name"})), bases[name])
    own = runs["label"] == name
    raised = own & runs["method"].isin(["sensiboost", "kurtboost"])
    only = middle.toggle("Only runs of this base", value=bool(raised.any()), key="raised")
    near = own if only else runs["extra"].between(-0.001, _NEAR)
    near &= runs["method"].ne("uniform") | runs["evaluation"].eq(bases[name]["evaluation"])
    runs = runs[near].drop(columns="label").rename(columns={"name": "label"})
    best = runs.loc[runs["drop"].idxmax()]
    figure = charts.gain_for_bits(runs, f"uniform {name}")
    title = f"{choice.measurement} gain over {name}"
    alt = (
        f"{words.plural(len(runs), 'run')}: percentage of perplexity below uniform {name} against "
        f"percentage of bits above it. Most: {best['label']}."
    )
    chart(figure, "gain", title, alt)
    st.markdown(
        f"Most: **{best['label']}**, perplexity **{words.signed_percent(-best['drop'])}** for "
        f"**{words.signed_percent(best['extra'])}** bits against uniform {name} "
        f"({bases[name]['perplexity']:.4f} at {bases[name]['bits_per_param']:.4f} bits)."
    )
    with right:
        offer(figure, "gain", title)


# --- win, tie, loss -------------------------------------------------------------------------

_HOW = {False: "same label, as the paper has it", True: "equal bytes"}


def show_win_tie_loss(here: Here, choice: Choice) -> None:
    """How often a method beats another: at the same label as [A] has it, and at equal bytes."""
    found = figure_6(choice.of_model)
    if found.empty:
        st.info(
            "Wins are counted where a boost and what it is held against were both run: add runs "
            "of SensiBoost or KurtBoost and of uniform plans at the same base."
        )
        return
    for place, (equal, how) in zip(st.columns(2), _HOW.items(), strict=True):
        part = found[found["equal"] == equal]
        with place:
            head, save = st.columns([2.4, 1], vertical_alignment="center")
            head.subheader(how[0].upper() + how[1:], anchor=False)
            few = too_few(part)
            part = part[part["enough"]]
            if few:
                st.caption(few)
            if part.empty:
                if not few:
                    st.caption("No two runs meet here.")
                continue
            figure = charts.win_tie_loss_bars(part)
            name = f"{choice.of_model['model'].iloc[0]} win tie loss {how.split(',')[0]}"
            alt = "; ".join(
                f"{row.method} against {row.against}: {row.wins} wins, {row.ties} ties, "
                f"{row.losses} losses (n = {row.total})"
                for row in part.itertuples()
            )
            chart(figure, f"wins-{equal}", name, alt)
            with save:
                offer(figure, f"wins-{equal}", name)
    st.caption(
        "Perplexities rounded to two decimals, on all corpora together. At the same label a boost "
        "spends up to 7 % more bits than what it is held against. At equal bytes each run meets "
        "the other method's best run of the same size, or what lies between its neighbours (in "
        f"the logarithm of perplexity) where they are at most {100 * NEAR:.0f} % of their size "
        f"apart. Fewer than {FEWEST} comparisons (n) are not drawn."
    )
    with st.expander("Numbers"):
        st.dataframe(_percentages(found), key="wins-numbers")
        offer_table(found, f"{choice.of_model['model'].iloc[0]} win tie loss")


def too_few(part: pd.DataFrame) -> str:
    """A sentence that names the pairs of methods with too few comparisons, '' if there are none."""
    pairs = [f"{_pair(row)} (n = {row.total})" for row in part[~part["enough"]].itertuples()]
    return f"Too few comparisons to say: {'; '.join(pairs)}." if pairs else ""


def _pair(row: tuple) -> str:
    return " against ".join(charts.method_style(m).title for m in (row.method, row.against))


def _percentages(found: pd.DataFrame) -> pd.DataFrame:
    """A row a pair of methods: whole percents and the number of comparisons, for both accounts.

    Percents are left out where there are too few comparisons.
    """
    rows: dict[str, dict] = {}
    for row in found.itertuples():
        pair = _pair(row)
        shares = [
            round(100 * n / row.total) if row.enough else None
            for n in (row.wins, row.ties, row.losses)
        ]
        names = ("wins %", "ties %", "losses %", "n")
        cells = zip(names, [*shares, row.total], strict=True)
        rows.setdefault(pair, {}).update({(_HOW[row.equal], name): n for name, n in cells})
    return pd.DataFrame(rows).T.astype("Int64")


# --- two runs -------------------------------------------------------------------------------


def show_two(here: Here, choice: Choice) -> None:
    """Two runs: how they differ in figures, settings and plan ([A] Fig. 8)."""
    show_pair(here, choice)
    pair = pair_of(choice)
    if len(set(pair)) < 2:
        return
    records = [cached.record(here.store, evaluation) for evaluation in pair]
    plans = [plan_modules(record["plan"].get("content") or {}) for record in records]
    labels = choice.runs.set_index("evaluation")["label"]
    info = cached.kept_model(here.store, choice.mark)
    weights = {m.name: m.numel for m in info.matrices}
    places = st.columns(2, gap="medium")
    for number, (place, plan) in enumerate(zip(places, plans, strict=True)):
        with place:
            _show_plan(plan, f"{'ab'[number]}", labels[pair[number]], weights)
    settings = settings_difference(*map(settings_of, records))
    modules = plan_difference(*plans)
    left, right = st.columns(2, gap="medium")
    with left:
        st.subheader(_differ(len(settings), "setting"), anchor=False)
        if len(settings):
            st.dataframe(settings, hide_index=True, key="different-settings")
    with right:
        if plans[0].empty or plans[1].empty:
            st.caption("Plans are compared where both were published.")
            return
        st.subheader(f"{_differ(len(modules), 'module')} of {len(plans[0])}", anchor=False)
        if len(modules):
            shown = modules.rename(columns={"config": "run", "config_other": "against"})
            st.dataframe(shown, hide_index=True, key="different-modules", height=320)
            offer_table(modules, f"plans of {records[0]['run']['id']} {records[1]['run']['id']}")


def _differ(number: int, what: str) -> str:
    return f"{words.plural(number, what)} differ{'s' if number == 1 else ''}"


def _show_plan(plan: pd.DataFrame, which: str, label: str, weights: dict[str, int]) -> None:
    st.markdown(f"**{words.literal(label)}**")
    if plan.empty:
        st.caption("Its plan was not published.")
        return
    shares = shares_of_bytes(plan, weights)
    told = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
    alt = f"Configurations of {label} by layer and module; by bytes: {told}."
    chart(charts.plan_heatmap(plan, narrow=True), f"plan-{which}", f"plan {label}", alt)
    alt = f"Share of the bytes of {label} by configuration: {told}."
    chart(charts.plan_ring(shares, "bytes"), f"ring-{which}", f"ring {label}", alt)


# --- predictions ----------------------------------------------------------------------------


def show_predicted(here: Here, choice: Choice) -> None:
    """What each run would have been predicted, had it not been seen, against what it was."""
    corpus = choice.runs["corpus"].iloc[0]
    predictor = _predictor(here, choice, corpus)
    if isinstance(predictor, str):
        st.info(words.literal(predictor))
        return
    frame = left_out(choice, predictor)
    if frame.empty:
        points = predictor.points
        st.info(
            f"Predictions rest on the {words.plural(len(points.perplexity), 'run')} by "
            f"{points.protocol}, none of which is of this measurement."
        )
        return
    inside = frame["perplexity"].between(frame["low"], frame["high"]).mean()
    error = (frame["predicted"] / frame["perplexity"] - 1).abs().median()
    figure = charts.predicted_against_measured(frame)
    name = f"{choice.measurement} predicted against measured"
    first, save = st.columns([4, 1], vertical_alignment="center")
    first.markdown(
        f"Each of {words.plural(len(frame), 'run')} predicted from the others: half of them within "
        f"**{100 * error:.2f} %**, **{inside:.0%}** inside the {CONFIDENCE:.0%} band."
    )
    with save:
        offer(figure, "predicted", name)
    alt = (
        f"Predicted against measured perplexity of {words.plural(len(frame), 'run')}: median error "
        f"{100 * error:.2f} %, {inside:.0%} inside the band."
    )
    chart(figure, "predicted", name, alt)
    said = []
    limit = charts.view_limit(frame["perplexity"])
    above = int((frame["perplexity"] > limit).sum())
    if above:
        said.append(
            f"{words.plural(above, 'run')} above a perplexity of {limit:.2f} out of view: "
            "double-click the chart to see all."
        )
    skipped = len(choice.runs) - len(frame)
    if skipped:
        said.append(
            f"{words.plural(skipped, 'run')} not predicted: of another quantizer, axis or "
            "metadata than the profile's, with 8 bits everywhere, or without a known plan."
        )
    st.caption(" ".join(said))


def _predictor(here: Here, choice: Choice, corpus: str) -> Predictor | str:
    info = cached.kept_model(here.store, choice.mark)
    settings = cached.newest_settings(here.store, info)
    if settings is None:
        return "Predicting perplexity needs a profile of this model; Explore measures one."
    found = cached.profile(here.store, info, settings, here.device)
    return cached.predictor(here.store, info, found, settings, corpus)


def left_out(choice: Choice, predictor: Predictor) -> pd.DataFrame:
    """The choice's runs that were left out once: with ``predicted, low, high``."""
    which, said = predictor.leave_one_out()
    told = pd.DataFrame(
        {
            "evaluation": np.array(predictor.points.evaluations, dtype=object)[which],
            "predicted": said.perplexity,
            "low": said.low,
            "high": said.high,
        }
    )
    return choice.runs.merge(told, on="evaluation")
