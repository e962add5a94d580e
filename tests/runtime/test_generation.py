# SPDX-License-Identifier: Apache-2.0
from typing import Any

import numpy as np
import pytest

from quarot_onnx.errors import InputError, UsageError
from quarot_onnx.runtime import Cache, Ids, Logits, OnnxModel
from quarot_onnx.runtime.generation import Sampler, Sampling, generate
from tests.conftest import Exported


@pytest.fixture
def model(exported: Exported) -> OnnxModel:
    return OnnxModel(exported("llama", "w4a4kv4"), threads=1)


def test_greedy_generation_is_the_argmax_of_each_prefix(model: OnnxModel) -> None:
    prompt = [3, 1, 4, 1, 5]
    found = list(generate(model, prompt, max_new_tokens=6))
    for index, token in enumerate(found):
        logits, _ = model.step(np.array([prompt + found[:index]]), model.new_cache(1))
        assert token == logits[0, -1].argmax()
    assert len(found) == 6


class Counter:
    """The token after t is t + 1, with probability 3/4 at temperature 1, or else t + 2."""

    vocabulary_size = 10

    def __init__(self) -> None:
        self.steps = 0

    def new_cache(self, batch: int) -> Cache:
        return {}

    def step(
        self, input_ids: Ids, cache: Cache, attention_mask: Ids | None = None
    ) -> tuple[Logits, Cache]:
        self.steps += 1
        logits = np.full((*input_ids.shape, 10), -1e9, np.float32)
        for offset, share in ((1, 0.75), (2, 0.25)):
            np.put_along_axis(logits, (input_ids[..., None] + offset) % 10, np.log(share), axis=-1)
        return logits, cache


def test_generation_stops_before_the_token_that_ends_a_text() -> None:
    assert list(generate(Counter(), [0, 1], max_new_tokens=50, eos_token_ids=[5, 7])) == [2, 3, 4]


def test_generation_takes_no_step_that_it_does_not_need() -> None:
    model = Counter()
    assert list(generate(model, [0], max_new_tokens=3)) == [1, 2, 3]
    assert model.steps == 3


def test_generation_streams() -> None:
    model = Counter()
    stream = generate(model, [0], max_new_tokens=100)
    assert next(stream) == 1
    assert model.steps == 1


def test_sampling_follows_the_probabilities_and_the_seed() -> None:
    first = list(generate(Counter(), [0], max_new_tokens=2000, temperature=1.0, seed=1))
    again = list(generate(Counter(), [0], max_new_tokens=2000, temperature=1.0, seed=1))
    other = list(generate(Counter(), [0], max_new_tokens=2000, temperature=1.0, seed=2))
    assert first == again != other
    steps = np.diff([0, *first]) % 10
    assert set(steps) == {1, 2}
    assert np.mean(steps == 1) == pytest.approx(0.75, abs=0.04)


def test_a_low_temperature_and_a_small_top_p_take_the_likeliest() -> None:
    greedy = list(generate(Counter(), [0], max_new_tokens=40))
    assert list(generate(Counter(), [0], max_new_tokens=40, temperature=0.02)) == greedy
    assert list(generate(Counter(), [0], max_new_tokens=40, temperature=1.0, top_p=0.7)) == greedy


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: is 0; give 1 or more"),
        ({"temperature": -0.5}, "temperature: is -0.5; give 0 or more"),
        ({"temperature": float("nan")}, "temperature: is nan; give 0 or more"),
        ({"top_p": 0.0}, "top_p: is 0; give more than 0 and at most 1"),
        ({"top_p": 1.5}, "top_p: is 1.5; give more than 0 and at most 1"),
    ],
)
def test_refuses_sampling_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        generate(Counter(), [0], **{"max_new_tokens": 1, **options})
    assert str(error.value) == message


def test_refuses_an_empty_prompt() -> None:
    with pytest.raises(InputError, match="prompt: has no tokens; give some text"):
        generate(Counter(), [], max_new_tokens=1)


def _chosen(logits: Logits, count: int, **penalties: float) -> list[int]:
    sampler = Sampler(Sampling(**penalties))
    return [sampler.choose(logits) for _ in range(count)]


def test_penalties_lower_what_was_generated() -> None:
    logits = np.array([3.0, 2.5, 1.2, -9.0], np.float32)
    assert _chosen(logits, 4) == [0, 0, 0, 0]
    assert _chosen(logits, 4, presence_penalty=0.6) == [0, 1, 0, 0]
    assert _chosen(logits, 4, frequency_penalty=0.6) == [0, 1, 0, 1]
    assert _chosen(logits, 4, presence_penalty=2.0) == [0, 1, 2, 0]
    assert _chosen(logits, 3, presence_penalty=-2.0) == [0, 0, 0]
    assert logits.tolist() == pytest.approx([3.0, 2.5, 1.2, -9.0])


@pytest.mark.parametrize("name", ["frequency_penalty", "presence_penalty"])
def test_refuses_a_penalty_out_of_range(name: str) -> None:
    for value in (-2.5, 2.5, float("nan")):
        with pytest.raises(UsageError) as error:
            Sampling(**{name: value})
        assert str(error.value) == f"{name}: is {value:g}; give -2 to 2"


def test_sampling_without_a_seed_differs_each_time() -> None:
    logits = np.zeros(1000, np.float32)
    first, second = (_chosen(logits, 8, temperature=1.0, seed=None) for _ in range(2))
    assert first != second
