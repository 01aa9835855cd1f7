"""What the person has chosen, kept across pages and, where it is worth sharing, in the address.

Widgets write under the keys used here, with ``persist_state="session"``; the address is written
from the session and read only when a session begins, so that a link or a reload brings the
choice back. Trust is never read from the address.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

from lsq_core.bits import (
    EXTENDED_LADDER,
    GROUP_SIZES,
    HIGH_BITS,
    LADDER,
    LADDERS,
    LOW_BITS,
    PAPER,
    Budget,
    get_ladder,
)
from lsq_core.corpus.registry import corpus_identity
from lsq_core.errors import InputError
from lsq_core.model.source import ModelSource
from lsq_core.planning.methods import PLANNERS, get_planner, ladder_of, mixes_rows
from lsq_core.planning.methods.refined import is_refinable
from lsq_core.planning.request import (
    DEFAULT_START,
    LOSSES,
    RATIO_MODES,
    SENSITIVITIES,
    PlanRequest,
)
from lsq_core.planning.servers import SERVERS
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.store.models import PUBLISHED
from lsq_core.ui.safe import st
from lsq_core.units import write_bytes

#: How a plan can be asked for.
SIZE_MODES = {"base": "base configuration", "budget": "budget", "both": "base, capped by a budget"}
CONFIGURATIONS = [c.stop_name for c in EXTENDED_LADDER]
_PLAN_DEFAULTS = {
    "method": "sensiboost",
    "ask": "budget",
    "base": "3.13",
    "budget": 3.6,
    "budget_bytes": 0,
    "boost_stop": 2,
    "top_m": 0,
    "metric": "sensitivity",
    "seed": 0,
    "exact": False,
    "start": DEFAULT_START,
    "pins": "",
    "ties": "",
    "serve": "",
    "against": "none",
    "widths": "2+3",
    "group_size": 128,
    "loss": "block",
    "ratios": "full",
    "clip": False,
}
#: The least and the greatest number that a control takes; the browser counts to 2⁵³.
_PLAN_RANGES = {
    "boost_stop": (0, len(LADDER) - 1),
    "budget_bytes": (0, 2**53 - 1),
    "top_m": (0, 2**53 - 1),
    "seed": (0, 2**53 - 1),
}
#: Bits of most rows and of the high-impact ones.
BIT_WIDTH_PAIRS = [f"{low}+{high}" for low in LOW_BITS for high in HIGH_BITS if high > low]
_PLAN_OPTIONS: dict[str, Sequence] = {
    "method": list(PLANNERS),
    "ask": list(SIZE_MODES),
    "base": CONFIGURATIONS,
    "serve": ["", *SERVERS],
    "metric": SENSITIVITIES,
    "start": [name for name, planner in PLANNERS.items() if is_refinable(planner)],
    "against": ["none", *PLANNERS],
    "widths": BIT_WIDTH_PAIRS,
    "group_size": list(GROUP_SIZES),
    "loss": list(LOSSES),
    "ratios": list(RATIO_MODES),
}


def init_key(
    key: str,
    default: object,
    options: Sequence | None = None,
    limits: tuple[int, int] | None = None,
) -> None:
    """Give a key its first value of this session: the address's, else the default.

    The address's counts where it is among the options and within the limits.
    """
    if key in st.session_state:
        return
    text, value = st.query_params.get(key), default
    if text is not None:
        try:
            value = text == "True" if isinstance(default, bool) else type(default)(text)
        except ValueError:
            value = default
        if isinstance(value, float) and not math.isfinite(value):
            value = default
    if options is not None and value not in options:
        value = default
    if limits is not None and not limits[0] <= value <= limits[1]:
        value = default
    st.session_state[key] = value


def sync_url(*keys: str) -> None:
    """Write keys into the address, where they aren't already."""
    for key in keys:
        text = str(st.session_state[key])
        if st.query_params.get(key) != text:
            st.query_params[key] = text


def sync_url_unless_default(key: str, default: object) -> None:
    """Write a key into the address where it isn't the default, and out of it where it is."""
    if st.session_state[key] != default:
        sync_url(key)
    elif key in st.query_params:
        del st.query_params[key]


def set_values(values: Mapping[str, object]) -> None:
    """Set keys of this session, for the page that a link leads to."""
    for key, value in values.items():
        st.session_state[key] = value


# --- the model ------------------------------------------------------------------------------


def model_text(source: ModelSource) -> str:
    """How a model is named in the picker and the address: ``org/name@revision``."""
    return f"{source.name}@{source.revision}" if source.revision else source.name


def parse_source(text: str) -> ModelSource:
    """The source that a text names, with what this session allowed it to do."""
    name, _, revision = text.strip().rpartition("@")
    if not name or ModelSource(text.strip()).is_local:
        name, revision = text.strip(), ""
    trust, pickle = st.session_state.get("allowed", {}).get(text.strip(), (False, False))
    return ModelSource(name, revision or None, trust, pickle)


def choose_model(text: str, trust: bool = False, pickle: bool = False) -> None:
    """Make a model the chosen one; what it may do holds for it alone, and for this session."""
    st.session_state["model"] = text.strip()
    st.session_state.setdefault("allowed", {})[text.strip()] = (trust, pickle)


# --- the profile's settings -----------------------------------------------------------------

_SETTINGS = {
    "calibration": "calibration",
    "quantizer": "profile_quantizer",
    "axis": "axis",
    "metadata": "metadata",
    "samples": "samples",
    "block_tokens": "block_tokens",
    "ladder": "ladder",
}


def init_settings(model: str, newest: ProfileSettings | None) -> None:
    """Start from the newest profile that this model has, once for each model of a session.

    ``model`` is its identity (:func:`lsq_core.ui.cached.identity`).
    """
    before = st.session_state.get("settings_of", "")
    fresh = before != model
    if fresh and newest is not None:
        set_settings(newest)
    elif fresh and before and (before.startswith(PUBLISHED) or not _is_calibration_known()):
        # Published texts and grids are no model's here, and a shipped profile's text isn't here.
        set_settings(ProfileSettings())
    if not before and st.query_params.get("ladder") in LADDERS:  # the address of a plan has it
        st.session_state["ladder"] = st.query_params["ladder"]
    st.session_state["settings_of"] = model
    defaults = asdict(ProfileSettings())
    for field, key in _SETTINGS.items():
        st.session_state.setdefault(key, defaults[field])


def _is_calibration_known() -> bool:
    """Whether the calibration corpus of another model's profile can be read here."""
    try:
        corpus_identity(st.session_state.get("calibration", ProfileSettings().calibration))
    except InputError:
        return False
    return True


def set_settings(settings: ProfileSettings) -> None:
    """Make these the chosen settings."""
    for field, key in _SETTINGS.items():
        st.session_state[key] = getattr(settings, field)


def settings() -> ProfileSettings:
    """The chosen profile settings."""
    chosen = {field: st.session_state[key] for field, key in _SETTINGS.items()}
    return ProfileSettings(**chosen)


def plan_settings() -> ProfileSettings:
    """Those of the profile that the chosen method plans from, whose ladder may be the paper's."""
    return replace(settings(), ladder=plan_request().ladder)


# --- the plan -------------------------------------------------------------------------------


def init_plan(has_profile: bool) -> None:
    """Give the plan's controls their first values."""
    for key, default in _PLAN_DEFAULTS.items():
        if key == "method" and not has_profile:
            default = "uniform"
        init_key(key, default, _PLAN_OPTIONS.get(key), _PLAN_RANGES.get(key))


def restrict_methods(methods: Sequence[str]) -> None:
    """Keep the chosen method where it is one of these; else MXQ, or the first of them."""
    if st.session_state["method"] not in methods:
        st.session_state["method"] = "mxq" if "mxq" in methods else methods[0]


def sync_plan_url() -> None:
    """Write what the plan depends on into the address, where it isn't the default."""
    sync_url("method")
    for key, default in _PLAN_DEFAULTS.items():
        if key != "method":
            sync_url_unless_default(key, default)
    sync_url_unless_default("ladder", PAPER)


def set_plan(request: PlanRequest, parameters: int) -> None:
    """Set the plan's controls to a request that was kept, for a model of so many parameters."""
    values = asdict(request) | {"serve": request.serve or ""}
    values |= {name: "\n".join(values[name]) for name in ("pins", "ties")}
    budget = values.pop("budget")
    values["budget_bytes"] = 0
    values["widths"] = f"{values.pop('low_bits')}+{values.pop('high_bits')}"
    size_mode = ("both" if request.base else "budget") if budget else "base"
    if budget:
        parsed = Budget.parse(budget, parameters, get_ladder(request.ladder))
        values["budget_bytes"] = parsed.planned_bytes or 0
        values["budget"] = 8 * (parsed.nominal_bytes or parsed.planned_bytes) / parameters
    for key, value in (values | {"ask": size_mode}).items():
        if value is not None:
            st.session_state[key] = value


def plan_request() -> PlanRequest:
    """The plan asked for; what its method doesn't use keeps the default."""
    return request_for_method(st.session_state["method"])


def request_for_method(method: str) -> PlanRequest:
    """The same by another method."""
    chosen = st.session_state
    planner = get_planner(method)
    size_mode = chosen["ask"] if planner.has_base else "budget"
    low, high = map(int, chosen["widths"].split("+"))
    bits = {"low_bits": low, "high_bits": high}
    used = {name: bits[name] if name in bits else chosen[name] for name in planner.fields}
    return PlanRequest(
        method=planner.name,
        base=chosen["base"] if size_mode != "budget" else None,
        budget=chosen_budget() if size_mode != "base" else None,
        pins=lines("pins"),
        ties=lines("ties"),
        serve=None if planner.reads_rows else chosen["serve"] or None,
        ladder=ladder_of(method, chosen["ladder"]),
        **used,
    )


def chosen_budget() -> str:
    """The budget asked for: the planned bytes where a size was typed, else bits per parameter."""
    size = st.session_state["budget_bytes"]
    return write_bytes(size) if size else budget_text(max(st.session_state["budget"], 0.01))


def set_budget(bits: float, size: int | None = None) -> None:
    """Ask for bits per parameter, or for planned bytes where they are given."""
    st.session_state["budget"] = bits
    st.session_state["budget_bytes"] = size or 0


def budget_text(bits: float) -> str:
    """A budget as it is typed: ``3.25bpp``, with at most four decimals."""
    return f"{round(bits, 4):.4f}".rstrip("0").rstrip(".") + "bpp"


def lines(key: str) -> tuple[str, ...]:
    """The pins or ties that were typed, one a line."""
    return tuple(line.strip() for line in st.session_state[key].splitlines() if line.strip())


def alike(method: str, others: Sequence[str]) -> list[str]:
    """Of other methods those that choose from the same, so that one picture can hold both."""
    if mixes_rows(method):
        return []
    wanted = st.session_state["ladder"]
    own = ladder_of(method, wanted)
    alike = [name for name in others if name != method and not mixes_rows(name)]
    return [name for name in alike if ladder_of(name, wanted) == own]
