"""The way through, step by step: model, profile, plan, quantized model, run; each one kept.

The app's jobs, the command line and the tests all call :class:`Workbench`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np

from lsq_core import predict
from lsq_core.clock import Clock, timed
from lsq_core.config import (
    DETECTION_CONFIG,
    GIB,
    LADDER,
    QuantConfig,
    format_bytes,
    nominal_bytes,
    of_matrix,
    stop_index,
)
from lsq_core.corpus import corpus_identity, load_corpus, token_stream
from lsq_core.errors import InputError, LsqError
from lsq_core.identity import identity_of, known_info, under_name
from lsq_core.jsontext import json_text
from lsq_core.model import ModelInfo, ModelSource, described_demo, find_model
from lsq_core.plan import (
    PLANNERS,
    Plan,
    PlanRequest,
    Problem,
    get_planner,
    make_frontier,
    make_plan,
)
from lsq_core.plan.high_impact import impact_of
from lsq_core.plan.pins import with_pins
from lsq_core.plan.problem import TOLERANCE, Impact
from lsq_core.profile import (
    LOSS_PROBE,
    METRICS,
    WEIGHT_METRICS,
    Profile,
    ProfileSettings,
    missing_metrics,
)
from lsq_core.provenance import (
    Place,
    device_kind,
    machine,
    profile_dependencies,
    run_dependencies,
    versions,
)
from lsq_core.quantize import (
    about,
    check_choice,
    computes_with,
    mixed_rows_refusal,
    packages,
    refusal,
)
from lsq_core.quantize.manifest import EVALUATED, RUN, is_quantized_folder, read_manifest
from lsq_core.store import PUBLISHED, InteractionKind, Store, new_id
from lsq_core.targets import check_folder_target

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lsq_core.corpus import TokenStream
    from lsq_core.evaluate import Evaluation, Pair
    from lsq_core.load import LoadedModel
    from lsq_core.plan.frontier import Frontier
    from lsq_core.predict import Predictor
    from lsq_core.quantize.artifact import QuantizedModel
    from lsq_core.quantize.remembered import Remembered

#: How the profiles were measured that published plans were made from (method §2).
PUBLISHED_SETTINGS = ProfileSettings(axis=0, calibration="pileval")

#: Bytes of quantized matrices that are kept for the plans to come, unless one says otherwise.
REMEMBERED_BYTES = GIB

#: The settings of a profile that name its calibration text, and how much of it is read.
_CALIBRATION = ("calibration", "samples", "block_tokens", "seed")

#: Why a plan of mixed rows has no predicted perplexity.
NOT_PREDICTED = (
    "Perplexity is predicted from errors at the ladder's stops, and there are none of matrices "
    "whose rows have different bits."
)

#: Called with a stage, how much of it is done, of how much, and what is being done.
Report = Callable[[str, int, int, str], None]


def silent(stage: str, done: int, total: int, message: str) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class EvaluationRequest:
    """What to evaluate on: a corpus, a protocol, and at most so many tokens (None: all)."""

    corpus: str = "stdlib"
    protocol: str = "strided"
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        from lsq_core.evaluate import MIN_PREDICTED, PROTOCOLS

        if self.protocol not in PROTOCOLS:
            raise InputError(f"'{self.protocol}' is not a protocol; choose strided or blocks.")
        if self.max_tokens is not None and self.max_tokens <= MIN_PREDICTED:
            raise InputError(
                f"max-tokens has to be at least {MIN_PREDICTED + 1}, and {self.max_tokens} were "
                f"asked for: a perplexity needs {MIN_PREDICTED} predicted tokens."
            )


@dataclass(frozen=True, eq=False)
class Quantized:
    """A model quantized by a plan: the run that it is, and the row that the store keeps of it."""

    run: str
    model: nn.Module
    plan: Plan
    profile: Profile | None
    row: dict
    plan_name: str = ""


@dataclass(eq=False)
class Workbench:
    """One model with what is known of it, loaded when something first needs its weights.

    A job gives a folder to keep in what it has so far: one that was cut off and begins again
    finds it there. Matrices quantized for one plan serve the next ones, up to
    ``remembered_bytes`` of them, on the device that the model is on.
    """

    source: ModelSource
    store: Store
    device: str = "auto"
    dtype: str = "auto"
    report: Report = silent
    folder_to_keep: Path | None = None
    remembered_bytes: int = REMEMBERED_BYTES
    clock: Clock = field(default_factory=Clock, init=False)
    _streams: dict[EvaluationRequest, TokenStream] = field(default_factory=dict, init=False)
    _problems: dict[object, Problem] = field(default_factory=dict, init=False)

    # --- the model --------------------------------------------------------------------------

    @cached_property
    def published(self) -> ModelInfo | None:
        """The model, where its measurements were published and its weights are not here."""
        return find_published(self.source, self.store)

    @property
    def default_settings(self) -> ProfileSettings:
        """The profile settings that hold where a person gives none."""
        return PUBLISHED_SETTINGS if self.published else ProfileSettings()

    def _need_weights(self) -> None:
        if self.published:
            raise InputError(
                f"{self.published.source} has published measurements but no weights, so it can be "
                "planned for and no more; give a model folder or a Hugging Face id."
            )

    @cached_property
    @timed("load")
    def folder(self) -> Path:
        """The model's local folder; a remote one is fetched."""
        self._need_weights()
        if not self.source.is_local:
            self.report("load", 0, 1, f"fetching {self.source.name}")
        return find_model(self.source)

    @cached_property
    def outline(self) -> ModelInfo:
        """What the model's config alone says of it, by which what cannot be is refused.

        Of a remote model that isn't here nothing but its config is fetched.
        """
        if self.published or self.source.is_local or "info" in self.__dict__:
            return self.info
        from lsq_core.load import inspect_model

        return known_info(self.source, self.store) or inspect_model(self.source)

    @cached_property
    @timed("load")
    def info(self) -> ModelInfo:
        """What is known of the model, whose files are all here; a remote one is fetched."""
        if self.published:
            return self.published
        identity = identity_of(self.folder, self.source.trust_remote_code)
        info = self.store.model(identity.fingerprint) or described_demo(self.source)
        if info is None:
            from lsq_core.load import inspect_model

            info = inspect_model(self.source)
        info = replace(under_name(info, self.source, identity), fingerprint=identity.fingerprint)
        self.store.save_model(info)
        return info

    @cached_property
    @timed("load")
    def loaded(self) -> LoadedModel:
        """The model with its weights."""
        self._need_weights()
        from lsq_core.load import load_model

        self.report("load", 0, 1, f"loading {self.source.name}")
        with in_a_sentence(self.device):
            loaded = load_model(self.source, self.device, self.dtype)
        self.store.save_model(loaded.info)
        self.report("load", 1, 1, f"loaded on {loaded.device} in {loaded.dtype}")
        self._report_notes(loaded.info)
        return loaded

    @cached_property
    @timed("load")
    def streamed(self) -> LoadedModel:
        """The model with its weights left in their files; loaded where that can't be."""
        self._need_weights()
        from lsq_core.stream import NotStreamable, open_streamed

        try:
            with in_a_sentence(self.device):
                streamed = open_streamed(self.source, self.device, self.dtype)
        except NotStreamable as reason:
            self.report("load", 0, 1, f"{reason}, so the whole model is loaded")
            return self.loaded
        self.store.save_model(streamed.info)
        where = f"on {streamed.device} in {streamed.dtype}"
        self.report("load", 1, 1, f"read one decoder block at a time, {where}")
        self._report_notes(streamed.info)
        return streamed

    def _report_notes(self, info: ModelInfo) -> None:
        for note in info.notes:
            self.report("note", 0, 1, note)

    @cached_property
    @timed("load")
    def place(self) -> dict[str, str]:
        """The device and the dtype that the model computes on and in; needs no weights."""
        from lsq_core.load import model_config, pick_device, pick_dtype

        device, config = pick_device(self.device), model_config(self.source, self.folder)
        dtype = str(pick_dtype(self.dtype, device, config)).removeprefix("torch.")
        return {"device": str(device), "dtype": dtype}

    @cached_property
    @timed("load")
    def tokenizer(self) -> object:
        """The model's tokenizer; needs no weights."""
        from lsq_core.load import load_tokenizer

        return load_tokenizer(self.source, self.folder)

    @timed("read text")
    def stream(self, request: EvaluationRequest) -> TokenStream:
        """The tokens that a request evaluates on, remembered."""
        if request not in self._streams:
            self.report("evaluate", 0, 1, f"reading {request.corpus}")
            self._streams[request] = stream_of(request, self.tokenizer)
        return self._streams[request]

    @cached_property
    def remembered(self) -> Remembered:
        """The matrices quantized so far."""
        from lsq_core.quantize.remembered import Remembered

        return Remembered(self.remembered_bytes)

    # --- profile ----------------------------------------------------------------------------

    def profile_key(self, settings: ProfileSettings) -> str:
        """The identity of this model's profile under these settings."""
        place = place_of(self.info, self.device, self.dtype)
        return find_profile_key(self.store, self.info, settings, place)

    def find_profile(self, settings: ProfileSettings) -> Profile | None:
        """The profile if it was measured before, or published."""
        if self.published:
            kept = self.store.profiles(self.published.fingerprint)
            same = [json.loads(text) == asdict(settings) for text in kept["settings"]]
            return self.store.profile(kept["id"][same.index(True)]) if any(same) else None
        return self.store.profile(self.profile_key(settings))

    @timed("profile")
    def profile(self, settings: ProfileSettings, metrics: Sequence[str] = ()) -> Profile:
        """The profile, with the usual metrics and these: found, or measured and kept.

        What the weights alone tell is measured and kept first, so that it can be looked at while
        the rest is measured. Of a profile that is there only the metrics that it lacks are
        measured, so one that was cut short is completed; a published one stays as it is.

        Raises
        ------
        InputError, LsqError
            When a metric is unknown, the model or the calibration corpus cannot be had, or a
            weight is not finite.
        """
        unknown = [metric for metric in metrics if metric not in METRICS]
        if unknown:
            raise InputError(f"'{unknown[0]}' is not a metric; choose one of {', '.join(METRICS)}.")
        known = about(settings.quantizer)
        if "loss_impact" in metrics and LOSS_PROBE not in known.configs:
            raise InputError(
                f"Loss impact is measured at {LOSS_PROBE.name}, which {known.title} doesn't have; "
                "plan with a profile by hqq or rtn (--profile-quantizer)."
            )
        found = self.find_profile(settings)
        if self.published:
            if found is None:
                raise InputError(_no_such_profile(self.published, settings, self.store))
            return found
        missing = missing_metrics(found, metrics)
        if not missing:
            self.report("profile", 1, 1, "found in the store")
            return found
        alone = [metric for metric in missing if metric in WEIGHT_METRICS]
        for stage, part in (
            ("weights", alone),
            ("profile", [metric for metric in missing if metric not in alone]),
        ):
            if part:
                self._keep(self._measure(settings, part, stage))
        return self.find_profile(settings)

    def _keep(self, measured: Profile) -> None:
        """Add metrics to the profile, or keep them as a new one."""
        self.store.keep_profile(measured)
        names = ", ".join(measured.metrics)
        self.report("store", 1, 1, f"{names} kept in profile {measured.id}")

    def _measure(self, settings: ProfileSettings, metrics: Sequence[str], stage: str) -> Profile:
        """A profile of these metrics alone, measured now."""
        from lsq_core.profile.measure import make_metrics, measure_profile

        whole = "loaded" in self.__dict__ or any(m.needs_whole for m in make_metrics(metrics))
        loaded = self.loaded if whole else self.streamed
        with in_a_sentence(loaded.device):
            return measure_profile(
                loaded,
                settings,
                self.profile_key(settings),
                lambda done, total, message: self.report(stage, done, total, message),
                metrics,
            )

    # --- rows -------------------------------------------------------------------------------

    @timed("profile")
    def impact(self, request: PlanRequest, settings: ProfileSettings) -> Impact:
        """Row scores, and the interactions that a request reads: found, or measured and kept.

        Each block is kept as it is measured, so that what was cut off goes on from there.

        Raises
        ------
        InputError, LsqError
            As :meth:`profile`; and when groups don't fit into the rows of some matrix.
        """
        if self.published:
            raise InputError(
                f"{self.published.source} was published without the gradients of its weights, so "
                "high-impact rows cannot be planned for it."
            )
        options = get_planner(request.method).options(request)
        Problem(self.info.matrices).with_options(options).check_options()
        key = self.profile_key(settings)
        scores = self.store.row_scores(key) or self._measure_row_scores(settings, key)
        if request.ratios == "uniform":
            kept = self.store.interactions(key, kind_of(request))
            return impact_of(self.info.matrices, scores, kept)
        self._measure_interactions(request, settings, key, scores)
        return known_impact(self.info, self.store, key, request)

    def _calibration(
        self, settings: ProfileSettings, loss: str | None = None
    ) -> tuple[Tensor, dict]:
        """Calibration tokens (sequences, tokens), few of them for a loss, and where from."""
        import torch

        from lsq_core.profile.interactions import few_tokens
        from lsq_core.profile.measure import calibration_of

        blocks = calibration_of(self.loaded, settings)
        ids = torch.from_numpy(blocks.ids).to(self.loaded.device)
        ids = ids if loss is None else few_tokens(ids, loss)
        told = {
            "corpus": blocks.corpus,
            "corpus_source": blocks.source,
            "corpus_sha256": blocks.sha256,
            "tokens": ids.numel(),
            "settings": asdict(settings),
            "fingerprint": self.info.fingerprint,
            "device": self.loaded.device,
            "machine": machine(self.loaded.device),
            "dtype": self.loaded.dtype,
            "versions": versions(),
        }
        return ids, told

    def _measure_row_scores(self, settings: ProfileSettings, key: str) -> dict[str, np.ndarray]:
        from lsq_core.profile.rows import measure_row_scores

        began = time.perf_counter()
        loaded, folder = self.loaded, self.folder_to_keep
        ids, told = self._calibration(settings)
        with in_a_sentence(loaded.device):
            scores = measure_row_scores(
                loaded,
                ids,
                lambda done, total, message: self.report("rows", done, total, message),
                None if folder is None else folder / f"row-scores-{key}.npz",
            )
        self.store.save_row_scores(key, scores, told | {"seconds": time.perf_counter() - began})
        return scores

    def _measure_interactions(
        self,
        request: PlanRequest,
        settings: ProfileSettings,
        key: str,
        scores: dict[str, np.ndarray],
    ) -> None:
        kind = kind_of(request)
        known = self.store.interactions(key, kind)
        if len(known) == len({matrix.layer for matrix in self.info.matrices}):
            return
        from lsq_core.profile.interactions import measure_interactions

        loaded = self.loaded
        ids, told = self._calibration(settings, kind.loss)
        with in_a_sentence(loaded.device):
            for block in measure_interactions(
                loaded,
                ids,
                scores,
                get_planner(request.method).options(request),
                kind.loss,
                axis=settings.axis,
                metadata=settings.metadata,
                known=list(known),
                progress=lambda done, total, message: self.report("rows", done, total, message),
            ):
                self.store.save_interactions(
                    key, kind, block.layer, block.units, block.matrix, told
                )

    # --- plan -------------------------------------------------------------------------------

    @timed("plan")
    def plan(self, request: PlanRequest, settings: ProfileSettings) -> tuple[Plan, Profile | None]:
        """A plan, and the profile it was made from where the method needs one.

        Raises
        ------
        InputError
            When the request cannot be met; see :func:`lsq_core.plan.make_plan`.
        """
        planner = get_planner(request.method)
        # A budget out of reach is told before anything is measured, or weights are fetched.
        options = planner.options(request)
        request.budget_for(Problem(self.outline.matrices).with_options(options))
        profile = self.profile(settings, planner.metrics) if planner.metrics else None
        problem = self._problem(profile).with_options(options)
        if planner.reads_rows:
            problem = replace(problem, impact=self.impact(request, settings))
        self.report("plan", 0, 1, planner.title)
        plan = plan_for(self.info, problem, request, settings)
        self.report("plan", 1, 1, f"{plan.bits_per_param:.3f} bits per parameter")
        return plan, profile

    def _problem(self, profile: Profile | None) -> Problem:
        """What planners see of a profile, remembered: a sweep plans from one again and again."""
        key = (profile.id, profile.metrics) if profile else None
        if key not in self._problems:
            self._problems[key] = problem_of(self.info, profile)
        return self._problems[key]

    # --- prediction -------------------------------------------------------------------------

    def predictor(
        self,
        problem: Problem,
        settings: ProfileSettings,
        corpus: str | None = None,
        protocol: str | None = None,
    ) -> Predictor:
        """What the runs so far tell of this model's perplexity on a corpus by a protocol.

        Where neither is given, on those with the most runs. ``problem`` is of a profile of
        ``settings``, and the runs are those by its quantizer, axis and metadata.

        Raises
        ------
        InputError
            When there are too few runs, or the profile lacks what predictions need.
        """
        points = predict.measured_points(
            self.store,
            self.info.fingerprint,
            problem,
            quantizer=settings.quantizer,
            axis=settings.axis,
            metadata=settings.metadata,
            corpus=corpus,
            protocol=protocol,
        )
        return predict.fit(points)

    def predicted(
        self,
        plan: Plan,
        settings: ProfileSettings,
        corpus: str | None = None,
        protocol: str | None = None,
    ) -> dict:
        """The plan's predicted perplexity and band by name, or only the ``reason`` for none.

        Nothing is measured for it.
        """
        settings = replace(settings, axis=plan.axis, metadata=plan.metadata)
        if plan.rows:
            return {"reason": NOT_PREDICTED}
        try:
            profile = self.find_profile(settings)
            if profile is None:
                return {"reason": "This model has no profile under these settings yet."}
            problem = problem_of(self.info, profile)
            predictor = self.predictor(problem, settings, corpus, protocol)
        except InputError as error:
            return {"reason": str(error)}
        return predictor.summary(problem, np.array([LADDER.index(c) for c in plan.configs]))

    def request_within(
        self,
        request: PlanRequest,
        settings: ProfileSettings,
        max_loss: float,
        corpus: str | None = None,
        protocol: str | None = None,
    ) -> PlanRequest:
        """The request with the least budget whose plan is predicted within a relative loss.

        Raises
        ------
        InputError
            When no plan is, there are too few runs to predict from, or the request is wrong.
        """
        planner = get_planner(request.method)
        if planner.reads_rows:
            raise InputError(f"{NOT_PREDICTED} Give a budget in place of max-loss.")
        profile = self.profile(settings, [*predict.METRICS, *planner.metrics])
        problem = problem_of(self.info, profile)
        check_metrics(self.info, problem, request)
        pinned = with_pins(problem, request.pins)
        predictor = self.predictor(problem, settings, corpus, protocol)
        frontier = make_frontier(pinned, request)
        budget = predict.smallest_within(frontier, predictor, pinned, max_loss)
        # 17 digits write any float exactly, so the same plan is found again.
        return replace(request, budget=f"{budget:.17g}B")

    # --- run --------------------------------------------------------------------------------

    def run(
        self,
        plan: Plan,
        profile: Profile | None,
        quantizer: str,
        request: EvaluationRequest,
        save: Path | None = None,
        plan_name: str = "",
        settings: ProfileSettings | None = None,
    ) -> dict:
        """Quantize by a plan, evaluate beside full precision, keep everything.

        ``settings`` name the text for a quantizer that is calibrated. Returns the plan's JSON
        with ``perplexity``, ``perplexity_full``, ``measured_bytes``, ``kl``, ``top1`` and times
        added.

        Raises
        ------
        InputError, LsqError
            When an input is wrong, the device has too little memory, or the disk is full.
        """
        made = self.quantize(plan, profile, quantizer, save, plan_name, settings=settings)
        [outcome] = self.measure([made], [request])
        return outcome

    def quantize(
        self,
        plan: Plan,
        profile: Profile | None,
        quantizer: str,
        save: Path | None = None,
        plan_name: str = "",
        run: str | None = None,
        settings: ProfileSettings | None = None,
    ) -> Quantized:
        """Quantize by a plan, and save the model where that is asked for.

        ``run`` is that of a run kept before, to which more evaluations are to be added;
        ``settings`` name the text for a quantizer that is calibrated.

        Raises
        ------
        InputError, LsqError
            When an input is wrong, the device has too little memory, or the disk is full.
        """
        check_choice(quantizer, plan.choice, plan.axis)
        plan = by_quantizer(plan, quantizer, settings or self.default_settings)
        run = run or self._run_id(plan, quantizer)
        saved = save is not None and self._is_saved(save, run)
        if save is not None and not saved:
            check_folder_target(save)
        quantized, seconds = self._quantize(plan)
        if save is not None and not saved:
            self._save(quantized, plan, profile, run, save)
        row = self._run_row(plan, quantized, seconds, save)
        return Quantized(run, quantized, plan, profile, row, plan_name)

    def measure(
        self, made: Sequence[Quantized], requests: Sequence[EvaluationRequest]
    ) -> Iterator[dict]:
        """Evaluate quantized models beside full precision, in one pass, and keep their runs.

        Yields what :meth:`run` returns: of each model on the first text, as soon as it is read,
        then of each on the next one.
        """
        models = [one.model for one in made]
        identities = [[one.run, plan_identity(one.plan), one.row["quantizer"]] for one in made]
        found = self.evaluate(models, requests, self.loaded.model, identities)
        for pairs, seconds in self._timed_passes(found):
            for one, (own, full) in zip(made, pairs, strict=True):
                yield self._keep_run(one, own, full, seconds)

    def _timed_passes(
        self, found: Iterator[list[Pair]]
    ) -> Iterator[tuple[list[Pair], dict[str, float]]]:
        """Evaluations with the seconds by stage so far, of which full precision's are apart."""
        while True:
            began = self.clock.seconds.get("evaluate", 0.0)
            with self.clock.stage("evaluate"):
                pairs = next(found, None)
            if pairs is None:
                return
            taken = self.clock.seconds["evaluate"] - began
            # What is read before a text is done is of the next one too, so it may be less.
            full = min(taken, pairs[0][1].seconds) if pairs[0][1] else 0.0
            self.clock.add("evaluate", -full)
            self.clock.add("full precision", full)
            yield pairs, dict(self.clock.seconds)

    @timed("store")
    def _keep_run(
        self, made: Quantized, own: Evaluation, full: Evaluation, seconds: dict[str, float]
    ) -> dict:
        profile = made.profile.id if made.profile else None
        own = replace(own, times=seconds | {"whole": self.clock.total})
        with self.store.held():
            if "plan" not in made.row:
                made.row["plan"] = self.store.plan_of(made.run) or self.store.save_plan(
                    made.plan, self.info.fingerprint, profile, made.plan_name
                )
            self.store.save_full_precision(self.info.fingerprint, full)
            self.store.save_run(made.run, made.row, [own])
        self.report("store", 1, 1, f"kept as run {made.run}")
        return made.plan.to_json() | {"profile": profile} | _outcome(made.run, made.row, own, full)

    def _run_id(self, plan: Plan, quantizer: str) -> str:
        """A new run's id; a job that begins again gives the same plan the same id again."""
        if self.folder_to_keep is None:
            return new_id()
        return _digest(self.folder_to_keep.name, plan_identity(plan), quantizer)[:12]

    def _is_saved(self, save: Path, run: str) -> bool:
        """Whether this very run saved its model here before it was cut off."""
        return is_quantized_folder(save) and read_manifest(save, RUN)["run"] == run

    @timed("quantize")
    def _quantize(self, plan: Plan) -> tuple[nn.Module, float]:
        """The quantized model and the seconds it takes, whatever of it was made before."""
        from lsq_core.quantize import get_quantizer
        from lsq_core.quantize.apply import measured_bytes

        loaded = self.loaded
        began, saved = time.perf_counter(), self.remembered.saved_seconds
        with in_a_sentence(loaded.device):
            quantized = get_quantizer(plan.quantizer).quantize_model(
                loaded,
                plan.choice,
                _settings_of(plan),
                lambda done, total, name: self.report("quantize", done, total, name),
                rows=plan.rows,
                remembered=self.remembered,
                folder=self._folder_of(plan),
            )
        measured = measured_bytes(quantized)
        if measured != plan.planned_bytes:
            raise LsqError(
                f"The quantized model takes {measured} bytes and the plan promised "
                f"{plan.planned_bytes}; this is a defect of LSQ Explorer, please report it."
            )
        seconds = time.perf_counter() - began + self.remembered.saved_seconds - saved
        return quantized, seconds

    def _folder_of(self, plan: Plan) -> Path | None:
        """Where a quantizer keeps what it has of this plan so far, where there is a folder."""
        if self.folder_to_keep is None:
            return None
        made_by = run_dependencies(versions(), computes_with(plan.quantizer))
        made_from = (*plan_identity(plan), plan.quantizer, self.place, made_by)
        return self.folder_to_keep / f"quantized-{_digest(self.info.fingerprint, *made_from)[:16]}"

    @timed("save")
    def _save(
        self,
        quantized: nn.Module,
        plan: Plan,
        profile: Profile | None,
        run_id: str,
        folder: Path,
    ) -> None:
        from lsq_core.quantize.artifact import save_quantized

        self.report("save", 0, 1, f"saving to {folder}")
        manifest = plan.to_json() | {
            "run": run_id,
            "profile": profile.id if profile else None,
            "profile_provenance": profile.provenance if profile else None,
            "source": self.source.name,
            "revision": self.source.revision,
            "fingerprint": self.info.fingerprint,
            "device": self.loaded.device,
            "dtype": self.loaded.dtype,
            "versions": versions(*packages([plan.quantizer])),
        }
        size = save_quantized(
            quantized, self.loaded.tokenizer, manifest, folder, self.loaded.folder
        )
        self.report("save", 1, 1, f"{format_bytes(size)} on disk")

    def _run_row(
        self,
        plan: Plan,
        quantized: nn.Module,
        seconds: float,
        save: Path | None,
    ) -> dict:
        from lsq_core.quantize.apply import measured_bytes

        measured = measured_bytes(quantized)
        return {
            "fingerprint": self.info.fingerprint,
            "method": plan.method,
            "quantizer": plan.quantizer,
            "measured_bytes": measured,
            "model_bytes": measured + plan.other_bytes,
            "quantize_seconds": seconds,
            "saved_to": str(save) if save else None,
            "device": self.loaded.device,
            "machine": machine(self.loaded.device),
            "dtype": self.loaded.dtype,
            "seed": plan.request.seed,
            "versions": json_text(versions(*packages([plan.quantizer]))),
        }

    def evaluate(
        self,
        models: Sequence[nn.Module],
        requests: Sequence[EvaluationRequest],
        reference: nn.Module | None = None,
        identities: Sequence[Sequence[object]] | None = None,
    ) -> Iterator[list[Pair]]:
        """Evaluate models with this one's tokenizer, beside a reference where there is one.

        ``identities`` tell a model each from others that are evaluated in the same folder. Yields
        as :func:`lsq_core.evaluate.evaluate_together`.
        """
        identities = identities or [()] * len(models)
        return evaluate_on(
            models,
            self.tokenizer,
            self.info.context,
            requests,
            [self.stream(request) for request in requests],
            reference=reference,
            where=self.place,
            report=self.report,
            checkpoints=[[self._checkpoint(r, i) for i in identities] for r in requests],
        )

    def _checkpoint(self, request: EvaluationRequest, identity: Sequence[object]) -> Path | None:
        """The file for what was scored so far of a model on a text, where there is a folder."""
        if self.folder_to_keep is None:
            return None
        made_by = run_dependencies(versions())
        asked = (self.stream(request).sha256, asdict(request), self.place, made_by)
        # A file's form is part of its name: an older version may have been cut off.
        name = _digest("by window", self.info.fingerprint, *identity, *asked)[:16]
        return self.folder_to_keep / f"evaluation-{name}.npz"

    def evaluate_full(self, request: EvaluationRequest) -> dict:
        """Evaluate the model as it is, and keep the result."""
        [[(evaluation, _)]] = self.evaluate([self.loaded.model], [request])
        self.store.save_full_precision(self.info.fingerprint, evaluation)
        return {"model": self.source.name, "fingerprint": self.info.fingerprint} | _figures(
            evaluation
        )


def place_of(info: ModelInfo, device: str = "auto", dtype: str = "auto") -> Place:
    """Where a model computes when it is asked for on a device in a dtype, as loading has it.

    torch is imported only where there may be a GPU.
    """
    if device == "auto" and not _may_have_gpu():
        device = "cpu"
    if device_kind(device) == "cpu" and dtype == "auto":
        return Place("cpu", "float32")
    import torch

    from lsq_core.load import pick_device, pick_dtype

    target, text = pick_device(device), info.config.get("text_config")
    parts = (info.config, text if isinstance(text, dict) else {})
    named = next(filter(None, (p.get("dtype") or p.get("torch_dtype") for p in parts)), None)
    stored = getattr(torch, str(named).removeprefix("torch."), None)
    chosen = pick_dtype(dtype, target, SimpleNamespace(dtype=stored))
    return Place(target.type, str(chosen).removeprefix("torch."))


def _may_have_gpu() -> bool:
    """Whether asking torch for a GPU is worth the seconds that its import takes."""
    if "torch" in sys.modules or sys.platform != "linux":
        return True
    drivers = ("nvidia[0-9]*", "kfd", "dxg")
    return any(any(Path("/dev").glob(pattern)) for pattern in drivers)


def profile_key(info: ModelInfo, settings: ProfileSettings, place: Place | None = None) -> str:
    """The identity of a model's profile under some settings, found or not.

    ``place`` is where it is measured, None for where this machine computes by itself.

    Raises
    ------
    InputError
        When the calibration corpus is nothing known.
    """
    corpus, packages = corpus_identity(settings.calibration), computes_with(settings.quantizer)
    place = place or place_of(info)
    made_with = profile_dependencies(place, versions(*packages), packages)
    return settings.key(info.fingerprint, corpus, info.tokenizer, info.code, made_with)


def find_profile_key(
    store: Store, info: ModelInfo, settings: ProfileSettings, place: Place | None = None
) -> str:
    """The same; a profile kept before it depended on place and versions is put under it.

    That is done only where what was recorded with the profile says that it was measured in this
    place, by these versions of what it depends on.
    """
    key, place = profile_key(info, settings, place), place or place_of(info)
    packages = computes_with(settings.quantizer)
    wanted = profile_dependencies(place, versions(*packages), packages)

    def same(recorded: dict) -> bool:
        made_by = recorded.get("versions") or {}
        return profile_dependencies(Place.of(recorded), made_by, packages) == wanted

    older = settings.key(info.fingerprint, corpus_identity(settings.calibration))
    store.adopt_profile(older, key, same)
    return key


def stream_of(request: EvaluationRequest, tokenizer: object) -> TokenStream:
    """The tokens that a request evaluates on."""
    return token_stream(load_corpus(request.corpus, "evaluation"), tokenizer, request.max_tokens)


def provenance_of(where: dict[str, str], request: EvaluationRequest, tokenizer: object) -> dict:
    """What an evaluation is made with, beside its corpus and protocol."""
    return where | {
        "machine": machine(where["device"]),
        "max_tokens": request.max_tokens,
        "bos": tokenizer.bos_token_id,
        "versions": versions(),
    }


def plan_for(
    info: ModelInfo,
    problem: Problem,
    request: PlanRequest,
    settings: ProfileSettings,
    frontier: Frontier | None = None,
) -> Plan:
    """The plan that a method makes of what is known, as :func:`lsq_core.plan.make_plan`.

    One of mixed rows names the text that they were scored on.

    Raises
    ------
    InputError
        When the profile lacks what the method reads, or the request cannot be met.
    """
    check_metrics(info, problem, request)
    plan = make_plan(
        problem,
        request,
        metadata=settings.metadata,
        axis=settings.axis,
        other_bytes=info.other_bytes,
        frontier=frontier,
    )
    return replace(plan, calibration=_text_of(settings)) if plan.rows else plan


def by_quantizer(plan: Plan, quantizer: str, settings: ProfileSettings) -> Plan:
    """The plan as a quantizer will carry it out: its bytes, and the text that it reads, if any.

    A plan of mixed rows has the text that they were scored on with it, and that of a run that is
    done again the one of that run.
    """
    if plan.calibration and (plan.rows or plan.quantizer == quantizer):
        return replace(plan, quantizer=quantizer)
    text = _text_of(settings) if about(quantizer).calibrated else None
    return replace(plan, quantizer=quantizer, calibration=text)


def _text_of(settings: ProfileSettings) -> dict:
    """Which text settings name, and how much of it is read, as a plan tells it."""
    text = {name: getattr(settings, name) for name in _CALIBRATION}
    return text | {"corpus": corpus_identity(settings.calibration)}


def _settings_of(plan: Plan) -> ProfileSettings:
    """What a plan's quantizer needs to know beside its choice."""
    text = plan.calibration or {}
    told = {name: text[name] for name in _CALIBRATION if name in text}
    return ProfileSettings(axis=plan.axis, metadata=plan.metadata, **told)


def refusal_of(problem: Problem, request: PlanRequest, quantizer: str, axis: int) -> str:
    """Why no plan of a request can be carried out by a quantizer, as far as that is known now.

    In a sentence, '' where nothing stands against it; the plan itself has to be checked as well
    (:func:`lsq_core.quantize.check_choice`).

    Raises
    ------
    InputError
        When the request itself is wrong.
    """
    problem = problem.with_options(get_planner(request.method).options(request))
    known, reason = about(quantizer), refusal(quantizer, {}, axis)
    offered = [option for option in problem.options if option in known.options]
    if reason or not offered:
        return reason or mixed_rows_refusal(known)
    if request.base:
        base = LADDER[stop_index(request.base)]
        pinned = with_pins(problem, request.pins)
        stop = LADDER.index(base)
        free = (pinned.low <= stop) & (stop <= pinned.high)
        kept = [m for m, is_free in zip(problem.matrices, free, strict=True) if is_free]
        return refusal(quantizer, dict.fromkeys(kept, base) if kept else {}, axis)
    budget = request.budget_for(problem)
    if budget is None:
        return ""
    smallest = sum(
        min(of_matrix(nominal_bytes, m, option) for option in offered) for m in problem.matrices
    )
    if budget.nominal_bytes * (1 + TOLERANCE) >= smallest:
        return ""
    return (
        f"{known.title} supports {', '.join(c.name for c in offered)}, which take at "
        f"least {problem.in_words(smallest)}; a budget of {budget.text} is below that."
    )


def plan_identity(plan: Plan) -> list[object]:
    """What two plans share that store the same, whatever they were asked for."""
    return content_identity(plan.to_json())


def content_identity(content: dict) -> list[object]:
    """The same of a plan's JSON; the high-impact rows go with the configuration."""
    configs = [
        [name, entry["config"], *filter(None, [entry.get("rows")])]
        for name, entry in content["modules"].items()
    ]
    alike = [content["method"], content["metadata"], content["axis"], content.get("calibration")]
    return [*alike, sorted(configs)]


def _digest(*parts: object) -> str:
    return hashlib.sha256(json_text(parts).encode()).hexdigest()


def evaluate_on(
    models: Sequence[nn.Module],
    tokenizer: object,
    context: int,
    requests: Sequence[EvaluationRequest],
    streams: Sequence[TokenStream],
    *,
    reference: nn.Module | None = None,
    where: dict[str, str],
    report: Report = silent,
    checkpoints: Sequence[Sequence[Path | None]] | None = None,
) -> Iterator[list[Pair]]:
    """Evaluate any causal models on texts, with the provenance of the figures filled in.

    Yields as :func:`lsq_core.evaluate.evaluate_together`.
    """
    from lsq_core.evaluate import Protocol, Text, evaluate_together

    texts = [
        Text(stream.ids, Protocol.named(request.protocol, context))
        for request, stream in zip(requests, streams, strict=True)
    ]
    found = evaluate_together(
        models,
        texts,
        bos=tokenizer.bos_token_id,
        reference=reference,
        progress=lambda done, total, message: report("evaluate", done, total, message),
        checkpoints=checkpoints,
    )
    for request, stream in zip(requests, streams, strict=True):
        with in_a_sentence(where["device"]):
            pairs = next(found)
        known = {
            "corpus": stream.corpus,
            "corpus_sha256": stream.sha256,
            "corpus_source": stream.source,
            "truncated": stream.truncated,
            "provenance": provenance_of(where, request, tokenizer),
        }
        yield [
            (replace(own, **known), replace(full, **known) if full else None) for own, full in pairs
        ]


def load_saved(
    folder: Path,
    device: str = "auto",
    dtype: str = "auto",
    report: Report = silent,
    trust_remote_code: bool = False,
) -> QuantizedModel:
    """A saved quantized model; too little memory is told in a sentence."""
    from lsq_core.quantize.artifact import load_quantized

    report("load", 0, 1, f"loading {folder}")
    with in_a_sentence(device):
        return load_quantized(folder, device, dtype, trust_remote_code)


def evaluate_saved(
    folder: Path,
    request: EvaluationRequest,
    store: Store,
    device: str = "auto",
    dtype: str = "auto",
    report: Report = silent,
    trust_remote_code: bool = False,
) -> dict:
    """Load a saved quantized model, evaluate it, and keep the result with the run it came from.

    A run that this store doesn't know (the folder came from elsewhere) is added to it.
    """
    from lsq_core.architecture import context_of
    from lsq_core.quantize.apply import measured_bytes

    manifest = read_manifest(folder, EVALUATED)
    quantized = load_saved(folder, device, dtype, report, trust_remote_code)
    report("evaluate", 0, 1, f"reading {request.corpus}")
    [[(evaluation, _)]] = evaluate_on(
        [quantized.model],
        quantized.tokenizer,
        context_of(quantized.model),
        [request],
        [stream_of(request, quantized.tokenizer)],
        where={"device": quantized.device, "dtype": quantized.dtype},
        report=report,
    )
    measured = measured_bytes(quantized.model)
    store.add_evaluation(manifest, measured, str(folder), evaluation)
    return {
        "model": str(folder),
        "run": manifest["run"],
        "method": manifest["method"],
        "bits_per_param": manifest["bits_per_param"],
        "measured_bytes": measured,
    } | _figures(evaluation)


def remake(
    run: str,
    source: ModelSource | None,
    store: Store,
    device: str = "auto",
    dtype: str = "auto",
    report: Report = silent,
    trust_remote_code: bool = False,
) -> tuple[Workbench, nn.Module]:
    """The full-precision model of a run, and its quantized one: as saved, else made once more.

    ``source`` says where the model is, None where it was when the run was made; its own code
    runs then only if ``trust_remote_code``.

    Raises
    ------
    InputError
        When there is no such run, or the model is another one now.
    """
    kept = store.run(run)
    dtype = kept["dtype"] if dtype == "auto" else dtype
    source = source or ModelSource(kept["source"], kept["revision"], trust_remote_code)
    bench = original(source, kept["fingerprint"], store, device, dtype, report)
    folder = saved_folder(kept)
    if folder is not None:
        trusted = source.trust_remote_code
        return bench, load_saved(folder, device, dtype, report, trusted).model
    plan = Plan.from_json(kept["content"], bench.info.matrices, bench.info.other_bytes)
    return bench, bench.quantize(plan, None, kept["quantizer"], run=run).model


def original(
    source: ModelSource,
    fingerprint: str,
    store: Store,
    device: str = "auto",
    dtype: str = "auto",
    report: Report = silent,
) -> Workbench:
    """The model that something was made from.

    Raises
    ------
    InputError
        When another model is there now.
    """
    bench = Workbench(source, store, device, dtype, report)
    if bench.info.fingerprint != fingerprint:
        raise InputError(
            f"{source.name} is not the model that was quantized: its weights or its config have "
            "changed; say with --model where the original is."
        )
    return bench


def saved_folder(run: dict) -> Path | None:
    """Where a run of :meth:`lsq_core.store.Store.run` has its saved model, if it is still there."""
    folder = Path(run["saved_to"]) if run["saved_to"] else None
    if folder is None or not is_quantized_folder(folder):
        return None
    return folder if read_manifest(folder, RUN)["run"] == run["id"] else None


def find_published(source: ModelSource, store: Store) -> ModelInfo | None:
    """The published model that a source names: ``published:NAME``, or ``NAME`` alone.

    The name alone means a local folder where there is one of that name.

    Raises
    ------
    InputError
        When ``published:NAME`` was never imported.
    """
    if source.is_local:
        return None
    name = source.name.removeprefix(PUBLISHED)
    known = store.model(PUBLISHED + name)
    if known is None and source.name.startswith(PUBLISHED):
        there = sorted(store.models(origin="published")["source"])
        raise InputError(
            f"{store.path} has no published measurements of '{name}'; "
            + (f"choose one of {', '.join(there)}." if there else "import-reference brings them.")
        )
    return known


def _no_such_profile(info: ModelInfo, settings: ProfileSettings, store: Store) -> str:
    """What a published model has instead of the profile that was asked for."""
    kept = [ProfileSettings(**json.loads(s)) for s in store.profiles(info.fingerprint)["settings"]]
    there = sorted({f"{s.calibration} ({s.quantizer}, axis {s.axis})" for s in kept})
    return (
        f"{info.source} has no published profile on {settings.calibration} ({settings.quantizer}, "
        f"axis {settings.axis}, {settings.metadata} metadata, {settings.samples} samples of "
        f"{settings.block_tokens} tokens); choose one of {', '.join(there)}, and leave the other "
        "settings out."
    )


def problem_of(info: ModelInfo, profile: Profile | None) -> Problem:
    """What planners see: matrices, and those of a profile's scores that it holds.

    A published profile may lack metrics, or a metric at some stops (NaN there).
    """
    if profile is None:
        return Problem(info.matrices)
    held = set(zip(profile.values["metric"], profile.values["config"], strict=True))
    metrics = {metric for metric, _ in held}
    nothing = np.full(len(info.matrices), np.nan)

    def at(metric: str, config: QuantConfig) -> np.ndarray:
        return profile.scores(metric, config) if (metric, config.name) in held else nothing

    scores = {m: profile.scores(m) for m in ("kurtosis", "loss_impact") if m in metrics}
    for metric in ("sensitivity", "sensitivity_module"):
        if (metric, DETECTION_CONFIG.name) in held:
            scores[metric] = profile.scores(metric, DETECTION_CONFIG)
    # Without its figure at the detection stop, a sensitivity is not what methods mean by it.
    whole = scores.keys() | ({"weight_error"} & metrics)
    by_config = {
        metric: np.stack([at(metric, config) for config in LADDER], axis=1)
        for metric in ("weight_error", "sensitivity", "sensitivity_module")
        if metric in whole
    }
    return Problem(info.matrices, scores, by_config)


def kind_of(request: PlanRequest) -> InteractionKind:
    """Which interactions a request reads."""
    return InteractionKind(request.loss, request.low_bits, request.high_bits, request.group_size)


def known_impact(info: ModelInfo, store: Store, key: str, request: PlanRequest) -> Impact | None:
    """What the store has of a profile's rows for a request; None without row scores."""
    scores = store.row_scores(key)
    if not scores:
        return None
    return impact_of(info.matrices, scores, store.interactions(key, kind_of(request)))


def check_metrics(info: ModelInfo, problem: Problem, request: PlanRequest) -> None:
    """Raise :class:`InputError` when the profile lacks what the method reads.

    The sentence names the methods for which it has enough.
    """
    held = problem.scores.keys() | problem.by_config.keys()

    def lacks(method: str) -> list[str]:
        planner = get_planner(method)
        read = {"sensitivity": request.metric} if planner.has_base else {}
        return [m for m in (read.get(m, m) for m in planner.metrics) if m not in held]

    missing = lacks(request.method)
    if missing:
        others = [name for name, p in PLANNERS.items() if p.metrics and not lacks(name)]
        first, last = ", ".join(others[:-1]), (others or ["uniform"])[-1]
        raise InputError(
            f"{info.source} has no {' and no '.join(missing)}, so "
            f"{get_planner(request.method).title} cannot plan for it; choose "
            f"{first}{' or ' if first else ''}{last}."
        )


def _figures(evaluation: Evaluation) -> dict:
    """What an evaluation says, by the names the command line prints."""
    return {
        "perplexity": evaluation.perplexity,
        "corpus": evaluation.corpus,
        "corpus_sha256": evaluation.corpus_sha256,
        "corpus_source": evaluation.corpus_source,
        "truncated": evaluation.truncated,
        "protocol": evaluation.protocol,
        "tokens": evaluation.tokens,
        "tokens_per_second": evaluation.tokens_per_second,
        "working_bytes": evaluation.working_bytes,
        "evaluate_seconds": evaluation.seconds,
        "device": evaluation.provenance["device"],
        "dtype": evaluation.provenance["dtype"],
        "versions": evaluation.provenance["versions"],
    }


def _outcome(run_id: str, row: dict, own: Evaluation, full: Evaluation) -> dict:
    from lsq_core.evaluate import compare_windows

    difference = compare_windows(own.nll, full.nll, own.counts)
    return _figures(own) | {
        "run": run_id,
        "quantizer": row["quantizer"],
        "measured_bytes": row["measured_bytes"],
        "measured_model_bytes": row["model_bytes"],
        "perplexity_full": full.perplexity,
        "increase": asdict(difference),
        "kl": own.kl,
        "top1": own.top1,
        "quantize_seconds": row["quantize_seconds"],
        "seconds": own.times,
        "saved_to": row["saved_to"],
    }


@contextmanager
def in_a_sentence(device: str) -> Iterator[None]:
    """Turn running out of memory or disk into a sentence that says what to do."""
    try:
        yield
    except LsqError:
        raise
    except MemoryError as error:
        raise LsqError(f"There is not enough memory on {device}; use a smaller model.") from error
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise LsqError(f"The disk is full ({error.filename}); make room and try again.") from error
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError" and "not enough memory" not in str(error):
            raise
        raise LsqError(
            f"{device} ran out of memory; free some, use --device cpu, or choose a smaller model."
        ) from error
