"""Figures as people say them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from lsq_core.evaluation.noise import format_figure
from lsq_core.evaluation.result import UNUSABLE_RATIO
from lsq_core.profiling.metrics import METRICS
from lsq_core.units import GIB, MIB


def count(number: float) -> str:
    """``5642368`` as ``5.6 M``."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f}"


def size(bytes: float) -> str:
    """``11308392`` as ``10.8 MiB``: one decimal, for sentences."""
    for unit, scale in (("GiB", GIB), ("MiB", MIB), ("KiB", 1024)):
        if bytes >= scale:
            return f"{bytes / scale:.1f} {unit}"
    return f"{bytes:.0f} B"


def figure(value: float | None, decimals: int, noise: float | None = None) -> str:
    """A figure with the digits that its noise leaves, or that it is not finite: JSON has none."""
    if value is None or not math.isfinite(value):
        return "not finite"
    return format_figure(value, noise, decimals)


def metric_label(name: str) -> str:
    """``sensitivity_module`` as ``Sensitivity by module``: a metric as a control lists it."""
    label = METRICS[name].label
    return f"{label[0].upper()}{label[1:]}"


def metric_labels(names: Iterable[str]) -> str:
    """Metrics as a sentence lists them: ``kurtosis and sensitivity by part``."""
    return listed([METRICS[name].label for name in names])


def rounded(value: float, digits: int = 3) -> str:
    """``451097.3`` as ``451,000``: so many significant digits, without an exponent."""
    rounded_value = float(f"{value:.{digits}g}")
    return (
        f"{rounded_value:,.0f}"
        if rounded_value >= 10 ** (digits - 1)
        else f"{rounded_value:.{digits}g}"
    )


def signed_percent(share: float | None, decimals: int = 1) -> str:
    """``0.0182`` as ``+1.8 %``, with a true minus sign, and none for what rounds to nothing."""
    if share is None or not math.isfinite(share):
        return "not finite"
    rounded = round(100 * share, decimals)
    return f"{rounded:+.{decimals}f} %".replace("-", "−") if rounded else f"{0:.{decimals}f} %"


#: Up to which perplexity over full precision (a ratio) a model is said to be what.
_VERDICTS = (
    (1.02, "close to full precision"),
    (1.1, "a small loss"),
    (1.5, "a clear loss"),
    (UNUSABLE_RATIO, "a heavy loss"),
)


def loss_verdict(increase: float | None) -> str:
    """What a relative increase of perplexity means: ``+1.8 %: close to full precision``.

    Beyond :data:`lsq_core.evaluation.result.UNUSABLE_RATIO` a model is said to be unusable, with
    the ratio in the place of a percentage.
    """
    if increase is None or not math.isfinite(increase):
        return "not finite: unusable"
    ratio = 1 + increase
    for limit, text in _VERDICTS:
        if ratio <= limit:
            return f"{signed_percent(increase)} over full precision: {text}"
    return f"{rounded(ratio)} × full precision: unusable, try more bits"


def percent(share: float, decimals: int = 1) -> str:
    """``0.0441`` as ``4.4 %``."""
    return f"{100 * share:.{decimals}f} %".replace("-", "−")


def interval(low: float | None, high: float | None) -> str:
    """``+1.50 % to +2.10 %``, or that there is none."""
    if low is None or high is None or math.isnan(low):
        return "too few windows"
    return f"{signed_percent(low, 2)} to {signed_percent(high, 2)}"


#: What an escape protects, and what begins an image, a link, HTML, a formula or a directive.
_ACTIVE_MARKDOWN = re.compile(r"\\.|[\[\]<$]", re.DOTALL)
#: Addresses that Markdown links without being asked, even where they are escaped: what comes
#: before, and what comes after, the place to break.
_AUTOLINK = re.compile(r"(https?:|ftp:|\bwww|(?<=[\w.+-])@)(?=//|\.|(?<=@)[\w-]+\.)", re.IGNORECASE)
#: The start of a line that makes it a heading, a list, a quotation or a table.
_BLOCK_MARKER = re.compile(r"^[ \t]*(?=[#>+=|-])", re.MULTILINE)
#: Takes no room, and breaks the word that it stands in.
_WORD_JOINER = "\u2060"


def sanitize(markdown: str) -> str:
    """Markdown of which nothing is left that links, fetches or is HTML; what is bold stays so.

    Once is as good as twice, and what was escaped stays escaped.
    """
    escaped = _ACTIVE_MARKDOWN.sub(lambda m: m[0] if len(m[0]) > 1 else f"\\{m[0]}", markdown)
    return _AUTOLINK.sub(lambda m: m[0] + _WORD_JOINER, escaped)


def escape(text: str) -> str:
    """Text in which Markdown finds nothing to format: names and patterns stay as they are."""
    escaped = re.sub(r"([\\`*_\[\]$~<])", r"\\\1", text)
    return sanitize(_BLOCK_MARKER.sub(r"\\", escaped))


def seconds(time: float) -> str:
    """``125`` as ``2 min 5 s``."""
    if time < 10:
        return f"{time:.1f} s"
    minutes, rest = divmod(round(time), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def plural(number: int, noun: str) -> str:
    """``1 run``, ``2 runs``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def listed(items: Sequence[object], most: int = 8) -> str:
    """``1, 2 and 30``; beyond ``most`` the number of the others."""
    words = [str(item) for item in items]
    if len(words) > most:
        words = [*words[:most], f"{len(words) - most} more"]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def name_layers(layers: Sequence[int]) -> str:
    """``Layer 3`` or ``Layers 1 and 14``."""
    return f"Layer{'s' if len(layers) > 1 else ''} {listed(layers)}"
