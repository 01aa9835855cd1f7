"""Cards of the planning methods: what each does, needs and is best for, and its limits."""

from __future__ import annotations

from collections.abc import Sequence

from lsq_core.planning.methods import get_planner
from lsq_core.profiling.metrics import METRICS
from lsq_core.profiling.profile import Profile
from lsq_core.ui import words
from lsq_core.ui.safe import st

_COLUMNS = 2


def render_button(available_methods: Sequence[str], profile: Profile | None) -> None:
    """Show a button that opens the cards of the available methods."""
    if st.button("", icon=":material/info:", key="method-cards", help="About the methods"):
        _show_cards(available_methods, profile)


@st.dialog("Methods", width="large")
def _show_cards(available_methods: Sequence[str], profile: Profile | None) -> None:
    """Show all cards, the chosen method's first."""
    chosen = st.session_state["method"]
    names = sorted(available_methods, key=lambda name: name != chosen)
    for start in range(0, len(names), _COLUMNS):
        for column, name in zip(st.columns(_COLUMNS), names[start:], strict=False):
            with column, st.container(border=True, height="stretch"):
                _show_card(name, profile, chosen=name == chosen)


def _show_card(name: str, profile: Profile | None, chosen: bool) -> None:
    planner = get_planner(name)
    st.markdown(f"**{words.escape(planner.title)}**")
    st.markdown(words.escape(planner.summary or planner.meaning))
    facts = {
        "Best for": planner.use,
        "Limits": planner.limits,
        "Needs": describe_needs(name, profile),
        "From": planner.source,
    }
    st.caption(
        "  \n".join(f"**{label}:** {words.escape(text)}" for label, text in facts.items() if text)
    )
    if chosen:
        st.caption("Chosen")
    elif st.button("Choose", key=f"choose-{name}", on_click=_choose, args=(name,)):
        st.rerun()  # closes the dialog


def _choose(name: str) -> None:
    st.session_state["method"] = name


def describe_needs(name: str, profile: Profile | None) -> str:
    """Describe the measurements a method needs, and whether the chosen profile has them."""
    planner = get_planner(name)
    if planner.reads_rows:
        return "row scores and interactions, measured on demand."
    if not planner.metrics:
        return "nothing measured."
    held = set(profile.metrics) if profile else set()
    missing = [METRICS[metric].label for metric in planner.metrics if metric not in held]
    text = words.listed([METRICS[metric].label for metric in planner.metrics])
    if not missing:
        return f"{text}: measured."
    return f"{text}; {words.listed(missing)} not measured yet."
