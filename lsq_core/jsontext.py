"""JSON as the standard has it, for the command line, the store and jobs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def json_text(content: object, indent: int | None = None) -> str:
    """``content`` as JSON text: NaN and infinities become null, dates and paths text."""
    return json.dumps(_plain(content), indent=indent, default=str, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):
        value = value.item()  # a NumPy scalar
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: Path, content: object) -> None:
    """Write a file that a reader sees either as it was or as it is, never half."""
    unfinished = path.with_name(f".{path.name}.new")
    unfinished.write_text(json_text(content, indent=1), "utf8")
    unfinished.replace(path)
