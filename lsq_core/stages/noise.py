"""Measure the noise floor of a model's figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lsq_core.errors import LsqError, translate_resource_errors
from lsq_core.evaluation.noise import Condition, NoiseFloor
from lsq_core.evaluation.protocol import EvaluationRequest, EvaluationText
from lsq_core.planning.request import PlanRequest
from lsq_core.provenance import device_kind
from lsq_core.stages.evaluate import evaluation_provenance, make_texts
from lsq_core.stages.model import OpenModel
from lsq_core.stages.plan import plan_model
from lsq_core.stages.run import quantize_plan
from lsq_core.units import format_bytes

if TYPE_CHECKING:
    from torch import nn

#: Default base of the uniform plan: quantized, but close to full precision.
DEFAULT_BASE = "4.13"
#: Tokens in a large batch.
_LARGE_BATCH_TOKENS = 2**13
#: The wider dtype that reveals the effect of a dtype's rounding.
_WIDER = {"float32": "float64", "bfloat16": "float32", "float16": "float32"}
_QUANTIZER = "hqq"


@dataclass(frozen=True)
class _Variant:
    """A way of computing: tokens per batch (None for the default), and the dtype."""

    name: str
    batch_tokens: int | None
    dtype: str


def measure_noise(
    model: OpenModel, request: EvaluationRequest, base: str = DEFAULT_BASE
) -> NoiseFloor:
    """Measure how much arithmetic alone changes a model's figures, and store the result.

    Full precision and the uniform HQQ plan of a base are evaluated as usual, with one window per
    batch, with large batches, and in a wider dtype, with the same weights each time.

    Raises
    ------
    InputError, LsqError
        If an input is invalid, or the model and its copy in the wider dtype do not fit in memory.
    """
    dtype = model.device_and_dtype["dtype"]
    _check_memory(model, _WIDER[dtype])
    plan = plan_model(model, PlanRequest("uniform", base), model.default_settings)
    quantized = quantize_plan(model, plan, _QUANTIZER).model
    models = (quantized, model.loaded.model)
    variants = (
        _Variant("as usual", None, dtype),
        _Variant("one window a batch", 1, dtype),
        _Variant("large batches", _LARGE_BATCH_TOKENS, dtype),
        _Variant(f"in {_WIDER[dtype]}", None, _WIDER[dtype]),
    )
    [text] = make_texts(model, [request])
    conditions, tokens = [], 0
    for number, variant in enumerate(variants):
        condition, tokens = _evaluate(model, models, text, variant, number, len(variants))
        conditions.append(condition)
    _check_figures(conditions)
    floor = NoiseFloor(
        protocol=text.protocol.name,
        device=device_kind(model.device_and_dtype["device"]),
        dtype=dtype,
        corpus=model.stream(request).corpus,
        corpus_sha256=model.stream(request).sha256,
        tokens=tokens,
        plan=f"uniform {plan.base}, {_QUANTIZER}",
        conditions=tuple(conditions),
        provenance=evaluation_provenance(model.device_and_dtype, request, model.tokenizer),
    )
    model.store.save_noise_floor(model.info.fingerprint, floor)
    return floor


def _check_figures(conditions: Sequence[Condition]) -> None:
    """Raise :class:`LsqError` if a figure is not finite and positive, so has no relative error."""
    for one in conditions:
        figures = one.perplexity_full, one.perplexity, one.kl
        if not all(np.isfinite(figures)) or not min(figures) > 0:
            raise LsqError(
                f"Evaluated {one.name}, perplexity is {one.perplexity_full:g} in full precision "
                f"and {one.perplexity:g} quantized, KL divergence {one.kl:g}: their noise cannot "
                "be determined. Give another text or --base."
            )


def _check_memory(model: OpenModel, wider: str) -> None:
    """Raise :class:`LsqError` unless the model and a copy in the wider dtype fit in memory."""
    import torch

    from lsq_core.model.loading import free_bytes

    copied = model.info.parameters * getattr(torch, wider).itemsize
    free = free_bytes(torch.device(model.device_and_dtype["device"]))
    if not model.fits_in_memory(copied) or copied > free:
        raise LsqError(
            f"The noise floor is measured with {model.source.name} in memory beside a copy of it "
            f"in {wider}, which takes {format_bytes(copied)} more, and {format_bytes(free)} are "
            "free; measure it on a machine with more memory."
        )


def _evaluate(
    model: OpenModel,
    models: Sequence[nn.Module],
    text: EvaluationText,
    variant: _Variant,
    number: int,
    count: int,
) -> tuple[Condition, int]:
    """Evaluate a variant for a plan and full precision; also return the predicted tokens."""
    from dataclasses import replace

    import torch

    from lsq_core.evaluation.perplexity import evaluate_models
    from lsq_core.quantized.convert import cast_copies

    def progress(done: int, total: int, message: str) -> None:
        share = number * total + done
        model.report("noise", share, count * total, f"{variant.name} · {message}")

    with translate_resource_errors(model.device_and_dtype["device"]):
        if variant.dtype != model.device_and_dtype["dtype"]:
            models = cast_copies(models, getattr(torch, variant.dtype))
        [[(own, full)]] = evaluate_models(
            models[:1],
            [replace(text, batch_tokens=variant.batch_tokens)],
            bos=model.tokenizer.bos_token_id,
            reference=models[1],
            progress=progress,
        )
    return Condition(variant.name, full.perplexity, own.perplexity, own.kl), own.tokens
