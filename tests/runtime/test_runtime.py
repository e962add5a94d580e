# SPDX-License-Identifier: Apache-2.0
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import tokenizers
from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException

from quarot_onnx import artifacts
from quarot_onnx.errors import (
    InputError,
    MissingDependencyError,
    ResourceError,
    UnsupportedModelError,
    UsageError,
)
from quarot_onnx.runtime import (
    OnnxModel,
    Tokenizer,
    eos_token_ids,
    load_tokenizer,
    position_ids,
)
from tests.conftest import Exported

IDS = np.random.default_rng(0).integers(0, 128, (2, 20))


@pytest.fixture
def model(exported: Exported) -> OnnxModel:
    return OnnxModel(exported("llama", "w4a4kv4"), threads=1)


@pytest.fixture
def copied(exported: Exported, tmp_path: Path) -> Path:
    """An artifact that a test may damage."""
    return Path(shutil.copytree(exported("llama", "w4a4kv4"), tmp_path / "artifact"))


# --- OnnxModel ------------------------------------------------------------------------------------


def test_a_packed_cache_costs_half_a_byte_per_number(model: OnnxModel) -> None:
    layers, kv_heads, head_dim = 3, 2, 24
    assert model.cache_bytes_per_token == layers * 2 * kv_heads * (head_dim // 2 + 4 + 4)
    assert {a.dtype for n, a in model.new_cache(2).items() if n.endswith(("key", "value"))} == {
        np.dtype(np.uint8)
    }


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("float16", 2)])
def test_a_float_cache_has_the_dtype_of_the_export(
    exported: Exported, dtype: str, size: int
) -> None:
    model = OnnxModel(exported("llama", "rotate-only", (), dtype), threads=1)
    assert model.cache_bytes_per_token == 3 * 2 * 2 * 24 * size
    logits, cache = model.step(IDS, model.new_cache(2))
    assert logits.dtype == np.float32
    assert {str(array.dtype) for array in cache.values()} == {dtype}


@pytest.mark.parametrize("recipe", ["w4a4kv4", "w8a8kv8", "rotate-only"])
def test_steps_through_the_cache_equal_one_prefill(exported: Exported, recipe: str) -> None:
    model = OnnxModel(exported("llama", recipe), threads=1)
    whole, whole_cache = model.step(IDS, model.new_cache(2))
    assert whole.shape == (2, 20, model.vocabulary_size)
    first, cache = model.step(IDS[:, :13], model.new_cache(2))
    held = {name: array.copy() for name, array in cache.items()}
    rest, longer = model.step(IDS[:, 13:], cache)
    error = np.abs(np.concatenate([first, rest], axis=1) - whole).max(axis=-1) / np.abs(whole).max()
    # A rounding tie that falls the other way moves the logits of few tokens, and not far.
    assert np.quantile(error, 1 if recipe == "rotate-only" else 0.75) < 1e-4
    assert error.max() < 0.1
    assert longer.keys() == whole_cache.keys()
    assert {array.shape[2] for array in longer.values()} == {20}
    for name, array in held.items():
        np.testing.assert_array_equal(cache[name], array)


def test_padding_on_the_left_changes_nothing(model: OnnxModel) -> None:
    ids, mask = IDS.copy(), np.ones_like(IDS)
    ids[1, :5], mask[1, :5] = 0, 0
    padded, _ = model.step(ids, model.new_cache(2), mask)
    alone, _ = model.step(ids[1:, 5:], model.new_cache(1))
    np.testing.assert_allclose(padded[1, 5:], alone[0], atol=1e-4)


def test_positions_count_real_tokens() -> None:
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    np.testing.assert_array_equal(position_ids(mask, 4), [[0, 0, 1, 2], [1, 2, 3, 4]])


@pytest.mark.parametrize("token", [-1, 128])
def test_refuses_a_token_outside_the_vocabulary(model: OnnxModel, token: int) -> None:
    with pytest.raises(
        InputError, match=rf"token {token} is not in the vocabulary of 128; the tok"
    ):
        model.step(np.array([[3, token]]), model.new_cache(1))


def test_a_mask_of_another_length_is_a_mistake_of_the_caller(model: OnnxModel) -> None:
    with pytest.raises(ValueError, match=r"attention_mask: \(2, 19\), not \(2, 20\)"):
        model.step(IDS, model.new_cache(2), np.ones((2, 19), np.int64))


def test_refuses_an_unknown_runtime(exported: Exported) -> None:
    with pytest.raises(
        UsageError, match="--runtime gpu: no such runtime; choose ort-cpu, ort-cuda"
    ):
        OnnxModel(exported("llama", "w4a4kv4"), runtime="gpu")


def test_refuses_less_than_one_thread(exported: Exported) -> None:
    with pytest.raises(UsageError, match="--threads 0: must be 1 or more"):
        OnnxModel(exported("llama", "w4a4kv4"), threads=0)


def test_says_that_tensorrt_is_not_there(exported: Exported) -> None:
    with pytest.raises(
        MissingDependencyError, match=r"tensorrt: .*; use --runtime ort-cpu"
    ) as error:
        OnnxModel(exported("llama", "w4a4kv4"), runtime="tensorrt")
    assert error.value.exit_code == 5


def test_says_that_cuda_is_not_there(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(MissingDependencyError, match="ort-cuda: this onnxruntime has no CUDAExec"):
        OnnxModel(exported("llama", "w4a4kv4"), runtime="ort-cuda")


def test_never_falls_back_to_the_cpu_silently(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: both)
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda *_, **__: SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"]),
    )
    with pytest.raises(
        MissingDependencyError, match="could not start CUDAExecutionProvider; check"
    ):
        OnnxModel(exported("llama", "w4a4kv4"), runtime="ort-cuda")


def test_says_that_onnxruntime_is_not_installed(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'quarot-onnx\[cpu\]'"):
        OnnxModel(exported("llama", "w4a4kv4"))


def test_says_that_the_cpu_has_no_bfloat16(exported: Exported) -> None:
    with pytest.raises(UnsupportedModelError, match=r"ort-cpu cannot run it .*--dtype float32"):
        OnnxModel(exported("llama", "w4a4kv4", (), "bfloat16"))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("name", [artifacts.MODEL, artifacts.DATA])
@pytest.mark.parametrize("damage", [Path.unlink, _truncate, lambda path: path.write_bytes(b"")])
def test_names_a_damaged_file(copied: Path, name: str, damage: Callable[[Path], Any]) -> None:
    damage(copied / name)
    with pytest.raises(InputError, match=r"model\.onnx: .*export again$") as error:
        OnnxModel(copied)
    assert "\n" not in str(error.value)
    assert "ONNXRuntimeError" not in str(error.value)


def test_refuses_a_directory_that_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no manifest\.json; give a directory that `quarot-onnx"):
        OnnxModel(tmp_path)


@pytest.mark.parametrize("missing", ["logits", "present.1.key_scale"])
def test_refuses_a_graph_without_an_output(copied: Path, missing: str) -> None:
    graph = onnx.load(copied / artifacts.MODEL, load_external_data=False)
    kept = [output for output in graph.graph.output if output.name != missing]
    del graph.graph.output[:]
    graph.graph.output.extend(kept)
    onnx.save(graph, copied / artifacts.MODEL)
    with pytest.raises(
        InputError, match=rf"model\.onnx: no output {missing}; this is not a decoder"
    ):
        OnnxModel(copied)


def _raise(message: str) -> Callable[..., None]:
    def run(*_: Any) -> None:
        raise RuntimeException(message)

    return run


def test_says_that_memory_is_short(model: OnnxModel, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _raise(
        "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory for buffer"
    )
    monkeypatch.setattr(model, "session", SimpleNamespace(run=run))
    with pytest.raises(
        ResourceError, match=r"not enough memory for input_ids of \[2, 20\]; use few"
    ):
        model.step(IDS, model.new_cache(2))


def test_a_graph_that_fails_is_named(model: OnnxModel, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _raise("[ONNXRuntimeError] : 1 : FAIL : shapes do not match\nmore")
    monkeypatch.setattr(model, "session", SimpleNamespace(run=run))
    with pytest.raises(InputError, match=r"fails in ONNX Runtime \(shapes do not match\); export"):
        model.step(IDS, model.new_cache(2))


def test_a_bfloat16_cache_crosses_bit_by_bit(tmp_path: Path) -> None:
    graph = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 23]>
        decoder (int64[batch, length] input_ids, bfloat16[batch, 2, past, 3] past)
            => (bfloat16[batch, length, 4] logits, bfloat16[batch, 2, total, 3] present) {
            one = Constant <value_float = 1.00390625> ()
            shape = Constant <value_ints = [0, 1, 0, 1]> ()
            axes = Constant <value_ints = [1, 3]> ()
            repeats = Constant <value_ints = [1, 2, 1, 3]> ()
            channels = Constant <value_ints = [1, 1, 4]> ()
            last = Constant <value_ints = [-1]> ()
            numbers = Cast <to = 1> (input_ids)
            four = Unsqueeze (numbers, axes)
            tiled = Tile (four, repeats)
            new = Cast <to = 16> (tiled)
            present = Concat <axis = 2> (past, new)
            three = Unsqueeze (numbers, last)
            wide = Tile (three, channels)
            logits = Cast <to = 16> (wide)
        }
    """)
    graph.graph.inputs[1].name = "past_key_values.0.key"
    graph.graph.outputs[1].name = "present.0.key"
    ir.save(graph, tmp_path / artifacts.MODEL)
    artifacts.save_manifest(tmp_path, {})
    model = OnnxModel(tmp_path, threads=1)
    logits, cache = model.step(np.array([[1, 3]]), model.new_cache(1))
    logits, cache = model.step(np.array([[2]]), cache)
    key = cache["past_key_values.0.key"]
    assert key.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(key[0, 1, :, 2].astype(np.float32), [1, 3, 2])
    np.testing.assert_array_equal(logits, np.full((1, 1, 4), 2, np.float32))
    assert logits.dtype == np.float32
    assert model.cache_bytes_per_token == 2 * 3 * 2


def test_importing_the_runtime_imports_no_torch() -> None:
    code = (
        "import sys, quarot_onnx.runtime, quarot_onnx.evaluate\n"
        "print([m for m in ('torch', 'transformers', 'onnxruntime') if m in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert found.stdout.strip() == "[]"


# --- Text -----------------------------------------------------------------------------------------


@pytest.fixture
def bytewise(tmp_path: Path) -> Tokenizer:
    """One token per byte, and <s> in front of a prompt; as a file that truncates and pads."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    built = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[])
    )
    built.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = tokenizers.decoders.ByteLevel()
    built.add_special_tokens(["<s>"])
    built.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 256)]
    )
    built.enable_truncation(4)
    built.enable_padding(length=6)
    built.save(str(tmp_path / "tokenizer.json"))
    return load_tokenizer(tmp_path)


def test_text_survives_a_round_trip_without_truncation(bytewise: Tokenizer) -> None:
    text = "naïve 東京 🎉, at length"
    ids = bytewise.encode(text, add_special_tokens=False)
    assert len(ids) == len(text.encode())
    assert bytewise.decode(ids) == text
    assert bytewise.vocabulary_size == 257


def test_special_tokens_are_for_prompts_and_never_shown(bytewise: Tokenizer) -> None:
    ids = bytewise.encode("ab")
    assert ids == [256, *bytewise.encode("ab", add_special_tokens=False)]
    assert bytewise.decode(ids) == "ab"


def test_streamed_text_never_shows_half_a_character(bytewise: Tokenizer) -> None:
    pieces = list(bytewise.stream(bytewise.encode("aï🎉b")))
    assert pieces == ["a", "ï", "🎉", "b"]


def test_streamed_text_ends_with_what_it_ends_with(bytewise: Tokenizer) -> None:
    ids = bytewise.encode("a🎉", add_special_tokens=False)[:-1]
    assert "".join(bytewise.stream(ids)) == bytewise.decode(ids)


def test_names_the_missing_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tokenizer\.json: no such file; put the model's token"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["", "{}", "<html>", '{"version": "1.0", "model": 3}'])
def test_names_the_damaged_tokenizer(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=r"tokenizer\.json: not a tokenizer \(.*\); download it"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_of_vocabulary_and_merges_is_read_too(tmp_path: Path) -> None:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate([*alphabet, "ab", "<|endoftext|>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n", encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("abc", add_special_tokens=False)
    assert ids == [vocabulary["ab"], vocabulary["c"]]
    assert tokenizer.decode(ids) == "abc"


def test_names_the_damaged_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{", encoding="utf-8")
    (tmp_path / "merges.txt").write_text("", encoding="utf-8")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(
        InputError, match=r"its tokenizer cannot be read \(.*\); add tokenizer\.json"
    ):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ('{"eos_token_id": [2, 7]}', '{"eos_token_id": 3}', {2, 7}),
        ('{"eos_token_id": null}', '{"eos_token_id": 3}', {3}),
        (None, '{"eos_token_id": 0}', {0}),
        (None, "{}", set()),
        (None, None, set()),
    ],
)
def test_the_ids_that_end_a_text_come_from_the_generation_configuration_first(
    tmp_path: Path, generation: str | None, config: str | None, expected: set[int]
) -> None:
    for name, content in (("generation_config.json", generation), ("config.json", config)):
        if content is not None:
            (tmp_path / name).write_text(content, encoding="utf-8")
    assert eos_token_ids(tmp_path) == expected


def test_names_a_damaged_generation_configuration(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(InputError, match=r"generation_config\.json: not a JSON object .*; export"):
        eos_token_ids(tmp_path)
