"""What is known of a model without its weights: its matrices and its size."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Matrix:
    """One weight matrix inside a decoder block: a linear module, or one expert of a stack.

    ``name`` is the full module name, with the expert's index as its last part for a stack;
    ``type`` is the name inside the block without any index, by which Algorithm 1 groups.
    """

    name: str
    layer: int
    type: str
    out_features: int
    in_features: int
    expert: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.out_features, self.in_features

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.out_features * self.in_features


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model from its config and file headers, before any weight is read."""

    source: str
    revision: str | None
    architecture: str
    layers: int
    context: int
    parameters: int
    file_bytes: int
    matrices: tuple[Matrix, ...]
    #: Matrices inside the blocks that no group size of the ladder divides, by name.
    left_out: tuple[str, ...] = ()
    tied_embeddings: bool = False
    #: Bytes of embeddings, norms, head and whatever else plans don't touch.
    other_bytes: int = 0
    fingerprint: str = ""
    config: dict = field(default_factory=dict, compare=False, repr=False)
    #: Hashes of the tokenizer, and of the model's own code where that is trusted to run; see
    #: :mod:`lsq_core.model.identity`. The same weights may come with others, under another name.
    tokenizer: str = field(default="", compare=False)
    code: str = field(default="", compare=False)
    #: What of the checkpoint is not used, a sentence each (:func:`lsq_core.model.fit.check_fit`).
    notes: tuple[str, ...] = ()

    @property
    def linear_parameters(self) -> int:
        """Weights that plans decide about."""
        return sum(m.numel for m in self.matrices)

    @property
    def coverage(self) -> float:
        """Share of the model's parameters that plans decide about, 0 to 1."""
        return self.linear_parameters / self.parameters
