"""Metrics against SciPy and plain loops; a profile is measured once and then reused."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch

from lsq_core.bits import LADDER, QuantConfig
from lsq_core.errors import InputError, LsqError
from lsq_core.model.architecture import get_weight
from lsq_core.model.loading import load_model
from lsq_core.model.source import ModelSource
from lsq_core.profiling.calibration import load_calibration
from lsq_core.profiling.measure import measure_profile
from lsq_core.profiling.metrics.kurtosis import kurtosis
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.quantization.packed import quantize_matrix
from lsq_core.quantization.registry import get_quantizer
from lsq_core.session import Session
from lsq_core.store.store import Store
from tests.conftest import save_random_model

B2G64 = QuantConfig(2, 64)


def quantized_weight(weight, settings, config=B2G64):
    return quantize_matrix(
        weight,
        config,
        get_quantizer(settings.quantizer),
        axis=settings.axis,
        metadata=settings.metadata,
    ).dequantize()


@pytest.mark.parametrize("shape", [(7, 13), (128, 256), (3000, 1500)])
def test_kurtosis_matches_scipy(shape):
    weight = torch.from_numpy(np.random.default_rng(0).standard_t(5, shape)).float()
    expected = scipy.stats.kurtosis(weight.double().numpy(), axis=None, fisher=False, bias=True)
    assert kurtosis(weight) == pytest.approx(expected, rel=1e-9)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = save_random_model(tmp_path_factory.mktemp("m") / "llama", "llama-gqa", seed=1)
    return load_model(ModelSource(str(folder)), "cpu")


@pytest.fixture
def settings(small_text):
    return ProfileSettings(
        calibration=str(small_text), samples=20, block_tokens=48, quantizer="rtn", metadata="fp16"
    )


def record_calls(module, run):
    """Record a module's inputs and outputs during ``run()``."""
    recorded = []
    handle = module.register_forward_hook(
        lambda m, args, kwargs, output: recorded.append((args, kwargs, output)), with_kwargs=True
    )
    run()
    handle.remove()
    return recorded


@pytest.fixture
def measured(llama, settings):
    profile = measure_profile(llama, settings, "key")
    ids = torch.from_numpy(load_calibration(llama, settings.text).ids)
    assert len(ids) > 8, "more than one batch"
    return profile, ids


@torch.inference_mode()
def test_module_sensitivity_matches_eq_10(llama, settings, measured):
    """Plain loop: mean squared change of each module's own output on full-precision inputs."""
    profile, ids = measured
    scores = profile.scores("sensitivity_module", B2G64)
    for matrix, score in zip(profile.matrices, scores, strict=True):
        linear = llama.model.get_submodule(matrix.name)
        calls = record_calls(linear, lambda: llama.model(ids, use_cache=False))
        ((inputs,), _, output) = calls[0]
        changed = inputs @ quantized_weight(linear.weight, settings).T
        assert score == pytest.approx(float((changed - output).square().mean()), rel=1e-4)


@torch.inference_mode()
def test_part_sensitivity_matches_reference(llama, settings, measured):
    """q, k, v (gate, up) are quantized together and the attention (MLP) outputs compared."""
    profile, ids = measured
    scores = dict(
        zip((m.name for m in profile.matrices), profile.scores("sensitivity", B2G64), strict=True)
    )
    for layer in range(2):
        block = f"model.layers.{layer}"
        for container, group in (
            ("self_attn", ("q_proj", "k_proj", "v_proj")),
            ("mlp", ("gate_proj", "up_proj")),
        ):
            module = llama.model.get_submodule(f"{block}.{container}")
            ((args, kwargs, output),) = record_calls(
                module, lambda: llama.model(ids, use_cache=False)
            )
            originals = {n: getattr(module, n).weight.clone() for n in group}
            for n in group:
                getattr(module, n).weight.copy_(quantized_weight(originals[n], settings))
            changed = module(*args, **kwargs)
            for n in group:
                getattr(module, n).weight.copy_(originals[n])
            first, second = (o[0] if isinstance(o, tuple) else o for o in (changed, output))
            expected = float((first - second).square().mean())
            for n in group:
                assert scores[f"{block}.{container}.{n}"] == pytest.approx(expected, rel=1e-3)


def test_weight_error_is_frobenius_norm(llama, settings, measured):
    profile, _ = measured
    errors = profile.by_config("weight_error")
    for row, matrix in enumerate(profile.matrices):
        weight = get_weight(llama.model, matrix)
        for column, config in enumerate(LADDER):
            difference = quantized_weight(weight, settings, config) - weight
            assert errors[row, column] == pytest.approx(float(difference.norm()), rel=1e-5)


def test_measure_profile_does_not_modify_model(llama, settings):
    before = {n: t.clone() for n, t in llama.model.state_dict().items()}
    measure_profile(llama, settings, "key")
    assert all(torch.equal(t, before[n]) for n, t in llama.model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in llama.model.modules())


def test_walk_uses_attention_mask_of_each_block(random_model, settings):
    """Gemma 2 alternates sliding and full attention; the walk must match its last block."""
    loaded = load_model(ModelSource(str(random_model("gemma2"))), "cpu")
    from lsq_core.profiling.measure import iter_blocks

    ids = torch.arange(1, 201)[None]  # longer than the sliding window of 64
    with torch.inference_mode():
        *_, last = iter_blocks(loaded, ids)
        ((_, _, expected),) = record_calls(last.block, lambda: loaded.model(ids, use_cache=False))
        (actual,) = last.run()
    torch.testing.assert_close(actual, expected[0] if isinstance(expected, tuple) else expected)


def test_expert_sensitivity_uses_routed_tokens(random_model, settings):
    """Eq. 10 for each expert, with its inputs selected by hand from the router's choices."""
    loaded = load_model(ModelSource(str(random_model("mixtral-moe"))), "cpu")
    profile = measure_profile(loaded, settings, "key")
    ids = torch.from_numpy(load_calibration(loaded, settings.text).ids)
    experts = loaded.model.model.layers[0].mlp.experts
    with torch.inference_mode():
        ((args, _, _),) = record_calls(experts, lambda: loaded.model(ids, use_cache=False))
        states, chosen, _ = args
        for expert in range(4):
            inputs = states[(chosen == expert).any(-1)]
            weight = experts.gate_up_proj[expert]
            change = inputs @ (quantized_weight(weight, settings) - weight).T
            name = f"model.layers.0.mlp.experts.gate_up_proj.{expert}"
            index = [m.name for m in profile.matrices].index(name)
            score = profile.scores("sensitivity_module", B2G64)[index]
            assert score == pytest.approx(float(change.square().mean()), rel=1e-3)


def test_unreached_expert_sensitivity_is_nan(tmp_path, settings):
    folder = save_random_model(tmp_path / "moe", "mixtral-moe", num_experts_per_tok=1)
    loaded = load_model(ModelSource(str(folder)), "cpu")
    # The sign of one feature routes each token to expert 0 or 1, so 2 and 3 are never chosen.
    router = loaded.model.model.layers[0].mlp.gate
    router.weight.zero_()
    router.weight[0, 0], router.weight[1, 0] = 1.0, -1.0
    profile = measure_profile(loaded, settings, "key")
    scores = dict(
        zip(
            (m.name for m in profile.matrices),
            profile.scores("sensitivity_module", B2G64),
            strict=True,
        )
    )
    assert np.isnan(scores["model.layers.0.mlp.experts.gate_up_proj.2"])
    assert np.isfinite(scores["model.layers.0.mlp.experts.gate_up_proj.0"])
    assert np.isfinite(profile.scores("sensitivity", B2G64)).all(), "parts are compared as a whole"


# --- storing and reusing profiles ---------------------------------------------------------------


def test_profile_found_in_store_without_loading(llama, settings, monkeypatch):
    store = Store()
    first = Session(ModelSource(str(llama.folder)), store, "cpu").profile(settings)
    monkeypatch.setattr("lsq_core.model.loading.load_model", None)  # fails if called
    second = Session(ModelSource(str(llama.folder)), store, "cpu").profile(settings)
    assert second.id == first.id
    assert second.matrices == first.matrices
    for metric in ("sensitivity", "sensitivity_module", "weight_error"):
        np.testing.assert_array_equal(first.by_config(metric), second.by_config(metric))
    assert second.provenance == first.provenance
    for known in ("corpus_sha256", "device", "dtype", "versions", "settings", "tokens"):
        assert second.provenance[known]


def test_profile_key_depends_on_settings_and_corpus(llama, settings, small_text):
    session = Session(ModelSource(str(llama.folder)), Store(), "cpu")
    from dataclasses import replace

    keys = {
        session.profile_key(s)
        for s in (
            settings,
            replace(settings, quantizer="hqq"),
            replace(settings, axis=0),
            replace(settings, metadata="8bit"),
            replace(settings, samples=21),
            replace(settings, seed=1),
            replace(settings, calibration="stdlib"),
        )
    }
    assert len(keys) == 7
    before = session.profile_key(settings)
    small_text.write_text(small_text.read_text("utf8") + "\nmore", "utf8")
    assert session.profile_key(settings) != before, "the file's content is part of the identity"


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("quantizer", ["hqq", "rtn"])
def test_weight_error_by_quantizer_and_axis(llama, settings, quantizer, axis):
    from dataclasses import replace

    chosen = replace(settings, quantizer=quantizer, axis=axis)
    profile = measure_profile(llama, chosen, "key")
    weight = get_weight(llama.model, profile.matrices[0])
    expected = float((quantized_weight(weight, chosen) - weight).norm())
    assert profile.scores("weight_error", B2G64)[0] == pytest.approx(expected, rel=1e-5)


def test_profile_settings_invalid_raise():
    for wrong in ({"quantizer": "x"}, {"axis": 2}, {"metadata": "4bit"}):
        with pytest.raises(InputError):
            ProfileSettings(**wrong)


def test_measure_profile_non_finite_weight_raises(tmp_path, settings):
    folder = save_random_model(tmp_path / "m", "llama-gqa")
    loaded = load_model(ModelSource(str(folder)), "cpu")
    loaded.model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(LsqError, match=r"layers\.1\.mlp\.up_proj .*\b1 NaN"):
        measure_profile(loaded, settings, "key")
