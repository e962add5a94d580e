# SPDX-License-Identifier: Apache-2.0
"""Heads Hadamard: online across heads before o_proj, its inverse in o_proj."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quarot_onnx.decoder import Decoder
from quarot_onnx.hadamard import plan
from quarot_onnx.passes.fuse_r2 import FuseR2Pass
from quarot_onnx.passes.insert_heads_hadamard import InsertHeadsHadamardPass
from tests.small_decoder import (
    SIZES,
    TYPES,
    assert_equivalent,
    assert_golden,
    located,
    quantize_linears,
    refused,
    text,
)


def _heads(decoder: Decoder) -> InsertHeadsHadamardPass:
    number = decoder.layers[0].attention.num_heads
    return InsertHeadsHadamardPass(decoder, plan(number, policy="full"))


def test_golden() -> None:
    decoder = located(num_heads=12)
    before = text(decoder.model)
    report = _heads(decoder)()
    assert_golden("insert_heads_hadamard", before, text(decoder.model))
    assert (report.sites, report.detail) == (1, "hadamard 12")


@given(options=SIZES, dtype=st.sampled_from(sorted(TYPES)))
@settings(max_examples=12, deadline=None)
def test_the_function_does_not_change(options, dtype) -> None:
    assert_equivalent(lambda d: _heads(d)(), dtype=dtype, **options)


def test_it_commutes_with_r2() -> None:
    def apply(decoder: Decoder) -> None:
        _heads(decoder)()
        FuseR2Pass(decoder, plan(4))()

    assert_equivalent(apply)


@pytest.mark.parametrize("num_heads", [6, 14])
def test_a_number_of_heads_without_a_hadamard_is_skipped_with_the_reason(num_heads) -> None:
    decoder = located(num_heads=num_heads)
    before = text(decoder.model)
    report = _heads(decoder)()
    assert report.sites == 0
    ((reason, places),) = report.skipped.items()
    assert f"n={num_heads} is not a multiple of 4" in reason
    assert "left unrotated" in reason
    assert places == ["/layers.0/o_proj/MatMul"]
    assert text(decoder.model).replace(" InsertHeadsHadamard", "") == before


def test_refuses_quantized_activations() -> None:
    decoder = located()
    quantize_linears(decoder)
    with refused(
        decoder,
        "InsertHeadsHadamard: QuantizeActivations has been applied to this model; "
        "apply InsertHeadsHadamardPass before",
    ):
        _heads(decoder)()
