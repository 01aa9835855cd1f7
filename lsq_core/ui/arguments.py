"""The command lines that jobs run and that a person can copy."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from lsq_core.model import ModelSource
from lsq_core.pipeline import EvaluationRequest
from lsq_core.plan import PlanRequest
from lsq_core.profile import ProfileSettings

#: Fields of a plan request that are options with a value.
_VALUES = ("base", "budget", "boost_stop", "top_m", "metric", "seed")


def model_arguments(source: ModelSource, device: str) -> list[str]:
    """Which model, and on which device."""
    words = ["--model", source.name, "--device", device]
    words += ["--revision", source.revision] if source.revision else []
    words += ["--trust-remote-code"] if source.trust_remote_code else []
    return words + (["--allow-pickle"] if source.allow_pickle else [])


def profile_arguments(settings: ProfileSettings) -> list[str]:
    """The options of ``profile``."""
    words = ["--corpus", settings.calibration, "--quantizer", settings.quantizer]
    return words + _grid(settings)


def _grid(settings: ProfileSettings) -> list[str]:
    return [
        *("--axis", str(settings.axis), "--metadata", settings.metadata),
        *("--samples", str(settings.samples), "--block-tokens", str(settings.block_tokens)),
    ]


def plan_arguments(request: PlanRequest, settings: ProfileSettings) -> list[str]:
    """The options of ``plan`` and ``run`` that say what to plan; defaults are left out."""
    default = asdict(PlanRequest(request.method))
    words = ["--method", request.method]
    for field in _VALUES:
        value = getattr(request, field)
        if value != default[field]:
            words += [f"--{field.replace('_', '-')}", str(value)]
    words += ["--exact"] if request.exact else []
    for pin in request.pins:
        words += ["--pin", pin]
    words += ["--calibration", settings.calibration, "--profile-quantizer", settings.quantizer]
    return words + _grid(settings)


def evaluation_arguments(
    request: EvaluationRequest, quantizer: str, save: Path | None
) -> list[str]:
    """The options of ``run`` that say how to quantize, what to evaluate on and what to keep."""
    words = ["--quantizer", quantizer, "--corpus", request.corpus, "--protocol", request.protocol]
    words += ["--max-tokens", str(request.max_tokens)] if request.max_tokens else []
    return words + (["--save", str(save)] if save else [])
