"""The first page: pick a model and see what it is, before any of its weights is loaded."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from lsq_core import charts, disk
from lsq_core.bits import LADDER, QuantConfig, is_divisible
from lsq_core.errors import LsqError
from lsq_core.model.info import ModelInfo
from lsq_core.planning.detection import shallow_model_note
from lsq_core.quantization.registry import planned_bytes
from lsq_core.reference import download
from lsq_core.reference.importing import import_download, import_reference
from lsq_core.store.models import PUBLISHED
from lsq_core.store.store import Store
from lsq_core.ui import cached, cached_results, sidebar, state, words
from lsq_core.ui.page import NoModel, PageContext, headline, next_step, page, render_no_model
from lsq_core.ui.safe import st
from lsq_core.units import MIB, format_bytes

#: The stop that the first line speaks of.
_TYPICAL = QuantConfig(4, 64)


def render_model_page(ctx: PageContext) -> None:
    """The chosen model, ways to choose another, and what is kept on disk."""
    try:
        if cached.is_published(ctx.info):
            show_published(ctx.store, ctx.info)
        else:
            show_model(ctx.info)
    except NoModel as error:
        render_no_model(error)
    except LsqError as error:
        headline(f"{words.escape(ctx.source.name)} cannot be opened.")
        st.error(words.escape(str(error)))
    left, right = st.columns(2, gap="large")
    with left:
        show_model_picker(ctx.store)
        show_import(ctx.store)
    with right:
        show_disk(ctx.store)


def show_model(info: ModelInfo) -> None:
    """What the model is, what it takes at each stop, and what to know before going on."""
    sizes = size_frame(info)
    common = sizes[sizes["config"] == _TYPICAL.name]
    size = f", {words.size(info.file_bytes)}" if info.file_bytes else ""
    quantized_size = (
        words.size(float((common["linear_bytes"] + common["other_bytes"]).iloc[0]))
        if len(common)
        else ""
    )
    headline(
        f"{words.count(info.parameters)} parameters{size}"
        + (f"; {quantized_size} at {_TYPICAL.stop_name} bits." if quantized_size else "."),
        f"{state.model_text(_source(info))} · {info.architecture} · read from its config and file "
        "headers; no weights loaded",
    )
    facts = st.columns(5)
    facts[0].metric("Layers", info.layers)
    facts[1].metric("Parameters", f"{info.parameters:,}")
    facts[2].metric("On disk", format_bytes(info.file_bytes) if info.file_bytes else "unknown")
    facts[3].metric("Quantizable", f"{100 * info.coverage:.1f} %", help=_coverage_help(info))
    facts[4].metric("Context", f"{info.context:,} tokens")
    show_sizes(sizes)
    if shallow_model_note(info.layers):
        st.warning(shallow_model_note(info.layers), icon=":material/layers:")
    for note in info.notes:
        st.warning(words.escape(note), icon=":material/rule:")
    if info.left_out:
        with st.expander(f"{len(info.left_out)} matrices stay in full precision"):
            st.write("No supported group size divides these:")
            st.code("\n".join(info.left_out), language=None)
    next_step("pages/1_Explore.py", "See which layers are hard to quantize")


def _coverage_help(info: ModelInfo) -> str:
    return (
        f"{info.linear_parameters:,} parameters in {len(info.matrices)} weight matrices of the "
        "decoder blocks; embeddings, norms and the LM head are not quantized."
    )


def show_published(store: Store, info: ModelInfo) -> None:
    """What publications tell of a model whose weights aren't here."""
    whole = bool(info.file_bytes)  # else nothing is known beside the linear weights
    sizes = size_frame(info).replace({"name": {"original": "16 bits"}})
    common = sizes[sizes["config"] == _TYPICAL.name].iloc[0]
    headline(
        f"{words.count(info.parameters)} {'' if whole else 'linear '}parameters; "
        f"at {_TYPICAL.stop_name} bits {words.size(common['linear_bytes'] + common['other_bytes'])}"
        + ("." if whole else " without embeddings and LM head."),
        f"{info.source} · published measurements, no local weights: explore, plan and compare",
    )
    profiles = len(cached.published_settings(store, info))
    runs = cached_results.results(store, "published")
    facts = st.columns(6)
    facts[0].metric("Layers", info.layers)
    facts[1].metric("Parameters", f"{info.parameters:,}" if whole else "not published")
    facts[2].metric("Linear parameters", f"{info.linear_parameters:,}", help=_coverage_help(info))
    facts[3].metric("Quantizable", f"{100 * info.coverage:.1f} %" if whole else "unknown")
    facts[4].metric("Published profiles", profiles)
    facts[5].metric("Published runs", runs.loc[runs["model"] == info.source, "run"].nunique())
    show_sizes(sizes)
    if not whole:
        st.caption("The bars show linear weights only; the size of the rest was not published.")
    next_step("pages/1_Explore.py", "See which layers are hard to quantize")


def show_sizes(sizes: pd.DataFrame) -> None:
    """The whole model's bytes as bars."""
    whole = sizes["linear_bytes"] + sizes["other_bytes"]
    labels = [f"{name} {words.size(size)}" for name, size in zip(sizes["name"], whole, strict=True)]
    st.plotly_chart(
        charts.size_bars(sizes),
        config=charts.CONFIG,
        key="sizes",
        alt=f"Size of the model by bits per linear weight: {', '.join(labels)}.",
    )


def _source(info: ModelInfo) -> state.ModelSource:
    return state.ModelSource(info.source, info.revision)


def size_frame(info: ModelInfo) -> pd.DataFrame:
    """Bytes of the whole model as it is and at each stop that fits all its matrices."""
    now = max(info.file_bytes - info.other_bytes, 0)
    rows = [("original", "", now, info.other_bytes)] if info.file_bytes else []
    for config in LADDER:
        if all(is_divisible(m.numel, config.group_size) for m in info.matrices):
            linear = sum(planned_bytes("hqq", m.shape, config, "8bit") for m in info.matrices)
            rows.append((config.stop_name, config.name, linear, info.other_bytes))
    return pd.DataFrame(rows, columns=["name", "config", "linear_bytes", "other_bytes"])


# --- choosing -------------------------------------------------------------------------------


def show_model_picker(store: Store) -> None:
    """The embedded model, those already known, an id, or a folder."""
    st.subheader("Choose a model", anchor=False)
    texts = list(dict.fromkeys(["demo", *sidebar.known_model_names(store)]))[:8]
    _show_model_buttons(texts, lambda text: "Demo model" if text == "demo" else text)
    published = sidebar.published_model_names(store)
    if published:
        st.caption("Published measurements, without weights:")
        _show_model_buttons(published, lambda text: text.removeprefix(PUBLISHED))
    with st.form("other", border=False):
        name, revision = st.columns([3, 1])
        name.text_input("Hugging Face id or local folder", key="name", placeholder="org/name")
        revision.text_input("Revision", key="revision", placeholder="main")
        with st.expander("For models you trust"):
            st.warning(
                "Both run code shipped with the model, with your permissions on this machine.",
                icon=":material/warning:",
            )
            st.checkbox("Trust remote code", key="trust")
            st.checkbox("Allow pickled weights", key="pickle")
        st.form_submit_button("Open", on_click=_choose_typed)


def _show_model_buttons(texts: list[str], label: Callable[[str], str]) -> None:
    with st.container(horizontal=True):
        for text in texts:
            chosen = text == st.session_state["model"]
            st.button(
                label(text),
                key=f"known-{text}",
                on_click=state.choose_model,
                args=(text,),
                type="primary" if chosen else "secondary",
            )


def _choose_typed() -> None:
    """Take what was typed; the boxes fall back to off for the next one."""
    name, revision = st.session_state["name"].strip(), st.session_state["revision"].strip()
    if not name:
        return
    text = f"{name}@{revision}" if revision else name
    state.choose_model(text, st.session_state["trust"], st.session_state["pickle"])
    st.session_state["trust"] = st.session_state["pickle"] = False


# --- published measurements -------------------------------------------------------------------


def show_import(store: Store) -> None:
    """Take in the authors' published measurements, from a folder or from their repository."""
    with st.expander("Import published measurements", expanded="imported" in st.session_state):
        st.write(
            "What the authors of SensiBoost, KurtBoost and MXQ measured on Llama models. Explore, "
            "plan and compare them without weights or a GPU. They stay separate from your results."
        )
        folder = st.text_input(
            "lm-quant-toolkit checkout",
            key="toolkit",
            placeholder="folder containing src and data-vis",
        ).strip()
        with st.container(horizontal=True):
            import_clicked = st.button("Import", type="primary", key="import", disabled=not folder)
            download_clicked = st.button(
                "Download and import",
                icon=":material/download:",
                key="download",
                help=f"Fetches commit {download.COMMIT[:12]} of {download.URL} with git, which "
                "verifies the hash of everything it receives.",
            )
        if import_clicked or download_clicked:
            st.session_state.pop("imported", None)
            _run_import(store, None if download_clicked else folder)
        if "imported" in st.session_state:
            _show_import_result(st.session_state["imported"])


def _run_import(store: Store, folder: str | None) -> None:
    """Import a folder, or the download; the outcome is shown after the rerun."""
    bar = st.progress(0.0, text="Starting…")

    def report(stage: str, done: int, total: int, message: str) -> None:
        bar.progress(done / total, text=f"{stage.capitalize()}: {message}…")

    try:
        if folder is None:
            imported = import_download(store, report)
        else:
            imported = import_reference(folder, store, report)
    except LsqError as error:
        bar.empty()
        st.error(words.escape(str(error)))
        return
    st.session_state["imported"] = imported
    st.rerun()


def _show_import_result(imported: dict) -> None:
    """What an import took in, and what it left out and why."""
    counts = imported["counts"]
    st.success(
        words.escape(
            f"{words.plural(counts['models'], 'model')}, "
            f"{words.plural(counts['profiles'], 'profile')}, "
            f"{words.plural(counts['plans'], 'plan')} and {words.plural(counts['runs'], 'run')} "
            f"from {words.plural(len(imported['files']), 'file')} of {imported['source']}, "
            f"in {words.seconds(imported['seconds'])}."
        )
    )
    problems = [*imported["flawed"], *imported["missing"]]
    if problems:
        st.caption(f"{words.plural(len(problems), 'item')} missing or wrong in the files:")
        st.dataframe({"left out, and why": problems}, hide_index=True, height=220)


# --- what is kept ---------------------------------------------------------------------------


def show_disk(store: Store) -> None:
    """What is kept on disk, largest first, and how to let go of it."""
    st.subheader("Disk usage", anchor=False)
    if "pruned" in st.session_state:
        st.success(st.session_state.pop("pruned"))
    items = sorted(disk.list_disk_items(store), key=lambda item: -item.bytes)
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
        st.write("Results in the database are kept. Deleted files cannot be restored.")
        if st.button("Delete permanently", type="primary", key="prune-sure"):
            for name in chosen:
                disk.prune(store, name)
            st.session_state["pruned"] = f"Deleted {len(chosen)}, freeing {freed}."
            del st.session_state["prune"]
            st.rerun()


page("Model", render_model_page)
