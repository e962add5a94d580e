# SPDX-License-Identifier: Apache-2.0
"""Size moves from the input of down_proj into its weight, through up_proj."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from quarot_onnx.hadamard import plan
from quarot_onnx.passes.insert_r4 import InsertR4Pass
from quarot_onnx.passes.smooth_down_input import SmoothDownInputPass
from tests.small_decoder import (
    SIZES,
    TYPES,
    assert_equivalent,
    assert_golden,
    located,
    refused,
    text,
)


def _smooth(decoder, scale=None) -> SmoothDownInputPass:
    size = decoder.layers[0].mlp.down.in_features
    scale = np.random.default_rng(0).uniform(0.5, 2, size) if scale is None else scale
    return SmoothDownInputPass(decoder, lambda: [scale] * len(decoder.layers), "given")


def test_golden() -> None:
    decoder = located()
    before = text(decoder.model)
    report = _smooth(decoder)()
    assert_golden("smooth_down_input", before, text(decoder.model))
    assert (report.sites, report.detail) == (1, "given")


@given(options=SIZES, dtype=st.sampled_from(sorted(TYPES)))
@settings(max_examples=8, deadline=None)
def test_the_function_does_not_change(options, dtype) -> None:
    assert_equivalent(lambda d: _smooth(d)(), dtype=dtype, **options)


def test_up_shrinks_and_down_grows_and_gate_stays() -> None:
    decoder = located()
    (gate, up), down = decoder.layers[0].mlp.readers, decoder.layers[0].mlp.down
    before = [linear.weight.float64() for linear in (gate, up, down)]
    scale = np.linspace(1, 3, 12)
    apply = _smooth(decoder, scale)
    apply()
    np.testing.assert_array_equal(gate.weight.float64(), before[0])
    np.testing.assert_allclose(up.weight.float64(), before[1] / scale)
    np.testing.assert_allclose(down.weight.float64(), before[2] * scale[:, None])
    np.testing.assert_array_equal(apply.found["model.layers.0.mlp.up"], scale)


def test_a_feed_forward_without_a_product_is_skipped() -> None:
    product = '["/layers.0/Mul"] d0 = Mul (g0_active, u0)'
    decoder = located(replace=(product, product.replace("Mul (", "Add (")))
    report = _smooth(decoder)()
    assert report.sites == 0
    assert report.skipped == {
        "no reader of the norm is a plain factor of its input": ["/layers.0/down_proj/MatMul"]
    }


def test_refuses_an_input_that_r4_has_turned() -> None:
    decoder = located()
    InsertR4Pass(decoder, plan(12))()
    with refused(
        decoder,
        "SmoothDownInput: InsertR4 has been applied to this model; "
        "apply SmoothDownInputPass before",
    ):
        _smooth(decoder)()
