# SPDX-License-Identifier: Apache-2.0
"""Head transform: an invertible matrix across heads in front of every o_proj.

    before:  y = x @ W_o
    after:   y = (x (M ⊗ I)) @ ((M^-1 ⊗ I) W_o)

The heads Hadamard with a given matrix in its place: online in front, its inverse in the weight.
"""

from collections.abc import Sequence
from functools import partial

from quarot_onnx.decoder import Decoder
from quarot_onnx.passes.base import Effect, Pass, Report
from quarot_onnx.passes.online import insert_head_transform
from quarot_onnx.transforms import inverse
from quarot_onnx.weights import Float64


class InsertHeadTransformPass(Pass):
    """Transform o_proj's input by each layer's matrix [num_heads, num_heads]."""

    effect = Effect.EQUIVALENT

    def __init__(self, decoder: Decoder, matrices: Sequence[Float64]) -> None:
        super().__init__(decoder)
        self.matrices = matrices

    def requires(self) -> None:
        """The input of o_proj must still be float."""
        self.refuse_after("QuantizeActivations")

    def rewrite(self) -> Report:
        """Insert one node per layer."""
        for layer, matrix in zip(self.decoder.layers, self.matrices, strict=True):
            o = layer.attention.o
            insert_head_transform(
                self.decoder.model, o.node, 0, matrix, f"{o.module}/head_transform"
            )
            o.weight.compose(0, partial(_across_heads, inverse(matrix)))
        return self.report(len(self.matrices), "given")


def _across_heads(matrix: Float64, weight: Float64) -> Float64:
    """``(M ⊗ I) W`` of a weight [heads * head_dim, out]."""
    return (matrix @ weight.reshape(len(matrix), -1)).reshape(weight.shape)
