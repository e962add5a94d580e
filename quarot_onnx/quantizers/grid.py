# SPDX-License-Identifier: Apache-2.0
"""Grids of weight codes: scales and zero points of groups of input rows.

A group is `group_size` consecutive rows of a weight [in_features, out_features] in one column.
Codes of b bits are ``-2**(b-1) .. 2**(b-1)-1``, and ``value = (code - zero) * scale``; the zero
point is a code, and 0 in a symmetric grid.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quarot_onnx.ops import Float32
from quarot_onnx.quantizers.form import Form
from quarot_onnx.quantizers.rtn import best_clip, qmax
from quarot_onnx.weights import Float64

_SHRINK = np.arange(100, 20, -1) / 100.0  # QuaRot's grid of clips, as in `rtn.best_clip`


@dataclass(frozen=True)
class Grid:
    """The grid of one group of rows.

    Attributes:
        bits: of a code.
        scale: float32 [out_features]; 1 where the group is all zero.
        zero: integers as float32 [out_features].
    """

    bits: int
    scale: Float32
    zero: Float32

    def codes(self, weight: Float64) -> Float64:
        """The nearest codes of weight [..., out_features], as whole numbers."""
        codes: Float64 = np.rint(weight / self.scale) + self.zero
        np.clip(codes, -qmax(self.bits) - 1, qmax(self.bits), out=codes)
        return codes

    def values(self, codes: Float64) -> Float64:
        """What `codes` stand for."""
        values: Float64 = (codes - self.zero) * self.scale.astype(np.float64)
        return values


def grid_of(weight: Float64, form: Form) -> Grid:
    """The grid of one group, weight [rows, out_features].

    Asymmetric ranges include 0, so that a zero point is a code (as the cache's, docs/design.md).
    """
    if form.symmetric:
        largest = np.abs(weight).max(axis=0)
        if not form.clip_search:
            return _symmetric(form.bits, largest)
        if len(weight) > 512:  # the histogram pays where there is more to round than bins to sum
            return _symmetric(form.bits, largest * best_clip(weight, bits=form.bits))
        return _least_error(weight, [_symmetric(form.bits, largest * c) for c in _SHRINK])
    low, high = np.minimum(weight.min(axis=0), 0.0), np.maximum(weight.max(axis=0), 0.0)
    factors = _SHRINK if form.clip_search else _SHRINK[:1]
    return _least_error(weight, [_asymmetric(form.bits, low * c, high * c) for c in factors])


def _symmetric(bits: int, largest: Float64) -> Grid:
    scale = (largest / qmax(bits)).astype(np.float32)
    scale[scale == 0] = 1
    return Grid(bits, scale, np.zeros_like(scale))


def _asymmetric(bits: int, low: Float64, high: Float64) -> Grid:
    scale = ((high - low) / (2**bits - 1)).astype(np.float32)
    scale[scale == 0] = 1
    return Grid(bits, scale, (np.rint(-low / scale) - qmax(bits) - 1).astype(np.float32))


def _least_error(weight: Float64, candidates: list[Grid]) -> Grid:
    """Per output channel the candidate of least squared error; of equals the first."""
    best = candidates[0]
    scale, zero = best.scale.copy(), best.zero.copy()
    least = np.full(weight.shape[1], np.inf)
    for grid in candidates if len(candidates) > 1 else ():
        error = np.square(grid.values(grid.codes(weight)) - weight).sum(axis=0)
        better = error < least
        least[better] = error[better]
        scale[better], zero[better] = grid.scale[better], grid.zero[better]
    return Grid(best.bits, scale, zero)


@dataclass(frozen=True)
class Codes:
    """A rounded weight.

    Attributes:
        codes: int8 [in_features, out_features].
        scale: float32 [groups, out_features].
        zero: int8 [groups, out_features].
    """

    codes: NDArray[np.int8]
    scale: Float32
    zero: NDArray[np.int8]

    def values(self) -> Float64:
        """What the codes stand for, [in_features, out_features]."""
        groups, out_features = self.scale.shape
        grouped = self.codes.reshape(groups, -1, out_features).astype(np.float64)
        values = (grouped - self.zero[:, None]) * self.scale[:, None].astype(np.float64)
        whole: Float64 = values.reshape(self.codes.shape)
        return whole


def nearest(weight: Float64, form: Form) -> Codes:
    """Round to nearest: every entry of weight [in_features, out_features] to its grid."""
    rows = form.rows(len(weight))
    groups = [weight[start : start + rows] for start in range(0, len(weight), rows)]
    grids = [grid_of(group, form) for group in groups]
    codes = [grid.codes(group) for grid, group in zip(grids, groups, strict=True)]
    return codes_of(np.concatenate(codes), grids)


def codes_of(codes: Float64, grids: list[Grid]) -> Codes:
    """Whole numbers [in_features, out_features] and the grids of their groups, as stored."""
    return Codes(
        codes.astype(np.int8),
        np.stack([grid.scale for grid in grids]),
        np.stack([grid.zero for grid in grids]).astype(np.int8),
    )
