# SPDX-License-Identifier: Apache-2.0
"""Fold LayerNorm's mean and bias: what remains is an RMSNorm.

    before:  y = ((x - mean(x)) / std(x) * gamma + beta) @ W + b          x = E[ids] + f(x) @ W_out
    after:   y = (x / rms(x) * gamma) @ W + (b + beta @ W)                E -> E M, W_out -> W_out M

With ``M = I - 1 1.T / n`` the residual stream is x M instead of x. A LayerNorm subtracts the mean,
so it cannot see the difference; ``mean(x M) = 0``, so its standard deviation is the root mean
square. M is linear, so centring everything that is added to the stream centres the sum; biases of
writers turn with their weights. beta is constant and moves through the linear into its bias.
(QuaRot, section 3, stage 1a; SliceGPT.)

Exact for LayerNorm only: where an RMSNorm reads the stream, centring it changes the function, and
nothing is centred.
"""

from functools import partial

import numpy as np

from quarot_onnx.decoder import Linear
from quarot_onnx.errors import UnsupportedModelError
from quarot_onnx.passes.base import Effect, Pass, Report
from quarot_onnx.weights import Float64, Weight


class FuseLayerNormMeanPass(Pass):
    """Centre every writer of the residual stream and turn each LayerNorm into an RMSNorm."""

    effect = Effect.EQUIVALENT

    def requires(self) -> None:
        """Every norm of the stream must subtract the mean, and writers must reach it directly."""
        self.refuse_after("FuseNormScale")
        self.refuse_after("InsertInputTransform")
        others = [norm.name for norm in self.decoder.norms if not norm.is_layer_norm]
        others += [norm.name for norm in self.decoder.post_norms]
        if others:
            raise UnsupportedModelError(
                f"{others[0]}: not a LayerNorm, so that the centred residual stream would change "
                "it; export without FuseLayerNormMeanPass"
            )

    def rewrite(self) -> Report:
        """Centre embeddings and writers, move each shift into biases, replace the norms."""
        shifts = [norm.shift.float64() if norm.shift else None for norm in self.decoder.norms]
        self.restate = _centre
        for table in self.decoder.embedding_weights:
            table.compose(1, _centre)
        for writer in self.decoder.writers:
            writer.linear.weight.compose(1, _centre)
            if writer.linear.bias is not None:
                writer.linear.bias.compose(0, _centre)
        for norm, shift in zip(self.decoder.norms, shifts, strict=True):
            if shift is not None:
                for reader in norm.readers:
                    self._move(shift, reader)
            norm.drop_mean(self.decoder.model.graph)
        return self.report(len(self.decoder.norms))

    def _move(self, shift: Float64, reader: Linear) -> None:
        """Add ``shift @ W`` to the bias of `reader`, computed when it is written."""
        bias = reader.add_bias(self.decoder.model.graph)
        bias.compose(0, partial(_add_product, shift, reader.weight.derive(reader.weight.name)))


def _centre(values: Float64) -> Float64:
    """``values @ M``: without the mean of the last axis."""
    centred: Float64 = values - values.mean(axis=-1, keepdims=True)
    return centred


def _add_product(shift: Float64, weight: Weight, bias: Float64) -> Float64:
    total = bias.copy()
    for (_, columns), product in weight.blocks(1, partial(np.matmul, shift)):
        total[columns] += product
    return total
