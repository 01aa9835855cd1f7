"""The frame of every page: its setup, the sidebar, and error messages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from lsq_core.bits import LADDER
from lsq_core.charts.style import BIT_COLORS
from lsq_core.errors import LsqError
from lsq_core.files import translate_disk_error
from lsq_core.model.info import ModelInfo
from lsq_core.model.source import ModelSource
from lsq_core.store.connection import database_path
from lsq_core.store.store import Store
from lsq_core.ui import cached, hub_lookup, sidebar, state, words
from lsq_core.ui.safe import st

#: Streamlit's padding of five rems on either side wastes space on small screens, and its grey for
#: captions and chart text is too pale to read (WCAG AA requires a contrast of 4.5).
_STYLE = """<style>
.stMainBlockContainer { padding-left: 2.5rem; padding-right: 2.5rem; }
[data-testid="stCaptionContainer"] { color: inherit; opacity: .8; }
.js-plotly-plot :is([class$="tick"], [class$="title"], [class^="legend"], .annotation) text,
.js-plotly-plot :is(.bartext-outside, .slicetext) {
  fill: currentColor !important; fill-opacity: .85; }
</style>"""


@dataclass(frozen=True)
class PageContext:
    """The context of every page: the database, the chosen model and the chosen device."""

    store: Store
    source: ModelSource
    device: str

    @property
    def info(self) -> ModelInfo:
        """The description of the chosen model.

        Raises
        ------
        NoModel
            If it cannot be opened, or is still being looked up.
        """
        try:
            return cached.model_info(self.store, self.source)
        except LsqError as error:
            raise NoModel(str(error), self.source) from error


class NoModel(LsqError):
    """The chosen model can't be shown, or is still being looked up."""

    def __init__(self, reason: str, source: ModelSource) -> None:
        super().__init__(reason)
        self.source = source


def page(title: str, body: Callable[[PageContext], None]) -> None:
    """Set up the page, then draw the sidebar and the body; expected errors are shown as text."""
    st.set_page_config(
        page_title=f"{title} · LSQ Explorer",
        page_icon=_icon(),
        layout="wide",
        initial_sidebar_state=230,
        menu_items={"about": "LSQ Explorer: layer-sensitive mixed-precision quantization of LLMs."},
    )
    st.html(_STYLE)
    try:
        with st.spinner("Opening the database…"):
            store = _open_database()
        text, device = sidebar.show(store)
        body(PageContext(store, state.parse_source(text), device))
    except NoModel as error:
        render_no_model(error)
        next_step("app.py", "Choose another model")
    except LsqError as error:
        st.error(words.escape(str(error)))
    except OSError as error:
        known_error = translate_disk_error(error)
        if known_error is None:
            raise
        st.error(words.escape(str(known_error)))


def render_no_model(error: NoModel) -> None:
    """Show why the model can't be shown, or that it is being looked up, with ways to continue."""
    source, pending = error.source, isinstance(error.__cause__, hub_lookup.LookupPending)
    if pending:
        headline(
            f"{words.escape(source.name)} is being looked up on the Hugging Face Hub.",
            "Only its config is fetched. This page updates automatically; you can leave it in the "
            "meantime.",
        )
        st.fragment(_rerun_when_ready, run_every=sidebar.POLL_SECONDS)(source)
    else:
        headline(f"{words.escape(source.name)} cannot be opened.")
        st.error(words.escape(str(error)))
    with st.container(horizontal=True):
        if not source.is_local and not pending:
            st.button("Try again", key="look-again", on_click=hub_lookup.invalidate, args=(source,))
        st.button("Use the demo model", key="use-demo", on_click=state.choose_model, args=("demo",))


def _rerun_when_ready(source: ModelSource) -> None:
    """Redraw the page once a lookup has ended."""
    if not hub_lookup.is_pending(source):
        st.rerun(scope="app")


@cache
def _icon() -> Image.Image:
    """Draw a bar for each bit width of the ladder; Streamlit would fetch a named icon."""
    icon = np.zeros((32, 32, 4), dtype=np.uint8)
    for index, bits in enumerate(sorted({config.bits for config in LADDER})):
        bar = icon[32 - 4 * bits :, 8 * index + 1 : 8 * index + 7]
        bar[...] = [*bytes.fromhex(BIT_COLORS[bits][1:]), 255]
    return Image.fromarray(icon)


def _open_database() -> Store:
    """Open the database, migrating its schema once per state of its file."""
    path = database_path()
    if not path.exists():
        return Store(path)
    state = path.stat()
    return _open_file(path, state.st_ino, state.st_mtime_ns)


@st.cache_resource(max_entries=4, show_spinner=False)
def _open_file(path: Path, inode: int, mtime_ns: int) -> Store:
    return Store(path)


def headline(text: str, caption: str = "") -> None:
    """Render a page's main statement, and the reason as a caption."""
    st.title(text, anchor=False)
    if caption:
        st.caption(caption)


def next_step(page: str, label: str) -> None:
    """Render a link to the next page; choices carry over in the session state."""
    st.page_link(page, label=label, icon=":material/arrow_forward:")
