"""Refined plans: every step of each, so that a search can continue from the last one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from lsq_core.bits import Budget
from lsq_core.errors import LsqError
from lsq_core.jsontext import json_text
from lsq_core.planning.request import PlanRequest
from lsq_core.provenance import now
from lsq_core.refinement.step import RefinementStep
from lsq_core.store.connection import DatabaseFile, insert_row

#: Fields of a request, besides start and budget, that restrict the plans a search considers.
_RESTRICTIONS = ("pins", "ties", "serve")
#: A budget is in nominal or in planned bytes; the other column is NULL.
_WITHIN = "nominal_bytes IS NOT DISTINCT FROM ? AND planned_bytes IS NOT DISTINCT FROM ?"


@dataclass(frozen=True)
class RefinementKey:
    """Identifies a search by the profile, starting method and restrictions of its plan."""

    profile: str
    request: str

    @classmethod
    def of(cls, profile: str, request: PlanRequest) -> RefinementKey:
        """Return the key of a request's search; its budget is not part of it."""
        fields = asdict(request)
        restrictions = {name: fields[name] for name in _RESTRICTIONS}
        return cls(profile, json_text({"start": request.refined_from} | restrictions))


class RefinementTables(DatabaseFile):
    """The steps of all searches."""

    def save_refinement_step(
        self,
        key: RefinementKey,
        conditions: dict,
        budget: Budget,
        step: RefinementStep,
        options: Sequence[str],
        provenance: dict,
    ) -> None:
        """Store a step of the search within a budget, replacing any stored step with its number.

        ``conditions`` describe what its divergence was measured on and in which dtype; ``options``
        are the names of the configurations that its choice and cost refer to.

        Raises
        ------
        LsqError
            If another search has stored a later or better step in the meantime.
        """
        columns = asdict(key) | {
            "conditions": json_text(conditions),
            "nominal_bytes": budget.nominal_bytes,
            "planned_bytes": budget.planned_bytes,
            "step": step.number,
        }
        same = f"profile = ? AND request = ? AND conditions = ? AND {_WITHIN}"
        *search, number = columns.values()
        with self.transaction() as connection:
            (ahead,) = connection.execute(
                f"SELECT count(*) FROM refinements WHERE {same} AND (step > ? OR kl < ?)",
                [*search, number, step.kl],
            ).fetchone()
            if ahead:
                raise LsqError(
                    "Another search within this budget has found a better plan in the meantime; "
                    "refine again to continue from it."
                )
            connection.execute(
                f"DELETE FROM refinements WHERE {same} AND step = ?", [*search, number]
            )
            insert_row(
                connection,
                "refinements",
                **columns,
                choice=step.choice.tolist(),
                kl=step.kl,
                expected=step.expected,
                margin=step.margin,
                cost=step.cost.ravel().tolist(),
                options=list(options),
                rounds=step.rounds,
                failed=step.failed,
                provenance=json_text(provenance),
                created=now(),
            )

    def refinement_budgets(self, key: RefinementKey) -> list[Budget]:
        """Return the budgets within which a search found a better plan, the newest last."""
        with self.connect() as connection:
            rows = connection.execute(
                "SELECT nominal_bytes, planned_bytes FROM refinements "
                "WHERE profile = ? AND request = ? AND step > 0 GROUP BY ALL ORDER BY max(created)",
                list(asdict(key).values()),
            ).fetchall()
        return [Budget("", *row) for row in rows]

    def refinement_steps(
        self,
        key: RefinementKey,
        budget: Budget,
        options: Sequence[str],
        conditions: dict | None = None,
    ) -> list[RefinementStep]:
        """Return the steps within a budget in order; steps with other options are left out.

        The conditions default to those of the newest search that found a better plan, or of the
        newest search if none did.
        """
        columns = f"profile = ? AND request = ? AND {_WITHIN} AND options = ?"
        values = [*asdict(key).values(), *_bytes(budget), list(options)]
        newest = (
            f"(SELECT last(conditions ORDER BY step > 0, created) FROM refinements WHERE {columns})"
        )
        with self.connect() as connection:
            rows = connection.execute(
                "SELECT step, choice, kl, cost, margin, expected, rounds, failed FROM refinements "
                f"WHERE {columns} AND conditions = coalesce(?, {newest}) ORDER BY step",
                [*values, None if conditions is None else json_text(conditions), *values],
            ).fetchall()
        return [
            RefinementStep(number, np.array(choice), kl, _as_table(cost, len(choice)), *rest)
            for number, choice, kl, cost, *rest in rows
        ]


def _bytes(budget: Budget) -> tuple[float | None, float | None]:
    return budget.nominal_bytes, budget.planned_bytes


def _as_table(flat: Sequence[float], rows: int) -> np.ndarray:
    return np.array(flat, dtype=float).reshape(rows, -1)
