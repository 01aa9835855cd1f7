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
from torch import Tensor, nn

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

    ``working_bytes`` is the peak GPU memory, above that allocated
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
        self._seconds = np.zeros(len(models))
        #: On a GPU, members and events around their work that were not read yet.
        self._events: list[tuple[list[int], torch.cuda.Event, torch.cuda.Event]] = []
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
        self._seconds += seconds

    @property
    def seconds(self) -> np.ndarray:
        """The time (models,) of what each model needed; shared work counts for all that share it.

        On a GPU it is that between events in its queue; reading it waits for all work so far.
        """
        if self._events:
            torch.cuda.synchronize(self.batches[0].device)
        for members, start, end in self._events:
            self._seconds[members] += start.elapsed_time(end) / 1000
        self._events.clear()
        return self._seconds

    def advance(self) -> None:
        """Take all states through the next block.

        A block that several branches have in common is decoded once for them.
        """
        signatures = {m: self.models[m].signature(self.layer) for m in self.members}
        following: dict[tuple[int, ...], Branch] = {}
        left = {id(branch): set(branch.members) for branch in self.branches}
        with ExitStack() as stack:
            with self.measured(self.members):
                stack.enter_context(self.models[self.members[0]].weights(self.layer))
            for users in _alike(self.members, [signatures[m] for m in self.members]):
                with self._decoded_block(users) as (block, decoded_bytes):
                    for branch in self.branches:
                        own = tuple(m for m in branch.members if m in users)
                        if own:
                            left[id(branch)] -= set(own)
                            hidden = list(branch.hidden) if left[id(branch)] else branch.hidden
                            following[own] = Branch(own, hidden, branch.calls)
                            self._run_block(block, following[own], decoded_bytes)
        # The branch of the first model, which may be the reference, stays the first one.
        self.branches = sorted(following.values(), key=lambda branch: branch.members)
        self.layer += 1

    @contextmanager
    def _decoded_block(self, members: tuple[int, ...]) -> Iterator[tuple[nn.Module, int]]:
        """The next block as these models have it, and the GPU memory of its decoded weights."""
        before = self._allocated()
        with ExitStack() as stack:
            with self.measured(members):
                block = stack.enter_context(self.models[members[0]].block(self.layer))
            yield block, self._allocated() - before

    def _run_block(self, block: nn.Module, branch: Branch, decoded_bytes: int) -> None:
        """Run a block on a branch's states, in whose place its outputs come."""
        hidden = branch.hidden
        for number, call in enumerate(branch.calls[self.layer]):
            with self.measured(branch.members, decoded_bytes):
                output = block(hidden[number], *call.args, **call.kwargs)
                hidden[number] = first_tensor(output)
                del output
            self.report(number, len(branch.members))

    def add_states(self, member: int, hidden: list[Tensor], seconds: float) -> None:
        """Add the final states of a model that wasn't walked, in the first place.

        ``seconds`` are what walking it took when they were computed.
        """
        self.branches.insert(0, Branch((member,), hidden, []))
        self._seconds[member] += seconds

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

        ``held_bytes`` were allocated for it before. A GPU is not waited for.
        """
        device = self.batches[0].device
        if device.type != "cuda":
            start_time = time.perf_counter()
            yield
            self._seconds[list(members)] += time.perf_counter() - start_time
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before = self._allocated()
        torch.cuda.reset_peak_memory_stats(device)
        start.record(torch.cuda.current_stream(device))
        yield
        end.record(torch.cuda.current_stream(device))
        self._events.append((list(members), start, end))
        taken = torch.cuda.max_memory_allocated(device) - before + held_bytes
        for member in members:
            self.working_bytes[member] = max(taken, self.working_bytes[member] or 0)

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
