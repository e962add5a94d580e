# SPDX-License-Identifier: Apache-2.0
"""Hadamard matrices are exact, plans exist for every size, transforms equal their matrices."""

import dataclasses
import hashlib
import math
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quarot_onnx.errors import UnsupportedModelError
from quarot_onnx.hadamard import (
    LARGEST_FACTOR,
    MAX_FACTOR,
    Plan,
    construction,
    fwht,
    hadamard_matrix,
    is_constructible,
    plan,
    random_orthogonal,
    randomized_signs,
)

# (hidden, intermediate or expert, heads, head_dim) of the models people deploy.
MODELS = {
    "Llama-2-7B": (4096, 11008, 32, 128),
    "Llama-2-13B": (5120, 13824, 40, 128),
    "Llama-2-70B, Llama-3-70B": (8192, 28672, 64, 128),
    "Llama-1-30B": (6656, 17920, 52, 128),
    "Llama-3.1-8B, Mistral-7B": (4096, 14336, 32, 128),
    "Llama-3.1-405B": (16384, 53248, 128, 128),
    "Llama-3.2-1B": (2048, 8192, 32, 64),
    "Llama-3.2-3B, Phi-4-mini": (3072, 8192, 24, 128),
    "Mistral-Nemo": (5120, 14336, 32, 128),
    "Mistral-Small-24B": (5120, 32768, 32, 128),
    "Qwen2.5-0.5B": (896, 4864, 14, 64),
    "Qwen2.5-1.5B": (1536, 8960, 12, 128),
    "Qwen2.5-3B, SmolLM3": (2048, 11008, 16, 128),
    "Qwen2.5-7B": (3584, 18944, 28, 128),
    "Qwen2.5-14B": (5120, 13824, 40, 128),
    "Qwen2.5-32B": (5120, 27648, 40, 128),
    "Qwen2.5-72B": (8192, 29568, 64, 128),
    "Qwen3-0.6B": (1024, 3072, 16, 128),
    "Qwen3-1.7B": (2048, 6144, 16, 128),
    "Qwen3-4B": (2560, 9728, 32, 128),
    "Qwen3-8B": (4096, 12288, 32, 128),
    "Qwen3-14B": (5120, 17408, 40, 128),
    "Qwen3-32B": (5120, 25600, 64, 128),
    "Qwen3-30B-A3B": (2048, 768, 32, 128),
    "Gemma-2-2B": (2304, 9216, 8, 256),
    "Gemma-2-9B": (3584, 14336, 16, 256),
    "Gemma-2-27B": (4608, 36864, 32, 128),
    "Gemma-3-1B": (1152, 6912, 4, 256),
    "Gemma-3-4B": (2560, 10240, 8, 256),
    "Gemma-3-12B": (3840, 15360, 16, 256),
    "Gemma-3-27B": (5376, 21504, 32, 128),
    "Phi-3-mini": (3072, 8192, 32, 96),
    "Phi-2": (2560, 10240, 32, 80),
    "Phi-3-medium, Phi-4": (5120, 17920, 40, 128),
    "TinyLlama-1.1B": (2048, 5632, 32, 64),
    "SmolLM2-135M": (576, 1536, 9, 64),
    "SmolLM2-360M": (960, 2560, 15, 64),
    "gpt-oss-20b": (2880, 2880, 64, 64),
    "DeepSeek-V2-Lite": (2048, 1408, 16, 128),
    "Falcon-7B": (4544, 18176, 71, 64),
    "OPT-125m": (768, 3072, 12, 64),
    "OPT-1.3b": (2048, 8192, 32, 64),
    "OPT-6.7b": (4096, 16384, 32, 128),
}
IMPOSSIBLE_HEADS = {14, 9, 15, 71}
# Odd parts that no product of orders up to 44 reaches within the size's factors of two.
LARGE_FACTORS = {
    6656: 52,
    11008: 172,
    53248: 52,
    4864: 76,
    18944: 148,
    9728: 76,
    17408: 68,
    4544: 284,
    18176: 284,
    52: 52,
}
DIMENSIONS = sorted({n for sizes in MODELS.values() for n in sizes})
FULL_DIMENSIONS = [n for n in DIMENSIONS if n not in IMPOSSIBLE_HEADS]
CONSTRUCTIBLE = [order for order in range(1, 257) if is_constructible(order)]
# Full, with one dense factor, two, a large one; block; padded; the identity.
VARIED = [
    plan(12),
    plan(96),
    plan(172),
    plan(320),
    plan(14),
    plan(42),
    plan(9 * 128),
    plan(37 * 8),
    plan(952),
    plan(15),
    plan(15, policy="pad"),
    plan(107 * 4, policy="pad"),
    plan(14, policy="full"),
    plan(1),
]


def is_power_of_two(n: int) -> bool:
    return n & (n - 1) == 0


def dense_factors(p: Plan) -> list[int]:
    return [factor for factor in p.factors if not is_power_of_two(factor)]


def rotation(p: Plan) -> np.ndarray:
    """R [size, padded_size], written out: the definition that ``apply`` must meet."""
    blocks = np.eye(p.padded_size // p.block_size)
    return np.kron(blocks, p.matrix())[: p.size]


def digest(order: int) -> str:
    return hashlib.sha256(hadamard_matrix(order).tobytes()).hexdigest()


# Matrices


@pytest.mark.parametrize(
    "order", sorted({*CONSTRUCTIBLE, *(f for n in FULL_DIMENSIONS for f in plan(n).factors)})
)
def test_matrix_is_exactly_hadamard(order):
    H = hadamard_matrix(order)
    assert H.shape == (order, order)
    assert H.dtype == np.int8
    assert set(np.unique(H)) <= {-1, 1}
    wide = H.astype(np.int64)
    assert np.array_equal(wide @ wide.T, order * np.eye(order, dtype=np.int64))


def test_every_order_to_256_is_constructible_but_the_two_that_need_other_methods():
    possible = {1, 2, *range(4, 257, 4)}
    assert possible - set(CONSTRUCTIBLE) == {188, 236}


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        (1, "sylvester"),
        (2, "sylvester"),
        (8, "sylvester"),  # although 7 is a prime, 3 mod 4
        (12, "paley1"),
        (28, "paley1"),  # GF(27)
        (36, "paley2"),
        (52, "paley2"),  # GF(25)
        (100, "paley2"),  # GF(49)
        (344, "paley1"),  # GF(343)
        (164, "paley1"),  # 163; also Paley II over GF(81)
        (92, "williamson"),
        (116, "williamson"),
        (156, "williamson"),
        (172, "williamson"),
        (40, "kronecker"),
        (96, "kronecker"),
    ],
)
def test_construction_is_the_first_that_applies(order, expected):
    assert construction(order) == expected


def test_sylvester_is_the_power_of_h2_and_kronecker_puts_the_smallest_factor_last():
    H2 = np.array([[1, 1], [1, -1]])
    assert np.array_equal(hadamard_matrix(8), np.kron(H2, np.kron(H2, H2)))
    assert np.array_equal(hadamard_matrix(40), np.kron(hadamard_matrix(20), H2))


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        (8, "7c99a8eda1a433af"),
        (12, "db7478025ce74776"),
        (20, "d04b560308676ee7"),
        (28, "75a65a7aa5dd6380"),
        (36, "1a7aed2f42a8c71d"),
        (40, "64b7ff1603aae0dc"),
        (52, "7aad05503190a3c5"),
        (100, "6d450d2e5355cc4a"),
        (172, "378ef12c7cc31f3e"),
    ],
)
def test_matrix_of_an_order_never_changes(order, expected):
    assert digest(order)[:16] == expected


def test_matrix_does_not_depend_on_what_was_built_before():
    before = {order: digest(order) for order in (28, 100, 172, 144)}
    for cached in (hadamard_matrix, construction, is_constructible):
        cached.cache_clear()
    assert {order: digest(order) for order in reversed(before)} == before


def test_matrix_is_cached_and_read_only():
    H = hadamard_matrix(12)
    assert hadamard_matrix(12) is H
    with pytest.raises(ValueError, match="read-only"):
        H[0, 0] = -1


@pytest.mark.parametrize("order", [12, 20, 28, 44, 172])
def test_matrix_need_not_be_symmetric(order):
    H = hadamard_matrix(order)
    assert not np.array_equal(H, H.T)


@pytest.mark.parametrize("order", [-4, 0, 3, 6, 14, 15, 71, 4090])
def test_refuses_an_impossible_order(order):
    assert not is_constructible(order)
    with pytest.raises(UnsupportedModelError) as refusal:
        hadamard_matrix(order)
    assert str(refusal.value) == (
        f"hadamard: order={order} is not 1, 2 or a multiple of 4, so no Hadamard matrix exists; "
        "use a block-diagonal plan or a dense orthogonal matrix"
    )


@pytest.mark.parametrize("order", [188, 236, 428, 668, 13696])
def test_refuses_an_order_with_no_construction_here(order):
    assert not is_constructible(order)
    with pytest.raises(UnsupportedModelError) as refusal:
        construction(order)
    assert str(refusal.value) == (
        f"hadamard: order={order} has no Sylvester, Paley, Williamson or Kronecker construction; "
        "use a block-diagonal plan or a dense orthogonal matrix"
    )


def test_constructible_agrees_with_construction_to_3000():
    for order in range(-3, 3001):
        try:
            construction(order)
        except UnsupportedModelError:
            assert not is_constructible(order)
        else:
            assert is_constructible(order)


def test_importing_needs_numpy_only():
    code = (
        "import sys, quarot_onnx.hadamard; assert not {'torch', 'onnx', 'scipy'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Plans


@pytest.mark.parametrize("model", MODELS)
def test_model_dimensions_have_full_plans_where_one_exists(model):
    for n in MODELS[model]:
        p = plan(n)
        if n in IMPOSSIBLE_HEADS:
            assert p.kind in {"block", "none"}
            assert "so no Hadamard matrix has this order" in p.reason
            continue
        assert (p.kind, p.reason) == ("full", "")
        assert p.block_size == p.padded_size == n
        largest = max(dense_factors(p), default=1)
        assert largest == LARGE_FACTORS[n] if n in LARGE_FACTORS else largest <= MAX_FACTOR
        assert p.cost <= n * n or len(p.factors) == 1


@pytest.mark.parametrize("core", [12, 20, 28, 36, 40, 44, 52, 60, 108, 140, 156, 172])
def test_classic_orders_times_powers_of_two_have_full_plans(core):
    for m in range(13):
        p = plan(core << m)
        assert p.kind == "full"
        assert p.block_size == core << m


@pytest.mark.parametrize(
    ("n", "factors", "split"),
    [
        (4096, (64, 64), (64, 64)),
        (8192, (64, 128), (64, 128)),
        (5632, (44, 2, 64), (88, 64)),
        (11008, (172, 64), (172, 64)),
        (13824, (12, 12, 12, 8), (144, 96)),
        (14336, (28, 4, 128), (112, 128)),
        (18944, (148, 128), (148, 128)),
        (27648, (12, 12, 12, 16), (144, 192)),
        (28672, (28, 8, 128), (224, 128)),
        (29568, (12, 28, 44, 2), (336, 88)),
        (96, (12, 8), (12, 8)),
        (40, (20, 2), (20, 2)),
    ],
)
def test_plan_is_the_balanced_product_of_small_factors(n, factors, split):
    p = plan(n)
    assert (p.factors, p.split) == (factors, split)
    assert p.cost == n * sum(split)
    assert p.suppression == math.sqrt(n)


def test_larger_max_factor_buys_a_lower_cost():
    assert plan(13824, max_factor=108).split == (108, 128)
    assert plan(13824, max_factor=108).cost < plan(13824).cost


@pytest.mark.parametrize(
    ("n", "factors", "reason"),
    [
        (
            14,
            (2,),
            "n=14 is not a multiple of 4, so no Hadamard matrix has this order; "
            "rotated as 7 blocks of 2",
        ),
        (15, (), "n=15 is odd, so no Hadamard matrix has this order; left unrotated"),
        (
            13696,
            (8, 16),
            "no Hadamard matrix of order 13696 is known with factors up to 1024; "
            "rotated as 107 blocks of 128",
        ),
        (
            44 * 107,  # not only the power of two: the largest divisor keeps the 11
            (44,),
            "no Hadamard matrix of order 4708 is known with factors up to 1024; "
            "rotated as 107 blocks of 44",
        ),
    ],
)
def test_plan_falls_back_to_the_largest_blocks_and_says_why(n, factors, reason):
    p = plan(n)
    assert p.kind == ("block" if factors else "none")
    assert (p.factors, p.reason) == (factors, reason)


def test_padding_goes_to_the_next_size_of_small_factors():
    p = plan(13696, policy="pad")
    assert (p.kind, p.size, p.padded_size, p.block_size) == ("padded", 13696, 13824, 13824)
    assert p.reason == (
        "no Hadamard matrix of order 13696 is known with factors up to 1024; "
        "padded with 128 zeros to 13824"
    )
    assert plan(11008, policy="pad") == plan(11008)


def test_padding_is_the_least_possible():
    sizes = [n for n in range(1, 2500) if max(dense_factors(plan(n)), default=1) <= MAX_FACTOR]
    sizes = [n for n in sizes if plan(n).kind == "full"]
    for n in range(1, 2049):
        expected = n if plan(n).kind == "full" else min(size for size in sizes if size >= n)
        assert plan(n, policy="pad").padded_size == expected


def test_full_policy_leaves_what_it_cannot_rotate():
    p = plan(14, policy="full")
    assert (p.kind, p.factors, p.split, p.cost, p.suppression) == ("none", (), (1, 1), 0, 1)
    assert p.reason.endswith("; left unrotated")
    assert plan(12, policy="full").kind == "full"


def test_every_size_to_40000_has_a_plan_quickly():
    start = time.perf_counter()
    plans = {
        policy: [plan(n, policy=policy) for n in range(1, 40001)]
        for policy in ("block", "pad", "full")
    }
    assert time.perf_counter() - start < 10
    for policy, swept in plans.items():
        for n, p in enumerate(swept, start=1):
            assert p.size == n
            assert p.padded_size % p.block_size == 0
            assert (p.reason == "") == (p.kind == "full")
            assert p.padded_size == n or (policy, p.block_size) == ("pad", p.padded_size)
            for factor in p.factors:
                assert is_power_of_two(factor) or factor <= LARGEST_FACTOR
                assert construction(factor) != "kronecker"
    for block, pad, full in zip(*plans.values(), strict=True):
        assert (block.kind == "full") == (pad.kind == "full") == (full.kind == "full")
        assert (block.kind == "none") == (block.size % 2 == 1 and block.size > 1)
        assert pad.kind in {"full", "padded"}
        assert full.kind in {"full", "none"}


def test_blocks_are_the_largest_divisor_with_a_full_plan():
    for n in range(1, 1500):
        divisors = [d for d in range(1, n + 1) if n % d == 0]
        assert plan(n).block_size == max(d for d in divisors if plan(d).kind == "full")


@given(st.integers(1, 1 << 24), st.integers(4, 200), st.sampled_from(["block", "pad", "full"]))
@settings(max_examples=200, deadline=None)
def test_split_is_the_cheapest_prefix(n, max_factor, policy):
    p = plan(n, max_factor=max_factor, policy=policy)
    prefixes = [math.prod(p.factors[:i]) for i in range(len(p.factors) + 1)]
    assert p.split[0] in prefixes
    assert math.prod(p.split) == p.block_size == math.prod(p.factors)
    assert sum(p.split) == min(a + p.block_size // a for a in prefixes)


def test_plan_is_rebuilt_from_the_factors_alone():
    p = plan(13824)
    assert Plan(13824, (12, 12, 12, 8), 13824) == p
    assert Plan(2 * 13824, p.factors, 2 * 13824).kind == "block"
    with pytest.raises(dataclasses.FrozenInstanceError):
        p.size = 1


def test_refuses_factors_that_do_not_divide_the_size():
    with pytest.raises(UnsupportedModelError) as refusal:
        Plan(100, (12, 2), 100)
    assert str(refusal.value) == (
        "hadamard: factors (12, 2) do not make blocks of 100 features for n=100; "
        "use the factors of hadamard.plan(100)"
    )


@pytest.mark.parametrize("n", [0, -4])
def test_refuses_a_size_that_is_not_positive(n):
    with pytest.raises(UnsupportedModelError) as refusal:
        plan(n)
    assert str(refusal.value) == f"hadamard: n={n} features cannot be rotated; give n >= 1"


# Transforms


@pytest.mark.parametrize("p", VARIED, ids=lambda p: f"{p.kind}-{p.size}")
def test_matrices_are_orthonormal_and_make_the_matrix(p):
    A, B = p.matrices()
    assert (len(A), len(B)) == p.split
    for M in (A, B, p.matrix()):
        assert M.dtype == np.float64
        assert np.array_equal(np.abs(M), np.full(M.shape, 1 / math.sqrt(len(M))))
        np.testing.assert_allclose(M @ M.T, np.eye(len(M)), atol=1e-13)
    canonical = np.ones((1, 1))
    for factor in p.factors:
        canonical = np.kron(canonical, hadamard_matrix(factor))
    assert np.array_equal(np.sign(p.matrix()), canonical)
    np.testing.assert_allclose(p.matrix(), np.kron(A, B), rtol=1e-15)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("p", VARIED, ids=lambda p: f"{p.kind}-{p.size}")
def test_apply_equals_the_matrix_product(p, dtype):
    R = rotation(p)
    x = np.random.default_rng(p.size).standard_normal((2, 3, p.size)).astype(dtype)
    y = p.apply(x)
    bound = 8 * np.finfo(dtype).eps * math.sqrt(p.block_size)
    assert (y.dtype, y.shape) == (dtype, (2, 3, p.padded_size))
    np.testing.assert_allclose(y, x.astype(np.float64) @ R, rtol=0, atol=bound)


@pytest.mark.parametrize("p", VARIED, ids=lambda p: f"{p.kind}-{p.size}")
def test_axis_0_rotates_a_weight_so_that_its_product_stays(p):
    generator = np.random.default_rng(1)
    x, W = generator.standard_normal((4, p.size)), generator.standard_normal((p.size, 7))
    rotated = p.apply(W, axis=0)
    np.testing.assert_allclose(rotated, rotation(p).T @ W, rtol=0, atol=1e-13)
    np.testing.assert_allclose(p.apply(x) @ rotated, x @ W, rtol=0, atol=1e-11)


@given(
    n=st.integers(1, 700),
    rows=st.integers(0, 9),
    policy=st.sampled_from(["block", "pad", "full"]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_apply_keeps_inner_products_of_any_size(n, rows, policy, seed):
    p = plan(n, policy=policy)
    x = np.random.default_rng(seed).standard_normal((rows, n))
    y = p.apply(x)
    np.testing.assert_allclose(y @ y.T, x @ x.T, rtol=0, atol=1e-10)
    np.testing.assert_allclose(y, x @ rotation(p), rtol=0, atol=1e-12)


@pytest.mark.parametrize("p", [plan(28 * 128), plan(12), plan(107 * 4, policy="pad")])
def test_apply_gives_the_same_in_one_piece_and_in_many(p, monkeypatch):
    x = np.random.default_rng(2).standard_normal((11, p.size))
    whole, whole_0 = p.apply(x), p.apply(x.T, axis=0)
    monkeypatch.setattr("quarot_onnx.hadamard._LARGEST_PRODUCT", 1)
    np.testing.assert_allclose(p.apply(x), whole, rtol=0, atol=1e-13)
    np.testing.assert_allclose(p.apply(x.T, axis=0), whole_0, rtol=0, atol=1e-13)
    np.testing.assert_allclose(whole_0, whole.T, rtol=0, atol=1e-13)


@pytest.mark.parametrize("n", [12, 172, 28 * 8])
def test_the_inverse_is_the_transpose_and_not_the_matrix_again(n):
    p = plan(n)
    x = np.random.default_rng(3).standard_normal((2, n))
    np.testing.assert_allclose(p.apply(x) @ p.matrix().T, x, atol=1e-12)
    assert np.abs(p.apply(p.apply(x)) - x).max() > 0.1


def test_apply_takes_a_strided_view_and_leaves_its_input():
    p = plan(96)
    base = np.random.default_rng(4).standard_normal((6, 192))
    before = base.copy()
    np.testing.assert_allclose(p.apply(base[::2, ::2]), base[::2, ::2] @ p.matrix(), atol=1e-13)
    assert np.array_equal(base, before)
    assert np.shares_memory(plan(15).apply(np.ones((2, 15))), base) is False


@pytest.mark.parametrize("n", [64, 172, 14 * 64, 107 * 128])
def test_spike_shrinks_by_the_suppression(n):
    p = plan(n)
    spike = np.zeros(n)
    spike[n // 3] = 100.0
    assert np.abs(p.apply(spike)).max() == pytest.approx(100 / p.suppression, rel=1e-12)


@pytest.mark.parametrize(
    ("x", "axis", "message"),
    [
        (
            np.zeros((2, 12), np.float16),
            -1,
            "hadamard: dtype=float16 is not float32 or float64; convert the array first",
        ),
        (
            np.zeros((2, 10)),
            -1,
            "hadamard: axis -1 of an array of shape (2, 10) does not have the 12 features of the "
            "plan; use the plan of that axis' own size",
        ),
        (
            np.zeros((10, 12)),
            0,
            "hadamard: axis 0 of an array of shape (10, 12) does not have the 12 features of the "
            "plan; use the plan of that axis' own size",
        ),
        (
            np.zeros((12, 2, 2)),
            0,
            "hadamard: axis=0 of an array of shape (12, 2, 2) cannot be rotated; "
            "use the last axis, or axis 0 of a matrix",
        ),
    ],
)
def test_refuses_an_array_that_the_plan_does_not_fit(x, axis, message):
    with pytest.raises(UnsupportedModelError) as refusal:
        plan(12).apply(x, axis)
    assert str(refusal.value) == message


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [1, 2, 8, 128, 2048])
def test_fwht_is_the_sylvester_product(n, dtype):
    x = np.random.default_rng(5).standard_normal((3, 2, n)).astype(dtype)
    before = x.copy()
    y = fwht(x)
    bound = 16 * np.finfo(dtype).eps * math.log2(2 * n)
    expected = x.astype(np.float64) @ (hadamard_matrix(n) / math.sqrt(n))
    assert y.dtype == dtype
    np.testing.assert_allclose(y, expected, rtol=0, atol=bound)
    np.testing.assert_allclose(fwht(y), x, rtol=0, atol=2 * bound)
    np.testing.assert_allclose(y, plan(n).apply(x), rtol=0, atol=2 * bound)
    assert np.array_equal(x, before)


def test_fwht_refuses_other_sizes_and_dtypes():
    with pytest.raises(UnsupportedModelError) as refusal:
        fwht(np.zeros((2, 12)))
    assert str(refusal.value) == (
        "hadamard: n=12 is not a power of two; use hadamard.plan(12).apply"
    )
    with pytest.raises(UnsupportedModelError, match="dtype=int64 is not float32 or float64"):
        fwht(np.zeros((2, 8), np.int64))


# Randomness


def test_signs_are_those_of_their_seed_and_site():
    signs = randomized_signs(16, 0, "R1")
    assert "".join("+" if sign > 0 else "-" for sign in signs) == "-+--++++-+-+-++-"
    assert signs.dtype == np.float64
    assert np.array_equal(randomized_signs(16, 0, "R1"), signs)
    for other in (randomized_signs(16, 1, "R1"), randomized_signs(16, 0, "R2")):
        assert not np.array_equal(other, signs)
    many = randomized_signs(100_000, 7)
    assert set(many) == {-1.0, 1.0}
    assert abs(many.mean()) < 5 / math.sqrt(100_000)


def test_random_orthogonal_is_orthonormal_and_that_of_its_seed_and_site():
    Q = random_orthogonal(96, 3)
    np.testing.assert_allclose(Q @ Q.T, np.eye(96), atol=1e-13)
    assert np.array_equal(Q, random_orthogonal(96, 3))
    assert not np.array_equal(Q, random_orthogonal(96, 4))
    assert not np.array_equal(Q, random_orthogonal(96, 3, "R1"))


def test_random_orthogonal_is_haar_and_not_the_bare_qr():
    # Under Haar measure E[Q_00] = 0; LAPACK's own signs make it negative every time.
    corner = [random_orthogonal(3, seed)[0, 0] for seed in range(300)]
    assert abs(np.mean(corner)) < 5 * math.sqrt(1 / 3 / 300)


def test_random_streams_refuse_a_negative_seed():
    for draw in (randomized_signs, random_orthogonal):
        with pytest.raises(UnsupportedModelError) as refusal:
            draw(4, -1)
        assert str(refusal.value) == "hadamard: seed=-1 is negative; give 0 or more"
