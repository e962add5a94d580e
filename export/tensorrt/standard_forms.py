# SPDX-License-Identifier: Apache-2.0
"""RMSNormalization and RotaryEmbedding for parsers that do not know them (before TensorRT 10.15).

    RMSNormalization:  x / sqrt(mean(x^2) + epsilon) in float32, rounded to x's dtype, times scale
    RotaryEmbedding:   (x1 cos - x2 sin, x1 sin + x2 cos) of the halves x1, x2 of what is rotated

Both are the definitions of opset 23, in operators of opset 20.
"""

from typing import Any

import numpy as np
import onnx

from quarot_onnx.errors import UnsupportedModelError
from quarot_onnx.export.tensorrt.skeleton import Skeleton

_FLOAT = onnx.TensorProto.FLOAT


def replace_rms_normalizations(skeleton: Skeleton) -> None:
    """Write each norm with elementary operators, its arithmetic in float32."""
    for node in skeleton.nodes("RMSNormalization"):
        x, scale = node.inputs
        y = node.outputs[0]
        node.outputs.clear()
        rows = [*x.shape[:-1], 1]

        def tensor(suffix: str, shape: Any, y: Any = y) -> Any:
            return skeleton.derive(y, suffix, shape, _FLOAT)

        x32, square, mean = tensor("/x32", x.shape), tensor("/x2", x.shape), tensor("/mean", rows)
        shifted, root, plain = tensor("/shift", rows), tensor("/root", rows), tensor("/n", x.shape)
        narrow = skeleton.derive(y, "/narrow", x.shape)
        epsilon = float(node.attrs["epsilon"])
        constant = skeleton.constant(f"/epsilon.{epsilon:g}", np.array(epsilon, np.float32))
        axes = skeleton.constant("/last_axis", np.array([-1]))
        name = node.name
        skeleton.add("Cast", f"{name}/Cast", [x], [x32], {"to": _FLOAT})
        skeleton.add("Mul", f"{name}/Square", [x32, x32], [square])
        skeleton.add("ReduceMean", f"{name}/Mean", [square, axes], [mean], {"keepdims": 1})
        skeleton.add("Add", f"{name}/Add", [mean, constant], [shifted])
        skeleton.add("Sqrt", f"{name}/Sqrt", [shifted], [root])
        skeleton.add("Div", f"{name}/Div", [x32, root], [plain])
        skeleton.add("Cast", f"{name}/Cast_1", [plain], [narrow], {"to": skeleton.float_type})
        skeleton.add("Mul", f"{name}/Mul", [narrow, scale], [y])


def replace_rotary_embeddings(skeleton: Skeleton) -> None:
    """Write each rotation with elementary operators.

    Raises:
        UnsupportedModelError: an interleaved rotation, which no supported family has.
    """
    for node in skeleton.nodes("RotaryEmbedding"):
        if node.attrs.get("interleaved", 0):
            raise UnsupportedModelError(
                f"{node.name}: is interleaved; build for TensorRT 10.15 or later"
            )
        x, cos, sin = node.inputs
        y = node.outputs[0]
        node.outputs.clear()
        rotated = int(node.attrs.get("rotary_embedding_dim", 0)) or x.shape[-1]
        rest = x.shape[-1] - rotated
        half = rotated // 2
        leading = list(x.shape[:-1])
        first, second = (skeleton.derive(y, f"/x{i}", [*leading, half]) for i in (1, 2))
        parts = [first, second]
        sizes = [half, half]
        if rest:
            parts.append(skeleton.derive(y, "/rest", [*leading, rest]))
            sizes.append(rest)
        split = skeleton.constant(f"/rope.{half}.{rest}", np.array(sizes))
        name = node.name
        skeleton.add("Split", f"{name}/Split", [x, split], parts, {"axis": -1})
        by_head = [_over_heads(skeleton, table) for table in (cos, sin)]
        products = {}
        for part, i in ((first, 1), (second, 2)):
            for table, letter in zip(by_head, "cs", strict=True):
                products[i, letter] = skeleton.derive(y, f"/x{i}{letter}", [*leading, half])
                skeleton.add("Mul", f"{name}/Mul_{i}{letter}", [part, table], [products[i, letter]])
        left = skeleton.derive(y, "/left", [*leading, half])
        right = skeleton.derive(y, "/right", [*leading, half])
        skeleton.add("Sub", f"{name}/Sub", [products[1, "c"], products[2, "s"]], [left])
        skeleton.add("Add", f"{name}/Add", [products[1, "s"], products[2, "c"]], [right])
        skeleton.add("Concat", f"{name}/Concat", [left, right, *parts[2:]], [y], {"axis": -1})


def _over_heads(skeleton: Skeleton, table: Any) -> Any:
    """A table [B, S, D / 2] with an axis for the heads, made once."""
    name = f"{table.name}/by_head"
    for reader in table.outputs:
        if reader.op == "Unsqueeze" and reader.outputs[0].name == name:
            return reader.outputs[0]
    wide = skeleton.variable(name, skeleton.float_type, None)
    axis = skeleton.constant("/head_axis", np.array([1]))
    skeleton.add("Unsqueeze", f"{name}/Unsqueeze", [table, axis], [wide])
    return wide
