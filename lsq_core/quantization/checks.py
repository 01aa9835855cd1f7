"""Checks of weights before they are quantized: all finite, and none far too large."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lsq_core.bits import QuantConfig, is_divisible
from lsq_core.errors import LsqError
from lsq_core.quantization.base import to_groups

#: A matrix whose largest weight is so many times that of a typical group is refused: the typical
#: group's scale would be no normal fp16 number beside the other's.
_MAX_SCALE_RATIO = 2.0**29


def check_finite(weight: Tensor, name: str) -> None:
    """Raise :class:`LsqError` naming the matrix when a weight is NaN or infinite."""
    bad = int(_count_not_finite(weight))
    if bad:
        raise LsqError(
            f"{name} holds {bad} NaN or infinite weights, so it cannot be quantized; "
            "check how the checkpoint was saved."
        )


def check_range(weight: Tensor, config: QuantConfig, axis: int, name: str) -> None:
    """Raise :class:`LsqError` when the range of a matrix's scales exceeds that of fp16.

    This is when its largest weight is further from those of a typical group than in any language
    model: no common factor makes both scales fp16 numbers.
    """
    largest, typical = _group_magnitudes(weight, config.group_size, axis)
    if bool(typical * _MAX_SCALE_RATIO < largest):
        raise LsqError(
            f"{name} holds a weight of {float(largest):.3g} in one group of "
            f"{config.group_size} where the largest of a typical one is "
            f"{float(typical):.3g}: their scales are too far apart to be stored together; "
            "check how the checkpoint was saved."
        )


def check_weights(weights: Mapping[str, Tensor], configs: Iterable[QuantConfig], axis: int) -> None:
    """:func:`check_finite` and :func:`check_range` of several matrices, which wait for once.

    ``weights`` are by name; a matrix that a group size does not divide is not checked for it.
    """
    sizes = {config.group_size: config for config in configs}
    ranges = [
        (name, config)
        for name, weight in weights.items()
        for size, config in sizes.items()
        if is_divisible(weight.numel(), size)
    ]
    flags = [_count_not_finite(weight) > 0 for weight in weights.values()]
    for name, config in ranges:
        largest, typical = _group_magnitudes(weights[name].float(), config.group_size, axis)
        flags.append(typical * _MAX_SCALE_RATIO < largest)
    if not flags or not bool(torch.stack(flags).any()):
        return
    for name, weight in weights.items():
        check_finite(weight, name)
    for name, config in ranges:
        check_range(weights[name].float(), config, axis, name)


def _count_not_finite(weight: Tensor) -> Tensor:
    return (~torch.isfinite(weight)).sum()


def _group_magnitudes(weight: Tensor, group_size: int, axis: int) -> tuple[Tensor, Tensor]:
    """The largest weight, and that of a typical group; NaN where all weights are zero."""
    groups = to_groups(weight, group_size, axis).abs().amax(1)
    return groups.amax(), torch.where(groups > 0, groups, torch.nan).nanmedian()
