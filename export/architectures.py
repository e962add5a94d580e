# SPDX-License-Identifier: Apache-2.0
"""Which Hugging Face configurations can be exported, and which of their layers differ.

A model type is listed here once its rotated export has been shown to equal Hugging Face's model in
the tests. An unknown one is refused: a guessed mapping would be a wrong model that runs.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quarot_onnx.errors import InputError, UnsupportedModelError

if TYPE_CHECKING:
    import transformers

SUPPORTED = (
    "gemma2",
    "gemma3_text",
    "gpt_neox",
    "gpt_oss",
    "llama",
    "mistral",
    "mixtral",
    "opt",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
)
"""Values of ``model_type`` in config.json."""

LLAMA_MODULES = ("llama", "mistral", "qwen2", "qwen3")
"""Those whose modules and weights on disk are Llama's: the PyTorch model of the artifact's codes
(`quarot_onnx.reference.FakeQuantModel`) and the comparison of weights are written for them."""

_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_INTERMEDIATE_SIZE = ("ffn_dim", "intermediate_size")
_ACTIVATION = ("hidden_activation", "hidden_act", "activation_function")
_HEAD_DIM = {"gemma2": 256, "gemma3_text": 256, "gpt_oss": 64, "qwen3": 128}
"""What transformers assumes where config.json does not say; others divide hidden_size by heads."""
_POST_NORMS = {"gemma2": 2, "gemma3_text": 2}
"""Norms behind the writers of a layer, whose scale nothing can take over."""


@dataclass(frozen=True)
class _ExpertKeys:
    """Which keys of config.json say how wide experts are."""

    size: str
    shared_size: str | None = None


_EXPERTS = {
    "gpt_oss": _ExpertKeys("intermediate_size"),
    "mixtral": _ExpertKeys("intermediate_size"),
    "qwen2_moe": _ExpertKeys("moe_intermediate_size", "shared_expert_intermediate_size"),
    "qwen3_moe": _ExpertKeys("moe_intermediate_size"),
}
TRANSPOSED_STACKS = ("gpt_oss",)
"""Whose stacks of experts are [E, in, out]; those of others are [E, out, in]."""
_NUM_EXPERTS = ("num_local_experts", "num_experts")
_LIMIT = 1 << 24
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True)
class FeedForward:
    """One size of feed-forward network in a decoder.

    Attributes:
        name: ``down_proj``, ``an expert's down_proj`` or ``the shared expert's down_proj``.
        size: what its down_proj reads.
        visits: how many such networks a token goes through in a layer that has them.
    """

    name: str
    size: int
    visits: int = 1


@dataclass(frozen=True)
class Dimensions:
    """The sizes of a decoder, whatever its configuration calls them.

    Attributes:
        feed_forwards: the kinds of feed-forward network; one for a model without experts.
        num_experts: of a layer with a mixture; 0 where there is none.
        post_norms: how many norms of a layer stand behind its writers.
    """

    hidden_size: int
    feed_forwards: tuple[FeedForward, ...]
    num_experts: int
    post_norms: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocabulary_size: int


def dimensions(raw: Mapping[str, Any]) -> Dimensions:
    """The sizes in the content of a config.json that `check_config` has accepted."""
    hidden_size, heads = raw["hidden_size"], raw["num_attention_heads"]
    assumed = _HEAD_DIM.get(raw["model_type"], hidden_size // heads)
    return Dimensions(
        hidden_size=hidden_size,
        feed_forwards=tuple(_feed_forward_sizes(raw)),
        num_experts=num_experts(raw),
        post_norms=_POST_NORMS.get(raw["model_type"], 0),
        num_layers=raw["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or assumed,
        vocabulary_size=raw["vocab_size"],
    )


def _feed_forward_sizes(raw: Mapping[str, Any]) -> Iterator[FeedForward]:
    forms = _feed_forwards(raw, raw["num_hidden_layers"])
    if "dense" in forms:
        yield FeedForward("down_proj", raw[_key(raw, _INTERMEDIATE_SIZE)])
    keys = _EXPERTS.get(raw["model_type"])
    if keys is not None and "experts" in forms:
        yield FeedForward("an expert's down_proj", raw[keys.size], raw["num_experts_per_tok"])
        if keys.shared_size is not None:
            yield FeedForward("the shared expert's down_proj", raw[keys.shared_size])


def _key(raw: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """The first of `names` that `raw` has, else the last."""
    return next((name for name in names if raw.get(name) is not None), names[-1])


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
        rope = raw.get(key) or {}
        by_layer_type = isinstance(rope, dict) and rope and _are_tables(rope.values())
        for table in rope.values() if by_layer_type else [rope]:
            _check_rope(path, key, table)


def _are_tables(values: Iterable[Any]) -> bool:
    return all(isinstance(value, dict) for value in values)


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
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None)
    _check_heads(path, heads, heads if kv_heads is None else kv_heads)
    known = {name: getattr(config, name, None) for name in _ACTIVATION}
    key = _key(known, _ACTIVATION)
    if known[key] not in ACT2FN:
        raise UnsupportedModelError(
            f"{path}: {key} {known[key]!r} is not an activation of transformers; "
            "repair the file or update transformers"
        )
    return config


def _check_sizes(path: Path, raw: dict[str, Any]) -> None:
    experts = _EXPERTS.get(raw["model_type"])
    needed = [*_SIZES, _key(raw, _INTERMEDIATE_SIZE)]
    if experts is not None:
        named = (_key(raw, _NUM_EXPERTS), experts.size, experts.shared_size, "num_experts_per_tok")
        needed += [key for key in named if key is not None]
    for key in needed:
        value = raw.get(key)
        if type(value) is not int or not 0 < value <= _LIMIT:
            raise InputError(
                f"{path}: {key} = {value!r}; it must be a whole number from 1 to {_LIMIT}"
            )
    heads, kv_heads = raw["num_attention_heads"], raw.get("num_key_value_heads")
    _check_heads(path, heads, heads if kv_heads is None else kv_heads)
    head_dim = raw.get("head_dim", _HEAD_DIM.get(raw["model_type"]))
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


def layer_kinds(config: "transformers.PretrainedConfig") -> list[tuple[str, str]]:
    """What distinguishes each layer's graph, first to last; equal kinds are clones.

    A kind is the reach of its attention, and the form of its feed-forward.
    """
    count = config.num_hidden_layers
    types = getattr(config, "layer_types", None) or ["full_attention"] * count
    return list(zip(types, _feed_forwards(config.to_dict(), count), strict=True))


def _feed_forwards(raw: Mapping[str, Any], layers: int) -> list[str]:
    """For each layer whether its feed-forward is ``dense`` or ``experts``."""
    if not num_experts(raw):
        return ["dense"] * layers
    dense, step = raw.get("mlp_only_layers") or [], raw.get("decoder_sparse_step") or 1
    return [
        "dense" if index in dense or (index + 1) % step else "experts" for index in range(layers)
    ]


def num_experts(raw: Mapping[str, Any]) -> int:
    """How many experts a layer with a mixture has; 0 where there is none."""
    return int(raw[_key(raw, _NUM_EXPERTS)]) if raw["model_type"] in _EXPERTS else 0


def shallow(
    config: "transformers.PretrainedConfig",
) -> tuple["transformers.PretrainedConfig", list[int]]:
    """A configuration with one layer of each kind, and the kind of each real layer."""
    kinds = layer_kinds(config)
    distinct = list(dict.fromkeys(kinds))
    reduced = copy.deepcopy(config)
    reduced.num_hidden_layers = len(distinct)
    if getattr(config, "layer_types", None):
        reduced.layer_types = [attention for attention, _ in distinct]
    if hasattr(config, "mlp_only_layers"):
        reduced.decoder_sparse_step = 1
        reduced.mlp_only_layers = [i for i, (_, form) in enumerate(distinct) if form == "dense"]
    return reduced, [distinct.index(kind) for kind in kinds]
