# SPDX-License-Identifier: Apache-2.0
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from quarot_onnx import artifacts, ops
from quarot_onnx.errors import InputError, UnsupportedModelError
from quarot_onnx.hadamard import plan
from quarot_onnx.ops import groups
from quarot_onnx.recipe import Recipe, Weights
from quarot_onnx.reference import (
    CodeLinear,
    FakeQuantModel,
    HuggingFaceModel,
    OnlineHadamard,
    Settings,
    _quantize_cache,
)
from quarot_onnx.rounding import Rounding
from quarot_onnx.runtime import Logits, OnnxModel
from tests import models
from tests.conftest import Exported, HuggingFace

IDS = np.random.default_rng(0).integers(0, 128, (3, 24))


def relative(found: Logits, expected: Logits) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


# --- HuggingFaceModel -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", models.LLAMA_FAMILIES)
def test_the_original_computes_what_hugging_face_computes_and_is_causal(
    hugging_face: HuggingFace, family: str
) -> None:
    model = HuggingFaceModel(hugging_face(family), threads=1)
    with torch.no_grad():
        plain = model.model(input_ids=torch.from_numpy(IDS), use_cache=False).logits.numpy()
    logits, _ = model.step(IDS, model.new_cache(3))
    assert relative(logits, plain) < 1e-6
    first, cache = model.step(IDS[:, :9], model.new_cache(3))
    assert relative(first, plain[:, :9]) < 1e-6
    rest, _ = model.step(IDS[:, 9:], cache)
    assert relative(rest, plain[:, 9:]) < 1e-5
    assert {tensor.shape[2] for tensor in cache.values()} == {9}


def test_the_original_takes_padding_on_the_left(hugging_face: HuggingFace) -> None:
    model = HuggingFaceModel(hugging_face("llama"), threads=1)
    ids, mask = IDS.copy(), np.ones_like(IDS)
    ids[1, :5], mask[1, :5] = 0, 0
    padded, _ = model.step(ids, model.new_cache(3), mask)
    alone, _ = model.step(ids[1:2, 5:], model.new_cache(1))
    assert relative(padded[1, 5:], alone[0]) < 1e-5


def test_the_original_keeps_torch_at_its_number_of_threads(hugging_face: HuggingFace) -> None:
    before = torch.get_num_threads()
    model = HuggingFaceModel(hugging_face("llama"), threads=before + 1)
    model.step(IDS, model.new_cache(3))
    assert torch.get_num_threads() == before


@pytest.fixture
def copied(hugging_face: HuggingFace, tmp_path: Path) -> Path:
    """A model that a test may damage."""
    return Path(shutil.copytree(hugging_face("llama"), tmp_path / "model"))


def test_a_tensor_that_is_missing_is_not_invented(copied: Path) -> None:
    tensors = load_file(copied / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        InputError, match=r"tensor model\.layers\.1\.mlp\.up_proj\.weight is missing"
    ):
        HuggingFaceModel(copied)


def test_a_tensor_of_another_shape_is_refused(copied: Path) -> None:
    tensors = load_file(copied / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(5)
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"transformers cannot load it \(.*\); download it again"):
        HuggingFaceModel(copied)


def test_a_weight_that_is_not_finite_is_named(copied: Path) -> None:
    tensors = load_file(copied / "model.safetensors")
    tensors["model.layers.2.self_attn.k_proj.weight"][3, 5] = torch.nan
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        InputError, match=r"layers\.2\.self_attn\.k_proj\.weight has values that are"
    ):
        HuggingFaceModel(copied)


def test_an_unknown_architecture_is_refused(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    with pytest.raises(UnsupportedModelError, match="model_type 'mamba' is not supported"):
        HuggingFaceModel(copied)


# --- FakeQuantModel -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [24, 96, 176, 28])
def test_online_hadamards_are_the_operators_rotations(size: int) -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, size)).astype(np.float32)
    found = OnlineHadamard.of(plan(size))(torch.from_numpy(x)).numpy()
    a, b = (matrix.astype(np.float32) for matrix in plan(size).matrices())
    np.testing.assert_allclose(found, ops.hadamard(x, a, b), atol=1e-5)


def test_online_hadamards_across_heads_are_the_operators_rotation() -> None:
    x = np.random.default_rng(0).normal(size=(5, 12 * 6)).astype(np.float32)
    found = OnlineHadamard.of(plan(12), inner=6)(torch.from_numpy(x)).numpy()
    expected = ops.hadamard_heads(x, plan(12).matrix().astype(np.float32))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_linears_over_codes_multiply_exactly(bits: int) -> None:
    rng = np.random.default_rng(bits)
    top, features = 2 ** (bits - 1), 4096
    codes = rng.integers(-top, top, (features, 8))
    scale = rng.uniform(0.01, 0.02, 8).astype(np.float32)
    x = np.abs(rng.normal(size=(3, features))).astype(np.float32)
    x[0] = 0
    recipe = Recipe(weights=Weights(bits=bits))
    linear = CodeLinear(
        torch.from_numpy(codes.T.astype(np.float32)),
        torch.from_numpy(scale),
        None,
        None,
        Rounding(bits, symmetric=True, clip_ratio=0.9, group_size=features),
        Settings(recipe),
    )
    q, x_scale = ops.quantize_int4(x, bits=bits, clip_ratio=0.9)
    expected = ops.int4_gemm(q, x_scale, codes, scale)
    found = linear(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(found, expected, rtol=3e-7)
    np.testing.assert_array_equal(found[0], 0)


@pytest.mark.parametrize("group_size", [64, 16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 8])
def test_linears_over_codes_with_zero_points_and_groups(
    bits: int, symmetric: bool, group_size: int
) -> None:
    rng = np.random.default_rng(bits)
    codes = rng.integers(-8, 8, (64, 8))
    scale = rng.uniform(0.01, 0.02, 8).astype(np.float32)
    x = rng.normal(0.5, 1, (30, 64)).astype(np.float32)
    rounding = Rounding(bits, symmetric, 0.8, group_size)
    weight = torch.from_numpy(codes.T.astype(np.float32))
    linear = CodeLinear(weight, torch.from_numpy(scale), None, None, rounding, Settings(Recipe()))
    q = groups.quantize_groups(x, **rounding.attributes)
    expected = groups.gemm_groups(*q, codes, scale, group_size=group_size)
    found = linear(torch.from_numpy(x)).numpy()
    assert np.mean(np.abs(found - expected) > 1e-5) < 0.05  # rows with a code that a tie turns


@pytest.mark.parametrize("weight_groups", [1, 2, 8])
@pytest.mark.parametrize("group_size", [64, 16])
def test_linears_over_codes_with_weights_in_groups(group_size: int, weight_groups: int) -> None:
    rng = np.random.default_rng(weight_groups)
    codes = rng.integers(-8, 8, (64, 8))
    scale = rng.uniform(0.01, 0.02, (weight_groups, 8)).astype(np.float32)
    zero = rng.integers(-8, 8, scale.shape)
    x = rng.normal(0.5, 1, (30, 64)).astype(np.float32)
    rounding = Rounding(4, False, 0.8, group_size)
    centred = codes - np.repeat(zero, 64 // weight_groups, axis=0)
    weight = torch.from_numpy(centred.T.astype(np.float32))
    settings = Settings(Recipe())
    linear = CodeLinear(weight, torch.from_numpy(scale), None, None, rounding, settings)
    q = groups.quantize_groups(x, **rounding.attributes)
    size = min(group_size, 64 // weight_groups)
    expected = groups.gemm_groups(*q, codes, scale, zero, group_size=size)
    found = linear(torch.from_numpy(x)).numpy()
    assert np.mean(np.abs(found - expected) > 1e-5) < 0.05  # rows with a code that a tie turns
    settings.is_quantizing = False
    plain = ops.weight_only_gemm_groups(x, codes, scale, zero)
    np.testing.assert_allclose(linear(torch.from_numpy(x)).numpy(), plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_cached_values_are_those_of_the_operator(bits: int) -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 50, 16)).astype(np.float32)
    x[0, 0, 0], x[0, 0, 1] = 0, np.abs(x[0, 0, 1])
    found = _quantize_cache(torch.from_numpy(x), Rounding(bits, False, 0.95, 16)).numpy()
    expected = ops.kv_fake_quantize(x, bits=bits, clip_ratio=0.95)
    # The clip of a scale is rounded once here and twice there, which can turn a tie.
    assert np.mean(np.abs(found - expected) > 1e-5) < 1e-3
    np.testing.assert_array_equal(found[0, 0, 0], 0)


FORMS = {
    "w4a4kv4-asym": (),
    "w4a4kv4-down8": ("kv_cache.mode=symmetric",),
    "w6a6kv6": ("activations.group_size=24", "kv_cache.group_size=8", "kv_cache.io=float"),
    "w3a3kv3": ("activations.mode=asymmetric", "activations.group_size=24", "kv_cache.bits=5"),
}


@pytest.mark.parametrize(
    ("family", "recipe", "overrides"),
    [
        *((family, "w4a4kv4", ()) for family in models.LLAMA_FAMILIES),
        *(("qwen2-biases", recipe, overrides) for recipe, overrides in FORMS.items()),
    ],
)
def test_the_graph_computes_what_plain_pytorch_computes_with_its_codes(
    exported: Exported, family: str, recipe: str, overrides: tuple[str, ...]
) -> None:
    artifact = exported(family, recipe, overrides)
    graph, judge = OnnxModel(artifact, threads=1), FakeQuantModel(artifact, threads=1)
    found, _ = graph.step(IDS, graph.new_cache(3))
    expected, _ = judge.step(IDS, judge.new_cache(3))
    error = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    judge.settings.is_quantizing = False
    plain, _ = judge.step(IDS, judge.new_cache(3))
    rounding = np.linalg.norm(expected - plain, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert np.median(error) < 1e-5
    assert (error < 2 * rounding).all()
    assert np.median(rounding) > (0.01 if recipe == "w6a6kv6" else 0.05)


@pytest.mark.parametrize("recipe", ["rotate-only", "float"])
def test_without_quantization_it_is_the_original(
    exported: Exported, hugging_face: HuggingFace, recipe: str
) -> None:
    judge = FakeQuantModel(exported("qwen2-biases", recipe), threads=1)
    original = HuggingFaceModel(hugging_face("qwen2-biases"), threads=1)
    found, _ = judge.step(IDS, judge.new_cache(3))
    expected, _ = original.step(IDS, original.new_cache(3))
    assert relative(found, expected) < 1e-5


def test_decoding_with_codes_agrees_with_prefill(exported: Exported) -> None:
    judge = FakeQuantModel(exported("llama", "w4a4kv4"), threads=1)
    whole, _ = judge.step(IDS, judge.new_cache(3))
    first, cache = judge.step(IDS[:, :9], judge.new_cache(3))
    rest, _ = judge.step(IDS[:, 9:], cache)
    error = np.abs(np.concatenate([first, rest], axis=1) - whole).max(axis=-1)
    assert np.median(error) < 1e-5 * np.abs(whole).max()


def test_forced_layers_start_from_the_states_that_they_are_given(exported: Exported) -> None:
    judge = FakeQuantModel(exported("llama", "w4a4kv4"), threads=1)
    logits, _ = judge.step(IDS, judge.new_cache(3))
    states = [judge.embed(IDS)]
    zeros = np.zeros_like(states[0])
    for _ in range(3):  # each layer's output, once the states before it are right
        outputs, _ = judge.forced(IDS, [*states, *[zeros] * (4 - len(states))])
        states.append(outputs[len(states) - 1])
    outputs, forced = judge.forced(IDS, states)
    assert relative(forced, logits) < 1e-6
    assert all(relative(a, b) < 1e-6 for a, b in zip(outputs, states[1:], strict=True))
    outputs, forced = judge.forced(IDS, [states[0], states[1] * 2, states[2], states[3]])
    assert relative(outputs[0], states[1]) < 1e-6
    assert relative(outputs[1], states[2]) > 0.1
    assert relative(outputs[2], states[3]) < 1e-6
    again, _ = judge.step(IDS, judge.new_cache(3))
    np.testing.assert_array_equal(again, logits)


def test_an_initializer_that_is_missing_is_named(exported: Exported, tmp_path: Path) -> None:
    artifact = Path(shutil.copytree(exported("llama", "w4a4kv4"), tmp_path / "artifact"))
    graph = onnx.load(artifact / artifacts.MODEL, load_external_data=False)
    name = "model.layers.1.mlp.up_proj.weight"
    next(i for i in graph.graph.initializer if i.name == name).name = "other"
    onnx.save(graph, artifact / artifacts.MODEL)
    with pytest.raises(InputError, match=rf"model\.onnx: no initializer {name}; export again"):
        FakeQuantModel(artifact)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("QuantizeKvCache", r"self_attn\.cached_value is rounded, at kv_cache\.bits = 4"),
        ("QuantizeActivations", r"mlp\.down_proj is rounded, at activations\.bits = 4"),
    ],
)
def test_a_site_that_no_record_rounds_is_named(
    exported: Exported, tmp_path: Path, name, message
) -> None:
    artifact = Path(shutil.copytree(exported("llama", "w4a4kv4"), tmp_path / "artifact"))
    manifest = json.loads((artifact / "manifest.json").read_text())
    entry = next(e for e in manifest["passes"] if e["name"] == name)
    entry["records"] = entry["records"][:-1]
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    told = rf"manifest\.json: no pass records how model\.layers\.\d\.{message}; export again"
    with pytest.raises(InputError, match=told):
        FakeQuantModel(artifact)


def test_a_record_without_a_key_is_named(exported: Exported, tmp_path: Path) -> None:
    artifact = Path(shutil.copytree(exported("llama", "w4a4kv4"), tmp_path / "artifact"))
    manifest = json.loads((artifact / "manifest.json").read_text())
    entry = next(e for e in manifest["passes"] if e["name"] == "QuantizeActivations")
    del entry["records"][0]["clip_ratio"]
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"record of .*q_proj has no clip_ratio; export again"):
        FakeQuantModel(artifact)


def test_an_initializer_of_another_shape_is_named(exported: Exported, tmp_path: Path) -> None:
    artifact = Path(shutil.copytree(exported("llama", "w4a4kv4"), tmp_path / "artifact"))
    config = json.loads((artifact / "config.json").read_text())
    (artifact / "config.json").write_text(json.dumps({**config, "intermediate_size": 352}))
    with pytest.raises(
        InputError, match=r"gate_proj\.weight has shape \[96, 176\] where config\.j"
    ):
        FakeQuantModel(artifact)


def test_a_configuration_without_a_model_type_is_named(exported: Exported, tmp_path: Path) -> None:
    artifact = Path(shutil.copytree(exported("llama", "w4a4kv4"), tmp_path / "artifact"))
    (artifact / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"config\.json: has no model_type; export again"):
        FakeQuantModel(artifact)


def test_a_graph_that_cannot_be_parsed_is_named(exported: Exported, tmp_path: Path) -> None:
    artifact = Path(shutil.copytree(exported("llama", "w4a4kv4"), tmp_path / "artifact"))
    (artifact / artifacts.MODEL).write_bytes(b"\xff\xfe not a graph")
    with pytest.raises(InputError, match=r"model\.onnx: is damaged \(.*\); export again"):
        FakeQuantModel(artifact)


def test_a_family_with_other_modules_is_refused(exported: Exported) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        FakeQuantModel(exported("phi3", "w4a4kv4"))
    assert str(caught.value).endswith(
        "a PyTorch model of its codes is written for llama, mistral, qwen2, qwen3, not for phi3; "
        "validate a rotate-only export"
    )
