"""Modules of a quantized model; their weights are decoded when used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lsq_core.model.architecture import CompressedWeights
from lsq_core.quantization import packed_triton
from lsq_core.quantization.base import StoredMatrix
from lsq_core.quantization.packed import PackedMatrix


class PackedLinear(CompressedWeights):
    """A linear module that stores its weight packed and decodes it in each forward pass.

    Within :func:`decoded_weights`, it is decoded only once.

    It replaces ``nn.Linear`` and transformers' ``Conv1D``; the bias stays in full precision. If
    Triton kernels are enabled, a fused one decodes the weight and multiplies a few tokens on a GPU
    (:attr:`kernel`); otherwise, PyTorch multiplies. The fused kernels offered by ``hqq`` (gemlite,
    torchao) need their own layouts, and therefore a second copy of the weights.
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
        #: The decoded weight (out, in) while it is held.
        self._held: Tensor | None = None
        # Empty: it tracks the model's dtype, in which `weight` is decoded.
        self.register_buffer("_as", torch.empty(0, dtype=dtype), persistent=False)

    @property
    def weight(self) -> Tensor:
        """The decoded weight, for code that does not call the module.

        It is (out, in), or (in, out) for ``Conv1D``. Some architectures (Mamba, latent attention)
        read a linear module's weight. It is decoded on each access unless it is held.
        """
        decoded = self._decoded(self._as.dtype)
        return decoded.T if self.transposed else decoded

    @property
    def numel(self) -> int:
        """Number of weights in the matrix."""
        return self.out_features * self.in_features

    @property
    def packed(self) -> StoredMatrix:
        """The stored matrix."""
        tensors = {name: getattr(self, name) for name in self.names}
        shape = (self.out_features, self.in_features)
        return self.kind.from_tensors(tensors, shape, self.config, self.axis)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map ``inputs`` (…, in) to (…, out), in the dtype of the inputs."""
        if self._multiplies_packed(inputs):
            rows = packed_triton.multiply(self.packed, inputs.reshape(-1, self.in_features))
            outputs = rows.view(*inputs.shape[:-1], self.out_features)
            return outputs if self.bias is None else outputs + self.bias
        return F.linear(inputs, self._decoded(inputs.dtype), self.bias)

    def _multiplies_packed(self, inputs: Tensor) -> bool:
        """Return whether to use the fused kernel: few tokens, no gradients, weight not held."""
        few = 0 < inputs.numel() <= packed_triton.MAX_TOKENS * self.in_features
        differentiated = torch.is_grad_enabled() and inputs.requires_grad
        return self._held is None and few and not differentiated and self.kernel == "triton"

    @property
    def kernel(self) -> str:
        """What decodes the weight: ``triton``, which also multiplies few tokens, or ``pytorch``."""
        packed = self.packed
        return "triton" if isinstance(packed, PackedMatrix) and packed.uses_triton else "pytorch"

    def hold(self) -> None:
        """Decode the weight in the model's dtype and keep it until :meth:`release`."""
        self._held = self.packed.dequantize(self._as.dtype)

    def release(self) -> None:
        """Drop the decoded weight."""
        self._held = None

    def _decoded(self, dtype: torch.dtype) -> Tensor:
        """Return the decoded weight (out, in) in a dtype."""
        if self._held is not None and self._held.dtype == dtype:
            return self._held
        return self.packed.dequantize(dtype)

    def extra_repr(self) -> str:
        """Return the details shown by ``print(model)``."""
        return f"{self.in_features}, {self.out_features}, {self.config.name}"


class PackedStack(nn.ModuleList):
    """The packed experts of one stacked parameter.

    The experts' module reads its parameter as a tensor (experts, …), so the stack is decoded into
    that attribute just before the module runs and the attribute is deleted right after. Within
    :func:`decoded_weights`, it is decoded only once.
    """

    def __init__(self, experts: Iterable[PackedLinear], transposed: bool) -> None:
        super().__init__(experts)
        self.transposed = transposed
        #: The decoded parameter while it is held.
        self._held: Tensor | None = None

    def hold(self) -> None:
        """Decode the parameter and keep it until :meth:`release`."""
        self._held = self.decode()

    def release(self) -> None:
        """Drop the decoded parameter."""
        self._held = None

    def decode(self) -> Tensor:
        """Return the parameter as the experts' module expects it."""
        if self._held is not None:
            return self._held
        weights = [expert.weight for expert in self]
        return torch.stack([w.T for w in weights] if self.transposed else weights)


def decode_stacks(module: nn.Module, args: tuple) -> None:
    """Decode the stacks of an experts' module; a forward pre-hook."""
    for name, child in module.named_children():
        if isinstance(child, PackedStack):
            module.__dict__[name] = child.decode()


def drop_stacks(module: nn.Module, *_: object) -> None:
    """Delete the decoded stacks of an experts' module; a forward hook."""
    for name, child in module.named_children():
        if isinstance(child, PackedStack):
            module.__dict__.pop(name, None)


@contextmanager
def decoded_weights(module: nn.Module) -> Iterator[None]:
    """Hold the decoded weights of all packed modules in ``module`` within a ``with`` block.

    They are decoded once, however often the module runs, and take as much memory as the unquantized
    weights in the compute dtype.
    """
    stacks = [child for child in module.modules() if isinstance(child, PackedStack)]
    in_stacks = {id(expert) for stack in stacks for expert in stack}
    linears = [m for m in module.modules() if isinstance(m, PackedLinear)]
    holders = [*stacks, *(linear for linear in linears if id(linear) not in in_stacks)]
    try:
        for holder in holders:
            holder.hold()
        yield
    finally:
        for holder in holders:
            holder.release()


def packed_modules(model: nn.Module) -> dict[str, PackedLinear]:
    """Return every packed module by full name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear)}


def measured_bytes(model: nn.Module) -> int:
    """Count the bytes of all packed matrices, shared tensors once, without biases."""
    modules = packed_modules(model).values()
    return sum({id(t): t.nbytes for m in modules for t in m.packed.tensors.values()}.values())
