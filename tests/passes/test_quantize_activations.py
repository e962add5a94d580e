# SPDX-License-Identifier: Apache-2.0
"""Quantized activations: one rounding per token, integer products, shared by readers."""

import numpy as np
import pytest

from quarot_onnx import ops
from quarot_onnx.decoder import Decoder
from quarot_onnx.passes.quantize_activations import QuantizeActivationsPass
from quarot_onnx.passes.quantize_weights import QuantizeWeightsPass
from tests import float64, running
from tests.small_decoder import assert_golden, located, logits, refused, text


def _quantize(decoder: Decoder, bits: int = 4, weight_bits: int = 4) -> QuantizeActivationsPass:
    return QuantizeActivationsPass(decoder, bits=bits, clip_ratio=0.9, weight_bits=weight_bits)


def _quantized(bits: int, weight_bits: int, dtype: str = "float") -> Decoder:
    decoder = located(dtype=dtype)
    QuantizeWeightsPass(decoder, bits=weight_bits, clip_search=True)()
    _quantize(decoder, bits, weight_bits)()
    return decoder


def test_golden() -> None:
    decoder = located()
    QuantizeWeightsPass(decoder, bits=4, clip_search=True)()
    before = text(decoder.model)
    report = _quantize(decoder)()
    assert_golden("quantize_activations", before, text(decoder.model))
    assert (report.sites, report.detail) == (7, "4 bits, per token, clip 0.9")


@pytest.mark.parametrize("dtype", ["float", "float16"])
@pytest.mark.parametrize(("bits", "weight_bits"), [(4, 4), (6, 6), (8, 8), (4, 8), (8, 4)])
def test_the_function_is_that_of_rounded_activations(bits, weight_bits, dtype) -> None:
    decoder = _quantized(bits, weight_bits, dtype)
    actual = logits(running.run, decoder.model).astype(np.float64)

    wanted = logits(_reference_run, decoder.model)
    # One code may fall on the other side of a rounding boundary: a step of it, not more.
    assert np.abs(actual - wanted).max() <= 0.05 * np.abs(wanted).max()
    if dtype == "float":
        assert np.median(np.abs(actual - wanted)) <= 1e-5 * np.abs(wanted).max()


def _reference_run(model, feeds):
    """NumPy in the model's dtype, with the references of the operators."""
    values = {}
    for value in model.graph.inputs:
        values[value] = feeds[value.name]
    for value in model.graph.initializers.values():
        values[value] = value.const_value.numpy()
    for node in model.graph:
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        inputs = [values[v] for v in node.inputs]
        if node.op_type == "QuantizeInt4":
            results = ops.quantize_int4(
                inputs[0], bits=attributes["bits"], clip_ratio=attributes["clip_ratio"]
            )
        elif node.op_type in ("Int4Gemm", "Int8Gemm"):
            results = (ops.int4_gemm(*inputs),)
        else:
            results = (float64._OPERATORS[node.op_type](attributes, *inputs),)
        values.update(zip(node.outputs, results, strict=True))
    return {value.name: values[value] for value in model.graph.outputs}


def test_more_bits_are_closer_to_the_float_model() -> None:
    wanted = logits(float64.run, located().model)
    errors = []
    for bits in (4, 6, 8):
        decoder = located()
        QuantizeWeightsPass(decoder, bits=8, clip_search=True)()
        QuantizeActivationsPass(decoder, bits=bits, clip_ratio=1.0, weight_bits=8)()
        errors.append(np.abs(logits(running.run, decoder.model) - wanted).mean())
    assert errors[0] > errors[1] > errors[2] > 0


def test_linears_that_read_the_same_activation_share_one_rounding() -> None:
    decoder = _quantized(4, 4)
    attention, mlp = decoder.layers[0].attention, decoder.layers[0].mlp
    assert attention.q.x is attention.k.x is attention.v.x
    assert mlp.readers[0].x is mlp.readers[1].x
    assert sum(node.op_type == "QuantizeInt4" for node in decoder.model.graph) == 4


@pytest.mark.parametrize(
    ("bits", "weight_bits", "gemm"), [(4, 4, "Int4Gemm"), (6, 4, "Int4Gemm"), (4, 8, "Int8Gemm")]
)
def test_codes_that_could_saturate_take_the_exact_product(bits, weight_bits, gemm) -> None:
    decoder = _quantized(bits, weight_bits)
    assert {linear.node.op_type for linear in decoder.linears} == {gemm}


def test_refuses_float_weights() -> None:
    decoder = located()
    with refused(
        decoder,
        "/layers.0/q_proj/MatMul: its weight is float; integer products need weights.bits below 16",
    ):
        _quantize(decoder)()
