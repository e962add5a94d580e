# SPDX-License-Identifier: Apache-2.0
"""TensorRT 10 and 11 behind one set of functions; the only module that imports tensorrt.

What differs between them is here: 10 asks for strong typing, 11 knows nothing else. Names that only
one of them has are looked up when they are used, and a missing one is said by name.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quarot_onnx.errors import (
    InputError,
    MissingDependencyError,
    ResourceError,
    UnsupportedModelError,
)
from quarot_onnx.plugins import build

Range = tuple[Sequence[int], Sequence[int], Sequence[int]]
"""The smallest, the usual and the largest shape of an input."""


def load_tensorrt() -> Any:
    """The tensorrt module.

    Raises:
        MissingDependencyError: it cannot be imported.
    """
    try:
        import tensorrt  # noqa: PLC0415
    except (ImportError, OSError) as error:
        raise MissingDependencyError(
            f"tensorrt: cannot be imported ({error}); pip install 'quarot-onnx[tensorrt]' on a "
            "machine with an NVIDIA GPU"
        ) from error
    return tensorrt


def version_of(trt: Any) -> tuple[int, int]:
    """Major and minor."""
    major, minor = str(trt.__version__).split(".")[:2]
    return int(major), int(minor)


class Messages:
    """What TensorRT logs from warnings on, for the error that follows."""

    def __init__(self, trt: Any) -> None:
        severities = trt.ILogger.Severity
        kept = (severities.INTERNAL_ERROR, severities.ERROR, severities.WARNING)
        lines = self.lines = list[str]()

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, msg: str) -> None:
                if severity in kept:
                    lines.append(" ".join(msg.split()))

        self.logger = Logger()

    def last(self, otherwise: str) -> str:
        """The last line, or `otherwise`."""
        return self.lines[-1] if self.lines else otherwise


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is built.

    Attributes:
        profiles: input -> range, one mapping for each optimization profile.
        workspace: bytes of scratch memory at most, TensorRT's choice where None.
        optimization_level: 0 to 5, TensorRT's choice where None.
        timing_cache: what earlier builds measured; empty at first.
        weight_streaming: weights stay in host memory and stream.
        version_compatible: later minor releases can run it; brings the lean runtime along.
        refit: weights can be replaced.
        plugins: the library, which a version-compatible engine brings along.
    """

    profiles: tuple[Mapping[str, Range], ...]
    plugins: Path
    workspace: int | None = None
    optimization_level: int | None = None
    timing_cache: bytes = b""
    weight_streaming: bool = False
    version_compatible: bool = False
    refit: bool = False


@dataclass(frozen=True)
class Built:
    """An engine and what its builder learned.

    Attributes:
        plan: the serialized engine.
        timing_cache: to give to the next build.
        plugin_layers: how many layers of the network are plugins.
        warnings: what TensorRT logged.
    """

    plan: bytes
    timing_cache: bytes
    plugin_layers: int
    warnings: list[str] = field(default_factory=list)


def engine_from_onnx(trt: Any, model: Path, plugin_nodes: int, options: EngineOptions) -> Built:
    """Build an engine of a lowered graph; the plugins are registered already.

    Args:
        trt: the tensorrt module.
        model: ``model.onnx`` beside its data.
        plugin_nodes: nodes of the graph that must become plugin layers.
        options: profiles and flags.

    Raises:
        MissingDependencyError: there is no GPU, or this TensorRT lacks what an option needs.
        UnsupportedModelError: the parser or the builder refuses the graph, or made something else
            than plugins of it.
        ResourceError: the builder ran out of memory.
    """
    messages = Messages(trt)
    try:
        builder = trt.Builder(messages.logger)
    except (TypeError, RuntimeError) as error:
        raise MissingDependencyError(
            f"tensorrt: no builder ({messages.last(str(error))}); an NVIDIA GPU and its driver are "
            "needed"
        ) from error
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, messages.logger)
    if not parser.parse_from_file(str(model)):
        errors = [str(parser.get_error(index)) for index in range(parser.num_errors)]
        what = errors[0] if errors else messages.last("no reason given")
        raise UnsupportedModelError(
            f"{model}: TensorRT's parser refuses it ({' '.join(what.split())}); build with "
            "--onnx-only to see what the lint says"
        )
    count = plugin_layers(trt, network)
    if count != plugin_nodes:
        raise UnsupportedModelError(
            f"{model}: {count} of {plugin_nodes} quarot nodes became plugin layers; the library "
            f"{options.plugins} lacks a creator, run {build.command()}"
        )
    config = _config(trt, builder, options)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        reason = messages.last("no reason given")
        if "memory" in reason.lower():
            raise ResourceError(f"{model}: the builder ran out of memory ({reason}); lower --max-*")
        raise UnsupportedModelError(f"{model}: TensorRT cannot build it ({reason})")
    cache = config.get_timing_cache()
    serialized = b"" if cache is None else bytes(cache.serialize())
    return Built(bytes(plan), serialized, count, messages.lines)


def _network_flags(trt: Any) -> int:
    """Dtypes are those of the graph: a choice in TensorRT 10, the only way in 11."""
    if version_of(trt)[0] >= 11:
        return 0
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def plugin_layers(trt: Any, network: Any) -> int:
    """How many layers are plugins; a function that was inlined has none."""
    layers = (network.get_layer(index) for index in range(network.num_layers))
    return sum(layer.type == trt.LayerType.PLUGIN_V3 for layer in layers)


def _config(trt: Any, builder: Any, options: EngineOptions) -> Any:
    config = builder.create_builder_config()
    config.set_preview_feature(_named(trt, "PreviewFeature", "ALIASED_PLUGIN_IO_10_03"), True)
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    for wanted, flag in (
        (options.weight_streaming, "WEIGHT_STREAMING"),
        (options.version_compatible, "VERSION_COMPATIBLE"),
        (options.refit, "REFIT"),
    ):
        if wanted:
            config.set_flag(_named(trt, "BuilderFlag", flag))
    if options.version_compatible:
        config.plugins_to_serialize = [str(options.plugins)]
    cache = config.create_timing_cache(options.timing_cache)
    config.set_timing_cache(cache, ignore_mismatch=False)
    for ranges in options.profiles:
        profile = builder.create_optimization_profile()
        for name, (smallest, usual, largest) in ranges.items():
            profile.set_shape(name, smallest, usual, largest)
        config.add_optimization_profile(profile)
    return config


def _named(trt: Any, enumeration: str, name: str) -> Any:
    found = getattr(getattr(trt, enumeration), name, None)
    if found is None:
        raise MissingDependencyError(
            f"tensorrt {trt.__version__}: has no {enumeration}.{name}; install 10.7 or later"
        )
    return found


# --- Running --------------------------------------------------------------------------------------


def deserialized(trt: Any, plan: bytes, where: Path, *, allow_host_code: bool) -> Any:
    """The engine of `plan`, whose hash has been checked.

    Args:
        trt: the tensorrt module.
        plan: the serialized engine.
        where: for messages.
        allow_host_code: for a version-compatible engine, which brings code for the host along.

    Raises:
        MissingDependencyError: no GPU, or an engine of another TensorRT or GPU.
    """
    messages = Messages(trt)
    try:
        runtime = trt.Runtime(messages.logger)
    except (TypeError, RuntimeError) as error:
        raise MissingDependencyError(
            f"tensorrt: no runtime ({messages.last(str(error))}); an NVIDIA GPU and its driver are "
            "needed"
        ) from error
    runtime.engine_host_code_allowed = allow_host_code
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise MissingDependencyError(
            f"{where}: this TensorRT {trt.__version__} cannot load it "
            f"({messages.last('no reason given')}); build it again on this machine"
        )
    if getattr(engine, "streamable_weights_size", 0):
        budget = engine.get_weight_streaming_automatic_budget()
        engine.weight_streaming_budget_v2 = budget
    return engine


def tensors(trt: Any, engine: Any) -> Iterator[tuple[str, bool, Any, tuple[int, ...]]]:
    """Name, whether it is an input, dtype and shape (-1 where dynamic) of each input and output."""
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        shape = tuple(int(size) for size in engine.get_tensor_shape(name))
        yield name, is_input, engine.get_tensor_dtype(name), shape


def require(done: bool, where: str, what: str) -> None:
    """Raise unless a call of TensorRT said that it did what it was asked.

    Raises:
        InputError: with both.
    """
    if not done:
        raise InputError(f"{where}: TensorRT refuses {what}; build the engine again")
