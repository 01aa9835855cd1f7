"""Evaluate models on texts, and record the provenance of the figures."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lsq_core.errors import translate_resource_errors
from lsq_core.evaluation.noise import describe_unknown
from lsq_core.evaluation.protocol import (
    EvaluationRequest,
    EvaluationText,
    Protocol,
    make_windows,
)
from lsq_core.evaluation.reference_states import ReferenceStates, states_folder
from lsq_core.jsontext import json_text
from lsq_core.progress import ProgressCallback, ignore_progress
from lsq_core.provenance import (
    evaluation_dependencies,
    machine,
    run_dependencies,
    versions,
)
from lsq_core.stages.model import OpenModel

if TYPE_CHECKING:
    from torch import nn

    from lsq_core.corpus.tokens import TokenStream
    from lsq_core.evaluation.result import Evaluation, EvaluationPair
    from lsq_core.store.store import Store


def evaluate_on_texts(
    models: Sequence[nn.Module],
    tokenizer: object,
    context: int,
    requests: Sequence[EvaluationRequest],
    streams: Sequence[TokenStream],
    *,
    reference: nn.Module | None = None,
    where: dict[str, str],
    report: ProgressCallback = ignore_progress,
    checkpoints: Sequence[Sequence[Path | None]] | None = None,
    kept: Sequence[ReferenceStates] | None = None,
) -> Iterator[list[EvaluationPair]]:
    """Evaluate causal models on texts, with the provenance of the figures filled in.

    Yields as :func:`lsq_core.evaluation.perplexity.evaluate_models`.
    """
    from lsq_core.evaluation.perplexity import evaluate_models

    found = evaluate_models(
        models,
        _texts(streams, requests, context),
        bos=tokenizer.bos_token_id,
        reference=reference,
        progress=lambda done, total, message: report("evaluate", done, total, message),
        checkpoints=checkpoints,
        kept=kept,
    )
    return _with_provenance(found, streams, requests, where, tokenizer)


def check_text(model: OpenModel, request: EvaluationRequest) -> None:
    """Load and check a text before anything is measured on it.

    Raises
    ------
    InputError
        If it cannot be loaded, or is too short for its protocol.
    """
    tokens = len(model.stream(request).ids) + (model.tokenizer.bos_token_id is not None)
    make_windows(tokens, _protocol(request, model.info.context))


def _texts(
    streams: Sequence[TokenStream], requests: Sequence[EvaluationRequest], context: int
) -> list[EvaluationText]:
    pairs = zip(streams, requests, strict=True)
    return [EvaluationText(own.ids, _protocol(r, context)) for own, r in pairs]


def _protocol(request: EvaluationRequest, context: int) -> Protocol:
    return Protocol.named(request.protocol, context)


def _with_provenance(
    found: Iterator[list[EvaluationPair]],
    streams: Sequence[TokenStream],
    requests: Sequence[EvaluationRequest],
    where: dict[str, str],
    tokenizer: object,
) -> Iterator[list[EvaluationPair]]:
    """Yield the evaluations with their corpus and provenance filled in."""
    for request, stream in zip(requests, streams, strict=True):
        with translate_resource_errors(where["device"]):
            pairs = next(found)
        known = _known_of_evaluation(stream, request, where, tokenizer)
        yield [
            (replace(own, **known), replace(full, **known) if full else None) for own, full in pairs
        ]


def make_texts(model: OpenModel, requests: Sequence[EvaluationRequest]) -> list[EvaluationText]:
    """Return the requests' texts for this model: its tokens and protocol."""
    return _texts([model.stream(r) for r in requests], requests, model.info.context)


def with_provenance(
    model: OpenModel, requests: Sequence[EvaluationRequest], found: Iterator[list[EvaluationPair]]
) -> Iterator[list[EvaluationPair]]:
    """Yield a model's evaluations with their corpus and provenance filled in."""
    streams = [model.stream(request) for request in requests]
    return _with_provenance(found, streams, requests, model.device_and_dtype, model.tokenizer)


def _known_of_evaluation(
    stream: TokenStream, request: EvaluationRequest, where: dict[str, str], tokenizer: object
) -> dict:
    """Return an evaluation's fields for its corpus and provenance."""
    return {
        "corpus": stream.corpus,
        "corpus_sha256": stream.sha256,
        "corpus_source": stream.source,
        "truncated": stream.truncated,
        "provenance": evaluation_provenance(where, request, tokenizer),
    }


def evaluation_provenance(
    where: Mapping[str, str], request: EvaluationRequest, tokenizer: object
) -> dict:
    """Return the provenance of an evaluation, besides its corpus and protocol.

    ``where`` has the device and the dtype, and for a device of another machine also ``machine``.
    """
    return {
        **where,
        "machine": where.get("machine") or machine(where["device"]),
        "max_tokens": request.max_tokens,
        "bos": tokenizer.bos_token_id,
        "versions": versions(),
    }


def evaluate_models(
    model: OpenModel,
    models: Sequence[nn.Module],
    requests: Sequence[EvaluationRequest],
    reference: nn.Module | None = None,
    identities: Sequence[Sequence[object]] | None = None,
) -> Iterator[list[EvaluationPair]]:
    """Evaluate models with this model's tokenizer, compared with a reference if given.

    The reference, or without one the only model, must be this model in full precision.
    ``identities`` distinguish the models from others evaluated with the same checkpoint folder.
    Yields as :func:`lsq_core.evaluation.perplexity.evaluate_models`.
    """
    identities = identities or [()] * len(models)
    return evaluate_on_texts(
        models,
        model.tokenizer,
        model.info.context,
        requests,
        [model.stream(request) for request in requests],
        reference=reference,
        where=model.device_and_dtype,
        report=model.report,
        checkpoints=[[checkpoint_file(model, r, i) for i in identities] for r in requests],
        kept=kept_states(model, requests),
    )


def kept_states(model: OpenModel, requests: Sequence[EvaluationRequest]) -> list[ReferenceStates]:
    """Return the stored full-precision hidden states for each text, next to the database."""
    return [_kept_states(model, request) for request in requests]


def _kept_states(model: OpenModel, request: EvaluationRequest) -> ReferenceStates:
    stream, protocol = model.stream(request), _protocol(request, model.info.context)
    made_by = evaluation_dependencies(
        evaluation_provenance(model.device_and_dtype, request, model.tokenizer)
    )
    name = digest(model.info.fingerprint, stream.sha256, asdict(protocol), made_by)[:16]
    where = f"{made_by['device']} in {made_by['dtype']}"
    of = f"{len(stream.ids):,} tokens, {protocol.name}"
    title = f"{model.source.name} on {stream.corpus}, {of}, {where}"
    return ReferenceStates(states_folder(model.store.path.parent) / name, title)


def checkpoint_file(
    model: OpenModel, request: EvaluationRequest, identity: Sequence[object]
) -> Path | None:
    """Return the checkpoint file of a model's evaluation on a text, if there is a folder."""
    if model.checkpoint_folder is None:
        return None
    made_by = run_dependencies(versions())
    request_key = (model.stream(request).sha256, asdict(request), model.device_and_dtype, made_by)
    # The name includes the file's format: an older version may have left an unfinished file.
    name = digest("by window", model.info.fingerprint, *identity, *request_key)[:16]
    return model.checkpoint_folder / f"evaluation-{name}.npz"


def evaluate_full(model: OpenModel, request: EvaluationRequest) -> dict:
    """Evaluate the full-precision model, store the result, and return its figures.

    A model larger than memory is read block by block.
    """
    if model.fits_in_memory():
        found = evaluate_models(model, [model.loaded.model], [request])
    else:
        found = _evaluate_streamed_full(model, request)
    [[(evaluation, _)]] = found
    model.store.save_full_precision(model.info.fingerprint, evaluation)
    fingerprint = model.info.fingerprint
    known = {"model": model.source.name, "fingerprint": fingerprint}
    return known | figures(evaluation, fingerprint, model.source.name, model.store)


def _evaluate_streamed_full(
    model: OpenModel, request: EvaluationRequest
) -> Iterator[list[EvaluationPair]]:
    from lsq_core.evaluation.streamed import evaluate_streamed_full

    found = evaluate_streamed_full(
        model.streamed,
        make_texts(model, [request]),
        bos=model.tokenizer.bos_token_id,
        progress=lambda done, total, message: model.report("evaluate", done, total, message),
        checkpoints=[[checkpoint_file(model, request, ())]],
        kept=kept_states(model, [request]),
    )
    return with_provenance(model, [request], found)


def figures(evaluation: Evaluation, fingerprint: str, source: str, store: Store) -> dict:
    """Return an evaluation's figures under the names printed by the command line.

    ``noise`` is the model's noise floor (:meth:`NoiseFloor.to_json`), or a ``reason`` if the store
    has none for this protocol, kind of device and dtype. ``fingerprint`` identifies the model, and
    ``source`` is the name it was requested by.
    """
    made_with = evaluation.provenance
    noise = store.noise_floor(fingerprint, evaluation.protocol, made_with)
    unknown = describe_unknown(source, evaluation.protocol, made_with["dtype"])
    return {
        "noise": noise.to_json() if noise else {"reason": unknown},
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


def digest(*parts: object) -> str:
    return hashlib.sha256(json_text(parts).encode()).hexdigest()
