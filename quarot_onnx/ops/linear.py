# SPDX-License-Identifier: Apache-2.0
"""Linears with rounded weights: symmetric activations, integer products, weights alone.

`groups` has the activations with zero points and groups, and their products.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quarot_onnx.ops.cache import pack_kv
from quarot_onnx.ops.operator import ACTIVATION_ZERO_POINT, Array, Codes, Float32, Operator

_GEMM_INPUTS = ("q", "scale", "w", "w_scale")


def quantize_int4(x: Array, *, bits: int = 4, clip_ratio: float = 0.9) -> tuple[Codes, Float32]:
    """Codes (uint8, zero point 128) [..., k] and scale [..., 1] of x [..., k], symmetric per token.

    ``scale = max|x| * (clip_ratio / qmax)``, ``code = clip(round(x / scale), -qmax - 1, qmax)``
    with ``qmax = 2**(bits - 1) - 1`` (QuaRot, section 4: dynamic per-token, clip 0.9 at 4 bits).
    """
    x = x.astype(np.float32)
    qmax = np.float32(2 ** (bits - 1) - 1)
    amax = np.abs(x).max(axis=-1, keepdims=True)
    scale = np.where(amax == 0, np.float32(1), amax * (np.float32(clip_ratio) / qmax))
    codes = np.clip(np.rint(x / scale), -qmax - 1, qmax)
    return (codes + ACTIVATION_ZERO_POINT).astype(np.uint8), scale


def int4_gemm(
    q: Codes, scale: Float32, w: Array, w_scale: Float32, *, dtype: Any = np.float32
) -> Array:
    """``(q - 128) @ w`` summed exactly, times scale times w_scale, rounded once to dtype.

    q [..., k] portable codes, scale [..., 1], w [k, n] signed codes, w_scale [n] -> [..., n].
    """
    accumulator = (q.astype(np.int64) - ACTIVATION_ZERO_POINT) @ w.astype(np.int64)
    return ((accumulator.astype(np.float32) * scale) * w_scale).astype(dtype)


def weight_only_gemm_groups(x: Array, w: Array, w_scale: Float32, w_zero: Array) -> Array:
    """``x @ ((w - w_zero) * w_scale)`` in float32, rounded once to x's dtype.

    x [..., k], w [k, n] signed codes, w_scale and w_zero [groups, n]: k / groups consecutive rows
    of w share a scale and a zero point.
    """
    grouped = w.astype(np.float32).reshape(len(w_scale), -1, w.shape[1])
    values = (grouped - w_zero.astype(np.float32)[:, None]) * w_scale[:, None]
    return (x.astype(np.float32) @ values.reshape(w.shape)).astype(x.dtype)


def pack_int4(codes: Array) -> Codes:
    """Kernel storage of signed 4-bit codes: two to a byte along the last axis, low nibble first."""
    return pack_kv(np.bitwise_and(codes.astype(np.uint8), 15, dtype=np.uint8))


def unpack_int4(packed: Codes) -> NDArray[np.int8]:
    """The inverse of `pack_int4`: uint8 [..., k / 2] -> int8 [..., k] in -8..7.

    For who reads what is stored so: ``sparse.safetensors``, or what a kernel wrote.
    """
    nibbles = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
    return (nibbles.astype(np.int8) ^ 8) - 8


# --- Function bodies ------------------------------------------------------------------------------

# The ratio is a quotient of negative numbers because ONNX Runtime rewrites ``x * (1 / q)`` to
# ``x / q``, which is not the same float where clip_ratio is 1.
_QUANTIZE_INT4 = """
    one = Constant <value_float = 1.0> ()
    two = Constant <value_float = 2.0> ()
    zero = Constant <value_float = 0.0> ()
    offset = Constant <value_float = 128.0> ()
    last = Constant <value_ints = [-1]> ()
    bits_int = Constant <value_int: int = @bits> ()
    bits_float = Cast <to = 1> (bits_int)
    magnitude_bits = Sub (bits_float, one)
    levels = Pow (two, magnitude_bits)
    qmax = Sub (levels, one)
    qmin = Neg (levels)
    clip = Constant <value_float: float = @clip_ratio> ()
    minus_clip = Neg (clip)
    minus_qmax = Neg (qmax)
    ratio = Div (minus_clip, minus_qmax)
    x32 = Cast <to = 1> (x)
    magnitude = Abs (x32)
    amax = ReduceMax <keepdims = 1> (magnitude, last)
    is_zero = Equal (amax, zero)
    clipped_scale = Mul (amax, ratio)
    scale = Where (is_zero, one, clipped_scale)
    scaled = Div (x32, scale)
    rounded = Round (scaled)
    code = Clip (rounded, qmin, qmax)
    shifted = Add (code, offset)
    q = Cast <to = 2> (shifted)
"""

# uint8 by int8 is the fast exact form of ONNX Runtime's CPU kernels. Where the two summands of
# their 16-bit multiply-add could saturate (above 6 bits), the codes go through in two halves:
# Int8Gemm.
_INT4_GEMM = """
    w8 = Cast <to = 3> (w)
    zero_point = Constant <value = uint8 {128}> ()
    accumulator = MatMulInteger (q, w8, zero_point)
    accumulator32 = Cast <to = 1> (accumulator)
    by_token = Mul (accumulator32, scale)
    y32 = Mul (by_token, w_scale)
    y = Cast <to: int = @dtype> (y32)
"""

_INT8_GEMM = """
    w8 = Cast <to = 3> (w)
    low_mask = Constant <value = uint8 {15}> ()
    four = Constant <value = uint8 {4}> ()
    sixteen = Constant <value = int32 {16}> ()
    high_zero_point = Constant <value = uint8 {8}> ()
    low = BitwiseAnd (q, low_mask)
    high = BitShift <direction = "RIGHT"> (q, four)
    low_sum = MatMulInteger (low, w8)
    high_sum = MatMulInteger (high, w8, high_zero_point)
    high_weighted = Mul (high_sum, sixteen)
    accumulator = Add (high_weighted, low_sum)
    accumulator32 = Cast <to = 1> (accumulator)
    by_token = Mul (accumulator32, scale)
    y32 = Mul (by_token, w_scale)
    y = Cast <to: int = @dtype> (y32)
"""

_WEIGHT_ONLY_GEMM = """
    w32 = Cast <to = 1> (w)
    x32 = Cast <to = 1> (x)
    product = MatMul (x32, w32)
    y32 = Mul (product, w_scale)
    y = CastLike (y32, x)
"""

# Weights are constants, so ONNX Runtime computes their values once, when it loads the graph.
_WEIGHT_ONLY_GEMM_GROUPS = """
    any = Constant <value_ints = [-1]> ()
    rows = Constant <value_ints = [1]> ()
    groups = Shape <start = 0, end = 1> (w_scale)
    columns = Shape <start = 1, end = 2> (w)
    grouped_shape = Concat <axis = 0> (groups, any, columns)
    whole_shape = Shape (w)
    w32 = Cast <to = 1> (w)
    zero32 = Cast <to = 1> (w_zero)
    zero_rows = Unsqueeze (zero32, rows)
    scale_rows = Unsqueeze (w_scale, rows)
    grouped = Reshape (w32, grouped_shape)
    centred = Sub (grouped, zero_rows)
    scaled = Mul (centred, scale_rows)
    values = Reshape (scaled, whole_shape)
    x32 = Cast <to = 1> (x)
    y32 = MatMul (x32, values)
    y = CastLike (y32, x)
"""


# --- The operators --------------------------------------------------------------------------------

OPERATORS = (
    Operator(
        "QuantizeInt4",
        ("x",),
        ("q", "scale"),
        {"bits": int, "clip_ratio": float},
        _QUANTIZE_INT4,
        quantize_int4,
    ),
    Operator("Int4Gemm", _GEMM_INPUTS, ("y",), {"dtype": int}, _INT4_GEMM, int4_gemm),
    Operator("Int8Gemm", _GEMM_INPUTS, ("y",), {"dtype": int}, _INT8_GEMM, int4_gemm),
    Operator(
        "WeightOnlyGemm",
        ("x", "w", "w_scale"),
        ("y",),
        {},
        _WEIGHT_ONLY_GEMM,
        lambda x, w, w_scale: ((x @ w.astype(np.float32)) * w_scale).astype(x.dtype),
    ),
    Operator(
        "WeightOnlyGemmGroups",
        ("x", "w", "w_scale", "w_zero"),
        ("y",),
        {},
        _WEIGHT_ONLY_GEMM_GROUPS,
        weight_only_gemm_groups,
    ),
)
