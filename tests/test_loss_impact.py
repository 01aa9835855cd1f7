"""Loss impact: compared with a plain loop over the full model, and added to profiles."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from lsq_core.cli.program import main
from lsq_core.errors import InputError
from lsq_core.model.architecture import get_weight
from lsq_core.model.info import Matrix
from lsq_core.model.loading import load_model
from lsq_core.model.source import ModelSource
from lsq_core.planning.methods import PLANNERS
from lsq_core.planning.problem import Problem
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling import kl as kl_module
from lsq_core.profiling.calibration import load_calibration
from lsq_core.profiling.kl import ExactKl, SampledKl, head_gives_logits, kl
from lsq_core.profiling.measure import iter_blocks, measure_profile
from lsq_core.profiling.metrics import METRICS, default_metrics, proxies
from lsq_core.profiling.metrics.loss_impact import SEQUENCE_TOKENS, LossImpact
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.quantization.packed import quantize_matrix
from lsq_core.quantization.registry import get_quantizer
from lsq_core.session import Session
from lsq_core.stages.plan import build_problem, check_metrics
from lsq_core.store.store import Store
from tests.conftest import ARCHITECTURES, save_random_model

IMPACT = ("loss_impact",)


@pytest.fixture
def settings(small_text):
    return ProfileSettings(
        calibration=str(small_text), samples=24, block_tokens=48, quantizer="rtn", metadata="fp16"
    )


@pytest.fixture
def session(random_model):
    return Session(ModelSource(str(random_model("llama-gqa"))), Store(), "cpu")


def log_probabilities(model, ids):
    return torch.log_softmax(model(ids, use_cache=False).logits.double(), -1)


@torch.inference_mode()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_impact_matches_plain_loop(architecture, random_model, settings):
    """The loop replaces one matrix at a time, runs the full model and computes KL in float64."""
    loaded = load_model(ModelSource(str(random_model(architecture))), "cpu")
    profile = measure_profile(loaded, settings, "key", metrics=IMPACT)
    assert profile.metrics == IMPACT
    ids = torch.from_numpy(load_calibration(loaded, settings.text).ids)[: LossImpact.sequences]
    assert len(ids) == LossImpact.sequences
    assert profile.provenance["tokens"] == ids.numel()
    expected = log_probabilities(loaded.model, ids)
    for matrix, score in zip(profile.matrices, profile.scores("loss_impact"), strict=True):
        weight = get_weight(loaded.model, matrix)
        saved = weight.clone()
        changed = quantize_matrix(
            saved, LossImpact.configs[0], get_quantizer("rtn"), axis=1, metadata="fp16"
        ).dequantize()
        weight.copy_(changed)
        perturbed = log_probabilities(loaded.model, ids)
        weight.copy_(saved)
        divergence = float((expected.exp() * (expected - perturbed)).sum(-1).mean())
        error = float((changed - saved).double().square().sum())
        assert score == pytest.approx(divergence / error, rel=1e-5), matrix.name


def test_loss_impact_of_long_blocks_is_that_of_their_first_tokens(random_model, small_text):
    loaded = load_model(ModelSource(str(random_model("llama-gqa"))), "cpu")
    settings = ProfileSettings("rtn", calibration=str(small_text), samples=64, block_tokens=160)
    long = measure_profile(loaded, settings, "key", metrics=IMPACT)
    ids = torch.from_numpy(load_calibration(loaded, settings.text).ids)[: LossImpact.sequences]
    ids = ids[:, :SEQUENCE_TOKENS]
    matrix, score = long.matrices[0], long.scores("loss_impact")[0]
    weight = get_weight(loaded.model, matrix)
    changed = get_quantizer("rtn").round_trips(weight.float(), LossImpact.configs, 1, "8bit")[0]
    with torch.inference_mode():
        expected = log_probabilities(loaded.model, ids)
        error = float((changed - weight).double().square().sum())
        weight.copy_(changed)
        perturbed = log_probabilities(loaded.model, ids)
    divergence = float((expected.exp() * (expected - perturbed)).sum(-1).mean())
    assert score == pytest.approx(divergence / error, rel=1e-4)


def test_loss_impact_tells_its_passes_beforehand(random_model, settings, small_text):
    reports = []
    session = Session(
        ModelSource(str(random_model("llama-gqa"))),
        Store(),
        "cpu",
        report=lambda *report: reports.append(report),
    )
    session.profile(replace(settings, block_tokens=160, samples=8), ["loss_impact"])
    stages = [stage for stage, *_ in reports]
    [note] = [report[3] for report in reports if report[0] == "note" and "passes" in report[3]]
    assert "14 matrices" in note  # seven in each of two layers, (2 + 1) · 7 / 2 passes
    assert "10 passes over at most 1,024 tokens" in note
    assert stages.index("note") < stages.index("profile")


def test_loss_impact_does_not_modify_model(random_model, settings):
    loaded = load_model(ModelSource(str(random_model("mixtral-moe"))), "cpu")
    before = {n: t.clone() for n, t in loaded.model.state_dict().items()}
    measure_profile(loaded, settings, "key", metrics=IMPACT)
    assert all(torch.equal(t, before[n]) for n, t in loaded.model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in loaded.model.modules())
    assert not any("forward" in m.__dict__ for m in loaded.model.modules())


def test_loss_impact_independent_of_logit_chunk_size(random_model, settings, monkeypatch):
    loaded = load_model(ModelSource(str(random_model("gpt2-conv1d"))), "cpu")
    whole = measure_profile(loaded, settings, "key", metrics=IMPACT).scores("loss_impact")
    for limit in ("_MAX_BATCH_LOGITS", "_CHUNK_LOGITS", "_MAX_KEPT_LOGITS"):
        monkeypatch.setattr(f"lsq_core.profiling.kl.{limit}", 1)
        single = measure_profile(loaded, settings, "key", metrics=IMPACT).scores("loss_impact")
        np.testing.assert_allclose(single, whole, rtol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("architecture", ["llama-gqa", "gpt2-conv1d", "gemma2", "gpt-oss-moe"])
def test_sampled_predictions_give_nearly_the_same_loss_impact(
    architecture, random_model, settings, monkeypatch
):
    loaded = load_model(ModelSource(str(random_model(architecture))), "cpu")
    exact = measure_profile(loaded, settings, "key", metrics=IMPACT).scores("loss_impact")
    monkeypatch.setattr(kl_module, "LARGE_VOCABULARY", 1)
    sampled = measure_profile(loaded, settings, "key", metrics=IMPACT).scores("loss_impact")
    np.testing.assert_allclose(sampled, exact, rtol=0.06)
    assert np.median(sampled / exact) == pytest.approx(1, abs=0.02)
    capped = architecture == "gemma2"  # its logits are not just the output of its LM head
    assert head_gives_logits(loaded.model, torch.arange(8)[None]) != capped
    assert f"{kl_module.DRAWS} tokens drawn" in LossImpact.definition
    assert (sampled == exact).all() == capped
    monkeypatch.setattr(kl_module, "EXACT_SHARE", 1)
    whole = measure_profile(loaded, settings, "key", metrics=IMPACT).scores("loss_impact")
    np.testing.assert_allclose(whole, exact, rtol=1e-4)


@torch.inference_mode()
def test_sampled_kl_holds_where_predictions_change_altogether(random_model, settings):
    """At a few positions predictions change; their new tokens were hardly ever drawn."""
    loaded = load_model(ModelSource(str(random_model("llama-gqa"))), "cpu")
    ids = torch.from_numpy(load_calibration(loaded, settings.text).ids)
    context = list(islice(iter_blocks(loaded, ids), 2))[1]
    found = {}
    for kind in (SampledKl, ExactKl):
        compared = kind(context, 8, 48)
        hidden = compared.batched(context.hidden)
        generator = torch.Generator().manual_seed(0)
        hidden[0][:, 40:42] = 3 * torch.randn(hidden[0][:, 40:42].shape, generator=generator)
        found[kind] = float(compared.divergence(1, hidden))
    assert found[ExactKl] > 0.01
    assert found[SampledKl] == pytest.approx(found[ExactKl], rel=0.03)


@torch.inference_mode()
def test_sampled_kl_independent_of_chunk_sizes(random_model, settings, monkeypatch):
    loaded = load_model(ModelSource(str(random_model("gpt2-conv1d"))), "cpu")
    monkeypatch.setattr(kl_module, "LARGE_VOCABULARY", 1)
    whole = measure_profile(loaded, settings, "key", metrics=IMPACT).scores("loss_impact")
    for limit in ("_HEAD_LOGITS", "_CHUNK_ROWS"):
        monkeypatch.setattr(kl_module, limit, 2**15)
        single = measure_profile(loaded, settings, "key", metrics=IMPACT).scores("loss_impact")
        np.testing.assert_allclose(single, whole, rtol=1e-4)


def test_kl_accurate_for_small_divergence():
    """In float32, the plain sum of p·(log p − log q) is off by a sixth or more here."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, 4096, generator=generator, dtype=torch.float64)
    other = logits + 1e-4 * torch.randn(20, 4096, generator=generator, dtype=torch.float64)
    p, q = (t.log_softmax(-1) for t in (logits, other))
    expected = float((p.exp() * (p - q)).sum())
    p, q = p.float(), q.float()
    assert float((p.exp() * (p - q)).sum()) != pytest.approx(expected, rel=0.1)
    assert float(kl(p, q).sum()) == pytest.approx(expected, rel=1e-3)
    assert not kl(p, p).any()


def test_loss_impact_progress_increases_and_names_matrices(random_model, settings):
    loaded = load_model(ModelSource(str(random_model("llama-gqa"))), "cpu")
    reports = []
    measure_profile(loaded, settings, "key", lambda *report: reports.append(report), IMPACT)
    done = [report[0] for report in reports]
    assert done == sorted(done)
    assert done[0] == 0
    assert {total for _, total, _ in reports} == {done[-1]}
    assert done[-1] == 7 * (3 + 2), "seven matrices in each of two layers, and the head"
    messages = [message for _, _, message in reports]
    assert "layer 2 of 2, mlp.up_proj" in messages


# --- experts that no token reached ---------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("large_vocabulary", [1, 2**20])
def test_loss_aware_cost_of_unreached_expert_positive(
    tmp_path, settings, monkeypatch, layer, large_vocabulary
):
    """Holds even if the same tokens are rounded differently in batches of another shape."""
    batched = kl_module.PredictionKl.batched
    monkeypatch.setattr(
        kl_module.PredictionKl, "batched", lambda *a: [h * (1 + 1e-6) for h in batched(*a)]
    )
    monkeypatch.setattr(kl_module, "LARGE_VOCABULARY", large_vocabulary)
    folder = save_random_model(tmp_path / "moe", "mixtral-moe", num_experts_per_tok=1)
    loaded = load_model(ModelSource(str(folder)), "cpu")
    # The sign of one input chooses between experts 0 and 1, so 2 and 3 are never reached.
    router = loaded.model.model.layers[layer].mlp.gate
    router.weight.zero_()
    router.weight[0, 0], router.weight[1, 0] = 1.0, -1.0
    profile = measure_profile(loaded, settings, "key", metrics=("weight_error", *IMPACT))
    scores = profile.scores("loss_impact")
    cost = PLANNERS["loss-aware"].cost(build_problem(loaded.info, profile))
    assert (cost > 0).all()
    for kind in ("gate_up_proj", "down_proj"):
        rows = [
            i
            for i, m in enumerate(profile.matrices)
            if m.layer == layer and m.type == f"mlp.experts.{kind}"
        ]
        assert np.isfinite(scores[rows[:2]]).all()
        assert np.isnan(scores[rows[2:]]).all()
        error = profile.by_config("weight_error")[rows[2]]
        np.testing.assert_allclose(cost[rows[2]], scores[rows[:2]].min() * error**2)


# --- planning with loss impact -------------------------------------------------------------------


def test_loss_aware_cost_is_impact_times_squared_error():
    matrices = tuple(Matrix(f"m.{i}", i, "x", 128, 128) for i in range(3))
    error = np.random.default_rng(0).random((3, 12))
    impact = np.array([1.0, 20.0, 0.5])
    problem = Problem(matrices, {"loss_impact": impact}, {"weight_error": error})
    cost = PLANNERS["loss-aware"].cost(problem)
    np.testing.assert_allclose(cost, impact[:, None] * error**2)
    with pytest.raises(InputError, match="profile --metric loss_impact"):
        PLANNERS["loss-aware"].cost(replace(problem, scores={}))


def test_check_metrics_missing_loss_impact_suggests_methods():
    matrices = (Matrix("m.0", 0, "x", 128, 128),)
    problem = Problem(matrices, {}, {"weight_error": np.ones((1, 12))})
    info = type("Info", (), {"source": "Llama"})()
    with pytest.raises(InputError, match=r"Llama .*loss_impact.* mxq"):
        check_metrics(info, problem, PlanRequest("loss-aware", budget="3.2bpp"))


# --- adding it to a profile ----------------------------------------------------------------------


def test_default_profile_excludes_loss_impact(session, settings):
    assert set(default_metrics()) == set(METRICS) - {"loss_impact", "expected_kl", *proxies()}
    assert set(session.profile(settings).metrics) == set(default_metrics())


def test_plan_adds_missing_metric_to_profile(session, settings, monkeypatch):
    first = session.profile(settings)
    plan = session.plan(PlanRequest("loss-aware", budget="3.2bpp"), settings)
    used = session.find_profile(settings)
    assert plan.bits_per_param <= 3.2
    assert plan.profile == used.id == first.id
    assert set(used.metrics) == {*default_metrics(), "loss_impact"}
    for metric in ("weight_error", "sensitivity", "sensitivity_module"):
        np.testing.assert_array_equal(first.by_config(metric), used.by_config(metric))
    added, before = used.provenance.pop("added"), first.provenance.pop("added")
    assert used.provenance == first.provenance
    assert set(added) == {"loss_impact", *before}
    for known in ("tokens", "seconds", "device", "dtype", "created", "versions"):
        assert added["loss_impact"][known]
    monkeypatch.setattr("lsq_core.profiling.measure.measure_profile", None)  # not measured again
    again = session.plan(PlanRequest("loss-aware", budget="3.2bpp"), settings)
    assert again.modules == plan.modules
    assert len(session.store.profiles(session.info.fingerprint)) == 1


def test_interrupted_metric_addition_keeps_profile(session, settings):
    first = session.profile(settings)

    def interrupt(stage, done, total, message):
        if stage == "profile" and 0 < done < total:
            raise KeyboardInterrupt

    interrupted = Session(session.source, session.store, "cpu", report=interrupt)
    with pytest.raises(KeyboardInterrupt):
        interrupted.profile(settings, IMPACT)
    saved = session.find_profile(settings)
    assert set(saved.metrics) == set(default_metrics())
    assert saved.provenance == first.provenance
    assert len(saved.values) == len(first.values)
    assert "loss_impact" in session.profile(settings, IMPACT).metrics


def test_keep_profile_replaces_only_same_metric(session, settings):
    whole = session.profile(settings, IMPACT)
    rows = whole.values[whole.values["metric"] == "loss_impact"]
    session.store.merge_profile(replace(whole, values=rows.assign(value=7.0)))
    saved = session.find_profile(settings)
    assert len(saved.values) == len(whole.values)
    assert (saved.scores("loss_impact") == 7.0).all()
    np.testing.assert_array_equal(saved.scores("kurtosis"), whole.scores("kurtosis"))


def test_cli_profile_adds_loss_impact(session, settings, capsys):
    command = ["profile", "--model", session.source.name, "--corpus", settings.calibration]
    command += ["--quantizer", "rtn", "--metadata", "fp16", "--samples", "24"]
    command += ["--block-tokens", "48", "--device", "cpu", "--db", str(session.store.path)]
    assert main([*command, "--metric", "loss_impact"]) == 0
    assert set(session.find_profile(settings).metrics) == {*default_metrics(), "loss_impact"}
    assert main([*command, "--metric", "loss"]) == 2
    assert re.search("'loss' .*kurtosis,", capsys.readouterr().err)
