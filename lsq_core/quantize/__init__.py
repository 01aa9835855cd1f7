"""Quantizers, the packed storage they fill, and models made of it.

A new quantizer is one file beside these and one entry in ``QUANTIZERS``.

Load a saved quantized model in a script of your own with::

    from lsq_core.quantize.artifact import load_quantized
    quantized = load_quantized("my-model")
    quantized.model(**quantized.tokenizer("Hello", return_tensors="pt"))
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lsq_core.errors import InputError

if TYPE_CHECKING:
    from lsq_core.quantize.base import Quantizer

#: Names on the command line and in the app; the classes are imported when asked for.
QUANTIZERS = {"hqq": "lsq_core.quantize.hqq:Hqq", "rtn": "lsq_core.quantize.rtn:Rtn"}


#: The learned rounding and clipping of :mod:`lsq_core.hybrid`, which is no quantizer of
#: single matrices: it works through a model block by block, on text.
HYBRID = "hybrid"
#: Its steps for each block ([C]); fewer are told by the name, as in ``hybrid-500``.
HYBRID_STEPS = 5000


def hybrid_steps(name: str) -> int | None:
    """The steps of ``hybrid`` or ``hybrid-500``; None for a quantizer of single matrices.

    Raises
    ------
    InputError
        When the name is neither.
    """
    match = re.fullmatch(rf"{HYBRID}(?:-([1-9]\d*))?", name)
    if match:
        return int(match[1] or HYBRID_STEPS)
    if name not in QUANTIZERS:
        raise InputError(
            f"'{name}' is not a quantizer; choose one of {', '.join([*QUANTIZERS, HYBRID])}."
        )
    return None


def get_quantizer(name: str) -> Quantizer:
    """The quantizer of that name.

    Raises
    ------
    InputError
        When there is none.
    """
    from importlib import import_module

    if name not in QUANTIZERS:
        raise InputError(f"'{name}' is not a quantizer; choose one of {', '.join(QUANTIZERS)}.")
    module, _, attribute = QUANTIZERS[name].partition(":")
    return getattr(import_module(module), attribute)()
