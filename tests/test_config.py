"""The ladder, the sizes of its configurations, and budgets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lsq_core.bits import (
    EXTENDED_LADDER,
    LADDER,
    Budget,
    QuantConfig,
    fp16_metadata_bytes,
    is_divisible,
    nominal_bytes,
    stop_index,
    weight_only_bytes,
)
from lsq_core.errors import InputError
from lsq_core.quantization.registry import planned_bytes


def test_ladder_has_twelve_stops():
    names = ["2.13", "2.25", "2.51", "3.13", "3.25", "3.51"]
    names += ["4.13", "4.25", "4.51", "8.13", "8.25", "8.51"]
    assert [c.stop_name for c in LADDER] == names
    assert [stop_index(n) for n in names] == list(range(12))
    assert [stop_index(c.name) for c in LADDER] == list(range(12))


def test_nominal_bits_formula():
    assert QuantConfig(3, 128).nominal_bits == 3 + 2 * 8 / 128 + 32 / (128 * 128)
    assert QuantConfig(4, 64).nominal_bits == 4 + 2 * 8 / 64 + 32 / (64 * 128)


def test_nominal_bytes_matches_published_size():
    """The authors give 6.25390625 MiB for a 4096×4096 matrix at 3.13 bits."""
    assert nominal_bytes(4096 * 4096, QuantConfig(3, 128)) == 6.25390625 * 2**20


@pytest.mark.parametrize("config", EXTENDED_LADDER, ids=lambda c: c.name)
def test_config_name_round_trip(config):
    assert QuantConfig.parse(config.name) == config


@pytest.mark.parametrize("text", ["b7g64", "b5g16", "b4g16", "4g64", "b4", "", "b4g64x", "4.25"])
def test_parse_config_invalid_name_raises(text):
    with pytest.raises(InputError, match="not a configuration"):
        QuantConfig.parse(text)


@given(st.integers(1, 64), st.integers(1, 64), st.sampled_from(EXTENDED_LADDER))
def test_planned_bytes_exceed_nominal_by_zero_ranges(rows, columns, config):
    """Planned bytes count ranges for scales *and* zeros, and for a partial last metadata group.

    Two more bytes hold the power of two shared by a matrix's scales.
    """
    shape, numel = (rows, 128 * columns), rows * columns * 128
    groups = numel // config.group_size
    extra = planned_bytes("hqq", shape, config, "8bit") - 2 - nominal_bytes(numel, config)
    assert 0 < extra <= 4 * groups / 128 + 8
    assert weight_only_bytes(numel, config) < nominal_bytes(numel, config)
    assert planned_bytes("hqq", shape, config, "fp16") == fp16_metadata_bytes(numel, config) + 2


def test_divides():
    assert is_divisible(172 * 64, 128)
    assert not is_divisible(172 * 172, 32)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("9MiB", 9 * 2**20), ("1.5GiB", 1.5 * 2**30), (" 800KiB", 800 * 1024)],
)
def test_budget_in_bytes_bounds_planned_bytes(text, expected):
    budget = Budget.parse(text, 1000)
    assert (budget.nominal_bytes, budget.planned_bytes) == (None, expected)


def test_budget_in_bits_bounds_nominal_bytes():
    budget = Budget.parse("3.2bpp", 1000)
    assert (budget.nominal_bytes, budget.planned_bytes) == (400, None)


@pytest.mark.parametrize("text", ["3.2", "bpp", "-1MiB", "0bpp", "9MB", "nanbpp", "1e3MiB", ""])
def test_budget_parse_invalid_raises(text):
    with pytest.raises(InputError, match="not a budget"):
        Budget.parse(text, 1000)


def test_stop_index_unknown_lists_ladder():
    with pytest.raises(InputError, match=r"2\.13, .*8\.51"):
        stop_index("3.14")


@pytest.mark.parametrize("stop", LADDER, ids=lambda c: c.stop_name)
def test_budget_parse_stop_name_is_exact_size(stop):
    """A stop's names and its displayed size mean its exact size; other numbers are literal."""
    four = round(stop.nominal_bits, 4)
    for text in (stop.stop_name, f"{stop.stop_name}bpp", stop.name, f" {stop.name} ", f"{four}bpp"):
        assert Budget.parse(text, 8).nominal_bytes == stop.nominal_bits
    number = f"{stop.stop_name}0bpp"
    assert Budget.parse(number, 8).nominal_bytes == float(stop.stop_name)
