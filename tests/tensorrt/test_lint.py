# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from quarot_onnx import artifacts
from quarot_onnx.export.tensorrt.lint import parser_operators, problems
from quarot_onnx.export.tensorrt.lowering import PLUGINS, Target, lower
from tests.conftest import Exported

NEWEST = (11, 4)


@pytest.fixture(scope="module")
def sound(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    directory: Path = tmp_path_factory.mktemp("lint")
    artifacts.save_model(lower(exported("llama", "w4a4kv4", (), "float16"), Target()), directory)
    return onnx.load(directory / artifacts.MODEL, load_external_data=False)


@pytest.fixture
def planted(sound: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(sound)
    return copy


def test_a_lowered_graph_has_no_problem(sound: onnx.ModelProto) -> None:
    assert problems(sound, NEWEST) == []


def _node(graph: onnx.GraphProto, operator: str) -> onnx.NodeProto:
    return next(node for node in graph.node if node.op_type == operator)


def _unsupported(graph: onnx.GraphProto) -> None:
    _node(graph, "Sigmoid").op_type = "Det"


def _foreign(graph: onnx.GraphProto) -> None:
    _node(graph, "Sigmoid").domain = "com.microsoft"


def _uint8(graph: onnx.GraphProto) -> None:
    graph.node.append(helper.make_node("Cast", ["logits"], ["bytes"], "late", to=TensorProto.UINT8))


def _uint8_constant(graph: onnx.GraphProto) -> None:
    graph.initializer.append(numpy_helper.from_array(np.zeros(3, np.uint8), "table"))
    graph.node.append(helper.make_node("Cast", ["table"], ["floats"], "wide", to=TensorProto.FLOAT))


def _indirect(graph: onnx.GraphProto) -> None:
    gemm = _node(graph, "Int4Gemm")
    identity = helper.make_node("Identity", [gemm.input[2]], ["through"], "between")
    gemm.input[2] = "through"
    graph.node.insert(0, identity)


def _no_namespace(graph: onnx.GraphProto) -> None:
    attributes = _node(graph, "KvAppend").attribute
    attributes.remove(next(a for a in attributes if a.name == "plugin_namespace"))


def _unknown_plugin(graph: onnx.GraphProto) -> None:
    _node(graph, "QuantizeInt4").op_type = "QuantizeInt3"


def _mixed(graph: onnx.GraphProto) -> None:
    graph.initializer.append(numpy_helper.from_array(np.float32(2), "two"))
    graph.node.append(helper.make_node("Mul", ["logits", "two"], ["twice"], "mixed"))


def _bool_add(graph: onnx.GraphProto) -> None:
    graph.initializer.append(numpy_helper.from_array(np.zeros((2, 2), np.int8), "codes"))
    graph.node.append(helper.make_node("Neg", ["codes"], ["negative"], "negate"))


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (_unsupported, "act_fn/Sigmoid: Det is not in the parser's list"),
        (_foreign, "Sigmoid is of domain com.microsoft, which nobody registers"),
        (_uint8, "late: bytes is UINT8, which no layer may write"),
        (_uint8_constant, "wide: table is a constant of UINT8, which the parser widens to INT32"),
        (_indirect, "q_k_v_proj.weight is a constant of INT8; it must feed its plugin directly"),
        (_no_namespace, 'KvAppend has not plugin_namespace = "quarot", so the parser would not'),
        (_unknown_plugin, "QuantizeInt3 has no creator in the plugin library"),
        (_mixed, "graph: types do not fit"),
        (_bool_add, "negate: Neg of INT8, the parser takes"),
    ],
)
def test_finds_what_the_parser_would_refuse_or_misunderstand(
    planted: onnx.ModelProto, plant: Callable[[onnx.GraphProto], None], message: str
) -> None:
    plant(planted.graph)
    found = problems(planted, NEWEST)
    assert any(message in line for line in found), found


def test_finds_a_function_that_would_be_inlined(
    planted: onnx.ModelProto, exported: Exported
) -> None:
    artifact = exported("llama", "w4a4kv4", (), "float16")
    source = onnx.load(artifact / artifacts.MODEL, load_external_data=False)
    planted.functions.append(next(f for f in source.functions if f.name == "Int4Gemm"))
    assert any(
        "function Int4Gemm: a local function would be" in p for p in problems(planted, NEWEST)
    )


def test_finds_operators_that_came_later(sound: onnx.ModelProto) -> None:
    found = problems(sound, (10, 14))
    assert any("RMSNormalization is imported from TensorRT 10.15 on" in line for line in found)
    assert any("RotaryEmbedding is imported from TensorRT 10.15 on" in line for line in found)


def test_finds_what_the_built_library_lacks(sound: onnx.ModelProto) -> None:
    creators = {name: {"attributes": []} for name in PLUGINS if name != "KvAttention"}
    found = problems(sound, NEWEST, creators)
    assert any("KvAttention has no creator in the plugin library" in line for line in found)
    assert any(
        "has the attribute weight_layout, which the plugin library" in line for line in found
    )


def test_the_list_of_the_parser_names_what_it_refuses_by_leaving_it_out() -> None:
    known = parser_operators()
    for refused in ("MatMulInteger", "BitShift", "DynamicQuantizeLinear", "QLinearMatMul"):
        assert refused not in known
    assert known["RMSNormalization"][0] == (10, 15)
    assert known["MatMul"] == ((10, 0), frozenset({"FP32", "FP16", "BF16"}))
