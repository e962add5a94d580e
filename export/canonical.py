# SPDX-License-Identifier: Apache-2.0
"""One shape of graph for every modelling file: small equivalent rewrites of the traced template.

Families write the same decoder in different ways. Each function here turns one of these ways into
the one that `quarot_onnx.decoder.Decoder` knows, so that neither it nor a pass has a line for a
family. Nothing is recognized by name; a graph that fits no pattern is left as it is, for the
decoder to accept or to refuse.

No weight is read: what a rewrite does to a weight is stated in the `Reading` of its initializer,
which says how the checkpoint's tensor becomes it.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from numpy.typing import NDArray

from quarot_onnx.export.checkpoint import Rows

MODULE = "quarot.module"
"""Node metadata: the path of the Hugging Face module that the node computes in."""

_READING = "quarot.reading"

PARTS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "query_key_value": ("query", "key", "value"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""What the parts of a fused linear are called; names only, other modules' parts get numbers."""


@dataclass(frozen=True)
class Reading:
    """How an initializer is read from the checkpoint.

    Attributes:
        tensor: the parameter's name in Hugging Face's model.
        transposed: the initializer is the transpose of (the rows of) the tensor.
        rows: which of the output features belong to it: rows of the tensor where it is transposed,
            else its last axis; None is all.
        index: which tensor of a stack (an expert's) it is; None where the parameter is no stack.
        addend: what is added to every number (Gemma's norms scale by ``1 + w``).
    """

    tensor: str
    transposed: bool = False
    rows: Rows | None = None
    index: int | None = None
    addend: float = 0.0


def reading(value: ir.Value) -> Reading:
    """How initializer `value` is read."""
    held = value.meta.get(_READING)
    return held if isinstance(held, Reading) else Reading(value.name or "")


def set_reading(value: ir.Value, how: Reading) -> None:
    """State how initializer `value` is read."""
    value.meta[_READING] = how


def canonicalize(model: ir.Model) -> None:
    """Apply every rewrite of this module to a traced template; valid ONNX before and after."""
    for node in model.graph:
        module = _module(node)
        node.metadata_props.clear()
        node.metadata_props[MODULE] = module
    separate_gemms(model)
    transpose_weights(model)
    batch_flattened_tokens(model)
    drop_idle_reshapes(model)
    separate_fused_linears(model)
    absorb_scale_addends(model)
    common_passes.CommonSubexpressionEliminationPass()(model)
    common_passes.RemoveUnusedNodesPass()(model)


def _module(node: ir.Node) -> str:
    """The innermost module of `node`; of one that the optimizer made, that of its first reader."""
    held = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    if held is None:
        readers = (user for output in node.outputs for user, _ in output.uses())
        reader = next(readers, None)
        return "" if reader is None else _module(reader)
    scopes = ast.literal_eval(held)
    paths = [scope for scope in scopes if scope.startswith("model.")]
    return paths[-1].removeprefix("model.") if paths else ""


def is_weight(value: ir.Value | None) -> bool:
    """Whether `value` is a parameter of the model, which has no value yet."""
    return value is not None and value.is_initializer() and value.const_value is None


def _constant(value: ir.Value | None) -> NDArray[Any] | None:
    held = value.const_value if value is not None else None
    return None if held is None else held.numpy()


def _insert(
    graph: ir.Graph,
    before: ir.Node,
    op_type: str,
    inputs: list[ir.Value],
    shape: list[int | ir.SymbolicDim],
    *,
    module: str = "",
    like: ir.Value,
    attributes: dict[str, ir.Attr] | None = None,
) -> ir.Value:
    """The output of a new node in front of `before`, of `like`'s type."""
    node = ir.Node("", op_type, inputs, list((attributes or {}).values()), num_outputs=1)
    node.metadata_props[MODULE] = module or before.metadata_props[MODULE]
    node.outputs[0].type, node.outputs[0].shape = like.type, ir.Shape(shape)
    graph.insert_before(before, node)
    return node.outputs[0]


def take_place(old: ir.Node, position: int, new: ir.Value) -> None:
    """Let `new` be read, and named if it is the graph's output, as output `position` of `old`."""
    output = old.outputs[position]
    if output.is_graph_output():
        new.name, output.name = output.name, None
    output.replace_all_uses_with(new, replace_graph_outputs=True)


# --- Gemm -----------------------------------------------------------------------------------------


def separate_gemms(model: ir.Model) -> None:
    """Linears over flattened tokens.

    before: ``y = Gemm(x, W, b; transB)``
    after:  ``y = x @ Transpose(W) + b``, what Gemm means for alpha = beta = 1
    """
    for node in list(model.graph):
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        plain = {"alpha": 1.0, "beta": 1.0, "transA": 0}
        if node.op_type != "Gemm" or any(attributes.get(k, v) != v for k, v in plain.items()):
            continue
        x, weight, *bias = node.inputs
        if x is None or weight is None or not is_weight(weight) or weight.shape is None:
            continue
        result = node.outputs[0]
        assert result.shape is not None
        if attributes.get("transB", 0):
            shape = list(weight.shape)[::-1]
            weight = _insert(model.graph, node, "Transpose", [weight], shape, like=result)
        shape = list(result.shape)
        y = _insert(model.graph, node, "MatMul", [x, weight], shape, like=result)
        if bias and bias[0] is not None:
            y = _insert(model.graph, node, "Add", [y, bias[0]], shape, like=result)
        take_place(node, 0, y)
        model.graph.remove(node, safe=True)


# --- Weight layout --------------------------------------------------------------------------------


def transpose_weights(model: ir.Model) -> None:
    """Weights in ONNX's layout.

    before: ``y = x @ Transpose(W)``, W [out, in] as torch keeps it
    after:  ``y = x @ W``, W [in, out]

    A weight with another reader (tied embeddings) keeps its Transpose.
    """
    for node in list(model.graph):
        weight = node.inputs[0] if node.inputs else None
        if (
            node.op_type == "Transpose"
            and weight is not None
            and is_weight(weight)
            and len(weight.uses()) == 1
            and weight.shape is not None
            and len(weight.shape) == 2
        ):
            node.outputs[0].replace_all_uses_with(weight)
            model.graph.remove(node, safe=True)
            weight.shape = ir.Shape(list(weight.shape)[::-1])
            set_reading(weight, replace(reading(weight), transposed=True))


# --- Flattened tokens -----------------------------------------------------------------------------

_FEATUREWISE = frozenset({"LayerNormalization", "RMSNormalization", "MatMul"})
_ELEMENTWISE = frozenset({"Add", "Mul", "Relu", "Gelu", "Sigmoid", "Tanh", "Erf", "Div", "Sub"})


def batch_flattened_tokens(model: ir.Model) -> None:
    """Tokens keep their axes.

    before: ``Reshape(x [B, S, n], [-1, n])``, token by token operators, ``Reshape(., [B, S, m])``
    after:  the same operators on [B, S, n]

    Both compute every token by itself. Operators of other kinds in between leave it as it is.
    """
    for node in list(model.graph):
        x = node.inputs[0] if node.op_type == "Reshape" else None
        flat = node.outputs[0]
        if x is None or x.shape is None or flat.shape is None:
            continue
        if len(x.shape) != 3 or len(flat.shape) != 2 or x.shape[-1] != flat.shape[-1]:
            continue
        region = _token_region(model.graph, node, flat)
        if region is None:
            continue
        inside, exits = region
        for member in inside:
            shape = member.outputs[0].shape
            assert shape is not None
            member.outputs[0].shape = ir.Shape([*x.shape[:2], shape[-1]])
        flat.replace_all_uses_with(x)
        for leaving in exits:
            source = leaving.inputs[0]
            assert source is not None
            take_place(leaving, 0, source)
            model.graph.remove(leaving, safe=True)
        model.graph.remove(node, safe=True)


def _token_region(
    graph: ir.Graph, start: ir.Node, flat: ir.Value
) -> tuple[list[ir.Node], list[ir.Node]] | None:
    """The token by token operators behind `flat` and the Reshapes that end them; None if others."""
    x = start.inputs[0]
    assert x is not None
    assert x.shape is not None
    values, inside, exits = {flat}, [], []
    for node in graph:
        given = [v for v in node.inputs if v is not None]
        if values.isdisjoint(given):
            continue
        if node.op_type == "Reshape":
            shape = node.outputs[0].shape
            if shape is None or len(shape) != 3 or list(shape[:2]) != list(x.shape[:2]):
                return None
            exits.append(node)
        elif _is_by_token(node, values):
            inside.append(node)
            values.add(node.outputs[0])
        else:
            return None
    return inside, exits


def _is_by_token(node: ir.Node, values: set[ir.Value]) -> bool:
    """Whether `node` computes each row of its output from the same row of `values`."""
    first, *others = node.inputs
    if node.op_type in _FEATUREWISE:
        return first in values and all(v is None or v.is_initializer() for v in others)
    return node.op_type in _ELEMENTWISE and all(
        v in values or (v.is_initializer() and len(v.shape or ()) <= 1)
        for v in node.inputs
        if v is not None
    )


def drop_idle_reshapes(model: ir.Model) -> None:
    """Tokens that are flattened twice.

    before: ``Reshape(x [N, n], [-1, n])``
    after:  ``x``
    """
    for node in list(model.graph):
        x, y = (node.inputs[0] if node.inputs else None), node.outputs[0]
        if node.op_type != "Reshape" or x is None or x.shape is None or y.shape is None:
            continue
        if len(x.shape) == len(y.shape) == 2 and isinstance(y.shape[1], int) and x.shape == y.shape:
            y.replace_all_uses_with(x)
            model.graph.remove(node, safe=True)


# --- Fused linears --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fused:
    """A linear of which other nodes take parts: the product, its bias, and the last of the two."""

    product: ir.Node
    bias: ir.Value | None
    output: ir.Value

    @property
    def features(self) -> int:
        """How many there are in all."""
        shape = self.output.shape
        assert shape is not None
        assert isinstance(shape[-1], int)
        return shape[-1]


def separate_fused_linears(model: ir.Model) -> None:
    """One linear for each thing that is computed.

    before: ``y = x @ W + b;  q, k, v = columns of y``
    after:  ``q = x @ W[:, Q] + b[Q]`` and so on, since a column of a product needs that column only

    The parts are slices of the features (Phi's ``qkv_proj`` and ``gate_up_proj``), or slices of
    each head's features (GPT-NeoX's ``query_key_value``); a part's weight is read from those rows
    of the checkpoint's tensor.
    """
    for node in list(model.graph):
        fused = _fused_linear(node)
        if fused is None:
            continue
        parts = list(feature_parts(fused)) or list(_head_parts(fused))
        for number, (taker, position, rows) in enumerate(parts):
            y = _part(model.graph, fused, number, len(parts), rows)
            if taker.op_type == "Split" and taker.inputs[0] is not fused.output:
                y = _by_head(model.graph, fused, taker, position, y)
            take_place(taker, position, y)
    common_passes.RemoveUnusedNodesPass()(model)


def _fused_linear(node: ir.Node) -> Fused | None:
    if node.op_type != "MatMul" or not is_weight(node.inputs[1]):
        return None
    output = node.outputs[0]
    users = list(output.uses())
    if len(users) == 1 and users[0][0].op_type == "Add":
        bias = next((v for v in users[0][0].inputs if is_weight(v)), None)
        if bias is not None:
            return Fused(node, bias, users[0][0].outputs[0])
    return Fused(node, None, output)


def feature_parts(fused: Fused) -> Iterator[tuple[ir.Node, int, Rows]]:
    """(node, output, rows) where every reader takes a range of features."""
    found: list[tuple[ir.Node, int, Rows]] = []
    rank = len(fused.output.shape or ())
    for user, _ in fused.output.uses():
        if user.op_type == "Split" and user.attributes["axis"].as_int() in (-1, rank - 1):
            start = 0
            for position, output in enumerate(user.outputs):
                assert output.shape is not None
                assert isinstance(output.shape[-1], int)
                rows = Rows(fused.features, start, start + output.shape[-1])
                found.append((user, position, rows))
                start += output.shape[-1]
        elif (taken := _sliced(user, rank, fused.features)) is not None:
            found.append((user, 0, taken))
        else:
            return
    yield from sorted(found, key=lambda part: part[2].start)


def _sliced(node: ir.Node, rank: int, features: int) -> Rows | None:
    """The features that a Slice takes: a range, or every n-th one to the end."""
    if node.op_type != "Slice" or len(node.inputs) != 5:
        return None
    constants = [_constant(v) for v in node.inputs[1:]]
    if any(c is None or c.size != 1 for c in constants):
        return None
    start, stop, axis, step = (int(c.ravel()[0]) for c in constants if c is not None)
    if axis not in (-1, rank - 1) or not 0 <= start < stop:
        return None
    if step == 1:
        return Rows(features, start, min(stop, features))
    is_interleaved = start < step and stop >= features and features % step == 0
    return Rows(step, start, start + 1) if is_interleaved else None


def _head_parts(fused: Fused) -> Iterator[tuple[ir.Node, int, Rows]]:
    """The same where the features are [heads, parts * head_dim] and split within each head."""
    node, chain = fused.output, []
    for op_type in ("Reshape", "Transpose", "Split"):
        users = list(node.uses())
        if len(users) != 1 or users[0][0].op_type != op_type:
            return
        chain.append(users[0][0])
        node = chain[-1].outputs[0]
    reshape, transpose, split = chain
    by_head = reshape.outputs[0].shape
    if by_head is None or len(by_head) != 4 or not isinstance(by_head[3], int):
        return
    if tuple(transpose.attributes["perm"].as_ints()) != (0, 2, 1, 3):
        return
    if split.attributes["axis"].as_int() not in (-1, 3):
        return
    readers = {user.op_type for output in split.outputs for user, _ in output.uses()}
    if readers == {"Mul"}:  # RoPE: halves of a head that are turned into each other
        return
    start = 0
    for position, output in enumerate(split.outputs):
        assert output.shape is not None
        assert isinstance(output.shape[3], int)
        yield split, position, Rows(by_head[3], start, start + output.shape[3])
        start += output.shape[3]


def _part(graph: ir.Graph, fused: Fused, number: int, count: int, rows: Rows) -> ir.Value:
    """The output of a linear that computes `rows` of the features."""
    x, weight = fused.product.inputs
    assert x is not None
    assert weight is not None
    assert weight.shape is not None
    assert fused.output.shape is not None
    module = fused.product.metadata_props[MODULE]
    parent, _, last = module.rpartition(".")
    names = PARTS.get(last, ())
    name = names[number] if len(names) == count else f"{last}.{number}"
    module = f"{parent}.{name}"
    selected = rows.count(fused.features)
    part = _select(graph, weight, f"{module}.weight", [weight.shape[0], selected], rows)
    shape = [*fused.output.shape[:-1], selected]
    like = fused.output
    y = _insert(graph, fused.product, "MatMul", [x, part], shape, module=module, like=like)
    if fused.bias is not None:
        bias = _select(graph, fused.bias, f"{module}.bias", [selected], rows)
        y = _insert(graph, fused.product, "Add", [y, bias], shape, module=module, like=like)
    return y


def _select(
    graph: ir.Graph, whole: ir.Value, name: str, shape: list[int | ir.SymbolicDim], rows: Rows
) -> ir.Value:
    """An initializer that is read from `rows` of what `whole` is read from."""
    value = ir.Value(name=name, type=whole.type, shape=ir.Shape(shape))
    set_reading(value, replace(reading(whole), rows=rows))
    graph.initializers[name] = value
    return value


def _by_head(graph: ir.Graph, fused: Fused, split: ir.Node, position: int, y: ir.Value) -> ir.Value:
    """`y` [B, S, heads * head_dim] as [B, heads, S, head_dim]."""
    transposed = split.outputs[position].shape
    assert transposed is not None
    assert y.shape is not None
    batch, heads, length, size = transposed
    constant = ir.tensor(np.array([0, 0, -1, size], np.int64))
    target = ir.Value(
        name=f"{fused.output.name}_by_head_{position}",
        type=ir.TensorType(ir.DataType.INT64),
        shape=ir.Shape([4]),
        const_value=constant,
    )
    graph.initializers[target.name or ""] = target
    module = split.inputs[0].producer().metadata_props[MODULE]  # type: ignore[union-attr]
    by_head = _insert(
        graph, split, "Reshape", [y, target], [batch, length, heads, size], module=module, like=y
    )
    perm = {"perm": ir.AttrInt64s("perm", [0, 2, 1, 3])}
    return _insert(
        graph,
        split,
        "Transpose",
        [by_head],
        [batch, heads, length, size],
        module=module,
        like=y,
        attributes=perm,
    )


# --- Norm scales ----------------------------------------------------------------------------------


def absorb_scale_addends(model: ir.Model) -> None:
    """Norm scales that are stored as the difference from a constant.

    before: ``norm(x) * (w + 1)``
    after:  ``norm(x) * w'`` with ``w' = w + 1``, which is what a pass folds
    """
    for node in list(model.graph):
        if node.op_type != "Add":
            continue
        weight = next((v for v in node.inputs if v is not None and is_weight(v)), None)
        other = next((v for v in node.inputs if v is not weight), None)
        constant = _constant(other)
        if weight is None or constant is None or constant.size != 1 or len(weight.uses()) != 1:
            continue
        set_reading(weight, replace(reading(weight), addend=float(constant.ravel()[0])))
        node.outputs[0].replace_all_uses_with(weight)
        model.graph.remove(node, safe=True)
