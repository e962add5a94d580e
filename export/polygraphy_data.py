# SPDX-License-Identifier: Apache-2.0
"""Inputs of the model.onnx beside this file, for Polygraphy; needs numpy and onnx, nothing else.

    polygraphy run model.onnx --onnxrt --data-loader-script polygraphy_data.py --validate

Polygraphy's own random numbers are no token ids, no masks and no cache. `load_data` yields a
prefill, a batch with padding on the left, and one token after a past of 24: the same ones at every
call.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes  # comes with onnx
import numpy as np
import onnx
from numpy.typing import NDArray

_HERE = Path(__file__).resolve().parent
_ZERO_POINTS = 16  # of a 4-bit code

_DTYPES: dict[int, Any] = {
    onnx.TensorProto.FLOAT: np.float32,
    onnx.TensorProto.FLOAT16: np.float16,
    onnx.TensorProto.BFLOAT16: ml_dtypes.bfloat16,
    onnx.TensorProto.UINT8: np.uint8,
    onnx.TensorProto.INT64: np.int64,
}


def load_data() -> Iterator[dict[str, NDArray[Any]]]:
    """Every input of the graph by name, for a prefill, a padded batch and a decode step."""
    inputs = onnx.load(_HERE / "model.onnx", load_external_data=False).graph.input
    config = json.loads((_HERE / "config.json").read_text(encoding="utf-8"))
    random = np.random.default_rng(0)
    for batch, past, length, padding in ((1, 0, 16, 0), (2, 0, 16, 5), (2, 24, 1, 0)):
        mask = np.ones((batch, past + length), np.int64)
        mask[-1, :padding] = 0
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, past:]
        feed = {
            "input_ids": random.integers(0, config["vocab_size"], (batch, length)),
            "attention_mask": mask,
            "position_ids": positions,
        }
        for value in inputs:
            if value.name not in feed:
                tensor = value.type.tensor_type
                _, heads, _, size = (dim.dim_value for dim in tensor.shape.dim)
                feed[value.name] = _past(
                    value.name, _DTYPES[tensor.elem_type], (batch, heads, past, size), random
                )
        yield {value.name: feed[value.name] for value in inputs}


def _past(
    name: str, dtype: Any, shape: tuple[int, ...], random: np.random.Generator
) -> NDArray[Any]:
    """A cache that a model could have written: codes, their scales and zero points, or floats."""
    if name.endswith("_scale"):
        return random.uniform(0.01, 0.1, shape).astype(dtype)
    if name.endswith("_zero"):
        return random.integers(0, _ZERO_POINTS, shape).astype(dtype)
    if dtype is np.uint8:
        return random.integers(0, 256, shape).astype(dtype)
    return random.normal(size=shape).astype(dtype)
