# SPDX-License-Identifier: Apache-2.0
"""An engine as a model of Triton's own TensorRT backend: ``platform: tensorrt_plan``.

It is the step alone: ids in, logits out, one sequence per slot. The cache is Triton's implicit
state, and its input and output share their memory, which is what the plugins that write it in place
need. Tokens, sampling and the loop are the client's business.
"""

from pathlib import Path
from typing import Any

import onnx

from quarot_onnx.export.triton.model_config import ModelConfig
from quarot_onnx.manifest import MODEL

PLAN = "model.plan"

_PAST, _PRESENT = "past_key_values.", "present."
_TYPES: dict[int, str] = {
    onnx.TensorProto.FLOAT: "TYPE_FP32",
    onnx.TensorProto.FLOAT16: "TYPE_FP16",
    onnx.TensorProto.BFLOAT16: "TYPE_BF16",
    onnx.TensorProto.INT8: "TYPE_INT8",
    onnx.TensorProto.INT32: "TYPE_INT32",
    onnx.TensorProto.INT64: "TYPE_INT64",
}
_IDLE_MICROSECONDS = 60_000_000


def plan_config(name: str, engine: Path, limits: dict[str, int]) -> Any:
    """The configuration of the engine in `engine`, whose inputs and outputs its graph states.

    Args:
        name: of the model.
        engine: what ``quarot-onnx build`` wrote.
        limits: ``max_batch`` and ``capacity``, tokens of the cache.
    """
    graph = onnx.load(str(engine / MODEL), load_external_data=False).graph
    config = ModelConfig(name=name, platform="tensorrt_plan", max_batch_size=1)
    config.instance_group.add(count=limits["max_batch"], kind="KIND_GPU", profile=["0", "1"])
    batching = config.sequence_batching
    batching.max_sequence_idle_microseconds = _IDLE_MICROSECONDS
    batching.direct.SetInParent()
    for value in graph.input:
        data_type, dims = _described(value, limits["capacity"])
        if not value.name.startswith(_PAST):
            tensor = config.input.add(name=value.name, data_type=data_type, dims=dims or [1])
            if not dims:  # one number for a row
                tensor.reshape.SetInParent()
            continue
        state = batching.state.add(
            input_name=value.name,
            output_name=value.name.replace(_PAST, _PRESENT, 1),
            data_type=data_type,
            dims=dims,
            use_same_buffer_for_input_output=True,
        )
        state.initial_state.add(name="empty", data_type=data_type, dims=dims, zero_data=True)
    for value in graph.output:
        if not value.name.startswith(_PRESENT):
            data_type, dims = _described(value, limits["capacity"])
            config.output.add(name=value.name, data_type=data_type, dims=dims)
    return config


def _described(value: onnx.ValueInfoProto, capacity: int) -> tuple[str, list[int]]:
    """Triton's type, and the dimensions behind the batch; -1 where they vary."""
    tensor = value.type.tensor_type
    dims = [d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim][1:]
    if value.name.startswith((_PAST, _PRESENT)):
        dims[1] = capacity
    return _TYPES[tensor.elem_type], dims
