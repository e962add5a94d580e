# SPDX-License-Identifier: Apache-2.0
"""An artifact's decoder as a person thinks of it: ``quarot-onnx inspect``.

Reads ``model.onnx`` and the manifest; weights stay on disk.
"""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from quarot_onnx.artifacts import MODEL, load_manifest
from quarot_onnx.errors import InputError
from quarot_onnx.ops import DOMAIN, OPERATORS

_BITS = {
    ir.DataType.INT4: 4,
    ir.DataType.INT8: 8,
    ir.DataType.FLOAT: 32,
    ir.DataType.FLOAT16: 16,
    ir.DataType.BFLOAT16: 16,
}
_LINEARS = {"MatMul": 1} | {
    name: operator.inputs.index("w")
    for name, operator in OPERATORS.items()
    if "w" in operator.inputs
}
"""Where a linear has its weight: among the inputs of each operator."""


@dataclass(frozen=True)
class LinearRow:
    """One linear.

    Attributes:
        layer: index of its layer, None for the head.
        name: module path inside the layer, such as ``mlp.down_proj``.
        in_features, out_features: of the weight.
        weight_bits: stored bits of a weight.
        activation_bits: bits of the codes it multiplies; the float dtype's where it is not
        quantized.
        rotation: the online rotation in front of it, with factors.
        bytes: of the weight, its scales and its zero points.
    """

    layer: int | None
    name: str
    in_features: int
    out_features: int
    weight_bits: int
    activation_bits: int
    rotation: str
    bytes: int


@dataclass(frozen=True)
class Inspection:
    """What is in an artifact.

    Attributes:
        manifest: the manifest.
        linears: every linear, in order.
        layers: how many.
        cache: name, dtype and shape of one layer's cache inputs.
        operators: how many nodes of each ``quarot`` operator.
        nodes: how many nodes in all.
        weight_bytes: of all initializers.
    """

    manifest: dict[str, Any]
    linears: tuple[LinearRow, ...]
    layers: int
    cache: tuple[tuple[str, str, str], ...]
    operators: dict[str, int]
    nodes: int
    weight_bytes: int


def inspect(artifact: Path) -> Inspection:
    """The contents of `artifact`.

    Raises:
        InputError: not an artifact, or its graph cannot be read.
    """
    manifest = load_manifest(artifact)
    try:
        model = ir.load(artifact / MODEL)
    except Exception as error:  # onnx-ir raises what protobuf raises; every kind means damage
        raise InputError(f"{artifact / MODEL}: cannot be read ({error}); export again") from error
    graph = model.graph
    layers = {
        int(m[1])
        for v in graph.inputs
        if (m := re.match(r"past_key_values\.(\d+)\.", v.name or ""))
    }
    tensors = (value.const_value for value in graph.initializers.values())
    return Inspection(
        manifest=manifest,
        linears=tuple(row for node in graph if (row := _linear(node)) is not None),
        layers=len(layers),
        cache=tuple(
            (v.name or "", str(v.dtype), str(v.shape))
            for v in graph.inputs
            if (v.name or "").startswith("past_key_values.0.")
        ),
        operators=dict(sorted(Counter(n.op_type for n in graph if n.domain == DOMAIN).items())),
        nodes=len(list(graph)),
        weight_bytes=sum(t.nbytes for t in tensors if t is not None),
    )


def _linear(node: ir.Node) -> LinearRow | None:
    position = _LINEARS.get(node.op_type)
    weight = node.inputs[position] if position is not None else None
    if (
        weight is None
        or not weight.is_initializer()
        or weight.shape is None
        or len(weight.shape) != 2
    ):
        return None
    module = (node.name or "").strip("/").rpartition("/")[0]
    match = re.match(r"(?:.*/)?layers\.(\d+)/(.*)", module)
    stored = [value for value in node.inputs[position:] if value is not None]
    in_features, out_features = weight.shape.numpy()
    return LinearRow(
        layer=int(match[1]) if match else None,
        name=(match[2] if match else module).replace("/", "."),
        in_features=in_features,
        out_features=out_features,
        weight_bits=_BITS.get(weight.dtype or ir.DataType.FLOAT, 32),
        activation_bits=_activation_bits(node),
        rotation=_rotation(node),
        bytes=sum(value.const_value.nbytes for value in stored if value.const_value is not None),
    )


def _activation_bits(node: ir.Node) -> int:
    producer = _computed_by(node.inputs[0])
    if producer is not None and "bits" in producer.attributes:
        return int(producer.attributes["bits"].as_int())
    x = node.inputs[0]
    return _BITS.get(x.dtype, 32) if x is not None and x.dtype is not None else 32


def _computed_by(value: ir.Value | None) -> ir.Node | None:
    """The node that computes `value`, looking through what copies and groups rows for experts."""
    producer = value.producer() if value is not None else None
    while producer is not None and producer.op_type in ("Split", "Gather"):
        source = producer.inputs[0]
        producer = source.producer() if source is not None else None
    return producer


def _rotation(node: ir.Node) -> str:
    """The online rotation in front of a linear, looking through its quantization."""
    value = node.inputs[0]
    for _ in range(2):
        producer = _computed_by(value)
        if producer is None or producer.domain != DOMAIN:
            return ""
        if producer.op_type.startswith("Hadamard"):
            factors = " x ".join(str(f) for f in producer.attributes["factors"].as_ints())
            return f"{factors} across heads" if producer.op_type == "HadamardHeads" else factors
        if producer.op_type.startswith("Transform"):
            orders = [v.shape[0] for v in producer.inputs[1:] if v is not None and v.shape]
            across = " across heads" if producer.op_type == "TransformHeads" else ""
            return f"given {' x '.join(map(str, orders))}{across}"
        value = producer.inputs[0]
    return ""
