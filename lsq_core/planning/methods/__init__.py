"""Planning methods. Nothing here imports torch.

To add a method, add one file to this package and one entry to ``PLANNERS``. Its class declares
what the command line, pages and charts need (:class:`.base.Planner`).
"""

from __future__ import annotations

from lsq_core.bits import PAPER
from lsq_core.errors import choose
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
from lsq_core.planning.methods.rank import KurtBoostRank, SensiBoostRank
from lsq_core.planning.methods.refined import Refined
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
        SensiBoostRank(),
        KurtBoostRank(),
        Mxq(),
        KurtScaled(),
        SensiMilp(),
        KurtMilp(),
        SensiKnapsack(),
        LossAware(),
        KlAware(),
        Refined(),
        HighImpact(),
    )
}


def get_planner(name: str) -> Planner:
    """Return the planner with the given name.

    Raises
    ------
    InputError
        If there is no such planner.
    """
    return choose(PLANNERS, name, "a method")


def reads_field(method: str, field: str) -> bool:
    """Return whether a method reads a field of a request; False for methods of other programs."""
    return method in PLANNERS and field in PLANNERS[method].fields


def mixes_rows(method: str) -> bool:
    """Return whether a method gives rows of the same matrix different bit widths."""
    return method in PLANNERS and PLANNERS[method].reads_rows


def ladder_of(method: str, wanted: str) -> str:
    """Return the wanted ladder if the method supports it or is unknown, else the paper's."""
    planner = PLANNERS.get(method)  # unknown methods are rejected when the plan is made
    return wanted if planner is None or wanted in planner.ladders else PAPER
