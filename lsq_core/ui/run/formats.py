"""The format in which the Run page saves a model, and the model's size in it."""

from __future__ import annotations

from dataclasses import replace

from lsq_core.errors import LsqError
from lsq_core.exports.weights.registry import CROSSING, FORMATS, LSQ, ExportTarget
from lsq_core.planning.request import PlanRequest
from lsq_core.quantization.registry import incompatibility_reason
from lsq_core.stages.export import prepare_plan_export
from lsq_core.stages.model import OpenModel
from lsq_core.ui import cached, cached_plans, state
from lsq_core.ui.page import PageContext
from lsq_core.ui.safe import st

#: Short labels of the ways to handle groups that cross rows.
_CROSSING_TITLES = {
    "refuse": "refuse the plan",
    "split": "smaller groups",
    "full": "full precision",
}


def select_format() -> ExportTarget | None:
    """Show the choice of the format to save in; None for this project's own."""
    columns = st.columns([1.6, 1.6, 3.8])
    name = columns[0].selectbox(
        "Format",
        list(FORMATS),
        format_func=lambda name: FORMATS[name].title,
        key="save_format",
        persist_state="session",
        help=" ".join(f"**{f.title}**: for {f.programs}." for f in FORMATS.values()),
    )
    if not FORMATS[name].groups_in_rows:
        return None if name == LSQ else ExportTarget(name)
    crossing = columns[1].selectbox(
        "Groups that cross rows",
        list(CROSSING),
        format_func=_CROSSING_TITLES.get,
        key="save_crossing",
        persist_state="session",
        help="Other formats keep groups within a row. For matrices whose rows the groups do not "
        "fill: "
        + "; ".join(f"*{_CROSSING_TITLES[n]}*: {text}" for n, text in CROSSING.items())
        + ".",
    )
    return ExportTarget(name, crossing)


def describe(
    ctx: PageContext, request: PlanRequest, quantizer: str, target: ExportTarget
) -> tuple[str, str]:
    """Return how a plan is stored in a format and in how many bytes, and why it can't be.

    At least one of them is ''; both are if the plan, or a remote model's files, are not known
    before the run.
    """
    info, settings = ctx.info, state.plan_settings()
    if not ctx.source.is_local:
        return "", ""
    try:
        profile = cached.planning_profile(ctx.store, info, settings, ctx.device)
        rows = cached_plans.extra_measurements(ctx.store, info, settings, request, ctx.device)
        plan = cached_plans.plan(info, profile, request, settings, rows)
    except LsqError:  # reported by the plan itself
        return "", ""
    if incompatibility_reason(quantizer, plan.choice, plan.axis):
        return "", ""
    model = OpenModel(ctx.source, ctx.store, ctx.device)
    try:
        prepared = prepare_plan_export(model, replace(plan, quantizer=quantizer), target)
    except LsqError as error:
        return "", str(error)
    return f"{prepared.note}.", ""
