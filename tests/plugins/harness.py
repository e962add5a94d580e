# SPDX-License-Identifier: Apache-2.0
"""Drives plugins through ``host.cpp``, with TensorRT's own structs, on the CPU or a GPU.

A plugin of the emulated library takes host memory; one of the CUDA library takes device memory,
which torch holds. The life of a plugin is that of a builder followed by that of a runtime: `run`
goes through all of it, so a test that computes something has also serialized, cloned and attached.
"""

import ctypes
import subprocess
from collections.abc import Mapping, Sequence
from ctypes import (
    POINTER,
    Structure,
    byref,
    c_char_p,
    c_float,
    c_int32,
    c_int64,
    c_size_t,
    c_void_p,
)
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np

MAX_DIMS: Final = 8

FLOAT, HALF, INT8, INT32, BOOL, BF16 = 0, 1, 2, 3, 4, 7
TYPES: Final = {
    np.dtype(np.float32): FLOAT,
    np.dtype(np.float16): HALF,
    np.dtype(np.int8): INT8,
    np.dtype(np.int32): INT32,
    np.dtype(np.bool_): BOOL,
    np.dtype(ml_dtypes.bfloat16): BF16,
}
NUMPY: Final = {code: dtype for dtype, code in TYPES.items()}

FIELD_FLOAT32, FIELD_INT32 = 1, 5
_FIELD_TYPES: Final = {
    np.dtype(np.float32): FIELD_FLOAT32,
    np.dtype(np.float64): 2,
    np.dtype(np.int8): 6,  # text
    np.dtype(np.int32): FIELD_INT32,
    np.dtype(np.int64): 10,
}


class Dims(Structure):
    """``nvinfer1::Dims64``."""

    _fields_ = [("rank", c_int32), ("d", c_int64 * MAX_DIMS)]


class Tensor(Structure):
    """``nvinfer1::PluginTensorDesc``."""

    _fields_ = [("dims", Dims), ("type", c_int32), ("format", c_int32), ("scale", c_float)]


class DynamicTensor(Structure):
    """``nvinfer1::DynamicPluginTensorDesc``."""

    _fields_ = [("desc", Tensor), ("min", Dims), ("max", Dims), ("opt", Dims)]


class Field(Structure):
    """``nvinfer1::PluginField``."""

    _fields_ = [("name", c_char_p), ("data", c_void_p), ("type", c_int32), ("length", c_int32)]


class Fields(Structure):
    """``nvinfer1::PluginFieldCollection``."""

    _fields_ = [("count", c_int32), ("fields", POINTER(Field))]


def dims(shape: Sequence[int]) -> Dims:
    return Dims(len(shape), (c_int64 * MAX_DIMS)(*shape))


def tensor(shape: Sequence[int], code: int) -> Tensor:
    return Tensor(dims(shape), code, 0, 1.0)


def dynamic(shape: Sequence[int], code: int) -> DynamicTensor:
    """A tensor whose sizes are `shape` at most, its first axis unknown."""
    unknown = [-1, *shape[1:]] if len(shape) > 1 else shape
    return DynamicTensor(tensor(unknown, code), dims(shape), dims(shape), dims(shape))


def fields(attributes: Mapping[str, Any]) -> tuple[Fields, list[np.ndarray]]:
    """A collection as the ONNX parser makes it, and the arrays that have to outlive it.

    An int becomes INT32, a float FLOAT32, a list INT32s; a NumPy array keeps its type.
    """
    arrays = []
    for value in attributes.values():
        plain = np.float32 if isinstance(value, float) else np.int32
        array = value if isinstance(value, np.ndarray) else np.array(value, plain)
        arrays.append(np.ascontiguousarray(array.reshape(-1)))
    held = (Field * max(1, len(arrays)))()
    for field, name, array in zip(held, attributes, arrays, strict=False):
        field.name, field.data = name.encode(), array.ctypes.data
        field.type, field.length = _FIELD_TYPES[array.dtype], array.size
    return Fields(len(arrays), held), arrays


def contents(collection: Fields) -> dict[str, tuple[int, bytes]]:
    """Name -> type and bytes of every field that a plugin serializes."""
    sizes = {FIELD_FLOAT32: 4, FIELD_INT32: 4}
    return {
        field.name.decode(): (
            field.type,
            ctypes.string_at(field.data, sizes[field.type] * field.length),
        )
        for field in collection.fields[: collection.count]
    }


def compile_host(source: Path, directory: Path) -> Path:
    """The host as a shared library, built with the project's own TensorRT header."""
    here = Path(__file__).parent
    library = directory / "libplugin_host.so"
    command = ["g++", "-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Werror"]
    command += ["-shared", "-fPIC", "-fvisibility=hidden", f"-I{source / 'trt'}"]
    subprocess.run([*command, str(here / "host.cpp"), "-o", str(library), "-ldl"], check=True)
    return library


class Memory:
    """Arrays where kernels reach them, with 4 KB behind each that must stay untouched."""

    def __init__(self, *, on_gpu: bool) -> None:
        self.on_gpu = on_gpu

    def put(self, array: np.ndarray) -> Any:
        raw = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        guarded = np.concatenate([raw, np.full(4096, 0xC3, np.uint8)])
        if self.on_gpu:
            import torch  # noqa: PLC0415

            return torch.from_numpy(guarded).cuda()
        aligned = np.zeros(guarded.size + 256, np.uint8)
        start = -aligned.ctypes.data % 256
        held = aligned[start : start + guarded.size]
        held[:] = guarded
        return held

    @staticmethod
    def address(held: Any) -> int:
        return int(held.ctypes.data if isinstance(held, np.ndarray) else held.data_ptr())

    @staticmethod
    def read(held: Any, shape: Sequence[int], dtype: np.dtype[Any]) -> np.ndarray:
        raw = held if isinstance(held, np.ndarray) else held.cpu().numpy()
        assert (raw[-4096:] == 0xC3).all(), "memory behind a tensor was written"
        return raw[:-4096].copy().view(dtype).reshape(shape)


class Host:
    """A plugin library opened by the host."""

    def __init__(self, host: Path, library: Path, *, on_gpu: bool = False) -> None:
        self.abi = ctypes.CDLL(str(host))
        pointers = "host_open host_creator creator_create plugin_clone plugin_attach"
        texts = "host_log creator_name creator_version creator_namespace plugin_name"
        texts += " plugin_namespace plugin_version plugin_timing_cache_id plugin_metadata"
        for names, kind in ((pointers, c_void_p), (texts, c_char_p)):
            for name in names.split():
                getattr(self.abi, name).restype = kind
        self.abi.creator_fields.restype = self.abi.plugin_fields.restype = POINTER(Fields)
        self.abi.plugin_workspace.restype = c_size_t
        self.memory = Memory(on_gpu=on_gpu)
        handle = self.abi.host_open(str(library).encode())
        assert handle, f"{library} cannot be loaded"
        listed = c_void_p()
        count = self.abi.host_creators(c_void_p(handle), byref(listed))
        creators = [c_void_p(self.abi.host_creator(c_void_p(handle), i)) for i in range(count)]
        self.creators = {self.abi.creator_name(c).decode(): c for c in creators}

    def log(self) -> str:
        """What plugins have logged since the last call: lines of severity and message."""
        text = self.abi.host_log().decode(errors="backslashreplace")
        self.abi.host_clear_log()
        return text

    def create(self, name: str, attributes: Mapping[str, Any]) -> "Plugin | None":
        collection, held = fields(attributes)
        return self.create_from(name, collection, held)

    def create_from(self, name: str, collection: Fields, held: Any = None) -> "Plugin | None":
        del held  # alive until the plugin has copied it
        made = self.abi.creator_create(self.creators[name], b"layer", byref(collection), 0)
        return Plugin(self, made) if made else None

    def run(
        self, name: str, attributes: Mapping[str, Any], inputs: Sequence[np.ndarray]
    ) -> list[np.ndarray]:
        """The outputs of a plugin that has been through its whole life."""
        built = self.create(name, attributes)
        assert built is not None, self.log()
        outputs = built.output_tensors(inputs)
        built.build_for(inputs, outputs)
        saved = built.fields()
        restored = self.create_from(name, saved)
        assert restored is not None, self.log()
        assert contents(restored.fields()) == contents(saved)
        attached = restored.attach().clone().attach()
        return attached.enqueue(inputs, outputs, workspace=built.workspace(inputs, outputs))


class Plugin:
    """One plugin; destroyed with this object."""

    def __init__(self, host: Host, address: int) -> None:
        self.host, self.abi, self.handle = host, host.abi, c_void_p(address)

    def __del__(self) -> None:
        self.abi.plugin_destroy(self.handle)

    def clone(self) -> "Plugin":
        return Plugin(self.host, self.abi.plugin_clone(self.handle))

    def attach(self) -> "Plugin":
        return Plugin(self.host, self.abi.plugin_attach(self.handle))

    def fields(self) -> Fields:
        return self.abi.plugin_fields(self.handle).contents

    def output_types(self, codes: Sequence[int]) -> list[int] | None:
        count = self.abi.plugin_outputs(self.handle)
        out = (c_int32 * count)()
        given = (c_int32 * len(codes))(*codes)
        status = self.abi.plugin_output_types(self.handle, out, count, given, len(codes))
        return None if status else list(out)

    def output_shapes(
        self, shapes: Sequence[Sequence[int]]
    ) -> tuple[list[list[int]], list[list[bool]]] | None:
        """Shapes, and which sizes are constant; a negative size is an unknown one of -size."""
        count = self.abi.plugin_outputs(self.handle)
        out, constant = (Dims * count)(), (c_int32 * (count * MAX_DIMS))()
        given = (Dims * len(shapes))(*map(dims, shapes))
        status = self.abi.plugin_output_shapes(
            self.handle, given, len(shapes), out, count, constant
        )
        if status:
            return None
        sizes = [list(o.d[: o.rank]) for o in out]
        known = [
            [bool(c) for c in constant[i * MAX_DIMS : i * MAX_DIMS + len(shape)]]
            for i, shape in enumerate(sizes)
        ]
        return sizes, known

    def output_tensors(self, inputs: Sequence[np.ndarray]) -> list[tuple[list[int], int]]:
        """Shape and type of every output, as the plugin says."""
        types = self.output_types([TYPES[x.dtype] for x in inputs])
        shapes = self.output_shapes([x.shape for x in inputs])
        assert types is not None, self.host.log()
        assert shapes is not None, self.host.log()
        return list(zip(shapes[0], types, strict=True))

    def dynamic_tensors(self, tensors: Sequence[tuple[Sequence[int], int]]) -> Any:
        return (DynamicTensor * len(tensors))(*(dynamic(*t) for t in tensors))

    def supports(
        self, position: int, tensors: Sequence[tuple[Sequence[int], int]], inputs: int
    ) -> bool:
        described = self.dynamic_tensors(tensors)
        return bool(
            self.abi.plugin_supports(
                self.handle, position, described, inputs, len(tensors) - inputs
            )
        )

    def build_for(
        self, inputs: Sequence[np.ndarray], outputs: Sequence[tuple[list[int], int]]
    ) -> None:
        """What the builder does: formats, then configure."""
        given = [(x.shape, TYPES[x.dtype]) for x in inputs]
        for position in range(len(given) + len(outputs)):
            assert self.supports(position, [*given, *outputs], len(given)), position
        status = self.abi.plugin_configure(
            self.handle,
            self.dynamic_tensors(given),
            len(given),
            self.dynamic_tensors(outputs),
            len(outputs),
        )
        assert status == 0, self.host.log()

    def workspace(
        self, inputs: Sequence[np.ndarray], outputs: Sequence[tuple[list[int], int]]
    ) -> int:
        given = [(x.shape, TYPES[x.dtype]) for x in inputs]
        return int(
            self.abi.plugin_workspace(
                self.handle,
                self.dynamic_tensors(given),
                len(given),
                self.dynamic_tensors(outputs),
                len(outputs),
            )
        )

    def on_shape_change(
        self,
        inputs: Sequence[tuple[Sequence[int], int]],
        outputs: Sequence[tuple[Sequence[int], int]],
    ) -> int:
        given = (Tensor * len(inputs))(*(tensor(*t) for t in inputs))
        made = (Tensor * len(outputs))(*(tensor(*t) for t in outputs))
        return int(
            self.abi.plugin_on_shape_change(self.handle, given, len(inputs), made, len(outputs))
        )

    def enqueue(
        self,
        inputs: Sequence[np.ndarray],
        outputs: Sequence[tuple[list[int], int]],
        *,
        workspace: int,
        in_place: bool = True,
    ) -> list[np.ndarray]:
        """The outputs; one that aliases an input lies in its memory unless not `in_place`."""
        memory = self.host.memory
        described = [(x.shape, TYPES[x.dtype]) for x in inputs]
        assert self.on_shape_change(described, outputs) == 0, self.host.log()
        held = [memory.put(x) for x in inputs]
        made = []
        for i, (shape, code) in enumerate(outputs):
            source = self.abi.plugin_aliased_input(self.handle, i)
            fresh = np.full(int(np.prod(shape)) * NUMPY[code].itemsize, 0xEE, np.uint8)
            made.append(held[source] if source >= 0 and in_place else memory.put(fresh))
        scratch = memory.put(np.full(workspace, 0xAB, np.uint8))  # TensorRT's is dirty
        status = self.abi.plugin_enqueue(
            self.handle,
            (Tensor * len(inputs))(*(tensor(*t) for t in described)),
            (Tensor * len(outputs))(*(tensor(*t) for t in outputs)),
            (c_void_p * len(inputs))(*map(memory.address, held)),
            (c_void_p * len(outputs))(*map(memory.address, made)),
            c_void_p(memory.address(scratch)),
            self._stream(),
        )
        if status:
            raise RuntimeError(self.host.log())
        memory.read(scratch, [workspace], np.dtype(np.uint8))
        for x, source in zip(inputs, held, strict=True):
            memory.read(source, x.shape, x.dtype)
        return [
            memory.read(m, shape, NUMPY[code])
            for m, (shape, code) in zip(made, outputs, strict=True)
        ]

    def _stream(self) -> c_void_p | None:
        if not self.host.memory.on_gpu:
            return None
        import torch  # noqa: PLC0415

        return c_void_p(torch.cuda.current_stream().cuda_stream)
