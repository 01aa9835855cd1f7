"""The tools that a plan can be exported to; a new one is a file in ``plans`` and a line here."""

from __future__ import annotations

from lsq_core.errors import choose
from lsq_core.exports.base import PlanTarget, Translation, translate
from lsq_core.exports.plans import (
    auto_round,
    compressed_tensors,
    exllamav3,
    gptqmodel,
    llama_cpp,
    mlx,
    modelopt,
    torchao,
)
from lsq_core.model.info import ModelInfo
from lsq_core.planning.plan import Plan

PLAN_TARGETS: dict[str, PlanTarget] = {
    module.TARGET.name: module.TARGET
    for module in (
        gptqmodel,
        llama_cpp,
        compressed_tensors,
        auto_round,
        mlx,
        modelopt,
        torchao,
        exllamav3,
    )
}


def plan_target(name: str) -> PlanTarget:
    """Return the target with this name.

    Raises
    ------
    InputError
        If there is none.
    """
    return choose(PLAN_TARGETS, name, "a tool that plans are written for")


def export_plan(plan: Plan, info: ModelInfo, target: str, nearest: bool = False) -> Translation:
    """Translate a plan for another tool; ``text`` is the file and ``usage()`` shows how to use it.

    With ``nearest``, the tool's nearest format replaces a planned configuration that it lacks.

    Raises
    ------
    InputError
        If there is no such tool, its names for the model's modules are not known, or, without
        ``nearest``, it cannot express the plan.
    """
    translation = translate(plan, info, plan_target(target))
    if not nearest:
        translation.check_exact()
    return translation
