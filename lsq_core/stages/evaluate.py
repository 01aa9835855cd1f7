"""Evaluating models on texts, with the provenance of the figures."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lsq_core.errors import translate_resource_errors
from lsq_core.evaluation.protocol import EvaluationRequest
from lsq_core.jsontext import json_text
from lsq_core.progress import ProgressCallback, ignore_progress
from lsq_core.provenance import (
    machine,
    run_dependencies,
    versions,
)
from lsq_core.stages.model import OpenModel

if TYPE_CHECKING:
    from torch import nn

    from lsq_core.corpus.tokens import TokenStream
    from lsq_core.evaluation.result import Evaluation, EvaluationPair


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
) -> Iterator[list[EvaluationPair]]:
    """Evaluate any causal models on texts, with the provenance of the figures filled in.

    Yields as :func:`lsq_core.evaluation.perplexity.evaluate_models`.
    """
    from lsq_core.evaluation.perplexity import evaluate_models
    from lsq_core.evaluation.protocol import EvaluationText, Protocol

    texts = [
        EvaluationText(stream.ids, Protocol.named(request.protocol, context))
        for request, stream in zip(requests, streams, strict=True)
    ]
    found = evaluate_models(
        models,
        texts,
        bos=tokenizer.bos_token_id,
        reference=reference,
        progress=lambda done, total, message: report("evaluate", done, total, message),
        checkpoints=checkpoints,
    )
    for request, stream in zip(requests, streams, strict=True):
        with translate_resource_errors(where["device"]):
            pairs = next(found)
        known = known_of_evaluation(stream, request, where, tokenizer)
        yield [
            (replace(own, **known), replace(full, **known) if full else None) for own, full in pairs
        ]


def known_of_evaluation(
    stream: TokenStream, request: EvaluationRequest, where: dict[str, str], tokenizer: object
) -> dict:
    """The fields of an evaluation that say what it is of and how it was made."""
    return {
        "corpus": stream.corpus,
        "corpus_sha256": stream.sha256,
        "corpus_source": stream.source,
        "truncated": stream.truncated,
        "provenance": evaluation_provenance(where, request, tokenizer),
    }


def evaluation_provenance(
    where: dict[str, str], request: EvaluationRequest, tokenizer: object
) -> dict:
    """What an evaluation is made with, beside its corpus and protocol."""
    return where | {
        "machine": machine(where["device"]),
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
    """Evaluate models with this one's tokenizer, beside a reference where there is one.

    ``identities`` tell a model each from others that are evaluated in the same folder. Yields
    as :func:`lsq_core.evaluation.perplexity.evaluate_models`.
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
    )


def checkpoint_file(
    model: OpenModel, request: EvaluationRequest, identity: Sequence[object]
) -> Path | None:
    """The file for what was scored so far of a model on a text, where there is a folder."""
    if model.checkpoint_folder is None:
        return None
    made_by = run_dependencies(versions())
    request_key = (model.stream(request).sha256, asdict(request), model.device_and_dtype, made_by)
    # A file's form is part of its name: an older version may have been cut off.
    name = digest("by window", model.info.fingerprint, *identity, *request_key)[:16]
    return model.checkpoint_folder / f"evaluation-{name}.npz"


def evaluate_full(model: OpenModel, request: EvaluationRequest) -> dict:
    """Evaluate the full-precision model and store the result."""
    [[(evaluation, _)]] = evaluate_models(model, [model.loaded.model], [request])
    model.store.save_full_precision(model.info.fingerprint, evaluation)
    return {"model": model.source.name, "fingerprint": model.info.fingerprint} | figures(evaluation)


def figures(evaluation: Evaluation) -> dict:
    """An evaluation's figures by the names that the command line prints."""
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


def digest(*parts: object) -> str:
    return hashlib.sha256(json_text(parts).encode()).hexdigest()
