"""How hard each layer is to quantize, and ways to look into why."""

from __future__ import annotations

from lsq_core.ui import cached, state
from lsq_core.ui.explore import detection, layers, overlay, ranks, weights
from lsq_core.ui.explore.profile import Seen, follow, profile_bar
from lsq_core.ui.page import Here, page
from lsq_core.ui.safe import st

#: The views by their word in the address: a name, what draws it, and whether it needs a profile.
_VIEWS = {
    "layers": ("Layers", layers.show, True),
    "algorithm": ("Algorithm 1", detection.show, True),
    "overlay": ("Overlay", overlay.show, True),
    "ranks": ("Where metrics disagree", ranks.show, True),
    "weights": ("Weights", weights.show, False),
}


def explore(here: Here) -> None:
    """The profile under the chosen settings in the chosen view, or the way to it."""
    info = here.info
    state.begin_settings(cached.identity(info), cached.newest_settings(here.store, info))
    state.begin("see", "layers", list(_VIEWS))
    first = st.container()
    settings = profile_bar(here.store, info)
    row = st.container(horizontal=True)
    with row:
        see = st.segmented_control(
            "View",
            list(_VIEWS),
            format_func=lambda view: _VIEWS[view][0],
            required=True,
            key="see",
            label_visibility="collapsed",
            persist_state="session",
        )
    state.share_unless_default("see", "layers")
    found = cached.profile(here.store, info, settings, here.device)
    seen = Seen(here, info, settings, found, first, row)
    _, show, needs_profile = _VIEWS[see]
    if seen.lacking and (needs_profile or seen.found is not None):
        follow(seen)
    if seen.found is not None or not needs_profile:
        show(seen)


page("Explore", explore)
