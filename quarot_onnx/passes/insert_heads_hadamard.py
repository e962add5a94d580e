# SPDX-License-Identifier: Apache-2.0
"""Heads Hadamard: an online Hadamard across heads in front of every o_proj.

    before:  y = x @ W_o
    after:   y = (x (H ⊗ I)) @ ((H ⊗ I).T W_o)

The function does not change. With R2 the input of o_proj carries ``H ⊗ H_head``, a Hadamard of all
features, of which only the factor across heads runs online (QuaRot, section 3, stage 1b, "Hadamard
heads"). Needed where activations are quantized; a number of heads that has no Hadamard matrix is
skipped, and o_proj keeps R2 alone.
"""

from quarot_onnx.decoder import Decoder
from quarot_onnx.hadamard import Plan
from quarot_onnx.passes.base import Effect, Pass, Report
from quarot_onnx.passes.online import describe, insert_hadamard_heads
from quarot_onnx.weights import Float64


class InsertHeadsHadamardPass(Pass):
    """Rotate o_proj's input across heads online, and its weight offline."""

    effect = Effect.EQUIVALENT

    def __init__(self, decoder: Decoder, plan: Plan) -> None:
        super().__init__(decoder)
        self.plan = plan

    def requires(self) -> None:
        """The input of o_proj must still be float."""
        self.refuse_after("QuantizeActivations")

    def rewrite(self) -> Report:
        """Insert one node per layer, or none where the number of heads has no Hadamard matrix."""
        projections = [layer.attention.o for layer in self.decoder.layers]
        if not self.plan.factors:
            reason = self.plan.reason or "one head has nothing to mix with"
            return self.report(0, skipped={reason: [o.name for o in projections]})
        across = self.plan.matrix().T

        def rotate(weight: Float64) -> Float64:
            by_head = weight.reshape(len(across), -1)
            rotated: Float64 = (across @ by_head).reshape(weight.shape)
            return rotated

        for o in projections:
            insert_hadamard_heads(
                self.decoder.model, o.node, 0, self.plan, f"{o.module}/HadamardHeads"
            )
            o.weight.compose(0, rotate)
        return self.report(len(projections), describe(self.plan))
