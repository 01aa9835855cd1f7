"""Checks of weights before quantization: all must be finite, and none far too large."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lsq_core.bits import QuantConfig, is_divisible
from lsq_core.errors import LsqError
from lsq_core.quantization.base import to_groups

#: A matrix is refused if its largest weight exceeds that of a typical group by more than this
#: factor: the typical group's scale would not be a normal fp16 number next to the other's.
_MAX_SCALE_RATIO = 2.0**29


def check_finite(weight: Tensor, name: str) -> None:
    """Raise :class:`LsqError` naming the matrix if a weight is NaN or infinite."""
    bad = int(_count_not_finite(weight))
    if bad:
        raise LsqError(
            f"{name} holds {bad} NaN or infinite weights, so it cannot be quantized; "
            "check how the checkpoint was saved."
        )


def check_range(weight: Tensor, config: QuantConfig, axis: int, name: str) -> None:
    """Raise :class:`LsqError` if the range of a matrix's scales exceeds that of fp16.

    This is the case if its largest weight is further from a typical group's than in any language
    model: no common factor makes both scales fit in fp16.
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
    """Apply :func:`check_finite` and :func:`check_range` to several matrices.

    Waits for the device only once if all pass. ``weights`` are keyed by name; group sizes that do
    not divide a matrix are skipped.
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
    """Return the largest weight, and that of a typical group, which is NaN if all are zero."""
    groups = to_groups(weight, group_size, axis).abs().amax(1)
    return groups.amax(), torch.where(groups > 0, groups, torch.nan).nanmedian()
