"""Boosting by rank: as many layers and bytes as published detection, but layer 0 can be chosen."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsq_core.planning.make import make_plan
from lsq_core.planning.methods.boost import flagged_layers, layer_series
from lsq_core.planning.methods.rank import standard_scores, top_layers
from lsq_core.planning.request import PlanRequest
from lsq_core.results.compare import figure_6
from tests.test_plan import TYPES, needs_reference, problem, published_problem

METHODS = ("sensiboost", "kurtboost")
METRICS = {"sensiboost": "sensitivity", "kurtboost": "kurtosis"}


@pytest.mark.parametrize("method", METHODS)
def test_first_layer_is_boosted_by_rank_only(method):
    """Layer 0 stands out most, and detection flags the jump at layer 7."""
    spiky = problem(spikes={0: 20.0, 7: 9.0})
    request = {"base": "3.13", "boost_stop": 3}
    published = make_plan(spiky, PlanRequest(method, **request))
    ranked = make_plan(spiky, PlanRequest(f"{method}-rank", **request))
    first = f"model.layers.0.{TYPES[0]}"
    assert first not in published.ranking_scores
    assert first in ranked.ranking_scores
    assert ranked.modules[first]["config"] == "b4g128"


@settings(deadline=None, max_examples=60)
@given(
    method=st.sampled_from(METHODS),
    seed=st.integers(0, 30),
    spikes=st.dictionaries(st.integers(0, 31), st.floats(2.0, 60.0), max_size=5),
    base=st.sampled_from(["2.13", "3.13", "4.13", "8.25"]),
    boost_stop=st.integers(0, 4),
    top_m=st.integers(0, 3),
    ties=st.sampled_from([(), (",".join(TYPES),)]),
)
def test_same_modules_and_bytes_as_the_published_method(
    method, seed, spikes, base, boost_stop, top_m, ties
):
    model = problem(seed=seed, spikes=spikes)
    fields = {"base": base, "boost_stop": boost_stop, "top_m": top_m, "ties": ties}
    published = make_plan(model, PlanRequest(method, **fields))
    ranked = make_plan(model, PlanRequest(f"{method}-rank", **fields))
    kinds = [
        Counter(plan.modules[name]["type"] for name in plan.ranking_scores)
        for plan in (published, ranked)
    ]
    assert kinds[0] == kinds[1]
    assert published.planned_bytes == ranked.planned_bytes
    assert published.nominal_bytes == ranked.nominal_bytes


@pytest.mark.parametrize("method", METHODS)
def test_layers_are_the_highest_scores(method):
    spiky = problem(spikes={0: 20.0, 7: 9.0, 20: 5.0})
    metric = METRICS[method]
    plan = make_plan(spiky, PlanRequest(f"{method}-rank", base="3.13"))
    for kind, (layers, scores) in layer_series(spiky, metric).items():
        taken = {plan.modules[n]["layer"] for n in plan.ranking_scores if kind in n}
        count = len(flagged_layers(spiky, metric, 0)[kind])
        assert taken == {layers[i] for i in np.argsort(-scores)[:count]}


def test_ranking_of_equal_and_missing_scores():
    assert standard_scores(np.ones(5)).tolist() == [0] * 5
    found = standard_scores(np.array([1.0, np.nan, 3.0]))
    assert found.tolist() == [-1, -np.inf, 1]
    model = problem(layers=12)
    model.scores["kurtosis"][:] = 3.0
    kinds = ((TYPES[0],), (TYPES[1],))
    top = top_layers(model, "kurtosis", dict(zip(kinds, (2, 0), strict=True)))
    assert list(top[TYPES[0]]) == [0, 1]
    assert top[TYPES[1]] == {}


@needs_reference
def test_llama2_first_layer_has_the_highest_kurtosis():
    """Layer 0 has the highest published kurtosis of each attention matrix but is never flagged."""
    model = published_problem("Llama-2-7b-hf")
    series = layer_series(model, "kurtosis")
    first = {kind for kind, (layers, scores) in series.items() if layers[scores.argmax()] == 0}
    assert first == {f"self_attn.{name}_proj" for name in "qkvo"}
    assert max(scores.max() for _, scores in series.values()) == series["self_attn.q_proj"][1][0]
    flagged = flagged_layers(model, "kurtosis", 0)
    assert all(0 not in layers for layers in flagged.values())
    plan = make_plan(model, PlanRequest("kurtboost-rank", base="3.13"))
    boosted = {plan.modules[n]["type"] for n in plan.ranking_scores if ".layers.0." in n}
    assert boosted >= {kind for kind in first if flagged[kind]} == first
    published = make_plan(model, PlanRequest("kurtboost", base="3.13"))
    assert plan.nominal_bytes == published.nominal_bytes


def test_detection_is_counted_against_the_ranking():
    """A boost with lower perplexity than its variant by rank at each base wins every comparison."""
    bases = ["3.13", "3.25", "3.51", "4.13", "4.51"]
    rows = [
        {"method": method, "base": base, "bits_per_param": float(base), "perplexity": perplexity}
        for base in bases
        for method, perplexity in (("kurtboost", 9.0), ("kurtboost-rank", 9.5))
    ]
    request = '{"boost_stop": 2, "top_m": 0}'
    same = {"fingerprint": "f", "corpus": "c", "corpus_sha256": "s", "protocol": "strided"}
    found = figure_6(pd.DataFrame(rows).assign(request=request, tokens=100, **same))
    assert found["against"].tolist() == ["kurtboost-rank"] * 2
    assert found["wins"].tolist() == [len(bases)] * 2
