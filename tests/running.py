# SPDX-License-Identifier: Apache-2.0
"""Run models in ONNX Runtime on the CPU, with nothing registered."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

Array = NDArray[Any]

_NUMPY = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(uint8)": np.uint8,
}


def session(model: Path | ir.Model, *, optimized: bool = True) -> onnxruntime.InferenceSession:
    """A session on one thread, whose sums have one order."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # a failure raises, and says so once
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = str(model) if isinstance(model, Path) else ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run(
    model: Path | ir.Model, feeds: Mapping[str, Array], *, optimized: bool = True
) -> dict[str, Array]:
    """The outputs by name."""
    opened = session(model, optimized=optimized)
    names = [output.name for output in opened.get_outputs()]
    return dict(zip(names, opened.run(None, dict(feeds)), strict=True))


class Decoding:
    """A session and its cache: feed tokens in as many pieces as you like."""

    def __init__(self, model: Path, batch: int = 1) -> None:
        self.session = session(model)
        self.mask = np.zeros((batch, 0), dtype=np.int64)
        self.past = {
            value.name: np.zeros(
                [
                    n if isinstance(n, int) else (batch if n == "batch_size" else 0)
                    for n in value.shape
                ],
                dtype=_NUMPY[value.type],
            )
            for value in self.session.get_inputs()
            if value.name.startswith("past_key_values.")
        }

    def __call__(self, input_ids: Array, mask: Array | None = None) -> Array:
        """Logits [batch, length, vocabulary] of the next tokens; mask is 0 for padding."""
        mask = np.ones_like(input_ids) if mask is None else mask
        self.mask = np.concatenate([self.mask, mask], axis=1)
        positions = np.maximum(self.mask.cumsum(axis=1) - 1, 0)[:, -input_ids.shape[1] :]
        feeds = {"input_ids": input_ids, "attention_mask": self.mask, "position_ids": positions}
        names = [output.name for output in self.session.get_outputs()]
        results = dict(zip(names, self.session.run(None, feeds | self.past), strict=True))
        logits: Array = results.pop("logits")
        self.past = {name.replace("present", "past_key_values"): v for name, v in results.items()}
        return logits
