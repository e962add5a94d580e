# SPDX-License-Identifier: Apache-2.0
"""Quantized weights: the product is that of codes times scales, in the float dtype."""

from dataclasses import asdict

import numpy as np
import onnx_ir as ir
import pytest

from quarot_onnx.decoder import Decoder
from quarot_onnx.passes.fuse_norm_scale import FuseNormScalePass
from quarot_onnx.passes.quantize_weights import QuantizeWeightsPass
from quarot_onnx.quantizers.form import Form
from quarot_onnx.quantizers.grid import nearest
from quarot_onnx.quantizers.rtn import rtn
from tests import float64, running
from tests.small_decoder import assert_golden, located, logits, refused, text


def _quantize(decoder: Decoder, bits: int = 4, clip_search: bool = True) -> QuantizeWeightsPass:
    return QuantizeWeightsPass(decoder, bits=bits, clip_search=clip_search)


def test_golden() -> None:
    decoder = located()
    before = text(decoder.model)
    report = _quantize(decoder)()
    assert_golden("quantize_weights", before, text(decoder.model))
    assert (report.sites, report.detail) == (7, "4 bits, round to nearest")


@pytest.mark.parametrize("dtype", ["float", "float16"])
@pytest.mark.parametrize("clip_search", [True, False])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_the_function_is_that_of_the_rounded_weights(bits, clip_search, dtype) -> None:
    expected = located(dtype=dtype)
    for linear in expected.linears:
        codes, scale = rtn(linear.weight.float64(), bits=bits, clip_search=clip_search)
        rounded = codes * scale.astype(np.float64)
        linear.weight.compose(0, lambda _, rounded=rounded: rounded)
    decoder = located(dtype=dtype)
    _quantize(decoder, bits, clip_search)()
    wanted = logits(float64.run, expected.model)
    eps = 1e-3 if dtype == "float16" else 1e-7
    difference = logits(running.run, decoder.model).astype(np.float64) - wanted
    assert np.abs(difference).max() <= 64 * eps * np.abs(wanted).max()


@pytest.mark.parametrize(
    "form",
    [
        Form(4, symmetric=False),
        Form(3, group_size=4),
        Form(2, symmetric=False, group_size=5, clip_search=False),
        Form(8, group_size=100),
    ],
)
def test_groups_and_zero_points_say_the_same_as_the_rounded_weights(form) -> None:
    expected = located()
    for linear in expected.linears:
        rounded = nearest(linear.weight.float64(), form).values()
        linear.weight.compose(0, lambda _, rounded=rounded: rounded)
    decoder = located()
    QuantizeWeightsPass(decoder, **asdict(form))()
    linear = decoder.layers[0].mlp.down
    assert linear.node.op_type == "WeightOnlyGemmGroups"
    codes, scale, zero = linear.node.inputs[1:]
    groups = linear.in_features // form.rows(linear.in_features)
    assert list(scale.shape) == list(zero.shape) == [groups, linear.out_features]
    assert codes.dtype == (ir.DataType.INT4 if form.bits <= 4 else ir.DataType.INT8)
    wanted = logits(float64.run, expected.model)
    difference = logits(running.run, decoder.model).astype(np.float64) - wanted
    assert np.abs(difference).max() <= 64 * 1e-7 * np.abs(wanted).max()


@pytest.mark.parametrize(("bits", "stored"), [(4, "INT4"), (6, "INT8"), (8, "INT8")])
def test_codes_keep_the_weights_name_and_are_stored_in_the_smallest_type(bits, stored) -> None:
    decoder = located()
    _quantize(decoder, bits)()
    codes = decoder.model.graph.initializers["layers.0.down_proj.weight"].const_value
    assert codes.dtype == ir.DataType[stored]
    assert "layers.0.down_proj.weight_scale" in decoder.model.graph.initializers


def test_head_and_embedding_stay_float() -> None:
    decoder = located()
    _quantize(decoder)()
    for name in ("embed.weight", "lm_head.weight"):
        assert decoder.model.graph.initializers[name].dtype == ir.DataType.FLOAT
    assert decoder.lm_head.node.op_type == "MatMul"


def test_what_is_composed_later_is_quantized_too() -> None:
    """Weights are lazy: the codes are those of the weight when it is written."""
    decoder = located()
    _quantize(decoder)()
    FuseNormScalePass(decoder)()
    linear = decoder.layers[0].attention.q
    codes, _ = rtn(linear.weight.float64(), bits=4)
    written = linear.node.inputs[1].const_value.numpy().astype(np.int8)
    np.testing.assert_array_equal(written, codes)


def test_refuses_a_second_application() -> None:
    decoder = located()
    _quantize(decoder)()
    with refused(decoder, "QuantizeWeights: already applied to this model; apply it once"):
        _quantize(decoder)()
