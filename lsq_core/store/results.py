"""Results as tables, and read-only copies of the database."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lsq_core.errors import InputError
from lsq_core.store import database
from lsq_core.store.connection import LOCK_TIMEOUT_S
from lsq_core.store.noise import NoiseTables

if TYPE_CHECKING:
    import pandas as pd


#: Every evaluation of a quantized run that is not deleted, with its full-precision figures.
_RESULTS_SQL = """
    SELECT e.id AS evaluation, r.id AS run, r.plan, m.source AS model, r.fingerprint,
           r.method, p.asked[1] ->> '$' AS base,
           p.bits_per_param, p.planned_bytes, r.measured_bytes, r.model_bytes,
           CASE WHEN r.format = 'lsq' THEN r.quantizer ELSE r.quantizer || ' as ' || r.format END
           AS quantizer, e.corpus, e.corpus_sha256, e.truncated, e.protocol, e.tokens,
           e.perplexity, f.perplexity AS perplexity_full,
           e.perplexity / f.perplexity - 1 AS increase,
           e.full_precision, e.pairing, e.kl IS NULL AND r.origin <> 'published' AS saved_model,
           e.kl, e.top1, e.tokens_per_second, e.working_bytes, r.quantize_seconds,
           r.device, r.machine, r.dtype, r.saved_to,
           CAST(p.asked[2] AS VARCHAR) AS request, p.profile, p.asked[3] ->> '$' AS metadata,
           CAST(p.asked[4] ->> '$' AS INTEGER) AS axis, r.created, r.origin,
           r.starred, r.note, r.format, r.exported_from, n.noise, n.noise_kl
    FROM evaluations e
    JOIN runs r ON e.run = r.id
    LEFT JOIN (
        SELECT id, profile, bits_per_param, planned_bytes, json_extract(
            content, ['$.base', '$.request', '$.metadata', '$.axis']
        ) AS asked FROM plans
    ) p ON r.plan = p.id
    LEFT JOIN models m ON r.fingerprint = m.fingerprint
    LEFT JOIN evaluations f ON f.id = e.full_precision
    LEFT JOIN (
        SELECT fingerprint, protocol, device, dtype, arg_max(perplexity, created) AS noise,
               arg_max(kl, created) AS noise_kl
        FROM noise_floors GROUP BY ALL
    ) n ON n.fingerprint = e.fingerprint AND n.protocol = e.protocol
        AND n.dtype = e.provenance ->> '$.dtype'
        AND n.device = split_part(e.provenance ->> '$.device', ':', 1)
    WHERE r.deleted IS NULL
"""


#: The newest full-precision evaluation of each GGUF file comparable with an evaluation.
_GGUF_BASELINES_SQL = """
    SELECT m.source AS model, m.config ->> '$.gguf.type' AS type,
           CAST(m.config ->> '$.gguf.block_bytes' AS BIGINT) AS block_bytes, m.file_bytes,
           arg_max(e.perplexity, e.created) AS perplexity
    FROM evaluations own
    JOIN models run_model ON run_model.fingerprint = own.fingerprint
    JOIN evaluations e ON e.run IS NULL AND e.corpus_sha256 = own.corpus_sha256
        AND e.protocol = own.protocol AND e.tokens = own.tokens
    JOIN models m ON m.fingerprint = e.fingerprint AND m.layers = run_model.layers
        AND m.linear_parameters = run_model.linear_parameters
    WHERE own.id = ? AND m.config ->> '$.gguf.block_bytes' IS NOT NULL
    GROUP BY m.fingerprint, m.source, m.config, m.file_bytes
    ORDER BY block_bytes
"""


#: Columns that hold JSON.
_JSON_COLUMNS = ("content", "divergence", "provenance", "seconds", "settings", "versions")


class ResultTables(NoiseTables):
    """Runs joined with their evaluations, plans and profiles."""

    def results(
        self, fingerprint: str | None = None, origin: str | None = "measured"
    ) -> pd.DataFrame:
        """Return one row per evaluation of a quantized run, newest first.

        ``perplexity_full`` is from the full-precision evaluation paired with this one
        (``full_precision``), which has the same tokens, protocol, device type, dtype and versions;
        later evaluations do not replace it. ``pairing`` is ``measured``, ``published``,
        ``inferred`` if an older version stored no pair and versions may differ, or None if there is
        no pair. ``saved_model`` marks an evaluation of a saved model alone.
        ``format`` is the format in which the weights were measured; for a run exported from another
        run (``exported_from``), ``quantizer`` names it too: ``hqq as gguf``.
        ``noise`` and ``noise_kl`` are the shares by which arithmetic alone changes the perplexity
        and the KL divergence (:class:`lsq_core.evaluation.noise.NoiseFloor`), None if not measured.
        The argument ``origin`` is ``measured`` (by this project, here or shipped with it; the
        column ``origin`` distinguishes the two), ``published``, or None for both. A published row
        has no ``measured_bytes``; its ``model_bytes`` are the storage of the full model, as
        published. Deleted runs are left out.
        """
        where, values = "true", []
        if fingerprint:
            where, values = f"{where} AND fingerprint = ?", [fingerprint]
        if origin:
            where += f" AND origin {'=' if origin == 'published' else '<>'} 'published'"
        return self.query(
            f"SELECT * FROM ({_RESULTS_SQL}) WHERE {where} ORDER BY created DESC", values
        )

    def run_configs(self, fingerprint: str) -> dict[str, dict[str, str]]:
        """Return the planned configuration of each module, by run and module name.

        Deleted runs, and runs whose plan was not published, are left out.
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
        """Return the stored objective of each evaluated run of a method: ``run, objective``.

        The objective is what the method minimised in the run's plan. The columns ``kl, perplexity,
        increase, corpus, protocol, quantizer, bits_per_param, request`` are those of
        :meth:`results`; runs without an objective are left out.
        """
        return self.query(
            f"SELECT r.run, CAST(p.content ->> '$.objective' AS DOUBLE) AS objective, r.kl, "
            f"r.perplexity, r.increase, r.corpus, r.protocol, r.quantizer, r.bits_per_param, "
            f"r.request FROM ({_RESULTS_SQL}) r JOIN plans p ON r.plan = p.id "
            "WHERE r.fingerprint = ? AND r.method = ? AND p.content ->> '$.objective' IS NOT NULL",
            [fingerprint, method],
        )

    def windows(self, evaluation: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the negative log-likelihood and token count of each window of an evaluation.

        Raises
        ------
        InputError
            If there is no such evaluation, or it was published without windows.
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
        """Return everything stored about one evaluation of a run.

        The keys are ``evaluation, full, run, plan, model, profile, noise``. ``full`` is the paired
        evaluation in full precision. Each value is a row by column name, without the slow columns
        (windows, a model's config), and with JSON columns decoded; ``noise`` is from
        :meth:`lsq_core.evaluation.noise.NoiseFloor.to_json`. Values that do not exist are empty.

        Raises
        ------
        InputError
            If there is no such evaluation.
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
        noise = self.noise_of_evaluation(evaluation)
        rows_by_table |= {"model": model or {}, "profile": profile}
        rows_by_table |= {"noise": noise.to_json() if noise else {}}
        return {name: _decode_json_columns(row) for name, row in rows_by_table.items()}

    def gguf_baselines(self, evaluation: str) -> pd.DataFrame:
        """Return the GGUF files evaluated in the same way as a run.

        Columns are ``model, type, block_bytes, file_bytes, perplexity``. The files are the run's
        own model if it was read from such a file, and models with the same number of layers and
        planned weights, evaluated on the same text with the same protocol and number of tokens.
        ``block_bytes`` is the size of the weight matrices of decoder blocks in the file.
        """
        return self.query(_GGUF_BASELINES_SQL, [evaluation])

    def snapshot(self, path: Path) -> None:
        """Copy the current database to a new file, and add a view ``results``.

        Readers of the copy do not block the database.
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


def _decode_json_columns(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with its JSON columns decoded."""
    return {
        name: json.loads(value) if name in _JSON_COLUMNS and isinstance(value, str) else value
        for name, value in row.items()
    }
