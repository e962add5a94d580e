# SPDX-License-Identifier: Apache-2.0
"""Values of each cache head go through a matrix, o_proj through its inverse."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from quarot_onnx.hadamard import plan
from quarot_onnx.passes.fuse_r2 import FuseR2Pass
from quarot_onnx.passes.fuse_value_transform import FuseValueTransformPass
from tests.small_decoder import (
    SIZES,
    TYPES,
    assert_equivalent,
    assert_golden,
    invertible,
    located,
    refused,
    text,
)


def test_golden() -> None:
    decoder = located()
    before = text(decoder.model)
    report = FuseValueTransformPass(decoder, [invertible(2, 4, 4)])()
    assert_golden("fuse_value_transform", before, text(decoder.model))
    assert (report.sites, report.detail) == (2, "given, one per cache head")


@given(options=SIZES, dtype=st.sampled_from(sorted(TYPES)))
@settings(max_examples=8, deadline=None)
def test_the_function_does_not_change(options, dtype) -> None:
    heads, size = options["num_kv_heads"], options["head_dim"]
    matrices = [invertible(heads, size, size, seed=i) for i in range(options["num_layers"])]
    assert_equivalent(lambda d: FuseValueTransformPass(d, matrices)(), dtype=dtype, **options)


def test_each_cache_head_has_its_own_matrix() -> None:
    decoder = located()
    v = decoder.layers[0].attention.v
    before, bias = v.weight.float64(), v.bias.float64()
    matrices = invertible(2, 4, 4)
    FuseValueTransformPass(decoder, [matrices])()
    for head, matrix in enumerate(matrices):
        part = slice(4 * head, 4 * head + 4)
        np.testing.assert_allclose(v.weight.float64()[:, part], before[:, part] @ matrix)
        np.testing.assert_allclose(v.bias.float64()[part], bias[part] @ matrix)


def test_refuses_another_number_of_heads() -> None:
    decoder = located()
    with refused(
        decoder,
        "/layers.0/v_proj/MatMul: value transforms of shape [3, 4, 4]; "
        "it has 2 cache heads of 4 features",
    ):
        FuseValueTransformPass(decoder, [invertible(3, 4, 4)])()


def test_refuses_values_that_r2_has_turned() -> None:
    decoder = located()
    FuseR2Pass(decoder, plan(4))()
    with refused(
        decoder,
        "FuseValueTransform: FuseR2 has been applied to this model; "
        "apply FuseValueTransformPass before",
    ):
        FuseValueTransformPass(decoder, [invertible(2, 4, 4)])()
