"""Run 21 kinds of architecture end to end; ``make architectures`` runs all of them."""

from __future__ import annotations

import pytest

from lsq_core.bits import LADDER
from lsq_core.model.loading import inspect_model
from lsq_core.model.source import ModelSource
from tests.architectures.run_end_to_end import run_end_to_end, save_small_model
from tests.architectures.small import architectures

#: Expected outcome by model type.
EXPECTED_STATES = {
    "axk2": "works",  # latent attention, whose code reads a linear module's weight
    "bamba": "works",  # alternating attention and state-space layers
    "bart": "works",  # a decoder whose cross-attention is never used
    "bloom": "works",  # ALiBi, fused QKV
    "cohere": "works",  # parallel blocks
    "deepseek_v3": "works",  # latent attention, shared and routed experts
    "deepseek_v4": "works",  # grouped linear modules with a custom forward
    "falcon": "works",  # multi-query, fused QKV
    "falcon_mamba": "works",  # weights read directly
    "gpt_neo": "works",  # alternating local and global attention
    "granitemoe": "works",  # parallel experts: one 3-D parameter named weight
    "jamba": "works",  # attention, state space and experts
    "jetmoe": "works",  # experts in attention as well
    "llama4": "works",  # undeclared (in, out) experts; a custom router
    "mamba": "works",  # no attention at all
    "phimoe": "works",  # a router that is a linear module with a custom forward
    "prophetnet": "works",  # several streams of hidden states per token
    "qwen3_next": "works",  # linear attention
    "rwkv": "works",  # a recurrence
    "stablelm": "works",  # partial rotary embeddings
    "zamba2": "works",  # one block used in several layers
}


@pytest.mark.parametrize("model_type", EXPECTED_STATES)
def test_architecture_end_to_end(model_type, tmp_path):
    outcome = run_end_to_end(model_type, architectures()[model_type], tmp_path)
    assert (outcome.state, outcome.reason) == (EXPECTED_STATES[model_type], "")


@pytest.mark.parametrize(
    ("model_type", "type", "reason"),
    [
        ("qwen2_moe", "mlp.shared_expert_gate", "single-row"),
        ("phimoe", "mlp.router", "custom forward"),
        ("mixtral", "mlp.gate", "not the weight of a linear module"),
    ],
)
def test_inspect_lists_unplanned_weights_with_share(model_type, type, reason, tmp_path):
    save_small_model(model_type, tmp_path)
    info = inspect_model(ModelSource(str(tmp_path)))
    (line,) = [line for line in info.left_out if line.startswith(f"{type} in ")]
    assert reason in line
    assert "% of the weights" in line
    assert not any(matrix.type == type for matrix in info.matrices)


def test_inspect_shared_matrix_listed_once(tmp_path):
    """Zamba 2 runs one block's weights in several layers."""
    save_small_model("zamba2", tmp_path)
    info = inspect_model(ModelSource(str(tmp_path)))
    shared = [m for m in info.matrices if ".shared_transformer." in m.name]
    assert {m.layer for m in shared} == {1}
    assert info.linear_parameters < info.parameters


def test_inspect_indivisible_matrices_raises(tmp_path):
    from lsq_core.errors import InputError
    from tests.conftest import save_random_model

    folder = save_random_model(
        tmp_path / "odd",
        "llama-gqa",
        hidden_size=36,
        intermediate_size=70,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=6,
    )
    with pytest.raises(InputError, match="groups of 32, 64 or 128"):
        inspect_model(ModelSource(str(folder)))
    assert min(config.group_size for config in LADDER) == 32
