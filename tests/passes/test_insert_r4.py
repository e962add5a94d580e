# SPDX-License-Identifier: Apache-2.0
"""R4: down_proj's input is rotated online, its weight offline."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quarot_onnx.hadamard import plan
from quarot_onnx.passes.insert_r4 import InsertR4Pass
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


def test_golden() -> None:
    decoder = located()
    before = text(decoder.model)
    report = InsertR4Pass(decoder)()
    assert_golden("insert_r4", before, text(decoder.model))
    assert (report.sites, report.detail) == (1, "hadamard 12")


@given(options=SIZES, dtype=st.sampled_from(sorted(TYPES)))
@settings(max_examples=12, deadline=None)
def test_the_function_does_not_change(options, dtype) -> None:
    assert_equivalent(lambda d: InsertR4Pass(d)(), dtype=dtype, **options)


@pytest.mark.parametrize("size", [12, 172, 22])
def test_the_weight_is_turned_by_the_transpose(size) -> None:
    decoder = located(intermediate_size=size)
    down = decoder.layers[0].mlp.down
    before = down.weight.float64()
    rotation = plan(size)
    InsertR4Pass(decoder)()
    x = np.random.default_rng(0).normal(size=(5, size))
    np.testing.assert_allclose(rotation.apply(x) @ down.weight.float64(), x @ before, atol=1e-12)


def test_a_dimension_without_a_full_hadamard_is_rotated_in_blocks_and_says_so() -> None:
    decoder = located(intermediate_size=22)
    assert InsertR4Pass(decoder)().detail == "hadamard 2 in blocks of 2"


def test_an_odd_dimension_is_skipped_with_the_reason() -> None:
    decoder = located(intermediate_size=13)
    before = text(decoder.model)
    report = InsertR4Pass(decoder)()
    assert report.sites == 0
    ((reason, places),) = report.skipped.items()
    assert "n=13 is odd" in reason
    assert places == ["/layers.0/down_proj/MatMul"]
    assert text(decoder.model).replace(" InsertR4", "") == before


def test_padding_rotates_all_features_and_keeps_the_function() -> None:
    for size, padded, factors in ((22, 24, "12 x 2"), (13, 16, "4 x 4")):
        options = {"intermediate_size": size, "num_layers": 2}
        assert_equivalent(lambda d: InsertR4Pass(d, "pad")(), **options)
        decoder = located(**options)
        report = InsertR4Pass(decoder, "pad")()
        assert report.detail == f"hadamard {factors} of {size} padded to {padded}"
        down = decoder.layers[1].mlp.down
        assert down.in_features == padded
        assert down.weight.float64().shape == (padded, 8)
        assert [n.op_type for n in decoder.model.graph].count("Pad") == 2


def test_nothing_is_padded_where_the_size_has_a_matrix() -> None:
    decoder = located()
    assert InsertR4Pass(decoder, "pad")().detail == "hadamard 12"
    assert "Pad" not in {node.op_type for node in decoder.model.graph}


def test_the_full_policy_leaves_other_sizes_alone() -> None:
    decoder = located(intermediate_size=22)
    report = InsertR4Pass(decoder, "full")()
    assert report.sites == 0
    ((reason, _),) = report.skipped.items()
    assert "n=22 is not a multiple of 4" in reason


def test_layers_share_the_matrices() -> None:
    decoder = located(num_layers=2, intermediate_size=172)
    InsertR4Pass(decoder)()
    nodes = [node for node in decoder.model.graph if node.op_type == "Hadamard"]
    assert len(nodes) == 2
    assert nodes[0].inputs[1:] == nodes[1].inputs[1:]


def test_refuses_quantized_activations() -> None:
    decoder = located()
    quantize_linears(decoder)
    with refused(
        decoder,
        "InsertR4: QuantizeActivations has been applied to this model; apply InsertR4Pass before",
    ):
        InsertR4Pass(decoder)()
