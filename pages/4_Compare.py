"""The Compare page: runs by size and perplexity, their gain over uniform, and pairs in detail."""

from __future__ import annotations

from lsq_core.ui import state, words
from lsq_core.ui.compare import runs, selection, table, views
from lsq_core.ui.page import PageContext, headline, next_step, page
from lsq_core.ui.safe import st

#: Views by their name in the URL: label and function that draws it.
VIEWS = {
    "size": ("Perplexity by size", runs.show),
    "bits": ("Gain over uniform", views.show_gain),
    "wins": ("Win / tie / loss", views.show_win_tie_loss),
    "two": ("Two runs", views.show_two),
    "predicted": ("Predicted", views.show_predicted),
}


def compare(ctx: PageContext) -> None:
    """Show the gain over a uniform run of equal size, the chosen view, and the table of runs."""
    model_names = selection.models_with_runs(ctx)
    if model_names.empty:
        headline("No runs to compare yet.", "Every run appears here with its size.")
        next_step("pages/2_Plan.py", "Make a plan and run it")
        table.render_undo(ctx)
        return
    header = st.container()
    fingerprint = selection.find_model(ctx, model_names)
    if fingerprint is None:
        with header:
            headline(
                f"No runs of {words.escape(ctx.source.name)} to compare.",
                "Run a plan of it, or choose a model with runs.",
            )
        selection.offer_models(model_names)
        next_step("pages/2_Plan.py", "Make a plan and run it")
        table.render_undo(ctx)
        return
    middle, right = st.columns([2.4, 1.4])
    state.init_key("view", "size", list(VIEWS))
    view = st.segmented_control(
        "View",
        list(VIEWS),
        format_func=lambda name: VIEWS[name][0],
        key="view",
        required=True,
        label_visibility="collapsed",
        persist_state="session",
    )
    state.sync_url("view")
    choice = selection.choose(ctx, fingerprint, middle, right, filters=view != "wins")
    with header:
        selection.render_headline(ctx, choice)
    selection.init_pair(choice)
    VIEWS[view][1](ctx, choice)
    table.show(ctx, choice)


page("Compare", compare)
