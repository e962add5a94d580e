# SPDX-License-Identifier: Apache-2.0
"""The float model: the interface that clients know, Hugging Face's names, and nothing of ours."""

import json
import re
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from quarot_onnx.errors import InputError
from quarot_onnx.export.architectures import dimensions
from quarot_onnx.export.checkpoint import Checkpoint
from quarot_onnx.export.huggingface import onnx_from_huggingface
from quarot_onnx.weights import Weight
from tests import models
from tests.conftest import Exported, HuggingFace

each_family = pytest.mark.parametrize("family", models.FAMILIES)
LAYERS = models.COMMON["num_hidden_layers"]


def _float(directory: Path, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Model:
    return onnx_from_huggingface(Checkpoint(directory), dtype)


def _interface(values) -> dict[str, list[str]]:
    return {value.name: [str(n) for n in value.shape] for value in values}


@each_family
def test_inputs_and_outputs_have_the_names_that_clients_know(
    traced_once: None, hugging_face: HuggingFace, family
) -> None:
    model = _float(hugging_face(family))
    sizes = dimensions(Checkpoint(hugging_face(family)).config)
    heads, head_dim = str(sizes.num_kv_heads), str(sizes.head_dim)
    past = ["batch_size", heads, "past_sequence_length", head_dim]
    present = ["batch_size", heads, "total_sequence_length", head_dim]
    cache = [f"{i}.{kind}" for i in range(LAYERS) for kind in ("key", "value")]
    assert _interface(model.graph.inputs) == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        "position_ids": ["batch_size", "sequence_length"],
        **{f"past_key_values.{name}": past for name in cache},
    }
    assert _interface(model.graph.outputs) == {
        "logits": ["batch_size", "sequence_length", "128"],
        **{f"present.{name}": present for name in cache},
    }


def test_a_packed_cache_keeps_the_names_and_halves_the_codes(exported: Exported) -> None:
    model = ir.load(exported("llama", "w4a4kv4") / "model.onnx")
    inputs = _interface(model.graph.inputs)
    assert inputs["past_key_values.2.key"] == ["batch_size", "2", "past_sequence_length", "12"]
    for part in ("key_scale", "key_zero", "value_scale", "value_zero"):
        name = f"past_key_values.2.{part}"
        assert inputs[name] == ["batch_size", "2", "past_sequence_length", "1"]
    outputs = _interface(model.graph.outputs)
    assert outputs["present.2.value"] == ["batch_size", "2", "total_sequence_length", "12"]
    assert model.graph.inputs[3].dtype == ir.DataType.UINT8


@pytest.mark.parametrize("recipe", ["float", "rotate-only", "w4a4kv4"])
@each_family
def test_written_models_pass_the_checker_in_opset_23_and_ir_10(
    exported: Exported, family, recipe
) -> None:
    path = exported(family, recipe) / "model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path, load_external_data=False)
    assert model.ir_version == 10
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    is_plain = recipe == "float" and family != "gpt-oss"  # ONNX has no attention with sinks
    assert opsets == ({"": 23} if is_plain else {"": 23, "quarot": 1})
    assert (model.producer_name, model.producer_version) == ("quarot-onnx", "")


@pytest.mark.parametrize("recipe", ["float", "w4a4kv4"])
@each_family
def test_nothing_of_this_machine_or_of_the_tracer_is_written(
    exported: Exported, family, recipe
) -> None:
    content = (exported(family, recipe) / "model.onnx").read_bytes()
    for trace in (b"pkg.torch", b"pkg.onnxscript", b"site-packages", b".py", b"stack_trace"):
        assert trace not in content
    assert str(Path.home()).encode() not in content
    assert not re.search(rb"/(home|root|tmp|usr|work|Users)/", content)


_SEPARATED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "query_key_value": ("query", "key", "value"),
    "embed_out": ("lm_head",),
}


def _parts_of(tensor: str) -> list[str]:
    """The parameters that a tensor on disk becomes; most stay what they are."""
    module, _, name = tensor.rpartition(".experts.")
    if name.startswith(("gate_up_proj", "down_proj")):  # gpt-oss stacks its 5 experts
        kind = "bias" if name.endswith("_bias") else "weight"
        parts = _SEPARATED.get(name.removesuffix("_bias"), ("down_proj",))
        return [f"{module}.experts.{i}.{part}.{kind}" for i in range(5) for part in parts]
    return [
        tensor.replace(fused, part)
        for fused, parts in _SEPARATED.items()
        if fused in tensor.split(".")
        for part in parts
    ] or [tensor.replace("block_sparse_moe.gate.", "mlp.gate.")]


@each_family
def test_initializers_have_hugging_faces_parameter_names(
    traced_once: None, hugging_face: HuggingFace, family
) -> None:
    expected = {
        part for name in Checkpoint(hugging_face(family)).tensors for part in _parts_of(name)
    }
    model = _float(hugging_face(family))
    weights = {
        name for name, v in model.graph.initializers.items() if isinstance(v.const_value, Weight)
    }
    assert weights == expected
    others = set(model.graph.initializers) - weights
    assert all(re.fullmatch(r"/.*/constant(_\d+)?|/constant(_\d+)?", name) for name in others)


_LLAMA_NAMES = (
    "model",
    "embed_tokens|norm|rotary_emb|layers.\\d+/(self_attn|mlp|input_layernorm|post_attention)",
    ("self_attn/q_proj", "self_attn/o_proj", "mlp/gate_proj", "mlp/down_proj"),
)
_NEOX_NAMES = (
    "gpt_neox",
    "embed_in|final_layer_norm|rotary_emb|layers.\\d+/(attention|mlp|input_layernorm|post_attention)",
    ("attention/query", "attention/key", "attention/dense", "mlp/dense_4h_to_h"),
)
_MIXTURE_NAMES = (*_LLAMA_NAMES[:2], ("self_attn/q_proj", "self_attn/o_proj"))
_NAMES = {
    **dict.fromkeys(models.EXPERT_FAMILIES, _MIXTURE_NAMES),
    "gpt-neox": _NEOX_NAMES,
    "gpt-neox-sequential": _NEOX_NAMES,
    "opt": (
        "model/decoder",
        "embed_(tokens|positions)|final_layer_norm|layers.\\d+/(self_attn|fc1|fc2|final_layer_norm)",
        ("self_attn/q_proj", "self_attn/out_proj", "fc1", "fc2"),
    ),
}
"""Family -> where its layers are, the modules there, and some of their linears."""


@pytest.mark.parametrize("recipe", ["float", "w4a4kv4"])
@each_family
def test_nodes_are_named_after_their_modules_and_once(exported: Exported, family, recipe) -> None:
    model = ir.load(exported(family, recipe) / "model.onnx")
    names = [node.name or "" for node in model.graph]
    assert len(set(names)) == len(names)
    root, modules, linears = _NAMES.get(family, _LLAMA_NAMES)
    stray = [n for n in names if not re.match(rf"/({root}(/({modules}))?|lm_head)?", n)]
    assert stray == []
    product = "MatMul" if recipe == "float" else "Int4Gemm"
    for index in range(LAYERS):
        for linear in linears:
            assert f"/{root}/layers.{index}/{linear}/{product}" in names
    for node in model.graph:
        for position, output in enumerate(node.outputs):
            assert output.is_graph_output() or (output.name or "").startswith(node.name or "")
            assert position < 3 or node.op_type == "Split"  # which has one for each expert


def test_layers_of_one_kind_have_one_graph(traced_once: None, hugging_face: HuggingFace) -> None:
    model = _float(hugging_face("llama"))
    kinds = [
        [
            node.op_type
            for node in model.graph
            if (node.name or "").startswith(f"/model/layers.{i}/")
        ]
        for i in range(LAYERS)
    ]
    assert kinds[0] == kinds[1] == kinds[2]
    assert kinds[0].count("MatMul") == 7


def test_layers_of_two_kinds_read_two_masks(traced_once: None, hugging_face: HuggingFace) -> None:
    """Qwen2 here: full attention in layer 0, a sliding window in layers 1 and 2."""
    model = _float(hugging_face("qwen2-biases"))
    masks = [node.inputs[3] for node in model.graph if node.op_type == "Attention"]
    assert masks[0] is not masks[1]
    assert masks[1] is masks[2]


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
def test_the_float_dtype_is_everywhere_but_in_the_angles(
    traced_once: None, hugging_face: HuggingFace, dtype
) -> None:
    model = _float(hugging_face("llama"), dtype)
    assert model.graph.outputs[0].dtype == dtype
    assert {v.dtype for v in model.graph.inputs[3:]} == {dtype}
    weights = [v for v in model.graph.initializers.values() if isinstance(v.const_value, Weight)]
    assert {v.dtype for v in weights} == {v.const_value.dtype for v in weights} == {dtype}
    wide = {node.name for node in model.graph for v in node.outputs if v.dtype == ir.DataType.FLOAT}
    assert wide
    assert all(name.startswith("/model/rotary_emb/") for name in wide)


def test_nothing_is_read_while_the_graph_is_made(
    traced_once: None, hugging_face: HuggingFace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(entry):
        raise AssertionError(entry.name)

    monkeypatch.setattr("quarot_onnx.export.checkpoint._map", refuse)
    _float(hugging_face("llama"))


def test_a_tied_head_reads_the_embedding(traced_once: None, hugging_face: HuggingFace) -> None:
    model = _float(hugging_face("llama-tied"))
    assert "lm_head.weight" not in model.graph.initializers
    users = [
        user.op_type for user, _ in model.graph.initializers["model.embed_tokens.weight"].uses()
    ]
    assert sorted(users) == ["Gather", "Transpose"]


def test_a_head_that_differs_from_a_tied_embedding_is_used_as_transformers_does(
    tmp_path: Path, traced_once: None
) -> None:
    source = models.save(models.build("llama"), tmp_path / "hf")
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    assert "lm_head.weight" in _float(source).graph.initializers


def test_a_missing_bias_is_named(tmp_path: Path, traced_once: None) -> None:
    source = models.save(models.build("llama"), tmp_path / "hf")
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_bias": True}))
    with pytest.raises(
        InputError, match=r"tensor model\.layers\.0\.self_attn\.q_proj\.bias is miss"
    ):
        _float(source)


def test_a_bias_that_the_configuration_does_not_know_is_refused(
    tmp_path: Path, traced_once: None
) -> None:
    directory = models.save(models.build("llama", attention_bias=True), tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "attention_bias": False}))
    with pytest.raises(InputError, match=r"proj\.bias belongs to a module .* repair config"):
        onnx_from_huggingface(Checkpoint(directory), ir.DataType.FLOAT)
