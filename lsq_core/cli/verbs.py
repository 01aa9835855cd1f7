"""What the verbs do: each takes its options and a report, and gives what ``--json`` prints."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lsq_core import disk, jobs
from lsq_core.config import parse_bytes
from lsq_core.corpus import corpus_identity
from lsq_core.database import given_database
from lsq_core.errors import InputError, LsqError, reason_of
from lsq_core.files import given_path, write_bytes
from lsq_core.jsontext import write_json
from lsq_core.model import MANIFEST, ModelSource
from lsq_core.pipeline import (
    EvaluationRequest,
    Report,
    Workbench,
    evaluate_saved,
    find_published,
    in_a_sentence,
    load_saved,
    refusal_of,
)
from lsq_core.plan import PLANNERS, Plan, PlanRequest, Problem
from lsq_core.predict import parse_loss
from lsq_core.profile import Profile, ProfileSettings
from lsq_core.quantize import about, check_choice
from lsq_core.quantize.manifest import RUN, is_quantized_folder, read_manifest
from lsq_core.store import PUBLISHED, Store
from lsq_core.targets import check_file_target, check_folder_target

if TYPE_CHECKING:
    import pandas as pd


def _workbench(options: argparse.Namespace, report: Report) -> Workbench:
    keep = getattr(options, "folder_to_keep", None)
    device = options.device, options.dtype
    return Workbench(_source(options), Store(options.db), *device, report, keep)


def _source(options: argparse.Namespace) -> ModelSource:
    return ModelSource(
        options.model, options.revision, options.trust_remote_code, options.allow_pickle
    )


def _settings(
    options: argparse.Namespace, bench: Workbench, quantizer: str | None, calibration: str | None
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
    given = {name: value for name, value in chosen.items() if value is not None}
    return replace(bench.default_settings, **given)


def _source_if_given(options: argparse.Namespace) -> ModelSource | None:
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
    )


def _plan(
    options: argparse.Namespace, bench: Workbench, settings: ProfileSettings
) -> tuple[Plan, Profile | None]:
    """The plan that was asked for, by a base, a budget or a loss, and its profile."""
    request = _plan_request(options)
    if options.max_loss is not None:
        if options.base or options.budget:
            raise InputError("Give --max-loss, or a base or budget, but not both.")
        loss = parse_loss(options.max_loss)
        request = bench.request_within(request, settings, loss, options.corpus, options.protocol)
    return bench.plan(request, settings)


def _evaluation(options: argparse.Namespace) -> EvaluationRequest:
    return EvaluationRequest(options.corpus, options.protocol, options.max_tokens)


# --- verbs ----------------------------------------------------------------------------------


def inspect(options: argparse.Namespace, report: Report) -> dict:
    """Layers, parameters, bytes and modules, from the config alone for a remote model."""
    from lsq_core.load import inspect_model

    source, store = _source(options), Store(options.db)
    info = find_published(source, store) or inspect_model(source)
    if info.fingerprint:
        store.save_model(info)
    return _described(info) | {
        "modules": {m.name: [m.out_features, m.in_features] for m in info.matrices}
    }


def _described(info: object) -> dict:
    return {
        "model": info.source,
        "fingerprint": info.fingerprint or None,
        "architecture": info.architecture,
        "layers": info.layers,
        "context": info.context,
        "parameters": info.parameters,
        "linear_parameters": info.linear_parameters,
        "covered": info.covered,
        "left_out": list(info.left_out),
        "notes": list(info.notes),
        "file_bytes": info.file_bytes,
        "tied_embeddings": info.tied_embeddings,
    }


def profile(options: argparse.Namespace, report: Report) -> dict:
    """Measure or find a profile."""
    from lsq_core.profile.agreement import proxy_agreement

    bench = _workbench(options, report)
    settings = _settings(options, bench, options.quantizer, options.corpus)
    found = bench.profile(settings, options.metric)
    return {
        "profile": found.id,
        "model": _described(bench.info),
        "settings": asdict(found.settings),
        "provenance": found.provenance,
        "proxies": proxy_agreement(found).to_dict("records"),
        "scores": found.values.to_dict("records"),
    }


def plan(options: argparse.Namespace, report: Report) -> dict:
    """Make a plan, measuring what it needs first."""
    if options.out:
        check_file_target(options.out)
    bench = _workbench(options, report)
    settings = _settings(options, bench, options.profile_quantizer, options.calibration)
    made, used = _plan(options, bench, settings)
    content = made.to_json() | {
        "predicted": bench.predicted(made, settings, options.corpus, options.protocol),
        "model": bench.source.name,
        "fingerprint": bench.info.fingerprint,
        "profile": used.id if used else None,
        "covered": bench.info.covered,
    }
    if options.out:
        write_json(options.out, content)
    return content


def run(options: argparse.Namespace, report: Report) -> dict:
    """Plan or take a saved plan, quantize, evaluate, keep."""
    evaluation = _evaluation(options)
    corpus_identity(evaluation.corpus)  # a wrong path is told before anything is measured
    save = given_path(options.save) if options.save else None
    resumed = getattr(options, "folder_to_keep", None) and save and is_quantized_folder(save)
    if save and not resumed:  # one that is may have saved its model already
        check_folder_target(save)
    (quantizer,) = _quantizers(options, [options.quantizer] if options.quantizer else [])
    bench = _workbench(options, report)
    settings = _settings(options, bench, options.profile_quantizer, options.calibration)
    if options.plan:
        if options.method or options.base or options.budget or options.max_loss:
            raise InputError(
                "Give a saved plan, or a method with base, budget or max-loss, but not both."
            )
        made, used = _saved_plan(options.plan, bench), None
    else:
        if options.max_loss and quantizer != settings.quantizer:
            raise InputError(
                f"--max-loss predicts by the profile of {settings.quantizer}; give "
                f"--profile-quantizer {quantizer} to run by that quantizer."
            )
        if not options.max_loss:
            _refuse_early(options, bench, settings, quantizer)
        made, used = _plan(options, bench, settings)
    check_choice(quantizer, made.choice, made.axis)
    predicted = _predicted(bench, made, quantizer, settings, evaluation)
    outcome = bench.run(made, used, quantizer, evaluation, save, settings=settings)
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
        raise InputError(f"Give --hybrid or --quantizer {named[0]}, but not both.")
    return [*named, "hybrid"] if options.hybrid else named or ["hqq"]


def _refuse_early(
    options: argparse.Namespace, bench: Workbench, settings: ProfileSettings, quantizer: str
) -> None:
    """Tell what the quantizer can't do before a profile is measured for the plan."""
    request, problem = _plan_request(options), Problem(bench.outline.matrices)
    reason = refusal_of(problem, request, quantizer, settings.axis)
    if reason:
        raise InputError(reason)


def _predicted(
    bench: Workbench,
    made: Plan,
    quantizer: str,
    settings: ProfileSettings,
    evaluation: EvaluationRequest,
) -> dict:
    """What is predicted of a plan by a quantizer, from the profile measured with that one."""
    if about(quantizer).calibrated:
        reason = f"{about(quantizer).title} has no profile, which predictions are made from."
        return {"reason": reason}
    measured_by = replace(settings, quantizer=quantizer)
    return bench.predicted(made, measured_by, evaluation.corpus, evaluation.protocol)


def _saved_plan(path: Path, bench: Workbench) -> Plan:
    try:
        content = json.loads(path.read_text("utf8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:  # also a number or nesting beyond Python's limits
        raise InputError(f"{path} is not a plan: it holds no JSON ({reason_of(error)}).") from error
    return Plan.from_json(content, bench.outline.matrices, bench.outline.other_bytes)


def evaluate(options: argparse.Namespace, report: Report) -> dict:
    """Evaluate a folder that ``run --save`` wrote, or a model in full precision."""
    request = _evaluation(options)
    source = _source(options)
    folder = source.local_folder
    if folder is not None and (folder / MANIFEST).is_file():
        place = options.device, options.dtype
        trusted = source.trust_remote_code
        return evaluate_saved(folder, request, Store(options.db), *place, report, trusted)
    return _workbench(options, report).evaluate_full(request)


def sweep(options: argparse.Namespace, report: Report) -> dict:
    """Methods × bases and budgets × quantizers × texts, each run kept as it finishes."""
    from lsq_core import sweep as sweeps

    methods = sweeps.all_methods(options.method)
    quantizers = _quantizers(options, options.quantizer)
    others = sweeps.all_baselines(options.baseline, quantizers)

    bench = _workbench(options, report)
    bench.remembered_bytes = parse_bytes(options.remember)
    settings = _settings(options, bench, options.profile_quantizer, options.calibration)
    like = _plan_request(options, methods[0] if methods else "")
    texts = [
        EvaluationRequest(corpus, options.protocol, options.max_tokens)
        for corpus in options.corpus or ["stdlib"]
    ]
    asked = sweeps.items(
        sweeps.requests(like, methods, options.base, options.budget), quantizers, texts
    )
    asked += sweeps.baselines(like, options.base, options.budget, others, texts)
    rows = sweeps.sweep(bench, asked, settings)
    states = [row["state"] for row in rows]
    return {
        "model": bench.source.name,
        "fingerprint": bench.info.fingerprint,
        "counts": {state: states.count(state) for state in (*sweeps.FINISHED, sweeps.FAILED)},
        "items": rows,
    }


def audit(options: argparse.Namespace, report: Report) -> dict:
    """What was stored, matrix by matrix, against what was planned."""
    from lsq_core.audit import audit_folder, audit_run

    store, folder = Store(options.db), given_path(options.target)
    if folder.is_dir() or "/" in options.target:
        return audit_folder(folder, store).to_json()
    place = options.device, options.dtype, report, options.trust_remote_code
    found = audit_run(options.target, store, _source_if_given(options), *place)
    return found.to_json() | {"run": options.target}


def generate(options: argparse.Namespace, report: Report) -> dict:
    """What the full-precision and the quantized model write after a prompt."""
    from lsq_core.generate import compare_generation
    from lsq_core.pipeline import original, remake

    store, source = Store(options.db), _source_if_given(options)
    place, trusted = (options.device, options.dtype, report), options.trust_remote_code
    if options.saved is not None:
        manifest = read_manifest(given_path(options.saved), RUN)
        run, fingerprint = manifest["run"], manifest["fingerprint"]
        source = source or ModelSource(manifest["source"], manifest["revision"], trusted)
        bench = original(source, fingerprint, store, *place)
        quantized = load_saved(options.saved, *place, trusted).model
    else:
        run = options.run
        bench, quantized = remake(run, source, store, *place, trusted)
    loaded = bench.loaded
    with in_a_sentence(loaded.device):
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
    return {"run": run, "model": bench.source.name} | bench.place | compared.to_json()


def jobs_verb(options: argparse.Namespace, report: Report) -> dict:
    """The background jobs, newest first; ``--cancel`` ends one of them."""
    folder = disk.jobs_folder(Store(options.db))
    if options.cancel:
        jobs.cancel(jobs.find(folder, options.cancel))
    keys = ("id", "state", "stage", "done", "total", "message", "eta", "seconds", "command")
    return {
        "jobs": [{key: getattr(job, key) for key in keys} for job in jobs.list_jobs(folder)],
    }


def resume(options: argparse.Namespace, report: Report) -> dict:
    """Let an interrupted job go on in the background, and follow it to its end."""
    folder = disk.jobs_folder(Store(options.db))
    job = jobs.follow(jobs.resume(jobs.find(folder, options.id)), report)
    if job.state != "done":
        raise LsqError(f"Job {job.id} ended as {job.state}: {job.message}")
    return {"job": job.id, "verb": job.verb, "result": job.result()}


def results(options: argparse.Namespace, report: Report) -> dict:
    """Every run, newest first: measured here, or published."""
    frame = _results(options)
    frame = frame.assign(created=frame["created"].astype(str))
    return {"results": frame.astype(object).where(frame.notna(), None).to_dict("records")}


def _results(options: argparse.Namespace) -> pd.DataFrame:
    frame = Store(options.db).results(origin="published" if options.published else "measured")
    if options.model:
        names = options.model, ModelSource(options.model).name, PUBLISHED + options.model
        frame = frame[frame["model"].isin(names)]
    return frame


def export(options: argparse.Namespace, report: Report) -> dict:
    """All runs into a table, or one run into a report or BibTeX, as the file's name ends."""
    from lsq_core import export as exports

    tables = {".csv": exports.csv_bytes, ".parquet": exports.parquet_bytes}
    pages = {".html": _report_of, ".bib": lambda store, record: exports.bibtex(record)}
    kind = options.out.suffix.lower()
    if kind not in tables | pages:
        raise InputError(f"{options.out} ends in none of {', '.join(tables | pages)}.")
    if (kind in pages) != bool(options.run):
        needs = "a run with --run" if kind in pages else "no --run: it holds all runs"
        raise InputError(f"A {kind} file needs {needs}.")
    check_file_target(options.out)
    if kind in tables:
        frame = _results(options)
        content, count = tables[kind](frame), len(frame)
    else:
        store = Store(options.db)
        record = store.record(_evaluation_of(store, options.run))
        content, count = pages[kind](store, record).encode("utf8"), 1
    write_bytes(options.out, content, new=True)
    return {"out": str(options.out), "runs": count, "bytes": len(content)}


def _evaluation_of(store: Store, run: str) -> str:
    """The newest evaluation of a run that wasn't deleted."""
    frame = store.results(origin=None)
    found = frame.loc[frame["run"] == run, "evaluation"]
    if found.empty:
        raise InputError(f"There is no run '{run}'; results --json lists them.")
    return found.iloc[0]


def _report_of(store: Store, record: dict) -> str:
    from lsq_core import charts
    from lsq_core.report import run_report
    from lsq_core.ui.arguments import reproducing

    own, run = record["evaluation"], record["run"]
    runs = store.results(run["fingerprint"], origin=run["origin"])
    same = ["corpus_sha256", "protocol", "tokens"]
    mine = runs.loc[runs["evaluation"] == own["id"], same].iloc[0]
    beside = runs[[row.equals(mine) for _, row in runs[same].iterrows()]]
    figure = charts.perplexity_by_size(charts.labelled(beside), [own["id"]], charts.BITS)
    matrices = store.model(run["fingerprint"]).matrices
    return run_report(record, matrices, reproducing(record), figure)


def import_reference(options: argparse.Namespace, report: Report) -> dict:
    """Take in published measurements, in the place of those taken in before."""
    from lsq_core import reference

    store = Store(options.db)
    if options.download:
        return reference.import_download(store, report)
    return reference.import_reference(options.folder, store, report)


def on_disk(options: argparse.Namespace, report: Report) -> dict:
    """What is kept on disk; ``--prune`` deletes one of it."""
    store = Store(options.db)
    pruned = disk.prune(store, options.prune) if options.prune else None
    return {
        "pruned": asdict(pruned) if pruned else None,
        "kept": [asdict(item) for item in disk.kept_on_disk(store)],
    }


def bench(options: argparse.Namespace, report: Report) -> dict:
    """Measure ours and theirs in turns; ``--record`` keeps the ratios."""
    from lsq_core import bench as benchmarks

    rows = benchmarks.measure(
        options.only,
        options.repeats,
        lambda done, total, message: report("bench", done, total, message),
    )
    if options.record:
        benchmarks.record(rows)
    return benchmarks.to_json(rows)


def repair(options: argparse.Namespace, report: Report) -> dict:
    """Copy what can be read of a damaged database into a new one."""
    from lsq_core import repair as repairs

    path = given_database(options.database)
    out = options.out or Path(f"{path}.repaired")
    tables = repairs.repair(path, given_database(out))
    return {"out": str(out), "tables": [asdict(table) for table in tables]}


def app(options: argparse.Namespace, report: Report) -> dict:
    """Serve the app until stopped."""
    from lsq_core import serve

    if options.db:
        os.environ["LSQ_DB"] = str(Store(options.db).path)
    serve.serve(options.address, options.port, options.token)
    return {}
