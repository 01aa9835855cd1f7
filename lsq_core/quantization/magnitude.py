"""Scaling by powers of two, so that quantizing a matrix commutes with scaling it.

A transformer computes the same function when ``v_proj`` is divided by 2¹³ and ``o_proj`` multiplied
by it, so results must not depend on the magnitude of a matrix. Two things would depend on it: the
half-quadratic solver, whose shrinking affects errors of 0.17 and more, and fp16, which can only
store scales between 6·10⁻⁵ and 65,504. Therefore:

* a matrix is quantized at an ordinary magnitude, with a mean between 2⁻⁶ and 2⁻⁵. This is where
  weights of language models lie (σ of 0.02 to 0.04), so for them nothing changes, and the solver's
  parameters are those of ``hqq``;
* its scales are stored with their own power of two, the largest scale between 2¹⁴ and 2¹⁵, which
  leaves fp16's full precision for scales down to 2⁻²⁹ of the largest.

Powers of two are exact in every floating-point format, so neither step rounds anything.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Binary exponents (as returned by ``frexp``) of a matrix's mean magnitude while it is quantized,
#: and of the largest number stored in fp16.
TARGET_EXPONENT, MAX_STORED_EXPONENT = -5, 15
#: Exponent bias of float32.
_BIAS = 127


def normalizing_exponent(weight: Tensor) -> int:
    """Return the exponent of the power of two to divide a matrix by for an ordinary magnitude.

    It is based on the mean magnitude, which a single outlier hardly affects; 0 for a matrix of
    zeros. The matrix may have any float dtype.
    """
    return int(magnitude_exponent(weight))


def magnitude_exponent(weight: Tensor) -> Tensor:
    """Return :func:`normalizing_exponent` as int16 (1,) on the device, without waiting for it."""
    mean = weight.abs().mean(dtype=torch.float64).view(1)
    exponent = torch.frexp(mean).exponent - TARGET_EXPONENT
    return torch.where(mean > 0, exponent, 0).to(torch.int16)


def storage_exponent(values: Tensor) -> Tensor:
    """Return the exponent of the power of two to divide values (…, n) by to store them in fp16.

    The result is int16 (…, 1), on the device; 0 where all n values are 0.
    """
    largest = values.abs().amax(-1, keepdim=True)
    exponent = torch.frexp(largest).exponent - MAX_STORED_EXPONENT
    return torch.where(largest > 0, exponent, 0).to(torch.int16)


def scale_by_power_of_two(values: Tensor, exponent: Tensor | int) -> Tensor:
    """Return ``values · 2^exponent``, exact unless the result is outside the range of the dtype.

    It multiplies in two steps: a factor of 2¹³⁰ would overflow float32, and 2⁻¹³⁰ is subnormal.
    """
    if isinstance(exponent, int):
        half = exponent // 2
        return values * 2.0**half * 2.0 ** (exponent - half) if exponent else values
    exponent = exponent.int()
    half = exponent >> 1
    return values * _power_of_two(half) * _power_of_two(exponent - half)


def _power_of_two(exponent: Tensor) -> Tensor:
    """Return 2^exponent in float32, built from its bits because ``exp2`` may be inexact."""
    return (exponent + _BIAS << 23).view(torch.float32)
