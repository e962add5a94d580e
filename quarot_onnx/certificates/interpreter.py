# SPDX-License-Identifier: Apache-2.0
"""Run a part of a float decoder graph with NumPy, in float64 or float32.

ONNX Runtime has no float64 kernels for a decoder's operators, and without float64 nobody can tell
an exact rewrite from one that is nearly right. The arithmetic is `onnx.reference`'s; what is ours
is the cutting of the graph, the lazy weights, and the dtype, which replaces every float dtype of
the graph. Online Hadamards are computed from their node's ``factors``: the float32 matrices beside
them are rounded.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from quarot_onnx.hadamard import hadamard_matrix
from quarot_onnx.ops import DOMAIN, OPSET, VERSION
from quarot_onnx.sections import between
from quarot_onnx.weights import Weight

Array = NDArray[Any]
Read = Callable[[Weight], Array]
"""How the numbers of a weight are obtained."""


@dataclass(frozen=True)
class Section:
    """The nodes from some values of a graph to others, as they were when it was cut.

    Attributes:
        model: the nodes alone; weights and constants are inputs of theirs.
        inputs: names of the values it starts from, those of the graph's inputs included.
        outputs: names of the values it ends in.
        weights: by name; copies, which later passes leave as they are.
        constants: every other initializer it reads.
    """

    model: onnx.ModelProto
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: Mapping[str, Weight]
    constants: Mapping[str, Array]

    @classmethod
    def cut(
        cls, graph: ir.Graph, starts: Sequence[ir.Value], ends: Sequence[ir.Value]
    ) -> "Section":
        """The nodes of `graph` that compute `ends` from `starts` and from the graph's inputs."""
        nodes = between(graph, starts, ends)
        computed = {value for node in nodes for value in node.outputs}
        read = (v for node in nodes for v in node.inputs if v is not None and v not in computed)
        leaves = list(dict.fromkeys(read))
        weights = {
            v.name or "": v.const_value.derive(v.name or "")
            for v in leaves
            if isinstance(v.const_value, Weight)
        }
        constants = {
            v.name or "": v.const_value.numpy()
            for v in leaves
            if v.const_value is not None and not isinstance(v.const_value, Weight)
        }
        inputs = tuple(v.name or "" for v in leaves if v.const_value is None)
        proto = onnx.helper.make_graph(
            [ir.serde.serialize_node(node) for node in nodes],
            "section",
            [onnx.ValueInfoProto(name=name) for name in (*inputs, *weights, *constants)],
            [onnx.ValueInfoProto(name=v.name or "") for v in ends],
        )
        opsets = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(DOMAIN, VERSION)]
        model = onnx.helper.make_model(proto, opset_imports=opsets)
        return cls(model, inputs, tuple(v.name or "" for v in ends), weights, constants)

    def run(self, feeds: Mapping[str, Array], dtype: Any, read: Read) -> list[Array]:
        """The values at its ends, computed in `dtype`.

        Args:
            feeds: at least `inputs`, by name.
            dtype: numpy.float64 or numpy.float32.
            read: of a weight; tables of embeddings are read by the row instead.
        """
        evaluator = ReferenceEvaluator(self.model, new_ops=_operators(dtype))
        values: dict[str, Any] = {name: _as(feeds[name], dtype) for name in self.inputs}
        values |= {name: _as(array, dtype) for name, array in self.constants.items()}
        for name, weight in self.weights.items():
            is_lazy = name in self._matrices
            values[name] = _Matrix(weight, dtype, read) if is_lazy else read(weight).astype(dtype)
        results = evaluator.run(None, values)
        return [np.asarray(result) for result in results]

    @functools.cached_property
    def _matrices(self) -> frozenset[str]:
        """The weights that only a Gather or a MatMul reads: too large to hold all at once."""
        readers: dict[str, set[str]] = {}
        for node in self.model.graph.node:
            for name in node.input:
                readers.setdefault(name, set()).add(node.op_type)
        return frozenset(n for n in self.weights if readers[n] <= {"Gather", "MatMul"})


def _as(array: Array, dtype: Any) -> Array:
    return array.astype(dtype) if array.dtype.kind == "f" else array


# --- Operators that differ from `onnx.reference` --------------------------------------------------


@dataclass(frozen=True)
class _Matrix:
    """A weight that is computed where it is used and dropped after."""

    weight: Weight
    dtype: Any
    read: Read

    def rows(self, ids: Array) -> Array:
        """The rows of a table of embeddings at `ids`; no other is computed."""
        columns = slice(0, self.weight.sizes[1])
        unique, places = np.unique(ids, return_inverse=True)
        rows = [self.weight.read((slice(int(i), int(i) + 1), columns)) for i in unique]
        return np.concatenate(rows)[places.reshape(ids.shape)].astype(self.dtype)

    def whole(self) -> Array:
        """Every number of it."""
        return self.read(self.weight).astype(self.dtype, copy=False)


class Gather(OpRun):
    """``onnx.Gather``, of a lazy table too."""

    def _run(self, data: Any, indices: Array, axis: int = 0) -> tuple[Array]:
        if isinstance(data, _Matrix):
            return (data.rows(indices),)
        return (np.take(data, indices, axis=axis),)


class MatMul(OpRun):
    """``onnx.MatMul``, by a lazy matrix too."""

    def _run(self, x: Array, y: Any) -> tuple[Array]:
        return (np.matmul(x, y.whole() if isinstance(y, _Matrix) else y),)


def _rotated(x: Array, factors: Sequence[int], inner: int = 1) -> Array:
    """``x @ (I ⊗ H ⊗ I_inner)`` in x's dtype, a factor of H at a time: H whole may not fit."""
    folded = x.reshape(-1, *factors, inner)
    for axis, factor in enumerate(factors, start=1):
        matrix = (hadamard_matrix(factor) / math.sqrt(factor)).astype(x.dtype)
        turned = np.tensordot(folded, matrix, axes=(axis, 0))
        folded = np.moveaxis(turned, -1, axis)
    return folded.reshape(x.shape)


class Hadamard(OpRun):
    """``x @ (I ⊗ H)`` in x's dtype, see `quarot_onnx.ops.hadamard`."""

    op_domain = DOMAIN

    def _run(self, x: Array, *_: Array, factors: Sequence[int], **__: Any) -> tuple[Array]:
        return (_rotated(x, factors),)


class HadamardHeads(OpRun):
    """``x @ (H ⊗ I)`` in x's dtype, see `quarot_onnx.ops.hadamard_heads`."""

    op_domain = DOMAIN

    def _run(self, x: Array, *_: Array, factors: Sequence[int], **__: Any) -> tuple[Array]:
        return (_rotated(x, factors, x.shape[-1] // math.prod(factors)),)


class Transform(OpRun):
    """``x @ (I ⊗ A ⊗ B)`` in x's dtype, see `quarot_onnx.ops.hadamard`."""

    op_domain = DOMAIN

    def _run(self, x: Array, a: Array, b: Array, **_: Any) -> tuple[Array]:
        folded = x.reshape(-1, len(a), len(b))
        return ((a.T @ (folded @ b)).reshape(x.shape),)


class TransformHeads(OpRun):
    """``x @ (A ⊗ I)`` in x's dtype, see `quarot_onnx.ops.hadamard_heads`."""

    op_domain = DOMAIN

    def _run(self, x: Array, a: Array, **_: Any) -> tuple[Array]:
        folded = x.reshape(-1, len(a), x.shape[-1] // len(a))
        return ((a.T @ folded).reshape(x.shape),)


class AttentionSinks(OpRun):
    """Attention with sinks in q's dtype, see `quarot_onnx.ops.attention_sinks`."""

    op_domain = DOMAIN

    def _run(
        self, q: Array, key: Array, value: Array, mask: Array, sinks: Array, scale: float, **_: Any
    ) -> tuple[Array]:
        grouped = q.reshape(len(q), key.shape[1], -1, *q.shape[2:])
        scores = scale * (grouped @ key[:, :, None].swapaxes(-1, -2))
        scores = np.where(mask[:, :, None], scores, np.finfo(q.dtype).min)
        sink = sinks.reshape(key.shape[1], -1, 1, 1)
        largest = np.maximum(scores.max(axis=-1, keepdims=True), sink)
        weights = np.exp(scores - largest)
        total = weights.sum(axis=-1, keepdims=True) + np.exp(sink - largest)
        return ((weights / total @ value[:, :, None]).reshape(q.shape).astype(q.dtype),)


_FLOATS = frozenset(
    {
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.FLOAT16,
        onnx.TensorProto.BFLOAT16,
        onnx.TensorProto.DOUBLE,
    }
)


@functools.cache
def _operators(dtype: Any) -> list[type[OpRun]]:
    class Cast(OpRun):
        """``onnx.Cast``, where every float dtype is the interpreter's."""

        def _run(self, x: Array, to: int, **_: Any) -> tuple[Array]:
            target = dtype if to in _FLOATS else onnx.helper.tensor_dtype_to_np_dtype(to)
            return (x.astype(target),)

    ours = [AttentionSinks, Hadamard, HadamardHeads, Transform, TransformHeads]
    return [Cast, Gather, MatMul, *ours]
