# SPDX-License-Identifier: Apache-2.0
"""Value transform: one invertible matrix per cache head, offline, between v_proj and o_proj.

    before:  v = x @ W_v + b_v        o = concat_h(P_h v_kv(h)) @ W_o
    after:   W_v -> W_v diag_kv(M)    b_v -> b_v diag_kv(M)    W_o -> diag_h(M_kv(h)^-1) W_o

R2 with a given matrix in place of a Hadamard matrix, and one for each cache head: a query head h
reads cache head kv(h), so its rows of W_o take that head's inverse. ``(P v M) M^-1 = P v`` holds
for every invertible M; the cache holds ``v M``. (SpinQuant's R2 where M is orthogonal and the same
for all heads; FlatQuant, arXiv 2410.09426, section 3.1, where it is not.)
"""

from collections.abc import Sequence
from functools import partial

import numpy as np

from quarot_onnx.decoder import Decoder
from quarot_onnx.errors import UnsupportedModelError
from quarot_onnx.passes.base import Effect, Pass, Report
from quarot_onnx.transforms import inverse
from quarot_onnx.weights import Float64


class FuseValueTransformPass(Pass):
    """Fuse the matrices of every layer, [kv_heads, head_dim, head_dim], into v and o."""

    effect = Effect.EQUIVALENT

    def __init__(self, decoder: Decoder, matrices: Sequence[Float64]) -> None:
        super().__init__(decoder)
        self.matrices = matrices

    def requires(self) -> None:
        """One matrix per cache head of every layer, and no R2 in the same place."""
        self.refuse_after("FuseR2")
        for layer, matrices in zip(self.decoder.layers, self.matrices, strict=True):
            attention = layer.attention
            wanted = (attention.num_kv_heads, attention.head_dim, attention.head_dim)
            if matrices.shape != wanted:
                raise UnsupportedModelError(
                    f"{attention.v.name}: value transforms of shape {list(matrices.shape)}; "
                    f"it has {wanted[0]} cache heads of {wanted[1]} features"
                )

    def rewrite(self) -> Report:
        """Transform v's outputs and o's inputs of every layer."""
        for layer, matrices in zip(self.decoder.layers, self.matrices, strict=True):
            attention = layer.attention
            v, o = attention.v, attention.o
            v.weight.compose(1, partial(_outputs, matrices))
            if v.bias is not None:
                v.bias.compose(0, partial(_outputs, matrices))
            by_query = attention.num_heads // attention.num_kv_heads
            o.weight.compose(0, partial(_inputs, inverse(matrices).repeat(by_query, axis=0)))
        return self.report(2 * len(self.matrices), "given, one per cache head")


def _outputs(matrices: Float64, values: Float64) -> Float64:
    """``values diag(M)`` along the last axis, [..., heads * head_dim]."""
    by_head = values.reshape(*values.shape[:-1], *matrices.shape[:2])
    turned: Float64 = np.einsum("...hd,hde->...he", by_head, matrices)
    return turned.reshape(values.shape)


def _inputs(matrices: Float64, weight: Float64) -> Float64:
    """``diag(M) W`` of a weight [heads * head_dim, out]."""
    by_head = weight.reshape(*matrices.shape[:2], -1)
    return (matrices @ by_head).reshape(weight.shape)
