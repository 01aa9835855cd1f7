"""What is known already: models, profiles and plans, looked up once and remembered.

Reads of the database are remembered by its state on disk, so that what a job or another tab
wrote is seen at once; profiles and plans by their identity, which tells all they depend on.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pandas as pd
import streamlit as st

from lsq_core.corpus import corpus_identity
from lsq_core.model import ModelInfo, ModelSource, find_model, fingerprint
from lsq_core.pipeline import Workbench, problem_of
from lsq_core.plan import Plan, PlanRequest, Problem, make_plan
from lsq_core.profile import Profile, ProfileSettings
from lsq_core.store import Store

#: A file's path and when it was written last.
Stamp = tuple[str, int, int]


def stamp(store: Store) -> Stamp:
    """What changes when anything in the database does."""
    state = store.path.stat()
    return str(store.path), state.st_mtime_ns, state.st_size


# --- models ---------------------------------------------------------------------------------


def models(store: Store) -> pd.DataFrame:
    """Every model in the database, newest first."""
    return _models(store, stamp(store))


@st.cache_data(max_entries=4, show_spinner=False)
def _models(_store: Store, at: Stamp) -> pd.DataFrame:
    return _store.models()


def model_info(store: Store, source: ModelSource) -> ModelInfo:
    """What is known of a model, before any of its weights is loaded.

    A model seen before comes out of the database; else its config is read, and for a remote one
    nothing but its config is fetched.

    Raises
    ------
    LsqError
        When there is no such model.
    """
    mark = _fingerprint(store, source)
    known = _model(store, stamp(store), mark) if mark else None
    if known is not None:
        return replace(known, source=source.name, revision=source.revision)
    with st.spinner(f"Looking at {source.name}…"):
        if source.is_local:
            return Workbench(source, store).info
        return _inspect(source)


def _fingerprint(store: Store, source: ModelSource) -> str | None:
    """A local model's from its files; a remote one's as it was when it was last fetched."""
    if source.is_local:
        return fingerprint(find_model(source))
    table = models(store)
    same = table[(table["source"] == source.name) & (table["revision"].isna())]
    if source.revision:
        same = table[(table["source"] == source.name) & (table["revision"] == source.revision)]
    return None if same.empty else same["fingerprint"].iloc[0]


@st.cache_resource(max_entries=16, show_spinner=False)
def _model(_store: Store, at: Stamp, mark: str) -> ModelInfo | None:
    return _store.model(mark)


@st.cache_resource(max_entries=16, ttl=3600, show_spinner=False)
def _inspect(source: ModelSource) -> ModelInfo:
    from lsq_core.load import inspect_model

    return inspect_model(source)


# --- profiles -------------------------------------------------------------------------------


def newest_settings(store: Store, info: ModelInfo) -> ProfileSettings | None:
    """The settings of the model's newest profile, if it has one."""
    table = _profiles(store, stamp(store), info.fingerprint)
    return ProfileSettings(**json.loads(table["settings"].iloc[0])) if len(table) else None


@st.cache_data(max_entries=16, show_spinner=False)
def _profiles(_store: Store, at: Stamp, mark: str) -> pd.DataFrame:
    return _store.profiles(mark)


def profile(store: Store, info: ModelInfo, settings: ProfileSettings) -> Profile | None:
    """The model's profile under these settings, if it was measured.

    Raises
    ------
    InputError
        When the calibration corpus is nothing known.
    """
    if not info.fingerprint:
        return None
    key = settings.key(info.fingerprint, corpus_identity(settings.calibration))
    if key not in set(_profiles(store, stamp(store), info.fingerprint)["id"]):
        return None
    return _profile(store, str(store.path), key)


@st.cache_resource(max_entries=6, show_spinner=False)
def _profile(_store: Store, path: str, key: str) -> Profile:
    return _store.profile(key)


# --- plans ----------------------------------------------------------------------------------


def problem(info: ModelInfo, found: Profile | None) -> Problem:
    """What planners see, remembered by the model's and the profile's identity."""
    return _problem(info, found, _identity(info), found.id if found else None)


@st.cache_resource(max_entries=6, show_spinner=False)
def _problem(_info: ModelInfo, _found: Profile | None, model: str, key: str | None) -> Problem:
    return problem_of(_info, _found)


def plan(
    info: ModelInfo, found: Profile | None, request: PlanRequest, settings: ProfileSettings
) -> Plan:
    """The plan for a request, remembered by what it depends on.

    Raises
    ------
    LsqError
        When the request cannot be met; see :func:`lsq_core.plan.make_plan`.
    """
    asked = (json.dumps(request.__dict__), settings.metadata, settings.axis)
    return _plan(
        info, found, request, settings, _identity(info), found.id if found else None, asked
    )


@st.cache_resource(max_entries=128, show_spinner="Planning…")
def _plan(
    _info: ModelInfo,
    _found: Profile | None,
    _request: PlanRequest,
    _settings: ProfileSettings,
    model: str,
    key: str | None,
    asked: tuple,
) -> Plan:
    return make_plan(
        problem(_info, _found),
        _request,
        metadata=_settings.metadata,
        axis=_settings.axis,
        other_bytes=_info.other_bytes,
    )


def _identity(info: ModelInfo) -> str:
    """The fingerprint; a model not fetched yet has none and is known by its name."""
    return info.fingerprint or f"{info.source}@{info.revision}"


def named_plans(store: Store, mark: str) -> pd.DataFrame:
    """Plans of a model that were kept under a name, newest first: ``id, name``."""
    return _named_plans(store, stamp(store), mark)


@st.cache_data(max_entries=4, show_spinner=False)
def _named_plans(_store: Store, at: Stamp, mark: str) -> pd.DataFrame:
    return _store.query(
        "SELECT id, name FROM plans WHERE fingerprint = ? AND name <> '' ORDER BY created DESC",
        [mark],
    )


# --- results --------------------------------------------------------------------------------


def results(store: Store) -> pd.DataFrame:
    """Every run in the database; see :meth:`lsq_core.store.Store.results`."""
    return _results(store, stamp(store))


@st.cache_data(max_entries=2, show_spinner=False)
def _results(_store: Store, at: Stamp) -> pd.DataFrame:
    return _store.results()
