# SPDX-License-Identifier: Apache-2.0
"""Weight quantizers: the clip search is exact over its grid, the error is bounded."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from quarot_onnx.quantizers.rtn import best_clip, qmax, rtn

Float64 = NDArray[np.float64]

BITS = st.integers(2, 8)
GRID = 1 - np.arange(80) / 100


@st.composite
def weights(draw: st.DrawFn) -> Float64:
    """[in_features, out_features] with columns of every kind that checkpoints have."""
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    rows, columns = draw(st.integers(1, 60)), draw(st.integers(1, 6))
    weight = rng.normal(size=(rows, columns)) * 10.0 ** rng.integers(-6, 6, columns)
    for column in range(columns):
        kind = draw(
            st.sampled_from(["normal", "zero", "constant", "outlier", "float16", "one sign"])
        )
        if kind == "zero":
            weight[:, column] = 0
        elif kind == "constant":
            weight[:, column] = draw(st.sampled_from([-0.3, 1.0, 7.0]))
        elif kind == "outlier":
            weight[rng.integers(rows), column] *= 50
        elif kind == "float16":
            weight[:, column] = rng.normal(size=rows).astype(np.float16)
        elif kind == "one sign":
            weight[:, column] = np.abs(weight[:, column])
    return weight


def squared_error(weight: Float64, factor: Float64, bits: int) -> Float64:
    """Per column, of rounding with the range factor * max|w|, as the definition says."""
    largest = np.abs(weight).max(axis=0)
    scale = np.where(largest == 0, 1, largest * factor / qmax(bits))
    codes = np.clip(np.rint(weight / scale), -qmax(bits) - 1, qmax(bits))
    return np.asarray(((weight - codes * scale) ** 2).sum(axis=0))


@given(weight=weights(), bits=BITS)
@settings(max_examples=80, deadline=None)
def test_best_clip_has_the_least_squared_error_of_the_whole_grid(weight, bits) -> None:
    factor = best_clip(weight, bits=bits)
    assert np.isin(np.round(factor * 100), np.round(GRID * 100)).all()
    least = np.min([squared_error(weight, f, bits) for f in GRID], axis=0)
    found = squared_error(weight, factor, bits)
    energy = (weight**2).sum(axis=0)
    assert (found <= least + 1e-12 * energy).all()


def test_best_clip_is_the_same_in_blocks_of_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(0).normal(size=(64, 37))
    whole = best_clip(weight, bits=4)
    monkeypatch.setattr(
        "quarot_onnx.quantizers.rtn._HISTOGRAM_ENTRIES", 1 << 14
    )  # 5 columns at a time
    np.testing.assert_array_equal(best_clip(weight, bits=4), whole)


def test_a_gaussian_column_is_clipped_at_4_bits_and_hardly_at_8() -> None:
    weight = np.random.default_rng(1).normal(size=(4096, 8))
    assert best_clip(weight, bits=4).max() < 0.9
    assert best_clip(weight, bits=8).min() > best_clip(weight, bits=4).max()


def test_a_column_that_lies_on_the_grid_is_not_clipped() -> None:
    weight = np.arange(-7.0, 8.0)[:, None] * [[0.5, 3.0]]
    np.testing.assert_array_equal(best_clip(weight, bits=4), [1, 1])


@given(weight=weights(), bits=BITS, clip_search=st.booleans())
@settings(max_examples=80, deadline=None)
def test_rounding_error_is_half_a_step_inside_the_clip(weight, bits, clip_search) -> None:
    codes, scale = rtn(weight, bits=bits, clip_search=clip_search)
    assert codes.dtype == np.int8
    assert scale.dtype == np.float32
    assert codes.min() >= -qmax(bits) - 1
    assert codes.max() <= qmax(bits)
    step = scale.astype(np.float64)
    inside = (weight >= -(qmax(bits) + 1.5) * step) & (weight <= (qmax(bits) + 0.5) * step)
    error = np.abs(weight - codes * step)
    assert (error <= step * 0.5 * (1 + 1e-6))[inside].all()
    if not clip_search:
        assert inside.all()


@given(weight=weights(), bits=BITS)
@settings(max_examples=80, deadline=None)
def test_the_clip_search_is_never_worse_than_no_clip(weight, bits) -> None:
    def error(clip_search: bool) -> Float64:
        codes, scale = rtn(weight, bits=bits, clip_search=clip_search)
        return np.asarray(((weight - codes * scale.astype(np.float64)) ** 2).sum(axis=0))

    slack = 1e-6 * (weight**2).sum(axis=0)  # scales are rounded to float32
    assert (error(True) <= error(False) + slack).all()


def test_a_channel_of_zeros_has_scale_one() -> None:
    codes, scale = rtn(np.zeros((5, 2)), bits=4)
    assert (scale == 1).all()
    assert (codes == 0).all()


def test_a_channel_too_small_for_float32_has_scale_one() -> None:
    codes, scale = rtn(np.full((5, 1), 1e-60), bits=4)
    assert (scale == 1).all()
    assert (codes == 0).all()


@pytest.mark.parametrize(("bits", "largest"), [(2, 1), (4, 7), (6, 31), (8, 127)])
def test_qmax_is_the_largest_code(bits, largest) -> None:
    assert qmax(bits) == largest
    codes, _ = rtn(np.linspace(-1, 1, 999)[:, None], bits=bits, clip_search=False)
    assert (codes.min(), codes.max()) == (-largest, largest)
