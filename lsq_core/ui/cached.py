"""Cached models and profiles.

Database reads are cached by the state of its file, so that changes written by a job or another tab
show up immediately.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from lsq_core.bits import EXTENDED, PAPER
from lsq_core.errors import InputError
from lsq_core.model.identity import with_source
from lsq_core.model.info import ModelInfo
from lsq_core.model.source import ModelSource
from lsq_core.profiling.profile import Profile
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.provenance import DeviceAndDtype
from lsq_core.session import Session
from lsq_core.stages.model import find_published, known_identity, resolve_device_and_dtype
from lsq_core.stages.profile import find_profile_key, profile_key
from lsq_core.store.models import PUBLISHED
from lsq_core.store.store import Store
from lsq_core.ui.hub_lookup import look_up
from lsq_core.ui.safe import st

#: A file's path, modification time (ns) and size.
FileVersion = tuple[str, int, int]


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


def model_key(info: ModelInfo) -> str:
    """Return the cache key of a model.

    It is the fingerprint, or source and revision for a model that has not been fetched.

    A published model's fingerprint does not depend on its content, so ``other_bytes``, which a
    later import may fill in, are appended.
    """
    mark = info.fingerprint or f"{info.source}@{info.revision}"
    return f"{mark}/{info.other_bytes}" if is_published(info) else mark


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
        key = stored_profile_key(store, info, settings, device)
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


def stored_profile_key(
    store: Store, info: ModelInfo, settings: ProfileSettings, device: str
) -> str:
    """Return the id of the profile with these settings.

    If the calibration text is not available, it is the id of a shipped profile measured on it, or
    '' if none has these settings.

    Raises
    ------
    InputError
        If the calibration text is not available and no shipped profile was measured on it.
    """
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


def profile_cache_key(found: Profile | None) -> str | None:
    """Return the cache key of a profile: its id, metrics and the hashes of imported files."""
    if found is None:
        return None
    return "/".join([found.id, *sorted(found.metrics), *found.provenance.get("files", {}).values()])
