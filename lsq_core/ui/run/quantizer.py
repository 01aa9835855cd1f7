"""Quantizers as a person chooses them: those that can't run say so, and why."""

from __future__ import annotations

from collections.abc import Iterable

from lsq_core.errors import LsqError
from lsq_core.planning.problem import Problem
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.quantization.registry import QUANTIZERS, incompatibility_reason, unavailable_reason
from lsq_core.stages.plan import budget_excess, request_incompatibility
from lsq_core.ui import cached
from lsq_core.ui.page import PageContext

#: What a run can be quantized by: learned rounding in fewer steps as well, which is a taste of it.
RUN_QUANTIZERS = [*QUANTIZERS, "hybrid-500", "hybrid-50"]


def label(name: str) -> str:
    """The name, with a word where the quantizer can't run on this machine."""
    return f"{name} (not available here)" if unavailable_reason(name) else name


def reasons(names: Iterable[str]) -> str:
    """Why some of these can't run on this machine; '' where all can."""
    return " ".join(dict.fromkeys(filter(None, (unavailable_reason(name) for name in names))))


def describe_quantizers(names: Iterable[str]) -> str:
    """What a person should know before choosing among them."""
    steps = QUANTIZERS["hybrid"].steps
    hybrid_note = (
        f"hybrid learns rounding and clipping block by block, {steps:,} steps each as published, "
        "which takes hours on a CPU. hybrid-500 and hybrid-50 take fewer."
    )
    return " ".join(filter(None, (reasons(names), hybrid_note)))


def run_incompatibility(
    ctx: PageContext, request: PlanRequest, settings: ProfileSettings, quantizer: str
) -> str:
    """Why a quantizer can't make the plan of a request, as far as that is known before a run.

    The same sentence that the command line gives; '' where nothing stands against it, or the
    request itself is wrong.
    """
    try:
        reason = request_incompatibility(
            Problem(ctx.info.matrices), request, quantizer, settings.axis
        )
        profile = cached.planning_profile(ctx.store, ctx.info, settings, ctx.device)
        rows = cached.measured(ctx.store, ctx.info, settings, request, ctx.device)
        plan = cached.plan(ctx.info, profile, request, settings, rows)
        reason = reason or incompatibility_reason(quantizer, plan.choice, settings.axis)
        return reason or budget_excess(plan, quantizer)
    except LsqError:  # the plan says its own trouble
        return ""
