"""One decoder block and its calibration inputs, as the metrics see it.

Blocks are visited in order. What a block is called with besides the hidden states (masks,
positions) is recorded once; the hidden states flow from the full-precision block before it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lsq_core.architecture import find_blocks, first_of, get_weight, is_transposed, locate
from lsq_core.errors import InputError, reason_of
from lsq_core.load import LoadedModel, last_logits
from lsq_core.model import Matrix
from lsq_core.profile.replay import Call, Replay

#: Token sequences that run through a block at once.
BATCH = 8


class _Reached(Exception):
    """Ends a forward pass that has shown what it was run for."""


@dataclass(frozen=True)
class Part:
    """Matrices that the authors quantize together, and where the output is compared.

    ``container`` and ``output`` are module names inside the block ('' is the block itself).
    ``linear`` is a part of one linear module, compared at its own output.
    """

    name: str
    matrices: tuple[Matrix, ...]
    container: str
    output: str
    linear: bool = False

    @property
    def place(self) -> tuple[str, str]:
        """What is run again for it, and where the output is read."""
        return self.container, self.output


@dataclass(frozen=True, eq=False)
class Observed:
    """What one pass of a block over the calibration inputs shows."""

    #: ``H = XᵀX`` (in, in) in float32 and the number of tokens, by matrix. Modules that read the
    #: same input share one; an expert that no token reached has 0 tokens.
    grams: dict[Matrix, tuple[Tensor, int]]
    #: By :attr:`Part.place`, for parts that aren't linear.
    replays: dict[tuple[str, str], Replay]
    #: The hidden states that leave the block, a tensor a batch.
    following: list[Tensor]


@dataclass(eq=False)
class BlockContext:
    """A decoder block with its matrices and the calibration inputs that reach it."""

    loaded: LoadedModel
    layer: int
    prefix: str
    block: nn.Module
    matrices: tuple[Matrix, ...]
    #: The calibration tokens, int64 (sequences, tokens), of which ``hidden`` has batches.
    ids: Tensor
    hidden: list[Tensor] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    def weight(self, matrix: Matrix) -> Tensor:
        """The full-precision weight (out, in), a view."""
        return get_weight(self.loaded.model, matrix)

    def local(self, matrix: Matrix) -> str:
        """The name, inside the block, of the module that holds a matrix."""
        name = matrix.name.removeprefix(f"{self.prefix}.")
        return name if matrix.expert is None else name.rsplit(".", 2)[0]

    def run(self) -> Iterator[Tensor]:
        """The block's output for each calibration batch."""
        for hidden, call in zip(self.hidden, self.calls, strict=True):
            yield first_of(self.block(hidden, *call.args, **call.kwargs))

    @cached_property
    def observed(self) -> Observed:
        """Gram matrices, what is replayed and what the next block gets, of one pass."""
        collector = _GramCollector(self)
        replays = {
            part.place: Replay(*map(self.block.get_submodule, part.place))
            for part in self.parts
            if not part.linear
        }
        following = []
        with ExitStack() as stack:
            stack.enter_context(collector.watching())
            for replay in replays.values():
                stack.enter_context(replay.recording())
            for output in self.run():
                following.append(output)
                collector.end_batch()
        return Observed(collector.result(), replays, following)

    @cached_property
    def moments(self) -> dict[Matrix, tuple[Tensor, int]]:
        """The diagonal (in,) of each Gram matrix, and the number of tokens; no Gram is needed."""
        if "observed" in self.__dict__:
            return {m: (gram.diagonal(), n) for m, (gram, n) in self.observed.grams.items()}
        collector = _MomentCollector(self)
        with collector.watching():
            for _ in self.run():
                collector.end_batch()
        return collector.result()

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The authors' parts of this block, found from its structure (see :func:`find_parts`)."""
        return find_parts(self)

    @cached_property
    def units(self) -> list[tuple[Matrix, ...]]:
        """Matrices that are quantized together: those of a part, or each alone without inputs."""
        return [part.matrices for part in self.parts] if self.hidden else list(zip(self.matrices))

    @contextmanager
    def replaced(self, weights: dict[Matrix, Tensor]) -> Iterator[None]:
        """Put other weights in for a while; the original ones are put back, never read again."""
        with ExitStack() as stack:
            for matrix, weight in weights.items():
                stack.callback(self._replace(matrix, weight))
            yield

    def _replace(self, matrix: Matrix, weight: Tensor) -> Callable[[], None]:
        """Put one weight in; returns what puts the original one back."""
        holder, name = locate(self.loaded.model, matrix)
        before = getattr(holder, name)
        if matrix.expert is None:
            after = (weight.T if is_transposed(holder) else weight).to(before.dtype)
            setattr(holder, name, nn.Parameter(after, requires_grad=False))
            return lambda: setattr(holder, name, before)
        place = self.weight(matrix)
        kept = place.clone()
        place.copy_(weight)
        return lambda: place.copy_(kept)

    def advance(self) -> None:
        """Make the hidden states those that leave the block, for the block after it."""
        seen = self.__dict__.pop("observed", None)
        for batch, output in enumerate(seen.following if seen else self.run()):
            self.hidden[batch] = output


# --- Gram matrices ---------------------------------------------------------------------------


class _GramCollector:
    """Adds up XᵀX over everything that linear modules and experts of a block are given."""

    def __init__(self, context: BlockContext) -> None:
        self.context = context
        self.sums: dict[object, tuple[Tensor, int]] = {}
        #: Which sum belongs to a matrix; matrices that are fed the same tensor share one.
        self.key_of: dict[Matrix, object] = {}
        self.key_by_input: dict[int, object] = {}
        self.alive: list[Tensor] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        stacked = [m for m in self.context.matrices if m.expert is not None]
        with ExitStack() as stack:
            for matrix in self.context.matrices:
                if matrix.expert is None:
                    holder, _ = locate(self.context.loaded.model, matrix)
                    handle = holder.register_forward_pre_hook(self._hook(matrix))
                    stack.callback(handle.remove)
            if stacked:
                stack.enter_context(_ExpertWatcher(self, stacked))
            yield

    def _hook(self, matrix: Matrix) -> Callable:
        return lambda module, args: self.add(matrix, args[0])

    def add(self, matrix: Matrix, inputs: Tensor) -> None:
        """Count the inputs of one call, once however many matrices share them."""
        shared = self.key_by_input.get(id(inputs)) if matrix.expert is None else None
        if shared is not None:
            self.key_of[matrix] = shared
            return
        self.key_of[matrix] = matrix
        self.key_by_input[id(inputs)] = matrix
        self.alive.append(inputs)  # an id is only an identity while its object lives
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        before, tokens = self.sums.get(matrix, (None, 0))
        self.sums[matrix] = (self.sum(before, rows), tokens + len(rows))

    def sum(self, before: Tensor | None, rows: Tensor) -> Tensor:
        """What there was and what rows (n, in) add to it."""
        return rows.T @ rows if before is None else before.addmm_(rows.T, rows)

    def end_batch(self) -> None:
        self.key_by_input.clear()
        self.alive.clear()

    def result(self) -> dict[Matrix, tuple[Tensor, int]]:
        none = {}
        for matrix in self.context.matrices:
            if matrix not in self.key_of:
                device = self.context.weight(matrix).device
                size = matrix.in_features
                none[matrix] = (torch.zeros(size, size, device=device), 0)
        return none | {m: self.sums[key] for m, key in self.key_of.items()}


class _MomentCollector(_GramCollector):
    """Adds up the diagonals alone."""

    def sum(self, before: Tensor | None, rows: Tensor) -> Tensor:
        squares = rows.square().sum(0)
        return squares if before is None else before.add_(squares)


class _ExpertWatcher(TorchFunctionMode):
    """Sees what each expert of a stack is multiplied by.

    Experts are no modules: their module calls ``linear`` or a matrix product with a slice of the
    stacked parameter, which is known by where it lies in memory.
    """

    def __init__(self, collector: _GramCollector, matrices: list[Matrix]) -> None:
        super().__init__()
        self.collector = collector
        model = collector.context.loaded.model
        self.by_address = {get_weight(model, m).data_ptr(): m for m in matrices}

    def __torch_function__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if func in _PRODUCTS and len(args) >= 2 and torch.is_tensor(args[1]):
            matrix = self.by_address.get(args[1].data_ptr())
            if matrix is not None and args[0].shape[-1] == matrix.in_features:
                self.collector.add(matrix, args[0])
        return func(*args, **(kwargs or {}))


_PRODUCTS = {
    torch.nn.functional.linear,
    torch.matmul,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    torch.mm,
    torch.Tensor.mm,
}


# --- parts -----------------------------------------------------------------------------------


def find_parts(context: BlockContext) -> tuple[Part, ...]:
    """The parts of a block: in each container the last linear module is one, the others another.

    This gives the authors' four parts on a Llama - q, k, v against the attention's output, o,
    gate and up against the MLP's output, down - and their counterparts elsewhere, without a list
    of names: a container is what directly holds linear modules (a self-attention, an MLP, the
    block itself). Where several modules are last (experts), the output of the block's child
    around them is compared.
    """
    order = _execution_order(context)
    containers: dict[str, list[Matrix]] = {}
    for matrix in context.matrices:
        containers.setdefault(_container(context, matrix), []).append(matrix)
    names = _container_names(context, containers)
    parts = []
    for container, matrices in containers.items():
        last_type = max(matrices, key=lambda m: order.get(m.name, -1)).type
        last = tuple(m for m in matrices if m.type == last_type)
        before = tuple(m for m in matrices if m.type != last_type)
        single = len(last) == 1 and last[0].expert is None
        around = container if single or container == "" else container.split(".")[0]
        output = context.local(last[0]) if single else around
        first_name, last_name = names[container]
        if before:
            parts.append(Part(first_name, before, around, output))
        parts.append(Part(last_name, last, around, output, linear=single))
    return tuple(parts)


def _container(context: BlockContext, matrix: Matrix) -> str:
    """The module that directly holds a matrix's module, or the stack itself; without indices."""
    local = context.local(matrix)
    holder = local if matrix.expert is not None else local.rpartition(".")[0]
    return re.sub(r"\.\d+(?=\.|$)", "", holder)


def _container_names(context: BlockContext, containers: dict) -> dict[str, tuple[str, str]]:
    """The authors' part names for the first attention and the first MLP, paths for the rest."""
    names, taken = {}, set()
    for container in containers:
        kind = "attn" if "attn" in container or "attention" in container else "mlp"
        if kind in taken:
            names[container] = (f"{container or 'block'}_in", f"{container or 'block'}_out")
        else:
            standard = {"attn": ("attn_in", "attn_out"), "mlp": ("mlp_gate", "mlp_down")}
            names[container] = standard[kind]
        taken.add(kind)
    return names


def _execution_order(context: BlockContext) -> dict[str, int]:
    """When each matrix was first used, seen by running the first sequence through the block."""
    seen: dict[str, int] = {}

    class Order(_GramCollector):
        def add(self, matrix: Matrix, inputs: Tensor) -> None:
            seen.setdefault(matrix.name, len(seen))

    with Order(context).watching():
        call = context.calls[0]
        context.block(context.hidden[0], *call.args, **call.kwargs)
    return seen


# --- the walk ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class OutputForm:
    """How a block returns its hidden states: alone, or first of a tuple or list."""

    kind: type | None = None
    length: int = 1

    @classmethod
    def of(cls, output: object) -> OutputForm:
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
        As :func:`output_forms`.
    """
    forms = output_forms(loaded, ids)
    calls: list[list[Call]] = [[] for _ in forms]
    hidden: list[Tensor] = []

    def note(layer: int, states: Tensor, args: tuple, kwargs: dict) -> object:
        if layer == 0:
            hidden.append(states)
        calls[layer].append(Call(args, kwargs))
        if layer + 1 == len(calls):
            raise _Reached
        return forms[layer].around(states)

    with loaded.holding_entry():
        for batch in ids.split(BATCH):
            _run_to_the_end(loaded, batch, note)
    return calls, hidden


def resume(
    loaded: LoadedModel, layer: int, hidden: Tensor, ids: Tensor, forms: list[OutputForm]
) -> Tensor:
    """Logits (sequences, tokens, vocabulary), run from one block on.

    ``hidden`` is what enters block ``layer`` for the tokens ``ids`` (sequences, tokens); the
    blocks before it are passed by. With ``layer`` the number of blocks, only what comes after
    the last one runs. The model's own code does the rest, whatever its architecture.
    """

    def given(layer: int, *_: object) -> object:
        return forms[layer].around(hidden)

    with _in_place_of_blocks(loaded, layer, given):
        return last_logits(loaded.model, ids, ids.shape[1])


def output_forms(loaded: LoadedModel, ids: Tensor) -> list[OutputForm]:
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
    beside: set[int] = set()

    def run(layer: int, states: Tensor, args: tuple, kwargs: dict) -> object:
        if any(id(value) in beside for value in (*args, *kwargs.values())):
            raise InputError(_not_walkable(loaded, "more than hidden states goes between them"))
        block = blocks[layer]
        kind = type(block)
        if kind not in forms:
            with loaded.holding(f"{prefix}.{layer}"):
                output = kind.forward(block, states, *args, **kwargs)
            forms[kind] = OutputForm.of(output)
            tails[kind] = output
            if forms[kind].kind is not None:
                beside.update(id(value) for value in output[1:] if torch.is_tensor(value))
        if layer + 1 == len(blocks):
            raise _Reached
        return _with_states(tails.get(kind, states), states)

    with loaded.holding_entry():
        try:
            _run_to_the_end(loaded, ids[:1, :8], run)
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {reason_of(error)}"
            raise InputError(_not_walkable(loaded, reason)) from error
    if any(type(block) not in forms for block in blocks):
        raise InputError(_not_walkable(loaded, "text does not pass through all of them"))
    return [forms[type(block)] for block in blocks]


def _with_states(output: object, states: Tensor) -> object:
    """What a block returned with other hidden states in it."""
    if isinstance(output, (tuple, list)):
        return type(output)([states, *output[1:]])
    return states


def _not_walkable(loaded: LoadedModel, reason: str) -> str:
    return (
        f"The decoder blocks of {type(loaded.model).__name__} cannot be run one by one ({reason}), "
        "so its sensitivity cannot be measured; kurtosis and weight error can."
    )


def _run_to_the_end(loaded: LoadedModel, ids: Tensor, output: Callable) -> None:
    """Run the model with ``output`` in place of every block, until that raises `_Reached`."""
    with suppress(_Reached), _in_place_of_blocks(loaded, len(loaded.blocks), output):
        last_logits(loaded.model, ids, 1)


@contextmanager
def _in_place_of_blocks(
    loaded: LoadedModel, count: int, output: Callable[..., object]
) -> Iterator[None]:
    """Have ``output(layer, states, args, kwargs)`` give what the first blocks would."""

    def stand_in(layer: int) -> Callable:
        return lambda states, *args, **kwargs: output(layer, states, args, kwargs)

    blocks = loaded.blocks[:count]
    try:
        for layer, block in enumerate(blocks):
            block.forward = stand_in(layer)
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)
