"""The frame of every page: its set-up, the sidebar, and error messages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from lsq_core.charts.style import BIT_COLORS
from lsq_core.errors import LsqError
from lsq_core.files import translate_disk_error
from lsq_core.model.info import ModelInfo
from lsq_core.model.source import ModelSource
from lsq_core.store.connection import database_path
from lsq_core.store.store import Store
from lsq_core.ui import cached, hub_lookup, sidebar, state, words
from lsq_core.ui.safe import st

#: Streamlit leaves five rems free on either side, which a small screen needs; and it writes
#: captions and what charts say in a grey too pale to read (WCAG AA asks for a contrast of 4.5).
_STYLE = """<style>
.stMainBlockContainer { padding-left: 2.5rem; padding-right: 2.5rem; }
[data-testid="stCaptionContainer"] { color: inherit; opacity: .8; }
.js-plotly-plot :is([class$="tick"], [class$="title"], [class^="legend"], .annotation) text,
.js-plotly-plot :is(.bartext-outside, .slicetext) {
  fill: currentColor !important; fill-opacity: .85; }
</style>"""


@dataclass(frozen=True)
class PageContext:
    """What every page is about: the database, the chosen model, the chosen device."""

    store: Store
    source: ModelSource
    device: str

    @property
    def info(self) -> ModelInfo:
        """What is known of the chosen model.

        Raises
        ------
        NoModel
            When there is none, or it is still being looked up.
        """
        try:
            return cached.model_info(self.store, self.source)
        except LsqError as error:
            raise NoModel(str(error), self.source) from error


class NoModel(LsqError):
    """The chosen model can't be shown, or not yet."""

    def __init__(self, reason: str, source: ModelSource) -> None:
        super().__init__(reason)
        self.source = source


def page(title: str, body: Callable[[PageContext], None]) -> None:
    """Set the page up, draw the sidebar, then the body; what goes wrong is one sentence."""
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
    """Why there is no model to show, and the ways on; while it is looked up, that it is."""
    source, pending = error.source, isinstance(error.__cause__, hub_lookup.LookupPending)
    if pending:
        headline(
            f"{words.escape(source.name)} is being looked up on the Hugging Face Hub.",
            "Only its config is fetched. This page updates by itself; you can leave it meanwhile.",
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
    """Draw the page anew when a model was looked up."""
    if not hub_lookup.is_pending(source):
        st.rerun(scope="app")


@cache
def _icon() -> Image.Image:
    """Four bars as high as their bits; an icon by name would be fetched from elsewhere."""
    icon = np.zeros((32, 32, 4), dtype=np.uint8)
    for index, (bits, color) in enumerate(BIT_COLORS.items()):
        bar = icon[32 - 4 * bits :, 8 * index + 1 : 8 * index + 7]
        bar[...] = [*bytes.fromhex(color[1:]), 255]
    return Image.fromarray(icon)


def _open_database() -> Store:
    """The database, its schema brought up to date once for each state of its file."""
    path = database_path()
    if not path.exists():
        return Store(path)
    state = path.stat()
    return _open_file(path, state.st_ino, state.st_mtime_ns)


@st.cache_resource(max_entries=4, show_spinner=False)
def _open_file(path: Path, inode: int, mtime_ns: int) -> Store:
    return Store(path)


def headline(text: str, caption: str = "") -> None:
    """The one thing that a page says first, and in small print why."""
    st.title(text, anchor=False)
    if caption:
        st.caption(caption)


def next_step(page: str, label: str) -> None:
    """A link to the page where to go on; the address goes along."""
    st.page_link(page, label=label, icon=":material/arrow_forward:")
