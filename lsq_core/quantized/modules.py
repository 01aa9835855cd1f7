"""Modules of a quantized model, whose weights stay packed until they are used."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lsq_core.quantization.base import StoredMatrix


class PackedLinear(nn.Module):
    """A linear module that holds a :class:`StoredMatrix` and multiplies by what it decodes to.

    It takes the place of ``nn.Linear`` and of transformers' ``Conv1D``. The bias stays as it was.
    """

    def __init__(
        self,
        packed: StoredMatrix,
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.transposed = transposed
        self.out_features, self.in_features = packed.shape
        self.config, self.axis, self.names = packed.config, packed.axis, list(packed.tensors)
        self.kind = type(packed)
        for name, tensor in packed.tensors.items():
            self.register_buffer(name, tensor)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        # No values: it follows the model's dtype, in which `weight` is decoded.
        self.register_buffer("_as", torch.empty(0, dtype=dtype), persistent=False)

    @property
    def weight(self) -> Tensor:
        """The decoded weight (out, in), for code that multiplies by it in its own way.

        Some architectures (Mamba, latent attention) read a linear module's weight instead of
        calling the module. It is decoded anew each time.
        """
        decoded = self.packed.dequantize(self._as.dtype)
        return decoded.T if self.transposed else decoded

    @property
    def packed(self) -> StoredMatrix:
        """The stored matrix."""
        tensors = {name: getattr(self, name) for name in self.names}
        shape = (self.out_features, self.in_features)
        return self.kind.from_tensors(tensors, shape, self.config, self.axis)

    @property
    def kernel(self) -> str:
        """What multiplies, for :func:`kernels`."""
        return "decoded, then multiplied by PyTorch"

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

    def decode(self) -> Tensor:
        """The parameter as the experts' module expects it."""
        weights = [expert.weight for expert in self]
        return torch.stack([w.T for w in weights] if self.transposed else weights)


def decode_stacks(module: nn.Module, args: tuple) -> None:
    for name, child in module.named_children():
        if isinstance(child, PackedStack):
            module.__dict__[name] = child.decode()


def drop_stacks(module: nn.Module, *_: object) -> None:
    for name, child in module.named_children():
        if isinstance(child, PackedStack):
            module.__dict__.pop(name, None)


def packed_modules(model: nn.Module) -> dict[str, PackedLinear]:
    """Every packed module by full name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear)}


def kernels(model: nn.Module) -> dict[str, str]:
    """What multiplies by each packed module, by full name.

    It is the same everywhere: the fast kernels that ``hqq`` can patch in (gemlite, torchao) want
    layouts of their own, and a second copy of the weights beside the one that was measured.
    """
    return {name: module.kernel for name, module in packed_modules(model).items()}


def measured_bytes(model: nn.Module) -> int:
    """Bytes of the stored tensors of all packed matrices, shared ones once, without biases."""
    modules = packed_modules(model).values()
    return sum({id(t): t.nbytes for m in modules for t in m.packed.tensors.values()}.values())


def model_bytes(model: nn.Module) -> int:
    """Bytes of every stored tensor of a model in memory, shared ones once."""
    seen = {t.data_ptr(): t.nbytes for t in chain(model.parameters(), model.buffers())}
    return sum(seen.values())
