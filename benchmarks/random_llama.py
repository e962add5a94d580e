# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face directory of a Llama shape with random bfloat16 weights, streamed to disk."""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

_BLOCK_ELEMENTS = 1 << 22
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama; the defaults are Llama-3.2-1B's."""

    hidden_size: int = 2048
    intermediate_size: int = 8192
    layers: int = 16
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 64
    vocab_size: int = 128256

    def config(self) -> dict[str, Any]:
        """The content of config.json, with tied embeddings."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "tie_word_embeddings": True,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "rope_scaling": _LLAMA3_ROPE,
            "max_position_embeddings": 131072,
            "attention_bias": False,
            "mlp_bias": False,
            "torch_dtype": "bfloat16",
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape, as torch stores it, in file order."""
        hidden, inner = self.hidden_size, self.intermediate_size
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        tensors: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, hidden)
        }
        for i in range(self.layers):
            layer = f"model.layers.{i}"
            tensors |= {
                f"{layer}.input_layernorm.weight": (hidden,),
                f"{layer}.self_attn.q_proj.weight": (queries, hidden),
                f"{layer}.self_attn.k_proj.weight": (keys, hidden),
                f"{layer}.self_attn.v_proj.weight": (keys, hidden),
                f"{layer}.self_attn.o_proj.weight": (hidden, queries),
                f"{layer}.post_attention_layernorm.weight": (hidden,),
                f"{layer}.mlp.gate_proj.weight": (inner, hidden),
                f"{layer}.mlp.up_proj.weight": (inner, hidden),
                f"{layer}.mlp.down_proj.weight": (hidden, inner),
            }
        return tensors | {"model.norm.weight": (hidden,)}

    @property
    def parameters(self) -> int:
        """How many numbers the checkpoint holds."""
        return sum(math.prod(shape) for shape in self.tensors().values())


def save_random_llama(directory: Path, shape: Shape, seed: int = 0) -> None:
    """Write config.json and model.safetensors to `directory`; one block is in memory at a time."""
    (directory / "config.json").write_text(json.dumps(shape.config(), indent=2), encoding="utf-8")
    header: dict[str, Any] = {}
    end = 0
    for name, dims in shape.tensors().items():
        start, end = end, end + 2 * math.prod(dims)
        header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    random = np.random.Generator(np.random.PCG64(seed))
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for dims in shape.tensors().values():
            left = math.prod(dims)
            center, deviation = (1.0, 0.1) if len(dims) == 1 else (0.0, dims[-1] ** -0.5)
            while left:
                block = random.standard_normal(min(left, _BLOCK_ELEMENTS), dtype=np.float32)
                file.write(
                    (block * np.float32(deviation) + np.float32(center))
                    .astype(ml_dtypes.bfloat16)
                    .tobytes()
                )
                left -= len(block)
