# SPDX-License-Identifier: Apache-2.0
"""Online rotations: Hadamard matrices, and learned matrices in their place."""

import numpy as np

from quarot_onnx.ops.operator import Array, Operator


def hadamard(x: Array, A: Array, B: Array) -> Array:
    """``x @ (I ⊗ A ⊗ B)`` on the last axis; x [..., n], A [a, a], B [b, b], a * b divides n.

    Computed in float32 and returned in x's dtype (QuaRot, section 3; a Kronecker product of
    Hadamard matrices is one).
    """
    a, b = len(A), len(B)
    folded = x.astype(np.float32).reshape(-1, a, b)
    return (
        (A.T.astype(np.float32) @ (folded @ B.astype(np.float32))).reshape(x.shape).astype(x.dtype)
    )


def hadamard_heads(x: Array, A: Array) -> Array:
    """``x @ (A ⊗ I)``: across heads, for a head-major last axis; x [..., n], A [a, a], a divides n.

    Computed in float32 and returned in x's dtype (QuaRot, "Hadamard heads").
    """
    folded = x.astype(np.float32).reshape(-1, len(A), x.shape[-1] // len(A))
    return (A.T.astype(np.float32) @ folded).reshape(x.shape).astype(x.dtype)


# --- Function bodies ------------------------------------------------------------------------------

_HADAMARD = """
    a = Shape <start = 0, end = 1> (A)
    b = Shape <start = 0, end = 1> (B)
    any = Constant <value_ints = [-1]> ()
    folded_shape = Concat <axis = 0> (any, a, b)
    x32 = Cast <to = 1> (x)
    folded = Reshape (x32, folded_shape)
    rotated_b = MatMul (folded, B)
    A_transposed = Transpose <perm = [1, 0]> (A)
    rotated = MatMul (A_transposed, rotated_b)
    shape = Shape (x)
    y32 = Reshape (rotated, shape)
    y = CastLike (y32, x)
"""

_HADAMARD_HEADS = """
    a = Shape <start = 0, end = 1> (A)
    any = Constant <value_ints = [-1]> ()
    shape = Shape (x)
    features = Shape <start = -1> (x)
    rest = Div (features, a)
    folded_shape = Concat <axis = 0> (any, a, rest)
    x32 = Cast <to = 1> (x)
    folded = Reshape (x32, folded_shape)
    A_transposed = Transpose <perm = [1, 0]> (A)
    rotated = MatMul (A_transposed, folded)
    y32 = Reshape (rotated, shape)
    y = CastLike (y32, x)
"""


# --- The operators --------------------------------------------------------------------------------

OPERATORS = (
    Operator("Hadamard", ("x", "A", "B"), ("y",), {"factors": list}, _HADAMARD, hadamard),
    Operator(
        "HadamardHeads", ("x", "A"), ("y",), {"factors": list}, _HADAMARD_HEADS, hadamard_heads
    ),
    Operator("Transform", ("x", "A", "B"), ("y",), {}, _HADAMARD, hadamard),
    Operator("TransformHeads", ("x", "A"), ("y",), {}, _HADAMARD_HEADS, hadamard_heads),
)
