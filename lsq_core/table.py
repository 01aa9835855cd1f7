"""Short plain-text tables for the reprs of objects."""

from __future__ import annotations

from collections.abc import Mapping


def short_table(title: str, rows: Mapping[str, object]) -> str:
    """Format a title and one line for each row that has a value.

    >>> print(short_table("Plan", {"method": "mxq", "base": None, "bits": 3.2}))
    Plan
      method  mxq
      bits    3.2
    """
    present = {name: str(value) for name, value in rows.items() if value not in (None, "")}
    width = max(map(len, present), default=0)
    return "\n".join([title, *(f"  {name:<{width}}  {text}" for name, text in present.items())])
