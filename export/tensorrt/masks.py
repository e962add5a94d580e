# SPDX-License-Identifier: Apache-2.0
"""Which keys a query may see, beside causality: everything, or a sliding window.

The mask of an artifact is a subgraph over positions that differs between families. What it says is
found by running it (with onnx's reference implementation) and checked on three samples, instead of
by recognizing its nodes. The graph of an engine has a cache of fixed capacity and its own length in
each row, so the mask is built anew from these.
"""

from typing import Any

import numpy as np
import onnx
import onnx.utils
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from quarot_onnx.errors import UnsupportedModelError
from quarot_onnx.export.tensorrt.skeleton import Shape, Skeleton


def sliding_window(skeleton: Skeleton, mask: str, longest: int) -> int | None:
    """How many tokens, itself included, a query sees through `mask`; None where all before it.

    Args:
        skeleton: holds the artifact's graph.
        mask: the name of a tensor BOOL [B, 1, S, T] in it.
        longest: sequences of the model have at most so many tokens.

    Raises:
        UnsupportedModelError: it is neither causal nor a sliding window over causal.
    """
    evaluate = _Mask(skeleton.proto, mask)
    seen = np.flatnonzero(evaluate(1, longest - 1)[0])
    window = longest - int(seen[0]) if len(seen) else 0
    found = None if window == longest else window
    for length, past in ((1, longest - 1), (7, 5), (3, min(longest - 3, (found or 0) + 2))):
        query, key = np.arange(past, past + length)[:, None], np.arange(past + length)[None]
        expected = (key <= query) & (key > query - (found or longest + 1))
        if not np.array_equal(evaluate(length, past), expected):
            raise UnsupportedModelError(
                f"{mask}: is neither causal nor a sliding window; run this model with "
                "--runtime ort-cpu or ort-cuda"
            )
    return found


class _Mask:
    """A mask's subgraph, which needs no weights."""

    def __init__(self, model: onnx.ModelProto, name: str) -> None:
        graph = model.graph
        made = {output: node for node in graph.node for output in node.output}
        wanted, nodes, used = [name], [], set()
        while wanted:
            value = wanted.pop()
            if value in used:
                continue
            used.add(value)
            if value in made and made[value] not in nodes:
                nodes.append(made[value])
                wanted += [i for i in made[value].input if i]
        kept = [node for node in graph.node if node in nodes]
        self._inputs = [value for value in graph.input if value.name in used]
        sub = onnx.helper.make_graph(
            kept,
            "mask",
            self._inputs,
            [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.BOOL, None)],
            [tensor for tensor in graph.initializer if tensor.name in used],
        )
        opsets = [o for o in model.opset_import if o.domain == ""]
        self._run = ReferenceEvaluator(
            onnx.helper.make_model(sub, opset_imports=opsets, ir_version=model.ir_version)
        )

    def __call__(self, length: int, past: int) -> NDArray[np.bool_]:
        """The mask [S, T] of one row without padding."""
        feed: dict[str, NDArray[Any]] = {}
        for value in self._inputs:
            if value.name == "attention_mask":
                feed[value.name] = np.ones((1, past + length), np.int64)
            elif value.name == "position_ids":
                feed[value.name] = np.arange(past, past + length)[None]
            elif value.name == "input_ids":
                feed[value.name] = np.zeros((1, length), np.int64)
            else:  # a cache, of which only the length counts
                feed[value.name] = np.zeros((1, 1, past, 1), np.uint8)
        (mask,) = self._run.run(None, feed)
        wide = np.broadcast_to(mask, (1, 1, length, past + length))
        seen: NDArray[np.bool_] = wide[0, 0].astype(np.bool_)
        return seen


def window_mask(skeleton: Skeleton, window: int, lengths: Any, past: Any) -> Any:
    """BOOL [B, 1, S, C]: whether key m is among the last `window` of query ``lengths[b] + s``.

    Later keys are left to the plugin, which is causal by `lengths`.

    Args:
        skeleton: to which the nodes are added.
        window: tokens that a query sees, itself included.
        lengths: INT32 [B], tokens in the cache before the step.
        past: a FLOAT part of a cache [B, H, C, 1]; the parser takes no Shape of INT8.
    """
    name = f"/sliding_window.{window}"
    known = skeleton.graph.tensors()
    if f"{name}/mask" in known:
        return known[f"{name}/mask"]
    int32, int64 = onnx.TensorProto.INT32, onnx.TensorProto.INT64

    def constant(suffix: str, values: Any, dtype: Any = np.int32) -> Any:
        return skeleton.constant(f"{name}/{suffix}", np.array(values, dtype))

    def count(of: Any, axis: int, suffix: str) -> Any:
        """0, 1, .. up to the size of an axis, INT32 [size]."""
        names = [f"{name}/{suffix}_{part}" for part in ("shape", "size", "size32", "range")]
        shape, size = (
            skeleton.variable(names[0], int64, [1]),
            skeleton.variable(names[1], int64, []),
        )
        size32 = skeleton.variable(names[2], int32, [])
        positions = skeleton.variable(names[3], int32, [f"{suffix}_range"])
        skeleton.add("Shape", names[0], [of], [shape], {"start": axis, "end": axis + 1})
        axes = constant("first_axis", [0], np.int64)
        skeleton.add("Squeeze", names[1], [shape, axes], [size])
        skeleton.add("Cast", names[2], [size], [size32], {"to": int32})
        zero, one = constant("zero", 0), constant("one", 1)
        skeleton.add("Range", names[3], [zero, size32, one], [positions])
        return positions

    input_ids = next(value for value in skeleton.graph.inputs if value.name == "input_ids")
    keys, steps = count(past, 2, "keys"), count(input_ids, 1, "queries")
    column = skeleton.variable(f"{name}/column", int32, ["batch_size", 1, 1, 1])
    skeleton.add(
        "Unsqueeze",
        f"{name}/Unsqueeze",
        [lengths, constant("column_axes", [1, 2, 3], np.int64)],
        [column],
    )
    rows = skeleton.variable(f"{name}/rows", int32, ["sequence_length", 1])
    skeleton.add(
        "Unsqueeze",
        f"{name}/Unsqueeze_1",
        [steps, constant("row_axes", [1], np.int64)],
        [rows],
    )
    shape: Shape = ["batch_size", 1, "sequence_length", 1]
    queries = skeleton.variable(f"{name}/queries", int32, shape)
    skeleton.add("Add", f"{name}/Add", [column, rows], [queries])
    oldest = skeleton.variable(f"{name}/before_first", int32, shape)
    skeleton.add("Sub", f"{name}/Sub", [queries, constant("window", window)], [oldest])
    mask = skeleton.variable(
        f"{name}/mask", onnx.TensorProto.BOOL, ["batch_size", 1, "sequence_length", "capacity"]
    )
    skeleton.add("Greater", f"{name}/Greater", [keys, oldest], [mask])
    return mask
