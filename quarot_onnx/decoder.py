# SPDX-License-Identifier: Apache-2.0
"""Where things are in a decoder's graph: typed handles, located once by dataflow.

`Decoder.locate` follows the residual stream from the embedding to the logits. Everything that
touches it must be one of four things: a norm, whose output only linears read (*readers*), the
output of a linear that is added to it, perhaps through a norm of its own (*writers*), an embedding
that is added to it, or a number that it is multiplied by. Whatever else is found is refused by
name, because a residual stream that is rotated in part is a wrong model that still talks.

Halves of a layer may follow each other or run side by side: attention and feed-forward are told
apart, and paired, by what their inputs are computed from. In a mixture of experts tokens are
gathered, grouped and weighted on their way to and from the experts. All of it treats the features
of a token alike, so that a rotation passes through; what decides on the way is a *router*.

A handle reads its node live, so it stays true while passes rewrite the graph around it.
"""

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from quarot_onnx.errors import UnsupportedModelError
from quarot_onnx.handles import (
    Attention,
    Layer,
    Linear,
    Mlp,
    Norm,
    PostNorm,
    Writer,
    is_grouping,
    producer_of,
    weight_of,
)
from quarot_onnx.weights import Weight

__all__ = [
    "Attention",
    "Decoder",
    "Layer",
    "Linear",
    "Mlp",
    "Norm",
    "PostNorm",
    "Writer",
    "weight_of",
]

_SHAPE_OPS = frozenset({"Reshape", "Transpose", "Cast"})


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

    def norms_of(self, layer: Layer) -> tuple[Norm, Norm]:
        """The norms that attention and feed-forward of a dense `layer` read; perhaps one for both.

        Raises:
            UnsupportedModelError: the layer is a mixture of experts.
        """
        norm_of = {reader: norm for norm in self.norms for reader in norm.readers}
        return norm_of[layer.attention.q], norm_of[layer.mlp.readers[0]]

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
        located = {linear.node for layer in layers for linear in (*layer.linears, *layer.routers)}
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
class _Addition:
    """What one addition puts into the stream.

    Attributes:
        writers: in the order of their terms.
        deciding: values on which the way of the terms depends: row numbers, weights of tokens.
    """

    writers: list[Writer]
    deciding: list[ir.Value]


@dataclass(frozen=True)
class _ResidualStream:
    embeddings: list[ir.Node]
    norms: list[Norm]
    additions: list[_Addition]

    @property
    def writers(self) -> list[Writer]:
        return [writer for addition in self.additions for writer in addition.writers]

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
                self.additions.append(_Addition([], []))
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
        node = producer_of(value)
        if value is None or node is None or addition.inputs.count(value) != 1:
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
            self.additions[-1].writers.append(Writer(linear, PostNorm(node, addition)))
        elif terms := _featurewise_inputs(node):
            others = [v for i, v in enumerate(node.inputs) if v is not None and i not in terms]
            self.additions[-1].deciding.extend(others)
            for term in terms:
                self._write(node, term)
        else:
            self.additions[-1].writers.append(Writer(_written(value, addition)))


def _not_a_writer(where: ir.Node) -> str:
    return (
        f"{where.name}: what is added to the residual stream is not the output of a linear; "
        "this architecture is not supported"
    )


def _moves_tokens(node: ir.Node, position: int) -> bool:
    """Whether every row of the outputs is a row of input `position`, its features untouched."""
    x, y = node.inputs[0], node.outputs[0]
    if position or x is None or x.shape is None:
        return False
    if node.op_type == "Reshape":
        return y.shape is not None and isinstance(y.shape[-1], int) and x.shape[-1] == y.shape[-1]
    is_gather = node.op_type == "Gather" and node.attributes.get_int("axis", 0) == 0
    return len(x.shape) > 1 and (is_gather or is_grouping(node))


def _featurewise_inputs(node: ir.Node) -> list[int]:
    """The inputs whose tokens `node` moves, joins, weights or adds up; all features alike."""
    inputs, result = node.inputs, node.outputs[0].shape
    if _moves_tokens(node, 0):
        return [0]
    if result is None or len(result) < 2:
        return []
    if node.op_type == "Concat" and node.attributes["axis"].as_int() == 0:
        return list(range(len(inputs)))
    if node.op_type == "Mul":
        widths = [v.shape[-1] if v is not None and v.shape else None for v in inputs]
        return [1 - widths.index(1)] if widths.count(1) == 1 and result[-1] != 1 else []
    if node.op_type == "ReduceSum" and inputs[0] is not None and inputs[0].shape is not None:
        held = inputs[1].const_value if len(inputs) > 1 and inputs[1] is not None else None
        last = {-1, len(inputs[0].shape) - 1}
        return [0] if held is not None and last.isdisjoint(held.numpy().ravel().tolist()) else []
    return []


def _readers(value: ir.Value) -> Iterator[Linear]:
    for node, position in value.uses():
        if _moves_tokens(node, position):
            for output in node.outputs:
                yield from _readers(output)
            continue
        if node.op_type != "MatMul" or position != 0:
            raise UnsupportedModelError(
                f"{node.name}: a {node.op_type} reads the output of a norm, which only linears "
                "may; this architecture is not supported"
            )
        yield Linear(node)


def _written(value: ir.Value | None, where: ir.Node) -> Linear:
    """The linear whose output, with its bias, is `value`, which `where` alone reads."""
    node = producer_of(value)
    if value is not None and len(value.uses()) != 1:
        raise UnsupportedModelError(
            f"{where.name}: what is added to the residual stream is read elsewhere too; "
            "this architecture is not supported"
        )
    if node is not None and node.op_type == "Add" and any(weight_of(v) for v in node.inputs):
        node = next((p for v in node.inputs if (p := producer_of(v)) is not None), None)
    if node is None or node.op_type != "MatMul":
        raise UnsupportedModelError(_not_a_writer(where))
    return Linear(node)


def _layers(model: ir.Model, stream: _ResidualStream) -> Iterator[Layer]:
    """Pair each attention with the feed-forward of its layer, in the order of the stream."""
    nodes = [node for node in model.graph if node.op_type in _ATTENTIONS]
    readers = {linear.node: linear for norm in stream.norms[:-1] for linear in norm.readers}
    writers = {writer.linear.node: writer.linear for writer in stream.writers}
    attentions = [_attention(node, readers, writers) for node in nodes]
    outputs = {attention.o.node for attention in attentions}
    halves = [
        (downs, addition.deciding)
        for addition in stream.additions
        if (downs := [w.linear for w in addition.writers if w.linear.node not in outputs])
    ]
    if len(halves) != len(attentions) or len(outputs) != len(attentions):
        raise UnsupportedModelError(
            f"graph: {len(attentions)} attentions and {len(writers)} writers of the residual "
            "stream; expected an attention's and a feed-forward's per layer"
        )
    unused = dict.fromkeys(readers)
    for attention in attentions:
        for linear in (attention.q, attention.k, attention.v):
            unused.pop(linear.node, None)
    for index, (attention, (downs, deciding)) in enumerate(zip(attentions, halves, strict=True)):
        mlps = [Mlp(_mlp_readers(down, readers, unused), down) for down in downs]
        for mlp in mlps:
            for linear in mlp.readers:
                unused.pop(linear.node)
        found = _upstream(deciding, readers)
        routers = tuple(readers[node] for node in readers if node in found and node in unused)
        for linear in routers:
            unused.pop(linear.node)
        yield Layer(index, attention, tuple(mlps), routers)
    if unused:
        raise UnsupportedModelError(
            f"{next(iter(unused)).name}: reads the residual stream and no writer depends on it; "
            "this architecture is not supported"
        )


def _mlp_readers(
    down: Linear, readers: dict[ir.Node, Linear], unused: Container[ir.Node]
) -> tuple[Linear, ...]:
    """The readers from which the input of `down` is computed."""
    found = _features_upstream(down.x, readers)
    if not found or not all(node in unused for node in found):
        raise UnsupportedModelError(
            f"{down.name}: its input does not come from linears over a norm alone; "
            "this architecture is not supported"
        )
    return tuple(readers[node] for node in readers if node in found)


def _upstream(values: Sequence[ir.Value], readers: dict[ir.Node, Linear]) -> set[ir.Node]:
    """The readers from which `values` are computed without another one in between."""
    found: set[ir.Node] = set()
    pending, seen = [value.producer() for value in values], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in readers:
            found.add(node)
        else:
            pending.extend(producer_of(v) for v in node.inputs)
    return found


def _features_upstream(value: ir.Value, readers: dict[ir.Node, Linear]) -> set[ir.Node]:
    """The readers that compute the features of `value`; of an expert's rows, this expert's.

    Rows that were joined (``Concat``) and grouped again (``Split``) are followed back to the input
    with the number of the output; what decides the grouping is not followed.
    """
    found: set[ir.Node] = set()
    pending: list[tuple[ir.Value | None, int | None]] = [(value, None)]
    seen = set()
    while pending:
        current, expert = pending.pop()
        node = producer_of(current)
        if node is None or current is None or (node, expert) in seen:
            continue
        seen.add((node, expert))
        if node in readers:
            found.add(node)
        elif is_grouping(node):
            pending.append((node.inputs[0], current.index()))
        elif expert is not None and node.op_type == "Concat":
            joined = node.attributes["axis"].as_int() == 0 and expert < len(node.inputs)
            pending.extend([(node.inputs[expert], None)] if joined else [])
        else:
            pending.extend((v, expert) for v in node.inputs)
    return found


def _attention(
    node: ir.Node, readers: dict[ir.Node, Linear], writers: dict[ir.Node, Linear]
) -> Attention:
    key_append, value_append = producer_of(node.inputs[1]), producer_of(node.inputs[2])
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
_ATTENTIONS = frozenset({"Attention", "AttentionSinks"})
_UNFUSED_ROPE = frozenset({"Mul", "Neg", "Sub", "Split", "Slice", "Concat"})  # scaled, as in YaRN
_ROPE_OPS = frozenset({"RotaryEmbedding", "RMSNormalization"}) | _UNFUSED_ROPE | _BIAS_OPS


def _upstream_linear(
    value: ir.Value | None, linears: dict[ir.Node, Linear], where: ir.Node, allowed: frozenset[str]
) -> Linear:
    """The one linear behind `allowed` operators; a value path has reshapes and a bias only."""
    found: set[ir.Node] = set()
    pending, seen = [producer_of(value)], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in linears:
            found.add(node)
        elif node.op_type in allowed:
            pending.extend(producer_of(v) for v in node.inputs)
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
