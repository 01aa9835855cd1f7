"""Predicted perplexity along the frontiers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd

from lsq_core import charts
from lsq_core.errors import InputError, LsqError
from lsq_core.evaluation.prediction import (
    Prediction,
    Predictor,
    parse_loss,
    smallest_within,
)
from lsq_core.model.info import ModelInfo
from lsq_core.planning.methods import get_planner
from lsq_core.planning.pins import with_pins
from lsq_core.planning.plan import Plan
from lsq_core.stages.predict import NOT_PREDICTED
from lsq_core.ui import cached, state, words
from lsq_core.ui.page import Here
from lsq_core.ui.plan.query import Asked
from lsq_core.ui.safe import st


def band(said: Prediction) -> str:
    """The first of some predictions with the wider side of its band: ``61.70 ±0.42``.

    A wide band is told by its ends, without decimals that nobody knows: ``11.1 (7.52 to 23.5)``.
    """
    middle, low, high = said.perplexity[0], said.low[0], said.high[0]
    wider = max(high - middle, middle - low)
    if wider > middle / 10:
        return f"{words.rounded(middle)} ({words.rounded(low)} to {words.rounded(high)})"
    return f"{middle:.2f} ±{wider:.2f}"


def how_predicted(predictor: Predictor, extrapolated: bool) -> str:
    """What a prediction rests on."""
    points = predictor.points
    beyond = "; this plan lies beyond them" if extrapolated else ""
    return (
        f"Predicted from {words.plural(len(points.perplexity), 'run')} on {points.corpus} "
        f"({points.protocol}), 90 % band{beyond}."
    )


def gap(plan: Plan) -> str:
    """How far a knapsack's plan can be from the optimum, or nothing for another method."""
    if not plan.objective:
        return ""
    share = 100 * (plan.objective - plan.lower_bound) / abs(plan.objective)
    if plan.objective == plan.lower_bound:
        return ""  # one of a few plans, with nothing to choose
    if share < 1e-6:
        return "No plan within the budget costs less."
    return f"At most {share:.2g} % above the least possible cost at this budget."


# --- the live plan --------------------------------------------------------------------------


def begin_prediction(here: Here, info: ModelInfo) -> None:
    """Predict on the corpus chosen, or on WikiText-2 or the one with most runs, if any."""
    corpora = cached.evaluated_on(here.store, info)
    if st.session_state.get("predict_on") not in corpora:
        usual = "wikitext2" if "wikitext2" in corpora else (corpora or [None])[0]
        st.session_state["predict_on"] = usual


# --- beside other plans ---------------------------------------------------------------------


def show_frontiers(asked: Asked) -> None:
    """The methods along the budget, in what they are predicted to give, with what was measured.

    The budget isn't marked here: the planner's own strip does, and a chart that stays the same
    isn't drawn anew at every release.
    """
    methods = dict.fromkeys([asked.request.method, st.session_state["against"], "uniform"])
    if state.reads_rows(asked.request.method):
        st.caption(
            "Mixed rows have neither a predicted perplexity nor a weight error at the ladder's "
            "stops, so only their runs are in this chart."
        )
    choose_corpus(asked)
    predictor = asked.predictor
    lines = [line for m in methods if m != "none" for line in frontier_line(asked.by(m))]
    runs = measured(asked, predictor)
    if not lines and runs.empty:
        st.info("There is no profile to tell plans apart by; Explore measures one.")
        return
    if isinstance(predictor, str):
        st.caption(words.literal(predictor))
    axis = (
        "squared weight error" if isinstance(predictor, str) else "predicted perplexity (90 % band)"
    )
    figure = charts.frontiers(lines, runs, axis)
    titles = words.listed([charts.method_style(line.method).title for line in lines])
    alt = f"{axis} of {titles or 'no method'} along the budget; {words.plural(len(runs), 'run')}."
    st.plotly_chart(figure, config=charts.CONFIG, key="frontiers", alt=alt)


def choose_corpus(asked: Asked) -> None:
    """The text to predict perplexity on, where runs were evaluated on several."""
    corpora = cached.evaluated_on(asked.here.store, asked.info)
    if len(corpora) > 1:
        st.segmented_control(
            "Predict perplexity on", corpora, key="predict_on", persist_state="session"
        )


def frontier_line(asked: Asked) -> list[charts.FrontierLine]:
    """A method's line: predicted perplexity, or else the squared weight error; none without."""
    name = asked.request.method
    if name == "none" or state.reads_rows(name):
        return []
    try:
        cached.frontier(asked.info, asked.found, asked.request)
    except LsqError:
        return []
    said = asked.along
    if said is not None:
        p = said.prediction
        return [charts.FrontierLine(name, said.bits, p.perplexity, p.low, p.high)]
    if "weight_error" not in asked.problem.by_config:
        return []
    return [charts.FrontierLine(name, *cached.error_along(asked.info, asked.found, asked.request))]


def measured(asked: Asked, predictor: Predictor | str) -> pd.DataFrame:
    """Runs for the chart, by any quantizer: those of the evaluation that is predicted.

    None without a prediction.
    """
    empty = pd.DataFrame(columns=["method", "label", "bits_per_param", "value"])
    if isinstance(predictor, str):
        return empty
    points = predictor.points
    origin = "published" if cached.is_published(asked.info) else "measured"
    runs = cached.results(asked.here.store, origin)
    same = (runs["fingerprint"] == asked.info.fingerprint) & (runs["corpus"] == points.corpus)
    same &= (runs["protocol"] == points.protocol) & runs["bits_per_param"].notna()
    if points.tokens is not None:
        same &= runs["tokens"] == points.tokens
    runs = runs[same]
    made = list(zip(runs["method"], runs["quantizer"], runs["run"], strict=True))
    return pd.DataFrame(
        {
            "method": [charts.drawn_as(method, by) for method, by, _ in made],
            "label": [
                f"{charts.method_style(method).title} by {by}, run {run}"
                for method, by, run in made
            ],
            "bits_per_param": runs["bits_per_param"],
            "value": runs["perplexity"],
        }
    )


def ask_by_loss(asked: Asked) -> None:
    """The inverse question: the smallest plan that is predicted to lose so little."""
    st.write(
        "The smallest plan whose perplexity is predicted at most this much above full precision:"
    )
    text = st.text_input("Loss", "1%", key="max_loss", persist_state="session")
    st.button("Find it", on_click=find_by_loss, args=(asked, text))
    if "loss_answer" in st.session_state:
        st.write(words.literal(st.session_state.pop("loss_answer")))


def find_by_loss(asked: Asked, text: str) -> None:
    """Set the budget to the answer, or say why there is none."""
    predictor = asked.predictor
    try:
        if state.reads_rows(asked.request.method):
            raise InputError(NOT_PREDICTED)
        if isinstance(predictor, str):
            raise InputError(predictor)
        request = replace(asked.request, base=None)
        frontier = cached.frontier(asked.info, asked.found, request)
        problem = with_pins(asked.problem, request.pins)
        nominal = smallest_within(frontier, predictor, problem, parse_loss(text))
    except LsqError as error:
        st.session_state["loss_answer"] = str(error)
        return
    # Rounded up to what a budget is typed with, so that the plan still fits.
    st.session_state["budget"] = np.ceil(8e4 * nominal / problem.total - 1e-6) / 1e4
    if get_planner(request.method).has_base:
        st.session_state["ask"] = "budget"
