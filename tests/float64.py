# SPDX-License-Identifier: Apache-2.0
"""An interpreter of float decoder graphs in float64: what equivalent passes must not change.

Online Hadamards are computed from their node's ``factors``, not from the float32 matrices beside
them, so that a rewritten model equals the original to float64 rounding.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quarot_onnx.hadamard import hadamard_matrix
from quarot_onnx.weights import Weight

Array = NDArray[Any]
Attributes = Mapping[str, Any]


def run(model: ir.Model, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """The outputs of `model`, every float in float64."""
    values: dict[ir.Value, Array] = {}
    for value in model.graph.inputs:
        values[value] = _wide(feeds[value.name or ""])
    for value in model.graph.initializers.values():
        held = value.const_value
        assert held is not None
        values[value] = held.float64() if isinstance(held, Weight) else _wide(held.numpy())
    for node in model.graph:
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        inputs = [values[v] for v in node.inputs if v is not None]
        values[node.outputs[0]] = _OPERATORS[node.op_type](attributes, *inputs)
    return {value.name or "": values[value] for value in model.graph.outputs}


def _wide(array: Array) -> Array:
    return array.astype(np.float64) if array.dtype.kind == "f" else array


def _canonical(factors: list[int]) -> Array:
    matrices = [hadamard_matrix(factor) / math.sqrt(factor) for factor in factors]
    return functools.reduce(np.kron, matrices, np.ones((1, 1)))


def _hadamard(attributes: Attributes, x: Array, *_: Array) -> Array:
    matrix = _canonical(attributes["factors"])
    return (x.reshape(-1, len(matrix)) @ matrix).reshape(x.shape)


def _hadamard_heads(attributes: Attributes, x: Array, *_: Array) -> Array:
    matrix = _canonical(attributes["factors"])
    return np.einsum(
        "ha,bhd->bad", matrix, x.reshape(-1, len(matrix), x.shape[-1] // len(matrix))
    ).reshape(x.shape)


def _transform(_: Attributes, x: Array, a: Array, b: Array) -> Array:
    matrix = np.kron(a, b)
    return (x.reshape(-1, len(matrix)) @ matrix).reshape(x.shape)


def _rms_normalization(attributes: Attributes, x: Array, scale: Array) -> Array:
    epsilon = attributes.get("epsilon", 1e-5)
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + epsilon) * scale


def _layer_normalization(attributes: Attributes, x: Array, scale: Array, shift: Array) -> Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    return _rms_normalization(attributes, centred, scale) + shift


def _rotary_embedding(_: Attributes, x: Array, cos: Array, sin: Array) -> Array:
    first, second = np.split(x, 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return np.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


def _attention(attributes: Attributes, q: Array, k: Array, v: Array, mask: Array) -> Array:
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat(groups, axis=1), v.repeat(groups, axis=1)
    scores = attributes["scale"] * q @ k.swapaxes(-1, -2)
    if "softcap" in attributes:
        scores = attributes["softcap"] * np.tanh(scores / attributes["softcap"])
    scores = np.where(mask, scores, np.finfo(q.dtype).min)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ v


def _reshape(_: Attributes, x: Array, shape: Array) -> Array:
    return x.reshape([x.shape[i] if n == 0 else n for i, n in enumerate(shape)])


_OPERATORS: Mapping[str, Callable[..., Array]] = {
    "Add": lambda _, x, y: x + y,
    "Attention": _attention,
    "Concat": lambda attributes, *parts: np.concatenate(parts, axis=attributes["axis"]),
    "Constant": lambda attributes: np.array(attributes["value_ints"]),
    "Gather": lambda attributes, x, ids: np.take(x, ids, axis=attributes.get("axis", 0)),
    "Hadamard": _hadamard,
    "HadamardHeads": _hadamard_heads,
    "Transform": _transform,
    "TransformHeads": lambda _, x, a: _transform(_, x, a, np.eye(x.shape[-1] // len(a))),
    "MatMul": lambda _, x, y: x @ y,
    "Mul": lambda _, x, y: x * y,
    "Pad": lambda _, x, pads, axes: np.pad(x, [(0, 0)] * (x.ndim + axes[0]) + [tuple(pads)]),
    "RMSNormalization": _rms_normalization,
    "LayerNormalization": _layer_normalization,
    "Reshape": _reshape,
    "RotaryEmbedding": _rotary_embedding,
    "Sigmoid": lambda _, x: 1 / (1 + np.exp(-x)),
    "Transpose": lambda attributes, x: x.transpose(attributes["perm"]),
}
