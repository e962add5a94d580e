# SPDX-License-Identifier: Apache-2.0
"""Untie: the head gets a weight of its own.

    before:  x = E[ids]      logits = h @ Transpose(E)
    after:   x = E[ids]      logits = h @ W        W = E.T, an initializer of its own

The function does not change. A rotation does: it maps E to E Q and W to Q.T diag(gamma) W, which
are no transposes of each other once the final norm's scale gamma is folded. This is the one pass
that runs before the decoder is located, because the head is a `Linear` only when its weight is
unshared.
"""

import numpy as np
import onnx_ir as ir

from quarot_onnx.decoder import weight_of
from quarot_onnx.passes.base import APPLIED, Effect, Report
from quarot_onnx.weights import Float64, Weight

HEAD = "lm_head.weight"


class _TransposedSource:
    """The transpose of another weight, read through it."""

    def __init__(self, weight: Weight) -> None:
        self._weight = weight

    @property
    def shape(self) -> tuple[int, ...]:
        return self._weight.sizes[::-1]

    def read(self, index: tuple[slice, ...]) -> Float64:
        return np.ascontiguousarray(self._weight.read(index[::-1]).T)


def untie_embeddings(model: ir.Model) -> Report:
    """Give each ``Transpose(E) -> MatMul`` a transposed copy of E, if there is one."""
    sites = 0
    for node in list(model.graph):
        shared = weight_of(node.inputs[0]) if node.op_type == "Transpose" else None
        if shared is None:
            continue
        weight = Weight(HEAD, _TransposedSource(shared.derive(HEAD)), shared.dtype)
        value = ir.Value(name=HEAD, type=ir.TensorType(weight.dtype), shape=ir.Shape(weight.sizes))
        value.const_value = weight
        model.graph.initializers[HEAD] = value
        node.outputs[0].replace_all_uses_with(value)
        model.graph.remove(node, safe=True)
        sites += 1
    model.metadata_props[APPLIED] = "UntieEmbeddings"
    return Report("UntieEmbeddings", Effect.EQUIVALENT, sites)
