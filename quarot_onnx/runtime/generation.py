# SPDX-License-Identifier: Apache-2.0
"""Continue a prompt: which token comes next, and the loop around it."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from quarot_onnx.errors import InputError, UsageError
from quarot_onnx.runtime import CausalModel, Logits
from quarot_onnx.runtime.batching import batch_of


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    Attributes:
        temperature: 0 takes the most likely token.
        top_p: sample among the fewest tokens whose probabilities sum to this.
        seed: of the sampling; a new one each time where None.
        frequency_penalty: taken from a token's logit for each time that it was generated.
        presence_penalty: taken from a token's logit once it was generated.

    Raises:
        UsageError: a value is out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = 0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < np.inf:
            raise UsageError(f"temperature: is {self.temperature:g}; give 0 or more")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p: is {self.top_p:g}; give more than 0 and at most 1")
        for name in ("frequency_penalty", "presence_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise UsageError(f"{name}: is {getattr(self, name):g}; give -2 to 2")


class Sampler:
    """Chooses the tokens of one text."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._generator = np.random.default_rng(sampling.seed)
        self._chosen: Counter[int] = Counter()

    def choose(self, logits: Logits) -> int:
        """The next token, by its logits [vocabulary]."""
        token = self._draw(self._penalized(logits))
        self._chosen[token] += 1
        return token

    def _penalized(self, logits: Logits) -> Logits:
        frequency = self._sampling.frequency_penalty
        presence = self._sampling.presence_penalty
        if not (frequency or presence) or not self._chosen:
            return logits
        penalized = logits.copy()
        for token, count in self._chosen.items():
            penalized[token] -= frequency * count + presence
        return penalized

    def _draw(self, logits: Logits) -> int:
        if self._sampling.temperature == 0:
            return int(logits.argmax())
        scaled = logits.astype(np.float64)
        scaled = (scaled - scaled.max()) / self._sampling.temperature
        probabilities = np.exp(scaled)
        probabilities /= probabilities.sum()
        order = np.argsort(-probabilities, kind="stable")
        before = np.cumsum(probabilities[order]) - probabilities[order]
        kept = order[before < self._sampling.top_p]
        weights = probabilities[kept] / probabilities[kept].sum()
        return int(self._generator.choice(kept, p=weights))


def generate(
    model: CausalModel,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    eos_token_ids: Iterable[int] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[int]:
    """The ids that follow `prompt_ids`, one by one, without the one that ends the text.

    Args:
        model: any runtime.
        prompt_ids: at least one.
        max_new_tokens: upper bound.
        eos_token_ids: the ids that end the text.
        temperature: 0 takes the most likely token.
        top_p: sample among the fewest tokens whose probabilities sum to this.
        seed: of the sampling.

    Raises:
        UsageError: temperature, top_p or max_new_tokens is out of range.
        InputError: the prompt is empty or has ids outside the vocabulary.
    """
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens: is {max_new_tokens}; give 1 or more")
    if not len(prompt_ids):
        raise InputError("prompt: has no tokens; give some text")
    sampler = Sampler(Sampling(temperature, top_p, seed))
    return _generate(model, prompt_ids, max_new_tokens, frozenset(eos_token_ids), sampler)


def _generate(
    model: CausalModel,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    ends: frozenset[int],
    sampler: Sampler,
) -> Iterator[int]:
    batch = batch_of(model)
    logits = batch.join(prompt_ids)
    for index in range(max_new_tokens):
        token = sampler.choose(logits)
        if token in ends:
            return
        yield token
        if index + 1 < max_new_tokens:
            logits = batch.step([token])[0]
