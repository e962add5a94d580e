# SPDX-License-Identifier: Apache-2.0
"""The kernels' C ABI (``plugins_cuda/include/quarot_kernels.h``) for Python, through ctypes.

One class, ``Kernels``, wraps either library: the CUDA one takes device pointers, the emulation one
host memory. An array argument is anything with a pointer: a NumPy array, an object with
``data_ptr()`` (torch), with ``__cuda_array_interface__`` (cupy), or an int. Nothing is converted,
copied or allocated here; shapes are stated as the C header states them.
"""

import ctypes
from ctypes import (
    POINTER,
    Structure,
    byref,
    c_char_p,
    c_float,
    c_int32,
    c_int64,
    c_size_t,
    c_uint32,
    c_void_p,
)
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from quarot_onnx.errors import MissingDependencyError, UnsupportedModelError
from quarot_onnx.plugins.layouts import Layout

ABI_VERSION: Final = 3

Pointer = Any
"""An int, a NumPy array, or an object with data_ptr() or __cuda_array_interface__; None is null."""


class Dtype(IntEnum):
    """``qr_dtype``."""

    FP16 = 0
    BF16 = 1
    INT32 = 2


class Prologue(IntEnum):
    """``qr_prologue``: what happens to a row first."""

    NONE = 0
    RMSNORM = 1
    SILU_MUL = 2


class Epilogue(IntEnum):
    """``qr_epilogue``: what a row becomes."""

    STORE = 0
    QUANTIZE = 1


class GemmKernel(IntEnum):
    """``qr_gemm_kernel``."""

    AUTO = 0
    MMA_S4 = 1
    MMA_S8 = 2
    WGMMA_S8 = 3
    DECODE = 4
    CUTLASS = 5


class HadamardPlan(Structure):
    """``qr_hadamard_plan``; its sign words (on the device) must live as long as it is used."""

    _fields_ = [
        ("dense", c_int32 * 3),
        ("butterflies", c_int32),
        ("inner", c_int32),
        ("signs", c_void_p),
    ]


class _TransformArgs(Structure):
    _fields_ = [
        ("dtype", c_int32),
        ("prologue", c_int32),
        ("epilogue", c_int32),
        ("activation_layout", c_int32),
        ("rows", c_int64),
        ("n", c_int64),
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("up", c_void_p),
        ("up_stride", c_int64),
        ("norm_weight", c_void_p),
        ("epsilon", c_float),
        ("clip_ratio", c_float),
        ("hadamard", HadamardPlan),
        ("y", c_void_p),
        ("codes", c_void_p),
        ("scale", c_void_p),
        ("workspace", c_void_p),
        ("workspace_bytes", c_size_t),
    ]


class GemmArgs(Structure):
    """``qr_gemm_args``."""

    _fields_ = [
        ("kernel", c_int32),
        ("out_dtype", c_int32),
        ("activation_layout", c_int32),
        ("weight_layout", c_int32),
        ("m", c_int64),
        ("n", c_int64),
        ("k", c_int64),
        ("q", c_void_p),
        ("scale", c_void_p),
        ("zero", c_void_p),
        ("w", c_void_p),
        ("w_scale", c_void_p),
        ("w_sum", c_void_p),
        ("bias", c_void_p),
        ("y", c_void_p),
        ("y_stride", c_int64),
        ("split_k", c_int32),
        ("workspace", c_void_p),
        ("workspace_bytes", c_size_t),
    ]


class _KvCacheArgs(Structure):
    _fields_ = [("codes", c_void_p), ("scale", c_void_p), ("zero", c_void_p)]


class _KvAppendArgs(Structure):
    _fields_ = [
        ("dtype", c_int32),
        ("batch", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("tokens", c_int64),
        ("capacity", c_int64),
        ("k", c_void_p),
        ("v", c_void_p),
        ("strides", c_int64 * 3),
        ("lengths", c_void_p),
        ("start", c_int32),
        ("rotate_k", c_int32),
        ("clip_ratio", c_float),
        ("key", _KvCacheArgs),
        ("value", _KvCacheArgs),
    ]


class _KvAttentionArgs(Structure):
    _fields_ = [
        ("dtype", c_int32),
        ("epilogue", c_int32),
        ("activation_layout", c_int32),
        ("batch", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("query_tokens", c_int64),
        ("capacity", c_int64),
        ("max_length", c_int64),
        ("q", c_void_p),
        ("strides", c_int64 * 3),
        ("key", _KvCacheArgs),
        ("value", _KvCacheArgs),
        ("lengths", c_void_p),
        ("mask", c_void_p),
        ("softmax_scale", c_float),
        ("rotate_q", c_int32),
        ("split_kv", c_int32),
        ("heads_hadamard", HadamardPlan),
        ("clip_ratio", c_float),
        ("y", c_void_p),
        ("codes", c_void_p),
        ("scale", c_void_p),
        ("workspace", c_void_p),
        ("workspace_bytes", c_size_t),
    ]


class EmulationOptions(Structure):
    """``qr_emulation_options``."""

    _fields_ = [
        ("seed", c_uint32),
        ("workers", c_int32),
        ("compute_capability", c_int32),
        ("check_races", c_int32),
        ("count_banks", c_int32),
    ]


class EmulationCounters(Structure):
    """``qr_emulation_counters``."""

    _fields_ = [
        ("blocks", c_int64),
        ("matrix_loads", c_int64),
        ("matrix_load_conflicts", c_int64),
        ("vector_accesses", c_int64),
        ("vector_conflicts", c_int64),
        ("mma_instructions", c_int64),
        ("async_copies", c_int64),
    ]


@dataclass(frozen=True)
class KvCache:
    """K or V: codes uint8 [B, H, capacity, D/2], scale and zero float32 [B, H, capacity]."""

    codes: Pointer
    scale: Pointer
    zero: Pointer

    def _args(self) -> _KvCacheArgs:
        return _KvCacheArgs(_address(self.codes), _address(self.scale), _address(self.zero))


def _address(array: Pointer) -> int | None:
    if array is None or isinstance(array, int):
        return array
    if isinstance(array, np.ndarray):
        return array.ctypes.data
    if hasattr(array, "data_ptr"):
        return int(array.data_ptr())
    return int(array.__cuda_array_interface__["data"][0])


def _strides(strides: tuple[int, int, int]) -> Any:
    return (c_int64 * 3)(*strides)


class Kernels:
    """A loaded kernel library.

    Every method that launches takes ``stream`` (an int; None is the default stream) and raises
    ``UnsupportedModelError`` with the library's own words when it refuses the arguments.
    """

    def __init__(self, path: Path) -> None:
        try:
            self.library = ctypes.CDLL(str(path))
        except OSError as error:
            raise MissingDependencyError(
                f"kernels: {path} cannot be loaded ({error}); build it with make -C plugins_cuda"
            ) from error
        self._declare()
        if (version := int(self.library.qr_abi_version())) != ABI_VERSION:
            raise MissingDependencyError(
                f"kernels: {path} has ABI version {version} and this package {ABI_VERSION};"
                " build it again with make -C plugins_cuda"
            )
        self.backend: str = self.library.qr_backend().decode()

    def _declare(self) -> None:
        library = self.library
        library.qr_status_string.restype = library.qr_backend.restype = c_char_p
        library.qr_make_hadamard_plan.argtypes = [
            POINTER(c_int32),
            c_int32,
            c_int32,
            c_void_p,
            c_void_p,
            POINTER(HadamardPlan),
        ]
        library.qr_hadamard_sign_words.argtypes = [POINTER(c_int32), c_int32]
        library.qr_hadamard_sign_words.restype = c_size_t
        for name, args in (
            ("qr_transform", _TransformArgs),
            ("qr_gemm", GemmArgs),
            ("qr_kv_append", _KvAppendArgs),
            ("qr_kv_attention", _KvAttentionArgs),
        ):
            getattr(library, name).argtypes = [POINTER(args), c_void_p]
        for name, sized in (
            ("qr_transform_workspace_size", _TransformArgs),
            ("qr_gemm_workspace_size", GemmArgs),
            ("qr_kv_attention_workspace_size", _KvAttentionArgs),
        ):
            getattr(library, name).argtypes = [POINTER(sized)]
            getattr(library, name).restype = c_size_t
        library.qr_gemm_workspace_init.argtypes = [c_void_p, c_size_t, c_void_p]
        library.qr_weight_bytes.argtypes = [c_int32, c_int64, c_int64]
        library.qr_weight_bytes.restype = c_size_t
        library.qr_pack_weight.argtypes = [c_int32, c_int64, c_int64, c_void_p, c_void_p, c_void_p]
        library.qr_weight_sums.argtypes = [c_int64, c_int64, c_void_p, c_void_p, c_void_p]
        library.qr_split_activations.argtypes = [c_int64, c_int64, c_void_p, c_void_p, c_void_p]
        library.qr_gemm_preferred_layouts.argtypes = [
            c_int32,
            c_int64,
            POINTER(c_int32),
            POINTER(c_int32),
        ]
        library.qr_kv_dequantize.argtypes = [
            c_int32,
            c_int32,
            c_int32,
            c_int32,
            c_int64,
            c_int64,
            POINTER(_KvCacheArgs),
            c_void_p,
            c_void_p,
        ]
        if hasattr(library, "qr_emulation_configure"):
            library.qr_emulation_configure.argtypes = [POINTER(EmulationOptions)]
            library.qr_emulation_configure.restype = None
            library.qr_emulation_read_counters.argtypes = [POINTER(EmulationCounters)]
            library.qr_emulation_read_counters.restype = None
            library.qr_emulation_reset_counters.restype = None

    def check(self, status: int, where: str) -> None:
        """Raises when ``status`` is not ``QR_OK``."""
        if status:
            text = self.library.qr_status_string(status).decode()
            raise UnsupportedModelError(
                f"kernels: {where} returned status {status}: {text};"
                " see the table of supported shapes in docs/kernels.md"
            )

    # Hadamard transforms and quantization

    def hadamard_plan(
        self,
        factors: tuple[int, ...],
        matrices: list[NDArray[np.int8]],
        *,
        inner: int = 1,
    ) -> tuple[HadamardPlan, NDArray[np.uint32]]:
        """A plan and its sign words, which the caller copies to the device for ``plan.signs``.

        Args:
            factors: orders of the Kronecker factors, slowest index first.
            matrices: the ±1 matrix [f, f] of every factor that is not a power of two, in order.
            inner: length of a trailing identity; head_dim for a transform across heads.
        """
        orders = (c_int32 * len(factors))(*factors)
        count = self.library.qr_hadamard_sign_words(orders, len(factors))
        words = np.zeros(max(count, 4), np.uint32)
        packed = np.concatenate([np.zeros(0, np.int8), *(m.ravel() for m in matrices)])
        plan = HadamardPlan()
        status = self.library.qr_make_hadamard_plan(
            orders, len(factors), inner, packed.ctypes.data, words.ctypes.data, byref(plan)
        )
        self.check(status, f"hadamard_plan(factors={factors}, inner={inner})")
        return plan, words

    def transform(
        self,
        dtype: Dtype,
        rows: int,
        n: int,
        x: Pointer,
        *,
        x_stride: int | None = None,
        prologue: Prologue = Prologue.NONE,
        up: Pointer = None,
        up_stride: int | None = None,
        norm_weight: Pointer = None,
        epsilon: float = 1e-6,
        hadamard: HadamardPlan | None = None,
        y: Pointer = None,
        codes: Pointer = None,
        scale: Pointer = None,
        layout: int = Layout.ACTIVATIONS_PACKED_V1,
        clip_ratio: float = 0.9,
        workspace: Pointer = None,
        workspace_bytes: int = 0,
        stream: int | None = None,
    ) -> None:
        """``qr_transform``: prologue, Hadamard, and ``y`` or else ``codes`` and ``scale``.

        ``workspace`` holds ``transform_workspace_size`` bytes, on the device.
        """
        args = _TransformArgs(
            dtype=dtype,
            prologue=prologue,
            epilogue=Epilogue.STORE if codes is None else Epilogue.QUANTIZE,
            activation_layout=layout,
            rows=rows,
            n=n,
            x=_address(x),
            x_stride=n if x_stride is None else x_stride,
            up=_address(up),
            up_stride=n if up_stride is None else up_stride,
            norm_weight=_address(norm_weight),
            epsilon=epsilon,
            clip_ratio=clip_ratio,
            hadamard=HadamardPlan() if hadamard is None else hadamard,
            y=_address(y),
            codes=_address(codes),
            scale=_address(scale),
            workspace=_address(workspace),
            workspace_bytes=workspace_bytes,
        )
        self.check(self.library.qr_transform(byref(args), stream), f"transform(rows={rows}, n={n})")

    def transform_workspace_size(
        self,
        rows: int,
        n: int,
        hadamard: HadamardPlan | None = None,
        prologue: Prologue = Prologue.NONE,
    ) -> int:
        """Bytes that ``transform`` needs on the current device: 0 unless a row is too wide."""
        args = _TransformArgs(
            rows=rows,
            n=n,
            prologue=prologue,
            hadamard=HadamardPlan() if hadamard is None else hadamard,
        )
        return int(self.library.qr_transform_workspace_size(byref(args)))

    # KV cache

    def kv_append(
        self,
        dtype: Dtype,
        k: Pointer,
        v: Pointer,
        *,
        batch: int,
        kv_heads: int,
        head_dim: int,
        tokens: int,
        capacity: int,
        strides: tuple[int, int, int],
        key: KvCache,
        value: KvCache | None,
        lengths: Pointer = None,
        start: int = 0,
        rotate_k: bool = False,
        clip_ratio: float = 0.95,
        stream: int | None = None,
    ) -> None:
        """``qr_kv_append``: quantize the new K (and V) and write them behind what is there."""
        args = _KvAppendArgs(
            dtype=dtype,
            batch=batch,
            kv_heads=kv_heads,
            head_dim=head_dim,
            tokens=tokens,
            capacity=capacity,
            k=_address(k),
            v=_address(v),
            strides=_strides(strides),
            lengths=_address(lengths),
            start=start,
            rotate_k=rotate_k,
            clip_ratio=clip_ratio,
            key=key._args(),
            value=_KvCacheArgs() if value is None else value._args(),
        )
        self.check(self.library.qr_kv_append(byref(args), stream), f"kv_append(tokens={tokens})")

    def kv_attention_args(
        self,
        dtype: Dtype,
        q: Pointer,
        *,
        batch: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        query_tokens: int,
        capacity: int,
        max_length: int,
        strides: tuple[int, int, int],
        key: KvCache,
        value: KvCache,
        softmax_scale: float,
        lengths: Pointer = None,
        mask: Pointer = None,
        rotate_q: bool = False,
        split_kv: int = 0,
        heads_hadamard: HadamardPlan | None = None,
        y: Pointer = None,
        codes: Pointer = None,
        scale: Pointer = None,
        layout: int = Layout.ACTIVATIONS_PACKED_V1,
        clip_ratio: float = 0.9,
    ) -> _KvAttentionArgs:
        """``qr_kv_attention_args`` without a workspace; ``kv_attention`` takes it with one."""
        return _KvAttentionArgs(
            dtype=dtype,
            epilogue=Epilogue.STORE if codes is None else Epilogue.QUANTIZE,
            activation_layout=layout,
            batch=batch,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            query_tokens=query_tokens,
            capacity=capacity,
            max_length=max_length,
            q=_address(q),
            strides=_strides(strides),
            key=key._args(),
            value=value._args(),
            lengths=_address(lengths),
            mask=_address(mask),
            softmax_scale=softmax_scale,
            rotate_q=rotate_q,
            split_kv=split_kv,
            heads_hadamard=HadamardPlan() if heads_hadamard is None else heads_hadamard,
            clip_ratio=clip_ratio,
            y=_address(y),
            codes=_address(codes),
            scale=_address(scale),
        )

    def kv_attention_workspace_size(self, args: _KvAttentionArgs) -> int:
        """Bytes of workspace; 0 also when the arguments are refused."""
        return int(self.library.qr_kv_attention_workspace_size(byref(args)))

    def kv_attention(
        self,
        args: _KvAttentionArgs,
        workspace: Pointer = None,
        workspace_bytes: int = 0,
        *,
        stream: int | None = None,
    ) -> None:
        """``qr_kv_attention``: attention over the packed cache."""
        args.workspace, args.workspace_bytes = _address(workspace), workspace_bytes
        status = self.library.qr_kv_attention(byref(args), stream)
        self.check(status, f"kv_attention(head_dim={args.head_dim}, heads={args.heads})")

    def kv_dequantize(
        self,
        dtype: Dtype,
        cache: KvCache,
        values: Pointer,
        *,
        batch: int,
        kv_heads: int,
        head_dim: int,
        capacity: int,
        tokens: int,
        stream: int | None = None,
    ) -> None:
        """``qr_kv_dequantize``: the first ``tokens`` positions, dense [B, H, tokens, D]."""
        status = self.library.qr_kv_dequantize(
            dtype,
            batch,
            kv_heads,
            head_dim,
            capacity,
            tokens,
            byref(cache._args()),
            _address(values),
            stream,
        )
        self.check(status, f"kv_dequantize(head_dim={head_dim}, tokens={tokens})")

    # GEMM

    def gemm_workspace_size(self, args: GemmArgs) -> int:
        """Bytes of workspace."""
        return int(self.library.qr_gemm_workspace_size(byref(args)))

    def gemm_workspace_init(
        self, workspace: Pointer, workspace_bytes: int, *, stream: int | None = None
    ) -> None:
        """``qr_gemm_workspace_init``: zeros, once per workspace."""
        status = self.library.qr_gemm_workspace_init(_address(workspace), workspace_bytes, stream)
        self.check(status, f"gemm_workspace_init(bytes={workspace_bytes})")

    def gemm(self, args: GemmArgs, *, stream: int | None = None) -> None:
        """``qr_gemm``."""
        self.check(
            self.library.qr_gemm(byref(args), stream), f"gemm(m={args.m}, n={args.n}, k={args.k})"
        )

    def weight_bytes(self, layout: int, n: int, k: int) -> int:
        """Bytes of an [n, k] weight in a layout; 0 when it is not supported."""
        return int(self.library.qr_weight_bytes(layout, n, k))

    def pack_weight(
        self,
        layout: int,
        n: int,
        k: int,
        packed: Pointer,
        out: Pointer,
        *,
        stream: int | None = None,
    ) -> None:
        """``qr_pack_weight``: packed order to ``layout``."""
        status = self.library.qr_pack_weight(layout, n, k, _address(packed), _address(out), stream)
        self.check(status, f"pack_weight(n={n}, k={k})")

    def weight_sums(
        self, n: int, k: int, packed: Pointer, w_sum: Pointer, *, stream: int | None = None
    ) -> None:
        """``qr_weight_sums``: the sum of every output feature's codes, int32 [n]."""
        status = self.library.qr_weight_sums(n, k, _address(packed), _address(w_sum), stream)
        self.check(status, f"weight_sums(n={n}, k={k})")

    def split_activations(
        self, m: int, k: int, packed: Pointer, split: Pointer, *, stream: int | None = None
    ) -> None:
        """``qr_split_activations``: packed order to split order."""
        status = self.library.qr_split_activations(m, k, _address(packed), _address(split), stream)
        self.check(status, f"split_activations(m={m}, k={k})")

    def gemm_preferred_layouts(self, compute_capability: int, m: int) -> tuple[Layout, Layout]:
        """The (activation, weight) layouts that the fastest kernel for m tokens reads."""
        activation, weight = c_int32(), c_int32()
        status = self.library.qr_gemm_preferred_layouts(
            compute_capability, m, byref(activation), byref(weight)
        )
        self.check(status, f"gemm_preferred_layouts(compute_capability={compute_capability})")
        return Layout(activation.value), Layout(weight.value)

    # Emulation

    def configure_emulation(
        self,
        *,
        seed: int = 0,
        workers: int = 1,
        compute_capability: int = 90,
        check_races: bool = True,
        count_banks: bool = False,
    ) -> None:
        """Sets the emulator's options; only the emulation library has them."""
        options = EmulationOptions(seed, workers, compute_capability, check_races, count_banks)
        self.library.qr_emulation_configure(byref(options))

    def reset_emulation_counters(self) -> None:
        """Zeroes the emulator's counters; for tests of how a kernel uses memory and threads."""
        self.library.qr_emulation_reset_counters()

    def emulation_counters(self) -> EmulationCounters:
        """The emulator's counters since the last reset."""
        counters = EmulationCounters()
        self.library.qr_emulation_read_counters(byref(counters))
        return counters


__all__ = [
    "ABI_VERSION",
    "Dtype",
    "EmulationCounters",
    "EmulationOptions",
    "Epilogue",
    "GemmArgs",
    "GemmKernel",
    "HadamardPlan",
    "Kernels",
    "KvCache",
    "Layout",
    "Prologue",
]
