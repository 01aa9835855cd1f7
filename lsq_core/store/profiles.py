"""Profiles, row scores and interactions."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import duckdb
import numpy as np
import pandas as pd

from lsq_core.bits import RATIOS
from lsq_core.jsontext import json_text
from lsq_core.profiling.profile import Profile, current_scores, is_current, metric_provenance
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.provenance import now
from lsq_core.store.connection import insert_row
from lsq_core.store.models import ModelTables


@dataclass(frozen=True)
class InteractionKey:
    """Identifies interactions of a profile by loss, bit widths and group size."""

    loss: str
    low_bits: int
    high_bits: int
    group_size: int


#: Tables whose rows have a provenance and belong to a profile, with the column of its id.
_PROFILE_TABLES = {"profiles": "id", "row_scores": "profile", "interactions": "profile"}


class ProfileTables(ModelTables):
    """Every score of every profile, and how it was measured."""

    def merge_profile(self, measured: Profile) -> None:
        """Add metrics to the profile with the same id, replacing its scores of these metrics.

        The profile is created if it does not exist. Reading and writing are one transaction, so
        processes and threads that measure the same profile do not lose each other's scores.
        How each added metric was measured is stored under its name in ``provenance["added"]``. If
        the calibration text has changed, for example because a dataset's revision has moved, the
        scores on the previous text are dropped: a profile covers only one text.
        """
        self._retry_transaction(lambda connection: _merge_profile(connection, measured))

    def rekey_profile(self, old: str, new: str, same: Callable[[dict], bool]) -> bool:
        """Move the data stored under a profile's old id to its new id; return whether any moved.

        ``same`` returns whether data measured with a given provenance belong to the new id. Metrics
        that do not, for example because they were added on another device, are dropped. Nothing
        changes if there are data under the new id.
        """
        with self.connect() as connection:
            if not _has_profile_data(connection, old) or _has_profile_data(connection, new):
                return False
        with self.transaction() as connection:
            return _rekey_profile(connection, old, new, same)

    def profile(self, id: str) -> Profile | None:
        """Return a profile by its id, or None; scores by outdated definitions are left out."""
        with self.held():
            row = self._fetch_row("SELECT * FROM profiles WHERE id = ?", [id])
            if row is None:
                return None
            info = self.model(row["fingerprint"])
            values = self.query("SELECT * EXCLUDE (profile) FROM scores WHERE profile = ?", [id])
        provenance = json.loads(row["provenance"])
        return Profile(
            id=id,
            fingerprint=row["fingerprint"],
            settings=ProfileSettings(**json.loads(row["settings"])),
            matrices=info.matrices,
            values=current_scores(values, provenance),
            provenance=provenance,
        )

    def profiles(self, fingerprint: str) -> pd.DataFrame:
        """Return a model's profiles: ``id, settings, provenance, created, origin``.

        The newest comes first. Shipped profiles come last, in the order they were measured, HQQ's
        before the others.
        """
        return self.query(
            "SELECT id, settings, provenance, created, origin FROM profiles WHERE fingerprint = ? "
            "ORDER BY origin = 'shipped', "
            "origin = 'shipped' AND settings ->> '$.quantizer' <> 'hqq', "
            "CASE WHEN origin = 'shipped' THEN created END, created DESC",
            [fingerprint],
        )

    def profile_contents(self) -> pd.DataFrame:
        """Return the metrics and configurations of every profile of every model, newest first.

        One row for each metric and configuration: ``id, model, origin, linear_parameters, metric,
        config`` and the fields of the settings. Scores by outdated definitions are left out.
        """
        rows = self.query(
            """
            SELECT p.id, m.source AS model, p.origin, m.linear_parameters, p.settings,
                   s.metric, s.config
            FROM (SELECT DISTINCT profile, metric, config FROM scores) s
            JOIN profiles p ON s.profile = p.id JOIN models m ON p.fingerprint = m.fingerprint
            ORDER BY p.created DESC, s.metric, s.config
            """
        )
        found = self.query("SELECT id, provenance FROM profiles").set_index("id")["provenance"]
        recorded = {id: json.loads(text) for id, text in found.items()}
        pairs = zip(rows["id"], rows["metric"], strict=True)
        current = np.array([is_current(metric, recorded[id]) for id, metric in pairs], dtype=bool)
        rows = rows[current].reset_index(drop=True)
        texts = rows.pop("settings")
        fields = {text: asdict(ProfileSettings(**json.loads(text))) for text in texts.unique()}
        settings = pd.DataFrame([fields[text] for text in texts])
        return pd.concat([rows, settings], axis=1)

    def scores_over_layers(self, ids: Sequence[str], metric: str) -> pd.DataFrame:
        """Return a metric of some profiles by layer, averaged over the experts of a layer.

        Columns are ``id, config, type, part, layer, value``; rows are in the order of layers.
        """
        return self.query(
            """
            SELECT profile AS id, config, type, any_value(part) AS part, layer,
                   avg(value) FILTER (NOT isnan(value)) AS value
            FROM scores WHERE list_contains(?, profile) AND metric = ?
            GROUP BY profile, config, type, layer ORDER BY profile, config, type, layer
            """,
            [list(ids), metric],
        )

    def save_row_scores(
        self, profile: str, scores: Mapping[str, np.ndarray], provenance: dict
    ) -> None:
        """Store each module's row scores (out,) under a profile's id."""
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
        """Return row scores (out,) by module; empty if they were not measured."""
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
        """Store one block's M (u·r, u·r) as measured, replacing any previous one."""
        key = {"profile": profile} | asdict(kind) | {"layer": layer}
        with self.transaction() as connection:
            where = " AND ".join(f"{column} = ?" for column in key)
            connection.execute(f"DELETE FROM interactions WHERE {where}", list(key.values()))
            insert_row(
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
        """Return M (u·r, u·r) of each layer measured so far."""
        key = {"profile": profile} | asdict(kind)
        where = " AND ".join(f"{column} = ?" for column in key)
        with self.connect() as connection:
            rows = connection.execute(
                f"SELECT layer, matrix FROM interactions WHERE {where} ORDER BY layer",
                list(key.values()),
            ).fetchall()
        return {layer: _to_square_matrix(matrix) for layer, matrix in rows}

    def row_data_version(self, profile: str, kind: InteractionKey) -> str:
        """Return a version of row scores and interactions of a kind; '' if there are no row scores.

        It combines the times at which they were last written with the number of interactions, so it
        changes whenever plans made from them may change.
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
        added = before.get("added", {}) | {
            metric: metric_provenance(metric, measured.provenance) | {"created": now().isoformat()}
            for metric in measured.metrics
        }
        provenance = before | {"added": added}
    if existing is None:
        insert_row(
            connection,
            "profiles",
            id=measured.id,
            fingerprint=measured.fingerprint,
            settings=json_text(measured.settings.to_json()),
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


def _insert_scores(connection: duckdb.DuckDBPyConnection, profile: Profile) -> None:
    frame = profile.values.assign(profile=profile.id)
    connection.register("frame", frame)
    connection.execute(
        "INSERT INTO scores SELECT profile, module, layer, type, metric, config, part, value "
        "FROM frame"
    )


def _has_profile_data(connection: duckdb.DuckDBPyConnection, id: str) -> bool:
    return any(
        connection.execute(f"SELECT 1 FROM {table} WHERE {column} = ? LIMIT 1", [id]).fetchone()
        for table, column in _PROFILE_TABLES.items()
    )


def _rekey_profile(
    connection: duckdb.DuckDBPyConnection, old: str, new: str, same: Callable[[dict], bool]
) -> bool:
    """Move the data that belong to the new id; see :meth:`Store.rekey_profile`."""
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


def _to_square_matrix(flat: Sequence[float]) -> np.ndarray:
    side = math.isqrt(len(flat))
    return np.array(flat).reshape(side, side)
