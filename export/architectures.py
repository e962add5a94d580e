# SPDX-License-Identifier: Apache-2.0
"""Which Hugging Face configurations can be exported, and which of their layers differ.

A model type is listed here once its rotated export has been shown to equal Hugging Face's model in the
tests. An unknown one is refused: a guessed mapping would be a wrong model that runs.
"""

import copy
from pathlib import Path
from typing import Any

import transformers

from quarot_onnx.errors import InputError, UnsupportedModelError

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")
"""Values of ``model_type`` in config.json."""

_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_LIMIT = 1 << 24
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


def load_config(directory: Path, raw: dict[str, Any]) -> transformers.PretrainedConfig:
    """The checked configuration of the model in `directory`.

    Args:
        directory: the model directory, for messages and for transformers.
        raw: the content of its config.json.

    Raises:
        InputError: a size is missing, not positive, or does not fit another one.
        UnsupportedModelError: the model type, its RoPE or its activation is not supported.
    """
    path = directory / "config.json"
    model_type = raw["model_type"]
    if model_type not in SUPPORTED:
        raise UnsupportedModelError(
            f"{path}: model_type {model_type!r} is not supported; supported are {', '.join(SUPPORTED)}"
        )
    _check_sizes(path, raw)
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    rope_type = rope.get("rope_type", rope.get("type")) if isinstance(rope, dict) else None
    if rope_type in _LENGTH_DEPENDENT_ROPE:
        raise UnsupportedModelError(
            f"{path}: rope type {rope_type!r} depends on the length at run time, which a graph would "
            "freeze; remove rope_scaling to export for the original context length"
        )
    try:
        return transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise InputError(f"{path}: transformers refuses it ({first_line}); repair the file") from error


def _check_sizes(path: Path, raw: dict[str, Any]) -> None:
    for key in _SIZES:
        value = raw.get(key)
        if type(value) is not int or not 0 < value <= _LIMIT:
            raise InputError(f"{path}: {key} = {value!r}; it must be a whole number from 1 to {_LIMIT}")
    heads = raw["num_attention_heads"]
    kv_heads = raw.get("num_key_value_heads") or heads
    if type(kv_heads) is not int or kv_heads < 1 or heads % kv_heads:
        raise InputError(
            f"{path}: num_key_value_heads = {kv_heads!r} does not divide num_attention_heads = {heads}"
        )
    if raw.get("head_dim") is None and raw["hidden_size"] % heads:
        raise InputError(
            f"{path}: num_attention_heads = {heads} does not divide hidden_size = {raw['hidden_size']}"
        )


def layer_kinds(config: transformers.PretrainedConfig) -> list[str]:
    """What distinguishes each layer's graph, first to last; equal kinds are clones of each other."""
    types = getattr(config, "layer_types", None)
    return list(types) if types else ["full_attention"] * config.num_hidden_layers


def shallow(config: transformers.PretrainedConfig) -> tuple[transformers.PretrainedConfig, list[int]]:
    """A configuration with one layer of each kind, and which of them each real layer is a clone of."""
    kinds = layer_kinds(config)
    distinct = list(dict.fromkeys(kinds))
    reduced = copy.deepcopy(config)
    reduced.num_hidden_layers = len(distinct)
    if getattr(config, "layer_types", None):
        reduced.layer_types = distinct
    return reduced, [distinct.index(kind) for kind in kinds]
