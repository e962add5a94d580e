# SPDX-License-Identifier: Apache-2.0
"""Fold norm scales: the readers take them over, the norms keep ones."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quarot_onnx.errors import InputError
from quarot_onnx.passes.fuse_norm_scale import FuseNormScalePass
from quarot_onnx.weights import ArraySource, Weight
from tests.small_decoder import (
    SIZES,
    TYPES,
    assert_equivalent,
    assert_golden,
    located,
    refused,
    text,
)


def test_golden() -> None:
    decoder = located()
    before = text(decoder.model)
    report = FuseNormScalePass(decoder)()
    assert_golden("fuse_norm_scale", before, text(decoder.model))
    assert report.sites == 3


@given(options=SIZES, dtype=st.sampled_from(sorted(TYPES)), tied=st.booleans())
@settings(max_examples=12, deadline=None)
def test_the_function_does_not_change(options, dtype, tied) -> None:
    assert_equivalent(lambda d: FuseNormScalePass(d)(), dtype=dtype, tied=tied, **options)


def test_the_norms_keep_ones_and_the_readers_rows_are_scaled() -> None:
    decoder = located()
    scales = [norm.scale.float64() for norm in decoder.norms]
    rows = [[r.weight.float64() for r in norm.readers] for norm in decoder.norms]
    FuseNormScalePass(decoder)()
    for norm, scale, before in zip(decoder.norms, scales, rows, strict=True):
        assert (norm.scale.float64() == 1).all()
        for reader, weight in zip(norm.readers, before, strict=True):
            np.testing.assert_array_equal(reader.weight.float64(), scale[:, None] * weight)


def test_refuses_a_second_application() -> None:
    decoder = located()
    FuseNormScalePass(decoder)()
    with refused(decoder, "FuseNormScale: already applied to this model; apply it once"):
        FuseNormScalePass(decoder)()


def test_a_scale_that_cannot_be_read_leaves_the_model_untouched() -> None:
    class Damaged(ArraySource):
        def read(self, index):
            raise InputError("model.safetensors: damaged; download it again")

    decoder = located()
    value = decoder.norms[1].node.inputs[1]
    value.const_value = Weight(value.name, Damaged(np.ones(8)), value.dtype)
    before = text(decoder.model)
    with pytest.raises(InputError, match="damaged"):
        FuseNormScalePass(decoder)()
    assert text(decoder.model) == before
