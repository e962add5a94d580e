# SPDX-License-Identifier: Apache-2.0
"""R3: an online Hadamard on the queries and on the new keys, after RoPE.

    before:  scores = q k.T
    after:   scores = (q H) (k H).T = q H H.T k.T

The function does not change; the cache holds rotated keys, whose outliers are spread over the head.
After RoPE, because a rotation does not commute with it. Needed only where the cache is quantized
(QuaRot, section 3, stage 1c).
"""

from quarot_onnx.decoder import Decoder
from quarot_onnx.hadamard import Plan
from quarot_onnx.passes.base import Effect, Pass, Report
from quarot_onnx.passes.online import describe, insert_hadamard


class InsertR3Pass(Pass):
    """Rotate queries and new keys by one Hadamard of order head_dim."""

    effect = Effect.EQUIVALENT

    def __init__(self, decoder: Decoder, plan: Plan) -> None:
        super().__init__(decoder)
        self.plan = plan

    def requires(self) -> None:
        """The keys must still be float where they are appended."""
        self.refuse_after("QuantizeKvCache")

    def rewrite(self) -> Report:
        """Insert two nodes per layer, or none where head_dim has no Hadamard matrix."""
        attentions = [layer.attention for layer in self.decoder.layers]
        if self.plan.kind == "none":
            return self.report(
                0, skipped={self.plan.reason: [a.node.name or "" for a in attentions]}
            )
        for attention in attentions:
            module = (attention.node.name or "").rpartition("/")[0]
            insert_hadamard(self.decoder.model, attention.node, 0, self.plan, f"{module}/R3_query")
            insert_hadamard(
                self.decoder.model, attention.key_append, 1, self.plan, f"{module}/R3_key"
            )
        return self.report(2 * len(attentions), describe(self.plan))
