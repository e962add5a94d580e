# SPDX-License-Identifier: Apache-2.0
"""The cache of ``ort-cuda`` stays on the device between steps; here the device is the CPU."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from quarot_onnx.errors import InputError, MissingDependencyError
from quarot_onnx.evaluate import decode_perplexity
from quarot_onnx.runtime import OnnxModel, load_model
from quarot_onnx.runtime.batching import SeparateBatch, batch_of
from quarot_onnx.runtime.generation import generate
from tests.conftest import Exported


@pytest.fixture(params=[(), ("kv_cache.io=float",)])
def artifact(request: pytest.FixtureRequest, exported: Exported) -> Path:
    return exported("llama", "w4a4kv4", request.param)


@pytest.fixture
def models(artifact: Path) -> tuple[OnnxModel, OnnxModel]:
    return OnnxModel(artifact, threads=1), OnnxModel(artifact, threads=1, cache_device="cpu")


def test_a_bound_cache_gives_the_same_logits(models: tuple[OnnxModel, OnnxModel]) -> None:
    plain, bound = models
    ids = np.random.default_rng(0).integers(0, 128, (2, 9))
    mask = np.ones((2, 9), np.int64)
    mask[1, :3] = 0
    expected, plain_cache = plain.step(ids, plain.new_cache(2), mask)
    found, cache = bound.step(ids, bound.new_cache(2), mask)
    np.testing.assert_array_equal(found, expected)
    for _ in range(2):  # a step leaves the cache that it is given as it is
        mask_after = np.concatenate([mask, np.ones((2, 2), np.int64)], axis=1)
        expected, _ = plain.step(ids[:, :2], plain_cache, mask_after)
        found, _ = bound.step(ids[:, :2], cache, mask_after)
        np.testing.assert_array_equal(found, expected)


def test_nothing_of_a_bound_cache_becomes_an_array(
    models: tuple[OnnxModel, OnnxModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    bound = models[1]
    copied: list[list[int]] = []
    numpy = onnxruntime.OrtValue.numpy

    def watched(value: onnxruntime.OrtValue) -> np.ndarray:
        copied.append(value.shape())
        return numpy(value)

    monkeypatch.setattr(onnxruntime.OrtValue, "numpy", watched)
    ids = np.arange(6)[None]
    _, cache = bound.step(ids, bound.new_cache(1))
    _, cache = bound.step(ids[:, :1], cache)
    assert copied == [[1, 6, 128], [1, 1, 128]]
    assert all(isinstance(value, onnxruntime.OrtValue) for value in cache.values())


def test_evaluation_and_generation_take_a_bound_cache(
    models: tuple[OnnxModel, OnnxModel],
) -> None:
    plain, bound = models
    ids = np.random.default_rng(1).integers(0, 128, (2, 12))
    assert decode_perplexity(bound, ids) == decode_perplexity(plain, ids)
    assert isinstance(batch_of(bound), SeparateBatch)
    assert len(list(generate(bound, [1, 2, 3], max_new_tokens=5))) == 5
    assert bound.cache_bytes_per_token == plain.cache_bytes_per_token


def test_errors_of_a_bound_step_are_ours(artifact: Path) -> None:
    bound = OnnxModel(artifact, threads=1, cache_device="cpu")
    cache = bound.new_cache(1)
    name = next(iter(cache))
    cache[name] = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((1, 2, 0, 3), np.float32))
    with pytest.raises(InputError, match=r"model\.onnx: fails in ONNX Runtime"):
        bound.step(np.zeros((1, 1), np.int64), cache)


def test_tensorrt_wants_an_engine_and_says_so(artifact: Path) -> None:
    with pytest.raises(InputError, match="holds no engine; build one with `quarot-onnx build`"):
        load_model(artifact, runtime="tensorrt")
    with pytest.raises(
        MissingDependencyError, match=r"tensorrt: runs engines, .* and no ONNX graph"
    ):
        OnnxModel(artifact, runtime="tensorrt")
