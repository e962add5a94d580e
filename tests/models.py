# SPDX-License-Identifier: Apache-2.0
"""Small Hugging Face models with random weights, one per supported shape of architecture."""

from pathlib import Path
from typing import Any

import torch
import transformers

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"config": transformers.LlamaConfig},
    "llama-tied": {"config": transformers.LlamaConfig, "tie_word_embeddings": True},
    "mistral-sliding": {"config": transformers.MistralConfig, "sliding_window": 6},
    "qwen2-biases": {
        "config": transformers.Qwen2Config,
        "use_sliding_window": True,
        "max_window_layers": 1,
        "sliding_window": 6,
    },
    "qwen3-head-dim": {"config": transformers.Qwen3Config, "head_dim": 32},
    "phi3": {"config": transformers.Phi3Config, "pad_token_id": 0, "eos_token_id": 1},
    "gemma2": {
        "config": transformers.Gemma2Config,
        "head_dim": 32,
        "query_pre_attn_scalar": 24,
        "sliding_window": 6,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
        "tie_word_embeddings": True,
    },
    "gemma3": {
        "config": transformers.Gemma3TextConfig,
        "head_dim": 32,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "tie_word_embeddings": True,
    },
    "opt": {
        "config": transformers.OPTConfig,
        "ffn_dim": 176,
        "num_key_value_heads": 4,
        "word_embed_proj_dim": 96,
        "tie_word_embeddings": True,
    },
    "gpt-neox": {
        "config": transformers.GPTNeoXConfig,
        "num_key_value_heads": 4,
        "rotary_pct": 0.25,
    },
    "gpt-neox-sequential": {
        "config": transformers.GPTNeoXConfig,
        "num_key_value_heads": 4,
        "use_parallel_residual": False,
    },
    # A step of two tokens reaches fewer experts than there are: some get no token.
    "mixtral": {
        "config": transformers.MixtralConfig,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "sliding_window": 6,
    },
    "qwen2-moe": {
        "config": transformers.Qwen2MoeConfig,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 48,
        "decoder_sparse_step": 2,
    },
    "qwen3-moe": {
        "config": transformers.Qwen3MoeConfig,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "head_dim": 32,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "gpt-oss": {
        "config": transformers.GptOssConfig,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "head_dim": 32,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}
"""Name -> configuration class and what differs from the common small shape."""

EXPERT_FAMILIES = ("mixtral", "qwen2-moe", "qwen3-moe", "gpt-oss")
"""Mixtures of experts; the second has a shared expert, the second and third dense layers too."""

LLAMA_FAMILIES = ("llama", "llama-tied", "mistral-sliding", "qwen2-biases", "qwen3-head-dim")
"""Those for which the PyTorch model of an artifact's codes is written."""

COMMON = {
    "hidden_size": 96,  # 12 * 8: not a power of two
    "intermediate_size": 176,  # 44 * 4
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}


def build(
    family: str, *, seed: int = 0, scale: float = 2.0, **overrides: Any
) -> transformers.PreTrainedModel:
    """A model of `family` whose norm scales, biases and weights are all far from their defaults.

    Weights are drawn with a standard deviation of 0.02 and multiplied by `scale`.
    """
    options = {**COMMON, **FAMILIES[family], **overrides}
    config = options.pop("config")(**options)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            else:
                parameter.mul_(scale)
    return model


def save(model: transformers.PreTrainedModel, directory: Path, **options: Any) -> Path:
    """The directory, holding `model` as Hugging Face saves it."""
    model.save_pretrained(directory, **options)
    return directory
