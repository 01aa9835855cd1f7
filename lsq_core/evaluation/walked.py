"""Models as they are walked in an evaluation: block by block, or as a whole."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from lsq_core.evaluation.finite import watch_finite
from lsq_core.model.architecture import first_tensor
from lsq_core.model.loading import BlockModel, last_logits
from lsq_core.model.walk import (
    Call,
    NotSequential,
    OutputForm,
    detect_output_forms,
    record_calls,
    run_from_block,
)
from lsq_core.quantized.modules import decoded_weights

#: A token id that every vocabulary has, for detecting the form of the blocks' outputs.
_ANY_TOKEN = 0


class WalkedModel(Protocol):
    """A model whose hidden states are computed block by block.

    Signatures are equal for modules that compute the same function: those that share all tensors.
    """

    #: The model's name in error messages.
    what: str
    model: nn.Module
    device: torch.device
    #: Number of blocks that are run one by one.
    layers: int
    #: Whether logits can be computed for only some tokens of a window.
    splits_tokens: bool
    #: Whether a block is read or quantized again each time it is used.
    costly_blocks: bool

    def stem_signature(self) -> Hashable:
        """Return the signature of everything outside the blocks."""

    def signature(self, layer: int) -> Hashable:
        """Return the signature of a block."""

    def stem(self, batches: Sequence[Tensor]) -> tuple[list[list[Call]], list[Tensor]]:
        """Return each block's calls for each batch (windows, tokens), and the first's inputs."""

    def weights(self, layer: int) -> AbstractContextManager:
        """Hold a block's stored weights in memory, for all models, within a ``with`` block."""

    def block(self, layer: int) -> AbstractContextManager[nn.Module]:
        """Provide a block with decoded weights within a ``with`` block."""

    def head(self) -> AbstractContextManager:
        """Hold the weights that :meth:`logits` needs in memory within a ``with`` block."""

    def logits(self, states: Tensor, ids: Tensor, tokens: slice) -> Tensor:
        """Return logits (windows, slice's tokens, vocabulary) from the last block's outputs."""

    def first_not_finite(self, ids: Tensor) -> str:
        """Return the first module whose output for ids (windows, tokens) isn't finite, or ''."""


@dataclass(frozen=True, eq=False)
class SequentialModel:
    """A model whose blocks are run one by one."""

    what: str
    loaded: BlockModel
    forms: Sequence[OutputForm]
    device: torch.device
    splits_tokens: ClassVar[bool] = True

    @property
    def costly_blocks(self) -> bool:
        """See :class:`WalkedModel`."""
        return getattr(self.loaded, "streamed", False)

    @property
    def model(self) -> nn.Module:
        """The full model."""
        return self.loaded.model

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return len(self.forms)

    def stem_signature(self) -> Hashable:
        """See :class:`WalkedModel`."""
        return _signature(self.model, without=self.loaded.blocks)

    def signature(self, layer: int) -> Hashable:
        """See :class:`WalkedModel`."""
        return _signature(self.loaded.blocks[layer])

    def stem(self, batches: Sequence[Tensor]) -> tuple[list[list[Call]], list[Tensor]]:
        """See :class:`WalkedModel`."""
        return record_calls(self.loaded, batches, self.forms)

    def weights(self, layer: int) -> AbstractContextManager:
        """See :class:`WalkedModel`."""
        return self.loaded.materialize(self.loaded.block_name(layer))

    @contextmanager
    def block(self, layer: int) -> Iterator[nn.Module]:
        """See :class:`WalkedModel`."""
        block = self.loaded.blocks[layer]
        with self.loaded.materialize(self.loaded.block_name(layer)), decoded_weights(block):
            yield block

    def head(self) -> AbstractContextManager:
        """See :class:`WalkedModel`."""
        return self.loaded.materialize_head()

    def logits(self, states: Tensor, ids: Tensor, tokens: slice) -> Tensor:
        """See :class:`WalkedModel`; the final norm and the LM head run only on these tokens."""
        return run_from_block(
            self.loaded, self.layers, states[:, tokens], ids[:, tokens], self.forms
        )

    def first_not_finite(self, ids: Tensor) -> str:
        """See :class:`WalkedModel`."""
        with watch_finite(self.model) as found:
            calls, [states] = self.stem([ids])
        for layer, [call] in enumerate(calls):
            if found:
                break
            name = self.loaded.block_name(layer)
            with self.block(layer) as block, watch_finite(block, name) as found:
                states = first_tensor(block(states, *call.args, **call.kwargs))
        if not found:
            with self.head(), watch_finite(self.model) as found:
                self.logits(states, ids, slice(0, ids.shape[1]))
        return found[0] if found else ""


@dataclass(frozen=True, eq=False)
class WholeModel:
    """A model whose blocks cannot be run one by one: :meth:`logits` runs the entire model.

    Its hidden states are the token ids themselves. Weights are decoded in each forward pass.
    """

    what: str
    model: nn.Module
    device: torch.device
    layers: ClassVar[int] = 0
    splits_tokens: ClassVar[bool] = False
    costly_blocks: ClassVar[bool] = False

    def stem_signature(self) -> Hashable:
        """See :class:`WalkedModel`."""
        return _signature(self.model)

    def signature(self, layer: int) -> Hashable:
        """See :class:`WalkedModel`; there are no blocks."""
        raise IndexError(layer)

    def stem(self, batches: Sequence[Tensor]) -> tuple[list[list[Call]], list[Tensor]]:
        """See :class:`WalkedModel`."""
        return [], list(batches)

    def weights(self, layer: int) -> AbstractContextManager:
        """See :class:`WalkedModel`; there are no blocks."""
        raise IndexError(layer)

    def block(self, layer: int) -> AbstractContextManager[nn.Module]:
        """See :class:`WalkedModel`; there are no blocks."""
        raise IndexError(layer)

    def head(self) -> AbstractContextManager:
        """See :class:`WalkedModel`."""
        return nullcontext()

    def logits(self, states: Tensor, ids: Tensor, tokens: slice) -> Tensor:
        """See :class:`WalkedModel`."""
        kept = last_logits(self.model, ids, ids.shape[1] - tokens.start)
        return kept[:, : tokens.stop - tokens.start]

    def first_not_finite(self, ids: Tensor) -> str:
        """See :class:`WalkedModel`."""
        with watch_finite(self.model) as found:
            self.model(ids, use_cache=False)
        return found[0] if found else ""


@torch.inference_mode()
def as_walked(
    models: Sequence[nn.Module], reference: nn.Module | None
) -> tuple[list[WalkedModel], str]:
    """Return the reference, if there is one, and the models, all walked in the same way.

    The returned text is the reason why they have to be run as a whole, '' if they haven't.
    """
    names = ["The model"] * len(models)
    everything = list(models)
    if reference is not None:
        names.insert(0, "The full-precision model")
        everything.insert(0, reference)
    pairs = list(zip(names, everything, strict=True))
    try:
        return list(_sequential(pairs)), ""
    except NotSequential as error:
        return [WholeModel(what, own, _device(own)) for what, own in pairs], error.reason


def _sequential(models: Sequence[tuple[str, nn.Module]]) -> Iterator[SequentialModel]:
    """Yield the models, detecting output forms once per model class and block classes."""
    forms: dict[Hashable, list[OutputForm]] = {}
    for what, model in models:
        loaded, device = BlockModel(model), _device(model)
        kind = type(model), tuple(map(type, loaded.blocks))
        if kind not in forms:
            forms[kind] = detect_forms(loaded, device)
        yield SequentialModel(what, loaded, forms[kind], device)


def detect_forms(loaded: BlockModel, device: torch.device) -> list[OutputForm]:
    """Detect output forms (:func:`lsq_core.model.walk.detect_output_forms`) on arbitrary tokens.

    Raises
    ------
    NotSequential
        Also if there isn't one hidden state per token, since the head runs on subsets of tokens.
    """
    ids = torch.full((1, 2), _ANY_TOKEN, dtype=torch.int64, device=device)
    forms = detect_output_forms(loaded, ids)
    _, [states] = record_calls(loaded, [ids], forms)
    if states.shape[:2] != ids.shape:
        raise NotSequential(loaded.model, "they don't have one hidden state for each token")
    return forms


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _signature(module: nn.Module, without: nn.Module | None = None) -> Hashable:
    """Return a module's signature: its submodules' names, types and tensor locations.

    Two copies of a module that share every tensor have equal signatures while both are in memory.
    """
    left_out = set() if without is None else set(without.modules())
    parts = []
    for name, child in module.named_modules():
        if child in left_out:
            continue
        tensors = {**child._parameters, **child._buffers}
        places = tuple((key, _place(t)) for key, t in tensors.items() if t is not None)
        parts.append((name, type(child), child.extra_repr(), places))
    return tuple(parts)


def _place(tensor: Tensor) -> Hashable:
    """Return a tensor's address (0 if empty or meta), dtype, shape and strides."""
    where = tensor.data_ptr() if tensor.numel() and not tensor.is_meta else 0
    return where, tensor.dtype, tuple(tensor.shape), tensor.stride()
