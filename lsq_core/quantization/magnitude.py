"""Powers of two, so that quantizing a matrix commutes with scaling it.

A transformer computes the same function when ``v_proj`` is divided by 2¹³ and ``o_proj`` multiplied
by it, so nothing here may depend on how large the weights of a matrix are. Two things would: the
half-quadratic solver, whose shrinking acts on errors of 0.17 and more, and fp16, which holds scales
between 6·10⁻⁵ and 65,504 alone. So

* a matrix is quantized at an ordinary size, its mean magnitude between 2⁻⁶ and 2⁻⁵. That is where
  weights of language models lie (σ of 0.02 to 0.04), so for them it changes nothing, and the
  solver's parameters are those of ``hqq``;
* its scales are stored with a power of two of their own, the largest between 2¹⁴ and 2¹⁵, which
  leaves fp16's whole precision for scales down to 2⁻²⁹ of the largest.

A power of two is exact in every floating-point format, so neither rounds anything.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Binary exponents (``frexp``'s) of a matrix's mean magnitude while it is quantized, and of the
#: largest number that is stored in fp16.
TARGET_EXPONENT, MAX_STORED_EXPONENT = -5, 15
#: What is added to the exponent of a normal float32 where it is stored.
_BIAS = 127


def normalizing_exponent(weight: Tensor) -> int:
    """The power of two that a matrix of any float dtype is divided by to have an ordinary size.

    It is found from the mean magnitude, which one outlier moves little; a matrix of zeros has 0.
    """
    return int(magnitude_exponent(weight))


def magnitude_exponent(weight: Tensor) -> Tensor:
    """:func:`normalizing_exponent` as int16 (1,) on the device, which is not waited for."""
    mean = weight.abs().mean(dtype=torch.float64).view(1)
    exponent = torch.frexp(mean).exponent - TARGET_EXPONENT
    return torch.where(mean > 0, exponent, 0).to(torch.int16)


def storage_exponent(values: Tensor) -> Tensor:
    """The power of two that values (…, n) are divided by to be stored in fp16.

    It is int16 (…, 1), on the device; 0 where all n are.
    """
    largest = values.abs().amax(-1, keepdim=True)
    exponent = torch.frexp(largest).exponent - MAX_STORED_EXPONENT
    return torch.where(largest > 0, exponent, 0).to(torch.int16)


def scale_by_power_of_two(values: Tensor, exponent: Tensor | int) -> Tensor:
    """``values · 2^exponent``, exact unless the result leaves the range of the dtype.

    In two steps: 2¹³⁰ is no float32, and 2⁻¹³⁰ no normal one, but both can be what is missing.
    """
    if isinstance(exponent, int):
        half = exponent // 2
        return values * 2.0**half * 2.0 ** (exponent - half) if exponent else values
    exponent = exponent.int()
    half = exponent >> 1
    return values * _power_of_two(half) * _power_of_two(exponent - half)


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in float32, put together from its bits: ``exp2`` need not be exact."""
    return (exponent + _BIAS << 23).view(torch.float32)
