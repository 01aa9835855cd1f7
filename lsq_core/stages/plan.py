"""Make plans from a profile and a request: a configuration for each matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from lsq_core.bits import (
    DETECTION_CONFIG,
    PAPER,
    Budget,
    Config,
    QuantConfig,
    get_ladder,
    matrix_bytes,
    nominal_bytes,
    stop_index,
)
from lsq_core.corpus.registry import corpus_identity
from lsq_core.errors import InputError
from lsq_core.model.info import Matrix, ModelInfo
from lsq_core.planning.constraints import apply_ties, restrict
from lsq_core.planning.make import make_plan
from lsq_core.planning.methods import PLANNERS, get_planner
from lsq_core.planning.methods.refined import check_refinable
from lsq_core.planning.plan import Plan
from lsq_core.planning.problem import TOLERANCE, Problem, Refinement
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling.metrics import METRICS
from lsq_core.profiling.profile import Profile
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.progress import timed
from lsq_core.quantization.registry import (
    incompatibility_reason,
    mixed_rows_incompatibility,
    planned_bytes,
    quantizer_spec,
)
from lsq_core.settings import CalibrationSettings
from lsq_core.stages.model import OpenModel
from lsq_core.stages.profile import Measurer, measure_here, planning_profile
from lsq_core.stages.refined import load_refinement
from lsq_core.stages.rows import row_impact
from lsq_core.units import format_bytes

if TYPE_CHECKING:
    from lsq_core.planning.frontier import Frontier

#: Profile settings that name the calibration text and how much of it is used.
_CALIBRATION = ("calibration", "samples", "block_tokens", "seed")


@timed("plan")
def plan_model(
    model: OpenModel,
    request: PlanRequest,
    settings: ProfileSettings,
    refinement: Refinement | None = None,
    measure: Measurer = measure_here,
) -> Plan:
    """Make a plan, measuring missing scores first by ``measure``.

    ``refinement`` is the result of a search, for a refined plan; by default the stored one. No
    search is run here.

    Raises
    ------
    InputError
        If the request cannot be met; see :func:`lsq_core.planning.make.make_plan`.
    """
    planner = get_planner(request.method)
    if planner.reads_refinement:
        check_refinable(get_planner(request.refined_from))
    metrics = required_metrics(request)
    check_budget(model, request, settings)
    options = planner.options(request)
    own = settings_on_ladder(settings, request)
    profile = _cached_profile(model, own, metrics, measure) if metrics else None
    problem = _cached_problem(model, profile).with_options(options)
    if planner.reads_rows:
        problem = replace(problem, impact=row_impact(model, request, settings))
    if planner.reads_refinement:
        if refinement is None:
            restricted, metadata = restrict(problem, request), settings.metadata
            refinement = load_refinement(model.store, profile.id, restricted, request, metadata)
        problem = replace(problem, refinement=refinement)
    model.report("plan", 0, 1, planner.title)
    plan = make_model_plan(model.info, problem, request, settings)
    model.report("plan", 1, 1, f"{plan.bits_per_param:.3f} bits per parameter")
    return replace(plan, profile=profile.id) if profile else plan


def check_budget(model: OpenModel, request: PlanRequest, settings: ProfileSettings) -> None:
    """Reject an unreachable budget before anything is measured or downloaded.

    Raises
    ------
    InputError
        As :meth:`lsq_core.planning.request.PlanRequest.resolve_budget`.
    """
    options = get_planner(request.method).options(request)
    unmeasured = Problem(model.config_info.matrices).with_options(options)
    request.resolve_budget(apply_ties(unmeasured, request), settings.metadata)


def settings_on_ladder(settings: ProfileSettings, request: PlanRequest) -> ProfileSettings:
    """Return the settings of a profile with all the configurations of a request's ladder."""
    return settings if request.ladder == PAPER else replace(settings, ladder=request.ladder)


def _cached_profile(
    model: OpenModel, settings: ProfileSettings, metrics: Sequence[str], measure: Measurer
) -> Profile:
    """Return the profile to plan from, cached because a sweep uses it many times."""
    known = model.profiles.get(settings)
    if known is None or not set(metrics) <= set(known.metrics):
        known = model.profiles[settings] = planning_profile(model, settings, metrics, measure)
    return known


def required_metrics(request: PlanRequest) -> tuple[str, ...]:
    """Return the metrics used by a request's method; for a refinement those of its start."""
    planner = get_planner(request.method)
    return (
        get_planner(request.refined_from).metrics if planner.reads_refinement else planner.metrics
    )


def _cached_problem(model: OpenModel, profile: Profile | None) -> Problem:
    """Return the planning problem of a profile, cached because a sweep uses it many times."""
    key = (profile.id, profile.metrics) if profile else None
    if key not in model.problems:
        model.problems[key] = build_problem(model.info, profile)
    return model.problems[key]


def model_problem(model: OpenModel, profile: str | None) -> Problem:
    """Return the planning problem of a stored profile, or one without scores."""
    return _cached_problem(model, model.store.profile(profile) if profile else None)


def build_problem(info: ModelInfo, profile: Profile | None) -> Problem:
    """Build the problem that planners solve, from the matrices and a profile's scores.

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
                continue  # methods need its scores at the detection configuration
            scores[name] = profile.scores(name, DETECTION_CONFIG)
        by_config[name] = np.stack([at(name, config) for config in profile.ladder], axis=1)
    return Problem(info.matrices, scores, by_config, options=profile.ladder)


def missing_metrics(problem: Problem, request: PlanRequest) -> list[str]:
    """Return the metrics used by a request's method that a profile's problem lacks."""
    held = problem.scores.keys() | problem.by_config.keys()
    fields = get_planner(request.method).fields
    read = {"sensitivity": request.metric} if "metric" in fields else {}
    return [m for m in (read.get(m, m) for m in required_metrics(request)) if m not in held]


def check_metrics(info: ModelInfo, problem: Problem, request: PlanRequest) -> None:
    """Raise :class:`InputError` if the profile lacks a metric used by the method.

    The message lists the methods that the profile suffices for.
    """
    missing = missing_metrics(problem, request)
    if missing:
        others = [
            name
            for name, p in PLANNERS.items()
            if p.metrics and not missing_metrics(problem, replace(request, method=name))
        ]
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
    """Make a method's plan for a problem; see :func:`lsq_core.planning.make.make_plan`.

    A mixed-row plan records the text on which its rows were scored.

    Raises
    ------
    InputError
        If the profile lacks a metric used by the method, or the request cannot be met.
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
    """Return the plan for a quantizer, which sets its bytes and its calibration text, if any.

    A mixed-row plan keeps the text on which its rows were scored, and a plan with a text for the
    same quantizer (of a run that is repeated) keeps that text.

    Raises
    ------
    InputError
        If the quantizer stores more bytes than the plan's budget.
    """
    reason = budget_excess(plan, quantizer)
    if reason:
        raise InputError(reason)
    if plan.calibration and (plan.rows or plan.quantizer == quantizer):
        return replace(plan, quantizer=quantizer)
    text = _calibration_source(settings) if quantizer_spec(quantizer).calibrated else None
    return replace(plan, quantizer=quantizer, calibration=text)


def budget_excess(plan: Plan, quantizer: str) -> str:
    """Return why a plan exceeds its budget in bytes if stored by a quantizer, or ''."""
    if plan.request.budget is None or quantizer == plan.quantizer:
        return ""
    budget = plan.request.parse_budget(plan.parameters)
    stored = replace(plan, quantizer=quantizer).planned_bytes
    if budget.planned_bytes is None or not plan.planned_bytes <= budget.planned_bytes < stored:
        return ""
    return (
        f"The plan within {budget.text} takes {format_bytes(stored)} as "
        f"{quantizer_spec(quantizer).title} stores it; choose a smaller budget, or one in bits per "
        "parameter."
    )


def _calibration_source(settings: ProfileSettings) -> dict:
    """Return the calibration text of settings and how much of it is used, as in a plan."""
    text = {name: getattr(settings, name) for name in _CALIBRATION}
    return text | {"corpus": corpus_identity(settings.calibration)}


def calibration_of_plan(plan: Plan) -> CalibrationSettings:
    """Return the calibration settings in a plan, or the default ones if it has none."""
    text = plan.calibration or {}
    named = {name: text[name] for name in _CALIBRATION if name in text}
    if "calibration" in named:
        named["corpus"] = named.pop("calibration")
    return CalibrationSettings(**named)


def request_incompatibility(
    problem: Problem, request: PlanRequest, quantizer: str, axis: int
) -> str:
    """Return why no plan for a request can be stored by a quantizer, as far as known in advance.

    The result is '' if no reason is known; the plan itself must still be checked
    (:func:`lsq_core.quantization.registry.check_choice`).

    Raises
    ------
    InputError
        If the request itself is invalid.
    """
    problem = problem.with_options(get_planner(request.method).options(request))
    known, reason = quantizer_spec(quantizer), incompatibility_reason(quantizer, {}, axis)
    offered = [option for option in problem.options if option in known.options]
    if reason or not offered:
        return reason or mixed_rows_incompatibility(known)
    if request.base:
        stop = stop_index(request.base, get_ladder(request.ladder))
        base, pinned = problem.options[stop], restrict(problem, request)
        free = (pinned.low <= stop) & (stop <= pinned.high)
        kept = [m for m, is_free in zip(problem.matrices, free, strict=True) if is_free]
        return incompatibility_reason(quantizer, dict.fromkeys(kept, base) if kept else {}, axis)
    budget = request.resolve_budget(apply_ties(problem, request))
    if budget is None:
        return ""
    smallest = sum(
        min(_option_bytes(quantizer, m, option, budget) for option in offered)
        for m in problem.matrices
    )
    if (budget.nominal_bytes or budget.planned_bytes) * (1 + TOLERANCE) >= smallest:
        return ""
    return (
        f"{known.title} supports {', '.join(c.name for c in offered)}, which take at "
        f"least {problem.format_size(smallest)}; a budget of {budget.text} is below that."
    )


def _option_bytes(quantizer: str, matrix: Matrix, option: Config, budget: Budget) -> float:
    """Return the bytes of a matrix in the kind of bytes that a budget limits."""
    if budget.planned_bytes is None:
        return matrix_bytes(nominal_bytes, matrix, option)
    return planned_bytes(quantizer, matrix.shape, option, "8bit")


def plan_identity(plan: Plan) -> list[object]:
    """Return a key that is equal for plans that store the same, whatever their requests."""
    return content_identity(plan.to_json())


def content_identity(content: dict) -> list[object]:
    """Return :func:`plan_identity` from a plan's JSON, including any high-impact rows."""
    configs = [
        [name, entry["config"], *filter(None, [entry.get("rows")])]
        for name, entry in content["modules"].items()
    ]
    alike = [content["method"], content["metadata"], content["axis"], content.get("calibration")]
    return [*alike, sorted(configs)]
