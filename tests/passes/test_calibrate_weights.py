# SPDX-License-Identifier: Apache-2.0
"""GPTQ on a model: each linear is rounded for the inputs that the finished graph gives it."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quarot_onnx import texts
from quarot_onnx.artifacts import load_manifest
from quarot_onnx.calibration import Calibration, Journal, require_unseen, walk
from quarot_onnx.errors import InputError, ResourceError, UsageError
from quarot_onnx.export.checkpoint import Checkpoint
from quarot_onnx.passes import calibrate_weights
from quarot_onnx.pipeline import Rewritten, export, rewrite
from quarot_onnx.quantizers.gptq import gptq
from quarot_onnx.quantizers.grid import nearest
from quarot_onnx.recipe import Recipe, load_recipe
from tests.conftest import HuggingFace

TOKENS = np.random.default_rng(0).integers(0, 128, (16, 24))
CALIBRATION = Calibration.of(TOKENS, "random tokens")


def _recipe(*overrides: str) -> Recipe:
    return load_recipe("w4a4kv4-gptq", ["activations.bits=16", "kv_cache.bits=16", *overrides])


def _codes(rewritten: Rewritten) -> dict[str, Any]:
    initializers = rewritten.model.graph.initializers
    return {
        linear.weight.name: initializers[linear.weight.name].const_value.numpy().astype(np.int8)
        for linear in rewritten.decoder.linears
    }


@pytest.mark.parametrize("family", ["llama", "gpt-neox"])
def test_every_linear_is_rounded_for_the_inputs_that_the_finished_graph_gives_it(
    traced_once: None, hugging_face: HuggingFace, family
) -> None:
    recipe = _recipe()
    rewritten = rewrite(Checkpoint(hugging_face(family)), recipe, "float32", CALIBRATION)
    codes = _codes(rewritten)
    improved = 0
    for run in walk(rewritten.decoder, CALIBRATION):
        (found,) = run.capture({linear.module: linear.x for linear in run.layer.linears})
        for linear in run.layer.linears:
            x = found[linear.module].astype(np.float64)
            weight = linear.weight.float64()
            wanted = gptq(weight, x.T @ x / len(x), recipe.weights.form).codes
            assert (codes[linear.weight.name] != wanted).mean() <= 0.01  # ties in float32 sums
            improved += (wanted != nearest(weight, recipe.weights.form).codes).any()
    assert improved == len(rewritten.decoder.linears)


def test_the_report_has_the_error_of_every_linear_beside_that_of_rounding_to_nearest(
    traced_once: None, hugging_face: HuggingFace
) -> None:
    rewritten = rewrite(Checkpoint(hugging_face("llama")), _recipe(), "float32", CALIBRATION)
    report = next(r for r in rewritten.reports if r.name == "CalibrateWeights")
    assert report.detail == "4 bits, gptq"
    assert [r["site"] for r in report.records] == [x.module for x in rewritten.decoder.linears]
    assert all(record["tokens"] == TOKENS.size for record in report.records)
    gained = [record["snr_db"] - record["rtn_snr_db"] for record in report.records]
    assert min(gained) > 0.5


def test_a_linear_that_few_tokens_reach_is_rounded_to_nearest_and_reported(
    traced_once: None, hugging_face: HuggingFace
) -> None:
    few = Calibration.of(TOKENS[:1], "random tokens")
    recipe = _recipe()
    rewritten = rewrite(Checkpoint(hugging_face("llama")), recipe, "float32", few)
    report = next(r for r in rewritten.reports if r.name == "CalibrateWeights")
    ((reason, sites),) = report.skipped.items()
    assert reason == ("fewer than 64 tokens of the calibration text reach it: rounded to nearest")
    assert len(sites) == len(rewritten.decoder.linears)
    for linear in rewritten.decoder.linears:
        plain = nearest(linear.weight.float64(), recipe.weights.form)
        np.testing.assert_array_equal(_codes(rewritten)[linear.weight.name], plain.codes)


def test_an_interrupted_run_goes_on_where_it_stopped(
    traced_once: None, hugging_face: HuggingFace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(hugging_face("llama"))
    whole = _codes(rewrite(checkpoint, _recipe(), "float32", CALIBRATION))

    def interrupt(done: int, _: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    run = {"recipe": "mine"}
    with pytest.raises(KeyboardInterrupt):
        rewrite(
            checkpoint,
            _recipe(),
            "float32",
            CALIBRATION,
            journal=Journal(tmp_path / "j", run),
            progress=interrupt,
        )
    rounded = []

    def counted(weight: Any, *arguments: Any, **options: Any) -> Any:
        rounded.append(weight.shape)
        return gptq(weight, *arguments, **options)

    monkeypatch.setattr(calibrate_weights, "gptq", counted)
    journal = Journal(tmp_path / "j", run)
    rest = rewrite(checkpoint, _recipe(), "float32", CALIBRATION, journal=journal)
    assert len(rounded) == 7  # of the last of three layers
    for name, codes in _codes(rest).items():
        np.testing.assert_array_equal(codes, whole[name])
    assert len(rest.reports[-1].records) == 21


def test_refuses_the_journal_of_another_run(tmp_path: Path) -> None:
    Journal(tmp_path / "j", {"recipe": "mine"})
    with pytest.raises(UsageError) as caught:
        Journal(tmp_path / "j", {"recipe": "yours"})
    assert str(caught.value) == (
        f"{tmp_path / 'j'}: holds what another run finished (other model, recipe, text or "
        "version); remove it, or export without --resume"
    )


def test_a_journal_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", {})
    shutil.rmtree(tmp_path / "j")
    with pytest.raises(ResourceError, match=r"j/layers\.0\.json: cannot be written \(No such file"):
        journal.finish("layers.0", {})
    with pytest.raises(ResourceError, match=r"j/w\.npy: cannot be written \(No such file"):
        journal.keep("w", np.zeros(3))


@pytest.fixture(scope="module")
def artifact(
    traced_once: None, hugging_face: HuggingFace, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("gptq") / "out"
    recipe = load_recipe("w4a4kv4-gptq")
    export(hugging_face("llama"), out, recipe, calibration=CALIBRATION, resume=True, certify=False)
    assert not out.with_name("out.calibration").exists()
    return out


def test_the_manifest_says_what_was_looked_at_and_what_it_cost(artifact: Path) -> None:
    found = load_manifest(artifact)["calibration"]
    assert found["source"] == "random tokens"
    assert found["sha256"] == CALIBRATION.sha256
    assert (found["windows"], found["window_length"]) == TOKENS.shape
    assert found["seconds"] > 0
    assert found["peak_memory_bytes"] > 1e7


def test_what_calibration_has_seen_cannot_be_evaluated(artifact: Path) -> None:
    """Tokens of another text pass; the calibration's, in windows cut elsewhere, do not."""
    kept = Calibration.load(artifact)
    assert kept is not None
    np.testing.assert_array_equal(kept.tokens, TOKENS)
    long = Calibration.of(np.random.default_rng(1).integers(0, 128, (4, 64)), "a text")
    long.save(artifact)
    other = np.random.default_rng(2).integers(0, 128, (4, 64))
    require_unseen(artifact, other, "other.txt")
    seen = np.concatenate(
        [
            other,
            long.tokens[:1, 3:],
        ],
        axis=None,
    )[None]
    with pytest.raises(UsageError) as caught:
        require_unseen(artifact, seen, "same.txt")
    assert str(caught.value).startswith("--text same.txt: ")
    assert "of it was seen when" in str(caught.value)
    (artifact / "calibration.npy").write_bytes(b"nonsense")
    with pytest.raises(InputError, match=r"calibration\.npy: is damaged"):
        require_unseen(artifact, other, "other.txt")


def test_the_embedded_texts_share_nothing() -> None:
    assert texts.read("embedded", "calibration") != texts.read("embedded", "evaluation")


def test_a_calibrated_recipe_needs_a_text(traced_once: None, hugging_face: HuggingFace) -> None:
    with pytest.raises(UsageError) as caught:
        rewrite(Checkpoint(hugging_face("llama")), load_recipe("w4a4kv4-gptq"), "float32")
    assert str(caught.value) == (
        "recipe w4a4kv4-gptq: has a method that looks at text; give one with --calibration"
    )
