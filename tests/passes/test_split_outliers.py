# SPDX-License-Identifier: Apache-2.0
"""Outlier features: split off without changing the function, chosen where activations are large."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quarot_onnx.calibration import Calibration
from quarot_onnx.decoder import Decoder
from quarot_onnx.export.checkpoint import Checkpoint
from quarot_onnx.passes.quantize_weights import QuantizeWeightsPass
from quarot_onnx.passes.split_outliers import Chosen, SplitOutliersPass, largest_features
from quarot_onnx.pipeline import rewrite
from quarot_onnx.recipe import load_recipe
from tests import models
from tests.small_decoder import (
    SIZES,
    TYPES,
    assert_equivalent,
    assert_golden,
    located,
    refused,
    text,
)


def _split(decoder: Decoder, seed: int = 0) -> SplitOutliersPass:
    """On random features of every input, of some inputs none."""

    def choose() -> Chosen:
        rng = np.random.default_rng(seed)
        return {
            linear.x.name or "": np.flatnonzero(rng.random(linear.in_features) < rng.random())
            for linear in decoder.linears
        }

    return SplitOutliersPass(decoder, choose)


def test_golden() -> None:
    decoder = located()
    before = text(decoder.model)
    value = decoder.layers[0].mlp.down.x.name or ""
    report = SplitOutliersPass(decoder, lambda: {value: np.array([3, 5])})()
    assert_golden("split_outliers", before, text(decoder.model))
    assert (report.sites, report.detail) == (1, "2 features of 4 inputs stay float")
    assert report.records[-1] == {"site": "/layers.0/down_proj", "features": [3, 5]}


@given(options=SIZES, dtype=st.sampled_from(sorted(TYPES)), seed=st.integers(0, 9))
@settings(max_examples=8, deadline=None)
def test_the_function_does_not_change(options, dtype, seed) -> None:
    assert_equivalent(lambda d: _split(d, seed)(), dtype=dtype, **options)


def test_what_is_quantized_no_longer_sees_the_outliers() -> None:
    decoder = located()
    down = decoder.layers[0].mlp.down
    whole = down.weight.float64()
    SplitOutliersPass(decoder, lambda: {down.x.name or "": np.array([3, 5])})()
    rest = down.weight.float64()
    assert not rest[[3, 5]].any()
    np.testing.assert_array_equal(np.delete(rest, [3, 5], 0), np.delete(whole, [3, 5], 0))
    held = decoder.model.graph.initializers["layers.0.down_proj.weight_outliers"].const_value
    np.testing.assert_allclose(held.numpy(), whole[[3, 5]], rtol=1e-6)


def test_refuses_weights_that_are_codes_already() -> None:
    decoder = located()
    QuantizeWeightsPass(decoder, bits=4, clip_search=True)()
    with refused(
        decoder,
        "SplitOutliers: QuantizeWeights has been applied to this model; "
        "apply SplitOutliersPass before",
    ):
        _split(decoder)()


@pytest.mark.parametrize(("share", "threshold"), [(0.1, 0.0), (0.0, 8.0)])
def test_the_largest_features_of_the_calibration_are_chosen(
    traced_once: None, tmp_path: Path, share, threshold
) -> None:
    model = models.build("llama")
    model.model.layers[1].input_layernorm.weight.data[[7, 50]] = 20.0
    checkpoint = Checkpoint(models.save(model, tmp_path / "model"))
    decoder = rewrite(checkpoint, load_recipe("float"), "float32").decoder
    tokens = np.random.default_rng(0).integers(0, 128, (4, 16))
    chosen = largest_features(
        decoder, Calibration.of(tokens, "random"), share=share, threshold=threshold
    )
    q = decoder.layers[1].attention.q
    found = chosen[q.x.name or ""]
    assert {7, 50} <= set(found.tolist())
    if share:
        assert all(len(chosen[x.x.name or ""]) == -(-x.in_features // 10) for x in decoder.linears)
    else:
        assert len(found) < 10
