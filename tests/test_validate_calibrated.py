# SPDX-License-Identifier: Apache-2.0
"""The gate on artifacts whose weights or outlier features were found on calibration text."""

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quarot_onnx.calibration import Calibration
from quarot_onnx.pipeline import export
from quarot_onnx.recipe import load_recipe
from quarot_onnx.validate import validate
from quarot_onnx.validate.subject import Subject
from quarot_onnx.validate.twin import bisect
from tests.conftest import HuggingFace
from tests.test_validate import DEPLOYED, Planted, failed

CALIBRATION = Calibration.of(np.random.default_rng(0).integers(0, 128, (24, 32)), "random tokens")


@pytest.fixture(scope="module")
def calibrated(
    traced_once: None, hugging_face: HuggingFace, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    """(family, recipe) -> the artifact. Read only."""

    @cache
    def artifact(family: str, recipe: str) -> Path:
        out = tmp_path_factory.mktemp("calibrated") / "out"
        options: dict[str, Any] = {"calibration": CALIBRATION, "certify": False}
        export(hugging_face(family), out, load_recipe(recipe), **options)
        return out

    return artifact


@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        ("qwen3-head-dim", "w4a16-gptq-g128"),
        ("qwen3-head-dim", "w4a4kv4-g128"),
        ("llama", "w4a4kv4-obr"),
        ("qwen2-biases", "w4a4-outliers"),
        ("mixtral", "w4a4kv4-gptq"),
    ],
)
def test_a_sound_artifact_that_has_looked_at_text_passes(
    calibrated: Callable[[str, str], Path], hugging_face: HuggingFace, family: str, recipe: str
) -> None:
    artifact, reference = calibrated(family, recipe), hugging_face(family)
    verdict = validate(artifact, reference, threads=1)
    assert verdict.passed, verdict.failures
    skipped = {stage.id for stage in verdict.stages if stage.status == "skipped"}
    others = {"weights", "logits", "outputs"} if family == "mixtral" else set()
    assert skipped == DEPLOYED | {"equivalence"} | others
    assert bisect(Subject(artifact, reference, threads=1)).departure is None


@pytest.mark.parametrize(
    ("family", "recipe", "kind"),
    [
        ("qwen2-biases", "w4a4-outliers", ""),
        ("qwen2-biases", "w4a4-outliers", "_outliers"),
        ("llama", "w4a4kv4-obr", ""),
    ],
)
def test_finds_swapped_weights(
    calibrated: Callable[[str, str], Path],
    hugging_face: HuggingFace,
    tmp_path: Path,
    family: str,
    recipe: str,
    kind: str,
) -> None:
    planted = Planted(Path(shutil.copytree(calibrated(family, recipe), tmp_path / "artifact")))
    planted.swap_data(*(f"model.layers.{i}.mlp.up_proj.weight{kind}" for i in (0, 2)))
    verdict = validate(planted.save(), hugging_face(family), threads=1)
    assert "weights" in failed(verdict)
