# SPDX-License-Identifier: Apache-2.0
"""Quantize weights: every linear of a layer keeps integer codes and one scale per output channel.

    before:  y = x @ W
    after:   y = (x @ codes) * scale          codes = clip(round(W / scale))

Lossy: ``|W - codes * scale| <= scale / 2`` inside the clip. The product is a ``WeightOnlyGemm``,
exact in float32. The head, the embedding and the routers of experts stay float (QuaRot,
section 4): a router is small, and a token that goes to another expert is not a rounding error.
"""

from functools import partial

import onnx_ir as ir

from quarot_onnx import ops
from quarot_onnx.decoder import Decoder, Linear
from quarot_onnx.passes.base import Effect, Pass, Report
from quarot_onnx.quantize import rtn
from quarot_onnx.weights import QuantizedWeight, Quantizer


class QuantizeWeightsPass(Pass):
    """Replace each MatMul of a layer by a ``WeightOnlyGemm`` over codes."""

    effect = Effect.LOSSY

    def __init__(self, decoder: Decoder, *, bits: int, clip_search: bool) -> None:
        super().__init__(decoder)
        self.bits = bits
        self.quantizer: Quantizer = partial(rtn, bits=bits, clip_search=clip_search)

    def rewrite(self) -> Report:
        """Quantize every linear of every layer."""
        for linear in self.decoder.linears:
            self._replace(linear)
        ops.declare(self.decoder.model)
        routers = [router.name for layer in self.decoder.layers for router in layer.routers]
        return self.report(
            len(self.decoder.linears),
            f"{self.bits} bits, round to nearest",
            {"routers stay float": routers} if routers else {},
        )

    def _replace(self, linear: Linear) -> None:
        graph = self.decoder.model.graph
        dtype = ir.DataType.INT4 if self.bits <= 4 else ir.DataType.INT8
        quantized = QuantizedWeight(linear.weight, self.quantizer, dtype)
        inputs = [linear.x]
        for tensor in (quantized.codes, quantized.scale):
            value = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=tensor.shape)
            value.const_value = tensor
            graph.initializers[value.name or ""] = value
            inputs.append(value)
        node = ops.node("WeightOnlyGemm", inputs, {}, at=f"{linear.module}/WeightOnlyGemm")
        linear.replace(graph, node)
