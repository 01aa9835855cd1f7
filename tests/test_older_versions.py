"""Databases and saved models of version 0.3.0 still open and give the figures it printed.

``tests/data/version_0.3.0`` was made by that version from a random four-block Llama: three runs
with round-to-nearest on 300 tokens of ``text.txt``; the model of the first was saved.
"""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import pytest

from lsq_core.evaluation.protocol import EvaluationRequest
from lsq_core.planning.plan import Plan
from lsq_core.results.audit import audit_folder
from lsq_core.stages.saved import evaluate_saved
from lsq_core.store.store import Store

DATA = Path(__file__).parent / "data" / "version_0.3.0"
#: Perplexity and measured bytes printed by 0.3.0, by method.
RUNS = {
    "mxq": (49.002359180335326, 77_624),
    "sensiboost": (49.04080315059402, 64_888),
    "high-impact": (49.41830561620799, 48_426),
}


@pytest.fixture
def store(tmp_path) -> Store:
    path = tmp_path / "lsq.duckdb"
    with gzip.open(DATA / "lsq.duckdb.gz") as packed, path.open("wb") as file:
        shutil.copyfileobj(packed, file)
    return Store(path)


def test_database_keeps_its_runs(store):
    rows = store.results()
    found = {r.method: (r.perplexity, r.measured_bytes) for r in rows.itertuples()}
    assert found == RUNS
    assert rows["increase"].notna().all()


def test_database_keeps_its_plans_and_profile(store):
    (fingerprint,) = store.models()["fingerprint"]
    info = store.model(fingerprint)
    (profile,) = map(store.profile, store.profiles(fingerprint)["id"])
    assert set(profile.metrics) >= {"kurtosis", "weight_error", "sensitivity"}
    for id in store.results()["run"]:
        run = store.run(id)
        plan = Plan.from_json(run["content"], info.matrices, info.other_bytes)
        assert plan.planned_bytes == RUNS[plan.method][1]


def test_saved_model_gives_its_perplexity(store):
    folder = DATA / "saved"
    assert not audit_folder(folder, store).mismatches
    request = EvaluationRequest(str(DATA / "text.txt"), max_tokens=300)
    result = evaluate_saved(folder, request, store, "cpu")
    assert result["perplexity"] == pytest.approx(RUNS["mxq"][0], rel=1e-6)
    assert result["measured_bytes"] == RUNS["mxq"][1]
