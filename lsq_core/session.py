"""A session with one model: the way from it to a run, in ten lines of a notebook.

    import lsq_core as lsq

    session = lsq.Session("demo")
    profile = session.profile()
    plan = session.plan("mxq", budget="3.2bpp")
    quantized = session.quantize(plan)
    result = session.evaluate(quantized, corpus="stdlib")
    session.save(quantized, "my-model-3bit")

The command line, the app's jobs and the tests call the same methods; the stages do the work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lsq_core.evaluation.protocol import EvaluationRequest
from lsq_core.planning.plan import Plan
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling.profile import Profile
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.stages import evaluate, plan, predict, profile, rows
from lsq_core.stages import run as runs
from lsq_core.stages.model import OpenModel

if TYPE_CHECKING:
    from lsq_core.evaluation.prediction import Predictor
    from lsq_core.planning.problem import Impact, Problem
    from lsq_core.stages.run import QuantizedRun


class Session(OpenModel):
    """A model with everything that can be done with it; every result is kept in its store.

    Settings that are left out are :attr:`default_settings`.
    """

    def profile_key(self, settings: ProfileSettings | None = None) -> str:
        """The id that this model's profile has under these settings, measured or not."""
        return profile.model_profile_key(self, settings or self.default_settings)

    def find_profile(self, settings: ProfileSettings | None = None) -> Profile | None:
        """The profile if it was measured before, or published."""
        return profile.find_profile(self, settings or self.default_settings)

    def profile(
        self, settings: ProfileSettings | None = None, metrics: Sequence[str] = ()
    ) -> Profile:
        """See :func:`lsq_core.stages.profile.profile_model`."""
        return profile.profile_model(self, settings or self.default_settings, metrics)

    def impact(self, request: PlanRequest, settings: ProfileSettings | None = None) -> Impact:
        """See :func:`lsq_core.stages.rows.row_impact`."""
        return rows.row_impact(self, request, settings or self.default_settings)

    def plan(
        self,
        method: str | PlanRequest,
        settings: ProfileSettings | None = None,
        **request: object,
    ) -> Plan:
        """A plan by a method, with the fields of :class:`PlanRequest` as keywords.

        Raises
        ------
        InputError
            When the request cannot be met; see :func:`lsq_core.planning.make.make_plan`.

        Examples
        --------
        >>> Session("demo").plan("uniform", base="4.25")  # doctest: +SKIP
        """
        if isinstance(method, str):
            method = PlanRequest.from_json({"method": method, **request})
        elif request:
            raise TypeError("Give a method with the fields of a request, or a whole request.")
        return plan.plan_model(self, method, settings or self.default_settings)

    def predictor(
        self, problem: Problem, settings: ProfileSettings, *quantizer_spec: str
    ) -> Predictor:
        """See :func:`lsq_core.stages.predict.fit_predictor`."""
        return predict.fit_predictor(self, problem, settings, *quantizer_spec)

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
        save: Path | None = None,
        plan_name: str = "",
        run: str | None = None,
        settings: ProfileSettings | None = None,
    ) -> QuantizedRun:
        """See :func:`lsq_core.stages.run.quantize_plan`."""
        return runs.quantize_plan(self, made, quantizer, save, plan_name, run, settings)

    def measure(
        self, made: Sequence[QuantizedRun], requests: Sequence[EvaluationRequest]
    ) -> Iterator[dict]:
        """See :func:`lsq_core.stages.run.measure`."""
        return runs.measure(self, made, requests)

    def run(
        self,
        made: Plan,
        quantizer: str,
        request: EvaluationRequest,
        save: Path | None = None,
        plan_name: str = "",
        settings: ProfileSettings | None = None,
    ) -> dict:
        """See :func:`lsq_core.stages.run.run_plan`."""
        return runs.run_plan(self, made, quantizer, request, save, plan_name, settings)

    def evaluate_full(self, request: EvaluationRequest) -> dict:
        """See :func:`lsq_core.stages.evaluate.evaluate_full`."""
        return evaluate.evaluate_full(self, request)
