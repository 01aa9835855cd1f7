"""A packed linear module against ``hqq``'s own, with its PyTorch backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQBackend, HQQLinear
from torch import Tensor, nn

from lsq_core.bench import NO_GPU, REPEATS, Row, time_interleaved
from lsq_core.bits import QuantConfig
from lsq_core.model.dtypes import torch_name
from lsq_core.quantization.packed import quantize_matrix
from lsq_core.quantization.registry import get_quantizer
from lsq_core.quantized.modules import PackedLinear

BITS = (2, 3, 4, 8)


def forward(repeats: int = REPEATS) -> Row:
    """Compare one layer at each bit width, on one token and on a batch."""
    return measure_forward("packed_forward", Case(), repeats)


def forward_gpu(repeats: int = REPEATS) -> Row:
    """Compare a larger layer on the GPU, on up to 4,096 tokens."""
    case = Case(4096, (1, 16, 256, 4096), "bfloat16", "cuda")
    if not torch.cuda.is_available():
        return Row("packed_forward_gpu", case.title, device="cuda", reason=NO_GPU)
    return measure_forward("packed_forward_gpu", case, repeats)


@dataclass(frozen=True)
class Case:
    """A square layer, the token counts to measure, and the dtype and device of the row's ratio."""

    side: int = 2048
    tokens: tuple[int, ...] = (1, 256)
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def title(self) -> str:
        """A title such as ``packed layer 2048², 2/3/4/8 bits, 1 and 256 tokens, float32``."""
        *first, last = map("{:,}".format, self.tokens)
        bits = "/".join(map(str, BITS))
        return f"packed layer {self.side}², {bits} bits, {', '.join(first)} and {last} tokens, " + (
            self.dtype
        )


def measure_forward(id: str, case: Case, repeats: int) -> Row:
    """Compare one layer at each bit width with ``hqq``'s.

    The details list each dtype and number of tokens, with the time of a plain linear layer.
    """
    torch.manual_seed(0)
    weight = 0.02 * torch.randn(case.side, case.side, device=case.device)
    wait = torch.cuda.synchronize if case.device == "cuda" else lambda: None
    with _pytorch_backend(), torch.inference_mode():
        pairs = {
            (bits, torch_name(dtype)): (
                _ours(weight, bits, "8bit"),
                _theirs(weight, bits, dtype),
                [torch.randn(n, case.side, dtype=dtype, device=case.device) for n in case.tokens],
            )
            for bits in BITS
            for dtype in (torch.float32, torch.bfloat16)
        }
        plain = [pair for (_, dtype), pair in pairs.items() if dtype == case.dtype]
        figures = time_interleaved(
            lambda: [ours(x) for ours, _, inputs in plain for x in inputs],
            lambda: [theirs(x) for _, theirs, inputs in plain for x in inputs],
            repeats,
            wait=wait,
        ).figures
        error = max(_added_error(weight, bits, pairs[bits, "float32"]) for bits in BITS)
        cases = {
            f"b{bits}g64 {dtype}, {len(x)} tokens": _case_figures(
                ours, theirs, weight, x, repeats, wait
            )
            for (bits, dtype), (ours, theirs, inputs) in pairs.items()
            for x in inputs
        }
    return Row(
        id,
        case.title,
        ours="PackedLinear",
        theirs="HQQLinear, HQQBackend.PYTORCH",
        **figures,
        error=error,
        error_limit=0.01,
        error_is="excess output error over theirs, fp16 metadata",
        target=1.0,
        device=case.device,
        details={"cases": cases},
    )


def _case_figures(
    ours: Callable, theirs: Callable, weight: Tensor, x: Tensor, repeats: int, wait: Callable
) -> dict[str, float]:
    """Return both sides' figures on the input ``x``, and the seconds of a plain linear layer."""
    pair = time_interleaved(lambda: ours(x), lambda: theirs(x), repeats, wait=wait)
    full = weight.to(x.dtype)
    linear = time_interleaved(
        lambda: nn.functional.linear(x, full), lambda: ours(x), repeats, wait=wait
    )
    return pair.figures | {"linear_s": linear.figures["ours_s"]}


@contextmanager
def _pytorch_backend() -> Iterator[None]:
    """Set ``hqq``'s backend, a class attribute, within a ``with`` block."""
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
    layer = nn.Linear(*weight.shape, bias=False)
    layer.weight.data = weight.clone()
    config = BaseQuantizeConfig(nbits=bits, group_size=64, axis=1)
    # The same grid as ours, with fractional zero points. Solving for it is not timed here.
    config["weight_quant_params"] |= {"optimize": False, "round_zero": False}
    device = str(weight.device)
    return HQQLinear(layer, config, compute_dtype=dtype, device=device, del_orig=False)


def _added_error(weight: Tensor, bits: int, pair: tuple[Callable, Callable, list]) -> float:
    """Return the relative excess of our error over theirs, both with floating-point metadata."""
    _, theirs, inputs = pair
    exact, x = inputs[-1] @ weight.T, inputs[-1]
    ours = _ours(weight, bits, "fp16")
    return float((ours(x) - exact).norm() / (theirs(x) - exact).norm() - 1)
