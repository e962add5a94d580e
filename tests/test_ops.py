# SPDX-License-Identifier: Apache-2.0
"""Every operator's ONNX body, in plain ONNX Runtime, equals the NumPy reference that defines it."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from quarot_onnx import ops
from quarot_onnx.hadamard import hadamard_matrix
from tests import running
from tests.small_decoder import invertible

Array = NDArray[Any]
FLOAT32, FLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16

_MAGNITUDES = st.sampled_from([1e-30, 1e-6, 1.0, 1e4, 1e30])


@cache
def _session(
    name: str, attributes: tuple[tuple[str, Any], ...], signature: tuple[Any, ...], optimized: bool
) -> Any:
    values = [
        ir.Value(
            name=f"in_{i}",
            type=ir.TensorType(dtype),
            shape=ir.Shape([f"d{i}{j}" for j in range(rank)]),
        )
        for i, (dtype, rank) in enumerate(signature)
    ]
    keywords = {key: list(v) if isinstance(v, tuple) else v for key, v in attributes}
    node = ops.node(name, list(values), keywords, at="/op")
    graph = ir.Graph(
        values, node.outputs, nodes=[node], opset_imports={"": ops.OPSET}, name="one_operator"
    )
    model = ir.Model(graph, ir_version=10)
    ops.declare(model)
    for output in node.outputs:
        output.type = ir.TensorType(_output_type(output.name or "", signature, keywords))
    return running.session(model, optimized=optimized)


def _output_type(
    output: str, signature: tuple[Any, ...], attributes: Mapping[str, Any]
) -> ir.DataType:
    if output.endswith(("_q", "_present")):
        return ir.DataType.UINT8
    if output.endswith("_y"):
        return ir.DataType(attributes["dtype"]) if "dtype" in attributes else signature[0][0]
    return FLOAT32


def run(name: str, *inputs: Array, optimized: bool = True, **attributes: Any) -> list[Array]:
    """The operator's outputs from ONNX Runtime."""
    frozen = tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in attributes.items())
    signature = tuple((ir.DataType.from_numpy(array.dtype), array.ndim) for array in inputs)
    session = _session(name, frozen, signature, optimized)
    return list(session.run(None, {f"in_{i}": array for i, array in enumerate(inputs)}))


def _orthonormal(order: int) -> Array:
    return (hadamard_matrix(order) / np.sqrt(order)).astype(np.float32)


def _tokens(rng: np.random.Generator, *shape: int, magnitude: float = 1.0) -> Array:
    """Rows with an outlier, small rows, and a row of zeros."""
    x = rng.normal(size=shape) * magnitude
    x[..., 0] *= 20
    rows = x.reshape(-1, shape[-1])
    rows[::3] *= 1e-3
    rows[len(rows) // 2] = 0
    return x.astype(np.float32)


def _assert_within_ulps(actual: Array, expected: Array, ulps: float) -> None:
    """Within `ulps` units in the last place of the largest number of the tensor."""
    eps = float(ml_dtypes.finfo(expected.dtype).eps)
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    largest = np.abs(expected.astype(np.float64)).max(initial=0)
    difference = np.abs(actual.astype(np.float64) - expected.astype(np.float64)).max(initial=0)
    assert difference <= ulps * eps * largest


# --- Hadamard -------------------------------------------------------------------------------------


@given(
    factors=st.sampled_from([(1, 2), (4, 2), (12, 4), (20, 4), (44, 4), (2, 12), (1, 1)]),
    blocks=st.integers(1, 3),
    leading=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    dtype=st.sampled_from([np.float32, np.float16]),
)
@settings(max_examples=40, deadline=None)
def test_hadamard_equals_its_reference(factors, blocks, leading, dtype) -> None:
    A, B = (_orthonormal(order) for order in factors)
    rng = np.random.default_rng(1)
    x = rng.normal(size=(*leading, blocks * len(A) * len(B))).astype(dtype)
    (y,) = run("Hadamard", x, A, B, factors=list(factors))
    _assert_within_ulps(y, ops.hadamard(x, A, B), 8)


def test_hadamard_is_a_product_with_the_kronecker_product_and_not_with_its_transpose() -> None:
    A, B = _orthonormal(12), _orthonormal(4)
    assert not np.array_equal(A, A.T)
    x = np.random.default_rng(2).normal(size=(5, 96)).astype(np.float32)
    (y,) = run("Hadamard", x, A, B, factors=[12, 4])
    dense = np.kron(np.eye(2), np.kron(A, B))
    np.testing.assert_allclose(y, x.astype(np.float64) @ dense, atol=1e-6)


@given(
    heads=st.sampled_from([1, 2, 4, 12, 20]),
    head_dim=st.sampled_from([1, 3, 24]),
    leading=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    dtype=st.sampled_from([np.float32, np.float16]),
)
@settings(max_examples=30, deadline=None)
def test_hadamard_heads_equals_its_reference(heads, head_dim, leading, dtype) -> None:
    A = _orthonormal(heads)
    x = np.random.default_rng(3).normal(size=(*leading, heads * head_dim)).astype(dtype)
    (y,) = run("HadamardHeads", x, A, factors=[heads])
    _assert_within_ulps(y, ops.hadamard_heads(x, A), 8)
    dense = x.astype(np.float64) @ np.kron(A, np.eye(head_dim))
    np.testing.assert_allclose(y, dense, atol=1e-5 if dtype == np.float32 else 1e-2)


# --- Activations ----------------------------------------------------------------------------------


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 70)),
    bits=st.sampled_from([3, 4, 5, 6, 7, 8]),
    clip_ratio=st.sampled_from([0.9, 1.0, 0.5]),
    magnitude=_MAGNITUDES,
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_quantize_int4_gives_the_codes_and_scales_of_its_reference_exactly(
    shape, bits, clip_ratio, magnitude, seed
) -> None:
    x = _tokens(np.random.default_rng(seed), *shape, magnitude=magnitude)
    q, scale = run("QuantizeInt4", x, bits=bits, clip_ratio=clip_ratio)
    expected_q, expected_scale = ops.quantize_int4(x, bits=bits, clip_ratio=clip_ratio)
    np.testing.assert_array_equal(q, expected_q)
    np.testing.assert_array_equal(scale, expected_scale)
    assert scale.dtype == np.float32


def test_quantize_int4_takes_float16_and_scales_it_in_float32() -> None:
    x = _tokens(np.random.default_rng(4), 3, 7, 64, magnitude=1000).astype(np.float16)
    q, scale = run("QuantizeInt4", x, bits=4, clip_ratio=0.9)
    expected_q, expected_scale = ops.quantize_int4(x)
    np.testing.assert_array_equal(q, expected_q)
    np.testing.assert_array_equal(scale, expected_scale)
    assert scale.dtype == np.float32


@given(bits=st.sampled_from([4, 6, 8]), magnitude=_MAGNITUDES, seed=st.integers(0, 99))
def test_quantization_error_is_half_a_step_inside_the_clip(bits, magnitude, seed) -> None:
    x = _tokens(np.random.default_rng(seed), 9, 32, magnitude=magnitude)
    codes, scale = ops.quantize_int4(x, bits=bits, clip_ratio=0.9)
    signed = codes.astype(np.float64) - 128
    qmax = 2 ** (bits - 1) - 1
    assert signed.min() >= -qmax - 1
    assert signed.max() <= qmax
    inside = (x > -(qmax + 1.5) * scale) & (x < (qmax + 0.5) * scale)
    error = np.abs(signed * scale - x)
    assert (error <= scale * (0.5 + 1e-6))[inside].all()
    assert inside.mean() > 0.5


def test_a_token_of_zeros_has_scale_one_and_codes_of_zero() -> None:
    q, scale = run("QuantizeInt4", np.zeros((1, 2, 8), np.float32), bits=4, clip_ratio=0.9)
    assert (q == 128).all()
    assert (scale == 1).all()


def test_rounding_is_half_to_even() -> None:
    x = np.array([[7, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -7]], np.float32)
    q, scale = run("QuantizeInt4", x, bits=4, clip_ratio=1.0)
    assert scale.item() == 1
    assert (q.astype(int) - 128).tolist() == [[7, 0, 2, 2, 0, -2, -2, -7]]


# --- Products -------------------------------------------------------------------------------------


def _gemm_name(activation_bits: int, weight_bits: int) -> str:
    return "Int4Gemm" if max(activation_bits, weight_bits) <= 6 else "Int8Gemm"


def _storage(weight: Array, bits: int) -> Array:
    return weight.astype(ml_dtypes.int4 if bits == 4 else np.int8)


def _gemm(name: str, q: Array, scale: Array, w: Array, w_scale: Array, dtype: ir.DataType) -> Array:
    """Run with the weight as an initializer, which is how artifacts hold it."""
    return _GemmModel(name, w, w_scale, dtype).run(q, scale)


class _GemmModel:
    def __init__(self, name: str, w: Array, w_scale: Array, dtype: ir.DataType) -> None:
        q = ir.Value(name="q", type=ir.TensorType(ir.DataType.UINT8), shape=ir.Shape(["m", len(w)]))
        scale = ir.Value(name="scale", type=ir.TensorType(FLOAT32), shape=ir.Shape(["m", 1]))
        held = []
        for key, array in (("w", w), ("w_scale", w_scale)):
            tensor = ir.tensor(array, name=key)
            value = ir.Value(name=key, type=ir.TensorType(tensor.dtype), shape=tensor.shape)
            value.const_value = tensor
            held.append(value)
        node = ops.node(name, [q, scale, *held], {"dtype": int(dtype)}, at="/gemm")
        node.outputs[0].type = ir.TensorType(dtype)
        self.model = ir.Model(
            ir.Graph(
                [q, scale],
                node.outputs,
                nodes=[node],
                initializers=held,
                opset_imports={"": ops.OPSET},
                name="gemm",
            ),
            ir_version=10,
        )
        ops.declare(self.model)

    def run(self, q: Array, scale: Array, *, optimized: bool = True) -> Array:
        feeds = {"q": q, "scale": scale}
        return next(iter(running.run(self.model, feeds, optimized=optimized).values()))


@pytest.mark.parametrize("optimized", [True, False], ids=["optimized", "unoptimized"])
@pytest.mark.parametrize("in_features", [2, 64, 1000, 4096])
@pytest.mark.parametrize("bits", [(4, 4), (6, 6), (4, 6), (8, 8), (8, 4), (4, 8)], ids=str)
def test_accumulators_of_extreme_codes_are_exact(bits, in_features, optimized) -> None:
    """All codes at the ends of their range: where 16-bit partial sums would saturate."""
    activation_bits, weight_bits = bits
    rng = np.random.default_rng(in_features)
    low, high = 128 - 2 ** (activation_bits - 1), 127 + 2 ** (activation_bits - 1)
    q = rng.choice([low, high], size=(5, in_features)).astype(np.uint8)
    q[0], q[1], q[2] = high, low, 128
    top = 2 ** (weight_bits - 1)
    w = rng.choice([-top, top - 1], size=(in_features, 9))
    w[:, 0], w[:, 1], w[:, 2] = -top, top - 1, 0
    ones = np.ones((5, 1), np.float32)
    model = _GemmModel(_gemm_name(*bits), _storage(w, weight_bits), np.ones(9, np.float32), FLOAT32)
    exact = (q.astype(np.int64) - 128) @ w
    assert abs(exact).max() > 0
    np.testing.assert_array_equal(model.run(q, ones, optimized=optimized), exact.astype(np.float32))


@given(
    tokens=st.integers(1, 7),
    in_features=st.integers(1, 80),
    out_features=st.integers(1, 40),
    bits=st.sampled_from([4, 6, 8]),
    dtype=st.sampled_from([FLOAT32, FLOAT16]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_products_equal_their_reference_bit_for_bit(
    tokens, in_features, out_features, bits, dtype, seed
) -> None:
    rng = np.random.default_rng(seed)
    top = 2 ** (bits - 1)
    q = rng.integers(128 - top, 128 + top, (tokens, in_features)).astype(np.uint8)
    scale = rng.uniform(1e-3, 1, (tokens, 1)).astype(np.float32)
    w = _storage(rng.integers(-top, top, (in_features, out_features)), bits)
    w_scale = rng.uniform(1e-4, 1e-2, out_features).astype(np.float32)
    y = _gemm(_gemm_name(bits, bits), q, scale, w, w_scale, dtype)
    expected = ops.int4_gemm(q, scale, w.astype(np.int8), w_scale, dtype=dtype.numpy())
    np.testing.assert_array_equal(y, expected)


def test_products_keep_leading_axes() -> None:
    rng = np.random.default_rng(5)
    q = rng.integers(120, 136, (2, 3, 16)).astype(np.uint8)
    scale = rng.uniform(1e-3, 1, (2, 3, 1)).astype(np.float32)
    w, w_scale = rng.integers(-8, 8, (16, 5)).astype(np.int8), np.ones(5, np.float32)
    for name in ("Int4Gemm", "Int8Gemm"):
        (y,) = run(name, q, scale, w, w_scale, dtype=int(FLOAT32))
        np.testing.assert_array_equal(y, ops.int4_gemm(q, scale, w, w_scale))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_weight_only_gemm_equals_its_reference(dtype) -> None:
    rng = np.random.default_rng(6)
    x = rng.normal(size=(2, 3, 64)).astype(dtype)
    w, w_scale = rng.integers(-8, 8, (64, 5)).astype(np.int8), np.full(5, 0.1, np.float32)
    (y,) = run("WeightOnlyGemm", x, w, w_scale)
    _assert_within_ulps(y, ops.OPERATORS["WeightOnlyGemm"].reference(x, w, w_scale), 8)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("groups", [1, 4, 64])
def test_weight_only_gemm_has_scales_and_zero_points_for_groups_of_rows(dtype, groups) -> None:
    rng = np.random.default_rng(7)
    x = rng.normal(size=(2, 3, 64)).astype(dtype)
    w = rng.integers(-8, 8, (64, 5)).astype(np.int8)
    scale = rng.uniform(0.1, 0.3, (groups, 5)).astype(np.float32)
    zero = rng.integers(-8, 8, (groups, 5)).astype(np.int8)
    (y,) = run("WeightOnlyGemmGroups", x, w, scale, zero)
    rows = np.arange(64) // (64 // groups)
    values = (w.astype(np.float64) - zero[rows]) * scale[rows]
    eps = np.finfo(dtype).eps
    wanted = x.astype(np.float64) @ values
    assert np.abs(y - wanted).max() <= (64 * np.finfo(np.float32).eps + eps) * np.abs(wanted).max()
    reference = ops.OPERATORS["WeightOnlyGemmGroups"].reference(x, w, scale, zero)
    _assert_within_ulps(y, reference, 64 if dtype is np.float32 else 1)


# --- Cache ----------------------------------------------------------------------------------------


def _cache(
    rng: np.random.Generator, batch: int, heads: int, past: int, size: int, bits: int
) -> Any:
    codes, scale, zero = ops.quantize_kv(
        rng.normal(size=(batch, heads, past, size)).astype(np.float32), bits=bits
    )
    return ops.pack_kv(codes) if bits <= 4 else codes, scale, zero


@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    length=st.integers(1, 5),
    past=st.integers(0, 4),
    size=st.sampled_from([2, 8, 24, 64]),
    bits=st.sampled_from([3, 4, 5, 6, 7, 8]),
    clip_ratio=st.sampled_from([0.95, 1.0]),
    magnitude=_MAGNITUDES,
    dtype=st.sampled_from([np.float32, np.float16]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
@example(1, 1, 1, 0, 2, 4, 0.95, 1.0, np.float32, 0)
def test_kv_append_gives_the_codes_scales_and_zeros_of_its_reference_exactly(
    batch, heads, length, past, size, bits, clip_ratio, magnitude, dtype, seed
) -> None:
    rng = np.random.default_rng(seed)
    cache = _cache(rng, batch, heads, past, size, bits)
    new = _tokens(rng, batch, heads, length, size, magnitude=magnitude)
    if dtype == np.float16:
        new = np.clip(new, -6e4, 6e4).astype(np.float16)
    name = "KvAppend" if bits <= 4 else "KvAppendInt8"
    outputs = run(name, new, *cache, bits=bits, clip_ratio=clip_ratio)
    expected = ops.kv_append(new, *cache, bits=bits, clip_ratio=clip_ratio)
    for actual, wanted in zip(outputs, expected, strict=True):
        np.testing.assert_array_equal(actual, wanted)
        assert actual.dtype == wanted.dtype
    for kept, held in zip(outputs, cache, strict=True):
        np.testing.assert_array_equal(kept[:, :, :past], held)


@given(bits=st.sampled_from([4, 6, 8]), shift=st.sampled_from([-5.0, 0.0, 5.0]))
def test_cache_error_is_a_step_at_most_inside_the_clip(bits, shift) -> None:
    """Value and zero point are both rounded: half a step each."""
    x = (_tokens(np.random.default_rng(7), 6, 32) + shift).astype(np.float32)
    codes, scale, zero = ops.quantize_kv(x, bits=bits, clip_ratio=1.0)
    value = (codes.astype(np.float64) - zero) * scale
    assert (np.abs(value - x) <= scale * (1 + 1e-5)).all()
    assert codes.max() <= 2**bits - 1
    assert ((zero >= 0) & (zero <= 2**bits - 1)).all()


def test_a_cached_token_of_zeros_has_scale_one_and_reads_back_as_zeros() -> None:
    new = np.zeros((1, 1, 1, 4), np.float32)
    empty = _cache(np.random.default_rng(0), 1, 1, 0, 4, 4)
    codes, scale, zero = run("KvAppend", new, *empty, bits=4, clip_ratio=0.95)
    assert (scale.item(), zero.item()) == (1, 0)
    assert (codes == 0).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_kv_fake_quantize_equals_its_reference_exactly(bits, dtype) -> None:
    x = _tokens(np.random.default_rng(8), 2, 2, 5, 24).astype(dtype)
    (y,) = run("KvFakeQuantize", x, bits=bits, clip_ratio=0.95)
    np.testing.assert_array_equal(y, ops.kv_fake_quantize(x, bits=bits))
    assert y.dtype == dtype


@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    group=st.integers(1, 4),
    length=st.integers(1, 4),
    past=st.integers(0, 4),
    size=st.sampled_from([2, 8, 24]),
    bits=st.sampled_from([3, 4, 8]),
    form=st.sampled_from(["", "Softcap", "Sinks"]),
    dtype=st.sampled_from([np.float32, np.float16]),
    seed=st.integers(0, 99),
)
@settings(max_examples=50, deadline=None)
def test_kv_attention_equals_its_reference(
    batch, heads, group, length, past, size, bits, form, dtype, seed
) -> None:
    rng = np.random.default_rng(seed)
    total = past + length
    q = rng.normal(size=(batch, heads * group, length, size)).astype(dtype)
    key = _cache(rng, batch, heads, total, size, bits)
    value = _cache(rng, batch, heads, total, size, bits)
    mask = rng.random((batch, 1, length, total)) < 0.7
    name = f"KvAttention{form}{'' if bits <= 4 else 'Int8'}"
    attributes = {"scale": 0.3} | ({"softcap": 0.7} if form == "Softcap" else {})
    sinks = [(3 * rng.normal(size=heads * group)).astype(dtype)] if form == "Sinks" else []
    (y,) = run(name, q, *key, *value, mask, *sinks, **attributes)
    expected = ops.kv_attention(q, *key, *value, mask, *sinks, **attributes, bits=bits)
    # Bytes up to 255 cancel to values of at most 8 steps, and both sums round: 32 times the usual
    _assert_within_ulps(y, expected, 256)


def test_kv_attention_reads_the_cache_head_of_its_group_and_obeys_the_mask() -> None:
    rng = np.random.default_rng(9)
    q = rng.normal(size=(1, 4, 1, 8)).astype(np.float32)
    key, value = _cache(rng, 1, 2, 3, 8, 4), _cache(rng, 1, 2, 3, 8, 4)
    only_token_1 = np.array([False, True, False]).reshape(1, 1, 1, 3)
    (y,) = run("KvAttention", q, *key, *value, only_token_1, scale=1.0)
    stored = (ops.unpack_kv(value[0]).astype(np.float32) - value[2]) * value[1]
    for head in range(4):
        np.testing.assert_allclose(y[0, head, 0], stored[0, head // 2, 1], atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("group", [1, 3])
def test_attention_with_sinks_equals_its_reference(group, dtype) -> None:
    rng = np.random.default_rng(13)
    q = rng.normal(size=(2, 2 * group, 3, 8)).astype(dtype)
    key, value = (rng.normal(size=(2, 2, 5, 8)).astype(dtype) for _ in range(2))
    sinks = (3 * rng.normal(size=2 * group)).astype(dtype)
    mask = np.tri(3, 5, 2)[None, None].repeat(2, 0) > 0
    (y,) = run("AttentionSinks", q, key, value, mask, sinks, scale=0.3)
    expected = ops.attention_sinks(q, key, value, mask, sinks, scale=0.3)
    _assert_within_ulps(y, expected, 64)


def test_a_sink_is_a_token_with_its_score_and_a_value_of_zero() -> None:
    rng = np.random.default_rng(14)
    q = rng.normal(size=(1, 4, 1, 8)).astype(np.float32)
    key, value = (rng.normal(size=(1, 4, 3, 8)).astype(np.float32) for _ in range(2))
    sinks = np.array([-2.0, 0.0, 1.0, 30.0], np.float32)
    # A key along its head's query, as long as gives the sink's score
    length = sinks[None, :, None, None] / (0.5 * (q * q).sum(axis=-1, keepdims=True))
    keys = np.concatenate([key, length * q], axis=2)
    values = np.concatenate([value, np.zeros_like(q)], axis=2)
    mask, more = np.ones((1, 1, 1, 3), bool), np.ones((1, 1, 1, 4), bool)
    (y,) = run("AttentionSinks", q, key, value, mask, sinks, scale=0.5)
    unreachable = np.full(4, -1e9, np.float32)
    (wanted,) = run("AttentionSinks", q, keys, values, more, unreachable, scale=0.5)
    np.testing.assert_allclose(y, wanted, atol=1e-6)
    assert np.abs(y[0, 3]).max() < 1e-8 < np.abs(y[0, 0]).max()  # a large sink takes everything


def test_a_query_that_may_look_at_nothing_gets_finite_numbers() -> None:
    rng = np.random.default_rng(10)
    q = rng.normal(size=(1, 1, 2, 8)).astype(np.float32)
    key, value = _cache(rng, 1, 1, 2, 8, 4), _cache(rng, 1, 1, 2, 8, 4)
    nothing = np.zeros((1, 1, 2, 2), bool)
    (y,) = run("KvAttention", q, *key, *value, nothing, scale=1.0)
    assert np.isfinite(y).all()
    sink = np.array([-3.0], np.float32)
    (y,) = run("KvAttentionSinks", q, *key, *value, nothing, sink, scale=1.0)
    assert (y == 0).all()  # its sink takes everything


# --- Storage --------------------------------------------------------------------------------------


@given(st.lists(st.integers(-8, 7), min_size=1, max_size=20))
def test_int4_codes_survive_packing(codes) -> None:
    array = np.array([codes * 2, [0] * len(codes) * 2], np.int8)
    packed = ops.pack_int4(array)
    assert packed.shape == (2, len(codes))
    np.testing.assert_array_equal(ops.unpack_int4(packed), array)


@given(st.lists(st.integers(0, 15), min_size=1, max_size=20))
def test_cache_codes_survive_packing(codes) -> None:
    array = np.array([codes * 2], np.uint8)
    np.testing.assert_array_equal(ops.unpack_kv(ops.pack_kv(array)), array)


def test_the_even_code_is_in_the_low_nibble() -> None:
    assert ops.pack_int4(np.array([1, -2], np.int8)).tolist() == [0xE1]
    assert ops.pack_kv(np.array([3, 12], np.uint8)).tolist() == [0xC3]
    new = np.array([3, 12, 15, 0], np.float32).reshape(1, 1, 1, 4)
    empty = _cache(np.random.default_rng(0), 1, 1, 0, 4, 4)
    codes, *_ = run("KvAppend", new, *empty, bits=4, clip_ratio=1.0)
    assert codes.ravel().tolist() == [0xC3, 0x0F]


def test_a_transform_takes_matrices_that_are_neither_orthogonal_nor_symmetric() -> None:
    x = _tokens(np.random.default_rng(12), 2, 3, 48)
    a, b = _invertible(12, 4)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(run("Transform", x, a, b)[0], wide @ np.kron(a, b), atol=1e-5)
    across = np.kron(a, np.eye(4))
    np.testing.assert_allclose(run("TransformHeads", x, a)[0], wide @ across, atol=1e-5)


def _invertible(*orders: int) -> list[Array]:
    return [invertible(n, n, seed=n).astype(np.float32) for n in orders]


# --- All of them ----------------------------------------------------------------------------------


def _cases() -> dict[str, tuple[list[Array], dict[str, Any]]]:
    rng = np.random.default_rng(11)
    x = _tokens(rng, 2, 3, 48)
    q, scale = ops.quantize_int4(x)
    w, w_scale = rng.integers(-8, 8, (48, 5)).astype(np.int8), np.full(5, 0.01, np.float32)
    grouped_scale = rng.uniform(0.01, 0.02, (3, 5)).astype(np.float32)
    grouped_zero = rng.integers(-8, 8, (3, 5)).astype(np.int8)
    new = _tokens(rng, 2, 2, 3, 8)
    small, large = _cache(rng, 2, 2, 4, 8, 4), _cache(rng, 2, 2, 4, 8, 8)
    queries, mask = _tokens(rng, 2, 4, 3, 8), np.tri(3, 4, 1)[None, None].repeat(2, 0) > 0
    kv = {"bits": 4, "clip_ratio": 0.95}
    capped = {"scale": 0.5, "softcap": 0.7}
    sinks = np.array([-1.0, 0.0, 0.5, 3.0], np.float32)
    groups = {"clip_ratio": 0.95, "group_size": 4, "symmetric": 0}
    q_token, *by_token = ops.groups.quantize_groups(x, bits=4, **groups | {"group_size": 48})
    q_group, *by_group = ops.groups.quantize_groups(x, bits=4, **groups)
    past = _cache(rng, 2, 2, 4, 8, 4)[0], *(np.ones((2, 2, 4, 2), np.float32),) * 2
    past8 = large[0], *past[1:]
    return {
        "Hadamard": ([x, _orthonormal(12), _orthonormal(4)], {"factors": [12, 4]}),
        "HadamardHeads": ([x, _orthonormal(12)], {"factors": [12]}),
        "Transform": ([x, *_invertible(12, 4)], {}),
        "TransformHeads": ([x, *_invertible(12)], {}),
        "QuantizeInt4": ([x], {"bits": 4, "clip_ratio": 0.9}),
        "Int4Gemm": ([q, scale, w, w_scale], {"dtype": 1}),
        "Int8Gemm": ([q, scale, w, w_scale], {"dtype": 1}),
        "WeightOnlyGemm": ([x, w, w_scale], {}),
        "WeightOnlyGemmGroups": ([x, w, grouped_scale, grouped_zero], {}),
        "KvAppend": ([new, *small], kv),
        "KvAppendInt8": ([new, *large], kv | {"bits": 8}),
        "KvFakeQuantize": ([new], kv),
        "KvAttention": ([queries, *small, *small, mask], {"scale": 0.5}),
        "KvAttentionInt8": ([queries, *large, *large, mask], {"scale": 0.5}),
        "KvAttentionSoftcap": ([queries, *small, *small, mask], capped),
        "KvAttentionSoftcapInt8": ([queries, *large, *large, mask], capped),
        "KvAttentionSinks": ([queries, *small, *small, mask, sinks], {"scale": 0.5}),
        "KvAttentionSinksInt8": ([queries, *large, *large, mask, sinks], {"scale": 0.5}),
        "AttentionSinks": ([queries, new, new, mask[..., :3], sinks], {"scale": 0.5}),
        "QuantizeGroups": ([x], groups | {"bits": 4}),
        "Int4GemmAsymmetric": ([q_token, *by_token, w, w_scale], {"dtype": 1}),
        "Int8GemmAsymmetric": ([q_token, *by_token, w, w_scale], {"dtype": 1}),
        "Int4GemmGroups": ([q_group, *by_group, w, w_scale], {"group_size": 4, "dtype": 1}),
        "Int8GemmGroups": ([q_group, *by_group, w, w_scale], {"group_size": 4, "dtype": 1}),
        **{
            f"{name}WeightZeros": (
                [q_group, *by_group, w, grouped_scale, grouped_zero],
                {"group_size": 4, "dtype": 1},
            )
            for name in ("Int4Gemm", "Int8Gemm")
        },
        "KvAppendGroups": ([new, *past], groups | {"bits": 3}),
        "KvAppendGroupsInt8": ([new, *past8], groups | {"bits": 8}),
        "KvFakeQuantizeGroups": ([new], groups | {"bits": 5}),
        "KvDequantize": (list(past), {"dtype": 1}),
        "KvDequantizeInt8": (list(past8), {"dtype": 1}),
    }


@pytest.mark.parametrize("name", ops.OPERATORS)
def test_graph_optimization_changes_nothing(name) -> None:
    inputs, attributes = _cases()[name]
    optimized = run(name, *inputs, **attributes)
    plain = run(name, *inputs, optimized=False, **attributes)
    for a, b in zip(optimized, plain, strict=True):
        if a.dtype == np.uint8:
            np.testing.assert_array_equal(a, b)
        else:
            _assert_within_ulps(a, b, 8)


@pytest.mark.parametrize("name", ops.OPERATORS)
def test_a_node_names_its_plugin(name) -> None:
    inputs, attributes = _cases()[name]
    node = ops.node(name, [ir.Value() for _ in inputs], attributes, at="/op")
    assert node.domain == "quarot"
    assert node.attributes["plugin_namespace"].as_string() == "quarot"
    assert node.attributes["plugin_version"].as_string() == "1"


def test_a_node_with_a_missing_attribute_is_a_mistake_of_ours() -> None:
    with pytest.raises(ValueError, match=r"/here: QuantizeInt4 takes .*'bits', 'clip_ratio'"):
        ops.node("QuantizeInt4", [ir.Value()], {"bits": 4}, at="/here")


def test_declare_adds_the_functions_in_use_and_drops_the_others() -> None:
    x = ir.Value(name="x", type=ir.TensorType(FLOAT32), shape=ir.Shape([2, 4]))
    node = ops.node("QuantizeInt4", [x], {"bits": 4, "clip_ratio": 0.9}, at="/quantize")
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 23}, name="g")
    model = ir.Model(graph, ir_version=10, functions=[ops.function("Hadamard")])
    ops.declare(model)
    assert [identifier[1] for identifier in model.functions] == ["QuantizeInt4"]
    assert model.graph.opset_imports["quarot"] == 1
