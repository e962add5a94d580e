# SPDX-License-Identifier: Apache-2.0
"""Keys go through a matrix online, queries through its inverse transpose."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from quarot_onnx.passes.insert_key_transform import InsertKeyTransformPass
from tests.small_decoder import (
    SIZES,
    TYPES,
    assert_equivalent,
    assert_golden,
    invertible,
    located,
    quantize_cache,
    refused,
    text,
)


def test_golden() -> None:
    decoder = located()
    before = text(decoder.model)
    report = InsertKeyTransformPass(decoder, [invertible(4, 4)])()
    assert_golden("insert_key_transform", before, text(decoder.model))
    assert report.sites == 2


@given(options=SIZES, dtype=st.sampled_from(sorted(TYPES)))
@settings(max_examples=8, deadline=None)
def test_the_function_does_not_change(options, dtype) -> None:
    size = options["head_dim"]
    matrices = [invertible(size, size, seed=i) for i in range(options["num_layers"])]
    assert_equivalent(lambda d: InsertKeyTransformPass(d, matrices)(), dtype=dtype, **options)


def test_the_node_of_the_keys_holds_the_matrix() -> None:
    decoder = located()
    matrix = invertible(4, 4)
    InsertKeyTransformPass(decoder, [matrix])()
    node = decoder.layers[0].attention.key_append.inputs[1].producer()
    np.testing.assert_array_equal(node.inputs[2].const_value.numpy(), matrix.astype(np.float32))


def test_refuses_a_cache_of_codes() -> None:
    decoder = located()
    quantize_cache(decoder, "packed")
    with refused(
        decoder,
        "InsertKeyTransform: QuantizeKvCache has been applied to this model; "
        "apply InsertKeyTransformPass before",
    ):
        InsertKeyTransformPass(decoder, [invertible(4, 4)])()
