"""The registry of quantizers.

A new quantizer is one file in this package and one entry in ``QUANTIZERS``, which describes its
configurations, its storage layout and the package it needs without importing torch.

To load a saved quantized model in your own script::

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

from lsq_core.bits import (
    EXTENDED_LADDER,
    MIXED_ROW_CONFIGS,
    Config,
    MixedRows,
    QuantConfig,
    get_ladder,
    is_divisible,
)
from lsq_core.errors import InputError
from lsq_core.paths import IN_CHECKOUT
from lsq_core.quantization import layout

if TYPE_CHECKING:
    from lsq_core.model.info import Matrix
    from lsq_core.quantization.base import MatrixQuantizer, StoredMatrix
    from lsq_core.quantization.task import ModelQuantizer


@dataclass(frozen=True)
class QuantizerSpec:
    """The description of a quantizer, available without importing its module."""

    title: str
    #: Module and class.
    import_path: str
    #: Layout of the tensors in which it stores a matrix.
    layout: layout.Layout
    bits: tuple[int, ...] = (2, 3, 4, 8)
    #: Supported grouping axes; see :func:`lsq_core.quantization.base.to_groups`.
    axes: tuple[int, ...] = (0, 1)
    #: Maximum optimization steps per matrix (per block if learned); 0 for closed-form quantizers.
    steps: int = 0
    #: Whether its name may set the steps, as in ``hybrid-500``.
    learned: bool = False
    #: Whether it uses calibration text and quantizes complete models instead of single matrices.
    calibrated: bool = False
    #: Whether it supports only linear modules and stores their codes in 32-bit words.
    words: bool = False
    #: Whether all matrices must have the same configuration.
    uniform: bool = False
    #: The optional package it needs, and the command that installs it.
    package: str = ""
    install: str = ""
    #: Colour and Plotly symbol for charts of its uniform plans as a baseline; none for HQQ, whose
    #: plans use the style of their method.
    color: str = ""
    symbol: str = ""

    @property
    def supports_metadata(self) -> bool:
        """Whether the format of scale and zero can be chosen."""
        return self.layout is layout.packed

    @property
    def supports_mixed_rows(self) -> bool:
        """Whether rows of a matrix can have different bits, as in this project's packing."""
        return self.layout is layout.packed

    @property
    def configs(self) -> tuple[QuantConfig, ...]:
        """The supported configurations, from the extended ladder, which contains all of them."""
        return tuple(config for config in EXTENDED_LADDER if config.bits in self.bits)

    def configs_on(self, ladder: str) -> tuple[QuantConfig, ...]:
        """Return the supported configurations of a ladder."""
        return tuple(config for config in get_ladder(ladder) if config.bits in self.bits)

    @property
    def options(self) -> tuple[Config, ...]:
        """All possible configurations of a matrix, including mixed rows if supported."""
        return self.configs + (MIXED_ROW_CONFIGS if self.supports_mixed_rows else ())


#: The Makefile and requirements.txt exist only in a checkout.
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

#: Quantizers by name on the command line and in the app; classes are imported on first use.
QUANTIZERS = {
    "hqq": QuantizerSpec(
        "HQQ",
        "lsq_core.quantization.hqq.quantizer:Hqq",
        layout.packed,
        bits=(1, 2, 3, 4, 5, 6, 8),
        steps=20,
    ),
    "rtn": QuantizerSpec(
        "RTN",
        "lsq_core.quantization.rtn:Rtn",
        layout.packed,
        bits=(1, 2, 3, 4, 5, 6, 8),
        color="#6E7B3A",
        symbol="triangle-left",
    ),
    "nf4": QuantizerSpec(
        "NF4",
        "lsq_core.quantization.nf4:Nf4",
        layout.nf4,
        bits=(4,),
        axes=(1,),
        color="#B0543C",
        symbol="star-triangle-down",
        **_BITSANDBYTES,
    ),
    "nf4-dq": QuantizerSpec(
        "NF4, double-quantized",
        "lsq_core.quantization.nf4:Nf4Double",
        layout.nf4_dq,
        bits=(4,),
        axes=(1,),
        color="#B0543C",
        symbol="star-triangle-down-open",
        **_BITSANDBYTES,
    ),
    "gptq": QuantizerSpec(
        "GPTQ",
        "lsq_core.quantization.gptqmodel.gptq:Gptq",
        layout.gptq,
        axes=(1,),
        color="#B8860B",
        symbol="cross",
        **_GPTQMODEL,
    ),
    "awq": QuantizerSpec(
        "AWQ",
        "lsq_core.quantization.gptqmodel.awq:Awq",
        layout.awq,
        bits=(2, 3, 4),
        axes=(1,),
        uniform=True,
        color="#2F8F8F",
        symbol="x",
        **_GPTQMODEL,
    ),
    "hybrid": QuantizerSpec(
        "Hybrid",
        "lsq_core.quantization.hybrid:Hybrid",
        layout.packed,
        steps=5000,
        learned=True,
        calibrated=True,
        color="#5B7F2B",
        symbol="bowtie-open",
    ),
}
#: Quantizers of single matrices, with which a profile can be measured.
MATRIX_QUANTIZERS = tuple(
    name for name, quantizer_spec in QUANTIZERS.items() if not quantizer_spec.calibrated
)
#: Quantizers that every comparison runs; learned ones take hours and run only on request.
BASELINES = tuple(name for name, quantizer_spec in QUANTIZERS.items() if not quantizer_spec.learned)


def quantizer_spec(name: str) -> QuantizerSpec:
    """Return the description of a quantizer; ``hybrid-500`` is ``hybrid`` with 500 steps.

    Raises
    ------
    InputError
        If there is no quantizer with that name.
    """
    if name in QUANTIZERS:
        return QUANTIZERS[name]
    match = re.fullmatch(r"(.+)-([1-9]\d*)", name)
    spec = QUANTIZERS.get(match[1]) if match else None
    if spec is None or not spec.learned:
        raise InputError(f"'{name}' is not a quantizer; choose one of {', '.join(QUANTIZERS)}.")
    return replace(spec, title=f"{spec.title}, {int(match[2]):,} steps", steps=int(match[2]))


def get_quantizer(name: str) -> MatrixQuantizer | ModelQuantizer:
    """Create the quantizer with that name.

    Raises
    ------
    InputError
        If there is no such quantizer, or its package is not installed.
    """
    reason = unavailable_reason(name)
    if reason:
        raise InputError(reason)
    spec = quantizer_spec(name)
    return _quantizer_class(name)(*([spec.steps] if spec.learned else []))


def stored_matrix_class(name: str, config: Config) -> type[StoredMatrix]:
    """Return the class of a quantizer's stored matrices; its optional package is not needed."""
    if isinstance(config, MixedRows):
        from lsq_core.quantization.rows import PackedRows

        return PackedRows
    return _quantizer_class(name).matrix


def _quantizer_class(name: str) -> type[MatrixQuantizer] | type[ModelQuantizer]:
    from importlib import import_module

    module, _, attribute = quantizer_spec(name).import_path.partition(":")
    return getattr(import_module(module), attribute)


def unavailable_reason(name: str) -> str:
    """Return why a quantizer cannot run on this machine, or an empty string if it can.

    Raises
    ------
    InputError
        If there is no quantizer with that name.
    """
    spec = quantizer_spec(name)
    if not spec.package or find_spec(spec.package) is not None:
        return ""
    return f"{spec.title} needs {spec.package}, which is not installed; {spec.install} adds it."


def incompatibility_reason(name: str, choice: Mapping[Matrix, Config], axis: int = 1) -> str:
    """Return why a quantizer cannot apply a plan, or an empty string if it can.

    The app and the command line check this before doing any work.
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
            f"{spec.title} needs a single configuration for all matrices, but this plan has "
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
            f"{spec.title} supports only linear modules, but {matrix.name} is part of a stack of "
            "experts; choose a quantizer that works on single matrices."
        )
    if not is_divisible(matrix.in_features, config.group_size):
        return (
            f"{spec.title} needs groups within a row, but groups of {config.group_size} do not "
            f"fill the rows of {shape}; choose a smaller group size, or have the plan made "
            "for gptqmodel (--serve gptqmodel)."
        )
    if not (is_divisible(matrix.out_features, 32) and is_divisible(matrix.in_features, 32)):
        return f"{spec.title} packs 32 codes at a time, and {shape} has no multiple of 32."
    return ""


def mixed_rows_incompatibility(spec: QuantizerSpec) -> str:
    """Return a message that a quantizer does not support mixed rows and which ones do."""
    supporting = [name for name, other in QUANTIZERS.items() if other.supports_mixed_rows]
    return (
        f"{spec.title} uses the same bits for all rows of a matrix, but this plan mixes them; "
        f"choose {', '.join(supporting[:-1])} or {supporting[-1]}."
    )


def check_choice(name: str, choice: Mapping[Matrix, Config], axis: int = 1) -> None:
    """Raise :class:`InputError` with the :func:`incompatibility_reason`, if there is one."""
    reason = incompatibility_reason(name, choice, axis)
    if reason:
        raise InputError(reason)


@cache
def planned_bytes(name: str, shape: tuple[int, int], config: Config, metadata: str) -> int:
    """Return the exact size in bytes of an (out, in) matrix stored by a quantizer, without bias."""
    return layout.stored_bytes(quantizer_spec(name).layout(shape, config, metadata))


def arithmetic_packages(name: str) -> list[str]:
    """Return the packages whose releases may change a quantizer's output for the same weights."""
    spec = quantizer_spec(name)
    return ["hqq"] * spec.supports_metadata + [spec.package] * bool(spec.package)


def required_packages(names: Iterable[str]) -> list[str]:
    """Return the optional packages that the results of these quantizers depend on."""
    packages = [quantizer_spec(name).package for name in names]
    return list(dict.fromkeys(package for package in packages if package))
