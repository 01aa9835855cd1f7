"""Predicted perplexity of plans, by budget."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd

from lsq_core import charts
from lsq_core.errors import InputError, LsqError
from lsq_core.evaluation.prediction import (
    Prediction,
    Predictor,
    is_wide,
    parse_loss,
    smallest_budget_within,
)
from lsq_core.model.info import ModelInfo
from lsq_core.planning.constraints import restrict
from lsq_core.planning.methods import get_planner, mixes_rows
from lsq_core.planning.plan import Plan
from lsq_core.stages.predict import NO_PREDICTION_REASON
from lsq_core.ui import cached, cached_plans, cached_results, state, words
from lsq_core.ui.page import PageContext
from lsq_core.ui.plan.query import PlanQuery
from lsq_core.ui.safe import st


def format_band(predicted: Prediction) -> str:
    """Format the first prediction with the wider side of its band: ``61.70 ±0.42``.

    A wide band is given by its ends, without meaningless decimals: ``11.1 (7.52 to 23.5)``.
    """
    middle, low, high = predicted.band(0)
    if is_wide(middle, low, high):
        return f"{words.rounded(middle)} ({words.rounded(low)} to {words.rounded(high)})"
    return f"{middle:.2f} ±{max(high - middle, middle - low):.2f}"


def describe_prediction_basis(predictor: Predictor, extrapolated: bool) -> str:
    """Describe the runs that predictions are fitted to."""
    points = predictor.points
    beyond = "; this plan is an extrapolation" if extrapolated else ""
    return (
        f"Predicted from {words.plural(len(points.perplexity), 'run')} on {points.corpus} "
        f"({points.protocol}), 90 % band{beyond}."
    )


def describe_gap(plan: Plan) -> str:
    """Describe how far a knapsack's plan can be from the optimum; '' for other methods.

    Also '' for a refined plan, which isn't judged by the cost that proposed it.
    """
    if not plan.objective or get_planner(plan.method).reads_refinement:
        return ""
    share = 100 * (plan.objective - plan.lower_bound) / abs(plan.objective)
    if plan.objective == plan.lower_bound:
        return ""  # one of a few plans, with nothing to choose
    if share < 1e-6:
        return "Optimal at this budget."
    return f"Within {share:.2g} % of optimal at this budget."


# --- the live plan --------------------------------------------------------------------------


def init_prediction(ctx: PageContext, info: ModelInfo) -> None:
    """Keep the chosen corpus for predictions, else choose WikiText-2 or the one with most runs."""
    corpora = cached_results.evaluated_corpora(ctx.store, info)
    if st.session_state.get("predict_on") not in corpora:
        usual = "wikitext2" if "wikitext2" in corpora else (corpora or [None])[0]
        st.session_state["predict_on"] = usual


# --- beside other plans ---------------------------------------------------------------------


def show_frontiers(query: PlanQuery) -> None:
    """Chart the methods by budget: predicted perplexity or weight error, and measured runs.

    The budget isn't marked here: the live planner's strip marks it, and an unchanged chart isn't
    redrawn whenever the slider is released.
    """
    methods = dict.fromkeys([query.request.method, st.session_state["against"], "uniform"])
    if mixes_rows(query.request.method):
        st.caption(
            "Mixed-row plans have neither a predicted perplexity nor a weight error per "
            "configuration, so this chart shows only their runs."
        )
    choose_corpus(query)
    predictor = query.predictor
    lines = [
        line for m in methods if m != "none" for line in build_frontier_line(query.with_method(m))
    ]
    runs = measured_runs(query, predictor)
    if not lines and runs.empty:
        st.info("There is no profile to compare plans by; measure one on the Explore page.")
        return
    if isinstance(predictor, str):
        st.caption(words.escape(predictor))
    axis = (
        "squared weight error" if isinstance(predictor, str) else "predicted perplexity (90 % band)"
    )
    figure = charts.frontiers(lines, runs, axis)
    titles = words.listed([charts.method_style(line.method).title for line in lines])
    alt = f"{axis} of {titles or 'no method'} along the budget; {words.plural(len(runs), 'run')}."
    st.plotly_chart(figure, config=charts.CONFIG, key="frontiers", alt=alt)


def choose_corpus(query: PlanQuery) -> None:
    """Show a choice of the corpus to predict on, if runs were evaluated on several."""
    corpora = cached_results.evaluated_corpora(query.ctx.store, query.info)
    if len(corpora) > 1:
        st.segmented_control(
            "Predict perplexity on", corpora, key="predict_on", persist_state="session"
        )


def build_frontier_line(query: PlanQuery) -> list[charts.FrontierLine]:
    """Return a method's line of predicted perplexity, else of squared weight error, if any."""
    name = query.request.method
    if name == "none" or mixes_rows(name):
        return []
    try:
        cached_plans.frontier(query.info, query.profile, query.request)
    except LsqError:
        return []
    predicted = query.prediction_curve
    if predicted is not None:
        p = predicted.prediction
        return [charts.FrontierLine(name, predicted.bits, p.perplexity, p.low, p.high)]
    if "weight_error" not in query.problem.by_config:
        return []
    return [
        charts.FrontierLine(
            name, *cached_plans.error_curve(query.info, query.profile, query.request)
        )
    ]


def measured_runs(query: PlanQuery, predictor: Predictor | str) -> pd.DataFrame:
    """Return the chart's runs, by any quantizer, with the same evaluation as the predictions.

    Empty without a predictor.
    """
    empty = pd.DataFrame(columns=["method", "label", "bits_per_param", "value"])
    if isinstance(predictor, str):
        return empty
    points = predictor.points
    origin = "published" if cached.is_published(query.info) else "measured"
    runs = cached_results.results(query.ctx.store, origin)
    same = (runs["fingerprint"] == query.info.fingerprint) & (runs["corpus"] == points.corpus)
    same &= (runs["protocol"] == points.protocol) & runs["bits_per_param"].notna()
    if points.tokens is not None:
        same &= runs["tokens"] == points.tokens
    runs = runs[same]
    keys = list(zip(runs["method"], runs["quantizer"], runs["run"], strict=True))
    return pd.DataFrame(
        {
            "method": [charts.style_key(method, by) for method, by, _ in keys],
            "label": [
                f"{charts.method_style(method).title} by {by}, run {run}"
                for method, by, run in keys
            ],
            "bits_per_param": runs["bits_per_param"],
            "value": runs["perplexity"],
        }
    )


def render_loss_search(query: PlanQuery) -> None:
    """Show the search for the smallest plan within a predicted loss, and its result."""
    st.write(
        "The smallest plan predicted to be at most this much above full precision in perplexity:"
    )
    text = st.text_input("Loss", "1%", key="max_loss", persist_state="session")
    st.button("Find", on_click=apply_loss_search, args=(query, text))
    if "loss_answer" in st.session_state:
        st.write(words.escape(st.session_state.pop("loss_answer")))


def apply_loss_search(query: PlanQuery, text: str) -> None:
    """Set the budget to that of the smallest plan, or report why there is none."""
    predictor = query.predictor
    try:
        if mixes_rows(query.request.method):
            raise InputError(NO_PREDICTION_REASON)
        if isinstance(predictor, str):
            raise InputError(predictor)
        request = replace(query.request, base=None)
        frontier = cached_plans.frontier(query.info, query.profile, request)
        problem = restrict(query.problem, request)
        nominal = smallest_budget_within(frontier, predictor, problem, parse_loss(text))
    except LsqError as error:
        st.session_state["loss_answer"] = str(error)
        return
    # Rounded up to the four decimals of a typed budget, so that the plan still fits.
    state.set_budget(np.ceil(8e4 * nominal / problem.total - 1e-6) / 1e4)
    if get_planner(request.method).has_base:
        st.session_state["ask"] = "budget"
