# SPDX-License-Identifier: Apache-2.0
"""R2: rotate every head's values, offline, between v_proj and o_proj.

    before:  v = x @ W_v + b_v        o = concat_h(P_h v_kv(h)) @ W_o
    after:   W_v -> W_v (I ⊗ H)       b_v -> b_v (I ⊗ H)       W_o -> (I ⊗ H.T) W_o

Attention mixes tokens, not the features of a head, so the head's output is ``(P v) H`` and
``((P v) H) (H.T W_o) = (P v) W_o``. One matrix serves all heads, which is what lets query heads
share a cache head (GQA). The bias turns with the weight. (QuaRot, section 3, stage 1b.)
"""

from quarot_onnx.decoder import Decoder
from quarot_onnx.hadamard import Plan
from quarot_onnx.passes.base import Effect, Pass, Report
from quarot_onnx.passes.online import describe
from quarot_onnx.weights import Float64


class FuseR2Pass(Pass):
    """Fuse one Hadamard of order head_dim into v_proj's outputs and o_proj's inputs."""

    effect = Effect.EQUIVALENT

    def __init__(self, decoder: Decoder, plan: Plan) -> None:
        super().__init__(decoder)
        self.plan = plan

    def rewrite(self) -> Report:
        """Rotate v and o of every layer, or none where head_dim has no Hadamard matrix."""
        layers = self.decoder.layers
        if self.plan.kind == "none":
            return self.report(0, skipped={self.plan.reason: [x.attention.v.name for x in layers]})
        for layer in layers:
            v, o = layer.attention.v, layer.attention.o
            v.weight.compose(1, self._rotate_heads)
            if v.bias is not None:
                v.bias.compose(0, self._rotate_heads)
            o.weight.compose(
                0, lambda w: self._rotate_heads(w.T).T
            )  # (I ⊗ H.T) W = (W.T (I ⊗ H)).T
        return self.report(2 * len(layers), describe(self.plan))

    def _rotate_heads(self, values: Float64) -> Float64:
        """``values (I ⊗ H)`` along the last axis, [..., heads * head_dim]."""
        return self.plan.apply(values.reshape(-1, self.plan.size)).reshape(values.shape)
