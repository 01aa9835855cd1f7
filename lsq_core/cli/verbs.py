"""The verbs: each takes its options and a report function, and returns what ``--json`` prints."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lsq_core import disk, jobs
from lsq_core.cli.convert import is_saved_folder, parse_target
from lsq_core.cli.requests import (
    evaluation_request,
    model_source,
    optional_model_source,
    plan_request,
    profile_settings,
    refine_request,
)
from lsq_core.corpus.registry import corpus_identity
from lsq_core.errors import InputError, LsqError, translate_resource_errors
from lsq_core.evaluation.prediction import parse_loss
from lsq_core.evaluation.protocol import EvaluationRequest
from lsq_core.exports.weights.manifest import is_exported_folder
from lsq_core.files import resolve_path
from lsq_core.jsontext import write_json
from lsq_core.model.gguf import SMOLLM2
from lsq_core.model.source import ModelSource
from lsq_core.planning.plan import Plan
from lsq_core.planning.problem import Problem
from lsq_core.planning.saved import read_plan_file
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.progress import ProgressCallback
from lsq_core.quantization.registry import check_choice, quantizer_spec
from lsq_core.quantized.manifest import RUN_KEYS, is_quantized_folder, read_manifest
from lsq_core.session import Session
from lsq_core.shipped import import_measurements
from lsq_core.stages.export import evaluate_exported
from lsq_core.stages.model import find_published
from lsq_core.stages.plan import check_budget, request_incompatibility
from lsq_core.stages.profile import measure_here
from lsq_core.stages.refine import refine_plan
from lsq_core.stages.saved import evaluate_saved, load_saved
from lsq_core.store.database import resolve_database_path
from lsq_core.store.store import Store
from lsq_core.targets import check_file_target, check_folder_target
from lsq_core.units import parse_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lsq_core.stages.profile import Measurer
    from lsq_core.sweep import SweepItem
    from lsq_core.sweep_batches import Executor


def _open_session(options: argparse.Namespace, report: ProgressCallback) -> Session:
    keep = getattr(options, "checkpoint_folder", None)
    source, store = model_source(options), Store(options.db)
    if keep is None and source.name == SMOLLM2 and import_measurements(store):
        report("store", 1, 1, "imported the measurements that come with the project")
    return Session(source, store, options.device, options.dtype, report, keep)


def _plan(options: argparse.Namespace, session: Session, settings: ProfileSettings) -> Plan:
    """Return the requested plan, for a base, a budget or a maximum loss."""
    request = plan_request(options)
    if options.max_loss is not None:
        if options.base or options.budget:
            raise InputError("Give either --max-loss or a base or budget.")
        loss = parse_loss(options.max_loss)
        request = session.request_for_max_loss(
            request, settings, loss, options.corpus, options.protocol
        )
    return session.plan(request, settings)


# --- verbs ----------------------------------------------------------------------------------


def inspect(options: argparse.Namespace, report: ProgressCallback) -> dict:
    """Describe layers, parameters, bytes and modules; of a remote model, from its config alone."""
    from lsq_core.model.loading import inspect_model

    source, store = model_source(options), Store(options.db)
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
    """Return a profile, measuring what it lacks."""
    from lsq_core.profiling.agreement import proxy_agreement

    session = _open_session(options, report)
    settings = profile_settings(options, session, options.quantizer, options.corpus)
    result = session.profile(settings, options.metric, _measurer(options))
    return {
        "profile": result.id,
        "model": _describe_model(session.info),
        "settings": result.settings.to_json(),
        "provenance": result.provenance,
        "proxies": proxy_agreement(result).to_dict("records"),
        "scores": result.values.to_dict("records"),
    }


def plan(options: argparse.Namespace, report: ProgressCallback) -> dict:
    """Make a plan, measuring what it needs first."""
    return _planned(options, report, _plan)


def refine(options: argparse.Namespace, report: ProgressCallback) -> dict:
    """Search for better plans within a budget; return the best one."""

    def search(_: argparse.Namespace, session: Session, settings: ProfileSettings) -> Plan:
        request = refine_request(options)
        return refine_plan(session, request, settings, options.minutes, options.text)

    return _planned(options, report, search)


def _planned(
    options: argparse.Namespace,
    report: ProgressCallback,
    make: Callable[[argparse.Namespace, Session, ProfileSettings], Plan],
) -> dict:
    """Return a plan as JSON with its predictions; also write it to ``--out`` if given."""
    if options.out:
        check_file_target(options.out)
    session = _open_session(options, report)
    settings = profile_settings(options, session, options.profile_quantizer, options.calibration)
    if options.rank:
        return _rank(options, session, settings)
    made = make(options, session, settings)
    content = made.to_json() | {
        "predicted": session.predicted(made, settings, options.corpus, options.protocol),
        "model": session.source.name,
        "fingerprint": session.info.fingerprint,
        "profile": made.profile,
        "covered": session.info.coverage,
    }
    if made.request.has_ties:
        content["free"] = session.without_ties(made, settings, options.corpus, options.protocol)
    if options.out:
        write_json(options.out, content)
    return content


def _rank(options: argparse.Namespace, session: Session, settings: ProfileSettings) -> dict:
    """Rank all methods within a budget, without measuring anything."""
    if options.out or options.max_loss or options.exact:
        raise InputError(
            "--rank takes a budget and compares the methods' usual plans; leave out --max-loss, "
            "--out and --exact."
        )
    request = plan_request(options, options.method or "uniform")
    request = replace(request, base=options.base, budget=options.budget)
    ranking = session.rank(request, settings, options.corpus, options.protocol)
    return {"model": session.source.name, "budget": options.budget, **ranking.to_json()}


def run(options: argparse.Namespace, report: ProgressCallback) -> dict:
    """Make or load a plan, quantize, evaluate, and store the result."""
    evaluation = evaluation_request(options)
    corpus_identity(evaluation.corpus)  # reject a wrong path before anything is measured
    save = resolve_path(options.save) if options.save else None
    export = parse_target(options, save)
    resumed = getattr(options, "checkpoint_folder", None) and save and is_saved_folder(save)
    if save and not resumed:  # a resumed run may already have saved its model
        check_folder_target(save)
    (quantizer,) = _quantizers(options, [options.quantizer] if options.quantizer else [])
    session = _open_session(options, report)
    settings = profile_settings(options, session, options.profile_quantizer, options.calibration)
    if options.plan:
        if options.method or options.base or options.budget or options.max_loss:
            raise InputError("Give either a saved plan or a method with base, budget or max-loss.")
        made = _load_plan(options.plan, session)
        check_choice(quantizer, made.choice, made.axis)
        session.check_text(evaluation)
    else:
        if options.max_loss and quantizer != settings.quantizer:
            raise InputError(
                f"--max-loss predicts from the profile of {settings.quantizer}; give "
                f"--profile-quantizer {quantizer} to run with that quantizer."
            )
        if not options.max_loss:
            _check_request(options, session, settings, quantizer)
        session.check_text(evaluation)
        made = _plan(options, session, settings)
        check_choice(quantizer, made.choice, made.axis)
    predicted = _predicted(session, made, quantizer, settings, evaluation)
    outcome = session.run(made, quantizer, evaluation, save, settings=settings, export=export)
    return {
        "model": session.source.name,
        "fingerprint": session.info.fingerprint,
        "predicted": predicted,
    } | outcome


def _quantizers(options: argparse.Namespace, named: list[str]) -> list[str]:
    """Return the given quantizers; ``--hybrid`` stands for the quantizer of that name."""
    if options.hybrid and "hybrid" in named:
        named = [name for name in named if name != "hybrid"]
    if options.hybrid and named and options.verb == "run":
        raise InputError(f"Give either --hybrid or --quantizer {named[0]}.")
    return [*named, "hybrid"] if options.hybrid else named or ["hqq"]


def _check_request(
    options: argparse.Namespace, session: Session, settings: ProfileSettings, quantizer: str
) -> None:
    """Reject budgets out of reach and plans the quantizer cannot apply, before any download."""
    request, problem = plan_request(options), Problem(session.config_info.matrices)
    reason = request_incompatibility(problem, request, quantizer, settings.axis)
    if reason:
        raise InputError(reason)
    check_budget(session, request, settings)


def _predicted(
    session: Session,
    made: Plan,
    quantizer: str,
    settings: ProfileSettings,
    evaluation: EvaluationRequest,
) -> dict:
    """Return the prediction for a plan with a quantizer, from the profile of that quantizer."""
    if quantizer_spec(quantizer).calibrated:
        reason = f"{quantizer_spec(quantizer).title} has no profile to predict from."
        return {"reason": reason}
    measured_by = replace(settings, quantizer=quantizer)
    return session.predicted(made, measured_by, evaluation.corpus, evaluation.protocol)


def _load_plan(path: Path, session: Session) -> Plan:
    content = read_plan_file(path)
    return Plan.from_json(content, session.config_info.matrices, session.config_info.other_bytes)


def evaluate(options: argparse.Namespace, report: ProgressCallback) -> dict:
    """Evaluate a saved or exported model, or a model in full precision."""
    request = evaluation_request(options)
    source = model_source(options)
    folder, device_and_dtype = source.local_folder, (options.device, options.dtype)
    if folder is not None and is_exported_folder(folder):
        return evaluate_exported(folder, request, Store(options.db), *device_and_dtype, report)
    if folder is not None and is_quantized_folder(folder):
        trusted = source.trust_remote_code
        return evaluate_saved(
            folder, request, Store(options.db), *device_and_dtype, report, trusted
        )
    return _open_session(options, report).evaluate_full(request)


def noise(options: argparse.Namespace, report: ProgressCallback) -> dict:
    """Measure how much a model's figures change with the arithmetic alone."""
    session = _open_session(options, report)
    floor = session.measure_noise(evaluation_request(options), options.base)
    return {
        "model": session.source.name,
        "fingerprint": session.info.fingerprint,
        "noise": floor.to_json(),
        "conditions": [asdict(condition) for condition in floor.conditions],
        "provenance": dict(floor.provenance),
    }


def sweep(options: argparse.Namespace, report: ProgressCallback) -> dict:
    """Run methods × bases and budgets × quantizers × texts, storing each run as it finishes."""
    from lsq_core import sweep as sweeps

    methods = sweeps.expand_methods(options.method)
    quantizers = _quantizers(options, options.quantizer)
    baseline_quantizers = sweeps.expand_baselines(options.baseline, quantizers)

    session = _open_session(options, report)
    session.cache_bytes = parse_bytes(options.remember)
    settings = profile_settings(options, session, options.profile_quantizer, options.calibration)
    template = plan_request(options, methods[0] if methods else "")
    texts = [
        EvaluationRequest(corpus, options.protocol, options.max_tokens)
        for corpus in options.corpus or ["stdlib"]
    ]
    items = sweeps.items(
        sweeps.requests(template, methods, options.base, options.budget), quantizers, texts
    )
    items += sweeps.baselines(template, options.base, options.budget, baseline_quantizers, texts)
    rows = sweeps.sweep(session, items, settings, _executor(options, items, settings))
    states = [row["state"] for row in rows]
    return {
        "model": session.source.name,
        "fingerprint": session.info.fingerprint,
        "counts": {state: states.count(state) for state in (*sweeps.FINISHED, sweeps.FAILED)},
        "items": rows,
    }


def _executor(
    options: argparse.Namespace, items: Sequence[SweepItem], settings: ProfileSettings
) -> Executor | None:
    """Return what runs a sweep's items on Ray; None to run them in this process."""
    if not _is_on_ray(options):
        return None
    from lsq_core.distributed.executor import RayExecutor

    quantizers = sorted({item.quantizer for item in items})
    return RayExecutor(options.ray, settings, quantizers, options.actor_cores, options.actors)


def _measurer(options: argparse.Namespace) -> Measurer:
    """Return what measures the missing metrics of a profile, in this process or on Ray."""
    if not _is_on_ray(options):
        return measure_here
    from lsq_core.distributed.profiles import RayProfiler

    return RayProfiler(options.ray, options.actor_cores, options.actors)


def _is_on_ray(options: argparse.Namespace) -> bool:
    if options.ray is None and (options.actor_cores is not None or options.actors is not None):
        raise InputError("--actors and --actor-cores need --ray.")
    return options.ray is not None


def audit(options: argparse.Namespace, report: ProgressCallback) -> dict:
    """Compare what was stored with what was planned, matrix by matrix."""
    from lsq_core.results.audit import audit_folder, audit_run

    store, folder = Store(options.db), resolve_path(options.target)
    if folder.is_dir() or "/" in options.target:
        return audit_folder(folder, store).to_json()
    device_and_dtype = options.device, options.dtype, report, options.trust_remote_code
    result = audit_run(options.target, store, optional_model_source(options), *device_and_dtype)
    return result.to_json() | {"run": options.target}


def generate(options: argparse.Namespace, report: ProgressCallback) -> dict:
    """Continue a prompt with the full-precision and the quantized model."""
    from lsq_core.evaluation.generation import compare_generation
    from lsq_core.stages.saved import open_original, rebuild_run

    store, source = Store(options.db), optional_model_source(options)
    device_and_dtype, trusted = (options.device, options.dtype, report), options.trust_remote_code
    if options.saved is not None:
        manifest = read_manifest(resolve_path(options.saved), RUN_KEYS)
        run, fingerprint = manifest["run"], manifest["fingerprint"]
        source = source or ModelSource(manifest["source"], manifest["revision"], trusted)
        session = open_original(source, fingerprint, store, *device_and_dtype)
        quantized = load_saved(options.saved, *device_and_dtype, trusted).model
    else:
        run = options.run
        session, quantized = rebuild_run(run, source, store, *device_and_dtype, trusted)
    loaded = session.loaded
    with translate_resource_errors(loaded.device):
        compared = compare_generation(
            loaded.model,
            quantized,
            session.tokenizer,
            options.prompt,
            options.max_new_tokens,
            temperature=options.temperature,
            seed=options.seed,
            context=session.info.context,
            progress=lambda done, total, message: report("generate", done, total, message),
        )
    return (
        {"run": run, "model": session.source.name} | session.device_and_dtype | compared.to_json()
    )


def jobs_verb(options: argparse.Namespace, report: ProgressCallback) -> dict:
    """List the background jobs, newest first; ``--cancel`` cancels one of them first."""
    folder = disk.jobs_folder(Store(options.db))
    if options.cancel:
        jobs.cancel(jobs.find(folder, options.cancel))
    keys = ("id", "state", "stage", "done", "total", "message", "eta", "seconds", "command")
    return {
        "jobs": [{key: getattr(job, key) for key in keys} for job in jobs.list_jobs(folder)],
    }


def resume(options: argparse.Namespace, report: ProgressCallback) -> dict:
    """Resume an interrupted job in the background, and follow it until it ends."""
    folder = disk.jobs_folder(Store(options.db))
    job = jobs.follow(jobs.resume(jobs.find(folder, options.id)), report)
    if job.state != "done":
        raise LsqError(f"Job {job.id} ended as {job.state}: {job.message}")
    return {"job": job.id, "verb": job.verb, "result": job.result()}


def import_reference(options: argparse.Namespace, report: ProgressCallback) -> dict:
    """Import published measurements, replacing those imported before."""
    from lsq_core.reference import importing

    store = Store(options.db)
    if options.download:
        return importing.import_download(store, report)
    return importing.import_reference(options.folder, store, report)


def disk_usage(options: argparse.Namespace, report: ProgressCallback) -> dict:
    """List what is stored on disk; ``--prune`` deletes one item first."""
    store = Store(options.db)
    pruned = disk.prune(store, options.prune) if options.prune else None
    return {
        "pruned": asdict(pruned) if pruned else None,
        "kept": [asdict(item) for item in disk.list_disk_items(store)],
    }


def bench(options: argparse.Namespace, report: ProgressCallback) -> dict:
    """Benchmark this project against other tools; ``--record`` stores the ratios."""
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
    """Copy the readable part of a damaged database into a new one."""
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
