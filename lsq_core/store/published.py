"""Measurements published by a method's authors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lsq_core.model.info import ModelInfo
from lsq_core.store.connection import DatabaseFile
from lsq_core.store.models import insert_model

if TYPE_CHECKING:
    import pandas as pd


#: Conditions for published rows by table, referring tables before those they refer to.
#: The user's own plans for a published model are not included.
_PUBLISHED_ROWS = {
    "scores": "profile IN (SELECT id FROM profiles WHERE origin = 'published')",
    "evaluations": "fingerprint IN (SELECT fingerprint FROM models WHERE origin = 'published')",
    "matrices": "fingerprint IN (SELECT fingerprint FROM models WHERE origin = 'published')",
    "plans": "json_exists(content, '$.published')",
    "runs": "origin = 'published'",
    "profiles": "origin = 'published'",
    "models": "origin = 'published'",
}


#: Pairs each published figure with the full-precision figure published with it.
_PAIR_PUBLISHED = """
    UPDATE evaluations SET full_precision = f.id, pairing = 'published'
    FROM evaluations f
    WHERE f.run IS NULL AND evaluations.run IS NOT NULL
      AND evaluations.provenance ->> '$.origin' = 'published'
      AND f.fingerprint = evaluations.fingerprint
      AND f.corpus_sha256 = evaluations.corpus_sha256 AND f.protocol = evaluations.protocol
      AND f.provenance ->> '$.dtype' = evaluations.provenance ->> '$.dtype'
"""


class PublishedTables(DatabaseFile):
    """Models without weights, and their published profiles, plans and runs."""

    def replace_published(self, models: list[ModelInfo], rows: dict[str, pd.DataFrame]) -> None:
        """Store published measurements, replacing all previous ones in one transaction.

        ``rows`` holds a frame for each of ``profiles, scores, plans, runs, evaluations``, with the
        column names of the table; missing columns get their defaults. A run with the same id as
        before keeps its star and note.
        """
        with self.transaction() as connection:
            marked_runs = connection.execute(
                "SELECT starred, note, id FROM runs WHERE origin = 'published' "
                "AND (starred OR note <> '')"
            ).fetchall()
            for table, where in _PUBLISHED_ROWS.items():
                connection.execute(f"DELETE FROM {table} WHERE {where}")
            for info in models:
                insert_model(connection, info, origin="published")
            for table, frame in rows.items():
                connection.register("frame", frame)
                connection.execute(f"INSERT INTO {table} BY NAME SELECT * FROM frame")
                connection.unregister("frame")
            connection.execute(_PAIR_PUBLISHED)
            for row in marked_runs:
                connection.execute("UPDATE runs SET starred = ?, note = ? WHERE id = ?", list(row))
