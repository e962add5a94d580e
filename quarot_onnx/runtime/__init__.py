# SPDX-License-Identifier: Apache-2.0
"""Running an artifact.

`model` is what a model that runs can do, `session` and `tensorrt` are the two that do it;
`tokenizer`, `generation`, `batching` and `serving` are what is around them. Nothing here imports
torch, and `quarot_onnx.export.triton` packs these modules into a model repository.
"""

from quarot_onnx.runtime.model import (
    RUNTIMES,
    Cache,
    CausalModel,
    Ids,
    Logits,
    checked_mask,
    load_model,
    position_ids,
)
from quarot_onnx.runtime.session import OnnxModel, load_session
from quarot_onnx.runtime.tokenizer import Pieces, Tokenizer, eos_token_ids, load_tokenizer

__all__ = [
    "RUNTIMES",
    "Cache",
    "CausalModel",
    "Ids",
    "Logits",
    "OnnxModel",
    "Pieces",
    "Tokenizer",
    "checked_mask",
    "eos_token_ids",
    "load_model",
    "load_session",
    "load_tokenizer",
    "position_ids",
]
