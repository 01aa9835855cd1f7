"""Models, profile settings and requests from the options of the command line."""

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
    """Return the model given by the options."""
    return ModelSource(
        options.model, options.revision, options.trust_remote_code, options.allow_pickle
    )


def profile_settings(
    options: argparse.Namespace, session: Session, quantizer: str | None, calibration: str | None
) -> ProfileSettings:
    """Return the given profile settings, and the model's defaults for the others."""
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
    """Return the model given by the options, or None."""
    return model_source(options) if options.model else None


def plan_request(options: argparse.Namespace, method: str | None = None) -> PlanRequest:
    """Return the plan request.

    A sweep passes one of its methods, and sets base and budget later.
    """
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
    """Return the request for a refined plan."""
    return PlanRequest(method=options.method, budget=options.budget, **_restrictions(options))


def _restrictions(options: argparse.Namespace) -> dict[str, Any]:
    """Return the fields that restrict a plan, and the method whose plan it starts from."""
    return {
        "pins": tuple(options.pin),
        "ties": tuple(options.tie),
        "serve": options.serve,
        "ladder": options.ladder or PAPER,
        "start": options.start,
    }


def evaluation_request(options: argparse.Namespace) -> EvaluationRequest:
    """Return the evaluation request."""
    return EvaluationRequest(options.corpus, options.protocol, options.max_tokens)
