"""JSON as the standard has it, for the command line, the store and jobs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from lsq_core.files import write_bytes


def json_text(content: object, indent: int | None = None, ascii: bool = False) -> str:
    """``content`` as JSON text: NaN and infinities become null, dates and paths text.

    With ``ascii`` every other character is escaped, which says the same.
    """
    return json.dumps(_plain(content), indent=indent, default=str, ensure_ascii=ascii)


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


def json_bytes(content: object) -> bytes:
    """``content`` as a JSON file in UTF-8; names that no encoding can write are escaped."""
    try:
        return json_text(content, indent=1).encode("utf8")
    except UnicodeEncodeError:
        return json_text(content, indent=1, ascii=True).encode("ascii")


def write_json(path: Path, content: object) -> None:
    """Write a JSON file whole; raises as :func:`lsq_core.files.atomic_writer`."""
    write_bytes(path, json_bytes(content))
