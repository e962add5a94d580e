# SPDX-License-Identifier: Apache-2.0
"""The KV cache: rounding what is new, appending it, and reading it as floats."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from quarot_onnx.ops import groups
from quarot_onnx.ops.operator import PACKED_BITS, Array, Codes, Float32, Operator

_INPUTS = ("new", "past", "past_scale", "past_zero")
_OUTPUTS = ("present", "present_scale", "present_zero")
_ATTRIBUTES: Mapping[str, type] = {"bits": int, "clip_ratio": float}


def quantize_kv(
    x: Array, *, bits: int = 4, clip_ratio: float = 0.95
) -> tuple[Codes, Float32, Float32]:
    """Codes 0..2**bits-1 [..., d], scale and zero point [..., 1] of x [..., d], asymmetric.

    One group is one head of one token. The range includes 0, so that the zero point is a code:
    ``scale = (max(x, 0) - min(x, 0)) * (clip_ratio / qmax)``, ``zero = round(-min(x, 0) * clip /
    scale)``, ``value = (code - zero) * scale`` (QuaRot, section 4: KV asymmetric, clip 0.95 at 4
    bits).
    """
    x = x.astype(np.float32)
    qmax = np.float32(2**bits - 1)
    low = np.minimum(x.min(axis=-1, keepdims=True), np.float32(0))
    high = np.maximum(x.max(axis=-1, keepdims=True), np.float32(0))
    span = high - low
    scale = np.where(span == 0, np.float32(1), span * (np.float32(clip_ratio) / qmax))
    zero = np.rint(-low * np.float32(clip_ratio) / scale)
    codes = np.clip(np.rint(x / scale) + zero, np.float32(0), qmax)
    return codes.astype(np.uint8), scale, zero


def pack_kv(codes: Codes) -> Codes:
    """Two 4-bit cache codes to a byte, low nibble first: [..., d] -> [..., d / 2]."""
    packed: Codes = codes[..., 0::2] | np.left_shift(codes[..., 1::2], 4, dtype=np.uint8)
    return packed


def unpack_kv(packed: Codes) -> Codes:
    """The inverse of `pack_kv`: [..., d / 2] -> [..., d]."""
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def kv_append(
    new: Array,
    past: Codes,
    past_scale: Float32,
    past_zero: Float32,
    *,
    bits: int = 4,
    clip_ratio: float = 0.95,
) -> tuple[Codes, Float32, Float32]:
    """Quantize new [B, H, S, D] once and append it to the cache along the token axis.

    past [B, H, P, D/2] packed (or [B, H, P, D] above 4 bits), scale and zero [B, H, P, 1].
    """
    codes, scale, zero = quantize_kv(new, bits=bits, clip_ratio=clip_ratio)
    return _append(codes, scale, zero, past, past_scale, past_zero, bits)


def _append(
    codes: Codes,
    scale: Float32,
    zero: Float32,
    past: Codes,
    past_scale: Float32,
    past_zero: Float32,
    bits: int,
) -> tuple[Codes, Float32, Float32]:
    stored = pack_kv(codes) if bits <= PACKED_BITS else codes
    return (
        np.concatenate([past, stored], axis=2),
        np.concatenate([past_scale, scale], axis=2),
        np.concatenate([past_zero, zero], axis=2),
    )


def kv_append_groups(
    new: Array,
    past: Codes,
    past_scale: Float32,
    past_zero: Float32,
    *,
    bits: int,
    clip_ratio: float,
    group_size: int,
    symmetric: int,
) -> tuple[Codes, Float32, Float32]:
    """`kv_append` with `groups.quantize_groups`; scale and zero [B, H, P, D / group_size]."""
    found = groups.quantize_groups(
        new, bits=bits, clip_ratio=clip_ratio, group_size=group_size, symmetric=symmetric
    )
    return _append(*found, past, past_scale, past_zero, bits)


def kv_dequantize(
    codes: Codes, scale: Float32, zero: Float32, *, bits: int = 4, dtype: Any = np.float32
) -> Array:
    """The cached values [B, H, T, D] in dtype; scale and zero [B, H, T, groups]."""
    whole = unpack_kv(codes) if bits <= PACKED_BITS else codes
    return groups.group_values(whole, scale, zero).astype(dtype)


def kv_fake_quantize(x: Array, *, bits: int = 4, clip_ratio: float = 0.95) -> Array:
    """The float values that `quantize_kv`'s codes stand for, in x's dtype; x [..., d]."""
    codes, scale, zero = quantize_kv(x, bits=bits, clip_ratio=clip_ratio)
    return ((codes.astype(np.float32) - zero) * scale).astype(x.dtype)


# --- Function bodies ------------------------------------------------------------------------------

_QUANTIZE_KV = """
    one = Constant <value_float = 1.0> ()
    two = Constant <value_float = 2.0> ()
    zero_float = Constant <value_float = 0.0> ()
    last = Constant <value_ints = [-1]> ()
    bits_int = Constant <value_int: int = @bits> ()
    bits_float = Cast <to = 1> (bits_int)
    levels = Pow (two, bits_float)
    qmax = Sub (levels, one)
    clip = Constant <value_float: float = @clip_ratio> ()
    minus_clip = Neg (clip)
    minus_qmax = Neg (qmax)
    ratio = Div (minus_clip, minus_qmax)
    x32 = Cast <to = 1> (new)
    minimum = ReduceMin <keepdims = 1> (x32, last)
    maximum = ReduceMax <keepdims = 1> (x32, last)
    low_end = Min (minimum, zero_float)
    high_end = Max (maximum, zero_float)
    span = Sub (high_end, low_end)
    is_zero = Equal (span, zero_float)
    clipped_scale = Mul (span, ratio)
    scale = Where (is_zero, one, clipped_scale)
    clipped_depth = Mul (low_end, minus_clip)
    zero_ratio = Div (clipped_depth, scale)
    zero = Round (zero_ratio)
    scaled = Div (x32, scale)
    rounded = Round (scaled)
    shifted = Add (rounded, zero)
    code = Clip (shifted, zero_float, qmax)
"""

# In a Reshape's target shape 0 keeps an axis: a constant instead of nodes that compute a shape,
# each of which costs a decode step as much as arithmetic on a head. The product with a column
# [2, 1] runs as one GEMM of all pairs; with a vector [2] it would be one per token.
_PACK_KV = """
    paired_shape = Constant <value_ints = [0, 0, 0, -1, 2]> ()
    paired = Reshape (code, paired_shape)
    nibble_weights = Constant <value = float[2, 1] {1.0, 16.0}> ()
    bytes_in_column = MatMul (paired, nibble_weights)
    stored_shape = Constant <value_ints = [0, 0, 0, -1]> ()
    bytes = Reshape (bytes_in_column, stored_shape)
    stored = Cast <to = 2> (bytes)
"""

_STORE_KV = """
    stored = Cast <to = 2> (code)
"""

_APPEND = """
    present = Concat <axis = 2> (past, stored)
    present_scale = Concat <axis = 2> (past_scale, scale)
    present_zero = Concat <axis = 2> (past_zero, zero)
"""

_FAKE_QUANTIZE = """
    centred = Sub (code, zero)
    value = Mul (centred, scale)
    y = CastLike (value, new)
"""

# As in attention over a packed cache: the odd channel is the byte's floor(byte / 16), in float32.
_UNPACK = """
    sixteen = Constant <value_float = 16.0> ()
    sixteenth = Constant <value_float = 0.0625> ()
    byte = Cast <to = 1> (codes)
    byte_sixteenth = Mul (byte, sixteenth)
    odd = Floor (byte_sixteenth)
    odd_sixteen = Mul (odd, sixteen)
    even = Sub (byte, odd_sixteen)
    even_column = Unsqueeze (even, last)
    odd_column = Unsqueeze (odd, last)
    pairs = Concat <axis = -1> (even_column, odd_column)
    joined = Constant <value_ints = [0, 0, 0, -1]> ()
    code = Reshape (pairs, joined)
"""


def _dequantize_body(*, packed: bool) -> str:
    """A cache of codes as floats, for an attention that reads floats."""
    return f"""
    last = Constant <value_ints = [-1]> ()
    {_UNPACK if packed else "code = Cast <to = 1> (codes)"}
    scale_shape = Shape (scale)
    grouped_shape = Concat <axis = 0> (scale_shape, last)
    grouped = Reshape (code, grouped_shape)
    scale_column = Unsqueeze (scale, last)
    zero_column = Unsqueeze (zero, last)
    centred = Sub (grouped, zero_column)
    grouped_value = Mul (centred, scale_column)
    shape = Shape (code)
    value = Reshape (grouped_value, shape)
    y = Cast <to: int = @dtype> (value)
    """


# --- The operators --------------------------------------------------------------------------------

OPERATORS = (
    Operator(
        "KvAppend",
        _INPUTS,
        _OUTPUTS,
        _ATTRIBUTES,
        _QUANTIZE_KV + _PACK_KV + _APPEND,
        kv_append,
    ),
    Operator(
        "KvAppendInt8",
        _INPUTS,
        _OUTPUTS,
        _ATTRIBUTES,
        _QUANTIZE_KV + _STORE_KV + _APPEND,
        kv_append,
    ),
    Operator(
        "KvFakeQuantize",
        ("new",),
        ("y",),
        _ATTRIBUTES,
        _QUANTIZE_KV + _FAKE_QUANTIZE,
        kv_fake_quantize,
    ),
    Operator(
        "KvAppendGroups",
        _INPUTS,
        _OUTPUTS,
        groups.ATTRIBUTES,
        groups.QUANTIZE_NEW + _PACK_KV + _APPEND,
        kv_append_groups,
    ),
    Operator(
        "KvAppendGroupsInt8",
        _INPUTS,
        _OUTPUTS,
        groups.ATTRIBUTES,
        groups.QUANTIZE_NEW + _STORE_KV + _APPEND,
        kv_append_groups,
    ),
    Operator(
        "KvFakeQuantizeGroups",
        ("new",),
        ("y",),
        groups.ATTRIBUTES,
        groups.FAKE_QUANTIZE_GROUPS,
        groups.fake_quantize_groups,
    ),
    *(
        Operator(
            f"KvDequantize{suffix}",
            ("codes", "scale", "zero"),
            ("y",),
            {"dtype": int},
            _dequantize_body(packed=not suffix),
            kv_dequantize,
        )
        for suffix in ("", "Int8")
    ),
)
