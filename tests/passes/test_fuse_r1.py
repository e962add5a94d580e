# SPDX-License-Identifier: Apache-2.0
"""R1: one rotation in every reader and writer of the residual stream."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quarot_onnx.decoder import Decoder
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

KINDS = ["hadamard", "randomized_hadamard", "random_orthogonal"]


def _rotate(decoder: Decoder, kind: str = "randomized_hadamard") -> FuseR1Pass:
    return FuseR1Pass(decoder, Rotation(kind, decoder.hidden_size, 0, "R1"))


def test_golden() -> None:
    decoder = located()
    FuseNormScalePass(decoder)()
    before = text(decoder.model)
    report = _rotate(decoder)()
    assert_golden("fuse_r1", before, text(decoder.model))
    assert (report.sites, report.detail) == (1 + 2 + 6, "randomized hadamard 2 x 4")


@pytest.mark.parametrize("kind", KINDS)
@given(options=SIZES, dtype=st.sampled_from(sorted(TYPES)))
@settings(max_examples=8, deadline=None)
def test_the_function_does_not_change(kind, options, dtype) -> None:
    def apply(decoder: Decoder) -> None:
        FuseNormScalePass(decoder)()
        _rotate(decoder, kind)()

    assert_equivalent(apply, dtype=dtype, **options)


def test_every_residual_state_is_rotated() -> None:
    """Embedding and writers go through Q, biases with them; readers go through its transpose."""
    decoder = located()
    FuseNormScalePass(decoder)()
    rotation = Rotation("random_orthogonal", 8, 3, "R1")
    Q = rotation.rotate_outputs(np.eye(8))
    embedding = decoder.embedding_weights[0].float64()
    linears = [writer.linear for writer in decoder.writers]
    writers = [(w.weight.float64(), w.bias and w.bias.float64()) for w in linears]
    readers = [r.weight.float64() for norm in decoder.norms for r in norm.readers]
    FuseR1Pass(decoder, rotation)()
    close = {"atol": 1e-14}
    np.testing.assert_allclose(decoder.embedding_weights[0].float64(), embedding @ Q, **close)
    for writer, (weight, bias) in zip(linears, writers, strict=True):
        np.testing.assert_allclose(writer.weight.float64(), weight @ Q, **close)
        if bias is not None:
            np.testing.assert_allclose(writer.bias.float64(), bias @ Q, **close)
    after = [r.weight.float64() for norm in decoder.norms for r in norm.readers]
    for weight, rotated in zip(readers, after, strict=True):
        np.testing.assert_allclose(rotated, Q.T @ weight, **close)
    assert any(bias is not None for _, bias in writers)


def test_refuses_norms_that_still_have_scales() -> None:
    decoder = located()
    with refused(
        decoder,
        "R1: the norms still have scales, with which no rotation commutes; "
        "apply FuseNormScalePass first",
    ):
        _rotate(decoder)()


def test_refuses_another_order() -> None:
    decoder = located()
    FuseNormScalePass(decoder)()
    with refused(decoder, "R1: order 16 for hidden_size = 8; they must be equal"):
        FuseR1Pass(decoder, Rotation("hadamard", 16, 0, "R1"))()


@given(options=SIZES, dtype=st.sampled_from(sorted(TYPES)), kind=st.sampled_from(KINDS))
@settings(max_examples=12, deadline=None)
def test_behind_post_norms_it_runs_online(options, dtype, kind) -> None:
    def apply(decoder: Decoder) -> None:
        FuseNormScalePass(decoder)()
        _rotate(decoder, kind)()

    assert_equivalent(apply, dtype=dtype, post_norms=True, **options)


def test_golden_of_post_norms() -> None:
    decoder = located(post_norms=True)
    FuseNormScalePass(decoder)()
    before = text(decoder.model)
    report = _rotate(decoder)()
    assert_golden("fuse_r1_post_norms", before, text(decoder.model))
    assert report.sites == 1 + 2 + 6
    assert report.detail == (
        "randomized hadamard 2 x 4; online after 2 post-norms, 48 multiply-adds a token each"
    )


def test_writers_in_front_of_a_post_norm_are_not_rotated() -> None:
    decoder = located(post_norms=True)
    FuseNormScalePass(decoder)()
    before = [writer.linear.weight.float64() for writer in decoder.writers]
    scales = [norm.scale.float64() for norm in decoder.post_norms]
    rotation = Rotation("randomized_hadamard", 8, 0, "R1")
    FuseR1Pass(decoder, rotation)()
    for writer, weight in zip(decoder.writers, before, strict=True):
        np.testing.assert_array_equal(writer.linear.weight.float64(), weight)
    for norm, scale in zip(decoder.post_norms, scales, strict=True):
        np.testing.assert_array_equal(norm.scale.float64(), scale * rotation.signs)


def _untouched(decoder: Decoder) -> list[str]:
    """The nodes and what was composed on each weight."""
    return [line for line in text(decoder.model).splitlines() if "metadata_props" not in line]


def test_r1_is_left_out_where_post_norms_allow_no_fast_rotation() -> None:
    decoder = located(post_norms=True)
    FuseNormScalePass(decoder)()
    before = _untouched(decoder)
    report = _rotate(decoder, "random_orthogonal")()
    assert report.sites == 0
    assert report.skipped == {
        "post-norms keep their scale, and a random orthogonal 8 has no fast form to run behind "
        "them": ["/layers.0/post_1/RMSNormalization", "/layers.0/post_2/RMSNormalization"]
    }
    assert _untouched(decoder) == before


def test_r1_is_left_out_where_the_recipe_says_so() -> None:
    decoder = located(post_norms=True)
    FuseNormScalePass(decoder)()
    before = _untouched(decoder)
    report = FuseR1Pass(decoder, Rotation("hadamard", 8, 0, "R1"), "skip_r1")()
    assert list(report.skipped) == [
        "post-norms keep their scale, and rotations.post_norm = skip_r1"
    ]
    assert _untouched(decoder) == before
