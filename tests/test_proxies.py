"""The fast proxies against plain loops, and their rank correlation with the exact scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lsq_core.bits import QuantConfig
from lsq_core.cli.program import main
from lsq_core.model.architecture import get_weight
from lsq_core.model.loading import load_model
from lsq_core.model.source import ModelSource
from lsq_core.profiling.agreement import proxy_agreement, rank_correlation
from lsq_core.profiling.calibration import load_calibration
from lsq_core.profiling.measure import measure_profile
from lsq_core.profiling.metrics import default_metrics, proxies
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.quantization.packed import quantize_matrix
from lsq_core.quantization.registry import get_quantizer
from lsq_core.session import Session
from lsq_core.store.store import Store
from tests.conftest import save_random_model
from tests.test_profile import record_calls

B2G64 = QuantConfig(2, 64)


@pytest.fixture
def settings(small_text):
    return ProfileSettings(
        calibration=str(small_text), samples=14, block_tokens=48, quantizer="rtn", metadata="fp16"
    )


def weight_changes(loaded, config=B2G64):
    """Return W − Ŵ of each matrix, float64."""
    differences = {}
    for matrix in loaded.info.matrices:
        weight = get_weight(loaded.model, matrix)
        packed = quantize_matrix(weight, config, get_quantizer("rtn"), metadata="fp16")
        differences[matrix] = (weight - packed.dequantize()).double()
    return differences


@torch.inference_mode()
def test_gram_diagonal_matches_plain_sum(random_model, settings):
    loaded = load_model(ModelSource(str(random_model("qwen2-bias"))), "cpu")
    profile = measure_profile(loaded, settings, "key", metrics=("gram_diagonal",))
    ids = torch.from_numpy(load_calibration(loaded, settings.text).ids)
    scores = profile.scores("gram_diagonal", B2G64)
    for (matrix, change), score in zip(weight_changes(loaded).items(), scores, strict=True):
        linear = loaded.model.get_submodule(matrix.name)
        (((inputs,), _, _),) = record_calls(linear, lambda: loaded.model(ids, use_cache=False))
        squares = inputs.double().square().flatten(0, -2)
        expected = (squares @ change.T.square()).mean()
        assert score == pytest.approx(float(expected), rel=1e-4), matrix.name


def test_gram_diagonal_independent_of_other_metrics(random_model, settings):
    loaded = load_model(ModelSource(str(random_model("mixtral-moe"))), "cpu")
    combined = measure_profile(
        loaded, settings, "key", metrics=("sensitivity_module", "gram_diagonal")
    )
    single = measure_profile(loaded, settings, "key", metrics=("gram_diagonal",))
    first, second = (p.scores("gram_diagonal", B2G64) for p in (combined, single))
    np.testing.assert_allclose(first, second, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["llama-gqa", "gpt2-conv1d", "gpt-oss-moe"])
def test_fisher_diagonal_matches_plain_loop(architecture, random_model, settings):
    """Squared gradients of single sequences, averaged, for every way of storing the weights."""
    source = ModelSource(str(random_model(architecture)))
    loaded = load_model(source, "cpu")
    before = {n: t.clone() for n, t in loaded.model.state_dict().items()}
    profile = measure_profile(loaded, settings, "key", metrics=("fisher_diagonal",))
    assert all(torch.equal(t, before[n]) for n, t in loaded.model.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in loaded.model.parameters())

    ids = torch.from_numpy(load_calibration(loaded, settings.text).ids)
    other = load_model(source, "cpu")
    other.model.requires_grad_(True)
    squares = {n: 0.0 for n, _ in other.model.named_parameters()}
    for sequence in ids:
        other.model.zero_grad()
        logits = other.model(sequence[None], use_cache=False).logits
        F.cross_entropy(logits[0, :-1], sequence[1:]).backward()
        for name, parameter in other.model.named_parameters():
            squares[name] = squares[name] + parameter.grad.double().square() / len(ids)
    with torch.no_grad():
        for name, parameter in other.model.named_parameters():
            parameter.copy_(squares[name])
    scores = profile.scores("fisher_diagonal", B2G64)
    for (matrix, change), score in zip(weight_changes(loaded).items(), scores, strict=True):
        expected = (get_weight(other.model, matrix).detach().double() * change.square()).sum()
        assert score == pytest.approx(float(expected), rel=1e-4), matrix.name


def test_proxies_of_unreached_expert_are_nan(tmp_path, settings):
    folder = save_random_model(tmp_path / "moe", "mixtral-moe", num_experts_per_tok=1)
    loaded = load_model(ModelSource(str(folder)), "cpu")
    router = loaded.model.model.layers[0].mlp.gate
    router.weight.zero_()
    router.weight[0, 0], router.weight[1, 0] = 1.0, -1.0
    profile = measure_profile(loaded, settings, "key", metrics=tuple(proxies()))
    for proxy in proxies():
        scores = dict(
            zip((m.name for m in profile.matrices), profile.scores(proxy, B2G64), strict=True)
        )
        assert np.isnan(scores["model.layers.0.mlp.experts.gate_up_proj.2"])
        assert np.isfinite(scores["model.layers.0.mlp.experts.gate_up_proj.0"])


def test_cli_profile_proxies_prints_rank_correlation(random_model, settings, capsys):
    store, folder = Store(), str(random_model("llama-gqa"))
    command = ["profile", "--model", folder, "--corpus", settings.calibration]
    command += ["--quantizer", "rtn", "--metadata", "fp16", "--samples", "14"]
    command += ["--block-tokens", "48", "--device", "cpu", "--db", str(store.path)]
    assert main([*command, "--metric", "gram_diagonal", "--metric", "fisher_diagonal"]) == 0
    output = capsys.readouterr().out
    profile = Session(ModelSource(folder), store, "cpu").find_profile(settings)
    assert set(profile.metrics) == {*default_metrics(), *proxies()}
    table = proxy_agreement(profile)
    assert len(table) == 2 * 12
    for row in table[table["config"] == "b4g64"].itertuples():
        config = QuantConfig(4, 64)
        expected = rank_correlation(
            profile.scores(row.proxy, config), profile.scores(row.exact, config)
        )
        assert row.rank_correlation == expected
        assert f"{row.proxy} ranks the modules as {row.exact} does at b4g64" in output
        assert f"rank correlation {expected:.3f}" in output
