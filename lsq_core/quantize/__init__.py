"""Quantizers, the packed storage they fill, and models made of it.

A new quantizer is one file beside these and one entry in ``QUANTIZERS``.

Load a saved quantized model in a script of your own with::

    from lsq_core.quantize.artifact import load_quantized
    quantized = load_quantized("my-model")
    quantized.model(**quantized.tokenizer("Hello", return_tensors="pt"))
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lsq_core.errors import InputError

if TYPE_CHECKING:
    from lsq_core.quantize.base import Quantizer

#: Names on the command line and in the app; the classes are imported when asked for.
QUANTIZERS = {"hqq": "lsq_core.quantize.hqq:Hqq", "rtn": "lsq_core.quantize.rtn:Rtn"}


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
