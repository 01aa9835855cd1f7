"""Measurements shipped with the project, marked as such."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import duckdb

from lsq_core.provenance import now
from lsq_core.store.connection import DatabaseFile

if TYPE_CHECKING:
    import pyarrow

#: ``origin`` of a profile or run shipped with the project.
SHIPPED = "shipped"
#: Conditions for a model's exported rows, by table; ``models`` and ``matrices`` only describe the
#: model and are not marked as shipped.
_ROWS = {
    "models": "fingerprint IN (SELECT unnest($models))",
    "matrices": "fingerprint IN (SELECT unnest($models))",
    "model_names": "fingerprint IN (SELECT unnest($models))",
    "profiles": "fingerprint IN (SELECT unnest($models))",
    "scores": "profile IN (SELECT id FROM profiles WHERE fingerprint IN (SELECT unnest($models)))",
    "plans": "id IN (SELECT plan FROM runs WHERE fingerprint IN (SELECT unnest($models)) "
    "AND deleted IS NULL)",
    "runs": "fingerprint IN (SELECT unnest($models)) AND deleted IS NULL",
    "evaluations": "fingerprint IN (SELECT unnest($models)) AND (run IS NULL OR run IN "
    "(SELECT id FROM runs WHERE deleted IS NULL))",
    "noise_floors": "fingerprint IN (SELECT unnest($models))",
}
_MARKED_PROVENANCE = (
    f"""CAST(json_merge_patch(provenance, '{{"origin": "{SHIPPED}"}}') AS JSON) AS provenance"""
)
#: Replaced columns by table, which distinguish imported rows from the user's own.
_MARKS = {
    "profiles": f"REPLACE ('{SHIPPED}' AS origin, {_MARKED_PROVENANCE})",
    "runs": f"REPLACE ('{SHIPPED}' AS origin, NULL AS saved_to, false AS starred, '' AS note)",
    "evaluations": f"REPLACE ({_MARKED_PROVENANCE})",
    "noise_floors": f"REPLACE ({_MARKED_PROVENANCE})",
}
#: Conditions for rows of an earlier import, referring tables before those they refer to.
_IMPORTED = {
    "scores": f"profile IN (SELECT id FROM profiles WHERE origin = '{SHIPPED}')",
    "evaluations": f"provenance ->> '$.origin' = '{SHIPPED}'",
    "noise_floors": f"provenance ->> '$.origin' = '{SHIPPED}'",
    "plans": f"id IN (SELECT plan FROM runs WHERE origin = '{SHIPPED}')",
    "runs": f"origin = '{SHIPPED}'",
    "profiles": f"origin = '{SHIPPED}'",
}
#: The key columns of tables without an id.
_KEYS = {
    "models": ("fingerprint",),
    "matrices": ("fingerprint",),
    "model_names": ("source", "fingerprint"),
    "scores": ("profile",),
}


class ShippedTables(DatabaseFile):
    """Profiles and runs shipped with the project."""

    def export_measurements(self, fingerprints: Sequence[str], folder: Path) -> dict[str, int]:
        """Write all measurements of some models as Parquet files, one per table.

        Returns the number of rows by table. Deleted runs, stars and notes are left out.
        """
        from pyarrow import parquet

        folder.mkdir(parents=True, exist_ok=True)
        counts = {}
        with self.connect() as connection:
            for table, where in _ROWS.items():
                rows = connection.sql(
                    f"SELECT * {_MARKS.get(table, '')} FROM {table} WHERE {where} ORDER BY rowid",
                    params={"models": list(fingerprints)},
                ).to_arrow_table()
                parquet.write_table(rows, folder / f"{table}.parquet", compression="zstd")
                counts[table] = rows.num_rows
        return counts

    def is_shipped_imported(self, sha256: str) -> bool:
        """Return whether the measurements with this hash were imported, even if deleted since."""
        with self.connect() as connection:
            row = connection.execute("SELECT 1 FROM shipped WHERE sha256 = ?", [sha256]).fetchone()
        return row is not None

    def import_shipped(self, folder: Path, sha256: str) -> None:
        """Import files written by :meth:`export_measurements`, replacing any earlier import.

        All changes are made in one transaction. The user's own profiles, plans and runs are never
        replaced. Stars, notes and deletions of runs imported earlier are preserved if the runs are
        imported again.
        """
        from pyarrow import parquet

        tables = {name: parquet.read_table(folder / f"{name}.parquet") for name in _ROWS}
        with self.transaction() as connection:
            marks = connection.execute(
                "SELECT starred, note, deleted, id FROM runs WHERE origin = ?", [SHIPPED]
            ).fetchall()
            for table, where in _IMPORTED.items():
                connection.execute(f"DELETE FROM {table} WHERE {where}")
            for name, rows in tables.items():
                _insert_new(connection, name, rows)
            for mark in marks:
                connection.execute(
                    "UPDATE runs SET starred = ?, note = ?, deleted = ? WHERE id = ?", list(mark)
                )
            connection.execute("INSERT INTO shipped VALUES (?, ?)", [sha256, now()])

    def find_shipped_profile(self, fingerprint: str, settings: Mapping[str, object]) -> str | None:
        """Return the id of a model's shipped profile with these settings, or None."""
        for id, known in self.shipped_profiles(fingerprint).items():
            if known == dict(settings):
                return id
        return None

    def shipped_profiles(self, fingerprint: str) -> dict[str, dict]:
        """Return the settings of a model's shipped profiles by id, HQQ's first."""
        with self.connect() as connection:
            rows = connection.execute(
                "SELECT id, CAST(settings AS VARCHAR) FROM profiles "
                "WHERE fingerprint = ? AND origin = ? "
                "ORDER BY settings ->> '$.quantizer' <> 'hqq', created",
                [fingerprint, SHIPPED],
            ).fetchall()
        return {id: json.loads(settings) for id, settings in rows}


def _insert_new(connection: duckdb.DuckDBPyConnection, table: str, rows: pyarrow.Table) -> None:
    """Insert the rows whose key is not in the table yet."""
    keys = _KEYS.get(table, ("id",))
    same = " AND ".join(f"known.{key} = new.{key}" for key in keys)
    connection.register("shipped_rows", rows)
    connection.execute(
        f"INSERT INTO {table} BY NAME SELECT * FROM shipped_rows new "
        f"WHERE NOT EXISTS (SELECT 1 FROM {table} known WHERE {same})"
    )
    connection.unregister("shipped_rows")
