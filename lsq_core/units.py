"""Parsing and formatting sizes in bytes."""

from __future__ import annotations

import re
from math import inf

from lsq_core.errors import InputError

MIB = 2**20
GIB = 2**30
BYTE_UNITS = {"B": 1, "KiB": 1024, "MiB": MIB, "GiB": GIB}


def parse_bytes(text: str) -> int:
    """Parse a size such as ``512MiB``, ``2GiB`` or ``0B``.

    Raises
    ------
    InputError
        If the text is not a number with a unit of bytes.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(B|KiB|MiB|GiB)\s*", text)
    amount = float(match[1]) * BYTE_UNITS[match[2]] if match else inf
    if amount == inf:
        raise InputError(f"'{text}' is not a memory size; write for example 512MiB or 2GiB.")
    return int(amount)


def format_bytes_exactly(count: int) -> str:
    """Format bytes exactly, for :func:`parse_bytes`, in the largest unit that allows it.

    >>> format_bytes_exactly(52428800), format_bytes_exactly(52355399), format_bytes_exactly(1001)
    ('50MiB', '49.93MiB', '1001B')
    """
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", 1024)):
        for digits in range(4):
            text = f"{count / size:.{digits}f}"
            if count >= size and int(float(text) * size) == count:
                return f"{text}{unit}"
    return f"{count}B"


def format_bytes(count: float) -> str:
    """Format ``9437184`` as ``9.00 MiB``: binary units, two decimals."""
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", 1024)):
        if abs(count) >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"
