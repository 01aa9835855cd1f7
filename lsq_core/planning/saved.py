"""Reading a plan's JSON. Every field is checked, so that a damaged file is reported."""

from __future__ import annotations

import json
import math
from base64 import b64decode, b64encode
from binascii import Error as Base64Error
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lsq_core.bits import METADATA_FORMATS, Config, MixedRows, config_from_json
from lsq_core.errors import InputError, exception_reason
from lsq_core.model.info import Matrix
from lsq_core.planning.request import PlanRequest
from lsq_core.quantization.registry import quantizer_spec


@dataclass(frozen=True)
class SavedPlan:
    """The contents of a plan's JSON, checked against and ordered like the model's matrices."""

    request: PlanRequest
    configs: tuple[Config, ...]
    metadata: str
    axis: int
    base: str | None
    ranking_scores: dict[str, float]
    notes: tuple[str, ...]
    objective: float | None
    lower_bound: float | None
    quantizer: str
    calibration: dict | None
    rows: dict[str, tuple[int, ...]]


def read_plan_file(path: Path) -> object:
    """Read the JSON of a plan file; :func:`read_plan` checks the content.

    Raises
    ------
    InputError
        If the file cannot be read or is not valid JSON.
    """
    try:
        return json.loads(path.read_text("utf8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:  # also numbers or nesting beyond Python's limits
        raise InputError(
            f"{path} is not a plan: it is not valid JSON ({exception_reason(error)})."
        ) from error


def read_plan(content: object, matrices: Sequence[Matrix]) -> SavedPlan:
    """Read the fields of :meth:`lsq_core.planning.plan.Plan.to_json` for these matrices.

    Sizes are not read, since the plan recomputes them; unknown fields are ignored.

    Raises
    ------
    InputError
        If a field is missing or invalid, the plan is for another model, or a configuration's groups
        don't fill its matrix.
    """
    if not isinstance(content, Mapping):
        raise _invalid_plan("it is not a JSON object")
    modules = _read_field(content, "modules", dict)
    request = PlanRequest.from_json(_read_field(content, "request", dict))
    metadata, axis = _read_field(content, "metadata", str), _read_field(content, "axis", int)
    if metadata not in METADATA_FORMATS:
        raise _invalid_plan(
            f"metadata must be one of {', '.join(METADATA_FORMATS)}, not '{metadata}'"
        )
    if axis not in (0, 1):
        raise _invalid_plan(f"axis is 0 or 1, not {axis}")
    different = {m.name for m in matrices} ^ set(modules)
    if different:
        raise InputError(
            f"The plan is for another model: {min(different)} is in only one of the two."
        )
    notes = _read_field(content, "notes", list, ())
    ranking_scores = _read_field(content, "flagged", dict, {})
    if not all(isinstance(note, str) for note in notes):
        raise _invalid_plan("some notes are not text")
    objective, bound = (_optional_number(content, name) for name in ("objective", "lower_bound"))
    if (objective is None) != (bound is None):
        raise _invalid_plan("it has only one of 'objective' and 'lower_bound'")
    quantizer = _read_field(content, "quantizer", str, "hqq")
    quantizer_spec(quantizer)
    return SavedPlan(
        request=request,
        configs=tuple(_config(modules[m.name], m) for m in matrices),
        metadata=metadata,
        axis=axis,
        base=_read_field(content, "base", str, None),
        ranking_scores={
            name: math.inf if z is None else _number(f"flagged {name}", z)  # inf is stored as null
            for name, z in ranking_scores.items()
        },
        notes=tuple(notes),
        objective=objective,
        lower_bound=bound,
        quantizer=quantizer,
        calibration=_read_field(content, "calibration", dict, None),
        rows={
            m.name: _decode_rows(modules[m.name], m) for m in matrices if "rows" in modules[m.name]
        },
    )


def _invalid_plan(why: str) -> InputError:
    return InputError(f"This is not a plan that LSQ Explorer wrote: {why}.")


#: Bound on the numbers in a file: a sum or difference of larger ones might overflow.
_MAX_NUMBER = 1e300
_REQUIRED = object()
_TYPE_NAMES = {dict: "an object", list: "a list", str: "text", int: "a whole number"}


def _read_field(content: Mapping, name: str, kind: type, default: object = _REQUIRED) -> object:
    """Return a field of the given type; a field with a default may be missing or null."""
    value = content.get(name, default)
    if value is _REQUIRED:
        raise _invalid_plan(f"'{name}' is missing")
    if value is default or (value is None and default is not _REQUIRED):
        return default
    if not isinstance(value, kind) or isinstance(value, bool):
        raise _invalid_plan(f"'{name}' is not {_TYPE_NAMES[kind]}")
    return value


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _invalid_plan(f"'{name}' is not a number")
    if not -_MAX_NUMBER < value < _MAX_NUMBER:  # also false for NaN
        raise _invalid_plan(f"'{name}' is not a finite number")
    return value


def _optional_number(content: Mapping, name: str) -> float | None:
    value = content.get(name)
    return None if value is None else _number(name, value)


def _config(entry: object, matrix: Matrix) -> Config:
    if not isinstance(entry, Mapping):
        raise _invalid_plan(f"the entry of {matrix.name} is not an object")
    mixed = "high_bits" in entry
    for name in ("bits", "group_size", *(("high_bits", "ratio") if mixed else ())):
        if name not in entry:
            raise _invalid_plan(f"'{name}' of {matrix.name} is missing")
        _number(f"{name} of {matrix.name}", entry[name])
    config = config_from_json(entry)
    if not config.fits(matrix):
        raise InputError(
            f"The plan gives {matrix.name} ({matrix.out_features}×{matrix.in_features}) "
            f"{config.name}, whose groups don't fill it."
        )
    return config


def encode_rows(rows: Sequence[int], matrix: Matrix) -> str:
    """Encode row numbers as a base64 bitmap of all rows, lowest bit first."""
    marked = np.zeros(matrix.out_features, dtype=np.uint8)
    marked[list(rows)] = 1
    return b64encode(np.packbits(marked, bitorder="little").tobytes()).decode("ascii")


def _decode_rows(entry: Mapping, matrix: Matrix) -> tuple[int, ...]:
    """Decode row numbers from :func:`encode_rows`, ascending, and check their count."""
    where, config = f"rows of {matrix.name}", config_from_json(entry)
    text = _read_field(entry, "rows", str)
    try:
        packed = np.frombuffer(b64decode(text, validate=True), dtype=np.uint8)
    except (Base64Error, ValueError) as error:
        raise _invalid_plan(f"{where} are not valid base64 ({error})") from error
    marked = np.flatnonzero(np.unpackbits(packed, bitorder="little"))
    count = config.high_rows(matrix.out_features) if isinstance(config, MixedRows) else 0
    if len(marked) != count or (count and marked[-1] >= matrix.out_features):
        raise _invalid_plan(f"{where} are not {count} of its {matrix.out_features}")
    return tuple(marked.tolist())
