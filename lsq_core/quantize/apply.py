"""Put packed matrices in the place of a model's linear modules and expert stacks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lsq_core.config import Config
from lsq_core.load import get_weight, is_transposed, locate
from lsq_core.model import Matrix
from lsq_core.quantize.base import Quantizer
from lsq_core.quantize.rows import Packed, packed_kind, quantize_config

Progress = Callable[[int, int, str], None]


class PackedLinear(nn.Module):
    """A linear module that stores a packed matrix and multiplies by what it decodes to.

    It takes the place of ``nn.Linear`` and of transformers' ``Conv1D``. The bias stays as it was.
    """

    def __init__(self, packed: Packed, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.config, self.axis, self.names = packed.config, packed.axis, list(packed.tensors)
        for name, tensor in packed.tensors.items():
            self.register_buffer(name, tensor)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def packed(self) -> Packed:
        """The stored matrix."""
        tensors = {name: getattr(self, name) for name in self.names}
        shape = (self.out_features, self.in_features)
        return packed_kind(self.config).from_tensors(tensors, shape, self.config, self.axis)

    def forward(self, inputs: Tensor) -> Tensor:
        """``inputs`` (…, in) to (…, out), in the dtype of the inputs."""
        return F.linear(inputs, self.packed.dequantize(inputs.dtype), self.bias)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.in_features}, {self.out_features}, {self.config.name}"


class PackedStack(nn.ModuleList):
    """The packed experts of one stacked parameter.

    The experts' module reads its parameter as a tensor (experts, …) in ways of its own, so the
    stack is decoded into that attribute just before the module runs and dropped right after.
    """

    def __init__(self, experts: Iterable[PackedLinear], transposed: bool) -> None:
        super().__init__(experts)
        self.transposed = transposed

    def decode(self, dtype: torch.dtype) -> Tensor:
        """The parameter as the experts' module expects it."""
        weights = [expert.packed.dequantize(dtype) for expert in self]
        return torch.stack([w.T for w in weights] if self.transposed else weights)


def _decode_stacks(module: nn.Module, args: tuple) -> None:
    dtype = next(a for a in args if torch.is_tensor(a) and a.is_floating_point()).dtype
    for name, child in module.named_children():
        if isinstance(child, PackedStack):
            module.__dict__[name] = child.decode(dtype)


def _drop_stacks(module: nn.Module, *_: object) -> None:
    for name, child in module.named_children():
        if isinstance(child, PackedStack):
            module.__dict__.pop(name, None)


def install(model: nn.Module, packed: dict[Matrix, Packed]) -> None:
    """Replace the modules of ``model`` that hold these matrices, in place."""
    stacks: dict[tuple[nn.Module, str], list[PackedLinear]] = {}
    for matrix, weights in packed.items():
        holder, parameter = locate(model, matrix)
        if matrix.expert is None:
            path, _, leaf = matrix.name.rpartition(".")
            setattr(model.get_submodule(path), leaf, PackedLinear(weights, holder.bias))
        else:
            stacks.setdefault((holder, parameter), []).append(PackedLinear(weights))
    for (holder, parameter), experts in stacks.items():
        delattr(holder, parameter)
        holder.add_module(parameter, PackedStack(experts, is_transposed(holder)))
    for holder in {holder for holder, _ in stacks}:
        holder.register_forward_pre_hook(_decode_stacks)
        holder.register_forward_hook(_drop_stacks, always_call=True)


def shallow_copy(model: nn.Module) -> nn.Module:
    """A copy whose modules are its own and whose parameters and buffers are the original's."""
    shared = {id(t): t for t in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)


def quantize_model(
    model: nn.Module,
    choice: dict[Matrix, Config],
    quantizer: Quantizer,
    *,
    rows: Mapping[str, Sequence[int]] | None = None,
    axis: int = 1,
    metadata: str = "8bit",
    progress: Progress = lambda done, total, message: None,
) -> nn.Module:
    """A quantized copy of ``model``; the original stays as it was and shares what isn't planned.

    ``rows`` gives the high-impact rows of each matrix that has mixed rows, by its name.

    Raises
    ------
    InputError, LsqError
        As :func:`lsq_core.quantize.rows.quantize_config`.
    """
    packed = {}
    for done, (matrix, config) in enumerate(choice.items()):
        progress(done, len(choice), matrix.name)
        packed[matrix] = quantize_config(
            get_weight(model, matrix),
            config,
            quantizer,
            rows=rows_of(matrix, rows),
            axis=axis,
            metadata=metadata,
            name=matrix.name,
        )
    progress(len(choice), len(choice), "quantized")
    quantized = shallow_copy(model)
    install(quantized, packed)
    return quantized


def rows_of(matrix: Matrix, rows: Mapping[str, Sequence[int]] | None) -> Tensor | None:
    """A matrix's high-impact rows, int64, or None where none are given."""
    own = (rows or {}).get(matrix.name)
    return None if own is None else torch.tensor(list(own), dtype=torch.int64)


def packed_modules(model: nn.Module) -> dict[str, PackedLinear]:
    """Every packed module by full name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear)}


def measured_bytes(model: nn.Module) -> int:
    """Bytes of the stored tensors of all packed matrices, biases not counted."""
    return sum(m.packed.nbytes for m in packed_modules(model).values())


def model_bytes(model: nn.Module) -> int:
    """Bytes of every stored tensor of a model in memory, shared ones once."""
    seen = {t.data_ptr(): t.nbytes for t in chain(model.parameters(), model.buffers())}
    return sum(seen.values())
