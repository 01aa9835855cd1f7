"""The layout of a result card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from lsq_core.bits import parse_config
from lsq_core.charts import config_color, short_type
from lsq_core.charts.style import BIT_COLORS
from lsq_core.results.card_drawing import HEIGHT, WIDTH, Box, Line, Shape, text_width

_TEXT, _QUIET, _RULE = "#1c2530", "#566270", "#d9dee4"
_MARGIN = 56
_RIGHT = WIDTH - _MARGIN
#: Width of the column of module types beside the plan.
_NAMES = 92
#: Baseline of the last line, and position of the rule above it.
_FOOT, _FOOT_RULE = HEIGHT - 26, HEIGHT - 54


@dataclass(frozen=True)
class Figure:
    """A figure, with its label above and an explanation below."""

    label: str
    value: str
    about: str


@dataclass(frozen=True, eq=False)
class Card:
    """The content of a card.

    ``plan`` is from :func:`lsq_core.planning.frame.plan_to_frame`, without rows if it was not
    published; ``foot`` and ``mark`` are at the bottom left and right.
    """

    model: str
    setup: str
    headline: str
    figures: tuple[Figure, ...]
    plan: pd.DataFrame
    foot: str
    mark: str


def lay_out(card: Card) -> list[Shape]:
    """Return the shapes of a card, from top to bottom."""
    head, y = _head(card)
    figures, y = _figures(card.figures, y)
    foot = [
        Box(_MARGIN, _FOOT_RULE, _RIGHT - _MARGIN, 1, _RULE),
        Line(_MARGIN, _FOOT, fit(card.foot, 15, _RIGHT - _MARGIN - 300), 15, _QUIET),
        Line(_RIGHT, _FOOT, card.mark, 15, _QUIET, anchor="end"),
    ]
    return [*head, *figures, *_plan(card.plan, y, _FOOT_RULE - 16), *foot]


def _head(card: Card) -> tuple[list[Shape], float]:
    shapes: list[Shape] = [*_brand()]
    name = fit(card.model, 27, 760, 600)
    shapes.append(Line(_MARGIN, 68, name, 27, _TEXT, 600))
    shapes.append(Line(_MARGIN, 97, fit(card.setup, 18, 900), 18, _QUIET))
    size = next(
        (s for s in (46, 42, 38, 34) if len(wrap(card.headline, s, _RIGHT - _MARGIN, 700)) <= 2), 30
    )
    y = 110.0
    for text in balance(card.headline, size, _RIGHT - _MARGIN, 700)[:2]:
        y += 1.12 * size
        shapes.append(Line(_MARGIN, y, text, size, _TEXT, 700))
    return shapes, y + 26


def _brand() -> list[Shape]:
    """Return the page's icon, with bars as high as their bits, and the name beside it."""
    name = "LSQ Explorer"
    left = _RIGHT - text_width(name, 18, 600)
    bars = [
        Box(left - 40 + 8 * i, 68 - 2.6 * bits, 6, 2.6 * bits, color)
        for i, (bits, color) in enumerate((b, BIT_COLORS[b]) for b in (2, 3, 4, 8))
    ]
    return [*bars, Line(_RIGHT, 67, name, 18, _TEXT, 600, "end")]


def _figures(figures: Sequence[Figure], y: float) -> tuple[list[Shape], float]:
    shapes: list[Shape] = []
    step = (_RIGHT - _MARGIN) / len(figures)
    for k, figure in enumerate(figures):
        x = _MARGIN + k * step
        shapes += [
            Line(x, y + 16, figure.label, 16, _QUIET),
            Line(x, y + 47, figure.value, 30, _TEXT, 600),
            Line(x, y + 69, fit(figure.about, 15, step - 12), 15, _QUIET),
        ]
    return shapes, y + 94


# --- the plan -------------------------------------------------------------------------------


def _plan(plan: pd.DataFrame, top: float, bottom: float) -> list[Shape]:
    if plan.empty:
        return [Line(_MARGIN, top + 24, "Its plan was not published.", 18, _QUIET)]
    kinds = list(dict.fromkeys(plan["type"]))
    layers = sorted(plan["layer"].unique())
    row = min((bottom - top - 54) / len(kinds), 30)
    column = (_RIGHT - _MARGIN - _NAMES) / len(layers)
    gap = 1.5 if column > 6 and row > 6 else 0.0
    shapes: list[Shape] = []
    for (kind, layer), part in plan.groupby(["type", "layer"], sort=False):
        config = part["config"].value_counts().index[0]  # the most common one among experts
        x = _MARGIN + _NAMES + layers.index(layer) * column
        y = top + kinds.index(kind) * row
        about = f"layer {layer}, {short_type(kind)}: {config}"
        color = config_color(parse_config(config))
        shapes.append(Box(x, y, column - gap, row - gap, color, about))
    size = min(15, row - 2)
    every = 1 if size >= 11 else len(kinds)  # without room for all names, draw only the first
    for k, kind in enumerate(kinds):
        if k % every == 0:
            y = top + (k + 0.5) * row + 0.32 * size
            shapes.append(Line(_MARGIN, y, fit(short_type(kind), size, _NAMES - 8), size, _TEXT))
    y = top + len(kinds) * row + 17
    return [*shapes, *_layer_axis(layers, column, y), *_legend(plan, y + 26)]


def _layer_axis(layers: Sequence[int], column: float, y: float) -> list[Shape]:
    step = next((by for by in (1, 2, 5, 10, 20) if by * column >= 30), 50)
    ticks: list[Shape] = [
        Line(_MARGIN + _NAMES + (k + 0.5) * column, y, str(layer), 14, _QUIET, anchor="middle")
        for k, layer in enumerate(layers)
        if layer % step == 0
    ]
    return [Line(_MARGIN, y, "layer", 14, _QUIET), *ticks]


def _legend(plan: pd.DataFrame, y: float) -> list[Shape]:
    """Return the used configurations and their counts, by increasing bits, as far as they fit."""
    counts = plan["config"].value_counts()
    shapes: list[Shape] = []
    x: float = _MARGIN
    for config in sorted(map(parse_config, counts.index), key=lambda c: c.nominal_bits):
        text = f"{config.nominal_bits:.2f} bits × {counts[config.name]}"
        if x + 18 + text_width(text, 15) > _RIGHT:
            shapes.append(Line(x, y, "…", 15, _QUIET))
            break
        shapes.append(Box(x, y - 11, 12, 12, config_color(config), config.name))
        shapes.append(Line(x + 18, y, text, 15, _TEXT))
        x += 18 + text_width(text, 15) + 22
    return shapes


# --- text -----------------------------------------------------------------------------------


def fit(text: str, size: float, width: float, weight: int = 400) -> str:
    """Return a text that fits a width, truncated if necessary."""
    if text_width(text, size, weight) <= width:
        return text
    while text and text_width(f"{text}…", size, weight) > width:
        text = text[:-1]
    return f"{text.rstrip()}…"


def balance(text: str, size: float, width: float, weight: int = 400) -> list[str]:
    """Wrap a text into as few lines as possible, of lengths as equal as possible."""
    lines = wrap(text, size, width, weight)
    while True:
        width -= size / 2
        narrower = wrap(text, size, width, weight)
        widest = max(text_width(line, size, weight) for line in narrower)
        if len(narrower) > len(lines) or widest > width:
            return lines
        lines = narrower


def wrap(text: str, size: float, width: float, weight: int = 400) -> list[str]:
    """Wrap a text into lines that fit a width; break at spaces, but not at non-breaking ones."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and text_width(longer, size, weight) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
