"""Exported plans name every module exactly once, and substitute nothing unless asked to."""

from __future__ import annotations

import ast
import json
import re
import shlex
from dataclasses import replace

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lsq_core.bits import LADDER, MIXED_ROW_CONFIGS, QuantConfig
from lsq_core.cli.program import main
from lsq_core.errors import InputError
from lsq_core.exports.base import KEPT_BITS, Translation
from lsq_core.exports.plans import llama_cpp
from lsq_core.exports.registry import PLAN_TARGETS, export_plan, plan_target, translate
from lsq_core.model.info import Matrix, ModelInfo
from tests.exports.cases import Case, load_case, make_plan, mixed_plan

#: Targets that name experts one by one; the others have one tensor for all experts of a layer.
PER_EXPERT = ("gptqmodel", "compressed-tensors", "auto-round", "modelopt", "torchao", "exllamav3")
#: Targets that have every configuration of the ladder.
GROUPED = tuple(name for name in PLAN_TARGETS if name not in ("llama.cpp", "exllamav3"))


def read_back(translation: Translation) -> dict[str, tuple[int, int | None]]:
    """Return bits and group sizes by name, read from the file as its tool would."""
    text, name = translation.text, translation.target.name
    names = [a.module.name for a in translation.assignments]
    if name == "gptqmodel":
        return _read_gptqmodel(json.loads(text), names)
    if name == "llama.cpp":
        return _read_llama_cpp(text, names)
    if name == "compressed-tensors":
        groups = json.loads(text)["config_groups"].values()
        found = [(t, g["weights"]) for g in groups for t in g["targets"]]
        assert len({target for target, _ in found}) == len(found), "a name is in two groups"
        return {target: (w["num_bits"], w["group_size"]) for target, w in found}
    if name == "auto-round":
        return {n: (e["bits"], e.get("group_size")) for n, e in json.loads(text).items()}
    if name == "mlx":
        entries = json.loads(text)["quantization"].items()
        return {n: (e["bits"], e["group_size"]) for n, e in entries if isinstance(e, dict)}
    if name == "modelopt":
        entries = ast.literal_eval(text.removeprefix("QUANT_CFG = "))
        assert entries[0] == {"quantizer_name": "*", "enable": False}
        return {
            e["quantizer_name"]: (e["cfg"]["num_bits"], e["cfg"]["block_sizes"][-1])
            for e in entries[1:]
        }
    if name == "torchao":
        return _read_torchao(text)
    return {n: (bits, None) for n, bits in yaml.safe_load(text)["tensors"].items()}


def _read_gptqmodel(config: dict, names: list[str]) -> dict[str, tuple[int, int | None]]:
    found = {}
    for name in names:
        matches = [p for p in config["dynamic"] if re.match(p.removeprefix("-:"), name)]
        assert len(matches) == 1, name
        if not matches[0].startswith("-:"):
            own = config["dynamic"][matches[0]]
            found[name] = own["bits"], own["group_size"]
    return found


def _read_llama_cpp(text: str, names: list[str]) -> dict[str, tuple[int, int | None]]:
    """Parse as ``llama-quantize`` does: split at the first ``=``, search by lower-cased pattern."""
    types = {f.name: f.settings for columns in (256, 32) for f in llama_cpp.formats(32, columns)}
    lines = [word.partition("=")[::2] for word in text.split()]
    found = {}
    for name in names:
        matches = [kind for pattern, kind in lines if re.search(pattern.lower(), name)]
        assert len(matches) == 1, name
        found[name] = types[matches[0]]
    return found


def _read_torchao(text: str) -> dict[str, tuple[int, int | None]]:
    tree = ast.parse(text)
    configs = {
        node.targets[0].id: (
            int(node.value.args[0].attr.removeprefix("int")),
            node.value.args[1].args[0].value,
        )
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id != "CONFIG"
    }
    entries = tree.body[-1].value.args[0]
    return {
        k.value: configs[v.id]
        for k, v in zip(entries.keys, entries.values, strict=True)
        if isinstance(v, ast.Name)
    }


@pytest.mark.parametrize("target", PLAN_TARGETS)
def test_every_matrix_is_in_the_file(case: Case, target: str):
    plan = mixed_plan(case.info, experts_alike=target not in PER_EXPERT)
    translation = translate(plan, case.info, plan_target(target))
    weights = dict.fromkeys(case.info.matrices, 0.0)
    for assignment in translation.assignments:
        for matrix in assignment.module.matrices:
            weights[matrix] += 1 / assignment.module.parts
    assert set(weights.values()) == {1.0}
    assert len({a.module.name for a in translation.assignments}) == len(translation.assignments)
    expected = {
        a.module.name: a.format.settings for a in translation.assignments if not a.format.is_kept
    }
    found = read_back(translation)
    assert {n: s for n, s in found.items() if s[0] != KEPT_BITS} == expected


@pytest.mark.parametrize("target", GROUPED)
def test_ladder_is_expressed_as_planned(case: Case, target: str):
    plan = mixed_plan(case.info, experts_alike=target not in PER_EXPERT)
    translation = export_plan(plan, case.info, target)
    assert translation.substitutions == ()
    choice = plan.choice
    for assignment in translation.assignments:
        for matrix in assignment.module.matrices:
            config = choice[matrix]
            assert assignment.format.settings == (config.bits, config.group_size)


def test_llama_cpp_expresses_groups_of_32(case: Case):
    plan = mixed_plan(case.info, (QuantConfig(4, 32), QuantConfig(8, 32)), experts_alike=True)
    translation = export_plan(plan, case.info, "llama.cpp")
    assert {a.format.name for a in translation.assignments} == {"q4_1", "q8_0"}


def test_llama_cpp_without_a_dense_block_refuses_one(random_model):
    case = load_case(random_model("qwen2-moe"))  # block 0 has no experts
    plan = make_plan(case.info, lambda m: QuantConfig(8, 32))
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.gate_proj"):
        export_plan(plan, case.info, "llama.cpp")


def test_llama_cpp_sizes_and_blocks():
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    for columns in (32, 256, 576, 40):
        for form in llama_cpp.formats(64, columns):
            block, size = GGML_QUANT_SIZES[GGMLQuantizationType[form.name.upper()]]
            assert form.nominal_bits == 8 * size / block
            assert columns % block == 0, "llama-quantize would take another type"


@pytest.mark.parametrize("target", ["gptqmodel", "llama.cpp"])
def test_patterns_match_no_other_name(case: Case, target: str):
    plan = mixed_plan(case.info, experts_alike=True)
    translation = translate(plan, case.info, plan_target(target))
    text = translation.text
    patterns = (
        list(json.loads(text)["dynamic"])
        if target == "gptqmodel"
        else [line.partition("=")[0] for line in text.split()]
    )
    names = {a.module.name for a in translation.assignments}
    others = {f"x.{n}" for n in names} | {f"{n}x" for n in names} | {f"{n}.x" for n in names}
    others |= {n.replace(".", "_") for n in names} | {
        re.sub(r"\.(\d+)\.", r".1\1.", n) for n in names
    }
    joined = re.compile("|".join(f"(?:{p})" for p in patterns))
    assert all(joined.fullmatch(name) for name in names)
    assert not [name for name in others - names if joined.search(name)]


@pytest.mark.parametrize("target", PLAN_TARGETS)
def test_usage_names_the_file(case: Case, target: str):
    plan = mixed_plan(case.info, experts_alike=True)
    translation = translate(plan, case.info, plan_target(target))
    lines = translation.usage("my plan's.txt")
    if translation.target.usage_language == "python":
        compile(lines, "usage", "exec")
        assert repr("my plan's.txt") in lines
    else:
        assert "my plan's.txt" in shlex.split(lines.replace("\\\n", " "))


def test_a_target_is_a_registry_entry(plan_file, tmp_path, monkeypatch):
    def write(translation: Translation) -> str:
        return "".join(f"{a.module.name} {a.format.name}\n" for a in translation.assignments)

    own = replace(PLAN_TARGETS["mlx"], name="own", title="Own", write=write)
    monkeypatch.setitem(PLAN_TARGETS, "own", own)
    out = tmp_path / "own.txt"
    assert main(["export-plan", str(plan_file), "--to", "own", "--out", str(out)]) == 0
    assert set(out.read_text("utf8").split()[1::2]) == {"b3g64"}


# --- unsupported configurations and names ---------------------------------------------------

WIDE = Matrix("model.layers.0.self_attn.q_proj", 0, "self_attn.q_proj", 576, 576)


def model_of(*matrices: Matrix, model_type: str = "llama") -> ModelInfo:
    """Return a model that has only these matrices."""
    numel = sum(m.numel for m in matrices)
    config = {"model_type": model_type}
    return ModelInfo("m", None, "M", 1, 64, numel, 2 * numel, matrices, config=config)


@pytest.mark.parametrize("target", PLAN_TARGETS)
def test_groups_across_rows_need_nearest(target: str):
    info = model_of(WIDE)
    plan = make_plan(info, lambda m: QuantConfig(4, 128))  # 576 = 4.5 × 128
    with pytest.raises(InputError, match="--nearest"):
        export_plan(plan, info, target)
    (found,) = export_plan(plan, info, target, nearest=True).substitutions
    assert found.module
    assert found.reason
    assert found.planned == "b4g128"
    expected = {"llama.cpp": "q4_0", "exllamav3": "4-bit"}.get(target, "b4g64")
    assert found.taken == expected


@pytest.mark.parametrize("target", PLAN_TARGETS)
def test_mixed_rows_and_columns_need_nearest(target: str):
    info = model_of(WIDE)
    for plan in (
        make_plan(info, lambda m: MIXED_ROW_CONFIGS[0]),
        make_plan(info, lambda m: QuantConfig(4, 32), axis=0),
    ):
        with pytest.raises(InputError):
            export_plan(plan, info, target)
        assert export_plan(plan, info, target, nearest=True).text


@pytest.mark.parametrize("target", ["mlx", "llama.cpp"])
def test_experts_of_one_tensor_need_one_configuration(case: Case, target: str):
    if all(m.expert is None for m in case.info.matrices):
        pytest.skip("no experts")
    plan = mixed_plan(case.info, (QuantConfig(4, 32), QuantConfig(8, 32)), experts_alike=False)
    with pytest.raises(InputError, match="experts"):
        export_plan(plan, case.info, target)


def test_a_shape_that_no_group_fills_stays_as_it_is():
    odd = Matrix("model.layers.0.mlp.down_proj", 0, "mlp.down_proj", 64, 40)
    info = model_of(odd)
    plan = make_plan(info, lambda m: QuantConfig(2, 128))
    for target in PLAN_TARGETS:
        if target == "exllamav3":
            continue
        translation = export_plan(plan, info, target, nearest=True)
        assert translation.assignments[0].format.is_kept
        assert {s[0] for s in read_back(translation).values()} <= {KEPT_BITS}
        assert translation.stored_bytes == odd.numel * 2


@given(
    in_features=st.integers(1, 40).map(lambda n: 32 * n),
    out_features=st.integers(1, 20).map(lambda n: 32 * n),
    config=st.sampled_from(LADDER),
    target=st.sampled_from(list(PLAN_TARGETS)),
)
@settings(max_examples=200, deadline=None)
def test_nearest_has_the_bits_or_is_closest(in_features, out_features, config, target):
    matrix = Matrix("model.layers.0.self_attn.q_proj", 0, "", out_features, in_features)
    info = model_of(matrix)
    translation = translate(make_plan(info, lambda m: config), info, plan_target(target))
    (taken,) = [a.format for a in translation.assignments]
    formats = plan_target(target).formats(out_features, in_features)
    if any(f.expresses(config) for f in formats):
        assert taken.expresses(config)
        assert not translation.substitutions
    else:
        same = [f for f in formats if f.bits == config.bits] or formats
        gaps = [abs(f.nominal_bits - config.nominal_bits) for f in same]
        assert abs(taken.nominal_bits - config.nominal_bits) == min(gaps)
        assert taken in same
        assert len(translation.substitutions) == 1
    assert translation.stored_bytes == pytest.approx(matrix.numel * taken.stored_bits / 8)


def test_names_that_are_not_known_are_refused():
    fused = Matrix("model.layers.0.self_attn.qkv_proj", 0, "", 96, 32)
    with pytest.raises(InputError, match="qkv_proj"):
        export_plan(
            make_plan(model_of(fused), lambda m: QuantConfig(4, 32)),
            model_of(fused),
            "exllamav3",
            nearest=True,
        )
    conv = model_of(Matrix("transformer.h.0.mlp.c_fc", 0, "", 64, 32), model_type="gpt2")
    plan = make_plan(conv, lambda m: QuantConfig(4, 32))
    for target in ("compressed-tensors", "torchao", "mlx", "exllamav3"):
        with pytest.raises(InputError):
            export_plan(plan, conv, target, nearest=True)


def test_experts_stacked_by_columns_are_refused():
    stack = "model.layers.0.feed_forward.experts"
    up = Matrix(f"{stack}.gate_up_proj.0", 0, "", 64, 256, 0)
    down = Matrix(f"{stack}.down_proj.0", 0, "", 128, 64, 0)
    info = model_of(up, down, model_type="llama4_text")
    plan = make_plan(info, lambda m: QuantConfig(4, 32))
    for target in PLAN_TARGETS:
        with pytest.raises(InputError, match="gate_up_proj"):
            export_plan(plan, info, target, nearest=True)


def test_vllm_is_told_where_fused_modules_differ():
    queries = [
        Matrix(f"model.layers.0.self_attn.{n}", 0, "", rows, 64)
        for n, rows in (("q_proj", 64), ("k_proj", 32), ("v_proj", 32))
    ]
    info = model_of(*queries)
    same = export_plan(make_plan(info, lambda m: LADDER[4]), info, "compressed-tensors")
    different = export_plan(
        make_plan(info, lambda m: LADDER[4 if m is queries[0] else 7]), info, "compressed-tensors"
    )
    assert len(different.notes) == len(same.notes) + 1


# --- the export-plan command ----------------------------------------------------------------


@pytest.fixture
def plan_file(tmp_path):
    """A plan of the demo model in a configuration that MLX has and llama.cpp lacks."""
    path = tmp_path / "plan.json"
    assert main(["plan", "--model", "demo", "--method", "uniform", "--base", "3.25",
                 "--out", str(path)]) == 0  # fmt: skip
    return path


@pytest.mark.parametrize("target", GROUPED)
def test_command_writes_the_file(plan_file, tmp_path, target, capsys):
    out = tmp_path / "out"
    assert main(["export-plan", str(plan_file), "--to", target, "--out", str(out)]) == 0
    capsys.readouterr()
    assert main(["export-plan", str(plan_file), "--to", target, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["text"] == out.read_text("utf8")
    assert {(m["bits"], m["group_size"]) for m in result["modules"].values()} == {(3, 64)}
    assert main(["export-plan", str(plan_file), "--to", target]) == 0
    assert capsys.readouterr().out == result["text"], "alone on standard output"


def test_command_wrong_inputs(plan_file, tmp_path, capsys):
    out, existing = tmp_path / "out", tmp_path / "there"
    existing.write_text("mine")
    damaged = tmp_path / "damaged.json"
    damaged.write_text(plan_file.read_text()[:500])
    empty = tmp_path / "empty.json"
    empty.write_text("[]")
    nameless = tmp_path / "nameless.json"
    content = json.loads(plan_file.read_text())
    nameless.write_text(
        json.dumps({k: v for k, v in content.items() if k not in ("model", "fingerprint")})
    )
    capsys.readouterr()
    for arguments in (
        [plan_file, "--to", "nothing", "--out", out],
        [plan_file, "--to", "llama.cpp", "--out", out],
        [plan_file, "--to", "mlx", "--out", existing],
        [plan_file, "--to", "mlx", "--out", tmp_path],
        [plan_file, "--to", "mlx", "--out", tmp_path / "no" / "out"],
        [tmp_path / "none.json", "--to", "mlx", "--out", out],
        [damaged, "--to", "mlx", "--out", out],
        [empty, "--to", "mlx", "--out", out],
        [nameless, "--to", "mlx", "--out", out],
    ):
        assert main(["export-plan", *map(str, arguments)]) == 2, arguments
        message = capsys.readouterr().err
        assert message.startswith("lsq: ")
        assert message.count("\n") == 1
        assert not out.exists()
    assert existing.read_text() == "mine"
    assert main(["export-plan", str(nameless), "--to", "mlx", "--model", "demo"]) == 0


def test_command_refuses_a_plan_of_another_model(plan_file, random_model, tmp_path, capsys):
    out = tmp_path / "out"
    other = str(random_model("llama-gqa"))
    for target in ("mlx", "gptqmodel"):
        arguments = ["export-plan", str(plan_file), "--to", target, "--model", other]
        assert main([*arguments, "--out", str(out)]) == 2
    assert not out.exists()
