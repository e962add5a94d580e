# SPDX-License-Identifier: Apache-2.0
"""Parts of a decoder's graph, from some values to others, as they are at this moment."""

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

from quarot_onnx import ops
from quarot_onnx.weights import Weight

_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def between(graph: ir.Graph, starts: Sequence[ir.Value], ends: Iterable[ir.Value]) -> list[ir.Node]:
    """The nodes on which `ends` depend, up to `starts`, in the graph's order."""
    needed: set[ir.Node] = set()
    pending = [value.producer() for value in ends]
    while pending:
        node = pending.pop()
        if node is not None and node not in needed:
            needed.add(node)
            inputs = (v for v in node.inputs if v is not None and v not in starts)
            pending.extend(v.producer() for v in inputs)
    return [node for node in graph if node in needed]


def cut(model: ir.Model, ends: list[ir.Value], start: ir.Value | None) -> ir.Model:
    """A float32 model that computes `ends` from `start` and the model's inputs."""
    inputs = [*model.graph.inputs, *([start] if start is not None else [])]
    graph = ir.convenience.extract(model.graph, inputs, ends)
    outputs = {value.name for value in graph.outputs}
    for value in list(graph.inputs):
        if not value.uses() and value.name not in outputs:
            graph.inputs.remove(value)
    _use_float32(graph)
    if model.functions:
        graph.opset_imports[ops.DOMAIN] = ops.VERSION
    return ir.Model(graph, ir_version=model.ir_version, functions=list(model.functions.values()))


def _use_float32(graph: ir.Graph) -> None:
    """Compute in float32 what the export will compute in half precision."""
    for node in graph:
        for name in ("to", "dtype"):
            held = node.attributes.get(name)
            if held is not None and held.as_int() in _HALVES:
                node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
        constant = node.attributes.get("value")
        if constant is not None and constant.as_tensor().dtype in _HALVES:
            array = constant.as_tensor().numpy().astype(np.float32)
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(array))
        for value in node.outputs:
            _retype(value)
    for value in [*graph.inputs, *graph.initializers.values()]:
        _retype(value)


def _retype(value: ir.Value) -> None:
    if value.dtype not in _HALVES:
        return
    value.type = ir.TensorType(ir.DataType.FLOAT)
    held = value.const_value
    if isinstance(held, Weight):
        weight = held.derive(held.name)
        weight.dtype = ir.DataType.FLOAT
        value.const_value = weight
    elif held is not None:
        value.const_value = ir.tensor(held.numpy().astype(np.float32), name=value.name)
