# SPDX-License-Identifier: Apache-2.0
"""Run a graph for TensorRT without TensorRT: plugins by the references of `ops`, in kernel layouts.

Everything else is run by onnx's own reference implementation, for the artifact's graph and for the
lowered one, so that both round alike.
"""

from pathlib import Path
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from quarot_onnx import ops
from quarot_onnx.hadamard import Plan
from quarot_onnx.plugins import layouts
from quarot_onnx.plugins.layouts import Layout

Array = NDArray[Any]
_NUMPY = {onnx.TensorProto.FLOAT16: np.float16, onnx.TensorProto.BFLOAT16: ml_dtypes.bfloat16}


def _rotate(x: Array, factors: list[int], heads: int, signs: Array | None) -> Array:
    """As the operator, rounded to x's dtype; `signs` must be what the factors ask for."""
    words = layouts.hadamard_signs(tuple(factors))
    assert (signs is None) == (len(words) == 0)
    assert signs is None or np.array_equal(signs, words)
    plan = Plan(int(np.prod(factors)), tuple(factors), int(np.prod(factors)))
    if heads:
        return ops.hadamard_heads(x, plan.matrix())
    return ops.hadamard(x, *plan.matrices())


class _Plugin(OpRun):
    """A node of the domain ``quarot``, which must name its plugin."""

    op_domain = "quarot"
    seen: ClassVar[list[str]] = []

    def _run(self, *inputs: Array, **_: Any) -> tuple[Array, ...]:
        held = {a.name: onnx.helper.get_attribute_value(a) for a in self.onnx_node.attribute}
        assert held.pop("plugin_namespace") == b"quarot"
        assert held.pop("plugin_version") == b"1"
        _Plugin.seen.append(type(self).__name__)
        return self.plugin(*inputs, **held)


class Hadamard(_Plugin):
    def plugin(self, x: Array, signs: Array | None = None, *, factors: list[int]) -> Any:
        return (_rotate(x, factors, 0, signs),)


class HadamardHeads(_Plugin):
    def plugin(self, x: Array, signs: Array | None = None, *, factors: list[int]) -> Any:
        return (_rotate(x, factors, 1, signs),)


class QuantizeInt4(_Plugin):
    def plugin(
        self,
        x: Array,
        signs: Array | None = None,
        *,
        bits: int,
        clip_ratio: float,
        activation_layout: int,
        factors: list[int] | None = None,
        heads: int = 0,
    ) -> Any:
        assert x.shape[-1] % 128 == 0
        if factors is not None:
            x = _rotate(x, factors, heads, signs)
        codes, scale = ops.quantize_int4(x, bits=bits, clip_ratio=clip_ratio)
        packed = ops.pack_int4(codes.astype(np.int16) - 128)
        if activation_layout == Layout.ACTIVATIONS_SPLIT_V1:
            return layouts.split_from_packed(packed.reshape(-1, packed.shape[-1])), scale
        assert activation_layout == Layout.ACTIVATIONS_PACKED_V1
        return packed.view(np.int8), scale


class Int4Gemm(_Plugin):
    def plugin(
        self,
        q: Array,
        scale: Array,
        w: Array,
        w_scale: Array,
        bias: Array | None = None,
        *,
        dtype: int,
        weight_layout: int,
        activation_layout: int,
    ) -> Any:
        assert weight_layout == Layout.WEIGHTS_FRAGMENTS_V1
        assert w.dtype == np.int8
        leading = scale.shape[:-1]
        if activation_layout == Layout.ACTIVATIONS_SPLIT_V1:
            k = q.shape[0] * q.shape[2]
            q = layouts.packed_from_split(q, int(np.prod(leading)), k)
        else:
            k = 2 * q.shape[-1]
        codes = ops.unpack_int4(q.view(np.uint8)).reshape(*leading, k)
        n = len(w_scale)
        weight = ops.unpack_int4(layouts.packed_from_fragments(w.view(np.uint8), n, k))
        y = ops.int4_gemm((codes.astype(np.int16) + 128).astype(np.uint8), scale, weight.T, w_scale)
        if bias is not None:
            assert bias.dtype == np.float32
            # The graph rounds before its own Add; the kernel does not. Round, to compare exactly.
            y = y.astype(_NUMPY[dtype]) + bias.astype(_NUMPY[dtype])
        return (y.astype(_NUMPY[dtype]),)


class KvAppend(_Plugin):
    def plugin(
        self,
        new: Array,
        past: Array,
        past_scale: Array,
        past_zero: Array,
        lengths: Array,
        *,
        bits: int,
        clip_ratio: float,
        rotate: int,
    ) -> Any:
        assert new.shape[-1] in {64, 128, 256}
        if rotate:
            new = _rotate(new, [new.shape[-1]], 0, None)
        codes, scale, zero = ops.quantize_kv(new, bits=bits, clip_ratio=clip_ratio)
        written = [past.copy(), past_scale.copy(), past_zero.copy()]
        for row, start in enumerate(lengths):
            for cache, values in zip(
                written, (ops.pack_kv(codes).view(np.int8), scale, zero), strict=True
            ):
                room = cache[row, :, start : start + new.shape[2]]
                room[...] = values[row][:, : room.shape[1]]
        return tuple(written)


class KvAttention(_Plugin):
    def plugin(self, q: Array, *inputs: Array, scale: float, rotate: int) -> Any:
        key, key_scale, key_zero, value, value_scale, value_zero, lengths, *given = inputs
        batch, heads, length, size = q.shape
        if rotate:
            q = _rotate(q, [size], 0, None)
        reach = lengths[:, None] + np.arange(length)
        mask = np.arange(key.shape[2]) <= reach[:, None, :, None]
        if given:
            assert given[0].dtype == np.bool_
            mask = mask & given[0]
        cache = (key.view(np.uint8), key_scale, key_zero)
        cache += (value.view(np.uint8), value_scale, value_zero)
        y = ops.kv_attention(q, *cache, mask, scale=scale)
        return (y.transpose(0, 2, 1, 3).reshape(batch, length, heads * size),)


PLUGINS = [Hadamard, HadamardHeads, QuantizeInt4, Int4Gemm, KvAppend, KvAttention]


class Engine:
    """A lowered graph with its caches, as an engine's context would hold them."""

    def __init__(self, model: Path, batch: int, capacity: int) -> None:
        loaded = onnx.load(model)
        self._run = ReferenceEvaluator(loaded, new_ops=PLUGINS)
        self.nodes = [node.op_type for node in loaded.graph.node]
        self.lengths = np.zeros(batch, np.int32)
        self.cache: dict[str, Array] = {}
        for value in loaded.graph.input:
            if value.name.startswith("past_key_values."):
                _, heads, _, last = (dim.dim_value for dim in value.type.tensor_type.shape.dim)
                kind = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
                # What was never written must never be read: poison, which finite codes cannot be.
                poison = np.nan if kind == np.float32 else 0x5A
                self.cache[value.name] = np.full((batch, heads, capacity, last), poison, kind)

    def step(self, input_ids: Array, real: Array | None = None) -> Array:
        """Logits [B, S, V]; row b holds ``real[b]`` tokens and then anything."""
        length = input_ids.shape[1]
        feed = {
            "input_ids": input_ids,
            "position_ids": self.lengths[:, None].astype(np.int64) + np.arange(length),
            "lengths": self.lengths,
            **{name: self._clean(name) for name in self.cache},
        }
        names = ["logits", *(name.replace("past_key_values", "present") for name in self.cache)]
        logits, *caches = self._run.run(names, feed)
        self.cache = dict(zip(self.cache, caches, strict=True))
        self.lengths = self.lengths + np.int32(length if real is None else real)
        return np.asarray(logits, np.float32)

    def _clean(self, name: str) -> Array:
        """The reference multiplies masked values by 0, and NaN times 0 is NaN."""
        return np.nan_to_num(self.cache[name], nan=1.0)


class Source:
    """The artifact's own graph, by the same reference implementation."""

    def __init__(self, model: Path, batch: int) -> None:
        loaded = onnx.load(model)
        self._run = ReferenceEvaluator(loaded)
        self._batch = batch
        self.cache: dict[str, Array] = {}
        self.past = 0
        for value in loaded.graph.input:
            if value.name.startswith("past_key_values."):
                _, heads, _, last = (dim.dim_value for dim in value.type.tensor_type.shape.dim)
                kind = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
                self.cache[value.name] = np.zeros((batch, heads, 0, last), kind)

    def step(self, input_ids: Array) -> Array:
        """Logits [B, S, V]."""
        length = input_ids.shape[1]
        feed = {
            "input_ids": input_ids,
            "attention_mask": np.ones((self._batch, self.past + length), np.int64),
            "position_ids": np.tile(np.arange(self.past, self.past + length), (self._batch, 1)),
            **self.cache,
        }
        names = ["logits", *(name.replace("past_key_values", "present") for name in self.cache)]
        feed = {name: feed[name] for name in self._run.input_names}
        logits, *caches = self._run.run(names, feed)
        self.cache = dict(zip(self.cache, caches, strict=True))
        self.past += length
        return np.asarray(logits, np.float32)
