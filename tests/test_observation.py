# SPDX-License-Identifier: Apache-2.0
import math
from pathlib import Path

import numpy as np
import onnx
import pytest

from quarot_onnx.activations import capture
from quarot_onnx.errors import InputError
from quarot_onnx.export.checkpoint import Checkpoint
from quarot_onnx.observation import layer_noise, observe, signal_to_noise, site_statistics
from quarot_onnx.recipe import load_recipe
from tests.conftest import Exported, HuggingFace

TOKENS = np.random.default_rng(0).integers(0, 128, (2, 24))


@pytest.mark.parametrize(
    "family", ["llama", "qwen3-head-dim", "gemma2", "opt", "gpt-neox", "mixtral"]
)
def test_a_rotation_leaves_no_noise_in_any_family(family: str, exported: Exported) -> None:
    float_model, rotated = exported(family, "float"), exported(family, "rotate-only")
    found = layer_noise(float_model, rotated, TOKENS, threads=1)
    assert len(found) >= 2
    assert min(found) > 80  # decibels: float32 rounding


def test_fewer_bits_leave_more_noise(exported: Exported) -> None:
    original = exported("llama", "float")
    noise = {
        name: layer_noise(original, exported("llama", name), TOKENS, threads=1)
        for name in ("w8a8kv8", "w6a6kv6", "w4a4kv4")
    }
    for eight, six, four in zip(*noise.values(), strict=True):
        assert 60 > eight > six + 6 > four + 12
        assert four > 0


def test_signal_to_noise_is_that_of_known_noise() -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(400, 64)).astype(np.float32)
    turn = np.linalg.qr(generator.normal(size=(64, 64)))[0]
    noisy = (x @ turn + 0.1 * generator.normal(size=x.shape)).astype(np.float32)
    assert signal_to_noise(x, noisy, turn) == pytest.approx(20, abs=0.3)
    assert signal_to_noise(x, noisy, np.eye(64)) < 0
    assert signal_to_noise(x, x, np.eye(64)) == math.inf


def test_the_sites_are_what_the_quantizers_meet(
    exported: Exported, hugging_face: HuggingFace
) -> None:
    layers = list(observe(exported("llama", "rotate-only"), TOKENS[:1], threads=1))
    captured = capture(Checkpoint(hugging_face("llama")), load_recipe("rotate-only"), TOKENS[0])
    names = {
        "qkv": "self_attn.q_proj",
        "o_proj": "self_attn.o_proj",
        "gate_up": "mlp.gate_proj",
        "down_proj": "mlp.down_proj",
        "keys": "keys",
        "values": "values",
    }
    assert [layer.index for layer in layers] == [0, 1, 2, 3]
    assert layers[-1].sites == {}
    for layer in layers[:-1]:
        assert set(layer.sites) == set(names.values())
        for site, name in names.items():
            expected = captured[site].after[layer.index]
            found = site_statistics(name, layer.sites[name])
            assert found.max_over_rms == pytest.approx(expected.max_over_rms, rel=1e-4)
            assert found.snr_db == pytest.approx(expected.snr_db, abs=0.1)


def test_a_quantized_artifact_is_observed_in_front_of_its_quantizers(exported: Exported) -> None:
    plain = next(observe(exported("llama", "rotate-only"), TOKENS, threads=1))
    rounded = next(observe(exported("llama", "w4a4kv4"), TOKENS, threads=1))
    # The first layer's input has met no quantizer yet.
    name = "self_attn.q_proj"
    np.testing.assert_allclose(rounded.sites[name], plain.sites[name], rtol=1e-4, atol=1e-5)
    assert set(rounded.sites) == set(plain.sites)
    assert rounded.sites["keys"].dtype == np.float32


def test_says_where_layers_are_not_named(exported: Exported, tmp_path: Path) -> None:
    model = onnx.load(exported("llama", "float") / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        node.name = node.name.replace("layers.", "blocks.")
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(InputError, match=r"the norms of its layers are not named layers\.N"):
        next(observe(tmp_path, TOKENS, threads=1))
