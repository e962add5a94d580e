# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from quarot_onnx.activations import (
    SITES,
    capture,
    quantized_asymmetric,
    quantized_symmetric,
    statistics,
)
from quarot_onnx.errors import InputError, UnsupportedModelError
from quarot_onnx.export.checkpoint import Checkpoint
from quarot_onnx.hadamard import plan
from quarot_onnx.recipe import Recipe
from tests import models

TOKENS = np.random.default_rng(5).integers(0, models.COMMON["vocab_size"], 24)
OUTLIER_CHANNEL = 17


def _with_outliers(family: str) -> transformers.PreTrainedModel:
    """A model with one large residual channel and one large intermediate channel."""
    model = models.build(family)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, OUTLIER_CHANNEL] *= 30
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[OUTLIER_CHANNEL] *= 30
    return model


def _hooked(model: transformers.PreTrainedModel, layer: int) -> dict[str, np.ndarray]:
    """What PyTorch feeds to the linears of `layer`, [tokens, channels], and its new cache."""
    seen: dict[str, np.ndarray] = {}
    block = model.model.layers[layer]
    modules = {
        "qkv": block.self_attn.q_proj,
        "o_proj": block.self_attn.o_proj,
        "gate_up": block.mlp.gate_proj,
        "down_proj": block.mlp.down_proj,
    }
    for site, module in modules.items():
        module.register_forward_pre_hook(
            lambda _, inputs, site=site: seen.__setitem__(site, inputs[0][0].numpy())
        )
    with torch.no_grad():
        cache = model(torch.tensor(TOKENS)[None], use_cache=True).past_key_values
    for site, states in (
        ("keys", cache.layers[layer].keys),
        ("values", cache.layers[layer].values),
    ):
        seen[site] = states[0].transpose(0, 1).flatten(1).numpy()
    return seen


def test_statistics_are_those_of_numpy() -> None:
    x = np.array([[1.0, -2.0, 4.0, -8.0], [3.0, 3.0, -3.0, 6.0]], np.float32)
    found = statistics(x)
    rms = np.sqrt((x**2).mean(axis=1))
    centred = x - x.mean(axis=1, keepdims=True)
    error = quantized_symmetric(x) - x
    assert found.max_over_rms == pytest.approx(np.mean([8 / rms[0], 6 / rms[1]]))
    assert found.max_over_median == pytest.approx(np.mean([8 / 3, 6 / 3]))
    assert found.kurtosis == pytest.approx(
        np.mean((centred**4).mean(axis=1) / (centred**2).mean(axis=1) ** 2)
    )
    noise = (error**2).sum(axis=1) / (x**2).sum(axis=1)
    assert found.snr_db == pytest.approx(-10 * np.log10(noise.mean()), rel=1e-5)


def test_gaussian_numbers_have_kurtosis_three_and_one_outlier_has_the_root_of_the_channels() -> (
    None
):
    gaussian = np.random.default_rng(0).standard_normal((200, 1024)).astype(np.float32)
    assert statistics(gaussian).kurtosis == pytest.approx(3, abs=0.05)
    single = np.zeros((3, 64), np.float32)
    single[:, 5] = 2
    assert statistics(single).max_over_rms == pytest.approx(8)
    assert statistics(single).max_over_median == float("inf")


def test_groups_that_are_all_zero_do_not_count() -> None:
    x = np.random.default_rng(1).standard_normal((4, 32)).astype(np.float32)
    assert statistics(np.concatenate([x, np.zeros((5, 32), np.float32)])) == statistics(x)
    assert statistics(np.zeros((2, 8), np.float32)).snr_db == float("inf")


def test_quantized_values_lie_on_a_grid_of_sixteen_steps() -> None:
    x = np.random.default_rng(2).standard_normal((1, 512)).astype(np.float32)
    assert len(np.unique(quantized_symmetric(x))) <= 16
    assert len(np.unique(quantized_asymmetric(x))) <= 16


@pytest.mark.parametrize("family", ["llama", "qwen2-biases", "qwen3-head-dim"])
def test_captured_tensors_are_those_that_pytorch_sees(family: str, tmp_path: Path) -> None:
    model = models.build(family)
    found = capture(Checkpoint(models.save(model, tmp_path)), Recipe(), TOKENS, [0, 2])
    assert list(found) == list(SITES)
    for layer in (0, 2):
        expected = _hooked(model, layer)
        for site, activation in found.items():
            before = activation.surfaces[layer].before
            assert len(before) == len(TOKENS)
            before = before[-len(expected[site]) :]  # a sliding cache keeps the last ones
            assert before.shape == expected[site].shape
            scale = np.abs(expected[site]).max()
            np.testing.assert_allclose(before, expected[site], rtol=0, atol=2e-5 * scale)
    assert all(set(activation.surfaces) == {0, 2} for activation in found.values())


def test_rotated_tensors_are_the_hadamard_transform_of_those_before(tmp_path: Path) -> None:
    model = models.build("llama")
    found = capture(Checkpoint(models.save(model, tmp_path)), Recipe(), TOKENS, [1])
    head_dim = models.COMMON["hidden_size"] // models.COMMON["num_attention_heads"]
    for site, size in (("keys", head_dim), ("values", head_dim), ("down_proj", 176)):
        surface = found[site].surfaces[1]
        groups = surface.before.astype(np.float64).reshape(-1, size)
        expected = plan(size).apply(groups).reshape(surface.before.shape)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(surface.after, expected, rtol=0, atol=2e-5 * scale)


def test_rotation_lowers_planted_outliers_in_every_layer(tmp_path: Path) -> None:
    found = capture(Checkpoint(models.save(_with_outliers("llama"), tmp_path)), Recipe(), TOKENS)
    for site in ("qkv", "down_proj"):
        for before, after in zip(found[site].before, found[site].after, strict=True):
            assert after.max_over_rms < 0.6 * before.max_over_rms
            assert after.kurtosis < before.kurtosis
            assert after.snr_db > before.snr_db + 3


def test_the_layer_with_the_largest_outliers_is_kept_by_default(tmp_path: Path) -> None:
    model = models.build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] *= 100
    found = capture(Checkpoint(models.save(model, tmp_path)), Recipe(), TOKENS)
    assert set(found["qkv"].surfaces) == {1}
    assert len(found["qkv"].before) == models.COMMON["num_hidden_layers"]


def test_refuses_tokens_and_layers_that_the_model_lacks(tmp_path: Path) -> None:
    checkpoint = Checkpoint(models.save(models.build("llama"), tmp_path))
    with pytest.raises(InputError, match="token 128 is outside the vocabulary of 128; use the"):
        capture(checkpoint, Recipe(), [1, 128])
    with pytest.raises(InputError, match="give at least one token"):
        capture(checkpoint, Recipe(), [])
    with pytest.raises(UnsupportedModelError, match="layer 3: the model has 3 layers; give 0 to 2"):
        capture(checkpoint, Recipe(), [1], [3])
