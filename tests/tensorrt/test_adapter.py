# SPDX-License-Identifier: Apache-2.0
"""Building and running an engine, against the real bindings' names and signatures."""

import ast
import inspect
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polygraphy.cuda
import pytest

from quarot_onnx import artifacts
from quarot_onnx.errors import (
    InputError,
    MissingDependencyError,
    ResourceError,
    UnsupportedModelError,
    UsageError,
)
from quarot_onnx.export.tensorrt import adapter
from quarot_onnx.export.tensorrt import engine as engine_module
from quarot_onnx.export.tensorrt.directory import PLAN, load_engine_manifest
from quarot_onnx.export.tensorrt.engine import BuildOptions, Limits, build
from quarot_onnx.export.tensorrt.lowering import PLUGINS
from quarot_onnx.plugins import library
from quarot_onnx.runtime import OnnxModel, load_model
from quarot_onnx.runtime.tensorrt import EngineModel
from quarot_onnx.validate import validate
from tests.conftest import Exported, HuggingFace
from tests.tensorrt import fake_tensorrt as fake
from tests.test_gate import run
from tests.test_validate import stage

LIMITS = Limits(max_batch=2, max_input_len=40, max_seq_len=60)


def _library(digest: str = "1" * 64) -> library.PluginLibrary:
    names = "factors bits clip_ratio heads activation_layout dtype weight_layout rotate scale"
    fields = {"attributes": [{"name": name} for name in names.split()]}
    plugins = dict.fromkeys(PLUGINS, fields)
    return library.PluginLibrary(Path("p.so"), digest, "cuda", ("90a",), "id", plugins, True)


@pytest.fixture(params=["11.4.0.106", "10.13.0"])
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """A machine with TensorRT, a GPU and the plugin library."""
    release = request.getfixturevalue("version") if "version" in request.fixturenames else "11.4.0"
    monkeypatch.setitem(sys.modules, "tensorrt", fake.module(release))
    monkeypatch.setattr(polygraphy.cuda, "wrapper", fake.Cuda)
    monkeypatch.setattr(library, "find", lambda target="cuda": _library())
    monkeypatch.setattr(library, "load", lambda target="cuda": _library())
    yield
    for holder, name, value in (
        (fake.OnnxParser, "missing", set()),
        (fake.OnnxParser, "refuses", ""),
        (fake.Builder, "is_missing", False),
        (fake.ICudaEngine, "copies_cache", False),
    ):
        setattr(holder, name, value)


@pytest.fixture
def artifact(exported: Exported) -> Path:
    return exported("llama", "w4a4kv4", (), "float16")


@pytest.fixture
def engine(artifact: Path, tmp_path: Path) -> Path:
    build(artifact, tmp_path / "engine", LIMITS, BuildOptions())
    return tmp_path / "engine"


# --- The bindings ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(fake.classes()))
def test_every_member_that_the_tests_run_is_one_of_the_real_bindings(name: str) -> None:
    real = fake.API[name]
    for member, value in vars(fake.classes()[name]).items():
        is_ours = member.startswith("_") or not (callable(value) or isinstance(value, property))
        if is_ours:
            continue
        assert member in real, f"tensorrt.{name} has no {member}"
        signature = real[member] or ""
        if callable(value) and "*args" not in signature and not inspect.isclass(value):
            given = list(inspect.signature(value).parameters)
            inside = signature[signature.index("(") + 1 : signature.rindex(") ->")]
            assert given == re.findall(r"(\w+): ", re.sub(r"\[.*?\]", "", inside)), signature


def test_no_other_module_of_the_package_imports_tensorrt() -> None:
    root = Path(adapter.__file__).parents[2]
    for path in [*root.glob("export/**/*.py"), *root.glob("quarot_onnx/**/*.py")]:
        imported = {
            alias.name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        assert "tensorrt" not in imported or path.name in ("adapter.py", "doctor.py"), path


# --- Building -------------------------------------------------------------------------------------


def test_builds_an_engine_with_both_profiles_and_says_what_it_is(
    artifact: Path, tmp_path: Path, version: str
) -> None:
    options = BuildOptions(
        timing_cache=tmp_path / "cache",
        weight_streaming=True,
        version_compatible=True,
        refit=True,
        workspace_mb=64,
        optimization_level=2,
    )
    manifest = build(artifact, tmp_path / "engine", LIMITS, options)
    built = manifest["tensorrt"]
    assert built["engine"]["tensorrt"] == version
    assert built["plugins"]["sha256"] == "1" * 64
    assert built["engine"]["plugin_layers"] > 0
    assert built["engine"]["warnings"] == ["a warning of two lines"]
    assert PLAN in manifest["files"]
    assert fake.Builder.last is not None
    network, config = fake.Builder.last._network, fake.Builder.last._config
    typed = 1 << int(fake.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert network._flags == (0 if version.startswith("11") else typed)
    assert {flag.name for flag in config._flags} == {
        *("WEIGHT_STREAMING", "VERSION_COMPATIBLE", "REFIT")
    }
    assert {feature.name for feature in config._previews} == {"ALIASED_PLUGIN_IO_10_03"}
    assert config._pools == {fake.MemoryPoolType.WORKSPACE: 64 << 20}
    assert config.builder_optimization_level == 2
    assert config.plugins_to_serialize == ["p.so"]
    assert [p._shapes["input_ids"] for p in config._profiles] == [
        ([1, 1], [2, 1], [2, 1]),
        ([1, 1], [2, 20], [2, 40]),
    ]
    assert (tmp_path / "cache").read_bytes() == b"measured;"
    build(artifact, tmp_path / "engine", LIMITS, options, force=True)
    assert (tmp_path / "cache").read_bytes() == b"measured;measured;"


def test_a_function_that_was_inlined_in_place_of_its_plugin_is_refused(
    artifact: Path, tmp_path: Path
) -> None:
    fake.OnnxParser.missing = {"KvAttention"}
    with pytest.raises(UnsupportedModelError, match=r"(\d+) of (\d+) quarot nodes became plugin"):
        build(artifact, tmp_path / "engine", LIMITS, BuildOptions())
    assert not (tmp_path / "engine").exists()


def test_what_the_parser_says_is_said_in_one_line(artifact: Path, tmp_path: Path) -> None:
    fake.OnnxParser.refuses = "UNSUPPORTED_NODE"
    with pytest.raises(UnsupportedModelError, match=r"parser refuses it \(In node 3.*NODE second"):
        build(artifact, tmp_path / "engine", LIMITS, BuildOptions())


def test_a_machine_without_a_gpu_is_a_missing_dependency(artifact: Path, tmp_path: Path) -> None:
    fake.Builder.is_missing = True
    with pytest.raises(MissingDependencyError, match=r"no builder \(CUDA initialization failure"):
        build(artifact, tmp_path / "engine", LIMITS, BuildOptions())


def test_plugins_without_code_for_the_gpu_are_said_before_the_build(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = {"name": "a GPU", "compute_capability": "8.0"}
    monkeypatch.setattr(engine_module, "_gpu", lambda: gpu)
    with pytest.raises(MissingDependencyError, match="built for 90a, and the GPU is 80; run make"):
        build(artifact, tmp_path / "engine", LIMITS, BuildOptions())
    gpu["compute_capability"] = "9.0"
    built = build(artifact, tmp_path / "engine", LIMITS, BuildOptions())
    assert built["tensorrt"]["engine"]["gpu"] == gpu


def test_builds_only_for_the_tensorrt_that_is_there(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--tensorrt-version 10\.9: this machine has TensorRT 11"):
        build(artifact, tmp_path / "engine", LIMITS, BuildOptions(tensorrt_version="10.9"))


# --- Running --------------------------------------------------------------------------------------


def _distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_an_engine_runs_as_the_onnx_graph_does(artifact: Path, engine: Path) -> None:
    model, onnx_model = load_model(engine, runtime="tensorrt"), OnnxModel(artifact, threads=1)
    assert isinstance(model, EngineModel)
    assert model.vocabulary_size == 128
    assert model.cache_bytes_per_token == 3 * 2 * 2 * (32 + 4 + 4)
    ids = np.random.default_rng(0).integers(0, 128, (3, 45))  # more rows and tokens than one call
    logits, cache = model.step(ids, model.new_cache(3))
    expected, onnx_cache = onnx_model.step(ids, onnx_model.new_cache(3))
    assert logits.shape == expected.shape
    assert _distance(logits, expected) < 0.3  # two hosts whose float16 norms round differently
    logits, _ = model.step(ids[:, :2], cache)
    expected, _ = onnx_model.step(ids[:, :2], onnx_cache)
    assert _distance(logits, expected) < 0.3


def test_padding_on_the_left_changes_nothing(engine: Path) -> None:
    model = EngineModel(engine)
    ids = np.random.default_rng(1).integers(0, 128, (2, 9))
    mask = np.ones((2, 9), np.int64)
    mask[1, :4] = 0
    logits, cache = model.step(ids, model.new_cache(2), mask)
    alone, alone_cache = model.step(ids[1:, 4:], model.new_cache(1))
    np.testing.assert_array_equal(logits[1, 4:], alone[0])
    assert not logits[1, :4].any()
    mask = np.concatenate([mask, np.ones((2, 1), np.int64)], axis=1)
    following, _ = model.step(ids[:, :1], cache, mask)
    expected, _ = model.step(ids[1:, :1], alone_cache)
    np.testing.assert_array_equal(following[1], expected[0])
    with pytest.raises(ValueError, match="padding behind a token"):
        model.step(ids, model.new_cache(2), mask[:, ::-1][:, :9])


def test_a_cache_may_be_continued_twice_and_is_copied_only_then(engine: Path) -> None:
    model = EngineModel(engine)
    ids = np.random.default_rng(2).integers(0, 128, (1, 12))
    _, cache = model.step(ids, model.new_cache(1))
    fake.Cuda.copied = 0
    first, first_cache = model.step(ids[:, :1], cache)
    assert fake.Cuda.copied == 0
    other, _ = model.step(ids[:, 5:6], cache)
    assert fake.Cuda.copied == sum(m.size for m in cache["groups"][0].store.memory.values())
    again, _ = model.step(ids[:, :1], cache)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    after, _ = model.step(ids[:, 1:2], first_cache)
    both, _ = model.step(ids[:, :2], cache)
    np.testing.assert_allclose(after[:, 0], both[:, 1], atol=1e-2)


def test_device_memory_is_freed_with_its_cache(engine: Path) -> None:
    model = EngineModel(engine)
    before = len(fake.Cuda.held)
    cache = model.new_cache(2)
    assert len(fake.Cuda.held) == before + 3 * 2 * 3
    del cache
    assert len(fake.Cuda.held) == before


def test_more_tokens_than_the_engine_was_built_for_are_refused(engine: Path) -> None:
    model = EngineModel(engine)
    with pytest.raises(
        ResourceError, match=r"model\.plan: 61 tokens, it was built for 60; build w"
    ):
        model.step(np.zeros((1, 61), np.int64), model.new_cache(1))


def test_generation_and_evaluation_take_the_engine(
    engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = EngineModel(engine)
    from quarot_onnx.runtime.generation import generate  # noqa: PLC0415

    tokens = list(generate(model, [1, 2, 3], max_new_tokens=4))
    assert len(tokens) == 4
    code, _, err = run(capsys, "generate", engine, "--prompt", "x", "--runtime", "tensorrt")
    assert code == 3  # this small model has no tokenizer: the engine was loaded before that
    assert "tokenizer" in err


# --- Trust ----------------------------------------------------------------------------------------


def test_an_engine_that_was_changed_is_not_loaded(engine: Path) -> None:
    with (engine / PLAN).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(InputError, match=r"model\.plan: is missing or differs .* --trust-engine"):
        EngineModel(engine)
    assert load_engine_manifest(engine, trust=True)["tensorrt"]["engine"] is not None


def test_an_engine_that_nobody_vouches_for_is_not_loaded(engine: Path) -> None:
    path = engine / artifacts.MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["files"][PLAN]
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"is not in manifest\.json, so nobody vouches for it"):
        EngineModel(engine)
    assert EngineModel(engine, trust=True).vocabulary_size == 128


def test_another_plugin_library_is_refused(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "load", lambda target="cuda": _library("2" * 64))
    with pytest.raises(MissingDependencyError, match=r"another plugin library.*\(22222.*not 11111"):
        EngineModel(engine)


def test_an_engine_that_would_copy_its_cache_is_refused(engine: Path) -> None:
    fake.ICudaEngine.copies_cache = True
    with pytest.raises(
        InputError, match=r"present\.0\.key is not the memory of past_key_values\.0"
    ):
        EngineModel(engine)


def test_an_engine_of_another_tensorrt_says_so(engine: Path) -> None:
    (engine / PLAN).write_bytes(b"other")
    with pytest.raises(MissingDependencyError, match=r"cannot load it \(Serialized Engine Version"):
        EngineModel(engine, trust=True)


# --- The gate -------------------------------------------------------------------------------------


def test_the_gate_compares_the_engine_side_by_side(artifact: Path, engine: Path) -> None:
    verdict = validate(artifact, threads=1, engine=engine, require=("trt",))
    assert stage(verdict, "trt").status == "passed", stage(verdict, "trt")
    assert "PyTorch | ort-cpu | tensorrt" in stage(verdict, "outputs").detail
    assert stage(verdict, "outputs").status == "passed"


def test_a_tampered_engine_fails_the_gate_on_any_machine(
    artifact: Path,
    engine: Path,
    hugging_face: HuggingFace,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with (engine / PLAN).open("ab") as file:
        file.write(b"\0")
    code, _, err = run(capsys, "validate", artifact, "--engine", engine)
    assert code == 10
    assert "trt failed" in err
    assert "model.plan: is missing or differs from manifest.json" in err


def test_an_engine_of_another_artifact_fails_the_gate(
    exported: Exported, engine: Path, tmp_path: Path
) -> None:
    other = exported("mistral-sliding", "w4a4kv4", (), "float16")
    found = stage(validate(other, threads=1, engine=engine), "trt")
    assert found.status == "failed"
    assert "was built from another model.onnx than" in found.detail


def test_a_machine_that_cannot_run_the_engine_skips_it_unless_it_is_required(
    artifact: Path,
    engine: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert stage(validate(artifact, threads=1, engine=engine), "trt").status == "skipped"
    code, _, err = run(capsys, "validate", artifact, "--engine", engine, "--require", "trt")
    assert code == 10
    assert "trt skipped: tensorrt: cannot be imported" in err


def test_an_engine_that_computes_something_else_fails_the_gate(
    artifact: Path, engine: Path, tmp_path: Path
) -> None:
    wrong = Path(shutil.copytree(engine, tmp_path / "wrong"))
    plan = fake.onnx.ModelProto.FromString((wrong / PLAN).read_bytes())
    compare = next(node for node in plan.graph.node if node.op_type == "KvAttention")
    next(a for a in compare.attribute if a.name == "rotate").i = 0
    scale = next(t for t in plan.graph.initializer if t.name.endswith("1.mlp.down_proj.weight"))
    scale.raw_data = bytes(len(scale.raw_data))
    (wrong / PLAN).write_bytes(plan.SerializeToString())
    path = wrong / artifacts.MANIFEST
    manifest = json.loads(path.read_text())
    manifest["files"][PLAN] = artifacts.sha256(wrong / PLAN)
    path.write_text(json.dumps(manifest))
    verdict = validate(artifact, threads=1, engine=wrong)
    assert stage(verdict, "trt").status == "failed"
    assert stage(verdict, "outputs").status == "failed"
    assert "of tensorrt is" in stage(verdict, "outputs").detail
