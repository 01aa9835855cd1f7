"""The first page: pick a model and see what it is, before any of its weights is loaded."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from lsq_core import charts, disk
from lsq_core.bits import LADDER, QuantConfig, divides
from lsq_core.errors import LsqError
from lsq_core.model.info import ModelInfo
from lsq_core.planning.detection import shallowness
from lsq_core.quantization.registry import planned_bytes
from lsq_core.reference import download, import_download, import_reference
from lsq_core.store.store import PUBLISHED, Store
from lsq_core.ui import cached, sidebar, state, words
from lsq_core.ui.page import Here, NoModel, headline, next_step, page, say_no_model
from lsq_core.ui.safe import st
from lsq_core.units import MIB, format_bytes

#: The stop that the first line speaks of.
_COMMON = QuantConfig(4, 64)


def first_page(here: Here) -> None:
    """The chosen model, ways to choose another, and what is kept on disk."""
    try:
        if cached.is_published(here.info):
            show_published(here.store, here.info)
        else:
            show_model(here.info)
    except NoModel as error:
        say_no_model(error)
    except LsqError as error:
        headline(f"{words.literal(here.source.name)} cannot be opened.")
        st.error(words.literal(str(error)))
    left, right = st.columns(2, gap="large")
    with left:
        choose(here.store)
        offer_import(here.store)
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
    facts[3].metric("Covered", f"{100 * info.covered:.1f} %", help=_covered(info))
    facts[4].metric("Context", f"{info.context:,} tokens")
    show_sizes(sizes)
    if shallowness(info.layers):
        st.warning(shallowness(info.layers), icon=":material/layers:")
    for note in info.notes:
        st.warning(words.literal(note), icon=":material/rule:")
    if info.left_out:
        with st.expander(f"{len(info.left_out)} matrices stay at full precision"):
            st.write("No group size of the ladder divides these:")
            st.code("\n".join(info.left_out), language=None)
    next_step("pages/1_Explore.py", "Explore which layers are hard to quantize")


def _covered(info: ModelInfo) -> str:
    return (
        f"{info.linear_parameters:,} parameters in {len(info.matrices)} weight matrices of the "
        "decoder blocks; embeddings, norms and the head stay as they are."
    )


def show_published(store: Store, info: ModelInfo) -> None:
    """What publications tell of a model whose weights aren't here."""
    whole = bool(info.file_bytes)  # else nothing is known beside the linear weights
    sizes = size_frame(info).replace({"name": {"as it is": "16 bits"}})
    at = sizes[sizes["config"] == _COMMON.name].iloc[0]
    headline(
        f"{words.count(info.parameters)} {'' if whole else 'linear '}parameters; "
        f"at {_COMMON.stop_name} bits {words.size(at['linear_bytes'] + at['other_bytes'])}"
        + ("." if whole else " without embeddings and head."),
        f"{info.source} · published measurements, no weights here: explore, plan and compare",
    )
    profiles = len(cached.published_settings(store, info))
    runs = cached.results(store, "published")
    facts = st.columns(6)
    facts[0].metric("Layers", info.layers)
    facts[1].metric("Parameters", f"{info.parameters:,}" if whole else "not published")
    facts[2].metric("Linear parameters", f"{info.linear_parameters:,}", help=_covered(info))
    facts[3].metric("Covered", f"{100 * info.covered:.1f} %" if whole else "not known")
    facts[4].metric("Published profiles", profiles)
    facts[5].metric("Published runs", runs.loc[runs["model"] == info.source, "run"].nunique())
    show_sizes(sizes)
    if not whole:
        st.caption("The bars are the linear weights alone: the size of the rest isn't published.")
    next_step("pages/1_Explore.py", "Explore which layers are hard to quantize")


def show_sizes(sizes: pd.DataFrame) -> None:
    """The whole model's bytes as bars."""
    whole = sizes["linear_bytes"] + sizes["other_bytes"]
    told = [f"{name} {words.size(size)}" for name, size in zip(sizes["name"], whole, strict=True)]
    st.plotly_chart(
        charts.size_bars(sizes),
        config=charts.CONFIG,
        key="sizes",
        alt=f"Size of the model by bits per linear weight: {', '.join(told)}.",
    )


def _source(info: ModelInfo) -> state.ModelSource:
    return state.ModelSource(info.source, info.revision)


def size_frame(info: ModelInfo) -> pd.DataFrame:
    """Bytes of the whole model as it is and at each stop that fits all its matrices."""
    now = max(info.file_bytes - info.other_bytes, 0)
    rows = [("as it is", "", now, info.other_bytes)] if info.file_bytes else []
    for config in LADDER:
        if all(divides(m.numel, config.group_size) for m in info.matrices):
            linear = sum(planned_bytes("hqq", m.shape, config, "8bit") for m in info.matrices)
            rows.append((config.stop_name, config.name, linear, info.other_bytes))
    return pd.DataFrame(rows, columns=["name", "config", "linear_bytes", "other_bytes"])


# --- choosing -------------------------------------------------------------------------------


def choose(store: Store) -> None:
    """The embedded model, those already known, an id, or a folder."""
    st.subheader("Choose a model", anchor=False)
    texts = list(dict.fromkeys(["demo", *sidebar.known_texts(store)]))[:8]
    _buttons(texts, lambda text: "Demo model" if text == "demo" else text)
    published = sidebar.published_texts(store)
    if published:
        st.caption("Published measurements, without weights:")
        _buttons(published, lambda text: text.removeprefix(PUBLISHED))
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


def _buttons(texts: list[str], label: Callable[[str], str]) -> None:
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


def offer_import(store: Store) -> None:
    """Take in the authors' published measurements, from a folder or from their repository."""
    with st.expander("Import published measurements", expanded="imported" in st.session_state):
        st.write(
            "What the authors of SensiBoost, KurtBoost and MXQ measured on Llama models: explore, "
            "plan and compare them without weights or a GPU. It stays apart from your own figures."
        )
        folder = st.text_input(
            "Folder with a checkout of lm-quant-toolkit",
            key="toolkit",
            placeholder="the folder that holds src and data-vis",
        ).strip()
        with st.container(horizontal=True):
            wanted = st.button("Import", type="primary", key="import", disabled=not folder)
            fetched = st.button(
                "Download and import",
                icon=":material/download:",
                key="download",
                help=f"Fetches commit {download.COMMIT[:12]} of {download.URL} by git, which "
                "checks the hash of all it receives.",
            )
        if wanted or fetched:
            st.session_state.pop("imported", None)
            _import(store, None if fetched else folder)
        if "imported" in st.session_state:
            _tell_import(st.session_state["imported"])


def _import(store: Store, folder: str | None) -> None:
    """Import a folder, or the download; what came of it is told after the page is drawn anew."""
    bar = st.progress(0.0, text="Starting…")

    def report(stage: str, done: int, total: int, message: str) -> None:
        bar.progress(done / total, text=f"{stage.capitalize()}: {message}…")

    try:
        if folder is None:
            told = import_download(store, report)
        else:
            told = import_reference(folder, store, report)
    except LsqError as error:
        bar.empty()
        st.error(words.literal(str(error)))
        return
    st.session_state["imported"] = told
    st.rerun()


def _tell_import(told: dict) -> None:
    """What an import took in, and what it left out and why."""
    counts = told["counts"]
    st.success(
        words.literal(
            f"{words.plural(counts['models'], 'model')}, "
            f"{words.plural(counts['profiles'], 'profile')}, "
            f"{words.plural(counts['plans'], 'plan')} and {words.plural(counts['runs'], 'run')} "
            f"from {words.plural(len(told['files']), 'file')} of {told['source']}, "
            f"in {words.seconds(told['seconds'])}."
        )
    )
    lacks = [*told["flawed"], *told["missing"]]
    if lacks:
        st.caption(f"{words.plural(len(lacks), 'thing')} the files lack or have wrong:")
        st.dataframe({"not offered, and why": lacks}, hide_index=True, height=220)


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
