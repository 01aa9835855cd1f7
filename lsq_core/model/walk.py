"""Walk a model block by block: record calls, and run the model's own forward around its blocks.

Blocks are replaced by stubs while the model's own forward runs, so everything before the first
block (embeddings, masks, positions) and after the last one (final norm, LM head, soft-capping) is
computed by the model itself, and any architecture whose blocks run in sequence can be walked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lsq_core.errors import InputError, exception_reason
from lsq_core.model.loading import BlockModel, last_logits

#: Tokens of the input used to detect how blocks return their hidden states.
_DETECTION_TOKENS = 8
#: The most tensors of one shape and dtype that an argument is compared with, to share equal ones.
#: Masks and positions have few values per shape; arguments that depend on the tokens never recur.
_MAX_COMPARED = 8


class _StopForward(Exception):
    """Ends a forward pass once the calls have been recorded."""


class NotSequential(InputError):
    """The blocks of a model cannot be run one by one; ``reason`` says why."""

    def __init__(self, model: object, reason: str) -> None:
        self.reason = (
            f"the decoder blocks of {type(model).__name__} cannot be run one by one ({reason})"
        )
        super().__init__(
            f"T{self.reason[1:]}, so its sensitivity cannot be measured; kurtosis and weight error "
            "can."
        )


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of a module for one batch (of a block: those besides the hidden states)."""

    args: tuple
    kwargs: dict


@dataclass(frozen=True)
class OutputForm:
    """How a block returns its hidden states: alone, or as the first of a tuple or list."""

    kind: type | None = None
    length: int = 1

    @classmethod
    def from_output(cls, output: object) -> OutputForm:
        """Return the form of a block's output."""
        if isinstance(output, (tuple, list)):
            return cls(type(output), len(output))
        return cls()

    def around(self, states: Tensor) -> object:
        """Return hidden states in this form, with None for the other values."""
        return states if self.kind is None else self.kind([states] + [None] * (self.length - 1))


# --- recorded calls --------------------------------------------------------------------------


class _SharedTensors:
    """Tensors among the recorded arguments; equal ones are stored once."""

    def __init__(self) -> None:
        self._kept: dict[tuple, list[Tensor]] = {}
        #: By id, each tensor seen in the current batch and the equal one stored instead.
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}

    def start_batch(self) -> None:
        """Forget the ids of the previous batch's tensors."""
        self._seen.clear()

    def share(self, value: object) -> object:
        """Return an argument with its tensors replaced by equal ones already stored, if any."""
        if isinstance(value, Tensor):
            return self._share_tensor(value)
        if type(value) in (tuple, list):
            return type(value)(self.share(item) for item in value)
        if type(value) is dict:
            return {name: self.share(item) for name, item in value.items()}
        return value

    def _share_tensor(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._seen:
            kept = self._kept.setdefault((tensor.shape, tensor.dtype), [])
            equal = next((known for known in kept if torch.equal(known, tensor)), None)
            if equal is None and len(kept) < _MAX_COMPARED:
                kept.append(tensor)
            self._seen[id(tensor)] = tensor, tensor if equal is None else equal
        return self._seen[id(tensor)][1]


def record_calls(
    loaded: BlockModel, batches: Sequence[Tensor], forms: Sequence[OutputForm] | None = None
) -> tuple[list[list[Call]], list[Tensor]]:
    """Record the arguments of each block for each batch, and the hidden states of the first one.

    ``batches`` are int64 (sequences, tokens). Blocks are replaced by stubs and nothing runs after
    them, so only the embedding is computed. Masks and positions are recorded for each block, since
    they differ between the layers of some models; equal ones, of other blocks or batches, are
    stored once. ``forms`` are those of :func:`detect_output_forms`, None to detect them.

    Raises
    ------
    NotSequential
        See :func:`detect_output_forms`.
    """
    forms = detect_output_forms(loaded, batches[0]) if forms is None else forms
    calls: list[list[Call]] = [[] for _ in forms]
    hidden: list[Tensor] = []
    shared = _SharedTensors()

    def record(layer: int, states: Tensor, args: tuple, kwargs: dict) -> object:
        if layer == 0:
            hidden.append(states)
        calls[layer].append(Call(shared.share(args), shared.share(kwargs)))
        if layer + 1 == len(calls):
            raise _StopForward
        return forms[layer].around(states)

    with loaded.materialize_embeddings():
        for batch in batches:
            shared.start_batch()
            _run_with_stubs(loaded, batch, record)
    return calls, hidden


def run_from_block(
    loaded: BlockModel, layer: int, hidden: Tensor, ids: Tensor, forms: Sequence[OutputForm]
) -> Tensor:
    """Return logits (sequences, tokens, vocabulary), starting from the inputs of one block.

    ``hidden`` are the inputs of block ``layer`` for the tokens ``ids`` (sequences, tokens); the
    blocks before it are skipped. If ``layer`` is the number of blocks, only the final norm and the
    LM head run. The rest is the model's own forward pass, so any architecture works.
    """

    def stub_output(layer: int, *_: object) -> object:
        return forms[layer].around(hidden)

    with _stubbed_blocks(loaded, layer, stub_output):
        return last_logits(loaded.model, ids, ids.shape[1])


def head_inputs_from_block(
    loaded: BlockModel, layer: int, hidden: Tensor, ids: Tensor, forms: Sequence[OutputForm]
) -> Tensor:
    """Return the LM head's inputs in :func:`run_from_block` (sequences, tokens, width)."""
    found: list[Tensor] = []

    def stop(module: nn.Module, args: tuple) -> None:
        found.append(args[0])
        raise _StopForward

    handle = loaded.model.get_output_embeddings().register_forward_pre_hook(stop)
    try:
        with suppress(_StopForward):
            run_from_block(loaded, layer, hidden, ids, forms)
    finally:
        handle.remove()
    return found[0]


# --- whether blocks run in sequence ----------------------------------------------------------


def detect_output_forms(loaded: BlockModel, ids: Tensor) -> list[OutputForm]:
    """Detect the output form of each block by running one of each class on a few tokens.

    Raises
    ------
    NotSequential
        If the blocks can't be run one by one: a block receives more than hidden states from an
        earlier one, hidden states are changed between blocks or in place by one, the model calls
        no block of some class, or the trial run fails.
    """
    detection = _FormDetection(loaded)
    with loaded.materialize_embeddings():
        try:
            _run_with_stubs(loaded, ids[:1, :_DETECTION_TOKENS], detection.run)
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {exception_reason(error)}"
            raise NotSequential(loaded.model, reason) from error
    if any(type(block) not in detection.forms for block in loaded.blocks):
        raise NotSequential(loaded.model, "the model does not call all of them")
    return [detection.forms[type(block)] for block in loaded.blocks]


class _FormDetection:
    """Runs the first block of each class and records its output form; :meth:`run` is the stub."""

    def __init__(self, loaded: BlockModel) -> None:
        self.loaded = loaded
        self.forms: dict[type, OutputForm] = {}
        #: The output of one block of each class, and the ids of its tensors besides hidden states.
        self.tails: dict[type, object] = {}
        self.extra_outputs: set[int] = set()
        #: A copy of the first block's inputs, which every stub passes on.
        self.expected: Tensor | None = None

    def run(self, layer: int, states: Tensor, args: tuple, kwargs: dict) -> object:
        """Run a block if it is the first of its class; pass the first block's inputs on."""
        if any(id(value) in self.extra_outputs for value in (*args, *kwargs.values())):
            raise NotSequential(self.loaded.model, "more than hidden states is passed between them")
        self._check_unchanged(states, "hidden states are changed between them")
        block = self.loaded.blocks[layer]
        kind = type(block)
        if kind not in self.forms:
            with self.loaded.materialize(self.loaded.block_name(layer)):
                output = kind.forward(block, states, *args, **kwargs)
            self._check_unchanged(states, "one changes its inputs in place")
            self.forms[kind] = OutputForm.from_output(output)
            self.tails[kind] = output
            if self.forms[kind].kind is not None:
                self.extra_outputs.update(id(v) for v in output[1:] if torch.is_tensor(v))
        if layer + 1 == len(self.loaded.blocks):
            raise _StopForward
        return _replace_states(self.tails[kind], states)

    def _check_unchanged(self, states: Tensor, reason: str) -> None:
        if self.expected is None:
            self.expected = states.clone()
        same = states.shape == self.expected.shape and bool(
            torch.isclose(states, self.expected, rtol=0, atol=0, equal_nan=True).all()
        )
        if not same:
            raise NotSequential(self.loaded.model, reason)


def _replace_states(output: object, states: Tensor) -> object:
    """Return a block's output with its hidden states replaced."""
    if isinstance(output, (tuple, list)):
        return type(output)([states, *output[1:]])
    return states


def _run_with_stubs(loaded: BlockModel, ids: Tensor, output: Callable) -> None:
    """Run the model with ``output`` in place of every block, until it raises `_StopForward`."""
    with suppress(_StopForward), _stubbed_blocks(loaded, len(loaded.blocks), output):
        last_logits(loaded.model, ids, 1)


@contextmanager
def _stubbed_blocks(
    loaded: BlockModel, count: int, output: Callable[..., object]
) -> Iterator[None]:
    """Replace the forward of the first blocks by ``output(layer, states, args, kwargs)``."""

    def make_stub(layer: int) -> Callable:
        return lambda states, *args, **kwargs: output(layer, states, args, kwargs)

    blocks = loaded.blocks[:count]
    try:
        for layer, block in enumerate(blocks):
            block.forward = make_stub(layer)
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)
