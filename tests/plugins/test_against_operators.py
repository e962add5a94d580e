# SPDX-License-Identifier: Apache-2.0
"""What every plugin computes, through its whole life, against the operator of ``quarot_onnx.ops``.

On the CPU the kernels behind ``enqueue`` are the emulated ones; on a GPU the same tests run with
device memory.
"""

import math

import ml_dtypes
import numpy as np
import pytest

from quarot_onnx import ops
from quarot_onnx.hadamard import hadamard_matrix
from quarot_onnx.plugins import layouts
from quarot_onnx.plugins.layouts import Layout
from tests.plugins.harness import Host

FLOATS = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
PACKED, SPLIT = int(Layout.ACTIVATIONS_PACKED_V1), int(Layout.ACTIVATIONS_SPLIT_V1)
FRAGMENTS = int(Layout.WEIGHTS_FRAGMENTS_V1)
both = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def draw(shape: tuple[int, ...], dtype: np.dtype, seed: int = 0) -> np.ndarray:
    """Quarters from -4 to 4: sums of them are exact, so that no test hangs on a tie's last bit."""
    quarters = np.random.default_rng(seed).integers(-16, 17, shape)
    return (quarters / 4).astype(np.float32).astype(dtype)


def signs(factors: list[int]) -> list[np.ndarray]:
    words = layouts.hadamard_signs(tuple(factors))
    return [words] if words.size else []


def dense(factors: list[int]) -> np.ndarray:
    """The orthonormal matrix of the factors."""
    H = np.ones((1, 1))
    for factor in factors:
        H = np.kron(H, hadamard_matrix(factor) / math.sqrt(factor))
    return H.astype(np.float32)


def rounding(dtype: np.dtype) -> float:
    return float(ml_dtypes.finfo(dtype).eps)


@both
@pytest.mark.parametrize("factors", [[128], [12, 32], [64], [20, 16]], ids=str)
def test_hadamard_rotates_as_the_operator(host: Host, factors, dtype) -> None:
    x = draw((2, 3, 2 * math.lcm(math.prod(factors), 128)), dtype)
    (y,) = host.run("Hadamard", {"factors": factors}, [x, *signs(factors)])
    expected = ops.hadamard(x.astype(np.float32), dense(factors), np.ones((1, 1), np.float32))
    bound = rounding(dtype) * np.abs(expected).max()
    np.testing.assert_allclose(y.astype(np.float32), expected, rtol=0, atol=bound)


@both
@pytest.mark.parametrize("heads", [[8], [12]], ids=str)
def test_hadamard_heads_mixes_heads_as_the_operator(host: Host, heads, dtype) -> None:
    x = draw((3, math.prod(heads) * 64), dtype)
    (y,) = host.run("HadamardHeads", {"factors": heads}, [x, *signs(heads)])
    expected = ops.hadamard_heads(x.astype(np.float32), dense(heads))
    bound = rounding(dtype) * np.abs(expected).max()
    np.testing.assert_allclose(y.astype(np.float32), expected, rtol=0, atol=bound)


@both
@pytest.mark.parametrize("clip_ratio", [0.9, 1.0])
def test_quantize_gives_the_operator_s_codes_and_scales(host: Host, dtype, clip_ratio) -> None:
    x = draw((2, 3, 256), dtype)
    x[1, 1] = 0
    q, scale = host.run("QuantizeInt4", {"clip_ratio": clip_ratio}, [x])
    codes, expected_scale = ops.quantize_int4(x, clip_ratio=clip_ratio)
    np.testing.assert_array_equal(scale, expected_scale)
    np.testing.assert_array_equal(q.view(np.uint8), packed(codes))
    assert q.dtype == np.int8


def packed(codes: np.ndarray) -> np.ndarray:
    """Portable codes to kernel storage."""
    return ops.pack_int4(codes.astype(np.int16) - ops.ACTIVATION_ZERO_POINT)


@both
@pytest.mark.parametrize(("factors", "heads"), [([128], 0), ([12, 32], 0), ([8], 1)], ids=str)
def test_quantize_with_factors_is_the_hadamard_and_then_the_quantizer(
    host: Host, dtype, factors, heads
) -> None:
    features = math.prod(factors) * (64 if heads else 1)
    x = draw((5, features), dtype)
    attributes = {"factors": factors, "heads": heads}
    q, scale = host.run("QuantizeInt4", attributes, [x, *signs(factors)])
    one = np.ones((1, 1), np.float32)
    wide = x.astype(np.float32)
    rotated = (
        ops.hadamard_heads(wide, dense(factors))
        if heads
        else ops.hadamard(wide, dense(factors), one)
    )
    codes, expected_scale = ops.quantize_int4(rotated)
    np.testing.assert_allclose(scale, expected_scale, rtol=1e-6)
    difference = ops.unpack_int4(q.view(np.uint8)) - (codes.astype(np.int16) - 128)
    quotient = rotated / expected_scale
    tie = np.abs(np.abs(quotient - np.floor(quotient)) - 0.5) < 1e-4
    assert (np.abs(difference) <= tie).all()


def test_split_order_holds_the_same_codes(host: Host) -> None:
    x = draw((2, 5, 256), FLOATS[0])
    q, scale = host.run("QuantizeInt4", {"activation_layout": SPLIT}, [x])
    codes, expected_scale = ops.quantize_int4(x)
    np.testing.assert_array_equal(scale, expected_scale)
    np.testing.assert_array_equal(
        layouts.packed_from_split(q, 10, 256), packed(codes).reshape(10, -1)
    )


def gemm_inputs(
    tokens: tuple[int, ...], k: int, n: int, layout: int
) -> tuple[list[np.ndarray], tuple[np.ndarray, ...]]:
    """The plugin's inputs, and the operator's."""
    random = np.random.default_rng(1)
    q = random.integers(120, 136, (*tokens, k)).astype(np.uint8)
    scale = random.uniform(0.01, 0.1, (*tokens, 1)).astype(np.float32)
    w = random.integers(-8, 8, (k, n)).astype(np.int8)
    w_scale = random.uniform(0.001, 0.01, n).astype(np.float32)
    codes = packed(q)
    if layout == SPLIT:
        codes = layouts.split_from_packed(codes.reshape(-1, k // 2))
    fragments = layouts.fragments_from_packed(ops.pack_int4(w.T))
    plugin = [codes.view(np.int8), scale, fragments.view(np.int8), w_scale]
    return plugin, (q, scale, w, w_scale)


@both
@pytest.mark.parametrize("layout", [PACKED, SPLIT], ids=["packed", "split"])
@pytest.mark.parametrize(("tokens", "k", "n"), [((1, 3), 256, 72), ((2, 20), 384, 136)], ids=str)
def test_gemm_equals_the_operator_to_the_bit(host: Host, tokens, k, n, layout, dtype) -> None:
    inputs, operands = gemm_inputs(tokens, k, n, layout)
    attributes = {
        "dtype": 10 if dtype == FLOATS[0] else 16,
        "weight_layout": FRAGMENTS,
        "activation_layout": layout,
    }
    (y,) = host.run("Int4Gemm", attributes, inputs)
    np.testing.assert_array_equal(y, ops.int4_gemm(*operands, dtype=dtype))


def test_gemm_finds_its_workspace_dirty_every_time(host: Host) -> None:
    inputs, operands = gemm_inputs((2,), 4096, 64, PACKED)
    plugin = host.create("Int4Gemm", {"dtype": 10, "weight_layout": FRAGMENTS})
    assert plugin is not None
    outputs = plugin.output_tensors(inputs)
    workspace = plugin.workspace(inputs, outputs)
    assert workspace > 0  # k is split: sums meet in the workspace
    for _ in range(2):
        (y,) = plugin.enqueue(inputs, outputs, workspace=workspace)
        np.testing.assert_array_equal(y, ops.int4_gemm(*operands, dtype=np.float16))


def test_gemm_adds_a_bias_before_the_rounding(host: Host) -> None:
    inputs, operands = gemm_inputs((2, 20), 256, 72, PACKED)
    bias = np.random.default_rng(2).normal(size=72).astype(np.float32)
    attributes = {"dtype": 10, "weight_layout": FRAGMENTS}
    (y,) = host.run("Int4Gemm", attributes, [*inputs, bias])
    expected = (ops.int4_gemm(*operands) + bias).astype(np.float16)
    np.testing.assert_array_equal(y, expected)


def empty_cache(batch: int, heads: int, capacity: int, head_dim: int) -> list[np.ndarray]:
    codes = np.full((batch, heads, capacity, head_dim // 2), 0x5A, np.uint8).view(np.int8)
    return [codes, *(np.full((batch, heads, capacity, 1), 7, np.float32) for _ in range(2))]


@both
@pytest.mark.parametrize("rotate", [0, 1])
def test_append_writes_the_operator_s_codes_in_place(host: Host, dtype, rotate) -> None:
    new = draw((2, 3, 4, 64), dtype)
    past = empty_cache(2, 3, 16, 64)
    lengths = np.array([0, 9], np.int32)
    present = host.run("KvAppend", {"rotate": rotate}, [new, *past, lengths])
    rotated = new.astype(np.float32)
    if rotate:
        rotated = ops.hadamard(rotated, dense([64]), np.ones((1, 1), np.float32))
    codes, scale, zero = ops.quantize_kv(rotated)
    for b, length in enumerate(lengths):
        written = slice(length, length + 4)
        for made, expected in zip(present, (ops.pack_kv(codes), scale, zero), strict=True):
            found = made[b, :, written]
            if rotate and found.dtype == np.float32:
                np.testing.assert_allclose(found, expected[b], rtol=1e-6)
            elif not rotate:
                np.testing.assert_array_equal(found.view(expected.dtype), expected[b])
        for made, before in zip(present, past, strict=True):
            untouched = np.ones(16, bool)
            untouched[written] = False
            np.testing.assert_array_equal(made[b, :, untouched], before[b, :, untouched])


def test_append_drops_what_is_beyond_the_capacity(host: Host) -> None:
    new = draw((1, 2, 8, 64), FLOATS[0])
    present = host.run("KvAppend", {}, [new, *empty_cache(1, 2, 8, 64), np.array([5], np.int32)])
    codes, _, _ = ops.quantize_kv(new)
    np.testing.assert_array_equal(present[0][:, :, 5:].view(np.uint8), ops.pack_kv(codes)[:, :, :3])


def test_append_refuses_a_cache_that_is_not_in_place(host: Host) -> None:
    inputs = [
        draw((1, 2, 4, 64), FLOATS[0]),
        *empty_cache(1, 2, 8, 64),
        np.zeros(1, np.int32),
    ]
    plugin = host.create("KvAppend", {})
    assert plugin is not None
    with pytest.raises(RuntimeError, match="present does not lie in the memory of past"):
        plugin.enqueue(inputs, plugin.output_tensors(inputs), workspace=0, in_place=False)


def attention(
    tokens: int, lengths: tuple[int, ...], dtype: np.dtype, *, heads: int = 4, kv_heads: int = 2
) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """q, the cache as the plugin takes it (capacity 48), and as the operator takes it."""
    random = np.random.default_rng(3)
    q = random.normal(size=(len(lengths), heads, tokens, 64)).astype(dtype)
    plugin, operator = [], []
    for _ in ("key", "value"):
        values = random.normal(size=(len(lengths), kv_heads, 48, 64)).astype(np.float32)
        codes, scale, zero = ops.quantize_kv(values)
        plugin += [ops.pack_kv(codes).view(np.int8), scale, zero]
        operator += [ops.pack_kv(codes), scale, zero]
    return q, plugin, operator


@both
@pytest.mark.parametrize("tokens", [1, 12], ids=["decode", "prefill"])
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "masked"])
def test_attention_equals_the_operator(host: Host, tokens, masked, dtype) -> None:
    lengths = (17, 30)
    q, cache, operands = attention(tokens, lengths, dtype)
    positions = np.arange(48)
    last = np.array(lengths)[:, None, None, None] + np.arange(tokens)[:, None]
    mask = positions <= last
    inputs = [q, *cache, np.array(lengths, np.int32)]
    if masked:  # left padding in one sequence, a window in the other; 44 of 48 positions
        mask &= positions >= np.array([5, 25])[:, None, None, None]
        inputs.append(np.ascontiguousarray(mask[..., :44]))
    (y,) = host.run("KvAttention", {"scale": 0.125}, inputs)
    reference = ops.kv_attention(q.astype(np.float32), *operands, mask, scale=0.125)
    expected = reference.transpose(0, 2, 1, 3).reshape(2, tokens, -1)
    atol = 8 * rounding(np.dtype(np.float16)) + 2 * rounding(dtype) * np.abs(expected).max()
    np.testing.assert_allclose(y.astype(np.float32), expected, rtol=0, atol=atol)


def test_attention_rotates_queries_as_the_operator_before_it(host: Host) -> None:
    q, cache, _ = attention(1, (20,), FLOATS[0])
    lengths = np.array([20], np.int32)
    rotated = ops.hadamard(q, dense([64]), np.ones((1, 1), np.float32))
    (fused,) = host.run("KvAttention", {"scale": 0.125, "rotate": 1}, [q, *cache, lengths])
    (apart,) = host.run("KvAttention", {"scale": 0.125}, [rotated, *cache, lengths])
    np.testing.assert_allclose(fused.astype(np.float32), apart.astype(np.float32), atol=5e-3)


def test_append_and_attention_agree_on_the_length(host: Host) -> None:
    past = [empty_cache(1, 2, 16, 64) for _ in range(2)]
    k, v = draw((1, 2, 5, 64), FLOATS[0], 1), draw((1, 2, 5, 64), FLOATS[0], 2)
    lengths = np.zeros(1, np.int32)
    key = host.run("KvAppend", {}, [k, *past[0], lengths])
    value = host.run("KvAppend", {}, [v, *past[1], lengths])
    q = draw((1, 2, 5, 64), FLOATS[0], 3)
    (y,) = host.run("KvAttention", {"scale": 0.1}, [q, *key, *value, lengths])
    start = [np.zeros((1, 2, 0, 32), np.uint8), *(np.zeros((1, 2, 0, 1), np.float32),) * 2]
    causal = np.tril(np.ones((5, 5), bool))[None, None]
    expected = ops.kv_attention(
        q.astype(np.float32),
        *ops.kv_append(k, *start),
        *ops.kv_append(v, *start),
        causal,
        scale=0.1,
    )
    expected = expected.transpose(0, 2, 1, 3).reshape(1, 5, -1)
    np.testing.assert_allclose(y.astype(np.float32), expected, atol=2e-2)
