"""The store: models, profiles, plans, runs and evaluations in one DuckDB file."""

from __future__ import annotations

from lsq_core.store.profiles import ProfileTables
from lsq_core.store.published import PublishedTables
from lsq_core.store.refinements import RefinementTables
from lsq_core.store.results import ResultTables
from lsq_core.store.runs import RunTables
from lsq_core.store.shipped import ShippedTables
from lsq_core.store.tasks import TaskTables


class Store(
    ProfileTables,
    RefinementTables,
    RunTables,
    ResultTables,
    TaskTables,
    PublishedTables,
    ShippedTables,
):
    """The database of this project; each base class has the methods for some tables."""
