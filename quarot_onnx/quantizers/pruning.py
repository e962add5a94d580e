# SPDX-License-Identifier: Apache-2.0
"""Prune and round together: masks, and what the kept weights do about both errors.

For ``y = x @ W`` and ``H = E[x.T x]``, column by column: with the kept rows R and the pruned rows
E, ``E|x @ dw|^2`` is least for ``dw_R = inverse(H_RR) @ H_RE @ w_E``. Then every rounded row passes
its error on to the kept rows behind it, by the same formula (OBR, arXiv 2509.11177). OBR rounds the
kept rows in two halves; here it is row by row, as GPTQ does, with the inverse of each column's own
H_RR, so that no error goes to a row that is pruned.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from quarot_onnx.errors import InputError, UnsupportedModelError
from quarot_onnx.ops import Float32
from quarot_onnx.quantizers.form import Form
from quarot_onnx.quantizers.grid import Codes, Grid, grid_of
from quarot_onnx.weights import Float64

Mask = NDArray[np.bool_]
"""[in_features, out_features]; true where a weight is kept."""

Pattern = Literal["50%", "2:4"]
"""Half of the inputs of each output channel, or two of each four consecutive ones."""

_BATCH_BYTES = 64 << 20  # of the columns' own Hessians, at once


def mask_of(weight: Float64, hessian: Float64 | None, pattern: Pattern) -> Mask:
    """Keep what matters most in each output channel.

    Args:
        weight: [in_features, out_features].
        hessian: E[x.T x], for the importance ``|w| * sqrt(E[x^2])`` (WANDA, arXiv 2306.11695);
            None for ``|w|``.
        pattern: how many, and where.

    Raises:
        UnsupportedModelError: ``2:4`` with a number of inputs that 4 does not divide.
    """
    importance = np.abs(weight)
    if hessian is not None:
        importance = importance * np.sqrt(np.diag(hessian))[:, None]
    in_features, out_features = weight.shape
    if pattern == "2:4" and in_features % 4:
        raise UnsupportedModelError(
            f"weight: in_features={in_features} is not a multiple of 4; set weights.sparsity = 50%"
        )
    group = 4 if pattern == "2:4" else in_features
    grouped = importance.reshape(-1, group, out_features)
    order = np.argsort(-grouped, axis=1, kind="stable")
    keep = np.zeros(grouped.shape, np.bool_)
    np.put_along_axis(keep, order[:, : (group + 1) // 2], True, axis=1)
    return keep.reshape(weight.shape)


def obr(
    weight: Float64, hessian: Float64, keep: Mask, form: Form, *, damping: float = 0.01
) -> Codes:
    """The codes of `weight` under `keep`, which has the same number of rows in every column.

    Args:
        weight: [in_features, out_features].
        hessian: E[x.T x], [in_features, in_features].
        keep: what is not pruned; pruned entries get the code 0.
        form: symmetric; how the codes are stored.
        damping: added to the diagonal, in multiples of its mean.

    Raises:
        InputError: the Hessian is not positive definite.
    """
    assert form.symmetric
    damped = hessian.copy()
    diagonal = np.einsum("ii->i", damped)  # a view
    diagonal[diagonal == 0] = 1
    diagonal += damping * diagonal.mean()
    kept = int(keep[:, 0].sum())
    rows = np.argsort(~keep, axis=0, kind="stable")[:kept].T  # [columns, kept], ascending
    step = max(1, _BATCH_BYTES // (8 * kept * kept))
    parts = [slice(i, min(i + step, len(rows))) for i in range(0, len(rows), step)]
    try:
        found = [_columns(weight[:, p], damped, keep[:, p], rows[p], form) for p in parts]
    except np.linalg.LinAlgError as error:
        raise InputError(
            "hessian: not positive definite; the calibration text has too little variety"
        ) from error
    codes, scale, zero = (np.concatenate(part, axis=1) for part in zip(*found, strict=True))
    return Codes(codes, scale, zero)


def _columns(
    weight: Float64, hessian: Float64, keep: Mask, rows: NDArray[np.intp], form: Form
) -> tuple[NDArray[np.int8], Float32, NDArray[np.int8]]:
    """Codes, scales and zero points of a few columns, which keep `rows` [columns, kept]."""
    columns = np.arange(len(rows))[:, None]
    own = hessian[rows[:, :, None], rows[:, None, :]]  # H_RR, [columns, kept, kept]
    pruned = (hessian @ np.where(keep, 0.0, weight))[rows, columns]  # H_RE w_E
    left = weight[rows, columns] + np.linalg.solve(own, pruned[..., None])[..., 0]
    moved = np.zeros_like(weight)
    moved[rows, columns] = left
    size = form.rows(len(weight))
    grids = [grid_of(moved[i : i + size], form) for i in range(0, len(weight), size)]
    scale = np.stack([grid.scale for grid in grids])[rows // size, columns]
    # Reversed, a lower triangular factor is an upper one: H = R @ R.T, as in `gptq`.
    lower = np.linalg.cholesky(own[:, ::-1, ::-1])
    factor = np.linalg.inv(lower[:, ::-1, ::-1])
    rounded = np.zeros_like(left)
    for i in range(left.shape[1]):
        one = Grid(form.bits, scale[:, i], np.zeros_like(scale[:, i]))
        rounded[:, i] = one.codes(left[:, i])
        error = (left[:, i] - one.values(rounded[:, i])) / factor[:, i, i]
        left[:, i + 1 :] -= factor[:, i, i + 1 :] * error[:, None]
    codes = np.zeros(weight.shape, np.int8)
    codes[rows, columns] = rounded
    scales = np.stack([grid.scale for grid in grids])
    return codes, scales, np.zeros(scales.shape, np.int8)
