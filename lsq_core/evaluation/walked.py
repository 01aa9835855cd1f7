"""The models of an evaluation as they are walked: block by block, or as one block."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

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

#: A token that any vocabulary has; a few of them show the form of the blocks' outputs.
_ANY_TOKEN = 0


class WalkedModel(Protocol):
    """A model of which hidden states are computed block by block.

    Signatures are equal for modules that compute the same: those that share all tensors.
    """

    #: How error messages name the model.
    what: str
    model: nn.Module
    #: Blocks that are run one by one.
    layers: int
    #: Whether logits can be computed for some tokens of a window alone.
    splits_tokens: bool

    def stem_signature(self) -> Hashable:
        """The signature of all that is outside the blocks."""

    def signature(self, layer: int) -> Hashable:
        """The signature of a block."""

    def stem(self, batches: Sequence[Tensor]) -> tuple[list[list[Call]], list[Tensor]]:
        """The calls of each block for each batch (windows, tokens), and the first one's inputs."""

    def block(self, layer: int) -> AbstractContextManager[nn.Module]:
        """A block, with its weights decoded within a ``with`` block."""

    def logits(self, states: Tensor, ids: Tensor, tokens: slice) -> Tensor:
        """Logits (windows, tokens of the slice, vocabulary) from the last block's outputs."""


@dataclass(frozen=True, eq=False)
class SequentialModel:
    """A model whose blocks are run one by one."""

    what: str
    loaded: BlockModel
    forms: Sequence[OutputForm]
    splits_tokens: bool = True

    @property
    def model(self) -> nn.Module:
        """The whole model."""
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

    @contextmanager
    def block(self, layer: int) -> Iterator[nn.Module]:
        """See :class:`WalkedModel`."""
        block = self.loaded.blocks[layer]
        with self.loaded.materialize(self.loaded.block_name(layer)), decoded_weights(block):
            yield block

    def logits(self, states: Tensor, ids: Tensor, tokens: slice) -> Tensor:
        """See :class:`WalkedModel`; the final norm and the LM head run on these tokens alone."""
        return run_from_block(
            self.loaded, self.layers, states[:, tokens], ids[:, tokens], self.forms
        )


@dataclass(frozen=True, eq=False)
class WholeModel:
    """A model whose blocks cannot be run one by one: it runs as a whole where its head would.

    Its hidden states are the token ids themselves. Weights are decoded in each forward pass.
    """

    what: str
    model: nn.Module
    layers: int = 0
    splits_tokens: bool = False

    def stem_signature(self) -> Hashable:
        """See :class:`WalkedModel`."""
        return _signature(self.model)

    def signature(self, layer: int) -> Hashable:
        """See :class:`WalkedModel`; there are no blocks."""
        raise IndexError(layer)

    def stem(self, batches: Sequence[Tensor]) -> tuple[list[list[Call]], list[Tensor]]:
        """See :class:`WalkedModel`."""
        return [], list(batches)

    def block(self, layer: int) -> AbstractContextManager[nn.Module]:
        """See :class:`WalkedModel`; there are no blocks."""
        raise IndexError(layer)

    def logits(self, states: Tensor, ids: Tensor, tokens: slice) -> Tensor:
        """See :class:`WalkedModel`."""
        kept = last_logits(self.model, ids, ids.shape[1] - tokens.start)
        return kept[:, : tokens.stop - tokens.start]


@torch.inference_mode()
def as_walked(
    models: Sequence[nn.Module], reference: nn.Module | None
) -> tuple[list[WalkedModel], str]:
    """Return the reference, if there is one, and the models, all walked in the same way.

    The text is empty, or says why they have to be run as wholes.
    """
    names = ["The model"] * len(models)
    everything = list(models)
    if reference is not None:
        names.insert(0, "The full-precision model")
        everything.insert(0, reference)
    try:
        return [_sequential(*pair) for pair in zip(names, everything, strict=True)], ""
    except NotSequential as error:
        return [WholeModel(*pair) for pair in zip(names, everything, strict=True)], error.reason


def _sequential(what: str, model: nn.Module) -> SequentialModel:
    loaded = BlockModel(model)
    device = next(model.parameters()).device
    ids = torch.full((1, 2), _ANY_TOKEN, dtype=torch.int64, device=device)
    return SequentialModel(what, loaded, detect_output_forms(loaded, ids))


def _signature(module: nn.Module, without: nn.Module | None = None) -> Hashable:
    """What tells a module from others of the same model: its submodules and their tensors' places.

    Two copies of a module that share every tensor have the same, as long as both are in memory.
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
    """Where a tensor's content is; that of no content is nowhere."""
    where = tensor.data_ptr() if tensor.numel() and not tensor.is_meta else 0
    return where, tensor.dtype, tuple(tensor.shape), tensor.stride()
