# SPDX-License-Identifier: Apache-2.0
"""A norm stretches its output for free, and its readers undo it."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from quarot_onnx.decoder import Decoder
from quarot_onnx.passes.fuse_norm_output_scale import FuseNormOutputScalePass
from quarot_onnx.passes.fuse_norm_scale import FuseNormScalePass
from quarot_onnx.passes.fuse_r1 import FuseR1Pass
from quarot_onnx.rotation import Rotation
from tests.small_decoder import (
    SIZES,
    TYPES,
    assert_equivalent,
    assert_golden,
    located,
    refused,
    text,
)


def _scales(decoder: Decoder) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    draw = np.random.default_rng(0).uniform
    size = decoder.hidden_size
    return {i: (draw(0.5, 2, size), draw(0.5, 2, size)) for i in range(len(decoder.layers))}


def test_golden() -> None:
    decoder = located()
    FuseNormScalePass(decoder)()
    before = text(decoder.model)
    report = FuseNormOutputScalePass(decoder, _scales(decoder))()
    assert_golden("fuse_norm_output_scale", before, text(decoder.model))
    assert report.sites == 2


@given(options=SIZES, dtype=st.sampled_from(sorted(TYPES)))
@settings(max_examples=8, deadline=None)
def test_behind_r1_the_function_does_not_change(options, dtype) -> None:
    def apply(decoder: Decoder) -> None:
        FuseNormScalePass(decoder)()
        FuseR1Pass(decoder, Rotation("randomized_hadamard", decoder.hidden_size, 0, "R1"))()
        FuseNormOutputScalePass(decoder, _scales(decoder))()

    assert_equivalent(apply, dtype=dtype, **options)


def test_a_norm_without_a_scale_is_left_alone() -> None:
    decoder = located()
    FuseNormScalePass(decoder)()
    given = np.linspace(1, 2, 8)
    assert FuseNormOutputScalePass(decoder, {0: (None, given)})().sites == 1
    np.testing.assert_array_equal(decoder.norms[0].scale.float64(), np.ones(8))
    np.testing.assert_array_equal(decoder.norms[1].scale.float64(), given)


def test_refuses_norms_with_scales_of_their_own() -> None:
    decoder = located()
    with refused(
        decoder,
        "norm output scale: the norms still have scales of their own; "
        "apply FuseNormScalePass first",
    ):
        FuseNormOutputScalePass(decoder, _scales(decoder))()


def test_refuses_one_norm_for_both_halves() -> None:
    gate = '["/layers.0/gate_proj/MatMul"] g0 = MatMul ('
    decoder = located(replace=(f"{gate}b0", f"{gate}a0"))
    FuseNormScalePass(decoder)()
    with refused(
        decoder,
        "norm output scale: attention and feed-forward read one norm; "
        "leave the scales out of the file",
    ):
        FuseNormOutputScalePass(decoder, _scales(decoder))()
