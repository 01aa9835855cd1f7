"""Translation of a plan for another tool: its name for each module, and the format each one gets.

If a tool lacks a configuration of the plan, :func:`translate` records the module, the reason and
the format that would be used instead (:func:`nearest_format`). Nothing here writes files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

from lsq_core.bits import Config, MixedRows, QuantConfig, matrix_bytes, nominal_bytes
from lsq_core.errors import InputError
from lsq_core.exports.names import check_expert_stacks, expert_names
from lsq_core.model.info import Matrix, ModelInfo
from lsq_core.model.source import BUILT_IN
from lsq_core.planning.plan import Plan
from lsq_core.units import format_bytes

#: Bits of a module that the tool leaves unquantized.
KEPT_BITS = 16


@dataclass(frozen=True)
class Format:
    """A format in which a tool stores a matrix.

    ``nominal_bits`` are bits per weight including the tool's scales and zero points,
    ``padded_bits`` the bits per weight in its files if that is more. ``group_size`` is None for
    formats without groups.
    """

    name: str
    bits: int
    group_size: int | None
    nominal_bits: float
    padded_bits: float | None = None

    @property
    def stored_bits(self) -> float:
        """Bits per weight in the tool's files."""
        return self.nominal_bits if self.padded_bits is None else self.padded_bits

    @property
    def settings(self) -> tuple[int, int | None]:
        """Bits and group size."""
        return self.bits, self.group_size

    @property
    def is_kept(self) -> bool:
        """Whether the module is left in 16 bits."""
        return self.bits == KEPT_BITS

    def expresses(self, config: Config) -> bool:
        """Return whether it has the bits and group size of a configuration."""
        same = self.settings == (config.bits, config.group_size)
        return isinstance(config, QuantConfig) and same


#: The format of a module that is not quantized.
KEPT = Format("16-bit", KEPT_BITS, None, float(KEPT_BITS))


@dataclass(frozen=True)
class Module:
    """A tool's module, which gets one format; ``name`` is the tool's name for it.

    ``matrices`` are the planned matrices it holds: one, or all experts of a stack. ``parts`` is the
    number of modules into which each matrix is split, such as gate and up.
    """

    name: str
    matrices: tuple[Matrix, ...]
    parts: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (out, in) of one matrix in the tool."""
        out_features, in_features = self.matrices[0].shape
        return out_features // self.parts, in_features

    @property
    def numel(self) -> int:
        """Number of weights in the module."""
        return sum(matrix.numel for matrix in self.matrices) // self.parts


@dataclass(frozen=True)
class Substitution:
    """A module whose planned configuration a tool lacks, and the format to use instead.

    ``planned_bytes`` are the nominal bytes of its weights in the plan, ``taken_bytes`` those that
    the tool would store.
    """

    module: str
    planned: str
    taken: str
    reason: str
    planned_bytes: float
    taken_bytes: float


@dataclass(frozen=True)
class Change:
    """Modules with the same planned configuration, substituted format and reason."""

    planned: str
    taken: str
    reason: str
    modules: tuple[str, ...]


@dataclass(frozen=True)
class Assignment:
    """A module and the format it gets."""

    module: Module
    format: Format


@dataclass(frozen=True)
class PlanTarget:
    """A tool that a plan can be exported to; one file under ``plans/`` and a registry entry.

    ``formats`` returns the possible formats of an (out, in) matrix, preferred ones first. ``write``
    returns the text of the file, ``usage`` the code or command that uses it, given its name.
    """

    name: str
    title: str
    file_name: str
    modules: Callable[[ModelInfo, Sequence[Matrix]], list[Module]]
    formats: Callable[[int, int], tuple[Format, ...]]
    write: Callable[[Translation], str]
    usage: Callable[[Translation, str], str]
    usage_language: str
    #: Remarks on a plan in this tool.
    notes: Callable[[Translation], tuple[str, ...]] = lambda translation: ()


@dataclass(frozen=True)
class Translation:
    """A plan translated for a tool, exactly or not."""

    target: PlanTarget
    plan: Plan
    info: ModelInfo
    assignments: tuple[Assignment, ...]
    substitutions: tuple[Substitution, ...]

    @property
    def nominal_bytes(self) -> float:
        """Nominal bytes of the linear weights, as planned."""
        return self.plan.nominal_bytes

    @cached_property
    def stored_bytes(self) -> float:
        """Bytes of the linear weights in the tool's own format, metadata included."""
        return sum(a.module.numel * a.format.stored_bits / 8 for a in self.assignments)

    @property
    def substituted_bytes(self) -> float:
        """Bytes by which the substituted formats exceed the plan for those modules."""
        return sum(s.taken_bytes - s.planned_bytes for s in self.substitutions)

    @cached_property
    def changes(self) -> tuple[Change, ...]:
        """The substitutions, with identical ones grouped, most modules first."""
        modules: dict[tuple[str, str, str], list[str]] = {}
        for s in self.substitutions:
            modules.setdefault((s.planned, s.taken, s.reason), []).append(s.module)
        changes = [Change(*key, tuple(names)) for key, names in modules.items()]
        return tuple(sorted(changes, key=lambda change: -len(change.modules)))

    @property
    def model_path(self) -> str:
        """The model's Hugging Face id or folder, or a placeholder if it has neither."""
        built_in = self.info.source in BUILT_IN or ":" in self.info.source
        return "path/to/model" if built_in else self.info.source

    @property
    def text(self) -> str:
        """The content of the file that the tool reads."""
        return self.target.write(self)

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks to read before using this plan."""
        again = (
            "The tool quantizes the weights itself, so perplexities measured here are not those of "
            "its model."
        )
        return (again, *self.target.notes(self))

    def usage(self, file_name: str | None = None) -> str:
        """Return the command or Python code that uses the file."""
        return self.target.usage(self, file_name or self.target.file_name)

    def check_exact(self) -> None:
        """Raise :class:`InputError` if there are any substitutions."""
        if self.substitutions:
            raise InputError(
                f"{describe_substitutions(self)}; nothing was written; --nearest accepts this."
            )

    def to_json(self, file_name: str | None = None) -> dict:
        """Return the text, usage, modules, substitutions and sizes as JSON data."""
        return {
            "target": self.target.name,
            "text": self.text,
            "usage": self.usage(file_name),
            "notes": list(self.notes),
            "modules": {
                a.module.name: {
                    "format": a.format.name,
                    "bits": a.format.bits,
                    "group_size": a.format.group_size,
                }
                for a in self.assignments
            },
            "substitutions": [asdict(s) for s in self.substitutions],
            "changes": [
                {
                    "planned": c.planned,
                    "taken": c.taken,
                    "reason": c.reason,
                    "modules": len(c.modules),
                }
                for c in self.changes
            ],
            "nominal_bytes": self.nominal_bytes,
            "stored_bytes": self.stored_bytes,
            "substituted_bytes": self.substituted_bytes,
        }


def describe_substitutions(translation: Translation) -> str:
    """Return a clause on which modules a tool cannot express, why, and what they would become."""
    first, *others = translation.changes
    more = f", and {len(others)} other changes" if others else ""
    return (
        f"{translation.target.title} cannot express {len(translation.substitutions)} of "
        f"{len(translation.assignments)} modules: {first.planned} would become {first.taken} in "
        f"{len(first.modules)}, {first.modules[0]} among them, because {first.reason}{more}; the "
        f"linear weights would take {format_bytes(translation.stored_bytes)} there instead of "
        f"{format_bytes(translation.nominal_bytes)} nominal"
    )


def translate(plan: Plan, info: ModelInfo, target: PlanTarget) -> Translation:
    """Translate a plan for a tool: every module once, by the tool's name.

    Raises
    ------
    InputError
        If the tool's names for the model's modules are not known.
    """
    check_expert_stacks(plan.matrices)
    choice = plan.choice
    assignments, substitutions = [], []
    for module in target.modules(info, plan.matrices):
        formats = target.formats(*module.shape)
        configs = {choice[matrix] for matrix in module.matrices}
        reason = _inexpressible(module, configs, formats, plan.axis)
        if reason:
            planned = sum(matrix_bytes(nominal_bytes, m, choice[m]) for m in module.matrices)
            taken, made = _substitute(module, configs, formats, planned / module.parts, reason)
            substitutions.append(made)
        else:
            (config,) = configs
            taken = next(f for f in formats if f.expresses(config))
        assignments.append(Assignment(module, taken))
    return Translation(target, plan, info, tuple(assignments), tuple(substitutions))


def _substitute(
    module: Module, configs: set[Config], formats: Sequence[Format], planned: float, reason: str
) -> tuple[Format, Substitution]:
    """Return the nearest format for a module planned to take ``planned`` nominal bytes."""
    widths = {c.bits if isinstance(c, QuantConfig) else None for c in configs}
    width = widths.pop() if len(widths) == 1 else None
    taken = nearest_format(formats, 8 * planned / module.numel, width)
    return taken, Substitution(
        module=module.name,
        planned=", ".join(sorted(config.name for config in configs)),
        taken=taken.name,
        reason=reason,
        planned_bytes=planned,
        taken_bytes=module.numel * taken.stored_bits / 8,
    )


def nearest_format(
    formats: Sequence[Format], bits_per_weight: float, width: int | None = None
) -> Format:
    """Return the format closest to the planned nominal bits per weight, metadata included.

    Only formats with codes of ``width`` bits are considered if there are any. Of two equally close
    formats, the first is returned.
    """
    same_width = [f for f in formats if f.bits == width]
    return min(same_width or formats, key=lambda f: abs(f.nominal_bits - bits_per_weight))


def _inexpressible(
    module: Module,
    configs: set[Config],
    formats: Sequence[Format],
    axis: int,
) -> str:
    """Return why a tool cannot express a module's plan, or an empty string if it can."""
    if len(configs) > 1:
        return "it stores all experts of a layer in one tensor"
    (config,) = configs
    if isinstance(config, MixedRows):
        return "all rows of a matrix have the same bits there"
    if all(f.group_size is None for f in formats if not f.is_kept):
        return "it has no group sizes"
    if axis != 1:
        return "its groups run along rows, but this plan's down columns"
    if module.shape[1] % config.group_size:
        return f"groups of {config.group_size} do not fill rows of {module.shape[1]}"
    if not any(f.expresses(config) for f in formats):
        return f"it has no {config.bits} bits with groups of {config.group_size} for this shape"
    return ""


# --- shared by several tools ----------------------------------------------------------------


def linear_modules(info: ModelInfo, matrices: Sequence[Matrix]) -> list[Module]:
    """Return a model's linear modules, with each expert separate, in the plan's order.

    Raises
    ------
    InputError
        See :func:`lsq_core.exports.names.expert_names`.
    """
    found = []
    for matrix in matrices:
        names = expert_names(matrix)
        found += [Module(name, (matrix,), len(names)) for name in names]
    return found


#: Model types whose planned modules are transformers' ``Conv1D``.
_CONV1D_MODELS = ("decision_transformer", "gpt-sw3", "gpt2", "imagegpt", "openai-gpt")


def refuse_conv1d(
    modules: Callable[[ModelInfo, Sequence[Matrix]], list[Module]], title: str
) -> Callable[[ModelInfo, Sequence[Matrix]], list[Module]]:
    """Wrap ``modules`` for a tool that only quantizes ``nn.Linear``: refuse ``Conv1D`` models."""

    def checked(info: ModelInfo, matrices: Sequence[Matrix]) -> list[Module]:
        if info.config.get("model_type") in _CONV1D_MODELS:
            raise InputError(
                f"{title} quantizes linear modules, and those of {info.architecture} are Conv1D."
            )
        return modules(info, matrices)

    return checked


def grouped_formats(
    in_features: int,
    bits: Sequence[int],
    metadata_bits: Callable[[int], float],
    groups: Sequence[int] = (128, 64, 32),
) -> tuple[Format, ...]:
    """Return every width with every group size that divides a row, and 16 bits.

    Names are those of this project. ``metadata_bits`` maps a width to the bits of a group's scale
    and zero point.
    """
    return (
        *(
            Format(f"b{width}g{group}", width, group, width + metadata_bits(width) / group)
            for width in bits
            for group in groups
            if in_features % group == 0
        ),
        KEPT,
    )


def most_frequent(translation: Translation) -> tuple[int, int | None]:
    """Return the most frequent bits and group size; 4 and 128 if no module is quantized."""
    counts = Counter(a.format.settings for a in translation.assignments if not a.format.is_kept)
    return counts.most_common(1)[0][0] if counts else (4, 128)


#: Modules that vLLM fuses into one, which then has a single configuration.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def fused_disagreements(translation: Translation) -> list[str]:
    """Return the first module of each group that vLLM fuses and this plan gives mixed formats."""
    formats = {a.module.name: a.format.settings for a in translation.assignments}
    found = []
    for name in formats:
        parent, _, leaf = name.rpartition(".")
        for members in _FUSED:
            if leaf == members[0]:
                each = {formats.get(f"{parent}.{member}", formats[name]) for member in members}
                if len(each) > 1:
                    found.append(f"{parent}.{members[0]}")
    return found


def serving_note(translation: Translation) -> tuple[str, ...]:
    """Return a note if vLLM, which fuses q, k and v, and gate and up, cannot serve this plan."""
    different = fused_disagreements(translation)
    if not different:
        return ()
    return (
        "vLLM fuses q, k and v, and gate and up, and cannot serve this plan: it gives "
        f"{len(different)} of those different configurations, the first at {different[0]}.",
    )
