# SPDX-License-Identifier: Apache-2.0
"""Quantize the KV cache: new keys and values are rounded once, when they are written.

    before:  K = Concat(past, k)                       y = Attention(q, K, V, mask)
    packed:  K, s, z = KvAppend(k, past, past_s, past_z)  y = KvAttention(q, K, s, z, V, s, z, mask)
    groups:  K, s, z = KvAppendGroups(...)   y = Attention(q, KvDequantize(K, s, z), ..., mask)
    float:   K = Concat(past, KvFakeQuantize(k))       y = Attention(q, K, V, mask)

Lossy: by default asymmetric, with one scale per token and head. ``packed`` stores two codes of up
to 4 bits to a byte, wider ones one to a byte, with float32 scales and zero points as graph inputs
and outputs; ``float`` keeps the cache's interface, so that other clients run the file, with values
that lie on the same grid. Symmetric keys or values have a constant zero point, and are written by
``KvAppendGroups`` and read by the same attention. (QuaRot, section 4: KV cache.)
"""

from collections.abc import Callable, Mapping
from typing import Literal

import onnx_ir as ir

from quarot_onnx import ops
from quarot_onnx.decoder import Attention, Decoder
from quarot_onnx.errors import UnsupportedModelError
from quarot_onnx.passes.base import Effect, Pass, Report
from quarot_onnx.rounding import Choice, Quantizer, Site

CacheForm = Literal["packed", "float"]


class QuantizeKvCachePass(Pass):
    """Replace each cache append, and with a packed cache each attention."""

    effect = Effect.LOSSY

    def __init__(
        self, decoder: Decoder, choose: Callable[[], Choice], *, bits: int, form: CacheForm
    ) -> None:
        """`choose` gives the sites and what is decided for them, when the pass runs.

        `quantizers` are the nodes that it has put in place.
        """
        super().__init__(decoder)
        self.choose = choose
        self.is_packed = bits <= ops.PACKED_BITS
        self.form: CacheForm = form
        self.quantizers: list[Quantizer] = []

    def requires(self) -> None:
        """Two codes to a byte need an even head_dim."""
        if self.form == "float" or not self.is_packed:
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
        choice = self.choose()
        sites = {site.name: site for site in choice.sites}
        for layer in self.decoder.layers:
            attention = layer.attention
            by_kind = {kind: sites[attention.cache_site(kind)] for kind in ("key", "value")}
            if self.form == "float":
                self._fake_quantize(attention.key_append, by_kind["key"])
                self._fake_quantize(attention.value_append, by_kind["value"])
            else:
                self._pack(attention, by_kind)
        ops.declare(self.decoder.model)
        detail = f"{choice.describe('per token and head')}, {self.form} cache"
        return self.report(2 * len(self.decoder.layers), detail, records=choice.records())

    def _fake_quantize(self, append: ir.Node, site: Site) -> None:
        node = self._quantizer("KvFakeQuantize", [site.value], site)
        node.outputs[0].type, node.outputs[0].shape = site.value.type, site.value.shape
        self.decoder.model.graph.insert_before(append, node)
        append.replace_input_with(1, node.outputs[0])

    def _quantizer(self, operator: str, inputs: list[ir.Value], site: Site) -> ir.Node:
        """The common operator where a head has one asymmetric scale, as in the kernels."""
        is_common = not site.rounding.symmetric and not site.has_groups
        suffix = "Int8" if operator == "KvAppend" and not self.is_packed else ""
        name = f"{operator}{'' if is_common else 'Groups'}{suffix}"
        attributes = site.rounding.attributes
        wanted = {key: attributes[key] for key in ops.OPERATORS[name].attributes}
        node = ops.node(name, inputs, wanted, at=_named(site, operator))
        self.quantizers.append(Quantizer(site, node))
        return node

    def _pack(self, attention: Attention, sites: Mapping[str, Site]) -> None:
        graph = self.decoder.model.graph
        suffix = "" if self.is_packed else "Int8"
        cached: list[list[ir.Value]] = []
        for append, site in (
            (attention.key_append, sites["key"]),
            (attention.value_append, sites["value"]),
        ):
            past = append.inputs[0]
            assert past is not None
            inputs = [site.value, *self._cache_inputs(past, site)]
            node = self._quantizer("KvAppend", inputs, site)
            self._cache_outputs(append.outputs[0], node, past, site)
            graph.insert_before(append, node)
            cached.append(list(node.outputs))
        if any(site.has_groups for site in sites.values()):
            for append, site, held in zip(
                (attention.key_append, attention.value_append), sites.values(), cached, strict=True
            ):
                self._dequantize(append, site, held, suffix)
        else:
            self._attend(attention, cached[0] + cached[1], suffix)
        for node in (attention.key_append, attention.value_append):
            graph.remove(node, safe=True)

    def _dequantize(self, append: ir.Node, site: Site, cached: list[ir.Value], suffix: str) -> None:
        """Let the attention read floats: with several scales to a head it cannot read codes."""
        floats = append.outputs[0]
        node = ops.node(
            f"KvDequantize{suffix}",
            cached,
            {"dtype": int(floats.dtype or ir.DataType.FLOAT)},
            at=_named(site, "KvDequantize"),
        )
        node.outputs[0].type, node.outputs[0].shape = floats.type, floats.shape
        self.decoder.model.graph.insert_before(append, node)
        floats.replace_all_uses_with(node.outputs[0])

    def _attend(self, attention: Attention, cached: list[ir.Value], suffix: str) -> None:
        """Let the attention read codes."""
        graph = self.decoder.model.graph
        module = (attention.node.name or "").rpartition("/")[0]
        query, _, _, mask, *others = attention.node.inputs
        sinks = [v for v in others if v is not None]
        assert query is not None
        assert mask is not None
        given = attention.node.attributes
        names = [name for name in ("scale", "softcap") if name in given]
        form = "Softcap" if "softcap" in given else "Sinks" if sinks else ""
        replacement = ops.node(
            f"KvAttention{form}{suffix}",
            [query, *cached, mask, *sinks],
            {name: given[name].as_float() for name in names},
            at=f"{module}/KvAttention",
        )
        old, new_output = attention.node.outputs[0], replacement.outputs[0]
        new_output.type, new_output.shape = old.type, old.shape
        graph.insert_before(attention.node, replacement)
        old.replace_all_uses_with(new_output)
        graph.remove(attention.node, safe=True)

    def _cache_inputs(self, past: ir.Value, site: Site) -> list[ir.Value]:
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
                shape=ir.Shape([*leading, site.features // site.rounding.group_size]),
            )
            for part in ("scale", "zero")
        ]
        for offset, value in enumerate(extra, start=1):
            graph.inputs.insert(position + offset, value)
        return [past, *extra]

    def _cache_outputs(self, present: ir.Value, node: ir.Node, past: ir.Value, site: Site) -> None:
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
            value.shape = ir.Shape([*leading, site.features // site.rounding.group_size])
        position = list(graph.outputs).index(present)
        graph.outputs[position] = codes
        graph.outputs.insert(position + 1, scale)
        graph.outputs.insert(position + 2, zero)

    def _stored_size(self, head_dim: object) -> int:
        assert isinstance(head_dim, int)
        return head_dim // 2 if self.is_packed else head_dim


def _named(site: Site, operator: str) -> str:
    """``/model/layers.0/self_attn/KvAppend_key``."""
    module, _, kind = site.name.rpartition("/")
    return f"{module}/{operator}_{kind.removeprefix('cached_')}"
