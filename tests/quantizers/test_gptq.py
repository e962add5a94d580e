# SPDX-License-Identifier: Apache-2.0
"""GPTQ against a dense reference that updates the inverse Hessian row by row, as OBQ does."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from quarot_onnx.errors import InputError
from quarot_onnx.quantizers.form import Form
from quarot_onnx.quantizers.gptq import gptq, inverse_factor, invert_upper, output_power
from quarot_onnx.quantizers.grid import grid_of, nearest

Array = NDArray[np.float64]


def _inputs(size: int, seed: int, tokens: int = 200) -> Array:
    """Correlated, with a few strong features, as activations are."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(tokens, size)) @ rng.normal(size=(size, size))
    return mixed * rng.lognormal(0, 1, size)


def _problem(size: int, seed: int, columns: int = 6) -> tuple[Array, Array]:
    x = _inputs(size, seed)
    return np.random.default_rng(seed + 1).normal(size=(size, columns)), x.T @ x / len(x)


def _reference(weight: Array, hessian: Array, form: Form, order: Array | None = None) -> Array:
    """Values by explicit elimination: after each row it leaves the inverse (Schur complement)."""
    size = len(weight)
    order = np.arange(size) if order is None else order
    damped = hessian + 0.01 * np.diag(hessian).mean() * np.eye(size)
    inverse = np.linalg.inv(damped)
    left, values = weight.copy(), np.empty_like(weight)
    rows = form.rows(size)
    grids = {}
    for step, i in enumerate(order):
        group = i // rows
        if group not in grids:
            source = left if rows < size else weight
            grids[group] = grid_of(source[group * rows : (group + 1) * rows], form)
        values[i] = grids[group].values(grids[group].codes(left[i]))
        rest = order[step + 1 :]
        error = (left[i] - values[i]) / inverse[i, i]
        left[rest] -= np.outer(inverse[rest, i], error)
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return values


@given(
    size=st.sampled_from([1, 2, 9, 24, 130]),
    seed=st.integers(0, 50),
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    group_size=st.sampled_from([0, 1, 4, 10]),
)
def test_codes_are_those_of_the_dense_reference_or_lose_less(
    size, seed, bits, symmetric, group_size
) -> None:
    weight, hessian = _problem(size, seed)
    form = Form(bits, symmetric, group_size, clip_search=False)
    found = gptq(weight, hessian, form, block_size=8).values()
    wanted = _reference(weight, hessian, form)
    if not np.allclose(found, wanted, rtol=1e-6, atol=1e-9):
        ours, theirs = (output_power(x - weight, hessian) for x in (found, wanted))
        assert ours <= theirs * (1 + 1e-6)  # a tie of roundings fell the other way


@pytest.mark.parametrize("block_size", [1, 7, 64, 1000])
@pytest.mark.parametrize("group_size", [0, 16])
def test_the_block_size_changes_no_code(block_size, group_size) -> None:
    weight, hessian = _problem(96, 3)
    form = Form(4, group_size=group_size)
    whole = gptq(weight, hessian, form)
    found = gptq(weight, hessian, form, block_size=block_size)
    np.testing.assert_array_equal(found.codes, whole.codes)
    np.testing.assert_array_equal(found.scale, whole.scale)


def test_the_order_of_activations_is_that_of_falling_power() -> None:
    weight, hessian = _problem(40, 5)
    form = Form(4, clip_search=False)
    order = np.argsort(-np.diag(hessian), kind="stable")
    found = gptq(weight, hessian, form, act_order=True).values()
    np.testing.assert_allclose(found, _reference(weight, hessian, form, order), rtol=1e-6)


def test_static_groups_keep_their_place_in_any_order() -> None:
    weight, hessian = _problem(40, 6)
    form = Form(4, symmetric=False, group_size=8)
    found = gptq(weight, hessian, form, act_order=True, static_groups=True)
    plain = nearest(weight, form)
    np.testing.assert_array_equal(found.scale, plain.scale)
    np.testing.assert_array_equal(found.zero, plain.zero)
    assert output_power(found.values() - weight, hessian) < output_power(
        plain.values() - weight, hessian
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("form", [Form(4), Form(3), Form(2, symmetric=False), Form(4, True, 16)])
def test_it_loses_less_of_the_output_than_rounding_to_nearest(form, seed) -> None:
    weight, hessian = _problem(64, seed, columns=32)
    found, plain = gptq(weight, hessian, form), nearest(weight, form)
    ours = output_power(found.values() - weight, hessian)
    assert ours < 0.9 * output_power(plain.values() - weight, hessian)


def test_uncorrelated_inputs_leave_nothing_to_make_up_for() -> None:
    weight, _ = _problem(32, 7)
    found = gptq(weight, np.eye(32) * 3.0, Form(4))
    np.testing.assert_array_equal(found.codes, nearest(weight, Form(4)).codes)


def test_an_input_that_is_always_zero_changes_nothing() -> None:
    x = _inputs(20, 8)
    x[:, 4] = 0
    weight = np.random.default_rng(9).normal(size=(20, 6))
    form = Form(4, clip_search=False)
    kept = np.delete(np.arange(20), 4)
    scaled = weight / np.abs(weight).max(axis=0)
    scaled[4] = 0.5  # not what decides a scale
    found = gptq(scaled, x.T @ x, form, damping=1e-9)
    alone = gptq(scaled[kept], (x.T @ x)[np.ix_(kept, kept)], form, damping=1e-9)
    np.testing.assert_array_equal(found.codes[kept], alone.codes)
    np.testing.assert_array_equal(found.codes[4], nearest(scaled, form).codes[4])


def test_fewer_tokens_than_features_are_enough() -> None:
    x = _inputs(64, 10, tokens=20)
    weight = np.random.default_rng(0).normal(size=(64, 8))
    found = gptq(weight, x.T @ x, Form(4)).values()
    plain = nearest(weight, Form(4)).values()
    assert np.square(x @ (found - weight)).sum() < np.square(x @ (plain - weight)).sum()


@given(size=st.integers(1, 200), seed=st.integers(0, 20))
def test_the_factor_is_that_of_the_inverse(size, seed) -> None:
    x = _inputs(size, seed, tokens=2 * size + 10)
    hessian = x.T @ x
    given_hessian = hessian.copy()
    factor = inverse_factor(hessian, 0.01)
    np.testing.assert_array_equal(hessian, given_hessian)
    damped = hessian + 0.01 * np.diag(hessian).mean() * np.eye(size)
    assert not np.tril(factor, -1).any()
    np.testing.assert_allclose(factor.T @ factor @ damped, np.eye(size), atol=1e-8)
    triangle = np.triu(np.random.default_rng(seed).normal(size=(size, size))) + 30 * np.eye(size)
    inverse = triangle.copy()
    invert_upper(inverse)
    np.testing.assert_allclose(inverse @ triangle, np.eye(size), atol=1e-9)


def test_refuses_activations_that_overflow() -> None:
    with pytest.raises(InputError) as caught:
        gptq(np.ones((2, 2)), np.full((2, 2), np.inf), Form(4))
    assert str(caught.value) == (
        "hessian: not finite; the activations of the calibration text overflow"
    )
    hessian = np.array([[1.0, -50.0], [-50.0, 1.0]])
    with pytest.raises(InputError, match="not positive definite"):
        gptq(np.ones((2, 2)), hessian, Form(4))
    assert hessian[0, 0] == hessian[1, 1] == 1
