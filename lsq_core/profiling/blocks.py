"""Running a model block by block, from recorded calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from lsq_core.errors import InputError, exception_reason
from lsq_core.model.architecture import find_blocks
from lsq_core.model.loading import LoadedModel, last_logits
from lsq_core.profiling.replay import Call

#: Token sequences that run through a block at once.
BATCH = 8


class _StopForward(Exception):
    """Ends a forward pass that has shown what it was run for."""


# --- the walk ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class OutputForm:
    """How a block returns its hidden states: alone, or first of a tuple or list."""

    kind: type | None = None
    length: int = 1

    @classmethod
    def from_output(cls, output: object) -> OutputForm:
        """The form of what a block returned."""
        if isinstance(output, (tuple, list)):
            return cls(type(output), len(output))
        return cls()

    def around(self, states: Tensor) -> object:
        """Hidden states in this form, with nothing in the other places."""
        return states if self.kind is None else self.kind([states] + [None] * (self.length - 1))


def record_calls(loaded: LoadedModel, ids: Tensor) -> tuple[list[list[Call]], list[Tensor]]:
    """How each block is called for each batch, and the hidden states that enter the first one.

    ``ids`` is int64 (sequences, tokens). Blocks are passed through without computing and nothing
    runs after them, so this costs the embedding alone; each keeps its own masks and positions,
    which differ between the layers of some models.

    Raises
    ------
    InputError
        As :func:`detect_output_forms`.
    """
    forms = detect_output_forms(loaded, ids)
    calls: list[list[Call]] = [[] for _ in forms]
    hidden: list[Tensor] = []

    def record(layer: int, states: Tensor, args: tuple, kwargs: dict) -> object:
        if layer == 0:
            hidden.append(states)
        calls[layer].append(Call(args, kwargs))
        if layer + 1 == len(calls):
            raise _StopForward
        return forms[layer].around(states)

    with loaded.materialize_embeddings():
        for batch in ids.split(BATCH):
            _run_with_stubs(loaded, batch, record)
    return calls, hidden


def run_from_block(
    loaded: LoadedModel, layer: int, hidden: Tensor, ids: Tensor, forms: list[OutputForm]
) -> Tensor:
    """Logits (sequences, tokens, vocabulary), run from one block on.

    ``hidden`` is what enters block ``layer`` for the tokens ``ids`` (sequences, tokens); the
    blocks before it are passed by. With ``layer`` the number of blocks, only what comes after
    the last one runs. The model's own code does the rest, whatever its architecture.
    """

    def stub_output(layer: int, *_: object) -> object:
        return forms[layer].around(hidden)

    with _stubbed_blocks(loaded, layer, stub_output):
        return last_logits(loaded.model, ids, ids.shape[1])


def detect_output_forms(loaded: LoadedModel, ids: Tensor) -> list[OutputForm]:
    """In which form each block returns, seen by running one of each class on a few tokens.

    Raises
    ------
    InputError
        When the blocks can't be run one by one: more than hidden states goes from one to the
        next, or the model doesn't call all of them in order.
    """
    prefix, blocks = find_blocks(loaded.model)
    forms: dict[type, OutputForm] = {}
    #: What one block of each class returned, and what of it isn't hidden states.
    tails: dict[type, object] = {}
    extra_outputs: set[int] = set()

    def run(layer: int, states: Tensor, args: tuple, kwargs: dict) -> object:
        if any(id(value) in extra_outputs for value in (*args, *kwargs.values())):
            raise InputError(
                _not_sequential_message(loaded, "more than hidden states goes between them")
            )
        block = blocks[layer]
        kind = type(block)
        if kind not in forms:
            with loaded.materialize(f"{prefix}.{layer}"):
                output = kind.forward(block, states, *args, **kwargs)
            forms[kind] = OutputForm.from_output(output)
            tails[kind] = output
            if forms[kind].kind is not None:
                extra_outputs.update(id(value) for value in output[1:] if torch.is_tensor(value))
        if layer + 1 == len(blocks):
            raise _StopForward
        return _replace_states(tails.get(kind, states), states)

    with loaded.materialize_embeddings():
        try:
            _run_with_stubs(loaded, ids[:1, :8], run)
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {exception_reason(error)}"
            raise InputError(_not_sequential_message(loaded, reason)) from error
    if any(type(block) not in forms for block in blocks):
        raise InputError(_not_sequential_message(loaded, "text does not pass through all of them"))
    return [forms[type(block)] for block in blocks]


def _replace_states(output: object, states: Tensor) -> object:
    """What a block returned with other hidden states in it."""
    if isinstance(output, (tuple, list)):
        return type(output)([states, *output[1:]])
    return states


def _not_sequential_message(loaded: LoadedModel, reason: str) -> str:
    return (
        f"The decoder blocks of {type(loaded.model).__name__} cannot be run one by one ({reason}), "
        "so its sensitivity cannot be measured; kurtosis and weight error can."
    )


def _run_with_stubs(loaded: LoadedModel, ids: Tensor, output: Callable) -> None:
    """Run the model with ``output`` in place of every block, until that raises `_Reached`."""
    with suppress(_StopForward), _stubbed_blocks(loaded, len(loaded.blocks), output):
        last_logits(loaded.model, ids, 1)


@contextmanager
def _stubbed_blocks(
    loaded: LoadedModel, count: int, output: Callable[..., object]
) -> Iterator[None]:
    """Have ``output(layer, states, args, kwargs)`` give what the first blocks would."""

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
