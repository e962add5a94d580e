# SPDX-License-Identifier: Apache-2.0
"""Fold norm scales: a norm keeps only the division, its scale goes into the linears that read it.

    before:  y = (x / rms(x) * gamma) @ W
    after:   y = (x / rms(x) * 1) @ (diag(gamma) @ W)

The function does not change, since ``(u * gamma) @ W = u @ (diag(gamma) @ W)``. A norm without a
scale commutes with every rotation: ``rms(x Q) = rms(x)``. The embeddings are not centred: that is
exact for LayerNorm only (QuaRot, section 3, stage 1a). A post-norm (writer, norm, addition) keeps
its scale, since no linear reads it.
"""

from functools import partial

import numpy as np

from quarot_onnx.errors import UnsupportedModelError
from quarot_onnx.passes.base import Effect, Pass, Report
from quarot_onnx.weights import Float64


class FuseNormScalePass(Pass):
    """Multiply each norm's scale into its readers and leave ones."""

    effect = Effect.EQUIVALENT

    def requires(self) -> None:
        """No norm may subtract a mean or add a bias."""
        self.refuse_after("InsertInputTransform")
        found = [norm.name for norm in self.decoder.norms if norm.is_layer_norm]
        if found:
            raise UnsupportedModelError(
                f"{found[0]}: a LayerNorm, which has a mean and a bias; "
                "apply FuseLayerNormMeanPass first"
            )

    def rewrite(self) -> Report:
        """Fold every norm of the residual stream."""
        scales = [
            norm.scale.float64()[:, None] for norm in self.decoder.norms
        ]  # a NaN is found here
        for norm, gamma in zip(self.decoder.norms, scales, strict=True):
            for reader in norm.readers:
                reader.weight.compose(0, partial(np.multiply, gamma))
            norm.scale.compose(0, _ones)
        return self.report(len(self.decoder.norms))


def _ones(scale: Float64) -> Float64:
    return np.ones_like(scale)
