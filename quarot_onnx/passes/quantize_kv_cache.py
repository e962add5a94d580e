# SPDX-License-Identifier: Apache-2.0
"""Quantize the KV cache: new keys and values are rounded once, when they are written.

    before:  K = Concat(past, k)                       y = Attention(q, K, V, mask)
    packed:  K, s, z = KvAppend(k, past, past_s, past_z)  y = KvAttention(q, K, s, z, V, s, z, mask)
    float:   K = Concat(past, KvFakeQuantize(k))       y = Attention(q, K, V, mask)

Lossy: asymmetric, per token and head. ``packed`` stores two 4-bit codes to a byte with a float32
scale and zero point per token and head as graph inputs and outputs; ``float`` keeps the cache's
interface, so that other clients run the file, with values that lie on the same grid. (QuaRot,
section 4: KV cache.)
"""

from typing import Literal

import onnx_ir as ir

from quarot_onnx import ops
from quarot_onnx.decoder import Attention, Decoder
from quarot_onnx.errors import UnsupportedModelError
from quarot_onnx.passes.base import Effect, Pass, Report

CacheForm = Literal["packed", "float"]


class QuantizeKvCachePass(Pass):
    """Replace each cache append, and with a packed cache each attention."""

    effect = Effect.LOSSY

    def __init__(self, decoder: Decoder, *, bits: int, clip_ratio: float, form: CacheForm) -> None:
        super().__init__(decoder)
        self.attributes = {"bits": bits, "clip_ratio": clip_ratio}
        self.bits = bits
        self.form: CacheForm = form

    def requires(self) -> None:
        """A packed cache needs an even head_dim."""
        if self.form == "float":
            return
        for layer in self.decoder.layers:
            attention = layer.attention
            if attention.head_dim % 2:
                raise UnsupportedModelError(
                    f"{attention.node.name}: head_dim = {attention.head_dim} is odd, two codes do "
                    "not fill bytes; set kv_cache.io=float"
                )

    def rewrite(self) -> Report:
        """Quantize key and value cache of every layer."""
        for layer in self.decoder.layers:
            attention = layer.attention
            if self.form == "float":
                for append, kind in (
                    (attention.key_append, "key"),
                    (attention.value_append, "value"),
                ):
                    self._fake_quantize(append, kind)
            else:
                self._pack(attention)
        ops.declare(self.decoder.model)
        detail = f"{self.bits} bits, per token and head, {self.form} cache"
        return self.report(2 * len(self.decoder.layers), detail)

    def _fake_quantize(self, append: ir.Node, kind: str) -> None:
        new = append.inputs[1]
        assert new is not None
        module = (append.name or "").rpartition("/")[0]
        node = ops.node(
            "KvFakeQuantize", [new], self.attributes, at=f"{module}/KvFakeQuantize_{kind}"
        )
        node.outputs[0].type, node.outputs[0].shape = new.type, new.shape
        self.decoder.model.graph.insert_before(append, node)
        append.replace_input_with(1, node.outputs[0])

    def _pack(self, attention: Attention) -> None:
        graph = self.decoder.model.graph
        suffix = "" if self.bits == 4 else "Int8"
        module = (attention.node.name or "").rpartition("/")[0]
        cached: list[ir.Value] = []
        for append, kind in ((attention.key_append, "key"), (attention.value_append, "value")):
            past, new = append.inputs
            assert past is not None
            assert new is not None
            node = ops.node(
                f"KvAppend{suffix}",
                [new, *self._cache_inputs(past)],
                self.attributes,
                at=f"{module}/KvAppend_{kind}",
            )
            self._cache_outputs(append.outputs[0], node, past)
            graph.insert_before(append, node)
            cached += node.outputs
        query, *_, mask = attention.node.inputs
        assert query is not None
        assert mask is not None
        given = attention.node.attributes
        names = [name for name in ("scale", "softcap") if name in given]
        replacement = ops.node(
            f"KvAttention{'Softcap' if 'softcap' in given else ''}{suffix}",
            [query, *cached, mask],
            {name: given[name].as_float() for name in names},
            at=f"{module}/KvAttention",
        )
        old, new_output = attention.node.outputs[0], replacement.outputs[0]
        new_output.type, new_output.shape = old.type, old.shape
        graph.insert_before(attention.node, replacement)
        old.replace_all_uses_with(new_output)
        for node in (attention.node, attention.key_append, attention.value_append):
            graph.remove(node, safe=True)

    def _cache_inputs(self, past: ir.Value) -> list[ir.Value]:
        """`past` retyped to codes, and new graph inputs for its scale and zero point."""
        graph = self.decoder.model.graph
        assert past.shape is not None
        *leading, size = past.shape
        past.type = ir.TensorType(ir.DataType.UINT8)
        past.shape = ir.Shape([*leading, self._stored_size(size)])
        position = list(graph.inputs).index(past)
        extra = [
            ir.Value(
                name=f"{past.name}_{part}",
                type=ir.TensorType(ir.DataType.FLOAT),
                shape=ir.Shape([*leading, 1]),
            )
            for part in ("scale", "zero")
        ]
        for offset, value in enumerate(extra, start=1):
            graph.inputs.insert(position + offset, value)
        return [past, *extra]

    def _cache_outputs(self, present: ir.Value, node: ir.Node, past: ir.Value) -> None:
        """Let the node's outputs take the place of graph output `present`."""
        graph = self.decoder.model.graph
        assert present.shape is not None
        *leading, size = present.shape
        codes, scale, zero = node.outputs
        codes.name = present.name
        present.name = f"{present.name}/float"
        codes.type = ir.TensorType(ir.DataType.UINT8)
        codes.shape = ir.Shape([*leading, self._stored_size(size)])
        for value, part in ((scale, "scale"), (zero, "zero")):
            value.name = f"{codes.name}_{part}"
            value.type = ir.TensorType(ir.DataType.FLOAT)
            value.shape = ir.Shape([*leading, 1])
        position = list(graph.outputs).index(present)
        graph.outputs[position] = codes
        graph.outputs.insert(position + 1, scale)
        graph.outputs.insert(position + 2, zero)

    def _stored_size(self, head_dim: object) -> int:
        assert isinstance(head_dim, int)
        return head_dim // 2 if self.bits == 4 else head_dim
