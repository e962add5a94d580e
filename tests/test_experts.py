# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts: what is located, what is computed, what is read from disk."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

from quarot_onnx.artifacts import load_manifest
from quarot_onnx.decoder import Decoder
from quarot_onnx.errors import InputError
from quarot_onnx.export.checkpoint import Checkpoint
from quarot_onnx.export.huggingface import onnx_from_huggingface
from quarot_onnx.forecast import forecast
from quarot_onnx.inspection import inspect
from quarot_onnx.pipeline import export
from quarot_onnx.recipe import load_recipe
from tests import models, running
from tests.conftest import Exported, HuggingFace

each_mixture = pytest.mark.parametrize("family", models.EXPERT_FAMILIES)
TOKENS = np.random.default_rng(0).integers(0, 128, (2, 12))


def _located(directory: Path) -> Decoder:
    return Decoder.locate(onnx_from_huggingface(Checkpoint(directory), ir.DataType.FLOAT))


def test_each_expert_has_its_own_linears(traced_once: None, hugging_face: HuggingFace) -> None:
    decoder = _located(hugging_face("qwen2-moe"))
    assert [len(layer.mlps) for layer in decoder.layers] == [1, 9, 1]  # every second layer
    assert [len(layer.routers) for layer in decoder.layers] == [0, 2, 0]
    layer = decoder.layers[1]
    for number, mlp in enumerate(layer.mlps[:8]):
        expert = f"/model/layers.1/mlp/experts.{number}"
        assert [r.module for r in mlp.readers] == [f"{expert}/gate_proj", f"{expert}/up_proj"]
        assert mlp.down.module == f"{expert}/down_proj"
        assert mlp.down.in_features == 40
    shared = layer.mlps[8]
    assert shared.down.module == "/model/layers.1/mlp/shared_expert/down_proj"
    assert {r.module for r in layer.routers} == {
        "/model/layers.1/mlp/gate",
        "/model/layers.1/mlp/shared_expert_gate",
    }
    assert len(decoder.linears) == 3 * 4 + 2 * 3 + 9 * 3


def test_mixtrals_weights_keep_their_names_on_disk(
    traced_once: None, hugging_face: HuggingFace
) -> None:
    decoder = _located(hugging_face("mixtral"))
    on_disk = set(Checkpoint(hugging_face("mixtral")).tensors)
    named = {linear.weight_value.name for linear in decoder.linears}
    assert "model.layers.2.block_sparse_moe.experts.4.w2.weight" in named
    assert named <= on_disk
    gate = decoder.layers[2].mlps[4].readers[0]
    assert gate.weight.name == "model.layers.2.block_sparse_moe.experts.4.w1.weight"


@each_mixture
@pytest.mark.parametrize("tokens", [1, 2, 24])
def test_every_token_visits_as_many_experts_as_its_router_chooses(
    exported: Exported, family, tokens
) -> None:
    """The work follows the routing: rows are neither repeated nor masked, and may be none."""
    model = ir.external_data.load_to_model(ir.load(exported(family, "rotate-only") / "model.onnx"))
    groups = [n for n in model.graph if n.op_type == "Split" and "gate_up_proj" in (n.name or "")]
    assert len(groups) == {"mixtral": 3, "qwen2-moe": 1, "qwen3-moe": 2, "gpt-oss": 3}[family]
    model.graph.outputs.extend(groups[0].outputs)
    ids = TOKENS.reshape(1, -1)[:, :tokens]
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    feeds["position_ids"] = np.arange(tokens)[None]
    for value in model.graph.inputs:
        if (value.name or "").startswith("past"):
            shape = [n if isinstance(n, int) else 0 for n in value.shape or ()]
            feeds[value.name or ""] = np.zeros([1, *shape[1:]], np.float32)
    outputs = running.run(model, feeds)
    rows = [len(outputs[output.name or ""]) for output in groups[0].outputs]
    chosen = models.FAMILIES[family]["num_experts_per_tok"]
    assert sum(rows) == tokens * chosen
    if tokens == 1:
        assert sorted(rows)[-chosen:] == [1] * chosen
        assert 0 in rows


@each_mixture
def test_rows_are_quantized_once_for_all_experts(exported: Exported, family) -> None:
    artifact = exported(family, "w4a4kv4")
    model = ir.load(artifact / "model.onnx")
    quantized = [n.name for n in model.graph if n.op_type == "QuantizeInt4"]
    layer = 1 if family == "qwen2-moe" else 0
    experts = f"/model/layers.{layer}/mlp/experts"
    assert [name for name in quantized if name.startswith(experts)] == [
        f"{experts}/QuantizeInt4",
        f"{experts}/down_proj/QuantizeInt4",
    ]
    hadamards = [n.name for n in model.graph if n.op_type == "Hadamard"]
    assert f"{experts}/down_proj/R4" in hadamards
    assert not any(n.op_type == "MatMul" and "experts" in (n.name or "") for n in model.graph)


@each_mixture
def test_routers_stay_float_and_the_report_says_so(exported: Exported, family) -> None:
    artifact = exported(family, "w4a4kv4")
    reports = {report["name"]: report for report in load_manifest(artifact)["passes"]}
    routers = reports["QuantizeWeights"]["skipped"]["routers stay float"]
    layer = 1 if family == "qwen2-moe" else 0
    router = "router" if family == "gpt-oss" else "gate"
    assert f"/model/layers.{layer}/mlp/{router}/MatMul" in routers
    rows = {row.name: row for row in inspect(artifact).linears if row.layer == layer}
    assert rows[f"mlp.{router}"].weight_bits == 32
    expert = rows["mlp.experts.3.down_proj"]
    assert (expert.weight_bits, expert.activation_bits) == (4, 4)
    assert expert.rotation == ("44 x 4" if family in ("mixtral", "gpt-oss") else "20 x 2")


def test_the_plan_counts_experts(hugging_face: HuggingFace) -> None:
    found = forecast(Checkpoint(hugging_face("qwen2-moe")), load_recipe("w4a4kv4"), "float32")
    sites = {site.where: site for site in found.sites if site.name == "R4"}
    assert {where: site.size for where, site in sites.items()} == {
        "down_proj input": 176,
        "an expert's down_proj input": 40,
        "the shared expert's down_proj input": 48,
    }
    assert sites["an expert's down_proj input"].cost == 3 * 40 * (20 + 2)
    attention = 3 * (96 * 96 * 2 + 96 * 48 * 2)
    codes = attention + 2 * 3 * 96 * 176 + 8 * 3 * 96 * 40 + 3 * 96 * 48
    scales = 3 * (96 * 2 + 48 * 2) + 2 * (2 * 176 + 96) + 8 * (2 * 40 + 96) + 2 * 48 + 96
    assert found.weight_bytes == codes // 2 + 4 * scales


def test_the_plan_counts_stacks_that_are_read_by_columns(hugging_face: HuggingFace) -> None:
    found = forecast(Checkpoint(hugging_face("gpt-oss")), load_recipe("w4a4kv4"), "float32")
    codes = 2 * 96 * 128 + 2 * 96 * 64 + 5 * (96 * 352 + 176 * 96)
    scales = 128 + 2 * 64 + 96 + 5 * (352 + 96)
    assert found.weight_bytes == 3 * (codes // 2 + 4 * scales)
    vectors = 96 + 3 * (2 * 96 + 128 + 2 * 64 + 96 + 4 + 5)  # norms, biases, sinks, the router's
    biases_of_experts = 3 * 5 * (352 + 96)
    assert found.float_bytes == 4 * (2 * 128 * 96 + vectors + biases_of_experts + 3 * 5 * 96)


def test_the_plan_shows_what_each_policy_costs(tmp_path: Path) -> None:
    options = {"moe_intermediate_size": 42, "hidden_size": 96}
    source = models.save(models.build("qwen3-moe", **options), tmp_path / "hf")
    recipe = load_recipe("w4a4kv4", ("rotations.r4_policy=pad",))
    found = forecast(Checkpoint(source), recipe, "float32")
    dense, experts = (site for site in found.sites if site.name == "R4")
    assert (dense.size, dense.candidates) == (176, ())  # 44 * 4 has a matrix
    assert [(c.policy, c.how, c.size, c.cost) for c in experts.candidates] == [
        ("pad", "hadamard 44, padded to 44", 44, 2 * (44 * (1 + 44) + 2 * 96)),
        ("full", "-", 42, 0),
        ("block", "hadamard 2 in 21 blocks", 42, 2 * 42 * 3),
    ]
    assert [round(c.suppression**2) for c in experts.candidates] == [44, 1, 2]
    assert experts.how == experts.candidates[0].how


# --- On disk --------------------------------------------------------------------------------------


def _damaged(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    target.mkdir()
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    return target


def _stack(tensors: dict[str, torch.Tensor]) -> None:
    """As transformers holds the experts: one tensor for all of a layer, gate above up."""
    for layer in range(3):
        of = f"model.layers.{layer}.mlp.experts"
        if f"{of}.0.gate_proj.weight" not in tensors:
            continue
        parts = [
            torch.stack([tensors.pop(f"{of}.{e}.{name}.weight") for e in range(6)])
            for name in ("gate_proj", "up_proj", "down_proj")
        ]
        tensors[f"{of}.gate_up_proj"] = torch.cat(parts[:2], dim=1)
        tensors[f"{of}.down_proj"] = parts[2]


def test_stacks_on_disk_give_the_same_weights(
    tmp_path: Path, traced_once: None, hugging_face: HuggingFace, exported: Exported
) -> None:
    source = _damaged(hugging_face("qwen3-moe"), tmp_path / "hf", _stack)
    export(source, tmp_path / "out", load_recipe("w4a4kv4"))
    usual = exported("qwen3-moe", "w4a4kv4")
    stored = (tmp_path / "out" / "model.onnx_data").read_bytes()
    assert stored == (usual / "model.onnx_data").read_bytes()


EXPERT = "model.layers.0.mlp.experts.{}.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.pop(EXPERT.format(4)),
            "model.layers.0.mlp.experts.gate_up_proj has no tensor for expert 4; download",
        ),
        (
            lambda tensors: tensors.update({EXPERT.format(6): tensors[EXPERT.format(5)].clone()}),
            f"tensor {EXPERT.format(6)} belongs to a module whose other tensors are used, and",
        ),
        (
            lambda tensors: tensors.update({EXPERT.format(2): torch.zeros(39, 96)}),
            "the tensors of model.layers.0.mlp.experts.gate_up_proj for expert 2 have 79 rows",
        ),
    ],
    ids=["missing", "too many", "another shape"],
)
def test_experts_that_do_not_fit_the_configuration_are_refused(
    tmp_path: Path, traced_once: None, hugging_face: HuggingFace, change, message
) -> None:
    source = _damaged(hugging_face("qwen3-moe"), tmp_path / "hf", change)
    with pytest.raises(InputError) as caught:
        export(source, tmp_path / "out", load_recipe("float"))
    assert message in str(caught.value)
    assert str(source) in str(caught.value)


GROUPS = ("activations.mode=asymmetric", "activations.group_size=24", "activations.bits=8")
WEIGHT_GROUPS = ("weights.symmetric=false", "weights.group_size=24")


@pytest.mark.parametrize(
    ("family", "overrides"),
    [*((family, GROUPS) for family in models.EXPERT_FAMILIES), ("mixtral", WEIGHT_GROUPS)],
)
def test_experts_read_groups_of_rows_that_were_rounded_once(
    exported: Exported, family, overrides
) -> None:
    artifact = exported(family, "w8a8kv8", overrides)
    usual = running.Decoding(exported(family, "w8a8kv8") / "model.onnx", 2)(TOKENS)
    found = running.Decoding(artifact / "model.onnx", 2)(TOKENS)
    error = np.abs(found - usual).max(axis=-1)  # by token: rounding sends a few to other experts
    assert np.median(error) < 0.05 * np.abs(usual).max()
    operators = inspect(artifact).operators
    assert (
        operators["QuantizeGroups"]
        == inspect(exported(family, "w8a8kv8")).operators["QuantizeInt4"]
    )
