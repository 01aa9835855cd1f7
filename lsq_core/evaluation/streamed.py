"""Quantize and evaluate plans with one block of the model in memory at a time."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from lsq_core.errors import InputError
from lsq_core.evaluation.perplexity import evaluate_walked, make_text_passes
from lsq_core.evaluation.protocol import EvaluationText
from lsq_core.evaluation.reference_states import ReferenceStates
from lsq_core.evaluation.result import EvaluationPair
from lsq_core.evaluation.walked import SequentialModel, detect_forms
from lsq_core.model.loading import LoadedModel
from lsq_core.progress import Progress, no_progress
from lsq_core.quantization.base import MatrixQuantizer
from lsq_core.quantization.cache import PackedMatrixCache
from lsq_core.quantization.task import QuantizationTask
from lsq_core.quantized.convert import quantize_block
from lsq_core.quantized.modules import decoded_weights, measured_bytes


@dataclass(frozen=True)
class StreamedEvaluation:
    """The evaluations of a plan and of full precision, and the bytes of the plan's matrices."""

    pair: EvaluationPair
    measured_bytes: int


@dataclass(frozen=True, eq=False)
class PlannedModel(SequentialModel):
    """A model whose blocks are quantized by a plan when reached, and discarded afterwards."""

    task: QuantizationTask
    quantizer: MatrixQuantizer
    #: Bytes of the packed matrices of each block so far, by its signature; shared by all plans.
    block_bytes: dict[Hashable, int]
    costly_blocks: ClassVar[bool] = True

    def signature(self, layer: int) -> Hashable:
        """Return :meth:`_plan_signature`, or full precision's signature if no matrix is planned."""
        return self._plan_signature(layer) or super().signature(layer)

    def _plan_signature(self, layer: int) -> Hashable:
        """Return the block's configurations, high-impact rows and quantizer, () if not planned."""
        own = {matrix: c for matrix, c in self.task.choice.items() if matrix.layer == layer}
        rows = [tuple(self.task.rows.get(matrix.name, ())) for matrix in own]
        grid = self.task.grid
        made_by = (type(self.quantizer), grid.axis, grid.metadata)
        return (*own.items(), *rows, made_by) if own else ()

    def measured_bytes(self) -> int:
        """Return the bytes of all packed matrices.

        Blocks quantized only by an earlier, killed process are quantized again to measure them.
        """
        signatures = [self._plan_signature(layer) for layer in range(self.layers)]
        for layer, signature in enumerate(signatures):
            if signature and signature not in self.block_bytes:
                with self.block(layer):
                    pass
        return sum(self.block_bytes[signature] for signature in signatures if signature)

    @contextmanager
    def block(self, layer: int) -> Iterator[nn.Module]:
        """See :class:`lsq_core.evaluation.walked.WalkedModel`."""
        with self.loaded.materialize(self.loaded.block_name(layer)):
            block = quantize_block(self.task, self.quantizer, layer)
            self.block_bytes[self._plan_signature(layer)] = measured_bytes(block)
            with decoded_weights(block):
                yield block


def _reference(loaded: LoadedModel) -> SequentialModel:
    device = torch.device(loaded.device)
    forms = detect_forms(loaded, device)
    return SequentialModel("The full-precision model", loaded, forms, device)


@torch.inference_mode()
def _walked(
    tasks: Sequence[QuantizationTask], quantizers: Sequence[MatrixQuantizer]
) -> list[SequentialModel]:
    """Return the full-precision model and those of the plans, all of the same loaded model.

    Matrices that several plans store identically are quantized once, within a cache of the size of
    the largest block.
    """
    reference = _reference(tasks[0].loaded)
    parts = reference.loaded, reference.forms, reference.device
    block_bytes: dict[Hashable, int] = {}
    sizes = (sum(p.nbytes for p in block.parameters()) for block in reference.loaded.blocks)
    cache = PackedMatrixCache(max(sizes) if len(tasks) > 1 else 0)
    plans = [
        PlannedModel("The model", *parts, replace(task, cache=cache), quantizer, block_bytes)
        for task, quantizer in zip(tasks, quantizers, strict=True)
    ]
    return [reference, *plans]


def evaluate_streamed(
    tasks: Sequence[QuantizationTask],
    quantizers: Sequence[MatrixQuantizer],
    texts: Sequence[EvaluationText],
    *,
    bos: int | None,
    progress: Progress = no_progress,
    checkpoints: Sequence[Sequence[Path | None]] | None = None,
    kept: Sequence[ReferenceStates] | None = None,
) -> Iterator[list[StreamedEvaluation]]:
    """Quantize a model by several plans and evaluate them with full precision, block by block.

    Besides the hidden states, only one block of the model, full-precision or quantized, is in
    memory; embeddings and LM head only while they run. A block is read and quantized once for each
    group of windows, which is as large as memory allows. ``tasks`` are for the same model, either
    streamed (:func:`lsq_core.model.streaming.open_streamed`) or fully loaded. The other parameters
    are those of :func:`lsq_core.evaluation.perplexity.evaluate_models`; here ``seconds`` includes
    reading and quantizing the blocks.

    Raises
    ------
    InputError
        If a quantizer doesn't quantize matrices separately, the blocks cannot be run one by one, or
        a text has a token without a row in the model's embedding.
    LsqError
        If a model's predictions or weights are not finite.
    """
    if not all(isinstance(quantizer, MatrixQuantizer) for quantizer in quantizers):
        raise InputError(
            "A quantizer that needs the whole model in memory cannot quantize it block by block; "
            "choose one that quantizes each matrix by itself, such as hqq or rtn."
        )
    text_passes = make_text_passes(tasks[0].loaded.model, len(tasks), texts, bos, checkpoints, kept)
    models = _walked(tasks, quantizers)
    found = evaluate_walked(lambda: (models, ""), text_passes, compared=True, progress=progress)
    for pairs in found:
        with torch.inference_mode():
            sizes = [model.measured_bytes() for model in models[1:]]
        yield [StreamedEvaluation(*parts) for parts in zip(pairs, sizes, strict=True)]


def evaluate_streamed_full(
    loaded: LoadedModel,
    texts: Sequence[EvaluationText],
    *,
    bos: int | None,
    progress: Progress = no_progress,
    checkpoints: Sequence[Sequence[Path | None]] | None = None,
    kept: Sequence[ReferenceStates] | None = None,
) -> Iterator[list[EvaluationPair]]:
    """Evaluate a full-precision model with one block in memory; see :func:`evaluate_streamed`."""

    @torch.inference_mode()
    def make_models() -> tuple[list[SequentialModel], str]:
        return [_reference(loaded)], ""

    text_passes = make_text_passes(loaded.model, 1, texts, bos, checkpoints, kept)
    return evaluate_walked(make_models, text_passes, compared=False, progress=progress)
