# SPDX-License-Identifier: Apache-2.0
"""R4: an online Hadamard in front of every down_proj.

    before:  y = x @ W
    after:   y = (x H) @ (H.T @ W)          since H H.T = I (H need not be symmetric)

The function does not change. The input of down_proj is a product of activations, which no offline
rotation can reach; it has the largest outliers of a layer (QuaRot, section 3, stage 1a).
"""

from quarot_onnx.decoder import Decoder
from quarot_onnx.hadamard import Plan
from quarot_onnx.passes.base import Effect, Pass, Report
from quarot_onnx.passes.online import describe, insert_hadamard


class InsertR4Pass(Pass):
    """Rotate down_proj's input online, and its weight offline."""

    effect = Effect.EQUIVALENT

    def __init__(self, decoder: Decoder, plan: Plan) -> None:
        super().__init__(decoder)
        self.plan = plan

    def requires(self) -> None:
        """The input of down_proj must still be float."""
        self.refuse_after("QuantizeActivations")

    def rewrite(self) -> Report:
        """Insert one node per down_proj, or none where the dimension is odd."""
        plan = self.plan
        downs = [layer.mlp.down for layer in self.decoder.layers]
        if plan.kind == "none":
            return self.report(0, skipped={plan.reason: [down.name for down in downs]})
        for down in downs:
            insert_hadamard(self.decoder.model, down.node, 0, plan, f"{down.module}/R4")
            down.weight.compose(0, lambda w: plan.apply(w, axis=0))
        return self.report(len(downs), describe(plan))
