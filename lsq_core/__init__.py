"""LSQ Explorer's library: layer-sensitive mixed-precision quantization of language models.

    import lsq_core as lsq

    session = lsq.Session("demo")
    plan = session.plan("mxq", budget="3.2bpp")
    quantized = session.quantize(plan)
    print(session.evaluate(quantized, corpus="stdlib"))

The public names are imported when they are first used, so importing this package takes a few
milliseconds and imports neither torch nor Streamlit.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from lsq_core.version import __version__

if TYPE_CHECKING:
    from lsq_core.errors import InputError, LsqError
    from lsq_core.evaluation.protocol import EvaluationRequest
    from lsq_core.model.source import ModelSource
    from lsq_core.planning.plan import Plan
    from lsq_core.planning.request import PlanRequest
    from lsq_core.profiling.profile import Profile
    from lsq_core.profiling.settings import ProfileSettings
    from lsq_core.quantized.artifact import load_quantized
    from lsq_core.session import Session
    from lsq_core.stages.run import QuantizedRun, RunResult
    from lsq_core.store.store import Store

_MODULES = {
    "EvaluationRequest": "evaluation.protocol",
    "InputError": "errors",
    "LsqError": "errors",
    "ModelSource": "model.source",
    "Plan": "planning.plan",
    "PlanRequest": "planning.request",
    "Profile": "profiling.profile",
    "ProfileSettings": "profiling.settings",
    "QuantizedRun": "stages.run",
    "RunResult": "stages.run",
    "Session": "session",
    "Store": "store.store",
    "load_quantized": "quantized.artifact",
}

__all__ = [
    "EvaluationRequest",
    "InputError",
    "LsqError",
    "ModelSource",
    "Plan",
    "PlanRequest",
    "Profile",
    "ProfileSettings",
    "QuantizedRun",
    "RunResult",
    "Session",
    "Store",
    "__version__",
    "load_quantized",
]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'lsq_core' has no attribute '{name}'")
    return getattr(import_module(f"lsq_core.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
