"""Measurements that come with the project: its own, made beforehand, and marked as such."""

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

#: What ``origin`` is of a profile or run that came with the project.
SHIPPED = "shipped"
#: The tables of which a model's rows are shipped, and which rows those are; ``models`` and
#: ``matrices`` describe a model and belong to nobody.
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
#: How the rows of a table are told from a person's own once they are imported.
_MARKS = {
    "profiles": f"REPLACE ('{SHIPPED}' AS origin, {_MARKED_PROVENANCE})",
    "runs": f"REPLACE ('{SHIPPED}' AS origin, NULL AS saved_to, false AS starred, '' AS note)",
    "evaluations": f"REPLACE ({_MARKED_PROVENANCE})",
    "noise_floors": f"REPLACE ({_MARKED_PROVENANCE})",
}
#: What an earlier import brought, what points to others before what is pointed to.
_IMPORTED = {
    "scores": f"profile IN (SELECT id FROM profiles WHERE origin = '{SHIPPED}')",
    "evaluations": f"provenance ->> '$.origin' = '{SHIPPED}'",
    "noise_floors": f"provenance ->> '$.origin' = '{SHIPPED}'",
    "plans": f"id IN (SELECT plan FROM runs WHERE origin = '{SHIPPED}')",
    "runs": f"origin = '{SHIPPED}'",
    "profiles": f"origin = '{SHIPPED}'",
}
#: The columns that tell a row of a table from another, where it has no id.
_KEYS = {
    "models": ("fingerprint",),
    "matrices": ("fingerprint",),
    "model_names": ("source", "fingerprint"),
    "scores": ("profile",),
}


class ShippedTables(DatabaseFile):
    """Profiles and runs that come with the project."""

    def export_measurements(self, fingerprints: Sequence[str], folder: Path) -> dict[str, int]:
        """Write all that was measured of some models as Parquet files, one a table.

        Returns the number of rows by table. Deleted runs are left out, and so are stars and notes.
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
        """Whether the measurements with this hash were imported, even if deleted since."""
        with self.connect() as connection:
            row = connection.execute("SELECT 1 FROM shipped WHERE sha256 = ?", [sha256]).fetchone()
        return row is not None

    def import_shipped(self, folder: Path, sha256: str) -> None:
        """Import what :meth:`export_measurements` wrote, in the place of an earlier import.

        All or nothing. A person's own rows are never replaced: a profile, plan or run that is
        there already stays. What a person did with an imported run (star, note, deletion) stays
        with it where it comes again.
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
        """The id of a shipped profile of a model with these settings, if there is one."""
        for id, known in self.shipped_profiles(fingerprint).items():
            if known == dict(settings):
                return id
        return None

    def shipped_profiles(self, fingerprint: str) -> dict[str, dict]:
        """The settings of a model's shipped profiles by id, HQQ's first."""
        with self.connect() as connection:
            rows = connection.execute(
                "SELECT id, CAST(settings AS VARCHAR) FROM profiles "
                "WHERE fingerprint = ? AND origin = ? "
                "ORDER BY settings ->> '$.quantizer' <> 'hqq', created",
                [fingerprint, SHIPPED],
            ).fetchall()
        return {id: json.loads(settings) for id, settings in rows}


def _insert_new(connection: duckdb.DuckDBPyConnection, table: str, rows: pyarrow.Table) -> None:
    """Insert the rows of which no row with the same key is in the table."""
    keys = _KEYS.get(table, ("id",))
    same = " AND ".join(f"known.{key} = new.{key}" for key in keys)
    connection.register("shipped_rows", rows)
    connection.execute(
        f"INSERT INTO {table} BY NAME SELECT * FROM shipped_rows new "
        f"WHERE NOT EXISTS (SELECT 1 FROM {table} known WHERE {same})"
    )
    connection.unregister("shipped_rows")
