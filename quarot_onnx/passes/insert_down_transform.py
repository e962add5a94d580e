# SPDX-License-Identifier: Apache-2.0
"""Down transform: an invertible Kronecker product in front of every down_proj.

    before:  y = x @ W
    after:   y = (x (A ⊗ B)) @ ((A^-1 ⊗ B^-1) W)

R4 with given matrices in place of Hadamard matrices (FlatQuant, arXiv 2410.09426, section 3.1:
two small factors cost n (a + b) multiply-adds a token, as the Hadamard does).
"""

from collections.abc import Sequence
from functools import partial

import numpy as np

from quarot_onnx.decoder import Decoder
from quarot_onnx.passes.base import Effect, Pass, Report
from quarot_onnx.passes.online import insert_transform
from quarot_onnx.transforms import inverse
from quarot_onnx.weights import Float64


class InsertDownTransformPass(Pass):
    """Transform down_proj's input by each layer's factors (A, B)."""

    effect = Effect.EQUIVALENT

    def __init__(self, decoder: Decoder, factors: Sequence[tuple[Float64, Float64]]) -> None:
        super().__init__(decoder)
        self.factors = factors

    def requires(self) -> None:
        """The input of down_proj must still be float, and there is one per layer."""
        self.refuse_after("QuantizeActivations")
        self.refuse_experts()

    def rewrite(self) -> Report:
        """Insert one node per layer."""
        for layer, (a, b) in zip(self.decoder.layers, self.factors, strict=True):
            down = layer.mlp.down
            insert_transform(
                self.decoder.model, down.node, 0, (a, b), f"{down.module}/down_transform"
            )
            inverses = inverse(a), inverse(b)
            down.weight.compose(0, partial(kronecker_inputs, *inverses))
        orders = " x ".join(str(len(x)) for x in self.factors[0])
        return self.report(len(self.factors), f"given {orders}")


def kronecker_inputs(a: Float64, b: Float64, weight: Float64) -> Float64:
    """``(A ⊗ B) W`` of a weight [a * b, out]."""
    folded = weight.reshape(len(a), len(b), -1)
    turned: Float64 = np.einsum("ac,cdo->ado", a, b @ folded, optimize=True)
    return turned.reshape(weight.shape)
