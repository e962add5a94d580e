# SPDX-License-Identifier: Apache-2.0
"""What evaluation, validation, generation and serving need of a model: a cache and a step.

`CausalModel` says it; `session.OnnxModel` implements it on ONNX Runtime, `tensorrt.EngineModel` on
TensorRT, and `load_model` chooses; the PyTorch models of `quarot_onnx.reference` implement it too.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from quarot_onnx.errors import InputError

if TYPE_CHECKING:
    from quarot_onnx.runtime.session import OnnxModel
    from quarot_onnx.runtime.tensorrt import EngineModel

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]
Cache = dict[str, Any]
"""``past_key_values.N.key`` and so on -> an array whose axis 2 counts tokens; opaque to callers."""

Runtime = Literal["ort-cpu", "ort-cuda", "tensorrt"]
RUNTIMES: tuple[Runtime, ...] = ("ort-cpu", "ort-cuda", "tensorrt")
"""Where a model may run."""


class CausalModel(Protocol):
    """A decoder with a cache. `step` leaves the cache that it is given as it is."""

    @property
    def vocabulary_size(self) -> int:
        """How many logits there are for a token."""
        ...

    def new_cache(self, batch: int) -> Cache:
        """An empty cache for `batch` rows."""
        ...

    def step(
        self, input_ids: Ids, cache: Cache, attention_mask: Ids | None = None
    ) -> tuple[Logits, Cache]:
        """Logits of `input_ids`, and the cache with them appended.

        Args:
            input_ids: [B, S], the tokens that follow those in `cache`.
            cache: of this model, holding P tokens per row.
            attention_mask: [B, P + S], 0 for padding on the left; all ones where None.

        Returns:
            Logits [B, S, vocabulary] in float32 and a cache of P + S tokens.
        """
        ...


def position_ids(attention_mask: Ids, length: int) -> Ids:
    """Positions [B, length] of the last `length` tokens: how many real ones precede each."""
    positions = np.maximum(np.cumsum(attention_mask, axis=1) - 1, 0)
    return np.ascontiguousarray(positions[:, -length:], dtype=np.int64)


def checked_mask(input_ids: Ids, past: int, attention_mask: Ids | None, vocabulary: int) -> Ids:
    """The mask [B, past + S] to use; all ones where None.

    Raises:
        InputError: a token id is not in the vocabulary.
        ValueError: the mask has another shape.
    """
    batch, length = input_ids.shape
    if input_ids.size and (input_ids.min() < 0 or input_ids.max() >= vocabulary):
        wrong = input_ids.min() if input_ids.min() < 0 else input_ids.max()
        raise InputError(
            f"input_ids: token {wrong} is not in the vocabulary of {vocabulary}; "
            "the tokenizer belongs to another model"
        )
    if attention_mask is None:
        return np.ones((batch, past + length), np.int64)
    if attention_mask.shape != (batch, past + length):
        raise ValueError(f"attention_mask: {attention_mask.shape}, not {(batch, past + length)}")
    return np.ascontiguousarray(attention_mask, dtype=np.int64)


def load_model(
    directory: Path,
    *,
    runtime: str = "ort-cpu",
    threads: int | None = None,
    trust_engine: bool = False,
) -> "OnnxModel | EngineModel":
    """What runs `directory` in `runtime`: an artifact, or for ``tensorrt`` an engine directory.

    Raises:
        QuarotError: what `OnnxModel` and `EngineModel` raise.
    """
    if runtime == "tensorrt":
        from quarot_onnx.runtime.tensorrt import EngineModel  # noqa: PLC0415

        return EngineModel(directory, trust=trust_engine)
    from quarot_onnx.runtime.session import OnnxModel  # noqa: PLC0415

    return OnnxModel(directory, runtime=runtime, threads=threads)
