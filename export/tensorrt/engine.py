# SPDX-License-Identifier: Apache-2.0
"""``quarot-onnx build``: an artifact to a directory with the lowered graph and its engine.

    ENGINE_DIR/model.onnx, model.onnx_data     the lowered graph (also all there is of --onnx-only)
    ENGINE_DIR/model.plan                      the engine
    ENGINE_DIR/trtexec.sh                      the same build by NVIDIA's own tool
    ENGINE_DIR/manifest.json                   the artifact's hashes, profiles, plugins, versions

and the tokenizer and configurations, so that the directory runs by itself.
"""

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx

from quarot_onnx import artifacts, ops
from quarot_onnx.errors import InputError, MissingDependencyError, UnsupportedModelError, UsageError
from quarot_onnx.export.huggingface import COMPANIONS
from quarot_onnx.export.tensorrt import adapter
from quarot_onnx.export.tensorrt.directory import PLAN
from quarot_onnx.export.tensorrt.kernel_shapes import CAPACITY_MULTIPLE, padded
from quarot_onnx.export.tensorrt.lint import problems
from quarot_onnx.export.tensorrt.lowering import ActivationLayout, Target, lower, target_version
from quarot_onnx.plugins import library
from quarot_onnx.plugins.library import PluginLibrary

TRTEXEC = "trtexec.sh"
DEFAULT_VERSION = (11, 4)
"""What ``--onnx-only`` lowers for where nothing is said."""


@dataclass(frozen=True)
class Limits:
    """What an engine is built for.

    Attributes:
        max_batch: rows.
        max_input_len: tokens of one step.
        max_seq_len: tokens of a row with all that precede: the capacity of the cache.
    """

    max_batch: int = 1
    max_input_len: int = 512
    max_seq_len: int = 2048

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                option = f"--{name.replace('_', '-')}"
                raise UsageError(f"{option} {value}: must be 1 or more")
        if self.max_input_len > self.max_seq_len:
            raise UsageError(
                f"--max-input-len {self.max_input_len}: is above --max-seq-len {self.max_seq_len}"
            )

    @property
    def capacity(self) -> int:
        """Tokens that the cache has room for: `max_seq_len`, rounded up for the kernels."""
        return padded(self.max_seq_len, CAPACITY_MULTIPLE)


@dataclass(frozen=True)
class BuildOptions:
    """What ``quarot-onnx build`` was asked for; the names are those of its options."""

    onnx_only: bool = False
    tensorrt_version: str | None = None
    activation_layout: ActivationLayout = "packed"
    timing_cache: Path | None = None
    workspace_mb: int | None = None
    optimization_level: int | None = None
    weight_streaming: bool = False
    version_compatible: bool = False
    refit: bool = False


def build(
    artifact: Path,
    out_dir: Path,
    limits: Limits,
    options: BuildOptions,
    *,
    force: bool = False,
    progress: artifacts.Progress | None = None,
) -> dict[str, Any]:
    """Lower `artifact`, lint it and, unless ``onnx_only``, build its engine; the manifest.

    Raises:
        UsageError: options that do not fit.
        InputError: the artifact is damaged or was changed.
        UnsupportedModelError: the artifact, or a node of it, is nothing for TensorRT.
        MissingDependencyError: no TensorRT, no GPU or no plugin library.
    """
    manifest = _sound_manifest(artifact)
    trt = None if options.onnx_only else adapter.load_tensorrt()
    target = _target(options, trt)
    plugins = _library(required=not options.onnx_only)
    with artifacts.publish(out_dir, force=force) as staging:
        lowered = lower(artifact, target)
        artifacts.require_space(out_dir, 2 * (artifact / artifacts.DATA).stat().st_size)
        artifacts.save_model(lowered, staging, progress)
        graph = onnx.load(str(staging / artifacts.MODEL), load_external_data=False)
        found = problems(graph, target.version, None if plugins is None else plugins.plugins)
        if found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise UnsupportedModelError(
                f"{found[0]}{more}; TensorRT {target.version[0]}.{target.version[1]} would not "
                "build this graph, choose another --tensorrt-version or --runtime ort-cuda"
            )
        for name in COMPANIONS:
            if (artifact / name).is_file():
                shutil.copyfile(artifact / name, staging / name)
        profiles = profiles_of(graph, limits)
        described: dict[str, Any] = {
            "version": f"{target.version[0]}.{target.version[1]}",
            "activation_layout": target.activation_layout,
            "limits": {**asdict(limits), "capacity": limits.capacity},
            "profiles": profiles,
            "plugins": None if plugins is None else _library_record(plugins),
            "engine": None,
        }
        if trt is not None:
            assert plugins is not None
            described["engine"] = _build_engine(trt, staging, graph, profiles, plugins, options)
        command = trtexec_command(profiles, plugins, options, target.version)
        (staging / TRTEXEC).write_text(f"#!/bin/sh\n{command}\n", encoding="utf-8")
        (staging / TRTEXEC).chmod(0o755)
        origin = {name: manifest["files"][name] for name in (artifacts.MODEL, artifacts.DATA)}
        artifacts.save_manifest(
            staging,
            {
                "source": manifest["source"],
                "recipe": manifest["recipe"],
                "dtype": manifest["dtype"],
                "passes": manifest["passes"],
                "artifact": origin,
                "tensorrt": described,
            },
        )
        return artifacts.load_manifest(staging)


def _sound_manifest(artifact: Path) -> dict[str, Any]:
    manifest = artifacts.load_manifest(artifact)
    if "tensorrt" in manifest:
        raise InputError(f"{artifact}: is built for TensorRT already; give what `export` wrote")
    changed = artifacts.changed_files(artifact, manifest)
    if changed:
        raise InputError(
            f"{artifact / changed[0]}: is missing or differs from {artifacts.MANIFEST}; "
            "export again"
        )
    return manifest


def _target(options: BuildOptions, trt: Any) -> Target:
    version = DEFAULT_VERSION if trt is None else adapter.version_of(trt)
    if options.tensorrt_version is not None:
        asked = target_version(options.tensorrt_version)
        if trt is not None and asked != version:
            raise UsageError(
                f"--tensorrt-version {options.tensorrt_version}: this machine has TensorRT "
                f"{trt.__version__}, which builds for itself; leave it out, or add --onnx-only"
            )
        version = asked
    return Target(version, options.activation_layout)


def _library(*, required: bool) -> PluginLibrary | None:
    """The plugin library; where only the lint wants it, the one for the CPU will do."""
    try:
        return library.find()
    except MissingDependencyError:
        if required:
            raise
    try:
        return library.find("cpu")
    except MissingDependencyError:
        return None


def _library_record(plugins: PluginLibrary) -> dict[str, Any]:
    return {
        "file": plugins.path.name,
        "sha256": plugins.sha256,
        "backend": plugins.backend,
        "architectures": list(plugins.architectures),
        "build_id": plugins.build_id,
    }


def profiles_of(graph: onnx.ModelProto, limits: Limits) -> dict[str, Any]:
    """``decode`` (one token) and ``prefill``: input -> smallest, usual and largest shape."""
    found: dict[str, Any] = {}
    for name, tokens in (
        ("decode", (1, 1, 1)),
        ("prefill", (1, max(1, limits.max_input_len // 2), limits.max_input_len)),
    ):
        sizes = {
            "batch_size": (1, limits.max_batch, limits.max_batch),
            "sequence_length": tokens,
            "capacity": (limits.capacity,) * 3,
        }
        found[name] = {
            value.name: [
                [
                    sizes[dim.dim_param][which] if dim.dim_param else dim.dim_value
                    for dim in value.type.tensor_type.shape.dim
                ]
                for which in range(3)
            ]
            for value in graph.graph.input
        }
    return found


def _build_engine(
    trt: Any,
    staging: Path,
    graph: onnx.ModelProto,
    profiles: Mapping[str, Any],
    plugins: PluginLibrary,
    options: BuildOptions,
) -> dict[str, Any]:
    """Write ``model.plan``; what the manifest says of it."""
    gpu = _gpu()
    if gpu is not None:
        plugins.require_architecture(int(gpu["compute_capability"].replace(".", "")))
    library.load()
    cache = options.timing_cache
    built = adapter.engine_from_onnx(
        trt,
        staging / artifacts.MODEL,
        sum(node.domain == ops.DOMAIN for node in graph.graph.node),
        adapter.EngineOptions(
            profiles=tuple(profiles.values()),
            plugins=plugins.path,
            workspace=None if options.workspace_mb is None else options.workspace_mb << 20,
            optimization_level=options.optimization_level,
            timing_cache=cache.read_bytes() if cache is not None and cache.is_file() else b"",
            weight_streaming=options.weight_streaming,
            version_compatible=options.version_compatible,
            refit=options.refit,
        ),
    )
    (staging / PLAN).write_bytes(built.plan)
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        cache.write_bytes(built.timing_cache)
    return {
        "tensorrt": str(trt.__version__),
        "gpu": gpu,
        "plugin_layers": built.plugin_layers,
        "version_compatible": options.version_compatible,
        "refit": options.refit,
        "weight_streaming": options.weight_streaming,
        "warnings": built.warnings[-20:],
    }


def _gpu() -> dict[str, Any] | None:
    import torch  # noqa: PLC0415

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return {"name": torch.cuda.get_device_name(), "compute_capability": f"{major}.{minor}"}


def trtexec_command(
    profiles: Mapping[str, Any],
    plugins: PluginLibrary | None,
    options: BuildOptions,
    version: tuple[int, int],
) -> str:
    """The ``trtexec`` call that builds the same engine, run in the directory of ``model.onnx``."""
    is_built = plugins is not None and plugins.backend == "cuda"
    name = plugins.path.name if plugins is not None and is_built else "libquarot_plugins.so"
    parts = [
        "trtexec",
        f"--onnx={artifacts.MODEL}",
        f"--saveEngine={PLAN}",
        *(["--stronglyTyped"] if version < (11, 0) else []),
        f"--staticPlugins=${{QUAROT_PLUGINS_LIBRARY:-./{name}}}",
        "--preview=+aliasedPluginIO1003",
        "--profilingVerbosity=detailed",
        "--skipInference",
    ]
    if options.timing_cache is not None:
        parts.append(f"--timingCacheFile={options.timing_cache.name}")
    if options.workspace_mb is not None:
        parts.append(f"--memPoolSize=workspace:{options.workspace_mb}")
    if options.optimization_level is not None:
        parts.append(f"--builderOptimizationLevel={options.optimization_level}")
    for wanted, flag in (
        (options.weight_streaming, "--allowWeightStreaming"),
        (options.version_compatible, "--versionCompatible"),
        (options.refit, "--refit"),
    ):
        if wanted:
            parts.append(flag)
    if options.version_compatible:
        parts.append(f"--setPluginsToSerialize=${{QUAROT_PLUGINS_LIBRARY:-./{name}}}")
    for index, ranges in enumerate(profiles.values()):
        parts.append(f"--profile={index}")
        for position, bound in enumerate(("minShapes", "optShapes", "maxShapes")):
            shapes = ",".join(
                f"{name}:{'x'.join(map(str, shape[position]))}" for name, shape in ranges.items()
            )
            parts.append(f"--{bound}={shapes}")
    return " \\\n  ".join(parts)
