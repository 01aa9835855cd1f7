"""The Storage page: what is stored on disk, and its deletion."""

from __future__ import annotations

import pandas as pd

from lsq_core import disk
from lsq_core.store.store import Store
from lsq_core.ui.page import PageContext, headline, page
from lsq_core.ui.safe import st
from lsq_core.units import MIB, format_bytes


def storage_page(ctx: PageContext) -> None:
    """Show everything on disk, largest first, and a form to delete items."""
    items = sorted(disk.list_disk_items(ctx.store), key=lambda item: -item.bytes)
    headline(
        f"{format_bytes(sum(item.bytes for item in items))} on disk.",
        f"The database is {ctx.store.path}; results in it stay when files are deleted here.",
    )
    if "pruned" in st.session_state:
        st.success(st.session_state.pop("pruned"))
    st.dataframe(
        pd.DataFrame(
            {
                "kind": [item.kind for item in items],
                "name": [item.name for item in items],
                "MiB": [item.bytes / MIB for item in items],
            }
        ),
        column_config={"MiB": st.column_config.NumberColumn(format="%.3f")},
        hide_index=True,
        height=220 if len(items) > 5 else "auto",
    )
    sizes = {item.name: item.bytes for item in items if item.prunable}
    if sizes:
        _prune(ctx.store, sizes)


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
        st.write("Results in the database are kept. Deleted files cannot be restored.")
        if st.button("Delete permanently", type="primary", key="prune-sure"):
            for name in chosen:
                disk.prune(store, name)
            st.session_state["pruned"] = f"Deleted {len(chosen)}, freeing {freed}."
            del st.session_state["prune"]
            st.rerun()


page("Storage", storage_page)
