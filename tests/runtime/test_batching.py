# SPDX-License-Identifier: Apache-2.0
"""Texts that share a batch are continued as if each were alone."""

import numpy as np
import pytest

from quarot_onnx.runtime import Cache, Ids, Logits, OnnxModel
from quarot_onnx.runtime.batching import LANES, SeparateBatch, SharedBatch, batch_of
from tests.conftest import Exported

RECIPES = [("w4a4kv4", ()), ("w4a4kv4", ("kv_cache.io=float",)), ("rotate-only", ())]


def _model(exported: Exported, recipe: str, overrides: tuple[str, ...] = ()) -> OnnxModel:
    return OnnxModel(exported("llama", recipe, overrides), threads=1)


class Recorder:
    """A model that keeps the inputs of its steps."""

    def __init__(self, model: OnnxModel) -> None:
        self._model = model
        self.vocabulary_size = model.vocabulary_size
        self.masks: list[Ids] = []

    def new_cache(self, batch: int) -> Cache:
        return self._model.new_cache(batch)

    def step(
        self, input_ids: Ids, cache: Cache, attention_mask: Ids | None = None
    ) -> tuple[Logits, Cache]:
        if attention_mask is not None:
            self.masks.append(attention_mask)
        return self._model.step(input_ids, cache, attention_mask)


def _alone(model: OnnxModel, prompt: list[int], tokens: list[int]) -> list[Logits]:
    """The logits after the prompt and after each token, without a batch."""
    logits, cache = model.step(np.array([prompt]), model.new_cache(1))
    found = [logits[0, -1]]
    for token in tokens:
        logits, cache = model.step(np.array([[token]]), cache)
        found.append(logits[0, -1])
    return found


@pytest.mark.parametrize(("recipe", "overrides"), RECIPES)
def test_rows_that_join_and_leave_do_not_change_the_others(
    exported: Exported, recipe: str, overrides: tuple[str, ...]
) -> None:
    model = _model(exported, recipe, overrides)
    random = np.random.default_rng(0)
    texts = [random.integers(0, 128, length).tolist() for length in (5, 30, 200, 7, 66)]
    tokens = random.integers(0, 128, (5, 80)).tolist()
    alone = []
    for text, continuation in zip(texts, tokens, strict=True):
        batch = SharedBatch(model)
        found = [batch.join(text)]
        alone.append([*found, *(batch.step([token])[0] for token in continuation)])

    batch, rows = SharedBatch(model), []
    joins, leaves = {0: 0, 1: 1, 10: 2, 40: 3, 60: 4}, {30: 0, 55: 2, 90: 3}
    done = dict.fromkeys(range(5), 0)
    for step in range(100):
        if step in joins:
            np.testing.assert_array_equal(batch.join(texts[joins[step]]), alone[joins[step]][0])
            rows.append(joins[step])
        if step in leaves and leaves[step] in rows:
            batch.leave(rows.index(leaves[step]))
            rows.remove(leaves[step])
        for text in [text for text in rows if done[text] == 80]:
            batch.leave(rows.index(text))
            rows.remove(text)
        assert batch.rows == len(rows)
        logits = batch.step([tokens[text][done[text]] for text in rows])
        for row, text in enumerate(rows):
            done[text] += 1
            np.testing.assert_array_equal(logits[row], alone[text][done[text]])
    assert min(done.values()) >= 30


def test_a_row_of_a_float_model_has_the_logits_of_plain_decoding(exported: Exported) -> None:
    model = _model(exported, "rotate-only")
    random = np.random.default_rng(1)
    texts = [random.integers(0, 128, length).tolist() for length in (3, 90)]
    tokens = random.integers(0, 128, (2, 40)).tolist()
    expected = [_alone(model, *pair) for pair in zip(texts, tokens, strict=True)]
    for batch in (SharedBatch(model), SeparateBatch(model)):
        found = [[batch.join(text)] for text in texts]
        for step in range(40):
            for row, logits in enumerate(batch.step([tokens[0][step], tokens[1][step]])):
                found[row].append(logits)
        for ours, plain in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-4 * np.abs(plain).max())


def test_a_cache_is_as_long_as_its_longest_row_needs(exported: Exported) -> None:
    model = Recorder(_model(exported, "w4a4kv4"))
    batch = SharedBatch(model)
    batch.join([1] * 10)
    batch.step([1])
    batch.join([1] * 150)
    batch.step([1, 1])
    batch.leave(1)
    batch.step([1])
    assert [mask.shape for mask in model.masks] == [(1, LANES), (2, 3 * LANES), (1, LANES)]
    assert [mask.sum(axis=1).tolist() for mask in model.masks] == [[11], [12, 151], [13]]


def test_a_batch_is_empty_again_when_the_last_row_left(exported: Exported) -> None:
    batch = SharedBatch(_model(exported, "w4a4kv4"))
    first = batch.join([3, 1, 4])
    batch.leave(0)
    assert batch.rows == 0
    np.testing.assert_array_equal(batch.join([3, 1, 4]), first)


def test_a_cache_that_is_not_in_numpy_is_kept_row_by_row(exported: Exported) -> None:
    class Opaque(Recorder):
        def new_cache(self, batch: int) -> Cache:
            return {"handle": (super().new_cache(batch),)}

        def step(
            self, input_ids: Ids, cache: Cache, attention_mask: Ids | None = None
        ) -> tuple[Logits, Cache]:
            logits, after = super().step(input_ids, cache["handle"][0], attention_mask)
            return logits, {"handle": (after,)}

    model = _model(exported, "w4a4kv4")
    assert isinstance(batch_of(model), SharedBatch)
    batch = batch_of(Opaque(model))
    assert isinstance(batch, SeparateBatch)
    expected = [_alone(model, prompt, [9, 8]) for prompt in ([1, 2, 3], [4, 5])]
    found = [batch.join([1, 2, 3]), batch.join([4, 5])]
    np.testing.assert_array_equal(found, [expected[0][0], expected[1][0]])
    np.testing.assert_array_equal(batch.step([9, 9])[0], expected[0][1])
    batch.leave(1)
    np.testing.assert_array_equal(batch.step([8])[0], expected[0][2])
    assert batch.rows == 1
