"""What the verbs do: each takes its options and a report, and gives what ``--json`` prints."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lsq_core import disk, jobs
from lsq_core.cli.convert import is_saved_folder, parse_target
from lsq_core.corpus.registry import corpus_identity
from lsq_core.errors import InputError, LsqError, translate_resource_errors
from lsq_core.evaluation.prediction import parse_loss
from lsq_core.evaluation.protocol import EvaluationRequest
from lsq_core.exports.weights.manifest import is_exported_folder
from lsq_core.files import resolve_path
from lsq_core.jsontext import write_json
from lsq_core.model.source import ModelSource
from lsq_core.planning.methods import PLANNERS
from lsq_core.planning.plan import Plan
from lsq_core.planning.problem import Problem
from lsq_core.planning.request import PlanRequest
from lsq_core.planning.saved import read_plan_file
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.progress import ProgressCallback
from lsq_core.quantization.registry import check_choice, quantizer_spec
from lsq_core.quantized.manifest import RUN_KEYS, is_quantized_folder, read_manifest
from lsq_core.session import Session
from lsq_core.shipped import import_measurements
from lsq_core.stages.export import evaluate_exported
from lsq_core.stages.model import find_published
from lsq_core.stages.plan import request_incompatibility
from lsq_core.stages.saved import evaluate_saved, load_saved
from lsq_core.store.database import resolve_database_path
from lsq_core.store.store import Store
from lsq_core.targets import check_file_target, check_folder_target
from lsq_core.units import parse_bytes

if TYPE_CHECKING:
    pass


def _workbench(options: argparse.Namespace, report: ProgressCallback) -> Session:
    keep = getattr(options, "checkpoint_folder", None)
    device = options.device, options.dtype
    return Session(_source(options), Store(options.db), *device, report, keep)


def _source(options: argparse.Namespace) -> ModelSource:
    return ModelSource(
        options.model, options.revision, options.trust_remote_code, options.allow_pickle
    )


def _settings(
    options: argparse.Namespace, bench: Session, quantizer: str | None, calibration: str | None
) -> ProfileSettings:
    """The profile settings that were given, and the model's defaults for the others."""
    chosen = {
        "quantizer": quantizer,
        "axis": options.axis,
        "metadata": options.metadata,
        "calibration": calibration,
        "samples": options.samples,
        "block_tokens": options.block_tokens,
    }
    options_given = {name: value for name, value in chosen.items() if value is not None}
    return replace(bench.default_settings, **options_given)


def _optional_source(options: argparse.Namespace) -> ModelSource | None:
    return _source(options) if options.model else None


def _plan_request(options: argparse.Namespace, method: str | None = None) -> PlanRequest:
    """What to plan for; a sweep gives one of its methods, and sizes of its own later."""
    one = method is None
    method = options.method if one else method
    if not method:
        raise InputError(f"Give a method with --method: {', '.join(PLANNERS)}.")
    return PlanRequest(
        method=method,
        base=options.base if one else None,
        budget=options.budget if one else None,
        boost_stop=options.boost_stop,
        top_m=options.top_m,
        metric=options.metric,
        seed=options.seed,
        exact=options.exact,
        pins=tuple(options.pin),
        low_bits=options.low_bits,
        high_bits=options.high_bits,
        group_size=options.group_size,
        loss=options.loss,
        ratios=options.ratios,
        clip=options.clip,
        ties=tuple(options.tie),
        serve=options.serve,
    )


def _plan(options: argparse.Namespace, bench: Session, settings: ProfileSettings) -> Plan:
    """The plan that was asked for, by a base, a budget or a loss."""
    request = _plan_request(options)
    if options.max_loss is not None:
        if options.base or options.budget:
            raise InputError("Give either --max-loss or a base or budget.")
        loss = parse_loss(options.max_loss)
        request = bench.request_for_max_loss(
            request, settings, loss, options.corpus, options.protocol
        )
    return bench.plan(request, settings)


def _evaluation(options: argparse.Namespace) -> EvaluationRequest:
    return EvaluationRequest(options.corpus, options.protocol, options.max_tokens)


# --- verbs ----------------------------------------------------------------------------------


def inspect(options: argparse.Namespace, report: ProgressCallback) -> dict:
    """Layers, parameters, bytes and modules, from the config alone for a remote model."""
    from lsq_core.model.loading import inspect_model

    source, store = _source(options), Store(options.db)
    info = find_published(source, store) or inspect_model(source)
    if info.fingerprint:
        store.save_model(info)
    return _describe_model(info) | {
        "modules": {m.name: [m.out_features, m.in_features] for m in info.matrices}
    }


def _describe_model(info: object) -> dict:
    return {
        "model": info.source,
        "fingerprint": info.fingerprint or None,
        "architecture": info.architecture,
        "layers": info.layers,
        "context": info.context,
        "parameters": info.parameters,
        "linear_parameters": info.linear_parameters,
        "covered": info.coverage,
        "left_out": list(info.left_out),
        "notes": list(info.notes),
        "file_bytes": info.file_bytes,
        "tied_embeddings": info.tied_embeddings,
    }


def profile(options: argparse.Namespace, report: ProgressCallback) -> dict:
    """Measure or find a profile."""
    from lsq_core.profiling.agreement import proxy_agreement

    bench = _workbench(options, report)
    settings = _settings(options, bench, options.quantizer, options.corpus)
    result = bench.profile(settings, options.metric)
    return {
        "profile": result.id,
        "model": _describe_model(bench.info),
        "settings": asdict(result.settings),
        "provenance": result.provenance,
        "proxies": proxy_agreement(result).to_dict("records"),
        "scores": result.values.to_dict("records"),
    }


def plan(options: argparse.Namespace, report: ProgressCallback) -> dict:
    """Make a plan, measuring what it needs first."""
    if options.out:
        check_file_target(options.out)
    bench = _workbench(options, report)
    settings = _settings(options, bench, options.profile_quantizer, options.calibration)
    made = _plan(options, bench, settings)
    content = made.to_json() | {
        "predicted": bench.predicted(made, settings, options.corpus, options.protocol),
        "model": bench.source.name,
        "fingerprint": bench.info.fingerprint,
        "profile": made.profile,
        "covered": bench.info.coverage,
    }
    if made.request.has_ties:
        content["free"] = bench.without_ties(made, settings, options.corpus, options.protocol)
    if options.out:
        write_json(options.out, content)
    return content


def run(options: argparse.Namespace, report: ProgressCallback) -> dict:
    """Plan or take a saved plan, quantize, evaluate, keep."""
    evaluation = _evaluation(options)
    corpus_identity(evaluation.corpus)  # reject a wrong path before anything is measured
    save = resolve_path(options.save) if options.save else None
    export = parse_target(options, save)
    resumed = getattr(options, "checkpoint_folder", None) and save and is_saved_folder(save)
    if save and not resumed:  # one that is may have saved its model already
        check_folder_target(save)
    (quantizer,) = _quantizers(options, [options.quantizer] if options.quantizer else [])
    bench = _workbench(options, report)
    settings = _settings(options, bench, options.profile_quantizer, options.calibration)
    if options.plan:
        if options.method or options.base or options.budget or options.max_loss:
            raise InputError("Give either a saved plan or a method with base, budget or max-loss.")
        made = _load_plan(options.plan, bench)
    else:
        if options.max_loss and quantizer != settings.quantizer:
            raise InputError(
                f"--max-loss predicts from the profile of {settings.quantizer}; give "
                f"--profile-quantizer {quantizer} to run with that quantizer."
            )
        if not options.max_loss:
            _check_compatibility(options, bench, settings, quantizer)
        made = _plan(options, bench, settings)
    check_choice(quantizer, made.choice, made.axis)
    predicted = _predicted(bench, made, quantizer, settings, evaluation)
    outcome = bench.run(made, quantizer, evaluation, save, settings=settings, export=export)
    return {
        "model": bench.source.name,
        "fingerprint": bench.info.fingerprint,
        "predicted": predicted,
    } | outcome


def _quantizers(options: argparse.Namespace, named: list[str]) -> list[str]:
    """The quantizers that were named, ``--hybrid`` being one way to name that."""
    if options.hybrid and "hybrid" in named:
        named = [name for name in named if name != "hybrid"]
    if options.hybrid and named and options.verb == "run":
        raise InputError(f"Give either --hybrid or --quantizer {named[0]}.")
    return [*named, "hybrid"] if options.hybrid else named or ["hqq"]


def _check_compatibility(
    options: argparse.Namespace, bench: Session, settings: ProfileSettings, quantizer: str
) -> None:
    """Tell what the quantizer can't do before a profile is measured for the plan."""
    request, problem = _plan_request(options), Problem(bench.config_info.matrices)
    reason = request_incompatibility(problem, request, quantizer, settings.axis)
    if reason:
        raise InputError(reason)


def _predicted(
    bench: Session,
    made: Plan,
    quantizer: str,
    settings: ProfileSettings,
    evaluation: EvaluationRequest,
) -> dict:
    """What is predicted of a plan by a quantizer, from the profile measured with that one."""
    if quantizer_spec(quantizer).calibrated:
        reason = f"{quantizer_spec(quantizer).title} has no profile to predict from."
        return {"reason": reason}
    measured_by = replace(settings, quantizer=quantizer)
    return bench.predicted(made, measured_by, evaluation.corpus, evaluation.protocol)


def _load_plan(path: Path, bench: Session) -> Plan:
    content = read_plan_file(path)
    return Plan.from_json(content, bench.config_info.matrices, bench.config_info.other_bytes)


def evaluate(options: argparse.Namespace, report: ProgressCallback) -> dict:
    """Evaluate a folder that ``run --save`` wrote, or a model in full precision."""
    request = _evaluation(options)
    source = _source(options)
    folder, device_and_dtype = source.local_folder, (options.device, options.dtype)
    if folder is not None and is_exported_folder(folder):
        return evaluate_exported(folder, request, Store(options.db), *device_and_dtype, report)
    if folder is not None and is_quantized_folder(folder):
        trusted = source.trust_remote_code
        return evaluate_saved(
            folder, request, Store(options.db), *device_and_dtype, report, trusted
        )
    return _workbench(options, report).evaluate_full(request)


def sweep(options: argparse.Namespace, report: ProgressCallback) -> dict:
    """Methods × bases and budgets × quantizers × texts, each run kept as it finishes."""
    from lsq_core import sweep as sweeps

    methods = sweeps.expand_methods(options.method)
    quantizers = _quantizers(options, options.quantizer)
    baseline_quantizers = sweeps.expand_baselines(options.baseline, quantizers)

    bench = _workbench(options, report)
    bench.cache_bytes = parse_bytes(options.remember)
    settings = _settings(options, bench, options.profile_quantizer, options.calibration)
    template = _plan_request(options, methods[0] if methods else "")
    texts = [
        EvaluationRequest(corpus, options.protocol, options.max_tokens)
        for corpus in options.corpus or ["stdlib"]
    ]
    items = sweeps.items(
        sweeps.requests(template, methods, options.base, options.budget), quantizers, texts
    )
    items += sweeps.baselines(template, options.base, options.budget, baseline_quantizers, texts)
    rows = sweeps.sweep(bench, items, settings)
    states = [row["state"] for row in rows]
    return {
        "model": bench.source.name,
        "fingerprint": bench.info.fingerprint,
        "counts": {state: states.count(state) for state in (*sweeps.FINISHED, sweeps.FAILED)},
        "items": rows,
    }


def audit(options: argparse.Namespace, report: ProgressCallback) -> dict:
    """What was stored, matrix by matrix, against what was planned."""
    from lsq_core.results.audit import audit_folder, audit_run

    store, folder = Store(options.db), resolve_path(options.target)
    if folder.is_dir() or "/" in options.target:
        return audit_folder(folder, store).to_json()
    device_and_dtype = options.device, options.dtype, report, options.trust_remote_code
    result = audit_run(options.target, store, _optional_source(options), *device_and_dtype)
    return result.to_json() | {"run": options.target}


def generate(options: argparse.Namespace, report: ProgressCallback) -> dict:
    """What the full-precision and the quantized model write after a prompt."""
    from lsq_core.evaluation.generation import compare_generation
    from lsq_core.stages.saved import open_original, rebuild_run

    store, source = Store(options.db), _optional_source(options)
    device_and_dtype, trusted = (options.device, options.dtype, report), options.trust_remote_code
    if options.saved is not None:
        manifest = read_manifest(resolve_path(options.saved), RUN_KEYS)
        run, fingerprint = manifest["run"], manifest["fingerprint"]
        source = source or ModelSource(manifest["source"], manifest["revision"], trusted)
        bench = open_original(source, fingerprint, store, *device_and_dtype)
        quantized = load_saved(options.saved, *device_and_dtype, trusted).model
    else:
        run = options.run
        bench, quantized = rebuild_run(run, source, store, *device_and_dtype, trusted)
    loaded = bench.loaded
    with translate_resource_errors(loaded.device):
        compared = compare_generation(
            loaded.model,
            quantized,
            bench.tokenizer,
            options.prompt,
            options.max_new_tokens,
            temperature=options.temperature,
            seed=options.seed,
            context=bench.info.context,
            progress=lambda done, total, message: report("generate", done, total, message),
        )
    return {"run": run, "model": bench.source.name} | bench.device_and_dtype | compared.to_json()


def jobs_verb(options: argparse.Namespace, report: ProgressCallback) -> dict:
    """The background jobs, newest first; ``--cancel`` ends one of them."""
    folder = disk.jobs_folder(Store(options.db))
    if options.cancel:
        jobs.cancel(jobs.find(folder, options.cancel))
    keys = ("id", "state", "stage", "done", "total", "message", "eta", "seconds", "command")
    return {
        "jobs": [{key: getattr(job, key) for key in keys} for job in jobs.list_jobs(folder)],
    }


def resume(options: argparse.Namespace, report: ProgressCallback) -> dict:
    """Let an interrupted job go on in the background, and follow it to its end."""
    folder = disk.jobs_folder(Store(options.db))
    job = jobs.follow(jobs.resume(jobs.find(folder, options.id)), report)
    if job.state != "done":
        raise LsqError(f"Job {job.id} ended as {job.state}: {job.message}")
    return {"job": job.id, "verb": job.verb, "result": job.result()}


def import_reference(options: argparse.Namespace, report: ProgressCallback) -> dict:
    """Take in published measurements, in the place of those taken in before."""
    from lsq_core.reference import importing

    store = Store(options.db)
    if options.download:
        return importing.import_download(store, report)
    return importing.import_reference(options.folder, store, report)


def disk_usage(options: argparse.Namespace, report: ProgressCallback) -> dict:
    """What is kept on disk; ``--prune`` deletes one of it."""
    store = Store(options.db)
    pruned = disk.prune(store, options.prune) if options.prune else None
    return {
        "pruned": asdict(pruned) if pruned else None,
        "kept": [asdict(item) for item in disk.list_disk_items(store)],
    }


def bench(options: argparse.Namespace, report: ProgressCallback) -> dict:
    """Measure ours and theirs in turns; ``--record`` keeps the ratios."""
    from lsq_core import bench as benchmarks

    rows = benchmarks.measure(
        options.only,
        options.repeats,
        lambda done, total, message: report("bench", done, total, message),
        options.model,
    )
    if options.record:
        benchmarks.record(rows)
    return benchmarks.to_json(rows)


def repair(options: argparse.Namespace, report: ProgressCallback) -> dict:
    """Copy what can be read of a damaged database into a new one."""
    from lsq_core.store import repair as repairs

    path = resolve_database_path(options.database)
    out = options.out or Path(f"{path}.repaired")
    tables = repairs.repair(path, resolve_database_path(out))
    return {"out": str(out), "tables": [asdict(table) for table in tables]}


def app(options: argparse.Namespace, report: ProgressCallback) -> dict:
    """Serve the app until stopped."""
    from lsq_core import serve

    store = Store(options.db)
    if options.shipped and import_measurements(store):
        report("store", 1, 1, "imported the measurements that come with the project")
    # Absolute, since the server changes its working directory.
    os.environ["LSQ_DB"] = str(store.path)
    if options.model:
        os.environ["LSQ_MODEL"] = ModelSource(options.model).name  # absolute
    serve.serve(options.address, options.port, options.token)
    return {}
