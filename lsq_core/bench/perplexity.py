"""Perplexity of the demo model, against the strided loop that Hugging Face documents."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from lsq_core.bench import Row, time_interleaved
from lsq_core.corpus.registry import load_corpus
from lsq_core.corpus.tokens import build_token_stream
from lsq_core.evaluation.perplexity import evaluate_models
from lsq_core.evaluation.protocol import EvaluationText, Protocol
from lsq_core.model.loading import load_model
from lsq_core.model.source import ModelSource

#: Number of tokens of the built-in text, by device.
TOKENS = {"cpu": 4096, "cuda": 65536}


def perplexity(repeats: int) -> Row:
    """Measure on the GPU if there is one, otherwise on the CPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = load_model(ModelSource("demo"), device, "float32")
    corpus = load_corpus("stdlib", "evaluation")
    ids = build_token_stream(corpus, loaded.tokenizer, TOKENS[device]).ids
    bos = loaded.tokenizer.bos_token_id
    return compare(loaded.model, ids, bos, loaded.info.context, repeats)


def compare(model: nn.Module, ids: np.ndarray, bos: int | None, context: int, repeats: int) -> Row:
    """Compare with the plain loop, for any model and token ids (tokens,)."""
    protocol = Protocol.named("strided", context)
    device = next(model.parameters()).device
    stream = torch.from_numpy(ids if bos is None else np.r_[bos, ids]).to(device)
    results = {}

    def ours() -> None:
        [[(evaluation, _)]] = evaluate_models([model], [EvaluationText(ids, protocol)], bos=bos)
        results["ours"] = evaluation.perplexity

    def theirs() -> None:
        results["theirs"] = plain_loop(model, stream, protocol, bos)

    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    pair = time_interleaved(ours, theirs, repeats, wait=wait)
    parameters = sum(p.numel() for p in model.parameters())
    return Row(
        id="perplexity",
        what=f"perplexity, {parameters / 1e6:.1f} M parameters, {len(ids):,} tokens",
        ours="windows in batches, the head where tokens are scored",
        theirs="transformers' strided loop",
        **pair.figures,
        error=abs(results["ours"] / results["theirs"] - 1),
        error_limit=1e-4,
        error_is="relative difference of the perplexity",
        target=1.3 if device.type == "cpu" else 3.0,
        device=str(device),
        details={"protocol": protocol.name, "perplexity": results["ours"]},
    )


def plain_loop(model: nn.Module, stream: Tensor, protocol: Protocol, bos: int | None) -> float:
    """Compute the perplexity window by window ("Perplexity of fixed-length models").

    It uses the model's own loss. As in the protocol, each window begins with the
    beginning-of-sequence token, if the tokenizer has one.
    """
    total, count, scored_to = 0.0, 0, 0
    for begin in range(0, len(stream), protocol.scored):
        end = min(begin + protocol.context, len(stream))
        window = stream[None, begin:end].clone()
        if bos is not None:
            window[0, 0] = bos
        labels = window.clone()
        labels[:, : scored_to - begin] = -100
        predicted = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            total += float(model(window, labels=labels).loss) * predicted
        count += predicted
        scored_to = end
        if end == len(stream):
            break
    return math.exp(total / count)
