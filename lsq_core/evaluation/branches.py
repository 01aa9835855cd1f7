"""Walk several models side by side, computing hidden states once while their blocks are the same.

The hidden states of a group of windows go through the first block of every model, then the second,
and so on. Each block's weights are decoded once for all windows. Models whose blocks so far share
every tensor (plans of one session share equal packed matrices) form one branch, whose states are
computed once until their blocks differ.
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
    """Hidden states (windows, tokens, features) of each batch, and the models that share them.

    ``members`` are the numbers of the models; ``calls`` are each block's calls for each batch.
    """

    members: tuple[int, ...]
    hidden: list[Tensor]
    calls: list[list[Call]]


class Walk:
    """The walk of a group of windows through several models.

    ``working_bytes`` is each model's peak GPU memory, above that allocated before, of decoding and
    running one block or head for one batch; None on a CPU.
    """

    def __init__(
        self,
        models: Sequence[WalkedModel],
        batches: Sequence[Tensor],
        report: Callable[[int, int], None],
        first: int = 0,
    ) -> None:
        """Compute the inputs of the first block.

        ``batches`` are token ids (windows, tokens); all models have the same number of blocks.
        ``report`` is called after each step with the batch's number and the number of models it
        advanced. Models before the ``first`` one are not walked; :meth:`add_states` adds theirs.
        """
        self.models, self.batches, self.report = models, batches, report
        #: Numbers of the walked models.
        self.members = range(first, len(models))
        self.layers = models[0].layers
        #: Number of blocks that all states have gone through.
        self.layer = 0
        self._seconds = np.zeros(len(models))
        #: On a GPU, members and the events around their work that have not been read yet.
        self._events: list[tuple[list[int], torch.cuda.Event, torch.cuda.Event]] = []
        self.working_bytes: list[int | None] = [None] * len(models)
        signatures = [models[member].stem_signature() for member in self.members]
        self.branches = [self._stem(own) for own in _alike(self.members, signatures)]

    def _stem(self, members: tuple[int, ...]) -> Branch:
        with self.measured(members):
            calls, hidden = self.models[members[0]].stem(self.batches)
        return Branch(members, hidden, calls)

    def restore(self, layer: int, branches: Sequence[Branch], seconds: Sequence[float]) -> None:
        """Continue from states that have gone through ``layer`` blocks."""
        self.layer, self.branches = layer, list(branches)
        self._seconds += seconds

    @property
    def seconds(self) -> np.ndarray:
        """Time (models,) of the work each model needed; shared work counts in full for each.

        On a GPU it is measured between events in the stream; reading it synchronizes.
        """
        if self._events:
            torch.cuda.synchronize(self.batches[0].device)
        for members, start, end in self._events:
            self._seconds[members] += start.elapsed_time(end) / 1000
        self._events.clear()
        return self._seconds

    def advance(self) -> None:
        """Run all states through the next block.

        A block shared by several branches is decoded once for all of them.
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
        # The branch of the first model, which may be the reference, stays first.
        self.branches = sorted(following.values(), key=lambda branch: branch.members)
        self.layer += 1

    @contextmanager
    def _decoded_block(self, members: tuple[int, ...]) -> Iterator[tuple[nn.Module, int]]:
        """Yield the given models' next block, and the GPU memory of its decoded weights."""
        before = self._allocated()
        with ExitStack() as stack:
            with self.measured(members):
                block = stack.enter_context(self.models[members[0]].block(self.layer))
            yield block, self._allocated() - before

    def _run_block(self, block: nn.Module, branch: Branch, decoded_bytes: int) -> None:
        """Run a block on a branch's states and replace them with its outputs."""
        hidden = branch.hidden
        for number, call in enumerate(branch.calls[self.layer]):
            with self.measured(branch.members, decoded_bytes):
                output = block(hidden[number], *call.args, **call.kwargs)
                hidden[number] = first_tensor(output)
                del output
            self.report(number, len(branch.members))

    def add_states(self, member: int, hidden: list[Tensor], seconds: float) -> None:
        """Add the final states of a model that wasn't walked, as the first branch.

        ``seconds`` is the time it took to compute them.
        """
        self.branches.insert(0, Branch((member,), hidden, []))
        self._seconds[member] += seconds

    @contextmanager
    def heads(self) -> Iterator[None]:
        """Hold the weights needed for the branches' logits in memory within a ``with`` block."""
        with ExitStack() as stack:
            for branch in self.branches:
                with self.measured(branch.members):
                    stack.enter_context(self.models[branch.members[0]].head())
            yield

    @contextmanager
    def measured(self, members: Sequence[int], held_bytes: int = 0) -> Iterator[None]:
        """Attribute the time and peak GPU memory of a ``with`` block to the given models.

        ``held_bytes`` is the memory already allocated for it. A GPU is not synchronized.
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
        """Return the GPU memory currently allocated in bytes, 0 on a CPU."""
        device = self.batches[0].device
        return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _alike(members: Sequence[int], signatures: Sequence[Hashable]) -> Iterator[tuple[int, ...]]:
    """Group models by signature, in order of each group's first member."""
    groups: dict[Hashable, list[int]] = {}
    for member, signature in zip(members, signatures, strict=True):
        groups.setdefault(signature, []).append(member)
    yield from map(tuple, groups.values())
