# SPDX-License-Identifier: Apache-2.0
"""The plugins and ``ops`` say the same; ``docs/plugins.md`` says what the library says."""

import ctypes
import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from quarot_onnx import ops
from quarot_onnx.plugins.kernels import ABI_VERSION

DOCS = Path(__file__).parents[2] / "docs" / "plugins.md"

CHANGED = {
    "Hadamard": (("A", "B"), ("signs",)),
    "HadamardHeads": (("A",), ("signs",)),
    "QuantizeInt4": ((), ("signs",)),
    "Int4Gemm": ((), ("bias",)),
    "KvAppend": ((), ("lengths",)),
    "KvAttention": (("mask",), ("lengths", "mask")),
}
"""Inputs that a plugin does without, and those behind the others: what docs/plugins.md explains."""


@pytest.fixture(scope="module")
def description(library_path: Path) -> dict[str, Any]:
    library = ctypes.CDLL(str(library_path))
    library.quarotDescribePlugins.restype = ctypes.c_char_p
    described: dict[str, Any] = json.loads(library.quarotDescribePlugins())
    return described


def test_the_library_is_of_this_abi(description) -> None:
    assert description["abi_version"] == ABI_VERSION
    assert description["namespace"] == ops.DOMAIN
    assert description["version"] == str(ops.VERSION)


def test_tensors_are_the_operator_s_but_for_what_is_stated(description) -> None:
    assert set(description["plugins"]) == set(CHANGED)
    for name, plugin in description["plugins"].items():
        dropped, added = CHANGED[name]
        kept = [i for i in ops.OPERATORS[name].inputs if i not in dropped]
        assert [i["name"] for i in plugin["inputs"]] == [*kept, *added]
        assert not any(i["optional"] for i in plugin["inputs"][: len(kept)])
        assert [o["name"] for o in plugin["outputs"]] == list(ops.OPERATORS[name].outputs)


def test_attributes_are_the_operator_s_with_its_types_and_defaults(description) -> None:
    kinds = {int: "int", float: "float", list: "ints"}
    for name, plugin in description["plugins"].items():
        operator = ops.OPERATORS[name]
        attributes = {a["name"]: a for a in plugin["attributes"]}
        reference = inspect.signature(operator.reference).parameters
        for attribute, kind in operator.attributes.items():
            stated = attributes[attribute]
            assert stated["type"] == kinds[kind]
            if stated["default"] is not None:
                assert stated["default"] == reference[attribute].default
        # What the operator does not know has a default, except the tag of packed weights.
        for attribute in set(attributes) - set(operator.attributes) - {"weight_layout"}:
            assert not attributes[attribute]["required"]


def test_the_documentation_has_the_library_s_tables(description) -> None:
    text = DOCS.read_text(encoding="utf-8")
    for row in tables(description):
        assert row in text, f"docs/plugins.md lacks {row}"


def tables(description: dict[str, Any]) -> list[str]:
    """The rows of the two tables in docs/plugins.md."""
    rows = []
    for name, plugin in description["plugins"].items():
        cells = [
            "<br>".join(_tensor(t, plugin) for t in plugin[side]) for side in ("inputs", "outputs")
        ]
        rows.append(f"| `{name}` | {cells[0]} | {cells[1]} |")
    for name, plugin in description["plugins"].items():
        for a in plugin["attributes"]:
            default = "required" if a["required"] else "none" if a["default"] is None else None
            default = default or f"{a['default']:.10g}"
            known = "yes" if a["name"] in ops.OPERATORS[name].attributes else "no"
            rows.append(
                f"| `{name}` | {a['name']} | {a['type']} | {default} | {a['allowed']} | {known} |"
            )
    return rows


def _tensor(tensor: dict[str, Any], plugin: dict[str, Any]) -> str:
    suffix = ", optional" if tensor["optional"] else ""
    if tensor["alias"] >= 0:
        suffix = f", in the memory of {plugin['inputs'][tensor['alias']]['name']}"
    return f"{tensor['name']}: {tensor['type']} `{tensor['shape']}`{suffix}"


def test_every_operator_has_a_plugin_or_a_stated_reason_for_none(description) -> None:
    text = DOCS.read_text(encoding="utf-8")
    section = text[text.index("## Operators without a plugin") :]
    for name in set(ops.OPERATORS) - set(description["plugins"]):
        assert f"`{name}`" in section, f"say in docs/plugins.md why {name} has no plugin"


def test_softcaps_sinks_wide_codes_and_weight_only_have_no_plugin(description) -> None:
    assert set(ops.OPERATORS) - set(description["plugins"]) >= {
        *("Int8Gemm", "KvAppendInt8", "KvAttentionInt8", "KvAttentionSoftcapInt8"),
        *("AttentionSinks", "KvAttentionSinks", "KvAttentionSinksInt8"),
        *("KvAttentionSoftcap", "KvFakeQuantize", "WeightOnlyGemm"),
    }
