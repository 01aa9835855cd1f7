"""Pins: modules that the user fixes to a configuration or a range of configurations."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from lsq_core.bits import EXTENDED_LADDER, LADDER, Config, MixedRows, parse_config
from lsq_core.errors import InputError
from lsq_core.model.info import Matrix
from lsq_core.planning.problem import Problem

#: Scopes of a pin made from one matrix.
SCOPES = ("module", "layer", "type")


@dataclass(frozen=True)
class Pin:
    """A pattern for full module names, and the lowest and highest option that they may get."""

    pattern: str
    low: int
    high: int
    options: tuple[Config, ...] = LADDER

    @classmethod
    def parse(cls, text: str, options: tuple[Config, ...] = LADDER) -> Pin:
        """Parse ``*.layers.0.self_attn.*=b8g64`` or ``*.down_proj=b3g128..b4g64``.

        If the options are mixed rows, a pin has the form ``*.down_proj=b2h3r20g128``.

        Raises
        ------
        InputError
            If the text has another form, the method has no such option, or the range is reversed.
        """
        pattern, separator, configs = text.rpartition("=")
        if not separator or not pattern.strip():
            raise InputError(
                f"'{text}' is not a pin; write a pattern of module names and a configuration, "
                "such as '*.layers.0.self_attn.*=b8g64' or '*.down_proj=b3g128..b4g64'."
            )
        first, _, last = configs.partition("..")
        low = _option_index(first, options)
        high = _option_index(last, options) if last else low
        if low > high:
            raise InputError(f"The pin '{text}' runs from more bits to fewer; reverse it.")
        return cls(pattern.strip(), low, high, options)

    @classmethod
    def from_matrix(
        cls,
        matrix: Matrix,
        scope: str,
        low: int,
        high: int,
        options: tuple[Config, ...] = LADDER,
    ) -> Pin:
        """Create a pin for a matrix's module (with all experts), its layer or its type."""
        before, _, inside = matrix.name.partition(f".{matrix.layer}.")
        inside = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", inside)
        layer = f"{before}.{matrix.layer}."
        patterns = {"module": layer + inside, "layer": f"{layer}*", "type": f"*.{inside}"}
        return cls(patterns[scope], low, high, options)

    def __str__(self) -> str:
        """Return the text that :meth:`parse` accepts."""
        low, high = self.options[self.low].name, self.options[self.high].name
        return f"{self.pattern}={low}" + ("" if low == high else f"..{high}")


def _option_index(name: str, options: tuple[Config, ...]) -> int:
    config = parse_config(name)
    if config not in options:
        if config in EXTENDED_LADDER and options == LADDER:
            raise InputError(
                f"'{name}' is on the extended ladder, but this plan uses the paper's; plan with "
                "--ladder extended."
            )
        kind = "mixed rows" if isinstance(options[0], MixedRows) else "the ladder"
        raise InputError(
            f"'{name}' is not an option of this method, which plans on {kind}; choose one of "
            f"{', '.join(c.name for c in options)}."
        )
    return options.index(config)


def apply_pins(problem: Problem, pins: tuple[str, ...]) -> Problem:
    """Restrict a problem to the options that pins allow; pins on the same module must overlap.

    A pin on a tied module applies to all modules tied to it.

    Raises
    ------
    InputError
        If a pin is invalid or matches no module, two contradict each other, or a matrix is left
        without an option.
    """
    if not pins:
        return problem
    low, high = problem.low.copy(), problem.high.copy()
    last: dict[int, Pin] = {}
    for pin in (Pin.parse(text, problem.options) for text in pins):
        matched = [i for i, m in enumerate(problem.matrices) if fnmatchcase(m.name, pin.pattern)]
        if not matched:
            raise InputError(
                f"The pin '{pin}' matches no module; names look like {problem.matrices[0].name}."
            )
        for i in dict.fromkeys(tied for match in matched for tied in problem.tied_to(match)):
            if pin.low > high[i] or pin.high < low[i]:
                tied = " or a module tied to it" if len(problem.tied_to(i)) > 1 else ""
                raise InputError(
                    f"The pins '{last[i]}' and '{pin}' contradict each other for "
                    f"{problem.matrices[i].name}{tied}; drop one of them."
                )
            low[i], high[i] = max(low[i], pin.low), min(high[i], pin.high)
            last[i] = pin
    pinned = replace(problem, pinned_low=low, pinned_high=high)
    for i, pin in last.items():
        if not pinned.allowed[i].any():
            matrix = problem.matrices[i]
            why = problem.permitted_by or (
                f"no group size in it fills {matrix.out_features}×{matrix.in_features} weights"
            )
            raise InputError(f"The pin '{pin}' leaves no configuration for {matrix.name}: {why}.")
    return pinned
