"""Refine a plan by measuring; steps are stored, and a search resumes from its last step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import numpy as np

from lsq_core.errors import InputError, translate_resource_errors
from lsq_core.evaluation.protocol import EvaluationRequest
from lsq_core.planning.constraints import restrict
from lsq_core.planning.hull import hull_frontier
from lsq_core.planning.limit import nominal_limit
from lsq_core.planning.methods import get_planner
from lsq_core.planning.methods.refined import Refined, check_refinable
from lsq_core.planning.plan import Plan
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.progress import timed
from lsq_core.provenance import device_kind, machine, versions
from lsq_core.quantization.registry import quantizer_spec, required_packages
from lsq_core.refinement.step import RefinementStep
from lsq_core.settings import GridSettings
from lsq_core.stages.evaluate import evaluate_models
from lsq_core.stages.model import OpenModel
from lsq_core.stages.plan import model_problem, plan_identity, plan_model
from lsq_core.stages.refined import as_refinement, option_names
from lsq_core.stages.run import quantize_plan
from lsq_core.store.refinements import RefinementKey

if TYPE_CHECKING:
    from lsq_core.refinement.expansion import Expansion

#: Default minutes after which no further round starts.
DEFAULT_MINUTES = 15.0
#: Number of leading tokens of the calibration text on which proposals are measured.
MEASURED_TOKENS = 8192
#: Protocol for measuring proposals, in which no token is read twice.
PROTOCOL = "blocks"


@timed("refine")
def refine_plan(
    model: OpenModel,
    request: PlanRequest,
    settings: ProfileSettings,
    minutes: float = DEFAULT_MINUTES,
    text: str | None = None,
) -> Plan:
    """Search for a better plan within a request's budget, from the last stored step.

    ``text`` is the corpus whose calibration split is searched on, by default that of the profile.

    A round that starts before ``minutes`` are over is finished. Returns the best plan, which is the
    starting plan if no other was better.

    Raises
    ------
    InputError, LsqError
        If the request has no budget or a ladder other than the paper's, the model is published
        without weights, or the search starts from a method that is not a knapsack; also as
        :func:`lsq_core.stages.plan.plan_model`.
    """
    request = replace(request, method=Refined.name, exact=False)  # no step is exact
    get_planner(Refined.name).options(request)
    if request.budget is None:
        raise InputError("Give the budget that a plan is to be refined within, such as 3.2bpp.")
    if not minutes > 0:
        raise InputError(f"Give a positive number of minutes, such as 15, not {minutes:g}.")
    if model.published:
        raise InputError(
            f"{model.published.source} was published without its weights, so no plan for it can "
            "be measured."
        )
    check_refinable(get_planner(request.refined_from))
    start = plan_model(model, replace(request, method=request.refined_from, start=None), settings)
    search = _Search(model, request, settings, start, text or settings.calibration)
    search.run(minutes)
    found = as_refinement(search.steps, search.budget, search.problem)
    return plan_model(model, request, settings, found) if found else start


class _Search:
    """A search within a budget that resumes from the stored steps."""

    def __init__(
        self,
        model: OpenModel,
        request: PlanRequest,
        settings: ProfileSettings,
        start: Plan,
        text: str,
    ) -> None:
        self.model, self.request, self.settings, self.text = model, request, settings, text
        self.start_time = time.monotonic()
        options = get_planner(Refined.name).options(request)
        problem = model_problem(model, start.profile).with_options(options)
        self.problem = restrict(problem, request)
        self.budget = request.resolve_budget(self.problem, settings.metadata)
        self.key = RefinementKey.of(start.profile, request)
        names = option_names(self.problem)
        self.conditions = {
            "device": device_kind(model.device_and_dtype["device"]),
            "dtype": model.device_and_dtype["dtype"],
            "corpus_sha256": model.stream(self._text).sha256,
            "protocol": PROTOCOL,
        }
        self.steps = model.store.refinement_steps(self.key, self.budget, names, self.conditions)

    @property
    def _text(self) -> EvaluationRequest:
        """The text that proposals are measured on: not one that runs are evaluated on."""
        return EvaluationRequest(self.text, PROTOCOL, MEASURED_TOKENS, split="calibration")

    def run(self, minutes: float) -> None:
        """Run rounds until proposals no longer improve, or time is up."""
        from lsq_core.refinement.search import refine

        if not self.steps:
            self._keep(self._start())
        with translate_resource_errors(self.model.loaded.device):
            for step in refine(self.steps[-1], self._expand, self._solve, self._measure):
                self._keep(step)
                if time.monotonic() - self.start_time > 60 * minutes:
                    self._say("time is up")
                    return
        self._say("no proposal is better")

    def _keep(self, step: RefinementStep) -> None:
        self.steps = [own for own in self.steps if own.number < step.number] + [step]
        self.model.store.save_refinement_step(
            self.key,
            self.conditions,
            self.budget,
            step,
            option_names(self.problem),
            self._provenance(),
        )
        self._say(f"step {step.number}: KL {step.kl:.5f}")

    def _start(self) -> RefinementStep:
        """Measure the plan of the starting method, as the search's first step."""
        cost = get_planner(self.request.refined_from).cost(self.problem)
        choice = self._solve(cost)
        [kl] = self._measure([choice])
        return RefinementStep(0, choice, kl, cost)

    def _solve(self, cost: np.ndarray) -> np.ndarray:
        """Return the choice of least cost within the budget."""
        frontier, metadata = hull_frontier(cost, self.problem), self.settings.metadata
        limit = nominal_limit(frontier, self.problem, self.budget, metadata)
        return frontier.at(limit).choice

    def _choice(self, choice: np.ndarray) -> dict:
        options = self.problem.options
        pairs = zip(self.model.info.matrices, choice, strict=True)
        return {matrix: options[option] for matrix, option in pairs}

    def _expand(self, step: RefinementStep) -> Expansion:
        """Return the expansion around a step, on the part of the calibration text for its round.

        It does not depend on whether the search was interrupted in between.
        """
        import torch

        from lsq_core.profiling.backward import cut_sequences
        from lsq_core.profiling.calibration import load_calibration
        from lsq_core.quantization.registry import get_quantizer
        from lsq_core.refinement.expansion import Expander

        loaded = self.model.loaded
        text = replace(self.settings, calibration=self.text).text
        ids = torch.from_numpy(load_calibration(loaded, text).ids).to(loaded.device)
        expander = Expander.of(
            loaded,
            cut_sequences(ids, step.rounds),
            self.problem.options,
            self._available(),
            get_quantizer(self.settings.quantizer),
            GridSettings(self.settings.axis, self.settings.metadata),
            self.model.matrix_cache,
        )
        return expander.expand(self._choice(step.choice), self._progress)

    def _available(self) -> np.ndarray:
        """Return a mask (n, options) of the options allowed for each matrix and quantizer."""
        spec = quantizer_spec(self.settings.quantizer)
        return self.problem.allowed & [option in spec.configs for option in self.problem.options]

    def _measure(self, choices: Sequence[np.ndarray]) -> list[float]:
        """Return the measured KL divergence of each choice, all evaluated together."""
        return [own.kl for own, _ in next(self._evaluations(choices))]

    def _evaluations(self, choices: Sequence[np.ndarray]) -> Iterator:
        plans = [self._plan(choice) for choice in choices]
        made = [
            quantize_plan(self.model, plan, self.settings.quantizer, settings=self.settings)
            for plan in plans
        ]
        identities = [["refine", *plan_identity(plan)] for plan in plans]
        models = [one.model for one in made]
        reference = self.model.loaded.model
        return evaluate_models(self.model, models, [self._text], reference, identities)

    def _plan(self, choice: np.ndarray) -> Plan:
        return Plan(
            request=self.request,
            matrices=self.problem.matrices,
            configs=tuple(self._choice(choice).values()),
            metadata=self.settings.metadata,
            axis=self.settings.axis,
            other_bytes=self.model.info.other_bytes,
        )

    def _progress(self, done: int, total: int, message: str) -> None:
        self.model.report("refine", done, total, message)

    def _say(self, message: str) -> None:
        self.model.report("refine", 0, 1, message)

    def _provenance(self) -> dict:
        where = self.model.device_and_dtype
        return where | {
            "settings": asdict(self.settings),
            "text": self.text,
            "max_tokens": MEASURED_TOKENS,
            "machine": machine(where["device"]),
            "versions": versions(*required_packages([self.settings.quantizer])),
            "seconds": time.monotonic() - self.start_time,
        }
