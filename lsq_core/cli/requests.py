"""What options of the command line ask for: models, profile settings, plans and evaluations."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from lsq_core.bits import PAPER
from lsq_core.errors import InputError
from lsq_core.evaluation.protocol import EvaluationRequest
from lsq_core.model.source import ModelSource
from lsq_core.planning.methods import PLANNERS, get_planner
from lsq_core.planning.methods.refined import Refined
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.session import Session


def model_source(options: argparse.Namespace) -> ModelSource:
    """The model that was named."""
    return ModelSource(
        options.model, options.revision, options.trust_remote_code, options.allow_pickle
    )


def profile_settings(
    options: argparse.Namespace, session: Session, quantizer: str | None, calibration: str | None
) -> ProfileSettings:
    """The profile settings that were given, and the model's defaults for the others."""
    chosen = {
        "quantizer": quantizer,
        "axis": options.axis,
        "metadata": options.metadata,
        "ladder": options.ladder,
        "calibration": calibration,
        "samples": options.samples,
        "block_tokens": options.block_tokens,
    }
    options_given = {name: value for name, value in chosen.items() if value is not None}
    return replace(session.default_settings, **options_given)


def optional_model_source(options: argparse.Namespace) -> ModelSource | None:
    """The model, if one was named."""
    return model_source(options) if options.model else None


def plan_request(options: argparse.Namespace, method: str | None = None) -> PlanRequest:
    """What to plan for; a sweep gives one of its methods, and sizes of its own later."""
    one = method is None
    method = options.method if one else method
    if not method:
        raise InputError(f"Give a method with --method: {', '.join(PLANNERS)}.")
    if one and options.start and not get_planner(method).reads_refinement:
        raise InputError(f"--start is for --method {Refined.name}; {method} starts from no plan.")
    return PlanRequest(
        method=method,
        base=options.base if one else None,
        budget=options.budget if one else None,
        boost_stop=options.boost_stop,
        top_m=options.top_m,
        metric=options.metric,
        seed=options.seed,
        exact=options.exact,
        low_bits=options.low_bits,
        high_bits=options.high_bits,
        group_size=options.group_size,
        loss=options.loss,
        ratios=options.ratios,
        clip=options.clip,
        **_restrictions(options),
    )


def refine_request(options: argparse.Namespace) -> PlanRequest:
    """Which plan to refine, within which budget and restrictions."""
    return PlanRequest(method=options.method, budget=options.budget, **_restrictions(options))


def _restrictions(options: argparse.Namespace) -> dict[str, Any]:
    """What a plan may choose from, and the plan that it starts from."""
    return {
        "pins": tuple(options.pin),
        "ties": tuple(options.tie),
        "serve": options.serve,
        "ladder": options.ladder or PAPER,
        "start": options.start,
    }


def evaluation_request(options: argparse.Namespace) -> EvaluationRequest:
    """What to evaluate on."""
    return EvaluationRequest(options.corpus, options.protocol, options.max_tokens)
