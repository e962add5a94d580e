# SPDX-License-Identifier: Apache-2.0
"""R2: every head's values turn in v_proj and turn back in o_proj."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from quarot_onnx.hadamard import plan
from quarot_onnx.passes.fuse_r2 import FuseR2Pass
from tests import float64
from tests.small_decoder import (
    SIZES,
    TYPES,
    assert_equivalent,
    assert_golden,
    feeds,
    located,
    refused,
    text,
)


def test_golden() -> None:
    decoder = located()
    before = text(decoder.model)
    report = FuseR2Pass(decoder, plan(4))()
    assert_golden("fuse_r2", before, text(decoder.model))
    assert (report.sites, report.detail) == (2, "hadamard 2 x 2")


@given(options=SIZES, dtype=st.sampled_from(sorted(TYPES)))
@settings(max_examples=12, deadline=None)
def test_the_function_does_not_change(options, dtype) -> None:
    assert_equivalent(lambda d: FuseR2Pass(d, plan(options["head_dim"]))(), dtype=dtype, **options)


def test_the_cached_values_are_rotated_per_head_and_the_bias_with_them() -> None:
    decoder = located(head_dim=24)
    inputs = feeds(decoder.model, length=3, past=0)
    before = float64.run(decoder.model, inputs)["present.0.value"]
    rotation = plan(24)
    FuseR2Pass(decoder, rotation)()
    after = float64.run(decoder.model, inputs)["present.0.value"]
    np.testing.assert_allclose(after, before @ rotation.matrix(), atol=1e-13)


def test_a_head_dim_without_any_hadamard_is_left_alone_with_the_reason() -> None:
    decoder = located()
    before = text(decoder.model)
    report = FuseR2Pass(decoder, plan(6, policy="full"))()
    assert report.sites == 0
    ((reason, places),) = report.skipped.items()
    assert "n=6 is not a multiple of 4" in reason
    assert places == ["/layers.0/v_proj/MatMul"]
    assert text(decoder.model).replace(" FuseR2", "") == before


def test_refuses_a_second_application() -> None:
    decoder = located()
    FuseR2Pass(decoder, plan(4))()
    with refused(decoder, "FuseR2: already applied to this model; apply it once"):
        FuseR2Pass(decoder, plan(4))()
