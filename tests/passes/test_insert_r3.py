# SPDX-License-Identifier: Apache-2.0
"""R3: queries and new keys are rotated online, after RoPE."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from quarot_onnx.hadamard import plan
from quarot_onnx.passes.insert_r3 import InsertR3Pass
from tests import float64
from tests.small_decoder import (
    SIZES,
    TYPES,
    assert_equivalent,
    assert_golden,
    feeds,
    located,
    quantize_cache,
    refused,
    text,
)


def test_golden() -> None:
    decoder = located()
    before = text(decoder.model)
    report = InsertR3Pass(decoder, plan(4))()
    assert_golden("insert_r3", before, text(decoder.model))
    assert (report.sites, report.detail) == (2, "hadamard 2 x 2")


@given(options=SIZES, dtype=st.sampled_from(sorted(TYPES)))
@settings(max_examples=12, deadline=None)
def test_the_function_does_not_change(options, dtype) -> None:
    assert_equivalent(
        lambda d: InsertR3Pass(d, plan(options["head_dim"]))(), dtype=dtype, **options
    )


def test_the_cache_holds_the_rotated_keys() -> None:
    decoder = located(head_dim=24)
    inputs = feeds(decoder.model, length=3, past=0)
    before = float64.run(decoder.model, inputs)["present.0.key"]
    InsertR3Pass(decoder, plan(24))()
    after = float64.run(decoder.model, inputs)["present.0.key"]
    np.testing.assert_allclose(after, before @ plan(24).matrix(), atol=1e-13)


def test_a_head_dim_without_any_hadamard_is_left_alone_with_the_reason() -> None:
    decoder = located()
    before = text(decoder.model)
    report = InsertR3Pass(decoder, plan(6, policy="full"))()
    assert report.sites == 0
    ((reason, places),) = report.skipped.items()
    assert "n=6 is not a multiple of 4" in reason
    assert places == ["/layers.0/Attention"]
    assert text(decoder.model).replace(" InsertR3", "") == before


def test_refuses_a_quantized_cache() -> None:
    decoder = located()
    quantize_cache(decoder, "float")
    with refused(
        decoder,
        "InsertR3: QuantizeKvCache has been applied to this model; apply InsertR3Pass before",
    ):
        InsertR3Pass(decoder, plan(4))()
