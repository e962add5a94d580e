# SPDX-License-Identifier: Apache-2.0
"""Which Hugging Face configurations can be exported, and which of their layers differ.

A model type is listed here once its rotated export has been shown to equal Hugging Face's model in
the tests. An unknown one is refused: a guessed mapping would be a wrong model that runs.
"""

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quarot_onnx.errors import InputError, UnsupportedModelError

if TYPE_CHECKING:
    import transformers

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")
"""Values of ``model_type`` in config.json."""

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
)
_LIMIT = 1 << 24
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


def check_config(path: Path, raw: dict[str, Any]) -> None:
    """Refuse what cannot be exported, from the configuration alone.

    Args:
        path: the config.json, for messages.
        raw: its content.

    Raises:
        InputError: a size is missing, not positive, or does not fit another one.
        UnsupportedModelError: the model type or its RoPE is not supported.
    """
    model_type = raw["model_type"]
    if model_type not in SUPPORTED:
        raise UnsupportedModelError(
            f"{path}: model_type {model_type!r} is not supported; "
            f"supported are {', '.join(SUPPORTED)}"
        )
    _check_sizes(path, raw)
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    rope_type = rope.get("rope_type", rope.get("type")) if isinstance(rope, dict) else None
    if rope_type in _LENGTH_DEPENDENT_ROPE:
        raise UnsupportedModelError(
            f"{path}: rope type {rope_type!r} depends on the length at run time, which a graph "
            "would freeze; remove rope_scaling to export for the original context length"
        )


def load_config(directory: Path, raw: dict[str, Any]) -> "transformers.PretrainedConfig":
    """The checked configuration of the model in `directory`, as transformers reads it.

    Raises:
        InputError: as `check_config`, or transformers refuses the file.
        UnsupportedModelError: as `check_config`.
    """
    import transformers  # noqa: PLC0415  # 1.4 s that a dry run does not pay

    path = directory / "config.json"
    check_config(path, raw)
    try:
        config: transformers.PretrainedConfig = transformers.AutoConfig.from_pretrained(
            directory, local_files_only=True
        )
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        first_line = next(iter(str(error).strip().splitlines()), repr(error))
        raise InputError(
            f"{path}: transformers refuses it ({first_line}); repair the file"
        ) from error
    return config


def _check_sizes(path: Path, raw: dict[str, Any]) -> None:
    for key in _SIZES:
        value = raw.get(key)
        if type(value) is not int or not 0 < value <= _LIMIT:
            raise InputError(
                f"{path}: {key} = {value!r}; it must be a whole number from 1 to {_LIMIT}"
            )
    heads = raw["num_attention_heads"]
    kv_heads = raw.get("num_key_value_heads") or heads
    if type(kv_heads) is not int or kv_heads < 1 or heads % kv_heads:
        raise InputError(
            f"{path}: num_key_value_heads = {kv_heads!r} does not divide "
            f"num_attention_heads = {heads}"
        )
    if raw.get("head_dim") is None and raw["hidden_size"] % heads:
        raise InputError(
            f"{path}: num_attention_heads = {heads} does not divide "
            f"hidden_size = {raw['hidden_size']}"
        )


def layer_kinds(config: "transformers.PretrainedConfig") -> list[str]:
    """What distinguishes each layer's graph, first to last; equal kinds are clones."""
    types = getattr(config, "layer_types", None)
    return list(types) if types else ["full_attention"] * config.num_hidden_layers


def shallow(
    config: "transformers.PretrainedConfig",
) -> tuple["transformers.PretrainedConfig", list[int]]:
    """A configuration with one layer of each kind, and the kind of each real layer."""
    kinds = layer_kinds(config)
    distinct = list(dict.fromkeys(kinds))
    reduced = copy.deepcopy(config)
    reduced.num_hidden_layers = len(distinct)
    if getattr(config, "layer_types", None):
        reduced.layer_types = distinct
    return reduced, [distinct.index(kind) for kind in kinds]
