# SPDX-License-Identifier: Apache-2.0
"""Gradual binary search finds the least loss of a valley and keeps what nothing beats."""

import numpy as np
import pytest

from quarot_onnx.calibration import Calibration
from quarot_onnx.calibration.clip_search import HIGH, LOW, _negative_log_likelihood, minimum


@pytest.mark.parametrize("best", [0.26, 0.4, 0.55, 0.71, 0.9, 1.0])
def test_halving_finds_the_minimum_of_a_valley(best) -> None:
    tried = []

    def loss(clip: float) -> float:
        tried.append(clip)
        return abs(clip - best)

    found, least = minimum(loss, 0.9)
    assert abs(found - best) <= (HIGH - LOW) / 2**5
    assert least == min(abs(clip - best) for clip in tried)
    assert len(tried) == 9
    assert all(LOW < clip < HIGH for clip in tried)


def test_a_clip_that_nothing_beats_is_kept() -> None:
    assert minimum(lambda clip: float(clip != 0.9), 0.9) == (0.9, 0.0)


def test_windows_are_evenly_spaced() -> None:
    calibration = Calibration.of(np.arange(10)[:, None].repeat(3, 1), "numbers")
    assert calibration.part(3).tokens[:, 0].tolist() == [0, 3, 6]
    assert calibration.part(99).tokens[:, 0].tolist() == list(range(10))
    assert calibration.part(3).sha256 != calibration.sha256


def test_the_loss_is_that_of_the_next_tokens() -> None:
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(2, 3, 7)) * 30).astype(np.float32)
    targets = rng.integers(0, 7, (2, 3))
    wanted = 0.0
    for row, target in zip(logits.reshape(6, 7).astype(np.float64), targets.ravel(), strict=True):
        wanted -= row[target] - np.log(np.exp(row).sum())
    assert _negative_log_likelihood(logits, targets) == pytest.approx(wanted, rel=1e-6)
