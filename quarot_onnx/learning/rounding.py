# SPDX-License-Identifier: Apache-2.0
"""Fake quantization with straight-through gradients: the forward rounds, the gradient does not.

The values are those of the operators in `quarot_onnx.ops`; scales and zero points keep their
gradients, so a matrix learns to make the range of a token small.
"""

import torch

from quarot_onnx.rounding import Rounding


def straight_through_round(x: torch.Tensor) -> torch.Tensor:
    """``round(x)``, half to even, with the gradient of x (Bengio et al., arXiv 1308.3432)."""
    rounded: torch.Tensor = x + (torch.round(x) - x).detach()
    return rounded


def rounded(x: torch.Tensor, rounding: Rounding) -> torch.Tensor:
    """X [..., features] rounded group by group: `Rounding.values` with gradients."""
    rows = x.reshape(*x.shape[:-1], -1, rounding.group_size)
    values = _symmetric if rounding.symmetric else _asymmetric
    return values(rows, rounding.bits, rounding.clip_ratio).reshape(x.shape)


def _symmetric(x: torch.Tensor, bits: int, clip_ratio: float) -> torch.Tensor:
    top = 2 ** (bits - 1) - 1
    largest = x.abs().amax(dim=-1, keepdim=True)
    scale = torch.where(largest == 0, torch.ones_like(largest), largest * (clip_ratio / top))
    codes = torch.clamp(straight_through_round(x / scale), -top - 1, top)
    values: torch.Tensor = codes * scale
    return values


def _asymmetric(x: torch.Tensor, bits: int, clip_ratio: float) -> torch.Tensor:
    top = 2**bits - 1
    low = x.amin(dim=-1, keepdim=True).clamp(max=0)
    high = x.amax(dim=-1, keepdim=True).clamp(min=0)
    span = high - low
    scale = torch.where(span == 0, torch.ones_like(span), span * (clip_ratio / top))
    zero = straight_through_round(-low * clip_ratio / scale)
    codes = torch.clamp(straight_through_round(x / scale) + zero, 0, top)
    values: torch.Tensor = (codes - zero) * scale
    return values


def round_weight(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Weight [out, in] rounded per output channel, symmetric, over the whole range."""
    top = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / top
    codes = torch.clamp(straight_through_round(weight / scale), -top - 1, top)
    values: torch.Tensor = codes * scale
    return values
