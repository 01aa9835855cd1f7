"""Plans: from a profile and a request to what each matrix gets."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from lsq_core.bits import (
    DETECTION_CONFIG,
    LADDER,
    QuantConfig,
    matrix_bytes,
    nominal_bytes,
    stop_index,
)
from lsq_core.corpus.registry import corpus_identity
from lsq_core.errors import InputError
from lsq_core.model.info import ModelInfo
from lsq_core.planning.constraints import apply_ties, restrict
from lsq_core.planning.make import make_plan
from lsq_core.planning.methods import PLANNERS, get_planner
from lsq_core.planning.plan import Plan
from lsq_core.planning.problem import TOLERANCE, Problem
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling.metrics import METRICS
from lsq_core.profiling.profile import Profile
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.progress import timed
from lsq_core.quantization.registry import (
    incompatibility_reason,
    mixed_rows_incompatibility,
    quantizer_spec,
)
from lsq_core.settings import CalibrationSettings
from lsq_core.stages.model import OpenModel
from lsq_core.stages.profile import planning_profile
from lsq_core.stages.rows import row_impact

if TYPE_CHECKING:
    from lsq_core.planning.frontier import Frontier

#: The settings of a profile that name its calibration text, and how much of it is read.
_CALIBRATION = ("calibration", "samples", "block_tokens", "seed")


@timed("plan")
def plan_model(model: OpenModel, request: PlanRequest, settings: ProfileSettings) -> Plan:
    """A plan; what it needs of the model is measured first.

    Raises
    ------
    InputError
        When the request cannot be met; see :func:`lsq_core.planning.make.make_plan`.
    """
    planner = get_planner(request.method)
    # A budget out of reach is rejected before anything is measured or downloaded.
    options = planner.options(request)
    unmeasured = Problem(model.config_info.matrices).with_options(options)
    request.resolve_budget(apply_ties(unmeasured, request))
    profile = planning_profile(model, settings, planner.metrics) if planner.metrics else None
    problem = _cached_problem(model, profile).with_options(options)
    if planner.reads_rows:
        problem = replace(problem, impact=row_impact(model, request, settings))
    model.report("plan", 0, 1, planner.title)
    plan = make_model_plan(model.info, problem, request, settings)
    model.report("plan", 1, 1, f"{plan.bits_per_param:.3f} bits per parameter")
    return replace(plan, profile=profile.id) if profile else plan


def _cached_problem(model: OpenModel, profile: Profile | None) -> Problem:
    """The planning problem of a profile, cached: a sweep plans from one many times."""
    key = (profile.id, profile.metrics) if profile else None
    if key not in model.problems:
        model.problems[key] = build_problem(model.info, profile)
    return model.problems[key]


def build_problem(info: ModelInfo, profile: Profile | None) -> Problem:
    """What planners see: matrices, and those of a profile's scores that it holds.

    A published profile may lack metrics, or a metric at some stops (NaN there).
    """
    if profile is None:
        return Problem(info.matrices)
    held = set(zip(profile.values["metric"], profile.values["config"], strict=True))
    metrics = {metric for metric, _ in held}
    all_nan = np.full(len(info.matrices), np.nan)

    def at(metric: str, config: QuantConfig) -> np.ndarray:
        return profile.scores(metric, config) if (metric, config.name) in held else all_nan

    scores, by_config = {}, {}
    for name, metric in METRICS.items():
        if metric.proxy_of or name not in metrics:
            continue
        if not metric.by_config:
            scores[name] = profile.scores(name)
            continue
        if metric.detects_outliers:
            if (name, DETECTION_CONFIG.name) not in held:
                continue  # methods need its score at the detection configuration
            scores[name] = profile.scores(name, DETECTION_CONFIG)
        by_config[name] = np.stack([at(name, config) for config in LADDER], axis=1)
    return Problem(info.matrices, scores, by_config)


def check_metrics(info: ModelInfo, problem: Problem, request: PlanRequest) -> None:
    """Raise :class:`InputError` when the profile lacks what the method reads.

    The sentence names the methods for which it has enough.
    """
    held = problem.scores.keys() | problem.by_config.keys()

    def lacks(method: str) -> list[str]:
        planner = get_planner(method)
        read = {"sensitivity": request.metric} if "metric" in planner.fields else {}
        return [m for m in (read.get(m, m) for m in planner.metrics) if m not in held]

    missing = lacks(request.method)
    if missing:
        others = [name for name, p in PLANNERS.items() if p.metrics and not lacks(name)]
        first, last = ", ".join(others[:-1]), (others or ["uniform"])[-1]
        raise InputError(
            f"{info.source} has no {' and no '.join(missing)}, so "
            f"{get_planner(request.method).title} cannot plan for it; choose "
            f"{first}{' or ' if first else ''}{last}."
        )


def make_model_plan(
    info: ModelInfo,
    problem: Problem,
    request: PlanRequest,
    settings: ProfileSettings,
    frontier: Frontier | None = None,
) -> Plan:
    """The plan that a method makes of what is known, as :func:`lsq_core.planning.make.make_plan`.

    One of mixed rows names the text that they were scored on.

    Raises
    ------
    InputError
        When the profile lacks what the method reads, or the request cannot be met.
    """
    check_metrics(info, problem, request)
    plan = make_plan(
        problem,
        request,
        metadata=settings.metadata,
        axis=settings.axis,
        other_bytes=info.other_bytes,
        frontier=frontier,
    )
    return replace(plan, calibration=_calibration_source(settings)) if plan.rows else plan


def with_quantizer(plan: Plan, quantizer: str, settings: ProfileSettings) -> Plan:
    """The plan as a quantizer will carry it out: its bytes, and the text that it reads, if any.

    A plan of mixed rows has the text that they were scored on with it, and that of a run that is
    done again the one of that run.
    """
    if plan.calibration and (plan.rows or plan.quantizer == quantizer):
        return replace(plan, quantizer=quantizer)
    text = _calibration_source(settings) if quantizer_spec(quantizer).calibrated else None
    return replace(plan, quantizer=quantizer, calibration=text)


def _calibration_source(settings: ProfileSettings) -> dict:
    """Which text settings name, and how much of it is read, as a plan tells it."""
    text = {name: getattr(settings, name) for name in _CALIBRATION}
    return text | {"corpus": corpus_identity(settings.calibration)}


def calibration_of_plan(plan: Plan) -> CalibrationSettings:
    """The calibration text that a plan names, the usual one where it names none."""
    text = plan.calibration or {}
    named = {name: text[name] for name in _CALIBRATION if name in text}
    if "calibration" in named:
        named["corpus"] = named.pop("calibration")
    return CalibrationSettings(**named)


def request_incompatibility(
    problem: Problem, request: PlanRequest, quantizer: str, axis: int
) -> str:
    """Why no plan of a request can be carried out by a quantizer, as far as that is known now.

    Returns an empty string if nothing does; the plan itself has to be checked as well
    (:func:`lsq_core.quantization.registry.check_choice`).

    Raises
    ------
    InputError
        When the request itself is wrong.
    """
    problem = problem.with_options(get_planner(request.method).options(request))
    known, reason = quantizer_spec(quantizer), incompatibility_reason(quantizer, {}, axis)
    offered = [option for option in problem.options if option in known.options]
    if reason or not offered:
        return reason or mixed_rows_incompatibility(known)
    if request.base:
        base = LADDER[stop_index(request.base)]
        pinned = restrict(problem, request)
        stop = LADDER.index(base)
        free = (pinned.low <= stop) & (stop <= pinned.high)
        kept = [m for m, is_free in zip(problem.matrices, free, strict=True) if is_free]
        return incompatibility_reason(quantizer, dict.fromkeys(kept, base) if kept else {}, axis)
    budget = request.resolve_budget(apply_ties(problem, request))
    if budget is None:
        return ""
    smallest = sum(
        min(matrix_bytes(nominal_bytes, m, option) for option in offered) for m in problem.matrices
    )
    if budget.nominal_bytes * (1 + TOLERANCE) >= smallest:
        return ""
    return (
        f"{known.title} supports {', '.join(c.name for c in offered)}, which take at "
        f"least {problem.format_size(smallest)}; a budget of {budget.text} is below that."
    )


def plan_identity(plan: Plan) -> list[object]:
    """What two plans share that store the same, whatever they were asked for."""
    return content_identity(plan.to_json())


def content_identity(content: dict) -> list[object]:
    """The same of a plan's JSON; the high-impact rows go with the configuration."""
    configs = [
        [name, entry["config"], *filter(None, [entry.get("rows")])]
        for name, entry in content["modules"].items()
    ]
    alike = [content["method"], content["metadata"], content["axis"], content.get("calibration")]
    return [*alike, sorted(configs)]
