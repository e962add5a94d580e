# SPDX-License-Identifier: Apache-2.0
"""Codes in groups: the references and ONNX bodies of the operators with zero points and groups.

The other modules have the common forms, which the CUDA kernels share: symmetric activations with
one scale per token, and an asymmetric cache with one per token and head. The operators here say
everything else of a row of k features: symmetric or asymmetric, one scale per group of `group_size`
features (the whole row is one group), 3 to 8 bits. They run through their ONNX bodies only.

Codes are ``0 .. 2**bits - 1`` in uint8 with a float32 scale and an integer-valued float32 zero
point per group: ``value = (code - zero) * scale``. A symmetric group has the zero point
``2**(bits - 1)``. A scale that would be 0 is 1.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from quarot_onnx.ops.operator import Array, Codes, Float32, Operator

ATTRIBUTES: Mapping[str, type] = {
    "bits": int,
    "clip_ratio": float,
    "group_size": int,
    "symmetric": int,
}
_GEMM_INPUTS = ("q", "scale", "zero", "w", "w_scale")


# --- References -----------------------------------------------------------------------------------


def quantize_groups(
    x: Array, *, bits: int, clip_ratio: float, group_size: int, symmetric: int
) -> tuple[Codes, Float32, Float32]:
    """Codes [..., k], scale and zero point [..., k / group_size] of x [..., k], per group.

    Symmetric: ``scale = max|x| * (clip_ratio / qmax)`` with ``qmax = 2**(bits - 1) - 1``; else
    ``qmax = 2**bits - 1``, ``scale = (max(x, 0) - min(x, 0)) * (clip_ratio / qmax)`` and
    ``zero = round(-min(x, 0) * clip_ratio / scale)`` (QuaRot, section 4 and its group-wise table).
    """
    x = x.astype(np.float32)
    grouped = x.reshape(*x.shape[:-1], x.shape[-1] // group_size, group_size)
    low = np.minimum(grouped.min(axis=-1, keepdims=True), np.float32(0))
    high = np.maximum(grouped.max(axis=-1, keepdims=True), np.float32(0))
    top = np.float32(2**bits - 1)
    clip = np.float32(clip_ratio)
    span, levels = (np.maximum(-low, high), top // 2) if symmetric else (high - low, top)
    scale = span * (clip / levels)
    scale = np.where(scale == 0, np.float32(1), scale)
    zero = np.full_like(scale, top // 2 + 1) if symmetric else np.rint(-low * clip / scale)
    codes = np.clip(np.rint(grouped / scale) + zero, np.float32(0), top)
    return codes.astype(np.uint8).reshape(x.shape), scale[..., 0], zero[..., 0]


def group_values(codes: Array, scale: Float32, zero: Float32) -> Float32:
    """What codes [..., k] stand for, with scale and zero point [..., k / group_size]."""
    size = codes.shape[-1] // scale.shape[-1]
    grouped = codes.astype(np.float32).reshape(*scale.shape, size)
    values: Float32 = ((grouped - zero[..., None]) * scale[..., None]).reshape(codes.shape)
    return values


def gemm_asymmetric(
    q: Codes, scale: Float32, zero: Float32, w: Array, w_scale: Float32, *, dtype: Any = np.float32
) -> Array:
    """``(q - zero) @ w`` summed exactly, times scale times w_scale, rounded once to dtype.

    q [..., k], scale and zero [..., 1], w [k, n] signed codes, w_scale [n] -> [..., n].
    """
    accumulator = (q.astype(np.int64) - zero.astype(np.int64)) @ w.astype(np.int64)
    return ((accumulator.astype(np.float32) * scale) * w_scale).astype(dtype)


def gemm_groups(
    q: Codes,
    scale: Float32,
    zero: Float32,
    w: Array,
    w_scale: Float32,
    w_zero: Array | None = None,
    *,
    group_size: int,
    dtype: Any = np.float32,
) -> Array:
    """``(q - zero) @ (w - w_zero)`` of each group of features, scaled, added from the first group.

    A group's sum is exact, its product with the two scales is float32, and the total is rounded
    once to dtype. The scales of either side may be those of coarser groups.

    Args:
        q: codes [..., k].
        scale: [..., groups of q], a number that divides k / group_size.
        zero: like scale.
        w: signed codes [k, n].
        w_scale: [n] or [groups of w, n], a number that divides k / group_size.
        w_zero: zero points [groups of w, n]; None where they are 0.
        group_size: features that are summed before they are scaled.
        dtype: of the result.

    Returns:
        [..., n].
    """
    *leading, features = q.shape
    groups, columns = features // group_size, w.shape[1]
    rows = q.astype(np.int64).reshape(-1, groups, group_size).swapaxes(0, 1)
    of_token = [  # [groups, rows, 1]
        np.repeat(part.reshape(-1, part.shape[-1]).T[..., None], groups // part.shape[-1], axis=0)
        for part in (scale, zero)
    ]
    of_column = w_scale.reshape(-1, 1, columns)  # [groups, 1, n]
    of_column = np.repeat(of_column, groups // len(of_column), axis=0)
    weights = w.astype(np.int64).reshape(groups, group_size, columns)
    if w_zero is not None:
        by_group = w_zero.astype(np.int64)[:, None]
        weights = weights - np.repeat(by_group, groups // len(by_group), axis=0)
    accumulator = (rows - of_token[1].astype(np.int64)) @ weights
    scaled = (accumulator.astype(np.float32) * of_token[0]) * of_column
    total: Array = scaled[0]
    for part in scaled[1:]:
        total = total + part
    return total.reshape(*leading, columns).astype(dtype)


def fake_quantize_groups(
    x: Array, *, bits: int, clip_ratio: float, group_size: int, symmetric: int
) -> Array:
    """The float values that `quantize_groups`'s codes stand for, in x's dtype; x [..., k]."""
    found = quantize_groups(
        x, bits=bits, clip_ratio=clip_ratio, group_size=group_size, symmetric=symmetric
    )
    return group_values(*found).astype(x.dtype)


# --- Function bodies ------------------------------------------------------------------------------
# The ratio is a quotient of negative numbers because ONNX Runtime rewrites ``x * (1 / q)`` to
# ``x / q``.

QUANTIZE = """
    one = Constant <value_float = 1.0> ()
    two = Constant <value_float = 2.0> ()
    zero_float = Constant <value_float = 0.0> ()
    last = Constant <value_ints = [-1]> ()
    symmetric_int = Constant <value_int: int = @symmetric> ()
    is_symmetric = Cast <to = 9> (symmetric_int)
    bits_int = Constant <value_int: int = @bits> ()
    bits_float = Cast <to = 1> (bits_int)
    levels = Pow (two, bits_float)
    top = Sub (levels, one)
    half = Div (levels, two)
    symmetric_top = Sub (half, one)
    qmax = Where (is_symmetric, symmetric_top, top)
    clip = Constant <value_float: float = @clip_ratio> ()
    minus_clip = Neg (clip)
    minus_qmax = Neg (qmax)
    ratio = Div (minus_clip, minus_qmax)
    group_size_int = Constant <value_int: int = @group_size> ()
    group_size = Reshape (group_size_int, last)
    rows = Shape <end = -1> (INPUT)
    features = Shape <start = -1> (INPUT)
    groups = Div (features, group_size)
    grouped_shape = Concat <axis = 0> (rows, groups, group_size)
    x32 = Cast <to = 1> (INPUT)
    grouped = Reshape (x32, grouped_shape)
    minimum = ReduceMin <keepdims = 1> (grouped, last)
    maximum = ReduceMax <keepdims = 1> (grouped, last)
    low_end = Min (minimum, zero_float)
    high_end = Max (maximum, zero_float)
    depth = Neg (low_end)
    amax = Max (depth, high_end)
    both_sides = Sub (high_end, low_end)
    span = Where (is_symmetric, amax, both_sides)
    clipped_scale = Mul (span, ratio)
    is_zero = Equal (clipped_scale, zero_float)
    group_scale = Where (is_zero, one, clipped_scale)
    clipped_depth = Mul (low_end, minus_clip)
    zero_ratio = Div (clipped_depth, group_scale)
    nearest_zero = Round (zero_ratio)
    group_zero = Where (is_symmetric, half, nearest_zero)
    scaled = Div (grouped, group_scale)
    rounded = Round (scaled)
    shifted = Add (rounded, group_zero)
    clipped = Clip (shifted, zero_float, top)
    shape = Shape (INPUT)
    code = Reshape (clipped, shape)
    scale = Squeeze (group_scale, last)
    zero = Squeeze (group_zero, last)
"""

QUANTIZE_GROUPS = QUANTIZE.replace("INPUT", "x") + "q = Cast <to = 2> (code)"

QUANTIZE_NEW = QUANTIZE.replace("INPUT", "new")

FAKE_QUANTIZE_GROUPS = (
    QUANTIZE_NEW
    + """
    centred = Sub (clipped, group_zero)
    grouped_value = Mul (centred, group_scale)
    value = Reshape (grouped_value, shape)
    y = CastLike (value, new)
"""
)

# Above 6 bits the codes go through in halves, as in ``Int8Gemm``; the zero point acts on the sums.
_WHOLE_PRODUCT = "product = MatMulInteger (CODES, WEIGHTS)"
_HALVED_PRODUCT = """
    low_mask = Constant <value = uint8 {15}> ()
    four = Constant <value = uint8 {4}> ()
    sixteen = Constant <value = int32 {16}> ()
    low = BitwiseAnd (CODES, low_mask)
    high = BitShift <direction = "RIGHT"> (CODES, four)
    low_sum = MatMulInteger (low, WEIGHTS)
    high_sum = MatMulInteger (high, WEIGHTS)
    high_weighted = Mul (high_sum, sixteen)
    product = Add (high_weighted, low_sum)
"""


def _product(codes: str, weights: str, *, halved: bool) -> str:
    text = _HALVED_PRODUCT if halved else _WHOLE_PRODUCT
    return text.replace("CODES", codes).replace("WEIGHTS", weights)


def gemm_asymmetric_body(*, halved: bool) -> str:
    """One scale and zero point per token: ``(q @ w - zero * sum(w)) * scale * w_scale``."""
    return f"""
    w8 = Cast <to = 3> (w)
    {_product("q", "w8", halved=halved)}
    w32 = Cast <to = 6> (w8)
    first = Constant <value_ints = [0]> ()
    column_sums = ReduceSum <keepdims = 1> (w32, first)
    zero_int = Cast <to = 6> (zero)
    zero_share = Mul (zero_int, column_sums)
    accumulator = Sub (product, zero_share)
    accumulator32 = Cast <to = 1> (accumulator)
    by_token = Mul (accumulator32, scale)
    y32 = Mul (by_token, w_scale)
    y = Cast <to: int = @dtype> (y32)
    """


# A zero point of the weight is taken off its codes, which are constants, where the difference is an
# int8 (up to 7 bits, hence in every whole product).
_CENTRED_WEIGHT = """
    w_int = Cast <to = 6> (w)
    w_zero_int = Cast <to = 6> (w_zero)
    w_zero_rows = Unsqueeze (w_zero_int, one)
    zero_groups = Shape <end = 1> (w_zero)
    by_zero_shape = Concat <axis = 0> (zero_groups, last, columns)
    by_zero = Reshape (w_int, by_zero_shape)
    w_centred = Sub (by_zero, w_zero_rows)
    w8 = Cast <to = 3> (w_centred)
"""

# Elsewhere it acts on the sums: ``sum (q - z) (w - wz) = sum (q - z) w - wz sum (q - z)``.
_CENTRED_SUMS = """
    two = Constant <value_ints = [2]> ()
    q32 = Cast <to = 6> (q_groups)
    code_sums = ReduceSum <keepdims = 1> (q32, two)
    token_sums_shape = Concat <axis = 0> (token_parts, rows, one)
    code_sums_by_token = Reshape <allowzero = 1> (code_sums, token_sums_shape)
    group_size32 = Cast <to = 6> (group_size)
    zero_sums = Mul (zero_groups_of_token, group_size32)
    row_sums = Sub (code_sums_by_token, zero_sums)
    channel_sums_shape = Concat <axis = 0> (channel_parts, rows, one)
    row_sums_by_channel = Reshape <allowzero = 1> (row_sums, channel_sums_shape)
    w_zero_int = Cast <to = 6> (w_zero)
    w_zero_groups = Reshape (w_zero_int, channel_shape)
    w_zero_share = Mul (row_sums_by_channel, w_zero_groups)
    w_zero_share_by_token = Reshape <allowzero = 1> (w_zero_share, by_token_shape)
    accumulator = Sub (sums, w_zero_share_by_token)
"""


def gemm_groups_body(*, halved: bool, has_weight_zeros: bool = False) -> str:
    """One product per group: [groups, rows, group_size] by [groups, group_size, n].

    Scales of coarser groups meet the products of their parts in a fourth axis: [groups of a scale,
    parts of a group, rows, n]. There may be no rows (an expert's), hence ``allowzero``.
    """
    is_in_codes, is_in_sums = has_weight_zeros and not halved, has_weight_zeros and halved
    return f"""
    last = Constant <value_ints = [-1]> ()
    first = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    group_size_int = Constant <value_int: int = @group_size> ()
    group_size = Reshape (group_size_int, last)
    columns = Shape <start = -1> (w_scale)
    {_CENTRED_WEIGHT if is_in_codes else "w8 = Cast <to = 3> (w)"}
    w_shape = Concat <axis = 0> (last, group_size, columns)
    w_groups = Reshape (w8, w_shape)
    groups = Shape <end = 1> (w_groups)
    q_shape = Concat <axis = 0> (last, groups, group_size)
    q_rows = Reshape (q, q_shape)
    q_groups = Transpose <perm = [1, 0, 2]> (q_rows)
    {_product("q_groups", "w_groups", halved=halved)}
    rows = Shape <start = 1, end = 2> (product)
    scales_of_token = Shape <start = -1> (scale)
    parts_of_token = Div (groups, scales_of_token)
    token_parts = Concat <axis = 0> (scales_of_token, parts_of_token)
    channel_shape = Concat <axis = 0> (last, one, one, columns)
    w_scale_groups = Reshape (w_scale, channel_shape)
    scales_of_channel = Shape <end = 1> (w_scale_groups)
    parts_of_channel = Div (groups, scales_of_channel)
    channel_parts = Concat <axis = 0> (scales_of_channel, parts_of_channel)
    w32 = Cast <to = 6> (w_groups)
    group_sums = ReduceSum <keepdims = 1> (w32, one)
    group_sums_shape = Concat <axis = 0> (token_parts, one, columns)
    group_sums_by_token = Reshape (group_sums, group_sums_shape)
    token_shape = Concat <axis = 0> (last, scales_of_token, one, one)
    zero_int = Cast <to = 6> (zero)
    zero_rows = Reshape (zero_int, token_shape)
    zero_groups_of_token = Transpose <perm = [1, 2, 0, 3]> (zero_rows)
    zero_share = Mul (zero_groups_of_token, group_sums_by_token)
    by_token_shape = Concat <axis = 0> (token_parts, rows, columns)
    product_by_token = Reshape <allowzero = 1> (product, by_token_shape)
    {"sums" if is_in_sums else "accumulator"} = Sub (product_by_token, zero_share)
    {_CENTRED_SUMS if is_in_sums else ""}
    accumulator32 = Cast <to = 1> (accumulator)
    scale_rows = Reshape (scale, token_shape)
    scale_groups = Transpose <perm = [1, 2, 0, 3]> (scale_rows)
    by_token = Mul (accumulator32, scale_groups)
    by_channel_shape = Concat <axis = 0> (channel_parts, rows, columns)
    by_token_of_channel = Reshape <allowzero = 1> (by_token, by_channel_shape)
    by_channel = Mul (by_token_of_channel, w_scale_groups)
    by_group_shape = Concat <axis = 0> (groups, rows, columns)
    by_group = Reshape <allowzero = 1> (by_channel, by_group_shape)
    total = ReduceSum <keepdims = 0> (by_group, first)
    leading = Shape <end = -1> (q)
    y_shape = Concat <axis = 0> (leading, columns)
    y32 = Reshape <allowzero = 1> (total, y_shape)
    y = Cast <to: int = @dtype> (y32)
    """


# --- The operators --------------------------------------------------------------------------------

OPERATORS = (
    Operator(
        "QuantizeGroups",
        ("x",),
        ("q", "scale", "zero"),
        ATTRIBUTES,
        QUANTIZE_GROUPS,
        quantize_groups,
    ),
    *(
        Operator(
            f"{name}Asymmetric",
            _GEMM_INPUTS,
            ("y",),
            {"dtype": int},
            gemm_asymmetric_body(halved=name == "Int8Gemm"),
            gemm_asymmetric,
        )
        for name in ("Int4Gemm", "Int8Gemm")
    ),
    *(
        Operator(
            f"{name}Groups",
            _GEMM_INPUTS,
            ("y",),
            {"group_size": int, "dtype": int},
            gemm_groups_body(halved=name == "Int8Gemm"),
            gemm_groups,
        )
        for name in ("Int4Gemm", "Int8Gemm")
    ),
    *(
        Operator(
            f"{name}WeightZeros",
            (*_GEMM_INPUTS, "w_zero"),
            ("y",),
            {"group_size": int, "dtype": int},
            gemm_groups_body(halved=name == "Int8Gemm", has_weight_zeros=True),
            gemm_groups,
        )
        for name in ("Int4Gemm", "Int8Gemm")
    ),
)
