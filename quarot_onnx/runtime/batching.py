# SPDX-License-Identifier: Apache-2.0
"""Texts that are continued together: they join and leave a batch at any step.

Each text is a row. Rows of one cache are right-aligned: a row of L tokens in a cache of T slots has
T - L masked slots on its left. When a step computes, T is a multiple of `LANES`, and beyond a block
of the runtime's matrix product a multiple of that block, so that a row moves by whole lanes and
blocks as its neighbours come and go, and the sums over its slots keep their parts and their order.
Where the runtime treats the rows of a matrix product alike, as ONNX Runtime's CPU kernels were seen
to, a text has the same logits, bit for bit, whoever its neighbours are. With unaligned rows one
token in 500 of the embedded model was another one: 4-bit codes turn a last bit into a step.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from quarot_onnx.runtime import Cache, CausalModel, Logits

LANES = 64
"""Slots; what an unrolled vector loop of ONNX Runtime's CPU kernels sums in one turn, or more."""
_PANEL = 128
_NARROWEST = 16


class Batch(Protocol):
    """Rows of texts on one model; row numbers are those of `step`'s tokens."""

    @property
    def rows(self) -> int:
        """How many texts there are."""
        ...

    def join(self, prompt_ids: Sequence[int]) -> Logits:
        """Add a text of one token or more as the last row; the logits [vocabulary] after it."""
        ...

    def step(self, tokens: Sequence[int]) -> Logits:
        """Append one token to each row; the logits [rows, vocabulary] that follow."""
        ...

    def leave(self, row: int) -> None:
        """Remove a row; those after it move up."""
        ...


def batch_of(model: CausalModel) -> Batch:
    """An empty batch: one step for all rows where the cache is in NumPy arrays, else one each."""
    cache = model.new_cache(1)
    if cache and all(isinstance(array, np.ndarray) for array in cache.values()):
        return SharedBatch(model)
    return SeparateBatch(model)


class SharedBatch:
    """One cache and one step for all rows.

    The model's cache is NumPy arrays [rows, heads, slots, ...].
    """

    def __init__(self, model: CausalModel) -> None:
        self._model = model
        self._cache: Cache = {}
        self._lengths: list[int] = []
        widths = [array.shape[3] for array in model.new_cache(1).values() if array.shape[3] > 1]
        self._block = _block(min(widths, default=1))

    @property
    def rows(self) -> int:
        """How many texts there are."""
        return len(self._lengths)

    def _past_slots(self, longest: int) -> int:
        """Slots of a past of up to `longest` tokens; with the next token they are aligned."""
        alignment = LANES if longest < self._block else self._block
        return longest + -(longest + 1) % alignment

    def join(self, prompt_ids: Sequence[int]) -> Logits:
        """Add a text of one token or more as the last row; the logits [vocabulary] after it.

        Raises:
            InputError: the prompt has ids outside the vocabulary.
            ResourceError: not enough memory.
        """
        ids = np.array([prompt_ids], np.int64)
        logits, joining = self._model.step(ids, self._model.new_cache(1))
        length = len(prompt_ids)
        if self.rows:
            slots = self._past_slots(max(length, *self._lengths))
            here, there = _resized(self._cache, slots), _resized(joining, slots)
            joining = {name: np.concatenate([here[name], there[name]]) for name in here}
        self._cache = joining
        self._lengths.append(length)
        last: Logits = logits[0, -1]
        return last

    def step(self, tokens: Sequence[int]) -> Logits:
        """Append one token to each row; the logits [rows, vocabulary] that follow.

        Raises:
            ResourceError: not enough memory.
        """
        slots = self._past_slots(max(self._lengths))
        filled = np.array(self._lengths)[:, None]
        mask = (np.arange(slots + 1) >= slots - filled).astype(np.int64)
        logits, self._cache = self._model.step(
            np.array(tokens, np.int64)[:, None], _resized(self._cache, slots), mask
        )
        self._lengths = [length + 1 for length in self._lengths]
        last: Logits = logits[:, -1]
        return last

    def leave(self, row: int) -> None:
        """Remove a row; those after it move up."""
        del self._lengths[row]
        kept = np.arange(self.rows + 1) != row
        slots = self._past_slots(max(self._lengths, default=0))
        self._cache = {
            name: array[kept] for name, array in _resized(self._cache, slots).items() if self.rows
        }


class SeparateBatch:
    """A cache and a step for each row: for models whose cache is not in NumPy arrays."""

    def __init__(self, model: CausalModel) -> None:
        self._model = model
        self._caches: list[Cache] = []

    @property
    def rows(self) -> int:
        """How many texts there are."""
        return len(self._caches)

    def join(self, prompt_ids: Sequence[int]) -> Logits:
        """Add a text of one token or more as the last row; the logits [vocabulary] after it.

        Raises:
            InputError: the prompt has ids outside the vocabulary.
        """
        ids = np.array([prompt_ids], np.int64)
        logits, cache = self._model.step(ids, self._model.new_cache(1))
        self._caches.append(cache)
        last: Logits = logits[0, -1]
        return last

    def step(self, tokens: Sequence[int]) -> Logits:
        """Append one token to each row; the logits [rows, vocabulary] that follow."""
        found = []
        for row, token in enumerate(tokens):
            logits, self._caches[row] = self._model.step(
                np.array([[token]], np.int64), self._caches[row]
            )
            found.append(logits[0, -1])
        return np.stack(found)

    def leave(self, row: int) -> None:
        """Remove a row; those after it move up."""
        del self._caches[row]


def _block(width: int) -> int:
    """Slots that one block of the product of probabilities and values [slots, width] sums.

    MLAS (onnxruntime/core/mlas/lib/sgemm.cpp) works on panels of 128 by 128, and for a product
    narrower than that halves the panel's width and doubles its length, down to a width of 16.
    """
    panel = _PANEL
    while panel > _NARROWEST and panel // 2 >= width:
        panel //= 2
    return _PANEL * _PANEL // panel


def _resized(cache: Cache, slots: int) -> Cache:
    """`cache` with `slots` slots: masked ones are added or dropped on the left."""
    resized: Cache = {}
    for name, array in cache.items():
        missing = slots - array.shape[2]
        if missing > 0:
            padding = [(0, 0)] * array.ndim
            padding[2] = (missing, 0)
            resized[name] = np.pad(array, padding)
        else:
            resized[name] = array[:, :, -missing:]
    return resized
