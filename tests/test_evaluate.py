# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quarot_onnx import evaluate as module
from quarot_onnx.artifacts import load_manifest
from quarot_onnx.errors import GateError, InputError
from quarot_onnx.evaluate import (
    agreement,
    baselines,
    decode_perplexity,
    evaluate,
    log_probabilities,
    perplexity,
)
from quarot_onnx.pipeline import export
from quarot_onnx.recipe import load_recipe
from quarot_onnx.reference import HuggingFaceModel
from quarot_onnx.runtime import Cache, Ids, Logits, OnnxModel
from tests.conftest import Exported, HuggingFace

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny_llama"


class Table:
    """A model whose next token depends on the last one only: log p = log_softmax(table[token])."""

    def __init__(self, table: Logits, *, decode_shift: float = 0.0) -> None:
        self.table = table
        self.decode_shift = decode_shift
        self.largest_batch = 0

    @property
    def vocabulary_size(self) -> int:
        return len(self.table)

    def new_cache(self, batch: int) -> Cache:
        return {"length": 0}

    def step(
        self, input_ids: Ids, cache: Cache, attention_mask: Ids | None = None
    ) -> tuple[Logits, Cache]:
        self.largest_batch = max(self.largest_batch, len(input_ids))
        logits = self.table[input_ids]
        if input_ids.shape[1] == 1:
            logits = logits + self.decode_shift * np.arange(len(self.table), dtype=np.float32)
        return logits, {"length": cache["length"] + input_ids.shape[1]}


def random_table(seed: int = 0) -> Logits:
    return np.random.default_rng(seed).normal(size=(7, 7)).astype(np.float32) * 3


def test_log_probabilities_survive_large_logits() -> None:
    found = log_probabilities(np.array([[1e4, 0.0, 1e4]], np.float32))
    np.testing.assert_allclose(found[0, [0, 2]], -np.log(2))


def test_perplexity_of_a_uniform_model_is_its_vocabulary() -> None:
    ids = np.random.default_rng(0).integers(0, 7, (3, 5))
    assert perplexity(Table(np.zeros((7, 7), np.float32)), ids) == pytest.approx(7, rel=1e-12)


def test_perplexity_counts_every_token_of_a_window_but_the_first() -> None:
    table, ids = random_table(), np.array([[0, 1, 2, 3], [6, 5, 4, 3]])
    expected = -np.mean([log_probabilities(table[r[:-1]])[range(3), r[1:]] for r in ids])
    assert perplexity(Table(table), ids) == pytest.approx(np.exp(expected), rel=1e-12)


def test_windows_are_batched_within_the_memory_for_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.random.default_rng(0).integers(0, 7, (9, 5))
    whole = perplexity(Table(random_table()), ids)
    monkeypatch.setattr(module, "_LOGITS_AT_ONCE", 2 * 5 * 7)
    model, seen = Table(random_table()), []
    assert perplexity(model, ids, progress=lambda *call: seen.append(call)) == pytest.approx(whole)
    assert model.largest_batch == 2
    assert seen == [(2, 9), (4, 9), (6, 9), (8, 9), (9, 9)]


def test_a_logit_that_is_not_finite_is_named() -> None:
    table = random_table()
    table[3] = np.nan
    with pytest.raises(GateError, match=r"logits: not finite at token 1 of window 2;"):
        perplexity(Table(table), np.array([[0, 1, 2], [2, 2, 2], [0, 3, 1]]))


def test_decoding_a_model_without_state_equals_prefill() -> None:
    ids = np.random.default_rng(0).integers(0, 7, (3, 6))
    found = decode_perplexity(Table(random_table()), ids)
    assert found.perplexity == pytest.approx(found.prefill_perplexity, rel=1e-12)
    assert found.prefill_perplexity == pytest.approx(perplexity(Table(random_table()), ids))
    assert (found.top1_agreement, found.mean_difference) == (1.0, 0.0)


def test_decoding_that_differs_is_seen() -> None:
    ids = np.random.default_rng(0).integers(0, 7, (3, 6))
    found = decode_perplexity(Table(random_table(), decode_shift=5.0), ids)
    assert found.top1_agreement < 0.6
    assert found.mean_difference > 1
    assert found.perplexity != pytest.approx(found.prefill_perplexity, rel=0.1)


def test_a_model_agrees_with_itself() -> None:
    ids = np.random.default_rng(0).integers(0, 7, (3, 6))
    found = agreement(Table(random_table()), Table(random_table() + 2), ids)  # a shift of logits
    assert found.kl_divergence == pytest.approx(0, abs=1e-6)
    assert found.top1_agreement == 1
    assert found.perplexity == pytest.approx(found.reference_perplexity, rel=1e-6)


def test_kl_divergence_is_from_the_reference_over_every_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_LOGITS_AT_ONCE", 6 * 7)  # a batch of one window
    ids = np.random.default_rng(0).integers(0, 7, (3, 6))
    ours, theirs = random_table(1), random_table(2)
    found = agreement(Table(ours), Table(theirs), ids)
    p, q = (np.exp(log_probabilities(table[ids])) for table in (theirs, ours))
    assert found.kl_divergence == pytest.approx((p * np.log(p / q)).sum(-1).mean(), rel=1e-9)
    same = (ours.argmax(-1) == theirs.argmax(-1))[ids]
    assert found.top1_agreement == pytest.approx(same.mean())
    assert found.perplexity == pytest.approx(perplexity(Table(ours), ids))
    assert found.reference_perplexity == pytest.approx(perplexity(Table(theirs), ids))


def test_agreement_names_a_logit_that_is_not_finite() -> None:
    table = random_table()
    table[3] = np.nan
    with pytest.raises(GateError, match=r"logits: not finite at token 1 of window 0;"):
        agreement(Table(table), Table(random_table()), np.array([[0, 3, 1]]))


def test_decoding_through_the_packed_cache_agrees_with_prefill(exported: Exported) -> None:
    model = OnnxModel(exported("qwen2-biases", "w4a4kv4"), threads=1)
    found = decode_perplexity(model, np.random.default_rng(0).integers(0, 128, (4, 24)))
    assert found.top1_agreement > 0.96
    assert found.perplexity == pytest.approx(found.prefill_perplexity, rel=0.01)


def test_baselines_stand_on_the_same_windows(exported: Exported, hugging_face: HuggingFace) -> None:
    manifest = load_manifest(exported("llama", "rotate-only"))
    ids = np.random.default_rng(0).integers(0, 128, (2, 16))
    found = baselines(hugging_face("llama"), manifest, ids, threads=1)
    assert set(found) == {"folded", "unrotated"}
    # Nothing is quantized by this recipe, so all of them are the same function.
    fp32 = perplexity(HuggingFaceModel(hugging_face("llama"), threads=1), ids)
    assert found["folded"] == pytest.approx(fp32, rel=1e-5)
    assert found["unrotated"] == pytest.approx(fp32, rel=1e-5)


def test_baselines_keep_the_bits_of_the_recipe(
    exported: Exported, hugging_face: HuggingFace
) -> None:
    manifest = load_manifest(exported("llama", "w4a4kv4"))
    ids = np.random.default_rng(0).integers(0, 128, (2, 16))
    found = baselines(hugging_face("llama"), manifest, ids, threads=1)
    model = OnnxModel(exported("llama", "w4a4kv4-unrotated"), threads=1)
    assert found["unrotated"] == pytest.approx(perplexity(model, ids), rel=1e-9)
    assert found["unrotated"] != pytest.approx(found["folded"], rel=1e-3)


@pytest.fixture(scope="module")
def example(traced_once: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (EXAMPLE / "model").is_dir():
        pytest.skip("examples/tiny_llama/model is not there")
    target = tmp_path_factory.mktemp("example") / "w4a4kv4"
    export(EXAMPLE / "model", target, load_recipe("w4a4kv4"))
    return target


def test_evaluates_text_and_reports_in_json(example: Path) -> None:
    seen: list[tuple[int, int]] = []
    found: dict[str, Any] = evaluate(
        example,
        EXAMPLE / "heldout.txt",
        count=4,
        length=96,
        decode=True,
        threads=1,
        progress=lambda *call: seen.append(call),
    )
    assert json.loads(json.dumps(found)) == found
    assert 10 < found["perplexity"] < 40
    assert found["decode"]["perplexity"] == pytest.approx(found["perplexity"], rel=0.01)
    assert found["decode"]["top1_agreement"] > 0.96
    assert (found["windows"], found["window_length"]) == (4, 96)
    assert (found["recipe"], found["runtime"]) == ("w4a4kv4", "ort-cpu")
    assert seen == [(4, 8), (8, 8)]
    assert "baselines" not in found


def test_a_text_that_is_too_short_is_refused_before_the_model_is_loaded(
    example: Path, tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("Once upon a time.", encoding="utf-8")
    with pytest.raises(InputError, match=r"short\.txt: has \d+ tokens, needs 8192 for 32 windows"):
        evaluate(example, tmp_path / "short.txt")


def test_an_artifact_without_a_tokenizer_is_refused(exported: Exported, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text", encoding="utf-8")
    with pytest.raises(InputError, match=r"tokenizer\.json: no such file; put the model's"):
        evaluate(exported("llama", "w4a4kv4"), tmp_path / "a.txt")
