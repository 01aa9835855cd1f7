"""Rerun one module of a block on the inputs recorded when the block ran."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lsq_core.model.architecture import first_tensor
from lsq_core.model.walk import Call


@dataclass(eq=False)
class Replay:
    """Recorded calls of ``container``, one per batch, and outputs of its module ``output``."""

    container: nn.Module
    output: nn.Module
    calls: list[Call] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record calls and outputs within a ``with`` block."""
        call_hook = self.container.register_forward_pre_hook(
            lambda module, args, kwargs: self.calls.append(Call(args, kwargs)), with_kwargs=True
        )
        try:
            with self._collecting_outputs(self.outputs):
                yield
        finally:
            call_hook.remove()

    def run(self) -> Iterator[Tensor]:
        """Yield the output for each batch with the current weights."""
        outputs_so_far: list[Tensor] = []
        with self._collecting_outputs(outputs_so_far):
            for call in self.calls:
                self.container(*call.args, **call.kwargs)
                yield outputs_so_far.pop()

    @contextmanager
    def _collecting_outputs(self, into: list[Tensor]) -> Iterator[None]:
        """Append the outputs of ``output`` to ``into``, one tensor per call of the container."""
        outputs_so_far: list[Tensor] = []

        def end(*_: object) -> None:
            into.append(_concatenate_outputs(outputs_so_far))
            outputs_so_far.clear()

        handles = [
            self.output.register_forward_hook(
                lambda module, args, output: outputs_so_far.append(first_tensor(output))
            ),
            self.container.register_forward_hook(end),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _concatenate_outputs(outputs: list[Tensor]) -> Tensor:
    """Return the outputs of one or more calls as one tensor."""
    if len(outputs) == 1:
        return outputs[0]
    return torch.cat([output.flatten() for output in outputs]) if outputs else torch.empty(0)
