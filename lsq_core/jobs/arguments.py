"""The command lines that jobs run and that a person can copy."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from lsq_core.evaluation.protocol import EvaluationRequest
from lsq_core.model.source import ModelSource
from lsq_core.planning.methods import PLANNERS
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.store.store import PUBLISHED

#: Fields of a plan request that are options with a value.
_VALUES = ("base", "budget", "boost_stop", "top_m", "metric", "seed")
#: And those of high-impact rows.
_ROW_VALUES = ("low_bits", "high_bits", "group_size", "loss", "ratios")


def model_arguments(source: ModelSource, device: str) -> list[str]:
    """Which model, and on which device."""
    words = ["--model", source.name, "--device", device]
    words += ["--revision", source.revision] if source.revision else []
    words += ["--trust-remote-code"] if source.trust_remote_code else []
    return words + (["--allow-pickle"] if source.allow_pickle else [])


def profile_arguments(settings: ProfileSettings) -> list[str]:
    """The options of ``profile``."""
    words = ["--corpus", settings.calibration, "--quantizer", settings.quantizer]
    return words + _grid(settings)


def _grid(settings: ProfileSettings) -> list[str]:
    return [
        *("--axis", str(settings.axis), "--metadata", settings.metadata),
        *("--samples", str(settings.samples), "--block-tokens", str(settings.block_tokens)),
    ]


def plan_arguments(request: PlanRequest, settings: ProfileSettings) -> list[str]:
    """The options of ``plan`` and ``run`` that say what to plan; defaults are left out."""
    words = ["--method", request.method]
    words += _changed(request, _VALUES)
    words += ["--exact"] if request.exact else []
    words += row_arguments(request)
    for pin in request.pins:
        words += ["--pin", pin]
    words += ["--calibration", settings.calibration, "--profile-quantizer", settings.quantizer]
    return words + _grid(settings)


def row_arguments(request: PlanRequest) -> list[str]:
    """The options of ``plan``, ``run`` and ``sweep`` about high-impact rows."""
    return _changed(request, _ROW_VALUES) + (["--clip"] if request.clip else [])


def _changed(request: PlanRequest, names: Sequence[str]) -> list[str]:
    """Options whose value isn't the default."""
    default = asdict(PlanRequest(request.method))
    words = []
    for name in names:
        if getattr(request, name) != default[name]:
            words += [f"--{name.replace('_', '-')}", str(getattr(request, name))]
    return words


def evaluation_arguments(
    request: EvaluationRequest, quantizer: str, save: Path | None
) -> list[str]:
    """The options of ``run`` that say how to quantize, what to evaluate on and what to keep."""
    words = ["--quantizer", quantizer, "--corpus", request.corpus, "--protocol", request.protocol]
    words += ["--max-tokens", str(request.max_tokens)] if request.max_tokens else []
    return words + (["--save", str(save)] if save else [])


def sweep_arguments(
    methods: Sequence[str],
    bases: Sequence[str],
    budgets: Sequence[str],
    quantizers: Sequence[str],
    baselines: Sequence[str],
    corpora: Sequence[str],
    like: EvaluationRequest,
    settings: ProfileSettings,
    rows: PlanRequest | None = None,
) -> list[str]:
    """The options of ``sweep``; ``like`` says how each text is evaluated, ``rows`` how rows mix."""
    listed = {
        "--method": methods,
        "--base": bases,
        "--budget": budgets,
        "--quantizer": quantizers,
        "--baseline": baselines,
        "--corpus": corpora,
    }
    words = [word for option, values in listed.items() for v in values for word in (option, v)]
    words += row_arguments(rows) if rows else []
    words += ["--protocol", like.protocol]
    words += ["--max-tokens", str(like.max_tokens)] if like.max_tokens else []
    words += ["--calibration", settings.calibration, "--profile-quantizer", settings.quantizer]
    return words + _grid(settings)


def reproducing(record: Mapping[str, Mapping[str, Any]]) -> str:
    """The command line that does a kept run again; of a published one, that makes its plan.

    A method that is not planned here, as others' published ones aren't, has none: a comment says
    so.

    ``record`` is of :meth:`lsq_core.store.store.Store.record`.
    """
    run, own, model = record["run"], record["evaluation"], record["model"]
    if run["method"] not in PLANNERS:
        return f"# {run['method']} is not among the methods here; this run was published."
    if not (record["plan"]["content"] or {}).get("request"):
        return "# What this run's plan was asked for was not kept."
    source = ModelSource(model["source"], model["revision"])
    request, settings = _asked(record)
    if run["fingerprint"].startswith(PUBLISHED):
        words = ["plan", "--model", source.name, *plan_arguments(request, settings)]
        if not record["profile"]:
            words = words[: words.index("--calibration")]  # that of the model's own profile
        return f"{_typed(words)}  # the plan alone: the weights aren't here"
    told = own["provenance"]
    evaluation = EvaluationRequest(
        own["corpus"], own["protocol"].partition("-")[0], told.get("max_tokens")
    )
    words = ["run", *model_arguments(source, run["device"]), "--dtype", run["dtype"]]
    words += plan_arguments(request, settings)
    return _typed(words + evaluation_arguments(evaluation, run["quantizer"], None))


def _asked(record: Mapping[str, Mapping[str, Any]]) -> tuple[PlanRequest, ProfileSettings]:
    """What a run's plan was asked for, and by which profile; of one without, its grid alone."""
    content = record["plan"]["content"]
    names = {field.name for field in fields(PlanRequest)}
    asked = {name: value for name, value in content["request"].items() if name in names}
    request = PlanRequest(**asked | {"pins": tuple(asked.get("pins", ()))})
    names = {field.name for field in fields(ProfileSettings)}
    grid = {"metadata": content.get("metadata"), "axis": content.get("axis")}
    known = grid | (record["profile"].get("settings") or {}) | (content.get("calibration") or {})
    given = {k: v for k, v in known.items() if k in names and v is not None}
    return request, ProfileSettings(**given)


def _typed(words: list[str]) -> str:
    return shlex.join(["lsq", *words])
