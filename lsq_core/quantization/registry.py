"""Quantizers, the storage they fill, and models made of it.

A new quantizer is one file beside these and one entry in ``QUANTIZERS``, which says what can be
known of it without importing torch: what it supports, what it stores, whether it can run here.

Load a saved quantized model in a script of your own with::

    from lsq_core.quantized.artifact import load_quantized
    quantized = load_quantized("my-model")
    quantized.model(**quantized.tokenizer("Hello", return_tensors="pt"))
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from lsq_core.bits import LADDER, MIXED_ROW_CONFIGS, Config, MixedRows, QuantConfig, is_divisible
from lsq_core.errors import InputError
from lsq_core.paths import IN_CHECKOUT
from lsq_core.quantization import layout

if TYPE_CHECKING:
    from lsq_core.model.info import Matrix
    from lsq_core.quantization.base import MatrixQuantizer, StoredMatrix
    from lsq_core.quantization.task import ModelQuantizer


@dataclass(frozen=True)
class QuantizerSpec:
    """What is known of a quantizer before it is imported."""

    title: str
    #: Module and class.
    import_path: str
    #: Which tensors it stores a matrix in.
    layout: layout.Layout
    bits: tuple[int, ...] = (2, 3, 4, 8)
    #: Grouping axes, of :func:`lsq_core.quantization.base.to_groups`.
    axes: tuple[int, ...] = (0, 1)
    #: Optimisation steps that a matrix gets at most; 0 where the result comes at once.
    steps: int = 0
    #: Whether a name can ask for other steps, as ``hybrid-500`` does; so many take long.
    learned: bool = False
    #: Whether it reads calibration text and works on the whole model, not matrix by matrix.
    calibrated: bool = False
    #: Whether it takes linear modules alone, and stores their codes in words of 32 bits.
    words: bool = False
    #: Whether all matrices have to have the same configuration.
    uniform: bool = False
    #: The package it needs beside what every installation has for sure, and what brings it.
    package: str = ""
    install: str = ""

    @property
    def supports_metadata(self) -> bool:
        """Whether scale and zero are stored in a format that can be chosen."""
        return self.layout is layout.packed

    @property
    def supports_mixed_rows(self) -> bool:
        """Whether rows of a matrix can have different bits: this project's packing knows them."""
        return self.layout is layout.packed

    @property
    def configs(self) -> tuple[QuantConfig, ...]:
        """The stops of the ladder that it supports."""
        return tuple(config for config in LADDER if config.bits in self.bits)

    @property
    def options(self) -> tuple[Config, ...]:
        """All that it can give a matrix: those stops, and mixed rows where it takes them."""
        return self.configs + (MIXED_ROW_CONFIGS if self.supports_mixed_rows else ())


#: The Makefile and requirements.txt are in a checkout only.
_BITSANDBYTES = {
    "package": "bitsandbytes",
    "install": "pip install " + ("-r requirements.txt" if IN_CHECKOUT else "bitsandbytes"),
}
_GPTQMODEL_REQUIREMENTS = Path(__file__).parent / "gptqmodel" / "requirements.txt"
_GPTQMODEL = {
    "calibrated": True,
    "words": True,
    "package": "gptqmodel",
    "install": "make gptqmodel"
    if IN_CHECKOUT
    else f"pip install --no-deps -r {shlex.quote(str(_GPTQMODEL_REQUIREMENTS))}",
}

#: Names on the command line and in the app; the classes are imported when asked for.
QUANTIZERS = {
    "hqq": QuantizerSpec("HQQ", "lsq_core.quantization.hqq.quantizer:Hqq", layout.packed, steps=20),
    "rtn": QuantizerSpec("RTN", "lsq_core.quantization.rtn:Rtn", layout.packed),
    "nf4": QuantizerSpec(
        "NF4", "lsq_core.quantization.nf4:Nf4", layout.nf4, bits=(4,), axes=(1,), **_BITSANDBYTES
    ),
    "nf4-dq": QuantizerSpec(
        "NF4, double-quantized",
        "lsq_core.quantization.nf4:Nf4Double",
        layout.nf4_dq,
        bits=(4,),
        axes=(1,),
        **_BITSANDBYTES,
    ),
    "gptq": QuantizerSpec(
        "GPTQ",
        "lsq_core.quantization.gptqmodel.gptq:Gptq",
        layout.gptq,
        axes=(1,),
        **_GPTQMODEL,
    ),
    "awq": QuantizerSpec(
        "AWQ",
        "lsq_core.quantization.gptqmodel.awq:Awq",
        layout.awq,
        bits=(2, 3, 4),
        axes=(1,),
        uniform=True,
        **_GPTQMODEL,
    ),
    "hybrid": QuantizerSpec(
        "Hybrid",
        "lsq_core.quantization.hybrid:Hybrid",
        layout.packed,
        steps=5000,
        learned=True,
        calibrated=True,
    ),
}
#: Those that take a matrix by itself, so that a profile can be measured with them.
MATRIX_QUANTIZERS = tuple(
    name for name, quantizer_spec in QUANTIZERS.items() if not quantizer_spec.calibrated
)
#: Those that people compare with; learning takes hours and is for those who ask for it by name.
BASELINES = tuple(name for name, quantizer_spec in QUANTIZERS.items() if not quantizer_spec.learned)


def quantizer_spec(name: str) -> QuantizerSpec:
    """What is known of the quantizer of that name; ``hybrid-500`` is ``hybrid`` in 500 steps.

    Raises
    ------
    InputError
        When there is none.
    """
    if name in QUANTIZERS:
        return QUANTIZERS[name]
    match = re.fullmatch(r"(.+)-([1-9]\d*)", name)
    spec = QUANTIZERS.get(match[1]) if match else None
    if spec is None or not spec.learned:
        raise InputError(f"'{name}' is not a quantizer; choose one of {', '.join(QUANTIZERS)}.")
    return replace(spec, title=f"{spec.title}, {int(match[2]):,} steps", steps=int(match[2]))


def get_quantizer(name: str) -> MatrixQuantizer | ModelQuantizer:
    """The quantizer of that name.

    Raises
    ------
    InputError
        When there is none, or it cannot run here.
    """
    reason = unavailable_reason(name)
    if reason:
        raise InputError(reason)
    spec = quantizer_spec(name)
    return _quantizer_class(name)(*([spec.steps] if spec.learned else []))


def stored_matrix_class(name: str, config: Config) -> type[StoredMatrix]:
    """What a quantizer stores a matrix as; what it needs to quantize need not be here."""
    if isinstance(config, MixedRows):
        from lsq_core.quantization.rows import PackedRows

        return PackedRows
    return _quantizer_class(name).matrix


def _quantizer_class(name: str) -> type[MatrixQuantizer] | type[ModelQuantizer]:
    from importlib import import_module

    module, _, attribute = quantizer_spec(name).import_path.partition(":")
    return getattr(import_module(module), attribute)


def unavailable_reason(name: str) -> str:
    """Why a quantizer cannot run on this machine, in a sentence; '' where it can.

    Raises
    ------
    InputError
        When there is none of that name.
    """
    spec = quantizer_spec(name)
    if not spec.package or find_spec(spec.package) is not None:
        return ""
    return f"{spec.title} needs {spec.package}, which is not installed; {spec.install} adds it."


def incompatibility_reason(name: str, choice: Mapping[Matrix, Config], axis: int = 1) -> str:
    """Why a quantizer cannot make a plan's choice here, in a sentence; '' where it can.

    Told before any work, and the same in the app and on the command line.
    """
    spec, reason = quantizer_spec(name), unavailable_reason(name)
    if reason:
        return reason
    if axis not in spec.axes:
        return f"{spec.title} only groups weights along rows; plan with axis {spec.axes[0]}."
    for matrix, config in choice.items():
        reason = _matrix_incompatibility(spec, matrix, config)
        if reason:
            return reason
    different = sorted({config.name for config in choice.values()})
    if spec.uniform and len(different) > 1:
        return (
            f"{spec.title} takes one configuration for all matrices, and this plan has "
            f"{', '.join(different)}; use a uniform plan."
        )
    return ""


def _matrix_incompatibility(spec: QuantizerSpec, matrix: Matrix, config: Config) -> str:
    shape = f"{matrix.name} ({matrix.out_features}×{matrix.in_features})"
    if isinstance(config, MixedRows):
        return "" if spec.supports_mixed_rows else mixed_rows_incompatibility(spec)
    if config not in spec.configs:
        return (
            f"{spec.title} has no {config.name}, which the plan gives {matrix.name}; it supports "
            f"{', '.join(c.name for c in spec.configs)}."
        )
    if not spec.words:
        return ""
    if matrix.expert is not None:
        return (
            f"{spec.title} only takes linear modules, and {matrix.name} is one of a stack of "
            "experts; choose a quantizer that takes matrices one by one."
        )
    if not is_divisible(matrix.in_features, config.group_size):
        return (
            f"{spec.title} keeps groups within a row, and {shape} has rows that groups of "
            f"{config.group_size} do not fill; choose a smaller group size."
        )
    if not (is_divisible(matrix.out_features, 32) and is_divisible(matrix.in_features, 32)):
        return f"{spec.title} packs 32 codes at a time, and {shape} has no multiple of 32."
    return ""


def mixed_rows_incompatibility(spec: QuantizerSpec) -> str:
    """That a quantizer does not take mixed rows, and which ones do."""
    supporting = [name for name, other in QUANTIZERS.items() if other.supports_mixed_rows]
    return (
        f"{spec.title} gives all rows of a matrix the same bits, and this plan mixes them; "
        f"choose {', '.join(supporting[:-1])} or {supporting[-1]}."
    )


def check_choice(name: str, choice: Mapping[Matrix, Config], axis: int = 1) -> None:
    """Raise :class:`InputError` with the sentence of :func:`incompatibility_reason` where there
    is one.
    """
    reason = incompatibility_reason(name, choice, axis)
    if reason:
        raise InputError(reason)


@cache
def planned_bytes(name: str, shape: tuple[int, int], config: Config, metadata: str) -> int:
    """What a quantizer will store for an (out, in) matrix, exactly; a bias is not counted."""
    return layout.stored_bytes(quantizer_spec(name).layout(shape, config, metadata))


def arithmetic_packages(name: str) -> list[str]:
    """The packages whose releases may change what a quantizer stores for given weights."""
    spec = quantizer_spec(name)
    return ["hqq"] * spec.supports_metadata + [spec.package] * bool(spec.package)


def required_packages(names: Iterable[str]) -> list[str]:
    """The packages, beside those of every figure, that figures by these quantizers depend on."""
    found = [quantizer_spec(name).package for name in names]
    return list(dict.fromkeys(package for package in found if package))
