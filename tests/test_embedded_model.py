# SPDX-License-Identifier: Apache-2.0
"""What the README promises of the embedded model, each against an independent judge."""

import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from quarot_onnx import evaluate, texts
from quarot_onnx.hadamard import plan, randomized_signs
from quarot_onnx.inspection import inspect
from quarot_onnx.pipeline import export
from quarot_onnx.recipe import load_recipe
from quarot_onnx.runtime import Ids, OnnxModel, load_tokenizer
from tests import fake_quant

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny_llama"
MODEL = EXAMPLE / "model"
WINDOWS, LENGTH = 24, 256


@pytest.fixture(scope="module")
def artifact(traced_once: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("embedded") / "w4a4kv4"
    export(MODEL, out, load_recipe("w4a4kv4"))
    return out


@pytest.fixture(scope="module")
def windows(artifact: Path) -> Ids:
    text = (EXAMPLE / "heldout.txt").read_text(encoding="utf-8")
    ids = load_tokenizer(artifact).encode(text, add_special_tokens=False)
    return texts.windows(ids, WINDOWS, LENGTH)


@cache
def _judge() -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def _judged(windows: Ids, **options: object) -> float:
    """Perplexity by plain PyTorch fake quantization that shares no code with the package."""
    model = fake_quant.fake_quantize(_judge(), **options) if options else _judge()
    return float(fake_quant.perplexity(model, windows.ravel().tolist(), WINDOWS, LENGTH))


def test_unrotated_4_bits_collapse_and_the_rotations_remove_the_damage(
    artifact: Path, windows: Ids
) -> None:
    fp32 = _judged(windows)
    rotated = evaluate.perplexity(OnnxModel(artifact), windows)
    kept = math.log(rotated / fp32)
    for fold_norms, share in ((False, 0.95), (True, 0.85)):
        unrotated = _judged(windows, rotate=False, fold_norms=fold_norms)
        assert unrotated >= 10 * fp32
        assert 1 - kept / math.log(unrotated / fp32) >= share


def test_the_graph_is_as_good_as_plain_fake_quantization_with_the_same_rotations(
    artifact: Path, windows: Ids
) -> None:
    config = _judge().config
    seed = load_recipe("w4a4kv4").seed
    generator = torch.Generator().manual_seed(seed)
    judge_signs = torch.randint(2, (config.hidden_size,), generator=generator).double() * 2 - 1
    ours = randomized_signs(config.hidden_size, seed, "R1")[:, None]
    matrices = {
        order: torch.from_numpy(plan(order).matrix())
        for order in (config.head_dim, config.num_attention_heads, config.intermediate_size)
    }
    # The judge multiplies by its own random signs: dividing by them first leaves ours.
    r1 = torch.from_numpy(ours * plan(config.hidden_size).matrix())
    matrices[config.hidden_size] = judge_signs[:, None] * r1
    judged = _judged(windows, rotate=True, seed=seed, hadamards=matrices)
    found = evaluate.perplexity(OnnxModel(artifact), windows)
    assert found <= 1.003 * judged
    assert found == pytest.approx(judged, rel=0.003)


def test_decoding_through_the_packed_cache_agrees_with_one_prefill(
    artifact: Path, windows: Ids
) -> None:
    result = evaluate.decode_perplexity(OnnxModel(artifact), windows[:8])
    assert result.top1_agreement > 0.96
    assert result.perplexity == pytest.approx(result.prefill_perplexity, rel=0.01)


def test_the_cache_is_at_least_5_times_smaller_than_float32(artifact: Path) -> None:
    config = _judge().config
    float_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert float_bytes >= 5 * OnnxModel(artifact).cache_bytes_per_token


def test_the_file_is_within_a_quarter_of_the_ideal_size(artifact: Path) -> None:
    parameters = dict(_judge().named_parameters())
    linears = sum(p.numel() for n, p in parameters.items() if ".layers." in n and p.dim() == 2)
    tables = 2 * _judge().get_input_embeddings().weight.numel()  # embedding and head, untied
    stored = sum(path.stat().st_size for path in artifact.glob("model.onnx*"))
    assert stored <= 1.25 * (linears / 2 + 4 * tables)


def test_rotating_without_quantizing_changes_nothing(
    traced_once: None, tmp_path: Path, windows: Ids
) -> None:
    export(MODEL, tmp_path / "rotated", load_recipe("rotate-only"))
    model = OnnxModel(tmp_path / "rotated")
    logits, _ = model.step(windows[:2], model.new_cache(2))
    with torch.no_grad():
        expected = _judge()(torch.from_numpy(windows[:2])).logits.numpy()
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()


def test_every_linear_of_every_layer_is_quantized(artifact: Path) -> None:
    rows = [row for row in inspect(artifact).linears if row.layer is not None]
    assert len(rows) == 7 * _judge().config.num_hidden_layers
    assert {(row.weight_bits, row.activation_bits) for row in rows} == {(4, 4)}
