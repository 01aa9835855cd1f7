"""The Explore page: how hard each layer is to quantize, and why."""

from __future__ import annotations

from lsq_core.ui import cached, state
from lsq_core.ui.explore import detection, layers, overlay, ranks, weights
from lsq_core.ui.explore.profile import ExploreView, follow, profile_bar
from lsq_core.ui.page import PageContext, page
from lsq_core.ui.safe import st

#: Views by their name in the URL: label, function that draws it, whether it needs a profile.
_VIEWS = {
    "layers": ("Layers", layers.show, True),
    "algorithm": ("Algorithm 1", detection.show, True),
    "overlay": ("Overlay", overlay.show, True),
    "ranks": ("Metric agreement", ranks.show, True),
    "weights": ("Weights", weights.show, False),
}


def explore(ctx: PageContext) -> None:
    """Show the profile with the chosen settings in the chosen view, or how to measure it."""
    info = ctx.info
    state.init_settings(cached.model_key(info), cached.newest_settings(ctx.store, info))
    state.init_key("see", "layers", list(_VIEWS))
    header = st.container()
    settings = profile_bar(ctx.store, info)
    row = st.container(horizontal=True)
    with row:
        view_name = st.segmented_control(
            "View",
            list(_VIEWS),
            format_func=lambda name: _VIEWS[name][0],
            required=True,
            key="see",
            label_visibility="collapsed",
            persist_state="session",
        )
    state.sync_url_unless_default("see", "layers")
    profile = cached.profile(ctx.store, info, settings, ctx.device)
    view = ExploreView(ctx, info, settings, profile, header, row)
    _, show, needs_profile = _VIEWS[view_name]
    if view.lacking and (needs_profile or view.profile is not None):
        follow(view)
    if view.profile is not None or not needs_profile:
        show(view)


page("Explore", explore)
