"""A plan in another tool's terms: what the tool calls each module, and the format each one gets.

A tool may lack a configuration of the plan. :func:`translate` then names the module, the reason
and the format that would be taken instead (:func:`nearest_format`). Nothing here writes.
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

#: Bits of a module that a tool is told to leave as it is.
KEPT_BITS = 16


@dataclass(frozen=True)
class Format:
    """One of the ways in which a tool stores a matrix.

    ``nominal_bits`` are bits per weight with the scales and zero points that the tool keeps,
    ``stored_bits`` what its files take where that is more. ``group_size`` is None where there are
    no groups.
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
        """Whether it has the bits and groups of a configuration."""
        same = self.settings == (config.bits, config.group_size)
        return isinstance(config, QuantConfig) and same


#: A module that stays as it is.
KEPT = Format("16-bit", KEPT_BITS, None, float(KEPT_BITS))


@dataclass(frozen=True)
class Module:
    """What a tool gives one format, by its own name for it.

    ``matrices`` are the planned ones it holds: one, or all experts of a stack. ``parts`` is into
    how many modules each of those is divided, as gate and up are.
    """

    name: str
    matrices: tuple[Matrix, ...]
    parts: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of one matrix in the tool's terms."""
        out_features, in_features = self.matrices[0].shape
        return out_features // self.parts, in_features

    @property
    def numel(self) -> int:
        """Weights of all its matrices."""
        return sum(matrix.numel for matrix in self.matrices) // self.parts


@dataclass(frozen=True)
class Substitution:
    """A module whose planned configuration a tool lacks, and what would be taken instead.

    Bytes are those of its weights: nominal ones of the plan, and those the tool would store.
    """

    module: str
    planned: str
    taken: str
    reason: str
    planned_bytes: float
    taken_bytes: float


@dataclass(frozen=True)
class Change:
    """Modules of one planned configuration that would get the same format for the same reason."""

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
    """A tool that a plan can be written for; one file under ``plans/`` and a registry entry.

    ``formats`` gives what a matrix of (out, in) can be stored as, preferred ones first.
    ``write`` makes the text of the file, ``usage`` the lines that use it, given the file's name.
    """

    name: str
    title: str
    file_name: str
    modules: Callable[[ModelInfo, Sequence[Matrix]], list[Module]]
    formats: Callable[[int, int], tuple[Format, ...]]
    write: Callable[[Translation], str]
    usage: Callable[[Translation, str], str]
    usage_language: str
    #: Sentences about this plan in this tool.
    notes: Callable[[Translation], tuple[str, ...]] = lambda translation: ()


@dataclass(frozen=True)
class Translation:
    """A plan in a tool's terms, whether or not that is exact."""

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
        """By how many bytes what is taken instead exceeds what was planned for those modules."""
        return sum(s.taken_bytes - s.planned_bytes for s in self.substitutions)

    @cached_property
    def changes(self) -> tuple[Change, ...]:
        """The substitutions, alike ones together, most modules first."""
        modules: dict[tuple[str, str, str], list[str]] = {}
        for s in self.substitutions:
            modules.setdefault((s.planned, s.taken, s.reason), []).append(s.module)
        changes = [Change(*key, tuple(names)) for key, names in modules.items()]
        return tuple(sorted(changes, key=lambda change: -len(change.modules)))

    @property
    def model_path(self) -> str:
        """How the tool finds the model: its Hugging Face id or folder, where it has one."""
        built_in = self.info.source in BUILT_IN or ":" in self.info.source
        return "path/to/model" if built_in else self.info.source

    @property
    def text(self) -> str:
        """The file that the tool reads."""
        return self.target.write(self)

    @property
    def notes(self) -> tuple[str, ...]:
        """What else there is to know before this plan is used."""
        again = (
            "The tool quantizes the weights itself, so perplexities measured here are not those of "
            "its model."
        )
        return (again, *self.target.notes(self))

    def usage(self, file_name: str | None = None) -> str:
        """The command or the lines of Python that use the file."""
        return self.target.usage(self, file_name or self.target.file_name)

    def check_exact(self) -> None:
        """Raise :class:`InputError` if anything would have to be taken instead."""
        if self.substitutions:
            raise InputError(
                f"{describe_substitutions(self)}; nothing was written, and --nearest takes it."
            )

    def to_json(self, file_name: str | None = None) -> dict:
        """Return the text, how it is used, what it replaces and its sizes."""
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
    """A clause that says which modules a tool cannot express, why, and what would be taken."""
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
    """A plan in a tool's terms: every module once, by its name there.

    Raises
    ------
    InputError
        When the tool's names for the model's modules are not known.
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
    """The nearest format for a module that was planned to take so many nominal bytes."""
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
    """The format closest in bits per weight, metadata included, to planned nominal bits.

    Where codes of ``width`` bits were planned and there are any, one of those is taken. Of two
    equally close it is the first.
    """
    same_width = [f for f in formats if f.bits == width]
    return min(same_width or formats, key=lambda f: abs(f.nominal_bits - bits_per_weight))


def _inexpressible(
    module: Module,
    configs: set[Config],
    formats: Sequence[Format],
    axis: int,
) -> str:
    """Why a tool cannot give a module what was planned; '' where it can."""
    if len(configs) > 1:
        return "all experts of a layer are one tensor there"
    (config,) = configs
    if isinstance(config, MixedRows):
        return "all rows of a matrix have the same bits there"
    if all(f.group_size is None for f in formats if not f.is_kept):
        return "it has no group sizes"
    if axis != 1:
        return "its groups run along rows, and this plan's down columns"
    if module.shape[1] % config.group_size:
        return f"groups of {config.group_size} do not fill rows of {module.shape[1]}"
    if not any(f.expresses(config) for f in formats):
        return f"it has no {config.bits} bits with groups of {config.group_size} for this shape"
    return ""


# --- what several tools have in common ------------------------------------------------------


def linear_modules(info: ModelInfo, matrices: Sequence[Matrix]) -> list[Module]:
    """The linear modules of a model whose experts are taken apart, in the plan's order.

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
    """The same names, for a tool that quantizes ``nn.Linear`` alone: other models are refused."""

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
    """Every width with every group that fills a row, named as this project does, and 16 bits.

    ``metadata_bits`` gives the bits of scale and zero point that a group of a width has.
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
    """Bits and group size of most modules; 4 and 128 where all of them are kept."""
    counts = Counter(a.format.settings for a in translation.assignments if not a.format.is_kept)
    return counts.most_common(1)[0][0] if counts else (4, 128)


#: Modules that vLLM fuses into one, which then has one configuration.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def fused_disagreements(translation: Translation) -> list[str]:
    """The groups of modules that vLLM fuses and this plan gives different formats, by a name."""
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
    """Whether vLLM, which fuses q, k and v and gate and up, can serve this plan."""
    different = fused_disagreements(translation)
    if not different:
        return ()
    return (
        "vLLM fuses q, k and v, and gate and up, and cannot serve this plan: it gives "
        f"{len(different)} of those different configurations, the first at {different[0]}.",
    )
