"""Measurements that a method's authors published."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lsq_core.model.info import ModelInfo
from lsq_core.store.connection import DatabaseFile
from lsq_core.store.models import insert_model

if TYPE_CHECKING:
    import pandas as pd


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


class PublishedTables(DatabaseFile):
    """Models without weights, with their published profiles, plans and runs."""

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
                insert_model(connection, info, origin="published")
            for table, frame in rows.items():
                connection.register("frame", frame)
                connection.execute(f"INSERT INTO {table} BY NAME SELECT * FROM frame")
                connection.unregister("frame")
            connection.execute(_PAIR_PUBLISHED)
            for row in marked_runs:
                connection.execute("UPDATE runs SET starred = ?, note = ? WHERE id = ?", list(row))
