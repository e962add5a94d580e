# SPDX-License-Identifier: Apache-2.0
"""Mixture of experts: from stacks of weights to one linear for each expert.

    before:  y = GroupedLinear(x, W, counts, b)         rows of x sorted by expert, W [E, ...]
    after:   x_0, x_1, ... = Split(x, counts);   y = Concat(x_0 @ W_0 + b_0, x_1 @ W_1 + b_1, ...)

The marker of `quarot_onnx.export.trace` means just that: the first ``counts[0]`` rows belong to
expert 0. Every expert computes its own rows, which may be none, so that the work follows the
routing; what is done to all rows alike (activation function, online Hadamard) stays one node.
Where other nodes take parts of the features of y (gate and up), each part gets linears of its own.
"""

from dataclasses import replace

import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from quarot_onnx.export.canonical import (
    MODULE,
    PARTS,
    Fused,
    Reading,
    feature_parts,
    is_weight,
    reading,
    set_reading,
    take_place,
)
from quarot_onnx.export.checkpoint import Rows

GROUPED_LINEAR = "GroupedLinear"


def separate_experts(model: ir.Model) -> None:
    """Replace each ``GroupedLinear`` by a linear for each expert and each part of its features."""
    for node in list(model.graph):
        if node.op_type != GROUPED_LINEAR:
            continue
        bias = node.inputs[3] if len(node.inputs) > 3 else None
        fused = Fused(node, bias, node.outputs[0])
        taken = list(feature_parts(fused))
        parameter = (node.inputs[1].name or "").rpartition(".")[2]  # type: ignore[union-attr]
        split = _split(model.graph, node, parameter)
        if not taken:
            take_place(node, 0, _linears(model.graph, fused, split, parameter, None))
            continue
        names = PARTS.get(parameter, ())
        for number, (taker, position, rows) in enumerate(taken):
            name = names[number] if len(names) == len(taken) else f"{parameter}.{number}"
            take_place(taker, position, _linears(model.graph, fused, split, name, rows))
    common_passes.RemoveUnusedNodesPass()(model)


def _split(graph: ir.Graph, node: ir.Node, parameter: str) -> ir.Node:
    """The rows of each expert, as the outputs of a new node in front of `node`."""
    x, weight, counts = node.inputs[:3]
    assert x is not None
    assert x.shape is not None
    assert weight is not None
    assert weight.shape is not None
    experts = weight.shape[0]
    assert isinstance(experts, int)
    split = ir.Node("", "Split", [x, counts], [ir.AttrInt64("axis", 0)], num_outputs=experts)
    split.metadata_props[MODULE] = f"{node.metadata_props[MODULE]}.{parameter}"
    for output in split.outputs:
        output.type, output.shape = x.type, ir.Shape([None, x.shape[-1]])
    graph.insert_before(node, split)
    return split


def _linears(
    graph: ir.Graph, fused: Fused, split: ir.Node, name: str, rows: Rows | None
) -> ir.Value:
    """The joined outputs of one linear for each expert, for `rows` of the features; None is all."""
    node, stack = fused.product, fused.product.inputs[1]
    assert stack is not None
    assert is_weight(stack)
    features = fused.features if rows is None else rows.count(fused.features)
    transposed = bool(node.attributes["transposed"].as_int())
    outputs: list[ir.Value] = []
    for expert, x in enumerate(split.outputs):
        module = f"{node.metadata_props[MODULE]}.{expert}.{name}"
        assert x.shape is not None

        def insert(op_type: str, inputs: list[ir.Value], module: str = module) -> ir.Value:
            new = ir.Node("", op_type, inputs, [], num_outputs=1)
            new.metadata_props[MODULE] = module
            new.outputs[0].type = fused.output.type
            new.outputs[0].shape = ir.Shape([None, features])
            graph.insert_before(node, new)
            return new.outputs[0]

        part = replace(reading(stack), transposed=transposed, rows=rows, index=expert)
        weight = _initializer(graph, f"{module}.weight", stack, [x.shape[-1], features], part)
        y = insert("MatMul", [x, weight])
        if fused.bias is not None:
            part = replace(reading(fused.bias), rows=rows, index=expert)
            bias = _initializer(graph, f"{module}.bias", fused.bias, [features], part)
            y = insert("Add", [y, bias])
        outputs.append(y)
    joined = ir.Node("", "Concat", outputs, [ir.AttrInt64("axis", 0)], num_outputs=1)
    joined.metadata_props[MODULE] = f"{node.metadata_props[MODULE]}.{name}"
    result, whole = joined.outputs[0], fused.output
    assert whole.shape is not None
    result.type, result.shape = whole.type, ir.Shape([*whole.shape[:-1], features])
    graph.insert_before(node, joined)
    return result


def _initializer(
    graph: ir.Graph, name: str, like: ir.Value, shape: list[int | ir.SymbolicDim], how: Reading
) -> ir.Value:
    value = ir.Value(name=name, type=like.type, shape=ir.Shape(shape))
    set_reading(value, how)
    graph.initializers[name] = value
    return value
