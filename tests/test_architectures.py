"""Every decoder architecture, end to end: profile, plan, quantize, save, reload, evaluate."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from hqq.core.quantize import Quantizer as HqqPackage
from torch import nn

from lsq_core.bits import LADDER, QuantConfig
from lsq_core.evaluation.protocol import EvaluationRequest
from lsq_core.model.architecture import find_blocks, get_weight
from lsq_core.model.loading import load_model
from lsq_core.model.source import ModelSource
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.quantization.registry import get_quantizer
from lsq_core.quantization.task import QuantizationTask
from lsq_core.quantized.artifact import load_quantized
from lsq_core.quantized.convert import quantize_model
from lsq_core.quantized.modules import packed_modules
from lsq_core.session import Session
from lsq_core.settings import GridSettings
from lsq_core.store.store import Store
from tests.conftest import ARCHITECTURES

#: Number of quantized matrices of each small random model, counting every expert.
MODULES_PER_MODEL = {
    "llama-gqa": 14,
    "qwen2-bias": 14,
    "gpt-neox-fused": 8,
    "phi3-fused": 8,
    "opt": 12,
    "gpt2-conv1d": 8,
    "gemma2": 14,
    "mixtral-moe": 2 * (4 + 4 * 2),
    "qwen2-moe": 7 + 4 + 4 * 2 + 3,
    "gpt-oss-moe": 2 * (4 + 4 * 2),
}


def count_block_weights(model: nn.Module) -> int:
    """Count block parameters of two or more dimensions by name, without routers, biases, sinks."""
    excluded = ("router", "mlp.gate.weight", "shared_expert_gate", "bias", "sinks")
    return sum(
        p.numel()
        for name, p in find_blocks(model)[1].named_parameters()
        if p.dim() > 1 and not any(word in name for word in excluded)
    )


#: One with plain matrices and one with stacked experts; the others use the faster RTN.
HQQ_ARCHITECTURES = ("llama-gqa", "mixtral-moe")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architecture_end_to_end(architecture, random_model, small_text, tmp_path):
    folder = random_model(architecture)
    session = Session(ModelSource(str(folder)), Store(), "cpu")
    quantizer = "hqq" if architecture in HQQ_ARCHITECTURES else "rtn"
    settings = ProfileSettings(quantizer, calibration=str(small_text), samples=16, block_tokens=64)

    assert len(session.info.matrices) == MODULES_PER_MODEL[architecture]
    assert session.info.linear_parameters == count_block_weights(session.loaded.model)
    assert session.info.coverage == pytest.approx(
        count_block_weights(session.loaded.model)
        / sum(p.numel() for p in session.loaded.model.parameters())
    )

    profile = session.profile(settings)
    kurtosis = profile.scores("kurtosis")
    assert kurtosis.shape == (MODULES_PER_MODEL[architecture],)
    assert (abs(kurtosis - 3) < 0.3).all(), "the weights are normal"
    for metric in ("sensitivity", "sensitivity_module", "weight_error"):
        scores = profile.by_config(metric)
        assert scores.shape == (len(kurtosis), len(LADDER))
        assert (scores > 0).all(), "every module was reached"
        assert (scores[:, 2] > scores[:, 11]).all(), "2 bits hurt more than 8"

    plan = session.plan(PlanRequest("mxq", budget="3.6bpp"), settings)
    assert plan.profile == profile.id
    assert plan.bits_per_param <= 3.6
    saved = tmp_path / "saved"
    request = EvaluationRequest(str(small_text), max_tokens=600)
    result = session.run(plan, quantizer, request, save=saved)
    assert result["measured_bytes"] == result["planned_bytes"] == plan.planned_bytes
    assert result["perplexity"] > 0
    assert result["kl"] > 0

    reloaded = load_quantized(saved, "cpu")
    ids = torch.arange(1, 65)[None]
    requantized = quantize_model(
        QuantizationTask(session.loaded, plan.choice), get_quantizer(quantizer)
    )
    with torch.inference_mode():
        assert torch.equal(reloaded.model(ids).logits, requantized(ids).logits)
        assert not torch.equal(requantized(ids).logits, session.loaded.model(ids).logits)
    assert set(packed_modules(reloaded.model)) == set(plan.modules)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hqq_error_matches_hqq_package(architecture, random_model):
    loaded = load_model(ModelSource(str(random_model(architecture))), "cpu")
    config = QuantConfig(4, 64)
    choice = dict.fromkeys(loaded.info.matrices, config)
    quantized = quantize_model(
        QuantizationTask(loaded, choice, grid=GridSettings(metadata="fp16")), get_quantizer("hqq")
    )
    packed = packed_modules(quantized)
    for matrix in loaded.info.matrices:
        weight = get_weight(loaded.model, matrix)
        codes, meta = HqqPackage.quantize(
            weight, nbits=4, group_size=64, axis=1, device="cpu", bitpack=True
        )
        theirs = (
            HqqPackage.dequantize(codes, meta | {"compute_dtype": torch.float32}) - weight
        ).norm()
        ours = (packed[matrix.name].packed.dequantize() - weight).norm()
        assert ours / theirs == pytest.approx(1, abs=0.01), matrix.name


def test_packed_forward_error_matches_hqq_linear(random_model):
    """With a bias, the packed module is as far from full precision as ``hqq``'s own."""
    loaded = load_model(ModelSource(str(random_model("qwen2-bias"))), "cpu")
    matrix = next(m for m in loaded.info.matrices if m.type == "mlp.gate_proj")
    linear = nn.Linear(128, 256).requires_grad_(False)
    linear.weight.copy_(get_weight(loaded.model, matrix))
    loaded.model.set_submodule(matrix.name, linear)
    inputs = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    for bits in (2, 3, 4, 8):
        quantized = quantize_model(
            QuantizationTask(
                loaded, {matrix: QuantConfig(bits, 64)}, grid=GridSettings(metadata="fp16")
            ),
            get_quantizer("hqq"),
        )
        theirs = HQQLinear(
            copy.deepcopy(linear),
            BaseQuantizeConfig(nbits=bits, group_size=64, axis=1),
            compute_dtype=torch.float32,
            device="cpu",
        )
        with torch.inference_mode():
            ours = (quantized.get_submodule(matrix.name)(inputs) - linear(inputs)).norm()
            assert ours / (theirs(inputs) - linear(inputs)).norm() == pytest.approx(1, abs=0.02)


def test_quantize_model_does_not_modify_original(random_model):
    loaded = load_model(ModelSource(str(random_model("mixtral-moe"))), "cpu")
    before = {n: t.clone() for n, t in loaded.model.state_dict().items()}
    quantize_model(
        QuantizationTask(loaded, dict.fromkeys(loaded.info.matrices, QuantConfig(2, 128))),
        get_quantizer("rtn"),
    )
    after = loaded.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_llama_part_names_match_paper(random_model, small_text):
    session = Session(ModelSource(str(random_model("llama-gqa"))), Store(), "cpu")
    settings = ProfileSettings(calibration=str(small_text), samples=16, block_tokens=64)
    values = session.profile(settings).values
    parts = values[(values["metric"] == "sensitivity") & (values["config"] == "b4g64")]
    by_part = parts[parts["layer"] == 0].groupby("part")["type"].apply(set).to_dict()
    assert by_part == {
        "attn_in": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"},
        "attn_out": {"self_attn.o_proj"},
        "mlp_gate": {"mlp.gate_proj", "mlp.up_proj"},
        "mlp_down": {"mlp.down_proj"},
    }
    assert Path(session.folder).is_dir()
