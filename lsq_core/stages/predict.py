"""Predict the perplexity of plans from the runs so far."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from lsq_core.bits import LADDERS, PAPER
from lsq_core.errors import InputError, LsqError
from lsq_core.evaluation import prediction
from lsq_core.planning.constraints import restrict
from lsq_core.planning.make import make_frontier
from lsq_core.planning.methods import get_planner
from lsq_core.planning.plan import Plan
from lsq_core.planning.problem import Problem
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.quantization.registry import quantizer_spec
from lsq_core.stages.model import OpenModel
from lsq_core.stages.plan import build_problem, check_metrics, plan_model, settings_on_ladder
from lsq_core.stages.profile import find_profile, profile_model

if TYPE_CHECKING:
    from lsq_core.evaluation.prediction import Predictor
    from lsq_core.profiling.profile import Profile

#: Why a plan of mixed rows has no predicted perplexity.
NO_PREDICTION_REASON = (
    "Perplexity is predicted from weight errors by configuration, which are unknown for matrices "
    "whose rows have different bits."
)


def fit_predictor(
    model: OpenModel,
    problem: Problem,
    settings: ProfileSettings,
    corpus: str | None = None,
    protocol: str | None = None,
) -> Predictor:
    """Fit a predictor of this model's perplexity on a corpus with a protocol to the runs so far.

    The default is the corpus and protocol with the most runs. ``problem`` is that of a profile
    with ``settings``; only runs with the same quantizer, axis and metadata are used.

    Raises
    ------
    InputError
        If there are too few runs, or the profile lacks what predictions need.
    """
    points = prediction.load_measured_points(
        model.store,
        model.info.fingerprint,
        problem,
        quantizer=settings.quantizer,
        axis=settings.axis,
        metadata=settings.metadata,
        corpus=corpus,
        protocol=protocol,
    )
    return prediction.fit(points)


def predict_plan(
    model: OpenModel,
    plan: Plan,
    settings: ProfileSettings,
    corpus: str | None = None,
    protocol: str | None = None,
) -> dict:
    """Return a plan's predicted perplexity and band, or only the ``reason`` if there is none.

    Nothing is measured for this.
    """
    settings = replace(settings, axis=plan.axis, metadata=plan.metadata)
    if plan.rows:
        return {"reason": NO_PREDICTION_REASON}
    try:
        profile = _find_profile_of(model, plan, settings)
        if profile is None:
            return {"reason": _missing_profile_reason(plan, settings)}
        problem = build_problem(model.info, profile)
        predictor = fit_predictor(model, problem, settings, corpus, protocol)
    except InputError as error:
        return {"reason": str(error)}
    return predictor.summary(problem, np.array([problem.options.index(c) for c in plan.configs]))


def _find_profile_of(model: OpenModel, plan: Plan, settings: ProfileSettings) -> Profile | None:
    """Return a stored profile with the plan's configurations, preferring the settings' ladder."""
    names = dict.fromkeys((settings.ladder, plan.request.ladder, *LADDERS))
    for name in names:
        if set(plan.configs) <= set(LADDERS[name]):
            profile = find_profile(model, replace(settings, ladder=name))
            if profile is not None:
                return profile
    return None


def _missing_profile_reason(plan: Plan, settings: ProfileSettings) -> str:
    beyond = sorted({c.name for c in plan.configs if c not in LADDERS[PAPER]})
    if not beyond:
        title = quantizer_spec(settings.quantizer).title
        return f"This model has no profile measured with {title} with these settings yet."
    return (
        f"This plan uses {beyond[0]}, which needs a profile on the extended ladder; this model has "
        "none with these settings yet."
    )


def predict_without_ties(
    model: OpenModel,
    plan: Plan,
    settings: ProfileSettings,
    corpus: str | None = None,
    protocol: str | None = None,
) -> dict:
    """Return the size, objective and prediction of the plan without its ties and server.

    The keys are ``bits_per_param``, ``objective`` and ``predicted``, or only ``reason`` if there
    is no such plan.
    """
    try:
        free = plan_model(model, plan.request.without_ties(), settings)
    except LsqError as error:
        return {"reason": str(error)}
    return {
        "bits_per_param": free.bits_per_param,
        "objective": free.objective,
        "predicted": predict_plan(model, free, settings, corpus, protocol),
    }


def request_for_max_loss(
    model: OpenModel,
    request: PlanRequest,
    settings: ProfileSettings,
    max_loss: float,
    corpus: str | None = None,
    protocol: str | None = None,
) -> PlanRequest:
    """Return the request with the smallest budget predicted to stay within a relative loss.

    Raises
    ------
    InputError
        If no plan stays within it, there are too few runs to predict from, or the request is
        invalid.
    """
    planner = get_planner(request.method)
    if planner.reads_rows:
        raise InputError(f"{NO_PREDICTION_REASON} Give a budget instead of max-loss.")
    if planner.reads_refinement:
        raise InputError(
            "A plan is refined within a budget; give the budget of the search instead of max-loss."
        )
    settings = settings_on_ladder(settings, request)
    profile = profile_model(model, settings, [*prediction.METRICS, *planner.metrics])
    problem = build_problem(model.info, profile)
    check_metrics(model.info, problem, request)
    restricted = restrict(problem.with_options(planner.options(request)), request)
    predictor = fit_predictor(model, problem, settings, corpus, protocol)
    frontier = make_frontier(restricted, request)
    budget = prediction.smallest_budget_within(frontier, predictor, restricted, max_loss)
    # All digits, so that the budget leads to the same plan.
    return replace(request, budget=f"{8 * budget / problem.total!r}bpp")
