"""Formatting of numbers and text for display."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from lsq_core.evaluation.noise import format_figure
from lsq_core.evaluation.result import UNUSABLE_RATIO
from lsq_core.profiling.metrics import METRICS
from lsq_core.units import GIB, MIB

#: From this share of a unit on, one decimal of the next smaller one rounds up to the unit.
_ROUNDS_UP = 0.99996


def count(number: float) -> str:
    """Format ``5642368`` as ``5.6 M``."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= _ROUNDS_UP * size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f}"


def size(bytes: float) -> str:
    """Format ``11308392`` as ``10.8 MiB``: one decimal, for sentences."""
    for unit, scale in (("GiB", GIB), ("MiB", MIB), ("KiB", 1024)):
        if bytes >= _ROUNDS_UP * scale:
            return f"{bytes / scale:.1f} {unit}"
    return f"{bytes:.0f} B"


def figure(value: float | None, decimals: int, noise: float | None = None) -> str:
    """Format a figure without digits below its noise; None, as JSON stores NaN, is not finite."""
    if value is None or not math.isfinite(value):
        return "not finite"
    return format_figure(value, noise, decimals)


def metric_label(name: str) -> str:
    """Format ``sensitivity_module`` as ``Sensitivity by module``, for controls."""
    label = METRICS[name].label
    return f"{label[0].upper()}{label[1:]}"


def metric_labels(names: Iterable[str]) -> str:
    """List metrics in a sentence: ``kurtosis and sensitivity by part``."""
    return listed([METRICS[name].label for name in names])


def rounded(value: float, digits: int = 3) -> str:
    """Format ``451097.3`` as ``451,000``: ``digits`` significant digits, large values in full."""
    rounded_value = float(f"{value:.{digits}g}")
    return (
        f"{rounded_value:,.0f}"
        if rounded_value >= 10 ** (digits - 1)
        else f"{rounded_value:.{digits}g}"
    )


def signed_percent(share: float | None, decimals: int = 1) -> str:
    """Format ``0.0182`` as ``+1.8 %``, with a true minus sign, and no sign if it rounds to zero."""
    if share is None or not math.isfinite(share):
        return "not finite"
    rounded = round(100 * share, decimals)
    return f"{rounded:+.{decimals}f} %".replace("-", "−") if rounded else f"{0:.{decimals}f} %"


#: Upper limits of the ratio of perplexity to full precision, and their verdicts.
_VERDICTS = (
    (1.02, "close to full precision"),
    (1.1, "a small loss"),
    (1.5, "a clear loss"),
    (UNUSABLE_RATIO, "a heavy loss"),
)


def loss_verdict(increase: float | None) -> str:
    """Rate a relative increase of perplexity: ``+5.0 % over full precision: a small loss``.

    Beyond :data:`lsq_core.evaluation.result.UNUSABLE_RATIO` the model is called unusable, and the
    ratio is given instead of a percentage.
    """
    if increase is None or not math.isfinite(increase):
        return "not finite: unusable"
    ratio = 1 + increase
    for limit, text in _VERDICTS:
        if ratio <= limit:
            return f"{signed_percent(increase)} over full precision: {text}"
    return f"{rounded(ratio)} × full precision: unusable, try more bits"


def percent(share: float, decimals: int = 1) -> str:
    """Format ``0.0441`` as ``4.4 %``."""
    return f"{100 * share:.{decimals}f} %".replace("-", "−")


def interval(low: float | None, high: float | None) -> str:
    """Format an interval as ``+1.50 % to +2.10 %``, or state that there is none."""
    if low is None or high is None or math.isnan(low):
        return "too few windows"
    return f"{signed_percent(low, 2)} to {signed_percent(high, 2)}"


#: Escaped characters, and those that start an image, a link, HTML, a formula or a directive.
_ACTIVE_MARKDOWN = re.compile(r"\\.|[\[\]<$]", re.DOTALL)
#: The start of URLs and addresses that Markdown autolinks even if escaped, up to the position at
#: which to break them.
_AUTOLINK = re.compile(r"(https?:|ftp:|\bwww|(?<=[\w.+-])@)(?=//|\.|(?<=@)[\w-]+\.)", re.IGNORECASE)
#: The start of a line that would make it a heading, a list, a quotation or a table.
_BLOCK_MARKER = re.compile(r"^[ \t]*(\d+(?=[.)]\s)|(?=[#>+=|-]))", re.MULTILINE)
#: The start of an emoji or icon, which Streamlit replaces even if escaped.
_SHORTCODE = re.compile(r":(?=[\w+][\w/+-]*:)")
#: Has zero width, and breaks the match of an autolink.
_WORD_JOINER = "\u2060"


def sanitize(markdown: str) -> str:
    """Disable links, images, HTML and formulas in Markdown; other formatting is kept.

    The function is idempotent, and escaped characters stay escaped.
    """
    escaped = _ACTIVE_MARKDOWN.sub(lambda m: m[0] if len(m[0]) > 1 else f"\\{m[0]}", markdown)
    return _AUTOLINK.sub(lambda m: m[0] + _WORD_JOINER, escaped)


def escape(text: str) -> str:
    """Escape text for Markdown, so that names and patterns appear verbatim."""
    broken = _SHORTCODE.sub(lambda m: m[0] + _WORD_JOINER, text)
    escaped = re.sub(r"([\\`*_\[\]$~<])", r"\\\1", broken)
    return sanitize(_BLOCK_MARKER.sub(lambda m: f"{m[1]}\\", escaped))


def seconds(time: float) -> str:
    """Format ``125`` as ``2 min 5 s``."""
    if time < 10:
        return f"{time:.1f} s"
    minutes, rest = divmod(round(time), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def plural(number: int, noun: str) -> str:
    """Format a number with its noun: ``1 run``, ``2 runs``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def listed(items: Sequence[object], most: int = 8) -> str:
    """List items as ``1, 2 and 30``; those beyond ``most`` are only counted."""
    words = [str(item) for item in items]
    if len(words) > most:
        words = [*words[:most], f"{len(words) - most} more"]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def name_layers(layers: Sequence[int]) -> str:
    """List layers as ``Layer 3`` or ``Layers 1 and 14``."""
    return f"Layer{'s' if len(layers) > 1 else ''} {listed(layers)}"
