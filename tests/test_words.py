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
