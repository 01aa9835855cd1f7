"""Figures as people say them, and text that Markdown leaves alone."""

from __future__ import annotations

import math

import pytest

from lsq_core.ui import words


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0182, "+1.8 %"), (-0.094, "−9.4 %"), (-0.00001, "0.0 %"), (0.0, "0.0 %")],
)
def test_signed_percent(share, text):
    assert words.signed_percent(share) == text


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
