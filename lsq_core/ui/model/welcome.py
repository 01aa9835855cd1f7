"""The welcome page: the project's purpose, results for the chosen model, and where to go next."""

from __future__ import annotations

from lsq_core import charts
from lsq_core.model.gguf import SMOLLM2
from lsq_core.model.info import ModelInfo
from lsq_core.planning.frame import plan_to_frame
from lsq_core.results.story import Saving, largest_saving
from lsq_core.store.models import PUBLISHED
from lsq_core.ui import cached, cached_results, sidebar, state, words
from lsq_core.ui.model import choose, facts, tour
from lsq_core.ui.page import PageContext, headline
from lsq_core.ui.safe import st

QUESTION = "Where should the bits go?"
PURPOSE = (
    "LSQ Explorer measures how sensitive each layer of a language model is to quantization, plans "
    "the bits of every weight matrix under a memory budget, quantizes, and measures what is lost."
)


def render_welcome(ctx: PageContext, info: ModelInfo) -> bool:
    """Render the question, three ways to continue and, for a measured model, its results.

    Returns whether the model's sizes are shown, which they are next to a tour without a plan.
    """
    headline(QUESTION, PURPOSE)
    render_ways(ctx, info)
    steps = tour.make_tour(ctx, info)
    if not steps:
        return False
    saving = _find_saving(ctx, info)
    left, right = st.columns([1.25, 1], gap="large")
    with left:
        if saving is not None:
            render_picture(ctx, info, saving)
        else:
            facts.show_sizes(facts.size_frame(info))
    with right:
        tour.render_tour(steps)
    return saving is None


def _find_saving(ctx: PageContext, info: ModelInfo) -> Saving | None:
    """Return the largest measured saving, preferring plans made from the profile shown."""
    runs = tour.main_measurement(ctx, info)
    if runs is None:
        return None
    profile = tour.shown_profile(ctx, info)
    own = runs["profile"] == profile.id if profile is not None else runs["profile"].isna()
    return largest_saving(runs[own | (runs["method"] == "uniform")]) or largest_saving(runs)


def render_ways(ctx: PageContext, info: ModelInfo | None) -> None:
    """Render buttons to explore the model, see the papers' results, or open another model."""
    with st.container(horizontal=True):
        if info is not None and st.button(
            f"Explore {display_name(info)}",
            type="primary",
            icon=":material/query_stats:",
            key="explore",
        ):
            st.switch_page("pages/1_Explore.py")
        render_published_way(ctx)
        with st.popover("Open my model", icon=":material/folder_open:"):
            choose.show_model_picker(ctx.store)


def render_published_way(ctx: PageContext) -> None:
    """Render a button that opens a published Llama model, or imports them if there are none."""
    published = sidebar.published_model_names(ctx.store)
    label, icon = "See the papers' Llama results", ":material/article:"
    if published:
        name = next((name for name in published if "Llama-2-7b" in name), published[0])
        st.button(label, icon=icon, key="llama", on_click=state.choose_model, args=(name,))
    elif st.button(label, icon=icon, key="llama", help=choose.DOWNLOAD_HELP):
        choose.run_import(ctx.store, None)


def display_name(info: ModelInfo) -> str:
    """Return the model's name for use in a sentence."""
    name = info.source.removeprefix(PUBLISHED)
    if name == SMOLLM2:
        return "SmolLM2"
    return "the demo model" if name == "demo" else words.escape(name.rstrip("/").rpartition("/")[2])


def render_picture(ctx: PageContext, info: ModelInfo, saving: Saving) -> None:
    """Show a measured plan layer by layer, and what it saves."""
    planned, uniform = saving.planned, saving.uniform
    style = charts.method_style(planned["method"])
    st.markdown(
        f"**{style.title} at {planned['bits_per_param']:.2f} bits: perplexity "
        f"{planned['perplexity']:.2f}.** Better than uniform {uniform['base']} "
        f"({uniform['perplexity']:.2f}) with {100 * saving.bytes:.0f} % fewer bits; full "
        f"precision: {planned['perplexity_full']:.2f}."
    )
    record = cached_results.record(ctx.store, planned["evaluation"])
    frame = plan_to_frame(record["plan"].get("content") or {})
    if frame.empty:
        return
    st.plotly_chart(
        charts.plan_heatmap(frame, narrow=True),
        config=charts.CONFIG,
        key="welcome-plan",
        alt=f"Bits of each matrix by layer in {style.title}'s plan of "
        f"{planned['bits_per_param']:.2f} bits.",
    )
    if cached.is_published(info):
        st.caption(f"Published by the methods' authors, on {words.escape(planned['corpus'])}.")
    else:
        shipped = " Shipped with LSQ Explorer." if planned["origin"] == "shipped" else ""
        st.caption(
            f"Measured on {words.escape(planned['corpus'])}, {planned['tokens']:,} tokens, HQQ, "
            f"{planned['machine']}.{shipped}"
        )
