# SPDX-License-Identifier: Apache-2.0
"""What the kernel tests compare with, beside the operators of ``quarot_onnx.ops``."""

import math

import ml_dtypes
import numpy as np

from quarot_onnx.hadamard import hadamard_matrix
from quarot_onnx.plugins.kernels import Dtype

NUMPY = {Dtype.FP16: np.dtype(np.float16), Dtype.BF16: np.dtype(ml_dtypes.bfloat16)}


def rotate(x: np.ndarray, factors: tuple[int, ...], inner: int = 1) -> np.ndarray:
    """x (I ⊗ H_f1 ⊗ H_f2 ⊗ .. ⊗ I_inner) in float64, unnormalized: integers stay integers."""
    y = x.astype(np.float64)
    for i, factor in enumerate(factors):
        stride = math.prod(factors[i + 1 :]) * inner
        folded = y.reshape(-1, factor, stride)
        y = np.einsum("aks,kj->ajs", folded, hadamard_matrix(factor).astype(np.float64))
    return y.reshape(x.shape)


def mismatches(
    codes: np.ndarray, x: np.ndarray, scale: np.ndarray, *, error: float = 1e-6
) -> np.ndarray:
    """Codes that are not those of x [rows, n] at ``scale`` [rows], ties aside.

    A float32 sum has an order-dependent last bit. Where x / scale lies closer than that to the
    middle of two codes, both are right; everywhere else the code is exact. ``error`` is the bound
    on the relative error of x, times the largest |x| of the row.
    """
    quotient = x / scale[:, None].astype(np.float64)
    exact = np.clip(np.rint(quotient), -8, 7)
    slack = error * np.abs(quotient).max(axis=1, keepdims=True) + 1e-6
    tie = np.abs(np.abs(quotient - np.floor(quotient)) - 0.5) <= slack
    return (codes != exact) & ~(tie & (np.abs(codes - quotient) <= 0.5 + slack))
