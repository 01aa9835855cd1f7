"""The distribution of the KL divergence over tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lsq_core.evaluation.divergence import format_distribution, summarize_divergence
from lsq_core.evaluation.perplexity import evaluate_models
from lsq_core.evaluation.protocol import EvaluationText, Protocol
from lsq_core.model.loading import load_model
from lsq_core.model.source import ModelSource


def test_summary_of_known_tokens():
    kl = np.array([0.0, 1.0, 2.0, 3.0, 4.0], np.float32)
    found = summarize_divergence(kl, np.array([4.0, 16.0]), np.array([2, 3]))
    assert (found.mean, found.median, found.max) == (2.0, 2.0, 4.0)
    assert found.p90 == pytest.approx(3.6)
    assert found.rms_log_prob == 2.0
    assert math.isnan(found.low), "two windows have no interval"
    assert format_distribution(vars(found)) == "median 2, 90 % 3.6, 99 % 3.96, 99.9 % 4, max 4"


def test_interval_contains_mean():
    random = np.random.default_rng(0)
    counts = random.integers(5, 20, 40)
    kl = random.exponential(0.3, counts.sum()).astype(np.float32)
    found = summarize_divergence(kl, np.ones(40), counts)
    assert found.low < found.mean < found.high
    assert found.mean == pytest.approx(kl.mean(), rel=1e-6)
    again = summarize_divergence(kl, np.ones(40), counts)
    assert (again.low, again.high) == (found.low, found.high)


@torch.no_grad()
@pytest.mark.parametrize(
    "protocol",
    [Protocol("strided-64/32", 64, 32), Protocol("llamacpp-64", 64, 31, disjoint=True)],
    ids=lambda protocol: protocol.name,
)
def test_evaluation_matches_plain_loop(random_model, protocol):
    """Compare with each token's divergence, computed from both models' full logits in float64."""
    folder = random_model("llama-gqa")
    full = load_model(ModelSource(str(folder)), "cpu").model
    other = load_model(ModelSource(str(folder)), "cpu").model
    for parameter in other.parameters():
        parameter.add_(
            torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) / 50
        )
    vocabulary = full.config.vocab_size
    ids = np.random.default_rng(1).integers(1, vocabulary, 330)
    ((own, reference),) = next(
        evaluate_models([other], [EvaluationText(ids, protocol)], bos=None, reference=full)
    )
    step = protocol.context if protocol.disjoint else protocol.scored
    kl, changes = [], []
    for begin in range(0, len(ids), step):
        stop = begin + protocol.context if protocol.disjoint else min(begin + step, len(ids))
        start = begin if protocol.disjoint else max(begin + step - protocol.context, 0)
        if stop > len(ids):
            break
        scored = protocol.scored if protocol.disjoint else min(stop - begin, stop - start - 1)
        window = torch.from_numpy(ids[start:stop])[None]
        p, q = (m(window).logits[0].double().log_softmax(-1)[:-1] for m in (full, other))
        target = window[0, 1:, None]
        kl.append((p.exp() * (p - q)).sum(-1)[-scored:])
        changes.append((q.gather(-1, target) - p.gather(-1, target))[-scored:, 0])
    kl, changes = torch.cat(kl), torch.cat(changes)
    found = own.divergence
    assert reference.divergence is None
    assert own.tokens == len(kl)
    assert found.mean == pytest.approx(own.kl, rel=1e-6)
    assert found.mean == pytest.approx(float(kl.mean()), rel=1e-4)
    assert found.p99 == pytest.approx(float(kl.quantile(0.99)), rel=1e-4)
    assert found.max == pytest.approx(float(kl.max()), rel=1e-4)
    assert found.rms_log_prob == pytest.approx(float(changes.square().mean().sqrt()), rel=1e-4)
