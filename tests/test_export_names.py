"""Names of a model's matrices in other tools."""

from __future__ import annotations

import pytest

from lsq_core.errors import InputError
from lsq_core.exports.names import expert_names, gguf_architecture, gguf_matrix_names
from lsq_core.model.info import Matrix

STACK = "model.layers.1.mlp.experts"
QUERY = Matrix("model.layers.1.self_attn.q_proj", 1, "self_attn.q_proj", 64, 64)
GATE_UP = [
    Matrix(f"{STACK}.gate_up_proj.{e}", 1, "mlp.experts.gate_up_proj", 256, 64, e) for e in range(2)
]
DOWN = [Matrix(f"{STACK}.down_proj.{e}", 1, "mlp.experts.down_proj", 64, 128, e) for e in range(2)]


def test_experts_become_linear_modules():
    assert expert_names(QUERY) == (QUERY.name,)
    assert expert_names(GATE_UP[1]) == (f"{STACK}.1.gate_proj", f"{STACK}.1.up_proj")
    assert expert_names(DOWN[0]) == (f"{STACK}.0.down_proj",)


def test_a_stack_of_another_kind_is_refused():
    other = Matrix("model.layers.0.mlp.input_linear.weight.3", 0, "mlp.input_linear", 64, 64, 3)
    with pytest.raises(InputError, match=r"input_linear"):
        expert_names(other)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss"])
def test_gguf_has_three_stacks_of_experts(model_type: str):
    tensors = gguf_matrix_names({"model_type": model_type}, 2, [QUERY, *GATE_UP, *DOWN])
    assert tensors == {
        "blk.1.attn_q.weight": [QUERY],
        "blk.1.ffn_gate_exps.weight": GATE_UP,
        "blk.1.ffn_up_exps.weight": GATE_UP,
        "blk.1.ffn_down_exps.weight": DOWN,
    }


def test_gguf_architectures():
    named = {"llama": "llama", "mixtral": "llama", "qwen3_moe": "qwen3moe", "phi3": "phi3"}
    assert {t: gguf_architecture({"model_type": t}) for t in named} == named
    with pytest.raises(InputError, match="reformer"):
        gguf_architecture({"model_type": "reformer"})


def test_a_module_without_a_gguf_name_is_refused():
    odd = Matrix("model.layers.0.oddity", 0, "oddity", 64, 64)
    with pytest.raises(InputError, match="oddity"):
        gguf_matrix_names({"model_type": "llama"}, 1, [odd])
