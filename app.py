"""The first page: what this is for, the chosen model, and ways to another."""

from __future__ import annotations

from lsq_core.ui import cached
from lsq_core.ui.model import choose, facts
from lsq_core.ui.model.welcome import render_ways, render_welcome
from lsq_core.ui.page import NoModel, PageContext, next_step, page, render_no_model
from lsq_core.ui.safe import st


def model_page(ctx: PageContext) -> None:
    """The question and the model's story, what the model is, and published measurements."""
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
