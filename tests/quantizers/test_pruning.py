# SPDX-License-Identifier: Apache-2.0
"""Masks keep what matters most; OBR is the dense solution of each column's own problem."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from quarot_onnx.errors import InputError, UnsupportedModelError
from quarot_onnx.quantizers.form import Form
from quarot_onnx.quantizers.gptq import gptq, output_power
from quarot_onnx.quantizers.grid import Grid
from quarot_onnx.quantizers.pruning import mask_of, obr

Array = NDArray[np.float64]


def _problem(size: int, seed: int, columns: int = 6) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(300, size)) @ rng.normal(size=(size, size)) * rng.lognormal(0, 1, size)
    return rng.normal(size=(size, columns)), x.T @ x / len(x)


@given(size=st.sampled_from([4, 8, 20, 64]), seed=st.integers(0, 30), weighted=st.booleans())
def test_two_of_four_keeps_the_two_that_matter_most_of_each_four(size, seed, weighted) -> None:
    weight, hessian = _problem(size, seed)
    keep = mask_of(weight, hessian if weighted else None, "2:4")
    importance = np.abs(weight) * (np.sqrt(np.diag(hessian))[:, None] if weighted else 1)
    for four, kept in zip(
        importance.reshape(-1, 4, 6).swapaxes(1, 2).reshape(-1, 4),
        keep.reshape(-1, 4, 6).swapaxes(1, 2).reshape(-1, 4),
        strict=True,
    ):
        assert kept.sum() == 2
        assert four[kept].min() >= four[~kept].max()


@pytest.mark.parametrize(("size", "kept"), [(1, 1), (7, 4), (10, 5)])
def test_half_of_each_output_channel_is_kept(size, kept) -> None:
    weight, hessian = _problem(size, 0)
    assert (mask_of(weight, hessian, "50%").sum(axis=0) == kept).all()


def test_refuses_two_of_four_where_four_does_not_divide() -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        mask_of(np.ones((10, 2)), None, "2:4")
    assert str(caught.value) == (
        "weight: in_features=10 is not a multiple of 4; set weights.sparsity = 50%"
    )


def _reference(weight: Array, hessian: Array, keep: Array, bits: int) -> Array:
    """Values of one column after another, by explicit elimination."""
    damped = hessian + 0.01 * np.diag(hessian).mean() * np.eye(len(weight))
    values = np.zeros_like(weight)
    for column in range(weight.shape[1]):
        kept, pruned = np.flatnonzero(keep[:, column]), np.flatnonzero(~keep[:, column])
        inverse = np.linalg.inv(damped[np.ix_(kept, kept)])
        left = (
            weight[kept, column] + inverse @ damped[np.ix_(kept, pruned)] @ weight[pruned, column]
        )
        scale = np.float32(np.abs(left).max() / (2 ** (bits - 1) - 1))
        grid = Grid(bits, np.array([scale], np.float32), np.zeros(1, np.float32))
        for step, row in enumerate(kept):
            values[row, column] = grid.values(grid.codes(left[step : step + 1]))[0]
            error = (left[step] - values[row, column]) / inverse[step, step]
            left[step + 1 :] -= inverse[step + 1 :, step] * error
            inverse -= np.outer(inverse[:, step], inverse[step]) / inverse[step, step]
    return values


@given(
    size=st.sampled_from([4, 8, 24]),
    seed=st.integers(0, 30),
    bits=st.sampled_from([3, 4, 8]),
    pattern=st.sampled_from(["50%", "2:4"]),
)
def test_codes_are_those_of_the_dense_reference_or_lose_less(size, seed, bits, pattern) -> None:
    weight, hessian = _problem(size, seed)
    keep = mask_of(weight, hessian, pattern)
    found = obr(weight, hessian, keep, Form(bits, clip_search=False)).values()
    wanted = _reference(weight, hessian, keep, bits)
    assert not found[~keep].any()
    if not np.allclose(found, wanted, rtol=1e-6, atol=1e-9):
        ours, theirs = (output_power(x - weight, hessian) for x in (found, wanted))
        assert ours <= theirs * (1 + 1e-6)  # a tie of roundings fell the other way


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("pattern", ["50%", "2:4"])
def test_it_loses_less_than_pruning_and_then_gptq(pattern, seed) -> None:
    weight, hessian = _problem(64, seed, columns=32)
    form = Form(4)

    def loss(found: Array) -> float:
        return output_power(found - weight, hessian)

    keep = mask_of(weight, hessian, pattern)
    ours = loss(obr(weight, hessian, keep, form).values())
    for mask in (keep, mask_of(weight, None, pattern)):
        pruned = gptq(np.where(mask, weight, 0), hessian, form, keep=mask)
        assert not pruned.codes[~mask].any()
        assert ours < 0.8 * loss(pruned.values())


def test_columns_in_batches_give_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = _problem(20, 1, columns=9)
    keep = mask_of(weight, hessian, "50%")
    whole = obr(weight, hessian, keep, Form(4, group_size=5))
    monkeypatch.setattr("quarot_onnx.quantizers.pruning._BATCH_BYTES", 8 * 10 * 10 * 2)
    found = obr(weight, hessian, keep, Form(4, group_size=5))
    np.testing.assert_array_equal(found.codes, whole.codes)
    np.testing.assert_array_equal(found.scale, whole.scale)


def test_refuses_a_hessian_that_is_not_positive() -> None:
    hessian = np.full((4, 4), -5.0) + 6 * np.eye(4)
    keep = np.array([[True], [True], [True], [False]])
    with pytest.raises(InputError, match="not positive definite"):
        obr(np.ones((4, 1)), hessian, keep, Form(4))
