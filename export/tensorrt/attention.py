# SPDX-License-Identifier: Apache-2.0
"""The cache gets a fixed capacity and is written in place; attention reads it by lengths.

    before:  present = KvAppend(new, past)                   cache of P tokens in, P + S out
             y = KvAttention(q, present..., mask)            y [B, Hq, S, D], then transposed
    after:   present = KvAppend(new, past, lengths)          both of capacity C, the same memory
             y = KvAttention(q, present..., lengths)         y [B, S, Hq * D]

Equal because row b's tokens lie at 0 .. lengths[b] + S - 1 and query s sees those up to
lengths[b] + s. Padding needs no mask any more: a row that ends early has a smaller length, and what
its last step wrote behind it is overwritten. Head dimensions that the kernels lack are padded with
zeros (see `kernel_shapes`). R3 moves into both plugins where it is a Sylvester matrix of head_dim.
"""

from typing import Any

import numpy as np
import onnx

from quarot_onnx.errors import UnsupportedModelError
from quarot_onnx.export.tensorrt.kernel_shapes import CACHE_HEAD_DIMS, cache_head_dim
from quarot_onnx.export.tensorrt.masks import sliding_window, window_mask
from quarot_onnx.export.tensorrt.skeleton import Skeleton

LENGTHS = "lengths"
"""The graph input INT32 [B]: tokens of each row in the cache before the step."""

_INT8, _FLOAT, _INT32 = onnx.TensorProto.INT8, onnx.TensorProto.FLOAT, onnx.TensorProto.INT32


def require_head_dims(skeleton: Skeleton) -> None:
    """Refuse a head dimension that no padding brings to the kernels.

    Raises:
        UnsupportedModelError: names the node and the sizes that there are.
    """
    for node in skeleton.nodes("KvAttention"):
        size = node.inputs[0].shape[-1]
        if cache_head_dim(size) is None:
            raise UnsupportedModelError(
                f"{node.name}: head_dim = {size} is above {CACHE_HEAD_DIMS[-1]}, the largest of "
                "the kernels; run this model with --runtime ort-cpu or ort-cuda"
            )


def fix_cache(skeleton: Skeleton, longest: int) -> None:
    """Lower every `KvAppend` and `KvAttention`.

    Args:
        skeleton: rewritten.
        longest: sequences of the model have at most so many tokens.
    """
    lengths = skeleton.variable(LENGTHS, _INT32, ["batch_size"])
    skeleton.graph.inputs.append(lengths)
    windows: dict[str, int | None] = {}
    for node in skeleton.nodes("KvAttention"):
        mask = node.inputs[7].name
        if mask not in windows:
            windows[mask] = sliding_window(skeleton, mask, longest)
        for position in (1, 4):
            _append(skeleton, node.inputs[position].inputs[0], lengths)
        _attend(skeleton, node, lengths, windows[mask])


def _append(skeleton: Skeleton, node: Any, lengths: Any) -> None:
    """`node`, with inputs (new, past, past_scale, past_zero), gets the plugin's form."""
    new, *past = node.inputs
    size = new.shape[-1]
    stored = cache_head_dim(size)
    assert stored is not None
    new, rotate = _rotated(skeleton, new, size, stored)
    for cache, present in zip(past, node.outputs, strict=True):
        is_code = cache is past[0]
        last = stored // 2 if is_code else 1
        for value in (cache, present):
            value.shape = ["batch_size", value.shape[1], "capacity", last]
            value.dtype = np.dtype(np.int8 if is_code else np.float32)
    outputs = list(node.outputs)
    node.outputs.clear()
    attributes = {name: node.attrs[name] for name in ("bits", "clip_ratio")}
    skeleton.add_plugin(
        "KvAppend", node.name, [new, *past, lengths], outputs, {**attributes, "rotate": rotate}
    )


def _attend(skeleton: Skeleton, node: Any, lengths: Any, window: int | None) -> None:
    query, *cache = node.inputs[:7]
    heads, size = query.shape[1], query.shape[3]
    stored = cache_head_dim(size)
    assert stored is not None
    query, rotate = _rotated(skeleton, query, size, stored)
    inputs = [query, *cache, lengths]
    if window is not None:
        inputs.append(window_mask(skeleton, window, lengths, cache[1].inputs[0].inputs[2]))
    old = node.outputs[0]
    rows: list[int | str] = ["batch_size", "sequence_length"]
    y = skeleton.derive(old, "/tokens", [*rows, heads * stored])
    attributes = {"scale": node.attrs["scale"], "rotate": rotate}
    node.outputs.clear()
    skeleton.add_plugin("KvAttention", node.name, inputs, [y], attributes)
    behind = _token_major(old)
    if stored == size and behind is not None:
        skeleton.replace(behind, y)
        return
    by_head = skeleton.derive(old, "/by_head", [*rows, heads, stored])
    shape = skeleton.constant(f"/by_head.{stored}", np.array([0, 0, heads, stored]))
    skeleton.add("Reshape", f"{node.name}/Reshape", [y, shape], [by_head])
    if stored != size:
        cut = skeleton.derive(old, "/cut", [*rows, heads, size])
        bounds = [
            skeleton.constant(f"/cut.{size}.{what}", np.array([value]))
            for what, value in (("start", 0), ("end", size), ("axis", 3))
        ]
        skeleton.add("Slice", f"{node.name}/Slice", [by_head, *bounds], [cut])
        by_head = cut
    if behind is not None:
        joined = skeleton.derive(old, "/joined", [*rows, heads * size])
        shape = skeleton.constant(f"/joined.{heads * size}", np.array([0, 0, heads * size]))
        skeleton.add("Reshape", f"{node.name}/Reshape_1", [by_head, shape], [joined])
        skeleton.replace(behind, joined)
    else:
        back = skeleton.derive(old, "/back", ["batch_size", heads, "sequence_length", size])
        skeleton.add("Transpose", f"{node.name}/Back", [by_head], [back], {"perm": [0, 2, 1, 3]})
        skeleton.replace(old, back)


def _token_major(y: Any) -> Any | None:
    """What the Transpose and Reshape behind attention give: [B, S, Hq * D]."""
    if len(y.outputs) != 1 or y.outputs[0].op != "Transpose":
        return None
    transpose = y.outputs[0]
    turned = transpose.outputs[0]
    if transpose.attrs["perm"] != [0, 2, 1, 3] or len(turned.outputs) != 1:
        return None
    reshape = turned.outputs[0]
    joined = reshape.outputs[0] if reshape.op == "Reshape" else None
    if joined is None or joined.shape is None or len(joined.shape) != 3:
        return None
    return joined if joined.shape[-1] == y.shape[1] * y.shape[3] else None


def _rotated(skeleton: Skeleton, x: Any, size: int, stored: int) -> tuple[Any, int]:
    """`x` [B, H, S, size] as the plugin takes it, and whether the plugin applies R3."""
    online = x.inputs[0] if x.inputs else None
    if online is not None and online.op == "Hadamard" and len(x.outputs) == 1:
        factors = online.attrs["factors"]
        is_sylvester = all(factor & (factor - 1) == 0 for factor in factors)
        if is_sylvester and size == stored == np.prod(factors):
            return online.inputs[0], 1
    if size == stored:
        return x, 0
    wide = skeleton.derive(x, f"/padded.{stored}", [*x.shape[:-1], stored])
    pads = skeleton.constant(f"/pads.4.{stored - size}", np.array([0] * 7 + [stored - size]))
    skeleton.add("Pad", f"{x.name}/Pad", [x, pads], [wide])
    return wide, 0
