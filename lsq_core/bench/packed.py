"""A packed linear module against ``hqq``'s own, with its PyTorch backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQBackend, HQQLinear
from torch import Tensor, nn

from lsq_core.bench import REPEATS, Row, time_interleaved
from lsq_core.bits import QuantConfig
from lsq_core.model.dtypes import torch_name
from lsq_core.quantization.packed import quantize_matrix
from lsq_core.quantization.registry import get_quantizer
from lsq_core.quantized.modules import PackedLinear

SIDE = 2048
BITS = (2, 3, 4, 8)
TOKENS = (1, 256)


def forward(repeats: int = REPEATS) -> Row:
    """One layer at each width, at one token and at a batch, one after the other."""
    torch.manual_seed(0)
    weight = 0.02 * torch.randn(SIDE, SIDE)
    with _pytorch_backend(), torch.inference_mode():
        pairs = {
            (bits, torch_name(dtype)): (
                _ours(weight, bits, "8bit"),
                _theirs(weight, bits, dtype),
                [torch.randn(tokens, SIDE, dtype=dtype) for tokens in TOKENS],
            )
            for bits in BITS
            for dtype in (torch.float32, torch.bfloat16)
        }
        plain = [pair for (_, dtype), pair in pairs.items() if dtype == "float32"]
        figures = time_interleaved(
            lambda: [ours(x) for ours, _, inputs in plain for x in inputs],
            lambda: [theirs(x) for _, theirs, inputs in plain for x in inputs],
            repeats,
        ).figures
        error = max(_added_error(weight, bits, pairs[bits, "float32"]) for bits in BITS)
        cases = {
            f"b{bits}g64 {dtype}, {len(x)} tokens": time_interleaved(
                lambda f=ours, x=x: f(x), lambda f=theirs, x=x: f(x), repeats
            ).figures
            for (bits, dtype), (ours, theirs, inputs) in pairs.items()
            for x in inputs
        }
    return Row(
        "packed_forward",
        f"packed layer {SIDE}², {'/'.join(map(str, BITS))} bits, 1 and 256 tokens, float32",
        ours="PackedLinear",
        theirs="HQQLinear, HQQBackend.PYTORCH",
        **figures,
        error=error,
        error_limit=0.01,
        error_is="the output's error against full precision, relative to theirs, fp16 metadata",
        target=1.0,
        details={"cases": cases},
    )


@contextmanager
def _pytorch_backend() -> Iterator[None]:
    """Set ``hqq``'s backend, which is an attribute of its class, for the block."""
    before = HQQLinear.backend
    HQQLinear.set_backend(HQQBackend.PYTORCH)
    try:
        yield
    finally:
        HQQLinear.set_backend(before)


def _ours(weight: Tensor, bits: int, metadata: str) -> PackedLinear:
    config = QuantConfig(bits, 64)
    return PackedLinear(quantize_matrix(weight, config, get_quantizer("rtn"), metadata=metadata))


def _theirs(weight: Tensor, bits: int, dtype: torch.dtype) -> HQQLinear:
    layer = nn.Linear(SIDE, SIDE, bias=False)
    layer.weight.data = weight.clone()
    config = BaseQuantizeConfig(nbits=bits, group_size=64, axis=1)
    # As ours: the same grid, and a zero point needn't be whole. What solved it takes no time here.
    config["weight_quant_params"] |= {"optimize": False, "round_zero": False}
    return HQQLinear(layer, config, compute_dtype=dtype, device="cpu", del_orig=False)


def _added_error(weight: Tensor, bits: int, pair: tuple[Callable, Callable, list]) -> float:
    """How much larger ours is, as a share; both keep scale and zero in floating point."""
    _, theirs, inputs = pair
    exact, x = inputs[-1] @ weight.T, inputs[-1]
    ours = _ours(weight, bits, "fp16")
    return float((ours(x) - exact).norm() / (theirs(x) - exact).norm() - 1)
