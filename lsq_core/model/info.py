"""Descriptions of models without their weights: matrices and sizes."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Matrix:
    """One weight matrix in a decoder block: a linear module, or one expert of a stack.

    ``name`` is the full module name; for an expert of a stack, the parameter's name followed by
    the expert's index. ``type`` is the name within the block without indices, by which Algorithm 1
    groups.
    """

    name: str
    layer: int
    type: str
    out_features: int
    in_features: int
    expert: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (out, in)."""
        return self.out_features, self.in_features

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.out_features * self.in_features


@dataclass(frozen=True)
class ModelInfo:
    """Description of a model from its config and file headers, without reading any weight."""

    source: str
    revision: str | None
    architecture: str
    layers: int
    context: int
    parameters: int
    file_bytes: int
    matrices: tuple[Matrix, ...]
    #: Block weights that plans exclude, one line per type: name, share of the weights, reason.
    left_out: tuple[str, ...] = ()
    tied_embeddings: bool = False
    #: Bytes of everything outside the plans: embeddings, norms, head and so on.
    other_bytes: int = 0
    fingerprint: str = ""
    config: dict = field(default_factory=dict, compare=False, repr=False)
    #: Hashes of the tokenizer, and of the model's own code if it is trusted to run; see
    #: :mod:`lsq_core.model.identity`. The same weights may come with others under another name.
    tokenizer: str = field(default="", compare=False)
    code: str = field(default="", compare=False)
    #: Sentences on unused tensors (:func:`lsq_core.model.fit.check_fit`) or on a GGUF file's type.
    notes: tuple[str, ...] = ()

    @property
    def linear_parameters(self) -> int:
        """Number of weights that plans cover."""
        return sum(m.numel for m in self.matrices)

    @property
    def coverage(self) -> float:
        """Share of the model's parameters that plans cover, 0 to 1."""
        return self.linear_parameters / self.parameters
