# SPDX-License-Identifier: Apache-2.0
"""Stages ``integrity``, ``structure``, ``load`` and ``finite``: is the artifact sound?"""

import math
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx

from quarot_onnx.artifacts import DATA, MODEL, changed_files
from quarot_onnx.errors import UnsupportedModelError
from quarot_onnx.ops import PACKED_BITS
from quarot_onnx.validate.subject import Subject
from quarot_onnx.validate.verdict import Finding, Skip

_OPSET, _IR_VERSION = 23, 10
_LOCAL_PATH = re.compile(rb"/(?:home|root|Users|tmp|usr|opt|mnt)/[\w.-]+/|site-packages|\.py\b")
_PACKED_BITS = {onnx.TensorProto.INT4: 4, onnx.TensorProto.UINT4: 4}

_Interface = dict[str, tuple[int, list[int | None]]]
"""Inputs or outputs by name: element type, and shape with None for a symbolic size."""


def check_integrity(subject: Subject) -> Finding:
    """Fails on a file that changed, was truncated or was lost after the export."""
    changed = changed_files(subject.artifact, subject.manifest)
    detail = f"{changed[0]} is missing or differs from manifest.json" if changed else "as exported"
    return Finding("files that differ from the manifest", len(changed), 0, detail)


def check_structure(subject: Subject) -> Finding:
    """Fails on a graph whose form is not what hosts are promised, whatever it computes.

    That is: another opset; an input or output that is missing, surplus, or of another type or
    shape; an operator without a body; weights that overlap, end behind the file or lie in another
    one; a path of the exporting machine; anything that the ONNX checker refuses.
    """
    graph = subject.graph
    problems = [
        *_version_problems(graph),
        *_interface_problems(subject, graph),
        *_operator_problems(graph),
        *_data_problems(subject.artifact, graph),
    ]
    found = _LOCAL_PATH.search(graph.SerializeToString())
    if found is not None:
        problems.append(f"names a local path ({found[0].decode(errors='replace')})")
    if not problems:
        try:
            onnx.checker.check_model(str(subject.artifact / MODEL))
        except onnx.checker.ValidationError as error:
            problems.append(f"onnx.checker: {str(error).strip().splitlines()[0]}")
    detail = f"{MODEL}: {problems[0]}" if problems else f"{len(graph.graph.node)} nodes"
    return Finding("structural problems", len(problems), 0, detail)


def check_load(subject: Subject) -> Finding:
    """Fails on a graph that the runtime refuses; skips one that it has no kernels for."""
    try:
        model = subject.model
    except UnsupportedModelError as error:
        raise Skip(str(error)) from error
    subject.is_loaded = True
    return Finding(
        "cache bytes per token", model.cache_bytes_per_token, None, f"runs on {subject.runtime}"
    )


def check_finite(subject: Subject) -> Finding:
    """Fails on NaN and infinity in weights and logits, and on scales that are not positive."""
    from quarot_onnx.reference import read_initializers  # noqa: PLC0415  # imports torch

    broken: list[str] = []
    for name, tensor in read_initializers(subject.artifact).items():
        try:
            values = tensor.numpy()
        except (OSError, ValueError) as error:
            broken.append(f"initializer {name} cannot be read ({error})")
            continue
        if "int" in values.dtype.name:  # int4 is no kind of integer to NumPy
            continue
        bad = int((~np.isfinite(values.astype(np.float32))).sum())
        if bad:
            broken.append(f"initializer {name} has {bad} values that are not finite")
        elif name.endswith("_scale") and not (values > 0).all():
            broken.append(f"initializer {name} has scales that are not positive")
    if not broken and subject.is_loaded:
        model, ids = subject.model, subject.ids
        logits, _ = model.step(ids, model.new_cache(len(ids)))
        if not np.isfinite(logits).all():
            broken.append("logits are not finite")
    subject.is_finite = not broken
    detail = broken[0] if broken else "weights and logits"
    return Finding("tensors that are not finite", len(broken), 0, detail)


# --- Structure ------------------------------------------------------------------------------------


def _version_problems(graph: onnx.ModelProto) -> Iterator[str]:
    opsets = {o.domain: o.version for o in graph.opset_import}
    if opsets.get("") != _OPSET:
        yield f"opset {opsets.get('')}, expected {_OPSET}"
    if graph.ir_version != _IR_VERSION:
        yield f"IR version {graph.ir_version}, expected {_IR_VERSION}"


def _interface(subject: Subject) -> tuple[_Interface, _Interface]:
    """The inputs and the outputs that configuration and recipe ask for."""
    config, cache = subject.config, subject.recipe.kv_cache
    int64, float32 = onnx.TensorProto.INT64, onnx.TensorProto.FLOAT
    size = subject.head_dim
    if cache.bits < 16 and cache.io == "packed":
        codes = size // 2 if cache.bits <= PACKED_BITS else size
        groups = size // min(cache.group_size or size, size)
        parts = {
            "": (onnx.TensorProto.UINT8, codes),
            "_scale": (float32, groups),
            "_zero": (float32, groups),
        }
    else:
        parts = {"": (subject.element_type, size)}
    inputs: _Interface = {
        name: (int64, [None, None]) for name in ("input_ids", "attention_mask", "position_ids")
    }
    outputs: _Interface = {"logits": (subject.element_type, [None, None, config["vocab_size"]])}
    for index in range(config["num_hidden_layers"]):
        for kind in ("key", "value"):
            for part, (element, last) in parts.items():
                entry = (element, [None, subject.num_kv_heads, None, last])
                inputs[f"past_key_values.{index}.{kind}{part}"] = entry
                outputs[f"present.{index}.{kind}{part}"] = entry
    return inputs, outputs


def _interface_problems(subject: Subject, graph: onnx.ModelProto) -> Iterator[str]:
    inputs, outputs = _interface(subject)
    for side, values, wanted in (
        ("input", graph.graph.input, inputs),
        ("output", graph.graph.output, outputs),
    ):
        found = {value.name: value.type.tensor_type for value in values}
        for name in sorted(wanted.keys() - found.keys()):
            yield f"{side} {name} is missing"
        for name in sorted(found.keys() - wanted.keys()):
            yield f"{side} {name} is not expected"
        for name in sorted(wanted.keys() & found.keys()):
            element, shape = wanted[name]
            dims = found[name].shape.dim
            held = [d.dim_value if d.HasField("dim_value") else None for d in dims]
            if found[name].elem_type != element:
                name_of = onnx.TensorProto.DataType.Name
                yield (
                    f"{side} {name} is {name_of(found[name].elem_type)}, "
                    f"expected {name_of(element)}"
                )
            if held != shape:
                yield f"{side} {name} has shape {held}, expected {shape}"


def _operator_problems(graph: onnx.ModelProto) -> Iterator[str]:
    functions = {(function.domain, function.name) for function in graph.functions}
    for node in [*graph.graph.node, *(n for f in graph.functions for n in f.node)]:
        if node.domain not in ("", "ai.onnx") and (node.domain, node.op_type) not in functions:
            yield f"{node.name or node.op_type}: {node.domain}.{node.op_type} has no function body"


def _data_problems(artifact: Path, graph: onnx.ModelProto) -> Iterator[str]:
    extents: list[tuple[int, int, str]] = []
    for tensor in graph.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        if location != DATA:
            yield f"{tensor.name}: its data is in {location!r}, expected {DATA}"
            continue
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", -1))
        kind = tensor.data_type
        bits = _PACKED_BITS.get(kind) or onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize * 8
        expected = (math.prod(tensor.dims) * bits + 7) // 8
        if length != expected:
            shape = list(tensor.dims)
            yield f"{tensor.name}: {length} bytes for shape {shape}, expected {expected}"
        extents.append((offset, offset + length, tensor.name))
    data = artifact / DATA
    available = data.stat().st_size if data.is_file() else 0
    end, before = 0, ""
    for start, stop, name in sorted(extents):
        if start < end:
            yield f"{name}: overlaps {before} in {DATA}"
        if stop > available:
            yield f"{name}: ends at byte {stop} of {DATA}, which has {available}"
        end, before = stop, name
