# SPDX-License-Identifier: Apache-2.0
"""GPTQ: round one input row at a time and let the rows that follow make up for its error.

For ``y = x @ W`` and ``H = E[x.T x]`` the error of rounding row i is least, in ``E|x @ dW|^2``,
when the rows behind it change by ``-(w_i - q_i) / U[i, i] * U[i, i + 1:]``, where ``U`` is the
upper triangular factor of ``inverse(H) = U.T @ U`` (GPTQ, arXiv 2210.17323, section 3.3).
"""

import numpy as np
from numpy.typing import NDArray

from quarot_onnx.errors import InputError
from quarot_onnx.quantizers.form import Form
from quarot_onnx.quantizers.grid import Codes, codes_of, grid_of
from quarot_onnx.weights import Float64

_MOST_DAMPING = 1.0
_LEAF = 64  # triangles below this are inverted by LAPACK


def gptq(
    weight: Float64,
    hessian: Float64,
    form: Form,
    *,
    damping: float = 0.01,
    block_size: int = 128,
    act_order: bool = False,
    static_groups: bool = False,
    keep: NDArray[np.bool_] | None = None,
) -> Codes:
    """The codes of `weight` [in_features, out_features] under `hessian` [in_features, in_features].

    Args:
        weight: float64.
        hessian: E[x.T x] of the inputs; any positive factor of it gives the same codes.
        form: how the codes are stored.
        damping: added to the diagonal, in multiples of its mean; times 10 while the matrix is
            singular.
        block_size: rows whose updates of the rest are done at once; changes the speed only. With
            groups it is rounded to whole groups.
        act_order: round rows in the order of falling ``H[i, i]``; with groups, only on static ones.
        static_groups: take the grids of all groups from the weight as it is given; otherwise a
            group's grid is that of its rows when the first of them is reached. One group is always
            static.
        keep: [in_features, out_features]; where it is false the code is 0, and the rows behind make
            up for that, too. With zero points it must be None.

    Raises:
        InputError: the Hessian is not finite or not positive definite at any damping.
    """
    rows = form.rows(len(weight))
    is_static = static_groups or rows == len(weight)
    assert is_static or not act_order
    starts = range(0, len(weight), rows)
    grids = [grid_of(weight[start : start + rows], form) for start in starts] if is_static else []
    order = np.argsort(-np.diag(hessian), kind="stable") if act_order else np.arange(len(weight))
    factor = inverse_factor(hessian[np.ix_(order, order)] if act_order else hessian, damping)
    left = weight[order]  # a copy: rows behind the current one are changed
    codes = np.empty_like(left)
    # Whole groups, so that a grid sees every update of its rows.
    block = block_size if is_static else -(-block_size // rows) * rows
    for first in range(0, len(left), block):
        last = min(first + block, len(left))
        errors = np.empty((last - first, left.shape[1]))
        for i in range(first, last):
            if not is_static and i % rows == 0:
                grids.append(grid_of(left[i : i + rows], form))
            grid = grids[order[i] // rows]
            codes[i] = grid.codes(left[i])
            if keep is not None:
                codes[i] *= keep[order[i]]
            errors[i - first] = (left[i] - grid.values(codes[i])) / factor[i, i]
            left[i + 1 : last] -= np.outer(factor[i, i + 1 : last], errors[i - first])
        left[last:] -= factor[first:last, last:].T @ errors
    in_place = np.empty_like(codes)
    in_place[order] = codes
    return codes_of(in_place, grids)


def inverse_factor(hessian: Float64, damping: float) -> Float64:
    """Upper triangular U with ``U.T @ U = inverse(hessian + damping * mean diagonal)``.

    An input that is always 0 has no say in the others; its own entry becomes 1. The diagonal of
    `hessian`, of which there is no copy, is changed and restored: of a large one each takes as much
    memory as all weights of a layer.

    Raises:
        InputError: not finite, or not positive definite at any damping.
    """
    if not np.isfinite(hessian).all():
        raise InputError("hessian: not finite; the activations of the calibration text overflow")
    diagonal = np.einsum("ii->i", hessian)  # a view
    given = diagonal.copy()
    original = np.where(given == 0, 1, given)
    mean = original.mean()
    try:
        while damping <= _MOST_DAMPING:
            diagonal[:] = original + damping * mean
            try:
                # With rows and columns reversed, a lower triangular factor is an upper one:
                # H = R @ R.T, so that inverse(H) = inverse(R).T @ inverse(R).
                lower: Float64 = np.linalg.cholesky(hessian[::-1, ::-1]).astype(
                    np.float64, copy=False
                )
            except np.linalg.LinAlgError:
                damping *= 10
                continue
            upper = lower[::-1, ::-1]
            invert_upper(upper)
            return upper
    finally:
        diagonal[:] = given
    raise InputError("hessian: not positive definite; the calibration text has too little variety")


def invert_upper(upper: Float64) -> None:
    """Replace an upper triangular matrix by its inverse, by halves."""
    size = len(upper)
    if size <= _LEAF:
        upper[:] = np.triu(np.linalg.inv(upper))
        return
    half = size // 2
    first, second, corner = upper[:half, :half], upper[half:, half:], upper[:half, half:]
    invert_upper(first)
    invert_upper(second)
    corner[:] = -first @ corner @ second


def output_power(weight: Float64, hessian: Float64) -> float:
    """``E|x @ weight|^2`` for ``hessian = E[x.T x]``."""
    return float((weight * (hessian @ weight)).sum())
