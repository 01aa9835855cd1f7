"""The live planner: a plan that is redrawn in the browser while the budget slider moves.

Python sends the plans for all budgets once, as the frontier's segments; the browser looks up a
budget's plan in the same way (``frontier.js``) and sends back only the committed budget.
"""

from __future__ import annotations

import hashlib
import json
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np

from lsq_core.bits import GROUP_SIZES, LADDER, LADDERS, Config, QuantConfig
from lsq_core.charts import config_color, method_style, short_type
from lsq_core.planning.frontier import Frontier
from lsq_core.planning.pins import Pin
from lsq_core.planning.problem import Problem
from lsq_core.ui.safe import st

_FOLDER = Path(__file__).parent
#: In dependency order; they are concatenated into one module.
_SCRIPTS = (
    "frontier.js",
    "words.js",
    "heatmap.js",
    "strip.js",
    "comparing.js",
    "units.js",
    "drawing.js",
    "details.js",
    "planner.js",
)


@dataclass(frozen=True, eq=False)
class Curve:
    """Predicted perplexity by budget, with its band: arrays (k,), ``bits`` ascending."""

    bits: np.ndarray
    perplexity: np.ndarray
    low: np.ndarray
    high: np.ndarray
    full_precision: float


@dataclass(frozen=True, eq=False)
class ExactPlan:
    """An exactly solved plan for one budget: stops (n,), and a lower bound of its cost."""

    choice: np.ndarray
    lower_bound: float


@dataclass(frozen=True, eq=False)
class LayerScores:
    """The sensitivity of each layer, drawn above a plan: ``values`` (layers,), NaN if unknown.

    ``name`` is a short label next to the bars; ``label`` is the metric's title.
    """

    name: str
    label: str
    values: np.ndarray


@dataclass(frozen=True, eq=False)
class FreePlans:
    """A method's plans without ties and server, with their predicted perplexity."""

    frontier: Frontier
    curve: Curve | None = None


@dataclass(frozen=True, eq=False)
class LiveMethod:
    """A method whose plans are drawn; ``unit`` is the unit of its cost, empty if it has none.

    ``at_budget`` is the predicted perplexity of the plan at the committed budget, with its band,
    whereas the curve is interpolated. ``solved`` replaces the frontier's plan at that budget.
    ``free`` holds the method's plans without ties and server, from which the cost of those is
    computed.
    """

    name: str
    title: str
    frontier: Frontier
    unit: str = ""
    curve: Curve | None = None
    at_budget: tuple[float, float, float] | None = None
    solved: ExactPlan | None = None
    scores: LayerScores | None = None
    free: FreePlans | None = None


@dataclass(frozen=True)
class Preset:
    """A budget to jump to; ``bits`` per parameter may lie outside the feasible range."""

    label: str
    bits: float
    about: str


@dataclass(frozen=True, eq=False)
class MatrixFacts:
    """A quantity in the details of a cell, by matrix: values (n,), NaN if unknown."""

    label: str
    values: np.ndarray


def _read(name: str) -> str:
    return (_FOLDER / name).read_text("utf8")


_mount = st.components.v2.component(
    name="lsq_live_planner",
    html=_read("planner.html"),
    css=_read("planner.css"),
    js="\n".join(map(_read, _SCRIPTS)),
)


def live_planner(
    problem: Problem,
    methods: Sequence[LiveMethod],
    *,
    budget: float | None,
    budget_bytes: int | None = None,
    other_bytes: int | None,
    metadata: str,
    presets: Sequence[Preset] = (),
    facts: Sequence[MatrixFacts] = (),
    fixed: np.ndarray | None = None,
    feasible: tuple[float, float],
    uniform: Curve | None = None,
    pins: Sequence[str] = (),
    on_pins: Callable[[tuple[str, ...]], None] | None = None,
    key: str = "planner",
) -> None:
    """Draw the slider and the plan of one or two methods at the same budget.

    Parameters
    ----------
    budget
        Bits per parameter to show: the last result of :func:`read_committed_budget`, unless the
        budget has changed since. None with ``fixed``.
    budget_bytes
        Planned bytes that bound every plan instead of the bits; None if the bits do.
    other_bytes
        Bytes of the rest of the model, in the checkpoint's dtype; None if unknown.
    metadata
        How scale and zero point are stored, which determines the planned bytes.
    fixed
        Stops (n,) of one plan to show without a slider.
    feasible
        Bits per parameter of the smallest and the largest plan.
    uniform
        Predicted perplexity of the uniform plans, one point each, to compare plans with.
    pins
        The pins that restrict the problem, as typed.
    on_pins
        Called with all resulting pins when the user adds or drops one in the browser.
    """
    data = payload(
        problem,
        methods,
        budget=budget,
        budget_bytes=budget_bytes,
        other_bytes=other_bytes,
        metadata=metadata,
        presets=presets,
        facts=facts,
        fixed=fixed,
        feasible=feasible,
        uniform=uniform,
        pins=pins,
    )
    serial = st.session_state.get(f"{key}_serial")

    def change_pins() -> None:
        change = (st.session_state.get(key) or {}).get("pins")
        if change and on_pins:
            on_pins(update_pins(problem, pins, change))

    _mount(
        data=data | {"serial": serial},
        key=key,
        on_commit_change=_noop,
        on_pins_change=change_pins,
    )


def _noop() -> None:
    """Do nothing; a component's state is only available if it has a callback."""


def update_pins(problem: Problem, pins: Sequence[str], change: dict) -> tuple[str, ...]:
    """Return the pins after the browser dropped one (``{"drop": k}``) or pinned a matrix."""
    if "drop" in change:
        return tuple(pin for k, pin in enumerate(pins) if k != change["drop"])
    matrix = problem.matrices[int(change["matrix"])]
    low, high = int(change["low"]), int(change["high"])
    return (*pins, str(Pin.from_matrix(matrix, change["scope"], low, high, problem.options)))


@dataclass(frozen=True)
class CommittedBudget:
    """Bits per parameter with four decimals, and the planned bytes if a size was typed."""

    bits: float
    bytes: int | None


def read_committed_budget(key: str = "planner") -> CommittedBudget | None:
    """Return the budget committed in the browser since the last call, or None.

    The page calls this before drawing, stores the budget, and passes it to :func:`live_planner`.
    Each commit has a serial, which is sent back to the browser: it tells whether a budget from
    Python answers the browser's last commit or an older one, and allows the same budget to be
    committed twice.
    """
    commit = (st.session_state.get(key) or {}).get("commit")
    if not commit or commit["serial"] == st.session_state.get(f"{key}_serial"):
        return None
    st.session_state[f"{key}_serial"] = commit["serial"]
    planned = commit.get("bytes")
    return CommittedBudget(
        round(float(commit["bits"]), 4), None if planned is None else int(planned)
    )


# --- what is sent ---------------------------------------------------------------------------


def payload(
    problem: Problem,
    methods: Sequence[LiveMethod],
    *,
    budget: float | None,
    budget_bytes: int | None = None,
    other_bytes: int | None,
    metadata: str,
    presets: Sequence[Preset],
    facts: Sequence[MatrixFacts],
    fixed: np.ndarray | None,
    feasible: tuple[float, float],
    uniform: Curve | None,
    pins: Sequence[str],
) -> dict:
    """Return the JSON sent to the browser; arrays are little-endian and base64-encoded."""
    return {
        "model": _model_payload(problem, metadata),
        "methods": [_method_payload(method) for method in methods],
        "facts": [{"label": f.label, "values": encode_array(f.values, "<f8")} for f in facts],
        "presets": [{"label": p.label, "bits": p.bits, "about": p.about} for p in presets],
        "budget": budget,
        "budgetBytes": budget_bytes,
        "feasible": list(feasible),
        "uniform": None if uniform is None else _curve_payload(uniform),
        "otherBytes": other_bytes,
        "fixed": None if fixed is None else encode_array(fixed, "u1"),
        "pins": list(pins),
        "tied": encode_array(problem.items, "<i4") if problem.groups else None,
        "allowed": {
            "low": encode_array(problem.low, "u1"),
            "high": encode_array(problem.high, "u1"),
        },
    }


def _method_payload(method: LiveMethod) -> dict:
    return {
        "name": method.name,
        "title": method.title,
        "color": method_style(method.name).color,
        "unit": method.unit,
        "curve": None if method.curve is None else _curve_payload(method.curve),
        "here": method.at_budget,
        "frontier": frontier_payload(method.frontier),
        "solved": None if method.solved is None else _solved_payload(method.solved),
        "scores": None if method.scores is None else _scores_payload(method.scores),
        "free": None if method.free is None else _free_payload(method.free),
    }


def _free_payload(free: FreePlans) -> dict:
    curve = None if free.curve is None else _curve_payload(free.curve)
    return {"frontier": frontier_payload(free.frontier), "curve": curve}


def _scores_payload(scores: LayerScores) -> dict:
    values = encode_array(scores.values, "<f8")
    return {"name": scores.name, "label": scores.label, "values": values}


def _solved_payload(solved: ExactPlan) -> dict:
    return {"choice": encode_array(solved.choice, "u1"), "bound": solved.lower_bound}


def _curve_payload(curve: Curve) -> dict:
    columns = {name: getattr(curve, name) for name in ("bits", "perplexity", "low", "high")}
    arrays = {name: encode_array(values, "<f8") for name, values in columns.items()}
    return arrays | {"full": float(curve.full_precision)}


#: Payloads already encoded, reused by reruns.
_frontiers: WeakKeyDictionary[Frontier, dict] = WeakKeyDictionary()
_models: WeakKeyDictionary[Problem, dict[str, dict]] = WeakKeyDictionary()


def frontier_payload(frontier: Frontier) -> dict:
    """Encode a frontier's segments: starts (s, n) and concatenated moves, without their bytes.

    The browser computes the bytes. If matrices are tied, rows and moves refer to items, and
    ``items`` holds the item of each matrix.
    """
    if frontier not in _frontiers:
        steps = [segment.steps for segment in frontier.segments]
        wide = len(frontier.nominal) > np.iinfo(np.int16).max
        matrices = np.concatenate([np.array(s.matrix, dtype=np.int64) for s in steps])
        _frontiers[frontier] = _with_id(
            {
                "columns": frontier.nominal.shape[1],
                "costs": None if frontier.cost is None else encode_array(frontier.cost, "<f8"),
                "losses": None if frontier.losses is None else encode_array(frontier.losses, "<f8"),
                "lowerBounds": None
                if frontier.lower_bounds is None
                else encode_array(frontier.lower_bounds, "<f8"),
                "starts": encode_array(np.stack([s.start for s in frontier.segments]), "u1"),
                "counts": [len(s.matrix) for s in steps],
                "matrices": encode_array(matrices, "<i4" if wide else "<i2"),
                "wide": wide,
                "items": None if frontier.items is None else encode_array(frontier.items, "<i4"),
                "stops": encode_array(np.concatenate([np.array(s.reached) for s in steps]), "u1"),
            }
        )
    return _frontiers[frontier]


def _model_payload(problem: Problem, metadata: str) -> dict:
    """Encode the matrices and options; bytes have a row per distinct shape, a column per option."""
    cached = _models.setdefault(problem, {})
    if metadata not in cached:
        matrices = problem.matrices
        types = list(dict.fromkeys(m.type for m in matrices))
        shapes = [m.shape for m in matrices]
        first = {shape: i for i, shape in reversed(list(enumerate(shapes)))}
        shape_index = {shape: k for k, shape in enumerate(first)}
        one_of_each = list(first.values())
        planned = problem.planned(metadata)[one_of_each]
        on_ladder = problem.options in LADDERS.values()
        ladder = problem.options if on_ladder else LADDER
        bits = 8 * problem.bytes.sum(axis=0) / problem.total
        reference = QuantConfig(3, 128) if on_ladder else problem.options[0].low
        cached[metadata] = _with_id(
            {
                "names": "\n".join(m.name for m in matrices),
                "layers": encode_array([m.layer for m in matrices], "<i4"),
                "types": [short_type(kind) for kind in types],
                "typeOf": encode_array([types.index(m.type) for m in matrices], "<i4"),
                "numel": encode_array(problem.numel, "<f8"),
                "sizeOf": encode_array([shape_index[shape] for shape in shapes], "<i4"),
                "planned": encode_array(planned, "<f8"),
                "nominal": None if on_ladder else encode_array(problem.bytes[one_of_each], "<f8"),
                "stops": [{"name": c.stop_name, "bits": c.nominal_bits} for c in ladder],
                "ticks": _tick_order(problem.options),
                "reference": {"name": reference.stop_name, "bits": reference.nominal_bits},
                "ladder": [
                    {
                        "name": c.name,
                        "stop": c.stop_name,
                        "bits": c.nominal_bits if on_ladder else float(bits[j]),
                        "color": config_color(c),
                    }
                    for j, c in enumerate(problem.options)
                ],
            }
        )
    return cached[metadata]


#: Order in which bits and group sizes get tick labels if there is not room for all.
_TICK_BITS, _TICK_GROUPS = (3, 4, 8, 2, 5, 6, 1), (GROUP_SIZES[0], GROUP_SIZES[2], GROUP_SIZES[1])


def _tick_order(options: Sequence[Config]) -> list[int]:
    """Return the options in the order in which the slider's ticks are labelled."""
    if options not in LADDERS.values():
        return sorted(range(len(options)), key=lambda j: (j not in (0, len(options) - 1), j))
    keys = [(_TICK_GROUPS.index(c.group_size), _TICK_BITS.index(c.bits)) for c in options]
    return sorted(range(len(options)), key=lambda j: keys[j])


def _with_id(content: dict) -> dict:
    """Add a digest, by which the browser recognizes unchanged content."""
    digest = hashlib.blake2b(json.dumps(content).encode(), digest_size=9)
    return content | {"id": digest.hexdigest()}


def encode_array(values: np.typing.ArrayLike, kind: str) -> str:
    """Encode the values' bytes in base64, which unlike JSON preserves infinity and NaN."""
    return b64encode(np.ascontiguousarray(values, dtype=kind).tobytes()).decode("ascii")
