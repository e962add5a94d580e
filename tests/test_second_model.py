# SPDX-License-Identifier: Apache-2.0
"""The second embedded model: trained, of another family, broken by 4 bits until it is rotated."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from quarot_onnx.evaluate import perplexity
from quarot_onnx.pipeline import export
from quarot_onnx.recipe import load_recipe
from quarot_onnx.reference import HuggingFaceModel
from quarot_onnx.runtime import Ids, OnnxModel, load_tokenizer
from quarot_onnx.texts import evaluation_windows

MODEL = Path(__file__).parents[1] / "examples" / "tiny_qwen3" / "model"


@pytest.fixture(scope="module")
def windows() -> Ids:
    return evaluation_windows("embedded", load_tokenizer(MODEL), count=12, length=256).tokens


@cache
def _judge() -> HuggingFaceModel:
    return HuggingFaceModel(MODEL, threads=1)


def test_it_is_small_and_trained(windows: Ids) -> None:
    assert sum(path.stat().st_size for path in MODEL.iterdir()) < 4.1e6
    assert perplexity(_judge(), windows) < 16
    assert _judge().config.model_type == "qwen3"
    assert _judge().config.tie_word_embeddings


@pytest.mark.parametrize(
    ("fold", "times"), [("true", 2.5), ("false", 100.0)], ids=["folded", "as it is"]
)
def test_unrotated_4_bits_break_it(
    fold: str, times: float, windows: Ids, traced_once: None, tmp_path: Path
) -> None:
    recipe = load_recipe("w4a4kv4-unrotated", [f"rotations.fold_norm_scale={fold}"])
    export(MODEL, tmp_path / "plain", recipe)
    found = perplexity(OnnxModel(tmp_path / "plain", threads=1), windows)
    assert found > times * perplexity(_judge(), windows)


def test_rotated_4_bits_do_not(windows: Ids, traced_once: None, tmp_path: Path) -> None:
    export(MODEL, tmp_path / "rotated", load_recipe("w4a4kv4"))
    found = perplexity(OnnxModel(tmp_path / "rotated", threads=1), windows)
    assert found < 1.5 * perplexity(_judge(), windows)


def test_rotations_alone_change_nothing(windows: Ids, traced_once: None, tmp_path: Path) -> None:
    export(MODEL, tmp_path / "rotated", load_recipe("rotate-only"))
    model = OnnxModel(tmp_path / "rotated", threads=1)
    logits, _ = model.step(windows[:2], model.new_cache(2))
    expected, _ = _judge().step(windows[:2], _judge().new_cache(2))
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()
