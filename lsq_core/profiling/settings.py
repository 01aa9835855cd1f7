"""What a profile is measured with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from lsq_core.errors import InputError
from lsq_core.quantization.registry import MATRIX_QUANTIZERS, quantizer_spec
from lsq_core.settings import CalibrationSettings, GridSettings


@dataclass(frozen=True)
class ProfileSettings:
    """What the figures of a profile depend on, besides the model.

    ``calibration`` names a corpus; of it ``samples`` texts, shuffled with ``seed``, are cut to
    blocks of ``block_tokens`` (method §2).
    """

    quantizer: str = "hqq"
    axis: int = 1
    metadata: str = "8bit"
    calibration: str = "stdlib"
    samples: int = 128
    block_tokens: int = 512
    seed: int = 42

    def __post_init__(self) -> None:
        if quantizer_spec(self.quantizer).calibrated:
            raise InputError(
                "A profile quantizes one matrix at a time, which "
                f"{quantizer_spec(self.quantizer).title} "
                f"cannot; choose one of {', '.join(MATRIX_QUANTIZERS)}."
            )
        _ = self.grid  # checks axis and metadata

    @property
    def grid(self) -> GridSettings:
        """How the quantizer groups weights and stores scale and zero point."""
        return GridSettings(self.axis, self.metadata)

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
        """The identity of a profile: the same key means the same figures.

        ``tokenizer`` and ``code`` are hashes (:class:`lsq_core.model.identity.ModelIdentity`), and
        ``made_with`` is of :func:`lsq_core.provenance.profile_dependencies`. A published profile
        has none of these, and neither had one from before they were part of the key.
        """
        content = asdict(self) | {"model": fingerprint, "corpus": corpus_identity}
        content |= {"made_with": dict(made_with)} if made_with else {}
        content |= {k: v for k, v in (("tokenizer", tokenizer), ("code", code)) if v}
        del content["calibration"]  # two names of one text are one corpus
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


#: How the profiles were measured that published plans were made from (method §2).
PUBLISHED_SETTINGS = ProfileSettings(axis=0, calibration="pileval")
