"""Plans that use every configuration, for the demo model and for mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from lsq_core.bits import LADDER, Config
from lsq_core.model.info import Matrix, ModelInfo
from lsq_core.model.loading import inspect_model
from lsq_core.model.source import ModelSource
from lsq_core.planning.plan import Plan
from lsq_core.planning.request import PlanRequest

#: The demo model, and random mixtures of experts from ``tests.conftest``.
MODELS = ("demo", "mixtral-moe", "qwen2-moe")


@dataclass(frozen=True)
class Case:
    """A model and its folder."""

    info: ModelInfo
    folder: Path


def make_plan(info: ModelInfo, configs: Callable[[Matrix], Config], axis: int = 1) -> Plan:
    """Make a plan with the configuration that ``configs`` returns for each matrix."""
    matrices = info.matrices
    return Plan(PlanRequest("uniform"), matrices, tuple(map(configs, matrices)), axis=axis)


def mixed_plan(info: ModelInfo, options: tuple[Config, ...] = LADDER, *, experts_alike: bool):
    """Cycle through the options by matrix; ``experts_alike`` gives a stack of experts just one."""
    turns = cycle(options)
    by_stack: dict[str, Config] = {}

    def config(matrix: Matrix) -> Config:
        if matrix.expert is None or not experts_alike:
            return next(turns)
        stack = matrix.name.rpartition(".")[0]
        return by_stack.setdefault(stack, next(turns))

    return make_plan(info, config)


def load_case(folder: Path) -> Case:
    """Load the case of the model in a folder."""
    return Case(inspect_model(ModelSource(str(folder))), folder)
