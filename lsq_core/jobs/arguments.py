"""Command lines for jobs to run and for users to copy."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from lsq_core.bits import PAPER
from lsq_core.evaluation.protocol import EvaluationRequest
from lsq_core.exports.weights.registry import ExportTarget
from lsq_core.model.source import ModelSource
from lsq_core.planning.methods import PLANNERS
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.store.models import PUBLISHED

#: Fields of a plan request that correspond to options with a value.
_REQUEST_OPTIONS = ("base", "budget", "boost_stop", "top_m", "metric", "seed")
#: The same for high-impact rows.
_ROW_OPTIONS = ("low_bits", "high_bits", "group_size", "loss", "ratios")


def model_arguments(source: ModelSource, device: str) -> list[str]:
    """Return the options that select the model and the device."""
    argv = ["--model", source.name, "--device", device]
    argv += ["--revision", source.revision] if source.revision else []
    argv += ["--trust-remote-code"] if source.trust_remote_code else []
    return argv + (["--allow-pickle"] if source.allow_pickle else [])


def profile_arguments(settings: ProfileSettings) -> list[str]:
    """Return the options of ``profile``."""
    argv = ["--corpus", settings.calibration, "--quantizer", settings.quantizer]
    return argv + _grid_arguments(settings) + _ladder_arguments(settings.ladder)


def _ladder_arguments(ladder: str) -> list[str]:
    return ["--ladder", ladder] if ladder != PAPER else []


def _grid_arguments(settings: ProfileSettings) -> list[str]:
    return [
        *("--axis", str(settings.axis), "--metadata", settings.metadata),
        *("--samples", str(settings.samples), "--block-tokens", str(settings.block_tokens)),
    ]


def plan_arguments(request: PlanRequest, settings: ProfileSettings) -> list[str]:
    """Return the options of ``plan`` and ``run`` that describe a plan; defaults are left out."""
    argv = ["--method", request.method]
    argv += _non_default_options(request, _REQUEST_OPTIONS)
    argv += ["--exact"] if request.exact else []
    return argv + row_arguments(request) + _restriction_arguments(request, settings)


def _restriction_arguments(request: PlanRequest, settings: ProfileSettings) -> list[str]:
    """Return the options that restrict a plan, and those of its profile."""
    argv = [word for pin in request.pins for word in ("--pin", pin)]
    argv += [word for tie in request.ties for word in ("--tie", tie)]
    argv += ["--serve", request.serve] if request.serve else []
    argv += ["--start", request.start] if request.start else []
    argv += ["--calibration", settings.calibration, "--profile-quantizer", settings.quantizer]
    return argv + _grid_arguments(settings) + _ladder_arguments(request.ladder)


def refine_arguments(
    request: PlanRequest, settings: ProfileSettings, minutes: float, text: str | None = None
) -> list[str]:
    """Return the options of ``refine`` for the budget, restrictions and start of a request."""
    argv = ["--minutes", f"{minutes:g}", "--budget", request.budget]
    argv += ["--text", text] if text else []
    return argv + _restriction_arguments(request, settings)


def row_arguments(request: PlanRequest) -> list[str]:
    """Return the options of ``plan``, ``run`` and ``sweep`` for high-impact rows."""
    return _non_default_options(request, _ROW_OPTIONS) + (["--clip"] if request.clip else [])


def _non_default_options(request: PlanRequest, names: Sequence[str]) -> list[str]:
    """Return the options whose values differ from the defaults."""
    default = asdict(PlanRequest(request.method))
    argv = []
    for name in names:
        if getattr(request, name) != default[name]:
            argv += [f"--{name.replace('_', '-')}", str(getattr(request, name))]
    return argv


def evaluation_arguments(
    request: EvaluationRequest,
    quantizer: str,
    save: Path | None,
    export: ExportTarget | None = None,
) -> list[str]:
    """Return the options of ``run`` for quantization, evaluation and saving."""
    argv = ["--quantizer", quantizer, "--corpus", request.corpus, "--protocol", request.protocol]
    argv += ["--max-tokens", str(request.max_tokens)] if request.max_tokens else []
    argv += ["--save", str(save)] if save else []
    return argv + (["--format", export.format, "--crossing", export.crossing] if export else [])


def sweep_arguments(
    methods: Sequence[str],
    bases: Sequence[str],
    budgets: Sequence[str],
    quantizers: Sequence[str],
    baselines: Sequence[str],
    corpora: Sequence[str],
    evaluation: EvaluationRequest,
    settings: ProfileSettings,
    rows: PlanRequest | None = None,
) -> list[str]:
    """Return the options of ``sweep``.

    ``evaluation`` describes how each corpus is evaluated, ``rows`` the plans of high-impact rows.
    """
    repeated = {
        "--method": methods,
        "--base": bases,
        "--budget": budgets,
        "--quantizer": quantizers,
        "--baseline": baselines,
        "--corpus": corpora,
    }
    argv = [word for option, values in repeated.items() for v in values for word in (option, v)]
    argv += row_arguments(rows) if rows else []
    argv += ["--protocol", evaluation.protocol]
    argv += ["--max-tokens", str(evaluation.max_tokens)] if evaluation.max_tokens else []
    argv += ["--calibration", settings.calibration, "--profile-quantizer", settings.quantizer]
    return argv + _grid_arguments(settings) + _ladder_arguments(settings.ladder)


def ray_arguments(address: str | None, cores: int | None = None) -> list[str]:
    """Return the options that let ``sweep`` run on Ray; empty without an address."""
    if address is None:
        return []
    return ["--ray", address, *(["--actor-cores", str(cores)] if cores else [])]


def reproduce_command(record: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the command line that repeats a stored run, or for a published run makes its plan.

    If the method is not implemented here, as for some published runs, or the plan's request was not
    stored, return a shell comment that says so.

    ``record`` is from :meth:`lsq_core.store.store.Store.record`.
    """
    run, stored, model = record["run"], record["evaluation"], record["model"]
    if run["method"] not in PLANNERS:
        return f"# {run['method']} is not implemented here; this is a published run."
    if not (record["plan"]["content"] or {}).get("request"):
        return "# The request of this run's plan was not stored."
    source = ModelSource(model["source"], model["revision"])
    request, settings = _stored_request(record)
    if run["fingerprint"].startswith(PUBLISHED):
        argv = ["plan", "--model", source.name, *plan_arguments(request, settings)]
        if not record["profile"]:
            argv = argv[: argv.index("--calibration")]  # use the model's own profile
        return f"{_shell_command(argv)}  # the plan only: there are no local weights"
    provenance = stored["provenance"]
    evaluation = EvaluationRequest(
        stored["corpus"], stored["protocol"].partition("-")[0], provenance.get("max_tokens")
    )
    argv = ["run", *model_arguments(source, run["device"]), "--dtype", run["dtype"]]
    argv += plan_arguments(request, settings)
    save, export = None, None
    if run.get("exported_from"):
        save, export = Path(run["saved_to"] or "exported"), ExportTarget(run["format"])
    return _shell_command(argv + evaluation_arguments(evaluation, run["quantizer"], save, export))


def _stored_request(record: Mapping[str, Mapping[str, Any]]) -> tuple[PlanRequest, ProfileSettings]:
    """Return the plan request and the profile settings of a run, as far as they were stored."""
    content = record["plan"]["content"]
    names = {field.name for field in fields(PlanRequest)}
    request_fields = {name: value for name, value in content["request"].items() if name in names}
    request = PlanRequest(**request_fields)
    names = {field.name for field in fields(ProfileSettings)}
    grid = {"metadata": content.get("metadata"), "axis": content.get("axis")}
    stored_fields = (
        grid | (record["profile"].get("settings") or {}) | (content.get("calibration") or {})
    )
    fields_given = {k: v for k, v in stored_fields.items() if k in names and v is not None}
    return request, ProfileSettings(**fields_given)


def _shell_command(argv: list[str]) -> str:
    return shlex.join(["lsq", *argv])
