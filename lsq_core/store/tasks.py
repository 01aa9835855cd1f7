"""Scores of models on tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lsq_core.jsontext import json_text
from lsq_core.provenance import now
from lsq_core.store.connection import DatabaseFile, insert_row, new_id

if TYPE_CHECKING:
    import pandas as pd

    from lsq_core.tasks.request import TaskResult

#: Columns that must be equal for two results to be comparable.
_SAME = ("task", "version", "metric", "fewshot", "max_documents", "dataset", "device", "dtype")
#: The newest result of each kind, for full precision and each run that is not deleted.
_NEWEST = f"""
    SELECT t.run, r.method, {", ".join(f"t.{name}" for name in _SAME)}, t.value, t.stderr,
           t.higher_is_better, t.documents, t.created
    FROM (
        SELECT *, split_part(provenance ->> '$.device', ':', 1) AS device,
               provenance ->> '$.dtype' AS dtype
        FROM task_results
    ) t LEFT JOIN runs r ON r.id = t.run
    WHERE t.fingerprint = ? AND r.deleted IS NULL
    QUALIFY row_number() OVER (
        PARTITION BY t.run, {", ".join(f"t.{name}" for name in _SAME)} ORDER BY t.created DESC
    ) = 1
"""


class TaskTables(DatabaseFile):
    """Results of tasks, one row per metric."""

    def save_task_results(
        self, fingerprint: str, run: str | None, results: Sequence[TaskResult]
    ) -> None:
        """Store results of a run, or of the full-precision model if ``run`` is None."""
        with self.transaction() as connection:
            for result in results:
                insert_row(
                    connection,
                    "task_results",
                    id=new_id(),
                    run=run,
                    fingerprint=fingerprint,
                    task=result.task,
                    version=result.version,
                    metric=result.metric,
                    value=result.value,
                    stderr=result.stderr,
                    higher_is_better=result.higher_is_better,
                    fewshot=result.fewshot,
                    max_documents=result.limit,
                    documents=result.documents,
                    dataset=result.dataset,
                    provenance=json_text(dict(result.provenance)),
                    created=now(),
                )

    def task_results(self, fingerprint: str) -> pd.DataFrame:
        """Return the newest results of a model and its runs, each with that of full precision.

        One row for each run and metric: ``run`` (None for full precision), ``method, task,
        version, metric, fewshot, max_documents, dataset, device, dtype, value, stderr,
        higher_is_better, documents, created``, and ``full`` and ``full_stderr`` of full precision,
        measured on the same documents in the same way; NaN if it was not measured.
        """
        same = " AND ".join(f"f.{name} IS NOT DISTINCT FROM n.{name}" for name in _SAME)
        return self.query(
            f"WITH newest AS ({_NEWEST}) SELECT n.*, f.value AS full, f.stderr AS full_stderr "
            f"FROM newest n LEFT JOIN newest f ON f.run IS NULL AND {same} "
            "ORDER BY n.task, n.metric, n.run NULLS FIRST",
            [fingerprint],
        )
