# SPDX-License-Identifier: Apache-2.0
"""The tokens that a calibrated method may look at."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quarot_onnx import texts
from quarot_onnx.errors import InputError, UsageError
from quarot_onnx.texts import Ids

TOKENS = "calibration.npy"
"""The file of an artifact that holds its calibration tokens, [windows, length] int64."""

_SHARED = 0.05  # of its runs of 32 tokens: licence headers and the like are in many texts


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

    def part(self, count: int) -> "Calibration":
        """At most `count` evenly spaced windows of this."""
        total = len(self.tokens)
        kept = np.arange(min(count, total)) * total // min(count, total)
        return Calibration.of(self.tokens[kept], self.source)

    def save(self, directory: Path) -> None:
        """Keep the tokens with an artifact, so that an evaluation can refuse them."""
        np.save(directory / TOKENS, self.tokens.astype("<i8"))

    @classmethod
    def load(cls, artifact: Path) -> "Calibration | None":
        """What `artifact` was calibrated on; None where its recipe does not look at text.

        Raises:
            InputError: the file is damaged.
        """
        path = artifact / TOKENS
        if not path.is_file():
            return None
        try:
            tokens = np.asarray(np.load(path), np.int64)
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{path}: is damaged ({error}); export again") from error
        return cls.of(tokens, str(path))


def require_unseen(artifact: Path, evaluation: Ids, source: str) -> None:
    """Refuse to evaluate `artifact` on what its calibration has seen.

    Args:
        artifact: a directory that ``quarot-onnx export`` wrote.
        evaluation: tokens [windows, length].
        source: where they come from.

    Raises:
        UsageError: more than 5 % of the runs of 32 tokens were in the calibration text.
        InputError: the artifact's calibration tokens are damaged.
    """
    seen = Calibration.load(artifact)
    share = 0.0 if seen is None else texts.shared_share(seen.tokens, evaluation)
    if share > _SHARED:
        raise UsageError(
            f"--text {source}: {share:.0%} of it was seen when {artifact} was calibrated; evaluate "
            "on another text, or calibrate on another one"
        )
