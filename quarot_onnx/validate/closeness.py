# SPDX-License-Identifier: Apache-2.0
"""How far two arrays are apart, by numbers that see what cosine similarity does not: scale."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quarot_onnx.evaluate import log_probabilities
from quarot_onnx.runtime import Logits


def relative_error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Norm of the difference over the norm of `expected`, which is 1 here where it is 0."""
    norm = float(np.linalg.norm(expected))
    difference = float(np.linalg.norm(found - expected))
    return difference / norm if norm else difference


@dataclass(frozen=True)
class Closeness:
    """How far logits are from a judge's; every number but `top1` and `kl` sees their scale.

    Attributes:
        max_ratio: max|difference| / max|judge|.
        relative_l2: norm of the difference over the judge's norm.
        norm_ratio: norm over the judge's norm.
        kl: mean KL(judge || found) of the next token, in nats.
        top1: fraction of tokens with the same most likely next token.
    """

    max_ratio: float
    relative_l2: float
    norm_ratio: float
    kl: float
    top1: float

    @classmethod
    def of(cls, found: Logits, judge: Logits) -> "Closeness":
        """Of logits [..., V]; NaN wherever one of them is not finite."""
        difference = found.astype(np.float64) - judge
        norm = float(np.linalg.norm(judge))
        p, q = log_probabilities(judge), log_probabilities(found)
        return cls(
            max_ratio=float(np.abs(difference).max() / np.abs(judge).max()),
            relative_l2=float(np.linalg.norm(difference)) / norm,
            norm_ratio=float(np.linalg.norm(found)) / norm,
            kl=float((np.exp(p) * (p - q)).sum(axis=-1).mean()),
            top1=float((found.argmax(axis=-1) == judge.argmax(axis=-1)).mean()),
        )

    def __str__(self) -> str:
        return (
            f"max {self.max_ratio:.2g}, L2 {self.relative_l2:.2g}, norm x{self.norm_ratio:.4f}, "
            f"KL {self.kl:.2g}, top-1 {self.top1:.1%}"
        )
