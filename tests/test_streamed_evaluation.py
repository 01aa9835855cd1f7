"""Quantization and evaluation block by block, compared with fully loaded models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lsq_core import sweep
from lsq_core.bench import memory
from lsq_core.bits import LADDER
from lsq_core.errors import InputError, LsqError
from lsq_core.evaluation import perplexity
from lsq_core.evaluation.perplexity import evaluate_models
from lsq_core.evaluation.protocol import EvaluationRequest, EvaluationText, Protocol
from lsq_core.evaluation.streamed import evaluate_streamed
from lsq_core.model.loading import load_model
from lsq_core.model.source import ModelSource
from lsq_core.model.streaming import Checkpoint, open_streamed
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.quantization.registry import get_quantizer
from lsq_core.quantization.task import QuantizationTask
from lsq_core.quantized import convert
from lsq_core.quantized.convert import quantize_model
from lsq_core.quantized.modules import measured_bytes
from lsq_core.session import Session
from tests.conftest import ARCHITECTURES

TEXT = EvaluationText(np.random.default_rng(2).integers(1, 4096, 300), Protocol("a", 64, 32))


def choices(loaded):
    """Return three plans: two differing only in the last block, one not quantizing the first."""
    layers = loaded.info.layers
    plans = [
        {m: LADDER[last if m.layer + 1 == layers else 3] for m in loaded.info.matrices}
        for last in (0, 5)
    ]
    return [*plans, {m: c for m, c in plans[0].items() if m.layer > 0}]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_streamed_evaluation_matches_whole_models(random_model, architecture):
    source = ModelSource(str(random_model(architecture)))
    loaded, streamed = load_model(source, "cpu"), open_streamed(source, "cpu")
    rtn = get_quantizer("rtn")
    models = [quantize_model(QuantizationTask(loaded, c), rtn) for c in choices(loaded)]
    [expected] = evaluate_models(models, [TEXT], bos=0, reference=loaded.model)
    tasks = [QuantizationTask(streamed, c) for c in choices(streamed)]
    [found] = evaluate_streamed(tasks, [rtn] * 3, [TEXT], bos=0)
    for one, (own, full), model in zip(found, expected, models, strict=True):
        assert one.pair[0].nll == pytest.approx(own.nll, rel=1e-5)
        assert one.pair[1].nll == pytest.approx(full.nll, rel=1e-5)
        assert one.pair[0].kl == pytest.approx(own.kl, rel=1e-4, abs=1e-6)
        assert one.measured_bytes == measured_bytes(model)
    names = {name for name, p in streamed.model.named_parameters() if not p.is_meta}
    assert not names, "weights are left in memory"


def test_streamed_evaluation_holds_one_block(random_model):
    streamed = open_streamed(ModelSource(str(random_model("llama-gqa"))), "cpu")
    task = QuantizationTask(streamed, choices(streamed)[0])
    held = []

    def progress(done, total, message):
        blocks = [not next(block.parameters()).is_meta for block in streamed.blocks]
        held.append((message.rpartition(", ")[2], blocks))

    list(evaluate_streamed([task], [get_quantizer("rtn")], [TEXT], bos=0, progress=progress))
    assert ("block 1 of 2", [True, False]) in held
    assert ("block 2 of 2", [False, True]) in held
    assert ("LM head", [False, False]) in held


def test_streamed_evaluation_of_resumed_walk_has_the_same_bytes(random_model, tmp_path):
    streamed = open_streamed(ModelSource(str(random_model("llama-gqa"))), "cpu")
    files, plans = [[tmp_path / "evaluation-a.npz"]], [get_quantizer("rtn")]
    task = QuantizationTask(streamed, choices(streamed)[0])
    [[first]] = evaluate_streamed([task], plans, [TEXT], bos=0, checkpoints=files)
    [[again]] = evaluate_streamed([task], plans, [TEXT], bos=0, checkpoints=files)
    assert first.measured_bytes == again.measured_bytes > 0
    assert again.pair[0].nll.tolist() == first.pair[0].nll.tolist()


def test_streamed_evaluation_not_finite_names_first_module(random_model):
    streamed = open_streamed(ModelSource(str(random_model("llama-gqa"))), "cpu")
    task = QuantizationTask(streamed, choices(streamed)[0])
    part = streamed.blocks[1].mlp.act_fn

    def overflow(module, args, output):
        return output * torch.inf

    part.register_forward_hook(overflow)
    with pytest.raises(LsqError, match=r"no perplexity.* model\.layers\.1\.mlp\.act_fn;"):
        list(evaluate_streamed([task], [get_quantizer("rtn")], [TEXT], bos=0))


def test_streamed_evaluation_of_model_quantizer_raises(random_model):
    streamed = open_streamed(ModelSource(str(random_model("llama-gqa"))), "cpu")
    task = QuantizationTask(streamed, choices(streamed)[0])
    with pytest.raises(InputError, match="block by block"):
        next(evaluate_streamed([task], [get_quantizer("hybrid")], [TEXT], bos=0))


def test_run_of_model_larger_than_memory_has_the_same_figures(random_model, small_text, tmp_path):
    """The model is run block by block; the stored row matches that of a fully loaded model."""
    folder, request = str(random_model("llama-gqa")), EvaluationRequest(str(small_text))
    whole = Session(folder, tmp_path / "whole.duckdb", "cpu")
    plan = whole.plan("uniform", base="3.13")
    expected = whole.run(plan, "rtn", request)
    session = Session(folder, tmp_path / "blocks.duckdb", "cpu")
    session.fits_in_memory = lambda more_bytes=0: False
    found = session.run(session.plan("uniform", base="3.13"), "rtn", request)
    assert not session.is_loaded
    for name in ("perplexity", "perplexity_full", "kl"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-7)
    columns = ["measured_bytes", "model_bytes", "device", "dtype", "quantizer", "tokens"]
    stored, other = session.store.results()[columns], whole.store.results()[columns]
    assert stored.to_dict("records") == other.to_dict("records")


def test_fits_in_memory_counts_weights_and_more(random_model, monkeypatch):
    session = Session(str(random_model("llama-gqa")), device="cpu")
    size = 4 * session.info.parameters
    monkeypatch.setattr("lsq_core.model.loading.available_memory", lambda: size + 100)
    assert session.fits_in_memory(100)
    assert not session.fits_in_memory(101)


def test_sweep_of_model_larger_than_memory_reads_it_once(
    random_model, small_text, tmp_path, monkeypatch
):
    """Six plans share one pass over the weights per text; figures match the loaded model's."""
    folder, texts = str(random_model("llama-gqa")), [small_text, tmp_path / "other.txt"]
    texts[1].write_text("\n".join(f"{i} is followed by {i + 1}." for i in range(300)), "utf8")
    requests = sweep.requests(PlanRequest("uniform"), ["uniform"], ("2.13", "3.13", "4.13"), ())
    evaluations = [EvaluationRequest(str(text), max_tokens=300) for text in texts]
    items = sweep.items(requests, ["rtn", "hqq"], evaluations)
    whole = Session(folder, tmp_path / "whole.duckdb", "cpu")
    expected = sweep.sweep(whole, items, ProfileSettings("rtn"))
    session = Session(folder, tmp_path / "blocks.duckdb", "cpu")
    session.fits_in_memory = lambda more_bytes=0: False
    read, fill = [], Checkpoint.fill

    def counted(self, model, names):
        read.extend(name for name in names if ".1.mlp.down_proj" in name)
        return fill(self, model, names)

    monkeypatch.setattr(Checkpoint, "fill", counted)
    found = sweep.sweep(session, items, ProfileSettings("rtn"))
    assert not session.is_loaded
    assert len(read) == len(texts), "all plans have a block from one reading"
    assert [row["state"] for row in found] == ["done"] * len(items)
    for own, other in zip(found, expected, strict=True):
        for name in ("perplexity", "perplexity_full", "kl"):
            assert own[name] == pytest.approx(other[name], rel=1e-5, abs=1e-7)
        assert own["measured_bytes"] == other["measured_bytes"]
    again = sweep.sweep(session, items, ProfileSettings("rtn"))
    assert [row["state"] for row in again] == ["found"] * len(items)


def test_full_precision_of_model_larger_than_memory(random_model, small_text, tmp_path):
    folder, request = str(random_model("llama-gqa")), EvaluationRequest(str(small_text))
    whole = Session(folder, tmp_path / "whole.duckdb", "cpu").evaluate_full(request)
    session = Session(folder, tmp_path / "blocks.duckdb", "cpu")
    session.fits_in_memory = lambda more_bytes=0: False
    found = session.evaluate_full(request)
    assert not session.is_loaded
    assert found["perplexity"] == pytest.approx(whole["perplexity"], rel=1e-6)


def test_matrices_that_plans_store_alike_are_quantized_once(random_model, monkeypatch):
    streamed = open_streamed(ModelSource(str(random_model("llama-gqa"))), "cpu")
    first = choices(streamed)[0]
    changed = next(m for m in first if m.layer == 0)
    tasks = [QuantizationTask(streamed, c) for c in (first, first | {changed: LADDER[5]})]
    made, original = [], convert.quantize_config

    def counted(weight, config, *args, **kwargs):
        made.append((kwargs["name"], config))
        return original(weight, config, *args, **kwargs)

    monkeypatch.setattr(convert, "quantize_config", counted)
    list(evaluate_streamed(tasks, [get_quantizer("rtn")] * 2, [TEXT], bos=0))
    assert len(made) == len(set(made)) == len(first) + 1


def test_groups_of_windows_are_told_beforehand(random_model, monkeypatch):
    """If hidden states don't fit, weights are read once per group; figures are unchanged."""
    streamed = open_streamed(ModelSource(str(random_model("llama-gqa"))), "cpu")
    task, quantizers = QuantizationTask(streamed, choices(streamed)[0]), [get_quantizer("rtn")]
    [[expected]] = evaluate_streamed([task], quantizers, [TEXT], bos=0)
    monkeypatch.setattr(perplexity, "_MAX_STATES_BYTES", 2 * 128 * 4 * 4 * 64)
    messages = []
    [[found]] = evaluate_streamed(
        [task],
        quantizers,
        [TEXT],
        bos=0,
        progress=lambda done, total, message: messages.append(message),
    )
    groups = [message for message in messages if " groups of windows" in message]
    assert len(groups) == 1
    assert groups[0].startswith("hidden states need 3 ")
    assert found.pair[0].nll == pytest.approx(expected.pair[0].nll, rel=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_evaluation_peak_memory_is_of_a_block(tmp_path):
    """Evaluates three plans of 512 MiB of bfloat16 weights (1 GiB in float32) in its own process.

    The limit is a third of the float32 weights, on top of the memory of the libraries; a block has
    37 MiB of weights.
    """
    folder = tmp_path / "model"
    weight_bytes = memory.write_random_model(folder, 512 * 2**20, vocabulary=4096)
    assert weight_bytes >= 500 * 2**20
    options = memory.Options(quantizer="rtn", tokens=128)
    measured = memory.measure(folder, weight_bytes, options)
    assert measured.peak - measured.base <= 2 * weight_bytes / 3
