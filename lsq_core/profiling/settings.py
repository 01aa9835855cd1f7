"""Settings of a profile."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lsq_core.bits import PAPER, QuantConfig, get_ladder
from lsq_core.errors import InputError
from lsq_core.quantization.registry import MATRIX_QUANTIZERS, quantizer_spec
from lsq_core.settings import CalibrationSettings, GridSettings


@dataclass(frozen=True)
class ProfileSettings:
    """Settings that the scores of a profile depend on, besides the model.

    ``calibration`` names a corpus. Of its texts, shuffled with ``seed``, ``samples`` are cut into
    blocks of ``block_tokens`` (method §2). ``ladder`` names the configurations at which matrices
    are quantized (:data:`lsq_core.bits.LADDERS`).
    """

    quantizer: str = "hqq"
    axis: int = 1
    metadata: str = "8bit"
    calibration: str = "stdlib"
    samples: int = 128
    block_tokens: int = 512
    seed: int = 42
    ladder: str = PAPER

    def __post_init__(self) -> None:
        if quantizer_spec(self.quantizer).calibrated:
            raise InputError(
                "Profiling quantizes one matrix at a time, which "
                f"{quantizer_spec(self.quantizer).title} does not support; choose one of "
                f"{', '.join(MATRIX_QUANTIZERS)}."
            )
        get_ladder(self.ladder)
        _ = self.grid  # checks axis and metadata

    @property
    def grid(self) -> GridSettings:
        """How the quantizer groups weights and stores scale and zero point."""
        return GridSettings(self.axis, self.metadata)

    @property
    def configs(self) -> tuple[QuantConfig, ...]:
        """The ladder's configurations that the quantizer supports."""
        return quantizer_spec(self.quantizer).configs_on(self.ladder)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as stored, with the ladder only if it is not the paper's.

        Profiles on the paper's ladder thus keep the identity from when it was the only one.
        """
        content = asdict(self)
        if self.ladder == PAPER:
            del content["ladder"]
        return content

    @property
    def text(self) -> CalibrationSettings:
        """The calibration text that activations are measured on."""
        return CalibrationSettings(self.calibration, self.samples, self.block_tokens, self.seed)

    def key(
        self,
        fingerprint: str,
        corpus_identity: str,
        tokenizer: str = "",
        code: str = "",
        made_with: Mapping[str, object] | None = None,
    ) -> str:
        """Return the key of a profile: equal keys mean equal scores.

        ``tokenizer`` and ``code`` are hashes (:class:`lsq_core.model.identity.ModelIdentity`), and
        ``made_with`` comes from :func:`lsq_core.provenance.profile_dependencies`. Keys of published
        profiles, and keys stored before these became part of the key, include none of them.
        """
        content = self.to_json() | {"model": fingerprint, "corpus": corpus_identity}
        content |= {"made_with": dict(made_with)} if made_with else {}
        content |= {k: v for k, v in (("tokenizer", tokenizer), ("code", code)) if v}
        del content["calibration"]  # two names for the same corpus give the same key
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


#: The settings of the profiles behind the published plans (method §2).
PUBLISHED_SETTINGS = ProfileSettings(axis=0, calibration="pileval")
