# SPDX-License-Identifier: Apache-2.0
"""A model directory is verified before it is trusted: what is wrong, where, and what to do."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from quarot_onnx.errors import InputError, QuarotError, UnsupportedModelError
from quarot_onnx.export.checkpoint import (
    Checkpoint,
    CheckpointSource,
    Rows,
    check_float,
    read_json,
)

INDEX = "model.safetensors.index.json"
EDITS = {"F32": np.float32, "F16": np.float16, "F64": np.float64, "BF16": ml_dtypes.bfloat16}


def safetensors(tensors: dict[str, np.ndarray], dtype: str = "F32", **header: Any) -> bytes:
    """The bytes of a safetensors file; `header` replaces entries of its header."""
    entries, body = {}, b""
    for name, array in tensors.items():
        content = array.astype(EDITS.get(dtype, array.dtype)).tobytes()
        offsets = [len(body), len(body) + len(content)]
        entries[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": offsets}
        body += content
    text = json.dumps(entries | header).encode()
    return struct.pack("<Q", len(text)) + text + body


MATRIX = np.arange(6.0).reshape(2, 3)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Two tensors in one file."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_bytes(safetensors({"a": MATRIX, "b": MATRIX + 1}))
    return tmp_path


def _shard(directory: Path) -> Path:
    """The same tensors in two shards with an index."""
    (directory / "model.safetensors").unlink()
    for number, (name, array) in enumerate((("a", MATRIX), ("b", MATRIX + 1)), start=1):
        path = directory / f"model-{number}.safetensors"
        path.write_bytes(safetensors({name: array}))
    mapping = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (directory / INDEX).write_text(json.dumps({"weight_map": mapping}))
    return directory


def refusal(directory: Path, error: type[QuarotError] = InputError) -> str:
    with pytest.raises(error) as caught:
        Checkpoint(directory)
    message = str(caught.value)
    assert "\n" not in message
    assert "; " in message
    assert str(directory) in message
    return message.replace(str(directory), "DIR")


# --- Reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", EDITS)
def test_reads_every_float_dtype_as_float64(directory: Path, dtype) -> None:
    (directory / "model.safetensors").write_bytes(safetensors({"a": MATRIX / 3}, dtype))
    source = CheckpointSource(Checkpoint(directory).tensor("a"))
    values = source.read((slice(None), slice(None)))
    assert values.dtype == np.float64
    np.testing.assert_array_equal(values, (MATRIX / 3).astype(EDITS[dtype]).astype(np.float64))


def test_reads_parts_and_transposes(directory: Path) -> None:
    entry = Checkpoint(directory).tensor("b")
    transposed = CheckpointSource(entry, transposed=True)
    assert transposed.shape == (3, 2)
    part = transposed.read((slice(1, 3), slice(0, 1)))
    np.testing.assert_array_equal(part, (MATRIX + 1).T[1:3, 0:1])
    assert part.flags.c_contiguous


def test_shards_hold_the_same_tensors_as_a_single_file(directory: Path) -> None:
    single = {
        name: CheckpointSource(entry).read((slice(None), slice(None)))
        for name, entry in Checkpoint(directory).tensors.items()
    }
    sharded = Checkpoint(_shard(directory))
    assert [file.name for file in sharded.files] == ["model-1.safetensors", "model-2.safetensors"]
    for name, values in single.items():
        source = CheckpointSource(sharded.tensor(name))
        np.testing.assert_array_equal(source.read((slice(None), slice(None))), values)


def test_a_file_that_is_a_link_works(directory: Path) -> None:
    """The layout of the Hugging Face cache: snapshots link to blobs."""
    (directory / "blobs").mkdir()
    (directory / "model.safetensors").rename(directory / "blobs" / "0123")
    (directory / "model.safetensors").symlink_to("blobs/0123")
    assert sorted(Checkpoint(directory).tensors) == ["a", "b"]


def test_metadata_in_a_header_is_no_tensor(directory: Path) -> None:
    content = safetensors({"a": MATRIX}, __metadata__={"format": "pt"})
    (directory / "model.safetensors").write_bytes(content)
    assert list(Checkpoint(directory).tensors) == ["a"]


@pytest.mark.parametrize("length", [0x3C, 0x7B, 0x3C20, 0x7B20, 0x3C0A])
def test_a_header_length_that_spells_a_bracket_is_no_web_page(directory: Path, length) -> None:
    """The first bytes of a file are the header's length, which may well be an ASCII code."""
    header = b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
    header = header.ljust(length)
    if len(header) > length:
        header = b'{"__metadata__": {}}'.ljust(length)
    content = struct.pack("<Q", len(header)) + header + bytes(4)
    (directory / "model.safetensors").write_bytes(content)
    Checkpoint(directory)


def test_a_missing_tensor_is_named(directory: Path) -> None:
    with pytest.raises(InputError) as caught:
        Checkpoint(directory).tensor("model.norm.weight")
    assert str(caught.value) == (
        f"{directory}: tensor model.norm.weight is missing from the weights; "
        "download the model again or check config.json"
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_located(directory: Path, bad) -> None:
    array = MATRIX.copy()
    array[1, 2] = bad
    (directory / "model.safetensors").write_bytes(safetensors({"a": array}))
    source = CheckpointSource(Checkpoint(directory).tensor("a"), transposed=True)
    with pytest.raises(InputError) as caught:
        source.read((slice(1, 3), slice(0, 2)))
    assert str(caught.value) == (
        f"{directory}/model.safetensors: tensor a has 1 values that are not finite "
        "(first at [1, 2]); download it again or repair the model"
    )


def test_a_dtype_that_is_not_float_is_named(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(safetensors({"a": MATRIX.astype("i8")}, "I64"))
    with pytest.raises(UnsupportedModelError) as caught:
        check_float(Checkpoint(directory).tensor("a"))
    assert str(caught.value) == (
        f"{directory}/model.safetensors: tensor a has dtype I64; supported are F64, F32, F16, BF16"
    )


def test_equal_tensors_are_recognized(directory: Path) -> None:
    tensors = {"a": MATRIX, "same": MATRIX, "other": MATRIX + 1, "shape": MATRIX.T}
    (directory / "model.safetensors").write_bytes(safetensors(tensors))
    checkpoint = Checkpoint(directory)
    assert checkpoint.are_equal("a", "same")
    assert not checkpoint.are_equal("a", "other")
    assert not checkpoint.are_equal("a", "shape")
    assert checkpoint.are_equal("a", "absent")


def test_integer_tensors_are_not_compared_but_refused(directory: Path) -> None:
    tensors = {"a": MATRIX.astype("i8"), "same": MATRIX.astype("i8")}
    (directory / "model.safetensors").write_bytes(safetensors(tensors, "I64"))
    with pytest.raises(UnsupportedModelError, match="tensor a has dtype I64"):
        Checkpoint(directory).are_equal("a", "same")


# --- Damage ---------------------------------------------------------------------------------------


def _header(**entry: Any) -> bytes:
    """A file whose one entry in the header is changed."""
    right = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    return safetensors({"a": MATRIX}, a=right | entry)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
            "DIR/model.safetensors: a git-lfs pointer, not the weights; run `git lfs pull`",
        ),
        (b"<!DOCTYPE html><html>gated</html>", "looks like a web page or JSON; download"),
        (b"\n\n <html>not found</html>", "looks like a web page or JSON; download"),
        (b'{"error": "not found"}', "looks like a web page or JSON; download"),
        (struct.pack("<Q", 2**62) + b"{}", "header of 4611686018427387904 bytes"),
        (struct.pack("<Q", 4) + b"\xff\xfe\xff\xfe", "header is damaged ("),
        (struct.pack("<Q", 4) + b"nope", "header is damaged ("),
        (struct.pack("<Q", 2) + b"[]", "header is damaged ("),
        (struct.pack("<Q", 8) + b'{"a": 1}', "header is damaged ("),
        (_header(shape=[2, -3]), "tensor a has 24 bytes where shape [2, -3] of F32 needs -24"),
        (_header(shape=[2, 4]), "tensor a has 24 bytes where shape [2, 4] of F32 needs 32"),
        (_header(shape=[2**40, 2**40]), "of F32 needs 4835703278458516698824704"),
        (_header(shape=["2", 3]), "tensor a has offsets or sizes that are no whole numbers"),
        (_header(data_offsets=[0.0, 24.0]), "tensor a has offsets or sizes that are no whole"),
        (_header(data_offsets=[-24, 0]), "tensor a has 24 bytes where"),
        (_header(data_offsets=[8, 32]), "truncated, tensor a ends at byte"),
        (_header(data_offsets=[0]), "header is damaged ("),
    ],
)
def test_a_damaged_weight_file_is_refused(directory: Path, content, message) -> None:
    (directory / "model.safetensors").write_bytes(content)
    assert message in refusal(directory)


@pytest.mark.parametrize("missing", [1, 8, 24])
def test_a_truncated_file_names_its_first_missing_tensor(directory: Path, missing) -> None:
    path = directory / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-missing])
    assert refusal(directory) == (
        f"DIR/model.safetensors: truncated, tensor b ends at byte {len(content)} of "
        f"{len(content) - missing}; download it again"
    )


@pytest.mark.parametrize("kept", [0, 4, 60])
def test_a_file_that_ends_in_its_header_says_how_long_that_should_be(directory: Path, kept) -> None:
    path = directory / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:kept])
    length = struct.unpack("<Q", content[:8])[0] if kept >= 8 else 0
    assert refusal(directory) == (
        f"DIR/model.safetensors: header of {length} bytes in a file of {kept}, which is truncated "
        "or not safetensors; download it again"
    )


@given(position=st.integers(0, 300), byte=st.integers(0, 255))
def test_any_changed_byte_is_read_or_refused(tmp_path_factory, position, byte) -> None:
    directory = tmp_path_factory.mktemp("fuzz")
    (directory / "config.json").write_text('{"model_type": "llama"}')
    content = bytearray(safetensors({"a": MATRIX, "b": MATRIX}))
    content[position % len(content)] = byte
    (directory / "model.safetensors").write_bytes(content)
    try:
        checkpoint = Checkpoint(directory)
        for entry in checkpoint.tensors.values():
            check_float(entry)
            CheckpointSource(entry).read(tuple(slice(None) for _ in entry.shape))
    except QuarotError:
        pass


def test_a_directory_or_a_pipe_in_place_of_a_file_is_refused_at_once(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors").mkdir()
    assert "DIR/model.safetensors: not a regular file" in refusal(directory)
    (directory / "config.json").unlink()
    os.mkfifo(directory / "config.json")
    assert "DIR/config.json: no such file" in refusal(directory)


# --- Index ----------------------------------------------------------------------------------------


def test_a_missing_shard_is_named_with_what_it_holds(directory: Path) -> None:
    (_shard(directory) / "model-2.safetensors").unlink()
    assert refusal(directory) == (
        "DIR/model-2.safetensors: shard is missing (1 tensors, first b); download it"
    )


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors"])
def test_a_shard_outside_the_directory_is_refused(directory: Path, name) -> None:
    (_shard(directory) / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    assert refusal(directory) == (
        f"DIR/{INDEX}: shard {name!r} is not a plain file name; download it again"
    )


@pytest.mark.parametrize("name", ["..", ".", ""])
def test_a_shard_that_is_a_directory_is_refused(directory: Path, name) -> None:
    (_shard(directory) / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    assert "not a " in refusal(directory)


def test_a_tensor_that_is_not_in_its_shard_is_named(directory: Path) -> None:
    mapping = {"a": "model-1.safetensors", "b": "model-1.safetensors"}
    (_shard(directory) / INDEX).write_text(json.dumps({"weight_map": mapping}))
    assert refusal(directory) == (
        f"DIR/{INDEX}: tensor b is not in model-1.safetensors; download it again"
    )


def test_a_tensor_in_two_shards_is_named(directory: Path) -> None:
    _shard(directory)
    (directory / "model-2.safetensors").write_bytes(safetensors({"a": MATRIX, "b": MATRIX}))
    assert refusal(directory) == (
        "DIR/model-2.safetensors: tensor a is also in model-1.safetensors; download the model again"
    )


@pytest.mark.parametrize("content", ["{}", "[]", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_an_index_without_a_map_is_refused(directory: Path, content) -> None:
    (_shard(directory) / INDEX).write_text(content)
    assert refusal(directory) == f"DIR/{INDEX}: has no weight_map; download it again"


# --- Configuration --------------------------------------------------------------------------------


def test_a_directory_that_does_not_exist_is_named(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none") == (
        "DIR: no such directory; give a Hugging Face model directory"
    )


def test_an_empty_directory_lacks_a_config(tmp_path: Path) -> None:
    assert refusal(tmp_path) == ("DIR/config.json: no such file; give a complete model directory")


def test_a_directory_without_weights_says_what_it_looked_for(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    assert refusal(directory) == (f"DIR: no model.safetensors and no {INDEX}; download the weights")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_refused(directory: Path, name) -> None:
    (directory / "model.safetensors").rename(directory / name)
    assert refusal(directory, UnsupportedModelError) == (
        f"DIR/{name}: pickled weights can run code and are refused; convert them with "
        "model.save_pretrained(directory, safe_serialization=True)"
    )


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ("{", InputError, "DIR/config.json:1:2: not JSON ("),
        ('{\n  "a": tru\n}', InputError, "DIR/config.json:2:8: not JSON ("),
        ("\xff", InputError, "DIR/config.json: not UTF-8 text at byte 0; download it again"),
        ("[" * 200_000, InputError, "DIR/config.json: not sensible JSON ("),
        ("9" * 5000, InputError, "DIR/config.json: not sensible JSON ("),
        ("{}", InputError, "DIR/config.json: has no model_type; give a Hugging Face model"),
        ('{"model_type": 3}', InputError, "has no model_type"),
        ("[]", InputError, "has no model_type"),
        (
            '{"model_type": "llama", "auto_map": {"AutoModel": "modeling.X"}}',
            UnsupportedModelError,
            "DIR/config.json: auto_map asks to run the model's own code, which is refused; choose",
        ),
        (
            '{"model_type": "llama", "quantization_config": {"quant_method": "awq"}}',
            UnsupportedModelError,
            "DIR/config.json: the weights are already quantized (awq); give the original",
        ),
        (
            '{"model_type": "llama", "quantization_config": "gptq"}',
            UnsupportedModelError,
            "the weights are already quantized (gptq); give the original float model",
        ),
    ],
    ids=lambda value: "",
)
def test_a_bad_config_is_refused(directory: Path, config, error, message) -> None:
    (directory / "config.json").write_bytes(config.encode("latin-1"))
    assert message in refusal(directory, error)


def test_a_huge_json_is_refused_unread(directory: Path) -> None:
    with (directory / "config.json").open("wb") as file:
        file.truncate(60_000_000)
    assert refusal(directory) == (
        "DIR/config.json: larger than 50000000 bytes; this is not such a file"
    )


@given(st.text(max_size=60))
def test_any_text_is_json_or_refused(tmp_path_factory, content) -> None:
    path = tmp_path_factory.mktemp("json") / "x.json"
    path.write_text(content, encoding="utf-8", newline="")
    try:
        read_json(path)
    except InputError as error:
        named = str(path) in str(error)
    else:
        named = True
    assert named


def test_a_number_that_is_not_finite_is_named_by_its_row_on_disk(tmp_path: Path) -> None:
    array = np.zeros((6, 2), np.float32)
    array[4, 1] = np.nan
    save_file({"w": array}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    entry = Checkpoint(tmp_path).tensor("w")
    source = CheckpointSource(entry, transposed=True, rows=Rows(period=3, start=1, stop=2))
    assert source.shape == (2, 2)
    with pytest.raises(InputError, match=r"1 values that are not finite \(first at \[4, 1\]\)"):
        source.read((slice(0, 2), slice(0, 2)))
