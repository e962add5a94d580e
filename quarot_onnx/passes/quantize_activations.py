# SPDX-License-Identifier: Apache-2.0
"""Quantize activations: dynamic scales for every token, integer products.

    before:  y = (x @ codes) * w_scale
    after:   q, scale = QuantizeInt4(x);          y = (q @ codes) * scale * w_scale
    or, asymmetric or with a scale for each of several groups of features:
             q, scale, zero = QuantizeGroups(x);  y = sum over groups of
                                                      ((q - zero) @ codes) * scale * w_scale
    where the weight has groups, codes are those without their zero points, and w_scale the group's.

Lossy: x is rounded to ``bits`` bits; the product of codes is summed exactly in integers, over what
has one scale on both sides: groups of different sizes are cut into the largest parts that divide
both (activations in groups of 64, weights in groups of 96: sums of 32). Linears that read the same
activation (q, k, v; gate, up) share one quantization, and so do the experts of a mixture: rows are
quantized once, before they are copied for each expert of a token (``Gather``) and grouped by expert
(``Split``); codes, scales and zero points are copied and grouped alike. Bits, mode, clip and groups
are the site's `Rounding`.
"""

from collections.abc import Callable

import onnx_ir as ir

from quarot_onnx import ops
from quarot_onnx.decoder import Decoder
from quarot_onnx.errors import UnsupportedModelError
from quarot_onnx.handles import Linear
from quarot_onnx.passes.base import Effect, Pass, Report
from quarot_onnx.passes.online import module_of
from quarot_onnx.rounding import Choice, Quantizer, Site, moved_rows, rounded_value, summed_features

_EXACT_IN_16_BITS = 6  # two products of larger codes overflow the CPU kernels' int16 step: Int8Gemm
_PRODUCTS = ("WeightOnlyGemm", "WeightOnlyGemmGroups")


class QuantizeActivationsPass(Pass):
    """Replace each product with a weight's codes by a quantizer and an integer GEMM."""

    effect = Effect.LOSSY

    def __init__(
        self,
        decoder: Decoder,
        choose: Callable[[], Choice],
        *,
        weight_bits: int,
        weight_zeros: bool = False,
    ) -> None:
        """`choose` gives the sites and what is decided for them, when the pass runs.

        `weight_zeros`: zero points of weights in groups count; symmetric ones are 0.
        `quantizers` are the nodes that it has put in place.
        """
        super().__init__(decoder)
        self.choose = choose
        self.weight_bits = weight_bits
        self.weight_zeros = weight_zeros
        self.quantizers: list[Quantizer] = []
        self._in_groups = False  # whether weights are

    def requires(self) -> None:
        """Every linear must hold codes already."""
        for linear in self.decoder.linears:
            if linear.node.op_type not in _PRODUCTS:
                raise UnsupportedModelError(
                    f"{linear.name}: its weight is float; "
                    "integer products need weights.bits below 16"
                )

    def rewrite(self) -> Report:
        """Quantize each distinct input once."""
        choice = self.choose()
        sites = {site.value: site for site in choice.sites}
        for linear in self.decoder.linears:
            _summed(linear, sites[rounded_value(linear)])  # refuses groups that do not fit
            self._in_groups |= linear.node.op_type == "WeightOnlyGemmGroups"
        quantized: dict[ir.Value, list[ir.Value]] = {}
        for linear in self.decoder.linears:
            site = sites[rounded_value(linear)]
            self._multiply(linear, self._quantized(linear.x, linear.node, quantized, site), site)
        ops.declare(self.decoder.model)
        return self.report(
            len(self.decoder.linears), choice.describe("per token"), records=choice.records()
        )

    def _quantized(
        self, x: ir.Value, user: ir.Node, known: dict[ir.Value, list[ir.Value]], site: Site
    ) -> list[ir.Value]:
        """Codes, scale and perhaps zero point of `x`, which `user` reads.

        `known` are those of other values; `site` is where the rows of `x` are rounded.
        """
        if x not in known:
            mover = x.producer()
            rows = moved_rows(mover)
            if mover is None or rows is None:
                known[x] = self._quantize(site, self._first_reader(x), module_of(user))
            else:
                parts = self._quantized(rows, mover, known, site)
                copies = [
                    self._moved(mover, part, kind)
                    for part, kind in zip(parts, ("codes", "scale", "zero"), strict=False)
                ]
                for number, output in enumerate(mover.outputs):
                    known[output] = [copy.outputs[number] for copy in copies]
        return known[x]

    def _first_reader(self, x: ir.Value) -> ir.Node:
        """The one that comes first in the graph."""
        readers = {node for node, _ in x.uses()}
        if len(readers) == 1:
            return readers.pop()
        return next(node for node in self.decoder.model.graph if node in readers)

    def _moved(self, mover: ir.Node, part: ir.Value, kind: str) -> ir.Node:
        """A copy of `mover` for `part`, the codes [rows, k], scales or zeros [rows, groups]."""
        name = f"{mover.name}_{kind}"
        attributes = list(mover.attributes.values())
        copy = ir.Node(
            "",
            mover.op_type,
            [part, *mover.inputs[1:]],
            attributes,
            num_outputs=len(mover.outputs),
            name=name,
        )
        assert part.shape is not None
        for number, (old, new) in enumerate(zip(mover.outputs, copy.outputs, strict=True)):
            new.name, new.type = f"{name}_output_{number}", part.type
            assert old.shape is not None
            new.shape = ir.Shape([*old.shape[:-1], part.shape[-1]])
        self.decoder.model.graph.insert_before(mover, copy)
        return copy

    def _quantize(self, site: Site, before: ir.Node, module: str) -> list[ir.Value]:
        x, attributes = site.value, site.rounding.attributes
        # The one that the CUDA kernels share, where it is enough.
        is_common = site.rounding.symmetric and not site.has_groups and not self._in_groups
        name = "QuantizeInt4" if is_common else "QuantizeGroups"
        wanted = {key: attributes[key] for key in ops.OPERATORS[name].attributes}
        node = ops.node(name, [x], wanted, at=f"{module}/{name}")
        assert x.shape is not None
        codes, *parts = node.outputs
        codes.type, codes.shape = ir.TensorType(ir.DataType.UINT8), x.shape
        for value in parts:
            value.type = ir.TensorType(ir.DataType.FLOAT)
            value.shape = ir.Shape([*x.shape[:-1], site.features // site.rounding.group_size])
        self.decoder.model.graph.insert_before(before, node)
        self.quantizers.append(Quantizer(site, node))
        return list(node.outputs)

    def _multiply(self, linear: Linear, quantized: list[ir.Value], site: Site) -> None:
        bits = max(site.rounding.bits, self.weight_bits)
        name = "Int4Gemm" if bits <= _EXACT_IN_16_BITS else "Int8Gemm"
        attributes = {"dtype": int(linear.node.outputs[0].dtype or ir.DataType.FLOAT)}
        weight = [value for value in linear.node.inputs[1:] if value is not None]
        if self._in_groups and self.weight_zeros:
            name += "WeightZeros"
        elif self._in_groups or site.has_groups:
            name += "Groups"
            weight = weight[:2]
        elif not site.rounding.symmetric:
            name += "Asymmetric"
        if "group_size" in ops.OPERATORS[name].attributes:
            attributes["group_size"] = _summed(linear, site)
        node = ops.node(name, [*quantized, *weight], attributes, at=f"{linear.module}/{name}")
        linear.replace(self.decoder.model.graph, node)


def _summed(linear: Linear, site: Site) -> int:
    """Features that `linear` sums before it scales them."""
    scale = linear.node.inputs[2]
    assert scale is not None
    assert scale.shape is not None
    groups = scale.shape[0] if len(scale.shape) == 2 else 1
    assert isinstance(groups, int)
    features = linear.in_features
    return summed_features(linear.name, features, site.rounding.group_size, features // groups)
