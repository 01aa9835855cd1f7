"""Hybrid quantization ([C]; method §7): learned rounding of high-impact rows, clipping of the rest.

Each block minimizes the error of its output: its inputs come from the blocks quantized before it,
its targets from the full-precision model. High-impact rows learn whether each weight is rounded up
or down (AdaRound, Nagel et al. 2020), on a fixed grid; the other rows learn how far each group's
range is clipped (OmniQuant, Shao et al. 2024).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.func import functional_call

from lsq_core.bits import Config, QuantConfig
from lsq_core.errors import exception_reason
from lsq_core.files import write_bytes
from lsq_core.model.architecture import (
    find_blocks,
    first_tensor,
    get_weight,
    is_transposed,
    locate_parameter,
)
from lsq_core.model.info import Matrix
from lsq_core.model.loading import LoadedModel
from lsq_core.model.walk import Call, record_calls
from lsq_core.profiling.calibration import load_calibration
from lsq_core.progress import Progress
from lsq_core.quantization.base import (
    Grid,
    HighImpactRows,
    StoredMatrix,
    from_groups,
    round_to_grid,
    to_groups,
)
from lsq_core.quantization.checks import check_finite, check_range
from lsq_core.quantization.magnitude import normalizing_exponent, scale_by_power_of_two
from lsq_core.quantization.packed import (
    PackedMatrix,
    pack_bits,
    store_grid,
    stored_grid,
)
from lsq_core.quantization.registry import stored_matrix_class
from lsq_core.quantization.rows import pack_rows
from lsq_core.quantization.rtn import Rtn
from lsq_core.quantization.task import QuantizationTask
from lsq_core.quantized.convert import install, shallow_copy
from lsq_core.quantized.manifest import FORMAT_VERSION

if TYPE_CHECKING:
    from lsq_core.settings import GridSettings

#: Number of calibration sequences to learn from; each step uses one.
SEQUENCES = 32
_ROUNDING_RATE, _CLIPPING_RATE = 1e-3, 1e-2
#: Fraction of the steps without the rounding regularizer, and γ at its start and end.
_WARMUP_FRACTION, _GAMMA = 0.2, (20.0, 2.0)
#: Weight of the mean regularizer in the loss, next to the relative squared output error. The paper
#: gives no value; AdaRound's is 0.01, for a sum.
_REGULARIZER_WEIGHT = 0.01
#: Initial clipping parameter, before the sigmoid.
_INITIAL_CLIP_LOGIT = 4.0


# --- learned parameters ----------------------------------------------------------------------


class LearnedRounding(nn.Module):
    """Rows on a fixed grid, each weight rounded down plus ``V = clip(1.2·σ(a) − 0.1, 0, 1)``.

    The grid is for the weights divided by 2^exponent, which have an ordinary magnitude. ``V`` is
    initialized to the remainder of rounding down; packing rounds up where ``a ≥ 0``.
    """

    def __init__(self, weight: Tensor, config: QuantConfig, axis: int, metadata: str) -> None:
        super().__init__()
        self.shape, self.config, self.axis = tuple(weight.shape), config, axis
        self.exponent = normalizing_exponent(weight)
        normalized = scale_by_power_of_two(weight.float(), -self.exponent)
        groups = to_groups(normalized, config.group_size, axis)
        grid = Rtn().solve(normalized, config, axis)
        self.scale, self.zero = store_grid(groups, grid, config, metadata)
        self.grid = stored_grid(self.scale, self.zero)
        scaled = groups / self.grid.scale[:, None] + self.grid.zero[:, None]
        self.rounded_down = scaled.floor()
        left = (scaled - self.rounded_down + 0.1) / 1.2
        self.a = nn.Parameter(torch.logit(left))

    @property
    def round_up(self) -> Tensor:
        """``V``, from 0 to 1 for each weight."""
        return (1.2 * torch.sigmoid(self.a) - 0.1).clamp(0, 1)

    def forward(self) -> Tensor:
        """Return the differentiable weights (rows, in)."""
        codes = (self.rounded_down + self.round_up).clamp(0, 2**self.config.bits - 1)
        groups = (codes - self.grid.zero[:, None]) * self.grid.scale[:, None]
        return scale_by_power_of_two(from_groups(groups, self.shape, self.axis), self.exponent)

    def rounding_regularizer(self, gamma: float) -> Tensor:
        """Return the mean of ``1 − |2V − 1|^γ``, which is 0 if all ``V`` are 0 or 1."""
        return (1 - (2 * self.round_up - 1).abs().pow(gamma)).mean()

    @torch.no_grad()
    def pack(self) -> PackedMatrix:
        """Return the rows as stored."""
        codes = (
            (self.rounded_down + (self.a >= 0)).clamp(0, 2**self.config.bits - 1).to(torch.uint8)
        )
        packed = pack_bits(codes.flatten(), self.config.bits)
        scale = self.scale.scaled(self.exponent)
        return PackedMatrix(self.shape, self.config, self.axis, packed, scale, self.zero)


class LearnedClipping(nn.Module):
    """Rows rounded to nearest on grids from ``σ(l)·min`` to ``σ(u)·max`` of each group."""

    def __init__(self, weight: Tensor, config: QuantConfig, axis: int, metadata: str) -> None:
        super().__init__()
        self.shape, self.config = tuple(weight.shape), config
        self.axis, self.metadata = axis, metadata
        self.exponent = normalizing_exponent(weight)
        normalized = scale_by_power_of_two(weight.float(), -self.exponent)
        self.groups = to_groups(normalized, config.group_size, axis)
        self.lowest, self.highest = self.groups.amin(1), self.groups.amax(1)
        self.low = nn.Parameter(torch.full_like(self.lowest, _INITIAL_CLIP_LOGIT))
        self.high = nn.Parameter(torch.full_like(self.highest, _INITIAL_CLIP_LOGIT))

    def learned_grid(self) -> Grid:
        """Return differentiable scale and zero for the weights divided by 2^exponent.

        The zero point is rounded with a straight-through gradient.
        """
        low = torch.sigmoid(self.low) * self.lowest
        high = torch.sigmoid(self.high) * self.highest
        scale = ((high - low) / (2**self.config.bits - 1)).clamp(min=1e-8)
        return Grid(scale, _round_straight_through(-low / scale))

    def forward(self) -> Tensor:
        """Return the differentiable weights (rows, in)."""
        grid = self.learned_grid()
        scale, zero = grid.scale[:, None], grid.zero[:, None]
        codes = (_round_straight_through(self.groups / scale) + zero).clamp(
            0, 2**self.config.bits - 1
        )
        groups = from_groups((codes - zero) * scale, self.shape, self.axis)
        return scale_by_power_of_two(groups, self.exponent)

    @torch.no_grad()
    def pack(self) -> PackedMatrix:
        """Return the rows as stored, rounded on the stored grid."""
        scale, zero = store_grid(self.groups, self.learned_grid(), self.config, self.metadata)
        codes = round_to_grid(self.groups, stored_grid(scale, zero), self.config.bits)
        packed = pack_bits(codes.flatten(), self.config.bits)
        scale = scale.scaled(self.exponent)
        return PackedMatrix(self.shape, self.config, self.axis, packed, scale, zero)


def _round_straight_through(values: Tensor) -> Tensor:
    """Round with a straight-through gradient."""
    return values + (values.round() - values).detach()


class LearnedMatrix(nn.Module):
    """One matrix: learned rounding of its high-impact rows, if any, and clipping of the others."""

    def __init__(
        self, weight: Tensor, config: Config, rows: Sequence[int] | None, axis: int, metadata: str
    ) -> None:
        super().__init__()
        self.shape, self.config = tuple(weight.shape), config
        self.rounding: LearnedRounding | None = None
        if isinstance(config, QuantConfig):
            self.clipping = LearnedClipping(weight, config, axis, metadata)
            return

        def high(part: Tensor, own: QuantConfig) -> PackedMatrix:
            self.rounding = LearnedRounding(part, own, axis, metadata)
            return self.rounding.pack()

        def low(part: Tensor, own: QuantConfig) -> PackedMatrix:
            self.clipping = LearnedClipping(part, own, axis, metadata)
            return self.clipping.pack()

        self.initial = pack_rows(weight, config, rows, axis, high, low)
        self.is_high = self.initial.is_high

    def forward(self) -> Tensor:
        """Return the differentiable weights (out, in)."""
        if isinstance(self.config, QuantConfig) or self.initial.high is None:
            return self.clipping()
        fixed = self.initial.high
        high = self.rounding() if self.rounding else fixed.dequantize(torch.float32)
        weight = torch.empty(self.shape, device=high.device)
        return weight.masked_scatter(self.is_high[:, None], high).masked_scatter(
            ~self.is_high[:, None], self.clipping()
        )

    def pack(self) -> StoredMatrix:
        """Return the matrix as stored."""
        if isinstance(self.config, QuantConfig):
            return self.clipping.pack()
        high = self.rounding.pack() if self.rounding else self.initial.high
        return replace(self.initial, high=high, low=self.clipping.pack())


# --- a block ---------------------------------------------------------------------------------


@dataclass(eq=False)
class _BlockInputs:
    """A block's inputs for each calibration sequence, and the recorded calls of every block."""

    hidden: list[Tensor]
    calls: list[list[Call]]

    def run(self, layer: int, block: Callable, number: int) -> Tensor:
        call = self.calls[layer][number]
        return first_tensor(block(self.hidden[number], *call.args, **call.kwargs))

    @torch.no_grad()
    def run_all(self, layer: int, block: Callable) -> list[Tensor]:
        """Return the block's output for each sequence."""
        return [self.run(layer, block, k) for k in range(len(self.hidden))]


class _LearnableBlock:
    """A full-precision block with learned weights for its planned matrices."""

    def __init__(
        self,
        model: nn.Module,
        block: nn.Module,
        prefix: str,
        learned: dict[Matrix, LearnedMatrix],
    ) -> None:
        self.block, self.learned = block, learned
        self.matrices_by_parameter: dict[str, list[Matrix]] = {}
        self.transposed, self.dtypes = {}, {}
        for matrix in learned:
            holder, parameter = locate_parameter(model, matrix)
            module = matrix.name if matrix.expert is None else matrix.name.rsplit(".", 2)[0]
            name = f"{module.removeprefix(prefix).lstrip('.')}.{parameter}"
            self.matrices_by_parameter.setdefault(name, []).append(matrix)
            self.transposed[name] = is_transposed(holder)
            self.dtypes[name] = getattr(holder, parameter).dtype

    def __call__(self, hidden: Tensor, *args: object, **kwargs: object) -> object:
        """Run the block with the current learned weights."""
        weights = {}
        for name, matrices in self.matrices_by_parameter.items():
            parts = [self.learned[m]() for m in matrices]
            parts = [part.T for part in parts] if self.transposed[name] else parts
            weight = parts[0] if matrices[0].expert is None else torch.stack(parts)
            weights[name] = weight.to(self.dtypes[name])
        return functional_call(self.block, weights, (hidden, *args), kwargs)


class Hybrid:
    """Learns block by block, ``steps`` each; matrices of a single bit width learn only clipping."""

    matrix = PackedMatrix

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def quantize_model(self, task: QuantizationTask) -> nn.Module:
        """See :class:`ModelQuantizer`; learns from :data:`SEQUENCES` calibration sequences."""
        loaded, choice = task.loaded, task.choice
        ids = torch.from_numpy(load_calibration(loaded, task.calibration).ids).to(loaded.device)
        prefix, blocks = find_blocks(loaded.model)
        quantized = shallow_copy(loaded.model)
        copies = list(find_blocks(quantized)[1])
        with torch.inference_mode(False), torch.no_grad():
            full, quantized_stream = _initial_inputs(loaded, ids)
            for layer, block in enumerate(blocks):
                own = {m: c for m, c in choice.items() if m.layer == layer}
                targets = full.run_all(layer, block)
                file = task.folder and task.folder / f"block-{layer}.safetensors"
                report = self._step_reporter(task.progress, layer, len(blocks))
                packed, seconds = _read_block(file, own, task.grid.axis, loaded.device, report)
                task.cache.saved_seconds += seconds
                if not packed and own:
                    start_time = time.perf_counter()
                    learned = _learnable_matrices(loaded, own, task.rows, task.grid)
                    learning = _LearnableBlock(loaded.model, block, f"{prefix}.{layer}", learned)
                    _learn(
                        learning,
                        quantized_stream,
                        layer,
                        targets,
                        self.steps,
                        task.calibration.seed,
                        report,
                    )
                    packed = {m: matrix.pack() for m, matrix in learned.items()}
                    _write_block(file, packed, time.perf_counter() - start_time)
                install(quantized, packed)
                quantized_stream.hidden, full.hidden = (
                    quantized_stream.run_all(layer, copies[layer]),
                    targets,
                )
        total = len(blocks) * self.steps
        task.progress(total, total, "quantized")
        return quantized

    def _step_reporter(self, progress: Progress, layer: int, layers: int) -> Callable[..., None]:
        """Return a callback that reports a layer's step out of all layers' steps, or a message."""

        def report(step: int, message: str = "") -> None:
            text = message or f"layer {layer + 1} of {layers}, step {step} of {self.steps}"
            progress(layer * self.steps + step, layers * self.steps, text)

        return report


def _initial_inputs(loaded: LoadedModel, ids: Tensor) -> tuple[_BlockInputs, _BlockInputs]:
    """Return the first block's inputs for the full-precision and for the quantized model."""
    sequences = [ids[k : k + 1].clone() for k in range(min(len(ids), SEQUENCES))]
    calls, hidden = record_calls(loaded, sequences)
    return _BlockInputs(hidden, calls), _BlockInputs(list(hidden), calls)


def _learnable_matrices(
    loaded: LoadedModel,
    choice: Mapping[Matrix, Config],
    rows: HighImpactRows,
    grid: GridSettings,
) -> dict[Matrix, LearnedMatrix]:
    learned = {}
    for matrix, config in choice.items():
        weight = get_weight(loaded.model, matrix)
        check_finite(weight, matrix.name)
        low = config if isinstance(config, QuantConfig) else config.low
        check_range(weight, low, grid.axis, matrix.name)
        own = rows.get(matrix.name)
        learned[matrix] = LearnedMatrix(weight, config, own, grid.axis, grid.metadata)
    return learned


@torch.enable_grad()
def _learn(
    block: _LearnableBlock,
    stream: _BlockInputs,
    layer: int,
    targets: list[Tensor],
    steps: int,
    seed: int,
    report: Callable[[int], None],
) -> None:
    """Minimize the block's relative squared output error with Adam, one sequence per step."""
    rounding = [m.rounding for m in block.learned.values() if m.rounding is not None]
    clipping = [m.clipping for m in block.learned.values()]
    groups = [
        {"params": [p for part in rounding for p in part.parameters()], "lr": _ROUNDING_RATE},
        {"params": [p for part in clipping for p in part.parameters()], "lr": _CLIPPING_RATE},
    ]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]])
    energy = sum(float(t.double().square().mean()) for t in targets) / len(targets)
    order = torch.Generator().manual_seed(seed)
    for step in range(steps):
        report(step)
        number = int(torch.randint(len(targets), (1,), generator=order))
        output = stream.run(layer, block, number)
        loss = (output.float() - targets[number].float()).square().mean() / energy
        gamma = _gamma(step, steps)
        if rounding and gamma is not None:
            loss = loss + _REGULARIZER_WEIGHT * sum(
                part.rounding_regularizer(gamma) for part in rounding
            ) / len(rounding)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _gamma(step: int, steps: int) -> float | None:
    """Return γ of the regularizer at a step: None during warm-up, then from 20 down to 2.

    >>> _gamma(0, 10), _gamma(2, 10), _gamma(9, 10)
    (None, 20.0, 2.0)
    """
    free = int(_WARMUP_FRACTION * steps)
    if step < free:
        return None
    start, end = _GAMMA
    return start + (end - start) * (step - free) / max(steps - free - 1, 1)


# --- checkpoints -----------------------------------------------------------------------------


def _write_block(file: Path | None, packed: Mapping[Matrix, StoredMatrix], seconds: float) -> None:
    if file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{matrix.name}/{name}": tensor.detach().cpu().contiguous()
        for matrix, own in packed.items()
        for name, tensor in own.tensors.items()
    }
    header = {"seconds": repr(seconds), "format": str(FORMAT_VERSION)}
    write_bytes(file, save(tensors, metadata=header))


def _read_block(
    file: Path | None,
    choice: Mapping[Matrix, Config],
    axis: int,
    device: str,
    report: Callable[..., None],
) -> tuple[dict[Matrix, StoredMatrix], float]:
    """Load a block's checkpoint and the seconds it took to learn, or nothing if there is none.

    A damaged file is deleted, and its block is learned again.
    """
    if file is None or not file.is_file():
        return {}, 0.0
    try:
        return _load_block(file, choice, axis, device)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        report(0, f"{file} is damaged ({exception_reason(error)}), so its block is learned again")
        file.unlink(missing_ok=True)
        return {}, 0.0


def _load_block(
    file: Path, choice: Mapping[Matrix, Config], axis: int, device: str
) -> tuple[dict[Matrix, StoredMatrix], float]:
    tensors: dict[str, dict[str, Tensor]] = {}
    with safe_open(file, "pt", device) as saved:
        header = saved.metadata() or {}
        if header.get("format", "2") != str(FORMAT_VERSION):  # has another layout
            return {}, 0.0
        seconds = float(header["seconds"])
        for key in saved.keys():  # noqa: SIM118
            module, _, name = key.rpartition("/")
            tensors.setdefault(module, {})[name] = saved.get_tensor(key)
    packed = {}
    for matrix, config in choice.items():
        kind = stored_matrix_class("hybrid", config)
        packed[matrix] = kind.from_tensors(tensors[matrix.name], matrix.shape, config, axis)
    return packed, seconds
