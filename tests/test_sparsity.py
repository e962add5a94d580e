# SPDX-License-Identifier: Apache-2.0
"""What 2:4 hardware reads says the same as the dense codes."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file

from quarot_onnx import ops
from quarot_onnx.artifacts import load_manifest
from quarot_onnx.calibration import Calibration
from quarot_onnx.pipeline import export
from quarot_onnx.quantizers.pruning import mask_of
from quarot_onnx.recipe import load_recipe
from quarot_onnx.sparsity import FILE, compressed, expanded
from tests.conftest import HuggingFace


@pytest.mark.parametrize("in_features", [4, 8, 12, 176])
def test_expanding_what_was_compressed_gives_the_dense_codes(in_features) -> None:
    rng = np.random.default_rng(in_features)
    keep = mask_of(rng.normal(size=(in_features, 5)), None, "2:4")
    codes = rng.integers(-8, 8, keep.shape).astype(np.int8) * keep
    values, indices = compressed(codes, keep)
    assert values.shape == (5, in_features // 2)
    assert indices.shape == (5, -(-in_features // 8))
    np.testing.assert_array_equal(expanded(values, indices, in_features), codes)


def test_places_are_two_bits_each_from_the_lowest() -> None:
    keep = np.array([0, 1, 0, 1, 1, 0, 1, 0], bool)[:, None]
    values, indices = compressed(np.array([0, 5, 0, -3, 7, 0, 1, 0], np.int8)[:, None], keep)
    assert values.tolist() == [[5, -3, 7, 1]]
    assert indices.tolist() == [[0b10_00_11_01]]


@pytest.mark.parametrize(
    ("recipe", "pattern"), [("w4a4kv4-obr", "50%"), ("w4a4kv4-obr-2to4", "2:4")]
)
def test_an_artifact_holds_masks_that_its_codes_obey(
    traced_once: None, hugging_face: HuggingFace, tmp_path: Path, recipe, pattern
) -> None:
    tokens = np.random.default_rng(0).integers(0, 128, (16, 24))
    out = tmp_path / "out"
    calibration = Calibration.of(tokens, "random tokens")
    export(hugging_face("llama"), out, load_recipe(recipe), calibration=calibration, certify=False)
    assert FILE in load_manifest(out)["files"]
    held = load_file(out / FILE)
    graph = ir.load(out / "model.onnx").graph
    weights = [name for name in graph.initializers if f"{name}_scale" in graph.initializers]
    assert len(weights) == 21
    for name in weights:
        codes = graph.initializers[name].const_value.numpy().astype(np.int8)
        if pattern == "2:4":
            values = ops.unpack_int4(held[f"{name}.values"])
            dense = expanded(values, held[f"{name}.indices"], len(codes))
            np.testing.assert_array_equal(dense, codes)
            assert (np.count_nonzero(codes.T.reshape(-1, 4), axis=1) <= 2).all()
        else:
            mask = held[f"{name}.mask"]
            keep = np.unpackbits(mask, axis=1, count=len(codes), bitorder="little").T
            assert keep.mean() == pytest.approx(0.5, abs=0.01)
            assert not codes[keep == 0].any()
