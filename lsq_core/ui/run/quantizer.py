"""Quantizers as choices on the page, with the reasons why some can't run."""

from __future__ import annotations

from collections.abc import Iterable

from lsq_core.errors import LsqError
from lsq_core.planning.problem import Problem
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.quantization.registry import QUANTIZERS, incompatibility_reason, unavailable_reason
from lsq_core.stages.plan import budget_excess, request_incompatibility
from lsq_core.ui import cached, cached_plans
from lsq_core.ui.page import PageContext

#: Quantizers offered for a run; learned rounding also with fewer steps, as a preview.
RUN_QUANTIZERS = [*QUANTIZERS, "hybrid-500", "hybrid-50"]


def label(name: str) -> str:
    """Return a quantizer's name, marked if it can't run on this machine."""
    return f"{name} (not available here)" if unavailable_reason(name) else name


def reasons(names: Iterable[str]) -> str:
    """Return why some of these quantizers can't run on this machine; '' if all can."""
    return " ".join(dict.fromkeys(filter(None, (unavailable_reason(name) for name in names))))


def describe_quantizers(names: Iterable[str]) -> str:
    """Return the help text for choosing among these quantizers."""
    steps = QUANTIZERS["hybrid"].steps
    hybrid_note = (
        f"hybrid learns rounding and clipping block by block, {steps:,} steps each as published, "
        "which takes hours on a CPU. hybrid-500 and hybrid-50 take fewer."
    )
    return " ".join(filter(None, (reasons(names), hybrid_note)))


def run_incompatibility(
    ctx: PageContext, request: PlanRequest, settings: ProfileSettings, quantizer: str
) -> str:
    """Return why a quantizer can't store a request's plan, as far as known before a run.

    The reason is worded as on the command line; '' if there is none, or the request itself is
    invalid.
    """
    try:
        reason = request_incompatibility(
            Problem(ctx.info.matrices), request, quantizer, settings.axis
        )
        profile = cached.planning_profile(ctx.store, ctx.info, settings, ctx.device)
        rows = cached_plans.extra_measurements(ctx.store, ctx.info, settings, request, ctx.device)
        plan = cached_plans.plan(ctx.info, profile, request, settings, rows)
        reason = reason or incompatibility_reason(quantizer, plan.choice, settings.axis)
        return reason or budget_excess(plan, quantizer)
    except LsqError:  # reported by the plan itself
        return ""
