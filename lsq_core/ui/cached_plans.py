"""Cached problems, plans and frontiers, by the identity of their inputs."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np

from lsq_core.bits import PAPER, Config
from lsq_core.errors import InputError
from lsq_core.model.info import ModelInfo
from lsq_core.planning.constraints import restrict
from lsq_core.planning.frontier import Frontier
from lsq_core.planning.make import make_frontier
from lsq_core.planning.methods import PLANNERS, get_planner
from lsq_core.planning.plan import Plan
from lsq_core.planning.problem import Impact, Problem, Refinement
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling.profile import Profile
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.stages.plan import build_problem, check_metrics, make_model_plan
from lsq_core.stages.refined import load_refinement
from lsq_core.stages.rows import interaction_key, load_impact
from lsq_core.store.profiles import InteractionKey
from lsq_core.store.store import Store
from lsq_core.ui.cached import (
    FileVersion,
    file_version,
    is_published,
    model_key,
    planning_profile,
    profile_cache_key,
    stored_profile_key,
)
from lsq_core.ui.safe import st

#: Measurements that a method uses besides the profile.
ExtraMeasurements = Impact | Refinement
#: Number of budgets at which a frontier is sampled.
CURVE_POINTS = 160


def problem(info: ModelInfo, found: Profile | None) -> Problem:
    """Return the planning problem, cached by the identities of model and profile."""
    return _problem(info, found, model_key(info), profile_cache_key(found))


@st.cache_resource(max_entries=6, show_spinner=False)
def _problem(_info: ModelInfo, _found: Profile | None, model: str, key: str | None) -> Problem:
    return build_problem(_info, _found)


def impact(
    store: Store,
    info: ModelInfo,
    settings: ProfileSettings,
    request: PlanRequest,
    device: str = "auto",
) -> Impact | None:
    """Return a model's stored row data for a request; None if missing or not used by its method."""
    if not get_planner(request.method).reads_rows or is_published(info) or not info.fingerprint:
        return None
    key = stored_profile_key(store, info, replace(settings, ladder=PAPER), device)
    kind = interaction_key(request)
    found = _row_scores_version(store, file_version(store), key, kind)
    if not found:
        return None
    return _impact(store, info, key, request, f"{key}/{kind}/{found}")


@st.cache_data(max_entries=16, show_spinner=False)
def _row_scores_version(_store: Store, at: FileVersion, key: str, kind: InteractionKey) -> str:
    """Return a version string of a profile's row data, or '' if there are no row scores."""
    return _store.row_data_version(key, kind)


@st.cache_resource(max_entries=4, show_spinner=False)
def _impact(_store: Store, _info: ModelInfo, _key: str, _request: PlanRequest, mark: str) -> Impact:
    return replace(load_impact(_info, _store, _key, _request), mark=mark)


def refinement(
    store: Store,
    info: ModelInfo,
    settings: ProfileSettings,
    request: PlanRequest,
    device: str = "auto",
) -> Refinement | None:
    """Return the search results at the request's budget or the nearest one, or None."""
    if not get_planner(request.method).reads_refinement or not info.fingerprint:
        return None
    profile = planning_profile(store, info, settings, device)
    if profile is None:
        return None
    key = profile.id
    request_key = json.dumps([asdict(request), settings.metadata])
    return _refinement(store, info, file_version(store), key, request_key)


@st.cache_resource(max_entries=16, show_spinner=False)
def _refinement(
    _store: Store, _info: ModelInfo, at: FileVersion, key: str, request_key: str
) -> Refinement | None:
    asked, metadata = json.loads(request_key)
    request = PlanRequest(**asked)
    restricted = restrict(Problem(_info.matrices), request)
    return load_refinement(_store, key, restricted, request, metadata)


def extra_measurements(
    store: Store,
    info: ModelInfo,
    settings: ProfileSettings,
    request: PlanRequest,
    device: str = "auto",
) -> ExtraMeasurements | None:
    """Return the measurements that a request's method uses besides the profile, or None."""
    args = store, info, settings, request, device
    return impact(*args) or refinement(*args)


def problem_with(
    info: ModelInfo, found: Profile | None, request: PlanRequest, rows: ExtraMeasurements | None
) -> Problem:
    """Return the problem for a request's planner: the profile and any further measurements.

    Raises
    ------
    InputError
        If the profile lacks configurations of the request's ladder.
    """
    if isinstance(rows, Refinement):
        return replace(problem(info, found), refinement=rows)
    options = get_planner(request.method).options(request)
    if options == problem(info, found).options:
        return problem(info, found)
    mark = rows.mark if rows else ""
    return _problem_of_rows(
        info, found, rows, options, model_key(info), profile_cache_key(found), mark
    )


@st.cache_resource(max_entries=6, show_spinner=False)
def _problem_of_rows(
    _info: ModelInfo,
    _found: Profile | None,
    _rows: Impact | None,
    options: tuple[Config, ...],
    model: str,
    key: str | None,
    mark: str,
) -> Problem:
    return replace(problem(_info, _found).with_options(options), impact=_rows)


def unavailable_methods(info: ModelInfo, planning_problem: Problem) -> list[str]:
    """Return the methods whose metrics or row data the model's profile does not have."""
    unavailable = []
    for method in PLANNERS:
        if PLANNERS[method].reads_rows and is_published(info):
            unavailable.append(method)
            continue
        try:
            check_metrics(info, planning_problem, PlanRequest(method))
        except InputError:
            unavailable.append(method)
    return unavailable


def plan(
    info: ModelInfo,
    found: Profile | None,
    request: PlanRequest,
    settings: ProfileSettings,
    rows: ExtraMeasurements | None = None,
) -> Plan:
    """Return the plan for a request, cached by everything it depends on.

    ``rows`` is the result of :func:`extra_measurements` for the request.

    Raises
    ------
    LsqError
        If the profile lacks what the method needs, or the request cannot be met; see
        :func:`lsq_core.stages.plan.make_model_plan`.
    """
    request_key = (
        json.dumps(asdict(request)),
        settings.metadata,
        settings.axis,
        rows and rows.mark,
    )
    return _plan(
        info, found, request, settings, rows, model_key(info), profile_cache_key(found), request_key
    )


@st.cache_resource(max_entries=128, show_spinner="Planning…")
def _plan(
    _info: ModelInfo,
    _found: Profile | None,
    _request: PlanRequest,
    _settings: ProfileSettings,
    _rows: ExtraMeasurements | None,
    model: str,
    key: str | None,
    request_key: tuple,
) -> Plan:
    planning_problem = problem_with(_info, _found, _request, _rows)
    return make_model_plan(
        _info, planning_problem, _request, _settings, frontier(_info, _found, _request, _rows)
    )


def frontier(
    info: ModelInfo,
    found: Profile | None,
    request: PlanRequest,
    rows: ExtraMeasurements | None = None,
) -> Frontier:
    """Return the plans at every budget for a request's method, base and restrictions.

    The request's own budget is ignored.

    Raises
    ------
    LsqError
        If the profile lacks what the method needs, or the base or a restriction is invalid.
    """
    request_key = json.dumps(
        [asdict(request) | {"budget": None, "exact": False}, rows and rows.mark]
    )
    return _frontier(
        info, found, request, rows, model_key(info), profile_cache_key(found), request_key
    )


@st.cache_resource(max_entries=64, show_spinner=False)
def _frontier(
    _info: ModelInfo,
    _found: Profile | None,
    _request: PlanRequest,
    _rows: ExtraMeasurements | None,
    model: str,
    key: str | None,
    request_key: str,
) -> Frontier:
    planning_problem = problem_with(_info, _found, _request, _rows)
    check_metrics(_info, planning_problem, _request)
    return make_frontier(restrict(planning_problem, _request), _request)


def error_curve(
    info: ModelInfo, found: Profile, request: PlanRequest
) -> tuple[np.ndarray, np.ndarray]:
    """Return bits per parameter (k,) along a frontier, and each plan's squared weight error (k,).

    Squared weight errors are summed over matrices.
    """
    request_key = json.dumps(asdict(request) | {"budget": None, "exact": False})
    return _error_curve(
        info, found, request, model_key(info), profile_cache_key(found), request_key
    )


@st.cache_resource(max_entries=32, show_spinner=False)
def _error_curve(
    _info: ModelInfo,
    _found: Profile,
    _request: PlanRequest,
    model: str,
    key: str | None,
    request_key: str,
) -> tuple[np.ndarray, np.ndarray]:
    planning_problem = problem_with(_info, _found, _request, None)
    bits, choices = sample_frontier(planning_problem, frontier(_info, _found, _request))
    errors = planning_problem.by_config["weight_error"] ** 2
    return bits, errors[np.arange(len(errors)), choices].sum(axis=1)


def sample_frontier(planning_problem: Problem, plans: Frontier) -> tuple[np.ndarray, np.ndarray]:
    """Sample a frontier at evenly spaced budgets.

    Returns the budgets in bits per parameter (k,), and the choice at each (k, n).
    """
    ends = [s.moves[-1].bytes_after if s.moves else s.start_bytes for s in plans.segments]
    budgets = np.linspace(plans.smallest, max(ends), CURVE_POINTS)
    return 8 * budgets / planning_problem.total, np.stack(
        [plans.at(budget).choice for budget in budgets]
    )
