"""Tests that need a real model: reproducing shipped figures, and the gain from boosting.

Slow: quantizes a language model of 135 M parameters twice and evaluates it on a CPU.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from lsq_core.evaluation.protocol import EvaluationRequest
from lsq_core.model.architecture import get_weight
from lsq_core.model.gguf import SMOLLM2, smollm2_file
from lsq_core.planning.request import PlanRequest
from lsq_core.session import Session
from lsq_core.shipped import import_measurements
from lsq_core.store.store import Store
from tests.conftest import WIKITEXT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(smollm2_file() is None, reason="SmolLM2 is missing; run 'make smollm2'"),
]
#: Evaluated tokens, and the number of windows, each of which scores 512 of them.
TOKENS, WINDOWS = 2048, 4


@pytest.fixture(scope="module")
def session(tmp_path_factory) -> Session:
    store = Store(tmp_path_factory.mktemp("smollm2") / "lsq.duckdb")
    assert import_measurements(store)
    return Session(SMOLLM2, store, "cpu")


def test_shipped_kurtosis_matches_weights(session):
    """Compare every tenth matrix with SciPy's Pearson kurtosis."""
    profile = session.profile()
    scores = profile.values[profile.values["metric"] == "kurtosis"].set_index("module")["value"]
    assert len(scores) == len(session.info.matrices) == 210
    for matrix in session.info.matrices[::10]:
        weight = get_weight(session.loaded.model, matrix).double().flatten().numpy()
        assert scores[matrix.name] == pytest.approx(stats.kurtosis(weight, fisher=False), rel=1e-4)


@pytest.mark.skipif(not WIKITEXT.is_dir(), reason="WikiText-2 is not beside the repository")
def test_boosting_gains_and_shipped_figures_are_reproduced(session):
    """SensiBoost beats its base, and the windows' log-likelihoods match the shipped ones."""
    text = str(WIKITEXT / "test.txt")
    requests = [PlanRequest(method, base="3.51") for method in ("uniform", "sensiboost")]
    plans = [session.plan(request) for request in requests]
    made = [session.quantize(plan) for plan in plans]
    outcomes = list(session.measure(made, [EvaluationRequest(text, max_tokens=TOKENS)]))
    uniform, boosted = (outcome["perplexity"] for outcome in outcomes)
    assert boosted < 0.97 * uniform
    assert plans[1].bits_per_param < 1.02 * plans[0].bits_per_param
    runs = session.store.results()
    for plan, outcome in zip(plans, outcomes, strict=True):
        own = runs[runs["run"] == outcome["run"]].iloc[0]
        shipped = runs[
            (runs["origin"] == "shipped")
            & (runs["method"] == plan.method)
            & (runs["bits_per_param"] == own["bits_per_param"])
        ].iloc[0]
        assert own["measured_bytes"] == shipped["measured_bytes"]
        here, counts = session.store.windows(own["evaluation"])
        there, _ = session.store.windows(shipped["evaluation"])
        difference = np.abs(here[: WINDOWS - 1] - there[: WINDOWS - 1]) / counts[: WINDOWS - 1]
        assert difference.max() < 2e-3, "nats per token"
