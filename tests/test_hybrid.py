"""Hybrid quantization: learned parameters against their definition, saving and resuming."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lsq_core.bits import QuantConfig, mixed_rows
from lsq_core.cli.program import main
from lsq_core.errors import InputError
from lsq_core.model.architecture import find_blocks, get_weight
from lsq_core.model.info import Matrix
from lsq_core.model.loading import load_model
from lsq_core.model.source import ModelSource
from lsq_core.planning.plan import Plan
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling import interactions as measuring
from lsq_core.quantization import hybrid
from lsq_core.quantization.cache import PackedMatrixCache
from lsq_core.quantization.hybrid import Hybrid, LearnedClipping, LearnedMatrix, LearnedRounding
from lsq_core.quantization.packed import quantize_matrix
from lsq_core.quantization.registry import get_quantizer, planned_bytes, quantizer_spec
from lsq_core.quantization.task import QuantizationTask
from lsq_core.quantized.convert import quantize_model
from lsq_core.quantized.modules import packed_modules
from lsq_core.settings import GridSettings

CONFIG = QuantConfig(3, 32)


def random_rows(count: int = 8, seed: int = 0) -> torch.Tensor:
    return 0.05 * torch.randn(count, 64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("axis", [0, 1])
def test_learned_rounding_initial_and_final_values(axis):
    weight = random_rows()
    rounding = LearnedRounding(weight, CONFIG, axis, "8bit")
    nearest = quantize_matrix(weight, CONFIG, get_quantizer("rtn"), axis=axis)
    inside = (rounding() - weight).abs() < 1e-5  # except beyond the ends of the stored grid
    assert inside.float().mean() > 0.9
    # a ≥ 0 means V ≥ ½: before any step, this is rounding to nearest except for ties
    assert torch.equal(rounding.pack().dequantize(), nearest.dequantize())
    with torch.no_grad():
        rounding.a.copy_(torch.where(torch.rand_like(rounding.a) > 0.5, 9.0, -9.0))
    assert torch.allclose(rounding(), rounding.pack().dequantize(), atol=1e-6)
    assert rounding.rounding_regularizer(2.0).item() == pytest.approx(0)
    with torch.no_grad():
        rounding.a.zero_()
    assert rounding.rounding_regularizer(2.0).item() == pytest.approx(1)


def test_learned_clipping_initial_grid_and_gradient():
    weight = random_rows()
    clipping = LearnedClipping(weight, CONFIG, 1, "fp16")
    assert torch.allclose(clipping(), clipping.pack().dequantize(), atol=1e-3)
    low = torch.sigmoid(torch.tensor(4.0)) * weight.view(-1, 32).amin(1)
    high = torch.sigmoid(torch.tensor(4.0)) * weight.view(-1, 32).amax(1)
    grid = clipping.learned_grid()
    torch.testing.assert_close(grid.scale * 2.0**clipping.exponent, (high - low) / 7)
    torch.testing.assert_close(grid.zero, (-7 * low / (high - low)).round())
    before = (clipping() - weight).square().sum()
    before.backward()
    assert clipping.low.grad.abs().sum() > 0
    with torch.no_grad():
        for parameter in clipping.parameters():
            parameter -= 0.5 * parameter.grad.sign()
    assert (clipping() - weight).square().sum() < before


@pytest.mark.parametrize("high", [3, 4, 16])
def test_learned_matrix_combines_high_and_low_rows(high):
    weight = random_rows(20)
    (config,) = mixed_rows(2, high, 32)[-1:]
    learned = LearnedMatrix(weight, config, [3, 19, 7, 0], 1, "fp16")
    packed = learned.pack()
    assert packed.is_high.nonzero().flatten().tolist() == [0, 3, 7, 19]
    actual = learned().detach()
    assert (actual[packed.is_high] - weight[packed.is_high]).abs().mean() < 1e-3
    torch.testing.assert_close(actual[~packed.is_high], learned.clipping().detach(), atol=0, rtol=0)
    trainable = {name.split(".")[0] for name, _ in learned.named_parameters()}
    assert trainable == ({"clipping"} if high == 16 else {"rounding", "clipping"})


def test_hybrid_schedule_and_names():
    assert hybrid._gamma(0, 5000) is None
    assert hybrid._gamma(999, 5000) is None
    assert hybrid._gamma(1000, 5000) == 20
    assert hybrid._gamma(4999, 5000) == 2
    assert quantizer_spec("hybrid").steps == get_quantizer("hybrid").steps == 5000
    assert quantizer_spec("hybrid-500").steps == get_quantizer("hybrid-500").steps == 500
    assert quantizer_spec("hybrid-500").title == "Hybrid, 500 steps"
    for name in ("hybrid-0", "hybrid-x", "rtn-20", "magic"):
        with pytest.raises(InputError, match=r"one of .*hybrid"):
            quantizer_spec(name)


def small_plan(loaded, group: int = 32) -> Plan:
    options, random = mixed_rows(2, 3, group), np.random.default_rng(0)
    matrices = loaded.info.matrices
    configs = tuple(options[i % 5] for i in range(len(matrices)))
    rows = {
        m.name: tuple(sorted(random.permutation(m.out_features)[: c.high_rows(m.out_features)]))
        for m, c in zip(matrices, configs, strict=True)
    }
    return Plan(PlanRequest("high-impact"), matrices, configs, rows=rows)


def output_error(loaded, model, ids) -> list[float]:
    """Return the mean squared error against full precision of all block outputs but the last."""
    with torch.inference_mode():
        states = [m(ids, output_hidden_states=True).hidden_states for m in (loaded.model, model)]
    return [float((a - b).square().mean()) for a, b in zip(*states, strict=True)][1:-1]


def no_progress(done: int, total: int, text: str) -> None:
    """Ignore progress."""


@pytest.fixture
def ids(monkeypatch) -> torch.Tensor:
    """Random tokens to learn from instead of a text, int64 (2, 32)."""
    tokens = torch.randint(0, 4096, (2, 32), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(
        hybrid,
        "load_calibration",
        lambda loaded, settings: SimpleNamespace(ids=tokens.numpy()),
    )
    return tokens


@pytest.mark.parametrize("architecture", ["llama-gqa", "gpt2-conv1d", "mixtral-moe"])
def test_hybrid_reduces_output_error(architecture, random_model, ids):
    """Compares the first block, whose inputs are full precision, on the calibration tokens."""
    loaded = load_model(ModelSource(str(random_model(architecture))), "cpu")
    plan = small_plan(loaded)
    before = {m: get_weight(loaded.model, m).clone() for m in loaded.info.matrices}
    task = QuantizationTask(loaded, plan.choice, rows=plan.rows)
    learned = quantize_model(task, Hybrid(40))
    rounded = quantize_model(task, get_quantizer("rtn"))
    assert output_error(loaded, learned, ids)[0] < 0.95 * output_error(loaded, rounded, ids)[0]
    assert sum(m.packed.nbytes for m in packed_modules(learned).values()) == plan.planned_bytes
    assert all(torch.equal(get_weight(loaded.model, m), w) for m, w in before.items())
    assert len(find_blocks(loaded.model)[1]) == loaded.info.layers


def test_hybrid_single_width_reduces_output_error(random_model, ids):
    loaded = load_model(ModelSource(str(random_model("llama-gqa"))), "cpu")
    choice = dict.fromkeys(loaded.info.matrices, QuantConfig(2, 32))
    task = QuantizationTask(loaded, choice, GridSettings(metadata="fp16"))
    learned = quantize_model(task, Hybrid(30))
    rounded = quantize_model(task, get_quantizer("rtn"))
    assert output_error(loaded, learned, ids)[0] < output_error(loaded, rounded, ids)[0]
    expected = sum(planned_bytes("hybrid", m.shape, c, "fp16") for m, c in choice.items())
    assert sum(m.packed.nbytes for m in packed_modules(learned).values()) == expected


def test_hybrid_resumes_after_interruption(random_model, ids, tmp_path):
    loaded = load_model(ModelSource(str(random_model("llama-gqa"))), "cpu")
    plan = small_plan(loaded)

    class Interrupted(Exception):
        pass

    def interrupt(done: int, total: int, text: str) -> None:
        if "layer 2 of 2, step 3" in text:
            raise Interrupted

    task = QuantizationTask(loaded, plan.choice, rows=plan.rows)
    with pytest.raises(Interrupted):
        quantize_model(replace(task, progress=interrupt, folder=tmp_path), Hybrid(6))
    assert [p.name for p in tmp_path.iterdir()] == ["block-0.safetensors"]
    done_counts, cache = [], PackedMatrixCache(0)
    recording = replace(
        task,
        progress=lambda done, total, text: done_counts.append(done),
        cache=cache,
        folder=tmp_path,
    )
    again = quantize_model(recording, Hybrid(6))
    assert done_counts == [6, 7, 8, 9, 10, 11, 12]
    assert cache.saved_seconds > 0
    uninterrupted = quantize_model(task, Hybrid(6))
    with torch.inference_mode():
        assert torch.equal(again(ids).logits, uninterrupted(ids).logits)
    block = tmp_path / "block-0.safetensors"
    block.write_bytes(block.read_bytes()[:-100])
    messages = []
    recording = replace(
        task, progress=lambda done, total, text: messages.append(text), folder=tmp_path
    )
    again = quantize_model(recording, Hybrid(6))
    assert "block-0.safetensors is damaged" in messages[0]
    with torch.inference_mode():
        assert torch.equal(again(ids).logits, uninterrupted(ids).logits)


def test_cli_hybrid_run_save_eval(random_model, small_text, tmp_path, capsys, monkeypatch):
    """Learn with the steps in the quantizer's name, save, and evaluate the saved model."""
    monkeypatch.setattr(measuring, "LOSS_TOKENS", {"block": 8, "model": 8})
    monkeypatch.setattr(hybrid, "SEQUENCES", 2)
    plan_options = ["--model", str(random_model("llama-gqa")), "--device", "cpu"]
    plan_options += [
        "--method",
        "high-impact",
        "--budget",
        "2.24bpp",
        "--calibration",
        str(small_text),
    ]
    plan_options += ["--samples", "60", "--block-tokens", "64", "--ratios", "uniform"]
    evaluation = ["--corpus", str(small_text), "--max-tokens", "300"]
    saved = ["--save", str(tmp_path / "saved")]
    more = ["--quantizer", "hybrid-3", *evaluation, *saved, "--json"]
    assert main(["run", *plan_options, *more]) == 0
    run = json.loads(capsys.readouterr().out)
    assert run["quantizer"] == "hybrid-3"
    assert run["measured_bytes"] == run["planned_bytes"]
    assert run["calibration"]["calibration"] == str(small_text)
    assert "has no profile" in run["predicted"]["reason"]
    again = ["eval", "--model", str(tmp_path / "saved"), "--device", "cpu", *evaluation, "--json"]
    assert main(again) == 0
    assert json.loads(capsys.readouterr().out)["perplexity"] == pytest.approx(run["perplexity"])
    assert main(["run", *plan_options, "--hybrid", "--quantizer", "rtn", *evaluation]) == 2
    assert "--hybrid or --quantizer rtn" in capsys.readouterr().err
    assert main(["run", *plan_options, "--quantizer", "magic", *evaluation]) == 2
    assert "hqq, rtn, nf4, nf4-dq, gptq, awq, hybrid" in capsys.readouterr().err


def test_hybrid_ignores_checkpoint_of_older_format(tmp_path, monkeypatch):
    matrix = Matrix("m.0.up", 0, "up", 8, 64)
    packed = {matrix: quantize_matrix(random_rows(), CONFIG, get_quantizer("rtn"))}
    file, choice = tmp_path / "block-0.safetensors", {matrix: CONFIG}
    hybrid._write_block(file, packed, 2.5)
    restored, seconds = hybrid._read_block(file, choice, 1, "cpu", no_progress)
    assert (list(restored), seconds) == ([matrix], 2.5)
    monkeypatch.setattr(hybrid, "FORMAT_VERSION", hybrid.FORMAT_VERSION - 1)
    hybrid._write_block(file, packed, 2.5)
    monkeypatch.undo()
    assert hybrid._read_block(file, choice, 1, "cpu", no_progress) == ({}, 0.0)
