# SPDX-License-Identifier: Apache-2.0
"""Attention sinks: a score more in each head's softmax, whatever the cache is made of."""

from pathlib import Path

import numpy as np
import pytest
import torch

from quarot_onnx.calibration import Calibration
from quarot_onnx.errors import UnsupportedModelError
from quarot_onnx.export.trace import _attention
from quarot_onnx.inspection import inspect
from quarot_onnx.pipeline import export
from quarot_onnx.recipe import load_recipe
from tests.conftest import Exported, HuggingFace
from tests.running import Decoding

TOKENS = np.random.default_rng(0).integers(0, 128, (2, 12))
CACHE_ALONE = ("weights.bits=16", "activations.bits=16")


@pytest.mark.parametrize(
    ("overrides", "operator"),
    [
        ((), "KvAttentionSinksInt8"),
        (("kv_cache.io=float",), "AttentionSinks"),
        (("kv_cache.group_size=16",), "AttentionSinks"),
    ],
)
def test_every_form_of_the_cache_keeps_the_sinks(exported: Exported, overrides, operator) -> None:
    artifact = exported("gpt-oss", "w8a8kv8", (*CACHE_ALONE, *overrides))
    assert inspect(artifact).operators[operator] == 3
    wanted = Decoding(exported("gpt-oss", "rotate-only") / "model.onnx", 2)(TOKENS)
    decoding = Decoding(artifact / "model.onnx", 2)
    got = np.concatenate([decoding(TOKENS[:, :7]), decoding(TOKENS[:, 7:])], axis=1)
    assert np.median(np.abs(got - wanted)) < 0.005 * np.abs(wanted).max()


def test_sinks_and_a_softcap_together_are_refused() -> None:
    heads, sinks = torch.zeros(1, 2, 3, 4), torch.zeros(2)
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    with pytest.raises(UnsupportedModelError, match="Identity: attention sinks together with a so"):
        _attention(torch.nn.Identity(), heads, heads, heads, mask, softcap=5.0, s_aux=sinks)


def test_an_expert_without_a_calibration_token_is_rounded_to_nearest(
    tmp_path: Path, hugging_face: HuggingFace
) -> None:
    """The router of gpt-oss has a bias, which leaves some experts of the small model no rows."""
    calibration = Calibration.of(TOKENS[:, :6], "random tokens")
    export(
        hugging_face("gpt-oss"),
        tmp_path / "out",
        load_recipe("w4a4kv4-gptq"),
        calibration=calibration,
        certify=False,
    )
    assert np.isfinite(Decoding(tmp_path / "out" / "model.onnx", 2)(TOKENS)).all()
