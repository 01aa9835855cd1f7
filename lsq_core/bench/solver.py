"""HQQ quantization with this project's grid and solver, against ``hqq``'s own ``Quantizer``."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from hqq.core.quantize import Quantizer
from torch import Tensor

from lsq_core.bench import NO_GPU, REPEATS, Row, time_call, time_interleaved
from lsq_core.bits import QuantConfig
from lsq_core.model.dtypes import torch_name
from lsq_core.quantization.base import round_to_grid, to_groups
from lsq_core.quantization.hqq.quantizer import min_max_grid
from lsq_core.quantization.hqq.solver import backend, steps

#: Maximum difference in mean absolute and Frobenius error, relative to theirs.
ERROR_LIMIT = 1e-3
_ERROR_IS = "mean and Frobenius weight error against theirs, relative, the worst case"

#: Codes (groups, group_size), scale and zero (groups, 1).
Quantized = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """Weights of one kind and how to quantize them."""

    kind: str = "normal"
    side: int = 2048
    dtype: torch.dtype = torch.float32
    bits: int = 4
    group_size: int = 64
    axis: int = 1

    @property
    def name(self) -> str:
        """A short description of the case."""
        dtype = torch_name(self.dtype)
        where = self.kind if self.kind == "demo" else f"{self.kind} {self.side}²"
        return f"{where} {dtype} b{self.bits}g{self.group_size} axis {self.axis}"

    def weights(self, device: str = "cpu") -> Tensor:
        """Return the weights, the same on each call."""
        shape = (self.side, self.side)
        torch.manual_seed(0)
        if self.kind == "demo":
            weights = _demo_weights()
        elif self.kind == "constant":
            weights = torch.full(shape, 0.3)
        elif self.kind == "student-t":
            weights = 0.02 * torch.distributions.StudentT(4.0).sample(shape)
        else:
            weights = {"normal": 0.02, "wide": 1.0}[self.kind] * torch.randn(shape)
        return weights.to(device, self.dtype)

    def quantize_ours(self, weights: Tensor) -> Quantized:
        """Quantize with this project's grid and solver; scale and zero stay float32."""
        weights, config = weights.float(), QuantConfig(self.bits, self.group_size)
        grid = min_max_grid(weights, config, self.axis, optimize=True)
        codes = round_to_grid(to_groups(weights, self.group_size, self.axis), grid, self.bits)
        return codes, grid.scale[:, None], grid.zero[:, None]

    def quantize_theirs(self, weights: Tensor) -> Quantized:
        """Quantize with the package's public call."""
        codes, meta = Quantizer.quantize(
            weights,
            nbits=self.bits,
            group_size=self.group_size,
            axis=self.axis,
            bitpack=False,
            device=str(weights.device),
        )
        tensors = codes, meta["scale"], meta["zero"]
        return tensors if self.axis == 1 else tuple(tensor.T for tensor in tensors)

    def errors(self, weights: Tensor, quantize: Callable[[Tensor], Quantized]) -> Tensor:
        """Return the mean absolute and Frobenius error of the float32 weights, float64 (2,)."""
        codes, scale, zero = (tensor.double() for tensor in quantize(weights.float()))
        error = to_groups(weights.double(), self.group_size, self.axis) - (codes - zero) * scale
        return torch.stack([error.abs().mean(), error.norm()])


#: The first is timed alternately for the row's figures; the others are timed once for its details.
CASES = (
    Case(),
    Case(dtype=torch.bfloat16),
    Case(dtype=torch.float16, axis=0),
    Case(bits=2, group_size=32),
    Case(bits=3, group_size=128, axis=0),
    Case(bits=8, group_size=128),
    Case("student-t"),
    Case("constant"),
    Case("demo", bits=3),
    Case(side=4096),
)


def compiled(repeats: int = REPEATS) -> Row:
    """Measure the solver as compiled for this machine."""
    what = "HQQ solver, compiled"
    with steps.force_compiled(compiled=True):
        start_time = time.perf_counter()
        for axis in (1, 0):
            small = Case(side=1024, axis=axis)
            small.quantize_ours(small.weights())
        compiling = time.perf_counter() - start_time
        if backend("cpu").name != "compiled":
            return Row("solver_cpu", what, reason=backend("cpu").reason)
        return _row("solver_cpu", what, CASES, repeats, 5.0, {"compiling_s": compiling})


def eager(repeats: int = REPEATS) -> Row:
    """Measure the uncompiled solver, also on errors so large that they survive shrinking."""
    with steps.force_compiled(compiled=False):
        cases = (*CASES, Case("wide", bits=2))
        return _row("solver_cpu_eager", "HQQ solver, no compiler", cases, repeats, 3.0, {})


def _row(
    id: str, what: str, cases: tuple[Case, ...], repeats: int, target: float, details: dict
) -> Row:
    first, *others = cases
    weights = first.weights()
    pair = time_interleaved(
        lambda: first.quantize_ours(weights), lambda: first.quantize_theirs(weights), repeats
    )
    beside = {case.name: _compare(case) for case in others}
    beside[first.name] = {"ratio": pair.figures["ratio"], "error": _difference(first, weights)}
    return Row(
        id,
        f"{what}, {first.name}",
        ours=f"this project's HQQ grid and solver ({backend('cpu').name})",
        theirs="hqq's Quantizer.quantize",
        **pair.figures,
        error=max(case["error"] for case in beside.values()),
        error_limit=ERROR_LIMIT,
        error_is=_ERROR_IS,
        target=target,
        details={"engine": backend("cpu").name, "cases": beside, **details},
    )


def _compare(case: Case, device: str = "cpu") -> dict[str, float]:
    """Time each side once, and compare their errors."""
    weights = case.weights(device)
    ours = time_call(lambda: case.quantize_ours(weights))
    theirs = time_call(lambda: case.quantize_theirs(weights))
    return {
        "ours_s": ours,
        "theirs_s": theirs,
        "ratio": theirs / ours,
        "error": _difference(case, weights),
    }


def _difference(case: Case, weights: Tensor) -> float:
    ours = case.errors(weights, case.quantize_ours)
    theirs = case.errors(weights, case.quantize_theirs)
    # If theirs has no error (constant weights), ours must have none either.
    return float(((ours - theirs).abs() / theirs.clamp_min(1e-6)).max())


def _demo_weights() -> Tensor:
    """Return all matrices of one block of the demo model, reshaped into rows of 128."""
    from lsq_core.model.architecture import get_weight
    from lsq_core.model.loading import load_model
    from lsq_core.model.source import ModelSource

    loaded = load_model(ModelSource("demo"), "cpu")
    matrices = [get_weight(loaded.model, m).float() for m in loaded.info.matrices if m.layer == 3]
    return torch.cat([m.reshape(-1, 128) for m in matrices])


#: Shapes (out, in) and their counts in each of the 32 decoder blocks of a 7B model.
SHAPES_7B = (((4096, 4096), 4), ((4096, 11008), 3))
#: Maximum seconds for all linear layers of such a model.
MOST_7B = 2.0


def gpu(repeats: int = REPEATS) -> Row:
    """Measure one decoder block of a 7B model in bfloat16 on the GPU; the details time all 32."""
    what = "HQQ solver on a GPU, one decoder block of a 7B model, bfloat16 b4g64"
    if not torch.cuda.is_available():
        return Row("solver_gpu", what, device="cuda", reason=NO_GPU)
    case = Case(dtype=torch.bfloat16)
    torch.manual_seed(0)
    block = [
        0.02 * torch.randn(shape, dtype=torch.bfloat16, device="cuda")
        for shape, count in SHAPES_7B
        for _ in range(count)
    ]
    ours = case.quantize_ours
    wait = torch.cuda.synchronize
    pair = time_interleaved(
        lambda: [ours(w) for w in block],
        lambda: [case.quantize_theirs(w) for w in block],
        repeats,
        wait=wait,
    )
    return Row(
        "solver_gpu",
        what,
        ours=f"this project's HQQ grid and solver ({backend('cuda').name})",
        theirs="hqq's Quantizer.quantize",
        **pair.figures,
        error=max(_difference(case, w) for w in block),
        error_limit=ERROR_LIMIT,
        error_is=f"{_ERROR_IS}; hqq works in float16 on a GPU, ours in float32",
        target=20.0,
        device="cuda",
        details={"engine": backend("cuda").name} | _whole_model(ours, block) | _bandwidth(block),
    )


def _whole_model(ours: Callable, block: list[Tensor]) -> dict[str, float]:
    """Time all 32 blocks with the weights on the GPU (the same block 32 times)."""
    seconds = time_call(lambda: [ours(w) for _ in range(32) for w in block], torch.cuda.synchronize)
    return {"model_7b_s": seconds, "model_7b_most_s": MOST_7B}


def _bandwidth(block: list[Tensor]) -> dict[str, float]:
    """Measure the bandwidth of the kernel alone and of a plain copy, in GB/s."""
    from lsq_core.quantization.hqq.solver import solve_zero_points

    weight = max(block, key=Tensor.numel).view(-1, 64)
    low, high = weight.float().amin(1, keepdim=True), weight.float().amax(1, keepdim=True)
    scale = 15 / (high - low)
    target = torch.empty_like(weight)
    calls = {
        "kernel_gb_s": (
            lambda: solve_zero_points(weight, scale, -low * scale, 15, 1),
            weight.nbytes,
        ),
        "copy_gb_s": (lambda: target.copy_(weight), 2 * weight.nbytes),
    }
    moved = {}
    for name, (call, nbytes) in calls.items():
        call()
        torch.cuda.synchronize()
        moved[name] = nbytes / min(time_call(call, torch.cuda.synchronize) for _ in range(5)) / 1e9
    return moved
