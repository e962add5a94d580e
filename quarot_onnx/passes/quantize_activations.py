# SPDX-License-Identifier: Apache-2.0
"""Quantize activations: one dynamic scale per token, integer products.

    before:  y = (x @ codes) * w_scale
    after:   q, scale = QuantizeInt4(x);   y = Int4Gemm(q, codes) * scale * w_scale

Lossy: x is rounded to ``bits`` bits per token; the product of codes is summed exactly in integers.
Linears that read the same activation (q, k, v; gate, up) share one quantization, and so do the
experts of a mixture: rows are quantized once, before they are copied for each expert of a token
(``Gather``) and grouped by expert (``Split``); codes and scales are copied and grouped alike.
"""

import onnx_ir as ir

from quarot_onnx import ops
from quarot_onnx.decoder import Decoder
from quarot_onnx.errors import UnsupportedModelError
from quarot_onnx.handles import is_grouping
from quarot_onnx.passes.base import Effect, Pass, Report
from quarot_onnx.passes.online import module_of

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
        quantized: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        for linear in self.decoder.linears:
            codes, scale = self._quantized(linear.x, linear.node, quantized)
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

    def _quantized(
        self, x: ir.Value, user: ir.Node, known: dict[ir.Value, tuple[ir.Value, ir.Value]]
    ) -> tuple[ir.Value, ir.Value]:
        """Codes and scale of `x`, which `user` reads; `known` are those of other values."""
        if x not in known:
            mover = x.producer()
            rows = mover.inputs[0] if mover is not None and _moves_rows(mover) else None
            if mover is None or rows is None:
                name = f"{module_of(user)}/QuantizeInt4"
                node = self._quantize(x, self._first_reader(x), name)
                known[x] = node.outputs[0], node.outputs[1]
            else:
                parts = self._quantized(rows, mover, known)
                copies = [
                    self._moved(mover, part, kind)
                    for part, kind in zip(parts, ("codes", "scale"), strict=True)
                ]
                for number, output in enumerate(mover.outputs):
                    known[output] = copies[0].outputs[number], copies[1].outputs[number]
        return known[x]

    def _first_reader(self, x: ir.Value) -> ir.Node:
        """The one that comes first in the graph."""
        readers = {node for node, _ in x.uses()}
        if len(readers) == 1:
            return readers.pop()
        return next(node for node in self.decoder.model.graph if node in readers)

    def _moved(self, mover: ir.Node, part: ir.Value, kind: str) -> ir.Node:
        """A copy of `mover` for `part`, the codes [rows, k] or the scales [rows, 1]."""
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

    def _quantize(self, x: ir.Value, before: ir.Node, name: str) -> ir.Node:
        attributes = {"bits": self.bits, "clip_ratio": self.clip_ratio}
        node = ops.node("QuantizeInt4", [x], attributes, at=name)
        assert x.shape is not None
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(ir.DataType.UINT8), x.shape
        node.outputs[1].type = ir.TensorType(ir.DataType.FLOAT)
        node.outputs[1].shape = ir.Shape([*x.shape[:-1], 1])
        self.decoder.model.graph.insert_before(before, node)
        return node


def _moves_rows(node: ir.Node) -> bool:
    """Whether `node` copies or groups the rows of its first input."""
    is_gather = node.op_type == "Gather" and node.attributes.get_int("axis", 0) == 0
    return is_gather or is_grouping(node)
