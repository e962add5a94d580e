# SPDX-License-Identifier: Apache-2.0
"""Grids of groups: what a code stands for, and how far rounding to nearest is from the weight."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quarot_onnx.quantizers.form import Form
from quarot_onnx.quantizers.grid import grid_of, nearest
from quarot_onnx.quantizers.rtn import rtn

FORMS = st.builds(
    Form,
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    group_size=st.sampled_from([0, 1, 3, 4, 8, 100]),
    clip_search=st.just(False),
)


def _weight(rows: int, columns: int, seed: int, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1, (rows, columns))


@given(
    form=FORMS,
    rows=st.sampled_from([1, 7, 12, 24]),
    seed=st.integers(0, 99),
    shift=st.floats(-3, 3),
)
def test_an_entry_is_at_most_half_a_step_from_its_value(form, rows, seed, shift) -> None:
    weight = _weight(rows, 5, seed, shift)
    found = nearest(weight, form)
    groups = rows // form.rows(rows)
    assert found.scale.shape == found.zero.shape == (groups, 5)
    assert found.codes.min() >= -(2 ** (form.bits - 1))
    assert found.codes.max() <= 2 ** (form.bits - 1) - 1
    step = np.repeat(found.scale, rows // groups, axis=0)
    # The zero point of an asymmetric range is rounded, too: an end of the range loses up to a half.
    room = 0.5 if form.symmetric else 1.0
    assert (np.abs(found.values() - weight) <= step * (room + 1e-5)).all()
    if form.symmetric:
        assert not found.zero.any()


@pytest.mark.parametrize(
    ("in_features", "group_size", "rows"),
    [(688, 128, 86), (688, 64, 43), (688, 32, 16), (256, 128, 128), (7, 128, 7), (10, 0, 10)],
)
def test_groups_are_the_largest_equal_parts_up_to_their_size(in_features, group_size, rows) -> None:
    assert Form(4, group_size=group_size).rows(in_features) == rows


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rows", [40, 600])
def test_the_clip_is_the_best_of_the_grid(symmetric, rows) -> None:
    weight = _weight(rows, 6, 0) ** 3
    form = Form(4, symmetric, clip_search=True)
    found = nearest(weight, form).values()
    errors = []
    for percent in range(100, 20, -1):
        clip = percent / 100
        if symmetric:
            scale = np.abs(weight).max(axis=0) * clip / 7
            rounded = np.clip(np.rint(weight / scale), -8, 7) * scale
        else:
            low = np.minimum(weight.min(axis=0), 0) * clip
            scale = (np.maximum(weight.max(axis=0), 0) * clip - low) / 15
            zero = np.rint(-low / scale)
            rounded = (np.clip(np.rint(weight / scale) + zero, 0, 15) - zero) * scale
        errors.append(np.square(rounded - weight).sum(axis=0))
    best = np.min(errors, axis=0)
    np.testing.assert_allclose(np.square(found - weight).sum(axis=0), best, rtol=1e-5)


@pytest.mark.parametrize("clip_search", [True, False])
def test_one_symmetric_group_is_the_common_form(clip_search) -> None:
    weight = _weight(600, 8, 1)
    codes, scale = rtn(weight, bits=4, clip_search=clip_search)
    found = nearest(weight, Form(4, clip_search=clip_search))
    np.testing.assert_array_equal(found.codes, codes)
    np.testing.assert_array_equal(found.scale[0], scale)


def test_zeros_stay_zeros() -> None:
    for form in (Form(4), Form(4, symmetric=False), Form(2, symmetric=False, group_size=2)):
        found = nearest(np.zeros((4, 3)), form)
        assert not found.values().any()
        assert (found.scale == 1).all()


def test_zero_is_always_a_value_of_an_asymmetric_grid() -> None:
    grid = grid_of(_weight(20, 4, 2, shift=5.0), Form(4, symmetric=False, clip_search=False))
    assert not grid.values(grid.codes(np.zeros((1, 4)))).any()
