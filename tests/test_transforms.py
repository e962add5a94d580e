# SPDX-License-Identifier: Apache-2.0
"""Files of matrices: what is refused, and what is read back."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from quarot_onnx.errors import InputError
from quarot_onnx.export.architectures import Dimensions, FeedForward
from quarot_onnx.hadamard import random_orthogonal
from quarot_onnx.transforms import Transforms
from tests.small_decoder import invertible

SIZES = Dimensions(
    hidden_size=8,
    feed_forwards=(FeedForward("down_proj", 12),),
    num_experts=0,
    post_norms=0,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    vocabulary_size=10,
)
LAYER = "model.layers.0"


def _both(name: str, array: np.ndarray) -> dict[str, np.ndarray]:
    return {f"model.layers.{i}.{name}": array for i in range(2)}


def _complete() -> dict[str, np.ndarray]:
    return {
        "R1": random_orthogonal(8, 0),
        **_both("self_attn.value", invertible(2, 4, 4)),
        **_both("self_attn.key", invertible(4, 4)),
        **_both("self_attn.heads", invertible(4, 4)),
        **_both("mlp.down_A", invertible(3, 3)),
        **_both("mlp.down_B", invertible(4, 4)),
        **_both("mlp.up", np.linspace(1, 2, 12)),
        **_both("input_layernorm.scale", np.linspace(1, 2, 8)),
        **_both("post_attention_layernorm.scale", np.linspace(1, 2, 8)),
        **_both("input_layernorm.A", invertible(2, 2)),
        **_both("input_layernorm.B", invertible(4, 4)),
    }


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    saved = Transforms.of(_complete(), SIZES, "here")
    saved.save(tmp_path / "t.safetensors")
    found = Transforms.load(tmp_path / "t.safetensors", SIZES)
    assert set(found.tensors) == set(saved.tensors)
    for name, array in saved.tensors.items():
        np.testing.assert_allclose(found.tensors[name], array, rtol=0, atol=1e-15)
    assert found.online == ["down", "heads", "inputs", "key"]


def test_r2_of_spinquant_serves_every_head() -> None:
    r2 = random_orthogonal(4, 1)
    found = Transforms.of(_both("self_attn.R2", r2), SIZES, "file")
    np.testing.assert_allclose(found.value(1, 2), np.stack([r2, r2]), atol=1e-15)


def test_a_rotation_stored_in_bfloat16_becomes_orthogonal(tmp_path: Path) -> None:
    rounded = random_orthogonal(8, 0).astype(ml_dtypes.bfloat16)
    save_file({"R1": rounded}, tmp_path / "t.safetensors")
    r1 = Transforms.load(tmp_path / "t.safetensors", SIZES).r1
    np.testing.assert_allclose(r1 @ r1.T, np.eye(8), atol=1e-14)
    np.testing.assert_allclose(r1, rounded.astype(np.float64), atol=0.02)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"R9": np.eye(8)}, "file: tensor R9 has no place in this model"),
        ({"model.layers.2.self_attn.R2": np.eye(4)}, "has no place in this model"),
        ({"R1": np.eye(4)}, "file: R1: has shape [4, 4] where this model needs [8, 8]"),
        ({"R1": 2 * np.eye(8)}, "file: R1: is not orthogonal, max|Q Q.T - 1| = 3;"),
        (_both("self_attn.R2", invertible(4, 4)), f"{LAYER}.self_attn.R2: is not orthogonal"),
        (_both("self_attn.key", np.ones((4, 4))), f"{LAYER}.self_attn.key: condition number"),
        (_both("mlp.up", np.zeros(12)), f"{LAYER}.mlp.up: has scales of 0 or less"),
        (_both("mlp.down_A", np.ones((3, 4))), "has shape [3, 4] where this model needs square"),
        (
            _both("mlp.down_A", np.eye(3)),
            "mlp.down_A and mlp.down_B of orders [3], which do not make 12",
        ),
        (
            _both("mlp.down_A", np.eye(3)) | _both("mlp.down_B", np.eye(3)),
            "file: layer 0 has mlp.down_A and mlp.down_B of orders [3, 3], which do not make 12",
        ),
        (
            _both("input_layernorm.A", np.eye(4)) | _both("input_layernorm.B", np.eye(4)),
            "layer 0 has input_layernorm.A and input_layernorm.B of orders [4, 4], which do not "
            "make 8",
        ),
        (
            {f"{LAYER}.self_attn.key": np.eye(4)},
            "file: self_attn.key is given for 1 of 2 layers; give it for all or none",
        ),
        (
            _both("self_attn.R2", np.eye(4)) | _both("self_attn.value", invertible(2, 4, 4)),
            "file: has self_attn.R2 and self_attn.value, which are one place; keep one",
        ),
    ],
)
def test_refuses_what_does_not_fit(tensors, message) -> None:
    with pytest.raises(InputError) as caught:
        Transforms.of(tensors, SIZES, "file")
    assert message in str(caught.value)


def test_refuses_pickles(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="pickled tensors can run code and are refused"):
        Transforms.load(tmp_path / "R.bin", SIZES)
