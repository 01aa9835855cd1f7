"""The noise floor: how much a model's figures change with the arithmetic alone. Needs no torch.

The same weights on the same tokens give slightly different figures if sums are computed in another
order (other batches) or with more precision (a wider dtype). Smaller differences are not a property
of a plan.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lsq_core.evaluation.protocol import PROTOCOLS

#: Decimals of a displayed perplexity, if its noise justifies them.
DECIMALS = 4


@dataclass(frozen=True)
class Condition:
    """One way of computing the same figures, and its results.

    ``name`` describes the difference from the default. ``perplexity_full`` is full precision's;
    ``perplexity`` and ``kl`` (nats per token) are the plan's.
    """

    name: str
    perplexity_full: float
    perplexity: float
    kl: float


@dataclass(frozen=True)
class NoiseFloor:
    """How much a model's figures change with the arithmetic, for one protocol in one dtype.

    ``perplexity`` and ``kl`` are shares: the largest relative difference of any condition from the
    first, which is the default. ``plan`` describes the quantized plan in words. ``device`` is a
    device type, ``cpu`` or ``cuda``; ``tokens`` is the number of predicted tokens.
    """

    protocol: str
    device: str
    dtype: str
    corpus: str
    corpus_sha256: str
    tokens: int
    plan: str
    conditions: tuple[Condition, ...]
    provenance: Mapping[str, Any]

    @property
    def perplexity(self) -> float:
        """The largest relative difference in perplexity, of full precision or the plan."""
        usual, *others = self.conditions
        pairs = [
            (getattr(other, name), getattr(usual, name))
            for other in others
            for name in ("perplexity_full", "perplexity")
        ]
        return _largest_difference(pairs)

    @property
    def kl(self) -> float:
        """The largest relative difference in the plan's KL divergence."""
        usual, *others = self.conditions
        return _largest_difference([(other.kl, usual.kl) for other in others])

    def to_json(self) -> dict:
        """Return the values printed beside a figure: the shares, and what they were measured on."""
        kept = ("protocol", "device", "dtype", "corpus", "tokens", "plan")
        shares = {"perplexity": self.perplexity, "kl": self.kl}
        return shares | {name: getattr(self, name) for name in kept}


def _largest_difference(pairs: Sequence[tuple[float, float]]) -> float:
    return max(abs(other / usual - 1) for other, usual in pairs)


def format_noise(share: float) -> str:
    """Format a noise floor with one digit, rounded up: ``± 0.0002 %``.

    >>> format_noise(1.1e-6), format_noise(0.0036), format_noise(0.0)
    ('± 0.0002 %', '± 0.4 %', '± 0 %')
    """
    percent = 100 * share
    if not percent > 0:
        return "± 0 %"
    decimals = -math.floor(math.log10(percent))
    rounded = math.ceil(percent * 10**decimals - 1e-9) / 10**decimals
    return f"± {rounded:.{max(decimals, 0)}f} %"


def format_figure(value: float, noise: float | None, decimals: int = DECIMALS) -> str:
    """Format a figure without the digits that its noise (a share of it) makes meaningless.

    The last digit's unit is at least the noise. If the noise is unknown, or the figure is not
    finite, it has all ``decimals``.

    >>> format_figure(19.89123, 2e-6), format_figure(19.89123, 0.003), format_figure(511116.5, 2e-4)
    ('19.8912', '19.9', '511100')
    """
    absolute = 0.0 if noise is None or math.isnan(noise) else abs(value) * noise
    if not absolute > 0 or not math.isfinite(absolute):
        return f"{value:.{decimals}f}"
    meaningful = min(decimals, -math.ceil(math.log10(absolute)))
    return f"{round(value, meaningful):.{max(meaningful, 0)}f}"


def describe_noise(noise: Mapping[str, Any]) -> str:
    """Describe a noise floor from :meth:`NoiseFloor.to_json`, or return why there is none."""
    if "reason" in noise:
        return noise["reason"]
    return (
        f"{format_noise(noise['perplexity'])} (KL divergence {format_noise(noise['kl'])}; full "
        f"precision and {noise['plan']} on {noise['tokens']:,} tokens of {noise['corpus']}, in "
        "other batches and another dtype)"
    )


def describe_unknown(model: str, protocol: str, dtype: str) -> str:
    """Return a note that no noise floor was measured, with the command to measure it."""
    family = protocol.partition("-")[0]
    option = next((name for name in PROTOCOLS if name.partition("-")[0] == family), protocol)
    command = f"lsq noise --model {shlex.quote(model)} --protocol {option} --dtype {dtype}"
    return f"not measured ({command})"


def is_below_noise(share: float, noise: float | None) -> bool:
    """Return whether a relative difference is within the noise; False if that is unknown."""
    return noise is not None and not math.isnan(noise) and abs(share) <= noise
