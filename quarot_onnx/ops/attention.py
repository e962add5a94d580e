# SPDX-License-Identifier: Apache-2.0
"""Attention over a cache of codes, with softcaps and sinks; and over a float cache with sinks."""

import numpy as np
from numpy.typing import NDArray

from quarot_onnx.ops.cache import unpack_kv
from quarot_onnx.ops.operator import PACKED_BITS, Array, Codes, Float32, Operator

_MASKED = -3.0e38  # finite, so that a row with nothing to attend to is uniform and not NaN
_INPUTS = (
    "q",
    "key",
    "key_scale",
    "key_zero",
    "value",
    "value_scale",
    "value_zero",
    "mask",
)


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


# --- Function bodies ------------------------------------------------------------------------------

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

OPERATORS = (
    Operator(
        "KvAttention",
        _INPUTS,
        ("y",),
        {"scale": float},
        _attention_body(_PACKED_DOTS, _PACKED_OUTPUT),
        kv_attention,
    ),
    Operator(
        "KvAttentionInt8",
        _INPUTS,
        ("y",),
        {"scale": float},
        _attention_body(_DOTS, _OUTPUT),
        kv_attention,
    ),
    Operator(
        "KvAttentionSoftcap",
        _INPUTS,
        ("y",),
        {"scale": float, "softcap": float},
        _attention_body(_PACKED_DOTS, _PACKED_OUTPUT, has_softcap=True),
        kv_attention,
    ),
    Operator(
        "KvAttentionSoftcapInt8",
        _INPUTS,
        ("y",),
        {"scale": float, "softcap": float},
        _attention_body(_DOTS, _OUTPUT, has_softcap=True),
        kv_attention,
    ),
    Operator(
        "KvAttentionSinks",
        (*_INPUTS, "sinks"),
        ("y",),
        {"scale": float},
        _attention_body(_PACKED_DOTS, _PACKED_OUTPUT, softmax=_SOFTMAX_WITH_SINKS),
        kv_attention,
    ),
    Operator(
        "KvAttentionSinksInt8",
        (*_INPUTS, "sinks"),
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
