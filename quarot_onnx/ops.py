# SPDX-License-Identifier: Apache-2.0
"""The ``quarot`` operators: one definition each.

An operator is a NumPy reference (the truth), an ONNX function body (so that ONNX Runtime,
Polygraphy and Netron need nothing registered) and the list of its attributes. The TensorRT plugins
and the CUDA kernels have the same names and attributes and are compared with the reference.

Conventions, stated once:

* ``x`` is a row vector: a rotation by ``H`` is ``x @ H``. Tokens are all leading axes, features the
  last.
* Codes of ``bits`` bits are ``-2**(bits-1) .. 2**(bits-1)-1``; rounding is half to even; every
  scale is
  float32 and is 1 where the data is all zero.
* Portable storage, used in ``model.onnx``: activation codes are uint8 with zero point 128, one per
  byte;
  weight codes are INT4 (INT8 above 4 bits) initializers ``[in_features, out_features]``.
* The cache of up to 4 bits holds two codes 0..15 in one uint8, low nibble first, so its last axis
  is head_dim / 2: a 3-bit code takes 4 bits.
* Kernel storage of activations and weights is two's-complement nibbles, low nibble first:
  `pack_int4`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quarot_onnx import groups

DOMAIN = "quarot"
VERSION = 1
OPSET = 23

Array = NDArray[Any]
Float32 = NDArray[np.float32]
Codes = NDArray[np.uint8]

ACTIVATION_ZERO_POINT = 128
"""What portable storage adds to a signed activation code to make it a uint8."""

PACKED_BITS = 4
"""Cache codes of up to so many bits are stored two to a byte."""

_MASKED = -3.0e38  # finite, so that a row with nothing to attend to is uniform and not NaN


# --- References -----------------------------------------------------------------------------------


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


def kv_attention(
    q: Array,
    key: Codes,
    key_scale: Float32,
    key_zero: Float32,
    value: Codes,
    value_scale: Float32,
    value_zero: Float32,
    mask: NDArray[np.bool_],
    sinks: Array | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
    bits: int = 4,
) -> Array:
    """Softmax attention of q [B, Hq, S, D] over the quantized cache, in float32, in q's dtype.

    Query head h reads cache head ``h // (Hq / H)``; mask [B, 1, S, T] is true where a query may
    look. A softcap c other than 0 bounds the scores s, before the mask, to ``c tanh(s / c)``.
    A head with a sink (sinks [Hq]) has one score more in its softmax, whose value is zero.
    """
    if bits <= PACKED_BITS:
        key, value = unpack_kv(key), unpack_kv(value)
    k = (key.astype(np.float32) - key_zero) * key_scale
    v = (value.astype(np.float32) - value_zero) * value_scale
    return _attend(q, k, v, mask, sinks, scale, softcap)


def attention_sinks(
    q: Array, key: Array, value: Array, mask: NDArray[np.bool_], sinks: Array, *, scale: float
) -> Array:
    """`kv_attention` with sinks over a float cache: key and value [B, H, T, D]."""
    return _attend(q, key.astype(np.float32), value.astype(np.float32), mask, sinks, scale, 0.0)


def _attend(
    q: Array,
    k: Array,
    v: Array,
    mask: NDArray[np.bool_],
    sinks: Array | None,
    scale: float,
    softcap: float,
) -> Array:
    batch, _, length, size = q.shape
    grouped = q.astype(np.float32).reshape(batch, k.shape[1], -1, length, size)
    scores = np.float32(scale) * grouped @ k[:, :, None].swapaxes(-1, -2)
    if softcap:
        scores = np.float32(softcap) * np.tanh(scores / np.float32(softcap))
    scores = np.where(mask[:, :, None], scores, np.float32(_MASKED))
    largest, rest = scores.max(axis=-1, keepdims=True), np.float32(0)
    if sinks is not None:
        column = sinks.astype(np.float32).reshape(1, k.shape[1], -1, 1, 1)
        largest = np.maximum(largest, column)
        rest = np.exp(column - largest)
    weights = np.exp(scores - largest)
    weights /= weights.sum(axis=-1, keepdims=True) + rest
    output: Array = (weights @ v[:, :, None]).reshape(q.shape).astype(q.dtype)
    return output


# --- Conversion between the two storage forms -----------------------------------------------------


def pack_int4(codes: Array) -> Codes:
    """Kernel storage of signed 4-bit codes: two to a byte along the last axis, low nibble first."""
    return pack_kv(np.bitwise_and(codes.astype(np.uint8), 15, dtype=np.uint8))


def unpack_int4(packed: Codes) -> NDArray[np.int8]:
    """The inverse of `pack_int4`: uint8 [..., k / 2] -> int8 [..., k] in -8..7."""
    nibbles = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
    return (nibbles.astype(np.int8) ^ 8) - 8


# --- Function bodies ------------------------------------------------------------------------------
# The text is ONNX's own syntax. `@name` is an attribute of the calling node; ONNX Runtime inlines
# the body and folds everything that depends on attributes and initializers only.

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

# A packed byte holds an even channel (low nibble) and the odd one after it: even + 16 * odd. Only
# the odd channels are unpacked, because with byte = even + 16 * odd
# ``q_even · even + q_odd · odd = q_even · byte + (q_odd - 16 q_even) · odd``, and for the values
# ``w · even = w · byte - 16 w · odd``. All in float32, exactly for the codes: ONNX Runtime has
# vector code there, and none for the bits of uint8.
_UNPACK = """
    {0}_byte = Cast <to = 1> ({0})
    {0}_sixteenth = Mul ({0}_byte, sixteenth)
    {0}_odd = Floor ({0}_sixteenth)
"""

_PACKED_DOTS = f"""
    sixteen = Constant <value_float = 16.0> ()
    sixteenth = Constant <value_float = 0.0625> ()
    pairs = Constant <value_ints = [0, 0, 0, -1, 2]> ()
    first = Constant <value_int = 0> ()
    second = Constant <value_int = 1> ()
    query_pairs = Reshape (grouped, pairs)
    query_even = Gather <axis = -1> (query_pairs, first)
    query_odd = Gather <axis = -1> (query_pairs, second)
    query_even_sixteen = Mul (query_even, sixteen)
    query_remainder = Sub (query_odd, query_even_sixteen)
    {_UNPACK.format("key")}
    key_byte_columns = Transpose <perm = [0, 1, 3, 2]> (key_byte)
    key_odd_columns = Transpose <perm = [0, 1, 3, 2]> (key_odd)
    byte_dots = MatMul (query_even, key_byte_columns)
    odd_dots = MatMul (query_remainder, key_odd_columns)
    dots = Add (byte_dots, odd_dots)
"""

_PACKED_OUTPUT = f"""
    {_UNPACK.format("value")}
    byte_output = MatMul (scaled_weights, value_byte)
    odd_output = MatMul (scaled_weights, value_odd)
    odd_output_sixteen = Mul (odd_output, sixteen)
    even_output = Sub (byte_output, odd_output_sixteen)
    even_column = Unsqueeze (even_output, last)
    odd_column = Unsqueeze (odd_output, last)
    output_pairs = Concat <axis = -1> (even_column, odd_column)
    joined = Constant <value_ints = [0, 0, 0, -1]> ()
    coded_output = Reshape (output_pairs, joined)
"""

_DOTS = """
    key32 = Cast <to = 1> (key)
    key_columns = Transpose <perm = [0, 1, 3, 2]> (key32)
    dots = MatMul (grouped, key_columns)
"""

_OUTPUT = """
    value32 = Cast <to = 1> (value)
    coded_output = MatMul (scaled_weights, value32)
"""


_SOFTCAP = """
    softcap = Constant <value_float: float = @softcap> ()
    capped_ratio = Div (plain_scores, softcap)
    bounded = Tanh (capped_ratio)
    scores = Mul (bounded, softcap)
"""


_SOFTMAX = """
    weights_by_query = Softmax <axis = -1> (masked)
"""

_SOFTMAX_WITH_SINKS = """
    sink_shape = Constant <value_ints = [-1, 1, 1]> ()
    sinks32 = Cast <to = 1> (sinks)
    sink_column = Reshape (sinks32, sink_shape)
    row_maximum = ReduceMax <keepdims = 1> (masked, last)
    maximum = Max (row_maximum, sink_column)
    shifted = Sub (masked, maximum)
    powers = Exp (shifted)
    row_sum = ReduceSum <keepdims = 1> (powers, last)
    sink_shifted = Sub (sink_column, maximum)
    sink_power = Exp (sink_shifted)
    total = Add (row_sum, sink_power)
    weights_by_query = Div (powers, total)
"""

_GROUPED_QUERIES = f"""
    last = Constant <value_ints = [-1]> ()
    softmax_scale = Constant <value_float: float = @scale> ()
    masked_score = Constant <value_float = {_MASKED}> ()
    q32 = Cast <to = 1> (q)
    scaled_query = Mul (q32, softmax_scale)
    heads = Shape <start = 1, end = 2> (key)
    same_batch = Constant <value_ints = [0]> ()
    any_rows_same_columns = Constant <value_ints = [-1, 0]> ()
    grouped_shape = Concat <axis = 0> (same_batch, heads, any_rows_same_columns)
    grouped = Reshape (scaled_query, grouped_shape)
"""

_MASKED_SCORES = """
    query_rows = Shape <end = 3> (q)
    score_shape = Concat <axis = 0> (query_rows, last)
    scores_by_query = Reshape (scores, score_shape)
    masked = Where (mask, scores_by_query, masked_score)
"""

_ATTENTION_SINKS = f"""
    {_GROUPED_QUERIES}
    {_DOTS.replace("dots =", "scores =")}
    {_MASKED_SCORES}
    {_SOFTMAX_WITH_SINKS}
    scaled_weights = Reshape (weights_by_query, grouped_shape)
    {_OUTPUT}
    shape = Shape (q)
    y32 = Reshape (coded_output, shape)
    y = CastLike (y32, q)
"""


def _attention_body(
    dots: str, output: str, *, has_softcap: bool = False, softmax: str = _SOFTMAX
) -> str:
    """Attention over codes: zero points and scales act on the small score matrix, not on the cache.

    ``q · ((code - zero) * scale) = (q · code - zero * sum(q)) * scale``, and likewise for V. The
    queries that read one cache head are the rows of one product: [B, H, G * S, D] with G = Hq / H.
    """
    return f"""
    {_GROUPED_QUERIES}
    {dots}
    row = Constant <value_ints = [0, 0, 1, -1]> ()
    query_sum = ReduceSum <keepdims = 1> (grouped, last)
    key_zero_row = Reshape (key_zero, row)
    key_scale_row = Reshape (key_scale, row)
    zero_share = Mul (query_sum, key_zero_row)
    centred = Sub (dots, zero_share)
    {"plain_scores" if has_softcap else "scores"} = Mul (centred, key_scale_row)
    {_SOFTCAP if has_softcap else ""}
    {_MASKED_SCORES}
    {softmax}
    weights = Reshape (weights_by_query, grouped_shape)
    value_scale_row = Reshape (value_scale, row)
    scaled_weights = Mul (weights, value_scale_row)
    {output}
    output_shift = MatMul (scaled_weights, value_zero)
    centred_output = Sub (coded_output, output_shift)
    shape = Shape (q)
    y32 = Reshape (centred_output, shape)
    y = CastLike (y32, q)
    """


# --- The operators --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operator:
    """One operator: its interface, its ONNX function body and its NumPy reference.

    Attributes:
        name: op_type in the domain ``quarot``; the TensorRT plugin has the same name.
        inputs: names in order; all are required.
        outputs: names in order.
        attributes: name -> type, each required on every node.
        body: the statements of the ONNX function.
        reference: the NumPy function that defines the meaning.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, type]
    body: str
    reference: Callable[..., Any]


_CACHE_INPUTS = ("new", "past", "past_scale", "past_zero")
_CACHE_OUTPUTS = ("present", "present_scale", "present_zero")
_KV_ATTRIBUTES: Mapping[str, type] = {"bits": int, "clip_ratio": float}
_GROUP_ATTRIBUTES: Mapping[str, type] = {**_KV_ATTRIBUTES, "group_size": int, "symmetric": int}
_ATTENTION_INPUTS = (
    "q",
    "key",
    "key_scale",
    "key_zero",
    "value",
    "value_scale",
    "value_zero",
    "mask",
)
_GEMM_INPUTS = ("q", "scale", "w", "w_scale")
_ZERO_GEMM_INPUTS = ("q", "scale", "zero", "w", "w_scale")

OPERATORS: Mapping[str, Operator] = {
    operator.name: operator
    for operator in (
        Operator("Hadamard", ("x", "A", "B"), ("y",), {"factors": list}, _HADAMARD, hadamard),
        Operator(
            "HadamardHeads", ("x", "A"), ("y",), {"factors": list}, _HADAMARD_HEADS, hadamard_heads
        ),
        Operator("Transform", ("x", "A", "B"), ("y",), {}, _HADAMARD, hadamard),
        Operator("TransformHeads", ("x", "A"), ("y",), {}, _HADAMARD_HEADS, hadamard_heads),
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
        Operator(
            "KvAppend",
            _CACHE_INPUTS,
            _CACHE_OUTPUTS,
            _KV_ATTRIBUTES,
            _QUANTIZE_KV + _PACK_KV + _APPEND,
            kv_append,
        ),
        Operator(
            "KvAppendInt8",
            _CACHE_INPUTS,
            _CACHE_OUTPUTS,
            _KV_ATTRIBUTES,
            _QUANTIZE_KV + _STORE_KV + _APPEND,
            kv_append,
        ),
        Operator(
            "KvFakeQuantize",
            ("new",),
            ("y",),
            _KV_ATTRIBUTES,
            _QUANTIZE_KV + _FAKE_QUANTIZE,
            kv_fake_quantize,
        ),
        Operator(
            "KvAttention",
            _ATTENTION_INPUTS,
            ("y",),
            {"scale": float},
            _attention_body(_PACKED_DOTS, _PACKED_OUTPUT),
            kv_attention,
        ),
        Operator(
            "KvAttentionInt8",
            _ATTENTION_INPUTS,
            ("y",),
            {"scale": float},
            _attention_body(_DOTS, _OUTPUT),
            kv_attention,
        ),
        Operator(
            "KvAttentionSoftcap",
            _ATTENTION_INPUTS,
            ("y",),
            {"scale": float, "softcap": float},
            _attention_body(_PACKED_DOTS, _PACKED_OUTPUT, has_softcap=True),
            kv_attention,
        ),
        Operator(
            "KvAttentionSoftcapInt8",
            _ATTENTION_INPUTS,
            ("y",),
            {"scale": float, "softcap": float},
            _attention_body(_DOTS, _OUTPUT, has_softcap=True),
            kv_attention,
        ),
        Operator(
            "QuantizeGroups",
            ("x",),
            ("q", "scale", "zero"),
            _GROUP_ATTRIBUTES,
            groups.QUANTIZE_GROUPS,
            groups.quantize_groups,
        ),
        *(
            Operator(
                f"{name}Asymmetric",
                _ZERO_GEMM_INPUTS,
                ("y",),
                {"dtype": int},
                groups.gemm_asymmetric_body(halved=name == "Int8Gemm"),
                groups.gemm_asymmetric,
            )
            for name in ("Int4Gemm", "Int8Gemm")
        ),
        *(
            Operator(
                f"{name}Groups",
                _ZERO_GEMM_INPUTS,
                ("y",),
                {"group_size": int, "dtype": int},
                groups.gemm_groups_body(halved=name == "Int8Gemm"),
                groups.gemm_groups,
            )
            for name in ("Int4Gemm", "Int8Gemm")
        ),
        *(
            Operator(
                f"{name}WeightZeros",
                (*_ZERO_GEMM_INPUTS, "w_zero"),
                ("y",),
                {"group_size": int, "dtype": int},
                groups.gemm_groups_body(halved=name == "Int8Gemm", has_weight_zeros=True),
                groups.gemm_groups,
            )
            for name in ("Int4Gemm", "Int8Gemm")
        ),
        Operator(
            "KvAppendGroups",
            _CACHE_INPUTS,
            _CACHE_OUTPUTS,
            _GROUP_ATTRIBUTES,
            groups.QUANTIZE_NEW + _PACK_KV + _APPEND,
            kv_append_groups,
        ),
        Operator(
            "KvAppendGroupsInt8",
            _CACHE_INPUTS,
            _CACHE_OUTPUTS,
            _GROUP_ATTRIBUTES,
            groups.QUANTIZE_NEW + _STORE_KV + _APPEND,
            kv_append_groups,
        ),
        Operator(
            "KvFakeQuantizeGroups",
            ("new",),
            ("y",),
            _GROUP_ATTRIBUTES,
            groups.FAKE_QUANTIZE_GROUPS,
            groups.fake_quantize_groups,
        ),
        *(
            Operator(
                f"KvDequantize{suffix}",
                ("codes", "scale", "zero"),
                ("y",),
                {"dtype": int},
                groups.dequantize_body(packed=not suffix),
                kv_dequantize,
            )
            for suffix in ("", "Int8")
        ),
        Operator(
            "KvAttentionSinks",
            (*_ATTENTION_INPUTS, "sinks"),
            ("y",),
            {"scale": float},
            _attention_body(_PACKED_DOTS, _PACKED_OUTPUT, softmax=_SOFTMAX_WITH_SINKS),
            kv_attention,
        ),
        Operator(
            "KvAttentionSinksInt8",
            (*_ATTENTION_INPUTS, "sinks"),
            ("y",),
            {"scale": float},
            _attention_body(_DOTS, _OUTPUT, softmax=_SOFTMAX_WITH_SINKS),
            kv_attention,
        ),
        Operator(
            "AttentionSinks",
            ("q", "key", "value", "mask", "sinks"),
            ("y",),
            {"scale": float},
            _ATTENTION_SINKS,
            attention_sinks,
        ),
    )
}

_BY_INPUT = "ByInput"  # in the name of a function whose attribute is an input

# TensorRT 10.15 and later inline a function unless the node names the plugin's namespace and
# version.
_PLUGIN_ATTRIBUTES: Mapping[str, str] = {"plugin_namespace": DOMAIN, "plugin_version": str(VERSION)}


@cache
def _function_proto(name: str, as_input: str) -> bytes:
    import onnx.parser  # noqa: PLC0415  # 260 ms that only a writer of graphs pays

    operator = OPERATORS[name]
    given = [attribute for attribute in operator.attributes if attribute != as_input]
    inputs = [*operator.inputs, *([as_input] if as_input else [])]
    body = operator.body.replace(
        f"Constant <value_float: float = @{as_input}> ()", f"Identity ({as_input})"
    )
    text = f"""
    <domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>
    {name}{_BY_INPUT if as_input else ""} <{", ".join([*given, *_PLUGIN_ATTRIBUTES])}>
    ({", ".join(inputs)}) => ({", ".join(operator.outputs)})
    {{ {body} }}
    """
    return bytes(onnx.parser.parse_function(text).SerializeToString())


def function(name: str, as_input: str = "") -> ir.Function:
    """A fresh ONNX local function for the operator `name`.

    With the name of a float attribute in `as_input`, that is an input behind the others, and the
    function has a name of its own: for searches, which try many values in one session.
    """
    import onnx  # noqa: PLC0415

    text = _function_proto(name, as_input)
    return ir.serde.deserialize_function(onnx.FunctionProto.FromString(text))


def node(name: str, inputs: list[ir.Value], attributes: Mapping[str, Any], *, at: str) -> ir.Node:
    """A node of the operator `name`, with names derived from `at` (``/model/layers.0/...``).

    Raises:
        ValueError: the attributes are not exactly those of the operator.
    """
    operator = OPERATORS[name]
    if set(attributes) != set(operator.attributes) or len(inputs) != len(operator.inputs):
        raise ValueError(f"{at}: {name} takes {operator.inputs} and {list(operator.attributes)}")
    created = ir.node(
        name,
        inputs,
        {**attributes, **_PLUGIN_ATTRIBUTES},
        domain=DOMAIN,
        num_outputs=len(operator.outputs),
        name=at,
    )
    for output, suffix in zip(created.outputs, operator.outputs, strict=True):
        output.name = f"{at}_{suffix}"
    return created


def declare(model: ir.Model) -> None:
    """Give `model` exactly the functions that its ``quarot`` nodes use, and the domain."""
    used = {n.op_type for n in model.graph if n.domain == DOMAIN}
    for identifier in [i for i in model.functions if i[0] == DOMAIN and i[1] not in used]:
        model.functions.pop(identifier)
    for name in sorted(used):
        added = function(name)
        model.functions.setdefault(added.identifier(), added)
    if used:
        model.graph.opset_imports[DOMAIN] = VERSION
