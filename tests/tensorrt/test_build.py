# SPDX-License-Identifier: Apache-2.0
"""``quarot-onnx build`` without a GPU: what it writes, what it refuses, and its trtexec command."""

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from quarot_onnx import artifacts
from quarot_onnx.errors import (
    InputError,
    MissingDependencyError,
    UnsupportedModelError,
    UsageError,
)
from quarot_onnx.export.tensorrt import engine
from quarot_onnx.export.tensorrt.directory import load_engine_manifest
from quarot_onnx.export.tensorrt.engine import BuildOptions, Limits, build
from quarot_onnx.plugins import library
from tests.conftest import Exported
from tests.test_cli import Run, run  # noqa: F401  # a fixture

ONNX_ONLY = BuildOptions(onnx_only=True)


@pytest.fixture
def artifact(exported: Exported) -> Path:
    return exported("llama", "w4a4kv4", (), "float16")


def test_onnx_only_writes_a_directory_that_stands_alone(
    run: Run,  # noqa: F811
    artifact: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "engine"
    result = run(
        *("build", artifact, out, "--onnx-only", "--max-batch", 3, "--max-seq-len", 250),
        *("--tensorrt-version", "10.13", "--json"),
    )
    assert result.code == 0
    manifest = json.loads(result.out)
    assert manifest == artifacts.load_manifest(out)
    assert artifacts.changed_files(out, manifest) == []
    assert manifest["artifact"] == {
        name: artifacts.sha256(artifact / name) for name in (artifacts.MODEL, artifacts.DATA)
    }
    built = manifest["tensorrt"]
    assert built["version"] == "10.13"
    assert built["limits"]["capacity"] == 252  # a multiple of 4
    assert built["profiles"]["decode"]["input_ids"] == [[1, 1], [3, 1], [3, 1]]
    assert built["profiles"]["prefill"]["input_ids"] == [[1, 1], [3, 125], [3, 250]]
    assert built["profiles"]["prefill"]["past_key_values.0.key"][2] == [3, 2, 252, 32]
    graph = onnx.load(out / artifacts.MODEL, load_external_data=False)
    assert {entry.name for entry in graph.graph.input} == set(built["profiles"]["decode"])
    assert (out / "config.json").is_file()


def test_the_trtexec_command_is_one_shell_line_with_both_profiles(
    artifact: Path, tmp_path: Path
) -> None:
    options = replace(
        ONNX_ONLY, tensorrt_version="10.15", version_compatible=True, workspace_mb=512, refit=True
    )
    build(artifact, tmp_path / "engine", Limits(), options)
    words = shlex.split((tmp_path / "engine" / engine.TRTEXEC).read_text().split("\n", 1)[1])
    assert words[0] == "trtexec"
    assert {"--onnx=model.onnx", "--saveEngine=model.plan", "--stronglyTyped"} <= set(words)
    assert {"--versionCompatible", "--refit", "--memPoolSize=workspace:512"} <= set(words)
    assert "--preview=+aliasedPluginIO1003" in words
    assert [w for w in words if w.startswith("--profile=")] == ["--profile=0", "--profile=1"]
    largest = [w for w in words if w.startswith("--maxShapes=")][1]
    assert "input_ids:1x512,position_ids:1x512," in largest
    assert "lengths:1" in largest.split(",")[-1]
    assert "past_key_values.2.value_zero:1x2x2048x1" in largest


def test_a_library_without_a_creator_is_refused_and_nothing_is_written(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {name: {"attributes": []} for name in ("QuantizeInt4", "Int4Gemm", "KvAppend")}
    found = library.PluginLibrary(Path("a.so"), "0" * 64, "cuda", ("sm_90a",), "id", known, True)
    monkeypatch.setattr(library, "find", lambda target="cuda": found)
    with pytest.raises(UnsupportedModelError, match=r"the plugin library.*TensorRT 11\.4 would no"):
        build(artifact, tmp_path / "engine", Limits(), ONNX_ONLY)
    assert list(tmp_path.iterdir()) == []


def test_a_changed_artifact_is_refused(artifact: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(artifact, tmp_path / "artifact"))
    with (copy / artifacts.DATA).open("r+b") as file:
        file.write(b"\xff")
    with pytest.raises(InputError, match=r"model\.onnx_data: is missing or differs from manifest"):
        build(copy, tmp_path / "engine", Limits(), ONNX_ONLY)


def test_an_engine_directory_is_not_built_again(artifact: Path, tmp_path: Path) -> None:
    build(artifact, tmp_path / "engine", Limits(), ONNX_ONLY)
    with pytest.raises(InputError, match="is built for TensorRT already; give what `export` wrote"):
        build(tmp_path / "engine", tmp_path / "again", Limits(), ONNX_ONLY)
    with pytest.raises(InputError, match="holds no engine; build one with `quarot-onnx build` on"):
        load_engine_manifest(tmp_path / "engine")


def test_limits_that_do_not_fit_are_usage_errors() -> None:
    with pytest.raises(UsageError, match="--max-input-len 9: is above --max-seq-len 8"):
        Limits(max_input_len=9, max_seq_len=8)
    with pytest.raises(UsageError, match="--max-batch 0: must be 1 or more"):
        Limits(max_batch=0)


def test_building_without_tensorrt_says_what_to_install(artifact: Path, tmp_path: Path) -> None:
    try:
        import tensorrt  # noqa: F401, PLC0415
    except ImportError:
        with pytest.raises(MissingDependencyError, match=r"quarot-onnx\[tensorrt\]' on a machine"):
            build(artifact, tmp_path / "engine", Limits(), BuildOptions())
    else:
        pytest.skip("tensorrt is installed here")
