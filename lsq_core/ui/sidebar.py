"""The sidebar: navigation, the model, the device and running jobs."""

from __future__ import annotations

from pathlib import Path

from lsq_core import devices, disk, jobs
from lsq_core.model.source import ModelSource, built_in_models, default_model
from lsq_core.store.store import Store
from lsq_core.ui import cached, state, words
from lsq_core.ui.safe import st

PAGES = {
    "app.py": ("Model", ":material/deployed_code:"),
    "pages/1_Explore.py": ("Explore", ":material/query_stats:"),
    "pages/2_Plan.py": ("Plan", ":material/grid_on:"),
    "pages/3_Run.py": ("Run", ":material/play_circle:"),
    "pages/4_Compare.py": ("Compare", ":material/scatter_plot:"),
    "pages/5_SQL.py": ("SQL", ":material/database_search:"),
    "pages/6_Storage.py": ("Storage", ":material/hard_drive:"),
}
#: Seconds between two updates of running jobs.
POLL_SECONDS = 1.0


def show(store: Store) -> tuple[str, str]:
    """Draw the sidebar; return the chosen model's text and the device."""
    with st.sidebar:
        for path, (label, icon) in PAGES.items():
            st.page_link(path, label=label, icon=icon)
        st.space("small")
        text = _model(store)
        device = _device()
        _watch_jobs(disk.jobs_folder(store))
    return text, device


def _model(store: Store) -> str:
    state.init_key("model", default_model())
    st.session_state["model"] = st.session_state["model"] or default_model()
    available = [*built_in_models(), *known_model_names(store), *published_model_names(store)]
    options = list(dict.fromkeys([*available, st.session_state["model"]]))
    st.selectbox(
        "Model",
        options,
        key="model",
        accept_new_options=True,
        persist_state="session",
        help="smollm2 or demo, a Hugging Face id (org/name or org/name@revision), a local folder "
        "or GGUF file, or published:NAME for imported measurements without weights.",
    )
    state.sync_url("model")
    return st.session_state["model"]


def known_model_names(store: Store) -> list[str]:
    """Return the names of models in the database as shown in the picker, newest first."""
    table = cached.models(store)
    return [
        state.model_text(ModelSource(row.source, row.revision if row.revision else None))
        for row in table.astype(object).where(table.notna(), None).itertuples()
    ]


def published_model_names(store: Store) -> list[str]:
    """Return the names of published models as shown in the picker (``published:NAME``), sorted."""
    return sorted(cached.models(store, "published")["source"])


def _device() -> str:
    options = ["auto", *devices.device_names()]
    state.init_key("device", "auto", options)
    return st.selectbox("Device", options, key="device", persist_state="session")


def _watch_jobs(folder: Path) -> None:
    """Show running jobs, updating while there are any."""
    active = tuple(job.id for job in jobs.list_jobs(folder) if job.active)
    st.fragment(_show_running_jobs, run_every=POLL_SECONDS if active else None)(folder, active)


def _show_running_jobs(folder: Path, watched: tuple[str, ...]) -> None:
    """Show a line and a bar per running job; redraw the page when one has ended."""
    active = {job.id: job for job in jobs.list_jobs(folder) if job.active}
    if set(watched) - set(active):
        st.rerun(scope="app")
    for job in active.values():
        remaining = f", {_non_breaking(words.seconds(job.eta))} left" if job.eta else ""
        with st.container(key=f"side-bar-{job.id}"):  # a separate bar per job
            st.progress(
                min(job.fraction, 1.0), text=f"{job.title}: {job.stage or job.state}{remaining}"
            )


def _non_breaking(text: str) -> str:
    """Replace spaces by non-breaking ones."""
    return text.replace(" ", "\u00a0")
