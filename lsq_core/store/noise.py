"""Noise floors: how much a model's figures change with the arithmetic alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lsq_core.evaluation.noise import Condition, NoiseFloor
from lsq_core.jsontext import json_text
from lsq_core.provenance import DeviceAndDtype, now
from lsq_core.store.connection import DatabaseFile, insert_row, new_id


class NoiseTables(DatabaseFile):
    """Noise floors of models, one or more for each protocol, device type and dtype."""

    def save_noise_floor(self, fingerprint: str, floor: NoiseFloor) -> str:
        """Store a noise floor and return its id. Figures are shown with the newest one."""
        id = new_id()
        with self.transaction() as connection:
            insert_row(
                connection,
                "noise_floors",
                id=id,
                fingerprint=fingerprint,
                protocol=floor.protocol,
                device=floor.device,
                dtype=floor.dtype,
                corpus=floor.corpus,
                corpus_sha256=floor.corpus_sha256,
                tokens=floor.tokens,
                plan=floor.plan,
                perplexity=floor.perplexity,
                kl=floor.kl,
                conditions=json_text([asdict(each) for each in floor.conditions]),
                provenance=json_text(dict(floor.provenance)),
                created=now(),
            )
        return id

    def has_noise_floor(self, fingerprint: str) -> bool:
        """Return whether any noise floor of a model was measured."""
        found = self._fetch_row(
            "SELECT 1 FROM noise_floors WHERE fingerprint = ? LIMIT 1", [fingerprint]
        )
        return found is not None

    def noise_of_evaluation(self, evaluation: str) -> NoiseFloor | None:
        """Return the noise floor of an evaluation's figures.

        None if it was not measured or there is no such evaluation.
        """
        row = self._fetch_row(
            "SELECT fingerprint, protocol, provenance FROM evaluations WHERE id = ?", [evaluation]
        )
        if row is None or row["provenance"] is None:
            return None
        made_with = json.loads(row["provenance"])
        return self.noise_floor(row["fingerprint"], row["protocol"], made_with)

    def noise_floor(
        self, fingerprint: str, protocol: str, provenance: Mapping[str, Any]
    ) -> NoiseFloor | None:
        """Return the newest noise floor of a model under a protocol; None if none was measured.

        ``provenance`` is that of the figures; only its device type and dtype matter.
        """
        where = DeviceAndDtype.from_record(provenance)
        row = self._fetch_row(
            "SELECT * FROM noise_floors WHERE fingerprint = ? AND protocol = ? AND device = ? "
            "AND dtype = ? ORDER BY created DESC LIMIT 1",
            [fingerprint, protocol, where.device, where.dtype],
        )
        if row is None:
            return None
        kept = ("protocol", "device", "dtype", "corpus", "corpus_sha256", "tokens", "plan")
        return NoiseFloor(
            **{name: row[name] for name in kept},
            conditions=tuple(Condition(**each) for each in json.loads(row["conditions"])),
            provenance=json.loads(row["provenance"]),
        )
