# SPDX-License-Identifier: Apache-2.0
"""How passes put an online Hadamard or transform in front of an input of a node."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from quarot_onnx import ops
from quarot_onnx.hadamard import Plan
from quarot_onnx.weights import ArraySource, Float64, Weight


def describe(plan: Plan) -> str:
    """The factors, and the block size where it is not the whole dimension."""
    text = f"hadamard {' x '.join(str(factor) for factor in plan.factors)}"
    if plan.kind == "padded":
        return f"{text} of {plan.size} padded to {plan.padded_size}"
    return text if plan.kind == "full" else f"{text} in blocks of {plan.block_size}"


def module_of(node: ir.Node) -> str:
    """The path of the module that `node` computes in: its name without the operator."""
    return (node.name or "").rpartition("/")[0]


def insert_hadamard(model: ir.Model, node: ir.Node, position: int, plan: Plan, name: str) -> None:
    """Rotate input `position` of `node` by `plan` along its last axis, padded where it says so."""
    if plan.kind == "padded":
        _pad(model, node, position, plan, f"{name}/Pad")
    a, b = plan.matrices()
    matrices = [
        _shared(model, f"quarot.hadamard.{_order(plan)}.{side}", matrix)
        for side, matrix in (("A", a), ("B", b))
    ]
    _insert(model, node, position, "Hadamard", matrices, _factors(plan), name)


def insert_hadamard_heads(
    model: ir.Model, node: ir.Node, position: int, plan: Plan, name: str
) -> None:
    """Rotate input `position` of `node` by `plan` across the heads of its last axis."""
    matrix = _shared(model, f"quarot.hadamard.{_order(plan)}.heads", plan.matrix())
    _insert(model, node, position, "HadamardHeads", [matrix], _factors(plan), name)


def insert_transform(
    model: ir.Model, node: ir.Node, position: int, factors: tuple[Float64, Float64], name: str
) -> ir.Value:
    """Multiply input `position` of `node` by ``A ⊗ B`` along its last axis; gives the product."""
    matrices = [
        _own(model, f"quarot{name.replace('/', '.')}.{side}", matrix)
        for side, matrix in zip("AB", factors, strict=True)
    ]
    return _insert(model, node, position, "Transform", matrices, {}, name)


def insert_head_transform(
    model: ir.Model, node: ir.Node, position: int, matrix: Float64, name: str
) -> None:
    """Multiply input `position` of `node` by ``M ⊗ I``: across the heads of its last axis."""
    value = _own(model, f"quarot{name.replace('/', '.')}.A", matrix)
    _insert(model, node, position, "TransformHeads", [value], {}, name)


def _pad(model: ir.Model, node: ir.Node, position: int, plan: Plan, name: str) -> None:
    """Append zeros to the last axis of input `position` of `node`."""
    x = node.inputs[position]
    assert x is not None
    assert x.shape is not None
    zeros = plan.padded_size - plan.size
    constants = [
        _constant(model, f"quarot.pad.{zeros}", [0, zeros]),
        None,
        _constant(model, "quarot.pad.axis", [-1]),
    ]
    padded = ir.node("Pad", [x, *constants], {"mode": "constant"}, name=name)
    padded.outputs[0].name = f"{name}_output_0"
    padded.outputs[0].type = x.type
    padded.outputs[0].shape = ir.Shape([*x.shape[:-1], plan.padded_size])
    model.graph.insert_before(node, padded)
    node.replace_input_with(position, padded.outputs[0])


def _constant(model: ir.Model, name: str, numbers: list[int]) -> ir.Value:
    """The int64 initializer `name`, one for all sites."""
    if name not in model.graph.initializers:
        tensor = ir.tensor(np.array(numbers, np.int64), name=name)
        value = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape([len(numbers)])
        )
        value.const_value = tensor
        model.graph.initializers[name] = value
    return model.graph.initializers[name]


def _order(plan: Plan) -> str:
    return "x".join(str(factor) for factor in plan.factors)


def _factors(plan: Plan) -> dict[str, Any]:
    return {"factors": list(plan.factors)}


def _insert(
    model: ir.Model,
    node: ir.Node,
    position: int,
    operator: str,
    matrices: list[ir.Value],
    attributes: Mapping[str, Any],
    name: str,
) -> ir.Value:
    x = node.inputs[position]
    assert x is not None
    online = ops.node(operator, [x, *matrices], attributes, at=name)
    online.outputs[0].type, online.outputs[0].shape = x.type, x.shape
    model.graph.insert_before(node, online)
    node.replace_input_with(position, online.outputs[0])
    ops.declare(model)
    return online.outputs[0]


def _shared(model: ir.Model, name: str, matrix: Float64) -> ir.Value:
    """The float32 initializer `name`, one for all sites."""
    if name not in model.graph.initializers:
        tensor = ir.tensor(matrix.astype(np.float32), name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(matrix.shape))
        value.const_value = tensor
        model.graph.initializers[name] = value
    return model.graph.initializers[name]


def _own(model: ir.Model, name: str, matrix: Float64) -> ir.Value:
    """The initializer `name` of one site: float32 when written, float64 until then."""
    weight = Weight(name, ArraySource(matrix), ir.DataType.FLOAT)
    value = ir.Value(name=name, type=ir.TensorType(weight.dtype), shape=ir.Shape(matrix.shape))
    value.const_value = weight
    model.graph.initializers[name] = value
    return value
