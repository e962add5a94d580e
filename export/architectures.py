# SPDX-License-Identifier: Apache-2.0
"""Which Hugging Face configurations can be exported, and which of their layers differ.

A model type is listed here once its rotated export has been shown to equal Hugging Face's model in
the tests. An unknown one is refused: a guessed mapping would be a wrong model that runs.
"""

import copy
import math
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
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
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
    for key in ("rope_scaling", "rope_parameters"):
        _check_rope(path, key, raw.get(key) or {})


def _check_rope(path: Path, key: str, rope: Any) -> None:
    if not isinstance(rope, dict):
        raise InputError(f"{path}: {key} = {rope!r}; it must be a table, repair the file")
    theta = rope.get("rope_theta", 1.0)
    if type(theta) not in (int, float) or not 0 < theta < math.inf:
        raise InputError(f"{path}: rope_theta = {theta!r}; it must be a positive number")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type in _LENGTH_DEPENDENT_ROPE:
        raise UnsupportedModelError(
            f"{path}: rope type {rope_type!r} depends on the length at run time, which a graph "
            "would freeze; remove rope_scaling to export for the original context length"
        )
    if rope_type not in _ROPE_TYPES:
        raise UnsupportedModelError(
            f"{path}: rope type {rope_type!r} is not supported; "
            f"supported are {', '.join(_ROPE_TYPES)}"
        )


def load_config(directory: Path, raw: dict[str, Any]) -> "transformers.PretrainedConfig":
    """The checked configuration of the model in `directory`, as transformers reads it.

    Raises:
        InputError: as `check_config`, or transformers refuses the file.
        UnsupportedModelError: as `check_config`.
    """
    import transformers  # noqa: PLC0415  # 1.4 s that a dry run does not pay
    from huggingface_hub.errors import StrictDataclassError  # noqa: PLC0415
    from transformers.activations import ACT2FN  # noqa: PLC0415

    path = directory / "config.json"
    check_config(path, raw)
    try:
        config: transformers.PretrainedConfig = transformers.AutoConfig.from_pretrained(
            directory, local_files_only=True
        )
    except (StrictDataclassError, ValueError, TypeError, LookupError, AttributeError, OSError) as e:
        reason = " ".join(str(e).split()) or repr(e)
        raise InputError(f"{path}: transformers refuses it ({reason}); repair the file") from e
    _check_heads(path, config.num_attention_heads, config.num_key_value_heads)
    if config.hidden_act not in ACT2FN:
        raise UnsupportedModelError(
            f"{path}: hidden_act {config.hidden_act!r} is not an activation of transformers; "
            "repair the file or update transformers"
        )
    return config


def _check_sizes(path: Path, raw: dict[str, Any]) -> None:
    for key in _SIZES:
        value = raw.get(key)
        if type(value) is not int or not 0 < value <= _LIMIT:
            raise InputError(
                f"{path}: {key} = {value!r}; it must be a whole number from 1 to {_LIMIT}"
            )
    heads, kv_heads = raw["num_attention_heads"], raw.get("num_key_value_heads")
    _check_heads(path, heads, heads if kv_heads is None else kv_heads)
    head_dim = raw.get("head_dim")
    if head_dim is None and raw["hidden_size"] % heads:
        raise InputError(
            f"{path}: num_attention_heads = {heads} does not divide hidden_size = "
            f"{raw['hidden_size']}"
        )
    head_dim = raw["hidden_size"] // heads if head_dim is None else head_dim
    if type(head_dim) is not int or not 0 < head_dim <= _LIMIT or head_dim % 2:
        raise InputError(f"{path}: head_dim = {head_dim!r}; RoPE needs a positive even number")


def _check_heads(path: Path, heads: int, kv_heads: Any) -> None:
    if type(kv_heads) is not int or kv_heads < 1 or heads % kv_heads:
        raise InputError(
            f"{path}: num_key_value_heads = {kv_heads!r} does not divide "
            f"num_attention_heads = {heads}"
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
