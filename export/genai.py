# SPDX-License-Identifier: Apache-2.0
"""``genai_config.json``: what onnxruntime-genai and lm-eval's ONNX backends want beside a model.

They run an artifact whose cache is float (``kv_cache.io=float``, or a cache that is not quantized):
its inputs and outputs are those that onnxruntime-genai's own builder writes.
"""

import json
from pathlib import Path
from typing import Any

import onnx_ir as ir

from quarot_onnx.manifest import MODEL

GENAI_CONFIG = "genai_config.json"

_PAST, _PRESENT = "past_key_values.%d", "present.%d"
_TYPES = frozenset({"llama", "mistral", "phi3", "qwen2", "qwen3", "gemma2", "gemma3_text"})
_DEFAULT_TYPE = "llama"  # any decoder with a key and a value per layer


def has_float_cache(model: ir.Model) -> bool:
    """Whether the cache's inputs are plain keys and values."""
    names = {value.name for value in model.graph.inputs}
    return f"{_PAST % 0}.key" in names and f"{_PAST % 0}.key_scale" not in names


def genai_config(model: ir.Model, config: Any, generation: dict[str, Any]) -> dict[str, Any]:
    """The content of ``genai_config.json``.

    Args:
        model: with a float cache.
        config: of Hugging Face.
        generation: Hugging Face's ``generation_config.json``; may be empty.
    """
    key = next(value for value in model.graph.inputs if value.name == f"{_PAST % 0}.key")
    assert key.shape is not None
    names = {value.name for value in model.graph.inputs}
    ends = generation.get("eos_token_id", config.eos_token_id)
    first_end = ends[0] if isinstance(ends, list) else ends
    begin = generation.get("bos_token_id", config.bos_token_id)
    padding = generation.get("pad_token_id", config.pad_token_id)
    ids = {
        "bos_token_id": first_end if begin is None else begin,
        "eos_token_id": ends,
        "pad_token_id": first_end if padding is None else padding,
    }
    return {
        "model": {
            "type": config.model_type if config.model_type in _TYPES else _DEFAULT_TYPE,
            **{name: value for name, value in ids.items() if value is not None},
            "context_length": config.max_position_embeddings,
            "vocab_size": config.vocab_size,
            "decoder": {
                "filename": MODEL,
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "head_size": key.shape[3],
                "hidden_size": config.hidden_size,
                "num_attention_heads": config.num_attention_heads,
                "num_hidden_layers": config.num_hidden_layers,
                "num_key_value_heads": key.shape[1],
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    **({"position_ids": "position_ids"} if "position_ids" in names else {}),
                    "past_key_names": f"{_PAST}.key",
                    "past_value_names": f"{_PAST}.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": f"{_PRESENT}.key",
                    "present_value_names": f"{_PRESENT}.value",
                },
            },
        },
        "search": {
            "do_sample": bool(generation.get("do_sample", False)),
            "temperature": float(generation.get("temperature") or 1.0),
            "top_k": int(generation.get("top_k") or 50),
            "top_p": float(generation.get("top_p") or 1.0),
            "max_length": config.max_position_embeddings,
            "past_present_share_buffer": False,
        },
    }


def save_genai_config(directory: Path, model: ir.Model, config: Any) -> None:
    """Write ``genai_config.json`` beside the companions, where the cache is float."""
    if not has_float_cache(model):
        return
    path = directory / "generation_config.json"
    generation = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    text = json.dumps(genai_config(model, config, generation), indent=2)
    (directory / GENAI_CONFIG).write_text(f"{text}\n", encoding="utf-8")
