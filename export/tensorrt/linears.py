# SPDX-License-Identifier: Apache-2.0
"""Online Hadamards, quantization and integer GEMMs take the plugins' form.

    before:  QuantizeInt4(Hadamard(x))                       Int4Gemm(q, wq), (q, wk), (q, wv)
    after:   QuantizeInt4(x, factors)                        Split(Int4Gemm(q, [wq wk wv], bias))

Linears that read the same codes become one GEMM, whose columns are theirs side by side; a bias that
is added behind becomes an input. A Hadamard whose sizes the kernels lack stays in the graph as the
two float products of its Kronecker factors, and rows that they lack are padded with zero features.
"""

from functools import partial
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from quarot_onnx import ops
from quarot_onnx.errors import UnsupportedModelError
from quarot_onnx.export.tensorrt.kernel_shapes import (
    OUT_MULTIPLE,
    ROW_MULTIPLE,
    padded,
    takes_hadamard,
)
from quarot_onnx.export.tensorrt.skeleton import Shape, Skeleton
from quarot_onnx.plugins import layouts
from quarot_onnx.plugins.layouts import Layout

_INT8, _FLOAT = onnx.TensorProto.INT8, onnx.TensorProto.FLOAT


def lower_hadamards(skeleton: Skeleton) -> None:
    """Give each Hadamard to the quantizer behind it, to its own plugin, or to float products."""
    for node in skeleton.nodes("Hadamard", "HadamardHeads"):
        x, y = node.inputs[0], node.outputs[0]
        factors = [int(factor) for factor in node.attrs["factors"]]
        across_heads = node.op == "HadamardHeads"
        inner = x.shape[-1] // int(np.prod(factors)) if across_heads else 1
        if not y.outputs:  # attention took it
            continue
        if not takes_hadamard(x.shape[-1], factors, inner):
            _as_products(skeleton, node, inner)
            continue
        inputs = [x, *_signs(skeleton, factors)]
        if len(y.outputs) == 1 and y.outputs[0].op == "QuantizeInt4":
            quantize = y.outputs[0]
            quantize.inputs = inputs
            quantize.attrs |= {"factors": factors, "heads": int(across_heads)}
        else:
            node.outputs.clear()
            skeleton.add_plugin(node.op, node.name, inputs, [y], {"factors": factors})


def _signs(skeleton: Skeleton, factors: list[int]) -> list[Any]:
    """What the kernel has to be told of the matrices; nothing for powers of two."""
    words = layouts.hadamard_signs(tuple(factors))
    name = f"quarot.hadamard.{'x'.join(map(str, factors))}.signs"
    return [skeleton.constant(name, words)] if len(words) else []


def _as_products(skeleton: Skeleton, node: Any, inner: int) -> None:
    """``x (I ⊗ A ⊗ B ⊗ I_inner)`` by standard operators, in float32 as the operator's own body."""
    x, *matrices = node.inputs
    y = node.outputs[0]
    a = matrices[0].shape[0]
    b = inner if node.op == "HadamardHeads" else matrices[1].shape[0]
    node.outputs.clear()
    leading = list(x.shape[:-1])
    blocks = x.shape[-1] // (a * b)
    # Leading axes keep their sizes by the 0 of Reshape, so no shape is computed at run time.
    folded_shape = [0] * len(leading) + [blocks, a, b]
    x32 = skeleton.derive(y, "/x32", x.shape, _FLOAT)
    skeleton.add("Cast", f"{node.name}/Cast", [x], [x32], {"to": _FLOAT})
    folded = skeleton.derive(y, "/folded", [*leading, blocks, a, b], _FLOAT)
    shape = skeleton.constant(f"{node.name}/folded_shape", np.array(folded_shape))
    skeleton.add("Reshape", f"{node.name}/Reshape", [x32, shape], [folded])
    if node.op == "Hadamard":
        turned = skeleton.derive(y, "/by_b", [*leading, blocks, a, b], _FLOAT)
        skeleton.add("MatMul", f"{node.name}/MatMul_B", [folded, matrices[1]], [turned])
        folded = turned
    transposed = skeleton.constant(
        f"{matrices[0].name}.T", skeleton.values(matrices[0]).T.astype(np.float32)
    )
    rotated = skeleton.derive(y, "/by_a", [*leading, blocks, a, b], _FLOAT)
    skeleton.add("MatMul", f"{node.name}/MatMul_A", [transposed, folded], [rotated])
    y32 = skeleton.derive(y, "/y32", x.shape, _FLOAT)
    flat = skeleton.constant(
        f"{node.name}/flat_shape", np.array([0] * len(leading) + [x.shape[-1]])
    )
    skeleton.add("Reshape", f"{node.name}/Reshape_1", [rotated, flat], [y32])
    skeleton.add("Cast", f"{node.name}/Cast_1", [y32], [y], {"to": skeleton.float_type})


def lower_linears(skeleton: Skeleton, activation_layout: Layout) -> None:
    """Lower every `QuantizeInt4` with the GEMMs that read it."""
    for node in skeleton.nodes("QuantizeInt4"):
        _quantize(skeleton, node, activation_layout)


def _quantize(skeleton: Skeleton, node: Any, activation_layout: Layout) -> None:
    x, *signs = node.inputs
    q, scale = node.outputs
    gemms = [reader for reader in q.outputs if reader.op == "Int4Gemm"]
    if len(gemms) != len(q.outputs) or not gemms:
        other = next((reader.op for reader in q.outputs if reader.op != "Int4Gemm"), "nothing")
        raise UnsupportedModelError(
            f"{node.name}: its codes are read by {other}, as those of experts are; TensorRT takes "
            "dense models, run this one with --runtime ort-cpu or ort-cuda"
        )
    size, wide = x.shape[-1], padded(x.shape[-1], ROW_MULTIPLE)
    if wide != size:
        longer = skeleton.derive(x, f"/padded.{wide}", [*x.shape[:-1], wide])
        count = 2 * len(x.shape)
        pads = skeleton.constant(
            f"/pads.{len(x.shape)}.{wide - size}", np.array([0] * (count - 1) + [wide - size])
        )
        skeleton.add("Pad", f"{node.name}/Pad", [x, pads], [longer])
        x = longer
    is_split = activation_layout == Layout.ACTIVATIONS_SPLIT_V1
    shape: Shape = (
        [wide // layouts.STEP_COLUMNS, "padded_tokens", layouts.STEP_COLUMNS]
        if is_split
        else [*x.shape[:-1], wide // 2]
    )
    codes = skeleton.variable(q.name, _INT8, shape)
    attributes = {**node.attrs, "activation_layout": int(activation_layout)}
    node.outputs.clear()
    skeleton.add_plugin("QuantizeInt4", node.name, [x, *signs], [codes, scale], attributes)
    _gemm(skeleton, gemms, codes, scale, wide, activation_layout)


def _gemm(
    skeleton: Skeleton,
    gemms: list[Any],
    codes: Any,
    scale: Any,
    k: int,
    activation_layout: Layout,
) -> None:
    """One GEMM of k padded features for all linears that read `codes`."""
    weights = [gemm.inputs[2] for gemm in gemms]
    scales = [gemm.inputs[3] for gemm in gemms]
    sizes = [int(weight.shape[1]) for weight in weights]
    n = sum(sizes)
    module, linear = _merged_name([gemm.name.rpartition("/")[0] for gemm in gemms])
    if n % OUT_MULTIPLE:
        raise UnsupportedModelError(
            f"{module}/{linear}: {n} output features are not a multiple of {OUT_MULTIPLE}; "
            "run this model with --runtime ort-cpu or ort-cuda"
        )
    parameter = f"{module.strip('/').replace('/', '.')}.{linear}"
    fragments = skeleton.stored(
        f"{parameter}.weight",
        _INT8,
        layouts.fragments_shape(n, k),
        partial(_fragments, skeleton, weights, k),
    )
    w_scale = skeleton.stored(
        f"{parameter}.weight_scale", _FLOAT, [n], partial(_joined, skeleton, scales)
    )
    inputs = [codes, scale, fragments, w_scale]
    results = [gemm.outputs[0] for gemm in gemms]
    biases = [_bias(result) for result in results]
    if any(bias is not None for bias in biases):
        given = [None if bias is None else bias[0] for bias in biases]
        compute = partial(_joined_biases, skeleton, given, sizes)
        inputs.append(skeleton.stored(f"{parameter}.bias", _FLOAT, [n], compute))
        results = [
            result if bias is None else bias[1]
            for result, bias in zip(results, biases, strict=True)
        ]
    for result in results:
        result.inputs.clear()
    attributes = {
        "dtype": gemms[0].attrs["dtype"],
        "weight_layout": int(Layout.WEIGHTS_FRAGMENTS_V1),
        "activation_layout": int(activation_layout),
    }
    for gemm in gemms:
        gemm.outputs.clear()
        gemm.inputs.clear()
    name = f"{module}/{linear}/Int4Gemm"
    if len(results) == 1:
        skeleton.add_plugin("Int4Gemm", name, inputs, results, attributes)
        return
    y = skeleton.variable(f"{name}_y", skeleton.float_type, [*results[0].shape[:-1], n])
    skeleton.add_plugin("Int4Gemm", name, inputs, [y], attributes)
    split = skeleton.constant(f"{module}/{linear}/sizes", np.array(sizes))
    skeleton.add("Split", f"{module}/{linear}/Split", [y, split], results, {"axis": -1})


def _merged_name(modules: list[str]) -> tuple[str, str]:
    """The parent, and one name for its linears: q_proj, k_proj, v_proj -> q_k_v_proj."""
    parents, names = zip(*(module.rsplit("/", 1) for module in modules), strict=True)
    if len(names) == 1:
        return str(parents[0]), str(names[0])
    parts = [name.removesuffix("_proj") for name in names]
    return str(parents[0]), f"{'_'.join(parts)}_proj"


def _bias(y: Any) -> tuple[Any, Any] | None:
    """The constant that the only reader of `y` adds to it, and the sum."""
    if len(y.outputs) != 1 or y.outputs[0].op != "Add":
        return None
    add = y.outputs[0]
    (other,) = [value for value in add.inputs if value is not y] or [None]
    if not isinstance(other, gs.Constant) or list(other.shape) != [y.shape[-1]]:
        return None
    return other, add.outputs[0]


def _fragments(skeleton: Skeleton, weights: list[Any], k: int) -> NDArray[Any]:
    """Codes [k, n] of all linears, padded to `k` rows, in the kernels' order."""
    codes = np.concatenate([skeleton.values(weight).astype(np.int8) for weight in weights], axis=1)
    rows = np.zeros((codes.shape[1], k), np.int8)
    rows[:, : codes.shape[0]] = codes.T
    return layouts.fragments_from_packed(ops.pack_int4(rows)).view(np.int8)


def _joined(skeleton: Skeleton, parts: list[Any]) -> NDArray[Any]:
    return np.concatenate([skeleton.values(part).astype(np.float32) for part in parts])


def _joined_biases(skeleton: Skeleton, parts: list[Any], sizes: list[int]) -> NDArray[Any]:
    return np.concatenate(
        [
            np.zeros(size, np.float32) if part is None else skeleton.values(part).astype(np.float32)
            for part, size in zip(parts, sizes, strict=True)
        ]
    )
