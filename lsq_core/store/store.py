"""Everything kept, in one DuckDB file: models, profiles, plans, runs, evaluations.

Connections are short, so that the app, jobs and the command line can share the file: DuckDB
allows one process at a time to write, and another waits its turn here.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np

from lsq_core import paths
from lsq_core.bits import RATIOS
from lsq_core.errors import InputError
from lsq_core.jsontext import json_text
from lsq_core.model.info import Matrix, ModelInfo
from lsq_core.profiling.profile import Profile
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.provenance import evaluation_dependencies, now
from lsq_core.store import database

if TYPE_CHECKING:
    import pandas as pd

    from lsq_core.evaluation.result import Evaluation
    from lsq_core.planning.plan import Plan
from lsq_core.store.schema import MIGRATIONS

#: Seconds to wait for another process to let go of the file.
LOCK_TIMEOUT_S = 20.0
#: Times that a transaction is tried which another thread's may have overtaken.
_ATTEMPTS = 20
#: What the fingerprint of a model without weights begins with: its measurements were published.
PUBLISHED = "published:"

#: Every evaluation of a quantized run that wasn't deleted, with full precision beside it.
_RESULTS_SQL = """
    SELECT e.id AS evaluation, r.id AS run, r.plan, m.source AS model, r.fingerprint,
           r.method, p.asked[1] ->> '$' AS base,
           p.bits_per_param, p.planned_bytes, r.measured_bytes, r.model_bytes,
           r.quantizer, e.corpus, e.corpus_sha256, e.truncated, e.protocol, e.tokens,
           e.perplexity, f.perplexity AS perplexity_full,
           e.perplexity / f.perplexity - 1 AS increase,
           e.full_precision, e.pairing, e.kl IS NULL AND r.origin = 'measured' AS saved_model,
           e.kl, e.top1, e.tokens_per_second, e.working_bytes, r.quantize_seconds,
           r.device, r.machine, r.dtype, r.saved_to,
           CAST(p.asked[2] AS VARCHAR) AS request, p.profile, p.asked[3] ->> '$' AS metadata,
           CAST(p.asked[4] ->> '$' AS INTEGER) AS axis, r.created, r.origin,
           r.starred, r.note
    FROM evaluations e
    JOIN runs r ON e.run = r.id
    LEFT JOIN (
        SELECT id, profile, bits_per_param, planned_bytes, json_extract(
            content, ['$.base', '$.request', '$.metadata', '$.axis']
        ) AS asked FROM plans
    ) p ON r.plan = p.id
    LEFT JOIN models m ON r.fingerprint = m.fingerprint
    LEFT JOIN evaluations f ON f.id = e.full_precision
    WHERE r.deleted IS NULL
"""


def database_path() -> Path:
    """Where the database is unless another is given: ``LSQ_DB``, or in the data folder."""
    path = os.environ.get("LSQ_DB") or paths.data_folder() / "lsq.duckdb"
    return database.resolve_database_path(path)


@dataclass(frozen=True)
class InteractionKey:
    """Which interactions: by which loss, of which widths and groups."""

    loss: str
    low_bits: int
    high_bits: int
    group_size: int


class Store:
    """One DuckDB file. Every method opens it, does its work and closes it again.

    Where several follow each other at once, :meth:`held` opens it once for all of them.

    Raises
    ------
    InputError
        When the file is not one of ours, or was written by a newer version.
    LsqError
        When another process keeps it for longer than ``LOCK_TIMEOUT_S`` seconds, or the disk is
        full.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = database.resolve_database_path(path) if path else database_path()
        if self.path.is_dir():
            raise InputError(f"{self.path} is a folder; give the path of a database file.")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.path.parent} cannot be created: {error.strerror}.") from error
        if not self.path.exists():
            database.create(self.path, self._migrate)
        with self.connect() as connection:
            self._migrate(connection)

    # --- the file ---------------------------------------------------------------------------

    @contextmanager
    def connect(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """A connection for the length of a ``with``; waits while another process has the file."""
        connection = database.connect(self.path, LOCK_TIMEOUT_S)
        try:
            with database.translate_duckdb_errors(self.path):
                yield connection
        finally:
            connection.close()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the file open for the length of a ``with``, so that methods within only use it.

        Opening takes forty times as long as a short question. Other processes wait meanwhile, so
        it is for what takes no longer than they do (``LOCK_TIMEOUT_S``).
        """
        _import_pandas()
        with self.connect():
            yield

    @contextmanager
    def transaction(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """A connection of which all or nothing is kept."""
        with self.connect() as connection:
            connection.begin()
            try:
                yield connection
                connection.commit()
            except BaseException:
                # A commit that failed, on a full disk say, has rolled back already.
                with suppress(duckdb.TransactionException):
                    connection.rollback()
                raise

    def _retry_transaction(self, work: Callable[[duckdb.DuckDBPyConnection], None]) -> None:
        """Do work in a transaction, again where another thread of this process was faster."""
        for attempt in range(_ATTEMPTS):
            try:
                with self.transaction() as connection:
                    return work(connection)
            except (duckdb.TransactionException, duckdb.ConstraintException):
                if attempt == _ATTEMPTS - 1:
                    raise
                time.sleep(random.uniform(0.01, 0.06))
        return None

    def _migrate(self, connection: duckdb.DuckDBPyConnection) -> None:
        version = database.schema_version(connection, self.path, len(MIGRATIONS))
        database.check_schema(connection, self.path, MIGRATIONS[:version])
        if version == len(MIGRATIONS):
            return
        if version and database.is_read_only(self.path):
            raise InputError(
                f"{self.path} is of an older LSQ Explorer (schema {version}) and can only be read, "
                "so it can't be brought up to date: make it and its folder writable."
            )
        connection.begin()
        try:
            connection.execute("CREATE TABLE IF NOT EXISTS schema_version (version INTEGER)")
            for number, script in enumerate(MIGRATIONS[version:], start=version + 1):
                connection.execute(script)
                connection.execute("INSERT INTO schema_version VALUES (?)", [number])
            connection.commit()
        except BaseException:
            # A commit that failed, on a full disk say, has rolled back already.
            with suppress(duckdb.TransactionException):
                connection.rollback()
            raise

    def query(self, sql: str, parameters: list | None = None) -> pd.DataFrame:
        """Rows of a SELECT as a data frame."""
        _import_pandas()
        with self.connect() as connection:
            return connection.execute(sql, parameters or []).df()

    def _fetch_row(self, sql: str, parameters: list) -> dict[str, Any] | None:
        with self.connect() as connection:
            cursor = connection.execute(sql, parameters)
            names = [column[0] for column in cursor.description]
            row = cursor.fetchone()
        return None if row is None else dict(zip(names, row, strict=True))

    # --- models -----------------------------------------------------------------------------

    def save_model(self, info: ModelInfo) -> None:
        """Keep what is known of a model, and the name it was asked for by.

        A model already there stays as it is, whatever its other names are.
        """
        if not info.fingerprint:
            raise ValueError("a model that was not fetched has no identity to be kept by")
        _import_pandas()
        with self.transaction() as connection:
            known = connection.execute(
                "SELECT 1 FROM models WHERE fingerprint = ?", [info.fingerprint]
            ).fetchone()
            if not known:
                _insert_model(connection, info)
            elif info.notes:
                connection.execute(
                    "UPDATE models SET notes = ? WHERE fingerprint = ?",
                    [list(info.notes), info.fingerprint],
                )
            connection.execute(
                "DELETE FROM model_names WHERE source = ? AND revision IS NOT DISTINCT FROM ?",
                [info.source, info.revision],
            )
            _insert(
                connection,
                "model_names",
                source=info.source,
                revision=info.revision,
                fingerprint=info.fingerprint,
                tokenizer=info.tokenizer,
                code=info.code,
                seen=now(),
            )

    def find_model_by_name(self, source: str, revision: str | None) -> tuple[str, str, str] | None:
        """(fingerprint, tokenizer, code) of the model last seen under a name and revision."""
        with self.connect() as connection:
            return connection.execute(
                "SELECT fingerprint, tokenizer, code FROM model_names "
                "WHERE source = ? AND revision IS NOT DISTINCT FROM ?",
                [source, revision],
            ).fetchone()

    def model(self, fingerprint: str) -> ModelInfo | None:
        """What is known of a model, or None."""
        with self.connect() as connection:
            row = self._fetch_row("SELECT * FROM models WHERE fingerprint = ?", [fingerprint])
            if row is None:
                return None
            matrices = connection.execute(
                "SELECT name, layer, type, out_features, in_features, expert FROM matrices "
                "WHERE fingerprint = ? ORDER BY position",
                [fingerprint],
            ).fetchall()
        return ModelInfo(
            source=row["source"],
            revision=row["revision"],
            architecture=row["architecture"],
            layers=row["layers"],
            context=row["context"],
            parameters=row["parameters"],
            file_bytes=row["file_bytes"],
            matrices=tuple(Matrix(*m) for m in matrices),
            left_out=tuple(row["left_out"]),
            tied_embeddings=row["tied_embeddings"],
            other_bytes=row["other_bytes"],
            fingerprint=fingerprint,
            config=json.loads(row["config"]),
            notes=tuple(row["notes"] or ()),
        )

    def models(self, origin: str = "measured") -> pd.DataFrame:
        """One row a model, newest first: ``measured`` ones, with weights, or ``published``."""
        return self.query(
            "SELECT * EXCLUDE (config) FROM models WHERE origin = ? ORDER BY created DESC",
            [origin],
        )

    # --- profiles ---------------------------------------------------------------------------

    def merge_profile(self, measured: Profile) -> None:
        """Add metrics to the profile of the same identity, in the place of the same ones.

        One that isn't there yet begins with them. Looking and writing are one transaction, so
        several processes and threads that measure one profile lose nothing of each other's.
        How each metric was measured is kept under its name in ``provenance["added"]``. Where the
        calibration text has become another one, as a dataset may at a revision that moves, the
        scores on the text before it are dropped: a profile is of one text.
        """
        self._retry_transaction(lambda connection: _merge_profile(connection, measured))

    def rekey_profile(self, old: str, new: str, same: Callable[[dict], bool]) -> bool:
        """Put what is kept under a profile's older identity under its new one; whether any was.

        ``same`` says of a provenance whether what was measured with it belongs there. Metrics
        that were added on another device, say, are dropped, and nothing is done where there is a
        profile under the new identity.
        """
        with self.connect() as connection:
            if not _has_profile_data(connection, old) or _has_profile_data(connection, new):
                return False
        with self.transaction() as connection:
            return _rekey_profile(connection, old, new, same)

    def profile(self, id: str) -> Profile | None:
        """A profile by its identity, or None."""
        with self.held():
            row = self._fetch_row("SELECT * FROM profiles WHERE id = ?", [id])
            if row is None:
                return None
            info = self.model(row["fingerprint"])
            values = self.query("SELECT * EXCLUDE (profile) FROM scores WHERE profile = ?", [id])
        return Profile(
            id=id,
            fingerprint=row["fingerprint"],
            settings=ProfileSettings(**json.loads(row["settings"])),
            matrices=info.matrices,
            values=values,
            provenance=json.loads(row["provenance"]),
        )

    def profiles(self, fingerprint: str) -> pd.DataFrame:
        """A model's profiles, newest first: ``id, settings, provenance, created``."""
        return self.query(
            "SELECT id, settings, provenance, created FROM profiles WHERE fingerprint = ? "
            "ORDER BY created DESC",
            [fingerprint],
        )

    # --- what high-impact ratios are planned from -------------------------------------------

    def save_row_scores(
        self, profile: str, scores: Mapping[str, np.ndarray], provenance: dict
    ) -> None:
        """Keep each module's row scores (out,) under a profile's identity."""
        provenance_json, written_at = json_text(provenance), now()
        with self.transaction() as connection:
            connection.execute("DELETE FROM row_scores WHERE profile = ?", [profile])
            connection.executemany(
                "INSERT INTO row_scores VALUES (?, ?, ?, ?, ?)",
                [
                    [profile, module, values.tolist(), provenance_json, written_at]
                    for module, values in scores.items()
                ],
            )

    def row_scores(self, profile: str) -> dict[str, np.ndarray]:
        """Row scores (out,) by module; none where they were not measured."""
        with self.connect() as connection:
            rows = connection.execute(
                "SELECT module, scores FROM row_scores WHERE profile = ?", [profile]
            ).fetchall()
        return {module: np.array(scores) for module, scores in rows}

    def save_interactions(
        self,
        profile: str,
        kind: InteractionKey,
        layer: int,
        units: Sequence[str],
        matrix: np.ndarray,
        provenance: dict,
    ) -> None:
        """Keep one block's M (u·r, u·r) as it was measured, in the place of one before."""
        key = {"profile": profile} | asdict(kind) | {"layer": layer}
        with self.transaction() as connection:
            where = " AND ".join(f"{column} = ?" for column in key)
            connection.execute(f"DELETE FROM interactions WHERE {where}", list(key.values()))
            _insert(
                connection,
                "interactions",
                **key,
                units=list(units),
                ratios=list(RATIOS),
                matrix=matrix.ravel().tolist(),
                provenance=json_text(provenance),
                created=now(),
            )

    def interactions(self, profile: str, kind: InteractionKey) -> dict[int, np.ndarray]:
        """Each layer's M (u·r, u·r) so far."""
        key = {"profile": profile} | asdict(kind)
        where = " AND ".join(f"{column} = ?" for column in key)
        with self.connect() as connection:
            rows = connection.execute(
                f"SELECT layer, matrix FROM interactions WHERE {where} ORDER BY layer",
                list(key.values()),
            ).fetchall()
        return {layer: _to_square_matrix(matrix) for layer, matrix in rows}

    def row_data_version(self, profile: str, kind: InteractionKey) -> str:
        """When row scores and interactions of a kind were last written, and how many.

        '' where there are no row scores: what is planned from them changes with this text.
        """
        key = {"profile": profile} | asdict(kind)
        where = " AND ".join(f"{column} = ?" for column in key)
        with self.connect() as connection:
            scores = connection.execute(
                "SELECT max(created) FROM row_scores WHERE profile = ?", [profile]
            ).fetchone()[0]
            blocks = connection.execute(
                f"SELECT count(*), max(created) FROM interactions WHERE {where}",
                list(key.values()),
            ).fetchone()
        return f"{scores}/{blocks[0]}/{blocks[1]}" if scores else ""

    # --- plans, runs, evaluations -------------------------------------------------------------

    def save_plan(self, plan: Plan, fingerprint: str, profile: str | None, name: str = "") -> str:
        """Keep a plan; returns its id."""
        id = new_id()
        with self.transaction() as connection:
            _insert(
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
        """What :meth:`lsq_core.planning.plan.Plan.to_json` gave for a kept plan, or None."""
        row = self._fetch_row("SELECT content FROM plans WHERE id = ?", [id])
        return json.loads(row["content"]) if row else None

    def save_run(self, id: str, run: dict, evaluations: list[Evaluation]) -> None:
        """Keep a run and its evaluations, together or not at all.

        ``run`` holds the columns of the table ``runs`` but its id and time. To a run that is
        there already only those evaluations are added that it lacks; a run that was deleted is
        there again.
        """
        with self.transaction() as connection:
            if not connection.execute("SELECT 1 FROM runs WHERE id = ?", [id]).fetchone():
                _insert(connection, "runs", id=id, created=now(), **run)
            connection.execute("UPDATE runs SET deleted = NULL WHERE id = ?", [id])
            for evaluation in evaluations:
                _add_evaluation(connection, evaluation, id, run["fingerprint"])

    def run(self, id: str) -> dict:
        """A run measured here: its columns, its plan's ``content``, and its model's ``source``.

        Raises
        ------
        InputError
            When there is no such run, or it was published.
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
        """The plan that a run was made by, or None where there is no such run."""
        row = self._fetch_row("SELECT plan FROM runs WHERE id = ?", [run])
        return row["plan"] if row else None

    def find_evaluations(self, fingerprint: str, method: str, quantizer: str) -> pd.DataFrame:
        """One row an evaluation of these runs, newest first, by what makes two of them the same.

        ``run, plan, content, device, dtype, versions, evaluation, corpus_sha256, protocol,
        provenance, kl``; ``content`` is the plan's JSON, and ``kl`` is NaN where the model was
        evaluated without full precision beside it.
        """
        return self.query(
            "SELECT r.id AS run, r.plan, CAST(p.content AS VARCHAR) AS content, r.device, "
            "r.dtype, CAST(r.versions AS VARCHAR) AS versions, e.id AS evaluation, "
            "e.corpus_sha256, e.protocol, CAST(e.provenance AS VARCHAR) AS provenance, e.kl "
            "FROM runs r JOIN plans p ON r.plan = p.id JOIN evaluations e ON e.run = r.id "
            "WHERE r.fingerprint = ? AND r.method = ? AND r.quantizer = ? "
            "AND r.origin = 'measured' AND r.deleted IS NULL "
            "ORDER BY r.created DESC, e.created DESC",
            [fingerprint, method, quantizer],
        )

    def add_evaluation(
        self, manifest: dict, measured_bytes: int, folder: str, evaluation: Evaluation
    ) -> None:
        """Keep an evaluation of a saved model with its run; an unknown run is added first.

        A run that was deleted is there again.

        ``manifest`` is what :func:`lsq_core.quantized.manifest.read_manifest` gives.
        """
        run, fingerprint = manifest["run"], manifest["fingerprint"]
        with self.transaction() as connection:
            known = connection.execute("SELECT 1 FROM runs WHERE id = ?", [run]).fetchone()
            if not known:
                plan = new_id()
                _insert(
                    connection,
                    "plans",
                    id=plan,
                    fingerprint=fingerprint,
                    content=json_text(manifest),
                    created=now(),
                    **{k: manifest[k] for k in _PLAN_COLUMNS},
                )
                _insert(
                    connection,
                    "runs",
                    id=run,
                    plan=plan,
                    fingerprint=fingerprint,
                    measured_bytes=measured_bytes,
                    saved_to=folder,
                    versions=json_text(manifest["versions"]),
                    created=now(),
                    **{k: manifest[k] for k in _RUN_COLUMNS},
                )
            connection.execute("UPDATE runs SET deleted = NULL WHERE id = ?", [run])
            _add_evaluation(connection, evaluation, run, fingerprint)

    def save_full_precision(self, fingerprint: str, evaluation: Evaluation) -> None:
        """Keep a model's own evaluation, one for each text, protocol, place and versions.

        Evaluations of runs that were made the same way and stand beside none get this one.
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

    def results(
        self, fingerprint: str | None = None, origin: str | None = "measured"
    ) -> pd.DataFrame:
        """One row an evaluation of a quantized run, newest first, with full precision beside it.

        ``perplexity_full`` is of the evaluation that this one was paired with when it was made
        (``full_precision``), of the same tokens, protocol, kind of device, dtype and versions; no
        later one takes its place. ``pairing`` is ``measured`` or ``published``; ``inferred`` where
        an older version kept no pair and versions may differ; None where there is none.
        ``saved_model`` marks an evaluation of a saved model alone.
        ``origin`` is ``measured``, ``published``, or None for both together. A published row has
        no ``measured_bytes``; its ``model_bytes`` are the whole model's storage, as published.
        Deleted runs are left out.
        """
        chosen = {"fingerprint": fingerprint, "origin": origin}
        chosen = {column: value for column, value in chosen.items() if value}
        where = "".join(f" AND {column} = ?" for column in chosen)
        return self.query(
            f"SELECT * FROM ({_RESULTS_SQL}) WHERE true{where} ORDER BY created DESC",
            list(chosen.values()),
        )

    def run_configs(self, fingerprint: str) -> dict[str, dict[str, str]]:
        """Each run of a model to the configurations of its plan, by module name.

        Runs whose plan was not published, and deleted ones, are left out.
        """
        with self.connect() as connection:
            rows = connection.execute(
                "SELECT r.id, CAST(p.content -> '$.modules' AS VARCHAR) "
                "FROM runs r JOIN plans p ON r.plan = p.id "
                "WHERE r.fingerprint = ? AND r.deleted IS NULL",
                [fingerprint],
            ).fetchall()
        modules = {run: json.loads(text) for run, text in rows if text}
        return {
            run: {name: entry["config"] for name, entry in plan.items()}
            for run, plan in modules.items()
            if plan
        }

    def objectives(self, fingerprint: str, method: str) -> pd.DataFrame:
        """What a method minimised in the plan of each evaluated run: ``run, objective``, as kept.

        ``kl, perplexity, increase, corpus, protocol, quantizer, bits_per_param, request`` are of
        the run; those without an objective are left out.
        """
        return self.query(
            f"SELECT r.run, CAST(p.content ->> '$.objective' AS DOUBLE) AS objective, r.kl, "
            f"r.perplexity, r.increase, r.corpus, r.protocol, r.quantizer, r.bits_per_param, "
            f"r.request FROM ({_RESULTS_SQL}) r JOIN plans p ON r.plan = p.id "
            "WHERE r.fingerprint = ? AND r.method = ? AND p.content ->> '$.objective' IS NOT NULL",
            [fingerprint, method],
        )

    def saved_folders(self) -> list[str]:
        """Folders that runs were saved to, whether or not they are still there."""
        frame = self.query("SELECT DISTINCT saved_to FROM runs WHERE saved_to IS NOT NULL")
        return frame["saved_to"].tolist()

    def windows(self, evaluation: str) -> tuple[np.ndarray, np.ndarray]:
        """Negative log-likelihood and token count of each window of an evaluation.

        Raises
        ------
        InputError
            When there is no such evaluation, or it was published as one figure.
        """
        row = self._fetch_row("SELECT nll, counts FROM evaluations WHERE id = ?", [evaluation])
        if row is None:
            raise InputError(f"There is no evaluation '{evaluation}' in {self.path}.")
        if row["nll"] is None:
            raise InputError(
                f"Evaluation '{evaluation}' was published without its windows, so it has no "
                "interval; compare its perplexity alone."
            )
        return np.array(row["nll"]), np.array(row["counts"])

    def record(self, evaluation: str) -> dict[str, dict]:
        """All that is kept of one evaluation: ``evaluation, run, plan, model``, and ``profile``.

        ``full`` is the evaluation in full precision that this one is paired with. Each is a row by
        its columns' names, without what takes long to read (windows, scores); JSON columns are
        decoded. ``full``, ``plan`` and ``profile`` are empty where there is none.

        Raises
        ------
        InputError
            When there is no such evaluation.
        """
        own = self._fetch_row(
            "SELECT * EXCLUDE (nll, counts) FROM evaluations WHERE id = ?", [evaluation]
        )
        if own is None or own["run"] is None:
            raise InputError(f"There is no evaluated run '{evaluation}' in {self.path}.")
        run = self._fetch_row("SELECT * FROM runs WHERE id = ?", [own["run"]])
        plan = self._fetch_row("SELECT * FROM plans WHERE id = ?", [run["plan"]]) or {}
        model = self._fetch_row(
            "SELECT * EXCLUDE (config) FROM models WHERE fingerprint = ?", [run["fingerprint"]]
        )
        profile = (
            self._fetch_row("SELECT * FROM profiles WHERE id = ?", [plan.get("profile")]) or {}
        )
        full = self._fetch_row(
            "SELECT * EXCLUDE (nll, counts) FROM evaluations WHERE id = ?", [own["full_precision"]]
        )
        rows_by_table = {"evaluation": own, "full": full or {}, "run": run, "plan": plan}
        rows_by_table |= {"model": model or {}, "profile": profile}
        return {name: _decode_json_columns(row) for name, row in rows_by_table.items()}

    # --- what a person says of a run ------------------------------------------------------------

    def star(self, run: str, starred: bool) -> None:
        """Mark a run, or take the mark away."""
        self._execute("UPDATE runs SET starred = ? WHERE id = ?", [starred, run])

    def annotate(self, run: str, note: str) -> None:
        """Keep a note with a run, in the place of the one before."""
        self._execute("UPDATE runs SET note = ? WHERE id = ?", [note.strip(), run])

    def delete_runs(self, runs: Sequence[str]) -> None:
        """Leave runs out everywhere, with all their evaluations, until they are restored.

        Raises
        ------
        InputError
            When one of them was published: importing again is how those change.
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
        """Bring deleted runs back, with their evaluations, stars and notes."""
        self._execute("UPDATE runs SET deleted = NULL WHERE list_contains(?, id)", [list(runs)])

    def deleted_runs(self) -> pd.DataFrame:
        """Deleted runs, the last deleted first: ``run, model, method, deleted``.

        Those that were deleted together have the same time.
        """
        return self.query(
            "SELECT r.id AS run, m.source AS model, r.method, r.deleted FROM runs r "
            "LEFT JOIN models m ON r.fingerprint = m.fingerprint "
            "WHERE r.deleted IS NOT NULL ORDER BY r.deleted DESC, r.id"
        )

    def _execute(self, sql: str, parameters: list) -> None:
        with self.transaction() as connection:
            connection.execute(sql, parameters)

    # --- a copy to read from ------------------------------------------------------------------

    def snapshot(self, path: Path) -> None:
        """Write all there is at this moment into a new database file, with a view ``results``.

        Whoever reads the copy keeps no one waiting.
        """
        copying = database.connect_in_memory(
            f"ATTACH {database.quote_sql(str(self.path))} AS kept (READ_ONLY)",
            f"ATTACH {database.quote_sql(str(path))} AS snapshot",
            path=self.path,
            wait=LOCK_TIMEOUT_S,
        )
        with copying, database.translate_duckdb_errors(self.path):
            copying.execute("COPY FROM DATABASE kept TO snapshot; DETACH kept; USE snapshot")
            copying.execute(f"CREATE VIEW results AS {_RESULTS_SQL}")

    # --- published measurements -----------------------------------------------------------------

    def replace_published(self, models: list[ModelInfo], rows: dict[str, pd.DataFrame]) -> None:
        """Keep published measurements in the place of those kept before, all or nothing.

        ``rows`` holds a frame for each of ``profiles, scores, plans, runs, evaluations``, with
        the columns of the table by their own names; what a frame lacks has its default. A run
        that is there again under the same identity keeps its star and note.
        """
        with self.transaction() as connection:
            marked_runs = connection.execute(
                "SELECT starred, note, id FROM runs WHERE origin = 'published' "
                "AND (starred OR note <> '')"
            ).fetchall()
            for table, where in _PUBLISHED_ROWS.items():
                connection.execute(f"DELETE FROM {table} WHERE {where}")
            for info in models:
                _insert_model(connection, info, origin="published")
            for table, frame in rows.items():
                connection.register("frame", frame)
                connection.execute(f"INSERT INTO {table} BY NAME SELECT * FROM frame")
                connection.unregister("frame")
            connection.execute(_PAIR_PUBLISHED)
            for row in marked_runs:
                connection.execute("UPDATE runs SET starred = ?, note = ? WHERE id = ?", list(row))


#: Which rows of each table are published ones, what points to others before what is pointed to.
#: Plans that a person made for a published model stay.
_PUBLISHED_ROWS = {
    "scores": "profile IN (SELECT id FROM profiles WHERE origin = 'published')",
    "evaluations": "fingerprint IN (SELECT fingerprint FROM models WHERE origin = 'published')",
    "matrices": "fingerprint IN (SELECT fingerprint FROM models WHERE origin = 'published')",
    "plans": "json_exists(content, '$.published')",
    "runs": "origin = 'published'",
    "profiles": "origin = 'published'",
    "models": "origin = 'published'",
}
#: A published figure stands beside the full precision that was published with it.
_PAIR_PUBLISHED = """
    UPDATE evaluations SET full_precision = f.id, pairing = 'published'
    FROM evaluations f
    WHERE f.run IS NULL AND evaluations.run IS NOT NULL
      AND evaluations.provenance ->> '$.origin' = 'published'
      AND f.fingerprint = evaluations.fingerprint
      AND f.corpus_sha256 = evaluations.corpus_sha256 AND f.protocol = evaluations.protocol
      AND f.provenance ->> '$.dtype' = evaluations.provenance ->> '$.dtype'
"""
#: What a saved model's manifest knows of its plan and run, by the columns' own names.
_PLAN_COLUMNS = ("method", "bits_per_param", "nominal_bytes", "planned_bytes", "model_bytes")
_RUN_COLUMNS = ("method", "quantizer", "model_bytes", "device", "dtype")


def _insert(
    connection: duckdb.DuckDBPyConnection, table: str, replace: bool = False, **values: object
) -> None:
    """One row; table and column names come from this file, values go in as parameters."""
    marks = ", ".join("?" for _ in values)
    verb = "INSERT OR REPLACE" if replace else "INSERT"
    connection.execute(
        f"{verb} INTO {table} ({', '.join(values)}) VALUES ({marks})", list(values.values())
    )


def _insert_model(
    connection: duckdb.DuckDBPyConnection, info: ModelInfo, origin: str = "measured"
) -> None:
    import pandas as pd

    frame = pd.DataFrame([asdict(m) for m in info.matrices])
    frame["fingerprint"], frame["position"] = info.fingerprint, range(len(frame))
    frame["expert"] = frame["expert"].astype("Int64")
    _insert(
        connection,
        "models",
        fingerprint=info.fingerprint,
        source=info.source,
        revision=info.revision,
        architecture=info.architecture,
        layers=info.layers,
        context=info.context,
        parameters=info.parameters,
        linear_parameters=info.linear_parameters,
        file_bytes=info.file_bytes,
        other_bytes=info.other_bytes,
        tied_embeddings=info.tied_embeddings,
        left_out=list(info.left_out),
        notes=list(info.notes),
        config=json_text(info.config),
        created=now(),
        origin=origin,
    )
    connection.register("frame", frame)
    connection.execute(
        "INSERT INTO matrices SELECT fingerprint, position, name, layer, type, "
        "out_features, in_features, expert FROM frame"
    )


def _insert_scores(connection: duckdb.DuckDBPyConnection, profile: Profile) -> None:
    frame = profile.values.assign(profile=profile.id)
    connection.register("frame", frame)
    connection.execute(
        "INSERT INTO scores SELECT profile, module, layer, type, metric, config, part, value "
        "FROM frame"
    )


def _merge_profile(connection: duckdb.DuckDBPyConnection, measured: Profile) -> None:
    existing = connection.execute(
        "SELECT provenance FROM profiles WHERE id = ?", [measured.id]
    ).fetchone()
    before = json.loads(existing[0]) if existing else {}
    text_changed = before.get("corpus_sha256") != measured.provenance.get("corpus_sha256")
    if existing is None or text_changed:
        connection.execute("DELETE FROM scores WHERE profile = ?", [measured.id])
        provenance = measured.provenance
    else:
        facts = measured.provenance | {"created": now().isoformat()}
        added = before.get("added", {}) | dict.fromkeys(measured.metrics, facts)
        provenance = before | {"added": added}
    if existing is None:
        _insert(
            connection,
            "profiles",
            id=measured.id,
            fingerprint=measured.fingerprint,
            settings=json_text(asdict(measured.settings)),
            provenance=json_text(provenance),
            created=now(),
        )
    else:
        connection.execute(
            "UPDATE profiles SET provenance = ? WHERE id = ?", [json_text(provenance), measured.id]
        )
    connection.execute(
        "DELETE FROM scores WHERE profile = ? AND list_contains(?, metric)",
        [measured.id, list(measured.metrics)],
    )
    _insert_scores(connection, measured)


#: The tables with a provenance that keep something under a profile's identity, and its column.
_PROFILE_TABLES = {"profiles": "id", "row_scores": "profile", "interactions": "profile"}


def _has_profile_data(connection: duckdb.DuckDBPyConnection, id: str) -> bool:
    return any(
        connection.execute(f"SELECT 1 FROM {table} WHERE {column} = ? LIMIT 1", [id]).fetchone()
        for table, column in _PROFILE_TABLES.items()
    )


def _rekey_profile(
    connection: duckdb.DuckDBPyConnection, old: str, new: str, same: Callable[[dict], bool]
) -> bool:
    """Move what belongs under the new identity; see :meth:`Store.rekey_profile`."""
    moved = False
    for table, column in _PROFILE_TABLES.items():
        recorded = connection.execute(
            f"SELECT DISTINCT CAST(provenance AS VARCHAR) FROM {table} WHERE {column} = ?", [old]
        ).fetchall()
        belonging = [text for (text,) in recorded if text and same(json.loads(text))]
        if belonging:
            connection.execute(
                f"UPDATE {table} SET {column} = ? WHERE {column} = ? "
                "AND list_contains(?, CAST(provenance AS VARCHAR))",
                [new, old, belonging],
            )
            moved = True
        if belonging and table == "profiles":
            added = json.loads(belonging[0]).get("added", {})
            others = [metric for metric, facts in added.items() if not same(facts)]
            connection.execute(
                "DELETE FROM scores WHERE profile = ? AND list_contains(?, metric)", [old, others]
            )
            connection.execute("UPDATE scores SET profile = ? WHERE profile = ?", [new, old])
            connection.execute("UPDATE plans SET profile = ? WHERE profile = ?", [new, old])
    return moved


def _matching_evaluations(
    connection: duckdb.DuckDBPyConnection,
    fingerprint: str,
    evaluation: Evaluation,
    where: str,
    *parameters: object,
) -> list[str]:
    """The evaluations of the same tokens, made the same way, newest first, by identity.

    ``where`` narrows them, in SQL with ``parameters``.
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
    """Add an evaluation to a run that has none of the same kind.

    A saved model's, which was made without full precision beside it, is one of its own.
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
    """Add an evaluation, that of a run with full precision of the same kind beside it, if there is.

    Returns its identity.
    """
    id = new_id()
    full = next(
        iter(_matching_evaluations(connection, fingerprint, evaluation, "run IS NULL")), None
    )
    _insert(
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
        tokens_per_second=evaluation.tokens_per_second,
        working_bytes=evaluation.working_bytes,
        seconds=json_text(evaluation.times),
        nll=evaluation.nll.tolist(),
        counts=evaluation.counts.tolist(),
        provenance=json_text(evaluation.provenance),
        created=now(),
    )
    return id


def _to_square_matrix(flat: Sequence[float]) -> np.ndarray:
    side = math.isqrt(len(flat))
    return np.array(flat).reshape(side, side)


def _decode_json_columns(row: dict[str, Any]) -> dict[str, Any]:
    """A row with its JSON columns as what they hold."""
    return {
        name: json.loads(value) if name in _JSON_COLUMNS and isinstance(value, str) else value
        for name, value in row.items()
    }


#: Columns that hold JSON.
_JSON_COLUMNS = ("content", "provenance", "seconds", "settings", "versions")


def new_id() -> str:
    """A fresh identity for a plan, a run or an evaluation: 12 hexadecimal digits."""
    return uuid.uuid4().hex[:12]


def _import_pandas() -> None:
    """Have pandas before the file is opened: others would wait while it is imported."""
    import pandas  # noqa: F401
