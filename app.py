"""The first page: the purpose of the app, the chosen model, and ways to choose another."""

from __future__ import annotations

from lsq_core.ui import cached
from lsq_core.ui.model import choose, facts
from lsq_core.ui.model.welcome import render_ways, render_welcome
from lsq_core.ui.page import NoModel, PageContext, next_step, page, render_no_model
from lsq_core.ui.safe import st


def model_page(ctx: PageContext) -> None:
    """Show the welcome, the model's facts, and the import of published measurements."""
    try:
        info = ctx.info
        with_sizes = not render_welcome(ctx, info)
        st.divider()
        if cached.is_published(info):
            facts.show_published(ctx.store, info, with_sizes)
        else:
            facts.show_model(info, with_sizes)
        next_step("pages/1_Explore.py", "See which layers are sensitive")
    except NoModel as error:
        render_no_model(error)
        render_ways(ctx, None)
    choose.show_import(ctx.store)


page("Model", model_page)
