"""Cached models, profiles and plans.

Reads of the database are cached by its state on disk, so that what a job or another tab wrote is
seen at once; problems and plans by the identity of what they are made from.
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

#: A file's path and when it was written last.
FileVersion = tuple[str, int, int]
#: What is measured for a method beside the profile.
Measured = Impact | Refinement


#: Budgets at which perplexity is predicted along a frontier.
CURVE_POINTS = 160


def file_version(store: Store) -> FileVersion:
    """What changes when anything in the database does."""
    state = store.path.stat()
    return str(store.path), state.st_mtime_ns, state.st_size


# --- models ---------------------------------------------------------------------------------


def models(store: Store, origin: str = "measured") -> pd.DataFrame:
    """Every model of one origin in the database; see :meth:`lsq_core.store.store.Store.models`."""
    return _models(store, file_version(store), origin)


@st.cache_data(max_entries=4, show_spinner=False)
def _models(_store: Store, at: FileVersion, origin: str) -> pd.DataFrame:
    return _store.models(origin)


def is_published(info: ModelInfo) -> bool:
    """Whether a model's measurements were published, and its weights aren't here."""
    return info.fingerprint.startswith(PUBLISHED)


def published(store: Store, source: ModelSource) -> ModelInfo | None:
    """The published model that a source names, or None.

    Raises
    ------
    InputError
        When ``published:NAME`` was never imported.
    """
    return _published(store, file_version(store), source)


@st.cache_resource(max_entries=16, show_spinner=False)
def _published(_store: Store, at: FileVersion, source: ModelSource) -> ModelInfo | None:
    return find_published(source, _store)


def model_info(store: Store, source: ModelSource) -> ModelInfo:
    """What is known of a model, before any of its weights is loaded.

    A model seen before comes out of the database; else its config is read, and for a remote one
    nothing but its config is fetched.

    Raises
    ------
    LsqError
        When there is no such model; :class:`lsq_core.ui.hub_lookup.LookupPending` when it is still
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
    """The settings of the model's newest profile, if it has one."""
    table = _profiles(store, file_version(store), info.fingerprint)
    return ProfileSettings(**json.loads(table["settings"].iloc[0])) if len(table) else None


def settings_with(store: Store, info: ModelInfo, metrics: Sequence[str]) -> ProfileSettings | None:
    """The settings of the model's newest profile that holds all of some metrics, if any does."""
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
    """The model's profile under these settings, if it was measured as this device computes.

    Raises
    ------
    InputError
        When the calibration corpus is nothing known, nor that of a shipped profile.
    """
    if not info.fingerprint:
        return None
    if is_published(info):  # its text isn't here to be known by
        key = published_settings(store, info).get(settings)
    else:
        key = _profile_key(store, info, settings, device)
    if key not in set(_profiles(store, file_version(store), info.fingerprint)["id"]):
        return None
    return _profile(store, file_version(store), key)


def planning_profile(
    store: Store, info: ModelInfo, settings: ProfileSettings, device: str = "auto"
) -> Profile | None:
    """The profile to plan from: that of these settings, or one of a ladder that has theirs.

    Raises
    ------
    InputError
        As :func:`profile`.
    """
    found = profile(store, info, settings, device)
    if found is None and settings.ladder == PAPER and not is_published(info):
        return profile(store, info, replace(settings, ladder=EXTENDED), device)
    return found


def _profile_key(store: Store, info: ModelInfo, settings: ProfileSettings, device: str) -> str:
    device_and_dtype = resolve_device_and_dtype(info, device)
    try:
        key = profile_key(info, settings, device_and_dtype)
    except InputError:  # the text isn't here; it needn't be for a shipped profile
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
    """Put a profile of an older version under its key, once for each state of the store."""
    find_profile_key(_store, _info, _settings, _device_and_dtype)


@st.cache_resource(max_entries=6, show_spinner=False)
def _profile(_store: Store, at: FileVersion, key: str) -> Profile:
    return _store.profile(key)


def published_settings(store: Store, info: ModelInfo) -> dict[ProfileSettings, str]:
    """The settings of a published model's profiles, the main one first, and their identities."""
    table = _profiles(store, file_version(store), info.fingerprint)
    settings = (ProfileSettings(**json.loads(text)) for text in table["settings"])
    return dict(zip(settings, table["id"], strict=True))


def profile_contents(store: Store) -> pd.DataFrame:
    """What every profile of every model holds; see :meth:`Store.profile_contents`."""
    return _profile_contents(store, file_version(store))


@st.cache_data(max_entries=2, show_spinner=False)
def _profile_contents(_store: Store, at: FileVersion) -> pd.DataFrame:
    return _store.profile_contents()


def over_layers(store: Store, ids: tuple[str, ...], metric: str) -> pd.DataFrame:
    """A metric of some profiles over the layers; see :meth:`Store.scores_over_layers`."""
    return _over_layers(store, file_version(store), ids, metric)


@st.cache_data(max_entries=32, show_spinner=False)
def _over_layers(_store: Store, at: FileVersion, ids: tuple[str, ...], metric: str) -> pd.DataFrame:
    return _store.scores_over_layers(ids, metric)


# --- plans ----------------------------------------------------------------------------------


def problem(info: ModelInfo, found: Profile | None) -> Problem:
    """The planning problem, cached by the identities of model and profile."""
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
    """What is kept of a model's rows for a request; None where nothing is, or none is read."""
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
    """When what is kept of a profile's rows was written, or '' where there are no row scores."""
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
    """What searches found for a request, at its budget or near it; None where nothing was."""
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
    """What a request's method reads beside the profile; None where it reads or has nothing."""
    args = store, info, settings, request, device
    return impact(*args) or refinement(*args)


def problem_with(
    info: ModelInfo, found: Profile | None, request: PlanRequest, rows: Measured | None
) -> Problem:
    """What a request's planner sees: the profile, and what is measured beside it.

    Raises
    ------
    InputError
        When the profile lacks configurations of the request's ladder.
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
    """The methods that a profile has too little for."""
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
    """The plan for a request, cached by everything it depends on.

    ``rows`` is what :func:`measured` gave for it.

    Raises
    ------
    LsqError
        When the profile lacks what the method reads, or the request cannot be met; see
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
    """Every budget's plan by a request's method, base and restrictions; its budget doesn't matter.

    Raises
    ------
    LsqError
        When the profile lacks what the method reads, or what restricts it or the base is wrong.
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
    """Bits per parameter (k,) along a frontier, and each plan's summed squared weight error."""
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
    """The cache key of a model.

    It is the fingerprint; a model not fetched yet has none and is known by its name.

    A published model's tells no content, and another import may know more of its other bytes.
    """
    mark = info.fingerprint or f"{info.source}@{info.revision}"
    return f"{mark}/{info.other_bytes}" if is_published(info) else mark


def model_mark(found: Profile | None) -> str | None:
    """A profile's identity, with what may change under it: metrics, and files imported from."""
    if found is None:
        return None
    return "/".join([found.id, *sorted(found.metrics), *found.provenance.get("files", {}).values()])


def sample_frontier(planning_problem: Problem, plans: Frontier) -> tuple[np.ndarray, np.ndarray]:
    """Bits per parameter (k,) over a frontier's range, and the plan (k, n) of each."""
    ends = [s.moves[-1].bytes_after if s.moves else s.start_bytes for s in plans.segments]
    budgets = np.linspace(plans.smallest, max(ends), CURVE_POINTS)
    return 8 * budgets / planning_problem.total, np.stack(
        [plans.at(budget).choice for budget in budgets]
    )
