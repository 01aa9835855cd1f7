"""A session with one model, from the model to a run in ten lines of a notebook.

    import lsq_core as lsq

    session = lsq.Session("demo")
    profile = session.profile()
    plan = session.plan("mxq", budget="3.2bpp")
    quantized = session.quantize(plan)
    result = session.evaluate(quantized, corpus="stdlib")
    quantized.save("my-model-3bit")

The command line, the app's jobs and the tests call the same methods; the work is done in
:mod:`lsq_core.stages`.
"""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lsq_core.errors import InputError, LsqError
from lsq_core.evaluation.noise import NoiseFloor
from lsq_core.evaluation.protocol import EvaluationRequest
from lsq_core.exports.registry import export_plan
from lsq_core.exports.weights.registry import ExportTarget
from lsq_core.planning.plan import Plan
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling.profile import Profile
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.stages import (
    evaluate,
    measure,
    noise,
    plan,
    predict,
    profile,
    rank,
    refine,
    rows,
    streamed,
)
from lsq_core.stages import export as exports
from lsq_core.stages import run as runs
from lsq_core.stages.measure import PreparedRun
from lsq_core.stages.model import OpenModel, find_model_info
from lsq_core.stages.run import QuantizedRun, RunResult
from lsq_core.stages.streamed import StreamedRun
from lsq_core.table import short_table

if TYPE_CHECKING:
    from lsq_core.evaluation.prediction import Predictor
    from lsq_core.exports.base import Translation
    from lsq_core.planning.problem import Impact, Problem
    from lsq_core.stages.profile import Measurer


class Session(OpenModel):
    """A model and all operations on it; every result is saved in its store.

    ``settings`` default to :attr:`default_settings`.
    """

    def __repr__(self) -> str:
        rows = self._model_rows() | {"device": self.device, "database": self.store.path}
        return short_table(f"Session with {self.source.name}", rows)

    def _model_rows(self) -> dict[str, object]:
        """Return the model's rows of the table; downloads nothing, and an error becomes a row."""
        try:
            known = self.published or self.source.is_local
            info = self.config_info if known else find_model_info(self.source, self.store)
        except LsqError as error:
            return {"error": error}
        if info is None:
            return {"model": "not downloaded yet"}
        return {
            "architecture": info.architecture,
            "layers": info.layers,
            "parameters": f"{info.parameters:,}, {info.linear_parameters:,} of them planned",
        }

    def profile_key(self, settings: ProfileSettings | None = None) -> str:
        """Return the id of this model's profile under these settings, measured or not."""
        return profile.model_profile_key(self, settings or self.default_settings)

    def find_profile(self, settings: ProfileSettings | None = None) -> Profile | None:
        """Return the stored or published profile with these settings, or None."""
        return profile.find_profile(self, settings or self.default_settings)

    def profile(
        self,
        settings: ProfileSettings | None = None,
        metrics: Sequence[str] = (),
        measure: Measurer = profile.measure_here,
        **fields: object,
    ) -> Profile:
        """See :func:`lsq_core.stages.profile.profile_model`.

        Fields of :class:`ProfileSettings` can be given as keyword arguments.
        """
        return profile.profile_model(self, self._settings(settings, fields), metrics, measure)

    def _settings(
        self, settings: ProfileSettings | None, fields: dict[str, object]
    ) -> ProfileSettings:
        unknown = sorted(
            fields.keys() - {each.name for each in dataclasses.fields(ProfileSettings)}
        )
        if unknown:
            raise InputError(f"Profile settings have no field '{unknown[0]}'.")
        for name, value in fields.items():
            kind = type(getattr(ProfileSettings(), name))
            if type(value) is not kind:
                raise InputError(f"The {name} of profile settings cannot be {reprlib.repr(value)}.")
        return replace(settings or self.default_settings, **fields)

    def impact(self, request: PlanRequest, settings: ProfileSettings | None = None) -> Impact:
        """See :func:`lsq_core.stages.rows.row_impact`."""
        return rows.row_impact(self, request, settings or self.default_settings)

    def plan(
        self,
        method: str | PlanRequest,
        settings: ProfileSettings | None = None,
        **request: object,
    ) -> Plan:
        """Return a method's plan; fields of :class:`PlanRequest` are keyword arguments.

        Raises
        ------
        InputError
            If the request cannot be met; see :func:`lsq_core.planning.make.make_plan`.

        Examples
        --------
        >>> Session("demo").plan("uniform", base="4.25")  # doctest: +SKIP
        """
        if isinstance(method, str):
            method = PlanRequest.from_json({"method": method, **request})
        elif request:
            raise InputError("Give a method with the fields of a request, or a whole request.")
        return plan.plan_model(self, method, settings or self.default_settings)

    def refine(
        self,
        budget: str,
        settings: ProfileSettings | None = None,
        minutes: float = refine.DEFAULT_MINUTES,
        text: str | None = None,
        **request: object,
    ) -> Plan:
        """Search for a better plan; see :func:`lsq_core.stages.refine.refine_plan`.

        ``start``, ``pins``, ``ties`` and ``serve`` can be given as keyword arguments.
        """
        asked = PlanRequest.from_json({"method": "refined", "budget": budget, **request})
        return refine.refine_plan(self, asked, settings or self.default_settings, minutes, text)

    def predictor(
        self,
        problem: Problem,
        settings: ProfileSettings,
        corpus: str | None = None,
        protocol: str | None = None,
    ) -> Predictor:
        """See :func:`lsq_core.stages.predict.fit_predictor`."""
        return predict.fit_predictor(self, problem, settings, corpus, protocol)

    def predicted(
        self,
        made: Plan,
        settings: ProfileSettings | None = None,
        corpus: str | None = None,
        protocol: str | None = None,
    ) -> dict:
        """See :func:`lsq_core.stages.predict.predict_plan`."""
        settings = settings or self.default_settings
        return predict.predict_plan(self, made, settings, corpus, protocol)

    def without_ties(
        self,
        made: Plan,
        settings: ProfileSettings | None = None,
        corpus: str | None = None,
        protocol: str | None = None,
    ) -> dict:
        """See :func:`lsq_core.stages.predict.predict_without_ties`."""
        settings = settings or self.default_settings
        return predict.predict_without_ties(self, made, settings, corpus, protocol)

    def rank(
        self,
        budget: str | PlanRequest,
        settings: ProfileSettings | None = None,
        corpus: str | None = None,
        protocol: str | None = None,
    ) -> rank.MethodRanking:
        """See :func:`lsq_core.stages.rank.rank_model_methods`; a budget alone is enough."""
        request = PlanRequest("uniform", budget=budget) if isinstance(budget, str) else budget
        settings = settings or self.default_settings
        return rank.rank_model_methods(self, request, settings, corpus, protocol)

    def request_for_max_loss(
        self,
        request: PlanRequest,
        settings: ProfileSettings,
        max_loss: float,
        corpus: str | None = None,
        protocol: str | None = None,
    ) -> PlanRequest:
        """See :func:`lsq_core.stages.predict.request_for_max_loss`."""
        return predict.request_for_max_loss(self, request, settings, max_loss, corpus, protocol)

    def quantize(
        self,
        made: Plan,
        quantizer: str = "hqq",
        save: Path | str | None = None,
        plan_name: str = "",
        run: str | None = None,
        settings: ProfileSettings | None = None,
    ) -> QuantizedRun:
        """See :func:`lsq_core.stages.run.quantize_plan`."""
        return runs.quantize_plan(self, made, quantizer, save, plan_name, run, settings)

    def export(
        self, quantized: QuantizedRun, folder: Path | str, format: str, crossing: str = "refuse"
    ) -> QuantizedRun:
        """Write a quantized model in another tool's format: mlx, gguf or compressed-tensors.

        Returns the model that the tool decodes from it, which can be evaluated like any other.
        ``crossing`` selects how groups that cross rows are handled
        (:data:`lsq_core.exports.weights.registry.CROSSING`).

        Raises
        ------
        InputError, LsqError
            If the format cannot express the plan or hold the model, or the folder exists or
            cannot be written.
        """
        return exports.export_run(self, quantized, folder, ExportTarget(format, crossing))

    def quantize_streamed(
        self,
        made: Plan,
        quantizer: str = "hqq",
        plan_name: str = "",
        run: str | None = None,
        settings: ProfileSettings | None = None,
    ) -> StreamedRun:
        """See :func:`lsq_core.stages.streamed.stream_plan`."""
        return streamed.stream_plan(self, made, quantizer, plan_name, run, settings)

    def check_text(self, request: EvaluationRequest) -> None:
        """See :func:`lsq_core.stages.evaluate.check_text`."""
        evaluate.check_text(self, request)

    def measure(
        self, made: Sequence[PreparedRun], requests: Sequence[EvaluationRequest]
    ) -> Iterator[dict]:
        """See :func:`lsq_core.stages.measure.measure`."""
        return measure.measure(self, made, requests)

    def run(
        self,
        made: Plan,
        quantizer: str,
        request: EvaluationRequest,
        save: Path | None = None,
        plan_name: str = "",
        settings: ProfileSettings | None = None,
        export: ExportTarget | None = None,
    ) -> dict:
        """See :func:`lsq_core.stages.measure.run_plan`.

        With ``export``, the model is saved in another tool's format, and the saved model is
        measured too (:func:`lsq_core.stages.export.run_plan_and_export`).
        """
        if export is None:
            return measure.run_plan(self, made, quantizer, request, save, plan_name, settings)
        if save is None:
            raise InputError(f"Give the folder that the {export.format} files are saved to.")
        return exports.run_plan_and_export(
            self, made, quantizer, request, save, export, plan_name, settings
        )

    def export_plan(self, made: Plan, target: str, nearest: bool = False) -> Translation:
        """See :func:`lsq_core.exports.registry.export_plan`."""
        return export_plan(made, self.config_info, target, nearest)

    def evaluate(
        self,
        quantized: QuantizedRun | None = None,
        corpus: str = "stdlib",
        protocol: str = "strided",
        max_tokens: int | None = None,
    ) -> RunResult:
        """Measure and store the perplexity of a quantized model and of full precision.

        Without a quantized model, full precision alone is measured.

        Raises
        ------
        InputError, LsqError
            If the corpus or the protocol is invalid, the quantized model was not made from this
            session's model, or the device runs out of memory.
        """
        if quantized is not None and not isinstance(quantized, QuantizedRun):
            raise InputError(
                f"A {type(quantized).__name__} cannot be evaluated; give what quantize returned."
            )
        request = EvaluationRequest(corpus, protocol, max_tokens)
        if quantized is None:
            return RunResult(self.evaluate_full(request))
        [outcome] = self.measure([quantized], [request])
        return RunResult(outcome)

    def evaluate_full(self, request: EvaluationRequest) -> dict:
        """See :func:`lsq_core.stages.evaluate.evaluate_full`."""
        return evaluate.evaluate_full(self, request)

    def measure_noise(
        self, request: EvaluationRequest | None = None, base: str = noise.DEFAULT_BASE
    ) -> NoiseFloor:
        """See :func:`lsq_core.stages.noise.measure_noise`."""
        return noise.measure_noise(self, request or EvaluationRequest(), base)
