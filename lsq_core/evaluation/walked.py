"""The models of an evaluation as they are walked: block by block, or as one block."""

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

#: A token that any vocabulary has; a few of them show the form of the blocks' outputs.
_ANY_TOKEN = 0


class WalkedModel(Protocol):
    """A model of which hidden states are computed block by block.

    Signatures are equal for modules that compute the same: those that share all tensors.
    """

    #: How error messages name the model.
    what: str
    model: nn.Module
    device: torch.device
    #: Blocks that are run one by one.
    layers: int
    #: Whether logits can be computed for some tokens of a window alone.
    splits_tokens: bool
    #: Whether a block is read or quantized anew each time that it is in memory.
    costly_blocks: bool

    def stem_signature(self) -> Hashable:
        """The signature of all that is outside the blocks."""

    def signature(self, layer: int) -> Hashable:
        """The signature of a block."""

    def stem(self, batches: Sequence[Tensor]) -> tuple[list[list[Call]], list[Tensor]]:
        """The calls of each block for each batch (windows, tokens), and the first one's inputs."""

    def weights(self, layer: int) -> AbstractContextManager:
        """A block's stored weights in memory, for all models, within a ``with`` block."""

    def block(self, layer: int) -> AbstractContextManager[nn.Module]:
        """A block, with its weights decoded within a ``with`` block."""

    def head(self) -> AbstractContextManager:
        """What :meth:`logits` needs in memory within a ``with`` block."""

    def logits(self, states: Tensor, ids: Tensor, tokens: slice) -> Tensor:
        """Logits (windows, tokens of the slice, vocabulary) from the last block's outputs."""

    def first_not_finite(self, ids: Tensor) -> str:
        """The first module whose output for ids (windows, tokens) isn't finite, '' for none."""


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
        """See :class:`WalkedModel`; the final norm and the LM head run on these tokens alone."""
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
    """A model whose blocks cannot be run one by one: it runs as a whole where its head would.

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

    The text is empty, or says why they have to be run as wholes.
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
    """Yield the models; those of one class have the same blocks, whose forms are found once."""
    forms: dict[Hashable, list[OutputForm]] = {}
    for what, model in models:
        loaded, device = BlockModel(model), _device(model)
        kind = type(model), tuple(map(type, loaded.blocks))
        if kind not in forms:
            forms[kind] = detect_forms(loaded, device)
        yield SequentialModel(what, loaded, forms[kind], device)


def detect_forms(loaded: BlockModel, device: torch.device) -> list[OutputForm]:
    """See :func:`lsq_core.model.walk.detect_output_forms`; the tokens don't matter.

    Raises
    ------
    NotSequential
        Also if there isn't one hidden state for each token, as the head runs on some of the tokens.
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
