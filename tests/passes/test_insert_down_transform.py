# SPDX-License-Identifier: Apache-2.0
"""The input of down_proj goes through a Kronecker product, its weight through the inverse."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from quarot_onnx.learning.places import balanced_factors
from quarot_onnx.passes.insert_down_transform import InsertDownTransformPass
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


def test_golden() -> None:
    decoder = located()
    before = text(decoder.model)
    report = InsertDownTransformPass(decoder, [(invertible(3, 3), invertible(4, 4))])()
    assert_golden("insert_down_transform", before, text(decoder.model))
    assert (report.sites, report.detail) == (1, "given 3 x 4")


@given(options=SIZES, dtype=st.sampled_from(sorted(TYPES)))
@settings(max_examples=8, deadline=None)
def test_the_function_does_not_change(options, dtype) -> None:
    a, b = balanced_factors(options["intermediate_size"], "down")
    factors = [(invertible(a, a, seed=i), invertible(b, b)) for i in range(options["num_layers"])]
    assert_equivalent(lambda d: InsertDownTransformPass(d, factors)(), dtype=dtype, **options)


def test_the_weight_takes_the_inverse() -> None:
    decoder = located()
    down, a, b = decoder.layers[0].mlp.down, invertible(3, 3), invertible(4, 4)
    before = down.weight.float64()
    InsertDownTransformPass(decoder, [(a, b)])()
    np.testing.assert_allclose(np.kron(a, b) @ down.weight.float64(), before, atol=1e-14)


def test_refuses_quantized_activations() -> None:
    decoder = located()
    quantize_linears(decoder)
    with refused(
        decoder,
        "InsertDownTransform: QuantizeActivations has been applied to this model; "
        "apply InsertDownTransformPass before",
    ):
        InsertDownTransformPass(decoder, [(invertible(3, 3), invertible(4, 4))])()
