# SPDX-License-Identifier: Apache-2.0
"""An engine in a Triton repository, as far as a machine without a GPU can tell."""

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from quarot_onnx.artifacts import changed_files, load_manifest, save_manifest, sha256
from quarot_onnx.errors import MissingDependencyError, UsageError
from quarot_onnx.export.tensorrt.directory import PLAN
from quarot_onnx.export.tensorrt.engine import BuildOptions, build
from quarot_onnx.export.triton import triton_from_artifact
from quarot_onnx.export.triton.model_config import from_text
from quarot_onnx.plugins import library
from quarot_onnx.runtime import Tokenizer
from quarot_onnx.runtime.batching import SeparateBatch, batch_of
from quarot_onnx.runtime.generation import generate
from quarot_onnx.runtime.serving import Request, Scheduler
from quarot_onnx.runtime.tensorrt import EngineModel
from tests.runtime.test_serving import Recorded
from tests.tensorrt.test_adapter import (  # noqa: F401  # fixtures
    LIMITS,
    _library,
    artifact,
    machine,
)
from tests.test_triton import require_tritonclients_schema_to_read, server_python

TOKENIZER = Path(__file__).parents[2] / "examples" / "tiny_llama" / "model" / "tokenizer.json"


@pytest.fixture
def engine(
    artifact: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """An engine directory with a tokenizer; its plugin library is on this machine."""
    plugins = tmp_path / "built" / "libquarot_plugins.so"
    plugins.parent.mkdir()
    plugins.write_bytes(b"library")
    plugins.with_suffix(".json").write_text("{}")
    found = replace(_library(sha256(plugins)), path=plugins)
    monkeypatch.setattr(library, "find", lambda target="cuda": found)
    monkeypatch.setattr(library, "load", lambda target="cuda": found)
    source = Path(shutil.copytree(artifact, tmp_path / "artifact"))
    shutil.copyfile(TOKENIZER, source / "tokenizer.json")
    save_manifest(source, load_manifest(source))
    build(source, tmp_path / "engine", LIMITS, BuildOptions())
    return tmp_path / "engine"


def test_a_repository_of_an_engine_holds_all_that_runs_it(engine: Path, tmp_path: Path) -> None:
    manifest = triton_from_artifact(engine, tmp_path / "out", name="small", engine_model=True)
    assert changed_files(tmp_path / "out", manifest) == []
    assert manifest["parameters"]["runtime"] == "tensorrt"
    assert manifest["parameters"]["context_length"] == str(LIMITS.max_seq_len)
    version = tmp_path / "out" / "small" / "1"
    plan = (engine / PLAN).read_bytes()
    assert (version / "artifact" / PLAN).read_bytes() == plan
    assert (version / "plugins" / "libquarot_plugins.so").read_bytes() == b"library"
    assert (tmp_path / "out" / "small_engine" / "1" / PLAN).read_bytes() == plan


def test_the_engine_alone_keeps_its_cache_as_shared_state(engine: Path, tmp_path: Path) -> None:
    triton_from_artifact(engine, tmp_path / "out", name="small", engine_model=True)
    path = tmp_path / "out" / "small_engine" / "config.pbtxt"
    require_tritonclients_schema_to_read(path)
    config = from_text(path.read_text())
    assert (config.name, config.platform) == ("small_engine", "tensorrt_plan")
    inputs = {tensor.name: (tensor.data_type, list(tensor.dims)) for tensor in config.input}
    assert inputs == {
        "input_ids": (9, [-1]),
        "position_ids": (9, [-1]),
        "lengths": (8, [1]),
    }
    reshaped = [tensor.name for tensor in config.input if tensor.HasField("reshape")]
    assert reshaped == ["lengths"]
    assert [(tensor.name, list(tensor.dims)) for tensor in config.output] == [("logits", [-1, 128])]
    states = config.sequence_batching.state
    assert {(state.input_name, state.output_name) for state in states} == {
        (f"past_key_values.{layer}.{kind}", f"present.{layer}.{kind}")
        for layer in range(3)
        for kind in ("key", "key_scale", "key_zero", "value", "value_scale", "value_zero")
    }
    capacity = load_manifest(engine)["tensorrt"]["limits"]["capacity"]
    for state in states:
        assert state.use_same_buffer_for_input_output
        assert state.dims[1] == capacity
        assert min(state.dims) > 0
        assert list(state.initial_state[0].dims) == list(state.dims)
        assert state.initial_state[0].zero_data


def test_the_servers_python_needs_nothing_else_to_load_the_engines_modules(
    engine: Path, tmp_path: Path
) -> None:
    triton_from_artifact(engine, tmp_path / "out", name="small")
    version = tmp_path / "out" / "small" / "1"
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import quarot_onnx.runtime.tensorrt as runtime\n"
        "print(runtime.__file__, 'torch' in sys.modules, 'onnx' in sys.modules)"
    )
    done = subprocess.run(
        [server_python(), "-I", "-c", program, version],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        str(version / "quarot_onnx" / "runtime" / "tensorrt.py"), "False", "False",
    ]  # fmt: skip


def test_an_engine_serves_what_it_generates(engine: Path) -> None:
    model = EngineModel(engine)
    assert isinstance(batch_of(model), SeparateBatch)
    spelled = Tokenizer(
        lambda text, special: [ord(letter) for letter in text],
        lambda ids: "".join(chr(0x100 + token) for token in ids),
        128,
    )
    texts = ("a", "bcd", "quarot")
    expected = {}
    for text in texts:
        ids = generate(model, [ord(letter) for letter in text], max_new_tokens=8)
        expected[text] = spelled.decode(list(ids))
    scheduler = Scheduler(model, spelled, eos_token_ids=[], context_length=60, max_streams=2)
    replies = {text: Recorded() for text in texts}
    for text, reply in replies.items():
        scheduler.submit(Request(text, max_tokens=8), reply)
    for text, reply in replies.items():
        assert reply.wait().text == expected[text]
    scheduler.close()


def test_refuses_another_runtime_and_another_plugin_library(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError) as usage:
        triton_from_artifact(engine, tmp_path / "out", runtime="ort-cpu")
    assert str(usage.value) == (
        f"--runtime ort-cpu: {engine} holds an engine; give what `export` wrote"
    )
    other = _library("2" * 64)
    monkeypatch.setattr(library, "find", lambda target="cuda": other)
    with pytest.raises(MissingDependencyError, match=r"another plugin library than .* \(22222"):
        triton_from_artifact(engine, tmp_path / "out")
    assert not (tmp_path / "out").exists()
