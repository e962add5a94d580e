# SPDX-License-Identifier: Apache-2.0
"""From the traced graph of a few layers to the graph of all of them.

Two steps, each valid ONNX in and out: `stitch` clones the layers of a canonical template to full
depth, `assign_names` names everything after its module (``/model/layers.3/mlp/down_proj/MatMul``)
and drops the exporter's metadata.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir

from quarot_onnx.errors import UnsupportedModelError
from quarot_onnx.export.canonical import MODULE, is_weight, reading, set_reading

_LAYER = re.compile(r"\.layers\.(\d+)(?=\.|$)")


def layer_index(name: str) -> int | None:
    """The layer that a module path or a parameter name belongs to."""
    match = _LAYER.search(name)
    return int(match[1]) if match else None


def _in_layer(name: str, index: int) -> str:
    return _LAYER.sub(f".layers.{index}", name, count=1)


def stitch(model: ir.Model, kinds: Sequence[int]) -> None:
    """Replace the traced layers by ``len(kinds)`` clones, layer i one of traced ``kinds[i]``.

    A layer is what computes in its module and depends on the hidden state or on the cache; what it
    shares with others (RoPE angles, the mask, shapes) stays outside. It takes one hidden state and
    gives one.

    Raises:
        UnsupportedModelError: layers exchange more than the hidden state.
    """
    graph = model.graph
    bodies = _bodies(graph, max(kinds) + 1)
    hidden = [_boundary(body) for body in bodies]
    traced = {node for body in bodies for node in body}
    state, last_state = hidden[0][0], hidden[-1][1]
    clones = []
    for index, kind in enumerate(kinds):
        clone = _Clone(bodies[kind], {hidden[kind][0]: state}, index)
        state = clone.mapping[hidden[kind][1]]
        clones.append(clone)

    for value, replacement in [(last_state, state), *_first_cache(graph, clones[0])]:
        for user, position in list(value.uses()):
            if user not in traced:
                user.replace_input_with(position, replacement)
    inputs = [v for v in graph.inputs if _cache_index(v) is None]
    outputs = [v for v in graph.outputs if _cache_index(v) is None]
    graph.outputs.clear()
    graph.inputs.clear()
    graph.remove(reversed([node for body in bodies for node in body]), safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            graph.initializers.pop(name)
    for clone in clones:
        graph.extend(clone.nodes)
        for weight in clone.weights:
            graph.initializers[weight.name or ""] = weight
        inputs += clone.cache_inputs
        outputs += [v for node in clone.nodes for v in node.outputs if _cache_index(v) is not None]
    graph.inputs.extend(inputs)
    graph.outputs.extend(outputs)
    for node in graph:
        if node.metadata_props[MODULE] and not _belongs(node, clones):
            node.metadata_props[MODULE] = _LAYER.split(node.metadata_props[MODULE])[0]
    graph.sort()


def _belongs(node: ir.Node, clones: Sequence["_Clone"]) -> bool:
    index = layer_index(node.metadata_props[MODULE])
    return index is None or node in clones[index].members


def _first_cache(graph: ir.Graph, first: "_Clone") -> list[tuple[ir.Value, ir.Value]]:
    """The traced cache inputs that shared nodes read (for the past length), as those of layer 0."""
    return [(v, first.mapping[v]) for v in graph.inputs if v in first.mapping]


def _cache_index(value: ir.Value) -> int | None:
    match = re.match(r"(?:past_key_values|present)\.(\d+)\.", value.name or "")
    return int(match[1]) if match else None


def _bodies(graph: ir.Graph, count: int) -> list[list[ir.Node]]:
    """The nodes of each traced layer, in order."""
    dependent: set[ir.Value] = {v for v in graph.inputs if _cache_index(v) is not None}
    bodies: list[list[ir.Node]] = [[] for _ in range(count)]
    computed: list[set[ir.Value]] = [set() for _ in range(count)]
    for node in graph:
        index = layer_index(node.metadata_props[MODULE])
        if node.op_type == "Shape":  # of the hidden state or a cache it is every layer's
            carries_state = index is not None and node.inputs[0] in computed[index]
        else:
            carries_state = any(v in dependent for v in node.inputs if v)
        if not (carries_state or _is_embedding(node)):
            continue
        dependent.update(node.outputs)
        if index is not None:
            bodies[index].append(node)
            computed[index].update(node.outputs)
    return bodies


def _is_embedding(node: ir.Node) -> bool:
    return node.op_type == "Gather" and any(is_weight(v) for v in node.inputs)


def _boundary(body: list[ir.Node]) -> tuple[ir.Value, ir.Value]:
    """The hidden state that enters `body` and the one that leaves it."""
    inside = set(body)
    entering = {
        v: None
        for node in body
        for v in node.inputs
        if v is not None and v.producer() not in inside and _depends_on_embedding(v)
    }
    leaving = [
        v
        for node in body
        for v in node.outputs
        if not v.is_graph_output() and any(user not in inside for user, _ in v.uses())
    ]
    if len(entering) != 1 or len(leaving) != 1:
        where = body[0].metadata_props[MODULE] if body else "the traced graph"
        raise UnsupportedModelError(
            f"{where}: layers exchange {len(entering)} values in and {len(leaving)} out where one "
            "hidden state is expected; this architecture cannot be stitched"
        )
    return next(iter(entering)), leaving[0]


def _depends_on_embedding(value: ir.Value) -> bool:
    """Whether `value` is computed from token embeddings (walks up; the traced graph is shallow)."""
    pending, seen = [value], set()
    while pending:
        producer = pending.pop().producer()
        if producer is None or producer in seen or producer.op_type == "Shape":
            continue
        seen.add(producer)
        if _is_embedding(producer):
            return True
        pending.extend(v for v in producer.inputs if v is not None)
    return False


class _Clone:
    """A copy of a layer's nodes for layer `index`, with its own weights and cache tensors."""

    def __init__(self, body: list[ir.Node], mapping: dict[ir.Value, ir.Value], index: int) -> None:
        self.mapping = mapping
        self.nodes: list[ir.Node] = []
        self.weights: list[ir.Value] = []
        self.cache_inputs: list[ir.Value] = []
        for node in body:
            for value in node.inputs:
                if value is not None and value not in mapping:
                    self._map_input(value, index)
            copy = ir.Node(
                node.domain,
                node.op_type,
                [None if v is None else mapping.get(v, v) for v in node.inputs],
                list(node.attributes.values()),
                num_outputs=len(node.outputs),
                metadata_props={MODULE: _in_layer(node.metadata_props[MODULE], index)},
            )
            for old, new in zip(node.outputs, copy.outputs, strict=True):
                new.type, new.shape = old.type, old.shape
                if _cache_index(old) is not None:
                    new.name = _in_cache(old, index)
                mapping[old] = new
            self.nodes.append(copy)
        self.members = set(self.nodes)

    def _map_input(self, value: ir.Value, index: int) -> None:
        if value.is_initializer() and layer_index(value.name or "") is not None:
            name, kept = _in_layer(value.name or "", index), self.weights
        elif _cache_index(value) is not None:
            name, kept = _in_cache(value, index), self.cache_inputs
        else:
            return
        copy = ir.Value(
            name=name,
            type=value.type,
            shape=value.shape,
            const_value=value.const_value,
            metadata_props=dict(value.metadata_props),
        )
        if is_weight(value):
            how = reading(value)
            set_reading(copy, replace(how, tensor=_in_layer(how.tensor, index)))
        kept.append(copy)
        self.mapping[value] = copy


def _in_cache(value: ir.Value, index: int) -> str:
    return re.sub(r"\.\d+\.", f".{index}.", value.name or "", count=1)


def assign_names(model: ir.Model) -> None:
    """Name nodes ``/module/path/OpType`` and their outputs after them; number repeats in order."""
    reserved = {v.name for v in [*model.graph.inputs, *model.graph.outputs]}
    seen: Counter[str] = Counter()
    for node in model.graph:
        module = node.metadata_props.get(MODULE, "")
        path = re.sub(r"\.(?!\d)", "/", module)
        base = f"/{path}/{node.op_type}" if path else f"/{node.op_type}"
        number = seen[base]
        seen[base] += 1
        node.name = f"{base}_{number}" if number else base
        for position, output in enumerate(node.outputs):
            if output.name not in reserved:
                output.name = f"{node.name}_output_{position}"
    for value in [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]:
        if value.shape is not None:
            value.shape = ir.Shape([_dimension(size) for size in value.shape])
    constants: Counter[str] = Counter()
    for name, value in list(model.graph.initializers.items()):
        if value.const_value is not None and (name.startswith("val_") or "/" not in name):
            model.graph.initializers.pop(name)
            user = next((u for u, _ in value.uses()), None)
            base = f"{user.name}/constant" if user is not None else "/constant"
            number = constants[base]
            constants[base] += 1
            value.name = f"{base}_{number}" if number else base
            model.graph.initializers[value.name] = value


def _dimension(size: int | ir.SymbolicDim) -> int | ir.SymbolicDim:
    """The tracer spells a cache's length as a sum, in one order or the other; it has a name."""
    if isinstance(size, int) or size.value is None:
        return size
    terms = sorted(size.value.split(" + "))
    is_total = terms == ["past_sequence_length", "sequence_length"]
    return ir.SymbolicDim("total_sequence_length") if is_total else size
