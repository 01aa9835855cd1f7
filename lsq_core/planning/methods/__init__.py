"""Planning methods. Nothing here imports torch.

A new method is one file in this package and one entry in ``PLANNERS``: its class declares what
the command line, pages and charts need to know of it (:class:`.base.Planner`).
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
from lsq_core.planning.methods.kl_aware import KlAware
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
        KlAware(),
        HighImpact(),
    )
}


def get_planner(name: str) -> Planner:
    """Return the planner of that name.

    Raises
    ------
    InputError
        If there is none.
    """
    if name not in PLANNERS:
        raise InputError(f"'{name}' is not a method; choose one of {', '.join(PLANNERS)}.")
    return PLANNERS[name]


def reads_field(method: str, field: str) -> bool:
    """Return whether a method reads a field of a request; no method of another program does."""
    return method in PLANNERS and field in PLANNERS[method].fields


def mixes_rows(method: str) -> bool:
    """Return whether a method gives the rows of a matrix different bits."""
    return method in PLANNERS and PLANNERS[method].reads_rows
