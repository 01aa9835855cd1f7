"""How hard each layer is to quantize, and ways to look into why."""

from __future__ import annotations

from lsq_core.ui import (
    explore_detection,
    explore_layers,
    explore_overlay,
    explore_ranks,
    explore_weights,
    known,
    state,
)
from lsq_core.ui.explore_profile import Seen, follow, profile_bar
from lsq_core.ui.page import Here, page
from lsq_core.ui.safe import st

#: The views by their word in the address: a name, what draws it, and whether it needs a profile.
_VIEWS = {
    "layers": ("Layers", explore_layers.show, True),
    "algorithm": ("Algorithm 1", explore_detection.show, True),
    "overlay": ("Overlay", explore_overlay.show, True),
    "ranks": ("Where metrics disagree", explore_ranks.show, True),
    "weights": ("Weights", explore_weights.show, False),
}


def explore(here: Here) -> None:
    """The profile under the chosen settings in the chosen view, or the way to it."""
    info = here.info
    state.begin_settings(known.identity(info), known.newest_settings(here.store, info))
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
    found = known.profile(here.store, info, settings, here.device)
    seen = Seen(here, info, settings, found, first, row)
    _, show, needs_profile = _VIEWS[see]
    if seen.lacking and (needs_profile or seen.found is not None):
        follow(seen)
    if seen.found is not None or not needs_profile:
        show(seen)


page("Explore", explore)
