"""Several models walked side by side: models that agree so far have their hidden states in common.

Hidden states of a group of windows go through the first block of every model, then through the
second one, and so on. Each block's weights are decoded once for all windows. Models whose blocks
up to here share every tensor (plans of one session share the packed matrices that they have in
common) are one branch: their states are computed once, until their blocks differ.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lsq_core.evaluation.walked import WalkedModel
from lsq_core.model.architecture import first_tensor
from lsq_core.model.walk import Call


@dataclass(frozen=True, eq=False)
class Branch:
    """Hidden states (windows, tokens, features) of each batch, and the models that have them.

    ``members`` are numbers of models; ``calls`` are those of each block for each batch.
    """

    members: tuple[int, ...]
    hidden: list[Tensor]
    calls: list[list[Call]]


class Walk:
    """The way of a group of windows through several models.

    ``seconds`` (models,) is the wall-clock time of what a model needed, so shared work counts for
    each model that shares it. ``working_bytes`` is the peak GPU memory, above that allocated
    before, of decoding and running one block or head for one batch; None on a CPU.
    """

    def __init__(
        self,
        models: Sequence[WalkedModel],
        batches: Sequence[Tensor],
        report: Callable[[int, int], None],
        first: int = 0,
    ) -> None:
        """``batches`` are token ids (windows, tokens); all models are walked in the same way.

        ``report`` is called with the number of a batch and of models for which it went on. Models
        before the ``first`` one are not walked; their states come by :meth:`add_states`.
        """
        self.models, self.batches, self.report = models, batches, report
        #: Numbers of the models that are walked.
        self.members = range(first, len(models))
        self.layers = models[0].layers
        #: Blocks that all states have gone through.
        self.layer = 0
        self.seconds = np.zeros(len(models))
        self.working_bytes: list[int | None] = [None] * len(models)
        signatures = [models[member].stem_signature() for member in self.members]
        self.branches = [self._stem(own) for own in _alike(self.members, signatures)]

    def _stem(self, members: tuple[int, ...]) -> Branch:
        with self.measured(members):
            calls, hidden = self.models[members[0]].stem(self.batches)
        return Branch(members, hidden, calls)

    def restore(self, layer: int, branches: Sequence[Branch], seconds: Sequence[float]) -> None:
        """Go on from states that have gone through ``layer`` blocks."""
        self.layer, self.branches = layer, list(branches)
        self.seconds += seconds

    def advance(self) -> None:
        """Take all states through the next block."""
        following = []
        with ExitStack() as stack:
            with self.measured(self.members):
                stack.enter_context(self.models[self.members[0]].weights(self.layer))
            for branch in self.branches:
                signatures = [self.models[m].signature(self.layer) for m in branch.members]
                parts = list(_alike(branch.members, signatures))
                following += [self._run_block(branch, own, last=own is parts[-1]) for own in parts]
        self.branches, self.layer = following, self.layer + 1

    def _run_block(self, branch: Branch, members: tuple[int, ...], last: bool) -> Branch:
        """Run a block on a branch's states, in whose place the outputs come with the ``last``."""
        hidden = branch.hidden if last else list(branch.hidden)
        before = self._allocated()
        with ExitStack() as stack:
            with self.measured(members):
                block = stack.enter_context(self.models[members[0]].block(self.layer))
            decoded_bytes = self._allocated() - before
            for number, call in enumerate(branch.calls[self.layer]):
                with self.measured(members, decoded_bytes):
                    output = block(hidden[number], *call.args, **call.kwargs)
                    hidden[number] = first_tensor(output)
                    del output
                self.report(number, len(members))
        return Branch(members, hidden, branch.calls)

    def add_states(self, member: int, hidden: list[Tensor], seconds: float) -> None:
        """Add the final states of a model that wasn't walked, in the first place.

        ``seconds`` are what walking it took when they were computed.
        """
        self.branches.insert(0, Branch((member,), hidden, []))
        self.seconds[member] += seconds

    @contextmanager
    def heads(self) -> Iterator[None]:
        """Have what the branches' logits need in memory within a ``with`` block."""
        with ExitStack() as stack:
            for branch in self.branches:
                with self.measured(branch.members):
                    stack.enter_context(self.models[branch.members[0]].head())
            yield

    @contextmanager
    def measured(self, members: Sequence[int], held_bytes: int = 0) -> Iterator[None]:
        """Count the time and peak GPU memory of a ``with`` block for some models.

        ``held_bytes`` were allocated for it before.
        """
        device = self.batches[0].device
        start_time, before = time.perf_counter(), self._allocated()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            taken = torch.cuda.max_memory_allocated(device) - before + held_bytes
            for member in members:
                self.working_bytes[member] = max(taken, self.working_bytes[member] or 0)
        self.seconds[list(members)] += time.perf_counter() - start_time

    def _allocated(self) -> int:
        """GPU memory that is allocated now, in bytes; 0 on a CPU."""
        device = self.batches[0].device
        return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _alike(members: Sequence[int], signatures: Sequence[Hashable]) -> Iterator[tuple[int, ...]]:
    """Group models by their signatures, in the order of each group's first."""
    groups: dict[Hashable, list[int]] = {}
    for member, signature in zip(members, signatures, strict=True):
        groups.setdefault(signature, []).append(member)
    yield from map(tuple, groups.values())
