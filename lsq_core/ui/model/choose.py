"""Choosing a model: built in, known, typed, or published without weights."""

from __future__ import annotations

from collections.abc import Callable

from lsq_core.errors import LsqError
from lsq_core.model.source import built_in_models
from lsq_core.reference import download
from lsq_core.reference.importing import import_download, import_reference
from lsq_core.store.models import PUBLISHED
from lsq_core.store.store import Store
from lsq_core.ui import sidebar, state, words
from lsq_core.ui.safe import st

_BUILT_IN_LABELS = {"smollm2": "SmolLM2 135M", "demo": "Demo model"}
DOWNLOAD_HELP = (
    f"Fetches commit {download.COMMIT[:12]} of {download.URL} with git, which verifies the hash of "
    "everything it receives."
)


def show_model_picker(store: Store) -> None:
    """Show buttons for built-in, known and published models, and a form for any other model."""
    texts = list(dict.fromkeys([*built_in_models(), *sidebar.known_model_names(store)]))[:8]
    _show_model_buttons(texts, lambda text: _BUILT_IN_LABELS.get(text, text))
    published = sidebar.published_model_names(store)
    if published:
        st.caption("Published measurements, without weights:")
        _show_model_buttons(published, lambda text: text.removeprefix(PUBLISHED))
    with st.form("other", border=False):
        name, revision = st.columns([3, 1])
        name.text_input(
            "Hugging Face id, local folder, or GGUF file", key="name", placeholder="org/name"
        )
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
    """Choose the typed model, then reset the permissions."""
    name, revision = st.session_state["name"].strip(), st.session_state["revision"].strip()
    if not name:
        return
    text = f"{name}@{revision}" if revision else name
    state.choose_model(text, st.session_state["trust"], st.session_state["pickle"])
    st.session_state["trust"] = st.session_state["pickle"] = False


def show_import(store: Store) -> None:
    """Show the import of the authors' published measurements, from a folder or repository."""
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
                help=DOWNLOAD_HELP,
            )
        if import_clicked or download_clicked:
            st.session_state.pop("imported", None)
            run_import(store, None if download_clicked else folder)
        if "imported" in st.session_state:
            _show_import_result(st.session_state["imported"])


def run_import(store: Store, folder: str | None) -> None:
    """Import a folder, or the download if None; the outcome is shown after the rerun."""
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
    """Show what was imported, and what was left out and why."""
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
        st.caption(f"{words.plural(len(problems), 'item')} missing or invalid in the files:")
        st.dataframe({"skipped, with the reason": problems}, hide_index=True, height=220)
