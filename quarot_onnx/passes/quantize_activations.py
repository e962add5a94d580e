# SPDX-License-Identifier: Apache-2.0
"""Quantize activations: dynamic scales for every token, integer products.

    before:  y = (x @ codes) * w_scale
    after:   q, scale = QuantizeInt4(x);          y = (q @ codes) * scale * w_scale
    or, asymmetric or with a scale for each of several groups of features:
             q, scale, zero = QuantizeGroups(x);  y = sum over groups of
                                                      ((q - zero) @ codes) * scale * w_scale

Lossy: x is rounded to ``bits`` bits; the product of codes is summed exactly in integers. Linears
that read the same activation (q, k, v; gate, up) share one quantization. Bits, mode, clip and
groups are the site's `Rounding`.
"""

from collections.abc import Callable

import onnx_ir as ir

from quarot_onnx import ops
from quarot_onnx.decoder import Decoder, Linear
from quarot_onnx.errors import UnsupportedModelError
from quarot_onnx.passes.base import Effect, Pass, Report
from quarot_onnx.rounding import Choice, Quantizer, Site

_EXACT_IN_16_BITS = 6  # two products of larger codes overflow the CPU kernels' int16 step: Int8Gemm


class QuantizeActivationsPass(Pass):
    """Replace each ``WeightOnlyGemm`` by a quantizer and an integer GEMM."""

    effect = Effect.LOSSY

    def __init__(self, decoder: Decoder, choose: Callable[[], Choice], *, weight_bits: int) -> None:
        """`choose` gives the sites and what is decided for them, when the pass runs.

        `quantizers` are the nodes that it has put in place.
        """
        super().__init__(decoder)
        self.choose = choose
        self.weight_bits = weight_bits
        self.quantizers: list[Quantizer] = []

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
        choice = self.choose()
        by_value = {site.value: site for site in choice.sites}
        quantized: dict[ir.Value, ir.Node] = {}
        for linear in self.decoder.linears:
            site = by_value[linear.x]
            if linear.x not in quantized:
                quantized[linear.x] = self._quantize(site, linear)
            self._multiply(linear, quantized[linear.x], site)
        ops.declare(self.decoder.model)
        return self.report(
            len(self.decoder.linears), choice.describe("per token"), records=choice.records()
        )

    def _quantize(self, site: Site, linear: Linear) -> ir.Node:
        x, rounding = site.value, site.rounding
        attributes = rounding.attributes
        # The one that the CUDA kernels share, where it is enough.
        is_common = rounding.symmetric and not site.has_groups
        name = "QuantizeInt4" if is_common else "QuantizeGroups"
        wanted = {key: attributes[key] for key in ops.OPERATORS[name].attributes}
        node = ops.node(name, [x], wanted, at=f"{linear.module}/{name}")
        assert x.shape is not None
        codes, *parts = node.outputs
        codes.type, codes.shape = ir.TensorType(ir.DataType.UINT8), x.shape
        for value in parts:
            value.type = ir.TensorType(ir.DataType.FLOAT)
            value.shape = ir.Shape([*x.shape[:-1], site.features // rounding.group_size])
        self.decoder.model.graph.insert_before(linear.node, node)
        self.quantizers.append(Quantizer(site, node))
        return node

    def _multiply(self, linear: Linear, quantizer: ir.Node, site: Site) -> None:
        bits = max(site.rounding.bits, self.weight_bits)
        name = "Int4Gemm" if bits <= _EXACT_IN_16_BITS else "Int8Gemm"
        attributes = {"dtype": int(linear.node.outputs[0].dtype or ir.DataType.FLOAT)}
        if site.has_groups:
            name += "Groups"
            attributes["group_size"] = site.rounding.group_size
        elif not site.rounding.symmetric:
            name += "Asymmetric"
        _, w, w_scale = linear.node.inputs
        assert w is not None
        assert w_scale is not None
        node = ops.node(
            name, [*quantizer.outputs, w, w_scale], attributes, at=f"{linear.module}/{name}"
        )
        linear.replace(self.decoder.model.graph, node)
