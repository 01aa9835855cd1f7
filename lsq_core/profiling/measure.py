"""Measure a profile: visit a loaded model's blocks in order and score every metric."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import groupby

import pandas as pd
import torch
from torch import Tensor

from lsq_core.bits import QuantConfig, is_divisible
from lsq_core.model.architecture import parameter_name
from lsq_core.model.info import Matrix, ModelInfo
from lsq_core.model.loading import LoadedModel
from lsq_core.model.walk import record_calls
from lsq_core.profiling.backward import iter_blocks_backward
from lsq_core.profiling.block import BATCH
from lsq_core.profiling.calibration import load_calibration
from lsq_core.profiling.context import BlockContext
from lsq_core.profiling.metrics import METRICS, default_metrics
from lsq_core.profiling.metrics.base import Metric, Score
from lsq_core.profiling.profile import Profile
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.progress import Progress, no_progress
from lsq_core.provenance import machine, versions
from lsq_core.quantization.checks import check_weights
from lsq_core.quantization.registry import (
    check_choice,
    get_quantizer,
    required_packages,
)

#: Weights to quantize at a time by device, summed over configurations: small matrices are quantized
#: at several configurations at once, since launching the work takes longer than the work itself;
#: large ones at one after another.
_MAX_BATCH_WEIGHTS = {"cpu": 2**22, "cuda": 2**26}


def make_metrics(names: Sequence[str]) -> list[Metric]:
    """Create the named metrics, in the order of the registry."""
    return [metric() for name, metric in METRICS.items() if name in names]


@torch.no_grad()
def measure_profile(
    loaded: LoadedModel,
    settings: ProfileSettings,
    key: str,
    progress: Progress = no_progress,
    metrics: Sequence[str] | None = None,
    layers: Collection[int] | None = None,
) -> Profile:
    """Measure metrics, None for the default ones, on every matrix of a loaded model.

    With ``layers``, only these layers are scored, with the same scores as in a full profile. It
    cannot be combined with metrics that need gradients.

    Raises
    ------
    InputError
        If the quantizer cannot run here or does not support the axis, or the calibration corpus
        cannot be loaded or is too short.
    LsqError
        If a weight is NaN or infinite.
    """
    start_time = time.perf_counter()
    check_choice(settings.quantizer, {}, settings.axis)
    blocks = load_calibration(loaded, settings.text)
    metric_objects = make_metrics(default_metrics() if metrics is None else metrics)
    ids = torch.from_numpy(blocks.ids).to(loaded.device)[: _max_sequences(metric_objects)]
    scores: list[Score] = []
    layers = range(loaded.info.layers) if layers is None else layers
    done, total = 0, _effort(metric_objects, loaded.info, settings, layers)
    for context, active in _walk(loaded, ids, metric_objects, layers):
        layer = f"layer {context.layer + 1} of {loaded.info.layers}"
        progress(min(done, total), total, layer)
        of_block: list[Score] = []
        for metric, score in _score_block(context, settings, active):
            of_block.append(score)
            done += metric.effort(context.layer, loaded.info.layers)
            progress(min(done, total), total, f"{layer}, {score.matrix.type}")
        scores += _read_values(of_block)
    progress(total, total, "profiled")
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
            "tokens": ids.numel(),
            "definitions": {m.name: m.definition for m in metric_objects if m.definition},
            "settings": settings.to_json(),
            "device": loaded.device,
            "machine": machine(loaded.device),
            "dtype": loaded.dtype,
            "streamed": loaded.streamed,
            "versions": versions(*required_packages([settings.quantizer])),
            "seconds": time.perf_counter() - start_time,
        },
    )


def _max_sequences(metrics: list[Metric]) -> int | None:
    """Return the number of calibration blocks that the metrics read; None for all."""
    wanted = [metric.sequences for metric in metrics]
    return None if None in wanted else max(wanted)


def _effort(
    metrics: list[Metric], info: ModelInfo, settings: ProfileSettings, layers: Collection[int]
) -> int:
    """Return an upper bound on the total effort: some group sizes do not divide a matrix."""
    return sum(
        metric.effort(matrix.layer, info.layers)
        * max(sum(config in metric.configs for config in settings.configs), 1)
        for metric in metrics
        for matrix in info.matrices
        if matrix.layer in layers
    )


def _walk(
    loaded: LoadedModel, ids: Tensor, metrics: list[Metric], layers: Collection[int]
) -> Iterator[tuple[BlockContext, list[Metric]]]:
    """Yield each block with the metrics to score it by: in a forward, then in a backward walk.

    Tensors are created under ``no_grad`` rather than in inference mode, which rules out gradients.
    """
    forward = [metric for metric in metrics if not metric.needs_gradients]
    backward = [metric for metric in metrics if metric.needs_gradients]
    if forward:
        for context in _walk_forward(loaded, ids, forward, layers):
            yield context, forward
    if backward:
        for context in iter_blocks_backward(loaded, ids):
            yield context, backward


def _walk_forward(
    loaded: LoadedModel, ids: Tensor, metrics: list[Metric], layers: Collection[int]
) -> Iterator[BlockContext]:
    """Yield the blocks of the given layers; a walk over text also runs the layers before them."""
    if not any(metric.needs_calibration for metric in metrics):
        yield from _iter_weights_only(loaded, ids, layers)
        return
    for number, context in enumerate(iter_blocks(loaded, ids)):
        if number == 0:
            for metric in metrics:
                metric.prepare(context)
        if context.layer > max(layers):
            return
        if context.layer in layers:
            yield context


def iter_blocks(loaded: LoadedModel, ids: Tensor) -> Iterator[BlockContext]:
    """Yield each block with its inputs, computed by the full-precision blocks before it."""
    calls, hidden = record_calls(loaded, ids.split(BATCH))
    for layer, block in enumerate(loaded.blocks):
        matrices = tuple(m for m in loaded.info.matrices if m.layer == layer)
        name = loaded.block_name(layer)
        context = BlockContext(loaded, layer, name, block, matrices, ids, hidden, calls[layer])
        with loaded.materialize(name):
            if matrices:
                yield context
            if layer + 1 < len(loaded.blocks):
                context.advance()


def _iter_weights_only(
    loaded: LoadedModel, ids: Tensor, layers: Collection[int]
) -> Iterator[BlockContext]:
    """Yield a context without inputs per parameter, for metrics that need no calibration text."""
    chosen = [matrix for matrix in loaded.info.matrices if matrix.layer in layers]
    for name, found in groupby(chosen, parameter_name):
        matrices = tuple(found)
        layer = matrices[0].layer
        with loaded.materialize(name):
            block = loaded.blocks[layer]
            yield BlockContext(loaded, layer, loaded.block_name(layer), block, matrices, ids)


def _score_block(
    context: BlockContext, settings: ProfileSettings, metrics: list[Metric]
) -> Iterator[tuple[Metric, Score]]:
    """Yield the scores of a block. Values stay on its device, so that nothing waits for them."""
    read = {config for metric in metrics for config in metric.configs}
    configs = [c for c in settings.configs if c in read]
    weights = {matrix.name: context.weight(matrix) for matrix in context.matrices}
    check_weights(weights, configs, settings.axis)
    for metric in metrics:
        for score in metric.score_unquantized(context):
            yield metric, score
    for unit in context.units if configs else []:
        for own in _batches(configs, sum(m.numel for m in unit), context.ids.device.type):
            quantized = _quantize(context, unit, own, settings)
            for metric in metrics:
                if not set(metric.configs).isdisjoint(own):
                    for score in metric.score_at_configs(context, own, quantized):
                        yield metric, score
    for metric in metrics:
        for score in metric.score_block(context):
            yield metric, score


def _batches(
    configs: Sequence[QuantConfig], weights: int, device: str
) -> Iterator[list[QuantConfig]]:
    """Yield lists of configurations to quantize together, each list with a single group size.

    ``weights`` is the number of weights to quantize per configuration.
    """
    most = max(_MAX_BATCH_WEIGHTS[device] // weights, 1)
    for size in dict.fromkeys(config.group_size for config in configs):
        alike = [config for config in configs if config.group_size == size]
        for start in range(0, len(alike), most):
            yield alike[start : start + most]


def _quantize(
    context: BlockContext,
    unit: Sequence[Matrix],
    configs: Sequence[QuantConfig],
    settings: ProfileSettings,
) -> dict[Matrix, Tensor]:
    """Return dequantized weights, float32 (configs, out, in), where the group size divides."""
    quantizer = get_quantizer(settings.quantizer)
    return {
        matrix: quantizer.round_trips(
            context.weight(matrix).float(), configs, settings.axis, settings.metadata
        )
        for matrix in unit
        if is_divisible(matrix.numel, configs[0].group_size)
    }


def _read_values(scores: Sequence[Score]) -> list[Score]:
    """Convert tensor values of scores to numbers, in one transfer from the device."""
    tensors = [score.value.double() for score in scores if torch.is_tensor(score.value)]
    found = iter(torch.stack(tensors).tolist() if tensors else [])
    return [
        replace(score, value=next(found)) if torch.is_tensor(score.value) else score
        for score in scores
    ]


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
