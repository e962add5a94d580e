# SPDX-License-Identifier: Apache-2.0
"""From a Hugging Face directory to a float ONNX model with lazy weights."""

import onnx_ir as ir

from quarot_onnx.errors import InputError
from quarot_onnx.export.architectures import load_config, shallow
from quarot_onnx.export.checkpoint import Checkpoint, CheckpointSource, check_float
from quarot_onnx.export.lower import lower_markers, set_float_dtype
from quarot_onnx.export.stitch import TRANSPOSED, assign_names, canonicalize, stitch
from quarot_onnx.weights import Weight

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


_TIED_PAIR = ("model.embed_tokens.weight", "lm_head.weight")


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
    from quarot_onnx.export.trace import trace  # noqa: PLC0415  # imports torch

    config = load_config(checkpoint.directory, checkpoint.config)
    if config.tie_word_embeddings and not checkpoint.are_equal(*_TIED_PAIR):
        config.tie_word_embeddings = False  # transformers, too, uses both where both are given
    reduced, kinds = shallow(config)
    model = trace(reduced)
    canonicalize(model)
    lower_markers(model)
    stitch(model, kinds)
    set_float_dtype(model, dtype)
    assign_names(model)
    _bind_weights(model, checkpoint, dtype)
    model.ir_version = IR_VERSION
    model.producer_name = "quarot-onnx"
    model.producer_version = None
    model.metadata_props.clear()
    model.graph.name = config.model_type
    model.graph.metadata_props.clear()
    return model


def _bind_weights(model: ir.Model, checkpoint: Checkpoint, dtype: ir.DataType) -> None:
    from quarot_onnx.export.trace import TIED  # noqa: PLC0415  # imports torch

    for name, value in model.graph.initializers.items():
        transposed = value.metadata_props.pop(TRANSPOSED, None) is not None
        if value.const_value is not None:
            continue
        tied = value.metadata_props.pop(TIED, None)
        entry = checkpoint.tensor(tied if tied in checkpoint.tensors else name)
        check_float(entry)
        source = CheckpointSource(entry, transposed)
        assert value.shape is not None
        if tuple(source.shape) != tuple(value.shape):
            expected = list(value.shape)[::-1] if transposed else list(value.shape)
            raise InputError(
                f"{entry.file}: tensor {name} has shape {list(entry.shape)} where config.json "
                f"implies {expected}; the two do not belong together"
            )
        value.const_value = Weight(name, source, dtype)
        value.type = ir.TensorType(dtype)
