# SPDX-License-Identifier: Apache-2.0
"""Quantize weights to nearest: every linear of a layer keeps integer codes and scales.

    before:  y = x @ W
    after:   y = (x @ codes) * scale          codes = clip(round(W / scale))

Lossy: ``|W - codes * scale| <= scale / 2`` inside the clip. The product is a ``WeightOnlyGemm``,
exact in float32; with groups or zero points a ``WeightOnlyGemmGroups``. The head, the embedding
and the routers of experts stay float (QuaRot, section 4): a router is small, and a token that goes
to another expert is not a rounding error.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import ml_dtypes
import onnx_ir as ir
from numpy.typing import NDArray

from quarot_onnx import ops
from quarot_onnx.decoder import Decoder, Linear
from quarot_onnx.passes.base import Effect, Pass, Report
from quarot_onnx.quantizers.form import Form
from quarot_onnx.quantizers.grid import nearest
from quarot_onnx.quantizers.rtn import rtn
from quarot_onnx.weights import Float64, QuantizedWeight, Quantizer


class QuantizeWeightsPass(Pass):
    """Replace each MatMul of a layer by a product with codes."""

    effect = Effect.LOSSY

    def __init__(
        self,
        decoder: Decoder,
        *,
        bits: int,
        clip_search: bool,
        symmetric: bool = True,
        group_size: int = 0,
        down_proj_bits: int | None = None,
    ) -> None:
        super().__init__(decoder)
        self.form = Form(bits, symmetric, group_size, clip_search)
        self.down_proj_form = replace(self.form, bits=down_proj_bits or bits)

    def rewrite(self) -> Report:
        """Quantize every linear of every layer."""
        downs = down_projections(self.decoder)
        for linear in self.decoder.linears:
            form = self.down_proj_form if linear in downs else self.form
            quantized = _lazily(linear, form)
            hold_codes(self.decoder, linear, quantized.tensors)
        ops.declare(self.decoder.model)
        return self.report(
            len(self.decoder.linears),
            f"{self.form.describe()}{down_proj_detail(self.down_proj_form, self.form)}, "
            "round to nearest",
            float_routers(self.decoder),
        )


def down_projections(decoder: Decoder) -> set[Linear]:
    """The last linear of every feed-forward."""
    return {mlp.down for layer in decoder.layers for mlp in layer.mlps}


def down_proj_detail(down_proj: Form, form: Form) -> str:
    """What a report adds where down_proj has bits of its own."""
    return "" if down_proj == form else f" (down_proj {down_proj.bits})"


def float_routers(decoder: Decoder) -> dict[str, list[str]]:
    """What a report says of the routers of experts, where there are any."""
    routers = [router.name for layer in decoder.layers for router in layer.routers]
    return {"routers stay float": routers} if routers else {}


def _lazily(linear: Linear, form: Form) -> QuantizedWeight:
    """Codes of the linear's weight that are computed when they are written."""
    quantizer: Quantizer
    if form.is_per_channel:
        quantizer = partial(rtn, bits=form.bits, clip_search=form.clip_search)
        return QuantizedWeight(linear.weight, quantizer, code_type(form.bits))

    def in_groups(weight: Float64) -> tuple[NDArray[Any], ...]:
        found = nearest(weight, form)
        return found.codes, found.scale, found.zero

    groups = linear.in_features // form.rows(linear.in_features)
    return QuantizedWeight(linear.weight, in_groups, code_type(form.bits), groups=groups)


def code_type(bits: int) -> ir.DataType:
    """The smallest type that holds codes of `bits` bits."""
    return ir.DataType.INT4 if bits <= 4 else ir.DataType.INT8


def stored(
    name: str,
    sizes: tuple[int, ...],
    form: Form,
    groups: int,
    array: Callable[[str], NDArray[Any]],
) -> tuple[ir.TensorProtocol, ...]:
    """Tensors of the weight `name` of `sizes` whose numbers `array` has by name, read when written.

    Codes, scales [out_features] and, unless one scale per output channel says it all, scales and
    zero points [groups, out_features].
    """
    out_features = sizes[1]

    def codes() -> ir.TensorProtocol:
        held = array(name)
        typed = held.astype(ml_dtypes.int4) if form.bits <= 4 else held
        return ir.tensor(typed, name=name)

    def part(suffix: str) -> ir.TensorProtocol:
        held = array(f"{name}_{suffix}")
        return ir.tensor(held[0] if form.is_per_channel else held[:], name=f"{name}_{suffix}")

    shape = ir.Shape([out_features] if form.is_per_channel else [groups, out_features])
    parts = {"scale": ir.DataType.FLOAT, "zero": ir.DataType.INT8}
    kept = ("scale",) if form.is_per_channel else ("scale", "zero")
    return (
        ir.LazyTensor(codes, dtype=code_type(form.bits), shape=ir.Shape(sizes), name=name),
        *(
            ir.LazyTensor(
                partial(part, suffix), dtype=parts[suffix], shape=shape, name=f"{name}_{suffix}"
            )
            for suffix in kept
        ),
    )


def hold_codes(decoder: Decoder, linear: Linear, tensors: tuple[ir.TensorProtocol, ...]) -> None:
    """Let the product with codes, scales and perhaps zero points take the linear's place."""
    graph = decoder.model.graph
    inputs = [linear.x]
    for tensor in tensors:
        shape = ir.Shape(tensor.shape.numpy())
        value = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=shape)
        value.const_value = tensor
        graph.initializers[value.name or ""] = value
        inputs.append(value)
    name = "WeightOnlyGemm" if len(tensors) == 2 else "WeightOnlyGemmGroups"
    linear.replace(graph, ops.node(name, inputs, {}, at=f"{linear.module}/{name}"))
