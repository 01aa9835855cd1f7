"""Activation sensitivity ([A] Eq. 10): how far an output moves when weights are quantized."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from lsq_core.config import LADDER, QuantConfig
from lsq_core.model import Matrix
from lsq_core.profile.base import Metric, Score
from lsq_core.profile.context import BlockContext, Part


def module_sensitivity(difference: Tensor, gram: Tensor, tokens: int) -> float:
    """``tr(ΔW·H·ΔWᵀ)/(T·d_out)``: the mean squared output change of one linear module, exactly.

    ``difference`` is (out, in), ``gram`` is ``XᵀX`` (in, in) over ``tokens`` tokens. NaN where no
    token reached the module (an expert that was never chosen).
    """
    if tokens == 0:
        return float("nan")
    difference = difference.to(gram.dtype)
    total = ((difference @ gram) * difference).sum()
    return float(total) / (tokens * difference.shape[0])


class ModuleSensitivity(Metric):
    """Eq. 10 literally: each linear module on its own, from one Gram matrix for all configs."""

    name = "sensitivity_module"
    needs_text = True
    configs = LADDER

    def at_config(
        self, context: BlockContext, config: QuantConfig, quantized: dict[Matrix, Tensor]
    ) -> Iterator[Score]:
        """One score for each matrix."""
        for matrix, weight in quantized.items():
            difference = context.weight(matrix).float() - weight
            value = module_sensitivity(difference, *context.grams[matrix])
            yield Score(matrix, self.name, config, value)


class PartSensitivity(Metric):
    """The authors' parts: weights quantized together, the output of their block compared."""

    name = "sensitivity"
    needs_text = True
    configs = LADDER

    def at_config(
        self, context: BlockContext, config: QuantConfig, quantized: dict[Matrix, Tensor]
    ) -> Iterator[Score]:
        """One score a part, shared by its matrices."""
        for part in context.parts:
            if any(m not in quantized for m in part.matrices):
                continue  # a group size that does not divide one of them
            value = _part_score(context, part, {m: quantized[m] for m in part.matrices})
            for matrix in part.matrices:
                yield Score(matrix, self.name, config, value, part.name)


def _part_score(context: BlockContext, part: Part, quantized: dict[Matrix, Tensor]) -> float:
    (first, *others) = part.matrices
    if not others and first.expert is None and context.local(first) == part.output:
        # A part of one linear module compared at its own output needs no second pass.
        difference = context.weight(first).float() - quantized[first]
        return module_sensitivity(difference, *context.grams[first])
    replay = _replay_of(context, part)
    total, count = 0.0, 0
    with context.replaced(quantized):
        for before, after in zip(replay.outputs, replay.run(), strict=True):
            total += float((after - before).double().square().sum())
            count += before.numel()
    return total / count


def _replay_of(context: BlockContext, part: Part) -> _Replay:
    """The recorded calls of a part's container, kept with the block they belong to."""
    kept = context.__dict__.setdefault("_replays", {})
    key = (part.container, part.output)
    if key not in kept:
        kept[key] = _Replay(context, part)
    return kept[key]


class _Replay:
    """Runs one module of a block again with the inputs it had, and reads one output inside it."""

    def __init__(self, context: BlockContext, part: Part) -> None:
        self.container: nn.Module = context.block.get_submodule(part.container)
        self.output: nn.Module = context.block.get_submodule(part.output)
        self.calls: list[tuple[tuple, dict]] = []
        handle = self.container.register_forward_pre_hook(
            lambda module, args, kwargs: self.calls.append((args, kwargs)), with_kwargs=True
        )
        try:
            for _ in context.run():
                pass
        finally:
            handle.remove()
        self.outputs = list(self.run())

    def run(self) -> Iterator[Tensor]:
        seen: list[Tensor] = []

        def keep(module: nn.Module, args: tuple, output: object) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output)

        handle = self.output.register_forward_hook(keep)
        try:
            for args, kwargs in self.calls:
                self.container(*args, **kwargs)
                yield seen.pop()
        finally:
            handle.remove()
