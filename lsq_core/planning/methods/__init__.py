"""Planning methods. Nothing here imports torch.

A new method is one file beside these and one entry in ``PLANNERS``.
"""

from __future__ import annotations

from lsq_core.errors import InputError
from lsq_core.planning.methods.base import Planner
from lsq_core.planning.methods.boost import (
    KurtBoost,
    KurtBoostAblation,
    SensiBoost,
    SensiBoostAblation,
)
from lsq_core.planning.methods.high_impact import HighImpact
from lsq_core.planning.methods.loss_aware import LossAware
from lsq_core.planning.methods.mxq import KurtMilp, KurtScaled, Mxq, SensiMilp
from lsq_core.planning.methods.sensi_knapsack import SensiKnapsack
from lsq_core.planning.methods.uniform import Uniform

PLANNERS: dict[str, Planner] = {
    planner.name: planner
    for planner in (
        Uniform(),
        SensiBoost(),
        KurtBoost(),
        SensiBoostAblation(),
        KurtBoostAblation(),
        Mxq(),
        KurtScaled(),
        SensiMilp(),
        KurtMilp(),
        SensiKnapsack(),
        LossAware(),
        HighImpact(),
    )
}


def get_planner(name: str) -> Planner:
    """The planner of that name.

    Raises
    ------
    InputError
        When there is none.
    """
    if name not in PLANNERS:
        raise InputError(f"'{name}' is not a method; choose one of {', '.join(PLANNERS)}.")
    return PLANNERS[name]
