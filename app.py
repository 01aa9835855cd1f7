"""The first page: pick a model and see what it is, before any of its weights is loaded."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from lsq_core import charts, disk
from lsq_core.config import LADDER, MIB, QuantConfig, divides, format_bytes, planned_bytes
from lsq_core.errors import LsqError
from lsq_core.model import ModelInfo
from lsq_core.plan.outliers import shallowness
from lsq_core.store import Store
from lsq_core.ui import sidebar, state, words
from lsq_core.ui.page import Here, headline, next_step, page

#: The stop that the first line speaks of.
_COMMON = QuantConfig(4, 64)


def first_page(here: Here) -> None:
    """The chosen model, ways to choose another, and what is kept on disk."""
    try:
        show_model(here.info)
    except LsqError as error:
        headline(f"{here.source.name} cannot be opened.")
        st.error(words.literal(str(error)))
    left, right = st.columns(2, gap="large")
    with left:
        choose(here.store)
    with right:
        show_disk(here.store)


def show_model(info: ModelInfo) -> None:
    """What the model is, what it takes at each stop, and what to know before going on."""
    sizes = size_frame(info)
    at = sizes[sizes["config"] == _COMMON.name]
    size = f", {words.size(info.file_bytes)}" if info.file_bytes else ""
    small = words.size(float((at["linear_bytes"] + at["other_bytes"]).iloc[0])) if len(at) else ""
    headline(
        f"{words.count(info.parameters)} parameters{size}"
        + (f"; at {_COMMON.stop_name} bits {small}." if small else "."),
        f"{state.model_text(_source(info))} · {info.architecture} · read from its config and file "
        "headers, no weights loaded",
    )
    facts = st.columns(5)
    facts[0].metric("Layers", info.layers)
    facts[1].metric("Parameters", f"{info.parameters:,}")
    facts[2].metric("On disk", format_bytes(info.file_bytes) if info.file_bytes else "unknown")
    facts[3].metric(
        "Covered",
        f"{100 * info.covered:.1f} %",
        help=f"{info.linear_parameters:,} parameters in {len(info.matrices)} weight matrices of "
        "the decoder blocks; embeddings, norms and the head stay as they are.",
    )
    facts[4].metric("Context", f"{info.context:,} tokens")
    st.plotly_chart(charts.size_bars(sizes), config=charts.CONFIG, key="sizes")
    if shallowness(info.layers):
        st.warning(shallowness(info.layers), icon=":material/layers:")
    if info.left_out:
        with st.expander(f"{len(info.left_out)} matrices stay at full precision"):
            st.write("No group size of the ladder divides these:")
            st.code("\n".join(info.left_out), language=None)
    next_step("pages/1_Explore.py", "Explore which layers are hard to quantize")


def _source(info: ModelInfo) -> state.ModelSource:
    return state.ModelSource(info.source, info.revision)


def size_frame(info: ModelInfo) -> pd.DataFrame:
    """Bytes of the whole model as it is and at each stop that fits all its matrices."""
    now = max(info.file_bytes - info.other_bytes, 0)
    rows = [("as it is", "", now, info.other_bytes)] if info.file_bytes else []
    for config in LADDER:
        if all(divides(m.numel, config.group_size) for m in info.matrices):
            linear = sum(planned_bytes(m.numel, config) for m in info.matrices)
            rows.append((config.stop_name, config.name, linear, info.other_bytes))
    return pd.DataFrame(rows, columns=["name", "config", "linear_bytes", "other_bytes"])


# --- choosing -------------------------------------------------------------------------------


def choose(store: Store) -> None:
    """The embedded model, those already known, an id, or a folder."""
    st.subheader("Choose a model", anchor=False)
    with st.container(horizontal=True):
        for text in list(dict.fromkeys(["demo", *sidebar.known_texts(store)]))[:8]:
            chosen = text == st.session_state["model"]
            st.button(
                "Demo model" if text == "demo" else text,
                key=f"known-{text}",
                on_click=state.choose_model,
                args=(text,),
                type="primary" if chosen else "secondary",
            )
    with st.form("other", border=False):
        name, revision = st.columns([3, 1])
        name.text_input("Hugging Face id or local folder", key="name", placeholder="org/name")
        revision.text_input("Revision", key="revision", placeholder="main")
        with st.expander("For models you trust"):
            st.warning(
                "Both run code that comes with the model, with your rights on this machine.",
                icon=":material/warning:",
            )
            st.checkbox("Trust remote code", key="trust")
            st.checkbox("Allow pickled weights", key="pickle")
        st.form_submit_button("Look at it", on_click=_choose_typed)


def _choose_typed() -> None:
    """Take what was typed; the boxes fall back to off for the next one."""
    name, revision = st.session_state["name"].strip(), st.session_state["revision"].strip()
    if not name:
        return
    text = f"{name}@{revision}" if revision else name
    state.choose_model(text, st.session_state["trust"], st.session_state["pickle"])
    st.session_state["trust"] = st.session_state["pickle"] = False


# --- what is kept ---------------------------------------------------------------------------


def show_disk(store: Store) -> None:
    """What is kept on disk, largest first, and how to let go of it."""
    st.subheader("Kept on disk", anchor=False)
    if "pruned" in st.session_state:
        st.success(st.session_state.pop("pruned"))
    kept = sorted(disk.kept_on_disk(store), key=lambda item: -item.bytes)
    st.dataframe(
        pd.DataFrame(
            {
                "what": [item.kind for item in kept],
                "name": [item.name for item in kept],
                "MiB": [item.bytes / MIB for item in kept],
            }
        ),
        column_config={"MiB": st.column_config.NumberColumn(format="%.3f")},
        hide_index=True,
        height=220 if len(kept) > 5 else "auto",
    )
    sizes = {item.name: item.bytes for item in kept if item.prunable}
    if sizes:
        _prune(store, sizes)


def _prune(store: Store, sizes: dict[str, int]) -> None:
    chosen = st.multiselect(
        "Delete",
        list(sizes),
        format_func=lambda name: f"{name} ({format_bytes(sizes[name])})",
        placeholder="Choose what to delete",
        label_visibility="collapsed",
        key="prune",
    )
    if not chosen:
        return
    freed = format_bytes(sum(sizes[name] for name in chosen))
    with st.popover(f"Delete {len(chosen)}, freeing {freed}…"):
        st.write("Results in the database stay. Files deleted here cannot be brought back.")
        if st.button("Delete for good", type="primary", key="prune-sure"):
            for name in chosen:
                disk.prune(store, name)
            st.session_state["pruned"] = f"Deleted {len(chosen)}; {freed} are free again."
            del st.session_state["prune"]
            st.rerun()


page("Model", first_page)
