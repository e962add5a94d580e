# SPDX-License-Identifier: Apache-2.0
"""The tokens that a calibrated method may look at."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quarot_onnx.errors import InputError
from quarot_onnx.runtime import Ids


@dataclass(frozen=True)
class Calibration:
    """What a method may look at; never evaluation text.

    Attributes:
        tokens: [windows, length] int64; each window is a text of its own behind an empty cache.
        source: what the user gave; goes to the manifest.
        sha256: of the tokens, as little-endian int64.
    """

    tokens: Ids
    source: str
    sha256: str

    @classmethod
    def of(cls, tokens: Ids, source: str) -> "Calibration":
        """The calibration on `tokens` [windows, length].

        Raises:
            InputError: there is no token.
        """
        if tokens.ndim != 2 or not tokens.size:
            raise InputError(
                f"{source}: tokens of shape {list(tokens.shape)}; give at least one window of one "
                "token, [windows, length]"
            )
        digest = hashlib.sha256(tokens.astype("<i8").tobytes()).hexdigest()
        return cls(np.ascontiguousarray(tokens, dtype=np.int64), source, digest)

    @classmethod
    def from_ids(cls, ids: Sequence[int], source: str, *, count: int, length: int) -> "Calibration":
        """At most `count` evenly spaced windows of `length` of the text `ids`, without overlap.

        A text shorter than one window gives one window of all of it.

        Raises:
            InputError: the text has no token.
        """
        length = min(length, len(ids))
        count = min(count, len(ids) // length) if length else 0
        stride = len(ids) // count if count else 0
        cut = [ids[i * stride : i * stride + length] for i in range(count)]
        return cls.of(np.array(cut, np.int64).reshape(count, length), source)

    def part(self, count: int) -> "Calibration":
        """At most `count` evenly spaced windows of this."""
        total = len(self.tokens)
        kept = np.arange(min(count, total)) * total // min(count, total)
        return Calibration.of(self.tokens[kept], self.source)
