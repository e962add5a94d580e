# SPDX-License-Identifier: Apache-2.0
"""Rotations are orthogonal, in float64, and determined by seed and site."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quarot_onnx.hadamard import random_orthogonal
from quarot_onnx.rotation import Rotation

KINDS = [
    "hadamard",
    "randomized_hadamard",
    "random_orthogonal",
    "walsh",
    "grouped_walsh",
    "dct",
    "identity",
]
SIZES = [2, 8, 12, 90, 96, 172]


def _matrix(rotation: Rotation) -> np.ndarray:
    return rotation.rotate_outputs(np.eye(rotation.size))


@pytest.mark.parametrize("kind", KINDS)
@given(size=st.sampled_from(SIZES), seed=st.integers(0, 3))
@settings(max_examples=12, deadline=None)
def test_is_orthogonal_to_float64_rounding(kind, size, seed) -> None:
    Q = _matrix(Rotation(kind, size, seed, "R1", group_size=2))
    assert Q.dtype == np.float64
    np.testing.assert_allclose(Q @ Q.T, np.eye(size), atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
@given(size=st.sampled_from(SIZES), out_features=st.integers(1, 5))
@settings(max_examples=12, deadline=None)
def test_inputs_undo_what_outputs_do(kind, size, out_features) -> None:
    rng = np.random.default_rng(0)
    rotation = Rotation(kind, size, 0, "R1", group_size=2)
    x, W = rng.normal(size=(3, size)), rng.normal(size=(size, out_features))
    np.testing.assert_allclose(
        rotation.rotate_outputs(x) @ rotation.rotate_inputs(W), x @ W, atol=1e-12
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_bias_turns_like_a_row_of_outputs(kind) -> None:
    rotation = Rotation(kind, 12, 0, "R1", group_size=4)
    bias = np.random.default_rng(0).normal(size=12)
    np.testing.assert_allclose(
        rotation.rotate_outputs(bias), rotation.rotate_outputs(bias[None])[0], atol=1e-15
    )


def test_a_hadamard_has_entries_of_one_size() -> None:
    for kind in ("hadamard", "randomized_hadamard"):
        np.testing.assert_allclose(np.abs(_matrix(Rotation(kind, 96, 0, "R1"))), 96**-0.5)


def test_random_signs_make_a_hadamard_random() -> None:
    plain = _matrix(Rotation("hadamard", 16, 0, "R1"))
    signed = _matrix(Rotation("randomized_hadamard", 16, 0, "R1"))
    signs = (signed / plain)[:, 0]
    np.testing.assert_array_equal(signed, signs[:, None] * plain)
    assert set(signs) == {-1, 1}


@pytest.mark.parametrize("kind", ["randomized_hadamard", "random_orthogonal"])
def test_seed_and_site_decide(kind) -> None:
    first = _matrix(Rotation(kind, 32, 1, "R1"))
    np.testing.assert_array_equal(first, _matrix(Rotation(kind, 32, 1, "R1")))
    assert not np.array_equal(first, _matrix(Rotation(kind, 32, 2, "R1")))
    assert not np.array_equal(first, _matrix(Rotation(kind, 32, 1, "R2")))


def test_an_order_without_a_hadamard_matrix_is_a_random_orthogonal_one_and_says_so() -> None:
    rotation = Rotation("randomized_hadamard", 90, 0, "R1")
    assert rotation.plan is None
    assert rotation.describe() == "random orthogonal 90"


def test_describes_kind_and_factors() -> None:
    assert Rotation("randomized_hadamard", 96, 0, "R1").describe() == "randomized hadamard 12 x 8"


@pytest.mark.parametrize("size", [8, 12, 64])
def test_a_walsh_matrix_is_a_hadamard_matrix_sorted_by_sign_changes(size) -> None:
    plain = _matrix(Rotation("hadamard", size, 0, "R1"))
    walsh = _matrix(Rotation("walsh", size, 0, "R1"))
    columns = [sorted(np.sign(matrix).T.tolist()) for matrix in (plain, walsh)]
    assert columns[0] == columns[1]
    changes = (np.diff(np.sign(walsh), axis=0) != 0).sum(axis=0)
    assert (np.diff(changes) >= 0).all()
    if size in (8, 64):
        np.testing.assert_array_equal(changes, np.arange(size))


def test_a_grouped_walsh_matrix_mixes_within_groups_only() -> None:
    grouped = _matrix(Rotation("grouped_walsh", 24, 0, "R1", group_size=8))
    block = _matrix(Rotation("walsh", 8, 0, "R1"))
    np.testing.assert_array_equal(grouped, np.kron(np.eye(3), block))


def test_a_group_is_the_largest_divisor_up_to_the_size_asked_for() -> None:
    assert Rotation("grouped_walsh", 24, 0, "R1", group_size=16).block_size == 12
    assert Rotation("grouped_walsh", 24, 0, "R1", group_size=128).block_size == 24


def test_the_first_cosine_is_constant_and_the_second_falls() -> None:
    cosines = _matrix(Rotation("dct", 6, 0, "R1"))
    np.testing.assert_allclose(cosines[:, 0], 6**-0.5)
    np.testing.assert_allclose(cosines[:, 1], -cosines[::-1, 1], atol=1e-15)
    assert (np.diff(cosines[:, 1]) < 0).all()


def test_a_given_matrix_is_used_as_it_is() -> None:
    matrix = random_orthogonal(8, 0)
    rotation = Rotation("given", 8, 0, "R1", matrix=matrix)
    assert rotation.plan is None
    np.testing.assert_array_equal(_matrix(rotation), matrix)
