"""Cached models, profiles and plans.

Database reads are cached by the state of its file, so that changes written by a job or another tab
show up immediately; problems and plans are cached by the identity of their inputs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np
import pandas as pd

from lsq_core.bits import EXTENDED, PAPER, Config
from lsq_core.errors import InputError
from lsq_core.model.identity import with_source
from lsq_core.model.info import ModelInfo
from lsq_core.model.source import ModelSource
from lsq_core.planning.constraints import restrict
from lsq_core.planning.frontier import Frontier
from lsq_core.planning.make import make_frontier
from lsq_core.planning.methods import PLANNERS, get_planner
from lsq_core.planning.plan import Plan
from lsq_core.planning.problem import Impact, Problem, Refinement
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling.profile import Profile
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.provenance import DeviceAndDtype
from lsq_core.session import Session
from lsq_core.stages.model import find_published, known_identity, resolve_device_and_dtype
from lsq_core.stages.plan import build_problem, check_metrics, make_model_plan
from lsq_core.stages.profile import find_profile_key, profile_key
from lsq_core.stages.refined import load_refinement
from lsq_core.stages.rows import interaction_key, load_impact
from lsq_core.store.models import PUBLISHED
from lsq_core.store.profiles import InteractionKey
from lsq_core.store.store import Store
from lsq_core.ui.hub_lookup import look_up
from lsq_core.ui.safe import st

#: A file's path, modification time (ns) and size.
FileVersion = tuple[str, int, int]
#: Measurements that a method uses besides the profile.
Measured = Impact | Refinement


#: Number of budgets at which a frontier is sampled.
CURVE_POINTS = 160


def file_version(store: Store) -> FileVersion:
    """Return a key that changes whenever the database does."""
    state = store.path.stat()
    return str(store.path), state.st_mtime_ns, state.st_size


# --- models ---------------------------------------------------------------------------------


def models(store: Store, origin: str = "measured") -> pd.DataFrame:
    """Return the models of one origin; see :meth:`lsq_core.store.store.Store.models`."""
    return _models(store, file_version(store), origin)


@st.cache_data(max_entries=4, show_spinner=False)
def _models(_store: Store, at: FileVersion, origin: str) -> pd.DataFrame:
    return _store.models(origin)


def is_published(info: ModelInfo) -> bool:
    """Return whether a model has only published measurements, without weights."""
    return info.fingerprint.startswith(PUBLISHED)


def published(store: Store, source: ModelSource) -> ModelInfo | None:
    """Return the published model that a source names, or None.

    Raises
    ------
    InputError
        If ``published:NAME`` was never imported.
    """
    return _published(store, file_version(store), source)


@st.cache_resource(max_entries=16, show_spinner=False)
def _published(_store: Store, at: FileVersion, source: ModelSource) -> ModelInfo | None:
    return find_published(source, _store)


def model_info(store: Store, source: ModelSource) -> ModelInfo:
    """Return a model's description without loading its weights.

    A known model is read from the database, otherwise its config is read; for a remote model only
    the config is fetched.

    Raises
    ------
    LsqError
        If there is no such model; :class:`lsq_core.ui.hub_lookup.LookupPending` while it is still
        being looked up.
    """
    without_weights = published(store, source)
    if without_weights is not None:
        return without_weights
    found = known_identity(source, store)
    known = cached_model(store, file_version(store), found.fingerprint) if found else None
    if known is not None:
        return with_source(known, source, found)
    with st.spinner(f"Reading {source.name}…"):
        if found:
            return Session(source, store).info
        return look_up(source)


@st.cache_resource(max_entries=16, show_spinner=False)
def cached_model(_store: Store, at: FileVersion, mark: str) -> ModelInfo | None:
    return _store.model(mark)


# --- profiles -------------------------------------------------------------------------------


def newest_settings(store: Store, info: ModelInfo) -> ProfileSettings | None:
    """Return the settings of the model's newest profile, or None.

    Profiles measured here come before those shipped with the project.
    """
    table = _profiles(store, file_version(store), info.fingerprint)
    return ProfileSettings(**json.loads(table["settings"].iloc[0])) if len(table) else None


def settings_with(store: Store, info: ModelInfo, metrics: Sequence[str]) -> ProfileSettings | None:
    """Return the settings of the model's newest profile that has all of ``metrics``, or None."""
    contents = profile_contents(store)
    held = contents.groupby("id")["metric"].agg(set)
    for row in _profiles(store, file_version(store), info.fingerprint).itertuples():
        if set(metrics) <= held.get(row.id, set()):
            return ProfileSettings(**json.loads(row.settings))
    return None


@st.cache_data(max_entries=16, show_spinner=False)
def _profiles(_store: Store, at: FileVersion, mark: str) -> pd.DataFrame:
    return _store.profiles(mark)


def profile(
    store: Store, info: ModelInfo, settings: ProfileSettings, device: str = "auto"
) -> Profile | None:
    """Return the model's profile with these settings for this device, or None if not measured.

    Raises
    ------
    InputError
        If the calibration corpus is unavailable and no shipped profile of the model uses it.
    """
    if not info.fingerprint:
        return None
    if is_published(info):  # the key can't be computed without the calibration text
        key = published_settings(store, info).get(settings)
    else:
        key = _profile_key(store, info, settings, device)
    if key not in set(_profiles(store, file_version(store), info.fingerprint)["id"]):
        return None
    return _profile(store, file_version(store), key)


def planning_profile(
    store: Store, info: ModelInfo, settings: ProfileSettings, device: str = "auto"
) -> Profile | None:
    """Return the profile to plan from: with these settings, else on the extended ladder.

    The extended ladder includes the paper's; published profiles have no such fallback.

    Raises
    ------
    InputError
        As in :func:`profile`.
    """
    found = profile(store, info, settings, device)
    if found is None and settings.ladder == PAPER and not is_published(info):
        return profile(store, info, replace(settings, ladder=EXTENDED), device)
    return found


def _profile_key(store: Store, info: ModelInfo, settings: ProfileSettings, device: str) -> str:
    device_and_dtype = resolve_device_and_dtype(info, device)
    try:
        key = profile_key(info, settings, device_and_dtype)
    except InputError:  # the text isn't here; a shipped profile doesn't need it
        shipped = _shipped_profiles(store, file_version(store), info.fingerprint)
        if settings.calibration not in {known["calibration"] for known in shipped.values()}:
            raise
        return next((id for id, known in shipped.items() if known == settings.to_json()), "")
    _migrate_older_profile(store, file_version(store), key, info, settings, device_and_dtype)
    return key


@st.cache_data(max_entries=32, show_spinner=False)
def _shipped_profiles(_store: Store, at: FileVersion, mark: str) -> dict[str, dict]:
    return _store.shipped_profiles(mark)


@st.cache_data(max_entries=32, show_spinner=False)
def _migrate_older_profile(
    _store: Store,
    at: FileVersion,
    key: str,
    _info: ModelInfo,
    _settings: ProfileSettings,
    _device_and_dtype: DeviceAndDtype,
) -> None:
    """Move a profile saved by an older version to its new key, once per state of the store."""
    find_profile_key(_store, _info, _settings, _device_and_dtype)


@st.cache_resource(max_entries=6, show_spinner=False)
def _profile(_store: Store, at: FileVersion, key: str) -> Profile:
    return _store.profile(key)


def published_settings(store: Store, info: ModelInfo) -> dict[ProfileSettings, str]:
    """Map the settings of a published model's profiles to their ids, main profile first."""
    table = _profiles(store, file_version(store), info.fingerprint)
    settings = (ProfileSettings(**json.loads(text)) for text in table["settings"])
    return dict(zip(settings, table["id"], strict=True))


def profile_contents(store: Store) -> pd.DataFrame:
    """Return the contents of every profile; see :meth:`Store.profile_contents`."""
    return _profile_contents(store, file_version(store))


@st.cache_data(max_entries=2, show_spinner=False)
def _profile_contents(_store: Store, at: FileVersion) -> pd.DataFrame:
    return _store.profile_contents()


def over_layers(store: Store, ids: tuple[str, ...], metric: str) -> pd.DataFrame:
    """Return a metric of some profiles by layer; see :meth:`Store.scores_over_layers`."""
    return _over_layers(store, file_version(store), ids, metric)


@st.cache_data(max_entries=32, show_spinner=False)
def _over_layers(_store: Store, at: FileVersion, ids: tuple[str, ...], metric: str) -> pd.DataFrame:
    return _store.scores_over_layers(ids, metric)


# --- plans ----------------------------------------------------------------------------------


def problem(info: ModelInfo, found: Profile | None) -> Problem:
    """Return the planning problem, cached by the identities of model and profile."""
    return _problem(info, found, identity(info), model_mark(found))


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
    key = _profile_key(store, info, replace(settings, ladder=PAPER), device)
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


def measured(
    store: Store,
    info: ModelInfo,
    settings: ProfileSettings,
    request: PlanRequest,
    device: str = "auto",
) -> Measured | None:
    """Return the measurements that a request's method uses besides the profile, or None."""
    args = store, info, settings, request, device
    return impact(*args) or refinement(*args)


def problem_with(
    info: ModelInfo, found: Profile | None, request: PlanRequest, rows: Measured | None
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
    return _problem_of_rows(info, found, rows, options, identity(info), model_mark(found), mark)


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
    rows: Measured | None = None,
) -> Plan:
    """Return the plan for a request, cached by everything it depends on.

    ``rows`` is the result of :func:`measured` for the request.

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
        info, found, request, settings, rows, identity(info), model_mark(found), request_key
    )


@st.cache_resource(max_entries=128, show_spinner="Planning…")
def _plan(
    _info: ModelInfo,
    _found: Profile | None,
    _request: PlanRequest,
    _settings: ProfileSettings,
    _rows: Measured | None,
    model: str,
    key: str | None,
    request_key: tuple,
) -> Plan:
    planning_problem = problem_with(_info, _found, _request, _rows)
    return make_model_plan(
        _info, planning_problem, _request, _settings, frontier(_info, _found, _request, _rows)
    )


def frontier(
    info: ModelInfo, found: Profile | None, request: PlanRequest, rows: Measured | None = None
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
    return _frontier(info, found, request, rows, identity(info), model_mark(found), request_key)


@st.cache_resource(max_entries=64, show_spinner=False)
def _frontier(
    _info: ModelInfo,
    _found: Profile | None,
    _request: PlanRequest,
    _rows: Measured | None,
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
    return _error_curve(info, found, request, identity(info), model_mark(found), request_key)


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


def identity(info: ModelInfo) -> str:
    """Return the cache key of a model.

    It is the fingerprint, or source and revision for a model that has not been fetched.

    A published model's fingerprint does not depend on its content, so ``other_bytes``, which a
    later import may fill in, are appended.
    """
    mark = info.fingerprint or f"{info.source}@{info.revision}"
    return f"{mark}/{info.other_bytes}" if is_published(info) else mark


def model_mark(found: Profile | None) -> str | None:
    """Return the cache key of a profile: its id, metrics and the hashes of imported files."""
    if found is None:
        return None
    return "/".join([found.id, *sorted(found.metrics), *found.provenance.get("files", {}).values()])


def sample_frontier(planning_problem: Problem, plans: Frontier) -> tuple[np.ndarray, np.ndarray]:
    """Sample a frontier at evenly spaced budgets.

    Returns the budgets in bits per parameter (k,), and the choice at each (k, n).
    """
    ends = [s.moves[-1].bytes_after if s.moves else s.start_bytes for s in plans.segments]
    budgets = np.linspace(plans.smallest, max(ends), CURVE_POINTS)
    return 8 * budgets / planning_problem.total, np.stack(
        [plans.at(budget).choice for budget in budgets]
    )
