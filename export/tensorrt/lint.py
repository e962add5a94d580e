# SPDX-License-Identifier: Apache-2.0
"""What TensorRT's parser would refuse, or take and run as something else, said before it is asked.

The list of operators is `parser_operators.tsv`. That a graph passes does not mean that an engine
can be built: only the builder knows. What is known to go wrong silently is a problem here too: a
local function is inlined in place of a plugin, a UINT8 constant becomes INT32, and a quantized
constant that does not feed its plugin directly is refused by the builder, not by the parser.
"""

from collections.abc import Iterator, Mapping
from importlib.resources import files
from typing import Any

import onnx

from quarot_onnx import ops
from quarot_onnx.export.tensorrt.lowering import PLUGINS

MAX_OPSET = 24
_NAMES: dict[int, str] = {
    onnx.TensorProto.FLOAT: "FP32",
    onnx.TensorProto.FLOAT16: "FP16",
    onnx.TensorProto.BFLOAT16: "BF16",
    onnx.TensorProto.INT8: "INT8",
    onnx.TensorProto.UINT8: "UINT8",
    onnx.TensorProto.INT32: "INT32",
    onnx.TensorProto.INT64: "INT64",
    onnx.TensorProto.BOOL: "BOOL",
    onnx.TensorProto.INT4: "INT4",
}
_QUANTIZED = {"INT8", "INT4"}
_QUANTIZERS = {"QuantizeLinear", "DequantizeLinear"}

Creators = Mapping[str, Mapping[str, Any]]
"""Plugin name -> what the built library says of it; ``attributes`` are its field names."""


def parser_operators() -> dict[str, tuple[tuple[int, int], frozenset[str]]]:
    """Operator -> the first TensorRT that imports it, and its element types (any where empty)."""
    text = (files("quarot_onnx.export.tensorrt") / "parser_operators.tsv").read_text("utf-8")
    found = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, since, types = line.split("\t")
            major, minor = since.split(".")
            found[name] = ((int(major), int(minor)), frozenset(types.split()))
    return found


def problems(
    model: onnx.ModelProto, version: tuple[int, int], creators: Creators | None = None
) -> list[str]:
    """One line for each thing in `model` that TensorRT `version` would refuse or misunderstand.

    Args:
        model: the graph; its external data is not read.
        version: major and minor.
        creators: of the built plugin library; what ``docs/plugins.md`` promises where None.
    """
    types, inferred = _types(model)
    return [
        *inferred,
        *_model_problems(model),
        *_operator_problems(model, version, creators),
        *_type_problems(model, types),
        *_constant_problems(model),
    ]


def _types(model: onnx.ModelProto) -> tuple[dict[str, str], list[str]]:
    """The element type of every tensor, and what strict typing refuses."""
    found: list[str] = []
    try:
        model = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    except (onnx.shape_inference.InferenceError, ValueError) as error:
        found.append(f"graph: types do not fit ({str(error).strip().splitlines()[0]})")
    graph = model.graph
    types = {tensor.name: _type_name(tensor.data_type) for tensor in graph.initializer}
    for value in [*graph.input, *graph.output, *graph.value_info]:
        types[value.name] = _type_name(value.type.tensor_type.elem_type)
    return types, found


def _type_name(number: int) -> str:
    return _NAMES.get(number) or str(onnx.TensorProto.DataType.Name(number))


def _model_problems(model: onnx.ModelProto) -> Iterator[str]:
    for function in model.functions:
        yield f"function {function.name}: a local function would be inlined in place of its plugin"
    for opset in model.opset_import:
        if opset.domain in ("", "ai.onnx") and opset.version > MAX_OPSET:
            yield f"opset {opset.version}: the parser reads up to {MAX_OPSET}"


def _operator_problems(
    model: onnx.ModelProto, version: tuple[int, int], creators: Creators | None
) -> Iterator[str]:
    known = parser_operators()
    for node in model.graph.node:
        where = f"{node.name}: {node.op_type}"
        if node.domain == ops.DOMAIN:
            yield from _plugin_problems(node, where, creators)
        elif node.domain not in ("", "ai.onnx"):
            yield f"{where} is of domain {node.domain}, which nobody registers"
        elif node.op_type not in known:
            yield f"{where} is not in the parser's list"
        elif (since := known[node.op_type][0]) > version:
            yield f"{where} is imported from TensorRT {since[0]}.{since[1]} on"


def _plugin_problems(node: onnx.NodeProto, where: str, creators: Creators | None) -> Iterator[str]:
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    wanted = {"plugin_namespace": ops.DOMAIN, "plugin_version": str(ops.VERSION)}
    for name, value in wanted.items():
        if attributes.pop(name, b"") != value.encode():
            yield f'{where} has not {name} = "{value}", so the parser would not find its plugin'
    names = PLUGINS if creators is None else creators
    if node.op_type not in names:
        yield f"{where} has no creator in the plugin library"
    elif creators is not None:
        fields = {entry["name"] for entry in creators[node.op_type]["attributes"]}
        for name in sorted(attributes.keys() - fields):
            yield f"{where} has the attribute {name}, which the plugin library does not know"


def _type_problems(model: onnx.ModelProto, types: dict[str, str]) -> Iterator[str]:
    known = parser_operators()
    for node in model.graph.node:
        for name in node.output:
            if name and name not in types:
                yield f"{node.name}: the type of {name} is not known"
            elif types.get(name) == "UINT8":
                yield f"{node.name}: {name} is UINT8, which no layer may write"
        if node.domain == ops.DOMAIN or node.op_type not in known:
            continue
        allowed = known[node.op_type][1]
        # Shapes, axes and indices are integers of their own; the first input is what is computed.
        first = next((name for name in node.input if name), None)
        if allowed and first is not None and types.get(first, "FP32") not in allowed:
            yield (
                f"{node.name}: {node.op_type} of {types[first]}, the parser takes "
                f"{', '.join(sorted(allowed))}"
            )


def _constant_problems(model: onnx.ModelProto) -> Iterator[str]:
    kinds = {t.name: _type_name(t.data_type) for t in model.graph.initializer}
    for node in model.graph.node:
        takes_codes = node.domain == ops.DOMAIN or node.op_type in _QUANTIZERS
        for name in node.input:
            kind = kinds.get(name)
            if kind in _QUANTIZED and not takes_codes:
                yield (
                    f"{node.name}: {name} is a constant of {kind}; it must feed its plugin directly"
                )
            elif kind == "UINT8" and node.op_type not in _QUANTIZERS:
                yield (
                    f"{node.name}: {name} is a constant of UINT8, which the parser widens to INT32"
                )
