# SPDX-License-Identifier: Apache-2.0
"""R1 is the candidate that rounds the calibration's activations best."""

import numpy as np
import pytest

from quarot_onnx import ops
from quarot_onnx.calibration import Calibration
from quarot_onnx.export.checkpoint import Checkpoint
from quarot_onnx.pipeline import rewrite
from quarot_onnx.recipe import load_recipe
from quarot_onnx.reference import HuggingFaceModel
from tests.conftest import HuggingFace

CALIBRATION = Calibration.of(np.random.default_rng(0).integers(0, 128, (3, 12)), "random tokens")


def test_the_candidate_with_the_least_error_is_fused(
    traced_once: None, hugging_face: HuggingFace
) -> None:
    """The errors are those of Hugging Face's own normalized states, before every layer's halves."""
    model_dir = hugging_face("llama")
    recipe = load_recipe("rotate-only", ["rotations.candidates=3"])
    rewritten = rewrite(Checkpoint(model_dir), recipe, "float32", CALIBRATION)
    (report,) = [report for report in rewritten.reports if report.name == "FuseR1"]
    errors = [record["error"] for record in report.records]
    chosen = [record["is_chosen"] for record in report.records]
    assert chosen.index(True) == int(np.argmin(errors))
    assert f"seed {chosen.index(True)} of 3" in report.detail

    states = _normalized_states(model_dir)
    R1 = rewritten.transforms.tensors["R1"]
    np.testing.assert_allclose(R1 @ R1.T, np.eye(96), atol=1e-12)
    wanted = np.mean([_relative_error(state @ R1) for state in states])
    assert errors[chosen.index(True)] == pytest.approx(wanted, rel=1e-3)


def _normalized_states(model_dir) -> list[np.ndarray]:
    import torch  # noqa: PLC0415

    states: list[np.ndarray] = []

    def keep(_, inputs) -> None:
        x = inputs[0].double().numpy().reshape(-1, 96)
        states.append(x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + 1e-6))

    judge = HuggingFaceModel(model_dir)
    for layer in judge.model.model.layers:
        layer.input_layernorm.register_forward_pre_hook(keep)
        layer.post_attention_layernorm.register_forward_pre_hook(keep)
    with torch.no_grad():
        judge.model(input_ids=torch.from_numpy(CALIBRATION.tokens))
    return states


def _relative_error(x: np.ndarray) -> float:
    codes, scale = ops.quantize_int4(x)
    values = (codes.astype(np.float64) - 128) * scale
    return float(np.square(values - x).sum() / np.square(x).sum())
