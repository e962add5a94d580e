# SPDX-License-Identifier: Apache-2.0
"""LayerNorm's mean goes into the writers, its bias into the readers' biases; an RMSNorm remains."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quarot_onnx.passes.fuse_layer_norm_mean import FuseLayerNormMeanPass
from quarot_onnx.passes.fuse_norm_scale import FuseNormScalePass
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
    decoder = located(layer_norms=True, positions=True)
    before = text(decoder.model)
    report = FuseLayerNormMeanPass(decoder)()
    assert_golden("fuse_layer_norm_mean", before, text(decoder.model))
    assert report.sites == 3


@given(
    options=SIZES,
    dtype=st.sampled_from(sorted(TYPES)),
    tied=st.booleans(),
    parallel=st.booleans(),
    positions=st.booleans(),
)
@settings(max_examples=16, deadline=None)
def test_the_function_does_not_change(options, dtype, tied, parallel, positions) -> None:
    shape = {"layer_norms": True, "tied": tied, "parallel": parallel, "positions": positions}
    assert_equivalent(lambda d: FuseLayerNormMeanPass(d)(), dtype=dtype, **shape, **options)


def test_everything_that_is_added_to_the_stream_has_mean_zero() -> None:
    decoder = located(layer_norms=True, positions=True, num_layers=2)
    FuseLayerNormMeanPass(decoder)()
    written = list(decoder.embedding_weights)
    for writer in decoder.writers:
        written += [w for w in (writer.linear.weight, writer.linear.bias) if w is not None]
    assert len(written) == 2 + 2 * (2 + 1)
    for weight in written:
        np.testing.assert_allclose(weight.float64().mean(axis=-1), 0, atol=1e-15)


def test_a_shift_moves_into_the_biases_of_the_readers() -> None:
    decoder = located(layer_norms=True)
    norm = decoder.norms[0]
    shift = norm.shift.float64()
    linears = [(r.weight.float64(), r.bias.float64() if r.bias else 0) for r in norm.readers]
    FuseLayerNormMeanPass(decoder)()
    for reader, (weight, bias) in zip(norm.readers, linears, strict=True):
        np.testing.assert_allclose(reader.bias.float64(), bias + shift @ weight, atol=1e-15)
        assert reader.bias.name == reader.weight.name.replace(".weight", ".bias")
    assert norm.node.op_type == "RMSNormalization"
    assert not any("norm" in n and "bias" in n for n in decoder.model.graph.initializers)


def test_refuses_a_model_with_an_rms_norm() -> None:
    decoder = located()
    with refused(
        decoder,
        "/layers.0/norm_1/RMSNormalization: not a LayerNorm, so that the centred residual stream "
        "would change it; export without FuseLayerNormMeanPass",
    ):
        FuseLayerNormMeanPass(decoder)()


@pytest.mark.parametrize("dtype", sorted(TYPES))
def test_norm_scales_are_folded_after_it_only(dtype) -> None:
    decoder = located(layer_norms=True, dtype=dtype)
    with refused(
        decoder,
        "/layers.0/norm_1/LayerNormalization: a LayerNorm, which has a mean and a bias; "
        "apply FuseLayerNormMeanPass first",
    ):
        FuseNormScalePass(decoder)()
    FuseLayerNormMeanPass(decoder)()
    assert FuseNormScalePass(decoder)().sites == 3
