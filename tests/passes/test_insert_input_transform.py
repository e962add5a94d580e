# SPDX-License-Identifier: Apache-2.0
"""What the linears behind a norm read goes through one Kronecker product, each weight undoes it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quarot_onnx.passes.fuse_layer_norm_mean import FuseLayerNormMeanPass
from quarot_onnx.passes.fuse_norm_output_scale import FuseNormOutputScalePass
from quarot_onnx.passes.fuse_norm_scale import FuseNormScalePass
from quarot_onnx.passes.fuse_r1 import FuseR1Pass
from quarot_onnx.passes.insert_input_transform import InsertInputTransformPass
from quarot_onnx.rotation import Rotation
from quarot_onnx.transforms import balanced_factors
from tests.small_decoder import (
    SIZES,
    TYPES,
    assert_equivalent,
    assert_golden,
    invertible,
    located,
    quantize_linears,
    refused,
    text,
)

FACTORS = [(invertible(2, 2), invertible(4, 4))]


def test_golden() -> None:
    decoder = located()
    before = text(decoder.model)
    report = InsertInputTransformPass(decoder, FACTORS, FACTORS)()
    assert_golden("insert_input_transform", before, text(decoder.model))
    assert (report.sites, report.detail) == (2, "given 2 x 4")


@given(options=SIZES, dtype=st.sampled_from(sorted(TYPES)))
@settings(max_examples=8, deadline=None)
def test_the_function_does_not_change(options, dtype) -> None:
    a, b = balanced_factors(options["hidden_size"], "inputs")
    first, second = (
        [
            (invertible(a, a, seed=which), invertible(b, b, seed=i))
            for i in range(options["num_layers"])
        ]
        for which in (0, 1)
    )
    assert_equivalent(
        lambda d: InsertInputTransformPass(d, first, second)(), dtype=dtype, **options
    )


def test_one_half_may_be_left_alone() -> None:
    decoder = located()
    gate = decoder.layers[0].mlp.readers[0]
    before = gate.weight.float64()
    report = InsertInputTransformPass(decoder, FACTORS, [])()
    assert report.sites == 1
    np.testing.assert_array_equal(gate.weight.float64(), before)


def test_every_reader_takes_the_inverse_of_one_product() -> None:
    decoder = located()
    attention, (a, b) = decoder.layers[0].attention, FACTORS[0]
    linears = attention.q, attention.k, attention.v
    before = [linear.weight.float64() for linear in linears]
    InsertInputTransformPass(decoder, FACTORS, FACTORS)()
    assert len({linear.x for linear in linears}) == 1
    for linear, weight in zip(linears, before, strict=True):
        np.testing.assert_allclose(np.kron(a, b) @ linear.weight.float64(), weight, atol=1e-14)


def test_refuses_quantized_activations() -> None:
    decoder = located()
    quantize_linears(decoder)
    with refused(
        decoder,
        "InsertInputTransform: QuantizeActivations has been applied to this model; "
        "apply InsertInputTransformPass before",
    ):
        InsertInputTransformPass(decoder, FACTORS, FACTORS)()


@pytest.mark.parametrize(
    "fuse",
    [
        FuseLayerNormMeanPass,
        FuseNormScalePass,
        lambda decoder: FuseR1Pass(decoder, Rotation("hadamard", 8, 0, "R1"), "online"),
        lambda decoder: FuseNormOutputScalePass(decoder, {0: (None, np.ones(8))}),
    ],
)
def test_what_is_fused_into_the_same_weights_comes_before(fuse) -> None:
    decoder = located()
    InsertInputTransformPass(decoder, FACTORS, FACTORS)()
    late = fuse(decoder)
    with refused(
        decoder,
        f"{late.name}: InsertInputTransform has been applied to this model; "
        f"apply {late.name}Pass before",
    ):
        late()


def test_refuses_one_norm_for_both_halves() -> None:
    gate = '["/layers.0/gate_proj/MatMul"] g0 = MatMul ('
    decoder = located(replace=(f"{gate}b0", f"{gate}a0"))
    with refused(
        decoder,
        "/layers.0/norm_1/RMSNormalization: attention and feed-forward read one norm; "
        "leave the input transforms out",
    ):
        InsertInputTransformPass(decoder, FACTORS, FACTORS)()
