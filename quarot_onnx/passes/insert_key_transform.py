# SPDX-License-Identifier: Apache-2.0
"""Key transform: an invertible matrix on the new keys and its counterpart on the queries.

    before:  scores = q k.T
    after:   scores = (q M^-T) (k M).T = q M^-T M.T k.T

R3 with a given matrix in place of a Hadamard matrix: after RoPE, online on both sides, in front of
the cache, which then holds ``k M``. It need only be invertible (FlatQuant, arXiv 2410.09426,
section 3.1).
"""

from collections.abc import Sequence

import numpy as np

from quarot_onnx.decoder import Decoder
from quarot_onnx.passes.base import Effect, Pass, Report
from quarot_onnx.passes.online import insert_transform
from quarot_onnx.transforms import inverse
from quarot_onnx.weights import Float64


class InsertKeyTransformPass(Pass):
    """Transform queries and new keys of every layer by its matrix [head_dim, head_dim]."""

    effect = Effect.EQUIVALENT

    def __init__(self, decoder: Decoder, matrices: Sequence[Float64]) -> None:
        super().__init__(decoder)
        self.matrices = matrices

    def requires(self) -> None:
        """The keys must still be float where they are appended."""
        self.refuse_after("QuantizeKvCache")

    def rewrite(self) -> Report:
        """Insert two nodes per layer."""
        model = self.decoder.model
        for layer, matrix in zip(self.decoder.layers, self.matrices, strict=True):
            attention = layer.attention
            module = (attention.node.name or "").rpartition("/")[0]
            one = np.ones((1, 1))
            backwards = inverse(matrix).T
            insert_transform(
                model, attention.node, 0, (one, backwards), f"{module}/query_transform"
            )
            insert_transform(
                model, attention.key_append, 1, (one, matrix), f"{module}/key_transform"
            )
        return self.report(2 * len(self.matrices), "given")
