"""Which profile the Explore page shows, the way to one, and how far measuring it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from streamlit.delta_generator import DeltaGenerator

from lsq_core import disk, jobs
from lsq_core.bits import METADATA_FORMATS
from lsq_core.corpus.registry import BUILT_IN
from lsq_core.jobs import Job, arguments
from lsq_core.model.info import ModelInfo
from lsq_core.planning.problem import Problem
from lsq_core.profiling.profile import Profile, missing_metrics
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.quantization.registry import MATRIX_WISE, about, refusal
from lsq_core.store.store import Store
from lsq_core.ui import cached, jobs_panel, state, words
from lsq_core.ui.page import Here, headline
from lsq_core.ui.safe import st

#: Metrics as a sentence names them.
NAMES = {
    "kurtosis": "kurtosis",
    "weight_error": "weight error",
    "sensitivity": "sensitivity by part",
    "sensitivity_module": "sensitivity by module",
    "loss_impact": "loss impact",
    "gram_diagonal": "Gram diagonal",
    "fisher_diagonal": "diagonal Fisher",
}


@dataclass(frozen=True, eq=False)
class Seen:
    """What a view of the page draws: the model and its profile, and where to draw.

    ``first`` is the place of the first line, ``row`` that of a view's own controls. While the
    profile is being measured, or is not whole, the first line says so and a view's own comes
    below it.
    """

    here: Here
    info: ModelInfo
    settings: ProfileSettings
    found: Profile | None
    first: DeltaGenerator
    row: DeltaGenerator

    @property
    def problem(self) -> Problem:
        """What planners see."""
        return cached.problem(self.info, self.found)

    @property
    def published(self) -> bool:
        """Whether the model's measurements were published, and its weights aren't here."""
        return cached.is_published(self.info)

    @property
    def lacking(self) -> list[str]:
        """The usual metrics that a measured profile hasn't yet."""
        return [] if self.published else missing_metrics(self.found)

    def say(self, text: str, under: str = "") -> None:
        """A view's first line, and in small print why."""
        with self.first:
            if self.found is not None and self.lacking:
                st.markdown(f"**{words.literal(text)}**")
                st.caption(under)
            else:
                headline(text, under)


# --- which one ------------------------------------------------------------------------------


def profile_bar(store: Store, info: ModelInfo) -> ProfileSettings:
    """The chosen profile's settings."""
    return published_bar(store, info) if cached.is_published(info) else settings_bar()


def settings_bar() -> ProfileSettings:
    """The settings of a profile, in one row."""
    columns = st.columns([2, 1.2, 1.2, 1.2, 0.8], vertical_alignment="bottom")
    with columns[0]:
        text = st.session_state["calibration"]
        st.selectbox(
            "Calibration text",
            list(dict.fromkeys([*BUILT_IN, text])),
            key="calibration",
            accept_new_options=True,
            persist_state="session",
            help="\n".join(f"- **{name}**: {about}" for name, about in BUILT_IN.items())
            + "\n- or **hf:org/name**, or a text file's path",
        )
    chosen = [
        ("Quantizer", "profile_quantizer", list(MATRIX_WISE)),
        ("Grouping axis", "axis", [1, 0]),
        ("Metadata", "metadata", list(METADATA_FORMATS)),
    ]
    for column, (label, key, options) in zip(columns[1:], chosen, strict=False):
        column.selectbox(label, options, key=key, persist_state="session")
    with columns[4], st.popover("More", width="stretch"):
        st.number_input("Calibration texts", 1, 4096, key="samples", persist_state="session")
        st.number_input("Tokens of a block", 16, 8192, key="block_tokens", persist_state="session")
    return state.settings()


def published_bar(store: Store, info: ModelInfo) -> ProfileSettings:
    """A choice among a published model's profiles: only what is there can be chosen."""
    there = list(cached.published_settings(store, info))
    texts = list(dict.fromkeys(settings.calibration for settings in there))
    if state.settings() not in there:
        state.set_settings(there[0])
    columns = st.columns([2, 1.2, 3.2], vertical_alignment="bottom")
    with columns[0]:
        text = st.selectbox(
            "Calibration text",
            texts,
            key="calibration",
            format_func=_published_text,
            on_change=_choose_first_quantizer,
            args=(there,),
            persist_state="session",
        )
    with columns[1]:
        st.selectbox(
            "Quantizer",
            [settings.quantizer for settings in there if settings.calibration == text],
            key="profile_quantizer",
            persist_state="session",
        )
    columns[2].caption(
        f"{words.plural(len(there), 'published profile')}; grouped along axis {there[0].axis}, "
        f"{there[0].metadata.replace('bit', '-bit')} metadata."
    )
    return state.settings()


def _published_text(name: str) -> str:
    """``c4@variant-sensi`` as the text and the file that disagrees with the reference."""
    text, _, file = name.partition("@")
    return f"{text}, by {file}.csv" if file else text


def _choose_first_quantizer(there: list[ProfileSettings]) -> None:
    """Where the chosen text has no profile with the chosen quantizer, take one that it has."""
    if state.settings() not in there:
        text = st.session_state["calibration"]
        state.set_settings(next(s for s in there if s.calibration == text))


# --- the way to one -------------------------------------------------------------------------


def follow(seen: Seen) -> None:
    """While the profile isn't whole: say how far measuring is, or offer to measure."""
    words_of = job_words(seen)
    job = jobs_panel.find(disk.jobs_folder(seen.here.store), words_of)
    if job is not None and job.active:
        with seen.first:
            jobs_panel.follow(job, partial(_say_how_far, seen))
        return
    with seen.first:
        label = _say_what_is_missing(seen)
        reason = refusal(seen.settings.quantizer, {}, seen.settings.axis)
        if reason:
            st.caption(words.literal(reason))
        if st.button(
            label,
            type="primary",
            icon=":material/play_arrow:",
            key="profile",
            disabled=bool(reason),
        ):
            jobs.start(disk.jobs_folder(seen.here.store), words_of)
            st.rerun()
        if job is not None and job.state != "done":
            jobs_panel.follow(job)


def job_words(seen: Seen, metrics: Sequence[str] = ()) -> list[str]:
    """The command that measures the profile, and these metrics beside the usual ones."""
    found = ["profile", *arguments.model_arguments(seen.here.source, seen.here.device)]
    found += [*arguments.profile_arguments(seen.settings), "--db", str(seen.here.store.path)]
    return found + [word for metric in metrics for word in ("--metric", metric)]


def _say_how_far(seen: Seen, job: Job) -> None:
    """The first line while a job measures; the page is drawn anew when more of it is there."""
    now = cached.profile(seen.here.store, seen.info, seen.settings, seen.here.device)
    if missing_metrics(now) != seen.lacking:
        st.rerun(scope="app")
    share = f", {100 * job.fraction:.0f} %" if job.total > 1 else ""
    left = f"; about {words.seconds(job.eta)} left" if job.eta else ""
    if seen.found is None and job.stage == "weights":
        headline(
            f"Kurtosis and weight error are being measured{share}{left}.",
            "They are shown as soon as they are here; activation sensitivity follows.",
        )
        return
    if seen.found is None:
        jobs_panel.say(job)
        return
    names = words.listed([NAMES[metric] for metric in seen.found.metrics])
    headline(
        f"Activation sensitivity is being measured{share}{left}.",
        f"{names[0].upper()}{names[1:]} are here already.",
    )


def _say_what_is_missing(seen: Seen) -> str:
    """The first line where nothing measures what is lacking, and what its button says."""
    name = seen.here.source.name
    if seen.found is None:
        headline(
            f"{name} has not been profiled with these settings.",
            f"One pass over {seen.info.layers} layers measures kurtosis, weight error and "
            f"activation sensitivity of {len(seen.info.matrices)} weight matrices at "
            f"{words.plural(len(about(seen.settings.quantizer).configs), 'stop')}.",
        )
        return "Profile"
    headline(
        f"The profile of {name} is not whole.",
        f"It lacks {words.listed([NAMES[m] for m in seen.lacking])}: measuring was cut short. "
        "What is here stays, and only the rest is measured.",
    )
    return "Measure the rest"
