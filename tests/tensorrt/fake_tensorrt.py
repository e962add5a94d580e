# SPDX-License-Identifier: Apache-2.0
"""What the code uses of tensorrt and of the CUDA runtime, on the CPU.

Names, parameters and attributes are those of the real bindings: `test_adapter.py` compares every
class here with `tensorrt_11_4_api.json`, which was read from them. An engine runs its graph by the
references of the operators, with "device" memory that is host memory.
"""

import ctypes
import enum
import inspect
import json
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from tests.tensorrt.executor import PLUGINS

API: dict[str, dict[str, str | None]] = json.loads(
    Path(__file__).with_name("tensorrt_11_4_api.json").read_text()
)


class Bound:
    """An object of the bindings: it has no attribute that they lack."""

    def __setattr__(self, name: str, value: Any) -> None:
        known = name.startswith("_") or name in API[type(self).__name__]
        assert known, f"tensorrt.{type(self).__name__} has no {name}"
        super().__setattr__(name, value)


def enumeration(name: str) -> Any:
    members = [member for member, sig in API[name].items() if sig is None and member.isupper()]
    return enum.IntEnum(name, {member: value for value, member in enumerate(members)})


DataType = enumeration("DataType")
LayerType = enumeration("LayerType")
BuilderFlag = enumeration("BuilderFlag")
PreviewFeature = enumeration("PreviewFeature")
MemoryPoolType = enumeration("MemoryPoolType")
ProfilingVerbosity = enumeration("ProfilingVerbosity")
TensorIOMode = enumeration("TensorIOMode")
NetworkDefinitionCreationFlag = enumeration("NetworkDefinitionCreationFlag")
_TYPES = {
    onnx.TensorProto.FLOAT: "FLOAT",
    onnx.TensorProto.FLOAT16: "HALF",
    onnx.TensorProto.BFLOAT16: "BF16",
    onnx.TensorProto.INT8: "INT8",
    onnx.TensorProto.INT32: "INT32",
    onnx.TensorProto.INT64: "INT64",
}


class ILogger(Bound):
    class Severity(enum.IntEnum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2
        INFO = 3
        VERBOSE = 4

    def __init__(self) -> None:
        pass

    def log(self, severity: Any, msg: str) -> None:
        raise NotImplementedError


class IHostMemory(bytes):
    """Serialized bytes."""


class ITimingCache(Bound):
    def __init__(self, data: bytes) -> None:
        self._data = data

    def serialize(self) -> IHostMemory:
        return IHostMemory(self._data + b"measured;")


class IOptimizationProfile(Bound):
    def __init__(self) -> None:
        self._shapes: dict[str, Any] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        assert all(a <= b <= c for a, b, c in zip(min, opt, max, strict=True)), input
        self._shapes[input] = (list(min), list(opt), list(max))


class IBuilderConfig(Bound):
    def __init__(self) -> None:
        self._flags: set[Any] = set()
        self._profiles: list[Any] = []
        self._previews: set[Any] = set()
        self._pools: dict[Any, int] = {}
        self._cache: Any = None

    def set_preview_feature(self, feature: Any, enable: bool) -> None:
        assert isinstance(feature, PreviewFeature)
        assert enable
        self._previews.add(feature)

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self._pools[pool] = pool_size

    def set_flag(self, flag: Any) -> None:
        assert isinstance(flag, BuilderFlag)
        self._flags.add(flag)

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
        return ITimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        self._cache = cache
        return True

    def get_timing_cache(self) -> ITimingCache:
        cache: ITimingCache = self._cache
        return cache

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self._profiles.append(profile)
        return len(self._profiles) - 1


class ILayer(Bound):
    def __init__(self, name: str, kind: Any) -> None:
        self.name, self.type = name, kind


class INetworkDefinition(Bound):
    def __init__(self, flags: int) -> None:
        self._flags = flags
        self._layers: list[ILayer] = []
        self._model: onnx.ModelProto | None = None

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def get_layer(self, index: int) -> ILayer:
        return self._layers[index]


class OnnxParser(Bound):
    missing: set[str] = set()  # noqa: RUF012  # operators without a creator, which are inlined
    refuses: str = ""

    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._network, self._logger = network, logger

    def parse_from_file(self, model: str) -> bool:
        if OnnxParser.refuses:
            return False
        loaded = onnx.load(model)
        for node in loaded.graph.node:
            is_plugin = node.domain == "quarot" and node.op_type not in OnnxParser.missing
            kind = LayerType.PLUGIN_V3 if is_plugin else LayerType.ELEMENTWISE
            self._network._layers.append(ILayer(node.name, kind))
        self._network._model = loaded
        return True

    @property
    def num_errors(self) -> int:
        return 1

    def get_error(self, index: int) -> str:
        return f"In node 3 (importer): {OnnxParser.refuses}\nsecond line"


class Builder(Bound):
    is_missing = False  # a machine without a GPU
    last: "Builder | None" = None

    def __init__(self, logger: ILogger) -> None:
        if Builder.is_missing:
            logger.log(ILogger.Severity.ERROR, "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._logger = logger
        self._network: Any = None
        self._config: Any = None
        Builder.last = self

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        self._network = INetworkDefinition(flags)
        return self._network  # type: ignore[no-any-return]

    def create_builder_config(self) -> IBuilderConfig:
        self._config = IBuilderConfig()
        return self._config  # type: ignore[no-any-return]

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: Any, config: Any) -> IHostMemory | None:
        profiles = [profile._shapes for profile in config._profiles]
        model = onnx.ModelProto()
        model.CopyFrom(network._model)
        model.metadata_props.add(key="profiles", value=json.dumps(profiles))
        self._logger.log(ILogger.Severity.WARNING, "a warning\nof two lines")
        return IHostMemory(model.SerializeToString())


class Runtime(Bound):
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> "ICudaEngine | None":
        if serialized_engine.startswith(b"other"):
            self._logger.log(ILogger.Severity.ERROR, "Serialized Engine Version 240 does not match")
            return None
        return ICudaEngine(onnx.ModelProto.FromString(serialized_engine))


class ICudaEngine(Bound):
    copies_cache = False

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = model
        self._io = [*model.graph.input, *model.graph.output]
        self._profiles = json.loads(model.metadata_props[-1].value)
        self._run = ReferenceEvaluator(model, new_ops=PLUGINS)
        self.streamable_weights_size = 1
        self.weight_streaming_budget_v2 = 0

    @property
    def num_io_tensors(self) -> int:
        return len(self._io)

    def get_tensor_name(self, index: int) -> str:
        return str(self._io[index].name)

    def _value(self, name: str) -> Any:
        return next(value for value in self._io if value.name == name)

    def get_tensor_mode(self, name: str) -> Any:
        is_input = any(value.name == name for value in self._model.graph.input)
        return TensorIOMode.INPUT if is_input else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return _Dtype(DataType[_TYPES[self._value(name).type.tensor_type.elem_type]])

    def get_tensor_shape(self, name: str) -> list[int]:
        dims = self._value(name).type.tensor_type.shape.dim
        return [-1 if dim.dim_param else dim.dim_value for dim in dims]

    def get_aliased_input_tensor(self, name: str) -> str:
        if ICudaEngine.copies_cache or not name.startswith("present."):
            return ""
        return name.replace("present.", "past_key_values.")

    def get_weight_streaming_automatic_budget(self) -> int:
        return 12345

    def create_execution_context(self) -> "IExecutionContext":
        return IExecutionContext(self)


class _Dtype:
    """Prints as pybind's enumerations do."""

    def __init__(self, member: Any) -> None:
        self._member = member

    def __str__(self) -> str:
        return f"DataType.{self._member.name}"


class IExecutionContext(Bound):
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine
        self._profile: Any = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._profile = self._engine._profiles[profile_index]
        return stream_handle == Cuda.STREAM

    def set_input_shape(self, name: str, shape: Any) -> bool:
        smallest, _, largest = self._profile[name]
        self._shapes[name] = tuple(shape)
        return all(a <= b <= c for a, b, c in zip(smallest, shape, largest, strict=True))

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return memory in Cuda.held

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert stream_handle == Cuda.STREAM
        graph = self._engine._model.graph
        feed = {}
        for value in graph.input:
            kind = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            feed[value.name] = self._array(value.name, self._shapes[value.name], kind).copy()
        names = [value.name for value in graph.output]
        for name, array in zip(names, self._engine._run.run(names, feed), strict=True):
            if name.startswith("present."):
                past = name.replace("present.", "past_key_values.")
                assert self._addresses[name] == self._addresses[past]
            self._array(name, array.shape, array.dtype)[...] = array
        return True

    def _array(self, name: str, shape: tuple[int, ...], dtype: Any) -> Any:
        address = self._addresses[name]
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        assert size <= Cuda.held[address]._length_, name
        held = np.frombuffer(Cuda.held[address], np.uint8, size)
        return held.view(dtype).reshape(shape)


class Cuda:
    """Polygraphy's wrapper of the CUDA runtime; memory is watched."""

    STREAM = 77
    held: dict[int, Any] = {}  # noqa: RUF012
    copied = 0

    def create_stream(self) -> int:
        return Cuda.STREAM

    def stream_synchronize(self, ptr: int) -> None:
        assert ptr == Cuda.STREAM

    def malloc(self, nbytes: int) -> int:
        buffer = (ctypes.c_uint8 * nbytes)()
        address = ctypes.addressof(buffer)
        ctypes.memset(address, 0xA5, nbytes)  # what was not written must not be read
        Cuda.held[address] = buffer
        return address

    def free(self, ptr: int) -> None:
        del Cuda.held[ptr]

    def memcpy(self, dst: int, src: int, nbytes: int, kind: Any, stream_ptr: Any = None) -> None:
        assert nbytes > 0
        if kind.value == 3:
            Cuda.copied += nbytes
        ctypes.memmove(dst, src, nbytes)


def module(version: str) -> types.ModuleType:
    """A module ``tensorrt`` of `version`."""
    found = types.ModuleType("tensorrt")
    found.__version__ = version  # type: ignore[attr-defined]
    for name, value in globals().items():
        if name in API:
            setattr(found, name, value)
    return found


def classes() -> dict[str, Any]:
    """The classes here that stand for one of the bindings."""
    return {
        name: value
        for name, value in globals().items()
        if inspect.isclass(value) and name in API and not issubclass(value, enum.Enum)
    }
