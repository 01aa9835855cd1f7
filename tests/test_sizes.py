"""Odd values in config.json, and a tokenizer larger than the embedding."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from lsq_core.cli.program import main
from lsq_core.errors import InputError, exception_reason
from lsq_core.evaluation.generation import compare_generation
from lsq_core.evaluation.protocol import Protocol
from lsq_core.model.loading import check_token_ids, load_model
from lsq_core.model.sizes import find_excessive_count, find_invalid_sizes
from lsq_core.model.source import ModelSource
from lsq_core.profiling.calibration import load_calibration
from lsq_core.profiling.measure import measure_profile
from lsq_core.profiling.settings import ProfileSettings
from tests.conftest import save_random_model
from tests.helpers import evaluate_model

ODD = (None, 0, -1, 1.5, "x", [], 10**30)
#: Config entries by architecture: sizes, and others that transformers computes with.
ENTRIES = {
    "llama-gqa": (
        "hidden_size",
        "num_attention_heads",
        "num_hidden_layers",
        "intermediate_size",
        "head_dim",
        "vocab_size",
        "max_position_embeddings",
        "rope_parameters",
        "hidden_act",
        "dtype",
    ),
    "gpt2-conv1d": ("n_head", "n_layer"),
    "mixtral-moe": ("num_local_experts",),
}


def copy_with_config(folder: Path, target: Path, **changes: object) -> Path:
    """Copy a model's folder with changed config entries; return the copy."""
    shutil.copytree(folder, target, copy_function=os.link)
    config = json.loads((folder / "config.json").read_text()) | changes
    (target / "config.json").unlink()
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("architecture", "name"), [(a, name) for a, names in ENTRIES.items() for name in names]
)
def test_cli_inspect_odd_config_value_exit_0_or_2(
    architecture, name, random_model, tmp_path, capsys
):
    """The output is either a description or a one-line error."""
    for number, value in enumerate(ODD):
        folder = copy_with_config(
            random_model(architecture), tmp_path / str(number), **{name: value}
        )
        status = main(["inspect", "--db", str(tmp_path / "db"), "--model", str(folder)])
        captured = capsys.readouterr()
        assert status in (0, 2), (name, value)
        assert (captured.err.count("\n") == 1) == (status == 2), captured.err
        assert bool(captured.out) == (status == 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"intermediate_size": 0}, "intermediate_size is 0"),
        ({"hidden_size": None}, "hidden_size is null"),
        ({"hidden_size": "128"}, 'hidden_size is "128"'),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers is 1.5"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"vocab_size": 10**30}, "vocab_size is 1000"),
    ],
)
def test_cli_inspect_odd_config_value_named(changes, message, random_model, tmp_path, capsys):
    folder = copy_with_config(random_model("llama-gqa"), tmp_path / "m", **changes)
    assert main(["inspect", "--db", str(tmp_path / "db"), "--model", str(folder)]) == 2
    assert message in capsys.readouterr().err


def test_size_checks_nested_configs():
    assert (
        find_excessive_count({"text_config": {"num_experts": 10**6}})
        == "text_config.num_experts is 1000000"
    )
    assert (
        find_excessive_count({"num_hidden_layers": 126, "num_experts": 512, "vocab_size": 10**6})
        == ""
    )
    assert find_invalid_sizes({"text_config": {"n_head": 0}}) == ["text_config.n_head is 0"]
    assert (
        find_invalid_sizes({"hidden_size": 64, "layer_norm_eps": 0.0, "patch_size": [1, 2]}) == []
    )


def test_reason_of_drops_stack_frames():
    error = RuntimeError("a size overflows\nException raised from empty at /x/y.h:79\nframe #0: z")
    assert exception_reason(error) == "a size overflows"


# --- a tokenizer larger than the embedding --------------------------------------------------


@pytest.fixture(scope="module")
def small_vocab_model(tmp_path_factory):
    """Return a model whose embedding covers an eighth of its tokenizer's tokens."""
    folder = tmp_path_factory.mktemp("models") / "narrow"
    return load_model(ModelSource(str(save_random_model(folder, "llama-gqa", vocab_size=512))))


LAST_ROW_ERROR = "embedding ends at 511"


def test_evaluate_token_beyond_embedding_raises(small_vocab_model, small_text):
    ids = small_vocab_model.tokenizer(small_text.read_text()[:4000], return_tensors="np")[
        "input_ids"
    ][0]
    assert ids.max() >= 512
    with pytest.raises(InputError, match=LAST_ROW_ERROR):
        evaluate_model(small_vocab_model.model, ids, Protocol("blocks-64", 64, 64), bos=None)
    fitting = ids[ids < 512]
    assert (
        evaluate_model(small_vocab_model.model, fitting, Protocol("blocks-64", 64, 64), bos=None)[
            0
        ].perplexity
        > 0
    )
    with pytest.raises(InputError, match=LAST_ROW_ERROR):
        evaluate_model(small_vocab_model.model, fitting, Protocol("blocks-64", 64, 64), bos=600)


def test_profile_token_beyond_embedding_raises(small_vocab_model, small_text):
    settings = ProfileSettings("rtn", calibration=str(small_text), samples=4, block_tokens=32)
    with pytest.raises(InputError, match=LAST_ROW_ERROR):
        load_calibration(small_vocab_model, settings.text)
    with pytest.raises(InputError, match=LAST_ROW_ERROR):
        measure_profile(small_vocab_model, settings, "p")


def test_generate_token_beyond_embedding_raises(small_vocab_model):
    with pytest.raises(InputError, match=LAST_ROW_ERROR):
        compare_generation(
            small_vocab_model.model,
            small_vocab_model.model,
            small_vocab_model.tokenizer,
            "Return the item",
            2,
        )


def test_check_tokens_within_embedding(small_vocab_model):
    assert len(small_vocab_model.tokenizer) > 512
    check_token_ids(small_vocab_model.model, [0, 511])
    check_token_ids(small_vocab_model.model, [])
