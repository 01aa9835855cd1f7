"""Plans, runs and their evaluations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import duckdb

from lsq_core.errors import InputError
from lsq_core.jsontext import json_text
from lsq_core.provenance import evaluation_dependencies, now
from lsq_core.store.connection import DatabaseFile, insert_row, new_id

if TYPE_CHECKING:
    import pandas as pd

    from lsq_core.evaluation.result import Evaluation
    from lsq_core.planning.plan import Plan

#: Plan and run columns stored in a saved model's manifest.
_PLAN_COLUMNS = ("method", "bits_per_param", "nominal_bytes", "planned_bytes", "model_bytes")
_RUN_COLUMNS = ("method", "quantizer", "model_bytes", "device", "dtype")


class RunTables(DatabaseFile):
    """Plans, runs and evaluations, and the user's notes about them."""

    def save_plan(self, plan: Plan, fingerprint: str, profile: str | None, name: str = "") -> str:
        """Store a plan and return its id."""
        id = new_id()
        with self.transaction() as connection:
            insert_row(
                connection,
                "plans",
                id=id,
                name=name,
                fingerprint=fingerprint,
                profile=profile,
                method=plan.method,
                bits_per_param=plan.bits_per_param,
                nominal_bytes=plan.nominal_bytes,
                planned_bytes=plan.planned_bytes,
                model_bytes=plan.model_bytes,
                content=json_text(plan.to_json()),
                created=now(),
            )
        return id

    def plan_content(self, id: str) -> dict | None:
        """Return a stored plan as :meth:`lsq_core.planning.plan.Plan.to_json` gave it, or None."""
        row = self._fetch_row("SELECT content FROM plans WHERE id = ?", [id])
        return json.loads(row["content"]) if row else None

    def named_plans(self, fingerprint: str) -> pd.DataFrame:
        """Return a model's named plans, newest first: ``id, name``."""
        return self.query(
            "SELECT id, name FROM plans WHERE fingerprint = ? AND name <> '' ORDER BY created DESC",
            [fingerprint],
        )

    def save_run(self, id: str, run: dict, evaluations: list[Evaluation]) -> None:
        """Store a run and its evaluations in one transaction.

        ``run`` holds the columns of the table ``runs`` except ``id`` and ``created``. If the run
        exists, only missing evaluations are added; a deleted run is restored.
        """
        with self.transaction() as connection:
            if not connection.execute("SELECT 1 FROM runs WHERE id = ?", [id]).fetchone():
                insert_row(connection, "runs", id=id, created=now(), **run)
            connection.execute("UPDATE runs SET deleted = NULL WHERE id = ?", [id])
            for evaluation in evaluations:
                _add_evaluation(connection, evaluation, id, run["fingerprint"])

    def run(self, id: str) -> dict:
        """Return a run measured here: its columns, and ``content`` of its plan.

        ``source`` and ``revision`` of its model are included.

        Raises
        ------
        InputError
            If there is no such run, or it was published or shipped with the project.
        """
        row = self._fetch_row(
            "SELECT r.*, p.content, m.source, m.revision FROM runs r "
            "JOIN plans p ON r.plan = p.id LEFT JOIN models m ON r.fingerprint = m.fingerprint "
            "WHERE r.id = ? AND r.origin = 'measured'",
            [id],
        )
        if row is None:
            raise InputError(f"There is no run '{id}' in {self.path}; 'results' lists them.")
        return row | {"content": json.loads(row["content"])}

    def find_run_plan(self, run: str) -> str | None:
        """Return the id of a run's plan, or None if there is no such run."""
        row = self._fetch_row("SELECT plan FROM runs WHERE id = ?", [run])
        return row["plan"] if row else None

    def run_plan(self, run: str) -> tuple[dict, str] | None:
        """Return a run's plan as JSON and its model's fingerprint, or None if there is no such run.

        The JSON is empty if the plan was not published. Deleted runs are not found.
        """
        row = self._fetch_row(
            "SELECT p.content, r.fingerprint FROM runs r LEFT JOIN plans p ON r.plan = p.id "
            "WHERE r.id = ? AND r.deleted IS NULL",
            [run],
        )
        if row is None:
            return None
        return json.loads(row["content"] or "{}"), row["fingerprint"]

    def find_evaluations(self, fingerprint: str, method: str, quantizer: str) -> pd.DataFrame:
        """Return the columns that identify equal evaluations, one row per evaluation, newest first.

        Columns are ``run, origin, plan, content, device, dtype, versions, evaluation,
        corpus_sha256, protocol, provenance, kl``. Shipped runs come after the user's own; published
        and exported runs are left out. ``content`` is the plan's JSON; ``kl`` is NaN if the model
        was evaluated without full precision.
        """
        return self.query(
            "SELECT r.id AS run, r.origin, r.plan, CAST(p.content AS VARCHAR) AS content, "
            "r.device, r.dtype, CAST(r.versions AS VARCHAR) AS versions, e.id AS evaluation, "
            "e.corpus_sha256, e.protocol, CAST(e.provenance AS VARCHAR) AS provenance, e.kl "
            "FROM runs r JOIN plans p ON r.plan = p.id JOIN evaluations e ON e.run = r.id "
            "WHERE r.fingerprint = ? AND r.method = ? AND r.quantizer = ? AND r.format = 'lsq' "
            "AND r.origin <> 'published' AND r.deleted IS NULL "
            "ORDER BY r.origin = 'shipped', r.created DESC, e.created DESC",
            [fingerprint, method, quantizer],
        )

    def add_evaluation(
        self,
        manifest: dict,
        measured_bytes: int,
        folder: str,
        evaluation: Evaluation,
        exported: Mapping[str, object] | None = None,
    ) -> None:
        """Store an evaluation of a saved model with its run; an unknown run is added first.

        A deleted run is restored.

        ``manifest`` is from :func:`lsq_core.quantized.manifest.read_manifest`. For an export,
        ``exported`` holds the columns in which its run differs from the original run, including
        ``exported_from``.
        """
        run, fingerprint = manifest["run"], manifest["fingerprint"]
        with self.transaction() as connection:
            known = connection.execute("SELECT 1 FROM runs WHERE id = ?", [run]).fetchone()
            if not known:
                columns = {k: manifest[k] for k in _RUN_COLUMNS} | dict(exported or {})
                source = columns.get("exported_from", "")
                insert_row(
                    connection,
                    "runs",
                    id=run,
                    plan=_plan_of(connection, source) or _insert_plan(connection, manifest),
                    fingerprint=fingerprint,
                    measured_bytes=measured_bytes,
                    saved_to=folder,
                    versions=json_text(manifest["versions"]),
                    created=now(),
                    **columns,
                )
            connection.execute("UPDATE runs SET deleted = NULL WHERE id = ?", [run])
            _add_evaluation(connection, evaluation, run, fingerprint)

    def save_full_precision(self, fingerprint: str, evaluation: Evaluation) -> None:
        """Store a full-precision evaluation, unless an equal one is stored.

        Evaluations are equal if text, protocol, tokens, device, dtype and versions are. Unpaired
        evaluations of runs that match it in these are paired with it.
        """
        with self.transaction() as connection:
            if _matching_evaluations(connection, fingerprint, evaluation, "run IS NULL"):
                return
            full = _insert_evaluation(connection, evaluation, None, fingerprint)
            alone = "run IS NOT NULL AND full_precision IS NULL"
            connection.execute(
                "UPDATE evaluations SET full_precision = ?, pairing = 'measured' "
                "WHERE list_contains(?, id)",
                [full, _matching_evaluations(connection, fingerprint, evaluation, alone)],
            )

    def saved_folders(self) -> list[str]:
        """Return the folders that runs were saved to, whether or not they still exist."""
        frame = self.query("SELECT DISTINCT saved_to FROM runs WHERE saved_to IS NOT NULL")
        return frame["saved_to"].tolist()

    def set_saved_folder(self, run: str, folder: Path) -> None:
        """Record where a stored run's model was saved; does nothing for a run not stored yet."""
        self._execute("UPDATE runs SET saved_to = ? WHERE id = ?", [str(folder), run])

    def star(self, run: str, starred: bool) -> None:
        """Star or unstar a run."""
        self._execute("UPDATE runs SET starred = ? WHERE id = ?", [starred, run])

    def annotate(self, run: str, note: str) -> None:
        """Store a note with a run, replacing any previous one."""
        self._execute("UPDATE runs SET note = ? WHERE id = ?", [note.strip(), run])

    def delete_runs(self, runs: Sequence[str]) -> None:
        """Mark runs as deleted: they and their evaluations are left out everywhere until restored.

        Raises
        ------
        InputError
            If one of them was published: those change only by importing again.
        """
        with self.transaction() as connection:
            published = connection.execute(
                "SELECT count(*) FROM runs WHERE list_contains(?, id) AND origin = 'published'",
                [list(runs)],
            ).fetchone()[0]
            if published:
                raise InputError("A published run can't be deleted; only your own runs can.")
            connection.execute(
                "UPDATE runs SET deleted = ? WHERE list_contains(?, id) AND deleted IS NULL",
                [now(), list(runs)],
            )

    def restore_runs(self, runs: Sequence[str]) -> None:
        """Restore deleted runs with their evaluations, stars and notes."""
        self._execute("UPDATE runs SET deleted = NULL WHERE list_contains(?, id)", [list(runs)])

    def deleted_runs(self) -> pd.DataFrame:
        """Return the deleted runs, the last deleted first: ``run, model, method, deleted``.

        Runs deleted in one call have the same time ``deleted``.
        """
        return self.query(
            "SELECT r.id AS run, m.source AS model, r.method, r.deleted FROM runs r "
            "LEFT JOIN models m ON r.fingerprint = m.fingerprint "
            "WHERE r.deleted IS NOT NULL ORDER BY r.deleted DESC, r.id"
        )


def _plan_of(connection: duckdb.DuckDBPyConnection, run: str) -> str | None:
    """Return the id of a run's plan, or None if there is no such run."""
    row = connection.execute("SELECT plan FROM runs WHERE id = ?", [run]).fetchone()
    return row[0] if row else None


def _insert_plan(connection: duckdb.DuckDBPyConnection, manifest: dict) -> str:
    """Add the plan of a saved model and return its id."""
    plan = new_id()
    insert_row(
        connection,
        "plans",
        id=plan,
        fingerprint=manifest["fingerprint"],
        content=json_text(manifest),
        created=now(),
        **{k: manifest[k] for k in _PLAN_COLUMNS},
    )
    return plan


def _matching_evaluations(
    connection: duckdb.DuckDBPyConnection,
    fingerprint: str,
    evaluation: Evaluation,
    where: str,
    *parameters: object,
) -> list[str]:
    """Return the ids of evaluations of the same tokens, made in the same way, newest first.

    ``where`` is a further condition in SQL, with ``parameters``.
    """
    rows = connection.execute(
        "SELECT id, CAST(provenance AS VARCHAR) FROM evaluations WHERE fingerprint = ? "
        f"AND corpus_sha256 = ? AND protocol = ? AND tokens = ? AND {where} "
        "ORDER BY created DESC",
        [
            fingerprint,
            evaluation.corpus_sha256,
            evaluation.protocol,
            evaluation.tokens,
            *parameters,
        ],
    ).fetchall()
    made_with = evaluation_dependencies(evaluation.provenance)
    return [id for id, text in rows if evaluation_dependencies(json.loads(text)) == made_with]


def _add_evaluation(
    connection: duckdb.DuckDBPyConnection, evaluation: Evaluation, run: str, fingerprint: str
) -> None:
    """Add an evaluation to a run, unless the run has a matching one.

    Evaluations with KL divergence and those without (of saved models alone) do not match.
    """
    alone = "IS NULL" if evaluation.kl is None else "IS NOT NULL"
    if not _matching_evaluations(
        connection, fingerprint, evaluation, f"run = ? AND kl {alone}", run
    ):
        _insert_evaluation(connection, evaluation, run, fingerprint)


def _insert_evaluation(
    connection: duckdb.DuckDBPyConnection,
    evaluation: Evaluation,
    run: str | None,
    fingerprint: str,
) -> str:
    """Add an evaluation and return its id.

    The evaluation of a run is paired with the newest matching full-precision one, if there is one.
    """
    id = new_id()
    full = next(
        iter(_matching_evaluations(connection, fingerprint, evaluation, "run IS NULL")), None
    )
    insert_row(
        connection,
        "evaluations",
        id=id,
        full_precision=full if run else None,
        pairing="measured" if run and full else None,
        run=run,
        fingerprint=fingerprint,
        corpus=evaluation.corpus,
        corpus_sha256=evaluation.corpus_sha256,
        corpus_source=evaluation.corpus_source,
        truncated=evaluation.truncated,
        protocol=evaluation.protocol,
        tokens=evaluation.tokens,
        perplexity=evaluation.perplexity,
        kl=evaluation.kl,
        top1=evaluation.top1,
        divergence=json_text(asdict(evaluation.divergence)) if evaluation.divergence else None,
        tokens_per_second=evaluation.tokens_per_second,
        working_bytes=evaluation.working_bytes,
        seconds=json_text(evaluation.times),
        nll=evaluation.nll.tolist(),
        counts=evaluation.counts.tolist(),
        provenance=json_text(evaluation.provenance),
        created=now(),
    )
    return id
