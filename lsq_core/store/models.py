"""Models, and the names they were requested by."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import duckdb

from lsq_core.jsontext import json_text
from lsq_core.model.info import Matrix, ModelInfo
from lsq_core.provenance import now
from lsq_core.store.connection import DatabaseFile, import_pandas, insert_row

if TYPE_CHECKING:
    import pandas as pd


#: Prefix of the fingerprint of a published model, whose weights are not available.
PUBLISHED = "published:"


class ModelTables(DatabaseFile):
    """Descriptions of models, without their weights."""

    def save_model(self, info: ModelInfo) -> None:
        """Store a model's description and the name it was requested by.

        The description of a stored model does not change, except for its notes if ``info`` has any.
        """
        if not info.fingerprint:
            raise ValueError("a model that was not fetched has no identity to be kept by")
        import_pandas()
        with self.transaction() as connection:
            known = connection.execute(
                "SELECT 1 FROM models WHERE fingerprint = ?", [info.fingerprint]
            ).fetchone()
            if not known:
                insert_model(connection, info)
            elif info.notes:
                connection.execute(
                    "UPDATE models SET notes = ? WHERE fingerprint = ?",
                    [list(info.notes), info.fingerprint],
                )
            connection.execute(
                "DELETE FROM model_names WHERE source = ? AND revision IS NOT DISTINCT FROM ?",
                [info.source, info.revision],
            )
            insert_row(
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
        """Return (fingerprint, tokenizer, code) of the model last seen under a name and revision.

        None if there is none.
        """
        with self.connect() as connection:
            return connection.execute(
                "SELECT fingerprint, tokenizer, code FROM model_names "
                "WHERE source = ? AND revision IS NOT DISTINCT FROM ?",
                [source, revision],
            ).fetchone()

    def model(self, fingerprint: str) -> ModelInfo | None:
        """Return the description of a model, or None if it is unknown."""
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
        """Return one row per model, newest first; ``origin`` is ``measured`` or ``published``."""
        return self.query(
            "SELECT * EXCLUDE (config) FROM models WHERE origin = ? ORDER BY created DESC",
            [origin],
        )


def insert_model(
    connection: duckdb.DuckDBPyConnection, info: ModelInfo, origin: str = "measured"
) -> None:
    import pandas as pd

    frame = pd.DataFrame([asdict(m) for m in info.matrices])
    frame["fingerprint"], frame["position"] = info.fingerprint, range(len(frame))
    frame["expert"] = frame["expert"].astype("Int64")
    insert_row(
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
