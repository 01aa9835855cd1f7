"""The demo model's training script: a tiny run learns, and resuming gives the same weights."""

from __future__ import annotations

import importlib.util
import json
import pickle
import random
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lsq_core.errors import InputError

DEMO = Path(__file__).resolve().parents[1] / "data" / "demo_model"
STEPS = 16


@pytest.fixture(scope="module")
def train() -> ModuleType:
    """Return the training script as a module."""
    spec = importlib.util.spec_from_file_location("demo_train", DEMO / "train.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo_train"] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Use one thread; several are slower for tiny tensors, especially beside other tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def text_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of forty Python files, each with three docstrings to train on."""
    root = tmp_path_factory.mktemp("text")
    words = ["the", "value", "array", "returned", "shape", "model", "layer", "of", "a", "is not"]
    draw = random.Random(0)
    for number in range(40):
        sentences = [" ".join(draw.choices(words, k=60)) for _ in range(3)]
        body = "".join(f'def f{i}():\n    """{text}"""\n' for i, text in enumerate(sentences))
        (root / f"m{number:02}.py").write_text(body)
    return root


@pytest.fixture(scope="module")
def recipe(train: ModuleType):
    return train.Recipe(steps=STEPS, batch=4, layers=2)


@pytest.fixture(scope="module")
def trained(train, recipe, text_root, tmp_path_factory):
    """Return the model, folder and reported lines of an uninterrupted run."""
    out, lines = tmp_path_factory.mktemp("whole") / "model", []
    run = train.Run(out=out, checkpoint_every=4)
    return train.train(recipe, run, text_root, lines.append), out, lines


def held_out_losses(lines: list[str]) -> list[float]:
    return [float(line.split("held out ")[1].split()[0]) for line in lines if "loss" in line]


def test_held_out_loss_falls(trained):
    losses = held_out_losses(trained[2])
    assert len(losses) == STEPS // 4
    assert losses[-1] < losses[0] - 1.0


def test_train_saves_bf16_model_and_tokenizer(trained):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, out, _ = trained
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype is torch.bfloat16
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    for name, weight in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), weight.to(torch.bfloat16)), name
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode(tokenizer("the value of é")["input_ids"]) == "the value of é"
    assert tokenizer.eos_token_id == 0
    assert not (out / "checkpoint.pt").exists()


def test_train_resume_gives_identical_weights(
    train, recipe, text_root, trained, tmp_path, monkeypatch
):
    advance = train.Trainer.advance

    def stop_at_six(trainer):
        if trainer.step == 6:  # two steps after the last checkpoint, which are lost
            raise KeyboardInterrupt
        return advance(trainer)

    monkeypatch.setattr(train.Trainer, "advance", stop_at_six)
    with pytest.raises(KeyboardInterrupt):
        train.train(recipe, train.Run(tmp_path, checkpoint_every=4), text_root, lambda _: None)
    assert not (tmp_path / "model.safetensors").exists()
    monkeypatch.undo()

    lines = []
    resumed_run = train.Run(tmp_path, checkpoint_every=4, resume=True)
    model = train.train(recipe, resumed_run, text_root, lines.append)

    assert "going on after step 4" in lines
    assert held_out_losses(lines) == held_out_losses(trained[2])[1:]
    for name, weight in trained[0].named_parameters():
        assert torch.equal(model.get_parameter(name), weight), name
    assert (tmp_path / "model.safetensors").read_bytes() == (
        trained[1] / "model.safetensors"
    ).read_bytes()


def test_train_existing_model_not_overwritten(train, trained, text_root, capsys):
    before = (trained[1] / "model.safetensors").read_bytes()
    assert train.main(["--out", str(trained[1]), "--text-root", str(text_root)]) == 2
    assert str(trained[1]) in capsys.readouterr().err
    assert (trained[1] / "model.safetensors").read_bytes() == before


def test_check_out_existing_checkpoint_raises(train, tmp_path):
    (tmp_path / "checkpoint.pt").touch()
    with pytest.raises(InputError, match="--resume"):
        train.check_out(train.Run(tmp_path))
    train.check_out(train.Run(tmp_path, resume=True))
    train.check_out(train.Run(tmp_path, force=True))


def test_load_checkpoint_other_run_raises(train, tmp_path):
    run = train.Run(tmp_path, resume=True)
    with pytest.raises(InputError, match="no checkpoint in"):
        train.load_checkpoint(run, "mine")
    train.save_checkpoint(run.checkpoint, {"identity": "other", "step": 3})
    with pytest.raises(InputError, match="another recipe or text"):
        train.load_checkpoint(run, "mine")
    assert train.load_checkpoint(run, "other")["step"] == 3
    assert list(tmp_path.iterdir()) == [run.checkpoint]


class Payload:
    """An object whose pickle creates a file if loaded unsafely."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_load_checkpoint_pickle_not_executed(train, tmp_path):
    run, made = train.Run(tmp_path, resume=True), tmp_path / "made"
    torch.save({"identity": "mine", "step": Payload(made)}, run.checkpoint)
    with pytest.raises(InputError, match="damaged") as error:
        train.load_checkpoint(run, "mine")
    assert isinstance(error.value.__cause__, pickle.UnpicklingError)
    assert not made.exists()


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04"])
def test_load_checkpoint_damaged_raises(train, tmp_path, content):
    (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        train.load_checkpoint(train.Run(tmp_path, resume=True), "mine")


def test_train_too_little_text_raises(train, recipe, tmp_path):
    with pytest.raises(InputError, match="Too few docstrings"):
        train.train(recipe, train.Run(tmp_path / "out"), tmp_path, lambda _: None)


def test_default_recipe_matches_shipped_model(train):
    config = json.loads((DEMO / "config.json").read_text())
    model = train.make_model(train.Recipe())
    made = model.config.to_dict()
    volatile = {"architectures", "dtype", "transformers_version"}
    assert {key: made[key] for key in config.keys() - volatile} == {
        key: config[key] for key in config.keys() - volatile
    }
    assert sum(p.numel() for p in model.parameters()) == 5_642_368
    scaled = model.model.layers[3].mlp.down_proj.weight.std().item()
    assert scaled == pytest.approx(config["initializer_range"] / 48**0.5, rel=0.05)


def test_batch_at_depends_on_seed_and_step(train, recipe):
    import numpy as np

    tokens = np.arange(1000)
    batch = train.batch_at(tokens, 7, recipe)
    assert batch.shape == (4, 257)
    assert torch.equal(batch, train.batch_at(tokens, 7, recipe))
    assert not torch.equal(batch, train.batch_at(tokens, 8, recipe))
    other_seed = replace(recipe, seed=recipe.seed + 1)
    assert not torch.equal(batch, train.batch_at(tokens, 7, other_seed))
    assert (batch.diff(dim=1) == 1).all()


def test_learning_rate_schedule(train):
    rates = [train.learning_rate(step, 1810) for step in range(1810)]
    assert rates[0] == pytest.approx(4e-3 / 150)
    assert max(rates) == rates[149] == pytest.approx(4e-3)
    assert rates[-1] == pytest.approx(0.03 * 4e-3, rel=1e-3)
    assert rates[150:] == sorted(rates[150:], reverse=True)


def test_make_model_invalid_width_raises(train):
    with pytest.raises(InputError, match="multiple of 32"):
        train.make_model(train.Recipe(width=100))
