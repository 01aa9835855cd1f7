"""Evaluation block by block, compared with each model's own forward pass window by window."""

from __future__ import annotations

import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from lsq_core.bits import LADDER
from lsq_core.errors import LsqError
from lsq_core.evaluation import perplexity, scoring, walk_file
from lsq_core.evaluation.perplexity import evaluate_models
from lsq_core.evaluation.protocol import EvaluationText, Protocol, make_windows
from lsq_core.model.loading import BlockModel, load_model
from lsq_core.model.source import ModelSource
from lsq_core.model.walk import NotSequential, detect_output_forms, record_calls
from lsq_core.quantization.cache import PackedMatrixCache
from lsq_core.quantization.packed import PackedMatrix
from lsq_core.quantization.registry import get_quantizer
from lsq_core.quantization.task import QuantizationTask
from lsq_core.quantized.convert import quantize_model
from tests.conftest import ARCHITECTURES

PROTOCOL = Protocol("strided-64/32", 64, 32)


@pytest.fixture(scope="module")
def demo():
    return load_model(ModelSource("demo"), "cpu")


@pytest.fixture(scope="module")
def ids():
    return make_ids()


def make_ids():
    return np.random.default_rng(1).integers(1, 4096, 300)


def quantize_plans(loaded, *lasts):
    """Return models at 3 bits that differ only in the last layer and share packed matrices."""
    cache, models = PackedMatrixCache(2**30), []
    for last in lasts:
        choice = {
            m: LADDER[last if m.layer + 1 == loaded.info.layers else 3]
            for m in loaded.info.matrices
        }
        models.append(
            quantize_model(QuantizationTask(loaded, choice, cache=cache), get_quantizer("rtn"))
        )
    return models


@torch.inference_mode()
def plain_figures(model, reference, ids, protocol=PROTOCOL):
    """Return summed NLL (windows,), mean KL and top-1 agreement of full models, by window."""
    stream = torch.from_numpy(np.concatenate([[0], ids]))
    nll, kl, agreed = [], [], []
    for window in make_windows(len(stream), protocol):
        tokens = stream[None, window.start : window.stop].clone()
        tokens[0, 0] = 0
        own, expected = (
            m(tokens, use_cache=False).logits[0, -window.scored - 1 : -1].double().log_softmax(-1)
            for m in (model, reference)
        )
        nll.append(float(-own.gather(-1, tokens[0, -window.scored :, None]).sum()))
        kl += (expected.exp() * (expected - own)).sum(-1).tolist()
        agreed += (own.argmax(-1) == expected.argmax(-1)).tolist()
    return np.array(nll), np.mean(kl), np.mean(agreed)


def assert_figures_match(pairs, models, reference, ids, protocol=PROTOCOL):
    for (own, full), model in zip(pairs, models, strict=True):
        nll, kl, agreed = plain_figures(model, reference, ids, protocol)
        assert own.nll == pytest.approx(nll, rel=1e-4)
        assert own.kl == pytest.approx(kl, abs=1e-5, rel=1e-4)
        assert own.top1 == pytest.approx(agreed, abs=1.5 / own.tokens)
        assert full.nll == pytest.approx(plain_figures(reference, reference, ids, protocol)[0])


def count_tokens(block, calls):
    """Append the token count of each forward pass of a block to ``calls``, except stubbed ones."""
    part = next(module for name, module in block.named_children() if "mlp" in name)
    return part.register_forward_pre_hook(lambda m, args: calls.append(args[0][..., 0].numel()))


# --- figures --------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_walk_matches_plain_loop(random_model, ids, monkeypatch, architecture):
    """Uses several groups of windows, and computes logits for a few tokens at a time."""
    monkeypatch.setitem(perplexity._MAX_GROUP_TOKENS, "cpu", 4 * PROTOCOL.context)
    monkeypatch.setitem(perplexity._MAX_BATCH_TOKENS, "cpu", 2 * PROTOCOL.context)
    monkeypatch.setitem(scoring.MAX_BATCH_LOGITS, "cpu", 7 * 4096)
    loaded = load_model(ModelSource(str(random_model(architecture))), "cpu")
    models = quantize_plans(loaded, 0, 5)
    messages = []
    [pairs] = evaluate_models(
        models,
        [EvaluationText(ids, PROTOCOL)],
        bos=0,
        reference=loaded.model,
        progress=lambda done, total, message: messages.append((done, total, message)),
    )
    assert_figures_match(pairs, models, loaded.model, ids)
    done = [at for at, _, _ in messages]
    assert done == sorted(done)
    assert done[-1] == messages[-1][1]
    assert not any("unsplit" in message for _, _, message in messages)
    assert any(message == "windows 1–5 of 10, block 2 of 2" for _, _, message in messages)
    assert any(message == "windows 6–9 of 10, LM head" for _, _, message in messages)


def test_walk_shares_common_blocks(demo, ids):
    """Blocks shared by plans are computed once, and a repeated model costs nothing."""
    models = [*quantize_plans(demo, 0, 5), *quantize_plans(demo, 1)]
    models.append(models[0])
    first, last = [], []
    hooks = [count_tokens(BlockModel(m).blocks[0], first) for m in models[:3]]
    hooks += [count_tokens(BlockModel(m).blocks[-1], last) for m in models[:3]]
    [pairs] = evaluate_models(models, [EvaluationText(ids, PROTOCOL)], bos=0, reference=demo.model)
    for hook in hooks:
        hook.remove()
    tokens = sum(w.stop - w.start for w in make_windows(len(ids) + 1, PROTOCOL)) - 32
    assert sum(first) == 2 * tokens, "the third plan is of another session"
    assert sum(last) == 3 * tokens
    assert_figures_match(pairs, models, demo.model, ids)
    assert pairs[3][0].nll.tolist() == pairs[0][0].nll.tolist()
    assert all(own.seconds > 0 and full.seconds > 0 for own, full in pairs)


def test_walk_decodes_each_matrix_once_per_group(demo, ids, monkeypatch):
    monkeypatch.setitem(perplexity._MAX_BATCH_TOKENS, "cpu", PROTOCOL.context)
    [model] = quantize_plans(demo, 0)
    decoded = []
    dequantize = PackedMatrix.dequantize

    def counted(self, *args):
        decoded.append(self.shape)
        return dequantize(self, *args)

    monkeypatch.setattr(PackedMatrix, "dequantize", counted)
    list(evaluate_models([model], [EvaluationText(ids, PROTOCOL)], bos=0))
    in_detection = sum(matrix.layer == 0 for matrix in demo.info.matrices)
    assert len(decoded) == len(demo.info.matrices) + in_detection


def test_walk_several_texts_and_groups(demo, ids, monkeypatch):
    monkeypatch.setattr(perplexity, "_MAX_STATES_BYTES", 2 * 128 * 4 * 3 * PROTOCOL.context)
    models = quantize_plans(demo, 0)
    other = Protocol("blocks-50", 50, 50)
    texts = [EvaluationText(ids, PROTOCOL), EvaluationText(ids[:150], other)]
    first, second = evaluate_models(models, texts, bos=0, reference=demo.model)
    assert_figures_match(first, models, demo.model, ids)
    assert_figures_match(second, models, demo.model, ids[:150], other)


# --- models that can't be split into blocks -------------------------------------------------


def test_model_that_changes_states_between_blocks_runs_whole(random_model, ids):
    loaded = load_model(ModelSource(str(random_model("llama-gqa"))), "cpu")

    def scale_inputs(block, args, kwargs):
        return (args[0] * 1.5, *args[1:]), kwargs

    loaded.blocks[1].register_forward_pre_hook(scale_inputs, with_kwargs=True)
    models = quantize_plans(loaded, 0)
    with pytest.raises(NotSequential, match="changed between them"):
        detect_output_forms(loaded, torch.zeros(1, 4, dtype=torch.int64))
    messages = []
    [pairs] = evaluate_models(
        models,
        [EvaluationText(ids, PROTOCOL)],
        bos=0,
        reference=loaded.model,
        progress=lambda done, total, message: messages.append(message),
    )
    assert any("run unsplit, because the decoder blocks" in message for message in messages)
    assert messages[-1].endswith("whole model")
    assert_figures_match(pairs, models, loaded.model, ids)


def test_block_that_changes_inputs_in_place_is_detected(random_model):
    loaded = load_model(ModelSource(str(random_model("llama-gqa"))), "cpu")
    forward = type(loaded.blocks[0]).forward

    class InPlace(type(loaded.blocks[0])):
        def forward(self, hidden_states, *args, **kwargs):
            hidden_states += 1
            return forward(self, hidden_states, *args, **kwargs)

    loaded.blocks[1].__class__ = InPlace
    with torch.inference_mode(), pytest.raises(NotSequential, match="in place"):
        detect_output_forms(loaded, torch.zeros(1, 4, dtype=torch.int64))


# --- recorded calls -------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama-gqa", "gemma2", "gpt-neox-fused", "opt"])
@torch.inference_mode()
def test_equal_arguments_are_kept_once(random_model, architecture):
    loaded = load_model(ModelSource(str(random_model(architecture))), "cpu")
    batches = torch.arange(6 * 32).view(6, 32).split(2)
    calls, hidden = record_calls(loaded, batches)
    assert len(hidden) == 3

    def tensors(value):
        if torch.is_tensor(value):
            return [value]
        if isinstance(value, dict):
            value = list(value.values())
        return [t for v in value for t in tensors(v)] if isinstance(value, (list, tuple)) else []

    for layer in calls:
        first, *others = [[id(t) for t in tensors([c.args, c.kwargs])] for c in layer]
        assert all(own == first for own in others)


def test_token_dependent_arguments_are_kept_apart(random_model):
    loaded = load_model(ModelSource(str(random_model("llama-gqa"))), "cpu")
    inner = loaded.model.model

    def with_tokens(block, args, kwargs):
        return args, kwargs | {"tokens": with_tokens.ids}

    inner.register_forward_pre_hook(
        lambda m, args, kwargs: setattr(with_tokens, "ids", kwargs["input_ids"]), with_kwargs=True
    )
    loaded.blocks[0].register_forward_pre_hook(with_tokens, with_kwargs=True)
    batches = torch.arange(40 * 16).view(40, 16).split(2)
    with torch.inference_mode():
        calls, _ = record_calls(loaded, batches)
    for batch, call in zip(batches, calls[0], strict=True):
        assert torch.equal(call.kwargs["tokens"], batch)


# --- killed and resumed ---------------------------------------------------------------------


class Killed(BaseException):
    """Stands in for a kill; no handler catches it."""


def evaluate_until(models, reference, ids, folder, stop):
    """Evaluate, killed at the first message containing ``stop`` unless that is empty.

    Return the messages, and the evaluations or None if killed.
    """
    messages = []

    def progress(done, total, message):
        messages.append(message)
        if stop and stop in message:
            raise Killed

    files = [[folder / f"evaluation-{k}.npz" for k in range(len(models))]]
    found = evaluate_models(
        models,
        [EvaluationText(ids, PROTOCOL)],
        bos=0,
        reference=reference,
        progress=progress,
        checkpoints=files,
    )
    if stop:
        with pytest.raises(Killed):
            next(found)
        return messages, None
    [pairs] = found
    return messages, pairs


@pytest.mark.parametrize("stop", ["block 3", "LM head"])
def test_killed_walk_resumes_at_its_block(demo, ids, tmp_path, monkeypatch, stop):
    monkeypatch.setattr(walk_file, "SAVE_INTERVAL_S", 0.0)
    monkeypatch.setattr(walk_file, "_MAX_SAVING_SHARE", 1e9)
    models = quantize_plans(demo, 0, 5)
    whole = tmp_path / "whole"
    whole.mkdir()
    _, expected = evaluate_until(models, demo.model, ids, whole, "")
    evaluate_until(models, demo.model, ids, tmp_path, stop)
    (kept,) = tmp_path.glob("walk-*.safetensors")
    first, third = [], []
    hooks = [count_tokens(demo.blocks[0], first), count_tokens(demo.blocks[2], third)]
    _, pairs = evaluate_until(models, demo.model, ids, tmp_path, "")
    for hook in hooks:
        hook.remove()
    assert sum(first) == 2, "the form of its output is all that the first block is run for"
    assert bool(third) == (stop == "block 3")
    assert not kept.exists()
    for (own, full), (own_expected, full_expected) in zip(pairs, expected, strict=True):
        assert own.nll.tolist() == own_expected.nll.tolist()
        assert full.nll.tolist() == full_expected.nll.tolist()
        assert (own.kl, own.top1) == (own_expected.kl, own_expected.top1)
        assert own.seconds > 0


def test_killed_process_resumes_at_its_block(demo, ids, tmp_path):
    """A process is killed by a signal in the third block; this one resumes from its file."""
    command = [sys.executable, "-m", "tests.killed_walk", str(tmp_path), "block 3"]
    killed = subprocess.run(command, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(list(tmp_path.glob("walk-*.safetensors"))) == 1
    models = quantize_plans(demo, 0, 5)
    first, third = [], []
    hooks = [count_tokens(demo.blocks[0], first), count_tokens(demo.blocks[2], third)]
    _, pairs = evaluate_until(models, demo.model, ids, tmp_path, "")
    for hook in hooks:
        hook.remove()
    assert sum(first) == 2, "the form of its output is all that the first block is run for"
    assert sum(third) > 2
    assert_figures_match(pairs, models, demo.model, ids)


@pytest.mark.parametrize("damage", ["empty", "cut", "zeroed", "another shape", "other models"])
def test_unusable_walk_file_is_reported(demo, ids, tmp_path, monkeypatch, damage):
    monkeypatch.setattr(walk_file, "SAVE_INTERVAL_S", 0.0)
    monkeypatch.setattr(walk_file, "_MAX_SAVING_SHARE", 1e9)
    models = quantize_plans(demo, 0)
    evaluate_until(models, demo.model, ids, tmp_path, "block 3")
    (kept,) = tmp_path.glob("walk-*.safetensors")
    content = kept.read_bytes()
    if damage == "other models":
        models += quantize_plans(demo, 1)
    elif damage == "another shape":
        kept.write_bytes(content.replace(b'"shape": [', b'"shape":[1,', 1))
    else:
        kept.write_bytes(
            {"empty": b"", "cut": content[:-50], "zeroed": bytes(len(content))}[damage]
        )
    messages, pairs = evaluate_until(models, demo.model, ids, tmp_path, "")
    (told,) = [message for message in messages if kept.name in message]
    assert ("belongs to other models" if damage == "other models" else "is damaged") in told
    assert told.endswith("Its windows are walked from the start.")
    assert_figures_match(pairs, models, demo.model, ids)
    assert not kept.exists()


# --- non-finite predictions -----------------------------------------------------------------


def test_not_finite_names_first_module(random_model, ids):
    loaded = load_model(ModelSource(str(random_model("llama-gqa"))), "cpu")
    models = quantize_plans(loaded, 0)
    norm = BlockModel(models[0]).blocks[1].post_attention_layernorm
    norm.weight = torch.nn.Parameter(torch.full_like(norm.weight, torch.inf), requires_grad=False)
    evaluated = evaluate_models(
        models, [EvaluationText(ids, PROTOCOL)], bos=0, reference=loaded.model
    )
    with pytest.raises(
        LsqError,
        match=r"The model has no perplexity.* model\.layers\.1\.post_attention_layernorm;",
    ):
        list(evaluated)
    with pytest.raises(LsqError, match="The full-precision model has no perplexity"):
        list(
            evaluate_models(
                [loaded.model], [EvaluationText(ids, PROTOCOL)], bos=0, reference=models[0]
            )
        )
