"""Every run beside the others: which one to take, what more bits buy, and any two in detail."""

from __future__ import annotations

from lsq_core.ui import state, words
from lsq_core.ui.compare import runs, selection, table, views
from lsq_core.ui.page import Here, headline, next_step, page
from lsq_core.ui.safe import st

#: What can be looked at, by the name in the address.
VIEWS = {
    "size": ("By size", runs.show),
    "bits": ("Gain for bits", views.show_gain),
    "wins": ("Win, tie, loss", views.show_win_tie_loss),
    "two": ("Two runs", views.show_two),
    "predicted": ("Predicted", views.show_predicted),
}


def compare(here: Here) -> None:
    """The best run under a size, a view of all runs of one measurement, and their table."""
    marks = selection.models_with_runs(here)
    if marks.empty:
        headline("There is nothing to compare yet.", "Each run appears here with its size.")
        next_step("pages/2_Plan.py", "Make a plan and run it")
        table.offer_undo(here)
        return
    first = st.container()
    left, middle, right = st.columns([1.2, 2, 1.4])
    with left:
        mark = selection.choose_model(here, marks)
    if mark is None:
        with first:
            headline(
                f"There are no runs of {words.literal(here.source.name)} to compare.",
                "Models that have some can be chosen below.",
            )
        table.offer_undo(here)
        return
    state.begin("view", "size", list(VIEWS))
    view = st.segmented_control(
        "View",
        list(VIEWS),
        format_func=lambda name: VIEWS[name][0],
        key="view",
        required=True,
        label_visibility="collapsed",
        persist_state="session",
    )
    state.share("view")
    choice = selection.choose(here, mark, middle, right, filters=view != "wins")
    with first:
        selection.say_what_is_best(choice)
    selection.begin_pair(choice)
    VIEWS[view][1](here, choice)
    table.show(here, choice)


page("Compare", compare)
