# SPDX-License-Identifier: Apache-2.0
"""Typed handles to the parts of a decoder's graph; `quarot_onnx.decoder` finds them.

A handle reads its node live, so it stays true while passes rewrite the graph around it.
"""

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from quarot_onnx.errors import UnsupportedModelError
from quarot_onnx.weights import ArraySource, Weight


def producer_of(value: ir.Value | None) -> ir.Node | None:
    """The node that computes `value`, if one does."""
    return value.producer() if value is not None else None


def weight_of(value: ir.Value | None) -> Weight | None:
    """The lazy weight behind an initializer, if it is one."""
    held = value.const_value if value is not None else None
    return held if isinstance(held, Weight) else None


def is_grouping(node: ir.Node) -> bool:
    """Whether `node` gives each of its outputs some rows of its input, as experts get theirs."""
    return node.op_type == "Split" and node.attributes.get_int("axis", 0) == 0


@dataclass(eq=False)
class Linear:
    """``y = x @ W (+ bias)``: a MatMul whose weight is an unshared initializer.

    Constructing one is the proof; `weight` is [in_features, out_features]. Passes that quantize it
    put another node in its place with `replace`; the handle, its weight and its sizes stay.

    Raises:
        UnsupportedModelError: the weight is not an initializer, or another node reads it too.
    """

    node: ir.Node
    weight: Weight = field(init=False)
    _bias_node: ir.Node | None = field(init=False)

    def __post_init__(self) -> None:
        value = self.node.inputs[1] if len(self.node.inputs) > 1 else None
        if value is None or weight_of(value) is None:
            raise UnsupportedModelError(
                f"{self.node.name}: its weight is not an initializer of its own; "
                "tied embeddings are untied by UntieEmbeddingsPass"
            )
        if len(value.uses()) != 1:
            readers = ", ".join(user.name or "?" for user, _ in value.uses())
            raise UnsupportedModelError(
                f"{self.node.name}: weight {value.name} is read by {readers}; it must be unshared"
            )
        weight = weight_of(value)
        assert weight is not None
        self.weight = weight
        self._bias_node = self._find_bias()

    @property
    def name(self) -> str:
        """The node's name, which is the module path."""
        return self.node.name or ""

    @property
    def module(self) -> str:
        """The name without the operator: ``/model/layers.0/mlp/down_proj``."""
        return self.name.rpartition("/")[0]

    @property
    def x(self) -> ir.Value:
        """The input activation, [..., in_features]."""
        value = self.node.inputs[0]
        assert value is not None
        return value

    @property
    def grouping(self) -> ir.Node | None:
        """The ``Split`` that gives an expert its rows; None for a linear that sees every token."""
        node = producer_of(self.x)
        return node if node is not None and is_grouping(node) else None

    @property
    def source(self) -> ir.Value:
        """The input before an expert's rows were taken from it, [..., in_features]."""
        grouping = self.grouping
        source = grouping.inputs[0] if grouping is not None else self.x
        assert source is not None
        return source

    @property
    def weight_value(self) -> ir.Value:
        """The initializer."""
        value = self.node.inputs[1]
        assert value is not None
        return value

    @property
    def in_features(self) -> int:
        """Rows of the weight."""
        return self.weight.sizes[0]

    @property
    def out_features(self) -> int:
        """Columns of the weight."""
        return self.weight.sizes[1]

    def _find_bias(self) -> ir.Node | None:
        uses = self.node.outputs[0].uses()
        if len(uses) != 1:
            return None
        node = next(iter(uses))[0]
        if node.op_type == "Add" and any(weight_of(v) is not None for v in node.inputs):
            return node
        return None

    @property
    def bias(self) -> Weight | None:
        """The bias [out_features], where there is one."""
        if self._bias_node is None:
            return None
        return next(w for v in self._bias_node.inputs if (w := weight_of(v)) is not None)

    @property
    def output(self) -> ir.Value:
        """The output with the bias added."""
        return (self._bias_node or self.node).outputs[0]

    def add_bias(self, graph: ir.Graph) -> Weight:
        """The bias, which from now on exists: zeros [out_features] where there was none."""
        if self.bias is not None:
            return self.bias
        name = f"{self.weight.name.removesuffix('.weight')}.bias"
        weight = Weight(name, ArraySource(np.zeros(self.out_features)), self.weight.dtype)
        value = ir.Value(
            name=name, type=ir.TensorType(weight.dtype), shape=ir.Shape([self.out_features])
        )
        value.const_value = weight
        graph.initializers[name] = value
        product = self.node.outputs[0]
        node = ir.node("Add", [product, value], name=f"{self.module}/Add")
        result = node.outputs[0]
        result.type, result.shape, result.name = (
            product.type,
            product.shape,
            f"{node.name}_output_0",
        )
        if product.is_graph_output():
            product.name, result.name = f"{self.name}_output_0", product.name
        product.replace_all_uses_with(result, replace_graph_outputs=True)
        node.replace_input_with(0, product)
        graph.insert_after(self.node, node)
        self._bias_node = node
        return weight

    def pad_inputs(self, in_features: int) -> None:
        """Give the weight rows of zeros up to `in_features`; the input must get as many zeros."""
        self.weight.pad_inputs(in_features)
        self.weight_value.shape = ir.Shape(self.weight.sizes)

    def replace(self, graph: ir.Graph, node: ir.Node) -> None:
        """Let `node`, which computes the same product, take this linear's place in `graph`."""
        old, new = self.node.outputs[0], node.outputs[0]
        new.type, new.shape = old.type, old.shape
        graph.insert_before(self.node, node)
        old.replace_all_uses_with(new)
        graph.remove(self.node, safe=True)
        self.node = node


@dataclass(eq=False)
class Norm:
    """A norm of the residual stream and the linears that read it.

    Attributes:
        node: an ``RMSNormalization``, or a ``LayerNormalization`` until its mean is folded.
        readers: every consumer of its output.
    """

    node: ir.Node
    readers: tuple[Linear, ...]

    @property
    def name(self) -> str:
        """The node's name."""
        return self.node.name or ""

    @property
    def scale(self) -> Weight:
        """The norm scale, gamma [hidden_size]."""
        weight = weight_of(self.node.inputs[1])
        assert weight is not None
        return weight

    @property
    def is_layer_norm(self) -> bool:
        """Whether it subtracts the mean."""
        return self.node.op_type == "LayerNormalization"

    @property
    def shift(self) -> Weight | None:
        """The bias of a LayerNorm, beta [hidden_size], where there is one."""
        inputs = self.node.inputs
        return weight_of(inputs[2]) if self.is_layer_norm and len(inputs) > 2 else None

    def drop_mean(self, graph: ir.Graph) -> None:
        """Put an ``RMSNormalization`` with the same scale and epsilon in a LayerNorm's place."""
        old, name = self.node, self.name.replace("LayerNormalization", "RMSNormalization")
        epsilon = old.attributes.get_float("epsilon", 1e-5)
        node = ir.node(
            "RMSNormalization", old.inputs[:2], {"axis": -1, "epsilon": epsilon}, name=name
        )
        result = node.outputs[0]
        result.name = f"{name}_output_0"
        result.type, result.shape = old.outputs[0].type, old.outputs[0].shape
        graph.insert_before(old, node)
        old.outputs[0].replace_all_uses_with(result)
        shift = old.inputs[2] if len(old.inputs) > 2 else None
        graph.remove(old, safe=True)
        if shift is not None and not shift.uses():
            graph.initializers.pop(shift.name or "")
        self.node = node


@dataclass(frozen=True, eq=False)
class PostNorm:
    """A norm between a writer and the residual stream, whose scale nothing can take over.

    Attributes:
        node: the ``RMSNormalization``.
        addition: the ``Add`` into the stream that reads it.
    """

    node: ir.Node
    addition: ir.Node

    @property
    def name(self) -> str:
        """The node's name."""
        return self.node.name or ""

    @property
    def module(self) -> str:
        """The name without the operator."""
        return self.name.rpartition("/")[0]

    @property
    def scale(self) -> Weight:
        """Its scale, gamma [hidden_size]."""
        weight = weight_of(self.node.inputs[1])
        assert weight is not None
        return weight


@dataclass(frozen=True, eq=False)
class Writer:
    """A linear whose output is added to the residual stream.

    Attributes:
        linear: the linear.
        post_norm: what its output goes through on the way; None is an addition as it is.
    """

    linear: Linear
    post_norm: PostNorm | None = None


@dataclass(frozen=True, eq=False)
class Attention:
    """Attention of one layer: the nodes between the q/k/v linears and o_proj.

    Attributes:
        node: ``Attention``, or ``AttentionSinks`` with one input more, the sinks [Hq]; inputs
            q [B, Hq, S, D], k and v [B, Hkv, T, D], mask.
        key_append: ``Concat(past, new)`` of the key cache.
        value_append: the same of the value cache.
        q, k, v, o: the linears.
        num_heads: query heads.
        num_kv_heads: cache heads.
        head_dim: features of a head.
    """

    node: ir.Node
    key_append: ir.Node
    value_append: ir.Node
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def cache_site(self, kind: str) -> str:
        """What the keys (``key``) or values (``value``) that enter the cache are called.

        ``/model/layers.0/self_attn/cached_key``: no module has such a name, where ``key`` is a
        linear of GPT-NeoX.
        """
        return f"{(self.node.name or '').rpartition('/')[0]}/cached_{kind}"


@dataclass(frozen=True, eq=False)
class Mlp:
    """A feed-forward network: readers (gate, up) and the writer (down)."""

    readers: tuple[Linear, ...]
    down: Linear


@dataclass(frozen=True, eq=False)
class Layer:
    """One decoder layer.

    Attributes:
        index: which.
        attention: its first half.
        mlps: its second half: one feed-forward, or the experts of a mixture in the order of their
            numbers and, where there is one, the shared expert, which every token visits.
        routers: the readers that say which experts a token visits and what each of them counts.
    """

    index: int
    attention: Attention
    mlps: tuple[Mlp, ...]
    routers: tuple[Linear, ...] = ()

    @property
    def mlp(self) -> Mlp:
        """The feed-forward of a layer that has one.

        Raises:
            UnsupportedModelError: the layer is a mixture of experts.
        """
        if len(self.mlps) != 1:
            raise UnsupportedModelError(
                f"{self.attention.node.name}: the layer has {len(self.mlps)} feed-forwards, a "
                "mixture of experts; choose a dense model for this"
            )
        return self.mlps[0]

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Every linear but the routers, in the order of computation."""
        a = self.attention
        feed_forward = (linear for mlp in self.mlps for linear in (*mlp.readers, mlp.down))
        return (a.q, a.k, a.v, a.o, *feed_forward)
