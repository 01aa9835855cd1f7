"""Number formatting, and escaping text for Markdown."""

from __future__ import annotations

import math
import re

import pytest

from lsq_core.ui import words


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0182, "+1.8 %"), (-0.094, "−9.4 %"), (-0.00001, "0.0 %"), (0.0, "0.0 %")],
)
def test_signed_percent(share, text):
    assert words.signed_percent(share) == text


@pytest.mark.parametrize(
    ("number", "text"), [(999, "999"), (999_940, "999.9 k"), (999_999, "1.0 M"), (5642368, "5.6 M")]
)
def test_count_rounds_up_to_the_next_unit(number, text):
    assert words.count(number) == text


@pytest.mark.parametrize(
    ("bytes", "text"), [(1023, "1023 B"), (2**20 - 1, "1.0 MiB"), (2**20 - 1024, "1023.0 KiB")]
)
def test_size_rounds_up_to_the_next_unit(bytes, text):
    assert words.size(bytes) == text


@pytest.mark.parametrize("text", ["a :smile: b", ":heavy_check_mark:", ":material/home:", ":+1:"])
def test_escaped_text_has_no_shortcodes(text):
    shown = words.escape(text).replace("\\", "")
    assert not re.search(r":[\w+][\w/+-]*:", shown)
    assert shown.replace("\u2060", "") == text


def test_escaped_text_starts_no_numbered_list():
    assert words.escape("1. one\n 2) two\n3.5 bits") == "1\\. one\n2\\) two\n3.5 bits"


def test_percent_has_a_space():
    assert words.percent(0.0441) == "4.4 %"
    assert words.percent(-0.05, 0) == "−5 %"


def test_interval_or_too_few_windows():
    assert words.interval(0.015, 0.021) == "+1.50 % to +2.10 %"
    assert words.interval(None, None) == words.interval(math.nan, math.nan) == "too few windows"


@pytest.mark.parametrize(
    ("increase", "text"),
    [
        (0.018, "+1.8 % over full precision: close to full precision"),
        (-0.01, "−1.0 % over full precision: close to full precision"),
        (0.09, "+9.0 % over full precision: a small loss"),
        (0.49, "+49.0 % over full precision: a clear loss"),
        (1.9, "+190.0 % over full precision: a heavy loss"),
        (22.6, "23.6 × full precision: unusable, try more bits"),
        (math.inf, "not finite: unusable"),
        (None, "not finite: unusable"),
    ],
)
def test_loss_verdict_by_ratio(increase, text):
    assert words.loss_verdict(increase) == text
