"""Quantizers as a person chooses them: those that can't run say so, and why."""

from __future__ import annotations

from collections.abc import Iterable

from lsq_core.errors import LsqError
from lsq_core.planning.problem import Problem
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.quantization.registry import QUANTIZERS, refusal, unavailable
from lsq_core.stages.plan import refusal_of
from lsq_core.ui import cached
from lsq_core.ui.page import Here

#: What a run can be quantized by: learned rounding in fewer steps as well, which is a taste of it.
RUN_QUANTIZERS = [*QUANTIZERS, "hybrid-500", "hybrid-50"]


def label(name: str) -> str:
    """The name, with a word where the quantizer can't run on this machine."""
    return f"{name} (can't run here)" if unavailable(name) else name


def reasons(names: Iterable[str]) -> str:
    """Why some of these can't run on this machine; '' where all can."""
    return " ".join(dict.fromkeys(filter(None, (unavailable(name) for name in names))))


def about_quantizers(names: Iterable[str]) -> str:
    """What a person should know before choosing among them."""
    steps = QUANTIZERS["hybrid"].steps
    learned = (
        f"hybrid learns rounding and clipping block by block, {steps:,} steps each as published: "
        "hours on a CPU. With fewer, its name tells how many."
    )
    return " ".join(filter(None, (reasons(names), learned)))


def why_not(here: Here, request: PlanRequest, settings: ProfileSettings, quantizer: str) -> str:
    """Why a quantizer can't make the plan of a request, as far as that is known before a run.

    The same sentence that the command line gives; '' where nothing stands against it, or the
    request itself is wrong.
    """
    try:
        reason = refusal_of(Problem(here.info.matrices), request, quantizer, settings.axis)
        found = cached.profile(here.store, here.info, settings, here.device)
        rows = cached.impact(here.store, here.info, settings, request, here.device)
        plan = cached.plan(here.info, found, request, settings, rows)
        return reason or refusal(quantizer, plan.choice, settings.axis)
    except LsqError:  # the plan says its own trouble
        return ""
