# SPDX-License-Identifier: Apache-2.0
"""Quantize activations: one dynamic scale per token, integer products.

    before:  y = (x @ codes) * w_scale
    after:   q, scale = QuantizeInt4(x);   y = Int4Gemm(q, codes) * scale * w_scale

Lossy: x is rounded to ``bits`` bits per token; the product of codes is summed exactly in integers.
Linears that read the same activation (q, k, v; gate, up) share one quantization.
"""

import onnx_ir as ir

from quarot_onnx import ops
from quarot_onnx.decoder import Decoder
from quarot_onnx.errors import UnsupportedModelError
from quarot_onnx.passes.base import Effect, Pass, Report

_EXACT_IN_16_BITS = 6  # two products of larger codes overflow the CPU kernels' int16 step: Int8Gemm


class QuantizeActivationsPass(Pass):
    """Replace each ``WeightOnlyGemm`` by ``QuantizeInt4`` and an integer GEMM."""

    effect = Effect.LOSSY

    def __init__(self, decoder: Decoder, *, bits: int, clip_ratio: float, weight_bits: int) -> None:
        super().__init__(decoder)
        self.bits = bits
        self.clip_ratio = clip_ratio
        self.gemm = "Int4Gemm" if max(bits, weight_bits) <= _EXACT_IN_16_BITS else "Int8Gemm"

    def requires(self) -> None:
        """Every linear must hold codes already."""
        for linear in self.decoder.linears:
            if linear.node.op_type != "WeightOnlyGemm":
                raise UnsupportedModelError(
                    f"{linear.name}: its weight is float; "
                    "integer products need weights.bits below 16"
                )

    def rewrite(self) -> Report:
        """Quantize each distinct input once."""
        graph = self.decoder.model.graph
        quantized: dict[ir.Value, ir.Node] = {}
        for linear in self.decoder.linears:
            x = linear.x
            if x not in quantized:
                quantized[x] = self._quantize(x, linear.node, f"{linear.module}/QuantizeInt4")
            codes, scale = quantized[x].outputs
            _, w, w_scale = linear.node.inputs
            assert w is not None
            assert w_scale is not None
            dtype = linear.node.outputs[0].dtype or ir.DataType.FLOAT
            node = ops.node(
                self.gemm,
                [codes, scale, w, w_scale],
                {"dtype": int(dtype)},
                at=f"{linear.module}/{self.gemm}",
            )
            linear.replace(graph, node)
        ops.declare(self.decoder.model)
        detail = f"{self.bits} bits, per token, clip {self.clip_ratio:g}"
        return self.report(len(self.decoder.linears), detail)

    def _quantize(self, x: ir.Value, before: ir.Node, name: str) -> ir.Node:
        attributes = {"bits": self.bits, "clip_ratio": self.clip_ratio}
        node = ops.node("QuantizeInt4", [x], attributes, at=name)
        assert x.shape is not None
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(ir.DataType.UINT8), x.shape
        node.outputs[1].type = ir.TensorType(ir.DataType.FLOAT)
        node.outputs[1].shape = ir.Shape([*x.shape[:-1], 1])
        self.decoder.model.graph.insert_before(before, node)
        return node
