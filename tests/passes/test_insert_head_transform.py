# SPDX-License-Identifier: Apache-2.0
"""The input of o_proj is mixed across heads by a matrix, its weight by the inverse."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from quarot_onnx.passes.insert_head_transform import InsertHeadTransformPass
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
    report = InsertHeadTransformPass(decoder, [invertible(4, 4)])()
    assert_golden("insert_head_transform", before, text(decoder.model))
    assert (report.sites, report.detail) == (1, "given")


@given(options=SIZES, dtype=st.sampled_from(sorted(TYPES)))
@settings(max_examples=8, deadline=None)
def test_the_function_does_not_change(options, dtype) -> None:
    heads = options["num_heads"]
    matrices = [invertible(heads, heads, seed=i) for i in range(options["num_layers"])]
    assert_equivalent(lambda d: InsertHeadTransformPass(d, matrices)(), dtype=dtype, **options)


def test_the_weight_takes_the_inverse() -> None:
    decoder = located()
    o, matrix = decoder.layers[0].attention.o, invertible(4, 4)
    before = o.weight.float64()
    InsertHeadTransformPass(decoder, [matrix])()
    turned = np.kron(matrix, np.eye(4)) @ o.weight.float64()
    np.testing.assert_allclose(turned, before, atol=1e-14)


def test_refuses_quantized_activations() -> None:
    decoder = located()
    quantize_linears(decoder)
    with refused(
        decoder,
        "InsertHeadTransform: QuantizeActivations has been applied to this model; "
        "apply InsertHeadTransformPass before",
    ):
        InsertHeadTransformPass(decoder, [invertible(4, 4)])()
