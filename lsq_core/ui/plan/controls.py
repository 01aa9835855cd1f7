"""The Plan page's controls: the method, its size, a method to compare with, and options."""

from __future__ import annotations

from collections.abc import Sequence

from lsq_core.bits import EXTENDED, GROUP_SIZES, LADDERS, PAPER
from lsq_core.errors import InputError
from lsq_core.planning.constraints import restrict
from lsq_core.planning.methods import PLANNERS, get_planner, mixes_rows, reads_field
from lsq_core.planning.methods.uniform import usable_bases
from lsq_core.planning.problem import Problem
from lsq_core.planning.request import SENSITIVITIES
from lsq_core.planning.servers import SERVERS
from lsq_core.profiling.metrics import METRICS
from lsq_core.profiling.profile import Profile
from lsq_core.ui import state
from lsq_core.ui.plan import method_cards
from lsq_core.ui.safe import st

_RATIOS = {
    "full": "jointly per block",
    "diagonal": "independently per matrix",
    "uniform": "same for all",
}
_LADDER_BITS = {PAPER: "2, 3, 4, 8 bits", EXTENDED: "1 to 6 and 8 bits"}
_LOSSES = {"block": "block output", "model": "model output"}


def render_controls(
    problem: Problem,
    available_methods: Sequence[str],
    profile: Profile | None,
    published: bool = False,
) -> None:
    """Show the controls; the budget itself is set on the live planner's slider."""
    widths = [1.6, 0.4, 1.5, 1.1, 1, 1.6, 0.85]
    first, about, *others = st.columns(widths, vertical_alignment="bottom")
    columns = [first, *others]
    with about:
        method_cards.render_button(available_methods, profile)
    with columns[0]:
        st.selectbox(
            "Method",
            list(available_methods),
            format_func=lambda name: PLANNERS[name].title,
            key="method",
            persist_state="session",
            help="\n".join(
                f"- **{PLANNERS[name].title}**: {PLANNERS[name].meaning}"
                for name in available_methods
            ),
        )
    method = st.session_state["method"]
    with columns[1]:
        size_mode = select_size_mode(method)
    with columns[2]:
        if size_mode != "budget":
            select_base(restrict_or_free(problem))
        elif reads_field(method, "boost_stop"):
            input_boost()
        elif mixes_rows(method):
            select_bit_widths()
    with columns[3]:
        if reads_field(method, "boost_stop"):
            input_top_m()
        elif mixes_rows(method):
            select_group_size()
    with columns[4]:
        select_comparison(state.alike(method, available_methods), size_mode)
    with columns[5]:
        render_more_options(method, size_mode)
    with st.container(horizontal=True, vertical_alignment="center", gap="medium"):
        render_restrictions(method, published)


def render_restrictions(method: str, published: bool) -> None:
    """Show the choices that restrict a plan's configurations: bit widths and server."""
    only_paper = published or EXTENDED not in get_planner(method).ladders
    st.segmented_control(
        "Bit widths",
        list(LADDERS),
        format_func=_LADDER_BITS.get,
        key="ladder",
        persist_state="session",
        required=True,
        label_visibility="collapsed",
        disabled=only_paper,
        help="The papers plan with 2, 3, 4 and 8 bits. 5 and 6 bits fill the gap between 4.51 and "
        "8.13 bits per parameter; they need a separate profile. Boosts and mixed rows use only "
        "the papers' widths.",
    )
    st.segmented_control(
        "Made for",
        ["", *SERVERS],
        format_func=lambda name: f"for {SERVERS[name].title}" if name else "for any tool",
        key="serve",
        persist_state="session",
        required=True,
        label_visibility="collapsed",
        disabled=mixes_rows(method),
        help=" ".join(server.demand for server in SERVERS.values()),
    )


def select_size_mode(method: str) -> str:
    """Return how the size is set: base, budget, or both; some methods only take a budget."""
    if mixes_rows(method):
        st.selectbox(
            "Ratios",
            list(_RATIOS),
            format_func=_RATIOS.get,
            key="ratios",
            persist_state="session",
            help="How the share of high-impact rows is chosen: the same for all matrices, for each "
            "matrix independently, or jointly for the matrices of a block.",
        )
        return "budget"
    if not get_planner(method).has_base:
        st.selectbox("Size by", ["budget"], format_func=state.SIZE_MODES.get, disabled=True)
        return "budget"
    return st.selectbox(
        "Size by",
        list(state.SIZE_MODES),
        format_func=state.SIZE_MODES.get,
        key="ask",
        persist_state="session",
    )


def select_base(problem: Problem) -> None:
    """Show the choice of the base, the minimum configuration of every matrix."""
    configurations = [problem.options[i].stop_name for i in usable_bases(problem)]
    if not configurations:
        st.info("No single group size divides every matrix; choose MXQ and a budget.")
        return
    if st.session_state["base"] not in configurations:
        st.session_state["base"] = configurations[0]
    st.selectbox("Base (bits)", configurations, key="base", persist_state="session")


def input_boost() -> None:
    """Show how many configurations a flagged layer is promoted by."""
    st.number_input(
        "Boost by",
        0,
        11,
        key="boost_stop",
        persist_state="session",
        help="How many configurations above the base an outlier layer is promoted.",
    )


def input_top_m() -> None:
    """Show how many flagged layers are promoted per module type."""
    st.number_input(
        "Top m",
        0,
        key="top_m",
        persist_state="session",
        help="Outlier layers promoted per module type; 0 promotes all.",
    )


def select_bit_widths() -> None:
    """Show the bits of most rows and of high-impact rows."""
    st.selectbox(
        "Bits",
        state.BIT_WIDTH_PAIRS,
        format_func=lambda text: "{} and {}".format(*text.split("+")),
        key="widths",
        persist_state="session",
        help="Bits of most rows and of high-impact rows; 16 keeps the latter in fp16.",
    )


def select_group_size() -> None:
    """Show the number of weights that share a scale and zero point."""
    st.selectbox("Group size", GROUP_SIZES, key="group_size", persist_state="session")


def select_comparison(methods: Sequence[str], size_mode: str) -> None:
    """Show the choice of a method to compare at the same budget; disabled for a base alone."""
    others = ["none", *methods]
    if st.session_state["against"] not in others:
        st.session_state["against"] = "none"
    st.selectbox(
        "Compare with",
        others,
        format_func=lambda name: PLANNERS[name].title if name in PLANNERS else "nothing",
        key="against",
        persist_state="session",
        disabled=size_mode == "base" or not methods,
        help="Compare with another method's plan at the same budget; not available for a base "
        "alone. Mixed-row plans cannot be drawn next to per-matrix plans; Compare shows their runs "
        "together.",
    )


def render_more_options(method: str, size_mode: str) -> None:
    """Show the rarely changed options in a popover."""
    with st.popover("More", width="stretch"):
        if size_mode != "budget" and reads_field(method, "boost_stop"):
            input_boost()
        if reads_field(method, "metric"):
            st.selectbox(
                "Sensitivity",
                SENSITIVITIES,
                format_func=lambda name: METRICS[name].short,
                key="metric",
                persist_state="session",
            )
        if reads_field(method, "seed"):
            st.number_input("Random seed", 0, key="seed", persist_state="session")
        if mixes_rows(method):
            select_loss()
        elif reads_field(method, "exact"):
            st.checkbox(
                "Solve exactly",
                key="exact",
                persist_state="session",
                help="Solve to proven optimality instead of using the frontier; on a large model "
                "this may take seconds.",
            )
        st.text_area(
            "Pins",
            key="pins",
            placeholder="*.layers.0.*=" + ("b2h3r20g128" if mixes_rows(method) else "b8g64"),
            persist_state="session",
            help="One per line: a module name pattern and its configuration or range, such "
            "as *.down_proj=b3g128..b4g64.",
        )
        st.text_area(
            "Ties",
            key="ties",
            placeholder="q_proj,k_proj,v_proj",
            persist_state="session",
            help="One per line: modules of a layer that get the same configuration.",
        )
        settings = state.settings()
        st.caption(
            f"Profile: {settings.calibration}, {settings.quantizer}, axis {settings.axis}, "
            f"{settings.metadata} metadata."
        )
        st.page_link("pages/1_Explore.py", label="Choose another profile")


def select_loss() -> None:
    """Show the loss that measures interactions, and whether negative curvature is removed."""
    st.selectbox(
        "Loss",
        list(_LOSSES),
        format_func=_LOSSES.get,
        key="loss",
        persist_state="session",
        help="The loss that measures interactions. The model output needs every block from the "
        "changed one on, and the LM head: many times as expensive.",
    )
    st.checkbox(
        "Remove negative curvature",
        key="clip",
        persist_state="session",
        help="Clip the negative eigenvalues of each block's interaction matrix to zero.",
    )


def restrict_or_free(problem: Problem) -> Problem:
    """Restrict the problem by the request, unless it is invalid, which the plan itself reports."""
    try:
        return restrict(problem, state.plan_request())
    except InputError:
        return problem
