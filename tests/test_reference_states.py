"""Final hidden states of full precision: stored by the first evaluation, used by later ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lsq_core import disk
from lsq_core.bits import LADDER
from lsq_core.evaluation import perplexity
from lsq_core.evaluation.perplexity import evaluate_models
from lsq_core.evaluation.protocol import EvaluationRequest, EvaluationText, Protocol
from lsq_core.evaluation.reference_states import ABOUT_FILE, ReferenceStates, list_kept
from lsq_core.model.loading import BlockModel, load_model
from lsq_core.model.source import ModelSource
from lsq_core.quantization.registry import get_quantizer
from lsq_core.quantization.task import QuantizationTask
from lsq_core.quantized.convert import quantize_model
from lsq_core.session import Session
from tests.conftest import ARCHITECTURES

PROTOCOL = Protocol("strided-64/32", 64, 32)
TEXT = EvaluationText(np.random.default_rng(3).integers(1, 4096, 300), PROTOCOL)
#: Most runs of the last block for detecting output forms; unwalked models have no more.
DETECTED = 1


def quantized(loaded, config=LADDER[0]):
    choice = dict.fromkeys(loaded.info.matrices, config)
    return quantize_model(QuantizationTask(loaded, choice), get_quantizer("rtn"))


def evaluate(loaded, models, kept, **options):
    [pairs] = evaluate_models(models, [TEXT], bos=0, reference=loaded.model, kept=[kept], **options)
    return pairs


def count_runs(loaded):
    """Record runs of the full-precision model's last block; the LM head pass uses stubs instead."""
    counted = []
    part = next(BlockModel(loaded.model).blocks[-1].children())
    # Copies of the model made later also have the hook.
    part.register_forward_hook(lambda module, *_: counted.append(int(module is part)))
    return counted


@pytest.fixture
def loaded(random_model):
    return load_model(ModelSource(str(random_model("llama-gqa"))), "cpu")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kept_states_give_the_same_figures(random_model, tmp_path, architecture):
    loaded = load_model(ModelSource(str(random_model(architecture))), "cpu")
    models = [quantized(loaded), quantized(loaded, LADDER[5])]
    kept = ReferenceStates(tmp_path / "states" / "a", "a text")
    first = evaluate(loaded, models, kept)
    counted = count_runs(loaded)
    second = evaluate(loaded, models, kept)
    assert sum(counted) <= DETECTED
    for (own, full), (own_again, full_again) in zip(first, second, strict=True):
        assert own_again.nll.tolist() == own.nll.tolist()
        assert full_again.nll.tolist() == full.nll.tolist()
        assert (own_again.kl, own_again.top1) == (own.kl, own.top1)
        assert full.reused_seconds == 0 < full_again.reused_seconds < full_again.seconds


def test_kept_states_of_several_groups_and_resumed(loaded, tmp_path, monkeypatch):
    """States of the groups before a kill are kept; the next evaluation stores the rest."""
    monkeypatch.setitem(perplexity._MAX_GROUP_TOKENS, "cpu", 4 * PROTOCOL.context)
    models, folder = [quantized(loaded)], tmp_path / "states" / "a"
    expected = evaluate(loaded, models, None)

    def stop(done, total, message):
        if "windows 6–9 of 10, block 2" in message:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(loaded, models, ReferenceStates(folder, ""), progress=stop)
    assert len(list(folder.glob("*.safetensors"))) == 1
    messages = []
    evaluate(
        loaded,
        models,
        ReferenceStates(folder, ""),
        progress=lambda done, total, message: messages.append((done, total)),
    )
    assert messages[-1][0] == messages[-1][1]
    counted = count_runs(loaded)
    again = evaluate(
        loaded,
        models,
        ReferenceStates(folder, ""),
        progress=lambda done, total, message: messages.append((done, total)),
    )
    assert messages[-1][0] == messages[-1][1], "all of the work is reported"
    assert sum(counted) <= DETECTED
    assert again[0][0].kl == expected[0][0].kl
    assert again[0][1].nll.tolist() == expected[0][1].nll.tolist()


@pytest.mark.parametrize("damage", ["cut", "zeroed", "of other windows", "without its time"])
def test_damaged_states_are_made_again(loaded, tmp_path, damage):
    from safetensors.torch import load_file, save_file

    models, folder = [quantized(loaded)], tmp_path / "states" / "a"
    first = evaluate(loaded, models, ReferenceStates(folder, ""))
    (path,) = folder.glob("*.safetensors")
    content, tensors = path.read_bytes(), load_file(path)
    if damage == "of other windows":
        tensors = {name: states[:-1].clone() for name, states in tensors.items()}
        save_file(tensors, path, metadata={"seconds_per_token": "1"})
    elif damage == "without its time":
        save_file(tensors, path)
    else:
        path.write_bytes({"cut": content[:-9], "zeroed": bytes(len(content))}[damage])
    counted = count_runs(loaded)
    again = evaluate(loaded, models, ReferenceStates(folder, ""))
    assert sum(counted) > DETECTED
    assert again[0][0].kl == first[0][0].kl
    assert load_file(path).keys() == tensors.keys()


def test_least_recently_used_states_are_deleted(loaded, tmp_path):
    models = [quantized(loaded)]
    size = 300 * 128 * 4  # float32 states of the scored tokens

    def evaluate_into(name):
        kept = ReferenceStates(tmp_path / "reference-states" / name, name, int(2.5 * size))
        evaluate(loaded, models, kept)

    for name in ("a", "b", "a", "c"):
        evaluate_into(name)
    assert {folder.name: title for folder, title in list_kept(tmp_path)} == {"a": "a", "c": "c"}


def test_states_larger_than_the_limit_are_not_kept(loaded, tmp_path):
    messages = []
    kept = ReferenceStates(tmp_path / "states" / "a", "", 1000)
    evaluate(
        loaded,
        [quantized(loaded)],
        kept,
        progress=lambda done, total, message: messages.append(message),
    )
    assert any("not stored" in message for message in messages)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_folder_that_cannot_be_written_costs_the_states_alone(loaded, tmp_path):
    (tmp_path / "states").write_text("a file")
    pairs = evaluate(loaded, [quantized(loaded)], ReferenceStates(tmp_path / "states" / "a", ""))
    assert pairs[0][0].kl > 0


# --- sessions -------------------------------------------------------------------------------


def folders(session):
    return {folder.name for folder, _ in list_kept(session.store.path.parent)}


def test_runs_share_full_precision(random_model, small_text, tmp_path):
    """Also across sessions, with a full-precision evaluation and with a streamed model."""
    model, request = str(random_model("llama-gqa")), EvaluationRequest(str(small_text))
    alone = Session(model, tmp_path / "alone" / "lsq.duckdb", "cpu")
    expected = alone.run(alone.plan("uniform", base="3.13"), "rtn", request)
    full = Session(model, tmp_path / "lsq.duckdb", "cpu").evaluate_full(request)
    session = Session(model, tmp_path / "other.duckdb", "cpu")
    counted = count_runs(session.loaded)
    found = session.run(session.plan("uniform", base="3.13"), "rtn", request)
    assert sum(counted) <= DETECTED
    for name in ("perplexity", "perplexity_full", "kl", "top1"):
        assert found[name] == expected[name]
    assert found["perplexity_full"] == full["perplexity"]
    streamed = Session(model, tmp_path / "third.duckdb", "cpu")
    streamed.fits_in_memory = lambda more_bytes=0: False
    read = streamed.run(streamed.plan("uniform", base="3.13"), "rtn", request)
    assert read["kl"] == pytest.approx(expected["kl"], rel=1e-4)
    assert len(folders(session)) == 1
    times = session.store.query("SELECT seconds FROM evaluations WHERE run IS NOT NULL")
    assert '"full precision"' in times["seconds"].iloc[0]


def test_states_depend_on_text_protocol_and_dtype(random_model, small_text, tmp_path):
    model, store = str(random_model("llama-gqa")), tmp_path / "lsq.duckdb"
    requests = [
        EvaluationRequest(str(small_text)),
        EvaluationRequest(str(small_text), max_tokens=200),
        EvaluationRequest(str(small_text), "blocks"),
    ]
    session = Session(model, store, "cpu")
    for number, request in enumerate(requests, 1):
        session.evaluate_full(request)
        assert len(folders(session)) == number
    Session(model, session.store, "cpu", "bfloat16").evaluate_full(requests[0])
    assert len(folders(session)) == 4


def test_states_are_listed_and_pruned(random_model, small_text, tmp_path):
    session = Session(str(random_model("llama-gqa")), tmp_path / "lsq.duckdb", "cpu")
    session.evaluate_full(EvaluationRequest(str(small_text)))
    (item,) = [item for item in disk.list_disk_items(session.store) if "states" in item.kind]
    assert item.prunable
    assert item.bytes > 10_000
    assert str(small_text) in item.name
    (item.path / ABOUT_FILE).write_text("{")
    (item,) = [item for item in disk.list_disk_items(session.store) if "states" in item.kind]
    disk.prune(session.store, item.name)
    assert not folders(session)
    assert torch.isfinite(torch.tensor(session.evaluate_full(EvaluationRequest())["perplexity"]))
