# SPDX-License-Identifier: Apache-2.0
"""Searched clips: less loss on the text, measured on the model that is written."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quarot_onnx import evaluate
from quarot_onnx.artifacts import load_manifest
from quarot_onnx.calibration import Calibration, clip_search
from quarot_onnx.pipeline import export
from quarot_onnx.recipe import Recipe, load_recipe
from quarot_onnx.runtime import OnnxModel
from tests.conftest import HuggingFace

CALIBRATION = Calibration.of(np.random.default_rng(0).integers(0, 128, (3, 24)), "random tokens")
PART = CALIBRATION.part(2)


@pytest.fixture(autouse=True)
def _few_trials() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clip_search, "_STEPS", 1)
        yield


def _recipe(clip: str = "perplexity", *overrides: str) -> Recipe:
    clips = [f"{section}.clip={clip}" for section in ("activations", "kv_cache")]
    return load_recipe("w3a3kv3", ["calibration.search_windows=2", *clips, *overrides])


def _exported(model_dir: Path, recipe: Recipe, out: Path) -> tuple[float, list[dict[str, Any]]]:
    """The artifact's perplexity on the searched windows, and what the search reports."""
    export(model_dir, out, recipe, calibration=CALIBRATION)
    records = [
        record
        for report in load_manifest(out)["passes"]
        for record in report["records"]
        if report["name"] == "SearchClips"
    ]
    return evaluate.perplexity(OnnxModel(out, threads=1), PART.tokens), records


@pytest.mark.parametrize("overrides", [[], ["kv_cache.io=float", "activations.mode=asymmetric"]])
def test_the_reported_perplexity_is_that_of_the_artifact_and_falls(
    traced_once: None, hugging_face: HuggingFace, tmp_path: Path, overrides
) -> None:
    model = hugging_face("llama")
    found, records = _exported(model, _recipe("perplexity", *overrides), tmp_path / "searched")
    before, none = _exported(model, _recipe("error", *overrides), tmp_path / "start")
    assert not none
    assert found == pytest.approx(records[-1]["perplexity"], rel=1e-5)
    trail = [before, *(record["perplexity"] for record in records)]
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in pairwise(trail))
    assert found < 0.99 * before
    assert [r["kind"] for r in records[:6]] == [
        "qkv",
        "keys",
        "values",
        "o_proj",
        "gate_up",
        "down_proj",
    ]


def test_a_search_that_looks_the_other_way_is_caught(
    traced_once: None, hugging_face: HuggingFace, tmp_path: Path
) -> None:
    """The planted mistake: the worst clip of each site, instead of the best."""
    model = hugging_face("llama")
    before, _ = _exported(model, _recipe("error"), tmp_path / "start")
    with pytest.MonkeyPatch.context() as patch:
        original = clip_search._loss
        patch.setattr(clip_search, "_loss", lambda *arguments: -original(*arguments))
        found, records = _exported(model, _recipe(), tmp_path / "searched")
    assert found > 1.01 * before
    assert found != pytest.approx(records[-1]["perplexity"], rel=1e-3)


def test_a_killed_search_goes_on_with_the_site_after_the_last_that_it_finished(
    traced_once: None, hugging_face: HuggingFace, tmp_path: Path
) -> None:
    model, trials = hugging_face("llama"), []

    def searched(out: Path, stop_after: int | None) -> dict[str, Any]:
        original = clip_search._loss

        def counted(*arguments: Any) -> float:
            trials.append(arguments)
            if len(trials) == stop_after:
                raise KeyboardInterrupt
            return original(*arguments)

        trials.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(clip_search, "_loss", counted)
            export(model, out, _recipe(), calibration=CALIBRATION, resume=True, certify=False)
        return load_manifest(out)

    whole = searched(tmp_path / "whole", None)
    in_all, in_a_layer = len(trials), 3 + 5 * 2  # a site's start is known but for the first one
    assert in_all == 3 * in_a_layer
    with pytest.raises(KeyboardInterrupt):
        searched(tmp_path / "out", in_a_layer + 3 + 2 + 1)  # in the third site of the second layer
    assert not (tmp_path / "out").exists()
    resumed = searched(tmp_path / "out", None)
    assert len(trials) == in_all - in_a_layer - 3 - 2
    assert resumed["passes"] == whole["passes"]
    assert resumed["files"] == whole["files"]
    assert not (tmp_path / "out.calibration").exists()
