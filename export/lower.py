# SPDX-License-Identifier: Apache-2.0
"""From markers to standard ONNX: the float model that every later stage starts from.

``KvAppend(past, new)`` becomes ``Concat`` along tokens, ``KvAttention`` becomes opset 23's
``Attention`` with a boolean mask (with sinks, for which ONNX has no operator, the function
``AttentionSinks`` of `quarot_onnx.ops`), and the float parts get the dtype that was asked for.
"""

import onnx_ir as ir

from quarot_onnx import ops
from quarot_onnx.export.trace import MARKER_DOMAIN


def lower_markers(model: ir.Model) -> None:
    """Replace the markers of `quarot_onnx.export.trace` by ``Concat`` and ``Attention``."""
    for node in list(model.graph):
        if node.domain != MARKER_DOMAIN:
            continue
        if node.op_type == "KvAppend":
            replacement = ir.node("Concat", list(node.inputs), {"axis": 2})
        elif len(node.inputs) == 5:
            given = [v for v in node.inputs if v is not None]
            scale = node.attributes["scale"].as_float()
            replacement = ops.node("AttentionSinks", given, {"scale": scale}, at="")
        else:
            softcap = node.attributes["softcap"].as_float()
            attributes = {"scale": node.attributes["scale"].as_float()}
            replacement = ir.node(
                "Attention",
                list(node.inputs),
                attributes | ({"softcap": softcap} if softcap else {}),
            )
        replacement.metadata_props.update(node.metadata_props)
        old, new = node.outputs[0], replacement.outputs[0]
        new.name, new.type, new.shape = old.name, old.type, old.shape
        model.graph.insert_before(node, replacement)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)
    model.graph.opset_imports.pop(MARKER_DOMAIN, None)
    ops.declare(model)


def set_float_dtype(model: ir.Model, dtype: ir.DataType) -> None:
    """Give every float value `dtype`, except the RoPE angles, whose cosines and sines are cast.

    Angles need float32: position * frequency has no room in 11 bits (transformers does the same).
    """
    if dtype == ir.DataType.FLOAT:
        return
    angles = {node for node in model.graph if node.op_type in ("Cos", "Sin")}
    pending = [v for node in angles for v in node.inputs if v is not None]
    while pending:
        producer = pending.pop().producer()
        if producer is not None and producer not in angles:
            angles.add(producer)
            pending.extend(v for v in producer.inputs if v is not None)
    kept = {v for node in angles for v in (*node.inputs, *node.outputs)}
    for node in list(model.graph):
        if node.op_type in ("Cos", "Sin"):
            cast = ir.node("Cast", [node.outputs[0]], {"to": dtype})
            cast.metadata_props.update(node.metadata_props)
            cast.outputs[0].type, cast.outputs[0].shape = (
                ir.TensorType(dtype),
                node.outputs[0].shape,
            )
            node.outputs[0].replace_all_uses_with(cast.outputs[0])
            cast.replace_input_with(0, node.outputs[0])
            model.graph.insert_after(node, cast)
        elif node not in angles:
            _retype_node(node, dtype)
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        if value not in kept:
            _retype(value, dtype)


def _retype_node(node: ir.Node, dtype: ir.DataType) -> None:
    for value in node.outputs:
        _retype(value, dtype)
    to = node.attributes.get("to")
    if node.op_type == "Cast" and to is not None and to.as_int() == ir.DataType.FLOAT:
        node.attributes["to"] = ir.AttrInt64("to", int(dtype))


def _retype(value: ir.Value, dtype: ir.DataType) -> None:
    if value.dtype != ir.DataType.FLOAT:
        return
    value.type = ir.TensorType(dtype)
    if value.const_value is not None:
        array = value.const_value.numpy().astype(dtype.numpy())
        value.const_value = ir.tensor(array, name=value.name)
