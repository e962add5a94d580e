# SPDX-License-Identifier: Apache-2.0
"""The operators in a graph: their functions and their nodes."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import onnx_ir as ir

from quarot_onnx.ops import attention, groups, linear, rotations
from quarot_onnx.ops import cache as kv_cache
from quarot_onnx.ops.operator import DOMAIN, OPSET, VERSION, Operator

OPERATORS: Mapping[str, Operator] = {
    operator.name: operator
    for kind in (rotations, linear, groups, kv_cache, attention)
    for operator in kind.OPERATORS
}

_BY_INPUT = "ByInput"  # in the name of a function whose attribute is an input

# TensorRT 10.15 and later inline a function unless the node names the plugin's namespace and
# version.
_PLUGIN_ATTRIBUTES: Mapping[str, str] = {"plugin_namespace": DOMAIN, "plugin_version": str(VERSION)}


@cache
def _function_proto(name: str, as_input: str) -> bytes:
    import onnx.parser  # noqa: PLC0415  # 260 ms that only a writer of graphs pays

    operator = OPERATORS[name]
    given = [attribute for attribute in operator.attributes if attribute != as_input]
    inputs = [*operator.inputs, *([as_input] if as_input else [])]
    body = operator.body.replace(
        f"Constant <value_float: float = @{as_input}> ()", f"Identity ({as_input})"
    )
    text = f"""
    <domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>
    {name}{_BY_INPUT if as_input else ""} <{", ".join([*given, *_PLUGIN_ATTRIBUTES])}>
    ({", ".join(inputs)}) => ({", ".join(operator.outputs)})
    {{ {body} }}
    """
    return bytes(onnx.parser.parse_function(text).SerializeToString())


def function(name: str, as_input: str = "") -> ir.Function:
    """A fresh ONNX local function for the operator `name`.

    With the name of a float attribute in `as_input`, that is an input behind the others, and the
    function has a name of its own: for searches, which try many values in one session.
    """
    import onnx  # noqa: PLC0415

    text = _function_proto(name, as_input)
    return ir.serde.deserialize_function(onnx.FunctionProto.FromString(text))


def node(name: str, inputs: list[ir.Value], attributes: Mapping[str, Any], *, at: str) -> ir.Node:
    """A node of the operator `name`, with names derived from `at` (``/model/layers.0/...``).

    Raises:
        ValueError: the attributes are not exactly those of the operator.
    """
    operator = OPERATORS[name]
    if set(attributes) != set(operator.attributes) or len(inputs) != len(operator.inputs):
        raise ValueError(f"{at}: {name} takes {operator.inputs} and {list(operator.attributes)}")
    created = ir.node(
        name,
        inputs,
        {**attributes, **_PLUGIN_ATTRIBUTES},
        domain=DOMAIN,
        num_outputs=len(operator.outputs),
        name=at,
    )
    for output, suffix in zip(created.outputs, operator.outputs, strict=True):
        output.name = f"{at}_{suffix}"
    return created


def declare(model: ir.Model) -> None:
    """Give `model` exactly the functions that its ``quarot`` nodes use, and the domain."""
    used = {n.op_type for n in model.graph if n.domain == DOMAIN}
    for identifier in [i for i in model.functions if i[0] == DOMAIN and i[1] not in used]:
        model.functions.pop(identifier)
    for name in sorted(used):
        added = function(name)
        model.functions.setdefault(added.identifier(), added)
    if used:
        model.graph.opset_imports[DOMAIN] = VERSION
