"""Evaluation and profiling of an entire model on a GPU."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from lsq_core.bench import (
    DEFAULT_MODEL,
    NO_GPU,
    Row,
    relative_half_range,
    time_call,
    time_interleaved,
)
from lsq_core.bench.perplexity import plain_loop
from lsq_core.bits import QuantConfig
from lsq_core.corpus.registry import load_corpus
from lsq_core.corpus.tokens import build_token_stream
from lsq_core.evaluation.perplexity import evaluate_models
from lsq_core.evaluation.protocol import EvaluationText, Protocol
from lsq_core.model.loading import LoadedModel, load_model
from lsq_core.model.source import ModelSource
from lsq_core.model.streaming import open_streamed
from lsq_core.profiling.measure import measure_profile
from lsq_core.profiling.metrics import default_metrics
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.quantization.registry import get_quantizer
from lsq_core.quantization.task import QuantizationTask
from lsq_core.quantized.convert import quantize_model

#: Number of tokens to evaluate.
TOKENS = 2**17
#: Maximum seconds for the profile on an H100, by model (SmolLM2-135M).
MOST_PROFILE = {"smollm2": 6.0}


def evaluate(repeats: int, model: str = DEFAULT_MODEL) -> Row:
    """Evaluate a plan and full precision, KL included, against transformers' loop over both."""
    if not torch.cuda.is_available():
        return Row("evaluate_gpu", _title("evaluation", model), device="cuda", reason=NO_GPU)
    return evaluate_on("cuda", repeats, model, TOKENS)


def evaluate_on(device: str, repeats: int, model: str, tokens: int) -> Row:
    """Measure :func:`evaluate` on any device and number of tokens."""
    loaded = load_model(ModelSource(model), device)
    quantized = _quantize(loaded)
    ids = build_token_stream(load_corpus("stdlib", "evaluation"), loaded.tokenizer, tokens).ids
    bos, protocol = loaded.tokenizer.bos_token_id, Protocol.named("strided", loaded.info.context)
    stream = torch.from_numpy(ids if bos is None else np.r_[bos, ids]).to(loaded.device)
    found = {}

    def ours() -> None:
        [[(own, full)]] = evaluate_models(
            [quantized], [EvaluationText(ids, protocol)], bos=bos, reference=loaded.model
        )
        found["ours"] = np.array([own.perplexity, full.perplexity])

    def theirs() -> None:
        both = (quantized, loaded.model)
        found["theirs"] = np.array([plain_loop(m, stream, protocol, bos) for m in both])

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    pair = time_interleaved(ours, theirs, repeats, wait=wait)
    return Row(
        id="evaluate_gpu",
        what=f"{_title('evaluation', model)}, b4g64 and full precision, {len(ids):,} tokens, "
        f"{loaded.dtype}",
        ours="one walk over the blocks, KL included",
        theirs="transformers' strided loop over each model, no KL",
        **pair.figures,
        error=float(np.abs(found["ours"] / found["theirs"] - 1).max()),
        # In half precision, rounding depends on the shape of the batch.
        error_limit=1e-4 if loaded.dtype == "float32" else 1e-2,
        error_is="relative difference of the perplexities",
        target=3.0,
        device=device,
        details={"model": model, "scored_tokens_per_s": len(ids) / pair.figures["ours_s"]},
    )


def _quantize(loaded: LoadedModel) -> nn.Module:
    choice = dict.fromkeys(loaded.info.matrices, QuantConfig(4, 64))
    return quantize_model(QuantizationTask(loaded, choice), get_quantizer("rtn"))


def profile(repeats: int, model: str = DEFAULT_MODEL) -> Row:
    """Time a profile with the default metrics and settings, streaming the blocks from files."""
    if not torch.cuda.is_available():
        return Row("profile_gpu", _title("profile", model), device="cuda", reason=NO_GPU)
    return profile_on("cuda", repeats, model, ProfileSettings())


def profile_on(device: str, repeats: int, model: str, settings: ProfileSettings) -> Row:
    """Measure :func:`profile` on any device and with any settings."""
    source = ModelSource(model)

    def measure() -> None:
        loaded = open_streamed(source, device)
        measure_profile(loaded, settings, "bench", metrics=default_metrics())

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    measure()  # triggers compilation
    seconds = np.array([time_call(measure, wait) for _ in range(repeats)])
    matrices = len(open_streamed(source, device).info.matrices)
    return Row(
        id="profile_gpu",
        what=f"{_title('profile', model)}: {matrices} matrices, {settings.samples} samples",
        ours="one pass over the blocks",
        ours_s=float(np.median(seconds)),
        noise=relative_half_range(seconds),
        most_s=MOST_PROFILE.get(model),
        device=device,
        details={"model": model},
    )


def _title(what: str, model: str) -> str:
    return f"{what} of {'the demo model' if model == DEFAULT_MODEL else model} on a GPU"
