"""Measure a profile: one load of the model, one walk over its blocks, every metric."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib import import_module

import pandas as pd
import torch
from torch import Tensor

from lsq_core.config import LADDER, QuantConfig, divides
from lsq_core.corpus import TokenBlocks, calibration_blocks, load_corpus
from lsq_core.load import LoadedModel, find_blocks
from lsq_core.model import Matrix
from lsq_core.profile import METRICS, Profile, ProfileSettings
from lsq_core.profile.base import Metric, Score
from lsq_core.profile.context import BlockContext, record_calls
from lsq_core.provenance import machine, versions
from lsq_core.quantize import get_quantizer
from lsq_core.quantize.packed import check_finite, quantize_matrix

Progress = Callable[[int, int, str], None]


def make_metrics() -> list[Metric]:
    """One of each registered metric."""
    found = []
    for place in METRICS.values():
        module, _, name = place.partition(":")
        found.append(getattr(import_module(module), name)())
    return found


@torch.inference_mode()
def measure_profile(
    loaded: LoadedModel,
    settings: ProfileSettings,
    key: str,
    progress: Progress = lambda done, total, message: None,
) -> Profile:
    """Measure every metric on every matrix of a loaded model.

    Raises
    ------
    InputError
        When the calibration corpus cannot be had or is too short.
    LsqError
        When a weight is NaN or infinite.
    """
    began = time.perf_counter()
    blocks = calibration_of(loaded, settings)
    scores: list[Score] = []
    ids = torch.from_numpy(blocks.ids).to(loaded.device)
    for context, done, total in _walk(loaded, ids):
        progress(done, total, f"layer {done + 1} of {total}")
        scores.extend(_score_block(context, settings))
    progress(loaded.info.layers, loaded.info.layers, "profiled")
    return Profile(
        id=key,
        fingerprint=loaded.info.fingerprint,
        settings=settings,
        matrices=loaded.info.matrices,
        values=_as_frame(scores),
        provenance={
            "corpus": blocks.corpus,
            "corpus_source": blocks.source,
            "corpus_sha256": blocks.sha256,
            "tokens": int(blocks.ids.size),
            "settings": asdict(settings),
            "device": loaded.device,
            "machine": machine(loaded.device),
            "dtype": loaded.dtype,
            "versions": versions(),
            "seconds": time.perf_counter() - began,
        },
    )


def calibration_of(loaded: LoadedModel, settings: ProfileSettings) -> TokenBlocks:
    """The calibration blocks, no longer than the model's context."""
    corpus = load_corpus(settings.calibration, "calibration")
    return calibration_blocks(
        corpus,
        loaded.tokenizer,
        samples=settings.samples,
        max_line_tokens=512,
        block_tokens=min(settings.block_tokens, loaded.info.context),
        seed=settings.seed,
    )


def _walk(loaded: LoadedModel, ids: Tensor) -> Iterator[tuple[BlockContext, int, int]]:
    """Each block in turn with the inputs that the full-precision blocks before it produce."""
    prefix, blocks = find_blocks(loaded.model)
    calls, hidden = record_calls(loaded, ids)
    for layer, block in enumerate(blocks):
        matrices = tuple(m for m in loaded.info.matrices if m.layer == layer)
        context = BlockContext(loaded, f"{prefix}.{layer}", block, matrices, hidden, calls[layer])
        if matrices:
            yield context, layer, len(blocks)
        hidden = list(context.run())


def _score_block(context: BlockContext, settings: ProfileSettings) -> Iterator[Score]:
    metrics = make_metrics()
    for matrix in context.matrices:
        check_finite(context.weight(matrix), matrix.name)
    for metric in metrics:
        yield from metric.once(context)
    for config in LADDER:
        quantized = _quantize_block(context, config, settings)
        for metric in metrics:
            yield from metric.at_config(context, config, quantized)


def _quantize_block(
    context: BlockContext, config: QuantConfig, settings: ProfileSettings
) -> dict[Matrix, Tensor]:
    """What each matrix becomes, float32, for those that the group size divides."""
    quantizer = get_quantizer(settings.quantizer)
    return {
        matrix: quantize_matrix(
            context.weight(matrix),
            config,
            quantizer,
            axis=settings.axis,
            metadata=settings.metadata,
            name=matrix.name,
        ).dequantize()
        for matrix in context.matrices
        if divides(matrix.numel, config.group_size)
    }


def _as_frame(scores: list[Score]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "module": [s.matrix.name for s in scores],
            "layer": [s.matrix.layer for s in scores],
            "type": [s.matrix.type for s in scores],
            "metric": [s.metric for s in scores],
            "config": [s.config.name if s.config else "" for s in scores],
            "part": [s.part for s in scores],
            "value": [s.value for s in scores],
        }
    )
