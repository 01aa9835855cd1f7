"""Which profile the Explore page shows, the way to one, and how far measuring it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from streamlit.delta_generator import DeltaGenerator

from lsq_core import disk, jobs
from lsq_core.bits import LADDERS, METADATA_FORMATS
from lsq_core.corpus.registry import BUILT_IN_CORPORA
from lsq_core.jobs import Job, arguments
from lsq_core.model.info import ModelInfo
from lsq_core.planning.problem import Problem
from lsq_core.profiling.metrics import weight_metrics
from lsq_core.profiling.profile import Profile, missing_metrics
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.quantization.registry import MATRIX_QUANTIZERS, incompatibility_reason
from lsq_core.store.store import Store
from lsq_core.ui import cached, jobs_panel, state, words
from lsq_core.ui.page import PageContext, headline
from lsq_core.ui.safe import st


@dataclass(frozen=True, eq=False)
class ExploreView:
    """What a view of the page draws: the model and its profile, and where to draw.

    ``header`` is where the headline goes, ``row`` where a view's own controls go. While the
    profile is being measured, or is not whole, the first line says so and a view's own comes
    below it.
    """

    ctx: PageContext
    info: ModelInfo
    settings: ProfileSettings
    profile: Profile | None
    header: DeltaGenerator
    row: DeltaGenerator

    @property
    def problem(self) -> Problem:
        """What planners see."""
        return cached.problem(self.info, self.profile)

    @property
    def published(self) -> bool:
        """Whether the model's measurements were published, and its weights aren't here."""
        return cached.is_published(self.info)

    @property
    def lacking(self) -> list[str]:
        """The usual metrics that a measured profile hasn't yet."""
        return [] if self.published else missing_metrics(self.profile)

    def render_headline(self, text: str, caption: str = "") -> None:
        """A view's first line, and in small print why."""
        with self.header:
            if self.profile is not None and self.lacking:
                st.markdown(f"**{words.escape(text)}**")
                st.caption(caption)
            else:
                headline(text, caption)


# --- which one ------------------------------------------------------------------------------


def profile_bar(store: Store, info: ModelInfo) -> ProfileSettings:
    """The chosen profile's settings."""
    return published_bar(store, info) if cached.is_published(info) else settings_bar()


_HELP = {
    "ladder": "The configurations that are measured: the papers' 2, 3, 4 and 8 bits, or 1, 5 and 6 "
    "bits besides."
}


def settings_bar() -> ProfileSettings:
    """The settings of a profile, in one row."""
    columns = st.columns([2, 1.1, 1.1, 1.1, 1.1, 0.8], vertical_alignment="bottom")
    with columns[0]:
        text = st.session_state["calibration"]
        st.selectbox(
            "Calibration corpus",
            list(dict.fromkeys([*BUILT_IN_CORPORA, text])),
            key="calibration",
            accept_new_options=True,
            persist_state="session",
            help="\n".join(
                f"- **{name}**: {quantizer_spec}"
                for name, quantizer_spec in BUILT_IN_CORPORA.items()
            )
            + "\n- **hf:org/name**, or the path of a text file",
        )
    chosen = [
        ("Quantizer", "profile_quantizer", list(MATRIX_QUANTIZERS)),
        ("Grouping axis", "axis", [1, 0]),
        ("Metadata", "metadata", list(METADATA_FORMATS)),
        ("Ladder", "ladder", list(LADDERS)),
    ]
    for column, (label, key, options) in zip(columns[1:], chosen, strict=False):
        column.selectbox(label, options, key=key, persist_state="session", help=_HELP.get(key))
    with columns[5], st.popover("More", width="stretch"):
        st.number_input("Calibration samples", 1, 4096, key="samples", persist_state="session")
        st.number_input(
            "Tokens per sample block", 16, 8192, key="block_tokens", persist_state="session"
        )
    return state.settings()


def published_bar(store: Store, info: ModelInfo) -> ProfileSettings:
    """A choice among a published model's profiles: only what is there can be chosen."""
    choices = list(cached.published_settings(store, info))
    texts = list(dict.fromkeys(settings.calibration for settings in choices))
    if state.settings() not in choices:
        state.set_settings(choices[0])
    columns = st.columns([2, 1.2, 3.2], vertical_alignment="bottom")
    with columns[0]:
        text = st.selectbox(
            "Calibration corpus",
            texts,
            key="calibration",
            format_func=_published_text,
            on_change=_choose_first_quantizer,
            args=(choices,),
            persist_state="session",
        )
    with columns[1]:
        st.selectbox(
            "Quantizer",
            [settings.quantizer for settings in choices if settings.calibration == text],
            key="profile_quantizer",
            persist_state="session",
        )
    columns[2].caption(
        f"{words.plural(len(choices), 'published profile')}; grouped along axis {choices[0].axis}, "
        f"{choices[0].metadata.replace('bit', '-bit')} metadata."
    )
    return state.settings()


def _published_text(name: str) -> str:
    """``c4@variant-sensi`` as the text and the file that disagrees with the reference."""
    text, _, file = name.partition("@")
    return f"{text}, by {file}.csv" if file else text


def _choose_first_quantizer(choices: list[ProfileSettings]) -> None:
    """Where the chosen text has no profile with the chosen quantizer, take one that it has."""
    if state.settings() not in choices:
        text = st.session_state["calibration"]
        state.set_settings(next(s for s in choices if s.calibration == text))


# --- the way to one -------------------------------------------------------------------------


def follow(view: ExploreView) -> None:
    """While the profile isn't whole: say how far measuring is, or offer to measure."""
    argv = profile_argv(view)
    job = jobs_panel.find(disk.jobs_folder(view.ctx.store), argv)
    if job is not None and job.active:
        with view.header:
            jobs_panel.follow(job, partial(_render_progress_headline, view))
        return
    with view.header:
        label = _render_missing(view)
        reason = incompatibility_reason(view.settings.quantizer, {}, view.settings.axis)
        if reason:
            st.caption(words.escape(reason))
        if st.button(
            label,
            type="primary",
            icon=":material/play_arrow:",
            key="profile",
            disabled=bool(reason),
        ):
            jobs.start(disk.jobs_folder(view.ctx.store), argv)
            st.rerun()
        if job is not None and job.state != "done":
            jobs_panel.follow(job)


def profile_argv(view: ExploreView, metrics: Sequence[str] = ()) -> list[str]:
    """The command that measures the profile, and these metrics beside the usual ones."""
    argv = ["profile", *arguments.model_arguments(view.ctx.source, view.ctx.device)]
    argv += [*arguments.profile_arguments(view.settings), "--db", str(view.ctx.store.path)]
    return argv + [word for metric in metrics for word in ("--metric", metric)]


def _render_progress_headline(view: ExploreView, job: Job) -> None:
    """The first line while a job measures; the page is drawn anew when more of it is there."""
    current = cached.profile(view.ctx.store, view.info, view.settings, view.ctx.device)
    if missing_metrics(current) != view.lacking:
        st.rerun(scope="app")
    share = f", {100 * job.fraction:.0f} %" if job.total > 1 else ""
    left = f"; about {words.seconds(job.eta)} left" if job.eta else ""
    if view.profile is None and job.stage == "weights":
        headline(
            f"Measuring {words.metric_labels(weight_metrics())}{share}{left}.",
            "They are shown as soon as they are available; activation sensitivity follows.",
        )
        return
    if view.profile is None:
        jobs_panel.render_headline(job)
        return
    names = words.metric_labels(view.profile.metrics)
    headline(
        f"Measuring activation sensitivity{share}{left}.",
        f"{names[0].upper()}{names[1:]} are available already.",
    )


def _render_missing(view: ExploreView) -> str:
    """The first line where nothing measures what is lacking, and what its button says."""
    name = view.ctx.source.name
    if view.profile is None:
        headline(
            f"{name} has not been profiled with these settings.",
            f"One pass over {view.info.layers} layers measures kurtosis, weight error and "
            f"activation sensitivity of {len(view.info.matrices)} weight matrices at "
            f"{words.plural(len(view.settings.configs), 'configuration')}.",
        )
        return "Profile"
    headline(
        f"The profile of {name} is incomplete.",
        f"It lacks {words.metric_labels(view.lacking)}: measuring was interrupted. "
        "Existing scores are kept; only the rest will be measured.",
    )
    return "Measure the rest"
