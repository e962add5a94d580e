# SPDX-License-Identifier: Apache-2.0
"""Weight quantizers: arrays in, arrays out, no graph."""

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quarot_onnx.ops import Float32
from quarot_onnx.weights import Float64

_SHRINK_PERCENT = np.arange(100, 20, -1)
"""The clip search's candidates: 1 - i / 100 for i = 0..79, QuaRot's ``--w_clip`` grid."""

_HISTOGRAM_ENTRIES = 1 << 17  # 1 MB: the histograms of a few columns stay in cache


def qmax(bits: int) -> int:
    """The largest positive code of a symmetric quantizer; the smallest code is ``-qmax - 1``."""
    return int(2 ** (bits - 1)) - 1


def rtn(
    weight: Float64, *, bits: int, clip_search: bool = True
) -> tuple[NDArray[np.int8], Float32]:
    """Round-to-nearest codes and scales, symmetric, per output channel.

    Args:
        weight: [in_features, out_features].
        bits: 2 to 8.
        clip_search: shrink each channel's range by the factor 1 - i/100 of least squared error
            (QuaRot, section 4, "clipping"); otherwise the range is max|w|.

    Returns:
        int8 codes [in_features, out_features] in ``-qmax - 1 .. qmax`` and float32 scales
        [out_features]; a channel of zeros has scale 1.
    """
    largest = np.abs(weight).max(axis=0)
    clip = best_clip(weight, bits=bits) if clip_search else np.ones_like(largest)
    scale = (largest * clip / qmax(bits)).astype(np.float32)
    scale[scale == 0] = 1
    codes = np.rint(weight / scale)
    np.clip(codes, -qmax(bits) - 1, qmax(bits), out=codes)
    return codes.astype(np.int8), scale


def best_clip(weight: Float64, *, bits: int) -> Float64:
    """Per output channel, the factor of max|w| that rounds with the least squared error.

    Exact over the whole grid without rounding the weight once per candidate. With candidate j % the
    thresholds between codes are ``(2k + 1) * j * max|w| / (200 qmax)``: all of them are edges of
    one histogram with 200 qmax bins per sign. From its counts and sums, for the positive side,
    ``sum (w - s q)^2 = sum w^2 - 2 s sum q w + s^2 sum q^2``, where passing threshold k adds 1 to
    q, hence ``|w|`` to the second sum and ``2k + 1`` to the third.

    Args:
        weight: [in_features, out_features].
        bits: 2 to 8.

    Returns:
        Factors [out_features] in 0.21..1.
    """
    bins = 200 * qmax(bits)
    columns = max(1, _HISTOGRAM_ENTRIES // (2 * bins))
    blocks = (weight[:, i : i + columns] for i in range(0, weight.shape[1], columns))
    return np.concatenate([_best_clip_of_block(block, bits, bins) for block in blocks])


def _best_clip_of_block(weight: Float64, bits: int, bins: int) -> Float64:
    columns = weight.shape[1]
    magnitude = np.abs(weight)
    largest = magnitude.max(axis=0)
    unit = np.where(largest == 0, 1.0, largest)
    position = np.minimum((magnitude * (bins / unit)).astype(np.int64), bins - 1)
    position += bins * (weight < 0) + 2 * bins * np.arange(columns)
    shape = (columns, 2, bins)
    counts = np.bincount(position.ravel(), minlength=columns * 2 * bins).reshape(shape)
    sums = np.bincount(
        position.ravel(), weights=magnitude.ravel(), minlength=columns * 2 * bins
    ).reshape(shape)
    beyond_counts = _sum_from(counts.astype(np.float64))  # [columns, sign, bins + 1]
    beyond_sums = _sum_from(sums)

    edges, steps = _thresholds(bits, bins)  # [candidates, codes]
    code_times_weight = np.zeros((columns, len(edges)))
    code_squared = np.zeros((columns, len(edges)))
    for sign, codes in ((0, qmax(bits)), (1, qmax(bits) + 1)):
        passed = edges[:, :codes]
        code_times_weight += beyond_sums[:, sign, :][:, passed].sum(axis=-1)
        code_squared += (beyond_counts[:, sign, :][:, passed] * steps[:codes]).sum(axis=-1)
    scale = unit[:, None] * (_SHRINK_PERCENT / 100.0) / qmax(bits)
    error = scale**2 * code_squared - 2 * scale * code_times_weight  # + sum w^2, the same for all
    best: Float64 = _SHRINK_PERCENT[error.argmin(axis=1)] / 100.0
    return best


def _sum_from(values: NDArray[Any]) -> Float64:
    """result[..., b] = sum of values[..., b:], with a last entry of 0."""
    reversed_sum = np.cumsum(values[..., ::-1], axis=-1)[..., ::-1]
    return np.concatenate([reversed_sum, np.zeros((*values.shape[:-1], 1))], axis=-1)


@cache
def _thresholds(bits: int, bins: int) -> tuple[NDArray[np.int64], Float64]:
    """The bin of every candidate's threshold k, and 2k + 1."""
    steps = 2 * np.arange(qmax(bits) + 1) + 1
    return np.minimum(_SHRINK_PERCENT[:, None] * steps, bins), steps.astype(np.float64)
