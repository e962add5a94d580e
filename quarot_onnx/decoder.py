# SPDX-License-Identifier: Apache-2.0
"""Where things are in a decoder's graph: typed handles, located once by dataflow.

`Decoder.locate` follows the residual stream from the embedding to the logits. Everything that
touches it must be one of four things: a norm, whose output only linears read (*readers*), the
output of a linear that is added to it, perhaps through a norm of its own (*writers*), an embedding
that is added to it, or a number that it is multiplied by. Whatever else is found is refused by
name, because a residual stream that is rotated in part is a wrong model that still talks.

Halves of a layer may follow each other or run side by side: attention and feed-forward are told
apart, and paired, by what their inputs are computed from.

A handle reads its node live, so it stays true while passes rewrite the graph around it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from quarot_onnx.errors import UnsupportedModelError
from quarot_onnx.weights import ArraySource, Weight

_SHAPE_OPS = frozenset({"Reshape", "Transpose", "Cast"})


def _producer(value: ir.Value | None) -> ir.Node | None:
    return value.producer() if value is not None else None


def weight_of(value: ir.Value | None) -> Weight | None:
    """The lazy weight behind an initializer, if it is one."""
    held = value.const_value if value is not None else None
    return held if isinstance(held, Weight) else None


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
        node: the ``Attention`` operator; inputs q [B, Hq, S, D], k and v [B, Hkv, T, D], mask.
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


@dataclass(frozen=True, eq=False)
class Mlp:
    """The feed-forward half of one layer: readers (gate, up) and the writer (down)."""

    readers: tuple[Linear, ...]
    down: Linear


@dataclass(frozen=True, eq=False)
class Layer:
    """One decoder layer."""

    index: int
    attention: Attention
    mlp: Mlp

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Every linear, in the order of computation."""
        a = self.attention
        return (a.q, a.k, a.v, a.o, *self.mlp.readers, self.mlp.down)


@dataclass(frozen=True, eq=False)
class Decoder:
    """A located decoder.

    Attributes:
        model: the graph that the handles point into.
        embeddings: the Gathers that write the residual stream: of tokens, then of learned positions
            where there are any.
        norms: every norm of the residual stream, first to last; the last one feeds `lm_head`.
        writers: every linear whose output is added to the residual stream.
        layers: the layers, first to last.
        lm_head: the linear that gives the logits.
        hidden_size: width of the residual stream.
    """

    model: ir.Model
    embeddings: tuple[ir.Node, ...]
    norms: tuple[Norm, ...]
    writers: tuple[Writer, ...]
    layers: tuple[Layer, ...]
    lm_head: Linear
    hidden_size: int

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Every linear of every layer; the head is not among them."""
        return tuple(linear for layer in self.layers for linear in layer.linears)

    @property
    def embedding_weights(self) -> tuple[Weight, ...]:
        """The tables [rows, hidden_size]; the first is that of the tokens."""
        weights = tuple(weight_of(node.inputs[0]) for node in self.embeddings)
        return tuple(weight for weight in weights if weight is not None)

    @property
    def states(self) -> tuple[ir.Value, ...]:
        """The residual stream [B, S, hidden_size] before each layer, and before the last norm."""
        norm_of = {reader: norm for norm in self.norms for reader in norm.readers}
        norms = [*(norm_of[layer.attention.q] for layer in self.layers), self.norms[-1]]
        states = (norm.node.inputs[0] for norm in norms)
        return tuple(state for state in states if state is not None)

    @property
    def post_norms(self) -> tuple[PostNorm, ...]:
        """Every norm between a writer and the stream."""
        return tuple(w.post_norm for w in self.writers if w.post_norm is not None)

    @classmethod
    def locate(cls, model: ir.Model) -> "Decoder":
        """The decoder in `model`.

        Raises:
            UnsupportedModelError: something reads or writes the residual stream in a way that a
                rotation could not follow; names the node.
        """
        embedding = next((n for n in model.graph if _is_embedding(n)), None)
        if embedding is None:
            raise UnsupportedModelError("graph: no Gather of token embeddings; is this a decoder?")
        stream = _ResidualStream.follow(embedding)
        if not stream.norms:
            raise UnsupportedModelError(
                f"{embedding.name}: no norm reads the residual stream; is this a decoder?"
            )
        final = stream.norms[-1]
        if len(final.readers) != 1:
            raise UnsupportedModelError(
                f"{final.name}: {len(final.readers)} linears read the final norm, expected the head"
            )
        layers = tuple(_layers(model, stream))
        located = {linear.node for layer in layers for linear in layer.linears}
        stray = [
            node.name
            for node in model.graph
            if node.op_type in ("MatMul", "Gemm")
            and any(weight_of(v) is not None for v in node.inputs)
            and node not in located
            and node is not final.readers[0].node
        ]
        if stray:
            raise UnsupportedModelError(
                f"{stray[0]}: a linear with no known role ({len(stray)} in all); "
                "this architecture is not supported"
            )
        shape = embedding.outputs[0].shape
        assert shape is not None
        return cls(
            model,
            tuple(stream.embeddings),
            tuple(stream.norms),
            tuple(stream.writers),
            layers,
            final.readers[0],
            int(shape[-1]),  # type: ignore[arg-type]
        )


def _is_embedding(node: ir.Node) -> bool:
    return node.op_type == "Gather" and weight_of(node.inputs[0]) is not None


_NORMS = frozenset({"RMSNormalization", "LayerNormalization"})


def _is_norm(node: ir.Node) -> bool:
    """Whether `node` normalizes features and scales them by a weight."""
    if node.op_type not in _NORMS or weight_of(node.inputs[1]) is None:
        return False
    rank = len(node.outputs[0].shape or ())
    return node.attributes.get_int("axis", -1) in (-1, rank - 1)


def _is_multiplication(node: ir.Node, state: ir.Value) -> bool:
    """Whether `node` multiplies every feature of `state` by one number, as a rotation allows."""
    if node.op_type not in ("Mul", "Div") or (node.op_type == "Div" and node.inputs[1] is state):
        return False
    other = next((v for v in node.inputs if v is not state), None)
    return other is not None and other.const_value is not None and other.const_value.size == 1


@dataclass(frozen=True)
class _ResidualStream:
    embeddings: list[ir.Node]
    norms: list[Norm]
    writers: list[Writer]

    @classmethod
    def follow(cls, start: ir.Node) -> "_ResidualStream":
        stream = cls([start], [], [])
        state: ir.Value | None = start.outputs[0]
        while state is not None:
            state = stream._step(state)
        return stream

    def _step(self, state: ir.Value) -> ir.Value | None:
        """Classify the readers of `state`; give the next state, None after the last norm."""
        if state.is_graph_output():
            raise UnsupportedModelError(
                f"{state.name}: the residual stream is an output of the graph, where a rotation "
                "would show; remove the output"
            )
        following: list[ir.Value] = []
        for node, position in state.uses():
            if _is_norm(node) and position == 0:
                self.norms.append(Norm(node, tuple(_readers(node.outputs[0]))))
            elif node.op_type == "Add":
                self._write(node, 1 - position)
                following.append(node.outputs[0])
            elif _is_multiplication(node, state):
                following.append(node.outputs[0])
            else:
                raise UnsupportedModelError(
                    f"{node.name}: a {node.op_type} reads the residual stream, which only norms "
                    "and additions may; this architecture is not supported"
                )
        if len(following) > 1:
            raise UnsupportedModelError(
                f"{following[1].name}: the residual stream branches; "
                "this architecture is not supported"
            )
        return following[0] if following else None

    def _write(self, addition: ir.Node, position: int) -> None:
        """Classify input `position` of `addition`, which is added to the stream."""
        value = addition.inputs[position]
        node = _producer(value)
        if value is None or node is None or value is addition.inputs[1 - position]:
            raise UnsupportedModelError(_not_a_writer(addition))
        if len(value.uses()) != 1:
            raise UnsupportedModelError(
                f"{addition.name}: what is added to the residual stream is read elsewhere too; "
                "this architecture is not supported"
            )
        if _is_embedding(node):
            self.embeddings.append(node)
        elif node.op_type == "Add" and not any(weight_of(v) for v in node.inputs):
            for inner in range(2):
                self._write(node, inner)
        elif node.op_type == "RMSNormalization" and _is_norm(node):
            linear = _written(node.inputs[0], node)
            self.writers.append(Writer(linear, PostNorm(node, addition)))
        else:
            self.writers.append(Writer(_written(value, addition)))


def _not_a_writer(where: ir.Node) -> str:
    return (
        f"{where.name}: what is added to the residual stream is not the output of a linear; "
        "this architecture is not supported"
    )


def _readers(value: ir.Value) -> Iterator[Linear]:
    for node, position in value.uses():
        if node.op_type != "MatMul" or position != 0:
            raise UnsupportedModelError(
                f"{node.name}: a {node.op_type} reads the output of a norm, which only linears "
                "may; this architecture is not supported"
            )
        yield Linear(node)


def _written(value: ir.Value | None, where: ir.Node) -> Linear:
    """The linear whose output, with its bias, is `value`, which `where` alone reads."""
    node = _producer(value)
    if value is not None and len(value.uses()) != 1:
        raise UnsupportedModelError(
            f"{where.name}: what is added to the residual stream is read elsewhere too; "
            "this architecture is not supported"
        )
    if node is not None and node.op_type == "Add" and any(weight_of(v) for v in node.inputs):
        node = next((p for v in node.inputs if (p := _producer(v)) is not None), None)
    if node is None or node.op_type != "MatMul":
        raise UnsupportedModelError(_not_a_writer(where))
    return Linear(node)


def _layers(model: ir.Model, stream: _ResidualStream) -> Iterator[Layer]:
    """Pair each attention with the feed-forward of its layer, in the order of the stream."""
    nodes = [node for node in model.graph if node.op_type == "Attention"]
    readers = {linear.node: linear for norm in stream.norms[:-1] for linear in norm.readers}
    writers = {writer.linear.node: writer.linear for writer in stream.writers}
    attentions = [_attention(node, readers, writers) for node in nodes]
    outputs = {attention.o.node for attention in attentions}
    downs = [linear for node, linear in writers.items() if node not in outputs]
    if len(downs) != len(attentions) or len(writers) != 2 * len(attentions):
        raise UnsupportedModelError(
            f"graph: {len(attentions)} attentions and {len(writers)} writers of the residual "
            "stream; expected an attention's and a feed-forward's per layer"
        )
    unused = dict.fromkeys(readers)
    for attention in attentions:
        for linear in (attention.q, attention.k, attention.v):
            unused.pop(linear.node, None)
    for index, (attention, down) in enumerate(zip(attentions, downs, strict=True)):
        found = _upstream(down.x, readers)
        mlp = tuple(readers[node] for node in readers if node in found and node in unused)
        if not mlp or len(mlp) != len(found):
            raise UnsupportedModelError(
                f"{down.name}: its input does not come from linears over a norm alone; "
                "this architecture is not supported"
            )
        for linear in mlp:
            unused.pop(linear.node)
        yield Layer(index, attention, Mlp(mlp, down))
    if unused:
        raise UnsupportedModelError(
            f"{next(iter(unused)).name}: reads the residual stream and no writer depends on it; "
            "this architecture is not supported"
        )


def _upstream(value: ir.Value, readers: dict[ir.Node, Linear]) -> set[ir.Node]:
    """The readers from which `value` is computed without another one in between."""
    found: set[ir.Node] = set()
    pending, seen = [value.producer()], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in readers:
            found.add(node)
        else:
            pending.extend(_producer(v) for v in node.inputs)
    return found


def _attention(
    node: ir.Node, readers: dict[ir.Node, Linear], writers: dict[ir.Node, Linear]
) -> Attention:
    key_append, value_append = _producer(node.inputs[1]), _producer(node.inputs[2])
    if key_append is None or value_append is None or key_append.op_type != "Concat":
        raise UnsupportedModelError(f"{node.name}: its keys do not come from a cache")
    shape = key_append.inputs[0].shape if key_append.inputs[0] is not None else None
    if shape is None or not isinstance(shape[1], int) or not isinstance(shape[3], int):
        raise UnsupportedModelError(f"{node.name}: the cache has no fixed number and size of heads")
    o = _downstream_linear(node.outputs[0], writers)
    return Attention(
        node,
        key_append,
        value_append,
        _upstream_linear(node.inputs[0], readers, node, _ROPE_OPS),
        _upstream_linear(key_append.inputs[1], readers, node, _ROPE_OPS),
        _upstream_linear(value_append.inputs[1], readers, node, _BIAS_OPS),
        o,
        num_heads=o.in_features // shape[3],
        num_kv_heads=shape[1],
        head_dim=shape[3],
    )


_BIAS_OPS = frozenset({"Add"}) | _SHAPE_OPS
_UNFUSED_ROPE = frozenset({"Mul", "Neg", "Slice", "Concat"})  # scaled, as in YaRN
_ROPE_OPS = frozenset({"RotaryEmbedding", "RMSNormalization"}) | _UNFUSED_ROPE | _BIAS_OPS


def _upstream_linear(
    value: ir.Value | None, linears: dict[ir.Node, Linear], where: ir.Node, allowed: frozenset[str]
) -> Linear:
    """The one linear behind `allowed` operators; a value path has reshapes and a bias only."""
    found: set[ir.Node] = set()
    pending, seen = [_producer(value)], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in linears:
            found.add(node)
        elif node.op_type in allowed:
            pending.extend(_producer(v) for v in node.inputs)
    if len(found) != 1:
        raise UnsupportedModelError(
            f"{where.name}: an input does not come from a linear over a norm; "
            "this architecture is not supported"
        )
    return linears[found.pop()]


def _downstream_linear(value: ir.Value, linears: dict[ir.Node, Linear]) -> Linear:
    while True:
        uses = value.uses()
        node = next(iter(uses))[0] if len(uses) == 1 else None
        if node is not None and node in linears:
            return linears[node]
        if node is None or node.op_type not in _SHAPE_OPS:
            raise UnsupportedModelError(
                f"{value.name}: the attention's output does not go to one linear; "
                "this architecture is not supported"
            )
        value = node.outputs[0]
