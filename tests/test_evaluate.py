"""Perplexity against a plain loop over Hugging Face's own loss, and the paired bootstrap."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lsq_core.bits import LADDER
from lsq_core.errors import InputError
from lsq_core.evaluation.bootstrap import bootstrap_difference
from lsq_core.evaluation.perplexity import evaluate_models
from lsq_core.evaluation.protocol import MIN_PREDICTED, EvaluationText, Protocol, make_windows
from lsq_core.model.architecture import find_blocks
from lsq_core.model.loading import load_model
from lsq_core.model.source import ModelSource
from lsq_core.quantization.registry import get_quantizer
from lsq_core.quantization.task import QuantizationTask
from lsq_core.quantized.convert import quantize_model
from tests.helpers import evaluate_model


def plain_loop(model, ids, context, step, bos, drop_tail):
    """Return each window's summed negative log-likelihood and number of predicted tokens.

    The windows are scored one by one with the model's own ``loss``, as in its documentation.
    """
    stream = ([] if bos is None else [bos]) + list(ids)
    sums, counts = [], []
    for begin in range(0, len(stream), step):
        end = min(begin + step, len(stream))
        if drop_tail and end - begin < step:
            break
        start = max(begin + step - context, 0)
        window = torch.tensor([stream[start:end]])
        if bos is not None:
            window[0, 0] = bos
        labels = window.clone()
        labels[:, : begin - start] = -100
        predicted = int((labels[:, 1:] != -100).sum())
        if predicted == 0:
            continue
        with torch.no_grad():
            sums.append(float(model(window, labels=labels).loss) * predicted)
        counts.append(predicted)
    return np.array(sums), np.array(counts)


@pytest.fixture(scope="module")
def demo():
    return load_model(ModelSource("demo"), "cpu")


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(0).integers(1, 4096, 1900)


@pytest.mark.parametrize("bos", [0, None])
@pytest.mark.parametrize(
    ("name", "step", "full_name"),
    [("strided", 256, "strided-512/256"), ("blocks", 512, "blocks-512")],
)
def test_perplexity_matches_plain_loop(demo, ids, name, step, full_name, bos):
    protocol = Protocol.named(name, demo.info.context)
    assert protocol.name == full_name
    ours, _ = evaluate_model(demo.model, ids, protocol, bos=bos)
    sums, counts = plain_loop(demo.model, ids, 512, step, bos, name == "blocks")
    assert ours.counts.tolist() == counts.tolist()
    assert ours.nll == pytest.approx(sums, rel=1e-4)
    assert ours.perplexity == pytest.approx(math.exp(sums.sum() / counts.sum()), rel=1e-4)
    assert ours.perplexity > 100, "random tokens can't be predicted"


@pytest.mark.parametrize("architecture", ["opt", "gemma2", "mixtral-moe", "gpt2-conv1d"])
def test_perplexity_matches_plain_loop_other_architectures(random_model, ids, architecture):
    loaded = load_model(ModelSource(str(random_model(architecture))), "cpu")
    protocol = Protocol.named("strided", loaded.info.context)
    ours, _ = evaluate_model(loaded.model, ids[:700], protocol, bos=0)
    sums, counts = plain_loop(loaded.model, ids[:700], 256, 128, 0, False)
    assert ours.nll == pytest.approx(sums, rel=1e-4)
    assert ours.perplexity == pytest.approx(math.exp(sums.sum() / counts.sum()), rel=1e-4)


def test_kl_and_top1_match_logits(demo, ids):
    choice = dict.fromkeys(demo.info.matrices, LADDER[0])
    quantized = quantize_model(QuantizationTask(demo, choice), get_quantizer("rtn"))
    protocol = Protocol("blocks-100", 100, 100)
    own, full = evaluate_model(quantized, ids[:300], protocol, bos=None, reference=demo.model)
    with torch.inference_mode():
        p, q = (
            m(torch.tensor(ids[:300]).view(3, 100)).logits[:, :-1].log_softmax(-1)
            for m in (demo.model, quantized)
        )
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum") / 297
    assert own.kl == pytest.approx(float(kl), rel=1e-4)
    same = (p.argmax(-1) == q.argmax(-1)).double().mean()
    assert own.top1 == pytest.approx(float(same))
    assert full.perplexity == pytest.approx(
        evaluate_model(demo.model, ids[:300], protocol, bos=None)[0].perplexity, rel=1e-6
    )
    assert full.kl is None


def test_kl_of_model_with_itself_is_zero(demo, ids):
    protocol = Protocol.named("blocks", 512)
    own, _ = evaluate_model(demo.model, ids[:600], protocol, bos=0, reference=demo.model)
    assert own.kl == pytest.approx(0, abs=1e-9)
    assert own.top1 == 1


def models_and_texts(demo, ids):
    """Return two quantized models and two texts of different lengths."""
    models = [
        quantize_model(
            QuantizationTask(demo, dict.fromkeys(demo.info.matrices, stop)), get_quantizer("rtn")
        )
        for stop in (LADDER[0], LADDER[5])
    ]
    texts = [
        EvaluationText(ids[:700], Protocol("a", 128, 64)),
        EvaluationText(ids[700:1000], Protocol("b", 128, 128)),
    ]
    return models, texts


def test_evaluate_together_matches_separate_evaluation(demo, ids):
    models, texts = models_and_texts(demo, ids)
    results = list(evaluate_models(models, texts, bos=0, reference=demo.model))
    for pairs, text in zip(results, texts, strict=True):
        for (own, full), model in zip(pairs, models, strict=True):
            single, full_single = evaluate_model(
                model, text.ids, text.protocol, bos=0, reference=demo.model
            )
            assert own.protocol == text.protocol.name
            assert own.counts.tolist() == single.counts.tolist()
            assert own.nll == pytest.approx(single.nll, rel=1e-5)
            assert full.nll == pytest.approx(full_single.nll, rel=1e-5)
            assert (own.kl, own.top1) == pytest.approx((single.kl, single.top1), rel=1e-4)
            assert full.kl is None


def test_evaluate_together_runs_reference_once_per_batch(demo, ids):
    models, texts = models_and_texts(demo, ids)
    parts = [find_blocks(m)[1][-1].mlp for m in (demo.model, *models)]
    calls = []
    hooks = [
        part.register_forward_pre_hook(
            lambda m, args: calls.append((id(m), args[0][..., 0].numel()))
        )
        for part in parts
    ]
    list(evaluate_models(models, texts, bos=0, reference=demo.model))
    for hook in hooks:
        hook.remove()
    tokens = [sum(n for at, n in calls if at == id(part)) for part in parts]
    windows = [w for text in texts for w in make_windows(len(text.ids) + 1, text.protocol)]
    shared_prefix = 64  # the first text's first window is a prefix of its second
    assert tokens == [sum(w.stop - w.start for w in windows) - shared_prefix] * 3


def test_evaluate_together_yields_texts_in_order(demo, ids):
    models, [first, second] = models_and_texts(demo, ids)
    texts = [first, EvaluationText(second.ids, Protocol("other lengths", 96, 96))]
    progress_shares = []
    results = evaluate_models(
        models,
        texts,
        bos=0,
        progress=lambda done_, total, message: progress_shares.append(done_ / total),
    )
    next(results)
    assert progress_shares[-1] < 1
    next(results)
    assert progress_shares[-1] == 1


def test_evaluate_together_resumes_from_checkpoint(demo, ids, tmp_path):
    """Results are also reused if the second call has fewer models and texts."""
    models, texts = models_and_texts(demo, ids)
    files = [[tmp_path / f"{t}-{m}.npz" for m in range(2)] for t in range(2)]

    first = evaluate_models(models, texts, bos=0, reference=demo.model, checkpoints=files)
    first_results = next(first)  # saves the first text in full, and other windows of its batches
    first.close()
    forward_calls = []
    hook = models[1].register_forward_pre_hook(lambda m, args: forward_calls.append(len(args[0])))
    [[pair]] = evaluate_models(
        models[1:], texts[:1], bos=0, reference=demo.model, checkpoints=[[files[0][1]]]
    )
    assert not forward_calls
    assert pair[0].nll.tolist() == first_results[1][0].nll.tolist()
    assert (pair[0].kl, pair[1].perplexity) == (
        first_results[1][0].kl,
        first_results[1][1].perplexity,
    )
    hook.remove()


@pytest.mark.parametrize("damage", ["empty", "cut", "zeroed", "another text's"])
def test_evaluate_damaged_checkpoint_reported_and_rescored(demo, ids, tmp_path, damage):
    ids, protocol, file = ids[:400], Protocol.named("strided", 64), tmp_path / "evaluation-0.npz"
    [first] = evaluate_model(demo.model, ids, protocol, bos=0, checkpoint=file)[:1]
    content = file.read_bytes()
    if damage == "another text's":
        evaluate_model(
            demo.model, ids[: len(ids) // 2], protocol, bos=0, checkpoint=tmp_path / "b.npz"
        )
        content = (tmp_path / "b.npz").read_bytes()
    else:
        content = {"empty": b"", "cut": content[:-50], "zeroed": bytes(len(content))}[damage]
    file.write_bytes(content)
    reports = []
    rescored, _ = evaluate_model(
        demo.model, ids, protocol, bos=0, checkpoint=file, progress=lambda *a: reports.append(a)
    )
    assert "evaluation-0.npz is damaged" in reports[0][2]
    assert reports[0][0] == 0
    assert rescored.nll.tolist() == first.nll.tolist()
    forward_calls = []
    hook = demo.model.register_forward_pre_hook(lambda m, args: forward_calls.append(1))
    evaluate_model(demo.model, ids, protocol, bos=0, checkpoint=file)
    hook.remove()
    assert not forward_calls, "what was scored again is kept again"


@given(
    tokens=st.integers(2, 5000),
    half=st.integers(1, 300),
    name=st.sampled_from(["strided", "blocks"]),
)
def test_lay_windows_score_each_token_once(tokens, half, name):
    context = 2 * half
    step = half if name == "strided" else context
    protocol = Protocol("x", context, step)
    predicted = tokens - 1 if name == "strided" else tokens // context * (context - 1)
    if predicted < MIN_PREDICTED:
        with pytest.raises(InputError, match=rf"\b{predicted}\b.*\b{MIN_PREDICTED}\b"):
            make_windows(tokens, protocol)
        return
    windows = make_windows(tokens, protocol)
    scored = [t for w in windows for t in range(w.stop - w.scored, w.stop)]
    assert len(scored) == len(set(scored))
    assert all(w.stop - w.start <= context and w.start >= 0 for w in windows)
    if name == "strided":
        assert scored == list(range(1, tokens))
    else:
        assert scored == [t for t in range(tokens // context * context) if t % context]


def test_protocol_named():
    assert Protocol.named("strided", 4096) == Protocol("strided", 1024, 512)
    assert Protocol.named("blocks", 4096) == Protocol("blocks", 2048, 2048)
    assert Protocol.named("blocks", 512).name == "blocks-512"
    assert Protocol.named("llamacpp-512", 4096) == Protocol("llamacpp-512", 512, 255, disjoint=True)
    assert Protocol.named("llamacpp-512", 256) == Protocol("llamacpp-256", 256, 127, disjoint=True)
    with pytest.raises(InputError, match="strided, blocks or llamacpp-512"):
        Protocol.named("sliding", 512)


def test_llamacpp_windows_score_second_halves():
    """Of each 512 tokens, llama.cpp scores the predictions from the 257th on, except the last."""
    windows = make_windows(2000, Protocol.named("llamacpp-512", 8192))
    assert [(w.start, w.stop) for w in windows] == [(0, 512), (512, 1024), (1024, 1536)]
    assert {w.scored for w in windows} == {255}
    with pytest.raises(InputError, match=r"\b512 tokens"):
        make_windows(511, Protocol.named("llamacpp-512", 8192))


def test_compare_windows_tie_and_difference():
    random = np.random.default_rng(0)
    counts = np.full(100, 256)
    base = random.normal(1000, 100, 100)
    noise = bootstrap_difference(base + random.normal(0, 5, 100), base, counts)
    assert noise.is_tie
    worse = bootstrap_difference(base + 5 + random.normal(0, 5, 100), base, counts)
    assert not worse.is_tie
    assert worse.low < worse.relative < worse.high
    assert worse.relative == pytest.approx(math.expm1(5 / 256), rel=0.3)
    same = bootstrap_difference(base, base, counts)
    assert (same.relative, same.low, same.high) == (0, 0, 0)
    few = bootstrap_difference(base[:7] + 5, base[:7], counts[:7])
    assert few.relative == pytest.approx(math.expm1(5 / 256))
    assert math.isnan(few.low)
    assert few.is_tie, "seven windows tell nothing about chance"
    with pytest.raises(ValueError, match="same windows"):
        bootstrap_difference(base, base[:50], counts)
