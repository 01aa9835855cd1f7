"""Cached queries about runs, and predictions fitted to them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd

from lsq_core.charts import add_run_labels
from lsq_core.errors import InputError
from lsq_core.evaluation.prediction import Prediction, Predictor, features
from lsq_core.model.info import ModelInfo
from lsq_core.model.source import ModelSource
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling.profile import Profile
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.results import difference
from lsq_core.results.difference import RunDifference
from lsq_core.serve import SNAPSHOT
from lsq_core.session import Session
from lsq_core.stages.rank import MethodRanking, measured_runs, rank_methods
from lsq_core.store.store import Store
from lsq_core.ui.cached import (
    FileVersion,
    cached_model,
    file_version,
    is_published,
    model_key,
    profile_cache_key,
)
from lsq_core.ui.cached_plans import (
    extra_measurements,
    frontier,
    problem,
    problem_with,
    sample_frontier,
)
from lsq_core.ui.safe import st


def objectives(store: Store, info: ModelInfo, method: str) -> pd.DataFrame:
    """Return a method's objective and measured quality by run; see :meth:`Store.objectives`."""
    return _objectives(store, file_version(store), info.fingerprint, method)


@st.cache_data(max_entries=4, show_spinner=False)
def _objectives(_store: Store, at: FileVersion, mark: str, method: str) -> pd.DataFrame:
    return _store.objectives(mark, method)


# --- predictions ----------------------------------------------------------------------------


def evaluated_corpora(store: Store, info: ModelInfo) -> list[str]:
    """Return the corpora that the model's runs were evaluated on, by decreasing number of runs."""
    origin = "published" if is_published(info) else "measured"
    runs = results(store, origin)
    return runs[runs["fingerprint"] == info.fingerprint]["corpus"].value_counts().index.tolist()


def predictor(
    store: Store,
    info: ModelInfo,
    found: Profile | None,
    settings: ProfileSettings,
    corpus: str | None,
) -> Predictor | str:
    """Return a predictor of perplexity fitted to the runs so far, or why there is none."""
    if found is None:
        return "Perplexity can be predicted only with a profile."
    request_key = json.dumps([asdict(settings), corpus])
    args = (store, info, found, settings, corpus, file_version(store))
    return _predictor(*args, model_key(info), profile_cache_key(found), request_key)


@st.cache_resource(max_entries=8, show_spinner=False)
def _predictor(
    _store: Store,
    _info: ModelInfo,
    _found: Profile,
    _settings: ProfileSettings,
    _corpus: str | None,
    at: FileVersion,
    model: str,
    key: str,
    request_key: str,
) -> Predictor | str:
    session = Session(ModelSource(_info.source, _info.revision), _store)
    session.info = _info
    try:
        return session.predictor(problem(_info, _found), _settings, _corpus)
    except InputError as error:
        return str(error)


@dataclass(frozen=True, eq=False)
class PredictionCurve:
    """Predictions for the plans of a frontier at ``bits`` (k,) per parameter, ascending."""

    bits: np.ndarray
    prediction: Prediction
    full_precision: float


def prediction_curve(
    store: Store,
    info: ModelInfo,
    found: Profile | None,
    request: PlanRequest,
    settings: ProfileSettings,
    corpus: str | None,
) -> PredictionCurve | None:
    """Return predicted perplexity by budget for a request's method; None without a predictor."""
    plans = asdict(request) | {"budget": None, "exact": False}
    request_key = json.dumps([plans, asdict(settings), corpus])
    args = (store, info, found, request, settings, corpus, file_version(store))
    return _prediction_curve(*args, model_key(info), profile_cache_key(found), request_key)


@st.cache_resource(max_entries=32, show_spinner=False)
def _prediction_curve(
    _store: Store,
    _info: ModelInfo,
    _found: Profile | None,
    _request: PlanRequest,
    _settings: ProfileSettings,
    _corpus: str | None,
    at: FileVersion,
    model: str,
    key: str | None,
    request_key: str,
) -> PredictionCurve | None:
    fitted = predictor(_store, _info, _found, _settings, _corpus)
    if isinstance(fitted, str):
        return None
    planning_problem = problem_with(_info, _found, _request, None)
    bits, choices = sample_frontier(planning_problem, frontier(_info, _found, _request))
    return PredictionCurve(
        bits, fitted.predict(features(planning_problem, choices)), fitted.full_precision
    )


def ranking(
    store: Store,
    info: ModelInfo,
    found: Profile,
    settings: ProfileSettings,
    requests: Sequence[PlanRequest],
    corpus: str | None,
) -> MethodRanking:
    """Rank the plans of ``requests``; see :func:`lsq_core.stages.rank.rank_methods`."""
    request_key = json.dumps([[asdict(each) for each in requests], asdict(settings), corpus])
    args = (store, info, found, settings, tuple(requests), corpus, file_version(store))
    return _ranking(*args, model_key(info), profile_cache_key(found), request_key)


@st.cache_resource(max_entries=64, show_spinner=False)
def _ranking(
    _store: Store,
    _info: ModelInfo,
    _found: Profile,
    _settings: ProfileSettings,
    _requests: Sequence[PlanRequest],
    _corpus: str | None,
    at: FileVersion,
    model: str,
    key: str,
    request_key: str,
) -> MethodRanking:
    fitted = predictor(_store, _info, _found, _settings, _corpus)
    protocol = None if isinstance(fitted, str) else fitted.points.protocol
    runs = results(_store, "published" if is_published(_info) else "measured")
    runs = measured_runs(
        runs[runs["fingerprint"] == _info.fingerprint],
        _run_configs(_store, at, _info.fingerprint),
        _settings,
        _corpus,
        protocol,
    )
    return rank_methods(
        problem(_info, _found),
        _requests,
        _settings.metadata,
        fitted,
        runs,
        lambda request: frontier(
            _info, _found, request, extra_measurements(_store, _info, _settings, request)
        ),
    )


@st.cache_data(max_entries=4, show_spinner=False)
def _run_configs(_store: Store, at: FileVersion, mark: str) -> dict[str, dict[str, str]]:
    return _store.run_configs(mark)


def stored_model(store: Store, mark: str) -> ModelInfo | None:
    """Return the model with this fingerprint, measured or published, or None."""
    return cached_model(store, file_version(store), mark)


def named_plans(store: Store, mark: str) -> pd.DataFrame:
    """Return a model's named plans; see :meth:`Store.named_plans`."""
    return _named_plans(store, file_version(store), mark)


@st.cache_data(max_entries=4, show_spinner=False)
def _named_plans(_store: Store, at: FileVersion, mark: str) -> pd.DataFrame:
    return _store.named_plans(mark)


# --- results --------------------------------------------------------------------------------


def results(store: Store, origin: str = "measured") -> pd.DataFrame:
    """Return every run of one origin in the database, each with a distinguishing ``label``.

    See :meth:`lsq_core.store.store.Store.results`.
    """
    return _results(store, file_version(store), origin)


@st.cache_data(max_entries=4, show_spinner=False)
def _results(_store: Store, at: FileVersion, origin: str) -> pd.DataFrame:
    return add_run_labels(_store.results(origin=origin))


def record(store: Store, evaluation: str) -> dict[str, dict]:
    """Return everything stored for an evaluation; see :meth:`lsq_core.store.store.Store.record`."""
    return _record(store, file_version(store), evaluation)


@st.cache_data(max_entries=64, show_spinner=False)
def _record(_store: Store, at: FileVersion, evaluation: str) -> dict[str, dict]:
    return _store.record(evaluation)


def run_difference(store: Store, a: str, b: str) -> RunDifference:
    """Return the difference of two runs; see :func:`lsq_core.results.difference.run_difference`."""
    return _run_difference(store, file_version(store), a, b)


@st.cache_data(max_entries=512, show_spinner=False)
def _run_difference(_store: Store, at: FileVersion, a: str, b: str) -> RunDifference:
    return difference.run_difference(_store, a, b)


def gguf_baselines(store: Store, evaluation: str) -> pd.DataFrame:
    """Return GGUF baselines; see :meth:`lsq_core.store.store.Store.gguf_baselines`."""
    return _gguf_baselines(store, file_version(store), evaluation)


@st.cache_data(max_entries=16, show_spinner=False)
def _gguf_baselines(_store: Store, at: FileVersion, evaluation: str) -> pd.DataFrame:
    return _store.gguf_baselines(evaluation)


def deleted_runs(store: Store) -> pd.DataFrame:
    """Return runs that can be restored; see :meth:`lsq_core.store.store.Store.deleted_runs`."""
    return _deleted_runs(store, file_version(store))


@st.cache_data(max_entries=2, show_spinner=False)
def _deleted_runs(_store: Store, at: FileVersion) -> pd.DataFrame:
    return _store.deleted_runs()


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A copy of the database, whose folder is removed once the copy is no longer referenced."""

    folder: TemporaryDirectory

    @property
    def path(self) -> Path:
        """Path of the copy."""
        return Path(self.folder.name) / "snapshot.duckdb"


def snapshot(store: Store) -> Snapshot:
    """Return a copy of the current database, to query without blocking jobs."""
    return _snapshot(store, file_version(store))


@st.cache_resource(max_entries=1, show_spinner="Copying the database…")
def _snapshot(_store: Store, at: FileVersion) -> Snapshot:
    copy = Snapshot(TemporaryDirectory(prefix=f"{SNAPSHOT}{os.getpid()}-"))
    _store.snapshot(copy.path)
    return copy
