# SPDX-License-Identifier: Apache-2.0
"""The INT4 cache: codes to the bit, attention against ``ops``, in place and in bounds."""

import dataclasses
import math
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quarot_onnx import ops
from quarot_onnx.errors import UnsupportedModelError
from quarot_onnx.hadamard import hadamard_matrix
from quarot_onnx.plugins import layouts
from quarot_onnx.plugins.kernels import Dtype, HadamardPlan, KvCache
from quarot_onnx.plugins.layouts import Layout
from tests.kernels.reference import NUMPY, mismatches, rotate

BOTH: Final = [Dtype.FP16, Dtype.BF16]
HEAD_DIMS: Final = [64, 128, 256]


def values_of(shape: tuple[int, ...], dtype: Dtype, seed: int = 0) -> np.ndarray:
    """Gaussians whose size varies from token to token by a factor of a thousand."""
    random = np.random.default_rng([*shape, seed])
    size = np.exp(random.uniform(-4, 3, (*shape[:-1], 1)))
    return (random.standard_normal(shape) * size + random.standard_normal((*shape[:-1], 1))).astype(
        NUMPY[dtype]
    )


def rotated_heads(x: np.ndarray) -> np.ndarray:
    """x [..., d] times the orthonormal Hadamard matrix of d, float64."""
    return rotate(x, (x.shape[-1],)) / math.sqrt(x.shape[-1])


class Cache:
    """A poisoned cache of both tensors, where kernels can reach it."""

    def __init__(self, library, batch: int, kv_heads: int, capacity: int, head_dim: int) -> None:
        self.capacity, self.head_dim, self.kv_heads, self.batch = (
            capacity,
            head_dim,
            kv_heads,
            batch,
        )
        self.held = [
            {
                "codes": library.put(
                    np.full((batch, kv_heads, capacity, head_dim // 2), 0xEE, np.uint8)
                ),
                "scale": library.put(np.full((batch, kv_heads, capacity), np.nan, np.float32)),
                "zero": library.put(np.full((batch, kv_heads, capacity), np.nan, np.float32)),
            }
            for _ in range(2)
        ]
        self.key, self.value = (
            KvCache(t["codes"].pointer, t["scale"].pointer, t["zero"].pointer) for t in self.held
        )

    def read(self, part: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        tensors = self.held[part]
        return tensors["codes"].read(), tensors["scale"].read(), tensors["zero"].read()

    def portable(self, part: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As ``ops`` has it; positions that were never written hold zeros."""
        codes, scale, zero = (a[:, :, :length] for a in self.read(part))
        unwritten = np.isnan(scale)
        return (
            np.where(unwritten[..., None], np.uint8(0), codes),
            np.where(unwritten, np.float32(1), scale)[..., None],
            np.where(unwritten, np.float32(0), zero)[..., None],
        )

    def append(self, library, dtype: Dtype, k: np.ndarray, v: np.ndarray, **options: Any) -> None:
        """k and v [batch, kv_heads, tokens, head_dim]."""
        batch, kv_heads, tokens, head_dim = k.shape
        held = library.put(k), library.put(v)
        if (lengths := options.pop("lengths", None)) is not None:
            lengths = library.put(np.array(lengths, np.int32))
            options["lengths"] = lengths.pointer
        library.kernels.kv_append(
            dtype,
            held[0].pointer,
            held[1].pointer,
            batch=batch,
            kv_heads=kv_heads,
            head_dim=head_dim,
            tokens=tokens,
            capacity=self.capacity,
            strides=(kv_heads * tokens * head_dim, tokens * head_dim, head_dim),
            key=self.key,
            value=self.value,
            **options,
        )
        held[0].read()


# Append


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("tokens", [1, 3, 9])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", BOTH)
def test_appended_values_have_the_codes_scale_and_zero_of_ops(
    library, dtype, head_dim, tokens, seed
):
    library.configure(seed=seed)
    cache = Cache(library, 2, 3, 16, head_dim)
    k, v = (values_of((2, 3, tokens, head_dim), dtype, s) for s in (seed, seed + 10))
    cache.append(library, dtype, k, v, start=4)
    for part, new in enumerate((k, v)):
        codes, scale, zero = cache.read(part)
        want_codes, want_scale, want_zero = ops.quantize_kv(new.astype(np.float32))
        assert (codes[:, :, 4 : 4 + tokens] == ops.pack_kv(want_codes)).all()
        assert (scale[:, :, 4 : 4 + tokens] == want_scale[..., 0]).all()
        assert (zero[:, :, 4 : 4 + tokens] == want_zero[..., 0]).all()
        for outside in (slice(None, 4), slice(4 + tokens, None)):
            assert (codes[:, :, outside] == 0xEE).all()
            assert np.isnan(scale[:, :, outside]).all()
            assert np.isnan(zero[:, :, outside]).all()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rotated_integers_have_the_very_codes_of_ops(library, head_dim):
    # Sums of integers are exact in any order: R3 and the quantizer leave nothing to chance.
    library.configure(seed=1)
    random = np.random.default_rng(head_dim)
    k, v = (random.integers(-3, 4, (1, 2, 7, head_dim)).astype(np.float16) for _ in range(2))
    cache = Cache(library, 1, 2, 8, head_dim)
    cache.append(library, Dtype.FP16, k, v, rotate_k=True)
    norm = np.float32(1 / math.sqrt(head_dim))
    rotated = rotate(k, (head_dim,)).astype(np.float32) * norm
    for part, new in enumerate((rotated, v.astype(np.float32))):
        codes, scale, zero = cache.read(part)
        want_codes, want_scale, want_zero = ops.quantize_kv(new)
        assert (codes[:, :, :7] == ops.pack_kv(want_codes)).all()
        assert (scale[:, :, :7] == want_scale[..., 0]).all()
        assert (zero[:, :, :7] == want_zero[..., 0]).all()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", BOTH)
def test_rotated_keys_are_within_half_a_step_of_float64(library, dtype, head_dim):
    k, v = (values_of((2, 2, 9, head_dim), dtype, s) for s in (1, 2))
    cache = Cache(library, 2, 2, 12, head_dim)
    cache.append(library, dtype, k, v, rotate_k=True, clip_ratio=1.0)
    codes, scale, zero = cache.portable(0, 9)
    got = (ops.unpack_kv(codes).astype(np.float64) - zero) * scale
    # The zero point is rounded too, so the range moves by up to half a step at its ends.
    assert (np.abs(got - rotated_heads(k)) <= 1.001 * scale).all()
    assert (np.abs(got - rotated_heads(k)) <= 0.501 * scale).mean() > 0.9


def test_each_sequence_appends_behind_its_own_length(library):
    cache = Cache(library, 3, 2, 8, 64)
    k, v = (values_of((3, 2, 2, 64), Dtype.FP16, s) for s in (1, 2))
    cache.append(library, Dtype.FP16, k, v, lengths=[0, 5, 3])
    codes, _, _ = cache.read(0)
    want = ops.pack_kv(ops.quantize_kv(k.astype(np.float32))[0])
    for b, length in enumerate([0, 5, 3]):
        assert (codes[b, :, length : length + 2] == want[b]).all()
        assert (codes[b, :, :length] == 0xEE).all()
        assert (codes[b, :, length + 2 :] == 0xEE).all()


def test_tokens_beyond_the_capacity_are_dropped(library):
    cache = Cache(library, 2, 2, 8, 64)
    k, v = (values_of((2, 2, 4, 64), Dtype.FP16, s) for s in (1, 2))
    cache.append(library, Dtype.FP16, k, v, lengths=[6, 8])
    codes, scale, _ = cache.read(1)
    want = ops.pack_kv(ops.quantize_kv(v.astype(np.float32))[0])
    assert (codes[0, :, 6:] == want[0, :, :2]).all()
    assert (codes[0, :, :6] == 0xEE).all()
    assert (codes[1] == 0xEE).all()
    assert np.isnan(scale[1]).all()


def test_a_zero_token_has_scale_one_and_zero_point_zero(library):
    cache = Cache(library, 1, 1, 4, 128)
    k = np.zeros((1, 1, 2, 128), np.float16)
    k[0, 0, 1] = 3  # one sign only: the range still includes 0
    cache.append(library, Dtype.FP16, k, -k)
    for part, new in enumerate((k, -k)):
        codes, scale, zero = cache.read(part)
        want_codes, want_scale, want_zero = ops.quantize_kv(new.astype(np.float32))
        assert (codes[:, :, :2] == ops.pack_kv(want_codes)).all()
        assert (scale[:, :, :2] == want_scale[..., 0]).all()
        assert (zero[:, :, :2] == want_zero[..., 0]).all()
    assert cache.read(0)[1][0, 0, 0] == 1


def test_keys_are_read_through_their_strides(library):
    # [batch, tokens, heads, dim], as a projection leaves them.
    k, v = (values_of((2, 5, 3, 64), Dtype.BF16, s) for s in (1, 2))
    cache = Cache(library, 2, 3, 8, 64)
    held = library.put(k), library.put(v)
    library.kernels.kv_append(
        Dtype.BF16,
        held[0].pointer,
        held[1].pointer,
        batch=2,
        kv_heads=3,
        head_dim=64,
        tokens=5,
        capacity=8,
        strides=(5 * 3 * 64, 64, 3 * 64),
        key=cache.key,
        value=cache.value,
    )
    want = ops.pack_kv(ops.quantize_kv(k.transpose(0, 2, 1, 3).astype(np.float32))[0])
    assert (cache.read(0)[0][:, :, :5] == want).all()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", BOTH)
def test_dequantizing_gives_the_values_that_the_codes_stand_for(library, dtype, head_dim):
    k, v = (values_of((2, 2, 6, head_dim), dtype, s) for s in (1, 2))
    cache = Cache(library, 2, 2, 8, head_dim)
    cache.append(library, dtype, k, v)
    values = library.put(np.zeros((2, 2, 6, head_dim), NUMPY[dtype]))
    library.kernels.kv_dequantize(
        dtype,
        cache.value,
        values.pointer,
        batch=2,
        kv_heads=2,
        head_dim=head_dim,
        capacity=8,
        tokens=6,
    )
    assert (values.read() == ops.kv_fake_quantize(v)).all()


# Attention


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention problem. ``lengths``: tokens in the cache before the queries', per sequence."""

    heads: int
    kv_heads: int
    head_dim: int
    query_tokens: int
    lengths: tuple[int, ...]
    split_kv: int = 0
    masked: bool = False
    rotate: bool = True
    spare: int = 0  # max_length beyond the longest sequence

    def __str__(self) -> str:
        return (
            f"{self.heads}/{self.kv_heads}x{self.head_dim}-q{self.query_tokens}"
            f"-{'_'.join(map(str, self.lengths))}-s{self.split_kv}{'-masked' * self.masked}"
        )


DECODE: Final = [
    Case(8, 2, 128, 1, (0,)),
    Case(8, 2, 128, 1, (15,)),
    Case(8, 2, 128, 1, (16, 63, 64)),
    Case(8, 8, 128, 1, (130,), split_kv=2),
    Case(32, 8, 64, 1, (37, 5), split_kv=3),
    Case(16, 1, 128, 1, (77,), masked=True),
    Case(12, 1, 64, 1, (300,)),
    Case(4, 2, 256, 1, (70, 9)),
    Case(4, 4, 256, 2, (33,), rotate=False),
    Case(8, 2, 128, 3, (61,), spare=40),
    Case(8, 1, 64, 8, (100, 3), masked=True, split_kv=5),
    Case(2, 1, 64, 1, (1000,), split_kv=1),
    Case(2, 2, 64, 1, (20, 500), split_kv=7),
]
PREFILL: Final = [
    Case(4, 2, 128, 9, (0,)),
    Case(4, 1, 64, 40, (0, 21)),
    Case(8, 2, 128, 70, (20,)),
    Case(2, 2, 64, 130, (3,)),
    Case(6, 2, 64, 33, (64,), masked=True),
    Case(2, 1, 256, 33, (9,)),
    Case(2, 1, 128, 17, (30, 0), rotate=False, spare=11),
]


@pytest.fixture
def attend(library):
    """``attend(case, dtype, ...)`` -> (result, reference rows [rows, heads * head_dim] float32)."""

    def call(
        case: Case,
        dtype: Dtype,
        *,
        factors: tuple[int, ...] | None = None,
        layout: Layout | None = None,
        seed: int = 0,
        workspace_change: int = 0,
        changes: dict[str, Any] | None = None,
    ):
        library.configure(seed=seed, workers=2)
        batch, total = len(case.lengths), max(case.lengths) + case.query_tokens
        max_length = total + case.spare
        capacity = -(-max_length // 4) * 4
        cache = Cache(library, batch, case.kv_heads, capacity, case.head_dim)
        # Scores of ordinary size (q is rounded to 11 bits, which moves a score by its own 2^-12),
        # values of very different sizes.
        shape = (batch, case.kv_heads, total, case.head_dim)
        random = np.random.default_rng([*shape, seed])
        k, v = random.standard_normal(shape).astype(NUMPY[dtype]), values_of(shape, dtype, seed)
        # Each sequence has its own length; what lies behind it is poison.
        for b, length in enumerate(case.lengths):
            own = length + case.query_tokens
            lengths = [capacity] * batch
            lengths[b] = 0
            cache.append(
                library, dtype, k[:, :, :own], v[:, :, :own], lengths=lengths, rotate_k=case.rotate
            )
        q = random.standard_normal((batch, case.heads, case.query_tokens, case.head_dim))
        q = q.astype(NUMPY[dtype])
        visible = np.zeros((batch, 1, case.query_tokens, max_length), bool)
        for b, length in enumerate(case.lengths):
            for t in range(case.query_tokens):
                visible[b, 0, t, : length + t + 1] = True
        mask = None
        if case.masked:
            keep = np.random.default_rng(seed).random(visible.shape) < 0.7
            keep[..., 0] = True
            visible &= keep
            mask = library.put(keep[:, 0].astype(np.uint8))
        rotated = rotated_heads(q).astype(np.float32) if case.rotate else q.astype(np.float32)
        scale = 1 / math.sqrt(case.head_dim)
        want = ops.kv_attention(
            rotated,
            *cache.portable(0, max_length),
            *cache.portable(1, max_length),
            visible,
            scale=scale,
        )
        n = case.heads * case.head_dim
        want = want.transpose(0, 2, 1, 3).reshape(-1, n)

        options: dict[str, Any] = {}
        if factors is not None:
            matrices = [hadamard_matrix(f) for f in factors if f & (f - 1)]
            plan, words = library.kernels.hadamard_plan(factors, matrices, inner=case.head_dim)
            signs = library.put(words)
            plan.signs = signs.pointer
            options["heads_hadamard"] = plan
            stored = want.astype(NUMPY[dtype]).astype(np.float64)
            want = rotate(stored, factors, case.head_dim) / math.sqrt(math.prod(factors))
        rows = batch * case.query_tokens
        if layout is None:
            y = library.put(np.full((rows, n), 9, NUMPY[dtype]))
            options["y"] = y.pointer
        else:
            codes = library.put(np.full((rows, n // 2), 9, np.uint8))
            row_scale = library.put(np.full(rows, np.nan, np.float32))
            options |= {"codes": codes.pointer, "scale": row_scale.pointer, "layout": layout}
        held = library.put(q), library.put(np.array(case.lengths, np.int32)), mask
        args = library.kernels.kv_attention_args(
            dtype,
            held[0].pointer,
            batch=batch,
            heads=case.heads,
            kv_heads=case.kv_heads,
            head_dim=case.head_dim,
            query_tokens=case.query_tokens,
            capacity=capacity,
            max_length=max_length,
            strides=(n * case.query_tokens, case.query_tokens * case.head_dim, case.head_dim),
            key=cache.key,
            value=cache.value,
            softmax_scale=scale,
            lengths=held[1].pointer,
            mask=mask and mask.pointer,
            rotate_q=case.rotate,
            split_kv=case.split_kv,
            **options,
        )
        for name, value in (changes or {}).items():
            setattr(args, name, value)
        need = library.kernels.kv_attention_workspace_size(args)
        workspace = library.put(np.full(max(need, 16), 0xFF, np.uint8))
        library.kernels.kv_attention(args, workspace.pointer, need + workspace_change)
        workspace.read()
        if layout is None:
            return y.read().astype(np.float64), want
        return (layouts.codes_from_packed(codes.read()).astype(int), row_scale.read()), want

    return call


def assert_close(got: np.ndarray, want: np.ndarray, dtype: Dtype) -> None:
    """q and the weights are rounded to 11 bits, the result to the dtype."""
    eps = 2.0**-11 if dtype == Dtype.FP16 else 2.0**-8
    size = np.abs(want).max(axis=1, keepdims=True)
    assert (np.abs(got - want) <= eps * np.abs(want) + 8 * 2.0**-11 * size).all()
    assert np.linalg.norm(got - want) <= (eps + 2.0**-10) * np.linalg.norm(want)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("case", DECODE, ids=str)
def test_decode_attends_like_ops(attend, case, dtype, seed):
    assert_close(*attend(case, dtype, seed=seed), dtype)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("case", PREFILL, ids=str)
def test_prefill_attends_like_ops(attend, case, dtype, seed):
    assert_close(*attend(case, dtype, seed=seed), dtype)


@pytest.mark.parametrize("query_tokens", [1, 9])
@pytest.mark.parametrize(
    ("heads", "factors"), [(32, (4, 8)), (28, (28,)), (40, (20, 2)), (12, (12,)), (8, (8,))]
)
@pytest.mark.parametrize("dtype", BOTH)
def test_the_heads_hadamard_mixes_the_output_across_heads(
    attend, dtype, heads, factors, query_tokens
):
    case = Case(heads, 4, 64, query_tokens, (37, 20))
    assert_close(*attend(case, dtype, factors=factors, seed=1), dtype)


@pytest.mark.parametrize("query_tokens", [1, 9])
@pytest.mark.parametrize("factors", [None, (8,), (12,)])
def test_the_output_can_leave_as_codes_for_o_proj(attend, factors, query_tokens):
    heads = 12 if factors == (12,) else 8
    case = Case(heads, 4, 128, query_tokens, (41,))
    y, _ = attend(case, Dtype.FP16)  # what the separate attention would store
    (codes, scale), _ = attend(
        case, Dtype.FP16, factors=factors, layout=Layout.ACTIVATIONS_PACKED_V1
    )
    rotated = rotate(y, factors or (), 128) / math.sqrt(math.prod(factors or ()))
    np.testing.assert_allclose(
        scale, np.abs(rotated).max(axis=1) * np.float32(0.9) / np.float32(7), rtol=1e-6
    )
    assert not mismatches(codes, rotated, scale).any()


@pytest.mark.parametrize("split_kv", [1, 2, 3, 8, 64])
def test_slices_of_the_cache_combine_to_the_same_attention(attend, split_kv):
    case = Case(8, 2, 128, 1, (333, 20, 0), split_kv=split_kv)
    assert_close(*attend(case, Dtype.FP16, seed=split_kv), Dtype.FP16)


def test_decoding_step_by_step_agrees_with_prefill(attend):
    prefill, _ = attend(Case(8, 2, 64, 12, (10,)), Dtype.FP16)
    few, _ = attend(Case(8, 2, 64, 12, (10,), split_kv=1), Dtype.FP16)
    assert (prefill == few).all()
    # The last query token alone, through the decode kernel, over the same cache.
    step, want = attend(Case(8, 2, 64, 4, (18,)), Dtype.FP16)
    assert_close(step, want, Dtype.FP16)


def test_a_query_cannot_see_the_tokens_behind_it(library, attend):
    case = Case(4, 2, 64, 20, (5,))
    first, _ = attend(case, Dtype.FP16)
    assert np.isfinite(first).all()  # everything behind each length is NaN


@pytest.mark.parametrize("magnitude", [1e-6, 1.0, 3e4])
def test_values_of_any_size_keep_their_precision(library, magnitude):
    # V's scale goes into the softmax weights: no value leaves the range of fp16.
    library.configure(seed=1)
    cache = Cache(library, 1, 1, 32, 64)
    k = np.random.default_rng(1).standard_normal((1, 1, 30, 64)).astype(NUMPY[Dtype.BF16])
    v = (values_of((1, 1, 30, 64), Dtype.BF16, 2).astype(np.float32) * magnitude).astype(
        NUMPY[Dtype.BF16]
    )
    cache.append(library, Dtype.BF16, k, v)
    q = np.random.default_rng(3).standard_normal((1, 2, 1, 64)).astype(NUMPY[Dtype.BF16])
    want = ops.kv_attention(
        q.astype(np.float32),
        *cache.portable(0, 30),
        *cache.portable(1, 30),
        np.ones((1, 1, 1, 30), bool),
        scale=0.125,
    )
    y, held = library.put(np.zeros((1, 128), NUMPY[Dtype.BF16])), library.put(q)
    args = library.kernels.kv_attention_args(
        Dtype.BF16,
        held.pointer,
        batch=1,
        heads=2,
        kv_heads=1,
        head_dim=64,
        query_tokens=1,
        capacity=32,
        max_length=30,
        strides=(128, 64, 64),
        key=cache.key,
        value=cache.value,
        softmax_scale=0.125,
        y=y.pointer,
    )
    need = library.kernels.kv_attention_workspace_size(args)
    workspace = library.put(np.zeros(need, np.uint8))
    library.kernels.kv_attention(args, workspace.pointer, need)
    assert_close(y.read().astype(np.float64), want.reshape(1, 128), Dtype.BF16)


@pytest.mark.parametrize(
    "case", [DECODE[3], DECODE[4], DECODE[7], PREFILL[0], PREFILL[1], PREFILL[5]], ids=str
)
def test_the_cache_is_read_without_bank_conflicts(emulated, attend, case):
    emulated.reset_counters()
    attend(case, Dtype.FP16)
    counters = emulated.counters()
    assert counters.matrix_loads > 0
    assert counters.matrix_load_conflicts == 0
    assert counters.mma_instructions > 0
    assert counters.async_copies > 0


REFUSALS: Final = [
    ("a head dimension of 96", {"head_dim": 96}, "table of supported shapes"),
    ("heads that kv heads do not divide", {"heads": 9}, "table of supported shapes"),
    ("more tokens than capacity", {"max_length": 100}, "table of supported shapes"),
    ("a capacity that is not a multiple of 4", {"capacity": 33}, "table of supported shapes"),
    ("no query tokens", {"query_tokens": 0}, "table of supported shapes"),
    ("a thousand slices", {"split_kv": 1000}, "out of range"),
    ("an unknown epilogue", {"epilogue": 7}, "out of range"),
    ("no output", {"y": None}, "null"),
    ("no query", {"q": None}, "null"),
    ("an integer dtype", {"dtype": 2}, "dtype"),
    (
        "a heads Hadamard of another head dimension",
        {"heads_hadamard": HadamardPlan((0, 0, 0), 8, 128)},
        "plan",
    ),
]


@pytest.mark.parametrize(
    ("changes", "message"), [r[1:] for r in REFUSALS], ids=[r[0] for r in REFUSALS]
)
def test_attention_refuses_what_is_not_in_the_table(attend, changes, message):
    with pytest.raises(UnsupportedModelError, match=message):
        attend(Case(8, 2, 64, 1, (30,)), Dtype.FP16, changes=changes)


def test_attention_refuses_a_small_workspace(attend):
    with pytest.raises(UnsupportedModelError, match="workspace is smaller"):
        attend(Case(8, 2, 64, 1, (30,)), Dtype.FP16, workspace_change=-1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"capacity": 6}, "table of supported shapes"),
        ({"head_dim": 80}, "table of supported shapes"),
        ({"tokens": -1}, "table of supported shapes"),
        ({"clip_ratio": 0.0}, "out of range"),
        ({"strides": (4, 64, 64)}, "out of range"),
        ({"k": None}, "null"),
        ({"key": KvCache(None, None, None)}, "null"),
        ({"dtype": Dtype.INT32}, "dtype"),
    ],
    ids=str,
)
def test_append_refuses_what_is_not_in_the_table(library, changes, message):
    cache = Cache(library, 1, 1, 8, 64)
    held = library.put(np.zeros((1, 1, 2, 64), np.float16))
    arguments = {
        "dtype": Dtype.FP16,
        "k": held.pointer,
        "v": held.pointer,
        "batch": 1,
        "kv_heads": 1,
        "head_dim": 64,
        "tokens": 2,
        "capacity": 8,
        "strides": (128, 128, 64),
        "key": cache.key,
        "value": cache.value,
    }
    with pytest.raises(UnsupportedModelError, match=message):
        library.kernels.kv_append(**(arguments | changes))
    assert (cache.read(0)[0] == 0xEE).all()


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 9),
    query_tokens=st.integers(1, 24),
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=3),
    split_kv=st.integers(0, 5),
    flags=st.tuples(st.booleans(), st.booleans()),
    dtype=st.sampled_from(BOTH),
    seed=st.integers(0, 99),
)
def test_any_mix_of_heads_lengths_and_slices(
    attend, kv_heads, group, query_tokens, lengths, split_kv, flags, dtype, seed
):
    masked, rotate_ = flags
    case = Case(
        2 * kv_heads * group,
        2 * kv_heads,
        64,
        query_tokens,
        tuple(lengths),
        split_kv,
        masked,
        rotate_,
    )
    assert_close(*attend(case, dtype, seed=seed), dtype)


def test_append_takes_k_alone(library):
    cache = Cache(library, 1, 2, 8, 64)
    held = library.put(np.ones((1, 2, 3, 64), np.float16))
    library.kernels.kv_append(
        Dtype.FP16,
        held.pointer,
        None,
        batch=1,
        kv_heads=2,
        head_dim=64,
        tokens=3,
        capacity=8,
        strides=(384, 192, 64),
        key=cache.key,
        value=None,
    )
    codes, _, _ = cache.read(0)
    assert (codes[:, :, :3] == 0xFF).all()
    assert (codes[:, :, 3:] == 0xEE).all()
    assert (cache.read(1)[0] == 0xEE).all()
