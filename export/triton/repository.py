# SPDX-License-Identifier: Apache-2.0
"""Write a Triton model repository: the artifact, the model that serves it, and how to start it.

    REPOSITORY/
      run.sh  client.py  manifest.json
      NAME/config.pbtxt
      NAME/1/model.py               what the Python backend runs
      NAME/1/quarot_onnx/           the modules that model.py imports
      NAME/1/artifact/              as it was exported, or built for TensorRT
      NAME/1/plugins/               with an engine: the library it was built with
      NAME_engine/                  where asked for: the engine alone (`plan.py`)

Triton looks for models in directories only, so the files at the top do not disturb it.
"""

import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import quarot_onnx
from quarot_onnx.artifacts import (
    changed_files,
    load_manifest,
    publish,
    require_space,
    save_manifest,
)
from quarot_onnx.errors import InputError, MissingDependencyError, UsageError
from quarot_onnx.export.tensorrt.directory import load_engine_manifest
from quarot_onnx.export.triton.model_config import ModelConfig, to_text
from quarot_onnx.export.triton.plan import PLAN, plan_config
from quarot_onnx.plugins import library
from quarot_onnx.plugins.library import PluginLibrary
from quarot_onnx.runtime import RUNTIMES, load_tokenizer
from quarot_onnx.runtime.serving import context_length

SERVED = (
    "__init__",
    "errors",
    "manifest",
    "runtime/__init__",
    "runtime/batching",
    "runtime/generation",
    "runtime/model",
    "runtime/serving",
    "runtime/session",
    "runtime/tokenizer",
)
"""The modules of quarot_onnx that model.py needs, with what they import."""

SERVED_WITH_ENGINE = (
    *SERVED,
    "export/__init__",
    "export/tensorrt/__init__",
    "export/tensorrt/adapter",
    "export/tensorrt/directory",
    "hadamard",
    "plugins/__init__",
    "plugins/build",
    "plugins/kernels",
    "plugins/layouts",
    "plugins/library",
    "runtime/tensorrt",
)
"""The same where TensorRT runs the model."""

INPUTS = (
    ("text_input", "TYPE_STRING", 1),
    ("stream", "TYPE_BOOL", 1),
    ("max_tokens", "TYPE_INT32", 1),
    ("stop_words", "TYPE_STRING", -1),
    ("temperature", "TYPE_FP32", 1),
    ("top_p", "TYPE_FP32", 1),
    ("seed", "TYPE_UINT64", 1),
    ("frequency_penalty", "TYPE_FP32", 1),
    ("presence_penalty", "TYPE_FP32", 1),
    ("exclude_input_in_output", "TYPE_BOOL", 1),
    ("return_num_input_tokens", "TYPE_BOOL", 1),
    ("return_num_output_tokens", "TYPE_BOOL", 1),
)
"""Name, type and length; all but the first are optional. What Triton's OpenAI frontend sends."""

OUTPUTS = (
    ("text_output", "TYPE_STRING", 1),
    ("finish_reason", "TYPE_STRING", 1),
    ("num_input_tokens", "TYPE_UINT32", 1),
    ("num_output_tokens", "TYPE_UINT32", 1),
)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_HERE = Path(__file__).parent


def triton_from_artifact(
    artifact: Path,
    repository: Path,
    *,
    name: str | None = None,
    runtime: str | None = None,
    engine_model: bool = False,
    threads: int | None = None,
    max_streams: int = 16,
    max_waiting: int = 256,
    force: bool = False,
) -> dict[str, Any]:
    """Write the repository; it appears whole or not at all.

    Args:
        artifact: a directory that ``quarot-onnx export`` or ``build`` wrote, unaltered.
        repository: created; it must not exist or be empty, unless `force` and one of ours.
        name: of the model; the artifact's directory name where None.
        runtime: one of `quarot_onnx.runtime.RUNTIMES`; where None ``tensorrt`` for an engine and
            ``ort-cpu`` otherwise.
        engine_model: also write the engine as a model of Triton's TensorRT backend.
        threads: of ONNX Runtime; its own choice where None.
        max_streams: texts in a batch, at most.
        max_waiting: requests that wait for a place, at most.
        force: replace an existing repository.

    Returns:
        The model's name, its limits and its files.

    Raises:
        UsageError: a name, a limit or a runtime that cannot be.
        InputError: the artifact is altered, or has no tokenizer or no context length.
        MissingDependencyError: the plugin library that the engine was built with is not here.
        ResourceError: no space.
    """
    name = _checked_name(artifact.resolve().name if name is None else name)
    _check_limits(
        {"--max-streams": max_streams, "--max-waiting": max_waiting, "--threads": threads}
    )
    source = _sound_manifest(artifact)
    runtime = _runtime_for(artifact, source, runtime, engine_model=engine_model)
    tokens, plugins = context_length(artifact), None
    if runtime == "tensorrt":
        plugins = _plugins_of(load_engine_manifest(artifact), artifact)
        tokens = min(tokens, int(source["tensorrt"]["limits"]["max_seq_len"]))
    parameters = {
        "runtime": runtime,
        "context_length": str(tokens),
        "max_streams": str(max_streams),
        "max_waiting": str(max_waiting),
        **({"threads": str(threads)} if threads is not None else {}),
    }
    with publish(repository, force=force) as staging:
        require_space(repository, sum(path.stat().st_size for path in artifact.iterdir()))
        _write_model(staging / name, artifact, parameters, plugins)
        if engine_model:
            _write_engine_model(staging / f"{name}_engine", artifact, source)
        for script in ("run.sh", "client.py"):
            shutil.copyfile(_HERE / script, staging / script)
            (staging / script).chmod(0o755)
        described = {"model": name, "parameters": parameters, "recipe": source["recipe"]}
        save_manifest(staging, described)
        return load_manifest(staging)


def _check_limits(limits: Mapping[str, int | None]) -> None:
    for option, value in limits.items():
        if value is not None and value < 1:
            raise UsageError(f"{option} {value}: must be 1 or more")


def _sound_manifest(artifact: Path) -> dict[str, Any]:
    """The manifest of an unaltered artifact whose tokenizer the server can read."""
    source = load_manifest(artifact)
    if changed := changed_files(artifact, source):
        raise InputError(
            f"{artifact / changed[0]}: is not what the manifest says; write the directory again"
        )
    if not (artifact / "tokenizer.json").is_file():
        raise InputError(
            f"{artifact / 'tokenizer.json'}: no such file, and the server reads no other "
            "tokenizer; save the model's fast tokenizer and export again"
        )
    load_tokenizer(artifact)
    return source


def _runtime_for(
    artifact: Path, source: dict[str, Any], asked: str | None, *, engine_model: bool
) -> str:
    """What runs the artifact: TensorRT an engine, ONNX Runtime a graph."""
    if asked is not None and asked not in RUNTIMES:
        raise UsageError(f"--runtime {asked}: no such runtime; choose {', '.join(RUNTIMES)}")
    has_engine = "tensorrt" in source
    runtime = asked or ("tensorrt" if has_engine else "ort-cpu")
    if has_engine != (runtime == "tensorrt"):
        raise UsageError(
            f"--runtime {runtime}: {artifact} holds "
            + ("an engine; give what `export` wrote" if has_engine else "no engine; build one")
        )
    if engine_model and not has_engine:
        raise UsageError(f"--engine-model: {artifact} holds no engine; build one")
    return runtime


def _write_model(
    model: Path, artifact: Path, parameters: dict[str, str], plugins: PluginLibrary | None
) -> None:
    """The model of the Python backend, with its code, the artifact and an engine's plugins."""
    version = model / "1"
    version.mkdir(parents=True)
    _write_config(model, _model_config(model.name, parameters))
    shutil.copyfile(_HERE / "model.py", version / "model.py")
    _copy_modules(SERVED if plugins is None else SERVED_WITH_ENGINE, version / "quarot_onnx")
    shutil.copytree(artifact, version / "artifact", copy_function=shutil.copyfile)
    if plugins is not None:
        (version / "plugins").mkdir()
        for path, target in (
            (plugins.path, "libquarot_plugins.so"),
            (plugins.path.with_suffix(".json"), "libquarot_plugins.json"),
        ):
            shutil.copyfile(path, version / "plugins" / target)


def _write_engine_model(model: Path, artifact: Path, source: dict[str, Any]) -> None:
    """The engine alone, as a model of Triton's TensorRT backend."""
    (model / "1").mkdir(parents=True)
    _write_config(model, plan_config(model.name, artifact, source["tensorrt"]["limits"]))
    shutil.copyfile(artifact / PLAN, model / "1" / PLAN)


def _plugins_of(manifest: dict[str, Any], engine: Path) -> PluginLibrary:
    """The library that an engine was built with."""
    found = library.find()
    wanted = str((manifest["tensorrt"]["plugins"] or {}).get("sha256"))
    if found.sha256 != wanted:
        raise MissingDependencyError(
            f"{found.path}: is another plugin library than {engine} was built with "
            f"({found.sha256[:12]}, not {wanted[:12]}); build the engine again"
        )
    return found


def _write_config(model: Path, config: Any) -> None:
    (model / "config.pbtxt").write_text(to_text(config), encoding="utf-8")


def _checked_name(name: str) -> str:
    """Triton takes the model's name from a directory and puts it into URLs."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"--name {name!r}: a model's name is 1 to 100 letters, digits, '.', '_' or '-' and "
            "starts with a letter or a digit; choose another with --name"
        )
    return name


def _copy_modules(names: Iterable[str], target: Path) -> None:
    package = Path(quarot_onnx.__file__).parent
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(package / f"{name}.py", target / f"{name}.py")


def _model_config(name: str, parameters: dict[str, str]) -> Any:
    """A decoupled model of the Python backend with one instance, which batches by itself."""
    config = ModelConfig(name=name, backend="python", max_batch_size=1)
    for tensor, data_type, length in INPUTS:
        config.input.add(
            name=tensor, data_type=data_type, dims=[length], optional=tensor != "text_input"
        )
    for tensor, data_type, length in OUTPUTS:
        config.output.add(name=tensor, data_type=data_type, dims=[length])
    config.model_transaction_policy.decoupled = True
    config.instance_group.add(count=1, kind="KIND_CPU")
    for key, value in parameters.items():
        config.parameters[key].string_value = value
    return config
