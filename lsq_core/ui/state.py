"""The user's choices, persisted across pages and, where worth sharing, in the URL.

Widgets write to the keys used here, with ``persist_state="session"``; the URL is written from the
session, and a key is read from it only while the session has no value, so that a link or a reload
restores the choices. Trust is never read from the URL.
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
from lsq_core.units import format_bytes_exactly

#: Ways to specify the size of a plan.
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
#: Smallest and largest number that a control accepts; JavaScript integers are exact below 2⁵³.
_PLAN_RANGES = {
    "boost_stop": (0, len(LADDER) - 1),
    "budget_bytes": (0, 2**53 - 1),
    "top_m": (0, 2**53 - 1),
    "seed": (0, 2**53 - 1),
}
#: Bit widths of most rows and of the high-impact rows.
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
    """Initialise a key of this session from the URL, else with the default.

    The URL's value is used only if it is among the options and within the limits.
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
    """Write keys to the URL."""
    for key in keys:
        text = str(st.session_state[key])
        if st.query_params.get(key) != text:
            st.query_params[key] = text


def sync_url_unless_default(key: str, default: object) -> None:
    """Write a key to the URL, or remove it from there if it has its default value."""
    if st.session_state[key] != default:
        sync_url(key)
    elif key in st.query_params:
        del st.query_params[key]


def set_values(values: Mapping[str, object]) -> None:
    """Set keys of this session, for the page that a link opens."""
    for key, value in values.items():
        st.session_state[key] = value


# --- the model ------------------------------------------------------------------------------


def model_text(source: ModelSource) -> str:
    """Return a model's name in the picker and the URL: ``org/name@revision``."""
    return f"{source.name}@{source.revision}" if source.revision else source.name


def parse_source(text: str) -> ModelSource:
    """Return the source that a text names, with the permissions given to it in this session."""
    name, _, revision = text.strip().rpartition("@")
    if not name or ModelSource(text.strip()).is_local:
        name, revision = text.strip(), ""
    trust, pickle = st.session_state.get("allowed", {}).get(text.strip(), (False, False))
    return ModelSource(name, revision or None, trust, pickle)


def choose_model(text: str, trust: bool = False, pickle: bool = False) -> None:
    """Choose a model; its permissions apply to it alone and last for this session."""
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
    """Whenever the model changes, start from the settings of its newest profile.

    ``model`` is its identity (:func:`lsq_core.ui.cached.identity`). Without a profile the settings
    are left as they are, or reset if they can't be used for another model.
    """
    before = st.session_state.get("settings_of", "")
    fresh = before != model
    if fresh and newest is not None:
        set_settings(newest)
    elif fresh and before and (before.startswith(PUBLISHED) or not _is_calibration_known()):
        # Published corpora and grids, and shipped profiles' corpora, may not be available here.
        set_settings(ProfileSettings())
    if not before and st.query_params.get("ladder") in LADDERS:  # set in a plan's URL
        st.session_state["ladder"] = st.query_params["ladder"]
    st.session_state["settings_of"] = model
    defaults = asdict(ProfileSettings())
    for field, key in _SETTINGS.items():
        st.session_state.setdefault(key, defaults[field])


def _is_calibration_known() -> bool:
    """Return whether the chosen calibration corpus can be read here."""
    try:
        corpus_identity(st.session_state.get("calibration", ProfileSettings().calibration))
    except InputError:
        return False
    return True


def set_settings(settings: ProfileSettings) -> None:
    """Set the chosen profile settings."""
    for field, key in _SETTINGS.items():
        st.session_state[key] = getattr(settings, field)


def settings() -> ProfileSettings:
    """Return the chosen profile settings."""
    chosen = {field: st.session_state[key] for field, key in _SETTINGS.items()}
    return ProfileSettings(**chosen)


def plan_settings() -> ProfileSettings:
    """Return the chosen settings with the ladder that the chosen method plans on."""
    return replace(settings(), ladder=plan_request().ladder)


# --- the plan -------------------------------------------------------------------------------


def init_plan(has_profile: bool) -> None:
    """Initialise the plan's controls; without a profile the default method is uniform."""
    for key, default in _PLAN_DEFAULTS.items():
        if key == "method" and not has_profile:
            default = "uniform"
        init_key(key, default, _PLAN_OPTIONS.get(key), _PLAN_RANGES.get(key))


def restrict_methods(methods: Sequence[str]) -> None:
    """Keep the chosen method if it is in ``methods``; else choose MXQ or the first of them."""
    if st.session_state["method"] not in methods:
        st.session_state["method"] = "mxq" if "mxq" in methods else methods[0]


def sync_plan_url() -> None:
    """Write the method, and other plan choices that are not the default, to the URL."""
    sync_url("method")
    for key, default in _PLAN_DEFAULTS.items():
        if key != "method":
            sync_url_unless_default(key, default)
    sync_url_unless_default("ladder", PAPER)


def set_plan(request: PlanRequest, parameters: int) -> None:
    """Set the plan's controls to a request for a model with this number of parameters."""
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
    """Return the chosen plan request; fields that its method doesn't use keep their defaults."""
    return request_for_method(st.session_state["method"])


def request_for_method(method: str) -> PlanRequest:
    """Return the chosen plan request with another method."""
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
    """Return the chosen budget: planned bytes if a size was typed, else bits per parameter."""
    size = st.session_state["budget_bytes"]
    return (
        format_bytes_exactly(size) if size else budget_text(max(st.session_state["budget"], 0.01))
    )


def set_budget(bits: float, size: int | None = None) -> None:
    """Set the budget in bits per parameter, or in planned bytes if ``size`` is given."""
    st.session_state["budget"] = bits
    st.session_state["budget_bytes"] = size or 0


def budget_text(bits: float) -> str:
    """Format a budget as it is typed: ``3.25bpp``, with at most four decimals."""
    return f"{round(bits, 4):.4f}".rstrip("0").rstrip(".") + "bpp"


def lines(key: str) -> tuple[str, ...]:
    """Return the pins or ties that were typed, one per line."""
    return tuple(line.strip() for line in st.session_state[key].splitlines() if line.strip())


def alike(method: str, others: Sequence[str]) -> list[str]:
    """Return the other methods with the same configurations, which fit into one chart."""
    if mixes_rows(method):
        return []
    wanted = st.session_state["ladder"]
    own = ladder_of(method, wanted)
    alike = [name for name in others if name != method and not mixes_rows(name)]
    return [name for name in alike if ladder_of(name, wanted) == own]


def ensure_valid_choice(key: str, options: list[str], default: str = "") -> None:
    """Replace a choice that is not among the options by the default, else the first option."""
    if st.session_state.get(key) not in options:
        st.session_state[key] = default if default in options else options[0]
