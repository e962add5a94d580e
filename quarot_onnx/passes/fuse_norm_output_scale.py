# SPDX-License-Identifier: Apache-2.0
"""Norm output scale: stretch what a norm hands to its linears, feature by feature, for free.

    before:  y = (x / rms(x) * 1) @ W
    after:   y = (x / rms(x) * g) @ (diag(1/g) W)

The function does not change. The norm's own scale, which `FuseNormScalePass` has set to ones, does
the work online; behind R1 it acts on rotated features, where it evens out what the rounding of a
token must share one step between. After `FuseR1Pass`, because g does not commute with a rotation.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from quarot_onnx.decoder import Decoder, Norm
from quarot_onnx.errors import UnsupportedModelError
from quarot_onnx.passes.base import APPLIED, Effect, Pass, Report
from quarot_onnx.weights import Float64


class FuseNormOutputScalePass(Pass):
    """Give norms scales g [hidden_size], and their readers the inverse."""

    effect = Effect.EQUIVALENT

    def __init__(self, decoder: Decoder, scales: Mapping[int, Sequence[Float64 | None]]) -> None:
        """`scales`: layer -> of its attention's and of its feed-forward's norm, None for ones."""
        super().__init__(decoder)
        self.scales = scales

    def requires(self) -> None:
        """The norms' scales must be folded."""
        self.refuse_after("InsertInputTransform")
        if "FuseNormScale" not in self.decoder.model.metadata_props.get(APPLIED, "").split():
            raise UnsupportedModelError(
                "norm output scale: the norms still have scales of their own; "
                "apply FuseNormScalePass first"
            )
        norms = [id(norm) for norm, _ in self._pairs()]
        if len(norms) != len(set(norms)):
            raise UnsupportedModelError(
                "norm output scale: attention and feed-forward read one norm; "
                "leave the scales out of the file"
            )

    def rewrite(self) -> Report:
        """Scale each norm and its readers."""
        count = 0
        for norm, scale in self._pairs():
            norm.scale.compose(0, partial(np.multiply, scale))
            for reader in norm.readers:
                reader.weight.compose(0, partial(np.multiply, 1 / scale[:, None]))
            count += 1
        return self.report(count, "given")

    def _pairs(self) -> list[tuple[Norm, Float64]]:
        pairs: list[tuple[Norm, Float64]] = []
        for index, scales in self.scales.items():
            norms = self.decoder.norms_of(self.decoder.layers[index])
            pairs += [(n, s) for n, s in zip(norms, scales, strict=True) if s is not None]
        return pairs
