# SPDX-License-Identifier: Apache-2.0
"""Input transform: an invertible Kronecker product behind the norms of every layer.

    before:  y = x @ W                        for each of q, k, v (gate, up), x the norm's output
    after:   y = (x (A ⊗ B)) @ ((A^-1 ⊗ B^-1) W)

One product online for all readers of a norm, its inverse in the weight of each. FlatQuant
(arXiv 2410.09426, section 3.1) transforms the same inputs.
"""

from collections.abc import Sequence
from functools import partial

from quarot_onnx.decoder import Decoder, Norm
from quarot_onnx.errors import UnsupportedModelError
from quarot_onnx.passes.base import Effect, Pass, Report
from quarot_onnx.passes.insert_down_transform import kronecker_inputs
from quarot_onnx.passes.online import insert_transform
from quarot_onnx.transforms import inverse
from quarot_onnx.weights import Float64

Factors = tuple[Float64, Float64]


class InsertInputTransformPass(Pass):
    """Transform what the linears of attention and feed-forward read by factors (A, B)."""

    effect = Effect.EQUIVALENT

    def __init__(
        self, decoder: Decoder, attention: Sequence[Factors], feed_forward: Sequence[Factors]
    ) -> None:
        """`attention`, `feed_forward`: the factors of each layer; empty for none."""
        super().__init__(decoder)
        self.factors = attention, feed_forward

    def requires(self) -> None:
        """The inputs must still be float, and every half of a layer has a norm of its own."""
        self.refuse_after("QuantizeActivations")
        for layer in self.decoder.layers:
            first, second = self.decoder.norms_of(layer)
            if first is second:
                raise UnsupportedModelError(
                    f"{first.name}: attention and feed-forward read one norm; leave the input "
                    "transforms out"
                )

    def rewrite(self) -> Report:
        """Insert one node behind each norm."""
        count = 0
        for which, factors in enumerate(self.factors):
            for layer, (a, b) in zip(self.decoder.layers, factors, strict=bool(factors)):
                self._transform(self.decoder.norms_of(layer)[which], a, b)
                count += 1
        orders = " x ".join(str(len(x)) for x in next(filter(None, self.factors))[0])
        return self.report(count, f"given {orders}")

    def _transform(self, norm: Norm, a: Float64, b: Float64) -> None:
        inverses = inverse(a), inverse(b)
        first, *others = norm.readers
        module = norm.name.rpartition("/")[0]
        product = insert_transform(
            self.decoder.model, first.node, 0, (a, b), f"{module}/input_transform"
        )
        for reader in others:
            reader.node.replace_input_with(0, product)
        for reader in norm.readers:
            reader.weight.compose(0, partial(kronecker_inputs, *inverses))
