# SPDX-License-Identifier: Apache-2.0
"""From a Hugging Face directory to a float ONNX model with lazy weights."""

from collections.abc import Set as AbstractSet
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from quarot_onnx.errors import InputError
from quarot_onnx.export.architectures import load_config, shallow
from quarot_onnx.export.canonical import Reading, canonicalize, reading
from quarot_onnx.export.checkpoint import Checkpoint, check_float
from quarot_onnx.export.experts import separate_experts
from quarot_onnx.export.lower import lower_markers, set_float_dtype
from quarot_onnx.export.stitch import assign_names, stitch
from quarot_onnx.weights import Weight

if TYPE_CHECKING:
    from quarot_onnx.export.conversion import StoredNames

IR_VERSION = 10

COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files that travel with an artifact unchanged, where the model has them."""


def onnx_from_huggingface(checkpoint: Checkpoint, dtype: ir.DataType) -> ir.Model:
    """The float ONNX model of `checkpoint`.

    One layer of each kind is traced with fake weights and cloned to full depth. Every weight is a
    `quarot_onnx.weights.Weight`, read when it is written.

    Args:
        checkpoint: a verified model directory.
        dtype: FLOAT, FLOAT16 or BFLOAT16, the dtype of the float parts and of the logits.

    Raises:
        InputError: a weight is missing or has another shape than the configuration says.
        UnsupportedModelError: an architecture, RoPE or weight dtype that is not supported.
    """
    from quarot_onnx.export.conversion import stored_names  # noqa: PLC0415  # imports torch
    from quarot_onnx.export.trace import TIED, trace  # noqa: PLC0415

    config = load_config(checkpoint.directory, checkpoint.config)
    reduced, kinds = shallow(config)
    stored = stored_names(checkpoint, config)
    model = trace(reduced)
    pairs = [(name, v.metadata_props.get(TIED)) for name, v in model.graph.initializers.items()]
    if not all(
        checkpoint.are_equal(stored.names.get(name, name), stored.names.get(tied, tied))
        for name, tied in pairs
        if tied is not None
    ):
        reduced.tie_word_embeddings = False  # transformers, too, uses both where both are given
        model = trace(reduced)
    canonicalize(model)
    separate_experts(model)
    lower_markers(model)
    stitch(model, kinds)
    set_float_dtype(model, dtype)
    assign_names(model)
    _bind_weights(model, stored, dtype)
    held = [*model.graph.inputs, *model.graph.initializers.values()]
    for value in [*held, *(v for node in model.graph for v in node.outputs)]:
        value.metadata_props.clear()  # the tracer's
    model.ir_version = IR_VERSION
    model.producer_name = "quarot-onnx"
    model.producer_version = None
    model.metadata_props.clear()
    model.graph.name = config.model_type
    model.graph.metadata_props.clear()
    return model


def _bind_weights(model: ir.Model, stored: "StoredNames", dtype: ir.DataType) -> None:
    """Give each initializer its lazy weight; that of an expert gets the name it has on disk."""
    from quarot_onnx.export.trace import TIED  # noqa: PLC0415  # imports torch

    bound: set[str] = set()
    used: set[str] = set()
    for name, value in list(model.graph.initializers.items()):
        if value.const_value is not None:
            continue
        how = reading(value)
        tied = value.metadata_props.pop(TIED, None)
        parameter = tied if tied is not None and tied in stored.names else how.tensor
        source = stored.source(parameter, how)
        entry = source.entry
        bound |= {parameter, how.tensor}
        used.add(entry.name)
        check_float(entry)
        assert value.shape is not None
        if tuple(source.shape) != tuple(value.shape):
            raise InputError(
                f"{entry.file}: tensor {entry.name} has shape {list(entry.shape)} where "
                f"config.json implies {_on_disk(value.shape, how)}; the two do not belong together"
            )
        if how.index is not None and source.index is None and source.rows is None:
            model.graph.initializers.pop(name)
            value.name = entry.name
            model.graph.initializers[entry.name] = value
        weight = Weight(value.name or "", source, dtype)
        if how.addend:
            weight.compose(0, partial(np.add, how.addend))
        value.const_value = weight
        value.type = ir.TensorType(dtype)
    _refuse_leftovers(stored, bound, used)


def _refuse_leftovers(
    stored: "StoredNames", bound: AbstractSet[str], used: AbstractSet[str]
) -> None:
    """A bias that the configuration does not know would be dropped: another model that runs.

    So would experts be. Other tensors that nothing reads (old RoPE tables, value heads) are
    ignored, as in transformers.
    """
    modules = {name.rpartition(".")[0] for name in bound}
    for parameter in [*stored.names, *stored.stacks]:
        left = [name for name in stored.tensors(parameter) if name not in used]
        is_known = parameter in bound and parameter in stored.names
        if left and not is_known and parameter.rpartition(".")[0] in modules:
            raise InputError(
                f"{stored.checkpoint.tensors[left[0]].file}: tensor {left[0]} belongs to a module "
                "whose other tensors are used, and config.json has no place for it; "
                "repair config.json"
            )


def _on_disk(shape: ir.ShapeProtocol, how: Reading) -> str:
    """The shape that a tensor should have on disk, for a message."""
    expected = list(shape)[::-1] if how.transposed else list(shape)
    where = " for each expert" if how.index is not None else ""
    return f"{expected}{' in each part' if how.rows is not None else ''}{where}"
