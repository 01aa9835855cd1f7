"""Standard-conforming JSON for the command line, the store and jobs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from lsq_core.files import write_bytes


def json_text(content: object, indent: int | None = None, ascii: bool = False) -> str:
    """Return ``content`` as JSON text: NaN and infinities become null, dates and paths strings.

    With ``ascii``, non-ASCII characters are escaped.
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
    """Return ``content`` as UTF-8 JSON, escaped to ASCII if it cannot be encoded (surrogates)."""
    try:
        return json_text(content, indent=1).encode("utf8")
    except UnicodeEncodeError:
        return json_text(content, indent=1, ascii=True).encode("ascii")


def write_json(path: Path, content: object) -> None:
    """Write a JSON file atomically; raises as :func:`lsq_core.files.atomic_writer`."""
    write_bytes(path, json_bytes(content))
